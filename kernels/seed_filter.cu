// Passes of k-means++ that find most seeds too far to count by products of rounded rows, on tensor cores
// (src/cpu/spread_filter.rs has the bound, and its proof).
//
// Rows are rounded once, to bf16, and kept for all passes. A pass reads these, half the bytes of f32, and the rows
// themselves only where a seed may be nearer than those before, whose distance is then what it always is.
#include "arch/mma.cuh"
#include "candidates.cuh"
#include "exact/argmin.cuh"

/// Columns of a rounded row are whole groups of so many: of four lanes each takes 16 of them, for four products.
constexpr int GROUP = 64;
/// Rows that a warp takes at a time, and candidates of a product.
constexpr int TALL = 16, WIDE = 8;
/// Rows of which a centre is the mean, at most.
constexpr int SAMPLED = 32;
/// The largest norm of a row that is bounded, and the least distance that candidates are filtered by.
constexpr double FAR = 1e17, NEAR = 1e-25;

/// What is known of a rounded row: its norm, and a bound on its distance from the row.
struct Rounded {
    float norm, residue;
};

/// The rows of all problems, rounded: `(b, n, width)`, and `(b, n)`.
struct RoundedRows {
    const __nv_bfloat16* values;
    const Rounded* bounds;
    int64_t width;
};

/// A value as distances take it.
template <class T>
__device__ __forceinline__ float scaled(T value, bool by, float of) {
    return by ? times(filter(value), of) : filter(value);
}

/// The mean of some rows, `(b, d)`, by which all are moved; 0 where it is not finite.
template <class T>
__device__ void centre_rows(const T* x, const Rows& r, const double* norms, float* centre) {
    const int64_t few = min(r.n, int64_t(SAMPLED));
    for (int64_t i = global_thread(); i < r.b * r.d; i += all_threads()) {
        const int64_t b = i / r.d;
        float sum = 0;
        for (int64_t t = 0; t < few; ++t) {
            const int64_t row = t * r.n / few;
            const float of = norms ? reciprocal<float>(norms[b * r.n + row]) : 1;
            sum += scaled(row_of(x, r, b, row)[i % r.d], norms, of);
        }
        const float mean = sum / float(few);
        centre[i] = fabsf(mean) < FAR ? mean : 0;
    }
}

/// A warp to a row.
template <class T>
__device__ void round_rows(const T* x, const Rows& r, const double* norms, const float* centre, int64_t width,
                           __nv_bfloat16* values, Rounded* bounds) {
    constexpr float u = 0x1p-24f;
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* const row = row_of(x, r, b, i % r.n);
        const float of = norms ? reciprocal<float>(norms[i]) : 1;
        float squares = 0, residues = 0;
        for (int64_t j = lane; j < width; j += WARP) {
            const float v = j < r.d ? scaled(row[j], norms, of) - centre[b * r.d + j] : 0;
            const __nv_bfloat16 rounded = __float2bfloat16_rn(v);
            const float kept = __bfloat162float(rounded), left = v - kept;
            values[i * width + j] = rounded;
            squares += kept * kept, residues += left * left;
        }
        squares = float(warp_sum(double(squares))), residues = float(warp_sum(double(residues)));
        if (lane == 0) {
            const float norm = sqrtf(squares), left = sqrtf(residues);
            // Differences lose two units of what is rounded, and sums of squares as many as they have terms.
            const float residue = left * (1 + (r.d + 8) * u) + 4 * u * (norm + left) + r.d * 0x1p-126f;
            const bool known = norm <= FAR && residue <= FAR;
            bounds[i] = {known ? norm : 0, known ? residue : INFINITY};
        }
    }
}

/// What a block of threads shares in a pass, and behind it the candidates' values, each with room behind it by which
/// lanes that load parts of several at once do not meet in a bank.
struct Shared {
    Candidates candidates;
    float bias[CANDIDATES];
    uint32_t masks[SEED_THREADS / WARP][TALL][CANDIDATES / WARP];
    Rounded most;
};

__device__ __forceinline__ int64_t line_bytes(int64_t width) { return 2 * width + 16; }

