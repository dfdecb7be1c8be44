// Attention of groups of queries, each to a list of rows of its own.
//
// `route_scores` ranks the clusters of keys for each group: the mean over its queries of exp(q.c_j) / sum_i n_i
// exp(q.c_i), the estimated attention to a token of cluster j. `select_tokens` of select.cu lists the tokens of the
// best. `route_attend` is FlashAttention-2 (Dao 2023) over that list: a block takes ROWS queries of a group and walks
// the listed keys and values where they lie, KEYS at a time; nothing is permuted. A cluster's mean is a row with the
// logarithm of what it stands for.
//
// Traffic of a block: its queries, and 4 d bytes of each listed row from L2, for 4 ROWS d flops. Shared memory at d =
// 128: 64 KB, at 256: 96 KB, so that two blocks fit a multiprocessor, as their registers do.
#include "attention/listed.cuh"
#include "attention/route.cuh"

/// A block to each group of queries: `scores` (heads, units, k).
template <class T, int D, int TALL>
__device__ void score_clusters(const T* q, const T* means, const Route& r, const uint32_t* order,
                               const uint32_t* query_offsets, const uint32_t* offsets, float* scores) {
    constexpr int ROWS = WARPS * 16 * TALL;
    extern __shared__ __align__(128) uint8_t raw[];
    const uint32_t rows = shared_address(raw);
    const auto place_of = [=](int tile) { return rows + (ROWS + tile % 2 * KEYS) * PITCH<D> * 2; };
    __shared__ float sizes[2][KEYS], sums[WARPS][KEYS];
    const int64_t head = blockIdx.x / r.units, unit = blockIdx.x % r.units, key_head = head / r.group;
    q += head * r.queries * D, order += head * r.queries, means += key_head * r.k * D, offsets += key_head * (r.k + 1);
    query_offsets += head * (r.units + 1) + unit, scores += blockIdx.x * r.k;
    const int64_t begin = query_offsets[0], end = query_offsets[1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t own = rows + warp * 16 * TALL * PITCH<D> * 2;
    const int count = int((r.k + KEYS - 1) / KEYS);
    const auto load = [&](int tile) {
        const int64_t from = int64_t(tile) * KEYS, here = min(int64_t(KEYS), r.k - from);
        copy_rows<D, KEYS>(place_of(tile), means, [&](int i) { return i < here ? means + (from + i) * D : nullptr; });
        if (threadIdx.x < KEYS) {
            sizes[tile & 1][threadIdx.x] =
                threadIdx.x < here ? float(offsets[from + threadIdx.x + 1] - offsets[from + threadIdx.x]) : 0;
        }
        cp_async_commit();
    };
    for (int64_t j = threadIdx.x; begin == end && j < r.k; j += BLOCK) scores[j] = 0;
    for (int64_t first = begin; first < end; first += ROWS) {
        __syncthreads();
        copy_rows<D, ROWS>(rows, q,
                           [&](int i) { return first + i < end ? q + int64_t(order[first + i]) * D : nullptr; });
        Softmax<TALL> softmax;
        float least[TALL][2];  // what to take from scaled scores
        for (int turn = 0; turn < 2; ++turn) {
            __syncthreads();
            load(0);
            for (int tile = 0; tile < count; ++tile) {
                if (tile + 1 < count) {
                    load(tile + 1);
                    cp_async_wait<1>();
                } else {
                    cp_async_wait<0>();
                }
                __syncthreads();
                Scores<TALL> s;
                score<T, D, TALL>(s, own, place_of(tile));
                const float* const size = sizes[tile & 1];
#pragma unroll
                for (int i = 0; i < TALL; ++i) {
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            if (size[8 * j + lane % 4 * 2 + e % 2] == 0) s[i][j][e] = -INFINITY;
                        }
                    }
                }
                if (turn == 0) {
#pragma unroll
                    for (int i = 0; i < TALL; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float base;
                            softmax.raise(s[i], i, h, r.scale, base);
#pragma unroll
                            for (int j = 0; j < EIGHTS; ++j) {
                                const float2 n = reinterpret_cast<const float2*>(size)[4 * j + lane % 4];
                                softmax.sum[i][h] += n.x * power(fmaf(s[i][j][2 * h], r.scale, -base)) +
                                                     n.y * power(fmaf(s[i][j][2 * h + 1], r.scale, -base));
                            }
                        }
                    }
                } else {
                    float column[EIGHTS][2];
#pragma unroll
                    for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            float v = 0;
#pragma unroll
                            for (int i = 0; i < TALL; ++i) {
                                v += share(fmaf(s[i][j][e], r.scale, -least[i][0])) +
                                     share(fmaf(s[i][j][2 + e], r.scale, -least[i][1]));
                            }
                            for (int step = 4; step < WARP; step *= 2) v += __shfl_xor_sync(~0u, v, step);
                            column[j][e] = v;
                        }
                        if (lane < 4) {
                            reinterpret_cast<float2*>(sums[warp])[4 * j + lane] =
                                make_float2(column[j][0], column[j][1]);
                        }
                    }
                    __syncthreads();
                    const int64_t at = int64_t(tile) * KEYS + threadIdx.x;
                    if (threadIdx.x < KEYS && at < r.k) {
                        float v = 0;
#pragma unroll
                        for (int w = 0; w < WARPS; ++w) v += sums[w][threadIdx.x];
                        scores[at] = first == begin ? v : scores[at] + v;
                    }
                }
                __syncthreads();
            }
            if (turn == 0) {
#pragma unroll
                for (int i = 0; i < TALL; ++i) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const bool live = first + warp * 16 * TALL + i * 16 + h * 8 + lane / 4 < end;
                        const float sum = over_quad(softmax.sum[i][h], Plus());
                        least[i][h] = live ? softmax.most[i][h] * r.scale + __log2f(sum) : INFINITY;
                    }
                }
            }
        }
    }
}

