// The passes that look at each row once: finiteness, norms, distances, gathers, and the draws of the initialisation.
//
// A number that is part of a definition (a norm, a distance) is one sequential f64 chain, so one thread walks a whole
// row. Passes that only copy or take extrema read cells in memory order. Traffic: each reads X (or what it gathers)
// once and writes one number a row; `pairwise` writes n k numbers, which is its purpose.
#include "exact/argmin.cuh"

// ---- Passes over rows.

__device__ void start_scan(int64_t b, double* largest, uint32_t* first_bad) {
    for (int64_t i = global_thread(); i < b; i += all_threads()) largest[i] = 0, first_bad[i] = UINT32_MAX;
}

/// The largest bits, signs aside, of values side by side: those of the largest magnitude, if all are finite.
template <class T>
__device__ __forceinline__ uint64_t largest_bits(const T* values, int64_t count) {
    constexpr int EACH = 16 / sizeof(T);
    uint64_t most = 0;
    if constexpr (sizeof(T) == 8) {
#pragma unroll 4
        for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
            const uint64_t bits = uint64_t(__double_as_longlong(values[i])) & ~0ull >> 1;
            most = bits > most ? bits : most;
        }
    } else {
        uint32_t bits = 0;
        const auto take = [&](uint32_t word) {
            if constexpr (sizeof(T) == 2) bits = __vmaxu2(bits, word & 0x7fff7fff);
            else bits = max(bits, word & 0x7fffffff);
        };
#pragma unroll 8
        for (int64_t i = threadIdx.x; i < count / EACH; i += blockDim.x) {
            const uint4 v = reinterpret_cast<const uint4*>(values)[i];
            take(v.x), take(v.y), take(v.z), take(v.w);
        }
        for (int64_t i = count / EACH * EACH + threadIdx.x; i < count; i += blockDim.x) {
            if constexpr (sizeof(T) == 2) take(*reinterpret_cast<const uint16_t*>(&values[i]));
            else take(__float_as_uint(values[i]));
        }
        most = sizeof(T) == 2 ? max(bits >> 16, bits & 0xffff) : bits;
    }
    return most;
}

__device__ __forceinline__ double from_bits(uint64_t bits, __half) { return wide(__ushort_as_half(uint16_t(bits))); }
__device__ __forceinline__ double from_bits(uint64_t bits, __nv_bfloat16) {
    return wide(__ushort_as_bfloat16(uint16_t(bits)));
}
__device__ __forceinline__ double from_bits(uint64_t bits, float) { return wide(__uint_as_float(uint32_t(bits))); }
__device__ __forceinline__ double from_bits(uint64_t bits, double) { return __longlong_as_double(int64_t(bits)); }

/// Each block takes `rows` rows: at the speed of memory if they are adjacent, and once more if they are not all finite.
template <class T>
__device__ void scan(const T* x, const Rows& r, int64_t rows, double* largest, uint32_t* first_bad) {
    const int64_t chunks = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * chunks; tile += gridDim.x) {
        const int64_t b = tile / chunks, begin = tile % chunks * rows, end = min(begin + rows, r.n);
        const T* const first = row_of(x, r, b, begin);
        const bool adjacent = r.row_stride == r.d && reinterpret_cast<uintptr_t>(first) % 16 == 0;
        double most = adjacent ? from_bits(largest_bits(first, (end - begin) * r.d), T()) : 0;
        uint32_t bad = UINT32_MAX;
        if (__syncthreads_or(!adjacent || !isfinite(most))) {
            most = 0;
            for (Cells at(r.d); begin + at.row < end; at.next()) {
                const double v = fabs(wide(row_of(x, r, b, begin + at.row)[at.column]));
                if (isfinite(v)) most = fmax(most, v);
                else bad = min(bad, uint32_t(begin + at.row));
            }
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

/// A tensor of any layout, its last dimension first (`Strided` in src/cuda/params.rs).
struct Strided {
    int64_t sizes[8], strides[8], rank;
};

/// Its elements in order, the last dimension widened to `pitch` by zeros, `cells` in all. Divisions of 32 bits are several
/// times as fast, and do for what they count.
template <class I, class T>
__device__ __forceinline__ void copy_by(const T* x, const Strided& from, I cells, I pitch, T* out) {
    for (I i = I(global_thread()); i < cells; i += I(all_threads())) {
        I row = i / pitch;
        const I column = i - row * pitch;
        int64_t at = int64_t(column) * from.strides[0];
        for (int k = 1; k < from.rank; ++k) {
            const I outer = row / I(from.sizes[k]);
            at += int64_t(row - outer * I(from.sizes[k])) * from.strides[k];
            row = outer;
        }
        out[i] = int64_t(column) < from.sizes[0] ? x[at] : T(0);
    }
}

template <class T>
__device__ void copy(const T* x, const Strided& from, int64_t cells, int64_t pitch, T* out) {
    // A step beyond the last cell still fits.
    if (cells + all_threads() <= UINT32_MAX) copy_by<uint32_t>(x, from, uint32_t(cells), uint32_t(pitch), out);
    else copy_by<int64_t>(x, from, cells, pitch, out);
}

#define COPY(bytes, T)                                                                                                 \
    extern "C" __global__ void copy_##bytes(const T* x, Strided from, int64_t cells, int64_t pitch, T* out) {          \
        copy(x, from, cells, pitch, out);                                                                              \
    }
COPY(1, uint8_t)
COPY(2, uint16_t)
COPY(4, uint32_t)
COPY(8, uint64_t)
#undef COPY

// ---- Initialisation: the distance to the nearest seed, the race for the next one, and its winner.

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

/// Puts others in place of the `k` chosen rows that cannot be seeds, to `out`: each in turn gives way to the next row after it
/// that can be and is not chosen. One block takes a problem: its threads look at all chosen rows at once, which is all there
/// is to do as a rule, and then at `blockDim.x` rows at a time for one that gives way.
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
                const int64_t mine = step + threadIdx.x, at = (from + mine) % r.n;
                bool free = mine < r.n && usable(at);
                for (int64_t other = 0; free && other < k; ++other) free = rows[other] != at;
                if (free) atomicMin(&found, (unsigned long long)(mine));
                if (__syncthreads_or(free)) break;
            }
            __syncthreads();
            if (threadIdx.x == 0 && found != ~0ull) rows[j] = uint32_t((from + int64_t(found)) % r.n);
            __syncthreads();
        }
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
                     int64_t i, bool start, int metric, uint64_t seed, uint64_t round, int64_t rows, uint64_t* keys,
                     uint32_t* winners, uint32_t* arrived) {
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
            const double key = race_key(seed, round, b, row, v, weights ? weights[at] : 1.0);
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
                                           uint64_t seed, uint64_t round, int64_t rows, uint64_t* keys,                \
                                           uint32_t* winners, uint32_t* arrived) {                                     \
        pick(x, r, nearest, weights, chosen, count, i, start, metric, seed, round, rows, keys, winners, arrived);      \
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
