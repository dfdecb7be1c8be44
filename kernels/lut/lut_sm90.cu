// Products of many rows with weights that are looked up, on Hopper: as in lut.cu, levels are made in registers, from
// which a warpgroup multiplies 64 outputs with all rows of a tile, which lie in shared memory. (As Machete of vLLM does
// with whole numbers.)
//
// A thread block takes 128 outputs and a tile of rows, block of columns by block. Its warps bring rows in turns, which
// `lut_arrange` has put into the order of codes; each thread brings codes for itself, and turns those of the next block
// into levels while the products of this one run. Levels are as they are stored, so products are exact; those of a
// block of 64 columns are added up by the tensor cores, and blocks, times their scales, in f32. Where there are fewer
// tiles than multiprocessors the thread blocks of a cluster share the columns of a tile, and add their sums up in the
// order of columns.
//
// Traffic: codes once a tile of rows, rows once each 128 outputs, both from L2. A multiprocessor reads 20 kB for 512
// cycles of products of 128 rows.
#include "arch/ptx.cuh"
#include "lut/values.cuh"

constexpr int LUT_GROUPS = LUT_SM90_OUTPUTS / 64, LUT_SM90_THREADS = 128 * LUT_GROUPS;
/// A stage of values is filled again two blocks after it was read, when few wait for the last warp to be done with it;
/// one of codes, which are a thread's own, one block after.
constexpr int VALUES_AHEAD = LUT_SM90_STAGES - 2, CODES_AHEAD = LUT_SM90_STAGES - 1;

/// Products of so many columns, of rows of `T`.
template <class T, int BITS, int COLUMNS>
struct LutTile {
    static constexpr bool HALVES = std::is_same_v<T, __half>;
    static constexpr int ROWS = COLUMNS / PARTS<T>;
    static constexpr int VALUE_BYTES = COLUMNS * LUT_BLOCK * 2, UNIT_BYTES = HALVES ? 0 : ROWS * 4;
    static constexpr int WORDS = 2 * Codes<BITS>::WORDS;  // of a thread's codes of a block
    /// Sums of a row begin so many floats apart, which lets a warp store them to different banks.
    static constexpr int STRIDE = LUT_SM90_OUTPUTS + 4;
    static constexpr int RING_BYTES = LUT_SM90_STAGES * VALUE_BYTES, SUM_BYTES = ROWS * STRIDE * 4;
    // Sums take the place of values.
    static constexpr int CODES_AT = RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES;
    static constexpr int UNITS_AT = CODES_AT + LUT_SM90_STAGES * LUT_SM90_THREADS * WORDS * 4;
    static constexpr int BARRIERS_AT = UNITS_AT + LUT_SM90_STAGES * UNIT_BYTES;
};

/// Puts `rows` rows from the first on into the order of a lane's codes: of a block of columns, 16-byte piece 4 number +
/// quarter has a quarter's columns 2 t + number and 8 + 2 t + number, for each of four lanes. Rows are swizzled as
/// products want them. A warp takes eight rows of a block, and four lanes a row.
template <class T>
__device__ void lut_arrange(const T* x, const Rows& r, int64_t first, int64_t rows, int64_t blocks, int rows_of_tile,
                            __half* values, float* units, T* across, int64_t padded) {
    constexpr int TALL = WARP / 4;
    const int lane = threadIdx.x % WARP, quarter = lane % 4, products = rows_of_tile * PARTS<T>;
    const int64_t groups = (rows + TALL - 1) / TALL;
    for (int64_t at = global_thread() / WARP; at < groups * blocks; at += all_threads() / WARP) {
        const int64_t block = at % blocks, column = block * LUT_BLOCK + quarter * LUT_PIECE;
        // Lanes beyond the last row bring it once more, so that all of a warp are here.
        const int64_t row = min(at / blocks * TALL + lane / 4, rows - 1);
        T v[LUT_PIECE];
        load_piece(row_of(x, r, 0, first + row) + column, r.d - column, v);
        const int64_t tile = row / rows_of_tile * blocks + block;
        const int of_tile = int(row % rows_of_tile);
        float scale = 1;
        if constexpr (!std::is_same_v<T, __half>) {
            float most = largest(v);
            for (int apart = 1; apart < 4; apart *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
            scale = to_halves(most);
            if (quarter == 0) units[tile * rows_of_tile + of_tile] = 1 / scale;
        }
        char* const to = reinterpret_cast<char*>(values + tile * products * LUT_BLOCK);
#pragma unroll
        for (int number = 0; number < 2; ++number) {
            __align__(16) __half2 parts[2][4];
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                const T a = v[2 * t + number], b = v[8 + 2 * t + number];
                if constexpr (std::is_same_v<T, __half>) {
                    parts[0][t] = __halves2half2(a, b);
                } else {
                    const Halves pair(filter(a) * scale, filter(b) * scale);
                    parts[0][t] = pair.first, parts[1][t] = pair.second;
                }
            }
#pragma unroll
            for (int part = 0; part < PARTS<T>; ++part) {
                const int place = part * rows_of_tile + of_tile;
                *reinterpret_cast<uint4*>(to + swizzled<128>(place, 4 * number + quarter)) =
                    *reinterpret_cast<const uint4*>(parts[part]);
            }
        }
        if (!across) continue;
#pragma unroll
        for (int c = 0; c < LUT_PIECE; ++c) {
            if (column + c < r.d) across[(column + c) * padded + row] = v[c];
        }
    }
}

