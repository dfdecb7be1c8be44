//! Sort-Inverse Update: labels sorted, clusters summed without an order to depend on.

use super::{
    assign::{finished, tensor},
    filter::Scalar,
    line, lock, read_and_write, typed, write, Element, View,
};
use crate::{
    fixed, host,
    ops::{Memory, Progress, Rule, Terms, Turn},
    problem::Rows,
    tiles::CPU_SUM_ROWS,
    Error, Metric, Result,
};
use candle_core::Tensor;
use pulp::NullaryFnOnce;
use std::ops::Range;

pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let (b, n) = labels.dims2()?;
    let [labels] = lock([labels]);
    let labels = labels.flat::<u32>()?;
    let (mut order, mut offsets) = (host::filled("sort", b * n, 0u32)?, host::filled("sort", b * (k + 1), 0u32)?);
    if n > 0 {
        let problems = order.chunks_mut(n).zip(offsets.chunks_mut(k + 1)).zip(labels.chunks(n)).collect();
        type Sorting<'a> = ((&'a mut [u32], &'a mut [u32]), &'a [u32]);
        let sort = |_: &mut (), ((order, offsets), labels): Sorting<'_>| {
            labels.iter().for_each(|&l| offsets[l as usize + 1] += 1);
            (0..k).for_each(|j| offsets[j + 1] += offsets[j]);
            let mut next = offsets[..k].to_vec();
            for (i, &l) in labels.iter().enumerate() {
                order[next[l as usize] as usize] = i as u32;
                next[l as usize] += 1;
            }
            Ok(())
        };
        host::for_each(problems, 4 * n + k, || (), sort)?;
    }
    Ok((tensor(order, (b, n))?, tensor(offsets, (b, k + 1))?))
}

