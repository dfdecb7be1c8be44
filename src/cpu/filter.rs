//! Fast scores with a proven error bound: the arithmetic half of exact assignment.
//!
//! For the inner-product metrics the score of a centroid is `bias - x.c`, from a GEMM in f32 (f64 for f64 rows) over
//! centred values. Whatever the order of its sums, a score is within [`Slack::bound`] of its true value, so the centroid
//! of the smallest true distance scores at most `best + 2 * bound`. Only centroids under that cut are compared by the
//! definition in f64; on most rows there is exactly one.

use super::{Element, View};
use crate::Metric;

/// f32 or f64, as scores are computed in.
pub(crate) trait Scalar: Copy + PartialOrd + Send + Sync + 'static {
    /// Half the distance from 1 to the next number.
    const UNIT: f64;
    /// Above any absolute error that one product can suffer by underflow.
    const TINY: f64;
    /// Magnitudes whose sums stay finite.
    const HUGE: f64;
    const INFINITY: Self;
    fn of(v: f64) -> Self;
    fn widen(self) -> f64;
    fn sub(self, other: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn abs(self) -> Self;
}

macro_rules! scalar {
    ($t:ident, $tiny:expr, $huge:expr) => {
        impl Scalar for $t {
            const UNIT: f64 = $t::EPSILON as f64 / 2.0;
            const TINY: f64 = $tiny;
            const HUGE: f64 = $huge;
            const INFINITY: Self = $t::INFINITY;
            #[inline(always)]
            fn of(v: f64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn widen(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                self - other
            }
            #[inline(always)]
            fn add(self, other: Self) -> Self {
                self + other
            }
            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                self * other
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $t::abs(self)
            }
        }
    };
}
scalar!(f32, 1e-44, 1e37);
scalar!(f64, 1e-322, 1e307);

/// SIMD lanes that a loop is written for; wide enough for one AVX-512 register of f32.
const LANES: usize = 16;

/// Folds `f` over pairs in [`LANES`] independent chains, so that the compiler may vectorise.
#[inline(always)]
fn lanes<S: Scalar>(a: &[S], b: &[S], f: impl Fn(S, S, S) -> S) -> S {
    let zero = S::of(0.0);
    let mut acc = [zero; LANES];
    let (xs, ys) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let tail = xs.remainder().iter().zip(ys.remainder()).fold(zero, |s, (&x, &y)| f(s, x, y));
    for (x, y) in xs.zip(ys) {
        for l in 0..LANES {
            acc[l] = f(acc[l], x[l], y[l]);
        }
    }
    acc.into_iter().fold(tail, S::add)
}

/// The largest finite magnitude, and whether all are finite.
#[inline(always)]
pub(super) fn magnitude<S: Scalar>(row: &[S]) -> (S, bool) {
    let zero = S::of(0.0);
    let mut largest = [zero; LANES];
    // `v - v` is 0 unless `v` is a NaN or an infinity.
    let mut poison = [zero; LANES];
    for chunk in row.chunks(LANES) {
        for ((v, m), p) in chunk.iter().zip(&mut largest).zip(&mut poison) {
            let a = v.abs();
            *m = if a > *m && a < S::INFINITY { a } else { *m };
            *p = p.add(v.sub(*v));
        }
    }
    let largest = largest.into_iter().fold(zero, |a, b| if b > a { b } else { a });
    (largest, poison.into_iter().fold(zero, S::add) == zero)
}

/// The centroids of one problem, ready to be scored.
pub(crate) struct Centroids<S> {
    /// Subtracted from rows and centroids: brings data far from the origin near it. Empty when the metric forbids it.
    centre: Vec<S>,
    /// `(k, d)`, centred or normalised.
    pub values: Vec<S>,
    /// Half the squared norms; zero for the other metrics.
    pub bias: Vec<S>,
    /// Bound on the norms of `values`.
    largest: f64,
    metric: Metric,
    d: usize,
}

