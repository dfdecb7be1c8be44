//! Sort-Inverse Update: labels sorted, clusters summed without an order to depend on.

use super::{
    median::median,
    scalar::Scalar,
    sort::order,
    tensors::{finished, lock, or, read_and_write, typed, write, Element, View},
};
use crate::{
    error::{Error, Result},
    fixed::{self, Exact, Scaled},
    host, launches,
    operand::{Readable, Target},
    plan::update::UpdateKernel,
    request::{Reduction, Turn, Update},
    tiles::CPU_SUM_ROWS,
};
use candle_core::{CpuStorage, Layout, WithDType};
use pulp::NullaryFnOnce;
use std::ops::Range;

pub(crate) fn update(u: &Update<'_>, centroids: Target<'_>) -> Result<()> {
    let &Update { plan, x, terms, labels, reduction, turn } = u;
    launches::record(plan.kernel.name(), x.dtype().as_str());
    let (b, k, d) = (x.b, centroids.dims()[centroids.dims().len() - 2], x.d);
    let sorted = labels.map(|labels| sorted(labels, k)).transpose()?;
    typed!(x.dtype(), T => {
        // Of these nobody else has any.
        let ([largest, first_bad], heaviest) =
            (lock([&terms.max_abs, &terms.first_nonfinite]), terms.max_weight.as_ref().map(|h| lock([h])));
        let sorted = sorted.as_ref().map(|sorted| sorted.split_at(b * x.n));
        let over = finished(turn)?;
        let shared = [&x.operand, or(terms.row_scale.as_ref(), &x.operand)];
        let shifts: Vec<f64> = read_and_write(shared, centroids, |[xs, factor], centroids: &mut [T]| {
            let clusters = Sorted {
                kernel: plan.kernel,
                x: xs.view::<T>(x)?,
                factor: terms.row_scale.as_ref().map(|_| factor.flat::<f64>()).transpose()?,
                order: sorted.map(|(order, _)| order),
                offsets: sorted.map(|(_, offsets)| offsets),
                largest: largest.flat()?,
                first_bad: first_bad.flat()?,
                heaviest: heaviest.as_ref().map(|[h]| h.flat::<f64>()).transpose()?,
                k,
            };
            let mut shifts = host::filled("update", b * k, 0.0)?;
            let all = centroids.chunks_mut(d).zip(&mut shifts).enumerate();
            let going = all.filter(|(i, _)| !over.get(i / k).is_some_and(|&over| over)).collect();
            let replace = |_: &mut (), (i, (row, shift)): (usize, (&mut [T], &mut f64))| {
                *shift = clusters.replace(i / k, i % k, reduction, row)?;
                Ok(())
            };
            host::for_each(going, d * (8 + 2 * (x.n / k)), || (), replace)?;
            Ok::<_, Error>(shifts)
        })??;
        let Some(Turn { progress, iteration }) = turn else { return Ok(()) };
        let [thresholds] = lock([&progress.threshold]);
        let thresholds = thresholds.flat::<f64>()?;
        write(&progress.stop, |stop: &mut [u32]| {
            for b in (0..b).filter(|&b| !over[b]) {
                if shifts[b * k..][..k].iter().fold(0.0, |most: f64, &s| most.max(s)) <= thresholds[b] {
                    stop[b] = iteration as u32;
                }
            }
        })
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

/// Rows in label order (or, without one, all in one cluster as they lie), and what bounds their terms.
struct Sorted<'a, T> {
    kernel: UpdateKernel,
    x: View<'a, T>,
    factor: Option<&'a [f64]>,
    order: Option<&'a [u32]>,
    offsets: Option<&'a [u32]>,
    largest: &'a [f64],
    first_bad: &'a [u32],
    heaviest: Option<&'a [f64]>,
    k: usize,
}

impl<T: Element> Sorted<'_, T> {
    fn range(&self, b: usize, j: usize) -> Range<usize> {
        match self.offsets {
            Some(offsets) => offsets[b * (self.k + 1) + j] as usize..offsets[b * (self.k + 1) + j + 1] as usize,
            None => 0..self.x.rows.n,
        }
    }

    /// Replaces the centroid `row` of cluster `j`, unless that has no weight, and returns the square of its shift.
    fn replace(&self, b: usize, j: usize, reduction: Reduction, row: &mut [T]) -> Result<f64> {
        let values = match self.kernel {
            UpdateKernel::CpuMedians => self.medians(b, j),
            _ => self.sums(b, j)?.and_then(|sums| self.divided(b, j, reduction, sums)),
        };
        let Some(values) = values else { return Ok(0.0) };
        let shift = fixed::striped(row.iter_mut().zip(values).map(|(old, v)| {
            let new = T::narrow(v);
            let t = if new.wide() == old.wide() { 0.0 } else { new.wide() - old.wide() };
            *old = new;
            t * t
        }));
        Ok(if shift.is_nan() { f64::INFINITY } else { shift })
    }

    fn divided(&self, b: usize, j: usize, reduction: Reduction, sums: Vec<Scaled>) -> Option<Vec<f64>> {
        match reduction {
            Reduction::Sum => Some(sums.into_iter().map(Scaled::value).collect()),
            Reduction::Direction => {
                let (values, norm) = Scaled::direction(&sums)?;
                Some(values.into_iter().map(|v| v / norm).collect())
            }
            _ => {
                let weight = self.weight(b, j);
                weight.is_positive().then(|| sums.into_iter().map(|s| s.over(weight)).collect())
            }
        }
    }

    /// Whether a row counts: one that is not finite weighs nothing.
    fn counts(&self, b: usize, row: usize) -> bool {
        self.first_bad[b] == u32::MAX || self.x.row(b, row).iter().all(|v| v.wide().is_finite())
    }

    /// The rows of a cluster that count.
    fn members(&self, b: usize, j: usize) -> impl Iterator<Item = usize> + '_ {
        self.range(b, j).map(move |place| self.row(b, place)).filter(move |&row| self.counts(b, row))
    }

    /// The weight of a row that counts.
    fn row_weight(&self, b: usize, row: usize) -> f64 {
        self.factor.map_or(1.0, |factor| factor[b * self.x.rows.n + row])
    }

    fn weight(&self, b: usize, j: usize) -> Scaled {
        let Some(heaviest) = self.heaviest else {
            let all = self.first_bad[b] == u32::MAX;
            let rows = if all { self.range(b, j).len() } else { self.members(b, j).count() };
            return Scaled::of(rows as i128, 0);
        };
        let scale = fixed::scale(heaviest[b], self.x.rows.n);
        let (mut whole, mut exact) = (0, None);
        for row in self.members(b, j) {
            let weight = self.row_weight(b, row);
            match fixed::quantise(weight, scale) {
                Some(v) => whole += v,
                None => exact.get_or_insert(Exact::ZERO).add(weight),
            }
        }
        rounded(whole, scale, exact)
    }

    fn row(&self, b: usize, place: usize) -> usize {
        self.order.map_or(place, |order| order[b * self.x.rows.n + place] as usize)
    }

    /// The sums of the columns; none of no rows.
    fn sums(&self, b: usize, j: usize) -> Result<Option<Vec<Scaled>>> {
        let Range { start, end } = self.range(b, j);
        let scale = fixed::scale(self.largest[b], self.x.rows.n);
        let part = |p: usize| self.sum(b, start + p * CPU_SUM_ROWS, end.min(start + (p + 1) * CPU_SUM_ROWS), scale);
        let parts = (end - start).div_ceil(CPU_SUM_ROWS);
        let sums = host::reduce(parts, CPU_SUM_ROWS * self.x.rows.d, part, Sums::join)?;
        Ok(sums.map(|Sums { whole, exact }| {
            let exact = exact.map_or_else(|| vec![None; whole.len()], |exact| exact.into_iter().map(Some).collect());
            whole.into_iter().zip(exact).map(|(q, exact)| rounded(q, scale, exact)).collect()
        }))
    }

    /// Sums positions `start..end` of problem `b`.
    ///
    /// The integer of most terms is split over a few f64 "limbs", each a whole number of its own unit (2^26 apart) and
    /// small enough that f64 addition of thousands of them is exact: integer sums at the speed of f64 adds. A term with
    /// bits below the last limb (a small one) adds what is missing as an integer of its own, or to an exact sum.
    fn sum(&self, b: usize, start: usize, end: usize, scale: i32) -> Sums {
        // Products with a factor carry 53 bits, plain f32 and shorter at most 24.
        if self.factor.is_some() || size_of::<T>() == 8 {
            self.sum_limbs::<3>(b, start, end, scale)
        } else {
            self.sum_limbs::<2>(b, start, end, scale)
        }
    }

    fn sum_limbs<const LIMBS: usize>(&self, b: usize, start: usize, end: usize, scale: i32) -> Sums {
        // Every term is below 2^top; adding and taking away 1.5 * 2^(52 + e) rounds to a multiple of 2^e.
        let top = 126 - scale - (usize::BITS - self.x.rows.n.leading_zeros()) as i32;
        let units: [i32; LIMBS] = std::array::from_fn(|l| top - 26 * (l as i32 + 1));
        let rounders = units.map(|e| 1.5 * 2f64.powi(52 + e));
        let extreme = !(-900..900).contains(&top);
        let mut planes = vec![0f64; LIMBS * self.x.rows.d];
        let mut sums = Sums { whole: vec![0; self.x.rows.d], exact: None };
        let rounders = if extreme { &[][..] } else { &rounders };
        let add =
            AddRows { terms: self, b, positions: start..end, scale, rounders, planes: &mut planes, sums: &mut sums };
        pulp::Arch::new().dispatch(add);
        for (plane, unit) in planes.chunks_exact(self.x.rows.d).zip(units) {
            let whole = 2f64.powi(-unit);
            sums.whole.iter_mut().zip(plane).for_each(|(s, &v)| *s += ((v * whole) as i128) << (unit + scale));
        }
        sums
    }

    /// The medians of the columns; none of no weight.
    fn medians(&self, b: usize, j: usize) -> Option<Vec<f64>> {
        let members: Vec<_> = self.members(b, j).map(|row| (row, self.row_weight(b, row))).collect();
        let members: Vec<_> = members.into_iter().filter(|&(_, weight)| weight > 0.0 && weight.is_finite()).collect();
        let mut column = Vec::with_capacity(members.len());
        let median = |c: usize| {
            column.clear();
            column.extend(members.iter().map(|&(i, weight)| (self.x.row(b, i)[c].wide(), weight)));
            median(&mut column, self.heaviest.map(|heaviest| fixed::scale(heaviest[b], self.x.rows.n)))
        };
        (!members.is_empty()).then(|| (0..self.x.rows.d).map(median).collect())
    }
}

