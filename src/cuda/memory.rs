//! Device memory that ops use one after another, and how it is asked for.

use super::{
    fence,
    tensors::{typed, DevicePtr},
};
use crate::error::{Error, Result};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{sys::CUresult, CudaSlice, DevicePtr as _, DeviceRepr, ValidAsZeroBits},
        CudaDevice, CudaStorage, WrapErr,
    },
    DType,
};
use std::{
    cell::Cell,
    marker::PhantomData,
    sync::{Mutex, MutexGuard},
    thread::{self, ThreadId},
};

/// Device memory that ops use one after another, whatever threads, streams and devices they are on.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Whether it outlives the call that makes it.
    kept: bool,
    /// Used up when the next op begins.
    scratch: Mutex<Option<Block>>,
    /// Zeros whenever no op is under way.
    zeros: Mutex<Option<Block>>,
    /// What an update of a fit leaves for the next one.
    sums: Mutex<Option<Block>>,
    /// What an assignment of a fit leaves for the next one, and works in.
    near: Mutex<Option<Block>>,
}

impl Memory {
    /// For a value that outlives the call that makes it.
    pub fn kept() -> Self {
        Self { kept: true, ..Self::default() }
    }

    /// Copies the beginning of what assignments leave each other to the host, which waits; false where they leave nothing. For tests.
    pub(super) fn read_near(&self, to: &mut [u8]) -> Result<bool> {
        let held = self.near.lock().unwrap_or_else(|e| e.into_inner());
        let Some(Block { bytes, .. }) = &*held else { return Ok(false) };
        bytes.stream().memcpy_dtoh(&bytes.slice(..to.len()), to).w()?;
        bytes.stream().synchronize().w()?;
        Ok(true)
    }
}

/// Memory of one stream.
#[derive(Debug)]
struct Block {
    bytes: CudaSlice<u8>,
    /// The thread that used it last, where each has a stream of its own.
    thread: Option<ThreadId>,
}

impl Block {
    fn new(dev: &CudaDevice, op: &'static str, bytes: usize, zeroed: bool) -> Result<Self> {
        let bytes = if zeroed { zeros(dev, op, bytes)? } else { alloc(dev, op, bytes)? };
        let thread = fence::thread_of(bytes.stream());
        Ok(Self { bytes, thread })
    }

    /// Lets this thread go on where the last one was.
    fn take_over(&mut self) -> Result<()> {
        let thread = fence::thread_of(self.bytes.stream());
        if self.thread != thread {
            fence::wait_for_threads(self.bytes.stream())?;
            self.thread = thread;
        }
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // It is freed on its stream, which is that of the thread that does so, in the context that is current.
        let context = self.bytes.context();
        context.record_err(context.bind_to_thread());
        if self.thread.is_some_and(|last| last != thread::current().id()) {
            context.record_err(fence::wait_for_own_streams(context));
        }
    }
}

/// Memory to be: what starts as zeros, then the rest, so that one allocation and one fill serve several kernels.
#[derive(Default)]
pub(super) struct ArenaLayout {
    zeroed: usize,
    rest: usize,
}

/// The place of some elements in an [`Arena`].
#[derive(Clone, Copy)]
pub(super) struct Slot<T> {
    zeroed: bool,
    offset: usize,
    of: PhantomData<T>,
}

impl ArenaLayout {
    fn place<T>(end: &mut usize, zeroed: bool, len: usize) -> Slot<T> {
        let offset = *end;
        *end = offset.saturating_add(len.saturating_mul(size_of::<T>())).saturating_add(255) / 256 * 256;
        Slot { zeroed, offset, of: PhantomData }
    }
    /// `len` elements of zero bytes.
    pub(super) fn zeroed<T>(&mut self, len: usize) -> Slot<T> {
        Self::place(&mut self.zeroed, true, len)
    }
    /// Either.
    pub(super) fn place_for<T>(&mut self, zeroed: bool, len: usize) -> Slot<T> {
        if zeroed {
            self.zeroed(len)
        } else {
            self.unwritten(len)
        }
    }
    /// `len` elements, not yet written.
    pub(super) fn unwritten<T>(&mut self, len: usize) -> Slot<T> {
        Self::place(&mut self.rest, false, len)
    }

    /// Scratch for one op, which the next one takes over.
    pub(super) fn scratch<'a>(self, dev: &CudaDevice, op: &'static str, memory: &'a Memory) -> Result<Arena<'a>> {
        let bytes = self.zeroed.saturating_add(self.rest);
        let mut held = BlockGuard::of(memory, &memory.scratch, dev, op, bytes, false)?;
        let block = held.block();
        if self.zeroed > 0 {
            dev.cuda_stream().memset_zeros(&mut block.bytes.slice_mut(..self.zeroed)).w()?;
        }
        let address = block.bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Arena { _held: held, address, zeroed: self.zeroed })
    }

    /// Zeros, which the op has to leave as zeros.
    pub(super) fn zeros<'a>(self, dev: &CudaDevice, op: &'static str, memory: &'a Memory) -> Result<Arena<'a>> {
        let mut held = BlockGuard::of(memory, &memory.zeros, dev, op, self.zeroed, true)?;
        let address = held.block().bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Arena { _held: held, address, zeroed: self.zeroed })
    }

    /// What stays from one update to the next, with its layout.
    pub(super) fn sums<'a>(self, dev: &CudaDevice, op: &'static str, memory: &'a Memory) -> Result<Arena<'a>> {
        let mut held = BlockGuard::of(memory, &memory.sums, dev, op, self.rest, false)?;
        let address = held.block().bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Arena { _held: held, address, zeroed: 0 })
    }

    /// What stays from one assignment of a fit to the next, with its layout. None if a capture finds none, where it would be freed after
    /// each op; then there is none for those after the `first`, either.
    pub(super) fn near<'a>(
        self,
        dev: &CudaDevice,
        op: &'static str,
        memory: &'a Memory,
        first: bool,
    ) -> Result<Option<Arena<'a>>> {
        if !first && memory.near.lock().unwrap_or_else(|e| e.into_inner()).is_none() {
            return Ok(None);
        }
        let mut held = match BlockGuard::of(memory, &memory.near, dev, op, self.rest, false)? {
            BlockGuard::Captured(_) => return Ok(None),
            held => held,
        };
        let address = held.block().bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Some(Arena { _held: held, address, zeroed: 0 }))
    }
}

