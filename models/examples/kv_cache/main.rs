//! SmolLM2-135M reads a part of its KV cache in every block, and says what that costs.
//!
//! ```text
//! cargo run --release -p models --example kv_cache -- --model SmolLM2-135M-Instruct.Q4_1.gguf [--passkey CASES]
//! ```
//! The prompt is read exactly. Then the model is scored on the tokens that follow, all at once, while every query reads of
//! the prompt four sinks, 64 recent tokens and a budget of others, which each method spends in its own way. With `--passkey`
//! it is asked for five digits hidden in the prompt instead.

use anyhow::{bail, ensure, Context, Result};
use candle_core::DType;
use candle_flash_kmeans::nn::{KvCodes, Rotation};
use clap::Parser;
use methods::{Grouping, Method, Prompt, RECENT, SINKS};
use models::{
    backend::Backend,
    chart,
    progress::progress,
    score::Score,
    smollm2::{Dims, SmolLm2},
    CODE,
};
use std::{fs, path::PathBuf};

mod methods;
mod passkey;

#[derive(Parser)]
#[command(about = "Perplexity and passkey recall of SmolLM2-135M when it reads a part of its KV cache")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to read; code depends on its context most
    #[arg(long, default_value = CODE)]
    text: PathBuf,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Tokens after it that are scored
    #[arg(long, default_value_t = 64)]
    scored: usize,
    /// Tokens that a query may read besides sinks and recent ones
    #[arg(long, value_delimiter = ',', default_values_t = [64, 128, 256, 512])]
    budgets: Vec<usize>,
    /// Tokens in a page, and in a cluster on average
    #[arg(long, default_value_t = 8)]
    group: usize,
    /// Most tokens of the prompt that are clustered together; of several, clusters of each are compared
    #[arg(long, value_delimiter = ',', default_values_t = [2048])]
    max_segment: Vec<usize>,
    /// Keep clustered tokens as codes, too: columns of a piece and bits of its code, of keys and of values, as 4x8,4x8; +shared has one table
    /// for all pieces, +random and +pca rotate rows, +lengths has lengths apart, as 1x4+shared+random,4x8+pca. As often as it is given
    #[arg(long, value_name = "KEYS,VALUES", value_parser = codes)]
    codes: Vec<Coding>,
    /// Ask for hidden digits in so many prompts instead
    #[arg(long, value_name = "CASES")]
    passkey: Option<usize>,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw divergence against share read
    #[arg(long, default_value = "kv_cache.svg")]
    out: PathBuf,
}

impl Args {
    fn grouping(&self) -> Grouping {
        Grouping { group: self.group, max_segment: self.max_segment[0] }
    }
}

/// Codes of clustered tokens, and what they are called.
#[derive(Clone)]
struct Coding {
    name: String,
    codes: KvCodes,
}

/// Columns, bits and options of keys and of values.
fn codes(text: &str) -> Result<Coding> {
    let of_rows = |text: &str| {
        let (pieces, options) = text.split_once('+').unwrap_or((text, ""));
        let (columns, bits) = pieces.split_once('x').with_context(|| format!("{pieces} is not as 4x8"))?;
        let (mut shared, mut lengths, mut rotation) = (false, false, Rotation::None);
        for option in options.split('+').filter(|option| !option.is_empty()) {
            match option {
                "shared" => shared = true,
                "lengths" => lengths = true,
                "random" => rotation = Rotation::Random { seed: 0 },
                "pca" => rotation = Rotation::Pca,
                _ => bail!("{option} is none of shared, lengths, random and pca"),
            }
        }
        Ok((columns.parse()?, bits.parse()?, [shared, lengths], rotation))
    };
    let (keys, values) = text.split_once(',').with_context(|| format!("{text} is not as 4x8,4x8"))?;
    let ((columns, bits, keys, rotation), (of_values, bits_of_values, values, turned)) =
        (of_rows(keys)?, of_rows(values)?);
    let codes = KvCodes::new().keys(columns, bits).values(of_values, bits_of_values);
    let codes = codes.shared(keys[0], values[0]).gains(keys[1], values[1]).rotation(rotation, turned);
    Ok(Coding { name: text.to_string(), codes })
}

fn main() -> Result<()> {
    let args = Args::parse();
    let near = SINKS + RECENT;
    ensure!(args.group > 0, "--group 0: a cluster has tokens");
    ensure!(args.max_segment.iter().all(|&most| most > 0), "--max-segment 0: a segment has tokens");
    ensure!(args.tokens >= near + args.group, "--tokens {}: at least {} are needed", args.tokens, near + args.group);
    ensure!(args.scored > 0, "--scored 0: there is nothing to measure");
    ensure!(args.budgets.iter().all(|&b| b >= args.group), "--budgets: a page has {} tokens", args.group);
    let (device, dtype) = args.device.open()?;
    let model = SmolLm2::load(&args.model, &device)?;
    let text = fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let ids = model.encode(&text)?;
    match args.passkey {
        Some(cases) => passkey::run(&model, &ids, &args, cases, dtype),
        None => score(&model, &ids, &args, dtype),
    }
}

