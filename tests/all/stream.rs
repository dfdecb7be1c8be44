//! A fit of a stream has the bits of the fit in memory, wherever its rows come from, however they are cut, and however many stay on
//! the device.

use crate::{common::*, source::Folder};
use candle_core::{DType, Device, Tensor, WithDType};
use candle_flash_kmeans::{
    testing::{on_each, on_read},
    DevicePlan, Element, EmptyClusters, Error, Fit, Init, KMeans, Metric, Pinned, Source, StoredType, StreamOptions,
};
use half::{bf16, f16};
use std::{
    fs, io,
    ops::ControlFlow,
    panic::{catch_unwind, AssertUnwindSafe},
    path::Path,
    sync::{
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        Arc, Mutex,
    },
};

const MERGING: [Metric; 3] = [Metric::SquaredEuclidean, Metric::Cosine, Metric::Dot];

/// The values of a tensor in this machine's byte order.
fn bytes(x: &Tensor) -> Vec<u8> {
    let bytes = |v: f64| match x.dtype() {
        DType::F16 => f16::from_f64(v).to_ne_bytes().to_vec(),
        DType::BF16 => bf16::from_f64(v).to_ne_bytes().to_vec(),
        DType::F32 => (v as f32).to_ne_bytes().to_vec(),
        _ => v.to_ne_bytes().to_vec(),
    };
    f64s(x).into_iter().flat_map(bytes).collect()
}

fn stored(dtype: DType) -> StoredType {
    match dtype {
        DType::F16 => StoredType::F16,
        DType::BF16 => StoredType::BF16,
        DType::F32 => StoredType::F32,
        _ => StoredType::F64,
    }
}

/// The rows of `x` from a function that counts those that it is asked for.
fn counted<'a>(x: &Tensor, read: &'a AtomicU64) -> Source<'a> {
    let (data, row) = (bytes(x), x.dim(1).unwrap() * x.dtype().size_in_bytes());
    let rows = move |rows: std::ops::Range<u64>, into: &mut [u8]| {
        read.fetch_add(rows.end - rows.start, Ordering::SeqCst);
        into.copy_from_slice(&data[rows.start as usize * row..rows.end as usize * row]);
        Ok(())
    };
    Source::from_fn(x.dim(0).unwrap() as u64, x.dim(1).unwrap(), stored(x.dtype()), rows).unwrap()
}

/// The rows of `x` in page-locked memory.
pub fn pinned(x: &Tensor, device: &Device) -> Source<'static> {
    fn copy<T: Element + WithDType>(x: &Tensor, device: &Device) -> Source<'static> {
        let values = x.flatten_all().unwrap().to_vec1::<T>().unwrap();
        let mut pinned = Pinned::zeros(values.len(), device).unwrap();
        pinned.copy_from_slice(&values);
        Source::from_slice(pinned, x.dim(1).unwrap()).unwrap()
    }
    match x.dtype() {
        DType::F16 => copy::<f16>(x, device),
        DType::BF16 => copy::<bf16>(x, device),
        DType::F32 => copy::<f32>(x, device),
        _ => copy::<f64>(x, device),
    }
}

/// Room for blocks of so many rows, and for as many that stay.
pub fn options(device: &Device, source: &Source, rows: usize, staying: usize) -> StreamOptions {
    let moving = if device.is_cpu() { 8 } else { 2 };
    StreamOptions::new(device).block_rows(rows).memory((moving + staying) * rows * source.row_bytes())
}

#[track_caller]
fn assert_streams(settings: &KMeans, source: &Source, device: &Device, whole: &Fit, what: &str) {
    let n = source.shape().0 as usize;
    for (rows, staying) in [(n, 0), (n, 1), (64, 0), (64, 1), (64, 3), (64, 99), (7, 5)] {
        let what = format!("{what}, {staying} blocks of {rows} rows stay");
        let fit = settings.fit_stream(source, &options(device, source, rows, staying)).expect(&what);
        assert!(fit.centroids.device().is_cpu() && fit.labels.device().is_cpu());
        assert_same_fit(&fit, whole, &what);
        match (&fit.weights, &whole.weights) {
            (Some(fit), Some(whole)) => assert_same(fit, whole, &what),
            (None, None) => {}
            _ => panic!("{what}: weights of clusters"),
        }
    }
}

