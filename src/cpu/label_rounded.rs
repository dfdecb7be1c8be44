//! Exact labels on the matrix unit: scores of rounded numbers, their bound, and a second look at what that leaves open.
//!
//! Most rows have one candidate left. Those with a few have them scored once more in f32, and those with many are scored against all
//! centroids as they are without the unit; the definition settles what is open then.

use super::{
    aligned::Aligned,
    amx::Amx,
    bounds::Renewal,
    candidates::Candidates,
    filter::Centroids,
    label::Tile,
    lines::{rows_lines, steps, PairRows, PAIR, ROWS_STEP},
    packed::{slacks, Source},
    rounded::{self, RoundedBlock, RoundedCentroids},
    tensors::Element,
};
use crate::{
    error::Result,
    host,
    kept::Line,
    tiles::{AMX_CENTROIDS, CPU_CENTROIDS, CPU_ROWS},
};
use pulp::{NullaryFnOnce, Simd, WithSimd};

/// One thread reuses this from tile to tile. Rows are taken in pairs of the unit's tiles.
pub(super) struct RoundedScratch {
    rows: Vec<f32>,
    lines: Vec<Line>,
    scores: Aligned<f32>,
    /// Candidates by rounded scores,
    close: Vec<Candidates<f32>>,
    /// and by those in f32.
    full: Vec<Candidates<f32>>,
    /// The one candidate of each row, or [`SEVERAL`].
    only: [u32; PAIR],
    crowded: Crowded,
}

/// More candidates than one, or none.
const SEVERAL: u32 = u32::MAX;

/// The rows of a tile that have many candidates, packed. There is no memory for them before there are any.
#[derive(Default)]
struct Crowded {
    places: Vec<usize>,
    rows: Vec<f32>,
    candidates: Vec<Candidates<f32>>,
    scores: Vec<f32>,
}

impl RoundedScratch {
    pub(super) fn new(d: usize) -> Self {
        Self {
            rows: vec![0.0; PAIR * d],
            lines: vec![Line::ZERO; rows_lines(steps(d))],
            scores: Aligned::new(PAIR * AMX_CENTROIDS, 0.0),
            close: vec![Candidates::new(); PAIR],
            full: vec![Candidates::new(); PAIR],
            only: [SEVERAL; PAIR],
            crowded: Crowded::default(),
        }
    }
}

