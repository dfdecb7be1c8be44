// Attention of one token over a cache that is read by clusters: chosen tokens exactly, the others as their clusters'
// means.
//
// The blocks of a unit share its clusters and the rows it reads. They (1) bound the scores of the clusters' keys by
// their means and spreads, (2) each rank all clusters, choose the best up to a budget of tokens, and read keys and
// values of their share of the listed tokens where they lie, and the mean values of their clusters, and (3) add up what
// they have (Dao et al. 2023, "Flash-Decoding"). Between these stages they wait for each other: as a thread block cluster in one launch where
// there are such, else every stage is a launch. Traffic: the mean keys and mean values, a byte a column, and the listed
// keys and values, once for all query heads that share them.
#include "attention/fragments.cuh"
#include "attention/radix_select.cuh"

constexpr int BLOCK = ATTEND_THREADS, WARPS = BLOCK / WARP;
constexpr int BLOCKS = ATTEND_BLOCKS;  // of a unit, at most
constexpr int HEADS = ATTEND_HEADS;    // query heads at once: half the rows of a product

/// Waits for the other blocks of the unit, which are a cluster where there are such.
__device__ __forceinline__ void wait_for_unit() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/// Lets the next launch take its places, and waits for what the one before has written.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
#endif
}

/// A block's share of a unit, and where it keeps it.
template <class T, int D>
struct Unit {
    using F = Fragments<T, D>;
    static constexpr int ROWS = F::ROWS;
    static constexpr int STRIDE = D + 4;  // of a head's sums, so that lanes write to different banks
    const Cache& c;
    uint32_t unit, block;
    int begin, end;           // clusters of this block
    uint32_t* ranks;          // (k): of the clusters, and then how many of their tokens are listed
    uint32_t *begins, *rows;  // (k + 1): the offsets; and the tokens that this block reads
    float* sums;              // (WARPS, at most HEADS, STRIDE)
    uint4* queries;           // (PIECES, WARP): as the lanes hold them
    float2 (*tops)[HEADS];    // (WARPS, HEADS)
    float* bounds;            // (group, width)
    int64_t first_cluster;    // of the key head
    int warp, lane, g, t;

    /// Begins to load the queries from a head on.
    __device__ __forceinline__ void load_queries(int from) const {
        if (warp < F::PIECES) {
            const int head = min(from + g, c.group - 1);
            const T* const q = static_cast<const T*>(c.q) + (int64_t(unit) * c.group + head) * D;
            cp_async_16(shared_address(queries + threadIdx.x), q + (warp * 4 + t) * F::EACH,
                        from + g < c.group ? 16 : 0);
        }
        cp_async_commit();
    }
    __device__ __forceinline__ uint32_t size(int j) const { return begins[j + 1] - begins[j]; }

    __device__ __forceinline__ const uint8_t* row_of_codes(const uint8_t* means, int j) const {
        return means + (first_cluster + j) * D;
    }

