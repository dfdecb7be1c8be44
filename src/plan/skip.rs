//! The work that an iteration may leave out because the one before it has done it. Nothing that is left out can change a bit.

use super::{arch::Arch, on_chip::OnChip};
use crate::{kmeans::EmptyClusters, metric::Metric, problem::Problem, tiles::CHANGES_FEW};
use std::cell::Cell;

/// The work that the iterations of a fit of rows in one block save each other. Streams and ranks do all of it in every iteration: this is
/// the one place that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SkipPlan {
    /// True if updates keep their sums, which then take only the rows that have changed their cluster. Sums are integers: their bits do
    /// not depend on how often a row has come and gone.
    pub keep_sums: bool,
    /// Whether they keep them in the memory of a GPU.
    pub on_gpu: bool,
}

/// Fewer values than these are added up before they are compared: on the CPU,
const VALUES: usize = 1 << 18;
/// and on a GPU, which takes five launches more.
const GPU_VALUES: usize = 1 << 25;

impl SkipPlan {
    pub fn new(p: &Problem, on_chip: Option<OnChip>, empty: EmptyClusters, arch: Arch) -> Self {
        let fits = on_chip.is_none() && p.metric != Metric::Manhattan;
        let values = p.b.saturating_mul(p.n).saturating_mul(p.d);
        let keep_sums = if arch.is_cpu() {
            // Sums take sixteen bytes a column of a cluster: no more than a few times the rows.
            fits && FORCED.get().unwrap_or(values >= VALUES && p.n / 4 >= p.k)
        } else {
            // Where clusters may be relocated, updates are given an order of all rows.
            let fits = fits && empty == EmptyClusters::Keep;
            fits && FORCED.get().unwrap_or(values >= GPU_VALUES && p.n / 16 >= p.k)
        };
        Self { keep_sums, on_gpu: !arch.is_cpu() }
    }

    /// The bytes that updates keep, and on a GPU find changes in.
    pub fn bytes(self, p: &Problem) -> u64 {
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        match (self.keep_sums, self.on_gpu) {
            (false, _) => 0,
            (true, false) => b * (16 * k * (d + 2) + 4 * n + 1),
            (true, true) => b * (16 * k * (d + 2) + 4 * n + 8 * (n / CHANGES_FEW as u64) + 16 * k + 64) + 4096,
        }
    }
}

thread_local!(static FORCED: Cell<Option<bool>> = const { Cell::new(None) });

/// Makes this thread plan fits that save work wherever they can, or nowhere; or, by default, where it pays.
pub fn force_skipping(skip: Option<bool>) {
    FORCED.set(skip);
}

/// Whether fits are to save work that a kernel which does all of their iterations does not.
pub(super) fn forced() -> bool {
    FORCED.get() == Some(true)
}
