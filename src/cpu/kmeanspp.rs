//! Steps of k-means++: a race among rows, and the trial of those that won it.

use super::{
    rows::distance,
    scalar::Scalar,
    tensors::{or, read_and_write, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    request::KmeansppStep,
    rng::{race_key_below, Draw, RACED},
    spread::{spread, units, whole, Limits, LANES},
};
use pulp::NullaryFnOnce;

/// Steps that a row of a race takes, most of which end before the logarithm.
const RACE_STEPS: usize = 12;

/// Rows of a task at least, of which each has its own potentials.
const LEAST_ROWS: usize = 16;

/// Columns that are added up before a row asks whether a seed is too far to count.
const CHECKED: usize = 4 * LANES;

pub(crate) fn kmeanspp_step(p: &KmeansppStep<'_>) -> Result<()> {
    let &KmeansppStep { x, nearest, slot, norms, weights, chosen, i, metric, draw } = p;
    let (n, trials, start) = (x.n, nearest.dim(2)?, i == 0);
    let count = if start { 1 } else { trials };
    // A distance to the last seed is nobody's probability.
    let last = i + 1 == chosen.dim(1)?;
    let mut slots = slot.to_vec1::<u32>()?;
    let picked = typed!(x.dtype(), T => {
        let inputs = [&x.operand, or(weights, &x.operand), or(norms, &x.operand)];
        read_and_write(inputs, nearest.into(), |[xs, ws, ns], nearest: &mut [f64]| {
            let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
            let norms = norms.map(|_| ns.flat::<f64>()).transpose()?;
            let drawn = race(nearest, &slots, weights, draw, [x.b, n, trials, count], start)?;
            let seeds = |(b, drawn): (usize, &Drawn)| Seeds::new(&xs, b, &drawn.lowest, norms, metric);
            let seeds: Vec<_> = drawn.iter().enumerate().map(seeds).collect();
            let mut best = vec![0; x.b];
            if count > 1 || !last {
                let rows = host::items_per_task(x.d * (1 + count / 4)).max(LEAST_ROWS).min(n);
                let parts = n.div_ceil(rows);
                let mut potentials = host::filled("k-means++", x.b * parts * trials, 0u64)?;
                let tasks = nearest.chunks_mut(n * trials).flat_map(|nearest| nearest.chunks_mut(rows * trials));
                let tasks: Vec<_> = tasks.zip(potentials.chunks_mut(trials)).enumerate().collect();
                let scratch = || vec![<T as Element>::Filter::of(0.0); x.d];
                host::for_each(tasks, rows * x.d * (1 + count / 4), scratch, |row, (task, (nearest, potentials))| {
                    let (b, first) = (task / parts, task % parts * rows);
                    let (slot, units) = (slots[b] as usize, units(drawn[b].most, n));
                    let trial = Trial {
                        x: &xs,
                        b,
                        first,
                        weights,
                        norms,
                        metric,
                        seeds: &seeds[b],
                        slot: (!start).then_some(slot),
                        trials,
                        units,
                        row,
                        nearest,
                        potentials,
                    };
                    pulp::Arch::new().dispatch(trial);
                    Ok(())
                })?;
                for (b, potentials) in potentials.chunks(parts * trials).enumerate() {
                    let potential = |t: &usize| potentials.iter().skip(*t).step_by(trials).sum::<u64>();
                    best[b] = (0..seeds[b].rows.len()).min_by_key(potential).unwrap_or(0);
                }
            }
            slots.iter_mut().zip(&best).for_each(|(slot, &best)| *slot = best as u32);
            Ok(seeds.iter().zip(best).map(|(seeds, best)| seeds.rows[best]).collect::<Vec<_>>())
        })?
    })?;
    slot.slice_set(&tensor(slots, x.b)?, 0, 0)?;
    chosen.slice_set(&tensor(picked, (x.b, 1))?, 1, i)?;
    Ok(())
}

/// What a race has drawn.
struct Drawn {
    /// The least keys, and the rows that have them, of equal ones the lower row first.
    lowest: Vec<(f64, u32)>,
    /// The largest that a row was drawn by.
    most: f64,
}

/// The `count` rows with the least keys of each problem: those that were drawn by what they weigh, but the first in any case.
fn race(
    nearest: &[f64],
    slots: &[u32],
    weights: Option<&[f64]>,
    draw: Draw,
    [b, n, trials, count]: [usize; 4],
    start: bool,
) -> Result<Vec<Drawn>> {
    let rows = host::items_per_task(RACE_STEPS).min(n);
    let parts = n.div_ceil(rows);
    let part = |task: usize| {
        let (b, first) = (task / parts, task % parts * rows);
        let mut drawn = Drawn { lowest: Vec::with_capacity(count + 1), most: 0.0 };
        for row in first..n.min(first + rows) {
            let at = b * n + row;
            let near = if start { 1.0 } else { nearest[at * trials + slots[b] as usize] };
            let weight = weights.map_or(1.0, |weights| weights[at]);
            let p = near * weight;
            drawn.most = if near > 0.0 && p > drawn.most { p } else { drawn.most };
            let full = drawn.lowest.len() == count;
            let bound = drawn.lowest.last().filter(|_| full).map_or(f64::INFINITY, |last| last.0);
            let Some(key) = race_key_below(bound, draw, b, row, near, weight) else { continue };
            if !full || key < bound {
                // Rows come in ascending order, so that one goes behind all of its key.
                let place = drawn.lowest.partition_point(|other| other.0 <= key);
                drawn.lowest.insert(place, (key, row as u32));
                drawn.lowest.truncate(count);
            }
        }
        drawn
    };
    let all = host::map("k-means++", b * parts, rows * RACE_STEPS, part)?;
    let of_problem = |parts: &[Drawn]| {
        let mut lowest: Vec<_> = parts.iter().flat_map(|part| part.lowest.iter().copied()).collect();
        lowest.sort_unstable_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
        lowest.truncate(count);
        let mut first = true;
        lowest.retain(|&(key, _)| std::mem::take(&mut first) || key <= RACED);
        Drawn { lowest, most: parts.iter().map(|part| part.most).fold(0.0, f64::max) }
    };
    Ok(all.chunks(parts).map(of_problem).collect())
}

/// The rows that are tried as seeds.
struct Seeds<S> {
    rows: Vec<u32>,
    /// `(rows, d)`, as distances take them.
    values: Vec<S>,
}

impl<S: Scalar> Seeds<S> {
    fn new<T: Element<Filter = S>>(
        x: &View<'_, T>,
        b: usize,
        drawn: &[(f64, u32)],
        norms: Option<&[f64]>,
        metric: Metric,
    ) -> Self {
        let rows: Vec<_> = drawn.iter().map(|&(_, row)| row).collect();
        let mut values = vec![S::of(0.0); rows.len() * x.rows.d];
        for (&row, values) in rows.iter().zip(values.chunks_exact_mut(x.rows.d)) {
            widened(x, b, row as usize, norms.filter(|_| metric == Metric::Cosine), values);
        }
        Self { rows, values }
    }
}

/// A row as distances take it: by its norm where there are norms.
#[inline(always)]
fn widened<T: Element>(x: &View<'_, T>, b: usize, i: usize, norms: Option<&[f64]>, out: &mut [T::Filter]) {
    T::filter_row(x.row(b, i), out);
    if let Some(norms) = norms {
        let inverse = T::Filter::of(1.0 / norms[b * x.rows.n + i]);
        out.iter_mut().for_each(|v| *v = v.mul(inverse));
    }
}

/// Some rows of a problem meet the seeds that are tried: what their distances become, and what they add to the potentials.
struct Trial<'a, T: Element> {
    x: &'a View<'a, T>,
    b: usize,
    first: usize,
    weights: Option<&'a [f64]>,
    norms: Option<&'a [f64]>,
    metric: Metric,
    seeds: &'a Seeds<T::Filter>,
    /// Where the distances to the seeds so far are; none before there are any.
    slot: Option<usize>,
    trials: usize,
    units: f64,
    /// Room for a row.
    row: &'a mut [T::Filter],
    nearest: &'a mut [f64],
    potentials: &'a mut [u64],
}

