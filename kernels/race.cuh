// The race of k-means++: the rows that arrive next, in their order. A key is when a row arrives.
//
// Traffic: a distance and an arrival a row, and of each part as many keys as rows are drawn.
#pragma once
#include "exact/spread.cuh"

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

/// True if `b` comes after `a` in a race.
__device__ __forceinline__ bool after(Lowest a, Lowest b) { return a.key < b.key || (a.key == b.key && a.row < b.row); }

/// The lowest keys that the threads of a block have shown so far, in their order.
struct LowestFew {
    Lowest kept[CANDIDATES], next[CANDIDATES], shown[THREADS];
    int count;

    /// By the whole block, before anything is shown.
    __device__ __forceinline__ void clear() {
        if (threadIdx.x < CANDIDATES) kept[threadIdx.x] = {UINT64_MAX, UINT32_MAX};
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
    }

    /// Each thread shows one key; of these and the kept ones the `most` lowest are kept. A key's place is the number of
    /// keys that are before it. True to all threads if one that has been shown is kept.
    __device__ bool keep(int most, Lowest own) {
        const bool stays = after(own, kept[most - 1]);
        if (!__syncthreads_or(stays)) return false;
        if (stays) shown[atomicAdd(&count, 1)] = own;
        if (threadIdx.x < CANDIDATES) next[threadIdx.x] = {UINT64_MAX, UINT32_MAX};
        __syncthreads();
        const auto place = [&](Lowest one) {
            int before = 0;
#pragma unroll 4
            for (int i = 0; i < count; ++i) before += after(shown[i], one);
#pragma unroll 4
            for (int i = 0; i < most; ++i) before += after(kept[i], one);
            if (before < most) next[before] = one;
        };
        if (threadIdx.x < count) place(shown[threadIdx.x]);
        if (threadIdx.x < most) place(kept[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x < most) kept[threadIdx.x] = next[threadIdx.x];
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        return true;
    }
};

/// A key as an integer of the same order.
__device__ __forceinline__ uint64_t ordered_key(double key) { return ordered<uint64_t>(__double_as_longlong(key)); }

__device__ __forceinline__ double key_of(uint64_t ordered) {
    return __longlong_as_double(unordered<uint64_t>(ordered));
}

/// The largest key but of a seed.
constexpr double LARGEST_KEY = 1.7976931348623157e308;

/// Rows of a race that a thread has.
constexpr int RACED_EACH = RACE_ROWS / THREADS;

/// A race of k-means++ by `state`, `(b, 2, n)`, of which the first are distances to the nearest seed and the second
/// arrivals: the `count` rows of each problem that arrive next, in their order, to `drawn` and the times to `times`
/// `(b, count)`: those that are drawn by what they weigh or, where there is none, any but seeds; UINT32_MAX for the
/// others, and for those behind as many as `trials` for each of the `rounds` of a problem, where there are rounds.
/// `most` is the largest that a row is drawn by. A block takes `RACE_ROWS` rows; the last block of a problem merges
/// what each has found. `arrived` is zeros and left so. Problems that have `wanted` seeds `taken` are over.
__device__ void race_rows(const double* state, const double* weights, int64_t b_all, int64_t n, int64_t count,
                          const uint32_t* rounds, int64_t trials, uint64_t* part_keys, uint32_t* part_rows,
                          double* part_most, uint32_t* arrived, uint32_t* drawn, double* times, double* most,
                          const uint32_t* taken, int64_t wanted) {
    __shared__ bool last;
    __shared__ double largest;
    __shared__ LowestFew few;
    const int64_t parts = (n + RACE_ROWS - 1) / RACE_ROWS;
    const Lowest none = {UINT64_MAX, UINT32_MAX};
    for (int64_t tile = blockIdx.x; tile < b_all * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * RACE_ROWS;
        if (taken[b] >= wanted) continue;
        const int most_rows = int(rounds ? min(trials * rounds[b], count) : count);
        const double *const nearest = state + 2 * b * n, *const arrivals = nearest + n;
        double own_most = 0;
        uint64_t keys[RACED_EACH];
#pragma unroll
        for (int i = 0; i < RACED_EACH; ++i) {
            const int64_t row = begin + i * THREADS + threadIdx.x;
            keys[i] = UINT64_MAX;
            if (row < n) {
                const double near = nearest[row], weight = weights ? weights[b * n + row] : 1.0;
                keys[i] = ordered_key(arrival_of(near, weight, arrivals[row]));
                const double p = __dmul_rn(near, weight);
                if (near > 0 && p > own_most) own_most = p;
            }
        }
        if (threadIdx.x == 0) largest = 0;
        few.clear();
        // Each thread shows the lowest that it has left, until none of these stays.
        for (bool any = true; any;) {
            Lowest own = none;
#pragma unroll
            for (int i = 0; i < RACED_EACH; ++i) {
                if (keys[i] < own.key) own = {keys[i], uint32_t(begin + i * THREADS + threadIdx.x)};
            }
#pragma unroll
            for (int i = 0; i < RACED_EACH; ++i) {
                if (begin + i * THREADS + threadIdx.x == own.row) keys[i] = UINT64_MAX;
            }
            any = few.keep(most_rows, own);
        }
        own_most = warp_max(own_most);
        if (threadIdx.x % WARP == 0) atomic_max(&largest, own_most);
        if (threadIdx.x < count) {
            const Lowest own = few.kept[threadIdx.x];
            part_keys[tile * count + threadIdx.x] = own.key, part_rows[tile * count + threadIdx.x] = own.row;
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            part_most[tile] = largest;
            __threadfence();
            last = atomicAdd(&arrived[b], 1) + 1 == parts;
        }
        __syncthreads();
        if (last) {
            __threadfence();
            few.clear();
            // A part's lowest are in their order: where of no part one more stays, none behind it does. Of few parts
            // several are shown at once.
            const int64_t at_once = max(int64_t(1), min(int64_t(most_rows), THREADS / parts));
            bool any = true;
            for (int64_t t = 0; any && t < most_rows; t += at_once) {
                any = false;
                for (int64_t first = 0; first < parts * at_once; first += blockDim.x) {
                    const int64_t i = first + threadIdx.x, part = i / at_once, own = t + i % at_once;
                    const int64_t at = (b * parts + part) * count + own;
                    const bool is = part < parts && own < most_rows;
                    any |= few.keep(most_rows, is ? Lowest{__ldcg(&part_keys[at]), __ldcg(&part_rows[at])} : none);
                }
            }
            if (threadIdx.x < count) {
                const uint64_t most_key = ordered_key(few.kept[0].key <= ordered_key(RACED) ? RACED : LARGEST_KEY);
                const Lowest own = few.kept[threadIdx.x];
                drawn[b * count + threadIdx.x] = own.key <= most_key ? own.row : UINT32_MAX;
                times[b * count + threadIdx.x] = key_of(own.key);
            }
            double all = 0;
            for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
                all = fmax(all, __ldcg(&part_most[b * parts + part]));
            }
            all = warp_max(all);
            if (threadIdx.x % WARP == 0) atomic_max(&largest, all);
            __syncthreads();
            if (threadIdx.x == 0) most[b] = largest, arrived[b] = 0;
        }
        __syncthreads();
    }
}
