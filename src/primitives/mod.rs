//! The primitives, and the only place that matches on the device.
//!
//! They take checked arguments and return new tensors on the same device, or write to a target, on the tensors' own stream.
//! They lock what they read, unless Candle has around a custom op ([`Operand`](crate::operand::Operand)). `cpu` and `cuda` implement them ([`Backend`]).

mod pieces;

#[cfg(feature = "cuda")]
use crate::cuda::Cuda;
use crate::{
    backend::Backend,
    cpu::Cpu,
    error::{Error, Result},
    host,
    memory::Memory,
    metric::Metric,
    operand::{Readable, Target},
    plan::{
        arch::Arch,
        assign::{forced, AssignPlan},
        on_chip::FitResident,
        sort::Sort,
        update::UpdatePlan,
    },
    problem,
    ranks::{Ranks, Rendezvous},
    request::{
        Accumulator, Assignment, Attention, CodedAttention, Finish, KmeansppBlock, Labels, LutMatrix, OnChipFit, Order,
        Reduction, Routed, Summands, Update,
    },
    rng::Draw,
    rows::Rows,
    staging::{Buffer, Lane},
};
use candle_core::{DType, Device, Shape, Storage, Tensor};
pub(crate) use pieces::{
    check_count, check_counted, contiguous, contiguous_operand, copy, elementwise, overwrite, pieces,
};
use std::ops::Range;

/// The back end of a device, which is asked for `op`.
fn on(device: &Device, op: &'static str) -> Result<&'static dyn Backend> {
    match device {
        Device::Cpu => Ok(&Cpu),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => Ok(&Cuda),
        device => Err(Error::Unsupported { op, device: format!("{:?}", device.location()) }),
    }
}

/// The arch of a device, by which kernels are chosen. (A device without a back end is refused by what would run there.)
pub(crate) fn arch(device: &Device) -> Result<Arch> {
    on(device, "arch").map_or(Ok(Arch::CPU), |backend| backend.arch(device))
}

/// Whether the blocks of this launch, for rows of this type, all run at once.
pub(crate) fn runs_at_once(fit: &FitResident, dtype: DType, device: &Device) -> Result<bool> {
    on(device, "runs_at_once")?.runs_at_once(fit, dtype, device)
}

/// Whether the host need not wait for what it reads from there.
pub(crate) fn reads_are_free(device: &Device) -> bool {
    device.is_cpu()
}

/// The bytes of the device's memory that nothing has taken; none where nobody knows.
pub(crate) fn free_memory(device: &Device) -> Result<Option<usize>> {
    on(device, "free_memory")?.free_memory(device)
}

/// A lane for rows from memory of the host to the device.
pub(crate) fn lane(device: &Device) -> Result<Box<dyn Lane>> {
    on(device, "lane")?.lane(device)
}

/// Whether attention over all tokens of a cache has a kernel, as over clusters it may have.
pub(crate) fn attends_to_all(device: &Device) -> Result<bool> {
    Ok(on(device, "attend")?.attends_to_all())
}

/// Copies contiguous labels to memory of the host, of which there is as much.
pub(crate) fn read_labels(labels: &Tensor, into: &mut [u32]) -> Result<()> {
    on(labels.device(), "read_labels")?.read_labels(labels, into)
}

/// Whether copies take these bytes from where they lie while the thread that asks for them goes on.
pub(crate) fn is_page_locked(device: &Device, bytes: &[u8]) -> Result<bool> {
    on(device, "is_page_locked")?.is_page_locked(device, bytes)
}

/// Memory of the host for so many bytes, page-locked where that makes copies faster.
pub(crate) fn buffer(device: &Device, bytes: usize) -> Result<Box<dyn Buffer>> {
    on(device, "buffer")?.buffer(device, bytes)
}

/// The number of GPUs that are visible.
pub(crate) fn gpus() -> Result<usize> {
    #[cfg(feature = "cuda")]
    return crate::cuda::device::count();
    #[cfg(not(feature = "cuda"))]
    Ok(0)
}

/// The rendezvous of the ranks of this process, each of which has a device such as this one; none if they meet in memory alone.
pub(crate) fn rendezvous(device: &Device) -> Result<Option<Rendezvous>> {
    on(device, "rendezvous")?.rendezvous()
}

/// A rank that has a device of its own, to which its sums need not leave it through memory.
pub(crate) fn join<'a>(device: &Device, at: Rendezvous, others: &'a dyn Ranks) -> Result<Box<dyn Ranks + 'a>> {
    on(device, "join")?.join(device, at, others)
}

