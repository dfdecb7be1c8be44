// A selection by the blocks of a thread block cluster, each of which has a part of what is selected from.
#pragma once
#include "attention/radix_select.cuh"

#if __CUDA_ARCH__ >= 900

/// The blocks of a thread block cluster, and their shared memory (distributed shared memory, from Hopper on).
struct Team {
    uint32_t size, block;

    /// Waits for all threads of all blocks, and for what they have written.
    __device__ __forceinline__ void sync() const {
        asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
    /// The address of what another block has at the same place.
    __device__ __forceinline__ uint32_t address(const uint32_t* own, uint32_t block) const {
        uint32_t address;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(block));
        return address;
    }
    __device__ __forceinline__ uint32_t load(const uint32_t* own, uint32_t block) const {
        uint32_t value;
        asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(address(own, block)) : "memory");
        return value;
    }
    __device__ __forceinline__ void store(uint32_t* own, uint32_t block, uint32_t value) const {
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address(own, block)), "r"(value) : "memory");
    }
};

/// A block keeps this while its team selects.
struct TeamState {
    alignas(16) uint32_t bins[2][BINS];
    uint2 bounds[WARP], sums[WARP];
    uint32_t range[2], taken[2];
};

/// As radix_select_weighted, of the clusters of all blocks: each counts its own in bins, and all add up the bins of
/// each.
template <class Weight>
__device__ uint32_t radix_select_by_team(const uint32_t* ranks, int k, uint32_t least, uint32_t most, uint32_t wanted,
                                         Weight weight, TeamState& s, const Team& team) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (lane == 0) s.bounds[threadIdx.x / WARP] = make_uint2(least, most);
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) s.bins[0][i] = 0;
    __syncthreads();
    const uint2 bounds = s.bounds[min(lane, warps - 1)];
    least = __reduce_min_sync(~0u, bounds.x), most = __reduce_max_sync(~0u, bounds.y);
    if (threadIdx.x == 0) s.range[0] = least, s.range[1] = most;
    team.sync();
    const uint32_t other = min(uint32_t(lane), team.size - 1);
    least = __reduce_min_sync(~0u, team.load(s.range, other));
    most = __reduce_max_sync(~0u, team.load(s.range + 1, other));
    int above = 32 - __clz(most - least);  // bits that are not found yet
    uint32_t distance = 0;                 // as far as found
    for (int turn = 0; above; turn ^= 1) {
        const int shift = max(above - DIGIT, 0);
        uint32_t *const own = s.bins[turn], *const all = s.bins[turn ^ 1];
#pragma unroll 2
        for (int j = threadIdx.x; j < k; j += blockDim.x) {
            const uint32_t offset = ranks[j] - least;
            const bool candidate = above == 32 || (offset ^ distance) >> above == 0;
            if (candidate) atomicAdd(own + (offset >> shift & (BINS - 1)), weight(j));
        }
        team.sync();
        // The other bins, which all blocks have read by now, take the sums, and are the next to count in.
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) {
            uint32_t sum = 0;
#pragma unroll
            for (uint32_t b = 0; b < ATTEND_BLOCKS; ++b) sum += b < team.size ? team.load(own + i, b) : 0;
            all[i] = sum;
        }
        __syncthreads();
        distance |= find_digit(all, wanted) << shift;
        above = shift;
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) all[i] = 0;
        __syncthreads();
    }
    return least + distance;
}

/// The first places for a block's clusters above the rank, and for those of it: blocks list theirs one after another.
__device__ __forceinline__ uint2 places_in_team(uint2 own, TeamState& s, const Team& team) {
    if (threadIdx.x == 0) s.taken[0] = own.x, s.taken[1] = own.y;
    team.sync();
    const uint32_t lane = threadIdx.x % WARP, other = min(lane, team.size - 1);
    const uint32_t above = lane < team.size ? team.load(s.taken, other) : 0;
    const uint32_t same = lane < team.size ? team.load(s.taken + 1, other) : 0;
    return make_uint2(__reduce_add_sync(~0u, lane < team.block ? above : 0),
                      __reduce_add_sync(~0u, above + (lane < team.block ? same : 0)));
}
#endif
