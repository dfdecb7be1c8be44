//! Clusters that are appended segment by segment.

use crate::{
    error::{Error, Result},
    fit::Fit,
    functional,
    metric::Metric,
    problem,
};
use candle_core::{DType, Device, Tensor};

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
/// let mut cache = Segments::from_fit(&kmeans.fit(&x)?)?;
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
    /// The offsets at which clusters begin and end in it, u32 `(..batch, k + 1)`.
    pub offsets: Tensor,
    /// The metric of the fits.
    pub metric: Metric,
}

impl Segments {
    /// The first segment.
    ///
    /// # Errors
    /// Refuses a fit whose fields do not belong together any more (the host waits to know that labels are below `k`), and fails
    /// where the device does.
    pub fn from_fit(fit: &Fit) -> Result<Self> {
        fit.check()?;
        let (order, offsets) = functional::sort_by_cluster(&fit.labels, fit.k())?;
        let (centroids, labels, counts) = (fit.centroids.clone(), fit.labels.clone(), fit.counts.clone());
        Ok(Self { centroids, labels, counts, order, offsets, metric: fit.metric })
    }

    /// Appends a segment's rows and clusters, with labels, order and offsets going on from those so far.
    ///
    /// # Errors
    /// Refuses a fit of another metric, batch, dtype, device or number of columns, more rows than a u32 counts, and fields that
    /// do not belong together, here or in the fit (see [`from_fit`](Self::from_fit)).
    pub fn append(&mut self, fit: &Fit) -> Result<()> {
        let segment = Self::from_fit(fit)?;
        let (old, new) = (self.centroids.dims(), segment.centroids.dims());
        let (batch, k) = match old {
            [batch @ .., k, _] => (batch, *k),
            dims => return Err(Error::Rank { argument: "centroids", expected: 2, shape: dims.to_vec() }),
        };
        let rank = old.len();
        if fit.metric != self.metric {
            let with = format!("segments by {}", self.metric.name());
            return Err(Error::Conflict { argument: "metric", got: fit.metric.name().into(), with });
        }
        if new.len() != rank || new[..rank - 2] != *batch || new[rank - 1] != old[rank - 1] {
            let mut expected = old.to_vec();
            expected[rank - 2] = new[new.len() - 2];
            return Err(Error::Shape { argument: "fit", got: new.to_vec(), expected });
        }
        problem::check_dtype("fit", &segment.centroids, self.centroids.dtype())?;
        problem::check_device("fit", &segment.centroids, self.centroids.device())?;
        let rows = self.labels.dims().last().copied().unwrap_or(0);
        let parts = [
            ("labels", &self.labels, rows),
            ("counts", &self.counts, k),
            ("order", &self.order, rows),
            ("offsets", &self.offsets, k.saturating_add(1)),
        ];
        for (argument, t, last) in parts {
            check_part(argument, t, &[batch, &[last]].concat(), self.centroids.device())?;
        }
        let (more, clusters) = (segment.labels.dims()[rank - 2], new[rank - 2]);
        // There are no more clusters than rows.
        if rows.saturating_add(more) > problem::MAX_ROWS {
            let got = rows.saturating_add(more);
            return Err(Error::TooLarge { argument: "fit rows", got, limit: problem::MAX_ROWS });
        }
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
}

/// Checks a tensor of numbers of rows or clusters.
fn check_part(argument: &'static str, t: &Tensor, expected: &[usize], device: &Device) -> Result<()> {
    problem::check_dtype(argument, t, DType::U32)?;
    problem::check_device(argument, t, device)?;
    if t.dims() != expected {
        return Err(Error::Shape { argument, got: t.dims().to_vec(), expected: expected.to_vec() });
    }
    Ok(())
}
