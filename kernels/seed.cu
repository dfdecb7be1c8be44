// The draws of the initialisation: the distance to the nearest seed, the race for the next one, and its winner.
//
// A weighted draw is an exponential race (Efraimidis and Spirakis 2006): every row has a key of its own, and the least
// wins. For each block of k-means++, or step of the greedy one, X is read once, by a warp for some rows, and L + 2
// numbers a row, read and written, L being the rows that are tried (1 of a block, whose seeds lower one number); where
// a distance is the definition's, one sequential f64 chain, one thread walks a whole row.
#include "exact/argmin.cuh"
#include "exact/spread.cuh"
#include "race.cuh"

__device__ __forceinline__ double nothing_near() { return __longlong_as_double(0x7ff0000000000000); }

/// The distance of a row to the nearest seed, with one more seed. A seed itself is marked -1, for good. A dot product
/// is no spread to seed by: it seeds by squared Euclidean distance.
template <class T>
__device__ __forceinline__ double nearer_by(double nearest, const T* x, const Rows& r, int64_t b, int64_t row,
                                            int64_t seed, int metric) {
    if (seed == row) return -1;
    if (nearest < 0 || seed >= r.n) return nearest;
    const double t = distance(spread_by(metric), row_of(x, r, b, row), row_of(x, r, b, seed), r.d);
    return fmin(nearest, t > 0 ? t : 0);
}

template <class T>
__device__ void nearer(const T* x, const Rows& r, const double* nearest, const uint32_t* newest, int metric,
                       double* out) {
    for (int64_t i = global_thread(); i < r.b * r.n; i += all_threads()) {
        const int64_t b = i / r.n;
        out[i] = nearer_by(nearest[i], x, r, b, i % r.n, newest[b], metric);
    }
}

template <class T>
__device__ bool can_be_seed(const T* row, int64_t d, double weight, int metric) {
    double square = 0;
    bool finite = true;
    for (int64_t j = 0; j < d; ++j) {
        const double v = wide(row[j]);
        square = __dadd_rn(square, __dmul_rn(v, v));
        finite &= isfinite(v);
    }
    return finite && weight > 0 && (metric != COSINE || (square > 0 && isfinite(square)));
}

/// Puts others in place of the `k` chosen rows that cannot be seeds, to `out`: each in turn gives way to the next row
/// after it that can be and is not chosen. One block takes a problem: its threads look at all chosen rows at once,
/// which is all there is to do as a rule, and then at `blockDim.x` rows at a time for one that gives way.
template <class T>
__device__ void usable_seeds(const T* x, const Rows& r, const double* weights, const uint32_t* chosen, int64_t k,
                             int metric, uint32_t* out) {
    __shared__ unsigned long long found;
    for (int64_t b = blockIdx.x; b < r.b; b += gridDim.x) {
        uint32_t* const rows = out + b * k;
        const auto usable = [&](int64_t i) {
            return can_be_seed(row_of(x, r, b, i), r.d, weights ? weights[b * r.n + i] : 1.0, metric);
        };
        bool all = true;
        for (int64_t j = threadIdx.x; j < k; j += blockDim.x) {
            rows[j] = chosen[b * k + j];
            all &= usable(rows[j]);
        }
        if (__syncthreads_and(all)) continue;
        for (int64_t j = 0; j < k; ++j) {
            const int64_t from = rows[j];
            if (usable(from)) continue;
            if (threadIdx.x == 0) found = ~0ull;
            __syncthreads();
            for (int64_t step = 1; step < r.n; step += blockDim.x) {
                const int64_t away = step + threadIdx.x, at = (from + away) % r.n;
                bool free = away < r.n && usable(at);
                for (int64_t other = 0; free && other < k; ++other) free = rows[other] != at;
                if (free) atomicMin(&found, (unsigned long long)(away));
                if (__syncthreads_or(free)) break;
            }
            __syncthreads();
            if (threadIdx.x == 0 && found != ~0ull) rows[j] = uint32_t((from + int64_t(found)) % r.n);
            __syncthreads();
        }
    }
}

/// The keys of rows of which the first is number `first` of its problem, and that is `first_problem` of its batch.
__device__ void race(const double* nearest, const double* weights, int64_t b, int64_t n, int64_t first, uint64_t seed,
                     uint64_t round, int64_t first_problem, double* out) {
    for (int64_t i = global_thread(); i < b * n; i += all_threads()) {
        out[i] = race_key(seed, round, first_problem + i / n, first + i % n, nearest[i], weights ? weights[i] : 1.0);
    }
}

