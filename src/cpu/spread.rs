//! Passes of k-means++ over rows, each of which meets several seeds at once: distances as [`crate::spread`] defines them.
//!
//! The seeds of a pass stay in a cache, and a row comes from memory once for all of them. What is left is arithmetic, of which folding the
//! lanes of a distance would be the longer part, since each of its additions waits for the one before: so all seeds' lanes are filled
//! first, and then folded side by side, where no addition waits for that of another seed. Rows are cut into the columns of all lanes, the
//! last ones of them zeros, whose terms add zero to what is not below it.
//!
//! Where there are many passes, and a matrix unit, most seeds are found to be too far by that, and a row itself is not read (`spread_filter.rs`).

use super::{
    amx::Amx,
    lines::PAIR,
    rows::distance,
    scalar::Scalar,
    spread_filter::{Filter, Listed, RoundedRows},
    tensors::{prefetch, Element, View},
};
use crate::{
    error::Result,
    host,
    kept::KeptRows,
    metric::Metric,
    spread::{spread, whole, worth_rounding, Limits, LANES},
};
use pulp::NullaryFnOnce;

/// Columns of each lane that are added up before a row asks whether a seed is too far to count. It asks again after four times as many, and so
/// on.
const CHECKED: usize = 4;

/// Seeds whose lanes are folded side by side: so few that the compiler leaves the lanes of a seed together in a vector.
const FOLDED: usize = 4;

/// Rows of a task are whole tiles of so many, and have potentials of their own.
const TILE: usize = PAIR;

/// Rows of a problem as seeds.
pub(super) struct Seeds<S> {
    pub rows: Vec<u32>,
    /// The rows one after another, as distances take them.
    values: Vec<[S; LANES]>,
}

/// The distances between rows of a problem, by a metric; norms are there by cosine.
pub(super) struct Measure<'a, T: Element> {
    pub x: &'a View<'a, T>,
    pub b: usize,
    norms: Option<&'a [f64]>,
    metric: Metric,
}

/// Room for what a row meets.
pub(super) struct Scratch<S> {
    row: Vec<[S; LANES]>,
    sums: Sums<S>,
    /// All seeds, and those that each row of a tile has to meet.
    all: Vec<u32>,
    listed: Listed,
}

/// Sums of a row and several seeds.
struct Sums<S> {
    /// The seeds that may still be near enough to count.
    open: Vec<u32>,
    /// Of each of these, and all of them in one.
    lanes: Vec<[S; LANES]>,
    folded: Vec<S>,
    /// The sum of each seed, as far as it has been added up.
    found: Vec<f64>,
}

impl<S: Scalar> Scratch<S> {
    pub fn new(d: usize, seeds: usize) -> Self {
        let (zero, open) = (S::of(0.0), Vec::with_capacity(seeds));
        let sums = Sums { open, lanes: vec![[zero; LANES]; seeds], folded: vec![zero; seeds], found: vec![0.0; seeds] };
        let (row, all) = (vec![[zero; LANES]; d.div_ceil(LANES)], (0..seeds as u32).collect());
        Self { row, sums, all, listed: Listed::default() }
    }
}

impl<'a, T: Element> Measure<'a, T> {
    pub fn new(x: &'a View<'a, T>, b: usize, norms: Option<&'a [f64]>, metric: Metric) -> Self {
        let metric = spread(metric);
        Self { x, b, norms: norms.filter(|_| metric == Metric::Cosine), metric }
    }

    pub fn seeds(&self, rows: Vec<u32>) -> Seeds<T::Filter> {
        let len = self.x.rows.d.div_ceil(LANES);
        let mut values = vec![[T::Filter::of(0.0); LANES]; rows.len() * len];
        for (&row, values) in rows.iter().zip(values.chunks_exact_mut(len)) {
            self.widened(row as usize, values);
        }
        Seeds { rows, values }
    }

    /// A row as distances take it: by its norm where there are norms.
    #[inline(always)]
    fn widened(&self, i: usize, out: &mut [[T::Filter; LANES]]) {
        let out = &mut out.as_flattened_mut()[..self.x.rows.d];
        T::filter_row(self.x.row(self.b, i), out);
        if let Some(norms) = self.norms {
            let inverse = T::Filter::of(1.0 / norms[self.b * self.x.rows.n + i]);
            out.iter_mut().for_each(|v| *v = v.mul(inverse));
        }
    }

