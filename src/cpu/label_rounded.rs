//! Exact labels on the matrix unit: scores of rounded numbers, their bound, and a second look at what that leaves open.
//!
//! Most rows have one candidate left. Those with a few have them scored once more in f32, and those with many are scored against all
//! centroids as they are without the unit; the definition settles what is open then.

use super::{
    amx::Amx,
    bounds::Renewal,
    candidates::Candidates,
    label::Tile,
    lines::{rows_lines, steps, PAIR},
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
    scores: Vec<f32>,
    /// Candidates by rounded scores,
    close: Vec<Candidates<f32>>,
    /// and by those in f32.
    full: Vec<Candidates<f32>>,
    crowded: Crowded,
}

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
            scores: vec![0.0; PAIR * AMX_CENTROIDS],
            close: vec![Candidates::new(); PAIR],
            full: vec![Candidates::new(); PAIR],
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
    ) -> Result<u64> {
        s.crowded.places.clear();
        s.crowded.rows.clear();
        let mut compared = 0;
        for (pair, out) in out.chunks_mut(PAIR).enumerate() {
            self.part(pair * PAIR).label_pair(rounded, s, pair * PAIR, out, &mut compared, renewal.as_mut());
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

    /// Labels a pair, but for crowded rows, which are `first` and so on in their tile.
    fn label_pair(
        &self,
        rounded: &RoundedCentroids,
        s: &mut RoundedScratch,
        first: usize,
        out: &mut [u32],
        compared: &mut u64,
        mut renewal: Option<&mut Renewal<'_>>,
    ) {
        let (m, d, simd) = (out.len(), self.x.rows.d, pulp::Arch::new());
        let (rows, full, close) = (&mut s.rows[..m * d], &mut s.full[..m], &mut s.close[..m]);
        self.pack(rows, full);
        simd.dispatch(Round { rows, full, lines: &mut s.lines, close });
        if let Some(renewal) = &mut renewal {
            renewal.begin(first, close.iter().map(|close| close.slack));
            renewal.keep(first, m, &s.lines);
        }
        let mut tiles = rounded.amx.tiles();
        for block in &rounded.blocks {
            let scores = &mut s.scores[..PAIR * block.width()];
            rounded.score(&mut tiles, block, &s.lines, scores);
            let renewal = renewal.as_deref_mut().map(|renewal| (first, renewal));
            simd.dispatch(Offer { amx: rounded.amx, block, scores, close, renewal });
        }
        drop(tiles);
        for (i, (label, row)) in out.iter_mut().zip(rows.chunks_exact(d)).enumerate() {
            let (close, full) = (&mut close[i], &mut full[i]);
            if !full.slack.usable() {
                *label = self.unproven(i, compared);
            } else if !close.slack.usable() {
                s.crowded.add(first + i, row, full);
            } else {
                match close.finish() {
                    &[(_, only)] if self.centroids.apart().is_empty() => *label = self.centroids.index(only),
                    few => {
                        self.look(row, few, full);
                        *label = self.settle(i, full, compared);
                    }
                }
            }
        }
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
}

impl NullaryFnOnce for Offer<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { amx, block, scores, close, renewal } = self;
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
