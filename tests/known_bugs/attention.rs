//! Attention over clusters: caches, routing, selection.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredKvCache, Grouping, KeyBudget, KvBudget, RoutedAttention};
use candle_flash_kmeans::Error;
use candle_nn::ops::softmax_last_dim;
use rand::Rng;

const HEADS: usize = 2;
const TOKENS: usize = 512;
const COLUMNS: usize = 64;
const SCALE: f64 = 0.125;

/// Queries, keys and values `(2, heads, n, d)` of a scene: tokens in topics of 32, neighbours or scattered.
fn scene(seed: u64, scattered: bool, dtype: DType, device: &Device) -> [Tensor; 3] {
    let mut rng = rng(seed);
    let topics = TOKENS / 32;
    let of_token: Vec<usize> =
        (0..TOKENS).map(|t| if scattered { rng.random_range(0..topics) } else { t / 32 }).collect();
    let shape = [2, HEADS, TOKENS, COLUMNS];
    let mut rows = |noise: f64| {
        let centres: Vec<f64> = (0..2 * HEADS * topics * COLUMNS).map(|_| rng.random_range(-3.0..3.0)).collect();
        tensor(&shape, dtype, |i| {
            let (head, token, column) = (i / TOKENS / COLUMNS, i / COLUMNS % TOKENS, i % COLUMNS);
            centres[(head * topics + of_token[token]) * COLUMNS + column] + rng.random_range(-noise..noise)
        })
    };
    let keys = rows(0.3);
    let values = rows(0.3);
    // A query looks for its own topic.
    let noise = uniform(&shape, 0.0, 0.3, DType::F64, &mut rng);
    let queries = (keys.to_dtype(DType::F64).unwrap() * 0.5).unwrap().add(&noise).unwrap().to_dtype(dtype).unwrap();
    [queries, keys, values].map(|t| t.to_device(device).unwrap())
}

fn dense([q, k, v]: &[Tensor; 3]) -> Tensor {
    let [q, k, v] = [q, k, v].map(|t| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap());
    let scores = (q.matmul(&k.transpose(2, 3).unwrap().contiguous().unwrap()).unwrap() * SCALE).unwrap();
    softmax_last_dim(&scores).unwrap().matmul(&v).unwrap()
}

/// The relative error of the output in each batch element and head.
fn errors(out: &Tensor, want: &Tensor) -> Vec<f64> {
    let out = out.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let norm = |t: &Tensor| t.sqr().unwrap().sum((2, 3)).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
    norm(&(out - want).unwrap()).iter().zip(norm(want)).map(|(off, all)| (off / all).sqrt()).collect()
}

fn worst(out: &Tensor, want: &Tensor) -> f64 {
    largest(errors(out, want))
}

fn layer() -> RoutedAttention {
    RoutedAttention::new(KeyBudget::Share(0.1)).keys(Grouping::Clusters(16)).queries(Grouping::Clusters(32))
}

fn step(layer: &mut RoutedAttention, [q, k, v]: &[Tensor; 3]) -> Tensor {
    layer.forward(q, k, v, SCALE).unwrap()
}

/// After another scene of the same shape the warm clusters of the last one were kept, whatever they were worth.
#[test]
fn routing_recovers_from_a_change_of_scene() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::F16].map(|t| (d.clone(), t))) {
        for scattered in [false, true] {
            let [before, after] = [1, 2].map(|seed| scene(seed, scattered, dtype, &device));
            let want = dense(&after);
            let cold = worst(&step(&mut layer(), &after), &want);
            let mut warm = layer();
            step(&mut warm, &before);
            for turn in 0..3 {
                let error = worst(&step(&mut warm, &after), &want);
                assert!(
                    error <= 1.2 * cold + 0.01,
                    "{dtype:?}, scattered {scattered}, step {turn}: {error}, cold {cold}"
                );
            }
        }
    }
}

