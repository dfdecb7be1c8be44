//! The tokens of the best clusters: `kernels/attention/select.cu`.

use super::{kernel::launch, params::Choice, tensors::DevicePtr};
use crate::{
    error::Result,
    plan::arch::{shared_memory, Arch},
    tiles::{SELECT_MANY, SELECT_THREADS, SELECT_THREADS_MANY},
};
use candle_core::cuda_backend::{
    cudarc::driver::{CudaView, PushKernelArg},
    CudaDevice,
};

/// Shared memory for the ranks, offsets and places of a unit's clusters, in bytes.
fn shared(k: usize) -> usize {
    4 * (3 * k + 1)
}

/// Whether a unit can choose from so many clusters.
pub(super) fn fits(k: usize, arch: Arch) -> bool {
    shared_memory(arch).is_some_and(|most| shared(k) <= most)
}

/// The destinations of the lists: `chosen` (all, most), `left` (all, k) and `listed` (all).
pub(super) struct Lists {
    pub chosen: DevicePtr<u32>,
    pub left: DevicePtr<f32>,
    pub listed: DevicePtr<u32>,
}

/// Lists for each of `all` units the tokens of its best clusters, by `scores` (all, k).
pub(super) fn select(
    dev: &CudaDevice,
    c: &Choice,
    all: usize,
    scores: DevicePtr<f32>,
    [order, offsets]: [&CudaView<'_, u32>; 2],
    Lists { chosen, left, listed }: &Lists,
) -> Result<()> {
    let threads = if all < SELECT_MANY { SELECT_THREADS } else { SELECT_THREADS_MANY };
    launch!(dev, Select, "select_tokens", "", all, threads, shared(c.k as usize);
        c, &scores, order, offsets, chosen, left, listed)
}
