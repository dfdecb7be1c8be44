//! All distances by products of matrices, where these prove which f32 the definition rounds to.
//!
//! The definition is a chain of three operations a column without fused ones, which a product takes one of, or, of bytes on a matrix unit
//! (`byte_slices.rs`), much less. A sum in another order differs from the definition in the last bits of an f64, of which an f32 keeps half: so a
//! number `f`, off by at most `e`, decides if `f - e` and `f + e` are rounded to the same f32, which is then that of all between. Where they are not,
//! as of one pair in some hundreds of bytes, or in a hundred thousand of f64, the pair is looked at alone, in f64; and if that leaves it open,
//! the definition is computed. Rows of f64, whose results are not rounded, and Manhattan have the definition alone.
//!
//! # The error bound
//! Values are of f32 at most, whose squares neither overflow nor vanish in f64. Let `u` be the unit of f64 and `g` the gamma of `d` columns
//! (`filter.rs`), which has eight units more than columns.
//!
//! - Squared distances are `|x|^2 + |c|^2 - 2 x.c` of values less a common vector, which keeps data far from the origin near it. Squares and a
//!   product in f64 are off by `d u` of what Cauchy-Schwarz allows them, together by `d u (|x| + |c|)^2`; centring by two units of that, for it
//!   moves both ends of a difference by `u` of their lengths; both additions, and that of `e`, by one each.
//! - Dot products are off by `d u |x| |c|`, and one unit for `e`.
//! - By cosine a product is divided by norms of `d` roundings under a root and two multiplications: `2 d u` of 1, and three units for the rest.
//! - A product of bytes is off by `LOST` times the reaches `R` of both rows, which their norms are not above: twice that in a squared
//!   distance, which is at most `LOST (R^2 + R'^2)`, and a share of `(R + R')^2` at most twice that of both squares; by cosine, divided by both
//!   norms, at most half the squares. So each row has a part of the error, which is added to its part of the distance, and taken from it: that
//!   is a unit more of each row's square, and what is left adds up in two roundings.
//! - A pair alone has the terms of the definition, in several chains: a squared difference is off by a share of less than `g`.
//!
//! The definition itself is off by no more than those in f64, of a squared difference with two units for its terms: twice `g`, or four times by cosine,
//! is what both are apart at most, and the norms that it is multiplied by, which are rounded too, add less than a hundredth of it.

use super::{
    aligned::Aligned,
    amx::Amx,
    byte_slices::{cut_row, sliced_lines, SlicedCentroids, LEVEL, LEVELS, LOST, MOST_COLUMNS},
    filter::gamma,
    lines::{ByteLine, Ends, TileEnds},
    pairwise::{Columns, LANES},
    rows::distance,
    scalar::{end_streams, Scalar},
    tensors::{Element, View},
};
use crate::{error::Result, host, metric::Metric};
use pulp::{Simd, WithSimd};

/// Rows of a task.
pub(super) const ROWS: usize = 96;
/// A row is asked for so many rows before its turn.
const AHEAD: usize = 4;
/// Distances of a problem that are more than caches hold.
const STREAMED: usize = 1 << 23;
/// Columns from which on a product is worth its proof, and rows.
const COLUMNS: usize = 16;
/// Of so many distances one may be left open by products. Where there are more, the definition of all is computed.
const OPEN: usize = 32;
/// So many may be open before that counts.
const SPARED: usize = 512;

/// Whether results of a type are rounded, and products of so many columns are worth their proof.
pub(super) fn worth_proving<T: Element>(metric: Metric, d: usize) -> bool {
    <T::Filter as Scalar>::UNIT > 1e-10 && metric != Metric::Manhattan && d >= COLUMNS
}

/// What a distance is made of beside the product: of a row, or of a centroid.
#[derive(Clone, Copy, Default)]
struct Side {
    square: f64,
    /// The norm; by cosine its inverse, or 0 of zeros. NaN of a row that is not finite, so that nothing is proven by it.
    norm: f64,
}