impl<T: Element> NullaryFnOnce for Trial<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match spread(self.metric) {
            Metric::Manhattan => self.run(|x, c| x.sub(c).abs()),
            _ => self.run(|x, c| {
                let t = x.sub(c);
                t.mul(t)
            }),
        }
    }
}

impl<T: Element> Trial<'_, T> {
    #[inline(always)]
    fn run(self, term: impl Fn(T::Filter, T::Filter) -> T::Filter) {
        let Self { x, b, first, seeds, slot, trials, units, row: scratch, potentials, .. } = self;
        let (n, d, metric) = (x.rows.n, x.rows.d, spread(self.metric));
        let norms = self.norms.filter(|_| metric == Metric::Cosine);
        let part = if norms.is_some() { 0.5 } else { 1.0 };
        // One alone is chosen whatever it leaves.
        let several = seeds.rows.len() > 1;
        let limits = if T::Filter::UNIT > 1e-10 { Limits::F32 } else { Limits::F64 };
        for (i, nearest) in (first..).zip(self.nearest.chunks_exact_mut(trials)) {
            let near = slot.map_or(f64::INFINITY, |slot| nearest[slot]);
            let weight = self.weights.map_or(1.0, |weights| weights[b * n + i]);
            if !(near > 0.0 && weight > 0.0) {
                // Nothing is drawn by its distance.
                nearest.iter_mut().for_each(|nearest| *nearest = near);
            } else {
                let row = match T::as_filter(x.row(b, i)).filter(|_| norms.is_none()) {
                    Some(row) => row,
                    None => {
                        widened(x, b, i, norms, scratch);
                        &*scratch
                    }
                };
                let tried = seeds.rows.iter().zip(seeds.values.chunks_exact(d));
                for (t, (&seed, values)) in tried.enumerate().filter(|&(_, (&seed, _))| seed as usize != i) {
                    let sum = sum(row, values, near / part, &limits, &term);
                    let found = if limits.hold(sum) {
                        sum * part
                    } else {
                        let defined = distance(x.row(b, i), x.row(b, seed as usize), metric);
                        if defined > 0.0 {
                            defined
                        } else {
                            0.0
                        }
                    };
                    nearest[t] = near.min(found);
                    if several {
                        potentials[t] += whole(nearest[t] * weight, units);
                    }
                }
            }
            for (t, _) in seeds.rows.iter().enumerate().filter(|&(_, &seed)| seed as usize == i) {
                nearest[t] = -1.0;
            }
        }
    }
}

