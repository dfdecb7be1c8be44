//! candle-transformers' quantized Llama writes a text, with its own cache, and reading all or a part of a clustered one.
//!
//! ```text
//! RUSTFLAGS="-C target-cpu=native" cargo run --release -p models --example generate -- --model SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//! The prompt is read once. Each text goes on from there with the likeliest token. Then each budget is asked for the next token along the
//! full cache's text, too, since one token that differs makes another text of the rest. Candle's products with quantized weights round
//! activations to eight bits, which makes of any difference in a last bit one of that size: the texts of the two full caches can part as
//! well.

// The models name these as parts of their own crate.
extern crate candle_core as candle;
use candle_transformers::{quantized_nn, utils};

mod llama;

use anyhow::{ensure, Context, Result};
use candle::{quantized::gguf_file::Content, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
use clap::Parser;
use llama::{original, patched};
use models::{
    backend::Backend,
    chart,
    decode::{likeliest, share_read, Written},
    progress::progress,
    smollm2,
    timing::seconds,
    PROSE,
};
use std::{
    fs,
    io::{stdout, Cursor, Write},
    path::PathBuf,
    sync::OnceLock,
};
use tokenizers::Tokenizer;

/// Tokens of the prompt that are read at once, whose scores over all tokens before bound the memory.
const CHUNK: usize = 256;

#[derive(Parser)]
#[command(about = "A quantized Llama of candle-transformers writes a text, reading all or a part of its KV cache")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf, or another Llama
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to continue
    #[arg(long, default_value = PROSE)]
    text: PathBuf,
    /// Its tokens that are read
    #[arg(long, default_value_t = 2000)]
    tokens: usize,
    /// Tokens to write
    #[arg(long, default_value_t = 60)]
    written: usize,
    /// Tokens that a query head may read besides sinks and recent ones
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512])]
    budgets: Vec<usize>,
    /// Tokens in a cluster, on average
    #[arg(long, default_value_t = 8)]
    group: usize,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw speed against the budget
    #[arg(long, default_value = "generate.svg")]
    out: PathBuf,
}

static GROUP: OnceLock<usize> = OnceLock::new();

/// The patched model makes its layers with this: they read everything until they are told otherwise.
fn attention() -> ClusteredAttention {
    let group = *GROUP.get().expect("it is set before the model is made");
    let cache = ClusteredKvCache::new(patched::MAX_SEQ_LEN).cluster_size(group);
    ClusteredAttention::new(cache, KvBudget::new(usize::MAX)).auto_cluster(false)
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.written > 2, "--written {}: the first two are not timed", args.written);
    ensure!(args.group > 0, "--group 0: a cluster has tokens");
    let positions = patched::MAX_SEQ_LEN.saturating_sub(args.tokens);
    ensure!(args.written <= positions, "--written {}: there are positions for {positions}", args.written);
    GROUP.get_or_init(|| args.group);
    let (device, _) = args.device.open()?;
    let bytes = fs::read(&args.model).with_context(|| format!("cannot read {}", args.model.display()))?;
    let content = || Content::read(&mut Cursor::new(&bytes));
    let tokenizer = smollm2::tokenizer(&content()?)?;
    let text = fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let ids = tokenizer.encode(text, true).map_err(anyhow::Error::msg)?.get_ids().to_vec();
    ensure!((1..=ids.len()).contains(&args.tokens), "--tokens {}: the text has 1..={}", args.tokens, ids.len());

    let mut model = patched::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &device)?;
    let first = read_prompt(&mut model, &ids[..args.tokens], &device)?;
    let write = |forward: &mut Forward| write(&tokenizer, first, &args, &device, forward);
    println!("\n-- all tokens");
    let mut reading = model.clone();
    let full = write(&mut |ids, offset| reading.forward(ids, offset))?;
    // The steps of `forced` are only taken where the texts part.
    let compare = |name: String, share, written: Written, forced: &mut Forward| {
        let parts = full.first_difference(&written);
        let agreement = parts.map_or(Ok(1.0), |_| full.agreement(steps(&device, args.tokens, forced)));
        anyhow::Ok(Line { name, share, rate: written.rate, agreement: agreement?, parts })
    };

    println!("\n-- all tokens, candle-transformers as it is");
    let mut own = original::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &device)?;
    own.set_caches(model.caches()?);
    let mut forced = own.clone();
    let written = write(&mut |ids, offset| own.forward(ids, offset))?;
    let own = compare("candle-transformers".into(), 1.0, written, &mut |ids, offset| forced.forward(ids, offset))?;

    let heads = heads(&content()?)?;
    let mut lines = vec![];
    for &budget in &args.budgets {
        println!("\n-- {budget} tokens");
        let mut reading = model.clone();
        reading.layers_mut().for_each(|layer| layer.set_budget(KvBudget::new(budget).dense_if_cheaper(false)));
        let mut forced = reading.clone();
        let written = write(&mut |ids, offset| reading.forward_and_cluster(ids, offset))?;
        let layer = reading.layers().next().context("the model has no layers")?;
        let share = share_read(layer.cache(), budget, heads)?;
        let mut forced = |ids: &Tensor, offset| forced.forward_and_cluster(ids, offset);
        lines.push(compare(budget.to_string(), share, written, &mut forced)?);
    }
    println!(
        "\n| tokens read | share of the cache | tokens/s | same next token | texts part after |\n|---|---|---|---|---|"
    );
    let all = Line { name: "all".into(), share: 1.0, rate: full.rate, agreement: 1.0, parts: None };
    [&own, &all].into_iter().chain(&lines).for_each(Line::print);

    let across = |line: &Line| args.budgets.iter().map(|&budget| (budget as f64, line.rate)).collect();
    let budgets = args.budgets.iter().zip(&lines).map(|(&budget, line)| (budget as f64, line.rate)).collect();
    let drawn = [("a budget", budgets), ("all tokens", across(&all)), ("candle-transformers as it is", across(&own))];
    let title = format!("Tokens a second after a prompt of {}", args.tokens);
    let budget = chart::Axis {
        name: "tokens that a query head reads besides sinks and recent ones",
        ticks: (4..14).map(|power| f64::from(1 << power)).collect(),
        label: f64::to_string,
    };
    chart::draw(&args.out, &title, budget, "tokens/s", &drawn)?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// Token ids, `(1, tokens)`, and the number of those before them, to logits.
