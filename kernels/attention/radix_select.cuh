// Which clusters are the best up to a budget of tokens, by one block: a radix select (the digit by digit search of a
// radix sort, of the bins that hold what is wanted alone) of ranks that have weights.
#pragma once
#include "scan.cuh"

constexpr int BINS = 256, DIGIT = 8;
constexpr int COMPARED = 64;  // candidates that are compared with each other

/// A block shares this while it selects.
struct SelectState {
    alignas(16) uint32_t bins[BINS];
    uint32_t found, count;
    uint2 compared[COMPARED], bounds[WARP], sums[WARP];
};

/// A score as an integer of the same order. A NaN ranks as minus infinity, and the two zeros are one.
__device__ __forceinline__ uint32_t rank_of(float score) {
    return ordered(__float_as_uint(score == score ? score + 0.0f : -INFINITY));
}

/// The highest digit at which the bins from the top on have `wanted` weight, of which what is above it is taken; 0 if
/// they never do. Every warp finds it, a lane among EACH of the bins, the highest first.
__device__ __forceinline__ uint32_t find_digit(const uint32_t* bins, uint32_t& wanted) {
    constexpr int EACH = BINS / WARP;
    const int lane = threadIdx.x % WARP;
    uint32_t own[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const uint4 four = reinterpret_cast<const uint4*>(bins)[(BINS - EACH * (lane + 1) + i) / 4];
        own[EACH - 1 - i] = four.x, own[EACH - 2 - i] = four.y, own[EACH - 3 - i] = four.z, own[EACH - 4 - i] = four.w;
        sum += four.x + four.y + four.z + four.w;
    }
    uint32_t before = warp_scan(sum) - sum;
    const uint32_t owners = __ballot_sync(~0u, before < wanted && before + sum >= wanted);
    int bin = BINS - 1 - EACH * lane;
#pragma unroll
    for (int i = 0; i < EACH - 1; ++i) {
        const bool past = before + own[i] < wanted && bin == BINS - 1 - EACH * lane - i;
        before += past ? own[i] : 0, bin -= past;
    }
    const int owner = __ffs(owners) - 1;
    wanted -= owners ? __shfl_sync(~0u, before, max(owner, 0)) : 0;
    return owners ? __shfl_sync(~0u, bin, max(owner, 0)) : 0;
}

/// The rank at which the clusters from the best on have `wanted` weight, or the least of all if they never do. A thread
/// knows ranks between `least` and `most`, and together they know all. Ranks are told apart by their distance from the
/// least, DIGIT bits at a time from the top: how much clusters have whose distance begins as found so far, by their
/// next bits; the last few by comparing them.
template <class Weight>
__device__ uint32_t radix_select_weighted(const uint32_t* ranks, int k, uint32_t least, uint32_t most, uint32_t wanted,
                                          Weight weight, SelectState& s) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    least = __reduce_min_sync(~0u, least), most = __reduce_max_sync(~0u, most);
    if (lane == 0) s.bounds[threadIdx.x / WARP] = make_uint2(least, most);
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) s.bins[i] = 0;
    __syncthreads();
    const uint2 bounds = s.bounds[min(lane, warps - 1)];
    least = __reduce_min_sync(~0u, bounds.x), most = __reduce_max_sync(~0u, bounds.y);
    int above = 32 - __clz(most - least);  // bits that are not found yet
    uint32_t distance = 0;                 // as far as found
    while (above) {
        const int shift = max(above - DIGIT, 0);
        if (threadIdx.x == 0) s.count = 0;
        const auto candidate = [&](uint32_t offset) { return above == 32 || (offset ^ distance) >> above == 0; };
#pragma unroll 2
        for (int j = threadIdx.x; j < k; j += blockDim.x) {
            const uint32_t offset = ranks[j] - least;
            if (candidate(offset)) atomicAdd(&s.bins[offset >> shift & (BINS - 1)], weight(j));
        }
        __syncthreads();
        distance |= find_digit(s.bins, wanted) << shift;
        above = shift;
        if (above == 0) break;
#pragma unroll 2
        for (int j = threadIdx.x; j < k; j += blockDim.x) {
            const uint32_t offset = ranks[j] - least;
            if (!candidate(offset)) continue;
            const uint32_t at = atomicAdd(&s.count, 1);
            if (at < COMPARED) s.compared[at] = make_uint2(offset, weight(j));
        }
        if (threadIdx.x == 0) s.found = distance;
        __syncthreads();
        const int count = int(s.count);
        if (count <= COMPARED) {
            if (int(threadIdx.x) < count) {
                const uint32_t own_key = s.compared[threadIdx.x].x;
                uint32_t higher = 0, same = 0;
#pragma unroll 4
                for (int i = 0; i < count; ++i) {
                    const uint2 other = s.compared[i];
                    higher += other.x > own_key ? other.y : 0, same += other.x == own_key ? other.y : 0;
                }
                if (higher < wanted && higher + same >= wanted) s.found = own_key;
            }
            __syncthreads();
            distance = s.found;
            break;
        }
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) s.bins[i] = 0;
        __syncthreads();
    }
    return least + distance;
}

