// Counting sort of labels: the order of the rows by cluster, and where each cluster begins.
//
// Labels are below k, so there is nothing to compare: count, scan, place. Rows are cut into chunks. `count` fills
// counts[chunk][bin], `scan` turns them into the number of rows of that bin in earlier chunks and finds where bins
// begin, and a last kernel walks each chunk again and writes its rows to their places. Traffic: labels twice, the order
// once; counts are few.
//
// The sums of an update do not depend on the order of a cluster's rows, so in a fit atomic counters in shared memory
// deal out the places (`deal`, and `whole` where a block can do all of a problem). `scatter` keeps rows in ascending
// order, for those who read the order itself and for more clusters than a block has counters: these are sorted digit by
// digit, lowest first. There rows are ranked by warps, each with counters of its own, and warps are ranked by their
// order.
#include "scan.cuh"

/// The bins of a thread's rows of a tile of `size` places, of which it has every `blockDim.x`th. What lies beyond the
/// tile is in a bin of its own, the last one. `before` (null: none) and else `labels` are those of the tile.
template <int ITEMS>
__device__ __forceinline__ void load_bins(const Digit& digit, const uint32_t* labels, const uint32_t* before,
                                          uint32_t size, uint32_t (&bins)[ITEMS]) {
    if (before) {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) bins[i] = before[min(i * blockDim.x + threadIdx.x, size - 1)];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) bins[i] = labels[bins[i]];
    } else {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) bins[i] = labels[min(i * blockDim.x + threadIdx.x, size - 1)];
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        bins[i] = i * blockDim.x + threadIdx.x < size ? digit.bin(bins[i]) : uint32_t(digit.bins);
    }
}

/// Each block counts the bins of one chunk of `rows` rows. An iteration begins here: no problem is known to outlast it.
__device__ void count(const Digit& digit, const Active& active, int64_t b, int64_t rows, uint32_t* counts,
                      uint32_t* next_active) {
    extern __shared__ uint32_t histogram[];
    if (next_active && global_thread() == 0) *next_active = 0;
    const int64_t chunks = (digit.n + rows - 1) / rows, tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), chunk = tile % chunks;
        const int64_t begin = chunk * rows, end = min(begin + rows, digit.n);
        for (int64_t j = threadIdx.x; j <= digit.bins; j += blockDim.x) histogram[j] = 0;
        __syncthreads();
        for (int64_t tile = begin; tile < end; tile += blockDim.x * SORT_ITEMS) {
            uint32_t bins[SORT_ITEMS];
            const uint32_t* const labels = digit.labels + p * digit.n;
            const uint32_t* const before = digit.before ? digit.before + p * digit.n + tile : nullptr;
            const uint32_t size = min(end - tile, int64_t(blockDim.x * SORT_ITEMS));
            load_bins(digit, before ? labels : labels + tile, before, size, bins);
#pragma unroll
            for (int i = 0; i < SORT_ITEMS; ++i) atomicAdd(&histogram[bins[i]], 1);
        }
        __syncthreads();
        uint32_t* const out = counts + (p * chunks + chunk) * digit.bins;
        for (int64_t j = threadIdx.x; j < digit.bins; j += blockDim.x) out[j] = histogram[j];
        __syncthreads();
    }
}

/// Each block takes 32 bins of one problem, each of its warps a part of the chunks. The last block of a problem to
/// finish scans the totals of its bins. `arrived` starts as zeros and is left so.
__device__ void scan(uint32_t* counts, const Active& active, int64_t b, int64_t chunks, int64_t bins, uint32_t* totals,
                     uint32_t* arrived, uint32_t* begins) {
    __shared__ uint32_t parts[WARP][WARP + 1];
    __shared__ bool last;
    static_assert(SCAN_THREADS <= WARP * WARP, "a row of `parts` for each warp");
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int64_t groups = (bins + WARP - 1) / WARP, each = (chunks + warps - 1) / warps;
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
        if (warp == warps - 1 && bin < bins) totals[p * bins + bin] = sum;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(&arrived[p], 1) + 1 == groups;
        __syncthreads();
        if (last) {
            __threadfence();
            uint32_t* const out = begins + p * (bins + 1);
            const uint32_t all = block_scan(
                bins, [&](int64_t i) { return __ldcg(&totals[p * bins + i]); },
                [&](int64_t i, uint32_t before) { out[i] = before; });
            if (threadIdx.x == 0) out[bins] = all, arrived[p] = 0;
        }
        __syncthreads();
    }
}

/// The counters of a block that places rows: for each bin, the place of its next row; and for each warp, and for all,
/// how many rows of the bin the warps before it have.
struct Counters {
    uint32_t* next;
    uint16_t *seen, *own;
    int warps;

