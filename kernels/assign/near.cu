// Kernels around the pass over near groups (near.cuh). They find how far centroids have moved, bring them into the
// order of their groups, and rows into one of tiles of neighbours, and list the groups that tiles score.
//
// Traffic: centroids three times; per row, its label and its number; per tile and group, its slack twice.
#include "assign/moved.cuh"
#include "assign/near.cuh"
#include "scan.cuh"

constexpr int GATHER_THREADS = 512;

/// Does `use(i, value(i))` for all i below n, by one block, with the values of a few of a thread's loaded first.
template <class Value, class Use>
__device__ __forceinline__ void in_batches(int64_t n, Value value, Use use) {
    constexpr int EACH = 8;
    for (int64_t first = threadIdx.x; first < n; first += EACH * blockDim.x) {
        decltype(value(0)) values[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) values[i] = value(min(first + i * int64_t(blockDim.x), n - 1));
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t at = first + i * int64_t(blockDim.x);
            if (at < n) use(at, values[i]);
        }
    }
}

/// A block to each group: copies its centroids as they are scored to places side by side, and finds how far each has
/// moved since the last time: not at all where groups are fresh. A group with a centroid that no score speaks of
/// (tensor.cuh: at distance +inf, out of reach, or repeated) is silent: it bounds nothing.
template <class T>
__device__ void gather(const T* c, const Rows& cr, const Active& active, const uint32_t* members, const T* moved,
                       const float* start, int64_t pitch, const NearState* state, T* last, T* near_moved,
                       float* near_start, float* move, uint32_t* silent) {
    constexpr int LANES = MOVE_LANES;
    static_assert(SKIP_GROUP * LANES == GATHER_THREADS, "eight lanes to a centroid");
    const int part = threadIdx.x % LANES;
    if (active.problems(1) == 0) return;
    const int64_t place = blockIdx.x * SKIP_GROUP + threadIdx.x / LANES;
    const bool live = place < cr.n;
    const uint32_t id = live ? members[place] : 0;
    float squares = 0;
    // Two at a time, so that one does not wait for the other's loads.
    for (int64_t first = part; first < pitch / PIECE; first += 2 * LANES) {
        uint4 now[2] = {}, was[2] = {}, scored[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t piece = first + i * LANES;
            if (!live || piece >= pitch / PIECE) continue;
            now[i] = load_piece(c + id * cr.row_stride, piece * PIECE, cr.d);
            was[i] = state->fresh ? now[i] : reinterpret_cast<const uint4*>(last + id * pitch)[piece];
            scored[i] = reinterpret_cast<const uint4*>(moved + id * pitch)[piece];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t piece = first + i * LANES;
            if (piece >= pitch / PIECE) continue;
            float u[PIECE], v[PIECE];
            widen<T>(u, now[i]), widen<T>(v, was[i]);
#pragma unroll
            for (int q = 0; q < PIECE; ++q) squares = fmaf(u[q] - v[q], u[q] - v[q], squares);
            if (live) reinterpret_cast<uint4*>(last + id * pitch)[piece] = now[i];
            reinterpret_cast<uint4*>(near_moved + place * pitch)[piece] = scored[i];
        }
    }
    for (int lane = LANES / 2; lane; lane /= 2) squares += __shfl_xor_sync(~0u, squares, lane);
    const float from = live ? start[id] : -INFINITY, norm = row_norm_above(squares, cr.d);
    if (part == 0) {
        near_start[place] = from;
        if (live) move[id] = norm < INFINITY ? norm : INFINITY;
    }
    const int quiet = __syncthreads_or(live && !(from > -INFINITY));
    // Silence lasts for the next iteration, too, whose bounds come from this one.
    if (threadIdx.x == 0) silent[blockIdx.x] = (silent[blockIdx.x] << 1 & 2) | (quiet ? 1 : 0);
}

