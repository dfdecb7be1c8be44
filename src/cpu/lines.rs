//! Numbers of bf16 as the matrix unit of a CPU takes them (`amx.rs`), and how it rounds.
//!
//! A step multiplies 32 columns. It sums the products of even and of odd columns in two chains from zero, adds the chains, and then the
//! accumulator, rounding to the nearest f32 each time; what is below the least normal number counts as zero. A chain has 16 terms: so a step
//! is off by at most `18 u` of the sum of the products' magnitudes, and `u` of the accumulator's, with `u = 2^-24`, and [`FLUSHED`] for each
//! number that is too small. The processor's manual does not promise this: the tests of `amx.rs` hold the processor to it.

use crate::{kept::Line, tiles::AMX_ROWS};

/// Rows, and centroids, of one product: two tiles each.
pub(super) const PAIR: usize = AMX_ROWS;
/// Rows, and centroids, of a tile.
pub(super) const TILE: usize = PAIR / 2;
/// Columns of a step.
pub(super) const STEP: usize = 32;
/// Least normal magnitude: numbers below it are zeros to the unit.
pub(super) const FLUSHED: f64 = f32::MIN_POSITIVE as f64;
/// The error of one step, in units of `2^-24` of its products' magnitudes. Each step adds a unit of the accumulator's.
pub(super) const STEP_UNITS: usize = 18;

/// Columns of a step of bytes, whose products are added up exactly, in 32 bits.
pub(super) const BYTE_STEP: usize = 64;
/// Rows, and centroids, of a product of bytes: a tile each.
pub(super) const BYTE_TILE: usize = 16;
/// Bytes of a number (`byte_slices.rs`).
pub(super) const SLICES: usize = 5;

/// A row of a tile register of bytes.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct ByteLine(pub [u8; BYTE_STEP]);

impl ByteLine {
    pub(super) const ZERO: Self = Self([0; BYTE_STEP]);
}

/// What a row adds to a distance beside the product: in bounds from below and from above, and as a factor of the product. Bounds of which nothing
/// is known are infinite, and their factor is zero, so that they differ whatever is added.
#[derive(Clone, Copy)]
pub(super) struct Ends {
    pub low: f64,
    pub high: f64,
    pub factor: f64,
}

impl Ends {
    pub(super) const UNKNOWN: Self = Self { low: f64::INFINITY, high: f64::NEG_INFINITY, factor: 0.0 };
}

/// The same of a tile of centroids.
pub(super) struct TileEnds {
    pub low: [f64; BYTE_TILE],
    pub high: [f64; BYTE_TILE],
    pub factor: [f64; BYTE_TILE],
}

impl TileEnds {
    pub(super) fn new(ends: [Ends; BYTE_TILE]) -> Self {
        let [low, high, factor] =
            [|ends: Ends| ends.low, |ends: Ends| ends.high, |ends: Ends| ends.factor].map(|of| ends.map(of));
        Self { low, high, factor }
    }
}

/// Steps of bytes that rows of `d` columns take.
pub(super) fn byte_steps(d: usize) -> usize {
    d.div_ceil(BYTE_STEP)
}

/// Steps that rows of `d` columns take.
pub(super) fn steps(d: usize) -> usize {
    d.div_ceil(STEP)
}

/// Lines of a pair of tiles of centroids for each step.
pub(super) fn pair_lines(steps: usize) -> usize {
    PAIR * steps
}

/// Lines from one step of a pair of tiles of rows to the next: one more than there are, so that those of one row do not meet in the same
/// sets of a cache.
pub(super) const ROWS_STEP: usize = PAIR + 1;

/// Lines of a pair of tiles of rows.
pub(super) fn rows_lines(steps: usize) -> usize {
    ROWS_STEP * steps
}

/// The rows of a pair of tiles, wherever their lines are.
#[derive(Clone, Copy)]
pub(super) struct PairRows<'a> {
    pub lines: &'a [Line],
    /// Lines from one row to the next,
    pub row: usize,
    /// and from one step to the next.
    pub step: usize,
}

impl<'a> PairRows<'a> {
    /// Those of a pair as [`write_row`] writes it.
    pub fn of_pair(lines: &'a [Line]) -> Self {
        Self { lines, row: 1, step: ROWS_STEP }
    }
}

/// Writes the numbers that row `i` of a pair has in a step, as bf16, to the pair's `lines`.
#[inline(always)]
pub(super) fn write_row(lines: &mut [Line], i: usize, step: usize, values: [u16; STEP]) {
    lines[step * ROWS_STEP + i].0 = values;
}

/// Writes those of centroid `j`, which tiles have in columns, two numbers of each at a time.
#[inline(always)]
pub(super) fn write_centroid(lines: &mut [Line], j: usize, step: usize, values: [u16; STEP]) {
    let lines = &mut lines[step * PAIR + j / TILE * TILE..][..TILE];
    for (line, two) in lines.iter_mut().zip(values.chunks_exact(2)) {
        line.0[j % TILE * 2..][..2].copy_from_slice(two);
    }
}
