//! Fits of rows that are cut into blocks and shared out to ranks, threads of this process, to the bits of a fit in one block.

use super::{
    accumulate::{mantissa_bits, Bounds, Total},
    feed::{first_row, Block, Feed},
    prepared::{PreparedFit, RUNNING},
    relocate::{add_sizes, gather_sizes, Sizes},
    threshold::{threshold, Usable},
    weights::{counted_sizes, finite_rows, scan_counted, weighed, Ragged, Weights},
    Lloyd,
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
    request::{Accumulator, Finish, Labels, Progress, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};
use std::sync::{Barrier, Mutex, PoisonError};

/// Where the ranks of a process meet: each leaves a message and takes those of all.
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

/// A [`Block`] with all that it refers to.
struct OwnedBlock {
    x: Rows<'static>,
    summands: Summands,
    assign: AssignPlan,
    update: UpdatePlan,
    labels: Tensor,
    weights: Option<Tensor>,
    counted: Option<Tensor>,
    first: usize,
}

impl OwnedBlock {
    fn as_block(&self) -> Block<'_> {
        let &Self { ref x, ref summands, assign, update, ref labels, ref weights, ref counted, first } = self;
        Block { x, summands, assign, update, labels, weights: weights.as_ref(), counted: counted.as_ref(), first }
    }
}

impl Feed for Blocks<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        self.blocks.iter().try_for_each(|block| visit(block.as_block()))
    }

    fn reduce(&mut self, sums: &Accumulator) -> Result<()> {
        let Some(meeting) = self.meeting else { return Ok(()) };
        let mine = sums.sums.copy()?;
        // Ranks may have streams of their own.
        self.device.synchronize()?;
        for (rank, message) in meeting.exchange(self.rank, Message::Tensor(mine)).into_iter().enumerate() {
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
        let mine = self.blocks.first().map(|block| first_row(&block.x)).transpose()?;
        let Some(meeting) = self.meeting else { return Ok(mine.expect("a rank alone has all rows")) };
        self.device.synchronize()?;
        let message = mine.map_or_else(|| Message::Numbers(vec![]), Message::Tensor);
        let rows = meeting.exchange(self.rank, message).into_iter().find_map(|message| match message {
            Message::Tensor(rows) => Some(rows),
            Message::Numbers(_) => None,
        });
        Ok(rows.expect("a rank has rows"))
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
        Whole { settings, p, x, start, weights, ragged, blocks, ranks }.fit()
    }
}

/// A fit of rows in memory, and how they are cut.
struct Whole<'a> {
    pub settings: &'a KMeans,
    pub p: &'a Problem,
    /// `(b, n, d)`.
    pub x: &'a Tensor,
    /// The centroids to start from, `(b, k, d)`.
    pub start: &'a Tensor,
    pub weights: Option<&'a Weights>,
    pub ragged: Option<&'a Ragged>,
    /// How many blocks each rank has.
    pub blocks: usize,
    pub ranks: usize,
}

impl Whole<'_> {
    /// Runs the ranks, on a thread each, and puts their labels together. All else is the same on each.
    pub(super) fn fit(&self) -> Result<Fit> {
        if self.settings.metric == Metric::Manhattan {
            let with = "rows in blocks, of which no sums give medians".into();
            return Err(Error::Conflict { argument: "metric", got: "Manhattan".into(), with });
        }
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
        // Where part `part` of `parts` begins.
        let cut = |part: usize, parts: usize, from: usize, rows: usize| from + rows * part / parts;
        let (begin, end) = (cut(rank, self.ranks, 0, p.n), cut(rank + 1, self.ranks, 0, p.n));
        let ends = (0..=self.blocks).map(|block| cut(block, self.blocks, begin, end - begin));
        let ends: Vec<_> = ends.collect();
        let mut feed = Blocks { blocks: vec![], device: device.clone(), rank, meeting };
        for rows in ends.windows(2).filter(|rows| rows[0] < rows[1]) {
            let (first, n) = (rows[0], rows[1] - rows[0]);
            let part = |t: &Tensor| Ok::<_, Error>(t.narrow(1, first, n)?.force_contiguous()?);
            let x = self.x.narrow(1, first, n)?;
            let given = Problem { n, ..self.p.clone() };
            let layout = Rows::of((&x).into()).map(|rows| rows.layout());
            let Plan { pack, steps: Steps { assign, update, .. }, .. } = settings.plan_of(&given, layout, device)?;
            let x = primitives::pack(&x, pack, &mut None)?;
            feed.blocks.push(OwnedBlock {
                summands: Summands::from_rows(&x)?,
                assign,
                update,
                x,
                labels: host::zeros("fit", (p.b, n), DType::U32, device)?,
                weights: self.weights.map(|weights| part(&weights.values)).transpose()?,
                counted: self.ragged.map(|ragged| part(&ragged.ones)).transpose()?,
                first,
            });
        }
        let found = Found::search(&mut feed, p, settings)?;
        let planes = self.bound(&mut feed, &found)?;
        self.lloyd(&mut feed, &found, planes)
    }
}

