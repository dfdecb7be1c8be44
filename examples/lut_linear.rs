//! The time of linear layers whose weights are looked up, beside dense ones and Candle's Q4_0.
//!
//! ```text
//! cargo run --release --example lut_linear [-- --device cpu|cuda --sizes 576x576,1536x576,4096x4096 --rows 1,4,64]
//! ```
//! Each size is that of several layers with weights of their own, which are called in turns, as a model's are: what few layers hold would
//! lie in a cache. Dense weights are f32 on a CPU and f16 on a GPU. Printed are microseconds a layer, and the bits of a weight.

use anyhow::{Context, Result};
use candle_core::{
    quantized::{GgmlDType, QMatMul, QTensor},
    DType, Device, Module, Tensor,
};
use candle_flash_kmeans::nn::{LutConfig, LutLinear, LutWeights};
use candle_nn::Linear;
use clap::Parser;
use common::backend::Backend;
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

mod common {
    pub mod backend;
}

#[derive(Parser)]
#[command(about = "Layers of 2, 3 and 4 bits a weight, beside dense ones and Q4_0")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Outputs and inputs
    #[arg(long, value_delimiter = ',', default_values = ["576x576", "1536x576", "2048x2048"])]
    sizes: Vec<String>,
    /// Rows that are multiplied at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 64])]
    rows: Vec<usize>,
    /// Layers of a size
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Weights of a group, which share a scale
    #[arg(long, default_value_t = 64)]
    group: usize,
    /// Rounds of all layers, of which the fastest counts
    #[arg(long, default_value_t = 20)]
    rounds: usize,
}

/// What threads that wait for work are left to fall asleep.
const REST: Duration = Duration::from_millis(5);

type Layer = Box<dyn Module>;

/// Layers with one kind of weights.
struct Kind {
    name: String,
    bits: f64,
    /// The dtype of rows.
    takes: DType,
    layers: Vec<Layer>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, _) = args.device.open()?;
    let dense = if device.is_cuda() { DType::F16 } else { DType::F32 };
    println!("{:>12}  {:>5}  {:>22}  {:>10}  bits a weight", "size", "rows", "weights", "us a layer");
    for size in &args.sizes {
        let (outputs, inputs) = size.split_once('x').with_context(|| format!("{size} is not as 576x576"))?;
        let (outputs, inputs): (usize, usize) = (outputs.parse()?, inputs.parse()?);
        let weight = Tensor::randn(0f32, 0.02, (outputs, inputs), &Device::Cpu)?;
        let copies = |weight: &Tensor| {
            (0..args.layers).map(|_| Ok(weight.copy()?.to_device(&device)?)).collect::<Result<Vec<_>>>()
        };
        let linear = copies(&weight.to_dtype(dense)?)?.into_iter().map(|w| Box::new(Linear::new(w, None)) as Layer);
        let mut kinds = vec![Kind {
            name: format!("{dense:?}, Linear"),
            bits: 8.0 * dense.size_in_bytes() as f64,
            takes: dense,
            layers: linear.collect(),
        }];
        let q4 = copies(&weight)?
            .into_iter()
            .map(|w| Ok(Box::new(QMatMul::from_qtensor(QTensor::quantize(&w, GgmlDType::Q4_0)?)?) as Layer));
        let layers = q4.collect::<Result<_>>()?;
        kinds.push(Kind { name: "Q4_0, QMatMul".into(), bits: 4.5, takes: DType::F32, layers });
        for bits in [4, 3, 2] {
            let config = LutConfig { bits, group_size: args.group, ..LutConfig::default() };
            let weights = LutWeights::quantize(&weight, None, &config)?;
            let layers =
                (0..args.layers).map(|_| Ok(Box::new(LutLinear::new(weights.to_device(&device)?, None)?) as Layer));
            let (name, layers) = (format!("{bits} bits, LutLinear"), layers.collect::<Result<_>>()?);
            kinds.push(Kind { name, bits: weights.bits_per_weight(), takes: dense, layers });
        }
        for &rows in &args.rows {
            let x = Tensor::randn(0f32, 1.0, (rows, inputs), &device)?;
            let xs = kinds.iter().map(|kind| x.to_dtype(kind.takes)).collect::<candle_core::Result<Vec<_>>>()?;
            let mut least = vec![f64::INFINITY; kinds.len()];
            // In turns, so that whatever else the machine does slows all alike.
            for _ in 0..=args.rounds {
                for ((kind, x), least) in kinds.iter().zip(&xs).zip(&mut least) {
                    device.synchronize()?;
                    // Threads of the kind before wait for more work for a while, at full speed.
                    if device.is_cpu() {
                        sleep(REST);
                    }
                    let start = Instant::now();
                    for layer in &kind.layers {
                        layer.forward(x)?;
                    }
                    device.synchronize()?;
                    *least = least.min(start.elapsed().as_secs_f64() / args.layers as f64);
                }
            }
            for (Kind { name, bits, .. }, seconds) in kinds.iter().zip(least) {
                println!("{size:>12}  {rows:>5}  {name:>22}  {:>10.1}  {bits:.2}", seconds * 1e6);
            }
        }
    }
    Ok(())
}