/// The multiplicand of a thread is two outputs, whose codes of a block become the rows of four products, 16 columns
/// each. It walks over blocks one by one.
template <class S, int BITS, bool OWN_TABLES>
struct Multiplicand {
    static constexpr int WORDS = Codes<BITS>::WORDS;
    Table<BITS> tables[2];
    const uint8_t* codes[2];              // of the next block to copy
    const __half *scales[2], *levels[2];  // of the next block to look up
    uint32_t* words;                      // where the thread's codes come to
    int lane, of_group, left;             // a fourth of a row of products; blocks of a group, and those still to come

    __device__ __forceinline__ Multiplicand(const LutWeights& w, int64_t first, int block, uint32_t* words)
        : words(words),
          lane(threadIdx.x % 4),
          of_group(int(w.columns / LUT_BLOCK / w.groups)),
          left(of_group - block % of_group) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t o = min(first + 8 * i, w.outputs - 1), group = block / of_group;
            codes[i] = w.codes + (o * (w.columns / LUT_BLOCK) + block) * (8 * BITS);
            scales[i] = static_cast<const __half*>(w.scales) + o * w.groups + group;
            levels[i] = static_cast<const __half*>(w.levels) + ((o * w.tables + (OWN_TABLES ? group : 0)) << BITS);
            keep(i);
        }
    }
    __device__ __forceinline__ void keep(int i) {
        typename Table<BITS>::Levels of;
        of.load(levels[i]);
        tables[i].keep(of);
    }
    __device__ __forceinline__ uint32_t* stage(int at) const { return words + at * (LUT_SM90_THREADS * S::WORDS); }
    __device__ __forceinline__ void copy(int at) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            Codes<BITS>::copy(stage(at) + i * WORDS, codes[i], lane);
            codes[i] += 8 * BITS;
        }
    }
    /// Takes the codes of the next block from a stage, and the scales.
    __device__ __forceinline__ void look_up(int at, uint32_t (&a)[4][4], __half (&scale)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scale[i] = __ldg(scales[i]);
            if constexpr (OWN_TABLES) keep(i);
        }
        Codes<BITS> of[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) of[i].from_words(stage(at) + i * WORDS, lane);
#pragma unroll
        for (int number = 0; number < 2; ++number) {
            uint32_t upper[4], lower[4];
            tables[0].look_up(of[0].number(number), upper);
            tables[1].look_up(of[1].number(number), lower);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t(&to)[4] = a[2 * number + half];
                to[0] = upper[2 * half], to[1] = lower[2 * half];
                to[2] = upper[2 * half + 1], to[3] = lower[2 * half + 1];
            }
        }
        if (--left == 0) {
            left = of_group;
#pragma unroll
            for (int i = 0; i < 2; ++i) ++scales[i], levels[i] += OWN_TABLES ? 1 << BITS : 0;
        }
    }
};