/// Of the rows that become seeds so many meet rows at once, and so many rows: a pair to each lane of a warp.
constexpr int TRIED = 8, TOGETHER = WARP / TRIED;

/// The distance of row `row_at(lane / TRIED)` to seed `first + lane % TRIED`, by a warp: no farther than `near`, and -1
/// of the row itself. Where the row does not count, and where there is no seed, it is `near`.
template <class T, class RowAt>
__device__ double met(const T* x, const Rows& r, int64_t b, const RowAt& row_at, double near, bool counts,
                      const double* norms, const uint32_t* seeds, int64_t first, int64_t count, int by) {
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    F sum = 0;
    if (__any_sync(~0u, counts)) {
        const T *own[TOGETHER], *c[TRIED];
        F of_own[TOGETHER], of_c[TRIED];
        // A row that does not count may have no norm to divide by: what comes of it is not used.
#pragma unroll
        for (int q = 0; q < TOGETHER; ++q) {
            const int64_t row = row_at(q);
            own[q] = row_of(x, r, b, row), of_own[q] = norms ? reciprocal<F>(norms[b * r.n + row]) : F(1);
        }
#pragma unroll
        for (int e = 0; e < TRIED; ++e) {
            const bool drawn = first + e < count && seeds[first + e] != UINT32_MAX;
            const int64_t seed = drawn ? seeds[first + e] : row_at(0);
            c[e] = row_of(x, r, b, seed), of_c[e] = norms ? reciprocal<F>(norms[b * r.n + seed]) : F(1);
        }
        sum = spread_sum(by, own, c, r.d, norms != nullptr, of_own, of_c);
    }
    const int64_t t = first + lane % TRIED, row = row_at(lane / TRIED);
    const uint32_t seed = t < count ? seeds[t] : UINT32_MAX;
    if (seed == row) return -1;
    if (!counts || seed == UINT32_MAX) return near;
    return fmin(near, spread_distance(by, double(sum), row_of(x, r, b, row), row_of(x, r, b, seed), r.d));
}

/// Walks through the draws of a block of k-means++, whose rows `drawn` `(b, count)` are in the order of their first
/// arrivals: a row that arrives is taken with the share that is left of what it was drawn by, and arrives again
/// otherwise (src/cpu/kmeanspp.rs says why). Rows that are taken go to the next of `wanted` columns of `chosen` and to
/// `drawn`, with UINT32_MAX behind them, and `taken` counts them. `apart` `(b, count, count)` is room for the distances
/// of the rows to each other. A block takes a problem, and a lane of its first warp a row.
template <class T>
__device__ void take_rows(const T* x, const Rows& r, const double* nearest, const double* weights, const double* norms,
                          int start, int metric, uint64_t seed, uint64_t round, int64_t first_problem, uint32_t* drawn,
                          int64_t count, double* apart, uint32_t* chosen, int64_t wanted, uint32_t* taken) {
    const int lane = threadIdx.x % WARP, by = spread_by(metric);
    for (int64_t b = blockIdx.x; b < r.b; b += gridDim.x) {
        const int64_t before = taken[b];
        if (before >= wanted) continue;
        uint32_t* const rows = drawn + b * count;
        double* const own_apart = apart + b * count * count;
        const auto near_of = [&](int64_t row) { return start ? 1.0 : nearest[b * r.n + row]; };
        const auto weight_of = [&](int64_t row) { return weights ? weights[b * r.n + row] : 1.0; };
        const int64_t across = (count + TRIED - 1) / TRIED, tiles = (count + TOGETHER - 1) / TOGETHER * across;
        for (int64_t tile = threadIdx.x / WARP; tile < tiles; tile += blockDim.x / WARP) {
            const int64_t top = tile / across * TOGETHER, first = tile % across * TRIED;
            const int64_t own = top + lane / TRIED, other = first + lane % TRIED;
            const bool drawn_here = own < count && rows[own] != UINT32_MAX;
            const double near = drawn_here ? near_of(rows[own]) : 0;
            const auto row_at = [&](int q) {
                const uint32_t row = rows[min(top + q, count - 1)];
                return int64_t(row == UINT32_MAX ? 0 : row);
            };
            const bool counts = near > 0 && weight_of(row_at(lane / TRIED)) > 0;
            const double found = met(x, r, b, row_at, near, counts, norms, rows, first, count, by);
            if (drawn_here && other < count) own_apart[own * count + other] = found;
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            bool waits = lane < count && rows[min(int64_t(lane), count - 1)] != UINT32_MAX;
            const uint32_t row = waits ? rows[lane] : UINT32_MAX;
            const double near = waits ? near_of(row) : 0, p = waits ? __dmul_rn(near, weight_of(row)) : 0;
            double arrival = waits ? race_key(seed, round, first_problem + b, row, near, weight_of(row)) : 0;
            double now = near;
            // Rows of no probability are all that is left, in their order.
            const bool certain = __shfl_sync(~0u, arrival, 0) > RACED;
            uint64_t arrivals = 0;
            int64_t seeds = before;
            for (int64_t draw = 0; draw < count && seeds < wanted; ++draw) {
                const Lowest next = warp_lowest({waits ? ordered_key(arrival) : UINT64_MAX, row});
                if (next.key == UINT64_MAX) break;
                const int winner = __ffs(__ballot_sync(~0u, waits && row == next.row)) - 1;
                bool takes = false;
                if (lane == winner) {
                    const double share = uniform(seed, beside(round, 2 * arrivals + 1), first_problem + b, row);
                    takes = certain || now >= near || __dmul_rn(share, near) < now;
                }
                if (__shfl_sync(~0u, takes, winner)) {
                    if (lane == 0) chosen[b * wanted + seeds] = rows[seeds - before] = next.row;
                    ++seeds;
                    waits &= lane != winner;
                    if (waits) now = fmin(now, own_apart[lane * count + winner]);
                } else if (lane == winner) {
                    const double wait = exponential(seed, beside(round, 2 * arrivals + 2), first_problem + b, row);
                    arrival = fmin(__dadd_rn(arrival, __ddiv_rn(wait, p)), RACED);
                    ++arrivals;
                }
            }
            __syncwarp();
            if (lane < count && lane >= seeds - before) rows[lane] = UINT32_MAX;
            if (lane == 0) taken[b] = uint32_t(seeds);
        }
        __syncthreads();
    }
}

