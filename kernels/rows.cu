// The passes that look at each row once: finiteness, norms, distances, gathers and copies.
//
// A number that is part of a definition (a norm, a distance) is one sequential f64 chain, so one thread walks a whole
// row. Passes that only copy or take extrema read cells in memory order. Traffic: each reads X (or what it gathers)
// once and writes one number a row.
#include "exact/argmin.cuh"

__device__ void start_scan(int64_t b, double* max_abs, uint32_t* first_nonfinite) {
    for (int64_t i = global_thread(); i < b; i += all_threads()) max_abs[i] = 0, first_nonfinite[i] = UINT32_MAX;
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
__device__ void scan(const T* x, const Rows& r, int64_t rows, double* max_abs, uint32_t* first_nonfinite) {
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
            if (most > 0) atomic_max(&max_abs[b], most);
            if (bad != UINT32_MAX) atomicMin(&first_nonfinite[b], bad);
        }
    }
}

/// The smallest magnitude but 0 of finite values: each block takes `rows` rows.
template <class T>
__device__ void min_magnitude(const T* x, const Rows& r, int64_t rows, double* smallest) {
    const int64_t chunks = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * chunks; tile += gridDim.x) {
        const int64_t b = tile / chunks, begin = tile % chunks * rows, end = min(begin + rows, r.n);
        double least = INFINITY;
        for (Cells at(r.d); begin + at.row < end; at.next()) {
            const double v = fabs(wide(row_of(x, r, b, begin + at.row)[at.column]));
            if (v > 0) least = fmin(least, v);
        }
        for (int lane = WARP / 2; lane; lane /= 2) least = fmin(least, __shfl_xor_sync(~0u, least, lane));
        // The bits of numbers that are not negative are in their order.
        if (threadIdx.x % WARP == 0) {
            atomicMin(reinterpret_cast<unsigned long long*>(&smallest[b]), __double_as_longlong(least));
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

/// Its elements in order, the last dimension widened to `pitch` by zeros, `cells` in all. Divisions of 32 bits are
/// several times as fast, and do for what they count.
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

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void scan_##name(const T* x, Rows r, int64_t rows, double* max_abs,                          \
                                           uint32_t* first_nonfinite) {                                                \
        scan(x, r, rows, max_abs, first_nonfinite);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void min_magnitude_##name(const T* x, Rows r, int64_t rows, double* smallest) {              \
        min_magnitude(x, r, rows, smallest);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void norms_##name(const T* x, Rows r, double* out) { norms(x, r, out); }                     \
    extern "C" __global__ void distances_##name(const T* x, Rows r, const T* c, Rows cr, const uint32_t* labels,       \
                                                int metric, double* out) {                                             \
        distances(x, r, c, cr, labels, metric, out);                                                                   \
    }                                                                                                                  \
    extern "C" __global__ void gather_##name(const T* x, Rows r, const uint32_t* index, int64_t m, int64_t rows,       \
                                             T* out) {                                                                 \
        gather(x, r, index, m, rows, out);                                                                             \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define COPY(bytes, T)                                                                                                 \
    extern "C" __global__ void copy_##bytes(const T* x, Strided from, int64_t cells, int64_t pitch, T* out) {          \
        copy(x, from, cells, pitch, out);                                                                              \
    }
COPY(1, uint8_t)
COPY(2, uint16_t)
COPY(4, uint32_t)
COPY(8, uint64_t)
#undef COPY

extern "C" __global__ void scan_start(int64_t b, double* max_abs, uint32_t* first_nonfinite) {
    start_scan(b, max_abs, first_nonfinite);
}
