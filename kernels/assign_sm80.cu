// FlashAssign with the tensor cores of Ampere and later (mma.sync): f16 and bf16, any number of columns.
//
// A block of SM80_ROWS threads owns as many rows, 32 a warp, and walks the centroids in tiles of SM80_CENTROIDS. Both
// come through a ring of cp.async stages of SM80_COLUMNS columns; rows of no more such chunks than the launch brought
// memory for, at least STAGES, stay in shared memory after the first tile. Every warp scores its rows against the whole
// tile, so no two warps share a row, and no score leaves the registers.
//
// Of the scores a thread keeps, for each of its rows, the best and the best outside its group of eight columns, and the
// best of each of the eight places in a group. Every column but the winner is in another group or at another place, so
// that gives the winner's column and the exact second best for 2.5 operations a score instead of 5.
//
// Rows whose label `margin` (tensor.cuh) does not prove go on a list. `recheck` walks the centroids again for those
// rows only, shared by all blocks, and settles by the definition every column that may beat the label.
//
// f32 rows come as halves h and l (split.cu, which says why their bound holds). The first pass sees h alone: `slack`
// holds what that adds to the margin of each row. `recheck_split` sees both: a chunk of its ring is half a chunk of h
// and the same columns of l, so that rows that stay take twice the memory, and it adds h.h + h.l + l.h to the same
// accumulators. Margins are in the units of the halves; `settle` reads the f32 rows and centroids.
//
// Traffic of a row tile: X once, or once per tile of centroids if rows do not stay; the centroids once, 2 k d bytes
// from L2 for 2 SM80_ROWS k d flops. Shared memory: 49 KB with STAGES chunks of rows, so that 3 blocks fit an A100 or
// H100 and 2 an sm_86; 8 KB for each chunk more.
#include "tensor.cuh"

constexpr int WARP_ROWS = 32, CENTROIDS = SM80_CENTROIDS, COLUMNS = SM80_COLUMNS, STAGES = SM80_STAGES;
constexpr int BLOCK = SM80_ROWS;                    // threads; thread t also stands for row t of the tile
constexpr int PIECE = 8, PIECES = COLUMNS / PIECE;  // 16 bytes, what one cp.async brings
constexpr int ROW_BYTES = COLUMNS * 2, ROWS_BYTES = SM80_ROWS * ROW_BYTES, TILE_BYTES = CENTROIDS * ROW_BYTES;
constexpr int EIGHTS = CENTROIDS / 8, STEPS = COLUMNS / 16;
constexpr int SLOTS = 4;  // rows of a thread: lane / 4 of each eight of its warp's
constexpr int PLACES = 8;
constexpr int QUEUE = SM80_QUEUE;
constexpr int ASSIGN_RESIDENT = 384 / BLOCK, RECHECK_RESIDENT = 256 / BLOCK;  // of an SM, so far as registers go
static_assert(SM80_ROWS % WARP_ROWS == 0 && CENTROIDS % 32 == 0, "whole warps, whole groups");
static_assert(COLUMNS == 32 || COLUMNS == 64, "the swizzle is for rows of 64 or 128 bytes");
static_assert(BLOCK % PIECES == 0 && CENTROIDS % (BLOCK / PIECES) == 0 && CENTROIDS / 4 <= BLOCK, "even copies");

/// Dynamic shared memory, beside ROWS_BYTES for each chunk of rows that is to stay, at least STAGES of them; src/cuda/
/// assign.rs has the sum.
constexpr int RING_BYTES = STAGES * (TILE_BYTES + CENTROIDS * 4), LISTED_BYTES = SM80_ROWS * 8 + QUEUE * 8 + 128;

// ---- Instructions.

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

/// Copies the first `bytes` of 16 and zeroes the others.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until at most `N` committed groups are under way.
template <int N>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void load_fragment(uint32_t (&a)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(address)
                 : "memory");
}

