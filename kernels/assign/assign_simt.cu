// FlashAssign on any GPU: the nearest centroid of every row without the n x k matrix.
//
// A block owns SIMT_ROWS rows. It walks the centroids in tiles of SIMT_CENTROIDS; for each tile it stages SIMT_COLUMNS
// columns of both in shared memory at a time, in the type of the filter and moved by mu, and every thread keeps a
// square micro tile of scores in registers. Of the finished scores only the best, its index and the second best of each
// row stay. Rows whose label the error bound of argmin.cuh proves are done; the others go on a list and `recheck`
// decides them, one warp a row, by the f64 definition.
//
// Traffic: X is read ceil(k / SIMT_CENTROIDS) times (from L2 after the first), the centroids once a block:
// n d (k / 64) + (n / 64) k d elements against 2 n k d flops. Memory: 4 bytes a row for the list, 4 a problem.
#include "exact/argmin.cuh"

constexpr int SIDE = 16;
constexpr int ROWS = SIMT_ROWS / SIDE, CENTROIDS = SIMT_CENTROIDS / SIDE;  // of a thread
constexpr int PAD = 4;                                                     // spreads columns over the banks
static_assert(SIMT_ROWS % SIDE == 0 && SIMT_CENTROIDS % SIDE == 0, "a thread's tile is square");
static_assert(THREADS % SIMT_COLUMNS == 0, "threads stage whole runs of columns");
static_assert(WARP % (THREADS / SIMT_ROWS) == 0, "the threads that share a row's norm are in one warp");

/// The centroids as `prepare_centroids` leaves them; one copy for all problems or one for each.
template <class F>
struct Prepared {
    const F *mu, *moved, *bias;
    const double* largest;
    int64_t k, d;

    __device__ Prepared(const F* mu, const F* moved, const F* bias, const double* largest, int64_t k, int64_t d,
                        int64_t copies, int64_t b)
        : mu(mu),
          moved(moved),
          bias(bias),
          largest(largest),
          k(k),
          d(d) {
        if (copies > 1) this->mu += b * d, this->moved += b * k * d, this->bias += b * k, this->largest += b;
    }
};

