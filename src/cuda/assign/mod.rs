//! Exact labels: which kernel of `kernels/assign_*.cu` finds them, and rows where it can read them.

mod simt;
mod split;
pub(crate) mod tensor_core;

use super::{
    device::{arch, device},
    kernel::launch,
    memory::{alloc, elements, Memory},
    params::shape,
    rows::{copy_strided, rows_of_a_pass},
    tensors::{read, tensor, typed, write, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    operand::Target,
    plan::assign::Assign,
    request::Assignment,
    rows::{in_eights, Rows},
    tiles::THREADS,
};
use candle_core::{
    cuda_backend::{cudarc::driver::PushKernelArg, CudaDevice},
    Tensor,
};

/// FlashAssign: one pass that proves most labels, one that settles the rest. Scratch beyond the prepared centroids: 8
/// bytes a row.
pub(crate) fn assign_into(a: Assignment<'_>, labels: Target<'_>, memory: &Memory) -> Result<()> {
    let Assignment { x, c, metric, .. } = a;
    if x.b == 0 || x.n == 0 {
        return Ok(());
    }
    let dev = device(&x.operand)?;
    let kernel = Assign::choose(x.dtype(), metric, [x.b, x.n, c.n, x.d], arch(dev)?);
    typed!(x.dtype(), T => write(labels, |to| match (kernel, T::HALF) {
        (Assign::Sm80 | Assign::Small | Assign::Sm90, Some(half)) => {
            let x = pack::<T>(dev, x)?;
            tensor_core::assign::<T>(dev, kernel, half, Assignment { x: &x, ..a }, to, memory)
        }
        (Assign::Sm80 | Assign::Sm90, None) => split::assign(dev, kernel, a, to, memory),
        (Assign::Narrow, _) => simt::assign_narrow::<T>(dev, a, to),
        _ => simt::assign::<T>(dev, a, to, memory),
    }))
}

/// The rows as they lie, or where the kernel can read them, in `copy`: of eight columns each if it reads such.
pub(crate) fn pack_for_assign(
    x: &Tensor,
    k: usize,
    metric: Metric,
    copy: &mut Option<Tensor>,
) -> Result<Rows<'static>> {
    let dev = device(x)?;
    let (rank, view) = (x.rank(), Rows::of(x.into()));
    let (b, n, d) = (x.dims()[..rank - 2].iter().product(), x.dims()[rank - 2], x.dims()[rank - 1]);
    let eights = Assign::choose(x.dtype(), metric, [b, n, k, d], arch(dev)?).in_eights(x.dtype());
    let pitch = if eights { d.next_multiple_of(8) } else { d };
    match view {
        Some(rows) if !eights || in_eights(&rows.operand) || x.elem_count() == 0 => Ok(rows),
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
            Ok(first_columns(copy.insert(to), d)?)
        }),
    }
}

/// The rows themselves, or a copy in multiples of eight columns.
fn pack<'a, T: Element>(dev: &CudaDevice, x: &Rows<'a>) -> Result<Rows<'a>> {
    if in_eights(&x.operand) || x.b == 0 || x.n == 0 {
        return Ok(x.clone());
    }
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
