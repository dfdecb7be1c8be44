//! Passes of k-means++ over rows, each of which meets several seeds at once: distances as [`crate::spread`] defines them.
//!
//! The seeds of a pass stay in a cache, and a row comes from memory once for all of them. What is left is arithmetic, of which folding the
//! lanes of a distance would be the longer part, since each of its additions waits for the one before: so all seeds' lanes are filled
//! first, and then folded in a loop of its own, where the additions of one do not wait for those of another.

use super::{
    rows::distance,
    scalar::Scalar,
    tensors::{Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    spread::{spread, whole, Limits, LANES},
};
use pulp::NullaryFnOnce;

/// Columns that are added up before a row asks whether a seed is too far to count. It asks again after twice as many, and so on.
const CHECKED: usize = 4 * LANES;

/// Rows of a task at least, of which each has its own potentials.
const LEAST_ROWS: usize = 16;

/// Rows of a problem as seeds.
pub(super) struct Seeds<S> {
    pub rows: Vec<u32>,
    /// `(rows, d)`, as distances take them.
    values: Vec<S>,
}

/// What distances are measured by: the rows of a problem, and their norms by cosine.
pub(super) struct Measure<'a, T: Element> {
    pub x: &'a View<'a, T>,
    pub b: usize,
    norms: Option<&'a [f64]>,
    metric: Metric,
}

/// Room for what a row meets.
pub(super) struct Scratch<S> {
    row: Vec<S>,
    lanes: Vec<[S; LANES]>,
    /// The seeds that may still be near enough to count.
    open: Vec<usize>,
    found: Vec<f64>,
}

impl<S: Scalar> Scratch<S> {
    pub fn new(d: usize, seeds: usize) -> Self {
        let zero = S::of(0.0);
        Self { row: vec![zero; d], lanes: vec![[zero; LANES]; seeds], open: vec![], found: vec![0.0; seeds] }
    }
}

impl<'a, T: Element> Measure<'a, T> {
    pub fn new(x: &'a View<'a, T>, b: usize, norms: Option<&'a [f64]>, metric: Metric) -> Self {
        let metric = spread(metric);
        Self { x, b, norms: norms.filter(|_| metric == Metric::Cosine), metric }
    }

    pub fn seeds(&self, rows: Vec<u32>) -> Seeds<T::Filter> {
        let d = self.x.rows.d;
        let mut values = vec![T::Filter::of(0.0); rows.len() * d];
        for (&row, values) in rows.iter().zip(values.chunks_exact_mut(d)) {
            self.widened(row as usize, values);
        }
        Seeds { rows, values }
    }

    /// A row as distances take it: by its norm where there are norms.
    #[inline(always)]
    fn widened(&self, i: usize, out: &mut [T::Filter]) {
        T::filter_row(self.x.row(self.b, i), out);
        if let Some(norms) = self.norms {
            let inverse = T::Filter::of(1.0 / norms[self.b * self.x.rows.n + i]);
            out.iter_mut().for_each(|v| *v = v.mul(inverse));
        }
    }

    /// The distances of a row to all seeds; in the place of one that is not below `near`, any that is not.
    #[inline(always)]
    pub fn to_seeds<'s>(
        &self,
        i: usize,
        near: f64,
        seeds: &Seeds<T::Filter>,
        scratch: &'s mut Scratch<T::Filter>,
    ) -> &'s [f64] {
        let Scratch { row, lanes, open, found } = scratch;
        let own = self.x.row(self.b, i);
        let row = match T::as_filter(own).filter(|_| self.norms.is_none()) {
            Some(row) => row,
            None => {
                self.widened(i, row);
                &*row
            }
        };
        let limits = if T::Filter::UNIT > 1e-10 { Limits::F32 } else { Limits::F64 };
        let part = if self.metric == Metric::Cosine { 0.5 } else { 1.0 };
        let (lanes, found) = (&mut lanes[..seeds.rows.len()], &mut found[..seeds.rows.len()]);
        match self.metric {
            Metric::Manhattan => sums(row, &seeds.values, near, &limits, lanes, open, found, |x, c| x.sub(c).abs()),
            _ => sums(row, &seeds.values, near / part, &limits, lanes, open, found, |x, c| {
                let t = x.sub(c);
                t.mul(t)
            }),
        }
        for (found, &seed) in found.iter_mut().zip(&seeds.rows) {
            *found = if limits.hold(*found) {
                *found * part
            } else {
                let defined = distance(own, self.x.row(self.b, seed as usize), self.metric);
                if defined > 0.0 {
                    defined
                } else {
                    0.0
                }
            };
        }
        found
    }
}

/// The terms of all columns of `x` and each of the seeds, added up in lanes, to `found`; no more than those of the first ones where they come
/// to `enough` already, since no term is below zero and what is rounded to nearest keeps its order.
#[allow(clippy::too_many_arguments)] // Parts of a scratch, which are borrowed one by one.
#[inline(always)]
fn sums<S: Scalar>(
    x: &[S],
    seeds: &[S],
    enough: f64,
    limits: &Limits,
    lanes: &mut [[S; LANES]],
    open: &mut Vec<usize>,
    found: &mut [f64],
    term: impl Fn(S, S) -> S,
) {
    let (d, mut from, mut to) = (x.len(), 0, CHECKED.min(x.len()));
    lanes.fill([S::of(0.0); LANES]);
    open.clear();
    open.extend(0..lanes.len());
    loop {
        for &t in &*open {
            lanes[t] = added(lanes[t], &x[from..to], &seeds[t * d + from..t * d + to], &term);
        }
        for &t in &*open {
            found[t] = folded(&lanes[t]).widen();
        }
        if to == d {
            return;
        }
        open.retain(|&t| !(found[t] >= enough && found[t] > limits.least && found[t] < limits.most / 2.0));
        if open.is_empty() {
            return;
        }
        (from, to) = (to, d.min(2 * to));
    }
}

