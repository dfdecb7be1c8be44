//! Exact labels: the kernels of `kernels/assign/`, and rows where they can read them.

pub(crate) mod near;
mod simt;
mod split;
pub(crate) mod tensor_core;

use super::{
    device::device,
    kernel::launch,
    memory::{alloc, elements, Memory},
    params::shape,
    rows::{copy_strided, rows_of_a_pass},
    tensors::{read, tensor, typed, write, Element},
};
use crate::{error::Result, operand::Target, plan::assign::Assign, request::Assignment, rows::Rows, tiles::THREADS};
use candle_core::{
    cuda_backend::{cudarc::driver::PushKernelArg, CudaDevice},
    Tensor,
};

/// FlashAssign: one pass that proves most labels, one that settles the rest. Scratch beyond the prepared centroids: 8
/// bytes a row.
pub(crate) fn assign_into(a: Assignment<'_>, labels: Target<'_>, memory: &Memory) -> Result<()> {
    let Assignment { plan, x, .. } = a;
    if x.b == 0 || x.n == 0 {
        return Ok(());
    }
    let dev = device(&x.operand)?;
    typed!(x.dtype(), T => write(labels, |to| match (plan.kernel, T::HALF) {
        (Assign::Sm80 | Assign::Small | Assign::Sm90 | Assign::WideSm90, Some(half)) => {
            let packed = if plan.pack { Some(packed::<T>(dev, x)?) } else { None };
            let a = Assignment { x: packed.as_ref().unwrap_or(x), ..a };
            tensor_core::assign::<T>(dev, half, a, to, memory)
        }
        (Assign::Sm80 | Assign::Sm90 | Assign::WideSm90, None) => split::assign(dev, a, to, memory),
        (Assign::Narrow, _) => simt::assign_narrow::<T>(dev, a, to),
        _ => simt::assign::<T>(dev, a, to, memory),
    }))
}

/// The rows of `x` in `copy`, `(b, n, pitch)`.
pub(crate) fn pack(x: &Tensor, pitch: usize, copy: &mut Option<Tensor>) -> Result<Rows<'static>> {
    let (dev, rank) = (device(x)?, x.rank());
    let (b, n, d) = (x.dims()[..rank - 2].iter().product(), x.dims()[rank - 2], x.dims()[rank - 1]);
    typed!(x.dtype(), T => {
        // The rows of the last run were in the same place, which a captured run looks for.
        let to = match copy.take().filter(|kept| kept.dims() == [b, n, pitch]) {
            Some(kept) => kept,
            None => tensor(dev, alloc::<T>(dev, "pack", elements(&[b, n, pitch]))?, (b, n, pitch)),
        };
        match Rows::of(x.into()) {
            Some(rows) => pack_into::<T>(dev, &rows, &to)?,
            None => write::<T>(&to, |to| copy_strided(dev, x, pitch, to))?,
        }
        Ok(first_columns(copy.insert(to), d)?)
    })
}

/// A copy of the rows in multiples of eight columns.
fn packed<T: Element>(dev: &CudaDevice, x: &Rows) -> Result<Rows<'static>> {
    let shape = (x.b, x.n, x.d.next_multiple_of(8));
    let to = tensor(dev, alloc::<T>(dev, "pack", elements(&[shape.0, shape.1, shape.2]))?, shape);
    pack_into::<T>(dev, x, &to)?;
    first_columns(&to, x.d)
}

/// Rows side by side in `(b, n, pitch)`.
fn pack_into<T: Element>(dev: &CudaDevice, x: &Rows, to: &Tensor) -> Result<()> {
    let pitch = to.dim(2)?;
    let (xs, rows) = (read(&x.operand), rows_of_a_pass(pitch));
    write::<T>(to, |to| {
        launch!(dev, Prepare, "pack", T::SUFFIX, elements(&[x.b, x.n.div_ceil(rows)]), THREADS;
            &xs.view::<T>()?, &shape(x), &(pitch as i64), &(rows as i64), &to)
    })
}

/// The first `d` columns of packed rows.
fn first_columns(packed: &Tensor, d: usize) -> Result<Rows<'static>> {
    Ok(Rows::of((&packed.narrow(2, 0, d)?).into()).expect("columns of packed rows are rows"))
}
