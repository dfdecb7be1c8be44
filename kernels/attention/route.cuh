// Tiles of queries and keys of half precision in shared memory, their scores, and the online softmax over these.
#pragma once
#include "arch/mma.cuh"
#include "exact/common.cuh"
#include "scan.cuh"

constexpr int BLOCK = ROUTE_THREADS, WARPS = BLOCK / WARP, KEYS = ROUTE_KEYS;
constexpr int EIGHTS = KEYS / 8, SIXTEENS = KEYS / 16;
static_assert(KEYS <= BLOCK && KEYS % 32 == 0, "a thread to each key of a tile");

/// A row lies in shared memory as whole lines of 128 bytes, so that what `ldmatrix` reads spreads over all banks: so
/// many columns, of which those beyond D are neither written nor read.
template <int D>
constexpr int PITCH = (D + 63) / 64 * 64;

/// Copies COUNT rows, of which `row_at` gives the address (null: zeros).
template <int D, int COUNT, class RowAt>
__device__ __forceinline__ void copy_rows(uint32_t to, const void* any, RowAt row_at) {
    constexpr int PIECES = PITCH<D> / 8, LINES = BLOCK / PIECES;
    const int piece = threadIdx.x % PIECES;
    if (piece * 8 >= D) return;
#pragma unroll
    for (int i = 0; i < COUNT / LINES; ++i) {
        const int row = threadIdx.x / PIECES + i * LINES;
        const auto* const from = row_at(row);
        cp_async_16(to + swizzled<2 * PITCH<D>>(row, piece), from ? from + piece * 8 : any, from ? 16 : 0);
    }
}

/// The scores of 16 TALL rows of a warp against KEYS others, as `multiply_step` leaves them.
template <int TALL>
using Scores = float[TALL][EIGHTS][4];

template <class T, int D, int TALL>
__device__ __forceinline__ void score(Scores<TALL>& s, uint32_t rows, uint32_t keys) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < TALL; ++i) {
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0;
    }
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
        multiply_step<T>(
            s, [&](int i) { return rows + swizzled<2 * PITCH<D>>(i * 16 + lane % 16, step * 2 + lane / 16); },
            [&](int j) {
                return keys + swizzled<2 * PITCH<D>>(j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2);
            });
    }
}

__device__ __forceinline__ uint32_t pair(float x, float y, __half) {
    const __half2 v = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t pair(float x, float y, __nv_bfloat16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(v);
}

/// The result over the four lanes that share a row.
template <class Join>
__device__ __forceinline__ float over_quad(float v, Join join) {
    v = join(v, __shfl_xor_sync(~0u, v, 1));
    return join(v, __shfl_xor_sync(~0u, v, 2));
}

/// `exp2(v)`; what is far below zero is zero.
__device__ __forceinline__ float power(float v) {
    float p;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(v));
    return p;
}

/// The same, and zero for a NaN: a query that is not finite has no say in what its group reads.
__device__ __forceinline__ float share(float v) { return power(fmaxf(v, -1024.0f)); }

/// The largest score and the sum of weights of each row of a thread, as keys come by.
template <int TALL>
struct Softmax {
    float most[TALL][2], sum[TALL][2];

    __device__ __forceinline__ Softmax() {
#pragma unroll
        for (int i = 0; i < TALL; ++i) most[i][0] = most[i][1] = -INFINITY, sum[i][0] = sum[i][1] = 0;
    }

    /// Takes the largest of row (i, h) of `s`, in units of 1 / scale, and returns what earlier weights are to be
    /// multiplied by; `base` is what to take from scaled scores then.
    __device__ __forceinline__ float raise(const float (&s)[EIGHTS][4], int i, int h, float scale, float& base) {
        float top = most[i][h];
#pragma unroll
        for (int j = 0; j < EIGHTS; ++j) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
        top = over_quad(top, Larger());
        base = top == -INFINITY ? 0 : top * scale;
        const float shrink = power(most[i][h] * scale - base);
        most[i][h] = top, sum[i][h] *= shrink;
        return shrink;
    }
};