    __device__ Counters(uint32_t* shared, int64_t bins)
        : next(shared),
          seen(reinterpret_cast<uint16_t*>(shared + bins)),
          own(seen + threadIdx.x / WARP * bins),
          warps(blockDim.x / WARP) {}
};

static_assert(SORT_BINS <= 1 << 16 && WARP * SORT_ITEMS < 1 << 15 && WARP * SORT_WARPS * SORT_ITEMS < 1 << 16,
              "counts and ranks fit their bits");

/// Writes the rows at places `[begin, end)` of problem `p` where `next` says, in their order, SORT_ITEMS rows a thread
/// at a time, by one block.
__device__ void place(const Digit& digit, const Counters& to, int64_t p, int64_t begin, int64_t end, uint32_t* order) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t bins = digit.bins;
    for (int64_t base = begin; base < end; base += blockDim.x * SORT_ITEMS) {
        for (int64_t j = lane; j < bins; j += WARP) to.own[j] = 0;
        const int64_t first = base + warp * (WARP * SORT_ITEMS) + lane;
        uint32_t found[SORT_ITEMS];  // a row's bin, and from bit 16 on its rank in the warp's share of that
#pragma unroll
        for (int i = 0; i < SORT_ITEMS; ++i) {
            const int64_t at = first + i * WARP;
            found[i] = at < end ? digit.bin(digit.labels[p * digit.n + digit.row(p, at)]) : UINT32_MAX;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < SORT_ITEMS; ++i) {
            const bool live = found[i] != UINT32_MAX;
            const uint32_t peers = __match_any_sync(~0u, found[i]), lower = peers & ((1u << lane) - 1);
            uint16_t* const has = to.own + (live ? found[i] : 0);
            const uint32_t rank = *has + __popc(lower);
            __syncwarp();
            if (live && lower == 0) *has = rank + __popc(peers);
            if (live) found[i] |= rank << 16;
            __syncwarp();
        }
        __syncthreads();
        for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) {
            uint32_t before = 0;
            for (int w = 0; w < to.warps; ++w) {
                const uint32_t has = to.seen[w * bins + j];
                to.seen[w * bins + j] = before;
                before += has;
            }
            to.seen[to.warps * bins + j] = before;
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < SORT_ITEMS; ++i) {
            const uint32_t bin = found[i] & 0xffff;
            if (found[i] == UINT32_MAX) continue;
            order[p * digit.n + to.next[bin] + to.own[bin] + (found[i] >> 16)] = digit.row(p, first + i * WARP);
        }
        __syncthreads();
        for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) to.next[j] += to.seen[to.warps * bins + j];
    }
    __syncthreads();
}

/// Each block places the rows of one chunk.
__device__ void scatter(const Digit& digit, const Active& active, int64_t b, int64_t rows, const uint32_t* counts,
                        const uint32_t* begins, uint32_t* order) {
    extern __shared__ uint32_t counters[];
    const Counters to(counters, digit.bins);
    const int64_t bins = digit.bins, chunks = (digit.n + rows - 1) / rows, tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), chunk = tile % chunks;
        for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) {
            to.next[j] = begins[p * (bins + 1) + j] + counts[(p * chunks + chunk) * bins + j];
        }
        place(digit, to, p, chunk * rows, min((chunk + 1) * rows, digit.n), order);
    }
}

/// A tile of rows that a block sorts in shared memory. Its rows come out in no particular order within a bin.
template <int ITEMS>
struct Tile {
    uint32_t* starts;  // (bins + 1): where bins begin in it
    uint32_t* sorted;  // bin, and in the lower 16 bits the row, counted from the begin of the tile

    __device__ __forceinline__ void sort(const Digit& digit, const uint32_t* labels, uint32_t size) const {
        const uint32_t bins = digit.bins;
        uint32_t found[ITEMS];  // a row's bin, and from bit 16 on its rank in that
        load_bins(digit, labels, nullptr, size, found);
        for (uint32_t j = threadIdx.x; j <= bins; j += blockDim.x) starts[j] = 0;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            if (i * blockDim.x < size) found[i] |= atomicAdd(&starts[found[i]], 1) << 16;
        }
        __syncthreads();
        block_scan(
            bins + 1, [&](int64_t i) { return starts[i]; }, [&](int64_t i, uint32_t before) { starts[i] = before; });
        __syncthreads();
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const uint32_t bin = found[i] & 0xffff, row = i * blockDim.x + threadIdx.x;
            if (row < size) sorted[starts[bin] + (found[i] >> 16)] = bin << 16 | row;
        }
        __syncthreads();
    }
};

static_assert(SORT_BINS < 1 << 16 && SORT_WHOLE * SORT_ITEMS_MANY <= 1 << 16,
              "bins, ranks and rows of a tile fit 16 bits");

