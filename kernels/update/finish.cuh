// Sums that blocks of rows and ranks have added to become new centroids, and accumulators are merged.
//
// Traffic: the slots twice (read, then cleared), 16 bytes a column and plane, and the centroids twice.
#pragma once
#include "update/clusters.cuh"

/// Each warp replaces the centroid of a cluster, unless that has no weight, and leaves zeros in its slot. A sum is the
/// digits of all planes, rounded once (`scaled`).
template <class T>
__device__ void finish(const Clusters<T>& to, const double* max_abs, const double* max_weight, const Active& active,
                       const Verdict& verdict) {
    const int lane = threadIdx.x % WARP;
    const int64_t all = active.problems(to.problems) * to.k, plane = to.problems * to.k * (to.d + 1);
    for (int64_t item = global_thread() / WARP; item < all; item += all_threads() / WARP) {
        const int64_t b = active.problem(item / to.k), cluster = item % to.k;
        __int128* const slot = reinterpret_cast<__int128*>(to.slot(b, cluster));
        const int scale = fixed_scale(max_abs[b], to.rows);
        const auto total = [&](int64_t c) {
            return scaled(to.planes, scale, [&](int p) { return slot[p * plane + c]; });
        };
        // Numbers of rows are whole.
        const Scaled weight = scaled(max_weight ? to.planes : 1, max_weight ? fixed_scale(max_weight[b], to.rows) : 0,
                                     [&](int p) { return slot[p * plane + to.d]; });
        replace(to, b, cluster, to.d, lane, weight, total);
        __syncwarp();
        for (int p = 0; p < to.planes; ++p) {
            for (int64_t c = lane; c <= to.d; c += WARP) slot[p * plane + c] = 0;
        }
        if (!verdict.threshold) continue;
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(&to.finished[b], 1) + 1 == to.k) {
            __threadfence();
            verdict.decide_convergence(b, to.shift);
            to.finished[b] = 0;
        }
    }
}

/// Cuts sums into four limbs of 32 bits each, the last one signed, which add up without carries.
__device__ void limbs_of(int64_t count, const unsigned long long* sums, long long* limbs) {
    for (int64_t i = global_thread(); i < count; i += all_threads()) {
        for (int half = 0; half < 2; ++half) {
            const unsigned long long bits = sums[2 * i + half];
            limbs[4 * i + 2 * half] = bits & 0xffffffff;
            limbs[4 * i + 2 * half + 1] = half ? static_cast<long long>(bits) >> 32 : bits >> 32;
        }
    }
}

/// Puts sums together from limbs that have been added up.
__device__ void sums_of(int64_t count, const long long* limbs, unsigned long long* sums) {
    for (int64_t i = global_thread(); i < count; i += all_threads()) {
        __int128 sum = 0;
        for (int limb = 3; limb >= 0; --limb) sum = (sum << 32) + limbs[4 * i + limb];
        reinterpret_cast<__int128*>(sums)[i] = sum;
    }
}

/// Adds the sums of another accumulator of the same grid.
__device__ void merge_sums_of(int64_t count, unsigned long long* sums, const unsigned long long* others) {
    for (int64_t i = global_thread(); i < count; i += all_threads()) {
        reinterpret_cast<__int128*>(sums)[i] += reinterpret_cast<const __int128*>(others)[i];
    }
}
