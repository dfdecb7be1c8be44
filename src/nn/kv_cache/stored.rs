//! The tokens of a cache.

use crate::{error::Result, select::empty};
use candle_core::Tensor;
use std::sync::Arc;

/// Keys and values `(batch, kv_heads, room, d)`, of which the first `len` tokens are there.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
    pub(super) len: usize,
    /// One to each cache that has these tensors: who shares them does not write to them.
    pub(super) shared: Arc<()>,
}

/// Zeros `(batch, kv_heads, room, d)`, alike in dtype and device.
pub(super) fn room_for(shape: [usize; 4], like: &Tensor) -> Result<Tensor> {
    match shape.contains(&0) {
        true => empty(&shape, like.dtype(), like.device()),
        false => Ok(Tensor::zeros(&shape, like.dtype(), like.device())?),
    }
}

/// Writes `tokens`, if there are any, from token `at` on.
pub(super) fn write_tokens(stored: &Tensor, tokens: Option<&Tensor>, at: usize) -> Result<()> {
    match tokens.filter(|tokens| tokens.elem_count() > 0) {
        Some(tokens) => Ok(stored.slice_set(&tokens.contiguous()?, 2, at)?),
        None => Ok(()),
    }
}
