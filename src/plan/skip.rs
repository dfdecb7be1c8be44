//! The work that an iteration may leave out because the one before it has done it. Nothing that is left out can change a bit.

use super::{
    arch::Arch,
    assign::{sm90_shape, Assign},
    on_chip::OnChip,
    sort::Sort,
};
use crate::{
    kmeans::{EmptyClusters, KMeans},
    metric::Metric,
    problem::Problem,
    tiles::{
        CHANGES_FEW, CHANGES_SLICE, CHANGES_SLICES, CHANGES_SLICE_MOST, CPU_GROUP, CPU_ROWS, CPU_SKIP_BYTES,
        CPU_SKIP_ROWS, CPU_SNAPSHOTS, SKIP_GROUP, SM90_ROWS,
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
    /// skip those that cannot have its nearest centroid. 0: they compare all, or, on a GPU, do as `near` says. The CPU's.
    pub groups: usize,
    /// The earlier assignments from which these bounds count the moves of centroids, at most. The CPU's.
    pub snapshots: usize,
    /// True if they keep rows as a matrix unit multiplies them, which they do without groups too.
    pub packs: bool,
    /// True if they skip groups however few these are.
    pub always: bool,
    /// How assignments on a GPU score the near groups of centroids alone; none where they score all.
    pub near: Option<NearGroups>,
}

/// The plan of assignments on a GPU which score only the groups of centroids that may have the nearest one of a row
/// (`kernels/assign/near.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct NearGroups {
    /// The sort of rows by the groups of their centroids.
    pub sort: Sort,
    /// True if groups are made and scored however many rows change, and however many groups are near.
    always: bool,
}

/// The sizes of what near groups take.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct NearSizes {
    /// Groups of centroids that lie together.
    pub groups: usize,
    /// Groups of restless centroids, which all rows are scored against.
    pub restless: usize,
    /// Both.
    pub all: usize,
    /// Centroids that they have room for.
    pub places: usize,
    /// Tiles of rows, and rows of one.
    pub tiles: usize,
    pub rows: usize,
    /// Numbers from one tile's list to the next (`near_pitch`).
    pub list: usize,
    /// Elements from one row, and one centroid, to the next.
    pub pitch: usize,
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
/// All snapshots have as many centroids as a quarter of the rows at most.
const SNAPSHOT_ROWS: usize = 4;
/// Fits of fewer iterations than these have no pass, or one, that reads packed rows.
const PACKED: usize = 3;
/// Groups of which skipping is seen to be right.
const GROUPED: usize = 16;

/// Fewer centroids than these are scored by tensor cores sooner than it is said which of them need not be.
const NEAR_CENTROIDS: usize = 2048;
/// So many rows a centroid make tiles of rows that lie together.
const NEAR_ROWS: usize = 16;
/// Fewer pairs of a row and a centroid are scored so soon that groups of no use, as those of normal data are, cost a fit of 25
/// iterations more than 2 % (iterations-versions.md).
const NEAR_PAIRS: usize = 1 << 32;
/// A larger copy of rows may be one too many for the memory that a fit has had room in without it.
const NEAR_BYTES: usize = 8 << 30;
/// Fewer centroids make no two groups.
const NEAR_LEAST: usize = 2 * SKIP_GROUP;
/// Most columns that `assign_near_sm90.cu` is compiled for.
pub(crate) const NEAR_COLUMNS: usize = 128;
/// The assignment of a fit, counted from 1, that may be the first to make groups: before it too many rows change.
pub(crate) const NEAR_FIRST: usize = 4;

impl NearGroups {
    /// For a fit that is not on chip; none where all centroids are scored.
    fn new(p: &Problem, kernel: Assign, settings: &KMeans, arch: Arch) -> Option<Self> {
        // No row beyond 2^31 comes to this kernel. f32 comes to it as pairs of halves.
        let halves = kernel == Assign::Sm90 && matches!(p.dtype, DType::F16 | DType::BF16);
        let fits = halves && p.metric == Metric::SquaredEuclidean && p.b == 1 && p.d <= NEAR_COLUMNS;
        // The last assignment comes after all iterations.
        let fits = fits && p.k >= NEAR_LEAST && settings.max_iters >= NEAR_FIRST - 1;
        let pays = p.k >= NEAR_CENTROIDS && p.n / NEAR_ROWS >= p.k && p.n.saturating_mul(p.k) >= NEAR_PAIRS;
        let pays = pays && p.n.saturating_mul(2 * p.d) <= NEAR_BYTES;
        let sort = Sort::new([1, p.n, p.k], false, arch);
        (fits && FORCED.get().unwrap_or(pays)).then_some(Self { sort, always: forced() })
    }

