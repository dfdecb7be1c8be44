// A centroid as tensor cores score it (tensor.cuh): what is added up on the way, and what its proof needs.
#pragma once
#include "assign/reach.cuh"
#include "assign/tensor.cuh"

constexpr int BOUNDS = sizeof(Bounds) / sizeof(float);

/// Keeps a centroid of norm `norm` from spoiling the bounds for rows within reach. `bounds` becomes what the
/// bounds of the problem take from it, `start` what its scores start from, and `own` what widens an error bound where
/// it wins.
__device__ __forceinline__ void confine_to_reach(Bounds& bounds, const Reach& reach, int metric, float norm,
                                                 float& start, float& own) {
    if (metric != SQUARED_EUCLIDEAN) return;
    if (norm > reach.centroids) {
        start = NAN, bounds = {0, 0, 0, 0, 0, 1 / reach.rows, 0, 0};
    } else if (bounds.residual > 0x1p-20f * bounds.moved && reach.rows < INFINITY) {
        const float loss = bounds.residual * reach.rows;
        start = __fadd_ru(start, 1.0001f * loss), own = 2.002f * loss;
        bounds.start = fmaxf(bounds.start, fabsf(start)), bounds.rounded = bounds.residual, bounds.residual = 0;
        bounds.inverse = 1 / reach.rows;
    }
}

/// Several lanes add these up over the columns of one centroid.
struct Sums {
    double squares = 0, mu_squares = 0, lost = 0;
    float moved_squares = 0;
    unsigned long long hash = 0;

    /// A column `v`, less `m`: what is left, in the type of the rows.
    template <class T>
    __device__ __forceinline__ T add(float v, float m, bool moves) {
        const float t = v - m;
        const T moved = T(t);
        const float e = filter(moved);
        // The difference itself may have been rounded.
        const float error = fabsf(t - e) + (moves ? 0x1p-24f * fabsf(t) : 0);
        moved_squares = fmaf(e, e, moved_squares);
        // In f32 the square of a loss could vanish, and the loss with it.
        lost = fma(double(error), double(error), lost);
        const double wide_v = v;
        squares = fma(wide_v, wide_v, squares);
        if (moves) mu_squares = fma(double(m), double(m), mu_squares);
        return moved;
    }

    /// Eight columns.
    template <class T>
    __device__ __forceinline__ uint4 add(uint4 v_bits, uint4 m_bits, int64_t piece) {
        const bool moves = (m_bits.x | m_bits.y | m_bits.z | m_bits.w) != 0;
        float v[PIECE], m[PIECE];
        widen<T>(v, v_bits), widen<T>(m, m_bits);
        struct alignas(16) {
            T e[PIECE];
        } out;
#pragma unroll
        for (int q = 0; q < PIECE; ++q) out.e[q] = add<T>(v[q], m[q], moves);
        const uint64_t low = uint64_t(v_bits.y) << 32 | v_bits.x, high = uint64_t(v_bits.w) << 32 | v_bits.z;
        hash += mix(mix(low + piece) ^ high);
        return reinterpret_cast<const uint4&>(out);
    }

    /// Adds what the centroid's other lanes have.
    __device__ __forceinline__ void join(int all) {
        for (int lanes = 1; lanes < all; lanes *= 2) {
            squares += __shfl_xor_sync(~0u, squares, lanes), mu_squares += __shfl_xor_sync(~0u, mu_squares, lanes);
            moved_squares += __shfl_xor_sync(~0u, moved_squares, lanes), lost += __shfl_xor_sync(~0u, lost, lanes);
            hash += __shfl_xor_sync(~0u, hash, lanes);
        }
    }

    /// A centroid with a NaN, or but for dot products with an infinity, is at distance +inf from every row.
    __device__ __forceinline__ bool nowhere(int metric) const {
        return squares != squares || (squares == __longlong_as_double(0x7ff0000000000000) && metric != DOT);
    }
    /// Its norm, at least.
    __device__ __forceinline__ float norm() const { return sqrtf(__double2float_ru(squares)); }

    /// The centroid's scores start from this and are scaled by that.
    __device__ __forceinline__ float start(int metric) const {
        return metric == SQUARED_EUCLIDEAN ? float((mu_squares - squares) / 2) : 0;
    }
    __device__ __forceinline__ float scale(int metric) const {
        return metric != COSINE ? 1 : squares == 0 ? 0 : float(1 / sqrt(squares));
    }

    /// The bounds have to allow this for the centroid: added up in f32, with what that and underflow may take.
    __device__ __forceinline__ Bounds bounds(int metric, int64_t d, float start, float scale) const {
        const float norm = this->norm(), tiny = 1e-37f * d, rounding = 1 + (d + 16) * 0x1p-22f;
        // A product with a row that `error_bound` lets pass must not overflow before it is scaled.
        const float safe = metric == COSINE && norm > 1e18f ? INFINITY : scale;
        return {sqrtf(moved_squares + tiny) * rounding * safe,
                fabsf(start),
                __double2float_ru(sqrt(lost)) * rounding * scale,
                norm * scale * rounding,
                scale,
                0,
                0,
                0};
    }
};
