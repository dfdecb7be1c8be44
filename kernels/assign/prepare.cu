// Preparation: centroids as the assignment kernels score them, and rows that those cannot read in place.
//
// Traffic: the centroids twice, and what is scored written once; `pack` reads X once and writes it once.
#include "assign/duplicates.cuh"
#include "assign/moved.cuh"

// ---- For CUDA cores: mu, then c^ = c - mu (or c / |c|), |c^|^2 / 2 and the largest |c^|.

/// Near the data, whatever a few centroids are: the median of the means of groups of centroids (Nemirovski and Yudin
/// 1983). One block of 32 x 32 threads for each problem and 32 columns, a group to a warp.
template <class T>
__device__ void column_means(const T* c, const Rows& r, const Active& active, Filter<T>* mu) {
    __shared__ double partial[WARP][WARP];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP;
    const int64_t groups = (r.d + WARP - 1) / WARP, step = (r.n + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
    const int64_t tiles = active.problems(r.b) * groups;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t b = tile / groups, column = tile % groups * WARP + lane;
        const int64_t p = active.problem(b);
        const int groups_here = int(min(int64_t(WARP), (r.n + step - 1) / step));
        double sum = 0;
        int64_t count = 0;
        if (column < r.d) {
            for (int64_t j = part * step; j < r.n; j += WARP * step, ++count) sum += wide(row_of(c, r, p, j)[column]);
        }
        // A mean that is not finite ranks beyond all others.
        const double mean = sum / count, finite_mean = fabs(mean) < nothing().distance ? mean : nothing().distance;
        partial[part][lane] = finite_mean;
        __syncthreads();
        if (part < groups_here && column < r.d) {
            const int rank = rank_among(finite_mean, part, groups_here, [&](int i) { return partial[i][lane]; });
            const double middle = finite_mean < nothing().distance ? finite_mean : 0;
            if (rank == (groups_here - 1) / 2) mu[b * r.d + column] = rounded<Filter<T>>(middle);
        }
        __syncthreads();
    }
}

/// One warp for each centroid.
template <class T>
__device__ void centre(const T* c, const Rows& r, const Active& active, int metric, const Filter<T>* mu,
                       Filter<T>* moved, Filter<T>* bias, double* largest) {
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    const int64_t all = active.problems(r.b) * r.n;
    for (int64_t i = global_thread() / WARP; i < all; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* from = row_of(c, r, active.problem(b), i % r.n);
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
        const Scored<F> scored(metric, r.d, squares, norm);
        if (scored.dropped) {
            for (int64_t j = lane; j < r.d; j += WARP) moved[i * r.d + j] = 0;
        }
        if (lane == 0) {
            bias[i] = scored.bias;
            atomic_max(&largest[b], scored.norm);
        }
    }
}

// ---- For tensor cores (tensor.cuh).

static_assert(ORIGIN_COLUMNS == 2 * WARP, "a pair of columns to a lane");

/// mu is the median of the means of groups of values of a column, or zero unless seven in eight groups are within a
/// factor of two of it: their differences are exact (Sterbenz), and what another value loses, `move` bounds. A block
/// for each problem and 64 columns, a pair to a lane, a group to a warp. `p` is the problem, `b` its place.
template <class T>
__device__ void origin(const T* c, const Rows& r, int64_t p, int64_t b, int64_t first, bool centred, T* mu) {
    constexpr int PARTS = ORIGIN_THREADS / WARP, COLUMNS = ORIGIN_COLUMNS;
    __shared__ float sums[PARTS][COLUMNS], lows[PARTS][COLUMNS], highs[PARTS][COLUMNS];
    const int pair = threadIdx.x % WARP * 2, part = threadIdx.x / WARP;
    const int64_t step = (r.n + MEAN_SAMPLES - 1) / MEAN_SAMPLES;
    const int64_t column = first + pair;
    const T* from = row_of(c, r, p, 0) + column;
    const bool aligned = column + 1 < r.d && reinterpret_cast<uintptr_t>(from) % 4 == 0 && r.row_stride % 2 == 0;
    float sum[2] = {}, low[2] = {INFINITY, INFINITY}, high[2] = {-INFINITY, -INFINITY};
#pragma unroll 8
    for (int64_t j = part * step; centred && column < r.d && j < r.n; j += PARTS * step) {
        const T* at = from + j * r.row_stride;
        float v[2] = {0, 0};
        if (aligned) {
            const float2 both = wide_pair(*reinterpret_cast<const uint32_t*>(at), T());
            v[0] = both.x, v[1] = both.y;
        } else {
            v[0] = filter(at[0]), v[1] = column + 1 < r.d ? filter(at[1]) : 0;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] += v[i], low[i] = fminf(low[i], v[i]), high[i] = fmaxf(high[i], v[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        sums[part][pair + i] = sum[i], lows[part][pair + i] = low[i], highs[part][pair + i] = high[i];
    }
    __syncthreads();
    if (threadIdx.x < COLUMNS && first + threadIdx.x < r.d) {
        const int samples = int((r.n + step - 1) / step), groups = min(samples, PARTS);
        float means[PARTS], middle = 0;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            const float mean = sums[p][threadIdx.x] / ((samples - p + PARTS - 1) / PARTS);
            means[p] = p < groups && fabsf(mean) < INFINITY ? mean : INFINITY;
        }
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            int rank = 0;
#pragma unroll
            for (int q = 0; q < PARTS; ++q) rank += means[q] < means[p] || (means[q] == means[p] && q < p);
            if (rank == (groups - 1) / 2) middle = means[p];
        }
        const T mean = T(middle);
        const float m = filter(mean);
        int exact = 0;
        for (int p = 0; p < groups; ++p) {
            const float low = lows[p][threadIdx.x], high = highs[p][threadIdx.x];
            exact += m > 0 ? low >= m / 2 && high <= m * 2 : m < 0 && low >= m * 2 && high <= m / 2;
        }
        const bool moves = centred && fabsf(m) < INFINITY && 8 * exact >= 7 * groups;
        mu[b * r.d + first + threadIdx.x] = moves ? mean : T(0.0f);
    }
    __syncthreads();
}

