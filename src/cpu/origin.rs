//! Which centroids are scored, and where: the common vector that they and rows are moved by, and the power of two that they are scaled by.

use super::{
    scalar::{hash, magnitude, Scalar},
    tensors::{Element, View},
};
use crate::{error::Result, host, metric::Metric};

/// The centroids that can be the nearest to any row: numbers that are finite (for inner products, no NaN), and of equal ones
/// the first.
pub(super) fn distinct<T: Element>(c: &View<'_, T>, batch: usize, metric: Metric) -> Result<Vec<u32>> {
    let k = c.rows.n;
    let mut row = vec![T::Filter::of(0.0); c.rows.d];
    let (mut kept, mut hashes) = (host::buffer("assign", k)?, host::buffer("assign", k)?);
    // Open addressing, at most half full.
    let mut table = host::filled("assign", (2 * k).next_power_of_two(), u32::MAX)?;
    let equal = |i: u32, j: u32| {
        let (a, b) = (c.row(batch, i as usize), c.row(batch, j as usize));
        a.iter().zip(b).all(|(a, b)| a.wide() == b.wide())
    };
    for j in 0..k as u32 {
        T::filter_row(c.row(batch, j as usize), &mut row);
        let (_, finite) = magnitude(&row);
        if !finite && (metric != Metric::Dot || row.iter().any(|v| v.widen().is_nan())) {
            continue;
        }
        let hash = hash(&row);
        let mut at = hash as usize & (table.len() - 1);
        let copy = loop {
            match table[at] {
                u32::MAX => break false,
                p if hashes[p as usize] == hash && equal(kept[p as usize], j) => break true,
                _ => at = (at + 1) & (table.len() - 1),
            }
        };
        if !copy {
            table[at] = kept.len() as u32;
            kept.push(j);
            hashes.push(hash);
        }
    }
    Ok(kept)
}

/// The median of each column over a few of the centroids `kept`, which single ones far away do not move.
pub(super) fn median<T: Element>(c: &View<'_, T>, batch: usize, kept: &[u32]) -> Vec<T::Filter> {
    let d = c.rows.d;
    let mut rows = vec![T::Filter::of(0.0); kept.len().min(FEW) * d];
    for (place, row) in few_of(kept.len()).zip(rows.chunks_exact_mut(d)) {
        T::filter_row(c.row(batch, kept[place] as usize), row);
    }
    median_of(&mut rows, d)
}

/// Rows that have a median of each column, of more of them.
pub(super) const FEW: usize = 31;

/// Which of `n` rows are those, at no regular distance: one of each part.
pub(super) fn few_of(n: usize) -> impl Iterator<Item = usize> {
    let few = n.min(FEW);
    (0..few).map(move |i| (i * n + i.wrapping_mul(0x9e37_79b1) % n) / few)
}

/// The median of each column of a few `rows`, which are sorted.
pub(super) fn median_of<S: Scalar>(rows: &mut [S], d: usize) -> Vec<S> {
    let few = rows.len() / d;
    // Odd-even transposition sorts all columns at once.
    for pass in 0..few {
        for pair in rows[pass % 2 * d..few * d].chunks_exact_mut(2 * d) {
            let (low, high) = pair.split_at_mut(d);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = if *b < *a { (*b, *a) } else { (*a, *b) };
            }
        }
    }
    if few == 0 {
        return vec![S::of(0.0); d];
    }
    let half = S::of(0.5);
    let (low, high) = (&rows[few.saturating_sub(1) / 2 * d..], &rows[few / 2 * d..]);
    low.iter().zip(high).take(d).map(|(a, b)| a.mul(half).add(b.mul(half))).collect()
}

/// A square that an eighth of them are below: what is far above it may be data, and what is far below next to nothing.
pub(super) fn typical(squares: &[f64]) -> f64 {
    let (mut squares, at) = (squares.to_vec(), (squares.len() / 8).max(1));
    if squares.len() <= at {
        return squares.into_iter().fold(0.0, f64::max);
    }
    *squares.select_nth_unstable_by(at, f64::total_cmp).1
}

/// The power of two that brings a `typical` norm to 1, where its square is not well inside the range of an f32.
pub(super) fn scale<S: Scalar>(typical: f64, metric: Metric) -> f64 {
    let far = typical > 0.0 && typical.is_finite() && !(2f64.powi(-30)..=2f64.powi(30)).contains(&typical);
    // The definition cannot square what an f64 cannot.
    let narrow = S::HUGE < f64::MAX.sqrt();
    if far && narrow && metric != Metric::Cosine {
        2f64.powi((-typical.log2().round() as i32).clamp(-120, 120))
    } else {
        1.0
    }
}
