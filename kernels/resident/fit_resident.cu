// A whole fit in one launch, for problems whose rows fit in the shared memory of the blocks that share them.
//
// The blocks of a team share a problem and keep its rows on chip for all iterations. In each, every block labels its
// rows with mma.sync, decides what that does not prove, brings its rows into cluster order and adds them up, cluster by
// cluster, to what the other blocks have of a cluster. When all have, each block finishes a share of the means and
// prepares them for the next scores. Sums are integers (src/fixed.rs), so it does not matter how rows are shared out.
// Clusters with a term that is no such integer, or with a row that is not finite, are added up once more from memory. A
// team waits for its own blocks alone, twice an iteration (the launch is cooperative, so all of them run), and once
// converged it goes on to another problem. Traffic: X once, labels once; centroids and sums stay in the L2 cache.
#include "resident/centroids.cuh"
#include "resident/labels.cuh"
#include "resident/means.cuh"

template <class T, bool FACTOR>
__device__ void fit(const T* x, const Rows& r, const Summands& summands, int metric, int divisor, int64_t max_iters,
                    const double* threshold, const Shares& shares, const Common& common, uint32_t* stop, int64_t k,
                    T* centroids, uint32_t* labels) {
    extern __shared__ __align__(128) uint8_t raw[];
    __shared__ float bounds[BOUNDS + 1];
    __shared__ uint32_t listed;
    using Problem = Fit<T, FACTOR>;
    const int d = int(r.d), rank = blockIdx.x % shares.blocks;
    const int64_t team = blockIdx.x / shares.blocks, first_row = int64_t(rank) * shares.rows;
    const OnChip<T, FACTOR> s(raw, shares, k, d);
    const Common to = common.of_team<T>(team, Problem::LIMBS, k, d);
    const int live = int(max(int64_t(0), min(int64_t(shares.rows), r.n - first_row)));
    uint32_t all = 0, turn = 0;
    for (int64_t b = team; b < r.b; b += gridDim.x / shares.blocks) {
        const bool dirty = summands.first_nonfinite[b] != UINT32_MAX;
        const Problem problem{s,
                              to,
                              shares,
                              bounds,
                              &listed,
                              r,
                              row_of(x, r, b, live ? first_row : 0),
                              FACTOR ? summands.row_scale + b * r.n + first_row : nullptr,
                              centroids + b * k * d,
                              int(k),
                              d,
                              (d + LINE_COLUMNS - 1) / LINE_COLUMNS,
                              live,
                              metric,
                              divisor,
                              rank,
                              dirty};
        const Units<T> units(summands.max_abs[b], FACTOR && summands.max_weight ? summands.max_weight[b] : 1, r.n,
                             dirty);
        const int weight_scale = FACTOR && summands.max_weight ? fixed_scale(summands.max_weight[b], r.n) : 0;
        problem.load();
        problem.origin();
        for (int j = rank + threadIdx.x / WARP * shares.blocks; j < k; j += WARPS * shares.blocks) {
            problem.publish(j, [&](int q) { return problem.c[j * d + q]; });
        }
        sync_team(to.arrived, all += shares.blocks);
        bool done = false;
        for (int64_t iteration = 0;; ++iteration, ++turn) {
            problem.prepare();
            problem.label();
            if (done && rank == 0 && threadIdx.x == 0) stop[b] = iteration;
            if (done || iteration == max_iters) break;
            problem.sort();
            uint32_t* const marked = to.sizes + k + turn % 2;
            double* const shift = to.shifts + turn % 2;
            problem.add(units, weight_scale, marked);
            sync_team(to.arrived, all += shares.blocks);
            // All have seen the last turn's.
            if (rank == 0 && threadIdx.x == 0) to.shifts[(turn + 1) % 2] = 0, to.sizes[k + (turn + 1) % 2] = 0;
            problem.replace(units, weight_scale, shift, marked);
            sync_team(to.arrived, all += shares.blocks);
            if constexpr (!Problem::EXACT) {
                if (__ldcg(marked)) {
                    replace_marked(problem, shift, labels + b * r.n, all);
                    all += 2 * shares.blocks;
                }
            }
            done = __ldcg(shift) <= threshold[b];
        }
        for (int i = threadIdx.x; i < live; i += THREADS_HERE) labels[b * r.n + first_row + i] = s.labels[i];
        // All have taken the last centroids before the next problem's are published.
        if (b + gridDim.x / shares.blocks < r.b) sync_team(to.arrived, all += shares.blocks);
    }
    // The last one to leave clears what all have waited for.
    if (threadIdx.x == 0 && atomicAdd(to.arrived, 1) + 1 == all + shares.blocks) {
        *to.arrived = 0, to.shifts[0] = to.shifts[1] = 0, to.sizes[k] = to.sizes[k + 1] = 0;
    }
}

#define KERNEL(name, T, FACTOR)                                                                                        \
    extern "C" __global__ void __launch_bounds__(TEAM_THREADS, 1) name(                                                \
        const T* x, Rows r, Summands summands, int metric, int divisor, int64_t max_iters, const double* threshold,    \
        Shares shares, Common common, uint32_t* stop, int64_t k, T* centroids, uint32_t* labels) {                     \
        fit<T, FACTOR>(x, r, summands, metric, divisor, max_iters, threshold, shares, common, stop, k, centroids,      \
                       labels);                                                                                        \
    }
KERNEL(fit_resident_f16, __half, false)
KERNEL(fit_resident_bf16, __nv_bfloat16, false)
KERNEL(fit_resident_weighted_f16, __half, true)
KERNEL(fit_resident_weighted_bf16, __nv_bfloat16, true)
#undef KERNEL
