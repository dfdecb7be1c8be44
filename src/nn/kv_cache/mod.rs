//! A key/value cache that is read by clusters of its keys.

mod budget;
mod clusters;
mod reference;
mod stored;

use super::parts::{check_like, check_scale, dims4_float};
use crate::{
    error::{Error, Result},
    memory::{Fence, Memory},
    primitives, problem,
    request::{Attention, Order},
    select::empty,
};
pub use budget::KvBudget;
use candle_core::{DType, Tensor};
pub use clusters::KvClusters;
use reference::{read_chosen, Choice};
use std::{ops::Range, sync::Arc};
use stored::{room_for, write_tokens, Stored};

/// Positions are computed in f32, which counts no further.
const MAX_TOKENS: usize = 1 << 24;
/// Elements of all keys, with a block of threads to spare.
const MAX_ELEMENTS: usize = u32::MAX as usize - 1024;
/// Elements that a block of query rows may gather and score: 64 MB of f32.
const BLOCK: usize = 1 << 24;

/// Keys and values of one layer, of which [`attend`](Self::attend) reads a part: the first tokens, the recent ones, and
/// those in the clusters nearest to the query. Every other cluster stands in for its tokens with its mean.
///
/// ```text
/// 0        sinks                              clustered        current_seq_len
/// | exact  | segment, k clusters | segment, .. | recent: exact  |
/// ```
/// [`append`](Self::append) only stores. [`cluster`](Self::cluster) groups what has grown old since it last did, as a new
/// segment with clusters of its own, and [`cluster_layers`](Self::cluster_layers) does so for all layers of a model in one
/// batched call: once after the prompt, then once a step. Keys are those that queries meet, after any rotation by position.
///
/// A clone goes on by itself: it shares what is stored until either writes, which copies first. [`reorder`](Self::reorder) moves
/// the sequences of a batch, as the beams of a search do.
///
/// Values, keys and queries are not searched for NaN or infinities, but for the keys that [`cluster`](Self::cluster) groups. One
/// that is not finite makes the outputs that read it so, of its own head and batch element alone.
///
/// Sources: exact reads and estimates inside one softmax as in Chen et al. 2025 (RetroInfer) and Hooper et al. 2025
/// (Multipole attention), selection by centroid under a token budget as in Liu et al. 2024 (ClusterKV).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_flash_kmeans::nn::{ClusteredKvCache, KvBudget};
///
/// let random = |heads, n| Tensor::randn(0f32, 1f32, (1, heads, n, 64), &Device::Cpu);
/// let mut cache = ClusteredKvCache::new(1024);
/// cache.append(&random(3, 1000)?, &random(3, 1000)?)?; // the prompt
/// cache.cluster()?;
/// cache.append(&random(3, 1)?, &random(3, 1)?)?; // a new token
/// let out = cache.attend(&random(9, 1)?, 0.125, KvBudget::new(128))?; // nine query heads share three key heads
/// assert_eq!(out.dims(), [1, 9, 1, 64]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Debug)]
pub struct ClusteredKvCache {
    fence: Fence,
    settings: Settings,
    /// The room to start with, and to grow by.
    max_seq_len: usize,
    stored: Option<Stored>,
    clusters: Option<KvClusters>,
    memory: Memory,
}

