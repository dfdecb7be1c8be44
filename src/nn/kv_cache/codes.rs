//! Keys or values as product codes of what they differ by from the mean of their cluster.

use super::{
    gains::{self, Gains},
    KvMeans,
};
use crate::{
    error::{Error, Result},
    functional::rows_of,
    kmeans::{Init, KMeans},
    nn::{parts::to_accumulate_dtype, ProductConfig, ProductQuantizer, Rotation},
    request::Coded,
};
use candle_core::{DType, Device, Tensor};

/// Updates of the entries.
const PASSES: usize = 8;
/// The same from a grid: more of them would draw in the entries for values far out.
const PASSES_FROM_GRID: usize = 4;
/// Rows of a head that its entries are trained on, at most.
const TRAINED_ON: usize = 4096;
/// Rows that are encoded or decoded at once: unpacked codes take several times the memory of packed ones.
const AT_ONCE: usize = 4096;

/// How a [`ClusteredKvCache`](super::ClusteredKvCache) keeps clustered tokens as codes: product quantisation (Jegou et al. 2011) of what a
/// key or a value differs by from the mean of its cluster. Rows are cut into pieces of neighbouring columns, and each piece becomes
/// the nearest of the 16 or 256 entries that k-means finds for it on the tokens that are clustered first, for each head.
///
/// Rows may be [rotated](Self::rotation) before they are cut, pieces may [share](Self::shared) their entries, and lengths may be coded
/// [apart](Self::gains).
#[derive(Clone, Debug)]
pub struct KvCodes {
    /// Of keys and of values.
    pub(super) pieces: [Pieces; 2],
    pub(super) rotations: [Rotation; 2],
}

/// The pieces of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pieces {
    pub(super) columns: usize,
    /// Of a code.
    pub(super) bits: usize,
    /// Whether all have the same entries.
    pub(super) shared: bool,
    /// True if they are cut from a row's direction, whose length is coded apart.
    pub(super) gains: bool,
}

impl Default for KvCodes {
    fn default() -> Self {
        Self::new()
    }
}

impl KvCodes {
    /// 4 bits for each column of a key, whose errors the softmax enlarges, and 8 bits for every four columns of a value. The entries
    /// for values are what a short sequence pays most for: 512 bytes a column in f16, once for each head.
    pub const fn new() -> Self {
        let (shared, gains) = (false, false);
        let pieces = [Pieces { columns: 1, bits: 4, shared, gains }, Pieces { columns: 4, bits: 8, shared, gains }];
        Self { pieces, rotations: [Rotation::None, Rotation::None] }
    }

    /// Codes of `bits`, 4 or 8, for pieces of so many columns of keys. One column begins with entries evenly spaced over its values,
    /// more with evenly spaced rows.
    pub const fn keys(mut self, columns: usize, bits: usize) -> Self {
        self.pieces[0] = Pieces { columns, bits, ..self.pieces[0] };
        self
    }

    /// The same for values.
    pub const fn values(mut self, columns: usize, bits: usize) -> Self {
        self.pieces[1] = Pieces { columns, bits, ..self.pieces[1] };
        self
    }

    /// Whether all pieces of keys, and all of values, have the same entries (default: neither), which learn from all of them: a head
    /// has one table, where it had one for each piece. Pieces should be alike for that, as they are after a [rotation](Self::rotation).
    pub const fn shared(mut self, keys: bool, values: bool) -> Self {
        (self.pieces[0].shared, self.pieces[1].shared) = (keys, values);
        self
    }

    /// Codes the lengths of keys, and of values, apart from their directions (default: neither): gain and shape (Sabin and Gray 1984). A length
    /// is that of what a row differs by from its cluster's mean, in a byte, which is one of 256 gains from that of the longest row down, sixteen
    /// to an octave. Entries are those of rows that are all about as long, where each counts by the square of its gain, as its errors do.
    pub const fn gains(mut self, keys: bool, values: bool) -> Self {
        (self.pieces[0].gains, self.pieces[1].gains) = (keys, values);
        self
    }