    /// Of the query head g that is loaded: a cluster's spread adds so much to the score of its mean key.
    __device__ __forceinline__ float reach() const {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < F::PIECES; ++p) {
            const uint4 piece = queries[p * WARP + lane];
            const auto& columns = reinterpret_cast<const T(&)[F::EACH]>(piece);
#pragma unroll
            for (int i = 0; i < F::EACH; ++i) sum = fmaf(float(columns[i]), float(columns[i]), sum);
        }
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        return c.reach * sqrtf(sum);
    }
    /// Nothing where that is beyond the type.
    __device__ __forceinline__ static float beyond_mean(float reach, float spread) {
        return reach * spread < INFINITY ? reach * spread : 0;
    }

    /// Lane (g, t)'s pieces of the keys of a tile, whose row i is at `row(i)`.
    template <class Row>
    __device__ __forceinline__ void load_keys(uint4 (&v)[F::TALL][F::PIECES], Row row) const {
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) {
            const T* const key_row = row(8 * i + g) + t * F::EACH;
#pragma unroll
            for (int p = 0; p < F::PIECES; ++p) v[i][p] = load_piece(key_row + p * 4 * F::EACH);
        }
    }

    /// Bounds of the scores of this block's clusters: the mean key's, and more for clusters that are spread out.
    __device__ __forceinline__ void bound_scores() const {
#pragma unroll 1
        for (int from = 0; from < c.group; from += HEADS) {
            if (from) {
                __syncthreads();
                load_queries(from);
            }
            Codes<F::EACH> codes[F::TALL][F::PIECES];
            float scales[F::TALL][2], spreads[F::TALL][2];
            const auto load = [&](int at) {
                if (at >= end) return;
#pragma unroll
                for (int i = 0; i < F::TALL; ++i) {
                    const uint8_t* const row = row_of_codes(c.mean_keys, min(at + 8 * i + g, end - 1)) + t * F::EACH;
#pragma unroll
                    for (int p = 0; p < F::PIECES; ++p) codes[i][p] = load_codes<F::EACH>(row + p * 4 * F::EACH);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int j = min(at + 8 * i + 2 * t + e, end - 1);
                        scales[i][e] = __ldg(c.key_scales + first_cluster + j);
                        spreads[i][e] = __ldg(c.spreads + first_cluster + j);
                    }
                }
            };
            int at = begin + warp * ROWS;
            load(at);
            cp_async_wait<0>();
            __syncthreads();
            const bool live = from + g < c.group;
            const float reach = this->reach();
            float2 top = {-INFINITY, 0};
#pragma unroll 1
            while (at < end) {
                float s[F::TALL][2];
                uint4 keys[F::TALL][F::PIECES];
#pragma unroll
                for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
                    for (int p = 0; p < F::PIECES; ++p) keys[i][p] = decode<T>(codes[i][p]);
                }
                score_tile<T, D>(s, keys, queries, c.scale);
#pragma unroll
                for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) s[i][e] = s[i][e] * scales[i][e] + beyond_mean(reach, spreads[i][e]);
                }
                const int here = at;
                load(at += WARPS * ROWS);
                float most = top.x;
#pragma unroll
                for (int i = 0; i < F::TALL; ++i) {
                    const int j = here + 8 * i + 2 * t;
                    float* const to = bounds + int64_t(from + g) * c.width + j;
                    if (j < end && live) *reinterpret_cast<float2*>(to) = make_float2(s[i][0], s[i][1]);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        if (j + e >= end || size(j + e) == 0) s[i][e] = -INFINITY;
                        most = fmaxf(most, s[i][e]);
                    }
                }
                const float base = most == -INFINITY ? 0 : most;
                top.y *= __expf(top.x - base), top.x = most;
