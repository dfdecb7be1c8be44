//! Sort-Inverse Update: `kernels/update/update.cu`.

use super::{
    changes::ChangesLayout,
    device::{device, processors},
    kernel::{launch, warps, Nullable, WARP},
    memory::{elements, ArenaLayout, Memory},
    params::{divisor, shape, Active, Clusters, Pieces, Verdict},
    sort::Sorting,
    tensors::{own, read, typed, write, DevicePtr, Element},
};
use crate::{
    error::Result,
    operand::Target,
    plan::update::UpdateKernel,
    request::{Accumulator, Finish, Labels, Update},
    tiles::{
        CHANGES_BLOCKS, CHANGES_ROWS, CHANGES_SHARES, LEFT_BLOCKS, LEFT_COLUMNS, LEFT_THREADS, MEDIAN_COLUMNS,
        SORT_THREADS, SUM_ROWS, SUM_THREADS, THREADS,
    },
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType, Tensor};

pub(crate) fn update(u: &Update<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
    if u.x.b == 0 || u.x.n == 0 {
        return Ok(());
    }
    let k = centroids.dims()[centroids.dims().len() - 2];
    typed!(u.x.dtype(), T => write::<T>(centroids, |out| update_of::<T>(u, k, To::Centroids(out), memory)))
}

/// Adds rows to the sums of their clusters, of problems that have not converged.
pub(crate) fn accumulate(u: &Update<'_>, to: &Accumulator, memory: &Memory) -> Result<()> {
    if u.x.b == 0 || u.x.n == 0 {
        return Ok(());
    }
    typed!(u.x.dtype(), T => update_of::<T>(u, to.sums.dim(2)?, To::Sums(to), memory))
}

/// Replaces the centroids by what [`update`] would, of all rows that have been added, and leaves zeros.
pub(crate) fn finish(f: &Finish<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
    let &Finish { sums: Accumulator { sums, max_abs, max_weight, rows }, reduction, turn } = f;
    let (planes, b, k, d) = (sums.dim(0)?, sums.dim(1)?, sums.dim(2)?, sums.dim(3)? - 1);
    let dev = device(sums)?;
    let (active, verdict) = (Active::of(turn)?, Verdict::of(turn)?);
    let mut zeros = ArenaLayout::default();
    let (finished, shift) = (zeros.zeroed(b), zeros.zeroed(b));
    let zeros = zeros.zeros(dev, "finish", memory)?;
    if turn.is_some() {
        verdict.count.clear(dev, 1)?;
    }
    let (max_abs, max_weight) = (read(max_abs), max_weight.as_ref().map(read));
    let max_weight = max_weight.as_ref().map(|w| w.view::<f64>()).transpose()?;
    typed!(centroids.dtype(), T => write::<T>(centroids, |centroids| {
        let to = Clusters {
            centroids: centroids.address,
            slots: own::<i64>(sums)?.cast(),
            finished: zeros.ptr(finished),
            shift: if turn.is_some() { zeros.ptr(shift) } else { DevicePtr::NULL },
            divisor: divisor(reduction),
            planes: planes as i32,
            ..Clusters::new([b, k, d], *rows)
        };
        launch!(dev, Update, "finish", T::SUFFIX, warps(elements(&[b, k])), THREADS;
            &to, &max_abs.view::<f64>()?, Nullable(&max_weight), &active, &verdict)
    }))
}

/// Adds the sums of another accumulator of the same grid.
pub(crate) fn merge(sums: &Tensor, others: &Tensor) -> Result<()> {
    let (dev, count) = (device(sums)?, sums.elem_count() / 2);
    write::<i64>(sums, |sums| {
        let others = read(others);
        launch!(dev, Update, "merge_sums", "", count.div_ceil(THREADS), THREADS;
            &(count as i64), &sums, &others.view::<i64>()?)
    })
}

/// The purpose of adding rows up.
#[derive(Clone, Copy)]
enum To<'a, T> {
    /// New centroids.
    Centroids(DevicePtr<T>),
    /// Sums that others add to as well.
    Sums(&'a Accumulator),
}

