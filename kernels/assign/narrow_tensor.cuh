// Nearest centroids of rows of 2 to 8 columns, squared Euclidean, by the tensor cores of Ampere and later.
//
// One product of 16 columns scores a row of at most four: with h = f16(v) and l = f16(v - h) (split.cu), the row is
// [h l h 1 1 1 0] and a centroid [H H L s], s three halves that add up to what its scores start from, less half its
// square. Rows of eight columns take two products. The centroids of a place, eight at most, are next to each other; of
// a place nothing is kept but the best score, so that a score costs half an operation. The place with the best score is
// scored once more in f32 (narrow.cuh), which names a centroid of it and proves that no other of it is nearer.
//
// Why the others are further. All is scaled by 2^s, a power of two, and by 4^s for scores; let X and C be the row and a
// centroid less mu as f32 has them, of norms of at most x and `norm`, and m = bias - X.C as argmin.cuh has it, in exact
// arithmetic. A score is off by what the product adds up with error, LOSS units of `top`, the most that a partial sum
// may be, for every 16 columns (tensor.cuh), and by what halves lose: a half loses 2^-11 of its value or 2^-25, so that
// |X - h - l| <= 2^-22 x + 2^-23 in eight columns or fewer, as much of C, and |l.L| <= 2^-22 x norm; the halves of s
// are off by 2^-24 of it and 2^-25. Together that is less than 2^-23 ((LOSS STEPS + 12) top + x + norm). Where a half
// overflows, x is not below 2^15 and nothing is proven. argmin.cuh says how far apart m have to be for distances to be
// in their order; the centroid of the place that has the best score need not be the nearest one, so that the largest
// share of a centroid stands for its own.
//
// A centroid far from most others would cost all rows their precision. Those whose norm is more than FAR times what
// seven in eight of a sample do not exceed have no score: from a row within 0.43 of that norm, they are further than
// the centroid which has it, at most x and an eighth of the norm away. Other rows are not proven.
#pragma once
#include "arch/mma.cuh"
#include "assign/narrow.cuh"
#include "assign/tensor.cuh"

/// Rows of one column have so many near ties that halves leave too many unproven.
template <class T, int D>
constexpr bool scored_by_halves = std::is_same<Filter<T>, float>::value && D > 1;

/// acc = a b^T for 16 rows of a, 8 of b and 16 columns.
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(acc[0]), "=f"(acc[1]), "=f"(acc[2]), "=f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

/// Two values as halves, and what is left of them.
struct Halves {
    uint32_t high, low;
    __device__ __forceinline__ Halves(float a, float b) {
        const __half2 h = __floats2half2_rn(a, b);
        const float2 wide = __half22float2(h);
        high = bits_of(h), low = bits_of(__floats2half2_rn(a - wide.x, b - wide.y));
    }
};

/// Centroids as `mma` takes them, in the order of places (`narrow_fragments` in src/plan/assign.rs has the bytes).
template <int D>
struct Fragments {
    static constexpr int STEPS = D > 4 ? 2 : 1;
    /// Places of a row, of which each of its four threads has so many.
    static constexpr int OWN = 8, PLACES = 4 * OWN;
    static_assert(NARROW_ROUND == 2 * PLACES, "two centroids of each place");

    static constexpr int FAR = 8;

    float* scales;  // 2^s, and scaled by that or its square: the largest norm of a centroid, the shift, a row's reach
    uint4* values;  // (rounds, OWN / 2, STEPS, WARP): two tiles of eight centroids each
    int rounds;     // a place has two centroids for each

    __device__ Fragments(uint8_t* raw, int padded)
        : scales(reinterpret_cast<float*>(raw)),
          values(reinterpret_cast<uint4*>(raw + 16)),
          rounds(padded / NARROW_ROUND) {}

