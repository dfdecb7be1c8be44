//! Codebooks that learn while a model trains.

use super::{commitment, load_codebook, open, save, Codebook};
use crate::{
    functional,
    ops::{self, Fence},
    quantize, Error, KMeans, Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use rand::{seq::index, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// How a codebook learns while a model trains. Names and defaults are those of vector-quantize-pytorch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ema {
    /// Share of the old that a step keeps (0.8).
    pub decay: f64,
    /// Rows added to every entry's size when its mean is taken, the total staying as it is: Laplace's smoothing (1e-5).
    pub eps: f64,
    /// An entry of fewer rows, by the moving average, is dead: it moves to a row of the batch (0: never).
    pub threshold_ema_dead_code: f64,
    /// Factor of the loss (1).
    pub commitment_weight: f64,
    /// The seed of the rows that dead entries move to (0).
    pub seed: u64,
}

impl Default for Ema {
    fn default() -> Self {
        Self { decay: 0.8, eps: 1e-5, threshold_ema_dead_code: 0.0, commitment_weight: 1.0, seed: 0 }
    }
}

impl Ema {
    fn check(&self) -> Result<()> {
        let refuse = |argument, got, expected| Err(Error::Value { argument, got, expected });
        if !(0.0..=1.0).contains(&self.decay) {
            return refuse("decay", self.decay, "between 0 and 1");
        }
        let rest = [
            ("eps", self.eps),
            ("threshold_ema_dead_code", self.threshold_ema_dead_code),
            ("commitment_weight", self.commitment_weight),
        ];
        match rest.into_iter().find(|(_, v)| !(*v >= 0.0 && v.is_finite())) {
            Some((argument, got)) => refuse(argument, got, "a finite number of at least 0"),
            None => Ok(()),
        }
    }
}

/// A codebook that follows the rows it is given: each entry is the moving average of the rows nearest to it, and entries that
/// get too few start again from a row (van den Oord et al. 2017, appendix A; dead codes as in SoundStream, Zeghidour et al.
/// 2021).
///
/// The averages are kept in f64. A step queues work and reads nothing back. The same rows and seed give the same codebook.
#[derive(Clone, Debug)]
pub struct EmaCodebook {
    fence: Fence,
    codebook: Codebook,
    ema: Ema,
    /// f64 `(b, k)` and `(b, k, d)`.
    cluster_size: Tensor,
    embed_avg: Tensor,
    steps: u64,
}

/// What [`EmaCodebook::step`] makes of a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Quantized {
    /// Each row's nearest entry before the step, shaped and typed as the rows, with a straight-through gradient.
    pub values: Tensor,
    /// The entries' numbers, u32 `(..batch, n)`.
    pub codes: Tensor,
    /// The commitment loss times its weight, a scalar.
    pub loss: Tensor,
    /// How much of the codebook the batch used.
    pub usage: Usage,
}

/// How much of a codebook some codes use.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Usage {
    /// Entries in use, u32 `(..batch)`.
    pub codes_used: Tensor,
    /// The exponential of the entropy of the codes, f64 `(..batch)`: `k` if all are used alike, 1 if one is.
    pub perplexity: Tensor,
}

impl Usage {
    /// From the sizes of the clusters, u32 `(b, k)`.
    pub(super) fn of(sizes: &Tensor, batch: &[usize]) -> Result<Self> {
        let sizes = sizes.to_dtype(DType::F64)?;
        let share = sizes.broadcast_div(&functional::totals(&sizes)?.unsqueeze(1)?)?;
        // The logarithm of the smallest normal number stands in for that of 0, which its factor 0 drops.
        let entropy = functional::totals(&(&share * share.maximum(f64::MIN_POSITIVE)?.log()?)?)?.neg()?;
        let used = functional::totals(&sizes.gt(0.0)?.to_dtype(DType::F64)?)?;
        Ok(Self { codes_used: used.to_dtype(DType::U32)?.reshape(batch)?, perplexity: entropy.exp()?.reshape(batch)? })
    }
}

