//! Where fits start: different rows, by their weights, the same for the same seed.

use super::kv_cache::refused;
use crate::common::{self, naive, *};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Init, KMeans, Metric, Source, StreamOptions};
use rand::Rng;

/// All that draw rows.
const DRAWN: [Init; 5] =
    [Init::Random, Init::Even, Init::KMeansPlusPlus, Init::GreedyKMeansPlusPlus, Init::KMeansParallel];

#[test]
fn weights_work_on_every_device_and_init() {
    let mut rng = rng(36);
    let x = blobs(&[2, 300, 4], 5, DType::F32, &mut rng);
    let weights = uniform(&[300], 1.0, 1.0, DType::F32, &mut rng);
    for metric in METRICS {
        for init in DRAWN {
            let mut costs = vec![];
            for device in devices() {
                let settings = KMeans::new(5)
                    .metric(metric)
                    .init(init.clone())
                    .sample_weights(&weights.to_device(&device).unwrap());
                let fit = settings.fit(&x.to_device(&device).unwrap()).unwrap();
                costs.push((bits(&fit.inertia), u32s(&fit.labels)));
            }
            assert!(costs.windows(2).all(|c| c[0] == c[1]), "{metric:?} {init:?}");
        }
    }
}

#[test]
fn initialisations() {
    let mut rng = rng(37);
    for dtype in [DType::F16, DType::F32] {
        let x = blobs(&[2, 900, 3], 30, dtype, &mut rng);
        let mut cost = vec![];
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::GreedyKMeansPlusPlus] {
            let start = |seed: u64| fit(&KMeans::new(30).init(init.clone()).seed(seed).max_iters(0), &x);
            assert_eq!(bits(&start(1).centroids), bits(&start(1).centroids), "{init:?}: same seed");
            assert_ne!(bits(&start(1).centroids), bits(&start(2).centroids), "{init:?}: other seed");
            // Different rows of x.
            for (rows, chosen) in problems(&x).iter().zip(problems(&start(1).centroids)) {
                assert!(chosen.iter().all(|c| rows.contains(c)), "{init:?}");
                let distinct: std::collections::HashSet<Vec<u64>> =
                    chosen.iter().map(|c| c.iter().map(|v| v.to_bits()).collect()).collect();
                assert!(dtype == DType::F16 || distinct.len() == 30, "{init:?}");
            }
            cost.push((0..8).map(|s| f64s(&start(s).inertia).iter().sum::<f64>()).sum::<f64>());
        }
        assert!(cost[1] < 0.7 * cost[0] && cost[2] < 0.7 * cost[0], "seeding should beat random rows: {cost:?}");
        assert!(cost[3] < 0.95 * cost[1], "greedy seeding should beat one draw: {cost:?}");
    }
}

#[test]
fn n_init_keeps_the_best_of_each_problem() {
    let mut rng = rng(38);
    let x = blobs(&[4, 200, 3], 10, DType::F32, &mut rng);
    let best = fit(&KMeans::new(10).n_init(6).seed(5), &x);
    let runs: Vec<Vec<f64>> = (5..11).map(|s| f64s(&KMeans::new(10).seed(s).fit(&x).unwrap().inertia)).collect();
    for (b, cost) in f64s(&best.inertia).into_iter().enumerate() {
        assert_eq!(cost, runs.iter().map(|r| r[b]).fold(f64::INFINITY, f64::min));
    }
}

/// Random starts are different rows, whatever the number of them: all of them are a permutation of the rows.
#[test]
fn as_many_clusters_as_rows() {
    let x = tensor(&[2, 40, 1], DType::F32, |i| i as f64);
    for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::GreedyKMeansPlusPlus] {
        for seed in 0..5 {
            let got = fit(&KMeans::new(40).init(init.clone()).seed(seed), &x);
            assert_eq!((f64s(&got.inertia), u32s(&got.counts)), (vec![0.0; 2], vec![1; 80]), "{init:?}");
        }
    }
}

#[test]
fn rows_of_no_weight_are_labelled_and_ignored() {
    let mut rng = rng(42);
    let (x, far) = (blobs(&[100, 3], 4, DType::F32, &mut rng), uniform(&[30, 3], 1e6, 1.0, DType::F32, &mut rng));
    let all = Tensor::cat(&[&x, &far], 0).unwrap();
    let weights = tensor(&[130], DType::F32, |i| if i < 100 { 1.0 } else { 0.0 });
    for metric in METRICS {
        for init in DRAWN {
            let settings = KMeans::new(4).metric(metric).init(init).tol(0.0);
            let got = settings.sample_weights(&weights).fit(&all).unwrap();
            assert_same(&got.labels, &got.predict(&all).unwrap(), "pairing");
            assert!(f64s(&got.centroids).iter().all(|v| v.abs() < 1e3), "{metric:?}: a weightless row counted");
            let given = KMeans::new(4).metric(metric).init(Init::Given(x.narrow(0, 0, 4).unwrap())).tol(0.0);
            let (with, without) = (given.clone().sample_weights(&weights).fit(&all).unwrap(), given.fit(&x).unwrap());
            assert_same(&with.labels.narrow(0, 0, 100).unwrap(), &without.labels, "labels");
            assert_same(&with.inertia, &without.inertia, "inertia");
        }
    }
}

