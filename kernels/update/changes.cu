// An update of sums that are there already: rows that have left a cluster are taken away from it and added to the one
// that they have come to. Sums are integers (update.cu), so they have the bits of those that begin with nothing.
//
// Of each problem the last update has left the labels by which it added rows up, and all sums, in their slots. Changed
// rows are listed and counted, by the cluster that they have come to and by the one that they have left, sorted by both
// (a cluster and its leavers count as two), added up by the warps of update.cu, and the clusters that they touch are
// finished. A problem goes on the list of those that are added up as a whole, by the kernels of update.cu, where its
// sums are not known, where more than `room` rows have changed, or where a term is no integer of the scale.
//
// Traffic: both labels of all rows; of a changed row 36 bytes, and itself twice; 32 bytes a column of each cluster that
// a piece of changed rows touches, and of each cluster that has changed.
#include "scan.cuh"
#include "update/pieces.cuh"

/// Lists the rows that have changed their cluster, as far as there is room, and notes their new labels. An update
/// begins here: no problem is known to outlast it, or to be added up as a whole.
__device__ void find(const uint32_t* labels, int64_t b, int64_t n, const Active& active, const Changes& c,
                     uint32_t* next_active) {
    constexpr int EACH = CHANGES_ROWS / THREADS;
    __shared__ uint32_t first;
    if (global_thread() == 0) {
        *c.whole_count = 0;
        if (next_active) *next_active = 0;
    }
    const int64_t chunks = (n + CHANGES_ROWS - 1) / CHANGES_ROWS, tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), begin = tile % chunks * CHANGES_ROWS + threadIdx.x;
        const uint32_t* const now = labels + p * n;
        uint32_t* const before = c.labels + p * n;
        uint32_t to[EACH], from[EACH], own = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t row = min(begin + i * THREADS, n - 1);
            to[i] = min(now[row], uint32_t(c.k - 1)), from[i] = before[row];
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) own += begin + i * THREADS < n && to[i] != from[i];
        uint32_t place;
        const uint32_t all =
            block_scan(blockDim.x, [&](int64_t) { return own; }, [&](int64_t, uint32_t sum) { place = sum; });
        if (all == 0) continue;
        if (threadIdx.x == 0) first = atomicAdd(&c.changed[p], all);
        __syncthreads();
        const bool room = first + all <= c.room;
        place += first;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t row = begin + i * THREADS;
            if (row >= n || to[i] == from[i]) continue;
            before[row] = to[i];
            // The first update of all finds no labels here.
            if (!room || from[i] >= c.k) continue;
            c.rows[p * c.room + place++] = make_uint2(row, from[i]);
            atomicAdd(&c.next[2 * p * c.k + to[i]], 1);
            atomicAdd(&c.next[(2 * p + 1) * c.k + from[i]], 1);
        }
    }
}

/// Decides which problems only need their changes added, and finds where the changes of each cluster begin. A block to
/// a problem.
__device__ void scan(int64_t b, int64_t n, const Active& active, const Changes& c) {
    const int64_t problems = active.problems(b);
    for (int64_t at = blockIdx.x; at < problems; at += gridDim.x) {
        const int64_t p = active.problem(at), changed = c.changed[p];
        uint32_t* const next = c.next + 2 * p * c.k;
        // The last update left all sums if it added up all rows and no cluster was odd, or if it added changes.
        bool few = (c.added_whole[p] ? !c.odd[p] : c.known[p]) && changed <= c.room;
        int64_t touched = 0;
        for (int64_t first = 0; few && first < 2 * c.k; first += blockDim.x) {
            touched += __syncthreads_count(first + threadIdx.x < 2 * c.k && next[first + threadIdx.x]);
        }
        // A row is read twice, and the atomics that change the sums of a cluster take as long as some rows.
        few = few && 2 * changed + CHANGES_CLUSTER * touched <= n;
        __syncthreads();
        if (threadIdx.x == 0) c.known[p] = few;
        if (!few) continue;
        uint32_t* const begins = c.offsets + p * (2 * c.k + 1);
        block_scan(
            2 * c.k + 1, [&](int64_t j) { return j < 2 * c.k ? next[j] : 0; },
            [&](int64_t j, uint32_t before) {
                begins[j] = before;
                if (j < 2 * c.k) next[j] = before;
            });
    }
}

