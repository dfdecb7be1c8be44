//! Labels, distances, and the per-row passes around them.

use super::{
    filter::{magnitude, Block, Candidates, Centroids, Found, Scalar, NONE},
    lock, read_and_write, typed, Element, View,
};
use crate::{
    error::Result,
    host,
    memory::Memory,
    metric::Metric,
    request::Turn,
    rng::{race_key, Draw},
    rows::Rows,
    tiles::{CPU_CENTROIDS, CPU_ROWS},
};
use candle_core::{Device, Tensor};
use pulp::NullaryFnOnce;
use std::{
    cell::Cell,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// A contiguous result on the CPU.
pub(super) fn tensor<T: candle_core::WithDType>(data: Vec<T>, shape: impl Into<candle_core::Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// `f(batch, row)` for every row, each about so many steps.
fn per_row<R: candle_core::WithDType>(
    op: &'static str,
    [b, n]: [usize; 2],
    steps: usize,
    f: impl Fn(usize, usize) -> R + Send + Sync,
) -> Result<Tensor> {
    tensor(host::map(op, b * n, steps, |i| f(i / n, i % n))?, (b, n))
}

/// The definition, in f64.
#[inline(always)]
fn distance<T: Element>(x: &[T], c: &[T], metric: Metric) -> f64 {
    metric.distance(x.iter().zip(c).map(|(x, c)| (x.wide(), c.wide())))
}

/// The smallest distance by the definition, of what was found before and of centroids, and the lowest index that has it. A
/// NaN is as far as can be.
fn nearest<T: Element>(
    x: &[T],
    c: &View<'_, T>,
    batch: usize,
    metric: Metric,
    before: Found,
    among: impl Iterator<Item = u32>,
) -> Found {
    among.fold(before, |best, j| {
        let d = distance(x, c.row(batch, j as usize), metric);
        let found = (if d.is_nan() { f64::INFINITY } else { d }, j);
        if found.0 < best.0 || found.0 == best.0 && j < best.1 {
            found
        } else {
            best
        }
    })
}

/// The rows themselves: the CPU reads them anywhere.
pub(crate) fn readable(x: &Tensor, _: usize, _: Metric, _: &mut Option<Tensor>) -> Result<Rows> {
    Rows::new(x)
}

pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    let labels = tensor(host::filled("assign", x.b * x.n, 0u32)?, (x.b, x.n))?;
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
        let over = finished(turn)?;
        if x.b == 0 || x.n == 0 {
            return Ok(());
        }
        read_and_write([&x.tensor, &c.tensor], labels, |[xs, cs], labels| {
            label_all(&xs.view::<T>(x)?, &cs.view::<T>(c)?, metric, &over, labels)
        })?
    })
}

/// Whether each problem has converged before this turn; empty outside a fit.
pub(super) fn finished(turn: Option<Turn<'_>>) -> Result<Vec<bool>> {
    let Some(Turn { progress, iteration }) = turn else { return Ok(vec![]) };
    let [stop] = lock([&progress.stop]);
    Ok(stop.flat::<u32>()?.iter().map(|&stop| (stop as usize) < iteration).collect())
}

thread_local!(static COMPARED: Cell<u64> = const { Cell::new(0) });

/// How many centroids have been compared with a row by the definition in assignments that this thread has asked for.
pub(crate) fn compared() -> u64 {
    COMPARED.get()
}

/// What one thread reuses from tile to tile.
struct Scratch<S> {
    rows: Vec<S>,
    scores: Vec<S>,
    candidates: Vec<Candidates<S>>,
}

fn label_all<T: Element>(
    x: &View<'_, T>,
    c: &View<'_, T>,
    metric: Metric,
    over: &[bool],
    labels: &mut [u32],
) -> Result<()> {
    let over = |b: usize| over.get(b).is_some_and(|&over| over);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let prepared = |b| (problems == 1 || !over(b)).then(|| Centroids::new(c, b, metric)).transpose();
    let (n, d, k) = (x.rows.n, x.rows.d, c.rows.n);
    let centroids = host::map("assign", problems, 8 * k * d, prepared)?;
    let centroids = centroids.into_iter().collect::<Result<Vec<_>>>()?;
    let compared = AtomicU64::new(0);
    let tile = |s: &mut Scratch<T::Filter>, (b, part, labels): (usize, usize, &mut [u32])| {
        if let Some(centroids) = &centroids[b.min(problems - 1)] {
            let tile = Tile { x, c, b, first: part * CPU_ROWS, centroids, metric };
            compared.fetch_add(tile.label(s, labels), Relaxed);
        }
        Ok(())
    };
    let scratch = || Scratch {
        rows: vec![Scalar::of(0.0); CPU_ROWS.min(n) * d],
        scores: vec![Scalar::of(0.0); CPU_ROWS.min(n) * CPU_CENTROIDS.min(k)],
        candidates: vec![Candidates::new(); CPU_ROWS.min(n)],
    };
    let tiles = labels.chunks_mut(n).enumerate().filter(|&(b, _)| !over(b));
    let tiles = tiles.flat_map(|(b, l)| l.chunks_mut(CPU_ROWS).enumerate().map(move |(p, o)| (b, p, o))).collect();
    // A multiplication in a product of matrices is a small part of a step.
    host::for_each(tiles, CPU_ROWS.min(n) * d * (4 + k / 16), scratch, tile)?;
    COMPARED.set(COMPARED.get() + compared.into_inner());
    Ok(())
}

