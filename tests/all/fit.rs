//! Whole fits: against the specification, and what every fit promises.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{EmptyClusters, Init, KMeans, Metric};
use rand::Rng;

/// `tol` times the mean variance of the columns, about the mean as the dtype stores it.
fn threshold(x: &Rows, tol: f64, metric: Metric, dtype: DType) -> f64 {
    let (n, d) = (x.len() as f64, x[0].len());
    if metric == Metric::Cosine {
        return tol / d as f64;
    }
    let mean: Vec<f64> = (0..d).map(|c| round(sum(x.iter().map(|r| r[c])) / n, dtype)).collect();
    tol * sum(x.iter().map(|r| naive::distance(r, &mean, Metric::SquaredEuclidean))) / (n * d as f64)
}

#[test]
fn follows_the_specification() {
    let mut rng = rng(31);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        for (n, k, d) in [(300, 5, 2), (500, 12, 17), (200, 3, 64), (90, 30, 1)] {
            for (tol, max_iters) in [(0.0, 60), (1e-2, 60), (0.0, 3)] {
                let x = blobs(&[n, d], k, dtype, &mut rng);
                let start = x.narrow(0, 10, k).unwrap();
                let weights = uniform(&[n], 1.0, 1.0, DType::F64, &mut rng);
                let settings = KMeans::new(k).metric(metric).tol(tol).max_iters(max_iters);
                for weighted in [false, true] {
                    let what = format!("{metric:?} {dtype:?} {n} {k} {d} tol {tol} weighted {weighted}");
                    let (got, w) = match weighted {
                        false => (fit_from(&start, &settings, &x), vec![1.0; n]),
                        true => {
                            let given = settings.clone().init(Init::Given(start.clone()));
                            (given.sample_weights(&weights).fit(&x).unwrap(), f64s(&weights))
                        }
                    };
                    let (rows, c) = (problems(&x).remove(0), problems(&start).remove(0));
                    let how = (metric, max_iters, threshold(&rows, tol, metric, dtype));
                    let (centroids, labels, n_iter, converged) = naive::fit(&rows, &w, c, how, &|v| round(v, dtype));
                    assert_eq!(u32s(&got.labels), labels, "{what}");
                    assert_eq!(
                        (u32s(&got.n_iter), u32s(&got.converged)),
                        (vec![n_iter as u32], vec![converged as u32]),
                        "{what}"
                    );
                    for (g, w) in f64s(&got.centroids).into_iter().zip(centroids.concat()) {
                        // One rounding to a narrow type; f64 has no wider type to sum in.
                        let allowed = if dtype == DType::F64 { 8.0 * ulp(w, dtype) + 1e-15 } else { ulp(w, dtype) };
                        assert!((g - w).abs() <= allowed, "{what}: {g:e} {w:e}");
                    }
                    let c = problems(&got.centroids).remove(0);
                    let cost = sum((0..n).map(|i| w[i] * naive::distance(&rows[i], &c[labels[i] as usize], metric)));
                    approx::assert_relative_eq!(f64s(&got.inertia)[0], cost, max_relative = 1e-12, epsilon = 1e-12);
                }
            }
        }
    }
}

#[test]
fn labels_belong_to_the_centroids_at_every_exit() {
    let mut rng = rng(32);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        let x = blobs(&[2, 3, 150, 9], 6, dtype, &mut rng);
        for (max_iters, tol) in [(0, 0.0), (1, 0.0), (2, 0.0), (3, 1e-3), (100, 0.1), (100, 0.0)] {
            let got = fit(&KMeans::new(8).metric(metric).max_iters(max_iters).tol(tol).seed(3), &x);
            assert_eq!((got.centroids.dims(), got.centroids.dtype()), (&[2, 3, 8, 9][..], dtype));
            assert_eq!(
                (got.labels.dims(), got.counts.dims(), got.inertia.dims()),
                (&[2, 3, 150][..], &[2, 3, 8][..], &[2, 3][..])
            );
            assert!(u32s(&got.n_iter).iter().all(|&i| i as usize <= max_iters));
            if max_iters == 100 && metric != Metric::Dot {
                assert_eq!(got.converged.flatten_all().unwrap().to_vec1::<u8>().unwrap(), [1; 6]);
            }
        }
    }
}

