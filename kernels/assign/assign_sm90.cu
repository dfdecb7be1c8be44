// FlashAssign on Hopper: TMA brings tiles, WGMMA scores them, and no score leaves the registers.
//
// One block an SM walks tiles of rows. In its first warpgroup, warp 0 keeps a ring of centroid tiles full, warp 1
// brings the rows, and warps 2 and 3 finish rows that have been searched. The other warpgroups search: each holds the
// 64 rows of its slot in registers as the first operand of the products, and a tile of 128 centroids is the second.
// They take turns at the tensor cores, so that some reduce their scores while one multiplies.
//
// An accumulator starts at `start[j]` (tensor.cuh), so a score costs no addition. To find the largest, the second
// largest and its column in about 2.25 operations a score instead of five, the columns of a thread are seen as a matrix
// with PLACES columns. The maximum of each of its rows is compared with the best and the second-best row so far; across
// all rows, tiles included, a maximum is kept of each place. The place whose maximum is the best score is the
// winner's, and any other score is in another row or in another place: the larger of the second-best row and the other
// places bounds it from above. Comparisons run at half the rate of other instructions and are what the searching groups
// have least room for, so the thread with a row's best score leaves its places to the finishing warps, where a row
// takes one lane. A label is proven if the winner is ahead by `margin`; rows that are not proven go on a list for
// `recheck`.
//
// Traffic of a block and tile of R rows: X once; 2 k d bytes of centroids from L2 for 2 R k d flops, or, if all tiles
// of a problem fit in the ring, none: they stay there, and a block's row tiles are neighbours.
#include <type_traits>

#include "arch/ptx.cuh"
#include "assign/tensor.cuh"

constexpr int SLOT = SM90_ROWS, CENTROIDS = SM90_CENTROIDS;
constexpr int FEED_CENTROIDS = 0, FEED_ROWS = 1, FINISH = 2, FINISHERS = 2;  // warps of the first group
constexpr int BOX = 64;                                                      // columns of a 128-byte swizzled row
static_assert(SLOT == 64 && CENTROIDS == 128, "the shape of one product");

/// What a search leaves to the finishing warps, with the maxima of the winner's places after it.
struct Found {
    float top, second;  // the best score; what no score of another row of places is above, nor that of another thread
    int column;         // of the first of the winner's row of places
    float squares;      // of the row, at least
};

/// STEPS of 16 columns and GROUPS that search.
template <int STEPS_, int GROUPS_>
struct Shape {
    static constexpr int STEPS = STEPS_, GROUPS = GROUPS_, ROWS = GROUPS * SLOT, BLOCK = 128 * (GROUPS + 1);
    static constexpr int PLACES = STEPS <= 8 ? 16 : 8;
    static constexpr int BOXES = (STEPS + 3) / 4;
    // A stage of the ring is a tile, or one of its boxes where a tile is large.
    static constexpr int STAGE_BOXES = BOXES <= 2 ? BOXES : 1, PARTS = BOXES / STAGE_BOXES;
    static constexpr int SLOT_BYTES = SLOT * BOX * 2 * BOXES, STAGE_BYTES = CENTROIDS * BOX * 2 * STAGE_BOXES;
    static constexpr int VECTOR_BYTES = CENTROIDS * 4;
    static constexpr int FOUND_BYTES = sizeof(Found) + PLACES * sizeof(float);
    // What is not the ring: alignment, rows, at most eight tiles' `start` and `scale` and the zeros, what is found, and
    // barriers.
    static constexpr int FIXED_BYTES = 1024 + GROUPS * SLOT_BYTES + 17 * VECTOR_BYTES + ROWS * FOUND_BYTES + 256;
    static constexpr int FIT = (SM90_SHARED - FIXED_BYTES) / STAGE_BYTES, STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 2, "one to fill while another is read");
    // Of `start` and `scale`. A tile in parts lets go of them while its scores are not yet reduced, but by the time
    // that the first part of the fourth tile after it is brought, all groups are past it.
    static constexpr int VECTORS = PARTS == 1 ? STAGES : 4;
    // With a tile in the ring, one group multiplies it while others reduce. Else all go through its parts together.
    static constexpr bool TURNS = STAGES > PARTS;
    // What a block is given at its start, split between the roles; `setmaxnreg` deals in eights.
    static constexpr int REGISTERS = 65536 / BLOCK / 8 * 8 * (GROUPS + 1);
    static constexpr int FEW = GROUPS == 2 ? 40 : STEPS == 16 ? 32 : 56;  // what the others can spare
    static constexpr int MANY = (REGISTERS - FEW) / GROUPS / 8 * 8;
};

