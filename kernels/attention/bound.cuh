// The first stage: bounds of the scores of clusters, and the ranks of clusters by them.
#pragma once
#include "attention/unit.cuh"

/// A tile from a cluster on, which may have fewer clusters unless it is WHOLE.
template <class T, int D, bool CODED>
template <bool WHOLE>
__device__ __forceinline__ void Unit<T, D, CODED>::load_mean_keys(MeanKeys& keys, int at) const {
#pragma unroll
    for (int i = 0; i < F::TALL; ++i) {
        const int j = at + 8 * i + g, pair = at + 8 * i + 2 * t;
        const uint8_t* const row = mean(c.mean_keys, WHOLE ? j : min(j, end - 1)) + t * F::EACH;
#pragma unroll
        for (int p = 0; p < F::PIECES; ++p) {
            keys.codes[i][p] = F::has_key(p, t) ? load_codes<F::EACH>(row + p * 4 * F::EACH) : Codes<F::EACH>{};
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int64_t place = first_cluster + (WHOLE ? pair + e : min(pair + e, end - 1));
            keys.scales[i][e] = __ldg(c.key_scales + place);
            keys.spreads[i][e] = __ldg(c.spreads + place);
        }
    }
}

/// Bounds of the scores of this block's clusters: the mean key's, and more for clusters that are spread out.
template <class T, int D, bool CODED>
__device__ __forceinline__ void Unit<T, D, CODED>::bound_scores() const {
#pragma unroll 1
    for (int from = 0; from < c.group; from += HEADS) {
        if (from) {
            __syncthreads();
            load_queries(from);
        }
        MeanKeys next;
        const auto load = [&](int at) {
            if (at + ROWS <= end) {
                load_mean_keys<true>(next, at);
            } else if (at < end) {
                load_mean_keys<false>(next, at);
            }
            prefetch_means(c.mean_keys, c.key_scales, at + WARPS * ROWS);
        };
        int at = begin + warp * ROWS;
        load(at);
        // Only the first queries come before the entries of codes.
        CODED&& from == 0 ? cp_async_wait<1>() : cp_async_wait<0>();
        __syncthreads();
        const bool live = from + g < c.group;
        const float reach = this->reach();
        float* const head_bounds = bounds + int64_t(from + g) * c.width;
        float2 top = {-INFINITY, 0};
#pragma unroll 1
        while (at < end) {
            float s[F::TALL][2];
            score_tile<T, D>(s, [&](int i, int p) { return decode<T>(next.codes[i][p]); }, queries, c.scale);
#pragma unroll
            for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    s[i][e] = s[i][e] * next.scales[i][e] + beyond_mean(reach, next.spreads[i][e]);
                }
            }
            const int tile_begin = at;
            load(at += WARPS * ROWS);
            float most = top.x;
#pragma unroll
            for (int i = 0; i < F::TALL; ++i) {
                const int j = tile_begin + 8 * i + 2 * t;
                if (j < end && live) *reinterpret_cast<float2*>(head_bounds + j) = make_float2(s[i][0], s[i][1]);
                const uint32_t first = begins[min(j, end) - low], second = begins[min(j + 1, end) - low];
                if (first == second) s[i][0] = -INFINITY;
                if (second == begins[min(j + 2, end) - low]) s[i][1] = -INFINITY;
                most = fmaxf(most, fmaxf(s[i][0], s[i][1]));
            }
            const float base = most == -INFINITY ? 0 : most;
            top.y *= __expf(top.x - base), top.x = most;
#pragma unroll
            for (int i = 0; i < F::TALL; ++i) top.y += __expf(s[i][0] - base) + __expf(s[i][1] - base);
        }
        if (c.group == 1) continue;
        top = over_lanes<4>(top);
        if (t == 0 && live) c.of_means[((int64_t(unit) * c.blocks + block) * WARPS + warp) * c.group + from + g] = top;
    }
}

/// Ranks of clusters: the bound, as an integer of the same order, or the sum of the softmaxes, which is not
/// negative, so that its bits are ordered as it is; a sum of NaN is none. Returns the least and the largest of this
/// thread.
template <class T, int D, bool CODED>
__device__ __forceinline__ uint2 Unit<T, D, CODED>::rank_clusters() const {
    const int begin = low / 2 + threadIdx.x, end = (high + 1) / 2, pairs = c.width / 2;
    const float2* const two = reinterpret_cast<const float2*>(bounds);
    uint2 range = {UINT32_MAX, 0};
    const auto rank = [&](int j, uint32_t key) {
        if (j < high) ranks[j - low] = key, range.x = min(range.x, key), range.y = max(range.y, key);
    };
    if (c.group == 1) {
#pragma unroll 1
        for (int i = begin; i < end; i += BLOCK) {
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
                    const bool inside = i + p * BLOCK < end && from + h < c.group;
                    if (inside) s[h][p] = __ldcg(two + int64_t(from + h) * pairs + i + p * BLOCK);
                }
            }
        };
        load(begin);
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
        for (int i = begin; i < end; i += PAIRS * BLOCK) {
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
                    if (j >= high) break;
                    if (from) share[p][e] += __uint_as_float(ranks[j - low]);
                    rank(j, __float_as_uint(size(j) && share[p][e] > 0 ? share[p][e] : 0));
                }
            }
        }
    }
    return range;
}
