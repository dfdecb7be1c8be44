//! Checkpoints: a fit that ends at any stage, however its process ends, goes on to the bits of one that nothing has ended, and files of
//! other settings or rows are not taken for its own. Processes that are killed and files that are damaged are in `tests/killed.rs`, all
//! counts in `tests/record/faults.md`.

use crate::{
    common::*,
    stream::{options, pinned},
};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    testing::{on_each, on_stage},
    Checkpoint, EmptyClusters, Error, Fit, Init, KMeans, Metric, Source, StoredType, StreamOptions,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc, Mutex,
    },
    time::{Duration, SystemTime},
};

/// The number of an error on Linux, macOS and Windows.
const EIO: i32 = 5;

const FILES: [&str; 2] = ["checkpoint-0.safetensors", "checkpoint-1.safetensors"];

/// After every block and iteration.
fn always(dir: &Path) -> Checkpoint {
    Checkpoint::in_dir(dir).every(Duration::ZERO)
}

/// How often a fit reaches each stage.
fn count_stages(fit: impl FnOnce()) -> BTreeMap<&'static str, usize> {
    let counts = Rc::new(RefCell::new(BTreeMap::new()));
    let counting = counts.clone();
    on_stage(Some(Box::new(move |stage| {
        *counting.borrow_mut().entry(stage).or_default() += 1;
        Ok(())
    })));
    fit();
    on_stage(None);
    counts.take()
}

/// Has this thread's work fail where it reaches a stage for the n-th time, once.
fn fail_at(stage: &'static str, n: usize, error: i32) {
    let left = Cell::new(n);
    on_stage(Some(Box::new(move |reached| {
        if reached == stage && left.get() > 0 {
            left.set(left.get() - 1);
            if left.get() == 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
        }
        Ok(())
    })));
}

fn io_code(result: &Result<Fit, Error>) -> Option<i32> {
    match result {
        Err(Error::Io { source, .. }) => source.raw_os_error(),
        _ => None,
    }
}

/// Of every device, metric and setting: a fit that ends after each of its checkpoints, within passes and between them, goes on with other
/// blocks and other memory.
#[test]
fn a_fit_goes_on_to_the_same_bits() {
    let folder = Folder::new("checkpoint-resume");
    let mut ended = 0;
    for device in devices() {
        for (dtype, metric) in [
            (DType::F32, Metric::SquaredEuclidean),
            (DType::F16, Metric::Cosine),
            (DType::F64, Metric::Dot),
            (DType::BF16, Metric::SquaredEuclidean),
        ] {
            let x = blobs(&[203, 5], 6, dtype, &mut rng(1));
            let weights = tensor(&[203], DType::F64, |i| [0.0, 1.0, 3.5, 0.1, 1e-9][i % 5]);
            let crowded = Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &ones(&[5, 5], dtype, &Device::Cpu)], 0).unwrap();
            let crowded = Init::Given(crowded.to_device(&device).unwrap());
            let plain = KMeans::new(6).metric(metric).max_iters(5).tol(1e-3);
            let source = Source::from_tensor(&x).unwrap();
            let elsewhere = pinned(&x, &device);
            for (i, settings) in [
                plain.clone(),
                plain.clone().tol(0.0).max_iters(0),
                plain.clone().n_init(3).max_iters(2),
                plain.clone().init(Init::KMeansPlusPlus).sample_weights(&weights),
                plain.clone().empty_clusters(EmptyClusters::Relocate).init(crowded),
            ]
            .into_iter()
            .enumerate()
            {
                let what = format!("{metric:?} {dtype:?}, setting {i} on {:?}", device.location());
                let whole = settings.fit_stream(&source, &options(&device, &source, 64, 1)).unwrap();
                let dir = folder.emptied("fit");
                let with = |rows, staying| options(&device, &source, rows, staying).checkpoint(always(&dir));
                let counts = count_stages(|| {
                    assert_same_fit(&settings.fit_stream(&source, &with(64, 1)).unwrap(), &whole, &what);
                });
                for n in 1..=counts["written"] {
                    folder.emptied("fit");
                    fail_at("written", n, EIO);
                    assert_eq!(io_code(&settings.fit_stream(&source, &with(64, 1))), Some(EIO), "{what}, {n}");
                    on_stage(None);
                    let (rows, staying) = [(64, 1), (203, 0), (50, 9), (7, 3), (1, 0)][n % 5];
                    let with = options(&device, &source, rows, staying).checkpoint(Checkpoint::in_dir(&dir));
                    let source = if n % 2 == 0 { &source } else { &elsewhere };
                    let fit = settings.fit_stream(source, &with).unwrap();
                    assert_same_fit(&fit, &whole, &format!("{what}, ended after checkpoint {n}"));
                    assert_eq!(fit.weights.map(|w| bits(&w)), whole.weights.as_ref().map(bits), "{what}");
                    ended += 1;
                }
            }
        }
    }
    assert!(ended >= 200, "{ended}");
    println!("ended {ended} times after a checkpoint");
}

