// Sort-Inverse Update: rows are visited in cluster order, summed on chip, and the mean of a cluster is written where
// its last row is added.
//
// A sum is a 128-bit integer (src/fixed.rs), so it may be cut anywhere and added up in any order. A warp takes a piece
// of the sorted places, cluster by cluster. Its lanes share a row, 16 bytes each, and add into f64 "limbs": whole
// numbers of a unit, few enough bits of each term that 2^10 of them add up exactly. What a term has below the last
// limb, which is rare, is an integer of its own. A cluster inside one piece is finished on chip. One that crosses
// pieces is added up in its slot in memory, and whoever adds last finishes it and leaves zeros behind. Traffic: X and
// the order once, the centroids twice, and 16 bytes a column for each piece of a crossing cluster.
//
// Medians (Manhattan) need no sums: a median is found bit by bit, by counting.
#include <cuda_pipeline_primitives.h>

#include "common.cuh"

static_assert(THREADS % MEDIAN_COLUMNS == 0 && SUM_THREADS % WARP == 0, "whole columns, whole warps");
static_assert(SUM_ROWS <= 1024, "limbs have room for 2^10 terms");

/// Bits of a limb's terms: with their sign and 10 more for their sum they fit the 53 of an f64.
constexpr int LIMB_BITS = 42;

/// What a sum is divided by: the weight of its cluster, the norm of the sums, or nothing.
enum Divisor : int { WEIGHT = 0, NORM = 1, ONE = 2 };

/// Partial sums of columns 32 apart, added up in the order of `striped` in src/fixed.rs.
__device__ __forceinline__ double striped(double partial) {
    for (int step = WARP / 2; step; step /= 2) partial = __dadd_rn(partial, __shfl_xor_sync(~0u, partial, step));
    return partial;
}

/// The square of a difference; nothing if both are the same infinity.
__device__ __forceinline__ double squared(double a, double b) {
    const double t = a == b ? 0 : __dsub_rn(a, b);
    return __dmul_rn(t, t);
}

/// The centroids of a fit, and where they are added up.
template <class T>
struct Clusters {
    T* centroids;               // (b, k, d), in place
    unsigned long long* slots;  // (b, k, d + 1, 2): sums, and the weight; zeros but for clusters under way
    uint32_t* added;            // (b, k): pieces in a slot, likewise
    uint32_t* finished;         // (b,): pieces that are done, likewise
    double* shift;              // (b,): the largest squared shift of the iteration, likewise
    int64_t k, d;
    int divisor;

    __device__ __forceinline__ T* row(int64_t b, int64_t cluster) const { return centroids + (b * k + cluster) * d; }
    __device__ __forceinline__ unsigned long long* slot(int64_t b, int64_t cluster) const {
        return slots + (b * k + cluster) * (d + 1) * 2;
    }
    __device__ __forceinline__ void moved(int64_t b, double squared) const {
        atomic_max(&shift[b], squared == squared ? squared : INFINITY);
    }
};

/// Which problems go on. There is no next iteration if there is no threshold.
struct Verdict {
    const double* threshold;  // (b,): the squared shift at which a problem has converged
    uint32_t* stop;           // (b,): where it has, the iteration in which it did
    uint32_t *list, *count;   // `Active` of the next iteration
    int64_t iteration;

    /// Decides once all clusters have moved, and clears their shift.
    __device__ __forceinline__ void settle(int64_t b, double* shift) const {
        if (threshold) {
            if (__ldcg(&shift[b]) <= threshold[b]) stop[b] = iteration;
            else list[atomicAdd(count, 1)] = b;
        }
        shift[b] = 0;
    }
};

/// How the terms of one problem are cut.
struct Units {
    int scale, top;  // every term is below 2^top
    bool extreme;    // no limbs: their units are no f64
    bool dirty;      // there may be terms that are no numbers

