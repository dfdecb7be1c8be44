//! The builder, the result, and the one Lloyd loop.

use crate::{
    functional, init, ops,
    plan::Plan,
    problem::{Problem, Rows},
    Error, Init, Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use std::{
    collections::HashMap,
    fs,
    io::Write,
    path::Path,
    sync::{
        atomic::{AtomicU64, Ordering},
        Arc,
    },
};

/// What becomes of a cluster that loses its last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EmptyClusters {
    /// It keeps its centroid, and may win rows again.
    #[default]
    Keep,
    /// It moves to the row farthest from its own centroid (lowest index among equals), as scikit-learn does. Costs a read
    /// of the cluster sizes by the host in every iteration.
    Relocate,
}

/// One iteration of a running fit, as [`KMeans::on_iteration`] sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iteration {
    /// Run, from 0, of `n_init`.
    pub run: usize,
    /// Iterations finished in this run, from 1.
    pub iteration: usize,
    /// Problems of the batch that have converged.
    pub converged: usize,
}

/// Lloyd's k-means, configured: exact labels, reproducible to the bit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{Init, KMeans};
///
/// let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., 9.], [9., 8.]], &Device::Cpu)?;
/// let fit = KMeans::new(2).init(Init::KMeansPlusPlus).seed(1).fit(&x)?;
/// let labels = fit.labels.to_vec1::<u32>()?;
/// assert!(labels[0] == labels[1] && labels[2] == labels[3] && labels[0] != labels[2]);
/// assert_eq!(fit.inertia.to_scalar::<f64>()?, 1.0);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone)]
pub struct KMeans {
    k: usize,
    metric: Metric,
    init: Init,
    n_init: usize,
    max_iters: usize,
    tol: f64,
    seed: u64,
    weights: Option<Tensor>,
    empty: EmptyClusters,
    check_finite: bool,
    on_iteration: Option<Arc<dyn Fn(Iteration) + Send + Sync>>,
}

impl KMeans {
    /// `k` clusters by squared Euclidean distance from random rows, at most 25 iterations, `tol` 1e-4, seed 0.
    pub fn new(k: usize) -> Self {
        Self {
            k,
            metric: Metric::default(),
            init: Init::default(),
            n_init: 1,
            max_iters: 25,
            tol: 1e-4,
            seed: 0,
            weights: None,
            empty: EmptyClusters::default(),
            check_finite: true,
            on_iteration: None,
        }
    }

