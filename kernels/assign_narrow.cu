// FlashAssign for rows of at most 8 columns, on CUDA cores: no column is wasted on padding to a tensor core's 16.
//
// A problem's centroids fit in shared memory, so a block prepares them for itself: moved by their mean, with |c|^2 / 2,
// and without those that repeat an earlier one. A thread keeps NARROW_ROWS rows in registers while centroids stream
// past, and remembers the best of each group of eight, the group it was in, and the second best of all groups: D + 1
// operations a score and 5 a group. The winning group is scored once more for the winner's place in it. Rows whose
// label the bound of argmin.cuh does not prove are settled at once by their warp: centroids whose score is within the
// bound are compared by the f64 definition.
//
// Traffic: X once, the centroids once a block, the labels once. No scratch.
#include "argmin.cuh"

constexpr int GROUP = 8;

/// The centroids of one problem in shared memory, `groups` groups of them, and what goes with them.
template <class F, int D>
struct Narrow {
    F* moved;         // (GROUP * groups, D)
    F* bias;          // (GROUP * groups): +inf for what cannot win
    uint32_t* table;  // (slots): 1 + the first of equal centroids, by their hash
    F* mu;            // (D)
    double* largest;  // norm of a moved centroid
    int k, groups, slots;

    __device__ Narrow(uint8_t* raw, int64_t k) : k(int(k)), groups(int((k + GROUP - 1) / GROUP)), slots(2) {
        while (slots < 2 * k) slots *= 2;
        largest = reinterpret_cast<double*>(raw);
        moved = reinterpret_cast<F*>(raw + 16);
        bias = moved + groups * GROUP * D;
        mu = bias + groups * GROUP;
        table = reinterpret_cast<uint32_t*>(mu + D);
    }

    template <class T>
    __device__ static bool equal(const T* a, const T* b, int64_t d) {
        bool same = true;
#pragma unroll 1
        for (int64_t q = 0; q < d; ++q) same &= wide(a[q]) == wide(b[q]);
        return same;
    }

