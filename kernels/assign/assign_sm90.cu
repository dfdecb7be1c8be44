// FlashAssign on Hopper: TMA brings tiles, WGMMA scores them, and no score leaves the registers.
//
// One block an SM walks tiles of rows. In its first warpgroup, warp 0 keeps a ring of centroid tiles full, warp 1
// brings the rows, and warps 2 and 3 finish rows that have been searched. The other warpgroups search: each holds the
// 64 rows of its slot in registers as the first operand of the products, and a tile of 128 centroids is the second.
// They take turns at the tensor cores, so that some reduce their scores while one multiplies.
//
// An accumulator starts at `start[j]` (tensor.cuh), so a score costs no addition. To find the largest, the second
// largest and its column in about 1.3 operations a score instead of five, scores are compared three at a time, as
// integers (sm90_search.cuh), and the columns of a thread are seen as a matrix with PLACES columns. The maximum of each
// of its rows is compared with the best and the second-best row so far; across all rows, tiles included, a maximum is
// kept of each place. The place whose maximum is the best score is the
// winner's, and any other score is in another row or in another place: the larger of the second-best row and the other
// places bounds it from above. Comparisons run at half the rate of other instructions and are what the searching groups
// have least room for, so the thread with a row's best score leaves its places to the finishing warps, where a row
// takes one lane. A label is proven if the winner is ahead by `error_bound`; rows that are not proven go on a list for
// `recheck`.
//
// Traffic of a block and tile of R rows: X once; 2 k d bytes of centroids from L2 for 2 R k d flops, or, if all tiles
// of a problem fit in the ring, none: they stay there, and a block's row tiles are neighbours.
#include "assign/sm90.cuh"
#include "assign/sm90_epilogue.cuh"
#include "assign/sm90_search.cuh"

// ---- Two threads are producers: one of rows (sm90.cuh), and one of centroids.

template <class S>
__device__ void produce_centroids(const Shared<S>& s, const CUtensorMap* map, const Rows& r, const Active& active,
                                  const float* start, const float* scale, int tiles, int64_t padded, int64_t copies) {
    const int vectors = (scale ? 2 : 1) * S::VECTOR_BYTES;
    const bool stay = centroids_resident<S>(tiles);
    PipelineState<S::STAGES> stage;
    PipelineState<S::VECTORS> vector;
    int resident_copy = -1;
    for (TileScheduler<S> work(r, active, stay); work.more(); work.next()) {
        const int copy = work.copy(copies);
        if (stay && copy == resident_copy) continue;
        resident_copy = copy;
        for (int t = 0; t < tiles; ++t, vector.next()) {
            for (int part = 0; part < S::PARTS; ++part, stage.next()) {
                const uint32_t full = s.full(stage.at), to = s.ring + stage.at * S::STAGE_BYTES;
                mbarrier_wait(s.empty(stage.at), stage.parity ^ 1);
                mbarrier_expect_tx(full, S::STAGE_BYTES + (part == 0 ? vectors : 0));
                for (int box = 0; box < S::STAGE_BOXES; ++box) {
                    tma_load(to + box * CENTROIDS * 128, map, full, (part * S::STAGE_BOXES + box) * BOX, t * CENTROIDS,
                             copy);
                }
                if (part) continue;
                const int64_t at = copy * padded + t * CENTROIDS;
                tma_load_bytes(s.start + vector.at * S::VECTOR_BYTES, start + at, S::VECTOR_BYTES, full);
                if (scale) tma_load_bytes(s.scale + vector.at * S::VECTOR_BYTES, scale + at, S::VECTOR_BYTES, full);
            }
        }
    }
}

