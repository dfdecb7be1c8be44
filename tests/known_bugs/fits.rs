//! Settings, refusals and fits at their extremes.

use super::common::*;
use candle_core::{Context, DType, Device, Tensor};
use candle_flash_kmeans::{
    assign, assign_with_distances, cluster_means, cluster_sizes, cluster_sums, inverse_order, quantize, residuals,
    sort_by_cluster, EmptyClusters, Error, Fit, Init, KMeans, Metric, PreparedFit,
};
use rand::Rng;
use std::{
    fmt::Debug,
    ops::ControlFlow,
    sync::{
        atomic::{AtomicUsize, Ordering::SeqCst},
        mpsc, Arc,
    },
    time::Duration,
};

const DRAWN: [Init; 4] = [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::Even];

/// Runs `f`, which is over in seconds or never.
fn in_time(f: impl FnOnce() + Send + 'static) {
    let (done, over) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        f();
        let _ = done.send(());
    });
    match over.recv_timeout(Duration::from_secs(120)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("it does not end"),
        _ => thread.join().unwrap(),
    }
}

// ---- Errors.

fn non_finite() -> Error {
    KMeans::new(1).fit(&Tensor::new(&[[1f32], [f32::NAN]], &Device::Cpu).unwrap()).unwrap_err()
}

fn is_non_finite(error: &candle_core::Error) -> bool {
    matches!(Error::from_candle(error), Some(Error::NonFinite { argument: "x", batch: 0, row: 1 }))
}

/// An error that a forward pass hands on can be told from another one, whatever Candle puts around it.
#[test]
fn errors_are_found_in_candles() {
    let through = || candle_core::Error::from(non_finite());
    assert!(is_non_finite(&through()), "{:?}", through());
    assert!(through().to_string().starts_with("x: row 1 of batch element 0"));
    let source = |error: &dyn std::error::Error| {
        matches!(error.source()?.downcast_ref()?, Error::NonFinite { .. }).then_some(())
    };
    assert!(source(&through()).is_some(), "it is the source");
    let around: [fn(candle_core::Error) -> candle_core::Error; 6] = [
        |e| e.bt(),
        |e| e.context("in block 7"),
        |e| e.with_path("model.safetensors"),
        |e| Err::<(), _>(e).context("as a result").unwrap_err(),
        |e| Err::<(), _>(e).with_context(|| "as a result").unwrap_err().context("twice").bt(),
        |e| candle_core::Error::from(Error::from(e.context("and back"))),
    ];
    for (i, around) in around.into_iter().enumerate() {
        assert!(is_non_finite(&around(through())), "{i}");
    }
    // As the error itself is given context, without a stop at Candle's.
    assert!(is_non_finite(&Err::<(), _>(non_finite()).context("ours").unwrap_err()));
    // And with anyhow around all that.
    let error = anyhow::Error::from(through().context("inside")).context("outside");
    assert!(is_non_finite(error.downcast_ref().unwrap()));
    // Nothing of ours.
    assert!(Error::from_candle(&candle_core::Error::Msg("x: row 1".into())).is_none());
    assert!(Error::from_candle(&candle_core::Error::Io(std::io::Error::other("x"))).is_none());
    assert!(Error::from_candle(&Error::Candle(candle_core::Error::UnwrapNone).into()).is_none());
    // There and back it is what it was, and what is Candle's stays Candle's.
    assert!(matches!(Error::from(through()), Error::NonFinite { row: 1, .. }));
    assert!(matches!(Error::from(candle_core::Error::UnwrapNone), Error::Candle(_)));
    assert!(matches!(Error::from(candle_core::Error::Io(std::io::Error::other("x"))), Error::Candle(_)));
    // Told from what else there is.
    let memory = Error::OutOfMemory { op: "labels", bytes: 7, source: candle_core::Error::UnwrapNone };
    assert!(matches!(Error::from_candle(&memory.into()), Some(Error::OutOfMemory { bytes: 7, .. })));
}

/// The same where every error of Candle's captures a backtrace, which is decided once a process.
#[test]
fn errors_are_found_under_backtraces() {
    let name = "fits::errors_are_found_in_candles";
    let test = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--test-threads", "1"])
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&test.stdout);
    assert!(test.status.success() && said.contains("1 passed"), "{said}");
}

