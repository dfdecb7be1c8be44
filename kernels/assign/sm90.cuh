// The roles of assign_sm90.cu share the shape of a block, its shared memory and barriers, and its walk over row tiles.
#pragma once
#include "arch/ptx.cuh"
#include "assign/tensor.cuh"

constexpr int SLOT = SM90_ROWS, CENTROIDS = SM90_CENTROIDS;
constexpr int PRODUCE_CENTROIDS = 0, PRODUCE_ROWS = 1, EPILOGUE = 2, EPILOGUE_WARPS = 2;  // warps of the first group
constexpr int BOX = 64;  // columns of a 128-byte swizzled row
static_assert(SLOT == 64 && CENTROIDS == 128, "the shape of one product");

/// A consumer leaves the result of a row to the epilogue, with the maxima of the winner's places after it.
struct RowResult {
    float top, second;  // the best score; what no score of another row of places is above, nor that of another thread
    int column;         // of the first of the winner's row of places
    float squares;      // of the row, at least
};

/// STEPS of 16 columns and GROUPS that search.
template <int STEPS_, int GROUPS_>
struct Shape {
    static constexpr int STEPS = STEPS_, GROUPS = GROUPS_, ROWS = GROUPS * SLOT, BLOCK = 128 * (GROUPS + 1);
    static constexpr int CLUSTER = 1, WIDTH = CENTROIDS;
    static constexpr bool FROM_ZERO = false;  // accumulators start at `start`
    static constexpr int PLACES = STEPS <= 8 ? 16 : 8;
    static constexpr int BOXES = (STEPS + 3) / 4;
    // A stage of the ring is a tile, or one of its boxes where a tile is large.
    static constexpr int STAGE_BOXES = BOXES <= 2 ? BOXES : 1, PARTS = BOXES / STAGE_BOXES;
    static constexpr int SLOT_BYTES = SLOT * BOX * 2 * BOXES, STAGE_BYTES = CENTROIDS * BOX * 2 * STAGE_BOXES;
    static constexpr int VECTOR_BYTES = CENTROIDS * 4;
    static constexpr int RESULT_BYTES = sizeof(RowResult) + PLACES * sizeof(float);
    // These bytes are not the ring's: alignment, rows, at most eight tiles' `start` and `scale` and the zeros, results,
    // and barriers.
    static constexpr int FIXED_BYTES = 1024 + GROUPS * SLOT_BYTES + 17 * VECTOR_BYTES + ROWS * RESULT_BYTES + 256;
    static constexpr int FIT = (SM90_SHARED - FIXED_BYTES) / STAGE_BYTES, STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 2, "one to fill while another is read");
    // Of `start` and `scale`. A tile in parts lets go of them while its scores are not yet reduced, but by the time
    // that the first part of the fourth tile after it is brought, all groups are past it.
    static constexpr int VECTORS = PARTS == 1 ? STAGES : 4;
    // With a tile in the ring, one group multiplies it while others reduce. Else all go through its parts together.
    static constexpr bool TURNS = STAGES > PARTS;
    // A block starts with these registers, which `setmaxnreg` splits between the roles in eights.
    static constexpr int REGISTERS = 65536 / BLOCK / 8 * 8 * (GROUPS + 1);
    static constexpr int PRODUCER_REGISTERS = GROUPS == 2 ? 40 : STEPS == 16 ? 32 : 56;  // what the others can spare
    static constexpr int CONSUMER_REGISTERS = (REGISTERS - PRODUCER_REGISTERS) / GROUPS / 8 * 8;
};

/// The parts of shared memory, as addresses.
template <class S>
struct Shared {
    uint32_t rows, ring, start, scale, zeros, found, barriers;

    __device__ explicit Shared(const uint8_t* raw) {
        rows = (shared_address(raw) + 1023) / 1024 * 1024, ring = rows + S::GROUPS * S::SLOT_BYTES;
        start = ring + S::STAGES * S::STAGE_BYTES, scale = start + S::VECTORS * S::VECTOR_BYTES;
        zeros = scale + S::VECTORS * S::VECTOR_BYTES, found = zeros + S::VECTOR_BYTES;
        barriers = found + S::ROWS * S::RESULT_BYTES;
    }
    /// A stage of the ring has its bytes; its readers are done.
    __device__ uint32_t full(int stage) const { return barriers + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return full(S::STAGES + stage); }
    /// The rows of a group have come; have been taken.
    __device__ uint32_t rows_full(int group) const { return full(2 * S::STAGES + group); }
    __device__ uint32_t rows_empty(int group) const { return rows_full(S::GROUPS + group); }
    /// The results of a group stand there; are read.
    __device__ uint32_t found_full(int group) const { return rows_empty(S::GROUPS + group); }
    __device__ uint32_t found_empty(int group) const { return found_full(S::GROUPS + group); }

