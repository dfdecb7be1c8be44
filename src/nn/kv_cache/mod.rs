//! A key/value cache that is read by clusters of its keys.

mod attend;
mod budget;
mod clusters;
mod coded;
mod codes;
mod file;
mod forget;
mod gains;
mod means;
mod padding;
mod reference;
mod rotations;
mod stored;

use super::{
    parts::{check_like, dims4_float},
    Rotation,
};
use crate::{
    error::{Error, Result},
    memory::{Fence, Memory},
};
pub(super) use attend::Scoring;
pub use budget::KvBudget;
use candle_core::Tensor;
pub use clusters::KvClusters;
use coded::CodedTokens;
pub use codes::KvCodes;
use codes::{CodedRows, Pieces};
pub use means::KvMeans;
use padding::Padding;
use rotations::Rotations;
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
/// With [`codes`](Self::codes) clustered tokens are kept in few bits, in about a quarter of the memory or less.
///
/// A clone goes on by itself: it shares what is stored until either writes, which copies first, so that any number of clones of a
/// prompt that have not written take the memory of one. [`reorder`](Self::reorder) moves the sequences of a batch, as the beams of
/// a search do, [`truncate`](Self::truncate) takes tokens back, [`evict`](Self::evict) forgets old ones, and
/// [`left_padding`](Self::left_padding) is for sequences of different lengths. [`ClusteredAttention`](super::ClusteredAttention) is
/// the cache as a model's attention.
///
/// Values, keys and queries are not searched for NaN or infinities, but for the keys that [`cluster`](Self::cluster) groups and what becomes codes. One
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
    /// In the place of `clusters`, and of what is clustered in `stored`.
    coded: Option<CodedTokens>,
    rotations: Rotations,
    padding: Option<Padding>,
    /// Tokens that were stored between the sinks and those that are left.
    evicted: usize,
    memory: Memory,
}

/// With scratch memory of its own.
impl Clone for ClusteredKvCache {
    fn clone(&self) -> Self {
        let (stored, clusters, coded) = (self.stored.clone(), self.clusters.clone(), self.coded.clone());
        let (fence, rotations, padding) = (self.fence.clone(), self.rotations.clone(), self.padding.clone());
        Self { fence, stored, clusters, coded, rotations, padding, memory: Memory::kept(), ..*self }
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
    /// Of keys and of values.
    codes: Option<[Pieces; 2]>,
}

impl ClusteredKvCache {
    /// An empty cache with room for `max_seq_len` tokens, growing by as many. 4 sinks, at least 64 recent tokens, 8 tokens
    /// a cluster on average, segments of 128 to 2,048 tokens, 4 passes of k-means.
    pub fn new(max_seq_len: usize) -> Self {
        let (segment, max_segment) = (128, 2048);
        let settings = Settings { sinks: 4, recent: 64, cluster_size: 8, segment, max_segment, passes: 4, codes: None };
        let (fence, memory) = (Fence::default(), Memory::kept());
        let (stored, clusters, coded, padding) = (None, None, None, None);
        let rotations = Rotations::new([Rotation::None, Rotation::None]);
        Self { fence, settings, max_seq_len, stored, clusters, coded, rotations, padding, evicted: 0, memory }
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

    /// Keeps tokens as `codes` from when they are clustered on, and frees their keys and values: sinks and what is not clustered yet
    /// stay as they are. Clusters' means are kept in 8 bits. Segments have at most 256 clusters then, whatever
    /// [`max_segment`](Self::max_segment) says, and room is made for a segment at a time. Entries come from the tokens that are clustered
    /// first, of which there have to be four for each, so that a prompt should be clustered before what follows it. Rotations that
    /// were found already stay.
    pub fn codes(mut self, codes: KvCodes) -> Self {
        self.settings.codes = Some(codes.pieces);
        if !self.rotations.are_found() {
            self.rotations = Rotations::new(codes.rotations);
        }
        self
    }

    /// Stores further tokens, keys `(batch, kv_heads, n, d)` and values `(batch, kv_heads, n, width)`, and returns all there are, as
    /// views; with [`codes`](Self::codes) those that are no codes, which are the first and the last ones, as copies where they are kept
    /// [rotated](KvCodes::rotation). No tokens (`n` = 0) and a batch of no sequences are stored like any others.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that differ from each other or from what is stored, no heads or columns, another batch
    /// than that of the [`left_padding`](Self::left_padding), more than 2^24 tokens, and codes and given rotations that do not fit the
    /// columns. The host waits for those rotations to be checked with the first tokens.
    pub fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        self.store(k, v)?;
        let [keys, values] = self.stored.as_ref().expect("just made").rows()?;
        Ok((self.rotations.keys_back(&keys)?, self.rotations.values_back(&values)?))
    }