impl Side {
    #[inline(always)]
    fn new(square: f64, metric: Metric) -> Self {
        let length = square.sqrt();
        let inverse = if length > 0.0 { 1.0 / length } else { 0.0 };
        let known = if square.is_finite() { 1.0 } else { f64::NAN };
        Self { square, norm: known * if metric == Metric::Cosine { inverse } else { length } }
    }

    /// The ends of a row's distances by products of bytes, whose first one has this weight beside the power of two that the row was cut without. The
    /// row has the whole constant of distances by cosine, the centroids none.
    #[inline(always)]
    fn ends(self, (unit, weight): (f64, f64), d: usize, metric: Metric, is_row: bool) -> Ends {
        let g = gamma(d, f64::UNIT);
        let reach = unit * unit * d as f64;
        let (from, error, factor) = match metric {
            Metric::Cosine => {
                let error = 0.5 * LOST * (reach * self.norm * self.norm);
                let (from, constant) = if is_row { (1.0, 4.04 * g) } else { (0.0, 0.0) };
                (from, error + constant, weight * unit * self.norm)
            }
            _ => (self.square, (LOST + 4.04 * g) * reach, weight * unit),
        };
        if self.norm.is_nan() {
            return Ends::UNKNOWN;
        }
        Ends { low: from - error, high: from + error, factor }
    }
}

/// The sides of a tile of centroids.
struct Sides {
    square: [f64; LANES],
    norm: [f64; LANES],
}

impl Sides {
    fn new(sides: [Side; LANES]) -> Self {
        Self { square: sides.map(|side| side.square), norm: sides.map(|side| side.norm) }
    }
}

/// The centroids of a problem as products take them.
pub(super) struct ProvingCentroids {
    /// The common vector of squared distances.
    centre: Vec<f64>,
    factors: Factors,
    sides: Vec<Sides>,
}

enum Factors {
    Columns(Vec<Columns>),
    Slices(SlicedCentroids, Vec<TileEnds>),
}

impl ProvingCentroids {
    pub fn new<T: Element>(c: &View<'_, T>, b: usize, centre: Vec<f64>, metric: Metric) -> Result<Self> {
        let (k, d) = (c.rows.n, c.rows.d);
        let tiles = k.div_ceil(LANES);
        // Dot products are often far smaller than what those of bytes are off by grows with: too many would be open.
        let amx = Amx::find().filter(|_| d <= MOST_COLUMNS && metric != Metric::Dot);
        let columns = host::map("pairwise", tiles, LANES * d, |tile| Columns::new(c, b, tile, &centre, metric))?;
        let sides = |columns: &Columns| Sides::new(columns.squares().map(|square| Side::new(square, metric)));
        let sides: Vec<_> = columns.iter().map(sides).collect();
        let factors = match amx {
            Some(amx) => {
                let row = |j: usize, to: &mut [f64]| {
                    let values = columns[j / LANES].values.iter().skip(j % LANES).step_by(LANES);
                    to.iter_mut().zip(values).for_each(|(to, v)| *to = *v);
                };
                let slices = SlicedCentroids::new(amx, [k, d], row)?;
                let end = |tile: usize, lane: usize| {
                    let Sides { square, norm } = &sides[tile];
                    let unit = slices.units.get(tile * LANES + lane).copied().unwrap_or(0.0);
                    Side { square: square[lane], norm: norm[lane] }.ends((unit, 1.0), d, metric, false)
                };
                let ends = (0..tiles).map(|tile| TileEnds::new(std::array::from_fn(|lane| end(tile, lane)))).collect();
                Factors::Slices(slices, ends)
            }
            None => Factors::Columns(columns),
        };
        Ok(Self { centre, factors, sides })
    }
}

/// Some rows of problem `b`, not more than [`ROWS`], meet all centroids of problem `of`.
pub(super) struct Proof<'a, T: Element> {
    pub x: &'a View<'a, T>,
    pub c: &'a View<'a, T>,
    pub b: usize,
    pub of: usize,
    pub first: usize,
    pub centroids: &'a ProvingCentroids,
    pub metric: Metric,
    pub scratch: &'a mut ProofScratch,
    pub out: &'a mut [T::Filter],
}

