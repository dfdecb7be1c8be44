//! The ops as values: [`apply_op1`](Tensor::apply_op1) and [`apply_op2`](Tensor::apply_op2) put them into a graph, and
//! [`inplace_op3`](Tensor::inplace_op3) lets them write into a tensor that is there.
//!
//! | op | takes | gives | gradient |
//! |---|---|---|---|
//! | [`FlashAssign`] | rows, centroids | labels | none |
//! | [`SortInverse`] | labels | order and offsets, in one tensor | none |
//! | [`ClusterMeans`], [`ClusterSums`] | rows, labels | means, sums | to the rows |
//! | [`Quantize`] | rows, centroids | each row's nearest centroid | to the rows, straight through |
//! | [`AssignInto`] | labels, rows, centroids | overwrites the labels | none |
//! | [`MeansInto`], [`SumsInto`] | means or sums, rows, labels | overwrites the means or sums | none |
//!
//! They are what the functions of the same names are made of ([`assign`](crate::assign),
//! [`sort_by_cluster`](crate::sort_by_cluster), [`cluster_means`](crate::cluster_means),
//! [`cluster_sums`](crate::cluster_sums), [`quantize`](crate::quantize)), which say what each computes: the results have the
//! same bits, and refusals are the same [`Error`], which [`Error::from_candle`] finds in Candle's. They read storages of any
//! layout where they lie, on the stream of the tensors' device. Those that take labels check them, for which the host waits.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use candle_flash_kmeans::ops::{ClusterMeans, FlashAssign, MeansInto};
//!
//! let x = Var::new(&[[0f32, 0.], [0., 2.], [9., 9.]], &Device::Cpu)?;
//! let centroids = Tensor::new(&[[1f32, 1.], [8., 8.], [50., 50.]], &Device::Cpu)?;
//! let labels = x.apply_op2(&centroids, FlashAssign::default())?;
//! assert_eq!(labels.to_vec1::<u32>()?, [0, 0, 1]);
//!
//! // Gradients flow to the rows.
//! let means = x.apply_op2(&labels, ClusterMeans { k: 3 })?;
//! assert_eq!(means.to_vec2::<f32>()?, [[0., 1.], [9., 9.], [0., 0.]]);
//! let gradients = means.sum_all()?.backward()?;
//! assert_eq!(gradients.get(&x).unwrap().to_vec2::<f32>()?, [[0.5, 0.5], [0.5, 0.5], [1., 1.]]);
//!
//! // A step of Lloyd's loop, in place: a centroid without rows stays.
//! centroids.inplace_op3(&x, &labels, &MeansInto)?;
//! assert_eq!(centroids.to_vec2::<f32>()?, [[0., 1.], [9., 9.], [50., 50.]]);
//! # Ok::<_, candle_core::Error>(())
//! ```
//!
//! # Threads
//! Candle locks the storages of an op's tensors one after another. Where some threads write tensors that others read, two that
//! lock the same ones in different orders can wait for each other for ever, as with any of Candle's ops of several tensors. The
//! functions lock in the order of addresses and cannot.

mod bind;
pub(crate) mod labels;

use crate::{
    error::{Error, Result},
    memory::Memory,
    metric::Metric,
    operand::{Operand, Readable, Target},
    primitives,
    problem::{self, Problem},
    request::{Assignment, Reduction},
    rows::Rows,
};
use bind::{cpu, cuda, custom_op2, inplace_op3, no_metal, Made};
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, DType, Layout, MetalStorage, Shape, Tensor};
use labels::{check_labels, flat_labels, Labelled};

/// Rows `(..batch, n, d)` and centroids, `(..batch, k, d)` or `(k, d)` for every problem, to the labels of the nearest
/// centroids, u32 `(..batch, n)`: [`assign`](crate::assign).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlashAssign {
    /// The metric decides which centroid is the nearest.
    pub metric: Metric,
}

/// Labels, u32 `(..batch, n)` below `k`, to the order that brings clusters together, and where each begins in it:
/// [`sort_by_cluster`](crate::sort_by_cluster).
///
/// An op of Candle's has one result. This one's is u32 of one dimension, all orders and then all offsets, which
/// [`split`](Self::split) tells apart:
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::ops::SortInverse;
///
/// let labels = Tensor::new(&[1u32, 0, 1, 0], &Device::Cpu)?;
/// let op = SortInverse { k: 2 };
/// let (order, offsets) = op.split(&labels.apply_op1(op)?, &labels)?;
/// assert_eq!(order.to_vec1::<u32>()?, [1, 3, 0, 2]);
/// assert_eq!(offsets.to_vec1::<u32>()?, [0, 2, 4]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SortInverse {
    /// The number of clusters.
    pub k: usize,
}

