//! Numbers as vectors have them, with what a softmax needs of them.

use super::scalar::Scalar;
use crate::request::Codes;
use pulp::{Simd, WithSimd};

/// Numbers that vectors have as lanes.
pub(super) trait Lane: Scalar + From<f32> + From<i16> {
    type Vector<S: Simd>: Copy;
    /// Runs `op` with vectors that this processor has.
    fn dispatch<O: WithSimd>(op: O) -> O::Output;
    /// A padded row.
    fn vectors<S: Simd>(row: &[Self]) -> &[Self::Vector<S>];
    fn vectors_mut<S: Simd>(row: &mut [Self]) -> &mut [Self::Vector<S>];
    fn splat<S: Simd>(simd: S, v: Self) -> Self::Vector<S>;
    fn times<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    fn total<S: Simd>(simd: S, v: Self::Vector<S>) -> Self;
    /// `e^self` of what is at most 0 or NaN; 0 where that is no normal number.
    fn exp(self) -> Self;
    /// The scale of [`Codes`] whose largest magnitude is 1, and the least that numbers are divided by.
    const BYTE: Self;
    const LEAST: Self;
    /// The code of a number by its row's scale, as Candle's ops have it.
    fn byte(self, scale: Self) -> u8;
}

macro_rules! lane {
    ($t:ident, $vector:ident, $as_simd:ident, $as_mut_simd:ident, $splat:ident, $mul:ident, $sum:ident, $mul_add:expr, $dispatch:expr, $exp:expr) => {
        impl Lane for $t {
            type Vector<S: Simd> = S::$vector;
            #[inline(always)]
            fn dispatch<O: WithSimd>(op: O) -> O::Output {
                $dispatch(op)
            }
            #[inline(always)]
            fn vectors<S: Simd>(row: &[Self]) -> &[S::$vector] {
                S::$as_simd(row).0
            }
            #[inline(always)]
            fn vectors_mut<S: Simd>(row: &mut [Self]) -> &mut [S::$vector] {
                S::$as_mut_simd(row).0
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, v: Self) -> S::$vector {
                simd.$splat(v)
            }
            #[inline(always)]
            fn times<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                $mul_add(simd, a, b, c)
            }
            #[inline(always)]
            fn total<S: Simd>(simd: S, v: S::$vector) -> Self {
                simd.$sum(v)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            const BYTE: Self = (1.0 / Codes::MOST) as $t;
            const LEAST: Self = f32::MIN_POSITIVE as $t;
            #[inline(always)]
            fn byte(self, scale: Self) -> u8 {
                ((self / scale).round() + $t::from(Codes::ZERO)) as u8
            }
        }
    };
}
lane!(
    f32,
    f32s,
    as_simd_f32s,
    as_mut_simd_f32s,
    splat_f32s,
    mul_f32s,
    reduce_sum_f32s,
    S::mul_add_e_f32s,
    |op| pulp::Arch::new().dispatch(op),
    exp_f32
);
// Models compute in f32, so f64 is compiled once, for vectors that every processor has in parts. Fused, some of them would add by calls.
lane!(
    f64,
    f64s,
    as_simd_f64s,
    as_mut_simd_f64s,
    splat_f64s,
    mul_f64s,
    reduce_sum_f64s,
    |simd: S, a, b, c| simd.add_f64s(simd.mul_f64s(a, b), c),
    |op: O| op.with_simd(pulp::Scalar512b),
    f64::exp
);

/// By Cody and Waite (1980): `2^n e^r` with `|r|` at most half of `ln 2`, of which Taylor's series takes seven terms to an f32's last bit.
/// Nothing branches, so that loops of it vectorise.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    /// Added to a number it leaves the nearest integer in the last bits.
    const ROUND: f32 = 12_582_912.0;
    /// `ln 2` as a number of few bits, whose products with small integers are exact, and the rest.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const TERMS: [f32; 7] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let e = TERMS.iter().fold(0.0, |sum, term| sum * r + term) * r + 1.0;
    let e = f32::from_bits(e.to_bits().wrapping_add(shifted.to_bits() << 23));
    let e = if x < -87.0 { 0.0 } else { e };
    if x.is_nan() {
        x
    } else {
        e
    }
}