/// The same of one that outlives the call.
pub(crate) fn join_for_long(
    device: &Device,
    at: Rendezvous,
    others: Box<dyn Ranks + Send>,
) -> Result<Box<dyn Ranks + Send>> {
    on(device, "join")?.join_for_long(device, at, others)
}

/// The rank that this process is, on its device, among others that find each other by `NCCL_COMM_ID`.
pub(crate) fn join_launched(device: &Device, rank: usize, ranks: usize) -> Result<Box<dyn Ranks + Send>> {
    on(device, "join_launched")?.join_launched(device, rank, ranks)
}

/// Whether work that is queued now becomes part of a CUDA graph.
pub(crate) fn capturing(device: &Device) -> Result<bool> {
    on(device, "capturing").map_or(Ok(false), |backend| backend.capturing(device))
}

/// A new storage of so many elements, to which nothing has been written.
pub(crate) fn allocate(op: &'static str, len: usize, dtype: DType, device: &Device) -> Result<Storage> {
    on(device, op)?.allocate(op, len, dtype, device)
}

/// A new tensor that `f` writes.
fn written(
    op: &'static str,
    shape: impl Into<Shape>,
    dtype: DType,
    device: &Device,
    f: impl FnOnce(Target<'_>) -> Result<()>,
) -> Result<Tensor> {
    let shape = shape.into();
    let mut storage = allocate(op, shape.elem_count(), dtype, device)?;
    f(Target::whole(&mut storage, &shape))?;
    Ok(Tensor::from((storage, shape)))
}

/// Puts zeros in the place of floats.
pub(crate) fn zero(to: Target<'_>) -> Result<()> {
    on(&to.device(), "zero")?.zero(to)
}

impl Summands {
    /// The rows themselves.
    pub fn from_rows(x: &Rows) -> Result<Self> {
        let (max_abs, first_nonfinite) = max_abs_and_first_nonfinite(x)?;
        Ok(Self { row_scale: None, max_abs, first_nonfinite, max_weight: None, finite: false })
    }

    /// The same for one reduction. On the CPU nothing is searched before it: sums find bounds where they need them, of rows that they have
    /// read.
    pub fn unsearched(x: &Rows) -> Result<Self> {
        if !x.device().is_cpu() || x.dtype() == DType::F64 {
            return Self::from_rows(x);
        }
        let max_abs = Tensor::full(f64::INFINITY, x.b, x.device())?;
        let first_nonfinite = Tensor::zeros(x.b, DType::U32, x.device())?;
        Ok(Self { row_scale: None, max_abs, first_nonfinite, max_weight: None, finite: false })
    }
}

impl<'a> Assignment<'a> {
    /// Of rows to the nearest of the centroids.
    pub fn new(x: &'a Rows<'a>, c: &'a Rows<'a>, metric: Metric) -> Result<Self> {
        let (sizes, copies) = ([x.b, x.n, c.n, x.d], if c.batch_stride == 0 { 1 } else { c.b });
        let plan = AssignPlan::new(x.dtype(), metric, sizes, copies, x.layout(), arch(x.device())?);
        Ok(Self { plan, x, c, metric, turn: None, bounds: None, near: None })
    }
}

impl<'a> Update<'a> {
    /// Of rows in `k` clusters.
    pub fn new(
        x: &'a Rows<'a>,
        summands: &'a Summands,
        labels: Option<Labels<'a>>,
        reduction: Reduction,
        k: usize,
    ) -> Result<Self> {
        let (medians, weighted) = (reduction == Reduction::Median, summands.row_scale.is_some());
        let sizes = [x.b, x.n, k, x.d];
        let plan = UpdatePlan::new(x.dtype(), sizes, x.layout(), medians, weighted, arch(x.device())?);
        Ok(Self { plan, x, summands, labels, reduction, turn: None, kept: None })
    }
}

/// The rows of `x`, `(..batch, n, d)`: as they lie, unless they have to be packed or do not lie in rows; then in `copy`, which the
/// next rows of this shape go to as well.
pub(crate) fn pack(x: &Tensor, pack: bool, copy: &mut Option<Tensor>) -> Result<Rows<'static>> {
    match Rows::of(x.into()) {
        Some(rows) if !pack => Ok(rows),
        _ => {
            let d = x.dims()[x.rank() - 1];
            on(x.device(), "pack")?.pack(x, pitch(d, pack), copy)?.map_or_else(|| Rows::new(x), Ok)
        }
    }
}

