// The nearest centroids of each row, as many as are asked for.
//
// A warp takes a row, and keeps a list of so many in shared memory, ordered by distance and index, into which all lanes
// put what comes before its last at once. Of f64 rows, by Manhattan, and where most centroids are asked for, lanes
// compare centroids 32 apart, each distance one sequential f64 chain.
//
// Else pairwise.cu computes all distances first, some rows at a time, which are the definition rounded to f32. Rounding
// never changes the order of two numbers, so no centroid is among the nearest m whose rounded distance is above the
// m-th smallest: one list finds that, by rounded distances alone, and another the nearest of those up to it, a dozen or
// so of which lanes compare by the definition, 32 at once.
//
// Traffic: X once, the centroids once for each row, from the caches, and m numbers and indices a row; or what
// pairwise.cu moves, its distances twice, and a few centroids for each row.
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

/// A warp's list, empty.
__device__ __forceinline__ Nearby empty_list(int64_t m) {
    __shared__ double distances[THREADS / WARP][NEAREST];
    __shared__ uint32_t indices[THREADS / WARP][NEAREST];
    const Nearby list = {distances[threadIdx.x / WARP], indices[threadIdx.x / WARP]};
    __syncwarp();
    for (int64_t place = threadIdx.x % WARP; place < m; place += WARP) {
        list.distances[place] = nothing().distance, list.indices[place] = nothing().index;
    }
    __syncwarp();
    return list;
}

/// Puts the lanes' own into the list, one after the other, where they come before its last.
__device__ __forceinline__ void insert_all(Nearby list, const Best& own, int64_t m) {
    __syncwarp();
    for (uint32_t left = __ballot_sync(~0u, before(own, list.at(m - 1))); left; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const Best next = {__shfl_sync(~0u, own.distance, from), __shfl_sync(~0u, own.index, from)};
        list.insert(next, m);
    }
}

__device__ __forceinline__ void write(Nearby list, int64_t m, uint32_t* indices, double* distances) {
    for (int64_t place = threadIdx.x % WARP; place < m; place += WARP) {
        indices[place] = list.indices[place], distances[place] = list.distances[place];
    }
}

template <class T>
__device__ void nearest(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, int64_t m, uint32_t* indices,
                        double* distances) {
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* const row = row_of(x, r, b, i % r.n);
        const Nearby list = empty_list(m);
        for (int64_t first = 0; first < cr.n; first += WARP) {
            const int64_t j = first + lane;
            Best own = nothing();
            if (j < cr.n) own = candidate(distance(metric, row, row_of(c, cr, b, j), r.d), uint32_t(j));
            insert_all(list, own, m);
        }
        write(list, m, indices + i * m, distances + i * m);
    }
}

/// The same by distances that are known in f32, `(b, n, k)`.
template <class T>
__device__ void nearest_of(const T* x, const Rows& r, const T* c, const Rows& cr, int metric, int64_t m,
                           const float* rounded, uint32_t* indices, double* distances) {
    __shared__ uint32_t waiting[THREADS / WARP][2 * WARP];
    uint32_t* const queue = waiting[threadIdx.x / WARP];
    const int lane = threadIdx.x % WARP;
    for (int64_t i = global_thread() / WARP; i < r.b * r.n; i += all_threads() / WARP) {
        const int64_t b = i / r.n;
        const T* const row = row_of(x, r, b, i % r.n);
        const float* const own_rounded = rounded + i * cr.n;
        const auto rounded_candidate = [&](int64_t j) {
            return j < cr.n ? candidate(own_rounded[j], uint32_t(j)) : nothing();
        };
        Nearby list = empty_list(m);
        for (int64_t first = 0; first < cr.n; first += WARP) insert_all(list, rounded_candidate(first + lane), m);
        const double last = list.at(m - 1).distance;
        list = empty_list(m);
        int queued = 0;
        for (int64_t first = 0; first < cr.n; first += WARP) {
            const Best own = rounded_candidate(first + lane);
            const bool takes = first + lane < cr.n && own.distance <= last;
            const uint32_t taken = __ballot_sync(~0u, takes);
            if (takes) queue[queued + __popc(taken & ((1u << lane) - 1))] = own.index;
            queued += __popc(taken);
            __syncwarp();
            // A full warp of them, or what is left at the end.
            while (queued >= WARP || (queued > 0 && first + WARP >= cr.n)) {
                const int count = min(queued, WARP);
                Best exact = nothing();
                if (lane < count) {
                    const uint32_t j = queue[lane];
                    exact = candidate(distance(metric, row, row_of(c, cr, b, j), r.d), j);
                }
                const uint32_t moved = lane + count < queued ? queue[lane + count] : 0;
                __syncwarp();
                if (lane + count < queued) queue[lane] = moved;
                queued -= count;
                insert_all(list, exact, m);
            }
        }
        write(list, m, indices + i * m, distances + i * m);
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void nearest_##name(const T* x, Rows r, const T* c, Rows cr, int metric, int64_t m,          \
                                              uint32_t* indices, double* distances) {                                  \
        nearest(x, r, c, cr, metric, m, indices, distances);                                                           \
    }
FOR_EACH_TYPE(INSTANCE)
#undef INSTANCE

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void nearest_of_##name(const T* x, Rows r, const T* c, Rows cr, int metric, int64_t m,       \
                                                 const float* rounded, uint32_t* indices, double* distances) {         \
        nearest_of(x, r, c, cr, metric, m, rounded, indices, distances);                                               \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
INSTANCE(f32, float)
#undef INSTANCE
