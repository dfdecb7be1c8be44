//! Labels in a file are those of `predict`, and a file is written whole or not at all.

use crate::{common::*, source::Folder, stream};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    testing::{on_each, on_stage},
    Checkpoint, EmptyClusters, Error, Init, KMeans, Source, StoredType, StreamOptions,
};
use std::{
    fs, io,
    ops::ControlFlow,
    sync::atomic::{AtomicUsize, Ordering},
};

#[test]
fn labels_are_written() {
    let folder = Folder::new("labels");
    for dtype in DTYPES {
        let x = blobs(&[203, 5], 6, dtype, &mut rng(1));
        let fit = KMeans::new(6).fit(&x).unwrap();
        let (source, path) = (Source::from_tensor(&x).unwrap(), folder.file("labels.npy"));
        for device in devices() {
            for rows in [203, 64, 1] {
                // Over the file of the turn before.
                fit.predict_to_npy(&source, &StreamOptions::new(&device).block_rows(rows), &path).unwrap();
                let bytes = fs::read(&path).unwrap();
                let npy = npyz::NpyFile::new(&bytes[..]).unwrap();
                assert_eq!((npy.shape(), npy.dtype().descr()), (&[203][..], "'<u4'".to_string()));
                assert_eq!(npy.into_vec::<u32>().unwrap(), u32s(&fit.labels));
                let read = Tensor::read_npy(&path).unwrap();
                assert_eq!((read.dtype(), u32s(&read)), (DType::U32, u32s(&fit.labels)));
            }
        }
    }
}

/// The labels in the file and all else are those of a fit of the same rows in memory, whoever has which rows.
#[test]
fn a_fit_leaves_its_labels_in_a_file() {
    let folder = Folder::new("labels-of-fits");
    let path = folder.file("labels.npy");
    for dtype in DTYPES {
        let x = blobs(&[203, 5], 6, dtype, &mut rng(3));
        let source = Source::from_tensor(&x).unwrap();
        let weights = tensor(&[203], DType::F64, |i| [0.0, 1.0, 3.5][i % 3]);
        let away = Tensor::cat(&[&x.narrow(0, 0, 1).unwrap(), &ones(&[5, 5], dtype, &Device::Cpu)], 0).unwrap();
        let plain = KMeans::new(6).max_iters(9).tol(1e-3);
        // Of these starts the best is neither the first nor the last.
        let cost = |seed| plain.clone().seed(seed).fit(&x).unwrap().inertia.to_scalar::<f64>().unwrap();
        let start = (0..).find(|&seed| cost(seed + 1) < cost(seed).min(cost(seed + 2))).unwrap();
        let settings = [
            plain.clone(),
            plain.clone().tol(0.0).max_iters(0),
            plain.clone().sample_weights(&weights).init(Init::KMeansPlusPlus),
            plain.clone().seed(start).n_init(3),
            plain.clone().empty_clusters(EmptyClusters::Relocate).init(Init::Given(away)),
            plain.clone().on_iteration(|i| {
                if i.iteration == 2 {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            }),
        ];
        for (i, settings) in settings.into_iter().enumerate() {
            let whole = settings.fit(&x).unwrap();
            for device in devices() {
                let several = on_each(&vec![device.clone(); 3]);
                for options in [
                    stream::options(&device, &source, 203, 1),
                    stream::options(&device, &source, 50, 2),
                    stream::options(&device, &source, 7, 0),
                    several.clone().block_rows(20).memory(8 * 20 * source.row_bytes()),
                    several,
                ] {
                    let what = format!("{dtype:?}, setting {i}: {options:?}");
                    let summary = settings.fit_stream_to_npy(&source, &options, &path).expect(&what);
                    let labels = Tensor::read_npy(&path).unwrap();
                    assert_eq!((labels.dtype(), labels.dims()), (DType::U32, &[203][..]), "{what}");
                    assert_same_fit(&summary.with_labels(labels).unwrap(), &whole, &what);
                    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "{what}");
                }
            }
        }
    }
}

/// A fit that goes on from a checkpoint, from one of a run that is over as well, leaves them in its own file.
#[test]
fn a_resumed_fit_leaves_its_labels_in_a_file() {
    let folder = Folder::new("labels-resumed");
    let (path, checkpoints) = (folder.file("labels.npy"), folder.file("run"));
    let x = blobs(&[200, 3], 4, DType::F32, &mut rng(4));
    let source = Source::from_tensor(&x).unwrap();
    for n_init in [1, 3] {
        let settings = KMeans::new(4).n_init(n_init).tol(0.0);
        let whole = settings.fit(&x).unwrap();
        let _ = fs::remove_dir_all(&checkpoints);
        fs::create_dir(&checkpoints).unwrap();
        let options = stream::options(&Device::Cpu, &source, 30, 0);
        let options = options.checkpoint(Checkpoint::in_dir(&checkpoints).every_iterations(1));
        for ends in [1, 3, usize::MAX, usize::MAX] {
            let calls = AtomicUsize::new(0);
            let ended =
                settings.clone().on_iteration(move |_| match calls.fetch_add(1, Ordering::SeqCst) + 1 == ends {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                });
            let summary = ended.fit_stream_to_npy(&source, &options, &path).unwrap();
            if ends == usize::MAX {
                let fit = summary.with_labels(Tensor::read_npy(&path).unwrap()).unwrap();
                assert_same_fit(&fit, &whole, "a fit that went on");
            }
        }
    }
}

