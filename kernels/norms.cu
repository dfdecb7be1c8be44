// The passes that look at each row once: finiteness, norms, distances, gathers, and the draws of the initialisation.
//
// A number that is part of a definition (a norm, a distance) is one sequential f64 chain, so one thread walks a whole
// row. Passes that only copy or take extrema read cells in memory order. Traffic: each reads X (or what it gathers)
// once and writes one number a row; `pairwise` writes n k numbers, which is its purpose.
#include "argmin.cuh"

// ---- Passes over rows.

__device__ void start_scan(int64_t b, double* largest, uint32_t* first_bad) {
    for (int64_t i = global_thread(); i < b; i += all_threads()) largest[i] = 0, first_bad[i] = UINT32_MAX;
}

/// Each block takes `rows` rows.
template <class T>
__device__ void scan(const T* x, const Rows& r, int64_t rows, double* largest, uint32_t* first_bad) {
    const int64_t chunks = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * chunks; tile += gridDim.x) {
        const int64_t b = tile / chunks, begin = tile % chunks * rows, end = min(begin + rows, r.n);
        double most = 0;
        uint32_t bad = UINT32_MAX;
        for (Cells at(r.d); begin + at.row < end; at.next()) {
            const double v = fabs(wide(row_of(x, r, b, begin + at.row)[at.column]));
            if (isfinite(v)) most = fmax(most, v);
            else bad = min(bad, uint32_t(begin + at.row));
        }
        for (int lane = WARP / 2; lane; lane /= 2) most = fmax(most, __shfl_xor_sync(~0u, most, lane));
        bad = __reduce_min_sync(~0u, bad);
        if (threadIdx.x % WARP == 0) {
            if (most > 0) atomic_max(&largest[b], most);
            if (bad != UINT32_MAX) atomicMin(&first_bad[b], bad);
        }
    }
}

template <class T>
__device__ void norms(const T* x, const Rows& r, double* out) {
    for (int64_t i = global_thread(); i < r.b * r.n; i += all_threads()) {
        const T* row = row_of(x, r, i / r.n, i % r.n);
        double s = 0;
        for (int64_t j = 0; j < r.d; ++j) s = __dadd_rn(s, __dmul_rn(wide(row[j]), wide(row[j])));
        out[i] = __dsqrt_rn(s);
    }
}

template <class T>
__device__ void distances(const T* x, const Rows& r, const T* c, const Rows& cr, const uint32_t* labels, int metric,
                          double* out) {
    for (int64_t i = global_thread(); i < r.b * r.n; i += all_threads()) {
        const int64_t b = i / r.n;
        out[i] = distance(metric, row_of(x, r, b, i % r.n), row_of(c, cr, b, labels[i]), r.d);
    }
}

template <class T>
__device__ void pairwise(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, Filter<T>* out) {
    for (int64_t i = global_thread(); i < r.b * r.n * cr.n; i += all_threads()) {
        const int64_t at = i / cr.n, b = at / r.n;
        out[i] = rounded<Filter<T>>(distance(metric, row_of(x, r, b, at % r.n), row_of(c, cr, b, i % cr.n), r.d));
    }
}

/// Each block copies `rows` of the `m` rows that `index` names.
template <class T>
__device__ void gather(const T* x, const Rows& r, const uint32_t* index, int64_t m, int64_t rows, T* out) {
    const int64_t chunks = (m + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * chunks; tile += gridDim.x) {
        const int64_t b = tile / chunks, begin = tile % chunks * rows, end = min(begin + rows, m);
        for (Cells at(r.d); begin + at.row < end; at.next()) {
            const int64_t i = b * m + begin + at.row;
            out[i * r.d + at.column] = row_of(x, r, b, index[i])[at.column];
        }
    }
}

// ---- Initialisation: the distance to the nearest seed, the race for the next one, and its winner.

/// A dot product is no spread to seed by: it seeds by squared Euclidean distance.
template <class T>
__device__ void nearer(const T* x, const Rows& r, const double* nearest, const uint32_t* newest, int metric,
                       double* out) {
    for (int64_t i = global_thread(); i < r.b * r.n; i += all_threads()) {
        const int64_t b = i / r.n, row = i % r.n, seed = newest[b];
        double v = nearest[i];
        if (seed == row) {
            v = -1;
        } else if (!(v < 0) && seed < r.n) {
            const double t =
                distance(metric == DOT ? SQUARED_EUCLIDEAN : metric, row_of(x, r, b, row), row_of(x, r, b, seed), r.d);
            v = fmin(v, t > 0 ? t : 0);
        }
        out[i] = v;
    }
}

