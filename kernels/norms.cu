// The passes around assignment that look at each row once: centroid preparation, finiteness, norms, distances, gathers,
// and the draws of the initialisation.
//
// A number that is part of a definition (a norm, a distance) is one sequential f64 chain, so one thread walks a whole
// row. Passes that only copy or take extrema read cells in memory order. Traffic: each reads X (or what it gathers)
// once and writes one number a row; `pairwise` writes n k numbers, which is its purpose.
#include "tensor.cuh"

// ---- Preparation of the centroids for scoring: mu, then c^ = c - mu (or c / |c|), |c^|^2 / 2 and the largest |c^|.

/// One block of 32 x 32 threads for each problem and 32 columns.
template <class T>
__device__ void column_means(const T* c, const Rows& r, Filter<T>* mu) {
    __shared__ double partial[WARP][WARP];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP;
    const int64_t groups = (r.d + WARP - 1) / WARP, step = (r.n + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
    for (int64_t tile = blockIdx.x; tile < r.b * groups; tile += gridDim.x) {
        const int64_t b = tile / groups, column = tile % groups * WARP + lane;
        double sum = 0;
        if (column < r.d) {
            for (int64_t j = part * step; j < r.n; j += WARP * step) sum += wide(row_of(c, r, b, j)[column]);
        }
        partial[part][lane] = sum;
        __syncthreads();
        if (part == 0 && column < r.d) {
            for (int p = 1; p < WARP; ++p) sum += partial[p][lane];
            mu[b * r.d + column] = rounded<Filter<T>>(sum / ((r.n + step - 1) / step));
        }
        __syncthreads();
    }
}

/// One warp for each centroid.
template <class T>
__device__ void centre(const T* c, const Rows& r, int metric, const Filter<T>* mu, Filter<T>* moved, Filter<T>* bias,
                       double* largest) {
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* from = row_of(c, r, b, i % r.n);
        double norm = 1, squares = 0;
        if (metric == COSINE) {
            for (int64_t j = lane; j < r.d; j += WARP) squares += wide(from[j]) * wide(from[j]);
            norm = sqrt(warp_sum(squares)), squares = 0;
        }
        for (int64_t j = lane; j < r.d; j += WARP) {
            const F v =
                metric == COSINE ? rounded<F>(norm == 0 ? 0 : wide(from[j]) / norm) : filter(from[j]) - mu[b * r.d + j];
            moved[i * r.d + j] = v;
            squares += double(v) * v;
        }
        squares = warp_sum(squares);
        if (lane == 0) {
            bias[i] = metric == SQUARED_EUCLIDEAN ? rounded<F>(squares / 2) : 0;
            double above = norm_above(squares, r.d);
            // Nothing is proven about a centroid that is not finite, or whose squares overflow or vanish.
            if (!isfinite(above) || (norm != 0 && !(norm >= 1e-140 && norm <= 1e140))) above = nothing().distance;
            atomic_max(&largest[b], above);
        }
    }
}

// ---- Preparation of the centroids for tensor cores (tensor.cuh), and of rows that they cannot read in place.