    __device__ Units(double largest, int64_t n, bool dirty) : dirty(dirty) {
        scale = fixed_scale(largest, n);
        top = 126 - scale - (64 - __clzll(n));
        extreme = top < -900 || top >= 900;
    }
    __device__ __forceinline__ int unit(int limb) const { return top - LIMB_BITS * (limb + 1); }
    /// Adding this and taking it away again rounds to the unit.
    __device__ __forceinline__ double rounder(int limb) const {
        return extreme ? 0 : 1.5 * power_of_two(52 + unit(limb));
    }
    /// A limb's sum as an integer of the scale.
    __device__ __forceinline__ __int128 value(int limb, double sum) const {
        if (extreme) return 0;
        return __int128(__double2ll_rn(sum * power_of_two(-unit(limb)))) << (unit(limb) + scale);
    }
};

/// A warp on its way through a piece of the sorted places, with `EACH` columns a lane and as many rows at a time as
/// lanes are left for. Rows come through a ring of steps, which each lane fills and empties for itself.
template <class T, int EACH, bool FACTOR>
struct Warp {
    /// Halves span 40 bits: their sums are exact as they are.
    static constexpr bool EXACT = std::is_same<T, __half>::value && !FACTOR;
    static constexpr int LIMBS = sizeof(T) == 2 && !FACTOR ? 1 : 2, COLUMNS = WARP * EACH;

    struct alignas(sizeof(T) * EACH) Part {
        T values[EACH];
    };
    struct Shared {
        Part ring[SUM_STEPS][WARP];
        double factors[FACTOR ? SUM_STEPS : 1][WARP];
        __int128 rest[EXACT ? 1 : COLUMNS];  // zeros but for what limbs could not take
        double limbs[LIMBS][COLUMNS];
    };

    Shared& shared;
    const Rows& r;
    const Clusters<T>& to;
    int64_t b;
    const T* x;             // of problem `b`, as all that follow
    const double* factor;   // (n)
    const uint32_t* order;  // from the piece on; null if rows are in order
    int64_t begin;          // of the piece
    Units units;
    int weight_scale;
    uint32_t lane, lanes, group, groups;  // `lanes` of them to a row, in so many groups

    // ---- The rows of a piece, from column `first` on.

    uint32_t count;         // places of the piece; they are counted from its begin
    uint32_t asked, here;   // steps that have been asked for, and that have arrived
    uint32_t rows, coming;  // row numbers: of 32 places, and of the next 32
    const T* from;          // this lane's columns of row 0
    bool live, leads;       // whether it has any; whether it has the first

    __device__ void start(int64_t first) {
        const int64_t column = first + lane % lanes * EACH;
        from = x + column, live = column < r.d, leads = column == 0;
        asked = here = 0;
        coming = row_at(lane);
#pragma unroll 1
        for (int i = 1; i < SUM_STEPS; ++i) ask();
    }

    __device__ uint32_t row_at(uint32_t place) const {
        place = min(place, count - 1);
        return order ? order[place] : uint32_t(begin + place);
    }

    __device__ void ask() {
        const uint32_t place = asked * groups;
        if (place % WARP == 0) {
            rows = coming;
            coming = row_at(place + WARP + lane);
        }
        const uint32_t row = __shfl_sync(~0u, rows, place % WARP + group);
        if (live && place + group < count) {
            Part* const part = &shared.ring[asked % SUM_STEPS][lane];
            // Whole parts come with strides of less than 2^32 (and anything else without).
            const T* const at = from + (EACH > 1 ? row * uint64_t(uint32_t(r.row_stride)) : row * r.row_stride);
            if constexpr (sizeof(Part) < 4) *part = *reinterpret_cast<const Part*>(at);
            else __pipeline_memcpy_async(part, at, sizeof(Part));
            if (FACTOR) __pipeline_memcpy_async(&shared.factors[asked % SUM_STEPS][lane], &factor[row], sizeof(double));
        }
        __pipeline_commit();
        ++asked;
    }

