//! Routed attention: what each group of queries reads and estimates, against its definition.

use crate::{cache, common::*};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::nn::{Grouping, KeyBudget, RoutedAttention};
use candle_flash_kmeans::{cluster_means, testing, Error, Init, KMeans};
use rand_chacha::ChaCha8Rng;

const SCALE: f64 = 0.3;
const SINKS: usize = 3;
const RECENT: usize = 10;

fn random(shape: [usize; 4], dtype: DType, device: &Device, rng: &mut ChaCha8Rng) -> Tensor {
    uniform(&shape, 0.0, 1.0, dtype, rng).to_device(device).unwrap()
}

/// A case says what `attention` is given and how it is set.
struct Case {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    read: KeyBudget,
    estimate: bool,
    keys: Grouping,
    queries: Grouping,
    causal_choice: bool,
}

impl Case {
    fn attention(&self) -> RoutedAttention {
        let attention = RoutedAttention::new(self.read).keys(self.keys).queries(self.queries);
        attention.sinks(SINKS).recent(RECENT).estimate(self.estimate).passes(5, 2).causal_choice(self.causal_choice)
    }

    fn run(&self) -> Tensor {
        let (q, k, v) = (&self.q, &self.k, &self.v);
        match self.causal {
            true => self.attention().forward_causal(q, k, v, SCALE).unwrap(),
            false => self.attention().forward(q, k, v, SCALE).unwrap(),
        }
    }

    /// The first grouped token and their number.
    fn grouped(&self) -> (usize, usize) {
        let (m, n) = (self.q.dims()[2], self.k.dims()[2]);
        if self.causal {
            (SINKS, n.saturating_sub(m + RECENT + SINKS))
        } else {
            (0, n)
        }
    }

    /// The documentation promises this, token by token, for clusters that a fit from even rows finds.
    fn spec(&self) -> Vec<f64> {
        let (start, grouped) = self.grouped();
        let (keys, values, queries) = (problems(&self.k), problems(&self.v), problems(&self.q));
        let (group, m, n) = (queries.len() / keys.len(), queries[0].len(), keys[0].len());
        let labelled = |x: &Tensor, grouping| {
            let rows = x.dims()[2];
            let labels = match grouping {
                Grouping::Clusters(size) => {
                    let kmeans = KMeans::new(rows.div_ceil(size)).init(Init::Even).max_iters(5).tol(0.0);
                    kmeans.fit(x).unwrap().labels
                }
                Grouping::Blocks(size) => {
                    let blocks = Tensor::from_iter((0..rows).map(|i| (i / size) as u32), x.device()).unwrap();
                    blocks.broadcast_as(&x.dims()[..3]).unwrap().contiguous().unwrap()
                }
                other => panic!("{other:?}"),
            };
            let (Grouping::Clusters(size) | Grouping::Blocks(size) | Grouping::Random(size)) = grouping else {
                panic!("{grouping:?}")
            };
            (labels, rows.div_ceil(size))
        };
        let rows = |t: &Tensor| t.narrow(2, start, grouped).unwrap().contiguous().unwrap();
        let (labels, k) = labelled(&rows(&self.k), self.keys);
        let causal_choice = self.causal && self.causal_choice;
        let (Grouping::Clusters(size) | Grouping::Blocks(size) | Grouping::Random(size)) = self.queries else {
            panic!("{:?}", self.queries)
        };
        let (query_labels, units) =
            labelled(&self.q, if causal_choice { Grouping::Blocks(size) } else { self.queries });
        let means = |t: &Tensor| problems(&cluster_means(&rows(t), &labels, k).unwrap());
        let (mean_keys, mean_values) = (means(&self.k), means(&self.v));
        let (labels, query_labels) = (u32s(&labels), u32s(&query_labels));

        let mut output = vec![vec![]; queries.len() * m];
        for (p, query) in queries.iter().enumerate() {
            let h = p / group;
            let of_cluster = |j: usize| -> Vec<usize> {
                (0..grouped).filter(|t| labels[h * grouped + t] == j as u32).map(|t| start + t).collect()
            };
            let clusters: Vec<_> = (0..k).map(of_cluster).collect();
            for unit in 0..units {
                let mine: Vec<usize> = (0..m).filter(|i| query_labels[p * m + i] == unit as u32).collect();
                // The block before and the first query of this one, or only that if there is one query to a block.
                let choosers = match mine[..] {
                    [first, ..] if causal_choice => {
                        (first.saturating_sub(if size == 1 { 0 } else { size })..=first).collect()
                    }
                    _ => mine.clone(),
                };
                let mut rank = vec![0.0; k];
                for &i in &choosers {
                    let score = |j: usize| (dot(&query[i], &mean_keys[h][j]) * SCALE).exp();
                    let all = sum((0..k).map(|j| score(j) * clusters[j].len() as f64));
                    rank.iter_mut().enumerate().for_each(|(j, r)| *r += score(j) / all / choosers.len() as f64);
                }
                let mut order: Vec<usize> = (0..k).filter(|&j| !clusters[j].is_empty()).collect();
                order.sort_by(|&a, &b| rank[b].total_cmp(&rank[a]));
                let mut room = self.budget(grouped, order.iter().map(|&j| (rank[j], clusters[j].len())));
                let exact = |t: usize| (keys[h][t].clone(), values[h][t].clone(), 1.0);
                let mut read: Vec<Weighed> = (0..start).map(exact).collect();
                for j in order {
                    let taken = room.min(clusters[j].len());
                    read.extend(clusters[j][..taken].iter().map(|&t| exact(t)));
                    room -= taken;
                    if self.estimate && clusters[j].len() > taken {
                        let left = (clusters[j].len() - taken) as f64;
                        read.push((mean_keys[h][j].clone(), mean_values[h][j].clone(), left));
                    }
                }
                for &i in &mine {
                    let end = if self.causal { n - m + i + 1 } else { start + grouped };
                    let all: Vec<_> = read.iter().cloned().chain((start + grouped..end).map(exact)).collect();
                    output[p * m + i] = attention(&query[i], &all, SCALE);
                }
            }
        }
        output.concat()
    }

