//! A view of an operand as rows, which every op takes.

use crate::{
    error::Result,
    operand::{Operand, Readable},
};
use candle_core::{DType, Device};

/// `b` matrices of `n` rows and `d` columns inside a tensor, columns next to each other.
///
/// Any tensor whose batch dimensions share one stride and whose columns are adjacent is viewed in place (a transposed
/// `(b, s, h, d)` cache, a narrowed one, a broadcast one); any other layout is copied once.
#[derive(Clone, Debug)]
pub(crate) struct Rows<'a> {
    pub operand: Operand<'a>,
    pub device: Device,
    /// Strides are in elements, from the operand's first one.
    pub batch_stride: usize,
    pub row_stride: usize,
    pub b: usize,
    pub n: usize,
    pub d: usize,
}

impl<'a> Rows<'a> {
    /// Views an operand of shape `(..batch, n, d)`, if its layout is one of rows.
    pub fn of(operand: Operand<'a>) -> Option<Self> {
        let (dims, strides, device) = (operand.dims(), operand.layout().stride(), operand.device());
        let batch = dims.len() - 2;
        let b = dims[..batch].iter().fold(1, |b: usize, &size| b.saturating_mul(size));
        let (n, d) = (dims[batch], dims[batch + 1]);
        if operand.elem_count() == 0 {
            return Some(Self { operand, device, batch_stride: 0, row_stride: d, b, n, d });
        }
        if strides[batch + 1] != 1 && d != 1 {
            return None;
        }
        // Fold the batch dimensions from the innermost one: each must step over the whole of the ones inside it.
        let mut folded: Option<(usize, usize)> = None;
        for (&size, &stride) in dims[..batch].iter().zip(&strides[..batch]).rev().filter(|(&size, _)| size != 1) {
            folded = match folded {
                None => Some((size, stride)),
                Some((inner, step)) if stride == inner * step => Some((inner * size, step)),
                Some(_) => return None,
            };
        }
        let (batch_stride, row_stride) = (folded.map_or(0, |(_, step)| step), strides[batch]);
        Some(Self { operand, device, batch_stride, row_stride, b, n, d })
    }

    /// Problem `b` alone.
    pub fn one(&self, mut b: usize) -> Result<Self> {
        let mut one = self.operand.clone();
        for dim in (0..one.dims().len() - 2).rev() {
            let size = one.dims()[dim];
            one = one.narrow(dim, b % size, 1)?;
            b /= size;
        }
        Ok(Self::of(one).expect("a problem lies in rows as all of them do"))
    }

    /// The same matrix for each of `b` problems, when this one has no batch of its own.
    pub fn broadcast(mut self, b: usize) -> Self {
        if self.b == 1 && b != 1 {
            (self.b, self.batch_stride) = (b, 0);
        }
        self
    }

    /// Each row as a problem of its own, `(..batch, n, 1, d)`.
    pub fn each(&self) -> Result<Operand<'a>> {
        Ok(self.operand.unsqueeze(self.operand.dims().len() - 1)?)
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn dtype(&self) -> DType {
        self.operand.dtype()
    }
}

/// Whether rows of `t`, of shape `(..batch, n, d)`, start at multiples of eight elements, in steps that tell them apart.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) fn in_eights(t: &impl Readable) -> bool {
    in_steps(t, 8)
}

fn in_steps(t: &impl Readable, of: usize) -> bool {
    let (last, dims, strides) = (t.dims().len() - 1, t.dims(), t.layout().stride());
    let whole = |step: usize| step > 0 && step.is_multiple_of(of);
    let steps = strides[..last].iter().zip(dims).all(|(&step, &size)| size == 1 || whole(step));
    steps && (strides[last] == 1 || dims[last] == 1) && t.layout().start_offset().is_multiple_of(of)
}

/// The alignment of rows, by which kernels can or cannot read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowLayout {
    /// All begin at multiples of so many elements: 1, 2, 4 or 8; 0 where steps do not tell them apart.
    pub alignment: usize,
    /// Elements from one to the next.
    pub stride: usize,
}

impl RowLayout {
    /// Rows side by side in memory of their own, `stride` apart.
    pub fn packed(stride: usize) -> Self {
        let alignment = ALIGNMENTS.into_iter().find(|&of| stride.is_multiple_of(of)).unwrap_or(1);
        Self { alignment, stride }
    }

    /// Whether all begin at multiples of so many elements, a power of two up to eight.
    pub fn is_aligned(self, to: usize) -> bool {
        self.alignment >= to
    }
}

/// The alignments that kernels ask for, and fewer, in elements.
const ALIGNMENTS: [usize; 4] = [8, 4, 2, 1];

impl Rows<'_> {
    /// The layout of the rows.
    pub fn layout(&self) -> RowLayout {
        let alignment = ALIGNMENTS.into_iter().find(|&of| in_steps(&self.operand, of)).unwrap_or(0);
        RowLayout { alignment, stride: self.row_stride }
    }
}
