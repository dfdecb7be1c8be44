//! The budget of tokens that are read of a cache.

/// The cost of a cluster, whose mean is scored, ranked and weighed, in tokens that are read in a row. This and the others were measured on a
/// CPU (`examples/decode.rs`; `benches/record/decode-cpu-*.jsonl`).
const CLUSTER: f64 = 1.5;
/// The same for a token that is read by its place, by one query head, where all tokens do not fit in a processor's last cache: rows that lie
/// anywhere wait for memory, each by itself.
const LISTED: f64 = 2.5;
/// The same where they may fit: a row of all tokens is scored by several heads then, and one that is listed by one.
const LISTED_IN_CACHE: f64 = 1.0;
/// Keys and values of so many bytes may fit in a processor's last cache.
const CACHE: usize = 32 << 20;

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
    /// of the clustered tokens, and each token of the budget, once for each query head that chooses by itself, as one or, where all keys
    /// and values take more than 32 MiB, as 2.5. Without it a budget is kept whatever it costs, as where its error is measured. On a GPU,
    /// which has a kernel for clusters alone, it always is.
    pub fn dense_if_cheaper(mut self, yes: bool) -> Self {
        self.dense_if_cheaper = yes;
        self
    }

    /// True if this reads less than all of the `clustered` tokens of a key head, of `bytes` in all heads, whose query heads choose in so many
    /// `units`, where to read all has a kernel (`dense`) or has none. One row counts, so that what rows see does not depend on their number.
    pub(super) fn reads_less(
        &self,
        [clustered, bytes]: [usize; 2],
        clusters: usize,
        units: usize,
        dense: bool,
    ) -> bool {
        let listed = if bytes > CACHE { LISTED } else { LISTED_IN_CACHE };
        let cost = CLUSTER * clusters as f64 + listed * self.tokens as f64 * units as f64;
        self.tokens < clustered && (!(self.dense_if_cheaper && dense) || cost < clustered as f64)
    }
}
