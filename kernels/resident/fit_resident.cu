// A whole fit in one launch, for problems whose rows fit in the shared memory of the blocks that share them.
//
// The blocks of a team share a problem and keep its rows on chip for all iterations. In each, every block labels its
// rows with mma.sync, settles what that does not prove, brings its rows into cluster order and adds them up, cluster by
// cluster, to what the other blocks have of a cluster. When all have, each block finishes a share of the means and
// prepares them for the next scores. Sums are integers (src/fixed.rs), so it does not matter how rows are shared out.
// Clusters with a term that is no such integer, or with a row that is not finite, are added up once more from memory. A
// team waits for its own blocks alone, twice an iteration (the launch is cooperative, so all of them run), and once
// converged it goes on to another problem. Traffic: X once, labels once; centroids and sums stay in the L2 cache.
#include "assign/duplicates.cuh"
#include "assign/moved.cuh"
#include "assign/sweep.cuh"
#include "exact/sums.cuh"
#include "scan.cuh"

constexpr int THREADS_HERE = TEAM_THREADS, WARPS = THREADS_HERE / WARP;
constexpr int LINE = 128, LINE_COLUMNS = LINE / 2, LINE_PIECES = LINE / 16;  // bytes of 64 columns of a row
constexpr int GROUP = 32;                                                    // centroids scored at a time

// ---- Teams.

/// How problems are shared out (`FitResident` in src/plan.rs).
struct Shares {
    int blocks;  // of a team
    int rows;    // of a block, whole pairs of fragments
    int padded;  // centroids, whole groups
};

/// What goes with a moved centroid (tensor.cuh); the bounds are its own.
struct alignas(16) Prepared {
    float start, scale, moved, residual, stored;
    uint32_t hash;  // of the centroid itself
};

/// Where the blocks of a team add up what each of them has: zeros but for an iteration under way. One of each to a
/// team.
struct Common {
    unsigned long long* limbs;    // (LIMBS, k, whole lines), columns in the order of `place_of`
    unsigned long long* rest;     // (k, d, 2): what limbs could not take; null for f16 without factors
    unsigned long long* weights;  // (k, 2), of factors
    uint32_t* sizes;              // (k + 2), without; ODD if a cluster is to be added up once more; and behind
                                  // them, whether any is in an even and in an odd turn
    double* shifts;               // (2): the largest squared shift of an even and of an odd turn
    uint32_t* arrived;            // times that blocks have come to a barrier
    // And how the centroids are scored, which needs no zeros:
    void* moved;         // (k, d), in the type of the rows
    Prepared* prepared;  // (k)

    template <class T>
    __device__ Common of_team(int64_t team, int64_t limb_count, int64_t k, int64_t d) const {
        return {limbs + team * limb_count * k * ((d + LINE_COLUMNS - 1) / LINE_COLUMNS * LINE_COLUMNS),
                rest + team * k * d * 2,
                weights + team * k * 2,
                sizes + team * (k + 2),
                shifts + team * 2,
                arrived + team,
                reinterpret_cast<T*>(moved) + team * k * d,
                prepared + team * k};
    }
};

/// Of a cluster's size, beside the number of its rows.
constexpr uint32_t ODD = 1u << 31;

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
    uint32_t v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(from) : "memory");
    return v;
}

/// Waits for all blocks of the team; `all` is how often they will then have arrived. What any of them has written
/// before, all see after.
__device__ __forceinline__ void sync_team(uint32_t* arrived, uint32_t all) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        while (int32_t(load_acquire(arrived) - all) < 0) {
        }
    }
    __syncthreads();
}

// ---- What a block keeps.

/// A block's shared memory. Lines hold 64 columns of a row, swizzled by `piece_of`: first those of the first columns.
template <class T, bool FACTOR>
struct OnChip {
    uint8_t* rows;             // lines of the block's rows
    uint8_t* centroids;        // lines of the moved centroids
    double* totals;            // (k / blocks, d)
    double* factor;            // (rows)
    Listed* list;              // (rows): those to settle
    float* squares;            // (rows)
    float *start, *scale;      // (padded)
    uint32_t* hashes;          // (padded)
    uint32_t *begins, *next;   // (padded + 1) and (padded): where clusters begin, and the place of the next row
    T* mu;                     // (lines * 64)
    uint16_t *labels, *order;  // (rows)

    __device__ OnChip(uint8_t* raw, const Shares& shares, int k, int d) {
        const int lines = (d + LINE_COLUMNS - 1) / LINE_COLUMNS, most = (k + shares.blocks - 1) / shares.blocks;
        const auto take = [&](int bytes) {
            uint8_t* const at = raw;
            raw += bytes;
            return at;
        };
        rows = take(lines * shares.rows * LINE);
        centroids = take(lines * shares.padded * LINE);
        totals = reinterpret_cast<double*>(take(most * d * 8));
        factor = reinterpret_cast<double*>(take(FACTOR ? shares.rows * 8 : 0));
        list = reinterpret_cast<Listed*>(take(shares.rows * 8));
        squares = reinterpret_cast<float*>(take(shares.rows * 4));
        start = reinterpret_cast<float*>(take(shares.padded * 4));
        scale = reinterpret_cast<float*>(take(shares.padded * 4));
        hashes = reinterpret_cast<uint32_t*>(take(shares.padded * 4));
        begins = reinterpret_cast<uint32_t*>(take(shares.padded * 4 + 16));
        next = reinterpret_cast<uint32_t*>(take(shares.padded * 4));
        mu = reinterpret_cast<T*>(take(lines * LINE));
        labels = reinterpret_cast<uint16_t*>(take(shares.rows * 2));
        order = reinterpret_cast<uint16_t*>(take(shares.rows * 2));
    }
};

