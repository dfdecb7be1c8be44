//! What is asked of the driver about a device.

use crate::{
    error::{Error, Result},
    plan::arch::Arch,
};
use candle_core::{
    cuda_backend::{cudarc::driver::sys::CUdevice_attribute, CudaDevice, WrapErr},
    Device, Tensor,
};

/// What chooses kernels.
pub(crate) fn arch(dev: &CudaDevice) -> Result<Arch> {
    let (major, minor) = dev.cuda_stream().context().compute_capability().w()?;
    Ok(Arch::Cuda { capability: (10 * major + minor) as u32, processors: processors(dev)? })
}

/// The multiprocessors of a device.
pub(super) fn processors(dev: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(dev.cuda_stream().context().attribute(count).w()? as usize)
}

/// The device of a tensor, with its context bound to this thread for what is asked of the driver.
pub(super) fn device(t: &Tensor) -> Result<&CudaDevice> {
    match t.device() {
        Device::Cuda(dev) => {
            dev.cuda_stream().context().bind_to_thread().w()?;
            Ok(dev)
        }
        other => Err(Error::Unsupported { op: "a CUDA kernel", device: format!("{:?}", other.location()) }),
    }
}
