//! A fit captured once as a CUDA graph and replayed on new rows: what a model does at every step.
//!
//! `cargo run --release --features cuda --example cuda_graph`

use anyhow::{ensure, Result};
use candle_core::{
    cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode},
    DType, Device, Tensor,
};
use candle_flash_kmeans::{Init, KMeans};
use clap::Parser;
use std::time::Instant;

#[derive(Parser)]
#[command(about = "Replays a captured fit on new rows, and compares time and bits with plain runs")]
struct Args {
    /// Problems, such as the heads of a model
    #[arg(long, default_value_t = 8)]
    b: usize,
    #[arg(long, default_value_t = 2048)]
    n: usize,
    #[arg(long, default_value_t = 64)]
    k: usize,
    #[arg(long, default_value_t = 128)]
    d: usize,
    #[arg(long, default_value_t = 10)]
    iters: usize,
    #[arg(long, default_value_t = 1000)]
    replays: usize,
}

fn main() -> Result<()> {
    let Args { b, n, k, d, iters, replays } = Args::parse();
    // A stream of its own: the one that is captured must not be shared.
    let device = Device::new_cuda_with_stream(0)?;
    let gpu = device.as_cuda_device()?;
    // SAFETY: one stream does all the work, so that no events have to order it; recorded ones would end the capture.
    unsafe { gpu.disable_event_tracking() };
    let stream = gpu.cuda_stream();

    // Nothing may ask the host: no check for NaN.
    let settings = KMeans::new(k).init(Init::Random).max_iters(iters).tol(0.0).check_finite(false);
    let mut prepared = settings.prepare((b, n, d), DType::F16, &device)?;
    let input = Tensor::randn(0f32, 1.0, (b, n, d), &device)?.to_dtype(DType::F16)?;
    device.synchronize()?;
    let start = Instant::now();
    prepared.run(&input)?; // allocates, and loads the kernels
    device.synchronize()?;
    println!("   first: {:8.1} us, with the loading of kernels", start.elapsed().as_secs_f64() * 1e6);

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    prepared.run(&input)?;
    let free = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(free)?.expect("work was captured");

    // New rows go where the graph looks for them; labels and centroids come where `prepared` has them.
    let rows = Tensor::randn(0f32, 1.0, (b, n, d), &device)?.to_dtype(DType::F16)?;
    input.slice_set(&rows, 0, 0)?;
    graph.launch()?;
    let replayed = prepared.labels().flatten_all()?.to_vec1::<u32>()?;
    let fit = settings.fit(&rows)?;
    ensure!(replayed == fit.labels.flatten_all()?.to_vec1::<u32>()?, "a replay labels as a fit does");

    let time = |what: &str, mut run: Box<dyn FnMut() -> Result<()> + '_>| -> Result<()> {
        device.synchronize()?;
        let start = Instant::now();
        for _ in 0..replays {
            run()?;
        }
        device.synchronize()?;
        let each = start.elapsed().as_secs_f64() * 1e6 / replays as f64;
        println!("{what:>8}: {each:8.1} us a fit of {iters} iterations, {:6.2} us an iteration", each / iters as f64);
        Ok(())
    };
    println!("{b} problems of {n} rows, {d} columns and {k} clusters, f16");
    time("fits", Box::new(|| settings.fit(&rows).map(drop).map_err(Into::into)))?;
    time("runs", Box::new(|| Ok(prepared.run(&input)?)))?;
    time("replays", Box::new(|| Ok(graph.launch()?)))?;
    Ok(())
}
