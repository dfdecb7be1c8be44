//! Codebooks that learn while a model trains.

use super::{
    quantized::{Quantized, Usage},
    quantizer::{commitment, largest, load_codebook, open, save, widened},
    replicas::{Batches, Replicas},
    rotation::rotate_to,
    Codebook,
};
use crate::{
    error::{Error, Result},
    functional::{self, quantize},
    kmeans::KMeans,
    memory::Fence,
    metric::Metric,
    primitives,
    problem::{Problem, MAX_ROWS},
    row_weights::{self, Clusters, RowWeights},
    rows::Rows,
    running_means::{check_running, unit_vectors, RunningMeans},
};
use candle_core::{DType, Device, Tensor};
use std::{path::Path, sync::Arc};

/// Settings of a codebook that learns while a model trains. Names and defaults are those of vector-quantize-pytorch, but that
/// gradients are rotated only where that is asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ema {
    /// Share of the old that a step keeps (0.8).
    pub decay: f64,
    /// Rows added to every entry's size before its sum is divided by that, the total staying as it is: Laplace's smoothing
    /// (1e-5); see [`EmaCodebook`].
    pub eps: f64,
    /// An entry of fewer rows, by the moving average, is dead: it moves to a row of the batch (0: never; at most 2^32).
    pub threshold_ema_dead_code: f64,
    /// Factor of the loss (1).
    pub commitment_weight: f64,
    /// The seed of the rows that dead entries move to (0).
    pub seed: u64,
    /// Whether gradients pass by [`rotate_to`](crate::nn::rotate_to), rather than unchanged (no).
    pub rotation_trick: bool,
}

impl Default for Ema {
    fn default() -> Self {
        Self {
            decay: 0.8,
            eps: 1e-5,
            threshold_ema_dead_code: 0.0,
            commitment_weight: 1.0,
            seed: 0,
            rotation_trick: false,
        }
    }
}

