//! Globally optimal clusters of rows of one column.
//!
//! A cluster of an optimum is a range of the sorted values, so that dynamic programming over their cuts finds one (Wang and Song 2011,
//! "Ckmeans.1d.dp"). The best last cut does not go back as values are added, by which divide and conquer needs
//! `k n log n` costs instead of `k n^2` (Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D").

use crate::{error::Result, host, primitives, rows::Rows};
use candle_core::{DType, Tensor};

/// Bits of the largest weight.
const WEIGHT_BITS: i32 = 24;
/// Steps that a cost takes, in those of [`host::map`].
const COST_STEPS: usize = 16;

/// The means of an optimum, `(b, k, 1)`, ascending. `weights` are f64 `(b, n)`: what is not above 0 counts for nothing. Where there are fewer
/// values than clusters, the others are the largest value again; where nothing counts, all are the first row.
pub(crate) fn means(x: &Rows, k: usize, weights: Option<&Tensor>) -> Result<Tensor> {
    let all = Tensor::arange(0, x.n as u32, x.device())?.broadcast_as((x.b, x.n))?.contiguous()?;
    let rows = primitives::gather(x, &all)?;
    let values = rows.to_dtype(DType::F64)?.reshape((x.b, x.n))?.to_vec2::<f64>()?;
    let weights = weights.map(|w| w.to_vec2::<f64>()).transpose()?;
    let log = (usize::BITS - x.n.leading_zeros()) as usize;
    let means = host::map("optimal", x.b, COST_STEPS * k * x.n * log, |b| {
        let counted = |i: &usize| values[b][*i].is_finite() && weights.as_ref().is_none_or(|w| w[b][*i] > 0.0);
        let weight = |i: usize| weights.as_ref().map_or(1.0, |w| w[b][i]);
        let points: Vec<_> = (0..x.n).filter(counted).map(|i| (values[b][i], weight(i))).collect();
        Ok(if points.is_empty() { vec![values[b][0]; k] } else { optimum(points, k) })
    })?;
    let means = means.into_iter().collect::<Result<Vec<_>>>()?.concat();
    Ok(Tensor::from_vec(means, (x.b, k, 1), x.device())?.to_dtype(rows.dtype())?)
}

/// The means of the clusters of an optimum of values with weights. Of cuts that are equally good the first are taken.
fn optimum(mut points: Vec<(f64, f64)>, k: usize) -> Vec<f64> {
    points.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    // -0 equals 0.
    points.dedup_by(|next, first| {
        let same = next.0 == first.0;
        first.1 += if same { next.1 } else { 0.0 };
        same
    });
    let mut ends = match points.len() <= k {
        true => (1..=points.len()).collect(),
        false => Costs::new(&points).ends(k),
    };
    ends.resize(k, points.len());
    let mut begin = 0;
    let mean = |end: usize| {
        let own = if begin < end { &points[begin..end] } else { &points[end - 1..end] };
        begin = end;
        // From a value of the cluster on, so that far from 0 no bits are lost.
        let (first, total) = (own[0].0, own.iter().map(|p| p.1).sum::<f64>());
        first + own.iter().map(|(value, weight)| (value - first) * (weight / total)).sum::<f64>()
    };
    ends.into_iter().map(mean).collect()
}

/// The sums before each value, of weights, values and squares, in whole units: differences of sums are exact, however near each other values
/// lie and however far from the others.
struct Costs {
    before: Vec<(i128, i128, i128)>,
}

impl Costs {
    fn new(points: &[(f64, f64)]) -> Self {
        let n = points.len();
        let (least, most) = (points[0].0, points[n - 1].0);
        let heaviest = points.iter().map(|p| p.1).fold(0.0, f64::max);
        let even = points.iter().all(|p| p.1 == heaviest);
        let weight_bits = if even { 1 } else { WEIGHT_BITS };
        // A sum of squares has to fit.
        let bits = ((126 - (usize::BITS - n.leading_zeros()) as i32 - weight_bits) / 2).min(52);
        let unit = |value: f64| {
            // In halves, as the range may be beyond an f64.
            let share = (value / 2.0 - least / 2.0) / (most / 2.0 - least / 2.0);
            (share * 2f64.powi(bits)).round() as i128
        };
        let weight = |w: f64| match even {
            true => 1,
            false => (w / heaviest * 2f64.powi(weight_bits)).round().max(1.0) as i128,
        };
        let (mut before, mut sums) = (Vec::with_capacity(n + 1), (0, 0, 0));
        before.push(sums);
        for &(value, w) in points {
            let (v, w) = (unit(value), weight(w));
            sums = (sums.0 + w, sums.1 + w * v, sums.2 + w * v * v);
            before.push(sums);
        }
        Self { before }
    }

    /// The squared distances of the values in `begin..end` from their mean, added up.
    fn of(&self, begin: usize, end: usize) -> f64 {
        let (from, to) = (self.before[begin], self.before[end]);
        let (weight, sum, squares) = (to.0 - from.0, to.1 - from.1, to.2 - from.2);
        // From a whole number near the mean, and then from the mean.
        let centre = (sum as f64 / weight as f64) as i128;
        let rest = sum - centre * weight;
        let beyond = rest as f64;
        ((squares - centre * (sum + rest)) as f64 - beyond * beyond / weight as f64).max(0.0)
    }

    /// The ends of `k` clusters of more values than that.
    fn ends(&self, k: usize) -> Vec<usize> {
        let n = self.before.len() - 1;
        // The least cost of the first values in so many clusters, and where the last of these begins.
        let mut least: Vec<f64> = (0..n).map(|i| self.of(0, i + 1)).collect();
        let mut begins = Vec::with_capacity(k);
        for clusters in 1..k {
            let (mut next, mut begin) = (vec![f64::INFINITY; n], vec![0u32; n]);
            // Ranges of last values, and of where their clusters may begin.
            let mut left = vec![(clusters..n, clusters..n)];
            while let Some((lasts, firsts)) = left.pop() {
                if lasts.is_empty() {
                    continue;
                }
                let last = (lasts.start + lasts.end) / 2;
                for first in firsts.start..firsts.end.min(last + 1) {
                    let cost = least[first - 1] + self.of(first, last + 1);
                    if cost < next[last] {
                        (next[last], begin[last]) = (cost, first as u32);
                    }
                }
                let best = begin[last] as usize;
                left.push((lasts.start..last, firsts.start..best + 1));
                left.push((last + 1..lasts.end, best..firsts.end));
            }
            least = next;
            begins.push(begin);
        }
        let mut end = n;
        let mut ends = vec![n];
        for begin in begins.iter().rev() {
            end = begin[end - 1] as usize;
            ends.push(end);
        }
        ends.reverse();
        ends
    }
}
