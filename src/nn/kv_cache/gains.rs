//! Lengths of rows apart from their directions: gain and shape (Sabin and Gray 1984).
//!
//! A row is a gain times another one, which is as long as the longest row that entries were trained on. Gains are logarithmic: code `i` is one of
//! `2^(-i / 16)`, so that a byte of each row reaches over sixteen octaves and no table says what it stands for. None is more than 1, by which
//! kernels that weigh entries in half precision may multiply weights.

use crate::{
    error::Result,
    functional,
    nn::codebook::quantizer::{largest, wide},
    tiles::GAINS_PER_OCTAVE,
};
use candle_core::{DType, Tensor};
use std::f64::consts::LN_2;

/// The gains of coded rows.
#[derive(Clone, Debug)]
pub(super) struct Gains {
    /// u8 `(batch, kv_heads, m, 1)`.
    pub(super) codes: Tensor,
    /// `(batch, kv_heads, 1, 1)`, f32, of f64 f64: the length of a row whose gain is 1. Longer ones have the same gain, and longer directions.
    pub(super) longest: Tensor,
}

impl Gains {
    /// The tensors' names in a file, after those of other codes.
    pub(super) const NAMES: [&'static str; 2] = ["gains", "longest"];

    pub(super) fn tensors(&self) -> [&Tensor; 2] {
        [&self.codes, &self.longest]
    }

    pub(super) fn map(&self, f: &impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { codes: f(&self.codes)?, longest: f(&self.longest)? })
    }

    /// Those of more rows. Both have the same longest row.
    pub(super) fn followed_by(&self, next: &Self) -> Result<Self> {
        Ok(Self { codes: Tensor::cat(&[&self.codes, &next.codes], 2)?, longest: self.longest.clone() })
    }
}

/// The length of the longest of rows `(batch, kv_heads, n, d)`.
pub(super) fn longest(x: &Tensor) -> Result<Tensor> {
    let longest = functional::norms(x)?.max_keepdim(2)?.unsqueeze(3)?;
    // With room for a direction that is longer by half a step; and not 0, of which nothing is a share.
    let longest = longest.clamp(f64::from(f32::MIN_POSITIVE), largest(x.dtype()) / 2.0)?;
    Ok(longest.to_dtype(wide(x.dtype()))?)
}

/// Rows `(batch, kv_heads, n, d)` over their gains, and the codes of these, u8 `(batch, kv_heads, n, 1)`.
pub(super) fn directions(x: &Tensor, longest: &Tensor) -> Result<(Tensor, Tensor)> {
    let shares = functional::norms(x)?.unsqueeze(3)?.broadcast_div(&longest.to_dtype(DType::F64)?)?;
    let steps = (shares.log()? * (-(GAINS_PER_OCTAVE as f64) / LN_2))?;
    let codes = steps.round()?.clamp(0.0, f64::from(u8::MAX))?.to_dtype(DType::U8)?;
    let wide = wide(x.dtype());
    let directions = x.to_dtype(wide)?.broadcast_div(&decoded(&codes, wide)?)?.to_dtype(x.dtype())?;
    Ok((directions, codes))
}

/// What codes of gains stand for.
pub(super) fn decoded(codes: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok((codes.to_dtype(DType::F64)? * (-LN_2 / GAINS_PER_OCTAVE as f64))?.exp()?.to_dtype(dtype)?)
}
