// Rows and centroids of a block's part in a fit: brought on chip, and centroids as they are scored.
#pragma once
#include "assign/duplicates.cuh"
#include "resident/fit.cuh"

/// Brings the rows on chip, with zeros beyond them and their columns.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::load() const {
    clear();
    for (int i = threadIdx.x; i < lines * shares.rows * LINE_PIECES; i += THREADS_HERE) {
        const int piece = i % LINE_PIECES, line = i / LINE_PIECES, row = line % shares.rows;
        const int column = line / shares.rows * LINE_COLUMNS + piece * PIECE;
        const bool stored = row < live && column < d;
        cp_async_16(shared_address(s.rows + (line - row) * LINE + swizzled<LINE>(row, piece)),
                    stored ? x + row * r.row_stride + column : x, stored ? 16 : 0);
    }
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    for (int row = threadIdx.x; row < shares.rows; row += THREADS_HERE) {
        float squares = 0;
        for (int piece = 0; piece < lines * LINE_PIECES; ++piece) {
            const int at = piece / LINE_PIECES * shares.rows * LINE + swizzled<LINE>(row, piece % LINE_PIECES);
            squares += piece_squares<T>(*reinterpret_cast<const uint4*>(s.rows + at));
        }
        s.squares[row] = squares;
        if (FACTOR) s.factor[row] = row < live ? factor[row] : 0;
    }
    __syncthreads();
    if (threadIdx.x < WARP) {
        // R of tensor.cuh: four times the norm that seven in eight of the warp's samples do not exceed.
        const int lane = threadIdx.x;
        const float squares = live ? s.squares[lane * live / WARP] : 0;
        const bool counts = squares > 0 && squares < INFINITY;
        const int all = __popc(__ballot_sync(~0u, counts));
        int rank = 0;
        for (int i = 0; i < WARP; ++i) {
            const float other = __shfl_sync(~0u, squares, i);
            rank += other > 0 && (other < squares || (other == squares && i < lane));
        }
        if (lane == 0) bounds[BOUNDS] = INFINITY;
        __syncwarp();
        if (counts && rank == (all - 1) * 7 / 8) bounds[BOUNDS] = 4 * sqrtf(squares);
    }
}

/// Asks for the lines of centroids `from` (k, d), with zeros beyond them and their columns.
template <class T, bool FACTOR>
__device__ __forceinline__ void Fit<T, FACTOR>::fetch_lines(const T* from) const {
    for (int i = threadIdx.x; i < lines * shares.padded * LINE_PIECES; i += THREADS_HERE) {
        const int piece = i % LINE_PIECES, line = i / LINE_PIECES, j = line % shares.padded;
        const int column = line / shares.padded * LINE_COLUMNS + piece * PIECE;
        const bool stored = j < k && column < d;
        cp_async_16(shared_address(s.centroids + (line - j) * LINE + swizzled<LINE>(j, piece)),
                    stored ? from + j * d + column : from, stored ? 16 : 0);
    }
    cp_async_commit();
}

/// mu as `origin` in prepare.cu has it, of as many groups of one value as a warp has lanes, a pair of columns to a
/// warp. It only has to be near the data, so it stays that of the centroids which a fit begins with.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::origin() const {
    fetch_lines(c);
    cp_async_wait<0>();
    __syncthreads();
    const int lane = threadIdx.x % WARP, step = (k + WARP - 1) / WARP, samples = (k + step - 1) / step;
    for (int pair = threadIdx.x / WARP; pair < lines * LINE_COLUMNS / 2; pair += WARPS) {
        float2 v = {0, 0};
        if (lane < samples) {
            const uint4* const piece = centroid_piece(lane * step, pair / 4);
            v = wide_pair(reinterpret_cast<const uint32_t*>(piece)[pair % 4], T());
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float value = i ? v.y : v.x;
            const float sample = lane < samples && fabsf(value) < INFINITY ? value : INFINITY;
            int rank = 0;
            for (int peer = 0; peer < WARP; ++peer) {
                const float other = __shfl_sync(~0u, sample, peer);
                rank += other < sample || (other == sample && peer < lane);
            }
            const uint32_t middle = __ballot_sync(~0u, rank == (samples - 1) / 2);
            const float m = __shfl_sync(~0u, sample, __ffs(middle) - 1);
            const bool exact = m > 0 ? sample >= m / 2 && sample <= m * 2 : m < 0 && sample >= m * 2 && sample <= m / 2;
            const int near = __popc(__ballot_sync(~0u, lane < samples && exact));
            const bool moves = metric == SQUARED_EUCLIDEAN && fabsf(m) < INFINITY && 8 * near >= 7 * samples;
            if (lane == 0) s.mu[2 * pair + i] = T(moves ? m : 0);
        }
    }
    __syncthreads();
}

