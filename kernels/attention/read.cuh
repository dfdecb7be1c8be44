// The second stage: what a block reads of the tokens that are listed, and of the means that stand for the others.
#pragma once
#include "attention/unit.cuh"

/// Lists this block's share of the tokens that are read, `count` from the place `first` of all on, after the ranks of
/// this thread. Exact are the sinks, those of the best clusters, and those after the clustered ones. Returns how many
/// of the share are rows.
template <class T, int D, bool CODED>
__device__ __forceinline__ int Unit<T, D, CODED>::list_rows(uint2 range, int first, int count) const {
    const auto weight = [&](int j) { return begins[j + 1] - begins[j]; };
    const auto taken = [&](int j, uint32_t listed) { ranks[j] = listed; };
    const int ranked = high - low;
    __shared__ union {
        SelectState of_block;
#if __CUDA_ARCH__ >= 900
        TeamState of_team;
#endif
    } states;
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (c.team) {
        TeamState& state = states.of_team;
        const Team team = {uint32_t(c.blocks), block};
        // A sum of softmaxes has no sign.
        const int bits = c.group == 1 ? 32 : 31;
        const TeamRank last = radix_select_by_team(ranks, ranked, bits, c.budget, weight, state, team);
        const auto places = [&](uint2) { return last.places; };
        gather_best(ranks, ranked, last.rank, c.budget, begins, 0, c.budget, state.sums, places, taken,
                    [&](int i, int at, int j) {
                        const uint32_t place = uint32_t(i + c.sinks), reader = place / uint32_t(c.rows);
                        team.store(rows + place % uint32_t(c.rows), reader, uint32_t(at));
                        if (CODED) team.store(clusters + place % uint32_t(c.rows), reader, uint32_t(low + j));
                    });
        team.sync();
    } else
#endif
    {
        SelectState& state = states.of_block;
        const uint32_t rank = radix_select_weighted(ranks, ranked, range.x, range.y, c.budget, weight, state);
        const int from = max(first - c.sinks, 0), to = min(first + count - c.sinks, c.budget);
        gather_best(ranks, ranked, rank, c.budget, begins, from, to, state.sums, places_of_block, taken,
                    [&](int i, int at, int j) {
                        rows[i + c.sinks - first] = uint32_t(at);
                        if (CODED) clusters[i + c.sinks - first] = uint32_t(j);
                    });
        __syncthreads();
    }
    const int are_rows = CODED ? max(min(c.sinks - first, count), 0) : count;
    const uint32_t* const order = c.order + key_head() * c.clustered;
#pragma unroll 1
    for (int i = threadIdx.x; i < are_rows; i += BLOCK) {
        const int at = first + i - c.sinks;
        rows[i] = at < 0          ? uint32_t(first + i)
                  : at < c.budget ? uint32_t(c.sinks) + __ldg(order + rows[i])
                                  : uint32_t(first + i - c.budget + c.clustered);
    }
    __syncthreads();
    return are_rows;
}

/// Adds the first `count` tokens of the list, which are rows. Returns the next tile of this warp.
template <class T, int D, bool CODED>
__device__ __forceinline__ int Unit<T, D, CODED>::add_tokens(Running<T, D>& running, int count) const {
    const T* const keys = static_cast<const T*>(c.keys) + key_head() * c.head_stride + t * F::EACH;
    const T* const values = static_cast<const T*>(c.values) + key_head() * c.head_stride + g * F::EACH;
    int tile = warp;
#pragma unroll 1
    for (; tile * ROWS < count; tile += WARPS) {
        const int at = tile * ROWS;
        float s[F::TALL][2];
        uint4 k[F::TALL][F::PIECES], v[F::PARTS][F::VALUES];
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) {
            const T* const row = keys + int64_t(rows[min(at + 8 * i + g, count - 1)]) * D;
#pragma unroll
            for (int p = 0; p < F::PIECES; ++p) {
                k[i][p] = F::has_key(p, t) ? load_piece(row + p * 4 * F::EACH) : uint4{};
            }
        }
#pragma unroll
        for (int r = 0; r < F::VALUES; ++r) {
            const int i = at + r / 2 * 8 + 2 * t + r % 2;
            const T* const row = values + int64_t(rows[min(i, count - 1)]) * D;
#pragma unroll
            for (int p = 0; p < F::PARTS; ++p) {
                v[p][r] = i < count && F::has_value(p, g) ? load_piece(row + p * 8 * F::EACH) : uint4{};
            }
        }
        score_tile<T, D>(s, [&](int i, int p) { return k[i][p]; }, queries, c.scale);
#pragma unroll
        for (int r = 0; r < F::VALUES; ++r) {
            if (at + r / 2 * 8 + 2 * t + r % 2 >= count) s[r / 2][r % 2] = -INFINITY;
        }
        running.weigh(s);
        running.add(s, v);
    }
    return tile;
}

