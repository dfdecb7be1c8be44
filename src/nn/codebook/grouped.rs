//! Groups of columns, coded in stages.

use super::{
    codes::{check_u8, checked_codes, empty, in_bytes},
    product::{pieces_to_train, split},
    quantizer::Quantizer,
    Codebook, ResidualQuantizer,
};
use crate::{
    error::{Error, Result},
    kmeans::KMeans,
    problem::{check_device, check_dtype},
};
use candle_core::{DType, Tensor};

/// Rows cut into groups of neighbouring columns, each with a [`ResidualQuantizer`] of its own: group-residual vector quantisation (Yang et al.
/// 2023, "HiFi-Codec"). Of one stage it is a product quantiser, of one group a residual one.
#[derive(Clone, Debug)]
pub struct GroupedResidualQuantizer {
    /// Stages `(..batch, groups, k, d / groups)`.
    residual: ResidualQuantizer,
}

impl GroupedResidualQuantizer {
    /// From stages `(groups, k, d / groups)` for rows of any batch, or `(..batch, groups, k, d / groups)`.
    ///
    /// # Errors
    /// Refuses too few dimensions.
    pub fn new(residual: ResidualQuantizer) -> Result<Self> {
        let centroids = residual.stages()[0].centroids();
        if centroids.rank() < 3 {
            return Err(Error::Rank { argument: "centroids", expected: 3, shape: centroids.dims().to_vec() });
        }
        Ok(Self { residual })
    }

    /// Trains the stages of all groups of the rows of `x` `(..batch, n, d)` together, as [`ResidualQuantizer::train`] does those of one. Given
    /// centroids are `(..batch, groups, k, d / groups)`, or `(k, d / groups)` for every group; weights and lengths count in every group, and a
    /// row that is not finite in none.
    ///
    /// # Errors
    /// As [`ResidualQuantizer::train`]. Refuses columns that `groups` does not divide.
    pub fn train(x: &Tensor, groups: usize, stages: usize, kmeans: &KMeans) -> Result<Self> {
        let (pieces, kmeans) = pieces_to_train(x, groups, kmeans)?;
        Self::new(ResidualQuantizer::train(&pieces, stages, &kmeans)?)
    }

    /// The stages of all groups, as a quantiser of rows `(..batch, groups, n, d / groups)`.
    pub fn residual(&self) -> &ResidualQuantizer {
        &self.residual
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        let centroids = self.residual.stages()[0].centroids();
        centroids.dims()[centroids.rank() - 3]
    }

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.groups() * self.residual.d()
    }

    /// The codes of each group, stage by stage: u32 `(..batch, n, groups, stages)`.
    ///
    /// # Errors
    /// As [`ResidualQuantizer::encode`].
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        self.encoded(x, |residual, pieces| residual.encode(pieces))
    }

    /// The same by [`ResidualQuantizer::encode_beam`].
    ///
    /// # Errors
    /// As that.
    pub fn encode_beam(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        self.encoded(x, |residual, pieces| residual.encode_beam(pieces, width))
    }

    /// [`encode`](Self::encode) as u8.
    ///
    /// # Errors
    /// As [`encode`](Self::encode). Refuses more than 256 entries in any stage.
    pub fn encode_u8(&self, x: &Tensor) -> Result<Tensor> {
        self.residual.stages().iter().try_for_each(|stage| check_u8("k", stage))?;
        in_bytes(&self.encode(x)?)
    }

    /// The rows that `codes`, u32 or u8 `(..batch, n, groups, s)`, stand for: `(..batch, n, d)`. With fewer codes than stages, `s` at
    /// least 1, the rows are as the first stages have them. A code of no entry becomes NaN.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        let centroids = self.residual.stages()[0].centroids();
        if codes.rank() < 3 {
            return Err(Error::Rank { argument: "codes", expected: 3, shape: codes.dims().to_vec() });
        }
        let (rows, tail) = codes.dims().split_at(codes.rank() - 2);
        if tail[0] != self.groups() {
            return Err(Error::Size { argument: "codes", what: "groups", got: tail[0], expected: self.groups() });
        }
        let codes = checked_codes(codes, centroids)?;
        if codes.elem_count() == 0 {
            return empty([rows, &[self.d()]].concat(), centroids.dtype(), codes.device());
        }
        let own = self.own_batch(&codes, 2)?;
        let at = own.rank() - 3;
        self.join(&self.residual.decode(&own.transpose(at, at + 1)?.contiguous()?)?, rows)
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.residual.bits_per_value()
    }

    /// The same with each problem's codebooks as stored spread over `rows` rows.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        self.residual.bits_per_value_with_codebook(rows)
    }

    fn encoded(&self, x: &Tensor, encode: impl Fn(&ResidualQuantizer, &Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let Some(pieces) = self.pieces(x)? else {
            let tail = [self.groups(), self.residual.stages().len()];
            return empty([&x.dims()[..x.rank() - 1], &tail].concat(), DType::U32, x.device());
        };
        let codes = encode(&self.residual, &pieces)?;
        let at = codes.rank() - 3;
        let shape = [&x.dims()[..x.rank() - 1], &codes.dims()[at..=at], &codes.dims()[at + 2..]].concat();
        Ok(codes.transpose(at, at + 1)?.contiguous()?.reshape(shape)?)
    }

    /// The groups of rows `x` `(..batch, n, d)`, or nothing if there are no rows.
    fn pieces(&self, x: &Tensor) -> Result<Option<Tensor>> {
        if x.rank() < 2 {
            return Err(Error::Rank { argument: "x", expected: 2, shape: x.dims().to_vec() });
        }
        let (got, centroids) = (x.dims()[x.rank() - 1], self.residual.stages()[0].centroids());
        if got != self.d() {
            return Err(Error::Size { argument: "x", what: "columns", got, expected: self.d() });
        }
        check_dtype("x", x, centroids.dtype())?;
        check_device("x", x, centroids.device())?;
        if x.elem_count() == 0 {
            return Ok(None);
        }
        Ok(Some(split(&self.own_batch(&x.detach(), 1)?, self.groups())?))
    }

    /// `t` `(..batch, n, ..)`, of which so many dimensions are behind `n`, with the batch that the stages have: all in one if they serve any.
    fn own_batch(&self, t: &Tensor, behind: usize) -> Result<Tensor> {
        let rows = t.rank() - behind;
        let any = self.residual.stages()[0].centroids().rank() == 3 && rows > 1;
        Ok(if any { t.flatten_to(rows - 1)? } else { t.clone() })
    }

    /// Groups `(..batch, groups, n, d / groups)` as the rows `(..rows, d)`.
    fn join(&self, groups: &Tensor, rows: &[usize]) -> Result<Tensor> {
        let at = groups.rank() - 3;
        Ok(groups.transpose(at, at + 1)?.contiguous()?.reshape([rows, &[self.d()]].concat())?)
    }
}

impl Quantizer for GroupedResidualQuantizer {
    const KIND: &'static str = "grouped_residual_quantizer";
    const CODEBOOKS: Option<usize> = None;

    fn codebooks(&self) -> Vec<&Codebook> {
        self.residual.codebooks()
    }

    fn from_codebooks(codebooks: Vec<Codebook>) -> Result<Self> {
        Self::new(ResidualQuantizer::from_codebooks(codebooks)?)
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        match self.pieces(x)? {
            Some(pieces) => self.join(&self.residual.reconstruct(&pieces)?, &x.dims()[..x.rank() - 1]),
            None => empty(x.shape(), x.dtype(), x.device()),
        }
    }
}
