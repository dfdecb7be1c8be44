// Products of rows with weights that are looked up: codes of 2, 3 or 4 bits become levels in registers, where tensor
// cores take them, and no weight is ever written. (Marlin does so with codes that are whole numbers, Frantar et al.
// 2024.) On Hopper lut_sm90.cu multiplies many rows.
//
// A thread block takes 16 outputs, which are the tall side of a matrix product, and its warps take blocks of 64 columns
// in turn. Four lanes have an output, each of them the codes of 16 columns of a block (`LutMatrix` in request.rs). A
// lane keeps the tables of two outputs in registers, the bytes of 16-bit levels apart, and `__byte_perm` looks four
// codes up at once, as four selectors. The values of rows are in shared memory in the order of a lane's codes, as
// halves, which are scaled by a power of two; a value of f32 is the sum of two.
//
// Traffic: the codes once, with their levels and scales; rows once a thread block, from L2. Products are exact, and
// sums are in f32, in an order of their own, always the same. More rows are multiplied by cuBLAS with weights that
// `lut_decode` writes, some outputs at a time.
#include "arch/mma.cuh"
#include "lut/values.cuh"

constexpr int LUT_WARPS = THREADS / WARP;
/// Blocks of values begin so many halves apart, which puts their pieces in different banks.
constexpr int LUT_ROOM = LUT_BLOCK + 8;

/// Stores two halves side by side.
__device__ __forceinline__ void store_pair(__half* to, __half2 pair) { *reinterpret_cast<__half2*>(to) = pair; }

/// Stores a piece of a row in shared memory, in the order of codes: value `i` of number `t` is that of column 8 i + t.
/// The values of a block are scaled by a power of two, for which its four lanes are called together: returned is the
/// unit.
template <class T>
__device__ __forceinline__ float stage(const T (&v)[LUT_PIECE], __half* first, __half* second) {
    if constexpr (std::is_same_v<T, __half>) {
#pragma unroll
        for (int t = 0; t < 8; ++t) store_pair(first + 8 * t, __halves2half2(v[t], v[8 + t]));
        return 1;
    }
    float most = largest(v);
    for (int apart = 1; apart < 4; apart *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
    const float scale = to_halves(most);
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        const Halves pair(filter(v[t]) * scale, filter(v[8 + t]) * scale);
        store_pair(first + 8 * t, pair.first);
        if constexpr (PARTS<T> == 2) store_pair(second + 8 * t, pair.second);
    }
    return 1 / scale;
}

/// The sizes of a thread block's work for rows of `T`, with products of 8 `WIDE` columns.
template <class T, int WIDE>
struct Tile {
    static constexpr bool HALVES = std::is_same_v<T, __half>;
    static constexpr int ROWS = 8 * WIDE / PARTS<T>;
    /// Blocks of columns that a warp, and all of them, have at a time.
    static constexpr int STEPS = LUT_STEPS / WIDE / (HALVES ? 1 : 2), BLOCKS = STEPS * LUT_WARPS;
    /// Rows of values begin so many halves apart, which lets lanes read from different banks.
    static constexpr int STRIDE = BLOCKS * LUT_ROOM + 8;

    /// A block of values of a row has a unit, by which its products are multiplied.
    using Units = float[HALVES ? 1 : BLOCKS][ROWS];
    /// The sums of a tile are added up by warps, each over its own blocks, and over outliers apart.
    struct Sums {
        float of_warp[LUT_WARPS][LUT_TALL][8 * WIDE], of_outliers[LUT_TALL][ROWS];
    };
};

