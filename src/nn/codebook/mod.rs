//! Vectors as codes: codebooks, product and residual quantisers, and codebooks that learn while a model trains.
//!
//! Codes are u32, or u8 where every codebook has at most 256 entries. Candle 0.11 has no u16, and its i16 has no CUDA kernels to
//! speak of, so codes of larger codebooks stay u32.

use crate::{
    error::{Error, Result},
    fit::Fit,
    functional::{self, assign, quantize},
    kmeans::KMeans,
    metric::Metric,
    problem::Problem,
    row_weights,
    running_means::check_centroids,
};
use candle_core::{DType, Tensor};
use codes::{check_u8, checked_codes, code_bits, empty, in_bytes, stored_bits};
use quantizer::Quantizer;

mod beam;
mod codes;
mod ema;
mod ema_residual;
mod fsq;
mod gain_shape;
mod grouped;
mod learnable;
mod lfq;
pub(super) mod orthogonal;
mod product;
mod quantized;
pub(super) mod quantizer;
mod refit;
mod replica_rank;
mod replicas;
mod residual;
mod rotation;
pub use ema::{Ema, EmaCodebook};
pub use ema_residual::{EmaResidualQuantizer, ResidualQuantized};
pub use fsq::Fsq;
pub use gain_shape::GainShapeQuantizer;
pub use grouped::GroupedResidualQuantizer;
pub use learnable::LearnableCodebook;
pub use lfq::{Lfq, LfqConfig};
pub use orthogonal::{ProductConfig, Rotation};
pub use product::ProductQuantizer;
pub use quantized::{Quantized, Usage};
pub use replica_rank::ReplicaRank;
pub use replicas::Replicas;
pub use residual::ResidualQuantizer;
pub use rotation::rotate_to;

/// The index of the entry of `codebook` `(k, d)` nearest to each row of `x` `(n, d)`, u32 `(n)`, by squared Euclidean distance;
/// the lowest one at the smallest distance. Leading dimensions of `x` are kept.
///
/// In place of `Tensor::apply_op2(x, codebook, CodebookEncode)`, the CPU-only op of candle-transformers' EnCodec and Mimi: the
/// same arguments and result, any float dtype and layout, exact, on CUDA too.
///
/// # Errors
/// As [`assign`].
pub fn codebook_encode(x: &Tensor, codebook: &Tensor) -> Result<Tensor> {
    assign(x, codebook, Metric::SquaredEuclidean)
}

/// `k` vectors of `d` values, one of which stands for each row: vector quantisation (Gray 1984). Batched, every problem has a
/// codebook of its own.
///
/// As a [`Module`](candle_nn::Module) it puts each row's nearest entry in its place, and passes gradients straight through.
///
/// ```
/// use candle_core::{Device, Module, Tensor};
/// use candle_flash_kmeans::{nn::Codebook, KMeans};
///
/// let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., 9.], [9., 8.]], &Device::Cpu)?;
/// let codebook = Codebook::train(&x, &KMeans::new(2))?;
/// let codes = codebook.encode_u8(&x)?; // (4,)
/// assert_eq!(codebook.decode(&codes)?.to_vec2::<f32>()?, codebook.forward(&x)?.to_vec2::<f32>()?);
/// assert_eq!(codebook.bits_per_value(), 0.5);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Codebook {
    centroids: Tensor,
    metric: Metric,
}

impl Codebook {
    /// The codebook `(k, d)` for rows of any batch, or `(..batch, k, d)` for each problem its own, in a float dtype. No gradient
    /// flows to it.
    ///
    /// # Errors
    /// Refuses too few dimensions, no entries or columns, other dtypes, and entries that are not finite (the host waits for
    /// that answer).
    pub fn new(centroids: &Tensor, metric: Metric) -> Result<Self> {
        check_centroids(centroids)?;
        // A copy, which does not change with what it was made from.
        Ok(Self { centroids: centroids.detach().force_contiguous()?, metric })
    }

    /// The centroids of a fit of `x` `(..batch, n, d)`.
    ///
    /// Rows that say nothing weigh nothing and are no seeds: by cosine those of length 0, and those that hold a NaN or an
    /// infinity where [`KMeans::check_finite`] lets them in. Entries are to the bit those of the rows that count. If these are
    /// fewer than `k`, entries repeat them; where there are none, entries are zeros.
    ///
    /// # Errors
    /// As [`KMeans::fit`].
    pub fn train(x: &Tensor, kmeans: &KMeans) -> Result<Self> {
        Ok(Self::of(&row_weights::fit(x, kmeans)?))
    }

