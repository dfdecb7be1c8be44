//! Globally optimal clusters of rows of one column.
//!
//! A cluster of an optimum is a range of the sorted values, so that dynamic programming over their cuts finds one (Wang and Song 2011,
//! "Ckmeans.1d.dp"). The best last cut does not go back as values are added, by which divide and conquer needs
//! `k n log n` costs instead of `k n^2` (Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D").
//! Costs are first computed in f64, by vectors, and only those that may be the least within a proven bound are computed exactly.

use crate::{error::Result, host, primitives, rows::Rows};
use candle_core::{DType, Tensor};
use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Bits of the largest weight, at most.
const WEIGHT_BITS: i32 = 24;
/// Steps that a cost takes, in those of [`host::for_each`].
const COST_STEPS: usize = 2;
/// Numbers that are compared at a time.
const LANES: usize = 8;

/// The means of an optimum, `(b, k, 1)`, ascending. `weights` are f64 `(b, n)`: what is not above 0 counts for nothing. Where there are fewer
/// values than clusters, the others are the largest value again; where nothing counts, all are the first row that is finite.
pub(crate) fn means(x: &Rows, k: usize, weights: Option<&Tensor>) -> Result<Tensor> {
    let all = Tensor::arange(0, x.n as u32, x.device())?.broadcast_as((x.b, x.n))?.contiguous()?;
    let rows = primitives::gather(x, &all)?;
    let values = rows.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let weights = weights.map(|w| w.flatten_all()?.to_vec1::<f64>()).transpose()?;
    let mut means = host::filled("optimal", x.b * k, 0.0)?;
    let log = (usize::BITS - x.n.leading_zeros()) as usize;
    let problem = |solver: &mut Solver, (b, means): (usize, &mut [f64])| {
        let values = &values[b * x.n..][..x.n];
        let weights = weights.as_ref().map(|w| &w[b * x.n..][..x.n]);
        let points = values.iter().enumerate().map(|(i, &value)| (value, weights.map_or(1.0, |w| w[i])));
        if !solver.means(points, means)? {
            means.fill(values.iter().copied().find(|v| v.is_finite()).unwrap_or(values[0]));
        }
        Ok(())
    };
    let problems = means.chunks_exact_mut(k).enumerate().collect();
    host::for_each(problems, COST_STEPS * k * x.n * log, Solver::default, problem)?;
    Ok(Tensor::from_vec(means, (x.b, k, 1), x.device())?.to_dtype(rows.dtype())?)
}

/// Finds an optimum of a problem, in memory that the next one uses again.
#[derive(Default)]
pub(crate) struct Solver {
    /// Values with weights.
    points: Vec<(f64, f64)>,
    costs: Costs,
    /// The least cost of the first values in so many clusters, and in one more.
    least: Vec<f64>,
    next: Vec<f64>,
    /// Where the last of two, three and more clusters of the first values begins.
    begins: Vec<u32>,
    /// Ranges of last values, and of where their clusters may begin.
    left: Vec<(Range<usize>, Range<usize>)>,
    rough: Vec<f64>,
}

impl Solver {
    /// The means of an optimum of values with weights as [`means`] has them, and whether any value counts; if not, nothing is written.
    pub fn means(&mut self, points: impl Iterator<Item = (f64, f64)>, means: &mut [f64]) -> Result<bool> {
        self.points.clear();
        self.points.extend(points.filter(|&(value, weight)| value.is_finite() && weight > 0.0));
        let any = !self.points.is_empty();
        if any {
            self.optimum(means)?;
        }
        Ok(any)
    }

    /// The means of the clusters of an optimum of the points. Of cuts that are equally good the first are taken.
    fn optimum(&mut self, means: &mut [f64]) -> Result<()> {
        self.points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        // -0 equals 0.
        self.points.dedup_by(|next, first| {
            let same = next.0 == first.0;
            first.1 += if same { next.1 } else { 0.0 };
            same
        });
        let (n, k) = (self.points.len(), means.len());
        if n > k {
            self.begins.clear();
            host::reserve("optimal", &mut self.begins, (k - 1).saturating_mul(n))?;
            self.costs.reset(&self.points);
            Arch::new().dispatch(Cuts { solver: self, k });
        }
        let mut end = n;
        for j in (0..k).rev() {
            let begin = match n > k {
                true if j == 0 => 0,
                true => self.begins[(j - 1) * n + end - 1] as usize,
                // A value each, and the last again.
                false => j.min(n - 1),
            };
            end = if n > k { end } else { begin + 1 };
            let own = &self.points[begin..end];
            // From a value of the cluster on, so that far from 0 no bits are lost.
            let (first, total) = (own[0].0, own.iter().map(|p| p.1).sum::<f64>());
            means[j] = first + own.iter().map(|(value, weight)| (value - first) * (weight / total)).sum::<f64>();
            end = begin;
        }
        Ok(())
    }
}