#[test]
fn a_stream_has_the_bits_of_the_fit_in_memory() {
    let (mut rng, mut case) = (rng(1), 0);
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| MERGING.map(|m| (t, m))) {
        let (n, d, k) = (203, 5, 6);
        let x = blobs(&[n, d], 6, dtype, &mut rng);
        let weights = tensor(&[n], DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5]);
        let plain = KMeans::new(k).metric(metric).max_iters(12).tol(1e-3);
        for device in devices() {
            let on = |t: &Tensor| t.to_device(&device).unwrap();
            let crowded =
                Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &ones(&[k - 1, d], dtype, &Device::Cpu)], 0).unwrap();
            let crowded = on(&crowded);
            let settings = [
                plain.clone(),
                plain.clone().tol(0.0).max_iters(0),
                plain.clone().init(Init::Even).max_iters(1),
                plain.clone().init(Init::KMeansPlusPlus).n_init(3),
                plain.clone().init(Init::KMeansParallel).n_init(2),
                plain.clone().check_finite(false),
                plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(crowded)),
            ];
            let read = AtomicU64::new(0);
            let source = counted(&x, &read);
            for (i, settings) in settings.into_iter().enumerate() {
                case += 1;
                if !is_picked(&device, case) {
                    continue;
                }
                let what = format!("{metric:?} {dtype:?}, setting {i} on {:?}", device.location());
                assert_streams(&settings, &source, &device, &settings.fit(&on(&x)).unwrap(), &what);
            }
            for init in [Init::Random, Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel] {
                case += 1;
                if !is_picked(&device, case) {
                    continue;
                }
                let what = format!("{metric:?} {dtype:?}, weights and {init:?} on {:?}", device.location());
                let settings = plain.clone().init(init);
                let whole = settings.clone().sample_weights(&on(&weights)).fit(&on(&x)).unwrap();
                assert_streams(&settings.sample_weights(&weights), &source, &device, &whole, &what);
            }
        }
    }
}

/// Page-locked rows, in one piece or in several, are sent from where they lie. Those of a source that are not all so are read.
#[test]
fn pinned_rows_have_the_bits_of_others() {
    fn check<T: Element + WithDType>(dtype: DType, device: &Device) {
        let (x, cut) = (blobs(&[203, 5], 6, dtype, &mut rng(7)), 71 * 5);
        let values = x.flatten_all().unwrap().to_vec1::<T>().unwrap();
        let mut pinned = Pinned::zeros(values.len(), device).unwrap();
        assert!(pinned.iter().all(|&v| v == T::zero()));
        pinned.copy_from_slice(&values);
        assert!(pinned[..] == values[..]);
        let slice = |values| Source::from_slice::<T>(values, 5).unwrap();
        let both = |a, b| Source::concat([slice(a), slice(b)]).unwrap();
        for (source, in_place) in [
            (slice(&pinned[..]), true),
            (both(&pinned[..cut], &pinned[cut..]), true),
            (both(&pinned[..cut], &values[cut..]), false),
            (slice(&values[..]), false),
        ] {
            let what = format!("{source:?} in place: {in_place}, on {:?}", device.location());
            for (metric, empty) in
                [(Metric::SquaredEuclidean, EmptyClusters::Relocate), (Metric::Cosine, EmptyClusters::Keep)]
            {
                let settings = KMeans::new(6).metric(metric).empty_clusters(empty).max_iters(6);
                let whole = settings.fit(&x.to_device(device).unwrap()).unwrap();
                assert_streams(&settings, &source, device, &whole, &what);
            }
            let plan = KMeans::new(6).plan_stream(&source, &options(device, &source, 64, 1)).unwrap();
            assert_eq!(plan.devices[0].ring_bytes == 0, in_place && device.is_cuda(), "{what}");
            let fit = KMeans::new(6).fit(&x.to_device(device).unwrap()).unwrap();
            let mut labels = vec![];
            fit.predict_stream(&source, &options(device, &source, 64, 0), |_, some| {
                labels.extend_from_slice(some);
                Ok(())
            })
            .unwrap();
            assert_eq!(labels, fit.labels.to_vec1::<u32>().unwrap(), "{what}");
        }
    }
    for device in devices() {
        check::<f16>(DType::F16, &device);
        check::<f32>(DType::F32, &device);
        check::<f64>(DType::F64, &device);
    }
}

