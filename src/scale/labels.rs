//! Labels of rows that memory does not hold, in a file.

use super::{options::StreamOptions, source::npy, source::Source};
use crate::{
    error::{Error, Result},
    fit::Fit,
    saved,
};
use std::{io::Write, path::Path};

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
    /// As [`predict_stream`](Self::predict_stream), and [`Error::Io`] with the path if the file cannot be written. What was there stays
    /// as it was then.
    pub fn predict_to_npy(&self, source: &Source<'_>, options: &StreamOptions, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let failed = |source| Error::Io { path: path.display().to_string(), source };
        saved::replace(path, |file| {
            file.write_all(&npy::header("<u4", source.shape().0)).map_err(failed)?;
            self.label(source, options, |_, labels| {
                let bytes: Vec<_> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
                file.write_all(&bytes).map_err(failed)
            })
        })
    }
}
