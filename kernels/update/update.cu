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
#include "update/pieces.cuh"

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

#define UPDATE(name, T, EACH, FACTOR)                                                                                  \
    extern "C" __global__ void __launch_bounds__(SUM_THREADS, (BLOCKS<T, EACH, FACTOR>))                               \
        name(const T* x, Rows r, const double* factor, const double* max_abs, const double* max_weight,                \
             const uint32_t* first_nonfinite, const uint32_t* labels, const uint32_t* order, const uint32_t* offsets,  \
             Pieces pieces, Clusters<T> to, Active active, Verdict verdict) {                                          \
        update<T, EACH, FACTOR, false>(x, r, factor, max_abs, max_weight, first_nonfinite, labels, order, offsets,     \
                                       pieces, to, active, verdict);                                                   \
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
