//! Sums that are exact, and so do not depend on their order.
//!
//! A sum of `n` numbers below `2^e` is kept as a 128-bit integer of units of `2^-s`, `s = 126 - e - bits(n)`: it cannot
//! overflow, and integer addition is associative, so threads, chunks and devices may add in any order and split and still
//! produce the same bits. A term that is no whole number of units is cut: what it has below them goes to more integers, 64 bits
//! apart, down to where an f64's exponents end (a [`Grid`], after the Kulisch accumulator: Kulisch and Miranker 1986). All of it
//! is exact, and what becomes of a sum is rounded once. `kernels/exact/common.cuh` and `kernels/exact/sums.cuh` hold the same
//! functions.

/// The scale `s` for sums of at most `n` terms, none above `max_abs` in magnitude.
pub(crate) fn scale(max_abs: f64, n: usize) -> i32 {
    let bits = (usize::BITS - n.leading_zeros()) as i32;
    126 - exponent(max_abs) - bits
}

/// The smallest `e` with `v < 2^e`, for finite non-negative `v` (0 for 0).
pub(crate) fn exponent(v: f64) -> i32 {
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

    /// A finite number of an f64.
    pub fn of_f64(v: f64) -> Self {
        parts(v).map_or(Self::of(0, 0), |(mantissa, e)| Self::new(mantissa.into(), e, v.is_sign_negative()))
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

    /// The `totals` as f64, and their norm, which makes a unit vector of them; both times a power of two if squares would leave the
    /// range of f64. None for zeros.
    pub fn direction(totals: &[Self]) -> Option<(Vec<f64>, f64)> {
        let squares = |values: &[f64]| striped(&values.iter().map(|v| v * v).collect::<Vec<_>>());
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

/// Between these a sum of squares has lost nothing that matters to underflow or overflow.
const SQUARES: (f64, f64) = (power_of_two(-900), power_of_two(1000));

/// The bits between the units of two neighbouring planes of a [`Grid`].
const PLANE_BITS: i32 = 64;

/// The place value of the integers of a sum: those of plane `l` count units of `2^-(scale + 64 l)`, and a term is cut at the units
/// of planes. Planes are the digits of a Kulisch accumulator in base 2^64, with a sign and 63 more bits each, so that carries
/// wait until a sum is rounded; only those are kept that terms reach. Fewer than 2^62 terms overflow none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub scale: i32,
    pub planes: usize,
}

impl Grid {
    /// Of `planes` planes for at most `n` terms, none above `max_abs` in magnitude.
    pub fn new(max_abs: f64, n: usize, planes: usize) -> Self {
        Self { scale: scale(max_abs, n), planes }
    }

    /// With as many planes as terms have that are whole numbers of `2^lowest`.
    pub fn down_to(lowest: i32, max_abs: f64, n: usize) -> Self {
        let scale = scale(max_abs, n);
        Self { scale, planes: 1 + ((-lowest - scale).max(0) as usize).div_ceil(PLANE_BITS as usize) }
    }

    /// With planes for every f64 that is no larger.
    pub fn of_f64(max_abs: f64, n: usize) -> Self {
        Self::down_to(-1074, max_abs, n)
    }

    /// The exponent of the last plane's unit.
    pub fn unit(self) -> i32 {
        -self.scale - PLANE_BITS * (self.planes as i32 - 1)
    }

    /// Calls `add(plane, integer)` with the digits of `v`, rounded down to the unit of the last plane; a NaN or an infinity has
    /// none.
    pub fn split(self, v: f64, mut add: impl FnMut(usize, i128)) {
        let Some((mut mantissa, e)) = parts(v) else { return };
        let sign = if v.is_sign_negative() { -1 } else { 1 };
        for plane in 0..self.planes {
            if mantissa == 0 {
                return;
            }
            let shift = e + self.scale + PLANE_BITS * plane as i32;
            let mut units = 0;
            if shift >= 0 {
                (units, mantissa) = ((mantissa as i128) << shift, 0);
            } else if shift > -PLANE_BITS {
                (units, mantissa) = ((mantissa >> -shift).into(), mantissa & ((1 << -shift) - 1));
            }
            if plane + 1 == self.planes && sign < 0 && mantissa != 0 {
                units += 1;
            }
            if units != 0 {
                add(plane, sign * units);
            }
        }
    }

    /// The sum of which `planes` are the first ones, rounded once.
    pub fn rounded(self, planes: &[i128]) -> Scaled {
        self.magnitude(planes, false).or_else(|| self.magnitude(planes, true)).expect("a number or its negative")
    }

    /// Whether a sum is below zero.
    pub fn is_negative(self, planes: &[i128]) -> bool {
        self.magnitude(planes, false).is_none()
    }

    /// The sum or its negative, if it is not below zero, with the sign of the former.
    fn magnitude(self, planes: &[i128], negative: bool) -> Option<Scaled> {
        let (mut carried, mut below, mut low, mut top) = (0i128, false, 0u64, (0, 0));
        let mut take = |digit: u64, unit: i32| {
            // The highest digit and the one below are at least 65 bits; whether there are any below them is one more.
            if digit != 0 {
                top = (u128::from(digit) << 64 | u128::from(low) | u128::from(below), unit - 64);
            }
            (below, low) = (below || low != 0, digit);
        };
        for (plane, &units) in planes.iter().enumerate().rev() {
            let v = carried + if negative { -units } else { units };
            take(v as u64, -(self.scale + PLANE_BITS * plane as i32));
            carried = v >> 64;
        }
        if carried < 0 {
            return None;
        }
        take(carried as u64, 64 - self.scale);
        Some(Scaled::new(top.0, top.1, negative))
    }
}

/// `2^e` for `-1022 <= e <= 1023`.
#[inline]
pub(crate) const fn power_of_two(e: i32) -> f64 {
    f64::from_bits(((e + 1023) as u64) << 52)
}

/// The sum of `terms` as 32 lanes add it up: lane `p` takes the terms `p`, `p + 32`, .. in turn, then lanes 16, 8, 4, 2 and
/// 1 apart are added. Norms and shifts of centroids are such sums on every device.
pub(crate) fn striped(terms: &[f64]) -> f64 {
    let mut lanes = [0f64; 32];
    for terms in terms.chunks(32) {
        lanes.iter_mut().zip(terms).for_each(|(lane, t)| *lane += t);
    }
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

    /// The planes of a sum.
    fn sum(grid: Grid, terms: &[f64]) -> Vec<i128> {
        let mut planes = vec![0; grid.planes];
        terms.iter().for_each(|&t| grid.split(t, |plane, units| planes[plane] += units));
        planes
    }

    fn largest(terms: &[f64]) -> f64 {
        terms.iter().fold(0.0, |most: f64, t| most.max(t.abs()))
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
            n in prop_oneof![Just(80usize), Just(1 << 20), Just(u32::MAX as usize), Just((1 << 62) - 1)],
        ) {
            let gone: Vec<_> = terms.iter().take(cancelled).map(|t| -t).collect();
            terms.extend(gone);
            let (grid, want) = (Grid::of_f64(largest(&terms), n), rounded(&terms));
            let planes = sum(grid, &terms);
            prop_assert_eq!(grid.rounded(&planes), want);
            // In parts, of which one needs fewer planes.
            let (left, right) = terms.split_at(terms.len() / 3);
            let mut joined = sum(grid, left);
            let lowest = right.iter().filter_map(|&t| parts(t)).map(|(m, e)| if m == 0 { 1100 } else { e }).min();
            let few = Grid::down_to(lowest.unwrap_or(0), largest(&terms), n);
            joined.iter_mut().zip(sum(few, right)).for_each(|(a, b)| *a += b);
            prop_assert_eq!(joined, planes);
            // An integer of the scale takes whole numbers of it.
            for &t in &terms {
                let mut parts = vec![0; grid.planes];
                grid.split(t, |plane, units| parts[plane] += units);
                prop_assert_eq!(quantise(t, grid.scale), parts[1..].iter().all(|&p| p == 0).then_some(parts[0]));
            }
        }

        #[test]
        fn terms_below_the_last_plane_are_rounded_down(
            terms in prop::collection::vec(hostile(), 1..20),
            planes in 1usize..4,
        ) {
            let grid = Grid::new(largest(&terms), terms.len(), planes);
            let lowest = -grid.scale - 64 * (planes as i32 - 1);
            prop_assume!(lowest > -1000);
            let times = |v: f64, e: i32| v * 2f64.powi(e / 2) * 2f64.powi(e - e / 2);
            let unit = times(1.0, lowest);
            let floor = |&t: &f64| match t {
                t if t.abs() >= unit => times(times(t, -lowest).floor(), lowest),
                t if t < 0.0 => -unit,
                _ => 0.0,
            };
            let floors: Vec<_> = terms.iter().map(floor).collect();
            prop_assert_eq!(grid.rounded(&sum(grid, &terms)), rounded(&floors));
        }

        #[test]
        fn quotients_are_rounded_once(a in anything(), b in anything(), shift in -1200i32..1200) {
            prop_assume!(a != 0.0 && b != 0.0);
            let scaled = |v: f64| { let grid = Grid::of_f64(v.abs(), 1); grid.rounded(&sum(grid, &[v])) };
            prop_assert_eq!(scaled(a).value().to_bits(), a.to_bits());
            prop_assert_eq!(scaled(a).over(scaled(b)).to_bits(), (a / b).to_bits());
            // A common power of two changes nothing, wherever it takes both.
            let moved = |v: f64| Scaled { exponent: scaled(v).exponent + shift, ..scaled(v) };
            prop_assert_eq!(moved(a).over(moved(b)).to_bits(), (a / b).to_bits());
        }
    }

    #[test]
    fn as_many_of_the_largest_terms_as_there_may_be_rows() {
        let grid = Grid::of_f64(f64::MAX, 1 << 32);
        let planes: Vec<_> = sum(grid, &[f64::MAX]).into_iter().map(|units| units << 32).collect();
        let sum = grid.rounded(&planes);
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
        let scaled = |v: f64| Scaled::of(quantise(v, scale(v.abs(), 1)).unwrap(), scale(v.abs(), 1));
        for power in [-1070, -600, -500, 0, 400, 600, 1020] {
            let unit = 2f64.powi(power / 2) * 2f64.powi(power - power / 2);
            let totals = [scaled(3.0 * unit), scaled(0.0), scaled(-4.0 * unit)];
            let (values, norm) = Scaled::direction(&totals).unwrap();
            assert_eq!(values.iter().map(|v| v / norm).collect::<Vec<_>>(), [0.6, 0.0, -0.8], "{power}");
        }
        assert_eq!(Scaled::direction(&[scaled(0.0)]), None);
    }
}
