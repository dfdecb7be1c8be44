//! Routed attention by Candle's ops: where there is no kernel for it, and what kernels are tested against.

use crate::{
    error::{Error, Result},
    functional,
    nn::parts::{chosen_tokens, cumsum_last, masked_fill, ranking, to_accumulate_dtype},
    request::{Order, Routed, RoutedGroups},
};
use candle_core::{DType, Tensor, D};
use candle_nn::ops::softmax_last_dim;

/// Elements that a block of query rows may score at once without a kernel for it: 64 MB of f32.
const BLOCK: usize = 1 << 24;
/// Says the same as [`primitives::route`](crate::primitives::route) by Candle's ops: all scores, and a mask by group of queries.
pub(super) fn masked(r: &Routed<'_>) -> Result<Tensor> {
    let (b, heads, m, d) = r.q.dims4()?;
    let (kv_heads, n) = (r.keys.dims()[1], r.keys.dims()[2]);
    let (p, group, device) = (b * kv_heads, heads / kv_heads, r.q.device());
    let scaled = |q: &Tensor| Ok::<_, Error>((to_accumulate_dtype(q)? * r.scale)?.reshape((p, group, q.dim(2)?, d))?);
    let queries = scaled(r.q)?;
    let joined = |tokens: &Tensor, means: Option<&Tensor>| {
        let all = [Some(tokens), means].into_iter().flatten().cloned().collect::<Vec<_>>();
        to_accumulate_dtype(&Tensor::cat(&all, 2)?.flatten(0, 1)?)
    };
    let keys = joined(r.keys, r.groups.map(|g| &g.mean_keys))?.transpose(1, 2)?;
    let values = joined(r.values, r.groups.map(|g| &g.mean_values))?;
    let columns = values.dims()[1];
    // With the group of each query, numbered over all heads.
    let bias = |g: &RoutedGroups| {
        let units = g.queries.k();
        let before = Tensor::from_iter((0..p * group).map(|h| (h * units) as u32), device)?.reshape((p * group, 1))?;
        let query_groups = g.queries.labels.broadcast_add(&before)?;
        let bias = match &g.choosers {
            Some((q, groups)) => g.bias(r, &scaled(q)?, groups)?,
            None => g.bias(r, &queries, &g.queries)?,
        };
        Ok::<_, Error>((bias, query_groups))
    };
    let bias = r.groups.map(bias).transpose()?;
    let step = (BLOCK / (b * heads * columns)).clamp(1, m);
    let mut outputs = Vec::with_capacity(m.div_ceil(step));
    for start in (0..m).step_by(step) {
        let count = step.min(m - start);
        let rows = queries.narrow(2, start, count)?.reshape((p, group * count, d))?;
        let mut scores = rows.matmul(&keys)?.reshape((p * group, count, columns))?;
        if let Some((bias, query_groups)) = &bias {
            let bias = bias.index_select(&query_groups.narrow(1, start, count)?.flatten_all()?, 0)?;
            scores = (scores + bias.reshape((p * group, count, columns))?)?;
        }
        if r.causal {
            let last = n - m + start;
            let sees =
                |i: usize| (0..columns).map(move |j| if j < n && j > last + i { f32::NEG_INFINITY } else { 0.0 });
            let mask = Tensor::from_iter((0..count).flat_map(sees), device)?.reshape((count, columns))?;
            scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        }
        let weights = softmax_last_dim(&scores)?.reshape((p, group * count, columns))?;
        outputs.push(weights.matmul(&values)?.reshape((b, heads, count, d))?.to_dtype(r.q.dtype())?);
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

impl RoutedGroups {
    /// Each group of queries adds this to the scores, f32 or f64 `(b * heads * groups, n + k)`: minus infinity for tokens that
    /// it does not read, and the logarithm of the tokens that a mean stands for. Those of `queries` `(p, group, m, d)`, scaled,
    /// that are in a group of `of` choose for it.
    fn bias(&self, r: &Routed<'_>, queries: &Tensor, of: &Order) -> Result<Tensor> {
        let (p, group, m, _) = queries.dims4()?;
        let (k, units, n) = (self.keys.k(), of.k(), r.keys.dims()[2]);
        let (grouped, device) = (self.keys.order.dims()[1], queries.device());
        let means = to_accumulate_dtype(&self.mean_keys.flatten(0, 1)?.transpose(1, 2)?)?;
        let scores = queries.flatten(1, 2)?.matmul(&means)?.reshape((p, group * m, k))?;
        let dtype = scores.dtype();
        // In f64, which counts any tokens.
        let ends = self.keys.offsets.to_dtype(DType::F64)?;
        let starts = ends.narrow(1, 0, k)?.contiguous()?;
        let sizes = (ends.narrow(1, 1, k)? - &starts)?.unsqueeze(1)?;

        // Groups without tokens have no part in a softmax.
        let scores = masked_fill(&sizes.eq(0f64)?, &scores, f64::NEG_INFINITY)?;
        let counted = scores.broadcast_add(&sizes.log()?.to_dtype(dtype)?)?;
        let share = scores.broadcast_sub(&counted.log_sum_exp(D::Minus1)?.unsqueeze(2)?)?.exp()?;
        // A query whose shares are NaN has no say.
        let share = masked_fill(&share.ne(&share)?, &share, 0.0)?;
        let rank = functional::means_by_order(&share.reshape((p * group, m, k))?, of)?;
        let rank = rank.to_dtype(DType::F64)?.reshape((p, group * units, k))?;

        let sizes = sizes.broadcast_as((p, group * units, k))?.contiguous()?;
        let budget = budgets(&rank, &sizes, r)?;
        let (chosen, taken) = chosen_tokens(&rank, &sizes, &starts, &budget, r.most)?;
        let order = self.keys.order.contiguous()?;
        let tokens = order.gather(&chosen.flatten(1, 2)?, 1)?.reshape(chosen.shape())?;
        // A token beyond the budget marks a column that is cut off.
        let slot = Tensor::arange(0u32, r.most as u32, device)?.to_dtype(DType::F64)?.broadcast_as(chosen.shape())?;
        let nowhere = Tensor::full(grouped as u32, chosen.shape(), device)?;
        let tokens = slot.broadcast_lt(&budget)?.where_cond(&tokens, &nowhere)?;
        let unread = Tensor::full(f32::NEG_INFINITY, (p, group * units, grouped + 1), device)?;
        let read = unread.scatter(&tokens, &tokens.zeros_like()?.to_dtype(DType::F32)?, 2)?.narrow(2, 0, grouped)?;
        let near = |count: usize| Tensor::zeros((p, group * units, count), DType::F32, device);
        let mut parts = vec![read];
        if r.sinks > 0 {
            parts.insert(0, near(r.sinks)?);
        }
        if n > r.sinks + grouped {
            parts.push(near(n - r.sinks - grouped)?);
        }
        parts.push(match r.estimate {
            true => (sizes - taken)?.log()?.to_dtype(DType::F32)?,
            false => Tensor::full(f32::NEG_INFINITY, (p, group * units, k), device)?,
        });
        Ok(Tensor::cat(&parts, 2)?.flatten(0, 1)?.to_dtype(dtype)?)
    }
}

/// The tokens that each group of queries reads, f64 `(p, units, 1)`, by the attention `rank` to a token of each cluster of
/// `sizes`, both f64 `(p, units, k)`: the fewest where there is no attention to any.
fn budgets(rank: &Tensor, sizes: &Tensor, r: &Routed<'_>) -> Result<Tensor> {
    let (p, units, k) = rank.dims3()?;
    if r.least == r.most {
        return Ok(Tensor::full(r.most as f64, (p, units, 1), rank.device())?);
    }
    let ranked = ranking(rank, sizes)?;
    let mass = (rank * sizes)?.gather(&ranked, 2)?;
    let through = cumsum_last(&mass)?;
    let enough = (through.narrow(2, k - 1, 1)? * r.share)?;
    let needed = (through - mass)?.broadcast_lt(&enough)?.to_dtype(DType::F64)?;
    let tokens = (needed * sizes.gather(&ranked, 2)?)?.sum_keepdim(2)?;
    Ok(tokens.maximum(r.least as f64)?.minimum(r.most as f64)?)
}
