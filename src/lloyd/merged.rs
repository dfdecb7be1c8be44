//! A fit of rows that come in blocks, whose sums merge: with the bits of the fit of all rows in one.

use super::{
    accumulate::{mantissa_bits, Bounds},
    feed::{Block, Feed, Pass},
    kmeans_parallel,
    outcome::Outcome,
    prepared::RUNNING,
    state::{State, Watch},
    threshold::{threshold, Usable},
    weights::{factors, finite_rows, scan_counted, weighed, Weights},
    Begin, Lloyd, QUEUED,
};
use crate::{
    error::{Error, Result},
    fit::Fit,
    fixed::{self, Grid},
    host,
    kmeans::KMeans,
    memory::Memory,
    metric::Metric,
    plan::{assign::AssignPlan, update::UpdatePlan, Plan, Steps},
    primitives,
    problem::Problem,
    ranks::Alone,
    request::{Accumulator, Progress, Summands},
    rows::{RowLayout, Rows},
};
use candle_core::{DType, Device, Tensor};
use std::ops::ControlFlow;

/// Facts about all rows before any is looked at.
#[derive(Clone, Copy)]
pub(crate) struct Whole<'a> {
    pub settings: &'a KMeans,
    pub p: &'a Problem,
    pub device: &'a Device,
    pub weights: Option<&'a Weights>,
    /// Whether none is padding.
    pub all_counted: bool,
}

/// Elements from one row to the next as ops read them, where they do not have to pack them first.
pub(crate) fn row_pitch(Whole { settings, p, device, .. }: &Whole<'_>) -> Result<usize> {
    let plan = Plan::new(p, Some(RowLayout::packed(p.d)), settings, primitives::arch(device)?, |_| Ok(false))?;
    Ok(primitives::pitch(p.d, plan.pack))
}

/// Refuses what no sums give.
pub(crate) fn refuse_medians(settings: &KMeans) -> Result<()> {
    if settings.metric == Metric::Manhattan {
        let with = "rows in blocks, of which no sums give medians".into();
        return Err(Error::Conflict { argument: "metric", got: "Manhattan".into(), with });
    }
    Ok(())
}

/// The findings of a first pass over the rows that count, of all blocks and ranks.
pub(super) struct Found {
    /// The largest and the smallest magnitude but 0 of each problem; infinite where there is none.
    pub max_abs: Vec<f64>,
    min_abs: Vec<f64>,
    all_finite: bool,
}

impl Found {
    fn search(feed: &mut dyn Feed, p: &Problem, settings: &KMeans) -> Result<Self> {
        // The host reads the findings of each block at the end: until then it only queues.
        let mut blocks: Vec<(usize, [Tensor; 3])> = vec![];
        feed.begin_pass(Pass::Bounds);
        feed.for_each_block(&mut |block| {
            // Before the terms are set a block's summands say what a scan of its rows has found.
            let whole = || (block.summands.max_abs.clone(), block.summands.first_nonfinite.clone());
            let (max_abs, bad) = block.counted.map_or_else(|| Ok(whole()), |ones| scan_counted(block.x, ones))?;
            blocks.push((block.first, [max_abs, primitives::min_magnitude(block.x)?, bad]));
            Ok(())
        })?;
        // The largest magnitude, the smallest, and the first row that is not finite: the latter two negated, so that of all blocks
        // and ranks the largest of each is kept.
        let mut all = [vec![0.0; p.b], vec![-f64::INFINITY; 2 * p.b]].concat();
        let mut keep = |at: usize, v: f64| all[at] = v.max(all[at]);
        if !blocks.is_empty() {
            let read = |i: usize| Tensor::cat(&blocks.iter().map(|(_, found)| &found[i]).collect::<Vec<_>>(), 0);
            let (max_abs, min_abs) = (read(0)?.to_vec1::<f64>()?, read(1)?.to_vec1::<f64>()?);
            for (i, bad) in read(2)?.to_vec1::<u32>()?.into_iter().enumerate() {
                let (first, b) = (blocks[i / p.b].0, i % p.b);
                keep(b, max_abs[i]);
                keep(p.b + b, -min_abs[i]);
                if bad != u32::MAX {
                    keep(2 * p.b + b, -((first + bad as usize) as f64));
                }
            }
        }
        for rank in feed.ranks().gather(all.clone())? {
            all.iter_mut().zip(rank).for_each(|(all, rank)| *all = all.max(rank));
        }
        let (max_abs, rest) = all.split_at(p.b);
        let (min_abs, first_nonfinite) = rest.split_at(p.b);
        let bad = first_nonfinite.iter().position(|&bad| bad > -f64::INFINITY);
        if let (Some(batch), true) = (bad, settings.check_finite) {
            return Err(Error::NonFinite { argument: "x", batch, row: -first_nonfinite[batch] as usize });
        }
        let min_abs = min_abs.iter().map(|v| -v).collect();
        Ok(Self { max_abs: max_abs.to_vec(), min_abs, all_finite: bad.is_none() })
    }
}