    /// Rotates keys and values before they are cut into pieces (default: neither), by an orthogonal matrix, which leaves scores as they
    /// are: a query is rotated as keys are, and what is read is rotated back. Principal components are those of what the tokens that are
    /// clustered first differ by from their cluster's mean, of each head of each sequence; a given matrix is `(d, d)` or `(kv_heads, d, d)`.
    ///
    /// From the first codes on a cache keeps all of its tokens rotated, as in QuaRot (Ashkboos et al. 2024), so that a query and its output
    /// are multiplied once, whatever they read: what is no code is rounded to its dtype once more. Each head has its matrix in f32 (f64 for
    /// f64), a random or given one of all heads once.
    pub fn rotation(mut self, keys: Rotation, values: Rotation) -> Self {
        self.rotations = [keys, values];
        self
    }
}

impl Pieces {
    /// Refuses pieces of keys and values that do not fit keys of `d` columns and values of `width`.
    pub(super) fn check(of: [Self; 2], [d, width]: [usize; 2]) -> Result<()> {
        for (what, Self { columns, bits, .. }, d) in [("keys", of[0], d), ("values", of[1], width)] {
            if ![4, 8].contains(&bits) {
                return Err(Error::Value { argument: "codes", got: bits as f64, expected: "4 or 8 bits" });
            }
            // Two codes of 4 bits make a byte.
            let per_byte = columns.saturating_mul(8 / bits);
            if per_byte == 0 || !d.is_multiple_of(per_byte) {
                let (got, with) =
                    (format!("{bits} bits for {columns} columns"), format!("{what} of {d}, not of whole bytes"));
                return Err(Error::Conflict { argument: "codes", got, with });
            }
        }
        Ok(())
    }

    /// Those of a row of `d` columns that have the same entries.
    pub(super) fn sharing(self, d: usize) -> Option<usize> {
        self.shared.then_some(d / self.columns)
    }
}

/// Rows in the order of their clusters, each as its cluster's mean and codes.
#[derive(Clone, Debug)]
pub(super) struct CodedRows {
    /// u8 `(batch, kv_heads, m, bytes)`: of 4 bits two in a byte, the earlier in the low half.
    pub(super) codes: Tensor,
    pub(super) quantizer: ProductQuantizer,
    pub(super) means: KvMeans,
    /// What the rows of the quantiser are multiplied by, if it has directions.
    pub(super) gains: Option<Gains>,
}

