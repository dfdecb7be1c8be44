// Rows in cluster order, dealt to warps in pieces (update.cu).
#pragma once
#include "update/warp.cuh"

/// Each warp adds up a piece of the sorted places; to KEEP sums leaves them in their slots. The last one of a problem
/// decides whether that has converged, unless clusters are left to `update_exact`, which decides then.
template <class T, int EACH, bool FACTOR, bool KEEP>
__device__ void update(const T* x, const Rows& r, const double* factor, const double* max_abs, const double* max_weight,
                       const uint32_t* first_nonfinite, const uint32_t* labels, const uint32_t* order,
                       const uint32_t* offsets, const Pieces& pieces, const Clusters<T>& to, const Active& active,
                       const Verdict& verdict) {
    using Worker = PieceWarp<T, EACH, FACTOR, KEEP ? KEPT : PASSING>;
    __shared__ typename Worker::Shared of_warps[SUM_THREADS / WARP];
    typename Worker::Shared& shared = of_warps[threadIdx.x / WARP];
    const uint32_t lane = threadIdx.x % WARP;
    if (lane == 0) shared.odd = 0;
    if (!Worker::EXACT) {
        for (uint32_t at = lane; at < Worker::COLUMNS; at += WARP) shared.remainder[at] = 0;
    }
    __syncwarp();
    uint32_t lanes = 1;
    while (lanes < WARP && lanes * EACH < r.d) lanes *= 2;
    const int64_t each = (r.n + pieces.rows - 1) / pieces.rows;
    const int64_t items = active.problems(r.b) * each;
    for (int64_t item = global_thread() / WARP; item < items; item += all_threads() / WARP) {
        const uint32_t b = active.problem(item / each);
        uint32_t begin = item % each * pieces.rows, end = min(int64_t(begin) + pieces.rows, r.n);
        const uint32_t* const bounds = offsets + b * (to.k + 1);
        uint32_t cluster = 0;
        if (order) {
            // A cluster that the piece before sums as a whole is none of this one's, and one that this one sums may
            // reach beyond it.
            const uint32_t* const places = order + b * r.n;
            const uint32_t other = min(labels[b * r.n + places[end - 1]], uint32_t(to.k - 1));
            cluster = min(labels[b * r.n + places[begin]], uint32_t(to.k - 1));
            const uint32_t top = bounds[cluster], bottom = bounds[cluster + 1], last = bounds[other + 1];
            if (top < begin && bottom - top <= pieces.whole) begin = bottom, ++cluster;
            if (last - bounds[other] <= pieces.whole) end = last;
        }
        if (begin < end) {
            Worker warp = {
                shared,
                r,
                to,
                b,
                x + b * r.batch_stride,
                factor ? factor + b * r.n : nullptr,
                order ? order + b * r.n + begin : nullptr,
                begin,
                Units<T>(max_abs[b], max_weight ? max_weight[b] : 1, to.rows, first_nonfinite[b] != UINT32_MAX),
                max_weight ? fixed_scale(max_weight[b], to.rows) : 0,
                lane,
                lanes,
                lane / lanes,
                WARP / lanes,
                end - begin,
                cluster};
            warp.run(bounds, pieces);
        }
        if (!verdict.threshold) continue;
        __threadfence();
        __syncwarp();
        if (lane == 0 && atomicAdd(&to.finished[b], 1) + 1 == each) {
            __threadfence();
            if (!__ldcg(&to.odd_of[b])) verdict.decide_convergence(b, to.shift);
            to.finished[b] = 0;
        }
    }
}

/// Blocks that a multiprocessor should hold.
template <class T, int EACH, bool FACTOR>
constexpr int BLOCKS = FACTOR                                          ? SUM_BLOCKS_WEIGHTED
                       : PieceWarp<T, EACH, FACTOR>::EXACT && EACH > 1 ? SUM_BLOCKS
                                                                       : SUM_BLOCKS_LIMBS;
