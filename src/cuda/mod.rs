//! The CUDA backend: every kernel is compiled by `build.rs`, embedded, and launched on the tensor's own stream.
//!
//! Nothing here waits for the device or reads from it while one thread works, and every launch goes through
//! [`kernel::Kernel`]. Threads take over from each other by [`fence`].

pub(crate) mod assign;
mod attend;
mod changes;
pub(crate) mod device;
pub(crate) mod fence;
pub(crate) mod kernel;
#[cfg(feature = "nccl")]
mod launched;
mod lut;
pub(crate) mod memory;
mod module;
#[cfg(feature = "nccl")]
mod nccl;
mod nearest;
mod on_chip;
mod pairwise;
mod params;
mod route;
mod rows;
mod seed;
mod seed_filter;
mod select;
mod side;
mod sort;
mod staging;
mod tensors;
mod update;

#[cfg(feature = "nccl")]
use crate::ranks::{Ranks, Rendezvous};
use crate::{
    backend::Backend,
    error::Result,
    memory::Memory,
    metric::Metric,
    operand::{Readable, Target},
    plan::{arch::Arch, on_chip::FitResident, sort::Sort},
    request::{
        Accumulator, Assignment, Attention, CodedAttention, Finish, KmeansppBlock, LutMatrix, OnChipFit, Routed, Update,
    },
    rng::Draw,
    rows::Rows,
    staging::{Buffer, Lane},
};
use candle_core::{DType, Device, Storage, Tensor};
use staging::{is_page_locked, Copies, PageLocked};
use std::ops::Range;
use tensors::typed;

/// An NVIDIA GPU.
pub(crate) struct Cuda;

impl Backend for Cuda {
    fn arch(&self, device: &Device) -> Result<Arch> {
        device::arch(device.as_cuda_device()?)
    }

    fn capturing(&self, device: &Device) -> Result<bool> {
        fence::capturing(&device.as_cuda_device()?.cuda_stream())
    }

    fn free_memory(&self, device: &Device) -> Result<Option<usize>> {
        device::free_memory(device.as_cuda_device()?).map(Some)
    }

    fn lane(&self, device: &Device) -> Result<Box<dyn Lane>> {
        Ok(Box::new(Copies::new(device.as_cuda_device()?)?))
    }

    fn read_labels(&self, labels: &Tensor, into: &mut [u32]) -> Result<()> {
        tensors::copy_to_host(labels, into)
    }

    fn is_page_locked(&self, device: &Device, bytes: &[u8]) -> Result<bool> {
        is_page_locked(device.as_cuda_device()?, bytes)
    }

    fn buffer(&self, device: &Device, bytes: usize) -> Result<Box<dyn Buffer>> {
        Ok(Box::new(PageLocked::new(device.as_cuda_device()?.cuda_stream().context(), bytes)?))
    }

    #[cfg(feature = "nccl")]
    fn rendezvous(&self) -> Result<Option<Rendezvous>> {
        nccl::rendezvous().map(Some)
    }

