//! Attention in which groups of queries read the keys that matter to them.

use super::parts::{check_like, chosen_tokens, four, running, unless, wide};
use crate::{
    functional,
    ops::{self, Fence, Memory, Routed, RoutedGroups},
    Error, Init, KMeans, Result,
};
use candle_core::{DType, Tensor, D};
use candle_nn::ops::softmax_last_dim;
use rand::{seq::SliceRandom, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows of a problem: tokens are listed in u32, whose last bit marks a cluster that stands for its tokens.
const MAX_TOKENS: usize = 1 << 30;
/// Elements that a block of query rows may score at once without a kernel for it: 64 MB of f32.
const BLOCK: usize = 1 << 24;

/// How tokens are put into groups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Grouping {
    /// k-means, so many tokens a cluster on average.
    Clusters(usize),
    /// Neighbours, so many tokens a group.
    Blocks(usize),
    /// At random, so many tokens a group: what routing is worth shows beside it.
    Random(usize),
}

/// How many of the grouped keys a group of queries reads: one at least.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Read {
    /// So many.
    Tokens(usize),
    /// Such a share of them, in 0..=1, rounded up.
    Share(f64),
    /// As few as have the share `p` of the attention by the estimate of the groups' means (Yang et al. 2025, Sparse
    /// VideoGen2), but at least the share `least` of the tokens and at most the share `most`: flat heads would otherwise be
    /// left with too little, and memory is set aside for `most`. All in 0..=1.
    TopP {
        /// Of the estimated attention.
        p: f64,
        /// Of the tokens.
        least: f64,
        /// Of the tokens.
        most: f64,
    },
}

/// Attention that reads, for each group of similar queries, the groups of similar keys that matter to them, exactly, and
/// takes the other groups' means for their tokens.
///
/// Keys and queries are clustered head by head. A query's estimate of the attention to a token of key group `j`, with mean
/// key `c_j` and `n_j` tokens, is `exp(q.c_j) / sum_i n_i exp(q.c_i)`; the mean of these over a group of queries ranks the
/// key groups, and the group reads their tokens in that order, exactly as many as [`Read`] says, the last group in part. What
/// remains of the other groups enters the same softmax with the mean key, the mean value and the number of tokens left.
/// [`forward`](Self::forward) is for encoders and diffusion models, [`forward_causal`](Self::forward_causal) for the chunks
/// of a prompt. The groups' centroids are kept: the next call starts from them and costs two passes.
///
/// On a GPU, f16 and bf16 rows of 64 or 128 columns are attended by one kernel that reads rows where they lie, in the order of
/// the groups' lists, so that nothing is permuted or copied and no mask exists. For others, and on the CPU, Candle's products
/// compute all scores and a mask removes those that are not read, which is no faster than attention. The host waits for
/// nothing. Values are not searched for NaN, and no gradient flows.
///
/// Sources: query and key clusters as in Yang et al. 2025 (Sparse VideoGen2), with each query's own softmax instead of
/// that of their mean; estimates inside the softmax as in Hooper et al. 2025 (Multipole attention).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_flash_kmeans::nn::{Read, RoutedAttention};
///
/// let random = |heads, n| Tensor::randn(0f32, 1f32, (1, heads, n, 64), &Device::Cpu);
/// let mut attention = RoutedAttention::new(Read::Share(0.1));
/// let out = attention.forward(&random(6, 512)?, &random(2, 512)?, &random(2, 512)?, 0.125)?;
/// assert_eq!(out.dims(), [1, 6, 512, 64]); // three query heads share a key head
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Debug)]
pub struct RoutedAttention {
    fence: Fence,
    read: Read,
    keys: Grouping,
    queries: Grouping,
    sinks: usize,
    recent: usize,
    passes: [usize; 2],
    estimate: bool,
    warm: [Option<Warm>; 2],
    memory: Memory,
}

/// Where the next call's clusters start.
#[derive(Debug)]
struct Warm {
    /// `(b, heads, k, d)`
    centroids: Tensor,
    /// The rows that they are centroids of.
    rows: usize,
}

/// The groups of some rows.
struct Grouped {
    /// u32 `(b, heads, n)`, below `k`.
    labels: Tensor,
    k: usize,
}

