//! Labels, distances, and the per-row passes around them: `kernels/assign_*.cu` and `kernels/norms.cu`.

use super::{
    device::{arch, device, processors},
    kernel::{launch, Nullable, WARP},
    memory::{alloc, elements, Layout, Memory, Place, Workspace},
    params::{shape, Active},
    tensors::{own, read, tensor, typed, write, Element, Part, TensorMap},
};
use crate::{
    error::{Error, Result},
    metric::Metric,
    plan::{narrow_columns, narrow_shared, sm90_shape, split_rows, Assign},
    request::Turn,
    rng::Draw,
    rows::{in_eights, Rows},
    tiles::{
        NARROW_BLOCKS, NARROW_THREADS, NARROW_TILE, ORIGIN_THREADS, PASS, PICK_PARTS, PREPARE_CENTROIDS,
        RECHECK_BLOCKS, RECHECK_QUEUE, SIMT_ROWS, SM80_CENTROIDS, SM80_COLUMNS, SM80_ROWS, SM80_STAGES, SM90_CENTROIDS,
        SM90_ROWS, SM90_SHARED, TENSOR_CENTROIDS, THREADS,
    },
};
use candle_core::cuda_backend::{
    cudarc::driver::{sys::CUtensorMapDataType, CudaView, DevicePtr, DeviceRepr, PushKernelArg},
    CudaDType, CudaDevice,
};
use candle_core::{DType, Tensor};

/// Who allocates, in errors.
const OP: &str = "labels";

pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    let dev = device(&x.tensor)?;
    let labels = tensor(dev, alloc::<u32>(dev, OP, elements(&[x.b, x.n]))?, (x.b, x.n));
    relabel(x, c, metric, None, &labels, &Memory::default())?;
    Ok(labels)
}

/// FlashAssign: one pass that proves most labels, one that settles the rest. Scratch beyond the prepared centroids: 8
/// bytes a row.
pub(crate) fn relabel(
    x: &Rows,
    c: &Rows,
    metric: Metric,
    turn: Option<Turn<'_>>,
    labels: &Tensor,
    memory: &Memory,
) -> Result<()> {
    if x.b == 0 || x.n == 0 {
        return Ok(());
    }
    let dev = device(&x.tensor)?;
    let active = Active::of(turn)?;
    let kernel = Assign::choose(x.dtype(), metric, [x.b, x.n, c.n, x.d], arch(dev)?);
    typed!(x.dtype(), T => write(labels, |to| match (kernel, T::HALF) {
        (Assign::Sm80 | Assign::Small | Assign::Sm90, Some(half)) => {
            let x = pack::<T>(dev, x)?;
            tensor_labels::<T>(dev, kernel, half, &x, c, metric, active, to, memory)
        }
        (Assign::Sm80 | Assign::Sm90, None) => split_labels(dev, kernel, x, c, metric, active, to, memory),
        (Assign::Narrow, _) => narrow_labels::<T>(dev, x, c, metric, active, to),
        _ => simt_labels::<T>(dev, x, c, metric, active, to, memory),
    }))
}

/// The rows as they lie, or where the kernel can read them, in `copy`: of eight columns each if it reads such.
pub(crate) fn readable(x: &Tensor, k: usize, metric: Metric, copy: &mut Option<Tensor>) -> Result<Rows> {
    let dev = device(x)?;
    let (rank, view) = (x.rank(), Rows::view(x));
    let (b, n, d) = (x.dims()[..rank - 2].iter().product(), x.dims()[rank - 2], x.dims()[rank - 1]);
    let eights = Assign::choose(x.dtype(), metric, [b, n, k, d], arch(dev)?).in_eights(x.dtype());
    let pitch = if eights { d.next_multiple_of(8) } else { d };
    match view {
        Some(rows) if !eights || in_eights(&rows.tensor) || x.elem_count() == 0 => Ok(rows),
        view => typed!(x.dtype(), T => {
            // The rows of the last run were in the same place, which a captured run looks for.
            let to = match copy.take().filter(|kept| kept.dims() == [b, n, pitch]) {
                Some(kept) => kept,
                None => tensor(dev, alloc::<T>(dev, "pack", elements(&[b, n, pitch]))?, (b, n, pitch)),
            };
            match view {
                Some(rows) => pack_into::<T>(dev, &rows, &to)?,
                None => write::<T>(&to, |to| copy_strided(dev, x, pitch, to))?,
            }
            Rows::new(&copy.insert(to).narrow(2, 0, d)?)
        }),
    }
}

