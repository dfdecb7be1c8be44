// The structs that cross from Rust to the kernels, or that Rust makes room for, in the order of src/cuda/params.rs,
// which has each of them once more under the same name. A layout that differs does not compile on either side, and
// tests/architecture.rs compares the fields. Methods that need more than the struct are defined by the rooms that call
// them.
#pragma once
#include <cstddef>
#include <cstdint>

/// Refuses a struct of other than so many bytes, or whose last field lies elsewhere.
#define LAYOUT(T, bytes, last, offset)                                                                                 \
    static_assert(sizeof(T) == bytes && offsetof(T, last) == offset, "src/cuda/params.rs")

/// `b` matrices of `n` rows of `d` adjacent columns; strides are in elements.
struct Rows {
    int64_t batch_stride, row_stride, b, n, d;
};
LAYOUT(Rows, 40, d, 32);

/// The problems of a batch that an iteration still has to do: those at `list[first..*count]`. Without a list all, or
/// none if `*count` is zero; without a count, all. Kernels go by the place in the list (`at`), and so does their
/// scratch; rows, labels and the centroids themselves are those of `problem(at)`.
struct Active {
    const uint32_t *list, *count;
    int64_t first;

    /// The number of active problems, of `b`.
    __device__ __forceinline__ int64_t problems(int64_t b) const {
        if (!count) return b;
        const int64_t left = int64_t(*count) - first;
        return list ? max(int64_t(0), min(b, left)) : *count ? b : 0;
    }
    __device__ __forceinline__ int64_t problem(int64_t at) const { return list ? list[first + at] : at; }
};
LAYOUT(Active, 24, first, 16);

/// A tensor of any layout, its last dimension first.
struct Strided {
    int64_t sizes[8], strides[8], rank;
};
LAYOUT(Strided, 136, rank, 128);

/// Bounds over the centroids of a problem that are in reach, from `prepare_moved` in prepare.cu. +inf where nothing can
/// be proven.
struct Bounds {
    float moved;     // of |e| (cosine: of |c| / |c|)
    float start;     // of |start|
    float residual;  // of the norm of what rounding took from e
    float stored;    // of |c| (cosine: 1)
    float scale;     // of `scale`: 0 if no centroid can be the nearest of any row
    float inverse;   // of R: 0 if all centroids are in reach and none carries its own loss
    float rounded;   // as `residual`, of the centroids that carry it themselves
    float typical;   // of most rows' norms, if scores are shifted; else 0

    /// All scores of a problem, of `d` columns, are higher by this, so that the best one of most rows is above zero,
    /// and by more than the definition is rounded (`error_bound`), also where all centroids are at the origin.
    __device__ __forceinline__ float shift(int64_t d) const {
        const float norms = (typical + stored) * (typical + stored);
        return typical > 0 ? start + typical * moved + (d + 16) * 0x1p-46f * norms : 0;
    }
};
LAYOUT(Bounds, 32, typical, 28);

/// `rows`: R, within which most rows are. `centroids`: norm above which a centroid is the nearest of none of those.
/// Infinities if nothing is known of the rows.
struct Reach {
    float rows = INFINITY, centroids = INFINITY;

    /// The norm, times `scale`, that most rows do not exceed, of which R is a multiple. It is large enough that the
    /// shift of scores which are all zero is more than what underflows.
    __device__ __forceinline__ float typical(double scale = 1) const {
        return rows < INFINITY ? fmaxf(scale * rows / 4, 2e-11f) : 2e-11f;
    }
};
LAYOUT(Reach, 8, centroids, 4);

/// A row whose label is not proven, and the score below which a column cannot be it.
struct UnprovenRow {
    uint32_t row;
    float cutoff;
};
LAYOUT(UnprovenRow, 8, cutoff, 4);

/// Rows of f32 are assigned a part at a time. Whether the first pass over a part is worth its while is decided by the
/// part before it.
struct Gate {
    const uint32_t* count;  // as in `Active` of this part's first pass: zero if it is passed over; null if it is not
    uint32_t* next;         // and of the next part's

    __device__ __forceinline__ bool passed_over() const { return count && *count == 0; }
    /// `active` are the problems that there are to do.
    __device__ __forceinline__ void decide(const Active& active, bool pass_over) const {
        *next = pass_over ? 0 : active.count ? *active.count : 1;
    }
};
LAYOUT(Gate, 16, next, 8);

