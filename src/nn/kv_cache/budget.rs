//! The budget of tokens that are read of a cache.

/// [`ClusteredKvCache::attend`](super::ClusteredKvCache::attend) may read so much besides the sinks and the recent tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBudget {
    pub(super) tokens: usize,
    pub(super) estimate: bool,
    pub(super) shared: bool,
}

impl KvBudget {
    /// Each query head reads `tokens` clustered tokens of its own choice; all others are estimated.
    pub const fn new(tokens: usize) -> Self {
        Self { tokens, estimate: true, shared: false }
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
}
