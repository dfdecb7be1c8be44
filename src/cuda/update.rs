//! Sort-Inverse Update: `kernels/sort.cu` and `kernels/update.cu`.

use super::{alloc, device, elements, launch, read, shape, tensor, typed, zeros, Element, Nullable};
use crate::{
    problem::Rows,
    tiles::{MEDIAN_COLUMNS, PASS, SCAN_SPAN, SCAN_THREADS, SORT_ROWS, SUM_COLUMNS, SUM_ROWS, THREADS},
    Metric, Result,
};
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::Tensor;

/// Lanes of a warp.
const WARP: usize = 32;

/// Scratch: 4 bytes for each of `k * chunks` (about n, or k if that is more) counts of a problem.
pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    const OP: &str = "order";
    let dev = device(labels)?;
    let (b, n) = labels.dims2()?;
    let rows = SORT_ROWS.max(k);
    let chunks = n.div_ceil(rows);
    let cells = elements(&[k, chunks]);
    let spans = cells.div_ceil(SCAN_SPAN);
    let mut order = zeros::<u32>(dev, OP, elements(&[b, n]))?;
    let mut offsets = zeros::<u32>(dev, OP, elements(&[b, k + 1]))?;
    let mut counts = zeros::<u32>(dev, OP, elements(&[b, cells]))?;
    let mut totals = alloc::<u32>(dev, OP, elements(&[b, spans]))?;
    let labels = read(labels);
    let labels = labels.view::<u32>()?;
    let [sb, sn, sk, srows, schunks, scells, sspans, span] =
        [b, n, k, rows, chunks, cells, spans, SCAN_SPAN].map(|size| size as i64);
    if n > 0 {
        launch!(dev, Sort, "order_histogram", "", elements(&[b, chunks]), THREADS;
            &labels, &sb, &sn, &sk, &srows, &mut counts)?;
        launch!(dev, Sort, "order_scan_spans", "", elements(&[b, spans]), SCAN_THREADS;
            &mut counts, &sb, &scells, &span, &mut totals)?;
        launch!(dev, Sort, "order_scan_totals", "", b, SCAN_THREADS; &mut totals, &sb, &sspans, &sk, &mut offsets)?;
        launch!(dev, Sort, "order_begin", "", elements(&[b, k]).div_ceil(THREADS), THREADS;
            &counts, &totals, &sb, &sk, &schunks, &span, &mut offsets)?;
        launch!(dev, Sort, "order_scatter", "", elements(&[b, chunks]).div_ceil(THREADS / WARP), THREADS;
            &labels, &sb, &sn, &sk, &srows, &span, &mut counts, &totals, &mut order)?;
    }
    Ok((tensor(dev, order, (b, n)), tensor(dev, offsets, (b, k + 1))))
}

pub(crate) fn sums(
    x: &Rows,
    factor: Option<&Tensor>,
    order: Option<&Tensor>,
    offsets: &Tensor,
    max_abs: &Tensor,
) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let k = offsets.dims2()?.1 - 1;
        let mut out = zeros::<i64>(dev, "sums", elements(&[x.b, k, x.d, 2]))?;
        let (xs, offsets, max_abs) = (read(&x.tensor), read(offsets), read(max_abs));
        let (factor, order) = (factor.map(read), order.map(read));
        let factor = factor.as_ref().map(|f| f.view::<f64>()).transpose()?;
        let order = order.as_ref().map(|o| o.view::<u32>()).transpose()?;
        let runs = SUM_COLUMNS / x.d.min(SUM_COLUMNS);
        let tiles = elements(&[x.b, x.n.div_ceil(runs * SUM_ROWS), x.d.div_ceil(SUM_COLUMNS)]);
        launch!(dev, Update, "sums", T::SUFFIX, tiles, SUM_COLUMNS;
            &xs.view::<T>()?, &shape(x), Nullable(&factor), Nullable(&order), &offsets.view::<u32>()?, &(k as i64),
            &max_abs.view::<f64>()?, &mut out)?;
        Ok(tensor(dev, out, (x.b, k, x.d, 2)))
    })
}

