//! Measures what the sentence embeddings of all-MiniLM-L6-v2 lose.

use crate::{
    methods::{Matrix, Method},
    minilm::{sentences, MiniLm, BATCH},
};
use anyhow::{ensure, Context, Result};
use candle_core::{Device, Tensor};
use models::progress::progress;
use std::{collections::HashMap, fs, path::Path};

/// These weights are not quantised yet, so that four bits are a fair measure.
const METHODS: [Method; 4] = [
    Method::Rounded { bits: 4 },
    Method::Nf4,
    Method::Row { entries: 16 },
    Method::Table { entries: 16, weighted: false },
];
const NEIGHBOURS: usize = 10;
/// Sentences, at most: Candle sorts so many similarities on any GPU.
const MOST: usize = 1000;

pub fn run(weights: &Path, text: &Path, device: &Device) -> Result<()> {
    let model = MiniLm::read(weights, device)?;
    let tensors = &model.weights;
    let text = fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
    let sentences = sentences(&text, MOST);
    ensure!(sentences.len() > NEIGHBOURS, "{} sentences, more than {NEIGHBOURS} are needed", sentences.len());

    let bar = progress((1 + METHODS.len()) * sentences.len().div_ceil(BATCH), "batches")?;
    let similarities = |tensors: HashMap<String, Tensor>| {
        let embeddings = model.embed(tensors, &sentences, || bar.inc(1))?;
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
