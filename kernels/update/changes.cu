// An update of sums that are there already: rows that have left a cluster are taken away from it and added to the one
// that they have come to. Sums are integers (update.cu), so they have the bits of those that begin with nothing.
//
// The last update has left the labels by which it added rows up and, unless so many rows had changed that this update
// has no use for them, the sums in the slots of each problem. Changed rows are listed and counted, by the cluster
// that they have come to and by the one that they have left, and sorted by both: of each cluster its gains, then its
// losses. A warp takes a slice of one cluster's, changes its sums and, of f16 rows, replaces the centroid at once.
// Terms of other types may be no integers of the scale: then a problem goes on the list of those that are added up as a
// whole, by the kernels of update.cu, before any of its centroids has been replaced. So does a problem whose sums are
// not known, or of which more than `room` rows have changed.
//
// Traffic: both labels of all rows; of a changed row 36 bytes, and itself twice; 32 bytes a column of each cluster that
// has changed, and 16 more unless rows are f16.
#include "scan.cuh"
#include "update/pieces.cuh"

/// True if the slots of a problem hold all of its sums when an update begins.
__device__ __forceinline__ bool summed(const Changes& c, int64_t p) {
    return c.state[p] == ADDED_CHANGES || (c.state[p] == ADDED_WHOLE && !c.odd[p]);
}

/// Counts the rows that have changed their cluster, and notes their new labels; as far as there is room, and sums that
/// they can change, lists them. An update begins here: no problem is known to outlast it, or to be added up as a whole.
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
        const bool lists = first + all <= c.room && summed(c, p);
        place += first;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t row = begin + i * THREADS;
            if (row >= n || to[i] == from[i]) continue;
            before[row] = to[i];
            if (!lists) continue;
            c.rows[p * c.room + place++] = make_uint2(row, from[i]);
            atomicAdd(&c.next[2 * (p * c.k + to[i])], 1);
            atomicAdd(&c.next[2 * (p * c.k + from[i]) + 1], 1);
        }
    }
}

/// Gains and losses of a cluster in a slice of a problem in which so many rows have changed.
__device__ __forceinline__ uint32_t slice_rows(uint32_t changed) {
    const uint32_t wanted = (2 * changed + CHANGES_SLICES - 1) / CHANGES_SLICES;
    return max(uint32_t(CHANGES_SLICE), min(wanted, uint32_t(CHANGES_SLICE_MOST)));
}

/// Decides which problems only need their changes added, and finds where the gains and the losses of each cluster
/// begin. Of the others it decides whether the update leaves its sums, which are sixteen bytes a column of each cluster
/// to be written, and to be cleared if they are of no use. A block to a problem.
__device__ void scan(int64_t b, int64_t n, const Active& active, const Changes& c) {
    __shared__ uint32_t count;
    const int64_t problems = active.problems(b);
    for (int64_t at = blockIdx.x; at < problems; at += gridDim.x) {
        const int64_t p = active.problem(at), changed = c.changed[p];
        uint32_t* const next = c.next + 2 * p * c.k;
        const uint32_t state = c.state[p];
        // A row is read twice, and to change the sums of a cluster takes as long as some rows.
        bool few = summed(c, p) && changed <= c.room && 2 * changed <= n;
        int64_t touched = 0;
        for (int64_t first = 0; few && first < c.k; first += blockDim.x) {
            const int64_t j = first + threadIdx.x;
            touched += __syncthreads_count(j < c.k && (next[2 * j] || next[2 * j + 1]));
        }
        few = few && 2 * changed + CHANGES_CLUSTER * touched <= n;
        // Half as many rows, perhaps, change in the next iteration. Of the first one nothing is known, but that its
        // sums cost little beside many rows.
        const int64_t expected = state == ANYTHING ? CHANGES_CLUSTER * 8 * c.k : changed + CHANGES_CLUSTER * c.k;
        __syncthreads();
        if (threadIdx.x == 0) {
            c.known[p] = few, c.dirty[p] = state != ZEROS;
            c.state[p] = few ? ADDED_CHANGES : expected <= n ? ADDED_WHOLE : ZEROS;
        }
        if (!few) continue;
        uint32_t* const begins = c.offsets + p * (2 * c.k + 1);
        block_scan(
            2 * c.k + 1, [&](int64_t j) { return j < 2 * c.k ? next[j] : 0; },
            [&](int64_t j, uint32_t before) {
                begins[j] = before;
                if (j < 2 * c.k) next[j] = before;
            });
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        const uint32_t rows = slice_rows(changed);
        for (int64_t j = threadIdx.x; j < c.k; j += blockDim.x) {
            const uint32_t top = begins[2 * j], bottom = begins[2 * j + 2];
            if (top == bottom) continue;
            uint2* to = c.slices + p * c.most + atomicAdd(&count, (bottom - top + rows - 1) / rows);
            for (uint32_t begin = top; begin < bottom; begin += rows) *to++ = make_uint2(j, begin);
        }
        __syncthreads();
        if (threadIdx.x == 0) c.count[p] = count;
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
            order[p * n + atomicAdd(&c.next[2 * (p * c.k + to)], 1)] = change.x;
            order[p * n + atomicAdd(&c.next[2 * (p * c.k + change.y) + 1], 1)] = change.x;
        }
    }
}

