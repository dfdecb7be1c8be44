//! Prepared fits: the same bits as fits, run after run, on their own, on many threads and replayed from a CUDA graph.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing, Error, Fit, Init, KMeans, Metric};
use rand::Rng;

fn all_bits(fit: &Fit) -> Vec<u64> {
    let counts = [&fit.labels, &fit.counts, &fit.n_iter, &fit.converged].map(u32s).concat();
    [bits(&fit.centroids), bits(&fit.inertia), counts.into_iter().map(u64::from).collect()].concat()
}

/// Settings with all that a run may have to remember or to forget.
fn settings(rng: &mut rand_chacha::ChaCha8Rng, device: &Device, n: usize) -> Vec<KMeans> {
    let weights = uniform(&[n], 1.0, 1.0, DType::F64, rng).to_device(device).unwrap();
    let mut all = vec![];
    for metric in METRICS {
        let plain = KMeans::new(7).init(Init::Random).metric(metric).max_iters(9);
        all.push(plain.clone().tol(0.0));
        all.push(plain.clone().init(Init::KMeansPlusPlus).tol(1e-2));
        all.push(plain.clone().sample_weights(&weights).init(Init::KMeansPlusPlus));
        all.push(plain.init(Init::KMeansParallel).sample_weights(&weights));
    }
    all
}

#[test]
fn runs_are_fits() {
    let mut rng = rng(81);
    for device in devices() {
        for dtype in DTYPES {
            let inputs: Vec<_> =
                (0..3).map(|_| blobs(&[2, 3, 400, 10], 7, dtype, &mut rng).to_device(&device).unwrap()).collect();
            for settings in settings(&mut rng, &device, 400) {
                let mut prepared = settings.prepare((2, 3, 400, 10), dtype, &device).unwrap();
                let places = (prepared.labels().id(), prepared.centroids().id());
                for x in &inputs {
                    prepared.run(x).unwrap();
                    let (run, fit) = (prepared.fit().unwrap(), settings.fit(x).unwrap());
                    assert_eq!(run.labels.dims(), [2, 3, 400]);
                    assert!(all_bits(&run) == all_bits(&fit), "{dtype:?} on {:?}", device.location());
                    assert_eq!(places, (prepared.labels().id(), prepared.centroids().id()));
                    assert_eq!(u32s(prepared.labels()), u32s(&fit.labels));
                }
                // A run does not overwrite what has been handed out.
                let last = prepared.fit().unwrap();
                let kept = all_bits(&last);
                prepared.run(&inputs[0]).unwrap();
                assert_eq!(all_bits(&last), kept);
                assert_eq!(all_bits(&prepared.into_fit().unwrap()), all_bits(&settings.fit(&inputs[0]).unwrap()));
            }
        }
    }
}

/// Problems of a batch stop one by one, each where it would stop alone.
#[test]
fn problems_stop_on_their_own() {
    let mut rng = rng(82);
    for device in devices() {
        for (dtype, n, k, d) in [
            (DType::F32, 500, 9, 6),
            (DType::F16, 300, 20, 64),
            (DType::BF16, 1000, 3, 33),
            (DType::F64, 200, 5, 2),
            (DType::F32, 600, 40, 130),
        ] {
            for metric in METRICS {
                let x = uniform(&[23, n, d], 0.2, 1.0, dtype, &mut rng).to_device(&device).unwrap();
                let start = x.narrow(1, 0, k).unwrap().contiguous().unwrap();
                let settings = KMeans::new(k).metric(metric).tol(1e-3).max_iters(60);
                let all = settings.clone().init(Init::Given(start.clone())).fit(&x).unwrap();
                let iterations = u32s(&all.n_iter);
                let mut different = iterations.clone();
                different.sort_unstable();
                different.dedup();
                assert!(different.len() > 1, "{iterations:?} {metric:?} {dtype:?} test nothing");
                for (b, &iterations) in iterations.iter().enumerate() {
                    let alone =
                        settings.clone().init(Init::Given(start.get(b).unwrap())).fit(&x.get(b).unwrap()).unwrap();
                    let what = format!("problem {b}: {metric:?} {dtype:?} {n} {k} {d} on {:?}", device.location());
                    assert_eq!(u32s(&alone.n_iter)[0], iterations, "{what}");
                    assert!(bits(&alone.centroids) == bits(&all.centroids.get(b).unwrap()), "{what}");
                    assert!(u32s(&alone.labels) == u32s(&all.labels.get(b).unwrap()), "{what}");
                }
                assert_eq!(u32s(&all.predict(&x).unwrap()), u32s(&all.labels), "{metric:?} {dtype:?}");
            }
        }
    }
}

