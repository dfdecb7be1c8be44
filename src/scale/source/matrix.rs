//! A matrix that lies in a file as plain numbers, whatever the header said of it.

use super::{
    file::SourceFile,
    reader::{ReadRows, Table},
    stored::{swap_bytes, StoredType},
};
use crate::{
    error::{Error, Result},
    host,
};
use std::ops::Range;

/// Bytes that are read at a time where rows do not lie next to each other.
const BLOCK: usize = 1 << 20;

/// The layout of the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Row after row.
    Rows,
    /// Row after row, each with its number of columns before it, as an i32.
    CountedRows,
    /// Column after column, as in Fortran.
    Columns,
}

/// The contents of a header: `(n, d)` numbers of type `stored` from `offset` on, to the end of the file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Header {
    pub offset: u64,
    pub n: u64,
    pub d: u64,
    pub stored: StoredType,
    pub order: Order,
    pub big_endian: bool,
}

impl Header {
    /// Bytes of the whole file; none past 64 bits.
    pub fn file_length(&self) -> Option<u64> {
        let prefix = if self.order == Order::CountedRows { 4 } else { 0 };
        let row = self.d.checked_mul(self.stored.size() as u64)?.checked_add(prefix)?;
        row.checked_mul(self.n)?.checked_add(self.offset)
    }

    /// Refuses what cannot be clustered, and a file of another length.
    pub fn table(self, file: SourceFile, header: &[u8]) -> Result<Table<'static>> {
        file.expect_length(self.file_length())?;
        self.part(file, header)
    }

    /// The same where other things follow in the file, whose length has been checked.
    pub fn part(self, file: SourceFile, header: &[u8]) -> Result<Table<'static>> {
        let Self { n, d, stored, .. } = self;
        if n == 0 || d == 0 {
            return Err(file.bad(format!("a matrix of {n} rows and {d} columns has nothing to cluster")));
        }
        // A row that memory could hold has a size that `usize` holds.
        let d = usize::try_from(d).ok().filter(|d| d.checked_mul(8).is_some());
        let d = d.ok_or_else(|| file.bad(format!("a row of {} columns is too long", self.d)))?;
        let (name, files) = (file.path().to_string(), vec![file.identity(header)]);
        Ok(Table { name, n, d, stored, files, reader: Box::new(FileMatrix { file, header: self, d }) })
    }
}

struct FileMatrix {
    file: SourceFile,
    header: Header,
    d: usize,
}

impl ReadRows for FileMatrix {
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let Header { offset, stored, order, big_endian, .. } = self.header;
        match order {
            Order::Rows => self.file.read(offset + rows.start * (self.d * stored.size()) as u64, into)?,
            Order::CountedRows => self.read_counted(rows, into)?,
            Order::Columns => self.read_columns(rows, into)?,
        }
        if big_endian != cfg!(target_endian = "big") && stored.size() > 1 {
            swap_bytes(into, stored.size());
        }
        Ok(())
    }
}

// The header's arithmetic was checked for the whole file, so that no position inside it overflows.
impl FileMatrix {
    fn read_counted(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let row = self.d * self.header.stored.size();
        let at_once = (BLOCK / (row + 4)).max(1);
        let mut buffer = host::filled("source", at_once.min(into.len() / row) * (row + 4), 0u8)?;
        let mut first = rows.start;
        for into in into.chunks_mut(at_once * row) {
            let buffer = &mut buffer[..into.len() / row * (row + 4)];
            self.file.read(self.header.offset + first * (row as u64 + 4), buffer)?;
            for (stored, into) in buffer.chunks_exact(row + 4).zip(into.chunks_exact_mut(row)) {
                let (count, values) = stored.split_first_chunk().expect("four bytes were added");
                let count = i32::from_le_bytes(*count);
                if usize::try_from(count) != Ok(self.d) {
                    let (path, what) = (self.file.path().into(), format!("number of columns in row {first}"));
                    return Err(Error::Mismatch { path, what, got: count.to_string(), expected: self.d.to_string() });
                }
                into.copy_from_slice(values);
                first += 1;
            }
        }
        Ok(())
    }

    fn read_columns(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let Header { offset, n, stored, .. } = self.header;
        let (size, row) = (stored.size(), self.d * stored.size());
        let at_once = BLOCK / size;
        let mut buffer = host::filled("source", at_once.min(into.len() / row) * size, 0u8)?;
        let mut first = rows.start;
        for into in into.chunks_mut(at_once.saturating_mul(row)) {
            let count = into.len() / row;
            let buffer = &mut buffer[..count * size];
            for column in 0..self.d {
                self.file.read(offset + (column as u64 * n + first) * size as u64, buffer)?;
                for (value, row) in buffer.chunks_exact(size).zip(into.chunks_exact_mut(row)) {
                    row[column * size..][..size].copy_from_slice(value);
                }
            }
            first += count as u64;
        }
        Ok(())
    }
}
