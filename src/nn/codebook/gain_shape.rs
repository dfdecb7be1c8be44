//! Directions and lengths, coded apart.

use super::{
    codes::{check_u8, checked_codes, empty, in_bytes},
    quantizer::{wide, Quantizer},
    Codebook,
};
use crate::{
    error::{Error, Result},
    functional,
    kmeans::KMeans,
    metric::Metric,
    problem::{check_device, check_dtype},
    row_weights,
};
use candle_core::{Tensor, D};

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
    /// Refuses another metric of the shapes, and gains of other columns, another batch, dtype or device.
    pub fn new(shapes: Codebook, gains: Codebook) -> Result<Self> {
        if shapes.metric() != Metric::Cosine {
            let (got, with) = (shapes.metric().name().to_string(), "shapes, which are found by cosine".into());
            return Err(Error::Conflict { argument: "shapes metric", got, with });
        }
        check_dtype("gains", gains.centroids(), shapes.centroids().dtype())?;
        check_device("gains", gains.centroids(), shapes.centroids().device())?;
        let batch = &shapes.centroids().dims()[..shapes.centroids().rank() - 2];
        let expected = [batch, &[gains.k(), 1]].concat();
        if gains.centroids().dims() != expected {
            return Err(Error::Shape { argument: "gains", got: gains.centroids().dims().to_vec(), expected });
        }
        Ok(Self { shapes, gains })
    }

    /// Clusters the directions of the rows of `x` `(..batch, n, d)` by cosine, weighted by the rows' lengths, whatever the
    /// metric of `shapes`; then the rows' lengths along their directions as `gains` says. Sample weights and lengths of `shapes`
    /// count in both, unless `gains` has its own.
    ///
    /// Which rows count is as in [`Codebook::train`]. A row of zeros is one of length 0 to `gains` and nothing to `shapes`, so
    /// that a problem of such rows alone has zeros for shapes and gains.
    ///
    /// # Errors
    /// As [`KMeans::fit`] for either, before any work.
    pub fn train(x: &Tensor, shapes: &KMeans, gains: &KMeans) -> Result<Self> {
        let shapes = shapes.clone().metric(Metric::Cosine);
        let mut gains = gains.clone();
        gains.weights = gains.weights.or_else(|| shapes.weights.clone());
        gains.lengths = gains.lengths.or_else(|| shapes.lengths.clone());
        gains.check_finite &= shapes.check_finite;
        let p = row_weights::check_fit(&shapes, x.dims(), x.dtype(), x.device())?;
        row_weights::check_fit(&gains, &p.shape(&[p.n, 1]), x.dtype(), x.device())?;

        let mut by_length = functional::norms(x)?;
        if let Some(weights) = &shapes.weights {
            let weights = row_weights::sample_weights(&p, weights, x.device())?;
            by_length = (by_length * weights.reshape(p.shape(&[p.n]))?)?;
        }
        let fit = row_weights::fit(x, &shapes.sample_weights(&by_length))?;
        let along = along(&x.detach(), &functional::rows_of(&fit.centroids, &fit.labels)?)?;
        let gains = Codebook::train(&along, &gains)?;
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

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.shapes.d()
    }

    /// The direction nearest to each row of `x` `(..batch, n, d)` by cosine, and the length nearest to what the row has along
    /// it: both u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`assign`](crate::assign).
    pub fn encode(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let shapes = self.shapes.encode(x)?;
        if shapes.elem_count() == 0 {
            return Ok((shapes.clone(), shapes));
        }
        let along = along(&x.detach(), &functional::rows_of(self.shapes.centroids(), &shapes)?)?;
        Ok((shapes, self.gains.encode(&along)?))
    }

    /// The same as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries of either codebook.
    pub fn encode_u8(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        check_u8("shapes k", &self.shapes)?;
        check_u8("gains k", &self.gains)?;
        let (shapes, gains) = self.encode(x)?;
        Ok((in_bytes(&shapes)?, in_bytes(&gains)?))
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
        let (shapes, gains) = (self.shapes.decode(shapes)?, self.gains.decode(&gains)?);
        match shapes.elem_count() {
            0 => empty(shapes.shape(), shapes.dtype(), shapes.device()),
            _ => Ok(shapes.broadcast_mul(&gains)?),
        }
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
}

impl Quantizer for GainShapeQuantizer {
    const KIND: &'static str = "gain_shape_quantizer";
    const CODEBOOKS: Option<usize> = Some(2);

    fn codebooks(&self) -> Vec<&Codebook> {
        vec![&self.shapes, &self.gains]
    }

    fn from_codebooks(mut codebooks: Vec<Codebook>) -> Result<Self> {
        let gains = codebooks.remove(1);
        Self::new(codebooks.remove(0), gains)
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        let (shapes, gains) = self.encode(x)?;
        self.decode(&shapes, &gains)
    }
}

/// The length of each row along its unit vector, `(..batch, n, 1)`, in the rows' dtype.
fn along(x: &Tensor, shapes: &Tensor) -> Result<Tensor> {
    let wide = wide(x.dtype());
    let products = (x.to_dtype(wide)? * shapes.to_dtype(wide)?)?;
    Ok(products.sum_keepdim(D::Minus1)?.to_dtype(x.dtype())?)
}
