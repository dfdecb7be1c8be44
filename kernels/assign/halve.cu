// Groups of SKIP_GROUP centroids that lie together: recursive halving along the principal direction (Boley 1998,
// "Principal direction divisive partitioning"), here into equal halves.
//
// An assignment that skips scores only the groups that may hold a nearest centroid. The better groups are, the fewer
// those; so only speed depends on what is found here, never a label, and directions are those of a sample, in f32.
// Groups are the same whatever the order of threads and the number of blocks.
//
// A launch for each level of the tree, ceil(log2(ceil(k / SKIP_GROUP))) of them, each of which reads the members that
// the one before has written. Where a node has several blocks, each finds the same direction, so that none waits for
// another, and projects a share of the centroids; the last one to finish splits the node. Scratch: members of levels
// that are not the last, and keys, k words each; counters, one for each node of the last level. Traffic of a level: k d
// halves, a dozen words for each centroid, and from L2, d halves of a block's samples in each of PASSES + 1 passes.
#include "assign/tensor.cuh"
#include "attention/radix_select.cuh"

constexpr int PASSES = 5, HALVE_WARPS = HALVE_THREADS / WARP;  // of the power method, and of a block
constexpr int VALUES = 2 * PIECE, AHEAD = 2;  // columns of a lane, and its rows that are on their way together
constexpr float BEYOND = 1e10f;  // rows of larger sums are left out of directions, as those that are not finite