    /// Adds up the rows at places `[place, stop)` into the limbs, and adds their factors to `weight` in one lane of
    /// each row. Returns whether there is any rest.
    __device__ bool add(uint32_t place, uint32_t stop, __int128& weight) {
        double sums[LIMBS][EACH], rounders[LIMBS];
        bool any_rest = false;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
            rounders[l] = units.rounder(l);
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[l][e] = 0;
        }
        const uint32_t last = (stop - 1) / groups;
#pragma unroll 1
        for (uint32_t step = place / groups; step <= last; ++step) {
            if (step == here) {
                ask();  // into the place of the step before, which is done with
                __pipeline_wait_prior(SUM_STEPS - 1);
                ++here;
            }
            const uint32_t at = step * groups + group;
            if (!live || at < place || at >= stop) continue;
            Part part = shared.ring[step % SUM_STEPS][lane];
            if (!FACTOR && units.dirty) {
#pragma unroll
                for (int e = 0; e < EACH; ++e)
                    part.values[e] = isfinite(wide(part.values[e])) ? part.values[e] : T(0.0f);
            }
            const double f = FACTOR ? shared.factors[step % SUM_STEPS][lane] : 1;
            if (FACTOR && to.divisor == WEIGHT && leads) weight += fixed_quantise(f, weight_scale);
            double left[EACH];
            bool rest = false;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                double v = wide(part.values[e]);
                if (FACTOR) v = __dmul_rn(v, f);
                if (FACTOR && !isfinite(v)) v = 0;
                if (EXACT) {
                    sums[0][e] += v;
                    continue;
                }
                // Rounded toward zero, so that what is left has the sign of the term.
#pragma unroll
                for (int l = 0; l < LIMBS; ++l) {
                    const double rounder = copysign(rounders[l], v);
                    const double limb = units.extreme ? 0 : __dadd_rz(v, rounder) - rounder;
                    sums[l][e] += limb, v -= limb;
                }
                left[e] = v, rest |= v != 0;
            }
            if (rest) {
                any_rest = true;
#pragma unroll
                for (int e = 0; e < EACH; ++e) shared.limbs[0][lane * EACH + e] = left[e];
#pragma unroll 1
                for (uint32_t own = lane * EACH; own < (lane + 1) * EACH; ++own) {
                    shared.rest[own] += fixed_quantise(shared.limbs[0][own], units.scale);
                }
            }
        }
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
#pragma unroll
            for (int e = 0; e < EACH; ++e) shared.limbs[l][lane * EACH + e] = sums[l][e];
        }
        __syncwarp();
        return __any_sync(~0u, any_rest);
    }

    /// The sum of a column of what was added last.
    __device__ __int128 sum(uint32_t own, bool rest) const {
        const uint32_t width = lanes * EACH;
        __int128 q = 0;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
            double limb = 0;
#pragma unroll 1
            for (uint32_t at = own; at < COLUMNS; at += width) limb += shared.limbs[l][at];
            q += units.value(l, limb);
        }
        if (!EXACT && rest) {
#pragma unroll 1
            for (uint32_t at = own; at < COLUMNS; at += width) q += shared.rest[at];
        }
        return q;
    }

    /// Leaves shared memory to the next rows.
    __device__ void leave(bool rest) {
        __syncwarp();
        if (EXACT || !rest) return;
#pragma unroll 1
        for (uint32_t at = lane; at < COLUMNS; at += WARP) shared.rest[at] = 0;
        __syncwarp();
    }

    /// Replaces the centroid of `cluster` by `total(column) / divisor`; one of no weight stays.
    template <class Total>
    __device__ void finish(int64_t cluster, double weight, Total total) const {
        double divisor = to.divisor == ONE ? 1 : weight;
        if (to.divisor == NORM) {
            double squares = 0;
#pragma unroll 1
            for (int64_t c = lane; c < r.d; c += WARP) {
                const double t = total(c);
                squares = __dadd_rn(squares, __dmul_rn(t, t));
            }
            divisor = __dsqrt_rn(striped(squares));
        }
        if (!(divisor > 0)) return;
        T* const row = to.row(b, cluster);
        double moved = 0;
#pragma unroll 1
        for (int64_t c = lane; c < r.d; c += WARP) {
            const T mean = rounded<T>(__ddiv_rn(total(c), divisor));
            moved = __dadd_rn(moved, squared(wide(mean), wide(row[c])));
            row[c] = mean;
        }
        moved = striped(moved);
        if (lane == 0 && !(moved == 0)) to.moved(b, moved);
    }

    /// The weight of a cluster of `size` rows, from what the lanes have added up.
    __device__ __int128 total_weight(__int128 weight, int64_t size) const {
        if (!FACTOR || to.divisor != WEIGHT) return size;
#pragma unroll
        for (int step = WARP / 2; step; step /= 2) {
            const uint64_t low = __shfl_xor_sync(~0u, uint64_t(weight), step);
            const uint64_t high = __shfl_xor_sync(~0u, uint64_t(weight >> 64), step);
            weight += __int128((unsigned __int128)high << 64 | low);
        }
        return weight;
    }
    __device__ double as_weight(__int128 weight) const {
        return FACTOR && to.divisor == WEIGHT ? fixed_value(weight, weight_scale) : double(int64_t(weight));
    }

    /// Adds up the piece, one of those cut after every `each` places. Without an order all rows are in one cluster.
    __device__ void run(const uint32_t* labels, const uint32_t* offsets, int64_t each) {
        for (int64_t first = 0; first < r.d; first += COLUMNS) {
            start(first);
            int64_t cluster = order ? min(int64_t(labels[order[0]]), to.k - 1) : 0;
            for (uint32_t place = 0; place < count; ++cluster) {
                const int64_t top = order ? offsets[cluster] : 0, bottom = order ? offsets[cluster + 1] : r.n;
                const uint32_t stop = uint32_t(max(int64_t(0), min(bottom - begin, int64_t(count))));
                if (stop <= place) continue;
                __int128 weight = 0;
                const bool rest = add(place, stop, weight);
                weight = total_weight(weight, stop - place);
                if (top >= begin && bottom <= begin + count && r.d <= COLUMNS) {
                    finish(cluster, as_weight(weight),
                           [&](int64_t c) { return fixed_value(sum(c, rest), units.scale); });
                } else {
                    unsigned long long* const slot = to.slot(b, cluster);
#pragma unroll 1
                    for (uint32_t c = lane; c < COLUMNS && first + c < r.d; c += WARP) {
                        atomic_add(slot + 2 * (first + c), sum(c, rest));
                    }
                    if (lane == 0 && first == 0) atomic_add(slot + 2 * r.d, weight);
                    if (first + COLUMNS >= r.d) add_last(cluster, slot, (bottom - 1) / each - top / each + 1);
                }
                leave(rest);
                place = stop;
            }
        }
        __pipeline_wait_prior(0);
    }

    /// Finishes a cluster if its slot now holds all of its `pieces`.
    __device__ void add_last(int64_t cluster, unsigned long long* slot, int64_t pieces) {
        uint32_t* const added = to.added + b * to.k + cluster;
        __threadfence();
        __syncwarp();
        const uint32_t others = __shfl_sync(~0u, lane == 0 ? atomicAdd(added, 1) : 0, 0);
        if (others + 1 != pieces) return;
        __threadfence();
        const auto at = [&](int64_t c) {
            return __int128((unsigned __int128)__ldcg(slot + 2 * c + 1) << 64 | __ldcg(slot + 2 * c));
        };
        const double weight = as_weight(at(r.d));
        finish(cluster, weight, [&](int64_t c) { return fixed_value(at(c), units.scale); });
        __syncwarp();
#pragma unroll 1
        for (int64_t c = lane; c < 2 * (r.d + 1); c += WARP) slot[c] = 0;
        if (lane == 0) *added = 0;
    }
};