/// Of the four threads that share a row, the first with the best score leaves what is known.
template <int PLACES>
__device__ __forceinline__ void leave(const Search<PLACES>& found, uint32_t to, float squares, int lane) {
    const float best = fmaxf(found.top, __shfl_xor_sync(~0u, found.top, 1));
    const float most = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
    const uint32_t level = __ballot_sync(~0u, found.top == most) >> (lane & ~3) & 15;
    const bool first = (level & ((2 << lane % 4) - 1)) == 1 << lane % 4;
    float others = first ? found.second : found.top;
    others = fmaxf(others, __shfl_xor_sync(~0u, others, 1));
    others = fmaxf(others, __shfl_xor_sync(~0u, others, 2));
    if (!first) return;
    store_shared(to, most, others, __int_as_float(found.column), squares);
#pragma unroll
    for (int p = 0; p < PLACES; p += 4) {
        const float* best = found.best_of + p;
        store_shared(to + sizeof(Found) + 4 * p, best[0], best[1], best[2], best[3]);
    }
}

/// The parts of shared memory, as addresses.
template <class S>
struct Shared {
    uint32_t rows, ring, start, scale, zeros, found, barriers;

    __device__ explicit Shared(const uint8_t* raw) {
        rows = (shared_address(raw) + 1023) / 1024 * 1024, ring = rows + S::GROUPS * S::SLOT_BYTES;
        start = ring + S::STAGES * S::STAGE_BYTES, scale = start + S::VECTORS * S::VECTOR_BYTES;
        zeros = scale + S::VECTORS * S::VECTOR_BYTES, found = zeros + S::VECTOR_BYTES;
        barriers = found + S::ROWS * S::FOUND_BYTES;
    }
    /// A stage of the ring has its bytes; its readers are done.
    __device__ uint32_t full(int stage) const { return barriers + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return full(S::STAGES + stage); }
    /// The rows of a group have come; have been taken.
    __device__ uint32_t rows_full(int group) const { return full(2 * S::STAGES + group); }
    __device__ uint32_t rows_empty(int group) const { return rows_full(S::GROUPS + group); }
    /// What a group has found stands there; is read.
    __device__ uint32_t found_full(int group) const { return rows_empty(S::GROUPS + group); }
    __device__ uint32_t found_empty(int group) const { return found_full(S::GROUPS + group); }

    __device__ void init() const {
        for (int i = 0; i < S::STAGES; ++i) barrier_init(full(i), 1), barrier_init(empty(i), 4 * S::GROUPS);
        for (int g = 0; g < S::GROUPS; ++g) {
            barrier_init(rows_full(g), 1), barrier_init(rows_empty(g), 4);
            barrier_init(found_full(g), 4), barrier_init(found_empty(g), FINISHERS);
        }
        for (int i = 0; i < S::VECTOR_BYTES; i += 16) store_shared(zeros + i, 0, 0, 0, 0);
        barrier_init_done();
    }
};

/// A place in a ring of `SIZE`, and the parity of its barriers there.
template <int SIZE>
struct Place {
    int at = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == SIZE) at = 0, parity ^= 1;
    }
};

