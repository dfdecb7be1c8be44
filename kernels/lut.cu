// Products of a few rows with weights that are looked up: codes of 2, 3 or 4 bits become levels in registers, and no
// weight is ever written.
//
// A warp takes 256 columns at a time, four blocks of 64: eight lanes have a block, and each of them a number with the
// codes of eight columns (LutMatrix in request.rs). The levels of a block's table lie in the same eight lanes, two to
// a lane where there are sixteen, and a shuffle looks one up. The warps of a thread block share the columns, whose
// values they keep while they go through the block's outputs.
//
// Traffic: the codes once, with their levels and scales; rows once a thread block, from L2. Sums are in f32, in an
// order of their own, always the same.
#include "exact/common.cuh"

constexpr int LUT_WARPS = THREADS / WARP;
constexpr int LUT_BLOCK = 64;                   // columns whose codes lie together
constexpr int LUT_STEP = WARP / 8 * LUT_BLOCK;  // columns of a warp at a time

/// Weights as `LutMatrix` has them.
struct LutWeights {
    const uint8_t* codes;    // (outputs, 8 bits / 64 columns)
    const __half* levels;    // (outputs, tables, 2^bits)
    const __half* scales;    // (outputs, groups)
    const uint32_t* places;  // (outputs, outliers), or null
    const __half* extra;
    int64_t outputs, inputs, columns, tables, groups, outliers;
};

/// Where a block of columns is in what each output has.
struct Place {
    int64_t block = -1;  // none beyond the last column
    int64_t table, group;

    __device__ __forceinline__ Place() {}
    __device__ __forceinline__ Place(const LutWeights& w, int64_t at) {
        const int64_t blocks = w.columns / LUT_BLOCK;
        if (at < blocks) block = at, table = at / (blocks / w.tables), group = at / (blocks / w.groups);
    }
};

/// What lane `t` of the eight that have a block knows of it, for one output.
template <int BITS>
struct Codes {
    uint32_t codes = 0;   // of the columns t, 8 + t, 16 + t, ..
    uint32_t levels = 0;  // level t of the table, and level 8 + t, if there is one
    float scale = 0;

    __device__ __forceinline__ void load(const LutWeights& w, int64_t output, const Place& place, int t) {
        if (place.block < 0 || output >= w.outputs) return;
        const uint8_t* block = w.codes + (output * (w.columns / LUT_BLOCK) + place.block) * (8 * BITS);
        if constexpr (BITS == 4) codes = __ldcs(reinterpret_cast<const uint32_t*>(block) + t);
        else codes = __ldcs(reinterpret_cast<const uint16_t*>(block) + t);
        if constexpr (BITS == 3) codes |= uint32_t(__ldcs(block + 16 + t)) << 16;
        const auto* table =
            reinterpret_cast<const uint16_t*>(w.levels + (output * w.tables + place.table) * (1 << BITS));
        levels = __ldg(table + t % (1 << BITS));
        if constexpr (BITS == 4) levels |= uint32_t(__ldg(table + 8 + t)) << 16;
        scale = __half2float(w.scales[output * w.groups + place.group]);
    }

    /// The level of column 8 i + t. All lanes ask at once.
    __device__ __forceinline__ float level(int i) const {
        int code = codes >> BITS * i & ((1 << BITS) - 1);
        if constexpr (BITS == 3) code = (codes >> 2 * i & 3) | (codes >> (16 + i) & 1) << 2;
        const uint32_t two = __shfl_sync(~0u, levels, code % 8, 8);
        return __half2float(__ushort_as_half(uint16_t(BITS == 4 && code >= 8 ? two >> 16 : two)));
    }
};