/// Each warp takes a piece of `rows` places.
template <class T, int EACH, bool FACTOR>
__device__ void update(const T* x, const Rows& r, const double* factor, const double* largest, const double* heaviest,
                       const uint32_t* first_bad, const uint32_t* labels, const uint32_t* order,
                       const uint32_t* offsets, int64_t rows, const Clusters<T>& to, const Active& active,
                       const Verdict& verdict) {
    using Mine = Warp<T, EACH, FACTOR>;
    __shared__ typename Mine::Shared of_warps[SUM_THREADS / WARP];
    typename Mine::Shared& shared = of_warps[threadIdx.x / WARP];
    const uint32_t lane = threadIdx.x % WARP;
    if (!Mine::EXACT) {
        for (uint32_t at = lane; at < Mine::COLUMNS; at += WARP) shared.rest[at] = 0;
        __syncwarp();
    }
    uint32_t lanes = 1;
    while (lanes < WARP && lanes * EACH < r.d) lanes *= 2;
    const int64_t pieces = (r.n + rows - 1) / rows;
    const int64_t items = active.problems(r.b) * pieces;
    for (int64_t item = global_thread() / WARP; item < items; item += all_threads() / WARP) {
        const int64_t b = active.problem(item / pieces), begin = item % pieces * rows;
        Mine warp = {shared,
                     r,
                     to,
                     b,
                     x + b * r.batch_stride,
                     factor ? factor + b * r.n : nullptr,
                     order ? order + b * r.n + begin : nullptr,
                     begin,
                     Units(largest[b], r.n, first_bad[b] != UINT32_MAX),
                     heaviest ? fixed_scale(heaviest[b], r.n) : 0,
                     lane,
                     lanes,
                     lane / lanes,
                     WARP / lanes,
                     uint32_t(min(rows, r.n - begin))};
        warp.run(labels + b * r.n, offsets + b * (to.k + 1), rows);
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(&to.finished[b], 1) + 1 == pieces) {
            __threadfence();
            verdict.settle(b, to.shift);
            to.finished[b] = 0;
        }
    }
}

