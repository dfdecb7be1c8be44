// A block's part in the fit of one problem: centroids.cuh, labels.cuh and means.cuh have its steps.
#pragma once
#include "assign/moved.cuh"
#include "assign/sweep.cuh"
#include "resident/team.cuh"

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

    /// Nothing is known of the centroids, and no row is listed.
    __device__ __forceinline__ void clear() const {
        if (threadIdx.x < BOUNDS) bounds[threadIdx.x] = 0;
        if (threadIdx.x == 0) *listed = 0;
    }

    // ---- Rows on chip, and centroids as they are scored.

    __device__ __forceinline__ uint4* centroid_piece(int j, int piece) const {
        const int at = piece / LINE_PIECES * shares.padded * LINE + swizzled<LINE>(j, piece % LINE_PIECES);
        return reinterpret_cast<uint4*>(s.centroids + at);
    }

    __device__ void load() const;
    __device__ __forceinline__ void fetch_lines(const T* from) const;
    __device__ void origin() const;
    template <class Value>
    __device__ __forceinline__ void publish(int j, Value value) const;
    __device__ __forceinline__ PreparedCentroid published(int j) const;
    __device__ __forceinline__ Bounds bounds_of(const PreparedCentroid& prepared, const Reach& reach, float& start,
                                                float& own) const;
    __device__ __forceinline__ Reach reach() const;
    __device__ void prepare() const;

    // ---- Labels.

    template <int FRAGMENTS>
    __device__ __forceinline__ void search(int first) const;
    __device__ __forceinline__ float score(int row, int j) const;
    __device__ __forceinline__ float apart(int row, int j) const;
    __device__ __forceinline__ bool without_direction(int row) const;
    __device__ void recheck_unproven() const;
    __device__ void label() const;

    // ---- Means.

    /// Columns that limbs have room for.
    __device__ __forceinline__ int width() const { return lines * LINE_COLUMNS; }

    /// Whether a row counts: one that is not finite weighs nothing.
    __device__ __forceinline__ bool counts(int row) const { return !dirty || finite(x + row * r.row_stride, d); }

    /// The exponents of the sums of marked clusters, one for each of `totals`, lie over the moved centroids, which are
    /// not read before the next ones are brought there.
    __device__ __forceinline__ int16_t* exponents() const { return reinterpret_cast<int16_t*>(s.centroids); }

    __device__ __forceinline__ int owned() const { return (k - rank + shares.blocks - 1) / shares.blocks; }

    __device__ void sort() const;
    template <int LINES>
    __device__ void add(const Units<T>& units, int weight_scale, uint32_t* marked) const;
    template <int LINES>
    __device__ __forceinline__ void take(const T (&values)[2], double f, const Units<T>& units, int j, int column,
                                         double (&sums)[LIMBS][LINES][2], int line, bool& odd) const;
    __device__ void add(const Units<T>& units, int weight_scale, uint32_t* marked) const;
    __device__ __forceinline__ void collect(const Units<T>& units, int owned) const;
    __device__ __forceinline__ void replace(int j, const double* totals, double by, double* shift) const;
    __device__ void replace(const Units<T>& units, int weight_scale, double* shift, uint32_t* marked) const;
    __device__ void replace_marked(double* shift, uint32_t* labels, uint32_t all) const;
};
