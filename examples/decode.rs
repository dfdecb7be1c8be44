//! The time of one token's attention on a CPU: Candle's ops, and `ClusteredKvCache` with budgets from all tokens down.
//!
//! ```text
//! cargo run --release --example decode [-- --tokens 2048,32768 --budgets 1024,256,64 --dtypes f32,f16,bf16 --codes]
//! ```
//! The shapes are those of SmolLM2-135M (9 query heads, 3 key heads, 64 columns) and of an 8B model (32, 8, 128). Everything is called in
//! turns in one process, so that whatever else the machine does slows all alike, and the least of the milliseconds is
//! printed; in brackets those of all cores. Budgets are timed as they are asked for (`as asked`), and as they are by default, where all
//! tokens are read if that costs no more. With `--segments` the time of clustering all tokens at once is printed instead, for each number of
//! tokens that a segment may have at most.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::nn::{ClusteredKvCache, KvBudget, KvCodes};
use candle_nn::ops::softmax_last_dim;
use clap::Parser;
use std::time::Instant;

#[derive(Parser)]
#[command(about = "One token's attention on a CPU, by Candle's ops and by budgets of a clustered cache")]
struct Args {
    #[arg(long, value_delimiter = ',', default_values_t = [2048, 32_768])]
    tokens: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 256, 64])]
    budgets: Vec<usize>,
    #[arg(long, value_delimiter = ',', default_values = ["f32", "f16", "bf16"])]
    dtypes: Vec<String>,
    /// Query heads, key heads and columns, as 32x8x128
    #[arg(long, value_delimiter = ',', default_values = ["9x3x64", "32x8x128"])]
    heads: Vec<String>,
    /// Rounds of all calls
    #[arg(long, default_value_t = 30)]
    rounds: usize,
    /// Whether the query heads of a key head choose together
    #[arg(long)]
    shared: bool,
    /// Time a cache that keeps clustered tokens as codes, too
    #[arg(long)]
    codes: bool,
    /// Time how long all tokens take to cluster instead, so many at most together
    #[arg(long, value_delimiter = ',')]
    segments: Vec<usize>,
    /// Print one JSON line a case
    #[arg(long)]
    json: bool,
}

fn main() -> Result<()> {
    let args = Args::parse();
    for heads in &args.heads {
        let sizes = heads.split('x').map(str::parse).collect::<std::result::Result<Vec<usize>, _>>()?;
        let [q_heads, kv_heads, d] = sizes[..] else { anyhow::bail!("{heads} is not as 32x8x128") };
        for &n in &args.tokens {
            for dtype in &args.dtypes {
                let (name, dtype) = (format!("{heads}, {n} tokens, {dtype}"), dtype.parse()?);
                if args.segments.is_empty() {
                    Step::new([q_heads, kv_heads, n, d], dtype, args.codes)?.time(&args, &name)?;
                } else {
                    time_clustering(&args, [kv_heads, n, d], dtype, &name)?;
                }
            }
        }
    }
    Ok(())
}

/// The time in which a prompt of random keys is clustered.
fn time_clustering(args: &Args, [kv_heads, n, d]: [usize; 3], dtype: DType, name: &str) -> Result<()> {
    let random = || Tensor::randn(0f32, 1f32, (1, kv_heads, n, d), &Device::Cpu)?.to_dtype(dtype);
    let (keys, values) = (random()?, random()?);
    for &tokens in &args.segments {
        let mut least = [f64::INFINITY; 2];
        for _ in 0..args.rounds {
            let mut cache = ClusteredKvCache::new(n).max_segment(tokens);
            cache.append(&keys, &values)?;
            let (start, cpu) = (Instant::now(), cpu_seconds());
            cache.cluster()?;
            let took = [start.elapsed().as_secs_f64(), cpu_seconds() - cpu];
            least.iter_mut().zip(took).for_each(|(least, took)| *least = least.min(took * 1e3));
        }
        let [ms, cpu_ms] = least;
        if args.json {
            println!(
                r#"{{"case": "{name}", "most tokens of a segment": {tokens}, "ms": {ms:.1}, "cpu_ms": {cpu_ms:.1}}}"#
            );
        } else {
            println!("{name}, at most {tokens} a segment {ms:9.1} ms [{cpu_ms:9.1}]");
        }
    }
    Ok(())
}

/// A call that is timed.
type Call<'a> = Box<dyn Fn() -> Result<Tensor> + 'a>;

/// A cache, and the queries of the next token.
struct Step {
    q: Tensor,
    cache: ClusteredKvCache,
    /// The same tokens as codes.
    coded: Option<ClusteredKvCache>,
    scale: f64,
}

