//! Whole fits at once.

use super::{
    arch::{shared_memory, Arch},
    assign::{forced, narrow_columns, narrow_fragments, narrow_shared},
};
use crate::{error::Result, metric::Metric, rows::RowLayout, tiles};
use candle_core::DType;

/// The kernel that does all iterations of a fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum OnChip {
    /// `cpu::sorted_1d`: rows of one column, sorted once.
    CpuLine,
    /// `fit_line.cu`: the same on a GPU, a block to a problem.
    Line(FitLine),
    /// `fit_narrow.cu`: a block to a problem.
    Narrow(FitNarrow),
    /// `fit_resident.cu`: a team of blocks to a problem.
    Resident(FitResident),
}

impl OnChip {
    /// For `b` problems of `n` rows of that layout, with `d` columns, and `k` centroids each; none where the loop is for them.
    /// `weighted`: whether terms have factors. `runs_at_once`: whether the device runs all blocks of this launch at once.
    pub fn new(
        dtype: DType,
        metric: Metric,
        sizes: [usize; 4],
        layout: RowLayout,
        weighted: bool,
        arch: Arch,
        runs_at_once: impl FnOnce(&FitResident) -> Result<bool>,
    ) -> Result<Option<Self>> {
        if forced() {
            return Ok(None);
        }
        if arch.is_cpu() {
            // Squares of f64 can underflow to ties.
            let line = sizes[3] == 1 && metric == Metric::SquaredEuclidean && dtype != DType::F64;
            return Ok(line.then_some(Self::CpuLine));
        }
        if let Some(line) = FitLine::new(dtype, metric, weighted, sizes, arch) {
            return Ok(Some(Self::Line(line)));
        }
        if let Some(narrow) = FitNarrow::new(dtype, metric, sizes, arch) {
            return Ok(Some(Self::Narrow(narrow)));
        }
        match FitResident::new(dtype, metric, weighted, sizes, arch) {
            Some(fit) if layout.is_aligned(8) && runs_at_once(&fit)? => Ok(Some(Self::Resident(fit))),
            _ => Ok(None),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Self::CpuLine => "cpu_line",
            Self::Line(_) => "fit_line",
            Self::Narrow(_) => "fit_narrow",
            Self::Resident(fit) => fit.name(),
        }
    }

    /// Rows and centroids that a block, or a thread of the CPU, works on, of problems of `n` rows and `k` centroids.
    pub(super) fn tile(&self, n: usize, k: usize) -> (usize, usize) {
        match self {
            Self::CpuLine | Self::Line(_) | Self::Narrow(_) => (n, k),
            Self::Resident(fit) => (fit.rows, fit.padded),
        }
    }
}

/// The launch of `fit_line.cu`, for rows of one column.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct FitLine {
    /// Threads of a block, the rows of a problem that they sort at most, and problems of a block.
    pub threads: usize,
    pub rows: usize,
    pub problems: usize,
    /// Shared memory of a block.
    pub shared: usize,
    /// The launch for problems whose values are not for this one.
    pub others: FitNarrow,
}

impl FitLine {
    /// For problems whose rows a block sorts at once, without factors.
    fn new(dtype: DType, metric: Metric, weighted: bool, sizes: [usize; 4], arch: Arch) -> Option<Self> {
        let [b, n, k, d] = sizes;
        // Squares of f64 can underflow to ties.
        if d != 1 || metric != Metric::SquaredEuclidean || dtype == DType::F64 || weighted {
            return None;
        }
        let [threads, rows, problems] = LINE_BLOCKS.into_iter().find(|&[_, rows, _]| n <= rows)?;
        // Of a centroid its value, its place and the end of its rows.
        let shared = problems * (rows * tiles::LINE_BYTES + tiles::LINE_FIXED + 16 * k);
        let others = FitNarrow::launch(dtype, metric, sizes, arch)?;
        // A centroid is compared with all others to find its place.
        let worth_it = k <= n && (b >= tiles::FIT_PROBLEMS || k <= LINE_CENTROIDS);
        (shared <= shared_memory(arch)? && worth_it).then_some(Self { threads, rows, problems, shared, others })
    }
}

/// The blocks that `fit_line.cu` is compiled for: threads, rows of a problem, and problems.
const LINE_BLOCKS: [[usize; 3]; 5] = [[64, 512, 2], [128, 1024, 4], [256, 2048, 4], [512, 4096, 2], [512, 8192, 1]];
/// Most centroids of few problems.
const LINE_CENTROIDS: usize = 1024;

/// The launch of `fit_narrow.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct FitNarrow {
    pub threads: usize,
    /// Shared memory of a block, and of that what its centroids take, which come first, and what they take as tensor cores
    /// score them, before all.
    pub shared: usize,
    pub centroids: usize,
    pub fragments: usize,
}

impl FitNarrow {
    /// For `b` problems of `n` rows of which there are enough, or which are small enough, not to be shared by several blocks.
    fn new(dtype: DType, metric: Metric, sizes: [usize; 4], arch: Arch) -> Option<Self> {
        let worth_it = sizes[0] >= tiles::FIT_PROBLEMS || sizes[1] * sizes[2] <= tiles::FIT_SMALL;
        Self::launch(dtype, metric, sizes, arch).filter(|_| worth_it)
    }

