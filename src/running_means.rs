//! Means of all rows that came so far.

use crate::{
    error::{Error, Result},
    fit::refuse_non_finite,
    host,
    metric::Metric,
    primitives,
    problem::Problem,
    row_weights::{or_one, Clusters},
    rows::Rows,
    saved::Saved,
};
use candle_core::{DType, Device, Tensor};

/// Checks centroids that somebody gives, `(..batch, k, d)`. The host waits to know that they are finite.
pub(crate) fn check_centroids(centroids: &Tensor) -> Result<()> {
    let (argument, dims) = ("centroids", centroids.dims());
    if dims.len() < 2 {
        return Err(Error::Rank { argument, expected: 2, shape: dims.to_vec() });
    }
    if !matches!(centroids.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        let expected = "F16, BF16, F32 or F64".into();
        return Err(Error::DType { argument, got: centroids.dtype(), expected });
    }
    if centroids.elem_count() == 0 {
        return Err(Error::Range { argument: "centroids elements", got: 0, min: 1, max: usize::MAX });
    }
    // Sizes that cannot be computed with.
    let k = dims[dims.len() - 2];
    Problem::of(dims, centroids.dtype(), k, Metric::default())?;
    refuse_non_finite(argument, &primitives::max_abs_and_first_nonfinite(&Rows::new(centroids)?)?.1)
}

/// Checks that centroids by a metric can be means that run.
pub(crate) fn check_running(metric: Metric, with: &str) -> Result<()> {
    if metric == Metric::Manhattan {
        let with = format!("{with}, which has no running median");
        return Err(Error::Conflict { argument: "metric", got: metric.name().into(), with });
    }
    Ok(())
}

/// Means of all rows that came so far, each step with a share of its own.
#[derive(Clone, Debug)]
pub(crate) struct RunningMeans {
    pub metric: Metric,
    /// f64 `(b, k, d)`; by cosine the means of directions.
    pub means: Tensor,
    /// The weight of the rows that each is the mean of, f64 `(b, k)`.
    pub weights: Tensor,
}

impl RunningMeans {
    /// Counts `kept` of the weight so far and `taken` of a batch's, and returns which means the batch has a share in, u8
    /// `(b, k)`. The others stay as they are, to the bit.
    pub fn add(&mut self, batch: &Clusters, kept: f64, taken: f64) -> Result<Tensor> {
        let new = (&batch.weights * taken)?;
        let total = ((&self.weights * kept)? + &new)?;
        let share = (new / or_one(&total)?)?;
        let shared = |means: &Tensor, share: Tensor| means.broadcast_mul(&share.unsqueeze(2)?);
        // Not `means + share * (batch - means)`, which a mean far away would round to nothing.
        self.means = (shared(&self.means, share.affine(-1.0, 1.0)?)? + shared(&batch.means, share.clone())?)?;
        self.weights = total;
        Ok(share.gt(0.0)?)
    }

    /// The means, f64 `(b, k, d)`, as unit vectors by cosine; a mean of directions that cancel has none and stays as it is.
    pub fn centroids(&self) -> Result<Tensor> {
        match self.metric {
            Metric::Cosine => unit_vectors(&self.means),
            _ => Ok(self.means.clone()),
        }
    }

    /// The same on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let (means, weights) = (host::to_device(&self.means, device)?, host::to_device(&self.weights, device)?);
        Ok(Self { metric: self.metric, means, weights })
    }

    /// Checks what a file holds: tensors of the shape `(b, k, d)` and weights that can be.
    pub fn checked(self, file: &Saved, shape: &[usize]) -> Result<Self> {
        for (name, t, expected) in [("means", &self.means, shape), ("weights", &self.weights, &shape[..2])] {
            if (t.dims(), t.dtype()) != (expected, DType::F64) {
                return Err(file.bad(format!(
                    "tensor {name} is {:?} {:?}, expected F64 {expected:?}",
                    t.dtype(),
                    t.dims()
                )));
            }
            let values = t.flatten_all()?.to_vec1::<f64>()?;
            if let Some(v) = values.into_iter().find(|v| !v.is_finite() || name == "weights" && *v < 0.0) {
                return Err(file.bad(format!("tensor {name} holds {v}")));
            }
        }
        Ok(self)
    }
}

/// Rows f64 `(b, n, d)` by their norms; rows of none as they are.
pub(crate) fn unit_vectors(rows: &Tensor) -> Result<Tensor> {
    let norms = primitives::norms(&Rows::new(rows)?)?;
    Ok(rows.broadcast_div(&or_one(&norms)?.unsqueeze(2)?)?)
}
