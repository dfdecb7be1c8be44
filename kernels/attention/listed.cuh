// A query reads a list, one row after another: tokens by their index, and clusters that stand for theirs.
#pragma once
#include <stdint.h>

/// A row is a token below CLUSTER, or a cluster with that bit.
constexpr uint32_t CLUSTER = 1u << 31, NOTHING = UINT32_MAX;

/// Tokens are sinks, then the clustered ones, then others. Read are the sinks, those listed, the clusters' means, and
/// the others.
struct ReadList {
    const uint32_t* chosen;  // (listed): counted from the first clustered token
    const float* left;       // (means): the tokens that are not listed, of each cluster
    int64_t sinks, listed, means, clustered, others;

    __device__ __forceinline__ int64_t rows() const { return sinks + listed + means + others; }
    __device__ __forceinline__ uint32_t operator[](int64_t row) const {
        if (row < sinks) return row;
        if ((row -= sinks) < listed) return sinks + chosen[row];
        if ((row -= listed) < means) return left[row] > 0 ? CLUSTER | uint32_t(row) : NOTHING;
        return (row -= means) < others ? uint32_t(sinks + clustered + row) : NOTHING;
    }
};