/// One block: the restless centroids are those that have moved farthest, as many as there are places for at most. They
/// are scored by all tiles, from places of their own behind those of the groups, and do not count for the moves of
/// their groups. `place` becomes that of each centroid. Of a group that one comes back to, `joined`, slack does not
/// know it.
template <class T>
__device__ void separate(const Active& active, int64_t k, const uint32_t* rank, const float* move, int64_t groups,
                         int64_t restless, int64_t pitch, const NearState* state, T* near_moved, float* near_start,
                         const uint32_t* silent, uint32_t* members, uint32_t* place, float* group_move,
                         uint32_t* joined) {
    __shared__ uint32_t bins[256], level, above, taken;
    if (active.problems(1) == 0) return;
    const int64_t begin = groups * SKIP_GROUP, places = restless * SKIP_GROUP;
    const bool fresh = state->fresh;
    for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) group_move[g] = 0, joined[g] = 0;
    for (int64_t i = threadIdx.x; i < places; i += blockDim.x)
        near_start[begin + i] = -INFINITY, members[begin + i] = 0;
    if (threadIdx.x == 0) level = above = taken = 0;
    // The lowest level that no more moves reach than there are places for, in two digits of eight bits: the order of
    // floats that are not negative is that of their bits.
    for (int shift = 23; shift >= 15; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
        __syncthreads();
        const uint32_t prefix = level;
        in_batches(
            k, [&](int64_t j) { return __float_as_uint(move[j]); },
            [&](int64_t, uint32_t key) {
                if (key >> 8 >> shift == prefix >> 8 >> shift) atomicAdd(&bins[key >> shift & 255], 1);
            });
        __syncthreads();
        if (threadIdx.x < WARP) {
            // A lane sums eight digits, the lowest lane the highest ones.
            uint32_t own = 0;
            for (int i = 0; i < 8; ++i) own += bins[255 - 8 * threadIdx.x - i];
            uint32_t reach = above + warp_scan(own) - own;
            for (int i = 0; i < 8; ++i) {
                const uint32_t digit = 255 - 8 * threadIdx.x - i, more = bins[digit];
                if (reach <= places && reach + more > places) level = prefix | digit << shift, above = reach;
                reach += more;
            }
        }
        __syncthreads();
    }
    const uint32_t least = level + (1u << 15);
    in_batches(
        k, [&](int64_t j) { return make_uint3(__float_as_uint(move[j]), rank[j], place[j]); },
        [&](int64_t j, uint3 of) {
            const uint32_t group = of.y / SKIP_GROUP;
            if (of.x >= least) {
                const int64_t to = begin + atomicAdd(&taken, 1);
                near_start[to] = near_start[of.y], near_start[of.y] = -INFINITY;
                members[to] = j, place[j] = to;
            } else {
                atomicMax(reinterpret_cast<uint32_t*>(&group_move[group]), of.x);
                if (!fresh && of.z >= begin) joined[group] = 1;
                place[j] = of.y;
            }
        });
    __syncthreads();
    for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
        if (silent[g]) group_move[g] = INFINITY;
    }
    const int64_t pieces = pitch / PIECE;
    uint4* const rows = reinterpret_cast<uint4*>(near_moved);
    for (int64_t i = threadIdx.x; i < places * pieces; i += blockDim.x) {
        const int64_t to = begin + i / pieces;
        rows[to * pieces + i % pieces] = i / pieces < taken ? rows[rank[members[to]] * pieces + i % pieces] : uint4{};
    }
}

/// Per row, the place of its centroid.
__device__ void places(const uint32_t* labels, const uint32_t* rank, const Active& active, int64_t n, uint32_t* out) {
    if (active.problems(1) == 0) return;
    for (int64_t i = global_thread(); i < n; i += all_threads()) out[i] = rank[labels[i]];
}

/// Copies the rows in the order in which tiles take them.
template <class T>
__device__ void reorder(const T* x, const Rows& r, const Active& active, const uint32_t* order, int64_t pitch, T* out) {
    if (active.problems(1) == 0) return;
    const int64_t pieces = pitch / PIECE, all = r.n * pieces;
    for (int64_t i = global_thread(); i < all; i += all_threads()) {
        const int64_t row = i / pieces, piece = i % pieces;
        reinterpret_cast<uint4*>(out + row * pitch)[piece] =
            load_piece(x + order[row] * r.row_stride, piece * PIECE, r.d);
    }
}

/// Counts the rows that have changed their label.
__device__ void changes(const uint32_t* labels, const uint32_t* was, const Active& active, int64_t n,
                        NearState* state) {
    if (active.problems(1) == 0) return;
    uint32_t changed = 0;
    for (int64_t i = global_thread(); i < n; i += all_threads()) changed += labels[i] != was[i];
    changed = __reduce_add_sync(~0u, changed);
    if (threadIdx.x % WARP == 0 && changed) atomicAdd(&state->changed, changed);
}

