//! The work that an iteration may leave out because the one before it has done it. Nothing that is left out can change a bit.

use super::{arch::Arch, on_chip::OnChip};
use crate::{
    kmeans::EmptyClusters,
    metric::Metric,
    problem::Problem,
    tiles::{
        CHANGES_FEW, CHANGES_SLICE, CHANGES_SLICES, CHANGES_SLICE_MOST, CPU_GROUP, CPU_ROWS, CPU_SKIP_BYTES,
        CPU_SKIP_ROWS,
    },
};
use candle_core::DType;
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
    /// The groups of centroids to which assignments keep bounds on the distances of each row (Yinyang k-means, Ding et al. 2015), and
    /// skip those that cannot have its nearest centroid. 0: they compare all, as they do on GPUs.
    pub groups: usize,
    /// True if they keep rows as a matrix unit multiplies them.
    pub packs: bool,
    /// True if they skip groups however few these are.
    pub always: bool,
}

/// The most slices of a cluster's gains and losses, on a GPU, in which `n / CHANGES_FEW` rows change.
pub(crate) fn most_slices(n: usize, k: usize) -> usize {
    let rows = 2 * (n / CHANGES_FEW);
    k.saturating_add((rows / CHANGES_SLICE).min(CHANGES_SLICES.max(rows / CHANGES_SLICE_MOST)))
}

/// Fewer values than these are added up before they are compared: on the CPU,
const VALUES: usize = 1 << 18;
/// and on a GPU, which takes five launches more.
const GPU_VALUES: usize = 1 << 25;
/// Fewer products of values than these are computed sooner than planned.
const PRODUCTS: usize = 1 << 28;
/// Of fewer groups too many are needed.
const GROUPS: usize = 4;
/// Groups of which skipping is seen to be right.
const GROUPED: usize = 16;

impl SkipPlan {
    pub fn new(p: &Problem, on_chip: Option<OnChip>, empty: EmptyClusters, arch: Arch) -> Self {
        let fits = on_chip.is_none() && p.metric != Metric::Manhattan;
        let values = p.b.saturating_mul(p.n).saturating_mul(p.d);
        if !arch.is_cpu() {
            // Where clusters may be relocated, updates are given an order of all rows.
            let fits = fits && empty == EmptyClusters::Keep;
            let keep_sums = fits && FORCED.get().unwrap_or(values >= GPU_VALUES && p.n / 16 >= p.k);
            return Self { keep_sums, on_gpu: true, groups: 0, packs: false, always: false };
        }
        // Sums take sixteen bytes a column of a cluster: no more than a few times the rows.
        let keep_sums = fits && FORCED.get().unwrap_or(values >= VALUES && p.n / 4 >= p.k);
        // Bounds take a number a group and row: no more than a few times the rows.
        let (size, all) = (p.dtype.size_in_bytes(), p.k.div_ceil(CPU_GROUP));
        let by_work = values.saturating_mul(p.k) >= PRODUCTS;
        let pays = all >= GROUPS && all < p.d.saturating_mul(size) && p.n / 4 >= p.k && by_work;
        let euclidean = fits && p.metric == Metric::SquaredEuclidean && p.dtype != DType::F64;
        let groups = match FORCED.get() {
            // As many as make a difference.
            Some(true) => all.max(p.k.div_ceil(8).min(GROUPED)),
            Some(false) => 0,
            None if pays => all,
            None => 0,
        };
        let groups = if euclidean { groups } else { 0 };
        let packs = groups > 0 && arch == Arch::Cpu { amx: true };
        Self { keep_sums, on_gpu: false, groups, packs, always: FORCED.get() == Some(true) }
    }

    /// The bytes that are kept between iterations, and those in which changes are found.
    pub fn bytes(self, p: &Problem) -> u64 {
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        let (groups, size) = (self.groups as u64, p.dtype.size_in_bytes() as u64);
        let slices = 8 * most_slices(p.n, p.k) as u64;
        let changes = if self.on_gpu { b * (8 * (n / CHANGES_FEW as u64) + slices + 16 * k + 80) + 4096 } else { 0 };
        let sums = b * (16 * k * (d + 2) + 4 * n + 1) + changes;
        let bounds = b * (n * (4 * groups + 4) + k * (4 + d * size) + 4 * groups + 64);
        // Rows and centroids of bf16 in whole lines.
        let line = if self.packs { 2 * d.next_multiple_of(32) + 8 } else { 0 };
        let bounds = bounds + b * (n + k) * line;
        // What is known of centroids, and a thread's rows that are listed, as they are scored and with their candidates.
        let known = b * (k * (4 * d + 16) + 16 * groups);
        let of_row = 4 * d.next_multiple_of(32) + 4 * groups + 160 + 16 * k.min(64);
        let of_pair = 256 * (d.next_multiple_of(32) + CPU_GROUP as u64);
        let listed = (rayon::current_num_threads() as u64 + 1) * (2 * n.min(skip_rows(p.d) as u64) * of_row + of_pair);
        let bounds = bounds + known + listed;
        let kept = [(self.keep_sums, sums), (groups > 0, bounds)];
        kept.into_iter().filter(|&(kept, _)| kept).map(|(_, bytes)| bytes).sum()
    }
}

/// The rows that one CPU task looks up in their bounds.
pub(crate) fn skip_rows(d: usize) -> usize {
    (CPU_SKIP_BYTES / (2 * d.next_multiple_of(32))).clamp(CPU_ROWS, CPU_SKIP_ROWS)
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
