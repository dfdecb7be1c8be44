//! How the weights of linear layers are stored in a few bits, and how many.

use crate::residual::ResidualCodes;
use anyhow::{bail, Context, Result};
use candle_core::{
    quantized::{GgmlDType, QTensor},
    DType, Device, Module, Tensor,
};
use candle_flash_kmeans::{
    nn::{Codebook, Granularity, LutConfig, LutWeights},
    Metric,
};
use models::timing::seconds;

/// Neighbouring weights of a row that share a scale, an f16.
const GROUP: usize = 64;
/// Rounds in which levels, scales and codes are fitted to each other.
const ROUNDS: usize = 3;
/// The sixteen levels of NF4, quantiles of normal numbers (Dettmers et al. 2023).
const NF4: [f32; 16] = [
    -1.0,
    -0.6961928,
    -0.52507305,
    -0.3949175,
    -0.28444138,
    -0.18477343,
    -0.09105004,
    0.0,
    0.0795803,
    0.1609302,
    0.2461123,
    0.33791524,
    0.44070983,
    0.562617,
    0.72295684,
    1.0,
];

/// The weights of a linear layer.
pub struct Matrix {
    /// (rows, inputs)
    pub weight: Tensor,
    /// (inputs, inputs): the second moments of what rows are multiplied by in a calibration text
    pub hessian: Option<Tensor>,
}

/// Second moments of few rows (rows, inputs): those of different columns, which such rows say little of, count the less the fewer rows there
/// are for each column (shrinkage to the diagonal, after Ledoit and Wolf 2004).
pub fn second_moments(x: &Tensor) -> Result<Tensor> {
    shrunk(&(x.t()?.matmul(x)? / x.dim(0)? as f64)?, x.dim(0)?)
}

/// The same of the second moments (inputs, inputs) of so many rows.
pub fn shrunk(moments: &Tensor, rows: usize) -> Result<Tensor> {
    let inputs = moments.dim(0)?;
    let diagonal = (moments * Tensor::eye(inputs, DType::F32, moments.device())?)?;
    let share = rows as f64 / (rows + inputs) as f64;
    Ok(((moments * share)? + (diagonal * (1.0 - share))?)?)
}

impl Matrix {
    pub fn hessian(&self) -> Result<&Tensor> {
        self.hessian.as_ref().context("a method that is calibrated, and no calibration")
    }

    /// (inputs): the mean square of what each column is multiplied by
    pub fn importance(&self) -> Result<Tensor> {
        let hessian = self.hessian()?;
        let each = Tensor::eye(hessian.dim(0)?, DType::F32, hessian.device())?;
        Ok((hessian * each)?.sum(0)?)
    }
}

/// What errors count by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// All the same
    Square,
    /// Each column alone, by the diagonal of its Hessian
    Importance,
    /// What the layer puts out: errors may make up for each other
    Hessian,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Evenly spaced levels from the least to the largest weight of a group, which has a scale and an offset
    Rounded { bits: usize },
    /// Fixed levels, in groups of so many
    Nf4 { group: usize },
    /// llama.cpp's types, by Candle; by importance with what llama.cpp calls an importance matrix
    Ggml { dtype: GgmlDType, by: By },
    /// Levels that all rows of a matrix share, the best there are for its scaled weights, and so many outliers a thousand weights
    Shared { bits: usize, outliers: usize, by: By },
    /// Levels of each row's own, without groups
    Own { bits: usize },
    /// Sums of so many entries of 256, and one of a few, for eight weights at a time
    Residual { stages: usize, few: usize, by: By },
}

/// Some matrices have become this.
pub struct Quantized {
    pub weights: Vec<Tensor>,
    /// Of a weight, with all that is stored beside it
    pub bits: f64,
    /// The length of the error by that of the weights
    pub error: f64,
    /// Of quantisation
    pub seconds: f64,
}

impl Method {
    pub fn name(self) -> String {
        let calibrated = |by| match by {
            By::Square => "",
            By::Importance => ", by importance",
            By::Hessian => ", by the Hessian",
        };
        match self {
            Self::Rounded { bits } => format!("rounded to {bits} bits"),
            Self::Nf4 { group } => format!("NF4, groups of {group}"),
            Self::Ggml { dtype, by } => format!("{dtype:?}{}", calibrated(by)).replacen('K', "_K", 1),
            Self::Shared { bits, outliers, by } => {
                let outliers = if outliers > 0 { ", outliers" } else { "" };
                format!("{} levels{outliers}{}", 1 << bits, calibrated(by))
            }
            Self::Own { bits } => format!("{} levels a row", 1 << bits),
            Self::Residual { stages, few, by } => {
                let few = if few > 0 { format!(", 1 of {few}") } else { String::new() };
                format!("sums of {stages} entries of 256{few}{}", calibrated(by))
            }
        }
    }

    pub fn by(self) -> By {
        match self {
            Self::Ggml { by, .. } | Self::Shared { by, .. } | Self::Residual { by, .. } => by,
            Self::Rounded { .. } | Self::Nf4 { .. } | Self::Own { .. } => By::Square,
        }
    }

