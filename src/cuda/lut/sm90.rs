//! Products of many rows on Hopper: `kernels/lut/lut_sm90.cu`.

use super::{parts, with_weights};
use crate::{
    cuda::{
        device::{device, processors},
        kernel::{launch, Kernel, WARP},
        memory::{alloc, elements, ArenaLayout},
        module::Image,
        params::{shape, LutProduct},
        tensors::{read, tensor, DevicePtr, Element},
    },
    error::Result,
    memory::Memory,
    request::LutMatrix,
    rows::Rows,
    tiles::{LUT_SM90_OUTPUTS, LUT_SM90_PARTS, LUT_SM90_ROWS, LUT_SM90_STAGES, THREADS},
};
use candle_core::{
    cuda_backend::cudarc::driver::{DevicePtr as _, DevicePtrMut, PushKernelArg},
    DType, Tensor,
};

/// Columns of a product, and what an instance with so many of them is called.
const WIDTHS: [usize; 3] = [32, 64, 128];
const NAMES: [[&str; 3]; 3] = [
    ["lut_product_2_32", "lut_product_2_64", "lut_product_2_128"],
    ["lut_product_3_32", "lut_product_3_64", "lut_product_3_128"],
    ["lut_product_4_32", "lut_product_4_64", "lut_product_4_128"],
];
/// Threads of a block.
const BLOCK: usize = 2 * LUT_SM90_OUTPUTS;

pub(super) fn product<T: Element>(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "lut_product";
    let (dev, outputs) = (device(&x.operand)?, w.codes.dims()[0]);
    let (parts, blocks) = (parts(x.dtype()), w.columns() / LutMatrix::BLOCK);
    let talls = outputs.div_ceil(LUT_SM90_OUTPUTS);
    // The narrowest products with no more tiles than half of the multiprocessors, which two blocks each share then, or with
    // no row left for another tile.
    let most = x.n.min(LUT_SM90_ROWS);
    let processors = processors(dev)?;
    let enough = |width: usize| most <= width / parts || 2 * talls * most.div_ceil(width / parts) <= processors;
    let wide = (parts - 1..WIDTHS.len()).find(|&i| enough(WIDTHS[i])).unwrap_or(WIDTHS.len() - 1);
    let (width, rows) = (WIDTHS[wide], WIDTHS[wide] / parts);
    let shared = shared(x.dtype(), width, w.bits);
    let kernel = Kernel::get(dev, Image::LutSm90, NAMES[w.bits - 2][wide], T::SUFFIX, shared)?;

    let padded = most.div_ceil(rows) * rows;
    let mut scratch = ArenaLayout::default();
    let values = scratch.unwritten::<half::f16>(elements(&[padded, parts, w.columns()]));
    let units = scratch.unwritten::<f32>(if x.dtype() == DType::F16 { 0 } else { elements(&[padded, blocks]) });
    let across = scratch.unwritten::<T>(if w.outliers.is_some() { elements(&[padded, w.inputs]) } else { 0 });
    let memory = Memory::default();
    let scratch = scratch.scratch(dev, OP, &memory)?;
    let mut out = alloc::<T>(dev, OP, elements(&[x.n, outputs]))?;
    let (xs, bias) = (read(&x.operand), bias.map(read));
    let (xs, bias) = (xs.view::<T>()?, bias.as_ref().map(|bias| bias.view::<f32>()).transpose()?);
    let (values, units, across) = (scratch.ptr(values), scratch.ptr(units), scratch.ptr(across));
    let across = if w.outliers.is_some() { across } else { DevicePtr::NULL };
    let stream = &kernel.stream;
    let bias = bias.as_ref().map(|bias| bias.device_ptr(stream));
    let written = out.device_ptr_mut(stream);
    with_weights(w, stream, |&weights| {
        for first in (0..x.n).step_by(most) {
            let count = most.min(x.n - first);
            let warps = count.div_ceil(WARP / 4) * blocks;
            launch!(dev, LutSm90, "lut_arrange", T::SUFFIX, warps.div_ceil(THREADS / WARP), THREADS;
                &xs, &shape(x), &(first as i64), &(count as i64), &(blocks as i64), &(rows as i64), &values, &units,
                &across, &(padded as i64))?;
            let tiles = talls * count.div_ceil(rows);
            let shared_by =
                kernel.cluster(tiles, BLOCK, LUT_SM90_PARTS)?.unwrap_or(1).min(processors / tiles).clamp(1, blocks);
            let product = LutProduct {
                w: weights,
                values: values.address,
                across: across.address,
                units: units.address,
                bias: bias.as_ref().map_or(0, |bias| bias.0),
                out: written.0 + (first * outputs * size_of::<T>()) as u64,
                rows: count as i64,
                padded: padded as i64,
                parts: shared_by as i64,
            };
            kernel.run_clusters(&product, tiles * shared_by, BLOCK, shared, Some(shared_by))?;
        }
        Ok(())
    })?;
    drop(written);
    Ok(tensor(dev, out, (x.n, outputs)))
}

/// Bytes of values or, in their place, of sums; of codes and units; of barriers, and of what aligns them all.
fn shared(dtype: DType, width: usize, bits: usize) -> usize {
    let rows = width / parts(dtype);
    let (values, sums) = (LUT_SM90_STAGES * width * LutMatrix::BLOCK * 2, rows * (LUT_SM90_OUTPUTS + 4) * 4);
    let codes = LUT_SM90_STAGES * BLOCK * if bits == 2 { 8 } else { 16 };
    let units = if dtype == DType::F16 { 0 } else { LUT_SM90_STAGES * rows * 4 };
    values.max(sums) + codes + units + 16 * LUT_SM90_STAGES + 1024
}