/// True if terms are f16 without factors: they are whole numbers of 2^-24 below 2^16, and f64 adds up 2^13 exactly.
template <class T, bool FACTOR>
constexpr bool WHOLE_NUMBERS = std::is_same<T, __half>::value && !FACTOR;
constexpr int WHOLE_SCALE = 24;
static_assert(CHANGES_SLICE_MOST <= 1 << (53 - 24 - 16), "a slice's sum is exact");

/// Replaces the centroid of a cluster by the sums in its slot, which `at(column)` reads, as `finish` of update.cu does.
template <class T, class At>
__device__ __forceinline__ void finish_slot(const Clusters<T>& to, int64_t p, int64_t cluster, int lane, int scale,
                                            const double* max_weight, const At& at) {
    const int weight_scale = max_weight ? fixed_scale(max_weight[p], to.rows) : 0;
    if (to.divisor == NORM) {
        const auto total = [&](int64_t column) { return scaled(1, scale, [&](int) { return at(column); }); };
        replace(to, p, cluster, to.d, lane, scaled(1, weight_scale, [&](int) { return at(to.d); }), total);
    } else {
        const double weight = max_weight ? fixed_value(at(to.d), weight_scale) : double(int64_t(at(to.d)));
        divide(to, p, cluster, to.d, lane, to.divisor == ONE ? 1 : weight,
               [&](int64_t column) { return fixed_value(at(column), scale); });
    }
}

/// Notes that so many slices of a problem are done. The last ones decide whether it has converged. By a warp.
template <class T>
__device__ __forceinline__ void count_slices(const Clusters<T>& to, int64_t p, uint32_t done, uint32_t all,
                                             const Verdict& verdict) {
    if (!verdict.threshold || !done) return;
    __threadfence();
    __syncwarp();
    if (threadIdx.x % WARP == 0 && atomicAdd(&to.finished[p], done) + done == all) {
        __threadfence();
        verdict.decide_convergence(p, to.shift);
        to.finished[p] = 0;
    }
}

/// True if the warp that changes the last sums of a centroid replaces it: all terms are integers of the scale.
template <class T>
__device__ __forceinline__ bool replaced_at_once(const double* factor, const uint32_t* first_nonfinite, int64_t p) {
    return std::is_same<T, __half>::value && !factor && first_nonfinite[p] == UINT32_MAX;
}