/// The rule by which the rows of all blocks and ranks become terms of sums that merge.
#[derive(Clone)]
pub(crate) struct Terms {
    bounds: Bounds,
    /// On so many planes the sums keep every bit of them.
    pub(super) planes: usize,
    metric: Metric,
    all_finite: bool,
}

impl Terms {
    fn new(Whole { settings, p, device, weights, .. }: Whole<'_>, found: &Found) -> Result<Self> {
        let one = || Ok::<_, Error>([vec![1.0; p.b], vec![1.0; p.b]]);
        let [max_weight, min_weight] = weights.map_or_else(one, |weights| {
            let min_weight = primitives::min_magnitude(&Rows::new(&weights.values.unsqueeze(2)?)?)?;
            Ok([weights.max_weight.to_vec1()?, min_weight.to_vec1()?])
        })?;
        let (cosine, weighted) = (settings.metric == Metric::Cosine, weights.is_some());
        let (mut planes, mut max_abs) = (1, vec![0.0; p.b]);
        for b in 0..p.b {
            let (most, least) = (found.max_abs[b], found.min_abs[b]);
            max_abs[b] = if cosine { 2.0 } else { most } * max_weight[b];
            if least == f64::INFINITY || min_weight[b] == f64::INFINITY {
                continue;
            }
            // The exponent of the lowest bit that a term can have: the last one of the smallest value, or the 53rd of a product.
            let mut lowest = fixed::exponent(least) - 1 - mantissa_bits(p.dtype);
            if cosine || weighted {
                lowest = fixed::exponent(least) + fixed::exponent(min_weight[b]) - 2 - 52;
            }
            if cosine {
                // Factors are divided by norms, of which this is the largest, and rounded once more.
                lowest -= fixed::exponent(most * (p.d as f64).sqrt()) + 2;
            }
            planes = planes.max(Grid::down_to(lowest.max(-1074), max_abs[b], p.n).planes);
            if weighted && !cosine {
                let lowest = (fixed::exponent(min_weight[b]) - 1 - 52).max(-1074);
                planes = planes.max(Grid::down_to(lowest, max_weight[b], p.n).planes);
            }
        }
        let weighs = !cosine && (weighted || !found.all_finite);
        let max_weight = weighs.then(|| Tensor::new(max_weight, device)).transpose()?;
        let bounds = Bounds { max_abs: Tensor::new(max_abs, device)?, max_weight, rows: p.n };
        Ok(Self { bounds, planes, metric: settings.metric, all_finite: found.all_finite })
    }

    /// The summands of rows whose first that is not finite is known, but for their factors, which [`OwnedBlock::complete`] adds.
    pub fn summands(&self, first_nonfinite: Tensor) -> Summands {
        let max_abs = self.bounds.max_abs.clone();
        Summands { row_scale: None, max_abs, first_nonfinite, max_weight: None, finite: false }
    }

    /// The factors of a block's rows, f64 `(b, n)`, which have these weights; none if all are 1.
    fn factors(&self, x: &Rows, weights: Option<&Tensor>) -> Result<Option<Tensor>> {
        let factors = factors(x, weights, self.metric)?;
        if self.all_finite || self.metric == Metric::Cosine {
            return Ok(factors);
        }
        let finite = finite_rows(x)?;
        Ok(Some(factors.map_or(Ok(finite.clone()), |weights| weighed(&finite, &weights))?))
    }
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

/// A [`Block`] with all that it refers to.
pub(crate) struct OwnedBlock {
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

impl OwnedBlock {
    /// The rows `x`, `(b, n, d)`, of a fit of the problems `p`, and their summands and labels if they have been here before.
    pub fn new(
        settings: &KMeans,
        p: &Problem,
        x: &Tensor,
        first: usize,
        known: Option<(Summands, Tensor)>,
    ) -> Result<Self> {
        let p = Problem { n: x.dim(1)?, ..p.clone() };
        let (layout, arch) = (Rows::of(x.into()).map(|rows| rows.layout()), primitives::arch(x.device())?);
        // A block never is a whole fit.
        let plan = Plan::new(&p, layout, settings, arch, |_| Ok(false))?;
        let Plan { pack, steps: Steps { assign, update, .. }, .. } = plan;
        let (device, x) = (x.device(), primitives::pack(x, pack, &mut None)?);
        let (summands, labels) = match known {
            Some(known) => known,
            None => (Summands::from_rows(&x)?, host::zeros("fit", (p.b, p.n), DType::U32, device)?),
        };
        Ok(Self { x, summands, labels, assign, update, weights: None, counted: None, first, k: p.k })
    }