/// Loads the candidates of problem `b`.
__device__ void load_candidates(Shared& shared, uint8_t* lines, const RoundedRows& rounded, int64_t b, int64_t n) {
    const int count = shared.candidates.count, padded = (count + WIDE - 1) / WIDE * WIDE;
    const int64_t words = rounded.width / 8;
    __syncthreads();
    if (threadIdx.x == 0) shared.most = {0, 0};
    __syncthreads();
    for (int64_t i = threadIdx.x; i < padded * words; i += blockDim.x) {
        const int64_t c = i / words;
        uint4 word = {0, 0, 0, 0};
        if (c < count) {
            const __nv_bfloat16* const row = rounded.values + (b * n + shared.candidates.rows[c]) * rounded.width;
            word = reinterpret_cast<const uint4*>(row)[i % words];
        }
        *reinterpret_cast<uint4*>(lines + c * line_bytes(rounded.width) + i % words * 16) = word;
    }
    if (threadIdx.x < padded) {
        const bool is = threadIdx.x < count;
        const Rounded own = is ? rounded.bounds[b * n + shared.candidates.rows[threadIdx.x]] : Rounded{0, 0};
        shared.bias[threadIdx.x] = is ? 0.5f * own.norm * own.norm : INFINITY;
        // Bits of floats above 0 are in their order.
        atomicMax(reinterpret_cast<int*>(&shared.most.norm), __float_as_int(own.norm));
        atomicMax(reinterpret_cast<int*>(&shared.most.residue), __float_as_int(own.residue));
    }
    __syncthreads();
}

/// No score of a row above this is that of a candidate nearer than `near`, of what distances of `d` columns are.
__device__ __forceinline__ float farthest(double near, const Rounded& own, const Rounded& most, int64_t d) {
    constexpr double u = 0x1p-24;
    if (!(near >= NEAR)) return INFINITY;
    const double farther = 1 + 3 * double(d / WARP + 12) * u, g = 4 * double(d + WARP) * u;
    const double reach = sqrt(near * farther) + own.residue + most.residue, norms = double(own.norm) + most.norm;
    return __double2float_ru(0.5 * (reach * reach + g * norms * norms - double(own.norm) * own.norm));
}

/// Sets the bits of the candidates that may be nearer to the rows from `top` on than `cut` says, of which lane l has
/// those of row l / 4 and of that 8 below it; -inf where a row does not count.
__device__ __forceinline__ void mark(Shared& shared, const uint8_t* lines, const RoundedRows& rounded, int64_t first,
                                     int64_t rows, const float (&cut)[2]) {
    constexpr int TILES = CANDIDATES / WIDE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, tiles = (shared.candidates.count + WIDE - 1) / WIDE;
    float acc[TILES][4] = {};
    const __nv_bfloat16* own[2];
    for (int h = 0; h < 2; ++h) {
        own[h] = rounded.values + (first + min(int64_t(lane / 4 + 8 * h), rows - 1)) * rounded.width + lane % 4 * 16;
    }
    const uint8_t* const others = lines + lane / 4 * line_bytes(rounded.width) + lane % 4 * 32;
    uint4 next[2][2];
    const auto load = [&](int64_t column) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4* const from = reinterpret_cast<const uint4*>(own[h] + column);
            next[h][0] = __ldg(from), next[h][1] = __ldg(from + 1);
        }
    };
    load(0);
#pragma unroll 1
    for (int64_t column = 0; column < rounded.width; column += GROUP) {
        const uint32_t upper[8] = {next[0][0].x, next[0][0].y, next[0][0].z, next[0][0].w,
                                   next[0][1].x, next[0][1].y, next[0][1].z, next[0][1].w};
        const uint32_t lower[8] = {next[1][0].x, next[1][0].y, next[1][0].z, next[1][0].w,
                                   next[1][1].x, next[1][1].y, next[1][1].z, next[1][1].w};
        if (column + GROUP < rounded.width) load(column + GROUP);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if (j >= tiles) continue;
            const uint8_t* const from = others + j * WIDE * line_bytes(rounded.width) + column * 2;
            const uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + 16);
            const uint32_t b[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int step = 0; step < 4; ++step) {
                // Columns may be taken in any order, of both alike.
                const uint32_t a[4] = {upper[2 * step], lower[2 * step], upper[2 * step + 1], lower[2 * step + 1]};
                mma(acc[j], a, b[2 * step], b[2 * step + 1], __nv_bfloat16());
            }
        }
    }
    uint32_t(&masks)[TALL][CANDIDATES / WARP] = shared.masks[warp];
    for (int i = lane; i < TALL * (CANDIDATES / WARP); i += WARP)
        masks[i / (CANDIDATES / WARP)][i % (CANDIDATES / WARP)] = 0;
    __syncwarp();
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (j >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = j * WIDE + lane % 4 * 2 + e % 2;
            // What is not a number says nothing.
            const bool far = shared.bias[c] - acc[j][e] > cut[e / 2] || cut[e / 2] == -INFINITY;
            if (!far && c < shared.candidates.count) atomicOr(&masks[lane / 4 + e / 2 * 8][c / WARP], 1u << c % WARP);
        }
    }
    __syncwarp();
}