// ---- Medians.

__device__ __forceinline__ uint16_t key(__half v) { return ordered<uint16_t>(__half_as_ushort(v)); }
__device__ __forceinline__ uint16_t key(__nv_bfloat16 v) { return ordered<uint16_t>(__bfloat16_as_ushort(v)); }
__device__ __forceinline__ uint32_t key(float v) { return ordered<uint32_t>(__float_as_uint(v)); }
__device__ __forceinline__ uint64_t key(double v) { return ordered<uint64_t>(__double_as_longlong(v)); }
__device__ __forceinline__ void from_key(uint16_t k, __half& v) { v = __ushort_as_half(unordered(k)); }
__device__ __forceinline__ void from_key(uint16_t k, __nv_bfloat16& v) { v = __ushort_as_bfloat16(unordered(k)); }
__device__ __forceinline__ void from_key(uint32_t k, float& v) { v = __uint_as_float(unordered(k)); }
__device__ __forceinline__ void from_key(uint64_t k, double& v) { v = __longlong_as_double(unordered(k)); }

using Weight = unsigned __int128;

/// The sum over the threads of a column, to all of them.
__device__ Weight column_sum(Weight v) {
    __shared__ Weight parts[THREADS];
    parts[threadIdx.x] = v;
    __syncthreads();
    v = 0;
    for (int i = threadIdx.x % MEDIAN_COLUMNS; i < THREADS; i += MEDIAN_COLUMNS) v += parts[i];
    __syncthreads();
    return v;
}

