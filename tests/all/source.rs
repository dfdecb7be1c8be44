//! Sources: every format gives the rows that were written, whole and in pieces, on any thread; a file that is damaged, or that changes
//! after it was opened, is refused with the reason.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{testing::on_read, Error, Source, StoredType};
use half::{bf16, f16};
use proptest::prelude::*;
use rand::Rng;
use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicUsize, Ordering},
        Arc,
    },
    thread,
    time::Duration,
};

/// A folder that goes away with the test.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("flash-kmeans-source-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        // A file system may write back at once what replaces the contents of a file, which thousands of damaged ones would wait for.
        let _ = fs::remove_file(self.file(name));
        fs::write(self.file(name), bytes).unwrap();
        self.file(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub const STORED: [StoredType; 6] =
    [StoredType::U8, StoredType::I8, StoredType::F16, StoredType::BF16, StoredType::F32, StoredType::F64];

/// Whole numbers that every type holds exactly.
pub fn values(n: usize, d: usize, stored: StoredType) -> Vec<f64> {
    let from = if stored == StoredType::U8 { 0.0 } else { -128.0 };
    (0..n * d).map(|i| from + (i * 37 % 256) as f64).collect()
}

/// Values as a little-endian file has them.
pub fn little_endian(values: &[f64], stored: StoredType) -> Vec<u8> {
    let bytes = |v: f64| match stored {
        StoredType::U8 => vec![v as u8],
        StoredType::I8 => (v as i8).to_le_bytes().to_vec(),
        StoredType::F16 => f16::from_f64(v).to_le_bytes().to_vec(),
        StoredType::BF16 => bf16::from_f64(v).to_le_bytes().to_vec(),
        StoredType::F32 => (v as f32).to_le_bytes().to_vec(),
        _ => v.to_le_bytes().to_vec(),
    };
    values.iter().copied().flat_map(bytes).collect()
}

/// Rows as a source gives them.
fn read(source: &Source, rows: Range<u64>) -> Result<Vec<f64>, Error> {
    let count = (rows.end - rows.start) as usize;
    let mut bytes = vec![0xa5; count * source.row_bytes()];
    source.read(rows, &mut bytes)?;
    let t = Tensor::from_raw_buffer(&bytes, source.dtype(), &[count, source.shape().1], &Device::Cpu).unwrap();
    Ok(f64s(&t))
}

/// Reads everything whole, in pieces at odd offsets, and from four threads at once, and asks for what is not there.
#[track_caller]
pub fn assert_holds(source: &Source, expected: &[f64], stored: StoredType) {
    let (n, d) = source.shape();
    assert_eq!(source.stored_type(), stored);
    assert_eq!(expected.len() as u64, n * d as u64);
    assert_eq!(source.row_bytes(), d * source.dtype().size_in_bytes());
    assert_eq!(read(source, 0..n).unwrap(), expected, "{source:?} whole");
    for step in [1, 3, 7] {
        let pieces = (0..n).step_by(step).flat_map(|first| read(source, first..n.min(first + step as u64)).unwrap());
        assert_eq!(pieces.collect::<Vec<_>>(), expected, "{source:?} by {step}");
    }
    thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || {
                let mut rng = rng(seed);
                for _ in 0..50 {
                    let first = rng.random_range(0..n);
                    let end = rng.random_range(first..=n);
                    let part = &expected[first as usize * d..end as usize * d];
                    assert_eq!(read(source, first..end).unwrap(), part, "{source:?} {first}..{end}");
                }
            });
        }
    });
    let as_size = n as usize;
    let refused = read(source, 0..n + 1).unwrap_err();
    assert!(
        matches!(refused, Error::Range { argument: "rows.end", got, max, .. } if got == as_size + 1 && max == as_size)
    );
    let refused = source.read(n + 1..n + 1, &mut []).unwrap_err();
    assert!(matches!(refused, Error::Range { argument: "rows.start", .. }));
    let refused = source.read(0..1, &mut vec![0; source.row_bytes() + 1]).unwrap_err();
    assert!(matches!(refused, Error::Size { argument: "into", got, expected, .. } if got == expected + 1));
}

