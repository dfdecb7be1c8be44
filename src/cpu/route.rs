//! The CPU has no routed attention of its own: Candle's ops are what it would be made of.

use crate::{error::Result, memory::Memory, request::Routed};
use candle_core::Tensor;

pub(crate) fn route(_: &Routed<'_>, _: &Memory) -> Result<Option<Tensor>> {
    Ok(None)
}
