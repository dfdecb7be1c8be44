// The nearest centroids of each row, as many as are asked for: `src/cpu/nearest.rs` by the definition alone.
//
// A warp takes a row. Its lanes compare centroids 32 apart, each distance one sequential f64 chain, and whichever is
// before the last of a list in shared memory, ordered by distance and index, is put into that, by all lanes at once.
// Traffic: X once, the centroids once for each row, from the caches, and m numbers and indices a row.
#include "exact/argmin.cuh"

/// True if `a` is nearer than `b`, or as near and of a lower index.
__device__ __forceinline__ bool before(const Best& a, const Best& b) {
    return a.distance < b.distance || (a.distance == b.distance && a.index < b.index);
}

/// The list of a warp's row.
struct Nearby {
    double* distances;
    uint32_t* indices;

    __device__ __forceinline__ Best at(int64_t place) const { return {distances[place], indices[place]}; }

    /// Puts what comes before the last of `m` into its place, and those behind it one farther.
    __device__ __forceinline__ void insert(const Best& next, int64_t m) {
        constexpr int EACH = NEAREST / WARP;
        Best own[EACH];
        bool moves[EACH];
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int place = int(threadIdx.x % WARP) + e * WARP;
            moves[e] = place < m && before(next, at(place));
            own[e] = moves[e] && place && before(next, at(place - 1)) ? at(place - 1) : next;
        }
        __syncwarp();
#pragma unroll
        for (int e = 0; e < EACH; ++e) {
            const int place = int(threadIdx.x % WARP) + e * WARP;
            if (moves[e]) distances[place] = own[e].distance, indices[place] = own[e].index;
        }
        __syncwarp();
    }
};

template <class T>
__device__ void nearest(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, int64_t m, uint32_t* indices,
                        double* distances) {
    __shared__ double listed_distances[THREADS / WARP][NEAREST];
    __shared__ uint32_t listed_indices[THREADS / WARP][NEAREST];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Nearby list = {listed_distances[warp], listed_indices[warp]};
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* const row = row_of(x, r, b, i % r.n);
        for (int64_t place = lane; place < m; place += WARP) {
            list.distances[place] = nothing().distance, list.indices[place] = nothing().index;
        }
        __syncwarp();
        for (int64_t first = 0; first < cr.n; first += WARP) {
            const int64_t j = first + lane;
            Best own = nothing();
            if (j < cr.n) own = candidate(distance(metric, row, row_of(c, cr, b, j), r.d), uint32_t(j));
            __syncwarp();
            for (uint32_t left = __ballot_sync(~0u, before(own, list.at(m - 1))); left; left &= left - 1) {
                const int from = __ffs(left) - 1;
                const Best next = {__shfl_sync(~0u, own.distance, from), __shfl_sync(~0u, own.index, from)};
                list.insert(next, m);
            }
        }
        for (int64_t place = lane; place < m; place += WARP) {
            indices[i * m + place] = list.indices[place], distances[i * m + place] = list.distances[place];
        }
        __syncwarp();
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void nearest_##name(const T* x, Rows r, const T* c, Rows cr, int metric, int64_t m,          \
                                              uint32_t* indices, double* distances) {                                  \
        nearest(x, r, c, cr, metric, m, indices, distances);                                                           \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE
