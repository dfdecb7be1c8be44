//! Exact sums of rows by cluster, and medians.

use super::{
    median::median,
    rows::Scan,
    scalar::Scalar,
    tensors::{Element, View},
};
use crate::{
    error::Result,
    fixed::{self, Grid, Scaled},
    host,
    plan::update::UpdateKernel,
    tiles::{CPU_SUM_BLOCK, CPU_SUM_ROWS, CPU_SUM_WHOLE},
};
use pulp::NullaryFnOnce;
use std::ops::Range;

/// Rows in label order (or, without one, all in one cluster as they lie), with their factors and the bounds of their terms.
pub(super) struct Sorted<'a, T> {
    pub(super) kernel: UpdateKernel,
    pub(super) x: View<'a, T>,
    pub(super) factor: Option<&'a [f64]>,
    pub(super) order: Option<&'a [u32]>,
    pub(super) offsets: Option<&'a [u32]>,
    pub(super) max_abs: &'a [f64],
    pub(super) first_nonfinite: &'a [u32],
    pub(super) max_weight: Option<&'a [f64]>,
    pub(super) k: usize,
    /// The rows that sums have room for, and the planes that they have; none for as many as terms need.
    pub(super) grid_rows: usize,
    pub(super) planes: Option<usize>,
}

impl<T: Element> Sorted<'_, T> {
    pub(super) fn range(&self, b: usize, j: usize) -> Range<usize> {
        match self.offsets {
            Some(offsets) => offsets[b * (self.k + 1) + j] as usize..offsets[b * (self.k + 1) + j + 1] as usize,
            None => 0..self.x.rows.n,
        }
    }

    /// Whether a row counts, which it does if all of its values are finite.
    fn counts(&self, b: usize, row: usize) -> bool {
        self.all_count(b) || self.x.row(b, row).iter().fold(true, |all, v| all & v.wide().is_finite())
    }

    /// True if all rows of a problem are known to count.
    pub(super) fn all_count(&self, b: usize) -> bool {
        self.first_nonfinite[b] == u32::MAX
    }

    /// The rows of a cluster that count.
    fn members(&self, b: usize, j: usize) -> impl Iterator<Item = usize> + '_ {
        self.range(b, j).map(move |place| self.row(b, place)).filter(move |&row| self.counts(b, row))
    }

    /// The weight of a row that counts.
    fn row_weight(&self, b: usize, row: usize) -> f64 {
        self.factor.map_or(1.0, |factor| factor[b * self.x.rows.n + row])
    }

    /// The sum of a cluster's weights, of whose rows `all` count or some may not, and its grid.
    pub(super) fn weight(&self, b: usize, j: usize, all: bool) -> (Sums, Grid) {
        let mut sum = Sums::new(1);
        let Some(max_weight) = self.max_weight else {
            let rows = if all { self.range(b, j).len() } else { self.members(b, j).count() };
            sum.first()[0] = rows as i128;
            return (sum, UNITS);
        };
        let grid = self.grid(max_weight[b]);
        for row in self.members(b, j) {
            sum.add(0, self.row_weight(b, row), grid);
        }
        (sum, grid)
    }

    /// A bound on the terms at some positions, and whether all of the rows count: what is known of the problem, or else of these.
    fn bounds(&self, b: usize, Range { start, end }: Range<usize>) -> Result<(f64, bool)> {
        if self.max_abs[b] < f64::INFINITY {
            return Ok((self.max_abs[b], self.all_count(b)));
        }
        let part = |p: usize| {
            let places = start + p * CPU_SUM_ROWS..end.min(start + (p + 1) * CPU_SUM_ROWS);
            let order = self.order.map(|order| &order[b * self.x.rows.n..]);
            let (max_abs, first_nonfinite) = pulp::Arch::new().dispatch(Scan { x: &self.x, b, order, places });
            (max_abs, first_nonfinite == u32::MAX)
        };
        let parts = (end - start).div_ceil(CPU_SUM_ROWS);
        let join = |a: (f64, bool), b: (f64, bool)| (a.0.max(b.0), a.1 & b.1);
        let found = host::reduce(parts, CPU_SUM_ROWS * self.x.rows.d / 4, part, join)?;
        Ok(found.unwrap_or((0.0, true)))
    }

    /// The grid of sums of terms up to `max_abs`.
    pub(super) fn grid(&self, max_abs: f64) -> Grid {
        grid(max_abs, self.grid_rows, self.planes)
    }

    /// Asks for the rows at some places ahead of their turn, which may be that of another cluster.
    #[inline(always)]
    fn prefetch(&self, b: usize, places: Range<usize>) {
        if let Some(order) = self.order {
            let order = &order[b * self.x.rows.n..][..self.x.rows.n];
            let places = places.start.min(order.len())..places.end.min(order.len());
            order[places].iter().for_each(|&row| self.x.prefetch(b, row as usize));
        }
    }

    #[inline(always)]
    fn row(&self, b: usize, place: usize) -> usize {
        self.order.map_or(place, |order| order[b * self.x.rows.n + place] as usize)
    }

    /// The sums of the columns, and whether all of the rows count; none of no rows.
    pub(super) fn sums(&self, b: usize, j: usize, scratch: &mut Scratch) -> Result<Option<(Totals, bool)>> {
        let Range { start, end } = self.range(b, j);
        if (1..=CPU_SUM_WHOLE).contains(&(end - start)) {
            let mut sums = vec![0.0; self.x.rows.d];
            let add = AddInF64 { rows: self, b, positions: start..end, scratch, sums: &mut sums };
            if pulp::Arch::new().dispatch(add) {
                return Ok(Some((Totals::Exact(sums), true)));
            }
        }
        let (max_abs, all) = self.bounds(b, start..end)?;
        let grid = self.grid(max_abs);
        let part = |p: usize| self.sum(b, start + p * CPU_SUM_ROWS..end.min(start + (p + 1) * CPU_SUM_ROWS), grid);
        let parts = (end - start).div_ceil(CPU_SUM_ROWS);
        let sums = host::reduce(parts, CPU_SUM_ROWS * self.x.rows.d, part, Sums::join)?;
        Ok(sums.map(|sums| (Totals::Digits(sums, grid), all)))
    }

    /// Sums as digits of their grid.
    pub(super) fn digits(&self, b: usize, totals: Totals) -> Sums {
        match totals {
            Totals::Digits(sums, _) => sums,
            Totals::Exact(totals) => {
                let (mut sums, grid) = (Sums::new(totals.len()), self.grid(self.max_abs[b]));
                totals.into_iter().enumerate().for_each(|(c, total)| sums.add(c, total, grid));
                sums
            }
        }
    }

    /// Sums some positions of problem `b`.
    ///
    /// The integer of most terms is split over a few f64 *limbs*, each a whole number of its own unit (2^26 apart) and
    /// small enough that f64 addition of thousands of them is exact: integer sums at the speed of f64 adds. A term with
    /// bits below the last limb (a small one) adds its remainder as integers, to as many planes as that reaches.
    fn sum(&self, b: usize, positions: Range<usize>, grid: Grid) -> Sums {
        // Products with a factor carry 53 bits, plain f32 and shorter at most 24.
        if self.factor.is_some() || size_of::<T>() == 8 {
            self.sum_limbs::<3>(b, positions, grid)
        } else {
            self.sum_limbs::<2>(b, positions, grid)
        }
    }

    fn sum_limbs<const LIMBS: usize>(&self, b: usize, positions: Range<usize>, grid: Grid) -> Sums {
        // Every term is below 2^top; adding and taking away 1.5 * 2^(52 + e) rounds to a multiple of 2^e.
        let top = 126 - grid.scale - (usize::BITS - self.grid_rows.leading_zeros()) as i32;
        let units: [i32; LIMBS] = std::array::from_fn(|l| top - 26 * (l as i32 + 1));
        let rounders = units.map(|e| 1.5 * 2f64.powi(52 + e));
        let extreme = !(-900..900).contains(&top);
        let mut limbs = vec![0f64; LIMBS * self.x.rows.d];
        let mut sums = Sums::new(self.x.rows.d);
        let rounders = if extreme { &[][..] } else { &rounders };
        let add = AddRows { rows: self, b, positions, grid, rounders, limbs: &mut limbs, sums: &mut sums };
        pulp::Arch::new().dispatch(add);
        for (limb, unit) in limbs.chunks_exact(self.x.rows.d).zip(units) {
            let whole = 2f64.powi(-unit);
            let sums = sums.first().iter_mut();
            // Fewer bits than an f64 has, which an i64 takes faster than an i128.
            sums.zip(limb).for_each(|(s, &v)| *s += i128::from((v * whole) as i64) << (unit + grid.scale));
        }
        sums
    }

    /// The medians of the columns; none of no weight.
    pub(super) fn medians(&self, b: usize, j: usize) -> Option<Vec<f64>> {
        let members: Vec<_> = self.members(b, j).map(|row| (row, self.row_weight(b, row))).collect();
        let members: Vec<_> = members.into_iter().filter(|&(_, weight)| weight > 0.0 && weight.is_finite()).collect();
        let mut column = Vec::with_capacity(members.len());
        let median = |c: usize| {
            column.clear();
            column.extend(members.iter().map(|&(i, weight)| (self.x.row(b, i)[c].wide(), weight)));
            median(&mut column, self.max_weight.map(|max_weight| self.grid(max_weight[b])))
        };
        (!members.is_empty()).then(|| (0..self.x.rows.d).map(median).collect())
    }
}