/// Rows `(..batch, n, d)` and labels, u32 `(..batch, n)` below `k`, to the means of clusters, `(..batch, k, d)`:
/// [`cluster_means`](crate::cluster_means).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterMeans {
    /// The number of clusters.
    pub k: usize,
}

/// Rows `(..batch, n, d)` and labels, u32 `(..batch, n)` below `k`, to the sums of clusters, `(..batch, k, d)`:
/// [`cluster_sums`](crate::cluster_sums).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSums {
    /// The number of clusters.
    pub k: usize,
}

/// Rows `(..batch, n, d)` and centroids, `(..batch, k, d)` or `(k, d)` for every problem, to the nearest centroid of each row,
/// shaped as the rows: the values of [`quantize`](crate::quantize).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quantize {
    /// The metric decides which centroid is the nearest.
    pub metric: Metric,
}

/// Overwrites labels, contiguous u32 `(..batch, n)`, by those that [`FlashAssign`] gives rows and centroids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssignInto {
    /// The metric decides which centroid is the nearest.
    pub metric: Metric,
}

/// Overwrites centroids, contiguous `(..batch, k, d)`, by the [means](ClusterMeans) of rows by labels. Those of clusters
/// without rows stay, as in Lloyd's loop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MeansInto;

/// Overwrites sums, contiguous `(..batch, k, d)`, by those of rows by labels that [`ClusterSums`] gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SumsInto;

/// An op of two operands, on every device.
pub(crate) trait Binary: CustomOp2 + Send + Sync + 'static {
    const NAME: &'static str;

    fn forward(&self, x: &Operand<'_>, y: &Operand<'_>) -> Result<Made>;

    /// Returns the gradient of `x`; nothing flows to `y`.
    fn backward(&self, x: &Tensor, y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>>;
}

/// An op that overwrites a target by what it makes of two operands, on every device.
trait Overwriting {
    const NAME: &'static str;

    fn overwrite(&self, to: Target<'_>, x: &Operand<'_>, y: &Operand<'_>) -> Result<()>;
}

/// Applies `op` to tensors, which it locks by itself. No gradient flows.
pub(crate) fn evaluate(op: &impl Binary, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok(Tensor::from(op.forward(&x.into(), &y.into())?))
}

/// Applies `op` to rows and labels, in the graph of the rows if they have one.
pub(crate) fn in_graph<O: Binary>(op: O, x: &Tensor, labels: &Tensor) -> Result<Tensor> {
    if !x.track_op() {
        return evaluate(&op, x, labels);
    }
    problem::check_device("labels", labels, x.device())?;
    // Candle locks the rows and then the labels. Of a copy nobody else has the lock, so that it is not waited for while the rows
    // are locked.
    Ok(x.apply_op2(&primitives::copy(labels)?, op)?)
}

fn assign_to(p: &Problem, labels: Target<'_>, x: &Operand<'_>, c: &Operand<'_>) -> Result<()> {
    let (x, c) = (Rows::from_operand(x)?, Rows::from_operand(c)?.broadcast(p.b));
    primitives::assign_into(Assignment::new(&x, &c, p.metric)?, labels, &Memory::default())
}

impl Binary for FlashAssign {
    const NAME: &'static str = "flash-assign";

    fn forward(&self, x: &Operand<'_>, c: &Operand<'_>) -> Result<Made> {
        let p = Problem::assign(x, c, self.metric)?;
        let shape = Shape::from(p.shape(&[p.n]));
        let mut labels = primitives::allocate("assign", shape.elem_count(), DType::U32, &x.device())?;
        assign_to(&p, Target::whole(&mut labels, &shape), x, c)?;
        Ok((labels, shape))
    }

    fn backward(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

impl Overwriting for AssignInto {
    const NAME: &'static str = "assign-into";

    fn overwrite(&self, to: Target<'_>, x: &Operand<'_>, c: &Operand<'_>) -> Result<()> {
        let p = Problem::assign(x, c, self.metric)?;
        check_target("labels", &to, DType::U32, p.shape(&[p.n]))?;
        assign_to(&p, to, x, c)
    }
}

impl Binary for Quantize {
    const NAME: &'static str = "quantize";

    fn forward(&self, x: &Operand<'_>, c: &Operand<'_>) -> Result<Made> {
        let p = Problem::assign(x, c, self.metric)?;
        let (rows, c) = (Rows::from_operand(x)?, Rows::from_operand(c)?.broadcast(p.b));
        let labels = primitives::assign(&rows, &c, self.metric)?;
        let mut values = primitives::allocate("quantize", x.elem_count(), p.dtype, &x.device())?;
        primitives::gather_into(&c, &labels, Target::whole(&mut values, x.dims()))?;
        Ok((values, x.dims().into()))
    }

    /// The straight-through estimator (van den Oord et al. 2017).
    fn backward(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(grad.clone()))
    }
}

impl SortInverse {
    const NAME: &'static str = "sort-inverse";

