//! Fits that know whether several GPUs share them.

use super::{options::StreamOptions, source::Source};
use crate::{error::Result, fit::Fit, kmeans::KMeans};
use candle_core::Tensor;

impl KMeans {
    /// Clusters the rows of `x`, `(n, d)` or `(..batch, n, d)` in f16, bf16, f32 or f64, each problem of the batch on its own. With
    /// [`devices`](Self::devices), `x` is `(n, d)` on the CPU.
    ///
    /// # Errors
    /// Refuses shapes, dtypes, devices and settings that do not fit together, before anything is allocated; non-finite values
    /// (see [`check_finite`](Self::check_finite)), before the first iteration; and fails where the device does. See
    /// [`Error`](crate::Error).
    pub fn fit(&self, x: &Tensor) -> Result<Fit> {
        match &self.devices {
            None => self.fit_on_its_device(x),
            Some(devices) => {
                let settings = Self { devices: None, ..self.clone() };
                settings.fit_stream(&Source::from_tensor(x)?, &StreamOptions::on(devices.clone()))
            }
        }
    }

    /// The labels of [`fit`](Self::fit), u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn fit_predict(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.fit(x)?.labels)
    }
}