/// A row is drawn as often as its weight says, and (k-means++) as its distance says.
#[test]
fn draws_follow_their_probabilities() {
    let x = tensor(&[3, 1], DType::F64, |i| [0.0, 1.0, 3.0][i]);
    let weights = tensor(&[3], DType::F64, |i| [1.0, 2.0, 5.0][i]);
    let runs = 2000;
    let share = |settings: KMeans, hit: fn(&[f64]) -> bool| {
        let starts = (0..runs).map(|seed| f64s(&settings.clone().seed(seed).max_iters(0).fit(&x).unwrap().centroids));
        starts.filter(|start| hit(start)).count() as f64 / runs as f64
    };
    // Six standard deviations of a share of 2000 draws are at most 0.067.
    let near = |got: f64, want: f64| assert!((got - want).abs() < 0.067, "{got} for {want}");
    near(share(KMeans::new(1), |start| start[0] == 3.0), 1.0 / 3.0);
    near(share(KMeans::new(1).sample_weights(&weights), |start| start[0] == 3.0), 5.0 / 8.0);
    let plus = KMeans::new(2).init(Init::KMeansPlusPlus);
    // From 0: 1 or 3 by 1 to 9. From 1: 0 or 3 by 1 to 4. From 3: 0 or 1 by 9 to 4.
    near(share(plus.clone(), |start| start == [0.0, 3.0]), 0.9 / 3.0);
    near(share(plus.clone(), |start| start == [3.0, 0.0]), 9.0 / 13.0 / 3.0);
    // The same with weights: from 1, 0 or 3 by 1 to 20.
    near(share(plus.sample_weights(&weights), |start| start == [1.0, 3.0]), 2.0 / 8.0 * 20.0 / 21.0);
}

