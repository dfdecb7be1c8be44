// Products of a few rows with weights that are looked up: codes of 2, 3 or 4 bits become levels in registers, and no
// weight is ever written.
//
// A warp takes an output, 256 columns at a time, four blocks of 64: eight lanes have a block, and each of them the
// codes of eight columns
// (`LutMatrix` in request.rs). A lane keeps the table of levels in registers, the bytes of 16-bit levels apart, and
// `__byte_perm` looks four codes up at once, as four selectors. The values of the rows are in shared memory, those of a
// lane side by side.
//
// Traffic: the codes once, with their levels and scales; rows once a thread block, from L2. Sums are in f32, in an
// order of their own, always the same. More rows are multiplied by cuBLAS with weights that `lut_decode` writes, some
// outputs at a time.
#include "exact/common.cuh"

constexpr int LUT_WARPS = THREADS / WARP;
constexpr int LUT_BLOCK = 64;                   // columns whose codes lie together
constexpr int LUT_STEP = WARP / 8 * LUT_BLOCK;  // columns of a warp at a time

/// Weights as `LutMatrix` has them.
struct LutWeights {
    const uint8_t* codes;    // (outputs, 8 bits / 64 columns)
    const __half* levels;    // (outputs, tables, 2^bits), or (2^bits) of all outputs, where tables are 0
    const __half* scales;    // (outputs, groups)
    const uint32_t* places;  // (outputs, outliers), or null
    const __half* extra;
    int64_t outputs, inputs, columns, tables, groups, outliers;
};

/// A table of levels, the low bytes and the high bytes of four levels each in a register, where `__byte_perm` looks
/// codes up.
template <int BITS>
struct Table {
    static constexpr int WORDS = BITS == 4 ? 4 : BITS == 3 ? 2 : 1;
    uint32_t low[WORDS], high[WORDS];

    __device__ __forceinline__ Table(const __half* levels) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const uint2 four = __ldg(reinterpret_cast<const uint2*>(levels) + i);
            low[i] = __byte_perm(four.x, four.y, 0x6420), high[i] = __byte_perm(four.x, four.y, 0x7531);
        }
    }

    /// The levels of eight codes, each a nibble.
    __device__ __forceinline__ void look_up(uint32_t codes, float (&v)[8]) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t four = codes >> 16 * half, of_eight = four & 0x7777;
            uint32_t lows = __byte_perm(low[0], low[BITS > 2], of_eight);
            uint32_t highs = __byte_perm(high[0], high[BITS > 2], of_eight);
            if constexpr (BITS == 4) {
                const uint32_t upper = __byte_perm(0xff00, 0, four >> 3 & 0x1111);
                lows = (lows & ~upper) | (__byte_perm(low[2], low[3], of_eight) & upper);
                highs = (highs & ~upper) | (__byte_perm(high[2], high[3], of_eight) & upper);
            }
            const uint32_t pairs[2] = {__byte_perm(lows, highs, 0x5140), __byte_perm(lows, highs, 0x7362)};
#pragma unroll
            for (int pair = 0; pair < 2; ++pair) {
                const float2 two = __half22float2(reinterpret_cast<const __half2&>(pairs[pair]));
                v[4 * half + 2 * pair] = two.x, v[4 * half + 2 * pair + 1] = two.y;
            }
        }
    }
};

/// The codes of lane `t` of the eight that have a block, as nibbles: of the columns t, 8 + t, 16 + t, ..
template <int BITS>
__device__ __forceinline__ uint32_t load_codes(const uint8_t* block, int t) {
    if constexpr (BITS == 4) return __ldcs(reinterpret_cast<const uint32_t*>(block) + t);
    uint32_t codes = __ldcs(reinterpret_cast<const uint16_t*>(block) + t);
    codes = (codes | codes << 8) & 0x00ff00ff;
    codes = (codes | codes << 4) & 0x0f0f0f0f;
    codes = (codes | codes << 2) & 0x33333333;
    if constexpr (BITS == 3) {
        uint32_t high = __ldcs(block + 16 + t);
        high = (high | high << 12) & 0x000f000f;
        high = (high | high << 6) & 0x03030303;
        high = (high | high << 3) & 0x11111111;
        codes |= high << 2;
    }
    return codes;
}