/// The rows themselves, or a copy in multiples of eight columns.
fn pack<T: Element>(dev: &CudaDevice, x: &Rows) -> Result<Rows> {
    if in_eights(&x.tensor) || x.b == 0 || x.n == 0 {
        return Ok(x.clone());
    }
    let shape = (x.b, x.n, x.d.next_multiple_of(8));
    let to = tensor(dev, alloc::<T>(dev, "pack", elements(&[shape.0, shape.1, shape.2]))?, shape);
    pack_into::<T>(dev, x, &to)?;
    Rows::new(&to.narrow(2, 0, x.d)?)
}

/// Rows side by side in `(b, n, pitch)`.
fn pack_into<T: Element>(dev: &CudaDevice, x: &Rows, to: &Tensor) -> Result<()> {
    let pitch = to.dim(2)?;
    let (xs, rows) = (read(&x.tensor), rows_of_a_pass(pitch));
    write::<T>(to, |to| {
        launch!(dev, Prepare, "pack", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &(pitch as i64), &(rows as i64), &to)
    })
}

/// `struct Strided` of `norms.cu`.
#[repr(C)]
struct Strided {
    sizes: [i64; 8],
    strides: [i64; 8],
    rank: i64,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Strided {}

impl Strided {
    /// The last dimension, then the others from the innermost one on, those that step over the whole of the one inside with it.
    fn of(t: &Tensor) -> Result<Self> {
        let dims = t.dims().iter().zip(t.stride()).map(|(&size, &stride)| (size as i64, stride as i64)).rev();
        let mut folded: Vec<(i64, i64)> = vec![];
        for (_, (size, stride)) in dims.enumerate().filter(|&(i, (size, _))| i == 0 || size != 1) {
            // The last dimension stays alone: its rows are widened.
            let outer = folded.len() > 1;
            match folded.last_mut() {
                Some((inner, step)) if outer && stride == *inner * *step => *inner *= size,
                _ => folded.push((size, stride)),
            }
        }
        let mut strided = Self { sizes: [1; 8], strides: [0; 8], rank: folded.len() as i64 };
        if folded.len() > strided.sizes.len() {
            let (got, limit) = (folded.len(), strided.sizes.len());
            return Err(Error::TooLarge { argument: "dimensions of a copy", got, limit });
        }
        for (i, (size, stride)) in folded.into_iter().enumerate() {
            (strided.sizes[i], strided.strides[i]) = (size, stride);
        }
        Ok(strided)
    }
}

/// The elements of `t`, its last dimension widened to `pitch` by zeros.
fn copy_strided<T: CudaDType + DeviceRepr>(dev: &CudaDevice, t: &Tensor, pitch: usize, to: Part<T>) -> Result<()> {
    let (from, last) = (Strided::of(t)?, t.dims()[t.rank() - 1]);
    let cells = elements(&[t.elem_count() / last.max(1), pitch]);
    let name = match size_of::<T>() {
        1 => "copy_1",
        2 => "copy_2",
        4 => "copy_4",
        _ => "copy_8",
    };
    let input = read(t);
    launch!(dev, Norms, name, "", cells.div_ceil(THREADS), THREADS;
        &input.view::<T>()?, &from, &(cells as i64), &(pitch as i64), &to)
}

/// The same elements side by side.
pub(crate) fn contiguous(t: &Tensor) -> Result<Tensor> {
    fn copied<T: CudaDType + DeviceRepr>(t: &Tensor) -> Result<Tensor> {
        let dev = device(t)?;
        let out = tensor(dev, alloc::<T>(dev, "contiguous", t.elem_count())?, t.shape());
        write::<T>(&out, |to| copy_strided(dev, t, t.dims()[t.rank() - 1], to))?;
        Ok(out)
    }
    match t.dtype() {
        DType::U8 => copied::<u8>(t),
        DType::U32 => copied::<u32>(t),
        DType::I64 => copied::<i64>(t),
        DType::F16 => copied::<half::f16>(t),
        DType::BF16 => copied::<half::bf16>(t),
        DType::F32 => copied::<f32>(t),
        DType::F64 => copied::<f64>(t),
        _ => Ok(t.contiguous()?),
    }
}

fn narrow_labels<T: Element>(
    dev: &CudaDevice,
    x: &Rows,
    c: &Rows,
    metric: Metric,
    active: Active,
    labels: Part<u32>,
) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let name = match narrow_columns(x.d) {
        1 => "assign_narrow_1",
        2 => "assign_narrow_2",
        4 => "assign_narrow_4",
        _ => "assign_narrow_8",
    };
    let shared = narrow_shared(x.dtype(), c.n, x.d).unwrap_or(usize::MAX);
    // Enough blocks to fill any device, each with centroids of its own to prepare.
    let tiles = elements(&[x.b, x.n.div_ceil(NARROW_TILE)]).min(NARROW_BLOCKS * processors(dev)?);
    launch!(dev, AssignNarrow, name, T::SUFFIX, tiles, NARROW_THREADS, shared;
        &xs.view::<T>()?, &shape(x), &active, &cs.view::<T>()?, &shape(c), &(metric as i32), &labels)
}

