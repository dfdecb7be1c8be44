//! A device has to do these primitives.
//!
//! They take checked arguments and return new tensors on the same device, or write to a target, on the tensors' own stream.
//! `primitives` says of each what it is; what a back end has no kernel for keeps its default.

use crate::{
    error::{Error, Result},
    memory::Memory,
    metric::Metric,
    operand::{Readable, Target},
    plan::{arch::Arch, on_chip::FitResident, sort::Sort},
    ranks::{Ranks, Rendezvous},
    request::{
        Accumulator, Assignment, Attention, CodedAttention, Finish, KmeansppBlock, LutMatrix, OnChipFit, Routed, Update,
    },
    rng::Draw,
    rows::Rows,
    staging::{buffer, Buffer, Copies, Lane},
};
use candle_core::{DType, Device, Storage, Tensor};
use std::cell::Cell;
use std::ops::Range;

thread_local!(static SORTS: Cell<u64> = const { Cell::new(0) });

/// The number of times that this thread has had labels sorted, on any device, but for what a fit on chip sorts in its launch.
pub(crate) fn sorts() -> u64 {
    SORTS.get()
}

/// Counts a sort.
pub(crate) fn count_sort() {
    SORTS.set(SORTS.get() + 1);
}

/// A kind of device. See [`primitives`](crate::primitives) for what each primitive is.
pub(crate) trait Backend {
    /// The arch of a device, by which kernels are chosen.
    fn arch(&self, device: &Device) -> Result<Arch>;

    /// Whether work that is queued now becomes part of a graph.
    fn capturing(&self, _: &Device) -> Result<bool> {
        Ok(false)
    }

    /// The bytes of memory that nothing has taken, where somebody knows them.
    fn free_memory(&self, _: &Device) -> Result<Option<usize>> {
        Ok(None)
    }

    /// A lane for rows from memory of the host to the device.
    fn lane(&self, device: &Device) -> Result<Box<dyn Lane>> {
        Ok(Box::new(Copies::new(device)))
    }

    /// Copies contiguous labels to memory of the host, of which there is as much.
    fn read_labels(&self, labels: &Tensor, into: &mut [u32]) -> Result<()> {
        into.copy_from_slice(&labels.flatten_all()?.to_vec1()?);
        Ok(())
    }

    /// True if these bytes are page-locked: copies take them from where they lie while the thread that asks for them goes on.
    fn is_page_locked(&self, _: &Device, _bytes: &[u8]) -> Result<bool> {
        Ok(false)
    }

    /// Memory of the host for so many bytes, page-locked where that makes copies faster.
    fn buffer(&self, _: &Device, bytes: usize) -> Result<Box<dyn Buffer>> {
        buffer(bytes)
    }

    /// The rendezvous of the ranks of this process; none if they meet in memory alone.
    fn rendezvous(&self) -> Result<Option<Rendezvous>> {
        Ok(None)
    }

    /// A rank with a device of its own.
    fn join<'a>(&self, device: &Device, _: Rendezvous, _: &'a dyn Ranks) -> Result<Box<dyn Ranks + 'a>> {
        Err(Error::Unsupported { op: "join", device: format!("{:?}", device.location()) })
    }

    /// The same of one that outlives the call.
    fn join_for_long(&self, device: &Device, _: Rendezvous, _: Box<dyn Ranks + Send>) -> Result<Box<dyn Ranks + Send>> {
        Err(Error::Unsupported { op: "join", device: format!("{:?}", device.location()) })
    }

    /// A rank that is a process.
    fn join_launched(&self, device: &Device, _rank: usize, _ranks: usize) -> Result<Box<dyn Ranks + Send>> {
        let op = "ranks in processes, without the feature `nccl`";
        Err(Error::Unsupported { op, device: format!("{:?}", device.location()) })
    }

    /// None where Candle's copy will do.
    fn contiguous(&self, _: &dyn Readable) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Whether the blocks of this launch, for rows of this type, all run at once.
    fn runs_at_once(&self, _: &FitResident, _: DType, _: &Device) -> Result<bool> {
        Ok(false)
    }

    /// None where a copy in memory of its own will do.
    fn pack(&self, _: &Tensor, _pitch: usize, _copy: &mut Option<Tensor>) -> Result<Option<Rows<'static>>> {
        Ok(None)
    }

    /// So many elements that nothing has been written to.
    fn allocate(&self, op: &'static str, len: usize, dtype: DType, device: &Device) -> Result<Storage>;
    fn zero(&self, to: Target<'_>) -> Result<()>;
    fn assign_into(&self, a: Assignment<'_>, labels: Target<'_>, memory: &Memory) -> Result<()>;
    fn distances(&self, x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor>;
    fn pairwise(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor>;
    fn nearest(&self, x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)>;
    fn gather(&self, x: &Rows, index: &dyn Readable, to: Target<'_>) -> Result<()>;
    fn max_abs_and_first_nonfinite(&self, x: &Rows) -> Result<(Tensor, Tensor)>;
    fn min_magnitude(&self, x: &Rows) -> Result<Tensor>;
    fn norms(&self, x: &Rows) -> Result<Tensor>;
    fn usable_seeds(&self, x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor>;
    fn min_distance_with(&self, x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor>;
    fn exponential_race_keys(
        &self,
        nearest: &Tensor,
        weights: Option<&Tensor>,
        draw: Draw,
        first: usize,
    ) -> Result<Tensor>;
    fn kmeanspp_block(&self, p: &KmeansppBlock<'_>, memory: &Memory) -> Result<()>;
    fn max_label(&self, labels: &dyn Readable) -> Result<u32>;
    fn order(&self, labels: &dyn Readable, k: usize, plan: &Sort, to: Target<'_>) -> Result<()>;
    fn update(&self, u: &Update<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()>;
    fn accumulate(&self, u: &Update<'_>, to: &Accumulator, memory: &Memory) -> Result<()>;
    fn finish(&self, f: &Finish<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()>;
    fn merge(&self, sums: &Tensor, others: &Tensor) -> Result<()>;

    /// Whether this was a fit for that.
    fn fit_on_chip(&self, _: &OnChipFit<'_>, _: &Memory) -> Result<bool> {
        Ok(false)
    }

    /// True if [`attend`](Self::attend) has a kernel for all tokens of a cache, without clusters.
    fn attends_to_all(&self) -> bool {
        false
    }

    /// None where there is no kernel for it.
    fn byte_codes(&self, _: &Rows) -> Result<Option<(Tensor, Tensor)>> {
        Ok(None)
    }

    /// None where there is no kernel for it.
    fn attend(&self, _: &Attention<'_>, _: &Memory) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// None where there is no kernel for it.
    fn attend_coded(&self, _: &CodedAttention<'_>, _: &Memory) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// None where there is no kernel for it.
    fn route(&self, _: &Routed<'_>, _: &Memory) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// None where there is no kernel for it.
    fn lut_product(&self, _: &Rows, _: &LutMatrix<'_>, _: Option<&Tensor>) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// None where there is no kernel for it.
    fn lut_decode(&self, _: &LutMatrix<'_>, _: Range<usize>) -> Result<Option<Tensor>> {
        Ok(None)
    }
}
