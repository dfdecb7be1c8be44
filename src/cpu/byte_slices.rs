//! Numbers as sums of bytes, whose products the matrix unit adds up exactly.
//!
//! A row is cut into [`SLICES`] of signed bytes, `2^e` times `s_0 2^-7 + s_1 2^-15 + ...`, with one `e` for all of its columns, and a product of two
//! rows is the sum of the products of their slices: by Ozaki, Ogita, Oishi and Rump (2012), on units for integers by Ootomo, Ozaki and Yokota
//! (2024). Products of slices `i` and `j` with the same `i + j`, a *level*, have the same weight and are added up together, in 32 bits that
//! hold all of them. A step of a row has all of its slices, so that these are in a cache for all of their products.
//!
//! # The error bound
//! Let `R = 2^e sqrt(d)` be the *reach* of a row, which its norm is not above. Levels from [`SLICES`] on are left out: `4 + 3 / 2^8 + ...` products of
//! slices of `d` bytes, of at most 2^7 each, or `4.02 R R' / 2^40`. Cutting leaves at most `2^(e - 40)` of a number, and so of the product at most
//! `R / 2^40` times the other norm, and the same the other way around. That is less than [`LOST`] times `R R'`; what adding levels up in f64
//! rounds, at most `4.2 u R R'`, is less than `u R R'` for each of eight columns.

use super::{
    amx::{Amx, Tiles},
    lines::{byte_steps, ByteLine, Ends, TileEnds, BYTE_STEP, BYTE_TILE, SLICES},
};
use crate::{
    error::Result,
    fixed::{exponent, power_of_two},
    host,
};

/// What a product is off by, of the reaches of its rows.
pub(super) const LOST: f64 = 6.1 / (1u64 << 40) as f64;
/// Most columns whose products fit in 32 bits: `5 d 2^14 < 2^31`.
pub(super) const MOST_COLUMNS: usize = 16_384;

/// Bits of a number behind the largest power of two.
const BITS: i32 = 39;
/// Added to a number of less than 2^51, it leaves the nearest whole number in the last bits.
const ROUND: f64 = 1.5 * power_of_two(52);
/// Makes bytes without a sign of those with one, all slices at once.
const UNSIGNED: u64 = 0x80_8080_8080;

/// `2^e` of a row by its largest magnitude, and what it is multiplied by to be whole numbers.
#[inline(always)]
fn scales(largest: f64) -> [f64; 2] {
    if largest == 0.0 || !largest.is_finite() {
        return [largest, 0.0];
    }
    let above = exponent(largest);
    // The first byte of what is just below a power of two may round to one too many.
    let e = above + i32::from(largest > 0.98 * power_of_two(above));
    [power_of_two(e), power_of_two(BITS - e)]
}

/// Cuts a row, of which `write` takes each slice in columns of a step. Returns its `2^e`.
#[inline(always)]
fn cut(row: &[f64], mut write: impl FnMut(usize, usize, [u8; BYTE_STEP])) -> f64 {
    let (steps, rest) = row.as_chunks::<BYTE_STEP>();
    let mut last = [0.0; BYTE_STEP];
    last[..rest.len()].copy_from_slice(rest);
    let steps = || steps.iter().chain((!rest.is_empty()).then_some(&last));
    let mut largest = [0.0f64; BYTE_STEP];
    for values in steps() {
        for l in 0..BYTE_STEP {
            let v = values[l].abs();
            largest[l] = if v > largest[l] { v } else { largest[l] };
        }
    }
    let [unit, scale] = scales(largest.into_iter().fold(0.0, f64::max));
    for (step, values) in steps().enumerate() {
        let mut whole = [0; BYTE_STEP];
        for l in 0..BYTE_STEP {
            whole[l] = (values[l] * scale + ROUND).to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(UNSIGNED);
        }
        for slice in 0..SLICES {
            let shift = 8 * (SLICES - 1 - slice);
            let mut bytes = [0; BYTE_STEP];
            bytes.iter_mut().zip(&whole).for_each(|(to, whole)| *to = (whole >> shift) as u8 ^ 0x80);
            write(slice, step, bytes);
        }
    }
    unit
}

/// Lines of a tile of rows, all slices of them.
pub(super) fn sliced_lines(d: usize) -> usize {
    SLICES * byte_steps(d) * BYTE_TILE
}

/// Writes row `i` of a tile, and returns its `2^e`.
#[inline(always)]
pub(super) fn cut_row(row: &[f64], lines: &mut [ByteLine], i: usize) -> f64 {
    cut(row, |slice, step, bytes| lines[(step * SLICES + slice) * BYTE_TILE + i].0 = bytes)
}

/// Writes centroid `j` of a tile, four numbers of each at a time, and returns its `2^e`.
fn cut_centroid(row: &[f64], lines: &mut [ByteLine], j: usize) -> f64 {
    cut(row, |slice, step, bytes| {
        let own = &mut lines[(step * SLICES + slice) * BYTE_TILE..][..BYTE_TILE];
        for (line, four) in own.iter_mut().zip(bytes.chunks_exact(4)) {
            line.0[j * 4..][..4].copy_from_slice(four);
        }
    })
}

/// The centroids of a problem in tiles.
pub(super) struct SlicedCentroids {
    amx: Amx,
    d: usize,
    lines: Vec<ByteLine>,
    /// The `2^e` of each.
    pub(super) units: Vec<f64>,
}

