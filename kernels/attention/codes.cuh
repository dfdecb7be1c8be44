// Rows as codes: a byte for each column of a mean, and product codes (Jegou et al. 2011) of tokens.
#pragma once
#include "arch/mma.cuh"
#include "exact/common.cuh"

/// 16 bytes of a row, by which lanes hold it.
__device__ __forceinline__ uint4 load_piece(const void* from) { return __ldg(reinterpret_cast<const uint4*>(from)); }

/// The codes of a piece's columns, a byte each: a whole number and 128.
template <int EACH>
struct Codes {
    uint32_t bytes[EACH / 4];
};
template <int EACH>
__device__ __forceinline__ Codes<EACH> load_codes(const uint8_t* from) {
    Codes<EACH> codes;
    if constexpr (EACH == 8) {
        const uint2 two = __ldg(reinterpret_cast<const uint2*>(from));
        codes.bytes[0] = two.x, codes.bytes[1] = two.y;
    } else {
        codes.bytes[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    }
    return codes;
}

/// Four codes, as numbers. The byte is the last of the 24 bits of a float from 2^23 on.
__device__ __forceinline__ float4 numbers_of(uint32_t bytes) {
    constexpr uint32_t POWER = 0x4b000000;
    constexpr float ZERO = 8388608.0f + 128;
    const auto number = [&](uint32_t selected) { return __uint_as_float(__byte_perm(bytes, POWER, selected)) - ZERO; };
    return make_float4(number(0x7440), number(0x7441), number(0x7442), number(0x7443));
}

/// The two codes of a word's lower or upper half, as numbers, which every type holds.
template <class T>
__device__ __forceinline__ uint32_t two_numbers(uint32_t bytes, bool upper) {
    if constexpr (std::is_same<T, __half>::value) {
        // The byte is the last of the 11 bits of a half from 2^10 on.
        const uint32_t pair = __byte_perm(bytes, 0x64646464, upper ? 0x4342 : 0x4140);
        const __half2 numbers = __hsub2(reinterpret_cast<const __half2&>(pair), __half2half2(__ushort_as_half(0x6480)));
        return reinterpret_cast<const uint32_t&>(numbers);
    } else {
        // Seven bits are the last of the 8 of a number from 2^7 on; the eighth says whether that is 2^7 or 2^8 too
        // much.
        const uint32_t pair = __byte_perm(bytes, 0, upper ? 0x4342 : 0x4140);
        const uint32_t most = (pair & 0x007f007f) | 0x43004300, excess = (pair & 0x00800080) ^ 0x43804380;
        const __nv_bfloat162 numbers =
            __hsub2(reinterpret_cast<const __nv_bfloat162&>(most), reinterpret_cast<const __nv_bfloat162&>(excess));
        return reinterpret_cast<const uint32_t&>(numbers);
    }
}

/// The columns of a piece that codes stand for, but for their scale.
template <class T>
__device__ __forceinline__ uint4 decode(const Codes<16 / sizeof(T)>& codes) {
    if constexpr (sizeof(T) == 4) {
        const float4 n = numbers_of(codes.bytes[0]);
        return make_uint4(__float_as_uint(n.x), __float_as_uint(n.y), __float_as_uint(n.z), __float_as_uint(n.w));
    } else {
        return make_uint4(two_numbers<T>(codes.bytes[0], false), two_numbers<T>(codes.bytes[0], true),
                          two_numbers<T>(codes.bytes[1], false), two_numbers<T>(codes.bytes[1], true));
    }
}

/// The columns of a lane's piece of a row, from `column` on: the entries of their product codes.
template <class T, int COLUMNS, int BITS>
__device__ __forceinline__ uint4 look_up(const uint8_t* codes, const T* entries, int column) {
    constexpr int COUNT = 16 / sizeof(T) / COLUMNS, ENTRIES = 1 << BITS;
    const int first = column / COLUMNS;
    const uint8_t* const from = codes + first * BITS / 8;
    uint32_t words[2] = {};
    if constexpr (COUNT * BITS == 64) {
        const uint2 both = __ldg(reinterpret_cast<const uint2*>(from));
        words[0] = both.x, words[1] = both.y;
    } else if constexpr (COUNT * BITS == 32) {
        words[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
    } else if constexpr (COUNT * BITS == 16) {
        words[0] = __ldg(reinterpret_cast<const uint16_t*>(from));
    } else {
        words[0] = __ldg(from) >> first * BITS % 8;
    }
    using Entry =
        std::conditional_t<COLUMNS * sizeof(T) == 16, uint4,
                           std::conditional_t<COLUMNS * sizeof(T) == 8, uint2,
                                              std::conditional_t<COLUMNS * sizeof(T) == 4, uint32_t, uint16_t>>>;
    const Entry* const table = reinterpret_cast<const Entry*>(entries) + first * ENTRIES;
    union {
        Entry entries[COUNT];
        uint4 all;
    } piece;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const uint32_t code = words[i * BITS / 32] >> i * BITS % 32 & (ENTRIES - 1);
        piece.entries[i] = table[i * ENTRIES + code];
    }
    return piece.all;
}

/// The gain of a row of product codes (Sabin and Gray 1984), by which its entries are multiplied.
__device__ __forceinline__ float gain_of(const ProductCodes& codes, int64_t row) {
    return codes.gains ? exp2f(float(__ldg(codes.gains + row)) * (-1.0f / GAINS_PER_OCTAVE)) : 1;
}

/// Calls `f` with the columns of a piece and the bits of a code as constants.
template <class T, class F>
__device__ __forceinline__ void with_pieces(const ProductCodes& codes, F f) {
    const auto of_columns = [&](auto columns) {
        if (codes.bits == 4) {
            f(columns, std::integral_constant<int, 4>());
        } else {
            f(columns, std::integral_constant<int, 8>());
        }
    };
    if (codes.columns == 1) {
        of_columns(std::integral_constant<int, 1>());
    } else if (codes.columns == 2) {
        of_columns(std::integral_constant<int, 2>());
    } else if (codes.columns == 4) {
        of_columns(std::integral_constant<int, 4>());
    } else if constexpr (sizeof(T) < 4) {
        of_columns(std::integral_constant<int, 8>());
    }
}
