//! Passes over rows: distances, norms, copies, and what is not finite.

use super::{
    scalar::{magnitude, Scalar},
    tensors::{lock, read_and_write, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    operand::{Readable, Target},
    rows::Rows,
    tiles::CPU_ROWS,
};
use candle_core::{Tensor, WithDType};
use pulp::NullaryFnOnce;
use std::ops::Range;

/// `f(batch, row)` for every row, each about so many steps.
pub(super) fn per_row<R: WithDType>(
    op: &'static str,
    [b, n]: [usize; 2],
    steps: usize,
    f: impl Fn(usize, usize) -> R + Send + Sync,
) -> Result<Tensor> {
    tensor(host::map(op, b * n, steps, |i| f(i / n, i % n))?, (b, n))
}

/// The definition, in f64.
#[inline(always)]
pub(super) fn distance<T: Element>(x: &[T], c: &[T], metric: Metric) -> f64 {
    metric.distance(x.iter().zip(c).map(|(x, c)| (x.wide(), c.wide())))
}

/// Rows whose distances are computed at once.
const TOGETHER: usize = 8;

pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs, cs, ls] = lock([&x.operand, &c.operand, labels]);
        let (xs, cs, ls) = (xs.view::<T>(x)?, cs.view::<T>(c)?, ls.flat::<u32>()?);
        let mut out = host::filled("distances", x.b * x.n, 0f64)?;
        let parts = out.chunks_mut(x.n.max(1)).enumerate();
        let parts = parts.flat_map(|(b, out)| out.chunks_mut(CPU_ROWS).enumerate().map(move |(part, out)| (b, part, out)));
        host::for_each(parts.collect(), CPU_ROWS.min(x.n) * x.d, || (), |_, (b, part, out): (usize, usize, &mut [f64])| {
            let pair = |i: usize| (xs.row(b, i), cs.row(b, ls[b * x.n + i] as usize));
            let (first, (eights, others)) = (part * CPU_ROWS, out.as_chunks_mut::<TOGETHER>());
            for (i, out) in (first..).step_by(TOGETHER).zip(&mut *eights) {
                let pairs: [_; TOGETHER] = std::array::from_fn(|r| pair(i + r));
                let column = |col: usize| std::array::from_fn(|r| (pairs[r].0[col].wide(), pairs[r].1[col].wide()));
                *out = metric.distances((0..x.d).map(column));
            }
            for (i, out) in (first + TOGETHER * eights.len()..).zip(others) {
                let (x, c) = pair(i);
                *out = distance(x, c, metric);
            }
            Ok(())
        })?;
        tensor(out, (x.b, x.n))
    })
}

pub(crate) fn gather(x: &Rows, index: &dyn Readable, to: Target<'_>) -> Result<()> {
    let m = index.dims()[1];
    typed!(x.dtype(), T => read_and_write([&x.operand, index], to, |[xs, at], out: &mut [T]| {
        let (xs, at) = (xs.view::<T>(x)?, at.flat::<u32>()?);
        let rows = host::items_per_task(x.d);
        let parts = out.chunks_mut(rows * x.d).enumerate().collect();
        host::for_each(parts, rows * x.d, || (), |_, (part, out): (usize, &mut [T])| {
            for (i, row) in (part * rows..).zip(out.chunks_mut(x.d)) {
                row.copy_from_slice(xs.row(i / m, at[i] as usize));
            }
            Ok(())
        })
    })?)
}

pub(crate) fn max_abs_and_first_nonfinite(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let [xs] = lock([&x.operand]);
        let xs = xs.view::<T>(x)?;
        let worse = |a: (f64, u32), b: (f64, u32)| (a.0.max(b.0), a.1.min(b.1));
        let part = |b, part: usize| {
            let rows = part * CPU_ROWS..x.n.min((part + 1) * CPU_ROWS);
            pulp::Arch::new().dispatch(Scan { x: &xs, b, order: None, places: rows })
        };
        let parts = x.n.div_ceil(CPU_ROWS);
        let problem = |b| host::reduce(parts, CPU_ROWS.min(x.n) * x.d / 4, |p| part(b, p), worse);
        let found = host::map("scan", x.b, x.n * x.d / 4, problem)?;
        let found = found.into_iter().map(|found| Ok(found?.unwrap_or((0.0, u32::MAX))));
        let (max_abs, first) = found.collect::<Result<(Vec<_>, Vec<_>)>>()?;
        Ok((tensor(max_abs, x.b)?, tensor(first, x.b)?))
    })
}

/// The largest finite magnitude of some rows and the first that is not finite.
pub(super) struct Scan<'a, T> {
    pub(super) x: &'a View<'a, T>,
    pub(super) b: usize,
    /// The rows at places; without it they are where they are.
    pub(super) order: Option<&'a [u32]>,
    pub(super) places: Range<usize>,
}

impl<T: Element> NullaryFnOnce for Scan<'_, T> {
    type Output = (f64, u32);

    #[inline(always)]
    fn call(self) -> (f64, u32) {
        let mut row = vec![Scalar::of(0.0); self.x.rows.d];
        let mut seen = (0.0, u32::MAX);
        for place in self.places {
            let i = self.order.map_or(place, |order| order[place] as usize);
            let (max_abs, finite) = match T::as_filter(self.x.row(self.b, i)) {
                Some(row) => magnitude(row),
                None => {
                    T::filter_row(self.x.row(self.b, i), &mut row);
                    magnitude(&row)
                }
            };
            seen = (max_abs.widen().max(seen.0), if finite { seen.1 } else { seen.1.min(i as u32) });
        }
        seen
    }
}

pub(crate) fn min_magnitude(x: &Rows) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs] = lock([&x.operand]);
        let xs = xs.view::<T>(x)?;
        let least = |b: usize, i: usize| {
            let magnitudes = xs.row(b, i).iter().map(|v| v.wide().abs());
            magnitudes.filter(|&v| v > 0.0).fold(f64::INFINITY, f64::min)
        };
        let problem = |b| host::reduce(x.n, x.d, |i| least(b, i), f64::min);
        let found = host::map("min_magnitude", x.b, x.n * x.d, problem)?;
        let found = found.into_iter().map(|found| Ok(found?.unwrap_or(f64::INFINITY)));
        tensor(found.collect::<Result<Vec<_>>>()?, x.b)
    })
}

pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs] = lock([&x.operand]);
        let xs = xs.view::<T>(x)?;
        per_row("norms", [x.b, x.n], x.d, |b, i| xs.row(b, i).iter().fold(0.0, |s, v| s + v.wide() * v.wide()).sqrt())
    })
}