/// Messages say which argument is wrong, of which problem, and no range ends at the end of usize.
#[test]
fn messages_say_what_is_wrong() {
    for device in devices() {
        let f32s = |shape: &[usize]| ones(shape, DType::F32, &device);
        let says = |result: Result<Fit, Error>, says: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(says), "{error:?} lacks {says:?}");
            assert!(!error.contains("18446744073709551615"), "{error}");
        };
        let x = f32s(&[3, 4, 2]);
        let lengths = |v: [u32; 3]| KMeans::new(2).lengths(&Tensor::new(&v, &device).unwrap()).fit(&x);
        says(lengths([2, 4, 1]), "batch element 2: lengths: 1 is outside 2..=4");
        says(lengths([0, 4, 1]), "batch element 0: lengths: 0 is outside 2..=4");
        says(lengths([2, u32::MAX, 4]), "batch element 1: lengths: 4294967295 is outside 2..=4");
        let weights = |at: usize, v: f64| {
            let w = tensor(&[3, 4], DType::F32, |i| if i / 4 == at { v } else { 1.0 }).to_device(&device).unwrap();
            KMeans::new(2).sample_weights(&w).fit(&x)
        };
        says(weights(1, 0.0), "sample_weights total: 0 is not positive in batch element 1");
        says(weights(2, -3.0), "sample_weights: -3 is not at least 0 in batch element 2");
        says(weights(1, f64::INFINITY), "sample_weights: row 0 of batch element 1");
        says(KMeans::new(2).n_init(0).fit(&x), "n_init: 0 is outside 1..");
        says(KMeans::new(1).fit(&f32s(&[0, 3, 3])), "x batch: 0 is outside 1..");
        says(KMeans::new(1).fit(&f32s(&[3, 0])), "x columns: 0 is outside 1..");
        // A fit's centroids are what they are: it is the rows that do not fit.
        let fit = KMeans::new(2).fit(&x).unwrap();
        for (x, says) in [
            (f32s(&[3, 4, 3]), "x: number of columns for these centroids is 3, expected 2"),
            (ones(&[3, 4, 2], DType::F16, &device), "x: dtype F16, expected F32, as the centroids"),
            (f32s(&[5, 4, 2]), "x: shape [5, 4, 2], expected [3, 4, 2]"),
            (f32s(&[4]), "x: expected at least 2 dimensions"),
        ] {
            let predict = fit.predict(&x).unwrap_err().to_string();
            assert!(predict.contains(says), "{predict:?} lacks {says:?}");
            assert_eq!(fit.transform(&x).unwrap_err().to_string(), predict);
        }
    }
}

// ---- No rows, no batch, no columns, no centroids.

/// Views of nothing, which may begin beyond the end of what they are views of.
fn nothing(shape: &[usize], dtype: DType, device: &Device) -> Vec<Tensor> {
    let mut all = vec![ones(shape, dtype, device)];
    let last = shape.len() - 1;
    let mut wider = shape.to_vec();
    wider[last] += 3;
    all.push(ones(&wider, dtype, device).narrow(last, 2, shape[last]).unwrap());
    let mut longer = shape.to_vec();
    longer[0] += 5;
    all.push(ones(&longer, dtype, device).narrow(0, 5, shape[0]).unwrap());
    if device.is_cpu() {
        all.push(Tensor::zeros(shape, dtype, device).unwrap());
        all.push(Tensor::zeros(wider, dtype, device).unwrap().narrow(last, 2, shape[last]).unwrap());
    }
    all
}

