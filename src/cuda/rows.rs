//! Passes over rows, each its own kernel of `kernels/rows.cu`: distances, norms, copies, and what is not finite.

use super::{
    device::device,
    kernel::launch,
    memory::{alloc, elements},
    params::{shape, Strided},
    tensors::{read, tensor, typed, write, DevicePtr, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    operand::{Readable, Target},
    rows::Rows,
    tiles::{PASS, THREADS},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{DeviceRepr, PushKernelArg},
        CudaDType, CudaDevice,
    },
    DType, Tensor,
};

/// The elements of `t`, its last dimension widened to `pitch` by zeros.
pub(super) fn copy_strided<T: CudaDType + DeviceRepr>(
    dev: &CudaDevice,
    t: &(impl Readable + ?Sized),
    pitch: usize,
    to: DevicePtr<T>,
) -> Result<()> {
    let (from, last) = (Strided::of(t.layout())?, t.dims()[t.dims().len() - 1]);
    let cells = elements(&[t.elem_count() / last.max(1), pitch]);
    let name = match size_of::<T>() {
        1 => "copy_1",
        2 => "copy_2",
        4 => "copy_4",
        _ => "copy_8",
    };
    let input = read(t);
    launch!(dev, Rows, name, "", cells.div_ceil(THREADS), THREADS;
        &input.view::<T>()?, &from, &(cells as i64), &(pitch as i64), &to)
}

/// The same elements side by side.
pub(crate) fn contiguous(t: &dyn Readable) -> Result<Option<Tensor>> {
    fn copied<T: CudaDType + DeviceRepr>(t: &dyn Readable) -> Result<Option<Tensor>> {
        let dev = device(t)?;
        let out = tensor(dev, alloc::<T>(dev, "contiguous", t.elem_count())?, t.dims());
        write::<T>(&out, |to| copy_strided(dev, t, t.dims()[t.dims().len() - 1], to))?;
        Ok(Some(out))
    }
    match t.dtype() {
        DType::U8 => copied::<u8>(t),
        DType::U32 => copied::<u32>(t),
        DType::I64 => copied::<i64>(t),
        DType::F16 => copied::<half::f16>(t),
        DType::BF16 => copied::<half::bf16>(t),
        DType::F32 => copied::<f32>(t),
        DType::F64 => copied::<f64>(t),
        _ => Ok(None),
    }
}

pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "distances", rows)?;
        let (xs, cs, labels) = (read(&x.operand), read(&c.operand), read(labels));
        launch!(dev, Rows, "distances", T::SUFFIX, rows.div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), &cs.view::<T>()?, &shape(c), &labels.view::<u32>()?, &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}

pub(crate) fn gather(x: &Rows, index: &dyn Readable, to: Target<'_>) -> Result<()> {
    typed!(x.dtype(), T => write::<T>(to, |to| {
        let dev = device(&x.operand)?;
        let (b, m) = (index.dims()[0], index.dims()[1]);
        let (xs, index) = (read(&x.operand), read(index));
        let rows = rows_of_a_pass(x.d);
        launch!(dev, Rows, "gather", T::SUFFIX, elements(&[b, m.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &index.view::<u32>()?, &(m as i64), &(rows as i64), &to)
    }))
}

/// Rows that one block passes over.
pub(super) fn rows_of_a_pass(d: usize) -> usize {
    (PASS / d).max(1)
}

pub(crate) fn max_abs_and_first_nonfinite(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let mut max_abs = alloc::<f64>(dev, "scan", x.b)?;
        let mut first_nonfinite = alloc::<u32>(dev, "scan", x.b)?;
        launch!(dev, Rows, "scan_start", "", x.b.div_ceil(THREADS), THREADS;
            &(x.b as i64), &mut max_abs, &mut first_nonfinite)?;
        let xs = read(&x.operand);
        let rows = rows_of_a_pass(x.d);
        launch!(dev, Rows, "scan", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &(rows as i64), &mut max_abs, &mut first_nonfinite)?;
        Ok((tensor(dev, max_abs, x.b), tensor(dev, first_nonfinite, x.b)))
    })
}

pub(crate) fn min_magnitude(x: &Rows) -> Result<Tensor> {
    let least = Tensor::full(f64::INFINITY, x.b, x.device())?;
    typed!(x.dtype(), T => write::<f64>(&least, |least| {
        let (dev, xs, rows) = (device(&x.operand)?, read(&x.operand), rows_of_a_pass(x.d));
        launch!(dev, Rows, "min_magnitude", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &(rows as i64), &least)
    }))?;
    Ok(least)
}

pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "norms", rows)?;
        let xs = read(&x.operand);
        launch!(dev, Rows, "norms", T::SUFFIX, rows.div_ceil(THREADS), THREADS; &xs.view::<T>()?, &shape(x), &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}