/// Whoever fails, and whenever: as many ranks, more or fewer go on to the bits of one.
#[test]
fn a_fit_goes_on_with_other_ranks() {
    let folder = Folder::new("checkpoint-ranks");
    let x = blobs(&[203, 5], 6, DType::F32, &mut rng(11));
    let bytes: Vec<u8> = f64s(&x).into_iter().flat_map(|v| (v as f32).to_ne_bytes()).collect();
    // The rows, of which so many reads succeed.
    let source = |reads: usize| {
        let (bytes, left) = (bytes.clone(), AtomicUsize::new(reads));
        let read = move |rows: std::ops::Range<u64>, into: &mut [u8]| {
            left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
                .map_err(|_| io::Error::from_raw_os_error(EIO))?;
            into.copy_from_slice(&bytes[rows.start as usize * 20..rows.end as usize * 20]);
            Ok(())
        };
        Source::from_fn(203, 5, StoredType::F32, read).unwrap()
    };
    let (mut ended, mut resumed) = (0, 0);
    for device in devices() {
        for settings in [KMeans::new(6).max_iters(5).tol(1e-9), KMeans::new(6).n_init(2).max_iters(2).tol(0.0)] {
            let whole = settings.fit_stream(&source(usize::MAX), &options(&device, &source(0), 64, 1)).unwrap();
            for (before, after) in [(1, 3), (3, 1), (2, 2), (2, 5), (4, 1)] {
                for reads in (20..240).step_by(13) {
                    let dir = folder.emptied("fit");
                    let on = |ranks: usize, rows: usize, memory: usize| {
                        let options = on_each(&vec![device.clone(); ranks]).block_rows(rows).memory(memory);
                        options.checkpoint(always(&dir))
                    };
                    let what = format!("{reads} reads, {before} ranks, then {after}");
                    match settings.fit_stream(&source(reads), &on(before, 10, 8 * 10 * 20)) {
                        Ok(fit) => assert_same_fit(&fit, &whole, &what),
                        Err(error) => {
                            assert!(error.to_string().contains("function, rows"), "{what}: {error}");
                            ended += 1;
                        }
                    }
                    resumed += usize::from(dir.join(FILES[0]).exists());
                    let fit = settings.fit_stream(&source(usize::MAX), &on(after, 23, reads * 40)).unwrap();
                    assert_same_fit(&fit, &whole, &what);
                }
            }
        }
    }
    assert!(ended > 100 && resumed > 100, "{ended} {resumed}");
    println!("{ended} fits ended, {resumed} went on from a checkpoint");
}

/// Iterations go on where they were, a fit that is over is not repeated, and there are no more files than two.
#[test]
fn work_is_not_done_twice() {
    let folder = Folder::new("checkpoint-once");
    let x = blobs(&[300, 4], 9, DType::F32, &mut rng(5));
    let source = Source::from_tensor(&x).unwrap();
    for device in devices() {
        let dir = folder.emptied("fit");
        let with = options(&device, &source, 50, 2).checkpoint(Checkpoint::in_dir(&dir).every_iterations(2));
        let seen = Arc::new(Mutex::new(vec![]));
        // Random rows are a start from which neither run is over before its last iteration.
        let settings = KMeans::new(20).init(Init::Random).tol(0.0).n_init(2).max_iters(7);
        let whole = settings.fit_stream(&source, &options(&device, &source, 50, 2)).unwrap();
        let log = seen.clone();
        let logged = settings.on_iteration(move |i| log.lock().unwrap().push((i.run, i.iteration)));
        // At the start, after iterations 2, 4 and 6, and at the end of both runs.
        let counts = count_stages(|| drop(logged.fit_stream(&source, &with).unwrap()));
        assert_eq!((counts["written"], counts["iteration over"]), (10, 14));
        seen.lock().unwrap().clear();
        // Only the rows are labelled again, by the ends of both runs; those that stay on a GPU are one block.
        let counts = count_stages(|| assert_same_fit(&logged.fit_stream(&source, &with).unwrap(), &whole, "again"));
        assert_eq!(
            (counts.get("iteration over"), counts["block assigned"]),
            (None, if device.is_cpu() { 12 } else { 10 })
        );
        assert_eq!(*seen.lock().unwrap(), []);

        folder.emptied("fit");
        fail_at("centroids finished", 12, EIO);
        logged.fit_stream(&source, &with).unwrap_err();
        on_stage(None);
        seen.lock().unwrap().clear();
        assert_same_fit(&logged.fit_stream(&source, &with).unwrap(), &whole, "from iteration 4 of run 1");
        assert_eq!(*seen.lock().unwrap(), [(1, 5), (1, 6), (1, 7)]);
        let mut names: Vec<_> = fs::read_dir(&dir).unwrap().map(|f| f.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, FILES);

        // Within a pass, rows that have been added are not assigned again: four of six blocks are left, or 200 blocks of a row.
        for (rows, left) in [(50, 4), (1, 200)] {
            folder.emptied("fit");
            let with = |rows| options(&device, &source, rows, 0).checkpoint(always(&dir));
            let settings = KMeans::new(20).init(Init::Random).tol(0.0).max_iters(1);
            fail_at("block added", 3, EIO);
            settings.fit_stream(&source, &with(50)).unwrap_err();
            on_stage(None);
            let counts = count_stages(|| drop(settings.fit_stream(&source, &with(rows)).unwrap()));
            assert_eq!((counts["block added"], counts["block assigned"]), (left, left + 300usize.div_ceil(rows)));
        }
    }
}

