//! What is known of the centroids that are nearest to a row.

use super::super::{
    candidates::Found,
    filter::{Bound, Slack},
    scalar::{Scalar, LANES},
};

/// Candidates of a row that are kept before some are compared, beside twice as many as are asked for.
pub(super) const MOST: usize = 64;

/// What is known of the nearest centroids of a row.
#[derive(Clone)]
pub(super) struct Nearby<S> {
    pub m: usize,
    /// The least of the scores, each with its error added, ascending, as many as are asked for.
    upper: Vec<f64>,
    /// Candidates: scores, each without its error, and which centroids have them.
    pub list: Vec<(S, u32)>,
    /// The nearest by the definition of those that have been compared, ascending.
    pub found: Vec<Found>,
    pub slack: Slack,
}

impl<S: Scalar> Nearby<S> {
    pub fn new(m: usize) -> Self {
        Self { m, upper: Vec::with_capacity(m + 1), list: vec![], found: Vec::with_capacity(m + 1), slack: Slack::NONE }
    }

    pub fn reset(&mut self, slack: Slack) {
        self.upper.clear();
        self.list.clear();
        self.found.clear();
        self.slack = slack;
    }

    /// `U`, infinite as long as fewer centroids have been scored than are asked for.
    #[inline(always)]
    fn bound(&self) -> f64 {
        self.upper.get(self.m - 1).copied().unwrap_or(f64::INFINITY)
    }

    /// No true value of one of the nearest is above.
    pub fn cutoff(&self) -> f64 {
        self.bound() * self.slack.factor
    }

    /// Takes the score of a centroid with its error added.
    #[inline(always)]
    pub fn lower(&mut self, upper: f64) {
        if upper < self.bound() {
            let at = self.upper.partition_point(|&other| other <= upper);
            self.upper.insert(at, upper);
            self.upper.truncate(self.m);
        }
    }

    /// Takes the scores of a block, of centroids `start` and so on. `compare` makes room in a full list.
    #[inline(always)]
    pub fn offer(&mut self, scores: &[S], (bound, start): (&Bound, usize), compare: impl FnMut(&mut Self)) {
        let error = bound.error(self.slack);
        let below = |scores: &[S], cut: S| scores.iter().fold(false, |below, &s| below | (s <= cut));
        let mut cut = S::of(self.bound() - error);
        for few in scores.chunks(LANES) {
            if below(few, cut) {
                few.iter().for_each(|s| self.lower(s.widen() + error));
                cut = S::of(self.bound() - error);
            }
        }
        self.collect(scores, (error, start), compare);
    }

    /// The same where the scores are rounded, which need not be known to the last: of those that are in the same lane of vectors the least counts, as
    /// those of other lanes are others' scores.
    #[inline(always)]
    pub fn offer_lanes(&mut self, scores: &[S], (bound, start): (&Bound, usize), compare: impl FnMut(&mut Self)) {
        if self.m > LANES / 2 {
            return self.offer(scores, (bound, start), compare);
        }
        let (error, mut least) = (bound.error(self.slack), [S::INFINITY; LANES]);
        let smaller = |a: S, b: S| if a < b { a } else { b };
        let (whole, rest) = scores.as_chunks::<LANES>();
        for few in whole {
            for l in 0..LANES {
                least[l] = smaller(few[l], least[l]);
            }
        }
        least.iter_mut().zip(rest).for_each(|(least, &s)| *least = smaller(s, *least));
        least.iter().for_each(|s| self.lower(s.widen() + error));
        self.collect(scores, (error, start), compare);
    }

    /// Lists the candidates among these scores.
    #[inline(always)]
    fn collect(&mut self, scores: &[S], (error, start): (f64, usize), mut compare: impl FnMut(&mut Self)) {
        let below = |scores: &[S], cut: S| scores.iter().fold(false, |below, &s| below | (s <= cut));
        let cut = S::of(self.cutoff() + error);
        for (few, from) in scores.chunks(LANES).zip((start..).step_by(LANES)) {
            if below(few, cut) {
                for (l, &s) in few.iter().enumerate().filter(|(_, &s)| s <= cut) {
                    if self.list.len() == 2 * self.m + MOST {
                        compare(self);
                    }
                    self.list.push((S::of(s.widen() - error), (from + l) as u32));
                }
            }
        }
    }

    /// Leaves out candidates that are none any more.
    pub fn shorten(&mut self) {
        let cut = S::of(self.cutoff());
        self.list.retain(|&(s, _)| s <= cut);
    }

    /// Writes what has been found.
    pub fn write(&self, indices: &mut [u32], distances: &mut [f64]) {
        for ((&(distance, index), to), at) in self.found.iter().zip(distances).zip(indices) {
            (*to, *at) = (distance, index);
        }
    }

    /// Adds a centroid at a distance. A NaN is as far as can be.
    pub fn add(&mut self, distance: f64, index: u32) {
        let found = (if distance.is_nan() { f64::INFINITY } else { distance }, index);
        let before = |other: &Found| other.0 < found.0 || other.0 == found.0 && other.1 < found.1;
        let at = self.found.partition_point(before);
        if at < self.m {
            self.found.insert(at, found);
            self.found.truncate(self.m);
        }
    }
}
