// The distances of rows to all centroids: n k numbers, which are what is asked for.
//
// Of f64 rows, and by Manhattan, each is one sequential f64 chain, a thread to each. Rows of shorter types give f32:
// the definition, rounded once more. It is known to the bit from any number near it unless a value halfway between two
// floats is as near, so products come from the tensor cores' f64, in whatever order, and the definition is asked only
// where a bound on the error reaches across such a value: 1 pair in 10^5 of ordinary data. (Ziv 1991 rounds elementary
// functions so.)
//
// Why the bound holds. Let u = 2^-53, and X and C be the norms of x^ = x - mu and c^ = c - mu (squared Euclidean; mu =
// 0 otherwise), each value of which is off by u of itself. A sum of d products, in any order and even if each operation
// loses 2 u, is off by (2 d + 16) u X C; a norm, added up in any order, by (d + 16) u of itself. So X^2 + C^2 - 2 x^.c^
// is within (2 d + 32) u (X + C)^2 of the squared distance, and the definition, whose terms are not negative, within (d
// + 3) u of it, which is no more than (X + C)^2. A dot product and its definition are within (3 d + 17) u X C of each
// other; the quotients that cosine distances are made of are within (5 d + 40) u. `SHARE` (8 d + 128) u is more than
// any of these. Squares of f32 neither overflow f64 nor vanish in it.
//
// Traffic: X once for each tile of centroids, from L2 but once, the centroids likewise, and the distances.
#include "exact/argmin.cuh"

constexpr int PITCH = PAIR_COLUMNS + 4;  // four rows of a fragment then lie in banks of their own
constexpr int WARPS_DOWN = PAIR_ROWS / 32, WARPS_ACROSS = PAIR_CENTROIDS / 32, PAIR_THREADS = THREADS;
static_assert(WARPS_DOWN * WARPS_ACROSS * WARP == PAIR_THREADS, "a warp to 32 by 32 pairs");
static_assert(PAIR_COLUMNS == WARP && PITCH % 2 == 0, "two columns to a lane of half a warp");
static_assert(PAIR_SHARED == 2 * (PAIR_ROWS + PAIR_CENTROIDS) * PITCH * sizeof(double), "see src/tiles.rs");

/// acc += a b^T for 16 rows of a, 8 of b and 8 columns: a[i] is row lane / 4 + 8 (i % 2), column lane % 4 + 4 (i / 2);
/// b[i] row lane / 4, column lane % 4 + 4 i; acc[i] row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2.
__device__ __forceinline__ void mma(double (&acc)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(acc[0]), "+d"(acc[1]), "+d"(acc[2]), "+d"(acc[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+d"(acc[i % 2 * 2]), "+d"(acc[i % 2 * 2 + 1])
            : "d"(a[i]), "d"(b[i / 2]));
    }
#endif
}

/// The norms of rows less `mu` (null: of rows), to within the share of `near`. A warp takes a row.
template <class T>
__device__ void norms_near(const T* x, const Rows& r, const float* mu, int64_t mu_stride, double* out) {
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* const row = row_of(x, r, b, i % r.n);
        double squares = 0;
#pragma unroll 4
        for (int64_t j = threadIdx.x % WARP; j < r.d; j += WARP) {
            const double v = wide(row[j]) - (mu ? mu[b * mu_stride + j] : 0.0f);
            squares = fma(v, v, squares);
        }
        squares = warp_sum(squares);
        if (threadIdx.x % WARP == 0) out[i] = sqrt(squares);
    }
}

/// Two columns of a row as a vector of their type: one instruction loads both, and one widens two halves.
template <class T>
struct Two;
template <>
struct Two<float> {
    using Vector = float2;
    static __device__ __forceinline__ float2 widened(float2 v) { return v; }
};
template <>
struct Two<__half> {
    using Vector = __half2;
    static __device__ __forceinline__ float2 widened(__half2 v) { return __half22float2(v); }
};
template <>
struct Two<__nv_bfloat16> {
    using Vector = __nv_bfloat162;
    static __device__ __forceinline__ float2 widened(__nv_bfloat162 v) { return __bfloat1622float2(v); }
};

/// Two columns of a row, with zeros for those past its end. The second column is never in the row without the first.
template <bool WHOLE, class T>
__device__ __forceinline__ typename Two<T>::Vector load_two(const T* from, bool first, bool second) {
    using Vector = typename Two<T>::Vector;
    if constexpr (WHOLE) return first ? *reinterpret_cast<const Vector*>(from) : Vector{};
    Vector two{};
    if (first) two.x = from[0];
    if (second) two.y = from[1];
    return two;
}

