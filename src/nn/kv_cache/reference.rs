//! Attention to chosen tokens by Candle's ops: where there is no kernel for it, and what kernels are tested against.

use super::{CodedTokens, KvBudget, KvClusters, Stored};
use crate::{
    error::Result,
    nn::parts::{chosen_tokens, masked_fill, to_accumulate_dtype},
};
use candle_core::{DType, Tensor};
use candle_nn::ops::softmax_last_dim;
use std::ops::Range;

/// Neighbouring tokens that a block of queries reads exactly.
pub(super) struct Piece {
    pub(super) tokens: Range<usize>,
    /// `(1 or batch, 1 or heads, 1 or rows, tokens)`, which is added to their scores where not every row sees all of them.
    pub(super) mask: Option<Tensor>,
}

/// A block of queries reads this of the clusters. `p` problems of `units` that choose alone, each for `n / units` queries.
pub(super) struct Choice {
    /// u32 `(p, units, tokens)`: the clustered tokens that are read, counted from the first of them.
    read: Option<Tensor>,
    estimate: Option<Estimate>,
}

/// A token that stands for others.
struct Estimate {
    /// `(p, n, k)`, wide: the score of the mean key and the logarithm of the tokens it stands for.
    scores: Tensor,
    /// `(p, k, d)`
    values: Tensor,
}

impl Choice {
    /// For `queries` `(p, rows, group, d)`, scaled.
    pub(super) fn new(
        clusters: &KvClusters,
        queries: &Tensor,
        budget: &KvBudget,
        softcap: Option<f64>,
    ) -> Result<Self> {
        let (p, rows, group, _) = queries.dims4()?;
        let flat = queries.flatten(1, 2)?;
        let sizes = clusters.sizes.flatten(0, 1)?.contiguous()?;
        let k = sizes.dims()[1];
        let mean_keys = clusters.mean_keys.dequantize(flat.dtype())?.flatten(0, 1)?;
        let scores = to_accumulate_dtype(&flat.matmul(&mean_keys.transpose(1, 2)?)?)?;
        let empty = sizes.eq(0f32)?.unsqueeze(1)?;
        let units = if budget.shared { rows } else { rows * group };
        let sizes = sizes.unsqueeze(1)?.broadcast_as((p, units, k))?.contiguous()?;
        let (mut read, mut left) = (None, sizes.clone());
        if budget.tokens > 0 {
            let bounds = (&scores + beyond_means(&flat, &clusters.spreads.flatten(0, 1)?, budget.reach())?)?;
            let mut rank = masked_fill(&empty, &capped(&bounds, softcap)?, f64::NEG_INFINITY)?;
            if budget.shared {
                rank = softmax_last_dim(&rank)?.reshape((p, rows, group, k))?.sum(2)?;
            }
            let starts = clusters.offsets.narrow(2, 0, k)?.flatten(0, 1)?.to_dtype(DType::F32)?;
            let tokens = Tensor::full(budget.tokens as f32, (p, units, 1), rank.device())?;
            let (tokens, taken) = chosen_tokens(&rank, &sizes, &starts, &tokens, budget.tokens)?;
            let order = clusters.order.flatten(0, 1)?.contiguous()?;
            let tokens = tokens.reshape((p, units * budget.tokens))?;
            read = Some(order.gather(&tokens, 1)?.reshape((p, units, budget.tokens))?);
            left = (left - taken)?;
        }
        let estimate = if budget.estimate {
            let left = left.to_dtype(scores.dtype())?.log()?.reshape((p, rows, units / rows, k))?;
            let scores = capped(&scores, softcap)?.reshape((p, rows, group, k))?.broadcast_add(&left)?.flatten(1, 2)?;
            Some(Estimate { scores, values: clusters.mean_values.dequantize(queries.dtype())?.flatten(0, 1)? })
        } else {
            None
        };
        Ok(Self { read, estimate })
    }
}

/// What ranks a cluster above its mean key, `(p, n, k)`: so many standard deviations, for scaled `queries` `(p, n, d)` and `spreads` `(p, k)`. Nothing where that
/// is beyond the type.
fn beyond_means(queries: &Tensor, spreads: &Tensor, reach: f64) -> Result<Tensor> {
    let norms = queries.to_dtype(spreads.dtype())?.sqr()?.sum_keepdim(2)?.sqrt()?;
    let beyond = (norms * reach)?.broadcast_mul(&spreads.unsqueeze(1)?)?;
    Ok(beyond.lt(f64::INFINITY)?.where_cond(&beyond, &beyond.zeros_like()?)?)
}

/// The tokens that choices count.
pub(super) enum Lists<'a> {
    /// Stored ones from this on.
    Stored(usize),
    /// Codes, with the cluster of each.
    Coded(&'a CodedTokens, &'a Tensor),
}

