//! Sources of Parquet and Arrow files: columns of lists and of numbers, of any type and coding, and what is refused of them.

use crate::{
    common::rng,
    source::{assert_holds, try_all, values, Folder, STORED},
};
use arrow_array::{
    builder::{FixedSizeListBuilder, LargeListBuilder, ListBuilder, PrimitiveBuilder},
    types::{ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, UInt8Type},
    Array, ArrayRef, RecordBatch, StringArray,
};
use arrow_ipc::{
    writer::{FileWriter, IpcWriteOptions},
    CompressionType,
};
use candle_flash_kmeans::{Error, Source, StoredType};
use half::f16;
use rand::Rng;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

const N: usize = 53;
const D: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Lists {
    Fixed,
    Offsets,
    LargeOffsets,
}

/// A column of lists of these lengths, which takes its values one after another; one without a value is null.
fn lists<P: ArrowPrimitiveType>(kind: Lists, rows: &[Option<Vec<P::Native>>]) -> ArrayRef {
    fn values<P: ArrowPrimitiveType>() -> PrimitiveBuilder<P> {
        PrimitiveBuilder::new()
    }
    match kind {
        Lists::Fixed => {
            let mut lists = FixedSizeListBuilder::new(values::<P>(), D as i32);
            for row in rows {
                match row {
                    Some(row) => lists.values().append_slice(row),
                    None => lists.values().append_nulls(D),
                }
                lists.append(row.is_some());
            }
            Arc::new(lists.finish())
        }
        Lists::Offsets => {
            let mut lists = ListBuilder::new(values::<P>());
            rows.iter().for_each(|row| {
                row.iter().for_each(|row| lists.values().append_slice(row));
                lists.append(row.is_some())
            });
            Arc::new(lists.finish())
        }
        Lists::LargeOffsets => {
            let mut lists = LargeListBuilder::new(values::<P>());
            rows.iter().for_each(|row| {
                row.iter().for_each(|row| lists.values().append_slice(row));
                lists.append(row.is_some())
            });
            Arc::new(lists.finish())
        }
    }
}

/// A column of numbers.
fn numbers<P: ArrowPrimitiveType>(values: impl IntoIterator<Item = Option<P::Native>>) -> ArrayRef {
    Arc::new(
        values
            .into_iter()
            .collect::<Vec<_>>()
            .into_iter()
            .fold(PrimitiveBuilder::<P>::new(), |mut column, value| {
                column.append_option(value);
                column
            })
            .finish(),
    )
}

/// Values of any type as whole rows of lists.
fn rows(kind: Lists, stored: StoredType) -> ArrayRef {
    fn of<P: ArrowPrimitiveType>(kind: Lists, stored: StoredType, convert: impl Fn(f64) -> P::Native) -> ArrayRef {
        let row = |row: &[f64]| Some(row.iter().map(|&v| convert(v)).collect());
        lists::<P>(kind, &values(N, D, stored).chunks(D).map(row).collect::<Vec<_>>())
    }
    match stored {
        StoredType::U8 => of::<UInt8Type>(kind, stored, |v| v as u8),
        StoredType::I8 => of::<Int8Type>(kind, stored, |v| v as i8),
        StoredType::F16 => of::<Float16Type>(kind, stored, f16::from_f64),
        StoredType::F32 => of::<Float32Type>(kind, stored, |v| v as f32),
        _ => of::<Float64Type>(kind, stored, |v| v),
    }
}

fn text() -> ArrayRef {
    Arc::new(StringArray::from_iter_values((0..N).map(|i| format!("row {i}"))))
}

fn batch(columns: &[(&str, ArrayRef)]) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.iter().map(|(name, column)| (*name, column.clone(), true)))
        .unwrap()
}

/// Written in batches of so many rows.
fn write_arrow(path: &Path, batch: &RecordBatch, at_once: usize, compression: Option<CompressionType>) {
    let options = IpcWriteOptions::default().try_with_compression(compression).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer = FileWriter::try_new_with_options(file, &batch.schema(), options).unwrap();
    for first in (0..batch.num_rows()).step_by(at_once) {
        writer.write(&batch.slice(first, at_once.min(batch.num_rows() - first))).unwrap();
    }
    writer.finish().unwrap();
}