/// Whether all centroids of a problem stay in the ring.
template <class S>
__device__ __forceinline__ bool stays(int tiles) {
    return S::PARTS == 1 && tiles <= S::STAGES;
}

/// Walks the block's share of the row tiles of all problems: neighbours if centroids stay, else far apart, so that all
/// blocks want the same centroids at a time.
template <class S>
struct Tiles {
    int left;  // to come, this one included
    int per_problem, at, tile, problems_step, tiles_step;

    __device__ Tiles(const Rows& r, const Active& active, bool neighbours)
        : per_problem((r.n + S::ROWS - 1) / S::ROWS) {
        const int64_t all = active.problems(r.b) * per_problem, step = neighbours ? 1 : gridDim.x;
        const int64_t first = neighbours ? all * blockIdx.x / gridDim.x : blockIdx.x;
        const int64_t end = neighbours ? all * (blockIdx.x + 1) / gridDim.x : all;
        left = (end - first + step - 1) / step;
        at = first / per_problem, tile = first % per_problem;
        problems_step = step / per_problem, tiles_step = step % per_problem;
    }
    __device__ __forceinline__ bool more() const { return left > 0; }
    __device__ __forceinline__ void next() {
        --left, at += problems_step, tile += tiles_step;
        if (tile >= per_problem) tile -= per_problem, ++at;
    }
    __device__ __forceinline__ int first_row() const { return tile * S::ROWS; }
    /// Of `copies` of centroids, the one for this tile.
    __device__ __forceinline__ int copy(int64_t copies) const { return copies > 1 ? at : 0; }
    /// Whether no later tile of a walk over neighbours wants the same centroids.
    __device__ __forceinline__ bool last_of_copy(int64_t copies) const {
        return left == 1 || (copies > 1 && tile + 1 == per_problem);
    }
};

// ---- Two threads feed.

template <class S>
__device__ void feed_rows(const Shared<S>& s, const CUtensorMap* map, const Rows& r, const Active& active, bool scratch,
                          int tiles) {
    int parity = 1;
    for (Tiles<S> work(r, active, stays<S>(tiles)); work.more(); work.next(), parity ^= 1) {
        const int problem = scratch ? work.at : active.problem(work.at);
        for (int group = 0; group < S::GROUPS; ++group) {
            const uint32_t to = s.rows + group * S::SLOT_BYTES;
            barrier_wait(s.rows_empty(group), parity);
            barrier_expect(s.rows_full(group), S::SLOT_BYTES);
            for (int box = 0; box < S::BOXES; ++box) {
                copy_box(to + box * SLOT * 128, map, s.rows_full(group), box * BOX, work.first_row() + group * SLOT,
                         problem);
            }
        }
    }
}

template <class S>
__device__ void feed_centroids(const Shared<S>& s, const CUtensorMap* map, const Rows& r, const Active& active,
                               const float* start, const float* scale, int tiles, int64_t padded, int64_t copies) {
    const int vectors = (scale ? 2 : 1) * S::VECTOR_BYTES;
    const bool stay = stays<S>(tiles);
    Place<S::STAGES> stage;
    Place<S::VECTORS> vector;
    int there = -1;
    for (Tiles<S> work(r, active, stay); work.more(); work.next()) {
        const int copy = work.copy(copies);
        if (stay && copy == there) continue;
        there = copy;
        for (int t = 0; t < tiles; ++t, vector.next()) {
            for (int part = 0; part < S::PARTS; ++part, stage.next()) {
                const uint32_t full = s.full(stage.at), to = s.ring + stage.at * S::STAGE_BYTES;
                barrier_wait(s.empty(stage.at), stage.parity ^ 1);
                barrier_expect(full, S::STAGE_BYTES + (part == 0 ? vectors : 0));
                for (int box = 0; box < S::STAGE_BOXES; ++box) {
                    copy_box(to + box * CENTROIDS * 128, map, full, (part * S::STAGE_BOXES + box) * BOX, t * CENTROIDS,
                             copy);
                }
                if (part) continue;
                const int64_t at = copy * padded + t * CENTROIDS;
                copy_bytes(s.start + vector.at * S::VECTOR_BYTES, start + at, S::VECTOR_BYTES, full);
                if (scale) copy_bytes(s.scale + vector.at * S::VECTOR_BYTES, scale + at, S::VECTOR_BYTES, full);
            }
        }
    }
}