/// A small fit that has ended after its first iterations, and the folder of its checkpoints.
fn ended(folder: &Folder, settings: &KMeans, source: &Source) -> PathBuf {
    let dir = folder.emptied("fit");
    fail_at("iteration over", 3, EIO);
    settings.fit_stream(source, &StreamOptions::new(&Device::Cpu).checkpoint(always(&dir))).unwrap_err();
    on_stage(None);
    dir
}

/// Other settings and other rows are refused with both values, and the files stay.
#[test]
fn checkpoints_of_another_fit_are_refused() {
    let folder = Folder::new("checkpoint-other");
    let x = blobs(&[120, 3], 5, DType::F32, &mut rng(6));
    let source = Source::from_tensor(&x).unwrap();
    let settings = KMeans::new(5).init(Init::Random).tol(0.0).max_iters(9);
    let dir = ended(&folder, &settings, &source);
    let files = || FILES.map(|name| fs::read(dir.join(name)).unwrap());
    let before = files();
    let with = StreamOptions::new(&Device::Cpu).checkpoint(always(&dir));
    let unread = Source::from_fn(120, 3, StoredType::F32, |_, _| panic!("a row is read")).unwrap();
    let of = |shape: &[usize]| tensor(shape, DType::F32, |i| 1.0 + i as f64);
    let refused = |settings: &KMeans, source: &Source| {
        let refused = settings.fit_stream(source, &with);
        let Err(Error::Mismatch { path, what, got, expected }) = refused else { panic!("{refused:?}") };
        assert!(FILES.iter().any(|name| path.ends_with(name)), "{path}");
        (what, got, expected)
    };
    for (other, what, got, expected) in [
        (settings.clone().max_iters(8), "max_iters", "9", "8"),
        (settings.clone().tol(0.25), "tol", "0", "0.25"),
        (settings.clone().seed(7), "seed", "0", "7"),
        (settings.clone().n_init(2), "n_init", "1", "2"),
        (settings.clone().metric(Metric::Dot), "metric", "squared_euclidean", "dot"),
        (settings.clone().init(Init::Even), "init", "random", "even"),
        (settings.clone().check_finite(false), "check_finite", "true", "false"),
        (settings.clone().empty_clusters(EmptyClusters::Relocate), "empty_clusters", "keep", "relocate"),
        (settings.clone().sample_weights(&of(&[120])), "sample_weights", "none", "of hash "),
        (settings.clone().init(Init::Given(of(&[5, 3]))), "init", "random", "given, of hash "),
        (KMeans::new(6).tol(0.0).max_iters(9), "k", "5", "6"),
    ] {
        let (of_what, of_file, of_fit) = refused(&other, &unread);
        assert_eq!((&of_what[..], &of_file[..]), (what, got));
        assert!(of_fit.starts_with(expected), "{of_fit}");
    }
    for (other, what, got, expected) in [
        (x.narrow(0, 0, 119).unwrap(), "rows", "120", "119"),
        (x.narrow(1, 0, 2).unwrap(), "columns", "3", "2"),
        (x.to_dtype(DType::F64).unwrap(), "dtype", "f32", "f64"),
    ] {
        assert_eq!(
            refused(&settings, &Source::from_tensor(&other).unwrap()),
            (what.into(), got.into(), expected.into())
        );
    }
    // One bit of one row, and two rows that change places.
    let mut values = x.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[200] = f32::from_bits(values[200].to_bits() ^ 1);
    let (what, got, expected) = refused(&settings, &Source::from_slice(&values, 3).unwrap());
    assert_eq!((&what[..], got.len(), expected.len()), ("the hash of the rows", 16, 16));
    assert_ne!(got, expected);
    let swapped = Tensor::cat(&[&x.narrow(0, 1, 119).unwrap(), &x.narrow(0, 0, 1).unwrap()], 0).unwrap();
    assert_eq!(refused(&settings, &Source::from_tensor(&swapped).unwrap()).0, "the hash of the rows");
    assert_eq!(files(), before);

    // Weights are told by their values, and the same in another type are the same.
    let [a, b] = [DType::F32, DType::F64].map(|t| settings.clone().sample_weights(&of(&[120]).to_dtype(t).unwrap()));
    ended(&folder, &a, &source);
    let whole = a.fit_stream(&source, &StreamOptions::new(&Device::Cpu)).unwrap();
    assert_same_fit(&b.fit_stream(&source, &with).unwrap(), &whole, "weights of another type");
}