/// Sorts the listed rows.
__device__ void place(const uint32_t* labels, int64_t b, int64_t n, const Active& active, const Changes& c,
                      uint32_t* order) {
    const int64_t chunks = (c.room + CHANGES_ROWS - 1) / CHANGES_ROWS, tiles = active.problems(b) * chunks;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t p = active.problem(tile / chunks), begin = tile % chunks * CHANGES_ROWS;
        if (!c.known[p]) continue;
        const int64_t end = min(begin + CHANGES_ROWS, int64_t(c.changed[p]));
        for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
            const uint2 change = c.rows[p * c.room + i];
            const uint32_t to = min(labels[p * n + change.x], uint32_t(c.k - 1));
            order[p * n + atomicAdd(&c.next[2 * p * c.k + to], 1)] = change.x;
            order[p * n + atomicAdd(&c.next[(2 * p + 1) * c.k + change.y], 1)] = change.x;
        }
    }
}

/// Adds the sorted rows to the slots of the clusters that they have come to, and takes them away from the others. Each
/// warp takes a piece.
template <class T, int EACH, bool FACTOR>
__device__ void add_changes(const T* x, const Rows& r, const double* factor, const double* max_abs,
                            const double* max_weight, const uint32_t* first_nonfinite, const uint32_t* order,
                            const Pieces& pieces, const Clusters<T>& to, const Active& active, const Changes& c) {
    using Worker = PieceWarp<T, EACH, FACTOR, CHANGED>;
    __shared__ typename Worker::Shared of_warps[SUM_THREADS / WARP];
    typename Worker::Shared& shared = of_warps[threadIdx.x / WARP];
    const uint32_t lane = threadIdx.x % WARP;
    if (lane == 0) shared.odd = 0;
    if (!Worker::EXACT) {
        for (uint32_t at = lane; at < Worker::COLUMNS; at += WARP) shared.remainder[at] = 0;
    }
    __syncwarp();
    uint32_t lanes = 1;
    while (lanes < WARP && lanes * EACH < r.d) lanes *= 2;
    // A piece is as short as keeps all warps busy: with few changes, a warp would pass many clusters without any.
    const int64_t problems = active.problems(r.b), warps = all_threads() / WARP;
    const int64_t shares = 0 < problems && problems < warps ? warps / problems : 1;
    for (int64_t item = global_thread() / WARP; item < problems * shares; item += warps) {
        const uint32_t b = active.problem(item / shares);
        if (!c.known[b]) continue;
        const uint32_t* const bounds = c.offsets + b * (2 * c.k + 1);
        const uint32_t all = bounds[2 * c.k];
        const uint32_t rows = min(int64_t(pieces.rows), (all + shares - 1) / shares);
        for (int64_t begin = item % shares * rows; begin < all; begin += shares * rows) {
            // The cluster that the piece begins in: the last one that begins there or before.
            uint32_t cluster = 0;
            for (uint32_t above = 2 * c.k; above - cluster > 1;) {
                const uint32_t middle = (cluster + above) / 2;
                (bounds[middle] <= begin ? cluster : above) = middle;
            }
            Worker warp = {
                shared,
                r,
                to,
                b,
                x + b * r.batch_stride,
                factor ? factor + b * r.n : nullptr,
                order + b * r.n + begin,
                uint32_t(begin),
                Units<T>(max_abs[b], max_weight ? max_weight[b] : 1, to.rows, first_nonfinite[b] != UINT32_MAX),
                max_weight ? fixed_scale(max_weight[b], to.rows) : 0,
                lane,
                lanes,
                lane / lanes,
                WARP / lanes,
                uint32_t(min(begin + rows, int64_t(all)) - begin),
                cluster};
            warp.run(bounds, pieces);
        }
    }
}