/// Adds the sorted rows to the slots of the clusters that have gained them, and takes them away from those that have
/// lost them. Each warp takes slices, a problem's warps in turn.
template <class T, bool FACTOR>
__device__ void add_changes(const T* x, const Rows& r, const double* factor, const double* max_abs,
                            const double* max_weight, const uint32_t* first_nonfinite, const uint32_t* order,
                            const Clusters<T>& to, const Active& active, const Verdict& verdict, const Changes& c) {
    constexpr int TOGETHER = 4;  // rows that are on their way at once
    using Sum = typename std::conditional<WHOLE_NUMBERS<T, FACTOR>, double, __int128>::type;
    const int lane = threadIdx.x % WARP;
    const int64_t problems = active.problems(r.b), warps = all_threads() / WARP;
    const int64_t shares = 0 < problems && problems < warps ? warps / problems : 1;
    for (int64_t item = global_thread() / WARP; item < problems * shares; item += warps) {
        const int64_t p = active.problem(item / shares);
        if (!c.known[p]) continue;
        const uint32_t rows = slice_rows(c.changed[p]), count = c.count[p];
        const Units<T> units(max_abs[p], max_weight ? max_weight[p] : 1, to.rows, first_nonfinite[p] != UINT32_MAX);
        const int weight_scale = max_weight ? fixed_scale(max_weight[p], to.rows) : 0;
        const bool at_once = replaced_at_once<T>(factor, first_nonfinite, p);
        const uint32_t* const places = order + p * r.n;
        const T* const values = x + p * r.batch_stride;
        bool odd = false;
        const auto term = [&](T value, double f) -> Sum {
            if constexpr (WHOLE_NUMBERS<T, FACTOR>) {
                if (!units.dirty || isfinite(wide(value))) return Small<T>::low(__half_as_ushort(value));
                odd = true;
                return 0;
            } else {
                const double v = FACTOR ? __dmul_rn(wide(value), f) : wide(value);
                __int128 q = 0;
                if (!isfinite(v)) odd |= units.dirty && f != 0;
                else if (v != 0) odd |= !fixed_quantise(v, units.scale, q) || units.extreme;
                return q;
            }
        };
        uint32_t done = 0;
        for (int64_t i = item % shares; i < count; i += shares, ++done) {
            const uint2 slice = c.slices[p * c.most + i];
            const int64_t cluster = slice.x;
            const uint32_t* const bounds = c.offsets + p * (2 * c.k + 1) + 2 * cluster;
            const uint32_t top = bounds[0], losses = bounds[1], bottom = bounds[2];
            const uint32_t begin = slice.y, end = min(begin + rows, bottom);
            const bool alone = bottom - top <= rows;
            unsigned long long* const slot = to.slot(p, cluster);
            __int128* const slot_sums = reinterpret_cast<__int128*>(slot);
#pragma unroll 1
            for (int64_t first = lane; first < r.d; first += WARP * AT_ONCE) {
                Sum sums[AT_ONCE] = {};
#pragma unroll 1
                for (uint32_t place = begin; place < end; place += TOGETHER) {
                    T v[TOGETHER][AT_ONCE];
                    double f[TOGETHER];
#pragma unroll
                    for (int u = 0; u < TOGETHER; ++u) {
                        const uint32_t row = places[min(place + u, end - 1)];
                        f[u] = FACTOR ? factor[p * r.n + row] : 1;
#pragma unroll
                        for (int i = 0; i < AT_ONCE; ++i) {
                            const int64_t column = first + i * WARP;
                            v[u][i] = place + u < end && column < r.d ? values[row * r.row_stride + column] : T(0.0f);
                        }
                    }
#pragma unroll
                    for (int u = 0; u < TOGETHER; ++u) {
#pragma unroll
                        for (int i = 0; i < AT_ONCE; ++i) {
                            const Sum q = term(v[u][i], f[u]);
                            sums[i] += place + u < losses ? q : -q;
                        }
                    }
                }
                __int128 before[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    before[i] = alone && first + i * WARP < r.d ? slot_sums[first + i * WARP] : 0;
                }
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i) {
                    const int64_t column = first + i * WARP;
                    if (column >= r.d) break;
                    __int128 q;
                    if constexpr (WHOLE_NUMBERS<T, FACTOR>) {
                        const double whole = sums[i] * power_of_two(Small<T>::SCALE) * power_of_two(WHOLE_SCALE);
                        q = __int128(__double2ll_rn(whole)) << (units.scale - WHOLE_SCALE);
                    } else {
                        q = sums[i];
                    }
                    if (alone) slot_sums[column] = before[i] + q;
                    else atomic_add(slot + 2 * column, q);
                }
            }
            // Of rows that each weigh 1 there are as many gains as places before the losses.
            __int128 weight = 2 * int64_t(min(max(losses, begin), end) - begin) - int64_t(end - begin);
            if (FACTOR && to.divisor == WEIGHT) {
                weight = 0;
                for (uint32_t place = begin + lane; place < end; place += WARP) {
                    __int128 q;
                    odd |= !fixed_quantise(factor[p * r.n + places[place]], weight_scale, q);
                    weight += place < losses ? q : -q;
                }
                weight = warp_sum(weight);
            }
            if (lane == 0) {
                if (alone) slot_sums[r.d] += weight;
                else atomic_add(slot + 2 * r.d, weight);
            }
            // Then all rows are added up instead.
            if (odd) *to.known_of(p) = 0;
            if (!at_once) continue;
            __syncwarp();
            if (alone) {
                finish_slot(to, p, cluster, lane, units.scale, max_weight,
                            [&](int64_t column) { return slot_sums[column]; });
                continue;
            }
            __threadfence();
            __syncwarp();
            uint32_t* const added = to.added + (p * c.k + cluster);
            const uint32_t others = __shfl_sync(~0u, lane == 0 ? atomicAdd(added, 1) : 0, 0);
            if (others + 1 != (bottom - top + rows - 1) / rows) continue;
            __threadfence();
            finish_slot(to, p, cluster, lane, units.scale, max_weight, [&](int64_t column) {
                return __int128((unsigned __int128)__ldcg(slot + 2 * column + 1) << 64 | __ldcg(slot + 2 * column));
            });
            if (lane == 0) *added = 0;
        }
        if (at_once) count_slices(to, p, done, count, verdict);
    }
}

