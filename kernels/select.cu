// The clusters that a query reads, or several together, and the tokens in them.
#include "scan.cuh"

/// Who chooses from what (`Choice` in src/cuda/select.rs). A unit chooses alone: one query head, several together, or a
/// group of queries.
struct Choice {
    int64_t units, group;  // units of a key head, and scores of a unit
    int64_t clustered, k;  // tokens and clusters of a key head
    int64_t least, most;   // tokens of a unit
    float share;           // of the unit's attention, between those bounds; only where scores are probabilities
};

constexpr int BINS = 256;

/// The rank at which the clusters from the best on have `wanted` weight, a byte at a time from the top: how much
/// clusters have whose rank begins as found so far, by their next byte.
template <class Weight>
__device__ uint32_t rank_reaching(const uint32_t* ranks, int64_t k, uint32_t wanted, Weight weight) {
    __shared__ uint32_t bins[BINS], found[2];
    uint32_t rank = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < BINS; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
            const uint32_t key = ranks[j];
            if (shift == 24 || key >> shift >> 8 == rank >> shift >> 8) {
                atomicAdd(&bins[key >> shift & (BINS - 1)], weight(j));
            }
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            // A lane to eight bins, the highest first.
            const int lane = threadIdx.x;
            uint32_t own = 0;
            for (int i = 0; i < BINS / WARP; ++i) own += bins[BINS - 1 - (lane * (BINS / WARP) + i)];
            uint32_t before = warp_scan(own) - own;
            const uint32_t here = __ballot_sync(~0u, before < wanted && before + own >= wanted);
            if (here && lane == __ffs(here) - 1) {
                int bin = BINS - 1 - lane * (BINS / WARP);
                for (; before + bins[bin] < wanted; --bin) before += bins[bin];
                found[0] = bin, found[1] = wanted - before;
            } else if (!here && lane == 0) {
                found[0] = 0, found[1] = wanted;  // there is not that much: all are
            }
        }
        __syncthreads();
        rank |= found[0] << shift, wanted = found[1];
        __syncthreads();
    }
    return rank;
}

/// A block to each unit: ranks its clusters, by its score or the sum of the softmaxes of several, and lists the tokens
/// of the best in `chosen` (units, most), counted from the first clustered one; `left` (units, k) says how many tokens
/// of each cluster are not listed, and `listed` (units) how many are. Clusters of one rank go by their index.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1)
    select_tokens(Choice c, const float* scores, const uint32_t* order, const uint32_t* offsets, uint32_t* chosen,
                  float* left, uint32_t* listed) {
    constexpr int HEADS = 4;
    extern __shared__ uint32_t ranks[];         // (k): as integers
    uint32_t* const begins = ranks + c.k;       // (k + 1): the offsets
    uint32_t* const places = begins + c.k + 1;  // (k): of their first tokens in the list
    const int64_t unit = blockIdx.x, head = unit / c.units;
    scores += unit * c.group * c.k, order += head * c.clustered, offsets += head * (c.k + 1);
    chosen += unit * c.most, left += unit * c.k;
    for (int64_t j = threadIdx.x; j <= c.k; j += blockDim.x) begins[j] = offsets[j];
    for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
        ranks[j] = c.group == 1 ? ordered(__float_as_uint(scores[j])) : 0;
    }
    __syncthreads();
    // A few query heads at a time; a cluster without tokens is none. (Sums of numbers that are not negative, whose bits
    // are ordered as they are.)
    for (int64_t from = 0; c.group > 1 && from < c.group; from += HEADS) {
        const float* const its = scores + from * c.k;
        const auto score = [&](int g, int64_t j) {
            return from + g < c.group && begins[j] < begins[j + 1] ? its[g * c.k + j] : -INFINITY;
        };
        float most[HEADS], sum[HEADS];
#pragma unroll
        for (int g = 0; g < HEADS; ++g) most[g] = -INFINITY, sum[g] = 0;
#pragma unroll 2
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
#pragma unroll
            for (int g = 0; g < HEADS; ++g) most[g] = fmaxf(most[g], score(g, j));
        }
        over_block(most, -INFINITY, Larger());
#pragma unroll 2
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
#pragma unroll
            for (int g = 0; g < HEADS; ++g) sum[g] += __expf(score(g, j) - most[g]);
        }
        over_block(sum, 0, Plus());
#pragma unroll 2
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
            float share = __uint_as_float(ranks[j]);
#pragma unroll
            for (int g = 0; g < HEADS; ++g) {
                if (from + g < c.group) share += __expf(score(g, j) - most[g]) / sum[g];
            }
            ranks[j] = __float_as_uint(share);
        }
    }
    const auto size = [&](int64_t j) { return begins[j + 1] - begins[j]; };
    uint32_t budget = c.least;
    if (c.share > 0 && c.least < c.most) {
        // Attention in parts of 2^30, so that sums are the same in any order; a cluster's place in the list is free
        // yet.
        const auto mass = [&](int64_t j) { return __uint_as_float(unordered(ranks[j])) * size(j); };
        float all[1] = {0};
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) all[0] += mass(j);
        over_block(all, 0, Plus());
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) places[j] = uint32_t(mass(j) / all[0] * 0x1p30f);
        __syncthreads();
        const uint32_t parts = block_scan(c.k, [&](int64_t j) { return places[j]; }, [](int64_t, uint32_t) {});
        const uint32_t wanted = max(1u, uint32_t(ceil(double(c.share) * parts)));
        const uint32_t last = rank_reaching(ranks, c.k, wanted, [&](int64_t j) { return places[j]; });
        const auto needed = [&](int64_t j) { return ranks[j] >= last ? size(j) : 0; };
        const uint32_t tokens = block_scan(c.k, needed, [](int64_t, uint32_t) {});
        budget = uint32_t(min(max(int64_t(tokens), c.least), c.most));
    }
    if (listed && threadIdx.x == 0) listed[unit] = budget;
    const uint32_t rank = rank_reaching(ranks, c.k, budget, size);
    // Those above that rank come first, then those of it as long as there is room.
    const uint32_t above = block_scan(
        c.k, [&](int64_t j) { return ranks[j] > rank ? size(j) : 0; }, [&](int64_t j, uint32_t at) { places[j] = at; });
    block_scan(
        c.k, [&](int64_t j) { return ranks[j] == rank ? size(j) : 0; },
        [&](int64_t j, uint32_t at) {
            if (ranks[j] == rank) places[j] = above + at;
            if (ranks[j] < rank) places[j] = UINT32_MAX;
        });
    __syncthreads();
    for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
        const uint32_t here = places[j] < budget ? min(size(j), budget - places[j]) : 0;
        left[j] = size(j) - here;
    }
    // A thread to each cluster finds those that are listed, which are few; its warp writes the tokens of each.
    const int lane = threadIdx.x % WARP;
    for (int64_t first = threadIdx.x / WARP * WARP; first < c.k; first += blockDim.x) {
        const int64_t j = first + lane;
        const uint32_t here = j < c.k && places[j] < budget ? min(size(j), budget - places[j]) : 0;
        for (uint32_t some = __ballot_sync(~0u, here > 0); some; some &= some - 1) {
            const int of = __ffs(some) - 1;
            const uint32_t count = __shfl_sync(~0u, here, of), from = begins[first + of], to = places[first + of];
            for (uint32_t i = lane; i < count; i += WARP) chosen[to + i] = order[from + i];
        }
    }
}
