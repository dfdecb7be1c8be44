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
// A cluster with a term that is no such integer, or with a row that is not finite, is left to `update_exact`, which
// adds up its rows once more, whatever they are.
//
// Medians (Manhattan) need no sums: a median is found bit by bit, by counting.
#include <cuda_pipeline_primitives.h>

#include "exact/sums.cuh"

static_assert(THREADS % MEDIAN_COLUMNS == 0 && SUM_THREADS % WARP == 0, "whole columns, whole warps");
static_assert(SUM_ROWS <= 1024, "limbs have room for 2^10 terms");

/// The centroids of a fit, and where they are added up.
template <class T>
struct Clusters {
    T* centroids;               // (b, k, d), in place
    unsigned long long* slots;  // (b, k, d + 1, 2): sums, and the weight; zeros but for clusters under way
    uint32_t* added;            // (b, k): pieces in a slot, likewise
    uint32_t* finished;         // (b,): pieces that are done, likewise
    uint32_t* odd;              // (b, k): whether a cluster is left to `update_exact`, likewise
    uint32_t* odd_of;           // (b,): how many of a problem are, likewise
    uint32_t* odd_count;        // (2): how many are in all, and how many of them are done, likewise
    uint64_t* odd_list;         // (b k): which ones
    double* shift;              // (b,): the largest squared shift of the iteration, likewise; null if not wanted
    int64_t k, d;
    int divisor;

    __device__ __forceinline__ T* row(int64_t b, int64_t cluster) const { return centroids + (b * k + cluster) * d; }
    __device__ __forceinline__ unsigned long long* slot(int64_t b, int64_t cluster) const {
        return slots + (b * k + cluster) * (d + 1) * 2;
    }
    __device__ __forceinline__ void moved(int64_t b, double squared) const {
        if (shift) atomic_max(&shift[b], squared == squared ? squared : INFINITY);
    }

    /// Leaves a cluster to `update_exact`.
    __device__ __forceinline__ void leave(int64_t b, int64_t cluster) const {
        if (atomicExch(&odd[b * k + cluster], 1)) return;
        atomicAdd(&odd_of[b], 1);
        odd_list[atomicAdd(odd_count, 1)] = b * k + cluster;
    }
    __device__ __forceinline__ bool left(int64_t b, int64_t cluster) const { return __ldcg(&odd[b * k + cluster]); }
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

/// How the sorted places are cut: after every `rows`, but for clusters of at most `whole` rows, which belong to the
/// piece that they begin in.
struct Pieces {
    uint32_t rows, whole;

    /// How many a cluster has a part of, if it is no such cluster.
    __device__ __forceinline__ uint32_t of(uint32_t top, uint32_t bottom) const {
        return (bottom - 1) / rows - top / rows + 1;
    }
};

/// A warp on its way through a piece of the sorted places, with `EACH` columns a lane and as many rows at a time as
/// lanes are left for. So many rows are a step, SUM_STEPS steps a batch; while one batch is added up the next one is on
/// its way. Each lane fills and empties the ring of batches for itself.
template <class T, int EACH, bool FACTOR>
struct Warp {
    /// Halves span 40 bits: their sums are exact as they are.
    static constexpr bool EXACT = std::is_same<T, __half>::value && !FACTOR;
    static constexpr int LIMBS = sizeof(T) == 2 && !FACTOR ? 1 : 2, COLUMNS = WARP * EACH;
    static constexpr bool HALVES = sizeof(T) == 2 && EACH > 1 && !FACTOR;
    static constexpr int SCALE = HALVES ? Small<T>::SCALE : 0;  // of sums on their way
    static constexpr int UNROLLED = EXACT ? SUM_STEPS : 1;      // steps whose code is laid out
    static constexpr int AT_ONCE = 4;                           // columns of a lane when sums are finished

