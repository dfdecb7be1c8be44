//! A key/value cache that is read by clusters of its keys.

mod attend;
mod budget;
mod clusters;
mod file;
mod forget;
mod means;
mod padding;
mod reference;
mod stored;

use super::parts::{check_like, dims4_float};
use crate::{
    error::{Error, Result},
    memory::{Fence, Memory},
};
pub(super) use attend::Scoring;
pub use budget::KvBudget;
use candle_core::Tensor;
pub use clusters::KvClusters;
pub use means::KvMeans;
use padding::Padding;
use std::{ops::Range, sync::Arc};
use stored::{room_for, write_tokens, Stored};

/// Positions are computed in f32, which counts no further.
const MAX_TOKENS: usize = 1 << 24;
/// Elements of all keys, with a block of threads to spare.
const MAX_ELEMENTS: usize = u32::MAX as usize - 1024;

/// Keys and values of one layer, of which [`attend`](Self::attend) reads a part: the first tokens, the recent ones, and
/// those in the clusters nearest to the query. Every other cluster stands in for its tokens with its mean.
///
/// ```text
/// 0        sinks                              clustered        current_seq_len
/// | exact  | segment, k clusters | segment, .. | recent: exact  |
/// ```
/// [`append`](Self::append) only stores. [`cluster`](Self::cluster) groups what has grown old since it last did, as new
/// segments with clusters of their own, and [`cluster_layers`](Self::cluster_layers) does so for all layers of a model in one
/// batched call: once after the prompt, then once a step. Keys are those that queries meet, after any rotation by position.
///
/// A clone goes on by itself: it shares what is stored until either writes, which copies first, so that any number of clones of a
/// prompt that have not written take the memory of one. [`reorder`](Self::reorder) moves the sequences of a batch, as the beams of
/// a search do, [`truncate`](Self::truncate) takes tokens back, [`evict`](Self::evict) forgets old ones, and
/// [`left_padding`](Self::left_padding) is for sequences of different lengths. [`ClusteredAttention`](super::ClusteredAttention) is
/// the cache as a model's attention.
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
    padding: Option<Padding>,
    /// Tokens that were stored between the sinks and those that are left.
    evicted: usize,
    memory: Memory,
}

