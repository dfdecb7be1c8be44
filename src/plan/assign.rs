//! Which kernel assigns rows, and what memory that takes.

use super::arch::Arch;
use crate::{metric::Metric, problem::Problem, rows::RowLayout, tiles};
use candle_core::DType;
use std::cell::Cell;

/// The plan of an assignment of rows to the nearest of their centroids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct AssignPlan {
    pub kernel: Assign,
    /// Whether the rows are first copied to where this kernel can read them.
    pub pack: bool,
    /// Whether one launch prepares the centroids, a block to a problem, for kernels on tensor cores that do not split rows.
    pub prepare_all: bool,
}

impl AssignPlan {
    /// For `b` problems of `n` rows of that layout, with `d` columns, and `k` centroids each, of which there are so many `copies`:
    /// one that all problems share, or one a problem.
    pub fn new(dtype: DType, metric: Metric, sizes: [usize; 4], copies: usize, layout: RowLayout, arch: Arch) -> Self {
        let kernel = Assign::choose(dtype, metric, sizes, arch);
        let prepare_all = match arch {
            Arch::Cpu { .. } => false,
            Arch::Cuda { processors, .. } => sizes[2] <= tiles::PREPARE_CENTROIDS && copies <= processors,
        };
        Self { kernel, pack: kernel.in_eights(dtype) && !layout.is_aligned(8), prepare_all }
    }
}

/// An assignment kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Assign {
    CpuGemm,
    /// The same with a first pass on the matrix unit.
    CpuAmx,
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
    /// The same for more columns than stay on chip.
    WideSm90,
}

impl Assign {
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuGemm => "cpu_gemm",
            Self::CpuAmx => "cpu_amx",
            Self::CpuManhattan => "cpu_manhattan",
            Self::SimtDot => "assign_simt_dot",
            Self::SimtManhattan => "assign_simt_manhattan",
            Self::Narrow => "assign_narrow",
            Self::Sm80 => "assign_sm80",
            Self::Small => "assign_small",
            Self::Sm90 => "assign_sm90",
            Self::WideSm90 => "assign_wide",
        }
    }

    /// Rows and centroids of a tile, for `d` columns.
    pub(super) fn tile(self, d: usize) -> (usize, usize) {
        match self {
            Self::CpuGemm | Self::CpuAmx | Self::CpuManhattan => (tiles::CPU_ROWS, tiles::CPU_CENTROIDS),
            Self::SimtDot | Self::SimtManhattan => (tiles::SIMT_ROWS, tiles::SIMT_CENTROIDS),
            Self::Narrow => (tiles::NARROW_TILE, tiles::NARROW_GROUP),
            Self::Sm80 | Self::Small => (tiles::SM80_ROWS, tiles::SM80_CENTROIDS),
            Self::Sm90 => (tiles::SM90_ROWS * sm90_shape(d).1, tiles::SM90_CENTROIDS),
            Self::WideSm90 => (tiles::WIDE_ROWS, tiles::WIDE_CLUSTER * tiles::SM90_CENTROIDS),
        }
    }

    /// Whether it reads rows in pieces of eight columns, which have to be aligned. (f32 rows are split on the way.)
    pub fn in_eights(self, dtype: DType) -> bool {
        dtype != DType::F32 && matches!(self, Self::Sm80 | Self::Small | Self::Sm90 | Self::WideSm90)
    }

    /// Whether rows pass through it as halves.
    fn splits(self, dtype: DType) -> bool {
        dtype == DType::F32 && matches!(self, Self::Sm80 | Self::Sm90 | Self::WideSm90)
    }

    /// Every kernel that can do this, the one that is chosen first.
    pub fn candidates(dtype: DType, metric: Metric, [k, d]: [usize; 2], arch: Arch) -> Vec<Self> {
        let arch = match arch {
            Arch::Cpu { .. } if metric == Metric::Manhattan => return vec![Self::CpuManhattan],
            Arch::Cpu { amx: true } if dtype != DType::F64 => return vec![Self::CpuAmx, Self::CpuGemm],
            Arch::Cpu { .. } => return vec![Self::CpuGemm],
            Arch::Cuda { capability, .. } => capability,
        };
        let mut all = vec![];
        all.extend(narrow_shared(dtype, k, d).is_some().then_some(Self::Narrow));
        if metric == Metric::Manhattan {
            all.push(Self::SimtManhattan);
            return all;
        }
        if dtype != DType::F64 {
            all.extend((arch == 90).then_some(if d <= SM90_COLUMNS { Self::Sm90 } else { Self::WideSm90 }));
            all.extend((arch >= 80).then_some(Self::Sm80));
            all.extend((arch >= 80 && dtype != DType::F32).then_some(Self::Small));
        }
        all.push(Self::SimtDot);
        all
    }

    /// The kernel for `b` problems of `n` rows with `d` columns and `k` centroids: the first candidate, but for sizes
    /// where `bench tune` has found another one faster (benches/record).
    fn choose(dtype: DType, metric: Metric, [b, n, k, d]: [usize; 4], arch: Arch) -> Self {
        let mut candidates = Self::candidates(dtype, metric, [k, d], arch);
        // The copy engine's coordinates are 32-bit integers. (f32 rows come to it a piece at a time.)
        if k.max(b) > SM90_MOST || (n > SM90_MOST && dtype != DType::F32) {
            candidates.retain(|&c| !matches!(c, Self::Sm90 | Self::WideSm90));
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
        // Too few for tiles of the unit, most of which would be empty.
        let narrow = !by_unit(k, d);
        // Too little for two launches to be worth their while.
        let small = products <= 1 << 28 && k <= tiles::PREPARE_CENTROIDS;
        if candidates[0] == Self::Narrow {
            Self::Narrow
        } else if narrow && candidates.contains(&Self::CpuAmx) {
            Self::CpuGemm
        } else if little && candidates.contains(&Self::SimtDot) {
            Self::SimtDot
        } else if small && candidates.contains(&Self::Small) {
            Self::Small
        } else {
            candidates[0]
        }
    }
}