/// mu is the mean of a column, or zero unless the sampled values are within a factor of two of it: then all differences
/// are exact (Sterbenz), and if another value's is not, `move` bounds what it loses.
template <class T>
__device__ void origin(const T* c, const Rows& r, bool centred, T* mu) {
    __shared__ double sums[WARP][WARP], lows[WARP][WARP], highs[WARP][WARP];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP;
    const int64_t groups = (r.d + WARP - 1) / WARP, step = (r.n + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
    for (int64_t tile = blockIdx.x; tile < r.b * groups; tile += gridDim.x) {
        const int64_t b = tile / groups, column = tile % groups * WARP + lane;
        double sum = 0, low = INFINITY, high = -INFINITY;
        if (centred && column < r.d) {
            for (int64_t j = part * step; j < r.n; j += WARP * step) {
                const double v = wide(row_of(c, r, b, j)[column]);
                sum += v, low = fmin(low, v), high = fmax(high, v);
            }
        }
        sums[part][lane] = sum, lows[part][lane] = low, highs[part][lane] = high;
        __syncthreads();
        if (part == 0 && column < r.d) {
            for (int p = 1; p < WARP; ++p) {
                sum += sums[p][lane], low = fmin(low, lows[p][lane]), high = fmax(high, highs[p][lane]);
            }
            const T mean = rounded<T>(sum / ((r.n + step - 1) / step));
            const double m = wide(mean);
            const bool exact = m > 0 ? low >= m / 2 && high <= m * 2 : m < 0 && low >= m * 2 && high <= m / 2;
            mu[b * r.d + column] = centred && exact ? mean : T(0.0f);
        }
        __syncthreads();
    }
}

/// A table of the hashes of a problem's centroids, and the first centroid of each. All zero at first.
struct Table {
    unsigned long long* keys;
    uint32_t* first;  // ~j, for the lowest j
    int64_t slots;    // a power of two
};

/// Enters every centroid; `slot` becomes its place. One warp for each.
template <class Word>
__device__ void find_duplicates(const Word* c, const Rows& r, const Table& table, uint32_t* slot) {
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n, j = i % r.n;
        const Word* from = row_of(c, r, b, j);
        unsigned long long hash = 0;
        for (int64_t q = lane; q < r.d; q += WARP) hash += mix(uint64_t(q) << 32 | from[q]);
        for (int other = WARP / 2; other; other /= 2) hash += __shfl_xor_sync(~0u, hash, other);
        if (lane != 0) continue;
        hash |= 1;
        int64_t at = int64_t(hash >> 1) & (table.slots - 1);
        for (;; at = (at + 1) & (table.slots - 1)) {
            const unsigned long long there = atomicCAS(&table.keys[b * table.slots + at], 0ull, hash);
            if (there == 0 || there == hash) break;
        }
        atomicMax(&table.first[b * table.slots + at], ~uint32_t(j));
        slot[i] = at;
    }
}

/// One warp for each centroid and each place up to `padded`.
template <class T>
__device__ void move(const T* c, const Rows& r, int metric, const T* mu, int64_t pitch, int64_t padded, T* moved,
                     float* start, float* scale, Bounds* bounds) {
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * padded; i += all_threads() / WARP) {
        const int64_t b = i / padded, j = i % padded;
        if (j >= r.n) {
            if (lane == 0) start[i] = -INFINITY;
            if (lane == 0 && scale) scale[i] = 0;
            continue;
        }
        const T* from = row_of(c, r, b, j);
        double squares = 0, moved_squares = 0, lost = 0, half = 0;
        for (int64_t q = lane; q < pitch; q += WARP) {
            const double v = q < r.d ? wide(from[q]) : 0, m = q < r.d ? wide(mu[b * r.d + q]) : 0;
            const T e = rounded<T>(v - m);
            const double residual = v - m - wide(e);
            moved[(b * r.n + j) * pitch + q] = e;
            squares += v * v, moved_squares += wide(e) * wide(e), lost += residual * residual;
            half += (v - m) * (v + m) / 2;
        }
        squares = warp_sum(squares), moved_squares = warp_sum(moved_squares), lost = warp_sum(lost);
        half = warp_sum(half);
        const double norm = sqrt(squares);
        const float factor = metric != COSINE ? 1 : norm == 0 ? 0 : float(1 / norm);
        const float from_here = metric == SQUARED_EUCLIDEAN ? float(-half) : 0;
        if (lane == 0) start[i] = from_here;
        if (lane == 0 && scale) scale[i] = factor;
        // A lane to a bound. A product with a row that `margin` lets pass must not overflow before it is scaled.
        const double safe = metric == COSINE && norm > 1e18 ? INFINITY : factor;
        const double values[] = {sqrt(moved_squares) * safe, fabs(double(from_here)), sqrt(lost) * factor,
                                 norm * factor, factor};
        double mine = 0;
#pragma unroll
        for (int v = 0; v < 5; ++v) mine = lane == v ? values[v] : mine;
        static_assert(sizeof(Bounds) == 5 * sizeof(float) && offsetof(Bounds, residual) == 8,
                      "in the order of `values`");
        if (lane < 5) raise(&bounds[b].moved + lane, mine);
    }
}

