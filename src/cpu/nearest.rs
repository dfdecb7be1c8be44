//! The `m` nearest centroids of each row: the scores of exact assignment (`filter.rs`), with a cutoff by the `m`-th smallest of their upper
//! bounds.
//!
//! Let `U` be no less than that. If the score of centroid `j`, less its error, is above `U`, then `T_i <= score_i + E_i <= U < score_j - E_j <= T_j`
//! for `m` centroids `i`: these are nearer by the definition, and `j` is none of the `m` nearest. So the candidates hold all of these, and
//! are compared by the definition. What is not scored (copies of centroids, those set apart, and those with a NaN or an infinity) is compared
//! where it may count, and where fewer than `m` centroids are at a finite distance, all are.
//!
//! Where there is a matrix unit rows and centroids are scored rounded first (`rounded.rs`), and what that leaves of a row once more in f32. Of rows
//! with many candidates all centroids are.

mod nearby;
mod rounded;

use super::{
    amx::Amx,
    filter::{Block, Centroids},
    matmul::multiply,
    pairwise::{distances_to, FEW},
    rounded::RoundedCentroids,
    scalar::{hash, Scalar},
    tensors::{lock, single, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    plan::assign::by_unit,
    rows::Rows,
    tiles::{CPU_CENTROIDS, CPU_ROWS},
};
use candle_core::{DType, Tensor};
use nearby::{Nearby, MOST};
use pulp::{NullaryFnOnce, Simd, WithSimd};
use rounded::RoundedScratch;
use std::{collections::HashMap, ops::Range};

pub(crate) fn nearest(x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    let by_unit = metric != Metric::Manhattan && x.dtype() != DType::F64 && by_unit(c.n, x.d);
    let [xs, cs] = lock([&x.operand, &c.operand]);
    let (indices, distances) = match Amx::find().filter(|_| by_unit) {
        Some(amx) => single!(x.dtype(), T => {
            let rounded = |centroids: &Centroids<f32>| RoundedCentroids::new(centroids, amx);
            let scratch = || RoundedScratch::new(x.n, x.d, c.n, m);
            let find = |tile: Tile<'_, T>, rounded: &RoundedCentroids, s: &mut RoundedScratch, out: Nearest<'_>| {
                tile.find_rounded(rounded, s, out)
            };
            nearest_of_all(&xs.view::<T>(x)?, &cs.view::<T>(c)?, m, metric, rounded, scratch, find)
        })?,
        None => typed!(x.dtype(), T => {
            let scratch = || Scratch::new(x.n, x.d, c.n, m);
            let find = |tile: Tile<'_, T>, &(): &(), s: &mut _, out: Nearest<'_>| tile.find(s, out);
            nearest_of_all(&xs.view::<T>(x)?, &cs.view::<T>(c)?, m, metric, |_| Ok(()), scratch, find)
        })?,
    };
    Ok((tensor(indices, (x.b, x.n, m))?, tensor(distances, (x.b, x.n, m))?))
}

/// The indices of rows' nearest centroids, and their distances.
type Nearest<'a> = (&'a mut [u32], &'a mut [f64]);

fn nearest_of_all<T: Element, P: Send + Sync, S: Send>(
    x: &View<'_, T>,
    c: &View<'_, T>,
    m: usize,
    metric: Metric,
    prepare: impl Fn(&Centroids<T::Filter>) -> Result<P> + Send + Sync,
    scratch: impl Fn() -> S + Send + Sync,
    find: impl Fn(Tile<'_, T>, &P, &mut S, Nearest<'_>) + Send + Sync,
) -> Result<(Vec<u32>, Vec<f64>)> {
    let (b, n, d, k) = (x.rows.b, x.rows.n, x.rows.d, c.rows.n);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let scored = |b| {
        let scored = Scored::new(c, b, metric)?;
        Ok((prepare(&scored.centroids)?, scored))
    };
    let scored = host::map("nearest", problems, 8 * k * d, scored)?;
    let scored = scored.into_iter().collect::<Result<Vec<_>>>()?;
    let mut indices = host::filled("nearest", b * n * m, 0)?;
    let mut distances = host::filled("nearest", b * n * m, 0.0)?;
    let problem = indices.chunks_mut(n * m).zip(distances.chunks_mut(n * m)).enumerate();
    let tiles = problem.flat_map(|(b, (indices, distances))| {
        let parts = indices.chunks_mut(CPU_ROWS * m).zip(distances.chunks_mut(CPU_ROWS * m)).enumerate();
        parts.map(move |(part, out)| (b, part, out))
    });
    let tile = |s: &mut S, (b, part, out): (usize, usize, Nearest<'_>)| {
        let (prepared, scored) = &scored[b.min(problems - 1)];
        find(Tile { x, c, b, first: part * CPU_ROWS, m, scored, metric }, prepared, s, out);
        Ok(())
    };
    host::for_each(tiles.collect(), CPU_ROWS.min(n) * d * (4 + k / 16), scratch, tile)?;
    Ok((indices, distances))
}

/// The centroids of a problem, ready to be scored, and their copies, which are not.
struct Scored<S> {
    centroids: Centroids<S>,
    /// Of a centroid, the later ones that equal it.
    copies: HashMap<u32, Vec<u32>>,
}

impl<S: Scalar> Scored<S> {
    fn new<T: Element<Filter = S>>(c: &View<'_, T>, b: usize, metric: Metric) -> Result<Self> {
        let centroids = Centroids::new(c, b, metric)?;
        let mut left = host::filled("nearest", c.rows.n, true)?;
        centroids.all().for_each(|j| left[j as usize] = false);
        let mut copies: HashMap<u32, Vec<u32>> = HashMap::new();
        if left.contains(&true) {
            let mut row = vec![S::of(0.0); c.rows.d];
            let mut hash_of = |j: u32| {
                T::filter_row(c.row(b, j as usize), &mut row);
                hash(&row)
            };
            let mut by_hash: HashMap<u32, Vec<u32>> = HashMap::new();
            centroids.all().for_each(|j| by_hash.entry(hash_of(j)).or_default().push(j));
            for j in (0..c.rows.n as u32).filter(|&j| left[j as usize]) {
                let equal = |&&i: &&u32| {
                    let rows = c.row(b, i as usize).iter().zip(c.row(b, j as usize));
                    rows.into_iter().all(|(a, b)| a.wide() == b.wide())
                };
                if let Some(&first) = by_hash.get(&hash_of(j)).and_then(|alike| alike.iter().find(equal)) {
                    copies.entry(first).or_default().push(j);
                }
            }
        }
        Ok(Self { centroids, copies })
    }
}

/// One thread reuses this from tile to tile.
struct Scratch<S> {
    rows: Vec<S>,
    scores: Vec<S>,
    nearby: Vec<Nearby<S>>,
}

impl<S: Scalar> Scratch<S> {
    fn new(n: usize, d: usize, k: usize, m: usize) -> Self {
        let rows = CPU_ROWS.min(n);
        Self {
            rows: vec![S::of(0.0); rows * d],
            scores: vec![S::of(0.0); rows * CPU_CENTROIDS.min(k)],
            nearby: vec![Nearby::new(m); rows],
        }
    }
}

/// Rows of problem `b` from `first` on.
#[derive(Clone, Copy)]
struct Tile<'a, T: Element> {
    x: &'a View<'a, T>,
    c: &'a View<'a, T>,
    b: usize,
    first: usize,
    m: usize,
    scored: &'a Scored<T::Filter>,
    metric: Metric,
}

