//! Attention of all tokens to all, as in video and encoder models, by clusters that stay warm from step to step.
//!
//! ```text
//! cargo run --release --features cuda --example video_attention -- --device cuda
//! ```
//! 24 heads of 128 columns, at the lengths of a short video's latents. Tokens of a topic are alike and lie anywhere, and from
//! one step to the next, as in a diffusion model, all of them change a little. Dense attention at these lengths takes a
//! kernel that Candle's own ops do not have, so only a sample of the queries is attended exactly, for the error.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{
    nn::{Grouping, KeyBudget, RoutedAttention},
    Init, KMeans,
};
use candle_nn::ops::softmax_last_dim;
use clap::Parser;
use common::{backend::Backend, memory};
use indicatif::{ProgressBar, ProgressStyle};
use std::time::Instant;

mod common {
    pub mod backend;
    pub mod memory;
}

const HEADS: usize = 24;
const COLUMNS: usize = 128;
/// Tokens of a topic.
const TOPIC: usize = 128;
/// How far a topic's tokens are from each other, and how far they move in a step, by their own size.
const NOISE: f32 = 0.5;
const STEP: f64 = 0.1;
/// Queries that are attended exactly too.
const SAMPLE: usize = 64;
const SCALE: f64 = 0.088_388_347_648_318_45; // 1 / sqrt(COLUMNS)

