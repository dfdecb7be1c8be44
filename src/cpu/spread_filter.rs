//! Seeds that are too far from a row to count, found by products of rounded rows on the matrix unit.
//!
//! Of the seeds that a row meets in a pass hardly any is nearer than those before. So rows are rounded once, and kept for all passes in half the
//! bytes of f32: a pass reads these, and the rows themselves only where a seed may be nearer, whose distance is then what it always is.
//!
//! # The bound
//! Let `p` and `s` be a row and a seed as distances take them (`spread.rs`), less a common vector, and `p'` and `s'` what is left of them in
//! bf16, at distances of at most `r_p` and `r_s`: the norms of what rounding leaves (`rounded.rs`), and two units of the numbers that are
//! rounded, which differences of f32 lose, or those of f64 that become f32. By the triangle inequality `|p - s| >= |p' - s'| - r_p - r_s`.
//!
//! With squares `q` of `|p'|` and `|s'|` that are added up in f32, the unit's score `z` is about `q_s / 2 - p'.s'`, so that `|p' - s'|^2` is about
//! `q_p + 2 z`. By Cauchy-Schwarz all of its terms are at most `(|p'| + |s'|)^2`, which it is off by no more than `g` of: with `g` of as many units
//! as the columns are, a product's and as many as `rounded.rs` counts, eight for the other operations here and a hundredth for norms that
//! are rounded themselves. Numbers that the unit takes for zeros add what `rounded.rs` adds for them, on both sides.
//!
//! A distance as it is computed is at least `1 - h` times the true one, `h` being the gamma of `d / 32 + 12` roundings: where it is a sum
//! within `Limits`, as one of at least [`NEAR`] is of rows that are no longer than [`FAR`]. So it is not below `near` if
//! `|p' - s'| >= sqrt(near (1 + 2 h)) + r_p + r_s`: if the score is above half of the square of that, plus the error, minus `q_p`.

use super::{
    amx::Amx,
    filter::gamma,
    lines::{
        pair_lines, rows_lines, steps, write_centroid, write_row, PairRows, FLUSHED, PAIR, ROWS_STEP, STEP, STEP_UNITS,
    },
    origin::{few_of, median_of, FEW},
    rounded::round_row,
    scalar::Scalar,
};
use crate::{error::Result, host, kept::Line, spread::LANES};
use pulp::NullaryFnOnce;

/// The least distance that seeds are filtered by.
const NEAR: f64 = 1e-25;
/// The largest norm of a row that is bounded.
const FAR: f64 = 1e17;

/// Rows as the unit multiplies them.
pub(super) struct RoundedRows {
    amx: Amx,
    n: usize,
    steps: usize,
    /// Those of each problem in pairs of tiles.
    lines: Vec<Line>,
    /// `(b, n)`.
    bounds: Vec<Rounded>,
    /// `g` and what numbers below the least normal one come to.
    error: [f64; 2],
    /// `1 + 2 h`.
    farther: f64,
}

/// A rounded row, as bounds know it.
#[derive(Clone, Copy, Default)]
struct Rounded {
    /// Its norm.
    norm: f64,
    /// A bound on its distance from the row; infinite where nothing is known.
    residue: f64,
}

/// The seeds of a pass over the rows of a problem.
pub(super) struct Filter<'a> {
    rows: &'a RoundedRows,
    b: usize,
    count: usize,
    /// The seeds, less than nothing, in whole pairs of tiles: a score is a bias less a product.
    lines: Vec<Line>,
    /// Half their squares; infinite where a tile has no seed.
    bias: Vec<f32>,
    /// The largest norm and residue.
    most: Rounded,
}

/// The seeds that each row of a pair of tiles has to meet.
#[derive(Default)]
pub(super) struct Listed {
    seeds: Vec<u32>,
    /// Where those of each row end.
    ends: [usize; PAIR],
    scores: Vec<f32>,
}

