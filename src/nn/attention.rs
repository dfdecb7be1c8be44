//! The attention of a decoder layer, over a cache that is read by clusters.

use super::{
    kv_cache::Scoring,
    parts::{check_like, check_scale, dims4_float},
    ClusteredKvCache, KvBudget,
};
use crate::{
    error::{Error, Result},
    problem,
};
use candle_core::Tensor;

/// A budget for all tokens there can be.
const ALL: KvBudget = KvBudget::new(usize::MAX);

/// Attention of one layer of a decoder, with its cache: it stands in the place of "append, repeat the key heads, mask, softmax" in a
/// model's `forward`, after the rotation by position.
///
/// A prompt, and any other call of several rows, reads all tokens (causally, in blocks of rows); a single new token reads what the
/// budget allows of the clusters of a [`ClusteredKvCache`], which are made as soon as a segment of tokens is old enough. Query heads
/// may share key heads, in groups of neighbours.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
///
/// let mut attention = ClusteredAttention::new(ClusteredKvCache::new(1024), KvBudget::new(128));
/// let random = |heads, rows| Tensor::randn(0f32, 1f32, (2, heads, rows, 64), &Device::Cpu);
/// let out = attention.forward(&random(9, 500)?, &random(3, 500)?, &random(3, 500)?, 0)?; // the prompts of two sequences
/// assert_eq!(out.dims(), [2, 9, 500, 64]);
/// for offset in 500..510 {
///     attention.forward(&random(9, 1)?, &random(3, 1)?, &random(3, 1)?, offset)?; // a token of each
/// }
/// attention.reset(); // before other sequences
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// Options of models: a [`sliding_window`](Self::sliding_window), a [`softcap`](Self::softcap) of scores, values of another width than
/// keys, batches with [`left_padding`](Self::left_padding), and any additive mask ([`forward_masked`](Self::forward_masked)). Drafts are
/// taken back by [`truncate`](Self::truncate), beams move by [`ClusteredKvCache::reorder`] of the [`cache`](Self::cache_mut), and a
/// clone goes on from a common prompt.
#[derive(Clone, Debug)]
pub struct ClusteredAttention {
    cache: ClusteredKvCache,
    budget: KvBudget,
    softmax_scale: Option<f64>,
    softcap: Option<f64>,
    window: Option<usize>,
    clustered_rows: usize,
    auto_cluster: bool,
}

impl ClusteredAttention {
    /// Attention over a cache, whose settings say which tokens are always read and how others are clustered: an empty one, or one with
    /// a prompt that was [saved](ClusteredKvCache::save).
    pub fn new(cache: ClusteredKvCache, budget: KvBudget) -> Self {
        let (softmax_scale, softcap, window) = (None, None, None);
        Self { cache, budget, softmax_scale, softcap, window, clustered_rows: 1, auto_cluster: true }
    }

    /// The factor of scores (default: one over the root of the queries' columns).
    pub fn softmax_scale(mut self, scale: f64) -> Self {
        self.softmax_scale = Some(scale);
        self
    }

    /// Bounds scores softly, `softcap * tanh(score / softcap)`, as Gemma 2 does (default: not). Tokens and clusters are scored alike.
    /// There is no kernel for it, so that it goes through Candle's ops.
    pub fn softcap(mut self, softcap: Option<f64>) -> Self {
        self.softcap = softcap;
        self
    }

    /// A token sees so many tokens, itself among them (default: all before it). What a window holds is read in full, never clustered, and
    /// no sinks are read before it: a layer with a window has no use for the budget. Tokens that have left the window are evicted
    /// now and then, so that a layer stores little more than two windows.
    pub fn sliding_window(mut self, tokens: Option<usize>) -> Self {
        self.window = tokens;
        self
    }

    /// The most rows of a call that reads clusters (default: 1). A call of more rows, as a prompt is, reads all tokens; a draft of a few
    /// tokens that is to be checked may read as single tokens do.
    pub fn clustered_rows(mut self, rows: usize) -> Self {
        self.clustered_rows = rows;
        self
    }

    /// Has [`forward`](Self::forward) cluster a segment as soon as there is one (default: yes). If not,
    /// [`cluster_layers`](Self::cluster_layers) does it, for all layers of a model in one call.
    pub fn auto_cluster(mut self, yes: bool) -> Self {
        self.auto_cluster = yes;
        self
    }

    /// Changes the budget of the calls to come, which may differ from step to step.
    pub fn set_budget(&mut self, budget: KvBudget) {
        self.budget = budget;
    }

    /// The tokens before the next ones, and so the next `offset`: those stored and those evicted.
    pub fn offset(&self) -> usize {
        self.cache.current_seq_len().saturating_add(self.cache.evicted())
    }

    /// The tokens that are stored, and their clusters.
    pub fn cache(&self) -> &ClusteredKvCache {
        &self.cache
    }

    /// The same to change: to reorder the sequences of a batch, or to forget tokens.
    pub fn cache_mut(&mut self) -> &mut ClusteredKvCache {
        &mut self.cache
    }

    /// Forgets all tokens and the padding of their batch: what a model's `clear_kv_cache` calls.
    pub fn reset(&mut self) {
        self.cache.reset();
    }

    /// Says how many tokens of padding each sequence of the next prompt begins with: [`ClusteredKvCache::left_padding`].
    ///
    /// # Errors
    /// Refuses what [`ClusteredKvCache::left_padding`] refuses.
    pub fn left_padding(&mut self, tokens: &Tensor) -> Result<()> {
        self.cache.left_padding(tokens)
    }

