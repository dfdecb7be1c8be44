// The methods of `Clusters` and `Verdict` (params.cuh): every kernel of an update notes with them how far centroids
// have moved, which clusters are left to `update_exact`, and which problems have converged.
#pragma once
#include "exact/sums.cuh"

/// Notes the squared shift of a centroid. A NaN, of one that is not finite, counts as infinite.
template <class T>
__device__ __forceinline__ void Clusters<T>::moved(int64_t b, double squared) const {
    if (shift) atomic_max(&shift[b], squared == squared ? squared : INFINITY);
}

/// Leaves a cluster to `update_exact`, by an entry of its list, however many warps ask for it.
template <class T>
__device__ __forceinline__ void Clusters<T>::mark_odd(int64_t b, int64_t cluster) const {
    if (atomicExch(&odd[b * k + cluster], 1)) return;
    if (kept) *odd_kept_of(b) = 1;
    atomicAdd(&odd_of[b], 1);
    odd_list[atomicAdd(odd_count, 1)] = b * k + cluster;
}

/// Decides whether a problem has converged, once all of its centroids are new, and clears their shift. One that has not
/// is put on the list of the next iteration.
__device__ __forceinline__ void Verdict::decide_convergence(int64_t b, double* shift) const {
    if (threshold) {
        if (__ldcg(&shift[b]) <= threshold[b]) stop[b] = iteration;
        else list[atomicAdd(count, 1)] = b;
    }
    shift[b] = 0;
}

/// Cuts a term `v` of a column, or a weight (column `d`), into digits of a Kulisch accumulator as `Grid::split` of
/// src/fixed.rs does: returns that of the first plane, an integer of the scale, and adds the others to their planes of
/// the slot, rounded down to the unit of the last one.
template <class T>
__device__ __forceinline__ __int128 Clusters<T>::split(int64_t b, int64_t cluster, int64_t column, double v,
                                                       int scale) const {
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
        at += problems * k * (d + 1) * 2;
    }
    return first;
}

/// Replaces the centroid of a cluster by its sums, `total(column)` of `d` columns, divided as the reduction says, and
/// notes its shift. A centroid without anything to divide by stays. By a warp.
template <class T, class Total>
__device__ __forceinline__ void replace(const Clusters<T>& to, int64_t b, int64_t cluster, const int64_t& d, int lane,
                                        const Scaled& weight, const Total& total) {
    const Quotient by(
        to.divisor, weight,
        [&](int64_t shift) {
            double squares = 0;
            for (int64_t c = lane; c < d; c += WARP) {
                const double t = total(c).value(shift);
                squares = __dadd_rn(squares, __dmul_rn(t, t));
            }
            return striped(squares);
        },
        [&] {
            int most = INT32_MIN;
            for (int64_t c = lane; c < d; c += WARP) {
                const Scaled sum = total(c);
                if (sum.significand != 0) most = max(most, int(sum.exponent));
            }
            most = __reduce_max_sync(~0u, most);
            return int64_t(most == INT32_MIN ? 0 : most);
        });
    if (by.some()) {
        double moved = 0;
        for (int64_t c = lane; c < d; c += WARP) {
            T& old = to.row(b, cluster)[c];
            const T mean = rounded<T>(by.divide(total(c)));
            moved = __dadd_rn(moved, squared(wide(mean), wide(old)));
            old = mean;
        }
        moved = striped(moved);
        if (lane == 0 && !(moved == 0)) to.moved(b, moved);
    }
}

/// Columns of a lane whose sums are divided together.
constexpr int AT_ONCE = 4;

/// The same, of sums that f64 measures, by what they are divided by: `total(column)` are f64.
template <class T, class Total>
__device__ __forceinline__ void divide(const Clusters<T>& to, int64_t b, int64_t cluster, const int64_t& d, int lane,
                                       double divisor, const Total& total) {
    if (!(divisor > 0)) return;
    T* const row = to.row(b, cluster);
    double moved = 0;
#pragma unroll 1
    for (int64_t first = lane; first < d; first += WARP * AT_ONCE) {
        T old[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) old[i] = first + i * WARP < d ? row[first + i * WARP] : T(0.0f);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const int64_t c = first + i * WARP;
            if (c >= d) break;
            const T mean = rounded<T>(__ddiv_rn(total(c), divisor));
            moved = __dadd_rn(moved, squared(wide(mean), wide(old[i])));
            row[c] = mean;
        }
    }
    moved = striped(moved);
    if (lane == 0 && !(moved == 0)) to.moved(b, moved);
}