/// The sums before each value, of weights, values and squares.
#[derive(Default)]
struct Costs {
    /// In whole units: differences of sums are exact, however near each other values lie and however far from the others.
    exact: Vec<(i128, i128, i128)>,
    /// The same rounded.
    weights: Vec<f64>,
    values: Vec<f64>,
    squares: Vec<f64>,
    /// Two candidates whose rough costs are farther apart have the order of their exact ones.
    slack: f64,
}

impl Costs {
    fn reset(&mut self, points: &[(f64, f64)]) {
        let n = points.len();
        let (least, most) = (points[0].0, points[n - 1].0);
        let heaviest = points.iter().map(|p| p.1).fold(0.0, f64::max);
        let even = points.iter().all(|p| p.1 == heaviest);
        let log = (usize::BITS - n.leading_zeros()) as i32;
        // A sum of weights is exact in f64.
        let weight_bits = if even { 1 } else { WEIGHT_BITS.min(52 - log) };
        // A sum of squares has to fit.
        let bits = ((126 - log - weight_bits) / 2).min(52);
        let unit = |value: f64| {
            // In halves, as the range may be beyond an f64.
            let share = (value / 2.0 - least / 2.0) / (most / 2.0 - least / 2.0);
            (share * 2f64.powi(bits)).round() as i128
        };
        let weight = |w: f64| match even {
            true => 1,
            false => (w / heaviest * 2f64.powi(weight_bits)).round().max(1.0) as i128,
        };
        let mut sums = (0, 0, 0);
        self.exact.clear();
        self.exact.push(sums);
        self.exact.extend(points.iter().map(|&(value, w)| {
            let (v, w) = (unit(value), weight(w));
            sums = (sums.0 + w, sums.1 + w * v, sums.2 + w * v * v);
            sums
        }));
        let rounded = |to: &mut Vec<f64>, of: fn(&(i128, i128, i128)) -> i128| {
            to.clear();
            to.extend(self.exact.iter().map(|sums| of(sums) as f64));
        };
        rounded(&mut self.weights, |sums| sums.0);
        rounded(&mut self.values, |sums| sums.1);
        rounded(&mut self.squares, |sums| sums.2);
        // With `u = 2^-53`, `W` the sum of all weights, below `1 / 2u`, and `V` the largest value, no sum of squares exceeds `W V^2`. A
        // difference of rounded sums is off by `3 u W V^2` (squares) or `e = 3 u W V` (values), by which the square of a sum `s <= w V`
        // over its weight `w >= 1` is off by `2 V e + e^2 / w <= 11 u W V^2`. What is computed with them adds 5 roundings, and
        // an exact cost is rounded 5 times: together less than `25 u W V^2` for each of two candidates.
        self.slack = 2f64.powi(6 - 53 + 2 * bits) * sums.0 as f64;
    }

    /// The squared distances of the values in `begin..end` from their mean, added up.
    fn of(&self, begin: usize, end: usize) -> f64 {
        let (from, to) = (self.exact[begin], self.exact[end]);
        let (weight, sum, squares) = (to.0 - from.0, to.1 - from.1, to.2 - from.2);
        // From a whole number near the mean, and then from the mean.
        let centre = (sum as f64 / weight as f64) as i128;
        let rest = sum - centre * weight;
        let beyond = rest as f64;
        ((squares - centre * (sum + rest)) as f64 - beyond * beyond / weight as f64).max(0.0)
    }

