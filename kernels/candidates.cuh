// The candidates of a block of k-means++, and the rows that are nearer to them than to any seed.
#pragma once
#include "exact/spread.cuh"

/// Most rows that are tried: 2 + ln(2^32).
constexpr int MOST_TRIALS = 32;

/// The candidates of a block: first the rows that were `tried` (UINT32_MAX behind them), then those of the first
/// `wanted` that a race has `drawn` that are not among these.
struct Candidates {
    uint32_t rows[CANDIDATES];
    /// The place of each among the rows that the race has drawn.
    int drawn_at[CANDIDATES];
    bool added[CANDIDATES];
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
        if (i < CANDIDATES) added[i] = adds;
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

/// The rows that are nearer to a candidate than to any seed: of each of `room` candidates how many, and which; what
/// that takes off the potential; of each row the candidates, as bits, and their distances, `(b, n, room)`.
struct Nearer {
    uint32_t *counts, *rows;
    unsigned long long *gains, *masks;
    double* distances;
    int64_t n, room;

    __device__ __forceinline__ int64_t list(int64_t b, int64_t candidate) const { return b * room + candidate; }

    __device__ __forceinline__ double& distance(int64_t b, int64_t row, int64_t candidate) const {
        return distances[(b * n + row) * room + candidate];
    }

    __device__ __forceinline__ void add(int64_t b, int64_t candidate, int64_t row, double to) const {
        const int64_t own = list(b, candidate);
        rows[own * n + atomicAdd(&counts[own], 1)] = uint32_t(row);
        distance(b, row, candidate) = to;
    }
};

/// Terms of a potential.
struct Terms {
    const double* weights;
    double units;

    __device__ __forceinline__ double weight(int64_t row) const { return weights ? weights[row] : 1.0; }

    __device__ __forceinline__ unsigned long long operator()(int64_t row, double distance) const {
        return whole(__dmul_rn(distance, weight(row)), units);
    }
};
