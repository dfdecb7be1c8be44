//! The sort of labels.

use super::arch::{shared_memory, Arch};
use crate::tiles;

/// The plan of a sort of labels on a GPU, by counting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct Sort {
    pub way: SortWay,
    /// Digits to sort by, one after another; bits of one, and its values.
    pub passes: usize,
    pub bits: u32,
    pub bins: usize,
    /// Threads of a block that places rows.
    pub threads: usize,
    /// Rows of a chunk, and chunks.
    pub rows: usize,
    pub chunks: usize,
}

/// The kernel of `sort.cu` that places rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SortWay {
    /// `order_whole`: a block sorts all of a problem.
    Whole,
    /// `order_deal`: a block sorts a tile at a time; atomic counters deal out places, in any order within a cluster.
    Deal,
    /// `order_deal_many`: the same with larger tiles, for many rows.
    DealMany,
    /// `order_scatter`: rows of a cluster stay ascending, and several digits are sorted one after another.
    Scatter,
}

impl Sort {
    /// For `b` problems of `n` labels below `k`. `ascending`: whether it matters in what order the rows of a cluster are.
    pub fn new(sizes: [usize; 3], ascending: bool, arch: Arch) -> Self {
        Self::within(sizes, ascending, shared_memory(arch).unwrap_or(usize::MAX))
    }

    /// The same in blocks of `shared` bytes of shared memory.
    fn within([b, n, k]: [usize; 3], ascending: bool, shared: usize) -> Self {
        let bits = usize::BITS - (k - 1).leading_zeros();
        let passes = if k <= tiles::SORT_BINS { 1 } else { bits.div_ceil(tiles::SORT_BINS.ilog2()) };
        let bits = bits.div_ceil(passes);
        let bins = if passes == 1 { k } else { 1 << bits };
        let all = b.saturating_mul(n);
        let many = tiles::SORT_WHOLE * tiles::SORT_ITEMS_MANY;
        // Counters for each bin and a word for each row of a tile.
        let fits = |rows: usize| 4 * (2 * bins + 1 + rows) <= shared;
        let way = if ascending || passes > 1 {
            SortWay::Scatter
        } else if n <= tiles::SORT_WHOLE * tiles::SORT_ITEMS && fits(n) {
            SortWay::Whole
        } else if all >= tiles::SORT_MANY * many && fits(many) {
            SortWay::DealMany
        } else if fits(tiles::SORT_THREADS * tiles::SORT_ITEMS) {
            SortWay::Deal
        } else {
            SortWay::Scatter
        };
        let threads = match way {
            // Few problems have the device for themselves.
            SortWay::Whole => {
                let items = if b < tiles::SORT_MANY { 2 } else { tiles::SORT_ITEMS };
                n.div_ceil(items).next_multiple_of(32).clamp(64, tiles::SORT_WHOLE)
            }
            SortWay::Deal => tiles::SORT_THREADS,
            SortWay::DealMany => tiles::SORT_WHOLE,
            // Four bytes for each bin, and two for each bin and warp and for all warps.
            SortWay::Scatter => 32 * (shared / (2 * bins)).saturating_sub(3).clamp(1, tiles::SORT_WARPS),
        };
        let tile = threads * if way == SortWay::DealMany { tiles::SORT_ITEMS_MANY } else { tiles::SORT_ITEMS };
        let rows = bins.max(all / tiles::SORT_CHUNKS).next_multiple_of(tile);
        Self { way, passes: passes as usize, bits, bins, threads, rows, chunks: n.div_ceil(rows) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sorts_fit_the_shared_memory_of_their_device() {
        for shared in [48 << 10, 98 << 10, 162 << 10, 226 << 10] {
            for k in [1, 2, 100, 4096, 8192, 8193, 1 << 20] {
                for (b, n) in [(1, 1), (1, 16_384), (1, 1 << 25), (70, 16_385), (2880, 8192)] {
                    for ascending in [false, true] {
                        let Sort { way, bins, threads, rows, chunks, .. } = Sort::within([b, n, k], ascending, shared);
                        let words = |rows| 4 * (2 * bins + 1 + rows);
                        let (bytes, tile) = match way {
                            SortWay::Whole => (words(n), threads * tiles::SORT_ITEMS),
                            SortWay::Deal => (words(threads * tiles::SORT_ITEMS), threads * tiles::SORT_ITEMS),
                            SortWay::DealMany => (words(threads * tiles::SORT_ITEMS_MANY), threads),
                            SortWay::Scatter => (2 * (threads / 32 + 3) * bins, threads),
                        };
                        // A stable sort of many clusters has at least one warp's counters.
                        assert!(bytes <= shared.max(8 * bins), "{way:?} {b} {n} {k}: {bytes} of {shared}");
                        assert!(way != SortWay::Whole || n <= tile, "{n} {tile}");
                        assert!(rows * chunks >= n && rows % tile == 0 && (way == SortWay::Scatter) >= ascending);
                    }
                }
            }
        }
    }
}
