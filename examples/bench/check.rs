//! Results beside the definition: f64, plain loops, sums that lose nothing.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{Fit, KMeans, Metric};
use rayon::prelude::*;
use serde_json::{json, Map, Value};
use std::{cmp::Ordering, fmt};

/// Distances times columns that a check of labels may compute, about ten seconds; beyond, an even sample of rows is checked.
pub const BUDGET: f64 = 4e10;
/// Values that a check of a fit's means may read; beyond, its last iterations are checked.
const MEANS_BUDGET: f64 = 4e9;

/// A check found this of one kind of result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Found {
    pub wrong: usize,
    pub checked: usize,
    /// The largest of what the kind measures itself by
    pub worst: f64,
}

impl Found {
    /// `error` in units of what rounding allows; not a number where one of both sides is none.
    fn judge(&mut self, error: f64) {
        self.add(error > 1.0 || error.is_nan(), error);
    }

    fn add(&mut self, wrong: bool, worst: f64) {
        self.checked += 1;
        self.wrong += wrong as usize;
        self.worst = self.worst.max(if worst.is_nan() { f64::MAX } else { worst.min(f64::MAX) });
    }

    fn merge(&mut self, other: Self) {
        self.wrong += other.wrong;
        self.checked += other.checked;
        self.worst = self.worst.max(other.worst);
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Two runs gave the same bits
    pub same: bool,
    pub labels: Found,
    pub distances: Found,
    pub centroids: Found,
    pub counts: Found,
    pub inertia: Found,
}

impl Verdict {
    fn kinds(&self) -> [(&'static str, Found); 5] {
        let Self { labels, distances, centroids, counts, inertia, .. } = *self;
        [
            ("labels", labels),
            ("distances", distances),
            ("centroids", centroids),
            ("counts", counts),
            ("inertia", inertia),
        ]
    }

    pub fn wrong(&self) -> usize {
        self.kinds().iter().map(|(_, found)| found.wrong).sum()
    }

    pub fn checked(&self) -> usize {
        self.kinds().iter().map(|(_, found)| found.checked).sum()
    }

    pub fn is_right(&self) -> bool {
        self.same && self.wrong() == 0
    }

    /// For the line of a case.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        let mut put = |key: &str, value: Value| fields.insert(key.into(), value);
        put("reproducible", json!(self.same));
        put("wrong", json!(self.wrong()));
        put("checked", json!(self.checked()));
        for (kind, found) in self.kinds().into_iter().filter(|(_, found)| found.checked > 0) {
            put(&format!("wrong_{kind}"), json!(found.wrong));
        }
        if self.labels.checked > 0 {
            put("max_regret", json!(self.labels.worst));
        }
        if self.centroids.checked > 0 {
            put("max_error", json!(self.centroids.worst));
        }
        fields
    }

    /// Labels against those of the definition.
    pub fn labels(
        &mut self,
        x: &Tensor,
        centroids: &Tensor,
        labels: &Tensor,
        metric: Metric,
        budget: f64,
    ) -> Result<()> {
        self.nearest(x, centroids, &labels.unsqueeze(2)?, metric, budget)
    }

    /// The labels of the nearest centroids, `(b, n, m)`, against those of the definition.
    pub fn nearest(
        &mut self,
        x: &Tensor,
        centroids: &Tensor,
        labels: &Tensor,
        metric: Metric,
        budget: f64,
    ) -> Result<()> {
        self.labels.merge(judged(x, centroids, labels, metric, budget, |labels, distances| {
            let mut found = Found::default();
            for (&label, nearest) in labels.iter().zip(nearest(distances, labels.len())) {
                let regret = match distances.get(label as usize) {
                    _ if label as usize == nearest => 0.0,
                    Some(got) => (got - distances[nearest]) / distances[nearest].abs().max(f64::MIN_POSITIVE),
                    None => f64::NAN,
                };
                found.add(label as usize != nearest, regret);
            }
            found
        })?);
        Ok(())
    }

    /// The distances to all centroids, `(b, n, k)`, against those of the definition, rounded to their type.
    pub fn distances(
        &mut self,
        x: &Tensor,
        centroids: &Tensor,
        distances: &Tensor,
        metric: Metric,
        budget: f64,
    ) -> Result<()> {
        let single = distances.dtype() == DType::F32;
        self.distances.merge(judged(x, centroids, distances, metric, budget, |got, distances| {
            let mut found = Found::default();
            for (&got, &want) in got.iter().zip(distances) {
                let want = if single { f64::from(want as f32) } else { want };
                found.add(got != want && !(got.is_nan() && want.is_nan()), (got - want).abs());
            }
            found
        })?);
        Ok(())
    }

