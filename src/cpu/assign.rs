//! Labels, distances, and the per-row passes around them.

use super::{
    filter::{magnitude, Candidates, Centroids, Scalar},
    lock, typed, write, Element, View,
};
use crate::{
    ops::{Memory, Turn},
    problem::Rows,
    rng::{race_key, Draw},
    tiles::{CPU_CENTROIDS, CPU_ROWS},
    Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use pulp::NullaryFnOnce;
use rayon::prelude::*;
use std::ops::Range;

/// A contiguous result on the CPU.
pub(super) fn tensor<T: candle_core::WithDType>(data: Vec<T>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// `f(batch, row)` for every row, in parallel.
fn per_row<R: candle_core::WithDType>(b: usize, n: usize, f: impl Fn(usize, usize) -> R + Sync) -> Result<Tensor> {
    tensor((0..b * n).into_par_iter().with_min_len(256).map(|i| f(i / n, i % n)).collect(), (b, n))
}

/// The definition, in f64.
#[inline(always)]
fn distance<T: Element>(x: &[T], c: &[T], metric: Metric) -> f64 {
    metric.distance(x.iter().zip(c).map(|(x, c)| (x.wide(), c.wide())))
}

/// The lowest index of the smallest distance by the definition. A NaN is as far as can be.
fn nearest<T: Element>(
    x: &[T],
    c: &View<'_, T>,
    batch: usize,
    metric: Metric,
    among: impl Iterator<Item = u32>,
) -> u32 {
    let mut best = (f64::INFINITY, u32::MAX);
    for j in among {
        let d = distance(x, c.row(batch, j as usize), metric);
        if d < best.0 || best.1 == u32::MAX {
            best = (if d.is_nan() { f64::INFINITY } else { d }, j);
        }
    }
    best.1
}

/// The rows themselves: the CPU reads them anywhere.
pub(crate) fn readable(x: Rows, _: usize, _: Metric) -> Result<Rows> {
    Ok(x)
}

pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    let labels = Tensor::zeros((x.b, x.n), DType::U32, &Device::Cpu)?;
    relabel(x, c, metric, None, &labels, &Memory::default())?;
    Ok(labels)
}

pub(crate) fn relabel(
    x: &Rows,
    c: &Rows,
    metric: Metric,
    turn: Option<Turn<'_>>,
    labels: &Tensor,
    _: &Memory,
) -> Result<()> {
    typed!(x.dtype(), T => {
        let (xs, cs) = (lock(&x.tensor), lock(&c.tensor));
        let (xs, cs) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
        let over = finished(turn)?;
        if x.b > 0 && x.n > 0 {
            write(labels, |labels| label_all(&xs, &cs, metric, &over, labels))?;
        }
        Ok(())
    })
}

/// Whether each problem has converged before this turn; empty outside a fit.
pub(super) fn finished(turn: Option<Turn<'_>>) -> Result<Vec<bool>> {
    let Some(Turn { progress, iteration }) = turn else { return Ok(vec![]) };
    Ok(lock(&progress.stop).flat::<u32>()?.iter().map(|&stop| (stop as usize) < iteration).collect())
}

/// What one thread reuses from tile to tile.
struct Scratch<S> {
    rows: Vec<S>,
    scores: Vec<S>,
    candidates: Vec<Candidates<S>>,
}

fn label_all<T: Element>(x: &View<'_, T>, c: &View<'_, T>, metric: Metric, over: &[bool], labels: &mut [u32]) {
    let over = |b: usize| over.get(b).is_some_and(|&over| over);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let prepared = |b| (problems == 1 || !over(b)).then(|| Centroids::new(c, b, metric));
    let centroids: Vec<_> = (0..problems).into_par_iter().map(prepared).collect();
    let (n, d, k) = (x.rows.n, x.rows.d, c.rows.n);
    let tile = |b: usize, part: usize, out: &mut [u32], s: &mut Scratch<T::Filter>| {
        if let Some(centroids) = &centroids[b.min(problems - 1)] {
            label_tile(x, c, b, part * CPU_ROWS, centroids, metric, s, out)
        }
    };
    let scratch = || Scratch {
        rows: vec![Scalar::of(0.0); CPU_ROWS.min(n) * d],
        scores: vec![Scalar::of(0.0); CPU_ROWS.min(n) * CPU_CENTROIDS.min(k)],
        candidates: vec![Candidates::new(); CPU_ROWS.min(n)],
    };
    let tiles = labels.chunks_mut(n).enumerate().filter(|&(b, _)| !over(b));
    let tiles: Vec<_> =
        tiles.flat_map(|(b, l)| l.chunks_mut(CPU_ROWS).enumerate().map(move |(p, o)| (b, p, o))).collect();
    tiles.into_par_iter().for_each_init(scratch, |s, (b, part, out)| tile(b, part, out, s));
}

/// FlashAssign on one tile of rows: score a block of centroids, keep the few that could win, settle ties in f64.
#[allow(clippy::too_many_arguments)]
fn label_tile<T: Element>(
    x: &View<'_, T>,
    c: &View<'_, T>,
    b: usize,
    first: usize,
    centroids: &Centroids<T::Filter>,
    metric: Metric,
    s: &mut Scratch<T::Filter>,
    out: &mut [u32],
) {
    let (m, d, k) = (out.len(), x.rows.d, c.rows.n);
    let simd = pulp::Arch::new();
    let (rows, candidates) = (&mut s.rows[..m * d], &mut s.candidates[..m]);
    simd.dispatch(Pack { x, b, first, centroids, rows: &mut *rows, candidates: &mut *candidates });
    for from in (0..k).step_by(CPU_CENTROIDS) {
        let width = CPU_CENTROIDS.min(k - from);
        let scores = &mut s.scores[..m * width];
        if metric != Metric::Manhattan {
            multiply(rows, &centroids.values[from * d..(from + width) * d], d, scores);
        }
        simd.dispatch(Offer { rows, centroids, from, width, metric, scores, candidates: &mut *candidates });
    }
    for (i, (label, candidates)) in out.iter_mut().zip(candidates).enumerate() {
        let row = x.row(b, first + i);
        *label = if candidates.slack.usable() {
            let mut left = candidates.finish();
            if left.len() == 1 {
                left.next().expect("one candidate")
            } else {
                nearest(row, c, b, metric, left)
            }
        } else {
            nearest(row, c, b, metric, 0..k as u32)
        };
    }
}

/// Packs a tile of rows. A struct because `pulp` compiles what a `call` inlines, and only that, for the widest vectors of
/// the machine; a closure is not always inlined.
struct Pack<'a, T: Element> {
    x: &'a View<'a, T>,
    b: usize,
    first: usize,
    centroids: &'a Centroids<T::Filter>,
    rows: &'a mut [T::Filter],
    candidates: &'a mut [Candidates<T::Filter>],
}

impl<T: Element> NullaryFnOnce for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (i, (packed, candidates)) in self.rows.chunks_exact_mut(self.x.rows.d).zip(self.candidates).enumerate() {
            candidates.reset(self.centroids.pack(self.x.row(self.b, self.first + i), packed));
        }
    }
}

/// Turns the products of a tile (for Manhattan, nothing yet) into scores and offers them.
struct Offer<'a, S> {
    rows: &'a [S],
    centroids: &'a Centroids<S>,
    from: usize,
    width: usize,
    metric: Metric,
    scores: &'a mut [S],
    candidates: &'a mut [Candidates<S>],
}

impl<S: Scalar> NullaryFnOnce for Offer<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { rows, centroids, from, width, metric, scores, candidates } = self;
        let d = rows.len() / candidates.len();
        for (i, (scores, candidates)) in scores.chunks_exact_mut(width).zip(candidates).enumerate() {
            if !candidates.slack.usable() {
                continue;
            }
            if metric == Metric::Manhattan {
                centroids.manhattan(&rows[i * d..][..d], from, scores);
            } else {
                let bias = &centroids.bias[from..from + width];
                scores.iter_mut().zip(bias).for_each(|(s, &b)| *s = b.sub(*s));
            }
            candidates.offer(scores, from);
        }
    }
}