impl CodedRows {
    /// The tensors' names in a file.
    pub(super) const NAMES: [&'static str; 4] = ["codes", "entries", "means", "scales"];

    /// Codes rows `x` `(batch, kv_heads, n, d)`, whose clusters have these `means`: taken in the u32 `order`
    /// `(batch, kv_heads, n)` they have the ascending `labels`. Without codes `before` a quantiser is trained.
    pub(super) fn new(
        x: &Tensor,
        means: &KvMeans,
        [order, labels]: [&Tensor; 2],
        pieces: Pieces,
        before: Option<&Self>,
    ) -> Result<Self> {
        let known = means.dequantize(x.dtype())?;
        let rest = |order: &Tensor, labels: &Tensor| Ok::<_, Error>((rows_of(x, order)? - rows_of(&known, labels)?)?);
        let n = order.dims()[2];
        let (quantizer, longest) = match before {
            Some(Self { quantizer, gains, .. }) => (quantizer.clone(), gains.as_ref().map(|g| g.longest.clone())),
            None => {
                let spaced = sample_of(n, x.device())?;
                let sample = |t: &Tensor| t.index_select(&spaced, 2);
                let rest = rest(&sample(order)?, &sample(labels)?)?;
                match pieces.gains {
                    true => {
                        let longest = gains::longest(&rest)?;
                        let (directions, gains) = gains::directions(&rest, &longest)?;
                        let weights = gains::decoded(&gains, DType::F64)?.sqr()?.squeeze(3)?;
                        (trained(&directions, Some(&weights), pieces)?, Some(longest))
                    }
                    false => (trained(&rest, None, pieces)?, None),
                }
            }
        };
        let (mut codes, mut gains) = (vec![], vec![]);
        for start in (0..n).step_by(AT_ONCE) {
            let block = |t: &Tensor| t.narrow(2, start, AT_ONCE.min(n - start))?.contiguous();
            let mut rest = rest(&block(order)?, &block(labels)?)?;
            if let Some(longest) = &longest {
                let (directions, of_block) = gains::directions(&rest, longest)?;
                rest = directions;
                gains.push(of_block);
            }
            codes.push(packed(&quantizer.encode_u8(&rest)?, pieces)?);
        }
        let gains =
            longest.map(|longest| Ok::<_, Error>(Gains { codes: Tensor::cat(&gains, 2)?, longest })).transpose()?;
        Ok(Self { codes: Tensor::cat(&codes, 2)?, quantizer, means: means.clone(), gains })
    }

    /// The clusters of `next` after those that are here. Both have the same entries.
    pub(super) fn followed_by(&self, next: &Self) -> Result<Self> {
        let gains = self.gains.as_ref().zip(next.gains.as_ref()).map(|(a, b)| a.followed_by(b)).transpose()?;
        let codes = Tensor::cat(&[&self.codes, &next.codes], 2)?;
        Ok(Self { codes, quantizer: self.quantizer.clone(), means: self.means.followed_by(&next.means)?, gains })
    }

    /// The same of other sequences of the batch.
    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let shared = self.quantizer.is_shared().then(|| self.quantizer.m());
        let quantizer = ProductQuantizer::of_entries(f(self.quantizer.codebook().centroids())?, shared);
        let gains = self.gains.as_ref().map(|gains| gains.map(&f)).transpose()?;
        Ok(Self { codes: f(&self.codes)?, quantizer, means: self.means.map(&f)?, gains })
    }

    /// The rows at the places `at`, u32 `(batch, kv_heads, n)`, of this order.
    pub(super) fn at(&self, at: &Tensor) -> Result<Self> {
        let ((b, h, m, _), (_, _, n)) = (self.codes.dims4()?, at.dims3()?);
        let first = Tensor::from_iter((0..b * h).map(|i| (i * m) as u32), at.device())?.reshape((b, h, 1))?;
        let at = at.broadcast_add(&first)?.flatten_all()?;
        let taken = |t: &Tensor| t.flatten(0, 2)?.index_select(&at, 0)?.reshape((b, h, n, ()));
        let of_gains = |g: &Gains| Ok::<_, Error>(Gains { codes: taken(&g.codes)?, longest: g.longest.clone() });
        let gains = self.gains.as_ref().map(of_gains).transpose()?;
        Ok(Self { codes: taken(&self.codes)?, gains, ..self.clone() })
    }

    /// The rows that these codes stand for in the clusters `labels`, u32 `(batch, kv_heads, n)`.
    pub(super) fn decode(&self, labels: &Tensor) -> Result<Tensor> {
        let (entries, n) = (self.quantizer.codebook().centroids(), labels.dims()[2]);
        let means = self.means.dequantize(entries.dtype())?;
        let rows = (0..n).step_by(AT_ONCE).map(|start| {
            let block = |t: &Tensor| t.narrow(2, start, AT_ONCE.min(n - start))?.contiguous();
            let mut rest = self.quantizer.decode(&unpacked(&block(&self.codes)?, self.quantizer.m())?)?;
            if let Some(gains) = &self.gains {
                rest = rest.broadcast_mul(&gains::decoded(&block(&gains.codes)?, rest.dtype())?)?;
            }
            Ok((rest + rows_of(&means, &block(labels)?)?)?)
        });
        Ok(Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 2)?)
    }

    pub(super) fn request(&self) -> Coded<'_> {
        let (entries, gains) = (self.quantizer.codebook().centroids(), self.gains.as_ref().map(|g| &g.codes));
        Coded { codes: &self.codes, entries, means: self.means.codes(), gains }
    }

    /// The tensors of a file, by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let entries = self.quantizer.codebook().centroids();
        let all = [&self.codes, entries, &self.means.codes, &self.means.scales];
        let gains = self.gains.iter().flat_map(|gains| Gains::NAMES.into_iter().zip(gains.tensors()));
        Self::NAMES.into_iter().zip(all).chain(gains)
    }
}

