//! The tokens of the best clusters: `kernels/select.cu`.

use super::{kernel::launch, tensors::Part};
use crate::{
    error::Result,
    plan::{shared_memory, Arch},
    tiles::{SELECT_MANY, SELECT_THREADS, SELECT_THREADS_MANY},
};
use candle_core::cuda_backend::{
    cudarc::driver::{CudaView, DeviceRepr, PushKernelArg},
    CudaDevice,
};

/// `struct Choice` of `select.cu`.
#[repr(C)]
pub(super) struct Choice {
    pub units: i64,
    pub clustered: i64,
    pub k: i64,
    pub least: i64,
    pub most: i64,
    pub share: f32,
}

// SAFETY: integers and a float, laid out as in C.
unsafe impl DeviceRepr for Choice {}

/// Shared memory for the ranks, offsets and places of a unit's clusters, in bytes.
fn shared(k: usize) -> usize {
    4 * (3 * k + 1)
}

/// Whether a unit can choose from so many clusters.
pub(super) fn fits(k: usize, arch: Arch) -> bool {
    shared_memory(arch).is_some_and(|most| shared(k) <= most)
}

/// Lists for each of `all` units the tokens of its best clusters: `chosen` (all, most), `left` (all, k) and `listed` (all), by
/// `scores` (all, k).
#[allow(clippy::too_many_arguments)]
pub(super) fn select(
    dev: &CudaDevice,
    c: &Choice,
    all: usize,
    scores: Part<f32>,
    order: &CudaView<'_, u32>,
    offsets: &CudaView<'_, u32>,
    chosen: Part<u32>,
    left: Part<f32>,
    listed: Part<u32>,
) -> Result<()> {
    let threads = if all < SELECT_MANY { SELECT_THREADS } else { SELECT_THREADS_MANY };
    launch!(dev, Select, "select_tokens", "", all, threads, shared(c.k as usize);
        c, &scores, order, offsets, &chosen, &left, &listed)
}