/// The pass after a block: `nearest` `(b, n)` becomes each row's distance to the nearest seed with those that the block
/// has taken. A warp takes `TOGETHER` rows at a time, a block `rows` rows.
template <class T>
__device__ void lower_rows(const T* x, const Rows& r, double* nearest, const double* weights, const double* norms,
                           const uint32_t* seeds, int64_t count, int start, int metric, int64_t rows,
                           const uint32_t* taken, int64_t wanted) {
    const int by = spread_by(metric);
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        // A distance to the last seed is nobody's probability.
        if (taken[b] >= wanted) continue;
        const int lane = threadIdx.x % WARP;
        for (int64_t top = begin + threadIdx.x / WARP * TOGETHER; top < end; top += blockDim.x / TRIED) {
            const auto row_at = [&](int q) { return min(top + q, end - 1); };
            const int64_t at = b * r.n + row_at(lane / TRIED);
            const double near = start ? nothing_near() : nearest[at];
            // Else nothing is drawn by its distance.
            const bool counts = near > 0 && (weights ? weights[at] : 1.0) > 0;
            double low = near;
            for (int64_t first = 0; first < count && seeds[b * count + first] != UINT32_MAX; first += TRIED) {
                low = fmin(low, met(x, r, b, row_at, near, counts, norms, seeds + b * count, first, count, by));
            }
            for (int step = TRIED / 2; step; step /= 2) low = fmin(low, __shfl_xor_sync(~0u, low, step));
            if (lane % TRIED == 0) nearest[at] = low;
        }
    }
}

/// Most rows that are tried: 2 + ln(2^32).
constexpr int MOST_TRIALS = 32;

