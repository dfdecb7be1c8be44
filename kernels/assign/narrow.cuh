// Nearest centroids of rows of at most 8 columns: what one problem's centroids are turned into, and how its rows are
// labelled (see assign_narrow.cu).
#pragma once
#include "exact/argmin.cuh"

constexpr int GROUP = NARROW_GROUP;

/// The centroids of one problem in shared memory, `groups` groups of them, and what goes with them. There is room for
/// whole rounds of a tensor core's places, of which a place has one, two or a multiple of four (`narrow_padded` in
/// src/plan/assign.rs).
template <class F, int D>
struct Narrow {
    F* moved;         // (padded, D)
    F* bias;          // (padded): +inf for what cannot win
    uint32_t* table;  // (slots): of a hash 16 bits, and 1 + the first of equal centroids
    F* mu;            // (D)
    double* largest;  // norm of a moved centroid that is scored; squared Euclidean: bias
    ErrorShares* twice;
    int k, groups, padded, slots;

    __device__ Narrow(uint8_t* raw, int64_t k) : k(int(k)), groups(int((k + GROUP - 1) / GROUP)), slots(2) {
        while (slots < 2 * k) slots *= 2;
        const int rounds = int((k + NARROW_ROUND - 1) / NARROW_ROUND);
        padded = NARROW_ROUND * (rounds > 2 ? (rounds + 3) / 4 * 4 : rounds);
        largest = reinterpret_cast<double*>(raw), twice = reinterpret_cast<ErrorShares*>(raw + 8);
        moved = reinterpret_cast<F*>(raw + 16);
        bias = moved + padded * D;
        mu = bias + padded;
        table = reinterpret_cast<uint32_t*>(mu + D);
    }

    /// The median of the means of groups of values, a group to a lane: near the data, whatever a few of them are
    /// (Nemirovski and Yudin 1983). Zero if there is none that is finite.
    __device__ static double median(double mean) {
        const double infinite = nothing().distance, value = fabs(mean) < infinite ? mean : infinite;
        const int lane = threadIdx.x % WARP, count = __popc(__ballot_sync(~0u, value < infinite));
        const int rank = rank_among(value, lane, WARP, [&](int i) { return __shfl_sync(~0u, value, i); });
        const uint32_t middle = __ballot_sync(~0u, value < infinite && rank == (count - 1) / 2);
        return middle ? __shfl_sync(~0u, value, __ffs(middle) - 1) : 0;
    }

    template <class T>
    __device__ static bool equal(const T* a, const T* b, int64_t d) {
        bool same = true;
#pragma unroll 1
        for (int64_t q = 0; q < d; ++q) same &= wide(a[q]) == wide(b[q]);
        return same;
    }