/// Prepares centroid `j`, a warp's, for all blocks: `value(q)` gives its columns, each once.
template <class T, bool FACTOR>
template <class Value>
__device__ __forceinline__ void Fit<T, FACTOR>::publish(int j, Value value) const {
    const int lane = threadIdx.x % WARP;
    Sums sums;
    for (int q = lane; q < d; q += WARP) {
        const T v = value(q);
        const float m = filter(s.mu[q]);
        reinterpret_cast<T*>(to.moved)[j * d + q] = sums.add<T>(filter(v), m, m != 0);
        sums.hash += mix(uint64_t(q) << 16 | reinterpret_cast<const uint16_t&>(v));
    }
    sums.join(WARP);
    float start = sums.start(metric), scale = sums.scale(metric);
    Bounds own_bounds = sums.bounds(metric, d, start, scale);
    if (sums.nowhere(metric)) {
        start = -INFINITY, scale = 1, own_bounds = {};
        for (int q = lane; q < d; q += WARP) reinterpret_cast<T*>(to.moved)[j * d + q] = T(0.0f);
    }
    if (lane == 0) {
        const auto above = [](float v) { return __fmul_ru(v, 1 + 0x1p-20f); };
        to.prepared[j] = {start,
                          scale,
                          above(own_bounds.moved),
                          above(own_bounds.residual),
                          above(own_bounds.stored),
                          uint32_t(sums.hash >> 32)};
    }
}

template <class T, bool FACTOR>
__device__ __forceinline__ PreparedCentroid Fit<T, FACTOR>::published(int j) const {
    const uint4* const from = reinterpret_cast<const uint4*>(to.prepared + j);
    const uint4 low = __ldcg(from), high = __ldcg(from + 1);
    return {__uint_as_float(low.x), __uint_as_float(low.y),  __uint_as_float(low.z),
            __uint_as_float(low.w), __uint_as_float(high.x), high.y};
}

/// The bounds of a published centroid for this block's rows; `confine_to_reach` says what becomes of the rest.
template <class T, bool FACTOR>
__device__ __forceinline__ Bounds Fit<T, FACTOR>::bounds_of(const PreparedCentroid& prepared, const Reach& reach,
                                                            float& start, float& own) const {
    start = prepared.start, own = 0;
    // A start may also be -inf because squares leave f32: such a centroid unproves rows, as all do whose squares do.
    if (start == -INFINITY && prepared.stored == 0) return {};
    Bounds own_bounds = {prepared.moved, fabsf(start), prepared.residual, prepared.stored, prepared.scale, 0, 0, 0};
    confine_to_reach(own_bounds, reach, metric, prepared.stored, start, own);
    return own_bounds;
}

/// The reach of the block's rows (reach.cuh). Four centroids are looked at: the nearest of them to the origin shows
/// how near a centroid there is.
template <class T, bool FACTOR>
__device__ __forceinline__ Reach Fit<T, FACTOR>::reach() const {
    if (metric != SQUARED_EUCLIDEAN) return {};
    float least = INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const PreparedCentroid prepared = published(i * (k - 1) / 3);
        if (prepared.start > -INFINITY) least = fminf(least, prepared.stored);
    }
    const float rows = bounds[BOUNDS], centroids = 1.02f * (2 * rows + least);
    return centroids < 1e37f ? Reach{rows, centroids} : Reach{};
}

/// Brings what has been published on chip. Of equal centroids the first stays.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::prepare() const {
    fetch_lines(reinterpret_cast<const T*>(to.moved));
    const Reach reach = this->reach();
    for (int j = threadIdx.x; j < shares.padded; j += THREADS_HERE) {
        PreparedCentroid prepared = {-INFINITY};
        if (j < k) prepared = published(j);
        float start, own;
        const Bounds bounds_here = bounds_of(prepared, reach, start, own);
        s.start[j] = start, s.scale[j] = prepared.scale, s.hashes[j] = prepared.hash;
        // The bits of numbers that are not negative are ordered as they are, and those of a NaN above them.
        const float values[BOUNDS] = {bounds_here.moved,   bounds_here.start,  bounds_here.residual,
                                      bounds_here.stored,  bounds_here.scale,  bounds_here.inverse,
                                      bounds_here.rounded, bounds_here.typical};
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < BOUNDS; ++i) {
            const uint32_t warp_bound = __reduce_max_sync(~0u, __float_as_uint(values[i]) & 0x7fffffff);
            if (threadIdx.x % WARP == i) most = warp_bound;
        }
        if (threadIdx.x % WARP < BOUNDS) {
            atomicMax(reinterpret_cast<uint32_t*>(bounds) + threadIdx.x % WARP, most);
        }
    }
    cp_async_wait<0>();
    __syncthreads();
    for (int j = threadIdx.x; j < k; j += THREADS_HERE) {
        const uint32_t hash = s.hashes[j];
#pragma unroll 2
        for (int first = 0; first < j; first += 4) {
            const uint4 four = reinterpret_cast<const uint4*>(s.hashes)[first / 4];
            if (four.x != hash && four.y != hash && four.z != hash && four.w != hash) continue;
#pragma unroll 1
            for (int i = first; i < min(first + 4, j); ++i) {
                if (s.hashes[i] == hash && same_row(c + i * d, c + j * d, d)) s.start[j] = -INFINITY;
            }
        }
    }
    __syncthreads();
}
