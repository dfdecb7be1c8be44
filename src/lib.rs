//! Exact k-means as a fast primitive inside Candle models.
//!
//! [`KMeans`] clusters the rows of a tensor, any number of problems at once, on the tensor's device. [`assign`],
//! [`assign_with_distances`], [`sort_by_cluster`], [`cluster_means`] and [`quantize`] are its parts, each an op of its own.
//! Layers are made of these and of [`cluster_sums`], [`cluster_sizes`], [`inverse_order`], [`residuals`],
//! [`select_clusters`] and [`top_rows_per_centroid`]; sequences that grow are followed by [`MiniBatch`] and [`Segments`].
//! [`nn`] has such layers.
//!
//! What can be relied on:
//! - **Labels are exact.** A label is the lowest index among the centroids at the smallest distance, in f64, of the stored
//!   values. Fast arithmetic only rules centroids out, within a proven error bound.
//! - **Labels belong to the centroids returned with them**: `fit.labels` equals `fit.predict(x)`.
//! - **The same input and seed give the same bits**, whatever the number of threads. Sums are order-free integers.
//! - Any layout gives the same bits as its contiguous copy, inputs are never written, and refusals are typed ([`Error`]).
//!
//! # GPUs, streams and threads
//! Work is queued on the tensors' own stream, and the host goes on. It waits for the device where it has to know something: where
//! values are searched ([`KMeans::check_finite`], [`Fit::predict`], [`Fit::transform`]), labels or codes that are given are
//! checked ([`sort_by_cluster`], [`cluster_means`], [`cluster_sums`], [`cluster_sizes`], [`residuals`],
//! [`nn::ClusteredKvCache::group`], [`nn::ClusteredKvCache::cluster`], [`nn::Codebook::usage`]), weights and lengths are
//! ([`KMeans::sample_weights`], [`KMeans::lengths`]), rows are drawn by weight or by [`Init::KMeansParallel`], iterations are
//! watched ([`KMeans::on_iteration`], [`EmptyClusters::Relocate`]), and after every 128 iterations of a fit that may have more.
//!
//! Tensors of another device are refused, and two handles of one GPU are two devices. A layer or a [`Prepared`] fit may move
//! between threads, be shared by them and be dropped on any. Programs with several threads, such as servers, should give all of
//! them clones of one `Device::new_cuda_with_stream`: its one stream orders their work, and nothing else has to. With
//! `Device::new_cuda`, Candle gives each thread a stream of its own, between which it orders nothing. What a layer keeps is safe
//! there, too, for which the host waits for all work of the GPU each time that another thread takes over. A capture of a CUDA graph
//! can neither wait for other threads nor be waited for: what another thread used last is refused there, and no layer may
//! change threads while one goes on. For tensors that threads hand to each other, inputs, results and codebooks among
//! them, it is up to the program to wait, by `Device::synchronize` on the thread that has computed them.
//!
//! ```text
//! x (..batch, n, d) -> problem (checks) -> init -> loop { ops: update -> relabel } -> Fit
//!                                                         cpu | cuda
//! ```
#![cfg_attr(docsrs, feature(doc_cfg))]

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod fit;
mod fixed;
mod functional;
mod host;
mod init;
mod kmeans;
mod lloyd;
mod metric;
mod minibatch;
pub mod nn;
mod ops;
mod plan;
mod problem;
mod rng;
mod row_weights;
mod saved;
mod select;
#[allow(dead_code)] // `build.rs` reads the kernels' share.
mod tiles;

/// For the tests and the tuning of this crate; not part of its interface.
#[doc(hidden)]
pub mod testing {
    #[cfg(feature = "cuda")]
    pub use crate::cuda::{assign::product_step, fail_allocation, limit_blocks_at_once};
    pub use crate::plan::force;
    use crate::{
        ops::{self, Memory, Rule, Terms},
        plan::{Arch, Assign},
        problem::Rows,
        Metric, Result,
    };
    use candle_core::{Device, Tensor};

    /// The update of a fit's loop alone: new means in place, for labels `(b, n)` that are known to be in range.
    pub struct Update {
        x: Rows,
        terms: Terms,
        centroids: Tensor,
        memory: Memory,
    }

    impl Update {
        /// For rows `(b, n, d)` and `k` clusters.
        pub fn new(x: &Tensor, k: usize) -> Result<Self> {
            let x = Rows::new(x)?;
            let (terms, centroids) = (Terms::of(&x)?, Tensor::zeros((x.b, k, x.d), x.dtype(), x.device())?);
            Ok(Self { x, terms, centroids, memory: Memory::default() })
        }

        /// The means `(b, k, d)`, which the next call overwrites.
        pub fn run(&self, labels: &Tensor) -> Result<Tensor> {
            let Self { x, terms, centroids, memory } = self;
            ops::update(x, terms, Some(labels), Rule::Mean, None, centroids, memory)?;
            Ok(centroids.clone())
        }
    }

    /// The names of the kernels that can assign `x` to `k` centroids, the one that is chosen first.
    pub fn candidates(x: &Tensor, k: usize, metric: Metric) -> Result<Vec<&'static str>> {
        let d = x.dims()[x.rank() - 1];
        let all = Assign::candidates(x.dtype(), metric, [k, d], ops::arch(x.device())?);
        Ok(all.into_iter().map(Assign::name).collect())
    }

    /// The compute capability of a GPU, 90 for 9.0; 0 of the CPU.
    pub fn capability(device: &Device) -> Result<u32> {
        Ok(match ops::arch(device)? {
            Arch::Cpu => 0,
            Arch::Cuda { capability, .. } => capability,
        })
    }

    /// How many centroids were compared with a row by the definition in f64, in all CPU assignments of this thread so far.
    pub fn compared() -> u64 {
        crate::cpu::assign::compared()
    }

    /// The GPU kernels that this thread has launched since it last asked; the first call starts the record.
    pub fn launches() -> Vec<String> {
        #[cfg(feature = "cuda")]
        return crate::cuda::launches();
        #[cfg(not(feature = "cuda"))]
        vec![]
    }
}

pub use error::{Error, Result};
pub use fit::Fit;
pub use functional::{
    assign, assign_with_distances, cluster_means, cluster_sizes, cluster_sums, inverse_order, quantize, residuals,
    sort_by_cluster,
};
pub use init::Init;
pub use kmeans::{EmptyClusters, IntoControlFlow, Iteration, KMeans};
pub use lloyd::Prepared;
pub use metric::Metric;
pub use minibatch::{MiniBatch, Segments};
pub use plan::Plan;
pub use problem::Problem;
pub use select::{select_clusters, top_rows_per_centroid, Selection, Take};