/// `out = rows * values^T`, row-major, on this thread alone: the rows of a tile already run in parallel.
fn multiply<S: Scalar>(rows: &[S], values: &[S], d: usize, out: &mut [S]) {
    let (m, width) = (rows.len() / d, values.len() / d);
    assert_eq!(out.len(), m * width);
    // SAFETY: the three slices hold m x d, width x d and m x width elements with the strides given, and `out` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            width,
            d,
            out.as_mut_ptr(),
            1,
            width as isize,
            false,
            rows.as_ptr(),
            1,
            d as isize,
            values.as_ptr(),
            d as isize,
            1,
            S::of(0.0),
            S::of(1.0),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (xs, cs, ls) = (lock(&x.tensor), lock(&c.tensor), lock(labels));
        let (xs, cs, ls) = (xs.view::<T>(x)?, cs.view::<T>(c)?, ls.flat::<u32>()?);
        per_row(x.b, x.n, |b, i| distance(xs.row(b, i), cs.row(b, ls[b * x.n + i] as usize), metric))
    })
}

pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (xs, cs) = (lock(&x.tensor), lock(&c.tensor));
        let (xs, cs) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
        let (n, k) = (x.n, c.n);
        let pair = |i: usize| {
            let (b, j) = (i / (n * k), i % k);
            <T as Element>::Filter::of(distance(xs.row(b, i / k % n), cs.row(b, j), metric))
        };
        tensor((0..x.b * n * k).into_par_iter().with_min_len(1024).map(pair).collect::<Vec<_>>(), (x.b, n, k))
    })
}

pub(crate) fn gather(x: &Rows, index: &Tensor) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (b, m) = index.dims2()?;
        let (xs, at) = (lock(&x.tensor), lock(index));
        let (xs, at) = (xs.view::<T>(x)?, at.flat::<u32>()?);
        let mut out = vec![T::narrow(0.0); b * m * x.d];
        out.par_chunks_mut(x.d).with_min_len(64).enumerate().for_each(|(i, o)| {
            o.copy_from_slice(xs.row(i / m, at[i] as usize));
        });
        tensor(out, (b, m, x.d))
    })
}

/// Whether a row can be a seed; see [`ops::usable_seeds`](crate::ops::usable_seeds).
fn can_be_seed<T: Element>(row: &[T], weight: f64, metric: Metric) -> bool {
    let square = row.iter().fold(0.0, |s, v| s + v.wide() * v.wide());
    let directed = metric != Metric::Cosine || square > 0.0 && square < f64::INFINITY;
    weight > 0.0 && directed && row.iter().all(|v| v.wide().is_finite())
}

pub(crate) fn usable_seeds(x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
    let mut rows = chosen.to_vec2::<u32>()?;
    let weights = weights.map(lock);
    let weights = weights.as_ref().map(|w| w.flat::<f64>()).transpose()?;
    typed!(x.dtype(), T => {
        let xs = lock(&x.tensor);
        let xs = xs.view::<T>(x)?;
        rows.par_iter_mut().enumerate().for_each(|(b, rows)| {
            let usable = |i: usize| can_be_seed(xs.row(b, i), weights.map_or(1.0, |w| w[b * x.n + i]), metric);
            for seed in 0..rows.len() {
                let from = rows[seed] as usize;
                let mut others = (from..x.n).chain(0..from);
                let usable = others.find(|&i| usable(i) && (i == from || !rows.contains(&(i as u32))));
                rows[seed] = usable.unwrap_or(from) as u32;
            }
        });
        tensor(rows.concat(), chosen.dims2()?)
    })
}

pub(crate) fn scan(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let xs = lock(&x.tensor);
        let xs = xs.view::<T>(x)?;
        let worse = |a: (f64, u32), b: (f64, u32)| (a.0.max(b.0), a.1.min(b.1));
        let part = |b, part: usize| {
            pulp::Arch::new().dispatch(Scan { x: &xs, b, rows: part * CPU_ROWS..x.n.min((part + 1) * CPU_ROWS) })
        };
        let problem = |b| {
            let parts = (0..x.n.div_ceil(CPU_ROWS)).into_par_iter();
            parts.map(|p| part(b, p)).reduce(|| (0.0, u32::MAX), worse)
        };
        let (largest, first): (Vec<_>, Vec<_>) = (0..x.b).into_par_iter().map(problem).unzip();
        Ok((tensor(largest, x.b)?, tensor(first, x.b)?))
    })
}

