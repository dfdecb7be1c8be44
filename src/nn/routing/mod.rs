//! Attention in which groups of queries read the keys that matter to them.

use super::parts::{
    check_like, check_scale, chosen_tokens, cumsum_last, dims4_float, masked_fill, ranking, to_accumulate_dtype,
};
use crate::{
    error::{Error, Result},
    functional,
    kmeans::{Init, KMeans},
    memory::{Fence, Memory},
    metric::Metric,
    ops,
    request::{Groups, Routed, RoutedGroups},
};
use candle_core::{DType, Tensor, D};
use candle_nn::ops::softmax_last_dim;
use rand::{seq::SliceRandom, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Rows of a problem: tokens are listed in u32, whose last bit marks a cluster that stands for its tokens.
const MAX_TOKENS: usize = 1 << 30;
/// Elements that a block of query rows may score at once without a kernel for it: 64 MB of f32.
const BLOCK: usize = 1 << 24;
/// Rows by which a warm start is judged: one in so many, but at least so many of them.
const SAMPLED: usize = 8;
const LEAST_SAMPLED: usize = 2048;
/// The inertia of a useful warm start, of that of evenly spaced rows: keys of a model come to 0.6, and what is worse than this
/// has been seen to end worse than a cold start, too.
const USEFUL: f64 = 0.75;

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
/// of a prompt.
///
/// # Warm starts
/// The groups' centroids are kept, and the next call starts from them and makes two passes, not ten. First it mends them: those
/// that no row was nearest to, or that are not finite, become evenly spaced rows, and so do all of a head whose last rows were
/// not finite. Then it compares their inertia over a sample of the new rows (every eighth, or 2,048) with that of evenly spaced
/// rows alone: a head of a batch element for which they do not leave a quarter less, as after a change of scene, starts from
/// those. So a call recovers from whatever came before it. The choice is made on the device. A first call, one of another
/// shape and one after [`reset`](Self::reset) make all ten passes.
///
/// # Non-finite values
/// Nothing is searched for NaN or infinities. A query that is not finite has no part in the choice of its group, and its output is
/// not finite. A key or value that is not finite makes the outputs of the queries that read it so. Other heads and batch
/// elements are not affected, nor is the next call.
///
/// On a GPU, f16 and bf16 rows of 64 or 128 columns are attended by one kernel that reads rows where they lie, in the order of
/// the groups' lists, so that nothing is permuted or copied and no mask exists. For others, and on the CPU, Candle's products
/// compute all scores and a mask removes those that are not read, which is no faster than attention. The host waits for
/// nothing, and no gradient flows. Without queries the result is empty.
///
/// A clone goes on by itself, from the same centroids.
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
    causal_choice: bool,
    warm: [Option<Warm>; 2],
    memory: Memory,
}

/// Where the next call's clusters start.
#[derive(Clone, Debug)]
struct Warm {
    /// `(b, heads, k, d)`
    centroids: Tensor,
    /// How many rows were nearest to each, u32 `(b, heads, k)`; none where some row was not finite.
    sizes: Tensor,
    /// The rows that they are centroids of.
    rows: usize,
}

/// Places in [`RoutedAttention::warm`].
const KEYS: usize = 0;
const QUERIES: usize = 1;

