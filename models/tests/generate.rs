//! What the example `generate` counts and compares, on a small Llama of random weights.

// The models name these as parts of their own crate.
extern crate candle_core as candle;
use candle_transformers::{quantized_nn, utils};

mod common;
#[path = "../examples/generate/llama.rs"]
mod llama;

use anyhow::Result;
use candle::{quantized::gguf_file::Content, Device, Tensor};
use candle_flash_kmeans::nn::{ClusteredAttention, ClusteredKvCache, KvBudget};
use llama::{original, patched};
use models::decode::{likeliest, share_read, Written};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::io::Cursor;

const VOCABULARY: usize = 50;
const PROMPT: usize = 60;
const WRITTEN: usize = 40;

/// Segments are short, so that a test's tokens are clustered several times.
fn attention() -> ClusteredAttention {
    let cache = ClusteredKvCache::new(64).sinks(2).recent(8).cluster_size(4).segment(8);
    ClusteredAttention::new(cache, KvBudget::new(usize::MAX)).auto_cluster(false)
}

/// Tokens, and what the model says after each.
fn text(tokens: &[u32]) -> Result<Written> {
    let mut rest = tokens[1..].iter();
    Written::new(tokens[0], tokens.len(), |_| Ok(*rest.next().expect("so many are asked for")), |_| Ok(()))
}

#[test]
fn texts_are_compared_token_by_token() -> Result<()> {
    let a = text(&[1, 2, 3, 4, 5])?;
    assert_eq!(a.tokens, [1, 2, 3, 4, 5]);
    assert!(a.rate > 0.0);
    assert_eq!(a.first_difference(&text(&[1, 2, 3, 4, 5])?), None);
    assert_eq!(a.first_difference(&text(&[1, 2, 9, 4, 9])?), Some(2));
    // Asked after each token of the text, whatever was said before.
    let mut asked = vec![];
    let agreement = a.agreement(|token| {
        asked.push(token);
        Ok(if token == 3 { 9 } else { token + 1 })
    })?;
    assert_eq!((agreement, asked), (0.75, vec![1, 2, 3, 4]));
    Ok(())
}

#[test]
fn a_share_counts_tokens_means_and_positions() -> Result<()> {
    let mut cache = ClusteredKvCache::new(128).sinks(2).recent(8).cluster_size(4).segment(8);
    let random = |columns| Tensor::randn(0f32, 1f32, (1, 2, 100, columns), &Device::Cpu);
    cache.append(&random(8)?, &random(4)?)?;
    assert_eq!(share_read(&cache, 5, 3)?, 1.0);
    cache.cluster()?;
    // A token has 48 bytes. Ten are in no cluster; 23 clusters have means, each found by a position, as each listed token is.
    assert_eq!(share_read(&cache, 5, 3)?, (10 * 48 + 23 * 52 + 3 * 5 * 52) as f64 / 4800.0);
    assert_eq!(share_read(&cache, 89, 1)?, (10 * 48 + 23 * 52 + 89 * 52) as f64 / 4800.0);
    assert_eq!(share_read(&cache, 90, 1)?, 1.0);
    Ok(())
}

/// All go on from the state that the patched model has after the prompt, which stays as it is.
#[test]
fn models_go_on_from_one_prompt() -> Result<()> {
    let bytes = common::gguf(VOCABULARY)?;
    let content = || Content::read(&mut Cursor::new(&bytes));
    let mut model = patched::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &Device::Cpu)?;
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let ids: Vec<u32> = (0..PROMPT + WRITTEN).map(|_| rng.random_range(0..VOCABULARY as u32)).collect();
    let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
    for (i, ids) in ids[..PROMPT].chunks(25).enumerate() {
        model.forward(&row(ids)?, 25 * i)?;
    }
    assert!(ClusteredAttention::cluster_layers(model.layers_mut())?);

    let mut own = original::ModelWeights::from_gguf(content()?, &mut Cursor::new(&bytes), &Device::Cpu)?;
    own.set_caches(model.caches()?);
    let mut all = model.clone();
    let mut few = model.clone();
    few.layers_mut().for_each(|layer| layer.set_budget(KvBudget::new(4).estimate(false).dense_if_cheaper(false)));
    let (mut apart, mut largest) = ([0f32; 2], 0f32);
    for (i, id) in ids.iter().enumerate().skip(PROMPT) {
        let id = row(&[*id])?;
        let want = own.forward(&id, i)?;
        let worst = |t: Tensor| t.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        largest = largest.max(worst(want.clone())?);
        for (apart, model) in apart.iter_mut().zip([&mut all, &mut few]) {
            *apart = apart.max(worst((model.forward_and_cluster(&id, i)? - &want)?)?);
        }
    }
    assert!(apart[0] < 1e-4 * largest && apart[1] > 1e-3 * largest, "{apart:?} off, of up to {largest}");
    assert!(model.layers().all(|layer| layer.offset() == PROMPT));
    let clustered = |model: &patched::ModelWeights| {
        let layer = model.layers().next().expect("there are two");
        layer.cache().clusters().expect("there are clusters").labels.dims()[2]
    };
    assert!(clustered(&few) > clustered(&model));
    assert_eq!(likeliest(&Tensor::new(&[[0f32, 3.0, 2.0]], &Device::Cpu)?)?, 1);
    Ok(())
}
