// FlashAssign on Hopper for the groups of centroids that may have a nearest one (near.cuh): assign_sm90.cu with lists.
//
// Rows lie in an order of their own, `rows`, and centroids in that of their groups, `members`; labels and lists for the
// recheck speak of both by the numbers that they have elsewhere. A tile of the ring holds two groups of a row tile's
// list, one after the other. Beside its label each row is bounded from the groups that are not its own: a thread has
// the largest score of its columns of a group, and so a lower bound of their distances, of which that of the row's own
// centroid, known once the first groups have been scored, is taken. The least of all rows of a tile is its slack.
//
// Traffic of a tile of R rows: X once; for each listed group 2 SKIP_GROUP d bytes from L2 and a number to it.
#include "assign/near.cuh"
#include "assign/sm90.cuh"
#include "assign/sm90_epilogue.cuh"
#include "assign/sm90_search.cuh"

static_assert(2 * SKIP_GROUP == CENTROIDS, "two groups to a tile");

/// A stage of the ring holds one or two groups: their first columns (none: -1), and flags of what is to be done with
/// them.
struct NearStage {
    int columns[2], flags, unused;
};
/// The list ends here; the own groups do, so that slack can be measured; slack is made of the first, and of the second.
enum NearFlags { LAST = 1, OWN_END = 2, SLACK_0 = 4, SLACK_1 = 8 };

template <class S>
struct NearShared : Shared<S> {
    uint32_t stages, mu;
    static constexpr int BYTES = S::FIXED_BYTES + S::STAGES * (S::STAGE_BYTES + int(sizeof(NearStage))) + S::STEPS * 32;
    static_assert(S::PARTS == 1 && BYTES <= SM90_SHARED, "a tile a stage, and room for what it holds");
    static_assert(S::PLACES == SKIP_GROUP / 4, "a thread's columns of a group are a row of places");

    __device__ explicit NearShared(const uint8_t* raw) : Shared<S>(raw) {
        stages = this->barriers + 256, mu = stages + S::STAGES * sizeof(NearStage);
    }
    __device__ uint32_t about(int stage) const { return stages + stage * sizeof(NearStage); }
};

/// Rows and centroids as the caller numbers them.
struct TheirNumbers {
    const uint32_t *rows, *members;
    __device__ __forceinline__ int64_t row(int64_t place) const { return rows[place]; }
    __device__ __forceinline__ uint32_t centroid(uint32_t place) const { return members[place]; }
};

/// Walks the tiles that a block has, in their order: every so many, forwards and backwards in turn.
template <class S>
struct NearScheduler {
    const uint32_t* const order;
    const int tiles;
    int place, at = 0, tile, following;

    __device__ NearScheduler(const Rows& r, const Active& active, const uint32_t* order)
        : order(order),
          tiles(active.problems(1) ? (r.n + S::ROWS - 1) / S::ROWS : 0),
          place(blockIdx.x) {
        tile = place < tiles ? order[place] : 0;
        following = load(step());
    }
    /// The distance to the next place.
    __device__ __forceinline__ int step() const {
        const int blocks = gridDim.x, round = place / blocks, block = blockIdx.x;
        return round % 2 ? 2 * block + 1 : 2 * (blocks - block) - 1;
    }
    __device__ __forceinline__ int load(int by) const { return place + by < tiles ? order[place + by] : 0; }
    __device__ __forceinline__ bool more() const { return place < tiles; }
    __device__ __forceinline__ void next() {
        place += step(), tile = following;
        following = load(step());
    }
    __device__ __forceinline__ int first_row() const { return tile * S::ROWS; }
    __device__ __forceinline__ int row(int i, int64_t n) const {
        const int row = first_row() + i;
        return row < n ? row : -1;
    }
    __device__ __forceinline__ int copy(int64_t) const { return 0; }
};