fn simt_labels<T: Element>(
    dev: &CudaDevice,
    x: &Rows,
    c: &Rows,
    metric: Metric,
    active: Active,
    labels: Part<u32>,
    memory: &Memory,
) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);

    let mut layout = Layout::default();
    let mu = layout.zeroed::<T::Filter>(elements(&[copies, d]));
    let largest = layout.zeroed::<f64>(copies);
    let listed = layout.zeroed::<u32>(x.b);
    let list = layout.unwritten::<u32>(elements(&[x.b, x.n]));
    let moved = layout.unwritten::<T::Filter>(elements(&[copies, k, d]));
    let bias = layout.unwritten::<T::Filter>(elements(&[copies, k]));
    let w = layout.scratch(dev, OP, memory)?;
    let (mu, largest, moved, bias) = (w.part(mu), w.part(largest), w.part(moved), w.part(bias));
    let (listed, list) = (w.part(listed), w.part(list));

    if metric == Metric::SquaredEuclidean {
        launch!(dev, Prepare, "prepare_means", T::SUFFIX, elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            &cs, &shape(&one), &active, &mu)?;
    }
    let of = metric as i32;
    launch!(dev, Prepare, "prepare_centroids", T::SUFFIX, warps(elements(&[copies, k])), THREADS;
        &cs, &shape(&one), &active, &of, &mu, &moved, &bias, &largest)?;
    let (tiles, k, copies) = (elements(&[x.b, x.n.div_ceil(SIMT_ROWS)]), k as i64, copies as i64);
    let name = if metric == Metric::Manhattan { "assign_simt_manhattan" } else { "assign_simt_dot" };
    launch!(dev, AssignSimt, name, T::SUFFIX, tiles, THREADS;
        &xs, &shape(x), &active, &k, &mu, &moved, &bias, &largest, &copies, &of, &labels, &list, &listed)?;
    let blocks = elements(&[x.b, warps(x.n)]).min(RECHECK_BLOCKS);
    launch!(dev, AssignSimt, "recheck", T::SUFFIX, blocks, THREADS;
        &xs, &shape(x), &active, &cs, &shape(c), &mu, &moved, &bias, &largest, &copies, &of, &labels, &list, &listed)
}

/// Blocks that have a warp for each of `count`.
fn warps(count: usize) -> usize {
    count.div_ceil(THREADS / WARP)
}

/// The table of hashes that finds repeated centroids (`kernels/duplicates.cuh`).
struct Table {
    keys: Place<u64>,
    first: Place<u32>,
    slot: Place<u32>,
    slots: usize,
}

