// The one definition of "better", and the proof that lets fast arithmetic decide most rows.
//
// A label is the lexicographic minimum of (distance, index), a NaN distance counting as +inf. The assign kernels do not
// compute distances but scores: up to a constant and a positive factor of the row, score[j] is half the squared
// distance, the cosine distance or the negated dot product, or it is the Manhattan distance, in the type of the filter
// (f32, or f64 for f64 rows). A row whose second-best score is above `score_cutoff` of its best has its label proven.
// Any other row is rechecked: every centroid whose score, computed once more, does not exceed `score_cutoff` is
// compared by the definition.
//
// Why the bound holds. Let u be the unit roundoff of the filter and g = (D + 4) u / (1 - (D + 4) u). Rows and centroids
// are first moved by a common mu (squared Euclidean; else mu = 0): x^ = fl(x - mu), c^ = fl(c - mu), each off by u of
// itself. A sum of D products in any order is off by D u / (1 - D u) of |x^||c^| (Cauchy-Schwarz), the two moves by 2
// u, the last subtraction by u, and the bias |c^|^2 / 2 by 4 u of itself (Higham, Accuracy and Stability, ch. 3):
// together at most g (|x^||c^| + |c^|^2 / 2). Products that underflow add less than D times the smallest subnormal. The
// definition, itself rounded, is within (2 D + 8) 2^-53 of the true value relative to |x^|^2 + |c^|^2, |x^||c^|/|c^|,
// or |x^||c^|. For f64 rows the definition's error and that of a norm are of the filter's own size: `safety` doubles g.
// Manhattan terms are positive, so its scores are within g relatively, and so is the definition.
//
// Squared Euclidean: as 2 |x^||c^| <= |x^|^2 + |c^|^2, a score is off by a share of the row, at most (g / 2 + e) |x^|^2
// with e = (2 D + 32) 2^-53, and one of the centroid, a = (g + e) |c^|^2, so that no centroid widens the bound of
// another. `Scored` takes a from the bias: a score is too low by at most 2 a, and too high by nothing but the row's
// share. A label is proven if the second score is above the best, more 2 a of its centroid, more twice the row's share.
// Centroids beyond `FAR` and those with a NaN are not scored (their bias is +inf). The nearest of a row within `NEAR`
// whose best score is below `LARGEST` is none of them: that score's centroid lies nearer than half of FAR.
//
// Cosine and dot product: twice the error with the largest |c^|. Where a bound does not apply (an overflow is possible,
// or D u is not small) it is +inf: all centroids then count as candidates.
#pragma once
#include "exact/common.cuh"

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
    static constexpr double u = 0x1p-24, smallest = 0x1p-149, safety = 1, LARGEST = 1e37, NEAR = 1e17, FAR = 1e19;
    __device__ static bool fits(double x, double c) { return (x + c) * c < LARGEST; }
};
template <>
struct Arithmetic<double> {
    static constexpr double u = 0x1p-53, smallest = 0x1p-1074, safety = 2, LARGEST = 1e299, NEAR = 1e148, FAR = 1e150;
    __device__ static bool fits(double x, double c) {
        return (x + c) * (x + c) < LARGEST;
    }  // the definition must fit too
};

/// The error g of a score, relative to |x^||c^| + |c^|^2 / 2.
template <class F>
__device__ __forceinline__ double rounding(int64_t d) {
    const double v = (d + 4) * Arithmetic<F>::u;
    return Arithmetic<F>::safety * v / (1 - v);
}

/// Squared Euclidean: the centroid's share of the error of a score, by |c^|^2.
template <class F>
__device__ __forceinline__ double centroid_share(int64_t d) {
    return (rounding<F>(d) + (d + 16) * 0x1p-52) * (1 + 1e-9);
}

/// A bound applies to rows of `d` columns if their rounding errors stay small beside their scores.
template <class F>
__device__ __forceinline__ bool bounded(int metric, int64_t d) {
    return (d + 4) * Arithmetic<F>::u < (metric == SQUARED_EUCLIDEAN || metric == MANHATTAN ? 0.05 : 0.5);
}

/// An upper bound of a Euclidean norm from the f64 sum of squares, added up in any order.
__device__ __forceinline__ double norm_above(double squares, int64_t d) {
    return sqrt(squares + d * 0x1p-1074) * (1 + (d + 16) * 0x1p-52);
}

