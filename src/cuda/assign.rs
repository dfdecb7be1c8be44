//! Labels, distances, and the per-row passes around them: `kernels/assign_simt.cu` and `kernels/norms.cu`.

use super::{alloc, device, elements, launch, read, shape, tensor, typed, zeros, Element, Nullable};
use crate::{
    problem::Rows,
    rng::Draw,
    tiles::{PASS, RECHECK_BLOCKS, SIMT_ROWS, THREADS},
    Metric, Result,
};
use candle_core::cuda_backend::{
    cudarc::driver::{CudaSlice, CudaView, PushKernelArg},
    CudaDevice,
};
use candle_core::Tensor;

/// Lanes of a warp.
const WARP: usize = 32;

pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => labels_of::<T>(x, c, metric))
}

/// FlashAssign: one pass that proves most labels, one that settles the rest. Scratch beyond [`Prepared`]: 4 bytes a row.
fn labels_of<T: Element>(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    const OP: &str = "labels";
    let dev = device(&x.tensor)?;
    let mut labels = alloc::<u32>(dev, OP, elements(&[x.b, x.n]))?;
    let mut list = alloc::<u32>(dev, OP, elements(&[x.b, x.n]))?;
    let mut listed = zeros::<u32>(dev, OP, x.b)?;
    let (xs, cs) = (read(&x.tensor), read(&c.tensor));
    let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
    let p = Prepared::new(dev, OP, &cs, c, metric)?;
    let (tiles, block) = (elements(&[x.b, x.n.div_ceil(SIMT_ROWS)]), THREADS);
    if metric == Metric::Manhattan {
        launch!(dev, AssignSimt, "assign_simt_manhattan", T::SUFFIX, tiles, block;
            &xs, &shape(x), &(c.n as i64), &p.mu, &p.moved, &p.bias, &p.largest, &p.copies, &(metric as i32),
            &mut labels, &mut list, &mut listed)?;
    } else {
        launch!(dev, AssignSimt, "assign_simt_dot", T::SUFFIX, tiles, block;
            &xs, &shape(x), &(c.n as i64), &p.mu, &p.moved, &p.bias, &p.largest, &p.copies, &(metric as i32),
            &mut labels, &mut list, &mut listed)?;
    }
    let blocks = elements(&[x.b, x.n.div_ceil(THREADS / WARP)]).min(RECHECK_BLOCKS);
    launch!(dev, AssignSimt, "recheck", T::SUFFIX, blocks, THREADS;
        &xs, &shape(x), &cs, &shape(c), &p.mu, &p.moved, &p.bias, &p.largest, &p.copies, &(metric as i32),
        &mut labels, &list, &listed)?;
    Ok(tensor(dev, labels, (x.b, x.n)))
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
        let copies = if c.batch_stride == 0 { c.b.min(1) } else { c.b };
        let (k, d) = (c.n, c.d);
        let one = Rows { b: copies, ..c.clone() };
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
