//! The memory that a fit takes.

use super::{
    arch::Arch,
    assign::{assign_scratch, cpu_centroid_bytes, cpu_tile_bytes, AssignPlan},
    on_chip::OnChip,
    sort::Sort,
    Steps,
};
use crate::{
    fixed::Grid,
    kmeans::{drawn, drawn_in, EmptyClusters, Init, KMeans},
    metric::Metric,
    problem::Problem,
    rows::RowLayout,
    spread::{draws, greedy_draws, rounded_width, trials, worth_rounding, SAMPLED},
    tiles::{AMX_ROWS, CPU_ROWS},
};
use candle_core::DType;

/// An upper bound on the memory of a fit beyond its input, in bytes.
pub(super) fn bytes(p: &Problem, steps: &Steps, pack: bool, settings: &KMeans, arch: Arch) -> u64 {
    let ragged = settings.lengths.is_some();
    let weighted = ragged || settings.weights.is_some();
    let cpu = arch.is_cpu();
    let filter = if p.dtype == DType::F64 { 8 } else { 4 };
    let (b, n, k, d) = (p.b as u64, p.n as u64, p.k as u64, p.d as u64);
    let (bn, size) = (b * n, p.dtype.size_in_bytes() as u64);
    let eights = 2 * p.d.next_multiple_of(8) as u64;
    // A fit has from beginning to end: labels, centroids, weights and factors, rows in eights.
    // (With what weights were before they are in units; on a GPU, where it stays in the pool, with what seeds weigh by cosine.)
    let directed = if cpu { 8 * bn } else { 24 * bn };
    let weighed = if weighted { 8 * bn } else { 0 }
        + if p.metric == Metric::Cosine { directed } else { 0 }
        + if settings.weights.is_some() { 16 * bn } else { 0 };
    let packed = if pack { bn * eights } else { 0 };
    // Which rows count, as bytes and as numbers; and, once, what is found of each row.
    let ragged = if ragged { bn * if cpu { 112 } else { 48 } } else { 0 };
    let kept = 4 * bn + b * k * d * size + weighed + ragged + packed + steps.skip.bytes(p) + 64 * b;
    let kernel_for =
        |k: u64| AssignPlan::new(p.dtype, p.metric, [p.b, p.n, k as usize, p.d], p.b, steps.layout, arch).kernel;
    // Then one after another. First the distances to what is chosen and their keys; the rows that k-means|| draws,
    // their prepared copy and its labels.
    // On a GPU also what assigns rows to those, and all that is held of each row meanwhile.
    // Of each row its norm, its distance, its arrival and where it is listed; the rows that are drawn, each with its values, which parts have
    // drawn it, and how far it is from the others; and what each thread adds up in.
    let raced = |n: u64, listed: u64, draws: u64| {
        let bn = b * n;
        let scratch =
            if cpu { (rayon::current_num_threads() as u64 + 1) * (d * filter + 32 * filter * draws) } else { 0 };
        (32 + listed + draws / 64) * bn + b * (draws * (d * filter + 128 + 8 * draws) + 256) + scratch
    };
    // Rows as a matrix unit takes them, what is known of each, their tasks, and the seeds of a pass; and of each thread a few rows, which it finds
    // the median of or rounds, and scores.
    let rounded = |n: u64, passes: usize, draws: u64| match arch {
        Arch::Cpu { amx: true } if worth_rounding(p.metric, p.d, passes) => {
            let (tile, padded) = (AMX_ROWS as u64, d.next_multiple_of(32));
            let seeds = draws.next_multiple_of(tile);
            let scratch = (rayon::current_num_threads() as u64 + 1) * (40 * filter * padded + 4 * tile * (seeds + 2));
            b * (n.div_ceil(tile) * (tile + 1) * 2 * padded + 24 * n + seeds * (2 * padded + 4) + filter * padded)
                + scratch
        }
        Arch::Cuda { .. } if p.dtype != DType::F64 && worth_rounding(p.metric, p.d, passes) => {
            (2 * rounded_width(p.d) as u64 + 8) * b * n + 4 * b * d
        }
        _ => 0,
    };
    let (drawn, begins) = match settings.init {
        Init::KMeansPlusPlus => {
            let draws = draws(p.k);
            (k, raced(n, 0, draws as u64) + rounded(n, p.k.div_ceil(draws), draws as u64))
        }
        Init::Auto | Init::GreedyKMeansPlusPlus => {
            let sampled = matches!(settings.init, Init::Auto) && settings.lengths.is_none() && p.n > SAMPLED;
            let n = if sampled { SAMPLED as u64 } else { n };
            // The sample, where it lies, and its weights.
            let sample = if sampled { b * n * (d * size + eights + 24) } else { 0 };
            let trials = trials(p.k);
            let draws = greedy_draws(p.d, trials);
            // A list has room for all rows on a GPU; on a CPU it grows, by copies to twice its length.
            let candidates = (draws + trials - 1) as u64;
            let listed = if cpu { 40 * draws as u64 } else { 12 * candidates + 8 };
            (k, sample + raced(n, listed, candidates) + rounded(n, p.k.div_ceil(draws / trials), candidates))
        }
        Init::KMeansParallel => {
            let drawn = drawn(k).min(n);
            let joined = b * k * d * size;
            let rows = if cpu { 56 * n } else { 64 * n + joined + assign_scratch(p, 1, drawn, steps.layout, arch) };
            let prepared = if cpu {
                cpu_centroid_bytes(kernel_for(drawn), p.dtype, [drawn, d])
            } else {
                drawn * (d * filter + 64)
            };
            (drawn, rows + drawn * (d * size + eights) + prepared)
        }
        Init::Random if settings.weights.is_some() && !cpu => (k, 16 * bn),
        // Values and where clusters may begin, of the problems at work.
        Init::Optimal if cpu => (k, 32 * bn + (128 + 4 * k) * n * (rayon::current_num_threads() as u64 + 1).min(b)),
        Init::Optimal => (k, (4 + size) * bn),
        _ => (k, 0),
    };
    // The weights of rows as seeds, and the memory that finds them.
    let seeds = if p.metric == Metric::Cosine || !settings.check_finite { 32 * bn } else { 0 };
    let begins = begins + b * k * d * size + seeds;
    // The variance that `tol` is a share of: which cluster rows are in, their distances and which count, and sums in two planes.
    let variance = match settings.tol > 0.0 && p.metric != Metric::Cosine {
        true => 12 * bn + if weighted { 16 * bn } else { 0 } + seeds + b * (32 * (d + 1) + 8 * d + 512),
        false => 0,
    };
    let begins = begins.max(variance);
    // The loop: what assigns.
    let (assigns, updates) = if cpu {
        let threads = rayon::current_num_threads() as u64 + 1;
        let tile = cpu_tile_bytes(kernel_for(drawn), p.dtype, [n, drawn, d]);
        let prepared = cpu_centroid_bytes(steps.assign.kernel, p.dtype, [k, d]);
        // Clusters of one problem share its rows, and each problem at work may have them all in one cluster.
        let medians = if p.metric == Metric::Manhattan { 64 * n * threads.min(b) } else { 0 };
        let moves = if settings.empty == EmptyClusters::Relocate { 24 * bn + 8 * n } else { 0 };
        // The sums of a part, and those that no integer of its scale holds.
        let sums = threads * (128 + 1280) * d;
        (
            threads * tile + (b + threads.min(b)) * prepared + 64 * bn.div_ceil(n.min(CPU_ROWS as u64)),
            moves + medians + sums,
        )
    } else {
        (assign_scratch(p, b, k, steps.layout, arch), 0)
    };
    // And what updates: the order, its counts, and the sums of clusters that are under way.
    let order = [steps.update.sort, Sort::new([p.b, p.n, p.k], true, arch)].map(|sort| {
        let counts = if cpu { b * k } else { b * sort.bins as u64 * (sort.chunks as u64 + 3) };
        4 * bn * sort.passes.min(2) as u64 + 8 * b * (k + 1) + 4 * counts
    });
    let order = order[0].max(order[1]);
    let medians = if p.metric == Metric::Manhattan { b * k * d * size } else { 0 };
    let sums = match steps.on_chip {
        _ if cpu => b * k * (8 + 24 * d),
        Some(OnChip::Resident(_)) => b * k * (32 * p.d.next_multiple_of(64) as u64 + 24),
        _ => b * k * (16 * (d + 1) + 16) + 4 * b,
    };
    // Rows in order and their prefix sums, of as many problems as there are threads, and all results. Values that are
    // not for this are fitted as others are.
    let lines = match steps.on_chip {
        Some(OnChip::CpuLine) => {
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
    // What an iteration is measured by: its distances, and the centroids before.
    let measures =
        if settings.measures && settings.on_iteration.is_some() { ends + b * k * (d * size + 24) } else { 0 };
    let (loops, held) = (loops + relocates + measures, if cpu { 0 } else { loops });
    let more = match settings.n_init {
        0..=1 => begins.max(ends).max(loops),
        // The best result and the last one, and of these the better of each problem.
        _ => (loops + result).max(held + (begins + result).max(ends + 2 * result).max(3 * result)),
    };
    kept + more + if cpu { begins.min(assigns) } else { 0 } + 65536
}

/// An upper bound on the memory, in bytes, that k-means|| takes on the device of rows in blocks beside these, of which it looks at `piece`
/// rows at a time, which lie as `layout` says. For the CPU it has what the host has, too.
pub(crate) fn parallel_start_bytes(p: &Problem, piece: u64, layout: RowLayout, settings: &KMeans, arch: Arch) -> u64 {
    let cpu = arch.is_cpu();
    let (n, k, d, size) = (p.n as u64, p.k as u64, p.d as u64, p.dtype.size_in_bytes() as u64);
    let filter = if p.dtype == DType::F64 { 8 } else { 4 };
    let (drawn, round) = (drawn(k).min(n), drawn_in(1, k).min(n));
    // Weights as seeds, distances to the candidates of a round and to all before, and what is made of them on the way.
    let seeds = if p.metric == Metric::Cosine || !settings.check_finite { 32 } else { 0 };
    let of_piece = piece * (if cpu { 56 } else { 72 } + seeds);
    // Candidates, at last side by side as well; what compares rows with them; and the sums of the weights that each of them has.
    let planes = if settings.weights.is_some() { Grid::down_to(-1074, 1.0, p.n).planes as u64 } else { 2 };
    let of_candidate = 2 * d * size + 2 * d.next_multiple_of(8) + 128 + 32 * planes;
    // The rows of a round as numbers that ranks exchange, on the host but for one copy.
    let of_drawn = if cpu { 80 * d + 256 } else { 8 * d };
    let scratch = if cpu {
        let threads = rayon::current_num_threads() as u64 + 1;
        let sizes = [1, piece as usize, drawn as usize, p.d];
        let AssignPlan { kernel, .. } = AssignPlan::new(p.dtype, p.metric, sizes, 1, layout, arch);
        let tile = cpu_tile_bytes(kernel, p.dtype, [u64::MAX, drawn, d]);
        threads * tile + cpu_centroid_bytes(kernel, p.dtype, [drawn, d])
    } else {
        drawn * d * filter + assign_scratch(&Problem { n: piece as usize, ..p.clone() }, 1, drawn, layout, arch)
    };
    of_piece + drawn * of_candidate + round * of_drawn + k * d * size + scratch + 65536
}
