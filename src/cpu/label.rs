//! Exact labels of a tile of rows: fast scores, their bound, and a recheck by the definition.

use super::{
    bounds::Renewal,
    candidates::{Candidates, Found, NONE},
    filter::{Block, Centroids},
    matmul::multiply,
    rows::distance,
    scalar::{lowest, Scalar},
    tensors::{Element, View},
};
use crate::{
    metric::Metric,
    plan::assign::Assign,
    tiles::{CPU_CENTROIDS, CPU_ROWS},
};
use pulp::{NullaryFnOnce, Simd, WithSimd};
use std::ops::Range;

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

/// One thread reuses this from tile to tile.
pub(super) struct Scratch<S> {
    rows: Vec<S>,
    scores: Vec<S>,
    candidates: Vec<Candidates<S>>,
}

impl<S: Scalar> Scratch<S> {
    /// For problems of `n` rows of `d` columns, and `k` centroids.
    pub(super) fn new([n, d, k]: [usize; 3]) -> Self {
        let rows = CPU_ROWS.min(n);
        Self {
            rows: vec![S::of(0.0); rows * d],
            scores: vec![S::of(0.0); rows * CPU_CENTROIDS.min(k)],
            candidates: vec![Candidates::new(); rows],
        }
    }
}

/// What an assignment reads.
pub(super) struct Views<'a, T: Element> {
    pub x: &'a View<'a, T>,
    pub c: &'a View<'a, T>,
    pub kernel: Assign,
    pub metric: Metric,
    pub converged: &'a [bool],
}

impl<'a, T: Element> Views<'a, T> {
    /// The tile of problem `b` from row `first` on.
    pub fn tile(&self, (b, first): (usize, usize), centroids: &'a Centroids<T::Filter>) -> Tile<'a, T> {
        let &Self { x, c, kernel, metric, .. } = self;
        Tile { x, c, b, first, centroids, kernel, metric }
    }
}

/// Rows of problem `b` from `first` on, and the centroids that they are assigned to.
pub(super) struct Tile<'a, T: Element> {
    pub(super) x: &'a View<'a, T>,
    pub(super) c: &'a View<'a, T>,
    pub(super) b: usize,
    pub(super) first: usize,
    pub(super) centroids: &'a Centroids<T::Filter>,
    pub(super) kernel: Assign,
    pub(super) metric: Metric,
}

impl<T: Element> Tile<'_, T> {
    /// FlashAssign: score a block of centroids, keep the few that could win, settle ties in f64. Returns how many centroids
    /// were compared by the definition.
    pub(super) fn label(&self, s: &mut Scratch<T::Filter>, out: &mut [u32], mut renewal: Option<Renewal<'_>>) -> u64 {
        let (rows, candidates) = (&mut s.rows[..out.len() * self.x.rows.d], &mut s.candidates[..out.len()]);
        self.pack(rows, candidates);
        if let Some(renewal) = &mut renewal {
            renewal.begin(0, candidates.iter().map(|candidates| candidates.slack));
        }
        let mut compared = self.score(rows, candidates, &|i| i, &mut s.scores, renewal.as_mut());
        for (i, (label, candidates)) in out.iter_mut().zip(candidates).enumerate() {
            *label = self.settle(i, candidates, &mut compared);
        }
        if let Some(renewal) = renewal {
            renewal.finish(out, self.centroids);
        }
        compared
    }

    /// The rows of this tile from its row `from` on.
    pub(super) fn part(&self, from: usize) -> Self {
        Self { first: self.first + from, ..*self }
    }

    /// Packs all rows of the tile, and readies a list of candidates for each.
    pub(super) fn pack(&self, rows: &mut [T::Filter], candidates: &mut [Candidates<T::Filter>]) {
        pulp::Arch::new().dispatch(Pack { tile: self, rows, candidates });
    }

    /// Scores packed rows against all centroids, and keeps candidates. The `row` of the tile is told by its place among these. Returns how many
    /// centroids were compared by the definition.
    pub(super) fn score(
        &self,
        rows: &[T::Filter],
        candidates: &mut [Candidates<T::Filter>],
        row: &dyn Fn(usize) -> usize,
        scores: &mut [T::Filter],
        mut renewal: Option<&mut Renewal<'_>>,
    ) -> u64 {
        let (d, centroids, mut compared) = (self.x.rows.d, self.centroids, 0);
        for block in &centroids.blocks {
            let Range { start, end } = block.scored;
            let scores = &mut scores[..candidates.len() * (end - start)];
            if self.kernel != Assign::CpuManhattan {
                multiply(rows, &centroids.values[start * d..end * d], d, scores);
            }
            let (candidates, compared, renewal) = (&mut *candidates, &mut compared, renewal.as_deref_mut());
            pulp::Arch::new().dispatch(Offer { tile: self, rows, row, block, scores, candidates, compared, renewal });
        }
        compared
    }

    /// The label of row `i` of the tile.
    pub(super) fn settle(&self, i: usize, candidates: &mut Candidates<T::Filter>, compared: &mut u64) -> u32 {
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
    pub(super) fn unproven(&self, i: usize, compared: &mut u64) -> u32 {
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

    /// The nearest to row `i` of the tile, of what was found before and of these.
    pub(super) fn nearest(&self, i: usize, before: Found, among: impl Iterator<Item = u32>) -> Found {
        nearest(self.x.row(self.b, self.first + i), self.c, self.b, self.metric, before, among)
    }
}

/// If no centroid is nearer than infinitely far away, all are as near as each other, those that were left out too.
pub(super) fn label_of((distance, index): Found) -> u32 {
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

impl<T: Element> WithSimd for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let &Tile { x, b, first, centroids, .. } = self.tile;
        for (i, (packed, candidates)) in self.rows.chunks_exact_mut(x.rows.d).zip(self.candidates).enumerate() {
            candidates.reset(centroids.pack(simd, x.row(b, first + i), packed));
        }
    }
}

/// Turns the products of a tile (for Manhattan, nothing yet) into scores and offers them.
struct Offer<'a, 'r, T: Element> {
    tile: &'a Tile<'a, T>,
    rows: &'a [T::Filter],
    row: &'a dyn Fn(usize) -> usize,
    block: &'a Block,
    scores: &'a mut [T::Filter],
    candidates: &'a mut [Candidates<T::Filter>],
    compared: &'a mut u64,
    renewal: Option<&'a mut Renewal<'r>>,
}

impl<T: Element> NullaryFnOnce for Offer<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tile, rows, row, block, scores, candidates, compared, mut renewal } = self;
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
            let least = lowest(scores);
            if let Some(renewal) = &mut renewal {
                renewal.note(i, (block.group, &scored), |slack| block.bound.error(slack), (scores, least));
            }
            candidates.offer(least, scores, &block.bound, scored.start, |before, list| {
                *compared += list.len() as u64;
                tile.nearest(row(i), before, list.iter().map(|&(_, scored)| centroids.index(scored)))
            });
        }
    }
}
