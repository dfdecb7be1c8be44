// An update marks and moves the clusters that it is given, and decides which problems go on.
#pragma once
#include "exact/sums.cuh"

template <class T>
__device__ __forceinline__ void Clusters<T>::moved(int64_t b, double squared) const {
    if (shift) atomic_max(&shift[b], squared == squared ? squared : INFINITY);
}

/// Leaves a cluster to `update_exact`.
template <class T>
__device__ __forceinline__ void Clusters<T>::mark_odd(int64_t b, int64_t cluster) const {
    if (atomicExch(&odd[b * k + cluster], 1)) return;
    atomicAdd(&odd_of[b], 1);
    odd_list[atomicAdd(odd_count, 1)] = b * k + cluster;
}

/// Decides once all clusters have moved, and clears their shift.
__device__ __forceinline__ void Verdict::decide_convergence(int64_t b, double* shift) const {
    if (threshold) {
        if (__ldcg(&shift[b]) <= threshold[b]) stop[b] = iteration;
        else list[atomicAdd(count, 1)] = b;
    }
    shift[b] = 0;
}
