//! Measures what the sentence embeddings of all-MiniLM-L6-v2 lose.

use crate::{
    methods::{shrunk, By, Matrix, Method, Quantized},
    minilm::{sentences, MiniLm, BATCH},
    Args,
};
use anyhow::{ensure, Context, Result};
use candle_core::{quantized::GgmlDType, Device, Tensor};
use models::progress::progress;
use std::{collections::HashMap, fs, path::Path};

const METHODS: [Method; 25] = [
    Method::Rounded { bits: 2 },
    Method::Ggml { dtype: GgmlDType::Q2K, by: By::Square },
    Method::Ggml { dtype: GgmlDType::Q2K, by: By::Importance },
    Method::Shared { bits: 2, outliers: 3, by: By::Square },
    Method::Shared { bits: 2, outliers: 3, by: By::Importance },
    Method::Shared { bits: 2, outliers: 3, by: By::Hessian },
    Method::Residual { stages: 2, few: 16, by: By::Square },
    Method::Rounded { bits: 3 },
    Method::Ggml { dtype: GgmlDType::Q3K, by: By::Square },
    Method::Ggml { dtype: GgmlDType::Q3K, by: By::Importance },
    Method::Shared { bits: 3, outliers: 3, by: By::Square },
    Method::Shared { bits: 3, outliers: 3, by: By::Importance },
    Method::Shared { bits: 3, outliers: 3, by: By::Hessian },
    Method::Residual { stages: 3, few: 8, by: By::Square },
    Method::Rounded { bits: 4 },
    Method::Nf4 { group: 64 },
    Method::Nf4 { group: 32 },
    Method::Ggml { dtype: GgmlDType::Q4_0, by: By::Square },
    Method::Ggml { dtype: GgmlDType::Q4K, by: By::Square },
    Method::Ggml { dtype: GgmlDType::Q4K, by: By::Importance },
    Method::Own { bits: 4 },
    Method::Shared { bits: 4, outliers: 3, by: By::Square },
    Method::Shared { bits: 4, outliers: 3, by: By::Importance },
    Method::Shared { bits: 4, outliers: 3, by: By::Hessian },
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

    let calibration = match &args.calibration {
        Some(text) => {
            let text = fs::read_to_string(text).with_context(|| format!("cannot read {}", text.display()))?;
            others(&text, &sentences)
        }
        None => vec![],
    };
    let wanted = |method: &Method| args.wants(method) && (method.by() == By::Square || !calibration.is_empty());
    let methods: Vec<Method> = METHODS.into_iter().filter(wanted).collect();
    let bar = progress((1 + methods.len()) * sentences.len().div_ceil(BATCH), "batches")?;
    let similarities = |tensors: HashMap<String, Tensor>| {
        let embeddings = model.embed(tensors, &sentences, || bar.inc(1))?;
        anyhow::Ok(embeddings.matmul(&embeddings.t()?)?)
    };
    let exact = similarities(tensors.clone())?;
    let is_linear = |name: &str| name.starts_with("encoder.") && tensors[name].rank() == 2;
    let names: Vec<&String> = tensors.keys().filter(|name| is_linear(name)).collect();
    let read = moments(&model, &sentences, &exact)?;
    let calibrated = if calibration.is_empty() { HashMap::new() } else { moments_of(&model, &calibration)?.0 };
    let matrix = |name: &&String| {
        let hessian = calibrated.get(*name).map(|moments| moments.hessian()).transpose()?;
        anyhow::Ok(Matrix { weight: tensors[*name].clone(), hessian })
    };
    let matrices = names.iter().map(matrix).collect::<Result<Vec<_>>>()?;
    bar.suspend(|| {
        let counts = [sentences.len(), calibration.len()];
        println!("{} linear layers, {} sentences, {} to calibrate by\n", matrices.len(), counts[0], counts[1]);
        println!(
            "| | bits a weight | error of the weights | of what layers put out | of a cosine | same {NEIGHBOURS} nearest | quantised in |\n|---|---|---|---|---|---|---|"
        );
    });
    for method in methods {
        let Quantized { weights, bits, error: off, seconds } = method.quantize(&matrices)?;
        let put_out = put_out_error(&names, &matrices, &weights, &read)?;
        let changed = names.iter().map(|name| name.to_string()).zip(weights);
        let found = similarities(tensors.clone().into_iter().chain(changed).collect())?;
        let error = (&found - &exact)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        let same = 100.0 * overlap(&nearest(&exact)?, &nearest(&found)?);
        let name = method.name();
        bar.suspend(|| {
            println!("| {name} | {bits:.3} | {off:.4} | {put_out:.4} | {error:.4} | {same:.1} % | {seconds:.1} s |")
        });
    }
    bar.finish_and_clear();
    Ok(())
}

/// Sentences of a text that are not among those that are scored, nor parts of them, nor they of it.
fn others(text: &str, scored: &[String]) -> Vec<String> {
    let apart =
        |sentence: &String| scored.iter().all(|s| !s.contains(sentence.as_str()) && !sentence.contains(s.as_str()));
    sentences(text, MOST).into_iter().filter(apart).collect()
}

/// What a linear layer reads of tokens.
struct Moments {
    /// (inputs, inputs): the sums of the products of its columns.
    products: Tensor,
    tokens: usize,
}

impl Moments {
    fn hessian(&self) -> Result<Tensor> {
        shrunk(&(&self.products / self.tokens as f64)?, self.tokens)
    }
}

/// By the name of each linear layer's weight, and the embeddings.
fn moments_of(model: &MiniLm, sentences: &[String]) -> Result<(HashMap<String, Moments>, Tensor)> {
    let mut all: HashMap<String, Moments> = HashMap::new();
    let embeddings = model.embed_watched(sentences, |name, x| {
        let (products, tokens) = (x.t()?.matmul(x)?, x.dim(0)?);
        let sums = match all.get(&name) {
            Some(before) => Moments { products: (&before.products + products)?, tokens: before.tokens + tokens },
            None => Moments { products, tokens },
        };
        all.insert(name, sums);
        Ok(())
    })?;
    Ok((all, embeddings))
}

/// The same of the sentences that are scored, whose similarities are known.
fn moments(model: &MiniLm, sentences: &[String], exact: &Tensor) -> Result<HashMap<String, Moments>> {
    let (moments, embeddings) = moments_of(model, sentences)?;
    let off = (embeddings.matmul(&embeddings.t()?)? - exact)?.abs()?.max_all()?.to_scalar::<f32>()?;
    ensure!(off < 1e-4, "the model that is watched is another: a similarity is off by {off}");
    Ok(moments)
}

/// The length of the errors of what all layers put out, each of what it reads in the model as it is, by that of what they put out.
fn put_out_error(
    names: &[&String],
    matrices: &[Matrix],
    changed: &[Tensor],
    read: &HashMap<String, Moments>,
) -> Result<f64> {
    let (mut off, mut all) = (0.0, 0.0);
    for ((name, matrix), changed) in names.iter().zip(matrices).zip(changed) {
        let moments = read.get(*name).with_context(|| format!("{name} reads nothing"))?;
        let squares =
            |w: &Tensor| anyhow::Ok(f64::from((w.matmul(&moments.products)? * w)?.sum_all()?.to_scalar::<f32>()?));
        off += squares(&(changed - &matrix.weight)?)?;
        all += squares(&matrix.weight)?;
    }
    Ok((off / all).sqrt())
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
