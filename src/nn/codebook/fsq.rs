//! Codes without entries: each value is rounded.

use super::{
    codes::{check_float_columns, code_bits, empty},
    quantizer::wide,
};
use crate::{
    error::{Error, Result},
    functional, primitives,
    problem::MAX_ROWS,
};
use candle_core::{DType, Tensor, D};
use candle_nn::Module;

/// Finite scalar quantisation (Mentzer et al. 2023): each value of a row is squashed to a range by `tanh` and rounded to one of a few
/// evenly spaced levels from -1 to 1. There is no codebook to learn or to collapse, and any product of levels is in reach of gradients.
///
/// As in the paper, for `L` levels of a value `z`, with `h = (L - 1) (1 + eps) / 2`, `eps = 1e-3`, and an offset `o` of 1/2 where `L` is even:
/// ```text
/// bounded = h tanh(z + atanh(o / h)) - o     digit = round(bounded) + floor(L / 2)     value = round(bounded) / floor(L / 2)
/// ```
/// A code counts its digits in base `L`, the first value's lowest. As a [`Module`] it puts values in the place of rows; the gradient is that of
/// `bounded`, straight through the rounding.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_flash_kmeans::nn::Fsq;
///
/// let fsq = Fsq::new(&[8, 5, 5, 5])?;
/// assert_eq!(fsq.codebook_size(), 1000);
/// let x = Tensor::randn(0f32, 1f32, (2, 16, 4), &Device::Cpu)?;
/// let codes = fsq.encode(&x)?; // u32 (2, 16)
/// assert_eq!(fsq.decode(&codes)?.to_vec3::<f32>()?, fsq.forward(&x)?.to_vec3::<f32>()?);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fsq {
    levels: Vec<usize>,
}

/// The range of rounded values is this share wider than that of their levels.
const EPS: f64 = 1e-3;

impl Fsq {
    /// Of so many levels for each value of a row.
    ///
    /// # Errors
    /// Refuses rows of no values, fewer than two levels, and more codes than a u32 counts.
    pub fn new(levels: &[usize]) -> Result<Self> {
        if levels.is_empty() {
            return Err(Error::Range { argument: "levels", got: 0, min: 1, max: usize::MAX });
        }
        if let Some(&got) = levels.iter().find(|&&l| l < 2) {
            return Err(Error::Range { argument: "levels", got, min: 2, max: MAX_ROWS });
        }
        let size = levels.iter().try_fold(1usize, |size, &l| size.checked_mul(l)).unwrap_or(usize::MAX);
        if size > MAX_ROWS {
            return Err(Error::TooLarge { argument: "levels", got: size, limit: MAX_ROWS });
        }
        Ok(Self { levels: levels.to_vec() })
    }

