//! Layers for Candle models, built on the crate's ops, on the tensor's own device.

mod attention;
mod codebook;
mod kv_cache;
mod lut;
mod parts;
mod routing;

pub use attention::ClusteredAttention;
pub use codebook::{
    codebook_encode, rotate_to, Codebook, Ema, EmaCodebook, EmaResidualQuantizer, Fsq, GainShapeQuantizer,
    GroupedResidualQuantizer, LearnableCodebook, Lfq, LfqConfig, ProductConfig, ProductQuantizer, Quantized,
    ReplicaRank, Replicas, ResidualQuantized, ResidualQuantizer, Rotation, Usage,
};
pub use kv_cache::{ClusteredKvCache, KvBudget, KvClusters, KvCodes, KvMeans};
pub use lut::{Granularity, LutConfig, LutLinear, LutWeights};
pub use routing::{Grouping, KeyBudget, RoutedAttention};