/// Rows as product codes, a piece of so many columns the entry of its code.
struct ProductCodes {
    const uint8_t* codes;  // (key heads, tokens, bytes): codes of 8 bits, or of 4, the earlier in the low ones
    const void* entries;   // (key heads, tables, 2^bits, columns)
    int columns, bits;
    int64_t tables;        // one for each piece, or one for all of them
    const uint8_t* gains;  // (key heads, tokens): codes of what a row's entries are multiplied by, or nothing
};
LAYOUT(ProductCodes, 40, gains, 32);

/// A cache and the queries of one token. A unit is what chooses alone: the query heads of a key head together, or each
/// of them. Means are codes in bytes, whole numbers and 128, each row's times a scale.
struct Cache {
    const void *q, *keys, *values;
    const uint8_t *mean_keys, *mean_values;
    const float *key_scales, *value_scales;
    const float* spreads;  // of a cluster: the standard deviation of its keys from their mean, in a column
    const uint32_t *order, *offsets;
    void* out;
    float* bounds;                 // (all units, group, width): of the scores of clusters
    float2* of_means;              // (all units, blocks, WARPS, group): the largest score and the sum of weights
    float* partial;                // (all units, blocks, group, WIDTH + 4): sums of a block's rows
    int64_t head_stride;           // from a key head to the next, in elements; tokens are `d` apart
    int units, group;              // units of a key head, and query heads of a unit
    int sinks, clustered, tokens;  // those before the clusters, those in them, and all
    int k, width, budget;          // clusters, and room for their scores, an even number
    int blocks, clusters, rows;    // blocks of a unit; clusters of a block, and tokens that it reads, at most
    int first, last;               // stages of this launch
    int estimate;                  // whether means stand in for tokens that are not listed
    float scale;
    float reach;  // a cluster ranks by its score and this, times the query's norm and its spread
    ProductCodes key_codes, value_codes;  // of clustered tokens in the order of their clusters, if they are codes
    int entries;                          // their place in shared memory, in 16 bytes, or 0 where they have none
    int team;  // whether the blocks of a unit are a thread block cluster that ranks as a team
};
LAYOUT(Cache, 272, team, 268);

/// Queries, keys and values. Strides are in elements; queries and means are dense.
struct Route {
    int64_t key_head, key_row, value_head, value_row;  // strides
    int64_t group, queries, units;                     // query heads of a key head, and a head's queries and groups
    int64_t sinks, clustered, others, k, most;         // tokens by their place, clusters, and the room of a list
    int64_t means;                                     // k if means stand for what is not read, and 0 if nothing does
    int64_t causal;                                    // whether the queries are those of the last tokens
    float scale;                                       // of a product, times log2(e)
};
LAYOUT(Route, 120, scale, 112);

/// The units that choose clusters, and the bounds on what they read.
struct Choice {
    int64_t units;         // groups of queries of a key head, which choose alone
    int64_t clustered, k;  // tokens and clusters of a key head
    int64_t least, most;   // tokens of a unit
    float share;           // of the unit's attention, between those bounds
};
LAYOUT(Choice, 48, share, 40);

/// Weights as `LutMatrix` of request.rs has them.
struct LutWeights {
    const uint8_t* codes;         // (outputs, 8 bits / 64 columns)
    const void *levels, *scales;  // f16 (outputs, tables, 2^bits) or, where tables are 0, (2^bits); (outputs, groups)
    const uint32_t* places;       // of outliers, (outputs, outliers), or null
    const void* extra;            // what those are more than their levels, f16
    int64_t outputs, inputs, columns;  // columns are whole blocks of 64
    int64_t tables, groups, outliers;  // of an output
};
LAYOUT(LutWeights, 88, outliers, 80);

/// A product of many rows with such weights. `values` and `units` are what `lut_arrange` makes of rows.
struct LutProduct {
    LutWeights w;
    const void *values,
        *across;                // f16 (tiles of rows, blocks, columns of a product, 64); (inputs, padded rows), or null
    const float *units, *bias;  // (tiles of rows, blocks, rows of a tile), or null; (outputs), or null
    void* out;
    int64_t rows, padded;  // of x, and of `across`
    int64_t parts;         // thread blocks of a tile, which share its columns: a cluster
};
LAYOUT(LutProduct, 152, parts, 144);

