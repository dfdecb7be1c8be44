//! Clustered tokens as codes: what is read of them against the tokens that they stand for, and what they take.

use super::{
    kv_cache::{budget, empty, random, refused, spec, tolerance, RECENT, SCALE, SINKS},
    kv_rotations::turned,
};
use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget, KvCodes, Rotation};
use candle_flash_kmeans::testing;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

pub const CODES: [KvCodes; 3] = [FEW, KvCodes::new().keys(4, 8).values(2, 8), KvCodes::new().keys(2, 4).values(4, 8)];
/// Codes for whose entries few tokens are enough.
pub const FEW: KvCodes = KvCodes::new().keys(1, 4).values(2, 4);
/// Keys, values and labels.
type Head = (Vec<f64>, Vec<f64>, Vec<usize>);
type Change<'a> = &'a dyn Fn(&mut ClusteredKvCache);

/// Pairs of tokens of a segment.
const PAIRS: usize = 20;
const CLUSTERS: usize = 11;

/// Shares of the longest difference that gains hold exactly.
pub const OCTAVES: &[f64] = &[1.0, 0.5, 0.25];
/// Differences of one length.
pub const ALIKE: &[f64] = &[1.0];

/// Keys and values `(2, 2, 2 * PAIRS, d)` that codes hold but for rounding, and the labels of their clusters: a token is a mean, in whole
/// steps of its largest number, and a difference that is one of two in four columns, times one of the `lengths` of keys or of values; its
/// partner has the opposite one. The first has the first length.
fn exact_tokens(d: usize, lengths: [&[f64]; 2], device: &Device, rng: &mut ChaCha8Rng) -> [Tensor; 3] {
    let mut of_head = || {
        let labels: Vec<usize> = (0..PAIRS).map(|_| rng.random_range(0..CLUSTERS - 2)).collect();
        let mut rows = |lengths: &[f64]| {
            let mean = |column: usize, rng: &mut ChaCha8Rng| match column {
                0 => 127,
                _ => rng.random_range(-127..128),
            };
            let means: Vec<Vec<f64>> = (0..CLUSTERS)
                .map(|_| (0..d).map(|column| f64::from(mean(column, rng)) * 2.0 / 127.0).collect())
                .collect();
            let signs: Vec<Vec<f64>> =
                (0..PAIRS).map(|_| (0..d / 4).map(|_| [-0.125, 0.125][rng.random_range(0..2)]).collect()).collect();
            let length = |i: usize| lengths[if i == 0 { 0 } else { rng.random_range(0..lengths.len()) }];
            let lengths: Vec<f64> = (0..PAIRS).map(length).collect();
            let token = |i: usize, sign: f64| {
                let (mean, signs) = (&means[labels[i]], &signs[i]);
                (0..d).map(|column| mean[column] + sign * lengths[i] * signs[column / 4]).collect::<Vec<_>>()
            };
            (0..PAIRS).map(|i| token(i, 1.0)).chain((0..PAIRS).map(|i| token(i, -1.0))).flatten().collect::<Vec<_>>()
        };
        let (keys, values) = (rows(lengths[0]), rows(lengths[1]));
        (keys, values, labels.repeat(2))
    };
    let heads: Vec<Head> = (0..4).map(|_| of_head()).collect();
    let rows = |pick: fn(&Head) -> &Vec<f64>| {
        let all = heads.iter().flat_map(|head| pick(head).clone());
        Tensor::from_iter(all, device).unwrap().reshape((2, 2, 2 * PAIRS, d)).unwrap()
    };
    let labels = heads.iter().flat_map(|head| head.2.iter().map(|&label| label as u32));
    let labels = Tensor::from_iter(labels, device).unwrap().reshape((2, 2, 2 * PAIRS)).unwrap();
    [rows(|head| &head.0), rows(|head| &head.1), labels]
}

/// The same tokens in two segments of a cache with codes and of one without, and some that are not clustered.
pub fn twins(codes: KvCodes, d: usize, dtype: DType, device: &Device, rng: &mut ChaCha8Rng) -> [ClusteredKvCache; 2] {
    twins_of([ALIKE, ALIKE], codes, d, dtype, device, rng)
}

