//! SmolLM2-135M keeps its KV cache in one to four bits a value, in every block, and says what that costs.
//!
//! ```text
//! cargo run --release -p models --example kv_quantize -- --model SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//! The prompt is read exactly and then stored by each method. The model is scored on the tokens that follow, all at
//! once, which see the stored prompt, four exact tokens at its start, and each other exactly. Codebooks are trained on
//! the prompt's own keys, before their rotation by position, and values: all layers, heads and pieces of either in one call.

use anyhow::{ensure, Result};
use candle_flash_kmeans::Init;
use clap::Parser;
use coder::{Method, MOST_ENTRIES};
use models::{backend::Backend, chart, progress::progress, score::Score, smollm2::SmolLm2, CODE, PROSE};
use product::PASSES;
use prompt::{Prompt, Stored, SINKS};
use std::{fs, path::PathBuf};

mod coder;
mod product;
mod prompt;
mod scalar;

/// A codebook has no more entries than there are rows.
const FEWEST: usize = SINKS + MOST_ENTRIES;

/// What is compared where nothing else is asked for.
const METHODS: [&str; 13] = [
    "int2",
    "int3",
    "int4",
    "turbo2",
    "turbo3",
    "turbo4",
    "4x256",
    "4x256+shared",
    "4x256+pca-of-other+shared",
    "8x256+pca-of-other+shared+read",
    "4x64+pca-of-other+shared+read",
    "4x256+pca-of-other+shared+read",
    "4x256x2+pca-of-other+shared+read",
];

#[derive(Parser)]
#[command(about = "What SmolLM2-135M loses to a KV cache of one to four bits a value")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to read; code depends on its context most
    #[arg(long, default_value = CODE)]
    text: PathBuf,
    /// The other text, of which codebooks and components can be
    #[arg(long, default_value = PROSE)]
    other_text: PathBuf,
    /// Tokens of the prompt, and of the other text; a codebook for each piece costs a short prompt more than it saves
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// Tokens after it that are scored
    #[arg(long, default_value_t = 64)]
    scored: usize,
    /// A method instead of the usual ones, as the document names it, for keys and values or with a slash between them; as often as wanted
    #[arg(long)]
    method: Vec<Method>,
    /// Start codebooks by k-means++: closer, and slower to train
    #[arg(long)]
    plus_plus: bool,
    /// Keep what the prompts leave in the cache in this folder, for other methods later
    #[arg(long)]
    keep: Option<PathBuf>,
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
    let methods = match &args.method[..] {
        [] => METHODS.iter().map(|method| method.parse()).collect::<Result<Vec<Method>>>()?,
        methods => methods.to_vec(),
    };
    let (device, _) = args.device.open()?;
    let model = SmolLm2::load(&args.model, &device)?;
    let (tokens, end) = (args.tokens, args.tokens + args.scored);
    let ids = model.read(&args.text, end + 1)?;
    let other = model.read(&args.other_text, tokens)?;

    let bar = progress(2 * model.dims.layers, "prompts")?;
    let read = |ids: &[u32], name: &str| match &args.keep {
        None => Prompt::new(&model, ids, &bar),
        Some(folder) => {
            fs::create_dir_all(folder)?;
            Prompt::kept(&model, ids, &folder.join(format!("{name}-{tokens}.safetensors")), &bar)
        }
    };
    let (prompt, other) = (read(&ids[..tokens], "text")?, read(&other, "other")?);
    bar.finish_and_clear();

    let init = if args.plus_plus { Init::KMeansPlusPlus } else { Init::Random };
    println!("{tokens} tokens of {}, at most {PASSES} passes of k-means\n", args.text.display());
    println!(
        "| keys / values | bits a value | of keys | of values | of these, besides codes | codebooks | coded in | KL to f16 | perplexity | top-1 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|");
    let bar = progress(1 + methods.len(), "methods")?;
    let (mut full, mut lines) = (None, Vec::<(String, Vec<_>)>::new());
    for method in [Method::EXACT].into_iter().chain(methods) {
        let stored = prompt.stored(&model, method, &other, &init)?;
        let predicted = stored.prompt.follow(&model, &ids[tokens..end])?;
        let score = Score::new(full.get_or_insert_with(|| predicted.clone()), &predicted, &ids[tokens + 1..])?;
        bar.inc(1);
        bar.suspend(|| print_row(method, &stored, &score));
        let point = (stored.bits(), score.divergence);
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
    let Stored { keys, values, seconds, .. } = stored;
    let (bits, overhead) = (stored.bits(), (keys.overhead + values.overhead) / 2.0);
    let [of_keys, of_values] = [keys, values].map(|coded| coded.codes + coded.overhead);
    let (divergence, perplexity, same) = (score.divergence, score.perplexity, 100.0 * score.agreement);
    let trained = format!("{} | {seconds:.3} s", keys.codebooks + values.codebooks);
    println!(
        "| {method} | {bits:.2} | {of_keys:.2} | {of_values:.2} | {overhead:.2} | {trained} | {divergence:.4} | {perplexity:.3} | {same:.1} % |"
    );
}
