//! The `m` nearest centroids of each row: the scores of exact assignment (`filter.rs`), with a cutoff by the `m`-th smallest of their upper
//! bounds.
//!
//! Let `U` be no less than that. If the score of centroid `j`, less its error, is above `U`, then `T_i <= score_i + E_i <= U < score_j - E_j <= T_j`
//! for `m` centroids `i`: these are nearer by the definition, and `j` is none of the `m` nearest. So the candidates hold all of these, and
//! are compared by the definition. What is not scored (copies of centroids, those set apart, and those with a NaN or an infinity) is compared
//! where it may count, and where fewer than `m` centroids are at a finite distance, all are.

use super::{
    candidates::Found,
    filter::{Block, Centroids, Slack},
    matmul::multiply,
    pairwise::{distances_to, FEW},
    scalar::{hash, Scalar, LANES},
    tensors::{lock, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    rows::Rows,
    tiles::{CPU_CENTROIDS, CPU_ROWS},
};
use candle_core::Tensor;
use pulp::NullaryFnOnce;
use std::{collections::HashMap, ops::Range};

/// Candidates of a row that are kept before some are compared, beside twice as many as are asked for.
const MOST: usize = 64;

pub(crate) fn nearest(x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let [xs, cs] = lock([&x.operand, &c.operand]);
        let (indices, distances) = nearest_of_all(&xs.view::<T>(x)?, &cs.view::<T>(c)?, m, metric)?;
        Ok((tensor(indices, (x.b, x.n, m))?, tensor(distances, (x.b, x.n, m))?))
    })
}

fn nearest_of_all<T: Element>(
    x: &View<'_, T>,
    c: &View<'_, T>,
    m: usize,
    metric: Metric,
) -> Result<(Vec<u32>, Vec<f64>)> {
    let (b, n, d, k) = (x.rows.b, x.rows.n, x.rows.d, c.rows.n);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let scored = host::map("nearest", problems, 8 * k * d, |b| Scored::new(c, b, metric))?;
    let scored = scored.into_iter().collect::<Result<Vec<_>>>()?;
    let mut indices = host::filled("nearest", b * n * m, 0)?;
    let mut distances = host::filled("nearest", b * n * m, 0.0)?;
    let problem = indices.chunks_mut(n * m).zip(distances.chunks_mut(n * m)).enumerate();
    let tiles = problem.flat_map(|(b, (indices, distances))| {
        let parts = indices.chunks_mut(CPU_ROWS * m).zip(distances.chunks_mut(CPU_ROWS * m)).enumerate();
        parts.map(move |(part, out)| (b, part, out))
    });
    let scratch = || Scratch {
        rows: vec![Scalar::of(0.0); CPU_ROWS.min(n) * d],
        scores: vec![Scalar::of(0.0); CPU_ROWS.min(n) * CPU_CENTROIDS.min(k)],
        nearby: vec![Nearby::new(m); CPU_ROWS.min(n)],
    };
    let tile = |s: &mut Scratch<T::Filter>, (b, part, out): (usize, usize, (&mut [u32], &mut [f64]))| {
        let scored = &scored[b.min(problems - 1)];
        Tile { x, c, b, first: part * CPU_ROWS, m, scored, metric }.find(s, out);
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

/// What is known of the nearest centroids of a row.
#[derive(Clone)]
struct Nearby<S> {
    m: usize,
    /// The least of the scores, each with its error added, ascending, as many as are asked for.
    upper: Vec<f64>,
    /// Candidates: scores, each without its error, and which centroids have them.
    list: Vec<(S, u32)>,
    /// The nearest by the definition of those that have been compared, ascending.
    found: Vec<Found>,
    slack: Slack,
}

impl<S: Scalar> Nearby<S> {
    fn new(m: usize) -> Self {
        Self { m, upper: Vec::with_capacity(m + 1), list: vec![], found: Vec::with_capacity(m + 1), slack: Slack::NONE }
    }

    fn reset(&mut self, slack: Slack) {
        self.upper.clear();
        self.list.clear();
        self.found.clear();
        self.slack = slack;
    }

    /// `U`, infinite as long as fewer centroids have been scored than are asked for.
    #[inline(always)]
    fn bound(&self) -> f64 {
        self.upper.get(self.m - 1).copied().unwrap_or(f64::INFINITY)
    }

    /// No true value of one of the nearest is above.
    fn cutoff(&self) -> f64 {
        self.bound() * self.slack.factor
    }

    /// Takes the scores of a block. `compare` makes room in a full list.
    #[inline(always)]
    fn offer(&mut self, scores: &[S], block: &Block, mut compare: impl FnMut(&mut Self)) {
        let error = block.bound.error(self.slack);
        let below = |scores: &[S], cut: S| scores.iter().fold(false, |below, &s| below | (s <= cut));
        let mut cut = S::of(self.bound() - error);
        for few in scores.chunks(LANES) {
            if below(few, cut) {
                for &s in few {
                    let upper = s.widen() + error;
                    if upper < self.bound() {
                        let at = self.upper.partition_point(|&other| other <= upper);
                        self.upper.insert(at, upper);
                        self.upper.truncate(self.m);
                    }
                }
                cut = S::of(self.bound() - error);
            }
        }
        let cut = S::of(self.cutoff() + error);
        for (few, from) in scores.chunks(LANES).zip((block.scored.start..).step_by(LANES)) {
            if below(few, cut) {
                for (l, &s) in few.iter().enumerate().filter(|(_, &s)| s <= cut) {
                    if self.list.len() == 2 * self.m + MOST {
                        compare(self);
                    }
                    self.list.push((S::of(s.widen() - error), (from + l) as u32));
                }
            }
        }
    }

    /// Leaves out candidates that are none any more.
    fn shorten(&mut self) {
        let cut = S::of(self.cutoff());
        self.list.retain(|&(s, _)| s <= cut);
    }

    /// Adds a centroid at a distance. A NaN is as far as can be.
    fn add(&mut self, distance: f64, index: u32) {
        let found = (if distance.is_nan() { f64::INFINITY } else { distance }, index);
        let before = |other: &Found| other.0 < found.0 || other.0 == found.0 && other.1 < found.1;
        let at = self.found.partition_point(before);
        if at < self.m {
            self.found.insert(at, found);
            self.found.truncate(self.m);
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
    fn find(self, s: &mut Scratch<T::Filter>, (indices, distances): (&mut [u32], &mut [f64])) {
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
            for ((&(distance, index), to), at) in nearby.found.iter().zip(distances).zip(indices) {
                (*to, *at) = (distance, index);
            }
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
            let rows = few.map(|j| self.c.row(self.b, j as usize));
            let distances = distances_to(row, rows, self.metric);
            few.iter().zip(distances).take(count).for_each(|(&j, distance)| nearby.add(distance, j));
        }
    }
}

/// Packs the rows of a tile.
struct Pack<'a, T: Element> {
    tile: Tile<'a, T>,
    rows: &'a mut [T::Filter],
    nearby: &'a mut [Nearby<T::Filter>],
}

impl<T: Element> NullaryFnOnce for Pack<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Tile { x, b, first, scored, .. } = self.tile;
        for (i, (packed, nearby)) in self.rows.chunks_exact_mut(x.rows.d).zip(self.nearby).enumerate() {
            nearby.reset(scored.centroids.pack(x.row(b, first + i), packed));
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
            nearby.offer(scores, block, |nearby| {
                nearby.shorten();
                if nearby.list.len() > nearby.m + MOST / 2 {
                    tile.compare_listed(i, nearby);
                }
            });
        }
    }
}