/// The same of tokens that differ from their means by such lengths.
pub fn twins_of(
    lengths: [&[f64]; 2],
    codes: KvCodes,
    d: usize,
    dtype: DType,
    device: &Device,
    rng: &mut ChaCha8Rng,
) -> [ClusteredKvCache; 2] {
    let mut twins = [empty().codes(codes), empty()];
    let append = |keys: &Tensor, values: &Tensor, twins: &mut [ClusteredKvCache; 2]| {
        for cache in twins {
            cache.append(&keys.to_dtype(dtype).unwrap(), &values.to_dtype(dtype).unwrap()).unwrap();
        }
    };
    let mut random = |n| random([2, 2, n, d], DType::F64, device, rng);
    append(&random(SINKS), &random(SINKS), &mut twins);
    let near = [random(RECENT), random(RECENT), random(5), random(5)];
    for segment in 0..2 {
        let [keys, values, labels] = exact_tokens(d, lengths, device, rng);
        append(&keys, &values, &mut twins);
        append(&near[0], &near[1], &mut twins);
        twins.iter_mut().for_each(|cache| cache.group(&labels, CLUSTERS).unwrap());
        // The recent ones of the first segment would be clustered with the second.
        if segment == 0 {
            let n = twins[0].current_seq_len() - RECENT;
            twins.iter_mut().for_each(|cache| cache.truncate(n).unwrap());
        }
    }
    append(&near[2], &near[3], &mut twins);
    twins
}

/// The ways in which tokens of a budget are chosen: with estimates, and together.
pub const HOW: [(bool, bool); 4] = [(true, false), (false, false), (true, true), (false, true)];

/// Holds attention over codes to that over the rows that they stand for, with each budget of tokens in each of these ways, and a GPU to its
/// kernel of codes where it has one.
pub fn assert_read_alike(
    [coded, plain]: &[ClusteredKvCache; 2],
    [heads, d]: [usize; 2],
    dtype: DType,
    (budgets, how): (&[usize], &[(bool, bool)]),
    rng: &mut ChaCha8Rng,
    what: &str,
) {
    let device = plain.k().unwrap().unwrap().device().clone();
    // Several rows rank clusters by scores of their dtype.
    let rows: &[usize] = if dtype.size_in_bytes() < 4 { &[1] } else { &[1, 4] };
    for &rows in rows {
        let q = random([2, heads, rows, d], dtype, &device, rng);
        for (&tokens, &(estimate, shared)) in budgets.iter().flat_map(|tokens| how.iter().map(move |how| (tokens, how)))
        {
            let all = (tokens, estimate, shared);
            testing::launches();
            let out = coded.attend(&q, SCALE, budget(all)).unwrap();
            let kernel = format!("attend_coded_{d}_");
            let ran = testing::launches().iter().any(|l| l.starts_with(&kernel));
            assert_eq!(ran, device.is_cuda() && rows == 1 && d >= 64 && tokens > 0, "{kernel}");
            let what = format!("{what} {dtype:?} of {d} columns, {rows} rows, {all:?}");
            assert_near(&out, &spec(plain, &q, all), tolerance(dtype), &what);
        }
    }
}

/// Tokens that codes hold are read as if there were no codes, by one row and by several, whatever the budget.
#[test]
fn codes_are_read_as_what_they_stand_for() {
    for (device, codes) in devices().into_iter().flat_map(|device| CODES.map(|codes| (device.clone(), codes))) {
        // The last has more query heads to a key head than a kernel takes at once.
        for (dtype, d, heads) in [
            (DType::F64, 8, 6),
            (DType::F32, 8, 6),
            (DType::F32, 64, 6),
            (DType::F16, 128, 6),
            (DType::BF16, 64, 20),
            (DType::F32, 80, 6),
            (DType::BF16, 80, 6),
            (DType::F16, 96, 6),
            (DType::F32, 112, 20),
            (DType::F16, 112, 6),
            (DType::F32, 256, 6),
            (DType::F16, 256, 20),
        ] {
            let mut rng = rng(80);
            let [coded, plain] = twins(codes.clone(), d, dtype, &device, &mut rng);
            assert!(coded.clusters().is_none());
            assert_read_alike(
                &[coded, plain],
                [heads, d],
                dtype,
                (&[0, 1, 7, 30, 79, 80], &HOW),
                &mut rng,
                &format!("{codes:?}"),
            );
        }
    }
}

