// Attention of one token over a cache that is read by clusters: chosen tokens exactly, the others as their clusters'
// means.
//
// The blocks of a unit share its clusters and the rows it reads. They (1) bound the scores of the clusters' keys by
// their means and spreads, (2) rank clusters, choose the best up to a budget of tokens, and read keys and values of
// their share of the listed tokens where they lie, and the mean values of their clusters, and (3) add up what they have
// (Dao et al. 2023, "Flash-Decoding"). Between these stages they wait for each other: as a thread block cluster in one
// launch, which ranks many clusters as a team, where there are such; else every stage is a launch, and each block ranks
// all. Traffic: the mean keys and mean values, a byte a column, and the listed keys and values, or their codes, once
// for all query heads that share them.
#pragma once
#include "attention/bound.cuh"
#include "attention/read.cuh"
#include "attention/sums.cuh"

/// Waits for the other blocks of the unit, which are a cluster where there are such.
__device__ __forceinline__ void wait_for_unit() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// Lets the next launch take its places, and waits for what the one before has written.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

/// The entries of a key head's codes, a table for each piece, which begin to move to shared memory if they have a place
/// there. One that all pieces share becomes as many on its way.
template <class T, int D, int BLOCK>
__device__ __forceinline__ const T* load_entries(const ProductCodes& codes, int64_t head, uint4* place, bool fits) {
    const int bytes = D * int(sizeof(T)) << codes.bits, table = codes.columns * int(sizeof(T)) << codes.bits;
    const bool shared = codes.tables == 1;
    const char* const from = static_cast<const char*>(codes.entries) + head * (shared ? table : bytes);
    if (!fits) return reinterpret_cast<const T*>(from);
#pragma unroll 1
    for (int i = threadIdx.x; i < bytes / 16; i += BLOCK) {
        // A table is a power of two of bytes.
        cp_async_16(shared_address(place + i), from + (shared ? i & (table / 16 - 1) : i) * 16, 16);
    }
    return reinterpret_cast<const T*>(place);
}

template <class T, int D, bool CODED>
__device__ __forceinline__ void attend(const Cache& c) {
    using F = Fragments<T, D>;
    constexpr int BLOCK = Unit<T, D, CODED>::BLOCK, WARPS = BLOCK / WARP;
    extern __shared__ uint4 queries[];
    uint4* const dynamic = queries + F::PIECES * WARP;
    __shared__ float2 tops[WARPS][HEADS];
    const uint32_t unit = blockIdx.x / uint32_t(c.blocks), block = blockIdx.x % uint32_t(c.blocks);
    const int64_t head = unit / uint32_t(c.units);
    const int begin = int(min(int64_t(block) * c.clusters, int64_t(c.k))), end = min(begin + c.clusters, c.k);
    uint32_t* const ranks = reinterpret_cast<uint32_t*>(dynamic);
    // Sums take the place of what is no longer needed, unless the query heads take turns.
    const int low = c.team ? begin : 0, high = c.team ? end : c.k, ranked = c.team ? c.clusters : c.k;
    const int lists = 2 * ranked + 1 + (CODED ? 2 : 1) * c.rows, kept = c.group > HEADS ? (lists + 3) / 4 : 0;
    const int lane = threadIdx.x % WARP;
    Unit<T, D, CODED> u = {c,
                           unit,
                           block,
                           begin,
                           end,
                           low,
                           high,
                           ranks,
                           ranks + ranked,
                           ranks + 2 * ranked + 1,
                           ranks + 2 * ranked + 1 + c.rows,
                           reinterpret_cast<float*>(dynamic + kept),
                           queries,
                           tops,
                           nullptr,
                           nullptr,
                           c.bounds + int64_t(unit) * c.group * c.width,
                           head * c.k,
                           __shfl_sync(~0u, int(threadIdx.x) / WARP, 0),
                           lane,
                           lane / 4,
                           lane % 4};
    wait_for_inputs();
    if (c.first <= 2) {
        const uint32_t* const offsets = c.offsets + head * (c.k + 1);
#pragma unroll 4
        for (int j = threadIdx.x; j <= high - low; j += BLOCK) cp_async_4(u.begins + j, offsets + low + j);
        u.load_queries(0);
        if constexpr (CODED) {
            uint4* const place = queries + c.entries;
            u.key_entries = load_entries<T, D, BLOCK>(c.key_codes, head, place, c.entries > 0);
            const int of_keys = D * int(sizeof(T)) / 16 << c.key_codes.bits;
            u.value_entries = load_entries<T, D, BLOCK>(c.value_codes, head, place + of_keys, c.entries > 0);
            cp_async_commit();
        }
        // The mean values are read last; the first of them can be on their way.
        const uint8_t* const values = u.mean(c.mean_values, begin);
        const int64_t bytes = c.estimate ? min(int64_t(end - begin) * D, int64_t(ATTEND_PREFETCHED)) : 0;
#pragma unroll 1
        for (int64_t at = int64_t(threadIdx.x) * 128; at < bytes; at += BLOCK * 128) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(values + at));
        }
    }
    if (c.first <= 1) u.bound_scores();
    if (c.first <= 1 && c.last > 1) wait_for_unit();
    if (c.first <= 2 && c.last >= 2) {
        if (CODED || c.first == 2) cp_async_wait<0>();
        __syncthreads();
        u.read(u.rank_clusters());
    }
    if (c.last > 2 && c.first <= 2) wait_for_unit();
    if (c.last >= 3) u.add_blocks();
}

#define KERNEL(name, D, suffix, T, CODED)                                                                              \
    extern "C" __global__ void __launch_bounds__(Unit<T, D, CODED>::BLOCK, 1)                                          \
        name##_##D##_##suffix(const __grid_constant__ Cache c) {                                                       \
        attend<T, D, CODED>(c);                                                                                        \
    }
#define TYPES(name, D, CODED)                                                                                          \
    KERNEL(name, D, f16, __half, CODED)                                                                                \
    KERNEL(name, D, bf16, __nv_bfloat16, CODED)                                                                        \
    KERNEL(name, D, f32, float, CODED)
#define KERNELS(name, CODED)                                                                                           \
    TYPES(name, 64, CODED)                                                                                             \
    TYPES(name, 80, CODED)                                                                                             \
    TYPES(name, 96, CODED)                                                                                             \
    TYPES(name, 112, CODED)                                                                                            \
    TYPES(name, 128, CODED)                                                                                            \
    TYPES(name, 256, CODED)
