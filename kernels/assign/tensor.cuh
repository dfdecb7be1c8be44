// Scores on tensor cores, for f16 and bf16 (f32 comes as pairs of halves: split.cu), and the proof that goes with them.
//
// Tensor cores multiply what is stored, so the rows stay as they are and only the centroids move: with c = mu + e, all
// scores of a row x differ by the same x.mu from
//
//     score[j] = x.e[j] - (|c[j]|^2 - |mu|^2) / 2      (squared Euclidean; the largest wins)
//     score[j] = x.c[j],  or  x.c[j] / |c[j]|          (dot product, cosine; mu = 0)
//
// mu has the rows' own type and is zero in each column where c - mu might not be exact, so blobs far from the origin
// lose the large norm that would swamp f32 accumulators, and nothing else changes.
//
// Why the bound holds. Products of two halves are exact in f32. A tensor core adds a block of them to the accumulator
// after aligning all to the largest exponent and cutting what is left of the last place kept, then cuts the sum to f32
// (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"). With M = |x| max|e| + max|start| above every partial
// sum, u = 2^-23 M and j bits kept below those of f32, a block of m products loses at most (m + 1) 2^-j u + u. Hopper's
// products have m = 16 and j = 2, those of warpgroups and mma.sync alike, and so have later GPUs (probed by
// tests/all/numbers.rs; benches/record/assign-versions.md): 5.25 u for 16 columns, taken as 6. Before Hopper we assume
// no more than m = 8 and j = 1, as on Ampere: 11 u, taken as 12. A chain of FMAs, which scores one column again, loses
// less. The moved centroid, if it had to be rounded, adds |x| max|residual|, and `start` and `scale` half an ulp each.
// The f64 definition is within the rounding of argmin.cuh.
//
// Why no centroid can spoil the bound for all rows. The maxima above are those of the centroids in reach. Most rows
// have norms of at most R, four times what seven in eight of a sample have (`reach_of`). By the triangle inequality a
// row x within R of the origin is at least |c| - R from a centroid c, and at most R + |a| from a centroid a; so where
// |c| > 2 R + |a|, c is not the nearest (2 % more leave room for rounding, the definition's too). Such a centroid is
// out of reach: it starts from NaN, which no maximum takes, and is in no bound. Rows beyond R are never proven, and
// the recheck compares whatever scores NaN by the definition. A centroid with a NaN is at distance +inf from every
// row, and so is one with an infinity but for dot products: both start from -inf. A row with a NaN is as far from all
// centroids, and its label is 0.
//
// A centroid that loses more than rounding should when it is moved, because mu is right for the others, carries that
// itself: with r the norm of what it lost, its start is R r higher, so that for rows within R its score is too high by
// 2 R r at most and never too low by it. Where it wins, the error bound is wider by 2 R r (`own`).
#pragma once
#include "exact/argmin.cuh"

/// A bound is at least the value, and +inf if that is not a number.
__device__ __forceinline__ void raise(float* bound, double v) {
    const float above = v >= 0 ? __double2float_ru(v * (1 + 0x1p-20)) : INFINITY;
    // Most find it high enough already: the few that do not would otherwise wait for all the others.
    if (above > *const_cast<volatile float*>(bound)) atomicMax(reinterpret_cast<int*>(bound), __float_as_int(above));
}

/// The centroids of one problem as tensor-core kernels score them.
template <class T>
struct ScoredCentroids {
    const T* moved;      // (k, pitch): e, zero in the columns past d; pitch is a multiple of 8
    const float* start;  // (padded): what an accumulator starts from; -inf past k, for duplicates and for what is at
                         // distance +inf; NaN out of reach
    const float* scale;  // (padded), or null for ones; then score = scale * (x.moved) + start
    const float* own;    // (padded), or null for zeros: by how much a row's error bound is wider where this one wins
    const Bounds* bounds;
    int64_t k, pitch;

    /// Problem `b` of arrays that hold one copy for all problems or one for each.
    __device__ __forceinline__ ScoredCentroids(const T* moved, const float* start, const float* scale, const float* own,
                                               const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded,
                                               int64_t copies, int64_t b)
        : moved(moved),
          start(start),
          scale(scale),
          own(own),
          bounds(bounds),
          k(k),
          pitch(pitch) {
        if (copies > 1) {
            this->moved += b * k * pitch, this->start += b * padded, this->bounds += b;
            if (scale) this->scale += b * padded;
            if (own) this->own += b * padded;
        }
    }
};

