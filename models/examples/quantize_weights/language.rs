//! Measures what SmolLM2 loses.

use crate::{
    methods::{Matrix, Method},
    Args,
};
use anyhow::{ensure, Result};
use candle_core::Device;
use candle_nn::Linear;
use indicatif::ProgressBar;
use models::{
    chart,
    progress::progress,
    smollm2::{attend, SmolLm2},
};
use std::collections::HashMap;

/// Rounding to them is left out: the file's weights are integers of so many bits, which it would reproduce.
const BITS_OF_THE_FILE: usize = 4;

pub fn run(args: &Args, device: &Device) -> Result<()> {
    let mut model = SmolLm2::load(&args.model, device)?;
    let all = model.dims.layers;
    ensure!((1..=all).contains(&args.layers), "--layers {}: from 1 to {all}", args.layers);
    ensure!(args.tokens > 1, "--tokens {}: there is nothing to predict", args.tokens);
    let (ids, calibration) = (model.read(&args.text, args.tokens)?, model.read(&args.calibration, args.tokens)?);

    let mut methods = vec![];
    for &entries in &args.levels {
        ensure!(entries >= 2 && entries.is_power_of_two(), "--levels {entries}: a power of two is needed");
        let bits = entries.ilog2() as usize;
        methods.extend((bits != BITS_OF_THE_FILE).then_some(Method::Rounded { bits }));
        methods.extend([false, true].map(|weighted| Method::Table { entries, weighted }));
    }
    let bar = progress((2 + methods.len()) * all, "blocks")?;
    let matrices = matrices(&mut model, args.layers, &calibration, &bar)?;
    let exact = loss(&model, &ids, &bar)?;
    let weights: usize = matrices.iter().map(|matrix| matrix.weight.elem_count()).sum();
    bar.suspend(|| {
        println!("{weights} weights of {} blocks; {} tokens of {}\n", args.layers, args.tokens, args.text.display());
        println!("| | bits a weight | loss, nats a token | perplexity | clustered in |\n|---|---|---|---|---|");
        println!("| as in the file | | | {:.3} | |", exact.exp());
    });
    let mut lines: [Vec<_>; 3] = Default::default();
    for method in methods {
        let quantized = method.quantize(&matrices)?;
        let time = quantized.clustered_in();
        let mut changed = model.clone();
        for ((_, _, linear), weight) in changed.linears_mut().zip(quantized.weights) {
            *linear = Linear::new(weight, None);
        }
        let loss = loss(&changed, &ids, &bar)?;
        let (name, bits, lost) = (method.name(), quantized.bits, loss - exact);
        bar.suspend(|| println!("| {name} | {bits:.2} | {lost:+.3} | {:.3} | {time} |", loss.exp()));
        let line = match method {
            Method::Table { weighted: true, .. } => 2,
            Method::Table { weighted: false, .. } => 1,
            _ => 0,
        };
        lines[line].push((bits, loss.exp()));
    }
    bar.finish_and_clear();
    let names = ["rounded", "levels of each row", "levels of each row, weighted"];
    let lines: Vec<_> = names.into_iter().zip(lines).collect();
    let ticks = vec![2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0];
    let bits = chart::Axis { name: "bits a weight", ticks, label: |bits| format!("{bits:.1}") };
    chart::draw(&args.out, "What SmolLM2 loses to smaller weights", bits, "perplexity", &lines)?;
    println!("\n{}", args.out.display());
    Ok(())
}

/// The linear layers of the first blocks, with the mean square of what they read in a text.
fn matrices(model: &mut SmolLm2, layers: usize, ids: &[u32], bar: &ProgressBar) -> Result<Vec<Matrix>> {
    let mut squares = HashMap::new();
    let attention = |_, heads: &_| {
        bar.inc(1);
        attend(heads)
    };
    model.forward_watched(ids, 0, attention, |block, input, xs| {
        squares.insert((block, input), xs.sqr()?.mean(0)?);
        Ok(())
    })?;
    let linears = model.linears_mut().take_while(|(block, ..)| *block < layers);
    let of = |(block, input, linear): (_, _, &mut Linear)| Matrix {
        weight: linear.weight().clone(),
        importance: squares.get(&(block, input)).cloned(),
    };
    Ok(linears.map(of).collect())
}

fn loss(model: &SmolLm2, ids: &[u32], bar: &ProgressBar) -> Result<f64> {
    let hidden = model.forward(ids, 0, |_, heads| {
        bar.inc(1);
        attend(heads)
    })?;
    model.loss(&hidden, ids)
}