template <class T, bool SUM_OF_DIFFERENCES>
__device__ void assign_tile(const T* x, const Rows& r, int64_t at, int64_t b, int64_t first_row,
                            const Prepared<Filter<T>>& c, int metric, uint32_t* labels, uint32_t* list,
                            uint32_t* listed) {
    using F = Filter<T>;
    __shared__ __align__(16) F xs[SIMT_COLUMNS][SIMT_ROWS + PAD];
    __shared__ __align__(16) F cs[SIMT_COLUMNS][SIMT_CENTROIDS + PAD];
    __shared__ double squares_of[SIMT_ROWS];
    const int tx = threadIdx.x % SIDE, ty = threadIdx.x / SIDE;
    const int stage_column = threadIdx.x % SIMT_COLUMNS, stage_row = threadIdx.x / SIMT_COLUMNS;
    constexpr int STAGE_STEP = THREADS / SIMT_COLUMNS, SHARERS = THREADS / SIMT_ROWS;
    const int norm_row = threadIdx.x / SHARERS, norm_part = threadIdx.x % SHARERS;

    TopTwo<F> top[ROWS];
    double squares = 0;
    for (int64_t j0 = 0; j0 < c.k; j0 += SIMT_CENTROIDS) {
        F sum[ROWS][CENTROIDS] = {};
        for (int64_t d0 = 0; d0 < r.d; d0 += SIMT_COLUMNS) {
            const int64_t column = d0 + stage_column;
            const F mu = column < r.d ? c.mu[column] : F(0);
#pragma unroll
            for (int i = stage_row; i < SIMT_ROWS; i += STAGE_STEP) {
                const bool live = column < r.d && first_row + i < r.n;
                xs[stage_column][i] = live ? filter(row_of(x, r, b, first_row + i)[column]) - mu : F(0);
            }
#pragma unroll
            for (int j = stage_row; j < SIMT_CENTROIDS; j += STAGE_STEP) {
                const bool live = column < r.d && j0 + j < c.k;
                cs[stage_column][j] = live ? c.moved[(j0 + j) * r.d + column] : F(0);
            }
            __syncthreads();
            if (j0 == 0) {
                for (int q = norm_part; q < SIMT_COLUMNS; q += SHARERS) {
                    squares += double(xs[q][norm_row]) * xs[q][norm_row];
                }
            }
#pragma unroll
            for (int q = 0; q < SIMT_COLUMNS; ++q) {
                F xv[ROWS], cv[CENTROIDS];
#pragma unroll
                for (int i = 0; i < ROWS; ++i) xv[i] = xs[q][ty * ROWS + i];
#pragma unroll
                for (int j = 0; j < CENTROIDS; ++j) cv[j] = cs[q][tx * CENTROIDS + j];
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
#pragma unroll
                    for (int j = 0; j < CENTROIDS; ++j) {
                        if (SUM_OF_DIFFERENCES) sum[i][j] += fabs(xv[i] - cv[j]);
                        else sum[i][j] += xv[i] * cv[j];
                    }
                }
            }
            __syncthreads();
        }
#pragma unroll
        for (int j = 0; j < CENTROIDS; ++j) {
            const int64_t index = j0 + tx * CENTROIDS + j;
            if (index >= c.k) break;  // a masked lane is never seen
            const F bias = c.bias[index];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) top[i].add(SUM_OF_DIFFERENCES ? sum[i][j] : bias - sum[i][j], index);
        }
    }

    for (int lane = SHARERS / 2; lane; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    if (norm_part == 0) squares_of[norm_row] = squares;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
        for (int lane = SIDE / 2; lane; lane /= 2) top[i].join(lane);
        const int64_t row = first_row + ty * ROWS + i;
        if (tx != 0 || row >= r.n) continue;
        const double squares = squares_of[ty * ROWS + i], norm = norm_above(squares, r.d);
        const F bias = c.bias[top[i].index];
        labels[b * r.n + row] = top[i].index;
        const double cutoff = score_cutoff<F>(metric, r.d, top[i].best, norm, *c.largest, bias, error_shares<F>(r.d));
        const bool proven = top[i].second > cutoff;
        if (!proven && !nowhere(squares)) {
            list[at * r.n + atomicAdd(&listed[at], 1)] = row;
        }
    }
}

template <class T>
__device__ Filter<T> score(int metric, const T* x, const Prepared<Filter<T>>& c, int64_t j) {
    const Filter<T>* centroid = c.moved + j * c.d;
    Filter<T> s = 0;
    if (metric == MANHATTAN) {
        for (int64_t i = 0; i < c.d; ++i) s += fabs(filter(x[i]) - centroid[i]);
        return s;
    }
    for (int64_t i = 0; i < c.d; ++i) s += (filter(x[i]) - c.mu[i]) * centroid[i];
    return c.bias[j] - s;
}