/// Rows of problem `b` from `first` on, and the centroids that they are assigned to.
struct Tile<'a, T: Element> {
    x: &'a View<'a, T>,
    c: &'a View<'a, T>,
    b: usize,
    first: usize,
    centroids: &'a Centroids<T::Filter>,
    metric: Metric,
}

impl<T: Element> Tile<'_, T> {
    /// FlashAssign: score a block of centroids, keep the few that could win, settle ties in f64. Returns how many centroids
    /// were compared by the definition.
    fn label(&self, s: &mut Scratch<T::Filter>, out: &mut [u32]) -> u64 {
        let (m, d, centroids) = (out.len(), self.x.rows.d, self.centroids);
        let (simd, mut compared) = (pulp::Arch::new(), 0);
        let (rows, candidates) = (&mut s.rows[..m * d], &mut s.candidates[..m]);
        simd.dispatch(Pack { tile: self, rows: &mut *rows, candidates: &mut *candidates });
        for block in &centroids.blocks {
            let Range { start, end } = block.scored;
            let scores = &mut s.scores[..m * (end - start)];
            if self.metric != Metric::Manhattan {
                multiply(rows, &centroids.values[start * d..end * d], d, scores);
            }
            let (candidates, compared) = (&mut *candidates, &mut compared);
            simd.dispatch(Offer { tile: self, rows, block, scores, candidates, compared });
        }
        for (i, (label, candidates)) in out.iter_mut().zip(candidates).enumerate() {
            *label = self.settle(i, candidates, &mut compared);
        }
        compared
    }

    /// The label of row `i` of the tile.
    fn settle(&self, i: usize, candidates: &mut Candidates<T::Filter>, compared: &mut u64) -> u32 {
        let (centroids, slack) = (self.centroids, candidates.slack);
        if !slack.usable() {
            return self.unproven(i, compared);
        }
        let apart = if centroids.apart_may_win(slack, candidates.cutoff()) { centroids.apart() } else { &[] };
        let (before, left) = (candidates.compared, candidates.finish());
        if let (&[(_, only)], true, []) = (left, before == NONE, apart) {
            return centroids.index(only);
        }
        *compared += (left.len() + apart.len()) as u64;
        let left = left.iter().map(|&(_, scored)| centroids.index(scored));
        label_of(self.nearest(i, before, left.chain(apart.iter().copied())))
    }

    /// The label of row `i` of the tile, of whose scores nothing is known.
    #[cold]
    fn unproven(&self, i: usize, compared: &mut u64) -> u32 {
        let (row, products) = (self.x.row(self.b, self.first + i), matches!(self.metric, Metric::Dot | Metric::Cosine));
        let infinite = || row.iter().zip(0..).filter(|(v, _)| v.wide().is_infinite());
        if row.iter().any(|v| v.wide().is_nan()) || self.metric != Metric::Dot && infinite().next().is_some() {
            // Every distance is infinite or NaN: differences, and quotients of infinite numbers.
            0
        } else if infinite().next().is_some() {
            // Every product is infinite or NaN, and of those that are largest the first wins. Where it is largest, it is so by
            // the columns where the row is infinite.
            let part = |c: &[T]| infinite().fold(0.0, |s, (v, col): (_, usize)| s + v.wide() * c[col].wide());
            let largest = |&j: &usize| {
                let c = self.c.row(self.b, j);
                part(c) == f64::INFINITY && distance(row, c, self.metric) == f64::NEG_INFINITY
            };
            (0..self.c.rows.n).find(largest).unwrap_or(0) as u32
        } else if products && row.iter().all(|v| v.wide() == 0.0) {
            // All that are scored are as near as each other.
            let first = self.centroids.first().into_iter();
            *compared += self.centroids.apart().len() as u64 + 1;
            label_of(self.nearest(i, NONE, first.chain(self.centroids.apart().iter().copied())))
        } else {
            *compared += self.centroids.all().count() as u64;
            label_of(self.nearest(i, NONE, self.centroids.all()))
        }
    }

    fn nearest(&self, i: usize, before: Found, among: impl Iterator<Item = u32>) -> Found {
        nearest(self.x.row(self.b, self.first + i), self.c, self.b, self.metric, before, among)
    }
}