/// Seeds of a block are drawn by the distances to all before them, those of the block included: how often each sequence of four rows starts
/// a fit is what k-means++ one by one says, greedy or not, and most sequences have two rows of a pair of neighbours, of which a block that
/// has drawn both has to put one off. The rows have so many columns that a block of the greedy one is for several rounds.
#[test]
fn seeds_of_a_block_follow_the_law_of_single_ones() {
    let points = [0.0, 0.5, 6.0, 6.7, 10.0, 15.0f64];
    let (b, k) = (40_000, 4);
    let weights = [1.0, 2.0, 1.0, 0.5, 3.0, 1.0];
    for (init, d, trials) in [(Init::KMeansPlusPlus, 1, 1), (Init::GreedyKMeansPlusPlus, 64, 3)] {
        let x =
            tensor(&[b, points.len(), d], DType::F32, |i| if i % d == 0 { points[i / d % points.len()] } else { 0.0 });
        let seeded = KMeans::new(k).init(init).seed(3).max_iters(0);
        for w in [None, Some(weights)] {
            let w_of = |row: usize| w.map_or(1.0, |w| w[row]);
            let settings = match w {
                Some(w) => {
                    let w = Tensor::from_slice(&w.map(|w| w as f32), 6, &Device::Cpu).unwrap();
                    seeded.clone().sample_weights(&w)
                }
                None => seeded.clone(),
            };
            let starts = problems(&settings.fit(&x).unwrap().centroids);
            let mut often = std::collections::HashMap::<Vec<usize>, usize>::new();
            for start in starts {
                let row = |c: &Vec<f64>| points.iter().position(|&p| (p - c[0]).abs() < 1e-3).unwrap();
                *often.entry(start.iter().map(row).collect()).or_default() += 1;
            }
            // All sequences, row by row.
            let mut law = vec![(vec![], 1.0)];
            for i in 0..k {
                let longer = |(rows, p): (Vec<usize>, f64)| {
                    let to = |row: usize, seed: usize| (points[row] - points[seed]).powi(2);
                    let near = |row: usize| rows.iter().map(|&s| to(row, s)).fold(f64::INFINITY, f64::min);
                    let mass: Vec<f64> = (0..6).map(|row| w_of(row) * if i == 0 { 1.0 } else { near(row) }).collect();
                    // What is left of the potential with a row.
                    let left = |seed: usize| (0..6).map(|row| w_of(row) * near(row).min(to(row, seed))).sum::<f64>();
                    let mut next = [0.0; 6];
                    // Different rows that are drawn one after another, of which the best is the seed.
                    let mut drawn = vec![(vec![], 1.0)];
                    for _ in 0..if i == 0 { 1 } else { trials } {
                        let one_more = |(drawn, p): (Vec<usize>, f64)| {
                            let others: Vec<usize> = (0..6).filter(|row| !drawn.contains(row)).collect();
                            let total: f64 = others.iter().map(|&row| mass[row]).sum();
                            let with = |row: usize| ([&drawn[..], &[row]].concat(), p * mass[row] / total);
                            others.into_iter().map(with).collect::<Vec<_>>()
                        };
                        drawn = drawn.into_iter().flat_map(one_more).filter(|(_, p)| *p > 0.0).collect();
                    }
                    for (drawn, p) in drawn {
                        next[drawn.into_iter().min_by(|&x, &y| left(x).total_cmp(&left(y))).unwrap()] += p;
                    }
                    (0..6).map(|row| ([&rows[..], &[row]].concat(), p * next[row])).collect::<Vec<_>>()
                };
                law = law.into_iter().flat_map(longer).filter(|(_, p)| *p > 0.0).collect();
            }
            assert!(trials > 1 || law.len() == 6 * 5 * 4 * 3);
            // Pearson's statistic of n cells has mean n - 1 and a variance of about 2 n; cells of few draws count as one.
            let (mut statistic, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
            for (rows, p) in &law {
                let (got, want) = (often.remove(rows).unwrap_or(0) as f64, p * b as f64);
                if want < 10.0 {
                    rest = (rest.0 + got, rest.1 + want);
                } else {
                    statistic += (got - want).powi(2) / want;
                    cells += 1.0;
                }
            }
            assert!(often.is_empty(), "{often:?}");
            statistic += if rest.1 > 0.0 { (rest.0 - rest.1).powi(2) / rest.1 } else { 0.0 };
            let most = 5.0 * f64::sqrt(2.0 * cells);
            assert!(cells > 15.0 && (statistic - cells).abs() < most, "{trials}: {statistic} of {cells} cells");
        }
    }
}

/// Two rows so far out that a block draws hardly anything else, and one of which it has to reject until others are drawn by what is left: all
/// seeds are found, and each row is one at most once.
#[test]
fn a_block_of_rejections_ends() {
    let mut rng = rng(50);
    for far in [1e6, 1e12, 1e18] {
        let values = f64s(&uniform(&[200, 3], 0.0, 1.0, DType::F64, &mut rng));
        let x = tensor(&[200, 3], DType::F64, |i| values[i] + if i < 6 { far } else { 0.0 });
        for (k, seed) in [2, 3, 17, 40].into_iter().flat_map(|k| (0..5).map(move |seed| (k, seed))) {
            let start = fit(&KMeans::new(k).init(Init::KMeansPlusPlus).seed(seed).max_iters(0), &x);
            let start = problems(&start.centroids).remove(0);
            let mut rows: Vec<_> = start.iter().map(|c| problems(&x)[0].iter().position(|row| row == c)).collect();
            rows.sort_unstable();
            rows.dedup();
            assert!(rows.len() == k && rows[0].is_some(), "{far} {k}");
            assert!(start.iter().any(|c| c[0] > 0.5 * far), "{far} {k}: a far row is a seed");
        }
    }
}

/// SplitMix64's finaliser.
fn mix(z: u64) -> u64 {
    let z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A uniform variate of a row.
fn uniform_of([seed, b]: [u64; 2], round: u64, row: usize) -> f64 {
    let h = mix(mix(mix(mix(seed) ^ round) ^ b) ^ row as u64);
    ((h >> 12) as f64 + 0.5) / 2f64.powi(52)
}

/// The rows that k-means++ starts problem `b` from, of several `trials` if it is greedy. Every row arrives when its rate, which is what it is drawn
/// by, has come to its hazard, an exponential variate; and again, with another one, after it has been tried in vain. A block is over
/// with the arrival that was to be its last when it began.
fn plus_plus(x: &Rows, w: &[f64], k: usize, trials: usize, metric: Metric, of: [u64; 2]) -> Vec<usize> {
    let by = if metric == Metric::Dot { Metric::SquaredEuclidean } else { metric };
    let (n, d) = (x.len(), x[0].len());
    let to = |row: usize, seed: usize| if row == seed { 0.0 } else { naive::distance(&x[row], &x[seed], by) };
    let hazard = |block: u64, again: u64, row: usize| -uniform_of(of, block + (again << 32), row).ln();
    let most = ((64.min(d / 4) + 1) / trials).saturating_sub(1).max(1);
    let (mut chosen, mut tried, mut rounds): (Vec<usize>, Vec<usize>, _) = (vec![], vec![], 1);
    let (mut near, mut rate, mut now) = (vec![f64::INFINITY; n], w.to_vec(), 0.0);
    let mut hazards: Vec<f64> = (0..n).map(|row| hazard(0, 0, row)).collect();
    for block in 0.. {
        if chosen.len() == k {
            break;
        }
        let (draws, enough) = match trials {
            _ if block == 0 => (1, 1),
            1 => (16.min(k - 1), 1),
            trials => (trials * rounds, trials),
        };
        let arrival = |i: usize, now: f64, hazards: &[f64], rate: &[f64]| now + hazards[i] / rate[i];
        let mut waits: Vec<bool> = (0..n).map(|row| !tried.contains(&row)).collect();
        let mut ends: Vec<f64> = (0..n)
            .filter(|&i| rate[i] > 0.0)
            .map(|i| if waits[i] { arrival(i, now, &hazards, &rate) } else { now })
            .collect();
        ends.sort_by(f64::total_cmp);
        let end = ends.get(draws - 1).map_or(f64::INFINITY, |end| end * (1.0 + 1e-12));
        let (mut again, mut seeds, mut dense) = (vec![0; n], 0, false);
        let start = near.clone();
        while chosen.len() < k && !dense && (block > 0 || seeds == 0) {
            while tried.len() < enough {
                let waiting = (0..n).filter(|&i| waits[i] && rate[i] > 0.0);
                let next = waiting.map(|i| (arrival(i, now, &hazards, &rate), i)).min_by(|a, b| a.0.total_cmp(&b.0));
                let Some((time, row)) = next.filter(|next| next.0 <= end) else { break };
                hazards.iter_mut().zip(&rate).for_each(|(hazard, rate)| *hazard -= (time - now) * rate);
                (now, waits[row]) = (time, false);
                tried.push(row);
            }
            if tried.is_empty() || tried.len() < enough && end.is_finite() {
                break;
            }
            let with = |seed: usize| -> Vec<f64> { (0..n).map(|row| near[row].min(to(row, seed))).collect() };
            let potential = |&seed: &usize| sum(with(seed).iter().zip(w).map(|(near, w)| near * w));
            let best = *tried.iter().min_by(|i, j| potential(i).total_cmp(&potential(j))).unwrap();
            // The rows that are nearer to the seed than to any before the block.
            dense =
                trials > 1 && 16 * (0..n).filter(|&i| i != best && w[i] > 0.0 && to(i, best) < start[i]).count() > n;
            near = with(best);
            rate = near.iter().zip(w).map(|(near, w)| near * w).collect();
            chosen.push(best);
            seeds += 1;
            for row in tried.drain(..).filter(|&row| row != best) {
                again[row] += 1;
                (hazards[row], waits[row]) = (hazard(block, again[row], row), true);
            }
        }
        if block > 0 {
            rounds = if dense { 1 } else { (seeds + 1 + seeds / 2).min(most) };
        } else {
            // Else what is left of a hazard may be too little to be added to the time.
            now = 0.0;
        }
    }
    chosen
}

/// Both kinds of k-means++ start from the rows of their specification, in all types, of few seeds and of many, at magnitudes whose squares f32 does not hold, by any
/// number of threads, and whatever else is in the batch.
#[test]
fn draws_of_k_means_plus_plus_are_those_of_the_specification() {
    let mut rng = rng(46);
    for (d, dtype, scale, k) in [
        (1, DType::F32, 1.0, 5),
        (31, DType::F16, 1.0, 8),
        (32, DType::BF16, 1.0, 4),
        (33, DType::F32, 1e24, 9),
        (33, DType::F32, 1e-24, 9),
        (150, DType::F32, 1.0, 25),
        (9, DType::F32, 1.0, 60),
        (513, DType::F32, 1.0, 20),
        (300, DType::F64, 1e160, 6),
        (257, DType::F64, 1.0, 6),
        // So many seeds that a matrix unit looks for those that are too far.
        (40, DType::F32, 1.0, 100),
        (64, DType::F16, 1.0, 80),
        (33, DType::BF16, 1.0, 120),
        (96, DType::F64, 1.0, 70),
        (40, DType::F32, 1e13, 70),
    ] {
        let x = blobs(&[3, 220, d], 12, DType::F64, &mut rng).affine(scale, 0.0).unwrap().to_dtype(dtype).unwrap();
        let weights = uniform(&[3, 220], 1.0, 1.0, DType::F64, &mut rng);
        // Squares beyond f64 say nothing, and one column has but two directions.
        let told = |metric| if scale > 1e100 { metric == Metric::Manhattan } else { d > 1 || metric != Metric::Cosine };
        for metric in METRICS.into_iter().filter(|&metric| told(metric)) {
            for (init, trials) in
                [(Init::KMeansPlusPlus, 1), (Init::GreedyKMeansPlusPlus, 2 + f64::from(k).ln().floor() as usize)]
            {
                for weights in [None, Some(&weights)] {
                    let mut settings = KMeans::new(k as usize).metric(metric).init(init.clone()).seed(9).max_iters(0);
                    let flat = weights.map_or(vec![1.0; 660], f64s);
                    let expected: Vec<Rows> = (problems(&x).iter().enumerate())
                        .map(|(b, x)| {
                            let w = &flat[220 * b..][..220];
                            let of = [9, b as u64];
                            let rows = plus_plus(x, w, k as usize, trials, metric, of);
                            rows.into_iter().map(|row| x[row].clone()).collect()
                        })
                        .collect();
                    for device in devices() {
                        if let Some(weights) = weights {
                            settings = settings.sample_weights(&weights.to_device(&device).unwrap());
                        }
                        let x = x.to_device(&device).unwrap();
                        for threads in [1, 3] {
                            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                            let start = pool.install(|| {
                                let fit = settings.fit(&x).unwrap();
                                // Threads of a GPU have streams of their own, and another one reads this.
                                device.synchronize().unwrap();
                                fit.centroids
                            });
                            assert!(problems(&start) == expected, "{init:?} {metric:?} {dtype:?} {d} {scale}");
                        }
                    }
                }
            }
        }
    }
}

/// What is tried and left is drawn again: of two rows that are left both are tried, and the better one is always taken.
#[test]
fn greedy_seeds_are_the_best_of_what_was_drawn() {
    let x = tensor(&[3, 1], DType::F64, |i| [0.0, 1.0, 3.0][i]);
    for seed in 0..200 {
        let start = fit(&KMeans::new(2).init(Init::GreedyKMeansPlusPlus).seed(seed).max_iters(0), &x);
        let start = f64s(&start.centroids);
        assert!(start[0] == 3.0 || start[1] == 3.0, "{start:?}");
    }
}

/// Gaussian blobs, to which one draw for each centroid leads some of 20 starts, and greedy k-means++ all but one.
#[test]
fn greedy_starts_find_separate_blobs() {
    let mut rng = rng(47);
    let (n, d, blobs) = (1000, 96, 20);
    let centres: Vec<f64> = (0..blobs * d).map(|_| rng.random_range(-10.0..10.0)).collect();
    // A sum of twelve uniform variates is about Gaussian, of variance 1.
    let mut gaussian = || (0..12).map(|_| rng.random_range(-0.5..0.5)).sum::<f64>();
    let x = tensor(&[n, d], DType::F32, |i| centres[i / d % blobs * d + i % d] + gaussian());
    let costs = |init: Init| -> Vec<f64> {
        let settings = KMeans::new(blobs).init(init).tol(0.0).max_iters(100);
        let mut costs: Vec<_> =
            (0..20).map(|seed| f64s(&settings.clone().seed(seed).fit(&x).unwrap().inertia)[0]).collect();
        costs.sort_by(f64::total_cmp);
        costs
    };
    let (greedy, plain) = (costs(Init::GreedyKMeansPlusPlus), costs(Init::KMeansPlusPlus));
    let centres = Tensor::from_vec(centres, (blobs, d), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap();
    let best = f64s(&KMeans::new(blobs).init(Init::Given(centres)).tol(0.0).fit(&x).unwrap().inertia)[0];
    let exact = |costs: &[f64]| costs.iter().filter(|&&cost| cost <= best * (1.0 + 1e-9)).count();
    assert!(greedy[10] <= best * (1.0 + 1e-9) && exact(&greedy) >= 19, "{best}: {greedy:?}");
    assert!(exact(&plain) < exact(&greedy), "{best}: {plain:?}");
}

/// The centroids that rows in memory, prepared and of a stream start from, with these weights.
fn starts(settings: &KMeans, weights: Option<&Tensor>, x: &Tensor) -> Vec<Rows> {
    let settings = settings.clone().max_iters(0);
    let weigh = |weights: &Tensor| settings.clone().sample_weights(weights);
    // A stream's are on the host.
    let streamed = weights.map_or(settings.clone(), |w| weigh(&w.to_device(&Device::Cpu).unwrap()));
    let settings = weights.map_or(settings.clone(), |w| weigh(&w.to_device(x.device()).unwrap()));
    let start = |fit: candle_flash_kmeans::Fit| problems(&fit.centroids).remove(0);
    let mut prepared = settings.prepare(x.shape(), x.dtype(), x.device()).unwrap();
    prepared.run(x).unwrap();
    let source = Source::from_tensor(&x.to_device(&Device::Cpu).unwrap()).unwrap();
    let options = StreamOptions::new(x.device()).block_rows(64);
    vec![
        start(settings.fit(x).unwrap()),
        problems(prepared.centroids()).remove(0),
        start(streamed.fit_stream(&source, &options).unwrap()),
    ]
}

/// Rows without a direction, and those that weigh nothing, are no seeds while there are as many others as clusters, and the first to be where
/// there are not.
#[test]
fn rows_of_no_direction_and_of_no_weight_are_no_seeds() {
    let mut rng = rng(48);
    let n = 300;
    for dtype in [DType::F32, DType::F64] {
        let zero = |i: usize| i.is_multiple_of(3) || i < 40;
        let values = f64s(&uniform(&[n, 3], 0.0, 1.0, dtype, &mut rng));
        let x = tensor(&[n, 3], dtype, |i| if zero(i / 3) { 0.0 } else { values[i] });
        let weights = tensor(&[n], DType::F32, |i| if i % 4 == 1 || i > 260 { 0.0 } else { 0.5 + i as f64 });
        let (directed, all) = (problems(&x).remove(0), f64s(&weights));
        for device in devices() {
            let (x, weights) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
            for (init, seed) in DRAWN.into_iter().flat_map(|init| (0..4).map(move |seed| (init.clone(), seed))) {
                let cosine = KMeans::new(20).metric(Metric::Cosine).init(init.clone()).seed(seed);
                for start in starts(&cosine, None, &x) {
                    assert!(start.iter().all(|c| c.iter().any(|&v| v != 0.0)), "{init:?}: a row of no direction");
                }
                let weighted = KMeans::new(20).init(init.clone()).seed(seed);
                let weighted_rows: Rows = (0..n).filter(|&i| all[i] > 0.0).map(|i| directed[i].clone()).collect();
                for start in starts(&weighted, Some(&weights), &x) {
                    assert!(start.iter().all(|c| weighted_rows.contains(c)), "{init:?}: a row of no weight");
                }
                let both = weighted.metric(Metric::Cosine);
                for start in starts(&both, Some(&weights), &x) {
                    let good = |c: &Vec<f64>| weighted_rows.contains(c) && c.iter().any(|&v| v != 0.0);
                    assert!(start.iter().all(good), "{init:?}: a row of no weight or direction");
                }
            }
            // More clusters than rows that weigh something: all of these are seeds.
            let few = tensor(&[n], DType::F32, |i| if i % 50 == 1 { 1.0 } else { 0.0 }).to_device(&device).unwrap();
            for init in DRAWN {
                for start in starts(&KMeans::new(20).init(init.clone()), Some(&few), &x) {
                    let missing = (0..n).filter(|i| i % 50 == 1).find(|&i| !start.contains(&directed[i]));
                    assert_eq!(missing, None, "{init:?}");
                }
            }
        }
    }
}

/// Rows so near each other that their distances vanish beside one are drawn as others are, and those that weigh nothing still are not.
#[test]
fn rows_of_no_weight_are_no_seeds_among_tiny_distances() {
    let mut rng = rng(49);
    let x = uniform(&[200, 2], 0.0, 1e-160, DType::F64, &mut rng);
    let weights = tensor(&[200], DType::F64, |i| if i % 2 == 1 { 1.0 } else { 0.0 });
    let weighted: Rows = problems(&x).remove(0).into_iter().skip(1).step_by(2).collect();
    for device in devices() {
        let (x, weights) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
        for (init, seed) in DRAWN.into_iter().flat_map(|init| (0..4).map(move |seed| (init.clone(), seed))) {
            let settings = KMeans::new(12).init(init.clone()).seed(seed);
            for start in starts(&settings, Some(&weights), &x) {
                assert!(start.iter().all(|c| weighted.contains(c)), "{init:?}: a row of no weight");
            }
        }
    }
}

/// No row is taken twice, where values repeat either: each value is a seed at most as often as it is a row.
#[test]
fn rows_are_taken_once() {
    let values = |i: usize| (i / 3) as f64 * (i / 3) as f64;
    let x = tensor(&[60, 1], DType::F32, values);
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        for (init, k) in DRAWN.into_iter().flat_map(|init| [19, 20, 25, 40, 60].map(|k| (init.clone(), k))) {
            for seed in 0..6 {
                for start in starts(&KMeans::new(k).init(init.clone()).seed(seed), None, &x) {
                    let often = |v: f64| start.iter().filter(|c| c[0] == v).count();
                    assert!((0..60).all(|i| often(values(i)) <= 3), "{init:?} {k}: {start:?}");
                    let spread = !matches!(init, Init::Random | Init::Even);
                    assert!(
                        !spread || (0..60).all(|i| often(values(i)) >= usize::from(k >= 20)),
                        "{init:?} {k}: {start:?}"
                    );
                }
            }
        }
    }
}

/// Row `i * n / k` for cluster `i` of every problem, with weights too and in a prepared fit.
#[test]
fn even_seeds_are_evenly_spaced() {
    let mut rng = rng(43);
    for (n, k) in [(1, 1), (7, 7), (100, 7), (1000, 16), (257, 256)] {
        let x = uniform(&[3, n, 2], 0.0, 1.0, DType::F32, &mut rng);
        let want: Vec<Rows> = problems(&x).iter().map(|x| (0..k).map(|i| x[i * n / k].clone()).collect()).collect();
        let even = KMeans::new(k).init(Init::Even).max_iters(0);
        assert_eq!(problems(&fit(&even, &x).centroids), want, "{n} {k}");
        for device in devices() {
            let x = x.to_device(&device).unwrap();
            let weights = uniform(&[n], 1.0, 1.0, DType::F32, &mut common::rng(44)).to_device(&device).unwrap();
            let weighted = even.clone().sample_weights(&weights).fit(&x).unwrap();
            assert_eq!(problems(&weighted.centroids), want, "weighted");
            let mut prepared = even.prepare((3, n, 2), DType::F32, &device).unwrap();
            for _ in 0..2 {
                prepared.run(&x).unwrap();
                assert_eq!(problems(prepared.centroids()), want, "prepared");
            }
        }
    }
}

/// The least cost of `k` ranges of sorted values with weights, by trying all cuts.
fn least_cost(points: &[(f64, f64)], k: usize) -> f64 {
    let cost = |own: &[(f64, f64)]| {
        let weight: f64 = own.iter().map(|p| p.1).sum();
        let mean = own.iter().map(|p| p.0 * p.1).sum::<f64>() / weight;
        own.iter().map(|p| p.1 * (p.0 - mean) * (p.0 - mean)).sum::<f64>()
    };
    match (points.len(), k) {
        (0, _) => 0.0,
        (_, 1) => cost(points),
        (n, _) => {
            (1..=n).map(|cut| cost(&points[..cut]) + least_cost(&points[cut..], k - 1)).fold(f64::INFINITY, f64::min)
        }
    }
}

/// Rows of one column start, and stay, at the least cost of all clusterings: batches, weights, equal values, values that lie far from 0 or from
/// the others, and fewer values than clusters.
#[test]
fn an_optimum_is_the_least_cost_of_all() {
    let mut rng = rng(45);
    let spreads: [fn(f64, usize) -> f64; 4] =
        [|v, _| v, |v, _| (v * 4.0).round(), |v, _| v + 1e4, |v, i| if i % 5 == 0 { 1e5 + v } else { v * 1e-3 }];
    for (case, spread) in spreads.into_iter().enumerate() {
        for (n, k, dtype) in [(9, 3, DType::F32), (12, 4, DType::F64), (7, 2, DType::F16), (3, 5, DType::F32)] {
            let values = f64s(&uniform(&[3, n, 1], 1.0, 1.0, DType::F64, &mut rng));
            let values = values.into_iter().enumerate().map(|(i, v)| spread(v, i)).collect::<Vec<_>>();
            let x = Tensor::from_vec(values, (3, n, 1), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            if k > n || dtype == DType::F16 && case > 1 {
                continue;
            }
            let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng).abs().unwrap();
            for weights in [None, Some(weights)] {
                let mut fits = vec![];
                for device in devices() {
                    let mut settings = KMeans::new(k).init(Init::Optimal);
                    if let Some(weights) = &weights {
                        settings = settings.sample_weights(&weights.to_device(&device).unwrap());
                    }
                    let fit = settings.fit(&x.to_device(&device).unwrap()).unwrap();
                    fits.push((bits(&fit.centroids), u32s(&fit.labels), f64s(&fit.inertia)));
                }
                assert!(fits.windows(2).all(|f| f[0] == f[1]), "case {case}, {dtype:?}: devices differ");
                for (rows, inertia) in problems(&x).iter().zip(&fits[0].2) {
                    let weight = |i: usize| weights.as_ref().map_or(1.0, |w| f64s(w)[i]);
                    let mut points: Vec<_> = rows.iter().enumerate().map(|(i, row)| (row[0], weight(i))).collect();
                    points.sort_by(|a, b| a.0.total_cmp(&b.0));
                    let (least, size) = (least_cost(&points, k), points[n - 1].0.abs().max(points[0].0.abs()));
                    // Centroids are rounded to the dtype.
                    let rounding = match dtype {
                        DType::F16 => 1e-3,
                        DType::F32 => 1e-7,
                        _ => 1e-15,
                    };
                    let most = least * (1.0 + 1e-6) + n as f64 * (rounding * size).powi(2);
                    assert!(
                        *inertia <= most,
                        "case {case}, {dtype:?}, {n} values, {k} clusters: {inertia}, not {least}"
                    );
                }
            }
        }
    }
}

/// A start without a choice.
#[test]
fn an_optimum_of_few_values() {
    for device in devices() {
        let start = |values: &[f32], k: usize| {
            let x = Tensor::from_slice(values, (values.len(), 1), &device).unwrap();
            f64s(&KMeans::new(k).init(Init::Optimal).max_iters(0).fit(&x).unwrap().centroids)
        };
        assert_eq!(start(&[3.0, 1.0, 3.0, 1.0], 3), [1.0, 3.0, 3.0]);
        assert_eq!(start(&[2.0, 0.0, 1.0], 3), [0.0, 1.0, 2.0]);
        // Of two cuts that are equally good the first.
        assert_eq!(start(&[0.0, 1.0, 2.0], 2), [0.0, 1.5]);
        assert_eq!(start(&[-0.0, 0.0, 8.0], 2), [0.0, 8.0]);
        let x = Tensor::from_slice(&[1f32, 2.0, 4.0, 9.0], (4, 1), &device).unwrap();
        let weights = Tensor::new(&[0f32, 1.0, 1.0, 0.0], &device).unwrap();
        let settings = KMeans::new(2).init(Init::Optimal).max_iters(0);
        assert_eq!(f64s(&settings.clone().sample_weights(&weights).fit(&x).unwrap().centroids), [2.0, 4.0]);
        let x = Tensor::from_slice(&[1f32, f32::NAN, 4.0, 9.0], (4, 1), &device).unwrap();
        assert_eq!(f64s(&settings.check_finite(false).fit(&x).unwrap().centroids), [2.5, 9.0]);
    }
}

#[test]
fn an_optimum_of_other_rows_is_refused() {
    for device in devices() {
        let x = Tensor::zeros((8, 2), DType::F32, &device).unwrap();
        let optimal = KMeans::new(2).init(Init::Optimal);
        refused(optimal.fit(&x), "Conflict", &["init", "Optimal", "rows of 2 columns"]);
        let x = x.narrow(1, 0, 1).unwrap();
        refused(optimal.clone().metric(Metric::Manhattan).fit(&x), "Conflict", &["init", "Optimal", "Manhattan"]);
        refused(optimal.n_init(2).fit(&x), "Conflict", &["n_init", "an optimum"]);
    }
}

/// Of more rows than a sample has, the default start sees the same ones in memory and in a stream, and others where too few of them can be seeds.
#[test]
fn the_default_start_of_many_rows_is_that_of_a_sample() {
    const ROWS: usize = 65_536 + 3000;
    let x = blobs(&[ROWS, 3], 40, DType::F32, &mut rng(47));
    // Rows that weigh, of which a sample has few, or none; by cosine others have no direction.
    let weighing = [5, 40_000, 65_535, 65_540, ROWS - 1];
    let weights = tensor(&[ROWS], DType::F64, |i| f64::from(weighing.contains(&i)));
    let directed = x.broadcast_mul(&weights.to_dtype(DType::F32).unwrap().unsqueeze(1).unwrap()).unwrap();
    for device in devices() {
        let on = |t: &Tensor| t.to_device(&device).unwrap();
        let plain = KMeans::new(5).seed(3).max_iters(1);
        let cases = [
            (&x, plain.clone(), plain.clone()),
            (&x, plain.clone().sample_weights(&weights), plain.clone().sample_weights(&on(&weights))),
            (&directed, plain.clone().metric(Metric::Cosine), plain.clone().metric(Metric::Cosine)),
        ];
        for (case, (x, streamed, whole)) in cases.into_iter().enumerate() {
            let (source, options) = (Source::from_tensor(x).unwrap(), StreamOptions::new(&device).block_rows(20_000));
            let (stream, fit) = (streamed.fit_stream(&source, &options).unwrap(), whole.fit(&on(x)).unwrap());
            let fit = fit.to_device(&Device::Cpu).unwrap();
            assert_same(&stream.centroids, &fit.centroids, &format!("centroids of case {case}"));
            assert_same(&stream.labels, &fit.labels, &format!("labels of case {case}"));
            let start = whole.clone().max_iters(0).fit(&on(x)).unwrap();
            let seeds = problems(&start.centroids)[0].clone();
            let rows = &problems(x)[0];
            if case > 0 {
                for row in weighing {
                    assert!(seeds.contains(&rows[row]), "case {case}: row {row} is no seed");
                }
            }
            // Each problem of a batch has the start that it has alone.
            let twice = Tensor::stack(&[x, x], 0).unwrap();
            let batch = whole.clone().max_iters(0).fit(&on(&twice)).unwrap();
            assert_same(&batch.centroids.get(0).unwrap(), &start.centroids, &format!("batch of case {case}"));
        }
    }
}

/// An optimum where nothing counts is a row that is finite, if there is one.
#[test]
fn an_optimum_of_nothing_is_finite() {
    for device in devices() {
        let x = Tensor::from_slice(&[f32::NAN, 2.0, 4.0], (3, 1), &device).unwrap();
        let settings = KMeans::new(2).init(Init::Optimal).max_iters(0).check_finite(false);
        let settings = settings.sample_weights(&Tensor::zeros(3, DType::F32, &device).unwrap());
        assert_eq!(f64s(&settings.fit(&x).unwrap().centroids), [2.0, 2.0]);
    }
}