impl Table {
    /// Zeros, unless the kernel that fills it clears it first.
    fn new(layout: &mut Layout, copies: usize, k: usize, zeroed: bool) -> Self {
        let slots = 2 * k.next_power_of_two();
        let keys = layout.place_for(zeroed, elements(&[copies, slots]));
        let first = layout.place_for(zeroed, elements(&[copies, slots]));
        Self { keys, first, slot: layout.unwritten(elements(&[copies, k])), slots }
    }

    /// Lets no centroid win that repeats an earlier one, once all are in the table.
    #[allow(clippy::too_many_arguments)]
    fn drop_duplicates<T: Element>(
        &self,
        dev: &CudaDevice,
        w: &Workspace<'_>,
        cs: &CudaView<'_, T>,
        c: &Rows,
        active: Active,
        padded: usize,
        start: Part<f32>,
    ) -> Result<()> {
        launch!(dev, Prepare, "drop_duplicates", T::SUFFIX, elements(&[c.b, c.n]).div_ceil(THREADS), THREADS;
            cs, &shape(c), &active, &(padded as i64), &w.part(self.keys), &w.part(self.first), &(self.slots as i64),
            &w.part(self.slot), &start)
    }
}

#[allow(clippy::too_many_arguments)]
fn tensor_labels<T: Element>(
    dev: &CudaDevice,
    kernel: Assign,
    half: CUtensorMapDataType,
    x: &Rows,
    c: &Rows,
    metric: Metric,
    active: Active,
    labels: Part<u32>,
    memory: &Memory,
) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);
    let (pitch, padded) = (d.next_multiple_of(8), k.next_multiple_of(TENSOR_CENTROIDS));

    let mut layout = Layout::default();
    // Few centroids are prepared by one kernel, a block to a problem, which clears what it adds to.
    let few = k <= PREPARE_CENTROIDS && copies <= processors(dev)?;
    let bounds = layout.place_for::<[f32; BOUNDS]>(!few, copies);
    let listed = layout.place_for::<u32>(!few, x.b);
    let table = Table::new(&mut layout, copies, k, !few);
    let list = layout.unwritten::<Listed>(if kernel == Assign::Small { 0 } else { elements(&[x.b, x.n]) });
    let mu = layout.unwritten::<T>(elements(&[copies, d]));
    let moved = layout.unwritten::<T>(elements(&[copies, k, pitch]));
    let start = layout.unwritten::<f32>(elements(&[copies, padded]));
    let scaled = metric == Metric::Cosine;
    let scale = scaled.then(|| layout.unwritten::<f32>(elements(&[copies, padded])));
    let centred = metric == Metric::SquaredEuclidean;
    let own = centred.then(|| layout.unwritten::<f32>(elements(&[copies, padded])));
    let reaches = layout.unwritten::<Reach>(if few { 0 } else { copies });
    let w = layout.scratch(dev, OP, memory)?;
    let (mu, moved, start, bounds) = (w.part(mu), w.part(moved), w.part(start), w.part(bounds));
    let [scale, own] = [scale, own].map(|place| place.map_or(Part::NULL, |place| w.part(place)));
    let (listed, list) = (w.part(listed), w.part(list));

    let (of, k64, pitch64, padded64, copies64) = (metric as i32, k as i64, pitch as i64, padded as i64, copies as i64);
    let (keys, first, slot, slots) = (w.part(table.keys), w.part(table.first), w.part(table.slot), table.slots as i64);
    if few {
        launch!(dev, Prepare, "prepare_all", T::SUFFIX, copies, ORIGIN_THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &of, &mu, &pitch64, &padded64, &moved, &start, &scale, &own,
            &bounds, &keys, &first, &slots, &slot, &(x.b as i64), &listed)?;
    } else {
        let groups = elements(&[copies, d.div_ceil(2 * WARP) + 1]);
        let reaches = w.part(reaches);
        launch!(dev, Prepare, "prepare_origin", T::SUFFIX, groups, ORIGIN_THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &of, &mu, &reaches)?;
        let blocks = elements(&[copies, padded]).div_ceil(THREADS / 8); // eight lanes to a centroid
        launch!(dev, Prepare, "prepare_moved", T::SUFFIX, blocks, THREADS;
            &cs, &shape(&one), &active, &of, &reaches, &mu, &pitch64, &padded64, &moved, &start, &scale, &own,
            &bounds, &keys, &first, &slots, &slot)?;
        table.drop_duplicates(dev, &w, &cs, &one, active, padded, start)?;
    }

    let processors = processors(dev)?;
    let shared = sweep_shared(d) + HELD_SHARED;
    if kernel == Assign::Small {
        let tiles = elements(&[x.b, x.n.div_ceil(SM80_ROWS)]);
        return launch!(dev, AssignSm80, "assign_small", T::SUFFIX, tiles, SM80_ROWS, shared;
            &xs, &shape(x), &active, &cs, &shape(c), &moved, &start, &scale, &own, &bounds, &k64, &pitch64, &padded64,
            &copies64, &of, &labels);
    }
    let no_slack = Part::<f32>::NULL;
    if kernel == Assign::Sm90 {
        let (steps, groups) = sm90_shape(d);
        let from = xs.device_ptr(&dev.cuda_stream()).0;
        let row_map = TensorMap::new(half, from, [x.b, x.n, d], [x.batch_stride, x.row_stride], SM90_ROWS)?;
        let map = TensorMap::new(half, moved.address, [copies, k, d], [k * pitch, pitch], SM90_CENTROIDS)?;
        let tiles = elements(&[x.b, x.n.div_ceil(SM90_ROWS * groups)]).min(processors);
        launch!(dev, AssignSm90, SM90_NAMES[steps], T::SUFFIX, tiles, 128 * (groups + 1), SM90_SHARED;
            &row_map, &map, &shape(x), &active, &start, &scale, &own, &bounds, &k64, &padded64, &copies64, &no_slack,
            &labels, &list, &listed)?;
    } else {
        let tiles = elements(&[x.b, x.n.div_ceil(SM80_ROWS)]);
        launch!(dev, AssignSm80, "assign_sm80", T::SUFFIX, tiles, SM80_ROWS, sweep_shared(d);
            &xs, &shape(x), &active, &moved, &start, &scale, &own, &bounds, &k64, &pitch64, &padded64, &copies64,
            &labels, &list, &listed, &no_slack)?;
    }
    launch!(dev, Recheck, "recheck_tensor", T::SUFFIX, 2 * processors, SM80_ROWS, shared;
        &xs, &shape(x), &active, &cs, &shape(c), &moved, &start, &scale, &own, &bounds, &k64, &pitch64, &padded64,
        &copies64, &of, &labels, &list, &listed)
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