/// Brings the values of some rows, from a block on, to shared memory, by all threads; second parts are behind those of
/// all rows.
template <class T, int WIDE>
__device__ __forceinline__ void bring_values(const T* x, const Rows& r, const LutWeights& w, int64_t top, int rows,
                                             int begin, int blocks, __half* values,
                                             typename Tile<T, WIDE>::Units& units) {
    using S = Tile<T, WIDE>;
    const int lane = threadIdx.x % WARP, pieces = 4 * min(S::BLOCKS, blocks - begin), all = rows * pieces;
    for (int of_warp = threadIdx.x - lane; of_warp < all; of_warp += THREADS) {
        // Lanes beyond the last block bring it once more, so that all of a warp are here.
        const int at = min(of_warp + lane, all - 4 + lane % 4), row = at / pieces, piece = at % pieces;
        const int block = piece / 4, quarter = piece % 4;
        const int64_t column = int64_t(begin) * LUT_BLOCK + piece * LUT_PIECE;
        T v[LUT_PIECE];
        load_piece(row_of(x, r, 0, top + row) + column, w.inputs - column, v);
        __half* const own = values + row * S::STRIDE + block * LUT_ROOM + quarter * 2;
        const float unit = stage(v, own, own + rows * S::STRIDE);
        if constexpr (!S::HALVES) {
            if (quarter == 0) units[block][row] = unit;
        }
    }
}