/// The lanes with the terms of more columns. They come and go as values, which the compiler keeps in registers.
#[inline(always)]
fn added<S: Scalar>(mut lanes: [S; LANES], x: &[S], c: &[S], term: impl Fn(S, S) -> S) -> [S; LANES] {
    let ((x, x_rest), (c, c_rest)) = (x.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for (x, c) in x.iter().zip(c) {
        for l in 0..LANES {
            lanes[l] = lanes[l].add(term(x[l], c[l]));
        }
    }
    lanes.iter_mut().zip(x_rest.iter().zip(c_rest)).for_each(|(lane, (&x, &c))| *lane = lane.add(term(x, c)));
    lanes
}

/// All lanes in one: those 16, 8, 4, 2 and 1 apart.
#[inline(always)]
fn folded<S: Scalar>(lanes: &[S; LANES]) -> S {
    let of: [S; 16] = std::array::from_fn(|l| lanes[l].add(lanes[l + 16]));
    let of: [S; 8] = std::array::from_fn(|l| of[l].add(of[l + 8]));
    let of: [S; 4] = std::array::from_fn(|l| of[l].add(of[l + 4]));
    let of: [S; 2] = std::array::from_fn(|l| of[l].add(of[l + 2]));
    of[0].add(of[1])
}

/// Rows of a problem, and the seeds that they meet.
pub(super) struct Met<'a, T: Element> {
    pub measure: Measure<'a, T>,
    pub seeds: Seeds<T::Filter>,
    /// Which of its columns of `nearest` has the distances to the seeds so far; none before there are any.
    pub slot: Option<usize>,
    /// The units of the potentials of seeds that are tried; none of seeds that are taken.
    pub units: Option<f64>,
}

/// Passes over the rows of some problems, in ascending order, whose distances to the nearest seed are in a column of `nearest`,
/// `(b, n, trials)`. Where seeds are taken, column 0 becomes the distances to the nearest seed with all of these. Where they are tried, column `t`
/// becomes those with seed `t`, and the potentials of all seeds are returned, `trials` for each problem.
pub(super) fn meet<T: Element>(
    met: &[Met<'_, T>],
    trials: usize,
    weights: Option<&[f64]>,
    nearest: &mut [f64],
) -> Result<Vec<Vec<u64>>> {
    let Some(Measure { x, .. }) = met.first().map(|met| &met.measure) else { return Ok(vec![]) };
    let (n, d) = (x.rows.n, x.rows.d);
    let most = met.iter().map(|met| met.seeds.rows.len()).max().unwrap_or(0);
    let steps = d * (1 + most / 4);
    let rows = host::items_per_task(steps).max(LEAST_ROWS).min(n);
    let parts = n.div_ceil(rows);
    let mut potentials = host::filled("k-means++", met.len() * parts * trials, 0u64)?;
    let mut tasks = host::buffer("k-means++", met.len() * parts)?;
    let (mut problems, mut potential) = (nearest.chunks_mut(n * trials).enumerate(), potentials.chunks_mut(trials));
    for met in met {
        let own = problems.find(|(b, _)| *b == met.measure.b).map(|(_, nearest)| nearest);
        let parts = own.into_iter().flat_map(|nearest| nearest.chunks_mut(rows * trials).enumerate());
        tasks.extend(
            parts.zip(&mut potential).map(|((part, nearest), potentials)| (met, part * rows, nearest, potentials)),
        );
    }
    host::for_each(
        tasks,
        rows * steps,
        || Scratch::new(d, most),
        |scratch, (met, first, nearest, potentials)| {
            pulp::Arch::new().dispatch(Pass { met, first, trials, weights, scratch, nearest, potentials });
            Ok(())
        },
    )?;
    let sum = |parts: &[u64], t: usize| parts.iter().skip(t).step_by(trials).sum::<u64>();
    Ok(potentials.chunks(parts * trials).map(|parts| (0..trials).map(|t| sum(parts, t)).collect()).collect())
}

/// Some of the rows.
struct Pass<'a, 'm, T: Element> {
    met: &'a Met<'m, T>,
    first: usize,
    trials: usize,
    weights: Option<&'a [f64]>,
    scratch: &'a mut Scratch<T::Filter>,
    nearest: &'a mut [f64],
    potentials: &'a mut [u64],
}

impl<T: Element> NullaryFnOnce for Pass<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Met { measure, seeds, slot, units } = self.met;
        let (b, n) = (measure.b, measure.x.rows.n);
        for (i, nearest) in (self.first..).zip(self.nearest.chunks_exact_mut(self.trials)) {
            let near = slot.map_or(f64::INFINITY, |slot| nearest[slot]);
            let weight = self.weights.map_or(1.0, |weights| weights[b * n + i]);
            let is = |&seed: &u32| seed as usize == i;
            if !(near > 0.0 && weight > 0.0) {
                // Nothing is drawn by its distance.
                nearest.fill(near);
            } else {
                let found = measure.to_seeds(i, near, seeds, self.scratch);
                match *units {
                    None => nearest[0] = found.iter().fold(near, |near, &found| near.min(found)),
                    Some(units) => {
                        for (t, &found) in found.iter().enumerate().filter(|&(t, _)| !is(&seeds.rows[t])) {
                            nearest[t] = near.min(found);
                            self.potentials[t] += whole(nearest[t] * weight, units);
                        }
                    }
                }
            }
            if let Some(t) = seeds.rows.iter().position(is) {
                nearest[units.map_or(0, |_| t)] = -1.0;
            }
        }
    }
}
