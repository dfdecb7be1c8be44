//! Products with weights that are looked up: codes are read as they lie, and no more than a tile of weights is ever there as numbers.
//!
//! Of few rows two blocks of codes at a time become numbers in registers and are multiplied at once; of many, a tile of outputs is decoded and
//! handed to `gemm`. Values of rows lie in the order in which codes are looked up (`lanes.rs`).

use super::{
    matmul::multiply,
    tensors::{lock, or, single, tensor, Element, View},
};
use crate::{
    error::Result,
    host,
    request::LutMatrix,
    rows::Rows,
    tiles::{CPU_LUT_OUTPUTS, CPU_LUT_ROWS},
};
use candle_core::Tensor;
use half::f16;
use lanes::{number, Lanes, Plain, FIELDS, LANES, NUMBERS, PAIR};
#[cfg(target_arch = "x86_64")]
use pulp::x86::{V3, V4};
use pulp::NullaryFnOnce;

mod lanes;

const OP: &str = "lut_product";
const BLOCK: usize = LutMatrix::BLOCK;

pub(super) fn product(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
    let m = x.n;
    let (few, none) = (m <= CPU_LUT_ROWS, w.levels);
    let [xs, codes, levels, scales, places, extra, bias_of] = lock([
        &x.operand,
        w.codes,
        w.levels,
        w.scales,
        or(w.outliers.map(|o| o.columns), none),
        or(w.outliers.map(|o| o.values), none),
        or(bias, none),
    ]);
    let weights = Weights {
        bits: w.bits,
        blocks: w.columns() / BLOCK,
        codes: codes.flat()?,
        levels: levels.flat()?,
        scales: scales.flat()?,
        tables: w.tables(),
        groups: w.scales.dims()[1],
        outliers: match w.outliers {
            Some(_) => (places.flat()?, extra.flat()?),
            None => (&[], &[]),
        },
        outliers_each: w.outliers.map_or(Ok(0), |o| o.columns.dim(1))?,
    };
    let bias = bias.map(|_| bias_of.flat::<f32>()).transpose()?;
    let (outputs, columns) = (w.codes.dims()[0], weights.columns());
    single!(x.dtype(), T => {
        let rows = arranged::<T>(&xs.view(x)?, columns)?;
        let mut products = host::filled(OP, outputs * m, 0f32)?;
        let tiles = products.chunks_mut(CPU_LUT_OUTPUTS * m).zip((0..).step_by(CPU_LUT_OUTPUTS)).collect();
        let scratch = || if few { vec![] } else { vec![0f32; CPU_LUT_OUTPUTS * columns] };
        let steps = CPU_LUT_OUTPUTS * columns * (4 + m) / 64;
        host::for_each(tiles, steps, scratch, |tile: &mut Vec<f32>, (out, first)| {
            if few {
                dispatch(Few { weights: &weights, rows: &rows, first, out });
                return Ok(());
            }
            let tile = &mut tile[..out.len() / m * columns];
            dispatch(Decode { weights: &weights, first, tile });
            multiply(tile, &rows, columns, out);
            Ok(())
        })?;
        let mut out = host::filled(OP, outputs * m, T::narrow(0.0))?;
        for (row, out) in out.chunks_exact_mut(outputs).enumerate() {
            for (o, out) in out.iter_mut().enumerate() {
                let product = products[o * m + row] + bias.map_or(0.0, |bias| bias[o]);
                *out = T::narrow(f64::from(product));
            }
        }
        tensor(out, (m, outputs))
    })
}

/// The place in a row at which the value of a column lies.
#[inline(always)]
fn place(column: usize) -> usize {
    let (pair, block, field, number) =
        (column / PAIR, column % PAIR / BLOCK, column % BLOCK / NUMBERS, column % NUMBERS);
    pair * PAIR + field * LANES + block * NUMBERS + number
}