/// The same with everything read, in every dtype, where tokens were forgotten and sequences moved.
#[test]
fn codes_are_forgotten_and_moved_as_tokens_are() {
    for (device, dtype, (codes, lengths)) in devices().into_iter().flat_map(|device| {
        let of = [(FEW, ALIKE), (turned(&FEW, 8, &device), ALIKE), (FEW.gains(true, true), OCTAVES)];
        DTYPES.into_iter().flat_map(move |t| of.clone().map(|codes| (device.clone(), t, codes)))
    }) {
        let mut rng = rng(81);
        let all = twins_of([lengths; 2], codes.clone(), 8, dtype, &device, &mut rng);
        let n = all[0].current_seq_len();
        assert_eq!(n, SINKS + 4 * PAIRS + RECENT + 5);
        let index = Tensor::new(&[1u32, 0, 1], &device).unwrap();
        let changes: [(&str, Change); 9] = [
            ("nothing", &|_| {}),
            ("recent tokens cut", &|c| c.truncate(n - 4).unwrap()),
            ("a segment cut", &|c| c.truncate(SINKS + 3 * PAIRS + 1).unwrap()),
            ("a segment and more cut", &|c| c.truncate(SINKS + PAIRS).unwrap()),
            ("all clusters cut", &|c| c.truncate(SINKS).unwrap()),
            ("some evicted", &|c| c.evict(7).unwrap()),
            ("a segment and more evicted", &|c| c.evict(2 * PAIRS + 9).unwrap()),
            ("all clusters and more evicted", &|c| c.evict(4 * PAIRS + 2).unwrap()),
            ("reordered", &|c| c.reorder(&index).unwrap()),
        ];
        for (what, change) in changes {
            let what = format!("{what}, {dtype:?}, {codes:?}");
            let [mut coded, mut plain] = all.clone();
            change(&mut coded);
            change(&mut plain);
            assert_eq!(coded.current_seq_len(), plain.current_seq_len(), "{what}");
            for (a, b) in [(coded.k(), plain.k()), (coded.v(), plain.v())] {
                assert_near(&a.unwrap().unwrap(), &f64s(&b.unwrap().unwrap()), tolerance(dtype), &what);
            }
            let batch = plain.k().unwrap().unwrap().dims()[0];
            for rows in [1, 3] {
                let q = random([batch, 4, rows, 8], dtype, &device, &mut rng);
                let [a, b] = [&coded, &plain].map(|c| c.attend(&q, SCALE, KvBudget::new(usize::MAX)).unwrap());
                assert_near(&a, &f64s(&b), tolerance(dtype), &format!("{what}, {rows} rows"));
            }
            // It goes on.
            let [k, v] = [(); 2].map(|_| random([batch, 2, 90, 8], dtype, &device, &mut rng));
            coded.append(&k, &v).unwrap();
            assert!(coded.cluster().unwrap(), "{what}");
            assert_eq!(coded.k().unwrap().unwrap().dims()[2], plain.current_seq_len() + 90, "{what}");
        }
        // What was cloned has not changed.
        let q = random([2, 4, 1, 8], dtype, &device, &mut rng);
        let [a, b] = all.each_ref().map(|c| c.attend(&q, SCALE, KvBudget::new(usize::MAX)).unwrap());
        assert_near(&a, &f64s(&b), tolerance(dtype), "the clones' source");
    }
}

