//! Times fits of rows past one GPU's memory and past one GPU, pass by pass.
//!
//! ```text
//! cargo run --release --features nccl --example scale -- --rows 268435456 --clusters 16384 --dtype f16 --pinned --devices all
//! torchrun --no-python --nproc-per-node 2 target/release/examples/scale --devices launched
//! ```
//!
//! Rows are normal, in memory of the host, and repeat after `--distinct`, so that more of them than its memory holds can be read at the
//! same rate. `--file` writes them to a file first and reads that. Each line is JSON: seconds of each pass, the rate of the link to the GPU
//! in the same run, and with `--in-memory` the same fit of one tensor on the first GPU. With `--checkpoint FOLDER` each fit writes a
//! checkpoint after each iteration, and goes on from the last one when the example is started again.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, WithDType};
use candle_flash_kmeans::{
    testing, Checkpoint, Devices, Element, Fit, Init, KMeans, Pass, Pinned, Source, StreamOptions,
};
use clap::{Parser, ValueEnum};
use half::f16;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;
use serde_json::json;
use std::{
    fs,
    io::Write,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Instant,
};

mod common {
    pub mod devices;
    pub mod memory;
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Type {
    F16,
    F32,
}

#[derive(Parser)]
#[command(about = "Times fits of rows past one GPU's memory and past one GPU")]
struct Args {
    #[arg(long, default_value_t = 1 << 20)]
    rows: u64,
    /// Rows after which they repeat
    #[arg(long, default_value_t = 1 << 26)]
    distinct: u64,
    #[arg(long, default_value_t = 128)]
    columns: usize,
    #[arg(long, default_value_t = 1024)]
    clusters: usize,
    #[arg(long, default_value = "f16")]
    dtype: Type,
    #[arg(long, default_value_t = 5)]
    iters: usize,
    /// MiB of rows that a device may hold; by default what is free
    #[arg(long, value_delimiter = ',')]
    memory: Vec<usize>,
    /// MiB of rows that are read at a time
    #[arg(long)]
    block: Option<usize>,
    /// cpu, all, launched, or numbers of GPUs with commas; several choices with spaces are timed in turns
    #[arg(long, default_value = "cpu", num_args = 1..)]
    devices: Vec<String>,
    /// Keep the rows in page-locked memory
    #[arg(long)]
    pinned: bool,
    /// Write the rows to this file and read them from there
    #[arg(long)]
    file: Option<PathBuf>,
    /// Keep what each fit has come to in a folder of its own in this one, and go on from there
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Fit all rows as one tensor on the first device as well, and compare all results
    #[arg(long)]
    in_memory: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    match args.dtype {
        Type::F16 => run::<f16>(&args),
        Type::F32 => run::<f32>(&args),
    }
}

fn run<T>(args: &Args) -> Result<()>
where
    T: Element + WithDType + Send,
{
    let on_gpu = args.devices.iter().any(|devices| devices != "cpu");
    let maker = if on_gpu { Device::new_cuda(0)? } else { Device::Cpu };
    for gpu in args.devices.iter().flat_map(|devices| devices.split(',')).filter_map(|gpu| gpu.parse().ok()) {
        common::memory::keep(&Device::new_cuda(gpu)?)?;
    }
    let start = Instant::now();
    let mut table = match args.pinned {
        true => Table::Pinned(Pinned::zeros(args.distinct.min(args.rows) as usize * args.columns, &maker)?),
        false => Table::Vec(vec![T::zero(); args.distinct.min(args.rows) as usize * args.columns]),
    };
    let (allocated, start) = (start.elapsed(), Instant::now());
    table.fill();
    println!(
        "{}",
        json!({ "pinned": args.pinned, "allocated_s": allocated.as_secs_f64(), "filled_s": start.elapsed().as_secs_f64() })
    );
    let source = source(args, table.values())?;
    let bytes = args.rows as f64 * source.row_bytes() as f64;
    if on_gpu {
        println!("{}", json!({ "link_gb_s": testing::link_rate(&maker, 64 << 20, 64)? / 1e9 }));
    }
    let settings = KMeans::new(args.clusters).init(Init::Even).tol(0.0).max_iters(args.iters);
    let mut first: Option<Fit> = None;
    if args.in_memory {
        let x = Tensor::from_slice(table.values(), (args.rows as usize, args.columns), &maker)?;
        for repeat in 0..2 {
            let (times, fit) = timed(&settings, |settings| Ok(settings.fit(&x)?))?;
            println!("{}", json!({ "in_memory": repeat, "seconds": times }));
            first = Some(fit.to_device(&Device::Cpu)?);
        }
    }
    let memories = if args.memory.is_empty() { vec![None] } else { args.memory.iter().copied().map(Some).collect() };
    let choices = args.devices.iter().flat_map(|devices| memories.iter().map(move |m| (devices, m)));
    for (i, (devices, memory)) in choices.enumerate() {
        let mut options = match devices.as_str() {
            "cpu" => StreamOptions::new(&Device::Cpu),
            "launched" => StreamOptions::on(Devices::Launched),
            gpus => StreamOptions::on(common::devices::parse(gpus).context("--devices")?),
        };
        if let Some(memory) = memory {
            options = options.memory(memory << 20);
        }
        if let Some(block) = args.block {
            options = options.block_rows((block << 20) / source.row_bytes());
        }
        if let Some(folder) = &args.checkpoint {
            let folder = folder.join(i.to_string());
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            options = options.checkpoint(Checkpoint::in_dir(folder).every_iterations(1));
        }
        let passes: Arc<Mutex<Vec<(String, u64, Instant)>>> = Arc::default();
        let log = passes.clone();
        let options = options.on_progress(move |progress| {
            let mut log = log.lock().expect("no panic");
            let name = match progress.pass {
                Pass::Iteration { iteration, .. } => format!("iteration {iteration}"),
                pass => pass.to_string(),
            };
            match log.last_mut() {
                Some((last, bytes, _)) if *last == name => *bytes = progress.bytes,
                _ => log.push((name, progress.bytes, Instant::now() - progress.elapsed)),
            }
        });
        let (times, fit) = timed(&settings, |settings| Ok(settings.fit_stream(&source, &options)?))?;
        let passes = passes.lock().expect("no panic");
        let ends = passes.iter().skip(1).map(|(_, _, start)| *start).chain([Instant::now()]);
        let passes: Vec<_> = passes
            .iter()
            .zip(ends)
            .map(|((name, read, start), end)| json!([name, read, (end - *start).as_secs_f64()]))
            .collect();
        let line = json!({
            "devices": devices, "memory_mib": memory, "rows": args.rows, "distinct": args.distinct.min(args.rows),
            "columns": args.columns, "clusters": args.clusters, "gb": bytes / 1e9, "seconds": times, "passes": passes,
        });
        println!("{line}");
        match &first {
            None => first = Some(fit),
            Some(first) => {
                let differing = fit.labels.ne(&first.labels)?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
                ensure!(differing == 0, "{differing} labels differ");
                let [a, b] = [&fit.inertia, &first.inertia].map(|inertia| inertia.to_scalar::<f64>());
                ensure!(a?.to_bits() == b?.to_bits(), "another inertia");
            }
        }
    }
    if let Some(path) = &args.file {
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Seconds to the end of each iteration, from the end of the one before, and to the end of all.
fn timed(settings: &KMeans, fit: impl FnOnce(KMeans) -> Result<Fit>) -> Result<(Vec<f64>, Fit)> {
    let ends = Arc::new(Mutex::new(vec![Instant::now()]));
    let log = ends.clone();
    let fit = fit(settings.clone().on_iteration(move |_| log.lock().expect("no panic").push(Instant::now())))?;
    fit.inertia.to_device(&Device::Cpu)?;
    let mut ends = ends.lock().expect("no panic").clone();
    ends.push(Instant::now());
    Ok((ends.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(), fit))
}

/// The distinct rows.
enum Table<T> {
    Vec(Vec<T>),
    Pinned(Pinned<T>),
}

impl<T: Element + WithDType + Send> Table<T> {
    fn values(&self) -> &[T] {
        match self {
            Self::Vec(values) => values,
            Self::Pinned(values) => values,
        }
    }

    /// Draws all values from the normal distribution, the same ones on any number of threads.
    fn fill(&mut self) {
        let values = match self {
            Self::Vec(values) => &mut values[..],
            Self::Pinned(values) => &mut values[..],
        };
        values.par_chunks_mut(1 << 20).enumerate().for_each(|(i, some)| {
            let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
            some.iter_mut().for_each(|v| *v = T::from_f64(StandardNormal.sample(&mut rng)));
        });
    }
}

fn source<'a, T: Element>(args: &Args, table: &'a [T]) -> Result<Source<'a>> {
    let distinct = table.len() / args.columns;
    let pieces = (0..args.rows).step_by(distinct).map(|first| {
        let rows = (args.rows - first).min(distinct as u64) as usize;
        Source::from_slice(&table[..rows * args.columns], args.columns)
    });
    let source = Source::concat(pieces.collect::<Result<Vec<_>, _>>()?)?;
    let Some(path) = &args.file else { return Ok(source) };
    let mut file = fs::File::create(path)?;
    // The shape of `.fbin` is 32 bits wide, that of `.npy` is not; values are little-endian.
    let descr = if args.dtype == Type::F16 { "<f2" } else { "<f4" };
    let header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}, {}), }}", args.rows, args.columns);
    let padded = (header.len() + 11).next_multiple_of(64) - 10;
    file.write_all(b"\x93NUMPY\x01\x00")?;
    file.write_all(&(padded as u16).to_le_bytes())?;
    file.write_all(format!("{header:<width$}\n", width = padded - 1).as_bytes())?;
    let mut some = vec![0; source.row_bytes() << 16];
    for first in (0..args.rows).step_by(1 << 16) {
        let rows = first..args.rows.min(first + (1 << 16));
        let bytes = &mut some[..(rows.end - rows.start) as usize * source.row_bytes()];
        source.read(rows, bytes)?;
        file.write_all(bytes)?;
    }
    file.sync_all()?;
    Ok(Source::open(path)?)
}
