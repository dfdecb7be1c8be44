// The second pass over f32 rows on Hopper: the rows that one half each did not prove are scored by h.h + h.l + l.h
// (split.cu) with WGMMA. `recheck_split` decides what this leaves open.
//
// The roles, the search and the proof are those of assign_sm90.cu. Listed rows lie anywhere, so a warp gathers them
// with cp.async instead of the copy engine. A searching warpgroup has both halves of its 64 rows in registers, and a
// stage of the ring both halves of a tile of centroids: three products of each step of 16 columns from two loads.
//
// The first pass leaves out a part of the rows if most of those in the part before it were unproven, and all of them
// come to this kernel, which decides that for the next part (`Gate`).
//
// Traffic of a block and tile of R rows: 4 R d bytes of rows once; 4 k d bytes of centroids from L2 for 6 R k d flops.
#include "arch/mma.cuh"
#include "assign/sm90.cuh"
#include "assign/sm90_epilogue.cuh"
#include "assign/sm90_search.cuh"

/// STEPS of 16 columns of each half.
template <int STEPS_>
struct Split {
    static constexpr int STEPS = STEPS_, GROUPS = 2, ROWS = GROUPS * SLOT, BLOCK = 128 * (GROUPS + 1);
    static constexpr int CLUSTER = 1, WIDTH = CENTROIDS, PLACES = 16;
    static constexpr bool FROM_ZERO = true;
    // A stage of the ring is a box of each half of a tile.
    static constexpr int PARTS = (STEPS + 3) / 4, BOX_BYTES = CENTROIDS * BOX * 2, STAGE_BYTES = 2 * BOX_BYTES;
    static constexpr int SLOT_BYTES = 2 * SLOT * BOX * 2 * PARTS;
    static constexpr int VECTOR_BYTES = CENTROIDS * 4;
    static constexpr int RESULT_BYTES = sizeof(RowResult) + PLACES * sizeof(float);
    static constexpr int VECTORS =
        4;  // of `start`; all are past the first part of a tile when the fourth after it is brought
    static constexpr int FIXED_BYTES =
        1024 + GROUPS * SLOT_BYTES + (2 * VECTORS + 1) * VECTOR_BYTES + ROWS * RESULT_BYTES + 256;
    static constexpr int FIT = (SM90_SHARED - FIXED_BYTES) / STAGE_BYTES, MOST = PARTS == 1 ? 4 : 6,
                         STAGES = FIT < MOST ? FIT : MOST;
    static_assert(STAGES > PARTS && STAGES <= VECTORS * PARTS, "one to fill while others are read");
    static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
};

/// Walks the listed rows of all problems in tiles, of which each block takes every so many.
template <class S>
struct ListedTiles {
    const UnprovenRow* list;
    const uint32_t* listed;  // null if all rows are to do
    int n, problems, at = 0, tile = blockIdx.x, rows;

    __device__ ListedTiles(const Rows& r, const Active& active, const UnprovenRow* list, const uint32_t* listed)
        : list(list),
          listed(listed),
          n(r.n),
          problems(active.problems(r.b)) {
        settle();
    }
    __device__ __forceinline__ void settle() {
        for (; at < problems; ++at) {
            rows = listed ? int(__ldg(&listed[at])) : n;
            const int tiles = (rows + S::ROWS - 1) / S::ROWS;
            if (tile < tiles) return;
            tile -= tiles;
        }
    }
    __device__ __forceinline__ bool more() const { return at < problems; }
    __device__ __forceinline__ void next() { tile += gridDim.x, settle(); }
    __device__ __forceinline__ int copy(int64_t copies) const { return copies > 1 ? at : 0; }
    /// The number of the i-th row of the tile, or -1 if there is none.
    __device__ __forceinline__ int row(int i, int64_t) const {
        const int place = tile * S::ROWS + i;
        if (place >= rows) return -1;
        return listed ? int(__ldg(&list[int64_t(at) * n + place].row)) : place;
    }
};