/// The findings of a first pass over the rows that count, of all blocks and ranks: the grid of their sums is made of them.
struct Found {
    /// The largest finite magnitude of each problem.
    max_abs: Vec<f64>,
    /// The smallest but 0, infinite where there is none. It bounds how low the bits of terms go.
    min_abs: Vec<f64>,
    all_finite: bool,
}

impl Found {
    fn search(feed: &mut dyn Feed, p: &Problem, settings: &KMeans) -> Result<Self> {
        // The largest magnitude, the smallest, and the first row that is not finite: the latter two negated, so that of all blocks
        // and ranks the largest of each is kept.
        let (mut mine, none) = ([vec![0.0; p.b], vec![-f64::INFINITY; p.b], vec![-f64::INFINITY; p.b]], u32::MAX);
        feed.for_each_block(&mut |block| {
            let scanned = match block.counted {
                Some(ones) => scan_counted(block.x, ones)?,
                None => primitives::max_abs_and_first_nonfinite(block.x)?,
            };
            let max_abs = scanned.0.to_vec1::<f64>()?;
            let min_abs = primitives::min_magnitude(block.x)?.to_vec1::<f64>()?;
            let bad = scanned.1.to_vec1::<u32>()?;
            for b in 0..p.b {
                mine[0][b] = max_abs[b].max(mine[0][b]);
                mine[1][b] = (-min_abs[b]).max(mine[1][b]);
                if bad[b] != none {
                    mine[2][b] = (-((block.first + bad[b] as usize) as f64)).max(mine[2][b]);
                }
            }
            Ok(())
        })?;
        let mut all = mine.concat();
        for rank in feed.gather(all.clone())? {
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

impl Whole<'_> {
    /// Gives the blocks their factors and the bounds of all rows' terms, and returns how many planes hold every bit of a term.
    fn bound(&self, feed: &mut Blocks, found: &Found) -> Result<usize> {
        let (p, device) = (self.p, self.x.device());
        let one = Tensor::ones(p.b, DType::F64, device)?;
        let [max_weight, min_weight] = match self.weights {
            Some(weights) => {
                let max_weight = weights.max_weight.to_vec1::<f64>()?;
                [max_weight, primitives::min_magnitude(&Rows::new(&weights.values.unsqueeze(2)?)?)?.to_vec1::<f64>()?]
            }
            None => [vec![1.0; p.b], vec![1.0; p.b]],
        };
        let cosine = p.metric == Metric::Cosine;
        let (mut planes, mut max_abs) = (1, vec![0.0; p.b]);
        for b in 0..p.b {
            let (most, least) = (found.max_abs[b], found.min_abs[b]);
            max_abs[b] = if cosine { 2.0 } else { most } * max_weight[b];
            if least == f64::INFINITY || min_weight[b] == f64::INFINITY {
                continue;
            }
            // The exponent of the lowest bit that a term can have: the last one of the smallest value.
            let mut lowest = fixed::exponent(least) - 1 - mantissa_bits(p.dtype);
            // A product is rounded to f64, and has no bit more than 52 below its first.
            if cosine || self.weights.is_some() {
                lowest = fixed::exponent(least) + fixed::exponent(min_weight[b]) - 2 - 52;
            }
            if cosine {
                // Factors are divided by norms, of which this is the largest, and rounded once more.
                lowest -= fixed::exponent(most * (p.d as f64).sqrt()) + 2;
            }
            planes = planes.max(Grid::down_to(lowest.max(-1074), max_abs[b], p.n).planes);
            if self.weights.is_some() && !cosine {
                let lowest = (fixed::exponent(min_weight[b]) - 1 - 52).max(-1074);
                planes = planes.max(Grid::down_to(lowest, max_weight[b], p.n).planes);
            }
        }
        let max_abs = Tensor::from_vec(max_abs, p.b, device)?;
        for block in &mut feed.blocks {
            let mut factors = block.weights.clone();
            if !found.all_finite && !cosine {
                let finite = finite_rows(&block.x)?;
                factors = Some(factors.map_or(Ok(finite.clone()), |weights| weighed(&finite, &weights))?);
            }
            if cosine {
                let inverse = primitives::elementwise([&primitives::norms(&block.x)?], |[norms]| norms.recip())?;
                factors = Some(match factors {
                    Some(weights) => primitives::elementwise([&weights, &inverse], |[w, i]| w * i)?,
                    None => inverse,
                });
            }
            let weighs = factors.is_some() && !cosine;
            let max_weight = self.weights.map_or(&one, |weights| &weights.max_weight);
            block.summands.max_weight = weighs.then(|| max_weight.clone());
            block.update = UpdatePlan::new(
                p.dtype,
                [p.b, block.x.n, p.k, p.d],
                block.x.layout(),
                false,
                factors.is_some(),
                primitives::arch(device)?,
            );
            block.summands.row_scale = factors;
            block.summands.max_abs = max_abs.clone();
        }
        Ok(planes)
    }

    /// Runs the loop, and makes a result of what it leaves, with the labels of this rank, `(b, n)`.
    fn lloyd(&self, feed: &mut Blocks, found: &Found, planes: usize) -> Result<Fit> {
        let Self { settings, p, .. } = self;
        let (device, memory) = (self.x.device().clone(), Memory::kept());
        let zeros = |shape: &[usize], dtype| host::zeros("fit", shape, dtype, &device);
        let centroids = self.start.copy()?;
        let progress = Progress {
            stop: Tensor::full(RUNNING, p.b, &device)?,
            threshold: Tensor::full(settings.tol / p.d as f64, p.b, &device)?,
            going: zeros(&[2, p.b + 1], DType::U32)?,
        };
        if settings.tol > 0.0 && p.metric != Metric::Cosine {
            let usable = Usable { all_finite: settings.check_finite, all_counted: self.ragged.is_none() };
            let max_abs = Tensor::new(&found.max_abs[..], &device)?;
            let bounds = Bounds { max_abs, max_weight: None, rows: p.n };
            let threshold = threshold(feed, p, &bounds, usable, settings.tol)?;
            progress.threshold.slice_set(&threshold, 0, 0)?;
        }
        let summands = feed.blocks.first().map(|block| &block.summands);
        let (max_abs, max_weight) = match summands {
            Some(summands) => (summands.max_abs.clone(), summands.max_weight.clone()),
            None => unreachable!("every rank has rows"),
        };
        let bounds = Bounds { max_abs, max_weight, rows: p.n };
        let sums = Accumulator::new([p.k, p.d], bounds, planes, &device)?;
        let max_iters = settings.max_iters.min(RUNNING as usize - 1);
        let lloyd = Lloyd {
            settings,
            run: 0,
            max_iters,
            asks: true,
            centroids: &centroids,
            progress: &progress,
            memory: &memory,
            sums: Some(&sums),
        };
        let (_, iterations) = lloyd.run(feed)?;
        let labels: Vec<_> = feed.blocks.iter().map(|block| block.labels.clone()).collect();
        Ok(Fit {
            counts: self.counts(feed)?,
            weights: self.settings.weights.is_some().then(|| self.cluster_weights(feed, planes)).transpose()?,
            inertia: self.inertia(feed, &centroids, found)?,
            labels: Tensor::cat(&labels, 1)?,
            n_iter: progress.stop.minimum(iterations.min(RUNNING as usize) as u32)?,
            converged: progress.stop.ne(RUNNING)?,
            metric: p.metric,
            centroids,
        })
    }

    /// The rows that count in each cluster, of all blocks and ranks.
    fn counts(&self, feed: &mut Blocks) -> Result<Tensor> {
        let (mut all, k): (Sizes, _) = (vec![], self.p.k);
        feed.for_each_block(&mut |block| {
            add_sizes(&mut all, &counted_sizes(&primitives::grouped(block.labels, k)?, block.counted)?)
        })?;
        let all = gather_sizes(all, feed)?.concat().into_iter().map(|size| size as u32).collect();
        Ok(Tensor::from_vec(all, (self.p.b, k), self.x.device())?)
    }

    /// The sample weight of each cluster, of all blocks and ranks.
    fn cluster_weights(&self, feed: &mut Blocks, planes: usize) -> Result<Tensor> {
        let (p, device) = (self.p, self.x.device());
        let Some(Weights { max_weight, unit, .. }) = self.weights else { unreachable!("they were asked for") };
        let bounds = Bounds { max_abs: max_weight.clone(), max_weight: None, rows: p.n };
        let sums = Accumulator::new([p.k, 1], bounds, planes, device)?;
        feed.for_each_block(&mut |block| {
            let Some(weights) = block.weights else { return Ok(()) };
            let (x, labels) = (Rows::new(&weights.unsqueeze(2)?)?, Some(Labels::Unsorted(block.labels)));
            let summands = Summands::from_rows(&x)?;
            primitives::accumulate(&Update::new(&x, &summands, labels, Reduction::Sum, p.k)?, &sums, &Memory::default())
        })?;
        feed.reduce(&sums)?;
        let of_clusters = Tensor::zeros((p.b, p.k, 1), DType::F64, device)?;
        let finish = Finish { sums: &sums, reduction: Reduction::Sum, turn: None };
        primitives::finish(&finish, (&of_clusters).into(), &Memory::default())?;
        Ok(of_clusters.squeeze(2)?.broadcast_mul(&unit.unsqueeze(1)?)?)
    }

    /// The weighted distances of all rows to their centroids in total. There are planes for every f64, so no term is cut, and the
    /// total has the bits of a fit in one block.
    fn inertia(&self, feed: &mut Blocks, centroids: &Tensor, found: &Found) -> Result<Tensor> {
        let (p, device, c) = (self.p, self.x.device(), Rows::new(centroids)?);
        let of_centroids = primitives::max_abs_and_first_nonfinite(&c)?.0.to_vec1::<f64>()?;
        let max_weight = self.weights.map_or(Ok(vec![1.0; p.b]), |weights| weights.max_weight.to_vec1::<f64>())?;
        // No distance is larger, with room for what rounding adds.
        let bound = |b: usize| {
            let (x, c, d) = (found.max_abs[b], of_centroids[b], p.d as f64);
            let farthest = match p.metric {
                Metric::Cosine => 4.0,
                Metric::Dot => 2.0 * x * c * d,
                _ => 2.0 * (x + c) * (x + c) * d,
            };
            (farthest * max_weight[b]).min(f64::MAX)
        };
        let bounds: Vec<_> = (0..p.b).map(bound).collect();
        let planes = bounds.iter().map(|&bound| Grid::of_f64(bound, p.n).planes).max().unwrap_or(1);
        let total = Total::new(Tensor::from_vec(bounds, p.b, device)?, p.n, planes)?;
        let mut infinite = vec![0.0; p.b];
        feed.for_each_block(&mut |block| {
            let mut cost = primitives::distances(block.x, &c, block.labels, p.metric)?;
            if !self.settings.check_finite {
                cost = weighed(&cost, &finite_rows(block.x)?)?;
            }
            if let Some(weights) = block.weights {
                cost = weighed(&cost, weights)?;
            }
            let beyond = cost.gt(f64::MAX)?.to_dtype(DType::U32)?.max(1)?.to_vec1::<u32>()?;
            infinite.iter_mut().zip(beyond).for_each(|(all, beyond)| *all += f64::from(beyond));
            total.add(&cost, None)
        })?;
        let mut totals = total.finish(feed)?.to_vec1::<f64>()?;
        for rank in feed.gather(infinite)? {
            totals.iter_mut().zip(rank).filter(|(_, beyond)| *beyond > 0.0).for_each(|(t, _)| *t = f64::INFINITY);
        }
        let totals = Tensor::from_vec(totals, p.b, device)?;
        Ok(match self.weights {
            Some(Weights { unit, .. }) => (totals * unit)?,
            None => totals,
        })
    }
}