/// A cache with codes of `n` random tokens, `(1, 2, n, 64)`, clustered.
pub fn coded(codes: KvCodes, n: usize, dtype: DType, device: &Device, rng: &mut ChaCha8Rng) -> ClusteredKvCache {
    let mut cache = ClusteredKvCache::new(n).cluster_size(16).segment(1).codes(codes);
    let [k, v] = [(); 2].map(|_| random([1, 2, n, 64], dtype, device, rng));
    cache.append(&k, &v).unwrap();
    assert!(cache.cluster().unwrap());
    cache
}

/// Random keys keep all but a hundredth of their variance in 4 bits, and all but a tenth in 2.
#[test]
fn codes_are_near() {
    for device in devices() {
        for (codes, most) in [(KvCodes::new().keys(1, 4), 0.01), (KvCodes::new().keys(4, 8), 0.1)] {
            let mut rng = rng(82);
            let mut cache = ClusteredKvCache::new(4000).codes(codes.clone());
            let k = random([1, 2, 4000, 64], DType::F32, &device, &mut rng);
            cache.append(&k, &k).unwrap();
            assert!(cache.cluster().unwrap());
            let mean = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap() as f64;
            let lost = mean((cache.k().unwrap().unwrap() - &k).unwrap()) / mean(k);
            assert!((most / 10.0..most).contains(&lost), "{codes:?}: {lost}");
        }
    }
}

/// One row by a kernel is one of several by Candle's ops, and has the same bits for any number of threads.
#[test]
fn one_row_is_one_of_many() {
    for device in devices() {
        for codes in [
            KvCodes::new(),
            KvCodes::new().keys(2, 8).values(4, 8),
            KvCodes::new().keys(4, 4).values(1, 4),
            KvCodes::new().shared(true, true).rotation(Rotation::Random { seed: 3 }, Rotation::Pca),
            KvCodes::new().keys(4, 8).values(1, 4).shared(false, true).rotation(Rotation::Pca, Rotation::None),
            KvCodes::new().gains(true, true),
            KvCodes::new().keys(2, 8).values(2, 4).gains(false, true).shared(true, true),
        ] {
            let mut rng = rng(83);
            let cache = coded(codes.clone(), 3000, DType::F32, &device, &mut rng);
            let q = random([1, 6, 2, 64], DType::F32, &device, &mut rng);
            for all in
                [(700, true, false), (700, true, true), (0, true, false), (700, false, false), (5000, true, false)]
            {
                let both = cache.attend(&q, SCALE, budget(all)).unwrap().narrow(2, 1, 1).unwrap();
                let last = q.narrow(2, 1, 1).unwrap();
                testing::launches();
                let one = cache.attend(&last, SCALE, budget(all)).unwrap();
                let kernel = if device.is_cpu() { "attend_coded_f32" } else { "attend_coded_64_f32" };
                assert_eq!(testing::launches().contains(&kernel.into()), device.is_cpu() || all.0 > 0);
                assert_near(&one, &f64s(&both), 1e-4, &format!("{codes:?} {all:?}"));
                let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
                let again = pool.install(|| {
                    let again = cache.attend(&last, SCALE, budget(all)).unwrap();
                    // Threads of a GPU have streams of their own, and another one reads this.
                    device.synchronize().unwrap();
                    again
                });
                assert_same(&again, &one, "three threads");
            }
        }
    }
}

/// The same of so many clusters that the blocks of a GPU rank them together.
#[test]
fn one_row_over_many_clusters_is_one_of_many() {
    for device in devices() {
        let mut rng = rng(88);
        let mut cache = ClusteredKvCache::new(0).cluster_size(4).passes(1).codes(KvCodes::new());
        let [k, v] = [(); 2].map(|_| random([1, 1, 18_000, 64], DType::F32, &device, &mut rng));
        cache.append(&k, &v).unwrap();
        assert!(cache.cluster().unwrap());
        let q = random([1, 3, 2, 64], DType::F32, &device, &mut rng);
        for all in [(700, true, false), (3000, true, true), (17_000, false, false)] {
            let both = cache.attend(&q, SCALE, budget(all)).unwrap().narrow(2, 1, 1).unwrap();
            let one = cache.attend(&q.narrow(2, 1, 1).unwrap(), SCALE, budget(all)).unwrap();
            assert_near(&one, &f64s(&both), 1e-4, &format!("{all:?}"));
        }
    }
}

