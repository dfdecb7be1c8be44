//! Vectors as codes: codebooks, product and residual quantisers, and codebooks that learn while a model trains.
//!
//! Codes are u32, or u8 where every codebook has at most 256 entries. Candle 0.11 has no u16, and its i16 has no CUDA kernels to
//! speak of, so codes of larger codebooks stay u32.

use crate::{
    assign, functional,
    minibatch::check_centroids,
    problem::{check_device, check_dtype, Problem, Rows},
    quantize,
    row_weights::{self, RowWeights},
    saved::{self, Saved},
    Error, Fit, KMeans, Metric, Result,
};
use candle_core::{DType, Device, Shape, Tensor, D};
use candle_nn::Module;
use std::path::Path;

/// What a quantiser is made of, and what it makes of rows. [`quantizer!`] gives all of them the rest.
trait Quantizer: Sized {
    /// What its files are marked with.
    const KIND: &'static str;
    /// Its codebooks, if that number is always the same. Files count them otherwise.
    const CODEBOOKS: Option<usize>;

    fn codebooks(&self) -> Vec<&Codebook>;

    /// The quantiser of such codebooks, in the same order.
    fn from_codebooks(codebooks: Vec<Codebook>) -> Result<Self>;

    /// What the codes of `x` `(..batch, n, d)` stand for, in its shape. No gradient flows.
    fn reconstruct(&self, x: &Tensor) -> Result<Tensor>;

    /// The same with other entries.
    fn map(&self, entries: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        let codebooks = self.codebooks().into_iter().map(|c| Codebook::new(&entries(&c.centroids)?, c.metric));
        Self::from_codebooks(codebooks.collect::<Result<_>>()?)
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
                let weights = RowWeights::new(&Rows::new(&x.detach())?, None, Metric::default())?;
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
            /// Where a device fails.
            pub fn to_device(&self, device: &Device) -> Result<Self> {
                self.map(|t| t.to_device(device))
            }

            /// Writes it as a safetensors file, whole or not at all.
            ///
            /// # Errors
            /// [`Error::Io`] if it cannot be written.
            pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
                let codebooks = self.codebooks();
                let count = Self::CODEBOOKS.is_none().then(|| ("stages", codebooks.len().to_string()));
                save(path.as_ref(), Self::KIND, &codebooks, &[], &count.into_iter().collect::<Vec<_>>())
            }

            /// Reads what [`save`](Self::save) wrote, onto `device`.
            ///
            /// # Errors
            /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved quantiser of this kind.
            pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
                let mut file = open(path.as_ref(), Self::KIND, device)?;
                let count = Self::CODEBOOKS.map_or_else(|| file.setting("stages"), Ok)?;
                // One by one, so that a damaged count ends at the first that is missing.
                let codebooks = (0..count).map(|i| load_codebook(&mut file, i)).collect::<Result<_>>()?;
                Self::from_codebooks(codebooks).map_err(|e| file.bad(e.to_string()))
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

mod ema;
mod gain_shape;
pub use ema::{Ema, EmaCodebook, Quantized, Usage};
pub use gain_shape::GainShapeQuantizer;

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
/// As a [`Module`] it puts each row's nearest entry in its place, and passes gradients straight through.
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
        Ok(Self { centroids: centroids.detach().contiguous()?, metric })
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

