//! The clusters of a cache, and which of them a token's queries read.

use super::{
    lanes::Lane,
    softmax::{fold, larger},
    tile::{Scores, TileRows, TILE},
};
use crate::{error::Result, host, request::Clustered};
use std::ops::Range;

pub(super) struct Clusters<'a, E> {
    pub(super) keys: TileRows<'a, E>,
    pub(super) values: TileRows<'a, E>,
    pub(super) spreads: &'a [E],
    pub(super) order: &'a [u32],
    pub(super) offsets: &'a [u32],
    /// The number of choices that a group's heads make: one together, or one each.
    pub(super) units: usize,
    pub(super) of: Clustered<'a>,
    pub(super) logs: Vec<E>,
}

impl<E: Lane> Clusters<'_, E> {
    pub(super) fn tiles(&self) -> usize {
        self.keys.n.div_ceil(TILE)
    }

    fn problems(&self) -> usize {
        self.spreads.len() / self.keys.n
    }

    pub(super) fn clustered(&self) -> usize {
        self.order.len() / self.problems()
    }

    /// The places of a cluster's tokens in the order.
    pub(super) fn members(&self, p: usize, j: usize) -> Range<usize> {
        let offsets = &self.offsets[p * (self.keys.n + 1) + j..];
        offsets[0] as usize..offsets[1] as usize
    }

    /// The numbers of tokens that a unit leaves of each cluster, and the tokens that it reads.
    pub(super) fn list<'l>(&self, lists: &'l [u32], p: usize, unit: usize) -> (&'l [u32], &'l [u32]) {
        let len = self.keys.n + self.of.budget;
        lists[(p * self.units + unit) * len..][..len].split_at(self.keys.n)
    }

    /// The lists of all units, which [`list`](Self::list) takes apart, for scaled and padded `queries` and the `scores` of all clusters.
    pub(super) fn choose(&self, queries: &[E], scores: &[Scores<E>], group: usize) -> Result<Vec<u32>> {
        let (problems, k, tiles) = (self.problems(), self.keys.n, self.tiles());
        let mut lists = host::filled("attend", problems * self.units * (k + self.of.budget), 0u32)?;
        let units = lists.chunks_mut(k + self.of.budget).enumerate().collect();
        let choose = |ranks: &mut Ranks<E>, (i, list): (usize, &mut [u32])| {
            let (p, unit) = (i / self.units, i % self.units);
            let (left, read) = list.split_at_mut(k);
            let offsets = &self.offsets[p * (k + 1)..][..k + 1];
            left.iter_mut().zip(offsets.windows(2)).for_each(|(left, ends)| *left = ends[1] - ends[0]);
            if read.is_empty() {
                return Ok(());
            }
            let scores = scores[p * tiles * group..][..tiles * group].chunks(group).enumerate();
            let query_len = queries.len() / problems / group;
            let of_head = |head: usize| {
                let query = &queries[(p * group + head) * query_len..][..query_len];
                let bounds = bounds(query, self.of.reach, &self.spreads[p * k..][..k]);
                scores.clone().map(move |(i, tile)| bounds(i, tile[head]))
            };
            ranks.of.clear();
            match self.of.shared {
                true => (0..group).for_each(|head| ranks.add_softmax(of_head(head))),
                false => ranks.of.extend(of_head(unit)),
            }
            let order = &self.order[p * self.clustered()..][..self.clustered()];
            let mut room = read;
            for &key in ranks.best(left, room.len()) {
                let j = key as u32 as usize;
                let members = &order[self.members(p, j)];
                let taken = members.len().min(room.len());
                let (now, later) = room.split_at_mut(taken);
                now.copy_from_slice(&members[..taken]);
                (room, left[j]) = (later, left[j] - taken as u32);
            }
            Ok(())
        };
        host::for_each(units, 2 * k * group / self.units, Ranks::default, choose)?;
        Ok(lists)
    }
}

/// Adds to the scores of a tile what clusters that are spread out may hold beyond their means, for a scaled and padded query. Nothing where
/// that is beyond the type.
pub(super) fn bounds<'s, E: Lane>(
    query: &[E],
    reach: f64,
    spreads: &'s [E],
) -> impl Fn(usize, Scores<E>) -> Scores<E> + Clone + use<'s, E> {
    let norm = query.iter().map(|v| v.widen() * v.widen()).sum::<f64>().sqrt();
    let reach = E::of(norm * reach);
    move |tile, mut scores| {
        for (score, &spread) in scores.iter_mut().zip(&spreads[tile * TILE..]) {
            let beyond = reach.mul(spread);
            *score = if beyond < E::INFINITY { score.add(beyond) } else { *score };
        }
        scores
    }
}

