//! The lists of the index on disk, a file each.
//!
//! An index is a folder: `clusters.safetensors`, a fit that `KMeans::load` reads, with the centroids and the list of each row; and
//! `lists/00042.safetensors` for list 42, if it has rows: `ids`, u32 `(m)`, their numbers in the source, and `rows`, `(m, d)` in the
//! type that the source gives them, f32 or f16.

use anyhow::{Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};
use candle_flash_kmeans::Source;
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

pub struct Lists(PathBuf);

/// The work of [`Lists::write`].
pub struct Written {
    pub lists: usize,
    pub rows: usize,
    /// How often the source was read.
    pub passes: usize,
}

impl Lists {
    /// In this folder of an index.
    pub fn new(folder: &Path) -> Result<Self> {
        let folder = folder.join("lists");
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self(folder))
    }

    fn path(&self, list: usize) -> PathBuf {
        self.0.join(format!("{list:05}.safetensors"))
    }

    /// Writes the lists that have `changed`, each whole or not at all. `labels` says the list of each row. As many lists as
    /// `memory` bytes hold are gathered in a pass over the source.
    pub fn write(&self, source: &Source<'_>, labels: &[u32], changed: &[bool], memory: usize) -> Result<Written> {
        let mut sizes = vec![0; changed.len()];
        labels.iter().for_each(|&label| sizes[label as usize] += 1);
        let changed: Vec<_> = (0..changed.len()).filter(|&list| changed[list]).collect();
        let rows = changed.iter().map(|&list| sizes[list]).sum();
        let (mut rest, mut passes) = (&changed[..], 0);
        // A half for what is gathered, a quarter for what is read, and as much for what is written.
        while !rest.is_empty() {
            let mut gathered = 0;
            let fits = |&&list: &&usize| {
                gathered += sizes[list] * (source.row_bytes() + size_of::<u32>());
                gathered <= memory / 2
            };
            let (now, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            self.write_some(source, labels, now, memory / 4)?;
            (rest, passes) = (later, passes + 1);
        }
        Ok(Written { lists: changed.len(), rows, passes })
    }

    /// Writes these lists in one pass, which reads so many bytes at a time.
    fn write_some(&self, source: &Source<'_>, labels: &[u32], lists: &[usize], bytes: usize) -> Result<()> {
        let row_bytes = source.row_bytes();
        let slots: HashMap<_, _> = lists.iter().enumerate().map(|(slot, &list)| (list as u32, slot)).collect();
        let mut gathered = vec![(vec![], vec![]); lists.len()];
        let mut buffer = vec![0; (bytes / row_bytes).clamp(1, labels.len()) * row_bytes];
        for (i, labels) in labels.chunks(buffer.len() / row_bytes).enumerate() {
            if !labels.iter().any(|label| slots.contains_key(label)) {
                continue;
            }
            let (first, buffer) = (i * buffer.len() / row_bytes, &mut buffer[..labels.len() * row_bytes]);
            source.read(first as u64..(first + labels.len()) as u64, buffer)?;
            for ((label, row), id) in labels.iter().zip(buffer.chunks(row_bytes)).zip(first as u32..) {
                if let Some(&slot) = slots.get(label) {
                    let (ids, rows): &mut (Vec<u32>, Vec<u8>) = &mut gathered[slot];
                    ids.push(id);
                    rows.extend_from_slice(row);
                }
            }
        }
        for (&list, (ids, rows)) in lists.iter().zip(gathered) {
            let (m, d, path) = (ids.len(), source.shape().1, self.path(list));
            if m == 0 {
                match fs::remove_file(&path) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
                    _ => continue,
                }
            }
            let rows = Tensor::from_raw_buffer(&rows, source.dtype(), &[m, d], &Device::Cpu)?;
            let tensors = HashMap::from([("ids", Tensor::from_vec(ids, m, &Device::Cpu)?), ("rows", rows)]);
            let temporary = path.with_extension("tmp");
            safetensors::save(&tensors, &temporary)?;
            fs::rename(temporary, path)?;
        }
        Ok(())
    }

    /// The numbers of a list's rows, and the rows in f32; nothing of an empty list.
    pub fn read(&self, list: usize) -> Result<Option<(Vec<u32>, Tensor)>> {
        let path = self.path(list);
        if !path.exists() {
            return Ok(None);
        }
        let tensors = safetensors::load(&path, &Device::Cpu)?;
        let tensor = |name: &str| tensors.get(name).with_context(|| format!("{} has no {name}", path.display()));
        Ok(Some((tensor("ids")?.to_vec1()?, tensor("rows")?.to_dtype(DType::F32)?)))
    }
}