    /// How much of the codebook `codes`, u32 or u8 `(..batch, n)` below `k`, use. Every code counts, that of a NaN too.
    ///
    /// # Errors
    /// Refuses shapes and dtypes that do not fit, and codes of no entry (the host waits for that answer).
    pub fn usage(&self, codes: &Tensor) -> Result<Usage> {
        let codes = checked_codes(codes, &self.centroids)?;
        let Some((&n, batch)) = codes.dims().split_last() else {
            return Err(Error::Rank { argument: "codes", expected: 1, shape: vec![] });
        };
        if batch.contains(&0) {
            let (codes_used, perplexity) = (DType::U32, DType::F64);
            let of = |dtype| empty(batch, dtype, codes.device());
            return Ok(Usage { codes_used: of(codes_used)?, perplexity: of(perplexity)? });
        }
        let sizes = match n {
            0 => Tensor::zeros([batch, &[self.k()]].concat(), DType::U32, codes.device())?,
            _ => crate::cluster_sizes(&codes, self.k())?,
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

/// Rows cut into `m` equal pieces, each with a codebook of its own: product quantisation (Jegou et al. 2011). `k^m` different
/// rows at the price of `m` codes.
#[derive(Clone, Debug)]
pub struct ProductQuantizer {
    /// `(..batch, m, k, d / m)`.
    codebook: Codebook,
}

impl ProductQuantizer {
    /// From codebooks `(m, k, d / m)` for rows of any batch, or `(..batch, m, k, d / m)`.
    ///
    /// # Errors
    /// Refuses too few dimensions.
    pub fn new(codebook: Codebook) -> Result<Self> {
        if codebook.centroids.rank() < 3 {
            let shape = codebook.centroids.dims().to_vec();
            return Err(Error::Rank { argument: "centroids", expected: 3, shape });
        }
        Ok(Self { codebook })
    }

    /// Clusters the `m` pieces of the rows of `x` `(..batch, n, d)`, all of them and all problems in one call. Given centroids
    /// are `(..batch, m, k, d / m)`, or `(k, d / m)` for every piece; weights and lengths count in every piece. Which rows
    /// count is as in [`Codebook::train`]: a row that is not finite in none of its pieces, and by cosine a piece of length 0
    /// does not.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses columns that `m` does not divide.
    pub fn train(x: &Tensor, m: usize, kmeans: &KMeans) -> Result<Self> {
        let pieces = split(x, m)?;
        let p = Problem::of(x.dims(), x.dtype(), kmeans.k, kmeans.metric)?;
        if let Some(weights) = &kmeans.weights {
            p.weights(weights, x.device())?;
        }
        if let Some(lengths) = &kmeans.lengths {
            p.lengths(lengths, x.device())?;
        }
        let mut kmeans = kmeans.clone();
        // What each problem has, each of its pieces has; weights `(n)` serve every problem as they are.
        let each_piece = |t: Tensor, at: usize| {
            let (batch, tail) = t.dims().split_at(at);
            let shape = [batch, &[m], tail].concat();
            Ok::<_, Error>(t.unsqueeze(at)?.broadcast_as(shape)?.contiguous()?)
        };
        if let Some(weights) = kmeans.weights.take() {
            let own = weights.rank() + 1 == x.rank() && weights.rank() > 1;
            kmeans.weights = Some(if own { each_piece(weights, x.rank() - 2)? } else { weights });
        }
        if let Some(lengths) = kmeans.lengths.take() {
            kmeans.lengths = Some(each_piece(lengths, x.rank() - 2)?);
        }
        row_weights::check_fit(&kmeans, pieces.dims(), x.dtype(), x.device())?;
        if kmeans.check_finite {
            return Ok(Self { codebook: Codebook::train(&pieces, &kmeans)? });
        }
        let (x, _) = row_weights::marked(x, &KMeans::new(kmeans.k).check_finite(false))?;
        Ok(Self { codebook: Codebook::train(&split(&x, m)?, &kmeans)? })
    }

    /// The codebooks, `(..batch, m, k, d / m)`.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// Pieces of a row.
    pub fn m(&self) -> usize {
        self.codebook.centroids.dims()[self.codebook.centroids.rank() - 3]
    }

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.m() * self.codebook.d()
    }

    /// The pieces of rows `(..batch, n, d)`, `(..batch, m, n, d / m)`: what the codebooks are codebooks of, as to an
    /// [`EmaCodebook`].
    ///
    /// # Errors
    /// Refuses other numbers of columns.
    pub fn split(&self, x: &Tensor) -> Result<Tensor> {
        self.check_columns(x)?;
        split(x, self.m())
    }

    /// The reverse of [`split`](Self::split).
    ///
    /// # Errors
    /// Refuses other shapes.
    pub fn join(&self, pieces: &Tensor) -> Result<Tensor> {
        let (rank, dims) = (pieces.rank(), pieces.dims());
        if rank < 3 || [dims[rank - 3], dims[rank - 1]] != [self.m(), self.codebook.d()] {
            let expected = vec![self.m(), dims.get(rank.max(2) - 2).copied().unwrap_or(1), self.codebook.d()];
            return Err(Error::Shape { argument: "pieces", got: dims.to_vec(), expected });
        }
        let shape = [&dims[..rank - 3], &[dims[rank - 2], self.d()]].concat();
        Ok(pieces.transpose(rank - 3, rank - 2)?.reshape(shape)?)
    }

    /// The exact nearest entry of each piece of each row of `x` `(..batch, n, d)`: u32 `(..batch, n, m)`.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_no_rows(x)? {
            return empty([&x.dims()[..x.rank() - 1], &[self.m()]].concat(), DType::U32, x.device());
        }
        let (rows, batch) = self.own_batch(x)?;
        let codes = self.codebook.encode(&self.split(&rows)?)?;
        let rank = codes.rank();
        Ok(codes.transpose(rank - 2, rank - 1)?.contiguous()?.reshape([&batch[..], &[self.m()]].concat())?)
    }