/// Groups are made again after so many assignments with long lists.
constexpr uint32_t STALE = 4;
/// Each time that groups have been of no use, the share of rows that may change falls by this power of two.
constexpr int PATIENCE = 3;

/// Decides what the assignment does. Groups are made where at most a share of `few` rows change their label, so that
/// slack will last; again, once lists have become long.
__device__ void begin(const Active& active, int64_t n, bool may_regroup, float few, NearState* state) {
    const bool lives = active.problems(1) > 0;
    const bool calm = state->changed <= ldexpf(few, -PATIENCE * int(state->failures)) * n;
    const bool regroup = lives && may_regroup && calm && (!state->on || state->crowded >= STALE);
    state->on |= regroup, state->fresh = state->regroup = regroup;
    state->going = lives && state->on, state->near = 0, state->all = lives && !state->on;
    state->changed = 0;
}

/// A larger share of all groups makes lists long.
constexpr float CROWDED = 0.125f;
constexpr int LENGTHS = 256;

/// Sorts the tiles by the lengths of their lists, longest first, so that blocks which take every so many have about as
/// much to do.
__device__ void order_tiles(const uint32_t* lists, int64_t pitch, int64_t tiles, int64_t all, uint32_t* order) {
    __shared__ uint32_t next[LENGTHS];
    const float scale = float(LENGTHS) / (all + 1);
    const auto bin = [&](int64_t tile) { return LENGTHS - 1 - int(lists[tile * pitch + 1] * scale); };
    for (int i = threadIdx.x; i < LENGTHS; i += blockDim.x) next[i] = 0;
    __syncthreads();
    in_batches(tiles, bin, [&](int64_t, int at) { atomicAdd(&next[at], 1); });
    __syncthreads();
    if (threadIdx.x < WARP) {
        uint32_t own = 0;
        for (int i = 0; i < LENGTHS / WARP; ++i) own += next[threadIdx.x * (LENGTHS / WARP) + i];
        uint32_t before = warp_scan(own) - own;
        for (int i = 0; i < LENGTHS / WARP; ++i) {
            uint32_t& slot = next[threadIdx.x * (LENGTHS / WARP) + i];
            const uint32_t count = slot;
            slot = before, before += count;
        }
    }
    __syncthreads();
    in_batches(tiles, bin, [&](int64_t tile, int at) { order[atomicAdd(&next[at], 1)] = tile; });
}