    /// The means of an update, 0 where a cluster has no rows.
    pub fn means(&mut self, x: &Tensor, labels: &Tensor, means: &Tensor) -> Result<()> {
        self.update(x, None, labels, [&means.zeros_like()?, means], Metric::SquaredEuclidean, |_| true)
    }

    /// `new` centroids against those that the definition makes of `labels`: the `old` ones where a cluster has no row, or where a
    /// problem was not `active`.
    fn update(
        &mut self,
        x: &Tensor,
        weights: Option<&Tensor>,
        labels: &Tensor,
        [old, new]: [&Tensor; 2],
        metric: Metric,
        active: impl Fn(usize) -> bool + Sync,
    ) -> Result<()> {
        let (b, _, d) = x.dims3()?;
        let (k, dtype) = (new.dim(1)?, new.dtype());
        let labels = labels.to_device(&Device::Cpu)?.to_vec2::<u32>()?;
        for (problem, labels) in labels.iter().enumerate().take(b) {
            let of = |t: &Tensor| host(&t.get(problem)?);
            let (x, old, new, weights) = (of(x)?, of(old)?, of(new)?, weights.map(of).transpose()?);
            let mut members = vec![vec![]; k];
            for (row, &label) in labels.iter().enumerate() {
                // A label out of range is wrong already.
                if let Some(members) = members.get_mut(label as usize) {
                    members.push(row);
                }
            }
            let cluster = |j: usize| {
                let weigh = |row: usize| weights.as_ref().map_or(1.0, |weights| weights[row]);
                let rows: Vec<_> = members[j].iter().map(|&row| (&x[row * d..][..d], weigh(row))).collect();
                let expected = if active(problem) { centroid(&rows, metric) } else { None };
                let mut found = Found::default();
                for (c, &got) in new[j * d..][..d].iter().enumerate() {
                    let (value, noise) = expected.as_ref().map_or((old[j * d + c], 0.0), |expected| expected[c]);
                    let allowed = spacing(value, dtype) + value.abs() * 2f64.powi(-50) + noise;
                    found.judge(if got == value { 0.0 } else { (got - value).abs() / allowed });
                }
                found
            };
            let clusters: Vec<_> = (0..k).into_par_iter().map(cluster).collect();
            clusters.into_iter().for_each(|found| self.centroids.merge(found));
        }
        Ok(())
    }

    /// A fit, iteration by iteration: centroids must follow from the labels before them, and labels from their centroids.
    pub fn fit(&mut self, x: &Tensor, weights: Option<&Tensor>, settings: &KMeans, fit: &Fit) -> Result<()> {
        let n_iter = fit.n_iter.flatten_all()?.to_vec1::<u32>()?;
        let last = n_iter.iter().copied().max().unwrap_or(0) as usize;
        let steps = ((MEANS_BUDGET / x.elem_count() as f64) as usize).clamp(1, last.max(1)).min(last);
        let budget = BUDGET / (steps + 1) as f64;
        let until = |iterations: usize| match iterations == last {
            true => Ok(fit.clone()),
            false => settings.clone().max_iters(iterations).fit(x),
        };
        let mut before = until(last - steps)?;
        self.labels(x, &before.centroids, &before.labels, fit.metric, budget)?;
        for iteration in last - steps + 1..=last {
            let after = until(iteration)?;
            let active = |problem: usize| iteration <= n_iter[problem] as usize;
            let centroids = [&before.centroids, &after.centroids];
            self.update(x, weights, &before.labels, centroids, fit.metric, active)?;
            self.labels(x, &after.centroids, &after.labels, fit.metric, budget)?;
            before = after;
        }
        self.totals(x, weights, fit)
    }