    /// The same as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries.
    pub fn encode_u8(&self, x: &Tensor) -> Result<Tensor> {
        check_u8("k", &self.codebook)?;
        in_bytes(&self.encode(x)?)
    }

    /// The rows that `codes`, u32 or u8 `(..batch, n, m)`, stand for: `(..batch, n, d)`. A code of no entry becomes NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        check_places(codes, self.m())?;
        let codes = checked_codes(codes, &self.codebook.centroids)?;
        let (codes, batch) = self.own_batch(&codes)?;
        if codes.elem_count() == 0 {
            self.check_batch("codes", &batch)?;
            return empty([&batch[..], &[self.d()]].concat(), self.codebook.centroids.dtype(), codes.device());
        }
        let rank = codes.rank();
        let values = self.codebook.decode(&codes.transpose(rank - 2, rank - 1)?.contiguous()?)?;
        Ok(self.join(&values)?.reshape([&batch[..], &[self.d()]].concat())?)
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.codebook.bits_per_value()
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.codebook.bits_per_value_with_codebook(rows)
    }

    /// Whether there is nothing to do for `x`, which is checked if so.
    fn has_no_rows(&self, x: &Tensor) -> Result<bool> {
        if x.elem_count() > 0 {
            return Ok(false);
        }
        Problem::of(x.dims(), x.dtype(), self.codebook.k(), self.codebook.metric)?;
        self.check_columns(x)?;
        check_dtype("x", x, self.codebook.centroids.dtype())?;
        check_device("x", x, self.codebook.centroids.device())?;
        self.check_batch("x", &x.dims()[..x.rank() - 1])?;
        Ok(true)
    }

    /// Checks that codebooks with a batch have that of rows `(..batch, n)`.
    fn check_batch(&self, argument: &'static str, rows: &[usize]) -> Result<()> {
        let own = self.codebook.centroids.dims();
        let (batch, n) = (&own[..own.len() - 3], rows[rows.len() - 1]);
        if !batch.is_empty() && *batch != rows[..rows.len() - 1] {
            return Err(Error::Shape { argument, got: rows.to_vec(), expected: [batch, &[n]].concat() });
        }
        Ok(())
    }

    fn check_columns(&self, x: &Tensor) -> Result<()> {
        if x.rank() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
        }
        let got = x.dims()[x.rank() - 1];
        if got != self.d() {
            return Err(Error::Size { argument: "x", what: "columns", got, expected: self.d() });
        }
        Ok(())
    }

    /// `t` `(..batch, n, last)` with the batch that the codebooks have: all in one if they serve any. And `(..batch, n)`.
    fn own_batch(&self, t: &Tensor) -> Result<(Tensor, Vec<usize>)> {
        if t.rank() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: t.dims().to_vec() });
        }
        let batch = t.dims()[..t.rank() - 1].to_vec();
        let shared = self.codebook.centroids.rank() == 3 && t.rank() > 2;
        let t = if shared { t.flatten_to(t.rank() - 2)? } else { t.clone() };
        Ok((t, batch))
    }
}

impl Quantizer for ProductQuantizer {
    const KIND: &'static str = "product_quantizer";
    const CODEBOOKS: Option<usize> = Some(1);

    fn codebooks(&self) -> Vec<&Codebook> {
        vec![&self.codebook]
    }

    fn from_codebooks(mut codebooks: Vec<Codebook>) -> Result<Self> {
        Self::new(codebooks.remove(0))
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_no_rows(x)? {
            return empty(x.shape(), x.dtype(), x.device());
        }
        let (rows, _) = self.own_batch(&x.detach())?;
        let values = self.codebook.quantize(&self.split(&rows)?)?.0;
        Ok(self.join(&values)?.reshape(x.shape())?)
    }
}

/// Codebooks one after another, each for what the ones before it left over: residual quantisation (Juang and Gray 1982). A row
/// is the sum of its entries, in its own dtype.
#[derive(Clone, Debug)]
pub struct ResidualQuantizer {
    stages: Vec<Codebook>,
}

