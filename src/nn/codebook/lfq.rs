//! Codes without entries: each value is its sign.

use super::{
    codes::{check_float_columns, code_bits, empty},
    quantizer::wide,
    Quantized, Usage,
};
use crate::{
    error::{Error, Result},
    functional, primitives,
};
use candle_core::{DType, Tensor, D};
use candle_nn::{ops::sigmoid, Module};

/// Settings of a lookup-free quantiser. Names and defaults are those of vector-quantize-pytorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LfqConfig {
    /// Factor of the entropies in the loss (0.1).
    pub entropy_loss_weight: f64,
    /// Factor of the mean squared difference between rows and their values (0).
    pub commitment_loss_weight: f64,
    /// Factor of the codebook's entropy beside that of each row (1).
    pub diversity_gamma: f64,
    /// What squared distances are multiplied by before a softmax makes probabilities of them (100).
    pub inv_temperature: f64,
    /// The magnitude of values (1).
    pub codebook_scale: f64,
}

impl Default for LfqConfig {
    fn default() -> Self {
        Self {
            entropy_loss_weight: 0.1,
            commitment_loss_weight: 0.0,
            diversity_gamma: 1.0,
            inv_temperature: 100.0,
            codebook_scale: 1.0,
        }
    }
}

/// Lookup-free quantisation (Yu et al. 2023, "Language model beats diffusion"): a code has a bit for each value of a row, which says whether
/// it is above 0. `2^d` codes, without a codebook.
///
/// The loss is what keeps codes in use: with `p` the softmax of `-inv_temperature * |x - c|^2` over all codes `c`,
/// ```text
/// entropy_loss_weight (mean over rows of H(p) - diversity_gamma H(mean over rows of p)) + commitment_loss_weight mean (x - value)^2
/// ```
/// in natural logarithms. A row's `p` is a product over its bits, so that its entropy costs `d`; the codebook's takes memory for
/// `2^d` numbers a row where it has a weight, and the usage of codes for as many of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Lfq {
    d: usize,
    config: LfqConfig,
}

/// Bits of a code, at most, so that f64 and u32 count codes exactly.
const MAX_BITS: usize = 31;