/// Rows in f32, in the order of codes, with zeros up to so many columns.
fn arranged<T: Element<Filter = f32>>(x: &View<'_, T>, columns: usize) -> Result<Vec<f32>> {
    let d = x.rows.d;
    let mut rows = host::filled(OP, x.rows.n * columns, 0f32)?;
    let all = rows.chunks_exact_mut(columns).enumerate().collect();
    host::for_each(
        all,
        d,
        || vec![0f32; d],
        |scratch: &mut Vec<f32>, (i, out): (usize, &mut [f32])| {
            let row = x.row(0, i);
            let values = match T::as_filter(row) {
                Some(values) => values,
                None => {
                    T::filter_row(row, scratch);
                    scratch
                }
            };
            for (eight, values) in values.chunks(NUMBERS).enumerate() {
                out[place(eight * NUMBERS)..][..values.len()].copy_from_slice(values);
            }
            Ok(())
        },
    )?;
    Ok(rows)
}

/// Weights as [`LutMatrix`] has them, in memory.
struct Weights<'a> {
    bits: usize,
    /// Blocks of an output.
    blocks: usize,
    codes: &'a [u8],
    levels: &'a [f16],
    scales: &'a [f16],
    /// Tables of an output, or 0 if all share one; and scales.
    tables: usize,
    groups: usize,
    outliers: (&'a [u32], &'a [f16]),
    outliers_each: usize,
}

/// A pass over weights is compiled for each number of bits, for blocks of a pair that share a table or not, and for each kind of processor.
trait Pass {
    fn weights(&self) -> &Weights<'_>;
    fn run<const BITS: usize, const APART: bool, L: Lanes>(self, lanes: L);
}

/// A struct for the reason that `Pack` in assign.rs is one.
struct Run<P, L>(P, L);

impl<P: Pass, L: Lanes> NullaryFnOnce for Run<P, L> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Weights { bits, blocks, tables, .. } = *self.0.weights();
        let apart = tables > 1 && !(blocks / tables).is_multiple_of(2);
        match (bits, apart) {
            (2, false) => self.0.run::<2, false, L>(self.1),
            (3, false) => self.0.run::<3, false, L>(self.1),
            (_, false) => self.0.run::<4, false, L>(self.1),
            (2, true) => self.0.run::<2, true, L>(self.1),
            (3, true) => self.0.run::<3, true, L>(self.1),
            (_, true) => self.0.run::<4, true, L>(self.1),
        }
    }
}

fn dispatch(pass: impl Pass) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V4::try_new() {
        return simd.vectorize(Run(pass, simd));
    }
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V3::try_new() {
        return simd.vectorize(Run(pass, simd));
    }
    Run(pass, Plain).call()
}

impl<'a> Weights<'a> {
    /// Columns of an output, whole pairs of blocks.
    fn columns(&self) -> usize {
        self.blocks.next_multiple_of(2) * BLOCK
    }

    /// The columns and values of an output's outliers.
    #[inline(always)]
    fn outliers(&self, o: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let own = o * self.outliers_each..(o + 1) * self.outliers_each;
        self.outliers.0[own.clone()].iter().zip(&self.outliers.1[own]).map(|(&c, v)| (place(c as usize), v.to_f32()))
    }

