//! The nearest centroids with a first pass on the matrix unit: scores of rounded numbers, and a second look in f32 at what these leave.

use super::{
    super::{
        aligned::Aligned,
        amx::Tiles,
        filter::Slack,
        lines::{rows_lines, steps, PairRows, PAIR},
        rounded::{self, RoundedBlock, RoundedCentroids},
        tensors::Element,
    },
    nearby::{Nearby, MOST},
    Nearest, Pack, Scratch, Tile,
};
use crate::{kept::Line, tiles::AMX_CENTROIDS};
use pulp::{NullaryFnOnce, Simd, WithSimd};

/// Crowded rows of a tile that are scored in f32 one by one. Of more the whole tile is.
const CROWDED: usize = 8;

/// One thread reuses this from tile to tile. The unit takes rows in pairs of its tiles.
pub(super) struct RoundedScratch {
    rows: Vec<f32>,
    lines: Vec<Line>,
    scores: Aligned<f32>,
    nearby: Vec<Nearby<f32>>,
    /// Parts of bounds before rows are rounded.
    slacks: [Slack; PAIR],
    /// Rows of the tile that have many candidates.
    crowded: Vec<usize>,
    full: Scratch<f32>,
}

impl RoundedScratch {
    pub fn new(n: usize, d: usize, k: usize, m: usize) -> Self {
        Self {
            rows: vec![0.0; PAIR * d],
            lines: vec![Line::ZERO; rows_lines(steps(d))],
            scores: Aligned::new(PAIR * AMX_CENTROIDS, 0.0),
            nearby: vec![Nearby::new(m); PAIR],
            slacks: [Slack::NONE; PAIR],
            crowded: vec![],
            full: Scratch::new(n, d, k, m),
        }
    }
}

impl<T: Element<Filter = f32>> Tile<'_, T> {
    /// With a first pass on the matrix unit.
    pub(super) fn find_rounded(
        self,
        rounded: &RoundedCentroids,
        s: &mut RoundedScratch,
        (indices, distances): Nearest<'_>,
    ) {
        let (m, mut tiles) = (self.m, rounded.amx.tiles());
        s.crowded.clear();
        for first in (0..indices.len() / m).step_by(PAIR) {
            let places = first * m..indices.len().min((first + PAIR) * m);
            let out = (&mut indices[places.clone()], &mut distances[places]);
            Self { first: self.first + first, ..self }.find_pair((rounded, &mut tiles), s, first, out);
        }
        drop(tiles);
        // Of many a product with all centroids takes less time than those of each.
        if s.crowded.len() > CROWDED {
            return self.find(&mut s.full, (indices, distances));
        }
        for &i in &s.crowded {
            let out = (&mut indices[i * m..][..m], &mut distances[i * m..][..m]);
            Self { first: self.first + i, ..self }.find(&mut s.full, out);
        }
    }

    /// Finds the nearest of a pair of tiles of rows, which are `first` and so on in their tile, but for crowded rows.
    fn find_pair(
        self,
        (rounded, tiles): (&RoundedCentroids, &mut Tiles),
        s: &mut RoundedScratch,
        first: usize,
        (indices, distances): Nearest<'_>,
    ) {
        let (count, d, simd) = (indices.len() / self.m, self.x.rows.d, pulp::Arch::new());
        let (rows, nearby, slacks) = (&mut s.rows[..count * d], &mut s.nearby[..count], &mut s.slacks[..count]);
        simd.dispatch(Pack { tile: self, rows, nearby });
        simd.dispatch(Round { rows, lines: &mut s.lines, nearby, slacks });
        for block in &rounded.blocks {
            let scores = &mut s.scores[..PAIR * block.width()];
            rounded.score(tiles, block, PairRows::of_pair(&s.lines), scores);
            simd.dispatch(OfferRounded { block, scores, nearby });
        }
        let out = indices.chunks_exact_mut(self.m).zip(distances.chunks_exact_mut(self.m));
        for (i, (nearby, (indices, distances))) in nearby.iter_mut().zip(out).enumerate() {
            if slacks[i].usable() && !nearby.slack.usable() {
                s.crowded.push(first + i);
                continue;
            }
            if nearby.slack.usable() {
                simd.dispatch(Look { tile: self, row: &rows[i * d..][..d], slack: slacks[i], nearby });
            }
            self.settle(i, nearby);
            nearby.write(indices, distances);
        }
    }
}

/// Rounds a pair of packed rows.
struct Round<'a> {
    rows: &'a [f32],
    lines: &'a mut [Line],
    nearby: &'a mut [Nearby<f32>],
    /// Takes parts of bounds.
    slacks: &'a mut [Slack],
}

impl NullaryFnOnce for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let rows = self.rows.chunks_exact(self.rows.len() / self.nearby.len());
        for (i, ((row, nearby), slack)) in rows.zip(self.nearby).zip(self.slacks).enumerate() {
            *slack = nearby.slack;
            nearby.slack = rounded::pack(row, *slack, self.lines, i);
        }
    }
}

/// Offers the rounded scores of a pair of rows. One with too many candidates loses its bound.
struct OfferRounded<'a> {
    block: &'a RoundedBlock,
    scores: &'a [f32],
    nearby: &'a mut [Nearby<f32>],
}

impl NullaryFnOnce for OfferRounded<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { block, scores, nearby } = self;
        for (scores, nearby) in scores.chunks_exact(block.width()).zip(nearby) {
            let mut full = !nearby.slack.usable();
            if full {
                continue;
            }
            nearby.offer_lanes(&scores[..block.scored.len()], (&block.bound, block.scored.start), |nearby| {
                nearby.shorten();
                if nearby.list.len() > nearby.m + MOST / 2 {
                    nearby.list.clear();
                    full = true;
                }
            });
            if full {
                nearby.reset(Slack::NONE);
            }
        }
    }
}

/// Scores the candidates of a packed row in f32, and keeps those that are left.
struct Look<'a, T: Element> {
    tile: Tile<'a, T>,
    row: &'a [f32],
    slack: Slack,
    nearby: &'a mut Nearby<f32>,
}

impl<T: Element<Filter = f32>> WithSimd for Look<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (nearby, centroids) = (self.nearby, &self.tile.scored.centroids);
        nearby.shorten();
        let mut list = std::mem::take(&mut nearby.list);
        nearby.reset(self.slack);
        for (score, scored) in &mut list {
            let (found, error) = (centroids.score(simd, self.row, *scored), centroids.bound(*scored).error(self.slack));
            nearby.lower(f64::from(found) + error);
            *score = (f64::from(found) - error) as f32;
        }
        nearby.list = list;
    }
}
