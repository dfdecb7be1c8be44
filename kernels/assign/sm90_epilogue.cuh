// The warps that finish rows which have been searched: the epilogue of assign_sm90.cu and assign_wide_sm90.cu. A row
// takes one lane.
#pragma once
#include "assign/sm90.cuh"

/// Rows and centroids have the numbers of their places.
struct OwnNumbers {
    __device__ __forceinline__ int64_t row(int64_t place) const { return place; }
    __device__ __forceinline__ uint32_t centroid(uint32_t place) const { return place; }
};

/// `work` walks the rows of the block; a row's error bound is that of so many `columns`.
template <class S, class Walk, class Numbers = OwnNumbers>
__device__ void epilogue(const Shared<S>& s, Walk work, const Active& active, const float* own, const Bounds* bounds,
                         int64_t padded, int64_t copies, int64_t k, int64_t n, int64_t columns, const float* row_error,
                         uint32_t* labels, UnprovenRow* list, uint32_t* listed, const Numbers& numbers = {}) {
    const int band = (threadIdx.x / 32 - EPILOGUE) * 32 + threadIdx.x % 32;  // the lane's row of a slot
    static_assert(EPILOGUE_WARPS * 32 == SLOT, "a lane to a row");
    for (int parity = 0; work.more(); work.next(), parity ^= 1) {
        const int64_t at = work.at, b = active.problem(at);
        // Read again for each row: there are few registers here.
        const Bounds& row_bounds = bounds[work.copy(copies)];
#pragma unroll 1
        for (int group = 0; group < S::GROUPS; ++group) {
            const uint32_t from = s.found + (group * SLOT + band) * S::RESULT_BYTES;
            mbarrier_wait(s.found_full(group), parity);
            const float4 f = load_floats4(from);
            float top = f.x, second = f.y;
            int place = 0, level = 0;
#pragma unroll
            for (int p = 0; p < S::PLACES; p += 4) {
                const float4 v = load_floats4(from + sizeof(RowResult) + 4 * p);
                const float best_of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (best_of[i] == top) place = p + i, ++level;
                    else second = fmaxf(second, best_of[i]);
                }
            }
            fence_proxy_async();
            __syncwarp();
            if (threadIdx.x % 32 == 0) mbarrier_arrive(s.found_empty(group));
            const int64_t place_of_row = work.row(group * SLOT + band, n);
            if (place_of_row < 0) continue;
            const int64_t row = numbers.row(place_of_row);
            // The thread's columns are pairs, eight apart. A tie may name a column that is not there.
            const int column = __float_as_int(f.z) + 8 * (place / 2) + place % 2;
            const uint32_t label = has_label(top, column, k) ? numbers.centroid(column) : 0;
            labels[b * n + row] = label;
            float error =
                error_bound(f.w, columns, row_bounds, S::FROM_ZERO) + (row_error ? __ldg(&row_error[at * n + row]) : 0);
            const float ahead = level == 1 ? top - second : 0;
            if (ahead > error && row_bounds.inverse == 0) continue;
            const float* widened = own ? own + work.copy(copies) * padded + label : nullptr;
            const bool far = beyond(error, widened, f.w, columns, row_bounds);
            if ((ahead > error && !far) || nowhere(top, f.w, row_bounds)) continue;
            list[at * n + atomicAdd(&listed[at], 1)] = {uint32_t(row), top - error};
        }
    }
}