#[test]
fn nothing_is_empty_or_refused_everywhere() {
    for device in devices() {
        let c = ones(&[3, 4], DType::F32, &device);
        let fit = KMeans::new(1).fit(&ones(&[3, 4], DType::F32, &device)).unwrap();
        for (shape, metric) in
            [[0, 4].to_vec(), vec![2, 0, 4], vec![0, 5, 4]].into_iter().flat_map(|s| METRICS.map(|m| (s.clone(), m)))
        {
            let per_row = &shape[..shape.len() - 1];
            let sums = [&shape[..shape.len() - 2], &[3, 4]].concat();
            for (x, labels) in nothing(&shape, DType::F32, &device).iter().zip(nothing(per_row, DType::U32, &device)) {
                assert_eq!(assign(x, &c, metric).unwrap().dims(), per_row);
                assert_eq!(assign_with_distances(x, &c, metric).unwrap().1.dims(), per_row);
                let (values, codes) = quantize(x, &c, metric).unwrap();
                assert_eq!((values.dims(), codes.dims()), (&shape[..], per_row));
                assert_eq!(residuals(x, &c, &labels).unwrap().dims(), shape);
                assert_eq!(f64s(&cluster_means(x, &labels, 3).unwrap()), vec![0.0; sums.iter().product()]);
                assert_eq!(cluster_sums(x, &labels, 3).unwrap().dims(), sums);
                assert_eq!(fit.predict(x).unwrap().dims(), per_row);
                assert_eq!(fit.transform(x).unwrap().dims(), [per_row, &[1]].concat());
                assert!(matches!(KMeans::new(1).metric(metric).fit(x), Err(Error::Range { .. })));
                let (order, offsets) = sort_by_cluster(&labels, 3).unwrap();
                assert_eq!((order.dims(), offsets.dims()), (per_row, &[&shape[..shape.len() - 2], &[4]].concat()[..]));
                assert!(u32s(&offsets).iter().chain(&u32s(&cluster_sizes(&labels, 3).unwrap())).all(|&v| v == 0));
                assert_eq!(inverse_order(&order).unwrap().dims(), per_row);
                assert!(matches!(sort_by_cluster(&labels, 0), Err(Error::Range { argument: "k", got: 0, .. })));
            }
        }
        for x in nothing(&[5, 0], DType::F32, &device) {
            let c = ones(&[3, 0], DType::F32, &device);
            assert!(matches!(assign(&x, &c, Metric::Dot), Err(Error::Range { argument: "x columns", .. })));
            assert!(matches!(KMeans::new(1).fit(&x), Err(Error::Range { argument: "x columns", .. })));
            assert!(fit.predict(&x).is_err());
        }
        let x = ones(&[5, 4], DType::F32, &device);
        for c in nothing(&[0, 4], DType::F32, &device) {
            assert!(matches!(assign(&x, &c, Metric::Dot), Err(Error::Range { argument: "k", got: 0, .. })));
            assert!(matches!(quantize(&x, &c, Metric::Dot), Err(Error::Range { argument: "k", got: 0, .. })));
            assert!(KMeans::new(1).init(Init::Given(c)).fit(&x).is_err());
        }
    }
}

// ---- Nothing is shared with what outlives a call.

/// Rows that are the centroids of the fit that they are given to.
#[test]
fn rows_that_a_run_overwrites_are_copied() {
    in_time(|| {
        for (device, metric) in devices().into_iter().flat_map(|d| METRICS.map(|m| (d.clone(), m))) {
            for (dtype, d) in DTYPES.into_iter().flat_map(|t| [1, 3].map(|d| (t, d))) {
                let x = blobs(&[6, d], 3, dtype, &mut rng(1)).to_device(&device).unwrap();
                let settings = KMeans::new(6).metric(metric).init(Init::Even);
                let mut prepared = settings.prepare((6, d), dtype, &device).unwrap();
                prepared.run(&x).unwrap();
                for _ in 0..2 {
                    let rows = prepared.centroids().copy().unwrap();
                    let shared = prepared.centroids().clone();
                    prepared.run(&shared).unwrap();
                    assert_same_fit(&prepared.fit().unwrap(), &settings.fit(&rows).unwrap(), "its own centroids");
                }
                // Views of them too.
                let shared = prepared.centroids().reshape((2, 3 * d)).unwrap().reshape((6, d)).unwrap();
                let rows = shared.copy().unwrap();
                prepared.run(&shared).unwrap();
                assert_same_fit(&prepared.fit().unwrap(), &settings.fit(&rows).unwrap(), "a view");
                // And a start that is another fit's centroids.
                let next = KMeans::new(6).metric(metric).init(Init::Given(prepared.centroids().clone()));
                let start = prepared.centroids().copy().unwrap();
                let mut warm = next.prepare((6, d), dtype, &device).unwrap();
                prepared.run(&x.affine(2.0, 1.0).unwrap()).unwrap();
                warm.run(&x).unwrap();
                let want = KMeans::new(6).metric(metric).init(Init::Given(start)).fit(&x).unwrap();
                assert_same_fit(&warm.fit().unwrap(), &want, "another's centroids");
            }
        }
    });
}

