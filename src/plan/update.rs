//! The reduction of rows by their labels.

use super::{arch::Arch, sort::Sort};
use crate::{rows::RowLayout, tiles};
use candle_core::DType;

/// The plan by which the rows of each cluster become its mean, its sum or its median.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct UpdatePlan {
    pub kernel: UpdateKernel,
    /// The sort of labels that are not in order yet. A GPU's.
    pub sort: Sort,
    /// Rows of the order that a warp adds up. A GPU's.
    pub piece: usize,
    /// True if the updates of a fit keep their sums on a GPU, which then take only the rows that have changed their cluster.
    pub keep_sums: bool,
}

/// A kernel that reduces rows in the order of their labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum UpdateKernel {
    CpuSums,
    CpuMedians,
    /// Terms have factors where it is `weighted`, and rows are read in pieces of 16 bytes, unless it is `narrow`.
    Sums {
        narrow: bool,
        weighted: bool,
    },
    Medians,
}

impl UpdateKernel {
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuSums => "cpu_sums",
            Self::CpuMedians => "cpu_medians",
            Self::Sums { narrow: false, weighted: false } => "update",
            Self::Sums { narrow: false, weighted: true } => "update_weighted",
            Self::Sums { narrow: true, weighted: false } => "update_narrow",
            Self::Sums { narrow: true, weighted: true } => "update_narrow_weighted",
            Self::Medians => "medians",
        }
    }

    /// The kernel that adds up all rows and keeps the sums, and that which adds only the rows that have changed their cluster.
    pub fn kept(self) -> [&'static str; 2] {
        match self {
            Self::Sums { narrow: false, weighted: true } => ["update_kept_weighted", "add_changes_weighted"],
            Self::Sums { narrow: true, weighted: true } => ["update_kept_narrow_weighted", "add_changes_weighted"],
            Self::Sums { narrow: true, weighted: false } => ["update_kept_narrow", "add_changes"],
            _ => ["update_kept", "add_changes"],
        }
    }
}

impl UpdatePlan {
    /// For `b` problems of `n` rows of that layout, with `d` columns, in `k` clusters each: for their `medians`, or for their sums,
    /// whose terms have factors where they are `weighted`.
    pub fn new(
        dtype: DType,
        [b, n, k, d]: [usize; 4],
        layout: RowLayout,
        medians: bool,
        weighted: bool,
        arch: Arch,
    ) -> Self {
        // Pieces of 16 bytes have to be aligned and whole, and their kernels multiply strides in 32 bits.
        let each = 16 / dtype.size_in_bytes();
        let narrow = !layout.is_aligned(each) || !d.is_multiple_of(each) || layout.stride > u32::MAX as usize;
        let kernel = match (arch, medians) {
            (Arch::Cpu { .. }, false) => UpdateKernel::CpuSums,
            (Arch::Cpu { .. }, true) => UpdateKernel::CpuMedians,
            (_, false) => UpdateKernel::Sums { narrow, weighted },
            (_, true) => UpdateKernel::Medians,
        };
        // A warp's piece is about as long as a cluster, so that few clusters cross pieces; shorter where there would be fewer than
        // SUM_WARPS_LEAST, which fill a device, and longer where there would be more than SUM_WARPS.
        let all = b.saturating_mul(n);
        let piece = (all / tiles::SUM_WARPS).max((n / k).min(tiles::SUM_CLUSTER).min(all / tiles::SUM_WARPS_LEAST));
        let piece = piece.clamp(tiles::SUM_ROWS_LEAST, tiles::SUM_ROWS).next_power_of_two();
        Self { kernel, sort: Sort::new([b, n, k], false, arch), piece, keep_sums: false }
    }

    /// The name of the kernel that adds up all rows.
    pub fn name(&self) -> &'static str {
        if self.keep_sums {
            self.kernel.kept()[0]
        } else {
            self.kernel.name()
        }
    }
}
