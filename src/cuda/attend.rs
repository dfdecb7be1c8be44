//! Attention over a clustered cache: `kernels/attention/attend.cu`.

use super::{
    device::{arch, device},
    kernel::{Kernel, WARP},
    memory::{alloc, elements, ArenaLayout},
    module::Image,
    params::Cache,
    tensors::{read, tensor, typed, Element},
};
use crate::{
    error::Result,
    memory::Memory,
    plan::arch::{shared_memory, Arch},
    request::Attention,
    rows::in_eights,
    tiles::{ATTEND_BLOCKS, ATTEND_HEADS, ATTEND_THREADS},
};
use candle_core::{
    cuda_backend::cudarc::driver::{DevicePtr as _, DevicePtrMut},
    DType, Tensor,
};

const WARPS: usize = ATTEND_THREADS / WARP;
/// Stages of the kernel, before each of which the blocks of a unit wait for each other.
const STAGES: i32 = 3;

pub(crate) fn attend(a: &Attention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    const OP: &str = "attend";
    let Some(c) = &a.clusters else { return Ok(None) };
    let dev = device(a.q)?;
    let (b, heads, room, d) = a.keys.dims4()?;
    let (q_heads, k, clustered) = (a.q.dim(1)?, c.spreads.dim(2)?, c.order.order.dim(1)?);
    // Rows are read eight columns at a time.
    let rows = [a.keys, a.values, c.mean_keys.bytes, c.mean_values.bytes];
    let numbers = [c.mean_keys.scales, c.mean_values.scales, c.spreads];
    let lists = [&c.order.order, &c.order.offsets];
    let readable = rows.iter().all(|&t| t.is_contiguous() && in_eights(t))
        && numbers.into_iter().chain(lists).chain([a.q]).all(Tensor::is_contiguous);
    let counted = a.tokens.max(clustered).saturating_add(k) < 1 << 31;
    let name = match d {
        64 => "attend_64",
        128 => "attend_128",
        _ => return Ok(None),
    };
    if a.q.dtype() == DType::F64 || a.values.dim(3)? != d || c.budget == 0 || !readable || !counted {
        return Ok(None);
    }
    let q = if in_eights(a.q) { a.q.clone() } else { a.q.force_contiguous()? };
    let (units, group) = if c.shared { (1, q_heads / heads) } else { (q_heads / heads, 1) };
    let all = elements(&[b, heads, units]);

    typed!(a.q.dtype(), T => {
        let arch = arch(dev)?;
        let (Arch::Cuda { processors, .. }, Some(most)) = (arch, shared_memory(arch)) else { return Ok(None) };
        let kernel = Kernel::get(dev, Image::Attend, name, T::SUFFIX, most)?;
        // As many blocks as run at once.
        let cluster = kernel.cluster(all, ATTEND_THREADS, ATTEND_BLOCKS)?;
        let blocks = cluster.unwrap_or((processors / all.max(1)).clamp(1, ATTEND_BLOCKS));

        // A block holds queries; ranks, offsets and its tokens; and in their place, or beside them if the query heads
        // take turns, the sums of its warps.
        let tile = 32 / size_of::<T>();
        let (clusters, rows) = (k.div_ceil(blocks * tile) * tile, (a.tokens - clustered + c.budget).div_ceil(blocks));
        let list_bytes = (4 * (2 * k + 1 + rows)).next_multiple_of(16);
        let sums = 4 * WARPS * group.min(ATTEND_HEADS) * (d + 4);
        let queries = ATTEND_HEADS * d * size_of::<T>();
        let shared = queries + if group > ATTEND_HEADS { list_bytes + sums } else { list_bytes.max(sums) };
        let grid = elements(&[all, blocks]);
        if shared > most || grid > i32::MAX as usize {
            return Ok(None);
        }

        let mut scratch = ArenaLayout::default();
        let width = k.next_multiple_of(2);
        let bounds = scratch.unwritten::<f32>(elements(&[all, group, width]));
        let of_means = scratch.unwritten::<[f32; 2]>(elements(&[all, blocks, WARPS, group]));
        let partial = scratch.unwritten::<f32>(elements(&[all, blocks, group, d + 4]));
        let scratch = scratch.scratch(dev, OP, memory)?;
        let mut out = alloc::<T>(dev, OP, elements(&[b, q_heads, d]))?;

        // The addresses, and what orders the launches with other streams while they are queued.
        let stream = &kernel.stream;
        let floats = [&q, a.keys, a.values].map(read);
        let bytes = [c.mean_keys.bytes, c.mean_values.bytes].map(read);
        let (numbers, lists) = (numbers.map(read), lists.map(read));
        let floats = floats.iter().map(|input| input.view::<T>()).collect::<Result<Vec<_>>>()?;
        let bytes = bytes.iter().map(|input| input.view::<u8>()).collect::<Result<Vec<_>>>()?;
        let numbers = numbers.iter().map(|input| input.view::<f32>()).collect::<Result<Vec<_>>>()?;
        let lists = lists.iter().map(|input| input.view::<u32>()).collect::<Result<Vec<_>>>()?;
        let floats: Vec<_> = floats.iter().map(|view| view.device_ptr(stream)).collect();
        let bytes: Vec<_> = bytes.iter().map(|view| view.device_ptr(stream)).collect();
        let numbers: Vec<_> = numbers.iter().map(|view| view.device_ptr(stream)).collect();
        let lists: Vec<_> = lists.iter().map(|view| view.device_ptr(stream)).collect();
        let written = out.device_ptr_mut(stream);
        let mut of = Cache {
            q: floats[0].0,
            keys: floats[1].0,
            values: floats[2].0,
            mean_keys: bytes[0].0,
            mean_values: bytes[1].0,
            key_scales: numbers[0].0,
            value_scales: numbers[1].0,
            spreads: numbers[2].0,
            order: lists[0].0,
            offsets: lists[1].0,
            out: written.0,
            bounds: scratch.ptr(bounds),
            of_means: scratch.ptr(of_means),
            partial: scratch.ptr(partial),
            head_stride: (room * d) as i64,
            units: units as i32,
            group: group as i32,
            sinks: c.sinks as i32,
            clustered: clustered as i32,
            tokens: a.tokens as i32,
            k: k as i32,
            width: width as i32,
            budget: c.budget as i32,
            blocks: blocks as i32,
            clusters: clusters as i32,
            rows: rows as i32,
            first: 1,
            last: STAGES,
            estimate: c.estimate as i32,
            scale: a.scale as f32,
            reach: (c.reach * a.scale.abs()) as f32,
        };
        if cluster.is_some() {
            kernel.run_clusters(&of, grid, ATTEND_THREADS, shared, Some(blocks))?;
        } else {
            for stage in 1..=STAGES {
                (of.first, of.last) = (stage, stage);
                kernel.run_clusters(&of, grid, ATTEND_THREADS, shared, None)?;
            }
        }
        drop(written);
        Ok(Some(tensor(dev, out, (b, q_heads, d))))
    })
}
