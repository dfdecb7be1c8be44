//! The device and the memory of a stream.

use super::{checkpoint::Checkpoint, reads::moving, source::Source};
use crate::{
    error::{Error, Result},
    primitives,
};
use candle_core::Device;
use std::ops::Range;

/// Bytes of rows that are read at a time: enough that a GPU works longer on them than it takes to launch what does.
const BLOCK_BYTES: usize = 64 << 20;

/// Memory for rows on the CPU, of which nobody says how much is free.
const CPU_BYTES: usize = 4 << 30;

/// Bytes that a fit has of each row beside it: its label and, by cosine or with weights, its factor.
const BESIDE_ROW: usize = 12;

/// The device that a stream of rows is worked on, and the memory for it, for [`KMeans::fit_stream`](crate::KMeans::fit_stream) and
/// [`Fit::predict_stream`](crate::Fit::predict_stream). No setting changes a bit of what comes out.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    device: Device,
    memory: Option<usize>,
    block_rows: Option<usize>,
    checkpoint: Option<Checkpoint>,
}

impl StreamOptions {
    /// On this device: rows take up to three quarters of the memory that is free on a GPU when the fit begins, less what it has of
    /// each row besides, and up to 4 GiB on the CPU. They are read 64 MiB at a time.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), memory: None, block_rows: None, checkpoint: None }
    }

    /// The most bytes of rows that are in the device's memory at any time. Rows that fit stay there for the whole fit; others are read
    /// again in every pass. There is room for eight blocks on the CPU and for two on a GPU that come and go, of at least one row.
    ///
    /// That is beside what a fit has of each row that stays (4 bytes, by cosine or with weights 12 or 20), of the rows of one block
    /// while it works on them, and of the centroids; and beside six blocks in page-locked memory of the host for a GPU.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Sets the rows that are read at a time, at least one, if the memory allows for as many.
    pub fn block_rows(mut self, rows: usize) -> Self {
        self.block_rows = Some(rows);
        self
    }

    /// Has a fit keep what it has come to in files, and go on from there if its process ends: see [`Checkpoint`]. Labels that are
    /// streamed need none, and use none.
    pub fn checkpoint(mut self, checkpoint: Checkpoint) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }

    pub(super) fn checkpoints(&self) -> Option<&Checkpoint> {
        self.checkpoint.as_ref()
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// Refuses what needs no look at the rows.
    pub(super) fn check(&self) -> Result<()> {
        if self.block_rows == Some(0) {
            return Err(Error::Range { argument: "block_rows", got: 0, min: 1, max: usize::MAX });
        }
        self.checkpoint.as_ref().map_or(Ok(()), Checkpoint::check)
    }

    /// The cut of these rows into blocks.
    pub(super) fn cut(&self, source: &Source<'_>) -> Result<Cut> {
        let (row_bytes, device) = (source.row_bytes(), &self.device);
        let memory = match self.memory {
            Some(memory) => memory,
            None => match primitives::free_memory(device)? {
                Some(free) => (0.75 * free as f64 * row_bytes as f64 / (row_bytes + BESIDE_ROW) as f64) as usize,
                None => CPU_BYTES,
            },
        };
        let rows = self.block_rows.unwrap_or(BLOCK_BYTES / row_bytes);
        Ok(Cut::new(source.shape().0 as usize, row_bytes, memory, rows, moving(device)))
    }
}

/// Rows in blocks, of which the first ones stay on the device.
#[derive(Debug, PartialEq)]
pub(super) struct Cut {
    /// Of all blocks but the last one.
    pub rows: usize,
    /// The number of blocks that stay.
    pub staying: usize,
}

impl Cut {
    fn new(n: usize, row_bytes: usize, memory: usize, rows: usize, moving: usize) -> Self {
        let rows = rows.min(memory / moving / row_bytes).clamp(1, n);
        let block = rows.saturating_mul(row_bytes);
        let staying = memory.saturating_sub(block.saturating_mul(moving)) / block;
        Self { rows, staying: staying.min(n.div_ceil(rows)) }
    }

    /// The rows of each block, of `n`.
    pub fn ranges(&self, n: usize) -> impl Iterator<Item = Range<usize>> {
        let rows = self.rows;
        (0..n.div_ceil(rows)).map(move |block| block * rows..n.min((block + 1) * rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_kept_to() {
        for (n, row_bytes, memory, rows, moving) in [
            (1000, 8, 8000, 10, 2),
            (1000, 8, 80, 10, 2),
            (1000, 8, 0, 10, 2),
            (7, 64, 1 << 20, 100, 8),
            (1, 2, 1, 1, 8),
        ] {
            let cut = Cut::new(n, row_bytes, memory, rows, moving);
            let ranges: Vec<_> = cut.ranges(n).collect();
            assert_eq!(ranges.iter().map(ExactSizeIterator::len).sum::<usize>(), n);
            assert!(cut.rows == 1 || (cut.staying.min(ranges.len()) + moving) * cut.rows * row_bytes <= memory);
            assert!(cut.staying <= ranges.len() && ranges.iter().all(|rows| (1..=cut.rows).contains(&rows.len())));
        }
        // Blocks that fit stay.
        assert_eq!(Cut::new(1000, 8, 8160, 10, 2), Cut { rows: 10, staying: 100 });
        assert_eq!(Cut::new(1000, 8, 4160, 10, 2), Cut { rows: 10, staying: 50 });
        assert_eq!(Cut::new(1000, 8, 160, 10, 2), Cut { rows: 10, staying: 0 });
        assert_eq!(Cut::new(1000, 8, 80, 10, 2), Cut { rows: 5, staying: 0 });
    }
}
