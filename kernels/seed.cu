// The draws of the initialisation: the distance to the nearest seed, the race for the next one, and its winner.
//
// A weighted draw is an exponential race (Efraimidis and Spirakis 2006): every row has a key of its own, and the least
// wins. For each seed of k-means++ X is read once, by a warp for each row, and L + 2 numbers a row, read and written, L
// being the rows that are tried for it; where a distance is the definition's, one sequential f64 chain, one thread
// walks a whole row.
#include "exact/argmin.cuh"
#include "exact/spread.cuh"

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

struct Lowest {
    uint64_t key;
    uint32_t row;
};

__device__ __forceinline__ Lowest lower(Lowest a, Lowest b) {
    return b.key < a.key || (b.key == a.key && b.row < a.row) ? b : a;
}

/// The lowest row at the smallest key that any thread of the block has, to the first warp.
__device__ Lowest block_lowest(Lowest low) {
    __shared__ Lowest of_warps[WARP];
    const auto warp_lowest = [](Lowest v) {
        for (int lane = WARP / 2; lane; lane /= 2) {
            v = lower(v, {__shfl_xor_sync(~0u, v.key, lane), __shfl_xor_sync(~0u, v.row, lane)});
        }
        return v;
    };
    low = warp_lowest(low);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = low;
    __syncthreads();
    if (threadIdx.x < WARP) {
        low = warp_lowest(threadIdx.x < blockDim.x / WARP ? of_warps[threadIdx.x] : Lowest{UINT64_MAX, UINT32_MAX});
    }
    __syncthreads();
    return low;
}

/// True if `b` comes after `a` in a race.
__device__ __forceinline__ bool after(Lowest a, Lowest b) { return a.key < b.key || (a.key == b.key && a.row < b.row); }

/// The same lowest row to all threads.
__device__ Lowest block_winner(Lowest low) {
    __shared__ Lowest winner;
    low = block_lowest(low);
    if (threadIdx.x == 0) winner = low;
    __syncthreads();
    low = winner;
    __syncthreads();
    return low;
}

/// The race of step `i` of k-means++: the `count` rows of each problem with the lowest keys, in their order, to
/// `drawn` `(b, trials)`, but UINT32_MAX for those behind the first that nothing is drawn by; the first also to
/// `chosen`. `most` is the largest that a row is drawn by. A block takes `rows` rows; the last block of a problem
/// merges what each has found. `arrived` is zeros and left so.
__device__ void race_rows(const double* nearest, int64_t trials, const uint32_t* slot, const double* weights,
                          int64_t b_all, int64_t n, int64_t i, uint64_t seed, uint64_t round, int64_t first_problem,
                          int64_t rows, uint64_t* keys, uint64_t* part_keys, uint32_t* part_rows, double* part_most,
                          uint32_t* arrived, uint32_t* drawn, double* most, uint32_t* chosen, int64_t chosen_stride) {
    constexpr double RACED = 1e300;
    __shared__ bool last;
    __shared__ double largest;
    const int64_t parts = (n + rows - 1) / rows, count = i ? trials : 1;
    const Lowest none = {UINT64_MAX, UINT32_MAX};
    for (int64_t tile = blockIdx.x; tile < b_all * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, n);
        double own_most = 0;
        if (threadIdx.x == 0) largest = 0;
        __syncthreads();
        for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
            const int64_t at = b * n + row;
            const double near = i ? nearest[at * trials + slot[b]] : 1, weight = weights ? weights[at] : 1.0;
            const double key = race_key(seed, round, first_problem + b, row, near, weight);
            keys[at] = ordered<uint64_t>(__double_as_longlong(key));
            const double p = __dmul_rn(near, weight);
            if (near > 0 && p > own_most) own_most = p;
        }
        for (int lane = WARP / 2; lane; lane /= 2) own_most = fmax(own_most, __shfl_xor_sync(~0u, own_most, lane));
        if (threadIdx.x % WARP == 0) atomic_max(&largest, own_most);
        Lowest before = {0, 0};
        for (int64_t t = 0; t < count; ++t) {
            Lowest low = none;
            for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
                const Lowest own = {keys[b * n + row], uint32_t(row)};
                if (t == 0 || after(before, own)) low = lower(low, own);
            }
            before = block_winner(low);
            if (threadIdx.x == 0) part_keys[tile * trials + t] = before.key, part_rows[tile * trials + t] = before.row;
        }
        if (threadIdx.x == 0) {
            part_most[tile] = largest;
            __threadfence();
            last = atomicAdd(&arrived[b], 1) + 1 == parts;
        }
        __syncthreads();
        if (last) {
            __threadfence();
            for (int64_t t = 0; t < count; ++t) {
                Lowest low = none;
                for (int64_t e = threadIdx.x; e < parts * count; e += blockDim.x) {
                    const int64_t at = (b * parts + e / count) * trials + e % count;
                    const Lowest own = {__ldcg(&part_keys[at]), __ldcg(&part_rows[at])};
                    if (t == 0 || after(before, own)) low = lower(low, own);
                }
                before = block_winner(low);
                if (threadIdx.x == 0) {
                    const bool by_weight = before.key <= ordered<uint64_t>(__double_as_longlong(RACED));
                    drawn[b * trials + t] = t == 0 || by_weight ? before.row : UINT32_MAX;
                    if (t == 0) chosen[b * chosen_stride + i] = before.row;
                }
            }
            if (threadIdx.x == 0) {
                double all = 0;
                for (int64_t part = 0; part < parts; ++part) all = fmax(all, __ldcg(&part_most[b * parts + part]));
                most[b] = all, arrived[b] = 0;
            }
        }
        __syncthreads();
    }
}

