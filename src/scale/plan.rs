//! The plan of a fit of a stream: which rows stay on which device, and what each pass reads.

use super::{
    options::{Cut, StreamOptions},
    progress::Passes,
    reads::is_sent_in_place,
    ring::ring_bytes,
    source::Source,
};
use crate::{
    error::Result,
    kmeans::Init,
    lloyd::{
        kmeans_parallel::PIECE,
        merged::{row_pitch, Whole},
    },
    plan::{bytes::parallel_start_bytes, Plan},
    primitives,
    problem::Problem,
    rows::RowLayout,
};
use candle_core::DeviceLocation;
use std::{fmt, ops::Range};

/// What a fit of a stream does: the rows that stay on each device of this process, the kernels, and the bytes that passes read. Its
/// [`Display`](fmt::Display) is a line for each device and one for the passes. See [`KMeans::plan_stream`](crate::KMeans::plan_stream).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamPlan {
    /// The parts of the devices, in the order of their rows.
    pub devices: Vec<DevicePlan>,
    /// The most passes over all rows, but for those that look for rows for empty clusters, and those of k-means|| that look for as many
    /// distinct ones as there are clusters; none where [`max_iters`](crate::KMeans::max_iters) sets no limit.
    pub max_passes: Option<u64>,
    passes: Passes,
}

/// The part of a [`StreamPlan`] that one device has.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DevicePlan {
    /// The device.
    pub device: DeviceLocation,
    /// Its rows, of all.
    pub rows: Range<u64>,
    /// The number of them that stay there: the first ones.
    pub resident_rows: u64,
    /// The bytes of the rows that stay, as they lie there.
    pub resident_bytes: u64,
    /// The rows that are read at a time.
    pub block_rows: u64,
    /// The blocks of rows that do not stay, which every pass reads again.
    pub moving_blocks: u64,
    /// The kernels of a block, and a bound on the memory of a fit of its rows alone.
    pub block: Plan,
    /// A bound on the memory that a start by [k-means||](crate::Init::KMeansParallel) takes on the device beside the rows, and on the CPU
    /// for the numbers of the host as well. It draws rows at random: more of them than this has room for are as good as impossible. 0 for
    /// other starts.
    pub start_bytes: u64,
    /// Bytes that the first pass reads, as [`Source::read`] gives them.
    pub first_pass_bytes: u64,
    /// Bytes that each later pass reads.
    pub later_pass_bytes: u64,
    /// Host memory for the ring of buffers that rows are read into; page-locked for a GPU.
    pub ring_bytes: u64,
    /// Host memory for the labels of its rows.
    pub label_bytes: u64,
    /// The cut that the stream takes.
    pub(super) cut: Cut,
}

impl StreamPlan {
    pub(super) fn new(devices: Vec<DevicePlan>, passes: Passes) -> Self {
        Self { devices, max_passes: passes.all(), passes }
    }
}

impl DevicePlan {
    /// For these rows of a source, on the device of `whole`.
    pub(super) fn new(
        whole: &Whole<'_>,
        source: &Source<'_>,
        options: &StreamOptions,
        rows: Range<usize>,
    ) -> Result<Self> {
        let &Whole { settings, p, device, .. } = whole;
        let pitch = row_pitch(whole)?;
        let (layout, arch) = (RowLayout::packed(p.d), primitives::arch(device)?);
        let start_bytes = |rows: usize| match settings.init {
            Init::KMeansParallel => parallel_start_bytes(p, rows.clamp(1, PIECE) as u64, layout, settings, arch),
            _ => 0,
        };
        let cut = options.cut(source, rows.len(), pitch, device, start_bytes(rows.len()) as usize)?;
        let (first, end) = (rows.start as u64, rows.end as u64);
        let blocks = cut.ranges(rows).len();
        let resident_rows = (cut.staying as u64 * cut.rows as u64).min(end - first);
        let of_block = Problem { n: cut.rows, ..p.clone() };
        // A start by k-means|| is not that of a block alone.
        let of_loop = match settings.init {
            Init::KMeansParallel => &settings.clone().init(Init::Even),
            _ => settings,
        };
        let row_bytes = source.row_bytes() as u64;
        Ok(Self {
            device: device.location(),
            rows: first..end,
            resident_rows,
            resident_bytes: resident_rows * (pitch * p.dtype.size_in_bytes()) as u64,
            block_rows: cut.rows as u64,
            moving_blocks: (blocks - cut.staying) as u64,
            block: Plan::new(&of_block, Some(layout), of_loop, arch, |_| Ok(false))?.without_near(&of_block),
            // On a GPU the rows that stay are one block.
            start_bytes: start_bytes(if device.is_cpu() { cut.rows } else { cut.rows.max(resident_rows as usize) }),
            first_pass_bytes: (end - first) * row_bytes,
            later_pass_bytes: (end - first - resident_rows) * row_bytes,
            ring_bytes: match is_sent_in_place(source, device)? {
                true => 0,
                false => ring_bytes(device, blocks, cut.rows, source.row_bytes()) as u64,
            },
            label_bytes: (end - first) * size_of::<u32>() as u64,
            cut,
        })
    }

    /// The share of its rows that stay; 1 of none.
    pub fn resident_share(&self) -> f64 {
        match self.rows.end - self.rows.start {
            0 => 1.0,
            rows => self.resident_rows as f64 / rows as f64,
        }
    }
}

impl fmt::Display for StreamPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.devices.iter().try_for_each(|device| writeln!(f, "{device}"))?;
        write!(f, "passes: {}", self.passes)
    }
}

impl fmt::Display for DevicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1048576.0);
        match self.device {
            DeviceLocation::Cpu => write!(f, "CPU")?,
            DeviceLocation::Cuda { gpu_id } | DeviceLocation::Metal { gpu_id } => write!(f, "GPU {gpu_id}")?,
        }
        let Self { rows, resident_rows, moving_blocks, block_rows, block, .. } = self;
        let share = 100.0 * self.resident_share();
        write!(f, ": of rows {}..{} {resident_rows} stay ({share:.1} %, ", rows.start, rows.end)?;
        write!(f, "{}), {moving_blocks} blocks of {block_rows} are read in every pass; ", mib(self.resident_bytes))?;
        let (first, later) = (mib(self.first_pass_bytes), mib(self.later_pass_bytes));
        write!(f, "the first pass reads {first}, each later one {later}; ")?;
        let (ring, labels) = (mib(self.ring_bytes), mib(self.label_bytes));
        write!(f, "the host has {ring} of buffers and {labels} of labels; a block: {block}")?;
        match self.start_bytes {
            0 => Ok(()),
            bytes => write!(f, "; a start takes at most {}", mib(bytes)),
        }
    }
}
