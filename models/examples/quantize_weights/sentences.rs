//! Measures what the sentence embeddings of all-MiniLM-L6-v2 lose.

use crate::{
    methods::{By, Matrix, Method, Quantized},
    minilm::{sentences, MiniLm, BATCH},
    Args,
};
use anyhow::{ensure, Context, Result};
use candle_core::{quantized::GgmlDType, Device, Tensor};
use models::progress::progress;
use std::{collections::HashMap, fs, path::Path};

const METHODS: [Method; 16] = [
    Method::Rounded { bits: 2 },
    Method::Ggml(GgmlDType::Q2K),
    Method::Shared { bits: 2, outliers: 3, by: By::Square },
    Method::Residual { stages: 2, few: 16, by: By::Square },
    Method::Rounded { bits: 3 },
    Method::Ggml(GgmlDType::Q3K),
    Method::Shared { bits: 3, outliers: 3, by: By::Square },
    Method::Residual { stages: 3, few: 8, by: By::Square },
    Method::Rounded { bits: 4 },
    Method::Nf4 { group: 64 },
    Method::Nf4 { group: 32 },
    Method::Ggml(GgmlDType::Q4_0),
    Method::Ggml(GgmlDType::Q4K),
    Method::Own { bits: 4 },
    Method::Shared { bits: 4, outliers: 3, by: By::Square },
    Method::Residual { stages: 4, few: 8, by: By::Square },
];
const NEIGHBOURS: usize = 10;
/// Sentences, at most: Candle sorts so many similarities on any GPU.
const MOST: usize = 1000;

pub fn run(weights: &Path, args: &Args, device: &Device) -> Result<()> {
    let model = MiniLm::read(weights, device)?;
    let tensors = &model.weights;
    let text = &args.sentences;
    let text = fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
    let sentences = sentences(&text, MOST);
    ensure!(sentences.len() > NEIGHBOURS, "{} sentences, more than {NEIGHBOURS} are needed", sentences.len());

    let methods: Vec<Method> = METHODS.into_iter().filter(|method| args.wants(method)).collect();
    let bar = progress((1 + methods.len()) * sentences.len().div_ceil(BATCH), "batches")?;
    let similarities = |tensors: HashMap<String, Tensor>| {
        let embeddings = model.embed(tensors, &sentences, || bar.inc(1))?;
        anyhow::Ok(embeddings.matmul(&embeddings.t()?)?)
    };
    let exact = similarities(tensors.clone())?;
    let is_linear = |name: &str| name.starts_with("encoder.") && tensors[name].rank() == 2;
    let names: Vec<&String> = tensors.keys().filter(|name| is_linear(name)).collect();
    let matrices: Vec<_> = names.iter().map(|name| Matrix { weight: tensors[*name].clone(), hessian: None }).collect();
    bar.suspend(|| {
        println!("{} linear layers, {} sentences\n", matrices.len(), sentences.len());
        println!(
            "| | bits a weight | error of the weights | of a cosine | same {NEIGHBOURS} nearest | quantised in |\n|---|---|---|---|---|---|"
        );
    });
    for method in methods {
        let Quantized { weights, bits, error: off, seconds } = method.quantize(&matrices)?;
        let changed = names.iter().map(|name| name.to_string()).zip(weights);
        let found = similarities(tensors.clone().into_iter().chain(changed).collect())?;
        let error = (&found - &exact)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        let same = 100.0 * overlap(&nearest(&exact)?, &nearest(&found)?);
        let name = method.name();
        bar.suspend(|| println!("| {name} | {bits:.3} | {off:.4} | {error:.4} | {same:.1} % | {seconds:.1} s |"));
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
