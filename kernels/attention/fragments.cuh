// Rows as the lanes of a warp hold them for products, and the attention that a warp has of them so far, by an online
// softmax (Milakov and Gimelshein 2018).
#pragma once
#include "arch/mma.cuh"
#include "exact/common.cuh"

/// A row in pieces of 16 bytes, as lanes (g = lane / 4, t = lane % 4) hold them for products with mma.sync. For scores
/// lane t has every fourth piece of the key rows g, g + 8.., and the same of query head g: columns may be in any order
/// that is the same for both. For values lane g has every eighth piece of the rows of lane t in the scores, so that
/// they meet their weights with no exchange. What weights lose in the tensor cores' type is a second operand, and so is
/// what queries, keys and values in f32 lose, so that products are as exact as in f32.
template <class T, int D>
struct Fragments {
    static constexpr int EACH = 16 / sizeof(T);  // columns of a piece
    static constexpr int ROWS = 4 * EACH / 2;    // of a tile: 16, of f32 8
    static constexpr int TALL = ROWS / 8;        // rows of keys of a lane
    static constexpr int PIECES = D / EACH / 4;  // of a key row of a lane
    static constexpr int VALUES = ROWS / 4;      // rows of values of a lane
    static constexpr int PARTS = D / EACH / 8;   // pieces of a value row of a lane
    static constexpr int TILES = D / 16;         // accumulators: two columns of two heads each
};

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

/// The piece of four codes, as numbers. The byte is the last of the 24 bits of a float from 2^23 on.
__device__ __forceinline__ float4 numbers_of(uint32_t bytes) {
    constexpr uint32_t POWER = 0x4b000000;
    constexpr float ZERO = 8388608.0f + 128;
    const auto number = [&](uint32_t selected) { return __uint_as_float(__byte_perm(bytes, POWER, selected)) - ZERO; };
    return make_float4(number(0x7440), number(0x7441), number(0x7442), number(0x7443));
}

/// The piece that codes stand for, `scale` to a whole number.
template <class T>
__device__ __forceinline__ uint4 decode(const Codes<16 / sizeof(T)>& codes, float scale) {
    uint32_t words[4];
    if constexpr (sizeof(T) == 4) {
        const float4 n = numbers_of(codes.bytes[0]);
        words[0] = __float_as_uint(n.x * scale), words[1] = __float_as_uint(n.y * scale);
        words[2] = __float_as_uint(n.z * scale), words[3] = __float_as_uint(n.w * scale);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 n = numbers_of(codes.bytes[i]);
            const T four[] = {T(n.x * scale), T(n.y * scale), T(n.z * scale), T(n.w * scale)};
            words[2 * i] = reinterpret_cast<const uint32_t(&)[2]>(four)[0];
            words[2 * i + 1] = reinterpret_cast<const uint32_t(&)[2]>(four)[1];
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

/// The same for a scale of 1: all types hold these numbers.
template <class T>
__device__ __forceinline__ uint4 decode(const Codes<16 / sizeof(T)>& codes) {
    if constexpr (std::is_same<T, __half>::value) {
        // The byte is the last of the 11 bits of a half from 2^10 on.
        const __half2 zero = __half2half2(__ushort_as_half(0x6480));
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t pair = __byte_perm(codes.bytes[i / 2], 0x64646464, i % 2 ? 0x4342 : 0x4140);
            const __half2 numbers = __hsub2(reinterpret_cast<const __half2&>(pair), zero);
            words[i] = reinterpret_cast<const uint32_t&>(numbers);
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    } else {
        return decode<T>(codes, 1);
    }
}

/// Adds the products of 16 bytes of a query head and of a key row.
template <class T>
__device__ __forceinline__ void add_scores(float (&s)[4], uint4 q, uint4 key) {
    if constexpr (sizeof(T) == 4) {
        const uint32_t qs[] = {q.x, q.y, q.z, q.w}, ks[] = {key.x, key.y, key.z, key.w};
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t a[] = {high(qs[i]), low(qs[i]), high(qs[i + 1]), low(qs[i + 1])};
            mma(s, a, high(ks[i]), high(ks[i + 1]), T());
            mma(s, a, low(ks[i]), low(ks[i + 1]), T());
        }
    } else {
        mma(s, {q.x, 0, q.y, 0}, key.x, key.y, T());
        mma(s, {q.z, 0, q.w, 0}, key.z, key.w, T());
    }
}

/// Two weights in the type of the values, and what that loses.
template <class T>
__device__ __forceinline__ void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
    const T h[] = {T(a), T(b)}, l[] = {T(a - float(h[0])), T(b - float(h[1]))};
    high = reinterpret_cast<const uint32_t&>(h), low = reinterpret_cast<const uint32_t&>(l);
}

