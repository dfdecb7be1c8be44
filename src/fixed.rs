//! Sums that do not depend on their order, and are exact.
//!
//! A sum of `n` numbers below `2^e` is kept as a 128-bit integer of units of `2^-s`, `s = 126 - e - bits(n)`: it cannot
//! overflow, and integer addition is associative, so threads, chunks and devices may add in any order and split and still
//! produce the same bits. A term that is no whole number of units is added to an [`Exact`] sum, which holds all of an f64's
//! exponents (Kulisch and Miranker 1986). Both are exact, so it does not matter which terms went where, and what becomes of
//! a sum is rounded once. `kernels/exact/common.cuh` and `kernels/exact/sums.cuh` hold the same functions.

/// The scale `s` for sums of at most `n` terms, none above `max_abs` in magnitude.
pub(crate) fn scale(max_abs: f64, n: usize) -> i32 {
    let bits = (usize::BITS - n.leading_zeros()) as i32;
    126 - exponent(max_abs) - bits
}

/// The smallest `e` with `v < 2^e`, for finite non-negative `v` (0 for 0).
fn exponent(v: f64) -> i32 {
    let bits = v.to_bits();
    match (bits >> 52) as i32 & 0x7ff {
        0 if bits == 0 => 0,
        0 => 64 - bits.leading_zeros() as i32 - 1074,
        e => e - 1022,
    }
}

/// `v` as `mantissa * 2^e`, sign aside; nothing for a NaN or an infinity.
#[inline(always)]
fn parts(v: f64) -> Option<(u64, i32)> {
    let bits = v.to_bits();
    let fraction = bits & ((1 << 52) - 1);
    match (bits >> 52) as i32 & 0x7ff {
        0x7ff => None,
        0 => Some((fraction, -1074)),
        biased => Some((fraction | 1 << 52, biased - 1075)),
    }
}

/// `v * 2^s`, if that is a whole number; 0 for a NaN or an infinity.
#[inline]
pub(crate) fn quantise(v: f64, s: i32) -> Option<i128> {
    let Some((mantissa, e)) = parts(v) else { return Some(0) };
    let magnitude = match e + s {
        // At most 74 but for a subnormal, whose mantissa is the shorter for it.
        shift @ 0..=126 => (mantissa as i128) << shift,
        shift @ -63..=-1 if mantissa.trailing_zeros() as i32 >= -shift => (mantissa >> -shift) as i128,
        _ if mantissa == 0 => 0,
        _ => return None,
    };
    Some(if v.is_sign_negative() { -magnitude } else { magnitude })
}

/// A number of 53 bits with any exponent: sums of f64 may lie beyond what an f64 holds, and their means within.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scaled {
    /// Zero, or at least 1 and below 2 in magnitude.
    significand: f64,
    exponent: i32,
}

impl Scaled {
    /// `magnitude * 2^e`, rounded to nearest even.
    #[inline]
    fn new(magnitude: u128, e: i32, negative: bool) -> Self {
        if magnitude == 0 {
            return Self { significand: 0.0, exponent: 0 };
        }
        let bits = (magnitude as f64).to_bits();
        let significand = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
        let exponent = (bits >> 52) as i32 - 1023 + e;
        Self { significand: if negative { -significand } else { significand }, exponent }
    }

    /// `q * 2^-s`.
    #[inline]
    pub fn of(q: i128, s: i32) -> Self {
        Self::new(q.unsigned_abs(), -s, q < 0)
    }

    pub fn is_positive(self) -> bool {
        self.significand > 0.0
    }

    /// Infinite beyond the range of an f64; below its normal numbers exact, for what sums f64 has no bits below theirs.
    #[inline]
    pub fn value(self) -> f64 {
        self.over(Self { significand: 1.0, exponent: 0 })
    }

    /// The quotient, rounded once to an f64.
    #[inline]
    pub fn over(self, divisor: Self) -> f64 {
        // Both sides of a division that has the right exponent: it alone rounds, to a subnormal, too.
        let e = (self.exponent - divisor.exponent).clamp(-2040, 2040);
        let half = e / 2;
        (self.significand * power_of_two(half)) / (divisor.significand * power_of_two(half - e))
    }