/// A change to weights and rows after a call changes nothing of it.
#[test]
fn later_changes_change_nothing() {
    for device in devices() {
        for dtype in [DType::F64, DType::F32] {
            let x = blobs(&[2, 50, 3], 3, DType::F32, &mut rng(2)).to_device(&device).unwrap();
            let weights = uniform(&[2, 50], 1.0, 1.0, dtype, &mut rng(3)).to_device(&device).unwrap();
            let settings = KMeans::new(3).init(Init::Random).sample_weights(&weights);
            let want = settings.fit(&x).unwrap();
            let fit = settings.fit(&x).unwrap();
            let mut prepared = settings.prepare((2, 50, 3), DType::F32, &device).unwrap();
            weights.slice_set(&tensor(&[2, 50], dtype, |_| 1e300).to_device(&device).unwrap(), 0, 0).unwrap();
            prepared.run(&x).unwrap();
            assert_same_fit(&prepared.fit().unwrap(), &want, "weights");
            assert_same_fit(&fit, &want, "a fit");
            if device.is_cpu() {
                let kept = x.copy().unwrap();
                x.zero_set().unwrap();
                assert_same_fit(&prepared.fit().unwrap(), &want, "rows");
                prepared.run(&kept).unwrap();
                assert_same_fit(&prepared.into_fit().unwrap(), &want, "the next run");
            }
        }
    }
}

/// A run that was refused leaves no result of the one before it.
#[test]
fn a_run_that_failed_has_no_result() {
    let x = blobs(&[20, 3], 3, DType::F32, &mut rng(4));
    let mut prepared = KMeans::new(3).init(Init::Random).prepare((20, 3), DType::F32, &Device::Cpu).unwrap();
    prepared.run(&x).unwrap();
    prepared.run(&x.affine(f64::NAN, 0.0).unwrap()).unwrap_err();
    assert!(matches!(prepared.fit(), Err(Error::Conflict { argument: "fit", .. })));
    prepared.run(&x).unwrap();
    assert_same_fit(&prepared.fit().unwrap(), &KMeans::new(3).init(Init::Random).fit(&x).unwrap(), "afterwards");
}

// ---- Settings at their extremes.

#[test]
fn settings_at_their_extremes() {
    in_time(|| {
        for device in devices() {
            let x = blobs(&[2, 30, 2], 3, DType::F32, &mut rng(5)).to_device(&device).unwrap();
            let plain = KMeans::new(3).max_iters(50);
            let want = plain.fit(&x).unwrap();
            assert_eq!(u32s(&want.converged), [1, 1], "or the next line does not end");
            assert_same_fit(&plain.clone().max_iters(usize::MAX).fit(&x).unwrap(), &want, "max_iters");
            assert_same_fit(&plain.clone().tol(-0.0).fit(&x).unwrap(), &plain.clone().tol(0.0).fit(&x).unwrap(), "-0");
            for k in [usize::MAX, usize::MAX / 2, 1 << 32] {
                let too_large = |error| matches!(error, Error::TooLarge { argument: "k", .. });
                assert!(too_large(KMeans::new(k).fit(&x).unwrap_err()));
                assert!(too_large(KMeans::new(k).plan(&x).unwrap_err()));
                assert!(too_large(KMeans::new(k).prepare((2, 30, 2), DType::F32, &device).unwrap_err()));
                assert!(sort_by_cluster(&ones(&[3], DType::U32, &device), k).is_err());
            }
            for tol in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e-300, -1.0] {
                let refused = |error| matches!(error, Error::Value { argument: "tol", .. });
                assert!(refused(plain.clone().tol(tol).fit(&x).unwrap_err()), "{tol}");
                assert!(refused(plain.clone().tol(tol).plan(&x).unwrap_err()), "{tol}");
            }
            // The largest stops as soon as it can, the smallest where nothing moves.
            assert_eq!(u32s(&plain.clone().tol(f64::MAX).fit(&x).unwrap().n_iter), [1, 1]);
            let strict = plain.clone().tol(0.0).fit(&x).unwrap();
            assert_same_fit(&plain.clone().tol(f64::from_bits(1)).fit(&x).unwrap(), &strict, "a subnormal tol");
            for seed in [0, 1, u64::MAX] {
                let fit = plain.clone().seed(seed).n_init(3).fit(&x).unwrap();
                assert_same(&fit.labels, &fit.predict(&x).unwrap(), "seeds wrap");
            }
            assert!(matches!(plain.clone().n_init(0).plan(&x), Err(Error::Range { argument: "n_init", got: 0, .. })));
            let calls = Arc::new(AtomicUsize::new(0));
            let count = calls.clone();
            let third = move |i: candle_flash_kmeans::Iteration| {
                count.fetch_add(1, SeqCst);
                if i.run == 2 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            };
            let fit = plain.clone().n_init(usize::MAX).on_iteration(third).fit(&x).unwrap();
            assert_same(&fit.labels, &fit.predict(&x).unwrap(), "as many runs as there are");
            assert!(calls.load(SeqCst) >= 3);
        }
    });
}

