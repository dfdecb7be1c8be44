//! One token's attention over a long cache, read by clusters, beside attention over all of it.
//!
//! ```text
//! cargo run --release --example attention [--device cpu|cuda] [--tokens 32768,65536,131072] [--batch 1,4,16] [--columns 64,128] \
//!     [--caches 8] [--codes]
//! ```
//! The shapes are those of an 8B model: 8 key heads, 32 query heads, 128 columns unless others are asked for. Keys lie in blobs and
//! queries near some of them, so that attention has something to find; values are random. Printed are the time to cluster, the
//! time of one step against dense attention by Candle's ops, queued by the host and replayed from a CUDA graph, and the relative
//! error of the output.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::nn::{ClusteredKvCache, KvBudget, KvCodes};
use candle_nn::ops::softmax_last_dim;
use clap::Parser;
use common::backend::Backend;
use common::memory;
use indicatif::{ProgressBar, ProgressStyle};
use std::{cell::Cell, time::Instant};

mod common {
    pub mod backend;
    pub mod memory;
}

const HEADS: usize = 8;
const QUERY_HEADS: usize = 32;
/// Tokens of a blob of keys.
const BLOB: usize = 48;

#[derive(Parser)]
#[command(about = "Attention of one token that reads clusters of its cache, against all of it")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    #[arg(long, value_delimiter = ',')]
    tokens: Vec<usize>,
    #[arg(long, value_delimiter = ',')]
    batch: Vec<usize>,
    /// Columns of a head
    #[arg(long, value_delimiter = ',', default_values_t = [128])]
    columns: Vec<usize>,
    /// Tokens of a cluster on average
    #[arg(long, value_delimiter = ',', default_values_t = [16, 32, 64])]
    cluster_size: Vec<usize>,
    /// The share of the tokens that is read
    #[arg(long, default_value_t = 0.02)]
    share: f64,
    /// Keep clustered tokens as codes
    #[arg(long)]
    codes: bool,
    /// Caches that steps read in turn, as layers do: what several hold is not in a GPU's L2 cache
    #[arg(long, default_value_t = 1)]
    caches: usize,
    /// Timed steps
    #[arg(long, default_value_t = 50)]
    steps: usize,
    /// Print one JSON line a case
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, dtype) = match args.device {
        Backend::Cpu => args.device.open()?,
        Backend::Cuda => (graph::device()?, DType::F16),
    };
    memory::keep(&device)?;
    let or = |given: &[usize], small: &[usize], large: &[usize]| match (given.is_empty(), device.is_cuda()) {
        (false, _) => given.to_vec(),
        (true, false) => small.to_vec(),
        (true, true) => large.to_vec(),
    };
    let tokens = or(&args.tokens, &[4096], &[32_768, 65_536, 131_072]);
    let batches = or(&args.batch, &[1], &[1, 4, 16]);
    if !args.json {
        println!("  tokens  batch  columns  a cluster  clustering   dense step  clustered   in a graph  times  error, estimates in and out");
    }
    // The first fit loads the kernels.
    let warm = Step::new(1024, 1, args.columns[0], dtype, &device)?;
    let mut cache = ClusteredKvCache::new(1024);
    cache.append(&warm.keys, &warm.values)?;
    cache.cluster()?;
    let shapes: Vec<_> = (tokens.iter())
        .flat_map(|&n| batches.iter().map(move |&batch| (n, batch)))
        .flat_map(|(n, batch)| args.columns.iter().map(move |&columns| (n, batch, columns)))
        .collect();
    let bar = ProgressBar::new((shapes.len() * args.cluster_size.len()) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}")?);
    for (n, batch, columns) in shapes {
        bar.set_message(format!("{batch} x {n} tokens of {columns} columns"));
        let step = Step::new(n, batch, columns, dtype, &device)?;
        let (dense, dense_ms, _) = step.timed(args.steps, || step.dense())?;
        for &size in &args.cluster_size {
            let budget = (n as f64 * args.share) as usize;
            // A blob's tokens are anywhere in the sequence, which no segment of it would see together.
            let mut empty = ClusteredKvCache::new(n).cluster_size(size).max_segment(n).passes(4);
            if args.codes {
                empty = empty.codes(KvCodes::new());
            }
            let mut caches = vec![empty; args.caches];
            caches.iter_mut().try_for_each(|cache| cache.append(&step.keys, &step.values).map(drop))?;
            device.synchronize()?;
            let start = Instant::now();
            for cache in &mut caches {
                ensure!(cache.cluster()?, "{n} tokens are too few for clusters");
            }
            device.synchronize()?;
            let clustering = start.elapsed().as_secs_f64() * 1e3 / args.caches as f64;
            let scale = 1.0 / (columns as f64).sqrt();
            let turn = Cell::new(0);
            let read = |estimate| {
                let cache = &caches[turn.replace(turn.get() + 1) % caches.len()];
                Ok(cache.attend(&step.q, scale, KvBudget::new(budget).shared(true).estimate(estimate))?)
            };
            let (with, ms, host_ms) = step.timed(args.steps, || read(true))?;
            let graph_ms = graph::replayed(&device, || read(true))?;
            let [with, without] = [apart(&with, &dense)?, apart(&read(false)?, &dense)?];
            let times = dense_ms / ms;
            bar.suspend(|| {
                if args.json {
                    println!(
                        "{{\"tokens\": {n}, \"batch\": {batch}, \"columns\": {columns}, \"cluster_size\": {size}, \"budget\": {budget}, \
                         \"clustering_ms\": {clustering:.3}, \"dense_ms\": {dense_ms:.4}, \"ms\": {ms:.4}, \"host_ms\": {host_ms:.4}, \
                         \"graph_ms\": {graph_ms:.4}, \"error\": {with:.5}, \"error_without_estimate\": {without:.5}}}"
                    );
                } else {
                    println!(
                        "{n:8} {batch:6} {columns:8} {size:10} {clustering:9.1} ms {dense_ms:9.3} ms {ms:7.3} ms {graph_ms:9.3} ms \
                         {times:5.1}x  {with:.4}, {without:.4}"
                    );
                }
            });
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// A cache, and the queries of the next token.
struct Step {
    q: Tensor,
    keys: Tensor,
    values: Tensor,
}

impl Step {
    fn new(n: usize, batch: usize, columns: usize, dtype: DType, device: &Device) -> Result<Self> {
        // Candle's generator for the CPU takes no seed.
        if device.is_cuda() {
            device.set_seed(1)?;
        }
        let random = |std: f32, shape: (usize, usize, usize, usize)| {
            Ok::<_, anyhow::Error>(Tensor::randn(0f32, std, shape, device)?.to_dtype(dtype)?)
        };
        let blobs = n.div_ceil(BLOB);
        let centres = random(1.0, (batch, HEADS, blobs, columns))?;
        // Neighbouring tokens are of different blobs, so that pages of them would say little.
        let of = Tensor::from_iter((0..n).map(|i| (i * 7919 % blobs) as u32), device)?;
        let keys = (centres.index_select(&of, 2)? + random(0.6, (batch, HEADS, n, columns))?)?;
        let values = random(1.0, (batch, HEADS, n, columns))?;
        // Each query head looks for one blob.
        let group = QUERY_HEADS / HEADS;
        let wanted = Tensor::from_iter((0..group).map(|g| (g * 31 % blobs) as u32), device)?;
        let q = centres.index_select(&wanted, 2)?.affine(0.7, 0.0)?;
        let q = (q + random(0.4, (batch, HEADS, group, columns))?)?.reshape((batch, QUERY_HEADS, 1, columns))?;
        Ok(Self { q, keys, values })
    }

    /// Attention over all tokens, the query heads of a key head as rows of one product.
    fn dense(&self) -> Result<Tensor> {
        let (batch, heads, _, d) = self.keys.dims4()?;
        let q = (self.q.reshape((batch, heads, QUERY_HEADS / HEADS, d))? * (1.0 / (d as f64).sqrt()))?;
        let scores = q.matmul(&self.keys.t()?)?.to_dtype(DType::F32)?;
        let weights = softmax_last_dim(&scores)?.to_dtype(self.values.dtype())?;
        Ok(weights.matmul(&self.values)?.reshape((batch, QUERY_HEADS, 1, d))?)
    }

    /// The last result, and the milliseconds of a call, queued one after another as a model does: of all, and to queue it.
    fn timed(&self, steps: usize, mut call: impl FnMut() -> Result<Tensor>) -> Result<(Tensor, f64, f64)> {
        let device = self.q.device();
        let mut out = call()?;
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..steps {
            out = call()?;
        }
        let queued = start.elapsed();
        device.synchronize()?;
        let each = |time: std::time::Duration| time.as_secs_f64() * 1e3 / steps as f64;
        Ok((out, each(start.elapsed()), each(queued)))
    }
}

/// How far two outputs are apart, relative to the second.
fn apart(a: &Tensor, b: &Tensor) -> Result<f32> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let norm = |t: &Tensor| t.sqr()?.sum(D::Minus1)?.sqrt()?.mean_all()?.to_scalar::<f32>();
    Ok(norm(&(a - &b)?)? / norm(&b)?)
}

#[cfg(feature = "cuda")]
mod graph {
    use super::*;
    use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

    /// Calls of a graph, and how often it is replayed.
    const CALLS: usize = 20;
    const REPLAYS: usize = 5;

    /// A device with a stream of its own: the one that is captured must not be shared.
    pub fn device() -> Result<Device> {
        let device = Device::new_cuda_with_stream(0)?;
        // SAFETY: one stream does all the work, so that no events have to order it; recorded ones would end the capture.
        unsafe { device.as_cuda_device()?.disable_event_tracking() };
        Ok(device)
    }

    /// The milliseconds of a call without the host: one of many in a CUDA graph. NaN on the CPU, which has none.
    pub fn replayed(device: &Device, mut call: impl FnMut() -> Result<Tensor>) -> Result<f64> {
        let Device::Cuda(gpu) = device else { return Ok(f64::NAN) };
        let stream = gpu.cuda_stream();
        device.synchronize()?;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        for _ in 0..CALLS {
            call()?;
        }
        let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(free)?.expect("work was captured");
        graph.launch()?;
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..REPLAYS {
            graph.launch()?;
        }
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() * 1e3 / (CALLS * REPLAYS) as f64)
    }
}

#[cfg(not(feature = "cuda"))]
mod graph {
    use super::*;

    pub fn device() -> Result<Device> {
        Ok(Device::new_cuda(0)?)
    }

    pub fn replayed(_: &Device, _: impl FnMut() -> Result<Tensor>) -> Result<f64> {
        Ok(f64::NAN)
    }
}