    fn budget(&self, grouped: usize, ranked: impl Iterator<Item = (f64, usize)> + Clone) -> usize {
        let of = |share: f64| (share * grouped as f64).ceil() as usize;
        let tokens = match self.read {
            KeyBudget::Tokens(count) => count,
            KeyBudget::Share(share) => of(share),
            KeyBudget::TopP { p, least, most } => {
                let all = sum(ranked.clone().map(|(rank, size)| rank * size as f64));
                let (mut mass, mut tokens) = (0.0, 0);
                for (rank, size) in ranked {
                    if mass < p * all {
                        tokens += size;
                    }
                    mass += rank * size as f64;
                }
                tokens.max(of(least)).min(of(most))
            }
            other => panic!("{other:?}"),
        };
        tokens.clamp(1, grouped)
    }
}

const READS: [KeyBudget; 5] = [
    KeyBudget::Tokens(1),
    KeyBudget::Tokens(23),
    KeyBudget::Share(0.5),
    KeyBudget::TopP { p: 0.6, least: 0.1, most: 0.9 },
    KeyBudget::TopP { p: 0.9, least: 0.3, most: 0.4 },
];

#[test]
fn groups_read_what_matters_to_them_and_estimate_the_rest() {
    for device in devices() {
        let mut rng = rng(70);
        for causal in [false, true] {
            let [q, k, v] =
                [(6, 40), (2, 90), (2, 90)].map(|(h, n)| random([2, h, n, 8], DType::F64, &device, &mut rng));
            for (keys, queries) in [
                (Grouping::Clusters(7), Grouping::Clusters(9)),
                (Grouping::Blocks(7), Grouping::Clusters(16)),
                (Grouping::Clusters(5), Grouping::Blocks(16)),
                (Grouping::Clusters(5), Grouping::Blocks(1)),
            ] {
                for (read, estimate) in READS.into_iter().flat_map(|read| [(read, true), (read, false)]) {
                    for causal_choice in [false, true] {
                        let (q, k, v) = (q.clone(), k.clone(), v.clone());
                        let case = Case { q, k, v, causal, read, estimate, keys, queries, causal_choice };
                        let set = format!("estimate {estimate}, causal {causal}, causal choice {causal_choice}");
                        let what = format!("{keys:?} {queries:?} {read:?}, {set}");
                        assert_near(&case.run(), &case.spec(), 1e-6, &what);
                    }
                }
            }
        }
    }
}

