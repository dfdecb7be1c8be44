// A table of the hashes of a problem's centroids. A centroid that repeats an earlier one bit for bit can never be a
// label; without this, every row near a duplicate would be unproven.
#pragma once
#include "exact/common.cuh"

/// For each problem, `slots` hashes and the first centroid of each. All zero at first.
struct Table {
    unsigned long long* keys;
    uint32_t* first;  // ~j, for the lowest j
    int64_t slots;    // a power of two

    /// Enters centroid `j` of problem `b`, whose slot it returns. The hash is a sum over the words of the centroid,
    /// each mixed with its place.
    __device__ __forceinline__ uint32_t enter(int64_t b, int64_t j, unsigned long long hash) const {
        hash |= 1;
        int64_t at = int64_t(hash >> 1) & (slots - 1);
        for (;; at = (at + 1) & (slots - 1)) {
            const unsigned long long there = atomicCAS(&keys[b * slots + at], 0ull, hash);
            if (there == 0 || there == hash) break;
        }
        atomicMax(&first[b * slots + at], ~uint32_t(j));
        return at;
    }
};

/// Whether two rows are the same, bit for bit. (Values of zeros of either sign are different words and differ; they are
/// as rare as any other tie.)
template <class T>
__device__ __forceinline__ bool same_row(const T* one, const T* two, int64_t d) {
    using Word = typename std::conditional<sizeof(T) == 2, uint16_t, uint32_t>::type;
    const Word *words = reinterpret_cast<const Word*>(one), *other_words = reinterpret_cast<const Word*>(two);
    int64_t q = 0;
#pragma unroll 8
    for (; q < d; ++q) {
        if (words[q] != other_words[q]) break;
    }
    return q == d;
}

/// Settles what the scores of place `j` of problem `p` start from: `shift` more than before, and -inf for a centroid
/// that repeats an earlier one, which so cannot win. In a first pass no centroid out of reach wins either, whose scores
/// are NaN for the recheck. `b` is the problem's place.
template <class T>
__device__ __forceinline__ void settle_start(const T* c, const Rows& r, int64_t p, int64_t b, int64_t j, int64_t padded,
                                             const Table& table, const uint32_t* slot, float shift, float* start,
                                             float* search_start) {
    float from = start[b * padded + j] + shift;
    if (j < r.n) {
        const int64_t first = uint32_t(~__ldcg(&table.first[b * table.slots + slot[b * r.n + j]]));
        if (first < j && same_row(row_of(c, r, p, j), row_of(c, r, p, first), r.d)) from = -INFINITY;
    }
    start[b * padded + j] = from, search_start[b * padded + j] = from == from ? from : -INFINITY;
}

/// A thread to each place.
template <class T>
__device__ void settle_starts(const T* c, const Rows& r, const Active& active, int64_t padded, const Table& table,
                              const uint32_t* slot, const Bounds* bounds, float* start, float* search_start) {
    const int64_t all = active.problems(r.b) * padded;
    for (int64_t i = global_thread(); i < all; i += all_threads()) {
        const int64_t b = i / padded;
        settle_start(c, r, active.problem(b), b, i % padded, padded, table, slot, bounds[b].shift(r.d), start,
                     search_start);
    }
}