/// Places in [`RoutedAttention::warm`].
const KEYS: usize = 0;
const QUERIES: usize = 1;

impl RoutedAttention {
    /// Groups of 16 keys and of 128 queries by k-means of at most 10 passes, 2 when warm; with estimates; causal chunks read
    /// the first 4 tokens and the 64 before them as they are.
    pub fn new(read: Read) -> Self {
        Self {
            fence: Fence::default(),
            read,
            keys: Grouping::Clusters(16),
            queries: Grouping::Clusters(128),
            sinks: 4,
            recent: 64,
            passes: [10, 2],
            estimate: true,
            warm: [None, None],
            memory: Memory::kept(),
        }
    }

    /// How keys are grouped.
    pub fn keys(mut self, keys: Grouping) -> Self {
        self.keys = keys;
        self
    }

    /// How queries are grouped.
    pub fn queries(mut self, queries: Grouping) -> Self {
        self.queries = queries;
        self
    }

    /// The first tokens, which every query of a causal chunk reads.
    pub fn sinks(mut self, tokens: usize) -> Self {
        self.sinks = tokens;
        self
    }

    /// The last tokens before a causal chunk, which every query of it reads.
    pub fn recent(mut self, tokens: usize) -> Self {
        self.recent = tokens;
        self
    }

    /// Most updates of the centroids when they start from evenly spaced rows, and when they start from the last call's.
    pub fn passes(mut self, cold: usize, warm: usize) -> Self {
        self.passes = [cold, warm];
        self
    }

    /// Whether tokens that are not read are estimated by their groups' means (default: yes), or left out.
    pub fn estimate(mut self, estimate: bool) -> Self {
        self.estimate = estimate;
        self
    }

    /// Forgets the centroids: the next call starts cold.
    pub fn reset(&mut self) {
        // First, so that what other threads do to the tensors is over.
        self.fence = Fence::default();
        self.warm = [None, None];
    }

    /// Attention of all queries `q` `(batch, heads, m, d)` to all keys `k` and values `v` `(batch, kv_heads, n, d)`:
    /// `(batch, heads, m, d)`. `heads` is a multiple of `kv_heads`; neighbouring ones share a key head.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together, groups of no tokens, shares outside of 0..=1, and
    /// fails as [`KMeans::fit`].
    pub fn forward(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f64) -> Result<Tensor> {
        self.attend(q, k, v, softmax_scale, false)
    }