/// The grid of sums that count rows.
pub(super) const UNITS: Grid = Grid { scale: 0, planes: 1 };

/// The grid of sums of at most `rows` terms up to `max_abs`, of so many planes or as many as terms need.
pub(super) fn grid(max_abs: f64, rows: usize, planes: Option<usize>) -> Grid {
    planes.map_or_else(|| Grid::of_f64(max_abs, rows), |planes| Grid::new(max_abs, rows, planes))
}

/// The sums of columns.
pub(super) enum Totals {
    /// Themselves, which f64 holds.
    Exact(Vec<f64>),
    Digits(Sums, Grid),
}

/// The sums of columns as digits of Kulisch accumulators (see [`Grid`]): a plane has one of each column. Planes after the first are
/// there once a term needs them, which few sums' do.
pub(super) struct Sums(pub(super) Vec<Vec<i128>>);

impl Sums {
    pub(super) fn new(d: usize) -> Self {
        Self(vec![vec![0; d]])
    }

    /// The first plane, which takes most terms as they are.
    pub(super) fn first(&mut self) -> &mut [i128] {
        &mut self.0[0]
    }

    /// Adds a term to planes, whatever its exponent.
    fn add(&mut self, column: usize, v: f64, grid: Grid) {
        grid.split(v, |plane, units| {
            let d = self.0[0].len();
            self.0.resize_with(self.0.len().max(plane + 1), || vec![0; d]);
            self.0[plane][column] += units;
        });
    }