    /// The distance that labels minimise.
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metric = metric;
        self
    }

    /// Where the centroids start.
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Runs from this many starts (seeds `seed`, `seed + 1`, ..) and keeps the lowest inertia of each problem.
    pub fn n_init(mut self, n_init: usize) -> Self {
        self.n_init = n_init;
        self
    }

    /// Most centroid updates of a run; 0 only assigns to the initial centroids.
    pub fn max_iters(mut self, max_iters: usize) -> Self {
        self.max_iters = max_iters;
        self
    }

    /// Stops a problem when no centroid moved farther than `sqrt(tol * v)` in Euclidean distance, `v` being the mean
    /// variance of the columns (for cosine `1 / d`). 0 stops only when no label changes, which always stops.
    pub fn tol(mut self, tol: f64) -> Self {
        self.tol = tol;
        self
    }

    /// The seed of everything random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Non-negative weights of the rows, float `(..batch, n)` or `(n)`: they count in the initialisation, the update and
    /// the inertia.
    pub fn sample_weights(mut self, weights: &Tensor) -> Self {
        self.weights = Some(weights.clone());
        self
    }

    /// What becomes of clusters without rows.
    pub fn empty_clusters(mut self, policy: EmptyClusters) -> Self {
        self.empty = policy;
        self
    }

    /// Whether inputs are searched for NaN and infinities, and refused with their first row (default: yes; the host waits
    /// for the answer). Without it such a row gets some label in range and counts as zeros; other rows are unaffected.
    pub fn check_finite(mut self, check: bool) -> Self {
        self.check_finite = check;
        self
    }

    /// Calls `f` after every iteration: for progress bars.
    pub fn on_iteration(mut self, f: impl Fn(Iteration) + Send + Sync + 'static) -> Self {
        self.on_iteration = Some(Arc::new(f));
        self
    }

    /// What a fit of `x` would run and how much memory it would take, without running it.
    pub fn plan(&self, x: &Tensor) -> Result<Plan> {
        let p = Problem::fit(x, self.k, self.metric)?;
        Ok(Plan::new(&p, x, &self.init, self.weights.is_some(), ops::arch(x.device())?))
    }

    /// Clusters the rows of `x`, `(n, d)` or `(..batch, n, d)` in f16, bf16, f32 or f64, each problem of the batch on its own.
    ///
    /// # Errors
    /// Refuses shapes, dtypes, devices and settings that do not fit together, non-finite values (see
    /// [`check_finite`](Self::check_finite)), and fails where the device does; see [`Error`].
    pub fn fit(&self, x: &Tensor) -> Result<Fit> {
        let p = Problem::fit(x, self.k, self.metric)?;
        self.check(x)?;
        self.plan(x)?.announce();
        let data = Data::new(self, &p, x)?;
        let mut best = self.lloyd(&data, 0)?;
        for run in 1..self.n_init {
            let other = self.lloyd(&data, run)?;
            let better = other.inertia.lt(&best.inertia)?;
            best = best.replaced_where(&better, &other)?;
        }
        best.unbatched(&p)
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
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved fit.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Fit> {
        Fit::load(path.as_ref(), device)
    }

    fn check(&self, x: &Tensor) -> Result<()> {
        if self.n_init == 0 {
            return Err(Error::Range { argument: "n_init", got: 0, min: 1, max: usize::MAX });
        }
        if !(self.tol >= 0.0 && self.tol.is_finite()) {
            return Err(Error::Value { argument: "tol", got: self.tol, expected: "a finite number of at least 0" });
        }
        if self.n_init > 1 && matches!(self.init, Init::Given(_)) {
            let with = "given centroids, which start every run alike".into();
            return Err(Error::Conflict { argument: "n_init", got: self.n_init.to_string(), with });
        }
        init::check(&self.init, x, self.k, self.metric)
    }

    /// The loop. Labels always belong to the centroids beside them.
    fn lloyd(&self, data: &Data, run: usize) -> Result<Fit> {
        let Data { x, weights, .. } = data;
        let (metric, seed) = (self.metric, self.seed.wrapping_add(run as u64));
        let start = init::centroids(&self.init, x, self.k, weights.as_ref(), metric, seed)?;
        let mut centroids = Rows::new(&start)?;
        let mut labels = ops::labels(x, &centroids, metric)?;
        let mut done = Tensor::zeros(x.b, DType::U8, x.device())?;
        let mut finished = vec![0u8; x.b];
        let mut n_iter = vec![0u32; x.b];
        for iteration in 1..=self.max_iters {
            if self.empty == EmptyClusters::Relocate {
                labels = data.relocate(labels, &centroids, &finished)?;
            }
            let moved = Rows::new(&data.update(&labels, &centroids, &done)?)?;
            let next = ops::labels(x, &moved, metric)?;
            let shift = ops::shift(&moved, &centroids)?;
            done = ops::converged(&done, &labels, &next, &shift, &data.threshold)?;
            (centroids, labels) = (moved, next);
            n_iter.iter_mut().zip(&finished).for_each(|(n, &f)| *n += (f == 0) as u32);
            finished = done.to_vec1()?;
            let converged = finished.iter().filter(|&&f| f != 0).count();
            if let Some(f) = &self.on_iteration {
                f(Iteration { run, iteration, converged });
            }
            if converged == x.b {
                break;
            }
        }
        let (_, offsets) = ops::order(&labels, self.k)?;
        let mut cost = ops::distances(x, &centroids, &labels, metric)?;
        if let Some(w) = weights {
            cost = (cost * w)?;
        }
        Ok(Fit {
            centroids: centroids.tensor,
            counts: ops::cluster_sizes(&offsets)?,
            labels,
            inertia: ops::total(&cost)?,
            n_iter: Tensor::from_vec(n_iter, x.b, x.device())?,
            converged: done,
            metric,
        })
    }
}

/// The input of a fit, with what stays the same over its iterations.
struct Data {
    x: Rows,
    k: usize,
    metric: Metric,
    /// f64 `(b, n)`, and the largest of each problem.
    weights: Option<Tensor>,
    largest_weight: Option<Tensor>,
    /// What a row is multiplied with before it is summed, f64 `(b, n)`.
    factor: Option<Tensor>,
    /// Bound on the magnitude of the terms of the sums, f64 `(b,)`.
    largest_term: Tensor,
    /// Squared shift at which a problem has converged, f64 `(b,)`.
    threshold: Tensor,
}