/// The group and the first query of the `slot`-th tile of ROWS queries, over all groups of a head; false if there are
/// fewer.
template <int ROWS>
__device__ bool find_tile(const uint32_t* query_offsets, int64_t units, int64_t slot, int64_t& unit, int64_t& first) {
    __shared__ uint32_t of_warps[WARPS];
    __shared__ int64_t found[2];
    if (threadIdx.x == 0) found[0] = -1;
    int64_t before = 0;
    for (int64_t from = 0; from < units; from += BLOCK) {
        const int64_t j = from + threadIdx.x;
        const uint32_t begin = j < units ? query_offsets[j] : 0, end = j < units ? query_offsets[j + 1] : 0;
        const uint32_t tiles = (end - begin + ROWS - 1) / ROWS, within = warp_scan(tiles);
        if (threadIdx.x % WARP == WARP - 1) of_warps[threadIdx.x / WARP] = within;
        __syncthreads();
        int64_t start = before + within - tiles;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < threadIdx.x / WARP) start += of_warps[w];
            before += of_warps[w];
        }
        if (start <= slot && slot < start + tiles) found[0] = j, found[1] = begin + (slot - start) * ROWS;
        __syncthreads();
        if (slot < before) break;
    }
    unit = found[0], first = found[1];
    return unit >= 0;
}

/// A tile of queries reads and writes these, from its own head, unit and place on.
template <class T>
struct Reading {
    const T *q, *keys, *values, *mean_keys, *mean_values;
    T* out;
    const uint32_t* order;
    const float* left;
    int64_t first, end;  // of the unit's queries from here on, in `order`
};