    fn of(fit: &Fit) -> Self {
        Self { centroids: fit.centroids.clone(), metric: fit.metric }
    }

    /// The entries, `(..batch, k, d)`.
    pub fn centroids(&self) -> &Tensor {
        &self.centroids
    }

    /// The distance by which entries are nearest.
    pub fn metric(&self) -> Metric {
        self.metric
    }

    /// Entries of each problem.
    pub fn k(&self) -> usize {
        self.centroids.dims()[self.centroids.rank() - 2]
    }

    /// Values of an entry.
    pub fn d(&self) -> usize {
        self.centroids.dims()[self.centroids.rank() - 1]
    }

    /// The exact nearest entry of each row of `x` `(..batch, n, d)`: u32 `(..batch, n)`.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        let p = Problem::assign(x, &self.centroids, self.metric)?;
        match x.elem_count() {
            0 => empty(p.shape(&[p.n]), DType::U32, x.device()),
            _ => assign(x, &self.centroids, self.metric),
        }
    }

    /// The same as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries.
    pub fn encode_u8(&self, x: &Tensor) -> Result<Tensor> {
        check_u8("k", self)?;
        in_bytes(&self.encode(x)?)
    }

    /// The entries of the rows of `x`, outside the graph, and their codes.
    fn quantize(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        match x.elem_count() {
            0 => Ok((empty(x.shape(), x.dtype(), x.device())?, self.encode(x)?)),
            _ => quantize(&x.detach(), &self.centroids, self.metric),
        }
    }

    /// The entries that `codes`, u32 or u8 `(..batch, n)`, name: `(..batch, n, d)`. Nothing waits for a check: a code of no
    /// entry becomes a row of NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let codes = checked_codes(codes, &self.centroids)?;
        let (k, rank) = (self.k(), self.centroids.rank());
        let batch = &self.centroids.dims()[..rank - 2];
        if codes.rank() == 0 || !batch.is_empty() && codes.dims()[..codes.rank() - 1] != *batch {
            let expected = [batch, &codes.dims()[codes.rank().saturating_sub(1)..]].concat();
            return Err(Error::Shape { argument: "codes", got: codes.dims().to_vec(), expected });
        }
        if codes.elem_count() == 0 {
            return empty([codes.dims(), &[self.d()]].concat(), self.centroids.dtype(), codes.device());
        }
        let nan = Tensor::full(f64::NAN, [batch, &[1, self.d()]].concat(), codes.device())?;
        let entries = Tensor::cat(&[&self.centroids, &nan.to_dtype(self.centroids.dtype())?], rank - 2)?;
        functional::rows_of(&entries, &codes.minimum(k as u32)?)
    }

    /// The share of the codebook that `codes`, u32 or u8 `(..batch, n)` below `k`, use. Every code counts, that of a NaN too.
    ///
    /// # Errors
    /// Refuses shapes and dtypes that do not fit, and codes of no entry (the host waits for that answer).
    pub fn usage(&self, codes: &Tensor) -> Result<Usage> {
        let codes = checked_codes(codes, &self.centroids)?;
        let Some((&n, batch)) = codes.dims().split_last() else {
            return Err(Error::Rank { argument: "codes", expected: 1, shape: vec![] });
        };
        if batch.contains(&0) {
            let none = |dtype| empty(batch, dtype, codes.device());
            return Ok(Usage { codes_used: none(DType::U32)?, perplexity: none(DType::F64)? });
        }
        let sizes = match n {
            0 => Tensor::zeros([batch, &[self.k()]].concat(), DType::U32, codes.device())?,
            _ => functional::cluster_sizes(&codes, self.k())?,
        };
        Usage::of(&sizes.reshape(((), self.k()))?.to_dtype(DType::F64)?, batch)
    }

    /// Bits of a code, a whole number, by the values it stands for. The codebook is not counted.
    pub fn bits_per_value(&self) -> f64 {
        code_bits(self.k()) / self.d() as f64
    }

    /// The same with each problem's codebook as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.bits_per_value() + stored_bits(self) / (rows as f64 * self.d() as f64)
    }
}

impl Quantizer for Codebook {
    const KIND: &'static str = "codebook";
    const CODEBOOKS: Option<usize> = Some(1);

    fn codebooks(&self) -> Vec<&Codebook> {
        vec![self]
    }

    fn from_codebooks(mut codebooks: Vec<Codebook>) -> Result<Self> {
        Ok(codebooks.remove(0))
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.quantize(x)?.0)
    }
}
