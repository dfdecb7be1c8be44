// FlashAssign on Hopper for rows of too many columns to stay on chip: both operands of the products come from a ring.
//
// The roles, the search and the proof are those of assign_sm90.cu. A stage of the ring has 64 columns of the 128 rows
// of a block and of 256 centroids, and each of two warpgroups multiplies 64 rows with all of them, both operands in
// shared memory, into 128 scores a thread. So each value of a row is multiplied 256 times once it is on chip, and each
// value of a centroid 256 times as well: blocks work in clusters of two, which bring half of the centroids each and
// multicast it to both.
//
// Traffic of a block and tile of 256 centroids: 2 * 128 d bytes of rows and, by multicast, as many of centroids from L2
// for 2 * 128 * 256 d flops. X comes from memory once, where a wave of blocks' rows fits in L2.
#include "assign/sm90.cuh"
#include "assign/sm90_epilogue.cuh"
#include "assign/sm90_search.cuh"

/// The shape of a block.
struct Wide {
    static constexpr int ROWS = WIDE_ROWS, GROUPS = ROWS / SLOT, BLOCK = WIDE_THREADS, CLUSTER = WIDE_CLUSTER,
                         PLACES = 16;
    static_assert(BLOCK == 128 * (GROUPS + 1), "and a group that brings and finishes");
    static constexpr int WIDTH = CLUSTER * CENTROIDS, PARTS = 2;
    static constexpr int LINE = 2 * BOX;  // bytes of a row in a stage
    static constexpr int ROW_BYTES = ROWS * LINE, STAGE_BYTES = ROW_BYTES + WIDTH * LINE, STAGES = 4;
    static constexpr int SLOT_BYTES = 0;
    static constexpr bool FROM_ZERO = false;
    static constexpr int VECTOR_BYTES = WIDTH * 4;
    // `start` and `scale` of a tile are brought with its first stage, when all are past the first stages of the tile
    // before, at least.
    static constexpr int VECTORS = 2;
    static constexpr int RESULT_BYTES = sizeof(RowResult) + PLACES * sizeof(float);
    static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
    static_assert(1024 + STAGES * STAGE_BYTES + (2 * VECTORS + 1) * VECTOR_BYTES + ROWS * RESULT_BYTES + 256 <=
                      SM90_SHARED,
                  "a block's shared memory");
};

__device__ __forceinline__ int chunks_of(int64_t d) { return int((d + BOX - 1) / BOX); }

/// One thread brings all that its block reads, and half of the centroids of the other.
__device__ void produce(const Shared<Wide>& s, const CUtensorMap* row_map, const CUtensorMap* centroid_map,
                        const Rows& r, const Active& active, bool scratch, const float* start, const float* scale,
                        int tiles, int64_t padded, int64_t copies) {
    const int chunks = chunks_of(r.d), half = int(blockIdx.x) % Wide::CLUSTER;
    PipelineState<Wide::STAGES> stage;
    PipelineState<Wide::VECTORS> vector;
    for (TileScheduler<Wide> work(r, active, false); work.more(); work.next()) {
        const int copy = work.copy(copies), problem = scratch ? work.at : active.problem(work.at);
        for (int t = 0; t < tiles; ++t, vector.next()) {
            const int64_t at = copy * padded + t * Wide::WIDTH;
            // A last tile may be half of one.
            const int vector_bytes = int(min(int64_t(Wide::WIDTH), padded - t * Wide::WIDTH)) * 4;
            const int vectors = (scale ? 2 : 1) * vector_bytes;
            for (int chunk = 0; chunk < chunks; ++chunk, stage.next()) {
                const uint32_t full = s.full(stage.at), rows = s.ring + stage.at * Wide::STAGE_BYTES;
                const uint32_t centroids = rows + Wide::ROW_BYTES + half * (CENTROIDS * Wide::LINE);
                mbarrier_wait(s.empty(stage.at), stage.parity ^ 1);
                mbarrier_expect_tx(full, Wide::STAGE_BYTES + (chunk == 0 ? vectors : 0));
                tma_load(rows, row_map, full, chunk * BOX, work.first_row(), problem);
                tma_load_multicast(centroids, centroid_map, full, chunk * BOX, t * Wide::WIDTH + half * CENTROIDS, copy,
                                   (1 << Wide::CLUSTER) - 1);
                if (chunk) continue;
                tma_load_bytes(s.start + vector.at * Wide::VECTOR_BYTES, start + at, vector_bytes, full);
                if (scale) tma_load_bytes(s.scale + vector.at * Wide::VECTOR_BYTES, scale + at, vector_bytes, full);
            }
        }
    }
}

/// One warpgroup that searches.
template <class T>
struct WideConsumer {
    const Shared<Wide>& s;
    const bool scaled;
    const int chunks;
    const int index = int(threadIdx.x) / 128 - 1, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    PipelineState<Wide::STAGES> stage;
    PipelineState<Wide::VECTORS> vector;

    __device__ __forceinline__ uint32_t rows(int at) const {
        return s.ring + at * Wide::STAGE_BYTES + index * (SLOT * Wide::LINE);
    }

    /// Lets both blocks that write to a stage know that this warp has read it.
    __device__ __forceinline__ void release(int at) const {
        if (lane < Wide::CLUSTER) mbarrier_arrive_at(s.empty(at), lane);
    }

