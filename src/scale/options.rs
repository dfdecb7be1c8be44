//! The device and the memory of a stream.

use super::{
    checkpoint::Checkpoint,
    devices::Place,
    progress::{OnProgress, Passes, Reporter, StreamProgress},
    ring::moving,
    source::Source,
};
use crate::{
    error::{Error, Result},
    kmeans::Devices,
    primitives,
};
use candle_core::Device;
use std::ops::Range;

/// Bytes of a block of rows: enough that a GPU works longer on them than it takes to launch what does.
pub(super) const BLOCK_BYTES: usize = 64 << 20;

/// Memory for rows on the CPU, of which nobody says how much is free.
const CPU_BYTES: usize = 4 << 30;

/// Bytes that a fit has on the device of each row, wherever that is: its label.
const LABEL: usize = 4;

/// Bytes that a fit has of each row that stays beside it: its place in the order of labels and, by cosine or with weights, its factor.
const BESIDE_ROW: usize = 12;

/// The device that a stream of rows is worked on, and the memory for it, for [`KMeans::fit_stream`](crate::KMeans::fit_stream) and
/// [`Fit::predict_stream`](crate::Fit::predict_stream). No setting changes a bit of what comes out.
#[derive(Clone, Debug)]
pub struct StreamOptions {
    place: Place,
    memory: Option<usize>,
    block_rows: Option<usize>,
    on_progress: Option<OnProgress>,
    checkpoint: Option<Checkpoint>,
}

impl StreamOptions {
    /// On this device: rows take up to three quarters of the memory that is free on a GPU when the fit begins, less what it has of
    /// each row besides, and up to 4 GiB on the CPU. A block of them is 64 MiB.
    pub fn new(device: &Device) -> Self {
        Self::at(Place::One(device.clone()))
    }

    /// On several GPUs, each of which has a share of the rows and adds its sums to those of the others: through NCCL with the feature
    /// `nccl`, and through the host's memory without. Any number of them gives the same bits. What is said here of a device's memory
    /// is each GPU's.
    ///
    /// # Processes
    /// With [`Devices::Launched`], which takes the feature `nccl`, each of several processes has one GPU: that of its rank on its
    /// machine, as `torchrun` (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR`, `MASTER_PORT`), Open MPI's `mpirun`
    /// (`OMPI_COMM_WORLD_*`), MPICH's (`PMI_*`) or `srun` (`SLURM_*`) says. They find each other by NCCL's own bootstrap, at
    /// `NCCL_COMM_ID=HOST:PORT`. Where that is not set, this sets it: to the port after torchrun's, to a port made of Slurm's job, or,
    /// on one machine, of Open MPI's. Every process calls the same functions with the same settings and the same rows, of which it
    /// reads its share, and has the same result.
    ///
    /// If one of them fails, the others get an [`Error::InRank`] that names it; if one dies, they get theirs within 20 seconds, since
    /// processes exchange signs of life, however long one of them takes for its rows. For the others to start, each waits a minute.
    pub fn on(devices: Devices) -> Self {
        Self::at(Place::Gpus(devices))
    }

    /// On several devices, a rank each, any of which may be the same one.
    pub(crate) fn on_each(devices: &[Device]) -> Self {
        Self::at(Place::Several(devices.to_vec()))
    }

    fn at(place: Place) -> Self {
        Self { place, memory: None, block_rows: None, on_progress: None, checkpoint: None }
    }

    /// The most bytes of rows that are in the device's memory at any time. Rows that fit stay there for the whole fit; others are read
    /// again in every pass. There is room for eight blocks on the CPU and for two on a GPU that come and go, of at least one row.
    ///
    /// That is beside what a fit has of each row (4 bytes) and of each that stays (4 bytes, by cosine or with weights 12 or 20), of the
    /// rows of one block while it works on them, of the centroids, and of a start by k-means||
    /// ([`DevicePlan::start_bytes`](crate::DevicePlan::start_bytes)); and beside 100 MiB of page-locked memory of the host
    /// for a GPU, but for rows that are [page-locked](crate::Pinned) themselves.
    pub fn memory(mut self, bytes: usize) -> Self {
        self.memory = Some(bytes);
        self
    }

    /// Sets the rows of a block, at least one, if the memory allows for as many.
    pub fn block_rows(mut self, rows: usize) -> Self {
        self.block_rows = Some(rows);
        self
    }

