//! Sort-Inverse Update: labels sorted, clusters summed without an order to depend on.

use super::{assign::tensor, filter::Scalar, lock, typed, Element, View};
use crate::{fixed, problem::Rows, tiles::CPU_SUM_ROWS, Metric, Result};
use candle_core::Tensor;
use pulp::NullaryFnOnce;
use rayon::prelude::*;
use std::ops::Range;

pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let (b, n) = labels.dims2()?;
    let labels = lock(labels);
    let labels = labels.flat::<u32>()?;
    let (mut order, mut offsets) = (vec![0u32; b * n], vec![0u32; b * (k + 1)]);
    if n > 0 {
        order.par_chunks_mut(n).zip(offsets.par_chunks_mut(k + 1)).zip(labels.par_chunks(n)).for_each(
            |((order, offsets), labels)| {
                labels.iter().for_each(|&l| offsets[l as usize + 1] += 1);
                (0..k).for_each(|j| offsets[j + 1] += offsets[j]);
                let mut next = offsets[..k].to_vec();
                for (i, &l) in labels.iter().enumerate() {
                    order[next[l as usize] as usize] = i as u32;
                    next[l as usize] += 1;
                }
            },
        );
    }
    Ok((tensor(order, (b, n))?, tensor(offsets, (b, k + 1))?))
}

pub(crate) fn sums(
    x: &Rows,
    factor: Option<&Tensor>,
    order: Option<&Tensor>,
    offsets: &Tensor,
    max_abs: &Tensor,
) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (xs, factor, order, offs, max) = (lock(&x.tensor), factor.map(lock), order.map(lock), lock(offsets), lock(max_abs));
        let terms = Terms {
            x: xs.view::<T>(x)?,
            factor: factor.as_ref().map(|f| f.flat::<f64>()).transpose()?,
            order: order.as_ref().map(|o| o.flat::<u32>()).transpose()?,
        };
        let (offs, max) = (offs.flat::<u32>()?, max.flat::<f64>()?);
        let k = offsets.dims2()?.1 - 1;
        let mut out = vec![0i64; x.b * k * x.d * 2];
        out.par_chunks_mut(x.d * 2).enumerate().for_each(|(i, out)| {
            let (b, j) = (i / k, i % k);
            let (start, end) = (offs[b * (k + 1) + j] as usize, offs[b * (k + 1) + j + 1] as usize);
            let scale = fixed::scale(max[b], x.n);
            let part = |p: usize| terms.sum(b, start + p * CPU_SUM_ROWS, end.min(start + (p + 1) * CPU_SUM_ROWS), scale);
            let add = |mut a: Vec<i128>, b: Vec<i128>| {
                a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
                a
            };
            let parts = (end - start).div_ceil(CPU_SUM_ROWS);
            if let Some(sum) = (0..parts).into_par_iter().map(part).reduce_with(add) {
                for (o, q) in out.chunks_exact_mut(2).zip(sum) {
                    (o[0], o[1]) = (q as i64, (q >> 64) as i64);
                }
            }
        });
        tensor(out, (x.b, k, x.d, 2))
    })
}

/// The terms of the sums: rows in label order, each times its factor.
struct Terms<'a, T> {
    x: View<'a, T>,
    factor: Option<&'a [f64]>,
    order: Option<&'a [u32]>,
}

impl<T: Element> Terms<'_, T> {
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
}

/// Adds the limbs of some terms to `planes`, and what they leave (without rounders: everything) to `sum`. A struct for the
/// reason that `Pack` in assign.rs is one.
struct AddRows<'a, T> {
    terms: &'a Terms<'a, T>,
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
        let row = |p: usize| terms.order.map_or(p, |order| order[b * n + p] as usize);
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

pub(crate) fn totals(sums: &Tensor, max_abs: &Tensor, n: usize) -> Result<Tensor> {
    let (b, k, d, _) = sums.dims4()?;
    let (sums, max) = (lock(sums), lock(max_abs));
    let (sums, max) = (sums.flat::<i64>()?, max.flat::<f64>()?);
    let total = |i: usize| {
        let q = (sums[2 * i + 1] as i128) << 64 | sums[2 * i] as u64 as i128;
        fixed::value(q, fixed::scale(max[i / (k * d)], n))
    };
    tensor((0..b * k * d).into_par_iter().with_min_len(1024).map(total).collect::<Vec<_>>(), (b, k, d))
}