/// The ring of values, and of their units: a block's come to a stage which all warps have read.
template <class S>
struct ValueRing {
    const char* values;  // of the first block
    const float* units;
    int count;  // of blocks
    uint32_t ring, unit_ring, full, empty;

    __device__ __forceinline__ uint32_t unit(int stage, int row) const {
        return unit_ring + stage * S::UNIT_BYTES + 4 * row;
    }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < LUT_SM90_STAGES; ++i) {
            mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, LUT_SM90_THREADS / WARP);
        }
        mbarrier_init_fence();
    }
    /// One thread does.
    __device__ __forceinline__ void bring(int block) const {
        if (block >= count) return;
        const int stage = block % LUT_SM90_STAGES, round = block / LUT_SM90_STAGES;
        if (round > 0) mbarrier_wait(empty + 8 * stage, (round - 1) % 2);
        mbarrier_expect_tx(full + 8 * stage, S::VALUE_BYTES + S::UNIT_BYTES);
        tma_load_bytes(ring + stage * S::VALUE_BYTES, values + int64_t(block) * S::VALUE_BYTES, S::VALUE_BYTES,
                       full + 8 * stage);
        if constexpr (!S::HALVES) {
            tma_load_bytes(unit(stage, 0), units + int64_t(block) * S::ROWS, S::UNIT_BYTES, full + 8 * stage);
        }
    }
};

/// The sums of a thread over `count` blocks from `begin` on.
template <class T, class S, int BITS, bool OWN_TABLES, int COLUMNS>
__device__ __forceinline__ void multiply(const LutProduct& p, int64_t first, int begin, const ValueRing<S>& ring,
                                         uint32_t* words, float (&sum)[S::ROWS / 2]) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, count = ring.count;
    Multiplicand<S, BITS, OWN_TABLES> m(p.w, first + warp * 16 + lane / 4, begin, words);
    const auto copy = [&](int block) {
        if (block < count) m.copy(block % LUT_SM90_STAGES);
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < CODES_AHEAD; ++i) copy(i);
    // Weights were there before rows were arranged.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x == 0) {
        for (int i = 0; i < VALUES_AHEAD; ++i) ring.bring(i);
    }
    __syncwarp();
    const auto prepare = [&](int block, uint32_t(&a)[4][4], __half(&scale)[2]) {
        cp_async_wait<CODES_AHEAD - 1>();
        m.look_up(block % LUT_SM90_STAGES, a, scale);
        copy(block + CODES_AHEAD);
    };
    float acc[COLUMNS / 2];
    const uint64_t matrix = matrix_descriptor(ring.ring);
    const auto step = [&](int block, const uint32_t(&now)[4][4], const __half(&scale)[2], uint32_t(&next)[4][4],
                          __half(&next_scale)[2]) {
        const int stage = block % LUT_SM90_STAGES;
        mbarrier_wait(ring.full + 8 * stage, block / LUT_SM90_STAGES % 2);
        const uint64_t values = matrix + stage * (S::VALUE_BYTES / 16);
        pin(acc);
        wgmma_fence();
        wgmma_first<__half>(acc, now[0], values);
#pragma unroll
        for (int i = 1; i < 4; ++i) wgmma<__half>(acc, now[i], values + 2 * i);
        wgmma_commit();
        // Warps bring values in turns.
        if (lane == 0 && warp == block % (LUT_SM90_THREADS / WARP)) ring.bring(block + VALUES_AHEAD);
        __syncwarp();
        if (block + 1 < count) prepare(block + 1, next, next_scale);
        wgmma_wait<0>();
        pin(acc);
        const float by[2] = {__half2float(scale[0]), __half2float(scale[1])};
#pragma unroll
        for (int j = 0; j < S::ROWS / 8; ++j) {
            float2 unit = {1, 1};
            if constexpr (!S::HALVES) unit = load_floats(ring.unit(stage, 8 * j + 2 * (lane % 4)));
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                float product = acc[4 * j + e];
                if constexpr (PARTS<T> == 2) product = fmaf(acc[S::ROWS / 2 + 4 * j + e], SECOND, product);
                sum[4 * j + e] =
                    fmaf(product, S::HALVES ? by[e / 2] : by[e / 2] * (e % 2 ? unit.y : unit.x), sum[4 * j + e]);
            }
        }
        // Lane 0 arrives for all, who have read units.
        if constexpr (!S::HALVES) {
            fence_proxy_async();
            __syncwarp();
        }
        if (lane == 0) mbarrier_arrive(ring.empty + 8 * stage);
    };
    uint32_t a[2][4][4];
    __half scales[2][2];
    prepare(0, a[0], scales[0]);
    for (int block = 0; block < count; block += 2) {
        step(block, a[0], scales[0], a[1], scales[1]);
        if (block + 1 < count) step(block + 1, a[1], scales[1], a[0], scales[0]);
    }
}

