//! The budget of tokens that are read of a cache.

/// The cost of a cluster, whose mean is scored, ranked and weighed, in tokens that are read in a row.
const CLUSTER: f64 = 1.5;
/// The same for a token that is read by its place, by one query head. Both were measured on a CPU (`examples/decode.rs`, 32,768 tokens of 8
/// heads of 128 columns in f32, four query heads to each): 1.3, and 1.4 to 1.8.
const LISTED: f64 = 2.0;

/// [`ClusteredKvCache::attend`](super::ClusteredKvCache::attend) may read so much besides the sinks and the recent tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    pub(super) tokens: usize,
    pub(super) estimate: bool,
    pub(super) shared: bool,
    dense_if_cheaper: bool,
}

impl KvBudget {
    /// Each query head reads `tokens` clustered tokens of its own choice; all others are estimated.
    pub const fn new(tokens: usize) -> Self {
        Self { tokens, estimate: true, shared: false, dense_if_cheaper: true }
    }

    /// Whether tokens that are not read are estimated by their clusters' means (default: yes), or left out.
    pub fn estimate(mut self, estimate: bool) -> Self {
        self.estimate = estimate;
        self
    }

    /// Whether the query heads that share a key head choose together, by the sum of their softmaxes over the clusters
    /// (default: no). It reads a group's share of the cache once.
    pub fn shared(mut self, shared: bool) -> Self {
        self.shared = shared;
        self
    }

    /// Has a CPU read all tokens where the budget would cost no less (default: yes), which is exact. A cluster counts as 1.5
    /// of the clustered tokens, and each token of the budget as 2, once for each query head that chooses by itself. Without it a budget is
    /// kept whatever it costs, as where its error is measured. On a GPU, which has a kernel for clusters alone, it always is.
    pub fn dense_if_cheaper(mut self, yes: bool) -> Self {
        self.dense_if_cheaper = yes;
        self
    }

    /// Whether this reads less than all of the `clustered` tokens of a key head whose query heads choose in so many `units`, where to
    /// read all has a kernel (`dense`) or has none. One row counts, so that what rows see does not depend on their number.
    pub(super) fn reads_less(&self, clustered: usize, clusters: usize, units: usize, dense: bool) -> bool {
        let cost = CLUSTER * clusters as f64 + LISTED * self.tokens as f64 * units as f64;
        self.tokens < clustered && (!(self.dense_if_cheaper && dense) || cost < clustered as f64)
    }
}
