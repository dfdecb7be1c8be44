//! Ranks that share a stream have the bits of one, however uneven their shares and however slow some are; and a rank that fails ends
//! the others.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    testing::{fit_batch_on_each, on_each},
    Devices, EmptyClusters, Epochs, Error, Init, KMeans, Metric, MiniBatch, Source, StoredType, StreamOptions,
};
use std::{
    io,
    ops::ControlFlow,
    panic::{catch_unwind, AssertUnwindSafe},
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc, Mutex,
    },
    thread,
    time::{Duration, Instant},
};

/// So many ranks on each device of the tests: a rank with a GPU of its own for each, if there are several.
fn shared(ranks: usize) -> Vec<(Vec<Device>, StreamOptions)> {
    let on = |device: Device| {
        let devices = vec![device; ranks];
        let options = on_each(&devices);
        (devices, options)
    };
    devices().into_iter().map(on).collect()
}

#[test]
fn ranks_that_share_a_stream_have_the_bits_of_one() {
    let (mut rng, mut case) = (rng(1), 0);
    for (dtype, metric) in
        DTYPES.into_iter().flat_map(|t| [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot].map(|m| (t, m)))
    {
        let (n, d, k) = (203, 5, 6);
        let x = blobs(&[n, d], 6, dtype, &mut rng);
        let weights = tensor(&[n], DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5]);
        let away = Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &ones(&[k - 1, d], dtype, &Device::Cpu)], 0).unwrap();
        let plain = KMeans::new(k).metric(metric).max_iters(12).tol(1e-3);
        let settings = [
            plain.clone(),
            plain.clone().tol(0.0).max_iters(0),
            plain.clone().init(Init::KMeansPlusPlus).n_init(3),
            plain.clone().init(Init::KMeansParallel).sample_weights(&weights),
            plain.clone().init(Init::KMeansParallel).check_finite(false),
            plain.clone().check_finite(false).sample_weights(&weights),
            plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(away)),
        ];
        for (i, settings) in settings.into_iter().enumerate() {
            let whole = settings.fit(&x).unwrap();
            let source = Source::from_tensor(&x).unwrap();
            for (ranks, rows, memory) in [(1, 64, 0), (2, 64, 1 << 20), (3, 7, 2000), (8, 64, 0)] {
                for (devices, options) in shared(ranks) {
                    case += 1;
                    if !is_picked(&devices[0], case) {
                        continue;
                    }
                    let options = options.block_rows(rows).memory(memory);
                    let what = format!("{metric:?} {dtype:?}, setting {i}, {ranks} ranks: {options:?}");
                    assert_same_fit(&settings.fit_stream(&source, &options).expect(&what), &whole, &what);
                }
            }
        }
    }
}

/// Fewer rows than ranks, one row less, and shares of which some are empty.
#[test]
fn ranks_without_rows_have_nothing_to_add() {
    let mut rng = rng(2);
    for (n, ranks) in [(3, 8), (4, 5), (7, 8), (8, 8), (1, 4), (1000, 7), (16, 16)] {
        let x = blobs(&[n, 4], 3, DType::F32, &mut rng);
        let source = Source::from_tensor(&x).unwrap();
        for init in [Init::Random, Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel] {
            for empty in [EmptyClusters::Keep, EmptyClusters::Relocate] {
                let settings = KMeans::new(n.min(3)).init(init.clone()).empty_clusters(empty);
                let whole = settings.fit(&x).unwrap();
                for (_, options) in shared(ranks) {
                    let what = format!("{n} rows, {ranks} ranks, {init:?}, {empty:?}");
                    let fit = settings.fit_stream(&source, &options).expect(&what);
                    assert_same_fit(&fit, &whole, &what);
                    let mut labels = vec![];
                    let options = options.block_rows(2);
                    fit.predict_stream(&source, &options, |rows, some| {
                        assert_eq!(rows.start, labels.len() as u64, "{what}");
                        labels.extend_from_slice(some);
                        Ok(())
                    })
                    .unwrap();
                    assert_eq!(labels, whole.labels.to_vec1::<u32>().unwrap(), "{what}");
                }
            }
        }
    }
}

/// The rows of `x` from a function that is told how often it has been called.
fn called<'a>(x: &Tensor, f: impl Fn(usize, std::ops::Range<u64>) -> io::Result<()> + Send + Sync + 'a) -> Source<'a> {
    let bytes: Vec<u8> = f64s(x).into_iter().flat_map(|v| (v as f32).to_ne_bytes()).collect();
    let (row, calls) = (4 * x.dim(1).unwrap(), AtomicUsize::new(0));
    let rows = move |rows: std::ops::Range<u64>, into: &mut [u8]| {
        f(calls.fetch_add(1, Ordering::SeqCst), rows.clone())?;
        into.copy_from_slice(&bytes[rows.start as usize * row..rows.end as usize * row]);
        Ok(())
    };
    Source::from_fn(x.dim(0).unwrap() as u64, x.dim(1).unwrap(), StoredType::F32, rows).unwrap()
}