/// With scratch memory of its own.
impl Clone for RoutedAttention {
    fn clone(&self) -> Self {
        Self { fence: self.fence.clone(), warm: self.warm.clone(), memory: Memory::kept(), ..*self }
    }
}

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
            causal_choice: false,
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

    /// Whether what a query of [`forward_causal`](Self::forward_causal) reads depends on no later query (default: no).
    ///
    /// Otherwise the queries of a chunk are grouped together and choose together, so that a query's output changes with later
    /// queries of its chunk, though it sees no later key or value: no harm to a prompt that is there as a whole, but a leak to
    /// training and to the evaluation of predictions. With it, the groups are blocks of neighbouring queries, as many as
    /// [`queries`](Self::queries) says in whatever grouping, and a block reads what the block before it and its own first query
    /// choose; the first block of a chunk what its first query chooses, and a block of one what that chooses.
    ///
    /// At a tenth of the keys (16 a cluster) of SmolLM2's activations in `assets/` the output's relative error is 0.051 with
    /// blocks of 1 query, 0.090 with 2, 0.111 with 4 and 0.130 with 16, where clusters of 16 queries that choose together have
    /// 0.071 and blocks of 16 have 0.084. Small blocks cost time: a GPU reads each list for at least 64 queries.
    pub fn causal_choice(mut self, causal: bool) -> Self {
        self.causal_choice = causal;
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
    /// Refuses shapes, dtypes and devices that do not fit together, queries without keys, groups of no tokens, shares outside of
    /// 0..=1 and a scale that is not finite, before any work, and fails where the device does.
    pub fn forward(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f64) -> Result<Tensor> {
        self.attend(q, k, v, softmax_scale, false)
    }

    /// Attention of the last `m` tokens, whose queries are `q` `(batch, heads, m, d)`, each to the tokens up to itself. The
    /// tokens of the chunk, the sinks and the recent ones before the chunk are read as they are, the others by groups.
    ///
    /// Which of the others a query reads is chosen by its whole group, later queries of the chunk included, unless
    /// [`causal_choice`](Self::causal_choice) is set. Later keys and values never enter.
    ///
    /// # Errors
    /// As [`forward`](Self::forward). Refuses more queries than keys.
    pub fn forward_causal(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, softmax_scale: f64) -> Result<Tensor> {
        self.attend(q, k, v, softmax_scale, true)
    }

    fn attend(&mut self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, causal: bool) -> Result<Tensor> {
        let [b, heads, m, d] = dims4_float("q", q)?;
        let [_, kv_heads, n, _] = dims4_float("k", k)?;
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
            return Err(Error::Range { argument: "q rows", got: m, min: 0, max: n });
        }
        check_scale(scale)?;
        let [key_group, query_group] = [group_size("keys", self.keys)?, group_size("queries", self.queries)?];
        let sinks = if causal { self.sinks.min(n) } else { 0 };
        let grouped = if causal { (n - sinks).saturating_sub(self.recent).saturating_sub(m) } else { n };
        let [share, least, most] = self.reads(grouped)?;
        if q.elem_count() == 0 {
            return Ok(q.detach());
        }
        if n == 0 {
            return Err(Error::Range { argument: "k rows", got: 0, min: 1, max: MAX_TOKENS });
        }
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
            let (keys, values) = (k.narrow(2, sinks, grouped)?, v.narrow(2, sinks, grouped)?);
            let groups = self.group(KEYS, &keys, key_group)?;
            let causal = causal && self.causal_choice;
            let (queries, choosers) = match causal {
                true => (blocks(q, query_group)?, Some(choosers(q, query_group)?)),
                false => (self.group(QUERIES, q, query_group)?, None),
            };
            let k = groups.len()?;
            let [mean_keys, mean_values] = [&keys, &values].map(|t| functional::known_means(t, &groups.labels, k));
            Some(RoutedGroups { mean_keys: mean_keys?, mean_values: mean_values?, keys: groups, queries, choosers })
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

    /// Groups the rows of `x` `(b, heads, n, d)`, `size` to a group on average.
    fn group(&mut self, which: usize, x: &Tensor, size: usize) -> Result<Groups> {
        let n = x.dims()[2];
        let k = n.div_ceil(size);
        match [self.keys, self.queries][which] {
            Grouping::Blocks(_) => blocks(x, size),
            Grouping::Random(_) => {
                let mut groups: Vec<u32> = (0..n).map(|i| (i / size) as u32).collect();
                groups.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
                Groups::new(for_each_head(groups, x)?, k)
            }
            Grouping::Clusters(_) => {
                let start = self.warm[which].as_ref().map(|warm| warm.start(x, k)).transpose()?.flatten();
                let passes = self.passes[start.is_some() as usize];
                let settings = KMeans::new(k).init(start.map_or(Init::Even, Init::Given)).max_iters(passes).tol(0.0);
                let mut fit = settings.check_finite(false).prepare(x.shape(), x.dtype(), x.device())?;
                fit.run(x)?;
                let groups = Groups::new(fit.labels().clone(), k)?;
                let (centroids, sizes) = (fit.centroids().clone(), groups.sizes()?);
                let sizes = sizes.broadcast_mul(&functional::finite(x)?.to_dtype(DType::U32)?.unsqueeze(2)?)?;
                self.warm[which] = Some(Warm { centroids, sizes, rows: n });
                Ok(groups)
            }
        }
    }
}

