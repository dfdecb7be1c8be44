//! Measures what a method costs a language model.

use crate::smollm2::picked;
use anyhow::Result;
use candle_core::{DType, Tensor};

/// How predictions, (positions, vocabulary) as logarithms, differ from the reference's.
pub struct Score {
    /// Mean Kullback-Leibler divergence from the reference, nats
    pub divergence: f64,
    pub perplexity: f64,
    /// Share of positions with the same most likely token
    pub agreement: f64,
}

impl Score {
    /// Of logarithms of probabilities (tokens, vocabulary), for the tokens that came `next`.
    pub fn new(full: &Tensor, predicted: &Tensor, next: &[u32]) -> Result<Self> {
        let divergence = (full.exp()? * (full - predicted)?)?.sum(1)?.mean_all()?.to_scalar::<f32>()? as f64;
        let loss = picked(predicted, next)?.neg()?.mean_all()?.to_scalar::<f32>()? as f64;
        let same = full.argmax(1)?.eq(&predicted.argmax(1)?)?.to_dtype(DType::F32)?;
        Ok(Self { divergence, perplexity: loss.exp(), agreement: same.mean_all()?.to_scalar::<f32>()? as f64 })
    }

    /// A row of a table in Markdown.
    pub fn print(&self, read: &str, method: &str) {
        let Self { divergence, perplexity, agreement } = self;
        println!("| {read} | {method} | {divergence:.4} | {perplexity:.3} | {:.1} % |", 100.0 * agreement);
    }
}
