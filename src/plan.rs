//! What a fit will run, decided from the problem alone, and printable.

use crate::{
    kmeans::{drawn, EmptyClusters, Init, KMeans},
    metric::Metric,
    problem::Problem,
    rows::in_eights,
    tiles,
};
use candle_core::{DType, Tensor};
use std::{cell::Cell, collections::HashSet, fmt, sync::Mutex};

/// Where a fit runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arch {
    Cpu,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Cuda {
        /// Compute capability, 90 for 9.0.
        capability: u32,
        /// Multiprocessors.
        processors: usize,
    },
}

/// An assignment kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Assign {
    CpuGemm,
    CpuManhattan,
    SimtDot,
    SimtManhattan,
    /// CUDA cores too, for few columns and as many centroids as fit on chip.
    Narrow,
    /// `mma.sync`, for f16, bf16 and split f32 from Ampere on.
    Sm80,
    /// The same for f16 and bf16, proof and recheck in one launch.
    Small,
    /// TMA and WGMMA, for f16, bf16 and split f32 on Hopper.
    Sm90,
}

impl Assign {
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuGemm => "cpu_gemm",
            Self::CpuManhattan => "cpu_manhattan",
            Self::SimtDot => "assign_simt_dot",
            Self::SimtManhattan => "assign_simt_manhattan",
            Self::Narrow => "assign_narrow",
            Self::Sm80 => "assign_sm80",
            Self::Small => "assign_small",
            Self::Sm90 => "assign_sm90",
        }
    }

    /// Rows and centroids of a tile, for `d` columns.
    fn tile(self, d: usize) -> (usize, usize) {
        match self {
            Self::CpuGemm | Self::CpuManhattan => (tiles::CPU_ROWS, tiles::CPU_CENTROIDS),
            Self::SimtDot | Self::SimtManhattan => (tiles::SIMT_ROWS, tiles::SIMT_CENTROIDS),
            Self::Narrow => (tiles::NARROW_TILE, NARROW_GROUP),
            Self::Sm80 | Self::Small => (tiles::SM80_ROWS, tiles::SM80_CENTROIDS),
            Self::Sm90 => (tiles::SM90_ROWS * sm90_shape(d).1, tiles::SM90_CENTROIDS),
        }
    }

    /// Whether it reads rows in pieces of eight columns, which have to be aligned. (f32 rows are split on the way.)
    pub fn in_eights(self, dtype: DType) -> bool {
        dtype != DType::F32 && matches!(self, Self::Sm80 | Self::Small | Self::Sm90)
    }

    /// Whether rows pass through it as halves.
    fn splits(self, dtype: DType) -> bool {
        dtype == DType::F32 && matches!(self, Self::Sm80 | Self::Sm90)
    }

    /// Every kernel that can do this, the one that is chosen first.
    pub fn candidates(dtype: DType, metric: Metric, [k, d]: [usize; 2], arch: Arch) -> Vec<Self> {
        let Arch::Cuda { capability: arch, .. } = arch else {
            return vec![if metric == Metric::Manhattan { Self::CpuManhattan } else { Self::CpuGemm }];
        };
        let mut all = vec![];
        all.extend(narrow_shared(dtype, k, d).is_some().then_some(Self::Narrow));
        if metric == Metric::Manhattan {
            all.push(Self::SimtManhattan);
            return all;
        }
        if dtype != DType::F64 {
            all.extend((arch == 90 && d <= SM90_COLUMNS).then_some(Self::Sm90));
            all.extend((arch >= 80).then_some(Self::Sm80));
            all.extend((arch >= 80 && dtype != DType::F32).then_some(Self::Small));
        }
        all.push(Self::SimtDot);
        all
    }

    /// The kernel for `b` problems of `n` rows with `d` columns and `k` centroids: the first candidate, but for sizes
    /// where `bench tune` has found another one faster (benches/record).
    pub fn choose(dtype: DType, metric: Metric, [b, n, k, d]: [usize; 4], arch: Arch) -> Self {
        let mut candidates = Self::candidates(dtype, metric, [k, d], arch);
        // The copy engine's coordinates are 32-bit integers. (f32 rows come to it a piece at a time.)
        if k.max(b) > SM90_MOST || (n > SM90_MOST && dtype != DType::F32) {
            candidates.retain(|&c| c != Self::Sm90);
        }
        if let Some(name) = FORCED.get() {
            return candidates.iter().copied().find(|c| c.name() == name).unwrap_or(candidates[0]);
        }
        let products = b.saturating_mul(n).saturating_mul(k).saturating_mul(d);
        // Too little work to pay for the passes that prepare it: moving centroids, packing or splitting rows.
        let little = match dtype {
            DType::F32 if d < 128 => products <= 400_000_000,
            DType::F32 if d <= SM90_COLUMNS => products <= 40_000_000 && d < 400,
            DType::F32 => products > 1 << 30 && k <= 64,
            _ => products <= 5_000_000 && d < 64,
        };
        // Too little for two launches to be worth their while.
        let small = products <= 1 << 28 && k <= tiles::PREPARE_CENTROIDS;
        if candidates[0] == Self::Narrow {
            Self::Narrow
        } else if little && candidates.contains(&Self::SimtDot) {
            Self::SimtDot
        } else if small && candidates.contains(&Self::Small) {
            Self::Small
        } else {
            candidates[0]
        }
    }
}

