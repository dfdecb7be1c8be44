//! Files: everything that is read is checked.

use super::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook, GainShapeQuantizer, ProductQuantizer, ResidualQuantizer},
    Error, Fit, KMeans, Metric, MiniBatch, Segments,
};
use rand::Rng;
use std::{collections::HashMap, fs, path::PathBuf};

/// A folder that goes away with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("flash-kmeans-files-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("saved.safetensors")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn small() -> Fit {
    KMeans::new(2).fit(&blobs(&[2, 5, 1], 2, DType::F32, &mut rng(1))).unwrap()
}

/// Calls everything that takes a fit. What does not go well has to be an error.
fn use_whole(fit: &Fit, x: &Tensor, folder: &Folder) {
    let _ = (fit.predict(x), fit.transform(x), format!("{fit} {fit:?}"));
    let _ = fit.save(folder.0.join("again"));
    let _ = MiniBatch::from_fit(fit).and_then(|mut running| running.step(x));
    let _ = Segments::from_fit(&small()).unwrap().append(fit);
    if let Ok(mut segments) = Segments::from_fit(fit) {
        segments.append(fit).unwrap();
    }
}

/// Loads the file with each bit flipped and cut at each length: an error of the promised type, or a value that works.
fn damage<T>(folder: &Folder, load: impl Fn(&PathBuf) -> Result<T, Error>, works: impl Fn(T)) {
    let whole = fs::read(folder.file()).unwrap();
    load(&folder.file()).map(&works).unwrap();
    let mut accepted = 0;
    for bit in 0..8 * whole.len() {
        let mut bytes = whole.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        fs::write(folder.file(), &bytes).unwrap();
        match load(&folder.file()) {
            Ok(loaded) => {
                accepted += 1;
                works(loaded);
            }
            Err(Error::Format { .. }) => {}
            Err(other) => panic!("bit {bit}: {other:?}"),
        }
    }
    // Most bits of numbers make other numbers.
    assert!(accepted < 8 * whole.len() / 2, "{accepted} of {} damaged files were accepted", 8 * whole.len());
    for length in 0..whole.len() {
        fs::write(folder.file(), &whole[..length]).unwrap();
        assert!(matches!(load(&folder.file()), Err(Error::Format { .. })), "{length} bytes");
    }
}

#[test]
fn a_damaged_fit_is_refused_or_works() {
    let (folder, fit) = (Folder::new("fit"), small());
    let x = blobs(&[2, 5, 1], 2, DType::F32, &mut rng(1));
    fit.save(folder.file()).unwrap();
    damage(&folder, |path| KMeans::load(path, &Device::Cpu), |fit| use_whole(&fit, &x, &folder));
}

#[test]
fn damaged_codebooks_are_refused_or_work() {
    let folder = Folder::new("codebooks");
    let x = blobs(&[6, 2], 2, DType::F32, &mut rng(2));
    let (cpu, kmeans) = (&Device::Cpu, KMeans::new(2));
    Codebook::train(&x, &kmeans).unwrap().save(folder.file()).unwrap();
    damage(&folder, |path| Codebook::load(path, cpu), |c| drop(c.encode(&x).and_then(|codes| c.decode(&codes))));
    ProductQuantizer::train(&x, 2, &kmeans).unwrap().save(folder.file()).unwrap();
    damage(
        &folder,
        |path| ProductQuantizer::load(path, cpu),
        |c| drop(c.encode(&x).and_then(|codes| c.decode(&codes))),
    );
    ResidualQuantizer::train(&x, 2, &kmeans).unwrap().save(folder.file()).unwrap();
    damage(
        &folder,
        |path| ResidualQuantizer::load(path, cpu),
        |c| drop(c.encode(&x).and_then(|codes| c.decode(&codes))),
    );
    GainShapeQuantizer::train(&x, &kmeans, &kmeans).unwrap().save(folder.file()).unwrap();
    damage(&folder, |path| GainShapeQuantizer::load(path, cpu), |c| drop(c.encode(&x)));
    EmaCodebook::train(&x, &kmeans, Ema::default()).unwrap().save(folder.file()).unwrap();
    damage(&folder, |path| EmaCodebook::load(path, cpu), |mut c| drop(c.step(&x)));
}

