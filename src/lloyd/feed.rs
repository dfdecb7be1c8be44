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
use std::fmt;

/// A pass over the rows of a [`Source`](crate::Source).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)] // Runs are counted from 0, iterations and epochs from 1.
pub enum Pass {
    /// The bounds of all values are found.
    Bounds,
    /// The variance is found that [`tol`](crate::KMeans::tol) is a share of.
    Variance,
    /// A run draws where it starts from all rows, by [k-means||](crate::Init::KMeansParallel). Passes are counted from 1.
    Start { run: usize, pass: usize },
    /// Rows are assigned to the centroids that are there, and added up for those of this iteration.
    Iteration { run: usize, iteration: usize, max_iters: usize },
    /// Another pass of the iteration, since it [relocates](crate::EmptyClusters::Relocate) empty clusters.
    Relocation { run: usize, iteration: usize, max_iters: usize },
    /// Rows are assigned for good.
    Labels { run: usize },
    /// A mini-batch takes all rows.
    Epoch { epoch: usize, epochs: usize },
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let in_run = |f: &mut fmt::Formatter<'_>, run| if run > 0 { write!(f, "run {}, ", run + 1) } else { Ok(()) };
        match *self {
            Self::Bounds => write!(f, "bounds"),
            Self::Variance => write!(f, "variance"),
            Self::Start { run, pass } => {
                in_run(f, run)?;
                write!(f, "start, pass {pass}")
            }
            Self::Iteration { run, iteration, max_iters } | Self::Relocation { run, iteration, max_iters } => {
                in_run(f, run)?;
                write!(f, "iteration {iteration}")?;
                if max_iters < usize::MAX {
                    write!(f, " of at most {max_iters}")?;
                }
                let relocates = matches!(self, Self::Relocation { .. });
                f.write_str(if relocates { ", relocation" } else { "" })
            }
            Self::Labels { run } => {
                in_run(f, run)?;
                write!(f, "labels")
            }
            Self::Epoch { epoch, epochs } => write!(f, "epoch {epoch} of {epochs}"),
        }
    }
}

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
    /// Is told which pass the next visit of all blocks is.
    fn begin_pass(&mut self, _: Pass) {}

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
