// f32 rows and centroids as pairs of halves for tensor cores: v = h + l + what both lose, h = f16(v), l = f16(v - h).
//
// Halves are made of v = 2^s (x - mu) and 2^s (c - mu) (squared Euclidean; mu the columns' means), or 2^t x and 2^s c
// or 2^s c / |c| (dot product, cosine). 2^s belongs to a copy of the centroids and brings their largest element into
// [2^6, 2^7), or the norm of what is in reach (tensor.cuh; about mu here) to at most 2^15. Products decide nothing but
// an order, so where there is no mu each row has its own 2^t, which does the same for its elements. A first pass scores
// h.h for all rows; the rows that it proves nothing about are scored once more by h.h + h.l + l.h (`recheck_split` in
// recheck.cu); what even that leaves open is decided by the definition.
//
// Why the bound holds. X and C are the exact scaled row and centroid, and start = -|C|^2 / 2 (or 0), so that the exact
// score X.C + start orders the distances: squared Euclidean distances are 4^-s (|X|^2 - 2 score), whatever mu is.
//
//   One half:    X.C - hx.hc = (X - hx).C + hx.(C - hc), at most |X - hx| max|C| + |hx| max|C - hc|.
//   Two halves:  with X' = hx + lx, C' = hc + lc,
//                X.C - (hx.hc + hx.lc + lx.hc) = (X - X').C + X'.(C - C') + lx.lc,
//                at most |X - X'| max|C| + |hx| ((1 + 2^-11) max|C - C'| + 2^-11 max|lc|).
//
// All by Cauchy-Schwarz. For |l| <= 2^-11 |h| in each element, with no exception: half an ulp of a normal h is at most
// that, and is a power of two or below one, so rounding to f16 does not pass it; where h is subnormal or zero, or
// 2^-14, v - h is at most 2^-25 in magnitude and l is zero. The first term of each line is the row's: twice that is
// `row_error` and `row_error_split`, which are added to `error_bound` (tensor.cuh). The second is |hx| times `residual`
// of the bounds for h alone and of those for both, which `error_bound` includes. The rest is what `error_bound` says,
// with rows hx and centroids hc: partial sums stay below |hx| `moved` + `start`, where `moved` for two halves is (1 +
// 2^-10) max|hc| for the small products (|hx||lc| + |lx||hc| <= 2^-10 |hx||hc|), and the three products of 16 columns
// count as 48 columns.
//
// X itself is not known: v = fl(2^s fl(x - mu)) is off by 2^-24 of X for the difference (which never underflows) and
// by 2^-150 where the power underflows; both are in |X - hx| and |X - X'|. v - h and v - h - l are exact in f32.
// Subnormal halves are exact operands, and what they lose is in the residuals like any other loss. Where a half
// overflows, or anything else is not finite, the residual is not either and the row error is +inf: the row is never
// proven. Centroids are scaled in f64, off by 2^-53 (cosine: (d + 4) 2^-53) of themselves, and so is the sum in
// `start`: like the definition's own error, at most (d + 3) 2^-53 |X - C|^2, that is below a quarter of `definition`
// in `error_bound`, because `stored` is max|C| here. `definition` sees |hx| in place of |X|: the square of the
// difference is in the row error. No distance of f32 rows overflows or vanishes in f64, so no norm is out of range for
// being too large or too small.
#include "assign/duplicates.cuh"
#include "assign/reach.cuh"
#include "assign/tensor.cuh"

/// The power of two that brings the `largest` magnitude into [2^6, 2^7), as far as f32 has it; 1 for zero.
__device__ __forceinline__ float power_for(float largest) {
    const uint32_t bits = __float_as_uint(largest) & 0x7fffffff;
    const int exponent = bits >> 23 ? int(bits >> 23) - 127 : -118 - __clz(bits);
    const int power = min(126, max(-126, 6 - exponent));
    return bits ? __uint_as_float(uint32_t(power + 127) << 23) : 1;
}

// ---- Centroids.

/// Centroids are moved or divided by their norm before they are scaled.
struct Origin {
    const float* mu;  // null for zeros
    double norm;      // cosine: of the centroid; else 1

