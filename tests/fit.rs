//! Whole fits: against the specification, and what every fit promises.

mod common;

use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{EmptyClusters, Error, Fit, Init, KMeans, Metric};
use common::{naive, *};
use rand::Rng;

/// Blobs: what a fit is for, with few near-ties on the way.
fn blobs(shape: &[usize], centres: usize, dtype: DType, rng: &mut rand_chacha::ChaCha8Rng) -> Tensor {
    let d = shape[shape.len() - 1];
    let rows = shape.iter().product::<usize>() / d;
    let centres = f64s(&uniform(&[centres, d], 1.0, 8.0, DType::F64, rng));
    let mut values = Vec::with_capacity(rows * d);
    for _ in 0..rows {
        let at = rng.random_range(0..centres.len() / d) * d;
        values.extend(centres[at..at + d].iter().map(|c| c + rng.random_range(-1.5..1.5)));
    }
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
}

fn same(a: &Fit, b: &Fit, what: &str) {
    assert_eq!(u32s(&a.labels), u32s(&b.labels), "{what}");
    assert_eq!(bits(&a.centroids), bits(&b.centroids), "{what}");
    assert_eq!(bits(&a.inertia), bits(&b.inertia), "{what}");
    assert_eq!((u32s(&a.counts), u32s(&a.n_iter)), (u32s(&b.counts), u32s(&b.n_iter)), "{what}");
}

/// Runs on every device, demands the same bits everywhere and labels that belong to the centroids, and returns the CPU's.
#[track_caller]
fn fit(settings: &KMeans, x: &Tensor) -> Fit {
    fit_on(|_| settings.clone(), x)
}

/// The same from given centroids, which have to be where the rows are.
#[track_caller]
fn fit_from(start: &Tensor, settings: &KMeans, x: &Tensor) -> Fit {
    fit_on(|device| settings.clone().init(Init::Given(start.to_device(device).unwrap())), x)
}

#[track_caller]
fn fit_on(settings: impl Fn(&Device) -> KMeans, x: &Tensor) -> Fit {
    let mut first: Option<Fit> = None;
    for device in devices() {
        let x = x.to_device(&device).unwrap();
        let fit = settings(&device).fit(&x).unwrap();
        assert_eq!(u32s(&fit.labels), u32s(&fit.predict(&x).unwrap()), "labels of other centroids on {device:?}");
        let n = x.dims()[x.rank() - 2] as u32;
        let k = fit.counts.dims()[fit.counts.rank() - 1];
        u32s(&fit.counts).chunks(k).for_each(|c| assert_eq!(c.iter().sum::<u32>(), n));
        if let Some(first) = &first {
            same(first, &fit, "backends differ");
        }
        first.get_or_insert(fit);
    }
    first.unwrap()
}

