//! The loop is fed with rows in blocks, by whoever has them.

use crate::{
    error::Result,
    plan::{assign::AssignPlan, update::UpdatePlan},
    primitives,
    ranks::{Alone, Ranks},
    request::Summands,
    rows::Rows,
};
use candle_core::{DType, Tensor};

/// A run of rows, the same of each problem, and what ops are told of them.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    pub x: &'a Rows<'a>,
    pub summands: &'a Summands,
    pub assign: AssignPlan,
    pub update: UpdatePlan,
    /// u32 `(b, n)`.
    pub labels: &'a Tensor,
    /// The weight of each row, f64 `(b, n)`: 0 for rows that do not count. None where all weigh the same.
    pub weights: Option<&'a Tensor>,
    /// 1 where a row counts and 0 where it is padding, f64 `(b, n)`. None where all count.
    pub counted: Option<&'a Tensor>,
    /// The number of the block's first row among all rows of a problem.
    pub first: usize,
    /// Whether its rows stay where they are between passes.
    pub stays: bool,
}

/// The holder of a fit's rows: a tensor, in one block; or blocks, one after another. They may be all rows or those of one of several
/// [`Ranks`].
pub(crate) trait Feed {
    /// Visits all blocks of this rank, in any order.
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()>;

    /// The rank that this is, among those that share the rows.
    fn ranks(&self) -> &dyn Ranks {
        &Alone
    }

    /// The first row of each problem of this rank, `(b, 1, d)`; none if it has no rows.
    fn first_row(&mut self) -> Result<Option<Tensor>>;
}

/// All rows in memory, in one block.
pub(crate) struct Resident<'a>(pub Block<'a>);

impl Feed for Resident<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        visit(self.0)
    }

    fn first_row(&mut self) -> Result<Option<Tensor>> {
        first_row(self.0.x).map(Some)
    }
}

/// The first row of each problem of a block, `(b, 1, d)`.
pub(crate) fn first_row(x: &Rows) -> Result<Tensor> {
    let index = Tensor::zeros((x.b, 1), DType::U32, x.device())?;
    primitives::gather(x, &index)
}