/// A cluster that no row is nearest to stays where it is, in its problem and in no other.
#[test]
fn empty_clusters_stay_in_their_problems() {
    let mut rng = rng(89);
    for device in devices() {
        for (dtype, n, k, d) in [(DType::F16, 400, 6, 64), (DType::F32, 90, 4, 3), (DType::BF16, 3000, 300, 40)] {
            let x = uniform(&[9, n, d], 0.0, 1.0, dtype, &mut rng).to_device(&device).unwrap();
            let start = x.narrow(1, 0, k).unwrap().contiguous().unwrap();
            // In every third problem the second centroid is out of reach.
            let far = |b: usize| if b % 3 == 1 { 50.0 } else { 0.0 };
            let away = tensor(&[9, k, d], dtype, |i| if i / d % k == 1 { far(i / d / k) } else { 0.0 });
            let start = (start + away.to_device(&device).unwrap()).unwrap();
            let settings = KMeans::new(k).init(Init::Given(start.clone())).max_iters(8);
            let fit = settings.fit(&x).unwrap();
            for b in 0..9 {
                let [then, now] = [&start, &fit.centroids].map(|c| bits(&c.get(b).unwrap().get(1).unwrap()));
                let count = u32s(&fit.counts.get(b).unwrap())[1];
                assert!((count == 0) == (b % 3 == 1), "problem {b} {dtype:?}: {count}");
                assert!(count > 0 || then == now, "problem {b} {dtype:?}");
            }
        }
    }
}

