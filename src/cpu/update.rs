//! Sort-Inverse Update (Yang et al. 2026, Flash-KMeans): labels are sorted, then each cluster is summed, in integers that depend on
//! no order.

use super::{
    incremental::{add_to_kept, Changes},
    means::{divided, write_centroid},
    sort::order,
    sums::{grid, Scratch, Sorted, Sums, Totals, UNITS},
    tensors::{converged, lock, or, read_and_write, typed, write, Element, Stored},
};
use crate::{
    error::{Error, Result},
    fixed::{Grid, Scaled},
    host, launches,
    operand::{Readable, Target},
    plan::update::UpdateKernel,
    request::{Accumulator, Finish, Labels, Reduction, Turn, Update},
};
use candle_core::{CpuStorage, Layout, Tensor, WithDType};
use std::{
    iter::repeat_with,
    sync::{
        atomic::{AtomicBool, Ordering::Relaxed},
        PoisonError,
    },
};

/// Replaces the centroids, `(..batch, k, d)`, by the reduction of their clusters' rows, and decides which problems have converged.
pub(crate) fn update(u: &Update<'_>, mut centroids: Target<'_>) -> Result<()> {
    let &Update { plan, x, labels, reduction, turn, kept, .. } = u;
    launches::record(plan.kernel.name(), x.dtype().as_str());
    let (b, n, k, d) = (x.b, x.n, centroids.dims()[centroids.dims().len() - 2], x.d);
    typed!(x.dtype(), T => {
        let converged = converged(turn)?;
        let mut shifts = host::filled("update", b * k, 0.0)?;
        // The problems of which all rows are added up.
        let mut whole: Vec<_> = (0..b).map(|b| !converged.get(b).is_some_and(|&c| c)).collect();
        let mut kept = kept.map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner));
        if let (Some(kept), Some(labels)) = (&mut kept, labels) {
            let [labels] = lock([labels.readable()]);
            let changes = Changes::new(kept, labels.flat()?, [b, n, k], &whole)?;
            drop(labels);
            if changes.few.contains(&true) {
                launches::record("cpu_sums_changed", x.dtype().as_str());
                let sorted = Some((&changes.order[..], &changes.offsets[..]));
                with_rows(u, 2 * k, sorted, None, centroids.by_ref(), |rows, centroids: &mut [T]| {
                    changes.apply(rows, kept, reduction, &mut whole, centroids.chunks_mut(d).zip(&mut shifts))
                })?;
            }
        }
        if whole.contains(&true) {
            with_sorted(u, k, None, centroids, |clusters, centroids: &mut [T]| {
                let odd: Vec<_> = whole.iter().map(|_| AtomicBool::new(false)).collect();
                let sums = kept.iter_mut().flat_map(|kept| kept.sums.chunks_mut(d + 1)).map(Some);
                let all = centroids.chunks_mut(d).zip(&mut shifts).zip(sums.chain(repeat_with(|| None))).enumerate();
                type Cluster<'a, T> = (usize, ((&'a mut [T], &'a mut f64), Option<&'a mut [i128]>));
                let replace = |scratch: &mut Scratch, (i, ((row, shift), kept)): Cluster<'_, T>| {
                    let (b, j) = (i / k, i % k);
                    *shift = replace(clusters, [b, j], reduction, row, kept.map(|kept| (kept, &odd[b])), scratch)?;
                    Ok(())
                };
                let active = all.filter(|(i, _)| whole[i / k]).collect();
                host::for_each(active, d * (8 + n / k / 2), || Scratch::new(d), replace)?;
                if let Some(kept) = &mut kept {
                    let problems = kept.known.iter_mut().zip(odd).zip(&whole).filter(|&(_, &whole)| whole);
                    problems.for_each(|((known, odd), _)| *known = !odd.into_inner());
                }
                Ok(())
            })?;
        }
        decide_convergence(turn, &converged, &shifts)
    })
}

/// Adds rows to the sums of their clusters, of problems that have not converged. [`finish`] does what is left of an [`update`].
pub(crate) fn accumulate(u: &Update<'_>, to: &Accumulator) -> Result<()> {
    let &Update { x, reduction, .. } = u;
    let (planes, b, k) = (to.sums.dim(0)?, x.b, to.sums.dim(2)?);
    typed!(x.dtype(), T => {
        let converged = converged(u.turn)?;
        with_sorted::<T, i64, ()>(u, k, Some(to), (&to.sums).into(), |clusters, sums| {
            // Each cluster's part of every plane, for the thread that adds to it.
            let (of_cluster, mut all) = (2 * (x.d + 1), Vec::new());
            all.resize_with(b * k, || Vec::with_capacity(planes));
            for plane in sums.chunks_mut(b * k * of_cluster) {
                all.iter_mut().zip(plane.chunks_mut(of_cluster)).for_each(|(all, plane)| all.push(plane));
            }
            let all = all.into_iter().enumerate();
            let active = all.filter(|(i, _)| !converged.get(i / k).is_some_and(|&c| c)).collect();
            let add = |scratch: &mut Scratch, (i, mut planes): (usize, Vec<&mut [i64]>)| {
                let (b, j) = (i / k, i % k);
                let Some((sums, all)) = clusters.sums(b, j, scratch)? else { return Ok(()) };
                let sums = clusters.digits(b, sums);
                for (to, sums) in planes.iter_mut().zip(&sums.0) {
                    to.chunks_exact_mut(2).zip(sums).for_each(|(to, &sum)| store(to, load(to) + sum));
                }
                if reduction == Reduction::Mean {
                    let (weight, _) = clusters.weight(b, j, all);
                    for (to, weight) in planes.iter_mut().zip(&weight.0) {
                        let to = &mut to[2 * x.d..];
                        store(to, load(to) + weight[0]);
                    }
                }
                Ok(())
            };
            host::for_each(active, x.d * (8 + x.n / k / 2), || Scratch::new(x.d), add)
        })
    })
}