#pragma unroll
                for (int i = 0; i < F::TALL; ++i) top.y += __expf(s[i][0] - base) + __expf(s[i][1] - base);
            }
            if (c.group == 1) continue;
            top = over_lanes<4>(top);
            if (t == 0 && live)
                c.of_means[((int64_t(unit) * c.blocks + block) * WARPS + warp) * c.group + from + g] = top;
        }
    }

    /// Ranks of all clusters: the bound, as an integer of the same order, or the sum of the softmaxes, which is not
    /// negative, so that its bits are ordered as it is; a sum of NaN is none. Returns the least and the largest of this
    /// thread.
    __device__ __forceinline__ uint2 rank_clusters() const {
        const int pairs = c.width / 2;
        const float2* const two = reinterpret_cast<const float2*>(bounds);
        uint2 range = {UINT32_MAX, 0};
        const auto rank = [&](int j, uint32_t key) {
            if (j < c.k) ranks[j] = key, range.x = min(range.x, key), range.y = max(range.y, key);
        };
        if (c.group == 1) {
#pragma unroll 1
            for (int i = threadIdx.x; i < pairs; i += BLOCK) {
                const float2 s = __ldcg(two + i);
                rank(2 * i, rank_of(s.x)), rank(2 * i + 1, rank_of(s.y));
            }
            return range;
        }
        __shared__ float2 softmax[HEADS];  // the largest score, and what to multiply weights by
#pragma unroll 1
        for (int from = 0; from < c.group; from += HEADS) {
            // A thread has two pairs at a time, and the first while it waits for the softmax.
            constexpr int PAIRS = 2;
            float2 s[HEADS][PAIRS];
            const auto load = [&](int i) {
#pragma unroll
                for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
                    for (int h = 0; h < HEADS; ++h) {
                        const bool inside = i + p * BLOCK < pairs && from + h < c.group;
                        if (inside) s[h][p] = __ldcg(two + int64_t(from + h) * pairs + i + p * BLOCK);
                    }
                }
            };
            load(threadIdx.x);
            __syncthreads();
#pragma unroll 1
            for (int h = warp; h < HEADS && from + h < c.group; h += WARPS) {
                constexpr int EACH = BLOCKS * WARPS / WARP;
                float2 own[EACH];
#pragma unroll
                for (int e = 0; e < EACH; ++e) {
                    const int warp_of_unit = e * WARP + lane;
                    const bool inside = warp_of_unit < c.blocks * WARPS;
                    const float2* const at =
                        c.of_means + (int64_t(unit) * c.blocks * WARPS + warp_of_unit) * c.group + from + h;
                    own[e] = inside ? __ldcg(at) : make_float2(-INFINITY, 0);
                }
                float2 all = own[0];
#pragma unroll
                for (int e = 1; e < EACH; ++e) all.x = fmaxf(all.x, own[e].x);
                all.y = 0;
#pragma unroll
                for (int e = 0; e < EACH; ++e) all.y += own[e].y > 0 ? own[e].y * __expf(own[e].x - all.x) : 0;
                all = over_lanes(all);
                if (lane == 0) softmax[h] = all.y > 0 ? make_float2(all.x, 1 / all.y) : make_float2(0, 0);
            }
            __syncthreads();
#pragma unroll 1
            for (int i = threadIdx.x; i < pairs; i += PAIRS * BLOCK) {
                float share[PAIRS][2] = {};
#pragma unroll
                for (int h = 0; h < HEADS; ++h) {
                    if (from + h >= c.group) break;
                    const float most = softmax[h].x, times = softmax[h].y;
#pragma unroll
                    for (int p = 0; p < PAIRS; ++p) {
                        share[p][0] = fmaf(__expf(s[h][p].x - most), times, share[p][0]);
                        share[p][1] = fmaf(__expf(s[h][p].y - most), times, share[p][1]);
                    }
                }
                load(i + PAIRS * BLOCK);
#pragma unroll
                for (int p = 0; p < PAIRS; ++p) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const int j = 2 * (i + p * BLOCK) + e;
                        if (j >= c.k) break;
                        if (from) share[p][e] += __uint_as_float(ranks[j]);
                        rank(j, __float_as_uint(size(j) && share[p][e] > 0 ? share[p][e] : 0));
                    }
                }
            }
        }
        return range;
    }

    /// Reads this block's share of the rows, for all query heads, after the ranks of this thread.
    __device__ __forceinline__ void read(uint2 range) const {
        __shared__ SelectState state;
        // Exact are the sinks, the listed tokens and those after the clustered ones.
        const int exact = c.tokens - c.clustered + c.budget;
        const int low = int(min(int64_t(block) * c.rows, int64_t(exact))), count = min(c.rows, exact - low);
        const int64_t head = unit / uint32_t(c.units);
        __syncthreads();
        const uint32_t rank =
            radix_select_weighted(ranks, c.k, range.x, range.y, c.budget, [&](int j) { return size(j); }, state);
        gather_best(
            ranks, c.k, rank, c.budget, begins, max(low - c.sinks, 0), min(low + count - c.sinks, c.budget), state,
            [&](int j, uint32_t listed) { ranks[j] = listed; },
            [&](int i, int at) { rows[i + c.sinks - low] = uint32_t(at); });
        __syncthreads();
        const uint32_t* const order = c.order + head * c.clustered;
#pragma unroll 1
        for (int i = threadIdx.x; i < count; i += BLOCK) {
            const int at = low + i - c.sinks;
            rows[i] = at < 0          ? uint32_t(low + i)
                      : at < c.budget ? uint32_t(c.sinks) + __ldg(order + rows[i])
                                      : uint32_t(low + i - c.budget + c.clustered);
        }
        const T* const keys = static_cast<const T*>(c.keys) + head * c.head_stride;
        const T* const values = static_cast<const T*>(c.values) + head * c.head_stride;
        const int of_tokens = (count + ROWS - 1) / ROWS;
        const int tiles = of_tokens + (c.estimate ? (end - begin + ROWS - 1) / ROWS : 0);
#pragma unroll 1
        for (int from = 0; from < c.group; from += HEADS) {
            __syncthreads();
            if (c.group > HEADS) {
                load_queries(from);
                cp_async_wait<0>();
                __syncthreads();
            }
            const int live = min(c.group - from, HEADS);
            Running<T, D> running;
            int tile = warp;
#pragma unroll 1
            for (; tile < of_tokens; tile += WARPS) {
                const int at = tile * ROWS;
                float s[F::TALL][2];
                uint4 k[F::TALL][F::PIECES], v[F::PARTS][F::VALUES];
                load_keys(k, [&](int i) { return keys + int64_t(rows[min(at + i, count - 1)]) * D; });
#pragma unroll
                for (int r = 0; r < F::VALUES; ++r) {
                    const int i = at + r / 2 * 8 + 2 * t + r % 2;
                    const T* const row = values + int64_t(rows[min(i, count - 1)]) * D + g * F::EACH;
#pragma unroll
                    for (int p = 0; p < F::PARTS; ++p) {
                        v[p][r] = i < count ? load_piece(row + p * 8 * F::EACH) : uint4{};
                    }
                }
                score_tile<T, D>(s, k, queries, c.scale);
#pragma unroll
                for (int r = 0; r < F::VALUES; ++r) {
                    if (at + r / 2 * 8 + 2 * t + r % 2 >= count) s[r / 2][r % 2] = -INFINITY;
                }
                running.add(s, v);
            }
            const float reach = this->reach();
#pragma unroll 1
            for (; tile < tiles; tile += WARPS) {
                float s[F::TALL][2];
                uint4 v[F::PARTS][F::VALUES];
#pragma unroll
                for (int r = 0; r < F::VALUES; ++r) {
                    const int i = begin + (tile - of_tokens) * ROWS + r / 2 * 8 + 2 * t + r % 2, j = min(i, end - 1);
                    const uint32_t left = i < end ? size(j) - ranks[j] : 0;  // tokens that the mean stands for
                    const float bound = __ldcg(bounds + int64_t(min(from + g, c.group - 1)) * c.width + j);
                    const float score = bound - beyond_mean(reach, __ldg(c.spreads + first_cluster + j));
                    // The logarithm of none is -inf, of one 0.
                    s[r / 2][r % 2] = left ? score + __logf(float(left)) : -INFINITY;
                    const float value_scale = __ldg(c.value_scales + first_cluster + j);
                    const uint8_t* const row = row_of_codes(c.mean_values, j) + g * F::EACH;
#pragma unroll
                    for (int p = 0; p < F::PARTS; ++p) {
                        v[p][r] = left ? decode<T>(load_codes<F::EACH>(row + p * 8 * F::EACH), value_scale) : uint4{};
                    }
                }
                running.add(s, v);
            }
            add_warps(running, from, live);
        }
    }

    /// A block's sums: STRIDE numbers for each query head, the weighted values in the accumulators' order of columns,
    /// the largest score and the sum of weights.
    __device__ __forceinline__ float* sums_of(uint32_t block) const {
        return c.partial + (int64_t(unit) * c.blocks + block) * c.group * STRIDE;
    }

    /// Adds up what the warps of this block have.
    __device__ __forceinline__ void add_warps(const Running<T, D>& running, int from, int live) const {
        float sum = running.sum;
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        __syncthreads();
        if (t == 0) tops[warp][g] = make_float2(running.most, sum);
        // Four columns of a lane at a time, those of other lanes beside them.
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int h = 2 * t + e;
            float* const head_sums = sums + (warp * live + h) * STRIDE + 4 * g;
            if (h >= live) continue;
#pragma unroll
            for (int i = 0; i < F::TILES; i += 2) {
                const auto(&a)[4] = running.acc[i], (&b)[4] = running.acc[i + 1];
                *reinterpret_cast<float4*>(head_sums + 16 * i) = make_float4(a[e], a[e + 2], b[e], b[e + 2]);
            }
        }
        __syncthreads();
        float* const out = sums_of(block) + from * STRIDE;
