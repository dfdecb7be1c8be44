// Groups of centroids that may have the nearest one of a row, for assignments in a fit that score no others.
//
// Centroids lie in groups of SKIP_GROUP, whose members are neighbours (halve.cu), and rows in tiles of neighbours too.
// For a tile and a group, the slack is a lower bound, over the rows of the tile, of how much farther a row is from the
// nearest centroid of the group than from its own. By the triangle inequality it shrinks from one iteration to the next
// by no more than the group's largest move and the largest move of the rows' own centroids; while it is above zero, the
// group has the nearest centroid of no row (Elkan 2003; groups: Ding et al. 2015). Here a bound belongs to a tile, which
// is what a tensor core multiplies, and a pass that scores a group makes its bounds in registers. What is known of a
// tile and a group is one number, and skipping costs no pass over the rows.
#pragma once
#include "params.cuh"

/// The groups that a tile scores: at `lists + tile * pitch` their counts, then the groups. The first `own` have the
/// centroids of the rows of the tile, so that they are scored first: slack is measured from the best scores of these.
struct NearCounts {
    uint32_t own, all;
};

__host__ __device__ constexpr int64_t near_pitch(int64_t groups) { return (groups + 2 + 3) / 4 * 4; }
