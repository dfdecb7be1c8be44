//! The rows of a tile that need a group of centroids, for all that bounds say.

use super::{
    aligned::Aligned,
    bounds::{score_above, Between, Grouping, Moved},
    candidates::Candidates,
    filter::Slack,
    label::Tile,
    lines::rows_lines,
    own::{Measure, OwnCentroids},
    packed::{slacks, Packed},
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
    /// The snapshot that each of these was made at.
    pub since: &'a mut [u8],
    pub upper: &'a mut [f32],
    pub packed: Packed<'a>,
}

/// One thread reuses this from tile to tile.
#[derive(Default)]
pub(super) struct SkipScratch {
    pub row: Vec<f32>,
    pub packed: Vec<f32>,
    pub pair: Vec<Line>,
    /// Rows that may need a group, and their distances to their own centroids, where these are known.
    pub open: Vec<(usize, Option<Between>)>,
    /// Those that need one,
    pub listed: Vec<Listed>,
    /// as they are scored without the unit.
    pub rows: Vec<f32>,
    pub candidates: Vec<Candidates<f32>>,
    /// Which of them need each group.
    pub lists: Vec<Vec<u32>>,
    /// The present bounds of a row, `(groups)`,
    pub now: Vec<f32>,
    /// and of all open rows, `(open rows, groups)`.
    pub bounds: Vec<f32>,
    /// Which groups a row needs, to a whole number of eights.
    pub needed: Vec<u8>,
    /// Rows whose scores would say nothing.
    pub unusable: Vec<usize>,
    /// Those that are scored together.
    pub together: Vec<f32>,
    pub scores: Aligned<f32>,
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
        self.now.resize(groups, 0.0);
        self.bounds.clear();
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
    s: &'a mut SkipScratch,
    labels: &'a [u32],
    bounds: &'a mut RowBounds<'b>,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for Open<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of: SkipTile { grouping, moved, .. }, s, labels, bounds } = self;
        let SkipScratch { open, now, bounds: open_bounds, .. } = s;
        let groups = grouping.count();
        let of_groups = bounds.lower.chunks_exact(groups).zip(bounds.since.chunks_exact(groups));
        let rows = of_groups.zip(&mut *bounds.upper).zip(labels).enumerate();
        for (row, (((lower, since), upper), &label)) in rows {
            *upper = moved.after_move(*upper, label);
            moved.fall(lower, since, now);
            if Moved::any_needed(now, Moved::cut(*upper)) {
                open.push((row, None));
                open_bounds.extend_from_slice(now);
            }
        }
    }
}

/// Measures them from their own centroids by rounded numbers. Nothing is decided by what comes out, so that no row waits for the one before.
struct MeasureOpen<'a, 'b, T: Element> {
    of: &'a SkipTile<'a, T>,
    rounded: (&'a RoundedCentroids, &'a OwnCentroids),
    open: &'a mut [(usize, Option<Between>)],
    labels: &'a [u32],
    packed: &'a Packed<'b>,
}

impl<T: Element<Filter = f32>> NullaryFnOnce for MeasureOpen<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { of: SkipTile { grouping, moved, .. }, rounded: (rounded, own), open, labels, packed } = self;
        for (row, between) in open {
            let lines = &packed.lines[*row * rounded.steps..][..rounded.steps];
            *between = own.between(moved, lines, packed.norms[*row], grouping.scored[labels[*row] as usize]);
        }
    }
}

/// Lists those of them that need one.
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
            let row = s.open[at].0;
            of.list(at, labels[row], s, bounds);
        }
    }
}

impl<T: Element<Filter = f32>> SkipTile<'_, T> {
    /// Lists the rows, which have the labels of the last assignment, that need a group.
    pub(super) fn list_all(&self, s: &mut SkipScratch, labels: &[u32], bounds: &mut RowBounds<'_>) {
        let steps = self.rounded.map_or(0, |(rounded, _)| rounded.steps);
        s.prepare(self.tile.x.rows.d, self.grouping.count(), steps);
        pulp::Arch::new().dispatch(Open { of: self, s, labels, bounds });
        if let Some(rounded) = self.rounded {
            let (open, packed) = (&mut s.open[..], &bounds.packed);
            pulp::Arch::new().dispatch(MeasureOpen { of: self, rounded, open, labels, packed });
        }
        pulp::Arch::new().dispatch(List { of: self, s, labels, bounds });
    }

    /// The distance of a row to its own centroid, by f32.
    #[inline(always)]
    pub(super) fn measure(&self, row: usize, label: u32, scratch: &mut [f32]) -> Between {
        let (tile, moved) = (&self.tile, self.moved);
        let row = tile.x.row(tile.b, tile.first + row);
        moved.between(pulp::Arch::new().dispatch(Measure { moved, row, label, scratch }), 0.0, 1.0)
    }

    /// Lists an open row if it needs a group, packed as it is scored.
    #[inline(always)]
    fn list(&self, at: usize, label: u32, s: &mut SkipScratch, bounds: &mut RowBounds<'_>) {
        let &Self { ref tile, grouping, moved, rounded } = self;
        let (groups, centroids) = (grouping.count(), tile.centroids);
        let (row, between) = s.open[at];
        let (lower, upper) = (&mut bounds.lower[row * groups..][..groups], &mut bounds.upper[row]);
        let since = &mut bounds.since[row * groups..][..groups];
        let now = &s.bounds[at * groups..][..groups];
        let Between { below, above } = between.unwrap_or_else(|| self.measure(row, label, &mut s.row));
        *upper = upper.min(above);
        let cut = Moved::cut(*upper);
        if !Moved::any_needed(now, cut) {
            return;
        }
        let slack = if rounded.is_some() {
            slacks(centroids, bounds.packed.norms[row])[1]
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
        for (needed, &bound) in s.needed.iter_mut().zip(&s.bounds[at * groups..][..groups]) {
            *needed = u8::from(Moved::needed(bound, cut));
        }
        for (i, eight) in s.needed.as_chunks::<EIGHT>().0.iter().enumerate() {
            let mut needed = u64::from_le_bytes(*eight);
            while needed != 0 {
                let group = EIGHT * i + needed.trailing_zeros() as usize / 8;
                needed &= needed - 1;
                s.lists[group].push(place);
                (lower[group], since[group]) = (grouping.most[group], moved.now);
            }
        }
    }
}