#[cfg(feature = "parquet")]
fn write_parquet(path: &Path, batch: &RecordBatch, at_once: usize, compression: parquet::basic::Compression) {
    use parquet::{arrow::ArrowWriter, file::properties::WriterProperties};
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(at_once));
    let properties = properties.set_compression(compression).set_data_page_row_count_limit(5).set_write_batch_size(5);
    let file = fs::File::create(path).unwrap();
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties.build())).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
}

/// The same batch in a file of every kind, with what its name should say.
fn write_each(folder: &Folder, batch: &RecordBatch) -> Vec<PathBuf> {
    let (lz4, zstd) = (CompressionType::LZ4_FRAME, CompressionType::ZSTD);
    let mut paths = vec![];
    for (name, compression) in [("plain.arrow", None), ("lz4.feather", Some(lz4)), ("zstd.ipc", Some(zstd))] {
        paths.push(folder.file(name));
        write_arrow(&folder.file(name), batch, 20, compression);
    }
    #[cfg(feature = "parquet")]
    {
        use parquet::basic::Compression;
        for (name, compression) in [
            ("plain.parquet", Compression::UNCOMPRESSED),
            ("snappy.parquet", Compression::SNAPPY),
            ("gzip.parquet", Compression::GZIP(Default::default())),
            ("lz4.parquet", Compression::LZ4_RAW),
            ("zstd.parquet", Compression::ZSTD(Default::default())),
        ] {
            paths.push(folder.file(name));
            write_parquet(&folder.file(name), batch, 20, compression);
        }
    }
    paths
}

#[test]
fn columns_of_lists_are_rows() {
    let folder = Folder::new("lists");
    for stored in STORED.into_iter().filter(|stored| *stored != StoredType::BF16) {
        for kind in [Lists::Fixed, Lists::Offsets, Lists::LargeOffsets] {
            let columns = [("text", text()), ("x", rows(kind, stored)), ("more", text())];
            for path in write_each(&folder, &batch(&columns)) {
                assert_holds(&Source::open(&path).unwrap(), &values(N, D, stored), stored);
                assert_holds(&Source::open_columns(&path, &["x"]).unwrap(), &values(N, D, stored), stored);
            }
        }
    }
}

#[test]
fn columns_of_numbers_are_the_columns_of_rows() {
    let folder = Folder::new("numbers");
    let v = values(N, D, StoredType::F32);
    let column = |j: usize| numbers::<Float32Type>((0..N).map(|i| Some(v[i * D + j] as f32)));
    // Not in the order in which they are asked for.
    let columns = [("c", column(2)), ("text", text()), ("a", column(0)), ("b", column(1))];
    for path in write_each(&folder, &batch(&columns)) {
        assert_holds(&Source::open_columns(&path, &["a", "b", "c"]).unwrap(), &v, StoredType::F32);
        let b: Vec<_> = v.iter().skip(1).step_by(D).copied().collect();
        assert_holds(&Source::open_columns(&path, &["b"]).unwrap(), &b, StoredType::F32);
        let identity = |names: &[&str]| Source::open_columns(&path, names).unwrap().identity();
        assert_ne!(identity(&["a"]), identity(&["b"]));
    }
}

#[test]
fn columns_that_are_no_rows_are_refused_by_name() {
    let folder = Folder::new("refused");
    let (f32s, f64s) = (rows(Lists::Fixed, StoredType::F32), numbers::<Float64Type>((0..N).map(|i| Some(i as f64))));
    let singles = numbers::<Float32Type>((0..N).map(|i| Some(i as f32)));
    let columns = [("text", text()), ("x", f32s.clone()), ("y", f32s), ("f64", f64s), ("f32", singles)];
    for path in write_each(&folder, &batch(&columns)) {
        let refused = Source::open(&path).unwrap_err().to_string();
        assert!(refused.ends_with("2 columns of lists could be rows, expected one, or names"), "{refused}");
        for (names, what, got, expected) in [
            (&["z"][..], "column z", "missing", "one of 5 columns"),
            (&["text"], "column text", "Utf8", "f16, f32, f64, u8 or i8, or lists of these"),
            (&["f64", "f32"], "column f32", "Float32", "f64 as column f64"),
        ] {
            let refused = Source::open_columns(&path, names).unwrap_err().to_string();
            assert_eq!(refused, format!("{}: {what} is {got}, expected {expected}", path.display()));
        }
        let refused = Source::open_columns(&path, &["x", "f32"]).unwrap_err();
        assert!(matches!(&refused, Error::Mismatch { what, .. } if what == "column f32"), "{refused}");
        assert!(matches!(Source::open_columns(&path, &[]), Err(Error::Range { argument: "names", .. })));
    }
    let none = batch(&[("x", rows(Lists::Fixed, StoredType::F32).slice(0, 0))]);
    for path in write_each(&folder, &none) {
        let refused = Source::open(&path).unwrap_err();
        assert!(matches!(&refused, Error::Format { reason, .. } if reason.starts_with("0 rows")), "{refused}");
    }
}

