// Attention of one token over a cache that is read by clusters: chosen tokens exactly, the others as their clusters'
// means.
//
// Four launches. `attend_scores` scores the query heads against the mean keys. `select_tokens` of select.cu ranks the
// clusters and lists the tokens of the best, up to a budget. `attend_split` reads keys and values of what is listed
// where they lie, and adds the means of what is left, in pieces of ATTEND_ROWS rows; a piece keeps its largest score,
// its sum of weights and its weighted values (Dao et al. 2023, "Flash-Decoding"). `attend_merge` adds the pieces up.
// Traffic: the mean keys and mean values, the listed keys and values, once for all query heads that share them.
#include "common.cuh"
#include "listed.cuh"
#include "scan.cuh"

constexpr int ROWS = ATTEND_ROWS, BLOCK = ATTEND_THREADS, WARPS = BLOCK / WARP;
constexpr int EACH = 8;                  // columns of a lane
constexpr int UNROLL = 2;                // rows of a lane under way
constexpr int MERGERS = ATTEND_MERGERS;  // threads that add up a column

/// A cache and the queries of one token (`Cache` in src/cuda/attend.rs). A unit is what chooses alone: the query heads
/// of a key head together, or each of them.
struct Cache {
    int64_t head_stride;               // from a key head to the next, in elements; tokens are `d` apart
    int64_t units, group;              // units of a key head, and query heads of a unit
    int64_t sinks, clustered, tokens;  // those before the clusters, those in them, and all
    int64_t k, budget;
    float scale;
};

