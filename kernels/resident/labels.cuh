// The labels of a block's rows: scores by mma.sync, and what they do not prove.
#pragma once
#include "resident/fit.cuh"

/// Labels FRAGMENTS * 16 rows from `first` on, by a warp; puts those it does not prove on the list.
template <class T, bool FACTOR>
template <int FRAGMENTS>
__device__ __forceinline__ void Fit<T, FACTOR>::search(int first) const {
    constexpr int OWN = 2 * FRAGMENTS;  // rows of a thread
    const int lane = threadIdx.x % WARP, quad = lane % 4;
    const uint32_t rows = shared_address(s.rows) + swizzled<LINE>(first + lane % 16, lane / 16);
    const uint32_t centroids = shared_address(s.centroids) + swizzled<LINE>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    RowResult found[OWN];
#pragma unroll 1
    for (int group = 0; group < shares.padded; group += GROUP) {
        float acc[FRAGMENTS][GROUP / 8][4];
#pragma unroll
        for (int j = 0; j < GROUP / 8; ++j) {
            float2 v = {0, 0};
            if (metric != COSINE) v = *reinterpret_cast<const float2*>(s.start + group + 8 * j + 2 * quad);
#pragma unroll
            for (int i = 0; i < FRAGMENTS; ++i) start_scores(acc[i][j], v);
        }
#pragma unroll 1
        for (int line = 0; line < lines; ++line) {
            const uint32_t rows_here = rows + line * shares.rows * LINE;
            const uint32_t centroids_here = centroids + (line * shares.padded + group) * LINE;
#pragma unroll
            for (int step = 0; step < LINE_COLUMNS / 16; ++step) {
                multiply_step<T>(
                    acc, [&](int i) { return (rows_here + i * 16 * LINE) ^ (step * 32); },
                    [&](int j) { return (centroids_here + j * 8 * LINE) ^ (step * 32); });
            }
        }
        if (metric == COSINE) {
#pragma unroll
            for (int j = 0; j < GROUP / 8; ++j) {
                const float2 u = *reinterpret_cast<const float2*>(s.start + group + 8 * j + 2 * quad);
                const float2 v = *reinterpret_cast<const float2*>(s.scale + group + 8 * j + 2 * quad);
#pragma unroll
                for (int i = 0; i < FRAGMENTS; ++i) scale_scores(acc[i][j], u, v);
            }
        }
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            float v[PLACES];
#pragma unroll
            for (int p = 0; p < PLACES; ++p) v[p] = acc[i / 2][p / 2][i % 2 * 2 + p % 2];
            found[i].add(v, group + 2 * quad);
        }
    }
    const auto [top, second, column] = winner_of_quad(found);
    const int row = first + 8 * quad + lane / 4;
    if (quad < OWN && row < live) {
        const int label = label_of(top, column, k);
        s.labels[row] = label;
        const Bounds& row_bounds = *reinterpret_cast<const Bounds*>(bounds);
        const float squares = s.squares[row];
        float error = error_bound(squares, d, row_bounds);
        bool far = false;
        if (row_bounds.inverse > 0) {
            float start, own;
            bounds_of(published(label), reach(), start, own);
            far = beyond(error, own, squares, d, row_bounds);
        }
        if (!(top - second > error && !far) && !nowhere(top, squares, row_bounds)) {
            s.list[atomicAdd(listed, 1)] = {uint32_t(row), top - error};
        }
    }
    __syncwarp();
}

/// The score of a row and a centroid, once more.
template <class T, bool FACTOR>
__device__ __forceinline__ float Fit<T, FACTOR>::score(int row, int j) const {
    float dot = 0;
#pragma unroll 4
    for (int piece = 0; piece < lines * LINE_PIECES; ++piece) {
        const int at = piece / LINE_PIECES * shares.rows * LINE + swizzled<LINE>(row, piece % LINE_PIECES);
        const uint4 u = *reinterpret_cast<const uint4*>(s.rows + at), v = *centroid_piece(j, piece);
        add_products<T>(dot, u, v);
    }
    return metric == COSINE ? fmaf(dot, s.scale[j], s.start[j]) : dot + s.start[j];
}

