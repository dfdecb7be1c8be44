//! Bounds on the distances of rows to groups of centroids (Yinyang k-means, Ding et al. 2015), certified like scores.
//!
//! # The bounds
//! A score `s` of the packed row `x` and a centroid is within `E` of half the squared distance less `|x|^2 / 2` (`filter.rs`): so the distance
//! is at least `sqrt(2 (s - E) + |x|^2)`, of the lowest score of a group for all of it, and with a square that is not above the row's. If no
//! centroid of the group has moved farther than `m` since, then by the triangle inequality it is at least that less `m`. What is kept is
//! rounded away from the truth: distances to groups down, and moves and the distance to the row's own centroid up. (That one grows by its
//! centroid's move, and is measured where it is not small enough: Hamerly 2010.)
//!
//! A centroid's move is the distance from where it was when the bound was made: the norm of the sum of its moves in each pass, which is at
//! most the sum of their norms (Newling and Fleuret 2016, "Fast k-means with accurate bounds"). A group's bound falls by the largest such
//! distance of its centroids. So each bound has the number of the *snapshot* of the centroids that it was made at. Where there is no room for
//! another snapshot the latest is taken again, and what its bounds have fallen until then is added to all that they fall later.
//!
//! A group is skipped if its bound is above the distance to the row's own centroid, of which the same holds by the definition, whose error
//! [`Between`] has in it: then no centroid of the group is as near as the row's own, and none can win, nor tie. The own centroid is left out
//! of the bound of its group, which would else be of no use.

use super::{
    filter::{gamma, Centroids, Slack},
    scalar::{lowest, sum_f32s, Scalar, LANES},
    tensors::{Element, View},
};
use crate::{error::Result, host, tiles::CPU_SNAPSHOTS};
use pulp::{NullaryFnOnce, Simd};
use std::ops::Range;

/// More than the roundings of what is compared with it, of numbers as f32.
const ROUNDINGS: f64 = 1.0 / (1 << 21) as f64;

/// A number that is not above `v`, which is not negative, by little; zero for what is next to nothing.
#[inline(always)]
pub(super) fn down(v: f64) -> f32 {
    let near = (v * (1.0 - ROUNDINGS)).min(f64::from(f32::MAX)) as f32;
    if near > 1e-30 {
        near
    } else {
        0.0
    }
}

/// The next number above the nearest of `v`.
#[inline(always)]
pub(super) fn up(v: f64) -> f32 {
    (v as f32).next_up()
}

/// The sum of a bound and a move, which no move leaves as it is.
#[inline(always)]
fn after_move(bound: f32, far: f32) -> f32 {
    if far > 0.0 {
        up(f64::from(bound) + f64::from(far))
    } else {
        bound
    }
}

/// The groups of a problem's centroids, as these are scored.
pub(super) struct Grouping {
    /// The group of each centroid.
    pub group: Vec<u32>,
    /// The place of each centroid among those that are scored, or [`UNSCORED`].
    pub scored: Vec<u32>,
    /// The most that a bound to each group may be: zero if a centroid of it is not scored, since nothing is known of that one.
    pub most: Vec<f32>,
}

/// A place that no scored centroid has.
pub(super) const UNSCORED: u32 = u32::MAX;

impl Grouping {
    pub fn new<S: Scalar>(group: &[u32], count: usize, centroids: &Centroids<S>) -> Self {
        let (mut scored, mut most) = (vec![UNSCORED; group.len()], vec![f32::INFINITY; count]);
        for (&j, at) in centroids.indices().iter().zip(0..) {
            scored[j as usize] = at;
        }
        for (&g, _) in group.iter().zip(&scored).filter(|&(_, &at)| at == UNSCORED) {
            most[g as usize] = 0.0;
        }
        Self { group: group.to_vec(), scored, most }
    }

    pub fn count(&self) -> usize {
        self.most.len()
    }
}

/// Bounds on the distance of a row to its own centroid.
#[derive(Clone, Copy)]
pub(super) struct Between {
    pub below: f64,
    /// That by the definition is not above it either.
    pub above: f32,
}

/// The moves of a problem's centroids since the last assignment.
pub(super) struct Moved {
    /// The centroids of this assignment, `(k, d)`.
    values: Vec<f32>,
    d: usize,
    /// How far each centroid has moved, at most.
    moves: Vec<f32>,
    /// Each group has the distances by which its bounds have fallen, by their snapshots, that of this assignment among them.
    fallen: Vec<[f32; CPU_SNAPSHOTS]>,
    /// The snapshot of this assignment.
    pub now: u8,
}