/// The terms of all columns, added up in lanes; no more than those of the first ones where they come to `enough` already, since no term is
/// below zero and what is rounded to nearest keeps its order.
#[inline(always)]
fn sum<S: Scalar>(x: &[S], c: &[S], enough: f64, limits: &Limits, term: impl Fn(S, S) -> S) -> f64 {
    let (mut lanes, mut x, mut c) = ([S::of(0.0); LANES], x, c);
    while x.len() > CHECKED {
        let (first, others) = (x.split_at(CHECKED), c.split_at(CHECKED));
        lanes = added(lanes, first.0, others.0, &term);
        let total = folded(&lanes).widen();
        if total >= enough && total > limits.least && total < limits.most / 2.0 {
            return total;
        }
        (x, c) = (first.1, others.1);
    }
    let mut lanes = added(lanes, x, c, &term);
    let (rest, others) = (x.as_chunks::<LANES>().1, c.as_chunks::<LANES>().1);
    lanes.iter_mut().zip(rest.iter().zip(others)).for_each(|(lane, (&x, &c))| *lane = lane.add(term(x, c)));
    folded(&lanes).widen()
}

/// The lanes with the terms of columns that fill them. They come and go as values, which the compiler keeps in registers.
#[inline(always)]
fn added<S: Scalar>(mut lanes: [S; LANES], x: &[S], c: &[S], term: impl Fn(S, S) -> S) -> [S; LANES] {
    for (x, c) in x.as_chunks::<LANES>().0.iter().zip(c.as_chunks::<LANES>().0) {
        for l in 0..LANES {
            lanes[l] = lanes[l].add(term(x[l], c[l]));
        }
    }
    lanes
}

/// All lanes in one. It is not inlined, since that makes the compiler take narrower vectors for the loop before.
#[inline(never)]
fn folded<S: Scalar>(lanes: &[S; LANES]) -> S {
    let mut of = *lanes;
    for step in [16, 8, 4, 2, 1] {
        (0..step).for_each(|i| of[i] = of[i].add(of[i + step]));
    }
    of[0]
}
