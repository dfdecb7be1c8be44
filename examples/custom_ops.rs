//! The ops inside a module's `forward`, trained through: a bottleneck that quantises tokens, and a pool that takes the mean of
//! each cluster of tokens.
//!
//! ```text
//! cargo run --release --example custom_ops [--device cpu|cuda] [--steps 200] [--batch 32] [--tokens 96]
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Module, Tensor, D};
use candle_flash_kmeans::{
    ops::{ClusterMeans, FlashAssign, MeansInto, Quantize},
    KMeans, Metric,
};
use candle_nn::{linear, loss::cross_entropy, AdamW, Linear, Optimizer, VarBuilder, VarMap};
use clap::Parser;
use common::backend::Backend;

mod common {
    pub mod backend;
}

#[derive(Parser)]
#[command(about = "Trains a classifier of token sequences through FlashAssign, ClusterMeans and Quantize")]
struct Args {
    /// Training steps
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Sequences of a batch
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Tokens of a sequence
    #[arg(long, default_value_t = 96)]
    tokens: usize,
    #[arg(long, default_value = "cpu")]
    device: Backend,
}

const FEATURES: usize = 16;
const HIDDEN: usize = 24;
const CLUSTERS: usize = 8;
const CLASSES: usize = 3;

/// Tokens in the place of their nearest code vectors. The gradient passes to the tokens unchanged: `Quantize` says so.
struct Bottleneck {
    codebook: Tensor,
}

impl Module for Bottleneck {
    fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        tokens.apply_op2(&self.codebook, Quantize::default())
    }
}

/// `(b, n, h)` tokens to `(b, CLUSTERS * h)`: the means of those that share a nearest code vector. The gradient of a mean is shared
/// out over its tokens.
struct ClusterPool {
    codebook: Tensor,
}

impl Module for ClusterPool {
    fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        let labels = tokens.apply_op2(&self.codebook, FlashAssign::default())?;
        tokens.apply_op2(&labels, ClusterMeans { k: CLUSTERS })?.flatten_from(D::Minus2)
    }
}

struct Classifier {
    embed: Linear,
    bottleneck: Bottleneck,
    pool: ClusterPool,
    head: Linear,
}

impl Classifier {
    fn new(codebook: &Tensor, vars: VarBuilder) -> Result<Self> {
        Ok(Self {
            embed: linear(FEATURES, HIDDEN, vars.pp("embed"))?,
            bottleneck: Bottleneck { codebook: codebook.clone() },
            pool: ClusterPool { codebook: codebook.clone() },
            head: linear(CLUSTERS * HIDDEN, CLASSES, vars.pp("head"))?,
        })
    }
}

impl Module for Classifier {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let tokens = self.embed.forward(x)?;
        // Quantised tokens and the tokens themselves are averaged, so that gradients take both ways.
        let mixed = ((self.bottleneck.forward(&tokens)? * 0.5)? + (tokens * 0.5)?)?;
        self.head.forward(&self.pool.forward(&mixed)?)
    }
}

/// Sequences of tokens around fixed prototypes. The class moves the tokens of one prototype, a few of each sequence, so that a
/// mean over all tokens hardly shows it and the mean of their cluster does.
fn sequences(prototypes: &Tensor, moves: &Tensor, args: &Args) -> Result<(Tensor, Tensor)> {
    let (b, n, device) = (args.batch, args.tokens, prototypes.device());
    let which = (Tensor::rand(0f32, CLUSTERS as f32, b * n, device)?.floor()?).to_dtype(DType::U32)?;
    let classes = (Tensor::rand(0f32, CLASSES as f32, b, device)?.floor()?).to_dtype(DType::U32)?;
    let tokens = prototypes.index_select(&which, 0)?.reshape((b, n, FEATURES))?;
    let moved = which.eq(0u32)?.to_dtype(DType::F32)?.reshape((b, n, 1))?;
    let shift = moves.index_select(&classes, 0)?.unsqueeze(1)?.broadcast_mul(&moved)?;
    let noise = Tensor::randn(0f32, 0.3, (b, n, FEATURES), device)?;
    Ok((((tokens + shift)? + noise)?, classes))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = args.device.open()?.0;
    let prototypes = Tensor::randn(0f32, 2.0, (CLUSTERS, FEATURES), &device)?;
    let moves = Tensor::randn(0f32, 0.6, (CLASSES, FEATURES), &device)?;

    let vars = VarMap::new();
    let builder = VarBuilder::from_varmap(&vars, DType::F32, &device);
    let codebook = Tensor::zeros((CLUSTERS, HIDDEN), DType::F32, &device)?;
    let model = Classifier::new(&codebook, builder)?;

    // The code vectors start as the clusters of embedded tokens.
    let (x, _) = sequences(&prototypes, &moves, &args)?;
    let tokens = model.embed.forward(&x)?.detach().flatten_to(1)?;
    codebook.slice_set(&KMeans::new(CLUSTERS).fit(&tokens)?.centroids, 0, 0)?;

    let mut optimizer = AdamW::new_lr(vars.all_vars(), 5e-3)?;
    let (mut first, mut last) = (0.0, 0.0);
    for step in 0..args.steps {
        let (x, classes) = sequences(&prototypes, &moves, &args)?;
        let logits = model.forward(&x)?;
        let loss = cross_entropy(&logits, &classes)?;
        optimizer.backward_step(&loss)?;

        // As the embedding changes, a step of Lloyd's loop keeps the code vectors at the means of their tokens, in place.
        let tokens = model.embed.forward(&x)?.detach().flatten_to(1)?;
        let labels = tokens.apply_op2(&codebook, FlashAssign { metric: Metric::SquaredEuclidean })?;
        codebook.inplace_op3(&tokens, &labels, &MeansInto)?;

        last = loss.to_scalar::<f32>()?;
        if step == 0 {
            first = last;
        }
        if step % 20 == 0 || step + 1 == args.steps {
            let right = logits.argmax(D::Minus1)?.eq(&classes)?.to_dtype(DType::F32)?.mean_all()?.to_scalar::<f32>()?;
            println!("step {step:4}   loss {last:.4}   right {:5.1} %", 100.0 * right);
        }
    }
    ensure!(args.steps < 100 || last < 0.5 * first, "the loss went from {first} to {last} only");
    Ok(())
}