/// How labels are sorted.
#[derive(Clone, Copy, Debug)]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SortWay {
    /// `order_whole`
    Whole,
    /// `order_deal`
    Deal,
    /// `order_deal_many`
    DealMany,
    /// `order_scatter`
    Scatter,
}

impl Sort {
    /// For `b` problems of `n` labels below `k`, in blocks of `shared` bytes of shared memory. `ascending`:
    /// whether it matters in what order the rows of a cluster are.
    pub fn new([b, n, k]: [usize; 3], ascending: bool, shared: usize) -> Self {
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

thread_local!(static FORCED: Cell<Option<&'static str>> = const { Cell::new(None) });

/// Makes this thread use the assignment kernel of that name wherever it can, and no kernel that does the work of several: for
/// tests and tuning.
pub fn force(kernel: Option<&'static str>) {
    FORCED.set(kernel);
}

/// Whether there is such a name.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn forced() -> bool {
    FORCED.get().is_some()
}

/// Centroids of a group of `assign_narrow.cu`.
const NARROW_GROUP: usize = 8;

/// The columns that an instance of `assign_narrow.cu` for `d` columns has.
pub(crate) fn narrow_columns(d: usize) -> usize {
    d.next_power_of_two()
}

/// The shared memory of a block of `assign_narrow.cu`; none if it is not for this problem.
pub(crate) fn narrow_shared(dtype: DType, k: usize, d: usize) -> Option<usize> {
    let size = if dtype == DType::F64 { 8 } else { 4 };
    // The largest norm, centroids and their biases in groups, mu, and the table that finds equal ones.
    let centroids = k.next_multiple_of(NARROW_GROUP).saturating_mul(narrow_columns(d).saturating_add(1));
    let table = 4 * (2 * k.min(usize::MAX / 16)).next_power_of_two();
    let bytes = centroids.saturating_add(narrow_columns(d)).saturating_mul(size).saturating_add(16 + table);
    (d <= tiles::NARROW_COLUMNS && bytes <= tiles::NARROW_SHARED).then_some(bytes)
}

/// The launch of `fit_narrow.cu`.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct FitNarrow {
    pub threads: usize,
    /// Shared memory of a block, and of that what its centroids take, which come first.
    pub shared: usize,
    pub centroids: usize,
}

impl FitNarrow {
    /// For `b` problems of `n` rows that fit in a block's shared memory, and of which there are enough, or which are small
    /// enough, not to be shared by several blocks.
    pub fn new(dtype: DType, metric: Metric, [b, n, k, d]: [usize; 4], arch: Arch) -> Option<Self> {
        let most = shared_memory(arch)?;
        let centroids = narrow_shared(dtype, k, d)?.next_multiple_of(16);
        let columns = narrow_columns(d);
        // Sums and weights, two limbs of each sum; rows; where clusters begin; labels and their order.
        let sums = 16 * k * (columns + 1) + 16 * k * columns;
        let rows = n.checked_mul(columns)?.checked_next_multiple_of(8)?.checked_mul(dtype.size_in_bytes())?;
        let shared = rows.checked_add(centroids + sums + 4 * (2 * k + 1))?.checked_add(4 * n)?;
        let worth_it = b >= tiles::FIT_PROBLEMS || n * k <= tiles::FIT_SMALL;
        let fits = metric != Metric::Manhattan && n <= 1 << 16 && shared <= most;
        // As many threads to a multiprocessor as its registers are for, in as many blocks as its shared memory is for.
        let threads = if columns == 4 { tiles::FIT_THREADS_4 } else { tiles::FIT_THREADS };
        let resident = if columns > 2 { threads } else { 2 * threads };
        let blocks = (most + STATIC_SHARED) / (shared + BLOCK_SHARED);
        let many = (resident / blocks.max(1) / 32 * 32).clamp(32, threads);
        let threads = if b < tiles::FIT_PROBLEMS { threads } else { many }.min(n.next_multiple_of(32));
        (fits && worth_it && !forced()).then_some(Self { threads, shared, centroids })
    }
}

/// The launch of `fit_resident.cu`.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct FitResident {
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
    /// For `b` problems of `n` rows that fit in the shared memory of blocks that run at once. `weighted`: whether terms have
    /// factors.
    pub fn new(dtype: DType, metric: Metric, weighted: bool, [b, n, k, d]: [usize; 4], arch: Arch) -> Option<Self> {
        let Arch::Cuda { capability, processors } = arch else { return None };
        let halves = capability >= 80 && matches!(dtype, DType::F16 | DType::BF16) && metric != Metric::Manhattan;
        let columns = d.is_multiple_of(8) && (16..=tiles::TEAM_COLUMNS).contains(&d);
        if !halves || !columns || k > tiles::TEAM_CENTROIDS || forced() {
            return None;
        }
        let most = shared_memory(arch)?;
        let (padded, line) = (k.next_multiple_of(32), d.div_ceil(64) * 128);
        // Rows, their squares, labels, order, factors, and the list of those to settle. Centroids with what they start from,
        // their scales, hashes and rows' places; mu; the sums of a share of the clusters.
        let of_row = line + 16 + if weighted { 8 } else { 0 };
        let fixed = |blocks: usize| padded * (line + 20) + 16 + line + k.div_ceil(blocks) * d * 8;
        let of = |blocks: usize| {
            let rows = n.div_ceil(blocks).next_multiple_of(32);
            let shared = rows.checked_mul(of_row)?.checked_add(fixed(blocks))?;
            let teams = b.min(processors / blocks);
            // Problems that have to wait for others are better off in kernels that take all at once.
            let soon = b.div_ceil(teams.max(1)) <= tiles::TEAM_TURNS;
            (rows <= tiles::SUM_ROWS && shared <= most && soon).then_some(Self { teams, blocks, rows, padded, shared })
        };
        // As many blocks as there are, if all problems run at once; the fewest that do, if not.
        let wide = (processors / b.max(1)).min(n.div_ceil(tiles::TEAM_ROWS)).max(1);
        of(wide).or_else(|| (wide..=processors).find_map(of))
    }
}

