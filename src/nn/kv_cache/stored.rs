//! The tokens of a cache.

use crate::{
    error::{Error, Result},
    select::empty,
};
use candle_core::Tensor;
use std::{ops::Range, sync::Arc};

/// Keys and values `(batch, kv_heads, room, d)`, of which the first `len` tokens are there.
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
    pub(super) len: usize,
    /// One to each cache that has these tensors: who shares them does not write to them.
    pub(super) shared: Arc<()>,
}

impl Stored {
    /// The keys and values that are there.
    pub(super) fn rows(&self) -> Result<[Tensor; 2]> {
        Ok([self.keys.narrow(2, 0, self.len)?, self.values.narrow(2, 0, self.len)?])
    }

    /// All but the tokens `gone`, in `room`.
    pub(super) fn without(&self, gone: Range<usize>, room: usize) -> Result<Self> {
        let kept = |t: &Tensor| {
            let (b, h, _, d) = t.dims4()?;
            let new = room_for([b, h, room, d], t)?;
            write_tokens(&new, Some(&t.narrow(2, 0, gone.start)?), 0)?;
            write_tokens(&new, Some(&t.narrow(2, gone.end, self.len - gone.end)?), gone.start)?;
            Ok::<_, Error>(new)
        };
        let (keys, values) = (kept(&self.keys)?, kept(&self.values)?);
        Ok(Self { keys, values, len: self.len - gone.len(), shared: Arc::new(()) })
    }
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
