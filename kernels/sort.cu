// Stable counting sort of labels: the order of the rows by cluster, and where each cluster begins.
//
// Labels are below k, so there is nothing to compare: count, scan, place. Rows are cut into chunks. `count` fills
// counts[chunk][bin], `scan` turns them into the number of rows of that bin in earlier chunks and finds where bins begin,
// and `scatter` walks each chunk again and writes its rows to their places. Rows are ranked by warps, each with counters
// of its own in shared memory, and warps are ranked by their order, so the result depends on no schedule. More clusters
// than counters fit are sorted digit by digit, lowest first. Traffic: labels twice, the order once; counts are few.
#include "common.cuh"

/// What is sorted by: the bits `mask` of a label from `shift` on, below `bins`. `before` (null: none) is the order by the
/// lower digits.
struct Digit {
    const uint32_t *labels, *before;
    int64_t n, k, bins;
    uint32_t shift, mask;

    /// The row at place `i` of problem `p`.
    __device__ __forceinline__ uint32_t row(int64_t p, int64_t i) const { return before ? before[p * n + i] : i; }
    /// A label out of range counts as the last one.
    __device__ __forceinline__ uint32_t bin(int64_t p, uint32_t row) const {
        return min(labels[p * n + row], uint32_t(k - 1)) >> shift & mask;
    }
};

/// Each block counts the bins of one chunk of `rows` rows. An iteration begins here: no problem is known to outlast it.
__device__ void count(const Digit& digit, const Active& active, int64_t b, int64_t rows, uint32_t* counts,
                      uint32_t* next_active) {
    extern __shared__ uint32_t histogram[];
    if (next_active && global_thread() == 0) *next_active = 0;
    const int64_t chunks = (digit.n + rows - 1) / rows, tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), chunk = tile % chunks;
        const int64_t begin = chunk * rows, end = min(begin + rows, digit.n);
        for (int64_t j = threadIdx.x; j < digit.bins; j += blockDim.x) histogram[j] = 0;
        __syncthreads();
#pragma unroll 4
        for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            atomicAdd(&histogram[digit.bin(p, digit.row(p, i))], 1);
        }
        __syncthreads();
        uint32_t* const out = counts + (p * chunks + chunk) * digit.bins;
        for (int64_t j = threadIdx.x; j < digit.bins; j += blockDim.x) out[j] = histogram[j];
        __syncthreads();
    }
}

__device__ __forceinline__ uint32_t warp_scan(uint32_t v) {
    const int lane = threadIdx.x % WARP;
    for (int step = 1; step < WARP; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, v, step);
        if (lane >= step) v += before;
    }
    return v;
}

static_assert(SCAN_THREADS == WARP * WARP, "one warp scans what all warps found");

/// Writes the exclusive scan of `n` totals, and their sum after it, with one block.
__device__ void block_scan(const uint32_t* totals, int64_t n, uint32_t* out) {
    __shared__ uint32_t of_warps[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t carry = 0;
    for (int64_t base = 0; base < n; base += SCAN_THREADS) {
        const int64_t i = base + threadIdx.x;
        const uint32_t own = i < n ? __ldcg(&totals[i]) : 0, within = warp_scan(own);
        if (lane == WARP - 1) of_warps[warp] = within;
        __syncthreads();
        if (warp == 0) of_warps[lane] = warp_scan(of_warps[lane]);
        __syncthreads();
        if (i < n) out[i] = carry + (warp ? of_warps[warp - 1] : 0) + within - own;
        carry += of_warps[WARP - 1];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[n] = carry;
}

/// Each block takes 32 bins of one problem, each of its warps a part of the chunks. The last block of a problem to finish
/// scans the totals of its bins. `arrived` starts as zeros and is left so.
__device__ void scan(uint32_t* counts, const Active& active, int64_t b, int64_t chunks, int64_t bins,
                     uint32_t* totals, uint32_t* arrived, uint32_t* begins) {
    __shared__ uint32_t parts[WARP][WARP + 1];
    __shared__ bool last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t groups = (bins + WARP - 1) / WARP, each = (chunks + WARP - 1) / WARP;
    const int64_t tiles = active.problems(b) * groups;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / groups), bin = tile % groups * WARP + lane;
        const int64_t begin = min(warp * each, chunks), end = bin < bins ? min(begin + each, chunks) : begin;
        uint32_t* column = counts + p * chunks * bins + bin;
        uint32_t sum = 0;
#pragma unroll 8
        for (int64_t c = begin; c < end; ++c) sum += column[c * bins];
        parts[warp][lane] = sum;
        __syncthreads();
        sum = 0;
        for (int w = 0; w < warp; ++w) sum += parts[w][lane];
#pragma unroll 8
        for (int64_t c = begin; c < end; ++c) {
            const uint32_t own = column[c * bins];
            column[c * bins] = sum;
            sum += own;
        }
        if (warp == WARP - 1 && bin < bins) totals[p * bins + bin] = sum;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(&arrived[p], 1) + 1 == groups;
        __syncthreads();
        if (last) {
            __threadfence();
            block_scan(totals + p * bins, bins, begins + p * (bins + 1));
            if (threadIdx.x == 0) arrived[p] = 0;
        }
        __syncthreads();
    }
}

