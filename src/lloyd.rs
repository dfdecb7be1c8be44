//! The one Lloyd loop, and the memory that it runs in.

use crate::{
    error::kept,
    fit::refuse_non_finite,
    init,
    ops::{self, Memory, Progress, Rule, Terms, Turn},
    problem::{self, Problem, Rows},
    EmptyClusters, Error, Fit, Init, Iteration, KMeans, Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use std::{fmt, ops::ControlFlow};

/// A fit with its memory, from [`KMeans::prepare`]: [`run`](Self::run) it on as many inputs of its shape as you like.
///
/// Every run overwrites the last one's [`centroids`](Self::centroids) and [`labels`](Self::labels) in place. What the
/// iterations work in is allocated by the first run and kept; what a run finds out about its rows before them (a seed's
/// distances, the variance that `tol` is a share of) takes a few numbers a row, which it gives back. On a GPU the host only
/// queues work: a problem's convergence is decided where its data are, and problems that have converged are skipped.
///
/// # CUDA graphs
/// A run can be captured and replayed on new values in the same input tensor if the settings ask the host for nothing:
/// [`check_finite(false)`](KMeans::check_finite), no [`on_iteration`](KMeans::on_iteration), no
/// [`EmptyClusters::Relocate`], and an [`Init`] other than k-means|| or weighted random rows. Run once before the capture,
/// so that all memory is there, and keep the input and this value alive as long as the graph.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_flash_kmeans::KMeans;
///
/// let mut prepared = KMeans::new(2).prepare((4, 2), DType::F32, &Device::Cpu)?;
/// for step in 0..3 {
///     let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., step as f32], [9., 8.]], &Device::Cpu)?;
///     prepared.run(&x)?;
///     assert_eq!(prepared.labels().dims(), [4]);
/// }
/// let fit = prepared.into_fit()?;
/// assert_eq!(fit.counts.to_vec1::<u32>()?.iter().sum::<u32>(), 4);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
pub struct Prepared {
    settings: KMeans,
    p: Problem,
    device: Device,
    /// `(b, k, d)` and u32 `(b, n)`.
    centroids: Tensor,
    labels: Tensor,
    /// The same with the caller's batch dimensions.
    shown: [Tensor; 2],
    progress: Progress,
    ragged: Option<Ragged>,
    weights: Option<Weights>,
    /// The rows to start from, if they do not depend on the data.
    drawn: Option<Tensor>,
    memory: Memory,
    data: Option<Data>,
    /// The last run's inertia, f64 `(b,)`, where it was computed before the run was over.
    inertia: Option<Tensor>,
    /// The updates of the last run, at most; none before it is over.
    iterations: Option<usize>,
}

/// The input of a run, with what stays the same over its iterations.
struct Data {
    x: Rows,
    terms: Terms,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Prepared");
        shown.field("settings", &self.settings).field("problem", &self.p).field("device", &self.device.location());
        shown.finish_non_exhaustive()
    }
}

