//! A codebook that an optimiser trains.

use super::{
    quantized::{Quantized, Usage},
    quantizer::{commitment, widened},
    rotation::rotate_to,
    Codebook,
};
use crate::{
    error::{Error, Result},
    functional::quantize,
    metric::Metric,
    primitives,
    problem::Problem,
    row_weights::{self, RowWeights},
    rows::Rows,
    running_means::check_centroids,
};
use candle_core::{DType, Tensor};

/// Entries that are parameters: the codebook of VQ-VAE (van den Oord et al. 2017), which gradients move, `learnable_codebook` in
/// vector-quantize-pytorch.
///
/// ```text
/// loss = mean (sg(x) - entry)^2 + commitment_weight mean (x - sg(entry))^2
/// ```
/// over the values of the rows that count, by their weights, `sg` being what no gradient passes; values have a straight-through gradient
/// to `x`. Rows that say nothing weigh nothing, as in an [`EmaCodebook`](crate::nn::EmaCodebook), and rows of half types may have entries in f32.
#[derive(Clone, Debug)]
pub struct LearnableCodebook {
    entries: Tensor,
    metric: Metric,
    commitment_weight: f64,
    rotation_trick: bool,
}

impl LearnableCodebook {
    /// Of `entries` `(k, d)`, or `(..batch, k, d)`, in a float dtype: a variable's, of which each call sees what an optimiser has made of it.
    ///
    /// # Errors
    /// As [`Codebook::new`]. Refuses any metric but [`Metric::SquaredEuclidean`], which the loss is.
    pub fn new(entries: &Tensor, metric: Metric) -> Result<Self> {
        check_centroids(entries)?;
        if metric != Metric::SquaredEuclidean {
            let with = "a loss that is a squared distance".into();
            return Err(Error::Conflict { argument: "metric", got: metric.name().into(), with });
        }
        Ok(Self { entries: entries.clone(), metric, commitment_weight: 1.0, rotation_trick: false })
    }

    /// The factor of what pulls rows to entries, beside 1 for what pulls entries to rows (1).
    ///
    /// # Errors
    /// Refuses a number that is negative or not finite.
    pub fn commitment_weight(self, commitment_weight: f64) -> Result<Self> {
        if !(commitment_weight >= 0.0 && commitment_weight.is_finite()) {
            let expected = "a finite number of at least 0";
            return Err(Error::Value { argument: "commitment_weight", got: commitment_weight, expected });
        }
        Ok(Self { commitment_weight, ..self })
    }

    /// Whether gradients of the values pass by [`rotate_to`], rather than unchanged (no).
    pub fn rotation_trick(self, rotation_trick: bool) -> Self {
        Self { rotation_trick, ..self }
    }

    /// The codebook as it is now, to encode and decode: a copy.
    ///
    /// # Errors
    /// Refuses entries that are no longer finite (the host waits for that answer).
    pub fn codebook(&self) -> Result<Codebook> {
        Codebook::new(&self.entries, self.metric)
    }

    /// Quantises `x` `(..batch, n, d)` for a forward pass in training.
    ///
    /// # Errors
    /// As [`assign`](crate::assign). Refuses `x` without rows.
    pub fn quantize(&self, x: &Tensor) -> Result<Quantized> {
        self.pass(x, None)
    }

    /// The same with weights of the rows, float `(..batch, n)` or `(n)`. A weight that is not a finite number above 0 is none, so that a mask
    /// of zeros and ones sets padding aside.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize). Refuses weights of other shapes, dtypes and devices.
    pub fn quantize_weighted(&self, x: &Tensor, sample_weights: &Tensor) -> Result<Quantized> {
        self.pass(x, Some(sample_weights))
    }

    fn pass(&self, x: &Tensor, sample_weights: Option<&Tensor>) -> Result<Quantized> {
        let (x, dtype) = (&widened(x, self.entries.dtype())?, x.dtype());
        let entries = self.entries.detach();
        let p = Problem::assign(x, &entries, self.metric)?;
        if x.elem_count() == 0 {
            return Err(Error::Range { argument: "x rows", got: 0, min: 1, max: usize::MAX });
        }
        primitives::check_counted("x", x)?;
        let (k, rank) = (entries.dims()[entries.rank() - 2], entries.rank());
        let b = entries.elem_count() / (k * p.d);
        let n = p.b * p.n / b;
        let given = sample_weights.map(|w| row_weights::sample_weights(&p, w, x.device())?.reshape((b, n)));
        let (mut values, codes) = quantize(x, &entries, self.metric)?;
        let flat = x.detach().reshape((b, n, p.d))?;
        let weights = RowWeights::new(&Rows::new(&flat)?, given.transpose()?.as_ref(), self.metric)?;

        // Of a batch each problem has entries of its own, one after the other.
        let first = Tensor::arange_step(0, (b * k) as u32, k as u32, x.device())?.unsqueeze(1)?;
        let of_all = codes.reshape((b, n))?.broadcast_add(&first)?.flatten_all()?;
        let picked = self.entries.reshape((b * k, p.d))?.index_select(&of_all, 0)?.reshape((b, n, p.d))?;
        let counts = weights.weights().gt(0.0)?.unsqueeze(2)?.broadcast_as(flat.shape())?;
        let target = counts.where_cond(&flat, &picked.detach())?;
        let of_entries = commitment(&picked, &target, weights.weights())?;
        let of_rows = commitment(x, &values, weights.weights())?;
        let loss = (of_entries + (of_rows * self.commitment_weight)?)?;

        let rows = Rows::new(&flat.to_dtype(DType::F64)?)?;
        let batch = weights.clusters(&rows, &codes.reshape((b, n))?, k)?;
        let usage = Usage::of(&batch.weights, &entries.dims()[..rank - 2])?;
        if self.rotation_trick {
            values = rotate_to(x, &values)?;
        }
        Ok(Quantized { values: values.to_dtype(dtype)?, codes, loss, usage })
    }
}
