// The warpgroups of assign_sm90.cu that search. A thread holds rows lane / 4 and lane / 4 + 8 of its warp's 16, and of
// a tile the columns 8 j + 2 (lane % 4) and the next, j < 16.
#pragma once
#include <type_traits>

#include "assign/sm90.cuh"

/// Of the four threads that share a row, the first with the best score leaves what is known.
template <int PLACES>
__device__ __forceinline__ void publish(const Search<PLACES>& found, uint32_t to, float squares, int lane) {
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
        store_shared(to + sizeof(RowResult) + 4 * p, best[0], best[1], best[2], best[3]);
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
    __device__ __forceinline__ void search(int column, bool keep, Search<S::PLACES> (&found)[2]) {
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
