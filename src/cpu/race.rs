//! The race of k-means++ among rows.

use crate::{
    error::Result,
    host,
    rng::{race_key_below, Draw, RACED},
};

/// Steps that a row of a race takes, most of which end before the logarithm.
const RACE_STEPS: usize = 12;

/// The rows that a race has drawn.
pub(super) struct Drawn {
    /// The least keys, and the rows that have them, of equal ones the lower row first.
    pub lowest: Vec<(f64, u32)>,
    /// The largest that a row was drawn by.
    pub most: f64,
}

/// The rows with the least keys of each of these problems, `count` at most: those that were drawn by what they weigh, or, where none was,
/// any but seeds. `near(b, row)` is the distance of a row to the nearest seed.
pub(super) fn race(
    problems: &[usize],
    [n, count]: [usize; 2],
    near: impl Fn(usize, usize) -> f64 + Send + Sync,
    weights: Option<&[f64]>,
    draw: Draw,
) -> Result<Vec<Drawn>> {
    let rows = host::items_per_task(RACE_STEPS).min(n);
    let parts = n.div_ceil(rows);
    let part = |task: usize| {
        let (b, first) = (problems[task / parts], task % parts * rows);
        let mut drawn = Drawn { lowest: Vec::with_capacity(count + 1), most: 0.0 };
        for row in first..n.min(first + rows) {
            let near = near(b, row);
            let weight = weights.map_or(1.0, |weights| weights[b * n + row]);
            let p = near * weight;
            drawn.most = if near > 0.0 && p > drawn.most { p } else { drawn.most };
            let full = drawn.lowest.len() == count;
            let bound = drawn.lowest.last().filter(|_| full).map_or(f64::INFINITY, |last| last.0);
            let Some(key) = race_key_below(bound, draw, b, row, near, weight) else { continue };
            if !full || key < bound {
                // Rows come in ascending order, so that one goes behind all of its key.
                let place = drawn.lowest.partition_point(|other| other.0 <= key);
                drawn.lowest.insert(place, (key, row as u32));
                drawn.lowest.truncate(count);
            }
        }
        drawn
    };
    let all = host::map("k-means++", problems.len() * parts, rows * RACE_STEPS, part)?;
    let of_problem = |parts: &[Drawn]| {
        let mut lowest: Vec<_> = parts.iter().flat_map(|part| part.lowest.iter().copied()).collect();
        lowest.sort_unstable_by(|x, y| x.0.total_cmp(&y.0).then(x.1.cmp(&y.1)));
        lowest.truncate(count);
        let most_key = if lowest.first().is_some_and(|first| first.0 <= RACED) { RACED } else { f64::MAX };
        lowest.retain(|&(key, _)| key <= most_key);
        Drawn { lowest, most: parts.iter().map(|part| part.most).fold(0.0, f64::max) }
    };
    Ok(all.chunks(parts).map(of_problem).collect())
}