pub(crate) fn totals(sums: &Tensor, max_abs: &Tensor, n: usize) -> Result<Tensor> {
    let dev = device(sums)?;
    let (b, k, d, _) = sums.dims4()?;
    let cells = elements(&[k, d]);
    let mut out = alloc::<f64>(dev, "totals", elements(&[b, cells]))?;
    let (sums, max_abs) = (read(sums), read(max_abs));
    launch!(dev, Update, "totals_f64", "", elements(&[b, cells]).div_ceil(THREADS), THREADS;
        &sums.view::<i64>()?, &max_abs.view::<f64>()?, &(n as i64), &(b as i64), &(cells as i64), &mut out)?;
    Ok(tensor(dev, out, (b, k, d)))
}

pub(crate) fn means(totals: &Tensor, weight: &Tensor, old: &Rows, done: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(old.dtype(), T => {
        let dev = device(totals)?;
        let (b, k, d) = totals.dims3()?;
        let mut out = alloc::<T>(dev, "means", elements(&[b, k, d]))?;
        let (totals, weight, olds, done) = (read(totals), read(weight), read(&old.tensor), read(done));
        launch!(dev, Update, "means", T::SUFFIX, elements(&[b, k]).div_ceil(THREADS / WARP), THREADS;
            &totals.view::<f64>()?, &weight.view::<f64>()?, &olds.view::<T>()?, &shape(old), &done.view::<u8>()?,
            &(metric as i32), &mut out)?;
        Ok(tensor(dev, out, (b, k, d)))
    })
}

pub(crate) fn medians(
    x: &Rows,
    weights: Option<(&Tensor, &Tensor)>,
    order: &Tensor,
    offsets: &Tensor,
    old: &Rows,
    done: &Tensor,
) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.tensor)?;
        let (b, k, d) = (x.b, old.n, x.d);
        let mut out = alloc::<T>(dev, "medians", elements(&[b, k, d]))?;
        let (xs, olds, order, offsets, done) =
            (read(&x.tensor), read(&old.tensor), read(order), read(offsets), read(done));
        let weights = weights.map(|(w, max)| (read(w), read(max)));
        let max = weights.as_ref().map(|(_, max)| max.view::<f64>()).transpose()?;
        let weights = weights.as_ref().map(|(w, _)| w.view::<f64>()).transpose()?;
        launch!(dev, Update, "medians", T::SUFFIX, elements(&[b, k, d.div_ceil(MEDIAN_COLUMNS)]), THREADS;
            &xs.view::<T>()?, &shape(x), Nullable(&weights), Nullable(&max), &order.view::<u32>()?,
            &offsets.view::<u32>()?, &olds.view::<T>()?, &shape(old), &done.view::<u8>()?, &mut out)?;
        Ok(tensor(dev, out, (b, k, d)))
    })
}

pub(crate) fn shift(new: &Rows, old: &Rows) -> Result<Tensor> {
    typed!(new.dtype(), T => {
        let dev = device(&new.tensor)?;
        let mut out = zeros::<f64>(dev, "shift", new.b)?;
        let (news, olds) = (read(&new.tensor), read(&old.tensor));
        launch!(dev, Update, "shift", T::SUFFIX, elements(&[new.b, new.n]).div_ceil(THREADS), THREADS;
            &news.view::<T>()?, &shape(new), &olds.view::<T>()?, &shape(old), &mut out)?;
        Ok(tensor(dev, out, new.b))
    })
}

pub(crate) fn converged(
    done: &Tensor,
    old: &Tensor,
    new: &Tensor,
    shift: &Tensor,
    threshold: &Tensor,
) -> Result<Tensor> {
    const OP: &str = "converged";
    let dev = device(done)?;
    let (b, n) = old.dims2()?;
    let mut differ = zeros::<u32>(dev, OP, b)?;
    let mut out = alloc::<u8>(dev, OP, b)?;
    let (done, old, new, shift, threshold) = (read(done), read(old), read(new), read(shift), read(threshold));
    launch!(dev, Update, "converged_labels", "", elements(&[b, n.div_ceil(PASS)]), THREADS;
        &old.view::<u32>()?, &new.view::<u32>()?, &(b as i64), &(n as i64), &(PASS as i64), &mut differ)?;
    launch!(dev, Update, "converged_problems", "", b.div_ceil(THREADS), THREADS;
        &done.view::<u8>()?, &differ, &shift.view::<f64>()?, &threshold.view::<f64>()?, &(b as i64), &mut out)?;
    Ok(tensor(dev, out, b))
}