/// Adds up the products with outliers of a tile; a warp takes an output and a row at a time.
template <class T, class Sums>
__device__ __forceinline__ void add_outliers(const T* x, const Rows& r, const LutWeights& w, int64_t top, int rows,
                                             int64_t first, Sums& sums) {
    const int lane = threadIdx.x % WARP;
    for (int i = threadIdx.x / WARP; i < LUT_TALL * rows; i += LUT_WARPS) {
        const int64_t o = min(first + i % LUT_TALL, w.outputs - 1);
        const T* const row = row_of(x, r, 0, top + i / LUT_TALL);
        float sum = 0;
        for (int64_t e = lane; e < w.outliers; e += WARP) {
            const int64_t at = o * w.outliers + e;
            sum = fmaf(__half2float(static_cast<const __half*>(w.extra)[at]), filter(row[w.places[at]]), sum);
        }
        for (int apart = WARP / 2; apart; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
        if (lane == 0) sums.of_outliers[i % LUT_TALL][i / LUT_TALL] = sum;
    }
}

/// Writes the outputs of a tile, by all threads.
template <class T, class Sums>
__device__ __forceinline__ void write_outputs(const LutWeights& w, int64_t top, int rows, int64_t first,
                                              const Sums& sums, const float* bias, T* out) {
    for (int i = threadIdx.x; i < LUT_TALL * rows; i += THREADS) {
        const int o = i % LUT_TALL, row = i / LUT_TALL;
        if (first + o >= w.outputs) continue;
        float sum = 0;
#pragma unroll
        for (int part = 0; part < PARTS<T>; ++part) {
#pragma unroll
            for (int warp = 0; warp < LUT_WARPS; ++warp) sum += sums.of_warp[warp][o][part * rows + row];
        }
        if (w.outliers > 0) sum += sums.of_outliers[o][row];
        if (bias) sum += bias[first + o];
        out[(top + row) * w.outputs + first + o] = T(sum);
    }
}

/// Products with a multiple of 8 columns, `WIDE` of them, which are rows, or parts of them. What a thread block does is
/// a tile of outputs and rows, and some blocks of columns of it at a time, whose codes come while those before are
/// multiplied. Values stay in shared memory while the rows, and the columns, are the same.
template <class T, int BITS, int WIDE, bool OWN_TABLES>
__device__ __forceinline__ void lut_product(const T* x, const Rows& r, const LutWeights& w, const float* bias, T* out) {
    using S = Tile<T, WIDE>;
    using Levels = typename Table<BITS>::Levels;
    extern __shared__ __align__(16) char memory[];
    __shared__ typename S::Units units;
    // Of this tile, and of the one before, which others may still read.
    typename S::Sums* const all_sums = reinterpret_cast<typename S::Sums*>(memory);
    __half* const values = reinterpret_cast<__half*>(all_sums + 2);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int64_t talls = (w.outputs + LUT_TALL - 1) / LUT_TALL;
    const int blocks = int(w.columns / LUT_BLOCK);
    // The rows and the outputs of a tile, and of the next one of this thread block.
    int64_t top = 0, tall = blockIdx.x;
    const auto advance = [&](int64_t& to_top, int64_t& to_tall, int64_t by) {
        for (to_tall += by; to_tall >= talls; to_tall -= talls) to_top += S::ROWS;
    };
    advance(top, tall, 0);
    const auto output_of = [&](int64_t tall, int i) {
        return Output<BITS>(w, min(tall * LUT_TALL + 8 * i + g, w.outputs - 1));
    };
    Codes<BITS> codes[S::STEPS][2];
    __half scales[S::STEPS][2];
    // The codes and the scales of a step of two outputs, unless their blocks are at an end.
    const auto load = [&](int s, const Output<BITS>(&outputs)[2], int block) {
        if (block >= blocks) return;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            codes[s][i].load(outputs[i].codes + int64_t(block) * (8 * BITS), t);
            scales[s][i] = outputs[i].scale(block);
        }
    };
    Output<BITS> outputs[2] = {output_of(tall, 0), output_of(tall, 1)};
    Levels levels[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) levels[i].load(outputs[i].levels);
#pragma unroll
    for (int s = 0; s < S::STEPS; ++s) load(s, outputs, s * LUT_WARPS + warp);
    int64_t staged_top = -1;
    int staged_begin = 0;
    for (bool odd = false; top < r.n; odd = !odd) {
        int64_t next_top = top, next_tall = tall;
        advance(next_top, next_tall, gridDim.x);
        const int64_t first = tall * LUT_TALL;
        const int rows = int(min(int64_t(S::ROWS), r.n - top)), columns = rows * PARTS<T>;
        const __half* own_levels[2] = {outputs[0].levels, outputs[1].levels};
        Table<BITS> tables[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) tables[i].keep(levels[i]);
        float sums[WIDE][4] = {};
        for (int begin = 0; begin < blocks; begin += S::BLOCKS) {
            if (top != staged_top || begin != staged_begin) {
                staged_top = top, staged_begin = begin;
                // All have multiplied by the values that were there.
                __syncthreads();
                bring_values<T, WIDE>(x, r, w, top, rows, begin, blocks, values, units);
                __syncthreads();
            }
            const bool more = begin + S::BLOCKS < blocks;
            const int next = more ? begin + S::BLOCKS : next_top < r.n ? 0 : blocks;
            if (!more) outputs[0] = output_of(next_tall, 0), outputs[1] = output_of(next_tall, 1);
#pragma unroll
            for (int s = 0; s < S::STEPS; ++s) {
                const int own_block = s * LUT_WARPS + warp, block = begin + own_block;
                // These columns have none for the warp, but the next ones may.
                if (block >= blocks) {
                    load(s, outputs, next + own_block);
                    continue;
                }
                float scale[2], acc[WIDE][4] = {};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if constexpr (OWN_TABLES) {
                        levels[i].load(own_levels[i] + (outputs[i].levels_of(block) - outputs[i].levels));
                        tables[i].keep(levels[i]);
                    }
                    scale[i] = __half2float(scales[s][i]);
                }
#pragma unroll
                for (int number = 0; number < 2; ++number) {
                    const __half* const own = values + own_block * LUT_ROOM + 16 * t + 8 * number;
                    uint32_t upper[4], lower[4];
                    tables[0].look_up(codes[s][0].number(number), upper);
                    tables[1].look_up(codes[s][1].number(number), lower);
                    const uint32_t a[2][4] = {{upper[0], lower[0], upper[1], lower[1]},
                                              {upper[2], lower[2], upper[3], lower[3]}};
#pragma unroll
                    for (int j = 0; j < WIDE; ++j) {
                        const __half* const with = own + min(8 * j + g, columns - 1) * S::STRIDE;
                        const uint4 b = *reinterpret_cast<const uint4*>(with);
                        mma(acc[j], a[0], b.x, b.y, __half());
                        mma(acc[j], a[1], b.z, b.w, __half());
                    }
                }
                load(s, outputs, next + own_block);
#pragma unroll
                for (int j = 0; j < WIDE; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        float by = scale[e / 2];
                        if constexpr (!S::HALVES) {
                            const int column = min(8 * j + 2 * t + e % 2, columns - 1);
                            by *= column < rows ? units[own_block][column] : units[own_block][column - rows] * SECOND;
                        }
                        sums[j][e] = fmaf(acc[j][e], by, sums[j][e]);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) levels[i].load(outputs[i].levels);
        typename S::Sums& of_tile = all_sums[odd];
#pragma unroll
        for (int j = 0; j < WIDE; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) of_tile.of_warp[warp][g + e / 2 * 8][8 * j + 2 * t + e % 2] = sums[j][e];
        }
        if (w.outliers > 0) add_outliers(x, r, w, top, rows, first, of_tile);
        __syncthreads();
        write_outputs(w, top, rows, first, of_tile, bias, out);
        top = next_top, tall = next_tall;
    }
}

