// The second pass of an update adds up the clusters that the first cannot: those with a term that is no integer of
// their problem's scale, or with a row that is not finite. Their sums are Kulisch accumulators (`Exact`), which hold
// any f64.
//
// Traffic: the rows of those clusters once (in a problem with rows that are not finite, once for each LEFT_COLUMNS
// columns), and 16 bytes a column, written and read.
#pragma once
#include "update/clusters.cuh"

/// Each block takes a cluster that `update` has left, and LEFT_COLUMNS columns of it at a time; behind the last column
/// is the weight. Sums lie in the cluster's slot, and whoever adds the last ones finishes it and leaves zeros behind.
template <class T>
__device__ void update_exact(const T* x, const Rows& r, const double* factor, const uint32_t* first_nonfinite,
                             const uint32_t* order, const uint32_t* offsets, const Clusters<T>& to,
                             const Verdict& verdict) {
    __shared__ unsigned long long words[LEFT_COLUMNS][Exact::WORDS];
    __shared__ bool last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t count = *to.odd_count;
    const int64_t groups = (r.d + 1 + LEFT_COLUMNS - 1) / LEFT_COLUMNS;
    for (int64_t item = blockIdx.x; item < count * groups; item += gridDim.x) {
        const int64_t at = to.odd_list[item / groups], first = item % groups * LEFT_COLUMNS;
        const int64_t b = at / to.k, cluster = at % to.k;
        const int64_t begin = order ? offsets[b * (to.k + 1) + cluster] : 0;
        const int64_t end = order ? offsets[b * (to.k + 1) + cluster + 1] : r.n;
        const bool dirty = first_nonfinite[b] != UINT32_MAX;
        for (int i = threadIdx.x; i < LEFT_COLUMNS * Exact::WORDS; i += blockDim.x) words[0][i] = 0;
        __syncthreads();
        Gathered sums[LEFT_COLUMNS];
#pragma unroll 1
        for (int64_t next = begin + warp * WARP; next < end; next += blockDim.x) {
            const int64_t place = next + lane;
            double terms[LEFT_COLUMNS] = {};
            if (place < end) {
                const int64_t row = order ? order[b * r.n + place] : place;
                const T* const values = row_of(x, r, b, row);
                const double f = factor ? factor[b * r.n + row] : 1;
                if (!dirty || finite(values, r.d)) {
#pragma unroll
                    for (int c = 0; c < LEFT_COLUMNS; ++c) {
                        if (first + c < r.d) terms[c] = __dmul_rn(wide(values[first + c]), f);
                        if (first + c == r.d) terms[c] = f;
                    }
                }
            }
#pragma unroll
            for (int c = 0; c < LEFT_COLUMNS; ++c) sums[c].add(terms[c]);
        }
#pragma unroll
        for (int c = 0; c < LEFT_COLUMNS; ++c) {
            const Exact& sum = sums[c].all();
#pragma unroll
            for (int i = 0; i < Exact::EACH; ++i) {
                if (sum.words[i]) atomicAdd(&words[c][lane + i * WARP], (unsigned long long)sum.words[i]);
            }
        }
        __syncthreads();
        Scaled* const slot = reinterpret_cast<Scaled*>(to.slot(b, cluster));
        if (warp < LEFT_COLUMNS && first + warp <= r.d) {
            Exact sum;
#pragma unroll
            for (int i = 0; i < Exact::EACH; ++i) {
                if (lane + i * WARP < Exact::WORDS) sum.words[i] = words[warp][lane + i * WARP];
            }
            const Scaled rounded = sum.rounded();
            if (lane == 0) slot[first + warp] = rounded;
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(&to.added[at], 1) + 1 == groups;
        __syncthreads();
        if (!last || warp > 0) continue;
        __threadfence();
        const auto total = [&](int64_t c) {
            const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(slot + c));
            return reinterpret_cast<const Scaled&>(bits);
        };
        replace(to, b, cluster, r.d, lane, total(r.d), total);
        __syncwarp();
        for (int64_t c = lane; c <= r.d; c += WARP) slot[c] = {0, 0};
        if (lane == 0) {
            to.added[at] = to.odd[at] = 0;
            __threadfence();
            if (atomicSub(&to.odd_of[b], 1) == 1) {
                __threadfence();
                if (verdict.threshold) verdict.decide_convergence(b, to.shift);
            }
            if (atomicAdd(&to.odd_count[1], 1) + 1 == count) to.odd_count[0] = to.odd_count[1] = 0;
        }
    }
}