/// Elements from one row of `d` columns to the next, if they are packed and if they lie side by side.
pub(crate) fn pitch(d: usize, packed: bool) -> usize {
    if packed {
        d.next_multiple_of(8)
    } else {
        d
    }
}

/// Exact labels, u32 `(b, n)`: the lowest index at the smallest [`Metric`] distance.
pub(crate) fn assign(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    let assign = |labels: Target<'_>| assign_into(Assignment::new(x, c, metric)?, labels, &Memory::default());
    written("assign", (x.b, x.n), DType::U32, x.device(), assign)
}

/// The same into `labels`; in a fit's turn, of the problems that have not converged before.
pub(crate) fn assign_into(a: Assignment<'_>, labels: Target<'_>, memory: &Memory) -> Result<()> {
    on(a.x.device(), "assign_into")?.assign_into(a, labels, memory)
}

/// The distance of each row to the centroid of its label, f64 `(b, n)`.
pub(crate) fn distances(x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
    on(x.device(), "distances")?.distances(x, c, labels, metric)
}

/// The distance of each row to every centroid, `(b, n, k)`, f64 for f64 rows and f32 otherwise.
pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    on(x.device(), "pairwise")?.pairwise(x, c, metric)
}

/// The `m` nearest centroids of each row, at most [`NEAREST`](crate::tiles::NEAREST), by distance and then by index, a NaN being as far as can
/// be: u32 `(b, n, m)`, and their distances, f64 `(b, n, m)`, with infinity for NaN.
pub(crate) fn nearest(x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    on(x.device(), "nearest")?.nearest(x, c, m, metric)
}

/// Rows `index` (u32 `(b, m)`) of each problem: `(b, m, d)`.
pub(crate) fn gather(x: &Rows, index: &impl Readable) -> Result<Tensor> {
    let (b, m) = (index.dims()[0], index.dims()[1]);
    written("gather", (b, m, x.d), x.dtype(), x.device(), |rows| gather_into(x, index, rows))
}

/// The same into `to`.
pub(crate) fn gather_into(x: &Rows, index: &impl Readable, to: Target<'_>) -> Result<()> {
    on(x.device(), "gather")?.gather(x, index, to)
}

/// `chosen` (different rows, u32 `(b, k)`) with others in place of those that cannot be seeds, tensor of its own: a row that is not
/// finite, without weight (f64 `(b, n)`), or by cosine without direction, gives way to the next one after it that can be and is
/// not chosen, from the first row on again after the last. It stays where there is none.
pub(crate) fn usable_seeds(x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
    on(x.device(), "usable_seeds")?.usable_seeds(x, weights, chosen, metric)
}

/// The largest finite magnitude of each problem, f64 `(b,)`, and its first row with a NaN or an infinity, u32 `(b,)`
/// (`u32::MAX`: none).
pub(crate) fn max_abs_and_first_nonfinite(x: &Rows) -> Result<(Tensor, Tensor)> {
    on(x.device(), "max_abs_and_first_nonfinite")?.max_abs_and_first_nonfinite(x)
}

/// The smallest magnitude but 0 of the finite values of each problem, f64 `(b,)`; infinite where there is none.
pub(crate) fn min_magnitude(x: &Rows) -> Result<Tensor> {
    on(x.device(), "min_magnitude")?.min_magnitude(x)
}

/// Euclidean norms, f64 `(b, n)`.
pub(crate) fn norms(x: &Rows) -> Result<Tensor> {
    on(x.device(), "norms")?.norms(x)
}

/// `min(nearest, distance to row newest[b])`, f64 `(b, n)`, never below 0; that row itself becomes -1 (taken), and rows
/// that are -1 stay so.
pub(crate) fn min_distance_with(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    on(x.device(), "min_distance_with")?.min_distance_with(x, nearest, newest, metric)
}

