//! k-means|| (Bahmani, Moseley, Vattani, Kumar and Vassilvitskii 2012) over rows in blocks: to the bit what [`seeding::centroids`] makes
//! of the same rows in memory. A pass draws a round. Nothing of a row is kept between passes: its distance to the rows that were drawn
//! before is computed again, which for all rounds together is less work than four iterations from them.

use super::{
    accumulate::{Bounds, Total},
    feed::{Feed, Pass},
    merged::Whole,
    seeds::seed_weights,
};
use crate::{
    error::Result,
    fixed::{self, Grid},
    kmeans::ROUNDS,
    memory::Memory,
    metric::Metric,
    operand::Readable,
    primitives,
    request::{Accumulator, Finish, Labels, Reduction, Summands, Update},
    rng::Draw,
    rows::Rows,
    seeding::{self, positive},
    spread::spread,
};
use candle_core::{DType, Tensor};

/// Rows that are looked at at a time, of blocks that may be all that a device has room for: some dozens of bytes are needed for each.
pub(crate) const PIECE: usize = 1 << 20;

/// Takes more off a sum of f64 than rounding has added, for fewer than 2^32 terms above 0.
const BELOW_ROUNDING: f64 = 1.0 - 1e-6;

/// The centroids, `(1, k, d)`, that a run starts from.
pub(super) fn start(whole: Whole<'_>, feed: &mut dyn Feed, run: usize) -> Result<Tensor> {
    let Whole { settings, p, .. } = whole;
    let seed = settings.seed.wrapping_add(run as u64);
    let mut sampler = Sampler { whole, spread: spread(p.metric), seed, run, pass: 0, candidates: vec![] };
    sampler.race(feed, 0)?;
    for round in 1..=ROUNDS {
        if !sampler.draw_round(feed, round)? {
            break;
        }
    }
    let mut round = ROUNDS;
    while sampler.count() < p.k {
        // Too few distinct rows were drawn; each race finds one more.
        round += 1;
        sampler.race(feed, round)?;
    }
    let candidates = sampler.rows()?;
    if sampler.count() == p.k {
        return Ok(candidates);
    }
    let candidates = Rows::new(&candidates)?;
    let shares = sampler.shares(feed, &candidates)?;
    seeding::choose(&candidates, p.k, &shares, p.metric, seed)
}

/// The rows that have been drawn so far, by rounds.
struct Sampler<'a> {
    whole: Whole<'a>,
    /// The metric of the distances that rows are drawn by.
    spread: Metric,
    seed: u64,
    run: usize,
    /// The passes so far.
    pass: usize,
    candidates: Vec<Drawn>,
}

/// The rows of a round.
struct Drawn {
    /// Their numbers among all rows.
    rows: Vec<usize>,
    /// `(1, n, d)`.
    values: Tensor,
}

/// A row that may be drawn.
struct Raced {
    key: f64,
    row: usize,
    values: Vec<f64>,
}

/// Neighbouring rows of a block.
struct Piece<'a> {
    x: Rows<'a>,
    /// The number of the first one among all rows.
    first: usize,
    /// Their weights as seeds, f64 `(1, n)`.
    weights: Tensor,
}

impl Piece<'_> {
    /// The rows at these places of the piece, with their keys.
    fn raced(&self, at: &[u32], keys: &[f64]) -> Result<Vec<Raced>> {
        if at.is_empty() {
            return Ok(vec![]);
        }
        let index = Tensor::new(at, self.x.device())?.unsqueeze(0)?;
        let values = primitives::gather(&self.x, &index)?.squeeze(0)?.to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let raced = |(&at, values)| Raced { key: keys[at as usize], row: self.first + at as usize, values };
        Ok(at.iter().zip(values).map(raced).collect())
    }
}

