//! The primitives, one line each, and the only place that matches on the device.
//!
//! `cpu` and `cuda` export the same functions in the same order. All of them take checked arguments and return new
//! tensors on the same device, computed on the tensor's own stream.

use crate::{plan::Arch, problem::Rows, rng::Draw, Error, Metric, Result};
use candle_core::{Device, Tensor};

macro_rules! on_device {
    ($device:expr, $stem:ident::$op:ident ( $($arg:expr),* )) => {
        match $device {
            Device::Cpu => crate::cpu::$stem::$op($($arg),*),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => crate::cuda::$stem::$op($($arg),*),
            device => Err(Error::Unsupported { op: stringify!($op), device: format!("{:?}", device.location()) }),
        }
    };
}

/// What chooses kernels.
pub(crate) fn arch(device: &Device) -> Result<Arch> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(dev) => crate::cuda::arch(dev),
        _ => Ok(Arch::Cpu),
    }
}

/// The rows where the kernel that assigns them to `k` centroids can read them: a copy, if need be.
pub(crate) fn readable(x: Rows, k: usize, metric: Metric) -> Result<Rows> {
    on_device!(x.device(), assign::readable(x, k, metric))
}

/// Exact labels, u32 `(b, n)`: the lowest index at the smallest [`Metric`] distance.
pub(crate) fn labels(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    on_device!(x.device(), assign::labels(x, c, metric))
}

/// The distance of each row to the centroid of its label, f64 `(b, n)`.
pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    on_device!(x.device(), assign::distances(x, c, labels, metric))
}

/// The distance of each row to every centroid, `(b, n, k)`, f64 for f64 rows and f32 otherwise.
pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    on_device!(x.device(), assign::pairwise(x, c, metric))
}

/// Rows `index` (u32 `(b, m)`) of each problem: `(b, m, d)`.
pub(crate) fn gather(x: &Rows, index: &Tensor) -> Result<Tensor> {
    on_device!(x.device(), assign::gather(x, index))
}

/// The largest finite magnitude of each problem, f64 `(b,)`, and its first row with a NaN or an infinity, u32 `(b,)`
/// (`u32::MAX`: none).
pub(crate) fn scan(x: &Rows) -> Result<(Tensor, Tensor)> {
    on_device!(x.device(), assign::scan(x))
}

/// Euclidean norms, f64 `(b, n)`.
pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    on_device!(x.device(), assign::norms(x))
}

/// `min(nearest, distance to row newest[b])`, f64 `(b, n)`, never below 0; that row itself becomes -1 (taken), and rows
/// that are -1 stay so.
pub(crate) fn nearer(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    on_device!(x.device(), assign::nearer(x, nearest, newest, metric))
}

/// The keys of an exponential race won with probability proportional to `weight * nearest`, f64 `(b, n)`.
pub(crate) fn race(nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
    on_device!(nearest.device(), assign::race(nearest, weights, draw))
}

/// The lowest index of the smallest value of each row of `keys` `(b, n)`: u32 `(b,)`.
pub(crate) fn lowest(keys: &Tensor) -> Result<Tensor> {
    on_device!(keys.device(), assign::lowest(keys))
}

/// The stable order of `labels` (u32 `(b, n)`, below `k`): positions u32 `(b, n)` and offsets u32 `(b, k + 1)`.
pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    on_device!(labels.device(), update::order(labels, k))
}

/// Per-cluster sums of `x * factor[row]` as [`fixed`](crate::fixed) integers, i64 `(b, k, d, 2)` (low word, high word).
/// `order` `None` means the identity; `max_abs` (f64 `(b,)`) bounds the magnitude of every term.
pub(crate) fn sums(
    x: &Rows,
    factor: Option<&Tensor>,
    order: Option<&Tensor>,
    offsets: &Tensor,
    max_abs: &Tensor,
) -> Result<Tensor> {
    on_device!(x.device(), update::sums(x, factor, order, offsets, max_abs))
}

/// The sums of [`sums`] over `n` rows in f64, `(b, k, d)`.
pub(crate) fn totals(sums: &Tensor, max_abs: &Tensor, n: usize) -> Result<Tensor> {
    on_device!(sums.device(), update::totals(sums, max_abs, n))
}

/// New centroids `(b, k, d)`: `totals / weight` (f64 `(b, k)`), or for cosine `totals / |totals|`. A cluster of no weight and
/// every cluster of a problem whose `done` (u8 `(b,)`) is set keep the old centroid.
pub(crate) fn means(totals: &Tensor, weight: &Tensor, old: &Rows, done: &Tensor, metric: Metric) -> Result<Tensor> {
    on_device!(totals.device(), update::means(totals, weight, old, done, metric))
}

/// New centroids `(b, k, d)`: the smallest value that at least half of the cluster's weight does not exceed, per column.
/// `weights` are f64 `(b, n)` with their largest per problem, f64 `(b,)`. Clusters are kept as in [`means`].
pub(crate) fn medians(
    x: &Rows,
    weights: Option<(&Tensor, &Tensor)>,
    order: &Tensor,
    offsets: &Tensor,
    old: &Rows,
    done: &Tensor,
) -> Result<Tensor> {
    on_device!(x.device(), update::medians(x, weights, order, offsets, old, done))
}

/// The largest squared distance that a centroid of each problem moved, f64 `(b,)`.
pub(crate) fn shift(new: &Rows, old: &Rows) -> Result<Tensor> {
    on_device!(new.device(), update::shift(new, old))
}

/// `done`, or no label changed, or `shift <= threshold`: u8 `(b,)`.
pub(crate) fn converged(
    done: &Tensor,
    old: &Tensor,
    new: &Tensor,
    shift: &Tensor,
    threshold: &Tensor,
) -> Result<Tensor> {
    on_device!(done.device(), update::converged(done, old, new, shift, threshold))
}

/// Rows in each cluster, u32 `(b, k)`.
pub(crate) fn cluster_sizes(offsets: &Tensor) -> Result<Tensor> {
    let k = offsets.dim(1)? - 1;
    Ok((offsets.narrow(1, 1, k)? - offsets.narrow(1, 0, k)?)?)
}

/// Weight in each cluster, f64 `(b, k)`, of weights f64 `(b, n)`.
pub(crate) fn cluster_weights(weights: &Tensor, order: &Tensor, offsets: &Tensor) -> Result<Tensor> {
    let column = Rows::new(&weights.unsqueeze(2)?)?;
    let largest = scan(&column)?.0;
    Ok(totals(&sums(&column, None, Some(order), offsets, &largest)?, &largest, column.n)?.squeeze(2)?)
}

/// The sum of each row of `values` (f64 `(b, n)`), in no particular order and to the same bits in any: f64 `(b,)`.
pub(crate) fn total(values: &Tensor) -> Result<Tensor> {
    let (b, n) = values.dims2()?;
    let column = Rows::new(&values.unsqueeze(2)?)?;
    let everything = Tensor::new(&[[0u32, n as u32]], values.device())?.repeat((b, 1))?;
    let largest = scan(&column)?.0;
    Ok(totals(&sums(&column, None, None, &everything, &largest)?, &largest, n)?.reshape(b)?)
}