/// The bias of a centroid's scores, and the norm by which the error bound has to allow for it.
template <class F>
struct Scored {
    F bias = 0;
    double norm = 0;       // dot product and cosine: at least that of c^; +inf where nothing can be proven
    bool dropped = false;  // it is not scored: c^ has to be zeros then

    /// `squares` is |c^|^2; by cosine, `original` is |c|.
    __device__ __forceinline__ Scored(int metric, int64_t d, double squares, double original) {
        const double above = norm_above(squares, d);
        if (metric == MANHATTAN) return;
        if (metric == SQUARED_EUCLIDEAN) {
            dropped = !(above < Arithmetic<F>::FAR);
            if (bounded<F>(metric, d)) bias = F(squares / 2 - centroid_share<F>(d) * above * above);
        } else {
            // No norm of f16, bf16 or f32 is out of this range, but for that of a row with an infinity.
            const bool in_range = original == 0 || (original >= 1e-140 && original <= 1e140);
            dropped = squares != squares || original != original || (metric == COSINE && sizeof(F) == 4 && !in_range);
            norm = dropped ? 0 : in_range ? above : nothing().distance;
        }
        if (dropped) bias = INFINITY;
    }
};

/// Dot product and cosine: how far any score of a row of norm `x`, and its definition, may be off; `c` is the largest
/// norm of a centroid.
template <class F>
__device__ double score_error(int metric, int64_t d, double x, double c) {
    using A = Arithmetic<F>;
    const double inf = nothing().distance;
    // Squares of a cosine must neither overflow nor vanish; the norm of a centroid is checked where it is taken.
    const bool in_range = metric != COSINE || (x >= 1e-140 && x <= 1e140);
    if (!(bounded<F>(metric, d) && in_range && A::fits(x, c))) return inf;
    const double scale = metric == COSINE ? x * (1 + c) : x * c;
    return (rounding<F>(d) * x * c + (d + 16) * 0x1p-51 * scale + 4 * d * A::smallest) * (1 + 1e-9);
}

/// Squared Euclidean: twice the shares of a score's error, of the centroid by its bias and of the row by the square of
/// its norm; +inf where no bound applies.
struct ErrorShares {
    float of_centroid, of_row;
};
template <class F>
__device__ ErrorShares error_shares(int64_t d) {
    if (!bounded<F>(SQUARED_EUCLIDEAN, d)) return {INFINITY, INFINITY};
    const double share = centroid_share<F>(d);
    return {__double2float_ru(2 * share / (0.5 - share) * (1 + 1e-6)),
            __double2float_ru((rounding<F>(d) + (d + 16) * 0x1p-51) * (1 + 1e-9))};
}

/// No centroid with a score above this can be the label of a row of norm `x`, given the `score` of any one of them,
/// which has this `bias`; `c` is the largest norm of a centroid. +inf: all may be.
template <class F>
__device__ double score_cutoff(int metric, int64_t d, double score, double x, double c, double bias,
                               const ErrorShares& twice) {
    using A = Arithmetic<F>;
    const double inf = nothing().distance;
    double t = score;
    if (metric == SQUARED_EUCLIDEAN) {
        if (!(x < A::NEAR)) return inf;
        t += twice.of_centroid * (bias + 4 * A::smallest) + twice.of_row * (x * x) + 9 * d * A::smallest;
    } else if (metric == MANHATTAN) {
        t = bounded<F>(metric, d) ? t * ((1 + 4 * rounding<F>(d)) * (1 + 1e-9)) : inf;
    } else {
        t += 2 * score_error<F>(metric, d, x, c);
    }
    return t < A::LARGEST ? t : inf;
}

/// A row with a NaN has a NaN as its sum of squares: all its distances are +inf, and its label is 0.
__device__ __forceinline__ bool nowhere(double squares) { return squares != squares; }

/// A zero row has no direction: it is at the same cosine distance from all centroids. (Squares of f64 may vanish, so
/// that theirs say nothing.)
template <class F>
__device__ __forceinline__ bool without_direction(int metric, double squares) {
    return metric == COSINE && sizeof(F) == 4 && squares == 0;
}