/// Floats of `struct Bounds`.
const BOUNDS: usize = 7;

/// `struct Reach`.
type Reach = [f32; 2];

/// `struct Listed`.
type Listed = [u32; 2];

/// The instances of `assign_sm90.cu` by their steps of 16 columns ([`sm90_shape`]).
const SM90_NAMES: [&str; 33] = {
    macro_rules! names {
        ($($steps:literal)+) => {{
            let mut names = [""; 33];
            $(names[$steps] = concat!("assign_sm90_", $steps);)+
            names
        }};
    }
    names!(1 2 3 4 5 6 7 8 10 12 14 16 20 24 28 32)
};

/// Shared memory that a block of `recheck.cu` adds for the rows of a tile and its queues.
const HELD_SHARED: usize = 12 * (SM80_ROWS + RECHECK_QUEUE);

/// Shared memory of a block of `sweep.cuh`: its ring, and chunks of rows, all of a tile's if they are not too many.
fn sweep_shared(d: usize) -> usize {
    let chunks = d.div_ceil(SM80_COLUMNS);
    let chunks = if chunks <= 8 { chunks.max(SM80_STAGES) } else { SM80_STAGES };
    2 * SM80_COLUMNS * (SM80_STAGES * SM80_CENTROIDS + chunks * SM80_ROWS) + 4 * SM80_STAGES * SM80_CENTROIDS
}