impl Ema {
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |argument, got, expected| Err(Error::Value { argument, got, expected });
        if !(0.0..=1.0).contains(&self.decay) {
            return refuse("decay", self.decay, "between 0 and 1");
        }
        if self.threshold_ema_dead_code > MAX_ROWS as f64 {
            return refuse(
                "threshold_ema_dead_code",
                self.threshold_ema_dead_code,
                "at most the rows of a batch, 2^32",
            );
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
/// In a step whose rows of entry `i` have the weight `n` (their number, without sample weights) and the sum `s`, with `g` for
/// [`Ema::decay`]:
/// ```text
/// N[i] <- g N[i] + (1 - g) n          how many rows it has had, and
/// m[i] <- g m[i] + (1 - g) s          their sum, by moving averages
/// e[i] <- m[i] / N'[i]   where n > 0  the entry, with N'[i] = (N[i] + eps) / (sum(N) + k eps) * sum(N)
/// ```
/// `N'` is Laplace's smoothing of the sizes, as in vector-quantize-pytorch: an entry of few rows is not divided by next to
/// nothing. An entry that has no rows in a step stays where it is: by that formula it would move to the origin, because `N` goes
/// to 0 and `eps` stays. The entry keeps its mean `m / N`, which does not change, however long `N` decays.
///
/// By cosine rows count by their directions, and an entry is `m` as a unit vector; by inner product it is a mean, too.
///
/// Rows that say nothing weigh nothing: those that hold a NaN or an infinity, and by cosine those of length 0. They have some
/// code in range and its entry for a value, but no part in the codebook, the usage, the loss and its gradient, and no dead entry
/// moves to them: the codebook is to the bit as without them. So it is with rows of weight 0, such as padding.
///
/// Rows of half types may have entries in f32: they are widened, the loss is f32, and values come in the rows' type.
///
/// The averages are kept in f64. A step queues work and reads nothing back. The same rows and seed give the same codebook. To
/// encode and decode, ask the [`codebook`](Self::codebook).
#[derive(Clone, Debug)]
pub struct EmaCodebook {
    fence: Fence,
    codebook: Codebook,
    ema: Ema,
    /// `N`, and `m / N`.
    running: RunningMeans,
    steps: u64,
    batches: Batches,
}

impl EmaCodebook {
    /// Goes on from a codebook, as if each entry had seen one row.
    ///
    /// # Errors
    /// Refuses settings out of range, and [`Metric::Manhattan`], whose centroids are not means.
    pub fn new(codebook: Codebook, ema: Ema) -> Result<Self> {
        let (k, d, device) = (codebook.k(), codebook.d(), codebook.centroids.device());
        let b = codebook.centroids.elem_count() / (k * d);
        let sizes = Tensor::ones((b, k), DType::F64, device)?;
        Self::with_sizes(codebook, sizes, ema)
    }

    /// Starts from a fit of `x` `(..batch, n, d)` and the weights of its clusters, in which rows that say nothing weigh nothing
    /// either, where [`KMeans::check_finite`] lets them in.
    ///
    /// # Errors
    /// As [`KMeans::fit`] and [`new`](Self::new), before any work.
    pub fn train(x: &Tensor, kmeans: &KMeans, ema: Ema) -> Result<Self> {
        Self::check(kmeans.metric, ema)?;
        let fit = row_weights::fit(x, kmeans)?;
        let sizes = row_weights::cluster_weights(x, kmeans, &fit)?;
        Self::with_sizes(Codebook::of(&fit), sizes, ema)
    }

    fn check(metric: Metric, ema: Ema) -> Result<()> {
        ema.check()?;
        check_running(metric, "entries that are moving averages")
    }

    pub(super) fn with_sizes(codebook: Codebook, weights: Tensor, ema: Ema) -> Result<Self> {
        Self::check(codebook.metric, ema)?;
        let shape = [weights.dims(), &[codebook.d()]].concat();
        let mut means = codebook.centroids.to_dtype(DType::F64)?.reshape(shape)?;
        if codebook.metric == Metric::Cosine {
            means = unit_vectors(&means)?;
        }
        let running = RunningMeans { metric: codebook.metric, means, weights };
        let fence = Fence::default();
        fence.write(running.means.device())?;
        Ok(Self { fence, codebook, ema, running, steps: 0, batches: Batches::default() })
    }

    /// Learns from the rows of all replicas from now on: each step adds up the weights and sums of all, and dead entries move to rows of
    /// any, so that codebooks that were the same stay so, to the bit. They have to start the same (from [`train`](Self::train) on the same rows,
    /// or a file), and to step together. A step's usage is that of all rows, and its loss that of the replica's own.
    ///
    /// Codebooks are those of one process that has the rows of all, in the order of replicas, but for the rounding of f64; where several
    /// problems, or stages, share one codebook, dead entries draw other rows. [`save`](Self::save) writes no replicas.
    ///
    /// # Errors
    /// Refuses a rank that is none of so many replicas. Steps then also fail as [`Replicas::all_reduce`] does, and refuse what it returns
    /// in another shape or dtype or on another device.
    pub fn replicas(self, replicas: Arc<dyn Replicas>) -> Result<Self> {
        Ok(Self { batches: Batches::of_all(replicas)?, ..self })
    }

    /// The codebook as it is now.
    pub fn codebook(&self) -> &Codebook {
        self.fence.show(self.running.means.device());
        &self.codebook
    }

    /// The settings.
    pub fn ema(&self) -> Ema {
        self.ema
    }

    /// Rows of each entry by the moving average, or their weight, f64 `(..batch, k)`.
    pub fn cluster_size(&self) -> Result<Tensor> {
        self.fence.read(self.running.means.device())?;
        let rank = self.codebook.centroids.rank();
        Ok(self.running.weights.reshape(&self.codebook.centroids.dims()[..rank - 1])?)
    }

    /// Quantises `x` `(..batch, n, d)` for a forward pass in training, then moves the codebook towards it.
    ///
    /// # Errors
    /// As [`assign`](crate::assign). Refuses `x` without rows.
    pub fn step(&mut self, x: &Tensor) -> Result<Quantized> {
        self.learn(x, None, None)
    }

    /// The same with weights of the rows, float `(..batch, n)` or `(n)`: in the averages, the loss and the usage. A weight that is
    /// not a finite number above 0 is none, so that a mask of zeros and ones sets padding aside.
    ///
    /// # Errors
    /// As [`step`](Self::step). Refuses weights of other shapes, dtypes and devices.
    pub fn step_weighted(&mut self, x: &Tensor, sample_weights: &Tensor) -> Result<Quantized> {
        self.learn(x, None, Some(sample_weights))
    }

    /// Quantises `x` as [`step`](Self::step) does, and leaves the codebook as it is: for validation, and for one that is frozen.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn quantize(&self, x: &Tensor) -> Result<Quantized> {
        self.quantize_as(x, None, None)
    }

    /// The same with weights, as [`step_weighted`](Self::step_weighted) takes them.
    ///
    /// # Errors
    /// As [`step_weighted`](Self::step_weighted).
    pub fn quantize_weighted(&self, x: &Tensor, sample_weights: &Tensor) -> Result<Quantized> {
        self.quantize_as(x, None, Some(sample_weights))
    }

    /// The same with these `codes`, or those of the nearest entries.
    pub(super) fn quantize_as(
        &self,
        x: &Tensor,
        codes: Option<&Tensor>,
        sample_weights: Option<&Tensor>,
    ) -> Result<Quantized> {
        self.fence.read(self.running.means.device())?;
        Ok(self.pass(x, codes, sample_weights, &Batches::default())?.0)
    }

    /// The steps so far.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// What training sees of `x`, its rows in f64, which of them count, and the means by entry of all batches.
    fn pass(
        &self,
        x: &Tensor,
        codes: Option<&Tensor>,
        sample_weights: Option<&Tensor>,
        batches: &Batches,
    ) -> Result<(Quantized, Rows<'static>, RowWeights, Clusters)> {
        let (x, dtype) = (&widened(x, self.codebook.centroids.dtype())?, x.dtype());
        let p = Problem::assign(x, &self.codebook.centroids, self.codebook.metric)?;
        if x.elem_count() == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: usize::MAX });
        }
        primitives::check_counted("x", x)?;
        let (b, k, d) = self.running.means.dims3()?;
        let n = p.b * p.n / b;
        let given = sample_weights.map(|w| row_weights::sample_weights(&p, w, x.device())?.reshape((b, n)));
        let (mut values, codes) = match codes {
            Some(codes) => {
                let values = functional::rows_of(&self.codebook.centroids, codes)?;
                (functional::straight_through(x, values)?, codes.clone())
            }
            None => quantize(x, &self.codebook.centroids, self.codebook.metric)?,
        };
        let flat = x.detach().reshape((b, n, d))?;
        let weights = RowWeights::new(&Rows::new(&flat)?, given.transpose()?.as_ref(), p.metric)?;
        // Means are rounded to the rows' type.
        let rows = Rows::new(&flat.to_dtype(DType::F64)?)?;
        let loss = (commitment(x, &values, weights.weights())? * self.ema.commitment_weight)?;
        let batch = batches.clusters(weights.clusters(&rows, &codes.reshape((b, n))?, k)?)?;
        let usage = Usage::of(&batch.weights, &self.codebook.centroids.dims()[..self.codebook.centroids.rank() - 2])?;
        if self.ema.rotation_trick {
            values = rotate_to(x, &values)?;
        }
        let values = values.to_dtype(dtype)?;
        Ok((Quantized { values, codes, loss, usage }, rows, weights, batch))
    }

    /// A step with these codes or those of the nearest entries, and with weights of the rows or without.
    pub(super) fn learn(
        &mut self,
        x: &Tensor,
        codes: Option<&Tensor>,
        sample_weights: Option<&Tensor>,
    ) -> Result<Quantized> {
        self.fence.write(self.running.means.device())?;
        let (quantized, rows, weights, batch) = self.pass(x, codes, sample_weights, &self.batches)?;
        let (b, k, d) = self.running.means.dims3()?;
        let Ema { decay, threshold_ema_dead_code: threshold, .. } = self.ema;
        let mut running = self.running.clone();
        let learned = running.add(&batch, decay, 1.0 - decay)?;
        let mut entries = self.entries(&running, &learned)?;
        if threshold > 0.0 {
            let dead = running.weights.lt(threshold)?;
            let shares = row_weights::shares(&dead, self.ema.seed, self.steps)?;
            let (mut drawn, any) = self.batches.rows_at(&shares, &rows, &weights)?;
            if running.metric == Metric::Cosine {
                drawn = unit_vectors(&drawn)?;
            }
            // Where no row counts, there is nothing to start again from.
            let dead = any.broadcast_as((b, k))?.where_cond(&dead, &dead.zeros_like()?)?;
            let all = dead.unsqueeze(2)?.broadcast_as((b, k, d))?;
            entries = all.where_cond(&drawn, &entries)?;
            running.means = all.where_cond(&drawn, &running.means)?;
            let size = (running.weights.ones_like()? * threshold)?;
            running.weights = dead.where_cond(&size, &running.weights)?;
        }
        let entries = entries.to_dtype(self.codebook.centroids.dtype())?;
        self.codebook.centroids = entries.reshape(self.codebook.centroids.shape())?;
        self.running = running;
        self.steps = self.steps.wrapping_add(1);
        Ok(quantized)
    }

    /// The entries of new averages where `learned` is set, and else as they are, f64 `(b, k, d)`.
    fn entries(&self, running: &RunningMeans, learned: &Tensor) -> Result<Tensor> {
        let (shape, eps) = (running.means.dims3()?, self.ema.eps);
        let old = self.codebook.centroids.reshape(shape)?.to_dtype(DType::F64)?;
        let (new, moved) = if running.metric == Metric::Cosine {
            // Directions that cancel leave none to move to.
            let norms = primitives::norms(&Rows::new(&running.means)?)?;
            (running.centroids()?, norms.gt(0.0)?.where_cond(learned, &learned.zeros_like()?)?)
        } else {
            let sizes = &running.weights;
            let mean = (functional::totals(sizes)?.unsqueeze(1)? / shape.1 as f64)?;
            // `N'`, divided first so that no eps overflows it.
            let smoothed =
                (sizes + eps)?.broadcast_div(&row_weights::or_one(&(&mean + eps)?)?)?.broadcast_mul(&mean)?;
            let scale = (sizes / row_weights::or_one(&smoothed)?)?;
            // Smoothing makes large entries larger, and the largest no infinity.
            let most = largest(self.codebook.centroids.dtype());
            (running.means.broadcast_mul(&scale.unsqueeze(2)?)?.clamp(-most, most)?, learned.clone())
        };
        Ok(moved.unsqueeze(2)?.broadcast_as(shape)?.where_cond(&new, &old)?)
    }

    /// The same with entries of another float dtype, each rounded once, for rows of that dtype.
    ///
    /// # Errors
    /// Refuses entries that are not finite in it (the host waits for that answer).
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self { codebook: self.codebook.to_dtype(dtype)?, ..self.clone() })
    }

    /// The same on another device.
    ///
    /// # Errors
    /// Fails where a device does.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.fence.read(self.running.means.device())?;
        let (codebook, running, fence) =
            (self.codebook.to_device(device)?, self.running.to_device(device)?, Fence::default());
        fence.write(device)?;
        Ok(Self { fence, codebook, running, ..self.clone() })
    }

    /// Writes the codebook with its averages and settings as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.fence.read(self.running.means.device())?;
        let Ema { decay, eps, threshold_ema_dead_code, commitment_weight, seed, rotation_trick } = self.ema;
        let state = [("means", &self.running.means), ("weights", &self.running.weights)];
        let settings = [
            ("decay", decay.to_string()),
            ("eps", eps.to_string()),
            ("threshold_ema_dead_code", threshold_ema_dead_code.to_string()),
            ("commitment_weight", commitment_weight.to_string()),
            ("seed", seed.to_string()),
            ("rotation_trick", rotation_trick.to_string()),
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
            // Files of before have none.
            rotation_trick: file.states("rotation_trick") && file.setting("rotation_trick")?,
        };
        let (steps, codebook) = (file.setting("steps")?, load_codebook(&mut file, 0)?);
        let mut loaded = Self::new(codebook, ema).map_err(|e| file.bad(e.to_string()))?;
        let shape = loaded.running.means.dims().to_vec();
        let (means, weights) = (file.take("means")?, file.take("weights")?);
        loaded.running = RunningMeans { means, weights, ..loaded.running }.checked(&file, &shape)?;
        Ok(Self { steps, ..loaded })
    }
}
