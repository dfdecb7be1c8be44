//! Attention over a clustered cache: `kernels/attend.cu`.

use super::{
    alloc, device, elements, launch, read,
    select::{self, Choice},
    tensor, typed, Element, Layout, Part,
};
use crate::{
    ops::{Attention, Memory},
    plan::forced,
    tiles::{ATTEND_MERGERS, ATTEND_ROWS, ATTEND_THREADS},
    Result,
};
use candle_core::{
    cuda_backend::cudarc::driver::{DeviceRepr, PushKernelArg},
    DType, Tensor,
};

/// `struct Cache` of `attend.cu`.
#[repr(C)]
struct Cache {
    head_stride: i64,
    units: i64,
    group: i64,
    sinks: i64,
    clustered: i64,
    tokens: i64,
    k: i64,
    budget: i64,
    scale: f32,
}

// SAFETY: integers and a float, laid out as in C.
unsafe impl DeviceRepr for Cache {}

pub(crate) fn attend(a: &Attention<'_>, memory: &Memory) -> Result<Option<Tensor>> {
    const OP: &str = "attend";
    let dev = device(a.q)?;
    let (b, heads, room, d) = a.keys.dims4()?;
    let (q_heads, k, clustered) = (a.q.dim(1)?, a.mean_keys.dim(2)?, a.order.dim(2)?);
    let fits = select::fits(k, super::arch(dev)?);
    let here =
        [a.q, a.keys, a.values, a.order, a.offsets, a.mean_keys, a.mean_values].into_iter().all(Tensor::is_contiguous);
    let tokens = a.tokens.max(clustered) < 1 << 31 && k < 1 << 31;
    if forced() || !matches!(d, 64 | 128) || a.q.dtype() == DType::F64 || a.budget == 0 || !fits || !here || !tokens {
        return Ok(None);
    }
    let (units, group) = if a.shared { (1, q_heads / heads) } else { (q_heads / heads, 1) };
    let queries = if group == 1 { 1 } else { 4 };
    let (parts, near) = (group.div_ceil(queries), a.tokens - clustered);
    let pieces = (near + a.budget + if a.estimate { k } else { 0 }).div_ceil(ATTEND_ROWS);
    let of = Cache {
        head_stride: (room * d) as i64,
        units: units as i64,
        group: group as i64,
        sinks: a.sinks as i64,
        clustered: clustered as i64,
        tokens: a.tokens as i64,
        k: k as i64,
        budget: a.budget as i64,
        scale: a.scale as f32,
    };
    let choice = Choice {
        units: units as i64,
        group: group as i64,
        clustered: clustered as i64,
        k: k as i64,
        least: a.budget as i64,
        most: a.budget as i64,
        share: 0.0,
    };
    let all = elements(&[b, heads, units]);
    let mut scratch = Layout::default();
    let scores = scratch.unwritten::<f32>(elements(&[all, group, k]));
    let left = scratch.unwritten::<f32>(elements(&[all, k]));
    let chosen = scratch.unwritten::<u32>(elements(&[all, a.budget]));
    let partial = scratch.unwritten::<f32>(elements(&[all, parts, pieces, queries, d + 2]));
    let scratch = scratch.scratch(dev, OP, memory)?;
    let (scores, left, chosen, partial) =
        (scratch.part(scores), scratch.part(left), scratch.part(chosen), scratch.part(partial));
    let [rank, split, merge] = match (d, queries) {
        (64, 1) => ["attend_scores_64_1", "attend_split_64_1", "attend_merge_64_1"],
        (64, _) => ["attend_scores_64_4", "attend_split_64_4", "attend_merge_64_4"],
        (_, 1) => ["attend_scores_128_1", "attend_split_128_1", "attend_merge_128_1"],
        _ => ["attend_scores_128_4", "attend_split_128_4", "attend_merge_128_4"],
    };
    let inputs = [a.q, a.keys, a.values, a.mean_keys, a.mean_values, a.order, a.offsets].map(read);
    let [q, keys, values, mean_keys, mean_values, order, offsets] = &inputs;
    typed!(a.q.dtype(), T => {
        let (q, keys, values) = (q.view::<T>()?, keys.view::<T>()?, values.view::<T>()?);
        let (mean_keys, mean_values) = (mean_keys.view::<T>()?, mean_values.view::<T>()?);
        let mut out = alloc::<T>(dev, OP, elements(&[b, q_heads, d]))?;
        let scored = elements(&[b, heads, k.div_ceil(ATTEND_ROWS)]);
        launch!(dev, Attend, rank, T::SUFFIX, scored, ATTEND_THREADS; &q, &mean_keys, &of, &scores)?;
        select::select(dev, &choice, all, scores, &order.view()?, &offsets.view()?, chosen, left, Part::NULL)?;
        launch!(dev, Attend, split, T::SUFFIX, elements(&[all, parts, pieces]), ATTEND_THREADS;
            &q, &keys, &values, &mean_values, &of, &scores, &chosen, &left, &(a.estimate as i32), &partial)?;
        launch!(dev, Attend, merge, T::SUFFIX, elements(&[b, q_heads]), ATTEND_MERGERS * d;
            &of, &(pieces as i64), &partial, &mut out)?;
        Ok(Some(tensor(dev, out, (b, q_heads, d))))
    })
}