#[test]
fn follows_the_specification() {
    let mut rng = rng(31);
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| [DType::F32, DType::F64].map(|t| (m, t))) {
        for (n, k, d) in [(300, 5, 2), (500, 12, 17), (200, 3, 64)] {
            let x = blobs(&[n, d], k, dtype, &mut rng);
            let start = x.narrow(0, 10, k).unwrap();
            let got = fit_from(&start, &KMeans::new(k).metric(metric).tol(0.0).max_iters(60), &x);
            // Lloyd by the specification, every centroid stored in the dtype as the crate's are.
            let rows = problems(&x).remove(0);
            let mut centroids = start;
            let mut labels = spec_labels(&x, &centroids, metric);
            let mut iterations = 0;
            for i in 1..=60 {
                let mut next = problems(&centroids).remove(0);
                for (j, c) in next.iter_mut().enumerate() {
                    let members: Vec<_> =
                        (0..n).filter(|&i| labels[i] == j as u32).map(|i| (rows[i].clone(), 1.0)).collect();
                    if let Some(centre) = naive::centre(&members, metric) {
                        *c = centre;
                    }
                }
                centroids = Tensor::new(next, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                let relabelled = spec_labels(&x, &centroids, metric);
                iterations = i;
                if std::mem::replace(&mut labels, relabelled) == labels {
                    break;
                }
            }
            assert_eq!(u32s(&got.labels), labels, "{metric:?} {dtype:?} {n} {k} {d}");
            assert_eq!(u32s(&got.n_iter), [iterations]);
            for (g, w) in f64s(&got.centroids).into_iter().zip(f64s(&centroids)) {
                assert!((g - w).abs() <= 4.0 * unit(dtype) * w.abs() + 1e-14, "{metric:?}: {g} {w}");
            }
            let c = problems(&got.centroids).remove(0);
            let cost: f64 = (0..n).map(|i| naive::distance(&rows[i], &c[labels[i] as usize], metric)).sum();
            approx::assert_relative_eq!(f64s(&got.inertia)[0], cost, max_relative = 1e-12, epsilon = 1e-12);
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
        let mut last = f64::INFINITY;
        for max_iters in 0..25 {
            let settings = KMeans::new(9).metric(metric).max_iters(max_iters).tol(0.0).sample_weights(&weights);
            let cost = settings.fit(&x).unwrap().inertia.to_scalar::<f64>().unwrap();
            assert!(cost <= last * (1.0 + 1e-14), "{metric:?}: {cost} after {last}");
            last = cost;
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
    for metric in METRICS {
        let x = blobs(&[120, 5], 4, DType::F32, &mut rng);
        let times: Vec<u32> = (0..120).map(|_| rng.random_range(0..4)).collect();
        let repeated: Vec<u32> = (0..120).flat_map(|i| vec![i as u32; times[i] as usize]).collect();
        let start = x.narrow(0, 0, 4).unwrap();
        let weights = Tensor::from_vec(times.iter().map(|&t| t as f32).collect(), 120, &Device::Cpu).unwrap();
        let weighted = KMeans::new(4).metric(metric).init(Init::Given(start.clone())).tol(0.0).sample_weights(&weights);
        let repeats = KMeans::new(4).metric(metric).tol(0.0);
        let index = Tensor::new(&repeated[..], &Device::Cpu).unwrap();
        let (a, b) = (weighted.fit(&x).unwrap(), fit_from(&start, &repeats, &x.index_select(&index, 0).unwrap()));
        let close = f64s(&a.centroids)
            .into_iter()
            .zip(f64s(&b.centroids))
            .all(|(a, b)| (a - b).abs() <= 2e-7 * b.abs() + 1e-12);
        assert!(close, "{metric:?}");
        approx::assert_relative_eq!(f64s(&a.inertia)[0], f64s(&b.inertia)[0], max_relative = 1e-6);
    }
}

#[test]
fn weights_work_on_every_device_and_init() {
    let mut rng = rng(36);
    let x = blobs(&[2, 300, 4], 5, DType::F32, &mut rng);
    let weights = uniform(&[300], 1.0, 1.0, DType::F32, &mut rng);
    for metric in METRICS {
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel] {
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
fn initialisations() {
    let mut rng = rng(37);
    for dtype in [DType::F16, DType::F32] {
        let x = blobs(&[2, 900, 3], 30, dtype, &mut rng);
        let mut cost = vec![];
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel] {
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

#[test]
fn saved_fits_come_back_whole() {
    let mut rng = rng(40);
    let folder = std::env::temp_dir().join(format!("flash-kmeans-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
        let x = blobs(&[2, 60, 3], 3, dtype, &mut rng);
        let model = fit(&KMeans::new(3).metric(metric), &x);
        let path = folder.join("fit.safetensors");
        model.save(&path).unwrap();
        let back = KMeans::load(&path, &Device::Cpu).unwrap();
        same(&model, &back, "saved");
        assert_eq!((back.metric, back.centroids.dtype()), (metric, dtype));
        assert_eq!(u32s(&back.predict(&x).unwrap()), u32s(&model.labels));
    }
    let path = folder.join("fit.safetensors");
    let whole = std::fs::read(&path).unwrap();
    for len in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..len]).unwrap();
        assert!(
            matches!(KMeans::load(&path, &Device::Cpu), Err(Error::Format { .. } | Error::Candle(_))),
            "{len} bytes"
        );
    }
    candle_core::safetensors::save(
        &std::collections::HashMap::from([("centroids", Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap())]),
        &path,
    )
    .unwrap();
    assert!(matches!(KMeans::load(&path, &Device::Cpu), Err(Error::Format { .. })));
    assert!(matches!(KMeans::load(folder.join("none"), &Device::Cpu), Err(Error::Io { .. })));
    let nowhere = folder.join("no/such/folder/fit");
    let model = fit(&KMeans::new(1), &Tensor::ones((2, 2), DType::F32, &Device::Cpu).unwrap());
    assert!(matches!(model.save(nowhere), Err(Error::Io { .. })));
    std::fs::remove_dir_all(folder).unwrap();
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
