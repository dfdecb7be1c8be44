// Stable counting sort of labels: the order of the rows by cluster, and where each cluster begins.
//
// Labels are below k, so there is nothing to sort: count, scan, place. Rows are cut into chunks; counts[cluster][chunk]
// is filled by a histogram, its exclusive scan in memory order is the place of each chunk's first row of each cluster,
// and one warp a chunk walks its labels in order and places them. Stability comes from the walk and from ranks inside a
// warp, so the result depends on no schedule. Traffic: labels twice, the order once, counts four times (k * chunks <= n
// of them). A label of k or more is left out; the tail of the order keeps its zeros.
#include "common.cuh"

__device__ void histogram(const uint32_t* labels, int64_t b, int64_t n, int64_t k, int64_t rows, uint32_t* counts) {
    const int64_t chunks = (n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < b * chunks; tile += gridDim.x) {
        const int64_t p = tile / chunks, chunk = tile % chunks, end = min((chunk + 1) * rows, n);
        for (int64_t i = chunk * rows + threadIdx.x; i < end; i += blockDim.x) {
            const uint32_t label = labels[p * n + i];
            if (label < k) atomicAdd(&counts[(p * k + label) * chunks + chunk], 1);
        }
    }
}

/// Scans `[begin, end)` in place, exclusively, with one block; returns the total to every thread.
__device__ uint32_t block_scan(uint32_t* data, int64_t begin, int64_t end) {
    __shared__ uint32_t warp_totals[SCAN_THREADS / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const auto warp_scan = [&](uint32_t v) {
        for (int step = 1; step < WARP; step *= 2) {
            const uint32_t before = __shfl_up_sync(~0u, v, step);
            if (lane >= step) v += before;
        }
        return v;
    };
    uint32_t carry = 0;
    for (int64_t base = begin; base < end; base += SCAN_THREADS) {
        const int64_t i = base + threadIdx.x;
        const uint32_t own = i < end ? data[i] : 0, within = warp_scan(own);
        if (lane == WARP - 1) warp_totals[warp] = within;
        __syncthreads();
        if (warp == 0) warp_totals[lane] = warp_scan(warp_totals[lane]);
        __syncthreads();
        if (i < end) data[i] = carry + (warp ? warp_totals[warp - 1] : 0) + within - own;
        carry += warp_totals[SCAN_THREADS / WARP - 1];
        __syncthreads();
    }
    return carry;
}
static_assert(SCAN_THREADS / WARP == WARP, "one warp scans the totals of all");

/// Each block scans `span` of a problem's `cells` counts; their totals are scanned by `scan_totals`.
__device__ void scan_spans(uint32_t* counts, int64_t b, int64_t cells, int64_t span, uint32_t* totals) {
    const int64_t spans = (cells + span - 1) / span;
    for (int64_t tile = blockIdx.x; tile < b * spans; tile += gridDim.x) {
        const int64_t begin = tile % spans * span;
        const uint32_t total = block_scan(counts + tile / spans * cells, begin, min(begin + span, cells));
        if (threadIdx.x == 0) totals[tile] = total;
    }
}

__device__ void scan_totals(uint32_t* totals, int64_t b, int64_t spans, int64_t k, uint32_t* offsets) {
    for (int64_t p = blockIdx.x; p < b; p += gridDim.x) {
        const uint32_t total = block_scan(totals + p * spans, 0, spans);
        if (threadIdx.x == 0) offsets[p * (k + 1) + k] = total;
    }
}

/// Where each cluster begins: the place of its first chunk, read before `scatter` moves it on.
__device__ void begin_clusters(const uint32_t* counts, const uint32_t* totals, int64_t b, int64_t k, int64_t chunks,
                               int64_t span, uint32_t* offsets) {
    const int64_t cells = k * chunks, spans = (cells + span - 1) / span;
    for (int64_t i = global_thread(); i < b * k; i += all_threads()) {
        const int64_t p = i / k, cell = i % k * chunks;
        offsets[p * (k + 1) + i % k] = counts[p * cells + cell] + totals[p * spans + cell / span];
    }
}

/// One warp a chunk, 32 labels a step: lanes with equal labels take consecutive places, the first of them the counter.
__device__ void scatter(const uint32_t* labels, int64_t b, int64_t n, int64_t k, int64_t rows, int64_t span,
                        uint32_t* counts, const uint32_t* totals, uint32_t* order) {
    const int lane = threadIdx.x % WARP;
    const int64_t chunks = (n + rows - 1) / rows, cells = k * chunks, spans = (cells + span - 1) / span;
    for (int64_t tile = global_thread() / WARP; tile < b * chunks; tile += all_threads() / WARP) {
        const int64_t p = tile / chunks, chunk = tile % chunks, end = min((chunk + 1) * rows, n);
        for (int64_t base = chunk * rows; base < end; base += WARP) {
            const int64_t i = base + lane;
            uint32_t label = i < end ? labels[p * n + i] : UINT32_MAX;
            if (label >= k) label = UINT32_MAX;  // k is at most UINT32_MAX
            const uint32_t peers = __match_any_sync(~0u, label);
            const int first = __ffs(peers) - 1, rank = __popc(peers & ((1u << lane) - 1));
            uint32_t place = 0;
            if (label != UINT32_MAX && lane == first) {
                const int64_t cell = label * chunks + chunk;
                place = atomicAdd(&counts[p * cells + cell], __popc(peers)) + totals[p * spans + cell / span];
            }
            place = __shfl_sync(~0u, place, first) + rank;
            if (label != UINT32_MAX) order[p * n + place] = i;
            __syncwarp();  // the next step's counters follow this one's
        }
    }
}

extern "C" __global__ void order_histogram(const uint32_t* labels, int64_t b, int64_t n, int64_t k, int64_t rows,
                                           uint32_t* counts) {
    histogram(labels, b, n, k, rows, counts);
}
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1)
    order_scan_spans(uint32_t* counts, int64_t b, int64_t cells, int64_t span, uint32_t* totals) {
    scan_spans(counts, b, cells, span, totals);
}
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1)
    order_scan_totals(uint32_t* totals, int64_t b, int64_t spans, int64_t k, uint32_t* offsets) {
    scan_totals(totals, b, spans, k, offsets);
}
extern "C" __global__ void order_begin(const uint32_t* counts, const uint32_t* totals, int64_t b, int64_t k,
                                       int64_t chunks, int64_t span, uint32_t* offsets) {
    begin_clusters(counts, totals, b, k, chunks, span, offsets);
}
extern "C" __global__ void order_scatter(const uint32_t* labels, int64_t b, int64_t n, int64_t k, int64_t rows,
                                         int64_t span, uint32_t* counts, const uint32_t* totals, uint32_t* order) {
    scatter(labels, b, n, k, rows, span, counts, totals, order);
}
