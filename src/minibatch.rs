//! Centroids that follow rows as they come.

use crate::{
    error::{Error, Result},
    fit::Fit,
    functional, host,
    kmeans::KMeans,
    memory::Fence,
    metric::Metric,
    primitives,
    problem::{self, Problem},
    row_weights::{self, RowWeights},
    rows::Rows,
    running_means::{check_centroids, check_running, unit_vectors, RunningMeans},
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Mini-batch k-means (Sculley 2010): centroids as running means of all rows that they were given.
///
/// A batch is assigned, and each centroid moves towards the mean of its rows by the share that they are of all rows it has
/// had: `c += (mean - c) * w / (weight + w)`, `w` being the number of rows or the sum of their weights. One pass over the new
/// rows and none over old ones, as appending to a cache asks for. Means are kept in f64 and rounded to the rows' dtype where
/// they are compared with rows. With [`Metric::Cosine`] they are the means of the rows' directions, shown as unit vectors; a
/// fit's centroids count as such means of length 1.
///
/// Rows that say nothing weigh nothing: those that hold a NaN or an infinity, and by cosine those of length 0. They have some
/// label in range, and all else is as without them.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{KMeans, MiniBatch};
///
/// let x = Tensor::new(&[[0f32], [2.], [10.], [12.]], &Device::Cpu)?;
/// let mut running = MiniBatch::train(&x, &KMeans::new(2))?;
/// let labels = running.step(&Tensor::new(&[[4f32], [17.]], &Device::Cpu)?)?;
/// let mut centroids = running.centroids()?.flatten_all()?.to_vec1::<f32>()?;
/// centroids.sort_by(f32::total_cmp);
/// assert_eq!(centroids, [2., 13.]);
/// assert_eq!(running.counts().to_vec1::<f64>()?, [3., 3.]);
/// assert_ne!(labels.to_vec1::<u32>()?[0], labels.to_vec1::<u32>()?[1]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct MiniBatch {
    fence: Fence,
    p: Problem,
    running: RunningMeans,
    reassignment: Option<Reassignment>,
    /// Steps so far, and rows of a problem since centroids were last reassigned.
    steps: u64,
    seen: usize,
    /// The weights as they are shown, f64 `(..batch, k)`.
    counts: Tensor,
}

/// Which centroids start again from rows of a batch.
#[derive(Clone, Copy, Debug)]
struct Reassignment {
    ratio: f64,
    seed: u64,
}

/// Centroids of little weight wait for so many rows for each centroid, as in scikit-learn.
const ROWS_PER_CENTROID: usize = 10;

impl MiniBatch {
    /// From centroids `(..batch, k, d)` of rows not yet seen: the first rows of each replace it.
    ///
    /// # Errors
    /// Refuses centroids that are no float matrix or not finite (the host waits for that answer), and [`Metric::Manhattan`],
    /// since medians do not run.
    pub fn new(centroids: &Tensor, metric: Metric) -> Result<Self> {
        check_centroids(centroids)?;
        check_running(metric, "a mini-batch")?;
        let k = centroids.dims()[centroids.rank() - 2];
        let p = Problem::of(centroids.dims(), centroids.dtype(), k, metric)?.fitting()?;
        let fence = Fence::default();
        fence.write(centroids.device())?;
        let means = centroids.detach().to_dtype(DType::F64)?.force_contiguous()?.reshape((p.b, k, p.d))?;
        let weights = Tensor::zeros((p.b, k), DType::F64, centroids.device())?;
        let running = RunningMeans { metric, means, weights };
        Self { fence, counts: running.weights.clone(), running, p, reassignment: None, steps: 0, seen: 0 }
            .with_weights(None)
    }