/// One output: where it lies, block by block.
template <int BITS>
struct Output {
    const uint8_t* codes;
    const __half *levels, *scales;
    int blocks, tables;
    float a_table, a_group;  // blocks of a table, of a group: one over them

    __device__ __forceinline__ Output(const LutWeights& w, int64_t o)
        : blocks(w.columns / LUT_BLOCK),
          tables(w.tables) {
        codes = w.codes + o * blocks * (8 * BITS);
        levels = w.levels + (o * w.tables << BITS), scales = w.scales + o * w.groups;
        a_table = float(w.tables) / blocks, a_group = float(w.groups) / blocks;
    }
    /// Half of a block more keeps whole numbers of blocks from rounding down.
    __device__ __forceinline__ Table<BITS> table(int block) const {
        return Table<BITS>(levels + (tables <= 1 ? 0 : int((block + 0.5f) * a_table) << BITS));
    }
    __device__ __forceinline__ float scale(int block) const {
        return __half2float(__ldg(scales + int((block + 0.5f) * a_group)));
    }
};

template <class T, int BITS, int ROWS>
__device__ void lut_product(const T* x, const Rows& r, const LutWeights& w, float* out) {
    constexpr int STEPS = LUT_COLUMNS / LUT_STEP;
    // Of each row the eight values of a lane side by side, block by block.
    extern __shared__ __align__(16) float values[];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 8;
    bool staged = false;
    for (int64_t first = int64_t(blockIdx.x) * LUT_WARPS; first < w.outputs; first += int64_t(gridDim.x) * LUT_WARPS) {
        const int64_t o = min(first + warp, w.outputs - 1);
        const Output<BITS> output(w, o);
        Table<BITS> table = output.table(0);
        float sum[ROWS] = {};
        for (int64_t begin = 0; begin < w.columns; begin += LUT_COLUMNS) {
            const int block = int(begin / LUT_BLOCK) + lane / 8;
            uint32_t codes[STEPS];
            float scale[STEPS];
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int at = block + s * (LUT_STEP / LUT_BLOCK);
                const bool is = at < output.blocks;
                codes[s] = is ? load_codes<BITS>(output.codes + at * (8 * BITS), t) : 0;
                scale[s] = is ? output.scale(at) : 0;
            }
            if (!staged || w.columns > LUT_COLUMNS) {
                __syncthreads();
                for (int at = threadIdx.x; at < LUT_COLUMNS && begin + at < w.columns; at += THREADS) {
                    const int place = at / LUT_BLOCK * LUT_BLOCK + at % 8 * 8 + at % LUT_BLOCK / 8;
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        const bool is = begin + at < w.inputs && row < r.n;
                        values[row * LUT_COLUMNS + place] = is ? float(wide(row_of(x, r, 0, row)[begin + at])) : 0;
                    }
                }
                __syncthreads();
                staged = true;
            }
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                // Beyond the last column the values are those of others, and scales are zero: but not times a NaN.
                if (block + s * (LUT_STEP / LUT_BLOCK) >= output.blocks) break;
                if (output.tables > 1) table = output.table(block + s * (LUT_STEP / LUT_BLOCK));
                float v[8];
                table.look_up(codes[s], v);
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    const float* with = values + row * LUT_COLUMNS + s * LUT_STEP + lane * 8;
                    const float4 a = *reinterpret_cast<const float4*>(with),
                                 b = *reinterpret_cast<const float4*>(with + 4);
                    float of_block = v[0] * a.x;
                    of_block = fmaf(v[1], a.y, of_block), of_block = fmaf(v[2], a.z, of_block);
                    of_block = fmaf(v[3], a.w, of_block), of_block = fmaf(v[4], b.x, of_block);
                    of_block = fmaf(v[5], b.y, of_block), of_block = fmaf(v[6], b.z, of_block);
                    sum[row] = fmaf(fmaf(v[7], b.w, of_block), scale[s], sum[row]);
                }
            }
        }
        for (int64_t e = lane; e < w.outliers; e += WARP) {
            const int64_t column = w.places[o * w.outliers + e];
            const float v = __half2float(w.extra[o * w.outliers + e]);
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                if (row < r.n) sum[row] = fmaf(v, float(wide(row_of(x, r, 0, row)[column])), sum[row]);
            }
        }
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            for (int apart = WARP / 2; apart; apart /= 2) sum[row] += __shfl_xor_sync(~0u, sum[row], apart);
            if (lane == 0 && row < r.n && first + warp < w.outputs) out[row * w.outputs + o] = sum[row];
        }
    }
}

