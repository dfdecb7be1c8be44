// The one definition of "better", and the proof that lets fast arithmetic decide most rows.
//
// A label is the lexicographic minimum of (distance, index), a NaN distance counting as +inf. The assign kernels do not
// compute distances but scores: up to a constant and a positive factor of the row, score[j] is half the squared
// distance, the cosine distance or the negated dot product, or it is the Manhattan distance, in the type of the filter
// (f32, or f64 for f64 rows). A row whose second-best score is above `threshold` of its best has its label proven. Any
// other row is rechecked: every centroid whose score, computed once more, does not exceed `threshold` is compared by
// the definition.
//
// Why the bound holds. Let u be the unit roundoff of the filter and g = (D + 4) u / (1 - (D + 4) u). Rows and centroids
// are first moved by a common mu (squared Euclidean; else mu = 0): x^ = fl(x - mu), c^ = fl(c - mu), each off by u of
// itself. A sum of D products in any order is off by D u / (1 - D u) of |x^||c^| (Cauchy-Schwarz), the two moves by 2
// u, the last subtraction by u, and the bias |c^|^2 / 2 by 4 u of itself (Higham, Accuracy and Stability, ch. 3):
// together at most g (|x^||c^| + |c^|^2 / 2). Products that underflow add less than D times the smallest subnormal. The
// definition, itself rounded, is within (2 D + 8) 2^-53 of the true value relative to |x^|^2 + |c^|^2, |x||c|/|c|, or
// |x||c|. Twice the sum of these separates scores from labels. For f64 rows the definition's error and that of a norm
// are of the filter's own size: `slack` doubles g. Manhattan terms are positive, so its scores are within g relatively,
// and so is the definition. `score_error` is +inf when the bound does not apply (an overflow is possible, or D u is not
// small): all centroids then count as candidates.
#pragma once
#include "common.cuh"

struct Best {
    double distance;
    uint32_t index;
};

__device__ __forceinline__ Best nothing() { return {__longlong_as_double(0x7ff0000000000000), UINT32_MAX}; }

__device__ __forceinline__ Best candidate(double distance, uint32_t index) {
    return {distance != distance ? nothing().distance : distance, index};
}

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.distance < a.distance || (b.distance == a.distance && b.index < a.index) ? b : a;
}

__device__ __forceinline__ Best warp_best(Best a) {
    for (int lane = 16; lane; lane /= 2) {
        a = better(a, {__shfl_xor_sync(~0u, a.distance, lane), __shfl_xor_sync(~0u, a.index, lane)});
    }
    return a;
}

/// The best score, its index, and the second-best score. A NaN is never either.
template <class F>
struct TopTwo {
    F best = INFINITY, second = INFINITY;
    uint32_t index = 0;

    __device__ __forceinline__ void add(F score, uint32_t i) {
        if (score < best) {
            second = best, best = score, index = i;
        } else if (score < second) {
            second = score;
        }
    }

    /// Adds what the lane `offset` away has seen.
    __device__ __forceinline__ void join(int offset) {
        const F other = __shfl_xor_sync(~0u, best, offset), other_second = __shfl_xor_sync(~0u, second, offset);
        const uint32_t i = __shfl_xor_sync(~0u, index, offset);
        add(other, i);
        if (other_second < second) second = other_second;
    }
};

template <class F>
struct Arithmetic;
template <>
struct Arithmetic<float> {
    static constexpr double u = 0x1p-24, smallest = 0x1p-149, slack = 1, limit = 1e38;
    __device__ static bool fits(double x, double c) { return (x + c) * c < limit; }
};
template <>
struct Arithmetic<double> {
    static constexpr double u = 0x1p-53, smallest = 0x1p-1074, slack = 2, limit = 1e300;
    __device__ static bool fits(double x, double c) {
        return (x + c) * (x + c) < limit;
    }  // the definition must fit too
};

/// An upper bound of a Euclidean norm from the f64 sum of squares, added up in any order.
__device__ __forceinline__ double norm_above(double squares, int64_t d) {
    return sqrt(squares + d * 0x1p-1074) * (1 + (d + 16) * 0x1p-52);
}

/// How far any score of a row of norm `x`, and its definition, may be off; `c` is the largest norm of a centroid.
template <class F>
__device__ double score_error(int metric, int64_t d, double x, double c) {
    using A = Arithmetic<F>;
    const double inf = nothing().distance, v = (d + 4) * A::u;
    // Squares of a cosine must neither overflow nor vanish; the norm of a centroid is checked where it is taken.
    const bool in_range = metric != COSINE || (x >= 1e-140 && x <= 1e140);
    if (!(v < 0.5 && in_range && A::fits(x, c))) return inf;
    const double g = A::slack * v / (1 - v), half = metric == SQUARED_EUCLIDEAN ? c * c / 2 : 0;
    const double scale = metric == SQUARED_EUCLIDEAN ? x * x + c * c : metric == COSINE ? x * (1 + c) : x * c;
    return (g * (x * c + half) + (d + 16) * 0x1p-51 * scale + 4 * d * A::smallest) * (1 + 1e-9);
}

/// No centroid with a score above this can be the label, given the `score` of any one of them. +inf: all may be.
template <class F>
__device__ double threshold(int metric, int64_t d, double score, double x, double c) {
    using A = Arithmetic<F>;
    const double inf = nothing().distance;
    if (metric == MANHATTAN) {
        const double v = (d + 4) * A::u, g = 4 * A::slack * v / (1 - v), t = score * (1 + g) * (1 + 1e-9);
        return v < 0.05 && t < A::limit ? t : inf;
    }
    const double t = score + 2 * score_error<F>(metric, d, x, c);
    return t < A::limit ? t : inf;
}
