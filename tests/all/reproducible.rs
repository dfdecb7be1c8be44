//! The same input, seed and version: the same bits, whatever runs them.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing, EmptyClusters, Fit, Init, KMeans, Metric, Source};
use rayon::{ThreadPool, ThreadPoolBuilder};

fn all_bits(fit: &Fit) -> Vec<u64> {
    let counts = [&fit.labels, &fit.counts, &fit.n_iter, &fit.converged].map(u32s).concat();
    [bits(&fit.centroids), bits(&fit.inertia), counts.into_iter().map(u64::from).collect()].concat()
}

fn cases(device: &Device) -> Vec<(KMeans, Tensor)> {
    let mut rng = rng(51);
    let weights = uniform(&[20_000], 1.0, 1.0, DType::F64, &mut rng).to_device(device).unwrap();
    let mut cases = vec![];
    for (i, metric) in METRICS.into_iter().enumerate() {
        let x = uniform(&[20_000, 9], 0.4, 1.0, DTYPES[i], &mut rng).to_device(device).unwrap();
        let few = x.narrow(0, 0, 900).unwrap().reshape((3, 300, 9)).unwrap();
        // Two clusters hold so many rows that each is summed in many parts.
        cases.push((KMeans::new(2).metric(metric).max_iters(6).tol(0.0), x.clone()));
        let settings = KMeans::new(13).metric(metric).max_iters(6).tol(0.0);
        cases.push((settings.clone().sample_weights(&weights).init(Init::KMeansPlusPlus), x.clone()));
        cases.push((settings.clone().init(Init::KMeansParallel), few.clone()));
        cases.push((settings.n_init(3).empty_clusters(EmptyClusters::Relocate), few));
    }
    cases
}

#[test]
fn for_any_number_of_threads() {
    for (settings, x) in cases(&Device::Cpu) {
        let with = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            all_bits(&pool.install(|| settings.fit(&x)).unwrap())
        };
        let one = with(1);
        [2, 3, 8, 16].into_iter().for_each(|threads| assert!(with(threads) == one, "{threads} threads"));
    }
}

#[test]
fn from_run_to_run_and_device_to_device() {
    let on_cpu: Vec<_> = cases(&Device::Cpu).iter().map(|(settings, x)| all_bits(&settings.fit(x).unwrap())).collect();
    for device in devices() {
        // The CPU's runs differ in how threads share the work, the GPU's in how blocks do.
        let runs = if device.is_cpu() { 6 } else { 20 };
        for ((settings, x), first) in cases(&device).into_iter().zip(&on_cpu) {
            (0..runs).for_each(|_| assert!(all_bits(&settings.fit(&x).unwrap()) == *first, "{:?}", device.location()));
        }
    }
}

/// A stream cut into blocks of a tile, of a few and of all, on any number of threads, and shared by ranks, whose threads take as many as
/// there are processors; and one of these fits a hundred times.
#[test]
fn for_any_cut_of_a_stream() {
    let mut rng = rng(54);
    let (n, d, k) = (3000, 6, 9);
    let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng);
    let plain = KMeans::new(k).max_iters(4).tol(0.0);
    for (settings, dtype, repeats) in [
        (plain.clone().init(Init::KMeansParallel), DType::F16, 100),
        (plain.metric(Metric::Cosine).sample_weights(&weights).n_init(2), DType::F32, 0),
    ] {
        let x = blobs(&[n, d], 7, dtype, &mut rng);
        let (source, tile) = (Source::from_tensor(&x).unwrap(), settings.plan(&x).unwrap().rows);
        assert!(7 * tile < n);
        let whole = all_bits(&settings.fit(&x).unwrap());
        let run = |pool: &ThreadPool, rows: usize, ranks: usize| {
            // Of the rows half may stay.
            let memory = 8 * rows * source.row_bytes() + n / 2 * source.row_bytes();
            let options = testing::on_each(&vec![Device::Cpu; ranks]).block_rows(rows).memory(memory);
            let fit = pool.install(|| settings.fit_stream(&source, &options)).unwrap();
            assert!(all_bits(&fit) == whole, "{} threads, {rows} rows, {ranks} ranks", pool.current_num_threads());
        };
        for threads in [1, 2, 3, 8, 16] {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for (rows, ranks) in [tile, 2 * tile, 7 * tile, n].into_iter().flat_map(|r| [1, 2, 4, 8].map(|s| (r, s))) {
                run(&pool, rows, ranks);
            }
        }
        let pool = ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        (0..repeats).for_each(|_| run(&pool, 2 * tile, 4));
    }
}

/// A hundred runs by every kernel that can assign, and by the one launch that can do all of a fit.
#[test]
fn a_hundred_times_on_every_path() {
    for device in devices().into_iter().filter(Device::is_cuda) {
        let mut rng = rng(53);
        for (b, n, k, d, dtype, metric) in [
            (3, 3000, 40, 128, DType::F16, Metric::SquaredEuclidean),
            (1, 9000, 600, 64, DType::BF16, Metric::Cosine),
            (2, 2000, 30, 20, DType::F32, Metric::Dot),
            (70, 500, 16, 4, DType::F32, Metric::SquaredEuclidean),
            (70, 300, 9, 1, DType::F16, Metric::Cosine),
            (2, 900, 12, 33, DType::F64, Metric::SquaredEuclidean),
            (2, 900, 12, 5, DType::F32, Metric::Manhattan),
        ] {
            let x = blobs(&[b, n, d], k / 2, dtype, &mut rng).to_device(&device).unwrap();
            let weights = uniform(&[b, n], 1.0, 0.5, DType::F64, &mut rng).to_device(&device).unwrap();
            let plain = KMeans::new(k).init(Init::Random).metric(metric).max_iters(5).tol(0.0).check_finite(false);
            for settings in [plain.clone(), plain.sample_weights(&weights)] {
                let mut first = None;
                let forced = testing::candidates(&x, k, metric).unwrap().into_iter().map(Some);
                for kernel in forced.chain([None]) {
                    testing::force(kernel);
                    let mut prepared = settings.prepare(x.shape(), dtype, &device).unwrap();
                    for run in 0..100 {
                        prepared.run(&x).unwrap();
                        let labels = u32s(prepared.labels()).into_iter().map(u64::from);
                        let all: Vec<u64> = bits(prepared.centroids()).into_iter().chain(labels).collect();
                        assert!(*first.get_or_insert_with(|| all.clone()) == all, "{kernel:?} {run} {dtype:?} {d}");
                    }
                    testing::force(None);
                }
            }
        }
    }
}

/// A small problem twenty times: what is left over from one call must not reach the next.
#[test]
fn twenty_times() {
    for device in devices() {
        let x = blobs(&[4, 150, 6], 5, DType::F32, &mut rng(52)).to_device(&device).unwrap();
        for metric in METRICS {
            let run = || all_bits(&KMeans::new(7).metric(metric).seed(9).fit(&x).unwrap());
            let first = run();
            (0..20).for_each(|_| assert!(run() == first, "{metric:?} on {:?}", device.location()));
        }
    }
}

/// Threads of a program that cluster at the same time, each with its own device handle.
#[test]
fn from_many_threads_at_once() {
    let x = blobs(&[500, 6], 5, DType::F32, &mut rng(53));
    let run = move || {
        let each = |device: Device| all_bits(&KMeans::new(7).fit(&x.to_device(&device).unwrap()).unwrap());
        devices().into_iter().map(each).collect::<Vec<_>>()
    };
    let first = run();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|_| scope.spawn(&run)).collect();
        threads.into_iter().for_each(|t| assert!(t.join().unwrap() == first));
    });
}
