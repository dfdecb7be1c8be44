//! Products with weights that are looked up: `kernels/lut.cu`.

use super::{
    device::{device, processors},
    kernel::{launch, warps, Nullable, WARP},
    memory::{alloc, elements},
    params::shape,
    tensors::{read, tensor, Element},
};
use crate::{
    error::{Error, Result},
    request::LutMatrix,
    rows::Rows,
    tiles::{LUT_BLOCKS, LUT_ROWS, LUT_STEPS, LUT_TALL, LUT_WIDE, THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType, Tensor};
use half::{bf16, f16};
use std::ops::Range;

/// The sizes of a matrix, and where it lies, for a launch.
macro_rules! launch_lut {
    ($w:ident, $dev:ident, $name:expr, $suffix:expr, $grid:expr, $shared:expr; $($before:expr),*; $($after:expr),*) => {{
        let (codes, levels, scales) = (read($w.codes), read($w.levels), read($w.scales));
        let outliers = $w.outliers.map(|o| (read(o.columns), read(o.values)));
        let places = outliers.as_ref().map(|(columns, _)| columns.view::<u32>()).transpose()?;
        let extra = outliers.as_ref().map(|(_, values)| values.view::<f16>()).transpose()?;
        let each = $w.outliers.map_or(Ok(0), |o| o.columns.dim(1))? as i64;
        let (outputs, inputs, columns) = ($w.codes.dims()[0] as i64, $w.inputs as i64, $w.columns() as i64);
        let (tables, groups) = ($w.tables() as i64, $w.scales.dims()[1] as i64);
        launch!($dev, Lut, $name, $suffix, $grid, THREADS, $shared;
            $($before,)* &codes.view::<u8>()?, &levels.view::<f16>()?, &scales.view::<f16>()?, Nullable(&places),
            Nullable(&extra), &outputs, &inputs, &columns, &tables, &groups, &each, $($after),*)
    }};
}

pub(crate) fn lut_product(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    if x.n == 0 || x.n > LUT_ROWS {
        return Ok(None);
    }
    match x.dtype() {
        DType::F16 => product::<f16>(x, w, bias),
        DType::BF16 => product::<bf16>(x, w, bias),
        DType::F32 => product::<f32>(x, w, bias),
        got => Err(Error::DType { argument: "x", got, expected: "F16, BF16 or F32".into() }),
    }
    .map(Some)
}

fn product<T: Element>(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
    let (dev, outputs) = (device(&x.operand)?, w.codes.dims()[0]);
    let mut out = alloc::<T>(dev, "lut_product", elements(&[x.n, outputs]))?;
    let (xs, bias) = (read(&x.operand), bias.map(read));
    let bias = bias.as_ref().map(|bias| bias.view::<f32>()).transpose()?;
    // A value of f32 has two columns of a product.
    let parts = x.dtype().size_in_bytes().div_ceil(2);
    let wide = (parts * x.n).div_ceil(8).next_power_of_two().min(LUT_WIDE);
    let rows = 8 * wide / parts;
    let tiles = outputs.div_ceil(LUT_TALL) * x.n.div_ceil(rows);
    let blocks = tiles.min(LUT_BLOCKS * processors(dev)?);
    launch_lut!(w, dev, product_name(w.bits, wide), T::SUFFIX, blocks, shared(x.dtype(), wide, parts, rows.min(x.n));
        &xs.view::<T>()?, &shape(x), Nullable(&bias); &mut out)?;
    Ok(tensor(dev, out, (x.n, outputs)))
}

/// Bytes of what each warp and the outliers add up to, twice, and of values in halves.
fn shared(dtype: DType, wide: usize, parts: usize, rows: usize) -> usize {
    let (warps, steps) = (THREADS / WARP, LUT_STEPS / wide / if dtype == DType::F16 { 1 } else { 2 });
    let sums = 4 * LUT_TALL * (warps * 8 * wide + 8 * wide / parts);
    2 * sums + parts * rows * 2 * (warps * steps * (LutMatrix::BLOCK + 8) + 8)
}

pub(crate) fn lut_decode(w: &LutMatrix<'_>, outputs: Range<usize>) -> Result<Tensor> {
    let dev = device(w.codes)?;
    let mut out = alloc::<f32>(dev, "lut_decode", elements(&[outputs.len(), w.inputs]))?;
    let name = ["lut_decode_2", "lut_decode_3", "lut_decode_4"][w.bits - 2];
    let (first, count) = (outputs.start as i64, outputs.len() as i64);
    launch_lut!(w, dev, name, "", warps(outputs.len()), 0; ; &first, &count, &mut out)?;
    Ok(tensor(dev, out, (outputs.len(), w.inputs)))
}

/// The instance for so many bits of a code and tiles of columns.
fn product_name(bits: usize, wide: usize) -> &'static str {
    const NAMES: [[&str; 3]; 3] = [
        ["lut_product_2_1", "lut_product_2_2", "lut_product_2_4"],
        ["lut_product_3_1", "lut_product_3_2", "lut_product_3_4"],
        ["lut_product_4_1", "lut_product_4_2", "lut_product_4_4"],
    ];
    NAMES[bits - 2][wide.ilog2() as usize]
}
