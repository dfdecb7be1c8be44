//! Vectors as codes: codebooks, product and residual quantisers, and codebooks that learn while a model trains.
//!
//! Codes are u32, or u8 where every codebook has at most 256 entries. Candle 0.11 has no u16, and its i16 has no CUDA kernels to
//! speak of, so codes of larger codebooks stay u32.

use crate::{
    assign, functional, ops,
    problem::{check_device, check_dtype},
    quantize,
    saved::{self, Saved},
    Error, Fit, KMeans, Metric, Result,
};
use candle_core::{DType, Device, Tensor};
use candle_nn::Module;
use std::path::Path;

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
    /// Refuses too few dimensions, no entries or columns, and other dtypes.
    pub fn new(centroids: &Tensor, metric: Metric) -> Result<Self> {
        if centroids.rank() < 2 {
            return Err(Error::Rank { argument: "centroids", expected: 2, shape: centroids.dims().to_vec() });
        }
        if !matches!(centroids.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
            let expected = "F16, BF16, F32 or F64".into();
            return Err(Error::DType { argument: "centroids", got: centroids.dtype(), expected });
        }
        if centroids.elem_count() == 0 {
            return Err(Error::Range { argument: "centroids elements", got: 0, min: 1, max: usize::MAX });
        }
        Ok(Self { centroids: centroids.detach().contiguous()?, metric })
    }

    /// The centroids of a fit of `x` `(..batch, n, d)`.
    ///
    /// # Errors
    /// As [`KMeans::fit`].
    pub fn train(x: &Tensor, kmeans: &KMeans) -> Result<Self> {
        Ok(Self::of(&kmeans.fit(x)?))
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
        assign(x, &self.centroids, self.metric)
    }

    /// The same as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries.
    pub fn encode_u8(&self, x: &Tensor) -> Result<Tensor> {
        check_u8(self.k())?;
        Ok(self.encode(x)?.to_dtype(DType::U8)?)
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
        let nan = Tensor::full(f64::NAN, [batch, &[1, self.d()]].concat(), codes.device())?;
        let entries = Tensor::cat(&[&self.centroids, &nan.to_dtype(self.centroids.dtype())?], rank - 2)?;
        functional::rows_of(&entries, &codes.minimum(k as u32)?)
    }

    /// The mean over all values of the squared difference between `x` `(..batch, n, d)` and its codes' entries, which are
    /// constants: its gradient pulls `x` to them (van den Oord et al. 2017). A scalar, f32 for half types.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn commitment_loss(&self, x: &Tensor) -> Result<Tensor> {
        commitment(x, &quantize(&x.detach(), &self.centroids, self.metric)?.0)
    }

    /// How much of the codebook `codes`, u32 or u8 `(..batch, n)` below `k`, use.
    ///
    /// # Errors
    /// Refuses shapes and dtypes that do not fit, and codes of no entry (the host waits for that answer).
    pub fn usage(&self, codes: &Tensor) -> Result<Usage> {
        let codes = checked_codes(codes, &self.centroids)?;
        let (_, offsets) = crate::sort_by_cluster(&codes, self.k())?;
        let (problems, rank) = (offsets.elem_count() / (self.k() + 1), offsets.rank());
        let ends = |from| offsets.narrow(rank - 1, from, self.k())?.reshape((problems, self.k()));
        Usage::of(&(ends(1)? - ends(0)?)?, &codes.dims()[..rank - 1])
    }

    /// Bits of a code, a whole number, by the values it stands for. The codebook is not counted.
    pub fn bits_per_value(&self) -> f64 {
        code_bits(self.k()) / self.d() as f64
    }

    /// The same with each problem's codebook as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.bits_per_value() + stored_bits(self) / (rows * self.d()) as f64
    }

    /// Writes the codebook as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save(path.as_ref(), "codebook", &[self], &[], &[])
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved codebook.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = open(path.as_ref(), "codebook", device)?;
        load_codebook(&mut file, 0)
    }
}

