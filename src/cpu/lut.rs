//! Products with weights that are looked up: codes are read as they lie, and no more than a tile of weights is ever there as numbers.
//!
//! Of few rows each block of codes becomes numbers in registers and is multiplied at once; of many, a tile of outputs is decoded and
//! handed to `gemm`.

use super::{
    matmul::multiply,
    tensors::{lock, or, tensor, typed, Element, View},
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
use pulp::NullaryFnOnce;
#[cfg(target_arch = "x86_64")]
use pulp::{cast, x86::V3};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m256, __m256i};

const OP: &str = "lut_product";
/// Columns whose codes lie together, as [`LutMatrix`] has them: eight vectors.
const BLOCK: usize = LutMatrix::BLOCK;
const LANES: usize = 8;
/// Levels of a table, at most.
const LEVELS: usize = 16;

pub(super) fn product(x: &Rows, w: &LutMatrix<'_>) -> Result<Tensor> {
    let (m, columns) = (x.n, w.columns());
    let (few, none) = (m <= CPU_LUT_ROWS, w.levels);
    let [xs, codes, levels, scales, places, extra] = lock([
        &x.operand,
        w.codes,
        w.levels,
        w.scales,
        or(w.outliers.map(|o| o.columns), none),
        or(w.outliers.map(|o| o.values), none),
    ]);
    let rows = typed!(x.dtype(), T => padded::<T>(&xs.view(x)?, columns))?;
    let outliers = match w.outliers {
        Some(_) => (places.flat::<u32>()?, extra.flat::<f16>()?),
        None => (&[][..], &[][..]),
    };
    let weights = Weights {
        bits: w.bits,
        columns,
        codes: codes.flat()?,
        levels: levels.flat()?,
        scales: scales.flat()?,
        tables: w.tables(),
        groups: w.scales.dims()[1],
        outliers,
        outliers_each: w.outliers.map_or(Ok(0), |o| o.columns.dim(1))?,
    };
    let outputs = w.codes.dims()[0];
    let mut out = host::filled(OP, outputs * m, 0f32)?;
    let tiles = out.chunks_mut(CPU_LUT_OUTPUTS * m).zip((0..).step_by(CPU_LUT_OUTPUTS)).collect();
    let scratch = || if few { vec![] } else { vec![0f32; CPU_LUT_OUTPUTS * columns] };
    let steps = CPU_LUT_OUTPUTS * columns * (4 + m) / 16;
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
    Ok(tensor(out, (outputs, m))?.t()?)
}

/// Rows in f32, with zeros up to so many columns.
fn padded<T: Element>(x: &View<'_, T>, columns: usize) -> Result<Vec<f32>> {
    let d = x.rows.d;
    let mut rows = host::filled(OP, x.rows.n * columns, 0f32)?;
    let all = rows.chunks_exact_mut(columns).enumerate().collect();
    host::for_each(
        all,
        d,
        || vec![0f32; d],
        |scratch: &mut Vec<f32>, (i, out): (usize, &mut [f32])| {
            let row = x.row(0, i);
            match T::as_f32(row, scratch) {
                Some(values) => out[..d].copy_from_slice(values),
                None => out.iter_mut().zip(row).for_each(|(out, v)| *out = v.wide() as f32),
            }
            Ok(())
        },
    )?;
    Ok(rows)
}

/// Weights as [`LutMatrix`] has them, in memory.
struct Weights<'a> {
    bits: usize,
    /// Columns of a row, whole blocks.
    columns: usize,
    codes: &'a [u8],
    levels: &'a [f16],
    scales: &'a [f16],
    /// Tables of a row, or 0 if all rows share one; and scales.
    tables: usize,
    groups: usize,
    outliers: (&'a [u32], &'a [f16]),
    outliers_each: usize,
}

/// Looks levels up by codes with what the processor has.
trait LookUp: Copy {
    /// The entries of a table that eight codes name. `WIDE` tables have more than eight.
    fn look_up<const WIDE: bool>(self, table: &[f32; LEVELS], codes: [u32; LANES]) -> [f32; LANES];
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES];
}

/// Any processor.
#[derive(Clone, Copy)]
struct Plain;

impl LookUp for Plain {
    #[inline(always)]
    fn look_up<const WIDE: bool>(self, table: &[f32; LEVELS], codes: [u32; LANES]) -> [f32; LANES] {
        codes.map(|code| table[code as usize % LEVELS])
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
}

#[cfg(target_arch = "x86_64")]
impl LookUp for V3 {
    #[inline(always)]
    fn look_up<const WIDE: bool>(self, table: &[f32; LEVELS], codes: [u32; LANES]) -> [f32; LANES] {
        let [low, high]: [__m256; 2] = cast(*table);
        let index: __m256i = cast(codes);
        let low = self.avx2._mm256_permutevar8x32_ps(low, index);
        if !WIDE {
            return cast(low);
        }
        let high = self.avx2._mm256_permutevar8x32_ps(high, index);
        // A blend goes by the sign bit, to which the fourth bit of the code is moved.
        let upper: __m256 = cast(self.avx2._mm256_slli_epi32::<28>(index));
        cast(self.avx._mm256_blendv_ps(low, high, upper))
    }

    #[inline(always)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        cast(self.fma._mm256_fmadd_ps(cast(a), cast(b), cast(c)))
    }
}

/// What is done with weights, for each number of bits and kind of processor.
trait Pass {
    fn bits(&self) -> usize;
    fn run<const BITS: usize, L: LookUp>(self, look_up: L);
}

/// A struct for the reason that `Pack` in assign.rs is one.
struct Run<P, L>(P, L);

impl<P: Pass, L: LookUp> NullaryFnOnce for Run<P, L> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match self.0.bits() {
            2 => self.0.run::<2, L>(self.1),
            3 => self.0.run::<3, L>(self.1),
            _ => self.0.run::<4, L>(self.1),
        }
    }
}

