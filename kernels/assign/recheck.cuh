// Decides the rows whose label the first pass over them did not prove, exactly, by the definition.
//
// All blocks share the listed rows: tiles of them are swept over the centroids once more (sweep.cuh), and every column
// whose score reaches the row's cutoff is a candidate. Candidates wait in a queue of their warp's, which from time to
// time is thinned: squared Euclidean distances are taken in f32, of the differences, which no common offset can blur,
// and only what may still be the nearest stays. What is left in the end is decided in f64 against the label that
// stands.
//
// f32 rows come as halves h and l (split.cu, which says why their bound holds). The first pass saw h alone; here a
// chunk of the ring is half a chunk of h and the same columns of l, so that rows that stay take twice the memory, and
// h.h + h.l + l.h is added up. Bounds are in the units of the halves; candidates are compared as f32.
#pragma once
#include "assign/sweep.cuh"

constexpr int WARPS = BLOCK / WARP, QUEUE = RECHECK_QUEUE / WARPS;
constexpr int RECHECK_RESIDENT = 256 / BLOCK;  // blocks of an SM, so far as registers go
constexpr int RECHECK_STATE_BYTES = (SM80_ROWS + RECHECK_QUEUE) * RECHECK_BYTES;
static_assert(RECHECK_STATE_BYTES % 128 == 0, "the swizzles start on lines of 128 bytes");
static_assert(QUEUE >= 2 * WARP, "a queue takes a candidate of every lane");

/// A block keeps this of its rows, and its warps' queues.
struct RecheckState {
    float* cutoff;    // the score below which a column cannot be the label
    uint32_t* index;  // of the row
    uint32_t* least;  // the bits of what the smallest distance so far is at most
    uint2* queue;     // of this warp: (row of the tile, column)
    float* distance;  // their f32 distances

    __device__ __forceinline__ explicit RecheckState(uint8_t* at)
        : cutoff(reinterpret_cast<float*>(at)),
          index(reinterpret_cast<uint32_t*>(cutoff + SM80_ROWS)),
          least(index + SM80_ROWS),
          queue(reinterpret_cast<uint2*>(least + SM80_ROWS) + threadIdx.x / WARP * QUEUE),
          distance(reinterpret_cast<float*>(at + SM80_ROWS * RECHECK_BYTES + RECHECK_QUEUE * sizeof(uint2)) +
                   threadIdx.x / WARP * QUEUE) {}
    static_assert(RECHECK_BYTES == sizeof(float) + 2 * sizeof(uint32_t) &&
                      RECHECK_BYTES == sizeof(uint2) + sizeof(float),
                  "of a row; of a candidate");
};

/// The first pass over split rows left the errors of its rows, and its own bounds, which lie so many copies before
/// those of both halves: none if a pass over both halves has listed the rows (assign_split_sm90.cu).
struct FirstPass {
    const float* row_error;
    int64_t copies;
};

/// Raises the cutoffs of split rows, four lanes a row: the first pass knew their best scores less well than both halves
/// do, so the label that a row has now is scored again.
template <class T>
__device__ __forceinline__ void raise_cutoffs(const RecheckState& state, const T* x, const Rows& r, int64_t at_problem,
                                              const ScoredCentroids<T>& c, const float* row_error,
                                              const FirstPass& first, const uint32_t* labels, int live_rows) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % 4;
    for (int at = lane / 4; at < WARP_ROWS; at += WARP / 4) {
        const int row = warp * WARP_ROWS + at;
        const int64_t index = state.index[row < live_rows ? row : 0];
        const T* values = row_of(x, r, at_problem, index);
        uint32_t label = 0;
        // Others may change it meanwhile: one lane reads it for all four.
        if (part == 0) label = *(const volatile uint32_t*)&labels[index];
        label = __shfl_sync(~0u, label, lane & ~3);
        const T* centroid = c.moved + label * c.pitch;
        float dot = 0, squares = 0;
#pragma unroll 2
        for (int64_t piece = part; piece * PIECE < r.d; piece += 4) {
            const uint4 u = __ldg(reinterpret_cast<const uint4*>(values) + piece);
            const uint4 u_low = __ldg(reinterpret_cast<const uint4*>(values + c.pitch / 2) + piece);
            const uint4 v = __ldg(reinterpret_cast<const uint4*>(centroid) + piece);
            const uint4 v_low = __ldg(reinterpret_cast<const uint4*>(centroid + c.pitch / 2) + piece);
            add_products<T>(dot, u, v), add_products<T>(dot, u, v_low), add_products<T>(dot, u_low, v);
            add_products<T>(squares, u, u);
        }
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            dot += __shfl_xor_sync(~0u, dot, lanes), squares += __shfl_xor_sync(~0u, squares, lanes);
        }
        // Three products are as much to add up as three times the columns, in whole steps.
        const float error =
            error_bound(squares, 3 * ((r.d + 15) / 16 * 16), *c.bounds) + __ldg(&row_error[at_problem * r.n + index]);
        // If scores were level, the label may be any: then the first pass's best score says more, each within its
        // own half of the bounds.
        float first_error = 0;
        if (first.copies) {
            first_error =
                error_bound(squares, r.d, c.bounds[-first.copies]) + __ldg(&first.row_error[at_problem * r.n + index]);
        }
        const float from_top = state.cutoff[row] + 0.5f * (first_error - error);
        if (part == 0) state.cutoff[row] = fmaxf(dot + __ldg(c.start + label) - error, from_top);
    }
}

