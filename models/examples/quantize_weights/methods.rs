//! How the weights of linear layers are stored in a few bits, and how many.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Module, Tensor};
use candle_flash_kmeans::{nn::Codebook, Init, KMeans, Metric};
use models::timing::seconds;
use std::collections::BTreeSet;

/// Neighbouring weights of a row that share a scale, an f16.
const GROUP: usize = 64;
const PASSES: usize = 15;
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
    /// Levels of each row's own: the centroids of its scaled weights
    Table {
        entries: usize,
        weighted: bool,
    },
}

/// Some matrices have become this.
pub struct Quantized {
    pub weights: Vec<Tensor>,
    /// Of a weight, with scales and levels
    pub bits: f64,
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
        }
    }

    /// All rows of a length in one call, from whichever matrix.
    pub fn quantize(self, matrices: &[Matrix]) -> Result<Quantized> {
        let inputs = |i: &usize| matrices[*i].weight.dims()[1];
        let lengths: BTreeSet<usize> = (0..matrices.len()).map(|i| inputs(&i)).collect();
        let mut weights: Vec<_> = matrices.iter().map(|matrix| matrix.weight.clone()).collect();
        let (mut bits, mut count, mut seconds) = (0.0, 0, 0.0);
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
            let (rows, time) = self.rows(&rows, importance.as_ref())?;
            seconds += time;
            bits += self.bits(length) * rows.elem_count() as f64;
            count += rows.elem_count();
            let mut from = 0;
            for i in these {
                let outputs = weights[i].dim(0)?;
                weights[i] = rows.narrow(0, from, outputs)?;
                from += outputs;
            }
        }
        Ok(Quantized { weights, bits: bits / count as f64, seconds })
    }

    /// Bits of one of so many weights of a row.
    fn bits(self, inputs: usize) -> f64 {
        let scale = 16.0 / GROUP as f64;
        match self {
            Self::Rounded { bits } => bits as f64 + 2.0 * scale,
            Self::Nf4 => 4.0 + scale,
            Self::Table { entries, .. } => (entries as f64).log2() + scale + (16 * entries) as f64 / inputs as f64,
        }
    }

    /// Quantises rows (rows, inputs); returns them, and the seconds of clustering.
    fn rows(self, rows: &Tensor, importance: Option<&Tensor>) -> Result<(Tensor, f64)> {
        let (count, inputs) = rows.dims2()?;
        ensure!(inputs % GROUP == 0, "rows of {inputs} weights: groups have {GROUP}");
        let groups = (count, inputs / GROUP, GROUP);
        let grouped = rows.reshape(groups)?;
        if let Self::Rounded { bits } = self {
            let (low, top) = (half(&grouped.min_keepdim(2)?)?, ((1 << bits) - 1) as f64);
            let step = half(&((grouped.max_keepdim(2)? - &low)? / top)?)?.maximum(f32::MIN_POSITIVE)?;
            let code = grouped.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, top)?;
            return Ok((code.broadcast_mul(&step)?.broadcast_add(&low)?.reshape(rows.shape())?, 0.0));
        }
        let scale = half(&grouped.abs()?.max_keepdim(2)?)?.maximum(f32::MIN_POSITIVE)?;
        let scaled = grouped.broadcast_div(&scale)?.reshape((count, inputs, 1))?;
        let (levels, seconds) = match self {
            Self::Table { entries, .. } => {
                // An error of a scaled weight counts by the squares of its scale and of what it is multiplied by.
                let mut counts = scale.sqr()?.broadcast_as(groups)?;
                if let Some(importance) = importance {
                    counts = (counts * importance.reshape(groups)?)?;
                }
                let counts = counts.reshape((count, inputs))?;
                let start = Init::Given(quantiles(&scaled, entries)?);
                let kmeans = KMeans::new(entries).sample_weights(&counts).max_iters(PASSES).init(start);
                let (fit, seconds) = seconds(scaled.device(), || Ok(kmeans.fit(&scaled)?))?;
                (half(&fit.centroids)?, seconds)
            }
            _ => (Tensor::new(&NF4, scaled.device())?.unsqueeze(1)?, 0.0),
        };
        let values = Codebook::new(&levels, Metric::SquaredEuclidean)?.forward(&scaled)?;
        Ok((values.reshape(groups)?.broadcast_mul(&scale)?.reshape(rows.shape())?, seconds))
    }
}

/// As f16 stores it.
fn half(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F16)?.to_dtype(DType::F32)?)
}

/// Evenly spaced quantiles of each row: `scaled` is (rows, inputs, 1). They lost less than seeds by k-means++, random
/// ones and even steps.
fn quantiles(scaled: &Tensor, count: usize) -> Result<Tensor> {
    let (rows, inputs, _) = scaled.dims3()?;
    let sorted = scaled.squeeze(2)?.sort_last_dim(true)?.0;
    let index = Tensor::from_iter((0..count).map(|i| ((2 * i + 1) * inputs / (2 * count)) as u32), scaled.device())?;
    Ok(sorted.index_select(&index, 1)?.reshape((rows, count, 1))?)
}