/// Means depend on the ratios of weights alone, however large or small they are.
#[test]
fn weights_of_any_size() {
    for device in devices() {
        for (metric, dtype) in METRICS.into_iter().flat_map(|m| [DType::F16, DType::F32, DType::F64].map(|t| (m, t))) {
            let x = blobs(&[2, 60, 3], 3, dtype, &mut rng(6)).to_device(&device).unwrap();
            let weights: Vec<f64> = (0..120).map(|i| [1.0, 0.5, 2.0, 0.0, 1.5][i % 5]).collect();
            for init in [Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel, Init::Random] {
                let fit = |unit: f64| {
                    let w = tensor(&[2, 60], DType::F64, |i| weights[i] * unit).to_device(&device).unwrap();
                    let settings = KMeans::new(4).metric(metric).init(init.clone()).sample_weights(&w);
                    settings.fit(&x).unwrap()
                };
                let want = fit(1.0);
                // Powers of two, so that the weights have the same ratios.
                for power in [-1070, -1020, -300, 300, 1022] {
                    let unit = 2f64.powi(power / 2) * 2f64.powi(power - power / 2);
                    let got = fit(unit);
                    let what = format!("2^{power} {metric:?} {dtype:?} {init:?}");
                    assert_same(&got.centroids, &want.centroids, &what);
                    assert_same(&got.labels, &want.labels, &what);
                    let inertia: Vec<f64> = f64s(&want.inertia).iter().map(|v| v * unit).collect();
                    assert_eq!(f64s(&got.inertia), inertia, "{what}");
                }
            }
        }
    }
}

/// Weights that are refused, and what they count as where nothing is checked.
#[test]
fn weights_that_are_no_weights() {
    for device in devices() {
        let x = blobs(&[40, 2], 3, DType::F32, &mut rng(7)).to_device(&device).unwrap();
        let weighted = |v: f64| {
            let w = tensor(&[40], DType::F64, |i| if i % 4 == 1 { v } else { 1.0 }).to_device(&device).unwrap();
            KMeans::new(3).sample_weights(&w)
        };
        for init in DRAWN {
            let want = weighted(0.0).init(init.clone()).fit(&x).unwrap();
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1.0, -1e-300] {
                assert!(weighted(bad).init(init.clone()).fit(&x).is_err(), "{bad}");
                let unchecked = weighted(bad).init(init.clone()).check_finite(false).fit(&x).unwrap();
                assert_same_fit(&unchecked, &want, &format!("{bad} {init:?}"));
            }
            let none = KMeans::new(3)
                .init(init.clone())
                .sample_weights(&ones(&[40], DType::F32, &device).zeros_like().unwrap());
            assert!(matches!(none.fit(&x), Err(Error::Value { argument: "sample_weights total", .. })));
            let fit = none.check_finite(false).fit(&x).unwrap();
            assert!(f64s(&fit.centroids).iter().all(|v| v.is_finite()) && f64s(&fit.inertia) == [0.0], "{init:?}");
        }
    }
}