    /// The levels of each value.
    pub fn levels(&self) -> &[usize] {
        &self.levels
    }

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.levels.len()
    }

    /// The number of codes.
    pub fn codebook_size(&self) -> usize {
        self.levels.iter().product()
    }

    /// Bits of a code, a whole number, by the values it stands for.
    pub fn bits_per_value(&self) -> f64 {
        code_bits(self.codebook_size()) / self.d() as f64
    }

    /// The code of each row of `x` `(.., d)`, u32 `(..)`. A NaN has the code of some level.
    ///
    /// # Errors
    /// Refuses other numbers of columns, dtypes that are no floats, and on a GPU more values than Candle's kernels count.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        check_float_columns(x, self.d())?;
        primitives::check_counted("x", x)?;
        let shape = &x.dims()[..x.rank() - 1];
        if x.elem_count() == 0 {
            return empty(shape, DType::U32, x.device());
        }
        let rounded = self.bounded(&x.detach())?.round()?.to_dtype(DType::F64)?;
        let [halves, bases] = [self.row(|l| (l / 2) as f64, x)?, Tensor::new(self.bases(), x.device())?];
        let most = self.row(|l| (l - 1) as f64, x)?.broadcast_as(rounded.shape())?;
        let digits = rounded.broadcast_add(&halves.to_dtype(DType::F64)?)?.maximum(0.0)?;
        let digits = digits.minimum(&most.to_dtype(DType::F64)?)?;
        Ok(digits.broadcast_mul(&bases)?.sum(D::Minus1)?.to_dtype(DType::U32)?)
    }

    /// The values that `codes`, u32 or u8 `(..)`, stand for: f32 `(.., d)`. A code of none becomes NaN.
    ///
    /// # Errors
    /// Refuses other dtypes.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        if !matches!(codes.dtype(), DType::U8 | DType::U32) {
            return Err(Error::DType { argument: "codes", got: codes.dtype(), expected: "U8 or U32".into() });
        }
        let device = codes.device();
        if codes.elem_count() == 0 {
            return empty([codes.dims(), &[self.d()]].concat(), DType::F32, device);
        }
        let codes = codes.to_dtype(DType::F64)?.unsqueeze(D::Minus1)?;
        let float = |f: fn(usize) -> f64| Tensor::new(self.levels.iter().map(|&l| f(l)).collect::<Vec<_>>(), device);
        let (bases, levels, halves) =
            (Tensor::new(self.bases(), device)?, float(|l| l as f64)?, float(|l| (l / 2) as f64)?);
        // Whole numbers of f64, whose quotients by whole numbers do not round up to the next.
        let above = codes.broadcast_div(&bases)?.floor()?;
        let digits = (&above - above.broadcast_div(&levels)?.floor()?.broadcast_mul(&levels)?)?;
        let values = digits.broadcast_sub(&halves)?.broadcast_div(&halves)?;
        let known = codes.lt(self.codebook_size() as f64)?.broadcast_as(values.shape())?;
        let nan = (values.ones_like()? * f64::NAN)?;
        Ok(known.where_cond(&values, &nan)?.to_dtype(DType::F32)?)
    }

    /// What is rounded, in f32 for half types.
    fn bounded(&self, x: &Tensor) -> Result<Tensor> {
        let half_range = |l: usize| (l - 1) as f64 * (1.0 + EPS) / 2.0;
        let offset = |l: usize| if l.is_multiple_of(2) { 0.5 } else { 0.0 };
        let shifted =
            x.to_dtype(wide(x.dtype()))?.broadcast_add(&self.row(|l| (offset(l) / half_range(l)).atanh(), x)?)?;
        Ok(shifted.tanh()?.broadcast_mul(&self.row(half_range, x)?)?.broadcast_sub(&self.row(offset, x)?)?)
    }

    /// A number for each value, in the type that `x` is computed in.
    fn row(&self, f: impl Fn(usize) -> f64, x: &Tensor) -> Result<Tensor> {
        let numbers: Vec<_> = self.levels.iter().map(|&l| f(l)).collect();
        Ok(Tensor::new(numbers, x.device())?.to_dtype(wide(x.dtype()))?)
    }

    /// What a digit of each value counts.
    fn bases(&self) -> Vec<f64> {
        let next = |base: &mut usize, &l: &usize| {
            let own = *base;
            *base *= l;
            Some(own as f64)
        };
        self.levels.iter().scan(1, next).collect()
    }
}

impl Module for Fsq {
    /// Each value of `x` `(.., d)` as its level says, in its dtype.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        check_float_columns(x, self.d())?;
        primitives::check_counted("x", x)?;
        if x.elem_count() == 0 {
            return Ok(x.clone());
        }
        let bounded = self.bounded(x)?;
        // With 0 for -0, as decoding has it.
        let mut rounded = bounded.detach().round()?.affine(1.0, 0.0)?;
        // The range of so many levels ends beyond the last one.
        if self.levels.iter().any(|&l| (l - 1) as f64 * EPS >= 1.0) {
            rounded = rounded.broadcast_maximum(&self.row(|l| -((l / 2) as f64), x)?)?;
            rounded = rounded.broadcast_minimum(&self.row(|l| (l - 1 - l / 2) as f64, x)?)?;
        }
        let rounded = functional::straight_through(&bounded, rounded)?;
        rounded.broadcast_div(&self.row(|l| (l / 2) as f64, x)?)?.to_dtype(x.dtype())
    }
}