/// Most rows that are tried: 2 + ln(2^32).
constexpr int MOST_TRIALS = 32;
/// Of these a warp meets so many at once.
constexpr int TRIED = 8;

/// The trial of step `i`: `nearest` `(b, n, trials)` becomes each row's distance to the nearest seed with each of the
/// rows that were `drawn`, of which the one with the least potential goes to `chosen`, and its number to `slot`. A warp
/// takes a row, a block `rows` rows; the last block of a problem decides. Potentials and `arrived` are zeros and left
/// so.
template <class T>
__device__ void try_rows(const T* x, const Rows& r, double* nearest, int64_t trials, uint32_t* slot,
                         const double* weights, const double* norms, const uint32_t* drawn, const double* most,
                         uint32_t* chosen, int64_t chosen_stride, int64_t i, int metric, int64_t rows,
                         unsigned long long* potentials, uint32_t* arrived) {
    __shared__ unsigned long long own_potentials[MOST_TRIALS];
    __shared__ bool last;
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP, by = spread_by(metric);
    const int64_t parts = (r.n + rows - 1) / rows, count = i ? trials : 1;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        const double units = potential_units(most[b], r.n);
        const uint32_t before = slot[b];
        const uint32_t* const tried = drawn + b * trials;
        if (threadIdx.x < MOST_TRIALS) own_potentials[threadIdx.x] = 0;
        __syncthreads();
        for (int64_t row = begin + threadIdx.x / WARP; row < end; row += blockDim.x / WARP) {
            const int64_t at = b * r.n + row;
            const double near = i ? nearest[at * trials + before] : nothing_near();
            const double weight = weights ? weights[at] : 1.0;
            // Else nothing is drawn by its distance.
            const bool counts = near > 0 && weight > 0;
            const T* const own = row_of(x, r, b, row);
            const F of_x = norms && counts ? reciprocal<F>(norms[at]) : F(1);
            __syncwarp();
            for (int64_t t0 = 0; t0 < count; t0 += TRIED) {
                const T* c[TRIED];
                F of_c[TRIED], sums[TRIED];
#pragma unroll
                for (int e = 0; e < TRIED; ++e) {
                    const bool drawn = t0 + e < count && tried[t0 + e] != UINT32_MAX;
                    const int64_t seed = drawn ? tried[t0 + e] : row;
                    c[e] = row_of(x, r, b, seed), sums[e] = 0;
                    of_c[e] = norms && counts ? reciprocal<F>(norms[b * r.n + seed]) : F(1);
                }
                if (counts) {
                    // One row to try is all that plain k-means++ has.
                    if (count == 1) {
                        const T* const one[] = {c[0]};
                        const F of_one[] = {of_c[0]};
                        F sum[1];
                        spread_sums(by, own, one, r.d, norms != nullptr, of_x, of_one, sum);
                        sums[0] = sum[0];
                    } else {
                        spread_sums(by, own, c, r.d, norms != nullptr, of_x, of_c, sums);
                    }
                }
                F sum = 0;
#pragma unroll
                for (int e = 0; e < TRIED; ++e) sum = lane == e ? sums[e] : sum;
                const int64_t t = t0 + lane;
                if (lane < TRIED && t < count) {
                    const uint32_t seed = tried[t];
                    double found = near;
                    if (seed == row) {
                        found = -1;
                    } else if (counts && seed != UINT32_MAX) {
                        found = fmin(near, spread_distance(by, double(sum), own, row_of(x, r, b, seed), r.d));
                        // One alone is chosen whatever it leaves.
                        if (count > 1) atomicAdd(&own_potentials[t], whole(__dmul_rn(found, weight), units));
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
    extern "C" __global__ void try_##name(                                                                             \
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

extern "C" __global__ void race_kmeanspp(const double* nearest, int64_t trials, const uint32_t* slot,
                                         const double* weights, int64_t b, int64_t n, int64_t i, uint64_t seed,
                                         uint64_t round, int64_t first_problem, int64_t rows, uint64_t* keys,
                                         uint64_t* part_keys, uint32_t* part_rows, double* part_most, uint32_t* arrived,
                                         uint32_t* drawn, double* most, uint32_t* chosen, int64_t chosen_stride) {
    race_rows(nearest, trials, slot, weights, b, n, i, seed, round, first_problem, rows, keys, part_keys, part_rows,
              part_most, arrived, drawn, most, chosen, chosen_stride);
}