impl Step {
    fn new([q_heads, kv_heads, n, d]: [usize; 4], dtype: DType, codes: bool) -> Result<Self> {
        let random = |heads, n| Tensor::randn(0f32, 1f32, (1, heads, n, d), &Device::Cpu)?.to_dtype(dtype);
        // Too few passes and tokens for good clusters, but as many as a cache has.
        let mut cache = ClusteredKvCache::new(n).passes(1);
        let mut coded = codes.then(|| cache.clone().codes(KvCodes::new()));
        for start in (0..n).step_by(4096) {
            let n = (n - start).min(4096);
            let (keys, values) = (random(kv_heads, n)?, random(kv_heads, n)?);
            for cache in [Some(&mut cache), coded.as_mut()].into_iter().flatten() {
                cache.append(&keys, &values)?;
                cache.cluster()?;
            }
        }
        Ok(Self { q: random(q_heads, 1)?, cache, coded, scale: 1.0 / (d as f64).sqrt() })
    }

    /// Attention as models have it, which repeat the key heads.
    fn repeated(&self, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let group = self.q.dim(1)? / keys.dim(1)?;
        let repeat = |t: &Tensor| {
            let (b, heads, n, d) = t.dims4()?;
            Tensor::cat(&vec![t; group], 2)?.reshape((b, heads * group, n, d))
        };
        let scores = (self.q.matmul(&repeat(keys)?.t()?)? * self.scale)?;
        let weights = softmax_last_dim(&scores.to_dtype(DType::F32)?)?.to_dtype(keys.dtype())?;
        Ok(weights.matmul(&repeat(values)?)?)
    }

    /// The same with the query heads of a key head as rows of one product, which repeats nothing.
    fn grouped(&self, keys: &Tensor, values: &Tensor) -> Result<Tensor> {
        let (b, heads, _, d) = keys.dims4()?;
        let q = (self.q.reshape((b, heads, self.q.dim(1)? / heads, d))? * self.scale)?;
        let weights = softmax_last_dim(&q.matmul(&keys.t()?)?.to_dtype(DType::F32)?)?.to_dtype(keys.dtype())?;
        Ok(weights.matmul(values)?.reshape(self.q.shape())?)
    }

    fn time(&self, args: &Args, name: &str) -> Result<()> {
        let (keys, values) = (self.cache.k()?.expect("tokens"), self.cache.v()?.expect("tokens"));
        let all = KvBudget::new(usize::MAX);
        let attend = |budget| -> Call { Box::new(move || Ok(self.cache.attend(&self.q, self.scale, budget)?)) };
        let mut calls: Vec<(String, Call)> = vec![
            ("Candle, heads repeated".into(), Box::new(|| self.repeated(&keys, &values))),
            ("Candle, heads grouped".into(), Box::new(|| self.grouped(&keys, &values))),
            ("all".into(), attend(all)),
        ];
        for &tokens in &args.budgets {
            let budget = KvBudget::new(tokens).shared(args.shared);
            calls.push((format!("{tokens} as asked"), attend(budget.dense_if_cheaper(false))));
            calls.push((tokens.to_string(), attend(budget)));
            if let Some(coded) = &self.coded {
                let of_codes = move || Ok(coded.attend(&self.q, self.scale, budget)?);
                calls.push((format!("{tokens} of codes"), Box::new(of_codes)));
            }
        }
        // Rounded weights and scores put the halves this far apart.
        let apart = (calls[0].1()? - calls[2].1()?)?.to_dtype(DType::F32)?.abs()?.flatten_all()?.max(D::Minus1)?;
        anyhow::ensure!(apart.to_scalar::<f32>()? < 1e-2, "{name}: {apart} from Candle's ops");

        let mut least = vec![[f64::INFINITY; 2]; calls.len()];
        for _ in 0..args.rounds {
            for ((_, call), least) in calls.iter().zip(&mut least) {
                let (start, cpu) = (Instant::now(), cpu_seconds());
                call()?;
                let took = [start.elapsed().as_secs_f64(), cpu_seconds() - cpu];
                least.iter_mut().zip(took).for_each(|(least, took)| *least = least.min(took * 1e3));
            }
        }
        if !args.json {
            println!("{name}");
        }
        for ((call, _), [ms, cpu_ms]) in calls.iter().zip(&least) {
            let times = least[1][0] / ms;
            if args.json {
                println!(r#"{{"case": "{name}", "call": "{call}", "ms": {ms:.4}, "cpu_ms": {cpu_ms:.4}}}"#);
            } else {
                println!("  {call:24} {ms:9.3} ms [{cpu_ms:9.3}] {times:6.1}x");
            }
        }
        Ok(())
    }
}

/// Seconds that all threads of this process have run.
fn cpu_seconds() -> f64 {
    #[cfg(unix)]
    {
        // SAFETY: plain integers, of which zeros are some.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is written to and outlives the call.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
        seconds(usage.ru_utime) + seconds(usage.ru_stime)
    }
    #[cfg(not(unix))]
    f64::NAN
}
