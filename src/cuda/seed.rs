//! The choice of rows as seeds: `kernels/seed.cu`.

use super::{
    device::device,
    kernel::{launch, Nullable},
    memory::{alloc, elements, ArenaLayout, Memory},
    params::shape,
    tensors::{own, read, tensor, typed, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    request::KmeansppStep,
    rng::Draw,
    rows::Rows,
    tiles::{PICK_PARTS, THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, Tensor};

pub(crate) fn usable_seeds(x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let (b, k) = chosen.dims2()?;
        let mut out = alloc::<u32>(dev, "usable_seeds", elements(&[b, k]))?;
        let (xs, weights, chosen) = (read(&x.operand), weights.map(read), read(chosen));
        let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
        launch!(dev, Seed, "usable_seeds", T::SUFFIX, b, THREADS;
            &xs.view::<T>()?, &shape(x), Nullable(&weights), &chosen.view::<u32>()?, &(k as i64), &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (b, k)))
    })
}

pub(crate) fn min_distance_with(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let rows = elements(&[x.b, x.n]);
        let mut out = alloc::<f64>(dev, "nearer", rows)?;
        let (xs, nearest, newest) = (read(&x.operand), read(nearest), read(newest));
        launch!(dev, Seed, "nearer", T::SUFFIX, rows.div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), &nearest.view::<f64>()?, &newest.view::<u32>()?, &(metric as i32),
            &mut out)?;
        Ok(tensor(dev, out, (x.b, x.n)))
    })
}

pub(crate) fn exponential_race_keys(
    nearest: &Tensor,
    weights: Option<&Tensor>,
    draw: Draw,
    first: usize,
) -> Result<Tensor> {
    let dev = device(nearest)?;
    let (b, n) = nearest.dims2()?;
    let mut out = alloc::<f64>(dev, "race", elements(&[b, n]))?;
    let (nearest, weights) = (read(nearest), weights.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    launch!(dev, Seed, "race_keys", "", elements(&[b, n]).div_ceil(THREADS), THREADS;
        &nearest.view::<f64>()?, Nullable(&weights), &(b as i64), &(n as i64), &(first as i64), &draw.seed,
        &draw.round, &(draw.first_problem as i64), &mut out)?;
    Ok(tensor(dev, out, (b, n)))
}

pub(crate) fn kmeanspp_step(p: &KmeansppStep<'_>, memory: &Memory) -> Result<()> {
    const OP: &str = "pick";
    let &KmeansppStep { x, nearest, weights, chosen, i, start, metric, draw } = p;
    let dev = device(&x.operand)?;
    let rows = THREADS.max(x.n / PICK_PARTS).next_multiple_of(THREADS);
    let parts = elements(&[x.b, x.n.div_ceil(rows)]);
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let (keys, winners) = (scratch.unwritten::<u64>(parts), scratch.unwritten::<u32>(parts));
    let arrived = zeros.zeroed::<u32>(x.b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights) = (read(&x.operand), weights.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let (nearest, chosen_at, count) = (own::<f64>(nearest)?, own::<u32>(chosen)?, chosen.dim(1)? as i64);
    typed!(x.dtype(), T => launch!(dev, Seed, "pick", T::SUFFIX, parts, THREADS;
        &xs.view::<T>()?, &shape(x), &nearest, Nullable(&weights), &chosen_at, &count, &(i as i64), &(start as i32),
        &(metric as i32), &draw.seed, &draw.round, &(draw.first_problem as i64), &(rows as i64), &scratch.ptr(keys), &scratch.ptr(winners),
        &zeros.ptr(arrived)))
}
