// Near groups: the groups of centroids that may have the nearest one of a row, for assignments of a fit that score no
// others.
//
// Centroids lie in groups of SKIP_GROUP neighbours (halve.cu), and rows in tiles of neighbours: those of one cluster
// are side by side, and those of a group's clusters. The *slack* of a tile and a group is a lower bound, over the rows
// of the tile, of how much farther a row is from the nearest centroid of the group than from its own. By the triangle
// inequality an iteration takes no more from it than the group's largest move and the largest move of the rows' own
// centroids. While it is above zero, no row of the tile has its nearest centroid in the group, nor one as near (Elkan
// 2003; groups of centroids: Ding et al. 2015, "Yinyang k-means"). A bound belongs to a tile here, which is what tensor
// cores multiply: a pass that scores a group makes its slack from scores that are in registers, there is one number for
// a tile and a group, and neither lists nor bounds take a pass over the rows.
//
// Why nothing is lost. A pass makes slack from upper bounds of a group's scores, and from a lower bound of the best
// score among the tile's own groups, both by `error_bound` and rounded apart; zero always holds, since a row's own
// centroid is its nearest, and so it does for the own groups themselves, of which no slack is made. Differences of
// slack and moves are rounded down. Rows that the recheck always compares with all centroids, and those whose label is
// 0 whatever centroids there are, bound nothing. A centroid that has no score bounds nothing either, so that its group
// is *silent*: its slack is given up in that iteration and in the next.
//
// A few *restless* centroids that jump would take the slack of all groups. Those that have moved farthest lie in groups
// of their own for an iteration, which all tiles score, and do not count for the moves of their groups. The slack of
// all of them holds for each that joins its group again.
#pragma once
#include "params.cuh"

/// From one tile's list to the next. A list is two counts and then groups: first those that have the centroids of the
/// tile's rows, as many as the first count, whose best scores slack is measured from; the second counts all.
__host__ __device__ constexpr int64_t near_pitch(int64_t groups) { return (groups + 2 + 3) / 4 * 4; }
