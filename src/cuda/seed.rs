//! The choice of rows as seeds: `kernels/seed.cu`.

use super::{
    device::device,
    kernel::{launch, Nullable},
    memory::{alloc, elements, ArenaLayout, Memory, Slot},
    params::shape,
    seed_filter,
    tensors::{own, read, tensor, typed, DevicePtr, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    request::KmeansppBlock,
    rng::Draw,
    rows::Rows,
    tiles::{
        CHOICE_THREADS, DENSE_LISTS, LIST_ROWS, PICK_PARTS, RACE_ROWS, SEED_FILTER_THREADS, SEED_ROWS, SEED_THREADS,
        THREADS,
    },
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

/// The rows of a block of threads whose warps let them meet seeds, of which each has so many at least.
fn met_rows(x: &Rows, least: usize) -> usize {
    x.n.div_ceil(PICK_PARTS).next_multiple_of(least)
}

/// The scratch of a race.
struct Race {
    part_keys: Slot<u64>,
    part_rows: Slot<u32>,
    part_most: Slot<f64>,
    drawn: Slot<u32>,
    times: Slot<f64>,
    most: Slot<f64>,
    arrived: Slot<u32>,
}

impl Race {
    fn new([b, parts, count]: [usize; 3], scratch: &mut ArenaLayout, zeros: &mut ArenaLayout) -> Self {
        let of_parts = elements(&[b, parts, count]);
        Self {
            part_keys: scratch.unwritten(of_parts),
            part_rows: scratch.unwritten(of_parts),
            part_most: scratch.unwritten(elements(&[b, parts])),
            drawn: scratch.unwritten(elements(&[b, count])),
            times: scratch.unwritten(elements(&[b, count])),
            most: scratch.unwritten(b),
            arrived: zeros.zeroed(b),
        }
    }
}

/// What greedy k-means++ lists (`Nearer` of `kernels/candidates.cuh`).
struct Nearer {
    room: usize,
    rows: Slot<u32>,
    masks: Slot<u64>,
    distances: Slot<f64>,
    counts: Slot<u32>,
    gains: Slot<u64>,
}

impl Nearer {
    fn new([b, n, room]: [usize; 3], scratch: &mut ArenaLayout, zeros: &mut ArenaLayout) -> Self {
        let (entries, lists) = (elements(&[b, room, n]), elements(&[b, room]));
        let (rows, distances) = (scratch.unwritten(entries), scratch.unwritten(entries));
        let masks = scratch.unwritten(elements(&[b, n]));
        Self { room, rows, masks, distances, counts: zeros.zeroed(lists), gains: zeros.zeroed(lists) }
    }
}

pub(crate) fn kmeanspp_block(p: &KmeansppBlock<'_>, memory: &Memory) -> Result<()> {
    const OP: &str = "k-means++";
    let &KmeansppBlock { x, rows, taken, norms, weights, chosen, ref trials, metric, draw, .. } = p;
    let start = p.block == 0;
    let draws = if start { 1 } else { p.draws };
    let (dev, wanted) = (device(&x.operand)?, chosen.dim(1)?);
    let met = met_rows(x, if trials.is_some() && !start { LIST_ROWS } else { SEED_ROWS });
    let parts = x.n.div_ceil(RACE_ROWS);
    let blocks = |met: usize| elements(&[x.b, x.n.div_ceil(met)]);
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    // Room for the draws of later blocks at the first one too, so that these find their scratch.
    let race = Race::new([x.b, parts, p.draws], &mut scratch, &mut zeros);
    let nearer = match trials {
        Some(trials) => Some(Nearer::new([x.b, x.n, p.draws + trials.tried.dim(1)? - 1], &mut scratch, &mut zeros)),
        None => None,
    };
    let apart = scratch.unwritten::<f64>(if start || trials.is_none() { elements(&[x.b, draws, draws]) } else { 0 });
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (xs, weights, norms) = (read(&x.operand), weights.map(read), norms.map(read));
    let weights = weights.as_ref().map(|w| w.view::<f64>()).transpose()?;
    let norms = norms.as_ref().map(|n| n.view::<f64>()).transpose()?;
    let (state, taken, chosen) = (own::<f64>(rows)?, own::<u32>(taken)?, own::<u32>(chosen)?);
    let (first_problem, b, n) = (draw.first_problem as i64, x.b as i64, x.n as i64);
    let (drawn, times, most) = (scratch.ptr(race.drawn), scratch.ptr(race.times), scratch.ptr(race.most));
    if start {
        launch!(dev, Seed, "begin_kmeanspp", "", elements(&[x.b, x.n]).div_ceil(THREADS), THREADS;
            Nullable(&weights), &b, &n, &draw.seed, &draw.round, &first_problem, &state)?;
    }
    let each = trials.as_ref().map_or(Ok(1), |trials| trials.tried.dim(1))?;
    let rounds = match trials.as_ref().filter(|_| !start) {
        Some(trials) => own::<u32>(trials.rounds)?,
        None => DevicePtr::NULL,
    };
    launch!(dev, Seed, "race_kmeanspp", "", elements(&[x.b, parts]), THREADS;
        &state, Nullable(&weights), &b, &n, &(draws as i64), &rounds, &(each as i64), &scratch.ptr(race.part_keys),
        &scratch.ptr(race.part_rows), &scratch.ptr(race.part_most), &zeros.ptr(race.arrived), &drawn, &times, &most,
        &taken, &(wanted as i64))?;
    // Nothing is before the first seed, and all rows have to meet it. While there are few seeds, many rows have to meet those that are tried.
    let few = start || trials.is_some() && p.block <= DENSE_LISTS;
    let (candidates, passes) = (draws + each - 1, if few { 0 } else { wanted.div_ceil(p.draws / each) });
    let rounded = seed_filter::kept(p, candidates, passes)?;
    let (Some(trials), Some(nearer)) = (trials.as_ref().filter(|_| !start), nearer) else {
        typed!(x.dtype(), T => launch!(dev, Seed, "take", T::SUFFIX, x.b, THREADS;
            &xs.view::<T>()?, &shape(x), &state, Nullable(&weights), Nullable(&norms), &(metric as i32), &drawn, &times,
            &(draws as i64), &scratch.ptr(apart), &chosen, &(wanted as i64), &taken))?;
        if wanted == 1 {
            // A distance to the last seed is nobody's probability.
            return Ok(());
        }
        return match rounded {
            Some((rounded, pass)) => typed!(x.dtype(), T => launch!(dev, SeedFilter, "lower_rounded", T::SUFFIX,
                blocks(pass.rows), SEED_FILTER_THREADS, pass.shared;
                &xs.view::<T>()?, &shape(x), &rounded.values, &rounded.bounds, &(rounded.width as i64), &state,
                Nullable(&weights), Nullable(&norms), &drawn, &times, &(draws as i64), &(metric as i32),
                &(pass.rows as i64), &taken, &(wanted as i64))),
            None => typed!(x.dtype(), T => launch!(dev, Seed, "lower", T::SUFFIX, blocks(met), SEED_THREADS;
                &xs.view::<T>()?, &shape(x), &state, Nullable(&weights), Nullable(&norms), &drawn, &times,
                &(draws as i64), &i32::from(start), &(metric as i32), &(met as i64), &taken, &(wanted as i64))),
        };
    };
    let tried = own::<u32>(trials.tried)?;
    let (rows, masks, distances) = (scratch.ptr(nearer.rows), scratch.ptr(nearer.masks), scratch.ptr(nearer.distances));
    let (counts, gains, room) = (zeros.ptr(nearer.counts), zeros.ptr(nearer.gains), nearer.room as i64);
    match rounded {
        Some((rounded, pass)) => typed!(x.dtype(), T => launch!(dev, SeedFilter, "list_rounded", T::SUFFIX,
            blocks(pass.rows), SEED_FILTER_THREADS, pass.shared;
            &xs.view::<T>()?, &shape(x), &rounded.values, &rounded.bounds, &(rounded.width as i64), &state,
            Nullable(&weights), Nullable(&norms), &tried, &(each as i64), &rounds, &drawn, &(draws as i64),
            &most, &(metric as i32), &(pass.rows as i64), &counts, &rows, &gains, &masks, &distances, &room, &taken,
            &(wanted as i64)))?,
        None => typed!(x.dtype(), T => launch!(dev, Greedy, "list", T::SUFFIX, blocks(met), SEED_THREADS;
            &xs.view::<T>()?, &shape(x), &state, Nullable(&weights), Nullable(&norms), &tried, &(each as i64), &rounds,
            &drawn, &(draws as i64), &most, &(metric as i32), &(met as i64), &counts, &rows, &gains, &masks, &distances,
            &room, &taken, &(wanted as i64)))?,
    }
    launch!(dev, Greedy, "choose", "", x.b, CHOICE_THREADS;
        &state, Nullable(&weights), &b, &n, &tried, &(each as i64), &rounds, &((draws / each) as i64), &drawn, &times,
        &(draws as i64), &most, &draw.seed, &draw.round, &first_problem, &counts, &rows, &gains, &masks,
        &distances, &room, &chosen, &(wanted as i64), &taken)
}
