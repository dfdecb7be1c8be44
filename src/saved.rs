//! What the crate saves: safetensors files with a mark of ours, written whole or not at all.

use crate::{Error, Metric, Result};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use std::{
    collections::HashMap,
    fs,
    io::Write,
    path::Path,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

/// Key and value that mark our files.
const FORMAT: [&str; 2] = ["candle_flash_kmeans", "1"];

/// Writes tensors and settings: a temporary file beside `path` is renamed to it.
pub(crate) fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<()> {
    let metadata = settings.into_iter().chain([FORMAT.map(String::from).into()]).collect();
    let tensors: Vec<_> = tensors.into_iter().collect();
    let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?;
    // A name of its own for every call, so that writers of one path cannot take each other's file.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let call = CALLS.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_extension(format!("{}-{call}.tmp", std::process::id()));
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    let write = write().inspect_err(|_| drop(fs::remove_file(&temporary)));
    write.map_err(|source| Error::Io { path: path.display().to_string(), source })
}

/// A file of ours, read.
pub(crate) struct Saved {
    path: String,
    metadata: HashMap<String, String>,
    tensors: HashMap<String, Tensor>,
}

impl Saved {
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|source| Error::Io { path: name.clone(), source })?;
        let mut saved = Self { path: name, metadata: HashMap::new(), tensors: HashMap::new() };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| saved.bad(e.to_string()))?;
        saved.metadata = header.metadata().clone().unwrap_or_default();
        let [key, version] = FORMAT;
        saved.expect(key, version)?;
        saved.tensors = candle_core::safetensors::load_buffer(&bytes, device)?;
        Ok(saved)
    }

    pub fn bad(&self, reason: String) -> Error {
        Error::Format { path: self.path.clone(), reason }
    }

    /// Refuses a setting of another value.
    pub fn expect(&self, key: &str, expected: &str) -> Result<()> {
        let got = self.metadata.get(key);
        if got.map(String::as_str) != Some(expected) {
            return Err(self.bad(format!("metadata {key} is {got:?}, expected {expected}")));
        }
        Ok(())
    }

    pub fn setting<T: FromStr>(&self, key: &str) -> Result<T> {
        self.parsed(key, |value| value.parse().ok())
    }

    pub fn metric(&self, key: &str) -> Result<Metric> {
        self.parsed(key, Metric::from_name)
    }

    fn parsed<T>(&self, key: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T> {
        let got = self.metadata.get(key);
        got.and_then(|value| parse(value)).ok_or_else(|| self.bad(format!("metadata {key} is {got:?}")))
    }

    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| self.bad(format!("tensor {name} is missing")))
    }
}