    struct alignas(sizeof(T) * EACH) Part {
        T values[EACH];
    };
    struct Shared {
        Part ring[SUM_BATCHES][SUM_STEPS][WARP];
        double factors[FACTOR ? SUM_BATCHES : 1][SUM_STEPS][WARP];
        __int128 rest[EXACT ? 1 : COLUMNS];  // zeros but for what limbs could not take
        uint32_t odd;                        // whether something could not be added; otherwise zero
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
    bool live, leads;          // whether it has any; whether it has the first
    uint32_t base;             // the first place of the batch that is added up
    uint32_t here, there;      // where in the ring that is, and where the next one asked for will be
    uint32_t rows[SUM_STEPS];  // row numbers of the batch to ask for next
    double sums[LIMBS][EACH];
    bool any_rest;

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
        any_rest = false;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) {
#pragma unroll
            for (int e = 0; e < EACH; ++e) sums[l][e] = 0;
        }
    }

    /// Adds up those rows of the batch that are at places `[place, stop)`, and adds their factors to `weight` in one
    /// lane of each row.
    __device__ __forceinline__ void add(uint32_t place, uint32_t stop, __int128& weight) {
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
                if (!fixed_quantise(f, weight_scale, q)) shared.odd = 1;
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
            bool rest = false;
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                double v = wide(part.values[e]);
                if (FACTOR) v = __dmul_rn(v, f);
                if (FACTOR && !isfinite(v)) {
                    v = 0;
                    if (units.dirty && f != 0) shared.odd = 1;
                }
                // Rounded toward zero, so that what is left has the sign of the term.
#pragma unroll
                for (int l = 0; l < LIMBS; ++l) {
                    const double rounder = copysign(units.rounder(l), v);
                    const double limb = units.extreme ? 0 : __dadd_rz(v, rounder) - rounder;
                    sums[l][e] += limb * power_of_two(-SCALE), v -= limb;
                }
                left[e] = v, rest |= v != 0;
            }
            if (rest) {
                any_rest = true;
#pragma unroll
                for (int e = 0; e < EACH; ++e) shared.limbs[0][lane * EACH + e] = left[e];
#pragma unroll 1
                for (uint32_t own = lane * EACH; own < (lane + 1) * EACH; ++own) {
                    __int128 q;
                    if (!fixed_quantise(shared.limbs[0][own], units.scale, q) || units.extreme) shared.odd = 1;
                    shared.rest[own] += q;
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
    __device__ __forceinline__ __int128 sum(uint32_t own, bool rest) const {
        __int128 q = 0;
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) q += units.value(l, limb(l, own));
        if (!EXACT && rest) {
#pragma unroll 1
            for (uint32_t at = own; at < COLUMNS; at += lanes * EACH) q += shared.rest[at];
        }
        return q;
    }
    __device__ __forceinline__ double total(uint32_t own, bool rest) const {
        if (!EXACT && rest) return fixed_value(sum(own, rest), units.scale);
        return LIMBS == 1 ? limb(0, own) : __dadd_rn(limb(0, own), limb(LIMBS - 1, own));
    }

    /// Leaves shared memory to the next rows.
    __device__ void leave(bool rest) {
        __syncwarp();
        shared.odd = 0;
        __syncwarp();
        if (EXACT || !rest) return;
#pragma unroll 1
        for (uint32_t at = lane; at < COLUMNS; at += WARP) shared.rest[at] = 0;
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
                if (__any_sync(~0u, some) && lane == 0) to.leave(b, cluster);
                return;
            }
            divisor = __dsqrt_rn(squares);
        }
        if (!(divisor > 0)) return;
        T* const row = to.row(b, cluster);
        double moved = 0;
#pragma unroll 1
        for (int64_t first = lane; first < r.d; first += WARP * AT_ONCE) {
            T old[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) old[i] = first + i * WARP < r.d ? row[first + i * WARP] : T(0.0f);
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                const int64_t c = first + i * WARP;
                if (c >= r.d) break;
                const T mean = rounded<T>(__ddiv_rn(total(c), divisor));
                moved = __dadd_rn(moved, squared(wide(mean), wide(old[i])));
                row[c] = mean;
            }
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
                    add(place, stop, weight);
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
                const bool rest = !EXACT && __any_sync(~0u, any_rest);
                if (shared.odd && lane == 0) to.leave(b, cluster);
                weight = total_weight(weight, stop - place);
                const bool whole = begin <= top && bottom - begin <= count;
                if (whole && r.d <= COLUMNS) {
                    if (!shared.odd) finish(cluster, as_weight(weight), [&](int64_t c) { return total(c, rest); });
                } else {
                    unsigned long long* const slot = to.slot(b, cluster);
                    bring(slot + 2 * first, min(r.d - first, int64_t(COLUMNS)), rest);
                    if (lane == 0 && first == 0) atomic_add(slot + 2 * r.d, weight);
                    if (first + COLUMNS >= r.d) add_last(cluster, slot, whole ? 1 : pieces.of(top, bottom));
                }
                leave(rest);
                place = stop;
            }
            __pipeline_wait_prior(0);
        }
    }

    /// Adds the sums of `columns` columns to a slot.
    __device__ __forceinline__ void bring(unsigned long long* slot, uint32_t columns, bool rest) const {
#pragma unroll 1
        for (uint32_t c = lane; c < columns; c += WARP) atomic_add(slot + 2 * c, sum(c, rest));
    }

    /// Finishes a cluster if its slot now holds all of its `pieces`.
    __device__ void add_last(uint32_t cluster, unsigned long long* slot, uint32_t pieces) {
        uint32_t* const added = to.added + (b * to.k + cluster);
        __threadfence();
        __syncwarp();
        const uint32_t others = __shfl_sync(~0u, lane == 0 ? atomicAdd(added, 1) : 0, 0);
        if (others + 1 != pieces) return;
        __threadfence();
        const auto at = [&](int64_t c) {
            return __int128((unsigned __int128)__ldcg(slot + 2 * c + 1) << 64 | __ldcg(slot + 2 * c));
        };
        if (!to.left(b, cluster)) {
            finish(cluster, as_weight(at(r.d)), [&](int64_t c) { return fixed_value(at(c), units.scale); });
        }
        __syncwarp();
#pragma unroll 1
        for (int64_t c = lane; c < 2 * (r.d + 1); c += WARP) slot[c] = 0;
        if (lane == 0) *added = 0;
    }
};