/// Blocks take tiles of `rows` rows: list the groups that each scores, and lower the slack of the others. Slack that is
/// to be made becomes +inf. The last block to end decides whether near groups are so few that their pass pays.
__device__ void list_groups(const uint32_t* labels, const uint32_t* order, const uint32_t* place, const float* move,
                            const float* group_move, const uint32_t* joined, const Active& active, int64_t n,
                            int64_t groups, int64_t restless, int rows, float most, float* slack, uint32_t* lists,
                            uint32_t* tile_order, NearState* state) {
    extern __shared__ uint32_t own[];  // bits of groups: own; scored
    __shared__ uint32_t own_move, restless_slack, last;
    const int64_t all = groups + restless, words = (all + 31) / 32, tiles = (n + rows - 1) / rows;
    const int lane = threadIdx.x % WARP;
    uint32_t* const scored = own + words;
    if (active.problems(1) == 0) return;
    const bool fresh = state->fresh;
    uint32_t listed = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int64_t first = tile * rows;
        float* const of_tile = slack + tile * all;
        const auto known = [&](int64_t g) { return of_tile[g] < INFINITY ? of_tile[g] : 0; };
        for (int64_t i = threadIdx.x; i < words; i += blockDim.x) own[i] = 0;
        if (threadIdx.x == 0) own_move = 0, restless_slack = 0x7f800000;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < rows && first + i < n; i += blockDim.x) {
            const uint32_t label = labels[order[first + i]], group = place[label] / SKIP_GROUP;
            atomicOr(&own[group / 32], 1u << group % 32);
            atomicMax(&own_move, __float_as_uint(move[label]));
        }
        for (int64_t g = groups + threadIdx.x; g < all; g += blockDim.x) {
            atomicMin(&restless_slack, __float_as_uint(known(g)));
        }
        __syncthreads();
        const float by = __uint_as_float(own_move), of_restless = __uint_as_float(restless_slack);
        for (int64_t g = threadIdx.x; g < words * 32; g += blockDim.x) {
            bool scores = false;
            if (g < all) {
                const bool is_own = own[g / 32] >> g % 32 & 1;
                float left = 0;
                if (g < groups) {
                    const float was = joined[g] ? fminf(known(g), of_restless) : known(g);
                    left = __fsub_rd(__fsub_rd(was, group_move[g]), by);
                }
                scores = !is_own && (fresh || !(left > 0));
                of_tile[g] = is_own ? 0 : scores ? INFINITY : left;
            }
            const uint32_t bits = __ballot_sync(~0u, scores);
            if (lane == 0) scored[g / 32] = bits;
        }
        __syncthreads();
        if (threadIdx.x < WARP) {
            uint32_t* const list = lists + tile * near_pitch(all);
            uint32_t at = 2, others = 0;
            for (int pass = 0; pass < 2; ++pass) {
                const uint32_t* const bits = pass ? scored : own;
                for (int64_t w = 0; w < words; ++w) {
                    const uint32_t word = bits[w];
                    if (word >> lane & 1) list[at + __popc(word & ((1u << lane) - 1))] = w * 32 + lane;
                    at += __popc(word);
                }
                if (pass == 0) others = at;
            }
            if (lane == 0) list[0] = others - 2, list[1] = at - 2, listed += at - 2;
        }
        __syncthreads();
    }
    __threadfence();
    if (threadIdx.x == 0) {
        atomicAdd(&state->listed, listed);
        __threadfence();
        last = atomicAdd(&state->arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) {
        const auto sum = atomicExch(&state->listed, 0ull);
        const float share = float(sum) / (float(groups) * tiles);
        const bool few = fresh || share <= most;
        state->last_listed = sum, state->arrived = 0;
        state->crowded = fresh ? 0 : state->crowded + (share > CROWDED);
        // Without their pass there is no slack of the groups that are listed.
        state->near = few, state->all = !few, state->on = few;
        state->failures += !few;
    }
    order_tiles(lists, near_pitch(all), tiles, all, tile_order);
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                       \
        near_gather_##name(const T* c, Rows cr, Active active, const uint32_t* members, const T* moved,                \
                           const float* start, int64_t pitch, const NearState* state, T* last, T* near_moved,          \
                           float* near_start, float* move, uint32_t* silent) {                                         \
        gather(c, cr, active, members, moved, start, pitch, state, last, near_moved, near_start, move, silent);        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(1024) near_separate_##name(                                           \
        Active active, int64_t k, const uint32_t* rank, const float* move, int64_t groups, int64_t restless,           \
        int64_t pitch, const NearState* state, T* near_moved, float* near_start, const uint32_t* silent,               \
        uint32_t* members, uint32_t* place, float* group_move, uint32_t* joined) {                                     \
        separate(active, k, rank, move, groups, restless, pitch, state, near_moved, near_start, silent, members,       \
                 place, group_move, joined);                                                                           \
    }                                                                                                                  \
    extern "C" __global__ void near_rows_##name(const T* x, Rows r, Active active, const uint32_t* order,              \
                                                int64_t pitch, T* out) {                                               \
        reorder(x, r, active, order, pitch, out);                                                                      \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE

extern "C" __global__ void near_changes(const uint32_t* labels, const uint32_t* was, Active active, int64_t n,
                                        NearState* state) {
    changes(labels, was, active, n, state);
}
extern "C" __global__ void near_begin(Active active, int64_t n, bool may_regroup, float few, NearState* state) {
    begin(active, n, may_regroup, few, state);
}
extern "C" __global__ void near_places(const uint32_t* labels, const uint32_t* rank, Active active, int64_t n,
                                       uint32_t* out) {
    places(labels, rank, active, n, out);
}
extern "C" __global__ void near_list(const uint32_t* labels, const uint32_t* order, const uint32_t* place,
                                     const float* move, const float* group_move, const uint32_t* joined, Active active,
                                     int64_t n, int64_t groups, int64_t restless, int rows, float most, float* slack,
                                     uint32_t* lists, uint32_t* tile_order, NearState* state) {
    list_groups(labels, order, place, move, group_move, joined, active, n, groups, restless, rows, most, slack, lists,
                tile_order, state);
}
