//! Attention over a clustered cache: `kernels/attention/attend.cuh`.

use super::{
    device::{arch, device},
    kernel::{Kernel, WARP},
    memory::{alloc, elements, ArenaLayout},
    module::Image,
    params::{Cache, ProductCodes},
    tensors::{read, tensor, typed, Element},
};
use crate::{
    error::Result,
    memory::Memory,
    plan::arch::{shared_memory, Arch},
    request::{Attention, Coded, CodedAttention, Codes},
    rows::in_eights,
    tiles::{ATTEND_BLOCKS, ATTEND_HEADS, ATTEND_TEAM, ATTEND_THREADS, ATTEND_THREADS_WIDE},
};
use candle_core::{
    cuda_backend::cudarc::driver::{DevicePtr as _, DevicePtrMut},
    DType, Tensor,
};

/// Stages of the kernel, before each of which the blocks of a unit wait for each other.
const STAGES: i32 = 3;
/// Bytes of a row that a lane loads at once.
const PIECE: usize = 16;

pub(crate) fn attend(a: &Attention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    let Some(c) = &a.clusters else { return Ok(None) };
    let clustered = c.order.order.dim(1)?;
    let budget = Budget { reach: c.reach, tokens: c.budget, shared: c.shared, estimate: c.estimate };
    let cached = Cached {
        stored: [a.q, a.keys, a.values],
        scale: a.scale,
        means: [c.mean_keys, c.mean_values],
        spreads: c.spreads,
        offsets: &c.order.offsets,
        clustered: Tokens::Rows(&c.order.order),
        counts: [c.sinks, clustered, a.tokens],
        budget,
    };
    cached.attend("attend", memory)
}

pub(crate) fn attend_coded(a: &CodedAttention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    let clustered = a.coded_keys.codes.dim(2)?;
    let budget = Budget { reach: a.reach, tokens: a.budget, shared: a.shared, estimate: a.estimate };
    // Stored tokens come first, and are all read as sinks are.
    let cached = Cached {
        stored: [a.q, a.keys, a.values],
        scale: a.scale,
        means: [a.coded_keys.means, a.coded_values.means],
        spreads: a.spreads,
        offsets: a.offsets,
        clustered: Tokens::Codes([a.coded_keys, a.coded_values]),
        counts: [a.tokens, clustered, a.tokens.saturating_add(clustered)],
        budget,
    };
    cached.attend("attend_coded", memory)
}