/// True if every row consists of whole pairs of columns, each aligned to its size.
template <class T>
__device__ __forceinline__ bool in_twos(const T* x, const Rows& r) {
    return (reinterpret_cast<uintptr_t>(x) % (2 * sizeof(T)) | (r.batch_stride | r.row_stride | r.d) % 2) == 0;
}

/// A number within `error` of the distance by the definition; both are NaN if nothing is known.
struct Near {
    double distance, error;
};

__device__ __forceinline__ Near near(int metric, int64_t d, double dot, double of_x, double of_c) {
    const double share = (8 * d + 128) * 0x1p-53;
    if (metric == SQUARED_EUCLIDEAN) {
        const double both = of_x + of_c;
        return {fma(of_x, of_x, of_c * of_c) - 2 * dot, share * both * both};
    }
    if (metric == DOT) return {-dot, share * of_x * of_c};
    const double norms = of_x * of_c;
    return norms == 0 ? Near{1, 0} : Near{1 - dot / norms, share};
}

/// A block takes `PAIR_ROWS` rows and `PAIR_CENTROIDS` centroids, `PAIR_COLUMNS` columns at a time, which become f64 on
/// their way to shared memory, since each is read by several warps. Norms are those of `norms_near`; `copies` problems
/// have centroids of their own.
template <bool WHOLE, class T>
__device__ void pairwise_near(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, const float* mu,
                              const double* of_x, const double* of_c, int64_t copies, float* out) {
    constexpr int WARPS = PAIR_THREADS / WARP, STEPS = PAIR_COLUMNS / 8;
    constexpr int OWN = PAIR_ROWS / WARPS / STEPS, OTHERS = PAIR_CENTROIDS / WARPS / STEPS;
    extern __shared__ __align__(16) double raw[];
    double(*const rows)[PITCH] = reinterpret_cast<double(*)[PITCH]>(raw);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, part = lane % 4;
    const int top = warp % WARPS_DOWN * 32, left = warp / WARPS_DOWN * 32;
    const int half = warp * 2 + lane / 16, two = lane % 16 * 2;
    const int64_t down = (r.n + PAIR_ROWS - 1) / PAIR_ROWS, across = (cr.n + PAIR_CENTROIDS - 1) / PAIR_CENTROIDS;
    for (int64_t tile = blockIdx.x; tile < r.b * down * across; tile += gridDim.x) {
        const int64_t b = tile / (down * across), copy = copies == 1 ? 0 : b;
        const int64_t row0 = tile / across % down * PAIR_ROWS, column0 = tile % across * PAIR_CENTROIDS;
        const T *const xs = row_of(x, r, b, row0), *const cs = row_of(c, cr, b, column0);
        const int rows_here = int(min(r.n - row0, int64_t(PAIR_ROWS)));
        const int centroids_here = int(min(cr.n - column0, int64_t(PAIR_CENTROIDS)));
        double acc[2][4][4] = {};
        // Each of four parts of the next columns is on its way while columns are multiplied. Each half of a warp takes
        // a row, two columns to a lane: with one column to a lane f16 takes half as long again (seeding-versions.md).
        const auto stage = [&](int64_t first, double(*to)[PITCH], int quarter, auto meanwhile) {
            const int64_t column = first + two;
            const bool live = column < r.d, both = column + 1 < r.d;
            const float2 origin = load_two<WHOLE>(mu + copy * r.d + column, mu && live, mu && both);
            const int own = quarter * OWN * WARPS + half, other = quarter * OTHERS * WARPS + half;
            typename Two<T>::Vector held[(OWN + OTHERS) / 2];
            const T* from = xs + own * r.row_stride + column;
#pragma unroll
            for (int i = 0; i < OWN / 2; ++i, from += 2 * WARPS * r.row_stride) {
                const bool is_row = own + 2 * WARPS * i < rows_here;
                held[i] = load_two<WHOLE>(from, is_row && live, is_row && both);
            }
            from = cs + other * cr.row_stride + column;
#pragma unroll
            for (int i = 0; i < OTHERS / 2; ++i, from += 2 * WARPS * cr.row_stride) {
                const bool is_centroid = other + 2 * WARPS * i < centroids_here;
                held[OWN / 2 + i] = load_two<WHOLE>(from, is_centroid && live, is_centroid && both);
            }
            meanwhile();
            const auto store = [&](int row, typename Two<T>::Vector pair) {
                const float2 v = Two<T>::widened(pair);
                *reinterpret_cast<double2*>(&to[row][two]) =
                    make_double2(double(v.x) - origin.x, double(v.y) - origin.y);
            };
#pragma unroll
            for (int i = 0; i < OWN / 2; ++i) store(own + 2 * WARPS * i, held[i]);
#pragma unroll
            for (int i = 0; i < OTHERS / 2; ++i) store(PAIR_ROWS + other + 2 * WARPS * i, held[OWN / 2 + i]);
        };
        __syncthreads();
#pragma unroll 1
        for (int quarter = 0; quarter < STEPS; ++quarter) stage(0, rows, quarter, [] {});
        for (int64_t first = 0, chunk = 0; first < r.d; first += PAIR_COLUMNS, ++chunk) {
            double(*const now)[PITCH] = rows + chunk % 2 * (PAIR_ROWS + PAIR_CENTROIDS);
            double(*const next)[PITCH] = rows + (chunk + 1) % 2 * (PAIR_ROWS + PAIR_CENTROIDS);
            __syncthreads();
#pragma unroll 1
            for (int step = 0; step < STEPS; ++step) {
                const auto multiply = [&] {
                    if (first + step * 8 >= r.d) return;
                    const int at = step * 8 + part;
                    double a[2][4];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        a[i / 4][i % 4] = now[top + i / 4 * 16 + i % 2 * 8 + group][at + i % 4 / 2 * 4];
                    }
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const double* const from = now[PAIR_ROWS + left + j * 8 + group];
                        const double other[2] = {from[at], from[at + 4]};
                        mma(acc[0][j], a[0], other), mma(acc[1][j], a[1], other);
                    }
                };
                if (first + PAIR_COLUMNS < r.d) stage(first + PAIR_COLUMNS, next, step, multiply);
                else multiply();
            }
        }
        // The pairs that are left to the definition.
        uint32_t open = 0;
        const auto row_of_pair = [&](int at) { return row0 + top + at / 16 * 16 + at / 2 % 2 * 8 + group; };
        const auto column_of_pair = [&](int at) { return column0 + left + at / 4 % 4 * 8 + part * 2 + at % 2; };