/// Each block places the rows of one chunk, in any order. A tile is sorted on chip so that the rows of a bin, which go
/// to places in a row, are written together.
template <int ITEMS>
__device__ void deal(const Digit& digit, const Active& active, int64_t b, int64_t rows, const uint32_t* counts,
                     const uint32_t* begins, uint32_t* order) {
    extern __shared__ uint32_t shared[];
    const int64_t bins = digit.bins, chunks = (digit.n + rows - 1) / rows, tiles = active.problems(b) * chunks;
    uint32_t* const next = shared;
    const Tile<ITEMS> tile = {next + bins, next + 2 * bins + 1};
    for (int64_t at = blockIdx.x; at < tiles; at += gridDim.x) {
        const int64_t p = active.problem(at / chunks), chunk = at % chunks;
        for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) {
            next[j] = begins[p * (bins + 1) + j] + counts[(p * chunks + chunk) * bins + j];
        }
        const int64_t last = min((chunk + 1) * rows, digit.n);
        for (int64_t begin = chunk * rows, end; begin < last; begin = end) {
            end = min(begin + blockDim.x * ITEMS, last);
            tile.sort(digit, digit.labels + p * digit.n + begin, end - begin);
            for (int64_t i = threadIdx.x; i < end - begin; i += blockDim.x) {
                const uint32_t bin = tile.sorted[i] >> 16;
                order[p * digit.n + next[bin] + (i - tile.starts[bin])] = begin + (tile.sorted[i] & 0xffff);
            }
            __syncthreads();
            for (int64_t j = threadIdx.x; j < bins; j += blockDim.x) next[j] += tile.starts[j + 1] - tile.starts[j];
            __syncthreads();
        }
    }
}

/// Each block sorts one problem, which is one tile.
__device__ void whole(const Digit& digit, const Active& active, int64_t b, uint32_t* next_active, uint32_t* begins,
                      uint32_t* order) {
    extern __shared__ uint32_t shared[];
    const Tile<SORT_ITEMS> tile = {shared, shared + digit.bins + 1};
    if (next_active && global_thread() == 0) *next_active = 0;
    const int64_t bins = digit.bins, n = digit.n, problems = active.problems(b);
    for (int64_t at = blockIdx.x; at < problems; at += gridDim.x) {
        const int64_t p = active.problem(at);
        tile.sort(digit, digit.labels + p * n, n);
        for (int64_t j = threadIdx.x; j <= bins; j += blockDim.x) begins[p * (bins + 1) + j] = tile.starts[j];
        for (int64_t i = threadIdx.x; i < n; i += blockDim.x) order[p * n + i] = tile.sorted[i] & 0xffff;
        __syncthreads();
    }
}

/// The offsets of clusters in an order by several digits: the places where the label changes.
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

extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    order_count(Digit digit, Active active, int64_t b, int64_t rows, uint32_t* counts, uint32_t* next_active) {
    count(digit, active, b, rows, counts, next_active);
}
extern "C" __global__ void __launch_bounds__(SCAN_THREADS, 1)
    order_scan(uint32_t* counts, Active active, int64_t b, int64_t chunks, int64_t bins, uint32_t* totals,
               uint32_t* arrived, uint32_t* begins) {
    scan(counts, active, b, chunks, bins, totals, arrived, begins);
}
extern "C" __global__ void __launch_bounds__(WARP* SORT_WARPS, 2)
    order_scatter(Digit digit, Active active, int64_t b, int64_t rows, const uint32_t* counts, const uint32_t* begins,
                  uint32_t* order) {
    scatter(digit, active, b, rows, counts, begins, order);
}
extern "C" __global__ void __launch_bounds__(SORT_WHOLE)
    order_deal(Digit digit, Active active, int64_t b, int64_t rows, const uint32_t* counts, const uint32_t* begins,
               uint32_t* order) {
    deal<SORT_ITEMS>(digit, active, b, rows, counts, begins, order);
}
extern "C" __global__ void __launch_bounds__(SORT_WHOLE)
    order_deal_many(Digit digit, Active active, int64_t b, int64_t rows, const uint32_t* counts, const uint32_t* begins,
                    uint32_t* order) {
    deal<SORT_ITEMS_MANY>(digit, active, b, rows, counts, begins, order);
}
extern "C" __global__ void __launch_bounds__(SORT_WHOLE)
    order_whole(Digit digit, Active active, int64_t b, uint32_t* next_active, uint32_t* begins, uint32_t* order) {
    whole(digit, active, b, next_active, begins, order);
}
extern "C" __global__ void order_boundaries(const uint32_t* labels, Active active, int64_t b, int64_t n, int64_t k,
                                            const uint32_t* order, uint32_t* offsets) {
    boundaries(labels, active, b, n, k, order, offsets);
}
