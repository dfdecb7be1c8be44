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
// warpgroup products have m = 16 and j = 2 (probed: benches/record/assign-versions.md): 5.25 u for 16 columns, taken as 6. For
// mma.sync we assume no more than m = 8 and j = 1, as on Ampere: 11 u, taken as 12. A chain of FMAs, which scores one
// column again, loses less. The moved centroid, if it had to be rounded, adds |x| max|residual|, and `start` and
// `scale` half an ulp each. The f64 definition is within the rounding of argmin.cuh.
#pragma once
#include "argmin.cuh"

/// Bounds over the centroids of a problem, from `prepare_moved` in norms.cu. +inf where nothing can be proven.
struct Bounds {
    float moved;     // of |e| (cosine: of |c| / |c|)
    float start;     // of |start|
    float residual;  // of the norm of what rounding took from e
    float stored;    // of |c| (cosine: 1)
    float scale;     // of `scale`
};

/// A bound is at least the value, and +inf if that is not a number.
__device__ __forceinline__ void raise(float* bound, double v) {
    const float above = v >= 0 ? __double2float_ru(v * (1 + 0x1p-20)) : INFINITY;
    // Most find it high enough already: the few that do not would otherwise wait for all the others.
    if (above > *const_cast<volatile float*>(bound)) atomicMax(reinterpret_cast<int*>(bound), __float_as_int(above));
}

/// The centroids of one problem as tensor-core kernels score them.
template <class T>
struct Moved {
    const T* moved;      // (k, pitch): e, zero in the columns past d; pitch is a multiple of 8
    const float* start;  // (padded): what an accumulator starts from; -inf past k and for duplicates
    const float* scale;  // (padded), or null for ones; then score = scale * (x.moved) + start
    const Bounds* bounds;
    int64_t k, pitch;

    /// Problem `b` of arrays that hold one copy for all problems or one for each.
    __device__ __forceinline__ Moved(const T* moved, const float* start, const float* scale, const Bounds* bounds,
                                     int64_t k, int64_t pitch, int64_t padded, int64_t copies, int64_t b)
        : moved(moved),
          start(start),
          scale(scale),
          bounds(bounds),
          k(k),
          pitch(pitch) {
        if (copies > 1) {
            this->moved += b * k * pitch, this->start += b * padded, this->bounds += b;
            if (scale) this->scale += b * padded;
        }
    }
};

/// Two halves in f32.
__device__ __forceinline__ float2 wide_pair(uint32_t v, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
__device__ __forceinline__ float2 wide_pair(uint32_t v, __nv_bfloat16) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000)};
}

/// Units of the last place that 16 columns may lose.
constexpr int WGMMA_LOSS = 6, MMA_LOSS = 12;

/// How far two scores of a row must differ to order its distances: twice the error of one. `squares` is the row's sum
/// of squares, added up in f32 in any order.
__device__ __forceinline__ float margin(float squares, int64_t d, const Bounds& bounds, int loss = MMA_LOSS) {
    const float ulps = loss * ((d + 15) / 16) + 4, tiny = 1e-37f * d * fmaxf(bounds.scale, 1.0f);
    const float x = sqrtf(squares + 1e-37f * d) * (1 + (d + 16) * 0x1p-23f);
    const float top = x * bounds.moved + bounds.start;
    if (!(top < 1e37f && x < 1e18f)) return INFINITY;
    const float definition = (d + 16) * 0x1p-50f * (x + bounds.stored) * (x + bounds.stored);
    return 2.001f * (ulps * 0x1p-23f * top + x * bounds.residual + definition + tiny);
}

/// A row whose label is not proven, and its best score. (Its label may be another column's, if two are level.)
struct Listed {
    uint32_t row;
    float top;
};

/// Makes `candidate` the label of a row if it is better, by the definition, than the one that stands there. All
/// candidates may come at once and in any order: the best of them stays.
template <class T>
__device__ __noinline__ void settle(int metric, const T* x, const Rows& centroids, const T* c, int64_t b, int64_t d,
                                    uint32_t candidate_index, uint32_t* label) {
    uint32_t seen = *(volatile uint32_t*)label;
    if (seen == candidate_index) return;
    const Best mine = candidate(distance(metric, x, row_of(c, centroids, b, candidate_index), d), candidate_index);
    while (seen != candidate_index) {
        const Best theirs = candidate(distance(metric, x, row_of(c, centroids, b, seen), d), seen);
        if (better(theirs, mine).index != candidate_index) return;
        const uint32_t now = atomicCAS(label, seen, candidate_index);
        if (now == seen) return;
        seen = now;
    }
}