/// acc += a b^T for 16 rows, 8 centroids and 16 columns.
#define PRODUCT(name, T)                                                                                               \
    __device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {   \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." #name "." #name                                                   \
            ".f32 "                                                                                                    \
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                          \
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                                                   \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                           \
    }
PRODUCT(f16, __half)
PRODUCT(bf16, __nv_bfloat16)
#undef PRODUCT

// ---- The sweep of a row tile over tiles of centroids.

/// The parts of shared memory: centroids and `start` for each stage, what a kernel adds, and chunks of rows.
struct Shared {
    uint32_t ring, rows;
    float* start;
    uint8_t *added, *rows_at;

    __device__ __forceinline__ Shared(uint8_t* raw, int added_bytes)
        : ring(shared_address(raw)),
          rows(ring + RING_BYTES + added_bytes),
          start(reinterpret_cast<float*>(raw + STAGES * TILE_BYTES)),
          added(raw + RING_BYTES),
          rows_at(added + added_bytes) {}

    __device__ __forceinline__ bool fit(int chunks) const {
        uint32_t bytes;
        asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
        return int64_t(chunks) * ROWS_BYTES <= int(bytes) - (rows_at - added) - RING_BYTES;
    }
};
static_assert(RING_BYTES % 128 == 0 && LISTED_BYTES % 128 == 0, "the swizzles start on lines of 128 bytes");

/// Where a 16-byte piece of a row lies in a chunk: swizzled, so that eight rows' same piece are in different banks.
__device__ __forceinline__ int place(int row, int piece) {
    return row * ROW_BYTES + ((piece ^ (COLUMNS == 64 ? row & 7 : row >> 1 & 3)) << 4);
}

/// A chunk of a tile, and its stage.
struct Step {
    int tile, chunk = 0, stage = 0;
    __device__ __forceinline__ void next(int chunks) {
        if (++chunk == chunks) chunk = 0, ++tile;
        if (++stage == STAGES) stage = 0;
    }
};

/// The scores of a warp's 32 rows against a tile: [i][j][e] is row 16 i + 8 (e / 2) + lane / 4, column 8 j + 2 (lane %
/// 4) + e % 2.
using Scores = float[2][EIGHTS][4];

template <class T, int COUNT>
__device__ __forceinline__ void multiply_chunk(Scores& acc, uint32_t rows, uint32_t centroids) {
#pragma unroll
    for (int step = 0; step < COUNT; ++step) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load_fragment(a[i], (rows + i * 16 * ROW_BYTES) ^ (step * 32));
#pragma unroll
        for (int j = 0; j < EIGHTS; j += 2) {
            uint32_t b[4];
            load_fragment(b, (centroids + j * 8 * ROW_BYTES) ^ (step * 32));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                multiply(acc[i][j], a[i], b[0], b[1], T());
                multiply(acc[i][j + 1], a[i], b[2], b[3], T());
            }
        }
    }
}

/// The same for a chunk of COLUMNS / 2 columns of h and then of l: h.h + h.l + l.h, rows first.
template <class T>
__device__ __forceinline__ void multiply_split_chunk(Scores& acc, uint32_t rows, uint32_t centroids) {
#pragma unroll
    for (int step = 0; step < STEPS / 2; ++step) {
        const int high = step * 32, low = high + ROW_BYTES / 2;
        uint32_t a[2][4], a_low[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_fragment(a[i], (rows + i * 16 * ROW_BYTES) ^ high);
            load_fragment(a_low[i], (rows + i * 16 * ROW_BYTES) ^ low);
        }
#pragma unroll
        for (int j = 0; j < EIGHTS; j += 2) {
            uint32_t b[4], b_low[4];
            load_fragment(b, (centroids + j * 8 * ROW_BYTES) ^ high);
            load_fragment(b_low, (centroids + j * 8 * ROW_BYTES) ^ low);
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j], a[i], b[0], b[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j + 1], a[i], b[2], b[3], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j], a[i], b_low[0], b_low[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j + 1], a[i], b_low[2], b_low[3], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j], a_low[i], b[0], b[1], T());
#pragma unroll
            for (int i = 0; i < 2; ++i) multiply(acc[i][j + 1], a_low[i], b[2], b[3], T());
        }
    }
}