/// The rows and centroids of problem `b` by which the definition goes: of the type that the caller has them in.
template <class U>
struct Originals {
    const U *x, *centroids;
    const Rows &r, &cr;
    uint32_t b;
};

/// Labels the thread's row if it is zero: it is at the same distance from all centroids, so its label is the first
/// that is not at distance +inf. No column is a candidate then.
template <class T, class U>
__device__ __forceinline__ void label_without_direction(const RecheckState& state, const Originals<U>& originals,
                                                        const ScoredCentroids<T>& c, uint32_t* labels) {
    const uint32_t index = state.index[threadIdx.x];
    const U* row = row_of(originals.x, originals.r, originals.b, index);
    for (int64_t q = 0; q < originals.r.d; ++q) {
        if (!(filter(row[q]) == 0)) return;
    }
    uint32_t first = 0;
    while (first + 1 < c.k && c.start[first] == -INFINITY) ++first;
    labels[index] = first, state.cutoff[threadIdx.x] = INFINITY;
}

/// A tile of listed rows, and the warp's candidates among the centroids from `first` on and before `last`.
template <class U>
struct Candidates {
    const RecheckState& state;
    const Originals<U>& originals;
    const int64_t d;
    const int metric;
    uint32_t* const labels;  // of the problem
    const uint32_t first, last;
    // The same in all lanes:
    int queued = 0, measured = 0;
    bool complete = true;  // no label has been improved yet

    static constexpr int LANES = 4;  // of one f32 distance

    __device__ __forceinline__ const U* row(int at) const {
        return row_of(originals.x, originals.r, originals.b, state.index[at]);
    }
    __device__ __forceinline__ const U* centroid(uint32_t column) const {
        return row_of(originals.centroids, originals.cr, originals.b, column);
    }

    /// Takes what each lane has hit of a tile: a bit for each of 16 columns of each slot.
    __device__ __noinline__ void add(uint64_t hits, int column, int live_rows) {
        const int lane = threadIdx.x % WARP, first_row = threadIdx.x / WARP * WARP_ROWS + lane / 4;
        for (; __any_sync(~0u, hits != 0); hits &= hits - 1) {
            const int bit = hits ? __ffsll(hits) - 1 : 0, j = bit % (2 * EIGHTS);
            const int row = first_row + 8 * (bit / (2 * EIGHTS));
            const uint32_t candidate = column + 8 * (j / 2) + j % 2;
            const bool has = hits && candidate < last && row < live_rows;
            const uint32_t some = __ballot_sync(~0u, has);
            if (queued + __popc(some) > QUEUE) thin();
            if (has) state.queue[queued + __popc(some & ((1u << lane) - 1))] = make_uint2(row, candidate);
            queued += __popc(some);
        }
        // Where there are many, all warps thin at the same tiles: they wait for each other at every chunk.
        if (column / CENTROIDS % 2 && queued - measured >= 2 * WARP) thin();
    }

    /// The relative error of an f32 distance: a difference by a rounding, its square by two, the sums of a lane
    /// by one for each term, and two where lanes join.
    __device__ __forceinline__ float error() const {
        return ((d + LANES * PIECE - 1) / (LANES * PIECE) * PIECE + 6) * 0x1.02p-24f;
    }