/// Replaces the centroids of clusters that have changed, and lists the problems that are to be added up as a whole, in
/// slots of zeros. A warp to a cluster.
template <class T>
__device__ void finish_changes(const double* max_abs, const double* max_weight, const Clusters<T>& to,
                               const Active& active, const Verdict& verdict, const Changes& c) {
    const int lane = threadIdx.x % WARP;
    const int64_t all = active.problems(to.problems) * c.k;
    for (int64_t item = global_thread() / WARP; item < all; item += all_threads() / WARP) {
        const int64_t p = active.problem(item / c.k), cluster = item % c.k;
        const bool known = *(volatile uint32_t*)&c.known[p];
        if (lane < 2) c.next[(2 * p + lane) * c.k + cluster] = 0;
        if (lane == 0 && cluster == 0) {
            c.changed[p] = 0, c.added_whole[p] = !known, c.odd[p] = 0;
            if (!known) c.whole[atomicAdd(c.whole_count, 1)] = p;
        }
        __int128* const slot = reinterpret_cast<__int128*>(to.slot(p, cluster));
        if (!known) {
            for (int64_t column = lane; column <= to.d; column += WARP) slot[column] = 0;
            continue;
        }
        const uint32_t* const come = c.offsets + p * (2 * c.k + 1) + cluster;
        const uint32_t* const left = come + c.k;
        if (come[1] > come[0] || left[1] > left[0]) {
            const int scale = fixed_scale(max_abs[p], to.rows);
            const auto total = [&](int64_t column) { return scaled(1, scale, [&](int) { return slot[column]; }); };
            const Scaled weight =
                scaled(1, max_weight ? fixed_scale(max_weight[p], to.rows) : 0, [&](int) { return slot[to.d]; });
            replace(to, p, cluster, to.d, lane, weight, total);
        }
        if (!verdict.threshold) continue;
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(&to.finished[p], 1) + 1 == c.k) {
            __threadfence();
            verdict.decide_convergence(p, to.shift);
            to.finished[p] = 0;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    find_changes(const uint32_t* labels, int64_t b, int64_t n, Active active, Changes c, uint32_t* next_active) {
    find(labels, b, n, active, c, next_active);
}
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    scan_changes(int64_t b, int64_t n, Active active, Changes c) {
    scan(b, n, active, c);
}
extern "C" __global__ void __launch_bounds__(THREADS)
    place_changes(const uint32_t* labels, int64_t b, int64_t n, Active active, Changes c, uint32_t* order) {
    place(labels, b, n, active, c, order);
}

#define UPDATE(name, T, EACH, FACTOR)                                                                                  \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, (BLOCKS<T, EACH, FACTOR>))                               \
        name(const T* x, Rows r, const double* factor, const double* max_abs, const double* max_weight,                \
             const uint32_t* first_nonfinite, const uint32_t* labels, const uint32_t* order, const uint32_t* offsets,  \
             Pieces pieces, Clusters<T> to, Active active, Verdict verdict) {                                          \
        update<T, EACH, FACTOR, true>(x, r, factor, max_abs, max_weight, first_nonfinite, labels, order, offsets,      \
                                      pieces, to, active, verdict);                                                    \
    }
#define ADD(name, T, EACH, FACTOR)                                                                                     \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, SUM_BLOCKS_WEIGHTED)                                     \
        name(const T* x, Rows r, const double* factor, const double* max_abs, const double* max_weight,                \
             const uint32_t* first_nonfinite, const uint32_t* order, Pieces pieces, Clusters<T> to, Active active,     \
             Changes c) {                                                                                              \
        add_changes<T, EACH, FACTOR>(x, r, factor, max_abs, max_weight, first_nonfinite, order, pieces, to, active,    \
                                     c);                                                                               \
    }
#define INSTANCE(name, T)                                                                                              \
    UPDATE(update_kept_##name, T, 16 / sizeof(T), false)                                                               \
    UPDATE(update_kept_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                              \
    UPDATE(update_kept_narrow_##name, T, 1, false)                                                                     \
    UPDATE(update_kept_narrow_weighted_##name, T, 1, true)                                                             \
    ADD(add_changes_##name, T, 16 / sizeof(T), false)                                                                  \
    ADD(add_changes_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                                 \
    ADD(add_changes_narrow_##name, T, 1, false)                                                                        \
    ADD(add_changes_narrow_weighted_##name, T, 1, true)                                                                \
    extern "C" __global__ void finish_changes_##name(const double* max_abs, const double* max_weight, Clusters<T> to,  \
                                                     Active active, Verdict verdict, Changes c) {                      \
        finish_changes(max_abs, max_weight, to, active, verdict, c);                                                   \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef ADD
#undef UPDATE