impl<T: Element<Filter = f32>> Tile<'_, T> {
    /// As [`Tile::label`], with a first pass on the matrix unit.
    pub(super) fn label_rounded(
        &self,
        rounded: &RoundedCentroids,
        s: &mut RoundedScratch,
        out: &mut [u32],
        mut renewal: Option<Renewal<'_>>,
        mut source: Source<'_>,
    ) -> Result<u64> {
        s.crowded.places.clear();
        s.crowded.rows.clear();
        let mut compared = 0;
        for (pair, out) in out.chunks_mut(PAIR).enumerate() {
            let (first, renewal) = (pair * PAIR, renewal.as_mut());
            compared += self.part(first).label_pair(rounded, s, first, out, renewal, &mut source);
        }
        if !s.crowded.places.is_empty() {
            self.label_crowded(&mut s.crowded, out, &mut compared)?;
        }
        if let Some(renewal) = renewal {
            renewal.finish(out, self.centroids);
        }
        Ok(compared)
    }

    /// Labels the rows that have many candidates.
    fn label_crowded(&self, crowded: &mut Crowded, out: &mut [u32], compared: &mut u64) -> Result<()> {
        let Crowded { places, rows, candidates, scores } = crowded;
        // Other problems may have had fewer centroids to score.
        let most = CPU_ROWS * CPU_CENTROIDS.min(self.centroids.bias.len());
        if scores.len() < most {
            *scores = host::filled("assign", most, 0.0)?;
        }
        let candidates = &mut candidates[..places.len()];
        *compared += self.score(rows, candidates, &|place| places[place], scores, None);
        for (&row, candidates) in places.iter().zip(candidates) {
            out[row] = self.settle(row, candidates, compared);
        }
        Ok(())
    }

    /// Labels a pair, but for crowded rows, which are `first` and so on in their tile. Returns how many centroids were compared by the
    /// definition.
    fn label_pair(
        &self,
        rounded: &RoundedCentroids,
        s: &mut RoundedScratch,
        first: usize,
        out: &mut [u32],
        mut renewal: Option<&mut Renewal<'_>>,
        source: &mut Source<'_>,
    ) -> u64 {
        let (m, d, simd, mut compared) = (out.len(), self.x.rows.d, pulp::Arch::new(), 0);
        let (rows, full, close) = (&mut s.rows[..m * d], &mut s.full[..m], &mut s.close[..m]);
        if let Source::Kept(packed) = source {
            packed.prefetch(first + PAIR, s.lines.len() / ROWS_STEP);
            let norms = &packed.norms[first..][..m];
            simd.dispatch(Recall { centroids: self.centroids, norms, full, close });
        } else {
            self.pack(rows, full);
            simd.dispatch(Round { rows, full, lines: &mut s.lines, close });
        }
        if let Source::Keep(packed) = source {
            packed.keep(first, &s.lines, close.iter().map(|close| close.slack));
        }
        if let Some(renewal) = &mut renewal {
            renewal.begin(first, close.iter().map(|close| close.slack));
        }
        let pair = match source {
            Source::Kept(packed) => packed.pair(first, m, &mut s.lines),
            _ => PairRows::of_pair(&s.lines),
        };
        // All that a row has in a block may be known to be one centroid, where there is no other block.
        s.only.fill(SEVERAL);
        let only = (rounded.blocks.len() == 1).then_some(&mut s.only);
        let mut only = only.filter(|_| self.centroids.apart().is_empty());
        let mut tiles = rounded.amx.tiles();
        for block in &rounded.blocks {
            let scores = &mut s.scores[..PAIR * block.width()];
            rounded.score(&mut tiles, block, pair, scores);
            let renewal = renewal.as_deref_mut().map(|renewal| (first, renewal));
            simd.dispatch(Offer { amx: rounded.amx, block, scores, close, renewal, only: only.as_deref_mut() });
        }
        drop(tiles);
        if matches!(source, Source::Kept(_)) {
            // Rows that are looked at once more have not been read.
            let open = s.only[..m].iter().enumerate().filter(|(_, &only)| only == SEVERAL);
            open.for_each(|(i, _)| self.x.prefetch(self.b, self.first + i));
        }
        for (i, label) in out.iter_mut().enumerate() {
            let (only, usable) = (s.only[i], s.close[i].slack.usable());
            if only != SEVERAL {
                *label = self.centroids.index(only);
                continue;
            }
            if !s.full[i].slack.usable() {
                *label = self.unproven(i, &mut compared);
                continue;
            }
            let few = s.close[i].finish();
            if let (true, &[(_, only)], []) = (usable, few, self.centroids.apart()) {
                *label = self.centroids.index(only);
                continue;
            }
            let row = &mut s.rows[i * d..][..d];
            if matches!(source, Source::Kept(_)) {
                simd.dispatch(Move { tile: self, i, row });
            }
            if usable {
                self.look(row, few, &mut s.full[i]);
                *label = self.settle(i, &mut s.full[i], &mut compared);
            } else {
                s.crowded.add(first + i, row, &s.full[i]);
            }
        }
        compared
    }
}

impl<T: Element<Filter = f32>> Tile<'_, T> {
    /// Scores the few candidates of a packed row in f32, and keeps those that are left.
    pub(super) fn look(&self, row: &[f32], few: &[(f32, u32)], full: &mut Candidates<f32>) {
        pulp::Arch::new().dispatch(Look { tile: self, row, few, full });
    }
}

impl Crowded {
    fn add(&mut self, place: usize, row: &[f32], like: &Candidates<f32>) {
        if self.candidates.len() == self.places.len() {
            self.candidates.push(Candidates::new());
        }
        self.candidates[self.places.len()].reset(like.slack);
        self.places.push(place);
        self.rows.extend_from_slice(row);
    }
}

/// Readies a list of candidates for each row of a pair that is kept.
struct Recall<'a> {
    centroids: &'a Centroids<f32>,
    norms: &'a [[f32; 2]],
    full: &'a mut [Candidates<f32>],
    close: &'a mut [Candidates<f32>],
}

