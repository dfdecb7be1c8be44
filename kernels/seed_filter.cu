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

/// The norm of a rounded row, and a bound on its distance from the row.
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
__device__ __forceinline__ float scaled(T value, bool scales, float inverse_norm) {
    return scales ? times(filter(value), inverse_norm) : filter(value);
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
            const float inverse_norm = norms ? reciprocal<float>(norms[b * r.n + row]) : 1;
            sum += scaled(row_of(x, r, b, row)[i % r.d], norms, inverse_norm);
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
        const float inverse_norm = norms ? reciprocal<float>(norms[i]) : 1;
        float squares = 0, residues = 0;
        for (int64_t j = lane; j < width; j += WARP) {
            const float v = j < r.d ? scaled(row[j], norms, inverse_norm) - centre[b * r.d + j] : 0;
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

/// The state that a block of threads shares in a pass. Behind it lie the candidates' values, and behind each candidate
/// there is room by which lanes that load parts of several at once do not meet in a bank.
struct Shared {
    Candidates candidates;
    float bias[CANDIDATES];
    unsigned long long gains[CANDIDATES];
    /// Of each row of a warp's tile the candidates that may be nearer, and all of them one after another, each with its
    /// row.
    unsigned long long masks[SEED_FILTER_THREADS / WARP][TALL];
    uint16_t pairs[SEED_FILTER_THREADS / WARP][TALL * CANDIDATES];
    Rounded most;
};

__device__ __forceinline__ int line_bytes(int64_t width) { return int(2 * width) + 16; }

/// Loads the candidates of problem `b`: a warp one after another.
__device__ void load_candidates(Shared& shared, uint8_t* lines, const RoundedRows& rounded, int64_t b, int64_t n) {
    const int count = shared.candidates.count, padded = (count + WIDE - 1) / WIDE * WIDE,
              words = int(rounded.width / 8);
    const int lane = threadIdx.x % WARP, line = line_bytes(rounded.width);
    if (threadIdx.x == 0) shared.most = {0, 0};
    for (int c = threadIdx.x / WARP; c < padded; c += SEED_FILTER_THREADS / WARP) {
        const int64_t row = b * n + shared.candidates.rows[min(c, count - 1)];
        const uint4* const from = reinterpret_cast<const uint4*>(rounded.values + row * rounded.width);
        uint4* const to = reinterpret_cast<uint4*>(lines + c * line);
        for (int i = lane; i < words; i += WARP) to[i] = from[i];
    }
    __syncthreads();
    if (threadIdx.x < padded) {
        const bool is = threadIdx.x < count;
        const Rounded own = is ? rounded.bounds[b * n + shared.candidates.rows[threadIdx.x]] : Rounded{0, 0};
        shared.bias[threadIdx.x] = 0.5f * own.norm * own.norm;
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

/// Sets the bits of the candidates that may be nearer to the rows from `first` on than `cut(h)` says, which is asked
/// once of row lane / 4 + 8 h: -inf where a row does not count.
template <int TILES, class Cut>
__device__ __forceinline__ void mark(Shared& shared, const uint8_t* lines, const RoundedRows& rounded, int64_t first,
                                     int64_t rows, Cut cut_of) {
    const int lane = threadIdx.x % WARP, tiles = (shared.candidates.count + WIDE - 1) / WIDE;
    const int line = line_bytes(rounded.width), width = int(rounded.width);
    float acc[TILES][4] = {};
    const __nv_bfloat16* own[2];
    for (int h = 0; h < 2; ++h) {
        own[h] = rounded.values + (first + min(int64_t(lane / 4 + 8 * h), rows - 1)) * rounded.width + lane % 4 * 16;
    }
    const uint8_t* const others = lines + lane / 4 * line + lane % 4 * 32;
    uint4 next[2][2];
    const auto load = [&](int column) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint4* const from = reinterpret_cast<const uint4*>(own[h] + column);
            next[h][0] = __ldg(from), next[h][1] = __ldg(from + 1);
        }
    };
    load(0);
    const float cut[2] = {cut_of(0), cut_of(1)};
#pragma unroll 1
    for (int column = 0; column < width; column += GROUP) {
        const uint32_t upper[8] = {next[0][0].x, next[0][0].y, next[0][0].z, next[0][0].w,
                                   next[0][1].x, next[0][1].y, next[0][1].z, next[0][1].w};
        const uint32_t lower[8] = {next[1][0].x, next[1][0].y, next[1][0].z, next[1][0].w,
                                   next[1][1].x, next[1][1].y, next[1][1].z, next[1][1].w};
        if (column + GROUP < width) load(column + GROUP);
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if (j >= tiles) continue;
            const uint8_t* const from = others + j * WIDE * line + column * 2;
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
    unsigned long long(&masks)[TALL] = shared.masks[threadIdx.x / WARP];
    unsigned long long marks[2] = {};
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (j >= tiles) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int c = j * WIDE + lane % 4 * 2 + e % 2;
            // A score that is not a number proves nothing, so its candidate stays.
            const bool far = shared.bias[c] - acc[j][e] > cut[e / 2] || cut[e / 2] == -INFINITY;
            if (!far && c < shared.candidates.count) marks[e / 2] |= 1ull << c;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        for (int step = 1; step < 4; step *= 2) marks[h] |= __shfl_xor_sync(~0u, marks[h], step);
        if (lane % 4 == 0) masks[lane / 4 + 8 * h] = marks[h];
    }
    __syncwarp();
}

/// Pairs of a row and a candidate whose distances are added up at once.
constexpr int AT_ONCE = 4;

/// Calls `take` with each row of `begin`..`end` and each candidate of problem `b` that may be nearer to it, `AT_ONCE`
/// at a time, by all lanes of a warp: lane l has the l-th of these pairs, the number of its row in the tile, the
/// candidate and the distance, and there are `count`; of a row candidates are in ascending order. Before, `starts` is
/// called with a tile, and after it `ends`: lane l has row l.
template <int TILES, class T, class Starts, class Take, class Ends>
__device__ void pass(const T* x, const Rows& r, const RoundedRows& rounded, int64_t b, int64_t begin, int64_t end,
                     Shared& shared, uint8_t* lines, const double* nearest, const double* weights, const double* norms,
                     int by, Starts starts, Take take, Ends ends) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t* const candidates = shared.candidates.rows;
    load_candidates(shared, lines, rounded, b, r.n);
    for (int64_t top = begin + warp * TALL; top < end; top += SEED_FILTER_ROWS) {
        const int64_t rows = min(end - top, int64_t(TALL));
        starts(top, rows);
        mark<TILES>(shared, lines, rounded, b * r.n + top, rows, [&](int h) {
            const int64_t row = top + min(int64_t(lane / 4 + 8 * h), rows - 1), at = b * r.n + row;
            const double near = nearest[row], weight = weights ? weights[at] : 1.0;
            const Rounded own = rounded.bounds[at];
            // Nothing is drawn by the distance of others.
            const bool counts = lane / 4 + 8 * h < rows && near > 0 && weight > 0;
            return counts ? farthest(by == COSINE ? 2 * near : near, own, shared.most, r.d) : -INFINITY;
        });
        // The pairs, row by row.
        uint16_t* const pairs = shared.pairs[warp];
        unsigned long long mask = lane < TALL ? shared.masks[warp][lane] : 0;
        int place = __popcll(mask);
        for (int step = 1; step < WARP; step *= 2) {
            const int before = __shfl_up_sync(~0u, place, step);
            if (lane >= step) place += before;
        }
        const int all = __shfl_sync(~0u, place, WARP - 1);
        for (place -= __popcll(mask); mask; mask &= mask - 1) pairs[place++] = lane * CANDIDATES + __ffsll(mask) - 1;
        __syncwarp();
        for (int first = 0; first < all; first += AT_ONCE) {
            const T *own[AT_ONCE], *c[AT_ONCE];
            float of_own[AT_ONCE], of_c[AT_ONCE], sums[AT_ONCE] = {};
#pragma unroll
            for (int q = 0; q < AT_ONCE; ++q) {
                const int pair = pairs[min(first + q, all - 1)];
                const int64_t row = top + pair / CANDIDATES, candidate = candidates[pair % CANDIDATES];
                own[q] = row_of(x, r, b, row), c[q] = row_of(x, r, b, candidate);
                of_own[q] = norms ? reciprocal<float>(norms[b * r.n + row]) : 1;
                of_c[q] = norms ? reciprocal<float>(norms[b * r.n + candidate]) : 1;
            }
#pragma unroll 1
            for (int j = lane; j < int(r.d); j += WARP) {
#pragma unroll
                for (int q = 0; q < AT_ONCE; ++q) {
                    const float t = less(scaled(own[q][j], norms, of_own[q]), scaled(c[q][j], norms, of_c[q]));
                    sums[q] = plus(sums[q], times(t, t));
                }
            }
            float sum = 0;
#pragma unroll
            for (int q = 0; q < AT_ONCE; ++q) {
                for (int step = WARP / 2; step; step /= 2) sums[q] = plus(sums[q], __shfl_xor_sync(~0u, sums[q], step));
                if (lane == q) sum = sums[q];
            }
            const int count = min(AT_ONCE, all - first), pair = pairs[min(first + lane, all - 1)];
            const int64_t row = top + pair / CANDIDATES, candidate = candidates[pair % CANDIDATES];
            double distance = no_arrival();
            // A row is no candidate for itself.
            if (lane < count && row != candidate) {
                distance = spread_distance(by, double(sum), row_of(x, r, b, row), row_of(x, r, b, candidate), r.d);
            }
            __syncwarp();
            take(count, pair / CANDIDATES, pair % CANDIDATES, distance);
        }
        ends(top, rows);
        __syncwarp();
    }
    __syncthreads();
}

/// As `list_rows` of greedy.cu does.
template <class T>
__device__ void list_rounded(const T* x, const Rows& r, const RoundedRows& rounded, const double* state,
                             const double* weights, const double* norms, const uint32_t* tried, int64_t trials,
                             const uint32_t* rounds, const uint32_t* drawn, int64_t count, const double* most,
                             int metric, int64_t rows, const Nearer& nearer, const uint32_t* taken, int64_t wanted) {
    extern __shared__ uint4 lines[];
    __shared__ Shared shared;
    const int lane = threadIdx.x % WARP;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        if (taken[b] >= wanted) continue;
        const double* const nearest = state + 2 * b * r.n;
        const Terms term = {weights ? weights + b * r.n : nullptr, potential_units(most[b], r.n)};
        const int drawn_for = int(min(trials * rounds[b], count));
        shared.candidates.find(tried + b * trials, int(trials), drawn + b * count, drawn_for);
        if (threadIdx.x < CANDIDATES) shared.gains[threadIdx.x] = 0;
        double near = 0;
        unsigned long long mask = 0;
        int64_t top = 0;
        pass<CANDIDATES / WIDE>(
            x, r, rounded, b, begin, end, shared, reinterpret_cast<uint8_t*>(lines), nearest, weights, norms,
            spread_by(metric),
            [&](int64_t first, int64_t all) {
                near = nearest[first + min(int64_t(lane), all - 1)], mask = 0, top = first;
            },
            [&](int pairs, int row, int candidate, double distance) {
                const double before = __shfl_sync(~0u, near, row);
                const bool is = lane < pairs && distance < before;
                if (is) {
                    nearer.add(b, candidate, top + row, distance);
                    atomicAdd(&shared.gains[candidate], term(top + row, before) - term(top + row, distance));
                }
                for (uint32_t left = __ballot_sync(~0u, is); left; left &= left - 1) {
                    const int pair = __ffs(left) - 1, its_row = __shfl_sync(~0u, row, pair);
                    const int its_candidate = __shfl_sync(~0u, candidate, pair);
                    if (lane == its_row) mask |= 1ull << its_candidate;
                }
            },
            [&](int64_t first, int64_t all) {
                if (lane < all) nearer.masks[b * r.n + first + lane] = mask;
            });
        if (threadIdx.x < shared.candidates.count && shared.gains[threadIdx.x]) {
            atomicAdd(&nearer.gains[nearer.list(b, threadIdx.x)], shared.gains[threadIdx.x]);
        }
        __syncthreads();
    }
}

