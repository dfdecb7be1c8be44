//! Labels of halves on tensor cores: `kernels/assign/assign_sm80.cu`, `kernels/assign/assign_sm90.cu` and `kernels/assign/recheck.cu`.

use super::near::{Near, Scored};
use crate::{
    cuda::device::{device, processors},
    cuda::kernel::launch,
    cuda::memory::{alloc, elements, Arena, ArenaLayout, Memory, Slot},
    cuda::params::{one_copy, shape, Active, Bounds, Reach, UnprovenRow},
    cuda::tensors::{read, tensor, typed, DevicePtr, Element, TensorMap},
    error::Result,
    metric::Metric,
    plan::assign::{sm90_shape, Assign, AssignPlan, SM90_COLUMNS},
    request::Assignment,
    rows::Rows,
    tiles::{
        MOVE_LANES, ORIGIN_COLUMNS, ORIGIN_THREADS, RECHECK_BYTES, RECHECK_QUEUE, SM80_CENTROIDS, SM80_COLUMNS,
        SM80_ROWS, SM80_STAGES, SM90_CENTROIDS, SM90_ROWS, SM90_SHARED, TENSOR_CENTROIDS, THREADS, WIDE_CLUSTER,
        WIDE_ROWS, WIDE_THREADS,
    },
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{sys::CUtensorMapDataType, CudaView, DevicePtr as _, PushKernelArg},
        CudaDevice,
    },
    Tensor,
};
use std::sync::LazyLock;

/// The table of hashes that finds repeated centroids (`kernels/assign/duplicates.cuh`).
pub(super) struct Table {
    pub(super) keys: Slot<u64>,
    pub(super) first: Slot<u32>,
    pub(super) slot: Slot<u32>,
    pub(super) slots: usize,
    /// Centroids of a problem with those that fill its last tile.
    padded: usize,
}

impl Table {
    /// Zeros, unless the kernel that fills it clears it first.
    pub(super) fn new(layout: &mut ArenaLayout, copies: usize, k: usize, zeroed: bool) -> Self {
        let (slots, padded) = (2 * k.next_power_of_two(), k.next_multiple_of(TENSOR_CENTROIDS));
        let keys = layout.place_for(zeroed, elements(&[copies, slots]));
        let first = layout.place_for(zeroed, elements(&[copies, slots]));
        Self { keys, first, slot: layout.unwritten(elements(&[copies, k])), slots, padded }
    }

    /// Settles what scores start from, once all centroids are in the table: in a recheck, and in a first pass.
    pub(super) fn settle_starts<T: Element>(
        &self,
        dev: &CudaDevice,
        w: &Arena<'_>,
        (cs, c): (&CudaView<'_, T>, &Rows),
        active: Active,
        bounds: DevicePtr<Bounds>,
        [start, search_start]: [DevicePtr<f32>; 2],
    ) -> Result<()> {
        let places = elements(&[c.b, self.padded]);
        launch!(dev, Prepare, "settle_starts", T::SUFFIX, places.div_ceil(THREADS), THREADS;
            cs, &shape(c), &active, &(self.padded as i64), &w.ptr(self.keys), &w.ptr(self.first), &(self.slots as i64),
            &w.ptr(self.slot), &bounds, &start, &search_start)
    }
}

pub(super) fn assign<T: Element>(
    dev: &CudaDevice,
    half: CUtensorMapDataType,
    a: Assignment<'_>,
    labels: DevicePtr<u32>,
    memory: &Memory,
) -> Result<()> {
    let Assignment { plan: AssignPlan { kernel, prepare_all, .. }, x, c, metric, turn, near, .. } = a;
    let active = Active::of(turn)?;
    let (xs, cs) = (read(&x.operand), read(&c.operand));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);
    let (pitch, padded) = (d.next_multiple_of(8), k.next_multiple_of(TENSOR_CENTROIDS));

