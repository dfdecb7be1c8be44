// Every kernel shares this: views of rows, conversions, the f64 definition of a distance, order-free sums, random
// numbers.
//
// Everything here that decides a result is written with the *_rn intrinsics, which the compiler never contracts to FMA,
// so its bits are those of src/{metric,fixed,rng}.rs on any host. Sizes and indices are 64-bit; grids are
// one-dimensional and every kernel loops over what its grid does not cover.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include <type_traits>

#include "params.cuh"

constexpr int WARP = 32;

template <class T>
__device__ __forceinline__ const T* row_of(const T* x, const Rows& r, int64_t b, int64_t i) {
    return x + b * r.batch_stride + i * r.row_stride;
}

/// One `extern "C"` kernel per element type: `INSTANCE(suffix, type)`.
#define FOR_EACH_TYPE(INSTANCE)                                                                                        \
    INSTANCE(f16, __half)                                                                                              \
    INSTANCE(bf16, __nv_bfloat16) INSTANCE(f32, float) INSTANCE(f64, double)

__device__ __forceinline__ int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t all_threads() { return int64_t(gridDim.x) * blockDim.x; }

/// Of the grid's blocks, how many share each of so many problems.
__device__ __forceinline__ int64_t blocks_each(int64_t problems) {
    return 0 < problems && problems < gridDim.x ? gridDim.x / problems : 1;
}

__device__ __forceinline__ double warp_sum(double v) {
    for (int lane = WARP / 2; lane; lane /= 2) v += __shfl_xor_sync(~0u, v, lane);
    return v;
}

__device__ __forceinline__ __int128 warp_sum(__int128 v) {
#pragma unroll
    for (int lane = WARP / 2; lane; lane /= 2) {
        const uint64_t low = __shfl_xor_sync(~0u, uint64_t(v), lane);
        const uint64_t high = __shfl_xor_sync(~0u, uint64_t(v >> 64), lane);
        v += __int128((unsigned __int128)high << 64 | low);
    }
    return v;
}

__device__ __forceinline__ double warp_max(double v) {
    for (int lane = WARP / 2; lane; lane /= 2) v = fmax(v, __shfl_xor_sync(~0u, v, lane));
    return v;
}

/// The rank of the `at`th of `count` values, which is `own`: equal ones by their index.
template <class Value, class Other>
__device__ __forceinline__ int rank_among(Value own, int at, int count, Other other) {
    int rank = 0;
    for (int i = 0; i < count; ++i) {
        const Value value = other(i);
        rank += value < own || (value == own && i < at);
    }
    return rank;
}

/// Walks the cells (row, column) of a `d`-column chunk in memory order, one block in step, with no division per cell.
struct Cells {
    int64_t row, column, d, rows_step, columns_step;

    __device__ explicit Cells(int64_t d)
        : row(threadIdx.x / d),
          column(threadIdx.x % d),
          d(d),
          rows_step(blockDim.x / d),
          columns_step(blockDim.x % d) {}

    __device__ void next() {
        row += rows_step;
        column += columns_step;
        if (column >= d) column -= d, ++row;
    }
};

// ---- Conversions: up is exact, down rounds once to nearest even.

__device__ __forceinline__ double wide(__half v) { return __half2float(v); }
__device__ __forceinline__ double wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ double wide(float v) { return v; }
__device__ __forceinline__ double wide(double v) { return v; }

/// The type that scores are filtered in, and its conversion, which is exact too.
template <class T>
struct FilterOf {
    using type = float;
};
template <>
struct FilterOf<double> {
    using type = double;
};
template <class T>
using Filter = typename FilterOf<T>::type;