template <class T>
__device__ __forceinline__ float piece_squares(uint4 v) {
    float sum = 0;
    for (const uint32_t word : {v.x, v.y, v.z, v.w}) {
        const float2 u = wide_pair(word, T());
        sum = fmaf(u.x, u.x, fmaf(u.y, u.y, sum));
    }
    return sum;
}

/// Scores the tile's rows, of which `row_at` gives the address (null: zeros), against tiles `first` to `last` of the
/// centroids and hands every tile of scores to `take(scores, column of the first)`. A warp that is not `live` takes
/// nothing. Returns the squares of row threadIdx.x if wanted. SPLIT: l lies half a pitch after h in both.
template <bool SQUARES, bool SPLIT, class T, class RowAt, class Take>
__device__ __forceinline__ float sweep(const Shared& s, RowAt row_at, const Moved<T>& c, int d, int first, int last,
                                       bool live, Take take) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quad = lane % 4;
    const int piece = threadIdx.x % PIECES, line = threadIdx.x / PIECES;
    constexpr int LINES = BLOCK / PIECES;
    constexpr int WIDTH = SPLIT ? COLUMNS / 2 : COLUMNS;  // of a chunk, in columns of the rows
    const int chunks = (d + WIDTH - 1) / WIDTH;
    const int64_t part = SPLIT && piece >= PIECES / 2 ? c.pitch / 2 - COLUMNS / 2 : 0;  // beyond h's piece to l's
    const bool resident = s.fit(chunks);
    const int to = place(line, piece);  // LINES is a multiple of 8, so all of a thread's pieces swizzle alike
    static_assert(LINES % 8 == 0, "see above");
    const uint32_t row_fragments = s.rows + place(warp * WARP_ROWS + lane % 16, lane / 16);
    const uint32_t centroid_fragments = s.ring + place(lane % 8 + lane / 16 * 8, lane / 8 % 2);

    Step fill{first}, use{first};
    const auto issue = [&] {
        if (fill.tile < last) {
            const int column = fill.chunk * WIDTH + piece * PIECE;
            if (!resident || fill.tile == first) {
                const uint32_t rows = s.rows + (resident ? fill.chunk : fill.stage) * ROWS_BYTES + to;
                const int bytes = SPLIT ? 16 : max(0, min(16, 2 * (d - column)));
#pragma unroll
                for (int i = 0; i < SM80_ROWS / LINES; ++i) {
                    const T* row = row_at(line + i * LINES);
                    const bool some = row && bytes;
                    copy_piece(rows + i * LINES * ROW_BYTES, some ? row + part + column : c.moved, some ? bytes : 0);
                }
            }
            const int64_t j = int64_t(fill.tile) * CENTROIDS + line;
            const T* centroid = c.moved + j * c.pitch + part + column;
            const uint32_t ring = s.ring + fill.stage * TILE_BYTES + to;
#pragma unroll
            for (int i = 0; i < CENTROIDS / LINES; ++i) {
                const bool some = (SPLIT || column < c.pitch) && j + i * LINES < c.k;
                const T* from = some ? centroid + i * LINES * c.pitch : c.moved;
                copy_piece(ring + i * LINES * ROW_BYTES, from, some ? 16 : 0);
            }
            if (fill.chunk == 0 && threadIdx.x < CENTROIDS / 4) {
                copy_piece(shared_address(s.start + fill.stage * CENTROIDS + 4 * threadIdx.x),
                           c.start + int64_t(fill.tile) * CENTROIDS + 4 * threadIdx.x, 16);
            }
        }
        copies_commit();
        fill.next(chunks);
    };

    float squares = 0;
    __syncthreads();  // until here the last sweep may have read what comes now
    for (int i = 0; i < STAGES - 1; ++i) issue();
    while (use.tile < last) {
        Scores acc;
        const int tile = use.tile;
        for (int chunk = 0; chunk < chunks; ++chunk, use.next(chunks)) {
            copies_wait<STAGES - 2>();
            __syncthreads();
            issue();
            const int slot = resident ? chunk : use.stage;
            if (SQUARES && tile == first) {
#pragma unroll 1
                for (int p = 0; p < PIECES; ++p) {
                    const uint8_t* at = s.rows_at + slot * ROWS_BYTES + place(threadIdx.x, p);
                    squares += piece_squares<T>(*reinterpret_cast<const uint4*>(at));
                }
            }
            if (!live) continue;
            if (chunk == 0) {
                const float* start = s.start + use.stage * CENTROIDS + 2 * quad;
#pragma unroll
                for (int j = 0; j < EIGHTS; ++j) {
                    float2 v = *reinterpret_cast<const float2*>(start + 8 * j);
                    if (c.scale) v = {0, 0};
#pragma unroll
                    for (int i = 0; i < 2; ++i) acc[i][j][0] = acc[i][j][2] = v.x, acc[i][j][1] = acc[i][j][3] = v.y;
                }
            }
            const uint32_t rows = row_fragments + slot * ROWS_BYTES, ring = centroid_fragments + use.stage * TILE_BYTES;
            if (SPLIT) multiply_split_chunk<T>(acc, rows, ring);
            else if (d - chunk * COLUMNS > 16) multiply_chunk<T, STEPS>(acc, rows, ring);
            else multiply_chunk<T, 1>(acc, rows, ring);
        }
        if (!live) continue;
        if (c.scale) {
            const int64_t column = int64_t(tile) * CENTROIDS + 2 * quad;
#pragma unroll
            for (int j = 0; j < EIGHTS; ++j) {
                const float2 u = __ldg(reinterpret_cast<const float2*>(c.start + column + 8 * j));
                const float2 v = __ldg(reinterpret_cast<const float2*>(c.scale + column + 8 * j));
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    acc[i][j][0] = fmaf(acc[i][j][0], v.x, u.x), acc[i][j][1] = fmaf(acc[i][j][1], v.y, u.y);
                    acc[i][j][2] = fmaf(acc[i][j][2], v.x, u.x), acc[i][j][3] = fmaf(acc[i][j][3], v.y, u.y);
                }
            }
        }
        take(acc, tile * CENTROIDS + 2 * quad);
    }
    return squares;
}