/// The shapes that a GPU has a kernel for, in sizes that fill no tile and some.
#[test]
fn rows_of_many_columns() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F16, DType::BF16].map(|t| (d.clone(), t))) {
        let mut rng = rng(71);
        let shapes = [
            (64, 2, 70, 300, 128),
            (64, 6, 33, 257, 8),
            (128, 2, 150, 400, 60),
            (128, 4, 1, 200, 1),
            (80, 2, 140, 200, 140),
            (96, 6, 33, 157, 8),
            (96, 2, 70, 200, 70),
            (112, 2, 33, 200, 8),
            (256, 2, 130, 200, 60),
        ];
        for (i, (d, heads, m, n, query_group)) in shapes.into_iter().enumerate() {
            for causal in [false, true] {
                let [q, k, v] =
                    [(heads, m), (2, n), (2, n)].map(|(h, n)| random([2, h, n, d], dtype, &device, &mut rng));
                for (j, (read, estimate)) in READS.into_iter().zip([true, false, true, true, false]).enumerate() {
                    // The CPU computes all shapes alike, so that there a case of each shape and type is enough.
                    let picked = j == i % READS.len() && causal == (i % 2 == usize::from(dtype == DType::F16));
                    if device.is_cpu() && !picked {
                        continue;
                    }
                    let (q, k, v) = (q.clone(), k.clone(), v.clone());
                    let (keys, queries) = (Grouping::Clusters(9), Grouping::Clusters(query_group));
                    let case = Case { q, k, v, causal, read, estimate, keys, queries, causal_choice: false };
                    testing::launches();
                    let out = case.run();
                    let fused = testing::launches().iter().any(|l| l.starts_with("route_attend"));
                    assert_eq!(fused, device.is_cuda());
                    let what = format!("{dtype:?} {d} columns, {heads} heads, {m} of {n}, causal {causal}, {read:?}");
                    let tolerance = if dtype == DType::F16 { 4e-3 } else { 3e-2 };
                    assert_near(&out, &case.spec(), tolerance, &what);
                }
            }
        }
    }
}

/// Attention to everything, as `masked` computes it and as it is.
#[test]
fn reading_everything_is_attention() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        let mut rng = rng(72);
        for causal in [false, true] {
            let [q, k, v] = [(4, 90), (2, 140), (2, 140)].map(|(h, n)| random([1, h, n, 64], dtype, &device, &mut rng));
            let read = KeyBudget::Share(1.0);
            let (keys, queries) = (Grouping::Clusters(16), Grouping::Clusters(32));
            let case = Case { q, k, v, causal, read, estimate: true, keys, queries, causal_choice: false };
            let (queries, keys, values) = (problems(&case.q), problems(&case.k), problems(&case.v));
            let mut dense = vec![];
            for (p, query) in queries.iter().enumerate() {
                for (i, row) in query.iter().enumerate() {
                    let seen = if causal { 140 - 90 + i + 1 } else { 140 };
                    let all: Vec<Weighed> =
                        (0..seen).map(|t| (keys[p / 2][t].clone(), values[p / 2][t].clone(), 1.0)).collect();
                    dense.extend(attention(row, &all, SCALE));
                }
            }
            let tolerance = match dtype {
                DType::F16 => 4e-3,
                DType::BF16 => 3e-2,
                _ => 1e-5,
            };
            assert_near(&case.run(), &dense, tolerance, &format!("{dtype:?}, causal {causal}"));
        }
    }
}

