//! Who feeds the loop with rows.

use super::{merged::Terms, QUEUED};
use crate::{
    error::Result,
    host,
    kmeans::KMeans,
    plan::{assign::AssignPlan, update::UpdatePlan, Plan, Steps},
    primitives,
    problem::Problem,
    request::{Accumulator, Summands},
    rows::Rows,
};
use candle_core::{DType, Tensor};

/// Some rows of each problem.
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
    /// The number of the first row among all of its problem.
    pub first: usize,
    /// Whether its rows stay where they are between passes.
    pub stays: bool,
}

/// Who has the rows of a fit: a tensor, a stream of blocks, or, of several ranks that share them, this one. Every rank calls
/// the same methods in the same order.
pub(crate) trait Feed {
    /// Visits all blocks of this rank, in any order.
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()>;

    /// Adds up what all ranks have added to their accumulators.
    fn reduce(&mut self, _: &Accumulator) -> Result<()> {
        Ok(())
    }

    /// The numbers of every rank, in the order of their rows.
    fn gather(&mut self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        Ok(vec![mine])
    }

    /// The first row of each problem, `(b, 1, d)`.
    fn first_row(&mut self) -> Result<Tensor>;
}

/// A feed whose blocks add to sums that merge.
pub(crate) trait BlockFeed: Feed {
    /// Says how the rows of all blocks become terms, for all passes from now on.
    fn set_terms(&mut self, terms: Terms) -> Result<()>;

    /// The labels of this rank's rows, u32 `(b, n)`.
    fn labels(&mut self) -> Result<Tensor>;

    /// After how many iterations the host asks whether the fit goes on.
    fn asks_every(&self) -> usize {
        QUEUED
    }
}

/// A block and all that belongs to its rows.
pub(crate) struct Held {
    pub x: Rows<'static>,
    pub summands: Summands,
    pub labels: Tensor,
    assign: AssignPlan,
    update: UpdatePlan,
    weights: Option<Tensor>,
    counted: Option<Tensor>,
    first: usize,
    /// The clusters of a problem.
    k: usize,
}

impl Held {
    /// The rows `x`, `(b, n, d)`, of a fit of the problems `p`.
    pub fn new(settings: &KMeans, p: &Problem, x: &Tensor, first: usize) -> Result<Self> {
        let p = Problem { n: x.dim(1)?, ..p.clone() };
        let (layout, arch) = (Rows::of(x.into()).map(|rows| rows.layout()), primitives::arch(x.device())?);
        // A block never is a whole fit.
        let plan = Plan::new(&p, layout, settings, arch, |_| Ok(false))?;
        let Plan { pack, steps: Steps { assign, update, .. }, .. } = plan;
        let labels = host::zeros("fit", (p.b, p.n), DType::U32, x.device())?;
        let x = primitives::pack(x, pack, &mut None)?;
        let summands = Summands::from_rows(&x)?;
        Ok(Self { x, summands, labels, assign, update, weights: None, counted: None, first, k: p.k })
    }

    /// With what the rows weigh and which of them count, both f64 `(b, n)`.
    pub fn with_factors(self, weights: Option<Tensor>, counted: Option<Tensor>) -> Self {
        Self { weights, counted, ..self }
    }

    pub fn block(&self, stays: bool) -> Block<'_> {
        let Self { x, summands, assign, update, labels, weights, counted, first, .. } = self;
        let (weights, counted) = (weights.as_ref(), counted.as_ref());
        Block { x, summands, assign: *assign, update: *update, labels, weights, counted, first: *first, stays }
    }

    /// Completes what is added up of the rows.
    pub fn complete(&mut self, terms: &Terms) -> Result<()> {
        let (x, arch) = (&self.x, primitives::arch(self.x.device())?);
        let factors = terms.factors(x, self.weights.as_ref())?;
        self.update = UpdatePlan::new(x.dtype(), [x.b, x.n, self.k, x.d], x.layout(), false, factors.is_some(), arch);
        self.summands.row_scale = factors;
        self.summands.max_abs = terms.bounds.max_abs.clone();
        self.summands.max_weight = terms.bounds.max_weight.clone();
        Ok(())
    }
}

/// All rows, in one block.
pub(crate) struct Resident<'a>(pub Block<'a>);

impl Feed for Resident<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        visit(self.0)
    }

    fn first_row(&mut self) -> Result<Tensor> {
        first_row(self.0.x)
    }
}

/// The first row of each problem of a block, `(b, 1, d)`.
pub(crate) fn first_row(x: &Rows) -> Result<Tensor> {
    let index = Tensor::zeros((x.b, 1), DType::U32, x.device())?;
    primitives::gather(x, &index)
}