    /// With what the rows weigh and which of them count, both f64 `(b, n)`.
    pub fn with_factors(self, weights: Option<Tensor>, counted: Option<Tensor>) -> Self {
        Self { weights, counted, ..self }
    }

    pub fn as_block(&self, stays: bool) -> Block<'_> {
        let Self { x, summands, assign, update, labels, weights, counted, first, .. } = self;
        let (weights, counted) = (weights.as_ref(), counted.as_ref());
        Block { x, summands, assign: *assign, update: *update, labels, weights, counted, first: *first, stays }
    }

    /// Gives the rows their factors, and the bounds of the terms of all blocks and ranks.
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

/// A fit of rows in blocks, of which is known what stays the same over its runs.
pub(crate) struct Merged<'a> {
    whole: Whole<'a>,
    found: Found,
    terms: Terms,
    /// The squared shift at which a problem has converged, f64 `(b,)`.
    threshold: Tensor,
}

impl<'a> Merged<'a> {
    /// Passes over the rows once, and once more for a `tol` above 0.
    pub fn new(whole: Whole<'a>, feed: &mut dyn BlockFeed) -> Result<Self> {
        let Whole { settings, p, device, all_counted, .. } = whole;
        let found = Found::search(feed, p, settings)?;
        let terms = Terms::new(whole, &found)?;
        feed.set_terms(terms.clone())?;
        let threshold = if settings.tol > 0.0 && p.metric != Metric::Cosine {
            let max_abs = Tensor::new(&found.max_abs[..], device)?;
            let bounds = Bounds { max_abs, max_weight: None, rows: p.n };
            threshold(feed, p, &bounds, Usable { all_finite: settings.check_finite, all_counted }, settings.tol)?
        } else {
            Tensor::full(settings.tol / p.d as f64, p.b, device)?
        };
        Ok(Self { whole, found, terms, threshold })
    }

    /// The centroids, `(1, k, d)`, that a run starts from by k-means||. A problem without a batch.
    pub fn parallel_start(&self, feed: &mut dyn BlockFeed, run: usize) -> Result<Tensor> {
        kmeans_parallel::start(self.whole, feed, run)
    }

    /// A run of the loop from `start` on, and what comes of it; labels are those of this rank, `(b, n)`. `watch` sees how far it has
    /// come. `Break` says that the callback ended it.
    pub fn fit(
        &self,
        feed: &mut dyn BlockFeed,
        start: &State,
        watch: &mut Watch<'_>,
    ) -> Result<(ControlFlow<()>, Fit)> {
        let Self { whole, found, terms, threshold } = self;
        let &Whole { settings, p, device, .. } = whole;
        let start_centroids = start.centroids.to_device(device)?;
        let (centroids, memory) = (start_centroids.copy()?, Memory::kept());
        let progress = Progress {
            stop: start.stop.to_device(device)?.copy()?,
            threshold: threshold.clone(),
            going: start.lists(device)?,
        };
        let mut sums = Accumulator::new([p.k, p.d], terms.bounds.clone(), terms.planes, device)?;
        if let Some(added) = &start.added {
            if added.sums.dims() != sums.sums.dims() {
                let (got, expected) = (added.sums.dims().to_vec(), sums.sums.dims().to_vec());
                return Err(Error::Shape { argument: "sums", got, expected });
            }
            // The first rank has them, and the others begin with zeros.
            if feed.ranks().rank() == 0 {
                sums.sums = added.sums.to_device(device)?.copy()?;
            }
        }
        let max_iters = settings.max_iters.min(RUNNING as usize - 1);
        let rows = start.added.as_ref().map_or(0, |added| added.rows);
        let lloyd = Lloyd {
            settings,
            run: start.run,
            batch: &Alone,
            begin: Begin { iteration: start.iteration, rows, over: start.is_over(max_iters)? },
            max_iters,
            asks_every: Some(feed.asks_every()),
            centroids: &centroids,
            progress: &progress,
            memory: &memory,
            weights: whole.weights,
            sums: Some(&sums),
            kept: None,
            bounds: None,
            near: None,
        };
        let mut outcome = Outcome::new(*whole, found, terms, &start_centroids)?;
        let (flow, iterations) = lloyd.run(feed, &mut |block| outcome.add(block, &centroids), watch)?;
        let (counts, weights, inertia) = outcome.finish(feed)?;
        let fit = Fit {
            labels: feed.labels()?,
            counts,
            weights,
            inertia,
            n_iter: progress.stop.minimum(iterations.min(RUNNING as usize) as u32)?,
            converged: progress.stop.ne(RUNNING)?,
            metric: p.metric,
            centroids,
        };
        Ok((flow, fit))
    }
}
