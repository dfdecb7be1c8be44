//! Which centroids could still be the nearest to a row.

use super::{
    filter::{Bound, Slack},
    scalar::{Scalar, LANES},
};

/// A distance by the definition, and the centroid that is as far.
pub(crate) type Found = (f64, u32);

/// No centroid.
pub(crate) const NONE: Found = (f64::INFINITY, u32::MAX);

/// Candidates of one row that are kept before some are compared.
const MOST: usize = 64;

/// Centroids of one row that could still be the nearest.
#[derive(Clone)]
pub(crate) struct Candidates<S> {
    /// The smallest of the scores, each with its error added: no true value of the nearest one is above.
    upper: f64,
    /// Scores, each without its error, and which centroids have them.
    list: Vec<(S, u32)>,
    /// The nearest by the definition of those that did not fit in the list.
    pub compared: Found,
    pub slack: Slack,
}

impl<S: Scalar> Candidates<S> {
    pub fn new() -> Self {
        Self { upper: f64::INFINITY, list: vec![], compared: NONE, slack: Slack::NONE }
    }

    pub fn reset(&mut self, slack: Slack) {
        self.list.clear();
        (self.upper, self.compared, self.slack) = (f64::INFINITY, NONE, slack);
    }

    /// Says that no true value of the nearest centroid is above.
    pub fn within(&mut self, upper: f64) {
        self.upper = self.upper.min(upper);
    }

    /// Says that nothing is known of the row.
    pub fn give_up(&mut self) {
        self.reset(Slack::NONE);
    }

    /// Takes the scores of a block, of centroids `from` on, of which this is the lowest. `compare` finds the nearest among centroids and what has been
    /// found before.
    #[inline(always)]
    pub fn offer(
        &mut self,
        lowest: S,
        scores: &[S],
        bound: &Bound,
        from: usize,
        compare: impl FnMut(Found, &[(S, u32)]) -> Found,
    ) {
        let error = bound.error(self.slack);
        let cut = self.cut(lowest, error);
        if lowest <= cut {
            self.collect(scores, cut, error, from, compare);
        }
    }

    /// The score that a candidate of a block has at most, of whose scores this is the lowest.
    #[inline(always)]
    pub fn cut(&mut self, lowest: S, error: f64) -> S {
        self.upper = self.upper.min(lowest.widen() + error);
        S::of(self.upper * self.slack.factor + error)
    }

    /// Takes a candidate, if there is room.
    #[inline(always)]
    pub fn keep(&mut self, score: S, scored: u32, error: f64) -> bool {
        let room = self.list.len() < MOST || self.finish().len() <= MOST / 2;
        if room {
            self.list.push((S::of(score.widen() - error), scored));
        }
        room
    }

    /// Takes the scores of a block that are at most `cut`.
    #[inline(always)]
    pub fn collect(
        &mut self,
        scores: &[S],
        cut: S,
        error: f64,
        from: usize,
        mut compare: impl FnMut(Found, &[(S, u32)]) -> Found,
    ) {
        let mut take = |scores: &[S], at: usize| {
            for (l, &s) in scores.iter().enumerate().filter(|(_, &s)| s <= cut) {
                if !self.keep(s, (at + l) as u32, error) {
                    self.compared = compare(self.compared, &self.list);
                    self.list.clear();
                    self.keep(s, (at + l) as u32, error);
                }
            }
        };
        // No early exit: one comparison of many.
        let near = |scores: &[S]| scores.iter().fold(false, |near, &s| near | (s <= cut));
        for (many, from) in scores.chunks(4 * LANES).zip((from..).step_by(4 * LANES)) {
            if near(many) {
                for (few, from) in many.chunks(LANES).zip((from..).step_by(LANES)) {
                    if near(few) {
                        take(few, from);
                    }
                }
            }
        }
    }

    /// The candidates that are left, and not compared.
    pub fn finish(&mut self) -> &[(S, u32)] {
        let cut = S::of(self.cutoff());
        self.list.retain(|&(s, _)| s <= cut);
        &self.list
    }

    /// No true value of the nearest centroid is above.
    pub fn cutoff(&self) -> f64 {
        self.upper * self.slack.factor
    }
}
