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

/// The sums of each of the rows `x` with each of the rows `c`, by a warp: to lane l that of row l / N and l % N. Rows
/// are multiplied by `of_x` and `of_c` if `scaled`. Lanes that exchange halves of what they have add up what a
/// butterfly would, in a fifth of its steps.
template <int R, int N, class T>
__device__ __forceinline__ Filter<T> spread_sum(int metric, const T* const (&x)[R], const T* const (&c)[N], int64_t d,
                                                bool scaled, const Filter<T> (&of_x)[R], const Filter<T> (&of_c)[N]) {
    static_assert(R * N == WARP, "a pair to a lane");
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    F sums[WARP] = {};
    const auto add = [&](auto scale, auto term) {
        // Rows come from memory, the others from the cache: a row's next value is on its way while one is added.
        F next[R];
#pragma unroll
        for (int q = 0; q < R; ++q) next[q] = lane < d ? filter(x[q][lane]) : 0;
#pragma unroll 1
        for (int64_t j = lane; j < d; j += WARP) {
            F v[R];
#pragma unroll
            for (int q = 0; q < R; ++q) {
                v[q] = scale(next[q], of_x[q]);
                if (j + WARP < d) next[q] = filter(x[q][j + WARP]);
            }
#pragma unroll
            for (int e = 0; e < N; ++e) {
                const F w = scale(filter(c[e][j]), of_c[e]);
#pragma unroll
                for (int q = 0; q < R; ++q) sums[q * N + e] = plus(sums[q * N + e], term(less(v[q], w)));
            }
        }
    };
    const auto as_it_is = [](F v, F) { return v; };
    const auto square = [](F t) { return times(t, t); };
    if (metric == MANHATTAN) add(as_it_is, [](F t) { return t < 0 ? -t : t; });
    else if (scaled) add([](F v, F by) { return times(v, by); }, square);
    else add(as_it_is, square);
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < step; ++i) {
            const F kept = upper ? sums[i + step] : sums[i], given = upper ? sums[i] : sums[i + step];
            sums[i] = plus(kept, __shfl_xor_sync(~0u, given, step));
        }
    }
    return sums[0];
}

/// The distance that a sum is; by the definition where its type is short of range.
template <class T>
__device__ __forceinline__ double spread_distance(int metric, double sum, const T* x, const T* c, int64_t d) {
    if (within_limits<Filter<T>>(sum)) return metric == COSINE ? __dmul_rn(sum, 0.5) : sum;
    const double defined = distance(metric, x, c, d);
    return defined > 0 ? defined : 0;
}

/// The infinity in which a row stands behind all others of a race: src/spread.rs says where, once more.
__device__ __forceinline__ double no_arrival() { return __longlong_as_double(0x7ff0000000000000); }

/// When a row arrives by its distance to the nearest seed and its weight, from `arrival` on of those that are drawn.
__device__ __forceinline__ double arrival_of(double near, double weight, double arrival) {
    if (near < 0) return no_arrival();
    if (weight < 0) return 4e300;
    if (weight > 0) return near > 0 ? arrival : 2e300;
    return 3e300;
}

/// When a row arrives whose distance to the nearest seed falls, at time `now`, from `before` to `near`, if that is > 0.
__device__ __forceinline__ double postponed(double arrival, double now, double before, double near) {
    const double share = __ddiv_rn(fmin(before, RACED), fmin(near, RACED));
    return fmin(__dadd_rn(now, __dmul_rn(__dsub_rn(arrival, now), share)), RACED);
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