impl<T: Element> Tile<'_, T> {
    fn find(self, s: &mut Scratch<T::Filter>, (indices, distances): Nearest<'_>) {
        let (count, d, centroids) = (indices.len() / self.m, self.x.rows.d, &self.scored.centroids);
        let (rows, nearby) = (&mut s.rows[..count * d], &mut s.nearby[..count]);
        let simd = pulp::Arch::new();
        simd.dispatch(Pack { tile: self, rows, nearby });
        for block in &centroids.blocks {
            let Range { start, end } = block.scored;
            let scores = &mut s.scores[..count * (end - start)];
            if self.metric != Metric::Manhattan {
                multiply(rows, &centroids.values[start * d..end * d], d, scores);
            }
            simd.dispatch(Offer { tile: self, rows, block, scores, nearby });
        }
        let out = indices.chunks_exact_mut(self.m).zip(distances.chunks_exact_mut(self.m));
        for (i, (nearby, (indices, distances))) in nearby.iter_mut().zip(out).enumerate() {
            self.settle(i, nearby);
            nearby.write(indices, distances);
        }
    }

    /// Finds the nearest of row `i` of the tile.
    fn settle(&self, i: usize, nearby: &mut Nearby<T::Filter>) {
        let centroids = &self.scored.centroids;
        if nearby.slack.usable() {
            nearby.shorten();
            if centroids.apart_may_win(nearby.slack, nearby.cutoff()) {
                self.compare(i, centroids.apart().iter().copied(), nearby);
            }
            self.compare_listed(i, nearby);
        }
        if nearby.found.last().is_none_or(|last| last.0 == f64::INFINITY) || nearby.found.len() < self.m {
            nearby.found.clear();
            self.compare_all(i, nearby);
        }
    }

    /// Compares the candidates of row `i` that are listed.
    fn compare_listed(&self, i: usize, nearby: &mut Nearby<T::Filter>) {
        let mut list = std::mem::take(&mut nearby.list);
        self.compare(i, list.drain(..).map(|(_, scored)| self.scored.centroids.index(scored)), nearby);
        nearby.list = list;
    }

    /// Compares some centroids and their copies.
    fn compare(&self, i: usize, some: impl Iterator<Item = u32>, nearby: &mut Nearby<T::Filter>) {
        let copies = |j: &u32| self.scored.copies.get(j).map_or(&[][..], |copies| copies);
        self.compare_each(i, some.flat_map(|j| std::iter::once(j).chain(copies(&j).iter().copied())), nearby);
    }

    #[cold]
    fn compare_all(&self, i: usize, nearby: &mut Nearby<T::Filter>) {
        self.compare_each(i, 0..self.c.rows.n as u32, nearby);
    }

    fn compare_each(&self, i: usize, mut some: impl Iterator<Item = u32>, nearby: &mut Nearby<T::Filter>) {
        let row = self.x.row(self.b, self.first + i);
        let mut few = [0; FEW];
        loop {
            let mut count = 0;
            for (to, j) in few.iter_mut().zip(&mut some) {
                *to = j;
                count += 1;
            }
            if count == 0 {
                return;
            }
            // Beyond the last one those of before, whose distances nobody asks for.
            let few_rows = few.map(|j| self.c.row(self.b, j as usize));
            let distances = pulp::Arch::new().dispatch(Distances { row, few: few_rows, metric: self.metric });
            few.iter().zip(distances).take(count).for_each(|(&j, distance)| nearby.add(distance, j));
        }
    }
}

