//! Products with weights that are looked up: `kernels/lut.cu`.

use super::{
    device::{device, processors},
    kernel::{launch, warps, Nullable},
    memory::{alloc, elements},
    params::shape,
    tensors::{read, tensor, typed, Element},
};
use crate::{
    error::Result,
    request::LutMatrix,
    rows::Rows,
    tiles::{LUT_BLOCKS, LUT_COLUMNS, LUT_ROWS, THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, Tensor};
use half::f16;
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

pub(crate) fn lut_product(x: &Rows, w: &LutMatrix<'_>) -> Result<Option<Tensor>> {
    let outputs = w.codes.dims()[0];
    if x.n == 0 || x.n > LUT_ROWS {
        return Ok(None);
    }
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let mut out = alloc::<f32>(dev, "lut_product", elements(&[x.n, outputs]))?;
        let xs = read(&x.operand);
        let rows = x.n.next_power_of_two();
        let (blocks, shared) = (warps(outputs).min(LUT_BLOCKS * processors(dev)?), 4 * LUT_COLUMNS * rows);
        launch_lut!(w, dev, product_name(w.bits, rows), T::SUFFIX, blocks, shared;
            &xs.view::<T>()?, &shape(x); &mut out)?;
        Ok(Some(tensor(dev, out, (x.n, outputs))))
    })
}

pub(crate) fn lut_decode(w: &LutMatrix<'_>, outputs: Range<usize>) -> Result<Tensor> {
    let dev = device(w.codes)?;
    let mut out = alloc::<f32>(dev, "lut_decode", elements(&[outputs.len(), w.inputs]))?;
    let name = ["lut_decode_2", "lut_decode_3", "lut_decode_4"][w.bits - 2];
    let (first, count) = (outputs.start as i64, outputs.len() as i64);
    launch_lut!(w, dev, name, "", warps(outputs.len()), 0; ; &first, &count, &mut out)?;
    Ok(tensor(dev, out, (outputs.len(), w.inputs)))
}

/// The instance for so many bits of a code and rows.
fn product_name(bits: usize, rows: usize) -> &'static str {
    const NAMES: [[&str; 3]; 3] = [
        ["lut_product_2_1", "lut_product_2_2", "lut_product_2_4"],
        ["lut_product_3_1", "lut_product_3_2", "lut_product_3_4"],
        ["lut_product_4_1", "lut_product_4_2", "lut_product_4_4"],
    ];
    NAMES[bits - 2][rows.ilog2() as usize]
}