/// The f32 distance of a row and a centroid, by eight lanes: of the differences, which no common offset can blur.
template <class T, bool FACTOR>
__device__ __forceinline__ float Fit<T, FACTOR>::apart(int row, int j) const {
    const int part = threadIdx.x % PIECE;
    float sum = 0;
    for (int piece = part; piece * PIECE < d; piece += PIECE) {
        const int at = piece / LINE_PIECES * shares.rows * LINE + swizzled<LINE>(row, piece % LINE_PIECES);
        float u[PIECE], v[PIECE];
        widen<T>(u, *reinterpret_cast<const uint4*>(s.rows + at));
        widen<T>(v, __ldcg(reinterpret_cast<const uint4*>(c + j * d) + piece));
#pragma unroll
        for (int q = 0; q < PIECE; ++q) sum = fmaf(u[q] - v[q], u[q] - v[q], sum);
    }
    for (int lanes = 1; lanes < PIECE; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

/// A zero row is at the same cosine distance from all centroids; a warp looks at its columns.
template <class T, bool FACTOR>
__device__ __forceinline__ bool Fit<T, FACTOR>::without_direction(int row) const {
    uint32_t any = 0;
    for (int piece = threadIdx.x % WARP; piece < lines * LINE_PIECES; piece += WARP) {
        const int at = piece / LINE_PIECES * shares.rows * LINE + swizzled<LINE>(row, piece % LINE_PIECES);
        const uint4 v = *reinterpret_cast<const uint4*>(s.rows + at);
        any |= (v.x | v.y | v.z | v.w) & 0x7fff7fff;
    }
    return !__any_sync(~0u, any);
}

/// Labels the unproven rows, a warp each: of the centroids that may be the nearest, f32 distances leave few, and of
/// those the definition decides.
template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::recheck_unproven() const {
    __shared__ uint16_t queues[WARPS][WARP];
    const int lane = threadIdx.x % WARP;
    uint16_t* const queue = queues[threadIdx.x / WARP];
    for (uint32_t i = threadIdx.x / WARP; i < *listed; i += WARPS) {
        const UnprovenRow one = s.list[i];
        if (metric == COSINE && without_direction(one.row)) {
            int first = 0;
            while (first + 1 < k && s.start[first] == -INFINITY) ++first;
            if (lane == 0) s.labels[one.row] = first;
            continue;
        }
        int count = 0;
        for (int first = 0; first < k; first += WARP) {
            const int j = first + lane;
            const bool may = j < k && !(score(one.row, j) < one.cutoff);
            const uint32_t candidates = __ballot_sync(~0u, may);
            const int at = count + __popc(candidates & ((1u << lane) - 1));
            if (may && at < WARP) queue[at] = j;
            count += __popc(candidates);
        }
        __syncwarp();
        // A lane to a candidate; if they are too many, to every so many centroids.
        const bool fit = count <= WARP;
        bool stays = lane < count;
        if (fit && metric == SQUARED_EUCLIDEAN) {
            float own_distance = INFINITY;
            for (int n = 0; n < count; n += WARP / PIECE) {
                const float sum = apart(one.row, queue[min(n + lane / PIECE, count - 1)]);
                const float queued_distance = __shfl_sync(~0u, sum, ((lane - n) * PIECE) & (WARP - 1));
                if (lane / (WARP / PIECE) == n / (WARP / PIECE)) own_distance = queued_distance;
            }
            // A difference is off by a rounding, its square by two, the sum of a lane by one for each term, and by
            // three where lanes join.
            const float error = ((d + PIECE * PIECE - 1) / (PIECE * PIECE) * PIECE + 7) * 0x1.02p-24f;
            const float tiny = d * 1e-37f;
            float least = own_distance * (1 + 2 * error) + tiny;
            for (int lanes = 1; lanes < WARP; lanes *= 2) least = fminf(least, __shfl_xor_sync(~0u, least, lanes));
            stays &= !(own_distance * (1 - 2 * error) - tiny > least);
        }
        Best nearest = nothing();
        if (fit && __popc(__ballot_sync(~0u, stays)) == 1) {
            if (stays) nearest = {0, queue[lane]};
        } else {
            for (int j = fit ? stays ? queue[lane] : k : lane; j < k; j = fit ? k : j + WARP) {
                nearest = better(nearest, candidate(distance(metric, x + one.row * r.row_stride, c + j * d, d), j));
            }
        }
        nearest = warp_best(nearest);
        if (lane == 0) s.labels[one.row] = nearest.index;
        __syncwarp();
    }
}

template <class T, bool FACTOR>
__device__ void Fit<T, FACTOR>::label() const {
    const int warp = threadIdx.x / WARP;
    // Enough rows for every warp to have two fragments, or one.
    if (live > WARPS * 16) {
        for (int first = warp * 32; first < live; first += WARPS * 32) search<2>(first);
    } else if (warp * 16 < live) {
        search<1>(warp * 16);
    }
    __syncthreads();
    recheck_unproven();
    __syncthreads();
}