// ---- The other warpgroups search. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and of a tile the
// columns 8 j + 2 (lane % 4) and the next, j < 16.

template <class S>
__device__ __forceinline__ void load_rows(uint32_t (&a)[S::STEPS][4], uint32_t slot, int warp, int lane) {
    const int row = warp * 16 + (lane & 15);
    const uint32_t first = slot + row * 128 + ((lane >> 4 ^ (row & 7)) << 4);
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
        load_fragment(a[step], (first ^ step % 4 * 32) + (step / 4) * (SLOT * 128));
    }
}

template <int SCORES>
__device__ __forceinline__ void begin(float (&acc)[SCORES], uint32_t start) {
#pragma unroll
    for (int j = 0; j < SCORES / 4; ++j) {
        const float2 v = load_floats(start + 32 * j);
        acc[4 * j] = acc[4 * j + 2] = v.x, acc[4 * j + 1] = acc[4 * j + 3] = v.y;
    }
}

template <int SCORES>
__device__ __forceinline__ void rescale(float (&acc)[SCORES], uint32_t start, uint32_t scale) {
#pragma unroll
    for (int j = 0; j < SCORES / 4; ++j) {
        const float2 u = load_floats(start + 32 * j), v = load_floats(scale + 32 * j);
        acc[4 * j] = fmaf(acc[4 * j], v.x, u.x), acc[4 * j + 1] = fmaf(acc[4 * j + 1], v.y, u.y);
        acc[4 * j + 2] = fmaf(acc[4 * j + 2], v.x, u.x), acc[4 * j + 3] = fmaf(acc[4 * j + 3], v.y, u.y);
    }
}

template <int COUNT, int SCORES, int PLACES>
__device__ __forceinline__ void reduce_some(const float (&acc)[SCORES], int first, int column, Search<PLACES>& low,
                                            Search<PLACES>& high) {
    float u[COUNT], v[COUNT];
#pragma unroll
    for (int p = 0; p < COUNT; ++p) {
        const int at = (first + p) / 2 * 4 + p % 2;
        u[p] = acc[at], v[p] = acc[at + 2];
    }
    low.add(u, column + 4 * first);
    high.add(v, column + 4 * first);
}

template <int SCORES, int PLACES>
__device__ __forceinline__ void reduce(const float (&acc)[SCORES], int column, Search<PLACES>& low,
                                       Search<PLACES>& high) {
    constexpr int WHOLE = SCORES / 2 / PLACES * PLACES;
#pragma unroll
    for (int first = 0; first < WHOLE; first += PLACES) reduce_some<PLACES>(acc, first, column, low, high);
    if constexpr (WHOLE < SCORES / 2) reduce_some<SCORES / 2 - WHOLE>(acc, WHOLE, column, low, high);
}

/// At least the sums of squares of the thread's two rows. 16 additions in the rows' own type lose at most 16 units of
/// its roundoff (0.8 % for f16, 6.5 % for bf16), and what underflows in f16 is at most d 2^-25, 0.4 % of LEAST. Sums
/// out of range, which show, are added up again in f32.
template <class T, int STEPS>
__device__ __forceinline__ void squares_of(const uint32_t (&a)[STEPS][4], float (&squares)[2]) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    constexpr float LEAST = std::is_same_v<T, __half> ? 0x1p-8f : 0x1p-100f;
    constexpr float LOST = std::is_same_v<T, __half> ? 1.02f : 1.07f;
    const auto over_quad = [](float v) {
        v += __shfl_xor_sync(~0u, v, 1);
        return v + __shfl_xor_sync(~0u, v, 2);
    };
    bool fits = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum = 0;
