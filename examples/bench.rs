//! Times and checks one op, or a whole fit.
//!
//! `cargo run --release --example bench -- assign --n 100000 --k 256 --d 128 --check --json`

#[path = "common/memory.rs"]
mod memory;

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_flash_kmeans::{assign, testing, Init, KMeans, Metric};
use clap::{Parser, ValueEnum};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;
use rayon::prelude::*;
use serde_json::{json, Value};
use std::time::Instant;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Op {
    /// Labels of x against k of its rows.
    Assign,
    /// The update of a fit for random labels, the sort included.
    Update,
    /// A whole fit from k rows of x, never stopped early by `tol`.
    Fit,
    /// The same by a prepared fit, without the result's counts and inertia.
    Run,
    /// Every kernel that can assign, on a grid of shapes, beside the one that the plan chooses.
    Tune,
}

#[derive(Parser)]
#[command(about = "Times and checks one op, or a whole fit; one line a case")]
struct Args {
    op: Op,
    #[arg(long, default_value_t = 1)]
    b: usize,
    #[arg(long, default_value_t = 65536)]
    n: usize,
    #[arg(long, default_value_t = 256)]
    k: usize,
    #[arg(long, default_value_t = 64)]
    d: usize,
    /// f16, bf16, f32 or f64
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// squared_euclidean, cosine, dot or manhattan
    #[arg(long, default_value = "squared_euclidean", value_parser = metric)]
    metric: Metric,
    /// Iterations of a fit
    #[arg(long, default_value_t = 10)]
    iters: usize,
    /// normal, blobs, offset (blobs around 20), tight (small clusters far out), duplicates, or a .npy or .safetensors file
    #[arg(long, default_value = "normal")]
    data: String,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the rows of an update are labelled: uniform, or hot, with half of them in one cluster
    #[arg(long, default_value = "uniform")]
    labels: String,
    /// Give each row a weight between 0.5 and 1.5 in a fit
    #[arg(long)]
    weighted: bool,
    /// Use this assignment kernel wherever it can do the work; no fit runs on chip then
    #[arg(long)]
    kernel: Option<String>,
    /// Seconds that repeats may take
    #[arg(long, default_value_t = 10.0)]
    budget: f64,
    /// Timed repeats, of which the median is reported
    #[arg(long, default_value_t = 7)]
    reps: usize,
    /// Also compare with the f64 definition, and two runs with each other
    #[arg(long)]
    check: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn dtype(s: &str) -> Result<DType> {
    Ok(match s {
        "f16" => DType::F16,
        "bf16" => DType::BF16,
        "f32" => DType::F32,
        "f64" => DType::F64,
        _ => bail!("{s} is not f16, bf16, f32 or f64"),
    })
}

fn metric(s: &str) -> Result<Metric> {
    Metric::from_name(s).with_context(|| format!("{s} is not squared_euclidean, cosine, dot or manhattan"))
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = match args.device.as_str() {
        "cpu" => Device::Cpu,
        "cuda" => Device::new_cuda(0).context("--device cuda needs a GPU and a build with --features cuda")?,
        other => bail!("--device {other} is not cpu or cuda"),
    };
    memory::keep(&device)?;
    testing::force(args.kernel.clone().map(|name| &*name.leak()));
    if args.op == Op::Tune {
        return tune(&args, &device);
    }
    let x = data(&args, &device)?;
    let (b, n, d) = x.dims3()?;
    ensure!(args.k >= 1 && args.k <= n, "--k {} is outside 1..={n}", args.k);
    let start = KMeans::new(args.k).metric(args.metric).seed(args.seed).max_iters(0);
    let centroids = start.fit(&x)?.centroids;
    let mut fit =
        KMeans::new(args.k).metric(args.metric).init(Init::Given(centroids.clone())).max_iters(args.iters).tol(0.0);
    if args.weighted {
        let mut rng = ChaCha8Rng::seed_from_u64(!args.seed);
        let weights: Vec<f64> = (0..b * n).map(|_| rng.random_range(0.5..1.5)).collect();
        fit = fit.sample_weights(&Tensor::from_vec(weights, (b, n), &device)?);
    }
    let given_labels = match args.op {
        Op::Update => Some(random_labels(b, n, args.k, args.labels == "hot", args.seed).to_device(&device)?),
        _ => None,
    };
    let update = given_labels.as_ref().map(|_| testing::Update::new(&x, args.k)).transpose()?;
    let mut prepared = match args.op {
        Op::Run => Some(fit.clone().check_finite(false).prepare(x.shape(), x.dtype(), &device)?),
        _ => None,
    };

    // What is overwritten by the next call has to be kept for a comparison.
    let kept = |t: &Tensor| if args.check { t.copy() } else { Ok(t.clone()) };
    let mut iterations = 1.0;
    let mut run = || -> Result<Vec<Tensor>> {
        if let (Some(update), Some(labels)) = (&update, &given_labels) {
            return Ok(vec![kept(&update.run(labels)?)?]);
        }
        if let Some(prepared) = &mut prepared {
            iterations = args.iters as f64;
            prepared.run(&x)?;
            return Ok(vec![kept(prepared.labels())?, kept(prepared.centroids())?]);
        }
        Ok(match (args.op, &given_labels) {
            (Op::Fit, _) => {
                let fit = fit.fit(&x)?;
                iterations = fit.n_iter.flatten_all()?.max(0)?.to_scalar::<u32>()? as f64;
                vec![fit.labels, fit.centroids, fit.inertia]
            }
            _ => vec![assign(&x, &centroids, args.metric)?],
        })
    };
    run()?;
    device.synchronize()?;
    let mut ms: Vec<f64> = Vec::with_capacity(args.reps);
    let mut result = vec![];
    for _ in 0..args.reps.max(1) {
        let t = Instant::now();
        result = run()?;
        device.synchronize()?;
        ms.push(t.elapsed().as_secs_f64() * 1e3);
        if ms.iter().sum::<f64>() > args.budget * 1e3 {
            break;
        }
    }
    ms.sort_by(f64::total_cmp);
    let ms = ms[ms.len() / 2];
    let again = if args.check { Some(run()?) } else { None };

    let each = ms / iterations;
    let size = x.elem_count() as f64;
    let mut line = json!({
        "op": args.op.to_possible_value().map(|v| v.get_name().to_string()),
        "device": args.device, "b": b, "n": n, "k": args.k, "d": d,
        "dtype": args.dtype.as_str(), "metric": args.metric.name(), "data": args.data, "weighted": args.weighted, "ms": ms,
        "tflops": 2.0 * size * args.k as f64 / each / 1e9,
        "tbs": size * x.dtype().size_in_bytes() as f64 / each / 1e9,
        "plan": fit.plan(&x)?.to_string(),
    });
    if matches!(args.op, Op::Fit | Op::Run) {
        line["iters"] = json!(iterations);
        line["ms_per_iter"] = json!(each);
    }
    if let Some(again) = again {
        let same = result.iter().zip(&again).map(|(a, b)| same_bits(a, b)).collect::<Result<Vec<_>>>()?;
        line["reproducible"] = json!(same.into_iter().all(|s| s));
        let (wrong, regret, checked) = match (args.op, &given_labels) {
            (Op::Update, Some(labels)) => check_means(&x, labels, &result[0])?,
            (Op::Fit | Op::Run, _) => check_labels(&x, &result[1], &result[0], args.metric)?,
            _ => check_labels(&x, &centroids, &result[0], args.metric)?,
        };
        line["wrong"] = json!(wrong);
        line["max_regret"] = json!(regret);
        line["checked"] = json!(checked);
    }
    print(&line, args.json);
    Ok(())
}

fn print(line: &Value, as_json: bool) {
    match (as_json, line.as_object()) {
        (false, Some(fields)) => fields.iter().for_each(|(k, v)| println!("{k:>13}  {v}")),
        _ => println!("{line}"),
    }
}

/// `(b, n, d)`.
fn data(args: &Args, device: &Device) -> Result<Tensor> {
    let (b, n, d) = (args.b, args.n, args.d);
    // More normal numbers than a CPU should draw.
    if args.data == "normal" && device.is_cuda() && b * n * d >= 1 << 28 {
        device.set_seed(args.seed)?;
        let x = Tensor::zeros((b, n, d), args.dtype, device)?;
        let (all, part) = (x.reshape((b * n, d))?, (1 << 26) / d);
        for first in (0..b * n).step_by(part) {
            let rows = part.min(b * n - first);
            all.slice_set(&Tensor::randn(0f32, 1.0, (rows, d), device)?.to_dtype(args.dtype)?, 0, first)?;
        }
        return Ok(x);
    }
    Ok(data_on_cpu(args)?.to_device(device)?)
}

fn data_on_cpu(args: &Args) -> Result<Tensor> {
    let (b, n, d) = (args.b, args.n, args.d);
    if args.data.contains('.') {
        let x = match args.data.rsplit_once('.') {
            Some((_, "npy")) => Tensor::read_npy(&args.data)?,
            Some((_, "safetensors")) => {
                let mut all: Vec<_> = candle_core::safetensors::load(&args.data, &Device::Cpu)?.into_iter().collect();
                all.sort_by(|a, b| a.0.cmp(&b.0));
                all.into_iter()
                    .map(|(_, t)| t)
                    .find(|t| t.rank() >= 2)
                    .context("no tensor of two dimensions in the file")?
            }
            _ => bail!("--data {} is neither .npy nor .safetensors", args.data),
        };
        let (n, d) = (x.dims()[x.rank() - 2], x.dims()[x.rank() - 1]);
        return Ok(x.reshape(((), n, d))?.to_dtype(args.dtype)?);
    }
    let (centres, offset, apart, spread) = match args.data.as_str() {
        "normal" => (1, 0.0, 0.0, 1.0),
        "blobs" => (64, 0.0, 10.0, 1.0),
        "offset" => (64, 20.0, 1.0, 1.0),
        "tight" => (32, 1000.0, 100.0, 0.01),
        "duplicates" => (16.min(n), 3.0, 1.0, 0.0),
        other => bail!("--data {other} is not normal, blobs, offset, tight, duplicates or a file"),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let centres: Vec<f32> = (0..centres * d).map(|_| offset + apart * rng.sample::<f32, _>(StandardNormal)).collect();
    let mut rows = vec![0f32; b * n * d];
    rows.par_chunks_mut(d * 1024).enumerate().for_each(|(i, rows)| {
        let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
        rng.set_stream(i as u64 + 1);
        for row in rows.chunks_mut(d) {
            let centre = rng.random_range(0..centres.len() / d);
            for (v, c) in row.iter_mut().zip(&centres[centre * d..]) {
                *v = c + spread * rng.sample::<f32, _>(StandardNormal);
            }
        }
    });
    Ok(Tensor::from_vec(rows, (b, n, d), &Device::Cpu)?.to_dtype(args.dtype)?)
}

/// What the rules of the plan are made from: they should choose within 5 % of the best kernel at every shape.
fn tune(args: &Args, device: &Device) -> Result<()> {
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
            let x = Tensor::randn(0f32, 1.0, (b, n, d), device)?.to_dtype(args.dtype)?;
            let centroids = x.narrow(1, 0, k)?.contiguous()?;
            let mut ms = vec![];
            for kernel in testing::candidates(&x, k, args.metric)? {
                testing::force(Some(kernel));
                let run = || -> Result<f64> {
                    let t = Instant::now();
                    assign(&x, &centroids, args.metric)?;
                    device.synchronize()?;
                    Ok(t.elapsed().as_secs_f64() * 1e3)
                };
                run()?;
                let mut times = (0..args.reps.max(1)).map(|_| run()).collect::<Result<Vec<_>>>()?;
                times.sort_by(f64::total_cmp);
                ms.push((kernel, times[times.len() / 2]));
            }
            testing::force(None);
            let chosen = KMeans::new(k).metric(args.metric).plan(&x)?.assign;
            let of = |name: &str| ms.iter().find(|(kernel, _)| *kernel == name).map(|(_, ms)| *ms);
            let best = ms.iter().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min);
            let over_best = of(chosen).context("the plan chooses one of the candidates")? / best;
            (shapes, worst) = (shapes + 1, worst.max(over_best));
            let ms: serde_json::Map<String, Value> = ms.into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
            println!(
                "{}",
                json!({
                    "op": "tune", "device": args.device, "b": b, "n": n, "k": k, "d": d, "dtype": args.dtype.as_str(),
                    "metric": args.metric.name(), "ms": ms, "chosen": chosen, "over_best": over_best,
                })
            );
        }
    }
    eprintln!("{shapes} shapes; at worst the plan takes {worst:.2} times as long as the best kernel");
    Ok(())
}

