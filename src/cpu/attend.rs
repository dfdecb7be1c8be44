//! The CPU has no attention of its own: Candle's ops are what it would be made of.

use crate::{error::Result, memory::Memory, request::Attention};
use candle_core::Tensor;

pub(crate) fn attend(_: &Attention<'_>, _: &Memory) -> Result<Option<Tensor>> {
    Ok(None)
}