// ---- Eight columns at a time: 16 bytes of halves.

constexpr int PIECE = 8;

/// Two halves in f32.
__device__ __forceinline__ float2 wide_pair(uint32_t v, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ float2 wide_pair(uint32_t v, __nv_bfloat16) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000)};
}

/// Eight columns of a row of `d`, those past it as zeros. What a kernel has written itself is not read-only.
template <class T, bool READ_ONLY = true>
__device__ __forceinline__ uint4 load_piece(const T* row, int64_t column, int64_t d) {
    const T* from = row + column;
    if (column + PIECE <= d && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const uint4* piece = reinterpret_cast<const uint4*>(from);
        return READ_ONLY ? __ldg(piece) : *piece;
    }
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        const uint32_t bits = column + i < d ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
        words[i / 2] |= bits << (i % 2 * 16);
    }
    return {words[0], words[1], words[2], words[3]};
}

/// A piece in f32.
template <class T>
__device__ __forceinline__ void widen(float (&v)[PIECE], uint4 piece) {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 two = wide_pair(words[i], T());
        v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
}

/// Eight columns of a row of `d` in f32, those past it as zeros.
template <class T>
__device__ __forceinline__ void load_eight(float (&v)[PIECE], const T* row, int64_t column, int64_t d) {
    widen<T>(v, load_piece(row, column, d));
}
__device__ __forceinline__ void load_eight(float (&v)[PIECE], const float* row, int64_t column, int64_t d) {
    const float* from = row + column;
    if (column + PIECE <= d && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
        const float4 a = __ldg(reinterpret_cast<const float4*>(from));
        const float4 b = __ldg(reinterpret_cast<const float4*>(from) + 1);
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < PIECE; ++i) v[i] = column + i < d ? __ldg(from + i) : 0;
}

__device__ __forceinline__ uint32_t bits_of(__half2 v) { return *reinterpret_cast<const uint32_t*>(&v); }

/// The sum of squares of a piece.
template <class T>
__device__ __forceinline__ float piece_squares(uint4 v) {
    float sum = 0;
    for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        const float2 u = wide_pair(word, T());
        sum = fmaf(u.x, u.x, fmaf(u.y, u.y, sum));
    }
    return sum;
}

/// Adds the products of two pieces to `dot`.
template <class T>
__device__ __forceinline__ void add_products(float& dot, uint4 u, uint4 v) {
    const uint32_t us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 p = wide_pair(us[i], T()), q = wide_pair(vs[i], T());
        dot = fmaf(p.x, q.x, fmaf(p.y, q.y, dot));
    }
}

// ---- The proof.

/// Units of the last place that 16 columns may lose.
#if __CUDA_ARCH__ >= 900
constexpr int LOSS = 6;
#else
constexpr int LOSS = 12;
#endif

/// An upper bound of a norm from its sum of squares, added up in f32 in any order, and of what underflows before.
__device__ __forceinline__ float row_norm_above(float squares, int64_t d) {
    return sqrtf(squares + 1e-37f * d) * (1 + (d + 16) * 0x1p-23f);
}

/// Products of a half and a small half lose, all together, no more than this many columns do: there are twice as many
/// of them, of up to 2^-10 of the size (split.cu), which are added up before any other.
constexpr int SMALL_PRODUCTS = 16;

/// The error bound of a row: two scores that differ by more order its distances. It is twice the error of one.
/// `squares` is the row's sum of squares or more, added up in f32 in any order. Accumulators that start from zero, to
/// which `start` is added last, lose units of products alone but for that addition.
__device__ __forceinline__ float error_bound(float squares, int64_t d, const Bounds& bounds, bool from_zero = false) {
    const float steps = LOSS * ((d + 15) / 16), tiny = 1e-37f * d * fmaxf(bounds.scale, 1.0f);
    const float x = row_norm_above(squares, d);
    const float top = x * bounds.moved + bounds.start + bounds.shift(d);
    if (!(top < 1e37f && x < 1e18f)) return INFINITY;
    const float definition = (d + 16) * 0x1p-50f * (x + bounds.stored) * (x + bounds.stored);
    const float lost = from_zero ? steps * x * bounds.moved + 4 * top : (steps + 4) * top;
    return 2.001f * (0x1p-23f * lost + x * bounds.residual + definition + tiny);
}

