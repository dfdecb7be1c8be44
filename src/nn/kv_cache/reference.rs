//! Attention to chosen tokens by Candle's ops: where there is no kernel for it, and what kernels are tested against.

use super::{KvBudget, KvClusters, Stored};
use crate::{
    error::Result,
    nn::parts::{chosen_tokens, masked_fill, to_accumulate_dtype},
};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::softmax_last_dim;
use std::ops::Range;

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
    pub(super) fn new(clusters: &KvClusters, queries: &Tensor, budget: &KvBudget) -> Result<Self> {
        let (p, rows, group, _) = queries.dims4()?;
        let flat = queries.flatten(1, 2)?;
        let sizes = clusters.sizes.flatten(0, 1)?.contiguous()?;
        let k = sizes.dims()[1];
        let scores = to_accumulate_dtype(&flat.matmul(&clusters.mean_keys.flatten(0, 1)?.transpose(1, 2)?)?)?;
        let empty = sizes.eq(0f32)?.unsqueeze(1)?;
        let units = if budget.shared { rows } else { rows * group };
        let sizes = sizes.unsqueeze(1)?.broadcast_as((p, units, k))?.contiguous()?;
        let (mut read, mut left) = (None, sizes.clone());
        if budget.tokens > 0 {
            let mut rank = masked_fill(&empty, &scores, f64::NEG_INFINITY)?;
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
            let scores = scores.reshape((p, rows, group, k))?.broadcast_add(&left)?.flatten(1, 2)?;
            Some(Estimate { scores, values: clusters.mean_values.flatten(0, 1)? })
        } else {
            None
        };
        Ok(Self { read, estimate })
    }
}

/// Attention of `queries` `(p, rows, group, d)` to the `exact` tokens, of which row `i` sees those up to `last + i`, to the
/// tokens of a choice, counted from `offset`, and to its estimates, in one softmax.
pub(super) fn read_chosen(
    queries: &Tensor,
    stored: &Stored,
    exact: &[Range<usize>],
    last: usize,
    choice: Option<&Choice>,
    offset: usize,
) -> Result<Tensor> {
    let (p, rows, group, d) = queries.dims4()?;
    let (n, dtype) = (rows * group, queries.dtype());
    let flat = queries.flatten(1, 2)?;
    let (keys, values) = (stored.keys.flatten(0, 1)?, stored.values.flatten(0, 1)?);

    let near = exact.iter().map(|r| Ok(flat.matmul(&keys.narrow(1, r.start, r.len())?.transpose(1, 2)?)?));
    let near = to_accumulate_dtype(&Tensor::cat(&near.collect::<Result<Vec<_>>>()?, 2)?)?;
    let width = near.dims()[2];
    let mut scores = vec![match mask(exact, last, rows, group, near.device())? {
        Some(mask) => near.broadcast_add(&mask.to_dtype(near.dtype())?)?,
        None => near,
    }];

    let mut gathered = None;
    if let Some(index) = choice.and_then(|c| c.read.as_ref()) {
        let (_, units, tokens) = index.dims3()?;
        let room = stored.keys.dims()[2];
        let base: Vec<u32> = (0..p).map(|i| (i * room + offset) as u32).collect();
        let base = Tensor::from_vec(base, (p, 1, 1), index.device())?;
        let index = index.broadcast_add(&base)?.flatten_all()?;
        let rows = |t: &Tensor| t.flatten(0, 1)?.index_select(&index, 0)?.reshape((p * units, tokens, d));
        let of_unit = flat.reshape((p * units, n / units, d))?;
        let chosen = of_unit.matmul(&rows(&keys)?.transpose(1, 2)?)?;
        scores.push(to_accumulate_dtype(&chosen.reshape((p, n, tokens))?)?);
        gathered = Some((rows(&values)?, units, tokens));
    }
    let estimate = choice.and_then(|c| c.estimate.as_ref());
    scores.extend(estimate.map(|e| e.scores.clone()));

    let weights = softmax_last_dim(&Tensor::cat(&scores, 2)?)?.to_dtype(dtype)?;
    let mut at = 0;
    let mut part = |width: usize| {
        at += width;
        weights.narrow(2, at - width, width)?.contiguous()
    };
    let near = part(width)?;
    let mut start = 0;
    let near = exact.iter().map(|r| {
        start += r.len();
        let weights = near.narrow(2, start - r.len(), r.len())?.contiguous()?;
        Ok(weights.matmul(&values.narrow(1, r.start, r.len())?)?)
    });
    let mut output = near.collect::<Result<Vec<_>>>()?;
    if let Some((values, units, tokens)) = gathered {
        let weights = part(tokens)?.reshape((p * units, n / units, tokens))?;
        output.push(weights.matmul(&values)?.reshape((p, n, d))?);
    }
    if let Some(estimate) = estimate {
        output.push(part(estimate.scores.dims()[2])?.matmul(&estimate.values)?);
    }
    let output = output.into_iter().map(Ok).reduce(|a: candle_core::Result<_>, b| a? + b?);
    Ok(output.expect("a query sees itself")?.reshape((p, rows, group, d))?)
}

/// f32 `(rows * group, tokens)`: minus infinity where an exact token comes after the row's own. `None` where none does.
fn mask(exact: &[Range<usize>], last: usize, rows: usize, group: usize, device: &Device) -> Result<Option<Tensor>> {
    if exact.iter().all(|r| r.end <= last + 1) {
        return Ok(None);
    }
    let tokens: Vec<usize> = exact.iter().cloned().flatten().collect();
    let of_row = |i: usize| tokens.iter().map(move |&t| if t > last + i / group { f32::NEG_INFINITY } else { 0.0 });
    let mask: Vec<f32> = (0..rows * group).flat_map(of_row).collect();
    Ok(Some(Tensor::from_vec(mask, (rows * group, tokens.len()), device)?))
}