/// The first ROWS of the queries.
template <class T, int D, int TALL>
__device__ __forceinline__ void attend_tile(const Reading<T>& at, const ReadList& listed, const Route& r) {
    constexpr int ROWS = WARPS * 16 * TALL;
    const auto [q, keys, values, mean_keys, mean_values, out, order, left, first, end] = at;
    extern __shared__ __align__(128) uint8_t raw[];
    const uint32_t rows = shared_address(raw), key_tile = rows + ROWS * PITCH<D> * 2;
    const uint32_t value_tile = key_tile + KEYS * PITCH<D> * 2;
    __shared__ uint32_t entries[2][KEYS];
    __shared__ float biases[2][KEYS];
    const int tiles = int((listed.rows() + KEYS - 1) / KEYS);
    const int64_t plain = r.sinks + listed.listed;  // rows that every query sees as they are
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t own = rows + warp * 16 * TALL * PITCH<D> * 2;

    const auto list = [&](int tile) {
        if (threadIdx.x < KEYS) {
            const uint32_t row = listed[int64_t(tile) * KEYS + threadIdx.x];
            entries[tile & 1][threadIdx.x] = row;
            biases[tile & 1][threadIdx.x] = row < CLUSTER    ? 0
                                            : row == NOTHING ? -INFINITY
                                                             : __log2f(left[row & ~CLUSTER]) / r.scale;
        }
    };
    const auto load = [&](uint32_t to, int tile, const T* tokens, int64_t stride, const T* means) {
        copy_rows<D, KEYS>(to, q, [&](int i) -> const T* {
            const uint32_t row = entries[tile & 1][i];
            return row < CLUSTER    ? tokens + row * stride
                   : row == NOTHING ? nullptr
                                    : means + int64_t(row & ~CLUSTER) * D;
        });
        cp_async_commit();
    };
    list(0);
    copy_rows<D, ROWS>(rows, q, [&](int i) { return first + i < end ? q + int64_t(order[first + i]) * D : nullptr; });
    __syncthreads();
    load(key_tile, 0, keys, r.key_row, mean_keys);

    int last[TALL][2];  // the last token that a row sees
#pragma unroll
    for (int i = 0; i < TALL; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = first + warp * 16 * TALL + i * 16 + h * 8 + lane / 4;
            last[i][h] = int(r.sinks + r.clustered + r.others - r.queries) + (row < end ? int(order[row]) : 0);
        }
    }
    Softmax<TALL> softmax;
    float acc[TALL][D / 8][4] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        cp_async_wait<0>();
        __syncthreads();
        load(value_tile, tile, values, r.value_row, mean_values);
        if (tile + 1 < tiles) list(tile + 1);
        Scores<TALL> s;
        score<T, D, TALL>(s, own, key_tile);
        if (int64_t(tile + 1) * KEYS > plain) {
#pragma unroll
            for (int j = 0; j < EIGHTS; ++j) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = 8 * j + lane % 4 * 2 + e;
                    const float bias = biases[tile & 1][column];
                    const uint32_t row = entries[tile & 1][column];
#pragma unroll
                    for (int i = 0; i < TALL; ++i) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            float& v = s[i][j][2 * h + e];
                            v = r.causal && row<CLUSTER&& int(row)> last[i][h] ? -INFINITY : v + bias;
                        }
                    }
                }
            }
        }
        uint32_t weights[TALL][SIXTEENS][4];
#pragma unroll
        for (int i = 0; i < TALL; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float base;
                const float shrink = softmax.raise(s[i], i, h, r.scale, base);
#pragma unroll
                for (int c = 0; c < D / 8; ++c) acc[i][c][2 * h] *= shrink, acc[i][c][2 * h + 1] *= shrink;
#pragma unroll
                for (int j = 0; j < EIGHTS; ++j) {
                    const float x = power(fmaf(s[i][j][2 * h], r.scale, -base)),
                                y = power(fmaf(s[i][j][2 * h + 1], r.scale, -base));
                    softmax.sum[i][h] += x + y;
                    weights[i][j / 2][j % 2 * 2 + h] = pair(x, y, T());
                }
            }
        }
        cp_async_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) load(key_tile, tile + 1, keys, r.key_row, mean_keys);
#pragma unroll
        for (int c = 0; c < D / 8; c += 2) {
#pragma unroll
            for (int t = 0; t < SIXTEENS; ++t) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, value_tile + swizzled<2 * PITCH<D>>(t * 16 + lane % 16, c + lane / 16));