/// Slices, tensors and files, and bytes, which are computed in f16 or f32.
#[test]
fn every_source_streams() {
    let folder = Folder::new("stream");
    let x = integers(&[150, 3], 100, DType::F32, &mut rng(2));
    x.write_npy(folder.file("x.npy")).unwrap();
    let values: Vec<_> = f64s(&x).into_iter().map(|v| v as f32).collect();
    let signed: Vec<_> = values.iter().map(|&v| v as i8).collect();
    for device in devices() {
        let sources = [
            Source::from_slice(&values, 3).unwrap(),
            Source::from_tensor(&x).unwrap(),
            Source::open(folder.file("x.npy")).unwrap(),
            Source::from_slice(&signed, 3).unwrap(),
            Source::from_slice(&signed, 3).unwrap().with_dtype(DType::F32).unwrap(),
            Source::concat([
                Source::from_slice(&values[..60], 3).unwrap(),
                Source::from_slice(&values[60..], 3).unwrap(),
            ])
            .unwrap(),
        ];
        for source in sources {
            let settings = KMeans::new(5).seed(3);
            let whole = settings.fit(&x.to_dtype(source.dtype()).unwrap().to_device(&device).unwrap()).unwrap();
            assert_streams(&settings, &source, &device, &whole, &format!("{source:?}"));
        }
    }
}

/// Terms that no integer of one scale holds, and rows that are not finite, some of them drawn.
#[test]
fn terms_of_all_magnitudes_stream() {
    for (dtype, metric) in [DType::F16, DType::F32, DType::F64].into_iter().flat_map(|t| MERGING.map(|m| (t, m))) {
        let most = if dtype == DType::F16 { 7 } else { 30 };
        for finite in [true, false] {
            let x = tensor(&[240, 4], dtype, |i| match i / 4 {
                row if !finite && (row % 3 == 0 || row > 200) && i % 4 == 1 => f64::NAN,
                row if row % 60 == 5 => 1.5 * 2f64.powi(i as i32 * 7 % (2 * most) - most),
                row if row % 50 == 6 => 0.0,
                _ => (i * 37 % 101) as f64 / 50.0 - 1.0,
            });
            for device in devices() {
                for init in [Init::Random, Init::Even, Init::KMeansPlusPlus, Init::KMeansParallel] {
                    let settings = KMeans::new(5).metric(metric).check_finite(finite).init(init);
                    let what = format!("{settings:?} {dtype:?} on {:?}", device.location());
                    let whole = settings.fit(&x.to_device(&device).unwrap()).unwrap();
                    assert_streams(&settings, &Source::from_tensor(&x).unwrap(), &device, &whole, &what);
                }
            }
        }
    }
}

/// Of a sample are only the rows that k-means++ chooses from, and of all those of k-means||.
#[test]
fn samples_are_the_same_however_rows_are_cut() {
    let x = blobs(&[70_000, 2], 4, DType::F16, &mut rng(3));
    let source = Source::from_tensor(&x).unwrap();
    for init in [Init::KMeansPlusPlus, Init::KMeansParallel] {
        let mut first: Option<Fit> = None;
        for device in devices() {
            for (rows, staying) in [(10_000, 2), (33_333, 0)] {
                let settings = KMeans::new(4).init(init.clone()).max_iters(3);
                let fit = settings.fit_stream(&source, &options(&device, &source, rows, staying)).unwrap();
                let start = KMeans::new(4).init(Init::Given(x.narrow(0, 0, 4).unwrap())).max_iters(0).fit(&x).unwrap();
                assert!(f64s(&fit.inertia)[0] < f64s(&start.inertia)[0]);
                if matches!(init, Init::KMeansParallel) {
                    assert_same_fit(&fit, &settings.fit(&x).unwrap(), "in memory");
                }
                assert_same_fit(first.get_or_insert_with(|| fit.clone()), &fit, &format!("{init:?} on {device:?}"));
            }
        }
    }
}