/// With scratch memory of its own.
impl Clone for ClusteredKvCache {
    fn clone(&self) -> Self {
        let (stored, clusters) = (self.stored.clone(), self.clusters.clone());
        Self { fence: self.fence.clone(), stored, clusters, memory: Memory::kept(), ..*self }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settings {
    sinks: usize,
    recent: usize,
    cluster_size: usize,
    segment: usize,
    passes: usize,
}

impl ClusteredKvCache {
    /// An empty cache with room for `max_seq_len` tokens, growing by as many. 4 sinks, at least 64 recent tokens, 16 tokens
    /// a cluster on average, segments of at least 128 tokens, 4 passes of k-means.
    pub fn new(max_seq_len: usize) -> Self {
        let settings = Settings { sinks: 4, recent: 64, cluster_size: 16, segment: 128, passes: 4 };
        let (fence, memory) = (Fence::default(), Memory::kept());
        Self { fence, settings, max_seq_len, stored: None, clusters: None, memory }
    }

    /// The first tokens, which every query reads: models park attention there.
    pub fn sinks(mut self, tokens: usize) -> Self {
        self.settings.sinks = tokens;
        self
    }

    /// The last tokens, which every query reads and which are not clustered yet.
    pub fn recent(mut self, tokens: usize) -> Self {
        self.settings.recent = tokens;
        self
    }

    /// Tokens in a cluster, on average.
    pub fn cluster_size(mut self, tokens: usize) -> Self {
        self.settings.cluster_size = tokens;
        self
    }

    /// The fewest tokens that are clustered at once.
    pub fn segment(mut self, tokens: usize) -> Self {
        self.settings.segment = tokens;
        self
    }

    /// Most updates of the centroids.
    pub fn passes(mut self, passes: usize) -> Self {
        self.settings.passes = passes;
        self
    }

    /// Stores the keys and values of further tokens, both `(batch, kv_heads, n, d)`, and returns all there are, as views. No
    /// tokens (`n` = 0) and a batch of no sequences are stored like any others.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that differ from each other or from what is stored, no heads or columns, and more than
    /// 2^24 tokens.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let (dims, len) = (dims4_float("k", k)?, self.current_seq_len());
        let [batch, kv_heads, n, d] = dims;
        for (argument, got) in [("k heads", kv_heads), ("k columns", d)] {
            if got == 0 {
                return Err(Error::Range { argument, got, min: 1, max: u32::MAX as usize });
            }
        }
        check_like("v", v, k, dims)?;
        if let Some(stored) = &self.stored {
            let [b, h, _, d] = dims4_float("k", &stored.keys)?;
            check_like("k", k, &stored.keys, [b, h, n, d])?;
        }
        let (total, most) = (len + n, self.max_seq_len.max(1));
        // Candle's copies count the elements of all heads in 32 bits.
        let elements = (batch.max(1) * kv_heads).saturating_mul(d.max(1));
        let (room, limit) = (total.div_ceil(most).saturating_mul(most), MAX_TOKENS.min(MAX_ELEMENTS / elements));
        if total.max(room) > limit {
            return Err(Error::TooLarge { argument: "k", got: total.max(room), limit });
        }
        self.fence.write(k.device())?;
        let writable = |s: &mut Stored| s.keys.dims()[2] >= room && Arc::get_mut(&mut s.shared).is_some();
        if !self.stored.as_mut().is_some_and(writable) {
            let grown = |like: &Tensor, old: Option<Tensor>| {
                let new = room_for([batch, kv_heads, room, d], like)?;
                write_tokens(&new, old.as_ref(), 0)?;
                Ok::<_, Error>(new)
            };
            let (keys, values) = (grown(k, self.k()?)?, grown(v, self.v()?)?);
            self.stored = Some(Stored { keys, values, len, shared: Arc::new(()) });
        }
        let stored = self.stored.as_mut().expect("just made");
        write_tokens(&stored.keys, Some(k), len)?;
        write_tokens(&stored.values, Some(v), len)?;
        stored.len = total;
        Ok((stored.keys.narrow(2, 0, total)?, stored.values.narrow(2, 0, total)?))
    }

    /// All keys, `(batch, kv_heads, n, d)`: a view, which shows what is written after a [`truncate`](Self::truncate).
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        Ok(self.stored.as_ref().map(|s| s.keys.narrow(2, 0, s.len)).transpose()?)
    }

