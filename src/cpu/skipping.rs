//! Exact labels of a tile of rows, each against those groups of centroids alone that may have its nearest one.
//!
//! The rows that need a group are listed, and scored together against its centroids (and no others), as many at a time as the matrix unit
//! takes. The row's own centroid counts by its distance, so that its group is needed no more than others. What scores leave open goes the
//! usual way.

use super::{
    amx::Tiles,
    bounds::{distance_below, down, score_above, UNSCORED},
    candidates::NONE,
    filter::{Bound, Centroids},
    label::label_of,
    lines::{PairRows, PAIR, ROWS_STEP, TILE},
    listing::{Listed, RowBounds, SkipScratch, SkipTile},
    matmul::multiply,
    rounded::RoundedBlock,
    scalar::lowest,
    tensors::Element,
};
use crate::{error::Result, kept::Line};
use pulp::NullaryFnOnce;
use std::ops::Range;

/// What was done for a tile.
#[derive(Clone, Copy, Default)]
pub(super) struct Work {
    /// Centroids that were compared by the definition.
    pub compared: u64,
    /// Products of a row and a centroid.
    pub products: u64,
}

/// Some centroids of a group, as either arithmetic scores them.
struct Part<'a> {
    group: usize,
    scored: Range<usize>,
    bound: &'a Bound,
    /// Scores of a row, of which the first are those of centroids.
    width: usize,
    rounded: Option<&'a RoundedBlock>,
}

impl<T: Element<Filter = f32>> SkipTile<'_, T> {
    /// Labels the rows, which have the labels of the last assignment, and brings their bounds up to date.
    pub(super) fn label(&self, s: &mut SkipScratch, labels: &mut [u32], mut bounds: RowBounds<'_>) -> Result<Work> {
        let mut work = Work::default();
        self.list_all(s, labels, &mut bounds);
        if !s.listed.is_empty() {
            let mut tiles = self.rounded.map(|(rounded, _)| rounded.amx.tiles());
            let parts = self.rounded.map_or(self.tile.centroids.blocks.len(), |(rounded, _)| rounded.blocks.len());
            for part in (0..parts).map(|i| self.part(i)) {
                let list = std::mem::take(&mut s.lists[part.group]);
                work.products += (list.len() * part.scored.len()) as u64;
                for places in list.chunks(PAIR) {
                    self.score(tiles.as_mut(), &part, places, s, bounds.packed.lines);
                    let (part, bounds, compared) = (&part, &mut bounds, &mut work.compared);
                    pulp::Arch::new().dispatch(Compare { of: self, part, places, s, bounds, compared });
                }
                s.lists[part.group] = list;
            }
        }
        for place in 0..s.listed.len() {
            self.settle(place, s, labels, &mut bounds, &mut work.compared);
        }
        for &row in &s.unusable {
            labels[row] = self.tile.unproven(row, &mut work.compared);
            work.products += self.tile.centroids.indices().len() as u64;
        }
        Ok(work)
    }

    fn part(&self, i: usize) -> Part<'_> {
        match self.rounded {
            Some((rounded, _)) => {
                let block = &rounded.blocks[i];
                let (scored, width) = (block.scored.clone(), block.scored.len().next_multiple_of(TILE));
                Part { group: block.group as usize, scored, bound: &block.bound, width, rounded: Some(block) }
            }
            None => {
                let block = &self.tile.centroids.blocks[i];
                let scored = block.scored.clone();
                Part { group: block.group as usize, width: scored.len(), scored, bound: &block.bound, rounded: None }
            }
        }
    }

    /// Scores some listed rows, or, without the unit, finds their products.
    fn score(&self, tiles: Option<&mut Tiles>, part: &Part<'_>, places: &[u32], s: &mut SkipScratch, packed: &[Line]) {
        let (d, width) = (self.tile.x.rows.d, part.width);
        s.scores.grow(PAIR * width, 0.0);
        match (self.rounded, tiles, part.rounded) {
            (Some((rounded, _)), Some(tiles), Some(block)) => {
                let SkipScratch { listed, pair, .. } = s;
                pulp::Arch::new().dispatch(Gather { packed, steps: rounded.steps, places, listed, pair });
                rounded.score_first(tiles, (block, width), PairRows::of_pair(&s.pair), &mut s.scores[..PAIR * width]);
            }
            _ => {
                s.together.clear();
                places.iter().for_each(|&p| s.together.extend_from_slice(&s.rows[p as usize * d..][..d]));
                let values = &self.tile.centroids.values[part.scored.start * d..part.scored.end * d];
                multiply(&s.together, values, d, &mut s.scores[..places.len() * width]);
            }
        }
    }

    /// Labels a listed row, of which all groups that it needs have been scored.
    fn settle(
        &self,
        place: usize,
        s: &mut SkipScratch,
        labels: &mut [u32],
        bounds: &mut RowBounds<'_>,
        compared: &mut u64,
    ) {
        let (tile, candidates) = (&self.tile, &mut s.candidates[place]);
        let &Listed { row, own, below, square } = &s.listed[place];
        let (before, was) = (candidates.compared, labels[row]);
        let mut few = candidates.finish();
        if before == NONE && own != UNSCORED {
            if !few.is_empty() && self.rounded.is_some() {
                // Most are candidates only because of what rounding leaves open of the distance to the own centroid.
                let upper = self.measure(row, was, &mut s.row).above.min(bounds.upper[row]);
                bounds.upper[row] = upper;
                candidates.within(score_above(f64::from(upper) / tile.centroids.unit(), square));
                few = candidates.finish();
            }
            if few.is_empty() {
                return;
            }
        }
        labels[row] = if before == NONE {
            s.few.clear();
            s.few.extend_from_slice(few);
            s.few.extend((own != UNSCORED).then_some((0.0, own)));
            tile.part(row).pack(&mut s.packed, &mut s.full);
            tile.look(&s.packed, &s.few, &mut s.full[0]);
            tile.settle(row, &mut s.full[0], compared)
        } else {
            *compared += few.len() as u64 + 1;
            let few = few.iter().map(|&(_, scored)| tile.centroids.index(scored));
            label_of(tile.nearest(row, before, few.chain([was])))
        };
        if labels[row] != was {
            // The bound of its group has been without it, and is one of now with it.
            let group = self.grouping.group[was as usize] as usize;
            let (at, moved) = (row * self.grouping.count() + group, self.moved);
            let (lower, since) = (&mut bounds.lower[at], &mut bounds.since[at]);
            let bound = f64::from(*lower) - f64::from(moved.fallen(*since, group));
            *lower = down(bound.min(below).max(0.0) + f64::from(moved.fallen(moved.now, group)));
            *since = moved.now;
            bounds.upper[row] = f32::INFINITY;
        }
    }
}

