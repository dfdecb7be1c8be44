//! Labels, distances, and the per-row passes around them: `kernels/assign_*.cu` and `kernels/norms.cu`.

use super::{alloc, device, elements, launch, read, shape, tensor, typed, zeros, Element, Nullable, TensorMap};
use crate::{
    plan::{sm90_shape, split_rows, Assign},
    problem::{in_eights, Rows},
    rng::Draw,
    tiles::{
        PASS, RECHECK_BLOCKS, SIMT_ROWS, SM80_CENTROIDS, SM80_COLUMNS, SM80_QUEUE, SM80_ROWS, SM80_STAGES,
        SM90_CENTROIDS, SM90_ROWS, SM90_SHARED, TENSOR_CENTROIDS, THREADS,
    },
    Metric, Result,
};
use candle_core::cuda_backend::{
    cudarc::driver::{
        sys::{CUdevice_attribute, CUtensorMapDataType},
        CudaSlice, CudaView, DevicePtr, PushKernelArg,
    },
    CudaDevice, WrapErr,
};
use candle_core::Tensor;

/// Lanes of a warp.
const WARP: usize = 32;

pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => labels_of::<T>(x, c, metric))
}

/// FlashAssign: one pass that proves most labels, one that settles the rest. Scratch beyond the prepared centroids: 8
/// bytes a row.
fn labels_of<T: Element>(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    const OP: &str = "labels";
    let dev = device(&x.tensor)?;
    let mut labels = alloc::<u32>(dev, OP, elements(&[x.b, x.n]))?;
    let mut list = alloc::<u32>(dev, OP, elements(&[2, x.b, x.n]))?;
    let mut listed = zeros::<u32>(dev, OP, x.b)?;
    let out = Labels { labels: &mut labels, list: &mut list, listed: &mut listed };
    let kernel = Assign::choose(x.dtype(), metric, [x.b, x.n, c.n, x.d], super::arch(dev)?);
    if x.b == 0 || x.n == 0 {
        return Ok(tensor(dev, labels, (x.b, x.n)));
    }
    match (kernel, T::HALF) {
        (Assign::Sm80 | Assign::Sm90, Some(half)) => {
            let x = readable(x.clone(), c.n, metric)?;
            tensor_labels::<T>(dev, kernel, half, &x, c, metric, out)?;
        }
        (Assign::Sm80 | Assign::Sm90, None) => split_labels(dev, kernel, x, c, metric, out)?,
        _ => simt_labels::<T>(dev, x, c, metric, out)?,
    }
    Ok(tensor(dev, labels, (x.b, x.n)))
}

/// Where labels go, and the rows whose labels are still to be proven, `listed[b]` of them: `struct Listed` of
/// `kernels/tensor.cuh` on tensor cores, else their indices.
struct Labels<'a> {
    labels: &'a mut CudaSlice<u32>,
    list: &'a mut CudaSlice<u32>,
    listed: &'a mut CudaSlice<u32>,
}

/// The rows themselves, or a copy in multiples of eight columns if the kernel reads such and they lie otherwise.
pub(crate) fn readable(x: Rows, k: usize, metric: Metric) -> Result<Rows> {
    let dev = device(&x.tensor)?;
    let kernel = Assign::choose(x.dtype(), metric, [x.b, x.n, k, x.d], super::arch(dev)?);
    if !kernel.in_eights(x.dtype()) || in_eights(&x.tensor) || x.b == 0 || x.n == 0 {
        return Ok(x);
    }
    typed!(x.dtype(), T => {
        let pitch = x.d.next_multiple_of(8);
        let mut out = alloc::<T>(dev, "pack", elements(&[x.b, x.n, pitch]))?;
        let (xs, rows) = (read(&x.tensor), rows_of_a_pass(pitch));
        launch!(dev, Norms, "pack", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(&x), &(pitch as i64), &(rows as i64), &mut out)?;
        Rows::new(&tensor(dev, out, (x.b, x.n, pitch)).narrow(2, 0, x.d)?)
    })
}