    /// Brings the norm to [2^4, 2^5), so that scores stay far below 2^16.
    __device__ __forceinline__ static float power_for(float norm) {
        const int exponent = int(__float_as_uint(norm) >> 23) - 127;
        return norm > 0 ? __uint_as_float(uint32_t(min(62, max(-62, 4 - exponent)) + 127) << 23) : 1;
    }

    /// By how much a score is ahead of one that is further, for a row of norm `x`: +inf if there is no bound.
    __device__ __forceinline__ float lost(float x, const ErrorShares& twice) const {
        const float norm = scales[1], top = x * norm + norm * norm / 2 + scales[2];
        const float added = 2.002f * 0x1p-23f * ((LOSS * STEPS + 12) * top + x + norm);
        // Shares of the bias and of the row, and what may vanish in f32, of which 2^s is at most 2^62.
        const float shares = 1.001f * (twice.of_centroid * norm * norm / 2 + twice.of_row * x * x);
        return x < scales[3] ? added + shares + 0x1p-20f * D : INFINITY;
    }

    /// After `Narrow::prepare`, by the whole block.
    __device__ void prepare(const Narrow<float, D>& from) const {
        const int sample = threadIdx.x % WARP;
        const float bias = from.bias[int64_t(sample) * from.k / WARP];
        const int count = __popc(__ballot_sync(~0u, bias < INFINITY));
        const int rank = rank_among(bias, sample, WARP, [&](int i) { return __shfl_sync(~0u, bias, i); });
        const uint32_t ranked = __ballot_sync(~0u, count && rank == (count - 1) * 7 / 8);
        const float most = ranked ? __shfl_sync(~0u, bias, __ffs(ranked) - 1) : 0;
        const float largest = __double2float_ru(*from.largest), far = FAR * FAR * most;
        const bool reaches = !(most > 0 && far < largest);
        const float norm = __fsqrt_ru(2 * (reaches ? largest : far)) * (1 + 0x1p-18f), power = power_for(norm);
        const float scaled = norm * power, shift = scaled * scaled / 2 + 1;
        if (threadIdx.x == 0) {
            scales[0] = power, scales[1] = scaled, scales[2] = shift;
            scales[3] = fminf(0x1p15f, reaches ? INFINITY : 0.43f * scaled);
        }
        for (int i = threadIdx.x; i < rounds * OWN * WARP; i += blockDim.x) {
            const int lane = i % WARP, tile = i / WARP, quad = lane % 4, column = lane / 4;
            const int place = tile % OWN * 4 + column / 2, j = (place * rounds + tile / OWN) * 2 + column % 2;
            const bool scored = from.bias[j] <= (reaches ? largest : far);
            const auto pair = [&](int p) {
                if (!scored || 2 * p >= D) return Halves(0, 0);
                const float* v = from.moved + j * D + 2 * p;
                return Halves(v[0] * power, v[1] * power);
            };
            const float start = scored ? shift - from.bias[j] * power * power : -INFINITY;
            const Halves first(start, 0);
            const float rest = scored ? start - __half2float(__float2half_rn(start)) : 0;
            const Halves others(rest, 0);
            const uint32_t starts[2] = {first.high | others.high << 16, others.low};
            uint32_t to[STEPS][2];
            if constexpr (STEPS == 1) {
                const Halves v = pair(quad % 2);
                to[0][0] = v.high, to[0][1] = quad < 2 ? v.low : starts[quad - 2];
            } else {
                const Halves v = pair(quad);
                to[0][0] = to[1][0] = v.high, to[0][1] = v.low, to[1][1] = quad < 2 ? starts[quad] : 0;
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                uint2* const at = reinterpret_cast<uint2*>(values + (tile / 2 * STEPS + s) * WARP + lane);
                at[tile % 2] = make_uint2(to[s][0], to[s][1]);
            }
        }
        __syncthreads();
    }
};

/// The best score of a row's places, which has its place in the low bits, and the best score of the other places.
/// Scores above zero are in the order of their bits.
struct Place {
    int best, second;