#pragma unroll
        for (int first = 0; first < STEPS; first += 8) {
            uint32_t pair = 0;
#pragma unroll
            for (int step = first; step < STEPS && step < first + 8; ++step) {
#pragma unroll
                for (int half = 0; half < 4; half += 2) {
                    const Pair v = reinterpret_cast<const Pair&>(a[step][i + half]);
                    const Pair added = __hfma2(v, v, reinterpret_cast<Pair&>(pair));
                    pair = reinterpret_cast<const uint32_t&>(added);
                }
            }
            const float2 two = wide_pair(pair, T());
            sum += two.x + two.y;
        }
        squares[i] = LOST * over_quad(sum);
        fits &= squares[i] >= LEAST && squares[i] < INFINITY;
    }
    if (__all_sync(~0u, fits)) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float sum = 0;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const float2 u = wide_pair(a[step][i], T()), v = wide_pair(a[step][i + 2], T());
            sum = fmaf(u.x, u.x, fmaf(u.y, u.y, fmaf(v.x, v.x, fmaf(v.y, v.y, sum))));
        }
        squares[i] = over_quad(sum);
    }
}

/// One searching group.
template <class T, class S>
struct Group {
    const Shared<S>& s;
    const bool scaled;
    const int index = int(threadIdx.x) / 128 - 1, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    uint32_t rows[S::STEPS][4];
    Place<S::STAGES> stage;
    Place<S::VECTORS> vector;

    __device__ __forceinline__ void release(int at) const {
        if (lane == 0) barrier_arrive(s.empty(at));
    }

    /// Searches the next tile, of which the first WIDTH centroids count, and lets go of it unless to `keep` it.
    template <int WIDTH>
    __device__ __forceinline__ void search(int column, bool keep, Search<S::PLACES> (&found)[2]) {
        const int quad = lane % 4, mine = 1 + index, theirs = 1 + (index + 1) % S::GROUPS;
        const uint32_t start = s.start + vector.at * S::VECTOR_BYTES + 8 * quad;
        float acc[WIDTH / 2];
        Place<S::STAGES> done = stage;
        barrier_wait(s.full(stage.at), stage.parity);
        begin(acc, scaled ? s.zeros + 8 * quad : start);
        if (S::TURNS) take_turn(mine, 256);
        pin(acc);
        products_fence();
#pragma unroll
        for (int part = 0; part < S::PARTS; ++part, stage.next()) {
            if (part) barrier_wait(s.full(stage.at), stage.parity);
#pragma unroll
            for (int step = 0; step < 4 * S::STAGE_BOXES && part * 4 * S::STAGE_BOXES + step < S::STEPS; ++step) {
                const uint32_t at = s.ring + stage.at * S::STAGE_BYTES + step / 4 * (CENTROIDS * 128) + step % 4 * 32;
                multiply<T>(acc, rows[part * 4 * S::STAGE_BOXES + step], operand(at));
            }
            products_commit();
            if (part == 0) continue;
            products_wait<1>();
            release(done.at);
            done.next();
        }
        if (S::TURNS) give_turn(theirs, 256);
        products_wait<0>();
        pin(acc);
        if (scaled) {
            rescale(acc, start, s.scale + vector.at * S::VECTOR_BYTES + 8 * quad);
            fence_async();
        }
        __syncwarp();
        if (!keep) release(done.at);
        reduce(acc, column + 2 * quad, found[0], found[1]);
        vector.next();
    }
};

