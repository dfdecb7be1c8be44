//! SmolLM2-135M reads its prompt in chunks whose queries attend to a part of the keys before them, and says what that costs.
//!
//! ```text
//! cargo run --release -p models --example routed_attention -- --model SmolLM2-135M-Instruct.Q4_1.gguf
//! ```
//! Every chunk sees itself, four sinks and the 64 tokens before it as they are. Of the others, each group of its queries reads
//! a share, which each method chooses in its own way. The tokens of the last chunk are scored.

use anyhow::{ensure, Result};
use candle_core::{DType, Tensor};
use candle_flash_kmeans::nn::{Grouping, KeyBudget, RoutedAttention};
use candle_nn::kv_cache::KvCache;
use clap::Parser;
use models::{backend::Backend, chart, progress::progress, score::Score, smollm2::SmolLm2, CODE};
use std::path::PathBuf;

/// Keys in a group on average, and queries.
const KEYS: usize = 16;
const QUERIES: usize = 16;

#[derive(Parser)]
#[command(about = "What SmolLM2-135M loses when the chunks of its prompt attend to a part of the keys before them")]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf
    #[arg(long, default_value = "SmolLM2-135M-Instruct.Q4_1.gguf")]
    model: PathBuf,
    /// The text to read; code depends on its context most
    #[arg(long, default_value = CODE)]
    text: PathBuf,
    /// Tokens before the last chunk
    #[arg(long, default_value_t = 1024)]
    tokens: usize,
    /// Tokens of a chunk
    #[arg(long, default_value_t = 256)]
    chunk: usize,
    /// Shares of the keys that are read
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.2])]
    shares: Vec<f64>,
    /// Route every chunk, and not the last one alone
    #[arg(long)]
    all_chunks: bool,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw divergence against share read
    #[arg(long, default_value = "routed_attention.svg")]
    out: PathBuf,
}

/// How the queries and the keys of a chunk are grouped, and whether means stand in for what is not read.
#[derive(Clone, Copy)]
struct Method {
    name: &'static str,
    queries: Grouping,
    keys: Grouping,
    estimate: bool,
    /// No later query has a say in what a query reads.
    causal_choice: bool,
}

impl Method {
    const fn new(name: &'static str, queries: Grouping, keys: Grouping, estimate: bool) -> Self {
        Self { name, queries, keys, estimate, causal_choice: false }
    }

    /// Blocks of so many queries, for which queries up to their first choose among clusters.
    const fn causal(name: &'static str, queries: usize) -> Self {
        let (queries, keys) = (Grouping::Blocks(queries), Grouping::Clusters(KEYS));
        Self { name, queries, keys, estimate: true, causal_choice: true }
    }

    const ALL: [Self; 8] = [
        Self::new("clusters + estimate", Grouping::Clusters(QUERIES), Grouping::Clusters(KEYS), true),
        Self::new("clusters", Grouping::Clusters(QUERIES), Grouping::Clusters(KEYS), false),
        Self::causal("causal choice by query + estimate", 1),
        Self::causal("causal choice by block + estimate", QUERIES),
        Self::new("query blocks, key clusters + estimate", Grouping::Blocks(QUERIES), Grouping::Clusters(KEYS), true),
        Self::new("blocks + estimate", Grouping::Blocks(QUERIES), Grouping::Blocks(KEYS), true),
        Self::new("blocks", Grouping::Blocks(QUERIES), Grouping::Blocks(KEYS), false),
        Self::new("random groups", Grouping::Blocks(QUERIES), Grouping::Random(KEYS), false),
    ];

    fn attention(&self, read: KeyBudget) -> RoutedAttention {
        let attention = RoutedAttention::new(read).queries(self.queries).keys(self.keys).estimate(self.estimate);
        attention.causal_choice(self.causal_choice)
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.chunk > 0, "--chunk 0: there is nothing to read");
    ensure!(args.shares.iter().all(|s| (0.0..=1.0).contains(s)), "--shares {:?}: must be in 0..=1", args.shares);
    let (device, dtype) = args.device.open()?;
    let model = SmolLm2::load(&args.model, &device)?;
    let total = args.tokens + args.chunk;
    let ids = model.read(&args.text, total + 1)?;
    let (prompt, last, next) = (&ids[..args.tokens], &ids[args.tokens..total], &ids[args.tokens + 1..total + 1]);