// ---- First pass.

/// What a thread knows of a row: the best score, the best outside its group, the best at each place of a group, and
/// the first column of the group.
struct Search {
    float top = -INFINITY, second = -INFINITY;
    int column = 0;
    float best_at[PLACES];

    __device__ __forceinline__ Search() {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_at[p] = -INFINITY;
    }
    __device__ __forceinline__ void add(const float (&v)[PLACES], int at) {
#pragma unroll
        for (int p = 0; p < PLACES; ++p) best_at[p] = fmaxf(best_at[p], v[p]);
        const float most =
            fmaxf(fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3])), fmaxf(fmaxf(v[4], v[5]), fmaxf(v[6], v[7])));
        second = fmaxf(second, fminf(top, most));
        column = most > top ? at : column;
        top = fmaxf(top, most);
    }
    /// Narrows the group to the winner. Equal scores leave `second` equal to `top`.
    __device__ __forceinline__ void finish() {
        int winner = 0;
#pragma unroll
        for (int p = PLACES - 1; p >= 0; --p) winner = best_at[p] == top ? p : winner;
#pragma unroll
        for (int p = 0; p < PLACES; ++p) second = fmaxf(second, p == winner ? -INFINITY : best_at[p]);
        column += 8 * (winner / 2) + winner % 2;
    }
    __device__ __forceinline__ void join(int offset) {
        const float t = __shfl_xor_sync(~0u, top, offset), u = __shfl_xor_sync(~0u, second, offset);
        const int other = __shfl_xor_sync(~0u, column, offset);
        second = fmaxf(fmaxf(second, u), fminf(top, t));
        if (t > top || (t == top && other < column)) top = t, column = other;
    }
};