/// Adds the products with outliers to a tile's sums; a warp takes an output of those of its thread block at a time, and
/// lanes rows.
template <class T, class S>
__device__ __forceinline__ void add_outliers(const LutProduct& p, int64_t first, int64_t top, int part, float* sums) {
    const int lane = threadIdx.x % WARP;
    const T* const across = static_cast<const T*>(p.across);
    const int step = int(p.parts) * LUT_SM90_THREADS / WARP;
    for (int i = part + int(p.parts) * (threadIdx.x / WARP); i < LUT_SM90_OUTPUTS; i += step) {
        if (first + i >= p.w.outputs) break;
        float sum[S::ROWS / WARP] = {};
        for (int64_t begin = 0; begin < p.w.outliers; begin += WARP) {
            const int count = int(min(p.w.outliers - begin, int64_t(WARP)));
            const int64_t at = (first + i) * p.w.outliers + begin + min(lane, count - 1);
            const uint32_t place = p.w.places[at];
            const float extra = __half2float(static_cast<const __half*>(p.w.extra)[at]);
            for (int e = 0; e < count; ++e) {
                const T* const column = across + int64_t(__shfl_sync(~0u, place, e)) * p.padded + top;
                const float by = __shfl_sync(~0u, extra, e);
#pragma unroll
                for (int j = 0; j < S::ROWS / WARP; ++j) sum[j] = fmaf(by, filter(column[lane + WARP * j]), sum[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < S::ROWS / WARP; ++j) sums[(lane + WARP * j) * S::STRIDE + i] += sum[j];
    }
}

/// Four sums in the shared memory of a thread block of the cluster.
__device__ __forceinline__ float4 load_from(uint32_t address, uint32_t block) {
    float4 v;
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %4, %5;\n"
        "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
        : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
        : "r"(address), "r"(block)
        : "memory");
    return v;
}

/// Writes the rows of a tile that a thread block has of it, with the sums of its cluster in the order of columns. A
/// warp takes a row, and lanes four outputs each.
template <class T, class S>
__device__ __forceinline__ void write_rows(const LutProduct& p, int64_t first, int64_t top, int part,
                                           const float* sums) {
    constexpr int WARPS = LUT_SM90_THREADS / WARP;
    static_assert(LUT_SM90_OUTPUTS == 4 * WARP, "a lane's four outputs");
    const int parts = int(p.parts), output = 4 * (threadIdx.x % WARP);
    const int rows = int(min(int64_t(S::ROWS), p.rows - top));
    const int outputs = int(min(int64_t(4), p.w.outputs - first - output));
    if (outputs <= 0) return;
    float bias[4] = {};
    for (int i = 0; i < outputs && p.bias; ++i) bias[i] = p.bias[first + output + i];
    const uint32_t own = shared_address(sums + output);
#pragma unroll 4
    for (int row = part + parts * int(threadIdx.x / WARP); row < rows; row += parts * WARPS) {
        float sum[4] = {};
        for (int rank = 0; rank < parts; ++rank) {
            const uint32_t at = own + row * S::STRIDE * 4;
            const float4 v = parts > 1 ? load_from(at, rank) : load_floats4(at);
            sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
        }
        T* const to = static_cast<T*>(p.out) + (top + row) * p.w.outputs + first + output;
        alignas(4 * sizeof(T)) T four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] = T(sum[i] + bias[i]);
        using Four = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
        if (outputs == 4 && reinterpret_cast<uintptr_t>(to) % sizeof(Four) == 0) {
            *reinterpret_cast<Four*>(to) = *reinterpret_cast<const Four*>(four);
        } else {
            for (int i = 0; i < outputs; ++i) to[i] = four[i];
        }
    }
}

template <class T, int BITS, int COLUMNS>
__device__ void lut_product(const LutProduct& p) {
    using S = LutTile<T, BITS, COLUMNS>;
    extern __shared__ __align__(1024) uint8_t raw[];
    uint8_t* const memory = raw + (1024 - shared_address(raw) % 1024) % 1024;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = lane % 4;
    const int parts = int(p.parts), part = int(blockIdx.x % parts), blocks = int(p.w.columns / LUT_BLOCK);
    const int64_t talls = (p.w.outputs + LUT_SM90_OUTPUTS - 1) / LUT_SM90_OUTPUTS, tile = blockIdx.x / parts;
    const int64_t row_tile = tile / talls, top = row_tile * S::ROWS, first = tile % talls * LUT_SM90_OUTPUTS;
    const int begin = int(int64_t(blocks) * part / parts), end = int(int64_t(blocks) * (part + 1) / parts);
    const uint32_t at = shared_address(memory), barriers = at + S::BARRIERS_AT;
    const int64_t first_block = row_tile * blocks + begin;
    const ValueRing<S> ring = {static_cast<const char*>(p.values) + first_block * S::VALUE_BYTES,
                               p.units + first_block * S::ROWS,
                               end - begin,
                               at,
                               at + S::UNITS_AT,
                               barriers,
                               barriers + 8 * LUT_SM90_STAGES};
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    uint32_t* const words = reinterpret_cast<uint32_t*>(memory + S::CODES_AT) + threadIdx.x * S::WORDS;
    float sum[S::ROWS / 2] = {};
    if (p.w.tables > 1) {
        multiply<T, S, BITS, true, COLUMNS>(p, first, begin, ring, words, sum);
    } else {
        multiply<T, S, BITS, false, COLUMNS>(p, first, begin, ring, words, sum);
    }
    // All have read what values were there.
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(memory);
#pragma unroll
    for (int i = 0; i < S::ROWS / 2; ++i) {
        const int row = i / 4 * 8 + 2 * t + i % 2, output = warp * 16 + lane / 4 + i % 4 / 2 * 8;
        sums[row * S::STRIDE + output] = sum[i];
    }
    __syncthreads();
    if (p.w.outliers > 0) add_outliers<T, S>(p, first, top, part, sums);
    if (parts > 1) {
        cluster_sync();
    } else {
        __syncthreads();
    }
    write_rows<T, S>(p, first, top, part, sums);
    // A thread block keeps its sums until the others of its cluster have read them.
    if (parts > 1) cluster_sync();
}

#define KERNEL(name, T, bits, columns)                                                                                 \
    extern "C" __global__ void __launch_bounds__(LUT_SM90_THREADS, columns == 32 ? 2 : 1)                              \
        lut_product_##bits##_##columns##_##name(const __grid_constant__ LutProduct p) {                                \
        lut_product<T, bits, columns>(p);                                                                              \
    }
#define WIDTHS(name, T, bits) KERNEL(name, T, bits, 64) KERNEL(name, T, bits, 128)
#define NARROW(name, T) KERNEL(name, T, 2, 32) KERNEL(name, T, 3, 32) KERNEL(name, T, 4, 32)
#define INSTANCE(name, T)                                                                                              \
    WIDTHS(name, T, 2)                                                                                                 \
    WIDTHS(name, T, 3)                                                                                                 \
    WIDTHS(name, T, 4)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                              \
        lut_arrange_##name(const T* x, Rows r, int64_t first, int64_t rows, int64_t blocks, int64_t rows_of_tile,      \
                           __half* values, float* units, T* across, int64_t padded) {                                  \
        lut_arrange<T>(x, r, first, rows, blocks, int(rows_of_tile), values, units, across, padded);                   \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
NARROW(f16, __half)
NARROW(bf16, __nv_bfloat16)
#undef INSTANCE
#undef NARROW
#undef WIDTHS
#undef KERNEL