/// Each warp takes a piece.
template <class T, int EACH, bool FACTOR>
__device__ void update(const T* x, const Rows& r, const double* factor, const double* largest, const double* heaviest,
                       const uint32_t* first_bad, const uint32_t* labels, const uint32_t* order,
                       const uint32_t* offsets, const Pieces& pieces, const Clusters<T>& to, const Active& active,
                       const Verdict& verdict) {
    using Mine = Warp<T, EACH, FACTOR>;
    __shared__ typename Mine::Shared of_warps[SUM_THREADS / WARP];
    typename Mine::Shared& shared = of_warps[threadIdx.x / WARP];
    const uint32_t lane = threadIdx.x % WARP;
    if (lane == 0) shared.odd = 0;
    if (!Mine::EXACT) {
        for (uint32_t at = lane; at < Mine::COLUMNS; at += WARP) shared.rest[at] = 0;
    }
    __syncwarp();
    uint32_t lanes = 1;
    while (lanes < WARP && lanes * EACH < r.d) lanes *= 2;
    const int64_t each = (r.n + pieces.rows - 1) / pieces.rows;
    const int64_t items = active.problems(r.b) * each;
    for (int64_t item = global_thread() / WARP; item < items; item += all_threads() / WARP) {
        const uint32_t b = active.problem(item / each);
        uint32_t begin = item % each * pieces.rows, end = min(int64_t(begin) + pieces.rows, r.n);
        const uint32_t* const bounds = offsets + b * (to.k + 1);
        uint32_t cluster = 0;
        if (order) {
            // A cluster that the piece before sums as a whole is none of this one's, and one that this one sums may
            // reach beyond it.
            const uint32_t* const places = order + b * r.n;
            const uint32_t other = min(labels[b * r.n + places[end - 1]], uint32_t(to.k - 1));
            cluster = min(labels[b * r.n + places[begin]], uint32_t(to.k - 1));
            const uint32_t top = bounds[cluster], bottom = bounds[cluster + 1], last = bounds[other + 1];
            if (top < begin && bottom - top <= pieces.whole) begin = bottom, ++cluster;
            if (last - bounds[other] <= pieces.whole) end = last;
        }
        if (begin < end) {
            Mine warp = {shared,
                         r,
                         to,
                         b,
                         x + b * r.batch_stride,
                         factor ? factor + b * r.n : nullptr,
                         order ? order + b * r.n + begin : nullptr,
                         begin,
                         Units<T>(largest[b], heaviest ? heaviest[b] : 1, r.n, first_bad[b] != UINT32_MAX),
                         heaviest ? fixed_scale(heaviest[b], r.n) : 0,
                         lane,
                         lanes,
                         lane / lanes,
                         WARP / lanes,
                         end - begin,
                         cluster};
            warp.run(bounds, pieces);
        }
        if (!verdict.threshold) continue;
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(&to.finished[b], 1) + 1 == each) {
            __threadfence();
            if (!__ldcg(&to.odd_of[b])) verdict.settle(b, to.shift);
            to.finished[b] = 0;
        }
    }
}