/// With scratch memory of its own.
impl Clone for ClusteredKvCache {
    fn clone(&self) -> Self {
        let (stored, clusters, padding) = (self.stored.clone(), self.clusters.clone(), self.padding.clone());
        Self { fence: self.fence.clone(), stored, clusters, padding, memory: Memory::kept(), ..*self }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Settings {
    sinks: usize,
    recent: usize,
    cluster_size: usize,
    segment: usize,
    max_segment: usize,
    passes: usize,
}

impl ClusteredKvCache {
    /// An empty cache with room for `max_seq_len` tokens, growing by as many. 4 sinks, at least 64 recent tokens, 8 tokens
    /// a cluster on average, segments of 128 to 4,096 tokens, 4 passes of k-means.
    pub fn new(max_seq_len: usize) -> Self {
        let settings = Settings { sinks: 4, recent: 64, cluster_size: 8, segment: 128, max_segment: 4096, passes: 4 };
        let (fence, memory) = (Fence::default(), Memory::kept());
        Self { fence, settings, max_seq_len, stored: None, clusters: None, padding: None, evicted: 0, memory }
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

    /// The most tokens of a segment. More of them that wait, as after a long prompt, become segments whose lengths differ by one token
    /// at most, each with clusters of its own: k-means takes time in proportion to the tokens then, and not to their square.
    pub fn max_segment(mut self, tokens: usize) -> Self {
        self.settings.max_segment = tokens;
        self
    }

    /// Most updates of the centroids.
    pub fn passes(mut self, passes: usize) -> Self {
        self.settings.passes = passes;
        self
    }

    /// Stores further tokens, keys `(batch, kv_heads, n, d)` and values `(batch, kv_heads, n, width)`, and returns all there are, as
    /// views. No tokens (`n` = 0) and a batch of no sequences are stored like any others.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that differ from each other or from what is stored, no heads or columns, another batch
    /// than that of the [`left_padding`](Self::left_padding), and more than 2^24 tokens.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let ([batch, kv_heads, n, d], len) = (dims4_float("k", k)?, self.current_seq_len());
        let [_, _, _, width] = dims4_float("v", v)?;
        for (argument, got) in [("k heads", kv_heads), ("k columns", d), ("v columns", width)] {
            if got == 0 {
                return Err(Error::Range { argument, got, min: 1, max: u32::MAX as usize });
            }
        }
        check_like("v", v, k, [batch, kv_heads, n, width])?;
        if let Some(stored) = &self.stored {
            for (argument, t, like) in [("k", k, &stored.keys), ("v", v, &stored.values)] {
                let [b, h, _, columns] = dims4_float(argument, like)?;
                check_like(argument, t, like, [b, h, n, columns])?;
            }
        }
        self.check_padding(batch)?;
        let room = self.room(len + n, batch * kv_heads * d.max(width))?;
        self.fence.write(k.device())?;
        let (k, v) = (&self.without_padding(k, len)?, &self.without_padding(v, len)?);
        let writable = |s: &mut Stored| s.keys.dims()[2] >= room && Arc::get_mut(&mut s.shared).is_some();
        if !self.stored.as_mut().is_some_and(writable) {
            let grown = |like: &Tensor, old: Option<Tensor>| {
                let new = room_for([batch, kv_heads, room, like.dims()[3]], like)?;
                write_tokens(&new, old.as_ref(), 0)?;
                Ok::<_, Error>(new)
            };
            let (keys, values) = (grown(k, self.k()?)?, grown(v, self.v()?)?);
            self.stored = Some(Stored { keys, values, len, shared: Arc::new(()) });
        }
        let stored = self.stored.as_mut().expect("just made");
        write_tokens(&stored.keys, Some(k), len)?;
        write_tokens(&stored.values, Some(v), len)?;
        stored.len = len + n;
        Ok((stored.keys.narrow(2, 0, stored.len)?, stored.values.narrow(2, 0, stored.len)?))
    }

    /// Room for so many tokens, each of `elements` over all heads.
    fn room(&self, tokens: usize, elements: usize) -> Result<usize> {
        let most = self.max_seq_len.max(1);
        let room = tokens.div_ceil(most).saturating_mul(most).max(tokens);
        // Candle's copies count the elements of all heads in 32 bits.
        let limit = MAX_TOKENS.min(MAX_ELEMENTS / elements.max(1));
        match room > limit {
            true => Err(Error::TooLarge { argument: "k", got: room, limit }),
            false => Ok(room),
        }
    }

    /// All keys, `(batch, kv_heads, n, d)`: a view, which shows what is written after a [`truncate`](Self::truncate).
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        Ok(self.stored.as_ref().map(|s| s.keys.narrow(2, 0, s.len)).transpose()?)
    }

    /// All values, `(batch, kv_heads, n, width)`, as [`k`](Self::k).
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        Ok(self.stored.as_ref().map(|s| s.values.narrow(2, 0, s.len)).transpose()?)
    }

    /// Tokens stored.
    pub fn current_seq_len(&self) -> usize {
        self.stored.as_ref().map_or(0, |s| s.len)
    }

    /// Tokens that were forgotten by [`evict`](Self::evict): those after the sinks have come that much later in the sequence.
    pub fn evicted(&self) -> usize {
        self.evicted
    }

    /// The clusters so far; `None` before there are any.
    pub fn clusters(&self) -> Option<&KvClusters> {
        if let Some(clusters) = &self.clusters {
            self.fence.show(clusters.labels.device());
        }
        self.clusters.as_ref()
    }

    /// Before this thread reads what is stored.
    fn shown(&self) -> Result<()> {
        self.stored.as_ref().map_or(Ok(()), |s| self.fence.read(s.keys.device()))
    }

    /// The tokens before the clustered ones: sinks, and what comes before the last sequence's.
    pub(super) fn lead(&self) -> usize {
        self.padding.as_ref().map_or(0, |p| p.last).saturating_add(self.settings.sinks)
    }

    /// The tokens that are clustered.
    fn clustered(&self) -> Range<usize> {
        let start = self.lead();
        start..start + self.clusters.as_ref().map_or(0, |c| c.labels.dims()[2])
    }

    /// The tokens that are neither clustered nor sinks nor recent.
    fn waiting(&self) -> Range<usize> {
        let start = self.clustered().end;
        start..self.current_seq_len().saturating_sub(self.settings.recent).max(start)
    }
}
