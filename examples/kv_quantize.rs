//! Stores a KV cache in two to four bits a value, and measures what attention loses.
//!
//! ```text
//! cargo run --release --example kv_quantize [--device cpu|cuda] [--out kv_quantize.svg]
//! ```
//! The queries, keys and values are SmolLM2-135M's own (`assets/README.md`), keys after the rotation. Integers are asymmetric, as
//! KIVI has them: keys by channel in groups of 64 tokens, values by token. Product quantisers have codebooks of the cache itself,
//! trained in one call for all heads and pieces, or of the other text. Four sink tokens and the recent ones stay exact.

use anyhow::Result;
use candle_core::{DType, Module, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, ProductQuantizer},
    KMeans,
};
use candle_nn::ops::softmax_last_dim;
use clap::Parser;
use common::backend::Backend;
use common::cache::{Cache, TEXTS};
use common::chart;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

mod common {
    pub mod backend;
    pub mod cache;
    pub mod chart;
}

/// Numbers that share a scale and an offset, each an f16.
const GROUP: usize = 64;
const PASSES: usize = 8;
const INT_BITS: [usize; 3] = [2, 3, 4];
/// (values of a piece, entries of a codebook)
const PQ: [(usize, [usize; 3]); 3] = [(2, [16, 32, 64]), (4, [64, 128, 256]), (8, [64, 128, 256])];

/// The pieces that are also stored with codebooks of the other text.
const OFFLINE: usize = 4;

#[derive(Parser)]
#[command(about = "A KV cache in two to four bits a value")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw error against bits
    #[arg(long, default_value = "kv_quantize.svg")]
    out: PathBuf,
}

/// A way to store keys and values, and what it costs.
struct Stored {
    line: String,
    name: String,
    bits: f64,
    /// Root mean square of the relative error, by text.
    errors: Vec<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let cache = Cache::load(&device)?;
    let tokens = cache.keys.dim(1)?;
    let full = attention(&cache, &cache.keys, &cache.values)?;
    let mut stored = Vec::new();
    let mut store = |line: String, name: String, bits: f64, keys: &Tensor, values: &Tensor| {
        let errors = errors(&attention(&cache, keys, values)?, &full)?;
        stored.push(Stored { line, name, bits, errors });
        anyhow::Ok(())
    };

