// A sweep of rows over centroids with the tensor cores of Ampere and later (mma.sync).
//
// A block of SM80_ROWS threads owns as many rows, 32 a warp, and walks the centroids in tiles of SM80_CENTROIDS. Both
// come through a ring of cp.async stages of SM80_COLUMNS columns; rows of no more such chunks than the launch brought
// memory for, at least STAGES, stay in shared memory after the first tile. Every warp scores its rows against the whole
// tile, so no two warps share a row, and no score leaves the registers.
//
// Traffic of a row tile: X once, or once per tile of centroids if rows do not stay; the centroids once, 2 k d bytes
// from L2 for 2 SM80_ROWS k d flops. Shared memory: 49 KB with STAGES chunks of rows, so that 3 blocks fit an A100 or
// H100 and 2 an sm_86; 8 KB for each chunk more.
#pragma once
#include "arch/mma.cuh"
#include "assign/tensor.cuh"

constexpr int WARP_ROWS = 32, CENTROIDS = SM80_CENTROIDS, COLUMNS = SM80_COLUMNS, STAGES = SM80_STAGES;
constexpr int BLOCK = SM80_ROWS;  // threads; thread t also stands for row t of the tile
constexpr int PIECES = COLUMNS / PIECE;
constexpr int ROW_BYTES = COLUMNS * 2, ROWS_BYTES = SM80_ROWS * ROW_BYTES, TILE_BYTES = CENTROIDS * ROW_BYTES;
constexpr int EIGHTS = CENTROIDS / 8, STEPS = COLUMNS / 16;
constexpr int SLOTS = 4;  // rows of a thread: lane / 4 of each eight of its warp's
static_assert(SM80_ROWS % WARP_ROWS == 0 && CENTROIDS % 32 == 0, "whole warps, whole groups");
static_assert(BLOCK % PIECES == 0 && CENTROIDS % (BLOCK / PIECES) == 0 && CENTROIDS / 4 <= BLOCK, "even copies");

/// Dynamic shared memory, beside ROWS_BYTES for each chunk of rows that is to stay, at least STAGES of them, and what a
/// kernel adds; `sweep_shared` in src/cuda/assign/tensor_core.rs has the sum.
constexpr int RING_BYTES = STAGES * (TILE_BYTES + CENTROIDS * 4);

// ---- The search of a first pass.

constexpr int PLACES = 8;

/// A thread finds this of a row: the best score and the best outside its group of eight columns, and the best of each
/// of the eight places in a group. Every column but the winner is in another group or at another place, so that gives
/// the winner's column and the exact second best for 2.5 operations a score instead of 5.
struct RowResult : Search<PLACES> {
    /// Narrows the row of places to the winner. Equal scores leave `second` equal to `top`.
    __device__ __forceinline__ void finish() {
        int winner = 0;
#pragma unroll
        for (int p = PLACES - 1; p >= 0; --p) winner = best_of[p] == top ? p : winner;
#pragma unroll
        for (int p = 0; p < PLACES; ++p) second = fmaxf(second, p == winner ? -INFINITY : best_of[p]);
        column += 8 * (winner / 2) + winner % 2;
    }
    /// Adds what the lane `offset` away has found of the same row.
    __device__ __forceinline__ void join(int offset) {
        const float t = __shfl_xor_sync(~0u, top, offset), u = __shfl_xor_sync(~0u, second, offset);
        const int other = __shfl_xor_sync(~0u, column, offset);
        second = fmaxf(fmaxf(second, u), fminf(top, t));
        if (t > top || (t == top && other < column)) top = t, column = other;
    }
};

/// The best score of a row, what no other score of it is above, and the column of the best.
struct Winner {
    float top = 0, second = 0;
    int column = 0;
};

/// Joins what a warp has found of the COUNT rows of each thread: of the four lanes that share rows, lane i % 4 finishes
/// row i.
template <int COUNT>
__device__ __forceinline__ Winner winner_of_quad(RowResult (&found)[COUNT]) {
    Winner winner;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        found[i].finish();
        found[i].join(1), found[i].join(2);
        if (i == threadIdx.x % 4) winner = {found[i].top, found[i].second, found[i].column};
    }
    return winner;
}

// ---- The sweep of a row tile over tiles of centroids.

