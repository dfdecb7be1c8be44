//! Attention over a cache.

use super::{
    coded::CodedTokens,
    reference::{read_chosen, Choice, Lists, Piece},
    stored::Stored,
    ClusteredKvCache, KvBudget, KvClusters,
};
use crate::{
    error::{Error, Result},
    nn::parts::{check_like, check_scale, dims4_float},
    primitives,
    request::{Attention, Clustered, CodedAttention, Order},
    select::empty,
};
use candle_core::{Device, Tensor};
use std::{ops::Range, sync::Arc};

/// Elements that a block of query rows may gather and score: 64 MB of f32.
const BLOCK: usize = 1 << 24;

/// A cluster ranks by its mean key's score and so many standard deviations of its keys: by the best that it may hold, as arms of a bandit do
/// by their upper confidence bound (Lai and Robbins 1985). A cluster that is spread out hides tokens that its mean does not show.
const REACH: f64 = 3.0;

impl KvBudget {
    /// Standard deviations by which clusters rank. Where nothing is estimated, what is read has to be what weighs most, and a cluster that is
    /// spread out is mostly tokens that weigh little: the mean alone ranks it.
    pub(super) fn reach(&self) -> f64 {
        match self.estimate {
            true => REACH,
            false => 0.0,
        }
    }
}

/// The product of a query and a key becomes a score by these, before the softmax.
#[derive(Clone, Copy, Default)]
pub(in crate::nn) struct Scoring<'a> {
    pub scale: f64,
    /// `softcap * tanh(score / softcap)`, as in Gemma 2 (Gemma Team 2024).
    pub softcap: Option<f64>,
    /// A row sees so many tokens, its own among them. Only where all are read.
    pub window: Option<usize>,
    /// A term of the scores, `(1 or batch, 1 or heads, rows, tokens)`, which then alone says what a row sees. Only if all are read.
    pub mask: Option<&'a Tensor>,
}

impl ClusteredKvCache {
    /// Attention of `q`, `(batch, heads, rows, d)`: the last `rows` tokens stored, each seeing those up to itself. Returns
    /// `(batch, heads, rows, width)`, of as many columns as the values have.
    ///
    /// `heads` is a multiple of the cache's; neighbouring ones share a key head. Sinks and recent tokens are read exactly.
    /// Clusters are ranked by a bound of their tokens' scores, that of the mean key and 3 standard deviations of the keys along the query as
    /// if all columns had the same (without estimates by the mean key alone), and their tokens read in that order, exactly [`tokens`](KvBudget::new) of them, the last cluster in part. What remains of the others enters the same softmax with the
    /// mean key, the mean value and the number of tokens left. Where the budget suffices for all tokens, as before the
    /// first segment, this is attention.
    ///
    /// A score of NaN ranks as minus infinity: after all numbers, by the cluster's index. Where the heads choose together, a NaN
    /// among a head's scores makes its softmax NaN, and then clusters go by their index.
    ///
    /// On a CPU, where a row's budget would cost no less than all tokens, counted as [`KvBudget::dense_if_cheaper`] says, all are read,
    /// which is exact.
    ///
    /// One row on a CPU is one kernel, of any dtype and columns, over clusters or all tokens: it reads tokens where they lie, scores and
    /// weighs in f32 (f64 for f64), and has the same bits for any number of threads. On a GPU one row that reads clusters is, of f16, bf16 or
    /// f32 with 64, 80, 96, 112, 128 or 256 columns, as many of keys as of values: a launch with thread block clusters (from Hopper on;
    /// three launches elsewhere).
    /// Of a cache with [`codes`](Self::codes) one row is a kernel that reads them by tables: on a CPU for any budget, on a GPU where the other
    /// kernel would be and pieces have a power of two of columns, at most 16 bytes. Elsewhere the codes of the tokens that are read are
    /// decoded first, those of all where all are read.
    /// Others, several rows and batches with padding go through Candle's ops, a block of rows at a time, with scores in the cache's dtype.
    /// Nothing is read by the host, and no gradient flows. Without queries the result is empty.
    ///
    /// # Errors
    /// Refuses queries whose shape, dtype or device does not fit the cache, more rows than there are tokens (after the last segment,
    /// where the budget does not suffice for all), and a scale that is not finite.
    pub fn attend(&self, q: &Tensor, softmax_scale: f64, budget: KvBudget) -> Result<Tensor> {
        self.attend_scored(q, budget, Scoring { scale: softmax_scale, ..Scoring::default() })
    }