impl<S: Scalar> Centroids<S> {
    pub fn new<T: Element<Filter = S>>(c: &View<'_, T>, batch: usize, metric: Metric) -> Self {
        let (k, d) = (c.rows.n, c.rows.d);
        let mut centre = vec![];
        if metric == Metric::SquaredEuclidean {
            let mut mean = vec![0.0; d];
            for j in 0..k {
                mean.iter_mut().zip(c.row(batch, j)).for_each(|(m, v)| *m += v.wide() / k as f64);
            }
            centre = mean.into_iter().map(S::of).collect();
        }
        let (mut values, mut bias, mut largest) = (Vec::with_capacity(k * d), vec![S::of(0.0); k], 0f64);
        for j in 0..k {
            let row = c.row(batch, j);
            values.resize((j + 1) * d, S::of(0.0));
            let out = &mut values[j * d..];
            T::filter_row(row, out);
            match metric {
                Metric::SquaredEuclidean => out.iter_mut().zip(&centre).for_each(|(o, &m)| *o = o.sub(m)),
                Metric::Cosine => {
                    let norm = row.iter().map(|v| v.wide() * v.wide()).sum::<f64>().sqrt();
                    let inverse = if norm > 0.0 { 1.0 / norm } else { 0.0 };
                    if norm > 0.0 && !(1e-140..=1e140).contains(&norm) {
                        largest = f64::NAN;
                    }
                    out.iter_mut().zip(row).for_each(|(o, v)| *o = S::of(v.wide() * inverse));
                }
                Metric::Dot | Metric::Manhattan => {}
            }
            let square = values[j * d..].iter().map(|v| v.widen() * v.widen()).sum::<f64>();
            // `max` would drop a NaN, and with it the warning that nothing here can be trusted.
            largest =
                if square.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(square.sqrt() * (1.0 + 1e-12)) };
            if metric == Metric::SquaredEuclidean {
                bias[j] = S::of(0.5 * square);
            }
        }
        Self { centre, values, bias, largest, metric, d }
    }

    /// Writes a row as it is scored and returns what may be concluded from its scores.
    #[inline(always)]
    pub fn pack<T: Element<Filter = S>>(&self, row: &[T], out: &mut [S]) -> Slack {
        T::filter_row(row, out);
        out.iter_mut().zip(&self.centre).for_each(|(o, &m)| *o = o.sub(m));
        self.slack(lanes(out, out, |s, a, b| s.add(a.mul(b))).widen())
    }

    /// The bound. With `g = (d + 8) u / (1 - (d + 8) u)`, sums of `d` products in any order, the roundings of the centred
    /// operands, of the bias, of the subtraction and of the cut add up to at most `g (|x| |c| + |c|^2 / 2)` (Higham,
    /// Accuracy and Stability, 3.1); the f64 definition itself rounds by at most the second term.
    fn slack(&self, square: f64) -> Slack {
        let (d, c) = (self.d as f64, self.largest);
        let gamma = |u: f64| if (d + 8.0) * u < 1.0 { (d + 8.0) * u / (1.0 - (d + 8.0) * u) } else { f64::INFINITY };
        let (g, definition) = (gamma(S::UNIT), gamma(f64::EPSILON));
        if self.metric == Metric::Manhattan {
            // All terms are positive, so errors are relative.
            let usable = square.is_finite() && c.is_finite() && square.sqrt() + c < S::HUGE / d && 4.0 * g < 1.0;
            return if usable { Slack { factor: 1.0 + 4.0 * g, bound: d * S::TINY } } else { Slack::NONE };
        }
        // Squares that underflowed are put back; the definition's own must neither vanish nor overflow.
        let x = (square + d * S::TINY).sqrt() * (1.0 + g);
        if self.metric == Metric::Cosine && !(1e-140..=1e140).contains(&x) {
            return Slack::NONE;
        }
        let bound = match self.metric {
            Metric::SquaredEuclidean => g * (x * c + 0.5 * c * c) + 2.0 * definition * (x * x + c * c),
            _ => g * x * c + 2.0 * definition * x * (1.0 + c),
        };
        // Finite and far from overflow by Cauchy-Schwarz, or not usable at all.
        if x * c + c * c + x < S::HUGE && bound.is_finite() {
            Slack { factor: 1.0, bound: bound + d * S::TINY }
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

/// How far a score may be from the truth.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slack {
    factor: f64,
    bound: f64,
}

impl Slack {
    /// Nothing is known; every centroid must be compared by the definition.
    pub const NONE: Self = Self { factor: f64::NAN, bound: f64::NAN };

    pub fn usable(self) -> bool {
        !self.bound.is_nan()
    }

    /// A centroid that scores above this is not the nearest, if some centroid scores `best`.
    #[inline(always)]
    pub fn cut<S: Scalar>(self, best: S) -> S {
        S::of(best.widen() * self.factor + 2.0 * self.bound)
    }
}

/// Centroids of one row that could still be the nearest.
#[derive(Clone)]
pub(crate) struct Candidates<S> {
    best: S,
    list: Vec<(S, u32)>,
    pub slack: Slack,
}

impl<S: Scalar> Candidates<S> {
    pub fn new() -> Self {
        Self { best: S::INFINITY, list: vec![], slack: Slack::NONE }
    }

    pub fn reset(&mut self, slack: Slack) {
        self.list.clear();
        (self.best, self.slack) = (S::INFINITY, slack);
    }

    /// Takes the scores of centroids `from..`.
    #[inline(always)]
    pub fn offer(&mut self, scores: &[S], from: usize) {
        let smaller = |a: S, b: S| if a < b { a } else { b };
        let chunks = scores.chunks_exact(LANES);
        let mut lowest = S::INFINITY;
        for &s in chunks.remainder() {
            lowest = smaller(s, lowest);
        }
        let mut low = [S::INFINITY; LANES];
        for chunk in chunks {
            for l in 0..LANES {
                low[l] = smaller(chunk[l], low[l]);
            }
        }
        for s in low {
            lowest = smaller(s, lowest);
        }
        self.best = smaller(lowest, self.best);
        let cut = self.slack.cut(self.best);
        if lowest <= cut {
            self.collect(scores, cut, from);
        }
    }

    #[inline(always)]
    fn collect(&mut self, scores: &[S], cut: S, from: usize) {
        let mut take = |scores: &[S], at: usize| {
            let near = scores.iter().enumerate().filter(|(_, &s)| s <= cut);
            near.for_each(|(l, &s)| self.list.push((s, (at + l) as u32)));
        };
        let chunks = scores.chunks_exact(LANES);
        let tail = chunks.remainder();
        for (c, chunk) in chunks.enumerate() {
            // No early exit: one comparison of the whole chunk.
            let near = chunk.iter().fold(false, |near, &s| near | (s <= cut));
            if near {
                take(chunk, from + c * LANES);
            }
        }
        take(tail, from + scores.len() - tail.len());
    }

    /// The candidates left after the last score, in ascending order.
    pub fn finish(&mut self) -> impl ExactSizeIterator<Item = u32> + '_ {
        let cut = self.slack.cut(self.best);
        self.list.retain(|&(s, _)| s <= cut);
        self.list.iter().map(|&(_, j)| j)
    }
}