    __device__ __forceinline__ Origin(const float* c, int64_t d, int metric, const float* mu)
        : mu(metric == SQUARED_EUCLIDEAN ? mu : nullptr),
          norm(1) {
        if (metric != COSINE) return;
        double squares = 0;
        for (int64_t q = threadIdx.x % WARP; q < d; q += WARP) squares += wide(c[q]) * wide(c[q]);
        norm = sqrt(warp_sum(squares));
    }
    __device__ __forceinline__ double moved(const float* c, int64_t q) const {
        return mu ? wide(c[q]) - wide(mu[q]) : norm == 0 ? 0 : wide(c[q]) / norm;
    }
};

/// At least the norm of a row less mu, by a warp; zero for mu itself.
__device__ __forceinline__ float moved_norm(const float* row, const float* mu, int64_t d) {
    double squares = 0;
    for (int64_t q = threadIdx.x % WARP; q < d; q += WARP) {
        const double v = wide(row[q]) - wide(mu[q]);
        squares += v * v;
    }
    return __double2float_ru(sqrt(warp_sum(squares)) * (1 + (d + 16) * 0x1p-52));
}

/// Squared Euclidean: how far the rows of each copy of the centroids reach from mu, and in place of the largest
/// element a bound of those of centroids in reach, which may use nearly all of f16's range: [2^14, 2^15). A block to
/// each copy.
extern "C" __global__ void split_reach_f32(const float* x, Rows r, const float* c, Rows cr, Active active,
                                           const float* mu, float* largest, Reach* reaches) {
    const bool own = cr.b > 1 || r.b == 1;
    for (int64_t b = blockIdx.x; b < active.problems(cr.b); b += gridDim.x) {
        const int64_t p = active.problem(b), rows = own ? r.n : active.problems(r.b) * r.n;
        const float* origin = mu + b * cr.d;
        float most;
        const Reach found = reach_of(
            [&](int i) {
                const int64_t at = sample_of(i, rows), problem = own ? p : active.problem(at / r.n);
                return moved_norm(row_of(x, r, problem, at % r.n), origin, cr.d);
            },
            [&](int i) { return moved_norm(row_of(c, cr, p, sample_of(i, cr.n)), origin, cr.d); }, most);
        if (threadIdx.x == 0)
            reaches[b] = found, largest[b] = found.centroids < INFINITY ? found.centroids * 0x1p-8f : most;
    }
}

/// The largest finite magnitude of an element of each copy's centroids, or by their norm; `largest` is zero before. One
/// warp for each centroid.
extern "C" __global__ void split_largest_f32(const float* c, Rows cr, Active active, int metric, const float* mu,
                                             float* largest) {
    const int64_t all = active.problems(cr.b) * cr.n;
    for (int64_t i = global_thread() / WARP; i < all; i += all_threads() / WARP) {
        const int64_t b = i / cr.n;
        const float* from = row_of(c, cr, active.problem(b), i % cr.n);
        const Origin origin(from, cr.d, metric, mu + b * cr.d);
        double most = 0;
        for (int64_t q = threadIdx.x % WARP; q < cr.d; q += WARP) {
            const double v = fabs(origin.moved(from, q));
            if (v < __longlong_as_double(0x7ff0000000000000)) most = fmax(most, v);
        }
        for (int lane = WARP / 2; lane; lane /= 2) most = fmax(most, __shfl_xor_sync(~0u, most, lane));
        const float v = __double2float_rz(most);
        if (threadIdx.x % WARP == 0 && v > *const_cast<volatile float*>(&largest[b])) {
            atomicMax(reinterpret_cast<int*>(&largest[b]), __float_as_int(v));
        }
    }
}

