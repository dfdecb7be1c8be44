//! A query reads part of a cached prompt, method by method.

use anyhow::Result;
use candle_core::{DType, Device, Tensor, D};
use candle_flash_kmeans::nn::{ClusteredKvCache, KvBudget, KvClusters, KvCodes};
use candle_nn::ops::softmax_last_dim;
use indicatif::ProgressBar;
use models::{
    smollm2::{attend, Heads, SmolLm2},
    timing::seconds,
};

pub const SINKS: usize = 4;
pub const RECENT: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Full,
    ClustersAndEstimate,
    /// The same, of tokens that are kept as codes.
    Codes,
    Clusters,
    PagesAndEstimate,
    /// Pages by the largest score that the bounds of their keys allow (Tang et al. 2024).
    Quest,
    Recent,
}

impl Method {
    /// Those that spend a budget on tokens as they are.
    pub const ALL: [Self; 5] =
        [Self::ClustersAndEstimate, Self::Clusters, Self::PagesAndEstimate, Self::Quest, Self::Recent];

    pub fn name(self) -> &'static str {
        match self {
            Self::Full => "full attention",
            Self::ClustersAndEstimate => "clusters + estimate",
            Self::Codes => "clusters + estimate, codes",
            Self::Clusters => "clusters",
            Self::PagesAndEstimate => "page means + estimate",
            Self::Quest => "Quest pages",
            Self::Recent => "recent window",
        }
    }
}

/// How tokens of a prompt become clusters and pages.
#[derive(Clone, Copy)]
pub struct Grouping {
    /// Tokens in a page, and in a cluster on average.
    pub group: usize,
    /// Most tokens that are clustered together.
    pub max_segment: usize,
}

/// A prompt, in a cache for every block.
pub struct Prompt {
    tokens: usize,
    /// Tokens in a page, and in a cluster on average.
    group: usize,
    clusters: Vec<ClusteredKvCache>,
    pages: Vec<ClusteredKvCache>,
    max_segment: usize,
    /// In f16, as codes are meant to replace; none before they are asked for.
    coded: Vec<ClusteredKvCache>,
    dtype: DType,
    head_dim: usize,
    pub prefill_seconds: f64,
    pub clustering_seconds: f64,
}

impl Prompt {
    /// Runs the model over `ids` exactly and keeps keys and values in `dtype`; `bar` counts blocks.
    pub fn new(
        model: &SmolLm2,
        ids: &[u32],
        Grouping { group, max_segment }: Grouping,
        dtype: DType,
        room: usize,
        bar: &ProgressBar,
    ) -> Result<Self> {
        let new = || {
            let cache = ClusteredKvCache::new(ids.len() + room).sinks(SINKS).recent(RECENT);
            cache.cluster_size(group).segment(1).max_segment(max_segment)
        };
        let caches = || (0..model.dims.layers).map(|_| new()).collect::<Vec<_>>();
        let (mut clusters, mut pages) = (caches(), caches());
        let device = model.embedding.device();
        let (_, prefill_seconds) = seconds(device, || {
            model.forward(ids, 0, |layer, heads| {
                let [_, keys, values] = stored(heads, dtype)?;
                clusters[layer].append(&keys, &values)?;
                bar.inc(1);
                attend(heads)
            })
        })?;
        let (_, clustering_seconds) = seconds(device, || Ok(ClusteredKvCache::cluster_layers(&mut clusters)?))?;
        for (cache, clustered) in pages.iter_mut().zip(&clusters) {
            let (Some(keys), Some(values), Some(found)) = (clustered.k()?, clustered.v()?, clustered.clusters()) else {
                anyhow::bail!("{} tokens are too few for a cluster", ids.len());
            };
            cache.append(&keys, &values)?;
            let tokens = found.labels.dims()[2];
            let page = Tensor::from_iter((0..tokens).map(|token| (token / group) as u32), device)?;
            cache.group(&page.broadcast_as(found.labels.shape())?.contiguous()?, tokens.div_ceil(group))?;
        }
        let (tokens, head_dim) = (ids.len(), model.dims.head_dim);
        let coded = vec![];
        Ok(Self {
            tokens,
            group,
            max_segment,
            clusters,
            pages,
            coded,
            dtype,
            head_dim,
            prefill_seconds,
            clustering_seconds,
        })
    }

