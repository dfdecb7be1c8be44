//! A layer of such weights, and its file.

use super::{check_float, LutConfig, LutWeights};
use crate::{
    error::{Error, Result},
    host, problem,
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Linear, Module};
use std::path::Path;

/// A linear layer of [`LutWeights`], with a bias or without: `x W^T + b`, as Candle's [`Linear`]. It learns nothing, and no gradient flows
/// through it.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_flash_kmeans::nn::{LutConfig, LutLinear};
///
/// let weight = Tensor::new(&[[0f32, 1., 0., 1.], [4., 2., 4., 8.]], &Device::Cpu)?;
/// let linear = candle_nn::Linear::new(weight, Some(Tensor::new(&[0f32, 1.], &Device::Cpu)?));
/// let small = LutLinear::quantize(&linear, None, &LutConfig { bits: 2, ..LutConfig::default() })?;
/// let x = Tensor::new(&[[1f32, 2., 3., 4.]], &Device::Cpu)?;
/// assert_eq!(small.forward(&x)?.to_vec2::<f32>()?, linear.forward(&x)?.to_vec2::<f32>()?);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LutLinear {
    weights: LutWeights,
    /// f32 `(outputs)`.
    bias: Option<Tensor>,
}

impl LutLinear {
    /// Of weights and a bias, float `(outputs)`, which is kept in f32.
    ///
    /// # Errors
    /// Refuses a bias of another shape, dtype or device.
    pub fn new(weights: LutWeights, bias: Option<&Tensor>) -> Result<Self> {
        if let Some(bias) = bias {
            check_float("bias", bias)?;
            problem::check_device("bias", bias, weights.codes.device())?;
            if bias.dims() != [weights.outputs()] {
                let expected = vec![weights.outputs()];
                return Err(Error::Shape { argument: "bias", got: bias.dims().to_vec(), expected });
            }
        }
        let bias = bias.map(|bias| bias.detach().to_dtype(DType::F32)?.force_contiguous()).transpose()?;
        Ok(Self { weights, bias })
    }

    /// Quantises the weights of a layer, as [`LutWeights::quantize`] does.
    ///
    /// # Errors
    /// As there.
    pub fn quantize(linear: &Linear, importance: Option<&Tensor>, config: &LutConfig) -> Result<Self> {
        Self::new(LutWeights::quantize(linear.weight(), importance, config)?, linear.bias())
    }

    /// Quantises the weights of a layer, as [`LutWeights::quantize_calibrated`] does.
    ///
    /// # Errors
    /// As there.
    pub fn quantize_calibrated(linear: &Linear, hessian: &Tensor, config: &LutConfig) -> Result<Self> {
        Self::new(LutWeights::quantize_calibrated(linear.weight(), hessian, config)?, linear.bias())
    }

    /// The weights.
    pub fn weights(&self) -> &LutWeights {
        &self.weights
    }

    /// The bias, f32 `(outputs)`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let bias = self.bias.as_ref().map(|bias| host::to_device(bias, device)).transpose()?;
        Ok(Self { weights: self.weights.to_device(device)?, bias })
    }

    /// Writes codes, levels, scales, outliers and bias as one safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let LutConfig { bits, group_size, levels, outliers, rounds } = self.weights.config;
        let settings = [
            ("kind", KIND.to_string()),
            ("bits", bits.to_string()),
            ("group_size", group_size.to_string()),
            ("levels", levels.name().to_string()),
            ("outliers", outliers.to_string()),
            ("rounds", rounds.to_string()),
            ("inputs", self.weights.inputs.to_string()),
        ];
        let bias = self.bias.iter().map(|bias| ("bias", bias));
        let tensors = self.weights.tensors().into_iter().chain(bias).map(|(name, t)| (name.to_string(), t));
        saved::write(path.as_ref(), tensors, settings.map(|(key, value)| (key.to_string(), value)))
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is no saved layer of this kind.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = Saved::read(path.as_ref(), &Device::Cpu)?;
        file.expect("kind", KIND)?;
        let weights = LutWeights::read(&mut file, device)?;
        let bias = file.holds("bias").then(|| file.take("bias")).transpose()?;
        let bias = bias.map(|bias| host::to_device(&bias, device)).transpose()?;
        Self::new(weights, bias.as_ref()).map_err(|e| file.bad(e.to_string()))
    }
}

impl Module for LutLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.weights.product(x, self.bias.as_ref())?)
    }
}

/// Files of these are marked with this.
const KIND: &str = "lut_linear";
