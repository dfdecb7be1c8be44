//! Rows in the columns of Arrow's record batches, which is how Parquet and Arrow files are decoded.

use super::{
    file::SourceFile,
    reader::{ReadRows, Table},
    stored::{Element, StoredType},
};
use crate::error::{Error, Result};
use arrow_array::{
    cast::AsArray,
    types::{ArrowPrimitiveType, Float16Type, Float32Type, Float64Type, Int8Type, UInt8Type},
    Array, ArrayRef, GenericListArray, OffsetSizeTrait, RecordBatch,
};
use arrow_schema::{DataType, Schema};
use std::{
    ops::Range,
    panic::{catch_unwind, AssertUnwindSafe},
};

/// A file that is decoded to record batches.
pub(crate) trait Batches: Send + Sync {
    fn file(&self) -> &SourceFile;

    /// Calls `visit` with the rows of a range in bounds, in order, in batches of any size.
    fn visit(&self, rows: Range<u64>, visit: &mut dyn FnMut(&RecordBatch) -> Result<()>) -> Result<()>;
}

/// The columns that make a row: one of lists, or some of numbers.
#[derive(Clone, Debug)]
pub(crate) struct Columns {
    names: Vec<String>,
    /// Their places among all columns.
    pub indices: Vec<usize>,
    stored: StoredType,
    lists: bool,
    /// The length of lists, if their type says so.
    length: Option<usize>,
}

/// The contents of a column of a type: numbers, and how many in a list.
fn numbers(data_type: &DataType) -> Option<(StoredType, bool, Option<usize>)> {
    let number = |data_type: &DataType| {
        Some(match data_type {
            DataType::UInt8 => StoredType::U8,
            DataType::Int8 => StoredType::I8,
            DataType::Float16 => StoredType::F16,
            DataType::Float32 => StoredType::F32,
            DataType::Float64 => StoredType::F64,
            _ => return None,
        })
    };
    match data_type {
        DataType::FixedSizeList(item, length) => {
            Some((number(item.data_type())?, true, Some(usize::try_from(*length).ok()?)))
        }
        DataType::List(item) | DataType::LargeList(item) => Some((number(item.data_type())?, true, None)),
        data_type => Some((number(data_type)?, false, None)),
    }
}

impl Columns {
    /// Finds the columns of these names, or, without any, the only one of lists.
    pub fn find(file: &SourceFile, schema: &Schema, names: &[&str]) -> Result<Self> {
        let fields = schema.fields();
        let lists = || fields.iter().filter(|field| numbers(field.data_type()).is_some_and(|(_, lists, _)| lists));
        let only: Vec<_> = lists().map(|field| &field.name()[..]).collect();
        let names = match (names, &only[..]) {
            ([], [_]) => &only,
            ([], _) => {
                let reason = format!("{} columns of lists could be rows, expected one, or names", only.len());
                return Err(file.bad(reason));
            }
            (names, _) => names,
        };
        let mut found: Option<Self> = None;
        for &name in names {
            let mismatch = |got: String, expected: String| {
                let (path, what) = (file.path().into(), format!("column {name}"));
                Error::Mismatch { path, what, got, expected }
            };
            let Some((index, field)) = fields.find(name) else {
                return Err(mismatch("missing".into(), format!("one of {} columns", fields.len())));
            };
            let Some((stored, lists, length)) = numbers(field.data_type()) else {
                let expected = "f16, f32, f64, u8 or i8, or lists of these".into();
                return Err(mismatch(field.data_type().to_string(), expected));
            };
            match &mut found {
                None => {
                    let (names, indices) = (vec![name.into()], vec![index]);
                    found = Some(Self { names, indices, stored, lists, length });
                }
                Some(first) if first.lists || lists || first.stored != stored => {
                    let expected = match first.lists {
                        true => "the only column, beside lists".into(),
                        false => format!("{} as column {}", first.stored, first.names[0]),
                    };
                    return Err(mismatch(field.data_type().to_string(), expected));
                }
                Some(first) => {
                    first.names.push(name.into());
                    first.indices.push(index);
                }
            }
        }
        Ok(found.expect("there is a name"))
    }

    /// The contents of the file: `n` rows, of as many columns as the first one where types do not say.
    pub fn table<B: Batches + 'static>(self, batches: B, n: u64, header: &[u8]) -> Result<Table<'static>> {
        let file = batches.file();
        let nothing = |d: usize| file.bad(format!("{n} rows of {d} columns have nothing to cluster"));
        let mut d = if self.lists { self.length } else { Some(self.names.len()) };
        if n == 0 {
            return Err(nothing(d.unwrap_or(0)));
        }
        if d.is_none() {
            batches.visit(0..1, &mut |batch| {
                let lists = self.column(file, batch, 0)?;
                let list = lists.as_list_opt::<i32>().map(|lists| lists.value_length(0) as usize);
                d = list.or_else(|| lists.as_list_opt::<i64>().map(|lists| lists.value_length(0) as usize));
                Ok(())
            })?;
        }
        let d = d.filter(|&d| d > 0 && d.checked_mul(8).is_some()).ok_or_else(|| nothing(0))?;
        // Other columns of the file are another source.
        let header: Vec<_> = header.iter().chain(self.names.iter().flat_map(|name| name.as_bytes())).copied().collect();
        let (name, files, stored) = (file.path().to_string(), vec![file.identity(&header)], self.stored);
        Ok(Table { name, n, d, stored, files, reader: Box::new(ColumnRows { batches, columns: self, d }) })
    }