    __device__ __forceinline__ void add(Place other) {
        second = __vimax3_s32(min(best, other.best), second, other.second), best = max(best, other.best);
    }
    /// Of a lane's places, by their best scores.
    __device__ __forceinline__ static Place best_of(const int (&scores)[8], int lane) {
        Place found[4];
#pragma unroll
        for (int p = 0; p < 8; p += 2) {
            const int a = (scores[p] & ~31) | p, b = (scores[p + 1] & ~31) | (p + 1);
            found[p / 2] = {max(a, b), min(a, b)};
        }
        found[0].add(found[1]), found[2].add(found[3]), found[0].add(found[2]);
        return {found[0].best | lane % 4 * 8, found[0].second};
    }
    /// Keeps one of two rows of which the lane `offset` away keeps the other.
    __device__ __forceinline__ static Place exchange(Place first, Place second, int lane, int offset) {
        const bool other = lane & offset;
        Place kept = other ? second : first;
        const Place given = other ? first : second;
        kept.add({__shfl_xor_sync(~0u, given.best, offset), __shfl_xor_sync(~0u, given.second, offset)});
        return kept;
    }
};

/// `assign_rows` by tensor cores. PADDED rows have D columns, the last ones zeros. Returns how many rows of the warp
/// they have not proven.
template <bool PADDED, class T, int D, class Labels>
__device__ __forceinline__ int assign_rows_tensor(const T* x, const Rows& r, int64_t b, int64_t first_row, int64_t end,
                                                  const T* c, int64_t stride, const Narrow<float, D>& to,
                                                  const Fragments<D>& centroids, const Labels& labels) {
    constexpr int STEPS = Fragments<D>::STEPS, OWN = Fragments<D>::OWN, TALL = 2;  // tiles of 16 rows
    constexpr uint32_t ONE = 0x3c00, ONES = ONE << 16 | ONE;
    const int lane = threadIdx.x % WARP, quad = lane % 4, d = int(r.d);
    const float power = centroids.scales[0], norm = centroids.scales[1];
    const int column = D > 4 ? 2 * quad : 2 * (quad % 2);
    float mu[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) mu[e] = column < D ? -to.mu[column + e] * power : 0;
    const T* const rows = row_of(x, r, b, first_row);
    const int count = int(end - first_row);
    int unproven = 0;
    for (int base = threadIdx.x / WARP * WARP; base < count; base += blockDim.x) {
        uint32_t a[TALL][STEPS][4];
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const T* const from = rows + min(base + m * 16 + h * 8 + lane / 4, count - 1) * r.row_stride + column;
                float v[2];
                if constexpr (PADDED && D >= 4) {
                    const auto both = reinterpret_cast<const Several<T, 2>&>(*from);
#pragma unroll
                    for (int e = 0; e < 2; ++e) v[e] = fmaf(filter(both.values[e]), power, mu[e]);
                } else {
#pragma unroll
                    for (int e = 0; e < 2; ++e) v[e] = column + e < d ? fmaf(filter(from[e]), power, mu[e]) : 0;
                }
                const Halves halves(v[0], v[1]);
                if constexpr (STEPS == 1) {
                    a[m][0][h] = quad < 2 ? halves.high : halves.low;
                    a[m][0][2 + h] = quad < 2 ? halves.high : quad == 2 ? ONES : ONE;
                } else {
                    a[m][0][h] = a[m][0][2 + h] = halves.high, a[m][1][h] = halves.low;
                    a[m][1][2 + h] = quad == 0 ? ONES : quad == 1 ? ONE : 0;
                }
            }
        }
        int best_of[TALL][2][OWN];
        const uint4* fragments = centroids.values + lane;
        const auto multiply_round = [&](auto first) {
#pragma unroll
            for (int p = 0; p < OWN; p += 2, fragments += STEPS * WARP) {
                const uint4 centroid_pair = fragments[0];
                uint4 second_step;
                if (STEPS > 1) second_step = fragments[WARP];
                float acc[TALL][2][4];
#pragma unroll
                for (int m = 0; m < TALL; ++m) {
                    multiply(acc[m][0], a[m][0], centroid_pair.x, centroid_pair.y),
                        multiply(acc[m][1], a[m][0], centroid_pair.z, centroid_pair.w);
                    if constexpr (STEPS > 1) {
                        mma(acc[m][0], a[m][1], second_step.x, second_step.y, __half());
                        mma(acc[m][1], a[m][1], second_step.z, second_step.w, __half());
                    }
                }
#pragma unroll
                for (int m = 0; m < TALL; ++m) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) {
                            const int one = __float_as_int(acc[m][e][2 * h]),
                                      other = __float_as_int(acc[m][e][2 * h + 1]);
                            int& best = best_of[m][h][p + e];
                            best = decltype(first)::value ? max(one, other) : __vimax3_s32(best, one, other);
                        }
                    }
                }
            }
        };
        multiply_round(std::true_type());