fn simt_labels<T: Element>(dev: &CudaDevice, x: &Rows, c: &Rows, metric: Metric, out: Labels<'_>) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let p = Prepared::new(dev, "labels", &cs, c, metric)?;
    let tiles = elements(&[x.b, x.n.div_ceil(SIMT_ROWS)]);
    let name = if metric == Metric::Manhattan { "assign_simt_manhattan" } else { "assign_simt_dot" };
    launch!(dev, AssignSimt, name, T::SUFFIX, tiles, THREADS;
        &xs, &shape(x), &(c.n as i64), &p.mu, &p.moved, &p.bias, &p.largest, &p.copies, &(metric as i32),
        &mut *out.labels, &mut *out.list, &mut *out.listed)?;
    let blocks = elements(&[x.b, x.n.div_ceil(THREADS / WARP)]).min(RECHECK_BLOCKS);
    launch!(dev, AssignSimt, "recheck", T::SUFFIX, blocks, THREADS;
        &xs, &shape(x), &cs, &shape(c), &p.mu, &p.moved, &p.bias, &p.largest, &p.copies, &(metric as i32),
        &mut *out.labels, &*out.list, &*out.listed)
}

fn tensor_labels<T: Element>(
    dev: &CudaDevice,
    kernel: Assign,
    half: CUtensorMapDataType,
    x: &Rows,
    c: &Rows,
    metric: Metric,
    out: Labels<'_>,
) -> Result<()> {
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let m = Moved::<T>::new(dev, "labels", &cs, c, metric)?;
    let (k, pitch, padded, copies) = (c.n as i64, m.pitch as i64, m.padded as i64, m.copies as i64);
    let scale = m.scale.as_ref().map(|s| s.slice(..));
    let no_slack: Option<CudaView<'_, f32>> = None;
    let (stream, metric) = (dev.cuda_stream(), metric as i32);
    let processors = processors(dev)?;
    if kernel == Assign::Sm90 {
        let (steps, groups) = sm90_shape(x.d);
        let address = |view: &CudaView<'_, T>| view.device_ptr(&stream).0;
        let rows = TensorMap::new(half, address(&xs), [x.b, x.n, x.d], [x.batch_stride, x.row_stride], SM90_ROWS)?;
        let moved = m.moved.slice(..);
        let strides = [c.n * m.pitch, m.pitch];
        let moved = TensorMap::new(half, address(&moved), [m.copies, c.n, x.d], strides, SM90_CENTROIDS)?;
        let tiles = elements(&[x.b, x.n.div_ceil(SM90_ROWS * groups)]);
        launch!(dev, AssignSm90, SM90_NAMES[steps], T::SUFFIX, tiles.min(processors), 128 * (groups + 1), SM90_SHARED;
            &rows, &moved, &shape(x), &m.start, Nullable(&scale), &m.bounds, &k, &padded, &copies, Nullable(&no_slack),
            &mut *out.labels, &mut *out.list, &mut *out.listed)?;
    } else {
        let (tiles, shared) = (elements(&[x.b, x.n.div_ceil(SM80_ROWS)]), sm80_shared(x.d));
        launch!(dev, AssignSm80, "assign_sm80", T::SUFFIX, tiles, SM80_ROWS, shared;
            &xs, &shape(x), &cs, &shape(c), &m.moved, &m.start, Nullable(&scale), &m.bounds, &k, &pitch, &padded,
            &copies, &metric, &mut *out.labels, &mut *out.list, &mut *out.listed, Nullable(&no_slack))?;
    }
    let shared = sm80_shared(x.d) + SM80_LISTED;
    launch!(dev, AssignSm80, "recheck_sm80", T::SUFFIX, 2 * processors, SM80_ROWS, shared;
        &xs, &shape(x), &cs, &shape(c), &m.moved, &m.start, Nullable(&scale), &m.bounds, &k, &pitch, &padded,
        &copies, &metric, &mut *out.labels, &*out.list, &*out.listed, Nullable(&no_slack))
}

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

/// What its recheck adds for the rows of a tile and its queue.
const SM80_LISTED: usize = 8 * (SM80_ROWS + SM80_QUEUE) + 128;

/// Shared memory of a block of `assign_sm80.cu`: its ring, and chunks of rows, all of a tile's if they are not too many.
fn sm80_shared(d: usize) -> usize {
    let chunks = d.div_ceil(SM80_COLUMNS);
    let chunks = if chunks <= 8 { chunks.max(SM80_STAGES) } else { SM80_STAGES };
    2 * SM80_COLUMNS * (SM80_STAGES * SM80_CENTROIDS + chunks * SM80_ROWS) + 4 * SM80_STAGES * SM80_CENTROIDS
}

