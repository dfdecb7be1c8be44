//! Centroids that follow rows as they come, and clusters that are appended segment by segment.

use crate::{
    functional,
    ops::{self, Memory, Rule, Terms},
    problem::{self, Problem, Rows},
    Error, Fit, Metric, Result,
};
use candle_core::{DType, Tensor};

/// Mini-batch k-means (Sculley 2010): centroids as running means of all rows that they were given.
///
/// A batch is assigned, and each centroid moves towards the mean of its rows by the share that they are of all rows it has
/// had: `c += (mean - c) * n / (count + n)`. One pass over the new rows and none over old ones, as appending to a cache asks
/// for. Means are kept in f64 and rounded to the rows' dtype where they are compared with rows. With
/// [`Metric::Cosine`] they are the means of the rows' directions, shown as unit vectors; a fit's centroids count as such means
/// of length 1.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{KMeans, MiniBatch};
///
/// let x = Tensor::new(&[[0f32], [2.], [10.], [12.]], &Device::Cpu)?;
/// let mut running = MiniBatch::of(&KMeans::new(2).fit(&x)?)?;
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
    p: Problem,
    /// f64 `(b, k, d)`.
    means: Tensor,
    /// f64 `(..batch, k)`.
    counts: Tensor,
}

impl MiniBatch {
    /// From centroids `(..batch, k, d)` of rows not yet seen: the first rows of each replace it.
    ///
    /// # Errors
    /// Refuses centroids that are no float matrix, and [`Metric::Manhattan`], since medians do not run.
    pub fn new(centroids: &Tensor, metric: Metric) -> Result<Self> {
        if centroids.rank() < 2 {
            return Err(Error::Rank { argument: "centroids", expected: 2, shape: centroids.dims().to_vec() });
        }
        let k = centroids.dims()[centroids.rank() - 2];
        if !matches!(centroids.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let (got, expected) = (centroids.dtype(), "F16, BF16, F32 or F64".into());
            return Err(Error::DType { argument: "centroids", got, expected });
        }
        let p = Problem::of(centroids.dims(), centroids.dtype(), k, metric)?.fitting()?;
        if metric == Metric::Manhattan {
            let with = "a mini-batch, which has no running median".into();
            return Err(Error::Conflict { argument: "metric", got: metric.name().into(), with });
        }
        let means = centroids.detach().to_dtype(DType::F64)?.contiguous()?.reshape((p.b, k, p.d))?;
        let counts = Tensor::zeros(p.shape(&[k]), DType::F64, centroids.device())?;
        Ok(Self { p, means, counts })
    }

    /// From the centroids and counts of a fit.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(fit: &Fit) -> Result<Self> {
        fit.check()?;
        Ok(Self { counts: fit.counts.to_dtype(DType::F64)?, ..Self::new(&fit.centroids, fit.metric)? })
    }

    /// Takes new rows `(..batch, m, d)` and returns their labels, u32 `(..batch, m)`: of the centroids before they move.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together. Values are not searched: a NaN or an infinity counts as 0.
    pub fn step(&mut self, x: &Tensor) -> Result<Tensor> {
        let p = Problem::of(x.dims(), x.dtype(), self.p.k, self.p.metric)?;
        let expected = self.p.shape(&[p.n, self.p.d]);
        if x.dims() != expected {
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        problem::check_dtype("x", x, self.p.dtype)?;
        problem::check_device("x", x, self.means.device())?;
        if p.n == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: problem::MAX_ROWS });
        }
        let labels = functional::assign(x, &self.centroids()?, p.metric)?;
        let flat = labels.reshape((p.b, p.n))?;
        let rows = Rows::new(&x.detach().to_dtype(DType::F64)?)?;
        let mut terms = Terms::of(&rows)?;
        if p.metric == Metric::Cosine {
            // Columns of a unit vector, with room for rounding.
            terms.factor = Some(ops::norms(&rows)?.recip()?);
            terms.largest = Tensor::full(2f64, p.b, x.device())?;
        }
        let sums = self.means.zeros_like()?;
        ops::update(&rows, &terms, Some(&flat), Rule::Sum, None, &sums, &Memory::default())?;
        let new = ops::cluster_sizes(&flat, p.k)?.to_dtype(DType::F64)?;
        let counts = (self.counts.reshape((p.b, p.k))? + &new)?;
        // c + (sum / n - c) n / count is c + (sum - n c) / count; a cluster without rows gets c + 0.
        let step = (sums - self.means.broadcast_mul(&new.unsqueeze(2)?)?)?;
        self.means = (&self.means + step.broadcast_div(&counts.maximum(1f64)?.unsqueeze(2)?)?)?;
        self.counts = counts.reshape(p.shape(&[p.k]))?;
        Ok(labels)
    }

    /// The centroids, `(..batch, k, d)` in the rows' dtype.
    ///
    /// # Errors
    /// Where the device fails.
    pub fn centroids(&self) -> Result<Tensor> {
        let (p, means) = (&self.p, &self.means);
        let shown = if p.metric == Metric::Cosine {
            let norms = ops::norms(&Rows::new(means)?)?;
            // A mean of nothing, or of directions that cancel, has no direction.
            let norms = norms.ne(0f64)?.where_cond(&norms, &norms.ones_like()?)?;
            means.broadcast_div(&norms.unsqueeze(2)?)?
        } else {
            means.clone()
        };
        Ok(shown.to_dtype(p.dtype)?.reshape(p.shape(&[p.k, p.d]))?)
    }

    /// The rows that each centroid is the mean of, f64 `(..batch, k)`.
    pub fn counts(&self) -> &Tensor {
        &self.counts
    }
}

