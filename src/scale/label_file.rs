//! Labels in a `.npy` file, to which ranks write those of their rows, in any order.

use super::source::{file::write_all_at, npy};
use crate::{
    error::{Error, Result},
    saved,
    stages::reach,
};
use std::{fs::File, io, path::Path};

/// A file of labels that is being written.
pub(super) struct LabelFile<'a> {
    file: &'a File,
    path: &'a Path,
    /// The bytes before the labels.
    header: u64,
}

impl LabelFile<'_> {
    /// Puts the labels of `n` rows where `path` leads, whole or not at all: once `write` has written all of them.
    pub fn replace<T>(path: &Path, n: u64, write: impl FnOnce(&LabelFile<'_>) -> Result<T>) -> Result<T> {
        saved::replace(path, |file| {
            let header = npy::header("<u4", n);
            let labels = LabelFile { file, path, header: header.len() as u64 };
            labels.failed(write_all_at(file, &header, 0))?;
            write(&labels)
        })
    }

    /// Writes the labels of rows from `first` on.
    pub fn write(&self, first: u64, labels: &[u32]) -> Result<()> {
        let bytes: Vec<_> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
        let at = self.header + first * size_of::<u32>() as u64;
        self.failed(reach("write labels").and_then(|()| write_all_at(self.file, &bytes, at)))
    }

    fn failed(&self, result: io::Result<()>) -> Result<()> {
        result.map_err(|source| Error::Io { path: self.path.display().to_string(), source })
    }
}
