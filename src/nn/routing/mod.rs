//! Attention in which groups of queries read the keys that matter to them.

mod groups;
mod reference;

use super::parts::{check_like, check_scale, dims4_float};
use crate::{
    error::{Error, Result},
    functional,
    kmeans::{Init, KMeans},
    memory::{Fence, Memory},
    primitives,
    request::{Order, Routed, RoutedGroups},
};
use candle_core::{DType, Tensor};
use groups::{blocks, choosers, for_each_head, Warm};
use rand::{seq::SliceRandom, SeedableRng};
use rand_chacha::ChaCha8Rng;
use reference::masked;

/// Rows of a problem: tokens are listed in u32, whose last bit marks a cluster that stands for its tokens.
const MAX_TOKENS: usize = 1 << 30;
/// The grouping of tokens.
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

/// The grouped keys that a group of queries reads: one at least.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum KeyBudget {
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
/// key groups, and the group reads their tokens in that order, exactly as many as [`KeyBudget`] says, the last group in part. What
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
/// On a GPU, f16 and bf16 rows of 64, 80, 96, 112, 128 or 256 columns (of 256 where blocks have 100 KB of shared memory) are attended by
/// one kernel that reads rows where they lie, in the order of the groups' lists, so that nothing is permuted or copied and no mask
/// exists. For others, and on the CPU, Candle's products compute all scores and a mask removes those that are not read, which is no faster than attention. The host waits for
/// nothing, and no gradient flows. Without queries the result is empty.
///
/// A clone goes on by itself, from the same centroids.
///
/// Sources: query and key clusters as in Yang et al. 2025 (Sparse VideoGen2), with each query's own softmax instead of
/// that of their mean; estimates inside the softmax as in Hooper et al. 2025 (Multipole attention).
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_flash_kmeans::nn::{KeyBudget, RoutedAttention};
///
/// let random = |heads, n| Tensor::randn(0f32, 1f32, (1, heads, n, 64), &Device::Cpu);
/// let mut attention = RoutedAttention::new(KeyBudget::Share(0.1));
/// let out = attention.forward(&random(6, 512)?, &random(2, 512)?, &random(2, 512)?, 0.125)?;
/// assert_eq!(out.dims(), [1, 6, 512, 64]); // three query heads share a key head
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Debug)]
pub struct RoutedAttention {
    fence: Fence,
    read: KeyBudget,
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
    pub fn new(read: KeyBudget) -> Self {
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

    /// Sets the grouping of keys.
    pub fn keys(mut self, keys: Grouping) -> Self {
        self.keys = keys;
        self
    }

    /// Sets the grouping of queries.
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
    /// training and to the evaluation of predictions, as of every routing that ranks rows against each other (Roy et al. 2021, Routing
    /// Transformer; Zhou et al. 2022, expert choice). With it, the groups are blocks of neighbouring queries, as many as
    /// [`queries`](Self::queries) says in whatever grouping, and a block reads what the block before it and its own first query
    /// choose; the first block of a chunk what its first query chooses, and a block of one what that chooses.
    ///
    /// At a tenth of the keys (16 a cluster) of SmolLM2's activations in `assets/` the output's relative error is 0.051 with
    /// blocks of 1 query, 0.090 with 2, 0.111 with 4 and 0.130 with 16, where clusters of 16 queries that choose together have
    /// 0.071 and blocks of 16 have 0.084. Small blocks cost time: a GPU reads each list for at least 64 queries. Where a model copies
    /// token by token, as SmolLM2 does code, only blocks of 1 are of use (`docs/routed_attention.md`): what the block before has read is
    /// not what the next query looks for.
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
            primitives::check_counted(argument, t)?;
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
            let [mean_keys, mean_values] = [&keys, &values].map(|t| functional::means_by_order(t, &groups));
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
        match primitives::route(&routed, &self.memory)? {
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
            KeyBudget::Tokens(count) => (0.0, count as f64, count as f64),
            KeyBudget::Share(share) => (0.0, of(check("share", share)?), of(share)),
            KeyBudget::TopP { p, least, most } => {
                (check("p", p)?, of(check("least", least)?), of(check("most", most)?.max(least)))
            }
        };
        // A query without sinks has to read something.
        Ok([p, least.clamp(1.0, tokens.max(1) as f64), most.clamp(1.0, tokens.max(1) as f64)])
    }

    /// Groups the rows of `x` `(b, heads, n, d)`, `size` to a group on average.
    fn group(&mut self, which: usize, x: &Tensor, size: usize) -> Result<Order> {
        let n = x.dims()[2];
        let k = n.div_ceil(size);
        match [self.keys, self.queries][which] {
            Grouping::Blocks(_) => blocks(x, size),
            Grouping::Random(_) => {
                let mut groups: Vec<u32> = (0..n).map(|i| (i / size) as u32).collect();
                groups.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
                primitives::order(&for_each_head(groups, x)?.flatten(0, 1)?, k)
            }
            Grouping::Clusters(_) => {
                let start = self.warm[which].as_ref().map(|warm| warm.start(x, k)).transpose()?.flatten();
                let passes = self.passes[start.is_some() as usize];
                let settings = KMeans::new(k).init(start.map_or(Init::Even, Init::Given)).max_iters(passes).tol(0.0);
                let mut fit = settings.check_finite(false).prepare(x.shape(), x.dtype(), x.device())?;
                fit.run(x)?;
                let groups = primitives::order(&fit.labels().flatten(0, 1)?, k)?;
                let centroids = fit.centroids().clone();
                let sizes = primitives::cluster_sizes(&groups.offsets)?.reshape(&centroids.dims()[..3])?;
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