/// The sums of columns: of terms that are integers of the problem's scale, and of others, if there are any.
struct Sums {
    whole: Vec<i128>,
    exact: Option<Vec<Exact>>,
}

impl Sums {
    fn join(mut self, other: Self) -> Self {
        self.whole.iter_mut().zip(other.whole).for_each(|(a, b)| *a += b);
        self.exact = match (self.exact, other.exact) {
            (Some(mut exact), Some(other)) => {
                exact.iter_mut().zip(&other).for_each(|(a, b)| a.join(b));
                Some(exact)
            }
            (exact, other) => exact.or(other),
        };
        self
    }
}

/// The sum of both, rounded once.
fn rounded(whole: i128, scale: i32, exact: Option<Exact>) -> Scaled {
    match exact {
        None => Scaled::of(whole, scale),
        Some(mut exact) => {
            exact.add_fixed(whole, scale);
            exact.rounded()
        }
    }
}

/// Adds the limbs of some terms to `planes`, and what they leave (without rounders: everything) to `sums`. A struct for the
/// reason that `Pack` in assign.rs is one.
struct AddRows<'a, T> {
    terms: &'a Sorted<'a, T>,
    b: usize,
    positions: Range<usize>,
    scale: i32,
    rounders: &'a [f64],
    planes: &'a mut [f64],
    sums: &'a mut Sums,
}

