//! Fits of a sample of rows that memory does not hold.

use super::{options::StreamOptions, reads::read_rows, source::Source, stream::check_stream};
use crate::{
    error::{Error, Result},
    fit::Fit,
    kmeans::{Init, KMeans},
    seeding::sample_rows,
};
use candle_core::{Device, Tensor};

impl KMeans {
    /// Clusters a sample of the rows of a source in the device's memory, and labels all rows by its centroids: two passes over the
    /// source, however many iterations there are. Vector databases train their coarse quantisers so.
    ///
    /// The sample is so many rows, drawn by the [`seed`](Self::seed) uniformly and without replacement; all rows, where they are no more.
    /// Of the result `centroids`, `n_iter` and `converged` are those of [`fit`](Self::fit) of the sample, in the order of its rows in the
    /// source, which by [`n_init`](Self::n_init) has the lowest inertia of the sample. `labels`, `counts`, `weights` and `inertia` are of
    /// all rows: with these centroids, to the bit what a fit of no iteration has. The sample is on the device before other rows are,
    /// whatever the [memory](StreamOptions::memory) that is allowed.
    ///
    /// # Errors
    /// As [`fit_stream`](Self::fit_stream). Refuses a sample of fewer rows than clusters.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let source = Source::from_tensor(&Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?)?;
    /// let fit = KMeans::new(8).fit_sample(&source, 100, &StreamOptions::new(&Device::Cpu))?;
    /// assert_eq!(fit.labels.dims(), [1000]);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn fit_sample(&self, source: &Source<'_>, rows: usize, options: &StreamOptions) -> Result<Fit> {
        let options = &options.opened()?;
        let p = check_stream(self, source, options)?;
        if rows < self.k {
            return Err(Error::Range { argument: "sample rows", got: rows, min: self.k, max: p.n });
        }
        let sample = sample_rows(p.n, rows, self.seed);
        let x = read_rows(source, &sample)?.to_device(options.device())?;
        let mut of_sample = self.clone();
        if let Some(weights) = &self.weights {
            let rows = Tensor::from_iter(sample.iter().map(|&row| row as u32), &Device::Cpu)?;
            of_sample = of_sample.sample_weights(&weights.index_select(&rows, 0)?.to_device(options.device())?);
        }
        let fit = of_sample.fit_on_its_device(&x).map_err(|error| match error {
            Error::NonFinite { argument: "x", batch, row } => {
                Error::NonFinite { argument: "x", batch, row: sample[row] }
            }
            error => error,
        })?;
        drop(x);
        let labelling = Self { n_init: 1, on_iteration: None, on_seed: None, ..self.clone() };
        let all = labelling.init(Init::Given(fit.centroids)).max_iters(0).tol(0.0).fit_stream(source, options)?;
        let [n_iter, converged] = [fit.n_iter, fit.converged].map(|t| t.to_device(&Device::Cpu));
        Ok(Fit { n_iter: n_iter?, converged: converged?, ..all })
    }
}