    #[cfg(feature = "nccl")]
    fn join<'a>(&self, device: &Device, at: Rendezvous, others: &'a dyn Ranks) -> Result<Box<dyn Ranks + 'a>> {
        Ok(Box::new(nccl::Joined::new(device.as_cuda_device()?, at, others)?))
    }

    #[cfg(feature = "nccl")]
    fn join_for_long(
        &self,
        device: &Device,
        at: Rendezvous,
        others: Box<dyn Ranks + Send>,
    ) -> Result<Box<dyn Ranks + Send>> {
        Ok(Box::new(nccl::Joined::new(device.as_cuda_device()?, at, others)?))
    }

    #[cfg(feature = "nccl")]
    fn join_launched(&self, device: &Device, rank: usize, ranks: usize) -> Result<Box<dyn Ranks + Send>> {
        let device = device.as_cuda_device()?;
        Ok(Box::new(launched::Launched::new(device, nccl::rendezvous()?, rank, ranks)?))
    }

    fn contiguous(&self, t: &dyn Readable) -> Result<Option<Tensor>> {
        rows::contiguous(t)
    }

    fn runs_at_once(&self, fit: &FitResident, dtype: DType, device: &Device) -> Result<bool> {
        on_chip::runs_at_once(fit, dtype, device.as_cuda_device()?)
    }

    fn pack(&self, x: &Tensor, pitch: usize, copy: &mut Option<Tensor>) -> Result<Option<Rows<'static>>> {
        assign::pack(x, pitch, copy).map(Some)
    }

    fn allocate(&self, op: &'static str, len: usize, dtype: DType, device: &Device) -> Result<Storage> {
        memory::allocate(device.as_cuda_device()?, op, len, dtype).map(Storage::Cuda)
    }

    fn zero(&self, to: Target<'_>) -> Result<()> {
        typed!(to.dtype(), T => tensors::zero::<T>(to.device().as_cuda_device()?, to))
    }

    fn assign_into(&self, a: Assignment<'_>, labels: Target<'_>, memory: &Memory) -> Result<()> {
        assign::assign_into(a, labels, memory)
    }

    fn distances(&self, x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
        rows::distances(x, c, labels, metric)
    }

    fn pairwise(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
        pairwise::pairwise(x, c, metric)
    }

    fn nearest(&self, x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
        nearest::nearest(x, c, m, metric)
    }

    fn gather(&self, x: &Rows, index: &dyn Readable, to: Target<'_>) -> Result<()> {
        rows::gather(x, index, to)
    }

    fn max_abs_and_first_nonfinite(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        rows::max_abs_and_first_nonfinite(x)
    }

    fn min_magnitude(&self, x: &Rows) -> Result<Tensor> {
        rows::min_magnitude(x)
    }

    fn norms(&self, x: &Rows) -> Result<Tensor> {
        rows::norms(x)
    }

    fn usable_seeds(&self, x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::usable_seeds(x, weights, chosen, metric)
    }

    fn min_distance_with(&self, x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::min_distance_with(x, nearest, newest, metric)
    }

    fn exponential_race_keys(
        &self,
        nearest: &Tensor,
        weights: Option<&Tensor>,
        draw: Draw,
        first: usize,
    ) -> Result<Tensor> {
        seed::exponential_race_keys(nearest, weights, draw, first)
    }

    fn kmeanspp_block(&self, p: &KmeansppBlock<'_>, memory: &Memory) -> Result<()> {
        seed::kmeanspp_block(p, memory)
    }

    fn max_label(&self, labels: &dyn Readable) -> Result<u32> {
        sort::max_label(labels)
    }

    fn order(&self, labels: &dyn Readable, k: usize, plan: &Sort, to: Target<'_>) -> Result<()> {
        sort::order(labels, k, plan, to)
    }

    fn update(&self, u: &Update<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
        update::update(u, centroids, memory)
    }

    fn accumulate(&self, u: &Update<'_>, to: &Accumulator, memory: &Memory) -> Result<()> {
        update::accumulate(u, to, memory)
    }

    fn finish(&self, f: &Finish<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
        update::finish(f, centroids, memory)
    }

    fn merge(&self, sums: &Tensor, others: &Tensor) -> Result<()> {
        update::merge(sums, others)
    }

    fn fit_on_chip(&self, fit: &OnChipFit<'_>, memory: &Memory) -> Result<bool> {
        on_chip::fit_on_chip(fit, memory)
    }

    fn attend(&self, a: &Attention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
        attend::attend(a, memory)
    }

    fn attend_coded(&self, a: &CodedAttention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
        attend::attend_coded(a, memory)
    }

    fn route(&self, r: &Routed<'_>, memory: &Memory) -> Result<Option<Tensor>> {
        route::route(r, memory)
    }

    fn lut_product(&self, x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        lut::lut_product(x, w, bias)
    }

    fn lut_decode(&self, w: &LutMatrix<'_>, outputs: Range<usize>) -> Result<Option<Tensor>> {
        lut::lut_decode(w, outputs).map(Some)
    }
}
