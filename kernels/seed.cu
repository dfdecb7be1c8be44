// The draws of the initialisation: the distance to the nearest seed, the race for the next one, and its winner.
//
// A weighted draw is an exponential race (Efraimidis and Spirakis 2006): every row has a key of its own, and the least
// wins. For each block of k-means++ X is read once, by a warp for some rows, and two numbers a row, read and written;
// where a distance is the definition's, one sequential f64 chain, one thread walks a whole row.
#include "meet.cuh"
#include "race.cuh"

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

/// The arrivals of rows before there is a seed, each of which is as far as the others from what is not there.
__device__ void begin(const double* weights, int64_t b, int64_t n, uint64_t seed, uint64_t round, int64_t first_problem,
                      double* state) {
    for (int64_t i = global_thread(); i < b * n; i += all_threads()) {
        const int64_t at = i / n * 2 * n + i % n;
        state[at] = 1;
        state[at + n] = race_key(seed, round, first_problem + i / n, i % n, 1, weights ? weights[i] : 1.0);
    }
}

/// The seeds of a block of k-means++, whose rows `drawn` and arrivals `times` `(b, count)` are in their order: rows
/// arrive one after another, and each is a seed, which postpones the others (src/cpu/race.rs says why). Rows that are
/// taken go to the next of `wanted` columns of `chosen` and to `drawn`, with UINT32_MAX behind them, and their arrivals
/// to `times`, and `taken` counts them. `apart` `(b, count, count)` is room for the distances of the rows to each
/// other. A block takes a problem, and a lane of its first warp a row.
template <class T>
__device__ void take_rows(const T* x, const Rows& r, double* state, const double* weights, const double* norms,
                          int metric, uint32_t* drawn, double* times, int64_t count, double* apart, uint32_t* chosen,
                          int64_t wanted, uint32_t* taken) {
    const int lane = threadIdx.x % WARP, by = spread_by(metric);
    for (int64_t b = blockIdx.x; b < r.b; b += gridDim.x) {
        const int64_t before = taken[b];
        if (before >= wanted) continue;
        uint32_t* const rows = drawn + b * count;
        double* const own_apart = apart + b * count * count;
        double* const nearest = state + 2 * b * r.n;
        const auto weight_of = [&](int64_t row) { return weights ? weights[b * r.n + row] : 1.0; };
        const int64_t across = (count + TRIED - 1) / TRIED, tiles = (count + TOGETHER - 1) / TOGETHER * across;
        for (int64_t tile = threadIdx.x / WARP; tile < tiles; tile += blockDim.x / WARP) {
            const int64_t top = tile / across * TOGETHER, first = tile % across * TRIED;
            const int64_t own = top + lane / TRIED, other = first + lane % TRIED;
            const bool drawn_here = own < count && rows[own] != UINT32_MAX;
            const double near = drawn_here ? nearest[rows[own]] : 0;
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
            double near = waits ? nearest[row] : 0, arrival = waits ? times[b * count + lane] : 0;
            // Rows of no probability are all that is left, in their order.
            const bool certain = __shfl_sync(~0u, arrival, 0) > RACED;
            // After this one other rows may arrive.
            const Lowest last = {__shfl_sync(~0u, waits ? ordered_key(arrival) : UINT64_MAX, int(count - 1)),
                                 __shfl_sync(~0u, row, int(count - 1))};
            int64_t seeds = before;
            while (seeds < wanted) {
                const bool may = waits && (certain || near > 0);
                const Lowest next = warp_lowest({may ? ordered_key(arrival) : UINT64_MAX, row});
                if (next.key == UINT64_MAX || after(last, next)) break;
                const int winner = __ffs(__ballot_sync(~0u, may && row == next.row)) - 1;
                const double now = key_of(next.key);
                __syncwarp();
                if (lane == 0) {
                    chosen[b * wanted + seeds] = rows[seeds - before] = next.row;
                    times[b * count + seeds - before] = now;
                }
                ++seeds;
                waits &= lane != winner;
                if (waits && !certain) {
                    const double found = own_apart[lane * count + winner];
                    if (found < near) arrival = postponed(arrival, now, near, found), near = found;
                }
            }
            __syncwarp();
            if (lane < seeds - before) nearest[rows[lane]] = -1;
            else if (lane < count) rows[lane] = UINT32_MAX;
            if (lane == 0) taken[b] = uint32_t(seeds);
        }
        __syncthreads();
    }
}

