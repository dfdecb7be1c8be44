// FlashAssign with the tensor cores of Ampere and later: f16 and bf16, any number of columns. f32 comes as the first
// halves of its values (split.cu), with an error bound of each row more.
//
// Rows whose label `error_bound` (tensor.cuh) does not prove go on a list for recheck.cu.
#include "assign/recheck.cuh"

constexpr int RESIDENT = 384 / BLOCK;  // blocks of an SM, so far as registers go

/// Searches one tile of rows; returns the squares of row threadIdx.x.
template <class T>
__device__ __forceinline__ float search_tile(const Shared& s, RowResult (&found)[SLOTS], const T* x, const Rows& r,
                                             int64_t b, int64_t first_row, const ScoredCentroids<T>& c) {
    const T* rows = row_of(x, r, b, first_row);
    const int live_rows = int(min(int64_t(SM80_ROWS), r.n - first_row)), tiles = (c.k + CENTROIDS - 1) / CENTROIDS;
    return sweep<true, false>(
        s, [&](int i) { return i < live_rows ? rows + i * r.row_stride : nullptr; }, c, int(r.d), 0, tiles,
        int(threadIdx.x) / WARP * WARP_ROWS < live_rows,
        [&](const Scores& acc, int column) {
#pragma unroll
            for (int j = 0; j < EIGHTS; j += PLACES / 2) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    float v[PLACES];
#pragma unroll
                    for (int p = 0; p < PLACES; ++p) v[p] = acc[i / 2][j + p / 2][i % 2 * 2 + p % 2];
                    found[i].add(v, column + 8 * j);
                }
            }
        });
}

/// Turns what a warp found into labels and list entries.
template <class T>
__device__ __forceinline__ void write_labels(RowResult (&found)[SLOTS], float squares, const Rows& r, int64_t at,
                                             int64_t b, int64_t first_row, const ScoredCentroids<T>& c,
                                             const float* row_error, uint32_t* labels, UnprovenRow* list,
                                             uint32_t* listed) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quad = lane % 4;
    const auto [top, second, column] = winner_of_quad(found);
    const int row_of_warp = 8 * quad + lane / 4;
    const float row_squares = __shfl_sync(~0u, squares, row_of_warp);
    const int64_t row = first_row + warp * WARP_ROWS + row_of_warp;
    if (row >= r.n) return;
    const int label = label_of(top, column, c.k);
    labels[b * r.n + row] = label;
    float error = error_bound(row_squares, r.d, *c.bounds) + (row_error ? __ldg(&row_error[at * r.n + row]) : 0);
    const bool far = beyond(error, c.own ? c.own + label : nullptr, row_squares, r.d, *c.bounds);
    if (!(top - second > error && !far) && !nowhere(top, row_squares, *c.bounds)) {
        list[at * r.n + atomicAdd(&listed[at], 1)] = {uint32_t(row), top - error};
    }
}