impl Moved {
    /// Measures the centroids of a problem from the `snapshots` that have been taken, each `(k, d)`, of which there is room for `most`. Bounds made
    /// at the latest had already `fallen` when it was taken.
    pub fn new<T: Element<Filter = f32>>(
        c: &View<'_, T>,
        b: usize,
        snapshots: &[f32],
        group: &[u32],
        fallen: &[f32],
        most: usize,
    ) -> Result<Self> {
        let (k, d) = (c.rows.n, c.rows.d);
        let taken = snapshots.len() / (k * d);
        let mut values = host::filled("assign", k * d, 0.0)?;
        let mut far = host::filled("assign", k * taken, 0f32)?;
        let of_centroids = values.chunks_exact_mut(d).zip(far.chunks_exact_mut(taken)).enumerate().collect();
        host::for_each(
            of_centroids,
            taken * d,
            || (),
            |(), (j, (value, far)): (usize, (&mut [f32], &mut [f32]))| {
                T::filter_row(c.row(b, j), value);
                pulp::Arch::new().dispatch(Far { value, snapshots: &snapshots[j * d..], pitch: k * d, far });
                Ok(())
            },
        )?;
        let mut largest = host::filled("assign", fallen.len(), [0f32; CPU_SNAPSHOTS])?;
        for (far, &group) in far.chunks_exact(taken).zip(group) {
            largest[group as usize].iter_mut().zip(far).for_each(|(largest, &far)| *largest = largest.max(far));
        }
        for (largest, &fallen) in largest.iter_mut().zip(fallen) {
            largest[taken - 1] = after_move(fallen, largest[taken - 1]);
        }
        let moves = far.into_iter().skip(taken - 1).step_by(taken).collect();
        Ok(Self { values, d, moves, fallen: largest, now: taken.min(most - 1) as u8 })
    }

    /// Keeps the centroids of this assignment as a snapshot, and in `fallen` what bounds made at it have fallen.
    pub fn take(&self, snapshots: &mut [f32], fallen: &mut [f32]) {
        let to = snapshots.chunks_exact_mut(self.values.len()).nth(usize::from(self.now));
        to.expect("room for it").copy_from_slice(&self.values);
        fallen.iter_mut().enumerate().for_each(|(group, fallen)| *fallen = self.fallen(self.now, group));
    }

    /// The distance by which the bounds to a group that were made at a snapshot have fallen.
    #[inline(always)]
    pub fn fallen(&self, since: u8, group: usize) -> f32 {
        self.fallen[group][usize::from(since) % CPU_SNAPSHOTS]
    }

    /// Writes the present bounds of a row to all groups.
    #[inline(always)]
    pub fn fall(&self, lower: &[f32], since: &[u8], bounds: &mut [f32]) {
        for (((bound, &lower), &since), fallen) in bounds.iter_mut().zip(lower).zip(since).zip(&self.fallen) {
            *bound = lower - fallen[usize::from(since) % CPU_SNAPSHOTS];
        }
    }

    /// A bound on the distance to the own centroid, which was at most `upper`.
    #[inline(always)]
    pub fn after_move(&self, upper: f32, label: u32) -> f32 {
        after_move(upper, self.moves[label as usize])
    }

    /// The squared distance of a row to a centroid, in f32: within `gamma` of it, but for what underflow takes.
    #[inline(always)]
    pub fn square<S: Simd>(&self, simd: S, row: &[f32], label: u32) -> f64 {
        let value = &self.values[label as usize * self.d..][..self.d];
        let add = |sum, x, y| {
            let t = simd.sub_f32s(x, y);
            simd.mul_add_f32s(t, t, sum)
        };
        f64::from(sum_f32s(simd, [row, value], add, |sum, x, y| sum + (x - y) * (x - y)))
    }

    /// Bounds on a distance, by a square in f32 that is within `gamma` of that of a distance which is off by at most `error`, both in
    /// units of `unit`.
    #[inline(always)]
    pub fn between(&self, square: f64, error: f64, unit: f64) -> Between {
        let (g, definition) = (gamma(self.d, f32::UNIT), gamma(self.d, f64::EPSILON));
        let above = ((square + self.d as f64 * f32::TINY) * (1.0 + 2.0 * g)).sqrt() + error;
        let below = ((square * (1.0 - 2.0 * g)).max(0.0).sqrt() - error).max(0.0) * unit;
        Between {
            above: up(above * unit * (1.0 + 2.0 * definition)),
            below: if below.is_finite() { below } else { 0.0 },
        }
    }

    /// The number that the bounds to groups have to be above, for these to be skipped: the own centroid is not farther than `upper`.
    #[inline(always)]
    pub fn cut(upper: f32) -> f32 {
        up(f64::from(upper) * (1.0 + ROUNDINGS))
    }

    /// True if a group may have the nearest centroid.
    #[inline(always)]
    #[allow(clippy::neg_cmp_op_on_partial_ord, reason = "a NaN says nothing, so that the group is needed")]
    pub fn needed(bound: f32, cut: f32) -> bool {
        !(bound > cut)
    }

    /// True if any may.
    #[inline(always)]
    pub fn any_needed(bounds: &[f32], cut: f32) -> bool {
        bounds.iter().fold(false, |any, &bound| any | Self::needed(bound, cut))
    }
}

/// Measures a centroid from where it was at each snapshot, rounded up.
struct Far<'a> {
    value: &'a [f32],
    /// From that centroid in the first of them on.
    snapshots: &'a [f32],
    /// From one snapshot to the next.
    pitch: usize,
    far: &'a mut [f32],
}