/// f32 rows by way of halves: `kernels/split.cu`. Rows are split a rectangle at a time, part of one problem or whole
/// problems, so that the halves take no more memory than [`SPLIT_BYTES`] and stay in L2 for the most part.
#[allow(clippy::too_many_arguments)]
fn split_labels(
    dev: &CudaDevice,
    kernel: Assign,
    x: &Rows,
    c: &Rows,
    metric: Metric,
    active: Active,
    labels: Part<u32>,
    memory: &Memory,
) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<f32>()?, cs.view::<f32>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);
    let (pitch, padded) = (d.next_multiple_of(32), k.next_multiple_of(TENSOR_CENTROIDS));
    let both = 2 * pitch;
    let most = split_rows(d).min(elements(&[x.b, x.n]));
    // A part of a problem is a rectangle that is known here: which problem it is of cannot come from a list.
    let whole = x.n <= most;
    let active = if whole { active } else { active.whole() };

    let mut layout = Layout::default();
    let mu = layout.zeroed::<f32>(elements(&[copies, d]));
    let largest = layout.zeroed::<f32>(copies);
    // For one half alone, then for both.
    let bounds = layout.zeroed::<[f32; BOUNDS]>(elements(&[2, copies]));
    let listed = layout.zeroed::<u32>(elements(&[x.b, x.n.div_ceil(most)]));
    let table = Table::new(&mut layout, copies, k, true);
    let list = layout.unwritten::<Listed>(most);
    let moved = layout.unwritten::<half::f16>(elements(&[copies, k, both]));
    let start = layout.unwritten::<f32>(elements(&[copies, padded]));
    let halves = layout.unwritten::<half::f16>(elements(&[most, both]));
    let slacks = [(); 2].map(|_| layout.unwritten::<f32>(most));
    let reaches = layout.unwritten::<Reach>(copies);
    let w = layout.scratch(dev, OP, memory)?;
    let (mu, largest, moved, start, bounds) =
        (w.part(mu), w.part(largest), w.part(moved), w.part(start), w.part(bounds));
    let (mut listed, list, halves) = (w.part(listed), w.part(list), w.part(halves));
    let [slack, slack_split] = slacks.map(|s| w.part(s));

    let (of, none, reaches) = (metric as i32, Part::<f32>::NULL, w.part(reaches));
    let (k64, pitch64, both64, padded64, copies64) =
        (k as i64, pitch as i64, both as i64, padded as i64, copies as i64);
    if metric == Metric::SquaredEuclidean {
        launch!(dev, Prepare, "prepare_means", "f32", elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            &cs, &shape(&one), &active, &mu)?;
        launch!(dev, Split, "split_reach", "f32", copies, 2 * THREADS;
            &xs, &shape(x), &cs, &shape(&one), &active, &mu, &largest, &reaches)?;
    } else {
        launch!(dev, Split, "split_largest", "f32", warps(elements(&[copies, k])), THREADS;
            &cs, &shape(&one), &active, &of, &mu, &largest)?;
    }
    launch!(dev, Split, "split_centroids", "f32", warps(elements(&[copies, padded])), THREADS;
        &cs, &shape(&one), &active, &of, &mu, &largest, &reaches, &pitch64, &padded64, &moved, &start, &bounds,
        &w.part(table.keys), &w.part(table.first), &(table.slots as i64), &w.part(table.slot))?;
    table.drop_duplicates(dev, &w, &cs, &one, active, padded, start)?;

    let processors = processors(dev)?;
    let mut first = 0;
    while first < x.b * x.n {
        let (b, row) = (first / x.n, first % x.n);
        let (problems, rows) = if whole { ((most / x.n).min(x.b - b), x.n) } else { (1, most.min(x.n - row)) };
        let copy = if copies > 1 { b } else { 0 };
        let count = problems * rows;
        let lanes = (pitch / 8).next_power_of_two().clamp(4, WARP);
        launch!(dev, Split, "split_rows", "f32", warps(count.div_ceil(WARP / lanes)).min(16 * processors), THREADS;
            &xs, &shape(x), &active, &(first as i64), &(count as i64), &of, &mu, &largest, &bounds, &copies64, &pitch64,
            &halves, &slack, &slack_split)?;

        let part = Rows { b: problems, n: rows, ..x.clone() };
        let split = Rows { b: problems, n: rows, batch_stride: rows * both, row_stride: both, ..x.clone() };
        let (start, moved) = (start.from(copy * padded), moved.from(copy * k * both));
        let (high, low) = (bounds.from(copy), bounds.from(copies + copy));
        // By a list, problems are found from the first one on.
        let (from, skip) = if active.list.is_null() { (b, 0) } else { (0, b) };
        let (active, labels) = (active.after(skip), labels.from(from * x.n + row));
        if kernel == Assign::Sm90 {
            let half = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
            let (steps, groups) = sm90_shape(d);
            let row_map = TensorMap::new(half, halves.address, [problems, rows, d], [rows * both, both], SM90_ROWS)?;
            let own = if copies > 1 { problems } else { 1 };
            let map = TensorMap::new(half, moved.address, [own, k, d], [k * both, both], SM90_CENTROIDS)?;
            let tiles = elements(&[problems, rows.div_ceil(SM90_ROWS * groups)]).min(processors);
            launch!(dev, AssignSm90, SM90_NAMES[steps], "f16", tiles, 128 * (groups + 1), SM90_SHARED;
                &row_map, &map, &shape(&split), &active, &start, &none, &none, &high, &k64, &padded64, &copies64, &slack,
                &labels, &list, &listed)?;
        } else {
            let tiles = elements(&[problems, rows.div_ceil(SM80_ROWS)]);
            launch!(dev, AssignSm80, "assign_sm80", "f16", tiles, SM80_ROWS, sweep_shared(d);
                &halves, &shape(&split), &active, &moved, &start, &none, &none, &high, &k64, &both64, &padded64, &copies64,
                &labels, &list, &listed, &slack)?;
        }
        let originals = xs.slice(from * x.batch_stride + row * x.row_stride..);
        let centroids = cs.slice(from * c.batch_stride..);
        let shared = sweep_shared(2 * d) + HELD_SHARED;
        launch!(dev, Recheck, "recheck_split", "f32", 2 * processors, SM80_ROWS, shared;
            &halves, &originals, &shape(&part), &active, &centroids, &shape(c), &moved, &start, &low, &k64, &both64, &padded64,
            &copies64, &of, &labels, &list, &listed, &slack_split, &slack)?;
        (first, listed) = (first + count, listed.from(problems));
    }
    Ok(())
}