impl RoundedRows {
    /// Of `b` problems of `n` rows of `d` columns, of which `point` writes one.
    pub fn new<S: Scalar>(
        amx: Amx,
        [b, n, d]: [usize; 3],
        point: impl Fn(usize, usize, &mut [[S; LANES]]) + Send + Sync,
    ) -> Result<Self> {
        let (pairs, steps, lanes) = (n.div_ceil(PAIR), steps(d), d.div_ceil(LANES));
        let mut lines = host::filled("k-means++", b * pairs * rows_lines(steps), Line::ZERO)?;
        let mut bounds = host::filled("k-means++", b * n, Rounded::default())?;
        let row = || vec![[S::of(0.0); LANES]; lanes];
        // Zeros beyond the last column stay zeros.
        let centre = |b: usize| {
            let mut few = vec![[S::of(0.0); LANES]; n.min(FEW) * lanes];
            few_of(n).zip(few.chunks_exact_mut(lanes)).for_each(|(i, row)| point(b, i, row));
            median_of(few.as_flattened_mut(), lanes * LANES)
        };
        let centres = host::map("k-means++", b, FEW * FEW * d, centre)?;
        let tiles = lines.chunks_exact_mut(rows_lines(steps)).enumerate();
        let mut rest = &mut bounds[..];
        let tiles = tiles.map(|(tile, lines)| {
            let (b, first) = (tile / pairs, tile % pairs * PAIR);
            let (own, others) = std::mem::take(&mut rest).split_at_mut(PAIR.min(n - first));
            rest = others;
            (b, first, lines, own)
        });
        let scratch = || (row(), vec![0.0; lanes * LANES]);
        let round = |(row, packed): &mut (Vec<[S; LANES]>, Vec<f32>), (b, first, lines, bounds): (usize, _, _, _)| {
            let centre = &centres[b][..];
            pulp::Arch::new().dispatch(Round { point: &point, b, first, d, centre, row, packed, lines, bounds });
            Ok(())
        };
        host::for_each(tiles.collect(), PAIR * d, scratch, round)?;
        let g = 1.01 * gamma(d + STEP_UNITS + steps, f32::UNIT);
        let flushed = 16.0 * (steps * STEP) as f64 * FLUSHED;
        let farther = 1.0 + 2.0 * gamma(d / LANES + 12, f32::UNIT);
        Ok(Self { amx, n, steps, lines, bounds, error: [g, flushed], farther })
    }

    fn of_pair(&self, b: usize, pair: usize) -> &[Line] {
        let len = rows_lines(self.steps);
        &self.lines[(b * self.n.div_ceil(PAIR) + pair) * len..][..len]
    }

    /// For seeds that are these rows of problem `b`.
    pub fn filter(&self, b: usize, seeds: &[u32]) -> Result<Filter<'_>> {
        let (count, width) = (seeds.len(), seeds.len().next_multiple_of(PAIR));
        let mut lines = host::filled("k-means++", width * self.steps, Line::ZERO)?;
        let (mut bias, mut most) = (vec![f32::INFINITY; width], Rounded::default());
        for (t, &seed) in seeds.iter().enumerate() {
            let (i, Rounded { norm, residue }) = (seed as usize, self.bounds[b * self.n + seed as usize]);
            let (from, to) = (self.of_pair(b, i / PAIR), &mut lines[t / PAIR * pair_lines(self.steps)..]);
            for step in 0..self.steps {
                write_centroid(to, t % PAIR, step, from[step * ROWS_STEP + i % PAIR].0.map(|bits| bits ^ 1 << 15));
            }
            bias[t] = (0.5 * norm * norm) as f32;
            most = Rounded { norm: most.norm.max(norm), residue: most.residue.max(residue) };
        }
        Ok(Filter { rows: self, b, count, lines, bias, most })
    }
}

impl Filter<'_> {
    /// Lists the seeds that may be nearer to the rows from `first` on than what these have, of which some need not know.
    #[inline(always)]
    pub fn list(&self, first: usize, near: impl Iterator<Item = Option<f64>>, listed: &mut Listed) {
        let Self { rows, b, count, bias, most, .. } = self;
        let (Listed { seeds, ends, scores }, width) = (listed, bias.len());
        scores.resize(PAIR * width, 0.0);
        let pair = PairRows::of_pair(rows.of_pair(*b, first / PAIR));
        rows.amx.tiles().product(pair, &self.lines, bias, rows.steps, scores);
        seeds.clear();
        let bounds = &rows.bounds[b * rows.n + first..];
        let [g, flushed] = rows.error;
        for (((near, own), scores), end) in near.zip(bounds).zip(scores.chunks_exact(width)).zip(&mut *ends) {
            if let Some(near) = near {
                let (reach, norms) = ((near * rows.farther).sqrt() + own.residue + most.residue, own.norm + most.norm);
                let cut = 0.5 * (reach * reach + g * norms * norms + flushed - own.norm * own.norm);
                if near >= NEAR && cut.is_finite() {
                    rows.amx.all_at_most(scores, (cut as f32).next_up(), |t, _| {
                        seeds.push(t as u32);
                        true
                    });
                } else {
                    seeds.extend(0..*count as u32);
                }
            }
            *end = seeds.len();
        }
        // There are no rows beyond the last one.
        let after = rows.n - first;
        ends[after.min(PAIR)..].fill(seeds.len());
    }
}

impl Listed {
    /// Those of row `i` of the tiles.
    #[inline(always)]
    pub fn of(&self, i: usize) -> &[u32] {
        let start = if i > 0 { self.ends[i - 1] } else { 0 };
        &self.seeds[start..self.ends[i]]
    }

    /// The first row from `i` on that has to meet one.
    #[inline(always)]
    pub fn next(&self, i: usize) -> Option<usize> {
        (i..PAIR).find(|&i| !self.of(i).is_empty())
    }
}