/// If no centroid is nearer than infinitely far away, all are as near as each other, those that were left out too.
fn label_of((distance, index): Found) -> u32 {
    if distance == f64::INFINITY {
        0
    } else {
        index
    }
}

/// Packs a tile of rows. A struct because `pulp` compiles what a `call` inlines, and only that, for the widest vectors of
/// the machine; a closure is not always inlined.
struct Pack<'a, T: Element> {
    tile: &'a Tile<'a, T>,
    rows: &'a mut [T::Filter],
    candidates: &'a mut [Candidates<T::Filter>],
}

impl<T: Element> NullaryFnOnce for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let &Tile { x, b, first, centroids, .. } = self.tile;
        for (i, (packed, candidates)) in self.rows.chunks_exact_mut(x.rows.d).zip(self.candidates).enumerate() {
            candidates.reset(centroids.pack(x.row(b, first + i), packed));
        }
    }
}

/// Turns the products of a tile (for Manhattan, nothing yet) into scores and offers them.
struct Offer<'a, T: Element> {
    tile: &'a Tile<'a, T>,
    rows: &'a [T::Filter],
    block: &'a Block,
    scores: &'a mut [T::Filter],
    candidates: &'a mut [Candidates<T::Filter>],
    compared: &'a mut u64,
}

impl<T: Element> NullaryFnOnce for Offer<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tile, rows, block, scores, candidates, compared } = self;
        let (d, centroids, scored) = (tile.x.rows.d, tile.centroids, block.scored.clone());
        for (i, (scores, candidates)) in scores.chunks_exact_mut(scored.len()).zip(candidates).enumerate() {
            if !candidates.slack.usable() {
                continue;
            }
            if tile.metric == Metric::Manhattan {
                centroids.manhattan(&rows[i * d..][..d], scored.start, scores);
            } else {
                let bias = &centroids.bias[scored.clone()];
                scores.iter_mut().zip(bias).for_each(|(s, &b)| *s = b.sub(*s));
            }
            candidates.offer(scores, block, |before, list| {
                *compared += list.len() as u64;
                tile.nearest(i, before, list.iter().map(|&(_, scored)| centroids.index(scored)))
            });
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
        let [xs, cs, ls] = lock([&x.tensor, &c.tensor, labels]);
        let (xs, cs, ls) = (xs.view::<T>(x)?, cs.view::<T>(c)?, ls.flat::<u32>()?);
        per_row("distances", [x.b, x.n], x.d, |b, i| distance(xs.row(b, i), cs.row(b, ls[b * x.n + i] as usize), metric))
    })
}

pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs, cs] = lock([&x.tensor, &c.tensor]);
        let (xs, cs) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
        let (n, k) = (x.n, c.n);
        let pair = |i: usize| {
            let (b, j) = (i / (n * k), i % k);
            <T as Element>::Filter::of(distance(xs.row(b, i / k % n), cs.row(b, j), metric))
        };
        tensor(host::map("pairwise", x.b * n * k, x.d, pair)?, (x.b, n, k))
    })
}

pub(crate) fn gather(x: &Rows, index: &Tensor) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let (b, m) = index.dims2()?;
        let [xs, at] = lock([&x.tensor, index]);
        let (xs, at) = (xs.view::<T>(x)?, at.flat::<u32>()?);
        let mut out = host::filled("gather", b * m * x.d, T::narrow(0.0))?;
        let rows = host::items_per_task(x.d);
        let parts = out.chunks_mut(rows * x.d).enumerate().collect();
        host::for_each(parts, rows * x.d, || (), |_, (part, out): (usize, &mut [T])| {
            for (i, row) in (part * rows..).zip(out.chunks_mut(x.d)) {
                row.copy_from_slice(xs.row(i / m, at[i] as usize));
            }
            Ok(())
        })?;
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
    typed!(x.dtype(), T => {
        let [xs, ws] = lock([&x.tensor, weights.unwrap_or(&x.tensor)]);
        let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
        let choose = |_: &mut (), (b, rows): (usize, &mut Vec<u32>)| {
            let usable = |i: usize| can_be_seed(xs.row(b, i), weights.map_or(1.0, |w| w[b * x.n + i]), metric);
            for seed in 0..rows.len() {
                let from = rows[seed] as usize;
                let mut others = (from..x.n).chain(0..from);
                let usable = others.find(|&i| usable(i) && (i == from || !rows.contains(&(i as u32))));
                rows[seed] = usable.unwrap_or(from) as u32;
            }
            Ok(())
        };
        let steps = chosen.dim(1)? * (x.d + chosen.dim(1)?);
        host::for_each(rows.iter_mut().enumerate().collect(), steps, || (), choose)?;
        tensor(rows.concat(), chosen.dims2()?)
    })
}

