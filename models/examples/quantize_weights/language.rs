//! Measures what SmolLM2 loses.

use crate::{
    methods::{second_moments, By, Matrix, Method, Quantized},
    Args,
};
use anyhow::{ensure, Result};
use candle_core::{quantized::GgmlDType, Device, Tensor};
use candle_nn::Linear;
use indicatif::ProgressBar;
use models::{
    chart,
    progress::progress,
    score::Score,
    smollm2::{attend, SmolLm2},
};
use std::collections::{BTreeMap, HashMap};

/// Methods with codes of about so many bits.
fn methods(bits: usize) -> Vec<Method> {
    const EACH: [By; 3] = [By::Square, By::Importance, By::Hessian];
    let ggml = |dtype| Method::Ggml { dtype, by: By::Square };
    let weighted = |dtype| Method::Ggml { dtype, by: By::Importance };
    // Rounding to four bits is left out: the file's weights are integers of so many, which it would reproduce.
    let (others, few): (&[Method], usize) = match bits {
        2 => (&[Method::Rounded { bits: 2 }, ggml(GgmlDType::Q2K), weighted(GgmlDType::Q2K)], 16),
        3 => (&[Method::Rounded { bits: 3 }, ggml(GgmlDType::Q3K), weighted(GgmlDType::Q3K)], 8),
        _ => {
            let nf4 = |group| Method::Nf4 { group };
            let q4 = [ggml(GgmlDType::Q4_0), ggml(GgmlDType::Q4K), weighted(GgmlDType::Q4K)];
            (&[&[nf4(64), nf4(32)], q4.as_slice()].concat(), 8)
        }
    };
    let mut methods = others.to_vec();
    for by in EACH {
        // Without outliers beside NF4 in groups of 64.
        methods.extend((bits == 4).then_some(Method::Shared { bits, outliers: 0, by }));
        methods.push(Method::Shared { bits, outliers: 4, by });
    }
    methods.extend(EACH.map(|by| Method::Residual { stages: bits, few, by }));
    methods
}

pub fn run(args: &Args, device: &Device) -> Result<()> {
    let mut model = SmolLm2::load(&args.model, device)?;
    let all = model.dims.layers;
    ensure!((1..=all).contains(&args.layers), "--layers {}: from 1 to {all}", args.layers);
    ensure!(args.bits.iter().all(|bits| (2..=4).contains(bits)), "--bits {:?}: from 2 to 4", args.bits);
    ensure!(args.tokens > 1, "--tokens {}: there is nothing to predict", args.tokens);
    let ids = model.read(&args.text, args.tokens)?;
    let calibration = match &args.calibration {
        Some(text) => model.read(text, args.calibration_tokens)?,
        None => model.read(&args.text, args.tokens + args.calibration_tokens)?.split_off(args.tokens),
    };

    let methods: Vec<Method> =
        args.bits.iter().flat_map(|&bits| methods(bits)).filter(|method| args.wants(method)).collect();
    let bar = progress((2 + methods.len()) * all, "blocks")?;
    let matrices = matrices(&mut model, args.layers, &calibration, &bar)?;
    let exact = log_probabilities(&model, &ids, &bar)?;
    let weights: usize = matrices.iter().map(|matrix| matrix.weight.elem_count()).sum();
    let score = |found: &Tensor| Score::new(&exact, found, &ids[1..]);
    bar.suspend(|| {
        println!("{weights} weights of {} blocks; {} tokens of {}\n", args.layers, args.tokens, args.text.display());
        println!("| | bits a weight | error of the weights | divergence, nats a token | perplexity | quantised in |");
        println!("|---|---|---|---|---|---|");
    });
    let perplexity = score(&exact)?.perplexity;
    bar.suspend(|| println!("| as in the file | | | | {perplexity:.3} | |"));
    let mut lines: BTreeMap<&str, Vec<_>> = BTreeMap::new();
    for method in methods {
        let Quantized { weights, bits, error, seconds } = method.quantize(&matrices)?;
        let mut changed = model.clone();
        for ((_, _, linear), weight) in changed.linears_mut().zip(weights) {
            *linear = Linear::new(weight, None);
        }
        let Score { divergence, perplexity, .. } = score(&log_probabilities(&changed, &ids, &bar)?)?;
        let name = method.name();
        bar.suspend(|| {
            println!("| {name} | {bits:.3} | {error:.4} | {divergence:.4} | {perplexity:.3} | {seconds:.1} s |");
        });
        lines.entry(method.family()).or_default().push((bits, divergence));
    }
    bar.finish_and_clear();
    lines.values_mut().for_each(|points| points.sort_by(|a, b| a.0.total_cmp(&b.0)));
    let ticks = vec![2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0];
    let bits = chart::Axis { name: "bits a weight", ticks, label: |bits| format!("{bits:.1}") };
    let lines: Vec<_> = lines.into_iter().collect();
    chart::draw(&args.out, "What SmolLM2 loses to smaller weights", bits, "divergence, nats a token", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// The linear layers of the first blocks, with the second moments of what they read in a text.
fn matrices(model: &mut SmolLm2, layers: usize, ids: &[u32], bar: &ProgressBar) -> Result<Vec<Matrix>> {
    let mut hessians = HashMap::new();
    let attention = |_, heads: &_| {
        bar.inc(1);
        attend(heads)
    };
    model.forward_watched(ids, 0, attention, |block, input, xs| {
        if block < layers {
            hessians.insert((block, input), second_moments(xs)?);
        }
        Ok(())
    })?;
    let linears = model.linears_mut().take_while(|(block, ..)| *block < layers);
    let of = |(block, input, linear): (_, _, &mut Linear)| Matrix {
        weight: linear.weight().clone(),
        hessian: hessians.get(&(block, input)).cloned(),
    };
    Ok(linears.map(of).collect())
}

/// Of the tokens after the first.
fn log_probabilities(model: &SmolLm2, ids: &[u32], bar: &ProgressBar) -> Result<Tensor> {
    let hidden = model.forward(ids, 0, |_, heads| {
        bar.inc(1);
        attend(heads)
    })?;
    model.log_probabilities(&hidden.narrow(0, 0, ids.len() - 1)?)
}
