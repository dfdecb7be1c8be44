//! The device that an example runs on.

use anyhow::{Context, Result};
use candle_core::{DType, Device};
use clap::ValueEnum;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Cpu,
    Cuda,
}

impl Backend {
    /// The device, and the dtype that keys and values have on it.
    pub fn open(self) -> Result<(Device, DType)> {
        Ok(match self {
            Self::Cpu => (Device::Cpu, DType::F32),
            Self::Cuda => {
                let gpu = Device::new_cuda(0).context("--device cuda needs a GPU and a build with --features cuda");
                (gpu?, DType::F16)
            }
        })
    }
}