/// k-means|| where little can be drawn: too few distinct rows, distances whose total is infinite or hardly anything, rows of which few
/// weigh anything. In memory, block by block and by several ranks it draws the same.
#[test]
fn rounds_draw_from_blocks_what_they_draw_from_all_rows() {
    let mut rng = rng(10);
    let (n, k) = (230, 12);
    let spread = blobs(&[n, 3], 9, DType::F64, &mut rng);
    let few = tensor(&[n, 3], DType::F64, |i| (i / 3 % 5) as f64);
    let late = tensor(&[n, 3], DType::F64, |i| if i / 3 < 150 { 2.0 } else { (i % 97) as f64 });
    let one_far = tensor(&[n, 3], DType::F64, |i| if i / 3 == 77 { 1e9 } else { (i % 89) as f64 });
    for (at, (name, x)) in [
        ("spread", spread.clone()),
        ("few", few),
        ("late", late),
        ("one far", one_far),
        ("infinite", (&spread * 1e200).unwrap()),
        ("next to nothing", (&spread * 1e-152).unwrap()),
        ("subnormal", (&spread * 1e-160).unwrap()),
        ("nothing", (&spread * 1e-190).unwrap()),
    ]
    .into_iter()
    .enumerate()
    {
        let source = Source::from_tensor(&x).unwrap();
        for (i, (metric, weighted)) in MERGING.into_iter().flat_map(|m| [(m, false), (m, true)]).enumerate() {
            let settings = KMeans::new(k).metric(metric).init(Init::KMeansParallel).max_iters(2).seed(3);
            let weights = tensor(&[n], DType::F64, |i| if i % 9 == 4 { 1.0 + i as f64 } else { 0.0 });
            let with = |weights: &Tensor| match weighted {
                true => settings.clone().sample_weights(weights),
                false => settings.clone(),
            };
            for device in devices() {
                if !is_picked(&device, at + i) {
                    continue;
                }
                let on = |t: &Tensor| t.to_device(&device).unwrap();
                let whole = with(&on(&weights)).fit(&on(&x)).unwrap();
                for (rows, ranks) in [(n, 1), (50, 1), (7, 1), (20, 3)] {
                    let options = on_each(&vec![device.clone(); ranks]).block_rows(rows).memory(24 * 10 * rows);
                    let what =
                        format!("{name}, {metric:?}, weights {weighted}, {rows} rows, {ranks} ranks on {device:?}");
                    assert_same_fit(&with(&weights).fit_stream(&source, &options).expect(&what), &whole, &what);
                }
            }
        }
    }
}

