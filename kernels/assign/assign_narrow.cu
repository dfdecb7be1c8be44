// FlashAssign for rows of at most 8 columns.
//
// A problem's centroids fit in shared memory, so a block prepares them for itself: moved by their mean, with |c|^2 / 2,
// and without those that repeat an earlier one. Squared Euclidean, f16, bf16 and f32: a product of 16 columns on the
// tensor cores scores both halves of a row and of a centroid (narrow_tensor.cuh), until a tile leaves too many rows
// unproven. Otherwise a thread keeps NARROW_ROWS rows in registers while centroids stream past, and remembers the best
// of each group of eight, the group it was in, and the second best of all groups: D + 1 operations a score and 5 a
// group. The winning group is scored once more for the winner's place in it. Rows whose label the bound of argmin.cuh
// does not prove are decided at once by their warp: centroids whose score is within the bound are compared by the f64
// definition.
//
// Traffic: X once, the centroids once a block, the labels once. No scratch.
#include "assign/narrow_tensor.cuh"

/// A block takes neighbouring tiles of NARROW_TILE rows, and prepares the centroids of each problem they are of.
template <class T, int D, bool DIFFERENCES>
__device__ void assign_by(const T* x, const Rows& r, const Active& active, const T* c, const Rows& cr, int metric,
                          int64_t fragment_bytes, uint32_t* labels) {
    extern __shared__ __align__(16) uint8_t raw[];
    constexpr bool TENSOR = scored_by_halves<T, D> && !DIFFERENCES;
    const Narrow<Filter<T>, D> to(raw + fragment_bytes, cr.n);
    const Fragments<D> fragments(raw, to.padded);
    const int64_t tiles = (r.n + NARROW_TILE - 1) / NARROW_TILE, all = active.problems(r.b) * tiles;
    int64_t prepared = -1;
    bool tensor = false;
    for (int64_t tile = all * blockIdx.x / gridDim.x; tile < all * (blockIdx.x + 1) / gridDim.x; ++tile) {
        const int64_t b = active.problem(tile / tiles), copy = cr.batch_stride ? b : 0;
        const T* centroids = row_of(c, cr, b, 0);
        if (copy != prepared) {
            __syncthreads();
            to.prepare(centroids, cr.row_stride, cr.d, metric);
            prepared = copy, tensor = TENSOR && fragment_bytes;
            if constexpr (TENSOR) {
                if (tensor) fragments.prepare(to);
            }
        }
        const int64_t first = tile % tiles * NARROW_TILE;
        const int64_t end = min(first + NARROW_TILE, r.n);
        const StoredLabels stored = {labels + b * r.n};
        if constexpr (TENSOR) {
            if (tensor) {
                tensor = most_proven(assign_rows_tensor<false, T, D>(x, r, b, first, end, centroids, cr.row_stride, to,
                                                                     fragments, stored),
                                     end - first);
                continue;
            }
        }
        assign_rows<T, D, DIFFERENCES>(x, r, b, first, end, centroids, cr.row_stride, to, metric, stored);
    }
}

template <class T, int D>
__device__ __forceinline__ void assign(const T* x, const Rows& r, const Active& active, const T* c, const Rows& cr,
                                       int metric, int64_t fragment_bytes, uint32_t* labels) {
    if (metric == MANHATTAN) assign_by<T, D, true>(x, r, active, c, cr, metric, 0, labels);
    else assign_by<T, D, false>(x, r, active, c, cr, metric, fragment_bytes, labels);
}

#define KERNEL(name, T, D)                                                                                             \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS, D > 4 ? 3 : 4)                                        \
        assign_narrow_##D##_##name(const T* x, Rows r, Active active, const T* c, Rows cr, int metric,                 \
                                   int64_t fragment_bytes, uint32_t* labels) {                                         \
        assign<T, D>(x, r, active, c, cr, metric, fragment_bytes, labels);                                             \
    }
#define INSTANCE(name, T) KERNEL(name, T, 1) KERNEL(name, T, 2) KERNEL(name, T, 4) KERNEL(name, T, 8)
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef KERNEL