/// Each read of a stream fails in turn, on the threads that read ahead, and a file changes in each iteration: the fit ends with the reason,
/// and goes on once rows are read again.
#[test]
fn a_fit_whose_reads_fail_goes_on() {
    let folder = Folder::new("checkpoint-reads");
    let x = blobs(&[200, 3], 5, DType::F32, &mut rng(8));
    let settings = KMeans::new(6).init(Init::Random).tol(1e-6).max_iters(4);
    let (reads, failing) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
    let data: Vec<u8> = f64s(&x).into_iter().flat_map(|v| (v as f32).to_ne_bytes()).collect();
    let source = Source::from_fn(200, 3, StoredType::F32, |rows, into| {
        if reads.fetch_add(1, Ordering::SeqCst) == failing.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        into.copy_from_slice(&data[12 * rows.start as usize..12 * rows.end as usize]);
        Ok(())
    });
    let (source, mut failed) = (source.unwrap(), 0);
    for device in devices() {
        let whole = settings.fit(&x.to_device(&device).unwrap()).unwrap();
        for (rows, staying) in [(10, 0), (10, 7), (5, 0), (25, 3)] {
            let with = |dir: &Path| options(&device, &source, rows, staying).checkpoint(always(dir));
            reads.store(0, Ordering::SeqCst);
            failing.store(usize::MAX, Ordering::SeqCst);
            settings.fit_stream(&source, &with(&folder.emptied("fit"))).unwrap();
            for read in (0..reads.load(Ordering::SeqCst)).filter(|&read| is_picked(&device, read)) {
                let dir = folder.emptied("fit");
                reads.store(0, Ordering::SeqCst);
                failing.store(read, Ordering::SeqCst);
                let refused = settings.fit_stream(&source, &with(&dir));
                assert_eq!(io_code(&refused), Some(EIO), "read {read} of blocks of {rows}: {refused:?}");
                failing.store(usize::MAX, Ordering::SeqCst);
                let fit = settings.fit_stream(&source, &with(&dir)).unwrap();
                assert_same_fit(&fit, &whole, &format!("after read {read} of blocks of {rows}"));
                failed += 1;
            }
        }
        let path = folder.0.join("x.npy");
        for (iteration, change) in
            (1..=4).flat_map(|i| [("shorter", i), ("longer", i), ("rewritten", i)].map(|c| (c.1, c.0)))
        {
            x.write_npy(&path).unwrap();
            let (bytes, file, dir) = (fs::read(&path).unwrap(), path.clone(), folder.emptied("fit"));
            let changed = settings.clone().on_iteration(move |i| {
                if i.iteration == iteration {
                    let file = fs::File::options().write(true).open(&file).unwrap();
                    match change {
                        "shorter" => file.set_len(bytes.len() as u64 - 1).unwrap(),
                        "longer" => file.set_len(bytes.len() as u64 + 1).unwrap(),
                        _ => file.set_modified(SystemTime::UNIX_EPOCH).unwrap(),
                    }
                }
            });
            let with = |source: &Source| options(&device, source, 10, 3).checkpoint(always(&dir));
            let source = Source::open(&path).unwrap();
            let refused = changed.fit_stream(&source, &with(&source));
            assert!(matches!(refused, Err(Error::Changed { .. })), "{change} in iteration {iteration}: {refused:?}");
            x.write_npy(&path).unwrap();
            let source = Source::open(&path).unwrap();
            assert_same_fit(&settings.fit_stream(&source, &with(&source)).unwrap(), &whole, change);
            failed += 1;
        }
    }
    assert!(failed >= 400, "{failed}");
    println!("failed {failed} times in a read");
}
