//! Labels on CUDA cores: `kernels/assign/assign_simt.cu` and `kernels/assign/assign_narrow.cu`.

use crate::{
    cuda::device::processors,
    cuda::kernel::{launch, warps, WARP},
    cuda::memory::{elements, ArenaLayout, Memory},
    cuda::params::{one_copy, shape, Active},
    cuda::tensors::{read, DevicePtr, Element},
    error::Result,
    metric::Metric,
    plan::assign::{narrow_columns, narrow_fragments, narrow_shared},
    request::Assignment,
    tiles::{NARROW_BLOCKS, NARROW_TENSOR_SHARED, NARROW_THREADS, NARROW_TILE, RECHECK_BLOCKS, SIMT_ROWS, THREADS},
};
use candle_core::cuda_backend::{cudarc::driver::PushKernelArg, CudaDevice};

pub(super) fn assign_narrow<T: Element>(dev: &CudaDevice, a: Assignment<'_>, labels: DevicePtr<u32>) -> Result<()> {
    let Assignment { x, c, metric, turn, .. } = a;
    let active = Active::of(turn)?;
    let (xs, cs) = (read(&x.operand), read(&c.operand));
    let name = match narrow_columns(x.d) {
        1 => "assign_narrow_1",
        2 => "assign_narrow_2",
        4 => "assign_narrow_4",
        _ => "assign_narrow_8",
    };
    let shared = narrow_shared(x.dtype(), c.n, x.d).unwrap_or(usize::MAX);
    let fragments = narrow_fragments(x.dtype(), metric, [c.n, x.d], shared, NARROW_TENSOR_SHARED);
    // Enough blocks to fill any device, each with centroids of its own to prepare.
    let tiles = elements(&[x.b, x.n.div_ceil(NARROW_TILE)]).min(NARROW_BLOCKS * processors(dev)?);
    launch!(dev, AssignNarrow, name, T::SUFFIX, tiles, NARROW_THREADS, shared + fragments;
        &xs.view::<T>()?, &shape(x), &active, &cs.view::<T>()?, &shape(c), &(metric as i32),
        &(fragments as i64), &labels)
}

pub(super) fn assign<T: Element>(
    dev: &CudaDevice,
    a: Assignment<'_>,
    labels: DevicePtr<u32>,
    memory: &Memory,
) -> Result<()> {
    let Assignment { plan, x, c, metric, turn, .. } = a;
    let active = Active::of(turn)?;
    let (xs, cs) = (read(&x.operand), read(&c.operand));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);

    let mut layout = ArenaLayout::default();
    let mu = layout.zeroed::<T::Filter>(elements(&[copies, d]));
    let largest = layout.zeroed::<f64>(copies);
    let listed = layout.zeroed::<u32>(x.b);
    let list = layout.unwritten::<u32>(elements(&[x.b, x.n]));
    let moved = layout.unwritten::<T::Filter>(elements(&[copies, k, d]));
    let bias = layout.unwritten::<T::Filter>(elements(&[copies, k]));
    let w = layout.scratch(dev, "labels", memory)?;
    let (mu, largest, moved, bias) = (w.ptr(mu), w.ptr(largest), w.ptr(moved), w.ptr(bias));
    let (listed, list) = (w.ptr(listed), w.ptr(list));

    if metric == Metric::SquaredEuclidean {
        launch!(dev, Prepare, "prepare_means", T::SUFFIX, elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            &cs, &shape(&one), &active, &mu)?;
    }
    let metric = metric as i32;
    launch!(dev, Prepare, "prepare_centroids", T::SUFFIX, warps(elements(&[copies, k])), THREADS;
        &cs, &shape(&one), &active, &metric, &mu, &moved, &bias, &largest)?;
    let (tiles, k, copies) = (elements(&[x.b, x.n.div_ceil(SIMT_ROWS)]), k as i64, copies as i64);
    launch!(dev, AssignSimt, plan.kernel.name(), T::SUFFIX, tiles, THREADS;
        &xs, &shape(x), &active, &k, &mu, &moved, &bias, &largest, &copies, &metric, &labels, &list, &listed)?;
    let blocks = elements(&[x.b, warps(x.n)]).min(RECHECK_BLOCKS);
    launch!(dev, AssignSimt, "recheck", T::SUFFIX, blocks, THREADS;
        &xs, &shape(x), &active, &cs, &shape(c), &mu, &moved, &bias, &largest, &copies, &metric, &labels, &list, &listed)
}
