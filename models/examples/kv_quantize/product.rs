//! Codebooks for the pieces of rows.

use crate::{
    coder::{Basis, Product},
    scalar::{matrix, SEED},
};
use anyhow::Result;
use candle_core::{DType, Module, Tensor, D};
use candle_flash_kmeans::{
    nn::{Codebook, ProductConfig, ProductQuantizer, Rotation},
    Init, KMeans,
};

pub const PASSES: usize = 8;
/// Levels of lengths, which are chosen among a head's own.
const LENGTHS: usize = 64;
/// Bits of a number that is kept as f16.
const HALF: f64 = 16.0;
/// Tokens that nothing has read yet may still be read: each counts this share of what a token counts on average.
const UNREAD: f64 = 0.1;

/// Rows f16 (heads, tokens, dim), and what they count (heads, tokens).
pub struct Rows {
    pub x: Tensor,
    pub read: Tensor,
}

/// What has become of rows.
pub struct Coded {
    pub x: Tensor,
    /// Of a value
    pub codes: f64,
    /// Of a value, for all besides codes that is kept with this prompt
    pub overhead: f64,
    /// Codebooks trained
    pub codebooks: usize,
}

impl Product {
    /// Codes `rows`. What is the other text's is made of `other`; no bits are counted for it, since it comes with the model.
    pub fn code(self, rows: &Rows, other: &Rows, init: &Init) -> Result<Coded> {
        let (_, tokens, dim) = rows.x.dims3()?;
        let (tokens, dim, pieces) = (tokens as f64, dim as f64, dim / self.columns);
        let trained_on = if self.of_other { other } else { rows };
        let kmeans = |entries| KMeans::new(entries).init(init.clone()).max_iters(PASSES).tol(0.0);
        let (mut codes, mut overhead) = (0.0, 0.0);
        let own = |bits: f64| if self.of_other { 0.0 } else { bits };

        let lengths = match self.lengths {
            true => {
                let (all, weights) = (lengths(&trained_on.x)?, self.weights(trained_on, None)?);
                let levels = Codebook::train(&all, &weighted(kmeans(LENGTHS), weights))?;
                codes += levels.bits_per_value() / dim;
                overhead += own(LENGTHS as f64 * HALF / (tokens * dim));
                Some(levels)
            }
            false => None,
        };
        let (x, length) = shape(&rows.x, lengths.as_ref())?;
        let (sample, sample_length) = shape(&trained_on.x, lengths.as_ref())?;
        // An error of a direction is one of the row times its length.
        let weights = self.weights(trained_on, sample_length.as_ref())?;
        let mean = mean(&sample, weights.as_ref())?;
        overhead += own(HALF / tokens);
        let (x, sample) = (x.broadcast_sub(&mean)?, sample.broadcast_sub(&mean)?);

        let rotation = match self.basis {
            Basis::Columns => Rotation::None,
            Basis::Random => Rotation::Random { seed: SEED },
            Basis::Principal | Basis::PrincipalOfOther => {
                let (sample, weights) = match self.basis {
                    Basis::Principal => (sample.clone(), weights.clone()),
                    _ => {
                        let (sample, length) = shape(&other.x, lengths.as_ref())?;
                        (sample, self.weights(other, length.as_ref())?)
                    }
                };
                let once = weighted(KMeans::new(1).max_iters(0), weights);
                let components = matrix(&sample, Rotation::Pca, pieces, &once)?;
                if self.basis == Basis::Principal {
                    overhead += own(HALF * dim / tokens);
                }
                // It is kept in half precision, and takes part as it is kept.
                Rotation::Given(components.to_dtype(DType::F16)?)
            }
        };
        let config = ProductConfig { pieces, rotation, shared: self.shared };
        let kmeans = weighted(kmeans(self.entries), weights);
        let (mut sum, mut rest, mut sample_rest) = (mean.broadcast_as(x.shape())?, x, sample);
        let mut codebooks = 0;
        for _ in 0..self.stages {
            let quantizer = ProductQuantizer::train_with(&sample_rest, &config, &kmeans)?;
            let coded = quantizer.forward(&rest)?;
            (sum, rest) = ((sum + &coded)?, (rest - &coded)?);
            sample_rest = (&sample_rest - quantizer.forward(&sample_rest)?)?;
            codes += quantizer.bits_per_value();
            overhead += own(quantizer.bits_per_value_with_codebook(tokens as usize) - quantizer.bits_per_value());
            codebooks += quantizer.codebook().centroids().dim(0)? * if self.shared { 1 } else { pieces };
        }
        let x = length.map_or_else(|| Ok(sum.clone()), |length| sum.broadcast_mul(&length))?;
        Ok(Coded { x, codes, overhead, codebooks })
    }

    /// What rows of `length` count in codebooks.
    fn weights(self, rows: &Rows, length: Option<&Tensor>) -> Result<Option<Tensor>> {
        let read = match self.read {
            true => {
                let share = rows.read.broadcast_div(&rows.read.mean_keepdim(1)?)?;
                Some((share + UNREAD)?)
            }
            false => None,
        };
        let Some(length) = length else { return Ok(read) };
        let squares = length.to_dtype(DType::F32)?.sqr()?.squeeze(2)?;
        Ok(Some(read.map_or_else(|| Ok(squares.clone()), |read| read * &squares)?))
    }
}

fn weighted(kmeans: KMeans, weights: Option<Tensor>) -> KMeans {
    match weights {
        Some(weights) => kmeans.sample_weights(&weights),
        None => kmeans,
    }
}

/// The root mean squares of rows, (heads, tokens, 1): lengths whose directions fit half precision well.
fn lengths(x: &Tensor) -> Result<Tensor> {
    Ok(x.to_dtype(DType::F32)?.sqr()?.mean_keepdim(D::Minus1)?.sqrt()?.to_dtype(DType::F16)?)
}

/// Rows by their coded lengths, and these.
fn shape(x: &Tensor, levels: Option<&Codebook>) -> Result<(Tensor, Option<Tensor>)> {
    let Some(levels) = levels else { return Ok((x.clone(), None)) };
    let length = levels.forward(&lengths(x)?)?;
    Ok((x.broadcast_div(&length.maximum(1e-3)?)?, Some(length)))
}

/// (heads, 1, dim), as it is kept.
fn mean(x: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
    let x = x.to_dtype(DType::F32)?;
    let mean = match weights {
        None => x.mean_keepdim(1)?,
        Some(weights) => {
            let share = weights.broadcast_div(&weights.sum_keepdim(1)?)?.unsqueeze(1)?;
            share.matmul(&x)?
        }
    };
    Ok(mean.to_dtype(DType::F16)?)
}