/// Room for the rows of a task, and for which distances are open.
#[derive(Default)]
pub(super) struct ProofScratch {
    /// In groups that lie side by side, or one row.
    rows: Vec<f64>,
    sides: Vec<Side>,
    ends: Vec<Ends>,
    /// In tiles.
    slices: Vec<ByteLine>,
    levels: Aligned<i32>,
    /// Distances as they are rounded, in whole tiles, which stay in a cache until their rows are done.
    rounded: Aligned<f32>,
    open: Vec<(u32, u32)>,
}

impl<T: Element> WithSimd for Proof<'_, T> {
    /// Whether all distances are there; some may be none where products leave many open.
    type Output = bool;

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) -> bool {
        self.scratch.open.clear();
        self.scratch.sides.resize(ROWS, Side::default());
        self.scratch.rounded.grow(ROWS * self.stride(), 0.0);
        // So many rows and vectors at once fill the registers that there are.
        let centroids = self.centroids;
        let proven = match (&centroids.factors, S::F64_LANES) {
            (Factors::Slices(slices, ends), _) => self.by_bytes(simd, slices, ends),
            (Factors::Columns(columns), 8) => self.in_groups::<S, 12, 2>(simd, columns),
            (Factors::Columns(columns), 4) => self.in_groups::<S, 6, 2>(simd, columns),
            (Factors::Columns(columns), _) => self.in_groups::<S, 4, 2>(simd, columns),
        };
        if proven {
            self.settle();
        }
        proven
    }
}