    let mut layout = ArenaLayout::default();
    // Few centroids are prepared by one kernel, a block to a problem, which clears what it adds to.
    let bounds = layout.place_for::<Bounds>(!prepare_all, copies);
    let listed = layout.place_for::<u32>(!prepare_all, x.b);
    let table = Table::new(&mut layout, copies, k, !prepare_all);
    let list = layout.unwritten::<UnprovenRow>(if kernel == Assign::Small { 0 } else { elements(&[x.b, x.n]) });
    let mu = layout.unwritten::<T>(elements(&[copies, d]));
    let moved = layout.unwritten::<T>(elements(&[copies, k, pitch]));
    let [start, search_start] = [(); 2].map(|_| layout.unwritten::<f32>(elements(&[copies, padded])));
    let scaled = metric == Metric::Cosine;
    let scale = scaled.then(|| layout.unwritten::<f32>(elements(&[copies, padded])));
    let centred = metric == Metric::SquaredEuclidean;
    let own = centred.then(|| layout.unwritten::<f32>(elements(&[copies, padded])));
    let reaches = layout.unwritten::<Reach>(if prepare_all { 0 } else { copies });
    let w = layout.scratch(dev, "labels", memory)?;
    let (mu, moved, bounds) = (w.ptr(mu), w.ptr(moved), w.ptr(bounds));
    let [start, search_start] = [start, search_start].map(|place| w.ptr(place));
    let [scale, own] = [scale, own].map(|place| place.map_or(DevicePtr::NULL, |place| w.ptr(place)));
    let (listed, list) = (w.ptr(listed), w.ptr(list));

    let (metric_id, k64, pitch64, padded64, copies64) =
        (metric as i32, k as i64, pitch as i64, padded as i64, copies as i64);
    let (keys, first, slot, slots) = (w.ptr(table.keys), w.ptr(table.first), w.ptr(table.slot), table.slots as i64);
    if prepare_all {
        launch!(dev, Prepare, "prepare_all", T::SUFFIX, copies, ORIGIN_THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &metric_id, &mu, &pitch64, &padded64, &moved, &start, &scale, &own,
            &bounds, &keys, &first, &slots, &slot, &search_start, &(x.b as i64), &listed)?;
    } else {
        let groups = elements(&[copies, d.div_ceil(ORIGIN_COLUMNS) + 1]);
        let reaches = w.ptr(reaches);
        launch!(dev, Prepare, "prepare_origin", T::SUFFIX, groups, ORIGIN_THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &metric_id, &mu, &reaches)?;
        let blocks = elements(&[copies, padded]).div_ceil(THREADS / MOVE_LANES);
        launch!(dev, Prepare, "prepare_moved", T::SUFFIX, blocks, THREADS;
            &cs, &shape(&one), &active, &metric_id, &reaches, &mu, &pitch64, &padded64, &moved, &start, &scale, &own,
            &bounds, &keys, &first, &slots, &slot)?;
        table.settle_starts(dev, &w, (&cs, &one), active, bounds, [start, search_start])?;
    }

    let processors = processors(dev)?;
    let shared = sweep_shared(d) + RECHECK_SHARED;
    if kernel == Assign::Small {
        let tiles = elements(&[x.b, x.n.div_ceil(SM80_ROWS)]);
        return launch!(dev, AssignSm80, "assign_small", T::SUFFIX, tiles, SM80_ROWS, shared;
            &xs, &shape(x), &active, &cs, &shape(c), &moved, &start, &scale, &own, &bounds, &k64, &pitch64, &padded64,
            &copies64, &metric_id, &labels);
    }
    let no_slack = DevicePtr::<f32>::NULL;
    if kernel == Assign::Sm90 {
        let (steps, groups) = sm90_shape(d);
        let from = xs.device_ptr(&dev.cuda_stream()).0;
        let row_map = TensorMap::new(half, from, [x.b, x.n, d], [x.batch_stride, x.row_stride], SM90_ROWS)?;
        let map = TensorMap::new(half, moved.address, [copies, k, d], [k * pitch, pitch], SM90_CENTROIDS)?;
        let tiles = elements(&[x.b, x.n.div_ceil(SM90_ROWS * groups)]).min(processors);
        let near = near.map(|near| Near::new(dev, near, [x.n, k, d], turn, memory)).transpose()?.flatten();
        let dense = match near {
            Some(near) => {
                let (x, c) = ((&xs, x), (&cs, &one));
                let scored =
                    Scored { x, c, active, mu, moved, search_start, own, bounds, padded, labels, list, listed };
                near.assign(dev, &scored)?
            }
            None => active,
        };
        launch!(dev, AssignSm90, sm90_name(steps), T::SUFFIX, tiles, 128 * (groups + 1), SM90_SHARED;
            &row_map, &map, &shape(x), &dense, &search_start, &scale, &own, &bounds, &k64, &padded64, &copies64, &no_slack,
            &labels, &list, &listed)?;
    } else if kernel == Assign::WideSm90 {
        let from = xs.device_ptr(&dev.cuda_stream()).0;
        let row_map = TensorMap::new(half, from, [x.b, x.n, d], [x.batch_stride, x.row_stride], WIDE_ROWS)?;
        let map = TensorMap::new(half, moved.address, [copies, k, d], [k * pitch, pitch], SM90_CENTROIDS)?;
        let blocks = wide_blocks([x.b, x.n], processors);
        launch!(dev, AssignWideSm90, "assign_wide", T::SUFFIX, blocks, WIDE_THREADS, SM90_SHARED;
            &row_map, &map, &shape(x), &active, &search_start, &scale, &own, &bounds, &k64, &padded64, &copies64, &no_slack,
            &labels, &list, &listed)?;
    } else {
        let tiles = elements(&[x.b, x.n.div_ceil(SM80_ROWS)]);
        launch!(dev, AssignSm80, "assign_sm80", T::SUFFIX, tiles, SM80_ROWS, sweep_shared(d);
            &xs, &shape(x), &active, &moved, &search_start, &scale, &own, &bounds, &k64, &pitch64, &padded64, &copies64,
            &labels, &list, &listed, &no_slack)?;
    }
    launch!(dev, Recheck, "recheck_tensor", T::SUFFIX, 2 * processors, SM80_ROWS, shared;
        &xs, &shape(x), &active, &cs, &shape(c), &moved, &start, &scale, &own, &bounds, &k64, &pitch64, &padded64,
        &copies64, &metric_id, &labels, &list, &listed)
}

