//! Layers over keys and values share these parts.

use crate::{
    error::{Error, Result},
    problem,
    ranking::{cumsum, descending, without_nan},
};
use candle_core::{DType, Tensor};

/// The first tokens of clusters in the order of their `rank`, up to a `budget` `(p, units, 1)` of at most `most`, which the
/// clusters have: the positions in the clusters' order, u32 `(p, units, most)`, and how many each cluster gives, `(p, units, k)`.
///
/// `rank` is `(p, units, k)`; `sizes` `(p, units, k)`, `starts` `(p, k)` and `budget` are in one float dtype that counts the
/// tokens exactly. A rank of NaN is one of minus infinity, equal ranks go by the cluster's index, and clusters of no tokens come
/// after all others, so that every position up to `most` is one of a cluster's; those beyond the budget mean nothing.
pub(super) fn chosen_tokens(
    rank: &Tensor,
    sizes: &Tensor,
    starts: &Tensor,
    budget: &Tensor,
    most: usize,
) -> Result<(Tensor, Tensor)> {
    let (p, units, k) = rank.dims3()?;
    // A cluster that matters has a token at least, so that `most` clusters are enough.
    let ranked = ranking(rank, sizes)?.narrow(2, 0, k.min(most))?.contiguous()?;
    let size = sizes.gather(&ranked, 2)?;
    let before = (cumsum_last(&size)? - &size)?;
    let taken = before.neg()?.broadcast_add(budget)?.relu()?.minimum(&size)?;
    let taken = sizes.zeros_like()?.scatter_add(&ranked, &taken, 2)?;

    // A mark at the slot where each cluster starts: counting the marks tells whose each slot is.
    let mark = before.clamp(0.0, most as f64)?.to_dtype(DType::U32)?;
    let marks = Tensor::zeros((p, units, most + 1), sizes.dtype(), rank.device())?;
    let marks = marks.scatter_add(&mark, &before.ones_like()?, 2)?.narrow(2, 0, most)?.contiguous()?;
    let whose = (cumsum_last(&marks)? - 1.0)?.to_dtype(DType::U32)?;
    let starts = starts.unsqueeze(1)?.broadcast_as((p, units, k))?.contiguous()?.gather(&ranked, 2)?;
    let slot = Tensor::arange(0u32, most as u32, rank.device())?.to_dtype(sizes.dtype())?;
    let tokens = (starts - before)?.gather(&whose, 2)?.broadcast_add(&slot)?;
    Ok((tokens.to_dtype(DType::U32)?, taken))
}

/// The clusters by their `rank` as [`chosen_tokens`] takes them, the best first: u32 `(p, units, k)`.
pub(super) fn ranking(rank: &Tensor, sizes: &Tensor) -> Result<Tensor> {
    // In f64, where empty clusters have room below the smallest f32.
    let rank = without_nan(&rank.to_dtype(DType::F64)?.contiguous()?)?.maximum(f64::MIN)?;
    let rank = masked_fill(&sizes.eq(0.0)?, &rank, f64::NEG_INFINITY)?;
    Ok(descending(&rank.flatten(0, 1)?)?.reshape(rank.shape())?)
}

/// Sums along the rows of `(p, units, n)`, each up to its column.
pub(super) fn cumsum_last(t: &Tensor) -> Result<Tensor> {
    Ok(cumsum(&t.flatten(0, 1)?)?.reshape(t.shape())?)
}

/// `t`, or `value` where the u8 `mask` is set, which is of `t`'s shape or is repeated to it.
pub(super) fn masked_fill(mask: &Tensor, t: &Tensor, value: f64) -> Result<Tensor> {
    let value = Tensor::full(value, (), t.device())?.to_dtype(t.dtype())?.broadcast_as(t.shape())?;
    Ok(mask.broadcast_as(t.shape())?.where_cond(&value, t)?)
}

/// The type in which scores are weighed.
pub(super) fn to_accumulate_dtype(scores: &Tensor) -> Result<Tensor> {
    Ok(scores.to_dtype(if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?)
}

/// The sizes of float `(batch, heads, n, d)`, of which any may be 0.
pub(super) fn dims4_float(argument: &'static str, t: &Tensor) -> Result<[usize; 4]> {
    if !matches!(t.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument, got: t.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    match *t.dims() {
        [b, h, n, d] => Ok([b, h, n, d]),
        _ => Err(Error::Size { argument, what: "number of dimensions", got: t.rank(), expected: 4 }),
    }
}

pub(super) fn check_like(argument: &'static str, t: &Tensor, like: &Tensor, expected: [usize; 4]) -> Result<()> {
    problem::check_dtype(argument, t, like.dtype())?;
    problem::check_device(argument, t, like.device())?;
    if t.dims() != expected {
        return Err(Error::Shape { argument, got: t.dims().to_vec(), expected: expected.to_vec() });
    }
    Ok(())
}

/// Checks that scores can be multiplied by `scale`.
pub(super) fn check_scale(scale: f64) -> Result<()> {
    match scale.is_finite() {
        true => Ok(()),
        false => Err(Error::Value { argument: "softmax_scale", got: scale, expected: "finite" }),
    }
}