/// Layers that are clustered together have the codes that they would have alone, and so have the sequences of a batch.
#[test]
fn codes_do_not_depend_on_neighbours() {
    for device in devices() {
        let mut rng = rng(84);
        let tokens: Vec<_> = (0..3).map(|_| random([2, 2, 160, 8], DType::F32, &device, &mut rng)).collect();
        for codes in [FEW, FEW.gains(true, true)] {
            let new = || ClusteredKvCache::new(160).segment(1).max_segment(40).codes(codes.clone());
            let filled = |k: &Tensor, v: &Tensor| {
                let mut cache = new();
                cache.append(k, v).unwrap();
                cache
            };
            let mut together: Vec<_> = tokens.iter().map(|t| filled(t, &(t * 2.0).unwrap())).collect();
            assert!(ClusteredKvCache::cluster_layers(&mut together).unwrap());
            for (layer, t) in together.iter().zip(&tokens) {
                for sequence in 0..2 {
                    let of = |t: &Tensor| t.narrow(0, sequence, 1).unwrap();
                    let mut alone = filled(&of(t), &of(&(t * 2.0).unwrap()));
                    assert!(alone.cluster().unwrap());
                    for (a, b) in [(alone.k(), layer.k()), (alone.v(), layer.v())] {
                        assert_same(&a.unwrap().unwrap(), &of(&b.unwrap().unwrap()), "tokens");
                    }
                }
            }
        }
    }
}

/// In a batch with padding the sequences read what they would read alone.
#[test]
fn padded_sequences_have_codes() {
    for device in devices() {
        let mut rng = rng(85);
        let [k, v, q] = [160, 160, 1].map(|n| random([2, 2, n, 8], DType::F32, &device, &mut rng));
        for codes in [FEW, FEW.gains(true, false)] {
            let new = || ClusteredKvCache::new(160).segment(1).codes(codes.clone());
            let mut both = new();
            both.left_padding(&Tensor::new(&[0u32, 9], &device).unwrap()).unwrap();
            both.append(&k, &v).unwrap();
            assert!(both.cluster().unwrap());
            let out = both.attend(&q, SCALE, KvBudget::new(usize::MAX)).unwrap();
            let [keys, values] = [both.k(), both.v()].map(|t| t.unwrap().unwrap());
            for (sequence, start) in [(0, 0), (1, 9)] {
                let of = |t: &Tensor| t.narrow(0, sequence, 1).unwrap();
                let mut alone = ClusteredKvCache::new(160);
                let seen = |t: &Tensor| of(t).narrow(2, start, 160 - start).unwrap();
                alone.append(&seen(&keys), &seen(&values)).unwrap();
                let expected = alone.attend(&of(&q), SCALE, KvBudget::new(0)).unwrap();
                assert_near(&of(&out), &f64s(&expected), 2e-5, &format!("sequence {sequence}"));
            }
        }
    }
}

/// Tokens that are evicted, of so many.
const CUTS: [(usize, usize); 4] = [(0, 60), (0, 120), (5, 120), (110, 120)];