impl ResidualQuantizer {
    /// From the codebooks of the stages, `(k, d)` or `(..batch, k, d)`; `k` may differ.
    ///
    /// # Errors
    /// Refuses no stages, more than 1024, and stages of other batches, columns, dtypes and devices than the first.
    pub fn new(stages: Vec<Codebook>) -> Result<Self> {
        check_stages(stages.len(), MAX_STAGES)?;
        let first = &stages[0];
        for stage in &stages {
            check_dtype("stages", &stage.centroids, first.centroids.dtype())?;
            check_device("stages", &stage.centroids, first.centroids.device())?;
            let mut expected = first.centroids.dims().to_vec();
            let entries = expected.len() - 2;
            expected[entries] = stage.k();
            if stage.centroids.dims() != expected {
                return Err(Error::Shape { argument: "stages", got: stage.centroids.dims().to_vec(), expected });
            }
        }
        Ok(Self { stages })
    }

    /// Clusters the rows of `x` `(..batch, n, d)`, then what that leaves over, and so on. Stage `i` starts from seed `seed + i`.
    /// Which rows count is as in [`Codebook::train`]: one that does not count in a stage does in no later one.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses no stages, and more than 1024.
    pub fn train(x: &Tensor, stages: usize, kmeans: &KMeans) -> Result<Self> {
        check_stages(stages, MAX_STAGES)?;
        row_weights::check_fit(kmeans, x.dims(), x.dtype(), x.device())?;
        let (mut left, kmeans) = row_weights::marked(x, kmeans)?;
        let mut codebooks = Vec::new();
        for stage in 0..stages {
            let seed = kmeans.seed.wrapping_add(stage as u64);
            let fit = row_weights::fit(&left, &kmeans.clone().seed(seed))?;
            if stage + 1 < stages {
                left = (&left - functional::rows_of(&fit.centroids, &fit.labels)?)?;
            }
            codebooks.push(Codebook::of(&fit));
        }
        Self::new(codebooks)
    }

    /// The codebooks, first stage first.
    pub fn stages(&self) -> &[Codebook] {
        &self.stages
    }

    /// The quantiser of the first stages alone, which shares their codebooks: coarser, in fewer codes.
    ///
    /// # Errors
    /// Refuses no stages and more than there are.
    pub fn first(&self, stages: usize) -> Result<Self> {
        check_stages(stages, self.stages.len())?;
        Ok(Self { stages: self.stages[..stages].to_vec() })
    }

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.stages[0].d()
    }

    /// The exact nearest entry of each row of `x` `(..batch, n, d)`, then of what it leaves over, and so on: u32
    /// `(..batch, n, stages)`.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.walk(x)?.1)
    }

    /// The same as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries in any stage.
    pub fn encode_u8(&self, x: &Tensor) -> Result<Tensor> {
        self.stages.iter().try_for_each(|stage| check_u8("k", stage))?;
        in_bytes(&self.encode(x)?)
    }

    /// The rows that `codes`, u32 or u8 `(..batch, n, s)`, stand for: `(..batch, n, d)`. With fewer codes than stages, `s` at
    /// least 1, the rows are as the first stages have them. A code of no entry becomes NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let last = codes.rank().max(1) - 1;
        let places = codes.dims().last().copied().unwrap_or(0);
        check_places(codes, places.clamp(1, self.stages.len()))?;
        let codes = checked_codes(codes, &self.stages[0].centroids)?;
        if codes.elem_count() == 0 {
            return self.stages[0].decode(&empty(&codes.dims()[..last], DType::U32, codes.device())?);
        }
        let entries = self.stages.iter().take(places).enumerate();
        let mut values = entries.map(|(i, stage)| stage.decode(&codes.narrow(last, i, 1)?.squeeze(last)?));
        let first = values.next().expect("there is a stage")?;
        values.try_fold(first, |sum, value| Ok((sum + value?)?))
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.stages.iter().map(Codebook::bits_per_value).sum()
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.stages.iter().map(|stage| stage.bits_per_value_with_codebook(rows)).sum()
    }

    /// What `x` becomes, and its codes.
    fn walk(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let mut left = x.detach();
        if x.elem_count() == 0 {
            let (value, code) = self.stages[0].quantize(&left)?;
            let shape = [code.dims(), &[self.stages.len()]].concat();
            return Ok((value, empty(shape, DType::U32, x.device())?));
        }
        let (mut sum, mut codes) = (None, Vec::new());
        for stage in &self.stages {
            let (value, code) = stage.quantize(&left)?;
            left = (left - &value)?;
            sum = Some(match sum {
                None => value,
                Some(sum) => (sum + value)?,
            });
            codes.push(code);
        }
        let place = codes[0].rank();
        Ok((sum.expect("there is a stage"), Tensor::stack(&codes, place)?))
    }
}