/// Where a 16-byte piece of line `row` lies: swizzled, so that eight rows' same piece are in different banks.
__device__ __forceinline__ int piece_of(int row, int piece) { return row * LINE + ((piece ^ (row & 7)) << 4); }

/// Where the sum of a column lies among its centroid's: lanes take two columns each, and first all add their first.
__device__ __forceinline__ int place_of(int column) {
    return column / LINE_COLUMNS * LINE_COLUMNS + column % 2 * WARP + column % LINE_COLUMNS / 2;
}

// ---- Sums that no integer of the scale holds. Not inlined, so that they take no registers from where they are not
// needed.

/// Adds up the marked ones of `owned` clusters, from `first` on every so many, once more: a column to a warp, from
/// where all blocks read their rows. Significands go to `totals`, the weight where it was.
template <class T, bool FACTOR>
__device__ __noinline__ void add_exactly(const T* x, int64_t row_stride, int64_t n, int d, const double* factor,
                                         bool dirty, const uint32_t* labels, int owned, int first, int step,
                                         uint32_t* sizes, unsigned long long* weights, double* totals,
                                         int16_t* exponents) {
    const int lane = threadIdx.x % WARP;
    for (int item = threadIdx.x / WARP; item < owned * (d + 1); item += WARPS) {
        const int i = item / (d + 1), q = item % (d + 1), j = first + i * step;
        if (!(__ldcg(sizes + j) & ODD)) continue;
        Gathered sum;
#pragma unroll 1
        for (int64_t next = 0; next < n; next += WARP) {
            const int64_t row = next + lane;
            double term = 0;
            if (row < n && __ldcg(labels + row) == uint32_t(j)) {
                const T* const values = x + row * row_stride;
                const double f = FACTOR ? factor[row] : 1;
                if (!dirty || finite(values, d)) term = q < d ? __dmul_rn(wide(values[q]), f) : f;
            }
            sum.add(term);
        }
        const Scaled its = sum.all().rounded();
        if (lane) continue;
        if (q < d) totals[i * d + q] = its.significand, exponents[i * d + q] = its.exponent;
        else if (FACTOR) *reinterpret_cast<Scaled*>(weights + 2 * j) = its;
        else sizes[j] = ODD | uint32_t(its.value(0));
    }
}

/// Replaces sums, significands and exponents, by what they are divided by, a warp's. Returns whether there is anything
/// to divide by.
__device__ __noinline__ bool divide(int divisor, Scaled weight, int d, double* totals, const int16_t* exponents) {
    const int lane = threadIdx.x % WARP;
    const auto total = [&](int q) { return Scaled{totals[q], exponents[q]}; };
    const Quotient by(
        divisor, weight,
        [&](int64_t shift) {
            double squares = 0;
            for (int q = lane; q < d; q += WARP) {
                const double t = total(q).value(shift);
                squares = __dadd_rn(squares, __dmul_rn(t, t));
            }
            return striped(squares);
        },
        [&] {
            int most = INT32_MIN;
            for (int q = lane; q < d; q += WARP) {
                if (totals[q] != 0) most = max(most, int(exponents[q]));
            }
            most = __reduce_max_sync(~0u, most);
            return int64_t(most == INT32_MIN ? 0 : most);
        });
    if (by.some()) {
        for (int q = lane; q < d; q += WARP) totals[q] = by.of(total(q));
    }
    __syncwarp();
    return by.some();
}

// ---- A fit.

/// A block's part in the fit of one problem.
template <class T, bool FACTOR>
struct Fit {
    static constexpr int LIMBS = FACTOR ? 2 : 1;
    /// Halves span 40 bits: their sums are exact as they are, and no cluster is ever marked.
    static constexpr bool EXACT = std::is_same<T, __half>::value && !FACTOR;

    const OnChip<T, FACTOR> s;
    const Common to;
    const Shares shares;
    float* const bounds;     // (BOUNDS), and how far most of the block's rows reach
    uint32_t* const listed;  // rows on the list
    const Rows r;
    const T* const x;  // of the problem, from the block's first row on
    const double* const factor;
    T* const c;                   // (k, d)
    const int k, d, lines, live;  // live: rows of the block
    const int metric, divisor;
    const int rank;    // of the block in its team
    const bool dirty;  // whether there may be rows that are not finite