/// The median of one cluster's column is the largest key with less than half of the weight below it. A block takes one
/// cluster and MEDIAN_COLUMNS columns and decides one bit of all its keys in each pass over the cluster's rows.
template <class T>
__device__ void medians(const T* x, const Rows& r, const double* weights, const double* max_weight,
                        const uint32_t* order, const uint32_t* offsets, int64_t k, const Active& active, T* out) {
    using Key = decltype(key(T()));
    const int64_t groups = (r.d + MEDIAN_COLUMNS - 1) / MEDIAN_COLUMNS;
    const int part = threadIdx.x / MEDIAN_COLUMNS, parts = THREADS / MEDIAN_COLUMNS;
    const int64_t tiles = active.problems(r.b) * k * groups;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t b = active.problem(tile / (k * groups)), j = tile / groups % k;
        const int64_t column = tile % groups * MEDIAN_COLUMNS + threadIdx.x % MEDIAN_COLUMNS;
        const int64_t begin = offsets[b * (k + 1) + j] + part, end = offsets[b * (k + 1) + j + 1];
        const bool live = column < r.d;
        const int scale = weights ? fixed_scale(max_weight[b], r.n) : 0;
        const auto weight_below = [&](bool all, Key bound) {
            Weight sum = 0;
            for (int64_t place = begin; place < end; place += parts) {
                const int64_t row = order[b * r.n + place];
                if (!all && !(live && key(row_of(x, r, b, row)[column]) < bound)) continue;
                sum += weights ? Weight(fixed_quantise(weights[b * r.n + row], scale)) : 1;
            }
            return column_sum(sum);
        };
        const Weight total = weight_below(true, 0);  // the same for the whole block
        Key median = 0;
        for (int bit = sizeof(Key) * 8 - 1; total != 0 && bit >= 0; --bit) {
            const Key bound = median | Key(Key(1) << bit);
            if (2 * weight_below(false, bound) < total) median = bound;
        }
        if (live && part == 0 && total != 0) from_key(median, out[(b * k + j) * r.d + column]);
    }
}

// ---- What is left to do after medians.

/// One warp a centroid.
template <class T>
__device__ void shift(const T* old, int64_t b, const Clusters<T>& to, const Active& active) {
    const int64_t all = active.problems(b) * to.k;
    for (int64_t at = global_thread() / WARP; at < all; at += all_threads() / WARP) {
        const int64_t p = active.problem(at / to.k), i = p * to.k + at % to.k;
        double moved = 0;
        for (int64_t c = threadIdx.x % WARP; c < to.d; c += WARP) {
            moved = __dadd_rn(moved, squared(wide(to.centroids[i * to.d + c]), wide(old[i * to.d + c])));
        }
        moved = striped(moved);
        if (threadIdx.x % WARP == 0) to.moved(p, moved);
    }
}

__device__ void settle(int64_t b, double* shift, const Active& active, const Verdict& verdict) {
    const int64_t all = active.problems(b);
    for (int64_t i = global_thread(); i < all; i += all_threads()) verdict.settle(active.problem(i), shift);
}

#define UPDATE(name, T, EACH, FACTOR)                                                                                  \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, SUM_BLOCKS)                                              \
        name(const T* x, Rows r, const double* factor, const double* largest, const double* heaviest,                  \
             const uint32_t* first_bad, const uint32_t* labels, const uint32_t* order, const uint32_t* offsets,        \
             int64_t rows, Clusters<T> to, Active active, Verdict verdict) {                                           \
        update<T, EACH, FACTOR>(x, r, factor, largest, heaviest, first_bad, labels, order, offsets, rows, to, active,  \
                                verdict);                                                                              \
    }
#define INSTANCE(name, T)                                                                                              \
    UPDATE(update_##name, T, 16 / sizeof(T), false)                                                                    \
    UPDATE(update_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                                   \
    UPDATE(update_narrow_##name, T, 1, false)                                                                          \
    UPDATE(update_narrow_weighted_##name, T, 1, true)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        medians_##name(const T* x, Rows r, const double* weights, const double* max_weight, const uint32_t* order,     \
                       const uint32_t* offsets, int64_t k, Active active, T* out) {                                    \
        medians(x, r, weights, max_weight, order, offsets, k, active, out);                                            \
    }                                                                                                                  \
    extern "C" __global__ void shift_##name(const T* old, int64_t b, Clusters<T> to, Active active) {                  \
        shift(old, b, to, active);                                                                                     \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef UPDATE

extern "C" __global__ void settle_shifts(int64_t b, double* shift, Active active, Verdict verdict) {
    settle(b, shift, active, verdict);
}