    let bar = ProgressBar::new((INT_BITS.len() + (PQ.len() + 1) * PQ[0].1.len()) as u64);
    bar.set_style(ProgressStyle::with_template("[{bar:40}] {pos}/{len} {msg}")?);
    for bits in INT_BITS {
        let (keys, values) = (by_channel(&cache.keys, bits)?, integers(&cache.values, bits)?);
        let cost = bits as f64 + 32.0 / GROUP as f64;
        store("integers".into(), format!("int{bits}"), cost, &keys, &values)?;
        bar.inc(1);
    }
    let halves = |t: &Tensor| t.to_dtype(DType::F16);
    let (keys, values) = (halves(&cache.keys)?, halves(&cache.values)?);
    for (piece, sizes) in PQ {
        for k in sizes {
            bar.set_message(format!("codebooks of {k} x {piece}"));
            let kmeans = KMeans::new(k).max_iters(PASSES);
            let train =
                |x: &Tensor| ProductQuantizer::train(x, x.dim(2)? / piece, &kmeans).map_err(anyhow::Error::from);
            let quantizers = [train(&keys)?, train(&values)?];
            let through = |quantizers: &[ProductQuantizer; 2]| {
                let [keys, values] = [quantizers[0].forward(&keys)?, quantizers[1].forward(&values)?];
                anyhow::Ok((keys.to_dtype(DType::F32)?, values.to_dtype(DType::F32)?))
            };
            let (online_keys, online_values) = through(&quantizers)?;
            let bits = quantizers[0].bits_per_value_with_codebook(tokens);
            let name = format!("{k} x {piece}");
            store(format!("own codebooks, {piece} values a code"), name, bits, &online_keys, &online_values)?;
            bar.inc(1);
            if piece != OFFLINE {
                continue;
            }
            let others = [other_text(&quantizers[0])?, other_text(&quantizers[1])?];
            let (offline_keys, offline_values) = through(&others)?;
            let (bits, name) = (quantizers[0].bits_per_value(), format!("{k} x {piece}, other text"));
            let line = format!("codebooks of the other text, {piece} values");
            store(line, name, bits, &offline_keys, &offline_values)?;
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    stored.sort_by(|a, b| a.bits.total_cmp(&b.bits));
    println!(
        "relative error of the attention output; bits a value of the {tokens} tokens, with scales and own codebooks\n"
    );
    println!("{:24}{:>8}{:>10}{:>10}", "", "bits", TEXTS[0], TEXTS[1]);
    for Stored { name, bits, errors, .. } in &stored {
        println!("{name:24}{bits:>8.2}{:>10.4}{:>10.4}", errors[0], errors[1]);
    }
    let mut names: Vec<&str> = stored.iter().map(|s| s.line.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let of = |line: &str| {
        stored.iter().filter(|s| s.line == line).map(|s| (s.bits, s.errors.iter().sum::<f64>() / 2.0)).collect()
    };
    let lines: Vec<(&str, Vec<(f64, f64)>)> = names.iter().map(|line| (*line, of(line))).collect();
    let ticks = vec![1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5];
    let bits = chart::Axis { name: "bits a value", ticks, label: |bits| format!("{bits:.1}") };
    chart::draw(&args.out, "What attention loses to a smaller cache", bits, "relative error", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// (heads, rows, dim): attention to the near tokens, exact, and to these far ones.
fn attention(cache: &Cache, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    let heads = keys.dim(0)?;
    let each = (0..heads).map(|head| {
        let queries = cache.queries.get(head)?;
        let near = queries.matmul(&cache.near_keys.get(head)?.t()?)?.broadcast_add(&cache.near_mask)?;
        let far = queries.matmul(&keys.get(head)?.t()?)?;
        let weights = softmax_last_dim(&Tensor::cat(&[&near, &far], 1)?)?;
        Ok(weights.matmul(&Tensor::cat(&[&cache.near_values.get(head)?, &values.get(head)?], 0)?)?)
    });
    Ok(Tensor::stack(&each.collect::<Result<Vec<_>>>()?, 0)?)
}

fn errors(output: &Tensor, full: &Tensor) -> Result<Vec<f64>> {
    let error = (output - full)?.sqr()?.sum(2)?.div(&full.sqr()?.sum(2)?)?;
    let by_text = error.reshape((TEXTS.len(), ()))?.mean(1)?.sqrt()?.to_vec1::<f32>()?;
    Ok(by_text.into_iter().map(f64::from).collect())
}

/// Rows of at most `GROUP` numbers as integers with the row's own scale and offset.
fn integers(x: &Tensor, bits: usize) -> Result<Tensor> {
    let last = x.rank() - 1;
    let half = |t: Tensor| t.to_dtype(DType::F16)?.to_dtype(DType::F32);
    let low = half(x.min_keepdim(last)?)?;
    let step = half(((x.max_keepdim(last)? - &low)? / ((1 << bits) - 1) as f64)?)?.maximum(1e-6)?;
    let code = x.broadcast_sub(&low)?.broadcast_div(&step)?.round()?.clamp(0.0, ((1 << bits) - 1) as f64)?;
    Ok(code.broadcast_mul(&step)?.broadcast_add(&low)?)
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

/// The codebooks of the same head in the other text.
fn other_text(quantizer: &ProductQuantizer) -> Result<ProductQuantizer> {
    let (entries, metric) = (quantizer.codebook().centroids(), quantizer.codebook().metric());
    let half = entries.dim(0)? / TEXTS.len();
    let swapped = Tensor::cat(&[entries.narrow(0, half, half)?, entries.narrow(0, 0, half)?], 0)?;
    Ok(ProductQuantizer::new(Codebook::new(&swapped, metric)?)?)
}
