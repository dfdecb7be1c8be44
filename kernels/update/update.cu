// Sort-Inverse Update (Yang et al. 2026, Flash-KMeans): rows are visited in cluster order, summed on chip, and the mean
// of a cluster is written where its last row is added.
//
// A sum is a 128-bit integer (src/fixed.rs), so it may be cut anywhere and added up in any order. A warp takes a piece
// of the sorted places, cluster by cluster. Its lanes share a row, 16 bytes each, and add into f64 "limbs": whole
// numbers of a unit, few enough bits of each term that 2^10 of them add up exactly. What a term has below the last
// limb, which is rare, is an integer of its own. A cluster inside one piece is finished on chip. One that crosses
// pieces is added up in its slot in memory, and whoever adds last finishes it and leaves zeros behind. Traffic: X and
// the order once, the centroids twice, and 16 bytes a column for each piece of a crossing cluster.
//
// A cluster with a term that is no such integer, or with a row that is not finite, is left to `update_exact`, which
// adds up its rows once more, whatever they are.
//
// Where rows come in blocks, or ranks share them, they are only added to slots (`Clusters::planes` is not 0). Slots
// then have more planes for what terms have below the scale, as a Kulisch accumulator has digits, so no cluster is left
// to `update_exact`; `finish` makes means of them and decides convergence (finish.cuh).
//
// Medians (Manhattan) need no sums: a median is found bit by bit, by counting.
#include "update/exact.cuh"
#include "update/finish.cuh"
#include "update/medians.cuh"
#include "update/warp.cuh"

/// Each warp adds up a piece of the sorted places. The last one of a problem decides whether that has converged, unless
/// clusters are left to `update_exact`, which decides then.
template <class T, int EACH, bool FACTOR>
__device__ void update(const T* x, const Rows& r, const double* factor, const double* max_abs, const double* max_weight,
                       const uint32_t* first_nonfinite, const uint32_t* labels, const uint32_t* order,
                       const uint32_t* offsets, const Pieces& pieces, const Clusters<T>& to, const Active& active,
                       const Verdict& verdict) {
    using Worker = PieceWarp<T, EACH, FACTOR>;
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
            Worker warp = {shared,
                           r,
                           to,
                           b,
                           x + b * r.batch_stride,
                           factor ? factor + b * r.n : nullptr,
                           order ? order + b * r.n + begin : nullptr,
                           begin,
                           Units<T>(max_abs[b], max_weight ? max_weight[b] : 1, to.rows,
                                    first_nonfinite[b] != UINT32_MAX),
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

// ---- What is left to do after medians.

/// Notes how far the medians of each problem are from the centroids before them. One warp a centroid.
template <class T>
__device__ void shift(const T* old, int64_t b, const Clusters<T>& to, const Active& active) {
    const int64_t all = active.problems(b) * to.k;
    for (int64_t at = global_thread() / WARP; at < all; at += all_threads() / WARP) {
        const int64_t p = active.problem(at / to.k), i = p * to.k + at % to.k;
        double moved = 0;
        for (int64_t c = threadIdx.x % WARP; c < to.d; c += WARP) {
            moved = __dadd_rn(moved, squared(wide(to.centroids[i * to.d + c]), wide(old[i * to.d + c])));
        }
        moved = striped(moved);
        if (threadIdx.x % WARP == 0) to.moved(p, moved);
    }
}

/// One thread a problem.
__device__ void decide_convergence(int64_t b, double* shift, const Active& active, const Verdict& verdict) {
    const int64_t all = active.problems(b);
    for (int64_t i = global_thread(); i < all; i += all_threads()) verdict.decide_convergence(active.problem(i), shift);
}

/// Blocks that a multiprocessor should hold.
template <class T, int EACH, bool FACTOR>
constexpr int BLOCKS = FACTOR                                          ? SUM_BLOCKS_WEIGHTED
                       : PieceWarp<T, EACH, FACTOR>::EXACT && EACH > 1 ? SUM_BLOCKS
                                                                       : SUM_BLOCKS_LIMBS;

#define UPDATE(name, T, EACH, FACTOR)                                                                                  \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, (BLOCKS<T, EACH, FACTOR>))                               \
        name(const T* x, Rows r, const double* factor, const double* max_abs, const double* max_weight,                \
             const uint32_t* first_nonfinite, const uint32_t* labels, const uint32_t* order, const uint32_t* offsets,  \
             Pieces pieces, Clusters<T> to, Active active, Verdict verdict) {                                          \
        update<T, EACH, FACTOR>(x, r, factor, max_abs, max_weight, first_nonfinite, labels, order, offsets, pieces,    \
                                to, active, verdict);                                                                  \
    }
#define INSTANCE(name, T)                                                                                              \
    UPDATE(update_##name, T, 16 / sizeof(T), false)                                                                    \
    UPDATE(update_weighted_##name, T, (sizeof(T) > 4 ? 2 : 4), true)                                                   \
    UPDATE(update_narrow_##name, T, 1, false)                                                                          \
    UPDATE(update_narrow_weighted_##name, T, 1, true)                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) medians_##name(                                           \
        const T* x, Rows r, const double* weights, const double* max_weight, const uint32_t* first_nonfinite,          \
        const uint32_t* order, const uint32_t* offsets, int64_t k, Active active, T* out) {                            \
        medians(x, r, weights, max_weight, first_nonfinite, order, offsets, k, active, out);                           \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(LEFT_THREADS)                                                         \
        update_exact_##name(const T* x, Rows r, const double* factor, const uint32_t* first_nonfinite,                 \
                            const uint32_t* order, const uint32_t* offsets, Clusters<T> to, Verdict verdict) {         \
        update_exact(x, r, factor, first_nonfinite, order, offsets, to, verdict);                                      \
    }                                                                                                                  \
    extern "C" __global__ void finish_##name(Clusters<T> to, const double* max_abs, const double* max_weight,          \
                                             Active active, Verdict verdict) {                                         \
        finish(to, max_abs, max_weight, active, verdict);                                                              \
    }                                                                                                                  \
    extern "C" __global__ void shift_##name(const T* old, int64_t b, Clusters<T> to, Active active) {                  \
        shift(old, b, to, active);                                                                                     \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
#undef UPDATE

extern "C" __global__ void settle_shifts(int64_t b, double* shift, Active active, Verdict verdict) {
    decide_convergence(b, shift, active, verdict);
}
extern "C" __global__ void merge_sums(int64_t count, unsigned long long* sums, const unsigned long long* others) {
    merge_sums_of(count, sums, others);
}
extern "C" __global__ void limbs_of_sums(int64_t count, const unsigned long long* sums, long long* limbs) {
    limbs_of(count, sums, limbs);
}
extern "C" __global__ void sums_of_limbs(int64_t count, const long long* limbs, unsigned long long* sums) {
    sums_of(count, limbs, sums);
}
