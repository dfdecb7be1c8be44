//! Clusters a file of rows that need not fit in memory, and compares that with the fit of all of them in memory.
//!
//! ```text
//! cargo run --release --example stream [--device cpu|cuda] [--rows 200000] [--columns 32] [--clusters 64] [--memory 8] [--quiet]
//! ```

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{KMeans, Source, StreamOptions};
use clap::Parser;
use common::{backend::Backend, bar::with_bar};
use std::{fs, time::Instant};

mod common {
    pub mod backend;
    pub mod bar;
}

#[derive(Parser)]
#[command(about = "Fits the rows of a file with a bound on the memory that they take")]
struct Args {
    #[arg(long, default_value_t = 200_000)]
    rows: usize,
    #[arg(long, default_value_t = 32)]
    columns: usize,
    #[arg(long, default_value_t = 64)]
    clusters: usize,
    /// MiB of rows that the device may hold
    #[arg(long, default_value_t = 8)]
    memory: usize,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
    #[arg(long, default_value = "cpu")]
    device: Backend,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let path = std::env::temp_dir().join(format!("stream-{}.npy", std::process::id()));
    let x = Tensor::randn(0f32, 1f32, (args.rows, args.columns), &Device::Cpu)?;
    x.write_npy(&path)?;
    let compared = compare(&args, &device, &x, &path);
    fs::remove_file(&path)?;
    compared
}

fn compare(args: &Args, device: &Device, x: &Tensor, path: &std::path::Path) -> Result<()> {
    let source = Source::open(path)?;
    let options = with_bar(StreamOptions::new(device).memory(args.memory << 20), args.quiet);
    let settings = KMeans::new(args.clusters).tol(0.0).max_iters(10);
    if !args.quiet {
        println!("{}", settings.plan_stream(&source, &options)?);
    }

    let start = Instant::now();
    let streamed = settings.fit_stream(&source, &options)?;
    println!("streamed in {:.2?}: {streamed}", start.elapsed());

    let whole = settings.fit(&x.to_device(device)?)?.to_device(&Device::Cpu)?;
    let differing = streamed.labels.ne(&whole.labels)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
    ensure!(differing == 0, "{differing} labels differ from the fit in memory");
    ensure!(streamed.inertia.to_scalar::<f64>()? == whole.inertia.to_scalar::<f64>()?, "another inertia");
    println!("the fit in memory has the same labels and the same inertia to the bit");

    let mut labelled = 0;
    streamed.predict_stream(&source, &options, |_, labels| {
        labelled += labels.len();
        Ok(())
    })?;
    ensure!(labelled == args.rows, "{labelled} labels of {} rows", args.rows);
    Ok(())
}