/// The trial of step `i`: `nearest` `(b, n, trials)` becomes each row's distance to the nearest seed with each of the
/// rows that were `drawn`, of which the one with the least potential goes to `chosen`, and its number to `slot`. A warp
/// takes `TOGETHER` rows at a time, a block `rows` rows; the last block of a problem decides. Potentials and `arrived`
/// are zeros and left so.
template <class T>
__device__ void try_rows(const T* x, const Rows& r, double* nearest, int64_t trials, uint32_t* slot,
                         const double* weights, const double* norms, const uint32_t* drawn, const double* most,
                         uint32_t* chosen, int64_t chosen_stride, int64_t i, int metric, int64_t rows,
                         unsigned long long* potentials, uint32_t* arrived) {
    __shared__ unsigned long long own_potentials[MOST_TRIALS];
    __shared__ bool last;
    const int lane = threadIdx.x % WARP, by = spread_by(metric);
    const int64_t parts = (r.n + rows - 1) / rows, count = i ? trials : 1;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        const double units = potential_units(most[b], r.n);
        const uint32_t before = slot[b];
        const uint32_t* const tried = drawn + b * count;
        if (threadIdx.x < MOST_TRIALS) own_potentials[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t top = begin + threadIdx.x / WARP * TOGETHER; top < end; top += blockDim.x / TRIED) {
            const auto row_at = [&](int q) { return min(top + q, end - 1); };
            const int64_t row = row_at(lane / TRIED), at = b * r.n + row;
            const double near = i ? nearest[at * trials + before] : nothing_near();
            const double weight = weights ? weights[at] : 1.0;
            // Else nothing is drawn by its distance.
            const bool counts = near > 0 && weight > 0, own = top + lane / TRIED < end;
            __syncwarp();
            for (int64_t first = 0; first < count; first += TRIED) {
                const double found = met(x, r, b, row_at, near, counts, norms, tried, first, count, by);
                const int64_t t = first + lane % TRIED;
                if (own && t < count) {
                    // One alone is chosen whatever it leaves.
                    if (count > 1 && counts && tried[t] != UINT32_MAX && tried[t] != row) {
                        atomicAdd(&own_potentials[t], whole(__dmul_rn(found, weight), units));
                    }
                    nearest[at * trials + t] = found;
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < count) atomicAdd(&potentials[b * trials + threadIdx.x], own_potentials[threadIdx.x]);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(&arrived[b], 1) + 1 == parts;
            if (last) {
                __threadfence();
                int64_t best = 0;
                for (int64_t t = 1; t < count; ++t) {
                    const bool less = __ldcg(&potentials[b * trials + t]) < __ldcg(&potentials[b * trials + best]);
                    if (tried[t] != UINT32_MAX && less) best = t;
                }
                for (int64_t t = 0; t < count; ++t) potentials[b * trials + t] = 0;
                chosen[b * chosen_stride + i] = tried[best], slot[b] = uint32_t(best), arrived[b] = 0;
            }
        }
        __syncthreads();
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void usable_seeds_##name(const T* x, Rows r, const double* weights, const uint32_t* chosen,  \
                                                   int64_t k, int metric, uint32_t* out) {                             \
        usable_seeds(x, r, weights, chosen, k, metric, out);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void nearer_##name(const T* x, Rows r, const double* nearest, const uint32_t* newest,        \
                                             int metric, double* out) {                                                \
        nearer(x, r, nearest, newest, metric, out);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        take_##name(const T* x, Rows r, const double* nearest, const double* weights, const double* norms, int start,  \
                    int metric, uint64_t seed, uint64_t round, int64_t first_problem, uint32_t* drawn, int64_t count,  \
                    double* apart, uint32_t* chosen, int64_t wanted, uint32_t* taken) {                                \
        take_rows(x, r, nearest, weights, norms, start, metric, seed, round, first_problem, drawn, count, apart,       \
                  chosen, wanted, taken);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3) lower_##name(                    \
        const T* x, Rows r, double* nearest, const double* weights, const double* norms, const uint32_t* seeds,        \
        int64_t count, int start, int metric, int64_t rows, const uint32_t* taken, int64_t wanted) {                   \
        lower_rows(x, r, nearest, weights, norms, seeds, count, start, metric, rows, taken, wanted);                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3) try_##name(                      \
        const T* x, Rows r, double* nearest, int64_t trials, uint32_t* slot, const double* weights,                    \
        const double* norms, const uint32_t* drawn, const double* most, uint32_t* chosen, int64_t chosen_stride,       \
        int64_t i, int metric, int64_t rows, unsigned long long* potentials, uint32_t* arrived) {                      \
        try_rows(x, r, nearest, trials, slot, weights, norms, drawn, most, chosen, chosen_stride, i, metric, rows,     \
                 potentials, arrived);                                                                                 \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void race_keys(const double* nearest, const double* weights, int64_t b, int64_t n, int64_t first,
                                     uint64_t seed, uint64_t round, int64_t first_problem, double* out) {
    race(nearest, weights, b, n, first, seed, round, first_problem, out);
}

extern "C" __global__ void race_kmeanspp(const double* nearest, int64_t width, const uint32_t* slot,
                                         const double* weights, int64_t b, int64_t n, int start, int64_t count,
                                         uint64_t seed, uint64_t round, int64_t first_problem, int64_t rows,
                                         uint64_t* keys, uint64_t* part_keys, uint32_t* part_rows, double* part_most,
                                         uint32_t* arrived, uint32_t* drawn, double* most, const uint32_t* taken,
                                         int64_t wanted) {
    race_rows(nearest, width, slot, weights, b, n, start, count, seed, round, first_problem, rows, keys, part_keys,
              part_rows, part_most, arrived, drawn, most, taken, wanted);
}
