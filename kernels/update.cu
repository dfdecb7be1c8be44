// Sort-Inverse Update: rows are visited in cluster order, summed on chip, and committed once for each cluster they
// touch.
//
// Sums are 128-bit integers (src/fixed.rs): integer addition is associative, so blocks may cut the rows anywhere,
// commit with atomics in any order, and still give the same bits. A thread owns one column of SUM_ROWS consecutive
// places; with few columns a block takes as many runs of rows as fit its threads. Traffic: X once, 16 k d bytes of
// sums, plus 16 bytes for each run, cluster and column. Medians (Manhattan) need no sums: a median is found bit by bit,
// by counting.
#include "common.cuh"

static_assert(THREADS % MEDIAN_COLUMNS == 0, "whole columns");

template <class T>
__device__ void sums(const T* x, const Rows& r, const double* factor, const uint32_t* order, const uint32_t* offsets,
                     int64_t k, const double* max_abs, unsigned long long* out) {
    const int64_t width = min(r.d, int64_t(SUM_COLUMNS)), runs = SUM_COLUMNS / width;
    const int64_t column_tiles = (r.d + SUM_COLUMNS - 1) / SUM_COLUMNS;
    const int64_t row_tiles = (r.n + runs * SUM_ROWS - 1) / (runs * SUM_ROWS), tiles = row_tiles * column_tiles;
    for (int64_t tile = blockIdx.x; tile < r.b * tiles; tile += gridDim.x) {
        const int64_t b = tile / tiles, at = tile % tiles, run = threadIdx.x / width;
        const int64_t column = at % column_tiles * SUM_COLUMNS + threadIdx.x % width;
        const uint32_t* begins = offsets + b * (k + 1);
        const int64_t begin = (at / column_tiles * runs + run) * SUM_ROWS;
        const int64_t end = min(min(begin + SUM_ROWS, r.n), int64_t(begins[k]));
        if (run >= runs || column >= r.d || begin >= end) continue;

        int64_t cluster = 0;  // the last that begins at or before `begin`
        for (int64_t above = k; above - cluster > 1;) {
            const int64_t middle = (cluster + above) / 2;
            (begins[middle] <= begin ? cluster : above) = middle;
        }
        int64_t next = begins[cluster + 1];
        const int scale = fixed_scale(max_abs[b], r.n);
        __int128 sum = 0;
        const auto commit = [&] { atomic_add(out + ((b * k + cluster) * r.d + column) * 2, sum); };
        for (int64_t base = begin; base < end; base += AHEAD) {
            T values[AHEAD];
            double factors[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int64_t place = min(base + i, end - 1), row = order ? order[b * r.n + place] : place;
                values[i] = row_of(x, r, b, row)[column];
                factors[i] = factor ? factor[b * r.n + row] : 1.0;
            }
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                if (base + i >= end) break;
                while (base + i >= next) {
                    if (sum != 0) commit();
                    sum = 0;
                    next = begins[++cluster + 1];
                }
                sum += fixed_quantise(__dmul_rn(wide(values[i]), factors[i]), scale);
            }
        }
        commit();
    }
}

__device__ void totals(const uint64_t* sums, const double* max_abs, int64_t n, int64_t b, int64_t cells, double* out) {
    for (int64_t i = global_thread(); i < b * cells; i += all_threads()) {
        const __int128 q = (unsigned __int128)sums[2 * i + 1] << 64 | sums[2 * i];
        out[i] = fixed_value(q, fixed_scale(max_abs[i / cells], n));
    }
}