// ---- Rows that weigh nothing.

/// Rows that are not finite, unchecked, are seeds only where nothing else is left, like those of weight 0 and, by cosine, zeros.
#[test]
fn rows_that_weigh_nothing_are_no_seeds() {
    for (device, metric) in devices().into_iter().flat_map(|d| METRICS.map(|m| (d.clone(), m))) {
        for (dtype, init) in DTYPES.into_iter().flat_map(|t| DRAWN.map(|i| (t, i))) {
            for (kind, bad) in [("NaN", f64::NAN), ("infinite", f64::INFINITY), ("zero", 0.0), ("weightless", 77.0)] {
                if kind == "zero" && metric != Metric::Cosine {
                    continue;
                }
                let mut rng = rng(8);
                // Every third row; what is left is one for each cluster, and one more.
                let is_bad = |i: usize| i.is_multiple_of(3);
                let x = tensor(&[2, 15, 2], dtype, |i| {
                    let v = rng.random_range(1.0..9.0);
                    if is_bad(i / 2 % 15) && (i % 2 == 0 || kind == "zero") {
                        bad
                    } else {
                        v
                    }
                });
                let x = x.to_device(&device).unwrap();
                let weights =
                    tensor(&[15], DType::F32, |i| if is_bad(i) { 0.0 } else { 1.0 }).to_device(&device).unwrap();
                for k in [1, 9, 10] {
                    for seed in 0..4 {
                        let mut settings = KMeans::new(k).metric(metric).init(init.clone()).seed(seed).max_iters(0);
                        settings = match kind {
                            "weightless" => settings.sample_weights(&weights),
                            "zero" => settings,
                            _ => settings.check_finite(false),
                        };
                        let start = settings.fit(&x).unwrap();
                        let what = format!("{kind} {metric:?} {dtype:?} {init:?} {k}");
                        for (rows, seeds) in problems(&x).iter().zip(problems(&start.centroids)) {
                            let good: Vec<_> = (0..15).filter(|&i| !is_bad(i)).map(|i| &rows[i]).collect();
                            assert!(seeds.iter().all(|seed| good.contains(&seed)), "{what}: {seeds:?}");
                            let different: std::collections::HashSet<_> =
                                seeds.iter().map(|s| [s[0].to_bits(), s[1].to_bits()]).collect();
                            assert!(
                                dtype == DType::F16 || dtype == DType::BF16 || different.len() == k,
                                "{what}: {seeds:?}"
                            );
                        }
                    }
                    // With more clusters than such rows the others are used, and nothing breaks.
                    let all =
                        KMeans::new(15).metric(metric).init(init.clone()).check_finite(false).max_iters(2).fit(&x);
                    assert!(u32s(&all.unwrap().labels).iter().all(|&l| l < 15));
                }
            }
        }
    }
}

/// Zeros among rows by cosine: k-means++ finds the ten directions that there are.
#[test]
fn zero_rows_are_no_directions() {
    for device in devices() {
        let mut rng = rng(9);
        let x = tensor(&[1000, 16], DType::F32, |i| {
            let (row, column) = (i / 16, i % 16);
            let noise = rng.random_range(-0.1..0.1);
            if row % 10 == 9 {
                0.0
            } else {
                noise + if column == row / 10 % 10 { 3.0 } else { 0.0 }
            }
        });
        let x = x.to_device(&device).unwrap();
        for init in [Init::KMeansPlusPlus, Init::KMeansParallel] {
            let costs: Vec<f64> = (0..5)
                .map(|seed| {
                    let fit = KMeans::new(10).metric(Metric::Cosine).init(init.clone()).seed(seed).fit(&x).unwrap();
                    f64s(&fit.inertia)[0]
                })
                .collect();
            // The zero rows are at distance 1 from everything; a cluster that is missed costs ten times as much.
            assert!(costs.iter().filter(|&&cost| cost < 110.0).count() >= 4, "{init:?}: {costs:?}");
        }
    }
}