#[derive(Parser)]
#[command(about = "Attention of all tokens to all by clusters, as in video models: time and error")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    /// The share of the tokens that is read
    #[arg(long, value_delimiter = ',', default_values_t = [0.1])]
    share: Vec<f64>,
    /// Tokens of a cluster of keys on average
    #[arg(long, value_delimiter = ',', default_values_t = [64])]
    keys: Vec<usize>,
    /// Tokens of a cluster of queries on average
    #[arg(long, value_delimiter = ',', default_values_t = [256])]
    queries: Vec<usize>,
    /// Timed steps
    #[arg(long, default_value_t = 5)]
    steps: usize,
    /// Print one JSON line a case
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.steps > 0, "--steps 0: there is nothing to time");
    let (device, dtype) = args.device.open()?;
    memory::keep(&device)?;
    let tokens = match (args.tokens.is_empty(), device.is_cuda()) {
        (false, _) => args.tokens.clone(),
        (true, false) => vec![2048],
        (true, true) => vec![32_768, 75_600],
    };
    if !args.json {
        println!("  tokens  share  keys  queries     first       warm  error, estimates in and out  inertia, 2 warm / 10 cold");
    }
    let mut cases = vec![];
    for &share in &args.share {
        for &keys in &args.keys {
            cases.extend(args.queries.iter().map(|&queries| (share, keys, queries)));
        }
    }
    let bar = ProgressBar::new((tokens.len() * cases.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
    for &n in &tokens {
        bar.set_message(format!("{n} tokens"));
        let mut video = Video::new(n, dtype, &device)?;
        for (share, keys, queries) in cases.iter().copied() {
            let new = || {
                let attention = RoutedAttention::new(KeyBudget::Share(share));
                attention.keys(Grouping::Clusters(keys)).queries(Grouping::Clusters(queries))
            };
            let (mut with, mut without) = (new(), new().estimate(false));
            // The first call of all loads the kernels.
            new().forward(&video.q, &video.k, &video.v, SCALE)?;
            let (_, first) = timed(&device, || Ok(with.forward(&video.q, &video.k, &video.v, SCALE)?))?;
            video.step()?;
            let (out, _) = timed(&device, || Ok(with.forward(&video.q, &video.k, &video.v, SCALE)?))?;
            let errors = [video.error(&out)?, video.error(&without.forward(&video.q, &video.k, &video.v, SCALE)?)?];
            let mut warm = 0.0;
            for _ in 0..args.steps {
                video.step()?;
                warm += timed(&device, || Ok(with.forward(&video.q, &video.k, &video.v, SCALE)?))?.1;
            }
            let (warm, ratio) = (warm / args.steps as f64, video.warm_by_cold(n.div_ceil(keys))?);
            let [error, error_without] = errors;
            bar.suspend(|| {
                if args.json {
                    println!(
                        "{{\"tokens\": {n}, \"share\": {share}, \"keys\": {keys}, \"queries\": {queries}, \"first_ms\": {first:.3}, \
                         \"warm_ms\": {warm:.3}, \"error\": {error:.5}, \"error_without_estimate\": {error_without:.5}, \
                         \"warm_by_cold_inertia\": {ratio:.4}}}"
                    );
                } else {
                    println!(
                        "{n:8} {share:6} {keys:5} {queries:8} {first:6.1} ms {warm:7.2} ms  {error:.4}, {error_without:.4} {ratio:32.4}"
                    );
                }
            });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// The queries, keys and values of a step, `(1, HEADS, n, COLUMNS)`.
struct Video {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Video {
    fn new(n: usize, dtype: DType, device: &Device) -> Result<Self> {
        // Candle's generator for the CPU takes no seed.
        if device.is_cuda() {
            device.set_seed(1)?;
        }
        let topics = (n / TOPIC).max(1);
        // A query gives its topic nine tenths of its attention: exp(q.k) for these keys is nine times that of all others.
        let size = (((9 * topics) as f32).ln() * SCALE as f32).sqrt();
        let of = Tensor::from_iter((0..n).map(|i| (i * 7919 % topics) as u32), device)?;
        let centres = |size: f32| Tensor::randn(0f32, size, (1, HEADS, topics, COLUMNS), device);
        let around = |centres: &Tensor, size: f32| {
            let noise = Tensor::randn(0f32, NOISE * size, (1, HEADS, n, COLUMNS), device)?;
            Ok::<_, anyhow::Error>((centres.index_select(&of, 2)? + noise)?.to_dtype(dtype)?)
        };
        let shared = centres(size)?;
        Ok(Self { q: around(&shared, size)?, k: around(&shared, size)?, v: around(&centres(1.0)?, 1.0)? })
    }

    /// All tokens change a little and keep their size.
    fn step(&mut self) -> Result<()> {
        for t in [&mut self.q, &mut self.k, &mut self.v] {
            let size = t.to_dtype(DType::F32)?.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
            let noise = Tensor::randn(0f32, size, t.shape(), t.device())?.to_dtype(t.dtype())?;
            *t = ((&*t * (1.0 - STEP * STEP).sqrt())? + (noise * STEP)?)?;
        }
        Ok(())
    }

    /// How far `out` is from attention to all tokens, relative to that, over a sample of the queries of every head.
    fn error(&self, out: &Tensor) -> Result<f32> {
        let n = self.q.dim(2)?;
        let sample = Tensor::from_iter((0..SAMPLE).map(|i| (i * n / SAMPLE) as u32), self.q.device())?;
        let of = |t: &Tensor| Ok::<_, anyhow::Error>(t.squeeze(0)?.index_select(&sample, 1)?.to_dtype(DType::F32)?);
        let (q, out) = ((of(&self.q)? * SCALE)?, of(out)?);
        let (mut apart, mut all) = (0.0, 0.0);
        for head in 0..HEADS {
            let head_of = |t: &Tensor| t.narrow(1, head, 1)?.squeeze(0)?.squeeze(0)?.to_dtype(DType::F32);
            let weights = softmax_last_dim(&q.get(head)?.matmul(&head_of(&self.k)?.t()?)?)?;
            let exact = weights.matmul(&head_of(&self.v)?)?;
            apart += (out.get(head)? - &exact)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
            all += exact.sqr()?.sum_all()?.to_scalar::<f32>()?;
        }
        Ok((apart / all).sqrt())
    }

    /// The inertia after two passes from a step's centroids, by that after ten from evenly spaced rows.
    fn warm_by_cold(&mut self, k: usize) -> Result<f64> {
        let fit = |init, passes, x: &Tensor| KMeans::new(k).init(init).max_iters(passes).tol(0.0).fit(x);
        let centroids = fit(Init::Even, 10, &self.k)?.centroids;
        self.step()?;
        let [warm, cold] = [fit(Init::Given(centroids), 2, &self.k)?, fit(Init::Even, 10, &self.k)?]
            .map(|fit| fit.inertia.sum_all().and_then(|sum| sum.to_scalar::<f64>()));
        Ok(warm? / cold?)
    }
}

/// Returns what a call does, and its milliseconds.
fn timed(device: &Device, call: impl FnOnce() -> Result<Tensor>) -> Result<(Tensor, f64)> {
    device.synchronize()?;
    let start = Instant::now();
    let out = call()?;
    device.synchronize()?;
    Ok((out, start.elapsed().as_secs_f64() * 1e3))
}
