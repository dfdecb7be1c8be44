//! An inverted-file index (IVF; Jégou, Douze and Schmid 2011) of a file of vectors that is larger than the memory it is allowed, and what
//! becomes of it when the data drift.
//!
//! ```text
//! cargo run --release --example index [--device cpu|cuda] [--data vectors.npy] [--train sample|all|batches] [--lists 512] [--memory 8]
//! cargo run --release --features nccl --example index -- --train all --devices all --checkpoint run --data vectors.npy
//! ```
//! A coarse quantiser is trained by k-means, every row goes to the list of its nearest centroid, and a query is compared with the rows of
//! the few lists whose centroids are nearest to it. Recall is the share of the ten true neighbours, by brute force, that it finds so.
//!
//! Without `--data` the rows are a mixture of Gaussians, which then drifts: the oldest fifth is replaced by rows of the same topics, all shifted.
//! The index takes them into its lists first, by the old centroids, and is then trained again from these (a warm start). Centroids that
//! hardly move are put back, so that only lists around the drift are written again.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::{
    Checkpoint, Devices, EmptyClusters, Epochs, Fit, Init, KMeans, MiniBatch, Source, StreamOptions,
};
use clap::{Parser, ValueEnum};
use common::{backend::Backend, bar::with_bar, chart, devices, timing::seconds};
use data::Mixture;
use lists::Lists;
use search::{exact, recall, search, Queries, NEIGHBOURS};
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

mod data;
mod lists;
mod search;
#[path = "../common"]
mod common {
    pub mod backend;
    pub mod bar;
    pub mod chart;
    pub mod devices;
    pub mod timing;
}

/// Enough here: more iterations hardly change recall.
const ITERATIONS: usize = 25;
/// Passes of `--train batches`, and rows of a batch.
const EPOCHS: usize = 2;
const BATCH_ROWS: usize = 1024;
/// A centroid stays that moves by less than this share of the root mean square of the distances in a list.
const STAYS: f64 = 0.1;

#[derive(Parser)]
#[command(about = "An inverted-file index of vectors that memory does not hold, before and after the data drift")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// GPUs that share the rows: all, or numbers with commas
    #[arg(long, value_parser = devices::parse, conflicts_with = "device")]
    devices: Option<Devices>,
    /// Vectors to index, in any format that a source has; a mixture of Gaussians without it
    #[arg(long)]
    data: Option<PathBuf>,
    #[arg(long, default_value_t = 200_000)]
    rows: usize,
    #[arg(long, default_value_t = 32)]
    columns: usize,
    #[arg(long, default_value_t = 512)]
    lists: usize,
    /// The rows that centroids are trained on
    #[arg(long, default_value = "sample")]
    train: Train,
    /// Rows of a sample for each list
    #[arg(long, default_value_t = 64)]
    sample: usize,
    #[arg(long, default_value_t = 500)]
    queries: usize,
    /// MiB of rows that are in memory at a time
    #[arg(long, default_value_t = 8)]
    memory: usize,
    /// Keep what training on all rows has come to in this folder, and go on from there if the example is started again
    #[arg(long)]
    checkpoint: Option<PathBuf>,
    /// Where the index is written; a temporary folder without it
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Where to draw missed neighbours against rows read
    #[arg(long, default_value = "index.svg")]
    out: PathBuf,
    /// Show no progress
    #[arg(long)]
    quiet: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Train {
    Sample,
    All,
    Batches,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let folder = args.dir.clone().unwrap_or(std::env::temp_dir().join(format!("index-{}", std::process::id())));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let run = run(&args, &folder);
    if args.dir.is_none() {
        fs::remove_dir_all(&folder)?;
    }
    run
}

