//! The means of clusters, in a byte a column.

use crate::{error::Result, nn::parts::to_accumulate_dtype, primitives, request::Codes, rows::Rows};
use candle_core::{DType, Tensor, D};

/// Bytes have no sign: a code is a number and this.
const ZERO: f64 = Codes::ZERO as f64;

/// Means of clusters, quantised to 8 bits by the largest magnitude of each (symmetric absmax quantisation, as in Dettmers et al. 2022): all
/// of them are read for every query, and half of an f16's bytes say where clusters are just as well.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KvMeans {
    /// u8 `(batch, kv_heads, k, d)`: whole numbers from -127 to 127, and 128.
    pub codes: Tensor,
    /// `(batch, kv_heads, k)`, f32, of f64 f64: what a mean's numbers are multiplied by. NaN or infinite where the mean is not finite.
    pub scales: Tensor,
}

impl KvMeans {
    /// A CPU codes all rows at once, by [`primitives::byte_codes`]; Candle's ops, of which each is a pass over all means on one thread,
    /// give the same bits.
    pub(super) fn new(means: &Tensor) -> Result<Self> {
        if let Some((codes, scales)) = primitives::byte_codes(&Rows::new(means)?)? {
            return Ok(Self { codes: codes.reshape(means.shape())?, scales: scales.reshape(&means.dims()[..3])? });
        }
        let means = to_accumulate_dtype(means)?;
        let scales = (means.abs()?.max_keepdim(D::Minus1)? / Codes::MOST)?;
        // A scale of 0 has numbers of 0.
        let divisors = scales.maximum(f64::from(f32::MIN_POSITIVE))?;
        let codes = (means.broadcast_div(&divisors)?.round()? + ZERO)?.to_dtype(DType::U8)?;
        Ok(Self { codes, scales: scales.squeeze(D::Minus1)? })
    }

    /// The means as they are read, `(batch, kv_heads, k, d)`.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let numbers = (self.codes.to_dtype(self.scales.dtype())? - ZERO)?;
        Ok(numbers.broadcast_mul(&self.scales.unsqueeze(D::Minus1)?)?.to_dtype(dtype)?)
    }

    pub(super) fn codes(&self) -> Codes<'_> {
        Codes { bytes: &self.codes, scales: &self.scales }
    }

    pub(super) fn map(&self, f: &impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { codes: f(&self.codes)?, scales: f(&self.scales)? })
    }

    pub(super) fn followed_by(&self, next: &Self) -> Result<Self> {
        let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 2);
        Ok(Self { codes: join(&self.codes, &next.codes)?, scales: join(&self.scales, &next.scales)? })
    }
}
