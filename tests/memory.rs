//! A fit on the CPU takes no more memory than its plan says, and one of a stream than it is allowed for rows besides. Caches share a
//! prompt.

mod common;

use candle_core::{DType, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget, KvCodes};
use candle_flash_kmeans::{EmptyClusters, Init, KMeans, Metric, Source, StoredType, StreamOptions};
use common::*;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

/// Counts the bytes in use and their peak.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are passed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(USED.fetch_add(layout.size(), SeqCst) + layout.size(), SeqCst);
        // SAFETY: the caller's obligations are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), SeqCst);
        // SAFETY: as above.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes in use at once during a fit, beyond those before it.
fn peak(settings: &KMeans, x: &Tensor) -> u64 {
    peak_of(|| {
        settings.fit(x).unwrap();
    })
}

/// The most bytes in use at once while `f` runs, beyond those before it.
fn peak_of(f: impl FnOnce()) -> u64 {
    let before = USED.load(SeqCst);
    PEAK.store(before, SeqCst);
    f();
    (PEAK.load(SeqCst) - before) as u64
}

/// Rows are 48 MB, of which there may be 8 MiB; a fit has a label of each, and works on a block.
fn streams_keep_to_their_memory(wrong: &mut Vec<String>) {
    let (n, d, k, memory) = (400_000, 30, 16, 8 << 20);
    let values = |row: u64, column: usize| ((row as usize * 31 + column * 7) % 1009) as f32;
    let source = Source::from_fn(n as u64, d, StoredType::F32, move |rows, into| {
        for (row, into) in rows.zip(into.chunks_exact_mut(4 * d)) {
            into.chunks_exact_mut(4).enumerate().for_each(|(j, v)| v.copy_from_slice(&values(row, j).to_ne_bytes()));
        }
        Ok(())
    });
    let source = source.unwrap();
    for (rows, relocates) in [(2_000, false), (2_000, true), (usize::MAX, false)] {
        let options = StreamOptions::new(&candle_core::Device::Cpu).memory(memory).block_rows(rows);
        let block = Tensor::zeros((rows.min(memory / 8 / (4 * d)), d), DType::F32, &candle_core::Device::Cpu).unwrap();
        let policy = if relocates { EmptyClusters::Relocate } else { EmptyClusters::Keep };
        let settings = KMeans::new(k).max_iters(2).init(Init::Even).empty_clusters(policy);
        let took = peak_of(|| {
            settings.fit_stream(&source, &options).unwrap();
        });
        let most = (memory + 4 * n) as u64 + settings.plan(&block).unwrap().bytes;
        if took > most || took * 2 < most {
            wrong.push(format!("a stream in blocks of {rows}: {took} bytes, {most} allowed, relocates: {relocates}"));
        }
    }
}

/// A start by k-means|| takes no more than the plan says, whatever the blocks and however many rows it draws.
fn starts_keep_to_their_plan(wrong: &mut Vec<String>) {
    let device = candle_core::Device::Cpu;
    let mut beyond_rest = 0;
    for (n, d, k, rows, dtype, metric, weighted) in [
        (200_000, 4, 16, 20_000, StoredType::F32, Metric::SquaredEuclidean, false),
        (300_000, 2, 4, 300_000, StoredType::F32, Metric::SquaredEuclidean, true),
        (40_000, 30, 1_000, 1_000, StoredType::F32, Metric::SquaredEuclidean, false),
        (30_000, 200, 300, 2_000, StoredType::F16, Metric::Cosine, true),
        (20_000, 16, 500, 20_000, StoredType::F64, Metric::Dot, false),
    ] {
        let mut rng = rng(72);
        let x = uniform(&[n, d], 0.0, 1.0, DType::F64, &mut rng);
        let x = x
            .to_dtype(match dtype {
                StoredType::F16 => DType::F16,
                StoredType::F32 => DType::F32,
                _ => DType::F64,
            })
            .unwrap();
        let source = Source::from_tensor(&x).unwrap();
        let memory = 10 * rows * source.row_bytes();
        let options = StreamOptions::new(&device).memory(memory).block_rows(rows);
        let mut settings = KMeans::new(k).metric(metric).init(Init::KMeansParallel).max_iters(1);
        if weighted {
            settings = settings.sample_weights(&uniform(&[n], 1.0, 1.0, DType::F64, &mut rng));
        }
        let plan = settings.plan_stream(&source, &options).unwrap().devices.remove(0);
        let of_weights = if weighted { 32 * n as u64 } else { 0 };
        let rest = plan.block.bytes + memory as u64 + 4 * n as u64 + of_weights;
        let took = peak_of(|| {
            settings.fit_stream(&source, &options).unwrap();
        });
        beyond_rest += usize::from(took > rest);
        let most = rest + plan.start_bytes;
        if took > most || took * 8 < most {
            wrong.push(format!("a start by k-means||: {took} bytes, {most} allowed: {plan}"));
        }
    }
    // Not all of it has room in what is allowed for the rest of a fit.
    assert!(beyond_rest > 0);
}