    /// Calls `f` with the levels of each pair of blocks of an output, field by field, and what they are to be multiplied by.
    #[inline(always)]
    fn pairs<const BITS: usize, const APART: bool, L: Lanes>(
        &self,
        lanes: L,
        o: usize,
        mut f: impl FnMut(usize, [L::Floats; FIELDS], L::Floats),
    ) {
        let (blocks, bytes) = (self.blocks, NUMBERS * BITS);
        let codes = &self.codes[o * blocks * bytes..][..blocks * bytes];
        let scales = &self.scales[o * self.groups..][..self.groups];
        let levels = match self.tables {
            0 => self.levels,
            tables => &self.levels[o * (tables << BITS)..][..tables << BITS],
        };
        let (scale_blocks, table_blocks) = (blocks / self.groups, blocks / self.tables.max(1));
        let table = |block: usize| lanes.table::<BITS>(&levels[(block / table_blocks) << BITS..]);
        let mut tables = [table(0); 2];
        for first in (0..blocks).step_by(2) {
            let last = (first + 1).min(blocks - 1);
            if APART {
                tables = [table(first), table(last)];
            } else if first > 0 && first.is_multiple_of(table_blocks) {
                tables = [table(first); 2];
            }
            let own = &codes[first * bytes..];
            let numbers = match own.get(..2 * bytes) {
                Some(pair) => lanes.numbers::<BITS>(pair),
                // Beyond the last block codes are zeros, and so are the values of rows.
                None => {
                    let mut pair = [0; 16 * 4];
                    pair[..bytes].copy_from_slice(own);
                    lanes.numbers::<BITS>(&pair[..2 * bytes])
                }
            };
            let scale = lanes.of_blocks([first, last].map(|block| number(scales[block / scale_blocks])));
            f(first / 2, std::array::from_fn(|field| lanes.levels::<BITS, APART>(tables, &numbers, field)), scale);
        }
    }
}

/// The products of at most [`CPU_LUT_ROWS`] rows with outputs from `first` on.
struct Few<'a> {
    weights: &'a Weights<'a>,
    rows: &'a [f32],
    first: usize,
    /// Output by output.
    out: &'a mut [f32],
}

impl Pass for Few<'_> {
    fn weights(&self) -> &Weights<'_> {
        self.weights
    }

    #[inline(always)]
    fn run<const BITS: usize, const APART: bool, L: Lanes>(self, lanes: L) {
        let Self { weights, rows, first, out } = self;
        let (columns, zero) = (weights.columns(), lanes.load(&[0.0; LANES]));
        let m = rows.len() / columns;
        for (o, out) in (first..).zip(out.chunks_exact_mut(m)) {
            let mut sums = [zero; CPU_LUT_ROWS];
            weights.pairs::<BITS, APART, L>(lanes, o, |pair, levels, scale| {
                for (sum, x) in sums.iter_mut().zip(rows.chunks_exact(columns)) {
                    // Two sums, so that no addition waits for the one before it.
                    let mut parts = [zero; 2];
                    let x = x[pair * PAIR..][..PAIR].as_chunks::<LANES>().0;
                    for (i, (x, levels)) in x.iter().zip(levels).enumerate() {
                        parts[i % 2] = lanes.mul_add(lanes.load(x), levels, parts[i % 2]);
                    }
                    *sum = lanes.mul_add(parts[0], scale, *sum);
                    *sum = lanes.mul_add(parts[1], scale, *sum);
                }
            });
            for ((out, sum), x) in out.iter_mut().zip(sums).zip(rows.chunks_exact(columns)) {
                let outliers: f32 = weights.outliers(o).map(|(at, v)| x[at] * v).sum();
                *out = lanes.sum(sum) + outliers;
            }
        }
    }
}

/// Weights of outputs from `first` on as numbers, in the order of rows.
struct Decode<'a> {
    weights: &'a Weights<'a>,
    first: usize,
    tile: &'a mut [f32],
}

impl Pass for Decode<'_> {
    fn weights(&self) -> &Weights<'_> {
        self.weights
    }

    #[inline(always)]
    fn run<const BITS: usize, const APART: bool, L: Lanes>(self, lanes: L) {
        let Self { weights, first, tile } = self;
        for (o, out) in (first..).zip(tile.chunks_exact_mut(weights.columns())) {
            let to = out.as_chunks_mut::<LANES>().0;
            weights.pairs::<BITS, APART, L>(lanes, o, |pair, levels, scale| {
                for (levels, to) in levels.into_iter().zip(&mut to[pair * FIELDS..]) {
                    lanes.store(lanes.mul(levels, scale), to);
                }
            });
            weights.outliers(o).for_each(|(at, v)| out[at] += v);
        }
    }
}