#pragma unroll 1
        for (int round = 1; round < centroids.rounds; ++round) multiply_round(std::false_type());

        // Each of the four lanes that share four rows keeps one.
        Place found[TALL];
#pragma unroll
        for (int m = 0; m < TALL; ++m) {
            found[m] =
                Place::exchange(Place::best_of(best_of[m][0], lane), Place::best_of(best_of[m][1], lane), lane, 1);
        }
        const Place own = Place::exchange(found[0], found[1], lane, 2);

        const int i = base + quad / 2 * 16 + quad % 2 * 8 + lane / 4;
        const T* const from = rows + min(i, count - 1) * r.row_stride;
        float v[D], squares = 0;
#pragma unroll
        for (int q = 0; q < D; ++q) {
            v[q] = PADDED || q < d ? to.mu[q] - filter(from[q]) : 0;
            squares = __fmaf_ru(v[q], v[q], squares);
        }
        const int width = 2 * centroids.rounds, first = ((own.best & OWN - 1) * 4 + (own.best >> 3 & 3)) * width;
        const int rotation = min(width, 8) - 1;
        float best = INFINITY, second = INFINITY;
        int index = first;
        const auto meet = [&](int j) {
            const auto near = reinterpret_cast<const Several<float, D>&>(to.moved[j * D]);
            const float score = to.template score<false>(v, near.values, to.bias[j]);
            second = fmin(second, fmax(best, score));
            index = score < best ? j : index;
            best = fmin(best, score);
        };
        // Lanes begin at different places of a line, which they would wait for otherwise.
#pragma unroll 4
        for (int i = 0; i < width; ++i) meet(first + (i & ~rotation | i + lane & rotation));
        const float row_norm = __fsqrt_ru(squares);
        const auto cutoff_of = [&] {
            return score_cutoff<float>(SQUARED_EUCLIDEAN, D, best, row_norm, 0, to.bias[index], *to.twice);
        };
        double cutoff = cutoff_of();
        const float ahead = __int_as_float(own.best & ~31) - __int_as_float(max(own.second, 0) | 31);
        bool proven = second > cutoff && ahead > centroids.lost(row_norm * power, *to.twice);
        const int open = __popc(__ballot_sync(~0u, i < count && !proven));
        unproven += open;
        if (open > WARP / 4) {
            // One at a time they would take longer than all of them meet all centroids.
            best = second = INFINITY;
#pragma unroll 1
            for (int j = 0; j < to.k; ++j) meet(j);
            cutoff = cutoff_of(), proven = second > cutoff;
        }
        label_rows<T, D, false>(x, r, b, v, first_row + i, i < count, proven, index, cutoff, c, stride, to,
                                SQUARED_EUCLIDEAN, labels);
    }
    return unproven;
}

/// True if the tensor cores have proven most rows: of no warp's share of `rows` more than one in sixteen is `left`. All
/// threads of the block call it, and wait.
__device__ __forceinline__ bool most_proven(int left, int64_t rows) {
    return !__syncthreads_or(16 * left > rows * WARP / blockDim.x);
}
