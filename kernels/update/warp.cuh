// A warp that adds up a piece of the rows in cluster order (update.cu says how sums are cut).
#pragma once
#include <cuda_pipeline_primitives.h>

#include "update/clusters.cuh"

static_assert(SUM_THREADS % WARP == 0, "whole warps");
static_assert(SUM_ROWS <= 1024, "limbs have room for 2^10 terms");

/// The use of the sums that a warp adds up.
enum SumsMode {
    PASSING,  // they make centroids, or are added to those of other blocks of rows
    KEPT,     // they make centroids and stay in their slots, of problems that keep them
};

/// A warp on its way through a piece of the sorted places, with `EACH` columns a lane and as many rows at a time as
/// lanes are left for. So many rows are a step, SUM_STEPS steps a batch; while one batch is added up the next one is on
/// its way. Each lane fills and empties the ring of batches for itself.
template <class T, int EACH, bool FACTOR, SumsMode MODE = PASSING>
struct PieceWarp {
    /// All f16 values are whole numbers of 2^-24 below 2^16: 40 bits, so an f64 adds them exactly without limbs.
    static constexpr bool EXACT = std::is_same<T, __half>::value && !FACTOR;
    static constexpr int LIMBS = sizeof(T) == 2 && !FACTOR ? 1 : 2, COLUMNS = WARP * EACH;
    static constexpr bool HALVES = sizeof(T) == 2 && EACH > 1 && !FACTOR;
    static constexpr int SCALE = HALVES ? Small<T>::SCALE : 0;  // sums in registers are 2^-SCALE of their value
    static constexpr int UNROLLED = EXACT ? SUM_STEPS : 1;      // steps that are unrolled

    struct alignas(sizeof(T) * EACH) Part {
        T values[EACH];
    };
    struct Shared {
        Part ring[SUM_BATCHES][SUM_STEPS][WARP];
        double factors[FACTOR ? SUM_BATCHES : 1][SUM_STEPS][WARP];
        __int128 remainder[EXACT ? 1 : COLUMNS];  // zeros but for what limbs could not take
        uint32_t odd;                             // whether something could not be added; otherwise zero
        double limbs[LIMBS][COLUMNS];
    };

    Shared& shared;
    const Rows& r;
    const Clusters<T>& to;
    uint32_t b;
    const T* x;             // of problem `b`, as all that follow
    const double* factor;   // (n)
    const uint32_t* order;  // from the piece on; null if rows are in order
    uint32_t begin;         // of the piece
    Units<T> units;
    int weight_scale;
    uint32_t lane, lanes, group, groups;  // `lanes` of them to a row, in so many groups
    uint32_t count;                       // places of the piece; they are counted from its begin
    uint32_t first_cluster;               // which the piece begins in

    // ---- The rows of a piece, from column `first` on.

    const T* from;             // this lane's columns of row 0
    bool live, leads;          // whether it has any columns; whether it has the first
    uint32_t base;             // the first place of the batch that is added up
    uint32_t here, there;      // where in the ring that is, and where the next one asked for will be
    uint32_t rows[SUM_STEPS];  // row numbers of the batch to ask for next
    double sums[LIMBS][EACH];
    bool any_remainder;

    /// Looks up the rows at places from `base` on.
    __device__ __forceinline__ void look_up(uint32_t base) {
#pragma unroll
        for (int u = 0; u < SUM_STEPS; ++u) {
            const uint32_t place = min(base + u * groups + group, count - 1);
            rows[u] = order ? order[place] : begin + place;
        }
    }

    /// Asks for the batch at places from `next` on, which has been looked up, and looks up the one that follows.
    __device__ __forceinline__ void ask(uint32_t next) {
        if (live && next < count) {
#pragma unroll
            for (int u = 0; u < SUM_STEPS; ++u) {
                Part* const part = &shared.ring[there][u][lane];
                // Whole parts come with strides of less than 2^32 (and anything else without).
                const uint64_t at = EACH > 1 ? rows[u] * uint64_t(uint32_t(r.row_stride)) : rows[u] * r.row_stride;
                if constexpr (sizeof(Part) < 4) *part = *reinterpret_cast<const Part*>(from + at);
                else __pipeline_memcpy_async(part, from + at, sizeof(Part));
                if (FACTOR) __pipeline_memcpy_async(&shared.factors[there][u][lane], &factor[rows[u]], sizeof(double));
            }
        }
        __pipeline_commit();
        there = there + 1 < SUM_BATCHES ? there + 1 : 0;
        if (next + batch() < count) look_up(next + batch());
    }

    /// Waits for the batch at `base`, and asks for another in the place of the one before.
    __device__ __forceinline__ void arrive() {
        ask(base + (SUM_BATCHES - 1) * batch());
        __pipeline_wait_prior(SUM_BATCHES - 1);
    }

    __device__ __forceinline__ uint32_t batch() const { return SUM_STEPS * groups; }

