//! Labels in a file are those of `predict`, and a file is written whole or not at all.

use crate::{common::*, source::Folder};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Error, KMeans, Source, StreamOptions};
use std::fs;

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
