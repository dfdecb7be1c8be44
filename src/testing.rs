//! For the tests and the tuning of this crate; not part of its interface.

#[cfg(feature = "cuda")]
pub use crate::cuda::{assign::tensor_core::product_step, kernel::limit_blocks_at_once, memory::fail_allocation};
use crate::{
    error::Result,
    fit::Fit,
    kmeans::KMeans,
    lloyd::prepared::PreparedFit,
    memory::Memory,
    metric::Metric,
    plan::{arch::Arch, assign::Assign, update::UpdatePlan},
    primitives,
    request::{self, Labels, Reduction, Summands},
    rows::Rows,
    scale::options::StreamOptions,
};
pub use crate::{
    launches::{launches, passes, PassWork},
    plan::{assign::force, skip::force_skipping},
    stages::{on_read, on_stage},
};
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// The update of a fit's loop alone: new means in place, for labels `(b, n)` that are known to be in range.
pub struct Update {
    x: Rows<'static>,
    summands: Summands,
    plan: UpdatePlan,
    centroids: Tensor,
    memory: Memory,
}

impl Update {
    /// For rows `(b, n, d)` and `k` clusters.
    pub fn new(x: &Tensor, k: usize) -> Result<Self> {
        let x = Rows::new(x)?;
        let (summands, centroids) = (Summands::from_rows(&x)?, Tensor::zeros((x.b, k, x.d), x.dtype(), x.device())?);
        let plan = request::Update::new(&x, &summands, None, Reduction::Mean, k)?.plan;
        Ok(Self { x, summands, plan, centroids, memory: Memory::default() })
    }

    /// The name of the kernel.
    pub fn kernel(&self) -> &'static str {
        self.plan.kernel.name()
    }

    /// The means `(b, k, d)`, which the next call overwrites.
    pub fn run(&self, labels: &Tensor) -> Result<Tensor> {
        self.run_by(Labels::Unsorted(labels))
    }

    /// The same by an order that was made before.
    pub fn run_sorted(&self, labels: &Tensor) -> Result<Tensor> {
        let order = primitives::grouped(labels, self.centroids.dim(1)?)?;
        self.run_by(Labels::Sorted(&order))
    }

    fn run_by(&self, labels: Labels<'_>) -> Result<Tensor> {
        let Self { x, summands, plan, centroids, memory } = self;
        let (labels, reduction) = (Some(labels), Reduction::Mean);
        let u = request::Update { plan: *plan, x, summands, labels, reduction, turn: None, kept: None };
        primitives::update(&u, centroids.into(), memory)?;
        Ok(centroids.clone())
    }
}

/// The fit of rows that are cut into so many blocks for each of so many ranks, which share the device on threads of their own, and
/// start from where the fit of all rows starts.
pub fn fit_in_blocks(settings: &KMeans, x: &Tensor, blocks: usize, ranks: usize) -> Result<Fit> {
    PreparedFit::fit_in_blocks(settings, x, blocks, ranks)
}

/// The options of a stream whose rows are shared by a rank for each of these devices, any of which may be the same one.
pub fn on_each(devices: &[Device]) -> StreamOptions {
    StreamOptions::on_each(devices)
}

/// The fit of a batch on the CPU whose problems are shared by a rank for each of these devices, any of which may be the same one.
pub fn fit_batch_on_each(settings: &KMeans, x: &Tensor, devices: &[Device]) -> Result<Fit> {
    settings.fit_batch(x, &on_each(devices))
}

/// Bytes a second that a device takes from a buffer of a stream, of so many bytes, as often.
pub fn link_rate(device: &Device, bytes: usize, times: usize) -> Result<f64> {
    let mut lane = primitives::lane(device)?;
    let buffer = primitives::buffer(device, bytes)?;
    let mut send = |times: usize| {
        for _ in 0..times {
            lane.reserve((bytes / 2, 1), DType::F16)?;
            // SAFETY: nobody writes to the buffer, and the device has been waited for before it is dropped.
            let sent = unsafe { lane.send(&buffer.bytes()[..bytes], 0) }?;
            lane.receive()?;
            sent.wait()?;
        }
        device.synchronize()
    };
    send(2)?;
    let start = Instant::now();
    send(times)?;
    Ok((bytes * times) as f64 / start.elapsed().as_secs_f64())
}

/// The names of the kernels that can assign `x` to `k` centroids, the one that is chosen first.
pub fn candidates(x: &Tensor, k: usize, metric: Metric) -> Result<Vec<&'static str>> {
    let d = x.dims()[x.rank() - 1];
    let all = Assign::candidates(x.dtype(), metric, [k, d], primitives::arch(x.device())?);
    Ok(all.into_iter().map(Assign::name).collect())
}

/// The name of the kernel that assigns `x` to `k` centroids outside a fit.
pub fn chosen(x: &Tensor, k: usize, metric: Metric) -> Result<&'static str> {
    let (x, centroids) = (Rows::new(x)?, Rows::new(&x.narrow(x.rank() - 2, 0, k)?)?);
    Ok(request::Assignment::new(&x, &centroids, metric)?.plan.kernel.name())
}

/// The compute capability of a GPU, 90 for 9.0; 0 of the CPU.
pub fn capability(device: &Device) -> Result<u32> {
    Ok(match primitives::arch(device)? {
        Arch::Cpu { .. } => 0,
        Arch::Cuda { capability, .. } => capability,
    })
}

/// The number of centroids that were compared with a row by the definition in f64, in all CPU assignments of this thread so far.
pub fn compared() -> u64 {
    crate::cpu::assign::compared()
}

/// The groups of centroids that the tiles of rows of a fit on a GPU have scored in all when near groups were listed for the last time;
/// none if it has no groups, or has scored all centroids since. The host waits.
#[cfg(feature = "cuda")]
pub fn scored_groups(fit: &PreparedFit) -> Result<Option<u64>> {
    crate::cuda::assign::near::scored_groups(fit.memory())
}

/// The number of times that this thread has had labels sorted so far, on any device; fits on chip, which sort in their launch, count for
/// nothing.
pub fn sorts() -> u64 {
    crate::backend::sorts()
}