    /// Brings the rows on chip, with zeros beyond them and their columns.
    __device__ void load() const {
        clear();
        for (int i = threadIdx.x; i < lines * shares.rows * LINE_PIECES; i += THREADS_HERE) {
            const int piece = i % LINE_PIECES, line = i / LINE_PIECES, row = line % shares.rows;
            const int column = line / shares.rows * LINE_COLUMNS + piece * PIECE;
            const bool some = row < live && column < d;
            copy_piece(shared_address(s.rows + (line - row) * LINE + piece_of(row, piece)),
                       some ? x + row * r.row_stride + column : x, some ? 16 : 0);
        }
        copies_commit();
        copies_wait<0>();
        __syncthreads();
        for (int row = threadIdx.x; row < shares.rows; row += THREADS_HERE) {
            float squares = 0;
            for (int piece = 0; piece < lines * LINE_PIECES; ++piece) {
                const int at = piece / LINE_PIECES * shares.rows * LINE + piece_of(row, piece % LINE_PIECES);
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

    // ---- Centroids as they are scored.

    __device__ __forceinline__ uint4* centroid_piece(int j, int piece) const {
        const int at = piece / LINE_PIECES * shares.padded * LINE + piece_of(j, piece % LINE_PIECES);
        return reinterpret_cast<uint4*>(s.centroids + at);
    }

    /// Asks for the lines of centroids `from` (k, d), with zeros beyond them and their columns.
    __device__ __forceinline__ void fetch_lines(const T* from) const {
        for (int i = threadIdx.x; i < lines * shares.padded * LINE_PIECES; i += THREADS_HERE) {
            const int piece = i % LINE_PIECES, line = i / LINE_PIECES, j = line % shares.padded;
            const int column = line / shares.padded * LINE_COLUMNS + piece * PIECE;
            const bool some = j < k && column < d;
            copy_piece(shared_address(s.centroids + (line - j) * LINE + piece_of(j, piece)),
                       some ? from + j * d + column : from, some ? 16 : 0);
        }
        copies_commit();
    }

    /// mu as `origin` in prepare.cu has it, of as many groups of one value as a warp has lanes, a pair of columns to a
    /// warp. It
    /// only has to be near the data, so it stays that of the centroids which a fit begins with.
    __device__ void origin() const {
        fetch_lines(c);
        copies_wait<0>();
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
                const float mine = lane < samples && fabsf(value) < INFINITY ? value : INFINITY;
                int rank = 0;
                for (int of = 0; of < WARP; ++of) {
                    const float other = __shfl_sync(~0u, mine, of);
                    rank += other < mine || (other == mine && of < lane);
                }
                const uint32_t middle = __ballot_sync(~0u, rank == (samples - 1) / 2);
                const float m = __shfl_sync(~0u, mine, __ffs(middle) - 1);
                const bool exact = m > 0 ? mine >= m / 2 && mine <= m * 2 : m < 0 && mine >= m * 2 && mine <= m / 2;
                const int near = __popc(__ballot_sync(~0u, lane < samples && exact));
                const bool moves = metric == SQUARED_EUCLIDEAN && fabsf(m) < INFINITY && 8 * near >= 7 * samples;
                if (lane == 0) s.mu[2 * pair + i] = T(moves ? m : 0);
            }
        }
        __syncthreads();
    }

    /// Prepares centroid `j`, a warp's, for all blocks: `value(q)` gives its columns, each once.
    template <class Value>
    __device__ __forceinline__ void publish(int j, Value value) const {
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
        Bounds its = sums.bounds(metric, d, start, scale);
        if (sums.nowhere(metric)) {
            start = -INFINITY, scale = 1, its = {};
            for (int q = lane; q < d; q += WARP) reinterpret_cast<T*>(to.moved)[j * d + q] = T(0.0f);
        }
        if (lane == 0) {
            const auto above = [](float v) { return __fmul_ru(v, 1 + 0x1p-20f); };
            to.prepared[j] = {
                start, scale, above(its.moved), above(its.residual), above(its.stored), uint32_t(sums.hash >> 32)};
        }
    }

    /// Nothing is known of the centroids, and no row is listed.
    __device__ __forceinline__ void clear() const {
        if (threadIdx.x < BOUNDS) bounds[threadIdx.x] = 0;
        if (threadIdx.x == 0) *listed = 0;
    }

    __device__ __forceinline__ Prepared published(int j) const {
        const uint4* const from = reinterpret_cast<const uint4*>(to.prepared + j);
        const uint4 low = __ldcg(from), high = __ldcg(from + 1);
        return {__uint_as_float(low.x), __uint_as_float(low.y),  __uint_as_float(low.z),
                __uint_as_float(low.w), __uint_as_float(high.x), high.y};
    }

    /// The bounds of a published centroid for this block's rows; `limit_to` says what becomes of the rest.
    __device__ __forceinline__ Bounds bounds_of(const Prepared& its, const Reach& reach, float& start,
                                                float& own) const {
        start = its.start, own = 0;
        // A start may also be -inf because squares leave f32: such a centroid unproves rows, as all do whose squares do.
        if (start == -INFINITY && its.stored == 0) return {};
        Bounds of = {its.moved, fabsf(start), its.residual, its.stored, its.scale, 0, 0};
        limit_to(of, reach, metric, its.stored, start, own);
        return of;
    }

    /// The reach of the block's rows (reach.cuh). Four centroids are looked at: the nearest of them to the origin shows
    /// how near a centroid there is.
    __device__ __forceinline__ Reach reach() const {
        if (metric != SQUARED_EUCLIDEAN) return {};
        float least = INFINITY;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Prepared its = published(i * (k - 1) / 3);
            if (its.start > -INFINITY) least = fminf(least, its.stored);
        }
        const float rows = bounds[BOUNDS], centroids = 1.02f * (2 * rows + least);
        return centroids < 1e37f ? Reach{rows, centroids} : Reach{};
    }