    /// What a query head reads of the prompt in one block, in kB: tokens, and what it chooses and estimates others by.
    pub fn kilobytes(&self, method: Method, budget: usize) -> f64 {
        let token = 2 * self.head_dim * self.dtype.size_in_bytes();
        let groups = (self.tokens - SINKS - RECENT).div_ceil(self.group);
        let clusters = self.clusters[0].clusters().map_or(0, KvClusters::index_bytes);
        let index = match method {
            Method::Full => return (token * self.tokens) as f64 / 1e3,
            Method::ClustersAndEstimate | Method::Codes | Method::PagesAndEstimate => clusters,
            // No mean values.
            Method::Clusters => clusters - groups * (self.head_dim + size_of::<f32>()),
            Method::Quest => groups * token,
            Method::Recent => 0,
        };
        (token * (SINKS + RECENT + budget) + index) as f64 / 1e3
    }

    /// The bytes of a token and key head in codes, all counted.
    pub fn coded_bytes(&self, key_heads: usize) -> f64 {
        let bytes: usize = self.coded.iter().map(ClusteredKvCache::bytes).sum();
        bytes as f64 / (self.tokens * key_heads * self.coded.len()) as f64
    }

    /// Keeps the clustered tokens as codes as well, of keys and values in f16.
    pub fn code(&mut self, codes: &KvCodes) -> Result<()> {
        let coded = |cache: &ClusteredKvCache| {
            let (Some(keys), Some(values)) = (cache.k()?, cache.v()?) else { anyhow::bail!("a cache without tokens") };
            let new = ClusteredKvCache::new(keys.dim(2)?).sinks(SINKS).recent(RECENT).cluster_size(self.group);
            let mut new = new.segment(1).max_segment(self.max_segment).codes(codes.clone());
            new.append(&keys.to_dtype(DType::F16)?, &values.to_dtype(DType::F16)?)?;
            Ok(new)
        };
        self.coded = self.clusters.iter().map(coded).collect::<Result<Vec<_>>>()?;
        ClusteredKvCache::cluster_layers(&mut self.coded)?;
        Ok(())
    }

    /// Clusters the keys anew, so many tokens at most together, and returns the seconds that it took.
    pub fn cluster_again(&mut self, max_segment: usize) -> Result<f64> {
        let again = |cache: &ClusteredKvCache| {
            let (Some(keys), Some(values)) = (cache.k()?, cache.v()?) else { anyhow::bail!("a cache without tokens") };
            let room = keys.dim(2)?;
            let new = ClusteredKvCache::new(room).sinks(SINKS).recent(RECENT).cluster_size(self.group);
            let mut new = new.segment(1).max_segment(max_segment);
            new.append(&keys, &values)?;
            Ok(new)
        };
        self.clusters = self.clusters.iter().map(again).collect::<Result<Vec<_>>>()?;
        let device = self.clusters[0].k()?.map_or(Device::Cpu, |keys| keys.device().clone());
        let (_, seconds) = seconds(&device, || Ok(ClusteredKvCache::cluster_layers(&mut self.clusters)?))?;
        Ok(seconds)
    }

    /// The logarithms of the next tokens' probabilities, (tokens, vocabulary), after each of `ids`, which follow the prompt.
    /// They see each other exactly, and of the prompt what the method reads.
    pub fn follow(&mut self, model: &SmolLm2, ids: &[u32], method: Method, budget: usize) -> Result<Tensor> {
        let (caches, dtype) = match method {
            Method::PagesAndEstimate => (&mut self.pages, self.dtype),
            Method::Codes => (&mut self.coded, DType::F16),
            _ => (&mut self.clusters, self.dtype),
        };
        let hidden = model.forward(ids, self.tokens, |layer, heads| {
            let cache = &mut caches[layer];
            let [queries, keys, values] = stored(heads, dtype)?;
            let scale = 1.0 / (model.dims.head_dim as f64).sqrt();
            let (keys, values) = cache.append(&keys, &values)?;
            // What a budget loses is measured, whatever it costs.
            let kept = KvBudget::new(budget).dense_if_cheaper(false);
            let output = match method {
                Method::Full => cache.attend(&queries, scale, KvBudget::new(usize::MAX))?,
                Method::Clusters => cache.attend(&queries, scale, kept.estimate(false))?,
                Method::ClustersAndEstimate | Method::Codes | Method::PagesAndEstimate => {
                    cache.attend(&queries, scale, kept)?
                }
                Method::Quest | Method::Recent => {
                    masked(&(queries * scale)?, &keys, &values, self.tokens, |queries, keys| match method {
                        Method::Quest => quest(queries, keys, budget, self.group),
                        _ => recent(queries, keys, budget),
                    })?
                }
            };
            cache.truncate(self.tokens)?;
            let (_, heads, tokens, dim) = output.dims4()?;
            Ok(output.to_dtype(DType::F32)?.squeeze(0)?.transpose(0, 1)?.reshape((tokens, heads * dim))?)
        })?;
        model.log_probabilities(&hidden)
    }
}