/// The tokens of a group, which must be some.
fn group_size(argument: &'static str, grouping: Grouping) -> Result<usize> {
    match grouping {
        Grouping::Clusters(0) | Grouping::Blocks(0) | Grouping::Random(0) => {
            Err(Error::Range { argument, got: 0, min: 1, max: MAX_TOKENS })
        }
        Grouping::Clusters(size) | Grouping::Blocks(size) | Grouping::Random(size) => Ok(size),
    }
}

/// The same numbers for each head of `x` `(b, heads, n, d)`: u32 `(b, heads, numbers)`.
fn for_each_head(numbers: Vec<u32>, x: &Tensor) -> Result<Tensor> {
    let (b, heads, _, _) = x.dims4()?;
    let shape = (b, heads, numbers.len());
    Ok(Tensor::new(numbers, x.device())?.broadcast_as(shape)?.contiguous()?)
}

/// Groups of `size` neighbouring rows of `x` `(b, heads, n, d)`.
fn blocks(x: &Tensor, size: usize) -> Result<Groups> {
    let n = x.dims()[2];
    let ends = (0..=n.div_ceil(size)).map(|i| i.saturating_mul(size).min(n) as u32);
    Ok(Groups {
        labels: for_each_head((0..n).map(|i| (i / size) as u32).collect(), x)?,
        order: for_each_head((0..n as u32).collect(), x)?,
        offsets: for_each_head(ends.collect(), x)?,
    })
}

/// The queries that choose for each block of `size` queries of `q` `(b, heads, m, d)`, none of them later than the block's first:
/// that one, and those of the block before, which a single query does without.
fn choosers(q: &Tensor, size: usize) -> Result<(Tensor, Groups)> {
    let m = q.dims()[2];
    let before = if size == 1 { 0 } else { size };
    let of_block = |i: usize| (i * size).saturating_sub(before)..i * size + 1;
    let all = || (0..m.div_ceil(size)).map(of_block);
    let rows: Vec<u32> = all().flatten().map(|row| row as u32).collect();
    let ends = all().scan(0, |end, rows| {
        *end += rows.len() as u32;
        Some(*end)
    });
    let groups = Groups {
        labels: for_each_head(all().enumerate().flat_map(|(i, rows)| rows.map(move |_| i as u32)).collect(), q)?,
        order: for_each_head((0..rows.len() as u32).collect(), q)?,
        offsets: for_each_head([0].into_iter().chain(ends).collect(), q)?,
    };
    Ok((functional::rows_of(q, &for_each_head(rows, q)?)?, groups))
}

impl Groups {
    /// For u32 `labels` `(b, heads, n)` that are known to be below `k`.
    fn new(labels: Tensor, k: usize) -> Result<Self> {
        let (b, heads, n) = labels.dims3()?;
        let (order, offsets) = ops::order(&labels.reshape((b * heads, n))?, k)?;
        Ok(Self { labels, order: order.reshape((b, heads, n))?, offsets: offsets.reshape((b, heads, k + 1))? })
    }

    /// The number of groups.
    fn len(&self) -> Result<usize> {
        Ok(self.offsets.dim(2)? - 1)
    }

    /// Rows in each group, u32 `(b, heads, k)`.
    fn sizes(&self) -> Result<Tensor> {
        let k = self.len()?;
        Ok((self.offsets.narrow(2, 1, k)? - self.offsets.narrow(2, 0, k)?)?)
    }
}