/// Decides the listed rows of problem `b`, one warp each. The label of the first pass, proven or not, gives the
/// threshold.
template <class T>
__device__ void recheck_rows(const T* x, const Rows& r, const T* centroids, const Rows& cr, int64_t b, int64_t share,
                             int64_t shares, const Prepared<Filter<T>>& c, int metric, uint32_t* labels,
                             const uint32_t* list, uint32_t listed) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int64_t i = share * warps + threadIdx.x / WARP; i < listed; i += shares * warps) {
        const int64_t row = list[i];
        const T* values = row_of(x, r, b, row);
        double squares = 0;
        for (int64_t q = lane; q < r.d; q += WARP) {
            const double v = filter(values[q]) - c.mu[q];
            squares += v * v;
        }
        squares = warp_sum(squares);
        if (without_direction<Filter<T>>(metric, squares)) {
            int64_t first = 0;
            while (first + 1 < c.k && c.bias[first] == INFINITY) ++first;
            if (lane == 0) labels[b * r.n + row] = first;
            continue;
        }
        const int64_t label = labels[b * r.n + row];
        const Filter<T> any = score(metric, values, c, label);
        const double norm = norm_above(squares, r.d);
        const ErrorShares twice = error_shares<Filter<T>>(r.d);
        const double cutoff = score_cutoff<Filter<T>>(metric, r.d, any, norm, *c.largest, c.bias[label], twice);
        Best best = nothing();
        for (int64_t j = lane; j < c.k; j += WARP) {
            if (score(metric, values, c, j) > cutoff) continue;  // a NaN stays
            best = better(best, candidate(distance(metric, values, row_of(centroids, cr, b, j), r.d), j));
        }
        best = warp_best(best);
        __syncwarp();
        if (lane == 0) labels[b * r.n + row] = best.index;
    }
}

template <class T, bool DIFFERENCES>
__device__ __forceinline__ void assign(const T* x, const Rows& r, const Active& active, int64_t k, const Filter<T>* mu,
                                       const Filter<T>* moved, const Filter<T>* bias, const double* largest,
                                       int64_t copies, int metric, uint32_t* labels, uint32_t* list, uint32_t* listed) {
    const int64_t tiles = (r.n + SIMT_ROWS - 1) / SIMT_ROWS, all = active.problems(r.b) * tiles;
    for (int64_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
        const int64_t at = tile / tiles, first = tile % tiles * SIMT_ROWS;
        const Prepared<Filter<T>> c(mu, moved, bias, largest, k, r.d, copies, at);
        assign_tile<T, DIFFERENCES>(x, r, at, active.problem(at), first, c, metric, labels, list, listed);
    }
}

/// Problems are dealt to blocks; with fewer problems than blocks, each is shared by several.
template <class T>
__device__ __forceinline__ void recheck(const T* x, const Rows& r, const Active& active, const T* centroids,
                                        const Rows& cr, const Filter<T>* mu, const Filter<T>* moved,
                                        const Filter<T>* bias, const double* largest, int64_t copies, int metric,
                                        uint32_t* labels, const uint32_t* list, const uint32_t* listed) {
    const int64_t problems = active.problems(r.b), shares = blocks_each(problems);
    for (int64_t at = blockIdx.x / shares; at < problems; at += gridDim.x / shares) {
        const Prepared<Filter<T>> c(mu, moved, bias, largest, cr.n, r.d, copies, at);
        recheck_rows(x, r, centroids, cr, active.problem(at), blockIdx.x % shares, shares, c, metric, labels,
                     list + at * r.n, listed[at]);
    }
}

#define PREPARED(T)                                                                                                    \
    const Filter<T>*mu, const Filter<T>*moved, const Filter<T>*bias, const double *largest, int64_t copies

#define ASSIGN(kernel, name, T, differences)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, sizeof(Filter<T>) == 8 ? 1 : 3 - differences)                \
        kernel##_##name(const T* x, Rows r, Active active, int64_t k, PREPARED(T), int metric, uint32_t* labels,       \
                        uint32_t* list, uint32_t* listed) {                                                            \
        assign<T, differences>(x, r, active, k, mu, moved, bias, largest, copies, metric, labels, list, listed);       \
    }
#define INSTANCE(name, T)                                                                                              \
    ASSIGN(assign_simt_dot, name, T, false)                                                                            \
    ASSIGN(assign_simt_manhattan, name, T, true)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                           \
        recheck_##name(const T* x, Rows r, Active active, const T* centroids, Rows cr, PREPARED(T), int metric,        \
                       uint32_t* labels, const uint32_t* list, const uint32_t* listed) {                               \
        recheck(x, r, active, centroids, cr, mu, moved, bias, largest, copies, metric, labels, list, listed);          \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