pub(crate) fn scan(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let [xs] = lock([&x.tensor]);
        let xs = xs.view::<T>(x)?;
        let worse = |a: (f64, u32), b: (f64, u32)| (a.0.max(b.0), a.1.min(b.1));
        let part = |b, part: usize| {
            pulp::Arch::new().dispatch(Scan { x: &xs, b, rows: part * CPU_ROWS..x.n.min((part + 1) * CPU_ROWS) })
        };
        let parts = x.n.div_ceil(CPU_ROWS);
        let problem = |b| host::reduce(parts, CPU_ROWS.min(x.n) * x.d / 4, |p| part(b, p), worse);
        let found = host::map("scan", x.b, x.n * x.d / 4, problem)?;
        let found = found.into_iter().map(|found| Ok(found?.unwrap_or((0.0, u32::MAX))));
        let (largest, first) = found.collect::<Result<(Vec<_>, Vec<_>)>>()?;
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
        let [xs] = lock([&x.tensor]);
        let xs = xs.view::<T>(x)?;
        per_row("norms", [x.b, x.n], x.d, |b, i| xs.row(b, i).iter().fold(0.0, |s, v| s + v.wide() * v.wide()).sqrt())
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
        let [xs, near, new] = lock([&x.tensor, nearest, newest]);
        let (xs, near, new) = (xs.view::<T>(x)?, near.flat::<f64>()?, new.flat::<u32>()?);
        per_row("k-means||", [x.b, x.n], x.d, |b, i| nearer_by(&xs, b, i, near[b * x.n + i], new[b], metric))
    })
}

pub(crate) fn race(nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
    let (b, n) = nearest.dims2()?;
    let [near, each] = lock([nearest, weights.unwrap_or(nearest)]);
    let (near, weights) = (near.flat::<f64>()?, weights.map(|_| each.flat::<f64>()).transpose()?);
    per_row("race", [b, n], RACE_STEPS, |b, i| {
        race_key(draw, b, i, near[b * n + i], weights.map_or(1.0, |w| w[b * n + i]))
    })
}

/// Steps that a race's key takes.
const RACE_STEPS: usize = 32;

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
    let n = x.n;
    let picked = typed!(x.dtype(), T => {
        read_and_write([&x.tensor, weights.unwrap_or(&x.tensor)], nearest, |[xs, each], nearest: &mut [f64]| {
            let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| each.flat::<f64>()).transpose()?);
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
                (race_key(draw, b, i, now, weights.map_or(1.0, |w| w[b * n + i])), i as u32)
            };
            let earlier = |x: &(f64, u32), y: &(f64, u32)| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1));
            // Each task has its rows, and leaves the first of them to arrive.
            let rows = host::items_per_task(x.d + RACE_STEPS).min(n);
            let mut first = vec![(0.0, 0); x.b * n.div_ceil(rows)];
            let parts = nearest.chunks_mut(n).flat_map(|nearest| nearest.chunks_mut(rows)).zip(&mut first);
            let parts = parts.enumerate().map(|(p, (nearest, first))| (p / n.div_ceil(rows), p % n.div_ceil(rows), nearest, first));
            host::for_each(parts.collect(), rows * (x.d + RACE_STEPS), || (), |_, (b, part, nearest, first)| {
                let keys = nearest.iter_mut().zip(part * rows..).map(|(nearest, i)| key(b, i, nearest));
                *first = keys.min_by(earlier).expect("no part is empty");
                Ok(())
            })?;
            let parts = first.chunks(n.div_ceil(rows));
            Ok(parts.map(|parts| parts.iter().copied().min_by(earlier).map_or(0, |(_, row)| row)).collect::<Vec<_>>())
        })?
    })?;
    chosen.slice_set(&tensor(picked, (x.b, 1))?, 1, pick)?;
    Ok(())
}