/// A rank that cannot read its rows, in whatever pass that is: 40 failures and as many panics for each number of ranks and device.
#[test]
fn a_rank_that_fails_ends_the_others_and_is_named() {
    let x = blobs(&[120, 3], 4, DType::F32, &mut rng(3));
    let settings = KMeans::new(4).init(Init::Even).tol(1e-9).max_iters(6).empty_clusters(EmptyClusters::Relocate);
    for ranks in [2, 3] {
        for (_, options) in shared(ranks) {
            let options = options.block_rows(10).memory(0);
            let whole = settings.fit_stream(&Source::from_tensor(&x).unwrap(), &options).unwrap();
            for failing in 0..ranks {
                for call in (0..40).step_by(ranks) {
                    // The rows of the failing rank, read for the so-manieth time.
                    let own = 120 * failing as u64 / ranks as u64..120 * (failing as u64 + 1) / ranks as u64;
                    let reads = AtomicUsize::new(0);
                    let fails = |rows: &std::ops::Range<u64>| {
                        own.contains(&rows.start) && reads.fetch_add(1, Ordering::SeqCst) >= call
                    };
                    let source = called(&x, |_, rows| match fails(&rows) {
                        true => Err(io::Error::other("no more")),
                        false => Ok(()),
                    });
                    let start = Instant::now();
                    match settings.fit_stream(&source, &options) {
                        Err(Error::InRank { rank, ranks: of, source }) => {
                            assert_eq!((rank, of), (failing, ranks));
                            assert!(source.to_string().ends_with("no more"), "{source}");
                        }
                        // Rows that the start is made of are read before there are ranks.
                        Err(e) => assert!(call < 8 && e.to_string().ends_with("no more"), "{e}"),
                        Ok(fit) => assert_same_fit(&fit, &whole, "fewer reads than that"),
                    }
                    assert!(start.elapsed() < Duration::from_secs(10));
                    reads.store(0, Ordering::SeqCst);
                    let source = called(&x, |_, rows| {
                        assert!(!fails(&rows), "on purpose");
                        Ok(())
                    });
                    let start = Instant::now();
                    if let Ok(fit) = catch_unwind(AssertUnwindSafe(|| settings.fit_stream(&source, &options))) {
                        assert_same_fit(&fit.unwrap(), &whole, "fewer reads than that");
                    }
                    assert!(start.elapsed() < Duration::from_secs(10));
                }
            }
            // The devices go on.
            let again = settings.fit_stream(&Source::from_tensor(&x).unwrap(), &options).unwrap();
            assert_same_fit(&again, &whole, "after failures");
        }
    }
}

#[test]
fn ranks_wait_for_one_that_dawdles() {
    let x = blobs(&[200, 3], 4, DType::F32, &mut rng(4));
    let settings = KMeans::new(4).max_iters(5);
    let whole = settings.fit(&x).unwrap();
    for slow in 0..4u64 {
        let source = called(&x, |call, rows| {
            if (50 * slow..50 * (slow + 1)).contains(&rows.start) {
                thread::sleep(Duration::from_millis(call as u64 * 7 % 20));
            }
            Ok(())
        });
        for (_, options) in shared(4) {
            let fit = settings.fit_stream(&source, &options.block_rows(20).memory(0)).unwrap();
            assert_same_fit(&fit, &whole, "a slow rank");
        }
    }
}

/// The callback is asked once an iteration, by the first rank, and all do as it says.
#[test]
fn one_rank_asks_whether_the_fit_goes_on() {
    let x = blobs(&[90, 3], 4, DType::F32, &mut rng(5));
    let source = Source::from_tensor(&x).unwrap();
    for (_, options) in shared(3) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let plain = KMeans::new(4).init(Init::Random).tol(0.0);
        let settings = plain.clone().max_iters(50).on_iteration(move |_| match count.fetch_add(1, Ordering::SeqCst) {
            2 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        });
        let fit = settings.fit_stream(&source, &options).unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 3);
        let three = plain.max_iters(3).fit(&x).unwrap();
        assert_same(&fit.labels, &three.labels, "three iterations");
    }
}

#[test]
fn every_rank_refuses_what_one_finds() {
    let x = tensor(&[90, 3], DType::F32, |i| if i == 3 * 80 { f64::NAN } else { i as f64 });
    for (_, options) in shared(3) {
        let refused = KMeans::new(2).fit_stream(&Source::from_tensor(&x).unwrap(), &options);
        assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 80 })), "{refused:?}");
        let fit = KMeans::new(2).fit(&tensor(&[90, 3], DType::F32, |i| i as f64)).unwrap();
        let refused = fit.predict_stream(&Source::from_tensor(&x).unwrap(), &options.block_rows(10), |_, _| Ok(()));
        assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 80 })), "{refused:?}");
    }
}

