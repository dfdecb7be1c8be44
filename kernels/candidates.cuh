// The candidates of a block of k-means++, and the rows that are nearer to them than to any seed.
#pragma once
#include "exact/spread.cuh"

/// Most rows that are tried: 2 + ln(2^32).
constexpr int MOST_TRIALS = 32;
/// Most candidates of a block: those of a round that has not ended, and those that are drawn.
constexpr int CANDIDATES = GREEDY_DRAWS + MOST_TRIALS;

/// The candidates of a block: first the rows that were `tried` (UINT32_MAX behind them), then those of the first
/// `wanted` that a race has `drawn` that are not among these.
struct Candidates {
    uint32_t rows[CANDIDATES];
    /// Where the race has them.
    int drawn_at[CANDIDATES];
    bool added[GREEDY_DRAWS];
    int before, count;

    /// By the whole block.
    __device__ void find(const uint32_t* tried, int trials, const uint32_t* drawn, int wanted) {
        const int i = threadIdx.x;
        const uint32_t own_tried = i < trials ? tried[i] : UINT32_MAX, own = i < wanted ? drawn[i] : UINT32_MAX;
        const int valid = __syncthreads_count(own_tried != UINT32_MAX);
        if (i < valid) rows[i] = own_tried;
        __syncthreads();
        bool adds = own != UINT32_MAX;
        for (int j = 0; adds && j < valid; ++j) adds = rows[j] != own;
        if (i < GREEDY_DRAWS) added[i] = adds;
        const int all = valid + __syncthreads_count(adds);
        if (adds) {
            int at = valid;
            for (int j = 0; j < i; ++j) at += added[j];
            rows[at] = own, drawn_at[at] = i;
        }
        if (i == 0) before = valid, count = all;
        __syncthreads();
    }
};

/// The rows of problem `b` that are nearer to a candidate than to any seed, and their distances, of each of `room`
/// candidates.
struct Lists {
    uint32_t *rows, *counts;
    double* distances;
    int64_t n, room;

    __device__ __forceinline__ int64_t at(int64_t b, int64_t candidate) const { return b * room + candidate; }

    __device__ __forceinline__ void add(int64_t b, int64_t candidate, int64_t row, double distance) const {
        const int64_t list = at(b, candidate), entry = list * n + atomicAdd(&counts[list], 1);
        rows[entry] = uint32_t(row), distances[entry] = distance;
    }
};