/// Centroids as tensor cores score them: see `kernels/tensor.cuh`.
struct Moved<T: Element> {
    moved: CudaSlice<T>,
    start: CudaSlice<f32>,
    scale: Option<CudaSlice<f32>>,
    bounds: CudaSlice<f32>,
    /// Elements from one centroid to the next, and centroids from one problem to the next in `start` and `scale`.
    pitch: usize,
    padded: usize,
    /// 1 if all problems share their centroids, else the number of problems.
    copies: usize,
}

/// Floats of `struct Bounds`.
const BOUNDS: usize = 5;

impl<T: Element> Moved<T> {
    fn new(dev: &CudaDevice, op: &'static str, cs: &CudaView<'_, T>, c: &Rows, metric: Metric) -> Result<Self> {
        let one = one_copy(c);
        let (copies, k, d) = (one.b, c.n, c.d);
        let (pitch, padded) = (d.next_multiple_of(8), k.next_multiple_of(TENSOR_CENTROIDS));
        let mut mu = alloc::<T>(dev, op, elements(&[copies, d]))?;
        let mut moved = alloc::<T>(dev, op, elements(&[copies, k, pitch]))?;
        let mut start = alloc::<f32>(dev, op, elements(&[copies, padded]))?;
        let scaled = metric == Metric::Cosine;
        let scale = scaled.then(|| alloc::<f32>(dev, op, elements(&[copies, padded]))).transpose()?;
        let mut bounds = zeros::<f32>(dev, op, elements(&[copies, BOUNDS]))?;
        let columns = elements(&[copies, d.div_ceil(WARP)]);
        let centred = metric == Metric::SquaredEuclidean;
        launch!(dev, Norms, "prepare_origin", T::SUFFIX, columns, WARP * WARP;
            cs, &shape(&one), &(centred as i32), &mut mu)?;
        let blocks = elements(&[copies, padded]).div_ceil(THREADS / WARP);
        {
            let scale = scale.as_ref().map(|s| s.slice(..));
            launch!(dev, Norms, "prepare_moved", T::SUFFIX, blocks, THREADS;
                cs, &shape(&one), &(metric as i32), &mu, &(pitch as i64), &(padded as i64), &mut moved, &mut start,
                Nullable(&scale), &mut bounds)?;
        }
        drop_duplicates(dev, op, cs, &one, padded, &mut start)?;
        Ok(Self { moved, start, scale, bounds, pitch, padded, copies })
    }
}

/// Lets no centroid win that repeats an earlier one.
fn drop_duplicates<T: Element>(
    dev: &CudaDevice,
    op: &'static str,
    cs: &CudaView<'_, T>,
    c: &Rows,
    padded: usize,
    start: &mut CudaSlice<f32>,
) -> Result<()> {
    let slots = 2 * c.n.next_power_of_two();
    let mut keys = zeros::<u64>(dev, op, elements(&[c.b, slots]))?;
    let mut first = zeros::<u32>(dev, op, elements(&[c.b, slots]))?;
    let mut slot = alloc::<u32>(dev, op, elements(&[c.b, c.n]))?;
    let blocks = elements(&[c.b, c.n]).div_ceil(THREADS / WARP);
    launch!(dev, Norms, "find_duplicates", T::SUFFIX, blocks, THREADS;
        cs, &shape(c), &mut keys, &mut first, &(slots as i64), &mut slot)?;
    launch!(dev, Norms, "drop_duplicates", T::SUFFIX, blocks, THREADS;
        cs, &shape(c), &(padded as i64), &mut keys, &mut first, &(slots as i64), &slot, start)
}

fn processors(dev: &CudaDevice) -> Result<usize> {
    let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(dev.cuda_stream().context().attribute(count).w()? as usize)
}

