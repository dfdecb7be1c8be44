//! Fits that know whether several GPUs share them.

use super::{
    options::{StreamOptions, BLOCK_BYTES},
    reads::Reads,
    source::Source,
};
use crate::{
    error::{Error, Result},
    fit::Fit,
    host,
    kmeans::{Init, KMeans},
    problem::{self, Problem},
};
use candle_core::{Device, Tensor};
use std::ops::Range;

impl KMeans {
    /// Clusters the rows of `x`, `(n, d)` or `(..batch, n, d)` in f16, bf16, f32 or f64, each problem of the batch on its own. With
    /// [`devices`](Self::devices), `x` is on the CPU.
    ///
    /// # Errors
    /// Refuses shapes, dtypes, devices and settings that do not fit together, before anything is allocated; non-finite values
    /// (see [`check_finite`](Self::check_finite)), before the first iteration; and fails where the device does. See
    /// [`Error`](crate::Error).
    pub fn fit(&self, x: &Tensor) -> Result<Fit> {
        let Some(devices) = &self.devices else { return self.fit_on_its_device(x) };
        let (settings, options) = (Self { devices: None, ..self.clone() }, StreamOptions::on(devices.clone()));
        if x.rank() > 2 {
            return settings.fit_batch(x, &options);
        }
        settings.fit_stream(&Source::from_tensor(x)?, &options)
    }

    /// The labels of [`fit`](Self::fit), u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_predict(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.fit(x)?.labels)
    }

    /// The fit of a batch on the CPU, of which each device has whole problems, on the CPU.
    pub(crate) fn fit_batch(&self, x: &Tensor, options: &StreamOptions) -> Result<Fit> {
        let p = Problem::fit(x, self.k, self.metric)?;
        problem::check_device("x", x, &Device::Cpu)?;
        let settings = self.starting_on(&Device::Cpu)?;
        settings.check(&p, &Device::Cpu)?;
        let options = options.opened()?;
        let rows = Source::from_tensor(&x.reshape((p.b * p.n, p.d))?)?;
        let fits = options.place().run_problems(p.b, |device, problems, ranks| {
            let (settings, first) = (settings.of_problems(&p, &problems, device)?, problems.start);
            let x = load(&rows, problems.start * p.n..problems.end * p.n, device)?;
            let fit = settings.fit_problems(&x.reshape((problems.len(), p.n, p.d))?, first, ranks);
            fit.map_err(|e| e.of_batch(first))?.to_device(&Device::Cpu)
        });
        Fit::cat(&fits.map_err(without_rank)?)?.with_batch(&p.batch)
    }

    /// The settings of these problems of a batch, on a device.
    fn of_problems(&self, p: &Problem, problems: &Range<usize>, device: &Device) -> Result<Self> {
        // A tensor of no more dimensions than a problem has is for all of them. Candle would send a view with all that it is a view of.
        let part = |t: &Tensor, dims: usize| {
            let t = match t.rank() > dims {
                true => t.flatten(0, p.batch.len() - 1)?.narrow(0, problems.start, problems.len())?,
                false => t.clone(),
            };
            Ok::<_, Error>(host::to_device(&t.detach().force_contiguous()?, device)?)
        };
        let mut settings = self.clone();
        settings.weights = self.weights.as_ref().map(|weights| part(weights, 1)).transpose()?;
        settings.lengths = self.lengths.as_ref().map(|lengths| part(lengths, 0)).transpose()?;
        if let Init::Given(centroids) = &self.init {
            settings.init = Init::Given(part(centroids, 2)?);
        }
        Ok(settings)
    }
}

/// These rows on a device, `(n, d)`, which they come to through the ring of a stream.
fn load(source: &Source<'_>, rows: Range<usize>, device: &Device) -> Result<Tensor> {
    let all = host::zeros("fit", (rows.len(), source.shape().1), source.dtype(), device)?;
    let most = (BLOCK_BYTES / source.row_bytes()).clamp(1, rows.len());
    let blocks: Vec<_> = rows.clone().step_by(most).map(|first| first..rows.end.min(first + most)).collect();
    Reads::new(source, device, most).for_each(&blocks, &mut |read| {
        let Some((i, x)) = read else { return Ok(()) };
        Ok(all.slice_set(&x, 0, blocks[i].start - rows.start)?)
    })?;
    Ok(all)
}

/// The refusal of a problem, which says which of the batch it is, whoever has it.
fn without_rank(e: Error) -> Error {
    match e {
        Error::InRank { source, .. }
            if matches!(*source, Error::NonFinite { .. } | Error::Value { .. } | Error::Range { .. }) =>
        {
            *source
        }
        other => other,
    }
}
