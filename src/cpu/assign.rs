//! Exact labels: fast scores, their bound, and a recheck by the definition.

use super::{
    candidates::{Candidates, Found, NONE},
    filter::{Block, Centroids},
    rows::distance,
    scalar::Scalar,
    tensors::{converged, read_and_write, typed, Element, View},
};
use crate::{
    error::Result,
    host, launches,
    metric::Metric,
    operand::Target,
    plan::assign::Assign,
    request::Assignment,
    tiles::{CPU_CENTROIDS, CPU_ROWS},
};
use pulp::NullaryFnOnce;
use std::{
    cell::Cell,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

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

pub(crate) fn assign_into(a: Assignment<'_>, labels: Target<'_>) -> Result<()> {
    let Assignment { plan, x, c, metric, turn } = a;
    typed!(x.dtype(), T => {
        let converged = converged(turn)?;
        if x.b == 0 || x.n == 0 {
            return Ok(());
        }
        read_and_write([&x.operand, &c.operand], labels, |[xs, cs], labels| {
            launches::record(plan.kernel.name(), x.dtype().as_str());
            label_all(&xs.view::<T>(x)?, &cs.view::<T>(c)?, plan.kernel, metric, &converged, labels)
        })?
    })
}

thread_local!(static COMPARED: Cell<u64> = const { Cell::new(0) });

/// The number of centroids that have been compared with a row by the definition in assignments that this thread has asked for.
pub(crate) fn compared() -> u64 {
    COMPARED.get()
}

/// One thread reuses this from tile to tile.
struct Scratch<S> {
    rows: Vec<S>,
    scores: Vec<S>,
    candidates: Vec<Candidates<S>>,
}

fn label_all<T: Element>(
    x: &View<'_, T>,
    c: &View<'_, T>,
    kernel: Assign,
    metric: Metric,
    converged: &[bool],
    labels: &mut [u32],
) -> Result<()> {
    let skipped = |b: usize| converged.get(b).is_some_and(|&c| c);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let prepared = |b| (problems == 1 || !skipped(b)).then(|| Centroids::new(c, b, metric)).transpose();
    let (n, d, k) = (x.rows.n, x.rows.d, c.rows.n);
    let centroids = host::map("assign", problems, 8 * k * d, prepared)?;
    let centroids = centroids.into_iter().collect::<Result<Vec<_>>>()?;
    let compared = AtomicU64::new(0);
    let tile = |s: &mut Scratch<T::Filter>, (b, part, labels): (usize, usize, &mut [u32])| {
        if let Some(centroids) = &centroids[b.min(problems - 1)] {
            let tile = Tile { x, c, b, first: part * CPU_ROWS, centroids, kernel, metric };
            compared.fetch_add(tile.label(s, labels), Relaxed);
        }
        Ok(())
    };
    let scratch = || Scratch {
        rows: vec![Scalar::of(0.0); CPU_ROWS.min(n) * d],
        scores: vec![Scalar::of(0.0); CPU_ROWS.min(n) * CPU_CENTROIDS.min(k)],
        candidates: vec![Candidates::new(); CPU_ROWS.min(n)],
    };
    let tiles = labels.chunks_mut(n).enumerate().filter(|&(b, _)| !skipped(b));
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
    kernel: Assign,
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
            if self.kernel == Assign::CpuGemm {
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
            if tile.kernel == Assign::CpuManhattan {
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
pub(super) fn multiply<S: Scalar>(rows: &[S], values: &[S], d: usize, out: &mut [S]) {
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