    /// Returns the divisor that makes `totals` a unit vector, and they themselves as f64 that its squares are: as they are,
    /// or, should squares leave the range of f64, times a power of two.
    pub fn direction(totals: &[Self]) -> Option<(Vec<f64>, f64)> {
        let squares = |values: &[f64]| striped(values.iter().map(|v| v * v));
        let values: Vec<_> = totals.iter().map(|t| t.value()).collect();
        let square = squares(&values);
        if (SQUARES.0..=SQUARES.1).contains(&square) {
            return Some((values, square.sqrt()));
        }
        let most = totals.iter().filter(|t| t.significand != 0.0).map(|t| t.exponent).max()?;
        let values: Vec<_> =
            totals.iter().map(|&t| Self { exponent: t.exponent - most, ..t }).map(Self::value).collect();
        let square = squares(&values);
        Some((values, square.sqrt()))
    }
}

/// Between these a sum of squares has lost nothing to the range of f64 that matters.
const SQUARES: (f64, f64) = (power_of_two(-900), power_of_two(1000));

/// Bits of a word of an [`Exact`] sum, and how many words hold every sum of 2^32 f64.
const WORD_BITS: i32 = 30;
const WORDS: usize = 72;

/// A sum of up to 2^32 numbers of any exponent: of words of 2^-1074 times powers of 2^30, to each of which a term adds less
/// than that.
#[derive(Clone)]
pub(crate) struct Exact([i64; WORDS]);

impl Exact {
    pub const ZERO: Self = Self([0; WORDS]);

    /// Adds `v`; nothing for a NaN or an infinity.
    pub fn add(&mut self, v: f64) {
        if let Some((mantissa, e)) = parts(v) {
            self.add_magnitude(mantissa.into(), e, v.is_sign_negative());
        }
    }

    /// Adds `q * 2^-s`, a sum of f64.
    pub fn add_fixed(&mut self, q: i128, s: i32) {
        self.add_magnitude(q.unsigned_abs(), -s, q < 0);
    }

    fn add_magnitude(&mut self, magnitude: u128, e: i32, negative: bool) {
        // No sum of f64 has bits below 2^-1074.
        let place = e + 1074;
        let (mut left, place) = if place < 0 { (magnitude >> -place, 0) } else { (magnitude, place) };
        let (mut word, shift) = ((place / WORD_BITS) as usize, place % WORD_BITS);
        let mut bits = WORD_BITS - shift;
        while left != 0 {
            let digit = ((left & ((1 << bits) - 1)) << (WORD_BITS - bits)) as i64;
            self.0[word] += if negative { -digit } else { digit };
            (left, bits, word) = (left >> bits, WORD_BITS, word + 1);
        }
    }

    pub fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a += b);
    }

    /// The words as digits, lowest first, and what is carried beyond the last one: -1 of negative sums, otherwise 0.
    fn carry(&self, negative: bool, mut take: impl FnMut(i32, u64)) -> i64 {
        self.0.iter().zip(0..).fold(0, |carry, (&word, at)| {
            let v = carry + if negative { -word } else { word };
            take(at, (v & ((1 << WORD_BITS) - 1)) as u64);
            v >> WORD_BITS
        })
    }

    pub fn is_negative(&self) -> bool {
        self.carry(false, |_, _| ()) < 0
    }

    /// The sum, rounded once.
    pub fn rounded(&self) -> Scaled {
        let negative = self.is_negative();
        let (mut below, mut lower, mut low, mut top) = (0, 0, 0, (0, 0));
        self.carry(negative, |at, high| {
            // The highest digit and two more are at least 61 bits; whether there are any below is one more.
            if high != 0 {
                let three = (high as u128) << (2 * WORD_BITS) | (low as u128) << WORD_BITS | lower as u128;
                top = (three | u128::from(below != 0), (at - 2) * WORD_BITS - 1074);
            }
            (below, lower, low) = (below | lower, low, high);
        });
        Scaled::new(top.0, top.1, negative)
    }
}

