//! The memory of a fit, what it starts from and what comes out of it.

use super::{
    accumulate::Bounds,
    feed::{Block, Resident},
    threshold::{threshold, Usable},
    weights::{costs, counted_sizes, factors, scan_counted, Ragged, Weights},
};
use crate::{
    error::{Error, Result},
    fit::{refuse_non_finite, Fit},
    host,
    kept::{KeptBounds, KeptSums},
    kmeans::{Init, KMeans},
    memory::{Fence, Memory},
    metric::Metric,
    plan::{announce, Plan},
    primitives,
    problem::{self, Problem},
    request::{Progress, Summands},
    rows::Rows,
    seeding,
};
use candle_core::{DType, Device, Tensor};
use std::{fmt, sync::Mutex};

/// [`Progress::stop`] of a problem that has not converged.
pub(super) const RUNNING: u32 = u32::MAX;

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
/// [`EmptyClusters::Relocate`](crate::EmptyClusters::Relocate), and an [`Init`] other than k-means||, an optimum or weighted random rows.
/// Run once before the capture, on the same thread if the device is of [`Device::new_cuda`], so that all memory is there, and
/// keep the input and this value alive as long as the graph. A capture holds every iteration up to
/// [`max_iters`](KMeans::max_iters), of which it takes at most 65,536.
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
pub struct PreparedFit {
    pub(super) fence: Fence,
    pub(super) settings: KMeans,
    pub(super) p: Problem,
    pub(super) plan: Plan,
    pub(super) device: Device,
    /// `(b, k, d)` and u32 `(b, n)`.
    pub(super) centroids: Tensor,
    pub(super) labels: Tensor,
    /// The same with the caller's batch dimensions.
    pub(super) shown: [Tensor; 2],
    pub(super) progress: Progress,
    pub(super) ragged: Option<Ragged>,
    pub(super) weights: Option<Weights>,
    /// The rows to start from, if they do not depend on the data.
    pub(super) drawn: Option<Tensor>,
    pub(super) memory: Memory,
    /// The sums that updates leave each other on the CPU, where the plan says so.
    pub(super) kept_sums: Option<Mutex<KeptSums>>,
    /// What assignments leave each other, where the plan says so.
    pub(super) bounds: Option<KeptBounds>,
    /// The copy of rows that cannot be read where they lie.
    pub(super) copy: Option<Tensor>,
    pub(super) data: Option<Data>,
    /// Inputs that were taken in a capture, where nothing from outside may be freed.
    pub(super) captured: Vec<Rows<'static>>,
    /// The last run's inertia, f64 `(b,)`, where it was computed before the run was over.
    pub(super) inertia: Option<Tensor>,
    /// The updates of the last run, at most; none before it is over.
    pub(super) iterations: Option<usize>,
}

/// The input of a run, with what stays the same over its iterations.
pub(super) struct Data {
    pub(super) x: Rows<'static>,
    pub(super) summands: Summands,
}

impl fmt::Debug for PreparedFit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("PreparedFit");
        shown.field("settings", &self.settings).field("problem", &self.p).field("device", &self.device.location());
        shown.finish_non_exhaustive()
    }
}

impl PreparedFit {
    pub(super) fn new(settings: &KMeans, p: Problem, plan: Plan, device: &Device) -> Result<Self> {
        announce(&plan);
        let fence = Fence::default();
        fence.write(device)?;
        let lengths = settings.lengths.as_ref().map(|lengths| p.read_lengths(lengths)).transpose()?;
        let mut settings = settings.clone();
        if let Init::Given(c) = &mut settings.init {
            *c = c.detach().force_contiguous()?;
            if settings.check_finite {
                refuse_non_finite("init", &primitives::max_abs_and_first_nonfinite(&Rows::new(c)?)?.1)?;
            }
        }
        let ragged = lengths.map(|lengths| Ragged::new(lengths, &p, device)).transpose()?;
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
        let skip = plan.steps.skip;
        let kept_sums = (skip.keep_sums && !skip.on_gpu).then(|| KeptSums::new([p.b, p.n, p.k, p.d]).map(Mutex::new));
        let kept_sums = kept_sums.transpose()?;
        let bounds = || KeptBounds::new([p.b, p.n, p.k, p.d], skip, &device);
        let bounds = (skip.groups > 0 || skip.packs).then(bounds).transpose()?;
        let mut fit = Self {
            fence,
            settings,
            p,
            plan,
            device,
            centroids,
            labels,
            shown,
            progress,
            ragged,
            weights,
            drawn: None,
            memory,
            kept_sums,
            bounds,
            copy: None,
            data: None,
            captured: vec![],
            inertia: None,
            iterations: None,
        };
        fit.drawn = fit.draw(fit.settings.seed)?;
        Ok(fit)
    }