/// One warp for each centroid and each place up to `padded`. `moved` is (copies, k, 2 pitch), h before l; `bounds` is
/// (2, copies), those for h alone before those for both, and zero before. `slot` is each centroid's in the table.
/// `reaches` is for squared Euclidean distances.
extern "C" __global__ void split_centroids_f32(const float* c, Rows cr, Active active, int metric, const float* mu,
                                               const float* largest, const Reach* reaches, int64_t pitch,
                                               int64_t padded, __half* moved, float* start, Bounds* bounds,
                                               unsigned long long* keys, uint32_t* first, int64_t slots,
                                               uint32_t* slot) {
    const int lane = threadIdx.x % WARP;
    const int64_t all = active.problems(cr.b) * padded;
    for (int64_t i = global_thread() / WARP; i < all; i += all_threads() / WARP) {
        const int64_t b = i / padded, j = i % padded;
        if (j >= cr.n) {
            if (lane == 0) start[i] = -INFINITY;
            continue;
        }
        const float* from = row_of(c, cr, active.problem(b), j);
        const Origin origin(from, cr.d, metric, mu + b * cr.d);
        const double power = power_for(largest[b]);
        __half* to = moved + (b * cr.n + j) * 2 * pitch;
        double squares = 0, high_squares = 0, low_squares = 0, lost = 0, lost_split = 0;
        unsigned long long hash = 0;
        for (int64_t q = lane; q < pitch; q += WARP) {
            const double v = q < cr.d ? power * origin.moved(from, q) : 0;
            const __half high = rounded<__half>(v);
            const double rest = v - wide(high);
            const __half low = rounded<__half>(rest);
            const double rest_split = rest - wide(low);
            to[q] = high, to[pitch + q] = low;
            squares += v * v, high_squares += wide(high) * wide(high), low_squares += wide(low) * wide(low);
            lost += rest * rest, lost_split += rest_split * rest_split;
            if (q < cr.d) hash += mix(uint64_t(q) << 32 | __float_as_uint(from[q]));
        }
        squares = warp_sum(squares), high_squares = warp_sum(high_squares), low_squares = warp_sum(low_squares);
        lost = warp_sum(lost), lost_split = warp_sum(lost_split);
        for (int other = WARP / 2; other; other /= 2) hash += __shfl_xor_sync(~0u, hash, other);
        const bool centred = metric == SQUARED_EUCLIDEAN;
        const Reach reach = centred ? reaches[b] : Reach{};
        const bool nowhere = squares != squares || (metric != DOT && !(squares < nothing().distance));
        const bool far = centred && !nowhere && sqrt(squares) > power * reach.centroids;
        const float from_here = nowhere ? -INFINITY : far ? NAN : centred ? float(-squares / 2) : 0;
        // Products with what overflows would be NaN, which are above all scores where these are compared as integers.
        for (int64_t q = lane; (nowhere || far) && q < pitch; q += WARP) to[q] = to[pitch + q] = __half(0.0f);
        if (lane == 0) start[i] = from_here, slot[b * cr.n + j] = Table{keys, first, slots}.enter(b, j, hash);
        // A lane to a bound.
        const double high = sqrt(high_squares), from_above = fabs(double(from_here)), stored = sqrt(squares);
        const double values[] = {high,
                                 from_above,
                                 sqrt(lost),
                                 metric == COSINE ? power : stored,
                                 1,
                                 high * (1 + 0x1p-10),
                                 from_above,
                                 sqrt(lost_split) * (1 + 0x1p-11) + 0x1p-11 * sqrt(low_squares),
                                 metric == COSINE ? power : stored,
                                 1};
        // A row that has a power of its own has its largest element in [2^6, 2^7).
        const double typical = centred ? reach.typical(power) : 64 * sqrt(double(cr.d));
        constexpr int PROVEN = 5;
        static_assert(offsetof(Bounds, inverse) == PROVEN * sizeof(float) && offsetof(Bounds, residual) == 8,
                      "as `values`");
        double bound = 0;
#pragma unroll
        for (int v = 0; v < 2 * PROVEN; ++v) bound = lane == v ? values[v] : bound;
        if (far || nowhere) {
            if (far && lane < 2) raise(&bounds[lane * cr.b + b].inverse, 1 / (power * reach.rows));
        } else if (lane < 2 * PROVEN) {
            raise(&bounds[lane / PROVEN * cr.b + b].moved + lane % PROVEN, bound);
        }
        if (lane < 2) raise(&bounds[lane * cr.b + b].typical, typical);
    }
}

// ---- Rows.

/// Twice what a score may lose, for rows that are off by `lost`, beyond what `error_bound` knows.
__device__ __forceinline__ float row_error_of(float lost, float largest_norm, int64_t d) {
    const float row_error = 2.002f * (lost * largest_norm + (d + 16) * 0x1p-50f * lost * lost);
    return row_error >= 0 ? row_error : INFINITY;
}

