//! The interface of a format.

use super::{file::FileIdentity, stored::StoredType};
use crate::error::Result;
use std::ops::Range;

/// Reads rows at positions, on any number of threads at once.
pub(crate) trait ReadRows: Send + Sync {
    /// Fills `into` with so many rows, one after another in the type they are stored in and this machine's byte order. The range
    /// is in bounds and not empty, and `into` has its size.
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()>;

    /// Adds the pieces of memory to `pieces` that these rows lie in as `read` would give them, in order, and says whether they do.
    fn in_memory<'s>(&'s self, _rows: Range<u64>, _pieces: &mut Vec<&'s [u8]>) -> bool {
        false
    }
}

/// Rows that can be read, with what is known of them.
pub(crate) struct Table<'a> {
    /// The name of it in errors.
    pub name: String,
    pub n: u64,
    pub d: usize,
    pub stored: StoredType,
    pub files: Vec<FileIdentity>,
    pub reader: Box<dyn ReadRows + 'a>,
}

impl Table<'_> {
    /// Bytes of a row as it is stored.
    pub fn row_size(&self) -> usize {
        self.d * self.stored.size()
    }
}