#[test]
fn the_cost_never_rises() {
    let mut rng = rng(33);
    for metric in [Metric::SquaredEuclidean, Metric::Cosine, Metric::Manhattan] {
        let x = uniform(&[400, 6], 0.2, 1.0, DType::F64, &mut rng);
        let weights = uniform(&[400], 1.0, 0.9, DType::F64, &mut rng);
        for settings in [KMeans::new(9), KMeans::new(9).sample_weights(&weights)] {
            let mut last = f64::INFINITY;
            for max_iters in 0..25 {
                let fit = settings.clone().metric(metric).max_iters(max_iters).tol(0.0).fit(&x).unwrap();
                let cost = f64s(&fit.inertia)[0];
                // The last bits: centroids are rounded to f64, and so is the cost.
                assert!(cost <= last * (1.0 + 1e-14), "{metric:?}: {cost} after {last}");
                last = cost;
            }
        }
    }
}

#[test]
fn a_problem_is_the_same_alone_and_in_a_batch() {
    let mut rng = rng(34);
    let x = blobs(&[5, 200, 7], 4, DType::F32, &mut rng);
    let start = x.narrow(1, 0, 6).unwrap();
    for metric in METRICS {
        // Problems that converge after different numbers of iterations must not touch each other.
        let settings = KMeans::new(6).metric(metric).tol(1e-3).max_iters(40);
        let all = fit_from(&start, &settings, &x);
        for b in 0..5 {
            let one = fit_from(&start.get(b).unwrap(), &settings, &x.get(b).unwrap());
            assert_eq!(u32s(&one.labels), u32s(&all.labels.get(b).unwrap()));
            assert_eq!(bits(&one.centroids), bits(&all.centroids.get(b).unwrap()));
            assert_eq!(
                (bits(&one.inertia), u32s(&one.n_iter)),
                (bits(&all.inertia.get(b).unwrap()), u32s(&all.n_iter.get(b).unwrap()))
            );
        }
    }
}

#[test]
fn integer_weights_are_repetitions() {
    let mut rng = rng(35);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        let x = blobs(&[120, 5], 4, dtype, &mut rng);
        // Zero among them: such rows count for nothing, but have labels.
        let times: Vec<u32> = (0..120).map(|_| rng.random_range(0..4)).collect();
        let repeated: Vec<u32> = (0..120).flat_map(|i| vec![i as u32; times[i] as usize]).collect();
        let start = x.narrow(0, 0, 4).unwrap();
        let weights = Tensor::from_vec(times.iter().map(|&t| t as f32).collect(), 120, &Device::Cpu).unwrap();
        let settings = KMeans::new(4).metric(metric).tol(0.0);
        let index = Tensor::new(&repeated[..], &Device::Cpu).unwrap();
        let given = settings.clone().init(Init::Given(start.clone()));
        let a = given.sample_weights(&weights).fit(&x).unwrap();
        let b = fit_from(&start, &settings, &x.index_select(&index, 0).unwrap());
        let what = format!("{metric:?} {dtype:?}");
        assert_same(&a.labels.index_select(&index, 0).unwrap(), &b.labels, &what);
        if metric != Metric::Manhattan && dtype == DType::F64 {
            // Three times a f64 is rounded, adding it three times is not.
            let close = |(a, b): (f64, f64)| (a - b).abs() < 1e-14;
            assert!(f64s(&a.centroids).into_iter().zip(f64s(&b.centroids)).all(close), "{what}");
        } else {
            assert_same(&a.centroids, &b.centroids, &what);
        }
        approx::assert_relative_eq!(f64s(&a.inertia)[0], f64s(&b.inertia)[0], max_relative = 1e-12, epsilon = 1e-12);
    }
}