impl Data {
    fn new(settings: &KMeans, p: &Problem, x: &Tensor) -> Result<Self> {
        let x = ops::readable(Rows::new(&x.detach())?, p.k, p.metric)?;
        let (largest, first_bad) = ops::scan(&x)?;
        if settings.check_finite {
            refuse_non_finite("x", &first_bad)?;
            if let Init::Given(c) = &settings.init {
                refuse_non_finite("init", &ops::scan(&Rows::new(&c.detach())?)?.1)?;
            }
        }
        let weights = settings.weights.as_ref().map(|w| p.weights(&w.detach(), x.device())).transpose()?;
        let mut largest_weight = None;
        if let Some(w) = &weights {
            let (most, first_bad) = ops::scan(&Rows::new(&w.unsqueeze(2)?)?)?;
            if settings.check_finite {
                refuse_non_finite("sample_weights", &first_bad)?;
                let least = w.min_all()?.to_scalar::<f64>()?;
                if least < 0.0 {
                    return Err(Error::Value { argument: "sample_weights", got: least, expected: "at least 0" });
                }
                if most.min_all()?.to_scalar::<f64>()? == 0.0 {
                    return Err(Error::Value { argument: "sample_weights total", got: 0.0, expected: "positive" });
                }
            }
            largest_weight = Some(most);
        }
        let (mut factor, mut largest_term) = (weights.clone(), largest.clone());
        if let Some(most) = &largest_weight {
            largest_term = (&largest_term * most)?;
        }
        if p.metric == Metric::Cosine {
            let inverse = ops::norms(&x)?.recip()?;
            factor = Some(match &weights {
                Some(w) => (w * inverse)?,
                None => inverse,
            });
            // Columns of a unit vector, with room for rounding, times the weight.
            largest_term = match &largest_weight {
                Some(most) => (most * 2.0)?,
                None => Tensor::full(2f64, x.b, x.device())?,
            };
        }
        let threshold = threshold(&x, p, settings.tol, &largest)?;
        Ok(Self { x, k: p.k, metric: p.metric, weights, largest_weight, factor, largest_term, threshold })
    }

    /// The centroids that minimise the cost for these labels.
    fn update(&self, labels: &Tensor, old: &Rows, done: &Tensor) -> Result<Tensor> {
        let (order, offsets) = ops::order(labels, self.k)?;
        if self.metric == Metric::Manhattan {
            let weights = self.weights.as_ref().zip(self.largest_weight.as_ref());
            return ops::medians(&self.x, weights, &order, &offsets, old, done);
        }
        let weight = match &self.weights {
            Some(w) => ops::cluster_weights(w, &order, &offsets)?,
            None => ops::cluster_sizes(&offsets)?.to_dtype(DType::F64)?,
        };
        let sums = ops::sums(&self.x, self.factor.as_ref(), Some(&order), &offsets, &self.largest_term)?;
        let totals = ops::totals(&sums, &self.largest_term, self.x.n)?;
        ops::means(&totals, &weight, old, done, self.metric)
    }

    /// Labels in which every empty cluster owns one of the rows farthest from their centroids.
    fn relocate(&self, labels: Tensor, centroids: &Rows, done: &[u8]) -> Result<Tensor> {
        let (_, offsets) = ops::order(&labels, self.k)?;
        let sizes = ops::cluster_sizes(&offsets)?.to_vec2::<u32>()?;
        let lacking = |b: usize| done[b] == 0 && sizes[b].contains(&0);
        if !(0..self.x.b).any(lacking) {
            return Ok(labels);
        }
        let mut cost = ops::distances(&self.x, centroids, &labels, self.metric)?;
        if let Some(w) = &self.weights {
            cost = (cost * w)?;
        }
        let (cost, mut rows) = (cost.to_vec2::<f64>()?, labels.to_vec2::<u32>()?);
        for b in (0..self.x.b).filter(|&b| lacking(b)) {
            let (mut size, cost, labels) = (sizes[b].clone(), &cost[b], &mut rows[b]);
            let mut far: Vec<u32> = (0..self.x.n as u32).collect();
            far.sort_unstable_by(|&i, &j| cost[j as usize].total_cmp(&cost[i as usize]).then(i.cmp(&j)));
            let mut far = far.into_iter().map(|i| i as usize);
            for cluster in (0..self.k).filter(|&j| sizes[b][j] == 0) {
                // A row on its centroid has nowhere better to be, and a cluster's last row would leave it empty.
                let taken =
                    far.find(|&i| size[labels[i] as usize] > 1 && (cost[i] > 0.0 || self.metric == Metric::Dot));
                let Some(i) = taken else { break };
                size[labels[i] as usize] -= 1;
                size[cluster] += 1;
                labels[i] = cluster as u32;
            }
        }
        Ok(Tensor::from_vec(rows.concat(), (self.x.b, self.x.n), self.x.device())?)
    }
}

