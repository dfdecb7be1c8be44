//! What codebooks are compared with: codes of single numbers.

use anyhow::{Context, Result};
use candle_core::{DType, Device, Module, Tensor, D};
use candle_flash_kmeans::{
    nn::{Codebook, ProductConfig, ProductQuantizer, Rotation},
    Init, KMeans, Metric,
};

/// Numbers that share a scale and an offset, each an f16.
const GROUP: usize = 64;
/// Points that stand for the density of a coordinate.
const POINTS: usize = 4096;
/// Of the random rotation, which is the same in all heads and needs no memory.
pub const SEED: u64 = 0;

/// Rows as integers with the row's own scale and offset, and the bits of those by each value.
pub fn by_token(x: &Tensor, bits: usize) -> Result<(Tensor, f64)> {
    Ok((integers(x, bits)?, 32.0 / x.dim(2)? as f64))
}

/// The same by channel, in groups of tokens; the last group is what is left.
pub fn by_channel(x: &Tensor, bits: usize) -> Result<(Tensor, f64)> {
    let tokens = x.dim(1)?;
    let groups = (0..tokens).step_by(GROUP).map(|from| {
        let channels = x.narrow(1, from, GROUP.min(tokens - from))?.transpose(1, 2)?.contiguous()?;
        Ok(integers(&channels, bits)?.transpose(1, 2)?)
    });
    let scales = tokens.div_ceil(GROUP) as f64 / tokens as f64;
    Ok((Tensor::cat(&groups.collect::<Result<Vec<_>>>()?, 1)?, 32.0 * scales))
}

fn integers(x: &Tensor, bits: usize) -> Result<Tensor> {
    let (x, last, levels) = (x.to_dtype(DType::F32)?, x.rank() - 1, ((1 << bits) - 1) as f64);
    let half = |t: Tensor| t.to_dtype(DType::F16)?.to_dtype(DType::F32);
    let low = half(x.min_keepdim(last)?)?;
    let step = half(((x.max_keepdim(last)? - &low)? / levels)?)?.maximum(1e-6)?;
    let code = x.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, levels)?;
    Ok(code.broadcast_mul(&step)?.broadcast_add(&low)?.to_dtype(DType::F16)?)
}

/// Rows as TurboQuant codes them for least squares (Zandieh et al. 2025, its algorithm for the mean squared error): a unit
/// vector, turned at random, whose coordinates become levels, and a length in f16. And the bits of lengths by each value.
pub fn turbo(x: &Tensor, bits: usize) -> Result<(Tensor, f64)> {
    let (rows, d) = (x.to_dtype(DType::F32)?, x.dim(2)?);
    let lengths = rows.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?.to_dtype(DType::F16)?.to_dtype(DType::F32)?;
    let rotation = matrix(&rows, Rotation::Random { seed: SEED }, 1, &KMeans::new(1).max_iters(0))?;
    let unit = rows.broadcast_div(&lengths.maximum(f64::from(f32::MIN_POSITIVE))?)?;
    let turned = unit.broadcast_matmul(&rotation)?.reshape(((), 1))?;
    let levels = levels(d, 1 << bits)?.to_dtype(DType::F32)?.to_device(x.device())?;
    let coded = Codebook::new(&levels, Metric::SquaredEuclidean)?.forward(&turned)?.reshape(x.shape())?;
    let unit = coded.broadcast_matmul(&rotation.t()?.contiguous()?)?;
    Ok((unit.broadcast_mul(&lengths)?.to_dtype(DType::F16)?, 16.0 / d as f64))
}

/// The `k` levels with the least mean squared error for a coordinate of a random unit vector of `d` dimensions (Lloyd 1957, Max
/// 1960), f64 `(k, 1)`: k-means of points by the density `(1 - x^2)^((d - 3) / 2)`.
pub fn levels(d: usize, k: usize) -> Result<Tensor> {
    let points = (0..POINTS).map(|i| (2 * i + 1) as f64 / POINTS as f64 - 1.0);
    let points = Tensor::from_iter(points, &Device::Cpu)?.reshape((POINTS, 1))?;
    let density = (1.0 - points.sqr()?)?.powf((d as f64 - 3.0) / 2.0)?.squeeze(1)?;
    Ok(KMeans::new(k).init(Init::Optimal).sample_weights(&density).fit(&points)?.centroids)
}

/// What rows `(heads, tokens, dim)` are multiplied by, as the library finds it for `pieces` of them, by the weights of `kmeans`.
pub fn matrix(x: &Tensor, rotation: Rotation, pieces: usize, kmeans: &KMeans) -> Result<Tensor> {
    let config = ProductConfig { rotation, ..ProductConfig::new(pieces) };
    let quantizer = ProductQuantizer::train_with(x, &config, kmeans)?;
    Ok(quantizer.rotation().context("the configuration has a rotation")?.clone())
}
