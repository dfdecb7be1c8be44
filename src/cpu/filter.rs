//! Fast scores with a proven error bound: the arithmetic half of exact assignment.
//!
//! For the inner-product metrics the score of a centroid is `bias - x.c`, from a GEMM in f32 (f64 for f64 rows) over
//! centred values. A score is within an error `E` of its true value, which grows with the norms of the row and of the
//! centroid. The nearest centroid scores at most `min(score + E) + E`; only centroids under that cutoff are compared by
//! the definition in f64, and on most rows there is exactly one.
//!
//! # The error bound
//! Let `x` and `c` be a row and a centroid, less a common vector and times a power of two, which changes neither their
//! order by distance nor, but for underflow, their digits. `T = |c|^2 / 2 - x.c` is half the squared distance but for a
//! part that all centroids share; for the other two metrics `T = -x.c`. With `g = (d + 8) u / (1 - (d + 8) u)` (Higham,
//! Accuracy and Stability, 3.1), `u` the unit of the arithmetic and `v` the same as `g` for the definition's:
//!
//! - A product of `d` terms, summed in any order, is off by `d u` of `|x| |c|`, centring both by two, the subtraction from
//!   the bias by one, and the two roundings of what the score is compared with by two: less than `g |x| |c|`.
//! - The bias is off by five such units of `|c|^2 / 2`: less than `g |c|^2 / 2`.
//! - The definition is itself off by less than `2 v (|x|^2 + |c|^2)` (half of it, of a squared difference), or
//!   `2 v |x| (1 + |c|)`. Products that underflow add less than `4 d` times the smallest number. What scaling loses of a
//!   number is less than that, and so less than `g` of a norm to the square of which `d` times the smallest number was added.
//!
//! So `E(x, c) = |x| a(|c|) + b(|c|) + r(|x|)`, with `a = g |c|`, `b = (g / 2 + 2 v) |c|^2` and `r = 2 v |x|^2`, each of
//! which grows with the norm. If `j` is the nearest and `i` any other, then `score_j - E_j <= T_j <= T_i <= score_i + E_i`
//! (by the definition, whose error is in `E`): `j` is under the cutoff. This holds for every `i`, and so for the smallest.
//!
//! # Why one centroid does not spoil the others' bounds
//! Centroids are scored in blocks of similar norm ([`Block`]), each of which bounds `E` by its own largest norm. One far
//! away has a block for itself, and the common vector is a median, which it cannot move. Centroids that cannot win are
//! not scored at all: one with a NaN is at distance NaN, which counts as infinite, as is one with an infinity but by
//! inner products; and a repeated one loses to its first copy by its index. What is too far to be scored without overflow
//! is set apart ([`Centroids::apart_may_win`]).

use super::{
    origin::{distinct, median, scale, typical},
    scalar::{lanes, sum_f32s, Scalar},
    tensors::{Element, View},
};
use crate::{error::Result, host, metric::Metric, tiles::CPU_CENTROIDS};
use pulp::Simd;
use std::ops::Range;

/// The centroids of one problem, ready to be scored.
pub(crate) struct Centroids<S> {
    /// Subtracted from rows and centroids: brings data far from the origin near it. Empty when the metric forbids it.
    centre: Vec<S>,
    /// Then rows are multiplied by this power of two, so that squares neither overflow nor vanish.
    scale: Option<S>,
    /// `(scored, d)`: centred and scaled, or normalised.
    pub values: Vec<S>,
    /// Half the squared norms; zero for the other metrics.
    pub bias: Vec<S>,
    /// Bounds on their norms.
    norms: Vec<f64>,
    /// The index of each scored centroid.
    index: Vec<u32>,
    /// The lowest of those.
    first: Option<u32>,
    pub blocks: Vec<Block>,
    /// Centroids that are not scored, although they may be the nearest.
    apart: Vec<u32>,
    /// The least norm of those.
    reach: f64,
    /// Bound on the norms of those that are scored.
    largest: f64,
    metric: Metric,
    d: usize,
    /// `g`, and `v`.
    gammas: [f64; 2],
}

/// Centroids that are scored together and share an error bound.
pub(crate) struct Block {
    pub scored: Range<usize>,
    pub bound: Bound,
    /// The group that all of them are in.
    pub group: u32,
}

/// The error of scores against some centroids.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    /// This times the norm of the row,
    linear: f64,
    /// this times the norm of what rounding has left of it,
    residue: f64,
    /// and this, and the row's own part.
    constant: f64,
}

/// Norms that a level holds, as a multiple of the least: few enough that a bound by the largest is not much worse.
const LEVEL: f64 = 32.0;

/// `(d + 8) u / (1 - (d + 8) u)`.
pub(super) fn gamma(d: usize, u: f64) -> f64 {
    let units = (d as f64 + 8.0) * u;
    if units < 1.0 {
        units / (1.0 - units)
    } else {
        f64::INFINITY
    }
}

