//! Trains a small autoencoder whose images pass through a codebook, from two starts, with and without revival of dead codes.
//!
//! ```text
//! cargo run --release --example vq_autoencoder [--device cpu|cuda] [--out vq_autoencoder.svg]
//! ```
//! Images are drawn in code: rings, discs, bars, crosses and frames of any place and size. Each becomes 16 vectors of 8 values,
//! each vector one of 256 codes; a second network draws the image again from the codes.

use anyhow::{anyhow, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook},
    KMeans, Metric,
};
use candle_nn::{loss::mse, AdamW, Linear, Module, Optimizer, ParamsAdamW};
use clap::Parser;
use common::backend::Backend;
use indicatif::{ProgressBar, ProgressStyle};
use plotters::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};

mod common {
    pub mod backend;
}

const SIDE: usize = 16;
const PIXELS: usize = SIDE * SIDE;
const HIDDEN: usize = 256;
/// Vectors of an image, and values of a vector.
const TOKENS: usize = 16;
const DIM: usize = 8;
const CODES: usize = 256;

const TRAIN: usize = 4096;
const TEST: usize = 512;
const BATCH: usize = 128;
const STEPS: usize = 400;
const SHOWN: usize = 14;

#[derive(Parser)]
#[command(about = "A VQ autoencoder: what revival of dead codes is worth")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw inputs and reconstructions
    #[arg(long, default_value = "vq_autoencoder.svg")]
    out: PathBuf,
}

/// Where the codebook starts.
#[derive(Clone, Copy)]
enum Start {
    Normal,
    KMeans,
}

/// A trained model does this to images that it has not seen.
struct Outcome {
    codes_used: u32,
    perplexity: f64,
    error: f32,
    /// (images, pixels)
    drawn: Vec<Vec<f32>>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (train, test) = (images(TRAIN, &mut rng, &device)?, images(TEST, &mut rng, &device)?);

    let runs = [
        ("normal start", Start::Normal, 0.0),
        ("normal start, revival", Start::Normal, 1.0),
        ("k-means start", Start::KMeans, 0.0),
        ("k-means start, revival", Start::KMeans, 1.0),
    ];
    let bar = ProgressBar::new((runs.len() * STEPS) as u64);
    bar.set_style(ProgressStyle::with_template("{msg:24} [{bar:40}] {pos}/{len} steps, {eta} left")?);
    let mut outcomes = Vec::new();
    for (name, start, threshold) in runs {
        bar.set_message(name);
        outcomes.push(run(&train, &test, start, threshold, &bar)?);
    }
    bar.finish_and_clear();

    println!("{CODES} codes, {STEPS} steps of {BATCH} images; measured on {TEST} others\n");
    println!("{:24}{:>12}{:>12}{:>16}", "", "codes used", "perplexity", "error a pixel");
    for ((name, ..), outcome) in runs.iter().zip(&outcomes) {
        let Outcome { codes_used, perplexity, error, .. } = outcome;
        println!("{name:24}{codes_used:>12}{perplexity:>12.1}{error:>16.5}");
    }
    let mut rows = vec![("input", test.narrow(0, 0, SHOWN)?.to_vec2::<f32>()?)];
    rows.extend(runs.iter().zip(outcomes).map(|((name, ..), outcome)| (*name, outcome.drawn)));
    draw(&args.out, &rows).map_err(|error| anyhow!("cannot draw {}: {error}", args.out.display()))?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// Two layers to the codebook, and two back.
struct Model {
    layers: [Linear; 4],
    weights: Vec<Var>,
}

impl Model {
    fn new(rng: &mut ChaCha8Rng, device: &Device) -> Result<Self> {
        let mut weights = Vec::new();
        let mut layer = |from: usize, to: usize| {
            let bound = (1.0 / from as f32).sqrt();
            let values: Vec<f32> = (0..from * to).map(|_| rng.random_range(-bound..bound)).collect();
            let weight = Var::from_vec(values, (to, from), device)?;
            let bias = Var::zeros(to, DType::F32, device)?;
            let linear = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
            weights.extend([weight, bias]);
            anyhow::Ok(linear)
        };
        let code = TOKENS * DIM;
        let layers = [layer(PIXELS, HIDDEN)?, layer(HIDDEN, code)?, layer(code, HIDDEN)?, layer(HIDDEN, PIXELS)?];
        Ok(Self { layers, weights })
    }

    /// (images, pixels) to (vectors, values).
    fn encode(&self, images: &Tensor) -> Result<Tensor> {
        Ok(self.layers[1].forward(&self.layers[0].forward(images)?.relu()?)?.reshape(((), DIM))?)
    }

