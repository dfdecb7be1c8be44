//! Exact labels of a tile of rows, each against those groups of centroids alone that may have its nearest one.
//!
//! The rows that need a group are listed, and scored together against its centroids (and no others), as many at a time as the matrix unit
//! takes. The row's own centroid counts by its distance, so that its group is needed no more than others. What scores leave open goes the
//! usual way.

use super::{
    bounds::{distance_below, down, score_above, Grouping, Moved, UNSCORED},
    candidates::{lowest, Candidates, NONE},
    filter::{Bound, Centroids, Slack},
    label::{label_of, Tile},
    lines::{pair_lines, Line, PAIR},
    matmul::multiply,
    rounded::{self, RoundedBlock, RoundedCentroids},
    tensors::Element,
};
use crate::error::Result;
use pulp::{NullaryFnOnce, Simd, WithSimd};
use std::ops::Range;

/// A tile, and what is known of its rows.
pub(super) struct SkipTile<'a, T: Element> {
    pub tile: Tile<'a, T>,
    pub grouping: &'a Grouping,
    pub moved: &'a Moved,
    /// Where there is a matrix unit.
    pub rounded: Option<&'a RoundedCentroids>,
}

/// The bounds of a tile's rows: `(rows, groups)`, and `(rows)`.
pub(super) struct RowBounds<'a> {
    pub lower: &'a mut [f32],
    pub upper: &'a mut [f32],
}

/// One thread reuses this from tile to tile.
#[derive(Default)]
pub(super) struct SkipScratch {
    row: Vec<f32>,
    packed: Vec<f32>,
    pair: Vec<Line>,
    /// Rows that may need a group.
    open: Vec<usize>,
    /// Those that need one,
    listed: Vec<Listed>,
    /// as they are scored, with the unit or without it.
    lines: Vec<Line>,
    rows: Vec<f32>,
    candidates: Vec<Candidates<f32>>,
    /// Which of them need each group.
    lists: Vec<Vec<u32>>,
    /// Rows whose scores would say nothing.
    unusable: Vec<usize>,
    /// Those that are scored together.
    together: Vec<f32>,
    scores: Vec<f32>,
    full: Vec<Candidates<f32>>,
    few: Vec<(f32, u32)>,
}

/// A row that needs a group.
struct Listed {
    /// In its tile.
    row: usize,
    /// Its own centroid among those that are scored, or [`UNSCORED`].
    own: u32,
    /// It is not nearer than this.
    below: f64,
    /// The square of the packed row's norm is not below this.
    square: f64,
}

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
        s.prepare(self.tile.x.rows.d, self.grouping.count(), self.rounded.map_or(0, |rounded| rounded.steps));
        pulp::Arch::new().dispatch(Open { of: self, open: &mut s.open, labels, bounds: &mut bounds });
        for at in 0..s.open.len() {
            let row = s.open[at];
            self.list(row, labels[row], s, &mut bounds);
        }
        if !s.listed.is_empty() {
            let parts = self.rounded.map_or(self.tile.centroids.blocks.len(), |rounded| rounded.blocks.len());
            for part in (0..parts).map(|i| self.part(i)) {
                let list = std::mem::take(&mut s.lists[part.group]);
                work.products += (list.len() * part.scored.len()) as u64;
                for places in list.chunks(PAIR) {
                    self.score(&part, places, s);
                    let compared = &mut work.compared;
                    pulp::Arch::new().dispatch(Compare {
                        of: self,
                        part: &part,
                        places,
                        s,
                        bounds: &mut bounds,
                        compared,
                    });
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
            Some(RoundedCentroids { blocks, .. }) => {
                let block = &blocks[i];
                let (scored, width) = (block.scored.clone(), block.width());
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
    fn score(&self, part: &Part<'_>, places: &[u32], s: &mut SkipScratch) {
        let d = self.tile.x.rows.d;
        if s.scores.len() < PAIR * part.width {
            s.scores.resize(PAIR * part.width, 0.0);
        }
        match (self.rounded, part.rounded) {
            (Some(rounded), Some(block)) => {
                for (i, &place) in places.iter().enumerate() {
                    let lines = &s.lines[place as usize * rounded.steps..][..rounded.steps];
                    for (line, pair) in lines.iter().zip(s.pair.chunks_exact_mut(PAIR)) {
                        pair[i] = *line;
                    }
                }
                rounded.score(block, &s.pair, &mut s.scores[..PAIR * part.width]);
            }
            _ => {
                s.together.clear();
                places.iter().for_each(|&p| s.together.extend_from_slice(&s.rows[p as usize * d..][..d]));
                let values = &self.tile.centroids.values[part.scored.start * d..part.scored.end * d];
                multiply(&s.together, values, d, &mut s.scores[..places.len() * part.width]);
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
        let &Listed { row, own, below, .. } = &s.listed[place];
        let (before, few) = (candidates.compared, candidates.finish());
        if few.is_empty() && before == NONE && own != UNSCORED {
            return;
        }
        let was = labels[row];
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
            // The bound of its group has been without it.
            let group = self.grouping.group[was as usize] as usize;
            let lower = &mut bounds.lower[row * self.grouping.count() + group];
            *lower = lower.min(down(below + f64::from(self.moved.fallen[group])));
            bounds.upper[row] = f32::INFINITY;
        }
    }
}

impl SkipScratch {
    fn prepare(&mut self, d: usize, groups: usize, steps: usize) {
        self.row.resize(d, 0.0);
        self.packed.resize(d, 0.0);
        self.pair.resize(pair_lines(steps), Line::ZERO);
        self.lists.resize_with(groups.max(self.lists.len()), Vec::new);
        self.full.resize_with(1, Candidates::new);
        self.lists.iter_mut().for_each(Vec::clear);
        self.open.clear();
        self.listed.clear();
        self.lines.clear();
        self.rows.clear();
        self.unusable.clear();
    }

    /// The candidates of the next listed row.
    fn candidates(&mut self, slack: Slack) -> &mut Candidates<f32> {
        let place = self.listed.len();
        if place == self.candidates.len() {
            self.candidates.push(Candidates::new());
        }
        self.candidates[place].reset(slack);
        &mut self.candidates[place]
    }
}

/// Finds the rows that may need a group, for all that is known of the distance to their own centroid.
struct Open<'a, 'b, T: Element> {
    of: &'a SkipTile<'a, T>,
    open: &'a mut Vec<usize>,
    labels: &'a [u32],
    bounds: &'a mut RowBounds<'b>,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for Open<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of: SkipTile { grouping, moved, .. }, open, labels, bounds } = self;
        let rows = bounds.lower.chunks_exact(grouping.count()).zip(&mut *bounds.upper).zip(labels).enumerate();
        for (row, ((lower, upper), &label)) in rows {
            *upper = moved.after_move(*upper, label);
            if moved.any_needed(lower, Moved::cut(*upper)) {
                open.push(row);
            }
        }
    }
}

/// Finds the squared distance of a row to its own centroid.
pub(super) struct Measure<'a, T> {
    pub moved: &'a Moved,
    pub row: &'a [T],
    pub label: u32,
    pub scratch: &'a mut [f32],
}

impl<T: Element<Filter = f32>> WithSimd for Measure<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        if let Some(row) = T::as_filter(self.row) {
            return self.moved.square(simd, row, self.label);
        }
        T::filter_row(self.row, self.scratch);
        self.moved.square(simd, self.scratch, self.label)
    }
}

