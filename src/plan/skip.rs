//! The work that an iteration may leave out because the one before it has done it. Nothing that is left out can change a bit.

use super::{arch::Arch, on_chip::OnChip};
use crate::{metric::Metric, problem::Problem};
use std::cell::Cell;

/// The work that the iterations of a fit of rows in one block, on the CPU, save each other. GPUs, streams and ranks do all of it in every
/// iteration: this is the one place that says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SkipPlan {
    /// True if updates keep their sums, which then take only the rows that have changed their cluster. Sums are integers: their bits do
    /// not depend on how often a row has come and gone.
    pub keep_sums: bool,
    /// The groups of centroids to which assignments keep bounds on the distances of each row (Yinyang k-means, Ding et al. 2015), and
    /// skip those that cannot have its nearest centroid. 0: they compare all.
    pub groups: usize,
    /// True if they skip groups however few these are.
    pub always: bool,
}

/// Fewer values than these are added up before they are compared.
const VALUES: usize = 1 << 18;

impl SkipPlan {
    pub fn new(p: &Problem, on_chip: Option<OnChip>, arch: Arch) -> Self {
        let fits = arch.is_cpu() && on_chip.is_none() && p.metric != Metric::Manhattan;
        let values = p.b.saturating_mul(p.n).saturating_mul(p.d);
        // Sums take sixteen bytes a column of a cluster: no more than a few times the rows.
        let keep_sums = fits && FORCED.get().unwrap_or(values >= VALUES && p.n / 4 >= p.k);
        Self { keep_sums, groups: 0, always: FORCED.get() == Some(true) }
    }

    /// The bytes that are kept between iterations.
    pub fn bytes(self, p: &Problem) -> u64 {
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        let (groups, size) = (self.groups as u64, p.dtype.size_in_bytes() as u64);
        let sums = b * (16 * k * (d + 2) + 4 * n + 1);
        let bounds = b * (n * (4 * groups + 4) + k * (4 + d * size) + 4 * groups + 64);
        [(self.keep_sums, sums), (groups > 0, bounds)]
            .into_iter()
            .filter(|&(kept, _)| kept)
            .map(|(_, bytes)| bytes)
            .sum()
    }
}

thread_local!(static FORCED: Cell<Option<bool>> = const { Cell::new(None) });

/// Makes this thread plan fits that save work wherever they can, or nowhere; or, by default, where it pays.
pub fn force_skipping(skip: Option<bool>) {
    FORCED.set(skip);
}