/// The largest finite magnitude of some rows and the first that is not finite.
struct Scan<'a, T> {
    x: &'a View<'a, T>,
    b: usize,
    rows: Range<usize>,
}

impl<T: Element> NullaryFnOnce for Scan<'_, T> {
    type Output = (f64, u32);

    #[inline(always)]
    fn call(self) -> (f64, u32) {
        let mut row = vec![Scalar::of(0.0); self.x.rows.d];
        let mut seen = (0.0, u32::MAX);
        for i in self.rows {
            T::filter_row(self.x.row(self.b, i), &mut row);
            let (largest, finite) = magnitude(&row);
            seen = (largest.widen().max(seen.0), if finite { seen.1 } else { seen.1.min(i as u32) });
        }
        seen
    }
}

pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let xs = lock(&x.tensor);
        let xs = xs.view::<T>(x)?;
        per_row(x.b, x.n, |b, i| xs.row(b, i).iter().fold(0.0, |s, v| s + v.wide() * v.wide()).sqrt())
    })
}

/// The distance of row `i` to the nearest seed, with one more seed: see [`ops::nearer`](crate::ops::nearer).
fn nearer_by<T: Element>(x: &View<'_, T>, b: usize, i: usize, nearest: f64, seed: u32, metric: Metric) -> f64 {
    let metric = if metric == Metric::Dot { Metric::SquaredEuclidean } else { metric };
    if seed as usize == i {
        -1.0
    } else if nearest < 0.0 || seed == u32::MAX {
        nearest
    } else {
        let d = distance(x.row(b, i), x.row(b, seed as usize), metric);
        nearest.min(if d > 0.0 { d } else { 0.0 })
    }
}

pub(crate) fn nearer(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (xs, near, new) = (lock(&x.tensor), lock(nearest), lock(newest));
        let (xs, near, new) = (xs.view::<T>(x)?, near.flat::<f64>()?, new.flat::<u32>()?);
        per_row(x.b, x.n, |b, i| nearer_by(&xs, b, i, near[b * x.n + i], new[b], metric))
    })
}

pub(crate) fn race(nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
    let (b, n) = nearest.dims2()?;
    let (near, weights) = (lock(nearest), weights.map(lock));
    let near = near.flat::<f64>()?;
    let weights = weights.as_ref().map(|w| w.flat::<f64>()).transpose()?;
    per_row(b, n, |b, i| race_key(draw, b, i, near[b * n + i], weights.map_or(1.0, |w| w[b * n + i])))
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn pick(
    x: &Rows,
    nearest: &Tensor,
    weights: Option<&Tensor>,
    chosen: &Tensor,
    pick: usize,
    start: bool,
    metric: Metric,
    draw: Draw,
    _: &Memory,
) -> Result<()> {
    let before = if pick > 0 { chosen.narrow(1, pick - 1, 1)?.flatten_all()?.to_vec1::<u32>()? } else { vec![] };
    let weights = weights.map(lock);
    let weights = weights.as_ref().map(|w| w.flat::<f64>()).transpose()?;
    let n = x.n;
    let picked = typed!(x.dtype(), T => {
        let xs = lock(&x.tensor);
        let xs = xs.view::<T>(x)?;
        let key = |b: usize, i: usize, nearest: &mut f64| {
            let now = match (start, pick) {
                (true, 0) => 1.0,
                (false, 0) => *nearest,
                (_, pick) => {
                    let old = if start && pick == 1 { f64::INFINITY } else { *nearest };
                    *nearest = nearer_by(&xs, b, i, old, before[b], metric);
                    *nearest
                }
            };
            (race_key(draw, b, i, now, weights.map_or(1.0, |w| w[b * n + i])), i)
        };
        let lowest = |(b, nearest): (usize, &mut [f64])| {
            let keys = nearest.par_iter_mut().enumerate().with_min_len(256).map(|(i, nearest)| key(b, i, nearest));
            keys.min_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1))).map_or(0, |(_, i)| i as u32)
        };
        write(nearest, |nearest: &mut [f64]| nearest.par_chunks_mut(n).enumerate().map(lowest).collect::<Vec<_>>())
    })?;
    chosen.slice_set(&tensor(picked, (x.b, 1))?, 1, pick)?;
    Ok(())
}
