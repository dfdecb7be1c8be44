//! A residual quantiser codes again what codes leave over.

use super::{
    codes::{check_places, check_u8, checked_codes, empty, in_bytes},
    quantizer::Quantizer,
    Codebook,
};
use crate::{
    error::{Error, Result},
    functional,
    kmeans::KMeans,
    metric::Metric,
    primitives,
    problem::{check_device, check_dtype},
    row_weights,
};
use candle_core::{DType, Tensor};

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
        let all = Self::train_with_sizes(x, stages, kmeans)?;
        Self::new(all.into_iter().map(|(codebook, _)| codebook).collect())
    }

    /// The codebooks of the stages, and the weights of their entries' clusters, f64 `(b, k)`.
    pub(super) fn train_with_sizes(x: &Tensor, stages: usize, kmeans: &KMeans) -> Result<Vec<(Codebook, Tensor)>> {
        check_stages(stages, MAX_STAGES)?;
        row_weights::check_fit(kmeans, x.dims(), x.dtype(), x.device())?;
        let (mut left, kmeans) = row_weights::marked(x, kmeans)?;
        let mut codebooks = Vec::new();
        for stage in 0..stages {
            let seed = kmeans.seed.wrapping_add(stage as u64);
            let fit = row_weights::fit(&left, &kmeans.clone().seed(seed))?;
            let sizes = row_weights::cluster_weights(&left, &kmeans, &fit)?;
            if stage + 1 < stages {
                let values = functional::rows_of(&fit.centroids, &fit.labels)?;
                left = primitives::elementwise([&left, &values], |[left, values]| left - values)?;
            }
            codebooks.push((Codebook::of(&fit), sizes));
        }
        Ok(codebooks)
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
    /// As [`assign`](crate::assign).
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

    /// Refuses stages whose entries are not the nearest by squared Euclidean distance, for the sake of what needs that.
    pub(super) fn check_squares(&self, with: &str) -> Result<()> {
        match self.stages.iter().find(|stage| stage.metric != Metric::SquaredEuclidean) {
            Some(stage) => {
                let got = stage.metric.name().to_string();
                Err(Error::Conflict { argument: "metric", got, with: with.to_string() })
            }
            None => Ok(()),
        }
    }

    /// Returns what `x` becomes, and its codes.
    fn walk(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        primitives::check_counted("x", x)?;
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
pub(super) const MAX_STAGES: usize = 1024;

pub(super) fn check_stages(got: usize, max: usize) -> Result<()> {
    if got == 0 || got > max {
        return Err(Error::Range { argument: "stages", got, min: 1, max });
    }
    Ok(())
}