#[test]
fn empty_clusters() {
    // Two values and three centroids, one of which nothing is near.
    let x = Tensor::new(&[[0f32], [0.], [10.], [12.], [12.]], &Device::Cpu).unwrap();
    let start = Tensor::new(&[[0f32], [11.], [1000.]], &Device::Cpu).unwrap();
    let kept = fit_from(&start, &KMeans::new(3).tol(0.0), &x);
    assert_eq!(kept.centroids.to_vec2::<f32>().unwrap()[2], [1000.0]);
    assert_eq!(u32s(&kept.counts), [2, 3, 0]);
    let moved = fit_from(&start, &KMeans::new(3).tol(0.0).empty_clusters(EmptyClusters::Relocate), &x);
    assert_eq!(f64s(&moved.inertia), [0.0]);
    assert_eq!(u32s(&moved.labels), [0, 0, 2, 1, 1]);
    // The farthest rows go first, the lowest index among equals.
    let x = Tensor::new(&[[0f32], [1.], [-7.], [100.], [-100.], [50.]], &Device::Cpu).unwrap();
    let start = Tensor::new(&[[0f32], [1e6], [-1e6]], &Device::Cpu).unwrap();
    let moved = fit_from(&start, &KMeans::new(3).max_iters(1).empty_clusters(EmptyClusters::Relocate), &x);
    assert_eq!(f64s(&moved.centroids), [11.0, 100.0, -100.0]);
    // More clusters than distinct rows: nothing to move to, nothing breaks.
    let same = Tensor::ones((6, 2), DType::F32, &Device::Cpu).unwrap();
    for policy in [EmptyClusters::Keep, EmptyClusters::Relocate] {
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel] {
            let got = fit(&KMeans::new(4).init(init).empty_clusters(policy), &same);
            assert_eq!((u32s(&got.counts), f64s(&got.inertia)), (vec![6, 0, 0, 0], vec![0.0]));
        }
    }
}

#[test]
fn transform_is_the_distance_to_every_centroid() {
    let mut rng = rng(39);
    let x = uniform(&[3, 40, 6], 0.0, 1.0, DType::F32, &mut rng);
    for metric in METRICS {
        let model = fit(&KMeans::new(5).metric(metric), &x.get(0).unwrap());
        let c = problems(&model.centroids).remove(0);
        for device in devices() {
            let model = KMeans::new(5).metric(metric).fit(&x.get(0).unwrap().to_device(&device).unwrap()).unwrap();
            let got = model.transform(&x.to_device(&device).unwrap()).unwrap();
            assert_eq!((got.dims(), got.dtype()), (&[3, 40, 5][..], DType::F32));
            let rows: Vec<_> = problems(&x).concat();
            for (i, got) in f64s(&got).into_iter().enumerate() {
                assert_eq!(got, naive::distance(&rows[i / 5], &c[i % 5], metric) as f32 as f64);
            }
        }
    }
}

/// The bits of the definition however many rows and centroids meet at once, rows and centroids of zeros among them.
#[test]
fn transform_is_the_definition_for_any_sizes() {
    let mut rng = rng(40);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|dtype| METRICS.map(|metric| (dtype, metric))) {
        for (n, k, d) in [(1, 1, 1), (3, 16, 3), (5, 17, 33), (39, 33, 7), (70, 50, 130)] {
            let mut with_zeros = |n: usize| {
                let values = f64s(&uniform(&[2, n, d], 0.1, 1.0, dtype, &mut rng));
                tensor(&[2, n, d], dtype, |i| if i / d % 7 == 3 { 0.0 } else { values[i] })
            };
            let (x, c) = (with_zeros(n), with_zeros(k));
            let (rows, centroids) = (problems(&x), problems(&c));
            let stored = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let pairs = rows
                .iter()
                .zip(&centroids)
                .flat_map(|(x, c)| x.iter().flat_map(move |x| c.iter().map(move |c| (x, c))));
            let expected: Vec<_> = pairs.map(|(x, c)| round(naive::distance(x, c, metric), stored).to_bits()).collect();
            for device in devices() {
                let c = c.to_device(&device).unwrap();
                let settings = KMeans::new(k).metric(metric).init(Init::Given(c.clone())).max_iters(0);
                let got = settings.fit(&c).unwrap().transform(&x.to_device(&device).unwrap()).unwrap();
                assert_eq!((got.dims(), got.dtype()), (&[2, n, k][..], stored));
                assert_eq!(bits(&got), expected, "{dtype:?} {metric:?} {n} {k} {d}");
            }
        }
    }
}