/// Searches one tile of rows; returns the squares of row threadIdx.x.
template <class T>
__device__ __forceinline__ float search_tile(const Shared& s, Search (&found)[SLOTS], const T* x, const Rows& r,
                                             int64_t b, int64_t first_row, const Moved<T>& c) {
    const T* rows = row_of(x, r, b, first_row);
    const int live_rows = int(min(int64_t(SM80_ROWS), r.n - first_row)), tiles = (c.k + CENTROIDS - 1) / CENTROIDS;
    return sweep<true, false>(
        s, [&](int i) { return i < live_rows ? rows + i * r.row_stride : nullptr; }, c, int(r.d), 0, tiles,
        int(threadIdx.x) / WARP * WARP_ROWS < live_rows,
        [&](const Scores& acc, int column) {
#pragma unroll
            for (int j = 0; j < EIGHTS; j += PLACES / 2) {
#pragma unroll
                for (int i = 0; i < SLOTS; ++i) {
                    float v[PLACES];
#pragma unroll
                    for (int p = 0; p < PLACES; ++p) v[p] = acc[i / 2][j + p / 2][i % 2 * 2 + p % 2];
                    found[i].add(v, column + 8 * j);
                }
            }
        });
}

/// Turns what a warp found into labels and list entries: of the four lanes that share rows, each settles one.
template <class T>
__device__ __forceinline__ void write_labels(Search (&found)[SLOTS], float squares, const Rows& r, int64_t b,
                                             int64_t first_row, const Moved<T>& c, const float* slack, uint32_t* labels,
                                             Listed* list, uint32_t* listed) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, quad = lane % 4;
    float top = 0, second = 0;
    int column = 0;
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
        found[i].finish();
        found[i].join(1), found[i].join(2);
        if (i == quad) top = found[i].top, second = found[i].second, column = found[i].column;
    }
    const int row_of_warp = 8 * quad + lane / 4;
    const float mine = __shfl_sync(~0u, squares, row_of_warp);
    const int64_t row = first_row + warp * WARP_ROWS + row_of_warp;
    if (row >= r.n) return;
    labels[b * r.n + row] = top > -INFINITY && column < c.k ? column : 0;
    const float more = slack ? __ldg(&slack[b * r.n + row]) : 0;
    if (!(top - second > margin(mine, r.d, *c.bounds) + more)) {
        list[b * r.n + atomicAdd(&listed[b], 1)] = {uint32_t(row), top};
    }
}

// ---- Recheck.

/// Eight columns of a row of `d`, those past it as zeros.
template <class T>
__device__ __forceinline__ uint4 piece_of(const T* row, int64_t piece, int64_t d) {
    if (PIECE * piece + PIECE <= d) return __ldg(reinterpret_cast<const uint4*>(row) + piece);
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
        const int64_t column = PIECE * piece + i;
        const uint32_t bits = column < d ? reinterpret_cast<const uint16_t*>(row)[column] : 0;
        words[i / 2] |= bits << (i % 2 * 16);
    }
    return {words[0], words[1], words[2], words[3]};
}

/// What a block of `recheck` keeps of its rows.
struct Held {
    float* limit;     // the score below which a column cannot be the label
    uint32_t* index;  // of the row
    uint2* queue;     // (row of the tile, column) pairs that wait for `settle`
    uint32_t* queued;

    __device__ __forceinline__ explicit Held(uint8_t* at)
        : limit(reinterpret_cast<float*>(at)),
          index(reinterpret_cast<uint32_t*>(limit + SM80_ROWS)),
          queue(reinterpret_cast<uint2*>(index + SM80_ROWS)),
          queued(reinterpret_cast<uint32_t*>(queue + QUEUE)) {}
};

/// Of eight columns: adds their products to `dot`.
template <class T>
__device__ __forceinline__ void add_products(float& dot, uint4 u, uint4 v) {
    const uint32_t us[4] = {u.x, u.y, u.z, u.w}, vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 p = wide_pair(us[i], T()), q = wide_pair(vs[i], T());
        dot = fmaf(p.x, q.x, fmaf(p.y, q.y, dot));
    }
}