/// A block shares this while it halves a node. Sums are in the order of lanes: (VALUES, WARP).
struct HalveState {
    float partial[HALVE_WARPS][VALUES * WARP], sums[VALUES * WARP];
    uint32_t rows[HALVE_SAMPLES], finite;  // the sample, and how many of it are
    unsigned long long farthest;  // the bits of a distance, and the complement of the row's place in the sample
    bool last;
    SelectState select;
};
static_assert(sizeof(HalveState) <= 49'152 && HALVE_THREADS == VALUES * WARP, "room, and a thread to each sum");

template <int N, class Take>
__device__ __forceinline__ void unrolled(Take take) {
#pragma unroll
    for (int i = 0; i < N; ++i) take(i);
}

/// Rows as a block reads them: as few lanes to a row as have room for it, and its columns as they have them.
template <class T>
struct Reader {
    struct Values {
        float at[VALUES];
    };
    const T* c;
    const Rows& r;
    HalveState& s;
    int lanes, part, slot;
    Values direction;
    float centre;  // the product of it and the mean

    __device__ Reader(const T* c, const Rows& r, HalveState& s) : c(c), r(r), s(s) {
        lanes = 1 << (32 - __clz(int(r.d - 1) / VALUES));
        part = threadIdx.x % WARP % lanes, slot = threadIdx.x % WARP / lanes;
    }

    /// `take(places, values)` for rows at places in [begin, end), by whole warps. Past the end values are zeros.
    template <class RowAt, class Take>
    __device__ __forceinline__ void for_rows(int64_t begin, int64_t end, RowAt row_at, Take take) const {
        const int slots = WARP / lanes, together = AHEAD * slots;
        for (int64_t first = begin + threadIdx.x / WARP * together; first < end; first += HALVE_WARPS * together) {
            int64_t places[AHEAD];
            uint32_t rows[AHEAD];
            uint4 pieces[AHEAD][2];
            Values v[AHEAD];
            unrolled<AHEAD>([&](int e) { places[e] = first + e * slots + slot; });
            unrolled<AHEAD>([&](int e) { rows[e] = row_at(min(places[e], end - 1)); });
            unrolled<AHEAD * 2>([&](int i) {
                const int e = i / 2, column = (part + i % 2 * lanes) * PIECE;
                const bool is_member = places[e] < end && column < r.d;
                pieces[e][i % 2] = is_member ? load_piece(row_of(c, r, 0, rows[e]), column, r.d) : uint4{};
            });
            unrolled<AHEAD * 2>([&](int i) {
                widen<T>(reinterpret_cast<float(&)[PIECE]>(v[i / 2].at[i % 2 * PIECE]), pieces[i / 2][i % 2]);
            });
            take(places, v);
        }
    }
    /// The row at a place of the sample, zeros for values that are not finite.
    __device__ __forceinline__ Values sampled(uint32_t place) const {
        Values v;
        unrolled<VALUES>([&](int i) {
            const int column = (part + i / PIECE * lanes) * PIECE + i % PIECE;
            const float x = column < r.d ? filter(row_of(c, r, 0, s.rows[place])[column]) : 0;
            v.at[i] = fabsf(x) < BEYOND ? x : 0;
        });
        return v;
    }

    /// Adds up what the lanes of a row have.
    template <int N>
    __device__ __forceinline__ void over_row(float (&v)[N]) const {
        for (int step = 1; step < lanes; step *= 2) {
            unrolled<N>([&](int e) { v[e] += __shfl_xor_sync(~0u, v[e], step); });
        }
    }
    /// And what lanes have of their columns, over the block.
    __device__ __forceinline__ Values over_block(Values sums) const {
        unrolled<VALUES>([&](int i) {
            for (int step = lanes; step < WARP; step *= 2) sums.at[i] += __shfl_xor_sync(~0u, sums.at[i], step);
            if (slot == 0) s.partial[threadIdx.x / WARP][i * WARP + part] = sums.at[i];
        });
        __syncthreads();
        float sum = 0;
        unrolled<HALVE_WARPS>([&](int warp) { sum += s.partial[warp][threadIdx.x]; });
        s.sums[threadIdx.x] = sum;
        __syncthreads();
        unrolled<VALUES>([&](int i) { sums.at[i] = s.sums[i * WARP + part]; });
        return sums;
    }
    __device__ __forceinline__ void project(const Values (&v)[AHEAD], float (&along)[AHEAD]) const {
        unrolled<AHEAD>([&](int e) {
            along[e] = part == 0 ? -centre : 0;
            unrolled<VALUES>([&](int i) { along[e] = fmaf(v[e].at[i], direction.at[i], along[e]); });
        });
        over_row(along);
    }

    /// The power method on the covariance of the sample, from the difference of its first and farthest row on.
    __device__ __forceinline__ void find_direction(int count) {
        const auto row_at = [&](int64_t i) { return s.rows[i]; };
        Values sums = {}, mean, origin = sampled(0);
        unsigned long long farthest = 0, finite = 0;
        for_rows(0, count, row_at, [&](const int64_t(&places)[AHEAD], const Values(&v)[AHEAD]) {
            float apart[AHEAD] = {};  // by magnitudes, of which sums are finite only where all are
            unrolled<AHEAD>(
                [&](int e) { unrolled<VALUES>([&](int i) { apart[e] += fabsf(v[e].at[i] - origin.at[i]); }); });
            over_row(apart);
            unrolled<AHEAD>([&](int e) {
                if (!(apart[e] < BEYOND) || places[e] >= count) return;
                const unsigned long long bits = __float_as_uint(apart[e]);
                farthest = max(farthest, bits << 32 | uint32_t(~places[e])), ++finite;
                unrolled<VALUES>([&](int i) { sums.at[i] += v[e].at[i]; });
            });
        });
        for (int step = lanes; step < WARP; step *= 2) farthest = max(farthest, __shfl_xor_sync(~0u, farthest, step));
        if (part == 0) atomicAdd(&s.finite, uint32_t(finite));
        if (threadIdx.x % WARP == 0) atomicMax(&s.farthest, farthest);
        mean = over_block(sums), direction = sampled(~uint32_t(s.farthest));
        unrolled<VALUES>([&](int i) { mean.at[i] /= s.finite, direction.at[i] -= origin.at[i]; });
        for (int pass = 0;; ++pass) {
            float norms[] = {0, 0};  // the direction's, by magnitudes, and its product with the mean
            unrolled<VALUES>([&](int i) {
                norms[0] += fabsf(direction.at[i]), norms[1] = fmaf(mean.at[i], direction.at[i], norms[1]);
            });
            over_row(norms);
            const float scale = norms[0] > 0 ? 1 / norms[0] : 0;
            unrolled<VALUES>([&](int i) { direction.at[i] *= scale; });
            centre = norms[1] * scale;
            if (pass == PASSES) return;
            sums = {};
            // The mean of projections is zero, so that rows need not be centred once more.
            for_rows(0, count, row_at, [&](const int64_t(&)[AHEAD], const Values(&v)[AHEAD]) {
                float along[AHEAD];
                project(v, along);
                unrolled<AHEAD>([&](int e) {
                    if (!(fabsf(along[e]) < BEYOND)) return;
                    unrolled<VALUES>([&](int i) { sums.at[i] = fmaf(along[e], v[e].at[i], sums.at[i]); });
                });
            });
            direction = over_block(sums);
        }
    }

    /// The keys of the members at places [begin, end) of a node of `n`: the lower a projection, the higher its key.
    template <class Member>
    __device__ __forceinline__ void find_keys(int64_t n, Member member, int64_t begin, int64_t end, uint32_t* keys) {
        const int count = int(min(n, int64_t(HALVE_SAMPLES)));
        for (int i = threadIdx.x; i < count; i += HALVE_THREADS) s.rows[i] = member(i * n / count);
        if (threadIdx.x == 0) s.farthest = UINT32_MAX, s.finite = 0;
        __syncthreads();
        find_direction(count);
        for_rows(begin, end, member, [&](const int64_t(&places)[AHEAD], const Values(&v)[AHEAD]) {
            float along[AHEAD];
            project(v, along);
            unrolled<AHEAD>([&](int e) {
                // A projection that is not finite becomes a NaN, which is the last.
                if (part == 0 && places[e] < end) keys[places[e]] = rank_of(0 * along[e] - along[e]);
            });
        });
    }
};

/// `put(place, i)` for all `n` members of a node: the `left` of highest keys come first, of equal ones the first, and
/// both sides keep their order.
template <class Put>
__device__ void partition(const uint32_t* keys, int64_t n, uint32_t left, HalveState& s, Put put) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const uint32_t key = radix_select_weighted(keys, int(n), 0, UINT32_MAX, left, [](int) { return 1u; }, s.select);
    const int64_t begin = warp * n / HALVE_WARPS, end = (warp + 1) * n / HALVE_WARPS;
    uint32_t above = 0, same = 0;
    for (int64_t i = begin + lane; i < end; i += WARP) above += keys[i] > key, same += keys[i] == key;
    above = __reduce_add_sync(~0u, above), same = __reduce_add_sync(~0u, same);
    if (lane == 0) s.select.sums[warp] = make_uint2(above, same);
    __syncthreads();
    const uint2 of_warp = lane < HALVE_WARPS ? s.select.sums[lane] : uint2{};
    const uint32_t room = left - __reduce_add_sync(~0u, of_warp.x), lower = (1u << lane) - 1;
    above = __reduce_add_sync(~0u, lane < warp ? of_warp.x : 0);
    same = __reduce_add_sync(~0u, lane < warp ? of_warp.y : 0);
    for (int64_t i = begin + lane; i - lane < end; i += WARP) {
        const bool higher = i < end && keys[i] > key, equal = i < end && keys[i] == key;
        const uint32_t all_higher = __ballot_sync(~0u, higher), all_equal = __ballot_sync(~0u, equal);
        const uint32_t equal_before = same + __popc(all_equal & lower);
        const int64_t before = above + __popc(all_higher & lower) + min(equal_before, room);
        if (i < end) put(higher || (equal && equal_before < room) ? before : left + i - before, i);
        above += __popc(all_higher), same += __popc(all_equal);
    }
}