impl Prepared {
    pub(crate) fn new(settings: &KMeans, p: Problem, device: &Device) -> Result<Self> {
        let lengths = settings.lengths.as_ref().map(|lengths| p.read_lengths(lengths)).transpose()?;
        let mut settings = settings.clone();
        if let Init::Given(c) = &mut settings.init {
            *c = c.detach().force_contiguous()?;
            if settings.check_finite {
                refuse_non_finite("init", &ops::scan(&Rows::new(c)?)?.1)?;
            }
        }
        let ragged = lengths.map(|lengths| Ragged::new(lengths, &settings, &p, device)).transpose()?;
        let weights = Weights::new(&settings, &p, ragged.as_ref(), device)?;
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, device);
        let centroids = zeros(&[p.b, p.k, p.d], p.dtype)?;
        let labels = zeros(&[p.b, p.n], DType::U32)?;
        let progress = Progress {
            stop: zeros(&[p.b], DType::U32)?,
            threshold: Tensor::full(settings.tol / p.d as f64, p.b, device)?,
            going: zeros(&[2, p.b + 1], DType::U32)?,
        };
        let shown = [centroids.reshape(p.shape(&[p.k, p.d]))?, labels.reshape(p.shape(&[p.n]))?];
        let (device, memory) = (device.clone(), Memory::default());
        let mut fit = Self {
            settings,
            p,
            device,
            centroids,
            labels,
            shown,
            progress,
            ragged,
            weights,
            drawn: None,
            memory,
            data: None,
            inertia: None,
            iterations: None,
        };
        fit.drawn = fit.draw(fit.settings.seed)?;
        Ok(fit)
    }

    /// The centroids, `(..batch, k, d)`. The next run overwrites them.
    pub fn centroids(&self) -> &Tensor {
        &self.shown[0]
    }

    /// The labels, u32 `(..batch, n)`. The next run overwrites them.
    pub fn labels(&self) -> &Tensor {
        &self.shown[1]
    }

    /// Clusters the rows of `x`, of the shape, dtype and device of the preparation. An `x` that shares its memory with
    /// [`centroids`](Self::centroids), which the run overwrites, is copied first.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. After an error the results are of no use; the next run starts afresh.
    pub fn run(&mut self, x: &Tensor) -> Result<()> {
        let expected = self.p.shape(&[self.p.n, self.p.d]);
        if x.dims() != expected {
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        problem::check_dtype("x", x, self.p.dtype)?;
        problem::check_device("x", x, &self.device)?;
        let run = self.load(x).and_then(|()| self.lloyd(0)).and_then(|_| self.close());
        if run.is_err() {
            // What a failed op leaves there may not be what the next one expects.
            (self.memory, self.iterations) = (Memory::default(), None);
        }
        run
    }

    /// What a run's result says of its rows, where that costs no wait; the rows are let go then.
    fn close(&mut self) -> Result<()> {
        if ops::reads_are_free(&self.device) {
            self.inertia = self.data.take().map(|data| self.total_cost(&data.x)).transpose()?;
        }
        Ok(())
    }

    /// The last run's result, in tensors of its own.
    ///
    /// On a GPU a run leaves the inertia to be computed here, from the rows as the run's input holds them now, so that nothing
    /// need be captured for it: change that tensor in place only after. On the CPU it is the run's.
    ///
    /// # Errors
    /// [`Error::Conflict`] before the first run and after one that failed, and where the device fails.
    pub fn fit(&self) -> Result<Fit> {
        let fit = self.result()?;
        Ok(Fit { centroids: fit.centroids.copy()?, labels: fit.labels.copy()?, ..fit })
    }

    /// The last run's result.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn into_fit(mut self) -> Result<Fit> {
        self.memory = Memory::default();
        self.result()
    }

    fn result(&self) -> Result<Fit> {
        let (p, stop) = (&self.p, &self.progress.stop);
        let inertia = match (&self.inertia, &self.data) {
            (Some(inertia), _) => Some(inertia.clone()),
            (None, data) => data.as_ref().map(|data| self.total_cost(&data.x)).transpose()?,
        };
        let (Some(iterations), Some(inertia)) = (self.iterations, inertia) else {
            let (got, with) = ("a result".into(), "a fit that has not been run".into());
            return Err(Error::Conflict { argument: "fit", got, with });
        };
        Ok(Fit {
            centroids: self.shown[0].clone(),
            labels: self.shown[1].clone(),
            counts: self.sizes()?.reshape(p.shape(&[p.k]))?,
            inertia: inertia.reshape(p.shape(&[]))?,
            n_iter: stop.minimum(iterations.min(RUNNING as usize) as u32)?.reshape(p.shape(&[]))?,
            converged: stop.ne(RUNNING)?.reshape(p.shape(&[]))?,
            metric: p.metric,
        })
    }

    /// Takes the rows of a run, and finds what stays the same over its iterations.
    pub(crate) fn load(&mut self, x: &Tensor) -> Result<()> {
        (self.inertia, self.iterations) = (None, None);
        let x = x.detach();
        let rows = Rows::new(&if problem::share_storage(&x, &self.centroids) { x.force_contiguous()? } else { x })?;
        let counted = self.ragged.as_ref().map(|ragged| ragged.scan(&rows)).transpose()?;
        let x = ops::readable(rows, self.p.k, self.p.metric)?;
        let mut terms = Terms::of(&x)?;
        let mut first_bad = terms.first_bad.clone();
        if let Some((largest, bad)) = counted {
            // Padding may still hold what is not finite, which sums have to know.
            (terms.largest, first_bad) = (largest, bad);
        }
        if self.settings.check_finite {
            refuse_non_finite("x", &first_bad)?;
        }
        if self.settings.tol > 0.0 && self.p.metric != Metric::Cosine {
            self.progress.threshold.slice_set(&self.threshold(&x, &mut terms)?, 0, 0)?;
        }
        if let Some(Weights { values, heaviest, .. }) = &self.weights {
            terms.largest = (terms.largest * heaviest)?;
            (terms.factor, terms.heaviest) = (Some(values.clone()), Some(heaviest.clone()));
        }
        if self.p.metric == Metric::Cosine {
            let inverse = ops::norms(&x)?.recip()?;
            // Columns of a unit vector, with room for rounding, times the weight.
            (terms.factor, terms.largest) = match &self.weights {
                Some(Weights { values, heaviest, .. }) => (Some((values * inverse)?), (heaviest * 2.0)?),
                None => (Some(inverse), Tensor::full(2f64, x.b, &self.device)?),
            };
        }
        match &mut self.data {
            Some(data) => data.replace(x, terms)?,
            None => self.data = Some(Data { x, terms }),
        }
        Ok(())
    }

    /// The loop. When an iteration is over, labels belong to the centroids. `Break` says that the callback ended it.
    pub(crate) fn lloyd(&mut self, run: usize) -> Result<ControlFlow<()>> {
        let Some(data) = &self.data else { return Ok(ControlFlow::Continue(())) };
        let (KMeans { seed, max_iters, .. }, x) = (&self.settings, &data.x);
        self.iterations = None;
        self.seed(x, run, seed.wrapping_add(run as u64))?;
        self.progress.stop.const_set(RUNNING.into())?;

        let (metric, centroids) = (self.p.metric, Rows::new(&self.centroids)?);
        let rule = match metric {
            Metric::Cosine => Rule::Direction,
            Metric::Manhattan => Rule::Median,
            _ => Rule::Mean,
        };
        let relocates = self.settings.empty == EmptyClusters::Relocate;
        let watched = relocates || self.settings.on_iteration.is_some();
        let (progress, terms) = (&self.progress, &data.terms);
        if !watched {
            let (c, labels, memory) = (&self.centroids, &self.labels, &self.memory);
            if ops::fit_on_chip(x, terms, metric, rule, progress, *max_iters, c, labels, memory)? {
                self.iterations = Some(*max_iters);
                return Ok(ControlFlow::Continue(()));
            }
        }
        let (mut flow, mut iterations) = (ControlFlow::Continue(()), *max_iters);
        ops::relabel(x, &centroids, metric, None, &self.labels, &self.memory)?;
        for iteration in 1..=*max_iters {
            let turn = Some(Turn { progress, iteration });
            if relocates {
                self.relocate(x, &centroids)?;
            }
            ops::update(x, terms, Some(&self.labels), rule, turn, &self.centroids, &self.memory)?;
            ops::relabel(x, &centroids, metric, turn, &self.labels, &self.memory)?;
            if watched || ops::reads_are_free(&self.device) {
                let stop = self.progress.stop.to_vec1::<u32>()?;
                let converged = stop.iter().filter(|&&stop| stop != RUNNING).count();
                if let Some(f) = &self.settings.on_iteration {
                    flow = f.call(Iteration { run, iteration, converged });
                }
                if converged == x.b || flow.is_break() {
                    iterations = iteration;
                    break;
                }
            }
        }
        self.iterations = Some(iterations);
        Ok(flow)
    }

    /// Sets the centroids to those that a run starts from.
    fn seed(&self, x: &Rows, run: usize, seed: u64) -> Result<()> {
        let again = match run {
            0 => None,
            _ => self.draw(seed)?,
        };
        let drawn = again.as_ref().or(self.drawn.as_ref());
        let (init, k, metric) = (&self.settings.init, self.p.k, self.p.metric);
        let start = match (init, drawn) {
            (Init::Given(c), _) => init::given(c, x, k)?,
            (_, Some(drawn)) => {
                let weights = self.weights.as_ref().map(|w| &w.values);
                // Other rows are as good as each other, unless they have weights that nothing was drawn by.
                let any = self.settings.check_finite && metric != Metric::Cosine && self.settings.weights.is_none();
                let usable = if any { drawn.clone() } else { ops::usable_seeds(x, weights, drawn, metric)? };
                ops::gather(x, &usable)?
            }
            _ => init::centroids(init, x, k, self.seed_weights(x)?.as_ref(), metric, seed)?,
        };
        Ok(self.centroids.slice_set(&start, 0, 0)?)
    }

    /// What each row weighs as a seed, f64 `(b, n)`: -1 where it is not finite or, by cosine, has no direction. None where all
    /// weigh the same.
    fn seed_weights(&self, x: &Rows) -> Result<Option<Tensor>> {
        let weights = self.weights.as_ref().map(|w| w.values.clone());
        if self.settings.check_finite && self.p.metric != Metric::Cosine {
            return Ok(weights);
        }
        let usable = match self.p.metric {
            Metric::Cosine => directed_rows(x)?,
            _ => finite_rows(x)?,
        };
        let usable = usable.to_dtype(DType::F64)?;
        // By arithmetic alone: a choice, or a comparison with a number, takes something to the device, where a captured graph
        // would look for it.
        Ok(Some(match weights {
            Some(weights) => ((weights * &usable)? - usable.affine(-1.0, 1.0)?)?,
            None => usable.affine(2.0, -1.0)?,
        }))
    }

    fn draw(&self, seed: u64) -> Result<Option<Tensor>> {
        let weighted = self.settings.weights.is_some();
        init::draw(&self.settings.init, &self.p, |b| self.rows(b), weighted, seed, &self.device)
    }

    /// The rows of problem `b` that count.
    fn rows(&self, b: usize) -> usize {
        self.ragged.as_ref().map_or(self.p.n, |ragged| ragged.lengths[b])
    }

    /// The rows that count in each cluster, u32 `(b, k)`.
    fn sizes(&self) -> Result<Tensor> {
        match &self.ragged {
            Some(r) => Ok(ops::cluster_sums(&r.ones, Some(&self.labels), self.p.k)?.to_dtype(DType::U32)?),
            None => ops::cluster_sizes(&self.labels, self.p.k),
        }
    }

    /// The weighted distances of the rows to their centroids in total, f64 `(b,)`.
    fn total_cost(&self, x: &Rows) -> Result<Tensor> {
        let mut cost = ops::distances(x, &Rows::new(&self.centroids)?, &self.labels, self.p.metric)?;
        if !self.settings.check_finite {
            cost = kept_where(finite_rows(x)?, cost)?;
        }
        Ok(match &self.weights {
            Some(Weights { values, unit, .. }) => (ops::total(&weighed(cost, values)?)? * unit)?,
            None => ops::total(&cost)?,
        })
    }

    /// The squared shift at which a problem has converged, f64 `(b,)`: `tol` times the mean variance of its columns. Leaves `terms`
    /// as they were.
    fn threshold(&self, x: &Rows, terms: &mut Terms) -> Result<Tensor> {
        let mut ones = None;
        if let Some(ragged) = &self.ragged {
            (terms.factor, terms.heaviest) = (Some(ragged.ones.clone()), Some(ragged.one.clone()));
            ones = Some(ragged.ones.clone());
        }
        if !self.settings.check_finite {
            let finite = finite_rows(x)?.to_dtype(DType::F64)?;
            ones = Some(match ones {
                Some(ones) => (ones * finite)?,
                None => finite,
            });
        }
        let mean = Tensor::zeros((x.b, 1, x.d), x.dtype(), x.device())?;
        ops::update(x, terms, None, Rule::Mean, None, &mean, &Memory::default())?;
        (terms.factor, terms.heaviest) = (None, None);
        let labels = Tensor::zeros((x.b, x.n), DType::U32, x.device())?;
        let distances = ops::distances(x, &Rows::new(&mean)?, &labels, Metric::SquaredEuclidean)?;
        drop(labels);
        let sum = |values: &Tensor| Ok::<_, Error>(ops::cluster_sums(values, None, 1)?.squeeze(1)?);
        // Squares that are not finite are in no sum, and a sum that is not is no measure.
        let spread = match &ones {
            Some(ones) => sum(&(distances * ones)?)?,
            None => sum(&distances)?,
        };
        let most = Tensor::full(f64::MAX, x.b, &self.device)?;
        let spread = (spread.minimum(&most)? * spread.le(&most)?.to_dtype(DType::F64)?)?;
        let tol = match (&self.ragged, &ones) {
            (Some(ragged), _) if self.settings.check_finite => ragged.tol.clone(),
            (_, Some(ones)) => {
                let counted = sum(ones)?.maximum(&Tensor::ones(x.b, DType::F64, &self.device)?)?;
                (Tensor::full(self.settings.tol, x.b, &self.device)? / (counted * x.d as f64)?)?
            }
            _ => Tensor::full(self.settings.tol / (x.n as f64 * x.d as f64), x.b, &self.device)?,
        };
        Ok((spread * tol)?)
    }

    /// Gives every empty cluster one of the rows farthest from their centroids.
    fn relocate(&self, x: &Rows, centroids: &Rows) -> Result<()> {
        let sizes = self.sizes()?.to_vec2::<u32>()?;
        let stop = self.progress.stop.to_vec1::<u32>()?;
        let lacking = |b: usize| stop[b] == RUNNING && sizes[b].contains(&0);
        if !(0..x.b).any(lacking) {
            return Ok(());
        }
        let distances = ops::distances(x, centroids, &self.labels, self.p.metric)?.to_vec2::<f64>()?;
        let weights = self.seed_weights(x)?.map(|w| w.to_vec2::<f64>()).transpose()?;
        let mut rows = self.labels.to_vec2::<u32>()?;
        for b in (0..x.b).filter(|&b| lacking(b)) {
            let (mut size, far, labels) = (sizes[b].clone(), &distances[b], &mut rows[b]);
            // A row on its centroid has nowhere better to be, and one of no weight moves no centroid.
            let movable = |&i: &usize| {
                let away = far[i] > 0.0 || self.p.metric == Metric::Dot && !far[i].is_nan();
                away && weights.as_ref().is_none_or(|weights| weights[b][i] > 0.0)
            };
            let mut farthest: Vec<usize> = (0..self.rows(b)).filter(movable).collect();
            farthest.sort_unstable_by(|&i, &j| far[j].total_cmp(&far[i]).then(i.cmp(&j)));
            let mut farthest = farthest.into_iter();
            for cluster in (0..self.p.k).filter(|&j| sizes[b][j] == 0) {
                // A cluster's last row would leave it empty.
                let Some(i) = farthest.find(|&i| size[labels[i] as usize] > 1) else { break };
                size[labels[i] as usize] -= 1;
                size[cluster] += 1;
                labels[i] = cluster as u32;
            }
        }
        Ok(self.labels.slice_set(&Tensor::from_vec(rows.concat(), (x.b, x.n), &self.device)?, 0, 0)?)
    }
}