/// Adds the tokens of the list from `first` on, which are codes: the score of one is its cluster's, which is known, and
/// that of its key's entries, and its value the cluster's mean and its entries.
template <class T, int D, bool CODED>
__device__ __forceinline__ int Unit<T, D, CODED>::add_coded(Running<T, D>& running, int tile, int first, int count,
                                                            int from) const {
    const int before = (first + ROWS - 1) / ROWS, tiles = before + (count - first + ROWS - 1) / ROWS;
    const float reach = this->reach();
    const float* const head_bounds = bounds_of_head(from);
    const int64_t head = key_head() * c.clustered;
#pragma unroll 1
    for (; tile < tiles; tile += WARPS) {
        const int at = first + (tile - before) * ROWS;
        float s[F::TALL][2], scales[F::TALL][2];
        with_pieces<T>(c.key_codes, [&](auto columns, auto bits) {
            constexpr int COLUMNS = decltype(columns)::value, BITS = decltype(bits)::value;
            const uint8_t* codes[F::TALL];
#pragma unroll
            for (int i = 0; i < F::TALL; ++i) {
                const int64_t place = head + rows[min(at + 8 * i + g, count - 1)];
                codes[i] = c.key_codes.codes + place * (D / COLUMNS * BITS / 8);
            }
            const auto key = [&](int i, int p) {
                const int column = (p * 4 + t) * F::EACH;
                return F::has_key(p, t) ? look_up<T, COLUMNS, BITS>(codes[i], key_entries, column) : uint4{};
            };
            score_tile<T, D>(s, key, queries, c.scale);
        });
        Codes<F::EACH> means[F::PARTS][F::VALUES];
#pragma unroll
        for (int r = 0; r < F::VALUES; ++r) {
            const int i = at + r / 2 * 8 + 2 * t + r % 2, listed = min(i, count - 1), j = int(clusters[listed]);
            const float gain = gain_of(c.key_codes, head + rows[listed]);
            const float score = __ldcg(head_bounds + j) - beyond_mean(reach, __ldg(c.spreads + first_cluster + j));
            scales[r / 2][r % 2] = i < count ? __ldg(c.value_scales + first_cluster + j) : 0;
            s[r / 2][r % 2] = i < count ? s[r / 2][r % 2] * gain + score : -INFINITY;
            const uint8_t* const row = mean(c.mean_values, j) + g * F::EACH;
#pragma unroll
            for (int p = 0; p < F::PARTS; ++p) {
                means[p][r] = F::has_value(p, g) ? load_codes<F::EACH>(row + p * 8 * F::EACH) : Codes<F::EACH>{};
            }
        }
        running.weigh(s);
        running.add_scaled(s, scales, means);
        // Gains are 1 at most, so that weights times them are in the type of values.
#pragma unroll
        for (int r = 0; r < F::VALUES; ++r) {
            const int i = at + r / 2 * 8 + 2 * t + r % 2;
            s[r / 2][r % 2] *= gain_of(c.value_codes, head + rows[min(i, count - 1)]);
        }
        uint4 v[F::PARTS][F::VALUES];
        with_pieces<T>(c.value_codes, [&](auto columns, auto bits) {
            constexpr int COLUMNS = decltype(columns)::value, BITS = decltype(bits)::value;
#pragma unroll
            for (int r = 0; r < F::VALUES; ++r) {
                const int i = at + r / 2 * 8 + 2 * t + r % 2;
                const int64_t place = head + rows[min(i, count - 1)];
                const uint8_t* const row = c.value_codes.codes + place * (D / COLUMNS * BITS / 8);
#pragma unroll
                for (int p = 0; p < F::PARTS; ++p) {
                    const int column = (p * 8 + g) * F::EACH;
                    const bool inside = i < count && F::has_value(p, g);
                    v[p][r] = inside ? look_up<T, COLUMNS, BITS>(row, value_entries, column) : uint4{};
                }
            }
        });
        running.add(s, v);
    }
    return tile - tiles;
}

