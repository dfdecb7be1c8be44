//! The way from Candle to an op: its custom ops get storages that it has locked, with their layouts, one method a device.

use crate::error::Error;
use candle_core::{CpuStorage, CudaStorage, Shape, Storage};

/// An op makes this: a storage of its own, and the shape of what is in it.
pub(crate) type Made = (Storage, Shape);

pub(crate) fn cpu((storage, shape): Made) -> candle_core::Result<(CpuStorage, Shape)> {
    match storage {
        Storage::Cpu(storage) => Ok((storage, shape)),
        _ => unreachable!("what is made of CPU storages is one"),
    }
}

pub(crate) fn cuda((storage, shape): Made) -> candle_core::Result<(CudaStorage, Shape)> {
    match storage {
        Storage::Cuda(storage) => Ok((storage, shape)),
        _ => unreachable!("what is made of CUDA storages is one"),
    }
}

pub(crate) fn no_metal(op: &'static str) -> candle_core::Error {
    Error::Unsupported { op, device: "Metal".into() }.into()
}

/// [`CustomOp2`](candle_core::CustomOp2) by `NAME`, `forward` and `backward`.
macro_rules! custom_op2 {
    ($($op:ident)+) => {
        $(impl candle_core::CustomOp2 for $op {
            fn name(&self) -> &'static str {
                Self::NAME
            }

            fn cpu_fwd(
                &self,
                x: &candle_core::CpuStorage,
                x_layout: &candle_core::Layout,
                y: &candle_core::CpuStorage,
                y_layout: &candle_core::Layout,
            ) -> candle_core::Result<(candle_core::CpuStorage, candle_core::Shape)> {
                $crate::ops::bind::cpu(self.forward(&$crate::operand::Operand::Cpu(x, x_layout.clone()), &$crate::operand::Operand::Cpu(y, y_layout.clone()))?)
            }

            fn cuda_fwd(
                &self,
                x: &candle_core::CudaStorage,
                x_layout: &candle_core::Layout,
                y: &candle_core::CudaStorage,
                y_layout: &candle_core::Layout,
            ) -> candle_core::Result<(candle_core::CudaStorage, candle_core::Shape)> {
                $crate::ops::bind::cuda(self.forward(&$crate::operand::Operand::Cuda(x, x_layout.clone()), &$crate::operand::Operand::Cuda(y, y_layout.clone()))?)
            }

            fn metal_fwd(
                &self,
                _: &candle_core::MetalStorage,
                _: &candle_core::Layout,
                _: &candle_core::MetalStorage,
                _: &candle_core::Layout,
            ) -> candle_core::Result<(candle_core::MetalStorage, candle_core::Shape)> {
                Err($crate::ops::bind::no_metal(Self::NAME))
            }

            fn bwd(
                &self,
                x: &candle_core::Tensor,
                y: &candle_core::Tensor,
                _: &candle_core::Tensor,
                grad: &candle_core::Tensor,
            ) -> candle_core::Result<(Option<candle_core::Tensor>, Option<candle_core::Tensor>)> {
                Ok((self.backward(x, y, grad)?, None))
            }
        })+
    };
}
pub(super) use custom_op2;

/// [`InplaceOp3`](candle_core::InplaceOp3) by `NAME` and `overwrite`.
macro_rules! inplace_op3 {
    ($($op:ident)+) => {
        $(impl candle_core::InplaceOp3 for $op {
            fn name(&self) -> &'static str {
                Self::NAME
            }

            fn cpu_fwd(
                &self,
                to: &mut candle_core::CpuStorage,
                to_layout: &candle_core::Layout,
                x: &candle_core::CpuStorage,
                x_layout: &candle_core::Layout,
                y: &candle_core::CpuStorage,
                y_layout: &candle_core::Layout,
            ) -> candle_core::Result<()> {
                let (x, y) = ($crate::operand::Operand::Cpu(x, x_layout.clone()), $crate::operand::Operand::Cpu(y, y_layout.clone()));
                Ok(self.overwrite($crate::operand::Target::Cpu(to, to_layout.clone()), &x, &y)?)
            }

            fn cuda_fwd(
                &self,
                to: &mut candle_core::CudaStorage,
                to_layout: &candle_core::Layout,
                x: &candle_core::CudaStorage,
                x_layout: &candle_core::Layout,
                y: &candle_core::CudaStorage,
                y_layout: &candle_core::Layout,
            ) -> candle_core::Result<()> {
                let (x, y) = ($crate::operand::Operand::Cuda(x, x_layout.clone()), $crate::operand::Operand::Cuda(y, y_layout.clone()));
                Ok(self.overwrite($crate::operand::Target::Cuda(to, to_layout.clone()), &x, &y)?)
            }

            fn metal_fwd(
                &self,
                _: &mut candle_core::MetalStorage,
                _: &candle_core::Layout,
                _: &candle_core::MetalStorage,
                _: &candle_core::Layout,
                _: &candle_core::MetalStorage,
                _: &candle_core::Layout,
            ) -> candle_core::Result<()> {
                Err($crate::ops::bind::no_metal(Self::NAME))
            }
        })+
    };
}
pub(super) use inplace_op3;
