//! Codebooks that learn one after the other what those before them leave over.

use super::{
    ema::{Ema, EmaCodebook},
    quantized::{Quantized, Usage},
    quantizer::widened,
    replicas::Replicas,
    residual::{check_stages, MAX_STAGES},
    rotation::rotate_to,
    ResidualQuantizer,
};
use crate::{
    error::{Error, Result},
    functional,
    kmeans::KMeans,
    problem::Problem,
};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

/// A [`ResidualQuantizer`] that follows the rows it is given: a stage is an [`EmaCodebook`] of what the stages before it leave over (SoundStream,
/// Zeghidour et al. 2021). Stages may share one codebook, which then learns from all of them at once, and training may leave out the last ones,
/// so that any number of codes says something (quantizer dropout, there).
///
/// Each stage pulls what it quantises to its entry; the values, a sum of entries, pass gradients straight to the rows, once.
#[derive(Clone, Debug)]
pub struct EmaResidualQuantizer {
    /// One for all, or one each.
    codebooks: Vec<EmaCodebook>,
    stages: usize,
    /// Choices of codes that are kept after each stage.
    beam: usize,
    /// The fewest stages that a step has, if it may have fewer than all, and the seed of that number.
    dropout: Option<(usize, u64)>,
}

/// [`EmaResidualQuantizer::step`] makes this of a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ResidualQuantized {
    /// The sum of each row's entries, shaped and typed as the rows, with a straight-through gradient.
    pub values: Tensor,
    /// The entries' numbers, u32 `(..batch, n, s)`, of the `s` stages that the step had.
    pub codes: Tensor,
    /// The sum of the stages' losses, a scalar.
    pub loss: Tensor,
    /// The share of each stage's codebook that its rows used; of a shared codebook one, that all used.
    pub usage: Vec<Usage>,
}

impl EmaResidualQuantizer {
    /// Of a codebook for each stage.
    ///
    /// # Errors
    /// As [`ResidualQuantizer::new`].
    pub fn new(stages: Vec<EmaCodebook>) -> Result<Self> {
        ResidualQuantizer::new(stages.iter().map(|stage| stage.codebook().clone()).collect())?;
        Ok(Self { stages: stages.len(), codebooks: stages, beam: 1, dropout: None })
    }

    /// Of one codebook for so many stages.
    ///
    /// # Errors
    /// Refuses no stages, and more than 1024.
    pub fn shared(codebook: EmaCodebook, stages: usize) -> Result<Self> {
        check_stages(stages, MAX_STAGES)?;
        Ok(Self { codebooks: vec![codebook], stages, beam: 1, dropout: None })
    }

    /// Starts from a [`ResidualQuantizer`] of `x` `(..batch, n, d)`, as if each entry had seen the rows of its cluster, as
    /// [`EmaCodebook::train`] does.
    ///
    /// # Errors
    /// As [`ResidualQuantizer::train`] and [`EmaCodebook::train`].
    pub fn train(x: &Tensor, stages: usize, kmeans: &KMeans, ema: Ema) -> Result<Self> {
        ema.check()?;
        let trained = ResidualQuantizer::train_with_sizes(x, stages, kmeans)?;
        let codebooks = trained.into_iter().map(|(stage, sizes)| EmaCodebook::with_sizes(stage, sizes, ema));
        Self::new(codebooks.collect::<Result<_>>()?)
    }

    /// Lets each step have any number of stages from `least` on, as likely as any other, by a seed.
    ///
    /// # Errors
    /// Refuses no stages and more than there are.
    pub fn quantize_dropout(self, least: usize, seed: u64) -> Result<Self> {
        check_stages(least, self.stages)?;
        Ok(Self { dropout: Some((least, seed)), ..self })
    }

    /// Codes are those of a [beam search](ResidualQuantizer::encode_beam) of this width over the stages of a step, in training and without
    /// (`beam_size` of vector-quantize-pytorch), and stages learn from what they leave over.
    ///
    /// # Errors
    /// As there.
    pub fn beam(self, width: usize) -> Result<Self> {
        self.quantizer()?.check_beam(width)?;
        Ok(Self { beam: width, ..self })
    }

