//! The choice of rows as seeds: `kernels/seed.cu`.

use super::{
    device::device,
    kernel::{launch, Nullable},
    memory::{alloc, elements, ArenaLayout, Memory, Slot},
    params::shape,
    tensors::{own, read, tensor, typed, DevicePtr, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    request::{GreedyStep, KmeansppBlock},
    rng::Draw,
    rows::Rows,
    spread,
    tiles::{PICK_PARTS, SEED_ROWS, SEED_THREADS, THREADS},
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

/// How the rows of a problem are cut for blocks of threads: of one that races them, and of one whose warps let them meet seeds.
fn parts(x: &Rows) -> [usize; 2] {
    let each = x.n.div_ceil(PICK_PARTS);
    [each.next_multiple_of(THREADS), each.next_multiple_of(SEED_ROWS)]
}

/// The scratch of a race.
struct Race {
    keys: Slot<u64>,
    part_keys: Slot<u64>,
    part_rows: Slot<u32>,
    part_most: Slot<f64>,
    drawn: Slot<u32>,
    most: Slot<f64>,
    arrived: Slot<u32>,
}

impl Race {
    fn new([b, parts, n, count]: [usize; 4], scratch: &mut ArenaLayout, zeros: &mut ArenaLayout) -> Self {
        let (of_parts, of_rows) = (elements(&[b, parts, count]), elements(&[b, n]));
        Self {
            keys: scratch.unwritten(of_rows),
            part_keys: scratch.unwritten(of_parts),
            part_rows: scratch.unwritten(of_parts),
            part_most: scratch.unwritten(elements(&[b, parts])),
            drawn: scratch.unwritten(elements(&[b, count])),
            most: scratch.unwritten(b),
            arrived: zeros.zeroed(b),
        }
    }
}

pub(crate) fn kmeanspp_block(p: &KmeansppBlock<'_>, memory: &Memory) -> Result<()> {
    const OP: &str = "k-means++";
    let &KmeansppBlock { x, nearest, taken, norms, weights, chosen, start, draws, metric, draw, .. } = p;
    let (dev, wanted) = (device(&x.operand)?, chosen.dim(1)?);
    let [rows, met_rows] = parts(x);
    let (parts, met_parts) = (x.n.div_ceil(rows), elements(&[x.b, x.n.div_ceil(met_rows)]));
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    // Room for the draws of later blocks at the first one too, so that these find their scratch.
    let race = Race::new([x.b, parts, x.n, spread::draws(wanted)], &mut scratch, &mut zeros);
    let apart = scratch.unwritten::<f64>(elements(&[x.b, spread::draws(wanted), draws]));
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights, norms) = (read(&x.operand), weights.map(read), norms.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let norms = norms.as_ref().map(|n| n.view::<f64>()).transpose()?;
    let (nearest, taken, chosen) = (own::<f64>(nearest)?, own::<u32>(taken)?, own::<u32>(chosen)?);
    let (first_problem, start) = (draw.first_problem as i64, i32::from(start));
    launch!(dev, Seed, "race_kmeanspp", "", elements(&[x.b, parts]), THREADS;
        &nearest, &1i64, &DevicePtr::<u32>::NULL, Nullable(&weights), &(x.b as i64), &(x.n as i64), &start,
        &(draws as i64), &draw.seed, &draw.round, &first_problem, &(rows as i64), &scratch.ptr(race.keys),
        &scratch.ptr(race.part_keys), &scratch.ptr(race.part_rows), &scratch.ptr(race.part_most),
        &zeros.ptr(race.arrived), &scratch.ptr(race.drawn), &scratch.ptr(race.most), &taken, &(wanted as i64))?;
    typed!(x.dtype(), T => {
        launch!(dev, Seed, "take", T::SUFFIX, x.b, THREADS;
            &xs.view::<T>()?, &shape(x), &nearest, Nullable(&weights), Nullable(&norms), &start, &(metric as i32),
            &draw.seed, &draw.round, &first_problem, &scratch.ptr(race.drawn), &(draws as i64), &scratch.ptr(apart),
            &chosen, &(wanted as i64), &taken)?;
        if wanted == 1 {
            // A distance to the last seed is nobody's probability.
            return Ok(());
        }
        launch!(dev, Seed, "lower", T::SUFFIX, met_parts, SEED_THREADS;
            &xs.view::<T>()?, &shape(x), &nearest, Nullable(&weights), Nullable(&norms), &scratch.ptr(race.drawn),
            &(draws as i64), &start, &(metric as i32), &(met_rows as i64), &taken, &(wanted as i64))
    })
}

pub(crate) fn greedy_step(p: &GreedyStep<'_>, memory: &Memory) -> Result<()> {
    const OP: &str = "greedy k-means++";
    let &GreedyStep { x, nearest, slot, norms, weights, chosen, i, metric, draw, .. } = p;
    let (dev, trials, count) = (device(&x.operand)?, nearest.dim(2)?, chosen.dim(1)?);
    let tried = if i == 0 { 1 } else { trials };
    let [rows, met_rows] = parts(x);
    let (parts, met_parts) = (x.n.div_ceil(rows), elements(&[x.b, x.n.div_ceil(met_rows)]));
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    // Room for all trials at the first step too, so that the next one finds its scratch.
    let race = Race::new([x.b, parts, x.n, trials], &mut scratch, &mut zeros);
    let potentials = zeros.zeroed::<u64>(elements(&[x.b, trials]));
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights, norms) = (read(&x.operand), weights.map(read), norms.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let norms = norms.as_ref().map(|n| n.view::<f64>()).transpose()?;
    let (nearest, slot, chosen) = (own::<f64>(nearest)?, own::<u32>(slot)?, own::<u32>(chosen)?);
    launch!(dev, Seed, "race_kmeanspp", "", elements(&[x.b, parts]), THREADS;
        &nearest, &(trials as i64), &slot, Nullable(&weights), &(x.b as i64), &(x.n as i64), &i32::from(i == 0),
        &(tried as i64), &draw.seed, &draw.round, &(draw.first_problem as i64), &(rows as i64),
        &scratch.ptr(race.keys), &scratch.ptr(race.part_keys), &scratch.ptr(race.part_rows),
        &scratch.ptr(race.part_most), &zeros.ptr(race.arrived), &scratch.ptr(race.drawn), &scratch.ptr(race.most),
        &DevicePtr::<u32>::NULL, &0i64)?;
    typed!(x.dtype(), T => launch!(dev, Seed, "try", T::SUFFIX, met_parts, SEED_THREADS;
        &xs.view::<T>()?, &shape(x), &nearest, &(trials as i64), &slot, Nullable(&weights), Nullable(&norms),
        &scratch.ptr(race.drawn), &scratch.ptr(race.most), &chosen, &(count as i64), &(i as i64), &(metric as i32),
        &(met_rows as i64), &zeros.ptr(potentials), &zeros.ptr(race.arrived)))
}