impl Lfq {
    /// For rows of `d` values, and as many bits.
    ///
    /// # Errors
    /// Refuses no bits, more than 31, and settings that are not finite numbers of at least 0, or a magnitude of 0.
    pub fn new(d: usize, config: LfqConfig) -> Result<Self> {
        if !(1..=MAX_BITS).contains(&d) {
            return Err(Error::Range { argument: "d", got: d, min: 1, max: MAX_BITS });
        }
        let settings = [
            ("entropy_loss_weight", config.entropy_loss_weight),
            ("commitment_loss_weight", config.commitment_loss_weight),
            ("diversity_gamma", config.diversity_gamma),
            ("inv_temperature", config.inv_temperature),
        ];
        if let Some((argument, got)) = settings.into_iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            return Err(Error::Value { argument, got, expected: "a finite number of at least 0" });
        }
        let got = config.codebook_scale;
        if !(got > 0.0 && got.is_finite()) {
            return Err(Error::Value { argument: "codebook_scale", got, expected: "a finite number above 0" });
        }
        Ok(Self { d, config })
    }

    /// Values of a row, and bits of its code.
    pub fn d(&self) -> usize {
        self.d
    }

    /// The settings.
    pub fn config(&self) -> LfqConfig {
        self.config
    }

    /// The number of codes.
    pub fn codebook_size(&self) -> usize {
        1 << self.d
    }

    /// Bits of a code by the values it stands for: 1.
    pub fn bits_per_value(&self) -> f64 {
        code_bits(self.codebook_size()) / self.d as f64
    }

    /// The code of each row of `x` `(.., d)`, u32 `(..)`: the first value's bit is the highest. What is not above 0, a NaN too, is 0.
    ///
    /// # Errors
    /// Refuses other numbers of columns, dtypes that are no floats, and on a GPU more values than Candle's kernels count.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        check_float_columns(x, self.d)?;
        primitives::check_counted("x", x)?;
        if x.elem_count() == 0 {
            return empty(&x.dims()[..x.rank() - 1], DType::U32, x.device());
        }
        let counts: Vec<_> = (0..self.d).rev().map(|bit| (1u32 << bit) as f64).collect();
        let bits = x.detach().gt(0.0)?.to_dtype(DType::F64)?;
        Ok(bits.broadcast_mul(&Tensor::new(counts, x.device())?)?.sum(D::Minus1)?.to_dtype(DType::U32)?)
    }

    /// The values that `codes`, u32 or u8 `(..)`, stand for: f32 `(.., d)`. Bits above the highest count for nothing.
    ///
    /// # Errors
    /// Refuses other dtypes.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        if !matches!(codes.dtype(), DType::U8 | DType::U32) {
            return Err(Error::DType { argument: "codes", got: codes.dtype(), expected: "U8 or U32".into() });
        }
        if codes.elem_count() == 0 {
            return empty([codes.dims(), &[self.d]].concat(), DType::F32, codes.device());
        }
        let counts: Vec<_> = (0..self.d).rev().map(|bit| (1u32 << bit) as f64).collect();
        let above = codes.to_dtype(DType::F64)?.unsqueeze(D::Minus1)?;
        let above = above.broadcast_div(&Tensor::new(counts, codes.device())?)?.floor()?;
        let bits = (&above - ((&above / 2.0)?.floor()? * 2.0)?)?;
        let scale = self.config.codebook_scale;
        Ok(bits.affine(2.0 * scale, -scale)?.to_dtype(DType::F32)?)
    }

    /// Quantises `x` `(.., d)` for a forward pass in training.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses `x` without rows, and on a GPU more rows, times codes where the codebook's entropy has a weight, than
    /// Candle's kernels count.
    pub fn quantize(&self, x: &Tensor) -> Result<Quantized> {
        self.check_rows(x)?;
        let codes = self.encode(x)?;
        let sizes = functional::cluster_sizes(&codes.flatten_all()?, self.codebook_size())?;
        let usage = Usage::of(&sizes.to_dtype(DType::F64)?.unsqueeze(0)?, &[])?;
        Ok(Quantized { values: self.forward(x)?, loss: self.loss(x)?, codes, usage })
    }

    /// Refuses what has no loss, or more numbers on the way to it than kernels count.
    fn check_rows(&self, x: &Tensor) -> Result<()> {
        check_float_columns(x, self.d)?;
        primitives::check_counted("x", x)?;
        if x.elem_count() == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: usize::MAX });
        }
        let LfqConfig { entropy_loss_weight, diversity_gamma, .. } = self.config;
        if entropy_loss_weight > 0.0 && diversity_gamma > 0.0 {
            primitives::check_count("x", vec![x.elem_count() / self.d, self.codebook_size()], x.device())?;
        }
        Ok(())
    }

    /// The loss alone, a scalar, f32 for half types.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize).
    pub fn loss(&self, x: &Tensor) -> Result<Tensor> {
        self.check_rows(x)?;
        let LfqConfig { entropy_loss_weight, commitment_loss_weight, diversity_gamma, .. } = self.config;
        let rows = x.to_dtype(wide(x.dtype()))?.reshape(((), self.d))?;
        let mut loss = Tensor::zeros((), rows.dtype(), x.device())?;
        if entropy_loss_weight > 0.0 {
            let mut entropy = self.row_entropy(&rows)?;
            if diversity_gamma > 0.0 {
                entropy = (entropy - (self.codebook_entropy(&rows)? * diversity_gamma)?)?;
            }
            loss = (loss + (entropy * entropy_loss_weight)?)?;
        }
        if commitment_loss_weight > 0.0 {
            let off = (&rows - self.values(&rows)?)?.sqr()?.mean_all()?;
            loss = (loss + (off * commitment_loss_weight)?)?;
        }
        Ok(loss)
    }

    /// The log-odds of each bit: the difference of two squared distances, scaled.
    fn log_odds(&self, rows: &Tensor) -> Result<Tensor> {
        Ok((rows * (4.0 * self.config.codebook_scale * self.config.inv_temperature))?)
    }

    /// The mean of the rows' entropies: of each bit that of a coin, `ln(1 + e^-|a|) + |a| / (1 + e^|a|)` for log-odds `a`.
    fn row_entropy(&self, rows: &Tensor) -> Result<Tensor> {
        let odds = self.log_odds(rows)?.abs()?;
        let certain = ((odds.neg()?.exp()? + 1.0)?.log()? + (&odds * sigmoid(&odds.neg()?)?)?)?;
        Ok(certain.sum(1)?.mean_all()?)
    }

    /// The entropy of the mean probabilities of the codes.
    fn codebook_entropy(&self, rows: &Tensor) -> Result<Tensor> {
        let odds = self.log_odds(rows)?;
        let (one, zero) = (sigmoid(&odds)?, sigmoid(&odds.neg()?)?);
        let mut joint = Tensor::ones((rows.dim(0)?, 1), rows.dtype(), rows.device())?;
        for bit in 0..self.d {
            let [zero, one] = [&zero, &one].map(|p| joint.broadcast_mul(&p.narrow(1, bit, 1)?));
            joint = Tensor::stack(&[zero?, one?], 2)?.flatten(1, 2)?;
        }
        let mean = joint.mean(0)?;
        // A probability that is 0 adds nothing.
        Ok((&mean * mean.maximum(f32::MIN_POSITIVE as f64)?.log()?)?.sum_all()?.neg()?)
    }

    /// The values of rows, outside the graph.
    fn values(&self, x: &Tensor) -> Result<Tensor> {
        let scale = self.config.codebook_scale;
        Ok(x.detach().gt(0.0)?.to_dtype(x.dtype())?.affine(2.0 * scale, -scale)?)
    }
}

impl Module for Lfq {
    /// Each value of `x` `(.., d)` as the magnitude with its sign; the gradient passes to `x` unchanged.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        check_float_columns(x, self.d)?;
        primitives::check_counted("x", x)?;
        match x.elem_count() {
            0 => Ok(x.clone()),
            _ => Ok(functional::straight_through(x, self.values(x)?)?),
        }
    }
}