/// A `.npy` file.
fn npy(values: &[f64], [n, d]: [usize; 2], stored: StoredType, fortran: bool, big: bool) -> Vec<u8> {
    let name = match stored {
        StoredType::U8 => "u1",
        StoredType::I8 => "i1",
        StoredType::F16 => "f2",
        StoredType::F32 => "f4",
        _ => "f8",
    };
    let mark = if stored.size() == 1 {
        '|'
    } else if big {
        '>'
    } else {
        '<'
    };
    let python = if fortran { "True" } else { "False" };
    let header = format!("{{'descr': '{mark}{name}', 'fortran_order': {python}, 'shape': ({n}, {d}), }}");
    let header = format!("{header:<117}\n");
    let mut bytes = [b"\x93NUMPY\x01\x00".as_slice(), &118u16.to_le_bytes(), header.as_bytes()].concat();
    let by_column = || (0..d).flat_map(|j| (0..n).map(move |i| values[i * d + j])).collect::<Vec<_>>();
    let mut data = little_endian(&if fortran { by_column() } else { values.to_vec() }, stored);
    if big {
        data.chunks_exact_mut(stored.size()).for_each(<[u8]>::reverse);
    }
    bytes.extend(data);
    bytes
}

fn bin(values: &[f64], [n, d]: [u32; 2], stored: StoredType) -> Vec<u8> {
    [&n.to_le_bytes()[..], &d.to_le_bytes(), &little_endian(values, stored)].concat()
}

fn vecs(values: &[f64], d: usize, stored: StoredType) -> Vec<u8> {
    values.chunks(d).flat_map(|row| [&(d as i32).to_le_bytes()[..], &little_endian(row, stored)].concat()).collect()
}

/// Tensors of types and shapes, with a header as the format's definition has it.
fn safetensors(tensors: &[(&str, &str, &[usize], Vec<u8>)]) -> Vec<u8> {
    let (mut entries, mut data) = (vec![], vec![]);
    for (name, dtype, shape, bytes) in tensors {
        let ends = [data.len(), data.len() + bytes.len()];
        entries.push(format!("{name:?}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":{ends:?}}}"));
        data.extend(bytes);
    }
    let header = format!("{{{}}}", entries.join(","));
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat()
}

const N: usize = 23;
const D: usize = 5;

/// A small file of each format that needs no feature.
fn one_of_each() -> Vec<(&'static str, Vec<u8>, StoredType)> {
    let of = |stored| values(N, D, stored);
    let shape = [N as u32, D as u32];
    let (f32, u8, i8) = (StoredType::F32, StoredType::U8, StoredType::I8);
    let tensor = ("rows", "F32", &[N, D][..], little_endian(&of(f32), f32));
    vec![
        ("c.npy", npy(&of(f32), [N, D], f32, false, false), f32),
        ("fortran.npy", npy(&of(f32), [N, D], f32, true, false), f32),
        ("one.safetensors", safetensors(&[tensor]), f32),
        ("a.fbin", bin(&of(f32), shape, f32), f32),
        ("a.u8bin", bin(&of(u8), shape, u8), u8),
        ("a.i8bin", bin(&of(i8), shape, i8), i8),
        ("a.fvecs", vecs(&of(f32), D, f32), f32),
        ("a.bvecs", vecs(&of(u8), D, u8), u8),
    ]
}

#[test]
fn every_format_gives_the_rows_that_were_written() {
    let folder = Folder::new("formats");
    for (name, bytes, stored) in one_of_each() {
        let source = Source::open(folder.write(name, &bytes)).unwrap();
        assert_eq!(source.dtype(), if stored == StoredType::F32 { DType::F32 } else { DType::F16 });
        assert_holds(&source, &values(N, D, stored), stored);
    }
}

/// A system gives as few bytes as it likes, and signals interrupt it.
#[test]
fn every_format_is_read_a_few_bytes_at_a_time() {
    let folder = Folder::new("formats-short");
    let calls = Arc::new(AtomicUsize::new(0));
    for (name, bytes, stored) in one_of_each() {
        let path = folder.write(name, &bytes);
        for most in [1, 3, 64] {
            let calls = calls.clone();
            on_read(Some(Arc::new(move |asked| match calls.fetch_add(1, Ordering::SeqCst) % 3 {
                0 => Err(io::ErrorKind::Interrupted.into()),
                _ => Ok(asked.min(most)),
            })));
            let source = Source::open(&path).unwrap();
            on_read(None);
            assert_holds(&source, &values(N, D, stored), stored);
        }
    }
    assert!(calls.load(Ordering::SeqCst) > 1000);
}

