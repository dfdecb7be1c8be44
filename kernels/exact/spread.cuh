// The distances that k-means++ draws rows by, and the whole numbers that potentials are sums of: src/spread.rs, which
// says why, once more.
#pragma once
#include "exact/common.cuh"

__device__ __forceinline__ float less(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ double less(double a, double b) { return __dsub_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }

/// A dot product is no spread.
__device__ __forceinline__ int spread_by(int metric) { return metric == DOT ? SQUARED_EUCLIDEAN : metric; }

/// True if a sum has lost nothing to the range of its type.
template <class F>
__device__ __forceinline__ bool within_limits(double sum) {
    return sizeof(F) == 4 ? sum > 1e-30 && sum < 1e37 : sum > 1e-290 && sum < 1e300;
}

/// By the norm of a row, its values are multiplied by this.
template <class F>
__device__ __forceinline__ F reciprocal(double norm) {
    return rounded<F>(__ddiv_rn(1.0, norm));
}

/// The sums of row `x` and each of the rows `c`, by a warp, to all of its lanes. Rows are multiplied by `of_x` and
/// `of_c` if `scaled`.
template <int N, class T>
__device__ __forceinline__ void spread_sums(int metric, const T* x, const T* const (&c)[N], int64_t d, bool scaled,
                                            Filter<T> of_x, const Filter<T> (&of_c)[N], Filter<T> (&sums)[N]) {
#pragma unroll
    for (int e = 0; e < N; ++e) sums[e] = 0;
    for (int64_t j = threadIdx.x % WARP; j < d; j += WARP) {
        const Filter<T> v = scaled ? times(filter(x[j]), of_x) : filter(x[j]);
#pragma unroll
        for (int e = 0; e < N; ++e) {
            const Filter<T> w = scaled ? times(filter(c[e][j]), of_c[e]) : filter(c[e][j]);
            const Filter<T> t = less(v, w);
            sums[e] = plus(sums[e], metric == MANHATTAN ? (t < 0 ? -t : t) : times(t, t));
        }
    }
    for (int step = WARP / 2; step; step /= 2) {
#pragma unroll
        for (int e = 0; e < N; ++e) sums[e] = plus(sums[e], __shfl_xor_sync(~0u, sums[e], step));
    }
}

/// The distance that a sum is; by the definition where its type is short of range.
template <class T>
__device__ __forceinline__ double spread_distance(int metric, double sum, const T* x, const T* c, int64_t d) {
    if (within_limits<Filter<T>>(sum)) return metric == COSINE ? __dmul_rn(sum, 0.5) : sum;
    const double defined = distance(metric, x, c, d);
    return defined > 0 ? defined : 0;
}

/// The smallest `e` with `v < 2^e`, for finite non-negative `v` (0 for 0).
__device__ __forceinline__ int exponent_above(double v) {
    const uint64_t bits = __double_as_longlong(v);
    const int biased = int(bits >> 52) & 0x7ff;
    return biased ? biased - 1022 : bits ? 64 - __clzll(bits) - 1074 : 0;
}

/// Units of a potential in 1, for `n` terms, none above `most`.
__device__ __forceinline__ double potential_units(double most, int64_t n) {
    const int bits = min(63 - (64 - __clzll(n)), 51);
    return power_of_two(max(-1022, min(1023, bits - exponent_above(fmin(most, 0x1p+1000)))));
}

/// A term as a whole number of them.
__device__ __forceinline__ unsigned long long whole(double term, double units) {
    const double shifted = __dadd_rn(__dmul_rn(fmin(term, 0x1p+1000), units), 0x1p+52);
    return (unsigned long long)(__double_as_longlong(shifted) - __double_as_longlong(0x1p+52));
}