/// Queries, keys and values as a cache takes them.
fn stored(heads: &Heads, dtype: DType) -> Result<[Tensor; 3]> {
    let of = |t: &Tensor| t.unsqueeze(0)?.to_dtype(dtype);
    Ok([of(&heads.queries.flatten(0, 1)?)?, of(&heads.keys)?, of(&heads.values)?])
}

/// Attention of the tokens after the first `past` to each other, to sinks, to recent tokens, and to those that `choose`
/// marks, u8 `(key heads, queries, tokens)`, given scaled queries and the keys to choose from.
fn masked(
    queries: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    past: usize,
    choose: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (_, query_heads, tokens, dim) = queries.dims4()?;
    let (keys, values) = (keys.squeeze(0)?, values.squeeze(0)?);
    let (key_heads, total, _) = keys.dims3()?;
    let rows = query_heads / key_heads * tokens;
    let flat = queries.contiguous()?.reshape((key_heads, rows, dim))?;
    let chosen = choose(&flat, &keys.narrow(1, SINKS, past - RECENT - SINKS)?.contiguous()?)?;
    let always = |count: usize| Tensor::ones((key_heads, rows, count), DType::U8, keys.device());
    let new: Vec<u8> = (0..rows * tokens).map(|i| (i % tokens <= i / tokens % tokens) as u8).collect();
    let new = Tensor::from_vec(new, (1, rows, tokens), keys.device())?.broadcast_as((key_heads, rows, tokens))?;
    let seen = Tensor::cat(&[always(SINKS)?, chosen, always(RECENT)?, new.contiguous()?], 2)?;

    let scores = flat.matmul(&keys.transpose(1, 2)?)?.to_dtype(DType::F32)?;
    let never = Tensor::new(f32::NEG_INFINITY, keys.device())?.broadcast_as((key_heads, rows, total))?;
    let weights = softmax_last_dim(&seen.where_cond(&scores, &never.contiguous()?)?)?;
    let output = weights.to_dtype(values.dtype())?.matmul(&values)?;
    Ok(output.reshape((1, query_heads, tokens, dim))?)
}

/// The pages whose bounds allow the largest scores.
fn quest(queries: &Tensor, keys: &Tensor, budget: usize, group: usize) -> Result<Tensor> {
    let (heads, tokens, dim) = keys.dims3()?;
    let pages = tokens.div_ceil(group);
    // The last key again changes no bound.
    let last = keys.narrow(1, tokens - 1, 1)?.broadcast_as((heads, pages * group - tokens, dim))?;
    let keys = if pages * group > tokens { Tensor::cat(&[keys, &last.contiguous()?], 1)? } else { keys.clone() };
    let keys = keys.reshape((heads, pages, group, dim))?;
    let (high, low) = (keys.max(2)?, keys.min(2)?);
    let bound = queries.relu()?.matmul(&high.transpose(1, 2)?)?;
    let bound = (bound - queries.neg()?.relu()?.matmul(&low.transpose(1, 2)?)?)?.to_dtype(DType::F32)?;
    // Sorting a permutation inverts it.
    let rank = bound.arg_sort_last_dim(false)?.arg_sort_last_dim(true)?;
    let chosen = rank.lt((budget / group) as u32)?.unsqueeze(D::Minus1)?;
    let rows = queries.dim(1)?;
    let chosen = chosen.broadcast_as((heads, rows, pages, group))?.reshape((heads, rows, pages * group))?;
    Ok(chosen.narrow(2, 0, tokens)?.contiguous()?)
}

/// The tokens before the recent ones.
fn recent(queries: &Tensor, keys: &Tensor, budget: usize) -> Result<Tensor> {
    let (heads, tokens, _) = keys.dims3()?;
    let chosen = Tensor::from_iter((0..tokens).map(|token| (token + budget >= tokens) as u8), keys.device())?;
    Ok(chosen.broadcast_as((heads, queries.dim(1)?, tokens))?.contiguous()?)
}
