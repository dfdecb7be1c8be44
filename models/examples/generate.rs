//! candle-transformers' quantized Llama writes a text, as it is and with `drop_in/quantized_llama.patch`, which reads a part of its cache.
//!
//! ```text
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -p models --example generate -- --model SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//! Both read the beginning of a text and continue it, each time with the likeliest token. Candle's products with quantized weights use
//! vector instructions only where they are compiled for them, and round activations to eight bits, which makes of any difference in a last
//! bit one of that size: the texts can part even with a budget for all tokens.

// The patched model names these as parts of its own crate.
extern crate candle_core as candle;
use candle_transformers::{quantized_nn, utils};

#[allow(warnings, clippy::all)]
mod quantized_llama {
    include!(concat!(env!("OUT_DIR"), "/quantized_llama.rs"));
}

use anyhow::{ensure, Context, Result};
use candle::{quantized::gguf_file::Content, Device, Tensor, D};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
use candle_transformers::models::quantized_llama as original;
use clap::Parser;
use models::{backend::Backend, smollm2, PROSE};
use std::{fs, io::Cursor, io::Write, path::PathBuf, sync::OnceLock, time::Instant};
use tokenizers::Tokenizer;

#[derive(Parser)]
#[command(about = "A quantized Llama of candle-transformers that reads a part of its KV cache writes a text")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf, or another Llama
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to continue
    #[arg(long, default_value = PROSE)]
    text: PathBuf,
    /// Its tokens that are read
    #[arg(long, default_value_t = 512)]
    tokens: usize,
    /// Tokens to write
    #[arg(long, default_value_t = 60)]
    written: usize,
    /// Tokens that a new one may read besides sinks and recent ones
    #[arg(long, default_value_t = 128)]
    budget: usize,
    #[arg(long, default_value = "cpu")]
    device: Backend,
}

static BUDGET: OnceLock<usize> = OnceLock::new();

/// The patched model makes its layers with this.
fn attention() -> ClusteredAttention {
    let budget = *BUDGET.get().expect("it is set before the model is made");
    ClusteredAttention::new(ClusteredKvCache::new(original::MAX_SEQ_LEN), KvBudget::new(budget))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let bytes = fs::read(&args.model).with_context(|| format!("cannot read {}", args.model.display()))?;
    let content = || Content::read(&mut Cursor::new(&bytes));
    let tokenizer = smollm2::tokenizer(&content()?)?;
    let text = fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let ids = tokenizer.encode(text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    ensure!((1..=ids.len()).contains(&args.tokens), "--tokens {}: the text has 1..={}", args.tokens, ids.len());
    let most = original::MAX_SEQ_LEN - args.tokens.min(original::MAX_SEQ_LEN);
    ensure!(args.written <= most, "--written {}: there are positions for {most}", args.written);
    BUDGET.get_or_init(|| args.budget);

    let ids = &ids[..args.tokens];
    let mut model = original::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &device)?;
    println!("-- as it is");
    write(&tokenizer, ids, args.written, &device, |ids, offset| model.forward(ids, offset))?;
    let mut model = quantized_llama::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &device)?;
    println!("-- reading {} of {} tokens", args.budget, args.tokens);
    write(&tokenizer, ids, args.written, &device, |ids, offset| model.forward(ids, offset))?;
    Ok(())
}

/// Continues `ids`, and prints the text as it comes and then the speed.
fn write(
    tokenizer: &Tokenizer,
    ids: &[u32],
    written: usize,
    device: &Device,
    mut forward: impl FnMut(&Tensor, usize) -> candle::Result<Tensor>,
) -> Result<()> {
    let start = Instant::now();
    let mut next = |ids: &[u32], offset| {
        let logits = forward(&Tensor::new(ids, device)?.unsqueeze(0)?, offset)?;
        logits.argmax(D::Minus1)?.squeeze(0)?.to_scalar::<u32>()
    };
    let mut tokens = vec![next(ids, 0)?];
    let prompt = start.elapsed().as_secs_f64();
    let mut decoder = tokenizer.decode_stream(true);
    while tokens.len() < written {
        let last = *tokens.last().expect("there is one");
        if let Some(text) = decoder.step(last).map_err(anyhow::Error::msg)? {
            print!("{text}");
            std::io::stdout().flush()?;
        }
        tokens.push(next(&[last], ids.len() + tokens.len() - 1)?);
    }
    let seconds = start.elapsed().as_secs_f64() - prompt;
    println!("\n-- prompt {prompt:.2} s, then {:.1} tokens/s", (tokens.len() - 1) as f64 / seconds);
    Ok(())
}
