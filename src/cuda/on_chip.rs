//! All of a fit at once: `kernels/resident/fit_line.cu`, `kernels/resident/fit_narrow.cu` and `kernels/resident/fit_resident.cu`.

use super::{
    device::{device, processors},
    kernel::{launch, Kernel},
    memory::{elements, ArenaLayout, Memory},
    module::Image,
    params::{divisor, shape, Active, Common, Shares, Summands},
    tensors::{own, read, typed, write, DevicePtr, Element},
};
use crate::{
    error::{Error, Result},
    plan::{
        assign::narrow_columns,
        on_chip::{FitLine, FitNarrow, FitResident, OnChip},
    },
    request::OnChipFit,
    tiles::{TEAM_LINE, TEAM_THREADS},
};
use candle_core::{
    cuda_backend::{cudarc::driver::PushKernelArg, CudaDevice},
    DType, Tensor,
};

/// Whether the blocks of this launch all run at once, as those of a cooperative one have to.
pub(crate) fn runs_at_once(fit: &FitResident, dtype: DType, dev: &CudaDevice) -> Result<bool> {
    typed!(dtype, T => {
        let kernel = Kernel::get(dev, Image::FitResident, fit.name(), T::SUFFIX, fit.shared)?;
        kernel.runs_at_once(fit.teams * fit.blocks, TEAM_THREADS, fit.shared)
    })
}

pub(crate) fn fit_on_chip(fit: &OnChipFit<'_>, memory: &Memory) -> Result<bool> {
    const OP: &str = "fit_on_chip";
    let &OnChipFit { plan, x, summands, metric, reduction, progress, max_iters, centroids, labels } = fit;
    let (dev, k) = (device(&x.operand)?, centroids.dim(1)?);
    let optional = |t: &Option<Tensor>| t.as_ref().map_or(Ok(DevicePtr::NULL), own);
    let summands = Summands {
        row_scale: optional(&summands.row_scale)?,
        max_abs: own(&summands.max_abs)?,
        max_weight: optional(&summands.max_weight)?,
        first_nonfinite: own(&summands.first_nonfinite)?,
    };
    let (threshold, stop) = (own::<f64>(&progress.threshold)?, own::<u32>(&progress.stop)?);
    let (metric, divisor, max_iters, k64) = (metric as i32, divisor(reduction), max_iters as i64, k as i64);
    let launched = typed!(x.dtype(), T => write::<T>(centroids, |centroids| write::<u32>(labels, |labels| {
        let xs = read(&x.operand);
        let xs = xs.view::<T>()?;
        let fit_narrow = |plan: &FitNarrow, active: Active, blocks: usize| {
            let name = match narrow_columns(x.d) {
                1 => "fit_narrow_1",
                2 => "fit_narrow_2",
                4 => "fit_narrow_4",
                _ => "fit_narrow_8",
            };
            launch!(dev, FitNarrow, name, T::SUFFIX, blocks, plan.threads, plan.shared;
                &xs, &shape(x), &active, &summands, &metric, &divisor, &max_iters, &threshold,
                &(plan.fragments as i64), &(plan.centroids as i64), &stop, &k64, &centroids, &labels)
        };
        let plan = match plan {
            OnChip::Resident(plan) => plan,
            OnChip::Narrow(plan) => return fit_narrow(plan, Active::of(None)?, x.b),
            OnChip::Line(FitLine { threads, rows, problems, shared, others }) => {
                let mut scratch = ArenaLayout::default();
                let left = scratch.zeroed::<u32>(x.b + 1);
                let scratch = scratch.scratch(dev, OP, memory)?;
                let left = scratch.ptr(left);
                let name = match rows {
                    512 => "fit_line_512",
                    1024 => "fit_line_1024",
                    2048 => "fit_line_2048",
                    4096 => "fit_line_4096",
                    _ => "fit_line_8192",
                };
                launch!(dev, FitLine, name, T::SUFFIX, x.b.div_ceil(*problems), *threads, *shared;
                    &xs, &shape(x), &summands, &max_iters, &threshold, &stop, &k64, &centroids, &labels, &left)?;
                let left = Active { list: left.from(1), count: left, first: 0 };
                return fit_narrow(others, left, x.b.min(2 * processors(dev)?));
            }
            OnChip::CpuLine => return Err(Error::Unsupported { op: plan.name(), device: "CUDA".into() }),
        };
        let (&FitResident { weighted, teams: count, blocks, rows, padded, shared }, mut zeros) = (plan, ArenaLayout::default());
        // The sums of halves are exact without remainders.
        let exact = x.dtype() == DType::F16 && !weighted;
        let limbs = zeros.zeroed(elements(&[count, if weighted { 2 } else { 1 }, k, x.d.next_multiple_of(TEAM_LINE)]));
        let remainders = zeros.zeroed(if exact { 0 } else { elements(&[count, k, x.d]) });
        let weights = zeros.zeroed(if weighted { elements(&[count, k]) } else { 0 });
        let (sizes, shifts, arrived) = (zeros.zeroed(elements(&[count, k + 2])), zeros.zeroed(count), zeros.zeroed(count));
        let mut scratch = ArenaLayout::default();
        let (moved, prepared) = (scratch.unwritten(elements(&[count, k, x.d])), scratch.unwritten(elements(&[count, k])));
        let (zeros, scratch) = (zeros.zeros(dev, OP, memory)?, scratch.scratch(dev, OP, memory)?);
        let common = Common {
            limbs: zeros.ptr(limbs),
            remainders: zeros.ptr(remainders),
            weights: zeros.ptr(weights),
            sizes: zeros.ptr(sizes),
            shifts: zeros.ptr(shifts),
            arrived: zeros.ptr(arrived),
            moved: scratch.ptr(moved),
            prepared: scratch.ptr(prepared),
        };
        let [blocks_i32, rows, padded] = [blocks, rows, padded].map(|v| v as i32);
        launch!(dev, FitResident, plan.name(), T::SUFFIX, elements(&[count, blocks]), TEAM_THREADS, shared;
            &xs, &shape(x), &summands, &metric, &divisor, &max_iters, &threshold,
            &Shares { blocks: blocks_i32, rows, padded }, &common, &stop, &k64, &centroids, &labels)
    })));
    match launched {
        // The driver knows better; nothing has been written.
        Err(Error::Unsupported { op, .. }) if op == plan.name() => Ok(false),
        launched => launched.map(|()| true),
    }
}