    __device__ __forceinline__ void clear() {
        any_remainder = false;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[l][e] = 0;
        }
    }

    /// Adds up those rows of the batch that are at places `[place, stop)`, and adds their factors to `weight` in one
    /// lane of each row.
    __device__ __forceinline__ void add(uint32_t cluster, uint32_t place, uint32_t stop, __int128& weight) {
        const bool all = place <= base && base + batch() <= stop;
        if (!live) return;
#pragma unroll(UNROLLED)
        for (int u = 0; u < SUM_STEPS; ++u) {
            const uint32_t at = base + u * groups + group;
            Part part = shared.ring[here][u][lane];
            if (!all && (at < place || at >= stop)) part = Part();
            if (!FACTOR && units.dirty) {
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    if (isfinite(wide(part.values[e]))) continue;
                    part.values[e] = T(0.0f), shared.odd = 1;
                }
            }
            const double f = FACTOR ? all || (at >= place && at < stop) ? shared.factors[here][u][lane] : 0 : 1;
            if (FACTOR && to.divisor == WEIGHT && leads) {
                __int128 q;
                if (!fixed_quantise(f, weight_scale, q)) {
                    if (to.planes) q = to.split(b, cluster, r.d, f, weight_scale);
                    else shared.odd = 1;
                }
                weight += q;
            }
            if (EXACT || (!FACTOR && units.fit(part.values))) {
                if constexpr (HALVES) {
#pragma unroll
                    for (int e = 0; e < EACH; e += 2) {
                        const uint32_t two = reinterpret_cast<const uint32_t&>(part.values[e]);
                        sums[0][e] += Small<T>::low(two), sums[0][e + 1] += Small<T>::high(two);
                    }
                } else {
#pragma unroll
                    for (int e = 0; e < EACH; ++e) sums[0][e] += wide(part.values[e]);
                }
                continue;
            }
            double left[EACH];
            bool remainder = false;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                double v = wide(part.values[e]);
                if (FACTOR) v = __dmul_rn(v, f);
                if (FACTOR && !isfinite(v)) {
                    v = 0;
                    if (units.dirty && f != 0) shared.odd = 1;
                }
#pragma unroll
                for (int l = 0; l < LIMBS; ++l) sums[l][e] += units.take_limb(l, v) * power_of_two(-SCALE);
                left[e] = v, remainder |= v != 0;
            }
            if (remainder) {
                any_remainder = true;
#pragma unroll
                for (int e = 0; e < EACH; ++e) shared.limbs[0][lane * EACH + e] = left[e];
#pragma unroll 1
                for (uint32_t own = lane * EACH; own < (lane + 1) * EACH; ++own) {
                    const double v = shared.limbs[0][own];
                    __int128 q;
                    const bool whole = fixed_quantise(v, units.scale, q);
                    if (!to.planes && (!whole || units.extreme)) shared.odd = 1;
                    if (to.planes && !whole) q = to.split(b, cluster, from - x + own % EACH, v, units.scale);
                    shared.remainder[own] += q;
                }
            }
        }
    }

    /// The part of a column's sum in limb `l`, over all rows.
    __device__ __forceinline__ double limb(int l, uint32_t own) const {
        double sum = 0;
        for (uint32_t at = own; at < COLUMNS; at += lanes * EACH) sum += shared.limbs[l][at];
        return sum;
    }

    /// The sum of a column of what was added last, as an integer and rounded.
    __device__ __forceinline__ __int128 sum(uint32_t own, bool remainder) const {
        __int128 q = 0;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) q += units.value(l, limb(l, own));
        if (!EXACT && remainder) {
#pragma unroll 1
            for (uint32_t at = own; at < COLUMNS; at += lanes * EACH) q += shared.remainder[at];
        }
        return q;
    }
    __device__ __forceinline__ double total(uint32_t own, bool remainder) const {
        if (!EXACT && remainder) return fixed_value(sum(own, remainder), units.scale);
        return LIMBS == 1 ? limb(0, own) : __dadd_rn(limb(0, own), limb(LIMBS - 1, own));
    }

    /// Leaves shared memory to the next rows.
    __device__ void clear_remainders(bool remainder) {
        __syncwarp();
        shared.odd = 0;
        __syncwarp();
        if (EXACT || !remainder) return;
#pragma unroll 1
        for (uint32_t at = lane; at < COLUMNS; at += WARP) shared.remainder[at] = 0;
        __syncwarp();
    }

    /// Replaces the centroid of `cluster` by `total(column) / divisor`; one of no weight stays. What squares of f64
    /// cannot measure is left to `update_exact`.
    template <class Total>
    __device__ __forceinline__ void finish(int64_t cluster, double weight, Total total) const {
        double divisor = to.divisor == ONE ? 1 : weight;
        if (to.divisor == NORM) {
            double squares = 0;
            bool some = false;
#pragma unroll 1
            for (int64_t c = lane; c < r.d; c += WARP) {
                const double t = total(c);
                squares = __dadd_rn(squares, __dmul_rn(t, t)), some |= t != 0;
            }
            squares = striped(squares);
            if (!EXACT && !(LEAST_SQUARES <= squares && squares <= MOST_SQUARES)) {
                if (__any_sync(~0u, some) && lane == 0) to.mark_odd(b, cluster);
                return;
            }
            divisor = __dsqrt_rn(squares);
        }
        divide(to, b, cluster, r.d, lane, divisor, total);
    }

    /// The weight of a cluster of `size` rows, from what the lanes have added up.
    __device__ __int128 total_weight(__int128 weight, int64_t size) const {
        if (!FACTOR || to.divisor != WEIGHT) return size;
        return warp_sum(weight);
    }
    __device__ double as_weight(__int128 weight) const {
        return FACTOR && to.divisor == WEIGHT ? fixed_value(weight, weight_scale) : double(int64_t(weight));
    }

    /// Adds up the piece. Without an order all rows are in one cluster.
    __device__ __forceinline__ void run(const uint32_t* offsets, const Pieces& pieces) {
        for (int64_t first = 0; first < r.d; first += COLUMNS) {
            const int64_t column = first + lane % lanes * EACH;
            from = x + column, live = column < r.d, leads = column == 0;
            uint32_t cluster = first_cluster;
            base = here = there = 0;
            look_up(0);
#pragma unroll 1
            for (int i = 0; i + 1 < SUM_BATCHES; ++i) ask(i * batch());
            arrive();
            for (uint32_t place = 0; place < count; ++cluster) {
                const uint32_t top = order ? offsets[cluster] : 0;
                const uint32_t bottom = order ? offsets[cluster + 1] : uint32_t(r.n);
                if (bottom <= begin + place) continue;
                const uint32_t stop = min(bottom - begin, count);
                __int128 weight = 0;
                clear();
                for (;;) {
                    add(cluster, place, stop, weight);
                    if (stop < base + batch()) break;
                    base += batch();
                    here = here + 1 < SUM_BATCHES ? here + 1 : 0;
                    arrive();
                    if (base >= stop) break;
                }
#pragma unroll
                for (int l = 0; l < LIMBS; ++l) {
#pragma unroll
                    for (int e = 0; e < EACH; ++e) shared.limbs[l][lane * EACH + e] = sums[l][e] * power_of_two(SCALE);
                }
                __syncwarp();
                const bool remainder = !EXACT && __any_sync(~0u, any_remainder);
                weight = total_weight(weight, stop - place);
                if (shared.odd && lane == 0 && !to.planes) to.mark_odd(b, cluster);
                const bool whole = begin <= top && bottom - begin <= count;
                if (whole && r.d <= COLUMNS && !to.planes) {
                    if (!shared.odd) finish(cluster, as_weight(weight), [&](int64_t c) { return total(c, remainder); });
                    if (MODE == KEPT && to.keeps(b)) keep(to.slot(b, cluster), weight, remainder);
                } else {
                    unsigned long long* const slot = to.slot(b, cluster);
                    flush_to_slot(slot + 2 * first, min(r.d - first, int64_t(COLUMNS)), remainder);
                    if (lane == 0 && first == 0) atomic_add(slot + 2 * r.d, weight);
                    if (first + COLUMNS >= r.d && !to.planes) {
                        finish_if_last(cluster, slot, whole ? 1 : pieces.count(top, bottom));
                    }
                }
                clear_remainders(remainder);
                place = stop;
            }
            __pipeline_wait_prior(0);
        }
    }

    /// Adds the sums of `columns` columns to a slot.
    __device__ __forceinline__ void flush_to_slot(unsigned long long* slot, uint32_t columns, bool remainder) const {
#pragma unroll 1
        for (uint32_t c = lane; c < columns; c += WARP) atomic_add(slot + 2 * c, sum(c, remainder));
    }

    /// Leaves the sums of a whole cluster to the next update.
    __device__ __forceinline__ void keep(unsigned long long* slot, __int128 weight, bool remainder) const {
#pragma unroll 1
        for (uint32_t c = lane; c < r.d; c += WARP) reinterpret_cast<__int128*>(slot)[c] = sum(c, remainder);
        if (lane == 0) reinterpret_cast<__int128*>(slot)[r.d] = weight;
    }

    /// Finishes a cluster if its slot now holds all of its `pieces`.
    __device__ void finish_if_last(uint32_t cluster, unsigned long long* slot, uint32_t pieces) {
        uint32_t* const added = to.added + (b * to.k + cluster);
        __threadfence();
        __syncwarp();
        const uint32_t others = __shfl_sync(~0u, lane == 0 ? atomicAdd(added, 1) : 0, 0);
        if (others + 1 != pieces) return;
        __threadfence();
        const auto at = [&](int64_t c) {
            return __int128((unsigned __int128)__ldcg(slot + 2 * c + 1) << 64 | __ldcg(slot + 2 * c));
        };
        if (!to.is_odd(b, cluster)) {
            finish(cluster, as_weight(at(r.d)), [&](int64_t c) { return fixed_value(at(c), units.scale); });
        }
        __syncwarp();
        if (lane == 0) *added = 0;
        if (MODE == KEPT && to.keeps(b)) return;
#pragma unroll 1
        for (int64_t c = lane; c < 2 * (r.d + 1); c += WARP) slot[c] = 0;
    }
};
