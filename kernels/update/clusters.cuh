// What the kernels of an update are given: the clusters, who goes on, and how the sorted places are cut.
#pragma once
#include "exact/sums.cuh"

/// The centroids of a fit, and where they are added up.
template <class T>
struct Clusters {
    T* centroids;               // (b, k, d), in place
    unsigned long long* slots;  // (b, k, d + 1, 2): sums, and the weight; zeros but for clusters under way
    uint32_t* added;            // (b, k): pieces in a slot, likewise
    uint32_t* finished;         // (b,): pieces that are done, likewise
    uint32_t* odd;              // (b, k): whether a cluster is left to `update_exact`, likewise
    uint32_t* odd_of;           // (b,): how many of a problem are, likewise
    uint32_t* odd_count;        // (2): how many are in all, and how many of them are done, likewise
    uint64_t* odd_list;         // (b k): which ones
    double* shift;              // (b,): the largest squared shift of the iteration, likewise; null if not wanted
    int64_t k, d;
    int64_t rows;  // that sums have room for
    int divisor;
    int planes;  // that slots are kept on if rows are only added to them (`Grid` in src/fixed.rs); otherwise 0
    int64_t b;

    __device__ __forceinline__ T* row(int64_t b, int64_t cluster) const { return centroids + (b * k + cluster) * d; }
    __device__ __forceinline__ unsigned long long* slot(int64_t b, int64_t cluster) const {
        return slots + (b * k + cluster) * (d + 1) * 2;
    }
    /// Adds what `v`, of a column or (column `d`) of a weight, has below the scale to the other planes of its slot, rounded
    /// down to the unit of the last one. Returns the rest as an integer of the scale.
    __device__ __forceinline__ __int128 split(int64_t b, int64_t cluster, int64_t column, double v, int scale) const {
        const uint64_t bits = __double_as_longlong(v), fraction = bits & ((1ull << 52) - 1);
        const int biased = int(bits >> 52) & 0x7ff;
        const bool negative = bits >> 63;
        uint64_t mantissa = biased == 0x7ff ? 0 : biased ? fraction | 1ull << 52 : fraction;
        int shift = (biased ? biased - 1075 : -1074) + scale;
        __int128 first = 0;
        unsigned long long* at = slot(b, cluster) + 2 * column;
#pragma unroll 1
        for (int plane = 0; plane < planes && mantissa; ++plane, shift += PLANE_BITS) {
            __int128 units = 0;
            if (shift >= 0) units = __int128(mantissa) << shift, mantissa = 0;
            else if (shift > -PLANE_BITS) units = mantissa >> -shift, mantissa &= (1ull << -shift) - 1;
            if (plane + 1 == planes && negative && mantissa) ++units;
            if (negative) units = -units;
            if (plane == 0) first = units;
            else if (units) atomic_add(at, units);
            at += this->b * k * (d + 1) * 2;
        }
        return first;
    }
    __device__ __forceinline__ void moved(int64_t b, double squared) const {
        if (shift) atomic_max(&shift[b], squared == squared ? squared : INFINITY);
    }

    /// Leaves a cluster to `update_exact`.
    __device__ __forceinline__ void mark_odd(int64_t b, int64_t cluster) const {
        if (atomicExch(&odd[b * k + cluster], 1)) return;
        atomicAdd(&odd_of[b], 1);
        odd_list[atomicAdd(odd_count, 1)] = b * k + cluster;
    }
    __device__ __forceinline__ bool is_odd(int64_t b, int64_t cluster) const { return __ldcg(&odd[b * k + cluster]); }
};

/// Which problems go on. There is no next iteration if there is no threshold.
struct Verdict {
    const double* threshold;  // (b,): the squared shift at which a problem has converged
    uint32_t* stop;           // (b,): where it has, the iteration in which it did
    uint32_t *list, *count;   // `Active` of the next iteration
    int64_t iteration;

    /// Decides once all clusters have moved, and clears their shift.
    __device__ __forceinline__ void decide_convergence(int64_t b, double* shift) const {
        if (threshold) {
            if (__ldcg(&shift[b]) <= threshold[b]) stop[b] = iteration;
            else list[atomicAdd(count, 1)] = b;
        }
        shift[b] = 0;
    }
};

/// How the sorted places are cut: after every `rows`, but for clusters of at most `whole` rows, which belong to the
/// piece that they begin in.
struct Pieces {
    uint32_t rows, whole;

    /// How many a cluster has a part of, if it is no such cluster.
    __device__ __forceinline__ uint32_t count(uint32_t top, uint32_t bottom) const {
        return (bottom - 1) / rows - top / rows + 1;
    }
};