impl<S: Scalar> Centroids<S> {
    pub fn new<T: Element<Filter = S>>(c: &View<'_, T>, batch: usize, metric: Metric) -> Result<Self> {
        Self::in_groups(c, batch, metric, None, |_| 0)
    }

    /// With no two groups in one block, for centroids that `group` says the groups of. They are packed
    /// as others were that had this [`Centroids::frame`], or as is best for them.
    pub(super) fn in_groups<T: Element<Filter = S>>(
        c: &View<'_, T>,
        batch: usize,
        metric: Metric,
        frame: Option<(&[S], f64)>,
        group: impl Fn(u32) -> u32,
    ) -> Result<Self> {
        let d = c.rows.d;
        let kept = distinct(c, batch, metric)?;
        let centre = match frame {
            Some((centre, _)) => centre.to_vec(),
            None if metric == Metric::SquaredEuclidean => median(c, batch, &kept),
            None => vec![],
        };
        let mut values = host::filled("assign", kept.len() * d, S::of(0.0))?;
        let square = |(&j, out): (&u32, &mut [S])| {
            let row = c.row(batch, j as usize);
            T::filter_row(row, out);
            out.iter_mut().zip(&centre).for_each(|(o, &m)| *o = o.sub(m));
            if metric == Metric::Cosine {
                let norm = row.iter().map(|v| v.wide() * v.wide()).sum::<f64>().sqrt();
                if norm > 0.0 && !(1e-140..=1e140).contains(&norm) {
                    return f64::INFINITY;
                }
                let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
                out.iter_mut().zip(row).for_each(|(o, v)| *o = S::of(v.wide() * inverse));
            }
            out.iter().map(|v| v.widen() * v.widen()).sum::<f64>()
        };
        let mut squares: Vec<f64> = kept.iter().zip(values.chunks_exact_mut(d)).map(square).collect();
        let typical = typical(&squares).sqrt();
        let scale = frame.map_or_else(|| scale::<S>(typical, metric), |(_, scale)| scale);
        squares.iter_mut().for_each(|square| *square *= scale * scale);
        // The second term puts back what underflow takes, and stands for the digits that scaling loses.
        let norm = |p: u32| (squares[p as usize] + d as f64 * S::TINY).sqrt() * (1.0 + 1e-12);
        // By Manhattan, errors are relative, and by cosine all norms are 1.
        let levels = matches!(metric, Metric::SquaredEuclidean | Metric::Dot);
        let unit = if levels && typical > 0.0 { LEVEL * typical * scale } else { f64::INFINITY };
        let level = |norm: f64| (norm / unit).log(LEVEL).ceil().max(0.0) as u32;

        // Squares, and with them the products of rows that are not much longer, are far from overflow.
        let (near, far): (Vec<u32>, Vec<u32>) =
            (0..kept.len() as u32).partition(|&p| squares[p as usize] < S::HUGE / 16.0);
        let place = |p: u32| (level(norm(p)), group(kept[p as usize]), p);
        let mut order: Vec<(u32, u32, u32)> = near.into_iter().map(place).collect();
        order.sort_unstable();
        if scale != 1.0 || !order.iter().map(|&(.., p)| p).eq(0..kept.len() as u32) {
            let mut sorted = host::buffer("assign", order.len() * d)?;
            let by = S::of(scale);
            order.iter().for_each(|&(.., p)| sorted.extend(values[p as usize * d..][..d].iter().map(|v| v.mul(by))));
            values = sorted;
        }
        let norm_of = |&(.., p): &(u32, u32, u32)| norm(p);
        let bias = |&(.., p): &(u32, u32, u32)| {
            S::of(if metric == Metric::SquaredEuclidean { 0.5 * squares[p as usize] } else { 0.0 })
        };
        let mut blocks: Vec<Block> = vec![];
        for alike in order.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            for block in alike.chunks(CPU_CENTROIDS) {
                let from = blocks.last().map_or(0, |b| b.scored.end);
                let largest = block.iter().map(norm_of).fold(0.0, f64::max);
                let bound = Bound::new(largest, 0.0, metric, gamma(d, S::UNIT), gamma(d, f64::EPSILON));
                blocks.push(Block { scored: from..from + block.len(), bound, group: alike[0].1 });
            }
        }
        // Only the length of a difference says which are too far away.
        let by_length = matches!(metric, Metric::SquaredEuclidean | Metric::Manhattan);
        let known = |&p: &u32| if by_length { norm(p).min(S::FAR * scale.min(1.0)) } else { f64::NAN };
        Ok(Self {
            reach: far.iter().map(known).fold(f64::INFINITY, |a, b| if b < a || b.is_nan() { b } else { a }),
            largest: order.iter().map(norm_of).fold(0.0, f64::max),
            bias: order.iter().map(bias).collect(),
            norms: order.iter().map(norm_of).collect(),
            first: order.iter().map(|&(.., p)| kept[p as usize]).min(),
            index: order.iter().map(|&(.., p)| kept[p as usize]).collect(),
            apart: far.into_iter().map(|p| kept[p as usize]).collect(),
            // A product's order does not change with the rows' scale.
            scale: (scale != 1.0 && metric != Metric::Dot).then(|| S::of(scale)),
            centre,
            values,
            blocks,
            metric,
            d,
            gammas: [S::UNIT, f64::EPSILON].map(|u| gamma(d, u)),
        })
    }

    /// The index of a scored centroid.
    #[inline(always)]
    pub fn index(&self, scored: u32) -> u32 {
        self.index[scored as usize]
    }

    /// All centroids that may be the nearest to some row.
    pub fn all(&self) -> impl Iterator<Item = u32> + '_ {
        self.index.iter().chain(&self.apart).copied()
    }

    /// The bound of scores of some of them that are rounded, by the units of `g`, and of which at most `left` is left out.
    pub(super) fn rounded_bound(&self, scored: Range<usize>, g: f64, left: f64) -> Bound {
        let largest = self.norms[scored].iter().copied().fold(0.0, f64::max);
        Bound::new(largest, left, self.metric, g, gamma(self.d, f64::EPSILON))
    }

    /// The bound of a centroid's score.
    #[inline(always)]
    pub(super) fn bound(&self, scored: u32) -> &Bound {
        let block = self.blocks.partition_point(|block| block.scored.end <= scored as usize);
        &self.blocks[block].bound
    }

    /// What is subtracted from rows and centroids, and then the power of two that both are multiplied by.
    pub(super) fn frame(&self) -> (&[S], f64) {
        (&self.centre, self.scale.map_or(1.0, S::widen))
    }

    /// A bound on the norm of a scored centroid.
    pub(super) fn norm(&self, scored: usize) -> f64 {
        self.norms[scored]
    }

    /// The indices of scored centroids, in order.
    pub(super) fn indices(&self) -> &[u32] {
        &self.index
    }

    /// The data's distance that is 1 between packed rows.
    pub(super) fn unit(&self) -> f64 {
        self.scale.map_or(1.0, |scale| 1.0 / scale.widen())
    }

    /// The square of a packed row's norm is not below this: `slack` has the norm rounded up by `g` and by half a `g` of its square, and with
    /// what underflow may have taken.
    #[inline(always)]
    pub(super) fn square_below(&self, slack: Slack) -> f64 {
        let d = self.d as f64;
        slack.norm * slack.norm * (1.0 - 4.0 * self.gammas[0]) - 2.0 * d * S::TINY
    }

    pub(super) fn columns(&self) -> usize {
        self.d
    }

    /// The lowest index of those that are scored.
    pub fn first(&self) -> Option<u32> {
        self.first
    }

    pub fn apart(&self) -> &[u32] {
        &self.apart
    }

    /// Whether a centroid that was set apart may be the nearest to a row for which others have shown this `cutoff`.
    ///
    /// With `R` the least norm of those, one is at least `R - |x|` away. For `|x| <= R / 4` half the square of that, less
    /// `|x|^2 / 2` as in scores, is at least `R^2 (9 - 1) / 32`; the roundings of all this are far below the rest of a fifth.
    pub fn apart_may_win(&self, slack: Slack, cutoff: f64) -> bool {
        let (r, x) = (self.reach, slack.norm);
        let lost = match self.metric {
            Metric::Manhattan => cutoff < 0.9 * (r - x),
            _ => x <= r / 4.0 && cutoff < r * r / 5.0,
        };
        !self.apart.is_empty() && !lost
    }

    /// Writes a row as it is scored and returns what may be concluded from its scores.
    #[inline(always)]
    pub fn pack<T: Element<Filter = S>>(&self, simd: impl Simd, row: &[T], out: &mut [S]) -> Slack {
        self.move_row(row, out);
        self.slack(S::squares(simd, out).widen(), out)
    }

    /// Writes a row as it is scored.
    #[inline(always)]
    pub(super) fn move_row<T: Element<Filter = S>>(&self, row: &[T], out: &mut [S]) {
        match T::as_filter(row) {
            Some(row) if !self.centre.is_empty() => {
                out.iter_mut().zip(row).zip(&self.centre).for_each(|((o, v), &m)| *o = v.sub(m));
            }
            _ => {
                T::filter_row(row, out);
                out.iter_mut().zip(&self.centre).for_each(|(o, &m)| *o = o.sub(m));
            }
        }
        if let Some(scale) = self.scale {
            out.iter_mut().for_each(|o| *o = o.mul(scale));
        }
    }

    /// The row's part of the error bound, if the arithmetic is far from overflow (by Cauchy-Schwarz).
    #[inline(always)]
    fn slack(&self, square: f64, row: &[S]) -> Slack {
        let (d, [g, _]) = (self.d as f64, self.gammas);
        let by_products = matches!(self.metric, Metric::Dot | Metric::Cosine);
        if by_products && square == 0.0 && row.iter().all(|&v| v == S::of(0.0)) {
            return Slack::NONE;
        }
        // Squares that underflowed are put back.
        self.slack_of((square + d * S::TINY).sqrt() * (1.0 + g))
    }

    /// That part, of a packed row whose norm is at most `x`, which was found within `gamma` and by what underflow may take.
    #[inline(always)]
    pub(super) fn slack_of(&self, x: f64) -> Slack {
        let (d, c, [g, definition]) = (self.d as f64, self.largest, self.gammas);
        let tiny = 4.0 * d * S::TINY;
        if self.metric == Metric::Manhattan {
            // All terms are positive, so errors are relative.
            let usable = x + c < S::HUGE / d && 4.0 * g < 1.0;
            return if usable {
                Slack { norm: x, residue: 0.0, bound: tiny, factor: 1.0 + 4.0 * g }
            } else {
                Slack::NONE
            };
        }
        let by_products = self.metric != Metric::SquaredEuclidean;
        // The definition's own squares must neither vanish nor overflow.
        if self.metric == Metric::Cosine && !(1e-140..=1e140).contains(&x) {
            return Slack::NONE;
        }
        let bound = tiny + 2.0 * definition * if by_products { x } else { x * x };
        if x * c + c * c + x < S::HUGE && (g + bound + 16.0 * x * x).is_finite() {
            Slack { norm: x, residue: 0.0, bound, factor: 1.0 }
        } else {
            Slack::NONE
        }
    }

    /// Scores of a packed row against centroids `from..from + out.len()` for the metric that is no inner product.
    #[inline(always)]
    pub fn manhattan(&self, row: &[S], from: usize, out: &mut [S]) {
        for (j, o) in out.iter_mut().enumerate() {
            let c = &self.values[(from + j) * self.d..][..self.d];
            *o = lanes(row, c, |s, a, b| s.add(a.sub(b).abs()));
        }
    }
}