/// One warp a cluster. The norm of a cosine centroid is one sequential chain, walked by every lane at once.
template <class T>
__device__ void means(const double* totals, const double* weight, const T* old, const Rows& r, const uint8_t* done,
                      int metric, T* out) {
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const double* total = totals + i * r.d;
        const T* kept = row_of(old, r, b, i % r.n);
        double divisor = done[b] ? 0 : weight[i];
        if (metric == COSINE && divisor > 0) {
            double squares = 0;
            for (int64_t j = 0; j < r.d; ++j) squares = __dadd_rn(squares, __dmul_rn(total[j], total[j]));
            divisor = __dsqrt_rn(squares);
        }
        for (int64_t j = threadIdx.x % WARP; j < r.d; j += WARP) {
            out[i * r.d + j] = divisor > 0 ? rounded<T>(__ddiv_rn(total[j], divisor)) : kept[j];
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

using Weight = unsigned __int128;

/// The sum over the threads of a column, to all of them.
__device__ Weight column_sum(Weight v) {
    __shared__ Weight parts[THREADS];
    parts[threadIdx.x] = v;
    __syncthreads();
    v = 0;
    for (int i = threadIdx.x % MEDIAN_COLUMNS; i < THREADS; i += MEDIAN_COLUMNS) v += parts[i];
    __syncthreads();
    return v;
}

/// The median of one cluster's column is the largest key with less than half of the weight below it. A block takes one
/// cluster and MEDIAN_COLUMNS columns and decides one bit of all its keys in each pass over the cluster's rows.
template <class T>
__device__ void medians(const T* x, const Rows& r, const double* weights, const double* max_weight,
                        const uint32_t* order, const uint32_t* offsets, const T* old, const Rows& o,
                        const uint8_t* done, T* out) {
    using Key = decltype(key(T()));
    const int64_t groups = (r.d + MEDIAN_COLUMNS - 1) / MEDIAN_COLUMNS, k = o.n;
    const int part = threadIdx.x / MEDIAN_COLUMNS, parts = THREADS / MEDIAN_COLUMNS;
    for (int64_t tile = blockIdx.x; tile < r.b * k * groups; tile += gridDim.x) {
        const int64_t i = tile / groups, b = i / k, j = i % k;
        const int64_t column = tile % groups * MEDIAN_COLUMNS + threadIdx.x % MEDIAN_COLUMNS;
        const int64_t begin = offsets[b * (k + 1) + j] + part, end = offsets[b * (k + 1) + j + 1];
        const bool live = column < r.d;
        const int scale = weights ? fixed_scale(max_weight[b], r.n) : 0;
        const auto weight_below = [&](bool all, Key bound) {
            Weight sum = 0;
            for (int64_t place = begin; place < end; place += parts) {
                const int64_t row = order[b * r.n + place];
                if (!all && !(live && key(row_of(x, r, b, row)[column]) < bound)) continue;
                sum += weights ? Weight(fixed_quantise(weights[b * r.n + row], scale)) : 1;
            }
            return column_sum(sum);
        };
        const Weight total = done[b] ? 0 : weight_below(true, 0);  // the same for the whole block
        Key median = 0;
        for (int bit = sizeof(Key) * 8 - 1; total != 0 && bit >= 0; --bit) {
            const Key bound = median | Key(Key(1) << bit);
            if (2 * weight_below(false, bound) < total) median = bound;
        }
        if (!live || part != 0) continue;
        T value = row_of(old, o, b, j)[column];
        if (total != 0) from_key(median, value);
        out[i * r.d + column] = value;
    }
}

// ---- Stopping.

template <class T>
__device__ void shift(const T* now, const Rows& r, const T* old, const Rows& o, double* out) {
    for (int64_t i = global_thread(); i < r.b * r.n; i += all_threads()) {
        const int64_t b = i / r.n, j = i % r.n;
        const double t = distance(SQUARED_EUCLIDEAN, row_of(now, r, b, j), row_of(old, o, b, j), r.d);
        atomic_max(&out[b], t == t ? t : __longlong_as_double(0x7ff0000000000000));
    }
}

/// Each block compares `span` labels.
__device__ void labels_differ(const uint32_t* old, const uint32_t* now, int64_t b, int64_t n, int64_t span,
                              uint32_t* differ) {
    const int64_t chunks = (n + span - 1) / span;
    for (int64_t tile = blockIdx.x; tile < b * chunks; tile += gridDim.x) {
        const int64_t p = tile / chunks, begin = tile % chunks * span, end = min(begin + span, n);
        bool found = false;
        for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) found |= old[p * n + i] != now[p * n + i];
        if (__syncthreads_or(found) && threadIdx.x == 0) differ[p] = 1;
    }
}

__device__ void converged(const uint8_t* done, const uint32_t* differ, const double* shift, const double* threshold,
                          int64_t b, uint8_t* out) {
    for (int64_t i = global_thread(); i < b; i += all_threads()) {
        out[i] = done[i] || !differ[i] || shift[i] <= threshold[i];
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SUM_COLUMNS, 6)                                                       \
        sums_##name(const T* x, Rows r, const double* factor, const uint32_t* order, const uint32_t* offsets,          \
                    int64_t k, const double* max_abs, unsigned long long* out) {                                       \
        sums(x, r, factor, order, offsets, k, max_abs, out);                                                           \
    }                                                                                                                  \
    extern "C" __global__ void means_##name(const double* totals, const double* weight, const T* old, Rows o,          \
                                            const uint8_t* done, int metric, T* out) {                                 \
        means(totals, weight, old, o, done, metric, out);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3)                                                           \
        medians_##name(const T* x, Rows r, const double* weights, const double* max_weight, const uint32_t* order,     \
                       const uint32_t* offsets, const T* old, Rows o, const uint8_t* done, T* out) {                   \
        medians(x, r, weights, max_weight, order, offsets, old, o, done, out);                                         \
    }                                                                                                                  \
    extern "C" __global__ void shift_##name(const T* now, Rows r, const T* old, Rows o, double* out) {                 \
        shift(now, r, old, o, out);                                                                                    \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

extern "C" __global__ void totals_f64(const uint64_t* sums, const double* max_abs, int64_t n, int64_t b, int64_t cells,
                                      double* out) {
    totals(sums, max_abs, n, b, cells, out);
}
extern "C" __global__ void converged_labels(const uint32_t* old, const uint32_t* now, int64_t b, int64_t n,
                                            int64_t span, uint32_t* differ) {
    labels_differ(old, now, b, n, span, differ);
}
extern "C" __global__ void converged_problems(const uint8_t* done, const uint32_t* differ, const double* shift,
                                              const double* threshold, int64_t b, uint8_t* out) {
    converged(done, differ, shift, threshold, b, out);
}