/// One step of values that are not finite made all later ones useless. Other heads have to have the same bits meanwhile.
#[test]
fn routing_recovers_from_values_that_are_not_finite() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::F16].map(|t| (d.clone(), t))) {
        let good = scene(3, false, dtype, &device);
        let want = dense(&good);
        let cold = worst(&step(&mut layer(), &good), &want);
        // All values; and one token of the first head, as a key and as a query.
        let all = good.each_ref().map(|t| (t * f64::NAN).unwrap());
        let one = |t: &Tensor| {
            let bad = |i: usize| if i / COLUMNS == 70 { f64::INFINITY } else { 0.0 };
            (t + tensor(t.dims(), dtype, bad).to_device(&device).unwrap()).unwrap()
        };
        let one = [one(&good[0]), one(&good[1]), good[2].clone()];
        for bad in [all, one] {
            let (mut warm, mut other) = (layer(), layer());
            step(&mut warm, &good);
            step(&mut other, &good);
            let (meanwhile, fine) = (step(&mut warm, &bad), step(&mut other, &good));
            if f64s(&bad[2]).iter().all(|v| v.is_finite()) {
                let rest = |t: &Tensor| t.flatten(0, 1).unwrap().narrow(0, 1, 2 * HEADS - 1).unwrap();
                assert_same(&rest(&meanwhile), &rest(&fine), "other heads");
            }
            for turn in 0..2 {
                let error = worst(&step(&mut warm, &good), &want);
                assert!(error <= 1.2 * cold + 0.01, "{dtype:?}, step {turn}: {error}, cold {cold}");
            }
        }
    }
}

/// Earlier queries of a chunk read what depended on later ones.
#[test]
fn a_causal_choice_knows_no_later_query() {
    let (chunk, start) = (100, TOKENS - 100);
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::F16].map(|t| (d.clone(), t))) {
        let [q, k, v] = scene(4, true, dtype, &device);
        let q = q.narrow(2, start, chunk).unwrap();
        let run = |q: &Tensor, causal, grouping, read| {
            let layer = RoutedAttention::new(read).queries(grouping).causal_choice(causal);
            layer.recent(10).forward_causal(q, &k, &v, SCALE).unwrap()
        };
        let replaced = |from: usize, by: f64| {
            let later = (q.narrow(2, from, chunk - from).unwrap() * by).unwrap();
            Tensor::cat(&[&q.narrow(2, 0, from).unwrap(), &later], 2).unwrap()
        };
        let top_p = KeyBudget::TopP { p: 0.6, least: 0.02, most: 0.5 };
        for (grouping, read) in [
            (Grouping::Clusters(16), KeyBudget::Share(0.1)),
            (Grouping::Blocks(1), top_p),
            (Grouping::Random(200), top_p),
        ] {
            let whole = run(&q, true, grouping, read);
            for from in [1, 15, 16, 17, 99] {
                for by in [-3.0, f64::NAN] {
                    let other = run(&replaced(from, by), true, grouping, read);
                    let earlier = |t: &Tensor| t.narrow(2, 0, from).unwrap();
                    assert_same(&earlier(&other), &earlier(&whole), &format!("{dtype:?} {grouping:?}, from {from}"));
                }
            }
        }
        // That this is worth a setting: without it they change.
        let [a, b] = [&q, &replaced(50, -3.0)].map(|q| run(q, false, Grouping::Clusters(16), KeyBudget::Share(0.02)));
        let earlier = |t: &Tensor| bits(&t.narrow(2, 0, 50).unwrap());
        assert!(earlier(&a) != earlier(&b), "{dtype:?}");
    }
}

/// Shares that underflow ranked with the groups that have no token, and positions beyond all tokens were read.
#[test]
fn shares_that_underflow_rank_before_empty_groups() {
    for (device, dtype) in devices().into_iter().flat_map(|d| DTYPES.map(|t| (d.clone(), t))) {
        let n = 96;
        // Four different keys, so that most of the 24 groups are empty; one of them has all the attention.
        let k = tensor(&[1, 1, n, 64], dtype, |i| [30.0, -30.0, 20.0, -20.0][i / 64 % 4]).to_device(&device).unwrap();
        let v = tensor(&[1, 1, n, 64], dtype, |i| (i / 64 % 4 + 1) as f64).to_device(&device).unwrap();
        let q = tensor(&[1, 2, 8, 64], dtype, |_| 30.0).to_device(&device).unwrap();
        for read in [
            KeyBudget::Tokens(1),
            KeyBudget::Tokens(30),
            KeyBudget::Tokens(95),
            KeyBudget::Tokens(usize::MAX),
            KeyBudget::TopP { p: 0.9, least: 0.5, most: 1.0 },
        ] {
            for estimate in [false, true] {
                let layer = RoutedAttention::new(read).keys(Grouping::Clusters(4)).estimate(estimate);
                let out = layer.queries(Grouping::Clusters(2)).forward(&q, &k, &v, 1.0).unwrap();
                assert_near(&out, &[1.0; 2 * 8 * 64], 1e-2, &format!("{dtype:?} {read:?} {estimate}"));
            }
        }
    }
}