/// `tol` times the mean variance of the columns.
fn threshold(x: &Rows, p: &Problem, tol: f64, largest: &Tensor) -> Result<Tensor> {
    let device = x.device();
    if tol == 0.0 || p.metric == Metric::Cosine {
        return Ok(Tensor::full(tol / p.d as f64, x.b, device)?);
    }
    let everything = Tensor::new(&[[0u32, x.n as u32]], device)?.repeat((x.b, 1))?;
    let totals = ops::totals(&ops::sums(x, None, None, &everything, largest)?, largest, x.n)?;
    let zero = Rows::new(&Tensor::zeros((x.b, 1, x.d), x.dtype(), device)?)?;
    let weight = Tensor::full(x.n as f64, (x.b, 1), device)?;
    let running = Tensor::zeros(x.b, DType::U8, device)?;
    let mean = Rows::new(&ops::means(&totals, &weight, &zero, &running, Metric::SquaredEuclidean)?)?;
    let one = Tensor::zeros((x.b, x.n), DType::U32, device)?;
    let spread = ops::total(&ops::distances(x, &mean, &one, Metric::SquaredEuclidean)?)?;
    Ok((spread * (tol / (x.n as f64 * x.d as f64)))?)
}

/// Reads [`ops::scan`]'s answer.
fn refuse_non_finite(argument: &'static str, first_bad: &Tensor) -> Result<()> {
    let rows = first_bad.to_vec1::<u32>()?;
    match rows.iter().position(|&r| r != u32::MAX) {
        Some(batch) => Err(Error::NonFinite { argument, batch, row: rows[batch] as usize }),
        None => Ok(()),
    }
}

/// A finished fit. All tensors are on the input's device and start with its batch dimensions.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fit {
    /// `(..batch, k, d)` in the input's dtype.
    pub centroids: Tensor,
    /// u32 `(..batch, n)`: equal to `predict(x)`, always.
    pub labels: Tensor,
    /// Rows in each cluster, u32 `(..batch, k)`.
    pub counts: Tensor,
    /// Weighted sum of the distances to the assigned centroids in the metric's own unit, f64 `(..batch)`, computed from
    /// differences and summed in no particular order to the same bits in any.
    pub inertia: Tensor,
    /// Centroid updates made, u32 `(..batch)`.
    pub n_iter: Tensor,
    /// 1 where the problem converged before `max_iters`, u8 `(..batch)`.
    pub converged: Tensor,
    /// The metric of the fit.
    pub metric: Metric,
}

impl Fit {
    /// Exact labels of new rows `(..batch, m, d)`, u32 `(..batch, m)`. A fit of one problem labels any batch.
    ///
    /// # Errors
    /// Refuses rows that do not fit the centroids, and non-finite ones (the host waits for that answer; the op
    /// [`assign`](crate::assign) does not ask).
    pub fn predict(&self, x: &Tensor) -> Result<Tensor> {
        Problem::assign(x, &self.centroids, self.metric)?;
        refuse_non_finite("x", &ops::scan(&Rows::new(&x.detach())?)?.1)?;
        functional::assign(x, &self.centroids, self.metric)
    }

    /// The distance of each row of `x` `(..batch, m, d)` to every centroid, in the metric's own unit (squared for squared
    /// Euclidean): `(..batch, m, k)`, f64 for f64 rows and f32 otherwise.
    ///
    /// # Errors
    /// As [`predict`](Self::predict).
    pub fn transform(&self, x: &Tensor) -> Result<Tensor> {
        let p = Problem::assign(x, &self.centroids, self.metric)?;
        let x = Rows::new(&x.detach())?;
        refuse_non_finite("x", &ops::scan(&x)?.1)?;
        let c = Rows::new(&self.centroids)?.broadcast(p.b);
        Ok(ops::pairwise(&x, &c, self.metric)?.reshape(p.shape(&[p.n, p.k]))?)
    }