/// f32 rows by way of halves: `kernels/split.cu`. Rows are split a rectangle at a time, part of one problem or whole
/// problems, so that the halves take no more memory than [`SPLIT_BYTES`] and stay in L2 for the most part.
fn split_labels(dev: &CudaDevice, kernel: Assign, x: &Rows, c: &Rows, metric: Metric, out: Labels<'_>) -> Result<()> {
    const OP: &str = "labels";
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<f32>()?, cs.view::<f32>()?);
    let one = one_copy(c);
    let (copies, k, d) = (one.b, c.n, c.d);
    let (pitch, padded) = (d.next_multiple_of(32), k.next_multiple_of(TENSOR_CENTROIDS));
    let both = 2 * pitch;

    let mut mu = zeros::<f32>(dev, OP, elements(&[copies, d]))?;
    let mut largest = zeros::<f32>(dev, OP, copies)?;
    let mut moved = alloc::<half::f16>(dev, OP, elements(&[copies, k, both]))?;
    let mut start = alloc::<f32>(dev, OP, elements(&[copies, padded]))?;
    // For one half alone, then for both.
    let mut bounds = zeros::<f32>(dev, OP, elements(&[2, copies, BOUNDS]))?;
    if metric == Metric::SquaredEuclidean {
        launch!(dev, Norms, "prepare_means", "f32", elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            &cs, &shape(&one), &mut mu)?;
    }
    let of = metric as i32;
    let blocks = |warps: usize| warps.div_ceil(THREADS / WARP);
    launch!(dev, Split, "split_largest", "f32", blocks(elements(&[copies, k])), THREADS;
        &cs, &shape(&one), &of, &mu, &mut largest)?;
    launch!(dev, Split, "split_centroids", "f32", blocks(elements(&[copies, padded])), THREADS;
        &cs, &shape(&one), &of, &mu, &largest, &(pitch as i64), &(padded as i64), &mut moved, &mut start, &mut bounds)?;
    drop_duplicates(dev, OP, &cs, &one, padded, &mut start)?;

    let most = split_rows(d).min(elements(&[x.b, x.n]));
    let mut halves = alloc::<half::f16>(dev, OP, elements(&[most, both]))?;
    let (mut slack, mut slack_split) = (alloc::<f32>(dev, OP, most)?, alloc::<f32>(dev, OP, most)?);
    let (processors, stream) = (processors(dev)?, dev.cuda_stream());
    let (k64, pitch64, both64, padded64, copies64) =
        (k as i64, pitch as i64, both as i64, padded as i64, copies as i64);
    let mut first = 0;
    while first < x.b * x.n {
        let (b, row) = (first / x.n, first % x.n);
        let whole = x.n <= most;
        let (problems, rows) = if whole { ((most / x.n).min(x.b - b), x.n) } else { (1, most.min(x.n - row)) };
        let copy = if copies > 1 { b } else { 0 };
        let count = problems * rows;
        let lanes = (pitch / 8).next_power_of_two().clamp(4, WARP);
        launch!(dev, Split, "split_rows", "f32", blocks(count.div_ceil(WARP / lanes)).min(16 * processors), THREADS;
            &xs, &shape(x), &(first as i64), &(count as i64), &of, &mu, &largest, &bounds, &copies64, &pitch64,
            &mut halves, &mut slack, &mut slack_split)?;

        let part = Rows { b: problems, n: rows, ..x.clone() };
        let split = Rows { b: problems, n: rows, batch_stride: rows * both, row_stride: both, ..x.clone() };
        let (start, moved) = (start.slice(copy * padded..), moved.slice(copy * k * both..));
        let (high, low) = (bounds.slice(BOUNDS * copy..), bounds.slice(BOUNDS * (copies + copy)..));
        let mut labels = out.labels.slice_mut(first..);
        let mut list = out.list.slice_mut(2 * first..);
        let mut listed = out.listed.slice_mut(b..b + problems);
        stream.memset_zeros(&mut listed).w()?;
        let (no_scale, some_slack): (Option<CudaView<'_, f32>>, _) = (None, Some(slack.slice(..)));
        if kernel == Assign::Sm90 {
            let half = CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
            let (steps, groups) = sm90_shape(d);
            let (from, to) = (halves.device_ptr(&stream).0, moved.device_ptr(&stream).0);
            let row_map = TensorMap::new(half, from, [problems, rows, d], [rows * both, both], SM90_ROWS)?;
            let own = if copies > 1 { problems } else { 1 };
            let map = TensorMap::new(half, to, [own, k, d], [k * both, both], SM90_CENTROIDS)?;
            let tiles = elements(&[problems, rows.div_ceil(SM90_ROWS * groups)]).min(processors);
            launch!(dev, AssignSm90, SM90_NAMES[steps], "f16", tiles, 128 * (groups + 1), SM90_SHARED;
                &row_map, &map, &shape(&split), &start, Nullable(&no_scale), &high, &k64, &padded64, &copies64,
                Nullable(&some_slack), &mut labels, &mut list, &mut listed)?;
        } else {
            let (tiles, shared) = (elements(&[problems, rows.div_ceil(SM80_ROWS)]), sm80_shared(d));
            // The centroids are for the definition, which this pass leaves to the next.
            launch!(dev, AssignSm80, "assign_sm80", "f16", tiles, SM80_ROWS, shared;
                &halves, &shape(&split), &moved, &shape(&split), &moved, &start, Nullable(&no_scale), &high, &k64,
                &both64, &padded64, &copies64, &of, &mut labels, &mut list, &mut listed, Nullable(&some_slack))?;
        }
        let originals = xs.slice(b * x.batch_stride + row * x.row_stride..);
        let centroids = cs.slice(b * c.batch_stride..);
        let shared = sm80_shared(2 * d) + SM80_LISTED;
        launch!(dev, AssignSm80, "recheck_split_sm80", "f32", 2 * processors, SM80_ROWS, shared;
            &halves, &originals, &shape(&part), &centroids, &shape(c), &moved, &start, &low, &k64, &both64, &padded64,
            &copies64, &of, &mut labels, &mut list, &mut listed, &slack_split, &slack)?;
        first += count;
    }
    Ok(())
}

