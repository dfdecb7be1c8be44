//! How a cached prompt is stored in fewer bits, and how many.

use anyhow::Result;
use candle_core::{DType, Module, Tensor};
use candle_flash_kmeans::{
    nn::{ProductQuantizer, ResidualQuantizer},
    Init, KMeans,
};
use indicatif::ProgressBar;
use models::{
    smollm2::{attend, SmolLm2},
    timing::seconds,
};

/// Tokens at the start that stay exact in every method: models park attention there, and their keys are unlike others.
pub const SINKS: usize = 4;
/// Numbers that share a scale and an offset, each an f16.
const GROUP: usize = 64;
pub const PASSES: usize = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Exact,
    /// Asymmetric, as KIVI has them (Liu et al. 2024): keys by channel in groups of tokens, values by token.
    Integers {
        bits: usize,
        rotated: bool,
    },
    Product {
        values: usize,
        entries: usize,
        own: bool,
    },
    Residual {
        values: usize,
        entries: usize,
        stages: usize,
    },
}

impl Method {
    pub const ALL: [Self; 9] = [
        Self::Integers { bits: 2, rotated: true },
        Self::Integers { bits: 3, rotated: true },
        Self::Integers { bits: 4, rotated: true },
        Self::Integers { bits: 2, rotated: false },
        Self::Product { values: 4, entries: 64, own: true },
        Self::Product { values: 4, entries: 256, own: true },
        Self::Product { values: 8, entries: 256, own: true },
        Self::Residual { values: 8, entries: 256, stages: 2 },
        Self::Product { values: 4, entries: 256, own: false },
    ];

    pub fn name(self) -> String {
        match self {
            Self::Exact => "f16".into(),
            Self::Integers { bits, rotated: true } => format!("int{bits}"),
            Self::Integers { bits, rotated: false } => format!("int{bits}, keys before the rotation"),
            Self::Product { values, entries, own: true } => format!("{entries} entries for {values} values"),
            Self::Product { values, entries, own: false } => format!("{entries} for {values}, trained on another text"),
            Self::Residual { values, entries, stages } => format!("{stages} x {entries} entries for {values} values"),
        }
    }

    /// The line that it is a point of.
    pub fn line(self) -> String {
        match self {
            Self::Exact => self.name(),
            Self::Integers { rotated, .. } if rotated => "integers".into(),
            Self::Integers { .. } => "integers, keys before the rotation".into(),
            Self::Product { values, own: true, .. } => format!("own codebooks, {values} values a code"),
            Self::Product { values, own: false, .. } => format!("another text's codebooks, {values} values"),
            Self::Residual { values, stages, .. } => format!("own codebooks, {stages} codes for {values} values"),
        }
    }
}

/// A prompt's keys and then its values, f16 (2 x layers x key heads, tokens, head_dim).
pub struct Prompt {
    heads: Tensor,
    rotated: bool,
}

/// A prompt has become this.
pub struct Stored {
    pub prompt: Prompt,
    /// Of a value, with scales and own codebooks
    pub bits: f64,
    /// Of a value, for scales and own codebooks alone
    pub overhead: f64,
    /// Codebooks trained, and the time of all
    pub codebooks: usize,
    pub seconds: f64,
}

impl Prompt {
    /// Runs the model over `ids` exactly and keeps the keys as they were before the rotation; `bar` counts blocks.
    pub fn new(model: &SmolLm2, ids: &[u32], bar: &ProgressBar) -> Result<Self> {
        let (mut keys, mut values) = (vec![], vec![]);
        model.forward(ids, 0, |_, heads| {
            keys.push(heads.unrotated.to_dtype(DType::F16)?);
            values.push(heads.values.to_dtype(DType::F16)?);
            bar.inc(1);
            attend(heads)
        })?;
        keys.append(&mut values);
        Ok(Self { heads: Tensor::cat(&keys, 0)?, rotated: false })
    }

    pub fn tokens(&self) -> Result<usize> {
        Ok(self.heads.dim(1)?)
    }