    let bar = progress(1 + Method::ALL.len() * args.shares.len(), "scored")?;
    // Nothing is routed where all tokens are recent.
    let everything = || RoutedAttention::new(KeyBudget::Share(1.0)).recent(total);
    let mut exact = Chunks::new(&model, total, dtype, everything);
    exact.read(prompt, args.chunk)?;
    let full = exact.then(everything).predict(last, args.chunk)?;
    bar.inc(1);
    println!("| share read | method | KL to full attention | perplexity | top-1 agreement |\n|---|---|---|---|---|");
    let score = Score::new(&full, &full, next)?;
    bar.suspend(|| score.print("all", "full attention"));
    let mut lines = vec![];
    for method in Method::ALL {
        let mut points = vec![];
        for &share in &args.shares {
            let attention = || method.attention(KeyBudget::Share(share));
            let mut routed = exact.then(attention);
            if args.all_chunks {
                routed = Chunks::new(&model, total, dtype, attention);
                routed.read(prompt, args.chunk)?;
            }
            let score = Score::new(&full, &routed.predict(last, args.chunk)?, next)?;
            bar.inc(1);
            bar.suspend(|| score.print(&format!("{:.0} %", 100.0 * share), method.name));
            points.push((share, score.divergence));
        }
        lines.push((method.name, points));
    }
    bar.finish_and_clear();
    let title = "What SmolLM2 loses by attending to a part of its prompt";
    let share = chart::Axis {
        name: "share of the keys read",
        ticks: vec![0.02, 0.05, 0.1, 0.2, 0.5],
        label: |share| format!("{} %", share * 100.0),
    };
    chart::draw(&args.out, title, share, "KL to full attention", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// A text that is read chunk by chunk.
struct Chunks<'a> {
    model: &'a SmolLm2,
    dtype: DType,
    past: usize,
    /// Of every block.
    caches: Vec<KvCache>,
    attention: Vec<RoutedAttention>,
}

impl<'a> Chunks<'a> {
    fn new(model: &'a SmolLm2, room: usize, dtype: DType, attention: impl Fn() -> RoutedAttention) -> Self {
        let caches = (0..model.dims.layers).map(|_| KvCache::new(2, room)).collect();
        let attention = (0..model.dims.layers).map(|_| attention()).collect();
        Self { model, dtype, past: 0, caches, attention }
    }

    /// Goes on from what has been read with another attention. Either overwrites what the other reads next.
    fn then(&self, attention: impl Fn() -> RoutedAttention) -> Self {
        let attention = self.attention.iter().map(|_| attention()).collect();
        Self { model: self.model, dtype: self.dtype, past: self.past, caches: self.caches.clone(), attention }
    }

    /// Hidden states (tokens, width) after each of `ids`.
    fn read(&mut self, ids: &[u32], chunk: usize) -> Result<Tensor> {
        let (caches, attention, dtype) = (&mut self.caches, &mut self.attention, self.dtype);
        let mut hidden = vec![];
        for ids in ids.chunks(chunk) {
            hidden.push(self.model.forward(ids, self.past, |block, heads| {
                let of = |t: &Tensor| t.unsqueeze(0)?.to_dtype(dtype);
                let (queries, scale) = (of(&heads.queries.flatten(0, 1)?)?, 1.0 / (heads.keys.dim(2)? as f64).sqrt());
                let (keys, values) = caches[block].append(&of(&heads.keys)?, &of(&heads.values)?)?;
                let output = attention[block].forward_causal(&queries, &keys, &values, scale)?;
                let (_, heads, tokens, dim) = output.dims4()?;
                Ok(output.to_dtype(DType::F32)?.squeeze(0)?.transpose(0, 1)?.reshape((tokens, heads * dim))?)
            })?);
            self.past += ids.len();
        }
        Ok(Tensor::cat(&hidden, 0)?)
    }

    /// The logarithms of the next tokens' probabilities (tokens, vocabulary) after each of `ids`.
    fn predict(&mut self, ids: &[u32], chunk: usize) -> Result<Tensor> {
        let hidden = self.read(ids, chunk)?;
        self.model.log_probabilities(&hidden)
    }
}