    /// The sums of both.
    fn join(mut self, mut other: Self) -> Self {
        if self.0.len() < other.0.len() {
            std::mem::swap(&mut self, &mut other);
        }
        for (a, b) in self.0.iter_mut().zip(other.0) {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        }
        self
    }

    /// Each sum, rounded once.
    pub(super) fn rounded(&self, grid: Grid) -> Vec<Scaled> {
        let column = |c: usize| self.0.iter().map(|plane| plane[c]).collect::<Vec<_>>();
        match &self.0[..] {
            [first] => first.iter().map(|&q| Scaled::of(q, grid.scale)).collect(),
            planes => (0..planes[0].len()).map(|c| grid.rounded(&column(c))).collect(),
        }
    }
}

/// A thread uses this from cluster to cluster.
pub(super) struct Scratch {
    /// For each column the bits of the least magnitude but 0, less 1, and of the largest magnitude.
    least: Vec<u32>,
    most: Vec<u32>,
    /// Rows that are widened.
    rows: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(d: usize) -> Self {
        Self { least: vec![0; d], most: vec![0; d], rows: vec![0.0; TOGETHER * d] }
    }
}

/// Adds rows up in f64, and says whether that was exact: terms of f32 have 24 bits, and where those of a column lie within as many
/// powers of two as an f64 has bits left, no addition rounds. It is a struct for the reason that `Pack` in assign.rs is one.
struct AddInF64<'a, T> {
    rows: &'a Sorted<'a, T>,
    b: usize,
    positions: Range<usize>,
    scratch: &'a mut Scratch,
    /// Zeros.
    sums: &'a mut [f64],
}

impl<T: Element> NullaryFnOnce for AddInF64<'_, T> {
    type Output = bool;

    #[inline(always)]
    fn call(self) -> bool {
        let Self { rows, b, positions, scratch: Scratch { least, most, rows: widened }, sums } = self;
        if rows.factor.is_some() || size_of::<T>() == 8 {
            return false;
        }
        least.fill(u32::MAX);
        most.fill(0);
        let (d, count) = (sums.len(), positions.len());
        for first in positions.clone().step_by(TOGETHER) {
            rows.prefetch(b, first + AHEAD..first + AHEAD + TOGETHER);
            let mut together = [&[][..]; TOGETHER];
            let rows_left = (positions.end - first).min(TOGETHER);
            for (i, (row, widened)) in together.iter_mut().zip(widened.chunks_exact_mut(d)).enumerate().take(rows_left)
            {
                *row = T::as_f32(rows.x.row(b, rows.row(b, first + i)), widened).expect("not f64");
            }
            if rows_left == TOGETHER {
                add_rows(&together, sums, least, most);
            } else {
                together[..rows_left].iter().for_each(|&row| add_rows(&[row], sums, least, most));
            }
        }
        // By exponents, of which those of subnormal numbers are that of the least normal one.
        let exponent = |bits: u32| (bits >> 23).max(1);
        let bits = 24 + usize::BITS - count.leading_zeros();
        let (mut most_bits, mut largest, mut lowest) = (0, 0, u32::MAX);
        for (&least, &most) in least.iter().zip(&*most) {
            let (least, most) = (exponent(least.wrapping_add(1)), exponent(most));
            most_bits = most_bits.max(most - least.min(most));
            (largest, lowest) = (largest.max(most), lowest.min(least));
        }
        // NaN and infinities have the largest exponent. A sum of few planes rounds terms below them down, one by one.
        let unit = rows.planes.map_or(i32::MIN, |_| rows.grid(rows.max_abs[b]).unit());
        most_bits + bits <= f64::MANTISSA_DIGITS && largest < 255 && lowest as i32 - 150 >= unit
    }
}