    fn column<'b>(&self, file: &SourceFile, batch: &'b RecordBatch, i: usize) -> Result<&'b ArrayRef> {
        batch.column_by_name(&self.names[i]).ok_or_else(|| file.bad(format!("column {} is missing", self.names[i])))
    }
}

struct ColumnRows<B> {
    batches: B,
    columns: Columns,
    d: usize,
}

impl<B: Batches> ReadRows for ColumnRows<B> {
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let (row, mut first, mut left) = (self.d * self.columns.stored.size(), rows.start, into);
        self.batches.visit(rows, &mut |batch| {
            let bytes = batch.num_rows() * row;
            if bytes > left.len() {
                return Err(self.batches.file().bad(format!("more than the {} rows that it has", left.len() / row)));
            }
            let (own, rest) = std::mem::take(&mut left).split_at_mut(bytes);
            match self.columns.stored {
                StoredType::U8 => self.copy::<UInt8Type>(batch, first, own),
                StoredType::I8 => self.copy::<Int8Type>(batch, first, own),
                StoredType::F16 => self.copy::<Float16Type>(batch, first, own),
                StoredType::F64 => self.copy::<Float64Type>(batch, first, own),
                _ => self.copy::<Float32Type>(batch, first, own),
            }?;
            (left, first) = (rest, first + batch.num_rows() as u64);
            Ok(())
        })?;
        match left.len() / row {
            0 => Ok(()),
            missing => Err(self.batches.file().bad(format!("{missing} rows after row {first} are missing"))),
        }
    }
}

impl<B: Batches> ColumnRows<B> {
    /// Copies a batch that begins with row `first` of the file.
    fn copy<P: ArrowPrimitiveType<Native: Element>>(
        &self,
        batch: &RecordBatch,
        first: u64,
        into: &mut [u8],
    ) -> Result<()> {
        let (d, size, file) = (self.d, self.columns.stored.size(), self.batches.file());
        for i in 0..self.columns.names.len() {
            let column = self.columns.column(file, batch, i)?;
            // As many values of each row.
            let per_row = if self.columns.lists { d } else { 1 };
            if let Some(row) = (0..column.len()).find(|&row| column.is_null(row)) {
                return Err(self.mismatch(i, first + row as u64, "null".into()));
            }
            let values = if self.columns.lists { self.values_of(column, first)? } else { column.clone() };
            if let Some(value) = (0..values.len()).find(|&value| values.is_null(value)) {
                return Err(self.mismatch(i, first + (value / per_row) as u64, "null".into()));
            }
            let typed = values.as_primitive_opt::<P>();
            let typed = typed
                .ok_or_else(|| file.bad(format!("values of {} are {}", self.columns.names[i], values.data_type())))?;
            if self.columns.lists {
                P::Native::store(typed.values(), into);
            } else {
                for (value, row) in typed.values().chunks_exact(1).zip(into.chunks_exact_mut(d * size)) {
                    P::Native::store(value, &mut row[i * size..][..size]);
                }
            }
        }
        Ok(())
    }

    /// The values of all lists, one after another, if each has `d`.
    fn values_of(&self, lists: &ArrayRef, first: u64) -> Result<ArrayRef> {
        if let Some(lists) = lists.as_fixed_size_list_opt() {
            return match usize::try_from(lists.value_length()) {
                Ok(length) if length == self.d => Ok(lists.values().slice(0, lists.len() * self.d)),
                _ => Err(self.mismatch(0, first, format!("{} values", lists.value_length()))),
            };
        }
        if let Some(lists) = lists.as_list_opt::<i32>() {
            return self.values_at(lists, first);
        }
        match lists.as_list_opt::<i64>() {
            Some(lists) => self.values_at(lists, first),
            None => Err(self.mismatch(0, first, lists.data_type().to_string())),
        }
    }

    fn values_at<O: OffsetSizeTrait>(&self, lists: &GenericListArray<O>, first: u64) -> Result<ArrayRef> {
        let offsets = lists.value_offsets();
        for (row, ends) in offsets.windows(2).enumerate() {
            let length = ends[1].as_usize() - ends[0].as_usize();
            if length != self.d {
                return Err(self.mismatch(0, first + row as u64, format!("{length} values")));
            }
        }
        Ok(lists.values().slice(offsets[0].as_usize(), lists.len() * self.d))
    }

    fn mismatch(&self, i: usize, row: u64, got: String) -> Error {
        let (path, what) =
            (self.batches.file().path().into(), format!("column {} of row {row}", self.columns.names[i]));
        let expected = if self.columns.lists { format!("{} values", self.d) } else { "a value".into() };
        Error::Mismatch { path, what, got, expected }
    }
}

/// Runs a decoder. What the crates check by assertions, of which damaged files fail some, is an error here, too.
pub(crate) fn decode<T>(file: &SourceFile, run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        Err(file.bad(format!("its decoder failed: {}", text.unwrap_or("it said nothing"))))
    })
}
