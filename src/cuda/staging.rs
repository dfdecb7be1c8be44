//! Page-locked memory of the host, which a copy engine reads while kernels run.
//!
//! The copies have a stream of their own. A block's begin when the stream of the thread that works on it has allocated its room, and
//! what that thread queues after [`Lane::receive`] waits until they are over. The room of the next block is reserved before the work on a
//! block is queued: otherwise its copies would wait for that work.

use super::{
    memory::alloc,
    side::{Event, SideStream},
    tensors::typed,
};
use crate::{
    error::{Error, Result},
    host,
    staging::{nothing_reserved, Buffer, Lane, Sent},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{
            result,
            sys::{self, CUmemorytype, CUpointer_attribute, CUresult},
            CudaContext, DevicePtrMut, DriverError,
        },
        CudaDevice, CudaStorage, WrapErr,
    },
    DType, Shape, Storage, Tensor,
};
use std::{mem::MaybeUninit, ptr::NonNull, slice, sync::Arc};

/// A way to a GPU, by a stream for copies.
pub(super) struct Copies {
    dev: CudaDevice,
    side: Arc<SideStream>,
    /// The event after the allocation of the room.
    reserved: Event,
    room: Option<Room>,
}

/// Room for a block.
struct Room {
    storage: CudaStorage,
    shape: Shape,
    address: u64,
    bytes: usize,
}

impl Copies {
    pub fn new(dev: &CudaDevice) -> Result<Self> {
        let side = Arc::new(SideStream::new(dev.cuda_stream().context())?);
        let reserved = Event::new(side.context())?;
        Ok(Self { dev: dev.clone(), side, reserved, room: None })
    }
}

impl Lane for Copies {
    fn reserve(&mut self, (n, d): (usize, usize), dtype: DType) -> Result<()> {
        let (stream, bytes) = (self.dev.cuda_stream(), n * d * dtype.size_in_bytes());
        let (storage, address) = typed!(dtype, T => {
            let mut room = alloc::<T>(&self.dev, "read rows", n * d)?;
            let address = room.device_ptr_mut(&stream).0;
            Ok::<_, Error>((CudaStorage::wrap_cuda_slice(room, self.dev.clone()), address))
        })?;
        self.side.follow(&stream, &self.reserved).w()?;
        self.room = Some(Room { storage, shape: (n, d).into(), address, bytes });
        Ok(())
    }

    unsafe fn send(&mut self, bytes: &[u8], at: usize) -> Result<Box<dyn Sent>> {
        let room = self.room.as_ref().ok_or_else(nothing_reserved)?;
        assert!(at + bytes.len() <= room.bytes, "{} bytes at {at} of {}", bytes.len(), room.bytes);
        let context = self.side.context();
        context.bind_to_thread().w()?;
        let copied = Copied { event: Event::new(context)?, context: context.clone() };
        // SAFETY: both ends of the copy are there until `copied` has come: the caller and `receive` see to it.
        let queued = unsafe { result::memcpy_htod_async(room.address + at as u64, bytes, self.side.handle()) };
        let queued = queued.and_then(|()| self.side.record(&copied.event));
        if queued.is_err() {
            // A copy may be under way that no event tells the end of.
            context.record_err(self.side.synchronize());
        }
        queued.w()?;
        Ok(Box::new(copied))
    }

    fn receive(&mut self) -> Result<Tensor> {
        let Room { storage, shape, .. } = self.room.take().ok_or_else(nothing_reserved)?;
        let arrived = Event::new(self.side.context())?;
        self.side.record(&arrived).and_then(|()| arrived.hold(&self.dev.cuda_stream())).w()?;
        Ok(Tensor::from((Storage::Cuda(storage), shape)))
    }
}

impl Drop for Copies {
    /// Before the room is freed.
    fn drop(&mut self) {
        let context = self.side.context();
        context.record_err(context.bind_to_thread().and_then(|()| self.side.synchronize()));
    }
}

/// The event after a copy.
struct Copied {
    event: Event,
    context: Arc<CudaContext>,
}

impl Sent for Copied {
    fn wait(&self) -> Result<()> {
        Ok(self.context.bind_to_thread().and_then(|()| self.event.wait()).w()?)
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread().and_then(|()| self.event.wait()));
    }
}

/// Bytes that a task clears.
const CLEARED: usize = 1 << 20;

/// A page-locked buffer.
pub(super) struct PageLocked {
    bytes: NonNull<u8>,
    len: usize,
    context: Arc<CudaContext>,
}

// SAFETY: the memory is this value's alone.
unsafe impl Send for PageLocked {}
// SAFETY: as above, and it is written through unique references only.
unsafe impl Sync for PageLocked {}

impl PageLocked {
    pub fn new(context: &Arc<CudaContext>, len: usize) -> Result<Self> {
        context.bind_to_thread().w()?;
        // SAFETY: the context is current. The bytes are written below before any is read. Of no bytes there is one.
        let bytes = unsafe { result::malloc_host(len.max(1), 0) }.map_err(|e| out_of_host_memory(e, len))?;
        let bytes = NonNull::new(bytes.cast()).expect("memory that was allocated");
        let locked = Self { bytes, len, context: context.clone() };
        // SAFETY: so many bytes are there, and nobody else has them.
        let unset = unsafe { slice::from_raw_parts_mut(bytes.as_ptr().cast::<MaybeUninit<u8>>(), len) };
        // A nanosecond clears some eight bytes.
        host::for_each(
            unset.chunks_mut(CLEARED).collect(),
            CLEARED / 8,
            || (),
            |(), some| {
                some.fill(MaybeUninit::new(0));
                Ok(())
            },
        )?;
        Ok(locked)
    }
}

impl Buffer for PageLocked {
    fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes are there, and all were written.
        unsafe { slice::from_raw_parts(self.bytes.as_ptr(), self.len) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has them.
        unsafe { slice::from_raw_parts_mut(self.bytes.as_ptr(), self.len) }
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was allocated so, and whoever sent it has waited.
        self.context.record_err(unsafe { result::free_host(self.bytes.as_ptr().cast()) });
    }
}

/// Whether these bytes lie in one range of the host's memory that the driver has page-locked, for whomever.
pub(super) fn is_page_locked(dev: &CudaDevice, bytes: &[u8]) -> Result<bool> {
    fn attribute<T: Default>(what: CUpointer_attribute, address: u64) -> Option<T> {
        let mut value = T::default();
        // SAFETY: `value` has the type of the attribute. An address that the driver does not know is an error, and nothing else.
        let found = unsafe { sys::cuPointerGetAttribute((&raw mut value).cast(), what, address) };
        (found == CUresult::CUDA_SUCCESS).then_some(value)
    }
    dev.cuda_stream().context().bind_to_thread().w()?;
    let address = bytes.as_ptr() as u64;
    let kind: Option<u32> = attribute(CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address);
    let start: Option<u64> = attribute(CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, address);
    let size: Option<usize> = attribute(CUpointer_attribute::CU_POINTER_ATTRIBUTE_RANGE_SIZE, address);
    let on_host = kind == Some(CUmemorytype::CU_MEMORYTYPE_HOST as u32);
    let inside = |(start, size): (u64, usize)| (address - start) as usize + bytes.len() <= size;
    Ok(on_host && start.zip(size).is_some_and(inside))
}

fn out_of_host_memory(e: DriverError, bytes: usize) -> Error {
    let exhausted = e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
    let source = Err::<(), _>(e).w().unwrap_err();
    match exhausted {
        true => Error::OutOfMemory { op: "page-locked memory", bytes, source },
        false => Error::Candle(source),
    }
}
