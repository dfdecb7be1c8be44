//! The functions of the ops: the same by another spelling, with two results where there are two, and with locks that no order of
//! calls makes wait for each other.

use crate::{
    error::{Error, Result},
    metric::Metric,
    operand::Readable,
    ops::{
        self,
        labels::{check_labels, check_labels_of, flat_labels},
        ClusterMeans, ClusterSums, FlashAssign, SortInverse,
    },
    primitives,
    problem::{self, Problem},
    request::{Order, Reduction},
    rows::Rows,
    tiles::NEAREST,
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
    ops::evaluate(&FlashAssign { metric }, x, centroids)
}

/// [`assign`], and the distance of each row to its centroid, f64 `(..batch, n)`, by the definition of [`Metric`].
///
/// # Errors
/// As [`assign`].
pub fn assign_with_distances(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<(Tensor, Tensor)> {
    let (p, x, c) = border(x, centroids, metric)?;
    let labels = primitives::assign(&x, &c, metric)?;
    let distances = primitives::distances(&x, &c, &labels, metric)?;
    Ok((labels.reshape(p.shape(&[p.n]))?, distances.reshape(p.shape(&[p.n]))?))
}

/// The `m` nearest centroids of each row, the nearest first: their indices, u32 `(..batch, n, m)`, and distances, f64
/// `(..batch, n, m)`, by the definition of [`Metric`].
///
/// `x` is `(..batch, n, d)` and `centroids` `(..batch, k, d)`, or `(k, d)` for every problem, in the same float dtype, and `m` is
/// at most `k` and 64. Of centroids at equal distances the lower index comes first, so that column 0 has the labels of [`assign`].
/// A distance that is NaN counts, and is shown, as infinity. One pass over the rows. On the CPU fast scores rule centroids out within a
/// proven error bound, as they do for labels, without an `(n, k)` matrix; on a GPU the distances of [`transform`](crate::Fit::transform) do, of as many rows at a time as
/// have 128 MiB of them. No gradient flows.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{nearest, Metric};
///
/// let x = Tensor::new(&[[0f32, 0.], [9., 9.]], &Device::Cpu)?;
/// let centroids = Tensor::new(&[[8f32, 9.], [1., 0.], [0., 3.]], &Device::Cpu)?;
/// let (indices, distances) = nearest(&x, &centroids, 2, Metric::SquaredEuclidean)?;
/// assert_eq!(indices.to_vec2::<u32>()?, [[1, 2], [0, 2]]);
/// assert_eq!(distances.to_vec2::<f64>()?, [[1., 9.], [1., 117.]]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// As [`assign`]. Refuses an `m` of 0, above `k` or above 64, and more results than a tensor holds.
pub fn nearest(x: &Tensor, centroids: &Tensor, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    let (p, rows, c) = border(x, centroids, metric)?;
    let max = p.k.min(NEAREST);
    if !(1..=max).contains(&m) {
        return Err(Error::Range { argument: "m", got: m, min: 1, max });
    }
    problem::check_elements("x rows times m", &[p.b, p.n, m])?;
    let shape = p.shape(&[p.n, m]);
    if p.b == 0 || p.n == 0 {
        let empty = |dtype| problem::empty(&shape, dtype, x.device());
        return Ok((empty(DType::U32)?, empty(DType::F64)?));
    }
    let (indices, distances) = primitives::nearest(&rows, &c, m, metric)?;
    Ok((indices.reshape(shape.as_slice())?, distances.reshape(shape)?))
}

/// The permutation that brings clusters together: `(order, offsets)` for u32 `labels` `(..batch, n)` below `k`.
///
/// `order` is u32 `(..batch, n)`: the rows of cluster 0 in ascending order, then those of cluster 1, and so on. Cluster `j`
/// is `order[offsets[j]..offsets[j + 1]]`; `offsets` is u32 `(..batch, k + 1)`.
///
/// # Errors
/// Refuses labels that are not u32 or not below `k` (the host waits for that answer).
pub fn sort_by_cluster(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let op = SortInverse { k };
    op.split(&labels.apply_op1_no_bwd(&op)?, labels)
}

/// The mean of the rows of each cluster, `(..batch, k, d)` in `x`'s dtype; zeros for a cluster without rows.
///
/// It is the exact sum of the stored values, rounded to 53 bits, by the number of rows, rounded to f64 and to the dtype. A row
/// that is not finite weighs nothing.
///
/// `x` is `(..batch, n, d)` and `labels` u32 `(..batch, n)` below `k`. Differentiable in `x`: a row's gradient is its
/// cluster's, divided by the number of rows.
///
/// # Errors
/// Refuses shapes, dtypes, devices and labels that do not fit together (the host waits for the labels' check).
pub fn cluster_means(x: &Tensor, labels: &Tensor, k: usize) -> Result<Tensor> {
    ops::in_graph(ClusterMeans { k }, x, labels)
}

/// The sum of the rows of each cluster, `(..batch, k, d)` in `x`'s dtype; zeros for a cluster without rows.
///
/// `x` is `(..batch, n, d)` and `labels` u32 `(..batch, n)` below `k`. The labels may come from other rows than `x`: the
/// values of a KV cache by the clusters of its keys, whatever the columns of either. Sums are exact, rounded to f64 and to the
/// dtype, and infinite beyond its range: cast f16 rows to f32 first where that can be. A row that is not finite weighs
/// nothing. Differentiable in `x`: a row's gradient is its cluster's.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{cluster_sizes, cluster_sums};
///
/// let values = Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let labels = Tensor::new(&[1u32, 0, 1], &Device::Cpu)?;
/// assert_eq!(cluster_sums(&values, &labels, 2)?.to_vec2::<f32>()?, [[3., 4.], [6., 8.]]);
/// assert_eq!(cluster_sizes(&labels, 2)?.to_vec1::<u32>()?, [1, 2]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// As [`cluster_means`].
pub fn cluster_sums(x: &Tensor, labels: &Tensor, k: usize) -> Result<Tensor> {
    ops::in_graph(ClusterSums { k }, x, labels)
}

/// [`cluster_means`] by an order of all problems' labels, which are known to be below `k`: nothing waits. No gradient flows.
pub(crate) fn means_by_order(x: &Tensor, order: &Order) -> Result<Tensor> {
    let (rows, batch) = (Rows::new(x)?, &x.dims()[..x.rank() - 2]);
    let shape = [batch, &[order.k(), rows.d]].concat();
    Ok(primitives::reduce(&rows, Some(order), Reduction::Mean)?.reshape(shape)?)
}

/// The number of rows in each cluster, u32 `(..batch, k)`, for u32 `labels` `(..batch, n)` below `k`.
///
/// # Errors
/// As [`sort_by_cluster`].
pub fn cluster_sizes(labels: &Tensor, k: usize) -> Result<Tensor> {
    primitives::cluster_sizes(&sort_by_cluster(labels, k)?.1)
}

/// The permutation that undoes another: `inverse[order[i]] = i`, both u32 `(..batch, n)`.
///
/// Rows that were gathered by [`sort_by_cluster`]'s order are gathered by this one to be where they were. Values are not
/// searched: what is no permutation gets some positions in range.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{inverse_order, sort_by_cluster};
///
/// let x = Tensor::new(&[3f32, 1., 2., 0.], &Device::Cpu)?;
/// let (order, _) = sort_by_cluster(&Tensor::new(&[1u32, 0, 1, 0], &Device::Cpu)?, 2)?;
/// let sorted = x.gather(&order, 0)?;
/// assert_eq!(sorted.gather(&inverse_order(&order)?, 0)?.to_vec1::<f32>()?, [3., 1., 2., 0.]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// Refuses an order that is not u32 or has no dimension.
pub fn inverse_order(order: &Tensor) -> Result<Tensor> {
    if order.rank() == 0 {
        return Err(Error::Rank { argument: "order", expected: 1, shape: vec![] });
    }
    problem::check_dtype("order", order, DType::U32)?;
    let n = order.dims()[order.rank() - 1];
    if n > problem::MAX_ROWS {
        return Err(Error::TooLarge { argument: "order", got: n, limit: problem::MAX_ROWS });
    }
    if order.elem_count() == 0 {
        return problem::empty(order.dims(), DType::U32, order.device());
    }
    // The sort of a permutation as labels is its inverse. Labels out of range would be counted outside of its memory.
    let labels = primitives::elementwise([order], |[order]| order.minimum(n as u32 - 1))?;
    let labels = primitives::contiguous(&labels)?.reshape((order.elem_count() / n, n))?;
    // Without the offsets, which are in the same storage.
    Ok(primitives::sorted(&labels, n)?.0.force_contiguous()?.reshape(order.shape())?)
}

/// The residuals: each row less its centroid, `x - centroids[labels]`: `(..batch, n, d)` in `x`'s dtype.
///
/// `x` is `(..batch, n, d)`, `centroids` `(..batch, k, d)`, or `(k, d)` for every problem, in the same dtype, and `labels` u32
/// `(..batch, n)` below `k`. The next stage of a residual quantiser (Juang and Gray 1982) clusters these. The gradient
/// passes to `x` unchanged, and none flows to the centroids.
///
/// # Errors
/// As [`assign`], and refuses labels that do not fit (the host waits for their check).
pub fn residuals(x: &Tensor, centroids: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let p = Problem::assign(x, centroids, Metric::default())?;
    let flat = flat_labels(&labels.into(), p.k)?;
    problem::check_device("labels", labels, x.device())?;
    check_labels_of(&p, labels)?;
    check_labels(&flat, p.k)?;
    if x.elem_count() == 0 {
        return problem::empty(x.dims(), x.dtype(), x.device());
    }
    let c = Rows::new(centroids)?.broadcast(p.b);
    let nearest = primitives::gather(&c, &flat)?.reshape(x.shape())?;
    straight_through(x, primitives::elementwise([&x.detach(), &nearest], |[x, nearest]| x - nearest)?)
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
    let labels = primitives::assign(&rows, &c, metric)?;
    let values = primitives::gather(&c, &labels)?.reshape(x.shape())?;
    Ok((straight_through(x, values)?, labels.reshape(p.shape(&[p.n]))?))
}

/// The rows of `centroids` (`(..batch, k, d)`, or `(k, d)` for every problem) that `labels` (u32 `(..batch, n)`, known to be
/// below `k`) name: `(..batch, n, d)`. No gradient flows.
pub(crate) fn rows_of(centroids: &Tensor, labels: &Tensor) -> Result<Tensor> {
    let flat = flat_labels(&labels.into(), centroids.dims()[centroids.rank() - 2])?;
    let c = Rows::new(centroids)?.broadcast(flat.dims()[0]);
    let shape = [labels.dims(), &[c.d]].concat();
    Ok(primitives::gather(&c, &flat)?.reshape(shape)?)
}

/// The Euclidean norm of each row of `x` `(..batch, n, d)`, f64 `(..batch, n)`. No gradient flows.
pub(crate) fn norms(x: &Tensor) -> Result<Tensor> {
    let p = Problem::rows(x, 1)?;
    Ok(primitives::norms(&Rows::new(x)?)?.reshape(p.shape(&[p.n]))?)
}

/// Whether all values of each problem of `x` `(..batch, n, d)` are finite, u8 `(..batch)`.
pub(crate) fn finite(x: &Tensor) -> Result<Tensor> {
    let (_, first_nonfinite) = primitives::max_abs_and_first_nonfinite(&Rows::new(x)?)?;
    Ok(first_nonfinite.eq(u32::MAX)?.reshape(&x.dims()[..x.rank() - 2])?)
}

/// The sum of each row of `values`, f64 `(b, k)`, the same bits on every device: f64 `(b,)`.
pub(crate) fn totals(values: &Tensor) -> Result<Tensor> {
    primitives::total(values)
}

/// `values`, computed from `x` outside the graph and shaped as it, with a gradient that passes to `x` unchanged.
///
/// [`Quantize`](ops::Quantize) has this gradient, but it finds the values by itself, and an op of Candle's has one result. Here
/// they come with their labels, or from several stages of a layer.
pub(crate) fn straight_through(x: &Tensor, values: Tensor) -> Result<Tensor> {
    if x.track_op() {
        Ok(x.apply_op1(StraightThrough { values })?)
    } else {
        Ok(values)
    }
}

fn border(x: &Tensor, centroids: &Tensor, metric: Metric) -> Result<(Problem, Rows<'static>, Rows<'static>)> {
    let p = Problem::assign(x, centroids, metric)?;
    let (x, c) = (Rows::new(x)?, Rows::new(centroids)?.broadcast(p.b));
    Ok((p, x, c))
}

/// Puts values that were computed outside the graph into it.
struct StraightThrough {
    values: Tensor,
}

impl CustomOp1 for StraightThrough {
    fn name(&self) -> &'static str {
        "straight-through"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match &*self.values.storage_and_layout().0 {
            Storage::Cpu(s) => Ok((s.clone(), self.values.shape().clone())),
            _ => candle_core::bail!("{}: the values left the CPU", self.name()),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.values.storage_and_layout();
        match &*storage {
            Storage::Cuda(s) => Ok((s.try_clone(layout)?, self.values.shape().clone())),
            _ => candle_core::bail!("{}: the values left the GPU", self.name()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}