/// Rounds a packed row.
struct Round<'a> {
    row: &'a [f32],
    slack: Slack,
    lines: &'a mut [Line],
}

impl NullaryFnOnce for Round<'_> {
    type Output = Slack;

    #[inline(always)]
    fn call(self) -> Slack {
        rounded::pack(self.row, self.slack, self.lines, 0)
    }
}

impl<T: Element<Filter = f32>> SkipTile<'_, T> {
    /// Lists a row if it needs a group, packed as it is scored.
    fn list(&self, row: usize, label: u32, s: &mut SkipScratch, bounds: &mut RowBounds<'_>) {
        let (simd, &Self { ref tile, grouping, moved, rounded }) = (pulp::Arch::new(), self);
        let (groups, centroids) = (grouping.count(), tile.centroids);
        let (lower, upper) = (&mut bounds.lower[row * groups..][..groups], &mut bounds.upper[row]);
        let x = tile.x.row(tile.b, tile.first + row);
        let square = simd.dispatch(Measure { moved, row: x, label, scratch: &mut s.row });
        *upper = moved.above(square);
        let cut = Moved::cut(*upper);
        if !moved.any_needed(lower, cut) {
            return;
        }
        tile.part(row).pack(&mut s.packed, &mut s.full);
        let slack = s.full[0].slack;
        if !slack.usable() {
            lower.fill(0.0);
            *upper = f32::INFINITY;
            s.unusable.push(row);
            return;
        }
        let (below, square) = (moved.below(square), centroids.square_below(slack));
        let slack = match rounded {
            Some(_) => {
                let slack = simd.dispatch(Round { row: &s.packed, slack, lines: &mut s.pair });
                s.lines.extend(s.pair.iter().step_by(PAIR));
                slack
            }
            None => {
                s.rows.extend_from_slice(&s.packed);
                slack
            }
        };
        let reach = score_above(f64::from(*upper) / centroids.unit(), square);
        s.candidates(slack).within(reach);
        let place = s.listed.len() as u32;
        s.listed.push(Listed { row, own: grouping.scored[label as usize], below, square });
        for (g, (lower, &fallen)) in lower.iter_mut().zip(&moved.fallen).enumerate() {
            if Moved::needed(*lower, fallen, cut) {
                *lower = grouping.most[g];
                s.lists[g].push(place);
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
        let Self { of: &SkipTile { ref tile, grouping, moved, .. }, part, places, s, bounds, compared } = self;
        let (centroids, from, width): (&Centroids<f32>, _, _) = (tile.centroids, part.scored.start, part.scored.len());
        let (unit, fallen) = (centroids.unit(), f64::from(moved.fallen[part.group]));
        for (scores, &place) in s.scores.chunks_exact_mut(part.width).zip(places) {
            let (listed, candidates) = (&s.listed[place as usize], &mut s.candidates[place as usize]);
            let scores = &mut scores[..width];
            if part.rounded.is_none() {
                let bias = &centroids.bias[part.scored.clone()];
                scores.iter_mut().zip(bias).for_each(|(s, &b)| *s = b - *s);
            }
            if part.scored.contains(&(listed.own as usize)) {
                scores[listed.own as usize - from] = f32::INFINITY;
            }
            let (least, error) = (lowest(scores), part.bound.error(candidates.slack));
            let distance = distance_below(f64::from(least) - error, listed.square) * unit;
            let lower = &mut bounds.lower[listed.row * grouping.count() + part.group];
            *lower = lower.min(down(distance + fallen));
            candidates.offer_from(least, scores, part.bound, from, |before, list| {
                *compared += list.len() as u64;
                tile.nearest(listed.row, before, list.iter().map(|&(_, scored)| centroids.index(scored)))
            });
        }
    }
}