/// The parts of shared memory: centroids and `start` for each stage, what a kernel adds, and chunks of rows.
struct Shared {
    uint32_t ring, rows;
    float* start;
    uint8_t *added, *rows_at;

    __device__ __forceinline__ Shared(uint8_t* raw, int added_bytes)
        : ring(shared_address(raw)),
          rows(ring + RING_BYTES + added_bytes),
          start(reinterpret_cast<float*>(raw + STAGES * TILE_BYTES)),
          added(raw + RING_BYTES),
          rows_at(added + added_bytes) {}

    __device__ __forceinline__ bool fit(int chunks) const {
        uint32_t bytes;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
        return int64_t(chunks) * ROWS_BYTES <= int(bytes) - (rows_at - added) - RING_BYTES;
    }
};
static_assert(RING_BYTES % 128 == 0, "the swizzles start on lines of 128 bytes");

/// A chunk of a tile, and its stage.
struct Step {
    int tile, chunk = 0, stage = 0;
    __device__ __forceinline__ void next(int chunks) {
        if (++chunk == chunks) chunk = 0, ++tile;
        if (++stage == STAGES) stage = 0;
    }
};

/// The scores of a warp's 32 rows against a tile, as `multiply_step` leaves them.
using Scores = float[2][EIGHTS][4];

template <class T, int COUNT>
__device__ __forceinline__ void multiply_chunk(Scores& acc, uint32_t rows, uint32_t centroids) {
#pragma unroll
    for (int step = 0; step < COUNT; ++step) {
        multiply_step<T>(
            acc, [&](int i) { return (rows + i * 16 * ROW_BYTES) ^ (step * 32); },
            [&](int j) { return (centroids + j * 8 * ROW_BYTES) ^ (step * 32); });
    }
}

/// The same for a chunk of COLUMNS / 2 columns of h and then of l: h.h + h.l + l.h, rows first.
template <class T>
__device__ __forceinline__ void multiply_split_chunk(Scores& acc, uint32_t rows, uint32_t centroids) {
#pragma unroll
    for (int step = 0; step < STEPS / 2; ++step) {
        const int high = step * 32, low = high + ROW_BYTES / 2;
        uint32_t a[2][4], a_low[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            ldmatrix_x4(a[i], (rows + i * 16 * ROW_BYTES) ^ high);
            ldmatrix_x4(a_low[i], (rows + i * 16 * ROW_BYTES) ^ low);
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j += 2) {
            uint32_t b[4], b_low[4];
            ldmatrix_x4(b, (centroids + j * 8 * ROW_BYTES) ^ high);
            ldmatrix_x4(b_low, (centroids + j * 8 * ROW_BYTES) ^ low);
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j], a[i], b[0], b[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j + 1], a[i], b[2], b[3], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j], a[i], b_low[0], b_low[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j + 1], a[i], b_low[2], b_low[3], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j], a_low[i], b[0], b[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) mma(acc[i][j + 1], a_low[i], b[2], b[3], T());
        }
    }
}

