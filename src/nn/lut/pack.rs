//! Codes as they lie in memory ([`LutMatrix`]).

use crate::{error::Result, request::LutMatrix};
use candle_core::{DType, Tensor};

/// Numbers of a block, each of as many fields.
const LANES: usize = 8;
/// Bits that a code has in each plane of a block: of so many bytes times eight, one after the other.
const fn planes(bits: usize) -> &'static [usize] {
    match bits {
        2 => &[2],
        3 => &[2, 1],
        _ => &[4],
    }
}

/// Writes codes, whole blocks, to bytes that are zeros.
pub(super) fn pack(codes: &[u8], bits: usize, bytes: &mut [u8]) {
    let blocks = codes.chunks_exact(LutMatrix::BLOCK).zip(bytes.chunks_exact_mut(LANES * bits));
    for (codes, bytes) in blocks {
        let (mut first_byte, mut first_bit) = (0, 0);
        for &width in planes(bits) {
            for (column, code) in codes.iter().enumerate() {
                let (field, number) = (column / LANES, column % LANES);
                let bit = field * width;
                bytes[first_byte + number * width + bit / 8] |= (code >> first_bit & ((1 << width) - 1)) << (bit % 8);
            }
            (first_byte, first_bit) = (first_byte + LANES * width, first_bit + width);
        }
    }
}

/// The codes in bytes u8 `(outputs, bytes)`, u32 `(outputs, columns)`, by Candle's ops, on the device.
pub(super) fn unpack(bytes: &Tensor, bits: usize) -> Result<Tensor> {
    let (outputs, each) = bytes.dims2()?;
    let blocks = each / (LANES * bits);
    let bytes = bytes.reshape((outputs, blocks, LANES * bits))?.to_dtype(DType::F32)?;
    let (mut first_byte, mut first_bit) = (0, 0);
    let mut codes = Tensor::zeros((outputs, blocks, LANES, LANES), DType::F32, bytes.device())?;
    for &width in planes(bits) {
        let plane = bytes.narrow(2, first_byte, LANES * width)?.reshape((outputs, blocks, LANES, width))?;
        let field = |field: usize| {
            let bit = field * width;
            let byte = plane.narrow(3, bit / 8, 1)?.squeeze(3)?;
            // What lies below the field, and what lies above it, fall away.
            let below = (byte / (1u32 << (bit % 8)) as f64)?.floor()?;
            let values = (1u32 << width) as f64;
            &below - ((&below / values)?.floor()? * values)?
        };
        let fields = (0..LANES).map(field).collect::<candle_core::Result<Vec<_>>>()?;
        codes = (codes + (Tensor::stack(&fields, 2)? * (1u32 << first_bit) as f64)?)?;
        (first_byte, first_bit) = (first_byte + LANES * width, first_bit + width);
    }
    Ok(codes.reshape((outputs, blocks * LutMatrix::BLOCK))?.to_dtype(DType::U32)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn what_is_packed_is_unpacked() {
        for bits in 2..=4 {
            let codes: Vec<u8> = (0..128u32).map(|i| (i * i * 7 + i / 5) as u8 % (1 << bits)).collect();
            let mut bytes = vec![0; 16 * bits];
            pack(&codes, bits, &mut bytes);
            let bytes = Tensor::from_vec(bytes, (1, 16 * bits), &Device::Cpu).unwrap();
            let got = unpack(&bytes, bits).unwrap().flatten_all().unwrap().to_vec1::<u32>().unwrap();
            assert_eq!(got, codes.into_iter().map(u32::from).collect::<Vec<_>>(), "{bits} bits");
        }
    }
}
