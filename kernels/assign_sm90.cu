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
// places bounds it from above. A label is proven if the winner is ahead of that by `margin`; rows that are not proven
// go on a list for `recheck`.
//
// Traffic of a block and tile of R rows: X once; 2 k d bytes of centroids from L2 for 2 R k d flops.
#include "ptx.cuh"
#include "tensor.cuh"

constexpr int SLOT = SM90_ROWS, CENTROIDS = SM90_CENTROIDS, SCORES = SLOT * CENTROIDS / 128;
constexpr int FEED_CENTROIDS = 0, FEED_ROWS = 1, FINISH = 2, FINISHERS = 2;  // warps of the first group
constexpr int BOX = 64;                                                      // columns of a 128-byte swizzled row
static_assert(SLOT == 64 && CENTROIDS == 128, "the shape of one product");

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
    // What is not the ring: alignment, rows, at most eight tiles' `start` and `scale` and the zeros, two places for what
    // is found, and barriers.
    static constexpr int FIXED_BYTES = 1024 + GROUPS * SLOT_BYTES + 17 * VECTOR_BYTES + 2 * ROWS * 12 + 256;
    static constexpr int FIT = (SM90_SHARED - FIXED_BYTES) / STAGE_BYTES, STAGES = FIT < 8 ? FIT : 8;
    static_assert(STAGES >= 2, "one to fill while another is read");
    // Of `start` and `scale`. A tile in parts lets go of them while its scores are not yet reduced, but by the time
    // that the first part of the fourth tile after it is brought, all groups are past it.
    static constexpr int VECTORS = PARTS == 1 ? STAGES : 4;
    // With a tile in the ring, one group multiplies it while others reduce. Else all go through its parts together.
    static constexpr bool TURNS = STAGES > PARTS;
    // What a block is given at its start, split between the roles; `setmaxnreg` deals in eights.
    static constexpr int REGISTERS = 65536 / BLOCK / 8 * 8 * (GROUPS + 1);
    static constexpr int FEW = STEPS == 16 ? 32 : 56;  // 16 steps need all the registers that there are
    static constexpr int MANY = (REGISTERS - FEW) / GROUPS / 8 * 8;
};

template <int N>
__device__ __forceinline__ float largest(const float* of) {
    if constexpr (N == 1) return of[0];
    else return fmaxf(largest<N / 2>(of), largest<N / 2>(of + N / 2));
}

/// What a search knows of a row.
template <int PLACES>
struct Search {
    float top = -INFINITY, second = -INFINITY, best_of[PLACES];
    int column = 0;  // the first of the best row of places

    __device__ __forceinline__ Search() {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_of[p] = -INFINITY;
    }

    __device__ __forceinline__ void add(const float (&score)[PLACES], int at) {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_of[p] = fmaxf(best_of[p], score[p]);
        const float most = largest<PLACES>(score);
        second = fmaxf(second, fminf(top, most));
        if (most > top) top = most, column = at;
    }

    /// Finds the winner's place. The thread's columns are pairs, eight apart.
    __device__ __forceinline__ void finish() {
        int winner = 0;
#pragma unroll
        for (int p = PLACES - 1; p >= 0; --p) winner = best_of[p] == top ? p : winner;
#pragma unroll
        for (int p = 0; p < PLACES; ++p) second = fmaxf(second, p == winner ? -INFINITY : best_of[p]);
        column += 8 * (winner / 2) + winner % 2;
    }
};

/// The best score of a row, what no other score is above, and the winner's column, which is its only if it is ahead.
struct Found {
    float top, second;
    int column;
};

__device__ __forceinline__ void store_shared(uint32_t to, Found f) {
    store_shared(to, __float_as_uint(f.top)), store_shared(to + 4, __float_as_uint(f.second));
    store_shared(to + 8, uint32_t(f.column));
}
__device__ __forceinline__ Found load_found(uint32_t from) {
    return {__uint_as_float(load_word(from)), __uint_as_float(load_word(from + 4)), int(load_word(from + 8))};
}

/// The parts of shared memory, as addresses.
template <class S>
struct Shared {
    uint32_t rows, ring, start, scale, zeros, found, barriers;