/// The pass after a block: the distances to the nearest seed in `state` `(b, 2, n)` become those with the seeds that
/// the block has taken, and arrivals are postponed. A warp takes `TOGETHER` rows at a time, a block `rows` rows.
template <class T>
__device__ void lower_rows(const T* x, const Rows& r, double* state, const double* weights, const double* norms,
                           const uint32_t* seeds, const double* times, int64_t count, int start, int metric,
                           int64_t rows, const uint32_t* taken, int64_t wanted) {
    const int by = spread_by(metric);
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        // A distance to the last seed is nobody's probability.
        if (taken[b] >= wanted) continue;
        double *const nearest = state + 2 * b * r.n, *const arrivals = nearest + r.n;
        const int lane = threadIdx.x % WARP;
        for (int64_t top = begin + threadIdx.x / WARP * TOGETHER; top < end; top += blockDim.x / TRIED) {
            const auto row_at = [&](int q) { return min(top + q, end - 1); };
            const int64_t at = row_at(lane / TRIED);
            double near = start ? no_arrival() : nearest[at], arrival = arrivals[at];
            // Else nothing is drawn by its distance.
            const bool counts = near > 0 && (weights ? weights[b * r.n + at] : 1.0) > 0;
            bool lowered = false;
            for (int64_t first = 0; first < count && seeds[b * count + first] != UINT32_MAX; first += TRIED) {
                const double found = met(x, r, b, row_at, near, counts, norms, seeds + b * count, first, count, by);
                for (int e = 0; e < TRIED && first + e < count; ++e) {
                    const double one = __shfl_sync(~0u, found, lane / TRIED * TRIED + e);
                    if (!(one < near)) continue;
                    const double now = times[b * count + first + e];
                    // Time begins with the first seed: what is left of a wait may be too short to be added to what
                    // has been.
                    arrival =
                        start ? postponed(__dsub_rn(arrival, now), 0, 1, one) : postponed(arrival, now, near, one);
                    near = one, lowered = true;
                }
            }
            if (lowered && lane % TRIED == 0) nearest[at] = near, arrivals[at] = arrival;
        }
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
    extern "C" __global__ void __launch_bounds__(THREADS) take_##name(                                                 \
        const T* x, Rows r, double* state, const double* weights, const double* norms, int metric, uint32_t* drawn,    \
        double* times, int64_t count, double* apart, uint32_t* chosen, int64_t wanted, uint32_t* taken) {              \
        take_rows(x, r, state, weights, norms, metric, drawn, times, count, apart, chosen, wanted, taken);             \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, sizeof(T) > 4 ? 2 : 3)                                  \
        lower_##name(const T* x, Rows r, double* state, const double* weights, const double* norms,                    \
                     const uint32_t* seeds, const double* times, int64_t count, int start, int metric, int64_t rows,   \
                     const uint32_t* taken, int64_t wanted) {                                                          \
        lower_rows(x, r, state, weights, norms, seeds, times, count, start, metric, rows, taken, wanted);              \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void race_keys(const double* nearest, const double* weights, int64_t b, int64_t n, int64_t first,
                                     uint64_t seed, uint64_t round, int64_t first_problem, double* out) {
    race(nearest, weights, b, n, first, seed, round, first_problem, out);
}

extern "C" __global__ void begin_kmeanspp(const double* weights, int64_t b, int64_t n, uint64_t seed, uint64_t round,
                                          int64_t first_problem, double* state) {
    begin(weights, b, n, seed, round, first_problem, state);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    race_kmeanspp(const double* state, const double* weights, int64_t b, int64_t n, int64_t count,
                  const uint32_t* rounds, int64_t trials, uint64_t* part_keys, uint32_t* part_rows, double* part_most,
                  uint32_t* arrived, uint32_t* drawn, double* times, double* most, const uint32_t* taken,
                  int64_t wanted) {
    race_rows(state, weights, b, n, count, rounds, trials, part_keys, part_rows, part_most, arrived, drawn, times, most,
              taken, wanted);
}