/// The score that a column must reach to be a candidate for a row of the tile, four lanes a row. SPLIT: the first pass
/// What the first pass over split rows knew: its slack, and how far before the bounds of both halves its own lie.
struct First {
    const float* slack;
    int64_t copies;
};

/// knows its best score less well than the limit should be, so the label that the row has now is scored again.
template <bool SPLIT, class T>
__device__ __forceinline__ void find_limits(const Held& of, const T* x, const Rows& r, int64_t b, const Moved<T>& c,
                                            const float* slack, const First& first, const uint32_t* labels,
                                            int live_rows) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, part = lane % 4;
    for (int at = lane / 4; at < WARP_ROWS; at += WARP / 4) {
        const int row = warp * WARP_ROWS + at;
        const int64_t index = of.index[row < live_rows ? row : 0];
        const T* values = row_of(x, r, b, index);
        const float more = slack ? __ldg(&slack[b * r.n + index]) : 0;
        if (SPLIT) {
            uint32_t label = 0;
            // Others may change it meanwhile: one lane reads it for all four.
            if (part == 0) label = *(const volatile uint32_t*)&labels[b * r.n + index];
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
            const float off = margin(squares, 3 * ((r.d + 15) / 16 * 16), *c.bounds) + more;
            // If scores were level, the label may be any: then the first pass's best score says more, each within its
            // own half of the margins.
            const float top = of.limit[row], first_off = margin(squares, r.d, c.bounds[-first.copies]);
            const float from_top = top - 0.5f * (first_off + __ldg(&first.slack[b * r.n + index]) + off);
            if (part == 0) of.limit[row] = fmaxf(dot + __ldg(c.start + label) - off, from_top);
        } else {
            float squares = 0;
#pragma unroll 4
            for (int64_t piece = part; piece * PIECE < r.d; piece += 4) {
                squares += piece_squares<T>(piece_of(values, piece, r.d));
            }
            for (int lanes = 1; lanes < 4; lanes *= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
            if (part == 0) of.limit[row] -= margin(squares, r.d, *c.bounds) + more;
        }
    }
}

/// The rows and centroids of the definition: of the type that the caller has them in.
template <class U>
struct Originals {
    const U *x, *centroids;
    const Rows &r, &cr;
};

/// Settles one tile of listed rows over the tiles `first` to `last` of the centroids.
template <bool SPLIT, class T, class U>
__device__ __forceinline__ void recheck_tile(const Shared& s, const Held& of, const T* x, const Rows& r,
                                             const Originals<U>& originals, int64_t b, const Moved<T>& c,
                                             const float* slack, const First& before, int metric, uint32_t* labels,
                                             const Listed* list, int live_rows, int first, int last) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const auto settle_one = [&](int row, uint32_t column) {
        const int64_t index = of.index[row];
        settle(metric, row_of(originals.x, originals.r, b, index), originals.cr, originals.centroids, b, r.d, column,
               &labels[b * r.n + index]);
    };
    __syncthreads();  // the last tile's are read
    const Listed mine = threadIdx.x < live_rows ? list[threadIdx.x] : Listed{0, INFINITY};
    of.index[threadIdx.x] = mine.row, of.limit[threadIdx.x] = mine.top;
    if (threadIdx.x == 0) *of.queued = 0;
    __syncthreads();
    find_limits<SPLIT>(of, x, r, b, c, slack, before, labels, live_rows);
    __syncwarp();
    float limit[SLOTS];
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) limit[i] = of.limit[warp * WARP_ROWS + 8 * i + lane / 4];

    sweep<false, SPLIT>(
        s, [&](int i) { return i < live_rows ? row_of(x, r, b, of.index[i]) : nullptr; }, c, int(r.d), first, last,
        warp * WARP_ROWS < live_rows,
        [&](const Scores& acc, int column) {
            uint64_t hits = 0;  // 16 columns of each slot in turn
#pragma unroll
            for (int i = 0; i < SLOTS; ++i) {
                bool any = false;
#pragma unroll
                for (int j = 0; j < 2 * EIGHTS; ++j) any |= !(acc[i / 2][j / 2][i % 2 * 2 + j % 2] < limit[i]);
                if (!any || warp * WARP_ROWS + 8 * i + lane / 4 >= live_rows) continue;
                uint32_t mask = 0;
#pragma unroll
                for (int j = 0; j < 2 * EIGHTS; ++j) {
                    mask |= acc[i / 2][j / 2][i % 2 * 2 + j % 2] < limit[i] ? 0 : 1u << j;
                }
                hits |= uint64_t(mask) << (2 * EIGHTS * i);
            }
            // Settling takes long: it waits until all threads can share it. What does not fit is done now.
            for (; hits; hits &= hits - 1) {
                const int bit = __ffsll(hits) - 1, j = bit % (2 * EIGHTS), i = bit / (2 * EIGHTS);
                const int64_t candidate = column + 8 * (j / 2) + j % 2;
                const int row = warp * WARP_ROWS + 8 * i + lane / 4;
                if (candidate >= c.k) continue;
                const uint32_t at = atomicAdd(of.queued, 1);
                if (at < QUEUE) of.queue[at] = make_uint2(row, candidate);
                else settle_one(row, candidate);
            }
        });
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < min(*of.queued, QUEUE); i += BLOCK) settle_one(of.queue[i].x, of.queue[i].y);
}
static_assert(2 * EIGHTS * SLOTS <= 64, "a tile's hits fit a word");