    __device__ void init() const {
        for (int i = 0; i < S::STAGES; ++i)
            mbarrier_init(full(i), 1), mbarrier_init(empty(i), 4 * S::GROUPS * S::CLUSTER);
        for (int g = 0; g < S::GROUPS; ++g) {
            mbarrier_init(rows_full(g), 1), mbarrier_init(rows_empty(g), 4);
            mbarrier_init(found_full(g), 4), mbarrier_init(found_empty(g), EPILOGUE_WARPS);
        }
        for (int i = 0; i < S::VECTOR_BYTES; i += 16) store_shared(zeros + i, 0, 0, 0, 0);
        mbarrier_init_fence();
    }
};

/// A place in a ring of `SIZE`, and the parity of its barriers there.
template <int SIZE>
struct PipelineState {
    int at = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == SIZE) at = 0, parity ^= 1;
    }
};

/// Whether all centroids of a problem stay in the ring.
template <class S>
__device__ __forceinline__ bool centroids_resident(int tiles) {
    return S::PARTS == 1 && tiles <= S::STAGES;
}

/// Walks the share of the row tiles of all problems that a block has, or a cluster, whose blocks take a tile each at a
/// time: neighbours if centroids stay, else far apart, so that all blocks want the same centroids at a time.
template <class S>
struct TileScheduler {
    int left;  // to come, this one included
    int per_problem, at, tile, problems_step, tiles_step;

    __device__ TileScheduler(const Rows& r, const Active& active, bool neighbours)
        : per_problem((r.n + S::CLUSTER * S::ROWS - 1) / (S::CLUSTER * S::ROWS)) {
        const int64_t clusters = gridDim.x / S::CLUSTER, cluster = blockIdx.x / S::CLUSTER;
        const int64_t all = active.problems(r.b) * per_problem, step = neighbours ? 1 : clusters;
        const int64_t first = neighbours ? all * cluster / clusters : cluster;
        const int64_t end = neighbours ? all * (cluster + 1) / clusters : all;
        left = (end - first + step - 1) / step;
        at = first / per_problem, tile = first % per_problem;
        problems_step = step / per_problem, tiles_step = step % per_problem;
    }
    __device__ __forceinline__ bool more() const { return left > 0; }
    __device__ __forceinline__ void next() {
        --left, at += problems_step, tile += tiles_step;
        if (tile >= per_problem) tile -= per_problem, ++at;
    }
    __device__ __forceinline__ int first_row() const {
        return (tile * S::CLUSTER + int(blockIdx.x) % S::CLUSTER) * S::ROWS;
    }
    /// The number of the i-th row of the tile, of `n` in all, or -1 if there is none.
    __device__ __forceinline__ int row(int i, int64_t n) const {
        const int row = first_row() + i;
        return row < n ? row : -1;
    }
    /// Of `copies` of centroids, the one for this tile.
    __device__ __forceinline__ int copy(int64_t copies) const { return copies > 1 ? at : 0; }
    /// Whether no later tile of a walk over neighbours wants the same centroids.
    __device__ __forceinline__ bool last_of_copy(int64_t copies) const {
        return left == 1 || (copies > 1 && tile + 1 == per_problem);
    }
};

/// Brings the rows of each tile that `work` walks, slot by slot: one thread does.
template <class S, class Walk>
__device__ void produce_rows(const Shared<S>& s, const CUtensorMap* map, Walk work, const Active& active,
                             bool scratch) {
    for (int parity = 1; work.more(); work.next(), parity ^= 1) {
        const int problem = scratch ? work.at : active.problem(work.at);
        for (int group = 0; group < S::GROUPS; ++group) {
            const uint32_t to = s.rows + group * S::SLOT_BYTES;
            mbarrier_wait(s.rows_empty(group), parity);
            mbarrier_expect_tx(s.rows_full(group), S::SLOT_BYTES);
            for (int box = 0; box < S::BOXES; ++box) {
                tma_load(to + box * SLOT * 128, map, s.rows_full(group), box * BOX, work.first_row() + group * SLOT,
                         problem);
            }
        }
    }
}