    pub(in crate::nn) fn attend_scored(&self, q: &Tensor, budget: KvBudget, scoring: Scoring) -> Result<Tensor> {
        let [_, q_heads, rows, _] = dims4_float("q", q)?;
        check_scale(scoring.scale)?;
        let Some(stored) = &self.stored else {
            return match q.elem_count() {
                0 => Ok(q.detach()),
                _ => Err(Error::Range { argument: "q rows", got: rows, min: 0, max: 0 }),
            };
        };
        let ([batch, kv_heads, _, columns], width) = (dims4_float("k", &stored.keys)?, stored.values.dims()[3]);
        if !q_heads.is_multiple_of(kv_heads) {
            let with = format!("a cache of {kv_heads}, which must divide them");
            return Err(Error::Conflict { argument: "q", got: format!("{q_heads} heads"), with });
        }
        check_like("q", q, &stored.keys, [batch, q_heads, rows, columns])?;
        let units = if budget.shared { 1 } else { q_heads / kv_heads };
        let dense = primitives::attends_to_all(q.device())?;
        let (len, m) = (self.current_seq_len(), self.clustered().len());
        let bytes = batch * kv_heads * m * (columns + width) * q.dtype().size_in_bytes();
        let less = |c: &&KvClusters| budget.reads_less([m, bytes], c.sizes.dims()[2], units, dense);
        let clusters = self.clusters.as_ref().filter(less);
        // There is no kernel for all of what has to be decoded before.
        let coded = self.coded.as_ref().filter(|c| budget.reads_less([m, bytes], c.k(), units, false));
        let free = if clusters.is_some() || coded.is_some() { len - self.clustered().end } else { len };
        if rows > free {
            return Err(Error::Range { argument: "q rows", got: rows, min: 0, max: free });
        }
        if q.elem_count() == 0 {
            return empty(&[batch, q_heads, rows, width], q.dtype(), q.device());
        }
        self.shown()?;
        let q = self.rotations.keys(&self.without_padding(&q.detach(), len - rows)?)?;
        let plain = scoring.softcap.is_none() && scoring.mask.is_none() && self.padding.is_none();
        if let Some(all) = self.coded.as_ref().filter(|_| rows == 1 && plain && scoring.window.is_none()) {
            if let Some(output) = self.attend_coded(&q, stored, all, budget, scoring.scale)? {
                return self.rotations.values_back(&output);
            }
        }
        let decoded = match &self.coded {
            Some(_) if coded.is_none() => {
                let (keys, values) = (self.kept_keys(stored)?, self.kept_values(stored)?);
                Some(Stored { keys, values, len, shared: Arc::default() })
            }
            _ => None,
        };
        let stored = decoded.as_ref().unwrap_or(stored);
        if rows == 1 && plain && coded.is_none() {
            if let Some(output) = self.attend_fused(&q, stored, clusters, budget, scoring)? {
                return self.rotations.values_back(&output);
            }
        }
        let of_codes = coded.map(CodedTokens::clusters).transpose()?;
        let clusters = of_codes.as_ref().or(clusters);
        self.rotations.values_back(&self.attend_in_blocks(&q, stored, clusters, coded, budget, scoring)?)
    }

    /// One row that reads codes by a kernel, if there is one for it.
    fn attend_coded(
        &self,
        q: &Tensor,
        stored: &Stored,
        coded: &CodedTokens,
        budget: KvBudget,
        scale: f64,
    ) -> Result<Option<Tensor>> {
        let ((batch, q_heads, _, d), width) = (q.dims4()?, stored.values.dims()[3]);
        let attention = CodedAttention {
            q: &q.reshape((batch, q_heads, d))?.contiguous()?,
            keys: &stored.keys,
            values: &stored.values,
            tokens: stored.len,
            scale,
            coded_keys: coded.keys.request(),
            coded_values: coded.values.request(),
            offsets: &coded.offsets,
            spreads: &coded.spreads,
            reach: budget.reach(),
            budget: budget.tokens.min(coded.len()),
            shared: budget.shared,
            estimate: budget.estimate && budget.tokens < coded.len(),
        };
        let output = primitives::attend_coded(&attention, &self.memory)?;
        Ok(output.map(|output| output.reshape((batch, q_heads, 1, width))).transpose()?)
    }

    /// One row by a kernel, if there is one for it.
    fn attend_fused(
        &self,
        q: &Tensor,
        stored: &Stored,
        clusters: Option<&KvClusters>,
        budget: KvBudget,
        scoring: Scoring,
    ) -> Result<Option<Tensor>> {
        let ((batch, q_heads, _, d), width) = (q.dims4()?, stored.values.dims()[3]);
        let clustered = clusters.map(|c| Ok::<_, Error>((c, Order::of_heads(&c.labels, &c.order, &c.offsets)?)));
        let clustered = clustered.transpose()?;
        let start = stored.len.saturating_sub(scoring.window.unwrap_or(usize::MAX));
        let seen = |t: &Tensor| t.narrow(2, start, t.dims()[2] - start);
        let attention = Attention {
            q: &q.reshape((batch, q_heads, d))?.contiguous()?,
            keys: &seen(&stored.keys)?,
            values: &seen(&stored.values)?,
            tokens: stored.len - start,
            scale: scoring.scale,
            clusters: clustered.as_ref().map(|(c, order)| Clustered {
                sinks: self.settings.sinks,
                order,
                mean_keys: c.mean_keys.codes(),
                mean_values: c.mean_values.codes(),
                spreads: &c.spreads,
                reach: budget.reach(),
                budget: budget.tokens,
                shared: budget.shared,
                estimate: budget.estimate,
            }),
        };
        let output = primitives::attend(&attention, &self.memory)?;
        Ok(output.map(|output| output.reshape((batch, q_heads, 1, width))).transpose()?)
    }