/// A row that is not finite weighs nothing in the inertia, nor in what `tol` is a share of, and moves no empty cluster.
#[test]
fn unchecked_rows_leave_the_others_alone() {
    for (device, metric) in devices().into_iter().flat_map(|d| METRICS.map(|m| (d.clone(), m))) {
        for (dtype, bad) in
            DTYPES.into_iter().flat_map(|t| [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|v| (t, v)))
        {
            let x = uniform(&[2, 30, 2], 3.0, 1.0, dtype, &mut rng(10)).to_device(&device).unwrap();
            let worse = tensor(&[2, 5, 2], dtype, |i| if i % 2 == 0 { bad } else { 5.0 }).to_device(&device).unwrap();
            let all = Tensor::cat(&[&x, &worse], 1).unwrap();
            let far =
                tensor(&[2, 3, 2], dtype, |i| if i % 6 > 3 { 900.0 } else { i as f64 }).to_device(&device).unwrap();
            let settings = KMeans::new(3).metric(metric).init(Init::Given(far)).check_finite(false).max_iters(0);
            let (with, without) = (settings.fit(&all).unwrap(), settings.fit(&x).unwrap());
            let what = format!("{metric:?} {dtype:?} {bad}");
            assert_same(&with.inertia, &without.inertia, &what);
            assert_same(&with.labels.narrow(1, 0, 30).unwrap(), &without.labels, &what);
            let moved = settings.empty_clusters(EmptyClusters::Relocate).max_iters(3).fit(&all).unwrap();
            assert!(f64s(&moved.centroids).iter().all(|v| v.is_finite()), "{what}");
        }
    }
}

/// Rows in the same direction are drawn once each, though their distances to themselves are not rounded to 0.
#[test]
fn parallel_rows_are_drawn_once() {
    for (device, dtype) in devices().into_iter().flat_map(|d| [DType::F32, DType::F64].map(|t| (d.clone(), t))) {
        let x = tensor(&[60, 3], dtype, |i| (1 + i / 3) as f64 * [0.1, 0.7, -0.3][i % 3]).to_device(&device).unwrap();
        for (init, seed) in
            [Init::KMeansParallel, Init::KMeansPlusPlus].into_iter().flat_map(|i| (0..20).map(move |s| (i.clone(), s)))
        {
            for k in [7, 60] {
                let start = KMeans::new(k).metric(Metric::Cosine).init(init.clone()).seed(seed).max_iters(0).fit(&x);
                let mut rows: Vec<u64> = bits(&start.unwrap().centroids).chunks(3).map(|row| row[0]).collect();
                rows.sort_unstable();
                rows.dedup();
                assert_eq!(rows.len(), k, "{init:?} {dtype:?}");
            }
        }
    }
}

/// Empty clusters go to the farthest rows, as scikit-learn's do, whatever those weigh.
#[test]
fn relocation_is_by_distance() {
    for (device, dtype) in devices().into_iter().flat_map(|d| DTYPES.map(|t| (d.clone(), t))) {
        let column = |v: &[f64]| tensor(&[v.len(), 1], dtype, |i| v[i]).to_device(&device).unwrap();
        let fit = |x: &[f64], weights: &[f64], start: &[f64]| {
            let w = tensor(&[weights.len()], DType::F64, |i| weights[i]).to_device(&device).unwrap();
            let settings = KMeans::new(start.len()).init(Init::Given(column(start))).max_iters(1).sample_weights(&w);
            settings.empty_clusters(EmptyClusters::Relocate).fit(&column(x)).unwrap()
        };
        let far = 6e4;
        let moved = fit(&[0., 1., 10., 100.], &[1., 1000., 1., 0.001], &[5., far]);
        assert_eq!(f64s(&moved.centroids)[1], 100.0, "{dtype:?}");
        assert_eq!(u32s(&moved.labels), [0, 0, 0, 1]);
        // A row that weighs nothing would leave the cluster where it was.
        let moved = fit(&[0., 1., 10., 100.], &[1., 1., 1., 0.], &[4., far]);
        assert_eq!(f64s(&moved.centroids)[1], 10.0, "{dtype:?}");
        // Two empty clusters, equal distances: the lowest index first.
        let moved = fit(&[-8., 8., 0., 1.], &[0.001, 1., 5., 5.], &[0., far, -far]);
        assert_eq!(f64s(&moved.centroids)[1..], [-8.0, 8.0], "{dtype:?}");
        // Nothing farther than 0 away: nothing moves.
        let moved = fit(&[5., 5.], &[1., 1.], &[5., far]);
        assert_eq!(u32s(&moved.counts), [2, 0]);
        // A row that is not finite does not move a cluster to where nothing is.
        let settings = KMeans::new(2).init(Init::Given(column(&[5., far]))).max_iters(2).check_finite(false);
        for bad in [f64::NAN, f64::INFINITY] {
            let moved =
                settings.clone().empty_clusters(EmptyClusters::Relocate).fit(&column(&[0., bad, 10., 100.])).unwrap();
            assert_eq!(f64s(&moved.centroids)[1], 100.0, "{dtype:?} {bad}");
        }
    }
}

