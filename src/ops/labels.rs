//! Labels as the ops take them, checked, and rows that are reduced by them.

use super::bind::Made;
use crate::{
    error::{Error, Result},
    memory::Memory,
    operand::{Operand, Readable, Target},
    primitives,
    problem::{self, Problem},
    request::{Labels, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Shape, Tensor, D};

/// Rows and their labels, which are not known to be below `k`.
pub(crate) struct Labelled<'a> {
    pub p: Problem,
    x: Operand<'a>,
    /// `(b, n)`, contiguous.
    labels: Operand<'a>,
}

impl<'a> Labelled<'a> {
    pub fn new(x: &Operand<'a>, labels: &Operand<'a>, k: usize) -> Result<Self> {
        problem::labels(labels, k)?;
        let p = Problem::rows(x, k)?;
        problem::check_device("labels", labels, &x.device())?;
        check_labels_of(&p, labels)?;
        Ok(Self { p, x: x.clone(), labels: flat_labels(labels, k)? })
    }

    pub fn check(&self) -> Result<()> {
        check_labels(&self.labels, self.p.k)
    }

    /// The sums or means of clusters; zeros of those without rows.
    pub fn reduce(&self, reduction: Reduction) -> Result<Made> {
        let shape = Shape::from(self.p.shape(&[self.p.k, self.p.d]));
        let mut reduced = primitives::allocate("clusters", shape.elem_count(), self.p.dtype, &self.x.device())?;
        primitives::zero(Target::whole(&mut reduced, &shape))?;
        self.reduce_to(Target::whole(&mut reduced, &shape), reduction)?;
        Ok((reduced, shape))
    }

    /// The same in the place of what is there, which stays for clusters without rows.
    pub fn reduce_to(&self, to: Target<'_>, reduction: Reduction) -> Result<()> {
        let x = Rows::from_operand(&self.x)?;
        let (summands, labels) = (Summands::unsearched(&x)?, Some(Labels::Unsorted(&self.labels)));
        primitives::update(&Update::new(&x, &summands, labels, reduction, self.p.k)?, to, &Memory::default())
    }

    /// The rows of clusters' gradients, `(..batch, k, d)`, that the labels name, shaped as the rows.
    pub fn spread(
        x: &Tensor,
        labels: &Tensor,
        grad: &Tensor,
        k: usize,
        reduction: Reduction,
    ) -> Result<Option<Tensor>> {
        let labels = flat_labels(&labels.into(), k)?;
        let (b, d) = (labels.dims()[0], x.dim(D::Minus1)?);
        let mut each = grad.reshape((b, k, d))?;
        if reduction == Reduction::Mean {
            // An empty cluster has no rows to pass a gradient to; its infinite share is never gathered.
            let (_, offsets) = primitives::sorted(&labels, k)?;
            let share = primitives::cluster_sizes(&offsets)?.to_dtype(DType::F64)?.recip()?.unsqueeze(2)?;
            each = each.to_dtype(DType::F64)?.broadcast_mul(&share)?.to_dtype(x.dtype())?;
        }
        Ok(Some(primitives::gather(&Rows::new(&each)?, &labels)?.reshape(x.shape())?))
    }
}

/// Checks labels of shape `(..batch, n)` and returns them as `(b, n)`, contiguous.
pub(crate) fn flat_labels<'a>(labels: &Operand<'a>, k: usize) -> Result<Operand<'a>> {
    let (b, n) = problem::labels(labels, k)?;
    if labels.elem_count() == 0 {
        return Ok(Operand::Tensor(problem::empty(&[b, n], DType::U32, &labels.device())?));
    }
    Ok(primitives::contiguous_operand(labels)?.reshape((b, n))?)
}

/// Checks that there is a label for each row.
pub(crate) fn check_labels_of(p: &Problem, labels: &impl Readable) -> Result<()> {
    if labels.dims() != p.shape(&[p.n]) {
        return Err(Error::Shape { argument: "labels", got: labels.dims().to_vec(), expected: p.shape(&[p.n]) });
    }
    Ok(())
}

/// Checks that contiguous labels are below `k`.
pub(crate) fn check_labels(labels: &impl Readable, k: usize) -> Result<()> {
    if labels.elem_count() > 0 {
        let largest = primitives::max_label(labels)? as usize;
        if largest >= k {
            return Err(Error::Range { argument: "labels", got: largest, min: 0, max: k - 1 });
        }
    }
    Ok(())
}