// ---- Clusters that are left.

/// Each block takes a cluster that `update` has left, and LEFT_COLUMNS columns of it at a time; behind the last column
/// is the weight. Sums lie in the cluster's slot, and whoever adds the last ones finishes it and leaves zeros behind.
template <class T>
__device__ void update_exact(const T* x, const Rows& r, const double* factor, const uint32_t* first_bad,
                             const uint32_t* order, const uint32_t* offsets, const Clusters<T>& to,
                             const Verdict& verdict) {
    __shared__ unsigned long long words[LEFT_COLUMNS][Exact::WORDS];
    __shared__ bool last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t count = *to.odd_count;
    const int64_t groups = (r.d + 1 + LEFT_COLUMNS - 1) / LEFT_COLUMNS;
    for (int64_t item = blockIdx.x; item < count * groups; item += gridDim.x) {
        const int64_t at = to.odd_list[item / groups], first = item % groups * LEFT_COLUMNS;
        const int64_t b = at / to.k, cluster = at % to.k;
        const int64_t begin = order ? offsets[b * (to.k + 1) + cluster] : 0;
        const int64_t end = order ? offsets[b * (to.k + 1) + cluster + 1] : r.n;
        const bool dirty = first_bad[b] != UINT32_MAX;
        for (int i = threadIdx.x; i < LEFT_COLUMNS * Exact::WORDS; i += blockDim.x) words[0][i] = 0;
        __syncthreads();
        Gathered sums[LEFT_COLUMNS];
#pragma unroll 1
        for (int64_t next = begin + warp * WARP; next < end; next += blockDim.x) {
            const int64_t place = next + lane;
            double terms[LEFT_COLUMNS] = {};
            if (place < end) {
                const int64_t row = order ? order[b * r.n + place] : place;
                const T* const values = row_of(x, r, b, row);
                const double f = factor ? factor[b * r.n + row] : 1;
                if (!dirty || finite(values, r.d)) {
#pragma unroll
                    for (int c = 0; c < LEFT_COLUMNS; ++c) {
                        if (first + c < r.d) terms[c] = __dmul_rn(wide(values[first + c]), f);
                        if (first + c == r.d) terms[c] = f;
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < LEFT_COLUMNS; ++c) sums[c].add(terms[c]);
        }
#pragma unroll
        for (int c = 0; c < LEFT_COLUMNS; ++c) {
            const Exact& sum = sums[c].all();
#pragma unroll
            for (int i = 0; i < Exact::EACH; ++i) {
                if (sum.words[i]) atomicAdd(&words[c][lane + i * WARP], (unsigned long long)sum.words[i]);
            }
        }
        __syncthreads();
        Scaled* const slot = reinterpret_cast<Scaled*>(to.slot(b, cluster));
        if (warp < LEFT_COLUMNS && first + warp <= r.d) {
            Exact sum;
#pragma unroll
            for (int i = 0; i < Exact::EACH; ++i) {
                if (lane + i * WARP < Exact::WORDS) sum.words[i] = words[warp][lane + i * WARP];
            }
            const Scaled its = sum.rounded();
            if (lane == 0) slot[first + warp] = its;
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(&to.added[at], 1) + 1 == groups;
        __syncthreads();
        if (!last || warp > 0) continue;
        __threadfence();
        const auto total = [&](int64_t c) {
            const uint4 its = __ldcg(reinterpret_cast<const uint4*>(slot + c));
            return reinterpret_cast<const Scaled&>(its);
        };
        const Quotient by(
            to.divisor, total(r.d),
            [&](int64_t shift) {
                double squares = 0;
                for (int64_t c = lane; c < r.d; c += WARP) {
                    const double t = total(c).value(shift);
                    squares = __dadd_rn(squares, __dmul_rn(t, t));
                }
                return striped(squares);
            },
            [&] {
                int most = INT32_MIN;
                for (int64_t c = lane; c < r.d; c += WARP) {
                    const Scaled its = total(c);
                    if (its.significand != 0) most = max(most, int(its.exponent));
                }
                most = __reduce_max_sync(~0u, most);
                return int64_t(most == INT32_MIN ? 0 : most);
            });
        if (by.some()) {
            double moved = 0;
            for (int64_t c = lane; c < r.d; c += WARP) {
                T& old = to.row(b, cluster)[c];
                const T mean = rounded<T>(by.of(total(c)));
                moved = __dadd_rn(moved, squared(wide(mean), wide(old)));
                old = mean;
            }
            moved = striped(moved);
            if (lane == 0 && !(moved == 0)) to.moved(b, moved);
        }
        __syncwarp();
        for (int64_t c = lane; c <= r.d; c += WARP) slot[c] = {0, 0};
        if (lane == 0) {
            to.added[at] = to.odd[at] = 0;
            __threadfence();
            if (atomicSub(&to.odd_of[b], 1) == 1) {
                __threadfence();
                if (verdict.threshold) verdict.settle(b, to.shift);
            }
            if (atomicAdd(&to.odd_count[1], 1) + 1 == count) to.odd_count[0] = to.odd_count[1] = 0;
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

/// The sum over the threads of a column, to all of them.
__device__ __int128 column_sum(__int128 v) {
    __shared__ __int128 parts[THREADS];
    parts[threadIdx.x] = v;
    __syncthreads();
    v = 0;
    for (int i = threadIdx.x % MEDIAN_COLUMNS; i < THREADS; i += MEDIAN_COLUMNS) v += parts[i];
    __syncthreads();
    return v;
}

/// Bits of a weight that a window below the first one has.
constexpr int WINDOW = 94;

/// The bits of `v`, which is not negative, that window `i` of weights has: those of units of 2^-(scale + i * WINDOW),
/// but for the ones that the windows before have.
__device__ __forceinline__ __int128 window_of(double v, int scale, int i) {
    const uint64_t bits = __double_as_longlong(v), fraction = bits & ((1ull << 52) - 1);
    const int biased = int(bits >> 52);
    const uint64_t mantissa = biased ? fraction | 1ull << 52 : fraction;
    const int shift = (biased ? biased - 1075 : -1074) + scale + i * WINDOW;
    __int128 q = 0;
    if (shift >= 0 && shift <= 126) q = (unsigned __int128)mantissa << shift;
    if (shift < 0 && shift >= -63) q = mantissa >> -shift;
    return i > 0 ? q & (__int128(1) << WINDOW) - 1 : q;
}

/// The median of one cluster's column is the largest key with less than half of the weight below it. A block takes one
/// cluster and MEDIAN_COLUMNS columns and decides one bit of all its keys in each pass over the cluster's rows. Rows
/// without a positive weight, or that are not finite, are none of them.
///
/// What is below is compared with what is not by an exact sum of both, one window of the weights' bits after another:
/// nearly always all bits are in the first.
template <class T>
__device__ void medians(const T* x, const Rows& r, const double* weights, const double* max_weight,
                        const uint32_t* first_bad, const uint32_t* order, const uint32_t* offsets, int64_t k,
                        const Active& active, T* out) {
    using Key = decltype(key(T()));
    const int64_t groups = (r.d + MEDIAN_COLUMNS - 1) / MEDIAN_COLUMNS;
    const int part = threadIdx.x / MEDIAN_COLUMNS, parts = THREADS / MEDIAN_COLUMNS;
    const int64_t tiles = active.problems(r.b) * k * groups;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t b = active.problem(tile / (k * groups)), j = tile / groups % k;
        const int64_t column = tile % groups * MEDIAN_COLUMNS + threadIdx.x % MEDIAN_COLUMNS;
        const int64_t begin = offsets[b * (k + 1) + j] + part, end = offsets[b * (k + 1) + j + 1];
        const bool live = column < r.d, dirty = first_bad[b] != UINT32_MAX;
        const int scale = weights ? fixed_scale(max_weight[b], r.n) : 0;
        const auto weight_of = [&](int64_t row) {
            const double w = weights ? weights[b * r.n + row] : 1;
            return w > 0 && isfinite(w) && (!dirty || finite(row_of(x, r, b, row), r.d)) ? w : 0;
        };
        const auto bits_of = [&](int64_t row, int i) -> __int128 {
            const double w = weight_of(row);
            return weights ? window_of(w, scale, i) : w > 0;
        };
        bool some = false;
        int windows = 1;
        __int128 total = 0;  // of the first window's bits
        for (int64_t place = begin; place < end; place += parts) {
            const int64_t row = order[b * r.n + place];
            const double w = weight_of(row);
            some |= w > 0, total += bits_of(row, 0);
            __int128 q;
            if (!weights || fixed_quantise(w, scale, q)) continue;
            while (!fixed_quantise(w, scale + (windows - 1) * WINDOW, q)) ++windows;
        }
        total = column_sum(total);           // the same for the whole block, as both that follow
        some = __syncthreads_or(some);
        const bool several = __syncthreads_or(windows > 1);
        if (several) {
            // As many as the whole block needs.
            __shared__ int most;
            if (threadIdx.x == 0) most = 1;
            __syncthreads();
            atomicMax(&most, windows);
            __syncthreads();
            windows = most;
            __syncthreads();
        }
        Key median = 0;
        for (int bit = sizeof(Key) * 8 - 1; some && bit >= 0; --bit) {
            const Key bound = median | Key(Key(1) << bit);
            __int128 more = 0;  // of the weight below than not below
            for (int i = 0; i < windows; ++i) {
                __int128 here = 0;
                for (int64_t place = begin; place < end; place += parts) {
                    const int64_t row = order[b * r.n + place];
                    const bool below = live && key(row_of(x, r, b, row)[column]) < bound;
                    if (i == 0 && !below) continue;
                    const __int128 q = bits_of(row, i);
                    here += below ? q : -q;
                }
                here = column_sum(here);
                if (i == 0) here = 2 * here - total;
                // All windows that follow have less than 2^32 units of this one.
                if (more >> 32 == 0 || more >> 32 == -1) more = i ? (more << WINDOW) + here : here;
            }
            if (more < 0) median = bound;
        }
        if (live && part == 0 && some) from_key(median, out[(b * k + j) * r.d + column]);
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

/// Blocks that a multiprocessor should hold.
template <class T, int EACH, bool FACTOR>
constexpr int BLOCKS = FACTOR                                     ? SUM_BLOCKS_WEIGHTED
                       : Warp<T, EACH, FACTOR>::EXACT && EACH > 1 ? SUM_BLOCKS
                                                                  : SUM_BLOCKS_LIMBS;

#define UPDATE(name, T, EACH, FACTOR)                                                                                  \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, (BLOCKS<T, EACH, FACTOR>))                               \
        name(const T* x, Rows r, const double* factor, const double* largest, const double* heaviest,                  \
             const uint32_t* first_bad, const uint32_t* labels, const uint32_t* order, const uint32_t* offsets,        \
             Pieces pieces, Clusters<T> to, Active active, Verdict verdict) {                                          \
        update<T, EACH, FACTOR>(x, r, factor, largest, heaviest, first_bad, labels, order, offsets, pieces, to,        \
                                active, verdict);                                                                      \
    }
#define INSTANCE(name, T)                                                                                              \
    UPDATE(update_##name, T, 16 / sizeof(T), false)                                                                    \
    UPDATE(update_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                                   \
    UPDATE(update_narrow_##name, T, 1, false)                                                                          \
    UPDATE(update_narrow_weighted_##name, T, 1, true)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        medians_##name(const T* x, Rows r, const double* weights, const double* max_weight,                            \
                       const uint32_t* first_bad, const uint32_t* order, const uint32_t* offsets, int64_t k,           \
                       Active active, T* out) {                                                                        \
        medians(x, r, weights, max_weight, first_bad, order, offsets, k, active, out);                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LEFT_THREADS)                                                         \
        update_exact_##name(const T* x, Rows r, const double* factor, const uint32_t* first_bad,                       \
                            const uint32_t* order, const uint32_t* offsets, Clusters<T> to, Verdict verdict) {         \
        update_exact(x, r, factor, first_bad, order, offsets, to, verdict);                                            \
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
