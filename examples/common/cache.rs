//! The KV cache in `assets/`, split into what every query reads and what a method may choose from.

use anyhow::{Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};

/// The texts in the file, each with half of the heads.
pub const TEXTS: [&str; 2] = ["code", "prose"];
/// Every query reads the first tokens: models park attention there.
const SINKS: usize = 4;
const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/smollm2_qkv.safetensors");

/// Every head of both texts, f32. Rows of `queries` are the query heads of a key head, each at the last positions.
pub struct Cache {
    /// (heads, rows, dim), scaled for the softmax
    pub queries: Tensor,
    /// (heads, tokens, dim): what a budget is spent on
    pub keys: Tensor,
    pub values: Tensor,
    /// (heads, sinks + recent, dim): what every query reads
    pub near_keys: Tensor,
    pub near_values: Tensor,
    /// (rows, sinks + recent): 0 where a row may look, minus infinity where the token comes later
    pub near_mask: Tensor,
}

impl Cache {
    pub fn load(device: &Device) -> Result<Self> {
        let tensors = safetensors::load(ASSETS, device).with_context(|| format!("cannot load {ASSETS}"))?;
        let f32 = |name: &str| anyhow::Ok(tensors.get(name).context("a tensor is missing")?.to_dtype(DType::F32)?);
        let queries = f32("queries")?;
        let (_, _, group, positions, dim) = queries.dims5()?;
        let queries = (queries.flatten(0, 1)?.flatten(1, 2)? * (1.0 / (dim as f64).sqrt()))?;
        let (keys, values) = (f32("keys")?.flatten(0, 1)?, f32("values")?.flatten(0, 1)?);

        let prefix = keys.dim(1)? - positions;
        let near = |x: &Tensor| Tensor::cat(&[x.narrow(1, 0, SINKS)?, x.narrow(1, prefix, positions)?], 1);
        let far = |x: &Tensor| x.narrow(1, SINKS, prefix - SINKS)?.contiguous();
        let mask: Vec<f32> = (0..group * positions)
            .flat_map(|row| (0..SINKS + positions).map(move |token| token > SINKS + row % positions))
            .map(|later| if later { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let near_mask = Tensor::from_vec(mask, (group * positions, SINKS + positions), device)?;
        let (near_keys, near_values) = (near(&keys)?, near(&values)?);
        Ok(Self { queries, keys: far(&keys)?, values: far(&values)?, near_keys, near_values, near_mask })
    }

    /// (heads, query heads of the group, dim): the queries of the last position alone, as in decoding.
    #[allow(dead_code)] // Every example compiles this file and uses its own part of it.
    pub fn last_queries(&self) -> Result<Tensor> {
        let (heads, rows, dim) = self.queries.dims3()?;
        let positions = self.near_keys.dim(1)? - SINKS;
        let queries = self.queries.reshape((heads, rows / positions, positions, dim))?;
        Ok(queries.get_on_dim(2, positions - 1)?.contiguous()?)
    }
}