    /// For problems whose rows fit in a block's shared memory.
    fn launch(dtype: DType, metric: Metric, [b, n, k, d]: [usize; 4], arch: Arch) -> Option<Self> {
        let most = shared_memory(arch)?;
        let centroids = narrow_shared(dtype, k, d)?.next_multiple_of(16);
        let columns = narrow_columns(d);
        // Sums and weights, two limbs of each sum; rows; where clusters begin; labels and their order.
        let sums = 16 * k * (columns + 1) + 16 * k * columns;
        let rows = n.checked_mul(columns)?.checked_next_multiple_of(8)?.checked_mul(dtype.size_in_bytes())?;
        let shared = rows.checked_add(centroids + sums + 4 * (2 * k + 1))?.checked_add(4 * n)?;
        let fragments = narrow_fragments(dtype, metric, [k, d], shared, most);
        let (shared, centroids) = (shared + fragments, centroids + fragments);
        let fits = metric != Metric::Manhattan && n <= 1 << 16 && shared <= most;
        // As many threads to a multiprocessor as its registers are for, in as many blocks as its shared memory is for.
        let threads = match columns {
            1 | 2 => tiles::FIT_THREADS_2,
            4 => tiles::FIT_THREADS_4,
            _ => tiles::FIT_THREADS_8,
        };
        let resident = if columns > 2 { threads } else { 2 * threads };
        let blocks = (most + tiles::STATIC_SHARED) / (shared + BLOCK_SHARED);
        let many = (resident / blocks.max(1) / 32 * 32).clamp(32, threads);
        let threads = if b < tiles::FIT_PROBLEMS { threads } else { many }.min(n.next_multiple_of(32));
        fits.then_some(Self { threads, shared, centroids, fragments })
    }
}

/// The launch of `fit_resident.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct FitResident {
    /// Whether terms have factors.
    pub weighted: bool,
    /// Teams, and blocks of each: no more of both than run at once.
    pub teams: usize,
    pub blocks: usize,
    /// Rows of a block, and centroids in whole groups.
    pub rows: usize,
    pub padded: usize,
    /// Shared memory of a block.
    pub shared: usize,
}

impl FitResident {
    pub fn name(&self) -> &'static str {
        if self.weighted {
            "fit_resident_weighted"
        } else {
            "fit_resident"
        }
    }

    /// For `b` problems of `n` rows that fit in the shared memory of blocks that run at once.
    fn new(dtype: DType, metric: Metric, weighted: bool, [b, n, k, d]: [usize; 4], arch: Arch) -> Option<Self> {
        let Arch::Cuda { capability, processors } = arch else { return None };
        let halves = capability >= 80 && matches!(dtype, DType::F16 | DType::BF16) && metric != Metric::Manhattan;
        let columns = d.is_multiple_of(8) && (16..=tiles::TEAM_COLUMNS).contains(&d);
        if !halves || !columns || k > tiles::TEAM_CENTROIDS {
            return None;
        }
        let most = shared_memory(arch)?;
        let (padded, line) = (k.next_multiple_of(tiles::TEAM_GROUP), 2 * d.next_multiple_of(tiles::TEAM_LINE));
        // Rows, their squares, labels, order, factors, and the list of those to settle. Centroids with what they start from,
        // their scales, hashes and rows' places; mu; the sums of a share of the clusters.
        let of_row = line + 16 + if weighted { 8 } else { 0 };
        let fixed = |blocks: usize| padded * (line + 20) + 16 + line + k.div_ceil(blocks) * d * 8;
        let of = |blocks: usize| {
            let rows = n.div_ceil(blocks).next_multiple_of(tiles::TEAM_GROUP);
            let shared = rows.checked_mul(of_row)?.checked_add(fixed(blocks))?;
            let teams = b.min(processors / blocks);
            // Problems that have to wait for others are better off in kernels that take all at once.
            let soon = b.div_ceil(teams.max(1)) <= tiles::TEAM_TURNS;
            (rows <= tiles::SUM_ROWS && shared <= most && soon).then_some(Self {
                weighted,
                teams,
                blocks,
                rows,
                padded,
                shared,
            })
        };
        // As many blocks as there are, if all problems run at once; the fewest that do, if not.
        let wide = (processors / b.max(1)).min(n.div_ceil(tiles::TEAM_ROWS)).max(1);
        of(wide).or_else(|| (wide..=processors).find_map(of))
    }
}

/// The bytes of shared memory that a block of `fit_narrow.cu` takes beside what it asks for: its own, and the device's.
const BLOCK_SHARED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams_fit_their_device() {
        let mut some = 0;
        for (capability, processors) in [(80, 108), (86, 82), (90, 132), (90, 16), (100, 148)] {
            let arch = Arch::Cuda { capability, processors };
            let most = shared_memory(arch).unwrap();
            for b in [1, 3, 8, 100, 132, 500, 100_000] {
                for (n, k, d) in [(1, 1, 16), (2048, 64, 128), (8192, 128, 64), (16_384, 512, 128), (100_000, 33, 256)]
                {
                    for weighted in [false, true] {
                        let sizes = [b, n, k, d];
                        let plan = FitResident::new(DType::F16, Metric::SquaredEuclidean, weighted, sizes, arch);
                        let Some(FitResident { teams, blocks, rows, padded, shared, .. }) = plan else { continue };
                        some += 1;
                        assert!(
                            teams >= 1 && teams * blocks <= processors && teams <= b,
                            "{teams} x {blocks}: {sizes:?}"
                        );
                        assert!(rows * blocks >= n && rows <= tiles::SUM_ROWS && padded >= k, "{rows}: {sizes:?}");
                        assert!(shared <= most && b <= teams * tiles::TEAM_TURNS, "{shared}: {sizes:?}");
                    }
                }
            }
        }
        assert!(some > 50, "{some}");
    }
}