/// A pass reads the rows that do not stay, and there are as many passes as the documentation says.
#[test]
fn only_what_does_not_stay_is_read_again() {
    let x = blobs(&[100, 4], 3, DType::F32, &mut rng(4));
    for (device, staying) in
        devices().into_iter().flat_map(|device| [0, 3, 10].map(|staying| (device.clone(), staying)))
    {
        for (settings, passes, at_start) in [
            (KMeans::new(3).init(Init::Random).tol(0.0).max_iters(0), 1, 3),
            (KMeans::new(3).init(Init::Random).tol(1e-9).max_iters(0), 2, 4),
            (KMeans::new(3).init(Init::Random).tol(0.0).max_iters(2), 3, 3),
            (KMeans::new(3).tol(0.0).max_iters(2).init(Init::KMeansPlusPlus), 3, 100),
            (KMeans::new(3).init(Init::Random).tol(0.0).max_iters(2).n_init(2), 6, 6),
            (KMeans::new(3).tol(0.0).max_iters(2).init(Init::KMeansParallel), 7 + 3, 0),
            (KMeans::new(3).tol(0.0).max_iters(2).init(Init::KMeansParallel).n_init(2), 2 * (7 + 3), 0),
        ] {
            let read = AtomicU64::new(0);
            let source = counted(&x, &read);
            let fit =
                settings.on_iteration(|_| ()).fit_stream(&source, &options(&device, &source, 10, staying)).unwrap();
            assert!(passes < 3 || f64s(&fit.n_iter)[0] == 2.0);
            let expected = at_start + 100 + passes * (100 - 10 * staying as u64);
            assert_eq!(read.load(Ordering::SeqCst), expected, "{staying} stay, {passes} passes");
        }
    }
}