impl NullaryFnOnce for Recall<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for ((full, close), &norms) in self.full.iter_mut().zip(self.close).zip(self.norms) {
            let [slack, rounded] = slacks(self.centroids, norms);
            full.reset(slack);
            close.reset(rounded);
        }
    }
}

/// Writes row `i` of a tile as it is scored.
struct Move<'a, T: Element> {
    tile: &'a Tile<'a, T>,
    i: usize,
    row: &'a mut [f32],
}

impl<T: Element<Filter = f32>> NullaryFnOnce for Move<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Tile { x, b, first, centroids, .. } = self.tile;
        centroids.move_row(x.row(*b, first + self.i), self.row);
    }
}

/// Rounds a pair of packed rows.
struct Round<'a> {
    rows: &'a [f32],
    full: &'a [Candidates<f32>],
    lines: &'a mut [Line],
    close: &'a mut [Candidates<f32>],
}

impl NullaryFnOnce for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let d = self.rows.len() / self.full.len();
        let rows = self.rows.chunks_exact(d).zip(self.full).zip(self.close);
        for (i, ((row, full), close)) in rows.enumerate() {
            close.reset(rounded::pack(row, full.slack, self.lines, i));
        }
    }
}

/// Offers the scores of a pair of rows. A row with too many candidates loses its bound.
struct Offer<'a, 'r> {
    amx: Amx,
    block: &'a RoundedBlock,
    scores: &'a mut [f32],
    close: &'a mut [Candidates<f32>],
    /// With the place of the first row.
    renewal: Option<(usize, &'a mut Renewal<'r>)>,
    /// Takes the candidates of rows that have one.
    only: Option<&'a mut [u32; PAIR]>,
}

impl NullaryFnOnce for Offer<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { amx, block, scores, close, renewal, mut only } = self;
        let (width, m) = (block.width(), close.len());
        // Step by step for all rows, so that none waits for the one before.
        let mut least = [0f32; PAIR];
        for (least, scores) in least[..m].iter_mut().zip(scores.chunks_exact(width)) {
            *least = amx.lowest(scores);
        }
        if let Some((first, renewal)) = renewal {
            for (i, (&least, scores)) in least[..m].iter().zip(scores.chunks_exact_mut(width)).enumerate() {
                let (place, error) = ((block.group, &block.scored), |slack| block.bound.error(slack));
                renewal.note(first + i, place, error, (scores, least));
            }
        }
        let (mut cuts, mut near) = ([0f32; PAIR], 0u32);
        for (i, close) in close.iter_mut().enumerate() {
            cuts[i] = close.cut(least[i], block.bound.error(close.slack));
            near |= u32::from(least[i] <= cuts[i]) << i;
        }
        while near != 0 {
            let i = near.trailing_zeros() as usize;
            near &= near - 1;
            let close = &mut close[i];
            if close.slack.usable() {
                let (from, error) = (block.scored.start, block.bound.error(close.slack));
                let (scores, cut) = (&scores[i * width..][..width], cuts[i]);
                if let Some(only) = &mut only {
                    if let Some(j) = amx.only_at_most(scores, cut) {
                        only[i] = (from + j) as u32;
                        continue;
                    }
                }
                if !amx.all_at_most(scores, cut, |j, score| close.keep(score, (from + j) as u32, error)) {
                    close.give_up();
                }
            }
        }
    }
}

/// Scores the few candidates of a row in f32.
struct Look<'a, T: Element> {
    tile: &'a Tile<'a, T>,
    row: &'a [f32],
    few: &'a [(f32, u32)],
    full: &'a mut Candidates<f32>,
}

impl<T: Element<Filter = f32>> WithSimd for Look<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (centroids, slack) = (self.tile.centroids, self.full.slack);
        for &(_, scored) in self.few {
            let (score, error) = (centroids.score(simd, self.row, scored), centroids.bound(scored).error(slack));
            if score <= self.full.cut(score, error) {
                // There is room for as many as there have been.
                self.full.keep(score, scored, error);
            }
        }
    }
}
