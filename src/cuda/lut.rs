//! Products with weights that are looked up: `kernels/lut.cu`.

use super::{
    device::{device, processors},
    kernel::{launch, Nullable},
    memory::{alloc, elements},
    params::shape,
    tensors::{read, tensor, typed, Element},
};
use crate::{
    error::Result,
    request::LutProduct,
    tiles::{LUT_BLOCKS, LUT_OUTPUTS, LUT_ROWS, THREADS},
};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, Tensor};
use half::f16;

pub(crate) fn lut_product(p: &LutProduct<'_>) -> Result<Option<Tensor>> {
    let (x, outputs) = (p.x, p.codes.dims()[0]);
    if x.n == 0 || x.n > LUT_ROWS {
        return Ok(None);
    }
    let name = name(p.bits, x.n.next_power_of_two());
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let mut out = alloc::<f32>(dev, "lut_product", elements(&[x.n, outputs]))?;
        let (xs, codes, levels, scales) = (read(&x.operand), read(p.codes), read(p.levels), read(p.scales));
        let outliers = p.outliers.map(|o| (read(o.columns), read(o.values)));
        let places = outliers.as_ref().map(|(columns, _)| columns.view::<u32>()).transpose()?;
        let extra = outliers.as_ref().map(|(_, values)| values.view::<f16>()).transpose()?;
        let each = p.outliers.map_or(Ok(0), |o| o.columns.dim(1))?;
        let (tables, groups) = (p.levels.dims()[1] as i64, p.scales.dims()[1] as i64);
        let blocks = outputs.div_ceil(LUT_OUTPUTS).min(LUT_BLOCKS * processors(dev)?);
        launch!(dev, Lut, name, T::SUFFIX, blocks, THREADS;
            &xs.view::<T>()?, &shape(x), &codes.view::<u8>()?, &levels.view::<f16>()?, &scales.view::<f16>()?,
            Nullable(&places), Nullable(&extra), &(outputs as i64), &(p.columns() as i64), &tables, &groups, &(each as i64), &mut out)?;
        Ok(Some(tensor(dev, out, (x.n, outputs))))
    })
}

/// The instance for so many bits of a code and rows.
fn name(bits: usize, rows: usize) -> &'static str {
    const NAMES: [[&str; 3]; 3] = [
        ["lut_product_2_1", "lut_product_2_2", "lut_product_2_4"],
        ["lut_product_3_1", "lut_product_3_2", "lut_product_3_4"],
        ["lut_product_4_1", "lut_product_4_2", "lut_product_4_4"],
    ];
    NAMES[bits - 2][rows.ilog2() as usize]
}
