//! Numbers that scores are computed in, and loops over rows of them that vectorise.

use pulp::Simd;

/// f32 or f64, as scores are computed in.
pub(crate) trait Scalar: Copy + PartialOrd + Send + Sync + 'static {
    /// Half the distance from 1 to the next number.
    const UNIT: f64;
    /// Above any absolute error that one product can suffer by underflow.
    const TINY: f64;
    /// Magnitudes whose sums stay finite.
    const HUGE: f64;
    const INFINITY: Self;
    /// The largest number that a norm is known by: what overflows is at least that.
    const FAR: f64;
    fn of(v: f64) -> Self;
    /// The same of many numbers, which nobody reads soon. [`end_streams`] belongs to it.
    fn stream_f32s(from: &[f32], to: &mut [Self]);
    /// The sum of a row's squares.
    fn squares<V: Simd>(simd: V, row: &[Self]) -> Self;
    fn widen(self) -> f64;
    fn sub(self, other: Self) -> Self;
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn abs(self) -> Self;
    /// The same for numbers that are equal, and mostly not for others.
    fn hash(self) -> u32;
}

macro_rules! scalar {
    ($t:ident, $tiny:expr, $huge:expr, $far:expr, $hash:expr, $stream:expr, $squares:ident) => {
        impl Scalar for $t {
            const UNIT: f64 = $t::EPSILON as f64 / 2.0;
            const TINY: f64 = $tiny;
            const HUGE: f64 = $huge;
            const INFINITY: Self = $t::INFINITY;
            const FAR: f64 = $far;
            #[inline(always)]
            fn of(v: f64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn stream_f32s(from: &[f32], to: &mut [Self]) {
                $stream(from, to);
            }
            #[inline(always)]
            fn squares<V: Simd>(simd: V, row: &[Self]) -> Self {
                $squares(simd, row)
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
            #[inline(always)]
            fn hash(self) -> u32 {
                // Both zeros become the positive one.
                $hash((self + 0.0).to_bits())
            }
        }
    };
}
scalar!(f32, 1e-44, 1e37, f32::MAX as f64, |bits| bits, stream, squares_of_f32s);
scalar!(
    f64,
    1e-322,
    1e307,
    1e150,
    |bits: u64| (bits ^ (bits >> 32)) as u32,
    |from: &[f32], to: &mut [f64]| { to.iter_mut().zip(from).for_each(|(to, &v)| *to = v.into()) },
    squares_of_f64s
);

/// Copies past the caches, where there is a way: lines that are written whole need not be read first. Only after [`end_streams`] may others be told.
#[inline(always)]
fn stream(from: &[f32], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if to.as_ptr().align_offset(16) == 0 && to.len().is_multiple_of(4) {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        for (to, four) in to.as_chunks_mut::<4>().0.iter_mut().zip(from.as_chunks::<4>().0) {
            // SAFETY: these are 16 bytes each, and those that are written begin at a multiple of as many.
            unsafe { _mm_stream_ps(to.as_mut_ptr(), _mm_loadu_ps(four.as_ptr())) };
        }
        return;
    }
    to.copy_from_slice(from);
}

/// Makes what has been streamed visible to whoever is told of it from here on.
pub(super) fn end_streams() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every processor of this architecture has SSE.
    unsafe {
        std::arch::x86_64::_mm_sfence()
    }
}

/// SIMD lanes that a loop is written for; wide enough for one AVX-512 register of f32.
pub(super) const LANES: usize = 16;

/// Folds `f` over pairs in [`LANES`] independent chains, so that the compiler may vectorise.
#[inline(always)]
pub(super) fn lanes<S: Scalar>(a: &[S], b: &[S], f: impl Fn(S, S, S) -> S) -> S {
    let zero = S::of(0.0);
    let mut acc = [zero; LANES];
    let ((xs, x_tail), (ys, y_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let tail = x_tail.iter().zip(y_tail).fold(zero, |s, (&x, &y)| f(s, x, y));
    for (x, y) in xs.iter().zip(ys) {
        for l in 0..LANES {
            acc[l] = f(acc[l], x[l], y[l]);
        }
    }
    fold_lanes(&acc, S::add).add(tail)
}

/// Sums that go on at once, so that none waits for the one before.
const CHAINS: usize = 4;

/// The sum of a `term` for each pair, in whole vectors of this processor, and of a term for each that is left.
#[inline(always)]
pub(super) fn sum_f32s<S: Simd>(
    simd: S,
    [a, b]: [&[f32]; 2],
    add: impl Fn(S::f32s, S::f32s, S::f32s) -> S::f32s,
    add_one: impl Fn(f32, f32, f32) -> f32,
) -> f32 {
    let ((xs, x_tail), (ys, y_tail)) = (S::as_simd_f32s(a), S::as_simd_f32s(b));
    let ((fours, others), (y_fours, y_others)) = (xs.as_chunks::<CHAINS>(), ys.as_chunks::<CHAINS>());
    let mut sums = [simd.splat_f32s(0.0); CHAINS];
    for (x, y) in fours.iter().zip(y_fours) {
        for i in 0..CHAINS {
            sums[i] = add(sums[i], x[i], y[i]);
        }
    }
    sums[0] = others.iter().zip(y_others).fold(sums[0], |sum, (&x, &y)| add(sum, x, y));
    let [a, b, c, d] = sums;
    let sum = simd.reduce_sum_f32s(simd.add_f32s(simd.add_f32s(a, b), simd.add_f32s(c, d)));
    x_tail.iter().zip(y_tail).fold(sum, |sum, (&x, &y)| add_one(sum, x, y))
}

/// The sum of a row's squares.
#[inline(always)]
fn squares_of_f32s<S: Simd>(simd: S, row: &[f32]) -> f32 {
    sum_f32s(simd, [row, row], |sum, x, y| simd.mul_add_f32s(x, y, sum), |sum, x, y| sum + x * y)
}

/// The sum of a row's squares, in whole vectors of this processor.
#[inline(always)]
fn squares_of_f64s<S: Simd>(simd: S, row: &[f64]) -> f64 {
    let (whole, rest) = S::as_simd_f64s(row);
    let (fours, others) = whole.as_chunks::<CHAINS>();
    let mut sums = [simd.splat_f64s(0.0); CHAINS];
    for four in fours {
        for i in 0..CHAINS {
            sums[i] = simd.mul_add_e_f64s(four[i], four[i], sums[i]);
        }
    }
    sums[0] = others.iter().fold(sums[0], |sum, &v| simd.mul_add_e_f64s(v, v, sum));
    let [a, b, c, d] = sums;
    let sum = simd.reduce_sum_f64s(simd.add_f64s(simd.add_f64s(a, b), simd.add_f64s(c, d)));
    rest.iter().fold(sum, |sum, v| sum + v * v)
}

/// All lanes in one, halves of them by halves. It is not inlined, since that makes the compiler take narrower vectors for the loop before.
#[inline(never)]
pub(super) fn fold_lanes<E: Copy>(lanes: &[E; LANES], f: impl Fn(E, E) -> E) -> E {
    let mut of = *lanes;
    for i in 0..8 {
        of[i] = f(of[i], of[i + 8]);
    }
    for i in 0..4 {
        of[i] = f(of[i], of[i + 4]);
    }
    f(f(of[0], of[2]), f(of[1], of[3]))
}

/// The lowest of these scores.
#[inline(always)]
pub(super) fn lowest<S: Scalar>(scores: &[S]) -> S {
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
    smaller(fold_lanes(&low, smaller), lowest)
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
    (fold_lanes(&largest, |a, b| if b > a { b } else { a }), fold_lanes(&poison, S::add) == zero)
}

/// A number for a row, in independent chains as [`lanes`].
pub(super) fn hash<S: Scalar>(row: &[S]) -> u32 {
    let mix = |h: u32, v: u32| (h.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b1);
    let mut all = [0u32; LANES];
    for chunk in row.chunks(LANES) {
        all.iter_mut().zip(chunk).for_each(|(h, v)| *h = mix(*h, v.hash()));
    }
    let hash = all.into_iter().fold(0, mix);
    hash ^ (hash >> 15)
}