impl Module for Codebook {
    /// Each row of `x` `(..batch, n, d)` as its nearest entry; the gradient passes to `x` unchanged.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(quantize(x, &self.centroids, self.metric)?.0)
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
    /// are `(..batch, m, k, d / m)`, or `(k, d / m)` for every piece; weights count in every piece.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses columns that `m` does not divide.
    pub fn train(x: &Tensor, m: usize, kmeans: &KMeans) -> Result<Self> {
        let pieces = split(x, m)?;
        let mut kmeans = kmeans.clone();
        if let Some(weights) = kmeans.weights.take() {
            // (..batch, n) to (..batch, m, n); weights (n) serve every problem as they are.
            let rank = weights.rank();
            kmeans.weights = Some(match rank + 1 == x.rank() && rank > 1 {
                true => {
                    let batch = &weights.dims()[..rank - 1];
                    let shape = [batch, &[m], &weights.dims()[rank - 1..]].concat();
                    weights.unsqueeze(rank - 1)?.broadcast_as(shape)?
                }
                false => weights,
            });
        }
        Ok(Self { codebook: Codebook::train(&pieces, &kmeans)? })
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
        if x.rank() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
        }
        let got = x.dims()[x.rank() - 1];
        if got != self.d() {
            return Err(Error::Size { argument: "x", what: "columns", got, expected: self.d() });
        }
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
        check_u8(self.codebook.k())?;
        Ok(self.encode(x)?.to_dtype(DType::U8)?)
    }

    /// The rows that `codes`, u32 or u8 `(..batch, n, m)`, stand for: `(..batch, n, d)`. A code of no entry becomes NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        check_places(codes, self.m())?;
        let (codes, batch) = self.own_batch(codes)?;
        let rank = codes.rank();
        let values = self.codebook.decode(&codes.transpose(rank - 2, rank - 1)?.contiguous()?)?;
        Ok(self.join(&values)?.reshape([&batch[..], &[self.d()]].concat())?)
    }

    /// The mean over all values of the squared difference between `x` `(..batch, n, d)` and what its codes stand for, with a
    /// gradient to `x` alone. A scalar, f32 for half types.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn commitment_loss(&self, x: &Tensor) -> Result<Tensor> {
        commitment(x, &self.reconstruct(x)?)
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.codebook.bits_per_value()
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.codebook.bits_per_value_with_codebook(rows)
    }

    /// Writes the codebooks as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        save(path.as_ref(), "product_quantizer", &[&self.codebook], &[], &[])
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved product quantiser.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = open(path.as_ref(), "product_quantizer", device)?;
        Self::new(load_codebook(&mut file, 0)?).map_err(|e| file.bad(e.to_string()))
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, _) = self.own_batch(&x.detach())?;
        let values = quantize(&self.split(&rows)?, &self.codebook.centroids, self.codebook.metric)?.0;
        Ok(self.join(&values)?.reshape(x.shape())?)
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

impl Module for ProductQuantizer {
    /// Each row of `x` `(..batch, n, d)` as its codes stand for it; the gradient passes to `x` unchanged.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(functional::straight_through(x, self.reconstruct(x)?)?)
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
    /// Refuses no stages, and stages of other batches, columns, dtypes and devices than the first.
    pub fn new(stages: Vec<Codebook>) -> Result<Self> {
        let Some(first) = stages.first() else {
            return Err(Error::Range { argument: "stages", got: 0, min: 1, max: usize::MAX });
        };
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
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses no stages.
    pub fn train(x: &Tensor, stages: usize, kmeans: &KMeans) -> Result<Self> {
        let mut left = x.detach();
        let mut codebooks = Vec::new();
        for stage in 0..stages {
            let fit = kmeans.clone().seed(kmeans.seed.wrapping_add(stage as u64)).fit(&left)?;
            if stage + 1 < stages {
                let values = functional::rows_of(&fit.centroids, &fit.labels)?;
                left = ops::elementwise([&left, &values], |[left, values]| left - values)?;
            }
            codebooks.push(Codebook::of(&fit));
        }
        Self::new(codebooks)
    }

    /// The codebooks, first stage first.
    pub fn stages(&self) -> &[Codebook] {
        &self.stages
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
        self.stages.iter().try_for_each(|stage| check_u8(stage.k()))?;
        Ok(self.encode(x)?.to_dtype(DType::U8)?)
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
        let entries = self.stages.iter().take(places).enumerate();
        let mut values = entries.map(|(i, stage)| stage.decode(&codes.narrow(last, i, 1)?.squeeze(last)?));
        let first = values.next().expect("there is a stage")?;
        values.try_fold(first, |sum, value| Ok((sum + value?)?))
    }

    /// The mean over all values of the squared difference between `x` `(..batch, n, d)` and what its codes stand for, with a
    /// gradient to `x` alone. A scalar, f32 for half types.
    ///
    /// # Errors
    /// As [`assign`].
    pub fn commitment_loss(&self, x: &Tensor) -> Result<Tensor> {
        commitment(x, &self.walk(x)?.0)
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.stages.iter().map(Codebook::bits_per_value).sum()
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.stages.iter().map(|stage| stage.bits_per_value_with_codebook(rows)).sum()
    }

    /// Writes the codebooks as a safetensors file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let stages: Vec<_> = self.stages.iter().collect();
        save(path.as_ref(), "residual_quantizer", &stages, &[], &[("stages", stages.len().to_string())])
    }