/// Scores that are NaN or infinite in some clusters are ranked like any, and spoil no other head.
#[test]
fn scores_that_are_no_numbers_are_ranked() {
    for (device, columns) in devices().into_iter().flat_map(|d| [8, 64, 96].map(|columns| (d.clone(), columns))) {
        let (n, far) = (700, 1e30);
        let mut rng = rng(5);
        let keys = f64s(&uniform(&[1, 2, n, columns], 0.0, 1.0, DType::F32, &mut rng));
        // Every seventh key of the first head is so large that its products are no numbers.
        let large = |bad: bool| {
            let k = tensor(&[1, 2, n, columns], DType::F32, |i| match i / columns {
                row if bad && row < n && row % 7 == 0 => [far, -far][i % 2],
                _ => keys[i],
            });
            k.to_device(&device).unwrap()
        };
        let v = uniform(&[1, 2, n, columns], 0.0, 1.0, DType::F32, &mut rng).to_device(&device).unwrap();
        for rows in [1, 5] {
            let random = f64s(&uniform(&[1, 4, rows, columns], 0.0, 1.0, DType::F32, &mut rng));
            for worst in [far, f64::NAN, f64::INFINITY] {
                let q =
                    tensor(
                        &[1, 4, rows, columns],
                        DType::F32,
                        |i| if i < 2 * rows * columns { worst } else { random[i] },
                    );
                let q = q.to_device(&device).unwrap();
                let rest = |t: &Tensor| t.narrow(1, 2, 2).unwrap().contiguous().unwrap();
                for (tokens, shared, estimate) in
                    [(1, false, true), (50, true, true), (50, false, false), (600, true, false)]
                {
                    let budget = KvBudget::new(tokens).shared(shared).estimate(estimate).dense_if_cheaper(false);
                    let [fine, bad] = [false, true].map(|bad| {
                        let mut cache = ClusteredKvCache::new(n).cluster_size(2).segment(1);
                        cache.append(&large(bad), &v).unwrap();
                        cache.cluster().unwrap();
                        cache.attend(&q, SCALE, budget).unwrap()
                    });
                    assert!(f64s(&rest(&fine)).iter().all(|v| v.is_finite()));
                    assert_same(&rest(&fine), &rest(&bad), "the other key head");
                }
                for read in
                    [KeyBudget::Tokens(1), KeyBudget::Share(0.3), KeyBudget::TopP { p: 0.5, least: 0.0, most: 1.0 }]
                {
                    let [fine, bad] = [false, true].map(|bad| {
                        let layer =
                            RoutedAttention::new(read).keys(Grouping::Clusters(2)).queries(Grouping::Clusters(3));
                        layer.clone().forward(&q, &large(bad), &v, SCALE).unwrap()
                    });
                    assert_same(&rest(&fine), &rest(&bad), "the other key head, routed");
                }
            }
        }
    }
}

/// Rows of no length, one token, and settings at their ends.
#[test]
fn the_ends_of_settings_and_rows() {
    for device in devices() {
        let zeros = Tensor::zeros((1, 1, 40, 64), DType::F32, &device).unwrap();
        let v = uniform(&[1, 1, 40, 64], 0.0, 1.0, DType::F32, &mut rng(6)).to_device(&device).unwrap();
        let mean = f64s(&v.mean(2).unwrap());
        let q = Tensor::ones((1, 2, 3, 64), DType::F32, &device).unwrap();
        for size in [1, 7, usize::MAX] {
            for grouping in [Grouping::Clusters(size), Grouping::Blocks(size), Grouping::Random(size)] {
                let mut layer = RoutedAttention::new(KeyBudget::Share(0.0)).keys(grouping).queries(grouping);
                for _ in 0..2 {
                    assert_near(&layer.forward(&q, &zeros, &v, SCALE).unwrap(), &mean.repeat(6), 0.05, "keys of zeros");
                }
                for ends in [0, usize::MAX] {
                    let layer = layer.clone().sinks(ends).recent(ends).causal_choice(true);
                    let out = layer.clone().forward_causal(&q, &zeros, &v, SCALE).unwrap();
                    assert!(f64s(&out).iter().all(|v| v.is_finite()));
                    let one = |t: &Tensor| t.narrow(2, 0, 1).unwrap();
                    let out = layer.recent(0).sinks(0).forward_causal(&one(&q), &one(&zeros), &one(&v), SCALE).unwrap();
                    assert_near(&out, &f64s(&one(&v)).repeat(2), 1e-6, "one token");
                }
            }
            let mut cache = ClusteredKvCache::new(1).sinks(0).recent(1).cluster_size(size).segment(0).passes(0);
            cache.append(&zeros, &v).unwrap();
            assert!(cache.cluster().unwrap());
            for tokens in [0, 1, usize::MAX] {
                let out = cache
                    .attend(&q.narrow(2, 0, 1).unwrap(), SCALE, KvBudget::new(tokens).dense_if_cheaper(false))
                    .unwrap();
                // A mean stands for its cluster's tokens, those that are read among them, to half of a 127th of its largest number.
                let near = [1.0 / 254.0, 0.05].get(tokens).copied().unwrap_or(1e-5);
                assert_near(&out, &mean.repeat(2), near, "a cache of zeros");
            }
        }
        for (sinks, recent) in [(usize::MAX, 0), (0, usize::MAX), (usize::MAX, usize::MAX)] {
            let mut cache = ClusteredKvCache::new(7).sinks(sinks).recent(recent).segment(0);
            cache.append(&zeros, &v).unwrap();
            assert!(!cache.cluster().unwrap());
            assert_near(
                &cache.attend(&q.narrow(2, 0, 1).unwrap(), SCALE, KvBudget::new(0)).unwrap(),
                &mean.repeat(2),
                1e-5,
                "all",
            );
        }
    }
}

