//! Memory of the host that rows pass through on their way to a device.

use crate::{
    error::{Error, Result},
    host,
};
use candle_core::{DType, Device, Tensor};

/// A buffer that is filled by one thread and sent to the device by another, again and again.
pub(crate) trait Staging: Send {
    /// So many of its bytes, once the device has those that were sent before.
    fn bytes(&mut self, len: usize) -> Result<&mut [u8]>;

    /// Begins to send the bytes of so many rows and columns, beside what this thread has queued and queues meanwhile.
    fn send(&mut self, shape: (usize, usize), dtype: DType) -> Result<()>;

    /// The rows that were sent, for what this thread queues from now on.
    fn receive(&mut self) -> Result<Tensor>;
}

/// Ordinary memory, which a device is sent a copy of at once.
pub(crate) struct Pageable {
    bytes: Vec<u8>,
    device: Device,
    sent: Option<Tensor>,
}

impl Pageable {
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { bytes: host::filled("read rows", bytes, 0)?, device: device.clone(), sent: None })
    }
}

impl Staging for Pageable {
    fn bytes(&mut self, len: usize) -> Result<&mut [u8]> {
        Ok(&mut self.bytes[..len])
    }

    fn send(&mut self, (n, d): (usize, usize), dtype: DType) -> Result<()> {
        host::room("read rows", n * d, dtype, &self.device)?;
        let bytes = &self.bytes[..n * d * dtype.size_in_bytes()];
        self.sent = Some(Tensor::from_raw_buffer(bytes, dtype, &[n, d], &self.device)?);
        Ok(())
    }

    fn receive(&mut self) -> Result<Tensor> {
        self.sent.take().ok_or_else(nothing_sent)
    }
}

/// Why there is nothing to receive.
pub(crate) fn nothing_sent() -> Error {
    Error::Conflict { argument: "rows", got: "a receipt".into(), with: "no rows that were sent".into() }
}