/// A centroid tensor whose rows are computed by `f(batch, cluster, out)`; where it returns false, and in problems that are
/// done, the old centroid stays.
fn centroids<T: Element>(
    old: &Rows,
    done: &Tensor,
    f: impl Fn(usize, usize, &mut [T]) -> bool + Sync,
) -> Result<Tensor> {
    let (olds, done) = (lock(&old.tensor), lock(done));
    let (olds, done) = (olds.view::<T>(old)?, done.flat::<u8>()?);
    let (b, k, d) = (old.b, old.n, old.d);
    let mut out = vec![T::narrow(0.0); b * k * d];
    out.par_chunks_mut(d).enumerate().for_each(|(i, out)| {
        let (b, j) = (i / k, i % k);
        if done[b] != 0 || !f(b, j, out) {
            out.copy_from_slice(olds.row(b, j));
        }
    });
    tensor(out, (b, k, d))
}

pub(crate) fn means(totals: &Tensor, weight: &Tensor, old: &Rows, done: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(old.dtype(), T => {
        let (totals, weight) = (lock(totals), lock(weight));
        let (totals, weight) = (totals.flat::<f64>()?, weight.flat::<f64>()?);
        let (k, d) = (old.n, old.d);
        centroids::<T>(old, done, |b, j, out| {
            let total = &totals[(b * k + j) * d..][..d];
            let divisor = match (weight[b * k + j], metric) {
                (w, Metric::Cosine) if w > 0.0 => total.iter().fold(0.0, |s, t| s + t * t).sqrt(),
                (w, _) => w,
            };
            out.iter_mut().zip(total).for_each(|(o, t)| *o = T::narrow(t / divisor));
            divisor > 0.0
        })
    })
}

pub(crate) fn medians(
    x: &Rows,
    weights: Option<(&Tensor, &Tensor)>,
    order: &Tensor,
    offsets: &Tensor,
    old: &Rows,
    done: &Tensor,
) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (xs, order, offs) = (lock(&x.tensor), lock(order), lock(offsets));
        let (xs, order, offs) = (xs.view::<T>(x)?, order.flat::<u32>()?, offs.flat::<u32>()?);
        let weights = weights.map(|(w, max)| (lock(w), lock(max)));
        let weights = weights.as_ref().map(|(w, max)| Ok::<_, crate::Error>((w.flat::<f64>()?, max.flat::<f64>()?)));
        let weights = weights.transpose()?;
        let (n, k) = (x.n, old.n);
        centroids::<T>(old, done, |b, j, out| {
            let members = &order[b * n..][offs[b * (k + 1) + j] as usize..offs[b * (k + 1) + j + 1] as usize];
            let weight = |i: u32| weights.map_or(1, |(w, max)| fixed::quantise(w[b * n + i as usize], fixed::scale(max[b], n)));
            let total: i128 = members.iter().map(|&i| weight(i)).sum();
            let mut column: Vec<(f64, i128)> = Vec::with_capacity(members.len());
            for (c, o) in out.iter_mut().enumerate() {
                column.clear();
                column.extend(members.iter().map(|&i| (xs.row(b, i as usize)[c].wide(), weight(i))));
                *o = T::narrow(median(&mut column, total, weights.is_none()));
            }
            total > 0
        })
    })
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

pub(crate) fn shift(new: &Rows, old: &Rows) -> Result<Tensor> {
    typed!(new.dtype(), T => {
        let (ns, os) = (lock(&new.tensor), lock(&old.tensor));
        let (ns, os) = (ns.view::<T>(new)?, os.view::<T>(old)?);
        let moved = |b: usize, j: usize| {
            let pairs = ns.row(b, j).iter().zip(os.row(b, j)).map(|(n, o)| (n.wide(), o.wide()));
            let d = Metric::SquaredEuclidean.distance(pairs);
            if d.is_nan() { f64::INFINITY } else { d }
        };
        let problem = |b| (0..new.n).into_par_iter().with_min_len(64).map(|j| moved(b, j)).reduce(|| 0.0, f64::max);
        tensor((0..new.b).into_par_iter().map(problem).collect::<Vec<_>>(), new.b)
    })
}

pub(crate) fn converged(
    done: &Tensor,
    old: &Tensor,
    new: &Tensor,
    shift: &Tensor,
    threshold: &Tensor,
) -> Result<Tensor> {
    let (b, n) = old.dims2()?;
    let (done, old, new, shift, threshold) = (lock(done), lock(old), lock(new), lock(shift), lock(threshold));
    let (done, old, new) = (done.flat::<u8>()?, old.flat::<u32>()?, new.flat::<u32>()?);
    let (shift, threshold) = (shift.flat::<f64>()?, threshold.flat::<f64>()?);
    let stops = |b: usize| {
        let rows = b * n..(b + 1) * n;
        (done[b] != 0 || shift[b] <= threshold[b] || old[rows.clone()] == new[rows]) as u8
    };
    tensor((0..b).into_par_iter().map(stops).collect::<Vec<_>>(), b)
}