/// The logarithms of numbers of tokens that clusters mostly have.
pub(super) fn logs<E: Lane>() -> Vec<E> {
    (0..256).map(log).collect()
}

/// Makes of the scores of clusters' means, a tile, those of the tokens that are `left` of each, all at the mean; minus infinity of none.
#[inline(always)]
pub(super) fn add_logs<E: Lane>(scores: &mut Scores<E>, left: &[u32], logs: &[E]) {
    for (score, &left) in scores.iter_mut().zip(left) {
        let log = logs.get(left as usize).copied().unwrap_or_else(|| log(left));
        *score = if log > E::of(f64::NEG_INFINITY) { score.add(log) } else { log };
    }
}

fn log<E: Lane>(tokens: u32) -> E {
    E::of(f64::from(tokens).ln())
}

/// A task uses this from unit to unit.
pub(super) struct Ranks<E> {
    /// By tiles.
    pub(super) of: Vec<Scores<E>>,
    /// Of one head.
    weights: Vec<Scores<E>>,
    /// The largest of each tile, and some order of them.
    largest: Vec<E>,
    sorted: Vec<E>,
    keys: Vec<u128>,
}

impl<E> Default for Ranks<E> {
    fn default() -> Self {
        Self { of: vec![], weights: vec![], largest: vec![], sorted: vec![], keys: vec![] }
    }
}

impl<E: Lane> Ranks<E> {
    /// Adds the softmax of a head's `scores`, by tiles.
    pub(super) fn add_softmax(&mut self, scores: impl Iterator<Item = Scores<E>> + Clone) {
        let zero = E::of(0.0);
        self.weights.clear();
        self.weights.extend(scores);
        self.of.resize(self.weights.len(), [zero; TILE]);
        let max = self.weights.iter().fold(E::of(f64::NEG_INFINITY), |max, &tile| larger(fold(tile, larger), max));
        let weigh = |score: &mut E| *score = score.sub(max).exp();
        self.weights.iter_mut().for_each(|tile| tile.iter_mut().for_each(weigh));
        let total = self.weights.iter().fold(zero, |sum, &tile| sum.add(fold(tile, E::add)));
        let share = E::of(1.0 / total.widen());
        for (rank, weight) in self.of.iter_mut().flatten().zip(self.weights.iter().flatten()) {
            *rank = rank.add(weight.mul(share));
        }
    }

    /// The best clusters in order, so many of those that have tokens, `sizes`, that they have `budget`; an index in the last bits of each.
    pub(super) fn best(&mut self, sizes: &[u32], budget: usize) -> &[u128] {
        let least = E::of(f64::NEG_INFINITY);
        // NaN is one of minus infinity.
        self.of.iter_mut().flatten().for_each(|rank| *rank = larger(*rank, least));
        self.largest.clear();
        self.largest.extend(self.of.iter().map(|&tile| fold(tile, larger)));
        let total = sizes.iter().map(|&size| size as usize).sum::<usize>();
        let tokens = |keys: &[u128]| keys.iter().map(|&key| sizes[key as u32 as usize] as usize).sum::<usize>();
        // Twice what clusters of average size take.
        let mut count = 2 * budget * sizes.len() / total + 1;
        loop {
            // As many tiles have a rank that is not below this: so have, at least, the best clusters of that number.
            let bar = if count < self.largest.len() {
                self.sorted.clone_from(&self.largest);
                let descending = |a: &E, b: &E| b.partial_cmp(a).expect("no rank is NaN");
                *self.sorted.select_nth_unstable_by(count, descending).1
            } else {
                least
            };
            self.keys.clear();
            for (i, tile) in self.of.iter().enumerate().filter(|&(i, _)| self.largest[i] >= bar) {
                let tile = tile.iter().zip(&sizes[i * TILE..]).enumerate();
                let good = tile.filter(|(_, (&rank, &size))| rank >= bar && size > 0);
                self.keys.extend(good.map(|(t, (rank, _))| key(rank.widen(), i * TILE + t)));
            }
            if bar == least || tokens(&self.keys) >= budget {
                break;
            }
            count *= 2;
        }
        // Clusters may be smaller than that: of all of them few are sorted, too.
        while count < self.keys.len() {
            self.keys.select_nth_unstable(count);
            if tokens(&self.keys[..count]) >= budget {
                break;
            }
            count *= 2;
        }
        self.keys.truncate(count);
        self.keys.sort_unstable();
        &self.keys
    }
}

/// A number that is the less the higher the rank, and the index, by which equal ones go. Both zeros are one.
fn key(rank: f64, index: usize) -> u128 {
    let bits = (rank + 0.0).to_bits();
    let ascending = if bits >> 63 == 1 { !bits } else { bits | 1 << 63 };
    u128::from(!ascending) << 32 | index as u128
}
