//! A cache in a file.

use super::{
    coded::{CodedTokens, Segment, SEGMENT_CLUSTERS},
    codes::{CodedRows, KvCodes, Pieces},
    ClusteredKvCache, KvClusters, Padding, Settings, Stored, MAX_TOKENS,
};
use crate::{
    error::{Error, Result},
    nn::ProductQuantizer,
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor};
use std::{path::Path, sync::Arc};

const KIND: &str = "ClusteredKvCache";

impl ClusteredKvCache {
    /// Writes settings, tokens and clusters to a safetensors file with a checksum, whole or not at all: a prompt that is to be read again
    /// need not be computed again. Of the clusters only labels and offsets are written, from which all else follows, and
    /// [`codes`](Self::codes) as they are.
    ///
    /// # Errors
    /// Fails where writing does.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let Settings { sinks, recent, cluster_size, segment, max_segment, passes, codes } = self.settings;
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
        let codes = codes.map(|codes| numbers_of(codes.keys, codes.values)).into_iter().flatten();
        let kind = ("kind".to_string(), KIND.to_string());
        let settings =
            numbers.into_iter().chain(codes).map(|(key, number)| (key.to_string(), number.to_string())).chain([kind]);
        let starts = match &self.padding {
            Some(padding) => Some(Tensor::from_iter(padding.starts.iter().map(|&start| start as u32), &Device::Cpu)?),
            None => None,
        };
        self.shown()?;
        let clusters = self.clusters();
        let [keys, values] = self.stored.as_ref().map(Stored::rows).transpose()?.map_or([None, None], |r| r.map(Some));
        let segments = self.coded.as_ref().map(|coded| {
            let numbers = coded.segments.iter().flat_map(|s| [s.tokens as u32, s.clusters as u32]);
            Tensor::from_iter(numbers, &Device::Cpu)
        });
        let segments = segments.transpose()?;
        let tensors = [
            ("keys", keys.as_ref()),
            ("values", values.as_ref()),
            ("labels", clusters.map(|c| &c.labels)),
            ("offsets", clusters.map(|c| &c.offsets)),
            ("starts", starts.as_ref()),
            ("segments", segments.as_ref()),
        ];
        let tensors = tensors.into_iter().filter_map(|(name, t)| Some((name.to_string(), t?)));
        let tensors = tensors.chain(self.coded.iter().flat_map(CodedTokens::tensors));
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
            codes: None,
        };
        if file.states("key_bits") {
            let [columns, bits, value_columns, value_bits] = CODES.map(number);
            cache.settings.codes = Some(KvCodes::new().keys(columns?, bits?).values(value_columns?, value_bits?));
        }
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
        if file.holds("segments") {
            cache.coded = Some(cache.read_codes(&mut file, device)?);
        } else if file.holds("labels") {
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

    /// The codes of a file whose other tokens are here.
    fn read_codes(&self, file: &mut Saved, device: &Device) -> Result<CodedTokens> {
        let (Some(stored), Some(codes)) = (&self.stored, self.settings.codes) else {
            return Err(file.bad("codes without what says how to read them".into()));
        };
        let ((batch, heads, _, d), width) = (stored.keys.dims4()?, stored.values.dims()[3]);
        let segments = file.exactly("segments", DType::U32, None)?.flatten_all()?.to_vec1::<u32>()?;
        let segments = segments.chunks(2).map(|pair| match *pair {
            [tokens, clusters] if tokens > 0 && (1..=SEGMENT_CLUSTERS).contains(&(clusters as usize)) => {
                Ok(Segment { tokens: tokens as usize, clusters: clusters as usize })
            }
            _ => Err(file.bad(format!("a segment is {pair:?}"))),
        });
        let segments: Arc<[Segment]> = segments.collect::<Result<_>>()?;
        let m = segments.iter().map(|s| s.tokens).sum::<usize>();
        let k = segments.iter().map(|s| s.clusters).sum::<usize>();
        if m == 0 || m > MAX_TOKENS || stored.len < self.lead() {
            return Err(file.bad(format!("{m} tokens are codes and {} are not", stored.len)));
        }
        let labels = file.exactly("labels", DType::U8, Some(&[batch, heads, m]))?;
        let mut at = 0;
        for segment in &*segments {
            let of_segment = labels.narrow(2, at, segment.tokens)?.flatten_all()?.to_vec1::<u8>()?;
            if let Some(label) = of_segment.into_iter().find(|&label| usize::from(label) >= segment.clusters) {
                return Err(file.bad(format!("a label is {label}, of {} clusters", segment.clusters)));
            }
            at += segment.tokens;
        }
        let mut rows = |name: &str, d: usize, Pieces { columns, bits }: Pieces| {
            let dtype = stored.keys.dtype();
            let pieces = d / columns;
            let [codes, entries, means, ranges] = CodedRows::NAMES.map(|of| format!("{name}_{of}"));
            let codes = file.exactly(&codes, DType::U8, Some(&[batch, heads, m, pieces * bits / 8]))?;
            let means = file.exactly(&means, DType::U8, Some(&[batch, heads, k, d]))?;
            let mut floats = |name: &str, shape: &[usize]| {
                let t = file.take(name)?;
                match (t.dtype(), t.dims()) == (dtype, shape) {
                    true => Ok(t),
                    false => Err(file.bad(format!("tensor {name} is {t:?}, expected {dtype:?} {shape:?}"))),
                }
            };
            let entries = floats(&entries, &[batch, heads, pieces, 1 << bits, columns])?;
            let (ranges, quantizer) = (floats(&ranges, &[batch, heads, k, 2])?, ProductQuantizer::of_entries(entries));
            Ok::<_, Error>(CodedRows {
                codes: codes.to_device(device)?,
                quantizer,
                means: means.to_device(device)?,
                ranges,
            })
        };
        let (keys, values) = (rows("keys", d, codes.keys)?, rows("values", width, codes.values)?);
        let offsets = file.exactly("offsets", DType::U32, Some(&[batch, heads, k + 1]))?;
        let coded = CodedTokens {
            keys,
            values,
            offsets: offsets.to_device(device)?,
            labels: labels.to_device(device)?,
            segments,
        };
        let [own, read] = [&coded.order()?.1, &offsets].map(|t| t.flatten_all()?.to_vec1::<u32>());
        match own? == read? {
            true => Ok(coded),
            false => Err(file.bad("its offsets are not those of its labels".into())),
        }
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

/// The settings of codes by name.
const CODES: [&str; 4] = ["key_columns", "key_bits", "value_columns", "value_bits"];

fn numbers_of(keys: Pieces, values: Pieces) -> [(&'static str, usize); 4] {
    let numbers = [keys.columns, keys.bits, values.columns, values.bits];
    std::array::from_fn(|i| (CODES[i], numbers[i]))
}

/// A refusal means that what the file holds does not belong together; a failure is one of the device.
fn refused(file: &Saved, error: Error) -> Error {
    match error {
        Error::Candle(_) | Error::OutOfMemory { .. } | Error::Launch { .. } => error,
        _ => file.bad(error.to_string()),
    }
}
