//! Sums that do not depend on their order.
//!
//! A sum of `n` numbers below `2^e` is kept as a 128-bit integer of units of `2^-s`, `s = 126 - e - bits(n)`: it cannot
//! overflow, and integer addition is associative, so threads, chunks and devices may add in any order and split and still
//! produce the same bits. A term is rounded toward zero to the grid once, on its own. For f16, bf16 and f32 input the grid
//! is fine enough that nothing is rounded unless it is `2^(102 - bits(n))` times smaller than the largest term.
//! `kernels/common.cuh` holds the same three functions.

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

/// `v * 2^s`, rounded toward zero; 0 for a NaN or an infinity.
#[inline]
pub(crate) fn quantise(v: f64, s: i32) -> i128 {
    let bits = v.to_bits();
    let biased = (bits >> 52) as i32 & 0x7ff;
    let fraction = bits & ((1 << 52) - 1);
    let (mantissa, e) = match biased {
        0x7ff => return 0,
        0 => (fraction, -1074),
        _ => (fraction | 1 << 52, biased - 1075),
    };
    let shift = e + s;
    let magnitude = match shift {
        // At most 74 but for a subnormal, whose mantissa is the shorter for it.
        0..=126 => (mantissa as i128) << shift,
        -63..=-1 => (mantissa >> -shift) as i128,
        _ => 0,
    };
    if v.is_sign_negative() {
        -magnitude
    } else {
        magnitude
    }
}

/// `q * 2^-s` in f64, rounded once to nearest even.
#[inline]
pub(crate) fn value(q: i128, s: i32) -> f64 {
    let half = -s / 2;
    q as f64 * power_of_two(half) * power_of_two(-s - half)
}

/// `2^e` for `-1022 <= e <= 1023`.
#[inline]
fn power_of_two(e: i32) -> f64 {
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

    #[test]
    fn round_trip_is_exact_inside_the_window() {
        for (max, n) in [(1.0, 1usize), (3.5e38, 1 << 20), (1e-300, 7), (5e-324, 3), (65504.0, 1 << 31), (0.0, 4)] {
            let s = scale(max, n);
            for v in [max, -max, max * 0.3, -max * 1e-9] {
                assert_eq!(value(quantise(v, s), s), v, "{v} of {max}");
            }
        }
    }

    #[test]
    fn n_largest_terms_do_not_overflow() {
        let n = (1usize << 40) - 1;
        let q = quantise(f64::MAX, scale(f64::MAX, n));
        assert!(q.checked_mul(n as i128).is_some());
    }

    #[test]
    fn terms_below_the_grid_and_non_finite_terms_are_zero() {
        let s = scale(1e30, 1000);
        assert_eq!(quantise(1e-30, s), 0);
        assert_eq!(quantise(f64::NAN, s), 0);
        assert_eq!(quantise(f64::NEG_INFINITY, s), 0);
    }
}
