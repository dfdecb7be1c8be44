//! Sequences of a batch that begin later than others.

use super::ClusteredKvCache;
use crate::{
    error::{Error, Result},
    nn::parts::masked_fill,
    problem,
};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// The tokens of a batch that are padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Padding {
    /// The first token of each sequence that is no padding.
    pub(super) starts: Arc<[usize]>,
    /// No sequence begins later, nor did one that a reorder has left out: the clusters lie behind it.
    pub(super) last: usize,
}

impl ClusteredKvCache {
    /// Says how many tokens of padding each sequence of the prompt begins with, u32 `(batch,)`, before any is stored. They are stored
    /// as zeros, whatever they are, never read and never clustered. What a query in the padding gets is zeros. The tokens before the
    /// last sequence's sinks stay out of the clusters, and the sequences that have begun by then read them exactly. The host waits
    /// for the numbers.
    ///
    /// A prompt that is padded on the right needs nothing for itself, since no token sees later ones, but no token can follow it.
    ///
    /// # Errors
    /// Refuses a cache that holds tokens, another dtype or number of dimensions, and more than 2^24 tokens.
    pub fn left_padding(&mut self, tokens: &Tensor) -> Result<()> {
        problem::check_dtype("tokens", tokens, DType::U32)?;
        if tokens.rank() != 1 {
            let (what, got) = ("number of dimensions", tokens.rank());
            return Err(Error::Size { argument: "tokens", what, got, expected: 1 });
        }
        if self.current_seq_len() + self.evicted > 0 {
            let (got, with) = ("padding".into(), format!("{} tokens that are stored", self.current_seq_len()));
            return Err(Error::Conflict { argument: "tokens", got, with });
        }
        let starts: Arc<[usize]> = tokens.to_vec1::<u32>()?.into_iter().map(|n| n as usize).collect();
        let last = starts.iter().copied().max().unwrap_or(0);
        if last > super::MAX_TOKENS {
            return Err(Error::TooLarge { argument: "tokens", got: last, limit: super::MAX_TOKENS });
        }
        self.padding = (last > 0).then_some(Padding { starts, last });
        Ok(())
    }

    pub(in crate::nn) fn is_padded(&self) -> bool {
        self.padding.is_some()
    }

    /// Refuses a batch of other sequences than those that are padded.
    pub(super) fn check_padding(&self, batch: usize) -> Result<()> {
        match &self.padding {
            Some(padding) if padding.starts.len() != batch => {
                let expected = padding.starts.len();
                Err(Error::Size { argument: "k", what: "number of sequences", got: batch, expected })
            }
            _ => Ok(()),
        }
    }

    /// Rows `(batch, any, n, columns)` of the tokens from `first` on, with zeros for those that are padding: a weight of 0 would not keep
    /// NaN out.
    pub(super) fn without_padding(&self, t: &Tensor, first: usize) -> Result<Tensor> {
        let (batch, _, n, _) = t.dims4()?;
        let Some(padding) = self.padding.as_ref().filter(|p| first < p.last && t.elem_count() > 0) else {
            return Ok(t.clone());
        };
        let is = padding.starts.iter().flat_map(|&start| (first..first + n).map(move |token| u8::from(token < start)));
        let is = Tensor::from_iter(is, t.device())?.reshape((batch, 1, n, 1))?;
        masked_fill(&is, t, 0.0)
    }
}