/// A file gives back a cache with codes to the bit, which goes on as the one that was written.
#[test]
fn files_hold_codes() {
    let folder = Folder::new("kv-codes");
    let path = folder.0.join("cache.safetensors");
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let with_gains = [(true, true), (false, true)].map(|(keys, values)| FEW.gains(keys, values));
        let all =
            with_gains.into_iter().chain([FEW]).flat_map(|codes| CUTS.map(|(evicted, n)| (codes.clone(), evicted, n)));
        for (codes, evicted, n) in all {
            let mut rng = rng(86);
            let mut cache = empty().max_segment(50).codes(codes);
            let [k, v] = [8, 12].map(|columns| random([2, 2, n + 60, columns], dtype, &device, &mut rng));
            let part = |t: &Tensor, start, len| t.narrow(2, start, len).unwrap();
            cache.append(&part(&k, 0, n), &part(&v, 0, n)).unwrap();
            assert_eq!(cache.cluster().unwrap(), n > 100);
            cache.evict(evicted).unwrap();
            cache.save(&path).unwrap();
            let mut back = ClusteredKvCache::load(&path, &device).unwrap();
            let q = random([2, 4, 1, 8], dtype, &device, &mut rng);
            for more in 0..2 {
                assert_eq!((cache.current_seq_len(), cache.bytes()), (back.current_seq_len(), back.bytes()));
                assert_same(&cache.v().unwrap().unwrap(), &back.v().unwrap().unwrap(), "values");
                let [a, b] = [&cache, &back].map(|c| c.attend(&q, SCALE, KvBudget::new(9)).unwrap());
                assert_same(&a, &b, "attention");
                for cache in [&mut cache, &mut back] {
                    cache.append(&part(&k, n + 30 * more, 30), &part(&v, n + 30 * more, 30)).unwrap();
                    cache.cluster().unwrap();
                }
            }
        }
    }
}

#[test]
fn damaged_codes_are_refused() {
    let (folder, mut rng) = (Folder::new("kv-codes-damaged"), rng(87));
    let path = folder.0.join("cache.safetensors");
    let cache = coded(FEW.gains(true, true), 140, DType::F32, &Device::Cpu, &mut rng);
    cache.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for at in (0..bytes.len()).step_by(997) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
        std::fs::write(&path, damaged).unwrap();
        assert!(ClusteredKvCache::load(&path, &Device::Cpu).is_err(), "byte {at}");
    }
}

/// Of a long sequence codes take less than a quarter of f16, all counted.
#[test]
fn codes_take_a_quarter() {
    for device in devices() {
        let mut rng = rng(88);
        let (n, d) = (12_000, 64);
        let cache = coded(KvCodes::new(), n, DType::F16, &device, &mut rng);
        let clusters: usize =
            [1989, 1989, 1989, 1989, 1988, 1988].map(|tokens: usize| tokens.div_ceil(16)).iter().sum();
        let m = n - 4 - 64;
        // Codes; labels; means, with scales of keys and values; spreads and offsets; entries; what is no code.
        let of_head = m * (d * 4 / 8 + d * 4 / 16)
            + m
            + clusters * (2 * d + 2 * 4)
            + 4 * (2 * clusters + 1)
            + 2 * d * 16
            + 2 * d * 256
            + 2 * 2 * d * 68;
        assert_eq!(m, 11_932);
        assert_eq!(cache.bytes(), 2 * of_head);
        assert!(4 * cache.bytes() < 2 * n * 2 * d * 2);
    }
}

/// A query that is not finite spoils its head alone; keys and values that are not become no codes.
#[test]
fn nan_stays_out_of_codes() {
    for device in devices() {
        let mut rng = rng(89);
        let cache = coded(FEW, 500, DType::F32, &device, &mut rng);
        let q = random([1, 6, 1, 64], DType::F32, &device, &mut rng);
        let spoilt = f64s(&q).into_iter().enumerate().map(|(i, v)| if i == 70 { f32::NAN } else { v as f32 });
        let spoilt = Tensor::from_iter(spoilt, &device).unwrap().reshape((1, 6, 1, 64)).unwrap();
        let [fine, out] = [&q, &spoilt].map(|q| f64s(&cache.attend(q, SCALE, budget((100, true, false))).unwrap()));
        for (head, (fine, out)) in fine.chunks(64).zip(out.chunks(64)).enumerate() {
            match head {
                1 => assert!(out.iter().all(|v| v.is_nan())),
                _ => assert_eq!(out, fine, "head {head}"),
            }
        }
        let mut cache = ClusteredKvCache::new(500).segment(1).codes(FEW);
        let k = random([1, 2, 500, 64], DType::F32, &device, &mut rng);
        let spoilt =
            f64s(&k).into_iter().enumerate().map(|(i, v)| if i == (500 + 77) * 64 { f32::INFINITY } else { v as f32 });
        let v = Tensor::from_iter(spoilt, &device).unwrap().reshape((1, 2, 500, 64)).unwrap();
        cache.append(&k, &v).unwrap();
        refused(cache.cluster(), "NonFinite", &["v", "row 77", "element 1"]);
        assert_eq!(cache.current_seq_len(), 500);
        cache.truncate(77).unwrap();
    }
}