/// A row beyond R is not covered by the bounds as they are; then `error` becomes what holds for the
/// scores of centroids in reach. Where it holds, `error` becomes that of a row which the centroid with `own` wins.
__device__ __forceinline__ bool beyond(float& error, float own, float squares, int64_t d, const Bounds& bounds) {
    const float x = row_norm_above(squares, d);
    const bool is = !(x * bounds.inverse <= 1);
    error += own + (is ? 2.001f * x * bounds.rounded : 0);
    return is;
}
__device__ __forceinline__ bool beyond(float& error, const float* own, float squares, int64_t d, const Bounds& bounds) {
    return bounds.inverse > 0 && beyond(error, own ? __ldg(own) : 0, squares, d, bounds);
}

/// The label of a row is 0 where all its distances are +inf: those of a row with a NaN, whose squares have one
/// too, and those to centroids that are all at distance +inf.
__device__ __forceinline__ bool nowhere(float top, float squares, const Bounds& bounds) {
    return squares != squares || (top == -INFINITY && bounds.scale == 0);
}

/// A row has the label of that column until it is rechecked, or else 0: a tie of scores may name one that is not there.
__device__ __forceinline__ bool has_label(float top, int column, int64_t k) { return top > -INFINITY && column < k; }
__device__ __forceinline__ int label_of(float top, int column, int64_t k) {
    return has_label(top, column, k) ? column : 0;
}

// ---- The accumulators of the thread's two rows and two neighbouring columns, `acc[0..4]`: row by row.

/// Lets scores start from what their columns start from.
__device__ __forceinline__ void start_scores(float* acc, float2 start) {
    acc[0] = acc[2] = start.x, acc[1] = acc[3] = start.y;
}
/// Scales products, which started from zero, and adds what their columns start from.
__device__ __forceinline__ void scale_scores(float* acc, float2 start, float2 scale) {
    acc[0] = fmaf(acc[0], scale.x, start.x), acc[1] = fmaf(acc[1], scale.y, start.y);
    acc[2] = fmaf(acc[2], scale.x, start.x), acc[3] = fmaf(acc[3], scale.y, start.y);
}

// ---- The search of the first pass.

template <int N>
__device__ __forceinline__ float largest(const float* values) {
    if constexpr (N == 1) return values[0];
    else return fmaxf(largest<N / 2>(values), largest<N / 2>(values + N / 2));
}

/// A thread knows this of a row whose scores it sees as a matrix with PLACES columns: the best, the second best of the
/// matrix's rows, and the best of each of its columns.
template <int PLACES>
struct Search {
    float top = -INFINITY, second = -INFINITY, best_of[PLACES];
    int column = 0;  // the first of the best row of places

    __device__ __forceinline__ Search() {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_of[p] = -INFINITY;
    }

    /// A row of places, or the first few of one.
    template <int COUNT>
    __device__ __forceinline__ void add(const float (&score)[COUNT], int at) {
#pragma unroll
        for (int p = 0; p < COUNT; ++p) best_of[p] = fmaxf(best_of[p], score[p]);
        const float most = largest<COUNT>(score);
        // Of scores that are all NaN nothing is kept: the smaller of `top` and a NaN has to be a NaN.
        float lower;
        asm("min.NaN.f32 %0, %1, %2;" : "=f"(lower) : "f"(top), "f"(most));
        second = fmaxf(second, lower);
        if (most > top) top = most, column = at;
    }
};

// ---- Labels by the definition.

/// Makes `candidate` the label of a row if it is better, by the definition, than the one that stands there. All
/// candidates may come at once and in any order: the best of them stays.
template <class T>
__device__ __noinline__ void improve_label(int metric, const T* x, const Rows& centroids, const T* c, int64_t b,
                                           int64_t d, uint32_t candidate_index, uint32_t* label) {
    uint32_t seen = *(volatile uint32_t*)label;
    while (seen != candidate_index) {
        const T* const both[] = {row_of(c, centroids, b, candidate_index), row_of(c, centroids, b, seen)};
        double s[2];
        distances(metric, x, both, d, s);
        if (better(candidate(s[1], seen), candidate(s[0], candidate_index)).index != candidate_index) return;
        const uint32_t now = atomicCAS(label, seen, candidate_index);
        if (now == seen) return;
        seen = now;
    }
}
