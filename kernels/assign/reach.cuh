// The reach tells centroids that an ordinary row can be nearest to from outliers, which would spoil the error bound of
// all rows (tensor.cuh says why labels stay exact).
#pragma once
#include "exact/common.cuh"

/// Rows and centroids of a problem that are looked at.
constexpr int REACH_SAMPLES = 64;

/// The norm that seven in eight of those above zero do not exceed, to all threads of the block, of which there are at
/// least as many as norms; +inf if there are none.
__device__ __forceinline__ float most_norms(const float (&norms)[REACH_SAMPLES]) {
    __shared__ float found;
    if (threadIdx.x == 0) found = INFINITY;
    __syncthreads();
    if (threadIdx.x < REACH_SAMPLES) {
        const auto counts = [](float v) { return v > 0 && v < INFINITY; };
        const int at = threadIdx.x;
        const float norm = norms[at];
        int rank = 0, all = 0;
        for (int i = 0; i < REACH_SAMPLES; ++i) {
            const float other = norms[i];
            all += counts(other);
            rank += counts(other) && (other < norm || (other == norm && i < at));
        }
        if (counts(norm) && rank == (all - 1) * 7 / 8) found = norm;
    }
    __syncthreads();
    return found;
}

/// The reach of a problem, by the whole block: `row_norm(i)` is that of the sampled row i, and `centroid_norm(i)` at
/// least that of a centroid, each by a warp, all of whose lanes have it. `largest` becomes the largest finite norm of a
/// sampled centroid.
template <class RowNorm, class CentroidNorm>
__device__ Reach reach_of(RowNorm row_norm, CentroidNorm centroid_norm, float& largest) {
    __shared__ float rows[REACH_SAMPLES], centroids[REACH_SAMPLES];
    const int warps = blockDim.x / WARP;
    for (int i = threadIdx.x / WARP; i < REACH_SAMPLES; i += warps) {
        const float of_row = row_norm(i), of_centroid = centroid_norm(i);
        if (threadIdx.x % WARP == 0) rows[i] = of_row, centroids[i] = of_centroid;
    }
    __syncthreads();
    const double most = 4.0 * most_norms(rows);
    float least = INFINITY;
    largest = 0;
    for (int i = 0; i < REACH_SAMPLES; ++i) {
        least = fminf(least, centroids[i]);
        if (centroids[i] < INFINITY) largest = fmaxf(largest, centroids[i]);
    }
    __syncthreads();
    const double furthest = 1.02 * (2 * most + least);
    return furthest < 1e38 ? Reach{float(most), float(furthest)} : Reach{};
}

/// Place `i` of REACH_SAMPLES among `count`.
__device__ __forceinline__ int64_t sample_of(int i, int64_t count) { return i * count / REACH_SAMPLES; }
