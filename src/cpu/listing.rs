//! The rows of a tile that need a group of centroids, for all that bounds say.

use super::{
    bounds::{score_above, Grouping, Moved, Packed},
    candidates::Candidates,
    filter::Slack,
    label::Tile,
    lines::rows_lines,
    own::{slack, Measure, OwnCentroids},
    rounded::RoundedCentroids,
    tensors::Element,
};
use crate::kept::Line;
use pulp::NullaryFnOnce;

/// A tile, and what is known of its rows.
pub(super) struct SkipTile<'a, T: Element> {
    pub tile: Tile<'a, T>,
    pub grouping: &'a Grouping,
    pub moved: &'a Moved,
    /// Where there is a matrix unit.
    pub rounded: Option<(&'a RoundedCentroids, &'a OwnCentroids)>,
}

/// The bounds of a tile's rows: `(rows, groups)`, and `(rows)`.
pub(super) struct RowBounds<'a> {
    pub lower: &'a mut [f32],
    pub upper: &'a mut [f32],
    pub packed: Packed<'a>,
}

/// One thread reuses this from tile to tile.
#[derive(Default)]
pub(super) struct SkipScratch {
    pub row: Vec<f32>,
    pub packed: Vec<f32>,
    pub pair: Vec<Line>,
    /// Rows that may need a group, and bounds from below on the distances that are known.
    pub open: Vec<(usize, Option<f64>)>,
    /// Those that need one,
    pub listed: Vec<Listed>,
    /// as they are scored without the unit.
    pub rows: Vec<f32>,
    pub candidates: Vec<Candidates<f32>>,
    /// Which of them need each group.
    pub lists: Vec<Vec<u32>>,
    /// Which groups a row needs, to a whole number of eights.
    pub needed: Vec<u8>,
    /// Rows whose scores would say nothing.
    pub unusable: Vec<usize>,
    /// Those that are scored together.
    pub together: Vec<f32>,
    pub scores: Vec<f32>,
    pub full: Vec<Candidates<f32>>,
    pub few: Vec<(f32, u32)>,
}

/// Groups that are looked at together.
const EIGHT: usize = 8;

/// A row that needs a group.
pub(super) struct Listed {
    /// In its tile.
    pub row: usize,
    /// Its own centroid among those that are scored, or [`UNSCORED`].
    pub own: u32,
    /// It is not nearer than this.
    pub below: f64,
    /// The square of the packed row's norm is not below this.
    pub square: f64,
}

impl SkipScratch {
    fn prepare(&mut self, d: usize, groups: usize, steps: usize) {
        self.needed.clear();
        self.needed.resize(groups.next_multiple_of(EIGHT), 0);
        self.row.resize(d, 0.0);
        self.packed.resize(d, 0.0);
        self.pair.resize(rows_lines(steps), Line::ZERO);
        self.lists.resize_with(groups.max(self.lists.len()), Vec::new);
        self.full.resize_with(1, Candidates::new);
        self.lists.iter_mut().for_each(Vec::clear);
        self.open.clear();
        self.listed.clear();
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
    open: &'a mut Vec<(usize, Option<f64>)>,
    labels: &'a [u32],
    bounds: &'a mut RowBounds<'b>,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for Open<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of: SkipTile { grouping, moved, rounded, .. }, open, labels, bounds } = self;
        let rows = bounds.lower.chunks_exact(grouping.count()).zip(&mut *bounds.upper).zip(labels).enumerate();
        for (row, ((lower, upper), &label)) in rows {
            *upper = moved.after_move(*upper, label);
            if !moved.any_needed(lower, Moved::cut(*upper)) {
                continue;
            }
            let mut below = None;
            if let Some((rounded, own)) = rounded {
                let lines = &bounds.packed.lines[row * rounded.steps..][..rounded.steps];
                let scored = grouping.scored[label as usize];
                if let Some(distance) = own.between(moved, lines, bounds.packed.norms[row], scored) {
                    (*upper, below) = (upper.min(distance.above), Some(distance.below));
                    if !moved.any_needed(lower, Moved::cut(*upper)) {
                        continue;
                    }
                }
            }
            open.push((row, below));
        }
    }
}

/// Lists those of them that do.
struct List<'a, 'b, T: Element> {
    of: &'a SkipTile<'a, T>,
    s: &'a mut SkipScratch,
    labels: &'a [u32],
    bounds: &'a mut RowBounds<'b>,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for List<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of, s, labels, bounds } = self;
        for at in 0..s.open.len() {
            let (row, below) = s.open[at];
            of.list(row, labels[row], below, s, bounds);
        }
    }
}

impl<T: Element<Filter = f32>> SkipTile<'_, T> {
    /// Lists the rows, which have the labels of the last assignment, that need a group.
    pub(super) fn list_all(&self, s: &mut SkipScratch, labels: &[u32], bounds: &mut RowBounds<'_>) {
        let steps = self.rounded.map_or(0, |(rounded, _)| rounded.steps);
        s.prepare(self.tile.x.rows.d, self.grouping.count(), steps);
        pulp::Arch::new().dispatch(Open { of: self, open: &mut s.open, labels, bounds });
        pulp::Arch::new().dispatch(List { of: self, s, labels, bounds });
    }

    /// Lists a row if it needs a group, packed as it is scored.
    #[inline(always)]
    fn list(&self, row: usize, label: u32, below: Option<f64>, s: &mut SkipScratch, bounds: &mut RowBounds<'_>) {
        let (simd, &Self { ref tile, grouping, moved, rounded }) = (pulp::Arch::new(), self);
        let (groups, centroids) = (grouping.count(), tile.centroids);
        let (lower, upper) = (&mut bounds.lower[row * groups..][..groups], &mut bounds.upper[row]);
        let below = match below {
            Some(below) => below,
            None => {
                let row = tile.x.row(tile.b, tile.first + row);
                let distance =
                    moved.between(simd.dispatch(Measure { moved, row, label, scratch: &mut s.row }), 0.0, 1.0);
                *upper = upper.min(distance.above);
                if !moved.any_needed(lower, Moved::cut(*upper)) {
                    return;
                }
                distance.below
            }
        };
        let cut = Moved::cut(*upper);
        let slack = if rounded.is_some() {
            slack(centroids, bounds.packed.norms[row])
        } else {
            tile.part(row).pack(&mut s.packed, &mut s.full);
            s.full[0].slack
        };
        if !slack.usable() {
            lower.fill(0.0);
            *upper = f32::INFINITY;
            s.unusable.push(row);
            return;
        }
        if rounded.is_none() {
            s.rows.extend_from_slice(&s.packed);
        }
        let square = centroids.square_below(slack);
        let reach = score_above(f64::from(*upper) / centroids.unit(), square);
        s.candidates(slack).within(reach);
        let place = s.listed.len() as u32;
        s.listed.push(Listed { row, own: grouping.scored[label as usize], below, square });
        let of_groups = lower.iter_mut().zip(&mut s.needed).zip(moved.fallen.iter().zip(&grouping.most));
        for ((lower, to), (&fallen, &most)) in of_groups {
            let needed = Moved::needed(*lower, fallen, cut);
            *to = u8::from(needed);
            *lower = if needed { most } else { *lower };
        }
        for (i, eight) in s.needed.as_chunks::<EIGHT>().0.iter().enumerate() {
            let mut needed = u64::from_le_bytes(*eight);
            while needed != 0 {
                let group = EIGHT * i + needed.trailing_zeros() as usize / 8;
                needed &= needed - 1;
                s.lists[group].push(place);
            }
        }
    }
}
