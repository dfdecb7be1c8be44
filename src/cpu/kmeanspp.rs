//! Blocks of k-means++: rows drawn by the distances before the block, and which of them are taken.

use super::{
    race::race,
    spread::{kept_rounded, meet, Measure, Met, Scratch},
    tensors::{or, read_and_write, tensor, typed, Element},
};
use crate::{
    error::Result,
    request::KmeansppBlock,
    rng::{exponential, uniform, Draw, RACED},
};

pub(crate) fn kmeanspp_block(p: &KmeansppBlock<'_>) -> Result<()> {
    let &KmeansppBlock { x, nearest, taken, norms, weights, chosen, start, draws, metric, draw, kept } = p;
    let (n, count) = (x.n, chosen.dim(1)?);
    let (mut counts, mut rows) = (taken.to_vec1::<u32>()?, chosen.to_vec2::<u32>()?);
    typed!(x.dtype(), T => {
        let inputs = [&x.operand, or(weights, &x.operand), or(norms, &x.operand)];
        read_and_write(inputs, nearest.into(), |[xs, ws, ns], nearest: &mut [f64]| {
            let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
            let norms = norms.map(|_| ns.flat::<f64>()).transpose()?;
            let near = |b: usize, row: usize| if start { 1.0 } else { nearest[b * n + row] };
            let open: Vec<_> = (0..x.b).filter(|&b| (counts[b] as usize) < count).collect();
            let drawn = race(&open, [n, draws], near, weights, draw)?;
            // Nothing is before the first seed, and all rows have to meet it.
            let passes = if start { 0 } else { count.div_ceil(draws) };
            let rounded = kept_rounded(kept, &xs, norms, metric, passes)?;
            let mut met = Vec::with_capacity(open.len());
            for (&b, drawn) in open.iter().zip(&drawn) {
                let weight = |row: u32| weights.map_or(1.0, |weights| weights[b * n + row as usize]);
                let candidate = |&(arrival, row): &(f64, u32)| {
                    let near = near(b, row as usize);
                    Candidate { row, arrival, near, now: near, p: near * weight(row), arrivals: 0, taken: false }
                };
                let measure = Measure::new(&xs, b, norms, metric);
                let candidates = drawn.lowest.iter().map(candidate).collect();
                let left = count - counts[b] as usize;
                let own = take(candidates, [draws, left], draw, &measure);
                rows[b][counts[b] as usize..][..own.len()].copy_from_slice(&own);
                counts[b] += own.len() as u32;
                // A distance to the last seed is nobody's probability.
                if own.len() < left {
                    let seeds = measure.seeds(own);
                    let filter = rounded.map(|rounded| rounded.filter(b, &seeds.rows)).transpose()?;
                    met.push(Met { measure, seeds, filter, slot: (!start).then_some(0), units: None });
                }
            }
            meet(&met, 1, weights, nearest)
        })?
    })?;
    taken.slice_set(&tensor(counts, x.b)?, 0, 0)?;
    chosen.slice_set(&tensor(rows.concat(), (x.b, count))?, 0, 0)?;
    Ok(())
}

/// A row that a block may draw.
struct Candidate {
    row: u32,
    /// When it is drawn next.
    arrival: f64,
    /// The draws of it so far.
    arrivals: u64,
    /// Its distance to the seeds before the block, and to those that the block has taken as well.
    near: f64,
    now: f64,
    /// Its weight times its distance `near`: the rate at which it is drawn.
    p: f64,
    taken: bool,
}

/// The rows that a block takes, at most `left`, of so many draws from the candidates, which are in the order of their first arrivals.
///
/// Rejection sampling (von Neumann 1951): a row that is drawn with a probability that its distance had before the block is taken with
/// the share of it that is left, and so in the end with the probability that its distance has now. The keys of a race are the first
/// arrivals of Poisson processes, one a row, of a rate that is the row's probability; a row that has arrived arrives again after another
/// exponential time, and the first so many arrivals of all rows are independent draws. Whoever arrives among them is among the rows
/// that arrive first.
fn take<T: Element>(
    mut candidates: Vec<Candidate>,
    [draws, left]: [usize; 2],
    draw: Draw,
    measure: &Measure<'_, T>,
) -> Vec<u32> {
    // Rows of no probability are all that is left, in their order.
    let certain = candidates.first().is_some_and(|first| first.arrival > RACED);
    let (b, mut taken, mut scratch) = (measure.b, vec![], Scratch::new(measure.x.rows.d, 1));
    for _ in 0..draws {
        let waiting = candidates.iter_mut().filter(|candidate| !candidate.taken);
        let next = waiting.min_by(|x, y| x.arrival.total_cmp(&y.arrival).then(x.row.cmp(&y.row)));
        let Some(next) = next.filter(|_| taken.len() < left) else { break };
        let (row, drawn) = (next.row, 2 * next.arrivals);
        let share = || uniform(draw.beside(drawn + 1), b, row as usize);
        if certain || next.now >= next.near || share() * next.near < next.now {
            next.taken = true;
            taken.push(row);
            let seed = measure.seeds(vec![row]);
            for other in candidates.iter_mut().filter(|other| !certain && !other.taken) {
                let found = measure.to_seeds(other.row as usize, other.now, &seed, &[0], &mut scratch)[0];
                other.now = other.now.min(found);
            }
        } else {
            next.arrivals += 1;
            next.arrival = (next.arrival + exponential(draw.beside(drawn + 2), b, row as usize) / next.p).min(RACED);
        }
    }
    taken
}