/// The keys of an exponential race won with probability proportional to `weight * nearest`, f64 `(b, n)`, for rows of which the first is
/// number `first` of its problem.
pub(crate) fn exponential_race_keys(
    nearest: &Tensor,
    weights: Option<&Tensor>,
    draw: Draw,
    first: usize,
) -> Result<Tensor> {
    on(nearest.device(), "exponential_race_keys")?.exponential_race_keys(nearest, weights, draw, first)
}

/// A block of k-means++: the rows that arrive next, and those of them that become seeds.
pub(crate) fn kmeanspp_block(p: &KmeansppBlock<'_>, memory: &Memory) -> Result<()> {
    on(p.x.device(), "kmeanspp_block")?.kmeanspp_block(p, memory)
}

/// The stable order of contiguous `labels`, u32 `(b, n)`, below `k`.
pub(crate) fn order(labels: &Tensor, k: usize) -> Result<Order> {
    let (order, offsets) = sorted(labels, k)?;
    Ok(Order { labels: labels.clone(), order, offsets })
}

/// The same with the rows of each cluster in any order, which is all that sums need and takes fewer passes.
pub(crate) fn grouped(labels: &Tensor, k: usize) -> Result<Order> {
    let (order, offsets) = sorted_as(labels, k, false)?;
    Ok(Order { labels: labels.clone(), order, offsets })
}

/// The positions of the stable order, u32 `(b, n)`, and its offsets, u32 `(b, k + 1)`.
pub(crate) fn sorted(labels: &impl Readable, k: usize) -> Result<(Tensor, Tensor)> {
    sorted_as(labels, k, true)
}

fn sorted_as(labels: &impl Readable, k: usize, ascending: bool) -> Result<(Tensor, Tensor)> {
    let (b, n) = (labels.dims()[0], labels.dims()[1]);
    let sort = |sorted: Target<'_>| sort_into(labels, k, ascending, sorted);
    let sorted = written("order", b * n + b * (k + 1), DType::U32, &labels.device(), sort)?;
    Ok((sorted.narrow(0, 0, b * n)?.reshape((b, n))?, sorted.narrow(0, b * n, b * (k + 1))?.reshape((b, k + 1))?))
}

/// The same into one u32 target, all positions and then all offsets.
pub(crate) fn order_into(labels: &impl Readable, k: usize, to: Target<'_>) -> Result<()> {
    sort_into(labels, k, true, to)
}

fn sort_into(labels: &impl Readable, k: usize, ascending: bool, to: Target<'_>) -> Result<()> {
    let (device, sizes) = (labels.device(), [labels.dims()[0], labels.dims()[1], k]);
    on(&device, "order")?.order(labels, k, &Sort::new(sizes, ascending, arch(&device)?), to)
}

/// The largest of some labels, contiguous u32; 0 of none. The host waits for it.
pub(crate) fn max_label(labels: &impl Readable) -> Result<u32> {
    on(&labels.device(), "max_label")?.max_label(labels)
}

/// Replaces the centroids, `(..batch, k, d)`, by the reduction, but for clusters without weight. In a fit's turn it decides which problems have
/// converged: no centroid has moved farther than the threshold, in squared Euclidean distance.
pub(crate) fn update(u: &Update<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
    on(u.x.device(), "update")?.update(u, centroids, memory)
}

/// Adds rows to the sums of their clusters. In a fit's turn, those of problems that have not converged. Every row and its factor
/// are finite, or its factor is 0.
pub(crate) fn accumulate(u: &Update<'_>, to: &Accumulator, memory: &Memory) -> Result<()> {
    on(u.x.device(), "accumulate")?.accumulate(u, to, memory)
}

/// Replaces the centroids as [`update`] does, by all rows that have been added, and leaves zeros. Medians have no such sums. The centroids may be of
/// any float dtype.
pub(crate) fn finish(f: &Finish<'_>, centroids: Target<'_>, memory: &Memory) -> Result<()> {
    on(f.sums.sums.device(), "finish")?.finish(f, centroids, memory)
}

/// Adds the sums of another accumulator of the same grid.
pub(crate) fn merge(sums: &Tensor, others: &Tensor) -> Result<()> {
    on(sums.device(), "merge")?.merge(sums, others)
}