    /// Every stage learns from the rows of all replicas from now on, as [`EmaCodebook::replicas`] has it; with dropout all have the same
    /// stages in a step.
    ///
    /// # Errors
    /// As there.
    pub fn replicas(self, replicas: Arc<dyn Replicas>) -> Result<Self> {
        let codebooks = self.codebooks.into_iter().map(|codebook| codebook.replicas(replicas.clone()));
        Ok(Self { codebooks: codebooks.collect::<Result<_>>()?, ..self })
    }

    /// The number of stages.
    pub fn stages(&self) -> usize {
        self.stages
    }

    /// The codebooks with their averages, first stage first: one, if it is shared. They are saved one by one.
    pub fn codebooks(&self) -> &[EmaCodebook] {
        &self.codebooks
    }

    /// The quantiser as it is now, to encode and decode.
    ///
    /// # Errors
    /// Fails where the device does.
    pub fn quantizer(&self) -> Result<ResidualQuantizer> {
        ResidualQuantizer::new((0..self.stages).map(|stage| self.codebook(stage).codebook().clone()).collect())
    }

    fn is_shared(&self) -> bool {
        self.codebooks.len() < self.stages
    }

    fn codebook(&self, stage: usize) -> &EmaCodebook {
        &self.codebooks[if self.is_shared() { 0 } else { stage }]
    }

    /// Quantises `x` `(..batch, n, d)` for a forward pass in training, then moves the codebooks.
    ///
    /// # Errors
    /// As [`EmaCodebook::step`].
    pub fn step(&mut self, x: &Tensor) -> Result<ResidualQuantized> {
        self.learn(x, None)
    }

    /// The same with weights of the rows, as [`EmaCodebook::step_weighted`] takes them.
    ///
    /// # Errors
    /// As there.
    pub fn step_weighted(&mut self, x: &Tensor, sample_weights: &Tensor) -> Result<ResidualQuantized> {
        self.learn(x, Some(sample_weights))
    }