/// The shared memory that a block can ask for at its launch, in bytes: what the device gives it, less what kernels with
/// much of it have of their own.
pub(crate) fn shared_memory(arch: Arch) -> Option<usize> {
    let all = match arch {
        Arch::Cpu => return None,
        Arch::Cuda { capability: 80 | 87, .. } => 163 << 10,
        Arch::Cuda { capability: 90 | 100 | 103, .. } => 227 << 10,
        Arch::Cuda { .. } => 99 << 10,
    };
    Some(all - STATIC_SHARED)
}

/// Static shared memory of such kernels, at most, in bytes (`scripts/check-kernels.sh` holds them to it).
pub(crate) const STATIC_SHARED: usize = 4096;

/// What a block of `fit_narrow.cu` takes beside that, with what the device keeps for itself, in bytes.
const BLOCK_SHARED: usize = 1024;

/// Rows of `d` columns that are split into halves at a time.
pub(crate) fn split_rows(d: usize) -> usize {
    let wave = tiles::SPLIT_WAVE * 4 * d.next_multiple_of(32);
    (tiles::SPLIT_BYTES / wave).clamp(1, 8) * tiles::SPLIT_WAVE
}

/// Most rows, centroids or problems that `assign_sm90.cu` reaches: whole tiles below 2^31.
const SM90_MOST: usize = i32::MAX as usize - 4096;
/// Most columns that `assign_sm90.cu` is compiled for.
const SM90_COLUMNS: usize = 512;