    /// The costs of the first values up to `end`, of which the last cluster begins in `firsts`, into `rough`; and the least of them.
    #[inline(always)]
    fn rough(&self, firsts: Range<usize>, end: usize, least: &[f64], rough: &mut [f64]) -> f64 {
        let (weight, value, square) = (self.weights[end], self.values[end], self.squares[end]);
        let before = self.weights[firsts.clone()].iter().zip(&self.values[firsts.clone()]).zip(&self.squares[firsts]);
        for ((out, ((w, v), s)), least) in rough.iter_mut().zip(before).zip(least) {
            let sum = value - v;
            *out = least + ((square - s) - sum * sum / (weight - w));
        }
        let mut lanes = [f64::INFINITY; LANES];
        let less = |least: &mut f64, cost: f64| *least = if cost < *least { cost } else { *least };
        let (chunks, rest) = rough.as_chunks::<LANES>();
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(least, &cost)| less(least, cost));
        }
        rest.iter().for_each(|&cost| less(&mut lanes[0], cost));
        lanes.into_iter().fold(f64::INFINITY, f64::min)
    }
}

/// Finds where `k` clusters of more values than that begin: a struct, so that it is compiled for the processor's vectors.
struct Cuts<'a> {
    solver: &'a mut Solver,
    k: usize,
}

impl WithSimd for Cuts<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Solver { points, costs, least, next, begins, left, rough } = self.solver;
        let n = points.len();
        least.clear();
        least.extend((0..n).map(|i| costs.of(0, i + 1)));
        // There is room.
        begins.resize((self.k - 1) * n, 0);
        rough.resize(n, 0.0);
        for (clusters, begins) in (1..self.k).zip(begins.chunks_exact_mut(n)) {
            next.clear();
            next.resize(n, f64::INFINITY);
            left.push((clusters..n, clusters..n));
            while let Some((lasts, firsts)) = left.pop() {
                if lasts.is_empty() {
                    continue;
                }
                let last = (lasts.start + lasts.end) / 2;
                let tried = firsts.start..firsts.end.min(last + 1);
                let (before, rough) = (&least[tried.start - 1..tried.end - 1], &mut rough[..tried.len()]);
                let limit = costs.rough(tried.clone(), last + 1, before, rough) + costs.slack;
                let mut best = tried.start;
                for (first, rough) in tried.step_by(LANES).zip(rough.chunks(LANES)) {
                    if !rough.iter().fold(false, |any, &cost| any | (cost <= limit)) {
                        continue;
                    }
                    for (first, _) in (first..).zip(rough).filter(|(_, &cost)| cost <= limit) {
                        let cost = least[first - 1] + costs.of(first, last + 1);
                        if cost < next[last] {
                            (next[last], best) = (cost, first);
                        }
                    }
                }
                begins[last] = best as u32;
                left.push((lasts.start..last, firsts.start..best + 1));
                left.push((last + 1..lasts.end, best..firsts.end));
            }
            std::mem::swap(least, next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    /// Rough costs change no cut: neither ties nor clusters that are tiny against the distance between them.
    #[test]
    fn cuts_are_those_of_exact_costs() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let mut solver = Solver::default();
        for case in 0..200 {
            let (n, k) = (rng.random_range(8..60), rng.random_range(2..8));
            let value = |rng: &mut rand_chacha::ChaCha8Rng| match case % 4 {
                0 => rng.random::<f64>(),
                1 => (n / 2 + rng.random_range(0..n)) as f64 * 0.1,
                2 => rng.random::<f64>() * 1e-9 + if rng.random() { 1e6 } else { 0.0 },
                _ => rng.random_range(-1e300..1e300),
            };
            let mut points: Vec<_> = (0..n).map(|_| (value(&mut rng), rng.random_range(1..4) as f64)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points.dedup_by(|a, b| a.0 == b.0);
            let n = points.len();
            solver.points = points;
            if n <= k {
                continue;
            }
            solver.optimum(&mut vec![0.0; k]).unwrap();
            let mut least: Vec<_> = (0..n).map(|i| solver.costs.of(0, i + 1)).collect();
            for (clusters, begins) in (1..k).zip(solver.begins.chunks_exact(n)) {
                let mut next = vec![f64::INFINITY; n];
                for last in clusters..n {
                    let cost = |first: usize| least[first - 1] + solver.costs.of(first, last + 1);
                    let all = (clusters..=last).map(cost);
                    next[last] = all.fold(f64::INFINITY, f64::min);
                    // Divide and conquer takes one of those that are equally good but for rounding.
                    let taken = cost(begins[last] as usize);
                    assert!(taken <= next[last] * (1.0 + 1e-14), "case {case}, {clusters}, {last}: {taken}");
                }
                least = next;
            }
        }
    }
}