template <class T, class S>
__device__ void search(const Shared<S>& s, const Rows& r, const Active& active, bool scaled, int64_t k,
                       int64_t copies) {
    Group<T, S> g{s, scaled};
    // A last tile of few centroids costs a product of its own width.
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS, last = k - (tiles - 1) * CENTROIDS, whole = tiles - (last <= 96);
    const bool stay = stays<S>(tiles);
    int held = 0;
    if (S::TURNS && g.index == S::GROUPS - 1) give_turn(1, 256);
    for (Tiles<S> work(r, active, stay); work.more(); work.next(), held ^= 1) {
        barrier_wait(s.rows_full(g.index), held);
        load_rows<S>(g.rows, s.rows + g.index * S::SLOT_BYTES, g.warp, g.lane);
        float squares[2];
        squares_of<T, S::STEPS>(g.rows, squares);
        // Not before the squares: an arrival does not wait for loads under way, and the copy engine is quick.
        __syncwarp();
        if (g.lane == 0) barrier_arrive(s.rows_empty(g.index));

        Search<S::PLACES> found[2];
        const bool keep = stay && !work.last_of_copy(copies);
        const auto stage = g.stage;
        const auto vector = g.vector;
        int t = 0;
        for (; t < whole; ++t) g.template search<CENTROIDS>(t * CENTROIDS, keep, found);
        if (t < tiles) {
            if (last <= 32) g.template search<32>(t * CENTROIDS, keep, found);
            else if (last <= 64) g.template search<64>(t * CENTROIDS, keep, found);
            else g.template search<96>(t * CENTROIDS, keep, found);
        }
        if (keep) g.stage = stage, g.vector = vector;

        barrier_wait(s.found_empty(g.index), held ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = g.index * SLOT + g.warp * 16 + g.lane / 4 + i * 8;
            leave(found[i], s.found + row * S::FOUND_BYTES, squares[i], g.lane);
        }
        __syncwarp();
        if (g.lane == 0) barrier_arrive(s.found_full(g.index));
    }
    if (S::TURNS && g.index == 0) take_turn(1, 256);  // the last one given
}

// ---- Warps 2 and 3 finish, a lane to a row.

template <class S>
__device__ void finish(const Shared<S>& s, const Rows& r, const Active& active, const float* own, const Bounds* bounds,
                       int64_t padded, int64_t copies, int64_t k, const float* slack, uint32_t* labels, Listed* list,
                       uint32_t* listed) {
    const int band = (threadIdx.x / 32 - FINISH) * 32 + threadIdx.x % 32;  // the lane's row of a slot
    static_assert(FINISHERS * 32 == SLOT, "a lane to a row");
    int parity = 0;
    for (Tiles<S> work(r, active, stays<S>((k + CENTROIDS - 1) / CENTROIDS)); work.more(); work.next(), parity ^= 1) {
        const int64_t at = work.at, b = active.problem(at);
        // Read again for each row: there are few registers here.
        const Bounds& of = bounds[work.copy(copies)];
#pragma unroll 1
        for (int group = 0; group < S::GROUPS; ++group) {
            const uint32_t from = s.found + (group * SLOT + band) * S::FOUND_BYTES;
            barrier_wait(s.found_full(group), parity);
            const float4 f = load_floats4(from);
            float top = f.x, second = f.y;
            int place = 0, level = 0;
#pragma unroll
            for (int p = 0; p < S::PLACES; p += 4) {
                const float4 v = load_floats4(from + sizeof(Found) + 4 * p);
                const float best_of[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (best_of[i] == top) place = p + i, ++level;
                    else second = fmaxf(second, best_of[i]);
                }
            }
            fence_async();
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(s.found_empty(group));
            const int64_t row = work.first_row() + group * SLOT + band;
            if (row >= r.n) continue;
            // The thread's columns are pairs, eight apart. A tie may name a column that is not there.
            const int column = __float_as_int(f.z) + 8 * (place / 2) + place % 2;
            labels[b * r.n + row] = top > -INFINITY && column < k ? column : 0;
            float off = margin(f.w, r.d, of) + (slack ? __ldg(&slack[at * r.n + row]) : 0);
            const float ahead = level == 1 ? top - second : 0;
            if (ahead > off && of.inverse == 0) continue;
            const float* widened = own ? own + work.copy(copies) * padded + labels[b * r.n + row] : nullptr;
            const bool far = beyond(off, widened, f.w, r.d, of);
            if ((ahead > off && !far) || nowhere(top, f.w, of)) continue;
            list[at * r.n + atomicAdd(&listed[at], 1)] = {uint32_t(row), top - off};
        }
    }
}

