// Exclusive scans, what is sorted by them, and reductions over a block.
#pragma once
#include "exact/common.cuh"

__device__ __forceinline__ uint32_t warp_scan(uint32_t v) {
    const int lane = threadIdx.x % WARP;
    for (int step = 1; step < WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, v, step);
        if (lane >= step) v += before;
    }
    return v;
}

/// The exclusive scan of `value(i)` for `n` places, by one block: `take(i, sum)`, by the thread that has read the
/// value. Returns the sum of all.
template <class Value, class Take>
__device__ uint32_t block_scan(int64_t n, Value value, Take take) {
    __shared__ uint32_t of_warps[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t each = (n + blockDim.x - 1) / blockDim.x;
    const int64_t begin = min(threadIdx.x * each, n), end = min(begin + each, n);
    uint32_t own = 0;
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) own += value(i);
    const uint32_t within = warp_scan(own);
    if (warp == 0) of_warps[lane] = 0;
    __syncthreads();
    if (lane == WARP - 1) of_warps[warp] = within;
    __syncthreads();
    if (warp == 0) of_warps[lane] = warp_scan(of_warps[lane]);
    __syncthreads();
    uint32_t sum = (warp ? of_warps[warp - 1] : 0) + within - own;
    for (int64_t i = begin; i < end; ++i) {
        const uint32_t here = value(i);
        take(i, sum);
        sum += here;
    }
    const uint32_t all = of_warps[WARP - 1];
    __syncthreads();
    return all;
}

/// Counting sort by one block of `threads`: `order` becomes those numbers below `n` that `counts`, by label, in no
/// particular order where labels are equal. `begins` (k + 1) becomes where labels begin; `next` (k) is used up.
template <class Index, class Counts, class Short>
__device__ __forceinline__ void block_counting_sort(Index n, Index k, Index threads, const Short* labels, Counts counts,
                                                    uint32_t* begins, uint32_t* next, Short* order) {
    for (Index j = threadIdx.x; j <= k; j += threads) begins[j] = 0;
    __syncthreads();
    for (Index i = threadIdx.x; i < n; i += threads) {
        if (counts(i)) atomicAdd(&begins[labels[i]], 1);
    }
    __syncthreads();
    block_scan(
        k + 1, [&](int64_t j) { return begins[j]; },
        [&](int64_t j, uint32_t before) {
            begins[j] = before;
            if (j < k) next[j] = before;
        });
    __syncthreads();
    for (Index i = threadIdx.x; i < n; i += threads) {
        if (counts(i)) order[atomicAdd(&next[labels[i]], 1)] = i;
    }
    __syncthreads();
}

/// The result over all threads of the block.
template <class Join>
__device__ float over_block(float v, float none, Join join) {
    __shared__ float of_warps[WARP];
    for (int lanes = WARP / 2; lanes; lanes /= 2) v = join(v, __shfl_xor_sync(~0u, v, lanes));
    __syncthreads();
    const int lane = threadIdx.x % WARP;
    if (lane == 0) of_warps[threadIdx.x / WARP] = v;
    __syncthreads();
    v = lane < int(blockDim.x) / WARP ? of_warps[lane] : none;
    for (int lanes = WARP / 2; lanes; lanes /= 2) v = join(v, __shfl_xor_sync(~0u, v, lanes));
    return v;
}
struct Larger {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct Plus {
    __device__ float operator()(float a, float b) const { return a + b; }
};