    /// Adds up the squares of half of a row's columns in a stage: two lanes share a row.
    __device__ __forceinline__ void add_squares(float& squares) const {
        const uint32_t from = rows(stage.at) + (warp * 16 + lane / 2) * Wide::LINE + lane % 2 * (Wide::LINE / 2);
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
            const float4 v = load_floats4(from + 16 * ((piece + lane / 2) % 4));
            squares += piece_squares<T>(*reinterpret_cast<const uint4*>(&v));
        }
        fence_proxy_async();
    }

    /// Multiplies the columns of a stage.
    template <int SCORES>
    __device__ __forceinline__ void multiply(float (&acc)[SCORES]) const {
        const uint32_t centroids = s.ring + stage.at * Wide::STAGE_BYTES + Wide::ROW_BYTES;
#pragma unroll
        for (int step = 0; step < BOX / 16; ++step) {
            wgmma_shared<T>(acc, matrix_descriptor(rows(stage.at) + step * 32),
                            matrix_descriptor(centroids + step * 32));
        }
        wgmma_commit();
    }

    /// Searches the next tile, of which the first COUNT centroids count. The first one of a row tile adds up the rows'
    /// squares, too.
    template <int COUNT>
    __device__ __forceinline__ void search(int column, bool first, float& squares,
                                           KeySearch<Wide::PLACES> (&found)[2]) {
        const uint32_t start = s.start + vector.at * Wide::VECTOR_BYTES + 8 * (lane % 4);
        float acc[COUNT / 2];
        int done = stage.at;
        mbarrier_wait(s.full(stage.at), stage.parity);
        begin(acc, scaled ? s.zeros + 8 * (lane % 4) : start);
        if (first) add_squares(squares);
        pin(acc);
        wgmma_fence();
        multiply(acc);
        stage.next();
        for (int chunk = 1; chunk < chunks; ++chunk, stage.next()) {
            mbarrier_wait(s.full(stage.at), stage.parity);
            if (first) add_squares(squares);
            multiply(acc);
            wgmma_wait<1>();
            release(done);
            done = stage.at;
        }
        wgmma_wait<0>();
        pin(acc);
        if (scaled) {
            rescale(acc, start, s.scale + vector.at * Wide::VECTOR_BYTES + 8 * (lane % 4));
            fence_proxy_async();
        }
        __syncwarp();
        release(done);
        reduce(acc, column + 2 * (lane % 4), found[0], found[1]);
        vector.next();
    }
};

template <class T>
__device__ void search_wide(const Shared<Wide>& s, const Rows& r, const Active& active, bool scaled, int64_t k) {
    WideConsumer<T> g{s, scaled, chunks_of(r.d)};
    const int tiles = (k + Wide::WIDTH - 1) / Wide::WIDTH, last = k - int64_t(tiles - 1) * Wide::WIDTH;
    const int whole = tiles - (last <= CENTROIDS);
    int held = 0;
    for (TileScheduler<Wide> work(r, active, false); work.more(); work.next(), held ^= 1) {
        KeySearch<Wide::PLACES> found[2];
        float squares = 0;
        int t = 0;
        for (; t < whole; ++t) g.template search<Wide::WIDTH>(t * Wide::WIDTH, t == 0, squares, found);
        if (t < tiles) g.template search<CENTROIDS>(t * Wide::WIDTH, t == 0, squares, found);
        squares += __shfl_xor_sync(~0u, squares, 1);

        mbarrier_wait(s.found_empty(g.index), held ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = g.lane / 4 + i * 8;
            const float of_row = __shfl_sync(~0u, squares, 2 * row);
            publish(found[i], s.found + (g.index * SLOT + g.warp * 16 + row) * Wide::RESULT_BYTES, of_row, g.lane);
        }
        __syncwarp();
        if (g.lane == 0) mbarrier_arrive(s.found_full(g.index));
    }
}

template <class T>
__device__ __forceinline__ void assign_wide(const CUtensorMap* row_map, const CUtensorMap* centroid_map, const Rows& r,
                                            const Active& active, const float* start, const float* scale,
                                            const float* own, const Bounds* bounds, int64_t k, int64_t padded,
                                            int64_t copies, const float* row_error, uint32_t* labels, UnprovenRow* list,
                                            uint32_t* listed) {
    extern __shared__ uint8_t raw[];
    const Shared<Wide> s(raw);
    const int tiles = (k + Wide::WIDTH - 1) / Wide::WIDTH;
    if (threadIdx.x == 0) s.init();
    // No block writes to another's memory before its barriers are there, or after it has ended.
    cluster_sync();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<Wide::PRODUCER_REGISTERS>();
        if (threadIdx.x / 32 >= EPILOGUE)
            epilogue(s, TileScheduler<Wide>(r, active, false), active, own, bounds, padded, copies, k, r.n, r.d,
                     row_error, labels, list, listed);
        if (threadIdx.x == 0) {
            produce(s, row_map, centroid_map, r, active, row_error != nullptr, start, scale, tiles, padded, copies);
        }
        __syncwarp();
    } else {
        setmaxnreg_inc<Wide::CONSUMER_REGISTERS>();
        search_wide<T>(s, r, active, scale != nullptr, k);
    }
    cluster_sync();
}

#define KERNEL(name, T)                                                                                                \
    extern "C" __global__ void __cluster_dims__(Wide::CLUSTER) __launch_bounds__(Wide::BLOCK, 1) assign_wide_##name(   \
        const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap centroid_map, Rows r,         \
        Active active, const float* start, const float* scale, const float* own, const Bounds* bounds, int64_t k,      \
        int64_t padded, int64_t copies, const float* row_error, uint32_t* labels, UnprovenRow* list,                   \
        uint32_t* listed) {                                                                                            \
        assign_wide<T>(&row_map, &centroid_map, r, active, start, scale, own, bounds, k, padded, copies, row_error,    \
                       labels, list, listed);                                                                          \
    }
KERNEL(f16, __half)
KERNEL(bf16, __nv_bfloat16)
#undef KERNEL