impl Centroids<f32> {
    /// The score of a packed row against one centroid, for metrics that are inner products.
    #[inline(always)]
    pub(super) fn score<S: Simd>(&self, simd: S, row: &[f32], scored: u32) -> f32 {
        let value = &self.values[scored as usize * self.d..][..self.d];
        let add = |sum, x, y| simd.mul_add_f32s(x, y, sum);
        self.bias[scored as usize] - sum_f32s(simd, [row, value], add, |sum, x, y| sum + x * y)
    }
}

impl Bound {
    /// For centroids of which `c` is the largest norm, and `left` that of what rounding has left of one, by the `gamma` of the scores
    /// and that of the definition.
    fn new(c: f64, left: f64, metric: Metric, g: f64, definition: f64) -> Self {
        let (linear, constant) = match metric {
            Metric::SquaredEuclidean => (g * c, (0.5 * g + 2.0 * definition) * c * c),
            Metric::Manhattan => (0.0, 0.0),
            _ => ((g + 2.0 * definition) * c, 0.0),
        };
        // A rounded row may be a little longer.
        Self { linear: linear + 1.01 * left, residue: c, constant }
    }

    #[inline(always)]
    pub(super) fn error(&self, slack: Slack) -> f64 {
        slack.norm * self.linear + slack.residue * self.residue + self.constant + slack.bound
    }
}

/// The error bound of the scores of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slack {
    /// Bound on the norm of the row.
    norm: f64,
    /// Bound on the norm of what rounding has left of it.
    residue: f64,
    /// The row's own part of the error.
    bound: f64,
    /// By Manhattan, what the errors that are relative make of a cutoff.
    pub(super) factor: f64,
}

impl Slack {
    /// Nothing is known; centroids must be compared by the definition.
    pub const NONE: Self = Self { norm: f64::NAN, residue: f64::NAN, bound: f64::NAN, factor: f64::NAN };

    pub fn usable(self) -> bool {
        !self.bound.is_nan()
    }

    /// The bounds that it is made of.
    pub(super) fn norms(self) -> [f64; 2] {
        [self.norm, self.residue]
    }

    /// The same of the rounded row, of which `residue` is left, where sums may lose `flushed` to zeros.
    pub(super) fn rounded(self, residue: f64, flushed: f64) -> Self {
        Self { residue, bound: self.bound + flushed, ..self }
    }
}