#[test]
fn npy_is_read_in_both_orders_and_byte_orders_and_in_every_type() {
    let folder = Folder::new("npy");
    for stored in STORED.into_iter().filter(|stored| *stored != StoredType::BF16) {
        for (fortran, big) in [(false, false), (true, false), (false, true), (true, true)] {
            let v = values(N, D, stored);
            let source = Source::open(folder.write("a.npy", &npy(&v, [N, D], stored, fortran, big))).unwrap();
            assert_holds(&source, &v, stored);
        }
    }
    // Columns longer than what is read at a time.
    let v = values(300_000, 3, StoredType::F32);
    let source = Source::open(folder.write("long.npy", &npy(&v, [300_000, 3], StoredType::F32, true, false))).unwrap();
    assert_eq!(read(&source, 7..299_990).unwrap(), v[21..899_970]);
    // What Candle writes, under a name that says nothing.
    let x = Tensor::new(&[1f64, 2., 3.], &Device::Cpu).unwrap();
    x.write_npy(folder.file("vector")).unwrap();
    assert_holds(&Source::open(folder.file("vector")).unwrap(), &[1., 2., 3.], StoredType::F64);
}

#[test]
fn safetensors_give_the_tensor_that_is_named_or_the_only_one() {
    let folder = Folder::new("safetensors");
    let names = ["U8", "I8", "F16", "BF16", "F32", "F64"];
    let data = |stored| little_endian(&values(N, D, stored), stored);
    let tensors: Vec<_> =
        names.iter().zip(STORED).map(|(&name, stored)| (name, name, &[N, D][..], data(stored))).collect();
    let path = folder.write("six.safetensors", &safetensors(&tensors));
    for (name, stored) in names.into_iter().zip(STORED) {
        assert_holds(&Source::open_tensor(&path, name).unwrap(), &values(N, D, stored), stored);
    }
    let refused = Source::open(&path).unwrap_err().to_string();
    assert!(refused.contains("6 tensors could be rows: BF16, F16"), "{refused}");
    let refused = Source::open_tensor(&path, "F8").unwrap_err();
    assert!(
        matches!(&refused, Error::Mismatch { what, got, .. } if what == "tensor F8" && got == "missing"),
        "{refused}"
    );
    assert_ne!(
        Source::open_tensor(&path, "F16").unwrap().identity(),
        Source::open_tensor(&path, "BF16").unwrap().identity()
    );

    // What Candle writes, beside tensors that cannot be rows.
    let x = uniform(&[7, 3], 0.0, 1.0, DType::BF16, &mut rng(1));
    let ids = Tensor::arange(0u32, 7, &Device::Cpu).unwrap();
    let tensors = HashMap::from([("x".to_string(), x.clone()), ("ids".to_string(), ids)]);
    candle_core::safetensors::save(&tensors, folder.file("x.safetensors")).unwrap();
    assert_holds(&Source::open(folder.file("x.safetensors")).unwrap(), &f64s(&x), StoredType::BF16);
    let refused = Source::open_tensor(folder.file("x.safetensors"), "ids").unwrap_err().to_string();
    assert!(refused.contains("tensor ids is U32 of shape [7], expected"), "{refused}");
}

#[test]
fn memory_tensors_and_functions_are_read_alike() {
    let v = values(N, D, StoredType::F32);
    let f32s: Vec<f32> = v.iter().map(|&v| v as f32).collect();
    assert_holds(&Source::from_slice(&f32s[..], D).unwrap(), &v, StoredType::F32);
    assert_holds(&Source::from_slice(Arc::<[f32]>::from(&f32s[..]), D).unwrap(), &v, StoredType::F32);
    let i8s: Vec<i8> = v.iter().map(|&v| v as i8).collect();
    assert_holds(&Source::from_slice(i8s, D).unwrap(), &v, StoredType::I8);

    for dtype in DTYPES {
        let t = tensor(&[N, D], dtype, |i| v[i]);
        let stored = Source::from_tensor(&t).unwrap().stored_type();
        for laid in layouts(&t) {
            assert_holds(&Source::from_tensor(&laid.view).unwrap(), &v, stored);
        }
    }

    let bytes = little_endian(&v, StoredType::F32);
    let f = |rows: Range<u64>, into: &mut [u8]| {
        into.copy_from_slice(&bytes[rows.start as usize * D * 4..rows.end as usize * D * 4]);
        Ok(())
    };
    assert_holds(&Source::from_fn(N as u64, D, StoredType::F32, f).unwrap(), &v, StoredType::F32);
    let broken = Source::from_fn(9, D, StoredType::F32, |_, _| Err(io::Error::other("no network"))).unwrap();
    let refused = read(&broken, 2..5).unwrap_err().to_string();
    assert_eq!(refused, "function, rows 2..5: no network");
}

