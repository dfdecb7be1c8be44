//! The one Lloyd loop, and the memory that it runs in.

use crate::{
    error::{kept, Error, Result},
    fit::{refuse_non_finite, Fit},
    host,
    kmeans::{EmptyClusters, Init, Iteration, KMeans},
    memory::{Fence, Memory},
    metric::Metric,
    ops,
    plan::Plan,
    problem::{self, Problem},
    request::{Assignment, OnChipFit, Progress, Rule, Terms, Turn, Update},
    rows::Rows,
    seeding,
};
use candle_core::{DType, Device, Shape, Tensor};
use std::{fmt, ops::ControlFlow, path::Path};

impl KMeans {
    /// What a fit of `x` would run and how much memory it would take, without running it.
    ///
    /// # Errors
    /// Refuses what [`fit`](Self::fit) refuses without looking at values.
    pub fn plan(&self, x: &Tensor) -> Result<Plan> {
        self.planned(x).map(|(_, plan)| plan)
    }

    fn planned(&self, x: &Tensor) -> Result<(Problem, Plan)> {
        let p = Problem::fit(x, self.k, self.metric)?;
        self.check(&p, x.device())?;
        let plan = Plan::new(&p, x, self, ops::arch(x.device())?);
        Ok((p, plan))
    }

    /// Clusters the rows of `x`, `(n, d)` or `(..batch, n, d)` in f16, bf16, f32 or f64, each problem of the batch on its own.
    ///
    /// # Errors
    /// Refuses shapes, dtypes, devices and settings that do not fit together, before anything is allocated; non-finite values
    /// (see [`check_finite`](Self::check_finite)), before the first iteration; and fails where the device does. See [`Error`].
    pub fn fit(&self, x: &Tensor) -> Result<Fit> {
        let (p, plan) = self.planned(x)?;
        plan.announce();
        let mut prepared = Prepared::new(self, p, x.device())?;
        prepared.load(x)?;
        let mut stopped = prepared.lloyd(0)?.is_break();
        if self.n_init == 1 {
            return prepared.into_fit();
        }
        let mut best = prepared.fit()?;
        for run in 1..self.n_init {
            if stopped {
                break;
            }
            stopped = prepared.lloyd(run)?.is_break();
            let other = prepared.fit()?;
            // Any run is better than one of no cost that a number tells.
            let unknown = best.inertia.ne(&best.inertia)?;
            best = best.replaced_where(&other.inertia.lt(&best.inertia)?.maximum(&unknown)?, &other)?;
        }
        Ok(best)
    }

    /// A fit with its memory, for rows of one shape `(n, d)` or `(..batch, n, d)`: run it on new rows as often as you like, or
    /// capture a run in a CUDA graph; see [`Prepared`]. Weights, lengths and given centroids are copied: what becomes of
    /// them afterwards changes no run.
    ///
    /// # Errors
    /// As [`fit`](Self::fit). Refuses `n_init` above 1, which keeps more than one result.
    pub fn prepare(&self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Prepared> {
        let p = Problem::of(shape.into().dims(), dtype, self.k, self.metric)?.fitting()?;
        self.check(&p, device)?;
        if self.n_init > 1 {
            let with = "a prepared fit, which keeps one result".into();
            return Err(Error::Conflict { argument: "n_init", got: self.n_init.to_string(), with });
        }
        Prepared::new(self, p, device)
    }

    /// The labels of [`fit`](Self::fit), u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_predict(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.fit(x)?.labels)
    }

