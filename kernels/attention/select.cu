// The tokens of the clusters that a group of queries reads.
#include "attention/radix_select.cuh"

/// A block to each unit: ranks its clusters by `scores` (units, k), the attention to a token of each, and lists the
/// tokens of the best in `chosen` (units, most), counted from the first clustered one; `left` (units, k) says how many
/// tokens of each cluster are not listed, and `listed` (units) how many are. Clusters of one rank go by their index. A
/// score that is NaN or negative is none.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1)
    select_tokens(Choice c, const float* scores, const uint32_t* order, const uint32_t* offsets, uint32_t* chosen,
                  float* left, uint32_t* listed) {
    extern __shared__ uint32_t ranks[];         // (k): as integers
    uint32_t* const begins = ranks + c.k;       // (k + 1): the offsets
    uint32_t* const shares = begins + c.k + 1;  // (k): of the attention
    __shared__ SelectState state;
    const int k = int(c.k);
    const int64_t unit = blockIdx.x, head = unit / c.units;
    scores += unit * c.k, order += head * c.clustered, offsets += head * (c.k + 1);
    chosen += unit * c.most, left += unit * c.k;
    uint32_t least = UINT32_MAX, most = 0;
    for (int j = threadIdx.x; j <= k; j += blockDim.x) begins[j] = offsets[j];
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        ranks[j] = rank_of(scores[j] > 0 ? scores[j] : 0);
        least = min(least, ranks[j]), most = max(most, ranks[j]);
    }
    __syncthreads();
    const auto size = [&](int j) { return begins[j + 1] - begins[j]; };
    uint32_t budget = c.least;
    if (c.share > 0 && c.least < c.most) {
        // Attention in parts of 2^30, so that sums are the same in any order.
        const auto mass = [&](int j) { return __uint_as_float(unordered(ranks[j])) * size(j); };
        float all = 0;
        for (int j = threadIdx.x; j < k; j += blockDim.x) all += mass(j);
        all = over_block(all, 0, Plus());
        for (int j = threadIdx.x; j < k; j += blockDim.x) shares[j] = uint32_t(mass(j) / all * 0x1p30f);
        __syncthreads();
        const auto share = [&](int64_t j) { return shares[j]; };
        const uint32_t parts = block_scan(k, share, [](int64_t, uint32_t) {});
        const uint32_t wanted = uint32_t(ceil(double(c.share) * parts));  // none where there is no attention to any
        const uint32_t last = radix_select_weighted(ranks, k, least, most, wanted, share, state);
        const auto needed = [&](int64_t j) { return wanted > 0 && ranks[j] >= last ? size(int(j)) : 0; };
        const uint32_t tokens = block_scan(k, needed, [](int64_t, uint32_t) {});
        budget = uint32_t(min(max(int64_t(tokens), c.least), c.most));
    }
    if (threadIdx.x == 0) listed[unit] = budget;
    const uint32_t rank = radix_select_weighted(ranks, k, least, most, budget, size, state);
    gather_best(
        ranks, k, rank, budget, begins, 0, int(budget), state.sums, places_of_block,
        [&](int j, uint32_t count) { left[j] = size(j) - count; },
        [&](int place, int at, int) { chosen[place] = order[at]; });
}