/// Ends an update by changes: replaces the centroids that are left, lists the problems that are to be added up as a
/// whole, and clears their slots. `CHANGES_SHARES` blocks share a problem; a warp takes a slice.
template <class T>
__device__ void finish_changes(const double* factor, const double* max_abs, const double* max_weight,
                               const uint32_t* first_nonfinite, const Clusters<T>& to, const Active& active,
                               const Verdict& verdict, const Changes& c) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    const int64_t all = active.problems(to.problems) * CHANGES_SHARES;
    for (int64_t item = blockIdx.x; item < all; item += gridDim.x) {
        const int64_t p = active.problem(item / CHANGES_SHARES), share = item % CHANGES_SHARES;
        const bool known = c.known[p];
        const uint32_t count = c.count[p];
        if (share == 0) {
            for (int64_t i = threadIdx.x; i < 2 * c.k; i += blockDim.x) c.next[2 * p * c.k + i] = 0;
            if (threadIdx.x == 0) {
                c.changed[p] = 0, c.odd[p] = 0;
                // Sums that a change was no integer of are no use to the next update either.
                if (!known && c.state[p] == ADDED_CHANGES) c.state[p] = ZEROS;
                if (!known) c.whole[atomicAdd(c.whole_count, 1)] = p;
                if (known && count == 0 && verdict.threshold) verdict.decide_convergence(p, to.shift);
            }
        }
        if (!known && c.dirty[p]) {
            const int64_t sums = c.k * (to.d + 1), each = (sums + CHANGES_SHARES - 1) / CHANGES_SHARES;
            const int64_t end = min((share + 1) * each, sums);
            ulonglong2* const slots = reinterpret_cast<ulonglong2*>(to.slot(p, 0));
            for (int64_t i = share * each + threadIdx.x; i < end; i += blockDim.x) slots[i] = {0, 0};
        }
        if (!known || replaced_at_once<T>(factor, first_nonfinite, p)) continue;
        const int scale = fixed_scale(max_abs[p], to.rows);
        uint32_t done = 0;
        for (int64_t i = share * warps + threadIdx.x / WARP; i < count; i += CHANGES_SHARES * warps, ++done) {
            const uint2 slice = c.slices[p * c.most + i];
            if (slice.y != c.offsets[p * (2 * c.k + 1) + 2 * slice.x]) continue;  // the cluster's first
            const __int128* const sums = reinterpret_cast<const __int128*>(to.slot(p, slice.x));
            finish_slot(to, p, slice.x, lane, scale, max_weight, [&](int64_t column) { return sums[column]; });
        }
        count_slices(to, p, done, count, verdict);
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
#define ADD(name, T, FACTOR)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, FACTOR || sizeof(T) > 4 ? 2 : CHANGES_BLOCKS)                \
        name(const T* x, Rows r, const double* factor, const double* max_abs, const double* max_weight,                \
             const uint32_t* first_nonfinite, const uint32_t* order, Clusters<T> to, Active active, Verdict verdict,   \
             Changes c) {                                                                                              \
        add_changes<T, FACTOR>(x, r, factor, max_abs, max_weight, first_nonfinite, order, to, active, verdict, c);     \
    }
#define INSTANCE(name, T)                                                                                              \
    UPDATE(update_kept_##name, T, 16 / sizeof(T), false)                                                               \
    UPDATE(update_kept_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                              \
    UPDATE(update_kept_narrow_##name, T, 1, false)                                                                     \
    UPDATE(update_kept_narrow_weighted_##name, T, 1, true)                                                             \
    ADD(add_changes_##name, T, false)                                                                                  \
    ADD(add_changes_weighted_##name, T, true)                                                                          \
    extern "C" __global__ void finish_changes_##name(const double* factor, const double* max_abs,                      \
                                                     const double* max_weight, const uint32_t* first_nonfinite,        \
                                                     Clusters<T> to, Active active, Verdict verdict, Changes c) {      \
        finish_changes(factor, max_abs, max_weight, first_nonfinite, to, active, verdict, c);                          \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef ADD
#undef UPDATE