// ---- Watching.

/// A fit that is stopped is a fit of fewer iterations.
#[test]
fn a_callback_can_stop_a_fit() {
    for (device, metric) in devices().into_iter().flat_map(|d| METRICS.map(|m| (d.clone(), m))) {
        for shape in [vec![400, 3], vec![3, 200, 1], vec![2, 2, 150, 16]] {
            let x = uniform(&shape, 0.5, 1.0, DType::F32, &mut rng(11)).to_device(&device).unwrap();
            let settings = KMeans::new(9).init(Init::Random).metric(metric).tol(0.0).max_iters(60);
            let stop = |after: usize| {
                settings.clone().on_iteration(move |i| {
                    if i.iteration == after {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })
            };
            for after in [1, 2, 5] {
                let stopped = stop(after).fit(&x).unwrap();
                assert_same_fit(&stopped, &settings.clone().max_iters(after).fit(&x).unwrap(), "stopped");
                assert_same(&stopped.labels, &stopped.predict(&x).unwrap(), "labels");
                let mut prepared = stop(after).prepare(shape.clone(), DType::F32, &device).unwrap();
                for _ in 0..2 {
                    prepared.run(&x).unwrap();
                    assert_same_fit(&prepared.fit().unwrap(), &stopped, "prepared");
                }
            }
            // No run begins after the one that was stopped.
            assert_same_fit(&stop(1).n_init(4).fit(&x).unwrap(), &stop(1).fit(&x).unwrap(), "the first of four");
            let whole = settings.fit(&x).unwrap();
            assert_same_fit(&stop(1000).fit(&x).unwrap(), &whole, "not stopped");
            assert_same_fit(&settings.clone().on_iteration(|_| {}).fit(&x).unwrap(), &whole, "only watched");
        }
    }
}

#[test]
fn values_show_themselves() {
    fn shown<T: Debug>(value: &T) -> String {
        format!("{value:?}")
    }
    for device in devices() {
        let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., 9.], [9., 8.]], &device).unwrap();
        let w = ones(&[4], DType::F32, &device);
        let settings = KMeans::new(2).init(Init::KMeansPlusPlus).sample_weights(&w).on_iteration(|_| {});
        let text = shown(&settings);
        assert!(
            ["k: 2", "KMeansPlusPlus", "max_iters: 25", "Fn(Iteration)"].iter().all(|t| text.contains(t)),
            "{text}"
        );
        let prepared: PreparedFit = settings.prepare((4, 2), DType::F32, &device).unwrap();
        let text = shown(&prepared);
        assert!(["PreparedFit", "k: 2", "n: 4"].iter().all(|t| text.contains(t)), "{text}");
        let fit = KMeans::new(2).init(Init::KMeansPlusPlus).fit(&x).unwrap();
        let text = fit.to_string();
        let says =
            "4 rows of 2 columns in 2 clusters of 2 by squared_euclidean: converged after 2 iterations, inertia 1";
        assert_eq!(text, says);
        let many = KMeans::new(3).max_iters(1).fit(&uniform(&[2, 50, 2], 0.0, 1.0, DType::F32, &mut rng(12))).unwrap();
        assert!(many.to_string().starts_with("2 problems of 50 rows of 2 columns in 3 clusters of "), "{many}");
        assert!(many.to_string().contains("not converged after 1 iterations"), "{many}");
    }
}