/// A warp brings both halves of the rows, h before l, in boxes as the copy engine would.
template <class S>
__device__ void gather_rows(const Shared<S>& s, const __half* halves, ListedTiles<S> work, int64_t pitch) {
    constexpr int PIECES = 2 * S::PARTS * (BOX / PIECE);
    const int lane = threadIdx.x % WARP;
    for (int parity = 1; work.more(); work.next(), parity ^= 1) {
        for (int group = 0; group < S::GROUPS; ++group) {
            mbarrier_wait(s.rows_empty(group), parity);
            for (int first = 0; first < SLOT; first += WARP) {
                const int own = work.row(group * SLOT + first + lane, work.n);
                for (int i = 0; i < WARP; ++i) {
                    const int row = __shfl_sync(~0u, own, i);
                    const __half* const from = halves + (int64_t(work.at) * work.n + row) * 2 * pitch;
                    for (int piece = lane; piece < PIECES; piece += WARP) {
                        const int half = piece / (PIECES / 2), column = piece % (PIECES / 2) * PIECE;
                        const int box = piece / (BOX / PIECE);
                        const uint32_t to = s.rows + group * S::SLOT_BYTES + box * SLOT * 128 +
                                            swizzled<128>(first + i, piece % (BOX / PIECE));
                        const bool inside = row >= 0 && column < pitch;
                        cp_async_16(to, inside ? from + half * pitch + column : halves, inside ? 16 : 0);
                    }
                }
            }
            cp_async_commit();
            cp_async_wait<0>();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(s.rows_full(group));
        }
    }
}

template <class S>
__device__ void produce_halves(const Shared<S>& s, const CUtensorMap* high, const CUtensorMap* low, ListedTiles<S> work,
                               const float* start, int tiles, int64_t padded, int64_t copies) {
    PipelineState<S::STAGES> stage;
    PipelineState<S::VECTORS> vector;
    for (; work.more(); work.next()) {
        const int copy = work.copy(copies);
        for (int t = 0; t < tiles; ++t, vector.next()) {
            for (int part = 0; part < S::PARTS; ++part, stage.next()) {
                const uint32_t full = s.full(stage.at), to = s.ring + stage.at * S::STAGE_BYTES;
                mbarrier_wait(s.empty(stage.at), stage.parity ^ 1);
                mbarrier_expect_tx(full, S::STAGE_BYTES + (part == 0 ? S::VECTOR_BYTES : 0));
                tma_load(to, high, full, part * BOX, t * CENTROIDS, copy);
                tma_load(to + S::BOX_BYTES, low, full, part * BOX, t * CENTROIDS, copy);
                if (part) continue;
                tma_load_bytes(s.start + vector.at * S::VECTOR_BYTES, start + copy * padded + t * CENTROIDS,
                               S::VECTOR_BYTES, full);
            }
        }
    }
}

/// A warpgroup's way around the rings.
template <class S>
struct Rings {
    PipelineState<S::STAGES> stage;
    PipelineState<S::VECTORS> vector;
};

template <class S>
__device__ __forceinline__ void search_tile(const Shared<S>& s, const uint32_t (&high)[S::STEPS][4],
                                            const uint32_t (&low)[S::STEPS][4], Rings<S>& at, int column, int lane,
                                            KeySearch<S::PLACES> (&found)[2]) {
    const int quad = lane % 4, index = int(threadIdx.x) / 128 - 1;
    const uint32_t start = s.start + at.vector.at * S::VECTOR_BYTES + 8 * quad;
    float acc[CENTROIDS / 2];
    uint32_t boxes[S::PARTS], empty[S::PARTS];
    begin(acc, s.zeros + 8 * quad);
    named_barrier_sync(1 + index, 256);
    pin(acc);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < S::PARTS; ++part, at.stage.next()) {
        mbarrier_wait(s.full(at.stage.at), at.stage.parity);
        boxes[part] = s.ring + at.stage.at * S::STAGE_BYTES, empty[part] = s.empty(at.stage.at);
#pragma unroll
        for (int i = 0; i < 4 && part * 4 + i < S::STEPS; ++i) {
            wgmma<__half>(acc, high[part * 4 + i], matrix_descriptor(boxes[part] + S::BOX_BYTES + i * 32));
            wgmma<__half>(acc, low[part * 4 + i], matrix_descriptor(boxes[part] + i * 32));
        }
    }
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
        wgmma<__half>(acc, high[step], matrix_descriptor(boxes[step / 4] + step % 4 * 32));
    }
    wgmma_commit();
    named_barrier_arrive(1 + (index + 1) % S::GROUPS, 256);
    wgmma_wait<0>();
    pin(acc);