impl NullaryFnOnce for Far<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { value, snapshots, pitch, far } = self;
        for (far, before) in far.iter_mut().zip(snapshots.chunks(pitch)) {
            // In f64, where no square of an f32 is lost.
            let (mut sums, mut tail) = ([0f64; LANES], 0f64);
            let ((xs, x_tail), (ys, y_tail)) = (value.as_chunks::<LANES>(), before[..value.len()].as_chunks::<LANES>());
            for (x, y) in xs.iter().zip(ys) {
                for i in 0..LANES {
                    let t = f64::from(x[i]) - f64::from(y[i]);
                    sums[i] += t * t;
                }
            }
            for (&x, &y) in x_tail.iter().zip(y_tail) {
                tail += (f64::from(x) - f64::from(y)) * (f64::from(x) - f64::from(y));
            }
            let square = sums.iter().sum::<f64>() + tail;
            let distance = up(square.sqrt() * (1.0 + gamma(value.len(), f64::EPSILON)));
            *far = match square {
                0.0 => 0.0,
                // Nothing is known of what has been, or become, no number.
                square if square.is_nan() => f32::INFINITY,
                _ => distance,
            };
        }
    }
}

/// The bounds of a tile's rows, which a pass over all centroids makes anew. They are scores, less their errors, until it ends.
pub(super) struct Renewal<'a> {
    grouping: &'a Grouping,
    /// `(rows, groups)`.
    lower: &'a mut [f32],
    /// The labels before.
    before: &'a [u32],
    /// The score, less its error, of the centroid of that label.
    own: Vec<f32>,
    /// What errors are found by.
    slacks: Vec<Slack>,
}

impl<'a> Renewal<'a> {
    pub fn new(grouping: &'a Grouping, lower: &'a mut [f32], before: &'a [u32]) -> Self {
        lower.fill(f32::INFINITY);
        Self {
            grouping,
            lower,
            before,
            own: vec![f32::INFINITY; before.len()],
            slacks: vec![Slack::NONE; before.len()],
        }
    }

    /// Begins with the rows from `first` on.
    pub fn begin(&mut self, first: usize, slacks: impl Iterator<Item = Slack>) {
        self.slacks[first..].iter_mut().zip(slacks).for_each(|(to, slack)| *to = slack);
    }

    /// Takes the scores of row `i` against a block, of which this is the `least`.
    #[inline(always)]
    pub fn note<S: Scalar>(
        &mut self,
        i: usize,
        (group, scored): (u32, &Range<usize>),
        error: impl FnOnce(Slack) -> f64,
        (scores, least): (&mut [S], S),
    ) {
        let own = self.grouping.scored[self.before[i] as usize] as usize;
        let error = error(self.slacks[i]);
        let at = &mut self.lower[i * self.grouping.count() + group as usize];
        let least = if scored.contains(&own) {
            let score = std::mem::replace(&mut scores[own - scored.start], S::INFINITY);
            let least = lowest(scores);
            scores[own - scored.start] = score;
            self.own[i] = (score.widen() - error) as f32;
            least
        } else {
            least
        };
        *at = at.min((least.widen() - error) as f32);
    }

    /// Makes bounds of the scores, for rows that have these labels.
    pub fn finish<S: Scalar>(self, labels: &[u32], centroids: &Centroids<S>) {
        pulp::Arch::new().dispatch(MakeBounds { renewal: self, labels, centroids });
    }
}

struct MakeBounds<'a, S> {
    renewal: Renewal<'a>,
    labels: &'a [u32],
    centroids: &'a Centroids<S>,
}

impl<S: Scalar> NullaryFnOnce for MakeBounds<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { renewal: Renewal { grouping, lower, before, own, slacks, .. }, labels, centroids } = self;
        let unit = centroids.unit();
        let rows = lower.chunks_exact_mut(grouping.count()).zip(labels.iter().zip(before)).zip(own.iter().zip(slacks));
        for ((lower, (&label, &before)), (&own, slack)) in rows {
            if !slack.usable() {
                lower.fill(0.0);
                continue;
            }
            if label != before {
                let to = &mut lower[grouping.group[before as usize] as usize];
                *to = to.min(own);
            }
            let square = centroids.square_below(slack);
            for (lower, &most) in lower.iter_mut().zip(&grouping.most) {
                let score = f64::from(*lower);
                let rounded = score.abs().min(f64::from(f32::MAX)) * ROUNDINGS;
                *lower = down(distance_below(score - rounded, square) * unit).min(most);
            }
        }
    }
}

/// The least distance of a packed row, of at least such a `square`, whose score is at least this.
#[inline(always)]
pub(super) fn distance_below(score: f64, square: f64) -> f64 {
    (2.0 * score + square).max(0.0).sqrt()
}

/// A score that the centroid at a distance of at most `upper` packed units is not above.
#[inline(always)]
pub(super) fn score_above(upper: f64, square: f64) -> f64 {
    let (far, error) = (upper * upper, 1e-12);
    0.5 * (far - square) + error * (far + square.abs())
}
