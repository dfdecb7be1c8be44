//! Trains a small autoencoder whose images pass through a codebook: from random entries or from k-means of what the encoder has learnt, with and
//! without revival of dead codes, in one stage or in two.
//!
//! ```text
//! cargo run --release --example vq_autoencoder [--device cpu|cuda] [--out vq_autoencoder.svg]
//! ```
//! Images are drawn in code: rings, discs, bars, crosses and frames of any place and size. Each becomes 16 vectors of 8 values,
//! each vector eight bits: one of 256 codes, or two of 16. A second network draws the image again from the codes. In the picture ink that
//! is missing is cyan, and ink too much is red.

use anyhow::{anyhow, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_flash_kmeans::{
    nn::{Codebook, Ema, EmaCodebook, EmaResidualQuantizer},
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
/// Codes of each of two stages, which are as many together.
const STAGE_CODES: usize = 16;

const TRAIN: usize = 4096;
const TEST: usize = 512;
const BATCH: usize = 128;
const STEPS: usize = 400;
/// Steps without a codebook: k-means of an encoder that has learnt nothing is no good start.
const WARM_UP: usize = 100;
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

struct Run {
    name: &'static str,
    start: Start,
    revival: bool,
}

/// Where codebooks start.
#[derive(Clone, Copy, PartialEq)]
enum Start {
    Normal,
    KMeans,
    /// Of two stages
    ResidualKMeans,
}

const RUNS: [Run; 5] = [
    Run { name: "normal", start: Start::Normal, revival: false },
    Run { name: "normal, revival", start: Start::Normal, revival: true },
    Run { name: "k-means", start: Start::KMeans, revival: false },
    Run { name: "k-means, revival", start: Start::KMeans, revival: true },
    Run { name: "residual, revival", start: Start::ResidualKMeans, revival: true },
];

/// A trained model does this to images that it has not seen.
struct Outcome {
    codes_used: usize,
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

    let bar = ProgressBar::new((RUNS.len() * STEPS) as u64);
    bar.set_style(ProgressStyle::with_template("{msg:18} [{bar:40}] {pos}/{len} steps, {eta} left")?);
    let mut outcomes = Vec::new();
    for run in &RUNS {
        bar.set_message(run.name);
        outcomes.push(train_through(run, &train, &test, &bar)?);
    }
    bar.finish_and_clear();

    println!("8 bits a vector, {STEPS} steps of {BATCH} images, {WARM_UP} of them before k-means; measured on {TEST} others\n");
    println!("{:18}{:>12}{:>12}{:>16}", "start", "codes used", "perplexity", "error a pixel");
    let mut rows = vec![("input".to_string(), test.narrow(0, 0, SHOWN)?.to_vec2::<f32>()?)];
    for (run, Outcome { codes_used, perplexity, error, drawn }) in RUNS.iter().zip(outcomes) {
        println!("{:18}{codes_used:>12}{perplexity:>12.1}{error:>16.5}", run.name);
        rows.push((format!("{} ({error:.4})", run.name), drawn));
    }
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
            // Layers keep the scale of what they read (He et al. 2015), or encodings would be much smaller than normal entries.
            let bound = (6.0 / from as f32).sqrt();
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

/// One codebook, or two of which the second codes what the first leaves over.
enum Quantizer {
    One(EmaCodebook),
    Stages(EmaResidualQuantizer),
}

impl Quantizer {
    /// Starts from numbers, or from the encodings of the training images.
    fn new(run: &Run, model: &Model, train: &Tensor, rng: &mut ChaCha8Rng) -> Result<Self> {
        // An entry is dead with less than an eighth of an even share of a batch.
        let share = |codes: usize| (BATCH * TOKENS / codes) as f64;
        let dead = |codes| if run.revival { share(codes) / 8.0 } else { 0.0 };
        let ema = |codes| Ema { threshold_ema_dead_code: dead(codes), commitment_weight: 0.25, ..Ema::default() };
        // Entries count as one row at the start, which batches soon outweigh: the encoder goes on learning.
        Ok(match run.start {
            Start::Normal => {
                let values: Vec<f32> = (0..CODES * DIM).map(|_| rng.sample(rand_distr::StandardNormal)).collect();
                let entries = Tensor::from_vec(values, (CODES, DIM), train.device())?;
                Self::One(EmaCodebook::new(Codebook::new(&entries, Metric::SquaredEuclidean)?, ema(CODES))?)
            }
            Start::KMeans => {
                let codebook = Codebook::train(&model.encode(train)?, &KMeans::new(CODES))?;
                Self::One(EmaCodebook::new(codebook, ema(CODES))?)
            }
            Start::ResidualKMeans => {
                let (encodings, kmeans) = (model.encode(train)?, KMeans::new(STAGE_CODES));
                Self::Stages(EmaResidualQuantizer::train(&encodings, 2, &kmeans, ema(STAGE_CODES))?)
            }
        })
    }

    /// What the decoder reads, and the loss.
    fn step(&mut self, vectors: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(match self {
            Self::One(codebook) => {
                let quantized = codebook.step(vectors)?;
                (quantized.values, quantized.loss)
            }
            Self::Stages(stages) => {
                let quantized = stages.step(vectors)?;
                (quantized.values, quantized.loss)
            }
        })
    }

    /// What the decoder reads, and the codes, of two stages as one number.
    fn quantize(&self, vectors: &Tensor) -> Result<(Tensor, Vec<u32>)> {
        Ok(match self {
            Self::One(codebook) => {
                let quantized = codebook.quantize(vectors)?;
                (quantized.values, quantized.codes.to_vec1()?)
            }
            Self::Stages(stages) => {
                let quantized = stages.quantize(vectors)?;
                let codes = quantized.codes.to_vec2::<u32>()?;
                let one = |codes: Vec<u32>| codes.into_iter().fold(0, |all, code| all * STAGE_CODES as u32 + code);
                (quantized.values, codes.into_iter().map(one).collect())
            }
        })
    }
}

/// Trains from the same weights on the same batches, whatever the codebook does.
fn train_through(run: &Run, train: &Tensor, test: &Tensor, bar: &ProgressBar) -> Result<Outcome> {
    let device = train.device();
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let model = Model::new(&mut rng, device)?;
    let mut optimizer = AdamW::new(model.weights.clone(), ParamsAdamW { lr: 2e-3, ..Default::default() })?;
    let mut batches = ChaCha8Rng::seed_from_u64(3);
    let mut step = |quantizer: Option<&mut Quantizer>| {
        let rows: Vec<u32> = (0..BATCH).map(|_| batches.random_range(0..TRAIN as u32)).collect();
        let images = train.index_select(&Tensor::from_vec(rows, BATCH, device)?, 0)?;
        let vectors = model.encode(&images)?;
        let (values, loss) = match quantizer {
            Some(quantizer) => quantizer.step(&vectors)?,
            None => (vectors, Tensor::zeros((), DType::F32, device)?),
        };
        optimizer.backward_step(&(mse(&model.decode(&values)?, &images)? + loss)?)?;
        bar.inc(1);
        anyhow::Ok(())
    };
    let warm_up = if run.start == Start::Normal { 0 } else { WARM_UP };
    (0..warm_up).try_for_each(|_| step(None))?;
    let mut quantizer = Quantizer::new(run, &model, train, &mut rng)?;
    (warm_up..STEPS).try_for_each(|_| step(Some(&mut quantizer)))?;

    let (values, codes) = quantizer.quantize(&model.encode(test)?)?;
    let drawn = model.decode(&values)?;
    let (codes_used, perplexity) = usage(&codes);
    Ok(Outcome {
        codes_used,
        perplexity,
        error: mse(&drawn, test)?.to_scalar()?,
        drawn: drawn.narrow(0, 0, SHOWN)?.to_vec2()?,
    })
}

/// How many codes there are, and the exponential of their entropy.
fn usage(codes: &[u32]) -> (usize, f64) {
    let mut counts = [0u32; CODES];
    codes.iter().for_each(|&code| counts[code as usize] += 1);
    let shares = counts.iter().filter(|&&count| count > 0).map(|&count| f64::from(count) / codes.len() as f64);
    (shares.clone().count(), (-shares.map(|share| share * share.ln()).sum::<f64>()).exp())
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

/// A row of images for each name, the first of which is what the others should be. Red is the shade of that and the other colours are the
/// shade of what is drawn, so that what differs is coloured.
fn draw(path: &Path, rows: &[(String, Vec<Vec<f32>>)]) -> Result<(), Box<dyn std::error::Error>> {
    const PIXEL: i32 = 3;
    const CELL: i32 = SIDE as i32 * PIXEL + 8;
    const NAMES: i32 = 220;
    let size = (NAMES + SHOWN as i32 * CELL + 12, rows.len() as i32 * CELL + 20);
    let area = SVGBackend::new(path, (size.0 as u32, size.1 as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    let inputs = &rows[0].1;
    for (row, (name, images)) in rows.iter().enumerate() {
        let top = 10 + row as i32 * CELL;
        if row > 0 {
            let rule = vec![(12, top - 4), (size.0 - 12, top - 4)];
            area.draw(&PathElement::new(rule, RGBColor(200, 200, 200)))?;
        }
        area.draw(&Text::new(name.as_str(), (12, top + CELL / 2 - 14), ("sans-serif", 16)))?;
        for (column, (image, input)) in images.iter().zip(inputs).enumerate() {
            let left = NAMES + column as i32 * CELL;
            let block = |from: (i32, i32), to: (i32, i32), colour: RGBColor| {
                let at = |(x, y): (i32, i32)| (left + x * PIXEL, top + y * PIXEL);
                area.draw(&Rectangle::new([at(from), at(to)], colour.filled()))
            };
            for (y, (line, input)) in image.chunks(SIDE).zip(input.chunks(SIDE)).enumerate() {
                // Sixteen shades, and one rectangle for neighbours of the same.
                let shade = |v: &f32| 255 - (v * 15.0).round() as u8 * 17;
                let shades: Vec<_> = line.iter().zip(input).map(|(v, input)| (shade(input), shade(v))).collect();
                let mut x = 0;
                for run in shades.chunk_by(|a, b| a == b) {
                    let (from, to) = ((x as i32, y as i32), ((x + run.len()) as i32, y as i32 + 1));
                    let (red, rest) = run[0];
                    if (red, rest) != (255, 255) {
                        block(from, to, RGBColor(red, rest, rest))?;
                    }
                    x += run.len();
                }
            }
        }
    }
    area.present()?;
    Ok(())
}