/// All iterations of a fit and its last labels at once (in one launch; on the CPU rows of one column, sorted), and whether this
/// was a fit for that; if not, nothing has been done.
pub(crate) fn fit_on_chip(fit: &OnChipFit<'_>, memory: &Memory) -> Result<bool> {
    on(fit.x.device(), "fit_on_chip")?.fit_on_chip(fit, memory)
}

/// Rows as [`Codes`](crate::request::Codes), u8 `(b, n, d)` and their scales `(b, n)`; nothing where there is no kernel for it.
pub(crate) fn byte_codes(x: &Rows) -> Result<Option<(Tensor, Tensor)>> {
    if forced() {
        return Ok(None);
    }
    on(x.device(), "byte_codes")?.byte_codes(x)
}

/// Attends from each query head to the cache, `(b, q_heads, d)`; nothing where there is no kernel for it.
pub(crate) fn attend(a: &Attention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    if forced() {
        return Ok(None);
    }
    on(a.q.device(), "attend")?.attend(a, memory)
}

/// The same where clustered tokens are codes.
pub(crate) fn attend_coded(a: &CodedAttention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    if forced() {
        return Ok(None);
    }
    on(a.q.device(), "attend_coded")?.attend_coded(a, memory)
}

/// Attends from each query to the list of its group, `(b, heads, m, d)`; nothing where there is no kernel for it.
pub(crate) fn route(r: &Routed<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    if forced() {
        return Ok(None);
    }
    on(r.q.device(), "route")?.route(r, memory)
}

/// The products of rows `(1, m, inputs)` with weights that are codes, and a bias, f32 `(outputs)`, if there is one: `(m, outputs)` in the dtype of the
/// rows. Nothing where there is no kernel for it.
pub(crate) fn lut_product(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    if forced() {
        return Ok(None);
    }
    on(x.device(), "lut_product")?.lut_product(x, w, bias)
}

/// The weights of some outputs, f32 `(some, inputs)`; nothing where there is no kernel for it.
pub(crate) fn lut_decode(w: &LutMatrix<'_>, outputs: Range<usize>) -> Result<Option<Tensor>> {
    if forced() {
        return Ok(None);
    }
    on(w.codes.device(), "lut_decode")?.lut_decode(w, outputs)
}

/// Rows in each cluster, u32 `(..batch, k)`, by where clusters begin and end in their order, u32 `(..batch, k + 1)`.
pub(crate) fn cluster_sizes(offsets: &Tensor) -> Result<Tensor> {
    let (last, k) = (offsets.rank() - 1, offsets.dims()[offsets.rank() - 1] - 1);
    if offsets.elem_count() == 0 {
        // Candle's difference of two empty views is the first of them, wherever it begins.
        return problem::empty(&[&offsets.dims()[..last], &[k]].concat(), DType::U32, offsets.device());
    }
    elementwise([&offsets.narrow(last, 1, k)?, &offsets.narrow(last, 0, k)?], |[ends, begins]| ends - begins)
}

/// The sums or means of clusters, `(b, k, d)`, or of all rows as one cluster; zeros of those without rows.
pub(crate) fn reduce(x: &Rows, order: Option<&Order>, reduction: Reduction) -> Result<Tensor> {
    let k = order.map_or(1, Order::k);
    let reduced = host::zeros("clusters", (x.b, k, x.d), x.dtype(), x.device())?;
    let (summands, labels) = (Summands::unsearched(x)?, order.map(Labels::Sorted));
    update(&Update::new(x, &summands, labels, reduction, k)?, (&reduced).into(), &Memory::default())?;
    Ok(reduced)
}

/// The sum of the finite of `values` (f64 `(b, n)`) in each cluster, f64 `(b, k)`: exact, and rounded once.
pub(crate) fn cluster_sums(values: &Tensor, order: Option<&Order>) -> Result<Tensor> {
    Ok(reduce(&Rows::new(&values.unsqueeze(2)?)?, order, Reduction::Sum)?.squeeze(2)?)
}

/// The sum of each row of `values` (f64 `(b, n)`), likewise, but infinite where one of them is positive infinity: f64 `(b,)`.
pub(crate) fn total(values: &Tensor) -> Result<Tensor> {
    let sums = cluster_sums(values, None)?.squeeze(1)?;
    let infinite = values.gt(f64::MAX)?.to_dtype(DType::U32)?.max(1)?;
    Ok(infinite.where_cond(&(sums.ones_like()? * f64::INFINITY)?, &sums)?)
}
