// Weights as codes, which registers turn into levels: what products of few rows and of many have in common.
#pragma once
#include <float.h>

#include <type_traits>

#include "arch/mma.cuh"
#include "exact/common.cuh"

constexpr int LUT_BLOCK = 64;  // columns whose codes lie together

/// A table of levels, the low bytes and the high bytes of four levels each in a register, where `__byte_perm` looks
/// codes up.
template <int BITS>
struct Table {
    static constexpr int WORDS = BITS == 4 ? 4 : BITS == 3 ? 2 : 1;
    uint32_t low[WORDS], high[WORDS];

    /// Levels as they lie, which may be on their way.
    struct Levels {
        uint2 fours[WORDS];

        __device__ __forceinline__ void load(const __half* from) {
#pragma unroll
            for (int i = 0; i < WORDS; ++i) fours[i] = __ldg(reinterpret_cast<const uint2*>(from) + i);
        }
    };

    __device__ __forceinline__ void keep(const Levels& levels) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) {
            const uint2 four = levels.fours[i];
            low[i] = __byte_perm(four.x, four.y, 0x6420), high[i] = __byte_perm(four.x, four.y, 0x7531);
        }
    }

    /// The levels of eight codes, each a nibble, in pairs.
    __device__ __forceinline__ void look_up(uint32_t codes, uint32_t (&pairs)[4]) const {
        const uint32_t of_eight = codes & 0x77777777, above = codes >> 3 & 0x11111111;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t four = of_eight >> 16 * half;
            uint32_t lows = __byte_perm(low[0], low[BITS > 2], four);
            uint32_t highs = __byte_perm(high[0], high[BITS > 2], four);
            if constexpr (BITS == 4) {
                const uint32_t upper = __byte_perm(0xff00, 0, above >> 16 * half);
                lows = (lows & ~upper) | (__byte_perm(low[2], low[3], four) & upper);
                highs = (highs & ~upper) | (__byte_perm(high[2], high[3], four) & upper);
            }
            pairs[2 * half] = __byte_perm(lows, highs, 0x5140);
            pairs[2 * half + 1] = __byte_perm(lows, highs, 0x7362);
        }
    }
};

/// The eight fields of a number, of two bits or of one each, as nibbles.
__device__ __forceinline__ uint32_t nibbles_of_twos(uint32_t codes) {
    codes = (codes | codes << 8) & 0x00ff00ff;
    codes = (codes | codes << 4) & 0x0f0f0f0f;
    return (codes | codes << 2) & 0x33333333;
}
__device__ __forceinline__ uint32_t nibbles_of_ones(uint32_t bits) {
    bits = (bits | bits << 12) & 0x000f000f;
    bits = (bits | bits << 6) & 0x03030303;
    return (bits | bits << 3) & 0x11111111;
}

/// The codes of two numbers of a block, 2 t and 2 t + 1, as they lie.
template <int BITS>
struct Codes {
    uint32_t first = 0, second = 0;

    __device__ __forceinline__ void load(const uint8_t* block, int t) {
        if constexpr (BITS == 4) {
            const uint2 both = __ldcs(reinterpret_cast<const uint2*>(block) + t);
            first = both.x, second = both.y;
        } else {
            first = __ldcs(reinterpret_cast<const uint32_t*>(block) + t);
            if constexpr (BITS == 3) second = __ldcs(reinterpret_cast<const uint16_t*>(block + 16) + t);
        }
    }
    /// The words that `from_words` takes, of which a thread copies so many.
    static constexpr int WORDS = BITS == 2 ? 1 : 2;
    __device__ __forceinline__ static void copy(uint32_t* to, const uint8_t* block, int t) {
        if constexpr (BITS == 4) {
            cp_async_8(to, reinterpret_cast<const uint2*>(block) + t);
        } else {
            cp_async_4(to, reinterpret_cast<const uint32_t*>(block) + t);
            if constexpr (BITS == 3) cp_async_4(to + 1, reinterpret_cast<const uint32_t*>(block + 16) + t / 2);
        }
    }
    __device__ __forceinline__ void from_words(const uint32_t* words, int t) {
        first = words[0];
        if constexpr (BITS == 4) second = words[1];
        if constexpr (BITS == 3) second = words[1] >> 16 * (t % 2) & 0xffff;
    }
    /// The codes of one of them, each a nibble: of the columns 2 t, 8 + 2 t, 16 + 2 t, .., or one more.
    __device__ __forceinline__ uint32_t number(int which) const {
        if constexpr (BITS == 4) return which ? second : first;
        const uint32_t codes = nibbles_of_twos(which ? first >> 16 : first & 0xffff);
        if constexpr (BITS == 2) return codes;
        return codes | nibbles_of_ones(which ? second >> 8 : second & 0xff) << 2;
    }
};

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
        levels = static_cast<const __half*>(w.levels) + (o * w.tables << BITS);
        scales = static_cast<const __half*>(w.scales) + o * w.groups;
        a_table = float(w.tables) / blocks, a_group = float(w.groups) / blocks;
    }
    /// The levels of a block. Half of a block more keeps whole numbers of blocks from rounding down.
    __device__ __forceinline__ const __half* levels_of(int block) const {
        return levels + (tables <= 1 ? 0 : int((block + 0.5f) * a_table) << BITS);
    }
    __device__ __forceinline__ __half scale(int block) const { return __ldg(scales + int((block + 0.5f) * a_group)); }
};