/// Nothing in gives nothing out, also where it is a view.
#[test]
fn nothing_gives_nothing() {
    for device in devices() {
        let x = |shape: [usize; 4]| ones(&shape, DType::F32, &device);
        for (q, k) in [
            ([2, 4, 0, 8], [2, 2, 30, 8]),
            ([0, 4, 20, 8], [0, 2, 30, 8]),
            ([2, 4, 0, 8], [2, 2, 0, 8]),
            ([1, 0, 5, 8], [1, 2, 9, 8]),
        ] {
            for causal in [false, true] {
                let mut layer = RoutedAttention::new(KeyBudget::Share(0.5)).recent(0).sinks(0).causal_choice(causal);
                let out = match causal {
                    true => layer.forward_causal(&x(q), &x(k), &x(k), 1.0),
                    false => layer.forward(&x(q), &x(k), &x(k), 1.0),
                };
                assert_eq!(out.unwrap().dims(), q);
            }
            let mut cache = ClusteredKvCache::new(16).sinks(1).recent(2).segment(1);
            let (keys, values) = cache.append(&x(k), &x(k)).unwrap();
            assert_eq!((keys.dims(), values.dims()), (&k[..], &k[..]));
            assert_eq!(cache.cluster().unwrap(), k[0] * k[2] > 0);
            let q = [q[0], q[1], q[2].min(1), q[3]];
            assert_eq!(cache.attend(&x(q), 1.0, KvBudget::new(3)).unwrap().dims(), q);
        }
        let mut cache = ClusteredKvCache::new(16);
        assert_eq!(cache.attend(&x([1, 2, 0, 8]), 1.0, KvBudget::new(3)).unwrap().dims(), [1, 2, 0, 8]);
        cache.append(&x([1, 2, 0, 8]), &x([1, 2, 0, 8])).unwrap();
        cache.append(&x([1, 2, 5, 8]), &x([1, 2, 5, 8])).unwrap();
        cache.append(&x([1, 2, 0, 8]), &x([1, 2, 0, 8])).unwrap();
        assert_eq!((cache.current_seq_len(), cache.k().unwrap().unwrap().dims()), (5, &[1, 2, 5, 8][..]));
        let error = RoutedAttention::new(KeyBudget::Share(0.5)).forward(
            &x([1, 2, 3, 8]),
            &x([1, 2, 0, 8]),
            &x([1, 2, 0, 8]),
            1.0,
        );
        assert!(matches!(error, Err(Error::Range { argument: "k rows", got: 0, .. })));
    }
}

/// A wrong setting was refused after the keys had been clustered, or only where there was something to group.
#[test]
fn refusals_come_before_any_work() {
    for device in devices() {
        let x = ones(&[1, 2, 30, 8], DType::F32, &device);
        let new = || RoutedAttention::new(KeyBudget::Share(0.5));
        let says = |error: Error| error.to_string();
        let mut wrong = new().queries(Grouping::Clusters(0));
        let kept = format!("{wrong:?}");
        assert!(says(wrong.forward(&x, &x, &x, 1.0).unwrap_err()).contains("queries: 0 is outside 1..="));
        assert_eq!(format!("{wrong:?}"), kept);
        // Thirty tokens are all recent.
        assert!(says(new().keys(Grouping::Blocks(0)).forward_causal(&x, &x, &x, 1.0).unwrap_err()).contains("keys: 0"));
        for scale in [f64::NAN, f64::INFINITY] {
            assert!(says(new().forward(&x, &x, &x, scale).unwrap_err()).contains("softmax_scale"));
            let mut cache = ClusteredKvCache::new(30);
            cache.append(&x, &x).unwrap();
            assert!(says(cache.attend(&x, scale, KvBudget::new(1)).unwrap_err()).contains("softmax_scale"));
        }
    }
}