impl EmaCodebook {
    /// Goes on from a codebook, as if each entry had seen one row.
    ///
    /// # Errors
    /// Refuses settings out of range, and metrics other than squared Euclidean, whose centroids are not means.
    pub fn new(codebook: Codebook, ema: Ema) -> Result<Self> {
        let (k, d, device) = (codebook.k(), codebook.d(), codebook.centroids.device());
        let b = codebook.centroids.elem_count() / (k * d);
        let sizes = Tensor::ones((b, k), DType::F64, device)?;
        Self::with_sizes(codebook, sizes, ema)
    }

    /// Starts from a fit of `x` `(..batch, n, d)` and the sizes of its clusters.
    ///
    /// # Errors
    /// As [`KMeans::fit`] and [`new`](Self::new).
    pub fn train(x: &Tensor, kmeans: &KMeans, ema: Ema) -> Result<Self> {
        let fit = kmeans.fit(x)?;
        let sizes = fit.counts.to_dtype(DType::F64)?.reshape(((), kmeans.k))?;
        Self::with_sizes(Codebook::of(&fit), sizes, ema)
    }

    fn with_sizes(codebook: Codebook, cluster_size: Tensor, ema: Ema) -> Result<Self> {
        ema.check()?;
        if codebook.metric != Metric::SquaredEuclidean {
            let (got, with) = (codebook.metric.name().into(), "entries that are moving averages".into());
            return Err(Error::Conflict { argument: "metric", got, with });
        }
        let shape = [cluster_size.dims(), &[codebook.d()]].concat();
        let entries = codebook.centroids.reshape(shape)?.to_dtype(DType::F64)?;
        let embed_avg = entries.broadcast_mul(&cluster_size.unsqueeze(2)?)?;
        let fence = Fence::default();
        fence.write(embed_avg.device())?;
        Ok(Self { fence, codebook, ema, cluster_size, embed_avg, steps: 0 })
    }

    /// The codebook as it is now.
    pub fn codebook(&self) -> &Codebook {
        self.fence.show(self.embed_avg.device());
        &self.codebook
    }

    /// The settings.
    pub fn ema(&self) -> Ema {
        self.ema
    }

    /// Rows of each entry by the moving average, f64 `(..batch, k)`.
    pub fn cluster_size(&self) -> Result<Tensor> {
        self.fence.read(self.cluster_size.device())?;
        let rank = self.codebook.centroids.rank();
        Ok(self.cluster_size.reshape(&self.codebook.centroids.dims()[..rank - 1])?)
    }

    /// Quantises `x` `(..batch, n, d)` for a forward pass in training, then moves the codebook towards it.
    ///
    /// # Errors
    /// As [`assign`](crate::assign). Refuses `x` without rows.
    pub fn step(&mut self, x: &Tensor) -> Result<Quantized> {
        ops::check_counted("x", x)?;
        self.fence.write(self.embed_avg.device())?;
        let (values, codes) = quantize(x, &self.codebook.centroids, self.codebook.metric)?;
        let loss = (commitment(x, &values)? * self.ema.commitment_weight)?;
        let usage = self.update(x, &codes)?;
        Ok(Quantized { values, codes, loss, usage })
    }