/// Labels would be 8 MB beside 2 MiB of rows.
fn labels_in_a_file_take_no_memory(wrong: &mut Vec<String>) {
    let (n, d, k, memory) = (2_000_000, 2, 4, 2 << 20);
    let source = Source::from_fn(n, d, StoredType::F32, |rows, into| {
        for (row, into) in rows.zip(into.chunks_exact_mut(8)) {
            into.copy_from_slice(&[row % 1009, row % 31].map(|v| (v as f32).to_ne_bytes()).concat());
        }
        Ok(())
    });
    let (source, path) = (source.unwrap(), std::env::temp_dir().join(format!("labels-{}.npy", std::process::id())));
    let options = StreamOptions::new(&candle_core::Device::Cpu).memory(memory);
    let block = Tensor::zeros((memory / 8 / 8, d), DType::F32, &candle_core::Device::Cpu).unwrap();
    let settings = KMeans::new(k).max_iters(2).init(Init::Even);
    let took = peak_of(|| {
        settings.fit_stream_to_npy(&source, &options, &path).unwrap();
    });
    let most = memory as u64 + settings.plan(&block).unwrap().bytes;
    assert!(most < 4 * n);
    if took > most {
        wrong.push(format!("labels in a file: {took} bytes, {most} allowed"));
    }
    std::fs::remove_file(path).unwrap();
}

/// Clones of a prompt take its memory once, and those that go on a copy each. A prompt is read without a matrix of its scores.
fn caches_share_their_prompt(wrong: &mut Vec<String>) {
    let (heads, n, d) = (12, 4096, 64);
    let x = Tensor::zeros((1, heads, n, d), DType::F32, &candle_core::Device::Cpu).unwrap();
    let one = x.narrow(2, 0, 1).unwrap();
    let cache = ClusteredKvCache::new(2 * n);
    let mut layer = ClusteredAttention::new(cache, KvBudget::new(64)).auto_cluster(false);
    let scores = (4 * heads * n * n) as u64;
    let took = peak_of(|| drop(layer.forward(&x, &x, &x, 0).unwrap()));
    if took * 2 > scores {
        wrong.push(format!("the attention of a prompt: {took} bytes, its scores are {scores}"));
    }
    let stored = (2 * 4 * heads * 2 * n * d) as u64;
    let took = peak_of(|| {
        let mut clones: Vec<_> = (0..50).map(|_| layer.clone()).collect();
        for clone in &mut clones[..3] {
            clone.forward(&one, &one, &one, n).unwrap();
        }
    });
    if !(3 * stored..4 * stored).contains(&took) {
        wrong.push(format!("fifty clones, three of which go on: {took} bytes, and {stored} are stored"));
    }
}

/// Once they are codes, tokens take what the cache says, and less than a quarter of f16.
fn codes_free_their_tokens(wrong: &mut Vec<String>) {
    let (heads, n, d) = (2, 12_000, 64);
    let x = uniform(&[1, heads, n, d], 0.0, 1.0, DType::F16, &mut rng(73));
    let before = USED.load(SeqCst);
    let mut cache = ClusteredKvCache::new(n).cluster_size(16).codes(KvCodes::new());
    cache.append(&x, &x).unwrap();
    cache.cluster().unwrap();
    let (used, says) = (USED.load(SeqCst) - before, cache.bytes());
    // Besides tensors a cache has some words of its own.
    if used < says || used > says + 16_384 {
        wrong.push(format!("a cache with codes: {used} bytes, and it says {says}"));
    }
    if 4 * used > 2 * 2 * heads * n * d {
        wrong.push(format!("a cache with codes: {used} bytes, and in f16 {}", 2 * 2 * heads * n * d));
    }
}

