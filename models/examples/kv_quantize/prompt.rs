//! A prompt's keys and values, as they are and as they are stored.

use crate::{
    coder::{Coder, Method},
    product::{Coded, Rows},
    scalar,
};
use anyhow::{ensure, Context, Result};
use candle_core::{safetensors, DType, Device, Tensor};
use candle_flash_kmeans::Init;
use indicatif::ProgressBar;
use models::{
    smollm2::{attend, received, SmolLm2},
    timing::seconds,
};
use std::{collections::HashMap, path::Path};

/// Tokens at the start that stay exact in every method: models park attention there, and their keys are unlike others.
pub const SINKS: usize = 4;
/// The last tokens of a prompt tell what the next ones will read: the observation window of SnapKV (Li et al. 2024).
const WINDOW: usize = 256;

/// What a prompt has left in the caches of all blocks.
pub struct Prompt {
    /// f16 (layers x key heads, tokens, head_dim): before the rotation by position, unless `turned`
    keys: Tensor,
    turned: bool,
    /// f16 (layers x key heads, tokens, head_dim)
    values: Tensor,
    /// What the window's attention gives to each token, f32 (layers x key heads, tokens)
    read: Tensor,
}

/// A prompt has become this.
pub struct Stored {
    pub prompt: Prompt,
    pub keys: Coded,
    pub values: Coded,
    /// Of all training and coding
    pub seconds: f64,
}

impl Stored {
    /// Of a value, with everything that is kept with this prompt
    pub fn bits(&self) -> f64 {
        [&self.keys, &self.values].iter().map(|coded| coded.codes + coded.overhead).sum::<f64>() / 2.0
    }
}

impl Prompt {
    /// Runs the model over `ids` exactly; `bar` counts blocks.
    pub fn new(model: &SmolLm2, ids: &[u32], bar: &ProgressBar) -> Result<Self> {
        let (mut keys, mut values, mut read) = (vec![], vec![], vec![]);
        model.forward(ids, 0, |_, heads| {
            keys.push(heads.unrotated.to_dtype(DType::F16)?);
            values.push(heads.values.to_dtype(DType::F16)?);
            read.push(received(heads, WINDOW)?);
            bar.inc(1);
            attend(heads)
        })?;
        let [keys, values, read] = [keys, values, read].map(|of_layers| Tensor::cat(&of_layers, 0));
        Ok(Self { keys: keys?, turned: false, values: values?, read: read? })
    }

    /// The same from a file that has it, which is written if it is not there.
    pub fn kept(model: &SmolLm2, ids: &[u32], file: &Path, bar: &ProgressBar) -> Result<Self> {
        let device = model.embedding.device();
        if !file.exists() {
            let new = Self::new(model, ids, bar)?;
            let ids = Tensor::new(ids, &Device::Cpu)?;
            let tensors = [("keys", &new.keys), ("values", &new.values), ("read", &new.read), ("ids", &ids)];
            let tensors: HashMap<&str, Tensor> = tensors.into_iter().map(|(name, t)| (name, t.clone())).collect();
            safetensors::save(&tensors, file)?;
            return Ok(new);
        }
        let mut tensors = safetensors::load(file, device)?;
        let mut take = |name: &str| tensors.remove(name).with_context(|| format!("{} has no {name}", file.display()));
        let (keys, values, read) = (take("keys")?, take("values")?, take("read")?);
        ensure!(take("ids")?.to_vec1::<u32>()? == ids, "{} is of another text", file.display());
        Ok(Self { keys, turned: false, values, read })
    }

    pub fn tokens(&self) -> Result<usize> {
        Ok(self.keys.dim(1)?)
    }

    /// The prompt as `method` stores it; codebooks start from `init`, and what is of another text comes from `other`.
    pub fn stored(&self, model: &SmolLm2, method: Method, other: &Self, init: &Init) -> Result<Stored> {
        let turned = method.keys.turned();
        let of = |prompt: &Self| if turned { prompt.turned_keys(model) } else { Ok(prompt.keys.clone()) };
        let (all_keys, other_keys) = (of(self)?, of(other)?);
        let work = || {
            let keys = code(method.keys, &self.rows(&all_keys)?, &other.rows(&other_keys)?, init, scalar::by_channel)?;
            let values =
                code(method.values, &self.rows(&self.values)?, &other.rows(&other.values)?, init, scalar::by_token)?;
            Ok((keys, values))
        };
        let ((keys, values), seconds) = seconds(self.keys.device(), work)?;
        let whole = |all: &Tensor, coded: &Coded| Tensor::cat(&[&all.narrow(1, 0, SINKS)?, &coded.x], 1);
        let prompt = Self {
            keys: whole(&all_keys, &keys)?,
            turned,
            values: whole(&self.values, &values)?,
            read: self.read.clone(),
        };
        Ok(Stored { prompt, keys, values, seconds })
    }

    /// The logarithms of the next tokens' probabilities, (tokens, vocabulary), after each of `ids`, which follow the
    /// prompt and see each other exactly.
    pub fn follow(&self, model: &SmolLm2, ids: &[u32]) -> Result<Tensor> {
        let heads = model.dims.key_heads;
        let hidden = model.forward(ids, self.tokens()?, |layer, new| {
            let of = |all: &Tensor| all.narrow(0, layer * heads, heads)?.to_dtype(DType::F32);
            let keys = of(&self.keys)?;
            let keys = if self.turned { keys } else { model.rotate(&keys, 0)? };
            attend(&new.after(&keys, &of(&self.values)?)?)
        })?;
        model.log_probabilities(&hidden)
    }

    /// Keys as attention reads them.
    fn turned_keys(&self, model: &SmolLm2) -> Result<Tensor> {
        Ok(model.rotate(&self.keys.to_dtype(DType::F32)?, 0)?.to_dtype(DType::F16)?)
    }

    /// What is coded of all tokens' keys or values.
    fn rows(&self, all: &Tensor) -> Result<Rows> {
        let rest = |t: &Tensor| t.narrow(1, SINKS, t.dim(1)? - SINKS)?.contiguous();
        Ok(Rows { x: rest(all)?, read: rest(&self.read)? })
    }
}

type Integers = fn(&Tensor, usize) -> Result<(Tensor, f64)>;

fn code(coder: Coder, rows: &Rows, other: &Rows, init: &Init, integers: Integers) -> Result<Coded> {
    let scalar = |(x, overhead), bits: usize| Ok(Coded { x, codes: bits as f64, overhead, codebooks: 0 });
    match coder {
        Coder::Exact => scalar((rows.x.clone(), 0.0), 16),
        Coder::Integers { bits, .. } => scalar(integers(&rows.x, bits)?, bits),
        Coder::Turbo { bits, .. } => scalar(scalar::turbo(&rows.x, bits)?, bits),
        Coder::Product(product) => product.code(rows, other, init),
    }
}