#[test]
fn gpus_that_are_not_there_are_refused() {
    let x = blobs(&[90, 3], 4, DType::F32, &mut rng(6));
    let source = Source::from_tensor(&x).unwrap();
    let settings = KMeans::new(3);
    let gpus = devices().iter().any(Device::is_cuda);
    let all = settings.clone().devices(Devices::All).fit(&x);
    if gpus {
        assert_same_fit(&all.unwrap(), &settings.fit(&x).unwrap(), "all GPUs");
        let labels = settings.clone().devices(Devices::These(vec![0])).fit_predict(&x).unwrap();
        assert_same(&labels, &settings.fit_predict(&x).unwrap(), "one GPU");
        for (ordinals, fault) in [(vec![0, 99], "99"), (vec![], "0"), (vec![0, 0], "GPU 0")] {
            let refused = settings.clone().devices(Devices::These(ordinals)).fit(&x).unwrap_err();
            let named = match &refused {
                Error::Range { argument: "devices", got, .. } => got.to_string(),
                Error::Conflict { argument: "devices", got, .. } => got.clone(),
                other => panic!("{other}"),
            };
            assert_eq!(named, fault);
        }
    } else if !cfg!(feature = "cuda") {
        assert!(matches!(all, Err(Error::Conflict { argument: "devices", .. })), "{all:?}");
    }
    // What no launcher has started says so.
    if gpus || !cfg!(feature = "cuda") {
        let alone = settings.fit_stream(&source, &StreamOptions::on(Devices::Launched));
        assert!(matches!(alone, Err(Error::Conflict { argument: "devices", .. })), "{alone:?}");
    }

    // A setting that a call has no use for is not passed over.
    let on_gpus = settings.clone().devices(Devices::All);
    let refused = |result: candle_flash_kmeans::Result<()>| {
        assert!(matches!(result, Err(Error::Conflict { argument: "devices", .. })), "{result:?}");
    };
    refused(on_gpus.fit_stream(&source, &StreamOptions::new(&Device::Cpu)).map(drop));
    refused(on_gpus.plan(&x).map(drop));
    refused(on_gpus.prepare((90, 3), DType::F32, &Device::Cpu).map(drop));
    refused(MiniBatch::train(&x, &on_gpus).map(drop));
    refused(
        MiniBatch::train_stream(&source, &settings, &on_each(&[Device::Cpu, Device::Cpu]), &Epochs::new(1)).map(drop),
    );
    let batch = blobs(&[2, 90, 3], 4, DType::F32, &mut rng(7));
    if gpus {
        assert_same_fit(&on_gpus.fit(&batch).unwrap(), &settings.fit(&batch).unwrap(), "a batch on all GPUs");
    } else if !cfg!(feature = "cuda") {
        assert!(matches!(on_gpus.fit(&batch), Err(Error::Conflict { argument: "devices", .. })));
    }
    // Before any device is looked for.
    assert!(matches!(on_gpus.clone().n_init(0).fit(&batch), Err(Error::Range { argument: "n_init", .. })));
    assert!(matches!(on_gpus.fit(&batch.narrow(1, 0, 2).unwrap()), Err(Error::Range { argument: "k", .. })));
}

/// Whole problems go to ranks, which draw for each what one device draws for it in the batch.
#[test]
fn ranks_that_share_a_batch_have_the_bits_of_one() {
    let mut rng = rng(8);
    let (batch, b, n, d, k) = ([2, 5], 10, 60, 3, 4);
    for (i, metric) in METRICS.into_iter().enumerate() {
        let x = blobs(&[2, 5, n, d], 5, DTYPES[i], &mut rng);
        let transposed = blobs(&[2, 5, d, n], 5, DTYPES[i], &mut rng).transpose(2, 3).unwrap();
        let (given, alike) = (x.narrow(2, 7, k).unwrap(), x.get(1).unwrap().get(2).unwrap().narrow(0, 3, k).unwrap());
        let far = (&given * 50.0).unwrap();
        let weights = tensor(&[2, 5, n], DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5] * (1.0 + i as f64));
        let lengths = Tensor::new(&[[60u32, 4, 59, 31, 7], [60, 60, 5, 44, 12]], &Device::Cpu).unwrap();
        let plain = KMeans::new(k).metric(metric).max_iters(9).tol(1e-3).seed(3);
        let mut settings = vec![
            plain.clone().tol(0.0).max_iters(0),
            plain.clone().init(Init::Given(given)),
            plain.clone().init(Init::Given(alike)),
            plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(far)),
            plain.clone().sample_weights(&weights.get(0).unwrap().get(3).unwrap()),
        ];
        for init in [Init::Random, Init::KMeansPlusPlus, Init::KMeansParallel, Init::Even] {
            let plain = plain.clone().init(init.clone());
            settings.extend([plain.clone(), plain.clone().sample_weights(&weights), plain.clone().lengths(&lengths)]);
            if !matches!(init, Init::Even) {
                settings.push(plain.lengths(&lengths).sample_weights(&weights).check_finite(false).n_init(3));
            }
        }
        for (i, settings) in settings.into_iter().enumerate() {
            for x in [&x, &transposed] {
                let whole = settings.fit(x).unwrap();
                assert_eq!(whole.centroids.dims(), [&batch[..], &[k, d]].concat());
                for ranks in [1, 2, 3, 7, b, b + 2] {
                    for (devices, _) in shared(ranks) {
                        let what = format!("{metric:?}, setting {i}, {ranks} ranks on {:?}", devices[0].location());
                        let fit = fit_batch_on_each(&settings, x, &devices).expect(&what);
                        assert_same_fit(&fit, &whole, &what);
                        assert!(fit.labels.device().is_cpu());
                    }
                }
            }
        }
    }
}