/// A sort goes by one digit: the bits `mask` of a label from `shift` on, below `bins`. `before` (null: none) is the
/// order by the lower digits.
struct Digit {
    const uint32_t *labels, *before;
    int64_t n, k, bins;
    uint32_t shift, mask;

    /// The row at place `i` of problem `p`.
    __device__ __forceinline__ uint32_t row(int64_t p, int64_t i) const { return before ? before[p * n + i] : i; }
    /// A label out of range counts as the last one.
    __device__ __forceinline__ uint32_t bin(uint32_t label) const {
        return min(label, uint32_t(k - 1)) >> shift & mask;
    }
};
LAYOUT(Digit, 48, mask, 44);

/// The state of a problem's slots between updates that may keep their sums (update/changes.cu): slots hold ANYTHING
/// before a fit's first update.
enum SlotState : uint32_t { ANYTHING, ZEROS, ADDED_WHOLE, ADDED_CHANGES };

/// The centroids of a fit, and where they are added up.
template <class T>
struct Clusters {
    T* centroids;               // (b, k, d), in place
    unsigned long long* slots;  // (b, k, d + 1, 2): sums, and the weight; zeros but for clusters under way
    uint32_t* added;            // (b, k): pieces in a slot, likewise
    uint32_t* finished;         // (b,): pieces that are done, likewise
    uint32_t* odd;              // (b, k): whether a cluster is left to `update_exact`, likewise
    uint32_t* odd_of;           // (b,): how many of a problem are, likewise
    uint32_t* odd_count;        // (2): how many are in all, and how many of them are done, likewise
    uint64_t* odd_list;         // (b k): which ones
    double* shift;              // (b,): the largest squared shift of the iteration, likewise; null if not wanted
    uint32_t* kept;  // (3, b): `Changes::known`, `odd` and `state` if slots may keep what is in them; null if not
    int64_t problems, k, d;
    int64_t rows;  // that sums have room for
    int divisor;
    int planes;  // that slots are kept on if rows are only added to them (`Grid` in src/fixed.rs); otherwise 0

    __device__ __forceinline__ T* row(int64_t b, int64_t cluster) const { return centroids + (b * k + cluster) * d; }
    __device__ __forceinline__ unsigned long long* slot(int64_t b, int64_t cluster) const {
        return slots + (b * k + cluster) * (d + 1) * 2;
    }
    __device__ __forceinline__ void moved(int64_t b, double squared) const;
    __device__ __forceinline__ void mark_odd(int64_t b, int64_t cluster) const;
    __device__ __forceinline__ __int128 split(int64_t b, int64_t cluster, int64_t column, double v, int scale) const;
    __device__ __forceinline__ bool is_odd(int64_t b, int64_t cluster) const { return __ldcg(&odd[b * k + cluster]); }
    __device__ __forceinline__ uint32_t* known_of(int64_t b) const { return kept + b; }
    __device__ __forceinline__ uint32_t* odd_kept_of(int64_t b) const { return kept + problems + b; }
    __device__ __forceinline__ bool keeps(int64_t b) const { return kept[2 * problems + b] == ADDED_WHOLE; }
};
LAYOUT(Clusters<float>, 120, planes, 116);

/// The rows that have changed their cluster since sums were added up, and what the last update has left of each
/// problem (update/changes.cu).
struct Changes {
    uint32_t* labels;   // (b, n): by which rows were added up
    uint32_t* known;    // (b,): whether changes are added to the sums; of the update under way once it has decided
    uint32_t* odd;      // (b,): whether a cluster of the last update of all rows is none that sums are known of
    uint32_t* state;    // (b,): what the slots hold (`SlotState`), after the update under way once it has decided
    uint32_t* dirty;    // (b,): whether they are to become zeros if all rows are added up; likewise
    uint32_t* changed;  // (b,): how many rows there are; zeros but for an update under way
    uint32_t* next;     // (b, k, 2): of each cluster its gains and losses, or where the next one goes; likewise
    uint32_t* offsets;  // (b, 2 k + 1): where a cluster's gains, and its losses, begin
    uint2* rows;        // (b, room): rows that have changed, and the labels that they had
    uint2* slices;      // (b, most): clusters, and where a slice of their gains and losses begins
    uint32_t* count;    // (b,): of slices
    uint32_t *whole, *whole_count;  // the problems of which all rows are added up, as in `Active`
    int64_t k, room, most;
};
LAYOUT(Changes, 128, most, 120);