/// A centroid that repeats an earlier one bit for bit can never be a label: it starts from -inf. Without this, every
/// row near a duplicate would be unproven. One warp for each centroid.
template <class Word>
__device__ void drop_duplicates(const Word* c, const Rows& r, int64_t padded, const Table& table, const uint32_t* slot,
                                float* start) {
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n, j = i % r.n, first = ~table.first[b * table.slots + slot[i]];
        if (first >= j) continue;
        const Word *mine = row_of(c, r, b, j), *other = row_of(c, r, b, first);
        bool same = true;
        for (int64_t q = lane; q < r.d; q += WARP) same &= mine[q] == other[q];
        if (__all_sync(~0u, same) && lane == 0) start[b * padded + j] = -INFINITY;
    }
}

/// Rows side by side at a distance of `pitch`, zeros between. Each block copies `rows` rows.
template <class T>
__device__ void pack(const T* x, const Rows& r, int64_t pitch, int64_t rows, T* out) {
    const int64_t chunks = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * chunks; tile += gridDim.x) {
        const int64_t b = tile / chunks, begin = tile % chunks * rows, end = min(begin + rows, r.n);
        for (Cells at(pitch); begin + at.row < end; at.next()) {
            const T* row = row_of(x, r, b, begin + at.row);
            out[(b * r.n + begin + at.row) * pitch + at.column] = at.column < r.d ? row[at.column] : T(0.0f);
        }
    }
}

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
    extern "C" __global__ void __launch_bounds__(1024) prepare_means_##name(const T* c, Rows cr, Filter<T>* mu) {      \
        column_means(c, cr, mu);                                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void prepare_centroids_##name(const T* c, Rows cr, int metric, const Filter<T>* mu,          \
                                                        Filter<T>* moved, Filter<T>* bias, double* largest) {          \
        centre(c, cr, metric, mu, moved, bias, largest);                                                               \
    }                                                                                                                  \
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

#define HALF_INSTANCE(name, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(1024)                                                                 \
        prepare_origin_##name(const T* c, Rows cr, int centred, T* mu) {                                               \
        origin(c, cr, centred, mu);                                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void prepare_moved_##name(const T* c, Rows cr, int metric, const T* mu, int64_t pitch,       \
                                                    int64_t padded, T* moved, float* start, float* scale,              \
                                                    Bounds* bounds) {                                                  \
        move(c, cr, metric, mu, pitch, padded, moved, start, scale, bounds);                                           \
    }                                                                                                                  \
    extern "C" __global__ void pack_##name(const T* x, Rows r, int64_t pitch, int64_t rows, T* out) {                  \
        pack(x, r, pitch, rows, out);                                                                                  \
    }
HALF_INSTANCE(f16, __half)
HALF_INSTANCE(bf16, __nv_bfloat16)
#undef HALF_INSTANCE

#define DUPLICATES(name, Word)                                                                                         \
    extern "C" __global__ void find_duplicates_##name(const Word* c, Rows cr, unsigned long long* keys,                \
                                                      uint32_t* first, int64_t slots, uint32_t* slot) {                \
        find_duplicates(c, cr, {keys, first, slots}, slot);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void drop_duplicates_##name(const Word* c, Rows cr, int64_t padded,                          \
                                                      unsigned long long* keys, uint32_t* first, int64_t slots,        \
                                                      const uint32_t* slot, float* start) {                            \
        drop_duplicates(c, cr, padded, {keys, first, slots}, slot, start);                                             \
    }
DUPLICATES(f16, uint16_t)
DUPLICATES(bf16, uint16_t)
DUPLICATES(f32, uint32_t)
#undef DUPLICATES

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
