//! All quantisers have these: a loss, a layer, another dtype or device, and files.

use super::{Codebook, GainShapeQuantizer, GroupedResidualQuantizer, ProductQuantizer, ResidualQuantizer};
use crate::{
    error::Result,
    functional, host,
    metric::Metric,
    row_weights::{self, RowWeights},
    rows::Rows,
    saved::{self, Saved},
};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::Module;
use half::{bf16, f16};
use std::path::Path;

/// A quantiser says here what it is made of, and what it makes of rows. [`quantizer!`] gives all of them the rest.
pub(super) trait Quantizer: Sized {
    /// Its files are marked with this.
    const KIND: &'static str;
    /// Its codebooks, if that number is always the same. Files count them otherwise.
    const CODEBOOKS: Option<usize>;

    fn codebooks(&self) -> Vec<&Codebook>;

    /// The quantiser of such codebooks, in the same order.
    fn from_codebooks(codebooks: Vec<Codebook>) -> Result<Self>;

    /// Replaces `x` `(..batch, n, d)` by what its codes stand for, in its shape. No gradient flows.
    fn reconstruct(&self, x: &Tensor) -> Result<Tensor>;

    /// What a product quantiser has besides: a rotation of rows, and how many pieces share its codebook.
    fn extras(&self) -> (Option<&Tensor>, Option<usize>) {
        (None, None)
    }

    fn with_extras(self, _rotation: Option<Tensor>, _shared: Option<usize>) -> Result<Self> {
        Ok(self)
    }

    /// The same with other entries.
    fn map(&self, entries: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let codebooks = self.codebooks().into_iter().map(|c| Codebook::new(&entries(&c.centroids)?, c.metric));
        let codebooks = codebooks.collect::<Result<Vec<_>>>()?;
        let device = codebooks[0].centroids.device().clone();
        let (rotation, shared) = self.extras();
        let rotation = rotation.map(|rotation| host::to_device(rotation, &device)).transpose()?;
        Self::from_codebooks(codebooks)?.with_extras(rotation, shared)
    }
}

macro_rules! quantizer {
    ($name:ident) => {
        impl $name {
            /// The mean over all values of the squared difference between `x` `(..batch, n, d)` and what its codes stand for,
            /// which is constant: its gradient pulls `x` there (van den Oord et al. 2017). A scalar, f32 for half types. Rows
            /// that are not finite are left out, and the mean of no values is 0.
            ///
            /// # Errors
            /// As [`encode`](Self::encode).
            pub fn commitment_loss(&self, x: &Tensor) -> Result<Tensor> {
                let values = self.reconstruct(x)?;
                if values.elem_count() == 0 {
                    return Ok(Tensor::zeros((), wide(x.dtype()), x.device())?);
                }
                let weights = RowWeights::new(&Rows::new(x)?, None, Metric::default())?;
                commitment(x, &values, weights.weights())
            }

            /// The same with entries of another float dtype, each rounded once.
            ///
            /// # Errors
            /// Refuses entries that are not finite in it (the host waits for that answer).
            pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
                self.map(|t| t.to_dtype(dtype))
            }

            /// The same on another device.
            ///
            /// # Errors
            /// Fails where a device does.
            pub fn to_device(&self, device: &Device) -> Result<Self> {
                self.map(|t| host::to_device(t, device))
            }

            /// Writes it as a safetensors file, whole or not at all.
            ///
            /// # Errors
            /// [`Error::Io`](crate::Error::Io) if it cannot be written.
            pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
                let codebooks = self.codebooks();
                let count = Self::CODEBOOKS.is_none().then(|| ("stages", codebooks.len().to_string()));
                let (rotation, shared) = self.extras();
                let settings = count.into_iter().chain(shared.map(|pieces| ("pieces", pieces.to_string())));
                let state: Vec<_> = rotation.into_iter().map(|rotation| ("rotation", rotation)).collect();
                save(path.as_ref(), Self::KIND, &codebooks, &state, &settings.collect::<Vec<_>>())
            }

            /// Reads what [`save`](Self::save) wrote, onto `device`.
            ///
            /// # Errors
            /// [`Error::Io`](crate::Error::Io) if the file cannot be read and [`Error::Format`](crate::Error::Format) if it is not a saved quantiser of this kind.
            pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
                let mut file = open(path.as_ref(), Self::KIND, device)?;
                let count = Self::CODEBOOKS.map_or_else(|| file.setting("stages"), Ok)?;
                // One by one, so that a damaged count ends at the first that is missing.
                let codebooks = (0..count).map(|i| load_codebook(&mut file, i)).collect::<Result<_>>()?;
                let rotation = file.holds("rotation").then(|| file.take("rotation")).transpose()?;
                let shared = file.states("pieces").then(|| file.setting("pieces")).transpose()?;
                let whole = Self::from_codebooks(codebooks).and_then(|all: Self| all.with_extras(rotation, shared));
                whole.map_err(|e| file.bad(e.to_string()))
            }
        }

        impl Module for $name {
            /// Each row of `x` `(..batch, n, d)` as its codes stand for it; the gradient passes to `x` unchanged.
            fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
                match self.reconstruct(x)? {
                    none if none.elem_count() == 0 => Ok(x.clone()),
                    values => Ok(functional::straight_through(x, values)?),
                }
            }
        }
    };
}
quantizer!(Codebook);
quantizer!(ProductQuantizer);
quantizer!(ResidualQuantizer);
quantizer!(GainShapeQuantizer);
quantizer!(GroupedResidualQuantizer);