#pragma unroll
                for (int i = 0; i < TALL; ++i) {
                    mma(acc[i][c], weights[i][t], b[0], b[1], T());
                    mma(acc[i][c + 1], weights[i][t], b[2], b[3], T());
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < TALL; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int64_t row = first + warp * 16 * TALL + i * 16 + h * 8 + lane / 4;
            const float sum = over_quad(softmax.sum[i][h], Plus()), inverse = sum > 0 ? 1 / sum : 0;
            if (row >= end) continue;
            uint32_t* const to = reinterpret_cast<uint32_t*>(out + int64_t(order[row]) * D);
#pragma unroll
            for (int c = 0; c < D / 8; ++c) {
                to[c * 4 + lane % 4] = pair(acc[i][c][2 * h] * inverse, acc[i][c][2 * h + 1] * inverse, T());
            }
        }
    }
}

/// A block to each tile of queries of a group: `out` (heads, queries, D), row by row where the queries are. A tile that
/// is no more than half full is a lower one.
template <class T, int D, int TALL>
__device__ void attend_listed(const T* q, const T* keys, const T* values, const T* mean_keys, const T* mean_values,
                              const Route& r, const uint32_t* order, const uint32_t* query_offsets,
                              const uint32_t* chosen, const float* left, const uint32_t* counts, T* out) {
    constexpr int ROWS = WARPS * 16 * TALL;
    const int64_t slots = r.queries / ROWS + r.units, head = blockIdx.x / slots, key_head = head / r.group;
    query_offsets += head * (r.units + 1);
    int64_t unit, first;
    if (!find_tile<ROWS>(query_offsets, r.units, blockIdx.x % slots, unit, first)) return;
    const int64_t end = query_offsets[unit + 1], at = head * r.units + unit;
    const Reading<T> reading = {q + head * r.queries * D,
                                keys + key_head * r.key_head,
                                values + key_head * r.value_head,
                                mean_keys + key_head * r.k * D,
                                mean_values + key_head * r.k * D,
                                out + head * r.queries * D,
                                order + head * r.queries,
                                left + at * r.k,
                                first,
                                end};
    const ReadList listed = {chosen + at * r.most, reading.left, r.sinks, counts[at], r.means, r.clustered, r.others};
    if (TALL > 1 && end - first <= ROWS / 2) {
        attend_tile<T, D, 1>(reading, listed, r);
    } else {
        attend_tile<T, D, TALL>(reading, listed, r);
    }
}

#define KERNELS(suffix, T, D, TALL)                                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2)                                                             \
        route_scores_##D##_##TALL##_##suffix(const T* q, const T* means, Route r, const uint32_t* order,               \
                                             const uint32_t* query_offsets, const uint32_t* offsets, float* scores) {  \
        score_clusters<T, D, TALL>(q, means, r, order, query_offsets, offsets, scores);                                \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) route_attend_##D##_##TALL##_##suffix(                       \
        const T* q, const T* keys, const T* values, const T* mean_keys, const T* mean_values, Route r,                 \
        const uint32_t* order, const uint32_t* query_offsets, const uint32_t* chosen, const float* left,               \
        const uint32_t* counts, T* out) {                                                                              \
        attend_listed<T, D, TALL>(q, keys, values, mean_keys, mean_values, r, order, query_offsets, chosen, left,      \
                                  counts, out);                                                                        \
    }
#define TILES(suffix, T, D) KERNELS(suffix, T, D, 1) KERNELS(suffix, T, D, 2)
#define INSTANCES(suffix, T)                                                                                           \
    TILES(suffix, T, 64)                                                                                               \
    TILES(suffix, T, 80)                                                                                               \
    TILES(suffix, T, 96)                                                                                               \
    TILES(suffix, T, 112)                                                                                              \
    TILES(suffix, T, 128)                                                                                              \
    KERNELS(suffix, T, 256, 1)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
#undef INSTANCES
#undef TILES
#undef KERNELS
