//! Parameters of kernels that are structs, laid out as in `kernels/`.

use super::tensors::{own, Part};
use crate::{
    error::Result,
    request::{Progress, Turn},
    rows::Rows,
};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

/// `struct Rows` of `kernels/common.cuh`.
#[repr(C)]
pub(super) struct Shape5 {
    pub(super) batch_stride: i64,
    pub(super) row_stride: i64,
    pub(super) b: i64,
    pub(super) n: i64,
    pub(super) d: i64,
}

// SAFETY: plain integers, laid out as in C.
unsafe impl DeviceRepr for Shape5 {}

pub(super) fn shape(r: &Rows) -> Shape5 {
    let (batch_stride, row_stride) = (r.batch_stride as i64, r.row_stride as i64);
    Shape5 { batch_stride, row_stride, b: r.b as i64, n: r.n as i64, d: r.d as i64 }
}

/// `struct Active` of `kernels/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Active {
    pub(super) list: Part<u32>,
    pub(super) count: Part<u32>,
    pub(super) first: i64,
}

// SAFETY: two pointers and an integer, laid out as in C.
unsafe impl DeviceRepr for Active {}

impl Active {
    /// What a turn has to do, which is everything outside a fit and in its first iteration.
    pub(super) fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        match turn {
            Some(Turn { progress, iteration }) if iteration > 1 => {
                let count = going(progress, iteration)?;
                Ok(Self { list: count.from(1), count, first: 0 })
            }
            _ => Ok(Self { list: Part::NULL, count: Part::NULL, first: 0 }),
        }
    }
    /// Without the first problems of the list.
    pub(super) fn after(self, first: usize) -> Self {
        Self { first: first as i64, ..self }
    }
    /// All or nothing.
    pub(super) fn whole(self) -> Self {
        Self { list: Part::NULL, first: 0, ..self }
    }
}

/// The list of the problems that go on to an iteration.
pub(super) fn going(progress: &Progress, iteration: usize) -> Result<Part<u32>> {
    let b = progress.stop.dims1()?;
    Ok(own::<u32>(&progress.going)?.from(iteration % 2 * (b + 1)))
}