    /// f32 distances of what is new, and of each row what the smallest is at most.
    __device__ __forceinline__ void measure() const {
        const int lane = threadIdx.x % WARP, part = lane % LANES;
        for (int from = measured; from < queued; from += WARP / LANES) {
            const int i = from + lane / LANES;
            const uint2 one = state.queue[min(i, queued - 1)];
            const U *x = row(one.x), *c = centroid(one.y);
            float sum = 0;
#pragma unroll 4
            for (int64_t column = part * PIECE; column < d; column += LANES * PIECE) {
                float u[PIECE], v[PIECE];
                load_eight(u, x, column, d), load_eight(v, c, column, d);
#pragma unroll
                for (int e = 0; e < PIECE; ++e) {
                    const float t = u[e] - v[e];
                    sum = fmaf(t, t, sum);
                }
            }
            for (int lanes = 1; lanes < LANES; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
            if (part == 0 && i < queued) {
                state.distance[i] = sum;
                atomicMin(&state.least[one.x], __float_as_uint(sum * (1 + 2 * error()) + d * 1e-37f));
            }
        }
        __syncwarp();
    }

    /// Keeps what may still be the nearest. If that is too much, labels are improved at once.
    __device__ __noinline__ void thin() {
        __syncwarp();
        if (metric == SQUARED_EUCLIDEAN) {
            measure();
            int kept = 0;
            for (int from = 0; from < queued; from += WARP) {
                const int lane = threadIdx.x % WARP, i = min(from + lane, queued - 1);
                const uint2 one = state.queue[i];
                const float distance = state.distance[i], least = __uint_as_float(state.least[one.x]);
                const bool stays = from + lane < queued && !(distance * (1 - 2 * error()) - d * 1e-37f > least);
                const uint32_t staying = __ballot_sync(~0u, stays);
                const int to = kept + __popc(staying & ((1u << lane) - 1));
                if (stays) state.queue[to] = one, state.distance[to] = distance;
                kept += __popc(staying);
                __syncwarp();
            }
            queued = measured = kept;
        }
        if (metric != SQUARED_EUCLIDEAN || queued > QUEUE / 2) complete = false, improve_labels();
    }

    __device__ __forceinline__ void improve_labels() {
        const int lane = threadIdx.x % WARP;
        for (int from = 0; from < queued; from += WARP) {
            const bool live = from + lane < queued;
            const uint2 one = state.queue[min(from + lane, queued - 1)];
            uint32_t* label = &labels[state.index[one.x]];
            const uint32_t seen = *(const volatile uint32_t*)label;
            // When all that may be the nearest of these columns is here, a label among them that is not is farther than
            // one that is: any may take its place, and the others are compared with that.
            bool beaten = complete && seen >= first && seen < last;
            for (int i = 0; i < queued && __any_sync(~0u, beaten); ++i) {
                const uint2 other = state.queue[i];
                beaten &= other.x != one.x || other.y != seen;
            }
            if (live && !(beaten && atomicCAS(label, seen, one.y) == seen)) {
                improve_label(metric, row(one.x), originals.cr, originals.centroids, originals.b, d, one.y, label);
            }
        }
        __syncwarp();
        queued = measured = 0;
    }

    __device__ __noinline__ void finish() {
        thin();
        if (queued) improve_labels();
    }
};

/// Decides one tile of unproven rows over the tiles `first` to `last` of the centroids.
template <bool SPLIT, class T, class U>
__device__ __forceinline__ void recheck_tile(const Shared& s, const RecheckState& state, const T* x, const Rows& r,
                                             const Originals<U>& originals, int64_t at, const ScoredCentroids<T>& c,
                                             const float* row_error, const FirstPass& before, int metric,
                                             uint32_t* labels, const UnprovenRow* list, int live_rows, int first,
                                             int last) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    __syncthreads();  // the last tile's are read
    const UnprovenRow own = threadIdx.x < live_rows ? list[threadIdx.x] : UnprovenRow{0, INFINITY};
    state.index[threadIdx.x] = own.row, state.cutoff[threadIdx.x] = own.cutoff;
    state.least[threadIdx.x] = __float_as_uint(INFINITY);
    __syncthreads();
    if (SPLIT) raise_cutoffs(state, x, r, at, c, row_error, before, labels, live_rows);
    if (metric == COSINE && threadIdx.x < live_rows) label_without_direction(state, originals, c, labels);
    __syncwarp();
    Candidates<U> candidates{state,
                             originals,
                             r.d,
                             metric,
                             labels,
                             uint32_t(first * CENTROIDS),
                             uint32_t(min(c.k, int64_t(last) * CENTROIDS))};
    sweep<false, SPLIT>(
        s, [&](int i) { return i < live_rows ? row_of(x, r, at, state.index[i]) : nullptr; }, c, int(r.d), first, last,
        warp * WARP_ROWS < live_rows,
        [&](const Scores& acc, int column) {
            uint64_t hits = 0;
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                const float cutoff = state.cutoff[warp * WARP_ROWS + 8 * i + lane / 4];
                bool any = false;
#pragma unroll
                for (int j = 0; j < 2 * EIGHTS; ++j) any |= !(acc[i / 2][j / 2][i % 2 * 2 + j % 2] < cutoff);
                if (!any) continue;
                uint32_t mask = 0;
#pragma unroll
                for (int j = 0; j < 2 * EIGHTS; ++j) {
                    mask |= acc[i / 2][j / 2][i % 2 * 2 + j % 2] < cutoff ? 0 : 1u << j;
                }
                hits |= uint64_t(mask) << (2 * EIGHTS * i);
            }
            if (__any_sync(~0u, hits != 0)) candidates.add(hits, column, live_rows);
        });
    candidates.finish();
}
static_assert(2 * EIGHTS * SLOTS <= 64, "a tile's hits fit a word");