/// As `lower_rows` of seed.cu does, after the first block.
template <class T>
__device__ void lower_rounded(const T* x, const Rows& r, const RoundedRows& rounded, double* state,
                              const double* weights, const double* norms, const uint32_t* seeds, const double* times,
                              int64_t count, int metric, int64_t rows, const uint32_t* taken, int64_t wanted) {
    extern __shared__ uint4 lines[];
    __shared__ Shared shared;
    const int lane = threadIdx.x % WARP;
    const int64_t parts = (r.n + rows - 1) / rows;
    for (int64_t tile = blockIdx.x; tile < r.b * parts; tile += gridDim.x) {
        const int64_t b = tile / parts, begin = tile % parts * rows, end = min(begin + rows, r.n);
        // A distance to the last seed is nobody's probability.
        if (taken[b] >= wanted) continue;
        double *const nearest = state + 2 * b * r.n, *const arrivals = nearest + r.n;
        shared.candidates.find(nullptr, 0, seeds + b * count, int(count));
        double near = 0, before = 0, arrival = 0;
        pass<(KMEANSPP_DRAWS + WIDE - 1) / WIDE>(
            x, r, rounded, b, begin, end, shared, reinterpret_cast<uint8_t*>(lines), nearest, weights, norms,
            spread_by(metric),
            [&](int64_t first, int64_t all) {
                const int64_t row = first + min(int64_t(lane), all - 1);
                near = before = nearest[row], arrival = arrivals[row];
            },
            [&](int pairs, int row, int seed, double distance) {
                const double time = times[b * count + seed];
                for (int q = 0; q < pairs; ++q) {
                    const double one = __shfl_sync(~0u, distance, q), now = __shfl_sync(~0u, time, q);
                    if (lane != __shfl_sync(~0u, row, q) || !(one < near)) continue;
                    arrival = postponed(arrival, now, near, one), near = one;
                }
            },
            [&](int64_t first, int64_t all) {
                if (lane < all && near < before) nearest[first + lane] = near, arrivals[first + lane] = arrival;
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
    extern "C" __global__ void __launch_bounds__(SEED_FILTER_THREADS, 2) list_rounded_##name(                          \
        const T* x, Rows r, const __nv_bfloat16* values, const Rounded* bounds, int64_t width, const double* state,    \
        const double* weights, const double* norms, const uint32_t* tried, int64_t trials, const uint32_t* rounds,     \
        const uint32_t* drawn, int64_t count, const double* most, int metric, int64_t rows, uint32_t* counts,          \
        uint32_t* nearer_rows, unsigned long long* gains, unsigned long long* masks, double* distances, int64_t room,  \
        const uint32_t* taken, int64_t wanted) {                                                                       \
        list_rounded(x, r, {values, bounds, width}, state, weights, norms, tried, trials, rounds, drawn, count, most,  \
                     metric, rows, {counts, nearer_rows, gains, masks, distances, r.n, room}, taken, wanted);          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(SEED_FILTER_THREADS, 2) lower_rounded_##name(                         \
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