/// Replaces the centroids, `(..batch, k, d)`, by what [`update`] would, of all rows that have been added, and leaves zeros.
pub(crate) fn finish(f: &Finish<'_>, centroids: Target<'_>) -> Result<()> {
    let &Finish { sums: Accumulator { sums, max_abs, max_weight, rows }, reduction, turn } = f;
    let (planes, b, k, d) = (sums.dim(0)?, sums.dim(1)?, sums.dim(2)?, sums.dim(3)? - 1);
    typed!(centroids.dtype(), T => {
        let converged = converged(turn)?;
        let ([max_abs], max_weight) = (lock([max_abs]), max_weight.as_ref().map(|w| lock([w])));
        let max_abs = max_abs.flat::<f64>()?;
        let max_weight = max_weight.as_ref().map(|[w]| w.flat::<f64>()).transpose()?;
        let replaced = read_and_write([sums], centroids, |[sums], centroids: &mut [T]| {
            let sums = sums.flat::<i64>()?;
            let mut shifts = host::filled("finish", b * k, 0.0)?;
            let all = centroids.chunks_mut(d).zip(&mut shifts).enumerate();
            let active = all.filter(|(i, _)| !converged.get(i / k).is_some_and(|&c| c)).collect();
            let replace = |_: &mut (), (i, (row, shift)): (usize, (&mut [T], &mut f64))| {
                let at = |plane: usize, c: usize| load(&sums[2 * ((plane * b * k + i) * (d + 1) + c)..]);
                let sum = |c: usize, grid: Grid| {
                    let digits: Vec<_> = (0..grid.planes).map(|plane| at(plane, c)).collect();
                    grid.rounded(&digits)
                };
                let of_columns = grid(max_abs[i / k], *rows, Some(planes));
                let of_weight = max_weight.map_or(UNITS, |w| grid(w[i / k], *rows, Some(planes)));
                let sums: Vec<Scaled> = (0..d).map(|c| sum(c, of_columns)).collect();
                if let Some(values) = divided(reduction, sums, || sum(d, of_weight)) {
                    *shift = write_centroid(row, values);
                }
                Ok(())
            };
            host::for_each(active, d * planes * 8, || (), replace)?;
            Ok::<Vec<f64>, Error>(shifts)
        });
        let shifts = replaced??;
        write(sums, |sums: &mut [i64]| {
            let all = sums.chunks_mut(k * (d + 1) * 2).enumerate();
            all.filter(|(i, _)| !converged.get(i % b).is_some_and(|&c| c)).for_each(|(_, sums)| sums.fill(0));
        })?;
        decide_convergence(turn, &converged, &shifts)
    })
}

/// Adds the sums of another accumulator of the same grid.
pub(crate) fn merge(sums: &Tensor, others: &Tensor) -> Result<()> {
    read_and_write([others], sums.into(), |[others], sums: &mut [i64]| {
        let others = others.flat::<i64>()?;
        sums.chunks_exact_mut(2).zip(others.chunks_exact(2)).for_each(|(to, from)| store(to, load(to) + load(from)));
        Ok(())
    })?
}

/// The integer of a low and a high half.
fn load(halves: &[i64]) -> i128 {
    i128::from(halves[1]) << 64 | i128::from(halves[0] as u64)
}

/// The halves of an integer.
fn store(halves: &mut [i64], v: i128) {
    (halves[0], halves[1]) = (v as i64, (v >> 64) as i64);
}

