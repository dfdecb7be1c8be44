// The draws of the initialisation: the distance to the nearest seed, the race for the next one, and its winner.
//
// A weighted draw is an exponential race (Efraimidis and Spirakis 2006): every row has a key of its own, and the least
// wins. A distance is one sequential f64 chain, so one thread walks a whole row. Traffic: X once and one number a row,
// read and written, for each seed.
#include "exact/argmin.cuh"

__device__ __forceinline__ double nothing_near() { return __longlong_as_double(0x7ff0000000000000); }

/// The distance of a row to the nearest seed, with one more seed. A seed itself is marked -1, for good. A dot product
/// is no spread to seed by: it seeds by squared Euclidean distance.
template <class T>
__device__ __forceinline__ double nearer_by(double nearest, const T* x, const Rows& r, int64_t b, int64_t row,
                                            int64_t seed, int metric) {
    if (seed == row) return -1;
    if (nearest < 0 || seed >= r.n) return nearest;
    const double t =
        distance(metric == DOT ? SQUARED_EUCLIDEAN : metric, row_of(x, r, b, row), row_of(x, r, b, seed), r.d);
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

/// Pick `i` of k-means++ for each problem: distances to the last pick are folded into `nearest`, and all rows race. A
/// block takes `rows` rows; the last block of a problem finds the winner. Nothing is in `nearest` at a `start`;
/// `arrived` is zeros and left so.
template <class T>
__device__ void pick(const T* x, const Rows& r, double* nearest, const double* weights, uint32_t* chosen, int64_t count,
                     int64_t i, bool start, int metric, uint64_t seed, uint64_t round, int64_t first_problem, int64_t rows,
                     uint64_t* keys, uint32_t* winners, uint32_t* arrived) {
    __shared__ bool last;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        const int64_t newest = i ? chosen[b * count + i - 1] : -1;
        Lowest low = {UINT64_MAX, UINT32_MAX};
        for (int64_t row = begin + threadIdx.x; row < end; row += blockDim.x) {
            const int64_t at = b * r.n + row;
            double v = 1;
            if (i) {
                v = start && i == 1 ? nothing_near() : nearest[at];
                v = nearer_by(v, x, r, b, row, newest, metric);
                nearest[at] = v;
            } else if (!start) {
                v = nearest[at];
            }
            const double key = race_key(seed, round, first_problem + b, row, v, weights ? weights[at] : 1.0);
            low = lower(low, {ordered<uint64_t>(__double_as_longlong(key)), uint32_t(row)});
        }
        low = block_lowest(low);
        if (threadIdx.x == 0) {
            keys[tile] = low.key, winners[tile] = low.row;
            __threadfence();
            last = atomicAdd(&arrived[b], 1) + 1 == parts;
        }
        __syncthreads();
        if (last) {
            __threadfence();
            low = {UINT64_MAX, UINT32_MAX};
            for (int64_t part = b * parts + threadIdx.x; part < (b + 1) * parts; part += blockDim.x) {
                low = lower(low, {__ldcg(&keys[part]), __ldcg(&winners[part])});
            }
            low = block_lowest(low);
            if (threadIdx.x == 0) chosen[b * count + i] = low.row, arrived[b] = 0;
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
    extern "C" __global__ void pick_##name(const T* x, Rows r, double* nearest, const double* weights,                 \
                                           uint32_t* chosen, int64_t count, int64_t i, int start, int metric,          \
                                           uint64_t seed, uint64_t round, int64_t first_problem, int64_t rows,         \
                                           uint64_t* keys, uint32_t* winners, uint32_t* arrived) {                     \
        pick(x, r, nearest, weights, chosen, count, i, start, metric, seed, round, first_problem, rows, keys, winners, \
             arrived);                                                                                                 \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void race_keys(const double* nearest, const double* weights, int64_t b, int64_t n, int64_t first,
                                     uint64_t seed, uint64_t round, int64_t first_problem, double* out) {
    race(nearest, weights, b, n, first, seed, round, first_problem, out);
}