type Forward<'a> = dyn FnMut(&Tensor, usize) -> candle::Result<Tensor> + 'a;

/// Each step reads a token, the first after `offset` others, and says the likeliest next one.
fn steps<'a>(device: &'a Device, offset: usize, forward: &'a mut Forward<'a>) -> impl FnMut(u32) -> Result<u32> + 'a {
    let mut offsets = offset..;
    move |token| {
        let offset = offsets.next().expect("there is always another");
        likeliest(&forward(&Tensor::new(&[[token]], device)?, offset)?)
    }
}

/// Reads and clusters the prompt, shows how it ends, and returns the likeliest token after it.
fn read_prompt(model: &mut patched::ModelWeights, ids: &[u32], device: &Device) -> Result<u32> {
    let bar = progress(ids.len(), "prompt")?;
    let mut reading = model.dequantized(device)?;
    let (first, took) = seconds(device, || {
        let mut first = 0;
        for (i, ids) in ids.chunks(CHUNK).enumerate() {
            first = likeliest(&reading.forward(&Tensor::new(ids, device)?.unsqueeze(0)?, i * CHUNK)?)?;
            bar.inc(ids.len() as u64);
        }
        Ok(first)
    })?;
    bar.finish_and_clear();
    let (_, clustering) = seconds(device, || Ok(ClusteredAttention::cluster_layers(reading.layers_mut())?))?;
    model.layers_mut().zip(reading.layers()).for_each(|(layer, read)| layer.clone_from(read));
    println!("prompt of {} tokens: read in {took:.1} s, clustered in {clustering:.2} s", ids.len());
    Ok(first)
}

/// Goes on after the prompt, and prints the text as it comes.
fn write(tokenizer: &Tokenizer, first: u32, args: &Args, device: &Device, forward: &mut Forward) -> Result<Written> {
    let mut decoder = tokenizer.decode_stream(true);
    let show = |token| {
        print!("{}", decoder.step(token).map_err(anyhow::Error::msg)?.unwrap_or_default());
        Ok(stdout().flush()?)
    };
    let written = Written::new(first, args.written, steps(device, args.tokens, forward), show)?;
    println!();
    Ok(written)
}

/// Query heads that share a key head.
fn heads(gguf: &Content) -> Result<usize> {
    let size =
        |key: &str| anyhow::Ok(gguf.metadata.get(key).with_context(|| format!("the GGUF has no {key}"))?.to_u32()?);
    Ok((size("llama.attention.head_count")? / size("llama.attention.head_count_kv")?) as usize)
}

/// What one way of reading the cache came to.
struct Line {
    name: String,
    share: f64,
    rate: f64,
    agreement: f64,
    /// The first token that is not the full cache's.
    parts: Option<usize>,
}

impl Line {
    /// A row of a table in Markdown.
    fn print(&self) {
        let Self { name, share, rate, agreement, parts } = self;
        let parts = parts.map_or("-".into(), |parts| parts.to_string());
        let (share, agreement) = (100.0 * share, 100.0 * agreement);
        println!("| {name} | {share:.1} % | {rate:.1} | {agreement:.1} % | {parts} |");
    }
}