impl<T: Element> NullaryFnOnce for AddRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { terms, b, positions, scale, rounders, planes, sums } = self;
        let (n, d, dirty) = (terms.x.rows.n, terms.x.rows.d, terms.first_bad[b] != u32::MAX);
        let row = |p: usize| terms.row(b, p);
        let (mut values, mut rest) = (vec![Scalar::of(0.0); d], vec![0f64; d]);
        for p in positions.clone() {
            if terms.order.is_some() && p + AHEAD < positions.end {
                prefetch(terms.x.row(b, row(p + AHEAD)));
            }
            T::filter_row(terms.x.row(b, row(p)), &mut values);
            let factor = terms.factor.map_or(1.0, |f| f[b * n + row(p)]);
            if dirty && !values.iter().all(|v| v.widen().is_finite()) {
                continue;
            }
            for (r, v) in rest.iter_mut().zip(&values) {
                let v = v.widen() * factor;
                *r = if v.abs() < f64::INFINITY { v } else { 0.0 };
            }
            for (plane, &rounder) in planes.chunks_exact_mut(d).zip(rounders) {
                for (p, r) in plane.iter_mut().zip(&mut rest) {
                    let limb = (*r + rounder) - rounder;
                    *p += limb;
                    *r -= limb;
                }
            }
            if rest.iter().fold(0, |any, r| any | r.to_bits() << 1) != 0 {
                let Sums { whole, exact } = &mut *sums;
                for (c, (s, &r)) in whole.iter_mut().zip(&rest).enumerate().filter(|(_, (_, &r))| r != 0.0) {
                    match fixed::quantise(r, scale) {
                        Some(v) => *s += v,
                        None => exact.get_or_insert_with(|| vec![Exact::ZERO; d])[c].add(r),
                    }
                }
            }
        }
    }
}

/// Rows in label order lie anywhere: this many are asked for ahead of their turn.
const AHEAD: usize = 4;

#[inline(always)]
fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(row)).step_by(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch is a hint that cannot fault, and the address lies inside `row`.
        unsafe { _mm_prefetch(row.as_ptr().cast::<i8>().add(line), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}