/// A tile from a cluster on, which may have fewer clusters unless it is WHOLE.
template <class T, int D, bool CODED>
template <bool WHOLE>
__device__ __forceinline__ void Unit<T, D, CODED>::load_mean_values(MeanValues& m, int at,
                                                                    const float* head_bounds) const {
#pragma unroll
    for (int i = 0; i < F::TALL; ++i) {
        const int j = at + 8 * i + 2 * t;
        m.bounds[i] = __ldcg(reinterpret_cast<const float2*>(head_bounds + (WHOLE ? j : min(j, (end - 1) & ~1))));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = WHOLE ? j + e : min(j + e, end - 1);
            m.spreads[i][e] = __ldg(c.spreads + first_cluster + row);
            m.scales[i][e] = __ldg(c.value_scales + first_cluster + row);
            const uint8_t* const codes = mean(c.mean_values, row) + g * F::EACH;
#pragma unroll
            for (int p = 0; p < F::PARTS; ++p) {
                m.codes[p][2 * i + e] =
                    F::has_value(p, g) ? load_codes<F::EACH>(codes + p * 8 * F::EACH) : Codes<F::EACH>{};
            }
        }
    }
}

/// Adds the mean values of this block's clusters, from its tile on, for the tokens that are not listed.
template <class T, int D, bool CODED>
__device__ __forceinline__ void Unit<T, D, CODED>::add_means(Running<T, D>& running, int tile, int from) const {
    if (!c.estimate) return;
    const float reach = this->reach();
    const float* const head_bounds = bounds_of_head(from);
    MeanValues next;
    const auto load = [&](int at) {
        if (at + ROWS <= end) {
            load_mean_values<true>(next, at, head_bounds);
        } else if (at < end) {
            load_mean_values<false>(next, at, head_bounds);
        }
        prefetch_means(c.mean_values, c.value_scales, at + WARPS * ROWS);
    };
    int at = begin + tile * ROWS;
    load(at);
#pragma unroll 1
    while (at < end) {
        const MeanValues means = next;
        const int tile_begin = at;
        load(at += WARPS * ROWS);
        float s[F::TALL][2], scales[F::TALL][2];
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int j = tile_begin + 8 * i + 2 * t + e;
                const uint32_t left = j < end ? size(j) - ranks[j - low] : 0;  // tokens that the mean stands for
                const float bound = e ? means.bounds[i].y : means.bounds[i].x;
                const float score = bound - beyond_mean(reach, means.spreads[i][e]);
                // The logarithm of none is -inf, of one 0.
                s[i][e] = left ? score + __logf(float(left)) : -INFINITY;
                scales[i][e] = left ? means.scales[i][e] : 0;
            }
        }
        running.weigh(s);
        running.add_scaled(s, scales, means.codes);
    }
}

/// Reads this block's share of the rows, for all query heads, after the ranks of this thread.
template <class T, int D, bool CODED>
__device__ __forceinline__ void Unit<T, D, CODED>::read(uint2 range) const {
    const int exact = c.tokens - c.clustered + c.budget;
    const int first = int(min(int64_t(block) * c.rows, int64_t(exact))), count = min(c.rows, exact - first);
    const int are_rows = list_rows(range, first, count);
#pragma unroll 1
    for (int from = 0; from < c.group; from += HEADS) {
        if (c.group > HEADS) {
            __syncthreads();
            load_queries(from);
            cp_async_wait<0>();
            __syncthreads();
        }
        Running<T, D> running;
        int tile = add_tokens(running, are_rows);
        if constexpr (CODED) {
            tile = add_coded(running, tile, are_rows, count, from);
        } else {
            tile -= (count + ROWS - 1) / ROWS;
        }
        add_means(running, tile, from);
        add_warps(running, from, min(c.group - from, HEADS));
    }
}