    /// The line of the picture that it is a point of.
    pub fn family(self) -> &'static str {
        match self {
            Self::Rounded { .. } => "rounded",
            Self::Nf4 { .. } => "NF4",
            Self::Ggml { by: By::Square, .. } => "llama.cpp's types",
            Self::Ggml { .. } => "llama.cpp's types, importance",
            Self::Shared { by: By::Hessian, .. } => "optimal levels, Hessian",
            Self::Shared { by: By::Importance, .. } => "optimal levels, importance",
            Self::Shared { .. } | Self::Own { .. } => "optimal levels",
            Self::Residual { by: By::Hessian, .. } => "residual codes, Hessian",
            Self::Residual { by: By::Importance, .. } => "residual codes, importance",
            Self::Residual { .. } => "residual codes",
        }
    }

    pub fn quantize(self, matrices: &[Matrix]) -> Result<Quantized> {
        let each = || -> Result<Vec<(Tensor, f64)>> {
            if let Self::Residual { stages, few, by } = self {
                let codes = ResidualCodes::train(matrices, stages, few, by)?;
                return matrices.iter().map(|matrix| codes.quantize(matrix)).collect();
            }
            matrices.iter().map(|matrix| self.matrix(matrix)).collect()
        };
        let (each, seconds) = seconds(&Device::Cpu, each)?;
        let (mut bits, mut count, mut off, mut square) = (0.0, 0, 0.0, 0.0);
        let squares = |t: &Tensor| anyhow::Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?));
        for ((weight, bits_each), matrix) in each.iter().zip(matrices) {
            bits += bits_each * weight.elem_count() as f64;
            count += weight.elem_count();
            off += squares(&(weight - &matrix.weight)?)?;
            square += squares(&matrix.weight)?;
        }
        let weights = each.into_iter().map(|(weight, _)| weight).collect();
        Ok(Quantized { weights, bits: bits / count as f64, error: (off / square).sqrt(), seconds })
    }

    /// What a matrix becomes, and the bits of a weight.
    fn matrix(self, matrix: &Matrix) -> Result<(Tensor, f64)> {
        let weight = &matrix.weight;
        let (rows, inputs) = weight.dims2()?;
        match self {
            Self::Rounded { bits } => {
                let groups = weight.reshape((rows, inputs / GROUP, GROUP))?;
                let (low, top) = (half(&groups.min_keepdim(2)?)?, ((1 << bits) - 1) as f64);
                let step = half(&((groups.max_keepdim(2)? - &low)? / top)?)?.maximum(f32::MIN_POSITIVE)?;
                let code = groups.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, top)?;
                let values = code.broadcast_mul(&step)?.broadcast_add(&low)?;
                Ok((values.reshape(weight.shape())?, bits as f64 + 32.0 / GROUP as f64))
            }
            Self::Nf4 { group } => {
                let groups = weight.reshape((rows, inputs / group, group))?;
                let scale = half(&groups.abs()?.max_keepdim(2)?)?.maximum(f32::MIN_POSITIVE)?;
                let scaled = groups.broadcast_div(&scale)?.reshape((rows, inputs, 1))?;
                let levels = Tensor::new(&NF4, weight.device())?.unsqueeze(1)?;
                let values = Codebook::new(&levels, Metric::SquaredEuclidean)?.forward(&scaled)?;
                let values = values.reshape(groups.shape())?.broadcast_mul(&scale)?;
                Ok((values.reshape(weight.shape())?, 4.0 + 16.0 / group as f64))
            }
            Self::Ggml { dtype, by } => {
                // Rows, and their importance, are filled with zeros up to whole blocks, which are not counted: a scale within a block has only
                // zeros, or none.
                let block = dtype.block_size();
                let fill = inputs.next_multiple_of(block) - inputs;
                let padded = weight.pad_with_zeros(1, 0, fill)?;
                let stored = match by {
                    By::Square => QTensor::quantize(&padded, dtype)?,
                    By::Importance => {
                        let importance = matrix.importance()?.pad_with_zeros(0, 0, fill)?.to_vec1()?;
                        QTensor::quantize_imatrix(&padded, &importance, dtype)?
                    }
                    By::Hessian => bail!("llama.cpp's types know an importance, not a Hessian"),
                };
                let values = stored.dequantize(weight.device())?;
                let bits = (8 * dtype.type_size()) as f64 / block as f64;
                Ok((values.narrow(1, 0, inputs)?.contiguous()?, bits))
            }
            Self::Shared { bits, outliers, by } => {
                // Longer rows have scales to spare.
                let group_size = if inputs % 128 == 0 && inputs >= 1024 { 2 * GROUP } else { GROUP };
                let outliers = outliers * inputs / 1000;
                let config = LutConfig { bits, group_size, levels: Granularity::Tensor, outliers, rounds: ROUNDS };
                levels(matrix, config, by)
            }
            Self::Own { bits } => levels(matrix, LutConfig { bits, ..LutConfig::default() }, By::Square),
            Self::Residual { .. } => bail!("residual codes have entries of all matrices"),
        }
    }
}

fn levels(matrix: &Matrix, config: LutConfig, by: By) -> Result<(Tensor, f64)> {
    let weights = match by {
        By::Square => LutWeights::quantize(&matrix.weight, None, &config)?,
        By::Importance => LutWeights::quantize(&matrix.weight, Some(&matrix.importance()?), &config)?,
        By::Hessian => LutWeights::quantize_calibrated(&matrix.weight, matrix.hessian()?, &config)?,
    };
    Ok((weights.dequantize()?, weights.bits_per_weight()))
}

/// As f16 stores it.
pub fn half(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F16)?.to_dtype(DType::F32)?)
}
