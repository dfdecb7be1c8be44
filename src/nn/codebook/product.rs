//! Pieces of rows, coded apart.

use super::{
    codes::{check_places, check_u8, checked_codes, empty, in_bytes},
    orthogonal::{check_rotation, rotated, ProductConfig},
    quantizer::Quantizer,
    Codebook,
};
use crate::{
    error::{Error, Result},
    kmeans::KMeans,
    metric::Metric,
    primitives,
    problem::{check_device, check_dtype, Problem},
    row_weights,
    rows::Rows,
};
use candle_core::{DType, Tensor};

/// Rows cut into `m` equal pieces, each with a codebook of its own: product quantisation (Jegou et al. 2011). `k^m` different
/// rows at the price of `m` codes.
///
/// Rows may be rotated before they are cut, and pieces may share a codebook ([`train_with`](Self::train_with)): a rotation spreads what columns
/// say over the pieces.
#[derive(Clone, Debug)]
pub struct ProductQuantizer {
    /// `(..batch, m, k, d / m)`, or `(..batch, 1, k, d / m)` if pieces share it.
    codebook: Codebook,
    /// `(d, d)` or `(..batch, d, d)`.
    rotation: Option<Tensor>,
    /// The pieces that share a codebook.
    shared: Option<usize>,
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
        Ok(Self { codebook, rotation: None, shared: None })
    }

    /// From `(..batch, m, k, d / m)` entries, or `(..batch, 1, k, d / m)` that so many pieces share, which are known to be finite, for
    /// which nothing waits.
    pub(in crate::nn) fn of_entries(centroids: Tensor, shared: Option<usize>) -> Self {
        Self { codebook: Codebook { centroids, metric: Metric::SquaredEuclidean }, rotation: None, shared }
    }

    /// Clusters the `m` pieces of the rows of `x` `(..batch, n, d)`, all of them and all problems in one call. Given centroids
    /// are `(..batch, m, k, d / m)`, or `(k, d / m)` for every piece; weights and lengths count in every piece. Which rows
    /// count is as in [`Codebook::train`]: a row that is not finite in none of its pieces, and by cosine a piece of length 0
    /// does not.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. Refuses columns that `m` does not divide.
    pub fn train(x: &Tensor, m: usize, kmeans: &KMeans) -> Result<Self> {
        let (pieces, kmeans) = pieces_to_train(x, m, kmeans)?;
        Self::new(Codebook::train(&pieces, &kmeans)?)
    }

    /// The same of rows that are rotated first, or with one codebook for all pieces, which learns from all of them; given centroids are
    /// `(k, d / m)` or `(..batch, k, d / m)` then.
    ///
    /// # Errors
    /// As [`train`](Self::train). Refuses given rotations of other shapes and matrices that are not orthogonal, and
    /// [`KMeans::lengths`] with a shared codebook.
    pub fn train_with(x: &Tensor, config: &ProductConfig, kmeans: &KMeans) -> Result<Self> {
        let m = config.pieces;
        split(x, m)?;
        let p = Problem::of(x.dims(), x.dtype(), kmeans.k, kmeans.metric)?;
        kmeans.weights.as_ref().map_or(Ok(()), |weights| p.weights(weights, x.device()))?;
        kmeans.lengths.as_ref().map_or(Ok(()), |lengths| p.lengths(lengths, x.device()))?;
        if let (true, Some(lengths)) = (config.shared, &kmeans.lengths) {
            let (got, with) = (format!("{:?}", lengths.dims()), "a codebook that all pieces share".into());
            return Err(Error::Conflict { argument: "lengths", got, with });
        }
        let (x, kmeans) = match kmeans.check_finite {
            true => (x.detach(), kmeans.clone()),
            false => (row_weights::marked(x, &KMeans::new(kmeans.k).check_finite(false))?.0, kmeans.clone()),
        };
        let rotation = config.rotation.matrix(&x, m, &kmeans)?;
        let x = match &rotation {
            Some(matrix) => {
                let rows = rotated(&x, matrix, false)?;
                if kmeans.check_finite {
                    refuse_overflow(&x, &rows)?;
                }
                rows
            }
            None => x,
        };
        let trained = match config.shared {
            true => Self::train_shared(&x, m, &kmeans)?,
            false => Self::train(&x, m, &kmeans)?,
        };
        trained.with_extras(rotation, config.shared.then_some(m))
    }

    /// Clusters all pieces of a problem's rows together.
    fn train_shared(x: &Tensor, m: usize, kmeans: &KMeans) -> Result<Self> {
        let (pieces, mut kmeans) = (split(x, m)?, kmeans.clone());
        let (batch, n) = (&x.dims()[..x.rank() - 2], x.dims()[x.rank() - 2]);
        if let Some(weights) = kmeans.weights.take() {
            let each = weights.unsqueeze(weights.rank() - 1)?.broadcast_as([batch, &[m, n]].concat())?.contiguous()?;
            kmeans.weights = Some(each.reshape([batch, &[m * n]].concat())?);
        }
        let all = pieces.contiguous()?.reshape([batch, &[m * n, pieces.dims()[x.rank()]]].concat())?;
        let one = Codebook::train(&all, &kmeans)?;
        Self::new(Codebook { centroids: one.centroids.unsqueeze(batch.len())?, metric: one.metric })
    }

    /// What rows are multiplied by before they are cut into pieces, f32, or f64 for such rows: `(d, d)` or `(..batch, d, d)`.
    pub fn rotation(&self) -> Option<&Tensor> {
        self.rotation.as_ref()
    }

    /// Whether all pieces have the same codebook, which is there once.
    pub fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// The codebooks, `(..batch, m, k, d / m)`, or the one that pieces share, `(..batch, 1, k, d / m)`.
    pub fn codebook(&self) -> &Codebook {
        &self.codebook
    }

    /// Pieces of a row.
    pub fn m(&self) -> usize {
        self.shared.unwrap_or_else(|| self.codebook.centroids.dims()[self.codebook.centroids.rank() - 3])
    }

    /// Values of a row.
    pub fn d(&self) -> usize {
        self.m() * self.codebook.d()
    }

    /// The pieces of rows `(..batch, n, d)`, rotated if there is a rotation, `(..batch, m, n, d / m)`: what the codebooks are codebooks of, as
    /// to an [`EmaCodebook`](crate::nn::EmaCodebook).
    ///
    /// # Errors
    /// Refuses other numbers of columns.
    pub fn split(&self, x: &Tensor) -> Result<Tensor> {
        self.check_columns(x)?;
        match &self.rotation {
            Some(rotation) if x.elem_count() > 0 => split(&rotated(x, rotation, false)?, self.m()),
            _ => split(x, self.m()),
        }
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
        if pieces.elem_count() == 0 {
            return empty(shape, pieces.dtype(), pieces.device());
        }
        let rows = pieces.transpose(rank - 3, rank - 2)?.reshape(shape)?;
        self.rotation.as_ref().map_or_else(|| Ok(rows.clone()), |rotation| rotated(&rows, rotation, true))
    }

    /// The exact nearest entry of each piece of each row of `x` `(..batch, n, d)`: u32 `(..batch, n, m)`.
    ///
    /// # Errors
    /// As [`assign`](crate::assign).
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_no_rows(x)? {
            return empty([&x.dims()[..x.rank() - 1], &[self.m()]].concat(), DType::U32, x.device());
        }
        let (rows, batch) = self.own_batch(x)?;
        let codes = self.apart(&self.codebook.encode(&self.together(&self.split(&rows)?)?)?, &rows)?;
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
        let of_pieces = codes.transpose(rank - 2, rank - 1)?.contiguous()?;
        let values = self.apart(&self.codebook.decode(&self.together(&of_pieces)?)?, &codes)?;
        Ok(self.join(&values)?.reshape([&batch[..], &[self.d()]].concat())?)
    }

    /// Bits of a row's codes by the values they stand for. The codebooks are not counted.
    pub fn bits_per_value(&self) -> f64 {
        self.codebook.bits_per_value()
    }

    /// The same with each problem's codebooks as stored, a shared one once, spread over `rows` rows. A rotation is not counted.
    pub fn bits_per_value_with_codebook(&self, rows: usize) -> f64 {
        let codebooks = self.shared.unwrap_or(1);
        let stored = self.codebook.bits_per_value_with_codebook(rows) - self.bits_per_value();
        self.bits_per_value() + stored / codebooks as f64
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

    /// What the codebooks take of pieces `(..batch, m, n, ..)`: the same, or all as those of one codebook, `(..batch, 1, m * n, ..)`.
    fn together(&self, pieces: &Tensor) -> Result<Tensor> {
        let at = self.codebook.centroids.rank() - 3;
        let Some(m) = self.shared else { return Ok(pieces.clone()) };
        let (batch, rest) = pieces.dims().split_at(at);
        Ok(pieces.contiguous()?.reshape([batch, &[1, m * rest[1]], &rest[2..]].concat())?)
    }

    /// The reverse for what the codebooks make of the pieces of rows `(..batch, n, ..)`.
    fn apart(&self, t: &Tensor, rows: &Tensor) -> Result<Tensor> {
        let at = self.codebook.centroids.rank() - 3;
        let Some(m) = self.shared else { return Ok(t.clone()) };
        let (batch, rest) = t.dims().split_at(at);
        Ok(t.reshape([batch, &[m, rows.dims()[at]], &rest[2..]].concat())?)
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

    fn extras(&self) -> (Option<&Tensor>, Option<usize>) {
        (self.rotation.as_ref(), self.shared)
    }

    fn with_extras(self, rotation: Option<Tensor>, shared: Option<usize>) -> Result<Self> {
        if let Some(pieces) = shared {
            let (got, width) = (self.m(), self.codebook.d());
            if got != 1 {
                return Err(Error::Size { argument: "centroids", what: "codebooks", got, expected: 1 });
            }
            let limit = usize::MAX / width;
            if pieces > limit {
                return Err(Error::TooLarge { argument: "pieces", got: pieces, limit });
            }
            if pieces == 0 {
                return Err(Error::Value { argument: "pieces", got: 0.0, expected: "at least 1" });
            }
        }
        let all = Self { rotation, shared, ..self };
        if let Some(rotation) = &all.rotation {
            let dims = all.codebook.centroids.dims();
            check_rotation(rotation, &dims[..dims.len() - 3], all.d())?;
        }
        Ok(all)
    }

    fn reconstruct(&self, x: &Tensor) -> Result<Tensor> {
        if self.has_no_rows(x)? {
            return empty(x.shape(), x.dtype(), x.device());
        }
        let (rows, _) = self.own_batch(&x.detach())?;
        let values = self.codebook.quantize(&self.together(&self.split(&rows)?)?)?.0;
        Ok(self.join(&self.apart(&values, &rows)?)?.reshape(x.shape())?)
    }
}

/// The `m` pieces of rows `x` `(..batch, n, d)`, and what `kmeans` says of the rows for each of them. A row that is not finite, where that is
/// let in, is so in all pieces.
pub(super) fn pieces_to_train(x: &Tensor, m: usize, kmeans: &KMeans) -> Result<(Tensor, KMeans)> {
    let pieces = split(x, m)?;
    let p = Problem::of(x.dims(), x.dtype(), kmeans.k, kmeans.metric)?;
    if let Some(weights) = &kmeans.weights {
        p.weights(weights, x.device())?;
    }
    if let Some(lengths) = &kmeans.lengths {
        p.lengths(lengths, x.device())?;
    }
    let mut kmeans = kmeans.clone();
    // Each piece of a problem has what the problem has; weights `(n)` serve every problem as they are.
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
        return Ok((pieces, kmeans));
    }
    let (x, _) = row_weights::marked(x, &KMeans::new(kmeans.k).check_finite(false))?;
    Ok((split(&x, m)?, kmeans))
}

/// `(..batch, n, d)` to `(..batch, m, n, d / m)`.
pub(super) fn split(x: &Tensor, m: usize) -> Result<Tensor> {
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

/// Refuses a rotation that takes finite rows beyond their dtype.
fn refuse_overflow(x: &Tensor, rotated: &Tensor) -> Result<()> {
    let first =
        |t: &Tensor| Ok::<_, Error>(primitives::max_abs_and_first_nonfinite(&Rows::new(t)?)?.1.to_vec1::<u32>()?);
    let (of_x, of_rotated) = (first(x)?, first(rotated)?);
    match of_rotated.iter().zip(&of_x).position(|(of_rotated, of_x)| of_rotated < of_x) {
        None => Ok(()),
        Some(batch) => {
            let with =
                format!("row {} of batch element {batch}, which it takes beyond {:?}", of_rotated[batch], x.dtype());
            Err(Error::Conflict { argument: "rotation", got: "a matrix".into(), with })
        }
    }
}