/// `start + a.b` of 16 columns as the tensor cores add it up: (n), (n, 16) and (n, 16) to (n), for tests.
pub fn product_step(kernel: &str, start: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    typed!(a.dtype(), T => {
        let dev = device(a)?;
        let n = start.elem_count();
        let mut out = alloc::<f32>(dev, "product_step", n)?;
        let (starts, xs, ys) = (read(start), read(a), read(b));
        let (starts, xs, ys) = (starts.view::<f32>()?, xs.view::<T>()?, ys.view::<T>()?);
        if kernel == Assign::Sm90.name() {
            launch!(dev, AssignSm90, "probe_sm90", T::SUFFIX, n, 128; &starts, &xs, &ys, &(n as i64), &mut out)?;
        } else {
            launch!(dev, AssignSm80, "probe_sm80", T::SUFFIX, n, 128; &starts, &xs, &ys, &(n as i64), &mut out)?;
        }
        Ok(tensor(dev, out, n))
    })
}

/// The instance of `assign_sm90.cu` for so many steps of 16 columns ([`sm90_shape`]).
pub(super) fn sm90_name(steps: usize) -> &'static str {
    static NAMES: LazyLock<Vec<String>> =
        LazyLock::new(|| (0..=SM90_COLUMNS / 16).map(|steps| format!("assign_sm90_{steps}")).collect());
    &NAMES[steps]
}

/// The thread blocks of `assign_wide_sm90.cu`, in whole clusters, for problems of so many rows.
pub(super) fn wide_blocks([problems, rows]: [usize; 2], processors: usize) -> usize {
    let clusters = elements(&[problems, rows.div_ceil(WIDE_CLUSTER * WIDE_ROWS)]);
    WIDE_CLUSTER * clusters.min(processors / WIDE_CLUSTER).max(1)
}

/// Shared memory that a block of `recheck.cu` adds for the rows of a tile and its queues.
pub(super) const RECHECK_SHARED: usize = RECHECK_BYTES * (SM80_ROWS + RECHECK_QUEUE);

/// Shared memory of a block of `sweep.cuh`: its ring, and chunks of rows, all of a tile's if they are not too many.
pub(super) fn sweep_shared(d: usize) -> usize {
    let chunks = d.div_ceil(SM80_COLUMNS);
    let chunks = if chunks <= 8 { chunks.max(SM80_STAGES) } else { SM80_STAGES };
    2 * SM80_COLUMNS * (SM80_STAGES * SM80_CENTROIDS + chunks * SM80_ROWS) + 4 * SM80_STAGES * SM80_CENTROIDS
}