/// The places of evenly spaced rows of `n` that entries, and rotations, are found from.
pub(super) fn sample_of(n: usize, device: &Device) -> Result<Tensor> {
    let count = n.min(TRAINED_ON);
    Ok(Tensor::from_iter((0..count).map(|i| (i * n / count) as u32), device)?)
}

/// Entries for the pieces of rows `(batch, kv_heads, n, d)`, which may have weights `(batch, kv_heads, n)`.
fn trained(x: &Tensor, weights: Option<&Tensor>, pieces: Pieces) -> Result<ProductQuantizer> {
    let ((batch, kv_heads, n, d), Pieces { columns, bits, shared, .. }) = (x.dims4()?, pieces);
    let (m, k) = (d / columns, n.min(1 << bits));
    let kmeans = match columns {
        1 => {
            let wide = to_accumulate_dtype(x)?;
            let (low, high) = (wide.min(2)?, wide.max(2)?);
            let (low, high) = if shared { (low.min_keepdim(2)?, high.max_keepdim(2)?) } else { (low, high) };
            let places = Tensor::from_iter((0..k).map(|i| (i as f64 + 0.5) / k as f64), x.device())?;
            let places = places.to_dtype(wide.dtype())?;
            let grid = (high - &low)?.unsqueeze(3)?.broadcast_mul(&places)?.broadcast_add(&low.unsqueeze(3)?)?;
            let grid = match shared {
                true => grid.reshape((batch, kv_heads, k, 1))?,
                false => grid.reshape((batch, kv_heads, m, k, 1))?,
            };
            let grid = grid.to_dtype(x.dtype())?;
            KMeans::new(k).init(Init::Given(grid)).max_iters(PASSES_FROM_GRID)
        }
        _ => KMeans::new(k).init(Init::Even).max_iters(PASSES),
    };
    let kmeans = match weights {
        Some(weights) => kmeans.sample_weights(weights),
        None => kmeans,
    };
    let config = ProductConfig { shared, ..ProductConfig::new(m) };
    let trained = ProductQuantizer::train_with(x, &config, &kmeans.tol(0.0))?;
    let entries = trained.codebook().centroids();
    // Fewer rows than entries: the last one stands in for those that are missing, so that no code is of none.
    let missing = (1 << bits) - k;
    let tables = entries.dims()[2];
    let last = entries.narrow(3, k - 1, 1)?.broadcast_as((batch, kv_heads, tables, missing, columns))?;
    Ok(match missing {
        0 => trained,
        _ => ProductQuantizer::of_entries(Tensor::cat(&[entries, &last.contiguous()?], 3)?, pieces.sharing(d)),
    })
}

/// u8 codes `(.., m)` in bytes.
fn packed(codes: &Tensor, Pieces { bits, .. }: Pieces) -> Result<Tensor> {
    if bits == 8 {
        return Ok(codes.clone());
    }
    let (b, h, n, m) = codes.dims4()?;
    let halves = codes.reshape((b, h, n, m / 2, 2))?;
    let half = |i| halves.narrow(4, i, 1)?.squeeze(4)?.contiguous();
    Ok((half(0)? + (half(1)? * 16.0)?)?)
}

/// The reverse, u32 `(.., m)`.
fn unpacked(bytes: &Tensor, m: usize) -> Result<Tensor> {
    let (b, h, n, len) = bytes.dims4()?;
    if len == m {
        return Ok(bytes.clone());
    }
    // Candle's integers have no remainder; f32 is exact here.
    let wide = bytes.to_dtype(DType::F32)?;
    let high = (&wide / 16.0)?.floor()?;
    let low = (wide - (&high * 16.0)?)?;
    Ok(Tensor::stack(&[low, high], 4)?.reshape((b, h, n, m))?.to_dtype(DType::U32)?)
}
