//! Blocks of k-means++: rows drawn by the distances before the block, and which of them are seeds.

use super::{
    greedy::{self, Round},
    race::{race, Arrivals},
    spread::{Measure, Scratch},
    spread_pass::{kept_rounded, list, lower, Meeting},
    tensors::{or, read_and_write, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    request::{KmeansppBlock, Trials},
    rng::{race_key, Draw},
    spread::next_rounds,
};

/// Steps of a row's first arrival.
const START_STEPS: usize = 12;

pub(crate) fn kmeanspp_block(p: &KmeansppBlock<'_>) -> Result<()> {
    let &KmeansppBlock { x, rows, taken, norms, weights, chosen, .. } = p;
    let mut seeds = Seeded { taken: taken.to_vec1()?, rows: chosen.to_vec2()? };
    typed!(x.dtype(), T => {
        let inputs = [&x.operand, or(weights, &x.operand), or(norms, &x.operand)];
        read_and_write(inputs, rows.into(), |[xs, ws, ns], rows: &mut [f64]| {
            let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
            let norms = norms.map(|_| ns.flat::<f64>()).transpose()?;
            let given = Given { x: &xs, norms, weights };
            match p.trials.as_ref().filter(|_| p.block > 0) {
                Some(trials) => tried(p, trials, given, rows, &mut seeds),
                None => drawn(p, given, rows, &mut seeds),
            }
        })?
    })?;
    taken.slice_set(&tensor(seeds.taken, x.b)?, 0, 0)?;
    chosen.slice_set(&tensor(seeds.rows.concat(), chosen.dims2()?)?, 0, 0)?;
    Ok(())
}

/// The rows, their norms by cosine, and what they weigh.
#[derive(Clone, Copy)]
struct Given<'a, T: Element> {
    x: &'a View<'a, T>,
    norms: Option<&'a [f64]>,
    weights: Option<&'a [f64]>,
}

/// The seeds of each problem.
struct Seeded {
    taken: Vec<u32>,
    rows: Vec<Vec<u32>>,
}

impl Seeded {
    fn open(&self) -> Vec<usize> {
        (0..self.rows.len()).filter(|&b| self.left(b) > 0).collect()
    }

    fn left(&self, b: usize) -> usize {
        self.rows[b].len() - self.taken[b] as usize
    }

    fn add(&mut self, b: usize, rows: &[u32]) {
        self.rows[b][self.taken[b] as usize..][..rows.len()].copy_from_slice(rows);
        self.taken[b] += rows.len() as u32;
    }
}

/// Each row that arrives is a seed. The rows meet these afterwards.
fn drawn<T: Element>(p: &KmeansppBlock<'_>, given: Given<'_, T>, rows: &mut [f64], seeds: &mut Seeded) -> Result<()> {
    let &KmeansppBlock { x, metric, draw, kept, .. } = p;
    let start = p.block == 0;
    let draws = if start { 1 } else { p.draws };
    let (n, open, count) = (x.n, seeds.open(), p.chosen.dim(1)?);
    if start {
        begin(rows, n, given.weights, draw)?;
    }
    let drawn = race(&open, [n, draws], rows, given.weights)?;
    // Nothing is before the first seed, and all rows have to meet it.
    let rounded = kept_rounded(kept, given.x, given.norms, metric, if start { 0 } else { count.div_ceil(draws) })?;
    let (mut meetings, mut times) = (Vec::with_capacity(open.len()), Vec::with_capacity(open.len()));
    for (&b, drawn) in open.iter().zip(&drawn) {
        let arrivals = Arrivals::new(drawn, draws, &[], b, draw, |row| rows[2 * b * n + row as usize]);
        let (measure, left) = (Measure::new(given.x, b, given.norms, metric), seeds.left(b));
        let (own, at) = take(arrivals, left, &measure);
        seeds.add(b, &own);
        // A distance to the last seed is nobody's probability.
        if own.len() < left {
            meetings.push(Meeting::new(measure, own, rounded)?);
            times.push(at);
        }
    }
    lower(&meetings, &times, given.weights, start, rows)
}