#pragma unroll 1
        for (int i = threadIdx.x; i < live * D; i += BLOCK) {
            const int h = i / D, slot = i % D;
            float most = -INFINITY, value = 0, weight = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) most = fmaxf(most, tops[w][h].x);
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const float2 top = tops[w][h];
                const float shrink = top.y > 0 ? __expf(top.x - most) : 0;
                value = fmaf(shrink, sums[(w * live + h) * STRIDE + slot], value);
                weight = fmaf(shrink, top.y, weight);
            }
            out[h * STRIDE + slot] = value;
            if (slot == 0) *reinterpret_cast<float2*>(out + h * STRIDE + D) = make_float2(most, weight);
        }
    }

    /// Adds up what the blocks have, each a share of the query heads' columns.
    __device__ __forceinline__ void add_blocks() const {
        T* const out = static_cast<T*>(c.out) + int64_t(unit) * c.group * D;
#pragma unroll 1
        for (int i = block * BLOCK + threadIdx.x; i < c.group * D; i += c.blocks * BLOCK) {
            const int h = i / D, slot = i % D;  // a head has whole warps
            float2 own = {-INFINITY, 0};
            if (lane < c.blocks) own = __ldcg(reinterpret_cast<const float2*>(sums_of(lane) + h * STRIDE + D));
            float parts[BLOCKS];
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) parts[b] = b < c.blocks ? __ldcg(sums_of(b) + h * STRIDE + slot) : 0;
            const float2 all = over_lanes(own);
            const float shrink = own.y > 0 ? __expf(own.x - all.x) / all.y : 0;
            float value = 0;
#pragma unroll
            for (int b = 0; b < BLOCKS; ++b) value = fmaf(__shfl_sync(~0u, shrink, b), parts[b], value);
            // The column of a lane's value: one of a pair in its piece of a part.
            const int g = slot % 32 / 4, at = slot / 32 * 4 + slot % 4, pair = at / 2, part = pair / (F::EACH / 2);
            const int column = part * 8 * F::EACH + g * F::EACH + pair % (F::EACH / 2) * 2 + at % 2;
            out[h * D + column] = T(value);
        }
    }
};