/// A callback sees the batch as if one device had it, and ends it there.
#[test]
fn a_callback_sees_all_problems_of_a_batch() {
    // The first problems converge long before the last ones.
    let (mut rng, near) = (rng(9), blobs(&[3, 80, 2], 3, DType::F32, &mut rng(10)));
    let x = Tensor::cat(&[near, uniform(&[4, 80, 2], 0.0, 1.0, DType::F32, &mut rng)], 0).unwrap();
    let seen = |ends: usize, n_init: usize, devices: Option<&[Device]>| {
        let all = Arc::new(Mutex::new(vec![]));
        let calls = all.clone();
        let settings = KMeans::new(3).tol(0.0).max_iters(60).n_init(n_init).on_iteration(move |iteration| {
            let mut calls = calls.lock().unwrap();
            calls.push(iteration);
            if calls.len() == ends {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let fit = match devices {
            Some(devices) => fit_batch_on_each(&settings, &x, devices),
            None => settings.fit(&x),
        };
        let calls = all.lock().unwrap().clone();
        (calls, fit.unwrap())
    };
    for (ends, n_init) in [(usize::MAX, 1), (3, 1), (usize::MAX, 3), (9, 3)] {
        let (expected, whole) = seen(ends, n_init, None);
        assert!(expected.iter().any(|i| (1..7).contains(&i.converged)), "{expected:?}");
        for ranks in [1, 2, 3, 7] {
            for (devices, _) in shared(ranks) {
                let (calls, fit) = seen(ends, n_init, Some(&devices));
                assert_eq!(calls, expected, "{ranks} ranks");
                assert_same_fit(&fit, &whole, "a watched batch");
            }
        }
    }
}

/// What is wrong of a problem is refused by its number in the batch, whoever has it and whoever waits for it.
#[test]
fn refusals_number_the_problems_of_the_batch() {
    let (b, n) = (7, 20);
    let x = tensor(&[b, n, 2], DType::F32, |i| i as f64);
    let nan = tensor(&[b, n, 2], DType::F32, |i| if i / 2 == 5 * n + 11 { f64::NAN } else { i as f64 });
    let lengths = Tensor::new(&[20u32, 20, 20, 20, 1, 20, 20], &Device::Cpu).unwrap();
    let weights = tensor(&[b, n], DType::F64, |i| if i / n == 6 { -2.0 } else { 1.0 });
    let given = tensor(&[b, 2, 2], DType::F32, |i| if i / 4 == 3 { f64::INFINITY } else { i as f64 });
    let plain = KMeans::new(2).on_iteration(|_| ());
    for (settings, x) in [
        (plain.clone(), &nan),
        (plain.clone().lengths(&lengths), &x),
        (plain.clone().sample_weights(&weights), &x),
        (plain.clone().sample_weights(&(weights * 0.0).unwrap()), &x),
        (plain.clone().init(Init::Given(given)), &x),
    ] {
        let expected = settings.fit(x).unwrap_err();
        for ranks in [1, 2, 3, 7] {
            for (devices, _) in shared(ranks) {
                let refused = fit_batch_on_each(&settings, x, &devices).unwrap_err();
                assert_eq!(format!("{refused:?}"), format!("{expected:?}"), "{ranks} ranks");
            }
        }
    }
    let on_gpu = devices().into_iter().find(Device::is_cuda);
    if let Some(device) = on_gpu {
        let refused = fit_batch_on_each(&plain, &x.to_device(&device).unwrap(), &[Device::Cpu]);
        assert!(matches!(refused, Err(Error::Device { argument: "x", .. })), "{refused:?}");
    }
}