fn dispatch(pass: impl Pass) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = V3::try_new() {
        return simd.vectorize(Run(pass, simd));
    }
    Run(pass, Plain).call()
}

/// A row of weights on its way into numbers.
struct Row<'a> {
    codes: &'a [u8],
    levels: &'a [f16],
    scales: &'a [f16],
    /// Blocks that a table serves, and a scale.
    table_blocks: usize,
    scale_blocks: usize,
    table: [f32; LEVELS],
}

impl<'a> Row<'a> {
    #[inline(always)]
    fn new<const BITS: usize>(w: &Weights<'a>, o: usize) -> Self {
        let blocks = w.columns / BLOCK;
        let own = o * (w.tables << BITS)..(o + 1) * (w.tables << BITS);
        let bytes = blocks * BITS * LANES;
        Self {
            codes: &w.codes[o * bytes..][..bytes],
            levels: if w.tables > 0 { &w.levels[own] } else { w.levels },
            scales: &w.scales[o * w.groups..][..w.groups],
            table_blocks: blocks / w.tables.max(1),
            scale_blocks: blocks / w.groups,
            table: [0.0; LEVELS],
        }
    }

    /// The levels of a block, without their scale, which comes beside them.
    #[inline(always)]
    fn decode<const BITS: usize, L: LookUp>(&mut self, look_up: L, block: usize, out: &mut [f32; BLOCK]) -> f32 {
        if block.is_multiple_of(self.table_blocks) {
            let levels = &self.levels[(block / self.table_blocks) << BITS..][..1 << BITS];
            f16::filter_row(levels, &mut self.table[..1 << BITS]);
        }
        let bytes = &self.codes[block * BITS * LANES..][..BITS * LANES];
        let words: [u32; LANES] = match BITS {
            2 => std::array::from_fn(|t| u32::from(bytes[2 * t]) | u32::from(bytes[2 * t + 1]) << 8),
            // Two bits of each code, and then the third.
            3 => std::array::from_fn(|t| {
                u32::from(bytes[2 * t]) | u32::from(bytes[2 * t + 1]) << 8 | u32::from(bytes[2 * LANES + t]) << 16
            }),
            _ => std::array::from_fn(|t| {
                u32::from_le_bytes([bytes[4 * t], bytes[4 * t + 1], bytes[4 * t + 2], bytes[4 * t + 3]])
            }),
        };
        for (i, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let codes = words.map(|w| match BITS {
                2 => w >> (2 * i) & 3,
                3 => w >> (2 * i) & 3 | (w >> (16 + i) & 1) << 2,
                _ => w >> (4 * i) & 15,
            });
            *out = match BITS {
                4 => look_up.look_up::<true>(&self.table, codes),
                _ => look_up.look_up::<false>(&self.table, codes),
            };
        }
        self.scales[block / self.scale_blocks].to_f32()
    }
}

impl Weights<'_> {
    /// The columns and values of a row's outliers.
    #[inline(always)]
    fn outliers(&self, o: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        let own = o * self.outliers_each..(o + 1) * self.outliers_each;
        self.outliers.0[own.clone()].iter().zip(&self.outliers.1[own]).map(|(&c, v)| (c as usize, v.to_f32()))
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
    fn bits(&self) -> usize {
        self.weights.bits
    }

    #[inline(always)]
    fn run<const BITS: usize, L: LookUp>(self, look_up: L) {
        let Self { weights, rows, first, out } = self;
        let (columns, zero) = (weights.columns, [0f32; LANES]);
        let m = rows.len() / columns;
        for (o, out) in (first..).zip(out.chunks_exact_mut(m)) {
            let (mut row, mut sums) = (Row::new::<BITS>(weights, o), [zero; CPU_LUT_ROWS]);
            for block in 0..columns / BLOCK {
                let mut values = [0f32; BLOCK];
                let scale = [row.decode::<BITS, L>(look_up, block, &mut values); LANES];
                for (sum, x) in sums.iter_mut().zip(rows.chunks_exact(columns)) {
                    // Two sums, so that no addition waits for the one before it.
                    let mut parts = [zero; 2];
                    let x = x[block * BLOCK..][..BLOCK].as_chunks::<LANES>().0;
                    for (i, (&x, &w)) in x.iter().zip(values.as_chunks().0).enumerate() {
                        parts[i % 2] = look_up.mul_add(x, w, parts[i % 2]);
                    }
                    *sum = look_up.mul_add(parts[0], scale, *sum);
                    *sum = look_up.mul_add(parts[1], scale, *sum);
                }
            }
            for ((out, sum), x) in out.iter_mut().zip(sums).zip(rows.chunks_exact(columns)) {
                let outliers: f32 = weights.outliers(o).map(|(c, v)| x[c] * v).sum();
                *out = sum.into_iter().sum::<f32>() + outliers;
            }
        }
    }
}

/// Weights of outputs from `first` on as numbers.
struct Decode<'a> {
    weights: &'a Weights<'a>,
    first: usize,
    tile: &'a mut [f32],
}

impl Pass for Decode<'_> {
    fn bits(&self) -> usize {
        self.weights.bits
    }

    #[inline(always)]
    fn run<const BITS: usize, L: LookUp>(self, look_up: L) {
        for (o, out) in (self.first..).zip(self.tile.chunks_exact_mut(self.weights.columns)) {
            let mut row = Row::new::<BITS>(self.weights, o);
            for (block, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
                let scale = row.decode::<BITS, L>(look_up, block, out);
                out.iter_mut().for_each(|w| *w *= scale);
            }
            self.weights.outliers(o).for_each(|(c, v)| out[c] += v);
        }
    }
}