/// Brings the groups of each tile's list, two at a time: one thread does.
template <class S>
__device__ void produce_listed(const NearShared<S>& s, const CUtensorMap* map, NearScheduler<S> work,
                               const uint32_t* lists, int64_t pitch, const float* start) {
    PipelineState<S::STAGES> stage;
    const auto head_of = [&](int tile) { return __ldg(reinterpret_cast<const uint4*>(lists + tile * pitch)); };
    uint4 head = work.more() ? head_of(work.tile) : uint4{};
    while (work.more()) {
        const uint32_t* const groups = lists + work.tile * pitch + 2;
        const int own = head.x, all = head.y;
        uint32_t first = head.z, second = head.w;
        work.next();
        // The next tile's list is on its way while this tile's is brought.
        if (work.more()) head = head_of(work.tile);
        for (int i = 0; i < all; i += 2, stage.next()) {
            const bool both = i + 1 < all;
            const int end = own - 1 - i;  // which of the two is the last of the rows' own, or neither
            NearStage about{{int(first) * SKIP_GROUP, both ? int(second) * SKIP_GROUP : -1}, 0, 0};
            about.flags = (i + 2 >= all ? LAST : 0) | (end == 0 || end == 1 ? OWN_END : 0) | (end < 0 ? SLACK_0 : 0) |
                          (both && end <= 0 ? SLACK_1 : 0);
            const uint32_t full = s.full(stage.at), to = s.ring + stage.at * S::STAGE_BYTES;
            const uint32_t starts = s.start + stage.at * S::VECTOR_BYTES;
            mbarrier_wait(s.empty(stage.at), stage.parity ^ 1);
            store_shared(s.about(stage.at), __int_as_float(about.columns[0]), __int_as_float(about.columns[1]),
                         __int_as_float(about.flags), 0);
            mbarrier_expect_tx(full, (S::STAGE_BYTES + S::VECTOR_BYTES) / (both ? 1 : 2));
#pragma unroll
            for (int part = 0; part < 2; ++part) {
                if (about.columns[part] < 0) break;
                for (int box = 0; box < S::BOXES; ++box) {
                    tma_load(to + box * CENTROIDS * 128 + part * SKIP_GROUP * 128, map, full, box * BOX,
                             about.columns[part], 0);
                }
                tma_load_bytes(starts + part * SKIP_GROUP * 4, start + about.columns[part], SKIP_GROUP * 4, full);
            }
            if (i + 2 < all) first = groups[i + 2];
            if (i + 3 < all) second = groups[i + 3];
        }
    }
}

/// The sums of squares of the thread's two rows, and of what they are from mu.
template <class T, int STEPS>
__device__ __forceinline__ void norms_of(const uint32_t (&a)[STEPS][4], uint32_t mu, int quad, float (&squares)[2],
                                         float (&moved)[2]) {
    squares[0] = squares[1] = moved[0] = moved[1] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t bits;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(bits) : "r"(mu + 32 * step + 16 * half + 4 * quad));
            const float2 m = wide_pair(bits, T());
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 v = wide_pair(a[step][2 * half + i], T());
                squares[i] = fmaf(v.x, v.x, fmaf(v.y, v.y, squares[i]));
                const float2 e = {v.x - m.x, v.y - m.y};
                moved[i] = fmaf(e.x, e.x, fmaf(e.y, e.y, moved[i]));
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            squares[i] += __shfl_xor_sync(~0u, squares[i], lanes), moved[i] += __shfl_xor_sync(~0u, moved[i], lanes);
        }
    }
}

__device__ __forceinline__ float root(float v) {
    float out;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(v));
    return out;
}

/// Bounds on the distances of a row to centroids, from their scores. With y = |x - mu|^2, the squared distance to a
/// centroid with the score s is y - 2 (s - shift) (tensor.cuh); y is rounded, and scores are off by half the row's
/// error bound.
struct RowDistance {
    float most, least;  // twice a score is taken from these for an upper bound of a squared distance, and a lower one
    float own;          // at least the distance to the row's own centroid, once that is known

    __device__ __forceinline__ RowDistance(float squares, float moved, int64_t d, const Bounds& bounds, bool counts) {
        const float room = 1 + (d + 16) * 0x1p-23f, tiny = 1e-37f * d;
        const float error = error_bound(squares * room + tiny, d, bounds), shift = 2 * bounds.shift(d);
        const bool far = !(squares < 1e36f);
        most = fmaf(moved, room, tiny + shift) + error, least = moved * (2 - room) + shift - error - tiny;
        // Sums of that size have been rounded, too.
        const float rounding = 0x1p-21f * (moved + shift + error);
        most += rounding, least -= rounding;
        // Rows without a bound, which the recheck always sees, bound nothing, as places beyond the last row do not.
        own = !counts || far ? -INFINITY : INFINITY;
        if (bounds.inverse > 0) most = INFINITY;
    }
    __device__ __forceinline__ void settle(float score) {
        // An unused row stays as it is.
        if (own > 0) own = root(fmaxf(fmaf(-2, score, most), 0)) * (1 + 0x1p-20f);
    }
    /// At most how much farther than that a centroid with this score is: at least 0, since no distance is less than the
    /// row's own.
    __device__ __forceinline__ float slack(int key) const {
        const float score = __int_as_float(max(key, 0));
        return fmaxf(fmaf(root(fmaxf(fmaf(-2, score, least), 0)), 1 - 0x1p-20f, -own), 0);
    }
};