    /// The plan of the last run, and of the next one if its rows lie alike; before the first, that of rows side by side.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The memory that its ops share, for tests.
    #[cfg(feature = "cuda")]
    pub(crate) fn memory(&self) -> &Memory {
        &self.memory
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

    /// Adds up the inertia of a run's rows, where that costs no wait; the rows are let go then.
    pub(super) fn close(&mut self) -> Result<()> {
        if primitives::reads_are_free(&self.device) {
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
        let order = primitives::grouped(&self.labels, p.k)?;
        let weights = self.weights.as_ref().filter(|_| self.settings.weights.is_some());
        let weights = weights.map(|Weights { values, unit, .. }| {
            let sums = primitives::cluster_sums(values, Some(&order))?;
            Ok::<_, Error>(sums.broadcast_mul(&unit.unsqueeze(1)?)?.reshape(p.shape(&[p.k]))?)
        });
        Ok(Fit {
            centroids: self.shown[0].clone(),
            labels: self.shown[1].clone(),
            counts: counted_sizes(&order, self.ragged.as_ref().map(|ragged| &ragged.ones))?.reshape(p.shape(&[p.k]))?,
            weights: weights.transpose()?,
            inertia: inertia.reshape(p.shape(&[]))?,
            n_iter: stop.minimum(iterations.min(RUNNING as usize) as u32)?.reshape(p.shape(&[]))?,
            converged: stop.ne(RUNNING)?.reshape(p.shape(&[]))?,
            metric: p.metric,
        })
    }

    /// Takes the rows of a run, and finds what stays the same over its iterations.
    pub(super) fn load(&mut self, x: &Tensor) -> Result<()> {
        (self.inertia, self.iterations) = (None, None);
        let x = x.detach();
        let x = if problem::share_storage(&x, &self.centroids) { x.force_contiguous()? } else { x };
        let layout = Rows::of((&x).into()).map(|rows| rows.layout());
        if layout != self.plan.steps.given {
            self.plan = self.settings.plan_of(&self.p, layout, &self.device)?;
            announce(&self.plan);
        }
        let x = primitives::pack(&x, self.plan.pack, &mut self.copy)?;
        let counted = self.ragged.as_ref().map(|ragged| scan_counted(&x, &ragged.ones)).transpose()?;
        let mut summands = Summands::from_rows(&x)?;
        let mut first_nonfinite = summands.first_nonfinite.clone();
        if let Some(counted) = counted {
            // Padding may still hold what is not finite, which sums have to know.
            (summands.max_abs, first_nonfinite) = counted;
        }
        if self.settings.check_finite {
            refuse_non_finite("x", &first_nonfinite)?;
            // Padding has not been searched.
            summands.finite = self.ragged.is_none();
        }
        if self.settings.tol > 0.0 && self.p.metric != Metric::Cosine {
            let mut feed = Resident(self.block(&x, &summands));
            let bounds = Bounds { max_abs: summands.max_abs.clone(), max_weight: None, rows: self.p.n };
            let usable = Usable { all_finite: self.settings.check_finite, all_counted: self.ragged.is_none() };
            let threshold = threshold(&mut feed, &self.p, &bounds, usable, self.settings.tol)?;
            self.progress.threshold.slice_set(&threshold, 0, 0)?;
        }
        if self.p.metric == Metric::Cosine {
            // Columns of a unit vector, with room for rounding.
            summands.max_abs = Tensor::full(2f64, x.b, &self.device)?;
        }
        if let Some(Weights { max_weight, .. }) = &self.weights {
            summands.max_abs = (summands.max_abs * max_weight)?;
            summands.max_weight = Some(max_weight.clone());
        }
        summands.row_scale = factors(&x, self.weights.as_ref().map(|weights| &weights.values), self.p.metric)?;
        match &mut self.data {
            Some(data) => {
                let before = data.replace(x, summands)?;
                if primitives::capturing(&self.device)? {
                    self.captured.push(before);
                }
            }
            None => self.data = Some(Data { x, summands }),
        }
        Ok(())
    }

    /// All rows as a block.
    pub(super) fn block<'a>(&'a self, x: &'a Rows<'a>, summands: &'a Summands) -> Block<'a> {
        Block {
            x,
            summands,
            assign: self.plan.steps.assign,
            update: self.plan.steps.update,
            labels: &self.labels,
            weights: self.weights.as_ref().map(|weights| &weights.values),
            counted: self.ragged.as_ref().map(|ragged| &ragged.ones),
            first: 0,
            stays: true,
        }
    }

    pub(super) fn draw(&self, seed: u64) -> Result<Option<Tensor>> {
        let weighted = self.settings.weights.is_some();
        seeding::draw(&self.settings.init, &self.p, |b| self.rows(b), weighted, seed, &self.device)
    }

    /// The rows of problem `b` that count.
    pub(super) fn rows(&self, b: usize) -> usize {
        self.ragged.as_ref().map_or(self.p.n, |ragged| ragged.lengths[b])
    }

    /// The weighted distances of the rows to their centroids in total, f64 `(b,)`.
    fn total_cost(&self, x: &Rows) -> Result<Tensor> {
        let weights = self.weights.as_ref().map(|weights| &weights.values);
        let total = primitives::total(&costs(x, &self.centroids, &self.labels, weights, &self.settings)?)?;
        Ok(match &self.weights {
            Some(Weights { unit, .. }) => (total * unit)?,
            None => total,
        })
    }
}

impl Data {
    /// Takes new values where the old ones are, so that a captured run finds them there.
    fn replace(&mut self, x: Rows<'static>, summands: Summands) -> Result<Rows<'static>> {
        self.summands.max_abs.slice_set(&summands.max_abs, 0, 0)?;
        self.summands.first_nonfinite.slice_set(&summands.first_nonfinite, 0, 0)?;
        self.summands.finite = summands.finite;
        if let (Some(old), Some(new)) = (&self.summands.row_scale, &summands.row_scale) {
            if old.id() != new.id() {
                primitives::overwrite(old, new)?;
            }
        }
        Ok(std::mem::replace(&mut self.x, x))
    }
}