/// The fields of [`Attention`] and [`CodedAttention`] that the kernel takes.
struct Cached<'a> {
    /// Queries, keys and values.
    stored: [&'a Tensor; 3],
    scale: f64,
    /// Of keys and of values.
    means: [Codes<'a>; 2],
    spreads: &'a Tensor,
    offsets: &'a Tensor,
    clustered: Tokens<'a>,
    /// Sinks, clustered tokens and all.
    counts: [usize; 3],
    budget: Budget,
}

/// The clustered tokens.
enum Tokens<'a> {
    /// Rows, in this order.
    Rows(&'a Tensor),
    /// Keys and values as codes.
    Codes([Coded<'a>; 2]),
}

struct Budget {
    reach: f64,
    tokens: usize,
    shared: bool,
    estimate: bool,
}

impl Cached<'_> {
    fn attend(&self, op: &'static str, memory: &Memory) -> Result<Option<Tensor>> {
        let ([q, keys, values], [mean_keys, mean_values], budget) = (self.stored, self.means, &self.budget);
        let [sinks, clustered, tokens] = self.counts;
        let dev = device(q)?;
        let (b, heads, room, d) = keys.dims4()?;
        let (q_heads, k) = (q.dim(1)?, self.spreads.dim(2)?);
        // Rows are read eight columns at a time.
        let rows = [keys, values, mean_keys.bytes, mean_values.bytes];
        let numbers = [mean_keys.scales, mean_values.scales, self.spreads];
        let readable = rows.iter().all(|&t| t.is_contiguous() && in_eights(t))
            && numbers.into_iter().chain([self.offsets, q]).all(Tensor::is_contiguous)
            && self.clustered.readable(q.dtype());
        let counted = tokens.saturating_add(k) < 1 << 31;
        let Some(name) = self.clustered.kernel(d) else { return Ok(None) };
        if q.dtype() == DType::F64 || values.dim(3)? != d || budget.tokens == 0 || !readable || !counted {
            return Ok(None);
        }
        let q = &if in_eights(q) { q.clone() } else { q.force_contiguous()? };
        let (units, group) = if budget.shared { (1, q_heads / heads) } else { (q_heads / heads, 1) };
        let all = elements(&[b, heads, units]);

        typed!(q.dtype(), T => {
            let arch = arch(dev)?;
            let (Arch::Cuda { processors, .. }, Some(most)) = (arch, shared_memory(arch)) else { return Ok(None) };
            let kernel = Kernel::get(dev, self.clustered.image(), name, T::SUFFIX, most)?;
            // As many blocks as run at once.
            let threads = if d > 128 { ATTEND_THREADS_WIDE } else { ATTEND_THREADS };
            let warps = threads / WARP;
            let cluster = kernel.cluster(all, threads, ATTEND_BLOCKS)?;
            let blocks = cluster.unwrap_or((processors / all.max(1)).clamp(1, ATTEND_BLOCKS));

            // A block holds queries; ranks, offsets and its tokens; in their place, or beside them if the query heads take turns,
            // the sums of its warps; and entries of codes, if they fit.
            let tile = 32 / size_of::<T>();
            let clusters = k.div_ceil(blocks * tile) * tile;
            let rows = (tokens - clustered + budget.tokens).div_ceil(blocks);
            // To exchange what they count costs the blocks of a thread block cluster more than for each to rank all if these are few.
            let team = cluster.is_some() && blocks > 1 && k >= ATTEND_TEAM;
            let ranked = if team { clusters } else { k };
            let list_bytes = (4 * (2 * ranked + 1 + self.clustered.lists() * rows)).next_multiple_of(16);
            // Lanes have whole pieces: four of them a row for scores, and eight for values.
            let columns = |lanes: usize| d.next_multiple_of(lanes * PIECE / size_of::<T>());
            let stride = columns(8) + 4;
            let sums = 4 * warps * group.min(ATTEND_HEADS) * stride;
            let queries = ATTEND_HEADS * columns(4) * size_of::<T>();
            let lists = queries + if group > ATTEND_HEADS { list_bytes + sums } else { list_bytes.max(sums) };
            let entry_bytes = self.clustered.entry_bytes(d);
            let fits = lists + entry_bytes <= most;
            let (place, shared) = if fits { (lists / 16, lists + entry_bytes) } else { (0, lists) };
            let grid = elements(&[all, blocks]);
            if shared > most || grid > i32::MAX as usize {
                return Ok(None);
            }

            let mut scratch = ArenaLayout::default();
            let width = k.next_multiple_of(2);
            let bounds = scratch.unwritten::<f32>(elements(&[all, group, width]));
            let of_means = scratch.unwritten::<[f32; 2]>(elements(&[all, blocks, warps, group]));
            let partial = scratch.unwritten::<f32>(elements(&[all, blocks, group, stride]));
            let scratch = scratch.scratch(dev, op, memory)?;
            let mut out = alloc::<T>(dev, op, elements(&[b, q_heads, d]))?;

            // The addresses, and what orders the launches with other streams while they are queued.
            let stream = &kernel.stream;
            let (order, coded) = match &self.clustered {
                Tokens::Rows(order) => (Some(*order), [].as_slice()),
                Tokens::Codes(coded) => (None, coded.as_slice()),
            };
            // A table that pieces share becomes one for each where blocks hold it, or else here.
            let entries = coded.iter().map(|c| match c.entries.dims5()? {
                (b, heads, 1, count, columns) if !fits => {
                    Ok(c.entries.broadcast_as((b, heads, d / columns, count, columns))?.contiguous()?)
                }
                _ => Ok(c.entries.clone()),
            });
            let entries = entries.collect::<Result<Vec<_>>>()?;
            let floats = [q, keys, values].into_iter().chain(&entries).map(read);
            let bytes = [mean_keys.bytes, mean_values.bytes].into_iter().chain(coded.iter().map(|c| c.codes)).map(read);
            let gains: Vec<_> = coded.iter().map(|c| c.gains.map(read)).collect();
            let (numbers, lists) = (numbers.map(read), [self.offsets].into_iter().chain(order).map(read));
            let [floats, bytes, lists]: [Vec<_>; 3] = [floats.collect(), bytes.collect(), lists.collect()];
            let floats = floats.iter().map(|input| input.view::<T>()).collect::<Result<Vec<_>>>()?;
            let bytes = bytes.iter().map(|input| input.view::<u8>()).collect::<Result<Vec<_>>>()?;
            let numbers = numbers.iter().map(|input| input.view::<f32>()).collect::<Result<Vec<_>>>()?;
            let lists = lists.iter().map(|input| input.view::<u32>()).collect::<Result<Vec<_>>>()?;
            let gains = gains.iter().map(|input| input.as_ref().map(|input| input.view::<u8>()).transpose());
            let gains = gains.collect::<Result<Vec<_>>>()?;
            let floats: Vec<_> = floats.iter().map(|view| view.device_ptr(stream)).collect();
            let bytes: Vec<_> = bytes.iter().map(|view| view.device_ptr(stream)).collect();
            let numbers: Vec<_> = numbers.iter().map(|view| view.device_ptr(stream)).collect();
            let lists: Vec<_> = lists.iter().map(|view| view.device_ptr(stream)).collect();
            let gains: Vec<_> = gains.iter().map(|view| view.as_ref().map(|view| view.device_ptr(stream))).collect();
            let written = out.device_ptr_mut(stream);
            let codes = |i: usize| -> Result<ProductCodes> {
                let Some(entries) = entries.get(i) else { return Ok(ProductCodes::NONE) };
                let (_, _, tables, count, columns) = entries.dims5()?;
                let (codes, bits, tables) = (bytes[2 + i].0, count.trailing_zeros() as i32, tables as i64);
                let gains = gains[i].as_ref().map_or(0, |gains| gains.0);
                Ok(ProductCodes { codes, entries: floats[3 + i].0, columns: columns as i32, bits, tables, gains })
            };
            let mut params = Cache {
                q: floats[0].0,
                keys: floats[1].0,
                values: floats[2].0,
                mean_keys: bytes[0].0,
                mean_values: bytes[1].0,
                key_scales: numbers[0].0,
                value_scales: numbers[1].0,
                spreads: numbers[2].0,
                order: lists.get(1).map_or(0, |order| order.0),
                offsets: lists[0].0,
                out: written.0,
                bounds: scratch.ptr(bounds),
                of_means: scratch.ptr(of_means),
                partial: scratch.ptr(partial),
                head_stride: (room * d) as i64,
                units: units as i32,
                group: group as i32,
                sinks: sinks as i32,
                clustered: clustered as i32,
                tokens: tokens as i32,
                k: k as i32,
                width: width as i32,
                budget: budget.tokens as i32,
                blocks: blocks as i32,
                clusters: clusters as i32,
                rows: rows as i32,
                first: 1,
                last: STAGES,
                estimate: budget.estimate as i32,
                scale: self.scale as f32,
                reach: (budget.reach * self.scale.abs()) as f32,
                key_codes: codes(0)?,
                value_codes: codes(1)?,
                entries: place as i32,
                team: team as i32,
            };
            if cluster.is_some() {
                kernel.run_clusters(&params, grid, threads, shared, Some(blocks))?;
            } else {
                for stage in 1..=STAGES {
                    (params.first, params.last) = (stage, stage);
                    kernel.run_clusters(&params, grid, threads, shared, None)?;
                }
            }
            drop(written);
            Ok(Some(tensor(dev, out, (b, q_heads, d))))
        })
    }
}

impl Tokens<'_> {
    fn image(&self) -> Image {
        match self {
            Self::Rows(_) => Image::Attend,
            Self::Codes(_) => Image::AttendCoded,
        }
    }

    /// The kernel for heads of so many columns, if there is one.
    fn kernel(&self, d: usize) -> Option<&'static str> {
        macro_rules! kernels {
            ($rows:literal, $codes:literal; $($columns:literal),+) => {
                match (self, d) {
                    $((Self::Rows(_), $columns) => Some(concat!($rows, $columns)),
                    (Self::Codes(_), $columns) => Some(concat!($codes, $columns)),)+
                    _ => None,
                }
            };
        }
        kernels!("attend_", "attend_coded_"; 64, 80, 96, 112, 128, 256)
    }

    /// True if lanes can load these: a piece of a row is as many whole codes, of a power of two of columns.
    fn readable(&self, dtype: DType) -> bool {
        match self {
            Self::Rows(order) => order.is_contiguous(),
            Self::Codes(coded) => coded.iter().all(|coded| {
                let (entries, codes) = (coded.entries, coded.codes);
                let columns = entries.dims()[4];
                let whole = columns.is_power_of_two() && columns * dtype.size_in_bytes() <= PIECE;
                let aligned = |t: &Tensor| {
                    t.is_contiguous() && (t.layout().start_offset() * t.dtype().size_in_bytes()).is_multiple_of(PIECE)
                };
                whole && aligned(entries) && aligned(codes) && coded.gains.is_none_or(Tensor::is_contiguous)
            }),
        }
    }

    /// The lists of what is read, each with a number for every token: where it is, and of codes the cluster.
    fn lists(&self) -> usize {
        match self {
            Self::Rows(_) => 1,
            Self::Codes(_) => 2,
        }
    }

    /// The entries of a key head of `d` columns in bytes, with a table for each piece.
    fn entry_bytes(&self, d: usize) -> usize {
        let bytes = |entries: &Tensor| entries.dims()[3] * d * entries.dtype().size_in_bytes();
        match self {
            Self::Rows(_) => 0,
            Self::Codes(coded) => coded.iter().map(|coded| bytes(coded.entries)).sum(),
        }
    }
}