impl Data {
    /// Takes new values where the old ones are, so that a captured run finds them there.
    fn replace(&mut self, x: Rows, terms: Terms) -> Result<()> {
        self.x = x;
        self.terms.largest.slice_set(&terms.largest, 0, 0)?;
        self.terms.first_bad.slice_set(&terms.first_bad, 0, 0)?;
        if let (Some(old), Some(new)) = (&self.terms.factor, &terms.factor) {
            if old.id() != new.id() {
                old.slice_set(new, 0, 0)?;
            }
        }
        Ok(())
    }
}

/// [`Progress::stop`] of a problem that has not converged.
const RUNNING: u32 = u32::MAX;

/// Problems of different sizes: which rows count.
///
/// What a run does with these takes no shape to the device, which a captured graph would look for where it was.
struct Ragged {
    lengths: Vec<usize>,
    /// 1 where a row counts and 0 where it is padding, f64 `(b, n)`.
    ones: Tensor,
    /// 1 for each problem, f64 `(b,)`.
    one: Tensor,
    /// The tolerance by the numbers that count, f64 `(b,)`.
    tol: Tensor,
}

impl Ragged {
    fn new(lengths: Vec<usize>, settings: &KMeans, p: &Problem, device: &Device) -> Result<Self> {
        let (b, n) = (p.b, p.n);
        let ends = Tensor::from_vec(lengths.iter().map(|&l| l as u32).collect(), (b, 1), device)?;
        let ones = Tensor::arange(0, n as u32, device)?.broadcast_as((b, n))?.lt(&ends.broadcast_as((b, n))?)?;
        let tol = lengths.iter().map(|&l| settings.tol / (l as f64 * p.d as f64)).collect();
        let (one, tol) = (Tensor::ones(b, DType::F64, device)?, Tensor::from_vec(tol, b, device)?);
        Ok(Self { lengths, ones: ones.to_dtype(DType::F64)?, one, tol })
    }

