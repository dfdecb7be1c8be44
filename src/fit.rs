//! The result of a fit.

use crate::{
    functional, ops,
    problem::{Problem, Rows},
    saved::{self, Saved},
    Error, Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

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
    /// The sum of the sample weights in each cluster, f64 `(..batch, k)`, if the fit had any.
    pub weights: Option<Tensor>,
    /// Weighted sum of the distances to the assigned centroids in the metric's own unit, f64 `(..batch)`, computed from
    /// differences and summed in no particular order to the same bits in any.
    pub inertia: Tensor,
    /// Centroid updates made, u32 `(..batch)`. As in scikit-learn, the last one of a problem that converged strictly is the one
    /// that moved nothing.
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
        let weights = self.weights.iter().map(|t| ("weights", t));
        let tensors = self.named().into_iter().chain(weights).map(|(name, t)| (name.to_string(), t));
        saved::write(path.as_ref(), tensors, [("metric".to_string(), self.metric.name().to_string())])
    }

    pub(crate) fn load(path: &Path, device: &Device) -> Result<Self> {
        let mut file = Saved::read(path, device)?;
        let metric = file.metric("metric")?;
        let mut take = |name| file.take(name);
        let fit = Self {
            centroids: take("centroids")?,
            labels: take("labels")?,
            counts: take("counts")?,
            // Of fits that had any.
            weights: take("weights").ok(),
            inertia: take("inertia")?,
            n_iter: take("n_iter")?,
            converged: take("converged")?,
            metric,
        };
        if fit.centroids.rank() < 2 || fit.centroids.elem_count() == 0 {
            return Err(file.bad(format!("tensor centroids has shape {:?}", fit.centroids.dims())));
        }
        if let Some(w) = fit.weights.as_ref().filter(|w| (w.dims(), w.dtype()) != (fit.counts.dims(), DType::F64)) {
            return Err(file.bad(format!("tensor weights is {:?} {:?}", w.dtype(), w.dims())));
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

    /// `other`'s problems where `mask` (u8 `(..batch)`) is set.
    pub(crate) fn replaced_where(&self, mask: &Tensor, other: &Self) -> Result<Self> {
        let pick = |new: &Tensor, old: &Tensor| {
            let mut shape = mask.dims().to_vec();
            shape.resize(old.rank(), 1);
            Ok::<_, Error>(mask.reshape(shape)?.broadcast_as(old.shape())?.where_cond(new, old)?)
        };
        Ok(Self {
            centroids: pick(&other.centroids, &self.centroids)?,
            labels: pick(&other.labels, &self.labels)?,
            counts: pick(&other.counts, &self.counts)?,
            weights: match (&other.weights, &self.weights) {
                (Some(new), Some(old)) => Some(pick(new, old)?),
                _ => None,
            },
            inertia: pick(&other.inertia, &self.inertia)?,
            n_iter: pick(&other.n_iter, &self.n_iter)?,
            converged: pick(&other.converged, &self.converged)?,
            metric: self.metric,
        })
    }
}

/// Reads [`ops::scan`]'s answer.
pub(crate) fn refuse_non_finite(argument: &'static str, first_bad: &Tensor) -> Result<()> {
    let rows = first_bad.to_vec1::<u32>()?;
    match rows.iter().position(|&r| r != u32::MAX) {
        Some(batch) => Err(Error::NonFinite { argument, batch, row: rows[batch] as usize }),
        None => Ok(()),
    }
}
