//! The device that an example runs on.

use anyhow::Result;
use candle_core::{DType, Device};
use clap::ValueEnum;

#[derive(Clone, Copy, ValueEnum)]
pub enum Backend {
    Cpu,
    Cuda,
}

impl Backend {
    /// The device, and the dtype that keys and values have on it.
    pub fn open(self) -> Result<(Device, DType)> {
        Ok(match self {
            Self::Cpu => (Device::Cpu, DType::F32),
            Self::Cuda => (Device::new_cuda(0)?, DType::F16),
        })
    }
}