#pragma unroll
    for (int j = 0; j < CENTROIDS / 8; ++j) {
        const float2 from = load_floats(start + 32 * j);
        acc[4 * j] += from.x, acc[4 * j + 1] += from.y, acc[4 * j + 2] += from.x, acc[4 * j + 3] += from.y;
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
#pragma unroll
        for (int part = 0; part < S::PARTS; ++part) mbarrier_arrive(empty[part]);
    }
    reduce(acc, column + 2 * quad, found[0], found[1]);
    at.vector.next();
}

template <class S>
__device__ void search_listed(const Shared<S>& s, ListedTiles<S> work, int tiles) {
    const int index = int(threadIdx.x) / 128 - 1, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    Rings<S> at;
    if (index == S::GROUPS - 1) named_barrier_arrive(1, 256);
    for (int held = 0; work.more(); work.next(), held ^= 1) {
        uint32_t high[S::STEPS][4], low[S::STEPS][4];
        mbarrier_wait(s.rows_full(index), held);
        const uint32_t slot = s.rows + index * S::SLOT_BYTES;
        load_rows<S>(high, slot, warp, lane);
        load_rows<S>(low, slot + S::PARTS * SLOT * 128, warp, lane);
        float squares[2];
        squares_of<__half, S::STEPS>(high, squares);
        // An arrival does not wait for loads under way.
        pin_rows(low);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.rows_empty(index));

        KeySearch<S::PLACES> found[2];
        for (int t = 0; t < tiles; ++t) search_tile(s, high, low, at, t * CENTROIDS, lane, found);

        mbarrier_wait(s.found_empty(index), held ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = index * SLOT + warp * 16 + lane / 4 + i * 8;
            publish(found[i], s.found + row * S::RESULT_BYTES, squares[i], lane);
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.found_full(index));
    }
    if (index == 0) named_barrier_sync(1, 256);  // the last one given
}

/// `r` are the rows as they were split, `halves` (b, n, 2 pitch); `list` and `listed` are those of the first pass.
/// `row_error` is that of both halves.
template <class S>
__device__ __forceinline__ void search_split(const CUtensorMap* high, const CUtensorMap* low, const __half* halves,
                                             const Rows& r, const Active& active, const Gate& gate, const float* start,
                                             const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded,
                                             int64_t copies, const float* row_error, uint32_t* labels,
                                             const UnprovenRow* list, const uint32_t* listed, UnprovenRow* left,
                                             uint32_t* left_count) {
    extern __shared__ uint8_t raw[];
    const Shared<S> s(raw);
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS;
    const bool all = gate.passed_over();
    const ListedTiles<S> work(r, active, list, all ? nullptr : listed);
    if (global_thread() == 0) gate.decide(active, all || 2 * int64_t(*listed) > r.n);
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        setmaxnreg_dec<S::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp >= EPILOGUE) {
            epilogue(s, work, active, nullptr, bounds, padded, copies, k, r.n, r.d + SMALL_PRODUCTS, row_error, labels,
                     left, left_count);
        }
        if (warp == PRODUCE_ROWS) gather_rows(s, halves, work, pitch);
        if (threadIdx.x == 32 * PRODUCE_CENTROIDS) produce_halves(s, high, low, work, start, tiles, padded, copies);
    } else {
        setmaxnreg_inc<S::CONSUMER_REGISTERS>();
        search_listed(s, work, tiles);
    }
}

#define KERNEL(steps)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(384, 1) search_split_##steps##_f32(                                   \
        const __grid_constant__ CUtensorMap high, const __grid_constant__ CUtensorMap low, const __half* halves,       \
        Rows r, Active active, Gate gate, const float* start, const Bounds* bounds, int64_t k, int64_t pitch,          \
        int64_t padded, int64_t copies, const float* row_error, uint32_t* labels, const UnprovenRow* list,             \
        const uint32_t* listed, UnprovenRow* left, uint32_t* left_count) {                                             \
        search_split<Split<steps>>(&high, &low, halves, r, active, gate, start, bounds, k, pitch, padded, copies,      \
                                   row_error, labels, list, listed, left, left_count);                                 \
    }
KERNEL(1) KERNEL(2) KERNEL(3) KERNEL(4) KERNEL(5) KERNEL(6) KERNEL(7) KERNEL(8)
#undef KERNEL
