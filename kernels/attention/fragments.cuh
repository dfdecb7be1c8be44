// Rows as the lanes of a warp hold them for products, and the attention that a warp has of them so far, by an online
// softmax (Milakov and Gimelshein 2018).
#pragma once
#include "attention/codes.cuh"

/// A row in pieces of 16 bytes, as lanes (g = lane / 4, t = lane % 4) hold them for products with mma.sync. For scores
/// lane t has every fourth piece of the key rows g, g + 8.., and the same of query head g: columns may be in any order
/// that is the same for both. For values lane g has every eighth piece of the rows of lane t in the scores, so that
/// they meet their weights with no exchange. What weights lose in the tensor cores' type is a second operand, and so is
/// what queries, keys and values in f32 lose, so that products are as exact as in f32. A row whose pieces do not come
/// out even has zeros beyond its end.
template <class T, int D>
struct Fragments {
    static constexpr int EACH = 16 / sizeof(T);        // columns of a piece
    static constexpr int ROWS = 4 * EACH / 2;          // of a tile: 16, of f32 8
    static constexpr int TALL = ROWS / 8;              // rows of keys of a lane
    static constexpr int PIECES = (D / EACH + 3) / 4;  // of a key row of a lane
    static constexpr int VALUES = ROWS / 4;            // rows of values of a lane
    static constexpr int PARTS = (D / EACH + 7) / 8;   // pieces of a value row of a lane
    static constexpr int WIDTH = 8 * EACH * PARTS;     // columns of all lanes' parts, D and some beyond a row's end
    static constexpr int TILES = WIDTH / 16;           // accumulators: two columns of two heads each

    /// True if lane t's piece p of a key row is in the row: the last one may lie beyond its end.
    __device__ __forceinline__ static bool has_key(int p, int t) {
        return D % (4 * EACH) == 0 || (4 * p + 4) * EACH <= D || (4 * p + t) * EACH < D;
    }
    /// The same of lane g's part p of a value row.
    __device__ __forceinline__ static bool has_value(int p, int g) {
        return D % (8 * EACH) == 0 || (8 * p + 8) * EACH <= D || (8 * p + g) * EACH < D;
    }
};

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

    /// Turns the scores s[i][e] (head g, row 8 * i + 2t + e) into weights, and adds these up.
    __device__ __forceinline__ void weigh(float (&s)[F::TALL][2]) {
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
    }

    /// Adds the rows 8 * i + 2t + e with these weights (head g).
    __device__ __forceinline__ void add(const float (&weights)[F::TALL][2], const uint4 (&v)[F::PARTS][F::VALUES]) {
        if constexpr (sizeof(T) == 4) {
            const uint32_t w0 = __float_as_uint(weights[0][0]), w1 = __float_as_uint(weights[0][1]);
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
            for (int i = 0; i < 2; ++i) split_pair<T>(weights[i][0], weights[i][1], w[i], left[i]);
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

    /// The same of codes with these scales. A scale goes with the row's weight, so that codes are numbers as they are;
    /// and as such weights have no bound, they are in bf16, which has the exponents for them.
    __device__ __forceinline__ void add_scaled(const float (&of_rows)[F::TALL][2], const float (&scales)[F::TALL][2],
                                               const Codes<F::EACH> (&v)[F::PARTS][F::VALUES]) {
        float weights[F::TALL][2];
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) {
            weights[i][0] = of_rows[i][0] * scales[i][0], weights[i][1] = of_rows[i][1] * scales[i][1];
        }
        if constexpr (sizeof(T) == 4) {
            const uint32_t w0 = __float_as_uint(weights[0][0]), w1 = __float_as_uint(weights[0][1]);
#pragma unroll
            for (int part = 0; part < F::PARTS; ++part) {
                const uint4 r0 = decode<T>(v[part][0]), r1 = decode<T>(v[part][1]);
                const uint32_t a[2][4] = {{r0.x, r0.y, r1.x, r1.y}, {r0.z, r0.w, r1.z, r1.w}};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    mma(acc[2 * part + i], a[i], high(w0), high(w1), T());
                    mma(acc[2 * part + i], a[i], low(w0), low(w1), T());
                }
            }
        } else {
            using B = __nv_bfloat16;
            uint32_t w[2], left[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) split_pair<B>(weights[i][0], weights[i][1], w[i], left[i]);
#pragma unroll
            for (int part = 0; part < F::PARTS; ++part) {
                const auto(&r)[4] = v[part];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    // A column's bytes of two rows beside each other.
                    const uint32_t order = i % 2 ? 0x7362 : 0x5140;
                    const uint32_t above = __byte_perm(r[0].bytes[i / 2], r[1].bytes[i / 2], order);
                    const uint32_t below = __byte_perm(r[2].bytes[i / 2], r[3].bytes[i / 2], order);
                    const uint32_t a[] = {two_numbers<B>(above, false), two_numbers<B>(above, true),
                                          two_numbers<B>(below, false), two_numbers<B>(below, true)};
                    mma(acc[4 * part + i], a, w[0], w[1], B());
                    mma(acc[4 * part + i], a, left[0], left[1], B());
                }
            }
        }
    }
};

/// The scores of a tile of key rows for head g: s[i][e] of row 8 * i + 2t + e. `key(i, p)` is a lane's piece p of its
/// key row i.
template <class T, int D, class Key>
__device__ __forceinline__ void score_tile(float (&s)[Fragments<T, D>::TALL][2], Key key, const uint4* q, float scale) {
    using F = Fragments<T, D>;
    float acc[F::TALL][4] = {};
#pragma unroll
    for (int p = 0; p < F::PIECES; ++p) {
        const uint4 head = q[p * WARP + threadIdx.x % WARP];
#pragma unroll
        for (int i = 0; i < F::TALL; ++i) add_scores<T>(acc[i], head, key(i, p));
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