template <class T, int BITS, int ROWS>
__device__ void lut_product(const T* x, const Rows& r, const LutWeights& w, float* out) {
    // So many steps of columns a warp keeps at a time, in some thirty registers.
    constexpr int STEPS = ROWS <= 2 ? 2 : 1, SPAN = STEPS * LUT_WARPS * LUT_STEP;
    __shared__ float sums[2][LUT_WARPS][LUT_OUTPUTS * ROWS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 8;
    const int64_t blocks_a_table = w.columns / LUT_BLOCK / w.tables, blocks_a_group = w.columns / LUT_BLOCK / w.groups;
    int turn = 0;
    for (int64_t begin = 0; begin < w.columns; begin += SPAN) {
        float values[STEPS][8][ROWS];
        Place place[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int64_t block = begin / LUT_BLOCK + (s * LUT_WARPS + warp) * (LUT_STEP / LUT_BLOCK) + lane / 8;
            place[s] = Place(w, block);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int64_t column = block * LUT_BLOCK + 8 * i + t;
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    const bool is = column < w.inputs && row < r.n;
                    values[s][i][row] = is ? float(wide(row_of(x, r, 0, row)[column])) : 0;
                }
            }
        }
        for (int64_t tile = blockIdx.x; tile * LUT_OUTPUTS < w.outputs; tile += gridDim.x, turn ^= 1) {
            float partial[LUT_OUTPUTS][ROWS] = {};
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                Codes<BITS> codes[LUT_OUTPUTS];
#pragma unroll
                for (int j = 0; j < LUT_OUTPUTS; ++j) codes[j].load(w, tile * LUT_OUTPUTS + j, place[s], t);
#pragma unroll
                for (int j = 0; j < LUT_OUTPUTS; ++j) {
                    float sum[ROWS] = {};
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        const float v = codes[j].level(i);
#pragma unroll
                        for (int row = 0; row < ROWS; ++row) sum[row] = fmaf(v, values[s][i][row], sum[row]);
                    }
#pragma unroll
                    for (int row = 0; row < ROWS; ++row)
                        partial[j][row] = fmaf(sum[row], codes[j].scale, partial[j][row]);
                }
            }
            for (int64_t e = threadIdx.x; begin == 0 && e < w.outliers; e += THREADS) {
#pragma unroll
                for (int j = 0; j < LUT_OUTPUTS; ++j) {
                    const int64_t o = tile * LUT_OUTPUTS + j;
                    if (o >= w.outputs) continue;
                    const int64_t column = w.places[o * w.outliers + e];
                    const float v = __half2float(w.extra[o * w.outliers + e]);
#pragma unroll
                    for (int row = 0; row < ROWS; ++row) {
                        if (row >= r.n) continue;
                        partial[j][row] = fmaf(v, float(wide(row_of(x, r, 0, row)[column])), partial[j][row]);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < LUT_OUTPUTS; ++j) {
#pragma unroll
                for (int row = 0; row < ROWS; ++row) {
                    float v = partial[j][row];
                    for (int apart = WARP / 2; apart; apart /= 2) v += __shfl_xor_sync(~0u, v, apart);
                    if (lane == 0) sums[turn][warp][j * ROWS + row] = v;
                }
            }
            // One barrier a tile: the next one writes to the other half.
            __syncthreads();
            const int64_t o = tile * LUT_OUTPUTS + threadIdx.x / ROWS, row = threadIdx.x % ROWS;
            if (threadIdx.x < LUT_OUTPUTS * ROWS && o < w.outputs && row < r.n) {
                float v = begin ? out[row * w.outputs + o] : 0;
                for (int each = 0; each < LUT_WARPS; ++each) v += sums[turn][each][threadIdx.x];
                out[row * w.outputs + o] = v;
            }
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
        for (int64_t begin = 0; begin < w.columns; begin += LUT_STEP) {
            const Place place(w, begin / LUT_BLOCK + lane / 8);
            Codes<BITS> codes;
            codes.load(w, first + at, place, t);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float v = codes.level(i) * codes.scale;
                const int64_t column = place.block * LUT_BLOCK + 8 * i + t;
                if (place.block >= 0 && column < w.inputs) row[column] = v;
            }
        }
        __syncwarp();
        for (int64_t e = lane; e < w.outliers; e += WARP) {
            const int64_t of = (first + at) * w.outliers + e;
            row[w.places[of]] += __half2float(w.extra[of]);
        }
    }
}

#define KERNEL(name, T, bits, rows)                                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS) lut_product_##bits##_##rows##_##name(                        \
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
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
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