    __device__ explicit Shared(const uint8_t* raw) {
        rows = (shared_address(raw) + 1023) / 1024 * 1024, ring = rows + S::GROUPS * S::SLOT_BYTES;
        start = ring + S::STAGES * S::STAGE_BYTES, scale = start + S::VECTORS * S::VECTOR_BYTES;
        zeros = scale + S::VECTORS * S::VECTOR_BYTES, found = zeros + S::VECTOR_BYTES;
        barriers = found + 2 * S::ROWS * sizeof(Found);
    }
    /// A stage of the ring has its bytes; its readers are done.
    __device__ uint32_t full(int stage) const { return barriers + 8 * stage; }
    __device__ uint32_t empty(int stage) const { return full(S::STAGES + stage); }
    /// The rows of a group have come; have been taken.
    __device__ uint32_t rows_full(int group) const { return full(2 * S::STAGES + group); }
    __device__ uint32_t rows_empty(int group) const { return rows_full(S::GROUPS + group); }
    /// What a group has found stands in one of two places; is read.
    __device__ uint32_t found_full(int at, int group) const { return rows_full((2 + at) * S::GROUPS + group); }
    __device__ uint32_t found_empty(int at, int group) const { return found_full(2 + at, group); }

    __device__ void init() const {
        for (int i = 0; i < S::STAGES; ++i) barrier_init(full(i), 1), barrier_init(empty(i), 4 * S::GROUPS);
        for (int g = 0; g < S::GROUPS; ++g) {
            barrier_init(rows_full(g), 1), barrier_init(rows_empty(g), 4 + FINISHERS);
            for (int i = 0; i < 2; ++i) barrier_init(found_full(i, g), 4), barrier_init(found_empty(i, g), FINISHERS);
        }
        for (int i = 0; i < S::VECTOR_BYTES; i += 16) store_shared(zeros + i, {0, 0, 0, 0});
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

/// Walks the block's share of the row tiles of all problems.
template <class S>
struct Tiles {
    int64_t per_problem, all, tile;
    __device__ explicit Tiles(const Rows& r)
        : per_problem((r.n + S::ROWS - 1) / S::ROWS),
          all(r.b * per_problem),
          tile(blockIdx.x) {}
    __device__ bool more() const { return tile < all; }
    __device__ void next() { tile += gridDim.x; }
    __device__ int problem() const { return int(tile / per_problem); }
    __device__ int first_row(int problem) const { return int(tile - problem * per_problem) * S::ROWS; }
};

// ---- Two threads feed.

template <class S>
__device__ void feed_rows(const Shared<S>& s, const CUtensorMap* map, const Rows& r) {
    int parity = 1;
    for (Tiles<S> work(r); work.more(); work.next(), parity ^= 1) {
        const int b = work.problem(), first = work.first_row(b);
        for (int group = 0; group < S::GROUPS; ++group) {
            const uint32_t to = s.rows + group * S::SLOT_BYTES;
            barrier_wait(s.rows_empty(group), parity);
            barrier_expect(s.rows_full(group), S::SLOT_BYTES);
            for (int box = 0; box < S::BOXES; ++box) {
                copy_box(to + box * SLOT * 128, map, s.rows_full(group), box * BOX, first + group * SLOT, b);
            }
        }
    }
}

template <class S>
__device__ void feed_centroids(const Shared<S>& s, const CUtensorMap* map, const Rows& r, const float* start,
                               const float* scale, int64_t k, int64_t padded, int64_t copies) {
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS, vectors = (scale ? 2 : 1) * S::VECTOR_BYTES;
    Place<S::STAGES> stage;
    Place<S::VECTORS> vector;
    for (Tiles<S> work(r); work.more(); work.next()) {
        const int copy = copies > 1 ? work.problem() : 0;
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
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
        const int piece = 2 * (step % 4) + (lane >> 4);
        load_fragment(a[step], slot + (step / 4) * (SLOT * 128) + row * 128 + ((piece ^ (row & 7)) << 4));
    }
}

__device__ __forceinline__ void begin(float (&acc)[SCORES], uint32_t start) {
#pragma unroll
    for (int j = 0; j < CENTROIDS / 8; ++j) {
        const float2 v = load_floats(start + 32 * j);
        acc[4 * j] = acc[4 * j + 2] = v.x, acc[4 * j + 1] = acc[4 * j + 3] = v.y;
    }
}

__device__ __forceinline__ void rescale(float (&acc)[SCORES], uint32_t start, uint32_t scale) {
#pragma unroll
    for (int j = 0; j < CENTROIDS / 8; ++j) {
        const float2 u = load_floats(start + 32 * j), v = load_floats(scale + 32 * j);
        acc[4 * j] = fmaf(acc[4 * j], v.x, u.x), acc[4 * j + 1] = fmaf(acc[4 * j + 1], v.y, u.y);
        acc[4 * j + 2] = fmaf(acc[4 * j + 2], v.x, u.x), acc[4 * j + 3] = fmaf(acc[4 * j + 3], v.y, u.y);
    }
}

template <int PLACES>
__device__ __forceinline__ void reduce(const float (&acc)[SCORES], int column, Search<PLACES>& low,
                                       Search<PLACES>& high) {
#pragma unroll
    for (int first = 0; first < CENTROIDS / 4; first += PLACES) {
        float u[PLACES], v[PLACES];
#pragma unroll
        for (int p = 0; p < PLACES; ++p) {
            const int at = (first + p) / 2 * 4 + p % 2;
            u[p] = acc[at], v[p] = acc[at + 2];
        }
        low.add(u, column + 4 * first);
        high.add(v, column + 4 * first);
    }
}

template <class T, class S>
__device__ void search(const Shared<S>& s, const Rows& r, bool scaled, int64_t k) {
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, quad = lane % 4;
    const int mine = 1 + group, theirs = 1 + (group + 1) % S::GROUPS, tiles = (k + CENTROIDS - 1) / CENTROIDS;
    float acc[SCORES];
    uint32_t rows[S::STEPS][4];
    Place<S::STAGES> stage;
    Place<S::VECTORS> vector;
    Place<2> out;
    int held = 0;
    if (S::TURNS && group == S::GROUPS - 1) give_turn(1, 256);
    for (Tiles<S> work(r); work.more(); work.next(), out.next(), held ^= 1) {
        barrier_wait(s.rows_full(group), held);
        load_rows<S>(rows, s.rows + group * S::SLOT_BYTES, warp, lane);
        __syncwarp();
        if (lane == 0) barrier_arrive(s.rows_empty(group));

        Search<S::PLACES> found[2];
        for (int t = 0; t < tiles; ++t, vector.next()) {
            const uint32_t start = s.start + vector.at * S::VECTOR_BYTES + 8 * quad;
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
                    const uint32_t at =
                        s.ring + stage.at * S::STAGE_BYTES + step / 4 * (CENTROIDS * 128) + step % 4 * 32;
                    multiply<T>(acc, rows[part * 4 * S::STAGE_BOXES + step], operand(at));
                }
                products_commit();
                if (part == 0) continue;
                products_wait<1>();
                if (lane == 0) barrier_arrive(s.empty(done.at));
                done.next();
            }
            if (S::TURNS) give_turn(theirs, 256);
            products_wait<0>();
            pin(acc);
            if (scaled) rescale(acc, start, s.scale + vector.at * S::VECTOR_BYTES + 8 * quad);
            __syncwarp();
            if (lane == 0) barrier_arrive(s.empty(done.at));
            reduce(acc, t * CENTROIDS + 2 * quad, found[0], found[1]);
        }

        barrier_wait(s.found_empty(out.at, group), out.parity ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            found[i].finish();
            float top = found[i].top, second = found[i].second;
            int column = found[i].column;
#pragma unroll
            for (int other = 1; other < 4; other *= 2) {
                const float t = __shfl_xor_sync(~0u, top, other), u = __shfl_xor_sync(~0u, second, other);
                const int c = __shfl_xor_sync(~0u, column, other);
                second = fmaxf(fmaxf(second, u), fminf(top, t));
                if (t > top || (t == top && c < column)) top = t, column = c;
            }
            const int row = group * SLOT + warp * 16 + lane / 4 + i * 8;
            if (quad == 0) store_shared(s.found + (out.at * S::ROWS + row) * sizeof(Found), Found{top, second, column});
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(s.found_full(out.at, group));
    }
    if (S::TURNS && group == 0) take_turn(1, 256);  // the last one given
}

// ---- Warps 2 and 3 finish, a lane to a row.

template <class T, class S>
__device__ __forceinline__ float sum_of_squares(uint32_t slot, int row) {
    float sums[4] = {};
#pragma unroll 4
    for (int piece = 0; piece < 2 * S::STEPS; ++piece) {
        const uint4 v = load_words(slot + (piece / 8) * (SLOT * 128) + row * 128 + ((piece % 8 ^ (row & 7)) << 4));
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 p = wide_pair(words[i], T());
            sums[i] = fmaf(p.x, p.x, fmaf(p.y, p.y, sums[i]));
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class T, class S>
__device__ void finish(const Shared<S>& s, const Rows& r, const Bounds* bounds, int64_t copies, int64_t k,
                       const float* slack, uint32_t* labels, Listed* list, uint32_t* listed) {
    const int band = (threadIdx.x / 32 - FINISH) * 32 + threadIdx.x % 32;  // the lane's row of a slot
    static_assert(FINISHERS * 32 == SLOT, "a lane to a row");
    float squares[S::GROUPS];
    int held = 0;
    Place<2> in;
    // Rows are looked at when they come, before the search of them ends and the next take their place.
    const auto look = [&](int group) {
        barrier_wait(s.rows_full(group), held);
        const float sum = sum_of_squares<T, S>(s.rows + group * S::SLOT_BYTES, band);
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(s.rows_empty(group));
        return sum;
    };
    Tiles<S> work(r);
    if (!work.more()) return;
#pragma unroll
    for (int group = 0; group < S::GROUPS; ++group) squares[group] = look(group);
    for (; work.more(); in.next()) {
        const int64_t b = work.problem();
        const int first = work.first_row(b);
        const Bounds of = bounds[copies > 1 ? b : 0];
        work.next();
        held ^= 1;
#pragma unroll
        for (int group = 0; group < S::GROUPS; ++group) {
            const float next = work.more() ? look(group) : 0;
            barrier_wait(s.found_full(in.at, group), in.parity);
            const Found f = load_found(s.found + (in.at * S::ROWS + group * SLOT + band) * sizeof(Found));
            __syncwarp();
            if (threadIdx.x % 32 == 0) barrier_arrive(s.found_empty(in.at, group));
            const int64_t row = first + group * SLOT + band;
            if (row < r.n) {
                labels[b * r.n + row] = f.column < k ? f.column : 0;  // a tie may name a column that is not there
                const float more = slack ? __ldg(&slack[b * r.n + row]) : 0;
                if (!(f.top - f.second > margin(squares[group], r.d, of, WGMMA_LOSS) + more)) {
                    list[b * r.n + atomicAdd(&listed[b], 1)] = {uint32_t(row), f.top};
                }
            }
            squares[group] = next;
        }
    }
}

template <class T, class S>
__device__ __forceinline__ void assign(const CUtensorMap* row_map, const CUtensorMap* centroid_map, const Rows& r,
                                       const float* start, const float* scale, const Bounds* bounds, int64_t k,
                                       int64_t padded, int64_t copies, const float* slack, uint32_t* labels,
                                       Listed* list, uint32_t* listed) {
    extern __shared__ uint8_t raw[];
    const Shared<S> s(raw);
    if (threadIdx.x == 0) s.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        fewer_registers<S::FEW>();
        const int warp = threadIdx.x / 32;
        if (warp >= FINISH) finish<T, S>(s, r, bounds, copies, k, slack, labels, list, listed);
        if (threadIdx.x == 32 * FEED_ROWS) feed_rows<S>(s, row_map, r);
        if (threadIdx.x == 32 * FEED_CENTROIDS) feed_centroids<S>(s, centroid_map, r, start, scale, k, padded, copies);
    } else {
        more_registers<S::MANY>();
        search<T, S>(s, r, scale != nullptr, k);
    }
}

#define KERNEL(name, T, steps, groups)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128 * (groups + 1), 1) assign_sm90_##steps##_##name(                  \
        const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap centroid_map, Rows r,         \
        const float* start, const float* scale, const Bounds* bounds, int64_t k, int64_t padded, int64_t copies,       \
        const float* slack, uint32_t* labels, Listed* list, uint32_t* listed) {                                        \
        assign<T, Shape<steps, groups>>(&row_map, &centroid_map, r, start, scale, bounds, k, padded, copies, slack,    \
                                        labels, list, listed);                                                         \
    }
// Up to 128 columns no step is wasted; above, steps come in twos and fours, for fewer kernels. Above 256 columns only
// two groups have room for their rows in registers.
#define KERNELS(name, T)                                                                                               \
    KERNEL(name, T, 1, 3)                                                                                              \
    KERNEL(name, T, 2, 3) KERNEL(name, T, 3, 3) KERNEL(name, T, 4, 3) KERNEL(name, T, 5, 3) KERNEL(name, T, 6, 3)      \
        KERNEL(name, T, 7, 3) KERNEL(name, T, 8, 3) KERNEL(name, T, 10, 3) KERNEL(name, T, 12, 3)                      \
            KERNEL(name, T, 14, 3) KERNEL(name, T, 16, 3) KERNEL(name, T, 20, 2) KERNEL(name, T, 24, 2)                \
                KERNEL(name, T, 28, 2) KERNEL(name, T, 32, 2)
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
#undef KERNELS
#undef KERNEL