template <class T, class S>
__device__ __forceinline__ void assign(const CUtensorMap* row_map, const CUtensorMap* centroid_map, const Rows& r,
                                       const Active& active, const float* start, const float* scale, const float* own,
                                       const Bounds* bounds, int64_t k, int64_t padded, int64_t copies,
                                       const float* row_error, uint32_t* labels, UnprovenRow* list, uint32_t* listed) {
    extern __shared__ uint8_t raw[];
    const Shared<S> s(raw);
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS;
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<S::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp >= EPILOGUE)
            epilogue(s, TileScheduler<S>(r, active, centroids_resident<S>(tiles)), active, own, bounds, padded, copies,
                     k, r.n, r.d, row_error, labels, list, listed);
        if (threadIdx.x == 32 * PRODUCE_ROWS) {
            produce_rows(s, row_map, TileScheduler<S>(r, active, centroids_resident<S>(tiles)), active,
                         row_error != nullptr);
        }
        if (threadIdx.x == 32 * PRODUCE_CENTROIDS) {
            produce_centroids<S>(s, centroid_map, r, active, start, scale, tiles, padded, copies);
        }
    } else {
        setmaxnreg_inc<S::CONSUMER_REGISTERS>();
        search<T, S>(s, r, active, scale != nullptr, k, copies);
    }
}

/// One product step, for a test of what `error_bound` assumes of the hardware: out[i] = start[i] + a[i].b[i] over 16
/// columns.
template <class T>
__device__ __forceinline__ void probe(const float* start, const T* a, const T* b, int64_t count, float* out) {
    __shared__ __align__(1024) T centroids[32 * BOX];
    for (int i = threadIdx.x; i < 32 * BOX; i += 128) centroids[i] = T(0.0f);
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        __syncthreads();
        if (threadIdx.x < 16) centroids[threadIdx.x] = b[i * 16 + threadIdx.x];
        fence_proxy_async();
        __syncthreads();
        float acc[16] = {};
        uint32_t row[4] = {};
        if (threadIdx.x == 0) acc[0] = start[i];
        if (threadIdx.x < 4) {
            const uint32_t* pairs = reinterpret_cast<const uint32_t*>(a + i * 16);
            row[0] = pairs[threadIdx.x], row[2] = pairs[4 + threadIdx.x];
        }
        pin(acc);
        wgmma_fence();
        wgmma<T>(acc, row, matrix_descriptor(shared_address(centroids)));
        wgmma_commit();
        wgmma_wait<0>();
        pin(acc);
        if (threadIdx.x == 0) out[i] = acc[0];
    }
}

#define KERNEL(name, T, steps, groups)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128 * (groups + 1), 1) assign_sm90_##steps##_##name(                  \
        const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap centroid_map, Rows r,         \
        Active active, const float* start, const float* scale, const float* own, const Bounds* bounds, int64_t k,      \
        int64_t padded, int64_t copies, const float* row_error, uint32_t* labels, UnprovenRow* list,                   \
        uint32_t* listed) {                                                                                            \
        assign<T, Shape<steps, groups>>(&row_map, &centroid_map, r, active, start, scale, own, bounds, k, padded,      \
                                        copies, row_error, labels, list, listed);                                      \
    }
// Up to 128 columns no step is wasted; above, steps come in twos and fours, for fewer kernels. Above 256 columns only
// two groups have room for their rows in registers.
#define KERNELS(name, T)                                                                                               \
    KERNEL(name, T, 1, 3)                                                                                              \
    KERNEL(name, T, 2, 3)                                                                                              \
    KERNEL(name, T, 3, 3)                                                                                              \
    KERNEL(name, T, 4, 3)                                                                                              \
    KERNEL(name, T, 5, 3)                                                                                              \
    KERNEL(name, T, 6, 3)                                                                                              \
    KERNEL(name, T, 7, 3)                                                                                              \
    KERNEL(name, T, 8, 3)                                                                                              \
    KERNEL(name, T, 10, 3)                                                                                             \
    KERNEL(name, T, 12, 3)                                                                                             \
    KERNEL(name, T, 14, 3)                                                                                             \
    KERNEL(name, T, 16, 3) KERNEL(name, T, 20, 2) KERNEL(name, T, 24, 2) KERNEL(name, T, 28, 2) KERNEL(name, T, 32, 2)
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
#undef KERNELS
#undef KERNEL

#define PROBE(name, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        probe_sm90_##name(const float* start, const T* a, const T* b, int64_t count, float* out) {                     \
        probe(start, a, b, count, out);                                                                                \
    }
PROBE(f16, __half)
PROBE(bf16, __nv_bfloat16)
#undef PROBE