/// Each block walks one chunk, SORT_ITEMS rows a thread at a time. Shared memory holds, for each bin, the place of its
/// next row; and for each warp, and for all, how many rows of the bin the warps before it have.
__device__ void scatter(const Digit& digit, const Active& active, int64_t b, int64_t rows, const uint32_t* counts,
                        const uint32_t* begins, uint32_t* order) {
    extern __shared__ uint32_t next[];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int64_t bins = digit.bins, chunks = (digit.n + rows - 1) / rows;
    uint16_t* const seen = reinterpret_cast<uint16_t*>(next + bins);
    uint16_t* const own = seen + warp * bins;
    const int64_t tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), chunk = tile % chunks;
        const int64_t begin = chunk * rows, end = min(begin + rows, digit.n);
        for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) {
            next[j] = begins[p * (bins + 1) + j] + counts[(p * chunks + chunk) * bins + j];
        }
        for (int64_t base = begin; base < end; base += blockDim.x * SORT_ITEMS) {
            for (int64_t j = lane; j < bins; j += WARP) own[j] = 0;
            const int64_t first = base + warp * (WARP * SORT_ITEMS) + lane;
            uint32_t row[SORT_ITEMS], bin[SORT_ITEMS], rank[SORT_ITEMS];
#pragma unroll
            for (int i = 0; i < SORT_ITEMS; ++i) {
                const int64_t at = first + i * WARP;
                row[i] = at < end ? digit.row(p, at) : 0;
            }
#pragma unroll
            for (int i = 0; i < SORT_ITEMS; ++i) {
                bin[i] = first + i * WARP < end ? digit.bin(p, row[i]) : UINT32_MAX;
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < SORT_ITEMS; ++i) {
                const bool live = bin[i] != UINT32_MAX;
                const uint32_t peers = __match_any_sync(~0u, bin[i]), lower = peers & ((1u << lane) - 1);
                rank[i] = (live ? own[bin[i]] : 0) + __popc(lower);
                __syncwarp();
                if (live && lower == 0) own[bin[i]] = rank[i] + __popc(peers);
                __syncwarp();
            }
            __syncthreads();
            for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) {
                uint32_t before = 0;
                for (int w = 0; w < warps; ++w) {
                    const uint32_t has = seen[w * bins + j];
                    seen[w * bins + j] = before;
                    before += has;
                }
                seen[warps * bins + j] = before;
            }
            __syncthreads();
#pragma unroll
            for (int i = 0; i < SORT_ITEMS; ++i) {
                if (bin[i] != UINT32_MAX) order[p * digit.n + next[bin[i]] + own[bin[i]] + rank[i]] = row[i];
            }
            __syncthreads();
            for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) next[j] += seen[warps * bins + j];
        }
        __syncthreads();
    }
}

/// Where clusters begin in an order by several digits: at the places where the label changes.
__device__ void boundaries(const uint32_t* labels, const Active& active, int64_t b, int64_t n, int64_t k,
                           const uint32_t* order, uint32_t* offsets) {
    const int64_t all = active.problems(b) * (n + 1);
    for (int64_t i = global_thread(); i < all; i += all_threads()) {
        const int64_t p = active.problem(i / (n + 1)), place = i % (n + 1);
        const auto label = [&](int64_t at) {
            return at < 0 ? int64_t(-1) : at < n ? min(int64_t(labels[p * n + order[p * n + at]]), k - 1) : k;
        };
        const int64_t here = label(place);
        for (int64_t j = label(place - 1) + 1; j <= here; ++j) offsets[p * (k + 1) + j] = place;
    }
}

extern "C" __global__ void order_count(Digit digit, Active active, int64_t b, int64_t rows, uint32_t* counts,
                                       uint32_t* next_active) {
    count(digit, active, b, rows, counts, next_active);
}
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1)
    order_scan(uint32_t* counts, Active active, int64_t b, int64_t chunks, int64_t bins, uint32_t* totals,
               uint32_t* arrived, uint32_t* begins) {
    scan(counts, active, b, chunks, bins, totals, arrived, begins);
}
extern "C" __global__ void __launch_bounds__(WARP* SORT_WARPS)
    order_scatter(Digit digit, Active active, int64_t b, int64_t rows, const uint32_t* counts,
                  const uint32_t* begins, uint32_t* order) {
    scatter(digit, active, b, rows, counts, begins, order);
}
extern "C" __global__ void order_boundaries(const uint32_t* labels, Active active, int64_t b, int64_t n, int64_t k,
                                            const uint32_t* order, uint32_t* offsets) {
    boundaries(labels, active, b, n, k, order, offsets);
}
