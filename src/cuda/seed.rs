//! The choice of rows as seeds: `kernels/seed.cu`.

use super::{
    device::device,
    kernel::{launch, Nullable, WARP},
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
    const OP: &str = "k-means++";
    let &KmeansppStep { x, nearest, slot, norms, weights, chosen, i, metric, draw } = p;
    let (dev, trials, count) = (device(&x.operand)?, nearest.dim(2)?, chosen.dim(1)?);
    let rows = THREADS.max(x.n / PICK_PARTS).next_multiple_of(THREADS);
    let parts = elements(&[x.b, x.n.div_ceil(rows)]);
    // A warp takes a row where a thread races one.
    let tried_rows = (rows / WARP).max(x.n.div_ceil(PICK_PARTS));
    let tried_parts = elements(&[x.b, x.n.div_ceil(tried_rows)]);
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let (keys, part_most) = (scratch.unwritten::<u64>(elements(&[x.b, x.n])), scratch.unwritten::<f64>(parts));
    let of_parts = elements(&[parts, trials]);
    let (part_keys, part_rows) = (scratch.unwritten::<u64>(of_parts), scratch.unwritten::<u32>(of_parts));
    let of_trials = elements(&[x.b, trials]);
    let (drawn, most) = (scratch.unwritten::<u32>(of_trials), scratch.unwritten::<f64>(x.b));
    let (arrived, potentials) = (zeros.zeroed::<u32>(x.b), zeros.zeroed::<u64>(of_trials));
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights, norms) = (read(&x.operand), weights.map(read), norms.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let norms = norms.as_ref().map(|n| n.view::<f64>()).transpose()?;
    let (nearest, slot, chosen) = (own::<f64>(nearest)?, own::<u32>(slot)?, own::<u32>(chosen)?);
    launch!(dev, Seed, "race_kmeanspp", "", parts, THREADS;
        &nearest, &(trials as i64), &slot, Nullable(&weights), &(x.b as i64), &(x.n as i64), &(i as i64), &draw.seed,
        &draw.round, &(draw.first_problem as i64), &(rows as i64), &scratch.ptr(keys), &scratch.ptr(part_keys),
        &scratch.ptr(part_rows), &scratch.ptr(part_most), &zeros.ptr(arrived), &scratch.ptr(drawn),
        &scratch.ptr(most), &chosen, &(count as i64))?;
    if i + 1 == count && (trials == 1 || i == 0) {
        // A distance to the last seed is nobody's probability.
        return Ok(());
    }
    typed!(x.dtype(), T => launch!(dev, Seed, "try", T::SUFFIX, tried_parts, THREADS;
        &xs.view::<T>()?, &shape(x), &nearest, &(trials as i64), &slot, Nullable(&weights), Nullable(&norms),
        &scratch.ptr(drawn), &scratch.ptr(most), &chosen, &(count as i64), &(i as i64), &(metric as i32),
        &(tried_rows as i64), &zeros.ptr(potentials), &zeros.ptr(arrived)))
}
