//! How the weights of linear layers are stored in a few bits, and how many.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, LutConfig, LutWeights},
    Metric,
};
use models::timing::seconds;
use std::collections::BTreeSet;

/// Neighbouring weights of a row that share a scale, an f16.
const GROUP: usize = 64;
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
    /// (inputs): the mean square of what each column is multiplied by
    pub importance: Option<Tensor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Evenly spaced levels from the least to the largest weight of a group, which has a scale and an offset
    Rounded {
        bits: usize,
    },
    Nf4,
    /// Levels of each row's own, the best there are for its scaled weights
    Table {
        entries: usize,
        weighted: bool,
    },
    /// The same of rows that have one scale each
    Row {
        entries: usize,
    },
}

/// Some matrices have become this.
pub struct Quantized {
    pub weights: Vec<Tensor>,
    /// Of a weight, with scales and levels
    pub bits: f64,
    /// The length of the error by that of the weights
    pub error: f64,
    /// Of clustering
    seconds: f64,
}

impl Quantized {
    /// The time of clustering, where there was any.
    pub fn clustered_in(&self) -> String {
        if self.seconds > 0.0 {
            format!("{:.3} s", self.seconds)
        } else {
            String::new()
        }
    }
}

impl Method {
    pub fn name(self) -> String {
        match self {
            Self::Rounded { bits } => format!("rounded to {bits} bits"),
            Self::Nf4 => "NF4".into(),
            Self::Table { entries, weighted: true } => format!("{entries} levels a row, weighted"),
            Self::Table { entries, weighted: false } => format!("{entries} levels a row"),
            Self::Row { entries } => format!("{entries} levels a row, no groups"),
        }
    }

    /// All rows of a length in one call, from whichever matrix.
    pub fn quantize(self, matrices: &[Matrix]) -> Result<Quantized> {
        let inputs = |i: &usize| matrices[*i].weight.dims()[1];
        let lengths: BTreeSet<usize> = (0..matrices.len()).map(|i| inputs(&i)).collect();
        let mut weights: Vec<_> = matrices.iter().map(|matrix| matrix.weight.clone()).collect();
        let (mut bits, mut count, mut seconds) = (0.0, 0, 0.0);
        let (mut off, mut square) = (0.0, 0.0);
        for length in lengths {
            let these: Vec<usize> = (0..matrices.len()).filter(|i| inputs(i) == length).collect();
            let rows = Tensor::cat(&these.iter().map(|&i| &matrices[i].weight).collect::<Vec<_>>(), 0)?;
            let importance = match self {
                Self::Table { weighted: true, .. } => {
                    let each = these.iter().map(|&i| {
                        let importance = matrices[i].importance.as_ref().context("weights without a calibration")?;
                        Ok(importance.broadcast_as(matrices[i].weight.shape())?)
                    });
                    Some(Tensor::cat(&each.collect::<Result<Vec<_>>>()?, 0)?)
                }
                _ => None,
            };
            let squares = |t: &Tensor| anyhow::Ok(f64::from(t.sqr()?.sum_all()?.to_scalar::<f32>()?));
            square += squares(&rows)?;
            let exact = rows;
            let (rows, bits_each, time) = self.rows(&exact, importance.as_ref())?;
            off += squares(&(&rows - exact)?)?;
            seconds += time;
            bits += bits_each * rows.elem_count() as f64;
            count += rows.elem_count();
            let mut from = 0;
            for i in these {
                let outputs = weights[i].dim(0)?;
                weights[i] = rows.narrow(0, from, outputs)?;
                from += outputs;
            }
        }
        Ok(Quantized { weights, bits: bits / count as f64, error: (off / square).sqrt(), seconds })
    }

    /// Quantises rows (rows, inputs); returns them, the bits of a weight, and the seconds of clustering.
    fn rows(self, rows: &Tensor, importance: Option<&Tensor>) -> Result<(Tensor, f64, f64)> {
        let (count, inputs) = rows.dims2()?;
        ensure!(inputs % GROUP == 0, "rows of {inputs} weights: groups have {GROUP}");
        if let Self::Table { entries, .. } | Self::Row { entries } = self {
            let group_size = if matches!(self, Self::Row { .. }) { 0 } else { GROUP };
            let config = LutConfig { bits: entries.ilog2() as usize, group_size, ..LutConfig::default() };
            let quantize = || Ok(LutWeights::quantize(rows, importance, &config)?);
            let (weights, seconds) = seconds(&Device::Cpu, quantize)?;
            return Ok((weights.dequantize()?, weights.bits_per_weight(), seconds));
        }
        let groups = (count, inputs / GROUP, GROUP);
        let (grouped, scale_bits) = (rows.reshape(groups)?, 16.0 / GROUP as f64);
        if let Self::Rounded { bits } = self {
            let (low, top) = (half(&grouped.min_keepdim(2)?)?, ((1 << bits) - 1) as f64);
            let step = half(&((grouped.max_keepdim(2)? - &low)? / top)?)?.maximum(f32::MIN_POSITIVE)?;
            let code = grouped.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, top)?;
            let values = code.broadcast_mul(&step)?.broadcast_add(&low)?.reshape(rows.shape())?;
            return Ok((values, bits as f64 + 2.0 * scale_bits, 0.0));
        }
        let scale = half(&grouped.abs()?.max_keepdim(2)?)?.maximum(f32::MIN_POSITIVE)?;
        let scaled = grouped.broadcast_div(&scale)?.reshape((count, inputs, 1))?;
        let levels = Tensor::new(&NF4, scaled.device())?.unsqueeze(1)?;
        let values = Codebook::new(&levels, Metric::SquaredEuclidean)?.forward(&scaled)?;
        Ok((values.reshape(groups)?.broadcast_mul(&scale)?.reshape(rows.shape())?, 4.0 + scale_bits, 0.0))
    }
}

/// As f16 stores it.
fn half(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F16)?.to_dtype(DType::F32)?)
}