    /// Writes the fit as a safetensors file, whole or not at all: a temporary file beside `path` is renamed to it.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let metadata =
            HashMap::from([("metric".to_string(), self.metric.name().to_string()), FORMAT.map(String::from).into()]);
        let tensors = self.named().map(|(name, t)| (name, t.clone()));
        let bytes = safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?;
        let io = |source| Error::Io { path: path.display().to_string(), source };
        // A name of its own for every call, so that writers of one path cannot take each other's file.
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_extension(format!("{}-{call}.tmp", std::process::id()));
        let write = || {
            let mut file = fs::File::create(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().inspect_err(|_| drop(fs::remove_file(&temporary))).map_err(io)
    }

    fn load(path: &Path, device: &Device) -> Result<Self> {
        let name = path.display().to_string();
        let bytes = fs::read(path).map_err(|source| Error::Io { path: name.clone(), source })?;
        let bad = |reason: String| Error::Format { path: name.clone(), reason };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let [key, version] = FORMAT;
        if metadata.get(key).map(String::as_str) != Some(version) {
            return Err(bad(format!("metadata {key} is {:?}, expected {version}", metadata.get(key))));
        }
        let metric = metadata.get("metric").and_then(|m| Metric::from_name(m));
        let metric = metric.ok_or_else(|| bad(format!("metadata metric is {:?}", metadata.get("metric"))))?;
        let mut tensors = candle_core::safetensors::load_buffer(&bytes, device)?;
        let mut take = |n: &str| tensors.remove(n).ok_or_else(|| bad(format!("tensor {n} is missing")));
        let fit = Self {
            centroids: take("centroids")?,
            labels: take("labels")?,
            counts: take("counts")?,
            inertia: take("inertia")?,
            n_iter: take("n_iter")?,
            converged: take("converged")?,
            metric,
        };
        if fit.centroids.rank() < 2 || fit.centroids.elem_count() == 0 {
            return Err(bad(format!("tensor centroids has shape {:?}", fit.centroids.dims())));
        }
        Ok(fit)
    }

    fn named(&self) -> [(&'static str, &Tensor); 6] {
        [
            ("centroids", &self.centroids),
            ("labels", &self.labels),
            ("counts", &self.counts),
            ("inertia", &self.inertia),
            ("n_iter", &self.n_iter),
            ("converged", &self.converged),
        ]
    }

    /// `other`'s problems where `mask` (u8 `(b,)`) is set.
    fn replaced_where(&self, mask: &Tensor, other: &Self) -> Result<Self> {
        let pick = |new: &Tensor, old: &Tensor| {
            let mut shape = vec![1; old.rank()];
            shape[0] = mask.dims()[0];
            Ok::<_, Error>(mask.reshape(shape)?.broadcast_as(old.shape())?.where_cond(new, old)?)
        };
        Ok(Self {
            centroids: pick(&other.centroids, &self.centroids)?,
            labels: pick(&other.labels, &self.labels)?,
            counts: pick(&other.counts, &self.counts)?,
            inertia: pick(&other.inertia, &self.inertia)?,
            n_iter: pick(&other.n_iter, &self.n_iter)?,
            converged: pick(&other.converged, &self.converged)?,
            metric: self.metric,
        })
    }

    /// The same with the caller's batch dimensions in place of `b`.
    fn unbatched(self, p: &Problem) -> Result<Self> {
        Ok(Self {
            centroids: self.centroids.reshape(p.shape(&[p.k, p.d]))?,
            labels: self.labels.reshape(p.shape(&[p.n]))?,
            counts: self.counts.reshape(p.shape(&[p.k]))?,
            inertia: self.inertia.reshape(p.shape(&[]))?,
            n_iter: self.n_iter.reshape(p.shape(&[]))?,
            converged: self.converged.reshape(p.shape(&[]))?,
            metric: self.metric,
        })
    }
}

/// Key and value that mark a saved fit.
const FORMAT: [&str; 2] = ["candle_flash_kmeans", "1"];
