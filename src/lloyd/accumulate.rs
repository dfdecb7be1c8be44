//! Sums that blocks of rows and ranks add to. They are integers, so it does not matter how rows are cut, or in what order.

use super::feed::Feed;
use crate::{
    error::{Error, Result},
    host,
    memory::Memory,
    primitives,
    request::{Accumulator, Finish, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};

impl Accumulator {
    /// Zeros for `k` clusters of each problem, on so many planes of the grid that the bounds give.
    pub(super) fn new([k, d]: [usize; 2], bounds: Bounds, planes: usize, device: &Device) -> Result<Self> {
        let Bounds { max_abs, max_weight, rows } = bounds;
        if rows > MAX_ROWS {
            return Err(Error::TooLarge { argument: "x rows", got: rows, limit: MAX_ROWS });
        }
        let sums = host::zeros("fit", (planes, max_abs.elem_count(), k, d + 1, 2), DType::I64, device)?;
        Ok(Self { sums, max_abs, max_weight, rows })
    }
}

/// The most rows that sums have room for. Limbs, two of at most 42 bits (`LIMB_BITS` in `kernels/exact/sums.cuh`), have to be whole
/// numbers of the first plane's unit, and so many rows leave 84 of its 126 bits to a term.
const MAX_ROWS: usize = 1 << 41;

/// Bounds on the terms of sums, of which an accumulator's grid is made.
#[derive(Clone)]
pub(crate) struct Bounds {
    /// A bound on the magnitude of a term, f64 `(b,)`.
    pub max_abs: Tensor,
    /// The largest factor, f64 `(b,)`, where factors are weights.
    pub max_weight: Option<Tensor>,
    /// A bound on the number of rows of a problem, over all blocks and ranks.
    pub rows: usize,
}

/// The sum, over all rows of a problem, of one number a row.
pub(super) struct Total(Accumulator);

impl Total {
    /// A sum of numbers up to `max_abs`, f64 `(b,)`, on so many planes.
    pub(super) fn new(max_abs: Tensor, rows: usize, planes: usize) -> Result<Self> {
        let device = max_abs.device().clone();
        Ok(Self(Accumulator::new([1, 1], Bounds { max_abs, max_weight: None, rows }, planes, &device)?))
    }

    /// Adds the finite of `values`, each times its factor, if there are any; both f64 `(b, n)`.
    pub(super) fn add(&self, values: &Tensor, factors: Option<Tensor>, memory: &Memory) -> Result<()> {
        let x = Rows::new(&values.unsqueeze(2)?)?;
        accumulate_all(&x, factors, &self.0, memory)
    }

    /// The sums of all ranks, f64 `(b,)`.
    pub(super) fn finish(&self, feed: &mut dyn Feed, memory: &Memory) -> Result<Tensor> {
        feed.ranks().reduce(&self.0.sums)?;
        let sums = Tensor::zeros((self.0.max_abs.elem_count(), 1, 1), DType::F64, self.0.sums.device())?;
        primitives::finish(&Finish { sums: &self.0, reduction: Reduction::Sum, turn: None }, (&sums).into(), memory)?;
        Ok(sums.flatten_all()?)
    }
}

/// Adds all rows, each times its factor, to the one cluster of an accumulator. One that is not finite has a factor of 0.
pub(super) fn accumulate_all(x: &Rows, row_scale: Option<Tensor>, to: &Accumulator, memory: &Memory) -> Result<()> {
    // A row of one value may be anything: it is not finite, or counts. Others have a factor of 0 if they are not.
    let first_nonfinite = Tensor::full(if x.d == 1 { 0 } else { u32::MAX }, x.b, x.device())?;
    let (max_abs, max_weight) = (to.max_abs.clone(), to.max_weight.clone());
    let reduction = if max_weight.is_some() || row_scale.is_none() { Reduction::Mean } else { Reduction::Sum };
    let summands = Summands { row_scale, max_abs, first_nonfinite, max_weight, finite: true };
    primitives::accumulate(&Update::new(x, &summands, None, reduction, 1)?, to, memory)
}

/// The bits of a value of this type below its first one, at most.
pub(super) fn mantissa_bits(dtype: DType) -> i32 {
    match dtype {
        DType::F16 => 10,
        DType::BF16 => 7,
        DType::F32 => 23,
        _ => 52,
    }
}