/// The arrivals of rows before there is a seed, each of which is as far as the others from what is not there.
fn begin(rows: &mut [f64], n: usize, weights: Option<&[f64]>, draw: Draw) -> Result<()> {
    let part = host::items_per_task(START_STEPS);
    let mut tasks = host::buffer("k-means++", rows.len().div_ceil(n) * (n.div_ceil(part) + 1))?;
    for (b, rows) in rows.chunks_exact_mut(2 * n).enumerate() {
        let (nearest, arrivals) = rows.split_at_mut(n);
        nearest.fill(1.0);
        tasks.extend(arrivals.chunks_mut(part).enumerate().map(|(i, arrivals)| (b, i * part, arrivals)));
    }
    let begin = |_: &mut (), (b, first, arrivals): (usize, usize, &mut [f64])| {
        for (row, arrival) in (first..).zip(arrivals) {
            *arrival = race_key(draw, b, row, 1.0, weights.map_or(1.0, |weights| weights[b * n + row]));
        }
        Ok(())
    };
    host::for_each(tasks, part * START_STEPS, || (), begin)
}

/// The rows that arrive, at most `left`, and when.
fn take<T: Element>(mut arrivals: Arrivals, left: usize, measure: &Measure<'_, T>) -> (Vec<u32>, Vec<f64>) {
    let (rows, mut taken, mut times) = (arrivals.rows().collect::<Vec<_>>(), vec![], vec![]);
    let mut scratch = Scratch::new(measure.x.rows.d, 1);
    while taken.len() < left {
        let Some(next) = arrivals.next() else { break };
        taken.push(rows[next]);
        times.push(arrivals.now());
        let seed = measure.seeds(vec![rows[next]]);
        for i in arrivals.waiting().into_iter().filter(|_| !arrivals.certain()).collect::<Vec<_>>() {
            let near = arrivals.near(i);
            let found = measure.to_seeds(rows[i] as usize, near, &seed, &[0], &mut scratch)[0];
            arrivals.lower(i, found);
        }
    }
    (taken, times)
}

/// So many of the rows that arrive are tried for each seed. The rows meet all of these first.
fn tried<T: Element>(
    p: &KmeansppBlock<'_>,
    trials: &Trials<'_>,
    given: Given<'_, T>,
    rows: &mut [f64],
    seeds: &mut Seeded,
) -> Result<()> {
    let &KmeansppBlock { x, draws, metric, draw, kept, .. } = p;
    let (mut rounds, mut tried) = (trials.rounds.to_vec1::<u32>()?, trials.tried.to_vec2::<u32>()?);
    let (n, each, open) = (x.n, trials.tried.dim(1)?, seeds.open());
    let wanted = |b: usize| each * rounds[b] as usize;
    let most = open.iter().map(|&b| wanted(b)).max().unwrap_or(0);
    let drawn = race(&open, [n, most], rows, given.weights)?;
    let passes = p.chosen.dim(1)?.div_ceil(draws / each);
    let rounded = kept_rounded(kept, given.x, given.norms, metric, passes)?;
    let (mut arrivals, mut meetings) = (Vec::with_capacity(open.len()), Vec::with_capacity(open.len()));
    for (&b, drawn) in open.iter().zip(&drawn) {
        let before: Vec<_> = tried[b].iter().copied().take_while(|&row| row != u32::MAX).collect();
        let own = Arrivals::new(drawn, wanted(b), &before, b, draw, |row| rows[2 * b * n + row as usize]);
        let measure = Measure::new(given.x, b, given.norms, metric);
        meetings.push(Meeting::new(measure, own.rows().collect(), rounded)?);
        arrivals.push((own, before.len()));
    }
    let nearer = list(&meetings, given.weights, rows)?;
    let mut problems = rows.chunks_mut(2 * n).enumerate();
    for ((&b, (arrivals, before)), (drawn, nearer)) in open.iter().zip(arrivals).zip(drawn.iter().zip(&nearer)) {
        let Some((_, rows)) = problems.find(|(problem, _)| *problem == b) else { continue };
        let weights = given.weights.map(|weights| &weights[b * n..][..n]);
        let round = Round { trials: each, left: seeds.left(b), most: drawn.most, weights, nearer };
        let own = greedy::choose(arrivals, before, &round, rows);
        seeds.add(b, &own.seeds);
        rounds[b] = next_rounds(own.seeds.len(), own.dense, draws / each) as u32;
        tried[b].fill(u32::MAX);
        tried[b][..own.tried.len()].copy_from_slice(&own.tried);
    }
    trials.rounds.slice_set(&tensor(rounds, x.b)?, 0, 0)?;
    trials.tried.slice_set(&tensor(tried.concat(), (x.b, each))?, 0, 0)?;
    Ok(())
}
