//! Weighted medians.

use crate::fixed::{self, Grid};

/// The smallest value that at least half of the weight does not exceed, of at least one value. Weights, if there is a grid,
/// are positive; without one they are equal.
pub(super) fn median(column: &mut [(f64, f64)], grid: Option<Grid>) -> f64 {
    let by_value = |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0);
    let Some(grid) = grid else {
        let middle = (column.len() - 1) / 2;
        return column.select_nth_unstable_by(middle, by_value).1 .0;
    };
    column.sort_unstable_by(by_value);
    let whole: Option<Vec<i128>> = column.iter().map(|&(_, weight)| fixed::quantise(weight, grid.scale)).collect();
    let reached = match whole {
        Some(whole) => {
            let total: i128 = whole.iter().sum();
            whole.iter().scan(0, |below, w| Some((*below += w, 2 * *below >= total).1)).position(|reached| reached)
        }
        None => {
            // Twice what is below, less the total.
            let mut left = vec![0; grid.planes];
            let mut add = |times: i128, weight| {
                grid.split(weight, |plane, units| left[plane] += times * units);
                grid.is_negative(&left)
            };
            for &(_, weight) in column.iter() {
                add(-1, weight);
            }
            column.iter().position(|&(_, weight)| !add(2, weight))
        }
    };
    column[reached.expect("all of the weight is at least half")].0
}
