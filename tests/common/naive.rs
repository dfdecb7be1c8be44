//! The specification: what the crate computes, in f64 with plain loops. Every suite judges by this file.
use super::{sum, Rows};
use candle_flash_kmeans::Metric;
pub fn distance(x: &[f64], c: &[f64], metric: Metric) -> f64 {
    let total = |f: fn(f64, f64) -> f64| x.iter().zip(c).fold(0.0, |s, (&x, &c)| s + f(x, c));
    match metric {
        Metric::SquaredEuclidean => total(|x, c| (x - c) * (x - c)),
        Metric::Manhattan => total(|x, c| (x - c).abs()),
        Metric::Dot => -total(|x, c| x * c),
        _ => match total(|x, _| x * x).sqrt() * total(|_, c| c * c).sqrt() {
            0.0 => 1.0,
            norms => 1.0 - total(|x, c| x * c) / norms,
        },
    }
}

pub fn labels(x: &Rows, c: &Rows, metric: Metric) -> Vec<u32> {
    let mut best = vec![(f64::INFINITY, 0); x.len()];
    for (i, j) in (0..x.len()).flat_map(|i| (0..c.len()).map(move |j| (i, j))) {
        let found = (distance(&x[i], &c[j], metric), j as u32);
        best[i] = if found.0 < best[i].0 { found } else { best[i] };
    }
    best.into_iter().map(|b| b.1).collect()
}

/// New centroids for rows of weights `w`; `old` where a cluster has no weight.
pub fn update(x: &Rows, w: &[f64], labels: &[u32], old: &Rows, metric: Metric) -> Rows {
    let norm = |v: &[f64]| if metric == Metric::Cosine { sum(v.iter().map(|t| t * t)).sqrt() } else { 1.0 };
    let share: Vec<_> = x.iter().zip(w).map(|(x, w)| if norm(x) > 0.0 { w / norm(x) } else { 0.0 }).collect();
    let mut new = old.clone();
    for (j, new) in new.iter_mut().enumerate() {
        let mut members: Vec<_> = (0..x.len()).filter(|&i| labels[i] as usize == j && w[i] > 0.0).collect();
        let weight = sum(members.iter().map(|&i| w[i]));
        let total: Vec<_> = (0..new.len()).map(|c| sum(members.iter().map(|&i| x[i][c] * share[i]))).collect();
        let divisor = if metric == Metric::Cosine { norm(&total) } else { weight };
        for c in (0..new.len()).filter(|_| divisor > 0.0) {
            members.sort_by(|&i, &j| x[i][c].total_cmp(&x[j][c]));
            let mut below = 0.0;
            let median = members.iter().find(|&&i| (below += w[i], 2.0 * below >= weight).1).unwrap();
            new[c] = if metric == Metric::Manhattan { x[*median][c] } else { total[c] / divisor };
        }
    }
    new
}

type Lloyd = (Rows, Vec<u32>, usize, bool);
/// Lloyd from `c`, values kept as `store` does: centroids, labels, updates made, whether it converged.
pub fn fit(x: &Rows, w: &[f64], c: Rows, how: (Metric, usize, f64), store: &dyn Fn(f64) -> f64) -> Lloyd {
    let (mut at, (metric, max_iters, threshold)) = ((labels(x, &c, how.0), c), how);
    for i in 1..=max_iters {
        let new: Rows =
            update(x, w, &at.0, &at.1, metric).iter().map(|c| c.iter().map(|&v| store(v)).collect()).collect();
        let shift = new.iter().zip(&at.1).map(|(a, b)| distance(a, b, Metric::SquaredEuclidean)).fold(0.0, f64::max);
        at = (labels(x, &new, metric), new);
        if shift <= threshold {
            return (at.1, at.0, i, true);
        }
    }
    (at.1, at.0, max_iters, false)
}

/// An exact sum of f64, rounded to 53 bits once: `significand * 2^exponent`, as a long addition gives it. What is not
/// finite is left out.
pub fn exact_sum(terms: impl Iterator<Item = f64>) -> (f64, i32) {
    // Bytes from 2^-1074 up, positive and negative ones on their own.
    let mut sides = [[0i64; 280]; 2];
    for t in terms.filter(|t| t.is_finite()) {
        let (bits, biased) = (t.to_bits() & ((1 << 52) - 1), (t.to_bits() >> 52 & 0x7ff) as usize);
        let mantissa = u128::from(if biased > 0 { bits | 1 << 52 } else { bits }) << ((biased.max(1) - 1) % 8);
        let at = (biased.max(1) - 1) / 8;
        (0..8).for_each(|i| sides[usize::from(t < 0.0)][at + i] += (mantissa >> (8 * i) & 255) as i64);
    }
    let [plus, minus] = sides;
    let subtract = |a: &[i64], b: &[i64]| {
        let mut carry = 0;
        let mut digit = |(a, b): (&i64, &i64)| {
            let v = a - b + carry;
            carry = v >> 8;
            v & 255
        };
        let digits: Vec<i64> = a.iter().zip(b).map(&mut digit).collect();
        (carry == 0).then_some(digits)
    };
    let (sign, digits) = match subtract(&plus, &minus) {
        Some(digits) => (1.0, digits),
        None => (-1.0, subtract(&minus, &plus).unwrap()),
    };
    let Some(top) = digits.iter().rposition(|&d| d != 0) else { return (0.0, 0) };
    let least = top.saturating_sub(8);
    let value = digits[least..=top].iter().rev().fold(0u128, |v, &d| v << 8 | d as u128);
    let below = digits[..least].iter().any(|&d| d != 0);
    // Nine bytes are at least 65 bits; the last says whether there was more.
    (sign * (value << 1 | u128::from(below)) as f64, 8 * least as i32 - 1075)
}

/// The quotient of two exact sums, rounded once.
pub fn quotient((a, of_a): (f64, i32), (b, of_b): (f64, i32)) -> f64 {
    // Both brought near 1, then the exponents, in steps that round nothing before the last one.
    let (mut e, near) = (of_a - of_b, |v: f64| {
        let e = (v.to_bits() >> 52 & 0x7ff) as i32 - 1023;
        (v / 2f64.powi(e), e)
    });
    if a == 0.0 {
        return 0.0;
    }
    let ((mut a, more), (mut b, less)) = (near(a), near(b));
    e += more - less;
    while e.abs() > 1000 && e.abs() < 3000 && (a.abs() < 2f64.powi(900) && b < 2f64.powi(900)) {
        if e > 0 {
            (a, e) = (a * 2f64.powi(500), e - 500);
        } else {
            (b, e) = (b * 2f64.powi(500), e + 500);
        }
    }
    if e > 0 {
        (a, b) = (a, b * 2f64.powi(-e.min(1000)));
    } else {
        (a, b) = (a * 2f64.powi(e.max(-1000)), b);
    }
    a / b
}
