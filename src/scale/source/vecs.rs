//! The files of vector search: `.fbin`, `.u8bin`, `.i8bin` (a header of u32 rows and u32 columns, as in
//! [Big-ANN benchmarks](https://big-ann-benchmarks.com)) and `.fvecs`, `.bvecs` (an i32 number of columns before each row, as in
//! [TEXMEX](http://corpus-texmex.irisa.fr)), all little-endian.

use super::{
    file::SourceFile,
    matrix::{Header, Order},
    reader::Table,
    stored::StoredType,
};
use crate::error::{Error, Result};

pub(crate) fn open_bin(file: SourceFile, stored: StoredType) -> Result<Table<'static>> {
    let bytes = file.bytes(0, 8)?;
    let [n, d] = [0, 4].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")).into());
    Header { offset: 8, n, d, stored, order: Order::Rows, big_endian: false }.table(file, &bytes)
}

/// The number of columns of the other rows is checked where they are read: to look at each row here would be to read the file.
pub(crate) fn open_vecs(file: SourceFile, stored: StoredType) -> Result<Table<'static>> {
    let bytes = file.bytes(0, 4)?;
    let count = i32::from_le_bytes(bytes[..].try_into().expect("four bytes"));
    let d = u64::try_from(count).map_err(|_| file.bad(format!("its first row has {count} columns")))?;
    let row = 4 + d * stored.size() as u64;
    if !file.length().is_multiple_of(row) {
        let expected = file.length().next_multiple_of(row);
        return Err(Error::Length { path: file.path().into(), got: file.length(), expected });
    }
    let n = file.length() / row;
    Header { offset: 0, n, d, stored, order: Order::CountedRows, big_endian: false }.table(file, &bytes)
}