/// The instance of `assign_sm90.cu` for `d` columns: steps of 16 columns, and warpgroups that search.
pub(crate) fn sm90_shape(d: usize) -> (usize, usize) {
    let steps = d.div_ceil(16);
    match steps {
        0..=8 => (steps.max(1), 3),
        9..=16 => (steps.next_multiple_of(2), 3),
        _ => (steps.next_multiple_of(4), 2),
    }
}

/// What it takes on a GPU to assign the rows of `b` problems to `k` centroids each, in bytes.
fn assign_scratch(p: &Problem, b: u64, k: u64, x: &Tensor, arch: Arch) -> u64 {
    let (bn, d) = (b * p.n as u64, p.d as u64);
    let (eights, halves) = (2 * p.d.next_multiple_of(8) as u64, 4 * p.d.next_multiple_of(32) as u64);
    let filter = if p.dtype == DType::F64 { 8 } else { 4 };
    let choose = |b: u64, k: u64| Assign::choose(p.dtype, p.metric, [b as usize, p.n, k as usize, p.d], arch);
    let assign = choose(b, k);
    // Moved centroids and the table of their hashes, halves of rows, and the list of rows left to recheck.
    let tensor = b * (k + tiles::TENSOR_CENTROIDS as u64) * (eights.max(halves) + 64);
    let split = (halves + 16) * bn.min(split_rows(p.d) as u64);
    let scratch = match (assign, assign.splits(p.dtype)) {
        (Assign::Sm80 | Assign::Sm90, true) => tensor + split,
        (Assign::Sm80 | Assign::Sm90, false) => tensor + 8 * bn,
        (Assign::Small, _) => tensor,
        (Assign::Narrow, _) => 0,
        _ => b * (k + 1) * (d + 1) * filter + 4 * bn,
    };
    // Rows that the fit itself does not need to have packed.
    let kept = choose(p.b as u64, p.k as u64).in_eights(p.dtype);
    let packed = if assign.in_eights(p.dtype) && !kept && !in_eights(x) { bn * eights } else { 0 };
    scratch + packed + b * (4 * d + 96)
}

/// The kernels, tiles and memory of a fit. Set `FLASH_KMEANS_PRINT_PLAN=1` to have each new plan printed once to stderr.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Plan {
    /// The assignment kernel.
    pub assign: &'static str,
    /// Rows of its tile.
    pub rows: usize,
    /// Centroids of its tile.
    pub centroids: usize,
    /// Whether the rows are first copied to where this kernel can read them.
    pub pack: bool,
    /// The update kernel.
    pub update: &'static str,
    /// Upper bound on the memory of a fit beyond its input, in bytes, on the input's device: results, accumulators, and the
    /// scratch of the kernels and of the initialisation. A layout that must be copied adds one copy of the input.
    pub bytes: u64,
}

