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

/// Candidates that a block tells all others.
constexpr int TEAM_COMPARED = COMPARED / ATTEND_BLOCKS;
static_assert(COMPARED % WARP == 0);  // whole warps load them

/// A block keeps this while its team selects. Candidates are ranks and weights.
struct TeamState {
    alignas(16) uint32_t bins[2][BINS];
    uint2 candidates[TEAM_COMPARED], compared[COMPARED], sums[WARP];
    uint32_t count, above, found, taken[2];
};

/// The rank of the last cluster that is listed, and where a block lists its clusters above that rank, and those of it:
/// after those of the blocks before it.
struct TeamRank {
    uint32_t rank;
    uint2 places;
};

/// Compares the candidates of all blocks with each other, those whose ranks are `rank` but for their last `unknown`
/// bits, of which `wanted` weight is wanted. Each block tells its own, and how much weight it has above them, so that
/// all know the places, too. False if a block has more candidates than it can tell.
template <class Weight>
__device__ __forceinline__ bool compare_by_team(const uint32_t* ranks, int k, uint32_t rank, int unknown,
                                                uint32_t wanted, Weight weight, TeamState& s, const Team& team,
                                                TeamRank& last) {
    const uint32_t lane = threadIdx.x % WARP, other = min(lane, team.size - 1);
    uint32_t own_above = 0;
#pragma unroll 2
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        const uint32_t key = ranks[j];
        if (key < rank) continue;
        if (key - rank >> unknown) {
            own_above += weight(j);
        } else {
            const uint32_t at = atomicAdd(&s.count, 1);
            if (at < TEAM_COMPARED) s.candidates[at] = make_uint2(key, weight(j));
        }
    }
    own_above = __reduce_add_sync(~0u, own_above);
    if (lane == 0) atomicAdd(&s.above, own_above);
    team.sync();
    // A lane has what one of the blocks has.
    const uint32_t count = lane < team.size ? team.load(&s.count, other) : 0;
    const uint32_t above = lane < team.size ? team.load(&s.above, other) : 0;
    if (__any_sync(~0u, count > TEAM_COMPARED)) return false;
    const uint32_t ends = warp_scan(count), total = __shfl_sync(~0u, ends, WARP - 1);
    const uint32_t from = __shfl_sync(~0u, ends - count, team.block);
    if (threadIdx.x < COMPARED) {
        const uint32_t owner = threadIdx.x / TEAM_COMPARED, i = threadIdx.x % TEAM_COMPARED;
        const uint32_t of_owner = __shfl_sync(~0u, count, owner), end = __shfl_sync(~0u, ends, owner);
        if (i < of_owner) {
            const uint32_t* const candidate = &s.candidates[i].x;
            s.compared[end - of_owner + i] = make_uint2(team.load(candidate, owner), team.load(candidate + 1, owner));
        }
    }
    if (threadIdx.x == 0) s.found = rank;
    __syncthreads();
    if (threadIdx.x < total) {
        const uint32_t own_key = s.compared[threadIdx.x].x;
        uint32_t higher = 0, same = 0;
#pragma unroll 4
        for (uint32_t i = 0; i < total; ++i) {
            const uint2 candidate = s.compared[i];
            higher += candidate.x > own_key ? candidate.y : 0, same += candidate.x == own_key ? candidate.y : 0;
        }
        if (higher < wanted && higher + same >= wanted) s.found = own_key;
    }
    __syncthreads();
    const uint32_t found = s.found;
    uint32_t higher = above, before = lane < team.block ? above : 0, same = 0;
    for (uint32_t i = lane; i < total; i += WARP) {
        const uint2 candidate = s.compared[i];
        const uint32_t better = candidate.x > found ? candidate.y : 0;
        higher += better, before += i < from ? better : 0;
        same += i < from && candidate.x == found ? candidate.y : 0;
    }
    higher = __reduce_add_sync(~0u, higher);
    last = {found, make_uint2(__reduce_add_sync(~0u, before), higher + __reduce_add_sync(~0u, same))};
    return true;
}

/// As radix_select_weighted, of the clusters of all blocks, whose ranks have so many `bits`: each counts its own in
/// bins, and all add up the bins of each. A digit costs an exchange, and so would the ranks' bounds. So digits are
/// those of the ranks as they are, and after two, where few candidates are left, these are compared instead.
template <class Weight>
__device__ TeamRank radix_select_by_team(const uint32_t* ranks, int k, int bits, uint32_t wanted, Weight weight,
                                         TeamState& s, const Team& team) {
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) s.bins[0][i] = 0;
    if (threadIdx.x == 0) s.count = s.above = 0;
    __syncthreads();
    uint32_t rank = 0;   // as far as found
    int unknown = bits;  // that are not found yet
    for (int turn = 0; unknown; turn ^= 1) {
        const int shift = max(unknown - DIGIT, 0);
        uint32_t *const own = s.bins[turn], *const all = s.bins[turn ^ 1];
#pragma unroll 2
        for (int j = threadIdx.x; j < k; j += blockDim.x) {
            const uint32_t key = ranks[j];
            const bool candidate = unknown == 32 || (key ^ rank) >> unknown == 0;
            if (candidate) atomicAdd(own + (key >> shift & (BINS - 1)), weight(j));
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
        rank |= find_digit(all, wanted) << shift;
        unknown = shift;
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) all[i] = 0;
        __syncthreads();
        TeamRank last;
        if (unknown == bits - 2 * DIGIT && compare_by_team(ranks, k, rank, unknown, wanted, weight, s, team, last)) {
            return last;
        }
    }
    // All digits are found, and the places are not known yet.
    uint32_t own_above = 0, own_same = 0;
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        const uint32_t key = ranks[j], size = weight(j);
        own_above += key > rank ? size : 0, own_same += key == rank ? size : 0;
    }
    if (threadIdx.x < 2) s.taken[threadIdx.x] = 0;
    __syncthreads();
    own_above = __reduce_add_sync(~0u, own_above), own_same = __reduce_add_sync(~0u, own_same);
    const uint32_t lane = threadIdx.x % WARP, other = min(lane, team.size - 1);
    if (lane == 0) atomicAdd(s.taken, own_above), atomicAdd(s.taken + 1, own_same);
    team.sync();
    const uint32_t above = lane < team.size ? team.load(s.taken, other) : 0;
    const uint32_t same = lane < team.size ? team.load(s.taken + 1, other) : 0;
    return {rank, make_uint2(__reduce_add_sync(~0u, lane < team.block ? above : 0),
                             __reduce_add_sync(~0u, above + (lane < team.block ? same : 0)))};
}
#endif