    fn decode(&self, vectors: &Tensor) -> Result<Tensor> {
        let vectors = vectors.reshape(((), TOKENS * DIM))?;
        Ok(candle_nn::ops::sigmoid(&self.layers[3].forward(&self.layers[2].forward(&vectors)?.relu()?)?)?)
    }
}

/// Trains from the same weights on the same batches, whatever the codebook does.
fn run(train: &Tensor, test: &Tensor, start: Start, threshold: f64, bar: &ProgressBar) -> Result<Outcome> {
    let device = train.device();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let model = Model::new(&mut rng, device)?;
    let settings = Ema { decay: 0.95, threshold_ema_dead_code: threshold, commitment_weight: 0.25, ..Ema::default() };
    let mut codebook = match start {
        Start::Normal => {
            let values: Vec<f32> = (0..CODES * DIM).map(|_| rng.sample(rand_distr::StandardNormal)).collect();
            let entries = Tensor::from_vec(values, (CODES, DIM), device)?;
            EmaCodebook::new(Codebook::new(&entries, Metric::SquaredEuclidean)?, settings)?
        }
        Start::KMeans => EmaCodebook::train(&model.encode(train)?, &KMeans::new(CODES), settings)?,
    };
    let mut optimizer = AdamW::new(model.weights.clone(), ParamsAdamW { lr: 2e-3, ..Default::default() })?;
    let mut batches = ChaCha8Rng::seed_from_u64(3);
    for _ in 0..STEPS {
        let rows: Vec<u32> = (0..BATCH).map(|_| batches.random_range(0..TRAIN as u32)).collect();
        let images = train.index_select(&Tensor::from_vec(rows, BATCH, device)?, 0)?;
        let quantized = codebook.step(&model.encode(&images)?)?;
        let error = mse(&model.decode(&quantized.values)?, &images)?;
        optimizer.backward_step(&(error + quantized.loss)?)?;
        bar.inc(1);
    }

    let codebook = codebook.codebook();
    let codes = codebook.encode_u8(&model.encode(test)?)?;
    let (usage, drawn) = (codebook.usage(&codes)?, model.decode(&codebook.decode(&codes)?)?);
    Ok(Outcome {
        codes_used: usage.codes_used.to_scalar()?,
        perplexity: usage.perplexity.to_scalar()?,
        error: mse(&drawn, test)?.to_scalar()?,
        drawn: drawn.narrow(0, 0, SHOWN)?.to_vec2()?,
    })
}

/// (count, pixels) in 0 to 1: one shape each, its edges softened over a pixel.
fn images(count: usize, rng: &mut ChaCha8Rng, device: &Device) -> Result<Tensor> {
    let mut pixels = Vec::with_capacity(count * PIXELS);
    for _ in 0..count {
        let kind = rng.random_range(0..5);
        let (cx, cy): (f32, f32) = (rng.random_range(5.0..10.0), rng.random_range(5.0..10.0));
        let (radius, pen): (f32, f32) = (rng.random_range(2.5..5.5), rng.random_range(0.7..1.4));
        let (sin, cos) = rng.random_range(0.0..std::f32::consts::PI).sin_cos();
        for at in 0..PIXELS {
            let (dx, dy) = ((at % SIDE) as f32 - cx, (at / SIDE) as f32 - cy);
            let (along, across) = (dx * cos + dy * sin, dy * cos - dx * sin);
            let bar = |along: f32, across: f32| (along.abs() - radius).max(across.abs() - pen);
            // How far a pixel is outside of the shape.
            let outside = match kind {
                0 => (dx.hypot(dy) - radius).abs() - pen,
                1 => dx.hypot(dy) - radius,
                2 => bar(along, across),
                3 => bar(along, across).min(bar(across, along)),
                _ => (along.abs().max(across.abs()) - radius * 0.8).abs() - pen,
            };
            pixels.push((0.5 - outside).clamp(0.0, 1.0));
        }
    }
    Ok(Tensor::from_vec(pixels, (count, PIXELS), device)?)
}

/// A row of images for each name.
fn draw(path: &Path, rows: &[(&str, Vec<Vec<f32>>)]) -> Result<(), Box<dyn std::error::Error>> {
    const PIXEL: i32 = 3;
    const CELL: i32 = SIDE as i32 * PIXEL + 8;
    const NAMES: i32 = 190;
    let size = (NAMES + SHOWN as i32 * CELL + 12, rows.len() as i32 * CELL + 20);
    let area = SVGBackend::new(path, (size.0 as u32, size.1 as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    for (row, (name, images)) in rows.iter().enumerate() {
        let top = 10 + row as i32 * CELL;
        area.draw(&Text::new(*name, (12, top + CELL / 2 - 14), ("sans-serif", 16)))?;
        for (column, image) in images.iter().enumerate() {
            let left = NAMES + column as i32 * CELL;
            let block = |from: (i32, i32), to: (i32, i32), grey: u8| {
                let at = |(x, y): (i32, i32)| (left + x * PIXEL, top + y * PIXEL);
                let colour = RGBColor(grey, grey, grey).filled();
                area.draw(&Rectangle::new([at(from), at(to)], colour))
            };
            for (y, line) in image.chunks(SIDE).enumerate() {
                // Sixteen shades, and one rectangle for neighbours of the same.
                let shades: Vec<u8> = line.iter().map(|v| 255 - (v * 15.0).round() as u8 * 17).collect();
                let mut x = 0;
                for run in shades.chunk_by(|a, b| a == b) {
                    let (from, to) = ((x as i32, y as i32), ((x + run.len()) as i32, y as i32 + 1));
                    if run[0] < 255 {
                        block(from, to, run[0])?;
                    }
                    x += run.len();
                }
            }
        }
    }
    area.present()?;
    Ok(())
}
