//! What layers over keys and values share.

use crate::{problem, Error, Result};
use candle_core::{DType, Tensor};

/// The first tokens of clusters in the order of their `rank`, up to a `budget`, f32 `(p, units, 1)` of at most `most`, which the
/// clusters have: the positions in the clusters' order, u32 `(p, units, most)`, and how many each cluster gives, f32
/// `(p, units, k)`. All else is `(p, units, k)`, and `starts` `(p, k)`. Clusters of no tokens rank last. Positions beyond the
/// budget are in range and mean nothing.
pub(super) fn chosen_tokens(
    rank: &Tensor,
    sizes: &Tensor,
    starts: &Tensor,
    budget: &Tensor,
    most: usize,
) -> Result<(Tensor, Tensor)> {
    let (p, units, k) = rank.dims3()?;
    // A cluster that matters has a token at least.
    let ranked = rank.contiguous()?.arg_sort_last_dim(false)?.narrow(2, 0, k.min(most))?.contiguous()?;
    let size = sizes.gather(&ranked, 2)?;
    let before = (running(&size)? - &size)?;
    let taken = before.neg()?.broadcast_add(budget)?.relu()?.minimum(&size)?;
    let taken = sizes.zeros_like()?.scatter_add(&ranked, &taken, 2)?;

    // A mark at the slot where each cluster starts: counting the marks tells whose each slot is.
    let mark = before.clamp(0.0, most as f64)?.to_dtype(DType::U32)?;
    let marks = Tensor::zeros((p, units, most + 1), DType::F32, rank.device())?;
    let marks = marks.scatter_add(&mark, &before.ones_like()?, 2)?.narrow(2, 0, most)?.contiguous()?;
    let whose = (running(&marks)? - 1.0)?.to_dtype(DType::U32)?;
    let starts = starts.unsqueeze(1)?.broadcast_as((p, units, k))?.contiguous()?.gather(&ranked, 2)?;
    let slot = Tensor::arange(0u32, most as u32, rank.device())?.to_dtype(DType::F32)?;
    let tokens = (starts - before)?.gather(&whose, 2)?.broadcast_add(&slot)?;
    Ok((tokens.to_dtype(DType::U32)?, taken))
}

/// Sums along the rows of `(p, units, n)`, each up to its column. Candle multiplies by a triangle: one for all rows here, and
/// not one for each problem.
pub(super) fn running(t: &Tensor) -> Result<Tensor> {
    Ok(t.flatten(0, 1)?.cumsum(1)?.reshape(t.shape())?)
}

/// `t` `(p, n, k)`, or `value` where u8 `mask` `(p, 1, k)` is set.
pub(super) fn unless(mask: &Tensor, t: &Tensor, value: f64) -> Result<Tensor> {
    let value = Tensor::full(value, (), t.device())?.to_dtype(t.dtype())?.broadcast_as(t.shape())?;
    Ok(mask.broadcast_as(t.shape())?.where_cond(&value, t)?)
}

/// The type in which scores are weighed.
pub(super) fn wide(scores: &Tensor) -> Result<Tensor> {
    Ok(scores.to_dtype(if scores.dtype() == DType::F64 { DType::F64 } else { DType::F32 })?)
}

/// The sizes of float `(batch, heads, n, d)`.
pub(super) fn four(argument: &'static str, t: &Tensor) -> Result<[usize; 4]> {
    if !matches!(t.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument, got: t.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    match *t.dims() {
        [b, h, n, d] if b * h * n * d > 0 => Ok([b, h, n, d]),
        [_, _, _, _] => Err(Error::Range { argument, got: 0, min: 1, max: usize::MAX }),
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
