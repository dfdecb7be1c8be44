//! Reads a part of a KV cache, chosen by clusters of its keys, and measures what attention loses.
//!
//! ```text
//! cargo run --release --example quickstart [--device cpu|cuda] [--out quickstart.svg]
//! ```
//! The queries, keys and values are SmolLM2-135M's own (`assets/README.md`). The keys of all heads are clustered in one
//! call, on their device. Then every query reads four sink tokens, the recent ones, and a budget of the tokens before
//! them, which each method spends in its own way.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::{cluster_means, sort_by_cluster, KMeans};
use candle_nn::ops::softmax_last_dim;
use clap::Parser;
use common::backend::Backend;
use common::cache::{Cache, TEXTS};
use common::chart;
use common::timing::{ms, timed};
use rand::{seq::SliceRandom, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::PathBuf;

mod common {
    pub mod backend;
    pub mod cache;
    pub mod chart;
    pub mod timing;
}

/// Tokens in a page, and in a cluster on average.
const GROUP: usize = 16;
/// Enough here: after 25 passes the error is 2 % smaller.
const PASSES: usize = 4;
/// Tokens that a query may read besides the near ones.
const BUDGETS: [usize; 5] = [64, 128, 256, 512, 1024];
const TIMED_BUDGET: usize = 128;
const METHODS: [&str; 6] = ["clusters + estimate", "clusters", "pages + estimate", "pages", "recent", "random"];

#[derive(Parser)]
#[command(about = "Attention that reads a part of the KV cache, chosen by clusters of its keys")]
struct Args {
    #[arg(long, default_value = "cpu")]
    device: Backend,
    /// Where to draw error against share read
    #[arg(long, default_value = "quickstart.svg")]
    out: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (device, dtype) = args.device.open()?;
    let cache = Cache::load(&device)?;
    let (heads, tokens, _) = cache.keys.dims3()?;
    let keys = cache.keys.to_dtype(dtype)?;
    let k = tokens.div_ceil(GROUP);

    let kmeans = KMeans::new(k).max_iters(PASSES);
    let (fit, seconds) = timed(&device, || Ok(kmeans.fit(&keys)?))?;
    println!("k-means of {heads} heads x {tokens} keys into {k} clusters, {PASSES} passes: {}", ms(seconds));
    let clusters = Groups::new(&cache, &fit.labels, k)?;
    time_one_token(&cache, &clusters)?;

    let page = Tensor::from_iter((0..tokens).map(|token| (token / GROUP) as u32), &device)?;
    let pages = Groups::new(&cache, &page.broadcast_as((heads, tokens))?.contiguous()?, k)?;
    let errors = errors(&cache, &clusters, &pages)?;
    let both = std::array::from_fn(|m| std::array::from_fn(|i| (errors[0][m][i] + errors[1][m][i]) / 2.0));
    println!("\nrelative error of the attention output, by share of the {tokens} tokens read\n");
    for (text, errors) in TEXTS.iter().chain(&["both"]).zip(errors.iter().chain(&[both])) {
        print_table(text, errors, tokens);
    }
    println!("Ranking also reads the groups' mean keys, 1/{} of the cache; the estimate, as many values.\n", 2 * GROUP);

    let lines: Vec<_> = METHODS.iter().zip(&both).map(|(method, row)| (*method, points(row, tokens))).collect();
    chart::draw(
        &args.out,
        "What attention loses by reading a part of its cache",
        chart::Axis {
            name: "share of tokens read",
            ticks: BUDGETS.iter().map(|&budget| budget as f64 / tokens as f64).collect(),
            label: |share| format!("{:.1} %", share * 100.0),
        },
        "relative error",
        &lines,
    )?;
    println!("{}", args.out.display());
    Ok(())
}

/// Tokens in groups, clusters or pages alike.
struct Groups {
    /// (heads, tokens)
    labels: Tensor,
    /// (heads, tokens): the tokens group by group
    order: Tensor,
    /// (heads, k): where a group starts in `order`, and its size
    starts: Tensor,
    sizes: Tensor,
    /// (heads, k, dim)
    mean_keys: Tensor,
    mean_values: Tensor,
}

/// The groups as queries rank them, by the score of the mean key.
struct Ranking {
    /// (heads, rows, k): in the order of the groups
    scores: Tensor,
    /// (heads, rows, k): the groups, best first, and how many tokens come before each
    ranked: Tensor,
    before: Tensor,
}

impl Groups {
    fn new(cache: &Cache, labels: &Tensor, k: usize) -> Result<Self> {
        let (order, offsets) = sort_by_cluster(labels, k)?;
        let offsets = offsets.to_dtype(DType::F32)?;
        let starts = offsets.narrow(1, 0, k)?.contiguous()?;
        let sizes = (offsets.narrow(1, 1, k)? - &starts)?;
        let mean_keys = cluster_means(&cache.keys, labels, k)?;
        let mean_values = cluster_means(&cache.values, labels, k)?;
        Ok(Self { labels: labels.clone(), order, starts, sizes, mean_keys, mean_values })
    }

    fn rank(&self, queries: &Tensor) -> Result<Ranking> {
        let scores = queries.matmul(&self.mean_keys.transpose(1, 2)?)?;
        let ranked = scores.arg_sort_last_dim(false)?;
        let sizes = ranked_as(&self.sizes, &ranked)?;
        Ok(Ranking { before: (sizes.cumsum(2)? - sizes)?, scores, ranked })
    }

    /// (heads, rows, tokens): the slot in which a row reads each token, and (heads, rows, k): that of a group's first.
    fn slots(&self, ranking: &Ranking) -> Result<(Tensor, Tensor)> {
        // Sorting a permutation inverts it.
        let first = ranking.before.gather(&ranking.ranked.arg_sort_last_dim(true)?, 2)?;
        let place =
            (self.order.arg_sort_last_dim(true)?.to_dtype(DType::F32)? - self.starts.gather(&self.labels, 1)?)?;
        let (heads, rows, _) = first.dims3()?;
        let label = self.labels.unsqueeze(1)?.broadcast_as((heads, rows, self.labels.dim(1)?))?.contiguous()?;
        Ok((first.gather(&label, 2)?.broadcast_add(&place.unsqueeze(1)?)?, first))
    }
}

/// (heads, rows, k): numbers of the groups, (heads, k), in the order of each row.
fn ranked_as(numbers: &Tensor, ranked: &Tensor) -> Result<Tensor> {
    Ok(numbers.unsqueeze(1)?.broadcast_as(ranked.shape())?.contiguous()?.gather(ranked, 2)?)
}

/// Attention as two sums: of weighted values and of weights. Parts of a cache add up.
struct Sums {
    values: Tensor,
    weights: Tensor,
}

impl Sums {
    fn new(weights: &Tensor, values: &Tensor) -> Result<Self> {
        Ok(Self { values: weights.matmul(values)?, weights: weights.sum_keepdim(D::Minus1)? })
    }

    fn add(&self, other: &Self) -> Result<Self> {
        Ok(Self { values: (&self.values + &other.values)?, weights: (&self.weights + &other.weights)? })
    }

    fn output(&self) -> Result<Tensor> {
        Ok(self.values.broadcast_div(&self.weights)?)
    }
}

/// Mean squared relative error of the attention output, by method (in the order of `METHODS`) and budget.
type Errors = [[f64; BUDGETS.len()]; METHODS.len()];

/// Errors against attention to the whole cache, one table a text.
fn errors(cache: &Cache, clusters: &Groups, pages: &Groups) -> Result<[Errors; 2]> {
    let (heads, tokens, _) = cache.keys.dims3()?;
    let heads_per_text = heads / TEXTS.len();
    let device = cache.keys.device();
    let ranked = |groups| -> Result<_> {
        let ranking = Groups::rank(groups, &cache.queries)?;
        let (slots, first) = groups.slots(&ranking)?;
        Ok((groups, ranking, slots, first))
    };
    let (clusters, pages) = (ranked(clusters)?, ranked(pages)?);
    let mut errors = [Errors::default(); 2];
    for head in 0..heads {
        let queries = cache.queries.get(head)?;
        let near = queries.matmul(&cache.near_keys.get(head)?.t()?)?.broadcast_add(&cache.near_mask)?;
        let far = queries.matmul(&cache.keys.get(head)?.t()?)?;
        // One peak for all parts. A mean key scores at most what its best member does, so nothing overflows.
        let peak = near.max_keepdim(1)?.maximum(&far.max_keepdim(1)?)?;
        let weigh = |scores: &Tensor| scores.broadcast_sub(&peak)?.exp();
        let (far, values) = (weigh(&far)?, cache.values.get(head)?);
        let near = Sums::new(&weigh(&near)?, &cache.near_values.get(head)?)?;
        let full = near.add(&Sums::new(&far, &values)?)?.output()?;

        let measure = |slots: &Tensor, rest: &dyn Fn(f64) -> Result<Option<Sums>>| {
            let mut row = [0.0; BUDGETS.len()];
            for (error, budget) in row.iter_mut().zip(BUDGETS) {
                let read = slots.lt(budget as f64)?.to_dtype(DType::F32)?;
                let mut sums = near.add(&Sums::new(&far.broadcast_mul(&read)?, &values)?)?;
                if let Some(rest) = rest(budget as f64)? {
                    sums = sums.add(&rest)?;
                }
                *error = relative_error(&sums.output()?, &full)? / heads_per_text as f64;
            }
            anyhow::Ok(row)
        };
        let by_group = |(groups, ranking, slots, first): &(&Groups, Ranking, Tensor, Tensor)| {
            let weights = weigh(&ranking.scores.get(head)?)?;
            let (sizes, slots, first) = (groups.sizes.get(head)?, slots.get(head)?, first.get(head)?);
            let estimate = |budget: f64| {
                // Tokens of a group past the budget stand at its mean.
                let left = (first.broadcast_add(&sizes)? - budget)?.relu()?.broadcast_minimum(&sizes)?;
                Ok(Some(Sums::new(&(&weights * left)?, &groups.mean_values.get(head)?)?))
            };
            anyhow::Ok([measure(&slots, &estimate)?, measure(&slots, &|_| Ok(None))?])
        };
        let [clusters_estimate, clusters] = by_group(&clusters)?;
        let [pages_estimate, pages] = by_group(&pages)?;
        let recent = measure(&same_slots((0..tokens).rev(), device)?, &|_| Ok(None))?;
        let mut order: Vec<usize> = (0..tokens).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(head as u64));
        let random = measure(&same_slots(order.into_iter(), device)?, &|_| Ok(None))?;

        let measured = [clusters_estimate, clusters, pages_estimate, pages, recent, random];
        let sums = errors[head / heads_per_text].iter_mut().flatten();
        sums.zip(measured.as_flattened()).for_each(|(sum, error)| *sum += error);
    }
    Ok(errors)
}