/// Each field of a fit in a dtype, of a shape and with values that it cannot have.
#[test]
fn every_field_is_checked() {
    let (folder, fit) = (Folder::new("fields"), small());
    fit.save(folder.file()).unwrap();
    let good = candle_core::safetensors::load(folder.file(), &Device::Cpu).unwrap();
    let write = |tensors: &HashMap<String, Tensor>, metric: &str| {
        let metadata = [("candle_flash_kmeans", "1"), ("metric", metric)].map(|(k, v)| (k.to_string(), v.to_string()));
        let bytes = safetensors::serialize(tensors, Some(metadata.into())).unwrap();
        fs::write(folder.file(), bytes).unwrap();
        KMeans::load(folder.file(), &Device::Cpu)
    };
    write(&good, "squared_euclidean").unwrap();
    let refused = |name: &str, tensor: Tensor, says: &str| {
        let mut tensors = good.clone();
        tensors.insert(name.into(), tensor);
        match write(&tensors, "squared_euclidean") {
            Err(Error::Format { reason, .. }) => assert!(reason.contains(says), "{name}: {reason:?} lacks {says:?}"),
            other => panic!("{name} with {says:?}: {other:?}"),
        }
    };
    for (name, t) in &good {
        let mut missing = good.clone();
        missing.remove(name);
        assert!(matches!(write(&missing, "dot"), Err(Error::Format { .. })), "{name} is missing");
        refused(name, t.to_dtype(DType::I64).unwrap(), "I64");
        let other = if t.dtype() == DType::U32 { DType::F32 } else { DType::U32 };
        refused(name, t.to_dtype(other).unwrap(), &format!("{other:?}"));
        refused(name, t.unsqueeze(0).unwrap(), "");
        refused(name, t.flatten_all().unwrap().narrow(0, 0, 1).unwrap(), "");
    }
    let like = |name: &str, at: usize, value: f64| {
        let t = &good[name];
        let mut values = f64s(t);
        values[at] = value;
        Tensor::from_vec(values, t.dims(), &Device::Cpu).unwrap().to_dtype(t.dtype()).unwrap()
    };
    refused("labels", like("labels", 7, 2.0), "labels: 2");
    refused("labels", like("labels", 0, u32::MAX as f64), "labels: 4294967295");
    let label = u32s(&fit.labels)[0];
    refused("labels", like("labels", 0, (1 - label) as f64), "batch element 0 with counts");
    let count = u32s(&fit.counts)[2];
    refused("counts", like("counts", 2, (count + 1) as f64), "batch element 1 with counts");
    refused("counts", like("counts", 3, u32::MAX as f64), "batch element 1 with counts");
    for bad in [f64::NAN, f64::INFINITY] {
        refused("centroids", like("centroids", 1, bad), "NaN or an infinity");
    }
    refused("inertia", like("inertia", 1, f64::NAN), "inertia");
    refused("inertia", like("inertia", 0, -1.0), "inertia");
    refused("converged", like("converged", 1, 2.0), "convergence");
    refused("n_iter", like("n_iter", 0, 0.0), "iteration");
    for metric in ["", "euclid", "Dot"] {
        assert!(matches!(write(&good, metric), Err(Error::Format { .. })), "{metric}");
    }
}

/// Garbled, empty and foreign files, and headers that promise more than there is.
#[test]
fn foreign_files_are_refused_unread() {
    let folder = Folder::new("foreign");
    let mut rng = rng(3);
    let is_refused = |bytes: &[u8], what: &str| {
        fs::write(folder.file(), bytes).unwrap();
        let load = KMeans::load(folder.file(), &Device::Cpu);
        assert!(matches!(load, Err(Error::Format { .. })), "{what}: {load:?}");
        assert!(matches!(Codebook::load(folder.file(), &Device::Cpu), Err(Error::Format { .. })), "{what}");
    };
    is_refused(b"", "empty");
    is_refused(&[0; 8], "a header of nothing");
    is_refused(&[0xff; 64], "a header of everything");
    for length in [9, 100, 4096] {
        is_refused(&(0..length).map(|_| rng.random()).collect::<Vec<u8>>(), "garbage");
    }
    // A terabyte that is not there: its header is ours, or empty.
    for header in [&b""[..], br#"{"__metadata__":{"candle_flash_kmeans":"1"}}"#] {
        let start = [&(header.len() as u64).to_le_bytes()[..], header].concat();
        is_refused(&start, "no tensors");
        let file = fs::File::options().write(true).open(folder.file()).unwrap();
        if header.is_empty() && file.set_len(1 << 40).is_ok() {
            assert!(matches!(KMeans::load(folder.file(), &Device::Cpu), Err(Error::Format { .. })), "a sparse file");
        }
    }
}

