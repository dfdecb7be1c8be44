//! The ops, each usable alone in a model's graph.

use crate::{
    ops::{self, Memory, Rule, Terms},
    problem::{self, Problem, Rows},
    Error, Metric, Result,
};
use candle_core::{backend::BackendStorage, CpuStorage, CudaStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor};

/// The exact nearest centroid of each row: u32 `(..batch, n)`.
///
/// `x` is `(..batch, n, d)` and `centroids` `(..batch, k, d)`, or `(k, d)` for every problem, in the same float dtype. A label
/// is the lowest index at the smallest distance as [`Metric`] defines it in f64. Values are not searched for NaN: such a
/// row gets some label in range. No gradient flows.
///
/// # Errors
/// Refuses shapes, dtypes and devices that do not fit together.
pub fn assign(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<Tensor> {
    let (p, x, c) = border(x, centroids, metric)?;
    Ok(ops::labels(&x, &c, metric)?.reshape(p.shape(&[p.n]))?)
}

/// [`assign`], and the distance of each row to its centroid, f64 `(..batch, n)`, by the definition of [`Metric`].
///
/// # Errors
/// As [`assign`].
pub fn assign_with_distances(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<(Tensor, Tensor)> {
    let (p, x, c) = border(x, centroids, metric)?;
    let labels = ops::labels(&x, &c, metric)?;
    let distances = ops::distances(&x, &c, &labels, metric)?;
    Ok((labels.reshape(p.shape(&[p.n]))?, distances.reshape(p.shape(&[p.n]))?))
}

/// The permutation that brings clusters together: `(order, offsets)` for u32 `labels` `(..batch, n)` below `k`.
///
/// `order` is u32 `(..batch, n)`: the rows of cluster 0 in ascending order, then those of cluster 1, and so on. Cluster `j`
/// is `order[offsets[j]..offsets[j + 1]]`; `offsets` is u32 `(..batch, k + 1)`.
///
/// # Errors
/// Refuses labels that are not u32 or not below `k` (the host waits for that answer).
pub fn sort_by_cluster(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let flat = problem::labels(labels, k)?;
    check_labels(&flat, k)?;
    let batch = &labels.dims()[..labels.rank() - 1];
    let (order, offsets) = ops::order(&flat, k)?;
    Ok((order.reshape(labels.shape())?, offsets.reshape([batch, &[k + 1]].concat())?))
}

/// The mean of the rows of each cluster, `(..batch, k, d)` in `x`'s dtype; zeros for a cluster without rows.
///
/// `x` is `(..batch, n, d)` and `labels` u32 `(..batch, n)` below `k`. Differentiable in `x`: a row's gradient is its
/// cluster's, divided by the number of rows.
///
/// # Errors
/// Refuses shapes, dtypes, devices and labels that do not fit together (the host waits for the labels' check).
pub fn cluster_means(x: &Tensor, labels: &Tensor, k: usize) -> Result<Tensor> {
    let flat = problem::labels(labels, k)?;
    let p = Problem::rows(x, k)?;
    problem::check_device("labels", labels, x.device())?;
    if labels.dims() != p.shape(&[p.n]) {
        return Err(Error::Shape { argument: "labels", got: labels.dims().to_vec(), expected: p.shape(&[p.n]) });
    }
    check_labels(&flat, k)?;
    let rows = Rows::new(&x.detach())?;
    let means = Tensor::zeros((p.b, k, p.d), p.dtype, x.device())?;
    ops::update(&rows, &Terms::of(&rows)?, Some(&flat), Rule::Mean, None, &means, &Memory::default())?;
    let means = means.reshape(p.shape(&[k, p.d]))?;
    Attached::to(x, means, Gradient::Mean { labels: flat, k })
}

/// Each row's nearest centroid in its place: `(values, labels)`, `values` shaped and typed as `x`, `labels` as [`assign`]'s.
///
/// The gradient of `values` passes to `x` unchanged: the straight-through estimator (van den Oord et al. 2017). None
/// flows to the centroids.
///
/// # Errors
/// As [`assign`].
pub fn quantize(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<(Tensor, Tensor)> {
    let (p, rows, c) = border(x, centroids, metric)?;
    let labels = ops::labels(&rows, &c, metric)?;
    let values = ops::gather(&c, &labels)?.reshape(x.shape())?;
    Ok((Attached::to(x, values, Gradient::Identity)?, labels.reshape(p.shape(&[p.n]))?))
}

fn border(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<(Problem, Rows, Rows)> {
    let p = Problem::assign(x, centroids, metric)?;
    let (x, c) = (Rows::new(&x.detach())?, Rows::new(&centroids.detach())?.broadcast(p.b));
    Ok((p, x, c))
}

fn check_labels(labels: &Tensor, k: usize) -> Result<()> {
    if labels.elem_count() > 0 {
        let largest = labels.flatten_all()?.max(0)?.to_scalar::<u32>()? as usize;
        if largest >= k {
            return Err(Error::Range { argument: "labels", got: largest, min: 0, max: k - 1 });
        }
    }
    Ok(())
}

/// What flows back from a computed value to the rows it came from.
enum Gradient {
    Identity,
    /// `labels` u32 `(b, n)`.
    Mean {
        labels: Tensor,
        k: usize,
    },
}

/// Puts a value that was computed outside the graph into it, as a function of `x` with the gradient given.
struct Attached {
    value: Tensor,
    gradient: Gradient,
}

impl Attached {
    fn to(x: &Tensor, value: Tensor, gradient: Gradient) -> Result<Tensor> {
        if x.track_op() {
            Ok(x.apply_op1(Self { value, gradient })?)
        } else {
            Ok(value)
        }
    }
}

impl CustomOp1 for Attached {
    fn name(&self) -> &'static str {
        match self.gradient {
            Gradient::Identity => "quantize",
            Gradient::Mean { .. } => "cluster-means",
        }
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match &*self.value.storage_and_layout().0 {
            Storage::Cpu(s) => Ok((s.clone(), self.value.shape().clone())),
            _ => candle_core::bail!("{}: the value left the CPU", self.name()),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            Storage::Cuda(s) => Ok((s.try_clone(layout)?, self.value.shape().clone())),
            _ => candle_core::bail!("{}: the value left the GPU", self.name()),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let &Gradient::Mean { ref labels, k } = &self.gradient else { return Ok(Some(grad.clone())) };
        let weight = ops::cluster_sizes(labels, k)?.to_dtype(DType::F64)?;
        let b = weight.dim(0)?;
        let d = x.dim(candle_core::D::Minus1)?;
        // An empty cluster has no rows to pass a gradient to; its infinite share is never gathered.
        let share = weight.recip()?.unsqueeze(2)?;
        let each = grad.reshape((b, k, d))?.to_dtype(DType::F64)?.broadcast_mul(&share)?.to_dtype(x.dtype())?;
        Ok(Some(ops::gather(&Rows::new(&each)?, labels)?.reshape(x.shape())?))
    }
}
