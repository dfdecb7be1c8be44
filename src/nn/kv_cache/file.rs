//! A cache in a file.

use super::{ClusteredKvCache, KvClusters, Padding, Settings, MAX_TOKENS};
use crate::{
    error::{Error, Result},
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor};
use std::{path::Path, sync::Arc};

const KIND: &str = "ClusteredKvCache";

impl ClusteredKvCache {
    /// Writes settings, tokens and clusters to a safetensors file with a checksum, whole or not at all: a prompt that is to be read again
    /// need not be computed again. Of the clusters only labels and offsets are written, from which all else follows.
    ///
    /// # Errors
    /// Fails where writing does.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let Settings { sinks, recent, cluster_size, segment, max_segment, passes } = self.settings;
        let numbers = [
            ("sinks", sinks),
            ("recent", recent),
            ("cluster_size", cluster_size),
            ("segment", segment),
            ("max_segment", max_segment),
            ("passes", passes),
            ("max_seq_len", self.max_seq_len),
            ("evicted", self.evicted),
            ("last_start", self.padding.as_ref().map_or(0, |p| p.last)),
        ];
        let kind = ("kind".to_string(), KIND.to_string());
        let settings = numbers.into_iter().map(|(key, number)| (key.to_string(), number.to_string())).chain([kind]);
        let starts = match &self.padding {
            Some(padding) => Some(Tensor::from_iter(padding.starts.iter().map(|&start| start as u32), &Device::Cpu)?),
            None => None,
        };
        let (keys, values, clusters) = (self.k()?, self.v()?, self.clusters());
        let tensors = [
            ("keys", keys.as_ref()),
            ("values", values.as_ref()),
            ("labels", clusters.map(|c| &c.labels)),
            ("offsets", clusters.map(|c| &c.offsets)),
            ("starts", starts.as_ref()),
        ];
        let tensors = tensors.into_iter().filter_map(|(name, t)| Some((name.to_string(), t?)));
        saved::write_checked(path.as_ref(), tensors, settings)
    }

    /// Reads what [`save`](Self::save) wrote, to the bit.
    ///
    /// # Errors
    /// Refuses a file that was not written by it, of which a bit has changed, or whose parts do not belong together.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = Saved::read_checked(path.as_ref(), device)?;
        file.expect("kind", KIND)?;
        let number = |key| file.setting::<usize>(key);
        // Room for what the file holds, and no more.
        let mut cache = Self::new(1);
        cache.settings = Settings {
            sinks: number("sinks")?,
            recent: number("recent")?,
            cluster_size: number("cluster_size")?,
            segment: number("segment")?,
            max_segment: number("max_segment")?,
            passes: number("passes")?,
        };
        let (max_seq_len, last) = (number("max_seq_len")?, number("last_start")?);
        cache.evicted = number("evicted")?;
        if file.holds("starts") {
            let starts = file.exactly("starts", DType::U32, None)?.flatten_all()?.to_vec1::<u32>()?;
            let starts: Arc<[usize]> = starts.into_iter().map(|start| start as usize).collect();
            if last > MAX_TOKENS || starts.iter().any(|&start| start > last) {
                return Err(file.bad(format!("sequences start at {starts:?}, the last at {last}")));
            }
            cache.padding = Some(Padding { starts, last });
        } else if last > 0 {
            return Err(file.bad(format!("{last} tokens of padding, and no starts")));
        }
        if file.holds("keys") {
            let [keys, values] = ["keys", "values"].map(|name| Ok::<_, Error>(file.on_host(name)?.to_device(device)?));
            cache.append(&keys?, &values?).map_err(|e| refused(&file, e))?;
        }
        if file.holds("labels") {
            let labels = file.exactly("labels", DType::U32, None)?.to_device(device)?;
            let offsets = file.exactly("offsets", DType::U32, None)?;
            let clusters = cache.grouped(&labels, &offsets).map_err(|e| refused(&file, e))?;
            let same = clusters.offsets.dims() == offsets.dims() && {
                let [a, b] = [&clusters.offsets, &offsets].map(|t| t.flatten_all()?.to_vec1::<u32>());
                a? == b?
            };
            if !same {
                return Err(file.bad("its offsets are not those of its labels".into()));
            }
            cache.clusters = Some(clusters);
        }
        cache.max_seq_len = max_seq_len;
        Ok(cache)
    }

    /// The clusters of `labels` in this cache, which has none yet, as many as there are `offsets` for.
    fn grouped(&self, labels: &Tensor, offsets: &Tensor) -> Result<KvClusters> {
        let (start, len) = (self.lead(), self.current_seq_len());
        let none = || Error::Range { argument: "labels", got: labels.elem_count(), min: 0, max: 0 };
        let stored = self.stored.as_ref().ok_or_else(none)?;
        let (&[batch, heads, m], &[_, _, ends]) = (labels.dims(), offsets.dims()) else {
            return Err(Error::Rank { argument: "labels", expected: 3, shape: labels.dims().to_vec() });
        };
        let max = len.saturating_sub(start);
        if [batch, heads] != stored.keys.dims()[..2] || m > max {
            let expected = [&stored.keys.dims()[..2], &[max]].concat();
            return Err(Error::Shape { argument: "labels", got: labels.dims().to_vec(), expected });
        }
        let [keys, values] = [&stored.keys, &stored.values].map(|t| t.narrow(2, start, m));
        KvClusters::new(&keys?, &values?, labels, ends.saturating_sub(1))
    }
}

/// A refusal means that what the file holds does not belong together; a failure is one of the device.
fn refused(file: &Saved, error: Error) -> Error {
    match error {
        Error::Candle(_) | Error::OutOfMemory { .. } | Error::Launch { .. } => error,
        _ => file.bad(error.to_string()),
    }
}
