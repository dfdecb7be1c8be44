//! Attention of groups of queries to lists of tokens: `kernels/attention/route.cu`.

use super::{
    device::{arch, device},
    kernel::launch,
    memory::{alloc, elements, ArenaLayout},
    params::{Choice, Route},
    rows::contiguous,
    select::{self, Lists},
    tensors::{read, tensor, typed, Element},
};
use crate::{
    error::Result,
    memory::Memory,
    operand::Readable,
    plan::arch::shared_memory,
    problem::empty,
    request::Routed,
    rows::{in_eights, Rows},
    tiles::{ROUTE_KEYS, ROUTE_THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType, Tensor};

pub(crate) fn route(r: &Routed<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    const OP: &str = "route";
    let dev = device(r.q)?;
    let (b, heads, m, d) = r.q.dims4()?;
    let Some(groups) = r.groups else { return Ok(None) };
    let (kv_heads, n) = (r.keys.dim(1)?, r.keys.dim(2)?);
    let (k, units) = (groups.mean_keys.dim(2)?, groups.queries.k());
    let clustered = groups.keys.order.dim(1)?;
    let half = matches!(r.q.dtype(), DType::F16 | DType::BF16);
    // Tiles of 32 queries a warp read keys half as often, and are worth it where groups fill them.
    let tall = if m > units * ROUTE_THREADS / 2 && d <= 128 { 2 } else { 1 };
    let Some(kernels) = kernels(d, tall) else { return Ok(None) };
    let (rows, pitch) = (ROUTE_THREADS / 2 * tall, d.next_multiple_of(64));
    let shared = (rows + 2 * ROUTE_KEYS) * pitch * 2;
    let arch = arch(dev)?;
    let fits = shared_memory(arch).is_some_and(|most| shared <= most) && select::fits(k, arch);
    if !half || r.scale <= 0.0 || !fits {
        return Ok(None);
    }
    let aligned = |t: &Tensor| if in_eights(t) { Ok(t.clone()) } else { t.force_contiguous() };
    let q = aligned(&r.q.contiguous()?)?;
    let (choosing, choosers) = match &groups.choosers {
        Some((q, of)) => (aligned(&q.contiguous()?)?, of),
        None => (q.clone(), &groups.queries),
    };
    let (keys, values) = (rows_in_eights(r.keys)?, rows_in_eights(r.values)?);

    let all = elements(&[b, heads, units]);
    let (sinks, others) = (r.sinks, n - r.sinks - clustered);
    let route = Route {
        key_head: keys.batch_stride as i64,
        key_row: keys.row_stride as i64,
        value_head: values.batch_stride as i64,
        value_row: values.row_stride as i64,
        group: (heads / kv_heads) as i64,
        queries: m as i64,
        units: units as i64,
        sinks: sinks as i64,
        clustered: clustered as i64,
        others: others as i64,
        k: k as i64,
        most: r.most as i64,
        means: if r.estimate { k as i64 } else { 0 },
        causal: r.causal as i64,
        scale: (r.scale * std::f64::consts::LOG2_E) as f32,
    };
    let of_choosers = Route { queries: choosing.dim(2)? as i64, ..route };
    let choice = Choice {
        units: (heads / kv_heads * units) as i64,
        clustered: clustered as i64,
        k: k as i64,
        least: r.least as i64,
        most: r.most as i64,
        share: r.share as f32,
    };
    let mut scratch = ArenaLayout::default();
    let scores = scratch.unwritten::<f32>(elements(&[all, k]));
    let left = scratch.unwritten::<f32>(elements(&[all, k]));
    let chosen = scratch.unwritten::<u32>(elements(&[all, r.most]));
    let listed = scratch.unwritten::<u32>(all);
    let scratch = scratch.scratch(dev, OP, memory)?;
    let (scores, left, chosen, listed) =
        (scratch.ptr(scores), scratch.ptr(left), scratch.ptr(chosen), scratch.ptr(listed));
    let (mean_keys, mean_values) = (&groups.mean_keys, &groups.mean_values);
    let inputs: [&dyn Readable; 6] = [&q, &choosing, &keys.operand, &values.operand, mean_keys, mean_values];
    let inputs = inputs.map(read);
    let [q, choosing, keys, values, mean_keys, mean_values] = &inputs;
    let lists = [&groups.keys, &groups.queries, choosers].map(|of| [read(&of.order), read(&of.offsets)]);
    let [[order, offsets], [query_order, query_offsets], [chooser_order, chooser_offsets]] = &lists;
    let (order, offsets) = (order.view::<u32>()?, offsets.view::<u32>()?);
    let (query_order, query_offsets) = (query_order.view::<u32>()?, query_offsets.view::<u32>()?);
    let (chooser_order, chooser_offsets) = (chooser_order.view::<u32>()?, chooser_offsets.view::<u32>()?);
    typed!(r.q.dtype(), T => {
        let (q, choosing) = (q.view::<T>()?, choosing.view::<T>()?);
        let (keys, values) = (keys.view::<T>()?, values.view::<T>()?);
        let (mean_keys, mean_values) = (mean_keys.view::<T>()?, mean_values.view::<T>()?);
        let mut out = alloc::<T>(dev, OP, elements(&[b, heads, m, d]))?;
        launch!(dev, Route, kernels[0], T::SUFFIX, all, ROUTE_THREADS, shared;
            &choosing, &mean_keys, &of_choosers, &chooser_order, &chooser_offsets, &offsets, &scores)?;
        select::select(dev, &choice, all, scores, [&order, &offsets], &Lists { chosen, left, listed })?;
        launch!(dev, Route, kernels[1], T::SUFFIX, elements(&[b, heads, m / rows + units]), ROUTE_THREADS, shared;
            &q, &keys, &values, &mean_keys, &mean_values, &route, &query_order, &query_offsets, &chosen, &left, &listed,
            &mut out)?;
        Ok(Some(tensor(dev, out, (b, heads, m, d))))
    })
}

/// The kernels that rank clusters and attend, for rows of so many columns and tiles of 16 queries a warp, or so many times as many.
fn kernels(d: usize, tall: usize) -> Option<[&'static str; 2]> {
    macro_rules! kernels {
        ($(($columns:literal, $tall:literal)),+) => {
            match (d, tall) {
                $(($columns, $tall) => Some([
                    concat!("route_scores_", $columns, "_", $tall),
                    concat!("route_attend_", $columns, "_", $tall),
                ]),)+
                _ => None,
            }
        };
    }
    kernels!((64, 1), (64, 2), (80, 1), (80, 2), (96, 1), (96, 2), (112, 1), (112, 2), (128, 1), (128, 2), (256, 1))
}

/// Views `t`, or a copy of it, as rows that start at multiples of eight elements.
fn rows_in_eights(t: &Tensor) -> Result<Rows<'static>> {
    let t = match Rows::of(t.into()) {
        _ if t.elem_count() == 0 => empty(t.dims(), t.dtype(), t.device())?,
        Some(rows) if in_eights(t) => return Ok(rows),
        Some(_) => t.force_contiguous()?,
        None => match contiguous(t)? {
            Some(copy) => copy,
            None => t.contiguous()?,
        },
    };
    Ok(Rows::of((&t).into()).expect("a contiguous tensor folds"))
}
