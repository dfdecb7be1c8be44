//! Layers for Candle models, built on the crate's ops: on the tensor's own device, without a kernel of their own.

mod codebook;

pub use codebook::{
    codebook_encode, Codebook, Ema, EmaCodebook, ProductQuantizer, Quantized, ResidualQuantizer, Usage,
};