    /// The distances of a row to all seeds; in the place of one that is not below `near`, any that is not, as those that are not listed are not.
    #[inline(always)]
    pub fn to_seeds<'s>(
        &self,
        i: usize,
        near: f64,
        seeds: &Seeds<T::Filter>,
        listed: &[u32],
        scratch: &'s mut Scratch<T::Filter>,
    ) -> &'s [f64] {
        let Scratch { row, sums, .. } = scratch;
        self.find(i, near, seeds, listed, row, sums)
    }

    #[inline(always)]
    fn find<'s>(
        &self,
        i: usize,
        near: f64,
        seeds: &Seeds<T::Filter>,
        listed: &[u32],
        row: &mut [[T::Filter; LANES]],
        sums: &'s mut Sums<T::Filter>,
    ) -> &'s [f64] {
        let own = self.x.row(self.b, i);
        let row = match T::as_filter(own).map(<[_]>::as_chunks).filter(|row| self.norms.is_none() && row.1.is_empty()) {
            Some((row, _)) => row,
            None => {
                self.widened(i, row);
                &*row
            }
        };
        let limits = if T::Filter::UNIT > 1e-10 { Limits::F32 } else { Limits::F64 };
        let part = if self.metric == Metric::Cosine { 0.5 } else { 1.0 };
        let found = match self.metric {
            Metric::Manhattan => sums.add_up(row, seeds, listed, near, &limits, |x, c| x.sub(c).abs()),
            _ => sums.add_up(row, seeds, listed, near / part, &limits, |x, c| {
                let t = x.sub(c);
                t.mul(t)
            }),
        };
        for &t in listed {
            let found = &mut found[t as usize];
            *found = if limits.hold(*found) {
                *found * part
            } else {
                let defined = distance(own, self.x.row(self.b, seeds.rows[t as usize] as usize), self.metric);
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

impl<S: Scalar> Sums<S> {
    /// The terms of all columns of `x` and each of the listed seeds, added up in lanes; no more than those of the first ones where they come to
    /// `enough` already, since no term is below zero and what is rounded to nearest keeps its order.
    #[inline(always)]
    fn add_up(
        &mut self,
        x: &[[S; LANES]],
        seeds: &Seeds<S>,
        listed: &[u32],
        enough: f64,
        limits: &Limits,
        term: impl Fn(S, S) -> S,
    ) -> &mut [f64] {
        let Self { open, lanes, folded, found } = self;
        let (count, len) = (seeds.rows.len(), x.len());
        open.clear();
        open.extend_from_slice(listed);
        found[..count].fill(f64::INFINITY);
        lanes[..listed.len()].fill([S::of(0.0); LANES]);
        let (mut from, mut to) = (0, CHECKED.min(len));
        while !open.is_empty() {
            let part = |t: u32| &seeds.values[t as usize * len + from..t as usize * len + to];
            for (open, lanes) in open.chunks(2).zip(lanes.chunks_mut(2)) {
                match (open, lanes) {
                    (&[t, u], [of_t, of_u]) => {
                        [*of_t, *of_u] = added([*of_t, *of_u], &x[from..to], [part(t), part(u)], &term)
                    }
                    (&[t], [of_t, ..]) => [*of_t] = added([*of_t], &x[from..to], [part(t)], &term),
                    _ => {}
                }
            }
            fold(&lanes[..open.len()], folded);
            let mut kept = 0;
            for i in 0..open.len() {
                let (t, sum) = (open[i], folded[i].widen());
                found[t as usize] = sum;
                if to < len && !(sum >= enough && sum > limits.least && sum < limits.most / 2.0) {
                    open[kept] = t;
                    if kept < i {
                        lanes[kept] = lanes[i];
                    }
                    kept += 1;
                }
            }
            open.truncate(kept);
            (from, to) = (to, len.min(4 * to));
        }
        &mut found[..count]
    }
}

/// The lanes of some seeds with the terms of more columns. They come and go as values, which the compiler keeps in registers; two seeds at a
/// time, so that additions to the lanes of one do not wait for each other.
#[inline(always)]
fn added<S: Scalar, const G: usize>(
    mut lanes: [[S; LANES]; G],
    x: &[[S; LANES]],
    c: [&[[S; LANES]]; G],
    term: impl Fn(S, S) -> S,
) -> [[S; LANES]; G] {
    for (i, x) in x.iter().enumerate() {
        for g in 0..G {
            let c = &c[g][i];
            for l in 0..LANES {
                lanes[g][l] = lanes[g][l].add(term(x[l], c[l]));
            }
        }
    }
    lanes
}

/// All lanes of each seed in one: those 16, 8, 4, 2 and 1 apart, each step for all of some seeds, in vectors.
#[inline(always)]
fn fold<S: Scalar>(lanes: &[[S; LANES]], folded: &mut [S]) {
    let zero = S::of(0.0);
    for (lanes, folded) in lanes.chunks(FOLDED).zip(folded.chunks_mut(FOLDED)) {
        let (mut sixteen, mut eight, mut four) = ([[zero; 16]; FOLDED], [[zero; 8]; FOLDED], [[zero; 4]; FOLDED]);
        let count = lanes.len();
        halve(lanes, &mut sixteen[..count]);
        halve(&sixteen[..count], &mut eight[..count]);
        halve(&eight[..count], &mut four[..count]);
        for (of, folded) in four[..count].iter().zip(folded) {
            *folded = of[0].add(of[2]).add(of[1].add(of[3]));
        }
    }
}

#[inline(always)]
fn halve<S: Scalar, const N: usize, const M: usize>(from: &[[S; N]], to: &mut [[S; M]]) {
    for (from, to) in from.iter().zip(to) {
        *to = std::array::from_fn(|l| from[l].add(from[l + M]));
    }
}

/// The rows of all problems as a filter of seeds takes them, if so many passes are worth it and there is what filters.
pub(super) fn kept_rounded<'k, T: Element>(
    kept: &'k KeptRows,
    x: &View<'_, T>,
    norms: Option<&[f64]>,
    metric: Metric,
    passes: usize,
) -> Result<Option<&'k RoundedRows>> {
    let amx = Amx::find().filter(|_| worth_rounding(metric, x.rows.d, passes));
    let Some(amx) = amx else { return Ok(None) };
    kept.get_or_make(|| {
        let point =
            |b: usize, i: usize, out: &mut [[T::Filter; LANES]]| Measure::new(x, b, norms, metric).widened(i, out);
        RoundedRows::new(amx, [x.rows.b, x.rows.n, x.rows.d], point)
    })
}