fn update_of<T: Element>(u: &Update<'_>, k: usize, out: To<'_, T>, memory: &Memory) -> Result<()> {
    const OP: &str = "update";
    let &Update { plan, x, summands, labels, reduction, turn, .. } = u;
    let dev = device(&x.operand)?;
    let (b, n, d) = (x.b, x.n, x.d);
    let active = Active::of(turn)?;
    let (centroids, accumulator, turn) = match out {
        To::Centroids(centroids) => (centroids, None, turn),
        // How far centroids have moved is known when sums are finished.
        To::Sums(sums) => (DevicePtr::NULL, Some(sums), None),
    };
    let verdict = Verdict::of(turn)?;

    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let sorting = match labels {
        Some(Labels::Unsorted(_)) => Some(Sorting::new(&plan.sort, [b, n, k], &mut scratch)),
        _ => None,
    };
    let order = scratch.unwritten::<u32>(if sorting.is_some() { elements(&[b, n]) } else { 0 });
    let offsets = scratch.unwritten::<u32>(elements(&[b, k + 1]));
    let medians = plan.kernel == UpdateKernel::Medians;
    let keep = plan.keep_sums && sorting.is_some() && accumulator.is_none();
    let changes = keep.then(|| ChangesLayout::new([b, n, k, d], &mut scratch, &mut zeros));
    let old = scratch.unwritten::<T>(if medians { elements(&[b, k, d]) } else { 0 });
    let own_slots = !medians && !keep && accumulator.is_none();
    let slots = zeros.zeroed::<[u64; 2]>(if own_slots { elements(&[b, k, d + 1]) } else { 0 });
    let added = zeros.zeroed::<u32>(elements(&[b, k]));
    let [arrived, finished, odd_of] = [(); 3].map(|_| zeros.zeroed::<u32>(b));
    let (odd, odd_count) = (zeros.zeroed::<u32>(elements(&[b, k])), zeros.zeroed::<u32>(2));
    let odd_list = scratch.unwritten::<u64>(elements(&[b, k]));
    let shift = zeros.zeroed::<f64>(b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (mut offsets, shift) = (scratch.ptr(offsets), zeros.ptr(shift));

    let kept = changes.map(|changes| changes.keep(dev, turn, &scratch, &zeros, memory)).transpose()?;
    let (mut order_at, mut labels_at) = (DevicePtr::NULL, DevicePtr::NULL);
    let next = if turn.is_some() { verdict.count } else { DevicePtr::NULL };
    match labels {
        Some(Labels::Unsorted(labels)) => (order_at, labels_at) = (scratch.ptr(order), own(labels)?),
        Some(Labels::Sorted(order)) => {
            (labels_at, order_at, offsets) = (own(&order.labels)?, own(&order.order)?, own(&order.offsets)?);
            if turn.is_some() {
                // A sort would have cleared it on the way.
                verdict.count.clear(dev, 1)?;
            }
        }
        None => {}
    }

    let (max_abs, max_weight) = accumulator
        .map_or((&summands.max_abs, &summands.max_weight), |Accumulator { max_abs, max_weight, .. }| {
            (max_abs, max_weight)
        });
    let (xs, max_abs, first_nonfinite) = (read(&x.operand), read(max_abs), read(&summands.first_nonfinite));
    let (factor, max_weight) = (summands.row_scale.as_ref().map(read), max_weight.as_ref().map(read));
    let (xs, max_abs, first_nonfinite) = (xs.view::<T>()?, max_abs.view::<f64>()?, first_nonfinite.view::<u32>()?);
    let factor = factor.as_ref().map(|f| f.view::<f64>()).transpose()?;
    let max_weight = max_weight.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let to = Clusters {
        centroids: centroids.address,
        slots: match accumulator {
            Some(to) => own::<i64>(&to.sums)?.cast(),
            None => kept.as_ref().map_or(zeros.ptr(slots), |kept| kept.slots),
        },
        added: zeros.ptr(added),
        finished: zeros.ptr(finished),
        odd: zeros.ptr(odd),
        odd_of: zeros.ptr(odd_of),
        odd_count: zeros.ptr(odd_count),
        odd_list: scratch.ptr(odd_list),
        shift: if turn.is_some() { shift } else { DevicePtr::NULL },
        kept: kept.as_ref().map_or(DevicePtr::NULL, |kept| kept.changes.known),
        divisor: divisor(reduction),
        planes: accumulator.map_or(Ok(0), |to| to.sums.dim(0))? as i32,
        ..Clusters::new([b, k, d], accumulator.map_or(n, |to| to.rows))
    };
    let pieces = Pieces { rows: plan.piece as u32, whole: (2 * plan.piece).min(SUM_ROWS) as u32 };
    let (mut active, mut next) = (active, next);
    if let Some(kept) = &kept {
        let (b64, n64, changes) = (b as i64, n as i64, &kept.changes);
        launch!(dev, UpdateChanges, "find_changes", "", elements(&[b, n.div_ceil(CHANGES_ROWS)]), THREADS;
            &labels_at, &b64, &n64, &active, changes, &next)?;
        launch!(dev, UpdateChanges, "scan_changes", "", b, SORT_THREADS; &b64, &n64, &active, changes)?;
        launch!(dev, UpdateChanges, "place_changes", "", elements(&[b, kept.room.div_ceil(CHANGES_ROWS)]), THREADS;
            &labels_at, &b64, &n64, &active, changes, &order_at)?;
        let most = CHANGES_BLOCKS * processors(dev)?;
        let blocks = warps(elements(&[b, kept.most])).min(most);
        launch!(dev, UpdateChanges, plan.kernel.kept()[1], T::SUFFIX, blocks, THREADS;
            &xs, &shape(x), Nullable(&factor), &max_abs, Nullable(&max_weight), &first_nonfinite, &order_at, &to, &active,
            &verdict, changes)?;
        let blocks = elements(&[b, CHANGES_SHARES]).min(most);
        launch!(dev, UpdateChanges, "finish_changes", T::SUFFIX, blocks, THREADS;
            Nullable(&factor), &max_abs, Nullable(&max_weight), &first_nonfinite, &to, &active, &verdict, changes)?;
        // What follows adds up the rows of the problems that these leave.
        (active, next) = (kept.whole(), DevicePtr::NULL);
    }
    if let Some(sorting) = &sorting {
        sorting.run(dev, &scratch, labels_at, active, [zeros.ptr(arrived), next, order_at, offsets])?;
    }
    if medians {
        let (b64, old) = (b as i64, scratch.ptr(old));
        old.copy_from(dev, centroids, elements(&[b, k, d]))?;
        launch!(dev, Update, plan.kernel.name(), T::SUFFIX, elements(&[b, k, d.div_ceil(MEDIAN_COLUMNS)]), THREADS;
            &xs, &shape(x), Nullable(&factor), Nullable(&max_weight), &first_nonfinite, &order_at, &offsets,
            &to.k, &active, &centroids)?;
        if turn.is_some() {
            launch!(dev, Update, "shift", T::SUFFIX, elements(&[b, k]).div_ceil(THREADS / WARP), THREADS;
                &old, &b64, &to, &active)?;
            launch!(dev, Update, "settle_shifts", "", b.div_ceil(THREADS), THREADS; &b64, &shift, &active, &verdict)?;
        }
        return Ok(());
    }
    let blocks = elements(&[b, n.div_ceil(plan.piece)]).div_ceil(SUM_THREADS / WARP);
    macro_rules! sum {
        ($image:ident, $name:expr) => {
            launch!(dev, $image, $name, T::SUFFIX, blocks, SUM_THREADS;
                &xs, &shape(x), Nullable(&factor), &max_abs, Nullable(&max_weight), &first_nonfinite, &labels_at, &order_at,
                &offsets, &pieces, &to, &active, &verdict)
        };
    }
    if keep {
        sum!(UpdateChanges, plan.kernel.kept()[0])?;
    } else {
        sum!(Update, plan.kernel.name())?;
    }
    if accumulator.is_some() || (x.dtype() == DType::F16 && factor.is_none() && summands.finite) {
        // Sums have planes for all terms, and all halves are integers of the scale: nothing is left.
        return Ok(());
    }
    let blocks = elements(&[b, k, (d + 1).div_ceil(LEFT_COLUMNS)]).min(LEFT_BLOCKS);
    launch!(dev, Update, "update_exact", T::SUFFIX, blocks, LEFT_THREADS;
        &xs, &shape(x), Nullable(&factor), &first_nonfinite, &order_at, &offsets, &to, &verdict)
}