/// The distances of a row to a few others.
struct Distances<'a, T> {
    row: &'a [T],
    few: [&'a [T]; FEW],
    metric: Metric,
}

impl<T: Element> NullaryFnOnce for Distances<'_, T> {
    type Output = [f64; FEW];

    #[inline(always)]
    fn call(self) -> [f64; FEW] {
        distances_to(self.row, self.few, self.metric)
    }
}

/// Packs the rows of a tile.
struct Pack<'a, T: Element> {
    tile: Tile<'a, T>,
    rows: &'a mut [T::Filter],
    nearby: &'a mut [Nearby<T::Filter>],
}

impl<T: Element> WithSimd for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Tile { x, b, first, scored, .. } = self.tile;
        for (i, (packed, nearby)) in self.rows.chunks_exact_mut(x.rows.d).zip(self.nearby).enumerate() {
            nearby.reset(scored.centroids.pack(simd, x.row(b, first + i), packed));
        }
    }
}

/// Turns the products of a tile (for Manhattan, nothing yet) into scores and offers them.
struct Offer<'a, T: Element> {
    tile: Tile<'a, T>,
    rows: &'a [T::Filter],
    block: &'a Block,
    scores: &'a mut [T::Filter],
    nearby: &'a mut [Nearby<T::Filter>],
}

impl<T: Element> NullaryFnOnce for Offer<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { tile, rows, block, scores, nearby } = self;
        let (d, centroids, scored) = (tile.x.rows.d, &tile.scored.centroids, block.scored.clone());
        for (i, (scores, nearby)) in scores.chunks_exact_mut(scored.len()).zip(nearby).enumerate() {
            if !nearby.slack.usable() {
                continue;
            }
            if tile.metric == Metric::Manhattan {
                centroids.manhattan(&rows[i * d..][..d], scored.start, scores);
            } else {
                let bias = &centroids.bias[scored.clone()];
                scores.iter_mut().zip(bias).for_each(|(s, &b)| *s = b.sub(*s));
            }
            nearby.offer(scores, (&block.bound, scored.start), |nearby| {
                nearby.shorten();
                if nearby.list.len() > nearby.m + MOST / 2 {
                    tile.compare_listed(i, nearby);
                }
            });
        }
    }
}
