//! Sort-Inverse Update: `kernels/update/update.cu`.

use super::{
    device::device,
    kernel::{launch, Nullable, WARP},
    memory::{elements, ArenaLayout, Memory},
    params::{divisor, shape, Active, Clusters, Pieces, Verdict},
    sort::Sorting,
    tensors::{own, read, typed, write, Element, Part},
};
use crate::{
    error::Result,
    operand::Target,
    plan::update::UpdateKernel,
    request::Update,
    tiles::{LEFT_BLOCKS, LEFT_COLUMNS, LEFT_THREADS, MEDIAN_COLUMNS, SUM_ROWS, SUM_THREADS, THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType};

pub(crate) fn update(u: &Update<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
    if u.x.b == 0 || u.x.n == 0 {
        return Ok(());
    }
    let k = centroids.dims()[centroids.dims().len() - 2];
    typed!(u.x.dtype(), T => write::<T>(centroids, |out| update_of::<T>(u, k, out, memory)))
}

fn update_of<T: Element>(u: &Update<'_>, k: usize, centroids: Part<T>, memory: &Memory) -> Result<()> {
    const OP: &str = "update";
    let &Update { plan, x, terms, labels, reduction, turn } = u;
    let dev = device(&x.operand)?;
    let (b, n, d) = (x.b, x.n, x.d);
    let (active, verdict) = (Active::of(turn)?, Verdict::of(turn)?);

    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let sorting = labels.map(|_| Sorting::new(&plan.sort, [b, n, k], &mut scratch));
    let order = scratch.unwritten::<u32>(if labels.is_some() { elements(&[b, n]) } else { 0 });
    let offsets = scratch.unwritten::<u32>(elements(&[b, k + 1]));
    let medians = plan.kernel == UpdateKernel::Medians;
    let old = scratch.unwritten::<T>(if medians { elements(&[b, k, d]) } else { 0 });
    let slots = zeros.zeroed::<[u64; 2]>(if medians { 0 } else { elements(&[b, k, d + 1]) });
    let added = zeros.zeroed::<u32>(elements(&[b, k]));
    let [arrived, finished, odd_of] = [(); 3].map(|_| zeros.zeroed::<u32>(b));
    let (odd, odd_count) = (zeros.zeroed::<u32>(elements(&[b, k])), zeros.zeroed::<u32>(2));
    let odd_list = scratch.unwritten::<u64>(elements(&[b, k]));
    let shift = zeros.zeroed::<f64>(b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (offsets, shift) = (scratch.part(offsets), zeros.part(shift));

    let (mut order_at, mut labels_at) = (Part::NULL, Part::NULL);
    if let (Some(sorting), Some(labels)) = (&sorting, labels) {
        (order_at, labels_at) = (scratch.part(order), own(labels)?);
        let next = if turn.is_some() { verdict.count } else { Part::NULL };
        sorting.run(dev, &scratch, labels_at, active, [zeros.part(arrived), next, order_at, offsets])?;
    }

    let (xs, largest, first_bad) = (read(&x.operand), read(&terms.max_abs), read(&terms.first_nonfinite));
    let (factor, heaviest) = (terms.row_scale.as_ref().map(read), terms.max_weight.as_ref().map(read));
    let xs = xs.view::<T>()?;
    let (largest, first_bad) = (largest.view::<f64>()?, first_bad.view::<u32>()?);
    let factor = factor.as_ref().map(|f| f.view::<f64>()).transpose()?;
    let heaviest = heaviest.as_ref().map(|h| h.view::<f64>()).transpose()?;
    let to = Clusters {
        centroids: centroids.address,
        slots: zeros.part(slots),
        added: zeros.part(added),
        finished: zeros.part(finished),
        odd: zeros.part(odd),
        odd_of: zeros.part(odd_of),
        odd_count: zeros.part(odd_count),
        odd_list: scratch.part(odd_list),
        shift: if turn.is_some() { shift } else { Part::NULL },
        k: k as i64,
        d: d as i64,
        divisor: divisor(reduction),
    };
    if medians {
        let (b64, old) = (b as i64, scratch.part(old));
        old.copy_from(dev, centroids, elements(&[b, k, d]))?;
        launch!(dev, Update, plan.kernel.name(), T::SUFFIX, elements(&[b, k, d.div_ceil(MEDIAN_COLUMNS)]), THREADS;
            &xs, &shape(x), Nullable(&factor), Nullable(&heaviest), &first_bad, &order_at, &offsets, &to.k, &active,
            &centroids)?;
        if turn.is_some() {
            launch!(dev, Update, "shift", T::SUFFIX, elements(&[b, k]).div_ceil(THREADS / WARP), THREADS;
                &old, &b64, &to, &active)?;
            launch!(dev, Update, "settle_shifts", "", b.div_ceil(THREADS), THREADS; &b64, &shift, &active, &verdict)?;
        }
        return Ok(());
    }
    let pieces = Pieces { rows: plan.piece as u32, whole: (2 * plan.piece).min(SUM_ROWS) as u32 };
    let blocks = elements(&[b, n.div_ceil(plan.piece)]).div_ceil(SUM_THREADS / WARP);
    launch!(dev, Update, plan.kernel.name(), T::SUFFIX, blocks, SUM_THREADS;
        &xs, &shape(x), Nullable(&factor), &largest, Nullable(&heaviest), &first_bad, &labels_at, &order_at, &offsets,
        &pieces, &to, &active, &verdict)?;
    if x.dtype() == DType::F16 && factor.is_none() && terms.finite {
        // All halves are integers of the scale: nothing is left.
        return Ok(());
    }
    let blocks = elements(&[b, k, (d + 1).div_ceil(LEFT_COLUMNS)]).min(LEFT_BLOCKS);
    launch!(dev, Update, "update_exact", T::SUFFIX, blocks, LEFT_THREADS;
        &xs, &shape(x), Nullable(&factor), &first_bad, &order_at, &offsets, &to, &verdict)
}
