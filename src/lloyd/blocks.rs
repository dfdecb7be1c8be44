//! Fits of rows that are cut into blocks and shared out to ranks, threads of this process, to the bits of a fit in one block.

use super::{
    feed::{first_row, Block, Feed},
    merged::{refuse_medians, BlockFeed, Merged, OwnedBlock, Terms, Whole},
    prepared::PreparedFit,
    state::State,
    weights::{Ragged, Weights},
};
use crate::{
    error::{Error, Result},
    fit::Fit,
    kmeans::KMeans,
    meeting::run_ranks,
    problem::Problem,
    ranks::Ranks,
    rows::Rows,
};
use candle_core::{DType, Tensor};
use std::iter;

/// The blocks of a rank.
pub(super) struct Blocks<'a> {
    blocks: Vec<OwnedBlock>,
    /// The labels of no rows, u32 `(b, 0)`.
    none: Tensor,
    ranks: &'a dyn Ranks,
}

impl Feed for Blocks<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        self.blocks.iter().try_for_each(|block| visit(block.as_block(true)))
    }

    fn ranks(&self) -> &dyn Ranks {
        self.ranks
    }

    fn first_row(&mut self) -> Result<Option<Tensor>> {
        self.blocks.first().map(|block| first_row(&block.x)).transpose()
    }
}

impl BlockFeed for Blocks<'_> {
    fn set_terms(&mut self, terms: Terms) -> Result<()> {
        self.blocks.iter_mut().try_for_each(|block| block.complete(&terms))
    }

    fn labels(&mut self) -> Result<Tensor> {
        let labels = self.blocks.iter().map(|block| &block.labels);
        Ok(Tensor::cat(&iter::once(&self.none).chain(labels).collect::<Vec<_>>(), 1)?)
    }
}

impl PreparedFit {
    /// Fits rows that are cut into so many `blocks` for each of so many `ranks`, from the centroids that a run on all of them
    /// starts from.
    pub(crate) fn fit_in_blocks(settings: &KMeans, x: &Tensor, blocks: usize, ranks: usize) -> Result<Fit> {
        let (settings, p) = (&settings.started(false), Problem::fit(x, settings.k, settings.metric)?);
        settings.check(&p, x.device())?;
        let plan = settings.plan_of(&p, Rows::of(x.into()).map(|rows| rows.layout()), x.device())?;
        let prepared = Self::new(settings, p, plan, x.device())?;
        prepared.seed(&Rows::new(x)?, 0, settings.seed)?;
        let Self { p, weights, ragged, centroids: start, settings, .. } = &prepared;
        let (weights, ragged, x) = (weights.as_ref(), ragged.as_ref(), &x.reshape((p.b, p.n, p.d))?);
        Cut { settings, p, x, start, weights, ragged, blocks, ranks }.fit()
    }
}

/// A fit of rows in memory, and how they are cut.
struct Cut<'a> {
    pub settings: &'a KMeans,
    pub p: &'a Problem,
    /// `(b, n, d)`.
    pub x: &'a Tensor,
    /// The centroids to start from, `(b, k, d)`.
    pub start: &'a Tensor,
    pub weights: Option<&'a Weights>,
    pub ragged: Option<&'a Ragged>,
    /// The blocks of each rank.
    pub blocks: usize,
    pub ranks: usize,
}

impl Cut<'_> {
    /// Runs the ranks, on a thread each, and puts their labels together. All else is the same on each.
    fn fit(&self) -> Result<Fit> {
        refuse_medians(self.settings)?;
        // Threads may have streams of their own.
        self.x.device().synchronize()?;
        let fits = run_ranks(self.ranks, |ranks| {
            let fit = self.fit_rank(ranks);
            self.x.device().synchronize()?;
            fit
        })?;
        let labels: Vec<_> = fits.iter().map(|fit| fit.labels.clone()).collect();
        let fit = fits.into_iter().next().expect("at least one rank");
        Fit { labels: Tensor::cat(&labels, 1)?, ..fit }.with_batch(&self.p.batch)
    }

    /// The fit, with the labels of this rank's rows.
    fn fit_rank(&self, ranks: &dyn Ranks) -> Result<Fit> {
        let Self { settings, p, .. } = self;
        let device = self.x.device();
        // The first row of part `part` of `parts`.
        let cut = |part: usize, parts: usize, from: usize, rows: usize| from + rows * part / parts;
        let rank = ranks.rank();
        let (begin, end) = (cut(rank, self.ranks, 0, p.n), cut(rank + 1, self.ranks, 0, p.n));
        let ends = (0..=self.blocks).map(|block| cut(block, self.blocks, begin, end - begin));
        let ends: Vec<_> = ends.collect();
        let none = Tensor::zeros((p.b, 0), DType::U32, device)?;
        let mut feed = Blocks { blocks: vec![], none, ranks };
        for rows in ends.windows(2).filter(|rows| rows[0] < rows[1]) {
            let (first, n) = (rows[0], rows[1] - rows[0]);
            let part = |t: &Tensor| Ok::<_, Error>(t.narrow(1, first, n)?.force_contiguous()?);
            let weights = self.weights.map(|weights| part(&weights.values)).transpose()?;
            let counted = self.ragged.map(|ragged| part(&ragged.ones)).transpose()?;
            let x = self.x.narrow(1, first, n)?;
            feed.blocks.push(OwnedBlock::new(settings, p, &x, first, None)?.with_factors(weights, counted));
        }
        let whole = Whole { settings, p, device, weights: self.weights, all_counted: self.ragged.is_none() };
        let start = State::start(0, self.start.clone())?;
        Ok(Merged::new(whole, &mut feed)?.fit(&mut feed, &start, &mut |_, _| Ok(()))?.1)
    }
}