fn run(args: &Args, folder: &Path) -> Result<()> {
    let trainer = Trainer::new(args)?;
    let mixture = Mixture { rows: args.rows, columns: args.columns };
    let path = match &args.data {
        Some(path) => path.clone(),
        None => {
            let path = folder.join("rows.fbin");
            mixture.write(&path, false)?;
            path
        }
    };
    let source = Source::open(path)?;
    let (n, d) = source.shape();
    let bytes = (n as usize * source.row_bytes()) >> 20;
    println!("{n} rows of {d} columns, {bytes} MiB, of which {} MiB may be in memory", args.memory);

    let mut index = Index { folder, lists: Lists::new(folder)?, memory: args.memory << 20, fit: None };
    index.replace(trainer.train(&source, None)?, &source, 0..0)?;
    let mut lines = vec![("trained on these rows", index.curve(args, &source)?)];
    if args.data.is_none() {
        let path = folder.join("drifted.fbin");
        mixture.write(&path, true)?;
        let source = Source::open(path)?;
        println!("\nthe oldest {} rows are replaced by those of shifted topics", mixture.replaced().len());
        index.replace(trainer.label(&source, &index.fit()?.centroids)?, &source, mixture.replaced())?;
        lines.push(("drifted, old centroids", index.curve(args, &source)?));
        println!("\ntrained again from the old centroids");
        index.replace(trainer.train_again(&source, index.fit()?)?, &source, 0..0)?;
        lines.push(("drifted, trained again", index.curve(args, &source)?));
    }
    draw(&args.out, &lines)
}

/// The settings of the coarse quantiser.
struct Trainer<'a> {
    args: &'a Args,
    device: Device,
    options: StreamOptions,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        ensure!(args.checkpoint.is_none() || args.train == Train::All, "--checkpoint is for --train all");
        ensure!(args.devices.is_none() || args.train != Train::Batches, "mini-batches are on one device");
        let (device, options) = match &args.devices {
            // What is given to streams goes from the CPU to their GPUs.
            Some(devices) => (Device::Cpu, StreamOptions::on(devices.clone())),
            None => {
                let device = args.device.open()?.0;
                (device.clone(), StreamOptions::new(&device))
            }
        };
        Ok(Self { args, device, options: with_bar(options.memory(args.memory << 20), args.quiet) })
    }

    /// Centroids, and the labels of all rows. With an `old` fit it is a warm start: from its centroids, of which those of lists that have
    /// lost all rows go where rows are far from any; a mini-batch goes on with its means. With checkpoints it goes on from the last one of
    /// its kind.
    fn train(&self, source: &Source<'_>, old: Option<&Fit>) -> Result<Fit> {
        let mut settings = KMeans::new(self.args.lists).max_iters(ITERATIONS);
        if let Some(old) = old {
            let start = Init::Given(old.centroids.to_device(&self.device)?);
            settings = settings.init(start).empty_clusters(EmptyClusters::Relocate);
        }
        let mut options = self.options.clone();
        if let Some(folder) = &self.args.checkpoint {
            let folder = folder.join(if old.is_some() { "again" } else { "first" });
            fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
            options = options.checkpoint(Checkpoint::in_dir(folder).every_iterations(1));
        }
        let (fit, seconds) = seconds(&self.device, || match self.args.train {
            Train::Sample => Ok(settings.fit_sample(source, self.args.lists * self.args.sample, &self.options)?),
            Train::All => {
                if !self.args.quiet {
                    println!("{}", settings.plan_stream(source, &options)?);
                }
                Ok(settings.fit_stream(source, &options)?)
            }
            Train::Batches => {
                let epochs = Epochs::new(EPOCHS).batch_rows(BATCH_ROWS).shuffled(0);
                let running = match old {
                    Some(old) => {
                        let mut running = MiniBatch::from_fit(old)?.to_device(&self.device)?;
                        running.step_stream(source, &self.options, &epochs)?;
                        running
                    }
                    None => MiniBatch::train_stream(source, &settings, &self.options, &epochs)?,
                };
                self.label(source, &running.centroids()?)
            }
        })?;
        println!("trained in {seconds:.2} s: {fit}");
        Ok(fit)
    }

    /// The labels of all rows by centroids that are there: a fit of no iteration.
    fn label(&self, source: &Source<'_>, centroids: &Tensor) -> Result<Fit> {
        let start = Init::Given(centroids.to_device(&self.device)?);
        Ok(KMeans::new(self.args.lists).init(start).max_iters(0).tol(0.0).fit_stream(source, &self.options)?)
    }

    /// The same with a warm start, which keeps the centroids that hardly move.
    fn train_again(&self, source: &Source<'_>, old: &Fit) -> Result<Fit> {
        let new = self.train(source, Some(old))?;
        let (was, is) = (old.centroids.to_dtype(DType::F64)?, new.centroids.to_dtype(DType::F64)?);
        let radius = new.inertia.to_scalar::<f64>()? / source.shape().0 as f64;
        let moves = (&was - &is)?.sqr()?.sum_keepdim(D::Minus1)?.gt(STAYS * STAYS * radius)?;
        let moved = moves.flatten_all()?.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()?;
        println!("{moved} of {} centroids have moved", self.args.lists);
        let centroids = moves.broadcast_as(is.shape())?.where_cond(&is, &was)?;
        self.label(source, &centroids.to_dtype(old.centroids.dtype())?)
    }
}

