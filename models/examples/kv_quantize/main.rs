//! SmolLM2-135M keeps its KV cache in one to four bits a value, in every block, and says what that costs.
//!
//! ```text
//! cargo run --release -p models --example kv_quantize -- --model SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//! The prompt is read exactly and then stored by each method. The model is scored on the tokens that follow, all at
//! once, which see the stored prompt, four exact tokens at its start, and each other exactly. Codebooks are trained on
//! the prompt's own keys, before their rotation by position, and values: all layers, heads and pieces in one call.

use anyhow::{ensure, Result};
use candle_flash_kmeans::Init;
use clap::Parser;
use methods::{Method, Prompt, Stored, PASSES, SINKS};
use models::{backend::Backend, chart, progress::progress, score::Score, smollm2::SmolLm2, CODE, PROSE};
use std::path::PathBuf;

mod methods;

/// A codebook has no more entries than there are rows.
const FEWEST: usize = SINKS + 256;

#[derive(Parser)]
#[command(about = "What SmolLM2-135M loses to a KV cache of one to four bits a value")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to read; code depends on its context most
    #[arg(long, default_value = CODE)]
    text: PathBuf,
    /// The other text, on which its codebooks are trained
    #[arg(long, default_value = PROSE)]
    other_text: PathBuf,
    /// Tokens of the prompt, and of the other text; codebooks cost a short prompt more than they save
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Tokens after it that are scored
    #[arg(long, default_value_t = 64)]
    scored: usize,
    /// Start codebooks by k-means++: closer, and slower to train
    #[arg(long)]
    plus_plus: bool,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw divergence against bits
    #[arg(long, default_value = "kv_quantize.svg")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.tokens >= FEWEST, "--tokens {}: at least {FEWEST} are needed", args.tokens);
    ensure!(args.scored > 0, "--scored 0: there is nothing to measure");
    let (device, _) = args.device.open()?;
    let model = SmolLm2::load(&args.model, &device)?;
    let (tokens, end) = (args.tokens, args.tokens + args.scored);
    let ids = model.read(&args.text, end + 1)?;
    let other = model.read(&args.other_text, tokens)?;

    let bar = progress(2 * model.dims.layers, "prompts")?;
    let prompt = Prompt::new(&model, &ids[..tokens], &bar)?;
    let other = Prompt::new(&model, &other, &bar)?;
    bar.finish_and_clear();

    let init = if args.plus_plus { Init::KMeansPlusPlus } else { Init::Random };
    println!("{tokens} tokens of {}, at most {PASSES} passes of k-means\n", args.text.display());
    println!(
        "| | bits a value | of these, scales or codebooks | codebooks | trained in | KL to f16 | perplexity | top-1 |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    let bar = progress(1 + Method::ALL.len(), "methods")?;
    let (mut full, mut lines) = (None, Vec::<(String, Vec<_>)>::new());
    for method in [Method::Exact].into_iter().chain(Method::ALL) {
        let stored = prompt.stored(&model, method, &other, &init)?;
        let predicted = stored.prompt.follow(&model, &ids[tokens..end])?;
        let score = Score::new(full.get_or_insert_with(|| predicted.clone()), &predicted, &ids[tokens + 1..])?;
        bar.inc(1);
        bar.suspend(|| print_row(method, &stored, &score));
        let point = (stored.bits, score.divergence);
        match lines.iter_mut().find(|(line, _)| *line == method.line()) {
            Some((_, points)) => points.push(point),
            None => lines.push((method.line(), vec![point])),
        }
    }
    bar.finish_and_clear();
    // The exact cache diverges from itself by nothing, which no logarithm can show.
    let lines: Vec<_> = lines[1..].iter().map(|(line, points)| (line.as_str(), points.clone())).collect();
    let ticks = vec![1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0];
    let bits = chart::Axis { name: "bits a value", ticks, label: |bits| format!("{bits:.1}") };
    chart::draw(&args.out, "What SmolLM2 loses to a smaller cache", bits, "KL to the cache in f16", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

fn print_row(method: Method, stored: &Stored, score: &Score) {
    let (Stored { bits, overhead, codebooks, seconds, .. }, name) = (stored, method.name());
    let (divergence, perplexity, same) = (score.divergence, score.perplexity, 100.0 * score.agreement);
    let trained = if *codebooks > 0 { format!("{codebooks} | {seconds:.3} s") } else { " | ".into() };
    println!("| {name} | {bits:.2} | {overhead:.2} | {trained} | {divergence:.4} | {perplexity:.3} | {same:.1} % |");
}
