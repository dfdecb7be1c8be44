//! What training sees of a batch.

use crate::{error::Result, functional, row_weights};
use candle_core::{DType, Tensor};

/// A codebook makes this of a batch in training.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Quantized {
    /// Each row's nearest entry, before the codebook learns, shaped and typed as the rows, with a straight-through gradient.
    pub values: Tensor,
    /// The entries' numbers, u32 `(..batch, n)`: always in range.
    pub codes: Tensor,
    /// The loss with its weights, a scalar: over the rows that count, by theirs. Of an [`EmaCodebook`](crate::nn::EmaCodebook) the commitment loss.
    pub loss: Tensor,
    /// The share of the codebook that the rows that count used.
    pub usage: Usage,
}

/// The share of a codebook that some codes use.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Usage {
    /// Entries in use, u32 `(..batch)`.
    pub codes_used: Tensor,
    /// The exponential of the entropy of the codes, f64 `(..batch)`: `k` if all are used alike, 1 if one is, 0 if none is.
    pub perplexity: Tensor,
}

impl Usage {
    /// From the weights of the clusters, f64 `(b, k)`.
    pub(super) fn of(weights: &Tensor, batch: &[usize]) -> Result<Self> {
        let total = functional::totals(weights)?;
        let share = weights.broadcast_div(&row_weights::or_one(&total)?.unsqueeze(1)?)?;
        // The logarithm of the smallest normal number stands in for that of 0, which its factor 0 drops.
        let entropy = functional::totals(&(&share * share.maximum(f64::MIN_POSITIVE)?.log()?)?)?.neg()?;
        let perplexity = (entropy.exp()? * total.gt(0.0)?.to_dtype(DType::F64)?)?;
        let used = functional::totals(&weights.gt(0.0)?.to_dtype(DType::F64)?)?;
        Ok(Self { codes_used: used.to_dtype(DType::U32)?.reshape(batch)?, perplexity: perplexity.reshape(batch)? })
    }
}
