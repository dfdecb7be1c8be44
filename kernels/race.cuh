// The race of k-means++: the rows with the lowest keys, in their order.
//
// Memory traffic: a distance and a key a row, read once and as often as rows are drawn; the latter from L2.
#pragma once
#include "exact/common.cuh"

struct Lowest {
    uint64_t key;
    uint32_t row;
};

__device__ __forceinline__ Lowest lower(Lowest a, Lowest b) {
    return b.key < a.key || (b.key == a.key && b.row < a.row) ? b : a;
}

/// The lowest row at the smallest key that any lane of the warp has.
__device__ __forceinline__ Lowest warp_lowest(Lowest v) {
    for (int lane = WARP / 2; lane; lane /= 2) {
        v = lower(v, {__shfl_xor_sync(~0u, v.key, lane), __shfl_xor_sync(~0u, v.row, lane)});
    }
    return v;
}

/// The lowest row at the smallest key that any thread of the block has, to the first warp.
__device__ Lowest block_lowest(Lowest low) {
    __shared__ Lowest of_warps[WARP];
    low = warp_lowest(low);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = low;
    __syncthreads();
    if (threadIdx.x < WARP) {
        low = warp_lowest(threadIdx.x < blockDim.x / WARP ? of_warps[threadIdx.x] : Lowest{UINT64_MAX, UINT32_MAX});
    }
    __syncthreads();
    return low;
}

/// True if `b` comes after `a` in a race.
__device__ __forceinline__ bool after(Lowest a, Lowest b) { return a.key < b.key || (a.key == b.key && a.row < b.row); }

/// The same lowest row to all threads.
__device__ Lowest block_winner(Lowest low) {
    __shared__ Lowest winner;
    low = block_lowest(low);
    if (threadIdx.x == 0) winner = low;
    __syncthreads();
    low = winner;
    __syncthreads();
    return low;
}

/// A key as an integer of the same order.
__device__ __forceinline__ uint64_t ordered_key(double key) { return ordered<uint64_t>(__double_as_longlong(key)); }

/// The largest key but of a seed.
constexpr double LARGEST_KEY = 1.7976931348623157e308;

/// A race of k-means++ by the distances to the nearest seed, which are in column `slot[b]` (0 without) of `nearest`,
/// `(b, n, width)`, and 1 at the start: the `count` rows of each problem with the lowest keys, in their order, to
/// `drawn` `(b, count)`: those that were drawn by what they weigh or, where none was, any but seeds; UINT32_MAX for the
/// others. `most` is the largest that a row is drawn by. A block takes `rows` rows; the last block of a problem merges
/// what each has found. `arrived` is zeros and left so. Problems that have `wanted` seeds `taken` are over.
__device__ void race_rows(const double* nearest, int64_t width, const uint32_t* slot, const double* weights,
                          int64_t b_all, int64_t n, int start, int64_t count, uint64_t seed, uint64_t round,
                          int64_t first_problem, int64_t rows, uint64_t* keys, uint64_t* part_keys, uint32_t* part_rows,
                          double* part_most, uint32_t* arrived, uint32_t* drawn, double* most, const uint32_t* taken,
                          int64_t wanted) {
    __shared__ bool last;
    __shared__ double largest;
    const int64_t parts = (n + rows - 1) / rows;
    const Lowest none = {UINT64_MAX, UINT32_MAX};
    for (int64_t tile = blockIdx.x; tile < b_all * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, n);
        if (taken && taken[b] >= wanted) continue;
        double own_most = 0;
        if (threadIdx.x == 0) largest = 0;
        __syncthreads();
        for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
            const int64_t at = b * n + row;
            const double near = start ? 1 : nearest[at * width + (slot ? slot[b] : 0)];
            const double weight = weights ? weights[at] : 1.0;
            keys[at] = ordered_key(race_key(seed, round, first_problem + b, row, near, weight));
            const double p = __dmul_rn(near, weight);
            if (near > 0 && p > own_most) own_most = p;
        }
        own_most = warp_max(own_most);
        if (threadIdx.x % WARP == 0) atomic_max(&largest, own_most);
        Lowest before = {0, 0};
        for (int64_t t = 0; t < count; ++t) {
            Lowest low = none;
            for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
                const Lowest own = {keys[b * n + row], uint32_t(row)};
                if (t == 0 || after(before, own)) low = lower(low, own);
            }
            before = block_winner(low);
            if (threadIdx.x == 0) part_keys[tile * count + t] = before.key, part_rows[tile * count + t] = before.row;
        }
        if (threadIdx.x == 0) {
            part_most[tile] = largest;
            __threadfence();
            last = atomicAdd(&arrived[b], 1) + 1 == parts;
        }
        __syncthreads();
        if (last) {
            __threadfence();
            uint64_t most_key = 0;
            for (int64_t t = 0; t < count; ++t) {
                Lowest low = none;
                for (int64_t e = threadIdx.x; e < parts * count; e += blockDim.x) {
                    const int64_t at = b * parts * count + e;
                    const Lowest own = {__ldcg(&part_keys[at]), __ldcg(&part_rows[at])};
                    if (t == 0 || after(before, own)) low = lower(low, own);
                }
                before = block_winner(low);
                if (t == 0) most_key = ordered_key(before.key <= ordered_key(RACED) ? RACED : LARGEST_KEY);
                if (threadIdx.x == 0) drawn[b * count + t] = before.key <= most_key ? before.row : UINT32_MAX;
            }
            if (threadIdx.x == 0) {
                double all = 0;
                for (int64_t part = 0; part < parts; ++part) all = fmax(all, __ldcg(&part_most[b * parts + part]));
                most[b] = all, arrived[b] = 0;
            }
        }
        __syncthreads();
    }
}