/// Clusters of a sequence that was fitted segment by segment: each segment has its own, and all are numbered on.
///
/// A cache that grows is clustered where it grows (RetroInfer, Chen et al. 2025): a row's label belongs to the centroids of
/// its own segment, and [`assign`](crate::assign) to all centroids may find a nearer one. Rows that a fit did not count
/// ([`KMeans::lengths`](crate::KMeans::lengths)) are in `labels` and `order` like any other.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{KMeans, Segments};
///
/// let kmeans = KMeans::new(2);
/// let x = Tensor::new(&[[0f32], [9.], [0.]], &Device::Cpu)?;
/// let mut cache = Segments::of(&kmeans.fit(&x)?)?;
/// cache.append(&kmeans.fit(&x)?)?;
/// assert_eq!(cache.centroids.dims(), [4, 1]);
/// let labels = cache.labels.to_vec1::<u32>()?;
/// assert!(labels[3..].iter().zip(&labels).all(|(new, old)| *new == old + 2));
/// assert_eq!(cache.offsets.to_vec1::<u32>()?[4], 6);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Segments {
    /// `(..batch, k, d)`, `k` being those of all segments.
    pub centroids: Tensor,
    /// u32 `(..batch, n)`, `n` being the rows of all segments.
    pub labels: Tensor,
    /// Rows in each cluster, u32 `(..batch, k)`.
    pub counts: Tensor,
    /// The rows in the order of their clusters, u32 `(..batch, n)`, as [`sort_by_cluster`](crate::sort_by_cluster) gives it.
    pub order: Tensor,
    /// Where clusters begin and end in it, u32 `(..batch, k + 1)`.
    pub offsets: Tensor,
    /// The metric of the fits.
    pub metric: Metric,
}

impl Segments {
    /// The first segment.
    ///
    /// # Errors
    /// Refuses a fit whose fields do not belong together any more, and fails where the device does.
    pub fn of(fit: &Fit) -> Result<Self> {
        fit.check()?;
        let (batch, [n, k]) = Self::sizes(fit);
        let (order, offsets) = ops::order(&problem::labels(&fit.labels, k)?, k)?;
        Ok(Self {
            centroids: fit.centroids.clone(),
            labels: fit.labels.clone(),
            counts: fit.counts.clone(),
            order: order.reshape([batch, &[n]].concat())?,
            offsets: offsets.reshape([batch, &[k + 1]].concat())?,
            metric: fit.metric,
        })
    }

    /// Appends a segment's rows and clusters, with labels, order and offsets going on from those so far.
    ///
    /// # Errors
    /// Refuses a fit of another metric, batch, dtype, device or number of columns, and more rows than a u32 counts.
    pub fn append(&mut self, fit: &Fit) -> Result<()> {
        fit.check()?;
        let (old, new) = (self.centroids.dims(), fit.centroids.dims());
        let (rank, rows, k) = (old.len(), self.labels.dims()[old.len() - 2], old[old.len() - 2]);
        if fit.metric != self.metric {
            let with = format!("segments by {}", self.metric.name());
            return Err(Error::Conflict { argument: "metric", got: fit.metric.name().into(), with });
        }
        if new.len() != rank || new[..rank - 2] != old[..rank - 2] || new[rank - 1] != old[rank - 1] {
            let mut expected = old.to_vec();
            expected[rank - 2] = new.len().checked_sub(2).map_or(0, |at| new[at]);
            return Err(Error::Shape { argument: "fit", got: new.to_vec(), expected });
        }
        problem::check_dtype("fit", &fit.centroids, self.centroids.dtype())?;
        problem::check_device("fit", &fit.centroids, self.centroids.device())?;
        let (_, [more, clusters]) = Self::sizes(fit);
        // There are no more clusters than rows.
        if rows + more > problem::MAX_ROWS {
            return Err(Error::TooLarge { argument: "fit rows", got: rows + more, limit: problem::MAX_ROWS });
        }
        let segment = Self::of(fit)?;
        let along = |old: &Tensor, new: &Tensor, from: usize| -> Result<Tensor> {
            let from = Tensor::full(from as u32, new.shape(), new.device())?;
            Ok(Tensor::cat(&[old, &(new + from)?], rank - 2)?)
        };
        *self = Self {
            centroids: Tensor::cat(&[&self.centroids, &segment.centroids], rank - 2)?,
            labels: along(&self.labels, &segment.labels, k)?,
            counts: Tensor::cat(&[&self.counts, &segment.counts], rank - 2)?,
            order: along(&self.order, &segment.order, rows)?,
            // The last offset so far is the first of the segment.
            offsets: along(&self.offsets, &segment.offsets.narrow(rank - 2, 1, clusters)?, rows)?,
            metric: self.metric,
        };
        Ok(())
    }

    /// The batch dimensions, the rows and the clusters of a fit.
    fn sizes(fit: &Fit) -> (&[usize], [usize; 2]) {
        let rank = fit.counts.rank();
        (&fit.counts.dims()[..rank - 1], [fit.labels.dims()[rank - 1], fit.counts.dims()[rank - 1]])
    }
}
