//! The distances that k-means++ draws rows by, and the potentials that it compares: of the metric, in arithmetic of its own.
//!
//! A distance here is a probability, for which a few digits are enough, but every device has to draw the same rows. So it is no
//! sequential chain in f64, as the definition of [`Metric`] is, but a sum in the type that scores are computed in (f32; f64 of f64 rows),
//! each operation rounded by itself: 32 lanes take the columns 32 apart in turn, and lanes 16, 8, 4, 2 and 1 apart are added, as in
//! [`striped`](crate::fixed::striped). A warp does that in one go, and so do vectors of any length. Its terms are `(x - c)^2` or, by
//! Manhattan, `|x - c|`; by cosine half of `(x / |x| - c / |c|)^2`, which is `1 - cos` without the cancellation, each value being
//! multiplied by the reciprocal of its row's norm, rounded to the type. No term is below zero, so the sum of `d` of them is off by a share
//! of at most `d / 32 + 12` roundings. What is not between [`Limits`], beyond which the type is short of range, is the definition instead.
//!
//! A *potential* is the sum of all rows' weights times their distance to the nearest seed (Arthur and Vassilvitskii 2007). Each term is
//! rounded to a whole number of units, of which the largest term of all before has up to 2^51, so that potentials are integers, the same
//! in any order. `kernels/exact/spread.cuh` holds the same functions.

use crate::{
    fixed::{exponent, power_of_two},
    metric::Metric,
    rng::RACED,
    tiles::{CANDIDATES, DENSE_LISTS, KMEANSPP_DRAWS},
};

/// Lanes that a distance is added up in.
pub(crate) const LANES: usize = 32;

/// Sums between these have lost nothing to the range of their type.
pub(crate) struct Limits {
    pub least: f64,
    pub most: f64,
}

impl Limits {
    pub const F32: Self = Self { least: 1e-30, most: 1e37 };
    pub const F64: Self = Self { least: 1e-290, most: 1e300 };

    #[inline(always)]
    pub fn hold(&self, sum: f64) -> bool {
        sum > self.least && sum < self.most
    }
}

/// The metric of the distances that rows are drawn by: a dot product is no spread.
pub(crate) fn spread(metric: Metric) -> Metric {
    if metric == Metric::Dot {
        Metric::SquaredEuclidean
    } else {
        metric
    }
}

/// The draws of a block of k-means++ but the first, for so many seeds.
pub(crate) fn draws(count: usize) -> usize {
    KMEANSPP_DRAWS.min(count - 1).max(1)
}

/// The rows that greedy k-means++ tries for each centroid but the first.
pub(crate) fn trials(k: usize) -> usize {
    2 + (k as f64).ln() as usize
}

/// The draws of a block of greedy k-means++ at most, for rows of `d` columns: whole rounds, and so few that the distances of a row to
/// all candidates, which are one round's less one more than the draws, are not much more than the row.
pub(crate) fn greedy_draws(d: usize, trials: usize) -> usize {
    trials * ((CANDIDATES.min(d / 4) + 1) / trials).saturating_sub(1).max(1)
}

/// The rounds of greedy k-means++ that a block draws for after one that has chosen so many seeds: about as many as it may expect, since seeds
/// make some of the rows that were drawn come later, or never; one while lists are dense.
pub(crate) fn next_rounds(seeds: usize, dense: bool, most: usize) -> usize {
    if dense {
        1
    } else {
        (seeds + 1 + seeds / 2).min(most)
    }
}

/// Whether so many of `n` rows have come nearer to a seed that a block ends with it: what is listed of others is mostly out of date.
pub(crate) fn dense(nearer: usize, n: usize) -> bool {
    nearer * DENSE_LISTS > n
}

/// Whether so many passes over rows of `d` columns are worth a copy of these in bf16, with which a matrix unit finds seeds that are too far
/// to count (`cpu/spread_filter.rs`): it takes about as long as a pass.
pub(crate) fn worth_rounding(metric: Metric, d: usize, passes: usize) -> bool {
    const COLUMNS: usize = 32;
    const PASSES: usize = 4;
    metric != Metric::Manhattan && d >= COLUMNS && passes >= PASSES
}

/// The columns of a rounded row of a GPU.
pub(crate) fn rounded_width(d: usize) -> usize {
    d.next_multiple_of(64)
}

/// Where a row stands in a race that is not drawn by what it weighs: after all that are, and seeds after all. First come those that
/// a seed is equal to, then those of no weight, then those of a negative one.
#[inline(always)]
pub(crate) fn class(near: f64, weight: f64) -> Option<f64> {
    match (near, weight) {
        (near, _) if near < 0.0 => Some(f64::INFINITY),
        (_, weight) if weight < 0.0 => Some(4e300),
        (near, weight) if weight > 0.0 => (near <= 0.0).then_some(2e300),
        _ => Some(3e300),
    }
}

/// When a row arrives whose distance to the nearest seed falls, at time `now`, from `before` to `near`, if that is above 0.
#[inline(always)]
pub(crate) fn postponed(arrival: f64, now: f64, before: f64, near: f64) -> f64 {
    (now + (arrival - now) * (before.min(RACED) / near.min(RACED))).min(RACED)
}

/// Terms of a potential count as no more than this.
const LARGEST: f64 = power_of_two(1000);
/// Added to a number of at most 2^51, it leaves the nearest whole number in the last bits.
const ROUND: f64 = power_of_two(52);

/// Units of a potential in 1, for `n` terms, none above `most`.
pub(crate) fn units(most: f64, n: usize) -> f64 {
    let bits = (63 - (usize::BITS - n.leading_zeros()) as i32).min(51);
    power_of_two((bits - exponent(most.min(LARGEST))).clamp(-1022, 1023))
}

/// A term as a whole number of them.
#[inline(always)]
pub(crate) fn whole(term: f64, units: f64) -> u64 {
    (term.min(LARGEST) * units + ROUND).to_bits() - ROUND.to_bits()
}

/// Rows of which a start that looks at them sees a sample, where it is `Init::Auto` or rows are streamed: for each centroid, and at least.
const SAMPLED_PER_CENTROID: usize = 16;
pub(crate) const SAMPLED: usize = 65_536;

/// How many of `n` rows a start of `k` centroids sees that goes by a sample.
pub(crate) fn sampled(n: usize, k: usize) -> usize {
    k.saturating_mul(SAMPLED_PER_CENTROID).max(SAMPLED).min(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn potentials_are_whole_numbers_that_do_not_overflow() {
        for most in [5e-324, 1e-300, 0.7, 1.0, 3e9, 1e300, f64::MAX, f64::INFINITY] {
            for n in [1, 2, 1000, 50_000, u32::MAX as usize] {
                let units = units(most, n);
                assert!(u128::from(whole(most, units)) * n as u128 <= 1 << 63, "{most} {n}");
                assert_eq!(whole(0.0, units), 0);
                if (1e-280..1e290).contains(&most) {
                    let half = whole(most / 2.0, units);
                    assert!(half >= 1 << 29 && whole(most, units).abs_diff(2 * half) <= 1, "{most} {n}");
                }
            }
        }
    }

    #[test]
    fn trials_are_as_many_as_the_logarithm_says() {
        assert_eq!([1, 2, 3, 8, 20, 500].map(trials), [2, 2, 3, 4, 4, 8]);
    }
}