/// What a fit knows of its near groups (near.cuh) from one assignment to the next. The four from `regroup` on are
/// counts of an `Active`, 1 if that is to be done in this assignment.
struct NearState {
    unsigned long long listed;       // groups of all tiles, as they are being listed
    unsigned long long last_listed;  // the same, of the last lists
    uint32_t arrived;                // blocks that have listed
    uint32_t changed;                // rows that changed their label in the last assignment
    uint32_t on;                     // whether there are groups, and slack
    uint32_t fresh;                  // whether they have just been made, and there is no slack yet
    uint32_t regroup;                // make groups, and put rows in their order
    uint32_t going;                  // list near groups
    uint32_t near, all;              // score them; score all centroids
    uint32_t crowded;   // assignments, since groups were made, with lists so long that others may do better
    uint32_t failures;  // groups that have been of no use
    uint32_t spare[2];
};
LAYOUT(NearState, 64, failures, 52);

/// The pieces that warps take of the sorted places, which are cut after every `rows`, but for clusters of at most
/// `whole` rows, which belong to the piece that they begin in.
struct Pieces {
    uint32_t rows, whole;

    /// The number of pieces that share a cluster, if it is larger than `whole`.
    __device__ __forceinline__ uint32_t count(uint32_t top, uint32_t bottom) const {
        return (bottom - 1) / rows - top / rows + 1;
    }
};
LAYOUT(Pieces, 8, whole, 4);

/// The problems that have converged, and those that go on. Without a threshold there is no next iteration.
struct Verdict {
    const double* threshold;  // (b,): the squared shift at which a problem has converged
    uint32_t* stop;           // (b,): where it has, the iteration in which it did
    uint32_t *list, *count;   // `Active` of the next iteration
    int64_t iteration;

    __device__ __forceinline__ void decide_convergence(int64_t b, double* shift) const;
};
LAYOUT(Verdict, 40, iteration, 32);

/// The terms of the sums of a fit, of each problem: each row's factor, the largest magnitude and weight, and the first
/// row that is not finite.
struct Summands {
    const double *row_scale, *max_abs, *max_weight;
    const uint32_t* first_nonfinite;
};
LAYOUT(Summands, 32, first_nonfinite, 24);

/// The shares of the blocks of a team in a problem (`FitResident` in src/plan/on_chip.rs).
struct Shares {
    int blocks;  // of a team
    int rows;    // of a block, whole pairs of fragments
    int padded;  // centroids, whole groups
};
LAYOUT(Shares, 12, padded, 8);

/// A team publishes this with a moved centroid (tensor.cuh); the bounds are its own.
struct alignas(16) PreparedCentroid {
    float start, scale, moved, residual, stored;
    uint32_t hash;  // of the centroid itself
};
LAYOUT(PreparedCentroid, 32, hash, 20);

/// The sums of a team, to which each of its blocks adds its own: zeros but for an iteration under way. One of each to a
/// team.
struct Common {
    unsigned long long* limbs;       // (LIMBS, k, whole lines), columns in the order of `place_of`
    unsigned long long* remainders;  // (k, d, 2): what limbs could not take; null for f16 without factors
    unsigned long long* weights;     // (k, 2), of factors
    uint32_t* sizes;                 // (k + 2), without; ODD if a cluster is to be added up once more; and behind
                                     // them, whether any is in an even and in an odd turn
    double* shifts;                  // (2): the largest squared shift of an even and of an odd turn
    uint32_t* arrived;               // times that blocks have come to a barrier
    // And how the centroids are scored, which needs no zeros:
    void* moved;                 // (k, d), in the type of the rows
    PreparedCentroid* prepared;  // (k)

    template <class T>
    __device__ Common of_team(int64_t team, int64_t limb_count, int64_t k, int64_t d) const;
};
LAYOUT(Common, 64, prepared, 56);

#undef LAYOUT