/// Scores the tile's rows, of which `row_at` gives the address (null: zeros), against tiles `first` to `last` of the
/// centroids and hands every tile of scores to `take(scores, column of the first)`. A warp that is not `live` takes
/// nothing. Returns the squares of row threadIdx.x if wanted. SPLIT: l lies half a pitch after h in both.
template <bool SQUARES, bool SPLIT, class T, class RowAt, class Take>
__device__ __forceinline__ float sweep(const Shared& s, RowAt row_at, const ScoredCentroids<T>& c, int d, int first,
                                       int last, bool live, Take take) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quad = lane % 4;
    const int piece = threadIdx.x % PIECES, line = threadIdx.x / PIECES;
    constexpr int LINES = BLOCK / PIECES;
    constexpr int WIDTH = SPLIT ? COLUMNS / 2 : COLUMNS;  // of a chunk, in columns of the rows
    const int chunks = (d + WIDTH - 1) / WIDTH;
    const int64_t part = SPLIT && piece >= PIECES / 2 ? c.pitch / 2 - COLUMNS / 2 : 0;  // beyond h's piece to l's
    const bool resident = s.fit(chunks);
    const int to =
        swizzled<ROW_BYTES>(line, piece);  // LINES is a multiple of 8, so all of a thread's pieces swizzle alike
    static_assert(LINES % 8 == 0, "see above");
    const uint32_t row_fragments = s.rows + swizzled<ROW_BYTES>(warp * WARP_ROWS + lane % 16, lane / 16);
    const uint32_t centroid_fragments = s.ring + swizzled<ROW_BYTES>(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    Step fill{first}, use{first};
    const auto issue = [&] {
        if (fill.tile < last) {
            const int column = fill.chunk * WIDTH + piece * PIECE;
            if (!resident || fill.tile == first) {
                const uint32_t rows = s.rows + (resident ? fill.chunk : fill.stage) * ROWS_BYTES + to;
                const int bytes = SPLIT ? 16 : max(0, min(16, 2 * (d - column)));
#pragma unroll
                for (int i = 0; i < SM80_ROWS / LINES; ++i) {
                    const T* row = row_at(line + i * LINES);
                    const bool some = row && bytes;
                    cp_async_16(rows + i * LINES * ROW_BYTES, some ? row + part + column : c.moved, some ? bytes : 0);
                }
            }
            const int64_t j = int64_t(fill.tile) * CENTROIDS + line;
            const T* centroid = c.moved + j * c.pitch + part + column;
            const uint32_t ring = s.ring + fill.stage * TILE_BYTES + to;
#pragma unroll
            for (int i = 0; i < CENTROIDS / LINES; ++i) {
                const bool some = (SPLIT || column < c.pitch) && j + i * LINES < c.k;
                const T* from = some ? centroid + i * LINES * c.pitch : c.moved;
                cp_async_16(ring + i * LINES * ROW_BYTES, from, some ? 16 : 0);
            }
            if (fill.chunk == 0 && threadIdx.x < CENTROIDS / 4) {
                cp_async_16(shared_address(s.start + fill.stage * CENTROIDS + 4 * threadIdx.x),
                            c.start + int64_t(fill.tile) * CENTROIDS + 4 * threadIdx.x, 16);
            }
        }
        cp_async_commit();
        fill.next(chunks);
    };

    float squares = 0;
    __syncthreads();  // until here the last sweep may have read what comes now
    for (int i = 0; i < STAGES - 1; ++i) issue();
    while (use.tile < last) {
        Scores acc;
        const int tile = use.tile;
        for (int chunk = 0; chunk < chunks; ++chunk, use.next(chunks)) {
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            issue();
            const int slot = resident ? chunk : use.stage;
            if (SQUARES && tile == first) {
#pragma unroll 1
                for (int p = 0; p < PIECES; ++p) {
                    const uint8_t* at = s.rows_at + slot * ROWS_BYTES + swizzled<ROW_BYTES>(threadIdx.x, p);
                    squares += piece_squares<T>(*reinterpret_cast<const uint4*>(at));
                }
            }
            if (!live) continue;
            if (chunk == 0) {
                const float* start = s.start + use.stage * CENTROIDS + 2 * quad;
#pragma unroll
                for (int j = 0; j < EIGHTS; ++j) {
                    float2 v = *reinterpret_cast<const float2*>(start + 8 * j);
                    if (c.scale) v = {0, 0};
#pragma unroll
                    for (int i = 0; i < 2; ++i) start_scores(acc[i][j], v);
                }
            }
            const uint32_t rows = row_fragments + slot * ROWS_BYTES, ring = centroid_fragments + use.stage * TILE_BYTES;
            if (SPLIT) multiply_split_chunk<T>(acc, rows, ring);
            else if (d - chunk * COLUMNS > 16) multiply_chunk<T, STEPS>(acc, rows, ring);
            else multiply_chunk<T, 1>(acc, rows, ring);
        }
        if (!live) continue;
        if (c.scale) {
            const int64_t column = int64_t(tile) * CENTROIDS + 2 * quad;
#pragma unroll
            for (int j = 0; j < EIGHTS; ++j) {
                const float2 u = __ldg(reinterpret_cast<const float2*>(c.start + column + 8 * j));
                const float2 v = __ldg(reinterpret_cast<const float2*>(c.scale + column + 8 * j));
#pragma unroll
                for (int i = 0; i < 2; ++i) scale_scores(acc[i][j], u, v);
            }
        }
        take(acc, tile * CENTROIDS + 2 * quad);
    }
    return squares;
}