impl Sampler<'_> {
    /// The candidates so far.
    fn count(&self) -> usize {
        self.candidates.iter().map(|drawn| drawn.rows.len()).sum()
    }

    /// Their rows, `(1, count, d)`.
    fn rows(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&self.candidates.iter().map(|drawn| &drawn.values).collect::<Vec<_>>(), 1)?)
    }

    /// Passes over the rows of this rank.
    fn for_each_piece(
        &mut self,
        feed: &mut dyn Feed,
        visit: &mut dyn FnMut(&Self, Piece<'_>) -> Result<()>,
    ) -> Result<()> {
        self.pass += 1;
        feed.begin_pass(Pass::Start { run: self.run, pass: self.pass });
        let Whole { settings, device, .. } = self.whole;
        feed.for_each_block(&mut |block| {
            (0..block.x.n).step_by(PIECE).try_for_each(|at| {
                let n = PIECE.min(block.x.n - at);
                let rows = block.x.operand.dims().len() - 2;
                let x = Rows::from_operand(&block.x.operand.narrow(rows, at, n)?)?;
                let weights = block.weights.map(|weights| weights.narrow(1, at, n)).transpose()?;
                let weights = seed_weights(&x, weights.as_ref(), settings)?;
                let weights = weights.map_or_else(|| Tensor::ones((1, n), DType::F64, device), Ok)?;
                visit(self, Piece { x, first: block.first + at, weights })
            })
        })
    }

    /// The distance of each row of a piece to the nearest candidate, f64 `(1, n)`: -1 for candidates, and 1 where there are none yet.
    fn nearest(&self, Piece { x, first, .. }: &Piece<'_>) -> Result<Tensor> {
        let device = x.device();
        let everywhere = |v: f64| Tensor::full(v, (1, x.n), device);
        if self.candidates.is_empty() {
            return Ok(everywhere(1.0)?);
        }
        let (mut nearest, mut taken) = (everywhere(f64::INFINITY)?, vec![]);
        for Drawn { rows, values } in &self.candidates {
            let c = Rows::new(values)?;
            let distances = primitives::distances(x, &c, &primitives::assign(x, &c, self.spread)?, self.spread)?;
            nearest = nearest.minimum(&positive(&distances)?)?;
            taken.extend(rows.iter().filter(|row| (*first..first + x.n).contains(row)).map(|row| row - first));
        }
        if taken.is_empty() {
            return Ok(nearest);
        }
        let mut mask = vec![0u8; x.n];
        taken.into_iter().for_each(|row| mask[row] = 1);
        Ok(Tensor::from_vec(mask, (1, x.n), device)?.where_cond(&everywhere(-1.0)?, &nearest)?)
    }

    /// The keys of a piece's rows in the race of a round.
    fn keys(&self, piece: &Piece<'_>, nearest: &Tensor, round: u64) -> Result<Vec<f64>> {
        let draw = Draw { seed: self.seed, round, first_problem: 0 };
        let keys = primitives::exponential_race_keys(nearest, Some(&piece.weights), draw, piece.first)?;
        Ok(keys.flatten_all()?.to_vec1()?)
    }

    /// Adds the rows that all ranks have drawn, in their order.
    fn add(&mut self, feed: &mut dyn Feed, mut drawn: Vec<Raced>) -> Result<()> {
        let Whole { p, device, .. } = self.whole;
        drawn.sort_unstable_by_key(|raced| raced.row);
        let numbers = drawn.into_iter().flat_map(|Raced { row, values, .. }| [vec![row as f64], values].concat());
        let all = feed.ranks().gather(numbers.collect())?.concat();
        let (mut rows, mut values) = (vec![], vec![]);
        for drawn in all.chunks_exact(1 + p.d) {
            rows.push(drawn[0] as usize);
            values.extend_from_slice(&drawn[1..]);
        }
        if !rows.is_empty() {
            let values = Tensor::from_vec(values, (1, rows.len(), p.d), device)?.to_dtype(p.dtype)?;
            self.candidates.push(Drawn { rows, values });
        }
        Ok(())
    }

    /// Adds the row that wins a race: the lowest of those with the smallest key.
    fn race(&mut self, feed: &mut dyn Feed, round: u64) -> Result<()> {
        let mut first: Option<Raced> = None;
        self.for_each_piece(feed, &mut |sampler, piece| {
            let keys = sampler.keys(&piece, &sampler.nearest(&piece)?, round)?;
            let least = (0..keys.len()).min_by(|&i, &j| keys[i].total_cmp(&keys[j])).expect("a piece has rows");
            let earlier =
                |raced: &Raced| (keys[least].total_cmp(&raced.key)).then((piece.first + least).cmp(&raced.row)).is_lt();
            if first.as_ref().is_none_or(earlier) {
                first = piece.raced(&[least as u32], &keys)?.pop();
            }
            Ok(())
        })?;
        let own_key = first.as_ref().map_or(vec![], |raced| vec![raced.key]);
        let keys = feed.ranks().gather(own_key)?;
        // The lowest rank wins among equal keys, since it has the lowest rows.
        let with_rows = (0..keys.len()).filter(|&rank| !keys[rank].is_empty());
        let winner = with_rows.min_by(|&i, &j| keys[i][0].total_cmp(&keys[j][0]));
        let drawn = first.filter(|_| winner == Some(feed.ranks().rank()));
        self.add(feed, drawn.into_iter().collect())
    }

    /// Adds the rows of a round. Whether there may be more.
    fn draw_round(&mut self, feed: &mut dyn Feed, round: u64) -> Result<bool> {
        let (total, mut drawn) = self.draw(feed, round)?;
        if total <= 0.0 {
            return Ok(false);
        }
        let below = seeding::below(self.whole.p.k, total);
        drawn.retain(|raced| raced.key < below);
        self.add(feed, drawn)?;
        Ok(true)
    }

    /// The sum of what rows are drawn by, and this rank's rows whose key is `below` that. While the sum is not known they are those below
    /// what the part so far gives, which is no less: all that will be, and after each piece about as many as a round has.
    fn draw(&mut self, feed: &mut dyn Feed, round: u64) -> Result<(f64, Vec<Raced>)> {
        let (Whole { p, device, .. }, memory) = (self.whole, &Memory::default());
        let most = Tensor::full(f64::MAX, 1, device)?;
        let total = Total::new(most, p.n, Grid::of_f64(f64::MAX, p.n).planes)?;
        let (mut so_far, mut drawn) = (0.0, vec![]);
        self.for_each_piece(feed, &mut |sampler, piece| {
            let nearest = sampler.nearest(&piece)?;
            let odds = (positive(&nearest)? * positive(&piece.weights)?)?;
            total.add(&odds, None, memory)?;
            so_far += primitives::total(&odds)?.to_vec1::<f64>()?[0];
            let below = seeding::below(p.k, so_far * BELOW_ROUNDING);
            let keys = sampler.keys(&piece, &nearest, round)?;
            let at: Vec<_> = (0..keys.len()).filter(|&i| keys[i] < below).map(|i| i as u32).collect();
            drawn.retain(|raced: &Raced| raced.key < below);
            drawn.extend(piece.raced(&at, &keys)?);
            Ok(())
        })?;
        let parts = feed.ranks().gather(vec![so_far])?.concat();
        let total = total.finish(feed, memory)?.to_vec1::<f64>()?[0];
        Ok((if parts.contains(&f64::INFINITY) { f64::INFINITY } else { total }, drawn))
    }

    /// The weight of the rows that are nearest to each candidate, f64 `(1, count)`.
    fn shares(&mut self, feed: &mut dyn Feed, candidates: &Rows) -> Result<Tensor> {
        let Whole { p, device, weights, .. } = self.whole;
        let (max_weight, min_weight) = match weights {
            Some(weights) => {
                let least = primitives::min_magnitude(&Rows::new(&weights.values.unsqueeze(2)?)?)?;
                (weights.max_weight.to_vec1::<f64>()?[0], least.to_vec1::<f64>()?[0])
            }
            None => (1.0, 1.0),
        };
        // The last bit of the smallest weight.
        let lowest = if min_weight < f64::INFINITY { (fixed::exponent(min_weight) - 1 - 52).max(-1074) } else { 0 };
        let planes = Grid::down_to(lowest, max_weight, p.n).planes;
        let (k, memory) = (candidates.n, &Memory::default());
        let bounds = Bounds { max_abs: Tensor::full(max_weight, 1, device)?, max_weight: None, rows: p.n };
        let sums = Accumulator::new([k, 1], bounds, planes, device)?;
        self.for_each_piece(feed, &mut |sampler, piece| {
            let order = primitives::grouped(&primitives::assign(&piece.x, candidates, sampler.spread)?, k)?;
            let weights = Rows::new(&positive(&piece.weights)?.unsqueeze(2)?)?;
            let summands = Summands::from_rows(&weights)?;
            let update = Update::new(&weights, &summands, Some(Labels::Sorted(&order)), Reduction::Sum, k)?;
            primitives::accumulate(&update, &sums, memory)
        })?;
        feed.ranks().reduce(&sums.sums)?;
        let shares = Tensor::zeros((1, k, 1), DType::F64, device)?;
        primitives::finish(&Finish { sums: &sums, reduction: Reduction::Sum, turn: None }, (&shares).into(), memory)?;
        Ok(shares.squeeze(2)?)
    }
}
