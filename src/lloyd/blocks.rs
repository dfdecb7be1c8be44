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
    primitives,
    problem::Problem,
    request::Accumulator,
    rows::Rows,
};
use candle_core::{Device, Tensor};
use std::sync::{Barrier, Mutex, PoisonError};

/// A meeting of the ranks of a process: each leaves a message and takes those of all.
pub(super) struct Meeting {
    barrier: Barrier,
    messages: Mutex<Vec<Option<Message>>>,
}

/// A message of a rank to the others.
#[derive(Clone)]
enum Message {
    Numbers(Vec<f64>),
    Tensor(Tensor),
}

impl Meeting {
    pub(super) fn new(ranks: usize) -> Self {
        Self { barrier: Barrier::new(ranks), messages: Mutex::new(vec![None; ranks]) }
    }

    /// The messages of all ranks, once each has sent its own.
    fn exchange(&self, rank: usize, mine: Message) -> Vec<Message> {
        let messages = || self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages()[rank] = Some(mine);
        self.barrier.wait();
        let all = messages().iter().flatten().cloned().collect();
        self.barrier.wait();
        all
    }
}

/// The blocks of a rank.
pub(super) struct Blocks<'a> {
    blocks: Vec<OwnedBlock>,
    device: Device,
    rank: usize,
    meeting: Option<&'a Meeting>,
}

impl Feed for Blocks<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        self.blocks.iter().try_for_each(|block| visit(block.as_block(true)))
    }

    fn reduce(&mut self, sums: &Accumulator) -> Result<()> {
        let Some(meeting) = self.meeting else { return Ok(()) };
        let own_sums = sums.sums.copy()?;
        // Ranks may have streams of their own.
        self.device.synchronize()?;
        for (rank, message) in meeting.exchange(self.rank, Message::Tensor(own_sums)).into_iter().enumerate() {
            if let (true, Message::Tensor(others)) = (rank != self.rank, message) {
                primitives::merge(&sums.sums, &others)?;
            }
        }
        Ok(self.device.synchronize()?)
    }

    fn gather(&mut self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        let Some(meeting) = self.meeting else { return Ok(vec![mine]) };
        let numbers = |message| match message {
            Message::Numbers(numbers) => numbers,
            Message::Tensor(_) => unreachable!("ranks say the same in the same order"),
        };
        Ok(meeting.exchange(self.rank, Message::Numbers(mine)).into_iter().map(numbers).collect())
    }

    fn first_row(&mut self) -> Result<Tensor> {
        let own_row = self.blocks.first().map(|block| first_row(&block.x)).transpose()?;
        let Some(meeting) = self.meeting else { return Ok(own_row.expect("a rank alone has all rows")) };
        self.device.synchronize()?;
        let message = own_row.map_or_else(|| Message::Numbers(vec![]), Message::Tensor);
        let rows = meeting.exchange(self.rank, message).into_iter().find_map(|message| match message {
            Message::Tensor(rows) => Some(rows),
            Message::Numbers(_) => None,
        });
        Ok(rows.expect("a rank has rows"))
    }
}

impl BlockFeed for Blocks<'_> {
    fn set_terms(&mut self, terms: Terms) -> Result<()> {
        self.blocks.iter_mut().try_for_each(|block| block.complete(&terms))
    }

    fn labels(&mut self) -> Result<Tensor> {
        let labels: Vec<_> = self.blocks.iter().map(|block| &block.labels).collect();
        Ok(Tensor::cat(&labels, 1)?)
    }
}

impl PreparedFit {
    /// Fits rows that are cut into so many `blocks` for each of so many `ranks`, from the centroids that a run on all of them
    /// starts from.
    pub(crate) fn fit_in_blocks(settings: &KMeans, x: &Tensor, blocks: usize, ranks: usize) -> Result<Fit> {
        let p = Problem::fit(x, settings.k, settings.metric)?;
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
        let meeting = (self.ranks > 1).then(|| Meeting::new(self.ranks));
        // Threads may have streams of their own.
        self.x.device().synchronize()?;
        let fits = std::thread::scope(|scope| {
            let ranks = (0..self.ranks).map(|rank| {
                scope.spawn({
                    let meeting = meeting.as_ref();
                    move || {
                        let fit = self.fit_rank(rank, meeting);
                        self.x.device().synchronize()?;
                        fit
                    }
                })
            });
            let ranks: Vec<_> = ranks.collect();
            let join = |rank: std::thread::ScopedJoinHandle<'_, Result<Fit>>| {
                rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            ranks.into_iter().map(join).collect::<Result<Vec<_>>>()
        })?;
        let labels: Vec<_> = fits.iter().map(|fit| fit.labels.clone()).collect();
        let fit = fits.into_iter().next().expect("at least one rank");
        Fit { labels: Tensor::cat(&labels, 1)?, ..fit }.with_batch(&self.p.batch)
    }

    /// The fit, with the labels of this rank's rows.
    fn fit_rank(&self, rank: usize, meeting: Option<&Meeting>) -> Result<Fit> {
        let Self { settings, p, .. } = self;
        let device = self.x.device();
        // The first row of part `part` of `parts`.
        let cut = |part: usize, parts: usize, from: usize, rows: usize| from + rows * part / parts;
        let (begin, end) = (cut(rank, self.ranks, 0, p.n), cut(rank + 1, self.ranks, 0, p.n));
        let ends = (0..=self.blocks).map(|block| cut(block, self.blocks, begin, end - begin));
        let ends: Vec<_> = ends.collect();
        let mut feed = Blocks { blocks: vec![], device: device.clone(), rank, meeting };
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