/// Rounds the rows of a pair of tiles.
struct Round<'a, S, P> {
    point: &'a P,
    b: usize,
    first: usize,
    d: usize,
    centre: &'a [S],
    row: &'a mut [[S; LANES]],
    packed: &'a mut [f32],
    lines: &'a mut [Line],
    bounds: &'a mut [Rounded],
}

impl<S: Scalar, P: Fn(usize, usize, &mut [[S; LANES]])> NullaryFnOnce for Round<'_, S, P> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { point, b, first, d, centre, row, packed, lines, bounds } = self;
        for (i, bound) in bounds.iter_mut().enumerate() {
            point(b, first + i, row);
            let numbers = row.as_flattened().iter().zip(centre);
            packed.iter_mut().zip(numbers).for_each(|(to, (v, &c))| *to = v.sub(c).widen() as f32);
            let mut squares = [0f32; STEP];
            let residue = round_row(packed, |step, rounded| {
                for (square, bits) in squares.iter_mut().zip(rounded) {
                    let v = f32::from_bits(u32::from(bits) << 16);
                    *square += v * v;
                }
                write_row(lines, i, step, rounded);
            });
            let norm = squares.iter().map(|&square| f64::from(square)).sum::<f64>().sqrt();
            let residue = residue + 3.0 * f32::UNIT * (norm + residue) + d as f64 * f32::TINY;
            let known = norm <= FAR && residue <= FAR;
            *bound = Rounded { norm, residue: if known { residue } else { f64::INFINITY } };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The squared distance in f64.
    fn square(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
    }

    /// Seeds that are nearer than what a row has, by however little, are listed, whatever rows are like; of usual rows hardly any other is.
    #[test]
    fn seeds_that_count_are_listed() {
        let Some(amx) = Amx::find() else {
            eprintln!("this machine has no matrix unit, or its system does not lend it: nothing is tested here");
            return;
        };
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let (b, n, d) = (2, 77, 100);
        for kind in ["usual", "far", "alike", "zeros", "huge", "small", "tiny", "not finite"] {
            let base: Vec<f32> = (0..d).map(|_| rng.random_range(-1.0..1.0)).collect();
            let mut value = |i: usize| {
                let noise: f32 = rng.random_range(-1.0..1.0);
                match kind {
                    "far" => 1e6 + noise,
                    "alike" => base[i % d] * (1.0 + 1e-6 * noise),
                    "zeros" => 0.0,
                    "huge" => 3e38 * noise,
                    "small" => 1e-9 * noise,
                    "tiny" => 1e-30 * noise,
                    "not finite" if i % 999 == 5 => [f32::NAN, f32::INFINITY][i % 2],
                    _ => noise,
                }
            };
            let x: Vec<f32> = (0..b * n * d).map(&mut value).collect();
            let row = |b: usize, i: usize| &x[(b * n + i) * d..][..d];
            let point = |b: usize, i: usize, out: &mut [[f32; LANES]]| {
                out.as_flattened_mut()[..d].copy_from_slice(row(b, i));
            };
            let wide = |b: usize, i: usize| row(b, i).iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
            let rounded = RoundedRows::new(amx, [b, n, d], point).unwrap();
            let mut listed = Listed::default();
            for count in [1, 8, 16, 33] {
                let seeds: Vec<u32> = (0..count).map(|t| (t * 7 % n) as u32).collect();
                let (mut others, mut all) = (0, 0);
                for (problem, least) in (0..b).flat_map(|problem| (0..count).map(move |t| (problem, t))) {
                    let filter = rounded.filter(problem, &seeds).unwrap();
                    // What rows have is a little more than the distance to the seed that is next in line.
                    let far = |i: usize| {
                        let mut far: Vec<_> = seeds
                            .iter()
                            .map(|&seed| square(&wide(problem, i), &wide(problem, seed as usize)))
                            .collect();
                        far.sort_by(f64::total_cmp);
                        far
                    };
                    for first in (0..n).step_by(PAIR) {
                        let rows = first..n.min(first + PAIR);
                        let near: Vec<_> = rows.clone().map(|i| far(i)[least] * (1.0 + 1e-5)).collect();
                        let wanted = |near: &f64| (*near > 0.0).then_some(*near);
                        filter.list(first, near.iter().map(wanted), &mut listed);
                        for (i, near) in rows.zip(near) {
                            let own = listed.of(i - first);
                            for (t, &seed) in seeds.iter().enumerate().filter(|_| near > 0.0) {
                                let nearer = square(&wide(problem, i), &wide(problem, seed as usize)) < near;
                                assert!(!nearer || own.contains(&(t as u32)), "{kind}: row {i}, seed {t} of {count}");
                                others += usize::from(!nearer && own.contains(&(t as u32)));
                                all += usize::from(!nearer);
                            }
                        }
                    }
                }
                if ["usual", "small"].contains(&kind) {
                    assert!(20 * others <= all, "{kind}: {others} of {all} are listed although they are too far");
                }
            }
        }
    }
}