/// `2^e` for `-1022 <= e <= 1023`.
#[inline]
const fn power_of_two(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// The sum of `terms` as 32 lanes add it up: lane `p` takes the terms `p`, `p + 32`, .. in turn, then lanes 16, 8, 4, 2 and
/// 1 apart are added. Norms and shifts of centroids are such sums on every device.
pub(crate) fn striped(terms: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0f64; 32];
    terms.enumerate().for_each(|(i, t)| lanes[i % 32] += t);
    for step in [16, 8, 4, 2, 1] {
        (0..step).for_each(|i| lanes[i] += lanes[i + step]);
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sum of `terms`, bit by bit: whether it is negative, and its magnitude's bits from 2^-1074 up.
    fn reference(terms: &[f64]) -> (bool, Vec<bool>) {
        const BITS: usize = 2200;
        let mut sums = [[false; BITS]; 2];
        for &v in terms {
            let (mantissa, e) = parts(v).unwrap();
            let (sum, mut carry) = (&mut sums[usize::from(v < 0.0)], false);
            for (i, bit) in sum.iter_mut().enumerate().skip((e + 1074) as usize) {
                let at = i - (e + 1074) as usize;
                let own = at < 53 && mantissa >> at & 1 == 1;
                if at >= 53 && !carry {
                    break;
                }
                (*bit, carry) = (*bit ^ own ^ carry, u8::from(*bit) + u8::from(own) + u8::from(carry) > 1);
            }
        }
        let [plus, minus] = sums;
        let negative = plus.iter().rev().lt(minus.iter().rev());
        let (large, small) = if negative { (minus, plus) } else { (plus, minus) };
        let mut borrow = 0;
        let bits = large.iter().zip(small).map(|(&a, b)| {
            let left = i8::from(a) - i8::from(b) - borrow;
            borrow = i8::from(left < 0);
            left & 1 == 1
        });
        (negative, bits.collect())
    }

    /// The same rounded to 53 bits, half to even.
    fn rounded(terms: &[f64]) -> Scaled {
        let (negative, bits) = reference(terms);
        let Some(top) = bits.iter().rposition(|&b| b) else { return Scaled { significand: 0.0, exponent: 0 } };
        let bit = |i: isize| i >= 0 && bits[i as usize];
        let mut mantissa = (0..53).fold(0u64, |m, i| m << 1 | u64::from(bit(top as isize - i)));
        let half = bit(top as isize - 53);
        let more = (0..top as isize - 53).any(bit);
        mantissa += u64::from(half && (more || mantissa & 1 == 1));
        let (mantissa, top) = if mantissa >> 53 == 1 { (mantissa >> 1, top + 1) } else { (mantissa, top) };
        let significand = mantissa as f64 / (1u64 << 52) as f64;
        Scaled { significand: if negative { -significand } else { significand }, exponent: top as i32 - 1074 }
    }

    /// As sums are made: what fits an integer of the scale goes there, and the rest to words.
    fn both(terms: &[f64], most: f64, n: usize) -> Scaled {
        let s = scale(most, n);
        let (mut q, mut exact) = (0, Exact::ZERO);
        for &t in terms {
            match if t.abs() <= most { quantise(t, s) } else { None } {
                Some(v) => q += v,
                None => exact.add(t),
            }
        }
        exact.add_fixed(q, s);
        exact.rounded()
    }

    fn anything() -> impl Strategy<Value = f64> {
        any::<u64>().prop_map(f64::from_bits).prop_filter("finite", |v| v.is_finite())
    }

    /// Terms that cancel, are ties, and lie at all distances of each other.
    fn hostile() -> impl Strategy<Value = f64> {
        let near = (-1i64..=1, 0i32..2046, 0u64..4).prop_map(|(sign, e, low)| {
            sign as f64 * f64::from_bits((e as u64) << 52 | low | if low > 1 { (1 << 52) - 4 } else { 0 })
        });
        prop_oneof![anything(), near, (-3i32..=3).prop_map(|v| v as f64), Just(f64::MAX), Just(-f64::MAX), Just(5e-324)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn sums_are_rounded_once(
            mut terms in prop::collection::vec(hostile(), 0..40),
            cancelled in 0usize..40,
            most in prop_oneof![anything().prop_map(f64::abs), Just(1.0), Just(f64::MAX)],
            n in prop_oneof![Just(40usize), Just(1 << 20), Just(u32::MAX as usize)],
        ) {
            let gone: Vec<_> = terms.iter().take(cancelled).map(|t| -t).collect();
            terms.extend(gone);
            let mut exact = Exact::ZERO;
            terms.iter().for_each(|&t| exact.add(t));
            let want = rounded(&terms);
            prop_assert_eq!(exact.rounded(), want);
            prop_assert_eq!(exact.is_negative(), want.significand < 0.0);
            prop_assert_eq!(both(&terms, most, n.max(terms.len())), want);
            let (mut left, mut right) = (Exact::ZERO, Exact::ZERO);
            terms.iter().enumerate().for_each(|(i, &t)| if i % 3 == 0 { left.add(t) } else { right.add(t) });
            left.join(&right);
            prop_assert_eq!(left.rounded(), want);
        }

        #[test]
        fn quotients_are_rounded_once(a in anything(), b in anything(), shift in -1200i32..1200) {
            prop_assume!(a != 0.0 && b != 0.0);
            let of = |v: f64| { let mut e = Exact::ZERO; e.add(v); e.rounded() };
            prop_assert_eq!(of(a).value().to_bits(), a.to_bits());
            prop_assert_eq!(of(a).over(of(b)).to_bits(), (a / b).to_bits());
            // A common power of two changes nothing, wherever it takes both.
            let moved = |v: f64| Scaled { exponent: of(v).exponent + shift, ..of(v) };
            prop_assert_eq!(moved(a).over(moved(b)).to_bits(), (a / b).to_bits());
        }
    }

    #[test]
    fn as_many_of_the_largest_terms_as_there_may_be_rows() {
        let mut exact = Exact::ZERO;
        exact.add(f64::MAX);
        // Doubled 32 times: 2^32 terms.
        for _ in 0..32 {
            let other = exact.clone();
            exact.join(&other);
        }
        let sum = exact.rounded();
        assert_eq!(sum.value(), f64::INFINITY);
        assert_eq!(sum.over(Scaled::of(1 << 32, 0)), f64::MAX);
        let n = (1usize << 40) - 1;
        let q = quantise(f64::MAX, scale(f64::MAX, n)).unwrap();
        assert_eq!(
            Scaled::of(q.checked_mul(n as i128).unwrap(), scale(f64::MAX, n)).over(Scaled::of(n as i128, 0)),
            f64::MAX
        );
    }

    #[test]
    fn round_trip_is_exact_inside_the_window() {
        for (max, n) in [(1.0, 1usize), (3.5e38, 1 << 20), (1e-300, 7), (5e-324, 3), (65504.0, 1 << 31), (0.0, 4)] {
            let s = scale(max, n);
            for v in [max, -max, max * 0.3, -max * 1e-9] {
                assert_eq!(Scaled::of(quantise(v, s).unwrap(), s).value(), v, "{v} of {max}");
            }
        }
    }

    #[test]
    fn terms_below_the_grid_are_told_apart() {
        let s = scale(1e30, 1000);
        assert_eq!(quantise(1e-30, s), None);
        assert_eq!(quantise(0.0, s), Some(0));
        assert_eq!(quantise(f64::NAN, s), Some(0));
        assert_eq!(quantise(f64::NEG_INFINITY, s), Some(0));
    }

    #[test]
    fn directions_at_the_extremes() {
        let of = |v: f64| Scaled::of(quantise(v, scale(v.abs(), 1)).unwrap(), scale(v.abs(), 1));
        for power in [-1070, -600, -500, 0, 400, 600, 1020] {
            let unit = 2f64.powi(power / 2) * 2f64.powi(power - power / 2);
            let totals = [of(3.0 * unit), of(0.0), of(-4.0 * unit)];
            let (values, norm) = Scaled::direction(&totals).unwrap();
            assert_eq!(values.iter().map(|v| v / norm).collect::<Vec<_>>(), [0.6, 0.0, -0.8], "{power}");
        }
        assert_eq!(Scaled::direction(&[of(0.0)]), None);
    }
}