    /// The prompt as `method` stores it; codebooks start from `init`, and those not its own are trained on `other`.
    pub fn stored(&self, model: &SmolLm2, method: Method, other: &Self, init: &Init) -> Result<Stored> {
        let rotated = matches!(method, Method::Integers { rotated: true, .. });
        let heads = if rotated { self.rotated(model)? } else { self.heads.clone() };
        let rest = |heads: &Tensor| heads.narrow(1, SINKS, heads.dim(1)? - SINKS)?.contiguous();
        let x = rest(&heads)?;
        let (tokens, dim) = (x.dim(1)?, x.dim(2)?);
        let kmeans = |entries| KMeans::new(entries).init(init.clone()).max_iters(PASSES).tol(0.0);
        let (x, bits, overhead, codebooks, seconds) = match method {
            Method::Exact => (x, 16.0, 0.0, 0, 0.0),
            Method::Integers { bits, .. } => {
                let halves = x.chunk(2, 0)?;
                let x = Tensor::cat(&[by_channel(&halves[0], bits)?, integers(&halves[1], bits)?], 0)?;
                let scales = [tokens.div_ceil(GROUP) as f64 / tokens as f64, 1.0 / dim as f64];
                let overhead = 32.0 * (scales[0] + scales[1]) / 2.0;
                (x, bits as f64 + overhead, overhead, 0, 0.0)
            }
            Method::Product { values, entries, own } => {
                let sample = if own { x.clone() } else { rest(&other.heads)? };
                let train = || Ok(ProductQuantizer::train(&sample, dim / values, &kmeans(entries))?);
                let (quantizer, seconds) = seconds(x.device(), train)?;
                let codes = quantizer.bits_per_value();
                let bits = if own { quantizer.bits_per_value_with_codebook(tokens) } else { codes };
                (quantizer.forward(&x)?, bits, bits - codes, x.dim(0)? * quantizer.m(), seconds)
            }
            Method::Residual { values, entries, stages } => {
                // One residual quantiser for each piece of a head, as if a piece were a head.
                let shape = (x.dim(0)?, tokens, dim / values, values);
                let pieces = x.reshape(shape)?.transpose(1, 2)?.contiguous()?;
                let train = || Ok(ResidualQuantizer::train(&pieces, stages, &kmeans(entries))?);
                let (quantizer, seconds) = seconds(x.device(), train)?;
                let bits = quantizer.bits_per_value_with_codebook(tokens);
                let overhead = bits - quantizer.bits_per_value();
                let codebooks = stages * shape.0 * shape.2;
                let x = quantizer.forward(&pieces)?.transpose(1, 2)?.reshape(x.shape())?;
                (x, bits, overhead, codebooks, seconds)
            }
        };
        let heads = Tensor::cat(&[&heads.narrow(1, 0, SINKS)?, &x], 1)?;
        Ok(Stored { prompt: Self { heads, rotated }, bits, overhead, codebooks, seconds })
    }

    /// The logarithms of the next tokens' probabilities, (tokens, vocabulary), after each of `ids`, which follow the
    /// prompt and see each other exactly.
    pub fn follow(&self, model: &SmolLm2, ids: &[u32]) -> Result<Tensor> {
        let (layers, heads) = (model.dims.layers, model.dims.key_heads);
        let hidden = model.forward(ids, self.tokens()?, |layer, new| {
            let of = |half| self.heads.narrow(0, (half * layers + layer) * heads, heads)?.to_dtype(DType::F32);
            let keys = if self.rotated { of(0)? } else { model.rotate(&of(0)?, 0)? };
            attend(&new.after(&keys, &of(1)?)?)
        })?;
        model.log_probabilities(&hidden)
    }

    /// The same with keys as attention reads them.
    fn rotated(&self, model: &SmolLm2) -> Result<Tensor> {
        let halves = self.heads.chunk(2, 0)?;
        let keys = model.rotate(&halves[0].to_dtype(DType::F32)?, 0)?.to_dtype(DType::F16)?;
        Ok(Tensor::cat(&[&keys, &halves[1]], 0)?)
    }
}

/// Rows as integers with the row's own scale and offset.
fn integers(x: &Tensor, bits: usize) -> Result<Tensor> {
    let (x, last, levels) = (x.to_dtype(DType::F32)?, x.rank() - 1, ((1 << bits) - 1) as f64);
    let half = |t: Tensor| t.to_dtype(DType::F16)?.to_dtype(DType::F32);
    let low = half(x.min_keepdim(last)?)?;
    let step = half(((x.max_keepdim(last)? - &low)? / levels)?)?.maximum(1e-6)?;
    let code = x.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, levels)?;
    Ok(code.broadcast_mul(&step)?.broadcast_add(&low)?.to_dtype(DType::F16)?)
}

/// The same by channel, in groups of tokens; the last group is what is left.
fn by_channel(x: &Tensor, bits: usize) -> Result<Tensor> {
    let tokens = x.dim(1)?;
    let groups = (0..tokens).step_by(GROUP).map(|from| {
        let channels = x.narrow(1, from, GROUP.min(tokens - from))?.transpose(1, 2)?.contiguous()?;
        Ok(integers(&channels, bits)?.transpose(1, 2)?)
    });
    Ok(Tensor::cat(&groups.collect::<Result<Vec<_>>>()?, 1)?)
}