impl SlicedCentroids {
    /// Of `k` centroids of `d` columns, which `row` writes.
    pub(super) fn new(amx: Amx, [k, d]: [usize; 2], row: impl Fn(usize, &mut [f64])) -> Result<Self> {
        let (len, mut buffer) = (sliced_lines(d), vec![0.0; d]);
        let mut lines = host::filled("pairwise", k.div_ceil(BYTE_TILE) * len, ByteLine::ZERO)?;
        let mut units = host::buffer("pairwise", k)?;
        for j in 0..k {
            row(j, &mut buffer);
            units.push(cut_centroid(&buffer, &mut lines[j / BYTE_TILE * len..][..len], j % BYTE_TILE));
        }
        Ok(Self { amx, d, lines, units })
    }

    /// The registers that products of them take.
    pub(super) fn tiles(&self) -> Tiles {
        self.amx.tiles()
    }

    /// Distances by the levels of products, as [`Amx::distances`].
    #[inline(always)]
    pub(super) fn distances(
        &self,
        levels: &[i32],
        ends: (&[Ends], &TileEnds),
        out: (&mut [f32], usize),
        open: impl FnMut(usize, u32),
    ) {
        self.amx.distances(levels, ends, out, open);
    }

    /// Levels of the products of a tile of rows, in slices, and a tile of the centroids, row by row each.
    pub(super) fn multiply(&self, tiles: &mut Tiles, rows: &[ByteLine], tile: usize, levels: &mut [i32]) {
        let len = sliced_lines(self.d);
        tiles.byte_levels(rows, &self.lines[tile * len..][..len], levels);
    }
}

/// The weight of the first level of a product that is without the `2^e` of both rows; each further one has a 256th of the one before.
pub(super) const LEVEL: f64 = 1.0 / 16384.0;

/// Levels of all products of two tiles.
pub(super) const LEVELS: usize = SLICES * BYTE_TILE * BYTE_TILE;

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The products of row `i` of a tile by their levels, without the `2^e` of both.
    fn joined(levels: &[i32], i: usize) -> [f64; BYTE_TILE] {
        let mut out = [0.0; BYTE_TILE];
        for level in levels.chunks_exact(BYTE_TILE * BYTE_TILE).rev() {
            for (out, &level) in out.iter_mut().zip(&level[i * BYTE_TILE..][..BYTE_TILE]) {
                *out = *out * (1.0 / 256.0) + f64::from(level);
            }
        }
        out.iter_mut().for_each(|sum| *sum *= LEVEL);
        out
    }

    /// Slices add up to the number, but for what cutting leaves.
    #[test]
    fn numbers_are_sums_of_their_slices() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        for scale in [1.0, 1e30, 1e-44, 0.0] {
            let mut row: Vec<f64> = (0..200).map(|_| scale * rng.random_range(-1.0f64..1.0).powi(5)).collect();
            // The largest that has a `2^e`, and halves of its last digit.
            row[7] = -0.979_999 * scale;
            row[8] = scale * 0.5f64.powi(40);
            let mut sums = vec![0.0; row.len()];
            let unit = cut(&row, |slice, step, bytes| {
                for (sum, byte) in sums[step * BYTE_STEP..].iter_mut().zip(bytes) {
                    *sum += f64::from(byte as i8) * 0.5f64.powi(7 + 8 * slice as i32);
                }
            });
            assert!(unit >= row.iter().fold(0.0, |most: f64, v| most.max(v.abs())));
            for (v, sum) in row.iter().zip(sums) {
                assert!((v - sum * unit).abs() <= unit * 0.5f64.powi(40), "{v:e}: {sum:e} of {unit:e}");
            }
        }
    }

    #[test]
    fn products_are_as_near_as_the_bound_says() {
        let Some(amx) = Amx::find() else {
            eprintln!("this machine has no matrix unit, or its system does not lend it: nothing is tested here");
            return;
        };
        let mut rng = ChaCha8Rng::seed_from_u64(12);
        for (k, d) in [(1, 1), (16, 63), (33, 64), (40, 65), (64, 200)] {
            // Numbers that are whole in slices, whose products are exact; and others.
            for exact in [true, false] {
                let mut value = || match exact {
                    true => f64::from(rng.random_range(-1000i16..1000)),
                    false => rng.random_range(-1.0f64..1.0).powi(3),
                };
                let mut matrix =
                    |n: usize| (0..n).map(|_| (0..d).map(|_| value()).collect()).collect::<Vec<Vec<f64>>>();
                let (rows, centroids) = (matrix(BYTE_TILE), matrix(k));
                let sliced = SlicedCentroids::new(amx, [k, d], |j, to| to.copy_from_slice(&centroids[j])).unwrap();
                let mut lines = vec![ByteLine::ZERO; sliced_lines(d)];
                let units: Vec<_> = rows.iter().enumerate().map(|(i, row)| cut_row(row, &mut lines, i)).collect();
                let mut levels = vec![-1; LEVELS];
                for (j, centroid) in centroids.iter().enumerate() {
                    sliced.multiply(&mut sliced.tiles(), &lines, j / BYTE_TILE, &mut levels);
                    for (i, row) in rows.iter().enumerate() {
                        let got = joined(&levels, i)[j % BYTE_TILE] * units[i] * sliced.units[j];
                        let want: f64 = row.iter().zip(centroid).map(|(a, b)| a * b).sum();
                        let bound = (LOST + 1e-14) * d as f64 * units[i] * sliced.units[j];
                        assert!((got - want).abs() <= if exact { 0.0 } else { bound }, "{got:e} for {want:e}, {d} {k}");
                    }
                }
            }
        }
    }
}