    /// From where `kmeans` would start on `x` `(..batch, n, d)`: its [`Init`](crate::Init), which of several is the best
    /// ([`KMeans::n_init`]), and no iteration. These rows count for nothing yet: give them to [`step`](Self::step), too, as scikit-learn's
    /// `MiniBatchKMeans` does.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn start(x: &Tensor, kmeans: &KMeans) -> Result<Self> {
        check_running(kmeans.metric, "a mini-batch")?;
        let fit = row_weights::fit(x, &kmeans.clone().max_iters(0))?;
        Self::new(&fit.centroids, fit.metric)
    }

    /// Lets dead centroids start again from rows of a batch (scikit-learn's `reassignment_ratio`, 0.01 there; 0: never, which is the default). At
    /// the end of a step a centroid that has had no row moves to one of the step's rows that count, and so does, each time that ten rows for each
    /// centroid have come, one of less than `ratio` times the largest weight in its problem. Each has a row of its own, evenly spaced from a random
    /// start by `seed` and the number of the step; in a step no more move than half of its rows that count, those of the lowest index, and at
    /// least one. A moved centroid weighs as much as the lightest that is not dead, or as none if all are.
    ///
    /// # Errors
    /// Refuses a ratio outside of 0 and 1.
    pub fn reassignment_ratio(mut self, ratio: f64, seed: u64) -> Result<Self> {
        if !(0.0..=1.0).contains(&ratio) {
            return Err(Error::Value { argument: "reassignment_ratio", got: ratio, expected: "between 0 and 1" });
        }
        self.reassignment = (ratio > 0.0).then_some(Reassignment { ratio, seed });
        Ok(self)
    }

    /// From the centroids of a fit and the weights of its clusters: the sample weights of their rows if the fit had any, and
    /// their number otherwise.
    ///
    /// # Errors
    /// As [`new`](Self::new). Refuses a fit whose counts are not those of its centroids.
    pub fn from_fit(fit: &Fit) -> Result<Self> {
        fit.check()?;
        let weights = fit.weights.as_ref().unwrap_or(&fit.counts);
        Self::new(&fit.centroids, fit.metric)?.with_weights(Some(weights))
    }

    /// From a fit of `x` `(..batch, n, d)`, in which rows that say nothing weigh nothing either, where
    /// [`KMeans::check_finite`] lets them in.
    ///
    /// # Errors
    /// As [`KMeans::fit`] and [`new`](Self::new), before any work.
    pub fn train(x: &Tensor, kmeans: &KMeans) -> Result<Self> {
        check_running(kmeans.metric, "a mini-batch")?;
        let fit = row_weights::fit(x, kmeans)?;
        let weights = row_weights::cluster_weights(x, kmeans, &fit)?;
        Self::new(&fit.centroids, fit.metric)?.with_weights(Some(&weights))
    }

    fn with_weights(mut self, weights: Option<&Tensor>) -> Result<Self> {
        let p = &self.p;
        if let Some(weights) = weights {
            self.running.weights = weights.detach().to_dtype(DType::F64)?.force_contiguous()?.reshape((p.b, p.k))?;
        }
        self.counts = self.running.weights.reshape(p.shape(&[p.k]))?;
        Ok(self)
    }

    /// Takes new rows `(..batch, m, d)` and returns their labels, u32 `(..batch, m)`: of the centroids before they move.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together, and `x` without rows. Values are not searched, and the host
    /// waits for nothing.
    pub fn step(&mut self, x: &Tensor) -> Result<Tensor> {
        self.learn(x, None)
    }

    /// The same with weights of the rows, float `(..batch, m)` or `(m)`. A weight that is not a finite number above 0 is none.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_weighted(&mut self, x: &Tensor, sample_weights: &Tensor) -> Result<Tensor> {
        self.learn(x, Some(sample_weights))
    }

    fn learn(&mut self, x: &Tensor, sample_weights: Option<&Tensor>) -> Result<Tensor> {
        let p = Problem::of(x.dims(), x.dtype(), self.p.k, self.p.metric)?;
        let expected = self.p.shape(&[p.n, self.p.d]);
        if x.dims() != expected {
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        problem::check_dtype("x", x, self.p.dtype)?;
        problem::check_device("x", x, self.counts.device())?;
        self.fence.write(x.device())?;
        if p.n == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: problem::MAX_ROWS });
        }
        let given = sample_weights.map(|w| row_weights::sample_weights(&p, w, x.device())).transpose()?;
        let labels = functional::assign(x, &self.centroids()?, p.metric)?;
        let x = x.detach();
        let weights = RowWeights::new(&Rows::new(&x)?, given.as_ref(), p.metric)?;
        let rows = Rows::new(&primitives::elementwise([&x], |[x]| x.to_dtype(DType::F64))?)?;
        self.running.add(&weights.clusters(&rows, &labels.reshape((p.b, p.n))?, p.k)?, 1.0, 1.0)?;
        self.seen = self.seen.saturating_add(p.n);
        if let Some(reassignment) = self.reassignment {
            self.reassign(reassignment, &weights, &rows)?;
        }
        self.steps = self.steps.wrapping_add(1);
        self.counts = self.running.weights.reshape(self.p.shape(&[p.k]))?;
        Ok(labels)
    }

    /// Moves dead centroids to rows of a batch, f64 `(b, n, d)`. Nothing is read back.
    fn reassign(
        &mut self,
        Reassignment { ratio, seed }: Reassignment,
        weights: &RowWeights,
        rows: &Rows,
    ) -> Result<()> {
        let (b, k, d) = self.running.means.dims3()?;
        let had = &self.running.weights;
        let mut dead = had.eq(0.0)?;
        if self.seen >= ROWS_PER_CENTROID * k {
            self.seen = 0;
            dead = had.broadcast_lt(&(had.max_keepdim(1)? * ratio)?)?.maximum(&dead)?;
        }
        let (index, moves) = weights.starts(&dead, seed, self.steps)?;
        let mut drawn = primitives::gather(rows, &index)?;
        if self.p.metric == Metric::Cosine {
            drawn = unit_vectors(&drawn)?;
        }
        let none = (had.ones_like()? * f64::INFINITY)?;
        let least = dead.where_cond(&none, had)?.min_keepdim(1)?;
        let least = least.lt(f64::INFINITY)?.where_cond(&least, &least.zeros_like()?)?;
        let moved = moves.unsqueeze(2)?.broadcast_as((b, k, d))?;
        self.running.means = moved.where_cond(&drawn, &self.running.means)?;
        self.running.weights = moves.where_cond(&least.broadcast_as((b, k))?.contiguous()?, had)?;
        Ok(())
    }

    /// The centroids, `(..batch, k, d)` in the rows' dtype.
    ///
    /// # Errors
    /// Fails where the device does.
    pub fn centroids(&self) -> Result<Tensor> {
        self.fence.read(self.counts.device())?;
        let p = &self.p;
        Ok(self.running.centroids()?.to_dtype(p.dtype)?.reshape(p.shape(&[p.k, p.d]))?)
    }

    /// The rows that each centroid is the mean of, or their weight, f64 `(..batch, k)`.
    pub fn counts(&self) -> &Tensor {
        self.fence.show(self.counts.device());
        &self.counts
    }

    /// The distance by which centroids are nearest.
    pub fn metric(&self) -> Metric {
        self.p.metric
    }

    /// The same for rows of another float dtype. Means stay as they are, in f64.
    ///
    /// # Errors
    /// Refuses other dtypes, and centroids that are not finite in it (the host waits for that answer).
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        check_centroids(&self.running.centroids()?.to_dtype(dtype)?)?;
        Ok(Self { p: Problem { dtype, ..self.p.clone() }, ..self.clone() })
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.fence.read(self.counts.device())?;
        let fence = Fence::default();
        fence.write(device)?;
        let (running, counts) = (self.running.to_device(device)?, host::to_device(&self.counts, device)?);
        Ok(Self { fence, running, counts, ..self.clone() })
    }

    /// Writes the means and their weights as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.fence.read(self.counts.device())?;
        let p = &self.p;
        let means = self.running.means.reshape(p.shape(&[p.k, p.d]))?;
        let tensors = [("means", &means), ("weights", &self.counts)].map(|(name, t)| (name.to_string(), t));
        let Reassignment { ratio, seed } = self.reassignment.unwrap_or(Reassignment { ratio: 0.0, seed: 0 });
        let settings = [
            ("kind", KIND.to_string()),
            ("metric", p.metric.name().to_string()),
            ("dtype", p.dtype.as_str().to_string()),
            ("reassignment_ratio", ratio.to_string()),
            ("seed", seed.to_string()),
            ("steps", self.steps.to_string()),
            ("seen", self.seen.to_string()),
        ];
        saved::write(path.as_ref(), tensors, settings.map(|(key, value)| (key.to_string(), value)))
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`: steps go on as if they had not stopped.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved mini-batch.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = Saved::read(path.as_ref(), device)?;
        file.expect("kind", KIND)?;
        let (metric, dtype) = (file.metric("metric")?, file.setting("dtype")?);
        let (means, weights) = (file.take("means")?, file.take("weights")?);
        let bad = |e: Error| file.bad(e.to_string());
        check_centroids(&means).map_err(bad)?;
        check_running(metric, "a mini-batch").map_err(bad)?;
        let k = means.dims()[means.rank() - 2];
        let p = Problem::of(means.dims(), dtype, k, metric).map_err(bad)?;
        if weights.dims() != p.shape(&[k]) {
            return Err(file.bad(format!("tensor weights has shape {:?}", weights.dims())));
        }
        let (means, weights) = (means.reshape((p.b, k, p.d))?, weights.reshape((p.b, k))?);
        let running = RunningMeans { metric, means, weights }.checked(&file, &[p.b, k, p.d])?;
        check_centroids(&running.centroids()?.to_dtype(dtype)?).map_err(bad)?;
        let fence = Fence::default();
        fence.write(device)?;
        let mut loaded =
            Self { fence, counts: running.weights.clone(), running, p, reassignment: None, steps: 0, seen: 0 };
        // Files of before have none of these.
        if file.states("reassignment_ratio") {
            let (ratio, seed) = (file.setting("reassignment_ratio")?, file.setting("seed")?);
            (loaded.steps, loaded.seen) = (file.setting("steps")?, file.setting("seen")?);
            loaded = loaded.reassignment_ratio(ratio, seed).map_err(|e| file.bad(e.to_string()))?;
        }
        loaded.with_weights(None)
    }
}

/// Files of these are marked with this.
const KIND: &str = "mini_batch";