impl Warm {
    /// `k` centroids for `x` `(b, heads, n, d)`, which may have grown by some rows: these, mended, and as many evenly spaced new rows
    /// as are missing, for each problem where they are better than evenly spaced rows alone, and else those. None where `x` is
    /// something else.
    fn start(&self, x: &Tensor, k: usize) -> Result<Option<Tensor>> {
        let [b, heads, known, d] = dims4_float("centroids", &self.centroids)?;
        let rows = x.dims()[2];
        let same = x.dims()[..2] == [b, heads] && x.dims()[3] == d && x.dtype() == self.centroids.dtype();
        let (new, missing) = (rows.saturating_sub(self.rows), k.saturating_sub(known));
        if !same || !x.device().same_device(self.centroids.device()) || k < known || missing > new {
            return Ok(None);
        }
        let at = |rows: Vec<u32>| functional::rows_of(x, &for_each_head(rows, x)?);
        let even = at((0..k).map(|i| (i * rows / k) as u32).collect())?;
        // A finite number times zero is zero, and nothing else is.
        let finite = (&self.centroids * 0.0)?.sum_keepdim(3)?.eq(0f64)?;
        let useful = self.sizes.unsqueeze(3)?.ne(0u32)?.minimum(&finite)?;
        let mended = at((0..known).map(|i| (i * rows / known) as u32).collect())?;
        let mended = useful.broadcast_as(mended.shape())?.where_cond(&self.centroids, &mended)?;
        let warm = match missing {
            0 => mended,
            _ => {
                let added = at((0..missing).map(|i| (self.rows + i * new / missing) as u32).collect())?;
                Tensor::cat(&[&mended, &added], 2)?
            }
        };
        let count = (rows / SAMPLED).max(LEAST_SAMPLED).min(rows);
        let sample = at((0..count).map(|i| ((2 * i + 1) * rows / (2 * count)) as u32).collect())?;
        let cost = |centroids: &Tensor| {
            let (_, distances) = functional::assign_with_distances(&sample, centroids, Metric::SquaredEuclidean)?;
            let distances = distances.reshape((b * heads, count))?;
            // What is not finite tells nothing.
            functional::totals(&masked_fill(&(&distances * 0.0)?.ne(0f64)?, &distances, 0.0)?)
        };
        let better = cost(&warm)?.le(&(cost(&even)? * USEFUL)?)?.reshape((b, heads, 1, 1))?;
        Ok(Some(better.broadcast_as(warm.shape())?.where_cond(&warm, &even)?))
    }
}