    /// Fills in the centroids `c`, by the whole block. Sums are in a fixed order: a block's mu is every block's. Unless
    /// `centre`, mu stays what it was, for centroids that have moved a little.
    template <class T>
    __device__ void prepare(const T* c, int64_t stride, int64_t d, int metric, bool centre = true) const {
        const int lane = threadIdx.x % WARP;
        for (int i = threadIdx.x; i < slots; i += blockDim.x) table[i] = 0;
        if (threadIdx.x == 0) *largest = 0;
        if (centre && threadIdx.x == 0) *twice = error_shares<F>(d);
        for (int q = threadIdx.x / WARP; centre && q < D; q += blockDim.x / WARP) {
            const int64_t step = (k + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
            double sum = 0;
            int count = 0;
#pragma unroll 8
            for (int64_t j = lane * step; q < d && metric == SQUARED_EUCLIDEAN && j < k; j += WARP * step, ++count) {
                sum += wide(c[j * stride + q]);
            }
            const double middle = median(count ? sum / count : nothing().distance);
            if (lane == 0) mu[q] = rounded<F>(middle);
        }
        __syncthreads();
        double most = 0;
        for (int j = threadIdx.x; j < padded; j += blockDim.x) {
            const T* from = c + j * stride;
            double norm = 1, squares = 0;
            if (metric == COSINE && j < k) {
                for (int64_t q = 0; q < d; ++q) squares += wide(from[q]) * wide(from[q]);
                norm = sqrt(squares), squares = 0;
            }
            uint64_t hash = 0;
#pragma unroll
            for (int q = 0; q < D; ++q) {
                F v = 0;
                if (j < k && q < d) {
                    v = metric == COSINE ? rounded<F>(norm == 0 ? 0 : wide(from[q]) / norm) : filter(from[q]) - mu[q];
                    hash = mix(hash ^ uint64_t(__double_as_longlong(wide(from[q]) + 0.0)));
                }
                moved[j * D + q] = v;
                squares += double(v) * v;
            }
            bias[j] = INFINITY;
            if (j >= k) continue;
            const Scored<F> scored(metric, d, squares, norm);
            bias[j] = scored.bias;
            if (!scored.dropped) most = fmax(most, metric == SQUARED_EUCLIDEAN ? double(scored.bias) : scored.norm);
#pragma unroll
            for (int q = 0; q < D; ++q) moved[j * D + q] = scored.dropped ? F(0) : moved[j * D + q];
            // A hash's slot is the first free one, or that of an equal centroid. Of equal ones the first stays.
            __threadfence_block();  // a later one, found by another thread, loses its bias after it has got one
            const uint32_t own_entry = uint32_t(hash >> 48) << 16 | (j + 1);
            for (int at = int(hash) & (slots - 1);; at = (at + 1) & (slots - 1)) {
                const uint32_t entry = atomicCAS(&table[at], 0, own_entry);
                if (entry == 0) break;
                if ((entry ^ own_entry) >> 16 == 0 && equal(from, c + int64_t((entry & 0xffff) - 1) * stride, d)) {
                    bias[(max(atomicMin(&table[at], own_entry), own_entry) & 0xffff) - 1] = INFINITY;
                    break;
                }
            }
        }
        most = warp_max(most);
        if (lane == 0) atomic_max(largest, most);
        __syncthreads();
    }

    /// The score of a row (moved, and negated unless `DIFFERENCES`) and a centroid.
    template <bool DIFFERENCES>
    __device__ __forceinline__ static F score(const F (&x)[D], const F* centroid, F bias) {
        F s = bias;
#pragma unroll
        for (int q = 0; q < D; ++q) {
            if (DIFFERENCES) s += fabs(x[q] - centroid[q]);
            else s = fma(x[q], centroid[q], s);
        }
        return s;
    }
    template <bool DIFFERENCES>
    __device__ __forceinline__ F score(const F (&x)[D], int j) const {
        return score<DIFFERENCES>(x, moved + j * D, bias[j]);
    }
};

/// Neighbours that are loaded together.
template <class F, int COUNT>
struct alignas(COUNT * sizeof(F) < 16 ? COUNT * sizeof(F) : 16) Several {
    F values[COUNT];
};

/// Labels of rows as they are stored. Another type may do more with a label; `put` is called by all lanes of a warp.
struct StoredLabels {
    uint32_t* labels;
    __device__ __forceinline__ void put(bool live, int64_t row, int index) const {
        if (live) labels[row] = index;
    }
};

/// Labels the rows of a warp, one a lane, `v` less mu: by `index` where that is `proven`, else by the definition, among
/// the centroids whose score does not exceed `cutoff`.
template <class T, int D, bool DIFFERENCES, class Labels>
__device__ __forceinline__ void label_rows(const T* x, const Rows& r, int64_t b, const Filter<T> (&v)[D], int64_t row,
                                           bool live, bool proven, int index, double cutoff, const T* c, int64_t stride,
                                           const Narrow<Filter<T>, D>& to, int metric, const Labels& labels) {
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    labels.put(live && proven, row, index);
    // The warp decides the others one at a time.
    for (uint32_t left = __ballot_sync(~0u, live && !proven); left; left &= left - 1) {
        const int owner = __ffs(left) - 1;
        F row_values[D];
#pragma unroll
        for (int q = 0; q < D; ++q) row_values[q] = __shfl_sync(~0u, v[q], owner);
        const double row_cutoff = __shfl_sync(~0u, cutoff, owner);
        const int64_t unproven = __shfl_sync(~0u, row, owner);
        double row_squares = 0;
#pragma unroll
        for (int q = 0; q < D; ++q) row_squares += double(row_values[q]) * row_values[q];
        if (nowhere(row_squares) || without_direction<F>(metric, row_squares)) {
            int first = 0;
            while (!nowhere(row_squares) && first + 1 < to.k && to.bias[first] == INFINITY) ++first;
            labels.put(lane == 0, unproven, first);
            continue;
        }
        Best nearest = nothing();
        for (int j = lane; j < to.k; j += WARP) {
            if (to.template score<DIFFERENCES>(row_values, j) > row_cutoff) continue;  // a NaN stays
            const T *one = row_of(x, r, b, unproven), *other = c + j * stride;
            double d[1];
            distances_of(
                metric,
                [&](auto take) {
#pragma unroll 1
                    for (int64_t q = 0; q < r.d; ++q) take(0, wide(one[q]), wide(other[q]));
                },
                d);
            nearest = better(nearest, candidate(d[0], j));
        }
        nearest = warp_best(nearest);
        labels.put(lane == 0, unproven, nearest.index);
    }
}

/// Labels the rows `[first_row, end)` of problem `b`, by the whole block.
template <class T, int D, bool DIFFERENCES, class Labels>
__device__ __forceinline__ void assign_rows(const T* x, const Rows& r, int64_t b, int64_t first_row, int64_t end,
                                            const T* c, int64_t stride, const Narrow<Filter<T>, D>& to, int metric,
                                            const Labels& labels) {
    using F = Filter<T>;
    constexpr int ROWS = NARROW_ROWS / (sizeof(F) / 4);
    constexpr int AT_ONCE = D > 4 ? 1 : 4;  // centroids in registers
    for (int64_t base = first_row; base < end; base += ROWS * blockDim.x) {
        F v[ROWS][D], best[ROWS], second[ROWS];
        int group[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = min(base + i * blockDim.x + threadIdx.x, r.n - 1);
            const T* from = row_of(x, r, b, row);
#pragma unroll
            for (int q = 0; q < D; ++q) {
                const F moved = q < r.d ? filter(from[q]) - to.mu[q] : F(0);
                v[i][q] = DIFFERENCES ? moved : -moved;
            }
            best[i] = second[i] = INFINITY, group[i] = 0;
        }
        for (int g = 0; g < to.groups; ++g) {
            F low[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) low[i] = INFINITY;
#pragma unroll 1
            for (int first = g * GROUP; first < (g + 1) * GROUP; first += AT_ONCE) {
                const auto near = reinterpret_cast<const Several<F, AT_ONCE * D>&>(to.moved[first * D]);
                const auto bias = reinterpret_cast<const Several<F, AT_ONCE>&>(to.bias[first]);
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
#pragma unroll
                    for (int i = 0; i < ROWS; ++i) {
                        const F s = to.template score<DIFFERENCES>(v[i], near.values + j * D, bias.values[j]);
                        low[i] = fmin(low[i], s);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                second[i] = fmin(second[i], fmax(best[i], low[i]));
                group[i] = low[i] < best[i] ? g : group[i];
                best[i] = fmin(best[i], low[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            // The first of the group with its best score, and the best of the others.
            int index = UINT32_MAX >> 1;
            double squares = 0;
#pragma unroll 1
            for (int first = group[i] * GROUP; first < (group[i] + 1) * GROUP; first += AT_ONCE) {
                const auto near = reinterpret_cast<const Several<F, AT_ONCE * D>&>(to.moved[first * D]);
                const auto bias = reinterpret_cast<const Several<F, AT_ONCE>&>(to.bias[first]);
#pragma unroll
                for (int j = 0; j < AT_ONCE; ++j) {
                    const F s = to.template score<DIFFERENCES>(v[i], near.values + j * D, bias.values[j]);
                    const bool wins = s == best[i] && first + j < index;
                    second[i] = wins ? second[i] : fmin(second[i], s);
                    index = wins ? first + j : index;
                }
            }
#pragma unroll
            for (int q = 0; q < D; ++q) squares += double(v[i][q]) * v[i][q];
            // (A root that is rounded up is cheap in f32.)
            const double norm =
                sizeof(F) == 4 ? __fsqrt_ru(__double2float_ru(squares)) * (1 + 0x1p-20) : norm_above(squares, r.d);
            const int64_t row = base + i * blockDim.x + threadIdx.x;
            const F bias = to.bias[min(index, to.k - 1)];
            const double cutoff = score_cutoff<F>(metric, r.d, best[i], norm, *to.largest, bias, *to.twice);
            label_rows<T, D, DIFFERENCES>(x, r, b, v[i], row, row<end, second[i]> cutoff, index, cutoff, c, stride, to,
                                          metric, labels);
        }
    }
}
