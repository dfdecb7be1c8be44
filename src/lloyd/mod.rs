//! Fits, and the one loop of Lloyd's algorithm (1982), which rows in memory, in blocks and of several ranks all go through.

mod accumulate;
mod blocks;
pub(crate) mod feed;
mod fits;
pub(crate) mod kmeans_parallel;
mod measures;
pub(crate) mod merged;
mod outcome;
pub(crate) mod prepared;
mod relocate;
pub(crate) mod seeds;
pub(crate) mod state;
mod threshold;
pub(crate) mod weights;

use crate::{
    callbacks::{Iteration, OnIteration},
    error::{Error, Result},
    kept::{KeptBounds, KeptSums},
    kmeans::{EmptyClusters, KMeans},
    memory::Memory,
    plan::{on_chip::OnChip, skip::NearGroups},
    primitives, problem,
    ranks::{Alone, Ranks},
    request::{Accumulator, Assignment, Finish, Labels, OnChipFit, Progress, Reduction, Turn, Update},
    rows::Rows,
    stages::reach_work,
};
use candle_core::Tensor;
use feed::{Block, Feed, Pass, Resident};
use measures::Measures;
use prepared::{Data, PreparedFit, RUNNING};
use relocate::{relocate, SizesSoFar};
use state::{Added, State, Watch};
use std::{
    mem::take,
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};
use weights::{counted_sizes, Weights};

/// Iterations that are queued before the host asks whether the fit goes on, more than most fits have.
const QUEUED: usize = 128;
/// The most iterations that a capture puts into one CUDA graph.
const CAPTURED: usize = 65_536;

impl PreparedFit {
    /// Clusters the rows of `x`, of the shape, dtype and device of the preparation. An `x` that shares its memory with
    /// [`centroids`](Self::centroids), which the run overwrites, is copied first.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. After an error the results are of no use; the next run starts afresh.
    pub fn run(&mut self, x: &Tensor) -> Result<()> {
        self.run_for_labels(x)?;
        self.close().inspect_err(|_| self.iterations = None)
    }

    /// [`run`](Self::run) for the labels and centroids: on every device the inertia is left to be computed from the rows as they are
    /// when a result is asked for.
    pub(crate) fn run_for_labels(&mut self, x: &Tensor) -> Result<()> {
        let expected = self.p.shape(&[self.p.n, self.p.d]);
        if x.dims() != expected {
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        problem::check_dtype("x", x, self.p.dtype)?;
        problem::check_device("x", x, &self.device)?;
        self.fence.write(&self.device)?;
        let captured = primitives::capturing(&self.device)?;
        if captured && self.data.is_none() {
            let with = "a first run, which allocates: run once before".into();
            return Err(Error::Conflict { argument: "stream", got: "a capture".into(), with });
        }
        let run = self.load(x).and_then(|()| self.lloyd(0, &Alone));
        if run.is_err() {
            self.iterations = None;
            if !captured {
                // A failed op may leave there what the next one does not expect.
                self.memory = Memory::kept();
            }
        }
        run.map(|_| ())
    }

    /// A run of the loop from where it starts. `Break` says that the callback ended it.
    fn lloyd(&mut self, run: usize, batch: &dyn Ranks) -> Result<ControlFlow<()>> {
        let Some(data) = &self.data else { return Ok(ControlFlow::Continue(())) };
        let (KMeans { seed, max_iters, .. }, Data { x, summands }) = (&self.settings, data);
        self.iterations = None;
        // Iterations beyond convergence do nothing, but may be without end: now and then the host asks where the fit is.
        let max_iters = (*max_iters).min(RUNNING as usize - 1);
        let asks = max_iters > QUEUED && !primitives::capturing(&self.device)?;
        if max_iters > CAPTURED && !asks {
            return Err(Error::TooLarge { argument: "max_iters in a capture", got: max_iters, limit: CAPTURED });
        }
        self.seed(x, run, seed.wrapping_add(run as u64))?;
        self.progress.stop.const_set(RUNNING.into())?;

        let (settings, memory) = (&self.settings, &self.memory);
        let (centroids, labels, progress) = (&self.centroids, &self.labels, &self.progress);
        if let Some(plan) = &self.plan.steps.on_chip {
            let (metric, reduction) = (settings.metric, Reduction::of(settings.metric));
            let fit = OnChipFit { plan, x, summands, metric, reduction, progress, max_iters, centroids, labels };
            if primitives::fit_on_chip(&fit, memory)? {
                self.iterations = Some(max_iters);
                return Ok(ControlFlow::Continue(()));
            }
        }
        let asks_every = asks.then_some(QUEUED);
        let begin = Begin { iteration: 0, rows: 0, over: max_iters == 0 };
        let kept = self.kept_sums.as_ref();
        if let Some(kept) = kept {
            kept.lock().unwrap_or_else(PoisonError::into_inner).reset();
        }
        let bounds = self.bounds.as_ref();
        if let Some(bounds) = bounds {
            bounds.reset();
        }
        let weights = self.weights.as_ref();
        let lloyd = Lloyd {
            settings,
            run,
            batch,
            begin,
            max_iters,
            asks_every,
            centroids,
            progress,
            memory,
            weights,
            sums: None,
            kept,
            bounds,
            near: self.plan.steps.skip.near,
        };
        let (flow, iterations) =
            lloyd.run(&mut Resident(self.block(x, summands)), &mut |_| Ok(()), &mut |_, _| Ok(()))?;
        if self.plan.steps.on_chip.is_some_and(|plan| plan != OnChip::CpuLine) {
            // The device has refused what it said that it runs; of the CPU's, other values may be for it.
            self.plan = self.plan.without_on_chip(&self.p);
        }
        self.iterations = Some(iterations);
        Ok(flow)
    }
}

/// The beginning of a run of the loop.
struct Begin {
    /// So many iterations have been made.
    iteration: usize,
    /// So many rows, the first ones, have been added to the sums of the next one.
    rows: usize,
    /// Whether rows have only to be labelled.
    over: bool,
}

/// A run of the loop, whoever feeds it with rows.
struct Lloyd<'a> {
    settings: &'a KMeans,
    run: usize,
    /// The ranks that have problems of the batch, where those of the feed have rows of these.
    batch: &'a dyn Ranks,
    begin: Begin,
    max_iters: usize,
    /// After how many iterations the host asks which problems have converged, if it does.
    asks_every: Option<usize>,
    centroids: &'a Tensor,
    progress: &'a Progress,
    memory: &'a Memory,
    /// What the weights of blocks are parts of.
    weights: Option<&'a Weights>,
    /// The sums that blocks and ranks add to. Where there are none, all rows are in one block, whose update is one op.
    sums: Option<&'a Accumulator>,
    /// The sums that the updates of that one block leave each other, where the plan says so.
    kept: Option<&'a Mutex<KeptSums>>,
    /// The bounds that its assignments leave each other, where the plan says so.
    bounds: Option<&'a KeptBounds>,
    /// How they skip groups of centroids on a GPU, where the plan says so. The first one of a run begins anew.
    near: Option<NearGroups>,
}