    /// Attention of the last `m` tokens, whose queries are `q` `(batch, heads, m, d)`, each to the tokens up to itself. The
    /// tokens of the chunk, the sinks and the recent ones before the chunk are read as they are, the others by groups.
    ///
    /// # Errors
    /// As [`forward`](Self::forward). Refuses more queries than keys.
    pub fn forward_causal(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f64) -> Result<Tensor> {
        self.attend(q, k, v, softmax_scale, true)
    }

    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, causal: bool) -> Result<Tensor> {
        let [b, heads, m, d] = four("q", q)?;
        let [_, kv_heads, n, _] = four("k", k)?;
        check_like("k", k, q, [b, kv_heads, n, d])?;
        check_like("v", v, q, [b, kv_heads, n, d])?;
        if !heads.is_multiple_of(kv_heads) {
            let with = format!("k of {kv_heads}, which must divide them");
            return Err(Error::Conflict { argument: "q", got: format!("{heads} heads"), with });
        }
        if n > MAX_TOKENS {
            return Err(Error::TooLarge { argument: "k rows", got: n, limit: MAX_TOKENS });
        }
        if causal && m > n {
            return Err(Error::Range { argument: "q rows", got: m, min: 1, max: n });
        }
        let sinks = if causal { self.sinks } else { 0 };
        let grouped = if causal { n.saturating_sub(m + self.recent + sinks) } else { n };
        let [share, least, most] = self.reads(grouped)?;
        for (argument, t) in [("q", q), ("k", k), ("v", v)] {
            ops::check_counted(argument, t)?;
        }
        if self.warm.iter().flatten().any(|warm| !warm.centroids.device().same_device(q.device())) {
            self.reset();
        }
        self.fence.write(q.device())?;
        let (q, k, v) = (&q.detach(), &k.detach(), &v.detach());
        let groups = if grouped == 0 {
            None
        } else {
            Some(self.groups(q, &k.narrow(2, sinks, grouped)?, &v.narrow(2, sinks, grouped)?)?)
        };
        let routed = Routed {
            q,
            keys: k,
            values: v,
            sinks,
            groups: groups.as_ref(),
            causal,
            scale,
            share,
            least: least as usize,
            most: most as usize,
            estimate: self.estimate,
        };
        match ops::route(&routed, &self.memory)? {
            Some(output) => Ok(output),
            None => masked(&routed),
        }
    }

    /// The share of the attention to be read, and the fewest and the most tokens, of so many.
    fn reads(&self, tokens: usize) -> Result<[f64; 3]> {
        let check = |argument, got| match (0.0..=1.0).contains(&got) {
            true => Ok(got),
            false => Err(Error::Value { argument, got, expected: "in 0..=1" }),
        };
        let of = |share: f64| (share * tokens as f64).ceil();
        let (p, least, most) = match self.read {
            Read::Tokens(count) => (0.0, count as f64, count as f64),
            Read::Share(share) => (0.0, of(check("share", share)?), of(share)),
            Read::TopP { p, least, most } => {
                (check("p", p)?, of(check("least", least)?), of(check("most", most)?.max(least)))
            }
        };
        // A query without sinks has to read something.
        Ok([p, least.clamp(1.0, tokens.max(1) as f64), most.clamp(1.0, tokens.max(1) as f64)])
    }

    /// Groups the queries and the keys, and reduces keys and values to the groups' means.
    fn groups(&mut self, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<RoutedGroups> {
        let of_keys = self.group(KEYS, keys)?;
        let of_queries = self.group(QUERIES, q)?;
        let sorted = |labels: &Tensor, k: usize| {
            let (b, heads, n) = labels.dims3()?;
            let (order, offsets) = ops::order(&labels.reshape((b * heads, n))?, k)?;
            Ok::<_, Error>((order.reshape((b, heads, n))?, offsets.reshape((b, heads, k + 1))?))
        };
        let (order, offsets) = sorted(&of_keys.labels, of_keys.k)?;
        let (query_order, query_offsets) = sorted(&of_queries.labels, of_queries.k)?;
        Ok(RoutedGroups {
            mean_keys: functional::known_means(keys, &of_keys.labels, of_keys.k)?,
            mean_values: functional::known_means(values, &of_keys.labels, of_keys.k)?,
            order,
            offsets,
            query_labels: of_queries.labels,
            query_order,
            query_offsets,
        })
    }

    fn group(&mut self, which: usize, x: &Tensor) -> Result<Grouped> {
        let (b, heads, n, _) = x.dims4()?;
        let (grouping, argument) = [(self.keys, "keys"), (self.queries, "queries")][which];
        let (Grouping::Clusters(size) | Grouping::Blocks(size) | Grouping::Random(size)) = grouping;
        if size == 0 {
            return Err(Error::Range { argument, got: 0, min: 1, max: MAX_TOKENS });
        }
        let k = n.div_ceil(size);
        let alike =
            |of: Vec<u32>| Ok::<_, Error>(Tensor::new(of, x.device())?.broadcast_as((b, heads, n))?.contiguous()?);
        let blocks = || (0..n).map(|i| (i / size) as u32);
        let labels = match grouping {
            Grouping::Blocks(_) => alike(blocks().collect())?,
            Grouping::Random(_) => {
                let mut groups: Vec<u32> = blocks().collect();
                groups.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
                alike(groups)?
            }
            Grouping::Clusters(_) => {
                let start = self.warm[which].as_ref().map(|warm| warm.start(x, k)).transpose()?.flatten();
                let passes = self.passes[start.is_some() as usize];
                let settings = KMeans::new(k).init(start.map_or(Init::Even, Init::Given)).max_iters(passes).tol(0.0);
                let mut fit = settings.check_finite(false).prepare(x.shape(), x.dtype(), x.device())?;
                fit.run(x)?;
                self.warm[which] = Some(Warm { centroids: fit.centroids().clone(), rows: n });
                fit.labels().clone()
            }
        };
        Ok(Grouped { labels, k })
    }
}