    /// Calls `f` as blocks of rows are done, at most ten times a second, and at the end: with the pass that goes on, its rows, its rates and
    /// the time that is left. Without it nothing is reported, and nothing is ever printed. Calls come one after another, from the
    /// thread that works on the rows, which goes on when `f` returns; to end a fit is up to [`KMeans::on_iteration`](crate::KMeans::on_iteration).
    /// Of several GPUs it is the first one that reports, of its share of the rows.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let source = Source::from_tensor(&Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?)?;
    /// let options = StreamOptions::new(&Device::Cpu).on_progress(|progress| eprintln!("{progress}"));
    /// KMeans::new(8).fit_stream(&source, &options)?;
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn on_progress(mut self, f: impl Fn(&StreamProgress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(OnProgress::new(f));
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

    /// The one who reports these passes of a rank over so many rows of `source`.
    pub(super) fn reporter(&self, source: &Source<'_>, rows: usize, passes: Passes, rank: usize) -> Reporter {
        let callback = self.on_progress.as_ref().filter(|_| rank == 0);
        Reporter::new(callback, rows as u64, source.row_bytes() as u64, passes)
    }

    /// The same with devices opened. Refuses what needs no look at the rows.
    pub(super) fn opened(&self) -> Result<Self> {
        if self.block_rows == Some(0) {
            return Err(Error::Range { argument: "block_rows", got: 0, min: 1, max: usize::MAX });
        }
        self.checkpoint.as_ref().map_or(Ok(()), Checkpoint::check)?;
        Ok(Self { place: self.place.open()?, ..self.clone() })
    }

    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// The first device, once it is opened.
    pub(super) fn device(&self) -> &Device {
        self.place.first()
    }

    /// Refuses to be one of several processes, once devices are opened.
    pub(super) fn expect_one_process(&self, for_what: &str) -> Result<()> {
        if self.place.is_launched() {
            let with = format!("{for_what}, of whose rows each process has some");
            return Err(Error::Conflict { argument: "devices", got: "Devices::Launched".into(), with });
        }
        Ok(())
    }

    /// The only device, once it is opened.
    pub(super) fn only_device(&self, for_what: &str) -> Result<&Device> {
        match &self.place {
            Place::One(device) => Ok(device),
            Place::Several(devices) if devices.len() == 1 => Ok(&devices[0]),
            place => {
                let with = format!("{for_what}, which is on one device");
                Err(Error::Conflict { argument: "devices", got: format!("{place:?}"), with })
            }
        }
    }

    /// The cut of `n` rows into blocks for a device, on which they are `pitch` elements apart, and so many bytes are needed besides.
    pub(super) fn cut(
        &self,
        source: &Source<'_>,
        n: usize,
        pitch: usize,
        device: &Device,
        besides: usize,
    ) -> Result<Cut> {
        let row_bytes = pitch * source.dtype().size_in_bytes();
        let memory = match self.memory {
            Some(memory) => memory,
            None => match primitives::free_memory(device)? {
                Some(free) => {
                    let rows = (0.75 * free.saturating_sub(besides) as f64 - (LABEL * n) as f64).max(0.0);
                    (rows * row_bytes as f64 / (row_bytes + BESIDE_ROW) as f64) as usize
                }
                None => CPU_BYTES,
            },
        };
        let rows = self.block_rows.unwrap_or(BLOCK_BYTES / row_bytes);
        Ok(Cut::new(n, row_bytes, memory, rows, moving(device)))
    }
}

/// Rows in blocks, of which the first ones stay on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Of all blocks but the last one.
    pub rows: usize,
    /// The number of blocks that stay.
    pub staying: usize,
}

impl Cut {
    fn new(n: usize, row_bytes: usize, memory: usize, rows: usize, moving: usize) -> Self {
        let rows = rows.min(memory / moving / row_bytes).clamp(1, n.max(1));
        let block = rows.saturating_mul(row_bytes);
        let staying = memory.saturating_sub(block.saturating_mul(moving)) / block;
        Self { rows, staying: staying.min(n.div_ceil(rows)) }
    }

    /// The rows of each block.
    pub fn ranges(&self, all: Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> {
        let (step, end) = (self.rows, all.end);
        all.step_by(step).map(move |first| first..end.min(first + step))
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
            let ranges: Vec<_> = cut.ranges(0..n).collect();
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