/// A prompt in chunks, the first of which has nothing to route: each starts from the clusters before it.
#[test]
fn chunks_start_warm_and_repeat() {
    for device in devices() {
        let mut rng = rng(73);
        let (n, chunk) = (320, 64);
        let [q, k, v] = [4, 2, 2].map(|h| random([1, h, n, 64], DType::F16, &device, &mut rng));
        let run = |attention: &mut RoutedAttention| {
            let outputs = (0..n).step_by(chunk).map(|start| {
                let part = |t: &Tensor| t.narrow(2, 0, start + chunk).unwrap();
                let q = q.narrow(2, start, chunk).unwrap();
                attention.forward_causal(&q, &part(&k), &part(&v), SCALE).unwrap()
            });
            Tensor::cat(&outputs.collect::<Vec<_>>(), 2).unwrap()
        };
        let new = || RoutedAttention::new(KeyBudget::Share(0.3)).queries(Grouping::Clusters(16)).passes(10, 0);
        let mut attention = new();
        let first = run(&mut attention);
        assert_same(&first, &run(&mut new()), "another layer");
        attention.reset();
        assert_same(&first, &run(&mut attention), "the same, reset");
        // Everything may be read in the first two chunks, so that those agree with attention.
        let all = run(&mut RoutedAttention::new(KeyBudget::Share(1.0)));
        let near = |t: &Tensor| t.narrow(2, 0, chunk).unwrap();
        assert_near(&near(&first), &f64s(&near(&all)), 2e-3, "the first chunk");
    }
}

/// What comes later changes no bit of an output, be it in the same chunk or in another.
#[test]
fn a_causal_choice_depends_on_no_later_row() {
    let (n, chunk) = (320, 64);
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::F16].map(|t| (d.clone(), t))) {
        let mut rng = rng(75);
        let rows = [4, 2, 2].map(|h| random([1, h, n, 64], dtype, &device, &mut rng));
        let others = [4, 2, 2].map(|h| random([1, h, n, 64], dtype, &device, &mut rng));
        // The rows before `same`, and others from there on.
        let mixed = |same: usize| {
            [0, 1, 2].map(|i| {
                let [a, b] = [(&rows[i], 0, same), (&others[i], same, n - same)]
                    .map(|(t, start, len): (&Tensor, _, _)| t.narrow(2, start, len).unwrap());
                Tensor::cat(&[a, b], 2).unwrap()
            })
        };
        let run = |[q, k, v]: [Tensor; 3], queries, causal_choice| {
            let attention = RoutedAttention::new(KeyBudget::Share(0.1)).queries(queries).sinks(SINKS).recent(RECENT);
            let mut attention = attention.causal_choice(causal_choice);
            let outputs = (0..n).step_by(chunk).map(|start| {
                let [k, v] = [&k, &v].map(|t| t.narrow(2, 0, start + chunk).unwrap());
                attention.forward_causal(&q.narrow(2, start, chunk).unwrap(), &k, &v, SCALE).unwrap()
            });
            Tensor::cat(&outputs.collect::<Vec<_>>(), 2).unwrap()
        };
        for queries in [Grouping::Blocks(1), Grouping::Blocks(16), Grouping::Clusters(24)] {
            let whole = run(rows.clone(), queries, true);
            for same in [1, 64, 129, 200, 207, 208, 319] {
                let earlier = |t: &Tensor| t.narrow(2, 0, same).unwrap();
                let other = run(mixed(same), queries, true);
                assert_same(&earlier(&other), &earlier(&whole), &format!("{dtype:?} {queries:?}, up to {same}"));
            }
        }
        // Groups that choose together do depend on what comes later.
        let earlier = |t: &Tensor| bits(&t.narrow(2, 0, 200).unwrap());
        let [a, b] = [rows.clone(), mixed(200)].map(|rows| run(rows, Grouping::Clusters(24), false));
        assert!(earlier(&a) != earlier(&b), "{dtype:?}");
    }
}