template <class T, class S>
__device__ __forceinline__ void assign(const CUtensorMap* row_map, const CUtensorMap* centroid_map, const Rows& r,
                                       const Active& active, const float* start, const float* scale,
                                       const float* own, const Bounds* bounds, int64_t k, int64_t padded,
                                       int64_t copies, const float* slack, uint32_t* labels, Listed* list,
                                       uint32_t* listed) {
    extern __shared__ uint8_t raw[];
    const Shared<S> s(raw);
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS;
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<S::FEW>();
        const int warp = threadIdx.x / 32;
        if (warp >= FINISH) finish<S>(s, r, active, own, bounds, padded, copies, k, slack, labels, list, listed);
        if (threadIdx.x == 32 * FEED_ROWS) feed_rows<S>(s, row_map, r, active, slack != nullptr, tiles);
        if (threadIdx.x == 32 * FEED_CENTROIDS) {
            feed_centroids<S>(s, centroid_map, r, active, start, scale, tiles, padded, copies);
        }
    } else {
        more_registers<S::MANY>();
        search<T, S>(s, r, active, scale != nullptr, k, copies);
    }
}

#define KERNEL(name, T, steps, groups)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128 * (groups + 1), 1) assign_sm90_##steps##_##name(                  \
        const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap centroid_map, Rows r,         \
        Active active, const float* start, const float* scale, const float* own, const Bounds* bounds, int64_t k,      \
        int64_t padded, int64_t copies, const float* slack, uint32_t* labels, Listed* list, uint32_t* listed) {        \
        assign<T, Shape<steps, groups>>(&row_map, &centroid_map, r, active, start, scale, own, bounds, k, padded,      \
                                        copies, slack, labels, list, listed);                                          \
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

/// One product step, for a test of what `margin` assumes of the hardware: out[i] = start[i] + a[i].b[i] over 16
/// columns.
#define PROBE(name, T)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        probe_sm90_##name(const float* start, const T* a, const T* b, int64_t count, float* out) {                     \
        __shared__ __align__(1024) T centroids[32 * BOX];                                                              \
        for (int i = threadIdx.x; i < 32 * BOX; i += 128) centroids[i] = T(0.0f);                                      \
        for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {                                                      \
            __syncthreads();                                                                                           \
            if (threadIdx.x < 16) centroids[threadIdx.x] = b[i * 16 + threadIdx.x];                                    \
            fence_async();                                                                                             \
            __syncthreads();                                                                                           \
            float acc[16] = {};                                                                                        \
            uint32_t row[4] = {};                                                                                      \
            if (threadIdx.x == 0) acc[0] = start[i];                                                                   \
            if (threadIdx.x < 4) {                                                                                     \
                const uint32_t* pairs = reinterpret_cast<const uint32_t*>(a + i * 16);                                 \
                row[0] = pairs[threadIdx.x], row[2] = pairs[4 + threadIdx.x];                                          \
            }                                                                                                          \
            pin(acc);                                                                                                  \
            products_fence();                                                                                          \
            multiply<T>(acc, row, operand(shared_address(centroids)));                                                 \
            products_commit();                                                                                         \
            products_wait<0>();                                                                                        \
            pin(acc);                                                                                                  \
            if (threadIdx.x == 0) out[i] = acc[0];                                                                     \
        }                                                                                                              \
    }
PROBE(f16, __half)
PROBE(bf16, __nv_bfloat16)
#undef PROBE