/// One warpgroup that searches listed groups (`Consumer` of sm90_search.cuh).
template <class T, class S>
struct NearConsumer {
    const NearShared<S>& s;
    const int index = int(threadIdx.x) / 128 - 1, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    uint32_t rows[S::STEPS][4];
    PipelineState<S::STAGES> stage;

    /// Searches the next stage, and makes slack of the groups that are not the rows' own.
    template <int WIDTH>
    __device__ __forceinline__ void search(const int4& about, KeySearch<S::PLACES> (&found)[2], RowDistance (&from)[2],
                                           uint32_t* slack) {
        const int quad = lane % 4, own_turn = 1 + index, next_turn = 1 + (index + 1) % S::GROUPS;
        float acc[WIDTH / 2];
        begin(acc, s.start + stage.at * S::VECTOR_BYTES + 8 * quad);
        named_barrier_sync(own_turn, 256);
        pin(acc);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < S::STEPS; ++step) {
            const uint32_t at = s.ring + stage.at * S::STAGE_BYTES + step / 4 * (CENTROIDS * 128) + step % 4 * 32;
            wgmma<T>(acc, rows[step], matrix_descriptor(at));
        }
        wgmma_commit();
        named_barrier_arrive(next_turn, 256);
        wgmma_wait<0>();
        pin(acc);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(s.empty(stage.at));
        int most[2][2];  // of both rows, of each group
        const int first = about.x + 2 * quad, second = about.y + 2 * quad;
        int u[S::PLACES], v[S::PLACES];
        keys_of(acc, 0, u, v);
        if constexpr (WIDTH == CENTROIDS) {
            int u_next[S::PLACES], v_next[S::PLACES];
            keys_of(acc, S::PLACES, u_next, v_next);
            const int2 low = found[0].add(u, first, u_next, second), high = found[1].add(v, first, v_next, second);
            most[0][0] = low.x, most[0][1] = low.y, most[1][0] = high.x, most[1][1] = high.y;
        } else {
            most[0][0] = found[0].add(u, first), most[1][0] = found[1].add(v, first);
        }
        if (about.z & OWN_END) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int best = max(found[i].top, __shfl_xor_sync(~0u, found[i].top, 1));
                from[i].settle(__int_as_float(max(best, __shfl_xor_sync(~0u, best, 2))));
            }
        }
#pragma unroll
        for (int part = 0; part < WIDTH / SKIP_GROUP; ++part) {
            if (!(about.z & (part ? SLACK_1 : SLACK_0))) continue;
            // No less than zero: their order is that of their bits.
            const float least = fminf(from[0].slack(most[0][part]), from[1].slack(most[1][part]));
            const uint32_t of_warp = __reduce_min_sync(~0u, __float_as_uint(least));
            if (lane == 0) atomicMin(slack + (part ? about.y : about.x) / SKIP_GROUP, of_warp);
        }
        stage.next();
    }
};

template <class T, class S>
__device__ void search_listed(const NearShared<S>& s, const Rows& r, NearScheduler<S> work, const Bounds* bounds,
                              int64_t groups, uint32_t* slack) {
    NearConsumer<T, S> g{s};
    int held = 0;
    if (g.index == S::GROUPS - 1) named_barrier_arrive(1, 256);
    for (; work.more(); work.next(), held ^= 1) {
        mbarrier_wait(s.rows_full(g.index), held);
        load_rows<S>(g.rows, s.rows + g.index * S::SLOT_BYTES, g.warp, g.lane);
        float squares[2], moved[2];
        norms_of<T>(g.rows, s.mu, g.lane % 4, squares, moved);
        __syncwarp();
        if (g.lane == 0) mbarrier_arrive(s.rows_empty(g.index));
        const int row = g.index * SLOT + g.warp * 16 + g.lane / 4;
        RowDistance from[2] = {{squares[0], moved[0], r.d, *bounds, work.row(row, r.n) >= 0},
                               {squares[1], moved[1], r.d, *bounds, work.row(row + 8, r.n) >= 0}};
        KeySearch<S::PLACES> found[2];
        uint32_t* const of_tile = slack + work.tile * groups;
        for (bool last = false; !last;) {
            mbarrier_wait(s.full(g.stage.at), g.stage.parity);
            const float4 v = load_floats4(s.about(g.stage.at));
            const int4 about = {__float_as_int(v.x), __float_as_int(v.y), __float_as_int(v.z), 0};
            last = about.z & LAST;
            if (about.y >= 0) g.template search<CENTROIDS>(about, found, from, of_tile);
            else g.template search<SKIP_GROUP>(about, found, from, of_tile);
        }
        mbarrier_wait(s.found_empty(g.index), held ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            // At least the sum of squares, as `error_bound` wants it.
            const float above = squares[i] * (1 + (r.d + 16) * 0x1p-23f);
            publish(found[i], s.found + (row + i * 8) * S::RESULT_BYTES, above, g.lane);
        }
        __syncwarp();
        if (g.lane == 0) mbarrier_arrive(s.found_full(g.index));
    }
    if (g.index == 0) named_barrier_sync(1, 256);  // the last one given
}