impl Lloyd<'_> {
    /// The loop. Each pass over the rows assigns them to the centroids that are there and adds them up by these labels, for the next
    /// centroids; the last pass only assigns, so that labels belong to the centroids whenever the loop ends, and `close` sees each
    /// block of it. `watch` sees how far the run has come after each block that sums have been added of, and after each iteration.
    /// Returns how many updates there were, at most, and `Break` if the callback ended it.
    fn run(
        &self,
        feed: &mut dyn Feed,
        close: &mut dyn FnMut(Block<'_>) -> Result<()>,
        watch: &mut Watch<'_>,
    ) -> Result<(ControlFlow<()>, usize)> {
        let &Self {
            run, progress, max_iters, begin: Begin { mut iteration, rows: mut before, over: mut last }, ..
        } = self;
        let (k, relocates) = (self.settings.k, self.settings.empty == EmptyClusters::Relocate);
        let device = self.centroids.device();
        let reads_are_free = primitives::reads_are_free(device);
        let (mut flow, mut turn) = (ControlFlow::Continue(()), None);
        loop {
            iteration += 1;
            let next = Turn { progress, iteration };
            let sizes = || SizesSoFar::new([progress.stop.elem_count(), k], device);
            let (mut sizes, mut orders) = (relocates.then(sizes).transpose()?, vec![]);
            // The first rows, as far as the sums have them, have been measured by nobody.
            let measured = self.settings.measures && self.settings.on_iteration.is_some() && !last && before == 0;
            let measures = || Measures::begin(self.settings, self.weights, self.centroids);
            let mut measures = measured.then(measures).transpose()?;
            let mut added = take(&mut before);
            feed.begin_pass(if last { Pass::Labels { run } } else { Pass::Iteration { run, iteration, max_iters } });
            feed.for_each_block(&mut |block| {
                reach_work("block arrived")?;
                let rows = block.first..block.first + block.x.n;
                if !last && rows.end <= added {
                    return Ok(());
                }
                self.assign(block, turn)?;
                reach_work("block assigned")?;
                if let Some(measures) = &mut measures {
                    measures.add(&block)?;
                }
                match (last, &mut sizes) {
                    (true, _) => close(block),
                    (false, Some(sizes)) => {
                        let order = primitives::grouped(block.labels, k)?;
                        sizes.add(&counted_sizes(&order, block.counted)?)?;
                        orders.push(block.stays.then_some(order));
                        Ok(())
                    }
                    (false, None) => {
                        self.add(block, Labels::Unsorted(block.labels), next)?;
                        reach_work("block added")?;
                        let Some(sums) = self.sums.filter(|_| rows.start == added) else { return Ok(()) };
                        added = rows.end;
                        let added = Some(Added { rows: added, sums: sums.sums.clone() });
                        watch(&self.state(iteration - 1, added), false)
                    }
                }
            })?;
            if last {
                return Ok((flow, iteration - 1));
            }
            if let Some(sizes) = sizes {
                let (sizes, mut relocations) = (sizes.gather(feed.ranks())?, None);
                if let Some(lacking) = self.lacking(&sizes)? {
                    orders.clear();
                    if let Some(bounds) = self.bounds {
                        bounds.forget();
                    }
                    feed.begin_pass(Pass::Relocation { run, iteration, max_iters });
                    relocations = Some(self.relocations(feed, sizes, &lacking)?);
                }
                let mut orders = orders.iter();
                feed.begin_pass(Pass::Relocation { run, iteration, max_iters });
                feed.for_each_block(&mut |block| {
                    if let Some(relocations) = &relocations {
                        relocate(block, relocations)?;
                    }
                    let order = orders.next().and_then(Option::as_ref);
                    self.add(block, order.map_or(Labels::Unsorted(block.labels), Labels::Sorted), next)
                })?;
            }
            self.finish(feed, next)?;
            reach_work("centroids finished")?;
            turn = Some(next);
            last = iteration == max_iters;
            let asked = self.asks_every.is_some_and(|every| iteration % every == 0);
            if self.watched() || asked || reads_are_free {
                let stop = progress.stop.to_vec1::<u32>()?;
                let mut running = stop.iter().filter(|&&stop| stop == RUNNING).count();
                if let Some(f) = &self.settings.on_iteration {
                    // The callback sees the whole batch, and so all of it goes on until the last problem has converged.
                    let counts = self.batch.gather(vec![running as f64, stop.len() as f64])?;
                    let sum = |i: usize| counts.iter().map(|of_rank| of_rank[i] as usize).sum::<usize>();
                    running = sum(0);
                    let all = [feed.ranks(), self.batch];
                    let measured = measures.map(|measures| measures.finish(self.centroids, all)).transpose()?;
                    let [inertia, shift] = [0, 1].map(|i| measured.map(|measured| measured[i]));
                    let converged = sum(1) - running;
                    flow = call(f, Iteration { run: self.run, iteration, converged, inertia, shift }, all)?;
                }
                last |= running == 0 || flow.is_break();
            }
            watch(&self.state(iteration, None), last)?;
            reach_work("iteration over")?;
        }
    }

    /// The state after so many iterations, and what has been added for the next one.
    fn state(&self, iteration: usize, added: Option<Added>) -> State {
        let (centroids, stop) = (self.centroids.clone(), self.progress.stop.clone());
        State { run: self.run, iteration, centroids, stop, added }
    }

    /// Whether the host looks at every iteration.
    fn watched(&self) -> bool {
        self.settings.empty == EmptyClusters::Relocate || self.settings.on_iteration.is_some()
    }

    /// Labels a block by the centroids that are there. `turn` is the iteration that made them: problems that had converged before
    /// it keep their labels.
    fn assign(&self, block: Block<'_>, turn: Option<Turn<'_>>) -> Result<()> {
        let (c, metric) = (&Rows::new(self.centroids)?, self.settings.metric);
        let (bounds, near) = (self.bounds, self.near);
        let a = Assignment { plan: block.assign, x: block.x, c, metric, turn, bounds, near };
        primitives::assign_into(a, block.labels.into(), self.memory)
    }

    /// Adds the rows of a block up by their labels: to the sums, or, where all rows are in the block, for new centroids at once (an
    /// update, which accumulates and finishes in one op).
    fn add(&self, block: Block<'_>, labels: Labels<'_>, turn: Turn<'_>) -> Result<()> {
        let (reduction, turn) = (Reduction::of(self.settings.metric), Some(turn));
        let Block { x, summands, update: plan, .. } = block;
        let u = Update { plan, x, summands, labels: Some(labels), reduction, turn, kept: self.kept };
        match self.sums {
            Some(sums) => primitives::accumulate(&u, sums, self.memory),
            None => primitives::update(&u, self.centroids.into(), self.memory),
        }
    }

    /// Makes new centroids of what all blocks and ranks have added, and decides which problems have converged.
    fn finish(&self, feed: &mut dyn Feed, turn: Turn<'_>) -> Result<()> {
        let Some(sums) = self.sums else { return Ok(()) };
        feed.ranks().reduce(&sums.sums)?;
        reach_work("sums reduced")?;
        let finish = Finish { sums, reduction: Reduction::of(self.settings.metric), turn: Some(turn) };
        primitives::finish(&finish, self.centroids.into(), self.memory)
    }
}

/// Whether the fit goes on: the first rank asks, and all do as it is told.
fn call(f: &OnIteration, iteration: Iteration, all: [&dyn Ranks; 2]) -> Result<ControlFlow<()>> {
    let mut ends = all.iter().all(|ranks| ranks.rank() == 0) && f.call(iteration).is_break();
    for ranks in all {
        ends = ranks.gather(vec![f64::from(u8::from(ends))])?.concat().contains(&1.0);
    }
    Ok(if ends { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
}
