//! Codes: what fits a byte, what can be decoded, and none at all.

use super::Codebook;
use crate::{
    error::{Error, Result},
    problem::check_device,
};
use candle_core::{DType, Device, Shape, Tensor};

/// A tensor of no elements: part of one that has some, because Candle allocates none of no bytes on a GPU.
pub(super) fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(1, dtype, device)?.narrow(0, 0, 0)?.reshape(shape.into())?)
}

pub(super) fn code_bits(k: usize) -> f64 {
    k.next_power_of_two().trailing_zeros() as f64
}

pub(super) fn stored_bits(codebook: &Codebook) -> f64 {
    (codebook.k() * codebook.d() * codebook.centroids.dtype().size_in_bytes() * 8) as f64
}

/// Checks that codes of these entries fit a byte.
pub(super) fn check_u8(argument: &'static str, codebook: &Codebook) -> Result<()> {
    if codebook.k() > 256 {
        return Err(Error::TooLarge { argument, got: codebook.k(), limit: 256 });
    }
    Ok(())
}

/// Codes that fit a byte as u8.
pub(super) fn in_bytes(codes: &Tensor) -> Result<Tensor> {
    match codes.elem_count() {
        0 => empty(codes.shape(), DType::U8, codes.device()),
        _ => Ok(codes.to_dtype(DType::U8)?),
    }
}

/// Codes as u32, on the device of the codebook.
pub(super) fn checked_codes(codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    if !matches!(codes.dtype(), DType::U8 | DType::U32) {
        return Err(Error::DType { argument: "codes", got: codes.dtype(), expected: "U8 or U32".into() });
    }
    check_device("codes", codes, centroids.device())?;
    match codes.elem_count() {
        0 => empty(codes.shape(), DType::U32, codes.device()),
        _ => Ok(codes.to_dtype(DType::U32)?),
    }
}

/// Checks that each row has so many codes.
pub(super) fn check_places(codes: &Tensor, expected: usize) -> Result<()> {
    if codes.rank() < 2 {
        return Err(Error::Rank { argument: "codes", expected: 2, shape: codes.dims().to_vec() });
    }
    let got = codes.dims()[codes.rank() - 1];
    if got != expected {
        return Err(Error::Size { argument: "codes", what: "columns", got, expected });
    }
    Ok(())
}

/// Checks that `x` `(.., d)` has so many columns of floats.
pub(super) fn check_float_columns(x: &Tensor, expected: usize) -> Result<()> {
    if !matches!(x.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument: "x", got: x.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    match x.dims().last() {
        Some(&got) if got != expected => Err(Error::Size { argument: "x", what: "columns", got, expected }),
        Some(_) => Ok(()),
        None => Err(Error::Size { argument: "x", what: "number of dimensions", got: 0, expected: 1 }),
    }
}