/// Centroids that all problems share as those of one.
fn one_copy(c: &Rows) -> Rows {
    Rows { b: if c.batch_stride == 0 { c.b.min(1) } else { c.b }, ..c.clone() }
}

/// Centroids as the filter scores them: moved by `mu` (or normalised), half their squares, and the largest norm.
struct Prepared<T: Element> {
    mu: CudaSlice<T::Filter>,
    moved: CudaSlice<T::Filter>,
    bias: CudaSlice<T::Filter>,
    largest: CudaSlice<f64>,
    /// 1 if all problems share their centroids, else the number of problems.
    copies: i64,
}

impl<T: Element> Prepared<T> {
    fn new(dev: &CudaDevice, op: &'static str, cs: &CudaView<'_, T>, c: &Rows, metric: Metric) -> Result<Self> {
        let one = one_copy(c);
        let (copies, k, d) = (one.b, c.n, c.d);
        let mut mu = zeros::<T::Filter>(dev, op, elements(&[copies, d]))?;
        let mut moved = alloc::<T::Filter>(dev, op, elements(&[copies, k, d]))?;
        let mut bias = alloc::<T::Filter>(dev, op, elements(&[copies, k]))?;
        let mut largest = zeros::<f64>(dev, op, copies)?;
        if metric == Metric::SquaredEuclidean {
            let tiles = elements(&[copies, d.div_ceil(WARP)]);
            launch!(dev, Norms, "prepare_means", T::SUFFIX, tiles, WARP * WARP; cs, &shape(&one), &mut mu)?;
        }
        let blocks = elements(&[copies, k]).div_ceil(THREADS / WARP);
        launch!(dev, Norms, "prepare_centroids", T::SUFFIX, blocks, THREADS;
            cs, &shape(&one), &(metric as i32), &mu, &mut moved, &mut bias, &mut largest)?;
        Ok(Self { mu, moved, bias, largest, copies: copies as i64 })
    }
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

pub(crate) fn lowest(keys: &Tensor) -> Result<Tensor> {
    const OP: &str = "lowest";
    let dev = device(keys)?;
    let (b, n) = keys.dims2()?;
    let chunks = n.div_ceil(PASS);
    let mut best = alloc::<f64>(dev, OP, elements(&[b, chunks]))?;
    let mut index = alloc::<u32>(dev, OP, elements(&[b, chunks]))?;
    let mut out = alloc::<u32>(dev, OP, b)?;
    let keys = read(keys);
    launch!(dev, Norms, "lowest_of_chunk", "", elements(&[b, chunks]), THREADS;
        &keys.view::<f64>()?, &(b as i64), &(n as i64), &(PASS as i64), &mut best, &mut index)?;
    launch!(dev, Norms, "lowest_of_problem", "", b, THREADS;
        &best, &index, &(b as i64), &(chunks as i64), &mut out)?;
    Ok(tensor(dev, out, b))
}
