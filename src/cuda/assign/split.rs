//! Labels of f32 rows on tensor cores, by way of halves: `kernels/assign/split.cu`.

use super::tensor_core::{sm90_name, sweep_shared, wide_blocks, Table, RECHECK_SHARED};
use crate::{
    cuda::device::processors,
    cuda::kernel::{launch, warps, WARP},
    cuda::memory::{elements, ArenaLayout, Memory},
    cuda::params::{one_copy, shape, Active, Bounds, Gate, Reach, UnprovenRow},
    cuda::tensors::{read, DevicePtr, TensorMap},
    error::Result,
    metric::Metric,
    plan::assign::{sm90_shape, split_rows, Assign},
    request::Assignment,
    rows::Rows,
    tiles::{SM80_ROWS, SM90_CENTROIDS, SM90_ROWS, SM90_SHARED, TENSOR_CENTROIDS, THREADS, WIDE_ROWS, WIDE_THREADS},
};
use candle_core::cuda_backend::{
    cudarc::driver::{sys::CUtensorMapDataType, PushKernelArg},
    CudaDevice,
};

/// f32 rows by way of halves: `kernels/assign/split.cu`. Rows are split a rectangle at a time, part of one problem or whole
/// problems, so that the halves take no more memory than [`SPLIT_BYTES`] and stay in L2 for the most part.
pub(super) fn assign(dev: &CudaDevice, a: Assignment<'_>, labels: DevicePtr<u32>, memory: &Memory) -> Result<()> {
    let Assignment { plan, x, c, metric, turn, .. } = a;
    let active = Active::of(turn)?;
    let (xs, cs) = (read(&x.operand), read(&c.operand));
    let (xs, cs) = (xs.view::<f32>()?, cs.view::<f32>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);
    let (pitch, padded) = (d.next_multiple_of(32), k.next_multiple_of(TENSOR_CENTROIDS));
    let both = 2 * pitch;
    let most = split_rows(d).min(elements(&[x.b, x.n]));
    // A part of a problem is a rectangle that is known here: which problem it is of cannot come from a list.
    let whole = x.n <= most;
    let active = if whole { active } else { active.whole() };

    let mut layout = ArenaLayout::default();
    let mu = layout.zeroed::<f32>(elements(&[copies, d]));
    let largest = layout.zeroed::<f32>(copies);
    // For one half alone, then for both.
    let bounds = layout.zeroed::<Bounds>(elements(&[2, copies]));
    let counters = elements(&[x.b, x.n.div_ceil(most)]);
    let listed = layout.zeroed::<u32>(counters);
    // Where a second pass comes between, it lists rows once more, and decides whether the first one is worth its while.
    let second = plan.kernel == Assign::Sm90 && d <= SPLIT_COLUMNS;
    let left_count = layout.zeroed::<u32>(if second { counters } else { 0 });
    let gates = layout.unwritten::<u32>(if second { counters + 1 } else { 0 });
    let table = Table::new(&mut layout, copies, k, true);
    let list = layout.unwritten::<UnprovenRow>(most);
    let left = layout.unwritten::<UnprovenRow>(if second { most } else { 0 });
    let moved = layout.unwritten::<half::f16>(elements(&[copies, k, both]));
    let starts = [(); 2].map(|_| layout.unwritten::<f32>(elements(&[copies, padded])));
    let halves = layout.unwritten::<half::f16>(elements(&[most, both]));
    let slacks = [(); 2].map(|_| layout.unwritten::<f32>(most));
    let reaches = layout.unwritten::<Reach>(copies);
    let w = layout.scratch(dev, "labels", memory)?;
    let (mu, largest, moved, bounds) = (w.ptr(mu), w.ptr(largest), w.ptr(moved), w.ptr(bounds));
    let [start, search_start] = starts.map(|place| w.ptr(place));
    let (mut listed, list, halves) = (w.ptr(listed), w.ptr(list), w.ptr(halves));
    let (mut left_count, left, mut gate) = (w.ptr(left_count), w.ptr(left), w.ptr(gates));
    let [slack, slack_split] = slacks.map(|s| w.ptr(s));

    let (metric_id, none, reaches) = (metric as i32, DevicePtr::<f32>::NULL, w.ptr(reaches));
    let (k64, pitch64, both64, padded64, copies64) =
        (k as i64, pitch as i64, both as i64, padded as i64, copies as i64);
    if metric == Metric::SquaredEuclidean {
        launch!(dev, Prepare, "prepare_means", "f32", elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            &cs, &shape(&one), &active, &mu)?;
        launch!(dev, Split, "split_reach", "f32", copies, 2 * THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &mu, &largest, &reaches)?;
    } else {
        launch!(dev, Split, "split_largest", "f32", warps(elements(&[copies, k])), THREADS;
            &cs, &shape(&one), &active, &metric_id, &mu, &largest)?;
    }
    launch!(dev, Split, "split_centroids", "f32", warps(elements(&[copies, padded])), THREADS;
        &cs, &shape(&one), &active, &metric_id, &mu, &largest, &reaches, &pitch64, &padded64, &moved, &start, &bounds,
        &w.ptr(table.keys), &w.ptr(table.first), &(table.slots as i64), &w.ptr(table.slot))?;
    table.settle_starts(dev, &w, (&cs, &one), active, bounds, [start, search_start])?;

    let processors = processors(dev)?;
    let mut first = 0;
    while first < x.b * x.n {
        let (b, row) = (first / x.n, first % x.n);
        let (problems, rows) = if whole { ((most / x.n).min(x.b - b), x.n) } else { (1, most.min(x.n - row)) };
        let copy = if copies > 1 { b } else { 0 };
        let count = problems * rows;
        let lanes = (pitch / 8).next_power_of_two().clamp(4, WARP);
        launch!(dev, Split, "split_rows", "f32", warps(count.div_ceil(WARP / lanes)).min(16 * processors), THREADS;
            &xs, &shape(x), &active, &(first as i64), &(count as i64), &metric_id, &mu, &largest, &bounds, &copies64, &pitch64,
            &halves, &slack, &slack_split)?;

        let part = Rows { b: problems, n: rows, ..x.clone() };
        let split = Rows { b: problems, n: rows, batch_stride: rows * both, row_stride: both, ..x.clone() };
        let moved = moved.from(copy * k * both);
        let [start, search_start] = [start, search_start].map(|all| all.from(copy * padded));
        let (high, low) = (bounds.from(copy), bounds.from(copies + copy));
        // By a list, problems are found from the first one on.
        let (from, skip) = if active.list.is_null() { (b, 0) } else { (0, b) };
        let (active, labels) = (active.after(skip), labels.from(from * x.n + row));
        let passes_over = second && first > 0;
        let gated = if passes_over { Active { count: gate, ..active } } else { active };
        let half = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        let own = if copies > 1 { problems } else { 1 };
        if plan.kernel == Assign::Sm90 {
            let (steps, groups) = sm90_shape(d);
            let row_map = TensorMap::new(half, halves.address, [problems, rows, d], [rows * both, both], SM90_ROWS)?;
            let map = TensorMap::new(half, moved.address, [own, k, d], [k * both, both], SM90_CENTROIDS)?;
            let tiles = elements(&[problems, rows.div_ceil(SM90_ROWS * groups)]).min(processors);
            launch!(dev, AssignSm90, sm90_name(steps), "f16", tiles, 128 * (groups + 1), SM90_SHARED;
                &row_map, &map, &shape(&split), &gated, &search_start, &none, &none, &high, &k64, &padded64, &copies64, &slack,
                &labels, &list, &listed)?;
        } else if plan.kernel == Assign::WideSm90 {
            let row_map = TensorMap::new(half, halves.address, [problems, rows, d], [rows * both, both], WIDE_ROWS)?;
            let map = TensorMap::new(half, moved.address, [own, k, d], [k * both, both], SM90_CENTROIDS)?;
            let blocks = wide_blocks([problems, rows], processors);
            launch!(dev, AssignWideSm90, "assign_wide", "f16", blocks, WIDE_THREADS, SM90_SHARED;
                &row_map, &map, &shape(&split), &active, &search_start, &none, &none, &high, &k64, &padded64, &copies64, &slack,
                &labels, &list, &listed)?;
        } else {
            let tiles = elements(&[problems, rows.div_ceil(SM80_ROWS)]);
            launch!(dev, AssignSm80, "assign_sm80", "f16", tiles, SM80_ROWS, sweep_shared(d);
                &halves, &shape(&split), &active, &moved, &search_start, &none, &none, &high, &k64, &both64, &padded64, &copies64,
                &labels, &list, &listed, &slack)?;
        }
        let (mut unproven, mut unproven_count, mut first_error) = (list, listed, (slack, copies64));
        if second {
            let maps = [0, pitch]
                .map(|at| TensorMap::new(half, moved.from(at).address, [own, k, d], [k * both, both], SM90_CENTROIDS));
            let [high_map, low_map] = maps;
            let part_gate = Gate { count: if passes_over { gate } else { DevicePtr::NULL }, next: gate.from(1) };
            let blocks = elements(&[problems, rows.div_ceil(2 * SM90_ROWS)]).min(processors);
            launch!(dev, AssignSplitSm90, split_name(d), "f32", blocks, 3 * 128, SM90_SHARED;
                &high_map?, &low_map?, &halves, &shape(&split), &active, &part_gate, &search_start, &low, &k64, &pitch64,
                &padded64, &copies64, &slack_split, &labels, &list, &listed, &left, &left_count)?;
            (unproven, unproven_count, first_error) = (left, left_count, (slack_split, 0));
            (left_count, gate) = (left_count.from(problems), gate.from(1));
        }
        let (first_slack, first_copies) = first_error;
        let originals = xs.slice(from * x.batch_stride + row * x.row_stride..);
        let centroids = cs.slice(from * c.batch_stride..);
        let shared = sweep_shared(2 * d) + RECHECK_SHARED;
        launch!(dev, Recheck, "recheck_split", "f32", 2 * processors, SM80_ROWS, shared;
            &halves, &originals, &shape(&part), &active, &centroids, &shape(c), &moved, &start, &low, &k64, &both64, &padded64,
            &copies64, &metric_id, &labels, &unproven, &unproven_count, &slack_split, &first_slack, &first_copies)?;
        (first, listed) = (first + count, listed.from(problems));
    }
    Ok(())
}

/// Most columns that the second pass of `assign_split_sm90.cu` is compiled for.
const SPLIT_COLUMNS: usize = 128;

/// Its instance for `d` columns.
fn split_name(d: usize) -> &'static str {
    const NAMES: [&str; SPLIT_COLUMNS / 16] = [
        "search_split_1",
        "search_split_2",
        "search_split_3",
        "search_split_4",
        "search_split_5",
        "search_split_6",
        "search_split_7",
        "search_split_8",
    ];
    NAMES[(d - 1) / 16]
}