fn random_labels(b: usize, n: usize, k: usize, hot: bool, seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(!seed);
    let mut label = |_| if hot && rng.random() { k as u32 / 2 } else { rng.random_range(0..k as u32) };
    let labels: Vec<u32> = (0..b * n).map(&mut label).collect();
    Tensor::from_vec(labels, (b, n), &Device::Cpu).expect("sizes agree")
}

fn same_bits(a: &Tensor, b: &Tensor) -> Result<bool> {
    let bits = |t: &Tensor| -> Result<Vec<u64>> {
        let t = t.flatten_all()?;
        Ok(match t.dtype() {
            DType::U32 => t.to_vec1::<u32>()?.into_iter().map(u64::from).collect(),
            // Widening keeps every bit of the narrower floats.
            _ => t.to_dtype(DType::F64)?.to_vec1::<f64>()?.into_iter().map(f64::to_bits).collect(),
        })
    };
    Ok(bits(a)? == bits(b)?)
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// Operations the f64 check may spend; larger cases check an even sample of rows.
const CHECK_BUDGET: f64 = 4e10;

/// Share of labels that are not the f64 argmin, the largest relative excess of their distances, and rows looked at.
fn check_labels(x: &Tensor, c: &Tensor, labels: &Tensor, metric: Metric) -> Result<(f64, f64, usize)> {
    let (b, n, d) = x.dims3()?;
    let k = c.dim(1)?;
    let take = ((CHECK_BUDGET / (b * k * d) as f64) as usize).clamp(16, n.max(16)).min(n);
    let rows: Vec<u32> = (0..take).map(|i| (i * n / take) as u32).collect();
    let index = Tensor::new(&rows[..], x.device())?;
    let (x, got) = (host(&x.index_select(&index, 1)?)?, host(&labels.index_select(&index, 1)?)?);
    let c = host(&c.transpose(1, 2)?)?; // (b, d, k): centroids side by side, each summed in the order of the columns
    let judge = |i: usize| {
        let (row, c) = (&x[i * d..][..d], &c[i / take * k * d..][..k * d]);
        let (mut sum, mut square) = (vec![0f64; k], vec![0f64; k]);
        for (x, c) in row.iter().zip(c.chunks_exact(k)) {
            for ((s, q), c) in sum.iter_mut().zip(&mut square).zip(c) {
                match metric {
                    Metric::SquaredEuclidean => *s += (x - c) * (x - c),
                    Metric::Manhattan => *s += (x - c).abs(),
                    _ => *s += x * c,
                }
                if metric == Metric::Cosine {
                    *q += c * c;
                }
            }
        }
        let norm = row.iter().fold(0.0, |s, v| s + v * v).sqrt();
        for (s, q) in sum.iter_mut().zip(square) {
            match metric {
                Metric::Dot => *s = -*s,
                Metric::Cosine => *s = if norm * q.sqrt() == 0.0 { 1.0 } else { 1.0 - *s / (norm * q.sqrt()) },
                _ => {}
            }
        }
        let best = (0..k).fold(0, |best, j| if sum[j] < sum[best] { j } else { best });
        let label = got[i] as usize;
        let regret = (sum[label] - sum[best]) / sum[best].abs().max(f64::MIN_POSITIVE);
        (label != best, if label == best { 0.0 } else { regret })
    };
    let judged: Vec<_> = (0..b * take).into_par_iter().map(judge).collect();
    let wrong = judged.iter().filter(|j| j.0).count() as f64 / judged.len() as f64;
    Ok((wrong, judged.iter().fold(0.0, |m, j| m.max(j.1)), judged.len()))
}

/// Share of mean components that are not the f64 mean to within one rounding, the largest relative error, and components.
fn check_means(x: &Tensor, labels: &Tensor, means: &Tensor) -> Result<(f64, f64, usize)> {
    let (b, n, d) = x.dims3()?;
    let k = means.dim(1)?;
    // Of a normal number, relatively, and of a subnormal.
    let (ulp, least) = match x.dtype() {
        DType::F16 => (2f64.powi(-10), 2f64.powi(-24)),
        DType::BF16 => (2f64.powi(-7), 2f64.powi(-133)),
        DType::F32 => (2f64.powi(-23), 2f64.powi(-149)),
        _ => (2f64.powi(-52), 0.0),
    };
    let (x, labels, means) = (host(x)?, host(labels)?, host(means)?);
    let (mut sums, mut sizes, mut counts) = (vec![0f64; b * k * d], vec![0f64; b * k * d], vec![0f64; b * k]);
    for i in 0..b * n {
        let to = i / n * k + labels[i] as usize;
        counts[to] += 1.0;
        for c in 0..d {
            sums[to * d + c] += x[i * d + c];
            sizes[to * d + c] += x[i * d + c].abs();
        }
    }
    let mut worst = 0f64;
    let mut wrong = 0;
    for (i, &got) in means.iter().enumerate() {
        let count = counts[i / d].max(1.0);
        let (mean, size) = (sums[i] / count, sizes[i] / count);
        // One rounding of the result, and the rounding of the f64 sum it is compared with.
        wrong += ((got - mean).abs() > ulp * mean.abs() + least + 2f64.powi(-50) * size * count.sqrt()) as usize;
        worst = worst.max((got - mean).abs() / mean.abs().max(f64::MIN_POSITIVE));
    }
    Ok((wrong as f64 / means.len() as f64, worst, means.len()))
}
