//! Weighted medians.

use crate::fixed::{self, Exact};

/// The smallest value that at least half of the weight does not exceed, of at least one value. Weights, if there is a scale,
/// are positive; without one they are equal.
pub(super) fn median(column: &mut [(f64, f64)], scale: Option<i32>) -> f64 {
    let by_value = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0);
    let Some(scale) = scale else {
        let middle = (column.len() - 1) / 2;
        return column.select_nth_unstable_by(middle, by_value).1 .0;
    };
    column.sort_unstable_by(by_value);
    let whole: Option<Vec<i128>> = column.iter().map(|&(_, weight)| fixed::quantise(weight, scale)).collect();
    let reached = match whole {
        Some(whole) => {
            let total: i128 = whole.iter().sum();
            whole.iter().scan(0, |below, w| Some((*below += w, 2 * *below >= total).1)).position(|reached| reached)
        }
        None => {
            // Twice what is below, less the total.
            let mut left = Exact::ZERO;
            column.iter().for_each(|&(_, weight)| left.add(-weight));
            column.iter().position(|&(_, weight)| {
                (0..2).for_each(|_| left.add(weight));
                !left.is_negative()
            })
        }
    };
    column[reached.expect("all of the weight is at least half")].0
}
