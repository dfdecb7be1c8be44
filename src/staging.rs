//! The way of rows from memory of the host to a device.

use crate::{
    error::{Error, Result},
    host,
};
use candle_core::{DType, Device, Tensor};
use std::slice;

/// A way to a device, on which one block of rows comes after another, in parts.
pub(crate) trait Lane {
    /// Takes room for the next block on the device, behind all that this thread has queued so far.
    fn reserve(&mut self, shape: (usize, usize), dtype: DType) -> Result<()>;

    /// Begins to send bytes to the room that was reserved last, from its byte `at` on; to memory of the CPU, those of a
    /// whole block. They travel beside what this thread has queued since.
    ///
    /// # Safety
    /// The bytes stay where and as they are until what is returned has been waited for.
    unsafe fn send(&mut self, bytes: &[u8], at: usize) -> Result<Box<dyn Sent>>;

    /// The block that room was reserved for, for what this thread queues from now on.
    fn receive(&mut self) -> Result<Tensor>;
}

/// Memory of the host that a device is sent from: at least as many bytes as were asked for, at an address that suits any element.
pub(crate) trait Buffer: Send + Sync {
    fn bytes(&self) -> &[u8];

    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Bytes that are on their way. Whoever drops it waits for them.
pub(crate) trait Sent: Send {
    fn wait(&self) -> Result<()>;
}

/// A way to memory that takes a copy at once.
pub(crate) struct Copies {
    device: Device,
    room: Option<((usize, usize), DType)>,
    block: Option<Tensor>,
}

impl Copies {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), room: None, block: None }
    }
}

impl Lane for Copies {
    fn reserve(&mut self, shape: (usize, usize), dtype: DType) -> Result<()> {
        self.room = Some((shape, dtype));
        Ok(())
    }

    unsafe fn send(&mut self, bytes: &[u8], _: usize) -> Result<Box<dyn Sent>> {
        let ((n, d), dtype) = self.room.take().ok_or_else(nothing_reserved)?;
        host::room("read rows", n * d, dtype, &self.device)?;
        self.block = Some(Tensor::from_raw_buffer(bytes, dtype, &[n, d], &self.device)?);
        Ok(Box::new(Arrived))
    }

    fn receive(&mut self) -> Result<Tensor> {
        self.block.take().ok_or_else(nothing_reserved)
    }
}

/// Memory for so many bytes that a copy to the CPU takes.
pub(crate) fn buffer(bytes: usize) -> Result<Box<dyn Buffer>> {
    Ok(Box::new(host::filled("read rows", bytes.div_ceil(size_of::<u64>()), 0u64)?))
}

impl Buffer for Vec<u64> {
    fn bytes(&self) -> &[u8] {
        // SAFETY: they are these values' bytes.
        unsafe { slice::from_raw_parts(self.as_ptr().cast(), size_of_val(&self[..])) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and any bytes are values.
        unsafe { slice::from_raw_parts_mut(self.as_mut_ptr().cast(), size_of_val(&self[..])) }
    }
}

/// Bytes that have been copied.
struct Arrived;

impl Sent for Arrived {
    fn wait(&self) -> Result<()> {
        Ok(())
    }
}

/// The error of a block that nobody has made room for.
pub(crate) fn nothing_reserved() -> Error {
    Error::Conflict { argument: "rows", got: "a block".into(), with: "no room that was reserved".into() }
}
