//! The distances of rows to all centroids, or to some, by the definition: each is one chain of operations in order, but of several distances
//! at once, which lie in the lanes of vectors or fill the time that a chain waits for itself.

use super::{
    lines::BYTE_TILE,
    scalar::Scalar,
    tensors::{Element, View},
};
use crate::metric::Metric;
use pulp::NullaryFnOnce;

/// Centroids that lie side by side in lanes: a tile of the matrix unit.
pub(super) const LANES: usize = BYTE_TILE;
/// Rows that meet them at once.
const TOGETHER: usize = 4;

/// Some centroids in columns.
pub(super) struct Columns {
    /// `(d, LANES)`, zeros beyond the last centroid.
    pub values: Vec<f64>,
    /// The norms, by cosine.
    norms: [f64; LANES],
}

impl Columns {
    /// Those of tile `tile`, less a `centre` if there is one.
    pub fn new<T: Element>(c: &View<'_, T>, b: usize, tile: usize, centre: &[f64], metric: Metric) -> Self {
        let (mut values, mut norms) = (vec![0.0; c.rows.d * LANES], [0.0; LANES]);
        for (lane, j) in (tile * LANES..c.rows.n).take(LANES).enumerate() {
            let own = values.iter_mut().skip(lane).step_by(LANES).zip(c.row(b, j));
            match centre {
                [] => own.for_each(|(to, v)| *to = v.wide()),
                centre => own.zip(centre).for_each(|((to, v), m)| *to = v.wide() - m),
            }
            if metric == Metric::Cosine {
                norms[lane] = norm(c.row(b, j).iter().map(|v| v.wide()));
            }
        }
        Self { values, norms }
    }

    /// The sums of their squares.
    pub fn squares(&self) -> [f64; LANES] {
        let square = |mut sums: [f64; LANES], column: &[f64; LANES]| {
            sums.iter_mut().zip(column).for_each(|(sum, v)| *sum += v * v);
            sums
        };
        self.values.as_chunks().0.iter().fold([0.0; LANES], square)
    }
}

/// As the definition takes it.
#[inline(always)]
fn norm(row: impl Iterator<Item = f64>) -> f64 {
    row.fold(0.0, |s, v| s + v * v).sqrt()
}

/// Some rows of problem `b` meet all of its `k` centroids.
pub(super) struct Part<'a, T: Element> {
    pub x: &'a View<'a, T>,
    pub b: usize,
    pub first: usize,
    pub k: usize,
    pub columns: &'a [Columns],
    pub metric: Metric,
    /// Room for the rows.
    pub rows: &'a mut [f64],
    pub out: &'a mut [T::Filter],
}

impl<T: Element> NullaryFnOnce for Part<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match self.metric {
            Metric::SquaredEuclidean => self.run(|s, x, c| {
                let t = x - c;
                s + t * t
            }),
            Metric::Manhattan => self.run(|s, x, c| s + (x - c).abs()),
            Metric::Dot | Metric::Cosine => self.run(|s, x, c| s + x * c),
        }
    }
}

impl<T: Element> Part<'_, T> {
    #[inline(always)]
    fn run(self, step: impl Fn(f64, f64, f64) -> f64) {
        let Self { x, b, first, k, columns, metric, rows, out } = self;
        let (d, count) = (x.rows.d, out.len() / k);
        for (i, row) in rows.chunks_exact_mut(d).take(count).enumerate() {
            row.iter_mut().zip(x.row(b, first + i)).for_each(|(to, v)| *to = v.wide());
        }
        let rows = &rows[..count * d];
        for (tile, columns) in columns.iter().enumerate() {
            let at = tile * LANES;
            let width = LANES.min(k - at);
            let mut write = |i: usize, sums: &[f64; LANES]| {
                let norm = if metric == Metric::Cosine { norm(rows[i * d..][..d].iter().copied()) } else { 0.0 };
                for (lane, out) in out[i * k + at..][..width].iter_mut().enumerate() {
                    *out = T::Filter::of(ended(metric, sums[lane], norm * columns.norms[lane]));
                }
            };
            let groups = rows.chunks_exact(TOGETHER * d);
            let rest = groups.remainder().chunks_exact(d);
            for (group, rows) in groups.enumerate() {
                let rows: [&[f64]; TOGETHER] = std::array::from_fn(|r| &rows[r * d..][..d]);
                let sums = chains(rows, &columns.values, &step);
                (0..TOGETHER).for_each(|r| write(group * TOGETHER + r, &sums[r]));
            }
            for (i, row) in (count / TOGETHER * TOGETHER..).zip(rest) {
                write(i, &chains([row], &columns.values, &step)[0]);
            }
        }
    }
}

/// The sums of rows with all lanes.
#[inline(always)]
fn chains<const N: usize>(
    rows: [&[f64]; N],
    columns: &[f64],
    step: impl Fn(f64, f64, f64) -> f64,
) -> [[f64; LANES]; N] {
    let mut sums = [[0.0; LANES]; N];
    for (column, c) in columns.chunks_exact(LANES).enumerate() {
        for r in 0..N {
            let x = rows[r][column];
            for l in 0..LANES {
                sums[r][l] = step(sums[r][l], x, c[l]);
            }
        }
    }
    sums
}

/// What the definition makes of a sum and, by cosine, of the product of the norms.
#[inline(always)]
fn ended(metric: Metric, sum: f64, norms: f64) -> f64 {
    match metric {
        Metric::Dot => -sum,
        Metric::Cosine if norms == 0.0 => 1.0,
        Metric::Cosine => 1.0 - sum / norms,
        _ => sum,
    }
}

/// Centroids whose chains run at once where they lie anywhere.
pub(super) const FEW: usize = 8;

/// The distances of a row to some centroids.
#[inline(always)]
pub(super) fn distances_to<T: Element>(x: &[T], c: [&[T]; FEW], metric: Metric) -> [f64; FEW] {
    let c = c.map(|c| &c[..x.len()]);
    match metric {
        Metric::SquaredEuclidean => few(x, c, |s, x, c| {
            let t = x - c;
            s + t * t
        }),
        Metric::Manhattan => few(x, c, |s, x, c| s + (x - c).abs()),
        Metric::Dot => few(x, c, |s, x, c| s + x * c).map(|sum| ended(metric, sum, 0.0)),
        Metric::Cosine => {
            let (of_x, of_c) = (norm(x.iter().map(|v| v.wide())), few(x, c, |s, _, c| s + c * c));
            let sums = few(x, c, |s, x, c| s + x * c);
            std::array::from_fn(|i| ended(metric, sums[i], of_x * of_c[i].sqrt()))
        }
    }
}

#[inline(always)]
fn few<T: Element>(x: &[T], c: [&[T]; FEW], step: impl Fn(f64, f64, f64) -> f64) -> [f64; FEW] {
    let mut sums = [0.0; FEW];
    for (column, x) in x.iter().enumerate() {
        for i in 0..FEW {
            sums[i] = step(sums[i], x.wide(), c[i][column].wide());
        }
    }
    sums
}
