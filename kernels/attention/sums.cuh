// The last stage: the sums of warps and of blocks become one.
#pragma once
#include "attention/unit.cuh"

/// A block's sums: STRIDE numbers for each query head, the weighted values in the accumulators' order of columns,
/// the largest score and the sum of weights.
template <class T, int D, bool CODED>
__device__ __forceinline__ float* Unit<T, D, CODED>::sums_of(uint32_t block) const {
    return c.partial + (int64_t(unit) * c.blocks + block) * c.group * STRIDE;
}

/// Adds up what the warps of this block have.
template <class T, int D, bool CODED>
__device__ __forceinline__ void Unit<T, D, CODED>::add_warps(const Running<T, D>& running, int from, int live) const {
    float sum = running.sum;
    sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
    __syncthreads();
    if (t == 0) tops[warp][g] = make_float2(running.most, sum);
    // Four columns of a lane at a time, those of other lanes beside them.
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int h = 2 * t + e;
        float* const head_sums = sums + (warp * live + h) * STRIDE + 4 * g;
        if (h >= live) continue;
#pragma unroll
        for (int i = 0; i < F::TILES; i += 2) {
            const auto(&a)[4] = running.acc[i], (&b)[4] = running.acc[i + 1];
            *reinterpret_cast<float4*>(head_sums + 16 * i) = make_float4(a[e], a[e + 2], b[e], b[e + 2]);
        }
    }
    __syncthreads();
    float* const out = sums_of(block) + from * STRIDE;
#pragma unroll 1
    for (int i = threadIdx.x; i < live * WIDTH; i += BLOCK) {
        const int h = i / WIDTH, slot = i % WIDTH;
        float most = -INFINITY, value = 0, weight = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) most = fmaxf(most, tops[w][h].x);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float2 top = tops[w][h];
            const float shrink = top.y > 0 ? __expf(top.x - most) : 0;
            value = fmaf(shrink, sums[(w * live + h) * STRIDE + slot], value);
            weight = fmaf(shrink, top.y, weight);
        }
        out[h * STRIDE + slot] = value;
        if (slot == 0) *reinterpret_cast<float2*>(out + h * STRIDE + WIDTH) = make_float2(most, weight);
    }
}

/// Adds up what the blocks have, each a share of the query heads' columns.
template <class T, int D, bool CODED>
__device__ __forceinline__ void Unit<T, D, CODED>::add_blocks() const {
    T* const out = static_cast<T*>(c.out) + int64_t(unit) * c.group * D;
#pragma unroll 1
    for (int i = block * BLOCK + threadIdx.x; i < c.group * WIDTH; i += c.blocks * BLOCK) {
        const int h = i / WIDTH, slot = i % WIDTH;  // a head has whole warps
        float2 own = {-INFINITY, 0};
        if (lane < c.blocks) own = __ldcg(reinterpret_cast<const float2*>(sums_of(lane) + h * STRIDE + WIDTH));
        float parts[BLOCKS];
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) parts[b] = b < c.blocks ? __ldcg(sums_of(b) + h * STRIDE + slot) : 0;
        const float2 all = over_lanes(own);
        const float shrink = own.y > 0 ? __expf(own.x - all.x) / all.y : 0;
        float value = 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) value = fmaf(__shfl_sync(~0u, shrink, b), parts[b], value);
        // The column of a lane's value: one of a pair in its piece of a part.
        const int g = slot % 32 / 4, at = slot / 32 * 4 + slot % 4, pair = at / 2, part = pair / (F::EACH / 2);
        const int column = part * 8 * F::EACH + g * F::EACH + pair % (F::EACH / 2) * 2 + at % 2;
        if (WIDTH == D || column < D) out[h * D + column] = T(value);
    }
}
