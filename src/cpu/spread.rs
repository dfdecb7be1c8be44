//! The distances of a row to several seeds at once, as [`crate::spread`] defines them.
//!
//! Folding the lanes of a distance would take longer than its columns, since each addition waits for the one before: so all seeds' lanes
//! are filled first, and then folded side by side, where no addition waits for that of another seed. Rows are cut into the columns of all
//! lanes, the last ones of them zeros, whose terms add zero to what is not below it.

use super::{
    rows::distance,
    scalar::Scalar,
    tensors::{Element, View},
};
use crate::{
    metric::Metric,
    spread::{spread, Limits, LANES},
};

/// Columns of each lane that are added up before a row asks whether a seed is too far to count. It asks again after four times as many, and so
/// on.
const CHECKED: usize = 4;

/// Seeds whose lanes are folded side by side: so few that the compiler leaves the lanes of a seed together in a vector.
const FOLDED: usize = 4;

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
    pub metric: Metric,
}

/// Room for a row and its sums.
pub(super) struct Scratch<S> {
    row: Vec<[S; LANES]>,
    sums: Sums<S>,
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
    /// For so many seeds at once, at most.
    pub fn new(d: usize, seeds: usize) -> Self {
        let (zero, open) = (S::of(0.0), Vec::with_capacity(seeds));
        let sums = Sums { open, lanes: vec![[zero; LANES]; seeds], folded: vec![zero; seeds], found: vec![0.0; seeds] };
        Self { row: vec![[zero; LANES]; d.div_ceil(LANES)], sums }
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
    pub fn widened(&self, i: usize, out: &mut [[T::Filter; LANES]]) {
        let out = &mut out.as_flattened_mut()[..self.x.rows.d];
        T::filter_row(self.x.row(self.b, i), out);
        if let Some(norms) = self.norms {
            let inverse = T::Filter::of(1.0 / norms[self.b * self.x.rows.n + i]);
            out.iter_mut().for_each(|v| *v = v.mul(inverse));
        }
    }

    /// The distances of a row to the listed seeds, by the numbers of these; in the place of one that is not below `near`, any that is not.
    /// Those of seeds that are not listed are infinite.
    #[inline(always)]
    pub fn to_seeds<'s>(
        &self,
        i: usize,
        near: f64,
        seeds: &Seeds<T::Filter>,
        listed: &[u32],
        scratch: &'s mut Scratch<T::Filter>,
    ) -> &'s [f64] {
        let Scratch { row, sums } = scratch;
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
