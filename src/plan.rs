//! What a fit will run, decided from the problem alone, and printable.

use crate::{
    init::{self, Init},
    problem::Problem,
    tiles, Metric,
};
use candle_core::{DType, Device};
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
    /// The update kernel.
    pub update: &'static str,
    /// Upper bound on the memory of a fit beyond its input, in bytes, on the input's device: results, both label arrays,
    /// the order, the accumulators, and the scratch of the kernels and of the initialisation. A layout that must be
    /// copied adds one copy of the input.
    pub bytes: u64,
}

impl Plan {
    pub(crate) fn new(p: &Problem, init: &Init, device: &Device, weighted: bool) -> Self {
        let cpu = device.is_cpu();
        let filter = if p.dtype == DType::F64 { 8 } else { 4 };
        let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
        let (rows, centroids) = match cpu {
            true => (tiles::CPU_ROWS, tiles::CPU_CENTROIDS),
            false => (tiles::SIMT_ROWS, tiles::SIMT_CENTROIDS),
        };
        let assign = match (cpu, p.metric) {
            (true, Metric::Manhattan) => "cpu_manhattan",
            (true, _) => "cpu_gemm",
            (false, Metric::Manhattan) => "assign_simt_manhattan",
            (false, _) => "assign_simt_dot",
        };
        let update = match (cpu, p.metric) {
            (true, Metric::Manhattan) => "cpu_medians",
            (true, _) => "cpu_sums",
            (false, Metric::Manhattan) => "medians",
            (false, _) => "sums",
        };
        let labels = 2 * 4 * b * n;
        let order = 4 * b * n + 4 * b * (k + 1);
        let centroid = b * k * d;
        // Old, new and initial centroids; fixed-point sums and totals; the prepared copy that is scored.
        let accumulators = centroid * (3 * p.dtype.size_in_bytes() as u64 + 16 + 8 + filter) + b * k * 64;
        // Distances of the final rows and their weighted copy.
        let last = 2 * 8 * b * n;
        let weights = if weighted { 8 * b * n } else { 0 } + if p.metric == Metric::Cosine { 16 * b * n } else { 0 };
        // Distances to what is chosen and their keys; the rows that k-means|| draws, their prepared copy and its labels.
        let (drawn, initial) = match init {
            Init::KMeansPlusPlus => (k, 16 * b * n),
            Init::KMeansParallel => {
                let drawn = init::drawn(k).min(n);
                (drawn, 24 * b * n + drawn * (d * (p.dtype.size_in_bytes() as u64 + filter) + 64))
            }
            _ => (k, 0),
        };
        let scratch = if cpu {
            let threads = rayon::current_num_threads() as u64 + 1;
            let tile = rows.min(p.n) as u64 * (filter * (d + drawn.min(centroids as u64)) + 64);
            let candidates = rows.min(p.n) as u64 * 16 * drawn.min(64);
            // Clusters of one problem share its rows, and each problem at work may have them all in one cluster.
            let medians = if p.metric == Metric::Manhattan { 32 * n * threads.min(b) } else { 0 };
            threads * (tile + candidates + 64 * d) + medians + b * n.div_ceil(rows as u64) * 64
        } else {
            // The list of rows to recheck, and the counts of the sort.
            let counts = k * n.div_ceil(k.max(tiles::SORT_ROWS as u64));
            b * (filter * d + 4 * n + 32 + 4 * (counts + counts.div_ceil(tiles::SCAN_SPAN as u64)))
        };
        Self {
            assign,
            rows,
            centroids,
            update,
            bytes: labels + order + accumulators + last + weights + initial + scratch + 65536,
        }
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
        let Self { assign, rows, centroids, update, bytes } = self;
        write!(
            f,
            "assign {assign} in tiles of {rows} x {centroids}, update {update}, at most {:.1} MiB",
            *bytes as f64 / 1048576.0
        )
    }
}