/// Rows of a problem, and the seeds that they meet.
pub(super) struct Met<'a, T: Element> {
    pub measure: Measure<'a, T>,
    pub seeds: Seeds<T::Filter>,
    /// What finds seeds that are too far to count.
    pub filter: Option<Filter<'a>>,
    /// The column of `nearest` that has the distances to the seeds so far; none before there are any.
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
    let rows = host::items_per_task(steps).next_multiple_of(TILE).min(n.next_multiple_of(TILE));
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
        let (first, trials) = (self.first, self.trials);
        for (tile, nearest) in self.nearest.chunks_mut(TILE * trials).enumerate() {
            tile_of_rows(self.met, first + tile * TILE, trials, self.weights, self.scratch, nearest, self.potentials);
        }
    }
}

/// The rows of a tile meet the seeds that may count.
#[inline(always)]
fn tile_of_rows<T: Element>(
    met: &Met<'_, T>,
    first: usize,
    trials: usize,
    weights: Option<&[f64]>,
    scratch: &mut Scratch<T::Filter>,
    nearest: &mut [f64],
    potentials: &mut [u64],
) {
    let Met { measure, seeds, filter, slot, units } = met;
    let (b, n, count) = (measure.b, measure.x.rows.n, seeds.rows.len());
    let near_of = |nearest: &[f64]| slot.map_or(f64::INFINITY, |slot| nearest[slot]);
    let weight_of = |i: usize| weights.map_or(1.0, |weights| weights[b * n + i]);
    let counts = |near: f64, weight: f64| near > 0.0 && weight > 0.0;
    let Scratch { row, sums, all, listed } = scratch;
    let filtered = filter.is_some();
    if let Some(filter) = filter {
        let near = nearest.chunks_exact(trials).zip(first..).map(|(nearest, i)| {
            let near = near_of(nearest);
            counts(near, weight_of(i)).then_some(if measure.metric == Metric::Cosine { 2.0 * near } else { near })
        });
        filter.list(first, near, listed);
    }
    for (i, nearest) in (first..).zip(nearest.chunks_exact_mut(trials)) {
        let ahead = if filtered { listed.next(i + 1 - first).map(|next| first + next) } else { Some(i + 1) };
        if let Some(ahead) = ahead.filter(|&ahead| ahead < n) {
            prefetch(measure.x.row(b, ahead));
        }
        let own = if filtered { listed.of(i - first) } else { &all[..count] };
        let (near, weight) = (near_of(nearest), weight_of(i));
        let is = |&seed: &u32| seed as usize == i;
        if !counts(near, weight) || own.is_empty() && units.is_none() {
            // Nothing is drawn by its distance, or nothing has come nearer.
            nearest.fill(near);
        } else {
            let found = measure.find(i, near, seeds, own, row, sums);
            match *units {
                None => nearest[0] = found.iter().fold(near, |near, &found| near.min(found)),
                Some(units) => {
                    for (t, &found) in found.iter().enumerate().filter(|&(t, _)| !is(&seeds.rows[t])) {
                        nearest[t] = near.min(found);
                        potentials[t] += whole(nearest[t] * weight, units);
                    }
                }
            }
        }
        if let Some(t) = seeds.rows.iter().position(is) {
            nearest[units.map_or(0, |_| t)] = -1.0;
        }
    }
}