/// Warm centroids of what has hardly changed are as good after two passes as cold ones after ten.
#[test]
fn two_warm_passes_are_worth_ten_cold_ones() {
    let cache = cache::Cache::load(&Device::Cpu).unwrap();
    let keys = cache.keys.narrow(1, 0, 1024).unwrap();
    let noise = uniform(keys.dims(), 0.0, 0.2, DType::F32, &mut rng(74));
    let next = (&keys + noise).unwrap();
    let inertia = |init, passes, x: &Tensor| {
        let fit = KMeans::new(64).init(init).max_iters(passes).tol(0.0).fit(x).unwrap();
        (sum(f64s(&fit.inertia).into_iter()), fit.centroids)
    };
    let (_, centroids) = inertia(Init::Even, 10, &keys);
    let [(warm, _), (cold, _)] = [inertia(Init::Given(centroids), 2, &next), inertia(Init::Even, 10, &next)];
    assert!(warm < 1.05 * cold, "{warm} after two warm passes, {cold} after ten cold ones");
}

/// On a model's own queries and keys, routing loses less than positions do, and those less than chance.
#[test]
fn clusters_route_better_than_positions_and_chance() {
    let cache = cache::Cache::load(&Device::Cpu).unwrap();
    let (heads, rows, d) = cache.queries.dims3().unwrap();
    let (keys, values) = (cache.keys.narrow(1, 0, 2048).unwrap(), cache.values.narrow(1, 0, 2048).unwrap());
    let four = |t: &Tensor| t.unsqueeze(0).unwrap().contiguous().unwrap();
    // The query heads of a key head, as heads of their own.
    let q = cache.queries.reshape((1, heads * 3, rows / 3, d)).unwrap().narrow(2, 0, 128).unwrap();
    let run = |read, grouping: fn(usize) -> Grouping| {
        let mut attention = RoutedAttention::new(read).keys(grouping(16)).queries(grouping(16)).estimate(false);
        attention.forward(&q, &four(&keys), &four(&values), 1.0).unwrap()
    };
    let all = run(KeyBudget::Share(1.0), Grouping::Blocks);
    let error = |grouping| {
        let apart = (run(KeyBudget::Share(0.1), grouping) - &all).unwrap().sqr().unwrap().sum_all().unwrap();
        f64s(&apart)[0] / f64s(&all.sqr().unwrap().sum_all().unwrap())[0]
    };
    let [clusters, blocks, random] = [error(Grouping::Clusters), error(Grouping::Blocks), error(Grouping::Random)];
    assert!(1.5 * clusters < blocks && blocks < random, "{clusters:.4}, {blocks:.4}, {random:.4}");
}

#[test]
fn refusals_name_the_argument_and_both_values() {
    let x = |h: usize, n: usize, d: usize| Tensor::zeros((1, h, n, d), DType::F32, &Device::Cpu).unwrap();
    let refused = |result: Result<Tensor, Error>, parts: &[&str]| {
        let error = result.unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    };
    let new = || RoutedAttention::new(KeyBudget::Share(0.5));
    let (q, k) = (x(4, 20, 8), x(2, 30, 8));
    refused(new().forward(&q, &x(3, 30, 8), &x(3, 30, 8), 1.0), &["q", "4 heads", "3"]);
    refused(new().forward(&q, &k, &x(2, 31, 8), 1.0), &["v", "31", "30"]);
    refused(new().forward(&q, &x(2, 30, 9), &x(2, 30, 9), 1.0), &["k", "9", "8"]);
    refused(new().forward(&q, &k.to_dtype(DType::F64).unwrap(), &k, 1.0), &["k", "F64", "F32"]);
    refused(new().forward_causal(&x(4, 31, 8), &k, &k, 1.0), &["q rows", "31", "30"]);
    refused(new().keys(Grouping::Clusters(0)).forward(&q, &k, &k, 1.0), &["keys", "0"]);
    refused(new().queries(Grouping::Blocks(0)).forward(&q, &k, &k, 1.0), &["queries", "0"]);
    refused(RoutedAttention::new(KeyBudget::Share(1.5)).forward(&q, &k, &k, 1.0), &["share", "1.5"]);
    let top_p = KeyBudget::TopP { p: -0.1, least: 0.0, most: 1.0 };
    refused(RoutedAttention::new(top_p).forward(&q, &k, &k, 1.0), &["p", "-0.1"]);
    refused(new().forward(&q.squeeze(0).unwrap(), &k, &k, 1.0), &["q", "3", "4"]);
}