/// The sum of squares of a row, by a warp, in f32.
template <class T>
__device__ __forceinline__ float row_squares(const T* row, int64_t d) {
    float squares = 0;
    for (int64_t piece = threadIdx.x % WARP; piece * PIECE < d; piece += WARP) {
        squares += piece_squares<T>(load_piece(row, piece * PIECE, d));
    }
    for (int lane = WARP / 2; lane; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    return squares;
}

/// The reach of the centroids of problem `p`, by the whole block: that of its rows, or of all rows if they share the
/// centroids.
template <class T>
__device__ Reach reach(const T* x, const Rows& xr, const T* c, const Rows& r, const Active& active, int64_t p) {
    const bool own = r.b > 1 || xr.b == 1;
    const int64_t rows = own ? xr.n : active.problems(xr.b) * xr.n;
    float largest;
    return reach_of(
        [&](int i) {
            const int64_t at = sample_of(i, rows), problem = own ? p : active.problem(at / xr.n);
            return sqrtf(row_squares(row_of(x, xr, problem, at % xr.n), r.d));
        },
        [&](int i) { return row_norm_above(row_squares(row_of(c, r, p, sample_of(i, r.n)), r.d), r.d); }, largest);
}

/// Eight lanes for each centroid from `first` on and each place up to `padded`, as many as the block has; `slot` is
/// each centroid's in the table. Raises `bounds`.
template <class T>
__device__ void move(const T* c, const Rows& r, int64_t p, int64_t b, int64_t first, int metric, const T* mu,
                     const Reach& reach, int64_t pitch, int64_t padded, T* moved, float* start, float* scale,
                     float* own, float* bounds, const Table& table, uint32_t* slot) {
    constexpr int LANES = MOVE_LANES;
    const int part = threadIdx.x % LANES;
    const int64_t j = first + threadIdx.x / LANES, i = b * padded + j;
    const bool live = j < r.n;
    Sums sums;
    if (live) {
        const T *from = row_of(c, r, p, j), *origin = mu + b * r.d;
        uint4* to = reinterpret_cast<uint4*>(moved + (b * r.n + j) * pitch);
        // Two at a time, so that one does not wait for the other's loads.
        for (int64_t piece = part; piece < pitch / PIECE; piece += 2 * LANES) {
            const int64_t next = piece + LANES;
            const uint4 v = load_piece(from, piece * PIECE, r.d), m = load_piece<T, false>(origin, piece * PIECE, r.d);
            const uint4 next_v = load_piece(from, next * PIECE, r.d),
                        next_m = load_piece<T, false>(origin, next * PIECE, r.d);
            to[piece] = sums.add<T>(v, m, piece);
            if (next < pitch / PIECE) to[next] = sums.add<T>(next_v, next_m, next);
        }
    }
    sums.join(LANES);
    float from_here = -INFINITY, factor = 0, wider = 0;
    if (live) {
        from_here = sums.start(metric), factor = sums.scale(metric);
        Bounds own_bounds = sums.bounds(metric, r.d, from_here, factor);
        if (sums.nowhere(metric)) from_here = -INFINITY, factor = 1, own_bounds = {};
        else confine_to_reach(own_bounds, reach, metric, sums.norm(), from_here, wider);
        if (!(from_here > -INFINITY)) {
            // Nothing that overflows takes part in products: as integers, NaN are above all scores.
            uint4* const to = reinterpret_cast<uint4*>(moved + (b * r.n + j) * pitch);
            for (int64_t piece = part; piece < pitch / PIECE; piece += LANES) to[piece] = {0, 0, 0, 0};
        }
        own_bounds.typical = reach.typical();
        // A lane to each.
        static_assert(BOUNDS == MOVE_LANES && offsetof(Bounds, residual) == 8, "in order");
        const float bound = part == 0   ? own_bounds.moved
                            : part == 1 ? own_bounds.start
                            : part == 2 ? own_bounds.residual
                            : part == 3 ? own_bounds.stored
                            : part == 4 ? own_bounds.scale
                            : part == 5 ? own_bounds.inverse
                            : part == 6 ? own_bounds.rounded
                                        : own_bounds.typical;
        raise(&bounds[part], bound);
    }
    if (part == 0) {
        start[i] = from_here;
        if (scale) scale[i] = factor;
        if (own) own[i] = wider;
        if (live) slot[b * r.n + j] = table.enter(b, j, sums.hash);
    }
    __syncwarp();  // or what comes next is done twice: by the lane that was here, and by the others
}

/// A block to each group of columns, and one that looks how far rows reach.
template <class T>
__device__ __forceinline__ void origins(const T* x, const Rows& xr, const T* c, const Rows& cr, const Active& active,
                                        int metric, T* mu, Reach* reaches) {
    const int64_t groups = (cr.d + ORIGIN_COLUMNS - 1) / ORIGIN_COLUMNS + 1, all = active.problems(cr.b) * groups;
    for (int64_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
        const int64_t b = tile / groups, group = tile % groups, p = active.problem(b);
        if (group + 1 < groups) {
            origin(c, cr, p, b, group * ORIGIN_COLUMNS, metric == SQUARED_EUCLIDEAN, mu);
        } else {
            const Reach found = reach(x, xr, c, cr, active, p);
            if (threadIdx.x == 0) reaches[b] = found;
        }
    }
}

/// A block to as many centroids as it has eight lanes for.
template <class T>
__device__ __forceinline__ void move_all(const T* c, const Rows& cr, const Active& active, int metric,
                                         const Reach* reaches, const T* mu, int64_t pitch, int64_t padded, T* moved,
                                         float* start, float* scale, float* own, Bounds* bounds, const Table& table,
                                         uint32_t* slot) {
    __shared__ float block_bounds[BOUNDS];
    const int64_t shares = padded / (THREADS / MOVE_LANES), all = active.problems(cr.b) * shares;
    for (int64_t share = blockIdx.x; share < all; share += gridDim.x) {
        const int64_t b = share / shares, first = share % shares * (THREADS / MOVE_LANES);
        if (threadIdx.x < BOUNDS) block_bounds[threadIdx.x] = 0;
        __syncthreads();
        move(c, cr, active.problem(b), b, first, metric, mu, reaches[b], pitch, padded, moved, start, scale, own,
             block_bounds, table, slot);
        __syncthreads();
        if (threadIdx.x < BOUNDS) raise(&bounds[b].moved + threadIdx.x, block_bounds[threadIdx.x]);
    }
}

/// All of it for one problem, by one block: its slots of the table and its bounds are cleared first.
template <class T>
__device__ void prepare(const T* x, const Rows& xr, const T* c, const Rows& r, const Active& active, int64_t p,
                        int64_t b, int metric, T* mu, int64_t pitch, int64_t padded, T* moved, float* start,
                        float* search_start, float* scale, float* own, Bounds* bounds, const Table& table,
                        uint32_t* slot) {
    for (int64_t i = threadIdx.x; i < table.slots; i += blockDim.x) {
        table.keys[b * table.slots + i] = 0, table.first[b * table.slots + i] = 0;
    }
    __shared__ float block_bounds[BOUNDS];
    if (threadIdx.x < BOUNDS) block_bounds[threadIdx.x] = 0;
    for (int64_t first = 0; first < r.d; first += ORIGIN_COLUMNS) {
        origin(c, r, p, b, first, metric == SQUARED_EUCLIDEAN, mu);
    }
    const Reach found = reach(x, xr, c, r, active, p);
    for (int64_t first = 0; first < padded; first += ORIGIN_THREADS / MOVE_LANES) {
        move(c, r, p, b, first, metric, mu, found, pitch, padded, moved, start, scale, own, block_bounds, table, slot);
    }
    __syncthreads();
    if (threadIdx.x < BOUNDS) (&bounds[b].moved)[threadIdx.x] = block_bounds[threadIdx.x];
    __syncthreads();
    const float shift = bounds[b].shift(r.d);
    for (int64_t j = threadIdx.x; j < padded; j += blockDim.x) {
        settle_start(c, r, p, b, j, padded, table, slot, shift, start, search_start);
    }
}

/// A block to each problem. `listed` (lists) becomes zeros.
template <class T>
__device__ __forceinline__ void prepare_all(const T* x, const Rows& xr, const T* c, const Rows& cr,
                                            const Active& active, int metric, T* mu, int64_t pitch, int64_t padded,
                                            T* moved, float* start, float* search_start, float* scale, float* own,
                                            Bounds* bounds, const Table& table, uint32_t* slot, int64_t lists,
                                            uint32_t* listed) {
    const int64_t problems = active.problems(cr.b);
    for (int64_t i = global_thread(); i < lists; i += all_threads()) listed[i] = 0;
    for (int64_t b = blockIdx.x; b < problems; b += gridDim.x) {
        prepare(x, xr, c, cr, active, active.problem(b), b, metric, mu, pitch, padded, moved, start, search_start,
                scale, own, bounds, table, slot);
    }
}

// ---- Rows.

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

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(1024, 1)                                                              \
        prepare_means_##name(const T* c, Rows cr, Active active, Filter<T>* mu) {                                      \
        column_means(c, cr, active, mu);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void prepare_centroids_##name(const T* c, Rows cr, Active active, int metric,                \
                                                        const Filter<T>* mu, Filter<T>* moved, Filter<T>* bias,        \
                                                        double* largest) {                                             \
        centre(c, cr, active, metric, mu, moved, bias, largest);                                                       \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

static_assert(TENSOR_CENTROIDS % (ORIGIN_THREADS / MOVE_LANES) == 0 && TENSOR_CENTROIDS % (THREADS / MOVE_LANES) == 0,
              "a block's centroids are of one problem");

#define MOVED(T)                                                                                                       \
    T *mu, int64_t pitch, int64_t padded, T *moved, float *start, float *scale, float *own, Bounds *bounds,            \
        unsigned long long *keys, uint32_t *first_of, int64_t slots, uint32_t *slot

#define HALF_INSTANCE(name, T)                                                                                         \
    extern "C" __global__ void __launch_bounds__(ORIGIN_THREADS, 3) prepare_origin_##name(                             \
        const T* x, Rows xr, const T* c, Rows cr, Active active, int metric, T* mu, Reach* reaches) {                  \
        origins(x, xr, c, cr, active, metric, mu, reaches);                                                            \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 4)                                                           \
        prepare_moved_##name(const T* c, Rows cr, Active active, int metric, const Reach* reaches, MOVED(T)) {         \
        move_all(c, cr, active, metric, reaches, mu, pitch, padded, moved, start, scale, own, bounds,                  \
                 {keys, first_of, slots}, slot);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(ORIGIN_THREADS, 1)                                                    \
        prepare_all_##name(const T* x, Rows xr, const T* c, Rows cr, Active active, int metric, MOVED(T),              \
                           float* search_start, int64_t lists, uint32_t* listed) {                                     \
        prepare_all(x, xr, c, cr, active, metric, mu, pitch, padded, moved, start, search_start, scale, own, bounds,   \
                    {keys, first_of, slots}, slot, lists, listed);                                                     \
    }                                                                                                                  \
    extern "C" __global__ void pack_##name(const T* x, Rows r, int64_t pitch, int64_t rows, T* out) {                  \
        pack(x, r, pitch, rows, out);                                                                                  \
    }
HALF_INSTANCE(f16, __half)
HALF_INSTANCE(bf16, __nv_bfloat16)
#undef HALF_INSTANCE
#undef MOVED

#define STARTS(name, T)                                                                                                \
    extern "C" __global__ void settle_starts_##name(                                                                   \
        const T* c, Rows cr, Active active, int64_t padded, unsigned long long* keys, uint32_t* first, int64_t slots,  \
        const uint32_t* slot, const Bounds* bounds, float* start, float* search_start) {                               \
        settle_starts(c, cr, active, padded, {keys, first, slots}, slot, bounds, start, search_start);                 \
    }
STARTS(f16, __half)
STARTS(bf16, __nv_bfloat16)
STARTS(f32, float)
#undef STARTS