    /// Takes apart, as views, what the op has made of `labels`: the order, `(..batch, n)`, and the offsets, `(..batch, k + 1)`.
    ///
    /// # Errors
    /// Refuses what cannot be the op's result for these labels.
    pub fn split(&self, sorted: &Tensor, labels: &Tensor) -> Result<(Tensor, Tensor)> {
        let (b, n) = problem::labels(labels, self.k)?;
        let (order, offsets) = (b * n, b * (self.k + 1));
        problem::check_dtype("sorted", sorted, DType::U32)?;
        if sorted.dims() != [order + offsets] {
            let expected = vec![order + offsets];
            return Err(Error::Shape { argument: "sorted", got: sorted.dims().to_vec(), expected });
        }
        let batch = &labels.dims()[..labels.rank() - 1];
        let offsets = sorted.narrow(0, order, offsets)?.reshape([batch, &[self.k + 1]].concat())?;
        Ok((sorted.narrow(0, 0, order)?.reshape(labels.shape())?, offsets))
    }

    fn forward(&self, labels: &Operand<'_>) -> Result<Made> {
        let flat = flat_labels(labels, self.k)?;
        check_labels(&flat, self.k)?;
        let len = flat.elem_count() + flat.dims()[0] * (self.k + 1);
        let mut sorted = primitives::allocate("order", len, DType::U32, &labels.device())?;
        primitives::order_into(&flat, self.k, Target::whole(&mut sorted, len))?;
        Ok((sorted, len.into()))
    }
}

impl CustomOp1 for SortInverse {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn cpu_fwd(&self, labels: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        cpu(self.forward(&Operand::Cpu(labels, layout.clone()))?)
    }

    fn cuda_fwd(&self, labels: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda(self.forward(&Operand::Cuda(labels, layout.clone()))?)
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> candle_core::Result<(MetalStorage, Shape)> {
        Err(no_metal(Self::NAME))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(None)
    }
}

macro_rules! reducing {
    ($($op:ident, $name:literal, $reduction:expr;)+) => {
        $(impl Binary for $op {
            const NAME: &'static str = $name;

            fn forward(&self, x: &Operand<'_>, labels: &Operand<'_>) -> Result<Made> {
                let labelled = Labelled::new(x, labels, self.k)?;
                labelled.check()?;
                labelled.reduce($reduction)
            }

            fn backward(&self, x: &Tensor, labels: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
                Labelled::spread(x, labels, grad, self.k, $reduction)
            }
        })+
    };
}
reducing! {
    ClusterMeans, "cluster-means", Reduction::Mean;
    ClusterSums, "cluster-sums", Reduction::Sum;
}

impl Overwriting for MeansInto {
    const NAME: &'static str = "means-into";

    fn overwrite(&self, to: Target<'_>, x: &Operand<'_>, labels: &Operand<'_>) -> Result<()> {
        labelled_for("centroids", &to, x, labels)?.reduce_to(to, Reduction::Mean)
    }
}

impl Overwriting for SumsInto {
    const NAME: &'static str = "sums-into";

    fn overwrite(&self, mut to: Target<'_>, x: &Operand<'_>, labels: &Operand<'_>) -> Result<()> {
        let labelled = labelled_for("sums", &to, x, labels)?;
        primitives::zero(to.by_ref())?;
        labelled.reduce_to(to, Reduction::Sum)
    }
}

/// Checks rows and labels against a target of one row a cluster.
fn labelled_for<'a>(
    argument: &'static str,
    to: &Target<'_>,
    x: &Operand<'a>,
    labels: &Operand<'a>,
) -> Result<Labelled<'a>> {
    let [.., k, _] = *to.dims() else {
        return Err(Error::Rank { argument, expected: 2, shape: to.dims().to_vec() });
    };
    let labelled = Labelled::new(x, labels, k)?;
    check_target(argument, to, labelled.p.dtype, labelled.p.shape(&[k, labelled.p.d]))?;
    labelled.check()?;
    Ok(labelled)
}

fn check_target(argument: &'static str, to: &Target<'_>, dtype: DType, expected: Vec<usize>) -> Result<()> {
    if to.dtype() != dtype {
        return Err(Error::DType { argument, got: to.dtype(), expected: format!("{dtype:?}") });
    }
    if to.dims() != expected {
        return Err(Error::Shape { argument, got: to.dims().to_vec(), expected });
    }
    if !to.layout().is_contiguous() {
        let (got, with) =
            (format!("a tensor of strides {:?}", to.layout().stride()), "an op that overwrites it".into());
        return Err(Error::Conflict { argument, got, with });
    }
    Ok(())
}

custom_op2!(FlashAssign ClusterMeans ClusterSums Quantize);
inplace_op3!(AssignInto MeansInto SumsInto);
