//! Rounds of greedy k-means++: which of the rows that are tried becomes a seed.

use super::{
    race::Arrivals,
    spread_pass::{Nearer, NearerRows},
};
use crate::spread::{dense, postponed, units, whole};

/// What the rounds of a block go by.
pub(super) struct Round<'a> {
    pub trials: usize,
    /// The seeds that are left to choose.
    pub left: usize,
    /// The largest that a row is drawn by.
    pub most: f64,
    /// Of each row.
    pub weights: Option<&'a [f64]>,
    /// The rows that are nearer to each of those that may arrive than `nearest` said before the block.
    pub nearer: &'a NearerRows,
}

/// What rounds have come to.
#[derive(Default)]
pub(super) struct Outcome {
    pub seeds: Vec<u32>,
    /// The rows that are tried in a round that the arrivals do not end.
    pub tried: Vec<u32>,
    /// Whether many rows have come nearer to the last seed.
    pub dense: bool,
}

/// The seeds of the rounds that the arrivals are enough for, and the rows that are tried in a round that they do not end. `before` rows were
/// tried already. Seeds lower the distances of `rows`, `(2, n)`, and postpone their arrivals.
pub(super) fn choose(mut arrivals: Arrivals, before: usize, round: &Round<'_>, rows: &mut [f64]) -> Outcome {
    let &Round { trials, left, most, weights, nearer } = round;
    let n = rows.len() / 2;
    let (nearest, times) = rows.split_at_mut(n);
    let (rows, units) = (arrivals.rows().collect::<Vec<_>>(), units(most, n));
    let (mut outcome, mut tried) = (Outcome::default(), (0..before).collect::<Vec<_>>());
    while outcome.seeds.len() < left && !outcome.dense {
        let enough = if arrivals.certain() { 1 } else { trials };
        while tried.len() < enough {
            let Some(next) = arrivals.next() else { break };
            tried.push(next);
        }
        // A round of fewer is one of all that are left.
        if tried.is_empty() || tried.len() < enough && !arrivals.complete() {
            break;
        }
        let weight = |row: usize| weights.map_or(1.0, |weights| weights[row]);
        let term = |row: usize, near: f64| whole(near * weight(row), units);
        // What a seed takes off the potential.
        let gain = |t: usize| {
            let own = term(rows[t] as usize, nearest[rows[t] as usize]);
            let others = nearer.of(t).map(|nearer| {
                let (row, near) = (nearer.row as usize, nearest[nearer.row as usize]);
                term(row, near) - term(row, near.min(nearer.distance))
            });
            own + others.sum::<u64>()
        };
        let gains: Vec<_> = if enough > 1 { tried.iter().map(|&t| gain(t)).collect() } else { vec![0] };
        // Of equal ones the one that was drawn first.
        let best = (1..gains.len()).fold(0, |best, i| if gains[i] > gains[best] { i } else { best });
        let best = tried.remove(best);
        outcome.seeds.push(rows[best]);
        let mut entries = 0;
        for &Nearer { row, distance, .. } in nearer.of(best) {
            let (near, time) = (&mut nearest[row as usize], &mut times[row as usize]);
            entries += 1;
            if distance < *near {
                *time = postponed(*time, arrivals.now(), *near, distance);
                *near = distance;
            }
        }
        nearest[rows[best] as usize] = -1.0;
        outcome.dense = dense(entries, n);
        (0..rows.len()).for_each(|i| arrivals.lower(i, nearest[rows[i] as usize]));
        for i in tried.drain(..) {
            let row = rows[i] as usize;
            times[row] = arrivals.again(i, weight(row));
        }
    }
    outcome.tried = tried.into_iter().map(|t| rows[t]).collect();
    outcome
}
