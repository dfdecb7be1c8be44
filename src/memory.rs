//! Two things outlive an op: memory that the next one uses, and who has used a layer's tensors.

#[cfg(feature = "cuda")]
pub(crate) use crate::cuda::{fence::Fence, memory::Memory};
#[cfg(not(feature = "cuda"))]
use {crate::error::Result, candle_core::Device};

/// Memory that ops use one after another, so that only the first ones allocate. The CPU's need none.
#[cfg(not(feature = "cuda"))]
#[derive(Debug, Default)]
pub(crate) struct Memory {}
#[cfg(not(feature = "cuda"))]
impl Memory {
    pub fn kept() -> Self {
        Self {}
    }
}
/// Which threads have used the tensors of a layer, whose first field it is. The CPU's work is done when an op returns.
#[cfg(not(feature = "cuda"))]
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence {}
#[cfg(not(feature = "cuda"))]
impl Fence {
    pub fn read(&self, _: &Device) -> Result<()> {
        Ok(())
    }
    pub fn write(&self, _: &Device) -> Result<()> {
        Ok(())
    }
    pub fn show(&self, _: &Device) {}
}