#[test]
fn parts_are_read_as_one_if_they_agree() {
    let folder = Folder::new("parts");
    let v = values(N, D, StoredType::U8);
    let cuts = [0, 1, 9, 10, N];
    let paths = cuts.windows(2).enumerate().map(|(i, cut)| {
        let part = &v[cut[0] * D..cut[1] * D];
        folder.write(&format!("{i}.u8bin"), &bin(part, [(cut[1] - cut[0]) as u32, D as u32], StoredType::U8))
    });
    let paths: Vec<PathBuf> = paths.collect();
    let open = || paths.iter().map(|path| Source::open(path).unwrap());
    let source = Source::concat(open()).unwrap();
    assert_holds(&source, &v, StoredType::U8);
    assert_eq!(source.identity().files.len(), 4);
    assert_holds(&Source::concat(open().map(|part| part.with_dtype(DType::F32).unwrap())).unwrap(), &v, StoredType::U8);

    let other = |path: PathBuf, what: &str, got: &str, expected: &str| {
        let refused = Source::concat(open().chain([Source::open(&path).unwrap()])).unwrap_err().to_string();
        let (name, first) = (path.display(), paths[0].display());
        assert_eq!(refused, format!("{name}: {what} is {got}, expected {expected} as in {first}"));
    };
    other(folder.write("d.u8bin", &bin(&v[..6], [1, 6], StoredType::U8)), "number of columns", "6", "5");
    other(folder.write("t.i8bin", &bin(&v[..5], [1, 5], StoredType::I8)), "type", "i8", "u8");
    assert!(matches!(Source::concat([]), Err(Error::Range { argument: "parts", got: 0, .. })));
}

#[test]
fn values_are_widened_only_where_that_is_exact() {
    for (stored, expected) in [(StoredType::U8, 4), (StoredType::I8, 4), (StoredType::F16, 3), (StoredType::F64, 1)] {
        let v = values(N, D, stored);
        let bytes = little_endian(&v, stored);
        let (size, bytes) = (D * stored.size(), &bytes);
        let open = || {
            Source::from_fn(N as u64, D, stored, move |rows, into| {
                into.copy_from_slice(&bytes[rows.start as usize * size..rows.end as usize * size]);
                Ok(())
            })
        };
        let mut exact = 0;
        for dtype in DTYPES {
            match open().unwrap().with_dtype(dtype) {
                Ok(source) => {
                    assert_eq!(source.dtype(), dtype);
                    assert_holds(&source, &v, stored);
                    exact += 1;
                }
                Err(Error::DType { argument: "dtype", got, .. }) => assert_eq!(got, dtype),
                Err(e) => panic!("{e}"),
            }
        }
        assert_eq!(exact, expected, "{stored}");
    }
}

#[test]
fn a_file_of_another_length_than_its_header_says_is_refused_with_both() {
    let folder = Folder::new("length");
    for (name, bytes, _) in one_of_each() {
        let whole = bytes.len() as u64;
        for (damaged, got) in [(&bytes[..bytes.len() - 1], whole - 1), (&[&bytes[..], &[0]].concat()[..], whole + 1)] {
            let path = folder.write(name, damaged);
            let refused = Source::open(&path).unwrap_err();
            // A file of counted rows has no header: it could have lost a part of a row, or of the next one.
            let row = if name.ends_with("vecs") { Some(whole / N as u64) } else { None };
            let next = row.map_or(whole, |row| got.next_multiple_of(row));
            assert!(
                matches!(&refused, Error::Length { path: p, got: g, expected } if *p == path.display().to_string() && *g == got && *expected == next),
                "{refused}"
            );
        }
        // Cut anywhere, it is refused, if there is not a smaller file of whole rows before the cut.
        for length in 0..bytes.len() {
            let opened = Source::open(folder.write(name, &bytes[..length]));
            let rows = name.ends_with("vecs") && length > 0 && length % (bytes.len() / N) == 0;
            assert_eq!(opened.is_ok(), rows, "{name} of {length} bytes");
        }
    }
}