/// Into how many runs of centroids to cut the work on `row_tiles` tiles of rows, for `shares` blocks: one item each
/// for few rows, a few each for more, so that the last ones do not leave the others idle for long. A block alone
/// leaves nobody idle, and would only wait for each item's rows anew.
__device__ __forceinline__ int splits_of(int64_t row_tiles, int64_t tiles, int64_t shares) {
    if (shares == 1) return 1;
    const int64_t wanted = 2 * row_tiles <= shares ? shares / row_tiles : (4 * shares + row_tiles - 1) / row_tiles;
    return max(int64_t(1), min(tiles, wanted));
}

template <bool SPLIT, class T, class U>
__device__ __forceinline__ void recheck_problem(const Shared& s, const RecheckState& state, const T* x, const Rows& r,
                                                const Originals<U>& originals, int64_t at, const ScoredCentroids<T>& c,
                                                const float* row_error, const FirstPass& before, int metric,
                                                uint32_t* labels, const UnprovenRow* list, int64_t listed,
                                                int64_t share, int64_t shares) {
    const int64_t row_tiles = (listed + SM80_ROWS - 1) / SM80_ROWS, tiles = (c.k + CENTROIDS - 1) / CENTROIDS;
    const int splits = splits_of(row_tiles, tiles, shares);
    for (int64_t item = share; item < row_tiles * splits; item += shares) {
        const int64_t done = item / splits * SM80_ROWS, split = item % splits;
        recheck_tile<SPLIT>(s, state, x, r, originals, at, c, row_error, before, metric, labels, list + done,
                            int(min(int64_t(SM80_ROWS), listed - done)), int(split * tiles / splits),
                            int((split + 1) * tiles / splits));
    }
}

/// Problems are dealt to blocks; with fewer problems than blocks, each is shared by several. A block looks at as many
/// problems at once as it has threads, for most have no row listed. `centroids(at)` gives those of one.
template <bool SPLIT, class T, class U, class Centroids>
__device__ __forceinline__ void recheck(uint8_t* raw, const T* x, const Rows& r, const Active& active,
                                        const Originals<U>& originals, Centroids centroids, const float* row_error,
                                        const FirstPass& before, int metric, uint32_t* labels, const UnprovenRow* list,
                                        const uint32_t* listed) {
    const Shared s(raw, RECHECK_STATE_BYTES);
    const RecheckState state(s.added);
    const int64_t problems = active.problems(r.b), shares = blocks_each(problems), step = gridDim.x / shares;
    for (int64_t first = blockIdx.x / shares; first < problems; first += step * BLOCK) {
        const int64_t problem = first + threadIdx.x * step;
        if (!__syncthreads_or(problem < problems && listed[problem])) continue;
        for (int64_t at = first; at < min(problems, first + step * BLOCK); at += step) {
            const uint32_t rows = listed[at];
            if (rows == 0) continue;
            const uint32_t b = active.problem(at);
            const ScoredCentroids<T> c = centroids(at);
            const Originals<U> of_problem = {originals.x, originals.centroids, originals.r, originals.cr, b};
            recheck_problem<SPLIT>(s, state, x, r, of_problem, SPLIT ? at : b, c, row_error, before, metric,
                                   labels + int64_t(b) * r.n, list + at * r.n, rows, blockIdx.x % shares, shares);
        }
    }
}