/// A fit whose fields a user has changed is refused where it is used, whatever they are.
#[test]
fn changed_fields_are_refused() {
    let folder = Folder::new("changed");
    for device in devices() {
        let x = blobs(&[2, 9, 2], 2, DType::F32, &mut rng(4)).to_device(&device).unwrap();
        let fit = KMeans::new(3).fit(&x).unwrap();
        fit.save(folder.file()).unwrap();
        let full = |shape: &[usize], v: f64| tensor(shape, DType::U32, |_| v).to_device(&device).unwrap();
        type Change = fn(&mut Fit, Tensor);
        let fields: [Change; 6] = [
            |fit, t| fit.centroids = t,
            |fit, t| fit.labels = t,
            |fit, t| fit.counts = t,
            |fit, t| fit.inertia = t,
            |fit, t| fit.n_iter = t,
            |fit, t| fit.converged = t,
        ];
        for (field, change) in fields.into_iter().enumerate() {
            for other in [
                Tensor::new(1f32, &device).unwrap(),
                full(&[1], 0.0),
                full(&[2, 9], 7.0),
                full(&[2, 9], u32::MAX as f64),
                full(&[2, 3], 99.0),
                ones(&[2, 9], DType::F64, &device),
                ones(&[2, 0, 2], DType::F32, &device),
                ones(&[2, 3], DType::F64, &device),
                ones(&[0], DType::U32, &device),
            ] {
                let mut changed = fit.clone();
                change(&mut changed, other);
                assert!(changed.save(folder.file()).is_err(), "field {field}");
                use_whole(&changed, &x, &folder);
            }
        }
        // The labels and counts of another problem fit, and are used.
        let mut other = fit.clone();
        other.labels = full(&[2, 9], 2.0);
        other.counts = Tensor::new(&[[0u32, 0, 9], [0, 0, 9]], &device).unwrap();
        other.save(folder.file()).unwrap();
        other.labels = full(&[2, 9], 3.0);
        if device.is_cpu() {
            assert!(matches!(Segments::from_fit(&other), Err(Error::Range { argument: "labels", got: 3, .. })));
            assert!(other.to_string().contains("labels: 3 is outside 0..=2"), "{other}");
        }
        // The one that is saved is the last that could be.
        assert_eq!(u32s(&KMeans::load(folder.file(), &device).unwrap().counts), [0, 0, 9, 0, 0, 9]);
    }
}

/// Metadata in the order of a hash map make other bytes of the same contents.
#[test]
fn two_saves_are_the_same_bytes() {
    let folder = Folder::new("same");
    let x = blobs(&[2, 40, 4], 3, DType::F32, &mut rng(5));
    let kmeans = KMeans::new(3);
    let fit = kmeans.clone().metric(Metric::Manhattan).fit(&x).unwrap();
    let residual = ResidualQuantizer::train(&x, 4, &kmeans).unwrap();
    let ema = EmaCodebook::train(&x, &kmeans, Ema::default()).unwrap();
    type Save<'a> = &'a dyn Fn() -> Result<(), Error>;
    let saves: [(&str, Save<'_>); 3] = [
        ("fit", &|| fit.save(folder.file())),
        ("residual quantizer", &|| residual.save(folder.file())),
        ("codebook", &|| ema.save(folder.file())),
    ];
    for (what, save) in saves {
        let bytes = || {
            save().unwrap();
            fs::read(folder.file()).unwrap()
        };
        let first = bytes();
        assert!((0..20).all(|_| bytes() == first), "{what}");
        // The library reads them as it does its own, tensors at multiples of eight bytes.
        assert!(safetensors::SafeTensors::deserialize(&first).unwrap().len() >= 2, "{what}");
        assert_eq!(u64::from_le_bytes(first[..8].try_into().unwrap()) % 8, 0, "{what}");
    }
}

/// A file that is linked to from elsewhere stays linked.
#[cfg(unix)]
#[test]
fn links_are_written_through() {
    use std::os::unix::fs::symlink;
    let (folder, fit) = (Folder::new("links"), small());
    let (real, place) = (folder.0.join("real"), |name: &str| folder.0.join(name));
    fs::create_dir(&real).unwrap();
    symlink("real/fit", place("relative")).unwrap();
    symlink(real.join("fit"), place("absolute")).unwrap();
    symlink("relative", place("chain")).unwrap();
    symlink("loop", place("loop")).unwrap();
    // The first of them leads to nothing yet.
    for link in ["relative", "absolute", "chain"] {
        fit.save(place(link)).unwrap();
        assert!(fs::symlink_metadata(place(link)).unwrap().is_symlink(), "{link} is a file now");
        assert_same_fit(&KMeans::load(real.join("fit"), &Device::Cpu).unwrap(), &fit, link);
        fs::remove_file(real.join("fit")).unwrap();
    }
    assert!(matches!(fit.save(place("loop")), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(&real).unwrap().count(), 0, "temporary files are gone");
    // Names as long as a file system has them.
    let long = place(&"n".repeat(255));
    fit.save(&long).unwrap();
    assert_same_fit(&KMeans::load(&long, &Device::Cpu).unwrap(), &fit, "a long name");
}
