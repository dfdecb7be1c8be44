//! Labels of rows that memory does not hold, in a file.

use super::{label_file::LabelFile, options::StreamOptions, source::Source, stream::check_stream};
use crate::{error::Result, fit::Fit, kmeans::KMeans, metric::Metric};
use candle_core::Tensor;
use std::path::Path;

/// A finished fit of a stream whose labels are in a file: see [`KMeans::fit_stream_to_npy`]. Its tensors are on the CPU, and what they are
/// is what those of a [`Fit`] of one problem are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FitSummary {
    /// `(k, d)` in the rows' dtype.
    pub centroids: Tensor,
    /// Rows in each cluster, u32 `(k)`.
    pub counts: Tensor,
    /// The sample weights of the rows in each cluster, f64 `(k)`, if the fit had any.
    pub weights: Option<Tensor>,
    /// Weighted sum of the distances to the assigned centroids, f64 of no dimension.
    pub inertia: Tensor,
    /// Centroid updates made, u32 of no dimension.
    pub n_iter: Tensor,
    /// 1 if the fit converged, u8 of no dimension.
    pub converged: Tensor,
    /// The metric of the fit.
    pub metric: Metric,
}

impl FitSummary {
    /// The fit with its labels, u32 `(n)` on the CPU, such as `Tensor::read_npy` gives them.
    ///
    /// # Errors
    /// Refuses labels of another dtype or device, and those of no cluster.
    pub fn with_labels(self, labels: Tensor) -> Result<Fit> {
        let Self { centroids, counts, weights, inertia, n_iter, converged, metric } = self;
        let fit = Fit { centroids, labels, counts, weights, inertia, n_iter, converged, metric };
        fit.check()?;
        Ok(fit)
    }
}

impl KMeans {
    /// [`fit_stream`](Self::fit_stream) for labels that memory need not hold: the last pass writes those of each block as a `.npy` file of
    /// one dimension, u32 in little-endian order, whole or not at all, as [`Fit::save`] does. Of several runs
    /// ([`n_init`](Self::n_init)) it takes another pass for the best one's. Several GPUs of this process write to the one file.
    ///
    /// From pass to pass there are only the labels of rows that stay on the device, and with
    /// [`EmptyClusters::Relocate`](crate::EmptyClusters::Relocate) those of all, on the device.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let source = Source::from_tensor(&Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?)?;
    /// let (options, path) = (StreamOptions::new(&Device::Cpu), std::env::temp_dir());
    /// let path = path.join(format!("labels-of-fit-{}.npy", std::process::id()));
    /// let summary = KMeans::new(8).fit_stream_to_npy(&source, &options, &path)?;
    /// println!("{} iterations, inertia {}", summary.n_iter, summary.inertia);
    ///
    /// let fit = summary.with_labels(Tensor::read_npy(&path)?)?;
    /// assert_eq!(fit.labels.to_vec1::<u32>()?, KMeans::new(8).fit_stream(&source, &options)?.labels.to_vec1::<u32>()?);
    /// # std::fs::remove_file(&path).unwrap();
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`fit_stream`](Self::fit_stream), and [`Error::Io`](crate::Error::Io) with the path if the file cannot be written. What was there
    /// stays as it was then. [Processes](crate::Devices::Launched), each of which has a file of its own, are refused.
    pub fn fit_stream_to_npy(
        &self,
        source: &Source<'_>,
        options: &StreamOptions,
        path: impl AsRef<Path>,
    ) -> Result<FitSummary> {
        let options = options.opened()?;
        options.expect_one_process("labels in one file")?;
        check_stream(&self.starting_on(options.device())?, source, &options)?;
        let n = source.shape().0;
        let fit = LabelFile::replace(path.as_ref(), n, |labels| self.fit_opened(source, &options, Some(labels)))?;
        let Fit { centroids, counts, weights, inertia, n_iter, converged, metric, .. } = fit;
        Ok(FitSummary { centroids, counts, weights, inertia, n_iter, converged, metric })
    }
}

impl Fit {
    /// Writes the exact labels of the rows of a source as a `.npy` file of one dimension, u32 in little-endian order: block by block, for any
    /// number of rows, and whole or not at all, as [`save`](Self::save) does. The fit is of one problem, on any device.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?;
    /// let fit = KMeans::new(8).fit(&x)?;
    /// let path = std::env::temp_dir().join(format!("labels-{}.npy", std::process::id()));
    /// fit.predict_to_npy(&Source::from_tensor(&x)?, &StreamOptions::new(&Device::Cpu), &path)?;
    /// assert_eq!(Tensor::read_npy(&path)?.to_vec1::<u32>()?, fit.labels.to_vec1::<u32>()?);
    /// # std::fs::remove_file(&path).unwrap();
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`predict_stream`](Self::predict_stream), and [`Error::Io`](crate::Error::Io) with the path if the file cannot be written. What
    /// was there stays as it was then. [Processes](crate::Devices::Launched), which have a share of the rows each, are refused.
    pub fn predict_to_npy(&self, source: &Source<'_>, options: &StreamOptions, path: impl AsRef<Path>) -> Result<()> {
        let options = options.opened()?;
        options.expect_one_process("labels in one file")?;
        LabelFile::replace(path.as_ref(), source.shape().0, |file| {
            self.label(source, &options, |rows, labels| file.write(rows.start, labels))
        })
    }
}
