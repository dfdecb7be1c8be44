// The warpgroups of assign_sm90.cu that search. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and of
// a tile the columns 8 j + 2 (lane % 4) and the next, j < 16.
#pragma once
#include <climits>
#include <type_traits>

#include "assign/sm90.cuh"

// ---- Scores as integers.
//
// The order of floats above zero is that of their bits as integers, which Hopper compares three at a time (VIMNMX3). So
// that nearly all best scores are above zero, all start from as much more (`Bounds::shift`). Among scores below zero
// the order is another, and a NaN may be above all: a best score that is not above zero proves nothing (it is still
// none that is too high to start a recheck from), and a second best one counts as zero at least.

template <int N>
__device__ __forceinline__ int largest_key(const int (&keys)[N]) {
    int most = keys[0];
#pragma unroll
    for (int i = 1; i + 1 < N; i += 2) most = __vimax3_s32(most, keys[i], keys[i + 1]);
    return N % 2 ? most : max(most, keys[N - 1]);
}

/// A thread knows this of a row whose scores it sees as a matrix with PLACES columns: the best, the second best of the
/// matrix's rows, and the best of each of its columns.
template <int PLACES>
struct KeySearch {
    int top = INT_MIN, second = INT_MIN, best_of[PLACES];
    int column = 0;  // the first of the best row of places

    __device__ __forceinline__ KeySearch() {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_of[p] = INT_MIN;
    }

    __device__ __forceinline__ void rank(int most, int at) {
        second = max(second, min(top, most));
        if (most > top) column = at;
        top = max(top, most);
    }
    /// A row of places, or the first few of one. Returns its maximum.
    template <int COUNT>
    __device__ __forceinline__ int add(const int (&keys)[COUNT], int at) {
#pragma unroll
        for (int p = 0; p < COUNT; ++p) best_of[p] = max(best_of[p], keys[p]);
        const int most = largest_key(keys);
        rank(most, at);
        return most;
    }
    /// Two rows of places, each with its first column. Returns the maximum of each.
    __device__ __forceinline__ int2 add(const int (&keys)[PLACES], int at, const int (&more)[PLACES], int next) {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_of[p] = __vimax3_s32(best_of[p], keys[p], more[p]);
        const int2 most = {largest_key(keys), largest_key(more)};
        rank(most.x, at), rank(most.y, next);
        return most;
    }
};

/// Of the four threads that share a row, the first with the best score leaves what is known.
template <int PLACES>
__device__ __forceinline__ void publish(const KeySearch<PLACES>& found, uint32_t to, float squares, int lane) {
    const int best = max(found.top, __shfl_xor_sync(~0u, found.top, 1));
    const int most = max(best, __shfl_xor_sync(~0u, best, 2));
    const uint32_t level = __ballot_sync(~0u, found.top == most) >> (lane & ~3) & 15;
    const bool first = (level & ((2 << lane % 4) - 1)) == 1 << lane % 4;
    int others = first ? found.second : found.top;
    others = max(others, __shfl_xor_sync(~0u, others, 1));
    others = max(others, __shfl_xor_sync(~0u, others, 2));
    if (!first) return;
    const auto score = [](int key) { return __int_as_float(key); };
    store_shared(to, score(most), score(max(others, 0)), __int_as_float(found.column), squares);
#pragma unroll
    for (int p = 0; p < PLACES; p += 4) {
        const int* keys = found.best_of + p;
        store_shared(to + sizeof(RowResult) + 4 * p, score(keys[0]), score(keys[1]), score(keys[2]), score(keys[3]));
    }
}

template <class S>
__device__ __forceinline__ void load_rows(uint32_t (&a)[S::STEPS][4], uint32_t slot, int warp, int lane) {
    const int row = warp * 16 + (lane & 15);
    const uint32_t first = slot + row * 128 + swizzled_piece<128>(row, lane >> 4);
#pragma unroll
    for (int step = 0; step < S::STEPS; ++step) {
        ldmatrix_x4(a[step], (first ^ step % 4 * 32) + (step / 4) * (SLOT * 128));
    }
}

/// Waits for rows on their way to registers.
template <int STEPS>
__device__ __forceinline__ void pin_rows(uint32_t (&a)[STEPS][4]) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        asm volatile("" : "+r"(a[step][0]), "+r"(a[step][1]), "+r"(a[step][2]), "+r"(a[step][3])::"memory");
    }
}

template <int SCORES>
__device__ __forceinline__ void begin(float (&acc)[SCORES], uint32_t start) {
#pragma unroll
    for (int j = 0; j < SCORES / 4; ++j) {
        start_scores(acc + 4 * j, load_floats(start + 32 * j));
    }
}

template <int SCORES>
__device__ __forceinline__ void rescale(float (&acc)[SCORES], uint32_t start, uint32_t scale) {
#pragma unroll
    for (int j = 0; j < SCORES / 4; ++j) {
        const float2 from = load_floats(start + 32 * j);
        scale_scores(acc + 4 * j, from, load_floats(scale + 32 * j));
    }
}

/// COUNT of the thread's columns of a tile from its `first` one on: of its lower row, and of its higher one.
template <int COUNT, int SCORES>
__device__ __forceinline__ void keys_of(const float (&acc)[SCORES], int first, int (&low)[COUNT], int (&high)[COUNT]) {
#pragma unroll
    for (int p = 0; p < COUNT; ++p) {
        const int at = (first + p) / 2 * 4 + p % 2;
        low[p] = __float_as_int(acc[at]), high[p] = __float_as_int(acc[at + 2]);
    }
}

