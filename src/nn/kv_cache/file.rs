//! A cache in a file.

use super::{
    coded::{CodedTokens, Segment, SEGMENT_CLUSTERS},
    codes::{CodedRows, KvCodes, Pieces},
    gains::Gains,
    ClusteredKvCache, KvClusters, KvMeans, Padding, Rotations, Settings, Stored, MAX_TOKENS,
};
use crate::{
    error::{Error, Result},
    nn::{
        codebook::{orthogonal::check_rotation, quantizer::wide},
        ProductQuantizer,
    },
    problem,
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
        let codes = codes.into_iter().flat_map(|pieces| numbers_of(pieces, self.rotations.are_found()));
        let texts = [("kind", KIND.to_string())].into_iter().chain(self.rotations.settings());
        let settings = numbers.into_iter().chain(codes).map(|(key, number)| (key, number.to_string())).chain(texts);
        let settings = settings.map(|(key, text)| (key.to_string(), text));
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
        let tensors = tensors.chain(self.rotations.tensors().map(|(name, t)| (name.to_string(), t)));
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
        let mut rotated = false;
        if file.states("key_bits") {
            let [columns, bits, value_columns, value_bits] = NUMBERS.map(number);
            let codes = KvCodes::new().keys(columns?, bits?).values(value_columns?, value_bits?);
            // Files were written before there were these.
            let flag = |key: &'static str| Ok::<_, Error>(file.states(key) && number(key)? > 0);
            let [keys_shared, values_shared, found, key_gains, value_gains] = LATER.map(flag);
            cache = cache.codes(codes.shared(keys_shared?, values_shared?).gains(key_gains?, value_gains?));
            rotated = found?;
        }
        let (max_seq_len, last) = (number("max_seq_len")?, number("last_start")?);
        cache.evicted = number("evicted")?;
        cache.rotations = Rotations::read(&mut file, rotated)?;
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
            // They were written as they are kept.
            let found = std::mem::take(&mut cache.rotations.found);
            cache.store(&keys?, &values?).map_err(|e| refused(&file, e))?;
            cache.rotations.found = found;
            cache.check_rotations().map_err(|e| refused(&file, e))?;
        } else if rotated {
            return Err(file.bad("rotations of no tokens".into()));
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
        let (Some(stored), Some([of_keys, of_values])) = (&self.stored, self.settings.codes) else {
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
        let dtype = stored.keys.dtype();
        let wide = wide(dtype);
        let mut rows = |name: &str, d: usize, of: Pieces| {
            let Pieces { columns, bits, shared, gains } = of;
            let pieces = d / columns;
            let [codes, entries, means, scales] = CodedRows::NAMES.map(|of| format!("{name}_{of}"));
            let codes = file.exactly(&codes, DType::U8, Some(&[batch, heads, m, pieces * bits / 8]))?;
            let means = file.exactly(&means, DType::U8, Some(&[batch, heads, k, d]))?;
            let entries = file.take(&entries)?;
            let shape = [batch, heads, if shared { 1 } else { pieces }, 1 << bits, columns];
            if (entries.dtype(), entries.dims()) != (dtype, &shape[..]) {
                return Err(file.bad(format!("tensor {name}_entries is {entries:?}, expected {dtype:?} {shape:?}")));
            }
            let scales = file.exactly(&scales, wide, Some(&[batch, heads, k]))?;
            let means = KvMeans { codes: means.to_device(device)?, scales: scales.to_device(device)? };
            let of_gains = || {
                let [codes, longest] = Gains::NAMES.map(|of| format!("{name}_{of}"));
                let codes = file.exactly(&codes, DType::U8, Some(&[batch, heads, m, 1]))?.to_device(device)?;
                let longest = file.exactly(&longest, wide, Some(&[batch, heads, 1, 1]))?.to_device(device)?;
                Ok::<_, Error>(Gains { codes, longest })
            };
            Ok::<_, Error>(CodedRows {
                codes: codes.to_device(device)?,
                quantizer: ProductQuantizer::of_entries(entries, of.sharing(d)),
                means,
                gains: gains.then(of_gains).transpose()?,
            })
        };
        let (keys, values) = (rows("keys", d, of_keys)?, rows("values", width, of_values)?);
        let offsets = file.exactly("offsets", DType::U32, Some(&[batch, heads, k + 1]))?;
        let spreads = file.exactly("spreads", wide, Some(&[batch, heads, k]))?;
        let [offsets_here, spreads, labels] = [&offsets, &spreads, &labels].map(|t| t.to_device(device));
        let coded = CodedTokens { keys, values, offsets: offsets_here?, spreads: spreads?, labels: labels?, segments };
        let [own, read] = [&coded.order()?.1, &offsets].map(|t| t.flatten_all()?.to_vec1::<u32>());
        match own? == read? {
            true => Ok(coded),
            false => Err(file.bad("its offsets are not those of its labels".into())),
        }
    }

    /// Refuses rotations that are not those of what is stored.
    fn check_rotations(&self) -> Result<()> {
        let Some(stored) = &self.stored else { return Ok(()) };
        let (batch, heads, _, d) = stored.keys.dims4()?;
        if batch == 0 {
            return Ok(());
        }
        let widths = [d, stored.values.dims()[3]];
        self.rotations.found.iter().zip(widths).try_for_each(|(matrix, d)| match matrix {
            Some(matrix) => {
                problem::check_dtype("rotation", matrix, wide(stored.keys.dtype()))?;
                check_rotation(matrix, &[batch, heads], d)
            }
            None => Ok(()),
        })
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
const NUMBERS: [&str; 4] = ["key_columns", "key_bits", "value_columns", "value_bits"];
/// Those that older files do not have.
const LATER: [&str; 5] = ["keys_shared", "values_shared", "rotated", "key_gains", "value_gains"];

fn numbers_of([keys, values]: [Pieces; 2], rotated: bool) -> impl Iterator<Item = (&'static str, usize)> {
    let numbers = NUMBERS.into_iter().zip([keys.columns, keys.bits, values.columns, values.bits]);
    let flags = LATER.into_iter().zip([keys.shared, values.shared, rotated, keys.gains, values.gains]);
    // A file that needs none of them is one that older versions read.
    numbers.chain(flags.filter(|&(_, flag)| flag).map(|(name, flag)| (name, usize::from(flag))))
}

/// A refusal means that what the file holds does not belong together; a failure is one of the device.
fn refused(file: &Saved, error: Error) -> Error {
    match error {
        Error::Candle(_) | Error::OutOfMemory { .. } | Error::Launch { .. } => error,
        _ => file.bad(error.to_string()),
    }
}
