//! A cache forgets tokens, and goes on with other sequences.

use super::{stored::Stored, ClusteredKvCache, CodedTokens, KvClusters, Padding};
use crate::{
    error::{Error, Result},
    memory::{Fence, Memory},
    problem,
    select::empty,
};
use candle_core::{DType, Tensor};
use std::{ops::Range, sync::Arc};

impl ClusteredKvCache {
    /// Forgets everything but the settings, memory for scratch included.
    pub fn reset(&mut self) {
        // First, so that what other threads do to the tensors is over.
        self.fence = Fence::default();
        (self.stored, self.clusters, self.coded) = (None, None, None);
        (self.rotations, self.padding, self.memory) = (self.rotations.anew(), None, Memory::kept());
        self.evicted = 0;
    }

    /// Takes the sequences `index` of the batch, u32 `(sequences)`, in the place of those there are: in another order, several
    /// times or not at all, as the beams of a search go on. The host waits to check the index.
    ///
    /// # Errors
    /// Refuses an index of another dtype, device or number of dimensions, one that names a sequence that is not there, and
    /// sequences of no cache.
    pub fn reorder(&mut self, index: &Tensor) -> Result<()> {
        problem::check_dtype("index", index, DType::U32)?;
        if index.rank() != 1 {
            return Err(Error::Size {
                argument: "index",
                what: "number of dimensions",
                got: index.rank(),
                expected: 1,
            });
        }
        let Some(stored) = &self.stored else {
            let with = "a cache that holds no tokens yet".into();
            return Err(Error::Conflict { argument: "index", got: format!("{} sequences", index.dims()[0]), with });
        };
        problem::check_device("index", index, stored.keys.device())?;
        self.fence.write(stored.keys.device())?;
        let batch = stored.keys.dims()[0];
        let largest = match index.elem_count() {
            0 => None,
            _ => Some(index.max(0)?.to_scalar::<u32>()? as usize),
        };
        match largest {
            Some(got) if batch == 0 => {
                let with = "a batch of no sequences".into();
                return Err(Error::Conflict { argument: "index", got: got.to_string(), with });
            }
            Some(got) if got >= batch => {
                return Err(Error::Range { argument: "index", got, min: 0, max: batch - 1 });
            }
            _ => {}
        }
        let padding = match &self.padding {
            Some(Padding { starts, last }) => {
                let starts = index.to_vec1::<u32>()?.into_iter().map(|i| starts[i as usize]).collect();
                Some(Padding { starts, last: *last })
            }
            None => None,
        };
        let rows = index.contiguous()?;
        let taken = |t: &Tensor| match largest {
            Some(_) => Ok(t.index_select(&rows, 0)?),
            None => empty(&[&[0], &t.dims()[1..]].concat(), t.dtype(), t.device()),
        };
        let (keys, values) = (taken(&stored.keys)?, taken(&stored.values)?);
        let clusters = self.clusters.as_ref().map(|clusters| clusters.map(taken)).transpose()?;
        let coded = self.coded.as_ref().map(|coded| coded.map(taken)).transpose()?;
        self.rotations = self.rotations.map(taken)?;
        self.stored = Some(Stored { keys, values, len: stored.len, shared: Arc::new(()) });
        (self.clusters, self.coded, self.padding) = (clusters, coded, padding);
        Ok(())
    }

    /// Forgets all tokens but the first `len`: what a model guessed and then took back, or the end of a conversation. Tokens that are
    /// clustered leave their clusters, whose means are then those of the tokens that are left, to the bit; for that the host waits. With [`codes`](Self::codes) means stay as
    /// they are, by which what is left is coded.
    ///
    /// # Errors
    /// Refuses to keep more than there are, and less than the sinks where tokens after them were evicted. Fails where a device does;
    /// the cache is as before then.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let (max, clustered) = (self.current_seq_len(), self.clustered());
        let min = if self.evicted > 0 { self.lead() } else { 0 };
        if !(min..=max).contains(&len) {
            return Err(Error::Range { argument: "len", got: len, min, max });
        }
        if len < clustered.end {
            let (kept, stored) =
                (0..len.saturating_sub(clustered.start), self.stored.as_ref().expect("it holds tokens"));
            (self.clusters, self.coded) = (self.cut(stored, kept.clone())?, self.cut_codes(kept)?);
        }
        let coded = self.coded.as_ref().map_or(0, CodedTokens::len);
        if let Some(stored) = &mut self.stored {
            stored.len = len - coded;
        }
        Ok(())
    }

    /// Forgets the oldest `tokens` after the sinks, clustered or not: memory is as much as what is left needs. In a batch with
    /// [`left_padding`](Self::left_padding) what comes before the clusters stays. Positions do not change: what is left was rotated by its
    /// own.
    ///
    /// # Errors
    /// Refuses to forget more than there are. Fails where a device does; the cache is as before then.
    pub fn evict(&mut self, tokens: usize) -> Result<()> {
        let (lead, m) = (self.lead(), self.clustered().len());
        let max = self.current_seq_len().saturating_sub(lead);
        if tokens > max {
            return Err(Error::Range { argument: "tokens", got: tokens, min: 0, max });
        }
        let Some(old) = self.stored.as_ref().filter(|_| tokens > 0) else { return Ok(()) };
        self.fence.write(old.keys.device())?;
        // Codes go first, and then what is stored.
        let coded = self.coded.as_ref().map_or(0, CodedTokens::len);
        let gone = lead..lead + tokens.saturating_sub(coded);
        let dims = old.keys.dims();
        let room = self.room(old.len - gone.len(), dims[0] * dims[1] * dims[3].max(old.values.dims()[3]))?;
        let (stored, kept) = (old.without(gone, room)?, tokens.min(m)..m);
        (self.clusters, self.coded) = (self.cut(&stored, kept.clone())?, self.cut_codes(kept)?);
        self.stored = Some(stored);
        self.evicted += tokens;
        Ok(())
    }

    /// Evicts what comes before a window, once that is as much again. `recent` tokens before it stay, so that as many new ones can be
    /// taken back.
    pub(in crate::nn) fn keep_window(&mut self, window: usize) -> Result<()> {
        let kept = window.saturating_add(self.settings.recent);
        let after = self.current_seq_len().saturating_sub(self.lead());
        match after > kept.saturating_add(window) {
            true => self.evict(after - kept),
            false => Ok(()),
        }
    }

    /// The clusters of the tokens `kept`, counted from the first clustered one, of which nothing comes before in `stored`.
    fn cut(&self, stored: &Stored, kept: Range<usize>) -> Result<Option<KvClusters>> {
        let Some(clusters) = self.clusters.as_ref().filter(|_| !kept.is_empty()) else { return Ok(None) };
        self.fence.write(stored.keys.device())?;
        let tokens = |t: &Tensor| t.narrow(2, self.lead(), kept.len());
        Ok(Some(clusters.cut(kept.clone(), &tokens(&stored.keys)?, &tokens(&stored.values)?)?))
    }

    /// The codes of the tokens `kept`, counted in the same way.
    fn cut_codes(&self, kept: Range<usize>) -> Result<Option<CodedTokens>> {
        let Some(coded) = self.coded.as_ref().filter(|_| !kept.is_empty()) else { return Ok(None) };
        self.fence.write(coded.labels.device())?;
        Ok(Some(if kept.len() == coded.len() { coded.clone() } else { coded.cut(kept)? }))
    }
}