    /// Quantises `x` by all stages, and leaves the codebooks as they are.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn quantize(&self, x: &Tensor) -> Result<ResidualQuantized> {
        self.pass(x, None)
    }

    /// The same with weights of the rows, as [`step_weighted`](Self::step_weighted) takes them: for a loss that leaves padding out.
    ///
    /// # Errors
    /// As there.
    pub fn quantize_weighted(&self, x: &Tensor, sample_weights: &Tensor) -> Result<ResidualQuantized> {
        self.pass(x, Some(sample_weights))
    }

    /// The same for rows of another float dtype, as [`EmaCodebook::to_dtype`] has it.
    ///
    /// # Errors
    /// As there.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.with_codebooks(|codebook| codebook.to_dtype(dtype))
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.with_codebooks(|codebook| codebook.to_device(device))
    }

    fn with_codebooks(&self, f: impl Fn(&EmaCodebook) -> Result<EmaCodebook>) -> Result<Self> {
        Ok(Self { codebooks: self.codebooks.iter().map(f).collect::<Result<_>>()?, ..self.clone() })
    }

    fn pass(&self, x: &Tensor, sample_weights: Option<&Tensor>) -> Result<ResidualQuantized> {
        let rows = widened(x, self.codebook(0).codebook().centroids().dtype())?;
        let (mut left, mut all) = (rows, Vec::with_capacity(self.stages));
        let codes = self.codes(&left, self.stages)?;
        for stage in 0..self.stages {
            let quantized = self.codebook(stage).quantize_as(&left, codes.get(stage), sample_weights)?;
            left = (left - quantized.values.detach())?;
            all.push(quantized);
        }
        self.summed(x, all)
    }

    fn learn(&mut self, x: &Tensor, sample_weights: Option<&Tensor>) -> Result<ResidualQuantized> {
        let stages = self.drawn();
        let mut left = widened(x, self.codebook(0).codebook().centroids().dtype())?;
        if self.is_shared() {
            return self.learn_shared(x, left, sample_weights, stages);
        }
        let mut all = Vec::with_capacity(stages);
        let codes = self.codes(&left, stages)?;
        for (stage, codebook) in self.codebooks[..stages].iter_mut().enumerate() {
            let quantized = codebook.learn(&left, codes.get(stage), sample_weights)?;
            left = (left - quantized.values.detach())?;
            all.push(quantized);
        }
        self.summed(x, all)
    }

    /// All stages have the entries of before the step, which learn from what every stage quantises.
    fn learn_shared(
        &mut self,
        x: &Tensor,
        mut left: Tensor,
        sample_weights: Option<&Tensor>,
        stages: usize,
    ) -> Result<ResidualQuantized> {
        if left.rank() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
        }
        let (rows_dim, n) = (left.rank() - 2, left.dims()[left.rank() - 2]);
        let codes = self.codes(&left, stages)?;
        let codebook = &mut self.codebooks[0];
        if let Some(weights) = sample_weights {
            // Before they are repeated for the stages.
            Problem::assign(&left, codebook.codebook().centroids(), codebook.codebook().metric())?
                .weights(weights, x.device())?;
        }
        let mut lefts = vec![left.clone()];
        for stage in 1..stages {
            left = (&left - codebook.quantize_as(&left, codes.get(stage - 1), None)?.values.detach())?;
            lefts.push(left.clone());
        }
        let codes = (!codes.is_empty()).then(|| Tensor::cat(&codes, rows_dim)).transpose()?;
        let weights = sample_weights.map(|w| Tensor::cat(&vec![w; stages], w.rank().max(1) - 1)).transpose()?;
        let all = codebook.learn(&Tensor::cat(&lefts, rows_dim)?, codes.as_ref(), weights.as_ref())?;
        // The loss is a mean over the rows of all stages.
        let loss = (&all.loss * stages as f64)?;
        let stage = |i: usize| {
            let part = |t: &Tensor| Ok::<_, Error>(t.narrow(rows_dim, i * n, n)?);
            Ok((part(&all.values)?, part(&all.codes)?))
        };
        let (values, codes): (Vec<_>, Vec<_>) = (0..stages).map(stage).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        self.result(x, values, &codes, loss, vec![all.usage.clone()])
    }

    /// The codes of so many stages by the beam, u32 `(..batch, n)` each; none without one, where each stage's are its nearest.
    fn codes(&self, rows: &Tensor, stages: usize) -> Result<Vec<Tensor>> {
        if self.beam == 1 {
            return Ok(vec![]);
        }
        let codes = self.quantizer()?.first(stages)?.encode_beam(rows, self.beam)?;
        let last = codes.rank() - 1;
        (0..stages).map(|stage| Ok(codes.narrow(last, stage, 1)?.squeeze(last)?.contiguous()?)).collect()
    }

    fn summed(&self, x: &Tensor, all: Vec<Quantized>) -> Result<ResidualQuantized> {
        let loss = all.iter().skip(1).try_fold(all[0].loss.clone(), |sum, q| sum + &q.loss)?;
        let usage = all.iter().map(|q| q.usage.clone()).collect();
        let (values, codes): (Vec<_>, Vec<_>) = all.into_iter().map(|q| (q.values, q.codes)).unzip();
        self.result(x, values, &codes, loss, usage)
    }

    fn result(
        &self,
        x: &Tensor,
        values: Vec<Tensor>,
        codes: &[Tensor],
        loss: Tensor,
        usage: Vec<Usage>,
    ) -> Result<ResidualQuantized> {
        let total = values[1..].iter().try_fold(values[0].detach(), |sum, value| sum + value.detach())?;
        let total = total.to_dtype(x.dtype())?;
        let values = match self.codebook(0).ema().rotation_trick {
            true => rotate_to(x, &total)?,
            false => functional::straight_through(x, total)?,
        };
        Ok(ResidualQuantized { values, codes: Tensor::stack(codes, codes[0].rank())?, loss, usage })
    }

    /// The stages of the next step.
    fn drawn(&self) -> usize {
        let Some((least, seed)) = self.dropout else { return self.stages };
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(self.codebooks[0].steps());
        rng.random_range(least..=self.stages)
    }
}
