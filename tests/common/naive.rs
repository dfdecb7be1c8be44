//! The specification: what the crate computes, in f64 with plain loops. Every suite judges by this file.
use super::sum;
use candle_flash_kmeans::Metric;

/// A matrix, row by row.
pub type Rows = Vec<Vec<f64>>;

pub fn distance(x: &[f64], c: &[f64], metric: Metric) -> f64 {
    let (mut squares, mut differences, mut dot, mut xx, mut cc) = (0.0, 0.0, 0.0, 0.0f64, 0.0f64);
    for (x, c) in x.iter().zip(c) {
        squares += (x - c) * (x - c);
        differences += (x - c).abs();
        (dot, xx, cc) = (dot + x * c, xx + x * x, cc + c * c);
    }
    match metric {
        Metric::SquaredEuclidean => squares,
        Metric::Manhattan => differences,
        Metric::Dot => -dot,
        _ if xx.sqrt() * cc.sqrt() == 0.0 => 1.0,
        _ => 1.0 - dot / (xx.sqrt() * cc.sqrt()),
    }
}

pub fn labels(x: &Rows, c: &Rows, metric: Metric) -> Vec<u32> {
    let mut best = vec![(f64::INFINITY, 0); x.len()];
    for (x, best) in x.iter().zip(&mut best) {
        for (j, c) in c.iter().enumerate() {
            let d = distance(x, c, metric);
            *best = if d < best.0 { (d, j as u32) } else { *best };
        }
    }
    best.into_iter().map(|b| b.1).collect()
}

/// New centroids for rows of weights `w`; `old` where a cluster has no weight.
pub fn update(x: &Rows, w: &[f64], labels: &[u32], old: &Rows, metric: Metric) -> Rows {
    let (mut new, norm) = (old.clone(), |v: &[f64]| sum(v.iter().map(|t| t * t)).sqrt());
    let shrink = |x: &[f64]| if metric == Metric::Cosine && norm(x) > 0.0 { norm(x) } else { 1.0 };
    for (j, new) in new.iter_mut().enumerate() {
        let mut members: Vec<_> = (0..x.len()).filter(|&i| labels[i] as usize == j && w[i] > 0.0).collect();
        let weight = sum(members.iter().map(|&i| w[i]));
        let mut v: Vec<_> =
            (0..new.len()).map(|c| sum(members.iter().map(|&i| x[i][c] * w[i] / shrink(&x[i])))).collect();
        let divisor = if metric == Metric::Cosine { norm(&v) } else { weight };
        v.iter_mut().for_each(|v| *v /= divisor);
        for c in (0..new.len()).filter(|_| metric == Metric::Manhattan && weight > 0.0) {
            members.sort_by(|&i, &j| x[i][c].total_cmp(&x[j][c]));
            let mut below = 0.0;
            v[c] = x[*members.iter().find(|&&i| (below += w[i], 2.0 * below >= weight).1).unwrap()][c];
        }
        *new = if divisor > 0.0 { v } else { new.clone() };
    }
    new
}

/// Lloyd from `c`, values stored through `store`: centroids, labels, updates made, converged.
pub fn fit(x: &Rows, w: &[f64], mut c: Rows, how: (Metric, usize, f64), store: impl Fn(f64) -> f64) -> Lloyd {
    let (metric, max_iters, threshold) = how;
    let mut old = labels(x, &c, metric);
    for i in 1..=max_iters {
        let mut new = update(x, w, &old, &c, metric);
        new.iter_mut().flatten().for_each(|v| *v = store(*v));
        let (next, still) = (labels(x, &new, metric), |(a, b): (&Vec<_>, &Vec<_>)| {
            distance(a, b, Metric::SquaredEuclidean) <= threshold
        });
        let stop = next == old || new.iter().zip(&c).all(still);
        (c, old) = (new, next);
        if stop {
            return (c, old, i, true);
        }
    }
    (c, old, max_iters, false)
}
pub type Lloyd = (Rows, Vec<u32>, usize, bool);