/// Weights are 2^12 for the largest score, so that small ones keep their bits in f16.
constexpr float ROOM = 8.317766f;

/// The attention of up to HEADS query heads so far. Lane (g, t) has the largest score of head g, its share of the sum
/// of weights, and weighted values of the heads 2t and 2t + 1.
template <class T, int D>
struct Running {
    using F = Fragments<T, D>;
    float most = -INFINITY, sum = 0;
    float acc[F::TILES][4] = {};

    /// Adds rows with scores s[i][e] (head g, row 8 * i + 2t + e) and values of the rows 8 * i + 2t + e.
    __device__ __forceinline__ void add(float (&s)[F::TALL][2], const uint4 (&v)[F::PARTS][F::VALUES]) {
        const int lane = threadIdx.x % WARP, t = lane % 4;
        float top = most;
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) top = fmaxf(top, fmaxf(s[i][0], s[i][1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1)), top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float from = top == -INFINITY ? 0 : top;
        if (__any_sync(~0u, top > most)) {
            const float shrink = __expf(most - from);
            sum *= shrink;
            const float even = __shfl_sync(~0u, shrink, 8 * t), odd = __shfl_sync(~0u, shrink, 8 * t + 4);
#pragma unroll
            for (int i = 0; i < F::TILES; ++i) acc[i][0] *= even, acc[i][1] *= odd, acc[i][2] *= even, acc[i][3] *= odd;
        }
        most = top;
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) s[i][e] = __expf(s[i][e] - from + ROOM), sum += s[i][e];
        }
        if constexpr (sizeof(T) == 4) {
            const uint32_t w0 = __float_as_uint(s[0][0]), w1 = __float_as_uint(s[0][1]);
#pragma unroll
            for (int part = 0; part < F::PARTS; ++part) {
                const uint32_t x[2][4] = {{v[part][0].x, v[part][0].y, v[part][0].z, v[part][0].w},
                                          {v[part][1].x, v[part][1].y, v[part][1].z, v[part][1].w}};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const uint32_t raw[] = {x[0][2 * i], x[0][2 * i + 1], x[1][2 * i], x[1][2 * i + 1]};
                    const uint32_t a[] = {high(raw[0]), high(raw[1]), high(raw[2]), high(raw[3])};
                    const uint32_t b[] = {low(raw[0]), low(raw[1]), low(raw[2]), low(raw[3])};
                    mma(acc[2 * part + i], a, high(w0), high(w1), T());
                    mma(acc[2 * part + i], a, low(w0), low(w1), T());
                    mma(acc[2 * part + i], b, high(w0), high(w1), T());
                }
            }
        } else {
            uint32_t w[2], left[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) split_pair<T>(s[i][0], s[i][1], w[i], left[i]);
#pragma unroll
            for (int part = 0; part < F::PARTS; ++part) {
                const uint4(&r)[4] = v[part];
                const uint32_t x[4][4] = {{r[0].x, r[0].y, r[0].z, r[0].w},
                                          {r[1].x, r[1].y, r[1].z, r[1].w},
                                          {r[2].x, r[2].y, r[2].z, r[2].w},
                                          {r[3].x, r[3].y, r[3].z, r[3].w}};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint32_t a[] = {__byte_perm(x[0][i], x[1][i], 0x5410), __byte_perm(x[0][i], x[1][i], 0x7632),
                                          __byte_perm(x[2][i], x[3][i], 0x5410), __byte_perm(x[2][i], x[3][i], 0x7632)};
                    mma(acc[4 * part + i], a, w[0], w[1], T());
                    mma(acc[4 * part + i], a, left[0], left[1], T());
                }
            }
        }
    }
};

/// The scores of a tile of key rows for head g: s[i][e] of row 8 * i + 2t + e.
template <class T, int D>
__device__ __forceinline__ void score_tile(float (&s)[Fragments<T, D>::TALL][2],
                                           const uint4 (&keys)[Fragments<T, D>::TALL][Fragments<T, D>::PIECES],
                                           const uint4* q, float scale) {
    using F = Fragments<T, D>;
    float acc[F::TALL][4] = {};
#pragma unroll
    for (int p = 0; p < F::PIECES; ++p) {
        const uint4 head = q[p * WARP + threadIdx.x % WARP];
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) add_scores<T>(acc[i], head, keys[i][p]);
    }
#pragma unroll
    for (int i = 0; i < F::TALL; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) s[i][e] = (acc[i][e] + acc[i][e + 2]) * scale;
    }
}

/// The largest score and the sum of weights relative to it, of what the LANES neighbouring lanes have.
template <int LANES = WARP>
__device__ __forceinline__ float2 over_lanes(float2 own) {
    float most = own.x;
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    float sum = most == -INFINITY ? 0 : own.y * __expf(own.x - most);
#pragma unroll
    for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return make_float2(most, sum);
}
