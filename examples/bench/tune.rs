//! Every kernel that can assign, on a grid of shapes.

use super::{name, Args};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, testing};
use serde_json::{json, Value};
use std::time::Instant;

/// The rules of the plan are made from this: they should choose within 5 % of the best kernel at every shape.
pub fn run(args: &Args, dtype: DType, device: &Device) -> Result<()> {
    let metric = args.metric.metric();
    let sizes = [
        (1, 1 << 20, 4096),
        (1, 1 << 18, 1024),
        (1, 1 << 20, 256),
        (32, 16384, 1024),
        (256, 4096, 256),
        (64, 2048, 64),
        (1, 4096, 64),
        (1, 300, 20),
    ];
    let (mut shapes, mut worst) = (0, 1.0f64);
    for d in [4, 16, 32, 64, 80, 96, 128, 256, 512, 768] {
        for (b, n, k) in sizes {
            let x = Tensor::randn(0f32, 1.0, (b, n, d), device)?.to_dtype(dtype)?;
            let centroids = x.narrow(1, 0, k)?.contiguous()?;
            let mut ms = vec![];
            for kernel in testing::candidates(&x, k, metric)? {
                testing::force(Some(kernel));
                let run = || -> Result<f64> {
                    let t = Instant::now();
                    assign(&x, &centroids, metric)?;
                    device.synchronize()?;
                    Ok(t.elapsed().as_secs_f64() * 1e3)
                };
                run()?;
                let mut times = (0..args.reps).map(|_| run()).collect::<Result<Vec<_>>>()?;
                times.sort_by(f64::total_cmp);
                ms.push((kernel, times[times.len() / 2]));
            }
            testing::force(None);
            let chosen = testing::chosen(&x, k, metric)?;
            let of = |name: &str| ms.iter().find(|(kernel, _)| *kernel == name).map(|(_, ms)| *ms);
            let best = ms.iter().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min);
            let over_best = of(chosen).context("the plan chooses one of the candidates")? / best;
            (shapes, worst) = (shapes + 1, worst.max(over_best));
            let ms: serde_json::Map<String, Value> = ms.into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
            println!(
                "{}",
                json!({
                    "op": "tune", "device": name(&args.device), "b": b, "n": n, "k": k, "d": d, "dtype": dtype.as_str(),
                    "metric": metric.name(), "ms": ms, "chosen": chosen, "over_best": over_best,
                })
            );
        }
    }
    eprintln!("{shapes} shapes; at worst the plan takes {worst:.2} times as long as the best kernel");
    Ok(())
}