    /// Forgets all tokens from position `offset` on, clustered or not.
    ///
    /// # Errors
    /// Refuses to keep more than there are, and less than the sinks and a window where tokens after them were evicted. Fails as
    /// [`ClusteredKvCache::truncate`].
    pub fn truncate(&mut self, offset: usize) -> Result<()> {
        let (evicted, max) = (self.cache.evicted(), self.offset());
        let min = match evicted {
            0 => 0,
            _ => evicted.saturating_add(self.cache.lead()).saturating_add(self.window.unwrap_or(0)),
        };
        if !(min..=max).contains(&offset) {
            return Err(Error::Range { argument: "offset", got: offset, min, max });
        }
        self.cache.truncate(offset - evicted)
    }

    /// Stores keys `(batch, kv_heads, rows, d)` and values `(batch, kv_heads, rows, width)` of the next tokens, as queries meet them, and
    /// attends from their queries `(batch, heads, rows, d)`: `(batch, heads, rows, width)`.
    ///
    /// `offset` is the number of tokens before these, as models pass it for the rotation. It has to be the number that the layer has
    /// seen ([`offset`](Self::offset)), so that nothing is attended to that belongs to other positions: 0 begins no new sequence, which
    /// [`reset`](Self::reset) does.
    ///
    /// # Errors
    /// Refuses another offset, a window of no tokens, a soft cap that is not above 0, and what [`ClusteredKvCache::append`] and
    /// [`ClusteredKvCache::attend`] refuse. Fails as [`ClusteredKvCache::cluster`], which names keys that are not finite. The tokens
    /// of a call that failed are not stored.
    pub fn forward(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, offset: usize) -> Result<Tensor> {
        let (rows, scoring) = self.checked(q, k, offset)?;
        let budget = match self.window {
            None if rows <= self.clustered_rows => self.budget,
            _ => ALL,
        };
        self.step(k, v, |cache| cache.attend_scored(q, budget, scoring))
    }

    /// [`forward`](Self::forward) with a mask, `(1 or batch, 1 or heads, rows, tokens)` of any float dtype, that is added to the scores of
    /// all tokens, those of this call among them. It alone says what a row sees; all tokens are read.
    ///
    /// # Errors
    /// Refuses what [`forward`](Self::forward) refuses, a mask of another shape or device, and one beside a window or padding.
    pub fn forward_masked(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        offset: usize,
        mask: &Tensor,
    ) -> Result<Tensor> {
        let (rows, scoring) = self.checked(q, k, offset)?;
        let (got, expected) = (dims4_float("mask", mask)?, [k.dims()[0], q.dims()[1], rows, self.tokens() + rows]);
        // The first two may be 1 instead.
        if (0..4).any(|i| got[i] != expected[i] && (i > 1 || got[i] != 1)) {
            return Err(Error::Shape { argument: "mask", got: got.to_vec(), expected: expected.to_vec() });
        }
        problem::check_device("mask", mask, q.device())?;
        let beside = match self.window {
            Some(window) => Some(format!("a window of {window}")),
            None => self.cache.is_padded().then(|| "padding".into()),
        };
        if let Some(with) = beside {
            return Err(Error::Conflict { argument: "mask", got: format!("{got:?}"), with });
        }
        self.step(k, v, |cache| cache.attend_scored(q, ALL, Scoring { mask: Some(mask), ..scoring }))
    }

    /// Clusters what waits in all layers of a model, in one call: [`ClusteredKvCache::cluster_layers`]. Layers with a window, which have
    /// nothing to cluster, may be among them.
    ///
    /// # Errors
    /// Refuses what [`ClusteredKvCache::cluster_layers`] refuses, and fails as it does.
    pub fn cluster_layers<'a>(layers: impl IntoIterator<Item = &'a mut Self>) -> Result<bool> {
        let layers = layers.into_iter().filter(|layer| layer.window.is_none());
        ClusteredKvCache::cluster_layers(layers.map(|layer| &mut layer.cache))
    }

    /// Tokens stored.
    fn tokens(&self) -> usize {
        self.cache.current_seq_len()
    }

    /// The number of rows and how they are scored, if all is well so far.
    fn checked(&self, q: &Tensor, k: &Tensor, offset: usize) -> Result<(usize, Scoring<'static>)> {
        let ([_, heads, ..], [batch, kv_heads, rows, d]) = (dims4_float("q", q)?, dims4_float("k", k)?);
        check_like("q", q, k, [batch, heads, rows, d])?;
        if !heads.is_multiple_of(kv_heads) {
            let with = format!("keys of {kv_heads}, which must divide them");
            return Err(Error::Conflict { argument: "q", got: format!("{heads} heads"), with });
        }
        if offset != self.offset() {
            let expected = self.offset();
            return Err(Error::Size { argument: "offset", what: "number of tokens before", got: offset, expected });
        }
        if self.window == Some(0) {
            return Err(Error::Range { argument: "sliding_window", got: 0, min: 1, max: usize::MAX });
        }
        if let Some(got) = self.softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(Error::Value { argument: "softcap", got, expected: "finite and above 0" });
        }
        let scale = self.softmax_scale.unwrap_or_else(|| (d.max(1) as f64).sqrt().recip());
        check_scale(scale)?;
        Ok((rows, Scoring { scale, softcap: self.softcap, window: self.window, mask: None }))
    }

    /// Stores tokens, attends, and then clusters or evicts what has grown old.
    fn step(
        &mut self,
        k: &Tensor,
        v: &Tensor,
        attend: impl FnOnce(&ClusteredKvCache) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let before = self.tokens();
        self.cache.store(k, v)?;
        let output = attend(&self.cache).and_then(|output| {
            match self.window {
                Some(window) => self.cache.keep_window(window)?,
                None if self.auto_cluster => drop(self.cache.cluster()?),
                None => {}
            }
            Ok(output)
        });
        if output.is_err() {
            self.cache.truncate(before)?;
        }
        output
    }
}