#[test]
fn refusals_of_codes_are_typed() {
    for device in devices() {
        let mut rng = rng(90);
        let [k, v] = [64, 10].map(|d| random([1, 2, 100, d], DType::F32, &device, &mut rng));
        let append = |codes| ClusteredKvCache::new(100).codes(codes).append(&k, &v).map(|_| ());
        refused(append(KvCodes::new().keys(1, 5)), "Value", &["codes", "5", "4 or 8"]);
        refused(append(KvCodes::new().keys(0, 8)), "Conflict", &["codes", "0 columns", "keys of 64"]);
        refused(append(KvCodes::new().values(4, 8)), "Conflict", &["codes", "4 columns", "values of 10"]);
        refused(append(KvCodes::new().values(2, 4)), "Conflict", &["codes", "4 bits for 2 columns", "values of 10"]);
        append(KvCodes::new().values(5, 4)).unwrap();
        let mut cache = ClusteredKvCache::new(100).recent(0).sinks(0).codes(KvCodes::new().values(5, 4));
        cache.append(&k, &v).unwrap();
        let labels = Tensor::zeros((1, 2, 100), DType::U32, &device).unwrap();
        refused(cache.group(&labels, 257), "TooLarge", &["k", "257", "256"]);
        cache.group(&labels, 256).unwrap();
        let mut cache = ClusteredKvCache::new(100).recent(40).segment(1);
        cache.append(&k, &v).unwrap();
        cache.cluster().unwrap();
        let mut cache = cache.recent(0).codes(FEW.values(5, 4));
        refused(cache.cluster(), "Conflict", &["codes", "56 tokens"]);
    }
}

/// Steps of a model over codes: a prompt, then token by token, in segments as they come.
#[test]
fn steps_go_on_over_codes() {
    for device in devices() {
        let mut rng = rng(91);
        let cache = || ClusteredKvCache::new(400).segment(40);
        let budget = KvBudget::new(usize::MAX);
        // Columns of uniform rows are no longer uniform once lengths are taken from them: codes keep less of them.
        for (codes, most) in [(FEW.values(1, 4), 0.1), (FEW.values(1, 4).gains(true, true), 0.2)] {
            let mut layers = [cache().codes(codes), cache()].map(|cache| ClusteredAttention::new(cache, budget));
            let random = |heads, n, rng: &mut ChaCha8Rng| random([2, heads, n, 16], DType::F32, &device, rng);
            for step in 0..100 {
                let n = if step == 0 { 300 } else { 1 };
                let [q, k, v] = [4, 2, 2].map(|heads| random(heads, n, &mut rng));
                let offset = layers[0].offset();
                let [a, b] = layers.each_mut().map(|layer| layer.forward(&q, &k, &v, offset).unwrap());
                assert_near(&a, &f64s(&b), if step == 0 { 1e-5 } else { most }, &format!("step {step}"));
            }
            let [a, b] = layers.each_ref().map(|layer| layer.cache().bytes());
            assert!(2 * a < b, "{a} bytes with codes, {b} without");
        }
    }
}

/// Entries are trained on four tokens each, at least: fewer wait, and later segments need not.
#[test]
fn codes_wait_for_enough_tokens() {
    for device in devices() {
        let mut rng = rng(92);
        let mut cache = ClusteredKvCache::new(2000).sinks(0).recent(0).codes(KvCodes::new());
        let mut append = |n, cache: &mut ClusteredKvCache| {
            let k = random([1, 1, n, 64], DType::F32, &device, &mut rng);
            cache.append(&k, &k).unwrap();
            cache.cluster().unwrap()
        };
        assert!(!append(4 * 256 - 1, &mut cache));
        assert!(append(1, &mut cache));
        assert!(!append(127, &mut cache) && append(1, &mut cache));
    }
}