    /// [`append`](Self::append) for who does not ask for what there is.
    pub(super) fn store(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
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
        self.settings.codes.map_or(Ok(()), |pieces| Pieces::check(pieces, [d, width]))?;
        if self.stored.is_none() {
            self.rotations.check(kv_heads, [d, width])?;
        }
        let at = self.stored.as_ref().map_or(0, |s| s.len);
        let room = self.room(at + n, batch * kv_heads * d.max(width))?;
        if len + n > MAX_TOKENS {
            return Err(Error::TooLarge { argument: "k", got: len + n, limit: MAX_TOKENS });
        }
        self.fence.write(k.device())?;
        let (k, v) = (self.without_padding(k, len)?, self.without_padding(v, len)?);
        let (k, v) = (&self.rotations.keys(&k)?, &self.rotations.values(&v)?);
        let writable = |s: &mut Stored| s.keys.dims()[2] >= room && Arc::get_mut(&mut s.shared).is_some();
        if !self.stored.as_mut().is_some_and(writable) {
            let grown = |like: &Tensor, old: Option<Tensor>| {
                let new = room_for([batch, kv_heads, room, like.dims()[3]], like)?;
                write_tokens(&new, old.as_ref(), 0)?;
                Ok::<_, Error>(new)
            };
            let [old_keys, old_values] =
                self.stored.as_ref().map(Stored::rows).transpose()?.map_or([None, None], |o| o.map(Some));
            let (keys, values) = (grown(k, old_keys)?, grown(v, old_values)?);
            self.stored = Some(Stored { keys, values, len: at, shared: Arc::new(()) });
        }
        let stored = self.stored.as_mut().expect("just made");
        write_tokens(&stored.keys, Some(k), at)?;
        write_tokens(&stored.values, Some(v), at)?;
        stored.len = at + n;
        Ok(())
    }

    /// Room for so many tokens, each of `elements` over all heads.
    fn room(&self, tokens: usize, elements: usize) -> Result<usize> {
        let step = if self.settings.codes.is_some() { self.settings.segment } else { usize::MAX };
        let most = self.max_seq_len.min(step).max(1);
        let room = tokens.div_ceil(most).saturating_mul(most).max(tokens);
        // Candle's copies count the elements of all heads in 32 bits.
        let limit = MAX_TOKENS.min(MAX_ELEMENTS / elements.max(1));
        match room > limit {
            true => Err(Error::TooLarge { argument: "k", got: room, limit }),
            false => Ok(room),
        }
    }

    /// All keys, `(batch, kv_heads, n, d)`: a view, which shows what is written after a [`truncate`](Self::truncate). Of a cache with
    /// [`codes`](Self::codes) a copy, in which clustered keys are what their codes stand for.
    pub fn k(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        self.stored.as_ref().map(|s| self.rotations.keys_back(&self.kept_keys(s)?)).transpose()
    }

    /// All values, `(batch, kv_heads, n, width)`, as [`k`](Self::k).
    pub fn v(&self) -> Result<Option<Tensor>> {
        self.shown()?;
        self.stored.as_ref().map(|s| self.rotations.values_back(&self.kept_values(s)?)).transpose()
    }

    /// All keys as they are kept.
    fn kept_keys(&self, stored: &Stored) -> Result<Tensor> {
        self.whole(&stored.keys.narrow(2, 0, stored.len)?, |coded| &coded.keys)
    }

    /// All values as they are kept.
    fn kept_values(&self, stored: &Stored) -> Result<Tensor> {
        self.whole(&stored.values.narrow(2, 0, stored.len)?, |coded| &coded.values)
    }

    /// All tokens, from those that are no codes.
    fn whole(&self, rows: &Tensor, pick: fn(&CodedTokens) -> &CodedRows) -> Result<Tensor> {
        let Some(coded) = &self.coded else { return Ok(rows.clone()) };
        let (lead, len) = (self.lead(), rows.dims()[2]);
        Ok(Tensor::cat(&[rows.narrow(2, 0, lead)?, coded.decoded(pick)?, rows.narrow(2, lead, len - lead)?], 2)?)
    }

    /// Tokens stored.
    pub fn current_seq_len(&self) -> usize {
        self.stored.as_ref().map_or(0, |s| s.len) + self.coded.as_ref().map_or(0, CodedTokens::len)
    }

    /// The memory of all tensors that hold tokens, clusters and rotations, with room for more, in bytes. Clones that share them count them
    /// too.
    pub fn bytes(&self) -> usize {
        let stored = self.stored.iter().flat_map(|s| [&s.keys, &s.values]);
        let clusters = self.clusters.iter().flat_map(KvClusters::tensors);
        let coded = self.coded.iter().flat_map(|c| c.tensors().map(|(_, t)| t));
        let rotations = self.rotations.found.iter().flatten();
        stored.chain(clusters).chain(coded).chain(rotations).map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }

    /// Tokens that were forgotten by [`evict`](Self::evict): those after the sinks have come that much later in the sequence.
    pub fn evicted(&self) -> usize {
        self.evicted
    }

    /// The clusters so far; `None` before there are any, and of a cache with [`codes`](Self::codes), which keeps them in another form.
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
        let uncoded = self.clusters.as_ref().map_or(0, |c| c.labels.dims()[2]);
        start..start + self.coded.as_ref().map_or(uncoded, CodedTokens::len)
    }

    /// Where tokens are stored that are sinks or come after the clusters.
    fn stored_rows(&self, tokens: Range<usize>) -> Range<usize> {
        let coded = self.coded.as_ref().map_or(0, CodedTokens::len);
        let before = if tokens.start < self.clustered().end { 0 } else { coded };
        tokens.start - before..tokens.end - before
    }

    /// The tokens that are neither clustered nor sinks nor recent.
    fn waiting(&self) -> Range<usize> {
        let start = self.clustered().end;
        start..self.current_seq_len().saturating_sub(self.settings.recent).max(start)
    }
}
