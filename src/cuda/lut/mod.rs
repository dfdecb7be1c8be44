//! Products with weights that are looked up: `kernels/lut/`.

mod sm90;

use super::{
    device::{arch, device, processors},
    kernel::{launch, warps, Nullable, WARP},
    memory::{alloc, elements},
    params::{shape, LutWeights},
    tensors::{read, tensor, Element},
};
use crate::{
    error::{Error, Result},
    plan::arch::Arch,
    request::LutMatrix,
    rows::Rows,
    tiles::{LUT_BLOCKS, LUT_ROWS, LUT_SM90_LEAST, LUT_SM90_WORTH, LUT_STEPS, LUT_TALL, LUT_WIDE, THREADS},
};
use candle_core::{
    cuda_backend::cudarc::driver::{CudaStream, DevicePtr, PushKernelArg},
    DType, Tensor,
};
use half::{bf16, f16};
use std::{ops::Range, sync::Arc};

pub(crate) fn lut_product(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    match x.dtype() {
        DType::F16 => product::<f16>(x, w, bias),
        DType::BF16 => product::<bf16>(x, w, bias),
        DType::F32 => product::<f32>(x, w, bias),
        got => Err(Error::DType { argument: "x", got, expected: "F16, BF16 or F32".into() }),
    }
}

fn product<T: Element>(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    let hopper = matches!(arch(device(&x.operand)?)?, Arch::Cuda { capability: 90, .. });
    let worth = x.n > LUT_ROWS || elements(&[x.n, w.codes.dims()[0], w.inputs]) >= LUT_SM90_WORTH;
    if hopper && x.n >= LUT_SM90_LEAST && worth {
        return sm90::product::<T>(x, w, bias).map(Some);
    }
    (0 < x.n && x.n <= LUT_ROWS).then(|| few::<T>(x, w, bias)).transpose()
}

/// The products of few rows.
fn few<T: Element>(x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Tensor> {
    let (dev, outputs) = (device(&x.operand)?, w.codes.dims()[0]);
    let mut out = alloc::<T>(dev, "lut_product", elements(&[x.n, outputs]))?;
    let (xs, bias) = (read(&x.operand), bias.map(read));
    let bias = bias.as_ref().map(|bias| bias.view::<f32>()).transpose()?;
    let parts = parts(x.dtype());
    let wide = (parts * x.n).div_ceil(8).next_power_of_two().min(LUT_WIDE);
    let rows = 8 * wide / parts;
    let tiles = outputs.div_ceil(LUT_TALL) * x.n.div_ceil(rows);
    let blocks = tiles.min(LUT_BLOCKS * processors(dev)?);
    let shared = shared(x.dtype(), wide, parts, rows.min(x.n));
    with_weights(w, &dev.cuda_stream(), |weights| {
        launch!(dev, Lut, product_name(w.bits, wide), T::SUFFIX, blocks, THREADS, shared;
            &xs.view::<T>()?, &shape(x), weights, Nullable(&bias), &mut out)
    })?;
    Ok(tensor(dev, out, (x.n, outputs)))
}

/// The columns of a product that a row has: a value of f32 is the sum of two.
fn parts(dtype: DType) -> usize {
    dtype.size_in_bytes().div_ceil(2)
}

/// Calls `launch` with weights as kernels take them, whose tensors stay locked for reading until it returns.
fn with_weights<R>(
    w: &LutMatrix<'_>,
    stream: &Arc<CudaStream>,
    launch: impl FnOnce(&LutWeights) -> Result<R>,
) -> Result<R> {
    let (codes, levels, scales) = (read(w.codes), read(w.levels), read(w.scales));
    let outliers = w.outliers.map(|o| (read(o.columns), read(o.values)));
    let places = outliers.as_ref().map(|(columns, _)| columns.view::<u32>()).transpose()?;
    let extra = outliers.as_ref().map(|(_, values)| values.view::<f16>()).transpose()?;
    let (codes, levels, scales) = (codes.view::<u8>()?, levels.view::<f16>()?, scales.view::<f16>()?);
    // These guards order the launch with other streams while it is queued.
    let (codes, levels, scales) = (codes.device_ptr(stream), levels.device_ptr(stream), scales.device_ptr(stream));
    let places = places.as_ref().map(|places| places.device_ptr(stream));
    let extra = extra.as_ref().map(|extra| extra.device_ptr(stream));
    launch(&LutWeights {
        codes: codes.0,
        levels: levels.0,
        scales: scales.0,
        places: places.as_ref().map_or(0, |places| places.0),
        extra: extra.as_ref().map_or(0, |extra| extra.0),
        outputs: w.codes.dims()[0] as i64,
        inputs: w.inputs as i64,
        columns: w.columns() as i64,
        tables: w.tables() as i64,
        groups: w.scales.dims()[1] as i64,
        outliers: w.outliers.map_or(Ok(0), |o| o.columns.dim(1))? as i64,
    })
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
    with_weights(
        w,
        &dev.cuda_stream(),
        |weights| launch!(dev, Lut, name, "", warps(outputs.len()), THREADS; weights, &first, &count, &mut out),
    )?;
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