/// Memory while an op queues its work, which nobody else does to this memory meanwhile.
enum BlockGuard<'a> {
    Kept(MutexGuard<'a, Option<Block>>),
    /// A capture's graph owns what the capture allocates, and frees it.
    Captured(Block),
}

impl<'a> BlockGuard<'a> {
    /// At least so many bytes of the device's stream: those that are there, or new ones.
    fn of(
        memory: &Memory,
        slot: &'a Mutex<Option<Block>>,
        dev: &CudaDevice,
        op: &'static str,
        bytes: usize,
        zeroed: bool,
    ) -> Result<Self> {
        let mut held = slot.lock().unwrap_or_else(|e| e.into_inner());
        let stream = dev.cuda_stream();
        match &mut *held {
            Some(block) if block.bytes.stream() == &stream && block.bytes.len() >= bytes => block.take_over()?,
            _ if memory.kept && fence::capturing(&stream)? => {
                return Ok(Self::Captured(Block::new(dev, op, bytes, zeroed)?))
            }
            _ => {
                // The old one first, so that there are never both.
                *held = None;
                *held = Some(Block::new(dev, op, bytes, zeroed)?);
            }
        }
        Ok(Self::Kept(held))
    }

    fn block(&mut self) -> &mut Block {
        match self {
            Self::Kept(held) => held.as_mut().expect("just made"),
            Self::Captured(block) => block,
        }
    }
}

/// Memory of an op. Its parts go to launches on its device's stream, and so does its release: the order of the stream
/// keeps them valid.
pub(super) struct Arena<'a> {
    _held: BlockGuard<'a>,
    address: u64,
    zeroed: usize,
}

impl Arena<'_> {
    pub(super) fn ptr<T>(&self, place: Slot<T>) -> DevicePtr<T> {
        let offset = place.offset + if place.zeroed { 0 } else { self.zeroed };
        DevicePtr::at(self.address + offset as u64)
    }
}

/// The product of sizes, or `usize::MAX`, which no allocation satisfies.
pub(super) fn elements(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}

thread_local!(static SPARED: Cell<Option<usize>> = const { Cell::new(None) });

/// Makes one allocation of this thread fail as if memory were exhausted, after so many that are spared; `None` makes none
/// fail. Returns whether the one that was asked for last has failed.
pub fn fail_allocation(spared: Option<usize>) -> bool {
    SPARED.replace(spared).is_none()
}

/// Whether this is the allocation that is to fail.
fn fails() -> bool {
    let spared = SPARED.get();
    SPARED.set(spared.and_then(|left| left.checked_sub(1)));
    spared == Some(0)
}

/// Memory for `len` elements (at least one: CUDA refuses none), not yet written.
pub(super) fn alloc<T: DeviceRepr>(dev: &CudaDevice, op: &'static str, len: usize) -> Result<CudaSlice<T>> {
    let len = len.max(1);
    let bytes = len.saturating_mul(size_of::<T>());
    if fails() {
        let source = candle_core::Error::Msg("a test makes this allocation fail".into());
        return Err(Error::OutOfMemory { op, bytes, source });
    }
    if bytes > isize::MAX as usize {
        let source = candle_core::Error::Msg("more bytes than an address has".into());
        return Err(Error::OutOfMemory { op, bytes, source });
    }
    // SAFETY: the callers launch a kernel that writes every element before any is read, or fill it with `zeros`.
    unsafe { dev.cuda_stream().alloc::<T>(len) }.map_err(|e| {
        let exhausted = e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let source = Err::<(), _>(e).w().unwrap_err();
        if exhausted {
            Error::OutOfMemory { op, bytes, source }
        } else {
            Error::Candle(source)
        }
    })
}

/// A new storage of so many elements, to which nothing has been written.
pub(super) fn allocate(dev: &CudaDevice, op: &'static str, len: usize, dtype: DType) -> Result<CudaStorage> {
    if dtype == DType::U32 {
        return Ok(CudaStorage::wrap_cuda_slice(alloc::<u32>(dev, op, len)?, dev.clone()));
    }
    typed!(dtype, T => Ok(CudaStorage::wrap_cuda_slice(alloc::<T>(dev, op, len)?, dev.clone())))
}

fn zeros<T: DeviceRepr + ValidAsZeroBits>(dev: &CudaDevice, op: &'static str, len: usize) -> Result<CudaSlice<T>> {
    let mut slice = alloc(dev, op, len)?;
    dev.cuda_stream().memset_zeros(&mut slice).w()?;
    Ok(slice)
}