    /// Fills in the centroids `c`, by the whole block. Sums are in a fixed order: a block's mu is every block's.
    template <class T>
    __device__ void prepare(const T* c, int64_t stride, int64_t d, int metric) const {
        const int lane = threadIdx.x % WARP;
        for (int i = threadIdx.x; i < slots; i += blockDim.x) table[i] = 0;
        if (threadIdx.x == 0) *largest = 0;
        for (int q = threadIdx.x / WARP; q < D; q += blockDim.x / WARP) {
            const int64_t step = (k + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
            double sum = 0;
            for (int64_t j = lane * step; q < d && metric == SQUARED_EUCLIDEAN && j < k; j += WARP * step) {
                sum += wide(c[j * stride + q]);
            }
            sum = warp_sum(sum);
            if (lane == 0) mu[q] = rounded<F>(sum / ((k + step - 1) / step));
        }
        __syncthreads();
        double most = 0;
        for (int j = threadIdx.x; j < groups * GROUP; j += blockDim.x) {
            const T* from = c + j * stride;
            double norm = 1, squares = 0;
            if (metric == COSINE && j < k) {
                for (int64_t q = 0; q < d; ++q) squares += wide(from[q]) * wide(from[q]);
                norm = sqrt(squares), squares = 0;
            }
            uint64_t hash = 0;
#pragma unroll
            for (int q = 0; q < D; ++q) {
                F v = 0;
                if (j < k && q < d) {
                    v = metric == COSINE ? rounded<F>(norm == 0 ? 0 : wide(from[q]) / norm) : filter(from[q]) - mu[q];
                    hash = mix(hash ^ uint64_t(__double_as_longlong(wide(from[q]) + 0.0)));
                }
                moved[j * D + q] = v;
                squares += double(v) * v;
            }
            bias[j] = j >= k ? F(INFINITY) : metric == SQUARED_EUCLIDEAN ? rounded<F>(squares / 2) : F(0);
            if (j >= k) continue;
            double above = norm_above(squares, d);
            // Nothing is proven about a centroid that is not finite, or whose squares overflow or vanish.
            if (!isfinite(above) || (norm != 0 && !(norm >= 1e-140 && norm <= 1e140))) above = nothing().distance;
            most = fmax(most, above);
            // A hash's slot is the first free one, or that of an equal centroid, which it then shares.
            int at = int(hash) & (slots - 1);
            for (;; at = (at + 1) & (slots - 1)) {
                const uint32_t there = atomicCAS(&table[at], 0, j + 1);
                if (there == 0) break;
                if (equal(from, c + (there - 1) * stride, d)) {
                    atomicMin(&table[at], j + 1);
                    break;
                }
            }
        }
        atomic_max(largest, most);
        __syncthreads();
        // Of equal centroids the first stays.
        for (int i = threadIdx.x; i < k; i += blockDim.x) {
            const T* from = c + i * stride;
            uint64_t hash = 0;
            for (int64_t q = 0; q < d; ++q) hash = mix(hash ^ uint64_t(__double_as_longlong(wide(from[q]) + 0.0)));
            for (int at = int(hash) & (slots - 1);; at = (at + 1) & (slots - 1)) {
                const int first = int(table[at]) - 1;
                if (first == i) break;
                if (first < i && equal(from, c + first * stride, d)) {
                    bias[i] = INFINITY;
                    break;
                }
            }
        }
        __syncthreads();
    }

    /// The score of a row (moved, and negated unless `DIFFERENCES`) and centroid `j`.
    template <bool DIFFERENCES>
    __device__ __forceinline__ F score(const F (&x)[D], int j) const {
        F s = bias[j];
#pragma unroll
        for (int q = 0; q < D; ++q) {
            if (DIFFERENCES) s += fabs(x[q] - moved[j * D + q]);
            else s = fma(x[q], moved[j * D + q], s);
        }
        return s;
    }
};

template <class T, int D, bool DIFFERENCES>
__device__ void assign_rows(const T* x, const Rows& r, int64_t b, int64_t first_row, const T* c, int64_t stride,
                            const Narrow<Filter<T>, D>& to, int metric, uint32_t* labels) {
    using F = Filter<T>;
    constexpr int ROWS = NARROW_ROWS / (sizeof(F) / 4);
    constexpr int AT_ONCE = D > 4 ? 2 : D > 2 ? 4 : 8;  // centroids in registers
    const int lane = threadIdx.x % WARP;
    for (int64_t base = first_row; base < min(first_row + NARROW_TILE, r.n); base += ROWS * blockDim.x) {
        F v[ROWS][D], best[ROWS], second[ROWS];
        int group[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = min(base + i * blockDim.x + threadIdx.x, r.n - 1);
            const T* from = row_of(x, r, b, row);
#pragma unroll
            for (int q = 0; q < D; ++q) {
                const F moved = q < r.d ? filter(from[q]) - to.mu[q] : F(0);
                v[i][q] = DIFFERENCES ? moved : -moved;
            }
            best[i] = second[i] = INFINITY, group[i] = 0;
        }
        for (int g = 0; g < to.groups; ++g) {
            F low[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) low[i] = INFINITY;
#pragma unroll AT_ONCE
            for (int j = 0; j < GROUP; ++j) {
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    low[i] = fmin(low[i], to.template score<DIFFERENCES>(v[i], g * GROUP + j));
                }
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                second[i] = fmin(second[i], fmax(best[i], low[i]));
                group[i] = low[i] < best[i] ? g : group[i];
                best[i] = fmin(best[i], low[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            TopTwo<F> top;
            double squares = 0;
#pragma unroll 1
            for (int j = 0; j < GROUP; ++j) {
                top.add(to.template score<DIFFERENCES>(v[i], group[i] * GROUP + j), group[i] * GROUP + j);
            }
#pragma unroll
            for (int q = 0; q < D; ++q) squares += double(v[i][q]) * v[i][q];
            const int64_t row = base + i * blockDim.x + threadIdx.x;
            const double limit = threshold<F>(metric, r.d, top.best, norm_above(squares, r.d), *to.largest);
            const bool live = row<r.n, proven = fmin(top.second, second[i])> limit;
            if (live && proven) labels[row] = top.index;
            // What is left is settled by the warp, row by row.
            for (uint32_t left = __ballot_sync(~0u, live && !proven); left; left &= left - 1) {
                const int of = __ffs(left) - 1;
                F its[D];
#pragma unroll
                for (int q = 0; q < D; ++q) its[q] = __shfl_sync(~0u, v[i][q], of);
                const double its_limit = __shfl_sync(~0u, limit, of);
                const int64_t its_row = __shfl_sync(~0u, row, of);
                Best nearest = nothing();
                for (int j = lane; j < to.k; j += WARP) {
                    if (to.template score<DIFFERENCES>(its, j) > its_limit) continue;  // a NaN stays
                    const T *one = row_of(x, r, b, its_row), *other = c + j * stride;
                    double d[1];
                    distances_of(
                        metric,
                        [&](auto take) {
#pragma unroll 1
                            for (int64_t q = 0; q < r.d; ++q) take(0, wide(one[q]), wide(other[q]));
                        },
                        d);
                    nearest = better(nearest, candidate(d[0], j));
                }
                nearest = warp_best(nearest);
                if (lane == 0) labels[its_row] = nearest.index;
            }
        }
    }
}

/// A block takes neighbouring tiles of NARROW_TILE rows, and prepares the centroids of each problem they are of.
template <class T, int D, bool DIFFERENCES>
__device__ void assign(const T* x, const Rows& r, const Active& active, const T* c, const Rows& cr, int metric,
                       uint32_t* labels) {
    extern __shared__ __align__(16) uint8_t raw[];
    const Narrow<Filter<T>, D> to(raw, cr.n);
    const int64_t tiles = (r.n + NARROW_TILE - 1) / NARROW_TILE, all = active.problems(r.b) * tiles;
    int64_t prepared = -1;
    for (int64_t tile = all * blockIdx.x / gridDim.x; tile < all * (blockIdx.x + 1) / gridDim.x; ++tile) {
        const int64_t b = active.problem(tile / tiles), copy = cr.batch_stride ? b : 0;
        const T* centroids = row_of(c, cr, b, 0);
        if (copy != prepared) {
            __syncthreads();
            to.prepare(centroids, cr.row_stride, cr.d, metric);
            prepared = copy;
        }
        assign_rows<T, D, DIFFERENCES>(x, r, b, tile % tiles * NARROW_TILE, centroids, cr.row_stride, to, metric,
                                       labels + b * r.n);
    }
}

#define KERNEL(name, T, D)                                                                                             \
    extern "C" __global__ void __launch_bounds__(NARROW_THREADS, 4) assign_narrow_##D##_##name(                        \
        const T* x, Rows r, Active active, const T* c, Rows cr, int metric, uint32_t* labels) {                        \
        if (metric == MANHATTAN) assign<T, D, true>(x, r, active, c, cr, metric, labels);                              \
        else assign<T, D, false>(x, r, active, c, cr, metric, labels);                                                 \
    }
#define INSTANCE(name, T) KERNEL(name, T, 1) KERNEL(name, T, 2) KERNEL(name, T, 4) KERNEL(name, T, 8)
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef KERNEL