impl Quantizer for ResidualQuantizer {
    const KIND: &'static str = "residual_quantizer";
    const CODEBOOKS: Option<usize> = None;

    fn codebooks(&self) -> Vec<&Codebook> {
        self.stages.iter().collect()
    }

    fn from_codebooks(codebooks: Vec<Codebook>) -> Result<Self> {
        Self::new(codebooks)
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.walk(x)?.0)
    }
}

/// Stages of a residual quantiser, at most: far beyond what an f64 has bits for.
const MAX_STAGES: usize = 1024;

fn check_stages(got: usize, max: usize) -> Result<()> {
    if got == 0 || got > max {
        return Err(Error::Range { argument: "stages", got, min: 1, max });
    }
    Ok(())
}

/// `(..batch, n, d)` to `(..batch, m, n, d / m)`.
fn split(x: &Tensor, m: usize) -> Result<Tensor> {
    if x.rank() < 2 {
        return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
    }
    let (rows, d) = x.dims().split_at(x.rank() - 1);
    if m == 0 || m > d[0] || !d[0].is_multiple_of(m) {
        let with = format!("rows of {} columns, which it does not divide", d[0]);
        return Err(Error::Conflict { argument: "m", got: m.to_string(), with });
    }
    let pieces = x.reshape([rows, &[m, d[0] / m]].concat())?;
    Ok(pieces.transpose(rows.len() - 1, rows.len())?)
}

/// The mean of the squared differences over the rows of `x` `(..batch, n, d)`, by weights f64 `(b, n)` that are finite; 0 where
/// there is no weight. Rows of none have no part in the gradient either, whatever they hold.
fn commitment(x: &Tensor, values: &Tensor, weights: &Tensor) -> Result<Tensor> {
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

/// What sums of numbers of a dtype are kept in.
fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

/// A tensor of no elements: part of one that has some, because Candle allocates none of no bytes on a GPU.
fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    Ok(Tensor::zeros(1, dtype, device)?.narrow(0, 0, 0)?.reshape(shape.into())?)
}

fn code_bits(k: usize) -> f64 {
    k.next_power_of_two().trailing_zeros() as f64
}

fn stored_bits(codebook: &Codebook) -> f64 {
    (codebook.k() * codebook.d() * codebook.centroids.dtype().size_in_bytes() * 8) as f64
}

/// Checks that codes of these entries fit a byte.
fn check_u8(argument: &'static str, codebook: &Codebook) -> Result<()> {
    if codebook.k() > 256 {
        return Err(Error::TooLarge { argument, got: codebook.k(), limit: 256 });
    }
    Ok(())
}

/// Codes that fit a byte as u8.
fn in_bytes(codes: &Tensor) -> Result<Tensor> {
    match codes.elem_count() {
        0 => empty(codes.shape(), DType::U8, codes.device()),
        _ => Ok(codes.to_dtype(DType::U8)?),
    }
}

/// Codes as u32, on the device of the codebook.
fn checked_codes(codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    if !matches!(codes.dtype(), DType::U8 | DType::U32) {
        return Err(Error::DType { argument: "codes", got: codes.dtype(), expected: "U8 or U32".into() });
    }
    check_device("codes", codes, centroids.device())?;
    match codes.elem_count() {
        0 => empty(codes.shape(), DType::U32, codes.device()),
        _ => Ok(codes.to_dtype(DType::U32)?),
    }
}

/// Checks that each row has so many codes.
fn check_places(codes: &Tensor, expected: usize) -> Result<()> {
    if codes.rank() < 2 {
        return Err(Error::Rank { argument: "codes", expected: 2, shape: codes.dims().to_vec() });
    }
    let got = codes.dims()[codes.rank() - 1];
    if got != expected {
        return Err(Error::Size { argument: "codes", what: "columns", got, expected });
    }
    Ok(())
}

fn save(
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

fn open(path: &Path, kind: &str, device: &Device) -> Result<Saved> {
    let file = Saved::read(path, device)?;
    file.expect("kind", kind)?;
    Ok(file)
}

fn load_codebook(file: &mut Saved, stage: usize) -> Result<Codebook> {
    let metric = file.metric(&format!("metric.{stage}"))?;
    let centroids = file.take(&format!("centroids.{stage}"))?;
    Codebook::new(&centroids, metric).map_err(|e| file.bad(e.to_string()))
}
