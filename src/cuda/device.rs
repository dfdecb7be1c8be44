//! The driver is asked this about a device.

use crate::{
    error::{Error, Result},
    operand::{Readable, Source},
    plan::arch::Arch,
};
use candle_core::cuda_backend::{
    cudarc::driver::{
        result,
        sys::{CUdevice_attribute, CUresult},
        CudaContext, DriverError,
    },
    CudaDevice, WrapErr,
};

/// The arch of a device, by which kernels are chosen.
pub(crate) fn arch(dev: &CudaDevice) -> Result<Arch> {
    let (major, minor) = dev.cuda_stream().context().compute_capability().w()?;
    Ok(Arch::Cuda { capability: (10 * major + minor) as u32, processors: processors(dev)? })
}

/// The multiprocessors of a device.
pub(super) fn processors(dev: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(dev.cuda_stream().context().attribute(count).w()? as usize)
}

/// The number of GPUs that are visible; none where there is no driver.
pub(crate) fn count() -> Result<usize> {
    match CudaContext::device_count() {
        Err(DriverError(CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
        count => Ok(count.w()? as usize),
    }
}

/// The bytes of a device's memory that no process has taken.
pub(super) fn free_memory(dev: &CudaDevice) -> Result<usize> {
    dev.cuda_stream().context().bind_to_thread().w()?;
    Ok(result::mem_get_info().w()?.0)
}

/// The device of an input, with its context bound to this thread for what is asked of the driver.
pub(super) fn device<R: Readable + ?Sized>(t: &R) -> Result<&CudaDevice> {
    let dev = match t.source() {
        Source::Cuda(storage) => &storage.device,
        Source::Tensor(t) if t.device().is_cuda() => t.device().as_cuda_device()?,
        _ => return Err(Error::Unsupported { op: "a CUDA kernel", device: format!("{:?}", t.device().location()) }),
    };
    dev.cuda_stream().context().bind_to_thread().w()?;
    Ok(dev)
}
