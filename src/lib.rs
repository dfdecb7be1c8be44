//! Exact k-means as a fast primitive inside Candle models.
//!
//! [`KMeans`] clusters the rows of a tensor, any number of problems at once, on the tensor's device. [`assign`],
//! [`assign_with_distances`], [`sort_by_cluster`], [`cluster_means`] and [`quantize`] are its parts, each an op of its own.
//! Layers are made of these and of [`cluster_sums`], [`cluster_sizes`], [`inverse_order`], [`residuals`],
//! [`nearest`], [`select_clusters`] and [`top_rows_per_centroid`]; sequences that grow are followed by [`MiniBatch`] and [`Segments`].
//! Rows that memory does not hold are read piece by piece from a [`Source`], files of many formats among them, by
//! [`KMeans::fit_stream`], [`Fit::predict_stream`] and what is made of these.
//! [`nn`] has such layers. The parts with one result are also values for [`Tensor::apply_op2`](candle_core::Tensor::apply_op2)
//! and, to write in place, [`Tensor::inplace_op3`](candle_core::Tensor::inplace_op3): [`ops`].
//!
//! Users can rely on this:
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
//! watched ([`KMeans::on_iteration`], [`EmptyClusters::Relocate`]), and so are seeds ([`KMeans::on_seed`]), blocks of rows come and go
//! ([`KMeans::fit_stream`], [`Fit::predict_stream`]), and after every 128 iterations of a fit that may have more.
//!
//! Tensors of another device are refused, and two handles of one GPU are two devices. A layer or a [`PreparedFit`] may move
//! between threads, be shared by them and be dropped on any. Programs with several threads, such as servers, should give all of
//! them clones of one `Device::new_cuda_with_stream`: its one stream orders their work, and nothing else has to. With
//! `Device::new_cuda`, Candle gives each thread a stream of its own, between which it orders nothing. What a layer keeps is safe
//! there, too, for which the host waits for all work of the GPU each time that another thread takes over, and a thread that ends
//! waits for what it has queued, since drivers do not get over the end of one that frees memory behind it. A capture of a CUDA graph
//! can neither wait for other threads nor be waited for: what another thread used last is refused there, and no layer may
//! change threads while one goes on. For tensors that threads hand to each other, inputs, results and codebooks among
//! them, it is up to the program to wait, by `Device::synchronize` on the thread that has computed them.
//!
//! ```text
//! x (..batch, n, d) -> problem (checks) -> seeding -> loop { primitives: update -> assign } -> Fit
//!                                                                   cpu | cuda
//! ```
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backend;
mod callbacks;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod fit;
mod fixed;
mod functional;
mod host;
mod kept;
mod kmeans;
mod launches;
mod lloyd;
mod meeting;
mod memory;
mod metric;
mod minibatch;
pub mod nn;
mod operand;
pub mod ops;
mod optimal;
mod plan;
mod primitives;
mod problem;
mod ranking;
mod ranks;
mod request;
mod rng;
mod row_weights;
mod rows;
mod running_means;
mod saved;
mod scale;
mod seeding;
mod segments;
mod select;
mod spread;
mod stages;
mod staging;
#[doc(hidden)]
pub mod testing;
#[allow(dead_code)] // `build.rs` reads the kernels' share.
mod tiles;

pub use callbacks::{IntoControlFlow, Iteration, Seeding};
pub use error::{Error, Result};
pub use fit::Fit;
pub use functional::{
    assign, assign_with_distances, cluster_means, cluster_sizes, cluster_sums, inverse_order, nearest, quantize,
    residuals, sort_by_cluster,
};
pub use kmeans::{Devices, EmptyClusters, Init, KMeans};
pub use lloyd::{feed::Pass, prepared::PreparedFit};
pub use metric::Metric;
pub use minibatch::MiniBatch;
pub use plan::Plan;
pub use scale::{
    checkpoint::Checkpoint,
    epochs::Epochs,
    labels::FitSummary,
    options::StreamOptions,
    pinned::Pinned,
    plan::{DevicePlan, StreamPlan},
    progress::StreamProgress,
    source::{
        file::FileIdentity,
        stored::{Element, StoredType},
        Source, SourceIdentity,
    },
};
pub use segments::Segments;
pub use select::{select_clusters, top_rows_per_centroid, ClusterBudget, Selection};