impl Warm {
    /// `k` centroids for `x`, which may have grown by some rows: as many of these as are missing, evenly spaced. None where
    /// `x` is something else.
    fn start(&self, x: &Tensor, k: usize) -> Result<Option<Tensor>> {
        let (known, rows) = (self.centroids.dims()[2], x.dims()[2]);
        let [b, heads, _, d] = four("centroids", &self.centroids)?;
        let same = x.dims()[..2] == [b, heads] && x.dims()[3] == d && x.dtype() == self.centroids.dtype();
        let (new, missing) = (rows.saturating_sub(self.rows), k.saturating_sub(known));
        if !same || !x.device().same_device(self.centroids.device()) || k < known || missing > new {
            return Ok(None);
        }
        if missing == 0 {
            return Ok(Some(self.centroids.clone()));
        }
        let at = Tensor::from_iter((0..missing).map(|i| (i * new / missing) as u32), x.device())?;
        let added = x.narrow(2, self.rows, new)?.contiguous()?.index_select(&at, 2)?;
        Ok(Some(Tensor::cat(&[&self.centroids, &added], 2)?))
    }
}

/// The same by Candle's ops: all scores, and a mask by group of queries.
fn masked(r: &Routed<'_>) -> Result<Tensor> {
    let (b, heads, m, d) = r.q.dims4()?;
    let (kv_heads, n) = (r.keys.dims()[1], r.keys.dims()[2]);
    let (p, group, device) = (b * kv_heads, heads / kv_heads, r.q.device());
    let queries = (wide(r.q)? * r.scale)?.reshape((p, group, m, d))?;
    let joined = |tokens: &Tensor, means: Option<&Tensor>| {
        let all = [Some(tokens), means].into_iter().flatten().cloned().collect::<Vec<_>>();
        wide(&Tensor::cat(&all, 2)?.flatten(0, 1)?)
    };
    let keys = joined(r.keys, r.groups.map(|g| &g.mean_keys))?.transpose(1, 2)?;
    let values = joined(r.values, r.groups.map(|g| &g.mean_values))?;
    let columns = values.dims()[1];
    // With the group of each query, numbered over all heads.
    let bias = |g: &RoutedGroups| {
        let units = g.query_offsets.dims()[2] - 1;
        let before = Tensor::from_iter((0..p * group).map(|h| (h * units) as u32), device)?.reshape((p * group, 1))?;
        let of = g.query_labels.reshape((p * group, m))?.broadcast_add(&before)?;
        Ok::<_, Error>((g.bias(r, &queries)?, of))
    };
    let bias = r.groups.map(bias).transpose()?;
    let step = (BLOCK / (b * heads * columns)).clamp(1, m);
    let mut outputs = Vec::with_capacity(m.div_ceil(step));
    for start in (0..m).step_by(step) {
        let count = step.min(m - start);
        let rows = queries.narrow(2, start, count)?.reshape((p, group * count, d))?;
        let mut scores = rows.matmul(&keys)?.reshape((p * group, count, columns))?;
        if let Some((bias, of)) = &bias {
            let bias = bias.index_select(&of.narrow(1, start, count)?.flatten_all()?, 0)?;
            scores = (scores + bias.reshape((p * group, count, columns))?)?;
        }
        if r.causal {
            let last = n - m + start;
            let sees =
                |i: usize| (0..columns).map(move |j| if j < n && j > last + i { f32::NEG_INFINITY } else { 0.0 });
            let mask = Tensor::from_iter((0..count).flat_map(sees), device)?.reshape((count, columns))?;
            scores = scores.broadcast_add(&mask.to_dtype(scores.dtype())?)?;
        }
        let weights = softmax_last_dim(&scores)?.reshape((p, group * count, columns))?;
        outputs.push(weights.matmul(&values)?.reshape((b, heads, count, d))?.to_dtype(r.q.dtype())?);
    }
    Ok(Tensor::cat(&outputs, 2)?)
}