/// The weights of `count` outputs from `first` on, f32 `(count, inputs)`, for products of many rows. A warp takes an
/// output.
template <int BITS>
__device__ void lut_decode(const LutWeights& w, int64_t first, int64_t count, float* out) {
    const int lane = threadIdx.x % WARP, t = lane % 4;
    for (int64_t at = global_thread() / WARP; at < count; at += all_threads() / WARP) {
        float* const row = out + at * w.inputs;
        const Output<BITS> output(w, first + at);
        for (int block = lane / 4; block < output.blocks; block += WARP / 4) {
            typename Table<BITS>::Levels levels;
            levels.load(output.levels_of(block));
            Table<BITS> table;
            table.keep(levels);
            const float scale = __half2float(output.scale(block));
            Codes<BITS> codes;
            codes.load(output.codes + int64_t(block) * (8 * BITS), t);
#pragma unroll
            for (int number = 0; number < 2; ++number) {
                uint32_t pairs[4];
                table.look_up(codes.number(number), pairs);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float2 levels = __half22float2(reinterpret_cast<const __half2&>(pairs[i / 2]));
                    const int64_t column = int64_t(block) * LUT_BLOCK + 8 * i + 2 * t + number;
                    if (column < w.inputs) row[column] = (i % 2 ? levels.y : levels.x) * scale;
                }
            }
        }
        __syncwarp();
        for (int64_t e = lane; e < w.outliers; e += WARP) {
            const int64_t outlier = (first + at) * w.outliers + e;
            row[w.places[outlier]] += __half2float(static_cast<const __half*>(w.extra)[outlier]);
        }
    }
}

#define KERNEL(name, T, bits, wide)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, LUT_BLOCKS)                                                  \
        lut_product_##bits##_##wide##_##name(const T* x, Rows r, LutWeights w, const float* bias, T* out) {            \
        if (w.tables > 1) lut_product<T, bits, wide, true>(x, r, w, bias, out);                                        \
        else lut_product<T, bits, wide, false>(x, r, w, bias, out);                                                    \
    }
#define WIDTHS(name, T, bits) KERNEL(name, T, bits, 1) KERNEL(name, T, bits, 2) KERNEL(name, T, bits, 4)
#define INSTANCE(name, T) WIDTHS(name, T, 2) WIDTHS(name, T, 3) WIDTHS(name, T, 4)
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
#undef INSTANCE
#undef WIDTHS
#undef KERNEL

#define KERNEL(bits)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, LUT_BLOCKS)                                                  \
        lut_decode_##bits(LutWeights w, int64_t first, int64_t count, float* out) {                                    \
        lut_decode<bits>(w, first, count, out);                                                                        \
    }
KERNEL(2)
KERNEL(3)
KERNEL(4)
#undef KERNEL