#[test]
fn nulls_and_lists_of_other_lengths_are_refused_with_their_row() {
    let folder = Folder::new("nulls");
    let whole: Vec<_> = (0..N).map(|i| Some(vec![i as f32; D])).collect();
    let with = |row: Option<Vec<f32>>| {
        let mut rows = whole.clone();
        rows[41] = row;
        rows
    };
    let null_value = {
        let mut lists = ListBuilder::new(PrimitiveBuilder::<Float32Type>::new());
        for i in 0..N {
            lists.values().append_slice(&[1.0; D - 1]);
            lists.values().append_option((i != 41).then_some(2.0));
            lists.append(true);
        }
        Arc::new(lists.finish()) as ArrayRef
    };
    let null_number = numbers::<Float32Type>((0..N).map(|i| (i != 41).then_some(1.0)));
    for (column, got, expected) in [
        (lists::<Float32Type>(Lists::Fixed, &with(None)), "null", "3 values"),
        (lists::<Float32Type>(Lists::Offsets, &with(None)), "null", "3 values"),
        (lists::<Float32Type>(Lists::Offsets, &with(Some(vec![1.0; 4]))), "4 values", "3 values"),
        (lists::<Float32Type>(Lists::LargeOffsets, &with(Some(vec![]))), "0 values", "3 values"),
        (null_value, "null", "3 values"),
        (null_number, "null", "a value"),
    ] {
        for path in write_each(&folder, &batch(&[("x", column)])) {
            let source = Source::open_columns(&path, &["x"]).unwrap();
            for rows in [0..N as u64, 41..42, 30..50] {
                let mut bytes = vec![0; (rows.end - rows.start) as usize * source.row_bytes()];
                let refused = source.read(rows, &mut bytes).unwrap_err().to_string();
                let path = path.display();
                assert_eq!(refused, format!("{path}: column x of row 41 is {got}, expected {expected}"));
            }
            source.read(0..41, &mut vec![0; 41 * source.row_bytes()]).unwrap();
        }
    }
}

#[test]
fn damaged_files_of_columns_are_refused() {
    let folder = Folder::new("damaged");
    let batch = batch(&[("x", rows(Lists::Fixed, StoredType::F32))]);
    for path in write_each(&folder, &batch) {
        let (whole, name) = (fs::read(&path).unwrap(), path.file_name().unwrap().to_str().unwrap().to_string());
        // Both end with their magic, and so no file that was cut is one.
        for length in 0..whole.len() {
            let refused = Source::open(folder.write(&name, &whole[..length])).unwrap_err();
            assert!(matches!(refused, Error::Format { .. } | Error::Length { .. }), "{length} bytes: {refused}");
        }
        let refused = Source::open(folder.write(&name, &[&whole[..], b"x"].concat())).unwrap_err();
        assert!(matches!(refused, Error::Format { .. }), "{refused}");
        // Any other damage makes an error or other values, and no panic or huge allocation.
        let mut rng = rng(7);
        for _ in 0..300 {
            let mut damaged = whole.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(0..whole.len());
                damaged[at] = if rng.random() { 0xff } else { rng.random() };
            }
            try_all(&folder.write(&name, &damaged));
        }
    }
}

#[test]
fn a_file_of_columns_that_changes_is_refused() {
    let folder = Folder::new("columns-changed");
    let batch = batch(&[("x", rows(Lists::Fixed, StoredType::F32))]);
    for path in write_each(&folder, &batch) {
        let source = Source::open(&path).unwrap();
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let refused = source.read(0..1, &mut vec![0; source.row_bytes()]).unwrap_err();
        assert!(matches!(&refused, Error::Changed { what: "length", .. }), "{refused}");
    }
}
