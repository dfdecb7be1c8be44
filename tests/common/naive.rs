//! The specification: k-means in f64, by loops, as the documentation words it.
#![allow(dead_code)]

use candle_flash_kmeans::Metric;

pub type Row = Vec<f64>;

pub fn distance(x: &[f64], c: &[f64], metric: Metric) -> f64 {
    let sum = |f: fn(f64, f64) -> f64| x.iter().zip(c).fold(0.0, |s, (&x, &c)| s + f(x, c));
    match metric {
        Metric::SquaredEuclidean => sum(|x, c| (x - c) * (x - c)),
        Metric::Manhattan => sum(|x, c| (x - c).abs()),
        Metric::Dot => -sum(|x, c| x * c),
        _ => match sum(|x, _| x * x).sqrt() * sum(|_, c| c * c).sqrt() {
            0.0 => 1.0,
            norms => 1.0 - sum(|x, c| x * c) / norms,
        },
    }
}

/// The lowest index at the smallest distance; a NaN is as far as can be.
pub fn label(x: &[f64], centroids: &[Row], metric: Metric) -> u32 {
    let mut best = (f64::INFINITY, 0);
    for (j, c) in centroids.iter().enumerate() {
        let d = distance(x, c, metric);
        if d < best.0 {
            best = (d, j as u32);
        }
    }
    best.1
}

/// The centroid that minimises the cost of weighted rows; `None` if they have no weight or no direction.
pub fn centre(rows: &[(Row, f64)], metric: Metric) -> Option<Row> {
    let weight: f64 = rows.iter().map(|r| r.1).sum();
    let d = rows.first()?.0.len();
    let norm = |r: &[f64]| r.iter().map(|v| v * v).sum::<f64>().sqrt();
    let total = |c: usize| rows.iter().map(|(r, w)| r[c] * w).sum::<f64>();
    let median = |c: usize| {
        let mut column: Vec<_> = rows.iter().map(|(r, w)| (r[c], *w)).collect();
        column.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut below = 0.0;
        column.iter().find(|v| (below += v.1, 2.0 * below >= weight).1).map_or(0.0, |v| v.0)
    };
    let directions = |c: usize| rows.iter().filter(|r| norm(&r.0) > 0.0).map(|(r, w)| r[c] / norm(r) * w).sum::<f64>();
    let centre: Row = match metric {
        Metric::Manhattan => (0..d).map(median).collect(),
        Metric::Cosine => (0..d).map(directions).collect(),
        _ => (0..d).map(|c| total(c) / weight).collect(),
    };
    let scale = if metric == Metric::Cosine { norm(&centre) } else { 1.0 };
    (weight > 0.0 && scale > 0.0).then(|| centre.iter().map(|v| v / scale).collect())
}