/// Into how many runs of centroids to cut the work on `row_tiles` tiles of rows, for `shares` blocks: one item each
/// for few rows, a few each for more, so that the last ones do not leave the others idle for long.
__device__ __forceinline__ int splits_of(int64_t row_tiles, int64_t tiles, int64_t shares) {
    const int64_t wanted = 2 * row_tiles <= shares ? shares / row_tiles : (4 * shares + row_tiles - 1) / row_tiles;
    return max(int64_t(1), min(tiles, wanted));
}

template <bool SPLIT, class T, class U>
__device__ __forceinline__ void recheck_problem(const Shared& s, const Held& of, const T* x, const Rows& r,
                                                const Originals<U>& originals, int64_t b, const Moved<T>& c,
                                                const float* slack, const First& before, int metric, uint32_t* labels,
                                                const Listed* list, int64_t listed, int64_t share, int64_t shares) {
    const int64_t row_tiles = (listed + SM80_ROWS - 1) / SM80_ROWS, tiles = (c.k + CENTROIDS - 1) / CENTROIDS;
    const int splits = splits_of(row_tiles, tiles, shares);
    for (int64_t item = share; item < row_tiles * splits; item += shares) {
        const int64_t done = item / splits * SM80_ROWS, split = item % splits;
        recheck_tile<SPLIT>(s, of, x, r, originals, b, c, slack, before, metric, labels, list + b * r.n + done,
                            int(min(int64_t(SM80_ROWS), listed - done)), int(split * tiles / splits),
                            int((split + 1) * tiles / splits));
    }
}

/// Problems are dealt to blocks; with fewer problems than blocks, each is shared by several. A block looks at as many
/// problems at once as it has threads, for most have no row listed. `problem(b)` gives the centroids of one.
template <bool SPLIT, class T, class U, class Problem>
__device__ __forceinline__ void recheck(uint8_t* raw, const T* x, const Rows& r, const Originals<U>& originals,
                                        Problem problem, const float* slack, const First& before, int metric,
                                        uint32_t* labels, const Listed* list, const uint32_t* listed) {
    const Shared s(raw, LISTED_BYTES);
    const Held of(s.added);
    const int64_t shares = gridDim.x > r.b ? gridDim.x / r.b : 1, step = gridDim.x / shares;
    for (int64_t first = blockIdx.x / shares; first < r.b; first += step * BLOCK) {
        const int64_t mine = first + threadIdx.x * step;
        if (!__syncthreads_or(mine < r.b && listed[mine])) continue;
        for (int64_t b = first; b < min(r.b, first + step * BLOCK); b += step) {
            const uint32_t rows = listed[b];
            if (rows == 0) continue;
            const Moved<T> c = problem(b);
            recheck_problem<SPLIT>(s, of, x, r, originals, b, c, slack, before, metric, labels, list, rows,
                                   blockIdx.x % shares, shares);
        }
    }
}