/// The mean of the squared differences over the rows of `x` `(..batch, n, d)`, by weights f64 `(b, n)` that are finite; 0 where
/// there is no weight. Rows of none have no part in the gradient either, whatever they hold.
pub(super) fn commitment(x: &Tensor, values: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let (dims, rows, values) = (x.dims(), weights.elem_count(), values.detach());
    let weights = weights.reshape((1, rows))?;
    let total = row_weights::or_one(&functional::totals(&weights)?)?.unsqueeze(1)?;
    let per_row = [&dims[..dims.len() - 1], &[1]].concat();
    let share = weights.broadcast_div(&total)?.reshape(&per_row[..])?;
    let counts = share.gt(0.0)?.broadcast_as(dims)?;
    // A sum of squares of halves would overflow their own type.
    let wide = wide(x.dtype());
    let left = (counts.where_cond(x, &values)?.to_dtype(wide)? - values.to_dtype(wide)?)?;
    let squares = (left.sqr()?.sum_keepdim(D::Minus1)? * share.to_dtype(wide)?)?;
    Ok((squares.sum_all()? / dims[dims.len() - 1] as f64)?)
}

/// Sums of numbers of a dtype are kept in this one.
pub(in crate::nn) fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

/// The largest finite number of a dtype.
pub(in crate::nn) fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => f16::MAX.to_f64(),
        DType::BF16 => bf16::MAX.to_f64(),
        DType::F32 => f32::MAX as f64,
        _ => f64::MAX,
    }
}

/// Rows of half types in f32, in the graph, where that is the type of the entries.
pub(super) fn widened(x: &Tensor, entries: DType) -> Result<Tensor> {
    match (x.dtype(), entries) {
        (DType::F16 | DType::BF16, DType::F32) => Ok(x.to_dtype(DType::F32)?),
        _ => Ok(x.clone()),
    }
}

pub(super) fn save(
    path: &Path,
    kind: &str,
    stages: &[&Codebook],
    state: &[(&str, &Tensor)],
    settings: &[(&str, String)],
) -> Result<()> {
    let entries = stages.iter().enumerate().map(|(i, stage)| (format!("centroids.{i}"), &stage.centroids));
    let tensors = entries.chain(state.iter().map(|(name, t)| (name.to_string(), *t)));
    let metrics = stages.iter().enumerate().map(|(i, stage)| (format!("metric.{i}"), stage.metric.name().to_string()));
    let settings = settings.iter().map(|(key, value)| (key.to_string(), value.clone()));
    saved::write(path, tensors, metrics.chain(settings).chain([("kind".to_string(), kind.to_string())]))
}

pub(super) fn open(path: &Path, kind: &str, device: &Device) -> Result<Saved> {
    let file = Saved::read(path, device)?;
    file.expect("kind", kind)?;
    Ok(file)
}

pub(super) fn load_codebook(file: &mut Saved, stage: usize) -> Result<Codebook> {
    let metric = file.metric(&format!("metric.{stage}"))?;
    let centroids = file.take(&format!("centroids.{stage}"))?;
    Codebook::new(&centroids, metric).map_err(|e| file.bad(e.to_string()))
}