__device__ __forceinline__ float filter(__half v) { return __half2float(v); }
__device__ __forceinline__ float filter(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float filter(float v) { return v; }
__device__ __forceinline__ double filter(double v) { return v; }

/// To f32 toward zero, with the last bit set if anything was lost ("to odd"): a further rounding to a type at least two
/// bits narrower then equals a single one (Boldo and Melquiond 2008).
__device__ __forceinline__ float round_to_odd(double v) {
    const float t = __double2float_rz(v);
    return double(t) == v ? t : __uint_as_float(__float_as_uint(t) | 1);
}

template <class T>
__device__ T rounded(double v);
template <>
__device__ __forceinline__ __half rounded(double v) {
    return __float2half_rn(round_to_odd(v));
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded(double v) {
    return __float2bfloat16_rn(round_to_odd(v));
}
template <>
__device__ __forceinline__ float rounded(double v) {
    return __double2float_rn(v);
}
template <>
__device__ __forceinline__ double rounded(double v) {
    return v;
}

// ---- Integer keys in the order of the values (-0 below +0): flip the sign bit, or everything if it is set.

template <class K>
__device__ __forceinline__ K ordered(K bits) {
    constexpr K sign = K(1) << (sizeof(K) * 8 - 1);
    return bits & sign ? K(~bits) : K(bits | sign);
}
template <class K>
__device__ __forceinline__ K unordered(K key) {
    constexpr K sign = K(1) << (sizeof(K) * 8 - 1);
    return key & sign ? K(key ^ sign) : K(~key);
}

// ---- The definition of a distance (src/metric.rs): f64, columns ascending, no FMA.

enum Metric : int { SQUARED_EUCLIDEAN = 0, COSINE = 1, DOT = 2, MANHATTAN = 3 };

/// Hands `take(n, ...)` the pairs of values of row `x` and each row `c[n]`, columns ascending. What is done with them
/// is a chain; the loads need not be: 128 bytes of each row are under way at a time.
template <int N, class T, class Take>
__device__ __forceinline__ void for_each_pair(const T* x, const T* const (&c)[N], int64_t d, Take take) {
    constexpr int EACH = 16 / sizeof(T), LOADS = 8;
    struct alignas(16) Piece {
        T values[EACH];
    };
    uintptr_t together = reinterpret_cast<uintptr_t>(x);
#pragma unroll
    for (int n = 0; n < N; ++n) together |= reinterpret_cast<uintptr_t>(c[n]);
    int64_t i = 0;
    if (together % 16 == 0) {
        for (; i + EACH * LOADS <= d; i += EACH * LOADS) {
            uint4 u[LOADS], v[N][LOADS];
#pragma unroll
            for (int p = 0; p < LOADS; ++p) {
                u[p] = *reinterpret_cast<const uint4*>(x + i + p * EACH);
#pragma unroll
                for (int n = 0; n < N; ++n) v[n][p] = *reinterpret_cast<const uint4*>(c[n] + i + p * EACH);
            }
#pragma unroll
            for (int p = 0; p < LOADS; ++p) {
                const Piece& a = reinterpret_cast<const Piece&>(u[p]);
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
#pragma unroll
                    for (int n = 0; n < N; ++n) {
                        take(n, wide(a.values[e]), wide(reinterpret_cast<const Piece&>(v[n][p]).values[e]));
                    }
                }
            }
        }
    }
#pragma unroll 8
    for (; i < d; ++i) {
#pragma unroll
        for (int n = 0; n < N; ++n) take(n, wide(x[i]), wide(c[n][i]));
    }
}

/// The distances of a row to `N` others; `pairs(take)` hands `take(n, ...)` their values.
template <int N, class Pairs>
__device__ __forceinline__ void distances_of(int metric, Pairs pairs, double (&s)[N]) {
    double xx = 0, cc[N];
#pragma unroll
    for (int n = 0; n < N; ++n) s[n] = cc[n] = 0;
    if (metric == SQUARED_EUCLIDEAN) {
        pairs([&](int n, double a, double b) {
            const double t = __dsub_rn(a, b);
            s[n] = __dadd_rn(s[n], __dmul_rn(t, t));
        });
    } else if (metric == MANHATTAN) {
        pairs([&](int n, double a, double b) { s[n] = __dadd_rn(s[n], fabs(__dsub_rn(a, b))); });
    } else if (metric == DOT) {
        pairs([&](int n, double a, double b) { s[n] = __dadd_rn(s[n], __dmul_rn(a, b)); });
#pragma unroll
        for (int n = 0; n < N; ++n) s[n] = -s[n];
    } else {
        pairs([&](int n, double a, double b) {
            s[n] = __dadd_rn(s[n], __dmul_rn(a, b));
            if (n == 0) xx = __dadd_rn(xx, __dmul_rn(a, a));
            cc[n] = __dadd_rn(cc[n], __dmul_rn(b, b));
        });
#pragma unroll
        for (int n = 0; n < N; ++n) {
            const double norms = __dmul_rn(__dsqrt_rn(xx), __dsqrt_rn(cc[n]));
            s[n] = norms == 0 ? 1.0 : __dsub_rn(1.0, __ddiv_rn(s[n], norms));
        }
    }
}

/// The distances of row `x` to the rows `c`.
template <int N, class T>
__device__ __forceinline__ void distances(int metric, const T* x, const T* const (&c)[N], int64_t d, double (&s)[N]) {
    distances_of(metric, [&](auto take) { for_each_pair(x, c, d, take); }, s);
}

template <class T>
__device__ double distance(int metric, const T* x, const T* c, int64_t d) {
    const T* const one[] = {c};
    double s[1];
    distances(metric, x, one, d, s);
    return s[0];
}

/// The largest of non-negative doubles, whose bits are ordered as they are.
__device__ __forceinline__ void atomic_max(double* at, double v) {
    atomicMax(reinterpret_cast<unsigned long long*>(at), __double_as_longlong(v));
}

// ---- Sums that do not depend on their order (src/fixed.rs): 128-bit integers of units of 2^-scale.

/// The scale for sums of at most `n` terms, none above `max_abs` in magnitude.
__device__ __forceinline__ int fixed_scale(double max_abs, int64_t n) {
    const uint64_t bits = __double_as_longlong(max_abs);
    const int biased = int(bits >> 52) & 0x7ff;
    const int exponent = biased ? biased - 1022 : bits ? 64 - __clzll(bits) - 1074 : 0;
    return 126 - exponent - (64 - __clzll(n));
}

/// Sets `q` to `v * 2^scale`, if that is a whole number (0 for a NaN or an infinity): whether it is.
__device__ __forceinline__ bool fixed_quantise(double v, int scale, __int128& q) {
    const uint64_t bits = __double_as_longlong(v), fraction = bits & ((1ull << 52) - 1);
    const int biased = int(bits >> 52) & 0x7ff;
    const uint64_t mantissa = biased == 0x7ff ? 0 : biased ? fraction | 1ull << 52 : fraction;
    const int shift = (biased ? biased - 1075 : -1074) + scale;
    __int128 magnitude = 0;
    bool whole = mantissa == 0;
    if (shift >= 0 && shift <= 126) magnitude = __int128(mantissa) << shift, whole = true;
    if (shift < 0 && shift >= -63) magnitude = mantissa >> -shift, whole = (mantissa >> -shift) << -shift == mantissa;
    q = bits >> 63 ? -magnitude : magnitude;
    return whole;
}

/// `2^e` for `-1022 <= e <= 1023`.
__device__ __forceinline__ double power_of_two(int e) { return __longlong_as_double(int64_t(e + 1023) << 52); }

/// `q * 2^-scale` in f64, rounded once to nearest even.
__device__ __forceinline__ double fixed_value(__int128 q, int scale) {
    const unsigned __int128 m = q < 0 ? -(unsigned __int128)q : q;
    // The highest 64 bits, the last one set if anything below them is.
    const int above = m >> 64 ? __clzll(uint64_t(m >> 64)) : 64;
    const unsigned __int128 high = m << above;
    double r = __ull2double_rn(uint64_t(high >> 64) | (uint64_t(high) != 0));
    r = __dmul_rn(r, power_of_two(64 - above));
    const int half = -scale / 2;
    r = __dmul_rn(__dmul_rn(r, power_of_two(half)), power_of_two(-scale - half));
    return q < 0 ? -r : r;
}

/// Adds to a sum kept as (low word, high word). The low word wraps once for every carry that is passed on, whatever the
/// order of the adds, so the pair is right modulo 2^128 when all are done.
__device__ __forceinline__ void atomic_add(unsigned long long* sum, __int128 v) {
    const unsigned long long low = uint64_t(v), high = uint64_t(v >> 64);
    const unsigned long long carry = low && atomicAdd(sum, low) > ~low;
    if (high + carry) atomicAdd(sum + 1, high + carry);
}

// ---- Random numbers that belong to a row (src/rng.rs).

__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

/// `-ln(u)` for a normal `u`: `ln(m) = 2 atanh((m - 1) / (m + 1))` by its series.
__device__ inline double negative_ln(double u) {
    const uint64_t bits = __double_as_longlong(u);
    int64_t e = int64_t(bits >> 52) - 1023;
    double m = __longlong_as_double((bits & ((1ull << 52) - 1)) | 1023ull << 52);
    if (m > 1.41421356237309504880) m = __dmul_rn(m, 0.5), ++e;
    const double s = __ddiv_rn(__dsub_rn(m, 1.0), __dadd_rn(m, 1.0)), z = __dmul_rn(s, s);
    double series = __ddiv_rn(1.0, 23.0);
    for (int i = 10; i >= 0; --i) series = __dadd_rn(__dmul_rn(series, z), __ddiv_rn(1.0, 2 * i + 1));
    return -__dadd_rn(__dmul_rn(e, 0.693147180559945309417), __dmul_rn(__dmul_rn(2.0, s), series));
}

/// A uniform variate in (0, 1).
__device__ inline double uniform(uint64_t seed, uint64_t round, uint64_t batch, uint64_t row) {
    const uint64_t h = mix(mix(mix(mix(seed) ^ round) ^ batch) ^ row);
    return __dmul_rn(__dadd_rn(__ull2double_rn(h >> 12), 0.5), 0x1p-52);
}

/// A standard exponential variate.
__device__ inline double exponential(uint64_t seed, uint64_t round, uint64_t batch, uint64_t row) {
    return negative_ln(uniform(seed, round, batch, row));
}

/// The round of number `i`, from 1 on, of what is drawn beside the keys of a round.
__device__ __forceinline__ uint64_t beside(uint64_t round, uint64_t i) { return round + (i << 32); }

/// The largest key of a row that may be drawn.
constexpr double RACED = 1e300;

/// The key of a row in an exponential race: see src/rng.rs.
__device__ inline double race_key(uint64_t seed, uint64_t round, uint64_t batch, uint64_t row, double nearest,
                                  double weight) {
    const double p = __dmul_rn(nearest, weight);
    if (nearest < 0) return __longlong_as_double(0x7ff0000000000000);
    if (p > 0) return fmin(__ddiv_rn(exponential(seed, round, batch, row), p), RACED);
    return weight > 0 ? 2e300 : weight < 0 ? 4e300 : 3e300;
}