/// The weights of `count` outputs from `first` on, f32 `(count, inputs)`, for products of many rows. A warp takes an
/// output.
template <int BITS>
__device__ void lut_decode(const LutWeights& w, int64_t first, int64_t count, float* out) {
    const int lane = threadIdx.x % WARP, t = lane % 8;
    for (int64_t at = global_thread() / WARP; at < count; at += all_threads() / WARP) {
        float* const row = out + at * w.inputs;
        const Output<BITS> output(w, first + at);
        for (int64_t begin = 0; begin < w.columns; begin += LUT_STEP) {
            const int block = int(begin / LUT_BLOCK) + lane / 8;
            if (block >= output.blocks) continue;
            float v[8];
            output.table(block).look_up(load_codes<BITS>(output.codes + block * (8 * BITS), t), v);
            const float scale = output.scale(block);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t column = int64_t(block) * LUT_BLOCK + 8 * i + t;
                if (column < w.inputs) row[column] = v[i] * scale;
            }
        }
        __syncwarp();
        for (int64_t e = lane; e < w.outliers; e += WARP) {
            const int64_t outlier = (first + at) * w.outliers + e;
            row[w.places[outlier]] += __half2float(w.extra[outlier]);
        }
    }
}

#define KERNEL(name, T, bits, rows)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, LUT_BLOCKS) lut_product_##bits##_##rows##_##name(            \
        const T* x, Rows r, const uint8_t* codes, const __half* levels, const __half* scales, const uint32_t* places,  \
        const __half* extra, int64_t outputs, int64_t inputs, int64_t columns, int64_t tables, int64_t groups,         \
        int64_t outliers, float* out) {                                                                                \
        const LutWeights w = {                                                                                         \
            codes, levels, scales, places, extra, outputs, inputs, columns, tables, groups, outliers};                 \
        lut_product<T, bits, rows>(x, r, w, out);                                                                      \
    }
#define WIDTHS(name, T, bits) KERNEL(name, T, bits, 1) KERNEL(name, T, bits, 2) KERNEL(name, T, bits, 4)
#define INSTANCE(name, T) WIDTHS(name, T, 2) WIDTHS(name, T, 3) WIDTHS(name, T, 4)
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef WIDTHS
#undef KERNEL

#define KERNEL(bits)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, LUT_BLOCKS)                                                  \
        lut_decode_##bits(const uint8_t* codes, const __half* levels, const __half* scales, const uint32_t* places,    \
                          const __half* extra, int64_t outputs, int64_t inputs, int64_t columns, int64_t tables,       \
                          int64_t groups, int64_t outliers, int64_t first, int64_t count, float* out) {                \
        const LutWeights w = {                                                                                         \
            codes, levels, scales, places, extra, outputs, inputs, columns, tables, groups, outliers};                 \
        lut_decode<bits>(w, first, count, out);                                                                        \
    }
KERNEL(2)
KERNEL(3)
KERNEL(4)
#undef KERNEL