    /// [`ops::scan`] of the rows that count.
    fn scan(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        // Each row as a problem of its own, and what is found of them as rows of one column.
        let (largest, bad) = ops::scan(&Rows::new(&x.tensor.unsqueeze(x.tensor.rank() - 1)?)?)?;
        let whole = |found: Tensor| ops::scan(&Rows::new(&found.reshape((x.b, x.n, 1))?)?);
        let largest = (largest.reshape((x.b, x.n))? * &self.ones)?;
        // 0 is what `bad` says of such a row, and the largest u32 of others.
        let none = u32::MAX as f64;
        let bad = (bad.reshape((x.b, x.n))?.to_dtype(DType::F64)?.affine(-1.0, none)? * &self.ones)?;
        Ok((whole(largest)?.0, whole(bad.affine(-1.0, none)?.recip()?)?.1))
    }
}

/// The weights of a fit's rows.
struct Weights {
    /// f64 `(b, n)`, 0 for rows that do not count. They are in units of the power of two at or above the largest, with which their
    /// products neither overflow nor vanish, whatever the weights were.
    values: Tensor,
    /// That power of two, f64 `(b,)`.
    unit: Tensor,
    /// The largest of `values`, f64 `(b,)`.
    heaviest: Tensor,
}

impl Weights {
    /// A copy of the weights that were asked for, checked; none where every row counts alike.
    fn new(settings: &KMeans, p: &Problem, ragged: Option<&Ragged>, device: &Device) -> Result<Option<Self>> {
        let Some(given) = &settings.weights else {
            let Some(Ragged { ones, one, .. }) = ragged else { return Ok(None) };
            return Ok(Some(Self { values: ones.clone(), unit: one.clone(), heaviest: one.clone() }));
        };
        let all = given.detach().broadcast_as(p.shape(&[p.n]))?.force_contiguous()?;
        let mut w = all.to_dtype(DType::F64)?.reshape((p.b, p.n))?;
        if let Some(Ragged { ones, .. }) = ragged {
            w = ones.gt(0.0)?.where_cond(&w, &w.zeros_like()?)?;
        }
        if !settings.check_finite {
            let sound = (w.gt(0.0)? * w.lt(f64::INFINITY)?)?;
            w = sound.where_cond(&w, &w.zeros_like()?)?;
        }
        let (heaviest, first_bad) = ops::scan(&Rows::new(&w.unsqueeze(2)?)?)?;
        let heaviest = heaviest.to_vec1::<f64>()?;
        if settings.check_finite {
            refuse_non_finite("sample_weights", &first_bad)?;
            let refused = |argument, batch: usize, got, expected: &'static str| {
                let expected =
                    if p.batch.is_empty() { expected } else { kept(format!("{expected} in batch element {batch}")) };
                Err(Error::Value { argument, got, expected })
            };
            let least = w.min(1)?.to_vec1::<f64>()?;
            if let Some(b) = least.iter().position(|&least| least < 0.0) {
                return refused("sample_weights", b, least[b], "at least 0");
            }
            if let Some(b) = heaviest.iter().position(|&heaviest| heaviest == 0.0) {
                return refused("sample_weights total", b, 0.0, "positive");
            }
        }
        let unit: Vec<_> = heaviest.iter().map(|&heaviest| power_of_two_above(heaviest)).collect();
        let inverse = Tensor::from_iter(unit.iter().map(|unit| unit.recip()), device)?;
        let (unit, heaviest) = (Tensor::new(unit, device)?, (Tensor::new(heaviest, device)? * &inverse)?);
        Ok(Some(Self { values: w.broadcast_mul(&inverse.unsqueeze(1)?)?, unit, heaviest }))
    }
}

