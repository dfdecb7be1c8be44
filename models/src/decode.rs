//! Greedy decoding, what it reads of a cache, and how two texts of it compare.

use anyhow::{Context, Result};
use candle_core::{Tensor, D};
use candle_flash_kmeans::nn::ClusteredKvCache;
use std::time::Instant;

/// The likeliest token by the logits `(1, vocabulary)`.
pub fn likeliest(logits: &Tensor) -> Result<u32> {
    Ok(logits.argmax(D::Minus1)?.squeeze(0)?.to_scalar()?)
}

/// A text that was written token by token.
pub struct Written {
    pub tokens: Vec<u32>,
    /// Tokens a second
    pub rate: f64,
}

impl Written {
    /// `count` tokens: `first`, and after each the one that `step` says. `show` sees each as it comes. The first step is not timed, since a
    /// clone of a cache copies it then.
    pub fn new(
        first: u32,
        count: usize,
        mut step: impl FnMut(u32) -> Result<u32>,
        mut show: impl FnMut(u32) -> Result<()>,
    ) -> Result<Self> {
        let mut tokens = vec![first];
        let mut start = Instant::now();
        show(first)?;
        while tokens.len() < count {
            tokens.push(step(tokens[tokens.len() - 1])?);
            show(tokens[tokens.len() - 1])?;
            if tokens.len() == 2 {
                start = Instant::now();
            }
        }
        Ok(Self { rate: count.saturating_sub(2) as f64 / start.elapsed().as_secs_f64(), tokens })
    }

    /// The number of tokens before the first that is not the other's; `None` where all are.
    pub fn first_difference(&self, other: &Self) -> Option<usize> {
        self.tokens.iter().zip(&other.tokens).position(|(a, b)| a != b)
    }

    /// The share of this text's tokens after the first that `step` says, too, after the token before.
    pub fn agreement(&self, mut step: impl FnMut(u32) -> Result<u32>) -> Result<f64> {
        let mut same = 0;
        for pair in self.tokens.windows(2) {
            same += (step(pair[0])? == pair[1]) as usize;
        }
        Ok(same as f64 / (self.tokens.len() - 1) as f64)
    }
}

/// The share of a cache's bytes that one new token reads, whose query heads, so many to a key head, each choose `budget` clustered tokens
/// of their own: the keys and values of these, counted for each head, of all tokens outside of clusters and of the clusters' means,
/// and the positions by which clusters and tokens are found.
pub fn share_read(cache: &ClusteredKvCache, budget: usize, heads: usize) -> Result<f64> {
    let (keys, values) = (cache.k()?.context("the cache is empty")?, cache.v()?.context("the cache is empty")?);
    let (tokens, columns) = (keys.dims()[2], keys.dims()[3] + values.dims()[3]);
    let token = columns * keys.dtype().size_in_bytes();
    let Some(clusters) = cache.clusters() else { return Ok(1.0) };
    let clustered = clusters.labels.dims()[2];
    if budget >= clustered {
        return Ok(1.0);
    }
    let position = size_of::<u32>();
    let read = (tokens - clustered) * token + clusters.index_bytes() + heads * budget * (token + position);
    Ok(read as f64 / (tokens * token) as f64)
}