    /// Any number of rows by Candle's ops, of which a block has scores at a time.
    fn attend_in_blocks(
        &self,
        q: &Tensor,
        stored: &Stored,
        clusters: Option<&KvClusters>,
        coded: Option<&CodedTokens>,
        budget: KvBudget,
        scoring: Scoring,
    ) -> Result<Tensor> {
        let (batch, q_heads, rows, d) = q.dims4()?;
        let len = self.current_seq_len();
        let (kv_heads, width) = (stored.keys.dims()[1], stored.values.dims()[3]);
        // Tokens that are not clustered, or are to be read anyway, are read where they are.
        let exact = match clusters {
            Some(_) => [0..self.lead(), self.clustered().end..len],
            None => [0..0, 0..len],
        };
        let group = q_heads / kv_heads;
        // Rows outside, heads of a group inside: the queries of a choice are neighbours, whether it is shared or not.
        let queries = (q * scoring.scale)?.reshape((batch * kv_heads, group, rows, d))?.transpose(1, 2)?;
        let window = scoring.window.unwrap_or(usize::MAX);
        let read = exact.iter().map(ExactSizeIterator::len).sum::<usize>().min(window.saturating_mul(2));
        let clustered = clusters.map_or(0, |c| c.sizes.dims()[2] + budget.tokens * (d + width + 1));
        let step = (BLOCK / (q_heads * batch * (read + clustered))).min(window).clamp(1, rows);
        let mut outputs = Vec::with_capacity(rows.div_ceil(step));
        for start in (0..rows).step_by(step) {
            let count = step.min(rows - start);
            let queries = queries.narrow(1, start, count)?.contiguous()?;
            let mut pieces = match scoring.mask {
                Some(mask) => vec![Piece { tokens: 0..len, mask: Some(mask.narrow(2, start, count)?) }],
                None => self.pieces(&exact, len - rows + start, count, window, queries.device())?,
            };
            if coded.is_some() {
                pieces.iter_mut().for_each(|piece| piece.tokens = self.stored_rows(piece.tokens.clone()));
            }
            let choice = clusters.map(|c| Choice::new(c, &queries, &budget, scoring.softcap)).transpose()?;
            let lists = match (coded, clusters) {
                (Some(coded), Some(clusters)) => Lists::Coded(coded, &clusters.labels),
                _ => Lists::Stored(self.lead()),
            };
            outputs.push(read_chosen(&queries, stored, &pieces, scoring.softcap, choice.as_ref(), &lists)?);
        }
        let output = Tensor::cat(&outputs, 1)?.transpose(1, 2)?;
        Ok(output.reshape((batch, q_heads, rows, width))?)
    }

    /// Cuts the `exact` tokens into pieces that all of `count` rows see, the first of which is the token `position`, and others, which get
    /// a mask. A token always sees itself, so that one of the padding, whose value is zero, has a softmax.
    fn pieces(
        &self,
        exact: &[Range<usize>],
        position: usize,
        count: usize,
        window: usize,
        device: &Device,
    ) -> Result<Vec<Piece>> {
        let (starts, last_start) = self.padding.as_ref().map_or((&[0][..], 0), |p| (&p.starts[..], p.last));
        let end = position + count;
        let first = (position + 1).saturating_sub(window);
        let all_see = end.saturating_sub(window).max(last_start).min(position + 1)..position + 1;
        let sees = |start: usize, row: usize, token: usize| {
            token == row || (start <= token && token < row && row - token < window)
        };
        let mask = |tokens: &Range<usize>, rows: Range<usize>| {
            let all = starts.iter().flat_map(|&start| rows.clone().map(move |row| (start, row)));
            let added = all.flat_map(|(start, row)| {
                tokens.clone().map(move |token| if sees(start, row, token) { 0.0 } else { f32::NEG_INFINITY })
            });
            Tensor::from_iter(added, device)?.reshape((starts.len(), 1, rows.len(), tokens.len()))
        };
        let mut pieces = vec![];
        for range in exact {
            let (from, to) = (range.start.max(first), range.end.min(end));
            let [start, stop] = [all_see.start, all_see.end].map(|at| at.clamp(from, to.max(from)));
            let [early, middle, late] = [from..start, start..stop, stop..to];
            // All rows have the same padding behind the last start, if there is no window.
            let of_padding = position >= last_start && window == usize::MAX;
            let rows = if of_padding { position..position + 1 } else { position..end };
            if !early.is_empty() {
                pieces.push(Piece { mask: Some(mask(&early, rows)?), tokens: early });
            }
            if !middle.is_empty() {
                pieces.push(Piece { mask: None, tokens: middle });
            }
            if !late.is_empty() {
                pieces.push(Piece { mask: Some(mask(&late, position..end)?), tokens: late });
            }
        }
        Ok(pieces)
    }
}