// One test, so that nothing else allocates meanwhile.
#[test]
fn peak_is_within_the_plan() {
    let (mut rng, mut wrong) = (rng(71), vec![]);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (two, sixteen) = (pool(2), pool(16));
    for (b, n, k, d) in [
        (1, 100_000, 16, 8),
        (1, 20_000, 500, 64),
        (8, 5_000, 64, 32),
        (1, 4_000, 2_000, 200),
        (200, 1000, 20, 2),
        (1, 100_000, 16, 1),
        (3, 30_000, 9, 1),
        (40, 1000, 20, 1),
    ] {
        for (metric, dtype) in METRICS.into_iter().zip([DType::F32, DType::F16, DType::F64, DType::F32]) {
            let x = uniform(&[b, n, d], 0.0, 1.0, dtype, &mut rng);
            let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng);
            let lengths = Tensor::full((n - 1).max(k) as u32, b, x.device()).unwrap();
            let given = Init::Given(x.narrow(1, 0, k).unwrap());
            let plain = KMeans::new(k).metric(metric).max_iters(2).init(given);
            // The documentation of the plan adds this for a copy.
            let copy = x.elem_count() * dtype.size_in_bytes();
            // One centroid on all of the rows' near side: the others are empty and have to move.
            let far = (x.narrow(1, 0, k).unwrap() + 1e3).unwrap();
            let relocated = plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(far));
            let all = [
                (plain.clone(), &x, 0, "plain"),
                (plain.clone().sample_weights(&weights), &x, 0, "weighted"),
                (plain.clone().lengths(&lengths), &x, 0, "ragged"),
                (plain.clone().init(Init::Random), &x, 0, "random"),
                (plain.clone().init(Init::KMeansParallel), &x, 0, "k-means||"),
                (plain.clone().init(Init::KMeansPlusPlus), &x, 0, "k-means++"),
                (plain.clone().init(Init::GreedyKMeansPlusPlus), &x, 0, "greedy k-means++"),
                (relocated, &x, 0, "relocated"),
                (plain, &x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap(), copy, "copied"),
            ];
            // The middle ones cost seconds where there are thousands of clusters.
            let slow =
                |what: &str| ["random", "k-means||", "k-means++", "greedy k-means++", "relocated"].contains(&what);
            for (settings, x, more, what) in all.into_iter().filter(|c| k <= 64 || !slow(c.3)) {
                // Every thread may need scratch, and on many of them most never do.
                for (threads, of_use) in [(&two, true), (&sixteen, false)] {
                    let (took, plan) = threads.install(|| (peak(&settings, x), settings.plan(x).unwrap()));
                    let what = format!("{what}: {took} bytes at {b} {n} {k} {d} {metric:?} {dtype:?}: {plan}");
                    if took > plan.bytes + more as u64 {
                        wrong.push(what);
                    } else if of_use && took * 8 < plan.bytes {
                        wrong.push(format!("a bound of no use: {what}"));
                    }
                }
            }
        }
    }
    streams_keep_to_their_memory(&mut wrong);
    labels_in_a_file_take_no_memory(&mut wrong);
    caches_share_their_prompt(&mut wrong);
    codes_free_their_tokens(&mut wrong);
    starts_keep_to_their_plan(&mut wrong);
    // Ties and outliers leave many candidates for a row, and the memory for them is as limited.
    for (b, n, k, d) in [(1, 1_000, 1_000, 3), (2, 1_000, 200, 8), (1, 8_000, 40, 5)] {
        for (metric, dtype) in METRICS.into_iter().zip([DType::F32, DType::F16, DType::F64, DType::BF16]) {
            let values: Vec<f64> = f64s(&uniform(&[b * n, d], 0.0, 1.0, DType::F64, &mut rng));
            let shape = [b, n, d];
            let zeros = tensor(&shape, dtype, |i| if i % 5 < i % 3 { 0.0 } else { -0.0 });
            let halves = tensor(&shape, dtype, |i| (values[i] * 2.0).round() / 2.0);
            let outlier = tensor(&shape, dtype, |i| values[i] * if i / d % n == 5 { 6e4 } else { 1.0 });
            // So near each other and so far out that most centroids are candidates for most rows.
            let tight = tensor(&shape, dtype, |i| 1000.0 + values[i] / 64.0);
            let lengths = Tensor::full((n - 1).max(k) as u32, b, zeros.device()).unwrap();
            for (x, kind) in [(&zeros, "zeros"), (&halves, "ties"), (&outlier, "an outlier"), (&tight, "tight")] {
                let plain = KMeans::new(k).metric(metric).max_iters(2);
                let given = plain.clone().init(Init::Given(x.narrow(1, 0, k).unwrap()));
                let all = [
                    (given.clone(), "given"),
                    (given.clone().lengths(&lengths), "ragged"),
                    (plain.clone().n_init(3), "three starts"),
                    (plain.clone().init(Init::KMeansPlusPlus).n_init(2), "k-means++ twice"),
                    (plain.clone().init(Init::KMeansParallel), "k-means||"),
                    (plain.empty_clusters(EmptyClusters::Relocate), "relocated"),
                ];
                let slow = |what: &str| ["k-means++ twice", "k-means||"].contains(&what);
                for (settings, what) in all.into_iter().filter(|c| k <= 300 || !slow(c.1)) {
                    for threads in [&two, &sixteen] {
                        let (took, plan) = threads.install(|| (peak(&settings, x), settings.plan(x).unwrap()));
                        if took > plan.bytes {
                            wrong.push(format!(
                                "{kind}, {what}: {took} bytes at {b} {n} {k} {d} {metric:?} {dtype:?}: {plan}"
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