pub(crate) fn update(
    x: &Rows,
    terms: &Terms,
    labels: Option<&Tensor>,
    rule: Rule,
    turn: Option<Turn<'_>>,
    centroids: &Tensor,
    _: &Memory,
) -> Result<()> {
    let (b, k, d) = centroids.dims3()?;
    let sorted = labels.map(|labels| order(labels, k)).transpose()?;
    typed!(x.dtype(), T => {
        // Of these nobody else has any.
        let ([largest], heaviest) = (lock([&terms.largest]), terms.heaviest.as_ref().map(|h| lock([h])));
        let sorted = sorted.as_ref().map(|(order, offsets)| lock([order, offsets]));
        let sorted = sorted.as_ref().map(|[order, offsets]| Ok::<_, Error>((order.flat()?, offsets.flat()?))).transpose()?;
        let over = finished(turn)?;
        let shared = [&x.tensor, terms.factor.as_ref().unwrap_or(&x.tensor)];
        let shifts: Vec<f64> = read_and_write(shared, centroids, |[xs, factor], centroids: &mut [T]| {
            let clusters = Sorted {
                x: xs.view::<T>(x)?,
                factor: terms.factor.as_ref().map(|_| factor.flat::<f64>()).transpose()?,
                order: sorted.map(|(order, _)| order),
                offsets: sorted.map(|(_, offsets)| offsets),
                largest: largest.flat()?,
                heaviest: heaviest.as_ref().map(|[h]| h.flat::<f64>()).transpose()?,
                k,
            };
            let mut shifts = host::filled("update", b * k, 0.0)?;
            let all = centroids.chunks_mut(d).zip(&mut shifts).enumerate();
            let going = all.filter(|(i, _)| !over.get(i / k).is_some_and(|&over| over)).collect();
            let replace = |_: &mut (), (i, (row, shift)): (usize, (&mut [T], &mut f64))| {
                *shift = clusters.replace(i / k, i % k, rule, row)?;
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

/// Rows of one column are worth it.
#[allow(clippy::too_many_arguments)]
pub(crate) fn fit_on_chip(
    x: &Rows,
    terms: &Terms,
    metric: Metric,
    _: Rule,
    progress: &Progress,
    max_iters: usize,
    centroids: &Tensor,
    labels: &Tensor,
    _: &Memory,
) -> Result<bool> {
    if x.d != 1 || metric != Metric::SquaredEuclidean {
        return Ok(false);
    }
    line::fit(x, terms, progress, max_iters, centroids, labels)
}

/// Rows in label order (or, without one, all in one cluster as they lie), and what bounds their terms.
struct Sorted<'a, T> {
    x: View<'a, T>,
    factor: Option<&'a [f64]>,
    order: Option<&'a [u32]>,
    offsets: Option<&'a [u32]>,
    largest: &'a [f64],
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
    fn replace(&self, b: usize, j: usize, rule: Rule, row: &mut [T]) -> Result<f64> {
        let values = match rule {
            Rule::Median => self.medians(b, j),
            _ => self.sums(b, j)?.and_then(|sums| self.divided(b, j, rule, sums)),
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

    fn divided(&self, b: usize, j: usize, rule: Rule, sums: Vec<f64>) -> Option<Vec<f64>> {
        let divisor = match rule {
            Rule::Sum => 1.0,
            Rule::Direction => fixed::striped(sums.iter().map(|s| s * s)).sqrt(),
            _ => self.weight(b, j),
        };
        (divisor > 0.0).then(|| sums.into_iter().map(|s| s / divisor).collect())
    }

    /// The fixed-point weight of the row at a place, and the scale it has.
    fn weights(&self, b: usize) -> Option<(impl Fn(usize) -> i128 + '_, i32)> {
        let (factor, heaviest) = (self.factor?, self.heaviest?);
        let scale = fixed::scale(heaviest[b], self.x.rows.n);
        Some((move |place| fixed::quantise(factor[b * self.x.rows.n + self.row(b, place)], scale), scale))
    }

    fn weight(&self, b: usize, j: usize) -> f64 {
        match self.weights(b) {
            Some((weight, scale)) => fixed::value(self.range(b, j).map(weight).sum(), scale),
            None => self.range(b, j).len() as f64,
        }
    }

    fn row(&self, b: usize, place: usize) -> usize {
        self.order.map_or(place, |order| order[b * self.x.rows.n + place] as usize)
    }

    /// The sums of the columns; none of no rows.
    fn sums(&self, b: usize, j: usize) -> Result<Option<Vec<f64>>> {
        let Range { start, end } = self.range(b, j);
        let scale = fixed::scale(self.largest[b], self.x.rows.n);
        let part = |p: usize| self.sum(b, start + p * CPU_SUM_ROWS, end.min(start + (p + 1) * CPU_SUM_ROWS), scale);
        let add = |mut a: Vec<i128>, b: Vec<i128>| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        };
        let parts = (end - start).div_ceil(CPU_SUM_ROWS);
        let sum = host::reduce(parts, CPU_SUM_ROWS * self.x.rows.d, part, add)?;
        Ok(sum.map(|sum| sum.into_iter().map(|q| fixed::value(q, scale)).collect()))
    }

    /// Sums positions `start..end` of problem `b` as fixed-point integers.
    ///
    /// The integer of most terms is split over a few f64 "limbs", each a whole number of its own unit (2^26 apart) and
    /// small enough that f64 addition of thousands of them is exact: integer sums at the speed of f64 adds. A term with
    /// bits below the last limb (a small one) adds what is missing as an integer of its own.
    fn sum(&self, b: usize, start: usize, end: usize, scale: i32) -> Vec<i128> {
        // Products with a factor carry 53 bits, plain f32 and shorter at most 24.
        if self.factor.is_some() || size_of::<T>() == 8 {
            self.sum_limbs::<3>(b, start, end, scale)
        } else {
            self.sum_limbs::<2>(b, start, end, scale)
        }
    }

    fn sum_limbs<const LIMBS: usize>(&self, b: usize, start: usize, end: usize, scale: i32) -> Vec<i128> {
        // Every term is below 2^top; adding and taking away 1.5 * 2^(52 + e) rounds to a multiple of 2^e.
        let top = 126 - scale - (usize::BITS - self.x.rows.n.leading_zeros()) as i32;
        let units: [i32; LIMBS] = std::array::from_fn(|l| top - 26 * (l as i32 + 1));
        let rounders = units.map(|e| 1.5 * 2f64.powi(52 + e));
        let extreme = !(-900..900).contains(&top);
        let mut planes = vec![0f64; LIMBS * self.x.rows.d];
        let mut sum = vec![0i128; self.x.rows.d];
        let rounders = if extreme { &[][..] } else { &rounders };
        let add =
            AddRows { terms: self, b, positions: start..end, scale, rounders, planes: &mut planes, sum: &mut sum };
        pulp::Arch::new().dispatch(add);
        for (plane, unit) in planes.chunks_exact(self.x.rows.d).zip(units) {
            let whole = 2f64.powi(-unit);
            sum.iter_mut().zip(plane).for_each(|(s, &v)| *s += ((v * whole) as i128) << (unit + scale));
        }
        sum
    }

    /// The medians of the columns; none of no weight.
    fn medians(&self, b: usize, j: usize) -> Option<Vec<f64>> {
        let weights = self.weights(b);
        let weight = |place| weights.as_ref().map_or(1, |(weight, _)| weight(place));
        let members: Vec<_> = self.range(b, j).map(|place| (self.row(b, place), weight(place))).collect();
        let total: i128 = members.iter().map(|m| m.1).sum();
        let mut column = Vec::with_capacity(members.len());
        let median = |c: usize| {
            column.clear();
            column.extend(members.iter().map(|&(i, weight)| (self.x.row(b, i)[c].wide(), weight)));
            median(&mut column, total, weights.is_none())
        };
        (total > 0).then(|| (0..self.x.rows.d).map(median).collect())
    }
}

/// Adds the limbs of some terms to `planes`, and what they leave (without rounders: everything) to `sum`. A struct for the
/// reason that `Pack` in assign.rs is one.
struct AddRows<'a, T> {
    terms: &'a Sorted<'a, T>,
    b: usize,
    positions: Range<usize>,
    scale: i32,
    rounders: &'a [f64],
    planes: &'a mut [f64],
    sum: &'a mut [i128],
}

impl<T: Element> NullaryFnOnce for AddRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { terms, b, positions, scale, rounders, planes, sum } = self;
        let (n, d) = (terms.x.rows.n, terms.x.rows.d);
        let row = |p: usize| terms.row(b, p);
        let (mut values, mut each, mut rest) = (vec![Scalar::of(0.0); d], vec![0f64; d], vec![0f64; d]);
        for p in positions.clone() {
            if terms.order.is_some() && p + AHEAD < positions.end {
                prefetch(terms.x.row(b, row(p + AHEAD)));
            }
            T::filter_row(terms.x.row(b, row(p)), &mut values);
            let factor = terms.factor.map_or(1.0, |f| f[b * n + row(p)]);
            for ((t, r), v) in each.iter_mut().zip(&mut rest).zip(&values) {
                let v = v.widen() * factor;
                *t = if v.abs() < f64::INFINITY { v } else { 0.0 };
                *r = *t;
            }
            for (plane, &rounder) in planes.chunks_exact_mut(d).zip(rounders) {
                for (p, r) in plane.iter_mut().zip(&mut rest) {
                    let limb = (*r + rounder) - rounder;
                    *p += limb;
                    *r -= limb;
                }
            }
            if rest.iter().fold(0, |any, r| any | r.to_bits() << 1) != 0 {
                for ((s, &t), &r) in sum.iter_mut().zip(&each).zip(&rest).filter(|(_, &r)| r != 0.0) {
                    *s += fixed::quantise(t, scale) - fixed::quantise(t - r, scale);
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

/// The smallest value that at least half of the weight does not exceed.
fn median(column: &mut [(f64, i128)], total: i128, unweighted: bool) -> f64 {
    let by_value = |a: &(f64, i128), b: &(f64, i128)| a.0.total_cmp(&b.0);
    if column.is_empty() {
        return 0.0;
    }
    if unweighted {
        let middle = (column.len() - 1) / 2;
        return column.select_nth_unstable_by(middle, by_value).1 .0;
    }
    column.sort_unstable_by(by_value);
    let mut below = 0;
    let reached = column.iter().find(|(_, w)| {
        below += w;
        2 * below >= total
    });
    reached.map_or(0.0, |&(v, _)| v)
}