// `slack` adds to the margin of each row, by its place in (b, n); null for nothing.
#define INSTANCE(name, T)                                                                                              \
    extern "C" __global__ void __launch_bounds__(BLOCK, ASSIGN_RESIDENT) assign_sm80_##name(                           \
        const T* x, Rows r, const T* centroids, Rows cr, const T* moved, const float* start, const float* scale,       \
        const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded, int64_t copies, int metric, uint32_t* labels,  \
        Listed* list, uint32_t* listed, const float* slack) {                                                          \
        extern __shared__ __align__(128) uint8_t raw[];                                                                \
        const Shared s(raw, 0);                                                                                        \
        const int64_t tiles = (r.n + SM80_ROWS - 1) / SM80_ROWS;                                                       \
        for (int64_t tile = blockIdx.x; tile < r.b * tiles; tile += gridDim.x) {                                       \
            Search found[SLOTS];                                                                                       \
            const auto problem = [&] {                                                                                 \
                return Moved<T>(moved, start, scale, bounds, k, pitch, padded, copies, tile / tiles);                  \
            };                                                                                                         \
            const float squares = search_tile(s, found, x, r, tile / tiles, tile % tiles * SM80_ROWS, problem());      \
            /* What follows from `tile` is worked out again: it would take registers from the sweep. */                \
            asm volatile("" : "+l"(tile));                                                                             \
            write_labels(found, squares, r, tile / tiles, tile % tiles * SM80_ROWS, problem(), slack, labels, list,    \
                         listed);                                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, RECHECK_RESIDENT) recheck_sm80_##name(                         \
        const T* x, Rows r, const T* centroids, Rows cr, const T* moved, const float* start, const float* scale,       \
        const Bounds* bounds, int64_t k, int64_t pitch, int64_t padded, int64_t copies, int metric, uint32_t* labels,  \
        const Listed* list, const uint32_t* listed, const float* slack) {                                              \
        extern __shared__ __align__(128) uint8_t raw[];                                                                \
        const auto problem = [&](int64_t b) {                                                                          \
            return Moved<T>(moved, start, scale, bounds, k, pitch, padded, copies, b);                                 \
        };                                                                                                             \
        recheck<false>(raw, x, r, Originals<T>{x, centroids, r, cr}, problem, slack, {}, metric, labels, list,         \
                       listed);                                                                                        \
    }
INSTANCE(f16, __half)
INSTANCE(bf16, __nv_bfloat16)
#undef INSTANCE

/// `x` is the rectangle of f32 rows that `halves` holds side by side, (b, n, pitch), each h and then l as in `moved`;
/// labels, lists and slacks are those of the rectangle. The first pass's bounds lie before `bounds`. `pitch` is that of
/// both, twice that of one half.
extern "C" __global__ void __launch_bounds__(BLOCK, RECHECK_RESIDENT)
    recheck_split_sm80_f32(const __half* halves, const float* x, Rows r, const float* centroids, Rows cr,
                           const __half* moved, const float* start, const Bounds* bounds, int64_t k, int64_t pitch,
                           int64_t padded, int64_t copies, int metric, uint32_t* labels, const Listed* list,
                           const uint32_t* listed, const float* slack, const float* first_slack) {
    extern __shared__ __align__(128) uint8_t raw[];
    const auto problem = [&](int64_t b) {
        return Moved<__half>(moved, start, nullptr, bounds, k, pitch, padded, copies, b);
    };
    recheck<true>(raw, halves, Rows{r.n * pitch, pitch, r.b, r.n, r.d}, Originals<float>{x, centroids, r, cr}, problem,
                  slack, {first_slack, copies}, metric, labels, list, listed);
}