/// Adds `R` rows to the sums, and widens what is known of the columns' magnitudes.
#[inline(always)]
fn add_rows<const R: usize>(rows: &[&[f32]; R], sums: &mut [f64], least: &mut [u32], most: &mut [u32]) {
    let d = sums.len();
    let (least, most) = (&mut least[..d], &mut most[..d]);
    let mut of = [&[][..]; R];
    for r in 0..R {
        of[r] = &rows[r][..d];
    }
    for c in 0..d {
        let (mut sum, mut low, mut high) = (0.0, least[c], most[c]);
        for row in of {
            let magnitude = row[c].to_bits() & 0x7fff_ffff;
            low = low.min(magnitude.wrapping_sub(1));
            high = high.max(magnitude);
            sum += row[c] as f64;
        }
        sums[c] += sum;
        (least[c], most[c]) = (low, high);
    }
}

/// Adds the limbs of some terms to `limbs`, and their remainders (without rounders: all of them) to `sums`. It is a struct for the
/// reason that `Pack` in assign.rs is one.
struct AddRows<'a, T> {
    rows: &'a Sorted<'a, T>,
    b: usize,
    positions: Range<usize>,
    grid: Grid,
    rounders: &'a [f64],
    limbs: &'a mut [f64],
    sums: &'a mut Sums,
}

impl<T: Element> NullaryFnOnce for AddRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { rows, b, positions, grid, rounders, limbs, sums } = self;
        let (n, d, dirty) = (rows.x.rows.n, rows.x.rows.d, !rows.all_count(b));
        let row = |p: usize| rows.row(b, p);
        let (mut values, mut rest) = (vec![Scalar::of(0.0); d], vec![0f64; d]);
        let mut scratch = Scratch::new(d);
        for start in positions.clone().step_by(CPU_SUM_BLOCK) {
            let block = start..positions.end.min(start + CPU_SUM_BLOCK);
            rest.fill(0.0);
            let add = AddInF64 { rows, b, positions: block.clone(), scratch: &mut scratch, sums: &mut rest };
            if add.call() {
                add_terms(&mut rest, grid, rounders, limbs, sums);
                continue;
            }
            for p in block {
                rows.prefetch(b, p + AHEAD..p + AHEAD + 1);
                T::filter_row(rows.x.row(b, row(p)), &mut values);
                let factor = rows.factor.map_or(1.0, |f| f[b * n + row(p)]);
                if dirty && !values.iter().all(|v| v.widen().is_finite()) {
                    continue;
                }
                for (r, v) in rest.iter_mut().zip(&values) {
                    let v = v.widen() * factor;
                    *r = if v.abs() < f64::INFINITY { v } else { 0.0 };
                }
                add_terms(&mut rest, grid, rounders, limbs, sums);
            }
        }
    }
}

/// Adds the limbs of a term of each column, and what is left of it.
#[inline(always)]
fn add_terms(rest: &mut [f64], grid: Grid, rounders: &[f64], limbs: &mut [f64], sums: &mut Sums) {
    for (sums, &rounder) in limbs.chunks_exact_mut(rest.len()).zip(rounders) {
        for (sum, r) in sums.iter_mut().zip(&mut *rest) {
            let limb = (*r + rounder) - rounder;
            *sum += limb;
            *r -= limb;
        }
    }
    if rest.iter().fold(0, |any, r| any | r.to_bits() << 1) != 0 {
        for (c, &r) in rest.iter().enumerate().filter(|(_, &r)| r != 0.0) {
            match fixed::quantise(r, grid.scale) {
                Some(v) => sums.first()[c] += v,
                None => sums.add(c, r, grid),
            }
        }
    }
}

/// Rows that are added together, which loads and stores sums once.
const TOGETHER: usize = 4;
/// Rows in label order lie anywhere: this many are asked for ahead of their turn.
const AHEAD: usize = 8;