/// Attention of `queries` `(p, rows, group, d)` to `pieces` of what is stored, to the tokens of a choice from `lists`, and to its
/// estimates, in one softmax.
pub(super) fn read_chosen(
    queries: &Tensor,
    stored: &Stored,
    pieces: &[Piece],
    softcap: Option<f64>,
    choice: Option<&Choice>,
    lists: &Lists<'_>,
) -> Result<Tensor> {
    let (p, rows, group, d) = queries.dims4()?;
    let (n, width, dtype) = (rows * group, stored.values.dims()[3], queries.dtype());
    let flat = queries.flatten(1, 2)?;
    let (keys, values) = (stored.keys.flatten(0, 1)?, stored.values.flatten(0, 1)?);

    let near = pieces.iter().map(|Piece { tokens, mask }| {
        let scores = flat.matmul(&keys.narrow(1, tokens.start, tokens.len())?.transpose(1, 2)?)?;
        let scores = capped(&scores, softcap)?;
        mask.as_ref().map_or(Ok(scores.clone()), |mask| masked(&scores, mask, stored.keys.dims()[1], group))
    });
    let mut scores = near.collect::<Result<Vec<_>>>()?;

    let mut gathered = None;
    if let Some(index) = choice.and_then(|c| c.read.as_ref()) {
        let (_, units, tokens) = index.dims3()?;
        let [keys, values] = match lists {
            Lists::Stored(first) => {
                let room = stored.keys.dims()[2];
                let base: Vec<u32> = (0..p).map(|i| (i * room + first) as u32).collect();
                let base = Tensor::from_vec(base, (p, 1, 1), index.device())?;
                let index = index.broadcast_add(&base)?.flatten_all()?;
                [keys.flatten(0, 1)?.index_select(&index, 0)?, values.flatten(0, 1)?.index_select(&index, 0)?]
            }
            Lists::Coded(coded, labels) => {
                let heads = stored.keys.dims()[1];
                coded.decoded_at(&index.reshape((p / heads, heads, units * tokens))?, labels)?
            }
        };
        let rows = |t: Tensor| t.reshape((p * units, tokens, ()));
        let of_unit = flat.reshape((p * units, n / units, d))?;
        let chosen = of_unit.matmul(&rows(keys)?.transpose(1, 2)?)?;
        scores.push(capped(&chosen.reshape((p, n, tokens))?, softcap)?);
        gathered = Some((rows(values)?, units, tokens));
    }
    let estimate = choice.and_then(|c| c.estimate.as_ref());
    scores.extend(estimate.map(|e| e.scores.clone()));

    let weights = softmax_last_dim(&Tensor::cat(&scores, 2)?)?.to_dtype(dtype)?;
    let mut at = 0;
    let mut part = |width: usize| {
        at += width;
        weights.narrow(2, at - width, width)?.contiguous()
    };
    let near = pieces.iter().map(|Piece { tokens, .. }| {
        Ok(part(tokens.len())?.matmul(&values.narrow(1, tokens.start, tokens.len())?)?)
    });
    let mut output = near.collect::<Result<Vec<_>>>()?;
    if let Some((values, units, tokens)) = gathered {
        let weights = part(tokens)?.reshape((p * units, n / units, tokens))?;
        output.push(weights.matmul(&values)?.reshape((p, n, width))?);
    }
    if let Some(estimate) = estimate {
        output.push(part(estimate.scores.dims()[2])?.matmul(&estimate.values)?);
    }
    let output = output.into_iter().map(Ok).reduce(|a: candle_core::Result<_>, b| a? + b?);
    Ok(output.expect("a query sees itself")?.reshape((p, rows, group, width))?)
}

/// Scores in the type in which they are weighed, bounded softly by `softcap` if there is one.
fn capped(scores: &Tensor, softcap: Option<f64>) -> Result<Tensor> {
    let scores = to_accumulate_dtype(scores)?;
    match softcap {
        Some(cap) => Ok(((scores / cap)?.tanh()? * cap)?),
        None => Ok(scores),
    }
}

/// `scores` `(p, rows * group, tokens)` and a `mask` as a [`Piece`] has it.
fn masked(scores: &Tensor, mask: &Tensor, kv_heads: usize, group: usize) -> Result<Tensor> {
    let (p, n, tokens) = scores.dims3()?;
    let (batch, heads, rows, _) = mask.dims4()?;
    let (kv, of_each) = if heads == 1 { (1, 1) } else { (kv_heads, group) };
    let mask = mask.to_dtype(scores.dtype())?.reshape((batch, kv, of_each, rows, tokens))?.transpose(2, 3)?;
    let scores = scores.reshape((p / kv_heads, kv_heads, n / group, group, tokens))?.broadcast_add(&mask)?;
    Ok(scores.reshape((p, n, tokens))?)
}