    /// Brings what has been published on chip. Of equal centroids the first stays.
    __device__ void prepare() const {
        fetch_lines(reinterpret_cast<const T*>(to.moved));
        const Reach reach = this->reach();
        for (int j = threadIdx.x; j < shares.padded; j += THREADS_HERE) {
            Prepared its = {-INFINITY};
            if (j < k) its = published(j);
            float start, own;
            const Bounds bounds_here = bounds_of(its, reach, start, own);
            s.start[j] = start, s.scale[j] = its.scale, s.hashes[j] = its.hash;
            // The bits of numbers that are not negative are ordered as they are, and those of a NaN above them.
            const float of[BOUNDS] = {bounds_here.moved,  bounds_here.start, bounds_here.residual, bounds_here.stored,
                                      bounds_here.scale, bounds_here.inverse, bounds_here.rounded};
            uint32_t most = 0;
#pragma unroll
            for (int i = 0; i < BOUNDS; ++i) {
                const uint32_t here = __reduce_max_sync(~0u, __float_as_uint(of[i]) & 0x7fffffff);
                if (threadIdx.x % WARP == i) most = here;
            }
            if (threadIdx.x % WARP < BOUNDS) {
                atomicMax(reinterpret_cast<uint32_t*>(bounds) + threadIdx.x % WARP, most);
            }
        }
        copies_wait<0>();
        __syncthreads();
        for (int j = threadIdx.x; j < k; j += THREADS_HERE) {
            const uint32_t mine = s.hashes[j];
#pragma unroll 2
            for (int first = 0; first < j; first += 4) {
                const uint4 four = reinterpret_cast<const uint4*>(s.hashes)[first / 4];
                if (four.x != mine && four.y != mine && four.z != mine && four.w != mine) continue;
#pragma unroll 1
                for (int i = first; i < min(first + 4, j); ++i) {
                    if (s.hashes[i] == mine && same_row(c + i * d, c + j * d, d)) s.start[j] = -INFINITY;
                }
            }
        }
        __syncthreads();
    }

    // ---- Labels.