/// The bits of the definition of data that products prove nothing of, or of which they leave much open, beside data of which they prove all.
#[test]
fn transform_is_the_definition_where_products_prove_little() {
    let mut rng = rng(41);
    let (n, k, d) = (117, 37, 40);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|dtype| METRICS.map(|metric| (dtype, metric))) {
        let largest = if dtype == DType::F16 { 6e4 } else { 1e30 };
        for kind in ["far", "equal", "huge", "tiny", "ties", "an outlier", "not finite", "moved"] {
            let noise = f64s(&uniform(&[2, n, d], 0.0, 1.0, DType::F64, &mut rng));
            let x = tensor(&[2, n, d], dtype, |i| match kind {
                "far" => 1e4 + noise[i] / 64.0,
                "equal" => noise[i % d],
                "huge" => noise[i] * largest,
                "tiny" => noise[i] * 1e-42,
                "ties" => (noise[i] * 4.0).round(),
                "an outlier" if i / d % n == 5 => noise[i] * largest,
                "moved" => 1e3 * (i % d) as f64 + noise[i],
                _ => noise[i],
            });
            // Some rows, the outlier among them, as centroids of all problems, and as those of each.
            let own = x.narrow(1, 2, k).unwrap();
            let values = f64s(&own);
            let own = tensor(&[2, k, d], dtype, |i| match kind {
                "not finite" if i / d % k == 7 => [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][i % 3],
                "not finite" if i / d % k == 8 => f64::INFINITY,
                _ => values[i],
            });
            for c in [own.get(0).unwrap(), own] {
                let (rows, centroids) = (problems(&x), problems(&c));
                let of = |b: usize| &centroids[b.min(centroids.len() - 1)];
                let pairs = (0..2).flat_map(|b| rows[b].iter().flat_map(move |x| of(b).iter().map(move |c| (x, c))));
                let number = |v: f64| if v.is_nan() { f64::NAN } else { v }.to_bits();
                let expected: Vec<_> = pairs
                    .map(|(x, c)| naive::distance(x, c, metric))
                    .map(|v| number(if dtype == DType::F64 { v } else { v as f32 as f64 }))
                    .collect();
                let columns = x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
                for device in devices() {
                    let c = c.to_device(&device).unwrap();
                    let settings = KMeans::new(k).metric(metric).init(Init::Given(c.clone()));
                    let fit = settings.max_iters(0).check_finite(false).fit(&c).unwrap();
                    assert_eq!(problems(&fit.centroids).len(), centroids.len());
                    for x in [&x, &columns].map(|x| x.to_device(&device).unwrap()) {
                        let got: Vec<_> = f64s(&fit.transform(&x).unwrap()).into_iter().map(number).collect();
                        assert!(got == expected, "{kind} {dtype:?} {metric:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn given_centroids_of_any_batch() {
    let mut rng = rng(43);
    for (metric, dtype) in METRICS.into_iter().zip(DTYPES) {
        let x = blobs(&[2, 3, 50, 4], 5, dtype, &mut rng);
        let start = x.narrow(2, 7, 5).unwrap();
        let settings = KMeans::new(5).metric(metric).max_iters(4);
        let flat = |t: &Tensor| t.flatten(0, 1).unwrap();
        let want = fit_from(&flat(&start), &settings, &flat(&x));
        for given in [start.clone(), start.contiguous().unwrap()] {
            let got = fit_from(&given, &settings, &x);
            assert_eq!((got.centroids.dims(), got.inertia.dims()), (&[2, 3, 5, 4][..], &[2, 3][..]));
            assert_eq!((bits(&got.centroids), u32s(&got.labels)), (bits(&want.centroids), u32s(&want.labels)));
        }
        let one = start.get(1).unwrap().get(2).unwrap();
        let each = one.broadcast_as(start.shape()).unwrap();
        let shared = fit_from(&one, &settings, &x);
        assert_same_fit(&shared, &fit_from(&each, &settings, &x), "one start for all");
    }
}

#[test]
fn iterations_are_reported() {
    let seen = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
    let log = seen.clone();
    let x = blobs(&[2, 100, 2], 3, DType::F32, &mut rng(41));
    let got = KMeans::new(3).n_init(2).tol(0.0).on_iteration(move |i| log.lock().unwrap().push(i)).fit(&x).unwrap();
    let seen = seen.lock().unwrap();
    assert!(seen.iter().any(|i| i.run == 1) && seen.iter().filter(|i| i.converged == 2).count() == 2);
    assert!(*u32s(&got.n_iter).iter().max().unwrap() as usize <= seen.iter().map(|i| i.iteration).max().unwrap());
}

/// By hand: the inertia of what an iteration begins with, and how far it moves a centroid; nothing of either unless it is asked for.
#[test]
fn iterations_are_measured_where_that_is_asked_for() {
    let x = tensor(&[2, 4, 1], DType::F32, |i| [0.0, 2.0, 10.0, 16.0, 1.0, 1.0, 5.0, 5.0][i]);
    let weights = tensor(&[4], DType::F32, |i| [1.0, 1.0, 3.0, 1.0][i]);
    for device in devices() {
        let (x, weights) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
        for (measure, weighted) in [(false, false), (true, false), (true, true)] {
            let seen = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
            let log = seen.clone();
            let mut settings = KMeans::new(2).init(Init::Even).tol(0.0).measure_iterations(measure);
            if weighted {
                settings = settings.sample_weights(&weights);
            }
            let fit = settings.on_iteration(move |i| log.lock().unwrap().push((i.inertia, i.shift))).fit(&x).unwrap();
            let seen = seen.lock().unwrap();
            match (measure, weighted) {
                (false, _) => assert!(seen.iter().all(|&i| i == (None, None))),
                // From 0 and 10, and from 1 and 5: 4 and 36. Then from 1 and 13: 1, 1, 9 and 9.
                (true, false) => assert_eq!(seen[..2], [(Some(40.0), Some(3.0)), (Some(20.0), Some(0.0))]),
                // The mean of three times 10 and of 16 is 11.5.
                (true, true) => assert_eq!(seen[..2], [(Some(40.0), Some(1.5)), (Some(2.0 + 6.75 + 20.25), Some(0.0))]),
            }
            let total = f64s(&fit.inertia).iter().sum::<f64>();
            assert!(!measure || seen.last().unwrap().0 == Some(total));
        }
    }
}

/// Each seed of k-means++ is reported, and the end of every other start.
#[test]
fn seeds_are_reported() {
    let x = blobs(&[2, 60, 2], 3, DType::F32, &mut rng(42));
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        for (init, steps) in [
            (Init::Auto, true),
            (Init::KMeansPlusPlus, true),
            (Init::GreedyKMeansPlusPlus, true),
            (Init::KMeansParallel, false),
            (Init::Random, false),
            (Init::Even, false),
        ] {
            let runs = if matches!(init, Init::Even) { 1 } else { 2 };
            let seen = std::sync::Arc::new(std::sync::Mutex::new(vec![]));
            let log = seen.clone();
            let settings = KMeans::new(5).init(init).n_init(runs);
            let told = settings.clone().on_seed(move |s| log.lock().unwrap().push((s.run, s.seeds, s.to_string())));
            assert_same_fit(&told.fit(&x).unwrap(), &settings.fit(&x).unwrap(), "told of seeds");
            let in_run = |run: usize| if run > 0 { format!("run {}, ", run + 1) } else { String::new() };
            let all = |run: usize| {
                if steps { 1..=5 } else { 5..=5 }.map(move |s| (run, s, format!("{}{s} of 5 seeds", in_run(run))))
            };
            assert_eq!(*seen.lock().unwrap(), (0..runs).flat_map(all).collect::<Vec<_>>());
        }
    }
}

/// Rows of one column take another way, sorted, unless iterations are watched: to the same bits, ties and equal or far
/// apart values included.
#[test]
fn one_column_is_the_same_sorted() {
    for (device, dtype) in devices().into_iter().flat_map(|device| DTYPES.map(|t| (device.clone(), t))) {
        for seed in 0..6 {
            let mut rng = rng(90 + seed);
            let (b, n, k) = (3, 400, [1, 7, 16][seed as usize % 3]);
            let x = match seed {
                0 | 1 => integers(&[b, n, 1], 9, dtype, &mut rng),
                2 => tensor(&[b, n, 1], dtype, |i| [1.0, 1e4, -0.0, 0.0, 1e-4][i % 5] * rng.random_range(-1.0..1.0)),
                3 => (integers(&[b, n, 1], 3, dtype, &mut rng) * 1e4).unwrap(),
                _ => uniform(&[b, n, 1], 0.3, 2.0, dtype, &mut rng),
            };
            let weights = tensor(&[b, n], DType::F32, |_| rng.random_range(0..4) as f64);
            let lengths = Tensor::new(&[400u32, 16, 77], &device).unwrap();
            let (x, weights) = (x.to_device(&device).unwrap(), weights.to_device(&device).unwrap());
            for init in [Init::Random, Init::Even, Init::KMeansPlusPlus] {
                let plain = KMeans::new(k).init(init).max_iters(9).tol(if seed % 2 == 0 { 0.0 } else { 1e-3 });
                let all = [plain.clone(), plain.clone().sample_weights(&weights), plain.lengths(&lengths)];
                for (i, settings) in all.into_iter().enumerate() {
                    let what = format!("{dtype:?} seed {seed} settings {i}");
                    let watched = settings.clone().on_iteration(|_| {}).fit(&x).unwrap();
                    assert_same_fit(&settings.fit(&x).unwrap(), &watched, &what);
                }
            }
        }
    }
}

/// As many problems as a model has rows of weights: each is what it is in a batch of a thousand.
#[test]
fn a_million_problems() {
    let (few, copies, n, k) = (1000, 1000, 5, 2);
    for device in devices() {
        let x = uniform(&[few, n, 1], 0.0, 1.0, DType::F32, &mut rng(97)).to_device(&device).unwrap();
        let settings = KMeans::new(k).init(Init::Even).max_iters(4).tol(0.0);
        let [alone, all] = [&x, &x.repeat((copies, 1, 1)).unwrap()].map(|x| settings.fit(x).unwrap());
        for from in [0, few, (copies / 2) * few, (copies - 1) * few] {
            let part = |t: &Tensor| t.narrow(0, from, few).unwrap().contiguous().unwrap();
            assert_same(&part(&all.labels), &alone.labels, "labels");
            assert_same(&part(&all.centroids), &alone.centroids, "centroids");
            assert_same(&part(&all.counts), &alone.counts, "counts");
            assert_same(&part(&all.inertia), &alone.inertia, "inertia");
        }
        assert_eq!(u32s(&all.counts).into_iter().map(|c| c as usize).sum::<usize>(), few * copies * n);
    }
}