/// A fit whose problems stay on chip is one launch. It is the same fit as in many launches, on every device: of values far
/// apart in size, rows that are no numbers, empty clusters and one cluster with most of the rows.
fn one_launch_is_many(dtypes: &[DType], columns: &[usize], b: usize, other: &'static str) {
    // Without a GPU there is only one way, and nothing to compare it with.
    if !devices().iter().any(Device::is_cuda) {
        return;
    }
    let mut rng = rng(88);
    let one_launch = |settings: &KMeans, x: &Tensor| settings.plan(x).unwrap().update.starts_with("fit_");
    for &dtype in dtypes {
        for &d in columns {
            let wide = dtype == DType::F32 && matches!(d, 2 | 4 | 8);
            for (n, k, kind) in
                [(300, 5, "uniform"), (512, 16, "hot"), (333, 40, "wide"), (64, 64, "nan"), (900, 3, "hot")]
                    .into_iter()
                    .chain(wide.then_some([(900, 200, "uniform"), (600, 257, "hot")]).into_iter().flatten())
            {
                let exponents = if dtype == DType::F16 { 12 } else { 60 };
                let x = tensor(&[b, n, d], dtype, |i| match kind {
                    "hot" => rng.random_range(0.0f64..1.0).powi(if i / d % 2 == 0 { 1 } else { 40 }),
                    "wide" => rng.random_range(-1.0..1.0) * 2f64.powi(rng.random_range(-exponents..exponents / 4)),
                    "nan" if rng.random_range(0..50) == 0 => f64::NAN,
                    _ => rng.random_range(-1.0..1.0),
                });
                let weights = tensor(&[b, n], DType::F64, |_| rng.random_range(0.0f64..1.0).powi(3));
                let start = uniform(&[b, k, d], 0.0, 1.0, dtype, &mut rng);
                for metric in [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot] {
                    for (tol, weighted) in [(0.0, false), (1e-3, true)] {
                        let mut all = vec![];
                        for device in devices() {
                            let x = x.to_device(&device).unwrap();
                            let start = start.to_device(&device).unwrap();
                            let mut settings = KMeans::new(k).metric(metric).max_iters(6).tol(tol);
                            settings = settings.init(Init::Given(start)).check_finite(false);
                            if weighted {
                                settings = settings.sample_weights(&weights.to_device(&device).unwrap());
                            }
                            assert_eq!(one_launch(&settings, &x), device.is_cuda(), "{dtype:?} {n} {k} {d}");
                            all.push(all_bits(&settings.fit(&x).unwrap()));
                            if device.is_cuda() {
                                testing::force(Some(other));
                                assert!(!one_launch(&settings, &x));
                                all.push(all_bits(&settings.fit(&x).unwrap()));
                                testing::force(None);
                            }
                        }
                        // The inertia of a NaN is a NaN, of either sign.
                        let same = |a: &Vec<u64>| kind == "nan" || *a == all[0];
                        assert!(all.iter().all(same), "{dtype:?} {n} {k} {d} {kind} {metric:?} weighted {weighted}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_block_to_a_problem_is_a_fit() {
    one_launch_is_many(&DTYPES, &[1, 2, 3, 4, 7, 8], 64, "assign_narrow");
}

/// Rows of one column, of which a block sorts up to 8,192: equal ones, and more centroids than different rows; values that take more than
/// 64 bits to add, and starts that are no numbers, are left to another kernel.
#[test]
fn rows_on_a_line_are_a_fit() {
    let mut rng = rng(89);
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        for (b, n, k) in [(3, 1, 1), (70, 111, 7), (2, 513, 30), (1, 1024, 16), (1, 2049, 60), (1, 4100, 9)] {
            for kind in ["uniform", "equal", "wide", "zero", "start"] {
                let x = tensor(&[b, n, 1], dtype, |i| match kind {
                    "equal" => f64::from(rng.random_range(-9i32..9)),
                    "wide" => {
                        rng.random_range(-1.0..1.0)
                            * 2f64.powi(rng.random_range(-12..3) * if dtype == DType::F32 { 9 } else { 1 })
                    }
                    "zero" if i / n == 0 => {
                        if i % 2 == 0 {
                            0.0
                        } else {
                            -0.0
                        }
                    }
                    _ => rng.random_range(-1.0..1.0),
                });
                let start = tensor(&[b, k, 1], dtype, |i| match kind {
                    "start" if i % 11 == 3 => f64::INFINITY,
                    _ => rng.random_range(-1.0..1.0),
                });
                for (tol, max_iters) in [(0.0, 9), (1e-3, 4)] {
                    let mut fits = vec![];
                    for device in devices() {
                        let settings = KMeans::new(k).max_iters(max_iters).tol(tol).check_finite(kind != "start");
                        let settings = settings.init(Init::Given(start.to_device(&device).unwrap()));
                        let x = x.to_device(&device).unwrap();
                        let line = if device.is_cuda() { "fit_line" } else { "cpu_line" };
                        if kind != "start" || k > 3 {
                            fits.push((
                                settings.plan(&x).unwrap().update == line,
                                all_bits(&settings.fit(&x).unwrap()),
                            ));
                        }
                        testing::force(Some("cpu_gemm"));
                        fits.push((true, all_bits(&settings.fit(&x).unwrap())));
                        testing::force(None);
                    }
                    let same = fits.iter().all(|(planned, bits)| *planned && *bits == fits[0].1);
                    assert!(same, "{dtype:?} {b} {n} {k} {kind}, tol {tol}");
                }
            }
        }
    }
}

/// Blocks that share a problem; the last case has more problems than teams, so that each does several.
#[test]
fn blocks_that_share_problems_are_a_fit() {
    let halves = [DType::F16, DType::BF16];
    one_launch_is_many(&halves, &[16, 40, 64, 136, 256], 3, "assign_sm80");
    one_launch_is_many(&halves, &[64], 150, "assign_small");
}

#[test]
fn refusals() {
    for device in devices() {
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &device).unwrap();
        let prepare = |settings: KMeans| settings.prepare((2, 30, 4), DType::F32, &device);
        let mut prepared = prepare(KMeans::new(3).init(Init::Random)).unwrap();
        assert!(matches!(prepared.fit(), Err(Error::Conflict { argument: "fit", .. })));
        let wrong = prepared.run(&zeros(&[2, 31, 4], DType::F32)).unwrap_err().to_string();
        assert!(wrong.contains("[2, 31, 4]") && wrong.contains("[2, 30, 4]"), "{wrong}");
        let wrong = prepared.run(&zeros(&[2, 30, 4], DType::F16)).unwrap_err().to_string();
        assert!(wrong.contains("F16") && wrong.contains("F32"), "{wrong}");
        assert!(matches!(prepare(KMeans::new(31)), Err(Error::Range { argument: "k", got: 31, max: 30, .. })));
        assert!(matches!(prepare(KMeans::new(3).n_init(2)), Err(Error::Conflict { argument: "n_init", .. })));
        let given = KMeans::new(3).init(Init::Given(zeros(&[3, 5], DType::F32)));
        assert!(matches!(prepare(given), Err(Error::Size { argument: "centroids", got: 5, expected: 4, .. })));
        // A refused input leaves a prepared fit as good as new.
        let mut rng = rng(83);
        let good = blobs(&[2, 30, 4], 3, DType::F32, &mut rng).to_device(&device).unwrap();
        let bad = good.affine(f64::INFINITY, 0.0).unwrap();
        assert!(matches!(prepared.run(&bad), Err(Error::NonFinite { argument: "x", .. })));
        prepared.run(&good).unwrap();
        assert_eq!(
            all_bits(&prepared.fit().unwrap()),
            all_bits(&KMeans::new(3).init(Init::Random).fit(&good).unwrap())
        );
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::*;
    use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
    use candle_flash_kmeans::{testing, Metric};
    use std::sync::{Arc, Barrier};

    fn asked_for() -> bool {
        devices().iter().any(Device::is_cuda)
    }

    /// A run captured once and replayed a thousand times, each time on new rows in the same tensor.
    #[test]
    fn replays_are_fits() {
        if !asked_for() {
            return;
        }
        let device = Device::new_cuda_with_stream(0).unwrap();
        let gpu = device.as_cuda_device().unwrap();
        // SAFETY: everything here runs on one stream.
        unsafe { gpu.disable_event_tracking() };
        let stream = gpu.cuda_stream();
        let mut rng = rng(84);
        let shapes = [
            (DType::F16, [8, 512, 64], 16, Metric::SquaredEuclidean, Init::Random),
            (DType::F32, [3, 700, 20], 9, Metric::Cosine, Init::KMeansPlusPlus),
            (DType::BF16, [1, 5000, 96], 150, Metric::Dot, Init::Random),
            (DType::F32, [40, 300, 4], 16, Metric::Manhattan, Init::KMeansPlusPlus),
            (DType::F64, [2, 400, 7], 5, Metric::SquaredEuclidean, Init::Random),
            (DType::F16, [6, 700, 64], 16, Metric::SquaredEuclidean, Init::Even),
            (DType::F32, [3, 900, 20], 9, Metric::Cosine, Init::Even),
        ];
        for (dtype, shape, k, metric, init) in shapes {
            let inputs: Vec<_> =
                (0..10).map(|_| blobs(&shape, k, dtype, &mut rng).to_device(&device).unwrap()).collect();
            let ragged = matches!(init, Init::Even);
            let mut settings = KMeans::new(k).metric(metric).init(init).max_iters(6).tol(1e-3).check_finite(false);
            if ragged {
                let lengths: Vec<u32> = (0..shape[0]).map(|b| (shape[1] - 50 * b) as u32).collect();
                settings = settings.lengths(&Tensor::new(lengths, &device).unwrap());
            }
            let want: Vec<_> = inputs.iter().map(|x| settings.fit(x).unwrap()).collect();
            let x = inputs[0].copy().unwrap();
            let mut prepared = settings.prepare(&shape[..], dtype, &device).unwrap();
            prepared.run(&x).unwrap();
            device.synchronize().unwrap();
            stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
            prepared.run(&x).unwrap();
            let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
            let graph = stream.end_capture(free).unwrap().expect("a graph of what was captured");
            for replay in 0..1000 {
                let at = (replay * 7) % inputs.len();
                x.slice_set(&inputs[at], 0, 0).unwrap();
                graph.launch().unwrap();
                if replay % 100 < 20 {
                    let got = prepared.fit().unwrap();
                    assert!(all_bits(&got) == all_bits(&want[at]), "replay {replay}: {dtype:?} {shape:?} {metric:?}");
                }
            }
            device.synchronize().unwrap();
            drop((graph, prepared, x));
            // The context is as good as before.
            assert_eq!(all_bits(&settings.fit(&inputs[0]).unwrap()), all_bits(&want[0]));
        }
    }

    /// Whichever allocation fails, the error says so and the next fit is as if nothing had been.
    #[test]
    fn every_allocation_may_fail() {
        if !asked_for() {
            return;
        }
        let device = Device::new_cuda(0).unwrap();
        let mut rng = rng(86);
        let mut failures = 0;
        for (dtype, shape, k) in
            [(DType::F16, [3, 600, 40], 9), (DType::F32, [2, 500, 130], 200), (DType::F64, [2, 300, 5], 7)]
        {
            let x = blobs(&shape, k, dtype, &mut rng).to_device(&device).unwrap();
            for settings in super::settings(&mut rng, &device, shape[1]) {
                let settings = settings.max_iters(3);
                let want = all_bits(&settings.fit(&x).unwrap());
                let mut prepared = settings.prepare(&shape[..], dtype, &device).unwrap();
                for spared in 0.. {
                    testing::fail_allocation(Some(spared));
                    let fit = settings.fit(&x);
                    if !testing::fail_allocation(None) {
                        break;
                    }
                    assert!(matches!(fit, Err(Error::OutOfMemory { .. })), "{fit:?}");
                    failures += 1;
                    testing::fail_allocation(Some(spared));
                    let run = prepared.run(&x);
                    assert!(
                        !testing::fail_allocation(None) || matches!(run, Err(Error::OutOfMemory { .. })),
                        "{run:?}"
                    );
                    prepared.run(&x).unwrap();
                    assert!(all_bits(&prepared.fit().unwrap()) == want, "after failure {spared}");
                }
                assert!(all_bits(&settings.fit(&x).unwrap()) == want);
            }
        }
        assert!(failures > 200, "{failures} failures");
    }

    /// Threads at once, each with a device of its own, of its own stream, or one that all share.
    #[test]
    fn threads_do_not_disturb_each_other() {
        if !asked_for() {
            return;
        }
        let shared = Device::new_cuda(0).unwrap();
        let (threads, rounds) = (16, 4);
        let barrier = Arc::new(Barrier::new(threads));
        std::thread::scope(|scope| {
            for t in 0..threads {
                let (barrier, shared) = (barrier.clone(), shared.clone());
                scope.spawn(move || {
                    let mut rng = rng(900 + t as u64);
                    let device = match t % 3 {
                        0 => Device::new_cuda(0).unwrap(),
                        1 => Device::new_cuda_with_stream(0).unwrap(),
                        _ => shared,
                    };
                    for round in 0..rounds {
                        let (dtype, n) = (DTYPES[(t + round) % 4], 500 + 100 * t);
                        let x = blobs(&[2, n, 24], 6, dtype, &mut rng);
                        let settings = KMeans::new(6).max_iters(5).metric(METRICS[t % 4]);
                        let want = all_bits(&settings.fit(&x).unwrap());
                        barrier.wait();
                        for _ in 0..5 {
                            // The input is dropped right after the call.
                            let fit = settings.fit(&x.to_device(&device).unwrap()).unwrap();
                            assert!(all_bits(&fit) == want, "thread {t}, round {round}");
                        }
                    }
                });
            }
        });
    }

    /// A tensor made on one thread, clustered on another, with streams of their own that Candle orders by events.
    #[test]
    fn tensors_pass_between_streams() {
        if !asked_for() {
            return;
        }
        let device = Device::new_cuda_with_stream(0).unwrap();
        let other = Device::new_cuda_with_stream(0).unwrap();
        let mut rng = rng(85);
        for round in 0..20 {
            let host = blobs(&[20_000, 64], 30, DType::F16, &mut rng);
            let settings = KMeans::new(30).max_iters(3).seed(round);
            let want = all_bits(&settings.fit(&host).unwrap());
            let x = host.to_device(&device).unwrap();
            let fit = std::thread::spawn({
                let settings = settings.clone();
                move || settings.fit(&x).unwrap()
            });
            // Meanwhile the other stream is busy too.
            let busy = settings.fit(&host.to_device(&other).unwrap()).unwrap();
            assert!(all_bits(&fit.join().unwrap()) == want && all_bits(&busy) == want, "round {round}");
        }
    }
}