impl<T: Element> Proof<'_, T> {
    fn count(&self) -> usize {
        self.out.len() / self.c.rows.n
    }

    /// Distances of a row, in whole tiles.
    fn stride(&self) -> usize {
        self.c.rows.n.next_multiple_of(LANES)
    }

    /// Whether more is open than is worth a look, when some rows have met so many centroids.
    #[inline(always)]
    fn too_much(&self, met: usize) -> bool {
        self.scratch.open.len() > SPARED + met / OPEN
    }

    #[inline(always)]
    fn in_groups<S: Simd, const R: usize, const V: usize>(&mut self, simd: S, columns: &[Columns]) -> bool {
        let (d, count) = (self.x.rows.d, self.count());
        self.scratch.rows.resize(ROWS * d, 0.0);
        for group in 0..count.div_ceil(R) {
            self.pack::<R>(group, count);
        }
        for (tile, columns) in columns.iter().enumerate() {
            for group in 0..count.div_ceil(R) {
                let rows = self.scratch.rows[group * R * d..][..R * d].as_chunks::<R>().0;
                let products = products::<S, R, V>(simd, rows, &columns.values);
                for (r, products) in products.iter().enumerate().take(count - group * R) {
                    self.round(group * R + r, tile, products);
                }
            }
            if self.too_much(count * LANES * (tile + 1)) {
                return false;
            }
        }
        true
    }

    /// Writes a group of `R` rows, less the common vector, side by side.
    #[inline(always)]
    fn pack<const R: usize>(&mut self, group: usize, count: usize) {
        let d = self.x.rows.d;
        let rows = self.scratch.rows[group * R * d..][..R * d].as_chunks_mut::<R>().0;
        for r in 0..R {
            let i = group * R + r;
            if i >= count {
                rows.iter_mut().for_each(|to| to[r] = 0.0);
                continue;
            }
            let row = self.x.row(self.b, self.first + i);
            match &self.centroids.centre[..] {
                [] => rows.iter_mut().zip(row).for_each(|(to, v)| to[r] = v.wide()),
                centre => rows.iter_mut().zip(row).zip(centre).for_each(|((to, v), m)| to[r] = v.wide() - m),
            }
        }
        let mut squares = [0.0; R];
        for row in &*rows {
            for r in 0..R {
                squares[r] += row[r] * row[r];
            }
        }
        let sides = self.scratch.sides[group * R..][..R].iter_mut().zip(squares);
        sides.for_each(|(side, square)| *side = Side::new(square, self.metric));
    }

    /// By products of bytes.
    #[inline(always)]
    fn by_bytes<S: Simd>(&mut self, simd: S, centroids: &SlicedCentroids, ends: &[TileEnds]) -> bool {
        let (d, k, count, stride) = (self.x.rows.d, self.c.rows.n, self.count(), self.stride());
        let len = sliced_lines(d);
        self.scratch.rows.resize(d, 0.0);
        self.scratch.slices.resize(ROWS / LANES * len, ByteLine::ZERO);
        self.scratch.levels.grow(LEVELS, 0);
        self.scratch.ends.clear();
        // A squared distance takes the product twice.
        let weight = if self.metric == Metric::Cosine { LEVEL } else { 2.0 * LEVEL };
        for i in 0..count {
            let (row, to) = (self.x.row(self.b, self.first + i), &mut self.scratch.rows[..]);
            self.x.prefetch(self.b, (self.first + i + AHEAD).min(self.x.rows.n - 1));
            match &self.centroids.centre[..] {
                [] => to.iter_mut().zip(row).for_each(|(to, v)| *to = v.wide()),
                centre => to.iter_mut().zip(row).zip(centre).for_each(|((to, v), m)| *to = v.wide() - m),
            }
            let side = Side::new(f64::squares(simd, to), self.metric);
            let unit = cut_row(to, &mut self.scratch.slices[i / LANES * len..][..len], i % LANES);
            self.scratch.sides[i] = side;
            self.scratch.ends.push(side.ends((unit, weight), d, self.metric, true));
        }
        let mut tiles = centroids.tiles();
        for (tile, of_tile) in ends.iter().enumerate() {
            let centroid_lanes = u32::MAX >> (32 - LANES.min(k - tile * LANES));
            for first in (0..count).step_by(LANES) {
                let ProofScratch { slices, levels, ends, rounded, open, .. } = &mut *self.scratch;
                centroids.multiply(&mut tiles, &slices[first / LANES * len..][..len], tile, levels);
                let rows = (&ends[first..count.min(first + LANES)], of_tile);
                let out = (&mut rounded[first * stride + tile * LANES..], stride);
                centroids.distances(levels, rows, out, |i, differ| {
                    let mut differ = differ & centroid_lanes;
                    while differ != 0 {
                        open.push(((first + i) as u32, tile as u32 * LANES as u32 + differ.trailing_zeros()));
                        differ &= differ - 1;
                    }
                });
            }
            if self.too_much(count * LANES * (tile + 1)) {
                return false;
            }
        }
        true
    }

    /// Makes distances of the products of row `i` and a tile of centroids, and lists those that are open.
    #[inline(always)]
    fn round(&mut self, i: usize, tile: usize, products: &[f64; LANES]) {
        let (own, sides, g) = (self.scratch.sides[i], &self.centroids.sides[tile], gamma(self.x.rows.d, f64::UNIT));
        match self.metric {
            Metric::Dot => self.keep(i, tile, |l| (-products[l], 2.02 * g * (own.norm * sides.norm[l]))),
            Metric::Cosine => self.keep(i, tile, |l| (1.0 - products[l] * (own.norm * sides.norm[l]), 4.04 * g)),
            _ => self.keep(i, tile, |l| {
                let reach = own.norm + sides.norm[l];
                (own.square + sides.square[l] - 2.0 * products[l], 2.02 * g * (reach * reach))
            }),
        }
    }

    /// Writes distances, each with its error, as they are rounded.
    #[inline(always)]
    fn keep(&mut self, i: usize, tile: usize, distance: impl Fn(usize) -> (f64, f64)) {
        let (k, mut rounded, mut differ) = (self.c.rows.n, [0.0f32; LANES], [0u32; LANES]);
        for l in 0..LANES {
            let (f, e) = distance(l);
            let (low, high) = ((f - e) as f32, (f + e) as f32);
            rounded[l] = low;
            // A NaN proves nothing, and neither do zeros of both signs.
            differ[l] = (low.to_bits() ^ high.to_bits()) | u32::from(low.is_nan());
        }
        let at = i * self.stride() + tile * LANES;
        self.scratch.rounded[at..at + LANES].copy_from_slice(&rounded);
        if differ.iter().fold(0, |any, differs| any | differs) != 0 {
            let width = LANES.min(k - tile * LANES);
            for (l, _) in differ.iter().enumerate().take(width).filter(|(_, &differs)| differs != 0) {
                self.scratch.open.push((i as u32, (tile * LANES + l) as u32));
            }
        }
    }

    /// Looks at what is open, pair by pair, and writes all distances.
    #[inline(always)]
    fn settle(&mut self) {
        let (k, g) = (self.c.rows.n, gamma(self.x.rows.d, f64::UNIT));
        let stride = self.stride();
        let ProofScratch { open, sides, rounded, .. } = &mut *self.scratch;
        for &(i, j) in &*open {
            let (row, centroid) = (self.x.row(self.b, self.first + i as usize), self.c.row(self.of, j as usize));
            let norms = sides[i as usize].norm * self.centroids.sides[j as usize / LANES].norm[j as usize % LANES];
            let (f, e) = match self.metric {
                Metric::Dot => (-alone(row, centroid, |s, x, c| s + x * c), 2.02 * g * norms),
                Metric::Cosine => (1.0 - alone(row, centroid, |s, x, c| s + x * c) * norms, 4.04 * g),
                _ => {
                    let square = alone(row, centroid, |s, x, c| {
                        let t = x - c;
                        s + t * t
                    });
                    (square, 2.02 * g * square)
                }
            };
            let (low, high) = ((f - e) as f32, (f + e) as f32);
            let proven = low.to_bits() == high.to_bits() && !low.is_nan();
            // Rounded to the type of the results, which is f32 wherever something is to be proven.
            rounded[i as usize * stride + j as usize] =
                if proven { low } else { distance(row, centroid, self.metric) as f32 };
        }
        // What caches have room for stays there for whoever reads it next.
        let streams = self.x.rows.n * k >= STREAMED;
        for (out, rounded) in self.out.chunks_exact_mut(k).zip(rounded.chunks_exact(stride)) {
            if streams {
                T::Filter::stream_f32s(&rounded[..k], out);
            } else {
                out.iter_mut().zip(rounded).for_each(|(to, &v)| *to = T::Filter::of(f64::from(v)));
            }
        }
        end_streams();
    }
}