/// Centroids that all problems share as those of one.
fn one_copy(c: &Rows) -> Rows {
    Rows { b: if c.batch_stride == 0 { c.b.min(1) } else { c.b }, ..c.clone() }
}

pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "distances", rows)?;
        let (xs, cs, labels) = (read(&x.tensor), read(&c.tensor), read(labels));
        launch!(dev, Norms, "distances", T::SUFFIX, rows.div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), &cs.view::<T>()?, &shape(c), &labels.view::<u32>()?, &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}

pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let pairs = elements(&[x.b, x.n, c.n]);
        let mut out = alloc::<<T as Element>::Filter>(dev, "pairwise", pairs)?;
        let (xs, cs) = (read(&x.tensor), read(&c.tensor));
        launch!(dev, Norms, "pairwise", T::SUFFIX, pairs.div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), &cs.view::<T>()?, &shape(c), &(metric as i32), &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n, c.n)))
    })
}

pub(crate) fn gather(x: &Rows, index: &Tensor) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let (b, m) = index.dims2()?;
        let mut out = alloc::<T>(dev, "gather", elements(&[b, m, x.d]))?;
        let (xs, index) = (read(&x.tensor), read(index));
        let rows = rows_of_a_pass(x.d);
        launch!(dev, Norms, "gather", T::SUFFIX, elements(&[b, m.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &index.view::<u32>()?, &(m as i64), &(rows as i64), &mut out)?;
        Ok(tensor(dev, out, (b, m, x.d)))
    })
}