    /// One step of the averages. `codes` are known to be in range.
    fn update(&mut self, x: &Tensor, codes: &Tensor) -> Result<Usage> {
        let (k, d, dtype) = (self.codebook.k(), self.codebook.d(), x.dtype());
        let b = self.cluster_size.dim(0)?;
        if codes.elem_count() == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: usize::MAX });
        }
        let n = codes.elem_count() / b;
        // Sums of halves would overflow their own type.
        let wide = if dtype == DType::F64 { dtype } else { DType::F32 };
        let (x, codes) = (x.detach().reshape((b, n, d))?.to_dtype(wide)?, codes.reshape((b, n))?);
        let (sums, sizes) = functional::sums_and_sizes(&x, &codes, k)?;
        let usage = Usage::of(&sizes, &self.codebook.centroids.dims()[..self.codebook.centroids.rank() - 2])?;

        let Ema { decay, eps, threshold_ema_dead_code: threshold, .. } = self.ema;
        let mix = |old: &Tensor, new: &Tensor| (old * decay)? + (new.to_dtype(DType::F64)? * (1.0 - decay))?;
        let mut cluster_size = mix(&self.cluster_size, &sizes)?;
        let mut embed_avg = mix(&self.embed_avg, &sums)?;
        let total = functional::totals(&cluster_size)?.unsqueeze(1)?;
        let smoothed = (&cluster_size + eps)?.broadcast_mul(&(&total / (&total + k as f64 * eps)?)?)?;
        let mut entries = embed_avg.broadcast_div(&smoothed.unsqueeze(2)?)?;

        if threshold > 0.0 {
            let rows = self.draw(b, n, k, x.device())?;
            let rows = functional::rows_of(&x, &rows)?.to_dtype(DType::F64)?;
            let dead = cluster_size.lt(threshold)?;
            let all = dead.unsqueeze(2)?.broadcast_as(entries.shape())?.contiguous()?;
            entries = all.where_cond(&rows, &entries)?;
            embed_avg = all.where_cond(&(&rows * threshold)?, &embed_avg)?;
            cluster_size = dead.where_cond(&(cluster_size.ones_like()? * threshold)?, &cluster_size)?;
        }
        let shape = self.codebook.centroids.shape();
        self.codebook.centroids = entries.to_dtype(dtype)?.reshape(shape)?;
        (self.cluster_size, self.embed_avg) = (cluster_size, embed_avg);
        self.steps += 1;
        Ok(usage)
    }

    /// A row for each entry to start again from, u32 `(b, k)`: different ones while there are any.
    fn draw(&self, b: usize, n: usize, k: usize, device: &Device) -> Result<Tensor> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.ema.seed);
        rng.set_stream(self.steps);
        let mut rows = Vec::with_capacity(b * k);
        for _ in 0..b {
            let drawn = index::sample(&mut rng, n, k.min(n)).into_vec();
            rows.extend(drawn.into_iter().cycle().take(k).map(|row| row as u32));
        }
        Ok(Tensor::from_vec(rows, (b, k), device)?)
    }

    /// Writes the codebook with its averages and settings as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.fence.read(self.embed_avg.device())?;
        let Ema { decay, eps, threshold_ema_dead_code, commitment_weight, seed } = self.ema;
        let state = [("cluster_size", &self.cluster_size), ("embed_avg", &self.embed_avg)];
        let settings = [
            ("decay", decay.to_string()),
            ("eps", eps.to_string()),
            ("threshold_ema_dead_code", threshold_ema_dead_code.to_string()),
            ("commitment_weight", commitment_weight.to_string()),
            ("seed", seed.to_string()),
            ("steps", self.steps.to_string()),
        ];
        save(path.as_ref(), "ema_codebook", &[&self.codebook], &state, &settings)
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`: training goes on as if it had not stopped.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved codebook of this kind.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = open(path.as_ref(), "ema_codebook", device)?;
        let ema = Ema {
            decay: file.setting("decay")?,
            eps: file.setting("eps")?,
            threshold_ema_dead_code: file.setting("threshold_ema_dead_code")?,
            commitment_weight: file.setting("commitment_weight")?,
            seed: file.setting("seed")?,
        };
        let (steps, codebook) = (file.setting("steps")?, load_codebook(&mut file, 0)?);
        let mut loaded = Self::new(codebook, ema).map_err(|e| file.bad(e.to_string()))?;
        for (name, state) in [("cluster_size", &mut loaded.cluster_size), ("embed_avg", &mut loaded.embed_avg)] {
            let t = file.take(name)?;
            if (t.dims(), t.dtype()) != (state.dims(), DType::F64) {
                return Err(file.bad(format!("tensor {name} is {:?} {:?}", t.dtype(), t.dims())));
            }
            *state = t;
        }
        Ok(Self { steps, ..loaded })
    }
}