__device__ void race(const double* nearest, const double* weights, int64_t b, int64_t n, uint64_t seed, uint64_t round,
                     double* out) {
    for (int64_t i = global_thread(); i < b * n; i += all_threads()) {
        out[i] = race_key(seed, round, i / n, i % n, nearest[i], weights ? weights[i] : 1.0);
    }
}

struct Lowest {
    uint64_t key;
    uint32_t index;
};

/// The lowest index at the smallest key in `[begin, end)`, compared as ordered integers, by one block.
__device__ Lowest block_lowest(const double* keys, const uint32_t* index, int64_t begin, int64_t end) {
    __shared__ Lowest partial[WARP];
    Lowest low = {UINT64_MAX, UINT32_MAX};
    const auto lower = [](Lowest a, Lowest b) {
        return b.key < a.key || (b.key == a.key && b.index < a.index) ? b : a;
    };
    const auto warp_lowest = [&](Lowest v) {
        for (int lane = WARP / 2; lane; lane /= 2) {
            v = lower(v, {__shfl_xor_sync(~0u, v.key, lane), __shfl_xor_sync(~0u, v.index, lane)});
        }
        return v;
    };
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
        low = lower(low, {ordered<uint64_t>(__double_as_longlong(keys[i])), index ? index[i] : uint32_t(i)});
    }
    low = warp_lowest(low);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = low;
    __syncthreads();
    if (threadIdx.x < WARP) {
        low = warp_lowest(threadIdx.x < blockDim.x / WARP ? partial[threadIdx.x] : Lowest{UINT64_MAX, UINT32_MAX});
    }
    __syncthreads();
    return low;
}

/// The winner of each chunk of `span` keys, then of each problem's chunks.
__device__ void lowest_parts(const double* keys, int64_t b, int64_t n, int64_t span, double* best, uint32_t* index) {
    const int64_t chunks = (n + span - 1) / span;
    for (int64_t tile = blockIdx.x; tile < b * chunks; tile += gridDim.x) {
        const int64_t begin = tile % chunks * span;
        const double* row = keys + tile / chunks * n;
        const Lowest low = block_lowest(row, nullptr, begin, min(begin + span, n));
        if (threadIdx.x == 0) best[tile] = row[low.index], index[tile] = low.index;
    }
}

__device__ void lowest(const double* best, const uint32_t* index, int64_t b, int64_t chunks, uint32_t* out) {
    for (int64_t p = blockIdx.x; p < b; p += gridDim.x) {
        const Lowest low = block_lowest(best + p * chunks, index + p * chunks, 0, chunks);
        if (threadIdx.x == 0) out[p] = chunks ? low.index : 0;
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void scan_##name(const T* x, Rows r, int64_t rows, double* largest, uint32_t* first_bad) {   \
        scan(x, r, rows, largest, first_bad);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void norms_##name(const T* x, Rows r, double* out) { norms(x, r, out); }                     \
    extern "C" __global__ void distances_##name(const T* x, Rows r, const T* c, Rows cr, const uint32_t* labels,       \
                                                int metric, double* out) {                                             \
        distances(x, r, c, cr, labels, metric, out);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void pairwise_##name(const T* x, Rows r, const T* c, Rows cr, int metric, Filter<T>* out) {  \
        pairwise(x, r, c, cr, metric, out);                                                                            \
    }                                                                                                                  \
    extern "C" __global__ void gather_##name(const T* x, Rows r, const uint32_t* index, int64_t m, int64_t rows,       \
                                             T* out) {                                                                 \
        gather(x, r, index, m, rows, out);                                                                             \
    }                                                                                                                  \
    extern "C" __global__ void nearer_##name(const T* x, Rows r, const double* nearest, const uint32_t* newest,        \
                                             int metric, double* out) {                                                \
        nearer(x, r, nearest, newest, metric, out);                                                                    \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void scan_start(int64_t b, double* largest, uint32_t* first_bad) {
    start_scan(b, largest, first_bad);
}
extern "C" __global__ void race_keys(const double* nearest, const double* weights, int64_t b, int64_t n, uint64_t seed,
                                     uint64_t round, double* out) {
    race(nearest, weights, b, n, seed, round, out);
}
extern "C" __global__ void lowest_of_chunk(const double* keys, int64_t b, int64_t n, int64_t span, double* best,
                                           uint32_t* index) {
    lowest_parts(keys, b, n, span, best, index);
}
extern "C" __global__ void lowest_of_problem(const double* best, const uint32_t* index, int64_t b, int64_t chunks,
                                             uint32_t* out) {
    lowest(best, index, b, chunks, out);
}