/// Lets `f` read rows in the order of their clusters, and write a target. Sums are on the accumulator's grid, if there is one.
fn with_sorted<T: Element, O: Stored, R>(
    u: &Update<'_>,
    k: usize,
    to: Option<&Accumulator>,
    target: Target<'_>,
    f: impl FnOnce(&Sorted<'_, T>, &mut [O]) -> Result<R>,
) -> Result<R> {
    let &Update { x, labels, .. } = u;
    let (own, given) = match labels {
        None => (None, None),
        Some(Labels::Unsorted(labels)) => (Some(sorted(labels, k)?), None),
        // Nobody else has these, nor the bounds of terms below: they are locked beside others, in any order.
        Some(Labels::Sorted(order)) => (None, Some(lock([&order.order, &order.offsets]))),
    };
    let own = own.as_ref().map(|sorted| sorted.split_at(x.b * x.n));
    let given = given.as_ref().map(|[order, offsets]| Ok::<_, Error>((order.flat()?, offsets.flat()?))).transpose()?;
    with_rows(u, k, own.or(given), to, target, f)
}

/// The same of rows that are in order, beside the offsets of clusters.
fn with_rows<T: Element, O: Stored, R>(
    u: &Update<'_>,
    k: usize,
    sorted: Option<(&[u32], &[u32])>,
    to: Option<&Accumulator>,
    target: Target<'_>,
    f: impl FnOnce(&Sorted<'_, T>, &mut [O]) -> Result<R>,
) -> Result<R> {
    let &Update { x, summands, .. } = u;
    let (max_abs, max_weight) =
        to.map_or((&summands.max_abs, &summands.max_weight), |to| (&to.max_abs, &to.max_weight));
    let ([max_abs, first_nonfinite], max_weight) =
        (lock([max_abs, &summands.first_nonfinite]), max_weight.as_ref().map(|w| lock([w])));
    let shared = [&x.operand, or(summands.row_scale.as_ref(), &x.operand)];
    read_and_write(shared, target, |[xs, factor], out| {
        let clusters = Sorted {
            kernel: u.plan.kernel,
            x: xs.view::<T>(x)?,
            factor: summands.row_scale.as_ref().map(|_| factor.flat::<f64>()).transpose()?,
            order: sorted.map(|(order, _)| order),
            offsets: sorted.map(|(_, offsets)| offsets),
            max_abs: max_abs.flat()?,
            first_nonfinite: first_nonfinite.flat()?,
            max_weight: max_weight.as_ref().map(|[w]| w.flat::<f64>()).transpose()?,
            k,
            grid_rows: to.map_or(x.n, |to| to.rows),
            planes: to.map(|to| to.sums.dim(0)).transpose()?,
        };
        f(&clusters, out)
    })?
}

/// Notes which problems have converged: those of which no centroid has moved farther than the threshold.
fn decide_convergence(turn: Option<Turn<'_>>, converged: &[bool], shifts: &[f64]) -> Result<()> {
    let Some(Turn { progress, iteration }) = turn else { return Ok(()) };
    let [thresholds] = lock([&progress.threshold]);
    let (thresholds, k) = (thresholds.flat::<f64>()?, shifts.len() / converged.len().max(1));
    write(&progress.stop, |stop: &mut [u32]| {
        for b in (0..converged.len()).filter(|&b| !converged[b]) {
            if shifts[b * k..][..k].iter().fold(0.0, |most: f64, &s| most.max(s)) <= thresholds[b] {
                stop[b] = iteration as u32;
            }
        }
    })
}

/// The orders of all problems' labels, then their offsets.
fn sorted(labels: &dyn Readable, k: usize) -> Result<Vec<u32>> {
    let (b, n) = (labels.dims()[0], labels.dims()[1]);
    let mut sorted = CpuStorage::U32(host::filled("update", b * (n + k + 1), 0)?);
    let layout = Layout::contiguous(b * (n + k + 1));
    order(labels, k, Target::Cpu(&mut sorted, layout))?;
    Ok(u32::cpu_storage_data(sorted)?)
}

/// Replaces the centroid `row` of cluster `j`, unless that has no weight, and returns the square of its shift. Notes its sums for the next
/// update, or that they are none to be kept.
fn replace<T: Element>(
    clusters: &Sorted<T>,
    [b, j]: [usize; 2],
    reduction: Reduction,
    row: &mut [T],
    mut kept: Option<(&mut [i128], &AtomicBool)>,
    scratch: &mut Scratch,
) -> Result<f64> {
    if let Some((kept, _)) = &mut kept {
        kept.fill(0);
    }
    let values = match clusters.kernel {
        UpdateKernel::CpuMedians => clusters.medians(b, j),
        _ => clusters.sums(b, j, scratch)?.and_then(|(sums, all)| {
            let (weight, grid) =
                if reduction == Reduction::Mean { clusters.weight(b, j, all) } else { (Sums::new(1), UNITS) };
            if let Some((kept, odd)) = kept {
                odd.fetch_or(!add_to_kept(clusters, b, (&sums, &weight), 1, kept), Relaxed);
            }
            let weight = || weight.rounded(grid)[0];
            match sums {
                Totals::Digits(sums, grid) => divided(reduction, sums.rounded(grid), weight),
                Totals::Exact(sums) if reduction == Reduction::Sum => Some(sums),
                Totals::Exact(mut sums) if reduction == Reduction::Mean => {
                    // A quotient of two numbers that f64 holds is rounded once by itself.
                    let weight = weight().value();
                    sums.iter_mut().for_each(|sum| *sum /= weight);
                    Some(sums)
                }
                Totals::Exact(sums) => divided(reduction, sums.into_iter().map(Scaled::of_f64).collect(), weight),
            }
        }),
    };
    Ok(values.map_or(0.0, |values| write_centroid(row, values)))
}