#[test]
fn callbacks_see_and_end_a_stream() {
    let x = blobs(&[300, 4], 9, DType::F32, &mut rng(5));
    let source = Source::from_tensor(&x).unwrap();
    for device in devices() {
        let seen = Arc::new(Mutex::new(vec![]));
        let log = seen.clone();
        let settings = KMeans::new(20).tol(0.0).n_init(2).on_iteration(move |i| {
            log.lock().unwrap().push((i.run, i.iteration, i.converged));
            if i.iteration == 3 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let fit = settings.fit_stream(&source, &options(&device, &source, 50, 2)).unwrap();
        assert_eq!(*seen.lock().unwrap(), [(0, 1, 0), (0, 2, 0), (0, 3, 0)]);
        assert_eq!(u32s(&fit.n_iter), [3]);
        assert_eq!(u32s(&fit.labels), u32s(&fit.predict(&x).unwrap()));
    }
}

#[test]
fn labels_stream() {
    for (dtype, metric) in DTYPES.into_iter().flat_map(|t| METRICS.map(|m| (t, m))) {
        let x = blobs(&[203, 5], 6, dtype, &mut rng(6));
        let fit = KMeans::new(6).metric(metric).fit(&x).unwrap();
        let source = Source::from_tensor(&x).unwrap();
        for device in devices() {
            for (rows, staying) in [(203, 0), (64, 3), (7, 0)] {
                let (mut labels, mut next) = (vec![], 0);
                fit.predict_stream(&source, &options(&device, &source, rows, staying), |rows, some| {
                    assert_eq!((rows.start, (rows.end - rows.start) as usize), (next, some.len()));
                    next = rows.end;
                    labels.extend_from_slice(some);
                    Ok(())
                })
                .unwrap();
                assert_eq!(labels, u32s(&fit.labels));
            }
        }
    }
}

#[test]
fn streams_are_refused_before_rows_are_read() {
    let x = blobs(&[50, 2], 2, DType::F32, &mut rng(7));
    let read = AtomicU64::new(0);
    let (source, on_cpu) = (counted(&x, &read), StreamOptions::new(&Device::Cpu));
    let weights = |shape: &[usize]| tensor(shape, DType::F64, |i| i as f64);
    let lengths = Tensor::new(30u32, &Device::Cpu).unwrap();
    for (settings, expected) in [
        (KMeans::new(2).metric(Metric::Manhattan), "metric: Manhattan cannot be combined with rows in blocks"),
        (KMeans::new(2).lengths(&lengths), "lengths: a tensor cannot be combined with a stream"),
        (KMeans::new(51), "k: 51 is outside 1..=50"),
        (KMeans::new(2).n_init(0), "n_init: 0 is outside 1.."),
        (KMeans::new(2).sample_weights(&weights(&[49])), "sample_weights: shape [49], expected [50]"),
        (KMeans::new(2).init(Init::Given(weights(&[2, 2]))), "centroids: dtype F64, expected F32"),
    ] {
        let refused = settings.fit_stream(&source, &on_cpu).unwrap_err().to_string();
        assert!(refused.starts_with(expected), "{refused}");
    }
    let none = KMeans::new(2).fit_stream(&source, &on_cpu.clone().block_rows(0));
    assert!(matches!(none, Err(Error::Range { argument: "block_rows", got: 0, .. })), "{none:?}");
    let refuse =
        |of: &Tensor| KMeans::new(2).fit(of).unwrap().predict_stream(&source, &on_cpu, |_, _| Ok(())).unwrap_err();
    let refused = refuse(&x.to_dtype(DType::F64).unwrap());
    assert!(matches!(refused, Error::DType { argument: "x", got: DType::F32, .. }), "{refused:?}");
    let refused = refuse(&x.narrow(1, 0, 1).unwrap());
    assert!(matches!(refused, Error::Size { argument: "x", got: 2, expected: 1, .. }), "{refused:?}");
    let refused = refuse(&x.unsqueeze(0).unwrap());
    assert!(matches!(refused, Error::Shape { argument: "x", .. }), "{refused:?}");
    assert_eq!(read.load(Ordering::SeqCst), 0);

    // Rows that 32 bits do not number, and so many elements that a block of them could not be addressed.
    let endless =
        |n, d| Source::from_fn(n, d, StoredType::F16, |_, _| Err(io::Error::other("a row was read"))).unwrap();
    for (n, d) in [(1 << 32, 2), (u64::MAX, 1), (1 << 40, 1 << 30)] {
        let refused = KMeans::new(2).fit_stream(&endless(n, d), &on_cpu);
        assert!(matches!(refused, Err(Error::TooLarge { .. })), "{n} x {d}: {refused:?}");
        let plan = KMeans::new(2).plan_stream(&endless(n, d), &on_cpu);
        assert!(matches!(plan, Err(Error::TooLarge { .. })), "{n} x {d}: {plan:?}");
    }
    // The most there may be are planned, by any number of ranks.
    let most = endless(u64::from(u32::MAX), 512);
    for ranks in [1, 3, 8] {
        let plan = KMeans::new(1 << 15).plan_stream(&most, &on_each(&vec![Device::Cpu; ranks])).unwrap();
        let rows: u64 = plan.devices.iter().map(|part| part.rows.end - part.rows.start).sum();
        let bytes: u64 = plan.devices.iter().map(|part| part.first_pass_bytes).sum();
        assert_eq!((rows, bytes), (u32::MAX.into(), u64::from(u32::MAX) * 1024), "{plan}");
    }
}

/// Whatever ends a stream, the error says why, and the device goes on.
#[test]
fn what_a_source_fails_with_ends_the_fit() {
    let folder = Folder::new("stream-damage");
    let x = blobs(&[200, 3], 4, DType::F32, &mut rng(8));
    let path = folder.file("x.npy");
    for device in devices() {
        for staying in [0, 2, 99] {
            x.write_npy(&path).unwrap();
            let source = Source::open(&path).unwrap();
            let (options, cut) = (options(&device, &source, 20, staying), path.clone());
            let damage = move |_| fs::OpenOptions::new().write(true).open(&cut).unwrap().set_len(1000).unwrap();
            let settings = KMeans::new(4).tol(0.0).on_iteration(damage);
            let failed = settings.fit_stream(&source, &options);
            // What has stayed on the device is as it was.
            match staying {
                99 => drop(failed.unwrap()),
                _ => assert!(matches!(failed, Err(Error::Changed { .. })), "{failed:?}"),
            }
            let failing = Source::from_fn(200, 3, StoredType::F32, |rows, into| match rows.contains(&110) {
                true => Err(io::Error::other("no such row")),
                false => {
                    into.fill(0);
                    Ok(())
                }
            });
            let failed = KMeans::new(4).init(Init::Even).fit_stream(&failing.unwrap(), &options).unwrap_err();
            assert_eq!(failed.to_string(), "function, rows 100..120: no such row");
            let panicking = Source::from_fn(200, 3, StoredType::F32, |rows, _| {
                assert!(!rows.contains(&110), "row 110");
                Ok(())
            });
            let panicking = panicking.unwrap();
            let panic =
                catch_unwind(AssertUnwindSafe(|| KMeans::new(4).init(Init::Even).fit_stream(&panicking, &options)));
            assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"row 110"));
            let bad = tensor(&[200, 3], DType::F32, |i| if i == 3 * 131 { f64::NAN } else { i as f64 });
            let bad = Source::from_tensor(&bad).unwrap();
            let refused = KMeans::new(4).fit_stream(&bad, &options);
            assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 131 })), "{refused:?}");
            let fit = KMeans::new(4).fit(&x.to_device(&device).unwrap()).unwrap();
            let mut given = 0;
            let refused = fit.predict_stream(&bad, &options, |rows, _| {
                given = rows.end;
                Ok(())
            });
            assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 131 })), "{refused:?}");
            assert_eq!(given, 120);
            let full =
                fit.predict_stream(&Source::from_tensor(&x).unwrap(), &options, |_, _| Err(io::Error::other("full")));
            assert_eq!(full.unwrap_err().to_string(), "labels 0..20: full");
        }
    }
}

