//! Candle's ops on tensors of any size: its kernels on a GPU count elements in 32 bits, so larger ones go to them in pieces.

use super::on;
use crate::{
    error::{Error, Result},
    host,
    operand::{Operand, Readable, COUNTED},
    problem,
    rows::Rows,
};
use candle_core::{backend::BackendDevice, backend::BackendStorage, Device, Layout, Storage, Tensor};

/// Whether Candle's kernels reach all elements of `t`. On the CPU they do.
fn counted(t: &impl Readable) -> bool {
    let strides = t.layout().stride();
    let steps = t.dims().iter().zip(strides).map(|(&size, &stride)| size.saturating_sub(1).saturating_mul(stride));
    t.device().is_cpu() || t.elem_count().max(steps.fold(1, usize::saturating_add)) <= COUNTED
}

/// Refuses what only Candle's ops would work on, and would not reach the end of.
pub(crate) fn check_counted(argument: &'static str, t: &Tensor) -> Result<()> {
    match counted(t) {
        true => Ok(()),
        false => Err(Error::TooLarge { argument, got: t.elem_count(), limit: COUNTED }),
    }
}

/// The same for a tensor of a shape that is to be made.
pub(crate) fn check_count(argument: &'static str, shape: Vec<usize>, device: &Device) -> Result<()> {
    let got = shape.into_iter().fold(1, usize::saturating_mul);
    match device.is_cpu() || got <= COUNTED {
        true => Ok(()),
        false => Err(Error::TooLarge { argument, got, limit: COUNTED }),
    }
}

/// The same elements side by side, however many they are.
pub(crate) fn contiguous(t: &Tensor) -> Result<Tensor> {
    let copy = match t.is_contiguous() || counted(t) {
        true => None,
        false => on(t.device(), "contiguous")?.contiguous(t)?,
    };
    Ok(copy.map_or_else(|| t.contiguous(), Ok)?)
}

/// The elements of `t` as tensors of one dimension that Candle's kernels reach the end of.
pub(crate) fn pieces(t: &Tensor) -> Result<Vec<Tensor>> {
    let (flat, count) = (contiguous(t)?.flatten_all()?, t.elem_count());
    let each = if t.device().is_cpu() { count.max(1) } else { COUNTED };
    Ok((0..count)
        .step_by(each)
        .map(|at| flat.narrow(0, at, each.min(count - at)))
        .collect::<candle_core::Result<_>>()?)
}

/// Applies `f` to tensors of one shape, element by element: piece by piece if they are many, for which no gradient flows.
pub(crate) fn elementwise<const N: usize>(
    inputs: [&Tensor; N],
    f: impl Fn([&Tensor; N]) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    if inputs.iter().all(|&t| counted(t)) {
        return Ok(f(inputs)?);
    }
    let mut parts = inputs.iter().map(|t| Ok(pieces(t)?.into_iter())).collect::<Result<Vec<_>>>()?;
    let (mut out, mut at) = (None, 0);
    while parts[0].len() > 0 {
        let of_inputs: [Tensor; N] = std::array::from_fn(|input| parts[input].next().expect("as many of each"));
        let part = f(of_inputs.each_ref())?;
        let out = match &mut out {
            Some(out) => out,
            none => none.insert(Tensor::zeros(inputs[0].elem_count(), part.dtype(), part.device())?),
        };
        out.slice_set(&part, 0, at)?;
        at += part.elem_count();
    }
    Ok(out.expect("many elements").reshape(inputs[0].shape())?)
}

/// Puts the elements of `from` in the place of those of contiguous `to`, of the same shape.
pub(crate) fn overwrite(to: &Tensor, from: &Tensor) -> Result<()> {
    for (to, from) in pieces(to)?.iter().zip(pieces(from)?) {
        to.slice_set(&from, 0, 0)?;
    }
    Ok(())
}

/// [`contiguous`] for an operand: of what Candle has locked, the storage is copied.
pub(crate) fn contiguous_operand<'a>(o: &Operand<'a>) -> Result<Operand<'a>> {
    fn copied<S>(from: &S, layout: &Layout) -> Result<S>
    where
        S: BackendStorage<Device: BackendDevice<Storage = S>>,
    {
        // SAFETY: the copy writes every element before any is read.
        let mut to = unsafe { from.device().alloc_uninit(layout.shape(), from.dtype()) }?;
        from.copy_strided_src(&mut to, 0, layout)?;
        Ok(to)
    }
    if o.elem_count() == 0 {
        return Ok(Operand::Tensor(problem::empty(o.dims(), o.dtype(), &o.device())?));
    }
    if o.layout().is_contiguous() {
        return Ok(o.clone());
    }
    host::room("copy", o.elem_count(), o.dtype(), &o.device())?;
    if !counted(o) {
        if let Some(copy) = on(&o.device(), "contiguous")?.contiguous(o)? {
            return Ok(Operand::Tensor(copy));
        }
    }
    Ok(Operand::Tensor(match o {
        Operand::Tensor(t) => t.contiguous()?,
        Operand::Cpu(s, layout) => Tensor::from((Storage::Cpu(copied(*s, layout)?), layout.shape())),
        Operand::Cuda(s, layout) => Tensor::from((Storage::Cuda(copied(*s, layout)?), layout.shape())),
    }))
}

/// The same elements in a storage that nobody else has.
pub(crate) fn copy(t: &Tensor) -> Result<Tensor> {
    if t.elem_count() == 0 {
        return problem::empty(t.dims(), t.dtype(), t.device());
    }
    host::room("copy", t.elem_count(), t.dtype(), t.device())?;
    Ok(if t.is_contiguous() { t.force_contiguous()? } else { contiguous(t)? })
}

impl Rows<'static> {
    /// Views `t`, of shape `(..batch, n, d)`, or a copy of it. No gradient flows.
    pub fn new(t: &Tensor) -> Result<Self> {
        Self::from_operand(&t.into())
    }
}

impl<'a> Rows<'a> {
    /// Views an operand of shape `(..batch, n, d)`, or a copy of it.
    pub fn from_operand(o: &Operand<'a>) -> Result<Self> {
        let viewed = if o.elem_count() == 0 { None } else { Self::of(o.clone()) };
        match viewed {
            Some(rows) => Ok(rows),
            None => Ok(Self::of(contiguous_operand(o)?).expect("a contiguous tensor folds")),
        }
    }
}