fn relative_error(output: &Tensor, full: &Tensor) -> Result<f64> {
    let error = (output - full)?.sqr()?.sum(1)?.div(&full.sqr()?.sum(1)?)?;
    Ok(error.mean_all()?.to_scalar::<f32>()? as f64)
}

/// (1, tokens): the same slots for every row.
fn same_slots(slots: impl ExactSizeIterator<Item = usize>, device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_iter(slots.map(|slot| slot as f32), device)?.unsqueeze(0)?)
}

/// Attention of the last token alone, as in decoding: to the whole cache, and to the nearest clusters read by index.
fn time_one_token(cache: &Cache, clusters: &Groups) -> Result<()> {
    let (device, queries) = (cache.keys.device(), cache.last_queries()?);
    let (heads, group, dim) = queries.dims3()?;
    let keys = Tensor::cat(&[&cache.near_keys, &cache.keys], 1)?;
    let values = Tensor::cat(&[&cache.near_values, &cache.values], 1)?;
    let (full, full_seconds) = timed(device, || {
        let weights = softmax_last_dim(&queries.matmul(&keys.transpose(1, 2)?)?)?;
        Ok(weights.matmul(&values)?)
    })?;

    let tokens = cache.keys.dim(1)?;
    let head_start = Tensor::from_iter((0..heads).map(|head| (head * tokens) as f32), device)?.unsqueeze(1)?;
    let read = |x: &Tensor, index: &Tensor| {
        let index = index.to_dtype(DType::F32)?.broadcast_add(&head_start)?.to_dtype(DType::U32)?;
        x.flatten(0, 1)?.index_select(&index.flatten_all()?, 0)?.reshape((heads, index.dim(1)?, dim))
    };
    // Once a prefill: the tokens of a cluster beside each other.
    let (far_keys, far_values) = (read(&cache.keys, &clusters.order)?, read(&cache.values, &clusters.order)?);
    let slot = Tensor::arange(0, TIMED_BUDGET as u32, device)?.to_dtype(DType::F32)?;
    let (some, seconds) = timed(device, || {
        let Ranking { ranked, before, .. } = clusters.rank(&queries)?;
        // A mark at the slot where each cluster starts: counting the marks tells whose each slot is.
        let mark = before.clamp(0.0, TIMED_BUDGET as f64)?.to_dtype(DType::U32)?;
        let marks = Tensor::zeros((heads, group, TIMED_BUDGET + 1), DType::F32, device)?;
        let marks = marks.scatter_add(&mark, &before.ones_like()?, 2)?.narrow(2, 0, TIMED_BUDGET)?;
        let rank = (marks.contiguous()?.cumsum(2)? - 1.0)?.to_dtype(DType::U32)?;
        let first = (ranked_as(&clusters.starts, &ranked)? - before)?.gather(&rank, 2)?;
        let index = first.broadcast_add(&slot)?.flatten(1, 2)?;
        let rows = |x: &Tensor| read(x, &index)?.reshape((heads * group, TIMED_BUDGET, dim));

        let near = queries.matmul(&cache.near_keys.transpose(1, 2)?)?;
        let far = queries.reshape((heads * group, 1, dim))?.matmul(&rows(&far_keys)?.transpose(1, 2)?)?;
        let weights = softmax_last_dim(&Tensor::cat(&[&near, &far.reshape((heads, group, TIMED_BUDGET))?], 2)?)?;
        let near = weights.narrow(2, 0, near.dim(2)?)?.contiguous()?.matmul(&cache.near_values)?;
        let far = weights.narrow(2, weights.dim(2)? - TIMED_BUDGET, TIMED_BUDGET)?;
        let far = far.reshape((heads * group, 1, TIMED_BUDGET))?.matmul(&rows(&far_values)?)?;
        Ok((near + far.reshape((heads, group, dim))?)?)
    })?;
    let error = relative_error(&some.flatten(0, 1)?, &full.flatten(0, 1)?)?.sqrt();
    println!("attention of one token, {heads} heads x {group} queries, to the whole cache: {}", ms(full_seconds));
    println!("to {TIMED_BUDGET} tokens of the nearest clusters: {}, error {error:.3}", ms(seconds));
    Ok(())
}

/// (share read, root mean square error) of one method.
fn points(row: &[f64], tokens: usize) -> Vec<(f64, f64)> {
    BUDGETS.iter().zip(row).map(|(&budget, error)| (budget as f64 / tokens as f64, error.sqrt())).collect()
}

fn print_table(text: &str, errors: &Errors, tokens: usize) {
    print!("{text:20}");
    BUDGETS.iter().for_each(|&budget| print!("{:>8.1} %", 100.0 * budget as f64 / tokens as f64));
    for (method, row) in METHODS.iter().zip(errors) {
        print!("\n{method:20}");
        row.iter().for_each(|error| print!("{:>10.4}", error.sqrt()));
    }
    println!("\n{:20}{}\n", "full", format!("{:>10}", 0).repeat(BUDGETS.len()));
}