/// A block to each share of a node. A node of some groups has the larger half of them to its left, so that all groups
/// but the last are full. `from` (null: all in order) become `to`, and `rank` (null but for the last level) their
/// places. `arrived` starts as zeros and is left so.
template <class T>
__device__ __forceinline__ void halve(const T* c, const Rows& r, const Active& active, int level, const uint32_t* from,
                                      uint32_t* to, uint32_t* rank, uint32_t* keys, uint32_t* arrived) {
    __shared__ HalveState s;
    if (active.problems(1) == 0) return;
    const int64_t nodes = int64_t(1) << level, shares = blocks_each(nodes);
    for (int64_t tile = blockIdx.x; tile < nodes * shares; tile += gridDim.x) {
        const int64_t node = tile / shares, share = tile % shares;
        int64_t group = 0, groups = (r.n + SKIP_GROUP - 1) / SKIP_GROUP;
        for (int bit = level - 1; bit >= 0; --bit) {
            const int64_t left = (groups + 1) / 2;
            if (node >> bit & 1) group += left, groups -= left;
            else groups = left;
        }
        const int64_t first = group * SKIP_GROUP, left = (groups + 1) / 2 * SKIP_GROUP;
        const int64_t n = min(groups * SKIP_GROUP, r.n - first);
        const auto member = [&](int64_t i) { return from ? from[first + i] : uint32_t(i); };
        const auto put = [&](int64_t place, int64_t i) {
            const uint32_t row = to[first + place] = member(i);
            if (rank) rank[row] = uint32_t(first + place);
        };
        Reader<T>(c, r, s).find_keys(n, member, share * n / shares, (share + 1) * n / shares, keys + first);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) s.last = atomicAdd(&arrived[node], 1) + 1 == shares;
        __syncthreads();
        if (!s.last) continue;
        __threadfence();
        partition(keys + first, n, uint32_t(left), s, put);
        if (threadIdx.x == 0) arrived[node] = 0;
    }
}

#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(HALVE_THREADS)                                                        \
        halve_##name(const T* c, Rows cr, Active active, int level, const uint32_t* from, uint32_t* to,                \
                     uint32_t* rank, uint32_t* keys, uint32_t* arrived) {                                              \
        halve(c, cr, active, level, from, to, rank, keys, arrived);                                                    \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE
