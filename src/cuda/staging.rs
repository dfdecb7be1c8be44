//! Page-locked memory of the host, which a copy engine reads while kernels run.
//!
//! The copies have a stream of their own, and two events order each with the work of the thread that asks for it: it begins when
//! that thread's stream has allocated what it writes, and what that thread queues after [`Staging::receive`] waits until it is over.

use super::{
    memory::alloc,
    side::{Event, SideStream},
    tensors::{typed, Element},
};
use crate::{
    error::{Error, Result},
    staging::{nothing_sent, Staging},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{result, sys::CUresult, DevicePtrMut, DriverError},
        CudaDevice, CudaStorage, WrapErr,
    },
    DType, Shape, Storage, Tensor,
};
use std::{ptr::NonNull, slice, sync::Arc};

/// A page-locked buffer.
pub(super) struct PageLocked {
    dev: CudaDevice,
    copies: Arc<SideStream>,
    bytes: NonNull<u8>,
    len: usize,
    /// The event after the allocation of the destination.
    allocated: Event,
    /// The event after the last copy.
    copied: Event,
    /// The destination of the copy.
    sent: Option<(CudaStorage, Shape)>,
}

// SAFETY: the memory is this value's alone, and handles of the driver's may be used by any thread.
unsafe impl Send for PageLocked {}

impl PageLocked {
    fn new(dev: &CudaDevice, copies: &Arc<SideStream>, len: usize) -> Result<Self> {
        let context = copies.context();
        let (allocated, copied) = (Event::new(context)?, Event::new(context)?);
        // SAFETY: the context is current. The bytes are written below before any is read.
        let bytes = unsafe { result::malloc_host(len.max(1), 0) }.map_err(|e| out_of_host_memory(e, len))?;
        let bytes = NonNull::new(bytes.cast()).expect("memory that was allocated");
        // SAFETY: so many bytes are there.
        unsafe { bytes.write_bytes(0, len) };
        Ok(Self { dev: dev.clone(), copies: copies.clone(), bytes, len, allocated, copied, sent: None })
    }

    /// Copies the first bytes to new memory for so many elements, beside what the stream has queued after the allocation.
    fn copy<T: Element>(&mut self, len: usize) -> Result<CudaStorage> {
        let (stream, copies) = (self.dev.cuda_stream(), &self.copies);
        let mut to = alloc::<T>(&self.dev, "read rows", len)?;
        let (address, order) = to.device_ptr_mut(&stream);
        // SAFETY: the buffer holds as many bytes, which nobody writes until `copied` is over.
        let bytes = unsafe { slice::from_raw_parts(self.bytes.as_ptr(), len * size_of::<T>()) };
        let queued = copies.follow(&stream, &self.allocated).and_then(|()| {
            // SAFETY: both ends of the copy are there until `copied` is over, for which `drop` waits.
            unsafe { result::memcpy_htod_async(address, bytes, copies.handle()) }?;
            copies.record(&self.copied)
        });
        drop(order);
        if queued.is_err() {
            // A copy may be under way that no event tells the end of.
            copies.context().record_err(copies.synchronize());
        }
        queued.w()?;
        Ok(CudaStorage::wrap_cuda_slice(to, self.dev.clone()))
    }

    fn wait(&self) -> std::result::Result<(), DriverError> {
        self.copies.context().bind_to_thread()?;
        self.copied.wait()
    }
}

impl Staging for PageLocked {
    fn bytes(&mut self, len: usize) -> Result<&mut [u8]> {
        assert!(len <= self.len, "{len} of {} bytes", self.len);
        self.wait().w()?;
        // SAFETY: so many bytes are there, all were written, and no copy reads them any more.
        Ok(unsafe { slice::from_raw_parts_mut(self.bytes.as_ptr(), len) })
    }

    fn send(&mut self, (n, d): (usize, usize), dtype: DType) -> Result<()> {
        assert!(n * d * dtype.size_in_bytes() <= self.len, "{n} rows of {d} columns in {} bytes", self.len);
        self.copies.context().bind_to_thread().w()?;
        let storage = typed!(dtype, T => self.copy::<T>(n * d))?;
        self.sent = Some((storage, (n, d).into()));
        Ok(())
    }

    fn receive(&mut self) -> Result<Tensor> {
        if self.sent.is_some() {
            self.copied.hold(&self.dev.cuda_stream()).w()?;
        }
        let (storage, shape) = self.sent.take().ok_or_else(nothing_sent)?;
        Ok(Tensor::from((Storage::Cuda(storage), shape)))
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        let context = self.copies.context().clone();
        context.record_err(self.wait());
        self.sent = None;
        // SAFETY: it was allocated so, and no copy reads it any more.
        context.record_err(unsafe { result::free_host(self.bytes.as_ptr().cast()) });
    }
}

/// Buffers of so many bytes, whose copies share a stream.
pub(super) fn staging(dev: &CudaDevice, count: usize, bytes: usize) -> Result<Vec<Box<dyn Staging>>> {
    let copies = Arc::new(SideStream::new(dev.cuda_stream().context())?);
    (0..count).map(|_| Ok(Box::new(PageLocked::new(dev, &copies, bytes)?) as Box<dyn Staging>)).collect()
}

fn out_of_host_memory(e: DriverError, bytes: usize) -> Error {
    let exhausted = e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    let source = Err::<(), _>(e).w().unwrap_err();
    match exhausted {
        true => Error::OutOfMemory { op: "page-locked memory", bytes, source },
        false => Error::Candle(source),
    }
}