/// Candidates whose distances to a row are added up at once.
constexpr int AT_ONCE = 4;

/// Calls `take` with each candidate of problem `b` that may be nearer to a row of `begin`..`end`, in ascending order,
/// and its distance, by all lanes of a warp. `starts` and `ends` are called with each row that has any, and what it
/// has.
template <class T, class Starts, class Take, class Ends>
__device__ void pass(const T* x, const Rows& r, const RoundedRows& rounded, int64_t b, int64_t begin, int64_t end,
                     Shared& shared, uint8_t* lines, const double* nearest, const double* weights, const double* norms,
                     int by, Starts starts, Take take, Ends ends) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    load_candidates(shared, lines, rounded, b, r.n);
    const uint32_t* const candidates = shared.candidates.rows;
    for (int64_t top = begin + warp * TALL; top < end; top += blockDim.x / WARP * TALL) {
        const int64_t rows = min(end - top, int64_t(TALL));
        float cut[2];
        for (int h = 0; h < 2; ++h) {
            const int64_t i = lane / 4 + 8 * h, at = b * r.n + top + i;
            // Nothing is drawn by the distance of others.
            const bool counts = i < rows && nearest[top + i] > 0 && (weights ? weights[at] : 1.0) > 0;
            const double near = counts ? nearest[top + i] * (by == COSINE ? 2 : 1) : 0;
            cut[h] = counts ? farthest(near, rounded.bounds[at], shared.most, r.d) : -INFINITY;
        }
        mark(shared, lines, rounded, b * r.n + top, rows, cut);
        const uint32_t(&masks)[TALL][CANDIDATES / WARP] = shared.masks[warp];
        uint32_t any = 0;
        for (int w = 0; lane < TALL && w < CANDIDATES / WARP; ++w) any |= masks[lane][w];
        for (uint32_t marked = __ballot_sync(~0u, any != 0); marked; marked &= marked - 1) {
            const int i = __ffs(marked) - 1;
            const int64_t row = top + i;
            const T* const own = row_of(x, r, b, row);
            const float of_own = norms ? reciprocal<float>(norms[b * r.n + row]) : 1;
            starts(row);
            for (int w = 0; w < CANDIDATES / WARP; ++w) {
                uint32_t left = masks[i][w];
                while (left) {
                    int found[AT_ONCE], count = 0;
                    const T* c[AT_ONCE];
                    float of_c[AT_ONCE], sums[AT_ONCE] = {};
#pragma unroll
                    for (int q = 0; q < AT_ONCE; ++q) {
                        found[q] = q && !left ? found[0] : w * WARP + __ffs(left) - 1;
                        if (left) ++count, left &= left - 1;
                        c[q] = row_of(x, r, b, candidates[found[q]]);
                        of_c[q] = norms ? reciprocal<float>(norms[b * r.n + candidates[found[q]]]) : 1;
                    }
                    for (int64_t j = lane; j < r.d; j += WARP) {
                        const float v = scaled(own[j], norms, of_own);
#pragma unroll
                        for (int q = 0; q < AT_ONCE; ++q) {
                            const float t = less(v, scaled(c[q][j], norms, of_c[q]));
                            sums[q] = plus(sums[q], times(t, t));
                        }
                    }
#pragma unroll
                    for (int q = 0; q < AT_ONCE; ++q) {
                        for (int step = WARP / 2; step; step /= 2) {
                            sums[q] = plus(sums[q], __shfl_xor_sync(~0u, sums[q], step));
                        }
                        if (q < count && candidates[found[q]] != row) {
                            take(row, found[q], spread_distance(by, double(sums[q]), own, c[q], r.d));
                        }
                    }
                }
            }
            ends(row);
        }
        __syncwarp();
    }
    __syncthreads();
}