/// The smallest power of two that is not below `v`; 1 for 0, and no more than f64 has, whose inverse is exact too.
fn power_of_two_above(v: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let (exponent, rest) = ((v.to_bits() >> 52) as i32 - 1023, v.to_bits() & MANTISSA);
    match v {
        0.0 => 1.0,
        _ => 2f64.powi((exponent + (rest > 0) as i32).clamp(-1021, 1022)),
    }
}

/// `values` times their weights, both f64 `(b, n)`: 0 where a weight is 0, whatever the value.
fn weighed(values: Tensor, weights: &Tensor) -> Result<Tensor> {
    Ok((kept_where(weights.gt(0.0)?, values)? * weights)?)
}

/// `values` where `mask` (u8) is set, and 0 elsewhere.
fn kept_where(mask: Tensor, values: Tensor) -> Result<Tensor> {
    let zero = Tensor::new(0f64, values.device())?.broadcast_as(values.shape())?;
    Ok(mask.where_cond(&values, &zero)?)
}

/// Whether each row is without a NaN or an infinity, u8 `(b, n)`.
fn finite_rows(x: &Rows) -> Result<Tensor> {
    if x.dtype() == DType::F64 {
        // Each row as a problem of its own: its norm may be infinite where it is not.
        let (_, first_bad) = ops::scan(&Rows::new(&x.tensor.unsqueeze(x.tensor.rank() - 1)?)?)?;
        let none = Tensor::full(u32::MAX, x.b * x.n, x.device())?;
        return Ok(first_bad.eq(&none)?.reshape((x.b, x.n))?);
    }
    let norms = ops::norms(x)?;
    Ok(norms.lt(&Tensor::full(f64::INFINITY, (x.b, x.n), x.device())?)?)
}

/// Whether each row has a direction: a norm that is neither 0 nor infinite, u8 `(b, n)`.
fn directed_rows(x: &Rows) -> Result<Tensor> {
    let norms = ops::norms(x)?;
    let bound = |v: f64| Tensor::full(v, (x.b, x.n), x.device());
    Ok((norms.gt(&bound(0.0)?)? * norms.lt(&bound(f64::INFINITY)?)?)?)
}
