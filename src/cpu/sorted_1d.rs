//! A whole fit of rows of one column: sorted once, a cluster is a range of them, and its sum the difference of two prefix
//! sums. A pass costs `k log n` instead of `k n`, and the results have the bits of any other fit.

use super::tensors::{lock, or, read_and_write, typed, write, Element, View};
use crate::{
    error::{Error, Result},
    fixed::{self, Scaled},
    host, launches,
    metric::Metric,
    request::OnChipFit,
};

/// Fits rows of one column by squared Euclidean distance, in f32 or less, unless their values or their terms are too far apart or
/// not numbers: whether it did.
pub(super) fn fit(fit: &OnChipFit<'_>) -> Result<bool> {
    let &OnChipFit { plan, x, summands, progress, max_iters, centroids, labels, .. } = fit;
    // Of these nobody else has any.
    let [first_nonfinite, max_abs, thresholds] =
        lock([&summands.first_nonfinite, &summands.max_abs, &progress.threshold]);
    let max_weight = summands.max_weight.as_ref().map(|w| lock([w]));
    if first_nonfinite.flat::<u32>()?.iter().any(|&row| row != u32::MAX) {
        return Ok(false);
    }
    typed!(x.dtype(), T => {
        let (max_abs, thresholds) = (max_abs.flat::<f64>()?, thresholds.flat::<f64>()?);
        let max_weight = max_weight.as_ref().map(|[w]| w.flat::<f64>()).transpose()?;
        let k = centroids.dims()[1];
        let shared = [&x.operand, or(summands.row_scale.as_ref(), &x.operand)];
        let fits = read_and_write(shared, centroids.into(), |[xs, factor], all: &mut [T]| {
            let view: View<'_, T> = xs.view(x)?;
            let factor = summands.row_scale.as_ref().map(|_| factor.flat::<f64>()).transpose()?;
            let starts = &*all;
            let fit = |b| {
                let weights = factor.zip(max_weight).map(|(f, w)| (&f[b * x.n..][..x.n], w[b]));
                let values = &mut (0..x.n).map(|i| view.row(b, i)[0].wide());
                let centroids = starts[b * k..][..k].iter().map(|c| c.wide()).collect();
                let round = &|mean| T::narrow(mean).wide();
                let line = Line::new(values, max_abs[b], weights, x.b == 1)?;
                Ok::<_, Error>(line.and_then(|line| line.lloyd(centroids, thresholds[b], max_iters, round)))
            };
            let fits = host::map("fit", x.b, 32 * x.n, fit)?;
            let fits = fits.into_iter().collect::<Result<Option<Vec<_>>>>()?;
            if let Some(fits) = &fits {
                let centroids = fits.iter().flat_map(|fit| &fit.centroids);
                all.iter_mut().zip(centroids).for_each(|(to, &c)| *to = T::narrow(c));
            }
            Ok::<_, Error>(fits)
        })??;
        let Some(fits) = fits else { return Ok(false) };
        launches::record(plan.name(), x.dtype().as_str());
        write(labels, |all: &mut [u32]| {
            let rows = all.chunks_mut(x.n).zip(&fits).collect();
            let copy = |_: &mut (), (row, fit): (&mut [u32], &Fitted)| {
                row.copy_from_slice(&fit.labels);
                Ok(())
            };
            host::for_each(rows, x.n / 8, || (), copy)
        })??;
        write(&progress.stop, |all: &mut [u32]| {
            all.iter_mut().zip(&fits).for_each(|(stop, fit)| *stop = fit.stop.unwrap_or(*stop));
        })?;
        Ok(true)
    })
}

/// The values of a problem, ascending.
struct Line {
    values: Vec<f64>,
    /// The number of the row that each comes from.
    rows: Vec<u32>,
    /// Sums of the terms before each place, and their scale.
    sums: (Vec<i128>, i32),
    /// The same of the weights, if there are any.
    weights: Option<(Vec<i128>, i32)>,
}

struct Fitted {
    /// As they are stored, widened.
    centroids: Vec<f64>,
    labels: Vec<u32>,
    /// The iteration in which it converged.
    stop: Option<u32>,
}