    /// Reads what [`save`](Self::save) wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read and [`Error::Format`] if it is not a saved residual quantiser.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let mut file = open(path.as_ref(), "residual_quantizer", device)?;
        let count: usize = file.setting("stages")?;
        // One by one, so that a damaged count ends at the first missing stage.
        let stages = (0..count).map(|i| load_codebook(&mut file, i)).collect::<Result<_>>()?;
        Self::new(stages).map_err(|e| file.bad(e.to_string()))
    }

    /// What `x` becomes, and its codes.
    fn walk(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        ops::check_counted("x", x)?;
        let mut left = x.detach();
        let (mut sum, mut codes) = (None, Vec::new());
        for stage in &self.stages {
            let (value, code) = quantize(&left, &stage.centroids, stage.metric)?;
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

impl Module for ResidualQuantizer {
    /// Each row of `x` `(..batch, n, d)` as its codes stand for it; the gradient passes to `x` unchanged.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(functional::straight_through(x, self.walk(x)?.0)?)
    }
}

/// `(..batch, n, d)` to `(..batch, m, n, d / m)`.
fn split(x: &Tensor, m: usize) -> Result<Tensor> {
    if x.rank() < 2 {
        return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
    }
    let (rows, d) = x.dims().split_at(x.rank() - 1);
    if m == 0 || !d[0].is_multiple_of(m) {
        let with = format!("rows of {} columns, which it does not divide", d[0]);
        return Err(Error::Conflict { argument: "m", got: m.to_string(), with });
    }
    let pieces = x.reshape([rows, &[m, d[0] / m]].concat())?;
    Ok(pieces.transpose(rows.len() - 1, rows.len())?)
}

fn commitment(x: &Tensor, values: &Tensor) -> Result<Tensor> {
    // A sum of squares of halves would overflow their own type.
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    ops::check_counted("x", x)?;
    Ok((x.to_dtype(wide)? - values.detach().to_dtype(wide)?)?.sqr()?.mean_all()?)
}

fn code_bits(k: usize) -> f64 {
    k.next_power_of_two().trailing_zeros() as f64
}

fn stored_bits(codebook: &Codebook) -> f64 {
    (codebook.k() * codebook.d() * codebook.centroids.dtype().size_in_bytes() * 8) as f64
}

fn check_u8(k: usize) -> Result<()> {
    if k > 256 {
        return Err(Error::TooLarge { argument: "k", got: k, limit: 256 });
    }
    Ok(())
}

/// Codes as u32, on the device of the codebook.
fn checked_codes(codes: &Tensor, centroids: &Tensor) -> Result<Tensor> {
    if !matches!(codes.dtype(), DType::U8 | DType::U32) {
        return Err(Error::DType { argument: "codes", got: codes.dtype(), expected: "U8 or U32".into() });
    }
    check_device("codes", codes, centroids.device())?;
    Ok(codes.to_dtype(DType::U32)?)
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