impl Plan {
    pub(crate) fn new(p: &Problem, x: &Tensor, settings: &KMeans, arch: Arch) -> Self {
        let ragged = settings.lengths.is_some();
        let weighted = ragged || settings.weights.is_some();
        let cpu = arch == Arch::Cpu;
        let filter = if p.dtype == DType::F64 { 8 } else { 4 };
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        let sizes = [p.b, p.n, p.k, p.d];
        let assign = Assign::choose(p.dtype, p.metric, sizes, arch);
        let (rows, centroids) = assign.tile(p.d);
        let factors = weighted || p.metric == Metric::Cosine;
        let pack = assign.in_eights(p.dtype) && !in_eights(x);
        let watched = settings.on_iteration.is_some() || settings.empty == EmptyClusters::Relocate;
        let line = p.d == 1 && p.metric == Metric::SquaredEuclidean && p.dtype != DType::F64 && !watched;
        let update = match (cpu, p.metric) {
            (true, _) if line => "cpu_line",
            (true, Metric::Manhattan) => "cpu_medians",
            (true, _) => "cpu_sums",
            (false, Metric::Manhattan) => "medians",
            (false, _) if watched => "update",
            (false, _) if FitNarrow::new(p.dtype, p.metric, sizes, arch).is_some() => "fit_narrow",
            (false, _) if FitResident::new(p.dtype, p.metric, factors, sizes, arch).is_some() => "fit_resident",
            (false, _) => "update",
        };
        let (bn, size) = (b * n, p.dtype.size_in_bytes() as u64);
        let eights = 2 * p.d.next_multiple_of(8) as u64;
        // What a fit has from beginning to end: labels, centroids, weights and factors, rows in eights.
        // (With what weights were before they are in units; on a GPU, where it stays in the pool, with what seeds weigh by cosine.)
        let directed = if cpu { 8 * bn } else { 24 * bn };
        let weighed = if weighted { 8 * bn } else { 0 }
            + if p.metric == Metric::Cosine { directed } else { 0 }
            + if settings.weights.is_some() { 16 * bn } else { 0 };
        let packed = if pack { bn * eights } else { 0 };
        // Which rows count, as bytes and as numbers; and, once, what is found of each row.
        let ragged = if ragged { bn * if cpu { 112 } else { 48 } } else { 0 };
        let kept = 4 * bn + b * k * d * size + weighed + ragged + packed + 64 * b;
        // Then one after another. First the distances to what is chosen and their keys; the rows that k-means|| draws,
        // their prepared copy and its labels.
        // On a GPU also what assigns rows to those, and all that is held of each row meanwhile.
        let (drawn, begins) = match settings.init {
            Init::KMeansPlusPlus => (k, 16 * bn),
            Init::KMeansParallel => {
                let drawn = drawn(k).min(n);
                let joined = b * k * d * size;
                let rows = if cpu { 56 * n } else { 64 * n + joined + assign_scratch(p, 1, drawn, x, arch) };
                (drawn, rows + drawn * (d * (size + filter) + eights + 64))
            }
            Init::Random if settings.weights.is_some() && !cpu => (k, 16 * bn),
            _ => (k, 0),
        };
        // What rows weigh as seeds, and how that is found.
        let seeds = if p.metric == Metric::Cosine || !settings.check_finite { 32 * bn } else { 0 };
        let begins = begins + b * k * d * size + seeds;
        // The loop: what assigns.
        let (assigns, updates) = if cpu {
            let threads = rayon::current_num_threads() as u64 + 1;
            let rows = rows.min(p.n) as u64;
            let tile = rows * (filter * (2 * d + drawn.min(centroids as u64)) + 96 + 16 * drawn.min(64));
            // Clusters of one problem share its rows, and each problem at work may have them all in one cluster.
            let medians = if p.metric == Metric::Manhattan { 64 * n * threads.min(b) } else { 0 };
            let moves = if settings.empty == EmptyClusters::Relocate { 24 * bn + 8 * n } else { 0 };
            // The sums of a part, and those that no integer of its scale holds.
            let sums = threads * (128 + 1280) * d;
            (
                threads * tile + (b + threads.min(b)) * k * (filter * d + 64) + 64 * bn.div_ceil(rows),
                moves + medians + sums,
            )
        } else {
            (assign_scratch(p, b, k, x, arch), 0)
        };
        // And what updates: the order, its counts, and the sums of clusters that are under way.
        let shared = shared_memory(arch).unwrap_or(usize::MAX);
        let order = [false, true].map(|ascending| {
            let sort = Sort::new([p.b, p.n, p.k], ascending, shared);
            let counts = if cpu { b * k } else { b * sort.bins as u64 * (sort.chunks as u64 + 3) };
            4 * bn * sort.passes.min(2) as u64 + 8 * b * (k + 1) + 4 * counts
        });
        let order = order[0].max(order[1]);
        let medians = if p.metric == Metric::Manhattan { b * k * d * size } else { 0 };
        let sums = match update {
            _ if cpu => b * k * (8 + 24 * d),
            "fit_resident" => b * k * (32 * p.d.next_multiple_of(64) as u64 + 24),
            _ => b * k * (16 * (d + 1) + 16) + 4 * b,
        };
        // Rows in order and their prefix sums, of as many problems as there are threads, and all results. Values that are
        // not for this are fitted as others are.
        let lines = match update {
            "cpu_line" => {
                let threads = b.min(rayon::current_num_threads() as u64);
                4 * bn + b * (2 * k * size + 96) + threads * (if weighted { 64 } else { 44 } * n + 96 * k)
            }
            _ => 0,
        };
        let loops = (assigns.max(updates + order + medians) + sums).max(lines);
        // Last, the distances of the rows, and times their weights; which are infinite, and which are of rows that count.
        let ends = if weighted { 21 } else { 13 } * bn + if settings.check_finite { 0 } else { 32 * bn } + order;
        // Rows move by their distances while the loop's memory is held, and so do all later starts and results.
        let relocates = if !cpu && settings.empty == EmptyClusters::Relocate { ends } else { 0 };
        let result = 4 * bn + b * k * (d * size + 4) + 64 * b;
        let (loops, held) = (loops + relocates, if cpu { 0 } else { loops });
        let more = match settings.n_init {
            0..=1 => begins.max(ends).max(loops),
            // The best result and the last one, and of these the better of each problem.
            _ => (loops + result).max(held + (begins + result).max(ends + 2 * result).max(3 * result)),
        };
        let bytes = kept + more + if cpu { begins.min(assigns) } else { 0 } + 65536;
        Self { assign: assign.name(), rows, centroids, pack, update, bytes }
    }

    /// Prints the plan if asked for and not yet printed.
    pub(crate) fn announce(&self) {
        static SEEN: Mutex<Option<HashSet<Plan>>> = Mutex::new(None);
        if std::env::var_os("FLASH_KMEANS_PRINT_PLAN").is_some_and(|v| v == "1") {
            let mut seen = SEEN.lock().unwrap_or_else(|e| e.into_inner());
            if seen.get_or_insert_with(HashSet::new).insert(self.clone()) {
                eprintln!("flash-kmeans: {self}");
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { assign, rows, centroids, pack, update, bytes } = self;
        let packed = if *pack { " on packed rows" } else { "" };
        write!(
            f,
            "assign {assign}{packed} in tiles of {rows} x {centroids}, update {update}, at most {:.1} MiB",
            *bytes as f64 / 1048576.0
        )
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
                        let Sort { way, bins, threads, rows, chunks, .. } = Sort::new([b, n, k], ascending, shared);
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
                        let Some(FitResident { teams, blocks, rows, padded, shared }) = plan else { continue };
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