/// An index in a folder.
struct Index<'a> {
    folder: &'a Path,
    lists: Lists,
    /// Bytes of rows that it may hold at a time.
    memory: usize,
    /// The centroids, and the list of each row.
    fit: Option<Fit>,
}

impl Index<'_> {
    fn fit(&self) -> Result<&Fit> {
        self.fit.as_ref().context("the index is not trained")
    }

    /// Puts each row where the labels of `fit` say, and writes the lists that this changes: those that rows go to or come from, and
    /// those of rows that were `replaced`.
    fn replace(&mut self, fit: Fit, source: &Source<'_>, replaced: Range<usize>) -> Result<()> {
        let labels = fit.labels.to_vec1::<u32>()?;
        let mut changed = vec![self.fit.is_none(); fit.counts.dim(0)?];
        if let Some(old) = &self.fit {
            for (row, (was, is)) in old.labels.to_vec1::<u32>()?.into_iter().zip(&labels).enumerate() {
                if was != *is || replaced.contains(&row) {
                    changed[was as usize] = true;
                    changed[*is as usize] = true;
                }
            }
        }
        let (written, seconds) = seconds(&Device::Cpu, || self.lists.write(source, &labels, &changed, self.memory))?;
        fit.save(self.folder.join("clusters.safetensors"))?;
        let (lists, all, n) = (written.lists, changed.len(), labels.len());
        println!(
            "{lists} of {all} lists written, {} of {n} rows, in {} passes and {seconds:.2} s",
            written.rows, written.passes
        );
        self.fit = Some(fit);
        Ok(())
    }

    /// Prints recall and time as more lists are read, and returns the shares of rows read and of neighbours missed.
    fn curve(&self, args: &Args, source: &Source<'_>) -> Result<Vec<(f64, f64)>> {
        let (n, fit) = (source.shape().0 as f64, self.fit()?);
        let queries = Queries::new(source, args.queries)?;
        let ms = |seconds: f64| seconds * 1e3 / queries.ids.len() as f64;
        let (truth, by_brute_force) = seconds(&Device::Cpu, || exact(source, &queries, self.memory))?;
        println!("lists  rows read  recall@{NEIGHBOURS}  ms/query");
        let mut points = vec![];
        let all = args.lists;
        for nprobe in (0..).map(|i| 1 << i).take_while(|&nprobe| nprobe < all).chain([all]) {
            let (found, seconds) = seconds(&Device::Cpu, || search(fit, &self.lists, &queries, nprobe))?;
            let share = found.compared as f64 / queries.ids.len() as f64 / n;
            let recall = recall(&found.nearest, &truth);
            println!("{nprobe:5}  {:7.2} %  {recall:9.4}  {:8.3}", share * 100.0, ms(seconds));
            ensure!(nprobe < all || share == 1.0, "the lists hold {} of {n} rows", share * n);
            if nprobe < all {
                points.push((share, 1.0 - recall));
            }
        }
        println!("brute force                 {:8.3}", ms(by_brute_force));
        // Shares are drawn on a logarithmic axis, where nothing missed has no place.
        points.retain(|&(_, missed)| missed > 0.0);
        Ok(points)
    }
}

fn draw(path: &Path, lines: &[(&str, Vec<(f64, f64)>)]) -> Result<()> {
    let x = chart::Axis {
        name: "share of rows read",
        ticks: vec![0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0],
        label: |share| format!("{} %", share * 100.0),
    };
    chart::draw(path, "What an inverted-file index misses", x, "share of the 10 nearest missed", lines)?;
    println!("\n{}", path.display());
    Ok(())
}
