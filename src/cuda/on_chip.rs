//! All of a fit at once: `kernels/resident/fit_narrow.cu` and `kernels/resident/fit_resident.cu`.

use super::{
    device::{arch, device},
    kernel::{launch, Kernel},
    memory::{elements, ArenaLayout, Memory},
    module::Image,
    params::{divisor, shape, Common, Shares, Summands},
    tensors::{own, read, typed, write, Element, Part},
};
use crate::{
    error::{Error, Result},
    plan::{
        assign::narrow_columns,
        on_chip::{FitNarrow, FitResident},
    },
    request::OnChipFit,
    rows::in_pieces,
    tiles::{TEAM_LINE, TEAM_THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType, Tensor};

pub(crate) fn fit_on_chip(fit: &OnChipFit<'_>, memory: &Memory) -> Result<bool> {
    const OP: &str = "fit_on_chip";
    let &OnChipFit { x, terms, metric, reduction, progress, max_iters, centroids, labels } = fit;
    let dev = device(&x.operand)?;
    let (arch, k, weighted) = (arch(dev)?, centroids.dim(1)?, terms.row_scale.is_some());
    let sizes = [x.b, x.n, k, x.d];
    let narrow = FitNarrow::new(x.dtype(), metric, sizes, arch);
    let resident = FitResident::new(x.dtype(), metric, weighted, sizes, arch).filter(|_| in_pieces(&x.operand, 8));
    // The sums of halves are exact without remainders.
    let exact = x.dtype() == DType::F16 && !weighted;
    let name = if weighted { "fit_resident_weighted" } else { "fit_resident" };
    let resident = match resident {
        Some(plan) if narrow.is_none() => typed!(x.dtype(), T => {
            let kernel = Kernel::get(dev, Image::FitResident, name, T::SUFFIX, plan.shared)?;
            Ok(kernel.runs_at_once(plan.teams * plan.blocks, TEAM_THREADS, plan.shared)?.then_some(plan))
        })?,
        _ => None,
    };
    if narrow.is_none() && resident.is_none() {
        return Ok(false);
    }
    let optional = |t: &Option<Tensor>| t.as_ref().map_or(Ok(Part::NULL), own);
    let summands = Summands {
        row_scale: optional(&terms.row_scale)?,
        max_abs: own(&terms.max_abs)?,
        max_weight: optional(&terms.max_weight)?,
        first_nonfinite: own(&terms.first_nonfinite)?,
    };
    let (threshold, stop) = (own::<f64>(&progress.threshold)?, own::<u32>(&progress.stop)?);
    let (metric, divisor, max_iters, k64) = (metric as i32, divisor(reduction), max_iters as i64, k as i64);
    let launched = typed!(x.dtype(), T => write::<T>(centroids, |centroids| write::<u32>(labels, |labels| {
        let xs = read(&x.operand);
        let xs = xs.view::<T>()?;
        if let Some(plan) = &narrow {
            let name = match narrow_columns(x.d) {
                1 => "fit_narrow_1",
                2 => "fit_narrow_2",
                4 => "fit_narrow_4",
                _ => "fit_narrow_8",
            };
            return launch!(dev, FitNarrow, name, T::SUFFIX, x.b, plan.threads, plan.shared;
                &xs, &shape(x), &summands, &metric, &divisor, &max_iters, &threshold, &(plan.centroids as i64), &stop, &k64,
                &centroids, &labels);
        }
        let Some(plan) = &resident else { return Ok(()) };
        let (&FitResident { teams: count, blocks, rows, padded, shared }, mut zeros) = (plan, ArenaLayout::default());
        let limbs = zeros.zeroed(elements(&[count, if weighted { 2 } else { 1 }, k, x.d.next_multiple_of(TEAM_LINE)]));
        let remainders = zeros.zeroed(if exact { 0 } else { elements(&[count, k, x.d]) });
        let weights = zeros.zeroed(if weighted { elements(&[count, k]) } else { 0 });
        let (sizes, shifts, arrived) = (zeros.zeroed(elements(&[count, k + 2])), zeros.zeroed(count), zeros.zeroed(count));
        let mut scratch = ArenaLayout::default();
        let (moved, prepared) = (scratch.unwritten(elements(&[count, k, x.d])), scratch.unwritten(elements(&[count, k])));
        let (zeros, scratch) = (zeros.zeros(dev, OP, memory)?, scratch.scratch(dev, OP, memory)?);
        let common = Common {
            limbs: zeros.part(limbs),
            remainders: zeros.part(remainders),
            weights: zeros.part(weights),
            sizes: zeros.part(sizes),
            shifts: zeros.part(shifts),
            arrived: zeros.part(arrived),
            moved: scratch.part(moved),
            prepared: scratch.part(prepared),
        };
        let [blocks_i32, rows, padded] = [blocks, rows, padded].map(|v| v as i32);
        launch!(dev, FitResident, name, T::SUFFIX, elements(&[count, blocks]), TEAM_THREADS, shared;
            &xs, &shape(x), &summands, &metric, &divisor, &max_iters, &threshold,
            &Shares { blocks: blocks_i32, rows, padded }, &common, &stop, &k64, &centroids, &labels)
    })));
    match launched {
        // The driver knows better; nothing has been written.
        Err(Error::Unsupported { op, .. }) if op == name => Ok(false),
        launched => launched.map(|()| true),
    }
}
