//! Models of candle-transformers with `drop_in/*.patch` applied, which replace their attention by `ClusteredAttention`, beside the
//! models as they are: the same logits where the budget is for all tokens, at every step.

// What the models name as parts of their own crate.
extern crate candle_core as candle;
pub use candle_transformers::{quantized_nn, utils};

#[allow(warnings, clippy::all)]
mod models {
    pub use candle_transformers::models::with_tracing;
    pub mod gemma3 {
        include!(concat!(env!("OUT_DIR"), "/gemma3.rs"));
    }
    pub mod llama {
        include!(concat!(env!("OUT_DIR"), "/llama.rs"));
    }
    pub mod quantized_llama {
        include!(concat!(env!("OUT_DIR"), "/quantized_llama.rs"));
    }
    pub mod qwen3 {
        include!(concat!(env!("OUT_DIR"), "/qwen3.rs"));
    }
}

mod common;

use candle::{quantized::gguf_file, DType, Device, Result, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
use candle_nn::{Activation, VarBuilder, VarMap};
use candle_transformers::models as original;
use common::{gguf, random};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{cell::Cell, io::Cursor};

thread_local!(static BUDGET: Cell<KvBudget> = const { Cell::new(KvBudget::new(usize::MAX)) });

/// The layers that the patched models make. Segments are short, so that a test's tokens are clustered several times.
pub fn attention() -> ClusteredAttention {
    let cache = ClusteredKvCache::new(64).sinks(2).recent(8).cluster_size(4).segment(8);
    ClusteredAttention::new(cache, BUDGET.get())
}

const VOCABULARY: usize = 50;
const PROMPT: usize = 21;
const STEPS: usize = 60;

/// Token ids, and the number of tokens before them, to logits.
type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;

/// The model of both sources, `make(patched, weights)`, over one map of random weights.
fn from_random_weights(make: impl Fn(bool, VarBuilder) -> Result<Forward>) -> Result<[Forward; 2]> {
    let map = VarMap::new();
    let weights = || VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    // The first model only names the weights.
    drop(make(false, weights())?);
    let mut variables: Vec<_> = map.data().lock().unwrap().clone().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for (_, variable) in variables {
        variable.set(&Tensor::from_vec(
            random(variable.elem_count(), 0.4, &mut rng),
            variable.shape(),
            &Device::Cpu,
        )?)?;
    }
    Ok([make(false, weights())?, make(true, weights())?])
}

/// A prompt, steps and a further prompt of both models: the largest difference of their logits, and their largest logit.
fn compare([original, patched]: [&mut Forward; 2], batch: usize) -> Result<[f32; 2]> {
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let (mut offset, mut found) = (0, [0f32; 2]);
    for rows in [PROMPT].into_iter().chain([1; STEPS]).chain([7, 1, 1]) {
        let ids = (0..batch * rows).map(|_| rng.random_range(0..VOCABULARY as u32)).collect();
        let ids = Tensor::from_vec(ids, (batch, rows), &Device::Cpu)?;
        let [want, got] = [original(&ids, offset)?, patched(&ids, offset)?];
        assert_eq!(want.dims(), got.dims());
        let largest = |t: Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        assert!(got.sum_all()?.to_scalar::<f32>()?.is_finite());
        found = [found[0].max(largest((&want - got)?)?), found[1].max(largest(want)?)];
        offset += rows;
    }
    Ok(found)
}

/// The logits after the last of several rows.
fn row_by_row(
    ids: &Tensor,
    offset: usize,
    forward: &mut dyn FnMut(&Tensor, usize) -> Result<Tensor>,
) -> Result<Tensor> {
    let rows = ids.dims()[1];
    let logits = (0..rows).map(|i| forward(&ids.narrow(1, i, 1)?.contiguous()?, offset + i));
    Ok(logits.collect::<Result<Vec<_>>>()?.pop().expect("there are rows"))
}

/// The same logits with a budget for all, in two conversations, and others with a budget for few.
fn check(make: impl Fn() -> Result<[Forward; 2]>) -> Result<()> {
    for batch in [1, 2] {
        BUDGET.set(KvBudget::new(usize::MAX));
        let [mut original, mut patched] = make()?;
        for conversation in 0..2 {
            let [difference, largest] = compare([&mut original, &mut patched], batch)?;
            let what = format!("conversation {conversation} of {batch}: {difference} off, of up to {largest}");
            assert!(difference < 1e-4 * largest.max(1.0) && largest > 0.1, "{what}");
        }
        BUDGET.set(KvBudget::new(4).estimate(false).dense_if_cheaper(false));
        let [mut original, mut patched] = make()?;
        let [difference, largest] = compare([&mut original, &mut patched], batch)?;
        assert!(difference > 1e-3 * largest, "a budget of 4 reads all: {difference} off, of up to {largest}");
    }
    Ok(())
}

/// A configuration of Llama, and its model, from either source.
macro_rules! llama {
    ($models:ident, $weights:expr) => {{
        let config = $models::llama::Config {
            hidden_size: 64,
            intermediate_size: 96,
            vocab_size: VOCABULARY,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            use_flash_attn: false,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            bos_token_id: None,
            eos_token_id: None,
            rope_scaling: None,
            max_position_embeddings: 256,
            tie_word_embeddings: false,
        };
        let model = $models::llama::Llama::load($weights, &config)?;
        (config, model)
    }};
}

/// A new conversation begins with a new cache.
macro_rules! with_cache {
    ($models:ident, $weights:expr) => {{
        let (config, model) = llama!($models, $weights);
        let new = move || $models::llama::Cache::new(true, DType::F32, &config, &Device::Cpu);
        let mut cache = new()?;
        Box::new(move |ids: &Tensor, offset: usize| {
            if offset == 0 {
                cache = new()?;
            }
            model.forward(ids, offset, &mut cache)
        }) as Forward
    }};
}

/// All tokens in every call.
macro_rules! without_cache {
    ($models:ident, $weights:expr) => {{
        let (config, model) = llama!($models, $weights);
        let mut cache = $models::llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
        let mut before: Option<Tensor> = None;
        Box::new(move |ids: &Tensor, offset: usize| {
            let all = match before.take().filter(|_| offset > 0) {
                Some(before) => Tensor::cat(&[&before, ids], 1)?,
                None => ids.clone(),
            };
            before = Some(all.clone());
            model.forward(&all, 0, &mut cache)
        }) as Forward
    }};
}

#[test]
fn llama() -> Result<()> {
    check(|| {
        from_random_weights(|patched, weights| {
            Ok(if patched { with_cache!(models, weights) } else { with_cache!(original, weights) })
        })
    })
}

#[test]
fn llama_without_a_cache() -> Result<()> {
    BUDGET.set(KvBudget::new(4).dense_if_cheaper(false));
    let [mut original, mut patched] = from_random_weights(|patched, weights| {
        Ok(if patched { without_cache!(models, weights) } else { without_cache!(original, weights) })
    })?;
    let [difference, largest] = compare([&mut original, &mut patched], 2)?;
    assert!(difference < 1e-4 * largest.max(1.0) && largest > 0.1, "{difference} off, of up to {largest}");
    Ok(())
}

macro_rules! qwen3 {
    ($models:ident, $weights:expr) => {{
        let config = $models::qwen3::Config {
            vocab_size: VOCABULARY,
            hidden_size: 48,
            intermediate_size: 96,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            head_dim: 16,
            attention_bias: true,
            num_key_value_heads: 2,
            max_position_embeddings: 256,
            sliding_window: None,
            max_window_layers: 0,
            tie_word_embeddings: false,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-6,
            use_sliding_window: false,
            hidden_act: Activation::Silu,
        };
        let mut model = $models::qwen3::ModelForCausalLM::new(&config, $weights)?;
        Box::new(move |ids: &Tensor, offset: usize| {
            if offset == 0 {
                model.clear_kv_cache();
            }
            model.forward(ids, offset)
        }) as Forward
    }};
}

#[test]
fn qwen3() -> Result<()> {
    check(|| {
        from_random_weights(|patched, weights| {
            Ok(if patched { qwen3!(models, weights) } else { qwen3!(original, weights) })
        })
    })
}

/// Every second layer has a window, which a conversation outgrows; scores are bounded.
macro_rules! gemma3 {
    ($models:ident, $weights:expr) => {{
        let config = $models::gemma3::Config {
            attention_bias: false,
            head_dim: 16,
            hidden_activation: Activation::GeluPytorchTanh,
            hidden_size: 48,
            intermediate_size: 96,
            num_attention_heads: 4,
            num_hidden_layers: 4,
            // The original fails for several rows of more.
            num_key_value_heads: 1,
            rms_norm_eps: 1e-6,
            rope_theta: 10_000.0,
            rope_local_base_freq: 1_000.0,
            vocab_size: VOCABULARY,
            final_logit_softcapping: None,
            attn_logit_softcapping: Some(3.0),
            query_pre_attn_scalar: 16,
            sliding_window: 24,
            sliding_window_pattern: 2,
            max_position_embeddings: 256,
        };
        let mut model = $models::gemma3::Model::new(false, &config, $weights)?;
        Box::new(move |ids: &Tensor, offset: usize| {
            if offset == 0 {
                model.clear_kv_cache();
            }
            // The original fails for several rows behind others that fill its window.
            let mut forward = |ids: &Tensor, offset| model.forward(ids, offset);
            if offset == 0 {
                forward(ids, offset)
            } else {
                row_by_row(ids, offset, &mut forward)
            }
        }) as Forward
    }};
}

#[test]
fn gemma3() -> Result<()> {
    check(|| {
        from_random_weights(|patched, weights| {
            Ok(if patched { gemma3!(models, weights) } else { gemma3!(original, weights) })
        })
    })
}

/// A new conversation begins at position 0, without a word.
macro_rules! quantized_llama {
    ($models:ident, $bytes:expr) => {{
        let mut file = Cursor::new($bytes);
        let content = gguf_file::Content::read(&mut file)?;
        let mut model = $models::quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu)?;
        Box::new(move |ids: &Tensor, offset: usize| {
            // The original fails for several rows of several sequences.
            let mut forward = |ids: &Tensor, offset| model.forward(ids, offset);
            if ids.dims()[0] == 1 {
                forward(ids, offset)
            } else {
                row_by_row(ids, offset, &mut forward)
            }
        }) as Forward
    }};
}

#[test]
fn quantized_llama() -> Result<()> {
    let bytes = gguf(VOCABULARY)?;
    check(|| Ok([quantized_llama!(original, &bytes), quantized_llama!(models, &bytes)]))
}

/// The patches are as short as is promised.
#[test]
fn patches_add_ten_lines_at_most() {
    for entry in std::fs::read_dir("drop_in").unwrap() {
        let patch = std::fs::read_to_string(entry.unwrap().path()).unwrap();
        let added = patch.lines().filter(|line| line.starts_with('+') && !line.starts_with("+++")).count();
        assert!((1..=10).contains(&added), "{added} lines: {patch}");
    }
}