/// A block to each tile of rows. `row_error` adds to the error bound of each row, by its place in (b, n); null for
/// nothing. With it, rows lie as the scratch they are.
template <class T>
__device__ __forceinline__ void assign_sm80(const T* x, const Rows& r, const Active& active, const T* moved,
                                            const float* start, const float* scale, const float* own,
                                            const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded,
                                            int64_t copies, uint32_t* labels, UnprovenRow* list, uint32_t* listed,
                                            const float* row_error) {
    extern __shared__ __align__(128) uint8_t raw[];
    const Shared s(raw, 0);
    const int64_t tiles = (r.n + SM80_ROWS - 1) / SM80_ROWS, all = active.problems(r.b) * tiles;
    for (int64_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
        RowResult found[SLOTS];
        const auto problem = [&] {
            return ScoredCentroids<T>(moved, start, scale, own, bounds, k, pitch, padded, copies, tile / tiles);
        };
        const int64_t from = row_error ? tile / tiles : active.problem(tile / tiles);
        const float squares = search_tile(s, found, x, r, from, tile % tiles * SM80_ROWS, problem());
        // The values that follow from `tile` are worked out again: it would take registers from the sweep.
        asm volatile("" : "+l"(tile));
        write_labels(found, squares, r, tile / tiles, active.problem(tile / tiles), tile % tiles * SM80_ROWS, problem(),
                     row_error, labels, list, listed);
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) assign_sm80_##name(                                  \
        const T* x, Rows r, Active active, const T* moved, const float* start, const float* scale, const float* own,   \
        const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded, int64_t copies, uint32_t* labels,              \
        UnprovenRow* list, uint32_t* listed, const float* row_error) {                                                 \
        assign_sm80(x, r, active, moved, start, scale, own, bounds, k, pitch, padded, copies, labels, list, listed,    \
                    row_error);                                                                                        \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE

/// A block that decides what it does not prove at once, for problems too small to pay for another launch.
template <class T>
__device__ __forceinline__ void assign_small(const T* x, Rows r, Active active, const T* centroids, Rows cr,
                                             const T* moved, const float* start, const float* scale, const float* own,
                                             const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded,
                                             int64_t copies, int metric, uint32_t* labels) {
    extern __shared__ __align__(128) uint8_t raw[];
    __shared__ UnprovenRow list[SM80_ROWS];
    __shared__ uint32_t listed;
    const Shared s(raw, RECHECK_STATE_BYTES);
    const RecheckState state(s.added);
    const int64_t tiles = (r.n + SM80_ROWS - 1) / SM80_ROWS, all = active.problems(r.b) * tiles;
    for (int64_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
        const uint32_t b = active.problem(tile / tiles);
        const int64_t first_row = tile % tiles * SM80_ROWS;
        const ScoredCentroids<T> c(moved, start, scale, own, bounds, k, pitch, padded, copies, tile / tiles);
        __syncthreads();  // the last tile's list is read
        if (threadIdx.x == 0) listed = 0;
        RowResult found[SLOTS];
        const float squares = search_tile(s, found, x, r, b, first_row, c);
        __syncthreads();
        write_labels(found, squares, r, 0, b, first_row, c, nullptr, labels, list, &listed);
        __syncthreads();
        if (listed == 0) continue;
        recheck_tile<false>(s, state, x, r, Originals<T>{x, centroids, r, cr, b}, b, c, nullptr, FirstPass{}, metric,
                            labels + int64_t(b) * r.n, list, int(listed), 0, int((k + CENTROIDS - 1) / CENTROIDS));
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, RECHECK_RESIDENT)                                              \
        assign_small_##name(const T* x, Rows r, Active active, const T* centroids, Rows cr, const T* moved,            \
                            const float* start, const float* scale, const float* own, const Bounds* bounds, int64_t k, \
                            int64_t pitch, int64_t padded, int64_t copies, int metric, uint32_t* labels) {             \
        assign_small(x, r, active, centroids, cr, moved, start, scale, own, bounds, k, pitch, padded, copies, metric,  \
                     labels);                                                                                          \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE

/// One product step, for a test of what `error_bound` assumes of the hardware: out[i] = start[i] + a[i].b[i] over 16
/// columns.
template <class T>
__device__ __forceinline__ void probe(const float* start, const T* a, const T* b, int64_t count, float* out) {
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < count; i += all_threads() / WARP) {
        float acc[4] = {};
        uint32_t row[4] = {}, column[2] = {};
        if (lane == 0) acc[0] = start[i];
        if (lane < 4) {
            const uint32_t *as = reinterpret_cast<const uint32_t*>(a + i * 16),
                           *bs = reinterpret_cast<const uint32_t*>(b + i * 16);
            row[0] = as[lane], row[2] = as[4 + lane], column[0] = bs[lane], column[1] = bs[4 + lane];
        }
        mma(acc, row, column[0], column[1], T());
        if (lane == 0) out[i] = acc[0];
    }
}

#define PROBE(name, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        probe_sm80_##name(const float* start, const T* a, const T* b, int64_t count, float* out) {                     \
        probe(start, a, b, count, out);                                                                                \
    }
PROBE(f16, __half)
PROBE(bf16, __nv_bfloat16)
#undef PROBE