/// As `list_rows` of greedy.cu does.
template <class T>
__device__ void list_rounded(const T* x, const Rows& r, const RoundedRows& rounded, const double* state,
                             const double* weights, const double* norms, const uint32_t* tried, int64_t trials,
                             const uint32_t* rounds, const uint32_t* drawn, int64_t count, int metric, int64_t rows,
                             const Lists& lists, const uint32_t* taken, int64_t wanted) {
    extern __shared__ uint4 lines[];
    __shared__ Shared shared;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        if (taken[b] >= wanted) continue;
        const double* const nearest = state + 2 * b * r.n;
        const int drawn_for = int(min(trials * rounds[b], count));
        shared.candidates.find(tried + b * trials, int(trials), drawn + b * count, drawn_for);
        double near = 0;
        pass(
            x, r, rounded, b, begin, end, shared, reinterpret_cast<uint8_t*>(lines), nearest, weights, norms,
            spread_by(metric), [&](int64_t row) { near = nearest[row]; },
            [&](int64_t row, int candidate, double distance) {
                if (distance < near && threadIdx.x % WARP == 0) lists.add(b, candidate, row, distance);
            },
            [](int64_t) {});
    }
}

/// As `lower_rows` of seed.cu does, after the first block.
template <class T>
__device__ void lower_rounded(const T* x, const Rows& r, const RoundedRows& rounded, double* state,
                              const double* weights, const double* norms, const uint32_t* seeds, const double* times,
                              int64_t count, int metric, int64_t rows, const uint32_t* taken, int64_t wanted) {
    extern __shared__ uint4 lines[];
    __shared__ Shared shared;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        // A distance to the last seed is nobody's probability.
        if (taken[b] >= wanted) continue;
        double *const nearest = state + 2 * b * r.n, *const arrivals = nearest + r.n;
        shared.candidates.find(nullptr, 0, seeds + b * count, int(count));
        double near = 0, before = 0, arrival = 0;
        pass(
            x, r, rounded, b, begin, end, shared, reinterpret_cast<uint8_t*>(lines), nearest, weights, norms,
            spread_by(metric), [&](int64_t row) { near = before = nearest[row], arrival = arrivals[row]; },
            [&](int64_t, int seed, double distance) {
                if (distance < near)
                    arrival = postponed(arrival, times[b * count + seed], near, distance), near = distance;
            },
            [&](int64_t row) {
                if (near < before && threadIdx.x % WARP == 0) nearest[row] = near, arrivals[row] = arrival;
            });
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void centre_##name(const T* x, Rows r, const double* norms, float* centre) {                 \
        centre_rows(x, r, norms, centre);                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void round_##name(const T* x, Rows r, const double* norms, const float* centre,              \
                                            int64_t width, __nv_bfloat16* values, Rounded* bounds) {                   \
        round_rows(x, r, norms, centre, width, values, bounds);                                                        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, 2) list_rounded_##name(                                 \
        const T* x, Rows r, const __nv_bfloat16* values, const Rounded* bounds, int64_t width, const double* state,    \
        const double* weights, const double* norms, const uint32_t* tried, int64_t trials, const uint32_t* rounds,     \
        const uint32_t* drawn, int64_t count, int metric, int64_t rows, uint32_t* list_rows, uint32_t* list_counts,    \
        double* list_distances, int64_t room, const uint32_t* taken, int64_t wanted) {                                 \
        list_rounded(x, r, {values, bounds, width}, state, weights, norms, tried, trials, rounds, drawn, count,        \
                     metric, rows, {list_rows, list_counts, list_distances, r.n, room}, taken, wanted);                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_THREADS, 2) lower_rounded_##name(                                \
        const T* x, Rows r, const __nv_bfloat16* values, const Rounded* bounds, int64_t width, double* state,          \
        const double* weights, const double* norms, const uint32_t* seeds, const double* times, int64_t count,         \
        int metric, int64_t rows, const uint32_t* taken, int64_t wanted) {                                             \
        lower_rounded(x, r, {values, bounds, width}, state, weights, norms, seeds, times, count, metric, rows, taken,  \
                      wanted);                                                                                         \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
#undef INSTANCE
