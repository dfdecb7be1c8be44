// The kernels that decide what a first pass has listed: recheck.cuh.
#include "assign/recheck.cuh"

template <class T>
__device__ __forceinline__ void recheck_halves(const T* x, const Rows& r, const Active& active, const T* centroids,
                                               const Rows& cr, const T* moved, const float* start, const float* scale,
                                               const float* own, const Bounds* bounds, int64_t k, int64_t pitch,
                                               int64_t padded, int64_t copies, int metric, uint32_t* labels,
                                               const UnprovenRow* list, const uint32_t* listed) {
    extern __shared__ __align__(128) uint8_t raw[];
    const auto prepared = [&](int64_t at) {
        return ScoredCentroids<T>(moved, start, scale, own, bounds, k, pitch, padded, copies, at);
    };
    recheck<false>(raw, x, r, active, Originals<T>{x, centroids, r, cr, 0}, prepared, nullptr, {}, metric, labels, list,
                   listed);
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, RECHECK_RESIDENT) recheck_tensor_##name(                       \
        const T* x, Rows r, Active active, const T* centroids, Rows cr, const T* moved, const float* start,            \
        const float* scale, const float* own, const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded,          \
        int64_t copies, int metric, uint32_t* labels, const UnprovenRow* list, const uint32_t* listed) {               \
        recheck_halves(x, r, active, centroids, cr, moved, start, scale, own, bounds, k, pitch, padded, copies,        \
                       metric, labels, list, listed);                                                                  \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE

/// `halves` holds the rows of `x` that are rechecked, (b, n, pitch), each h and then l as in `moved`, by problems'
/// places in the list like all scratch. The bounds by which they were listed lie `first_copies` before `bounds`.
/// `pitch` is that of both, twice that of one half.
extern "C" __global__ void __launch_bounds__(BLOCK, RECHECK_RESIDENT)
    recheck_split_f32(const __half* halves, const float* x, Rows r, Active active, const float* centroids, Rows cr,
                      const __half* moved, const float* start, const Bounds* bounds, int64_t k, int64_t pitch,
                      int64_t padded, int64_t copies, int metric, uint32_t* labels, const UnprovenRow* list,
                      const uint32_t* listed, const float* row_error, const float* first_row_error,
                      int64_t first_copies) {
    extern __shared__ __align__(128) uint8_t raw[];
    const auto prepared = [&](int64_t at) {
        return ScoredCentroids<__half>(moved, start, nullptr, nullptr, bounds, k, pitch, padded, copies, at);
    };
    recheck<true>(raw, halves, Rows{r.n * pitch, pitch, r.b, r.n, r.d}, active,
                  Originals<float>{x, centroids, r, cr, 0}, prepared, row_error, {first_row_error, first_copies},
                  metric, labels, list, listed);
}
