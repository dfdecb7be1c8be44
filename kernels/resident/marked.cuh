// Sums that no integer of the scale holds. Not inlined, so that they take no registers from where they are not needed.
#pragma once
#include "resident/team.cuh"

/// Adds up the marked ones of `owned` clusters, from `first` on every so many, once more: a column to a warp, from
/// where all blocks read their rows. Significands go to `totals`, the weight where it was.
template <class T, bool FACTOR>
__device__ __noinline__ void add_exactly(const T* x, int64_t row_stride, int64_t n, int d, const double* factor,
                                         bool dirty, const uint32_t* labels, int owned, int first, int step,
                                         uint32_t* sizes, unsigned long long* weights, double* totals,
                                         int16_t* exponents) {
    const int lane = threadIdx.x % WARP;
    for (int item = threadIdx.x / WARP; item < owned * (d + 1); item += WARPS) {
        const int i = item / (d + 1), q = item % (d + 1), j = first + i * step;
        if (!(__ldcg(sizes + j) & ODD)) continue;
        Gathered sum;
#pragma unroll 1
        for (int64_t next = 0; next < n; next += WARP) {
            const int64_t row = next + lane;
            double term = 0;
            if (row < n && __ldcg(labels + row) == uint32_t(j)) {
                const T* const values = x + row * row_stride;
                const double f = FACTOR ? factor[row] : 1;
                if (!dirty || finite(values, d)) term = q < d ? __dmul_rn(wide(values[q]), f) : f;
            }
            sum.add(term);
        }
        const Scaled rounded = sum.all().rounded();
        if (lane) continue;
        if (q < d) totals[i * d + q] = rounded.significand, exponents[i * d + q] = rounded.exponent;
        else if (FACTOR) *reinterpret_cast<Scaled*>(weights + 2 * j) = rounded;
        else sizes[j] = ODD | uint32_t(rounded.value(0));
    }
}

/// Replaces sums, significands and exponents, by what they are divided by, a warp's. Returns whether there is anything
/// to divide by.
__device__ __noinline__ bool divide(int divisor, Scaled weight, int d, double* totals, const int16_t* exponents) {
    const int lane = threadIdx.x % WARP;
    const auto total = [&](int q) { return Scaled{totals[q], exponents[q]}; };
    const Quotient by(
        divisor, weight,
        [&](int64_t shift) {
            double squares = 0;
            for (int q = lane; q < d; q += WARP) {
                const double t = total(q).value(shift);
                squares = __dadd_rn(squares, __dmul_rn(t, t));
            }
            return striped(squares);
        },
        [&] {
            int most = INT32_MIN;
            for (int q = lane; q < d; q += WARP) {
                if (totals[q] != 0) most = max(most, int(exponents[q]));
            }
            most = __reduce_max_sync(~0u, most);
            return int64_t(most == INT32_MIN ? 0 : most);
        });
    if (by.some()) {
        for (int q = lane; q < d; q += WARP) totals[q] = by.divide(total(q));
    }
    __syncwarp();
    return by.some();
}