    /// Reads what [`Fit::save`] wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, and [`Error::Format`] if it is not a saved fit or what it holds does not belong
    /// together: shapes, dtypes, labels, counts and numbers are checked.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Fit> {
        Fit::load(path.as_ref(), device)
    }

    /// Every refusal that takes no look at values.
    pub(crate) fn check(&self, p: &Problem, device: &Device) -> Result<()> {
        if self.n_init == 0 {
            return Err(Error::Range { argument: "n_init", got: 0, min: 1, max: usize::MAX });
        }
        if !(self.tol >= 0.0 && self.tol.is_finite()) {
            return Err(Error::Value { argument: "tol", got: self.tol, expected: "a finite number of at least 0" });
        }
        let alike = match self.init {
            Init::Given(_) => Some("given centroids"),
            Init::Even => Some("evenly spaced rows"),
            _ => None,
        };
        if let (2.., Some(seeds)) = (self.n_init, alike) {
            let with = format!("{seeds}, which start every run alike");
            return Err(Error::Conflict { argument: "n_init", got: self.n_init.to_string(), with });
        }
        if let Some(weights) = &self.weights {
            p.weights(weights, device)?;
        }
        if let Some(lengths) = &self.lengths {
            p.lengths(lengths, device)?;
        }
        seeding::check(&self.init, p, device)
    }
}

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
/// [`EmptyClusters::Relocate`], and an [`Init`] other than k-means|| or weighted random rows. Run once before the capture, on
/// the same thread if the device is of [`Device::new_cuda`], so that all memory is there, and keep the input and this value
/// alive as long as the graph. A capture holds every iteration up to [`max_iters`](KMeans::max_iters), of which it takes at most
/// 65,536.
///
/// # Threads
/// A value may move between threads, be used by several through `&self`, and be dropped on any of them. Where threads have
/// streams of their own, as on a device of [`Device::new_cuda`], the host waits each time that another thread takes over, and a
/// capture refuses it; on a device of [`Device::new_cuda_with_stream`] nothing ever waits.
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
    fence: Fence,
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
    /// Where rows are copied to that cannot be read where they lie.
    copy: Option<Tensor>,
    data: Option<Data>,
    /// Inputs that were taken in a capture, where nothing from outside may be freed.
    captured: Vec<Rows>,
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
        let fence = Fence::default();
        fence.write(device)?;
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
        let zeros = |shape: &[usize], dtype| host::zeros("fit", shape, dtype, device);
        let centroids = zeros(&[p.b, p.k, p.d], p.dtype)?;
        let labels = zeros(&[p.b, p.n], DType::U32)?;
        let progress = Progress {
            stop: zeros(&[p.b], DType::U32)?,
            threshold: Tensor::full(settings.tol / p.d as f64, p.b, device)?,
            going: zeros(&[2, p.b + 1], DType::U32)?,
        };
        let shown = [centroids.reshape(p.shape(&[p.k, p.d]))?, labels.reshape(p.shape(&[p.n]))?];
        let (device, memory) = (device.clone(), Memory::kept());
        let mut fit = Self {
            fence,
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
            copy: None,
            data: None,
            captured: vec![],
            inertia: None,
            iterations: None,
        };
        fit.drawn = fit.draw(fit.settings.seed)?;
        Ok(fit)
    }

    /// The centroids, `(..batch, k, d)`. The next run overwrites them.
    pub fn centroids(&self) -> &Tensor {
        self.fence.show(&self.device);
        &self.shown[0]
    }

    /// The labels, u32 `(..batch, n)`. The next run overwrites them.
    pub fn labels(&self) -> &Tensor {
        self.fence.show(&self.device);
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
        self.fence.write(&self.device)?;
        let captured = ops::capturing(&self.device)?;
        if captured && self.data.is_none() {
            let with = "a first run, which allocates: run once before".into();
            return Err(Error::Conflict { argument: "stream", got: "a capture".into(), with });
        }
        let run = self.load(x).and_then(|()| self.lloyd(0)).and_then(|_| self.close());
        if run.is_err() {
            self.iterations = None;
            if !captured {
                // What a failed op leaves there may not be what the next one expects.
                self.memory = Memory::kept();
            }
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
        self.fence.read(&self.device)?;
        let (p, stop) = (&self.p, &self.progress.stop);
        let inertia = match (&self.inertia, &self.data) {
            (Some(inertia), _) => Some(inertia.clone()),
            (None, data) => data.as_ref().map(|data| self.total_cost(&data.x)).transpose()?,
        };
        let (Some(iterations), Some(inertia)) = (self.iterations, inertia) else {
            let (got, with) = ("a result".into(), "a fit that has not been run".into());
            return Err(Error::Conflict { argument: "fit", got, with });
        };
        let weights = self.weights.as_ref().filter(|_| self.settings.weights.is_some());
        let weights = weights.map(|Weights { values, unit, .. }| {
            let sums = ops::cluster_sums(values, Some(&self.labels), p.k)?;
            Ok::<_, Error>(sums.broadcast_mul(&unit.unsqueeze(1)?)?.reshape(p.shape(&[p.k]))?)
        });
        Ok(Fit {
            centroids: self.shown[0].clone(),
            labels: self.shown[1].clone(),
            counts: self.sizes()?.reshape(p.shape(&[p.k]))?,
            weights: weights.transpose()?,
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
        let x = if problem::share_storage(&x, &self.centroids) { x.force_contiguous()? } else { x };
        let x = ops::readable(&x, self.p.k, self.p.metric, &mut self.copy)?;
        let counted = self.ragged.as_ref().map(|ragged| ragged.scan(&x)).transpose()?;
        let mut terms = Terms::of(&x)?;
        let mut first_bad = terms.first_bad.clone();
        if let Some((largest, bad)) = counted {
            // Padding may still hold what is not finite, which sums have to know.
            (terms.largest, first_bad) = (largest, bad);
        }
        if self.settings.check_finite {
            refuse_non_finite("x", &first_bad)?;
            // Padding has not been looked at.
            terms.finite = self.ragged.is_none();
        }
        if self.settings.tol > 0.0 && self.p.metric != Metric::Cosine {
            self.progress.threshold.slice_set(&self.threshold(&x, &mut terms)?, 0, 0)?;
        }
        if let Some(Weights { values, heaviest, .. }) = &self.weights {
            terms.largest = (terms.largest * heaviest)?;
            (terms.factor, terms.heaviest) = (Some(values.clone()), Some(heaviest.clone()));
        }
        if self.p.metric == Metric::Cosine {
            let inverse = ops::elementwise([&ops::norms(&x)?], |[norms]| norms.recip())?;
            // Columns of a unit vector, with room for rounding, times the weight.
            (terms.factor, terms.largest) = match &self.weights {
                Some(Weights { values, heaviest, .. }) => {
                    (Some(ops::elementwise([values, &inverse], |[w, i]| w * i)?), (heaviest * 2.0)?)
                }
                None => (Some(inverse), Tensor::full(2f64, x.b, &self.device)?),
            };
        }
        match &mut self.data {
            Some(data) => {
                let before = data.replace(x, terms)?;
                if ops::capturing(&self.device)? {
                    self.captured.push(before);
                }
            }
            None => self.data = Some(Data { x, terms }),
        }
        Ok(())
    }

    /// The loop. When an iteration is over, labels belong to the centroids. `Break` says that the callback ended it.
    pub(crate) fn lloyd(&mut self, run: usize) -> Result<ControlFlow<()>> {
        let Some(data) = &self.data else { return Ok(ControlFlow::Continue(())) };
        let (KMeans { seed, max_iters, .. }, x) = (&self.settings, &data.x);
        self.iterations = None;
        // Iterations beyond convergence do nothing, but may be without end: now and then the host asks where the fit is.
        let max_iters = (*max_iters).min(RUNNING as usize - 1);
        let asks = max_iters > QUEUED && !ops::capturing(&self.device)?;
        if max_iters > CAPTURED && !asks {
            return Err(Error::TooLarge { argument: "max_iters in a capture", got: max_iters, limit: CAPTURED });
        }
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
            let (centroids, labels) = (&self.centroids, &self.labels);
            let fit = OnChipFit { x, terms, metric, rule, progress, max_iters, centroids, labels };
            if ops::fit_on_chip(&fit, &self.memory)? {
                self.iterations = Some(max_iters);
                return Ok(ControlFlow::Continue(()));
            }
        }
        let (mut flow, mut iterations) = (ControlFlow::Continue(()), max_iters);
        let assign = |turn| ops::relabel(Assignment { x, c: &centroids, metric, turn }, &self.labels, &self.memory);
        assign(None)?;
        for iteration in 1..=max_iters {
            let turn = Some(Turn { progress, iteration });
            if relocates {
                self.relocate(x, &centroids)?;
            }
            let (labels, centroids) = (Some(&self.labels), &self.centroids);
            ops::update(&Update { x, terms, labels, rule, turn, centroids }, &self.memory)?;
            assign(turn)?;
            let asked = asks && iteration % QUEUED == 0;
            if watched || asked || ops::reads_are_free(&self.device) {
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
            (Init::Given(c), _) => seeding::given(c, x, k)?,
            (_, Some(drawn)) => {
                let weights = self.weights.as_ref().map(|w| &w.values);
                // Other rows are as good as each other, unless they have weights that nothing was drawn by.
                let any = self.settings.check_finite && metric != Metric::Cosine && self.settings.weights.is_none();
                let usable = if any { drawn.clone() } else { ops::usable_seeds(x, weights, drawn, metric)? };
                ops::gather(x, &usable)?
            }
            _ => seeding::centroids(init, x, k, self.seed_weights(x)?.as_ref(), metric, seed)?,
        };
        ops::overwrite(&self.centroids, &start)
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
        // By arithmetic alone: a choice, or a comparison with a number, takes something to the device, where a captured graph
        // would look for it.
        Ok(Some(match weights {
            Some(weights) => {
                ops::elementwise([&weights, &usable], |[w, usable]| (w * usable)? - usable.affine(-1.0, 1.0)?)?
            }
            None => ops::elementwise([&usable], |[usable]| usable.affine(2.0, -1.0))?,
        }))
    }

    fn draw(&self, seed: u64) -> Result<Option<Tensor>> {
        let weighted = self.settings.weights.is_some();
        seeding::draw(&self.settings.init, &self.p, |b| self.rows(b), weighted, seed, &self.device)
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
            cost = weighed(&cost, &finite_rows(x)?)?;
        }
        Ok(match &self.weights {
            Some(Weights { values, unit, .. }) => (ops::total(&weighed(&cost, values)?)? * unit)?,
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
            let finite = finite_rows(x)?;
            ones = Some(match ones {
                Some(ones) => ops::elementwise([&ones, &finite], |[ones, finite]| ones * finite)?,
                None => finite,
            });
        }
        let mean = Tensor::zeros((x.b, 1, x.d), x.dtype(), x.device())?;
        let u = Update { x, terms, labels: None, rule: Rule::Mean, turn: None, centroids: &mean };
        ops::update(&u, &Memory::default())?;
        (terms.factor, terms.heaviest) = (None, None);
        let labels = Tensor::zeros((x.b, x.n), DType::U32, x.device())?;
        let distances = ops::distances(x, &Rows::new(&mean)?, &labels, Metric::SquaredEuclidean)?;
        drop(labels);
        let sum = |values: &Tensor| Ok::<_, Error>(ops::cluster_sums(values, None, 1)?.squeeze(1)?);
        // Squares that are not finite are in no sum, and a sum that is not is no measure.
        let spread = match &ones {
            Some(ones) => sum(&ops::elementwise([&distances, ones], |[distances, ones]| distances * ones)?)?,
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
        ops::overwrite(&self.labels, &Tensor::from_vec(rows.concat(), (x.b, x.n), &self.device)?)
    }
}

impl Data {
    /// Takes new values where the old ones are, so that a captured run finds them there.
    fn replace(&mut self, x: Rows, terms: Terms) -> Result<Rows> {
        self.terms.largest.slice_set(&terms.largest, 0, 0)?;
        self.terms.first_bad.slice_set(&terms.first_bad, 0, 0)?;
        self.terms.finite = terms.finite;
        if let (Some(old), Some(new)) = (&self.terms.factor, &terms.factor) {
            if old.id() != new.id() {
                ops::overwrite(old, new)?;
            }
        }
        Ok(std::mem::replace(&mut self.x, x))
    }
}

/// Iterations that are queued before the host asks whether the fit goes on, more than most fits have.
const QUEUED: usize = 128;
/// Iterations that a CUDA graph takes.
const CAPTURED: usize = 65_536;

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
        let at = ops::contiguous(&Tensor::arange(0, n as u32, device)?.broadcast_as((b, n))?)?;
        let ends = ops::contiguous(&ends.broadcast_as((b, n))?)?;
        let ones = ops::elementwise([&at, &ends], |[at, ends]| at.lt(ends)?.to_dtype(DType::F64))?;
        let tol = lengths.iter().map(|&l| settings.tol / (l as f64 * p.d as f64)).collect();
        let (one, tol) = (Tensor::ones(b, DType::F64, device)?, Tensor::from_vec(tol, b, device)?);
        Ok(Self { lengths, ones, one, tol })
    }

    /// [`ops::scan`] of the rows that count.
    fn scan(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        // What is found of the rows, as rows of one column.
        let (largest, bad) = scan_rows(x)?;
        let whole = |found: Tensor| ops::scan(&Rows::new(&found.reshape((x.b, x.n, 1))?)?);
        let largest = ops::elementwise([&largest, &self.ones], |[largest, ones]| largest * ones)?;
        // 0 is what `bad` says of such a row, and the largest u32 of others.
        let none = u32::MAX as f64;
        let bad =
            ops::elementwise([&bad, &self.ones], |[bad, ones]| bad.to_dtype(DType::F64)?.affine(-1.0, none)? * ones)?;
        let bad = ops::elementwise([&bad], |[bad]| bad.affine(-1.0, none)?.recip())?;
        Ok((whole(largest)?.0, whole(bad)?.1))
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
        // A copy, which the caller cannot change.
        let all = ops::elementwise([&given.detach()], |[w]| w.to_dtype(DType::F64))?.broadcast_as(p.shape(&[p.n]))?;
        let mut w = if all.is_contiguous() { all.copy()? } else { ops::contiguous(&all)? }.reshape((p.b, p.n))?;
        if let Some(Ragged { ones, .. }) = ragged {
            w = ops::elementwise([ones, &w], |[ones, w]| ones.gt(0.0)?.where_cond(w, &w.zeros_like()?))?;
        }
        if !settings.check_finite {
            w = ops::elementwise([&w], |[w]| {
                let sound = (w.gt(0.0)? * w.lt(f64::INFINITY)?)?;
                sound.where_cond(w, &w.zeros_like()?)
            })?;
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
            let least = match ops::check_counted("sample_weights", &w) {
                Ok(()) => w.min(1)?.to_vec1::<f64>()?,
                Err(_) => (0..p.b).map(|b| least_of(&w.narrow(0, b, 1)?)).collect::<Result<_>>()?,
            };
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

/// The smallest of any number of values.
fn least_of(values: &Tensor) -> Result<f64> {
    let least = ops::pieces(values)?.into_iter().map(|piece| piece.min_all()?.to_scalar::<f64>());
    Ok(least.collect::<candle_core::Result<Vec<_>>>()?.into_iter().fold(f64::INFINITY, f64::min))
}

/// `values` times their weights, both f64 `(b, n)`: 0 where a weight is 0, whatever the value.
fn weighed(values: &Tensor, weights: &Tensor) -> Result<Tensor> {
    ops::elementwise([values, weights], |[values, weights]| {
        weights.gt(0.0)?.where_cond(values, &values.zeros_like()?)? * weights
    })
}

/// [`ops::scan`] of each row as a problem of its own, f64 and u32 `(b, n)`.
fn scan_rows(x: &Rows) -> Result<(Tensor, Tensor)> {
    let (largest, bad) = ops::scan(&Rows::new(&x.tensor.unsqueeze(x.tensor.rank() - 1)?)?)?;
    Ok((largest.reshape((x.b, x.n))?, bad.reshape((x.b, x.n))?))
}

/// 1 where a row is without a NaN or an infinity and 0 elsewhere, f64 `(b, n)`.
fn finite_rows(x: &Rows) -> Result<Tensor> {
    if x.dtype() == DType::F64 {
        // A norm may be infinite where the row is not.
        let (_, first_bad) = scan_rows(x)?;
        // 0 is what it says of a row that is not, and the largest u32 of others.
        return within(&ops::elementwise([&first_bad], |[bad]| bad.to_dtype(DType::F64))?, Some(0.0));
    }
    within(&ops::norms(x)?, None)
}

/// 1 where a row has a direction, a norm that is neither 0 nor infinite, and 0 elsewhere, f64 `(b, n)`.
fn directed_rows(x: &Rows) -> Result<Tensor> {
    within(&ops::norms(x)?, Some(0.0))
}

/// 1 where a value is above `low`, if there is one, and finite, and 0 elsewhere. The bounds are tensors: what a comparison with a
/// number takes to the device would not be there when a captured graph looks for it.
fn within(values: &Tensor, low: Option<f64>) -> Result<Tensor> {
    ops::elementwise([values], |[values]| {
        let bound = |v: f64| Tensor::full(v, values.shape(), values.device());
        let mut mask = values.lt(&bound(f64::INFINITY)?)?;
        if let Some(low) = low {
            mask = (mask * values.gt(&bound(low)?)?)?;
        }
        mask.to_dtype(DType::F64)
    })
}