template <class T, class S>
__device__ __forceinline__ void assign_near(const CUtensorMap* row_map, const CUtensorMap* centroid_map, const Rows& r,
                                            const Active& active, const uint32_t* rows, const uint32_t* members,
                                            const uint32_t* lists, const uint32_t* tile_order, const float* start,
                                            const float* own, const T* mu, const Bounds* bounds, int64_t padded,
                                            int64_t places, uint32_t* slack, uint32_t* labels, UnprovenRow* list,
                                            uint32_t* listed) {
    extern __shared__ uint8_t raw[];
    const NearShared<S> s(raw);
    const int64_t groups = places / SKIP_GROUP;
    if (threadIdx.x == 0) s.init();
    for (int i = threadIdx.x; i < 8 * S::STEPS; i += blockDim.x) {
        const T pair[2] = {2 * i < r.d ? mu[2 * i] : T(0.0f), 2 * i + 1 < r.d ? mu[2 * i + 1] : T(0.0f)};
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(s.mu + 4 * i), "r"(*reinterpret_cast<const uint32_t*>(pair)));
    }
    __syncthreads();
    const NearScheduler<S> work(r, active, tile_order);
    if (threadIdx.x < 128) {
        setmaxnreg_dec<S::PRODUCER_REGISTERS>();
        const int warp = threadIdx.x / 32;
        if (warp >= EPILOGUE)
            epilogue(s, work, active, own, bounds, padded, 1, places, r.n, r.d, nullptr, labels, list, listed,
                     TheirNumbers{rows, members});
        if (threadIdx.x == 32 * PRODUCE_ROWS) produce_rows(s, row_map, work, active, true);
        if (threadIdx.x == 32 * PRODUCE_CENTROIDS)
            produce_listed(s, centroid_map, work, lists, near_pitch(groups), start);
    } else {
        setmaxnreg_inc<S::CONSUMER_REGISTERS>();
        search_listed<T, S>(s, r, work, bounds, groups, slack);
    }
}

#define KERNEL(name, T, steps)                                                                                         \
    extern "C" __global__ void __launch_bounds__(512, 1) assign_near_##steps##_##name(                                 \
        const __grid_constant__ CUtensorMap row_map, const __grid_constant__ CUtensorMap centroid_map, Rows r,         \
        Active active, const uint32_t* rows, const uint32_t* members, const uint32_t* lists,                           \
        const uint32_t* tile_order, const float* start, const float* own, const T* mu, const Bounds* bounds,           \
        int64_t padded, int64_t places, uint32_t* slack, uint32_t* labels, UnprovenRow* list, uint32_t* listed) {      \
        assign_near<T, Shape<steps, 3>>(&row_map, &centroid_map, r, active, rows, members, lists, tile_order, start,   \
                                        own, mu, bounds, padded, places, slack, labels, list, listed);                 \
    }
#define KERNELS(name, T)                                                                                               \
    KERNEL(name, T, 1)                                                                                                 \
    KERNEL(name, T, 2)                                                                                                 \
    KERNEL(name, T, 3)                                                                                                 \
    KERNEL(name, T, 4) KERNEL(name, T, 5) KERNEL(name, T, 6) KERNEL(name, T, 7) KERNEL(name, T, 8)
KERNELS(f16, __half)
KERNELS(bf16, __nv_bfloat16)
#undef KERNELS
#undef KERNEL