/// Rows that one block passes over.
fn rows_of_a_pass(d: usize) -> usize {
    (PASS / d).max(1)
}

pub(crate) fn usable_seeds(x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let (b, k) = chosen.dims2()?;
        let mut out = alloc::<u32>(dev, "usable_seeds", elements(&[b, k]))?;
        let (xs, weights, chosen) = (read(&x.tensor), weights.map(read), read(chosen));
        let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
        launch!(dev, Norms, "usable_seeds", T::SUFFIX, b, THREADS;
            &xs.view::<T>()?, &shape(x), Nullable(&weights), &chosen.view::<u32>()?, &(k as i64), &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (b, k)))
    })
}

pub(crate) fn scan(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let mut largest = alloc::<f64>(dev, "scan", x.b)?;
        let mut first_bad = alloc::<u32>(dev, "scan", x.b)?;
        launch!(dev, Norms, "scan_start", "", x.b.div_ceil(THREADS), THREADS;
            &(x.b as i64), &mut largest, &mut first_bad)?;
        let xs = read(&x.tensor);
        let rows = rows_of_a_pass(x.d);
        launch!(dev, Norms, "scan", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &(rows as i64), &mut largest, &mut first_bad)?;
        Ok((tensor(dev, largest, x.b), tensor(dev, first_bad, x.b)))
    })
}

pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "norms", rows)?;
        let xs = read(&x.tensor);
        launch!(dev, Norms, "norms", T::SUFFIX, rows.div_ceil(THREADS), THREADS; &xs.view::<T>()?, &shape(x), &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}

pub(crate) fn nearer(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "nearer", rows)?;
        let (xs, nearest, newest) = (read(&x.tensor), read(nearest), read(newest));
        launch!(dev, Norms, "nearer", T::SUFFIX, rows.div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), &nearest.view::<f64>()?, &newest.view::<u32>()?, &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}

pub(crate) fn race(nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
    let dev = device(nearest)?;
    let (b, n) = nearest.dims2()?;
    let mut out = alloc::<f64>(dev, "race", elements(&[b, n]))?;
    let (nearest, weights) = (read(nearest), weights.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    launch!(dev, Norms, "race_keys", "", elements(&[b, n]).div_ceil(THREADS), THREADS;
        &nearest.view::<f64>()?, Nullable(&weights), &(b as i64), &(n as i64), &draw.seed, &draw.round, &mut out)?;
    Ok(tensor(dev, out, (b, n)))
}

#[allow(clippy::too_many_arguments)]
pub(crate) fn pick(
    x: &Rows,
    nearest: &Tensor,
    weights: Option<&Tensor>,
    chosen: &Tensor,
    i: usize,
    start: bool,
    metric: Metric,
    draw: Draw,
    memory: &Memory,
) -> Result<()> {
    const OP: &str = "pick";
    let dev = device(&x.tensor)?;
    let rows = THREADS.max(x.n / PICK_PARTS).next_multiple_of(THREADS);
    let parts = elements(&[x.b, x.n.div_ceil(rows)]);
    let (mut scratch, mut zeros) = (Layout::default(), Layout::default());
    let (keys, winners) = (scratch.unwritten::<u64>(parts), scratch.unwritten::<u32>(parts));
    let arrived = zeros.zeroed::<u32>(x.b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights) = (read(&x.tensor), weights.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let (nearest, chosen_at, count) = (own::<f64>(nearest)?, own::<u32>(chosen)?, chosen.dim(1)? as i64);
    typed!(x.dtype(), T => launch!(dev, Norms, "pick", T::SUFFIX, parts, THREADS;
        &xs.view::<T>()?, &shape(x), &nearest, Nullable(&weights), &chosen_at, &count, &(i as i64), &(start as i32),
        &(metric as i32), &draw.seed, &draw.round, &(rows as i64), &scratch.part(keys), &scratch.part(winners),
        &zeros.part(arrived)))
}
