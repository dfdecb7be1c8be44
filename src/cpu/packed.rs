//! Rows as the matrix unit multiplies them, which a pass of a fit leaves for those after it: these read half as many bytes as in f32, and need
//! not centre, round and measure rows again.

use super::{
    bounds::up,
    filter::{Centroids, Slack},
    lines::{steps, PairRows, PAIR, ROWS_STEP},
    rounded::flushed,
    tensors::prefetch,
};
use crate::{
    error::Result,
    host,
    kept::{Line, PackedRows},
};

/// The rows of a tile that are kept, or the room for them.
#[derive(Default)]
pub(super) struct Packed<'a> {
    /// `(rows, steps)`.
    pub lines: &'a mut [Line],
    /// `(rows)`: bounds on norms, as [`PackedRows::norms`].
    pub norms: &'a mut [[f32; 2]],
}

/// Where a pass over all centroids has the rows of a tile from.
pub(super) enum Source<'a> {
    /// The rows themselves,
    Rows,
    /// which it leaves here as it has packed them;
    Keep(Packed<'a>),
    /// or what an earlier pass has left.
    Kept(Packed<'a>),
}

impl Packed<'_> {
    /// Keeps the rows from `first` on, of which these are the lines of a pair and the parts of bounds.
    pub fn keep(&mut self, first: usize, pair: &[Line], slacks: impl Iterator<Item = Slack>) {
        let steps = pair.len() / ROWS_STEP;
        let to = self.lines.chunks_exact_mut(steps).zip(&mut *self.norms).skip(first);
        for (i, ((lines, norms), slack)) in to.zip(slacks).enumerate() {
            lines.iter_mut().zip(pair[i..].iter().step_by(ROWS_STEP)).for_each(|(to, line)| *to = *line);
            *norms = slack.norms().map(up);
        }
    }

    /// Asks for the next pair, from row `first` on, ahead of its turn.
    pub fn prefetch(&self, first: usize, steps: usize) {
        let lines = first * steps..(first + PAIR) * steps;
        prefetch(self.lines.get(lines).unwrap_or_default());
    }

    /// The `m` rows from `first` on, which are copied to the lines of a pair where they are fewer than that has.
    pub fn pair<'p>(&'p self, first: usize, m: usize, pair: &'p mut [Line]) -> PairRows<'p> {
        let steps = pair.len() / ROWS_STEP;
        let rows = &self.lines[first * steps..][..m * steps];
        if m == PAIR {
            return PairRows { lines: rows, row: steps, step: 1 };
        }
        for (i, row) in rows.chunks_exact(steps).enumerate() {
            pair[i..].iter_mut().step_by(ROWS_STEP).zip(row).for_each(|(to, line)| *to = *line);
        }
        PairRows::of_pair(pair)
    }
}

/// A row's part of the error bound before it is rounded, and after.
#[inline(always)]
pub(super) fn slacks(centroids: &Centroids<f32>, [norm, left]: [f32; 2]) -> [Slack; 2] {
    let slack = centroids.slack_of(f64::from(norm));
    [slack, slack.rounded(f64::from(left), flushed(centroids.columns()))]
}

/// Makes room for rows that are kept, and says how centroids pack them.
pub(super) fn prepare(kept: &mut PackedRows, n: usize, centroids: &Centroids<f32>) -> Result<()> {
    let lines = n * steps(centroids.columns());
    if kept.lines.len() != lines {
        (kept.lines, kept.norms) = (host::filled("fit", lines, Line::ZERO)?, host::filled("fit", n, [f32::NAN; 2])?);
    }
    let (centre, scale) = centroids.frame();
    (kept.centre, kept.scale) = (centre.to_vec(), scale);
    Ok(())
}