thread_local!(static FORCED: Cell<Option<&'static str>> = const { Cell::new(None) });

/// Makes this thread plan with the assignment kernel of that name wherever it can, and with no kernel that does the work of several:
/// for tests and tuning. A prepared fit keeps the plan that it was made with.
pub fn force(kernel: Option<&'static str>) {
    FORCED.set(kernel);
}

/// Whether an assignment kernel is forced.
pub(crate) fn forced() -> bool {
    FORCED.get().is_some()
}

/// The columns that an instance of `assign_narrow.cu` for `d` columns has.
pub(crate) fn narrow_columns(d: usize) -> usize {
    d.next_power_of_two()
}

/// The centroids that a block of it has room for: whole rounds, one, two or a multiple of four.
fn narrow_padded(k: usize) -> usize {
    let rounds = k.div_ceil(tiles::NARROW_ROUND);
    tiles::NARROW_ROUND.saturating_mul(if rounds > 2 {
        rounds.checked_next_multiple_of(4).unwrap_or(rounds)
    } else {
        rounds
    })
}

/// The shared memory of a block of `assign_narrow.cu`; none if it is not for this problem.
pub(crate) fn narrow_shared(dtype: DType, k: usize, d: usize) -> Option<usize> {
    let size = if dtype == DType::F64 { 8 } else { 4 };
    // The largest norm, centroids and their biases, mu, and the table that finds equal ones.
    let centroids = narrow_padded(k).saturating_mul(narrow_columns(d).saturating_add(1));
    let table = 4 * (2 * k.min(usize::MAX / 16)).next_power_of_two();
    let bytes = centroids.saturating_add(narrow_columns(d)).saturating_mul(size).saturating_add(16 + table);
    (d <= tiles::NARROW_COLUMNS && bytes <= tiles::NARROW_SHARED).then_some(bytes)
}

/// What a block of `assign_narrow.cu` or `fit_narrow.cu` takes beside that for centroids as tensor cores score them; none
/// where they do not, or if all would be more than `most`.
pub(crate) fn narrow_fragments(dtype: DType, metric: Metric, [k, d]: [usize; 2], others: usize, most: usize) -> usize {
    if dtype == DType::F64 || metric != Metric::SquaredEuclidean || d == 1 {
        return 0;
    }
    // 16 columns of halves, or twice as many, and scales.
    let bytes = 16 + narrow_padded(k) * if d > 4 { 64 } else { 32 };
    if others.saturating_add(bytes) <= most {
        bytes
    } else {
        0
    }
}

/// Rows of `d` columns that are split into halves at a time.
pub(crate) fn split_rows(d: usize) -> usize {
    let wave = tiles::SPLIT_WAVE * 4 * d.next_multiple_of(32);
    (tiles::SPLIT_BYTES / wave).clamp(1, 8) * tiles::SPLIT_WAVE
}

/// Most rows, centroids or problems that `assign_sm90.cu` reaches: whole tiles below 2^31.
const SM90_MOST: usize = i32::MAX as usize - 4096;
/// Fewer centroids, or columns, are scored without the matrix unit of a CPU.
const AMX_LEAST: [usize; 2] = [16, 32];

/// Whether so many centroids of so many columns are scored by the matrix unit of a CPU.
pub(crate) fn by_unit(k: usize, d: usize) -> bool {
    k >= AMX_LEAST[0] && d >= AMX_LEAST[1]
}

/// Most columns that `assign_sm90.cu` is compiled for.
pub(crate) const SM90_COLUMNS: usize = 512;

/// The instance of `assign_sm90.cu` for `d` columns: steps of 16 columns, and warpgroups that search.
pub(crate) fn sm90_shape(d: usize) -> (usize, usize) {
    let steps = d.div_ceil(16);
    match steps {
        0..=8 => (steps.max(1), 3),
        9..=16 => (steps.next_multiple_of(2), 3),
        _ => (steps.next_multiple_of(4), 2),
    }
}

/// The bytes of a thread's scratch where rows of problems of `n` are assigned on the CPU, to `k` centroids each.
pub(super) fn cpu_tile_bytes(kernel: Assign, dtype: DType, [n, k, d]: [u64; 3]) -> u64 {
    let (rows, centroids) = kernel.tile(d as usize);
    let (rows, filter) = ((rows as u64).min(n), if dtype == DType::F64 { 8 } else { 4 });
    let candidates = 96 + 16 * k.min(64);
    let full = rows * (filter * (2 * d + k.min(centroids as u64)) + candidates);
    match kernel {
        // In full, at worst, and beside it a pair of the unit's tiles.
        Assign::CpuAmx => {
            let pair = tiles::AMX_ROWS as u64;
            full + pair * (4 * d + amx_row_bytes(d) + 2 * candidates + 4 * tiles::AMX_CENTROIDS as u64)
        }
        _ => full,
    }
}

/// The bytes of `k` centroids that are ready to be scored on the CPU.
pub(super) fn cpu_centroid_bytes(kernel: Assign, dtype: DType, [k, d]: [u64; 2]) -> u64 {
    let full = k * (if dtype == DType::F64 { 8 } else { 4 } * d + 72);
    match kernel {
        // Blocks end with whole tiles, and there are few levels of norms.
        Assign::CpuAmx => full + (k + tiles::AMX_ROWS as u64 * k.min(64)) * (amx_row_bytes(d) + 8),
        _ => full,
    }
}

/// A row, or a centroid, as bf16 in tiles of 32 columns.
fn amx_row_bytes(d: u64) -> u64 {
    2 * d.next_multiple_of(32)
}

/// The bytes that it takes on a GPU to assign the rows of `b` problems, which lie so, to `k` centroids each.
pub(super) fn assign_scratch(p: &Problem, b: u64, k: u64, layout: RowLayout, arch: Arch) -> u64 {
    let (bn, d) = (b * p.n as u64, p.d as u64);
    let (eights, halves) = (2 * p.d.next_multiple_of(8) as u64, 4 * p.d.next_multiple_of(32) as u64);
    let filter = if p.dtype == DType::F64 { 8 } else { 4 };
    let sizes = [b as usize, p.n, k as usize, p.d];
    let AssignPlan { kernel: assign, pack, .. } = AssignPlan::new(p.dtype, p.metric, sizes, p.b, layout, arch);
    // Moved centroids and the table of their hashes, halves of rows, and the list of rows left to recheck.
    let tensor = b * (k + tiles::TENSOR_CENTROIDS as u64) * (eights.max(halves) + 72);
    // With the rows that a second pass lists once more, and the counters of all parts.
    let split = (halves + 28) * bn.min(split_rows(p.d) as u64) + 16 * b * (p.n as u64).div_ceil(split_rows(p.d) as u64);
    let scratch = match (assign, assign.splits(p.dtype)) {
        (Assign::Sm80 | Assign::Sm90 | Assign::WideSm90, true) => tensor + split,
        (Assign::Sm80 | Assign::Sm90 | Assign::WideSm90, false) => tensor + 8 * bn,
        (Assign::Small, _) => tensor,
        (Assign::Narrow, _) => 0,
        _ => b * (k + 1) * (d + 1) * filter + 4 * bn,
    };
    let packed = if pack { bn * eights } else { 0 };
    scratch + packed + b * (4 * d + 96)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_on_hopper_is_compiled() {
        let source = include_str!("../../kernels/assign/assign_sm90.cu");
        let calls = source.split("#define KERNELS").nth(1).unwrap().split("KERNEL(name, T, ").skip(1);
        let compiled: Vec<_> = calls.map(|call| call.split(')').next().unwrap()).collect();
        let mut asked: Vec<_> = (1..=SM90_COLUMNS).map(sm90_shape).collect();
        asked.dedup();
        let asked: Vec<_> = asked.iter().map(|(steps, groups)| format!("{steps}, {groups}")).collect();
        assert_eq!(compiled, asked);
    }
}