#pragma unroll
        for (int at = 0; at < 32; ++at) {
            const int64_t row = row_of_pair(at), column = column_of_pair(at);
            if (row >= r.n || column >= cr.n) continue;
            const Near found =
                near(metric, r.d, acc[at / 16][at / 4 % 4][at % 4], of_x[b * r.n + row], of_c[copy * cr.n + column]);
            const float low = rounded<float>(found.distance - found.error);
            const float high = rounded<float>(found.distance + found.error);
            // By their bits: zeros have signs, and a NaN equals none.
            const bool same = __float_as_uint(low) == __float_as_uint(high) && low == low;
            if (same) out[(b * r.n + row) * cr.n + column] = low;
            else open |= 1u << at;
        }
        for (; open; open &= open - 1) {
            const int at = __ffs(open) - 1;
            const int64_t row = row_of_pair(at), column = column_of_pair(at);
            const double exact = distance(metric, row_of(x, r, b, row), row_of(c, cr, b, column), r.d);
            out[(b * r.n + row) * cr.n + column] = rounded<float>(exact);
        }
    }
}

template <class T>
__device__ void pairwise(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, Filter<T>* out) {
    for (int64_t i = global_thread(); i < r.b * r.n * cr.n; i += all_threads()) {
        const int64_t at = i / cr.n, b = at / r.n;
        out[i] = rounded<Filter<T>>(distance(metric, row_of(x, r, b, at % r.n), row_of(c, cr, b, i % cr.n), r.d));
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void pairwise_##name(const T* x, Rows r, const T* c, Rows cr, int metric, Filter<T>* out) {  \
        pairwise(x, r, c, cr, metric, out);                                                                            \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void norms_near_##name(const T* x, Rows r, const float* mu, int64_t mu_stride,               \
                                                 double* out) {                                                        \
        norms_near(x, r, mu, mu_stride, out);                                                                          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(PAIR_THREADS, 2)                                                      \
        pairwise_near_##name(const T* x, Rows r, const T* c, Rows cr, int metric, const float* mu, const double* of_x, \
                             const double* of_c, int64_t copies, float* out) {                                         \
        if (in_twos(x, r) && in_twos(c, cr)) pairwise_near<true>(x, r, c, cr, metric, mu, of_x, of_c, copies, out);    \
        else pairwise_near<false>(x, r, c, cr, metric, mu, of_x, of_c, copies, out);                                   \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
#undef INSTANCE
