//! The choice of first centroids.

use crate::{
    error::{Error, Result},
    host,
    kept::KeptRows,
    kmeans::{Init, OVERSAMPLING, ROUNDS},
    memory::Memory,
    metric::Metric,
    optimal, primitives,
    problem::Problem,
    request::{KmeansppBlock, Trials},
    rng::{Draw, RACED},
    rows::Rows,
    spread::{draws, greedy_draws, spread, trials},
};
use candle_core::{DType, Device, Tensor};
use rand::{seq::index, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Of problems' streams of random numbers there are fewer.
const SAMPLE_STREAM: u64 = u64::MAX;

/// Steps that a draw takes.
const DRAW_STEPS: usize = 20;

/// The first centroids, `(b, k, d)`, of an initialisation that looks at the data. `weights` are f64 `(b, n)`: what is not above 0
/// weighs nothing, and below 0 it is chosen last. The draw is that of the first round. `watch` is told, where seeds are chosen one after
/// another, how many there are, but of the last one.
pub(crate) fn centroids(
    init: &Init,
    x: &Rows,
    k: usize,
    weights: Option<&Tensor>,
    metric: Metric,
    draw: Draw,
    watch: Option<&dyn Fn(usize)>,
) -> Result<Tensor> {
    match init {
        Init::KMeansParallel => parallel(x, k, weights, metric, draw),
        Init::Optimal => optimal::means(x, k, weights),
        _ => primitives::gather(x, &rows(init, x, k, weights, metric, draw, watch)?),
    }
}

/// The same as rows, u32 `(b, k)`, of an initialisation that chooses such.
pub(crate) fn rows(
    init: &Init,
    x: &Rows,
    k: usize,
    weights: Option<&Tensor>,
    metric: Metric,
    draw: Draw,
    watch: Option<&dyn Fn(usize)>,
) -> Result<Tensor> {
    match init {
        Init::KMeansPlusPlus => plus_plus(x, [k, 1], weights, metric, draw, watch),
        Init::Auto | Init::GreedyKMeansPlusPlus => plus_plus(x, [k, trials(k)], weights, metric, draw, watch),
        Init::Random => weighted(x, k, weights, draw),
        Init::KMeansParallel | Init::Even | Init::Optimal | Init::Given(_) => {
            unreachable!("{init:?} chooses no rows by what they hold")
        }
    }
}

/// So many of `n` rows, drawn uniformly and without replacement, in order; all where they are no more.
pub(crate) fn sample_rows(n: usize, count: usize, seed: u64) -> Vec<usize> {
    if count >= n {
        return (0..n).collect();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(SAMPLE_STREAM);
    let mut rows = index::sample(&mut rng, n, count).into_vec();
    rows.sort_unstable();
    rows
}

/// Given centroids as `(b, k, d)`.
pub(crate) fn given(c: &Tensor, p: &Problem) -> Result<Tensor> {
    let c = if c.rank() > 2 { c.reshape((p.b, p.k, p.d))? } else { c.broadcast_as((p.b, p.k, p.d))? };
    Ok(c.contiguous()?)
}

/// The rows to start from, u32 `(b, k)`, if they do not depend on the data: of the first `rows(b)` of problem `b`.
pub(crate) fn draw(
    init: &Init,
    p: &Problem,
    rows: impl Fn(usize) -> usize + Sync,
    weighted: bool,
    seed: u64,
    device: &Device,
) -> Result<Option<Tensor>> {
    let mut chosen = vec![0; p.b * p.k];
    let drawn = |(b, chosen): (usize, &mut [u32])| {
        // One stream a problem, so that a problem draws the same rows inside a batch of any size, whoever has the rest of it.
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream((p.first_problem + b) as u64);
        chosen.iter_mut().zip(index::sample(&mut rng, rows(b), p.k)).for_each(|(c, i)| *c = i as u32);
    };
    match init {
        Init::Even => chosen.iter_mut().enumerate().for_each(|(i, c)| *c = (i % p.k * rows(i / p.k) / p.k) as u32),
        Init::Random if !weighted => {
            let problems = chosen.chunks_mut(p.k).enumerate().collect();
            host::for_each(
                problems,
                DRAW_STEPS * p.k,
                || (),
                |_, problem| {
                    drawn(problem);
                    Ok(())
                },
            )?
        }
        _ => return Ok(None),
    }
    Ok(Some(Tensor::from_vec(chosen, (p.b, p.k), device)?))
}

/// Checks given centroids against the data, and whether an optimum can be found.
pub(crate) fn check(init: &Init, p: &Problem, device: &Device) -> Result<()> {
    if matches!(init, Init::Optimal) && (p.d != 1 || p.metric != Metric::SquaredEuclidean) {
        let with = format!("rows of {} columns by {:?}, not of one by SquaredEuclidean", p.d, p.metric);
        return Err(Error::Conflict { argument: "init", got: "Optimal".into(), with });
    }
    let Init::Given(c) = init else { return Ok(()) };
    p.centroids(c, device)?;
    let k = c.dims()[c.rank() - 2];
    if k != p.k {
        return Err(Error::Size { argument: "init", what: "rows", got: k, expected: p.k });
    }
    Ok(())
}

/// Rows with probability proportional to their weights.
fn weighted(x: &Rows, k: usize, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
    let zeros = Tensor::zeros((x.b, x.n), DType::F64, x.device())?;
    let ones = primitives::elementwise([&zeros], |[zeros]| zeros.affine(0.0, 1.0))?;
    drop(zeros);
    let keys = primitives::exponential_race_keys(&ones, weights, draw, 0)?.to_vec2::<f64>()?;
    let mut chosen = Vec::with_capacity(x.b * k);
    for keys in keys {
        let mut rows: Vec<u32> = (0..x.n as u32).collect();
        rows.select_nth_unstable_by(k - 1, |&i, &j| keys[i as usize].total_cmp(&keys[j as usize]).then(i.cmp(&j)));
        rows[..k].sort_unstable();
        chosen.extend_from_slice(&rows[..k]);
    }
    Ok(Tensor::from_vec(chosen, (x.b, k), x.device())?)
}

/// Picks `count` rows, u32 `(b, count)`, by k-means++ in blocks: rows are drawn several at a time by the distances to the seeds before, and
/// come later, or never, by what each seed takes off their probabilities, so that every row is drawn by the distances to all seeds before it
/// (`cpu/race.rs`). Those of a block all rows meet in one pass. Greedy k-means++ has several `trials`.
fn plus_plus(
    x: &Rows,
    [count, trials]: [usize; 2],
    weights: Option<&Tensor>,
    metric: Metric,
    first: Draw,
    watch: Option<&dyn Fn(usize)>,
) -> Result<Tensor> {
    let device = x.device();
    let rows = host::zeros("k-means++", (x.b, 2, x.n), DType::F64, device)?;
    let taken = Tensor::zeros(x.b, DType::U32, device)?;
    let norms = (metric == Metric::Cosine).then(|| primitives::norms(x)).transpose()?;
    let chosen = Tensor::zeros((x.b, count), DType::U32, device)?;
    let greedy = trials > 1;
    let [rounds, tried] = [Tensor::ones(x.b, DType::U32, device)?, Tensor::full(u32::MAX, (x.b, trials), device)?];
    let (memory, kept) = (Memory::default(), KeptRows::default());
    let captured = primitives::capturing(device)?;
    let draws = if greedy { greedy_draws(x.d, trials) } else { draws(count) };
    let (mut seeds, mut block) = (0, 0);
    while seeds < count {
        // A block takes a seed at least, since nothing is before the first one that it draws, and as many as it has rounds at most.
        let left = count - seeds;
        let blocks = match captured {
            true => left,
            false if watch.is_some() || primitives::reads_are_free(device) => 1,
            false => left.div_ceil(draws / trials),
        };
        for _ in 0..blocks {
            let draw = Draw { round: first.round + block as u64, ..first };
            let (rows, taken, norms, chosen, kept) = (&rows, &taken, norms.as_ref(), &chosen, &kept);
            let trials = greedy.then_some(Trials { rounds: &rounds, tried: &tried });
            let block_of =
                KmeansppBlock { x, rows, taken, norms, weights, chosen, block, draws, trials, metric, draw, kept };
            primitives::kmeanspp_block(&block_of, &memory)?;
            block += 1;
        }
        let before = seeds;
        seeds = match blocks < left {
            true => taken.to_vec1::<u32>()?.into_iter().min().map_or(count, |seeds| seeds as usize),
            false => count,
        };
        if let Some(watch) = watch {
            (before + 1..=seeds.min(count - 1)).for_each(watch);
        }
    }
    Ok(chosen)
}

fn parallel(x: &Rows, k: usize, weights: Option<&Tensor>, metric: Metric, draw: Draw) -> Result<Tensor> {
    let problems = (0..x.b).map(|b| {
        let weights = weights.map(|w| w.narrow(0, b, 1)).transpose()?;
        parallel_one(&x.one(b)?, k, weights.as_ref(), metric, mix_batch(draw.seed, draw.first_problem + b))
    });
    Ok(Tensor::cat(&problems.collect::<Result<Vec<_>>>()?, 0)?)
}

fn mix_batch(seed: u64, b: usize) -> u64 {
    seed ^ (b as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn parallel_one(x: &Rows, k: usize, weights: Option<&Tensor>, metric: Metric, seed: u64) -> Result<Tensor> {
    let by = spread(metric);
    let draw = |round| Draw { seed, round, first_problem: 0 };
    let mut candidates = plus_plus(x, [1, 1], weights, metric, draw(0), None)?;
    let everywhere = |v: f64| Tensor::new(v, x.device())?.broadcast_as((1, x.n));
    let taken = everywhere(-1.0)?;
    // A row that was drawn is at -1 from then on, whatever its distance to itself is rounded to.
    let mut nearest =
        primitives::min_distance_with(x, &everywhere(f64::INFINITY)?.contiguous()?, &candidates.reshape(1)?, metric)?;
    for round in 1..=ROUNDS {
        let total = primitives::total(&match weights {
            Some(w) => (positive(&nearest)? * positive(w)?)?,
            None => positive(&nearest)?,
        })?;
        let total = total.to_vec1::<f64>()?[0];
        if total <= 0.0 {
            break;
        }
        let below = below(k, total);
        let skipped = primitives::exponential_race_keys(&nearest, weights, draw(round), 0)?.ge(below)?;
        let (order, offsets) = primitives::sorted(&skipped.to_dtype(DType::U32)?, 2)?;
        let count = offsets.to_vec2::<u32>()?[0][1] as usize;
        if count == 0 {
            continue;
        }
        let drawn = order.narrow(1, 0, count)?.contiguous()?;
        let rows = Rows::new(&primitives::gather(x, &drawn)?)?;
        let to_drawn = positive(&primitives::distances(x, &rows, &primitives::assign(x, &rows, by)?, by)?)?;
        nearest = skipped.where_cond(&nearest.minimum(&to_drawn)?, &taken)?;
        candidates = Tensor::cat(&[&candidates, &drawn], 1)?;
    }
    let count = candidates.dim(1)?;
    if count <= k {
        // Too few distinct rows were drawn; go on as k-means++ does, never taking a row twice.
        for round in (ROUNDS + 1..).take(k - count) {
            let keys = primitives::exponential_race_keys(&nearest, weights, draw(round), 0)?.flatten_all()?;
            let keys = keys.to_vec1::<f64>()?;
            let first = (0..x.n).min_by(|&i, &j| keys[i].total_cmp(&keys[j])).expect("a problem has rows");
            let first = Tensor::new(&[first as u32], x.device())?;
            nearest = primitives::min_distance_with(x, &nearest, &first, metric)?;
            candidates = Tensor::cat(&[&candidates, &first.unsqueeze(0)?], 1)?;
        }
        return primitives::gather(x, &candidates);
    }
    let rows = Rows::new(&primitives::gather(x, &candidates)?)?;
    let order = primitives::grouped(&primitives::assign(x, &rows, by)?, count)?;
    let share = match weights {
        Some(w) => primitives::cluster_sums(&positive(w)?, Some(&order))?,
        None => primitives::cluster_sizes(&order.offsets)?.to_dtype(DType::F64)?,
    };
    choose(&rows, k, &share, metric, seed)
}

/// The centroids that weighted k-means++ chooses from candidates of k-means||, whose weights are f64 `(1, n)`.
pub(crate) fn choose(candidates: &Rows, k: usize, weights: &Tensor, metric: Metric, seed: u64) -> Result<Tensor> {
    let draw = Draw { seed, round: 0, first_problem: 0 };
    let chosen = plus_plus(candidates, [k, 1], Some(weights), metric, draw, None)?;
    primitives::gather(candidates, &chosen)
}

/// Rows with a key below this are those of a round, given the total of what they are drawn by. A key is below t with probability
/// 1 - exp(-t p), the Poisson form of the paper's min(1, l p / total). Rows that nothing is drawn by have larger keys, however small the
/// total is.
pub(crate) fn below(k: usize, total: f64) -> f64 {
    (OVERSAMPLING * k as f64 / total).min(RACED)
}

/// Numbers above 0, and 0 in the place of others.
pub(crate) fn positive(t: &Tensor) -> candle_core::Result<Tensor> {
    t.gt(0.0)?.where_cond(t, &Tensor::new(0.0, t.device())?.broadcast_as(t.shape())?)
}