fn score(model: &SmolLm2, ids: &[u32], args: &Args, dtype: DType) -> Result<()> {
    let (tokens, end) = (args.tokens, args.tokens + args.scored);
    ensure!(ids.len() > end, "{} has {} tokens, {} are needed", args.text.display(), ids.len(), end + 1);
    let bar = progress(model.dims.layers, "prompt")?;
    let mut prompt = Prompt::new(model, &ids[..tokens], args.grouping(), dtype, args.scored, &bar)?;
    bar.finish_and_clear();
    report(&prompt, model, tokens);

    let (follows, next) = (&ids[tokens..end], &ids[tokens + 1..end + 1]);
    let bar = progress(1 + Method::ALL.len() * args.budgets.len(), "scored")?;
    let full = prompt.follow(model, follows, Method::Full, 0)?;
    bar.inc(1);
    let reference = Score::new(&full, &full, next)?;
    let (mut lines, mut uncoded) = (vec![], vec![]);
    println!(
        "\n| tokens read | kB a head | method | KL to full attention | perplexity | top-1 agreement |\n|---|---|---|---|---|---|"
    );
    bar.suspend(|| {
        reference.print(&format!("all {tokens} | {:.1}", prompt.kilobytes(Method::Full, tokens)), Method::Full.name())
    });
    if args.max_segment.len() > 1 {
        for &most in &args.max_segment {
            let seconds = prompt.cluster_again(most)?;
            for &budget in &args.budgets {
                let method = Method::ClustersAndEstimate;
                let score = Score::new(&full, &prompt.follow(model, follows, method, budget)?, next)?;
                let read = format!(
                    "{budget}, at most {most} a segment ({seconds:.3} s) | {:.1}",
                    prompt.kilobytes(method, budget)
                );
                bar.suspend(|| score.print(&read, method.name()));
            }
        }
        bar.finish_and_clear();
        return Ok(());
    }
    for method in Method::ALL {
        let mut points = vec![];
        for &budget in &args.budgets {
            let predicted = prompt.follow(model, follows, method, budget)?;
            let score = Score::new(&full, &predicted, next)?;
            bar.inc(1);
            let read = format!("{SINKS} + {RECENT} + {budget} | {:.1}", prompt.kilobytes(method, budget));
            bar.suspend(|| score.print(&read, method.name()));
            points.push((budget as f64 / tokens as f64, score.divergence));
            uncoded.extend((method == Method::ClustersAndEstimate).then_some(predicted));
        }
        lines.push((method.name(), points));
    }
    bar.finish_and_clear();
    let Dims { key_heads, head_dim, .. } = model.dims;
    if !args.codes.is_empty() {
        println!("\n{} bytes a token and key head in f16", 4 * head_dim);
        println!(
            "| codes | bytes a token and key head | tokens read | KL of codes to clusters without | KL to full attention | perplexity |\n|---|---|---|---|---|---|"
        );
    }
    for Coding { name, codes } in &args.codes {
        prompt.code(codes)?;
        let bytes = prompt.coded_bytes(key_heads);
        for (&budget, uncoded) in args.budgets.iter().zip(&uncoded) {
            let predicted = prompt.follow(model, follows, Method::Codes, budget)?;
            let [own, all] = [uncoded, &full].map(|reference| Score::new(reference, &predicted, next));
            let (own, all) = (own?, all?);
            println!(
                "| {name} | {bytes:.1} | {budget} | {:.4} | {:.4} | {:.3} |",
                own.divergence, all.divergence, all.perplexity
            );
        }
    }
    let title = "What SmolLM2 loses by reading a part of its cache";
    let share = chart::Axis {
        name: "share of the prompt read by budget",
        ticks: vec![0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0],
        label: |share| format!("{} %", share * 100.0),
    };
    chart::draw(&args.out, title, share, "KL to full attention", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

fn report(prompt: &Prompt, model: &SmolLm2, tokens: usize) {
    let (prefill, clustering) = (prompt.prefill_seconds, prompt.clustering_seconds);
    let heads = model.dims.layers * model.dims.key_heads;
    println!("prompt of {tokens} tokens: {prefill:.3} s");
    println!("k-means of {heads} heads in one call: {clustering:.3} s, {:.1} % of it", 100.0 * clustering / prefill);
}