template <int SCORES, int PLACES>
__device__ __forceinline__ void reduce(const float (&acc)[SCORES], int column, KeySearch<PLACES>& low,
                                       KeySearch<PLACES>& high) {
    constexpr int ALL = SCORES / 2, PAIRED = ALL / (2 * PLACES) * 2 * PLACES, WHOLE = ALL / PLACES * PLACES;
#pragma unroll
    for (int first = 0; first < PAIRED; first += 2 * PLACES) {
        int u[PLACES], v[PLACES], u_next[PLACES], v_next[PLACES];
        keys_of(acc, first, u, v), keys_of(acc, first + PLACES, u_next, v_next);
        const int at = column + 4 * first, next = at + 4 * PLACES;
        low.add(u, at, u_next, next), high.add(v, at, v_next, next);
    }
    if constexpr (PAIRED < WHOLE) {
        int u[PLACES], v[PLACES];
        keys_of(acc, PAIRED, u, v);
        low.add(u, column + 4 * PAIRED), high.add(v, column + 4 * PAIRED);
    }
    if constexpr (WHOLE < ALL) {
        int u[ALL - WHOLE], v[ALL - WHOLE];
        keys_of(acc, WHOLE, u, v);
        low.add(u, column + 4 * WHOLE), high.add(v, column + 4 * WHOLE);
    }
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

/// One warpgroup that searches.
template <class T, class S>
struct Consumer {
    const Shared<S>& s;
    const bool scaled;
    const int index = int(threadIdx.x) / 128 - 1, warp = int(threadIdx.x) / 32 % 4, lane = int(threadIdx.x) % 32;
    uint32_t rows[S::STEPS][4];
    PipelineState<S::STAGES> stage;
    PipelineState<S::VECTORS> vector;

    __device__ __forceinline__ void release(int at) const {
        if (lane == 0) mbarrier_arrive(s.empty(at));
    }

    /// Searches the next tile, of which the first WIDTH centroids count, and lets go of it unless to `keep` it.
    template <int WIDTH>
    __device__ __forceinline__ void search(int column, bool keep, KeySearch<S::PLACES> (&found)[2]) {
        const int quad = lane % 4, own_turn = 1 + index, next_turn = 1 + (index + 1) % S::GROUPS;
        const uint32_t start = s.start + vector.at * S::VECTOR_BYTES + 8 * quad;
        float acc[WIDTH / 2];
        PipelineState<S::STAGES> done = stage;
        mbarrier_wait(s.full(stage.at), stage.parity);
        begin(acc, scaled ? s.zeros + 8 * quad : start);
        if (S::TURNS) named_barrier_sync(own_turn, 256);
        pin(acc);
        wgmma_fence();
#pragma unroll
        for (int part = 0; part < S::PARTS; ++part, stage.next()) {
            if (part) mbarrier_wait(s.full(stage.at), stage.parity);
#pragma unroll
            for (int step = 0; step < 4 * S::STAGE_BOXES && part * 4 * S::STAGE_BOXES + step < S::STEPS; ++step) {
                const uint32_t at = s.ring + stage.at * S::STAGE_BYTES + step / 4 * (CENTROIDS * 128) + step % 4 * 32;
                wgmma<T>(acc, rows[part * 4 * S::STAGE_BOXES + step], matrix_descriptor(at));
            }
            wgmma_commit();
            if (part == 0) continue;
            wgmma_wait<1>();
            release(done.at);
            done.next();
        }
        if (S::TURNS) named_barrier_arrive(next_turn, 256);
        wgmma_wait<0>();
        pin(acc);
        if (scaled) {
            rescale(acc, start, s.scale + vector.at * S::VECTOR_BYTES + 8 * quad);
            fence_proxy_async();
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
    Consumer<T, S> g{s, scaled};
    // A last tile of few centroids costs a product of its own width.
    const int tiles = (k + CENTROIDS - 1) / CENTROIDS, last = k - (tiles - 1) * CENTROIDS, whole = tiles - (last <= 96);
    const bool stay = centroids_resident<S>(tiles);
    int held = 0;
    if (S::TURNS && g.index == S::GROUPS - 1) named_barrier_arrive(1, 256);
    for (TileScheduler<S> work(r, active, stay); work.more(); work.next(), held ^= 1) {
        mbarrier_wait(s.rows_full(g.index), held);
        load_rows<S>(g.rows, s.rows + g.index * S::SLOT_BYTES, g.warp, g.lane);
        float squares[2];
        squares_of<T, S::STEPS>(g.rows, squares);
        // Not before the squares: an arrival does not wait for loads under way, and the copy engine is quick.
        __syncwarp();
        if (g.lane == 0) mbarrier_arrive(s.rows_empty(g.index));

        KeySearch<S::PLACES> found[2];
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

        mbarrier_wait(s.found_empty(g.index), held ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = g.index * SLOT + g.warp * 16 + g.lane / 4 + i * 8;
            publish(found[i], s.found + row * S::RESULT_BYTES, squares[i], g.lane);
        }
        __syncwarp();
        if (g.lane == 0) mbarrier_arrive(s.found_full(g.index));
    }
    if (S::TURNS && g.index == 0) named_barrier_sync(1, 256);  // the last one given
}