    /// Counts and inertia against those of the fit's own labels and centroids.
    pub fn totals(&mut self, x: &Tensor, weights: Option<&Tensor>, fit: &Fit) -> Result<()> {
        let (b, n, d) = x.dims3()?;
        let k = fit.centroids.dim(1)?;
        let labels = fit.labels.to_device(&Device::Cpu)?.to_vec2::<u32>()?;
        let counts = fit.counts.to_device(&Device::Cpu)?.to_vec2::<u32>()?;
        for problem in 0..b {
            let of = |t: &Tensor| host(&t.get(problem)?);
            let (x, c, weights) = (of(x)?, of(&fit.centroids)?, weights.map(of).transpose()?);
            let inertia = host(&fit.inertia.get(problem)?)?[0];
            let labels: Vec<usize> = labels[problem].iter().map(|&label| label as usize).collect();
            let mut expected = vec![0u32; k];
            labels.iter().filter(|&&label| label < k).for_each(|&label| expected[label] += 1);
            for (&got, expected) in counts[problem].iter().zip(expected) {
                self.counts.add(got != expected, 0.0);
            }
            let cost = |i: usize| {
                let centroid = c.chunks_exact(d).nth(labels[i]);
                let distance = centroid.map_or(f64::NAN, |c| distances(&x[i * d..][..d], c, fit.metric)[0]);
                distance * weights.as_ref().map_or(1.0, |weights| weights[i])
            };
            let costs: Vec<f64> = (0..n).into_par_iter().map(cost).collect();
            let (expected, size) = (sum(costs.iter().copied()), sum(costs.iter().map(|cost| cost.abs())));
            let allowed = size * 2f64.powi(-45);
            self.inertia.judge(if inertia == expected { 0.0 } else { (inertia - expected).abs() / allowed });
        }
        Ok(())
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} of {} wrong", self.wrong(), self.checked())?;
        if self.labels.worst > 0.0 {
            write!(f, ", max_regret {:.1e}", self.labels.worst)?;
        }
        if self.centroids.checked > 0 {
            write!(f, ", max_error {:.2}", self.centroids.worst)?;
        }
        f.write_str(if self.same { ", reproducible" } else { ", NOT REPRODUCIBLE" })
    }
}

/// From a row to each of the centroids of (d, k).
fn distances(row: &[f64], c: &[f64], metric: Metric) -> Vec<f64> {
    let k = c.len() / row.len();
    let (mut sum, mut square) = (vec![0f64; k], vec![0f64; k]);
    for (x, c) in row.iter().zip(c.chunks_exact(k)) {
        for ((s, q), c) in sum.iter_mut().zip(&mut square).zip(c) {
            match metric {
                Metric::SquaredEuclidean => *s += (x - c) * (x - c),
                Metric::Manhattan => *s += (x - c).abs(),
                _ => *s += x * c,
            }
            if metric == Metric::Cosine {
                *q += c * c;
            }
        }
    }
    let norm = norm(row);
    for (s, q) in sum.iter_mut().zip(square) {
        match metric {
            Metric::Dot => *s = -*s,
            Metric::Cosine => *s = if norm * q.sqrt() == 0.0 { 1.0 } else { 1.0 - *s / (norm * q.sqrt()) },
            _ => {}
        }
    }
    sum
}

/// What is found of results `(b, n, any)` beside the distances of each row to all centroids: of an even sample of rows, where the budget
/// is for no more.
fn judged(
    x: &Tensor,
    centroids: &Tensor,
    results: &Tensor,
    metric: Metric,
    budget: f64,
    judge: impl Fn(&[f64], &[f64]) -> Found + Sync,
) -> Result<Found> {
    let ((b, n, d), (k, each)) = (x.dims3()?, (centroids.dim(1)?, results.dim(2)?));
    let take = ((budget / (b * k * d) as f64) as usize).clamp(16, n.max(16)).min(n);
    let rows: Vec<u32> = (0..take).map(|i| (i as u64 * n as u64 / take as u64) as u32).collect();
    let rows = Tensor::new(&rows[..], x.device())?;
    let (x, results) = (host(&x.index_select(&rows, 1)?)?, host(&results.index_select(&rows, 1)?)?);
    // (b, d, k): centroids side by side, each summed in the order of the columns.
    let c = host(&centroids.transpose(1, 2)?)?;
    let found = (0..b * take).into_par_iter().map(|i| {
        let distances = distances(&x[i * d..][..d], &c[i / take * k * d..][..k * d], metric);
        judge(&results[i * each..][..each], &distances)
    });
    Ok(found.reduce(Found::default, |mut a, b| {
        a.merge(b);
        a
    }))
}

/// The `m` nearest, by distance and then by index; a distance that is not a number is infinite.
fn nearest(distances: &[f64], m: usize) -> Vec<usize> {
    let far = |j: &usize| if distances[*j].is_nan() { f64::INFINITY } else { distances[*j] };
    let by = |i: &usize, j: &usize| far(i).partial_cmp(&far(j)).unwrap_or(Ordering::Equal).then(i.cmp(j));
    let mut all: Vec<usize> = (0..distances.len()).collect();
    if m < all.len() {
        all.select_nth_unstable_by(m, by);
        all.truncate(m);
    }
    all.sort_unstable_by(by);
    all
}

/// The centroid of rows with weights, each component with what f64 may have lost of it; none where nothing has a weight.
fn centroid(rows: &[(&[f64], f64)], metric: Metric) -> Option<Vec<(f64, f64)>> {
    let rows: Vec<_> = rows.iter().copied().filter(|(_, weight)| *weight > 0.0).collect();
    let (d, weight) = (rows.first()?.0.len(), sum(rows.iter().map(|(_, weight)| *weight)));
    if metric == Metric::Manhattan {
        return Some(
            (0..d).map(|c| (median(rows.iter().map(|(row, w)| (row[c], *w)).collect(), weight), 0.0)).collect(),
        );
    }
    let share = |(row, weight): &(&[f64], f64)| match (metric, norm(row)) {
        (Metric::Cosine, 0.0) => 0.0,
        (Metric::Cosine, norm) => weight / norm,
        _ => *weight,
    };
    let shares: Vec<f64> = rows.iter().map(share).collect();
    let terms = |c: usize| rows.iter().zip(&shares).map(move |((row, _), share)| row[c] * share);
    let totals: Vec<f64> = (0..d).map(|c| sum(terms(c))).collect();
    let divisor = if metric == Metric::Cosine { norm(&totals) } else { weight };
    // Terms that are values themselves are not rounded before they are added.
    let lost = if shares.iter().all(|&share| share == 1.0) { 2f64.powi(-90) } else { 2f64.powi(-45) };
    let noise = |c: usize| lost * sum(terms(c).map(f64::abs)) / divisor;
    (divisor > 0.0).then(|| totals.iter().enumerate().map(|(c, total)| (total / divisor, noise(c))).collect())
}

/// The lower median of values with weights.
fn median(mut values: Vec<(f64, f64)>, weight: f64) -> f64 {
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut below = 0.0;
    let mut reaches_half = |(_, w): &&(f64, f64)| {
        below += w;
        2.0 * below >= weight
    };
    values.iter().find(&mut reaches_half).or(values.last()).map_or(f64::NAN, |(value, _)| *value)
}

/// A sum as good as rounded once (Neumaier 1974).
fn sum(terms: impl Iterator<Item = f64>) -> f64 {
    let (mut sum, mut lost) = (0f64, 0.0);
    for term in terms {
        let next = sum + term;
        lost += if sum.abs() >= term.abs() { (sum - next) + term } else { (term - next) + sum };
        sum = next;
    }
    if lost.is_finite() {
        sum + lost
    } else {
        sum
    }
}

fn norm(row: &[f64]) -> f64 {
    row.iter().fold(0.0, |s, v| s + v * v).sqrt()
}

/// Between neighbouring numbers of a dtype at `value`.
fn spacing(value: f64, dtype: DType) -> f64 {
    let (bits, least) = match dtype {
        DType::F16 => (10, -24),
        DType::BF16 => (7, -133),
        DType::F32 => (23, -149),
        _ => (52, -1074),
    };
    let exponent = ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023;
    2f64.powi((exponent - bits).max(least))
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

pub fn same_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    // Widening keeps every bit of the narrower types.
    let bits = |t: &Tensor| Ok::<_, anyhow::Error>(host(t)?.into_iter().map(f64::to_bits).collect::<Vec<_>>());
    Ok(bits(a)? == bits(b)?)
}

pub fn same_fit(a: &Fit, b: &Fit) -> Result<bool> {
    let parts = |fit: &Fit| [&fit.labels, &fit.centroids, &fit.counts, &fit.inertia, &fit.n_iter].map(Tensor::clone);
    let pairs = parts(a).into_iter().zip(parts(b));
    Ok(pairs.map(|(a, b)| same_bits(&a, &b)).collect::<Result<Vec<_>>>()?.into_iter().all(|same| same))
}
