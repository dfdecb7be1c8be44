// Teams of blocks that share a problem: how it is shared out, where they meet, and what a block keeps on chip.
#pragma once
#include "assign/tensor.cuh"
#include "exact/sums.cuh"

constexpr int THREADS_HERE = TEAM_THREADS, WARPS = THREADS_HERE / WARP;
constexpr int LINE_COLUMNS = TEAM_LINE, LINE = 2 * LINE_COLUMNS,
              LINE_PIECES = LINE / 16;  // bytes of 64 columns of a row
constexpr int GROUP = TEAM_GROUP;       // centroids scored at a time

/// The part of it that one team has.
template <class T>
__device__ Common Common::of_team(int64_t team, int64_t limb_count, int64_t k, int64_t d) const {
    return {limbs + team * limb_count * k * ((d + LINE_COLUMNS - 1) / LINE_COLUMNS * LINE_COLUMNS),
            remainders + team * k * d * 2,
            weights + team * k * 2,
            sizes + team * (k + 2),
            shifts + team * 2,
            arrived + team,
            reinterpret_cast<T*>(moved) + team * k * d,
            prepared + team * k};
}

/// Of a cluster's size, beside the number of its rows.
constexpr uint32_t ODD = 1u << 31;

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

/// Waits for all blocks of the team; `all` is how often they will then have arrived. What any of them has written
/// before, all see after.
__device__ __forceinline__ void sync_team(uint32_t* arrived, uint32_t all) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        while (int32_t(load_acquire(arrived) - all) < 0) {
        }
    }
    __syncthreads();
}

/// A block's shared memory. Lines hold 64 columns of a row, `swizzled`: first those of the first columns.
template <class T, bool FACTOR>
struct OnChip {
    uint8_t* rows;             // lines of the block's rows
    uint8_t* centroids;        // lines of the moved centroids
    double* totals;            // (k / blocks, d)
    double* factor;            // (rows)
    UnprovenRow* list;         // (rows): those that are unproven
    float* squares;            // (rows)
    float *start, *scale;      // (padded)
    uint32_t* hashes;          // (padded)
    uint32_t *begins, *next;   // (padded + 1) and (padded): where clusters begin, and the place of the next row
    T* mu;                     // (lines * 64)
    uint16_t *labels, *order;  // (rows)

    __device__ OnChip(uint8_t* raw, const Shares& shares, int k, int d) {
        const int lines = (d + LINE_COLUMNS - 1) / LINE_COLUMNS, most = (k + shares.blocks - 1) / shares.blocks;
        const auto take = [&](int bytes) {
            uint8_t* const at = raw;
            raw += bytes;
            return at;
        };
        rows = take(lines * shares.rows * LINE);
        centroids = take(lines * shares.padded * LINE);
        totals = reinterpret_cast<double*>(take(most * d * 8));
        factor = reinterpret_cast<double*>(take(FACTOR ? shares.rows * 8 : 0));
        list = reinterpret_cast<UnprovenRow*>(take(shares.rows * 8));
        squares = reinterpret_cast<float*>(take(shares.rows * 4));
        start = reinterpret_cast<float*>(take(shares.padded * 4));
        scale = reinterpret_cast<float*>(take(shares.padded * 4));
        hashes = reinterpret_cast<uint32_t*>(take(shares.padded * 4));
        begins = reinterpret_cast<uint32_t*>(take(shares.padded * 4 + 16));
        next = reinterpret_cast<uint32_t*>(take(shares.padded * 4));
        mu = reinterpret_cast<T*>(take(lines * LINE));
        labels = reinterpret_cast<uint16_t*>(take(shares.rows * 2));
        order = reinterpret_cast<uint16_t*>(take(shares.rows * 2));
    }
};

/// The place of a column's sum among its centroid's: lanes take two columns each, and first all add their first.
__device__ __forceinline__ int place_of(int column) {
    return column / LINE_COLUMNS * LINE_COLUMNS + column % 2 * WARP + column % LINE_COLUMNS / 2;
}
