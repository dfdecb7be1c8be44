//! Rows of a caller in page-locked memory.

use super::source::stored::Element;
use crate::{error::Result, primitives, staging::Buffer};
use candle_core::Device;
use std::{
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    slice,
};

/// Page-locked ("pinned") memory of the host, which the copy engine of a GPU reads by itself. Rows that a source is given in it are sent
/// from where they lie, at the rate of the link; others go through a ring of buffers, by as many threads as the processor has. On the CPU
/// it is memory like any other.
///
/// The system cannot move or swap such memory, and takes a while to lock it: it is for rows that are streamed more than once, or made in
/// it. Memory that another library has page-locked in one piece is sent from where it lies as well.
///
/// ```
/// use candle_core::Device;
/// use candle_flash_kmeans::{KMeans, Pinned, Source, StreamOptions};
///
/// let device = Device::Cpu;
/// let mut rows = Pinned::<f32>::zeros(1000 * 4, &device)?;
/// rows.iter_mut().enumerate().for_each(|(i, x)| *x = (i * i % 97) as f32);
/// let fit = KMeans::new(8).fit_stream(&Source::from_slice(&rows, 4)?, &StreamOptions::new(&device))?;
/// # assert_eq!(fit.labels.elem_count(), 1000);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
pub struct Pinned<T> {
    memory: Box<dyn Buffer>,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Pinned<T> {
    /// `len` zeros, for `device` and any other one.
    ///
    /// # Errors
    /// Fails where the host has no memory for them that can be page-locked.
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        let memory = primitives::buffer(device, len.saturating_mul(size_of::<T>()))?;
        Ok(Self { memory, len, element: PhantomData })
    }
}

impl<T: Element> Deref for Pinned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: there are at least as many bytes, at an address that suits `T`, of which any bits are a value.
        unsafe { slice::from_raw_parts(self.memory.bytes().as_ptr().cast(), self.len) }
    }
}

impl<T: Element> DerefMut for Pinned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has them.
        unsafe { slice::from_raw_parts_mut(self.memory.bytes_mut().as_mut_ptr().cast(), self.len) }
    }
}

impl<T: Element> AsRef<[T]> for Pinned<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T: Element> fmt::Debug for Pinned<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} x {})", self.len, T::STORED)
    }
}