    /// Labels FRAGMENTS * 16 rows from `first` on, by a warp; puts those it does not prove on the list.
    template <int FRAGMENTS>
    __device__ __forceinline__ void search(int first) const {
        constexpr int OWN = 2 * FRAGMENTS;  // rows of a thread
        const int lane = threadIdx.x % WARP, quad = lane % 4;
        const uint32_t rows = shared_address(s.rows) + piece_of(first + lane % 16, lane / 16);
        const uint32_t centroids = shared_address(s.centroids) + piece_of(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        Found found[OWN];
#pragma unroll 1
        for (int group = 0; group < shares.padded; group += GROUP) {
            float acc[FRAGMENTS][GROUP / 8][4];
#pragma unroll
            for (int j = 0; j < GROUP / 8; ++j) {
                float2 v = {0, 0};
                if (metric != COSINE) v = *reinterpret_cast<const float2*>(s.start + group + 8 * j + 2 * quad);
#pragma unroll
                for (int i = 0; i < FRAGMENTS; ++i)
                    acc[i][j][0] = acc[i][j][2] = v.x, acc[i][j][1] = acc[i][j][3] = v.y;
            }
#pragma unroll 1
            for (int line = 0; line < lines; ++line) {
                const uint32_t rows_here = rows + line * shares.rows * LINE;
                const uint32_t centroids_here = centroids + (line * shares.padded + group) * LINE;
#pragma unroll
                for (int step = 0; step < LINE_COLUMNS / 16; ++step) {
                    uint32_t a[FRAGMENTS][4];
#pragma unroll
                    for (int i = 0; i < FRAGMENTS; ++i) load_fragment(a[i], (rows_here + i * 16 * LINE) ^ (step * 32));
#pragma unroll
                    for (int j = 0; j < GROUP / 8; j += 2) {
                        uint32_t b[4];
                        load_fragment(b, (centroids_here + j * 8 * LINE) ^ (step * 32));
#pragma unroll
                        for (int i = 0; i < FRAGMENTS; ++i) {
                            multiply(acc[i][j], a[i], b[0], b[1], T());
                            multiply(acc[i][j + 1], a[i], b[2], b[3], T());
                        }
                    }
                }
            }
            if (metric == COSINE) {
#pragma unroll
                for (int j = 0; j < GROUP / 8; ++j) {
                    const float2 u = *reinterpret_cast<const float2*>(s.start + group + 8 * j + 2 * quad);
                    const float2 v = *reinterpret_cast<const float2*>(s.scale + group + 8 * j + 2 * quad);
#pragma unroll
                    for (int i = 0; i < FRAGMENTS; ++i) {
                        acc[i][j][0] = fmaf(acc[i][j][0], v.x, u.x), acc[i][j][1] = fmaf(acc[i][j][1], v.y, u.y);
                        acc[i][j][2] = fmaf(acc[i][j][2], v.x, u.x), acc[i][j][3] = fmaf(acc[i][j][3], v.y, u.y);
                    }
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
        // Of the four lanes that share rows, each settles one.
        float top = 0, second = 0;
        int column = 0;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
            found[i].finish();
            found[i].join(1), found[i].join(2);
            if (i == quad) top = found[i].top, second = found[i].second, column = found[i].column;
        }
        const int row = first + 8 * quad + lane / 4;
        if (quad < OWN && row < live) {
            const int label = top > -INFINITY && column < k ? column : 0;
            s.labels[row] = label;
            const Bounds& of = *reinterpret_cast<const Bounds*>(bounds);
            const float squares = s.squares[row];
            float off = margin(squares, d, of);
            bool far = false;
            if (of.inverse > 0) {
                float start, own;
                bounds_of(published(label), reach(), start, own);
                far = beyond(off, own, squares, d, of);
            }
            if (!(top - second > off && !far) && !nowhere(top, squares, of)) {
                s.list[atomicAdd(listed, 1)] = {uint32_t(row), top - off};
            }
        }
        __syncwarp();
    }

    /// The score of a row and a centroid, once more.
    __device__ __forceinline__ float score(int row, int j) const {
        float dot = 0;
#pragma unroll 4
        for (int piece = 0; piece < lines * LINE_PIECES; ++piece) {
            const int at = piece / LINE_PIECES * shares.rows * LINE + piece_of(row, piece % LINE_PIECES);
            const uint4 u = *reinterpret_cast<const uint4*>(s.rows + at), v = *centroid_piece(j, piece);
            const uint32_t us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 p = wide_pair(us[i], T()), q = wide_pair(vs[i], T());
                dot = fmaf(p.x, q.x, fmaf(p.y, q.y, dot));
            }
        }
        return metric == COSINE ? fmaf(dot, s.scale[j], s.start[j]) : dot + s.start[j];
    }

    /// The f32 distance of a row and a centroid, by eight lanes: of the differences, which no common offset can blur.
    __device__ __forceinline__ float apart(int row, int j) const {
        const int part = threadIdx.x % PIECE;
        float sum = 0;
        for (int piece = part; piece * PIECE < d; piece += PIECE) {
            const int at = piece / LINE_PIECES * shares.rows * LINE + piece_of(row, piece % LINE_PIECES);
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
    __device__ __forceinline__ bool without_direction(int row) const {
        uint32_t any = 0;
        for (int piece = threadIdx.x % WARP; piece < lines * LINE_PIECES; piece += WARP) {
            const int at = piece / LINE_PIECES * shares.rows * LINE + piece_of(row, piece % LINE_PIECES);
            const uint4 v = *reinterpret_cast<const uint4*>(s.rows + at);
            any |= (v.x | v.y | v.z | v.w) & 0x7fff7fff;
        }
        return !__any_sync(~0u, any);
    }

    /// Settles the listed rows, a warp each: of the centroids that may be the nearest, f32 distances leave few, and of
    /// those the definition decides.
    __device__ void settle_list() const {
        __shared__ uint16_t queues[WARPS][WARP];
        const int lane = threadIdx.x % WARP;
        uint16_t* const queue = queues[threadIdx.x / WARP];
        for (uint32_t i = threadIdx.x / WARP; i < *listed; i += WARPS) {
            const Listed one = s.list[i];
            if (metric == COSINE && without_direction(one.row)) {
                int first = 0;
                while (first + 1 < k && s.start[first] == -INFINITY) ++first;
                if (lane == 0) s.labels[one.row] = first;
                continue;
            }
            int count = 0;
            for (int first = 0; first < k; first += WARP) {
                const int j = first + lane;
                const bool may = j < k && !(score(one.row, j) < one.limit);
                const uint32_t some = __ballot_sync(~0u, may);
                const int at = count + __popc(some & ((1u << lane) - 1));
                if (may && at < WARP) queue[at] = j;
                count += __popc(some);
            }
            __syncwarp();
            // A lane to a candidate; if they are too many, to every so many centroids.
            const bool fit = count <= WARP;
            bool stays = lane < count;
            if (fit && metric == SQUARED_EUCLIDEAN) {
                float mine = INFINITY;
                for (int n = 0; n < count; n += WARP / PIECE) {
                    const float sum = apart(one.row, queue[min(n + lane / PIECE, count - 1)]);
                    const float its = __shfl_sync(~0u, sum, ((lane - n) * PIECE) & (WARP - 1));
                    if (lane / (WARP / PIECE) == n / (WARP / PIECE)) mine = its;
                }
                // A difference is off by a rounding, its square by two, the sum of a lane by one for each term, and by
                // three where lanes join.
                const float off = ((d + PIECE * PIECE - 1) / (PIECE * PIECE) * PIECE + 7) * 0x1.02p-24f;
                const float tiny = d * 1e-37f;
                float least = mine * (1 + 2 * off) + tiny;
                for (int lanes = 1; lanes < WARP; lanes *= 2) least = fminf(least, __shfl_xor_sync(~0u, least, lanes));
                stays &= !(mine * (1 - 2 * off) - tiny > least);
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

    __device__ void label() const {
        const int warp = threadIdx.x / WARP;
        // Enough rows for every warp to have two fragments, or one.
        if (live > WARPS * 16) {
            for (int first = warp * 32; first < live; first += WARPS * 32) search<2>(first);
        } else if (warp * 16 < live) {
            search<1>(warp * 16);
        }
        __syncthreads();
        settle_list();
        __syncthreads();
    }

    // ---- Means.

    /// Columns that limbs have room for.
    __device__ __forceinline__ int width() const { return lines * LINE_COLUMNS; }

    /// Whether a row counts: one that is not finite weighs nothing.
    __device__ __forceinline__ bool counts(int row) const { return !dirty || finite(x + row * r.row_stride, d); }

    /// Brings the rows that count into the order of their clusters.
    __device__ void sort() const {
        clear();
        for (int j = threadIdx.x; j <= k; j += THREADS_HERE) s.begins[j] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < live; i += THREADS_HERE) {
            if (counts(i)) atomicAdd(&s.begins[s.labels[i]], 1);
        }
        __syncthreads();
        block_scan(
            k + 1, [&](int64_t j) { return s.begins[j]; },
            [&](int64_t j, uint32_t before) {
                s.begins[j] = before;
                if (j < k) s.next[j] = before;
            });
        __syncthreads();
        for (int i = threadIdx.x; i < live; i += THREADS_HERE) {
            if (counts(i)) s.order[atomicAdd(&s.next[s.labels[i]], 1)] = i;
        }
        __syncthreads();
    }

    /// Adds up the block's rows of each cluster, a warp's, two columns of a line to a lane. Says whether it marks any.
    template <int LINES>
    __device__ void add(const Units<T>& units, int weight_scale, uint32_t* marked) const {
        const int lane = threadIdx.x % WARP, line_bytes = shares.rows * LINE;
        const uint8_t* const rows = s.rows + lane % 4 * 4;
        double per_unit[LIMBS];
#pragma unroll
        for (int l = 0; l < LIMBS; ++l) per_unit[l] = units.extreme ? 0 : power_of_two(-units.unit(l));
        // Blocks begin at different clusters, for they should not add to the same ones at the same time.
        const int ahead = rank * k / shares.blocks;
#pragma unroll 1
        for (int i = threadIdx.x / WARP; i < k; i += WARPS) {
            const int j = i + ahead < k ? i + ahead : i + ahead - k;
            const int begin = s.begins[j], end = s.begins[j + 1];
            if (begin == end) continue;
            double sums[LIMBS][LINES][2] = {};
            __int128 weight = 0;
            bool odd = false;
#pragma unroll 2
            for (int place = begin; place < end; ++place) {
                const int row = s.order[place];
                const uint8_t* const at = rows + row * LINE + ((lane / 4 ^ row & 7) << 4);
                const double f = FACTOR ? s.factor[row] : 1;
                if (FACTOR && divisor == WEIGHT) {
                    __int128 q;
                    odd |= !fixed_quantise(f, weight_scale, q);
                    weight += q;
                }
#pragma unroll
                for (int line = 0; line < LINES; ++line) {
                    const uint32_t two = *reinterpret_cast<const uint32_t*>(at + line * line_bytes);
                    struct alignas(4) Pair {
                        T values[2];
                    } const pair = reinterpret_cast<const Pair&>(two);
                    if (!FACTOR && (EXACT || units.fit(pair.values))) {
                        sums[0][line][0] += Small<T>::low(two), sums[0][line][1] += Small<T>::high(two);
                        continue;
                    }
                    take(pair.values, f, units, j, line * LINE_COLUMNS + 2 * lane, sums, line, odd);
                }
            }
#pragma unroll
            for (int l = 0; l < LIMBS; ++l) {
                unsigned long long* const limbs = to.limbs + (l * k + j) * (LINES * LINE_COLUMNS) + lane;
#pragma unroll
                for (int line = 0; line < LINES; ++line) {
#pragma unroll
                    for (int q = 0; q < 2; ++q) {
                        const double sum = FACTOR ? sums[l][line][q] : sums[l][line][q] * power_of_two(Small<T>::SCALE);
                        atomicAdd(limbs + line * LINE_COLUMNS + q * WARP,
                                  (unsigned long long)__double2ll_rn(sum * per_unit[l]));
                    }
                }
            }
            if (!EXACT) odd = __any_sync(~0u, odd);
            if (lane) continue;
            if (odd) atomicOr(to.sizes + j, ODD), *marked = 1;
            if (FACTOR) atomic_add(to.weights + 2 * j, weight);
            else atomicAdd(to.sizes + j, end - begin);
        }
    }

    /// Adds two columns' terms that need to be cut; what limbs do not take goes to the common rest.
    template <int LINES>
    __device__ __forceinline__ void take(const T (&values)[2], double f, const Units<T>& units, int j, int column,
                                         double (&sums)[LIMBS][LINES][2], int line, bool& odd) const {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            double v = __dmul_rn(wide(values[q]), f);
            if (!isfinite(v)) {
                v = 0;
            }
            // Rounded toward zero, so that what is left has the sign of the term.
#pragma unroll
            for (int l = 0; l < LIMBS; ++l) {
                const double rounder = copysign(units.rounder(l), v);
                const double limb = units.extreme ? 0 : __dadd_rz(v, rounder) - rounder;
                sums[l][line][q] += FACTOR ? limb : limb * power_of_two(-Small<T>::SCALE), v -= limb;
            }
            if (v != 0) {
                __int128 whole;
                odd |= !fixed_quantise(v, units.scale, whole) || units.extreme;
                atomic_add(to.rest + 2 * (j * d + column + q), whole);
            }
        }
    }

    __device__ void add(const Units<T>& units, int weight_scale, uint32_t* marked) const {
        static_assert(TEAM_COLUMNS == 4 * LINE_COLUMNS, "so many lines");
        if (lines == 1) add<1>(units, weight_scale, marked);
        else if (lines == 2) add<2>(units, weight_scale, marked);
        else if (lines == 3) add<3>(units, weight_scale, marked);
        else add<4>(units, weight_scale, marked);
    }

    /// The exponents of the sums of marked clusters, one for each of `totals`, lie over the moved centroids, which are
    /// not read before the next ones are brought there.
    __device__ __forceinline__ int16_t* exponents() const { return reinterpret_cast<int16_t*>(s.centroids); }

    /// What the block's share of the clusters have been added up to, to `totals`. Leaves zeros there.
    __device__ __forceinline__ void collect(const Units<T>& units, int owned) const {
        for (int i = threadIdx.x; i < owned * d; i += THREADS_HERE) {
            const int j = rank + i / d * shares.blocks, column = i % d;
            __int128 total = 0;
#pragma unroll
            for (int l = 0; l < LIMBS; ++l) {
                unsigned long long* const limb = to.limbs + (l * k + j) * width() + place_of(column);
                total += __int128((long long)__ldcg(limb)) << (units.unit(l) + units.scale);
                *limb = 0;
            }
            if (!EXACT) {
                unsigned long long* const its = to.rest + 2 * (j * d + column);
                const unsigned long long low = __ldcg(its), high = __ldcg(its + 1);
                if (low | high) total += __int128(high) << 64 | low, its[0] = its[1] = 0;
            }
            s.totals[i] = fixed_value(total, units.scale);
        }
    }

    __device__ __forceinline__ int owned() const { return (k - rank + shares.blocks - 1) / shares.blocks; }

    /// Replaces centroid `j` by its sums over what they are divided by, a warp's.
    __device__ __forceinline__ void replace(int j, const double* totals, double by, double* shift) const {
        double moved = 0;
        publish(j, [&](int q) {
            const T mean = rounded<T>(__ddiv_rn(totals[q], by)), old = c[j * d + q];
            moved = __dadd_rn(moved, squared(wide(mean), wide(old)));
            c[j * d + q] = mean;
            return mean;
        });
        moved = striped(moved);
        if (threadIdx.x % WARP == 0 && !(moved == 0)) atomic_max(shift, moved == moved ? moved : INFINITY);
    }

    /// Replaces the block's share of the centroids, every so many, but those of no weight and those of marked clusters.
    __device__ void replace(const Units<T>& units, int weight_scale, double* shift, uint32_t* marked) const {
        const int lane = threadIdx.x % WARP, owned = this->owned();
        collect(units, owned);
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x / WARP; i < owned; i += WARPS) {
            const int j = rank + i * shares.blocks;
            const uint32_t size = __ldcg(to.sizes + j);
            if (size & ODD) continue;
            const double* const totals = s.totals + i * d;
            unsigned long long low = 0, high = 0;
            if (FACTOR) low = __ldcg(to.weights + 2 * j), high = __ldcg(to.weights + 2 * j + 1);
            double by = 0;
            if (divisor == NORM) {
                double squares = 0;
                bool some = false;
                for (int q = lane; q < d; q += WARP) {
                    squares = __dadd_rn(squares, __dmul_rn(totals[q], totals[q])), some |= totals[q] != 0;
                }
                squares = striped(squares);
                // What squares of f64 cannot measure is marked.
                if (!EXACT && !(LEAST_SQUARES <= squares && squares <= MOST_SQUARES) && __any_sync(~0u, some)) {
                    if (lane == 0) to.sizes[j] = size | ODD, *marked = 1;
                    continue;
                }
                by = __dsqrt_rn(squares);
            } else {
                by = FACTOR ? fixed_value(__int128(high) << 64 | low, weight_scale) : size;
            }
            __syncwarp();
            if (lane == 0) {
                if (FACTOR) to.weights[2 * j] = to.weights[2 * j + 1] = 0;
                else to.sizes[j] = 0;
            }
            if (by > 0) replace(j, totals, by, shift);
        }
    }

    /// Adds up marked clusters once more and replaces the block's share of their centroids, when all others have been.
    /// `labels` (n) is where blocks tell each other theirs for that. Blocks meet here twice; `all` is how often they had
    /// arrived before.
    __device__ void replace_marked(double* shift, uint32_t* labels, uint32_t all) const {
        const int lane = threadIdx.x % WARP, owned = this->owned();
        for (int i = threadIdx.x; i < live; i += THREADS_HERE) labels[rank * shares.rows + i] = s.labels[i];
        sync_team(to.arrived, all + shares.blocks);
        const int64_t before = int64_t(rank) * shares.rows;
        add_exactly<T, FACTOR>(x - (live ? before : 0) * r.row_stride, r.row_stride, r.n, d,
                               FACTOR ? factor - before : nullptr, dirty, labels, owned, rank, shares.blocks, to.sizes,
                               to.weights, s.totals, exponents());
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x / WARP; i < owned; i += WARPS) {
            const int j = rank + i * shares.blocks;
            const uint32_t size = __ldcg(to.sizes + j);
            if (!(size & ODD)) continue;
            Scaled weight = scaled(double(size & ~ODD));
            if (FACTOR) {
                const unsigned long long low = __ldcg(to.weights + 2 * j), high = __ldcg(to.weights + 2 * j + 1);
                weight = {__longlong_as_double(low), int64_t(high)};
            }
            double* const totals = s.totals + i * d;
            const bool some = divide(divisor, weight, d, totals, exponents() + i * d);
            __syncwarp();
            if (lane == 0) {
                if (FACTOR) to.weights[2 * j] = to.weights[2 * j + 1] = 0;
                to.sizes[j] = 0;
            }
            if (some) replace(j, totals, 1, shift);
        }
        sync_team(to.arrived, all + 2 * shares.blocks);
    }
};

/// `Fit::replace_marked`, which few fits need. It is not inlined and takes a copy, so that the others keep their registers.
template <class T, bool FACTOR>
__device__ __noinline__ void replace_marked(Fit<T, FACTOR> fit, double* shift, uint32_t* labels, uint32_t all) {
    fit.replace_marked(shift, labels, all);
}

template <class T, bool FACTOR>
__device__ void fit(const T* x, const Rows& r, const Terms& terms, int metric, int divisor, int64_t max_iters,
                    const double* threshold, const Shares& shares, const Common& common, uint32_t* stop, int64_t k,
                    T* centroids, uint32_t* labels) {
    extern __shared__ __align__(128) uint8_t raw[];
    __shared__ float bounds[BOUNDS + 1];
    __shared__ uint32_t listed;
    using Problem = Fit<T, FACTOR>;
    const int d = int(r.d), rank = blockIdx.x % shares.blocks;
    const int64_t team = blockIdx.x / shares.blocks, first_row = int64_t(rank) * shares.rows;
    const OnChip<T, FACTOR> s(raw, shares, k, d);
    const Common to = common.of_team<T>(team, Problem::LIMBS, k, d);
    const int live = int(max(int64_t(0), min(int64_t(shares.rows), r.n - first_row)));
    uint32_t all = 0, turn = 0;
    for (int64_t b = team; b < r.b; b += gridDim.x / shares.blocks) {
        const bool dirty = terms.first_bad[b] != UINT32_MAX;
        const Problem problem{s,
                              to,
                              shares,
                              bounds,
                              &listed,
                              r,
                              row_of(x, r, b, live ? first_row : 0),
                              FACTOR ? terms.factor + b * r.n + first_row : nullptr,
                              centroids + b * k * d,
                              int(k),
                              d,
                              (d + LINE_COLUMNS - 1) / LINE_COLUMNS,
                              live,
                              metric,
                              divisor,
                              rank,
                              dirty};
        const Units<T> units(terms.largest[b], FACTOR && terms.heaviest ? terms.heaviest[b] : 1, r.n, dirty);
        const int weight_scale = FACTOR && terms.heaviest ? fixed_scale(terms.heaviest[b], r.n) : 0;
        problem.load();
        problem.origin();
        for (int j = rank + threadIdx.x / WARP * shares.blocks; j < k; j += WARPS * shares.blocks) {
            problem.publish(j, [&](int q) { return problem.c[j * d + q]; });
        }
        sync_team(to.arrived, all += shares.blocks);
        bool done = false;
        for (int64_t iteration = 0;; ++iteration, ++turn) {
            problem.prepare();
            problem.label();
            if (done && rank == 0 && threadIdx.x == 0) stop[b] = iteration;
            if (done || iteration == max_iters) break;
            problem.sort();
            uint32_t* const marked = to.sizes + k + turn % 2;
            double* const shift = to.shifts + turn % 2;
            problem.add(units, weight_scale, marked);
            sync_team(to.arrived, all += shares.blocks);
            // All have seen the last turn's.
            if (rank == 0 && threadIdx.x == 0) to.shifts[(turn + 1) % 2] = 0, to.sizes[k + (turn + 1) % 2] = 0;
            problem.replace(units, weight_scale, shift, marked);
            sync_team(to.arrived, all += shares.blocks);
            if constexpr (!Problem::EXACT) {
                if (__ldcg(marked)) {
                    replace_marked(problem, shift, labels + b * r.n, all);
                    all += 2 * shares.blocks;
                }
            }
            done = __ldcg(shift) <= threshold[b];
        }
        for (int i = threadIdx.x; i < live; i += THREADS_HERE) labels[b * r.n + first_row + i] = s.labels[i];
        // All have taken the last centroids before the next problem's are published.
        if (b + gridDim.x / shares.blocks < r.b) sync_team(to.arrived, all += shares.blocks);
    }
    // The last one to leave clears what all have waited for.
    if (threadIdx.x == 0 && atomicAdd(to.arrived, 1) + 1 == all + shares.blocks) {
        *to.arrived = 0, to.shifts[0] = to.shifts[1] = 0, to.sizes[k] = to.sizes[k + 1] = 0;
    }
}

#define KERNEL(name, T, FACTOR)                                                                                        \
    extern "C" __global__ void __launch_bounds__(TEAM_THREADS, 1)                                                      \
        name(const T* x, Rows r, Terms terms, int metric, int divisor, int64_t max_iters, const double* threshold,     \
             Shares shares, Common common, uint32_t* stop, int64_t k, T* centroids, uint32_t* labels) {                \
        fit<T, FACTOR>(x, r, terms, metric, divisor, max_iters, threshold, shares, common, stop, k, centroids,         \
                       labels);                                                                                        \
    }
KERNEL(fit_resident_f16, __half, false)
KERNEL(fit_resident_bf16, __nv_bfloat16, false)
KERNEL(fit_resident_weighted_f16, __half, true)
KERNEL(fit_resident_weighted_bf16, __nv_bfloat16, true)
#undef KERNEL
