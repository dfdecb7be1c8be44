//! What a fit will run, decided from the problem alone, and printable.

pub(crate) mod arch;
pub(crate) mod assign;
pub(crate) mod on_chip;
pub(crate) mod sort;

use crate::{
    kmeans::{drawn, EmptyClusters, Init, KMeans},
    metric::Metric,
    problem::Problem,
    rows::in_eights,
};
use arch::{shared_memory, Arch};
use assign::{assign_scratch, Assign};
use candle_core::{DType, Tensor};
use on_chip::{FitNarrow, FitResident};
use sort::Sort;
use std::{collections::HashSet, fmt, sync::Mutex};

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