/// Whatever ends a fit, at whichever of its blocks, the file is the one that was there before.
#[test]
fn a_file_stays_as_it_was_when_a_fit_fails() {
    let folder = Folder::new("labels-of-fit-fail");
    let path = folder.write("labels.npy", b"old");
    let x = blobs(&[200, 3], 4, DType::F32, &mut rng(5));
    let stays = || {
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    };
    let source = Source::from_tensor(&x).unwrap();
    let options = stream::options(&Device::Cpu, &source, 20, 0);
    let settings = KMeans::new(4).tol(0.0).max_iters(2);
    for failing in 0..10 {
        let mut before = failing;
        on_stage(Some(Box::new(move |stage| match stage {
            "write labels" if before == 0 => Err(io::ErrorKind::StorageFull.into()),
            "write labels" => {
                before -= 1;
                Ok(())
            }
            _ => Ok(()),
        })));
        let failed = settings.fit_stream_to_npy(&source, &options, &path);
        on_stage(None);
        let is_full = |e: &io::Error| e.kind() == io::ErrorKind::StorageFull;
        assert!(matches!(&failed, Err(Error::Io { source, .. }) if is_full(source)), "{failed:?}");
        stays();
    }
    // Reads of the last pass, by one rank and by several.
    let ranks = on_each(&[Device::Cpu, Device::Cpu, Device::Cpu]).block_rows(20).memory(8 * 20 * 12);
    for options in [options, ranks] {
        let reads = AtomicUsize::new(0);
        let read = |fails: usize| {
            let (x, reads) = (f64s(&x), &reads);
            reads.store(0, Ordering::SeqCst);
            let rows = move |rows: std::ops::Range<u64>, into: &mut [u8]| {
                if reads.fetch_add(1, Ordering::SeqCst) + 1 == fails {
                    return Err(io::Error::other("no more"));
                }
                let values = &x[3 * rows.start as usize..3 * rows.end as usize];
                into.copy_from_slice(&values.iter().flat_map(|&v| (v as f32).to_ne_bytes()).collect::<Vec<_>>());
                Ok(())
            };
            settings.fit_stream_to_npy(&Source::from_fn(200, 3, StoredType::F32, rows).unwrap(), &options, &path)
        };
        for back in 0..5 {
            read(usize::MAX).unwrap();
            let all = reads.load(Ordering::SeqCst);
            fs::write(&path, b"old").unwrap();
            let failed = read(all - back).unwrap_err();
            assert!(failed.to_string().ends_with("no more"), "{failed}");
            stays();
        }
    }
    // Settings that do not fit are refused before there is a file.
    on_stage(Some(Box::new(|stage| panic!("{stage}"))));
    let refused = KMeans::new(201).fit_stream_to_npy(&source, &StreamOptions::new(&Device::Cpu), &path);
    on_stage(None);
    assert!(matches!(refused, Err(Error::Range { argument: "k", .. })), "{refused:?}");
}

#[test]
fn a_file_stays_as_it_was_when_labels_fail() {
    let folder = Folder::new("labels-fail");
    let x = blobs(&[200, 3], 4, DType::F32, &mut rng(2));
    let fit = KMeans::new(4).fit(&x).unwrap();
    let bad = tensor(&[200, 3], DType::F32, |i| if i == 3 * 131 { f64::NAN } else { i as f64 });
    let path = folder.write("labels.npy", b"old");
    let options = StreamOptions::new(&Device::Cpu).block_rows(20);
    let refused = fit.predict_to_npy(&Source::from_tensor(&bad).unwrap(), &options, &path);
    assert!(matches!(refused, Err(Error::NonFinite { argument: "x", batch: 0, row: 131 })), "{refused:?}");
    assert_eq!(fs::read(&path).unwrap(), b"old");
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);

    let source = Source::from_tensor(&x).unwrap();
    for name in ["none/labels.npy", "labels.npy/labels.npy"] {
        let refused = fit.predict_to_npy(&source, &options, folder.file(name)).unwrap_err();
        assert!(matches!(&refused, Error::Io { path, .. } if path.ends_with(name)), "{refused:?}");
    }
}
