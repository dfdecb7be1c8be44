//! Directions and lengths, coded apart.

use super::{checked_codes, commitment, load_codebook, open, save, Codebook};
use crate::{functional, Error, KMeans, Metric, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::Module;
use std::path::Path;

/// Rows as a direction times a length: a codebook of unit vectors, and one of numbers. Gain-shape vector quantisation (Sabin and
/// Gray 1984).
///
/// The mean of a cluster is shorter than its rows, the more so the fewer the entries, and attention's scores depend on
/// lengths: here the directions are clustered by cosine, each row counting by its length, and the lengths along them by
/// k-means in one dimension.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{nn::GainShapeQuantizer, KMeans};
///
/// let x = Tensor::new(&[[1f32, 0.], [4., 0.], [0., 1.], [0., 4.]], &Device::Cpu)?;
/// let quantizer = GainShapeQuantizer::train(&x, &KMeans::new(2), &KMeans::new(2))?;
/// let (shapes, gains) = quantizer.encode(&x)?; // (4,), (4,)
/// assert_eq!(quantizer.decode(&shapes, &gains)?.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct GainShapeQuantizer {
    /// `(..batch, k, d)`, by cosine.
    shapes: Codebook,
    /// `(..batch, k', 1)`.
    gains: Codebook,
}

impl GainShapeQuantizer {
    /// From unit vectors `(k, d)` or `(..batch, k, d)`, by cosine, and numbers `(k', 1)` or `(..batch, k', 1)`.
    ///
    /// # Errors
    /// Refuses another metric of the shapes, and gains of other columns or another batch.
    pub fn new(shapes: Codebook, gains: Codebook) -> Result<Self> {
        if shapes.metric() != Metric::Cosine {
            let (got, with) = (shapes.metric().name().to_string(), "shapes, which are found by cosine".into());
            return Err(Error::Conflict { argument: "shapes metric", got, with });
        }
        let batch = &shapes.centroids().dims()[..shapes.centroids().rank() - 2];
        let expected = [batch, &[gains.k(), 1]].concat();
        if gains.centroids().dims() != expected {
            return Err(Error::Shape { argument: "gains", got: gains.centroids().dims().to_vec(), expected });
        }
        Ok(Self { shapes, gains })
    }

    /// Clusters the directions of the rows of `x` `(..batch, n, d)` by cosine, weighted by the rows' lengths, whatever the
    /// metric of `shapes`; then the rows' lengths along their directions as `gains` says.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses sample weights of `shapes`, whose place the lengths take.
    pub fn train(x: &Tensor, shapes: &KMeans, gains: &KMeans) -> Result<Self> {
        if shapes.weights.is_some() {
            let with = "shapes, which rows weigh in by their lengths".into();
            return Err(Error::Conflict { argument: "sample_weights", got: "weights".into(), with });
        }
        let lengths = functional::norms(x)?;
        let fit = shapes.clone().metric(Metric::Cosine).sample_weights(&lengths).fit(x)?;
        let along = along(&x.detach(), &functional::rows_of(&fit.centroids, &fit.labels)?)?;
        let gains = Codebook::of(&gains.fit(&along)?);
        Self::new(Codebook::of(&fit), gains)
    }

    /// The unit vectors, `(..batch, k, d)`.
    pub fn shapes(&self) -> &Codebook {
        &self.shapes
    }

    /// The lengths, `(..batch, k', 1)`.
    pub fn gains(&self) -> &Codebook {
        &self.gains
    }

    /// The direction nearest to each row of `x` `(..batch, n, d)` by cosine, and the length nearest to what the row has along
    /// it: both u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`assign`](crate::assign).
    pub fn encode(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let shapes = self.shapes.encode(x)?;
        let along = along(&x.detach(), &functional::rows_of(self.shapes.centroids(), &shapes)?)?;
        Ok((shapes, self.gains.encode(&along)?))
    }

    /// The rows that codes, u32 or u8 `(..batch, n)`, stand for: `(..batch, n, d)`. A code of no entry becomes NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, shapes: &Tensor, gains: &Tensor) -> Result<Tensor> {
        let gains = checked_codes(gains, self.gains.centroids())?;
        if gains.dims() != shapes.dims() {
            return Err(Error::Shape {
                argument: "gains",
                got: gains.dims().to_vec(),
                expected: shapes.dims().to_vec(),
            });
        }
        Ok(self.shapes.decode(shapes)?.broadcast_mul(&self.gains.decode(&gains)?)?)
    }

    /// The mean over all values of the squared difference between `x` `(..batch, n, d)` and what its codes stand for, with a
    /// gradient to `x` alone. A scalar, f32 for half types.
    ///
    /// # Errors
    /// As [`assign`](crate::assign).
    pub fn commitment_loss(&self, x: &Tensor) -> Result<Tensor> {
        commitment(x, &self.reconstruct(x)?)
    }

    /// Bits of a row's two codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.shapes.bits_per_value() + self.gains.bits_per_value() / self.shapes.d() as f64
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        let gains = self.gains.bits_per_value_with_codebook(rows) / self.shapes.d() as f64;
        self.shapes.bits_per_value_with_codebook(rows) + gains
    }

    /// Writes the codebooks as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save(path.as_ref(), "gain_shape_quantizer", &[&self.shapes, &self.gains], &[], &[])
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved gain-shape quantiser.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = open(path.as_ref(), "gain_shape_quantizer", device)?;
        let (shapes, gains) = (load_codebook(&mut file, 0)?, load_codebook(&mut file, 1)?);
        Self::new(shapes, gains).map_err(|e| file.bad(e.to_string()))
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        let (shapes, gains) = self.encode(x)?;
        self.decode(&shapes, &gains)
    }
}

impl Module for GainShapeQuantizer {
    /// Each row of `x` `(..batch, n, d)` as its codes give it back; the gradient passes to `x` unchanged.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(functional::straight_through(x, self.reconstruct(x)?)?)
    }
}

/// The length of each row along its unit vector, `(..batch, n, 1)`, in the rows' dtype.
fn along(x: &Tensor, shapes: &Tensor) -> Result<Tensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let products = (x.to_dtype(wide)? * shapes.to_dtype(wide)?)?;
    Ok(products.sum_keepdim(D::Minus1)?.to_dtype(x.dtype())?)
}
