//! Saved fits: they come back to the bit, and a damaged file is refused, never read as something else.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Error, Fit, KMeans};
use rand::Rng;
use std::{collections::HashMap, fs, path::PathBuf};

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("flash-kmeans-saved-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("fit.safetensors")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn load(path: &PathBuf) -> Result<Fit, Error> {
    KMeans::load(path, &Device::Cpu)
}

fn small_fit() -> Fit {
    KMeans::new(3).fit(&blobs(&[2, 20, 3], 3, DType::F32, &mut rng(40))).unwrap()
}

#[test]
fn come_back_whole() {
    let folder = Folder::new("whole");
    for device in devices() {
        for (metric, dtype) in METRICS.into_iter().flat_map(|m| DTYPES.map(|t| (m, t))) {
            for shape in [vec![60, 3], vec![2, 60, 3], vec![2, 2, 60, 3]] {
                let x = blobs(&shape, 3, dtype, &mut rng(1)).to_device(&device).unwrap();
                let fit = KMeans::new(3).metric(metric).fit(&x).unwrap();
                fit.save(folder.file()).unwrap();
                let back = KMeans::load(folder.file(), &device).unwrap();
                assert_same_fit(&fit, &back, "saved");
                assert_eq!(back.metric, metric);
                assert_same(&back.predict(&x).unwrap(), &fit.labels, "labels");
            }
        }
    }
    let names: Vec<_> = fs::read_dir(&folder.0).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(names, ["fit.safetensors"], "temporary files are gone");
}

#[test]
fn files_cut_short_are_refused() {
    let (folder, fit) = (Folder::new("short"), small_fit());
    fit.save(folder.file()).unwrap();
    let whole = fs::read(folder.file()).unwrap();
    for len in 0..whole.len() {
        fs::write(folder.file(), &whole[..len]).unwrap();
        let got = load(&folder.file());
        assert!(matches!(got, Err(Error::Format { .. })), "{len} of {} bytes: {got:?}", whole.len());
    }
    fs::write(folder.file(), [&whole[..], &[0]].concat()).unwrap();
    assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "one byte too many");
}

/// Changed bytes may change numbers; they may not make a fit that breaks later, or a panic.
#[test]
fn damaged_headers_are_refused_or_harmless() {
    let (folder, fit) = (Folder::new("damaged"), small_fit());
    fit.save(folder.file()).unwrap();
    let whole = fs::read(folder.file()).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let x = blobs(&[2, 20, 3], 3, DType::F32, &mut rng(40));
    let mut rng = rng(41);
    for at in 0..header {
        for _ in 0..2 {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << rng.random_range(0..8);
            fs::write(folder.file(), &bytes).unwrap();
            match load(&folder.file()) {
                Err(Error::Format { .. }) => {}
                Err(other) => panic!("byte {at}: {other:?}"),
                Ok(back) => {
                    let same =
                        [(&back.centroids, &fit.centroids), (&back.labels, &fit.labels), (&back.inertia, &fit.inertia)];
                    for (back, saved) in same {
                        assert_eq!((back.dims(), back.dtype()), (saved.dims(), saved.dtype()), "byte {at}");
                    }
                    let _ = back.predict(&x);
                }
            }
        }
    }
}

/// ferrox#56: sizes of a header multiplied without a check wrap around to something small.
#[test]
fn ferrox_56_header_product_wraps() {
    let folder = Folder::new("wraps");
    for (shape, end) in
        [("[4294967296,4294967296]", 0u64), ("[9223372036854775808,2]", 0), ("[2,2]", u64::MAX), ("[0,0]", 0)]
    {
        let tensor = format!("\"centroids\":{{\"dtype\":\"F32\",\"shape\":{shape},\"data_offsets\":[0,{end}]}}");
        let meta = "\"__metadata__\":{\"candle_flash_kmeans\":\"1\",\"metric\":\"dot\"}";
        let header = format!("{{{meta},{tensor}}}");
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
        fs::write(folder.file(), bytes).unwrap();
        assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "{shape}");
    }
    for length in [u64::MAX, 1 << 62, 1 << 40, 1_000_000] {
        fs::write(folder.file(), length.to_le_bytes()).unwrap();
        assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "a header of {length} bytes");
    }
}

#[test]
fn other_files_are_refused() {
    let folder = Folder::new("other");
    let ones = |shape: &[usize]| Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("centroids", ones(&[2, 2]))]), folder.file()).unwrap();
    assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "no mark of ours");
    small_fit().save(folder.file()).unwrap();
    let whole = fs::read(folder.file()).unwrap();
    for (text, other) in
        [("kmeans\":\"1\"", "kmeans\":\"2\""), ("flash_kmeans", "flash_kmeanz"), ("squared_", "sqvared_")]
    {
        let at = whole.windows(text.len()).position(|w| w == text.as_bytes()).expect("the text is in the header");
        let mut bytes = whole.clone();
        bytes[at..at + text.len()].copy_from_slice(other.as_bytes());
        fs::write(folder.file(), bytes).unwrap();
        assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "{other}");
    }
    fs::write(folder.file(), b"not a model at all, but text").unwrap();
    assert!(matches!(load(&folder.file()), Err(Error::Format { .. })));
    assert!(matches!(load(&folder.0.join("none")), Err(Error::Io { .. })));
    assert!(matches!(load(&folder.0), Err(Error::Io { .. })), "a folder");
    assert!(matches!(small_fit().save(folder.0.join("no/such/fit")), Err(Error::Io { .. })));
}

/// ferrosa#399: one name for the temporary file, so that writers of one path destroy each other's.
#[test]
fn ferrosa_399_two_writers() {
    let (folder, fit) = (Folder::new("writers"), small_fit());
    fit.save(folder.file()).unwrap();
    let failures: usize = std::thread::scope(|scope| {
        let writer = || (0..25).filter(|_| fit.save(folder.file()).is_err() || load(&folder.file()).is_err()).count();
        let writers: Vec<_> = (0..8).map(|_| scope.spawn(writer)).collect();
        writers.into_iter().map(|w| w.join().unwrap()).sum()
    });
    assert_eq!(failures, 0, "of 200 saves and loads");
    assert_same_fit(&load(&folder.file()).unwrap(), &fit, "afterwards");
}