#[test]
fn headers_of_huge_sizes_are_refused_before_memory_is_asked_for() {
    let folder = Folder::new("huge");
    let tensor = |shape: &[usize], ends| {
        format!("{{\"x\":{{\"dtype\":\"F64\",\"shape\":{shape:?},\"data_offsets\":[0,{ends}]}}}}").into_bytes()
    };
    let with_length = |header: Vec<u8>| [&(header.len() as u64).to_le_bytes()[..], &header].concat();
    let npy_header = |shape: &str| {
        let text = format!("{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}");
        [b"\x93NUMPY\x01\x00".as_slice(), &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
    };
    for (name, bytes) in [
        ("a.npy", npy_header("(4611686018427387904, 4)")),
        ("b.npy", npy_header("(18446744073709551615, 18446744073709551615)")),
        ("c.npy", npy_header("(1000000000000, 128)")),
        ("d.npy", [b"\x93NUMPY\x02\x00".as_slice(), &u32::MAX.to_le_bytes(), b"{'descr'"].concat()),
        ("a.fbin", bin(&[], [u32::MAX, u32::MAX], StoredType::F32)),
        ("a.fvecs", [&i32::MAX.to_le_bytes()[..], &[0; 40]].concat()),
        ("b.fvecs", [&(-5i32).to_le_bytes()[..], &[0; 40]].concat()),
        ("a.safetensors", [&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        ("b.safetensors", [&99_000_000u64.to_le_bytes()[..], b"{}"].concat()),
        ("c.safetensors", with_length(tensor(&[1 << 40, 1 << 40], 0))),
        ("d.safetensors", with_length(tensor(&[1 << 40, 4], 1u64 << 45))),
    ] {
        let refused = Source::open(folder.write(name, &bytes)).unwrap_err();
        assert!(matches!(refused, Error::Length { .. } | Error::Format { .. }), "{name}: {refused}");
    }
}

#[test]
fn other_files_are_refused_with_the_reason() {
    let folder = Folder::new("others");
    for (name, bytes, reason) in [
        ("a.npy", b"\x93NUMPX\x01\x00\x02\x00{}".to_vec(), "does not begin as .npy files"),
        ("v9.npy", b"\x93NUMPY\x09\x00\x02\x00{}".to_vec(), "does not begin as .npy files"),
        ("a.safetensors", [&2u64.to_le_bytes()[..], b"xy"].concat(), "cannot be read"),
        ("a.csv", b"1,2,3\n".to_vec(), "neither its extension, \"csv\""),
        ("none", vec![], "neither its extension"),
        ("n.npy", npy(&[], [0, 5], StoredType::F32, false, false), "0 rows and 5 columns"),
        ("d.npy", npy(&[], [5, 0], StoredType::F32, false, false), "5 rows and 0 columns"),
        ("n.fbin", bin(&[], [0, 5], StoredType::F32), "0 rows and 5 columns"),
        ("d.fbin", bin(&[], [5, 0], StoredType::F32), "5 rows and 0 columns"),
        ("d.fvecs", vec![0; 8], "2 rows and 0 columns"),
        ("n.safetensors", safetensors(&[("x", "F32", &[0, 5], vec![])]), "0 rows and 5 columns"),
        ("3.safetensors", safetensors(&[("x", "F32", &[1, 1, 1], vec![0; 4])]), "0 tensors could be rows"),
    ] {
        let refused = Source::open(folder.write(name, &bytes)).unwrap_err();
        assert!(matches!(refused, Error::Format { .. }) && refused.to_string().contains(reason), "{name}: {refused}");
    }
    assert!(matches!(Source::open(folder.file("missing.npy")), Err(Error::Io { .. })));
    assert!(matches!(Source::open(&folder.0), Err(Error::Format { reason, .. }) if reason.contains("regular file")));
    for (n, d) in [(0, 5), (5, 0)] {
        assert!(matches!(Source::from_fn(n, d, StoredType::F32, |_, _| Ok(())), Err(Error::Range { got: 0, .. })));
    }
    assert!(matches!(
        Source::from_slice([1f32, 2., 3.], 2),
        Err(Error::Size { argument: "data", got: 3, expected: 4, .. })
    ));
    assert!(matches!(Source::from_slice([0f32; 0], 2), Err(Error::Range { argument: "data", .. })));
    assert!(matches!(Source::from_slice([1f32], 0), Err(Error::Range { argument: "d", .. })));
    let t = |shape: &[usize], dtype| Tensor::ones(shape, dtype, &Device::Cpu).unwrap();
    assert!(matches!(Source::from_tensor(&t(&[3], DType::F32)), Err(Error::Rank { argument: "x", .. })));
    assert!(
        matches!(Source::from_tensor(&t(&[2, 3, 4], DType::F32)), Err(Error::Shape { expected, .. }) if expected == [6, 4])
    );
    assert!(matches!(Source::from_tensor(&t(&[2, 3], DType::U32)), Err(Error::DType { got: DType::U32, .. })));
}

#[test]
fn a_row_of_another_length_is_refused_with_its_number() {
    let folder = Folder::new("rows");
    let mut bytes = vecs(&values(N, D, StoredType::F32), D, StoredType::F32);
    bytes[17 * (4 + 4 * D)] = 6;
    let source = Source::open(folder.write("a.fvecs", &bytes)).unwrap();
    for rows in [0..N as u64, 17..18, 10..20] {
        match read(&source, rows).unwrap_err() {
            Error::Mismatch { what, got, expected, .. } => {
                assert_eq!([&what[..], &got, &expected], ["number of columns in row 17", "6", "5"])
            }
            e => panic!("{e}"),
        }
    }
    assert_eq!(read(&source, 0..17).unwrap(), values(N, D, StoredType::F32)[..17 * D]);
}

/// Changes a file after it was opened.
fn touch(path: &Path, bytes: &[u8], seconds: u64) {
    let before = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, bytes).unwrap();
    File::options().write(true).open(path).unwrap().set_modified(before + Duration::from_secs(seconds)).unwrap();
}

#[test]
fn a_file_that_changes_after_it_was_opened_is_refused() {
    let folder = Folder::new("changed");
    for (name, bytes, stored) in one_of_each() {
        let path = folder.write(name, &bytes);
        let (source, again) = (Source::open(&path).unwrap(), Source::open(&path).unwrap());
        assert_eq!(source.identity(), again.identity());
        assert_eq!(source.identity().to_string(), again.identity().to_string());
        assert_eq!(read(&source, 0..N as u64).unwrap(), values(N, D, stored));

        touch(&path, &bytes, 1);
        let refused = read(&source, 3..5).unwrap_err();
        assert!(matches!(&refused, Error::Changed { what: "modification time", .. }), "{refused}");
        assert_ne!(source.identity(), Source::open(&path).unwrap().identity());
        for (other, length) in
            [(&bytes[..bytes.len() - 1], bytes.len() - 1), (&[&bytes[..], b"x"].concat(), bytes.len() + 1)]
        {
            touch(&path, other, 1);
            for rows in [0..1, N as u64 - 1..N as u64] {
                match read(&source, rows).unwrap_err() {
                    Error::Changed { path: p, what: "length", got, expected } => {
                        assert_eq!(
                            [p, got, expected],
                            [path.display().to_string(), length.to_string(), bytes.len().to_string()]
                        )
                    }
                    e => panic!("{e}"),
                }
            }
        }
        // Another file in its place is not the one that was opened.
        let path = folder.write(name, &bytes);
        let source = Source::open(&path).unwrap();
        fs::rename(folder.write("other", &bytes[..9]), &path).unwrap();
        assert_eq!(read(&source, 0..N as u64).unwrap(), values(N, D, stored));
    }
}

/// Opens and reads what may be no file of its format.
pub fn try_all(path: &Path) {
    if let Ok(source) = Source::open(path) {
        // A damaged type may say that rows are of any length.
        let rows = (1 << 20) / source.row_bytes() as u64;
        let _ = read(&source, 0..source.shape().0.min(rows));
    }
}

#[test]
fn no_bit_of_a_header_makes_a_panic() {
    let folder = Folder::new("bits");
    for (name, bytes, _) in one_of_each() {
        for bit in 0..8 * bytes.len().min(140) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            try_all(&folder.write(name, &damaged));
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_make_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), small in 0u8..4) {
        let folder = Folder::new("any");
        for (name, whole, _) in one_of_each() {
            try_all(&folder.write(name, &bytes));
            // Small numbers, which are the likelier ones to be taken.
            try_all(&folder.write(name, &bytes.iter().map(|b| b % (small + 1)).collect::<Vec<_>>()));
            // After a beginning that is right.
            let kept = whole.len().min(128);
            try_all(&folder.write(name, &[&whole[..kept], &bytes[..]].concat()));
        }
    }
}