/// Copies the lines of some listed rows to a pair.
struct Gather<'a> {
    packed: &'a [Line],
    steps: usize,
    places: &'a [u32],
    listed: &'a [Listed],
    pair: &'a mut [Line],
}

impl NullaryFnOnce for Gather<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { packed, steps, places, listed, pair } = self;
        for (i, &place) in places.iter().enumerate() {
            let lines = &packed[listed[place as usize].row * steps..][..steps];
            for (line, step) in lines.iter().zip(pair.chunks_exact_mut(ROWS_STEP)) {
                step[i] = *line;
            }
        }
    }
}

/// Offers the scores of listed rows, and makes bounds of them.
struct Compare<'a, 'b, T: Element> {
    of: &'a SkipTile<'a, T>,
    part: &'a Part<'a>,
    places: &'a [u32],
    s: &'a mut SkipScratch,
    bounds: &'a mut RowBounds<'b>,
    compared: &'a mut u64,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for Compare<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of: &SkipTile { ref tile, grouping, moved, rounded }, part, places, s, bounds, compared } = self;
        let (centroids, from, size): (&Centroids<f32>, _, _) = (tile.centroids, part.scored.start, part.scored.len());
        let (unit, fallen) = (centroids.unit(), f64::from(moved.fallen(moved.now, part.group)));
        let (mut least, mut lower) = ([0f32; PAIR], [0f32; PAIR]);
        let (mut error, mut square) = ([0f64; PAIR], [0f64; PAIR]);
        let amx = rounded.map(|(rounded, _)| rounded.amx);
        for (i, (scores, &place)) in s.scores.chunks_exact_mut(part.width).zip(places).enumerate() {
            let listed = &s.listed[place as usize];
            if amx.is_none() {
                let bias = &centroids.bias[part.scored.clone()];
                scores.iter_mut().zip(bias).for_each(|(s, &b)| *s = b - *s);
            }
            if let Some(own) = scores[..size].get_mut((listed.own as usize).wrapping_sub(from)) {
                *own = f32::INFINITY;
            }
            // The unit's scores are infinite beyond the centroids.
            least[i] = match amx {
                Some(amx) => amx.lowest(scores),
                None => lowest(scores),
            };
            square[i] = listed.square;
            error[i] = part.bound.error(s.candidates[place as usize].slack);
        }
        // In vectors of these.
        for i in 0..PAIR {
            let distance = distance_below(f64::from(least[i]) - error[i], square[i]) * unit;
            lower[i] = down(distance + fallen);
        }
        let (mut cuts, mut near) = ([0f32; PAIR], 0u32);
        for (i, &place) in places.iter().enumerate() {
            cuts[i] = s.candidates[place as usize].cut(least[i], error[i]);
            near |= u32::from(least[i] <= cuts[i]) << i;
        }
        for (&lower, &place) in lower.iter().zip(places) {
            let to = &mut bounds.lower[s.listed[place as usize].row * grouping.count() + part.group];
            *to = to.min(lower);
        }
        while near != 0 {
            let i = near.trailing_zeros() as usize;
            near &= near - 1;
            let (place, scores) = (places[i] as usize, &s.scores[i * part.width..][..size]);
            s.candidates[place].collect(scores, cuts[i], error[i], from, |before, list| {
                *compared += list.len() as u64;
                tile.nearest(s.listed[place].row, before, list.iter().map(|&(_, scored)| centroids.index(scored)))
            });
        }
    }
}