/// Splits `count` rows from row `first` of all that are to do on: row first + i to halves + 2 i pitch, h before l,
/// zeros past d. 4 to 32 lanes share a row; a warp has as many rows as fit. `bounds` are those for h alone. Traffic: X
/// once, and as much written.
extern "C" __global__ void __launch_bounds__(256, 4)
    split_rows_f32(const float* x, Rows r, Active active, int64_t first, int64_t count, int metric, const float* mu,
                   const float* largest, const Bounds* bounds, int64_t copies, int64_t pitch, __half* halves,
                   float* row_error, float* row_error_split) {
    count = min(count, active.problems(r.b) * r.n - first);
    const int64_t pieces = pitch / PIECE;
    const int lanes = pieces <= 4 ? 4 : pieces <= 8 ? 8 : pieces <= 16 ? 16 : 32;
    const int lane = threadIdx.x % WARP, part = lane % lanes, rows = WARP / lanes;
    for (int64_t at = global_thread() / WARP * rows; at < count; at += all_threads() / WARP * rows) {
        const bool live = at + lane / lanes < count;
        const int64_t i = live ? at + lane / lanes : count - 1;
        const int64_t b = r.b == 1 ? 0 : (first + i) / r.n, copy = copies > 1 ? b : 0;
        const float* from = row_of(x, r, active.problem(b), first + i - b * r.n);
        const float* origin = mu + copy * r.d;
        __half* to = halves + i * 2 * pitch;

        float v[PIECE];
        load_eight(v, from, part * PIECE, r.d);
        float most = 0;
        if (metric == SQUARED_EUCLIDEAN) {
            most = __ldg(&largest[copy]);
        } else {
#pragma unroll
            for (int e = 0; e < PIECE; ++e) most = fmaxf(most, fabsf(v[e]));
            for (int64_t piece = part + lanes; piece < pieces; piece += lanes) {
                float u[PIECE];
                load_eight(u, from, piece * PIECE, r.d);
#pragma unroll
                for (int e = 0; e < PIECE; ++e) most = fmaxf(most, fabsf(u[e]));
            }
            for (int offset = lanes / 2; offset; offset /= 2) {
                most = fmaxf(most, __shfl_xor_sync(~0u, most, offset));
            }
        }
        const float power = power_for(most);

        float squares = 0, lost = 0, lost_split = 0;
        for (int64_t piece = part; piece < pieces; piece += lanes) {
            if (piece != part) load_eight(v, from, piece * PIECE, r.d);
            if (metric == SQUARED_EUCLIDEAN) {
                float m[PIECE];
                load_eight(m, origin, piece * PIECE, r.d);
#pragma unroll
                for (int e = 0; e < PIECE; ++e) v[e] = __fsub_rn(v[e], m[e]);
            }
            uint32_t high[PIECE / 2], low[PIECE / 2];
#pragma unroll
            for (int e = 0; e < PIECE; e += 2) {
                const float2 w = {__fmul_rn(v[e], power), __fmul_rn(v[e + 1], power)};
                const __half2 h = __floats2half2_rn(w.x, w.y);
                const float2 h_wide = __half22float2(h);
                const float2 rest = {__fsub_rn(w.x, h_wide.x), __fsub_rn(w.y, h_wide.y)};
                const __half2 l = __floats2half2_rn(rest.x, rest.y);
                const float2 l_wide = __half22float2(l);
                const float2 rest_split = {__fsub_rn(rest.x, l_wide.x), __fsub_rn(rest.y, l_wide.y)};
                squares = fmaf(w.x, w.x, fmaf(w.y, w.y, squares));
                lost = fmaf(rest.x, rest.x, fmaf(rest.y, rest.y, lost));
                lost_split = fmaf(rest_split.x, rest_split.x, fmaf(rest_split.y, rest_split.y, lost_split));
                high[e / 2] = bits_of(h), low[e / 2] = bits_of(l);
            }
            if (live) {
                reinterpret_cast<uint4*>(to)[piece] = make_uint4(high[0], high[1], high[2], high[3]);
                reinterpret_cast<uint4*>(to + pitch)[piece] = make_uint4(low[0], low[1], low[2], low[3]);
            }
        }
        for (int offset = lanes / 2; offset; offset /= 2) {
            squares += __shfl_xor_sync(~0u, squares, offset), lost += __shfl_xor_sync(~0u, lost, offset);
            lost_split += __shfl_xor_sync(~0u, lost_split, offset);
        }
        if (live && part == 0) {
            const Bounds first_bounds = bounds[copy];
            const float largest_norm = 1.001f * (first_bounds.moved + first_bounds.residual);
            const float moving = metric == SQUARED_EUCLIDEAN ? 0x1.01p-24f * row_norm_above(squares, r.d) : 0;
            row_error[i] = row_error_of(row_norm_above(lost, r.d) + moving, largest_norm, r.d);
            row_error_split[i] = row_error_of(row_norm_above(lost_split, r.d) + moving, largest_norm, r.d);
        }
    }
}