impl RoutedGroups {
    /// What each group of queries adds to the scores, f32 or f64 `(b * heads * groups, n + k)`: minus infinity for tokens that
    /// it does not read, and the logarithm of the tokens that a mean stands for. `queries` are `(p, group, m, d)`, scaled.
    fn bias(&self, r: &Routed<'_>, queries: &Tensor) -> Result<Tensor> {
        let (p, group, m, _) = queries.dims4()?;
        let (k, units, n) = (self.offsets.dims()[2] - 1, self.query_offsets.dims()[2] - 1, r.keys.dims()[2]);
        let (grouped, device) = (self.order.dims()[2], queries.device());
        let means = wide(&self.mean_keys.flatten(0, 1)?.transpose(1, 2)?)?;
        let scores = queries.flatten(1, 2)?.matmul(&means)?.reshape((p, group * m, k))?;
        let ends = self.offsets.flatten(0, 1)?.to_dtype(DType::F32)?;
        let starts = ends.narrow(1, 0, k)?.contiguous()?;
        let sizes = (ends.narrow(1, 1, k)? - &starts)?.unsqueeze(1)?;

        // Groups without tokens have no part in a softmax.
        let scores = unless(&sizes.eq(0f32)?, &scores, f64::NEG_INFINITY)?;
        let counted = scores.broadcast_add(&sizes.to_dtype(scores.dtype())?.log()?)?;
        let share = scores.broadcast_sub(&counted.log_sum_exp(D::Minus1)?.unsqueeze(2)?)?.exp()?;
        let labels = self.query_labels.reshape((p * group, m))?;
        let rank = functional::known_means(&share.reshape((p * group, m, k))?, &labels, units)?;
        let rank = rank.to_dtype(DType::F32)?.reshape((p, group * units, k))?;

        let sizes = sizes.broadcast_as((p, group * units, k))?.contiguous()?;
        let budget = budgets(&rank, &sizes, r)?;
        let (chosen, taken) = chosen_tokens(&rank, &sizes, &starts, &budget, r.most)?;
        let order = self.order.flatten(0, 1)?.contiguous()?;
        let tokens = order.gather(&chosen.flatten(1, 2)?, 1)?.reshape(chosen.shape())?;
        // What is beyond the budget marks a column that is cut off.
        let slot = Tensor::arange(0u32, r.most as u32, device)?.to_dtype(DType::F32)?.broadcast_as(chosen.shape())?;
        let nowhere = Tensor::full(grouped as u32, chosen.shape(), device)?;
        let tokens = slot.broadcast_lt(&budget)?.where_cond(&tokens, &nowhere)?;
        let unread = Tensor::full(f32::NEG_INFINITY, (p, group * units, grouped + 1), device)?;
        let read = unread.scatter(&tokens, &tokens.zeros_like()?.to_dtype(DType::F32)?, 2)?.narrow(2, 0, grouped)?;
        let near = |count: usize| Tensor::zeros((p, group * units, count), DType::F32, device);
        let mut parts = vec![read];
        if r.sinks > 0 {
            parts.insert(0, near(r.sinks)?);
        }
        if n > r.sinks + grouped {
            parts.push(near(n - r.sinks - grouped)?);
        }
        parts.push(match r.estimate {
            true => (sizes - taken)?.log()?,
            false => Tensor::full(f32::NEG_INFINITY, (p, group * units, k), device)?,
        });
        Ok(Tensor::cat(&parts, 2)?.flatten(0, 1)?.to_dtype(scores.dtype())?)
    }
}

/// The tokens that each group of queries reads, f32 `(p, units, 1)`, by the attention `rank` to a token of each cluster of
/// `sizes`, both `(p, units, k)`.
fn budgets(rank: &Tensor, sizes: &Tensor, r: &Routed<'_>) -> Result<Tensor> {
    let (p, units, k) = rank.dims3()?;
    if r.least == r.most {
        return Ok(Tensor::full(r.most as f32, (p, units, 1), rank.device())?);
    }
    let ranked = rank.arg_sort_last_dim(false)?;
    let mass = (rank * sizes)?.gather(&ranked, 2)?;
    let through = running(&mass)?;
    let enough = (through.narrow(2, k - 1, 1)? * r.share)?;
    let needed = (through - mass)?.broadcast_lt(&enough)?.to_dtype(DType::F32)?;
    let tokens = (needed * sizes.gather(&ranked, 2)?)?.sum_keepdim(2)?;
    Ok(tokens.maximum(r.least as f64)?.minimum(r.most as f64)?)
}
