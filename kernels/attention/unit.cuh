// The state of a block: its share of a unit's clusters and of the rows that the unit reads.
#pragma once
#include "attention/fragments.cuh"
#include "attention/team.cuh"

constexpr int BLOCKS = ATTEND_BLOCKS;  // of a unit, at most
constexpr int HEADS = ATTEND_HEADS;    // query heads at once: half the rows of a product

/// A block's share of a unit, and where it keeps it. Tokens of clusters are rows, or CODED.
template <class T, int D, bool CODED>
struct Unit {
    using F = Fragments<T, D>;
    static constexpr int BLOCK = D > 128 ? ATTEND_THREADS_WIDE : ATTEND_THREADS, WARPS = BLOCK / WARP;
    static constexpr int ROWS = F::ROWS;
    static constexpr int WIDTH = F::WIDTH;
    static constexpr int STRIDE = WIDTH + 4;  // of a head's sums, so that lanes write to different banks
    const Cache& c;
    uint32_t unit, block;
    int begin, end;           // clusters of this block
    int low, high;            // those that it ranks: its own in a team, else all
    uint32_t* ranks;          // (high - low): of clusters, and then how many of their tokens are listed
    uint32_t *begins, *rows;  // (high - low + 1): their offsets; and the tokens that this block reads
    uint32_t* clusters;       // of those, where they are codes
    float* sums;              // (WARPS, at most HEADS, STRIDE)
    uint4* queries;           // (PIECES, WARP): as the lanes hold them
    float2 (*tops)[HEADS];    // (WARPS, HEADS)
    const T *key_entries, *value_entries;
    float* bounds;          // (group, width)
    int64_t first_cluster;  // of the key head
    int warp, lane, g, t;

    /// Begins to load the queries from a head on.
    __device__ __forceinline__ void load_queries(int from) const {
        const int head = min(from + g, c.group - 1);
        const T* const q = static_cast<const T*>(c.q) + (int64_t(unit) * c.group + head) * D;
#pragma unroll
        for (int first = 0; first < F::PIECES; first += WARPS) {
            const int p = first + warp;
            const bool inside = F::has_key(p, t);
            if (p < F::PIECES) {
                cp_async_16(shared_address(queries + first * WARP + threadIdx.x),
                            q + (inside ? p * 4 + t : 0) * F::EACH, inside && from + g < c.group ? 16 : 0);
            }
        }
        cp_async_commit();
    }

    __device__ __forceinline__ uint32_t size(int j) const { return begins[j - low + 1] - begins[j - low]; }
    __device__ __forceinline__ int64_t key_head() const { return unit / uint32_t(c.units); }
    /// The bounds of the query head g from a head on.
    __device__ __forceinline__ float* bounds_of_head(int from) const {
        return bounds + int64_t(min(from + g, c.group - 1)) * c.width;
    }
    __device__ __forceinline__ const uint8_t* mean(const uint8_t* means, int j) const {
        return means + (first_cluster + j) * D;
    }
    /// Asks for the means, scales and spreads of a tile of clusters long before they are loaded.
    __device__ __forceinline__ void prefetch_means(const uint8_t* means, const float* scales, int at) const {
        const void* from = mean(means, at + lane);
        if (lane == ROWS) from = scales + first_cluster + at;
        if (lane == ROWS + 1) from = c.spreads + first_cluster + at;
        if (lane < ROWS + 2 && at + ROWS <= end) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
        if (D > 128 && lane < ROWS && at + ROWS <= end) {
            asm volatile("prefetch.global.L2 [%0];" ::"l"(mean(means, at + lane) + 128));
        }
    }

    /// A cluster's spread adds so much to the score of its mean key, by the query head g that is loaded.
    __device__ __forceinline__ float reach() const {
        float sum = 0;
#pragma unroll
        for (int p = 0; p < F::PIECES; ++p) {
            const uint4 piece = queries[p * WARP + lane];
            const auto& columns = reinterpret_cast<const T(&)[F::EACH]>(piece);
#pragma unroll
            for (int i = 0; i < F::EACH; ++i) sum = fmaf(float(columns[i]), float(columns[i]), sum);
        }
        sum += __shfl_xor_sync(~0u, sum, 1), sum += __shfl_xor_sync(~0u, sum, 2);
        float norm;
        asm("sqrt.approx.f32 %0, %1;" : "=f"(norm) : "f"(sum));
        return c.reach * norm;
    }
    /// Nothing where that is beyond the type.
    __device__ __forceinline__ static float beyond_mean(float reach, float spread) {
        return reach * spread < INFINITY ? reach * spread : 0;
    }

    /// A lane's part of a tile of clusters whose mean keys are scored.
    struct MeanKeys {
        Codes<F::EACH> codes[F::TALL][F::PIECES];
        float scales[F::TALL][2], spreads[F::TALL][2];
    };
    /// A lane's part of a tile of clusters whose mean values are added.
    struct MeanValues {
        Codes<F::EACH> codes[F::PARTS][F::VALUES];
        float2 bounds[F::TALL];
        float spreads[F::TALL][2], scales[F::TALL][2];
    };

    // bound.cuh
    template <bool WHOLE>
    __device__ void load_mean_keys(MeanKeys& keys, int at) const;
    __device__ void bound_scores() const;
    __device__ uint2 rank_clusters() const;
    // read.cuh
    __device__ int list_rows(uint2 range, int first, int count) const;
    __device__ int add_tokens(Running<T, D>& running, int count) const;
    __device__ int add_coded(Running<T, D>& running, int tile, int first, int count, int from) const;
    template <bool WHOLE>
    __device__ void load_mean_values(MeanValues& values, int at, const float* head_bounds) const;
    __device__ void add_means(Running<T, D>& running, int tile, int from) const;
    __device__ void read(uint2 range) const;
    // sums.cuh
    __device__ float* sums_of(uint32_t block) const;
    __device__ void add_warps(const Running<T, D>& running, int from, int live) const;
    __device__ void add_blocks() const;
};