/// `EACH` neighbouring columns in f32.
template <class T>
__device__ __forceinline__ void load_columns(float (&v)[EACH], const T* from) {
    constexpr int PIECES = EACH * sizeof(T) / 16;
    uint4 raw[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    const T* const values = reinterpret_cast<const T*>(raw);
#pragma unroll
    for (int q = 0; q < EACH; ++q) v[q] = filter(values[q]);
}

/// The sums over the LANES neighbouring lanes that share a row.
template <int LANES>
__device__ __forceinline__ float over_lanes(float v) {
#pragma unroll
    for (int lanes = 1; lanes < LANES; lanes *= 2) v += __shfl_xor_sync(~0u, v, lanes);
    return v;
}

/// Scores of up to QUERIES query heads of one key head.
template <class T, int D, int QUERIES>
struct Queries {
    static constexpr int LANES = D / EACH;
    float values[QUERIES][EACH];

    __device__ __forceinline__ Queries(const T* q, int live, float scale) {
        const int part = threadIdx.x % LANES;
#pragma unroll
        for (int g = 0; g < QUERIES; ++g) {
            load_columns(values[g], q + min(g, live - 1) * D + part * EACH);
#pragma unroll
            for (int i = 0; i < EACH; ++i) values[g][i] *= scale;
        }
    }

    /// This lane's part of the scores of a row.
    __device__ __forceinline__ void score(float (&s)[QUERIES], const T* row) const {
        float v[EACH];
        load_columns(v, row + threadIdx.x % LANES * EACH);
#pragma unroll
        for (int g = 0; g < QUERIES; ++g) {
            s[g] = 0;
#pragma unroll
            for (int i = 0; i < EACH; ++i) s[g] = fmaf(values[g][i], v[i], s[g]);
        }
    }
};

/// `scores` (heads, units * group, k). A block takes ROWS mean keys of a key head.
template <class T, int D, int QUERIES>
__device__ void score_means(const T* q, const T* means, const Cache& c, float* scores) {
    constexpr int LANES = D / EACH, AT_ONCE = BLOCK / LANES;
    const int64_t pieces = (c.k + ROWS - 1) / ROWS, of_head = c.units * c.group;
    const int64_t head = blockIdx.x / pieces, first = blockIdx.x % pieces * ROWS;
    for (int64_t from = 0; from < of_head; from += QUERIES) {
        const int live = int(min(int64_t(QUERIES), of_head - from));
        const Queries<T, D, QUERIES> queries(q + (head * of_head + from) * D, live, c.scale);
#pragma unroll 1
        for (int at = threadIdx.x / LANES; at < ROWS; at += AT_ONCE) {
            const int64_t j = min(first + at, c.k - 1);
            float s[QUERIES];
            queries.score(s, means + (head * c.k + j) * D);
#pragma unroll
            for (int g = 0; g < QUERIES; ++g) {
                const float all = over_lanes<LANES>(s[g]);
                if (threadIdx.x % LANES == g % LANES && g < live && first + at < c.k) {
                    scores[(head * of_head + from + g) * c.k + j] = all;
                }
            }
        }
    }
}

/// Pieces of the rows of a unit, QUERIES of its query heads at a time. `partial` (units, parts, pieces, QUERIES, D +
/// 2): weighted values, the largest score and the sum of weights.
template <class T, int D, int QUERIES>
__device__ void attend_piece(const T* q, const T* keys, const T* values, const T* mean_values, const Cache& c,
                             const float* scores, const uint32_t* chosen, const float* left, bool estimate,
                             float* partial) {
    constexpr int LANES = D / EACH, AT_ONCE = BLOCK / LANES;
    __shared__ uint32_t from[ROWS];
    __shared__ float weights[QUERIES][ROWS], sums[WARPS][QUERIES][D];
    const int64_t means = estimate ? c.k : 0;
    const int64_t pieces = (c.tokens - c.clustered + c.budget + means + ROWS - 1) / ROWS;
    const int64_t parts = (c.group + QUERIES - 1) / QUERIES;
    const int64_t piece = blockIdx.x % pieces, unit = blockIdx.x / pieces / parts, part = blockIdx.x / pieces % parts;
    const int64_t head = unit / c.units, query = unit * c.group + part * QUERIES;
    const int live = int(min(int64_t(QUERIES), c.group - part * QUERIES));
    keys += head * c.head_stride, values += head * c.head_stride, mean_values += head * c.k * D;
    left += unit * c.k;
    const Listed listed = {chosen + unit * c.budget,        left, c.sinks, c.budget, means, c.clustered,
                           c.tokens - c.clustered - c.sinks};
    for (int i = threadIdx.x; i < ROWS; i += BLOCK) from[i] = listed[piece * ROWS + i];
    __syncthreads();
    const int part_of_row = threadIdx.x % LANES;
    {
        const Queries<T, D, QUERIES> queries(q + query * D, live, c.scale);
#pragma unroll UNROLL
        for (int i = threadIdx.x / LANES; i < ROWS; i += AT_ONCE) {
            const uint32_t row = from[i];
            float s[QUERIES];
            if (row < CLUSTER) {
                queries.score(s, keys + int64_t(row) * D);
            } else {
                const uint32_t j = row & ~CLUSTER;
                const float bias = row == NOTHING ? -INFINITY : __logf(left[j]);
#pragma unroll
                for (int g = 0; g < QUERIES; ++g) {
                    s[g] = part_of_row      ? 0
                           : row == NOTHING ? -INFINITY
                                            : scores[(query + min(g, live - 1)) * c.k + j] + bias;
                }
            }
#pragma unroll
            for (int g = 0; g < QUERIES; ++g) {
                const float all = over_lanes<LANES>(s[g]);
                if (part_of_row == g % LANES) weights[g][i] = all;
            }
        }
    }
    __syncthreads();
    float* const out = partial + ((unit * parts + part) * pieces + piece) * QUERIES * (D + 2);
    const int lane = threadIdx.x % WARP;
    for (int g = threadIdx.x / WARP; g < QUERIES; g += WARPS) {
        float most = -INFINITY, sum = 0;
        for (int i = lane; i < ROWS; i += WARP) most = fmaxf(most, weights[g][i]);
        for (int step = WARP / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        for (int i = lane; i < ROWS; i += WARP) {
            const float w = most == -INFINITY ? 0 : __expf(weights[g][i] - most);
            weights[g][i] = w, sum += w;
        }
        sum = over_lanes<WARP>(sum);
        if (lane == 0) out[g * (D + 2) + D] = most, out[g * (D + 2) + D + 1] = sum;
    }
    __syncthreads();
    float acc[QUERIES][EACH] = {};
#pragma unroll UNROLL
    for (int i = threadIdx.x / LANES; i < ROWS; i += AT_ONCE) {
        const uint32_t row = from[i];
        if (row == NOTHING) continue;
        float v[EACH];
        const T* const its = row < CLUSTER ? values + int64_t(row) * D : mean_values + int64_t(row & ~CLUSTER) * D;
        load_columns(v, its + part_of_row * EACH);
#pragma unroll
        for (int g = 0; g < QUERIES; ++g) {
            const float w = weights[g][i];
#pragma unroll
            for (int e = 0; e < EACH; ++e) acc[g][e] = fmaf(w, v[e], acc[g][e]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int g = 0; g < QUERIES; ++g) {
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
#pragma unroll
            for (int lanes = LANES; lanes < WARP; lanes *= 2) acc[g][e] += __shfl_xor_sync(~0u, acc[g][e], lanes);
            if (lane < LANES) sums[threadIdx.x / WARP][g][part_of_row * EACH + e] = acc[g][e];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * D; i += BLOCK) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += sums[w][i / D][i % D];
        out[i / D * (D + 2) + i % D] = sum;
    }
}

/// Adds up the pieces of a query head, a block of MERGERS threads to a column: `out` (heads, units * group, D).
template <class T, int D, int QUERIES>
__device__ void attend_merge(const Cache& c, int64_t pieces, const float* partial, T* out) {
    __shared__ float of_pieces[MERGERS][D], of_sums[MERGERS];
    const int64_t parts = (c.group + QUERIES - 1) / QUERIES;
    const int64_t unit = blockIdx.x / c.group, g = blockIdx.x % c.group;
    const float* const its = partial + ((unit * parts + g / QUERIES) * pieces * QUERIES + g % QUERIES) * (D + 2);
    constexpr int STEP = QUERIES * (D + 2);
    const int column = threadIdx.x % D, turn = threadIdx.x / D;
    float all[1] = {-INFINITY};
    for (int64_t p = threadIdx.x; p < pieces; p += MERGERS * D) all[0] = fmaxf(all[0], its[p * STEP + D]);
    over_block(all, -INFINITY, Larger());
    const float most = all[0];
    float sum = 0, value = 0;
#pragma unroll 4
    for (int64_t p = turn; p < pieces; p += MERGERS) {
        const float w = __expf(its[p * STEP + D] - most);
        sum = fmaf(w, its[p * STEP + D + 1], sum), value = fmaf(w, its[p * STEP + column], value);
    }
    of_pieces[turn][column] = value;
    if (column == 0) of_sums[turn] = sum;
    __syncthreads();
    if (turn) return;
    sum = value = 0;
#pragma unroll
    for (int t = 0; t < MERGERS; ++t) sum += of_sums[t], value += of_pieces[t][column];
    out[blockIdx.x * D + column] = T(value / sum);
}

#define KERNELS(suffix, T, D, Q)                                                                                       \
    extern "C" __global__ void __launch_bounds__(BLOCK, 7)                                                             \
        attend_scores_##D##_##Q##_##suffix(const T* q, const T* means, Cache c, float* scores) {                       \
        score_means<T, D, Q>(q, means, c, scores);                                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK) attend_split_##D##_##Q##_##suffix(                             \
        const T* q, const T* keys, const T* values, const T* mean_values, Cache c, const float* scores,                \
        const uint32_t* chosen, const float* left, int estimate, float* partial) {                                     \
        attend_piece<T, D, Q>(q, keys, values, mean_values, c, scores, chosen, left, estimate, partial);               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(MERGERS* D)                                                           \
        attend_merge_##D##_##Q##_##suffix(Cache c, int64_t pieces, const float* partial, T* out) {                     \
        attend_merge<T, D, Q>(c, pieces, partial, out);                                                                \
    }
#define INSTANCES(suffix, T)                                                                                           \
    KERNELS(suffix, T, 64, 1) KERNELS(suffix, T, 64, 4) KERNELS(suffix, T, 128, 1) KERNELS(suffix, T, 128, 4)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
INSTANCES(f32, float)
#undef INSTANCES
#undef KERNELS