/// The reads of a fit of the file of `x`, each with the bytes that it is asked for, as `answer` lets them be, and what becomes of the fit.
fn read_as(
    settings: &KMeans,
    path: &Path,
    options: &StreamOptions,
    answer: impl Fn(usize, usize) -> io::Result<usize> + Send + Sync + 'static,
) -> (Source<'static>, candle_flash_kmeans::Result<Fit>, usize) {
    let (reads, fits) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (count, begun) = (reads.clone(), fits.clone());
    on_read(Some(Arc::new(move |asked| match begun.load(Ordering::SeqCst) {
        true => answer(count.fetch_add(1, Ordering::SeqCst), asked),
        false => Ok(asked),
    })));
    let source = Source::open(path).unwrap();
    on_read(None);
    fits.store(true, Ordering::SeqCst);
    let fit = settings.fit_stream(&source, options);
    fits.store(false, Ordering::SeqCst);
    (source, fit, reads.load(Ordering::SeqCst))
}

/// Row F6 of the record (`tests/record/faults.md`): a read that is short or interrupted goes on, one that fails or ends early is the
/// error of the fit, and the same source gives its rows again.
#[test]
fn reads_are_short_interrupted_or_fail() {
    let folder = Folder::new("stream-reads");
    let (x, path) = (blobs(&[203, 3], 4, DType::F32, &mut rng(13)), folder.file("x.npy"));
    x.write_npy(&path).unwrap();
    let settings = KMeans::new(4).tol(1e-9).max_iters(3);
    let whole = settings.fit(&x).unwrap();
    let (mut short, mut interrupted, mut early, mut failed) = (0, 0, 0, 0);
    for device in devices() {
        let source = Source::open(&path).unwrap();
        let ranks = on_each(&vec![device.clone(); 3]).block_rows(30).memory(8 * 30 * 12);
        for options in [
            options(&device, &source, 203, 0),
            options(&device, &source, 30, 0),
            options(&device, &source, 30, 3),
            ranks,
        ] {
            let (_, fit, reads) = read_as(&settings, &path, &options, |_, asked| Ok(asked));
            assert_same_fit(&fit.unwrap(), &whole, "every read is whole");
            for most in [1, 5, 12, 100] {
                let (_, fit, calls) = read_as(&settings, &path, &options, move |_, asked| Ok(asked.min(most)));
                assert_same_fit(&fit.unwrap(), &whole, "short reads");
                short += calls - reads;
            }
            for every in [2, 3, 7] {
                let (_, fit, calls) = read_as(&settings, &path, &options, move |i, asked| match i % every {
                    0 => Ok(asked.div_ceil(2)),
                    _ => Err(io::ErrorKind::Interrupted.into()),
                });
                assert_same_fit(&fit.unwrap(), &whole, "interrupted reads");
                interrupted += calls - calls.div_ceil(every);
            }
            for (ends, counted) in [(false, &mut failed), (true, &mut early)] {
                for at in 0..reads {
                    // All later reads of any thread fail as well, as those of a disk do.
                    let answer = move |i: usize, asked: usize| match (i < at, ends) {
                        (true, _) => Ok(asked),
                        (false, true) => Ok(0),
                        (false, false) => Err(io::Error::from_raw_os_error(5)),
                    };
                    let (source, fit, _) = read_as(&settings, &path, &options, answer);
                    let error = match fit.unwrap_err() {
                        Error::InRank { source, .. } => *source,
                        error => error,
                    };
                    let Error::Io { path: named, source: reason } = &error else { panic!("{error:?}") };
                    assert_eq!(*named, path.display().to_string());
                    match ends {
                        true => assert_eq!(reason.kind(), io::ErrorKind::UnexpectedEof),
                        false => assert_eq!(reason.raw_os_error(), Some(5)),
                    }
                    assert_same_fit(&settings.fit_stream(&source, &options).unwrap(), &whole, "after a fault");
                    *counted += 1;
                }
            }
        }
    }
    println!("{short} short, {interrupted} interrupted, {early} early ends, {failed} failed");
    assert!(short > 1000 && interrupted > 200 && early > 100 && failed > 100);
}

