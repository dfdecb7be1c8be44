//! Rows and centroids rounded to bf16, as the matrix unit multiplies them, with what rounding leaves.
//!
//! # The error bound
//! Of `x` and `c`, packed as in `filter.rs`, the unit multiplies the nearest numbers of bf16 `x'` and `c'`. By Cauchy-Schwarz
//! `|x.c - x'.c'| = |(x - x').c + x'.(c - c')| <= |x - x'| |c| + |x'| |c - c'|`. Both differences are exact in f32, and their norms are computed
//! for each row, and for each centroid, of which a block takes the largest. (Numbers that the unit takes for zeros are rounded to zero
//! here.) The rest is what `lines.rs` says: of `s` steps a score is off by `(18 + s) u` of the products' magnitudes, by Cauchy-Schwarz
//! `|x'| |c'|`, and by `s u` of the bias. With the eight units that `filter.rs` counts for the same roundings around a product, and `x'` and
//! `c'` each up to `2^-8` longer, that is the bound of `filter.rs` for a 64th more than `18 + s` columns.

use super::{
    aligned::Aligned,
    amx::{Amx, Tiles},
    filter::{gamma, Bound, Centroids, Slack},
    lines::{pair_lines, steps, write_centroid, write_row, PairRows, FLUSHED, PAIR, STEP, STEP_UNITS},
    scalar::Scalar,
};
use crate::{error::Result, host, kept::Line, tiles::AMX_CENTROIDS};
use std::ops::Range;

/// The centroids of one problem in tiles.
pub(super) struct RoundedCentroids {
    lines: Vec<Line>,
    /// As [`Centroids::bias`]; infinite where a tile has no centroid.
    bias: Aligned<f32>,
    pub(super) blocks: Vec<RoundedBlock>,
    pub(super) steps: usize,
    pub(super) amx: Amx,
}

/// Centroids that are scored together, and share a bound.
pub(super) struct RoundedBlock {
    pub(super) scored: Range<usize>,
    pub(super) bound: Bound,
    /// The group that all of them are in.
    pub(super) group: u32,
    /// Where its biases are.
    padded: Range<usize>,
}

/// The nearest number of bf16, ties to even, in bits; zero where that is no normal number.
#[inline(always)]
fn round(v: f32) -> u32 {
    let bits = v.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if rounded & 0x7f80_0000 == 0 {
        0
    } else {
        rounded
    }
}

/// Hands out a packed row as bf16, in columns of a step, and returns a bound on the norm of what rounding leaves of it.
#[inline(always)]
pub(super) fn round_row(row: &[f32], mut write: impl FnMut(usize, [u16; STEP])) -> f64 {
    let mut squares = [0.0; STEP];
    let (whole, rest) = row.as_chunks::<STEP>();
    let mut last = [0.0; STEP];
    last[..rest.len()].copy_from_slice(rest);
    // One loop, so that all of it is inlined where vectors are wide.
    for (step, values) in whole.iter().chain((!rest.is_empty()).then_some(&last)).enumerate() {
        let mut rounded = [0; STEP];
        for i in 0..STEP {
            let bits = round(values[i]);
            let left = values[i] - f32::from_bits(bits);
            squares[i] += left * left;
            rounded[i] = (bits >> 16) as u16;
        }
        write(step, rounded);
    }
    let square: f64 = squares.iter().map(|&square| f64::from(square)).sum();
    // Squares that underflowed are put back.
    (square + row.len() as f64 * f32::TINY).sqrt() * (1.0 + gamma(row.len(), f32::UNIT))
}

impl RoundedCentroids {
    pub(super) fn new(c: &Centroids<f32>, amx: Amx) -> Result<Self> {
        let (d, steps) = (c.columns(), steps(c.columns()));
        let units = STEP_UNITS + steps;
        let g = gamma(units + units.div_ceil(64), f32::UNIT);
        let mut blocks: Vec<RoundedBlock> = vec![];
        let mut end = 0;
        for full in &c.blocks {
            for start in full.scored.clone().step_by(AMX_CENTROIDS) {
                let scored = start..full.scored.end.min(start + AMX_CENTROIDS);
                let padded = end..end + scored.len().next_multiple_of(PAIR);
                end = padded.end;
                // Of none yet.
                let bound = c.rounded_bound(scored.clone(), g, 0.0);
                blocks.push(RoundedBlock { scored, bound, group: full.group, padded });
            }
        }
        let mut lines = host::filled("assign", end * steps, Line::ZERO)?;
        let mut bias = Aligned::filled("assign", end, f32::INFINITY)?;
        for block in &mut blocks {
            bias[block.padded.start..][..block.scored.len()].copy_from_slice(&c.bias[block.scored.clone()]);
            let mut left = 0f64;
            for (i, at) in block.scored.clone().zip(block.padded.clone()) {
                let pair = &mut lines[at / PAIR * pair_lines(steps)..][..pair_lines(steps)];
                let write = |step, values| write_centroid(pair, at % PAIR, step, values);
                left = left.max(round_row(&c.values[i * d..][..d], write));
            }
            block.bound = c.rounded_bound(block.scored.clone(), g, left);
        }
        Ok(Self { lines, bias, blocks, steps, amx })
    }

    /// Scores of a pair of rows against a block, row by row; infinite beyond its centroids.
    pub(super) fn score(&self, tiles: &mut Tiles, block: &RoundedBlock, rows: PairRows<'_>, out: &mut [f32]) {
        self.score_first(tiles, (block, block.width()), rows, out);
    }

    /// The same against the block's first `width` centroids, which are whole tiles.
    pub(super) fn score_first(
        &self,
        tiles: &mut Tiles,
        (block, width): (&RoundedBlock, usize),
        rows: PairRows<'_>,
        out: &mut [f32],
    ) {
        let (start, end) = (block.padded.start, block.padded.start + width);
        let lines = &self.lines[start * self.steps..end.next_multiple_of(PAIR) * self.steps];
        tiles.product(rows, lines, &self.bias[start..end], self.steps, out)
    }
}

impl RoundedBlock {
    /// Scores of a row that it has, infinite ones too.
    pub(super) fn width(&self) -> usize {
        self.padded.len()
    }
}

/// Writes a packed row, row `i` of its pair, to the pair's lines, less than nothing: a score is a bias less a product. Returns its part of
/// the bound.
#[inline(always)]
pub(super) fn pack(row: &[f32], slack: Slack, lines: &mut [Line], i: usize) -> Slack {
    let residue = round_row(row, |step, mut values| {
        // A map of the array would be a call.
        for v in &mut values {
            *v ^= 1 << 15;
        }
        write_row(lines, i, step, values);
    });
    slack.rounded(residue, flushed(row.len()))
}

/// What sums of so many columns may lose to zeros.
#[inline(always)]
pub(super) fn flushed(d: usize) -> f64 {
    4.0 * d.next_multiple_of(STEP) as f64 * FLUSHED
}