/// The sum over all columns of a row and a centroid, in several chains.
#[inline(always)]
fn alone<T: Element>(x: &[T], c: &[T], f: impl Fn(f64, f64, f64) -> f64) -> f64 {
    let mut sums = [0.0; LANES];
    let ((xs, x_rest), (cs, c_rest)) = (x.as_chunks::<LANES>(), c.as_chunks::<LANES>());
    for (x, c) in xs.iter().zip(cs) {
        for l in 0..LANES {
            sums[l] = f(sums[l], x[l].wide(), c[l].wide());
        }
    }
    let rest = x_rest.iter().zip(c_rest).fold(0.0, |sum, (x, c)| f(sum, x.wide(), c.wide()));
    sums.iter().sum::<f64>() + rest
}

/// The products of `R` rows and the centroids of a tile, of which `V` vectors at a time.
#[inline(always)]
fn products<S: Simd, const R: usize, const V: usize>(simd: S, rows: &[[f64; R]], columns: &[f64]) -> [[f64; LANES]; R] {
    let mut out = [[0.0; LANES]; R];
    for at in (0..LANES).step_by(V * S::F64_LANES) {
        let mut sums = [[simd.splat_f64s(0.0); V]; R];
        for (row, column) in rows.iter().zip(columns.as_chunks::<LANES>().0) {
            let c = &S::as_simd_f64s(&column[at..at + V * S::F64_LANES]).0[..V];
            for r in 0..R {
                let x = simd.splat_f64s(row[r]);
                for v in 0..V {
                    sums[r][v] = simd.mul_add_e_f64s(x, c[v], sums[r][v]);
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            let to = S::as_mut_simd_f64s(&mut out[at..at + V * S::F64_LANES]).0;
            to.copy_from_slice(&sums);
        }
    }
    out
}