/// Each pass reads what the plan says, on every device and by every rank, whatever may stay and however rows are cut.
#[test]
fn passes_read_what_the_plan_says() {
    let x = blobs(&[205, 4], 3, DType::F32, &mut rng(9));
    let all = 205 * 16;
    for (device, ranks) in devices().into_iter().flat_map(|device| [1, 2, 3].map(|ranks| (device.clone(), ranks))) {
        for (rows, memory) in [(10, 0), (10, 2000), (7, 3000), (64, 9000), (300, 1 << 14), (10, 1 << 20)] {
            let options = on_each(&vec![device.clone(); ranks]).block_rows(rows).memory(memory);
            let (read, in_passes) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(vec![])));
            let source = counted(&x, &read);
            let (so_far, log) = (read.clone(), in_passes.clone());
            let settings = KMeans::new(3).tol(0.0).max_iters(3).init(Init::Given(x.narrow(0, 0, 3).unwrap()));
            let settings = settings.on_iteration(move |_| log.lock().unwrap().push(so_far.load(Ordering::SeqCst) * 16));

            let plan = settings.plan_stream(&source, &options).unwrap();
            assert_eq!((read.load(Ordering::SeqCst), plan.devices.len(), plan.max_passes), (0, ranks, Some(5)));
            let sum = |f: fn(&DevicePlan) -> u64| plan.devices.iter().map(f).sum::<u64>();
            let (first, later) = (sum(|device| device.first_pass_bytes), sum(|device| device.later_pass_bytes));
            let mut next = 0;
            for part in &plan.devices {
                let rows = part.rows.end - part.rows.start;
                assert_eq!((part.rows.start, part.device), (next, device.location()), "{plan}");
                assert_eq!(part.resident_rows * 16 + part.later_pass_bytes, rows * 16, "{plan}");
                assert_eq!(part.later_pass_bytes.div_ceil(16 * part.block_rows), part.moving_blocks, "{plan}");
                assert!(part.resident_bytes <= memory as u64 && part.label_bytes == 4 * rows, "{plan}");
                assert!(plan.to_string().contains(&format!("{} stay", part.resident_rows)), "{plan}");
                next = part.rows.end;
            }
            assert_eq!((next, first), (205, all), "{plan}");
            assert!((memory > 0 || later == all) && (memory < 1 << 20 || later == 0), "{plan}");

            settings.fit_stream(&source, &options).unwrap();
            let in_passes = in_passes.lock().unwrap();
            let expected: Vec<_> = (1..=in_passes.len() as u64).map(|pass| first + pass * later).collect();
            assert_eq!(*in_passes, expected, "{plan}");
            assert_eq!(read.load(Ordering::SeqCst) * 16, expected[expected.len() - 1] + later, "{plan}");
        }
    }
}