/// The best clusters as a list of `budget` tokens: those above `rank` come first, then those of it as long as there is
/// room; clusters of one rank go by their index. `taken(j, count)` for every cluster: how many of its tokens are
/// listed, and `take(place, at, j)` for the places in [from, to), the tokens' places in the order and their clusters. A
/// warp goes through a part of the clusters. `places(all)`, of the weights above the rank and of it, are the first
/// places of both.
template <class Places, class Taken, class Take>
__device__ void gather_best(const uint32_t* ranks, int k, uint32_t rank, uint32_t budget, const uint32_t* begins,
                            int from, int to, uint2* sums, Places places, Taken taken, Take take) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int each = (k + warps * WARP - 1) / (warps * WARP) * WARP;
    const int begin = min(warp * each, k), end = min(begin + each, k);
    uint32_t above = 0, same = 0;
    for (int j = begin + lane; j < end; j += WARP) {
        const uint32_t key = ranks[j], size = begins[j + 1] - begins[j];
        above += key > rank ? size : 0, same += key == rank ? size : 0;
    }
    above = __reduce_add_sync(~0u, above), same = __reduce_add_sync(~0u, same);
    if (lane == 0) sums[warp] = make_uint2(above, same);
    __syncthreads();
    // The next places for those above the rank, and for those of it.
    const uint2 of_warp = lane < warps ? sums[lane] : uint2{};
    const uint2 first_places = places(make_uint2(__reduce_add_sync(~0u, of_warp.x), __reduce_add_sync(~0u, of_warp.y)));
    above = first_places.x + __reduce_add_sync(~0u, lane < warp ? of_warp.x : 0);
    same = first_places.y + __reduce_add_sync(~0u, lane < warp ? of_warp.y : 0);
#pragma unroll 1
    for (int first = begin; first < end; first += WARP) {
        const int j = first + lane;
        const uint32_t key = j < end ? ranks[j] : 0, start = j < end ? begins[j] : 0;
        const uint32_t size = j < end ? begins[j + 1] - start : 0;
        const bool better = j < end && key > rank, equal = j < end && key == rank;
        uint32_t place = 0, count = 0;
        if (__any_sync(~0u, better)) {
            const uint32_t sum = warp_scan(better ? size : 0);
            if (better) place = above + sum - size, count = size;
            above += __shfl_sync(~0u, sum, WARP - 1);
        }
        if (__any_sync(~0u, equal)) {
            const uint32_t sum = warp_scan(equal ? size : 0);
            if (equal) place = same + sum - size, count = place < budget ? min(size, budget - place) : 0;
            same += __shfl_sync(~0u, sum, WARP - 1);
        }
        if (j < end) taken(j, count);
        const int stop = int(place + count);
        uint32_t some = __ballot_sync(~0u, count > 0 && stop > from && int(place) < to);
#pragma unroll 1
        for (; some; some &= some - 1) {
            const int owner = __ffs(some) - 1, at = __shfl_sync(~0u, int(place), owner);
            const int last = min(to, __shfl_sync(~0u, stop, owner)), offset = int(__shfl_sync(~0u, start, owner)) - at;
#pragma unroll 1
            for (int i = max(at, from) + lane; i < last; i += WARP) take(i, offset + i, first + owner);
        }
    }
}

/// A block lists the clusters of the rank after all that are above it.
__device__ __forceinline__ uint2 places_of_block(uint2 all) { return make_uint2(0, all.x); }
