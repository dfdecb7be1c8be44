// Rows of k-means++ that meet seeds, by a warp.
#pragma once
#include "exact/argmin.cuh"
#include "exact/spread.cuh"

/// Of the rows that become seeds so many meet rows at once, and so many rows: a pair to each lane of a warp.
constexpr int TRIED = 8, TOGETHER = WARP / TRIED;

/// The distance of row `row_at(lane / TRIED)` to seed `first + lane % TRIED`, by a warp: no farther than `near`, and -1
/// of the row itself. Where the row does not count, and where there is no seed, it is `near`.
template <class T, class RowAt>
__device__ double met(const T* x, const Rows& r, int64_t b, const RowAt& row_at, double near, bool counts,
                      const double* norms, const uint32_t* seeds, int64_t first, int64_t count, int by) {
    using F = Filter<T>;
    const int lane = threadIdx.x % WARP;
    F sum = 0;
    if (__any_sync(~0u, counts)) {
        const T *own[TOGETHER], *c[TRIED];
        F of_own[TOGETHER], of_c[TRIED];
        // A row that does not count may have no norm to divide by: what comes of it is not used.
#pragma unroll
        for (int q = 0; q < TOGETHER; ++q) {
            const int64_t row = row_at(q);
            own[q] = row_of(x, r, b, row), of_own[q] = norms ? reciprocal<F>(norms[b * r.n + row]) : F(1);
        }
#pragma unroll
        for (int e = 0; e < TRIED; ++e) {
            const bool drawn = first + e < count && seeds[first + e] != UINT32_MAX;
            const int64_t seed = drawn ? seeds[first + e] : row_at(0);
            c[e] = row_of(x, r, b, seed), of_c[e] = norms ? reciprocal<F>(norms[b * r.n + seed]) : F(1);
        }
        sum = spread_sum(by, own, c, r.d, norms != nullptr, of_own, of_c);
    }
    const int64_t t = first + lane % TRIED, row = row_at(lane / TRIED);
    const uint32_t seed = t < count ? seeds[t] : UINT32_MAX;
    if (seed == row) return -1;
    if (!counts || seed == UINT32_MAX) return near;
    return fmin(near, spread_distance(by, double(sum), row_of(x, r, b, row), row_of(x, r, b, seed), r.d));
}