    /// All values, as [`k`](Self::k).
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        Ok(self.stored.as_ref().map(|s| s.values.narrow(2, 0, s.len)).transpose()?)
    }

    /// Tokens stored.
    pub fn current_seq_len(&self) -> usize {
        self.stored.as_ref().map_or(0, |s| s.len)
    }

    /// The clusters so far; `None` before there are any.
    pub fn clusters(&self) -> Option<&KvClusters> {
        if let Some(clusters) = &self.clusters {
            self.fence.show(clusters.labels.device());
        }
        self.clusters.as_ref()
    }

    /// Forgets everything but the settings, memory for scratch included.
    pub fn reset(&mut self) {
        // First, so that what other threads do to the tensors is over.
        self.fence = Fence::default();
        (self.stored, self.clusters, self.memory) = (None, None, Memory::kept());
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
        let rows = index.contiguous()?;
        let taken = |t: &Tensor| match largest {
            Some(_) => Ok(t.index_select(&rows, 0)?),
            None => empty(&[&[0], &t.dims()[1..]].concat(), t.dtype(), t.device()),
        };
        let (keys, values) = (taken(&stored.keys)?, taken(&stored.values)?);
        let clusters = self.clusters.as_ref().map(|clusters| clusters.map(taken)).transpose()?;
        self.stored = Some(Stored { keys, values, len: stored.len, shared: Arc::new(()) });
        self.clusters = clusters;
        Ok(())
    }

    /// Forgets all tokens but the first `len`: what a model guessed and then took back.
    ///
    /// # Errors
    /// Refuses to keep more than there are, and to forget tokens that are clustered, whose means and lists would still have
    /// them: [`reset`](Self::reset) forgets those with all others.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        let (min, max) = (self.clusters.as_ref().map_or(0, |_| self.clustered().end), self.current_seq_len());
        if len > max {
            return Err(Error::Range { argument: "len", got: len, min, max });
        }
        if len < min {
            let with = format!("clustered tokens up to {min}, which cannot be cut: it has to be in {min}..={max}");
            return Err(Error::Conflict { argument: "len", got: len.to_string(), with });
        }
        if let Some(stored) = &mut self.stored {
            stored.len = len;
        }
        Ok(())
    }

    /// Attention of `q`, `(batch, heads, rows, d)`: the last `rows` tokens stored, each seeing those up to itself. Returns
    /// the same shape.
    ///
    /// `heads` is a multiple of the cache's; neighbouring ones share a key head. Sinks and recent tokens are read exactly.
    /// Clusters are ranked by the score of their mean key, and their tokens read in that order, exactly
    /// [`tokens`](KvBudget::new) of them, the last cluster in part. What remains of the others enters the same softmax with the
    /// mean key, the mean value and the number of tokens left. Where the budget suffices for all tokens, as before the
    /// first segment, this is attention.
    ///
    /// A score of NaN ranks as minus infinity: after all numbers, by the cluster's index. Where the heads choose together, a NaN
    /// among a head's scores makes its softmax NaN, and then clusters go by their index.
    ///
    /// Scores are computed in the cache's dtype, and weighed in f32 (f64 for f64). Nothing is read by the host, and no gradient
    /// flows. One row of f16, bf16 or f32 with 64 or 128 columns is one kernel on a GPU with thread block clusters (from Hopper
    /// on; three launches elsewhere), which reads tokens where they lie and scores in f32. Others go through Candle's ops.
    /// Without queries the result is empty.
    ///
    /// # Errors
    /// Refuses queries whose shape, dtype or device does not fit the cache, more rows than there are tokens after the last
    /// segment, and a scale that is not finite.
    pub fn attend(&self, q: &Tensor, softmax_scale: f64, budget: KvBudget) -> Result<Tensor> {
        let [batch, q_heads, rows, d] = dims4_float("q", q)?;
        check_scale(softmax_scale)?;
        let Some(stored) = &self.stored else {
            return match q.elem_count() {
                0 => Ok(q.detach()),
                _ => Err(Error::Range { argument: "q rows", got: rows, min: 0, max: 0 }),
            };
        };
        let [b, kv_heads, _, width] = dims4_float("k", &stored.keys)?;
        if !q_heads.is_multiple_of(kv_heads) {
            let with = format!("a cache of {kv_heads}, which must divide them");
            return Err(Error::Conflict { argument: "q", got: format!("{q_heads} heads"), with });
        }
        check_like("q", q, &stored.keys, [b, q_heads, rows, width])?;
        let free = if self.clusters.is_some() { stored.len - self.clustered().end } else { stored.len };
        if rows > free {
            return Err(Error::Range { argument: "q rows", got: rows, min: 0, max: free });
        }
        let q = q.detach();
        if q.elem_count() == 0 {
            return Ok(q);
        }
        let clusters = self.clusters.as_ref().filter(|_| budget.tokens < self.clustered().len());
        // Tokens that are not clustered, or are to be read anyway, are read where they are.
        let exact = match clusters {
            Some(_) => [0..self.settings.sinks, self.clustered().end..stored.len],
            None => [0..0, 0..stored.len],
        };
        let exact: Vec<_> = exact.into_iter().filter(|range| !range.is_empty()).collect();
        self.shown()?;

        if let (1, Some(c)) = (rows, clusters) {
            let attention = Attention {
                q: &q.reshape((b, q_heads, d))?.contiguous()?,
                keys: &stored.keys,
                values: &stored.values,
                tokens: stored.len,
                sinks: self.settings.sinks,
                clusters: &Order::of_heads(&c.labels, &c.order, &c.offsets)?,
                mean_keys: &c.mean_keys,
                mean_values: &c.mean_values,
                scale: softmax_scale,
                budget: budget.tokens,
                shared: budget.shared,
                estimate: budget.estimate,
            };
            if let Some(output) = primitives::attend(&attention, &self.memory)? {
                return Ok(output.reshape((batch, q_heads, 1, d))?);
            }
        }

        let group = q_heads / kv_heads;
        // Rows outside, heads of a group inside: the queries of a choice are neighbours, whether it is shared or not.
        let queries = (q * softmax_scale)?.reshape((b * kv_heads, group, rows, d))?.transpose(1, 2)?;
        let read: usize = exact.iter().map(ExactSizeIterator::len).sum();
        let clustered = clusters.map_or(0, |c| c.sizes.dims()[2] + budget.tokens * (2 * d + 1));
        let step = (BLOCK / (q_heads * batch * (read + clustered))).clamp(1, rows);
        let mut outputs = Vec::with_capacity(rows.div_ceil(step));
        for start in (0..rows).step_by(step) {
            let count = step.min(rows - start);
            let queries = queries.narrow(1, start, count)?.contiguous()?;
            let last = stored.len - rows + start;
            let choice = clusters.map(|c| Choice::new(c, &queries, &budget)).transpose()?;
            let offset = self.settings.sinks;
            outputs.push(read_chosen(&queries, stored, &exact, last, choice.as_ref(), offset)?);
        }
        let output = Tensor::cat(&outputs, 1)?.transpose(1, 2)?;
        Ok(output.reshape((batch, q_heads, rows, d))?)
    }

    /// Before this thread reads what is stored.
    fn shown(&self) -> Result<()> {
        self.stored.as_ref().map_or(Ok(()), |s| self.fence.read(s.keys.device()))
    }

    /// The tokens that are clustered.
    fn clustered(&self) -> Range<usize> {
        let start = self.settings.sinks;
        start..start + self.clusters.as_ref().map_or(0, |c| c.labels.dims()[2])
    }

    /// The tokens that are neither clustered nor sinks nor recent.
    fn waiting(&self) -> Range<usize> {
        let start = self.clustered().end;
        start..self.current_seq_len().saturating_sub(self.settings.recent).max(start)
    }
}