impl Line {
    /// `max_abs` bounds the terms; weights come with the largest of them. None where a term is no integer of the scale. A problem
    /// that is `alone` is sorted by all threads; one that waited for others would meanwhile begin with a third.
    fn new(
        values: &mut dyn Iterator<Item = f64>,
        max_abs: f64,
        weights: Option<(&[f64], f64)>,
        alone: bool,
    ) -> Result<Option<Self>> {
        let mut sorted: Vec<(f64, u32)> = values.zip(0..).collect();
        let by_value = |a: &(f64, u32), b: &(f64, u32)| a.0.total_cmp(&b.0);
        if alone {
            host::sort(&mut sorted, by_value)?;
        } else {
            sorted.sort_unstable_by(by_value);
        }
        let (values, rows): (Vec<f64>, Vec<u32>) = sorted.into_iter().unzip();
        let prefix = |bound, term: &dyn Fn(usize) -> f64| {
            let scale = fixed::scale(bound, values.len());
            let mut sum = 0;
            let before = (0..values.len()).map(|i| {
                sum += fixed::quantise(term(i), scale)?;
                Some(sum)
            });
            Some((std::iter::once(Some(0)).chain(before).collect::<Option<_>>()?, scale))
        };
        let weight = |i: usize| weights.map_or(1.0, |(w, _)| w[rows[i] as usize]);
        let Some(sums) = prefix(max_abs, &|i| values[i] * weight(i)) else { return Ok(None) };
        let of_weights = match weights {
            Some((_, max_weight)) => match prefix(max_weight, &weight) {
                None => return Ok(None),
                some => some,
            },
            None => None,
        };
        Ok(Some(Self { sums, weights: of_weights, values, rows }))
    }

    /// `round` rounds to the stored type.
    fn lloyd(
        &self,
        mut centroids: Vec<f64>,
        threshold: f64,
        max_iters: usize,
        round: &dyn Fn(f64) -> f64,
    ) -> Option<Fitted> {
        let mut ends = self.assign(&centroids)?;
        let mut stop = None;
        for iteration in 1..=max_iters {
            let mut most = 0f64;
            for &(j, begin, end) in &ends {
                let Some(mean) = self.mean(begin, end) else { continue };
                let (old, new) = (centroids[j], round(mean));
                most = most.max((new - old) * (new - old));
                centroids[j] = new;
            }
            ends = self.assign(&centroids)?;
            if most <= threshold {
                stop = Some(iteration as u32);
                break;
            }
        }
        let mut labels = vec![0; self.rows.len()];
        for &(j, begin, end) in &ends {
            self.rows[begin..end].iter().for_each(|&row| labels[row as usize] = j as u32);
        }
        Some(Fitted { centroids, labels, stop })
    }

    /// The weighted mean of a range; none of no weight.
    fn mean(&self, begin: usize, end: usize) -> Option<f64> {
        let range_sum = |(sums, scale): &(Vec<i128>, i32)| Scaled::of(sums[end] - sums[begin], *scale);
        let weight = self.weights.as_ref().map_or_else(|| Scaled::of((end - begin) as i128, 0), range_sum);
        weight.is_positive().then(|| range_sum(&self.sums).over(weight))
    }

    /// The range of each centroid that has rows. None where a centroid is no number, or neighbouring ones are so near each other that their distances
    /// to a far value may round to the same: ranges end where distances cross only if they are different elsewhere.
    fn assign(&self, centroids: &[f64]) -> Option<Vec<(usize, usize, usize)>> {
        let mut sorted: Vec<(f64, usize)> = centroids.iter().copied().zip(0..).collect();
        if sorted.iter().any(|(c, _)| !c.is_finite()) {
            return None;
        }
        // Of equal centroids the first has all rows; -0 equals 0.
        sorted.sort_unstable_by(|a, b| (a.0 + 0.0).total_cmp(&(b.0 + 0.0)).then(a.1.cmp(&b.1)));
        sorted.dedup_by(|next, first| next.0 == first.0);
        let far = |v: Option<&f64>| v.map_or(0.0, |v| v.abs());
        let reach = far(self.values.first()).max(far(self.values.last()));
        let mut begin = 0;
        let mut ranges = Vec::with_capacity(sorted.len());
        for (i, &(c, j)) in sorted.iter().enumerate() {
            let end = match sorted.get(i + 1) {
                None => self.values.len(),
                Some(&(next, other)) => {
                    if next - c <= (reach + c.abs().max(next.abs())) * 2f64.powi(-48) {
                        return None;
                    }
                    let distance = |c, x| Metric::SquaredEuclidean.distance(std::iter::once((x, c)));
                    let stays = |&x: &f64| {
                        let (here, there) = (distance(c, x), distance(next, x));
                        here < there || here == there && j < other
                    };
                    begin + self.values[begin..].partition_point(stays)
                }
            };
            if begin < end {
                ranges.push((j, begin, end));
            }
            begin = end;
        }
        Some(ranges)
    }
}
