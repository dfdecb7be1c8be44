// Medians need no sums: one is found bit by bit, by counting, which is a bisection of the ordered keys.
#pragma once
#include "exact/sums.cuh"

static_assert(THREADS % MEDIAN_COLUMNS == 0, "whole columns");

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
/// The weight below is compared with that of the rest by an exact sum of both, one window of the weights' bits after
/// another: nearly always all bits are in the first.
template <class T>
__device__ void medians(const T* x, const Rows& r, const double* weights, const double* max_weight,
                        const uint32_t* first_nonfinite, const uint32_t* order, const uint32_t* offsets, int64_t k,
                        const Active& active, T* out) {
    using Key = decltype(key(T()));
    const int64_t groups = (r.d + MEDIAN_COLUMNS - 1) / MEDIAN_COLUMNS;
    const int part = threadIdx.x / MEDIAN_COLUMNS, parts = THREADS / MEDIAN_COLUMNS;
    const int64_t tiles = active.problems(r.b) * k * groups;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t b = active.problem(tile / (k * groups)), j = tile / groups % k;
        const int64_t column = tile % groups * MEDIAN_COLUMNS + threadIdx.x % MEDIAN_COLUMNS;
        const int64_t begin = offsets[b * (k + 1) + j] + part, end = offsets[b * (k + 1) + j + 1];
        const bool live = column < r.d, dirty = first_nonfinite[b] != UINT32_MAX;
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
        total = column_sum(total);  // the same for the whole block, as both that follow
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
