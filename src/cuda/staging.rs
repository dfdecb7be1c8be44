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
use memmap2::MmapMut;
use std::sync::Arc;

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

/// The smallest pages that memory has.
const PAGE: usize = 1 << 12;
/// Bytes that a task clears.
const CLEARED: usize = 1 << 20;

/// Page-locked memory.
///
/// It is mapped in pages as large as there are, touched by all threads, and then locked: the driver's own allocation takes half a second for a
/// GiB, this a tenth of that.
pub(super) struct PageLocked {
    map: MmapMut,
    context: Arc<CudaContext>,
}

impl PageLocked {
    pub fn new(context: &Arc<CudaContext>, bytes: usize) -> Result<Self> {
        let len = bytes.max(1).checked_next_multiple_of(PAGE).unwrap_or(usize::MAX);
        let unmapped = |e| Error::OutOfMemory { op: PAGE_LOCKED, bytes, source: candle_core::Error::wrap(e) };
        let mut map = MmapMut::map_anon(len).map_err(unmapped)?;
        #[cfg(target_os = "linux")]
        // Not every system has large pages.
        let _ = map.advise(memmap2::Advice::HugePage);
        // A nanosecond clears some eight bytes.
        let parts = map.chunks_mut(CLEARED).collect();
        host::for_each(
            parts,
            CLEARED / 8,
            || (),
            |(), part| {
                part.fill(0);
                Ok(())
            },
        )?;
        context.bind_to_thread().w()?;
        // SAFETY: the context is current, and the memory is there until it is unlocked when this is dropped.
        let locked =
            unsafe { sys::cuMemHostRegister_v2(map.as_mut_ptr().cast(), len, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        locked.result().map_err(|e| out_of_host_memory(e, bytes))?;
        Ok(Self { map, context: context.clone() })
    }
}

impl Buffer for PageLocked {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was locked so, and whoever sent it has waited.
        self.context.record_err(unsafe { sys::cuMemHostUnregister(self.map.as_mut_ptr().cast()) }.result());
    }
}

/// The name of page-locked memory in errors.
const PAGE_LOCKED: &str = "page-locked memory";

/// True if these bytes lie in one range of the host's memory that the driver has page-locked, whoever asked it to.
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
        true => Error::OutOfMemory { op: PAGE_LOCKED, bytes, source },
        false => Error::Candle(source),
    }
}
