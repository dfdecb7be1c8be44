// Rows as halves, which tensor cores multiply with levels. Those of f16 are as they are; others are scaled by a power
// of two a block of columns, and a value of f32 is the sum of two.
#pragma once
#include "lut/codes.cuh"

/// Columns that a thread takes at a time: a quarter of a block.
constexpr int LUT_PIECE = LUT_BLOCK / 4;

/// A value is the sum of so many halves, of which the second counts this much.
template <class T>
constexpr int PARTS = sizeof(T) > 2 ? 2 : 1;
constexpr float SECOND = 1.f / 2048;

/// The power of two whose product with numbers of this magnitude and below is within a half, nearly as large as that.
__device__ __forceinline__ float to_halves(float most) {
    const int exponent = int(__float_as_uint(most) >> 23) - 127;
    return __uint_as_float(uint32_t(127 + 14 - max(exponent, -100)) << 23);
}

/// The values of a row from a column on, of which those beyond `count` are zeros.
template <class T>
__device__ __forceinline__ void load_piece(const T* from, int64_t count, T (&v)[LUT_PIECE]) {
    constexpr int EACH = 16 / sizeof(T);
    if (count >= LUT_PIECE && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
        for (int i = 0; i < LUT_PIECE / EACH; ++i) {
            const uint4 words = __ldg(reinterpret_cast<const uint4*>(from) + i);
            memcpy(v + i * EACH, &words, sizeof words);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < LUT_PIECE; ++i) v[i] = i < count ? from[i] : T(0.f);
}

/// The largest finite magnitude of a piece, or 0.
template <class T>
__device__ __forceinline__ float largest(const T (&v)[LUT_PIECE]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < LUT_PIECE; ++i) {
        const float magnitude = fabsf(filter(v[i]));
        if (magnitude <= FLT_MAX) most = fmaxf(most, magnitude);
    }
    return most;
}

/// Two values of f32 or bf16 as halves, `first + second * SECOND`.
struct Halves {
    __half2 first, second;

    __device__ __forceinline__ Halves(float a, float b) : first(__floats2half2_rn(a, b)) {
        const auto rest = [](float of, __half half) { return isfinite(of) ? (of - __half2float(half)) / SECOND : 0.f; };
        second = __halves2half2(__float2half_rn(rest(a, first.x)), __float2half_rn(rest(b, first.y)));
    }
};