    /// Whether assignment `t` of a fit, counted from 1, may make groups anew: two of an octave may.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn regroups_at(t: usize) -> bool {
        t >= NEAR_FIRST && (t.is_power_of_two() || (t.is_multiple_of(3) && (t / 3).is_power_of_two()))
    }

    /// The largest share of the rows that may have changed their label where groups are made: they would not last.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn few(self) -> f32 {
        if self.always {
            2.0
        } else {
            0.04
        }
    }

    /// The largest share of the groups of all tiles that is scored without the others.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub fn most(self) -> f32 {
        if self.always {
            2.0
        } else {
            0.9
        }
    }

    /// For `n` rows of `d` columns and `k` centroids.
    pub fn sizes([n, k, d]: [usize; 3]) -> NearSizes {
        let groups = k.div_ceil(SKIP_GROUP);
        let restless = groups.div_ceil(SKIP_GROUP);
        let (all, rows) = (groups + restless, SM90_ROWS * sm90_shape(d).1);
        NearSizes {
            groups,
            restless,
            all,
            places: all * SKIP_GROUP,
            tiles: n.div_ceil(rows),
            rows,
            list: (all + 2).next_multiple_of(4),
            pitch: d.next_multiple_of(8),
        }
    }

    /// The bytes that assignments leave each other, and those that one of them works in.
    pub fn bytes(self, p: &Problem) -> u64 {
        let NearSizes { all, places, tiles, list, pitch, .. } = Self::sizes([p.n, p.k, p.d]);
        let [n, k, all, places, tiles, list, pitch] =
            [p.n, p.k, all, places, tiles, list, pitch].map(|size| size as u64);
        // Rows in their order, the centroids of the last assignment and those that are scored.
        let halves = 2 * pitch * (n + k + places);
        // Of each row its number, its last label and where its centroid is; of each place and centroid a few numbers.
        let numbers = 4 * (3 * n + 2 * places + 6 * k + 4 * all);
        let of_tiles = 4 * tiles * (all + list + 1);
        let Sort { passes, bins, chunks, .. } = self.sort;
        let sort = 4 * (bins * (chunks + 2)) as u64 + if passes > 1 { 4 * n } else { 0 };
        halves + numbers + of_tiles + sort + 16_384
    }
}

impl SkipPlan {
    /// For a fit whose assignments are by that kernel.
    pub fn new(p: &Problem, on_chip: Option<OnChip>, kernel: Assign, settings: &KMeans, arch: Arch) -> Self {
        let fits = on_chip.is_none() && p.metric != Metric::Manhattan;
        let values = p.b.saturating_mul(p.n).saturating_mul(p.d);
        if !arch.is_cpu() {
            // Where clusters may be relocated, updates are given an order of all rows.
            let fits = fits && settings.empty == EmptyClusters::Keep;
            let keep_sums = fits && FORCED.get().unwrap_or(values >= GPU_VALUES && p.n / 16 >= p.k);
            // Nothing but iterations changes labels and centroids there, so that bounds never have to be forgotten.
            let near = if fits { NearGroups::new(p, kernel, settings, arch) } else { None };
            return Self { keep_sums, on_gpu: true, groups: 0, snapshots: 0, packs: false, always: false, near };
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
        let snapshots = if groups > 0 { (p.n / p.k / SNAPSHOT_ROWS).clamp(1, CPU_SNAPSHOTS) } else { 0 };
        let pays = settings.max_iters >= PACKED && FORCED.get() != Some(false);
        let packs =
            groups > 0 && arch == Arch::Cpu { amx: true } || on_chip.is_none() && kernel == Assign::CpuAmx && pays;
        Self { keep_sums, on_gpu: false, groups, snapshots, packs, always: forced(), near: None }
    }

    /// The bytes that are kept between iterations, and those in which changes are found.
    pub fn bytes(self, p: &Problem) -> u64 {
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        let groups = self.groups as u64;
        let slices = 8 * most_slices(p.n, p.k) as u64;
        let changes = if self.on_gpu { b * (8 * (n / CHANGES_FEW as u64) + slices + 16 * k + 80) + 4096 } else { 0 };
        let sums = b * (16 * k * (d + 2) + 4 * n + 1) + changes;
        let snapshots = self.snapshots as u64;
        let bounds = b * (n * 5 * groups + k * (4 + 4 * d * snapshots) + 4 * groups + 64);
        let bounds = bounds + if groups > 0 { b * 4 * n } else { 0 };
        // Rows and centroids of bf16 in whole lines.
        let line = if self.packs { 2 * d.next_multiple_of(32) + 8 } else { 0 };
        let bounds = bounds + b * (n + k) * line;
        // What is known of centroids, and a thread's rows that are listed, as they are scored and with their candidates.
        let known = b * (k * (4 * d + 96 + 4 * snapshots) + groups * (16 + 4 * CPU_SNAPSHOTS as u64));
        let of_row = 4 * d.next_multiple_of(32) + 8 * groups + 160 + 16 * k.min(64);
        let of_pair = 256 * (d.next_multiple_of(32) + CPU_GROUP as u64);
        let of_groups = groups.min(1);
        let listed = of_groups
            * (rayon::current_num_threads() as u64 + 1)
            * (2 * n.min(skip_rows(p.d) as u64) * of_row + of_pair);
        let bounds = bounds + known + listed;
        let kept = [(self.keep_sums, sums), (groups > 0 || self.packs, bounds)];
        let kept: u64 = kept.into_iter().filter(|&(kept, _)| kept).map(|(_, bytes)| bytes).sum();
        kept + self.near.map_or(0, |near| near.bytes(p))
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