/// The same by Candle's ops: all scores, and a mask by group of queries.
fn masked(r: &Routed<'_>) -> Result<Tensor> {
    let (b, heads, m, d) = r.q.dims4()?;
    let (kv_heads, n) = (r.keys.dims()[1], r.keys.dims()[2]);
    let (p, group, device) = (b * kv_heads, heads / kv_heads, r.q.device());
    let scaled = |q: &Tensor| Ok::<_, Error>((to_accumulate_dtype(q)? * r.scale)?.reshape((p, group, q.dim(2)?, d))?);
    let queries = scaled(r.q)?;
    let joined = |tokens: &Tensor, means: Option<&Tensor>| {
        let all = [Some(tokens), means].into_iter().flatten().cloned().collect::<Vec<_>>();
        to_accumulate_dtype(&Tensor::cat(&all, 2)?.flatten(0, 1)?)
    };
    let keys = joined(r.keys, r.groups.map(|g| &g.mean_keys))?.transpose(1, 2)?;
    let values = joined(r.values, r.groups.map(|g| &g.mean_values))?;
    let columns = values.dims()[1];
    // With the group of each query, numbered over all heads.
    let bias = |g: &RoutedGroups| {
        let units = g.queries.len()?;
        let before = Tensor::from_iter((0..p * group).map(|h| (h * units) as u32), device)?.reshape((p * group, 1))?;
        let of = g.queries.labels.reshape((p * group, m))?.broadcast_add(&before)?;
        let bias = match &g.choosers {
            Some((q, groups)) => g.bias(r, &scaled(q)?, groups)?,
            None => g.bias(r, &queries, &g.queries)?,
        };
        Ok::<_, Error>((bias, of))
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
    /// it does not read, and the logarithm of the tokens that a mean stands for. Those of `queries` `(p, group, m, d)`, scaled,
    /// that are in a group of `of` choose for it.
    fn bias(&self, r: &Routed<'_>, queries: &Tensor, of: &Groups) -> Result<Tensor> {
        let (p, group, m, _) = queries.dims4()?;
        let (k, units, n) = (self.keys.len()?, of.len()?, r.keys.dims()[2]);
        let (grouped, device) = (self.keys.order.dims()[2], queries.device());
        let means = to_accumulate_dtype(&self.mean_keys.flatten(0, 1)?.transpose(1, 2)?)?;
        let scores = queries.flatten(1, 2)?.matmul(&means)?.reshape((p, group * m, k))?;
        let dtype = scores.dtype();
        // In f64, which counts any tokens.
        let ends = self.keys.offsets.flatten(0, 1)?.to_dtype(DType::F64)?;
        let starts = ends.narrow(1, 0, k)?.contiguous()?;
        let sizes = (ends.narrow(1, 1, k)? - &starts)?.unsqueeze(1)?;

        // Groups without tokens have no part in a softmax.
        let scores = masked_fill(&sizes.eq(0f64)?, &scores, f64::NEG_INFINITY)?;
        let counted = scores.broadcast_add(&sizes.log()?.to_dtype(dtype)?)?;
        let share = scores.broadcast_sub(&counted.log_sum_exp(D::Minus1)?.unsqueeze(2)?)?.exp()?;
        // A query whose shares are NaN has no say.
        let share = masked_fill(&share.ne(&share)?, &share, 0.0)?;
        let labels = of.labels.reshape((p * group, m))?;
        let rank = functional::known_means(&share.reshape((p * group, m, k))?, &labels, units)?;
        let rank = rank.to_dtype(DType::F64)?.reshape((p, group * units, k))?;

        let sizes = sizes.broadcast_as((p, group * units, k))?.contiguous()?;
        let budget = budgets(&rank, &sizes, r)?;
        let (chosen, taken) = chosen_tokens(&rank, &sizes, &starts, &budget, r.most)?;
        let order = self.keys.order.flatten(0, 1)?.contiguous()?;
        let tokens = order.gather(&chosen.flatten(1, 2)?, 1)?.reshape(chosen.shape())?;
        // What is beyond the budget marks a column that is cut off.
        let slot = Tensor::arange(0u32, r.most as u32, device)?.to_dtype(DType::F64)?.broadcast_as(chosen.shape())?;
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
            true => (sizes - taken)?.log()?.to_dtype(DType::F32)?,
            false => Tensor::full(f32::NEG_INFINITY, (p, group * units, k), device)?,
        });
        Ok(Tensor::cat(&parts, 2)?.flatten(0, 1)?.to_dtype(dtype)?)
    }
}

/// The tokens that each group of queries reads, f64 `(p, units, 1)`, by the attention `rank` to a token of each cluster of
/// `sizes`, both f64 `(p, units, k)`: the fewest where there is no attention to any.
fn budgets(rank: &Tensor, sizes: &Tensor, r: &Routed<'_>) -> Result<Tensor> {
    let (p, units, k) = rank.dims3()?;
    if r.least == r.most {
        return Ok(Tensor::full(r.most as f64, (p, units, 1), rank.device())?);
    }
    let ranked = ranking(rank, sizes)?;
    let mass = (rank * sizes)?.gather(&ranked, 2)?;
    let through = cumsum_last(&mass)?;
    let enough = (through.narrow(2, k - 1, 1)? * r.share)?;
    let needed = (through - mass)?.broadcast_lt(&enough)?.to_dtype(DType::F64)?;
    let tokens = (needed * sizes.gather(&ranked, 2)?)?.sum_keepdim(2)?;
    Ok(tokens.maximum(r.least as f64)?.minimum(r.most as f64)?)
}
