//! Mini-batches of rows that memory does not hold.

use super::{
    options::StreamOptions, progress::Passes, reads::Reads, seeds::Seeds, source::Source, stream::check_stream,
};
use crate::{
    error::{Error, Result},
    fit::refuse_non_finite,
    kmeans::{Init, KMeans},
    lloyd::{feed::Pass, weights::Weights},
    minibatch::MiniBatch,
    primitives,
    problem::{self, Problem},
    rows::Rows,
    running_means::check_running,
};
use candle_core::{DType, Device, Tensor};
use rand::{seq::SliceRandom, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::ops::Range;

/// Rows of a batch, unless another number is set: enough for a GPU to work longer on them than it takes to launch what does.
const BATCH_ROWS: usize = 4096;

/// Passes of a [`MiniBatch`] over a source, each of which gives it all rows, batch by batch.
#[derive(Clone, Debug)]
pub struct Epochs {
    count: usize,
    batch_rows: usize,
    seed: Option<u64>,
}

impl Epochs {
    /// So many passes, in batches of 4,096 rows, in the order of the source.
    pub fn new(count: usize) -> Self {
        Self { count, batch_rows: BATCH_ROWS, seed: None }
    }

    /// Sets the rows of a batch, which is a step, but for the last batch of a pass, which may have fewer.
    pub fn batch_rows(mut self, rows: usize) -> Self {
        self.batch_rows = rows;
        self
    }

    /// Gives the batches of each pass in an order of its own, drawn by the seed. A batch is still of rows that follow each other, as a disk
    /// reads them best: what is sorted in a file stays together.
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// The batches of `n` rows in a pass, from 0, as they come.
    fn batches(&self, n: usize, epoch: usize) -> Vec<Range<usize>> {
        let rows = self.batch_rows;
        let mut batches: Vec<_> = (0..n.div_ceil(rows)).map(|i| i * rows..n.min((i + 1) * rows)).collect();
        if let Some(seed) = self.seed {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(epoch as u64);
            batches.shuffle(&mut rng);
        }
        batches
    }
}

impl MiniBatch {
    /// Mini-batch k-means (Sculley 2010) of a source: starts where [`KMeans::fit_stream`] does with this `init` and seed (by k-means|| from
    /// a sample, as by k-means++), in clusters that have had no rows yet, and [steps](Self::step_stream) through the passes. Weights of rows count in each step.
    ///
    /// Iterations, their end and empty clusters have no part in it. A row that is not finite weighs nothing, whatever
    /// [`check_finite`](KMeans::check_finite) says; where a start has fewer rows than clusters, these are some of them again, and zeros without any.
    ///
    /// # Errors
    /// As [`fit_stream`](KMeans::fit_stream) and [`step_stream`](Self::step_stream). Refuses [`n_init`](KMeans::n_init) above 1.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{Epochs, KMeans, MiniBatch, Source, StreamOptions};
    ///
    /// let source = Source::from_tensor(&Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?)?;
    /// let (options, epochs) = (StreamOptions::new(&Device::Cpu), Epochs::new(3).batch_rows(100).shuffled(1));
    /// let running = MiniBatch::train_stream(&source, &KMeans::new(8), &options, &epochs)?;
    /// assert_eq!(running.counts().sum_all()?.to_scalar::<f64>()?, 3000.);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn train_stream(
        source: &Source<'_>,
        kmeans: &KMeans,
        options: &StreamOptions,
        epochs: &Epochs,
    ) -> Result<Self> {
        let options = &options.opened()?;
        let mut running = Self::start_opened(source, kmeans, options, Some(epochs))?;
        running.steps(source, kmeans.weights.as_ref(), options, epochs)?;
        Ok(running)
    }

    /// A mini-batch where [`train_stream`](Self::train_stream) starts, before any step, so that it can have settings of its own, as
    /// [`reassignment_ratio`](Self::reassignment_ratio), before [`step_stream`](Self::step_stream).
    ///
    /// # Errors
    /// As [`train_stream`](Self::train_stream).
    pub fn start_stream(source: &Source<'_>, kmeans: &KMeans, options: &StreamOptions) -> Result<Self> {
        Self::start_opened(source, kmeans, &options.opened()?, None)
    }

    fn start_opened(
        source: &Source<'_>,
        kmeans: &KMeans,
        options: &StreamOptions,
        epochs: Option<&Epochs>,
    ) -> Result<Self> {
        check_running(kmeans.metric, "a mini-batch")?;
        let device = options.only_device("a mini-batch")?;
        let p = check_stream(kmeans, source, options)?;
        if kmeans.n_init > 1 {
            let with = "a mini-batch, which keeps one result".into();
            return Err(Error::Conflict { argument: "n_init", got: kmeans.n_init.to_string(), with });
        }
        if let Some(epochs) = epochs {
            epochs.check(source, options)?;
        }
        let weights = Weights::new(kmeans, &p, None, &Device::Cpu)?;
        // A row that weighs nothing is no seed.
        let settings = &kmeans.starting_on(device)?.check_finite(false);
        if let Init::Given(c) = &settings.init {
            refuse_non_finite("init", &primitives::max_abs_and_first_nonfinite(&Rows::new(c)?)?.1)?;
        }
        let start = Seeds { settings, p: &p, source, weights: weights.as_ref(), device }.centroids(0)?;
        Self::new(&finite_seeds(&start.squeeze(0)?)?, kmeans.metric)
    }

    /// Takes the rows of a source, a [step](Self::step) for each batch. The batches decide the result, and so nothing else does: neither the
    /// memory nor [`StreamOptions::block_rows`]. The mini-batch is of one problem, on the device of the options.
    ///
    /// # Errors
    /// As [`step`](Self::step), and those of [`Source::read`]. Refuses batches that do not fit into [`StreamOptions::memory`], two of which a
    /// GPU has room for and eight the CPU. After an error of the source the steps before it have been taken.
    pub fn step_stream(&mut self, source: &Source<'_>, options: &StreamOptions, epochs: &Epochs) -> Result<()> {
        self.steps(source, None, &options.opened()?, epochs)
    }

    /// The same with weights of the rows, float `(n)` on the CPU, as [`step_weighted`](Self::step_weighted) takes them.
    ///
    /// # Errors
    /// As [`step_stream`](Self::step_stream). Refuses weights of other shapes, dtypes and devices.
    pub fn step_stream_weighted(
        &mut self,
        source: &Source<'_>,
        sample_weights: &Tensor,
        options: &StreamOptions,
        epochs: &Epochs,
    ) -> Result<()> {
        let (n, d) = source.shape();
        let k = self.counts().dims()[self.counts().rank() - 1];
        Problem::of(&[n as usize, d], source.dtype(), k, self.metric())?.weights(sample_weights, &Device::Cpu)?;
        self.steps(source, Some(sample_weights), &options.opened()?, epochs)
    }

    fn steps(
        &mut self,
        source: &Source<'_>,
        weights: Option<&Tensor>,
        options: &StreamOptions,
        epochs: &Epochs,
    ) -> Result<()> {
        let ((n, d), device) = (source.shape(), options.only_device("a mini-batch")?);
        problem::check_device("mini-batch", self.counts(), device)?;
        Problem::predict_rows(&[epochs.batch_rows, d], source.dtype(), &self.centroids()?, self.metric())?;
        epochs.check(source, options)?;
        let mut reads = Reads::new(source, device, epochs.batch_rows.min(n as usize));
        let mut reporter = options.reporter(source, n as usize, Passes::ONE, 0);
        for epoch in 0..epochs.count {
            reporter.begin(Pass::Epoch { epoch: epoch + 1, epochs: epochs.count });
            let batches = epochs.batches(n as usize, epoch);
            reads.for_each(&batches, &mut |read| {
                let Some((i, x)) = read else { return Ok(()) };
                let rows = &batches[i];
                match weights {
                    Some(weights) => {
                        let weights = weights.narrow(0, rows.start, rows.len())?.to_device(device)?;
                        self.step_weighted(&x, &weights)?
                    }
                    None => self.step(&x)?,
                };
                reporter.add(rows.len(), true);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl Epochs {
    /// Refuses batches of no rows, and those that there is no room for.
    fn check(&self, source: &Source<'_>, options: &StreamOptions) -> Result<()> {
        let (n, got) = (source.shape().0 as usize, self.batch_rows);
        if got == 0 {
            return Err(Error::Range { argument: "batch_rows", got, min: 1, max: usize::MAX });
        }
        let max = options.clone().block_rows(got).cut(source, n, source.shape().1, options.device(), 0)?.rows;
        if max < got.min(n) {
            return Err(Error::Range { argument: "batch_rows", got, min: 1, max });
        }
        Ok(())
    }
}

/// Seeds `(k, d)` with finite ones again in the place of those that are not, which are seeds where there are fewer finite rows; zeros where
/// there are none.
fn finite_seeds(seeds: &Tensor) -> Result<Tensor> {
    let (k, rows) = (seeds.dim(0)?, seeds.to_dtype(DType::F64)?.to_vec2::<f64>()?);
    let finite: Vec<u32> = (0..k as u32).filter(|&i| rows[i as usize].iter().all(|v| v.is_finite())).collect();
    match finite.len() {
        0 => Ok(seeds.zeros_like()?),
        all if all == k => Ok(seeds.clone()),
        _ => {
            let index = Tensor::from_iter(finite.into_iter().cycle().take(k), seeds.device())?;
            Ok(seeds.index_select(&index, 0)?)
        }
    }
}