template <class T, int D>
__device__ __forceinline__ void attend(const Cache& c) {
    using F = Fragments<T, D>;
    extern __shared__ uint4 queries[];
    uint4* const dynamic = queries + F::PIECES * WARP;
    __shared__ float2 tops[WARPS][HEADS];
    const uint32_t unit = blockIdx.x / uint32_t(c.blocks), block = blockIdx.x % uint32_t(c.blocks);
    const int64_t head = unit / uint32_t(c.units);
    const int begin = int(min(int64_t(block) * c.clusters, int64_t(c.k))), end = min(begin + c.clusters, c.k);
    uint32_t* const ranks = reinterpret_cast<uint32_t*>(dynamic);
    // Sums take the place of what is no longer needed, unless the query heads take turns.
    const int kept = c.group > HEADS ? (2 * c.k + 1 + c.rows + 3) / 4 : 0;
    const int lane = threadIdx.x % WARP;
    const Unit<T, D> u = {c,
                          unit,
                          block,
                          begin,
                          end,
                          ranks,
                          ranks + c.k,
                          ranks + 2 * c.k + 1,
                          reinterpret_cast<float*>(dynamic + kept),
                          queries,
                          tops,
                          c.bounds + int64_t(unit) * c.group * c.width,
                          head * c.k,
                          __shfl_sync(~0u, int(threadIdx.x) / WARP, 0),
                          lane,
                          lane / 4,
                          lane % 4};
    wait_for_inputs();
    if (c.first <= 2) {
        const uint32_t* const offsets = c.offsets + head * (c.k + 1);
#pragma unroll 4
        for (int j = threadIdx.x; j <= c.k; j += BLOCK) cp_async_4(u.begins + j, offsets + j);
        u.load_queries(0);
        // The mean values are read last; they can be on their way.
        const uint8_t* const values = u.row_of_codes(c.mean_values, begin);
        const int64_t bytes = c.estimate ? int64_t(end - begin) * D : 0;
#pragma unroll 1
        for (int64_t at = int64_t(threadIdx.x) * 128; at < bytes; at += BLOCK * 128) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(values + at));
        }
    }
    if (c.first <= 1) u.bound_scores();
    if (c.first <= 1 && c.last > 1) wait_for_unit();
    if (c.first <= 2 && c.last >= 2) {
        if (c.first == 2) cp_async_wait<0>();
        __syncthreads();
        u.read(u.rank_clusters());
    }
    if (c.last > 2 && c.first <= 2) wait_for_unit();
    if (c.last >= 3) u.add_blocks();
}

#define KERNEL(D, suffix, T)                                                                                           \
    extern "C" __global__ void __launch_bounds__(BLOCK, 1) attend_##D##_##suffix(const __grid_constant__ Cache c) {       \
        attend<T, D>(c);                                                                                               \
    }
#define KERNELS(D) KERNEL(D, f16, __half) KERNEL(D, bf16, __nv_bfloat16) KERNEL(D, f32, float)
KERNELS(64)
KERNELS(128)
#undef KERNELS
#undef KERNEL
