//! The clustered tokens of a cache as codes.

use super::{
    codes::{CodedRows, Pieces},
    KvClusters,
};
use crate::{
    error::{Error, Result},
    functional::{inverse_order, rows_of, sort_by_cluster},
    nn::parts::cumsum_last,
    primitives,
};
use candle_core::{DType, Tensor};
use std::{ops::Range, sync::Arc};

/// Clusters of a segment, so that a label is a byte.
pub(super) const SEGMENT_CLUSTERS: usize = 256;

/// Neighbouring tokens with clusters of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) tokens: usize,
    pub(super) clusters: usize,
}

/// Tokens as codes, cluster by cluster, so that where clusters begin says whose each is.
#[derive(Clone, Debug)]
pub(super) struct CodedTokens {
    pub(super) keys: CodedRows,
    pub(super) values: CodedRows,
    /// u32 `(batch, kv_heads, k + 1)`: cluster `j` is `offsets[j]..offsets[j + 1]`.
    pub(super) offsets: Tensor,
    /// As [`KvClusters`] has them.
    pub(super) spreads: Tensor,
    /// u8 `(batch, kv_heads, m)`, in the order of the sequence: the cluster of each token, counted from the first of its segment. Only what
    /// forgets or shows tokens reads it.
    pub(super) labels: Tensor,
    pub(super) segments: Arc<[Segment]>,
}

impl CodedTokens {
    /// Codes tokens `(batch, kv_heads, m, d)` of new `segments` and their `clusters`, with the entries of those `before`.
    pub(super) fn new(
        segments: Vec<Segment>,
        clusters: &KvClusters,
        [keys, values]: [&Tensor; 2],
        pieces: [Pieces; 2],
        before: Option<&Self>,
    ) -> Result<Self> {
        let sorted = &clusters.labels.contiguous()?.gather(&clusters.order.contiguous()?, 2)?;
        let places = [&clusters.order, sorted];
        let new = Self {
            keys: CodedRows::new(keys, &clusters.mean_keys, places, pieces[0], before.map(|b| &b.keys))?,
            values: CodedRows::new(values, &clusters.mean_values, places, pieces[1], before.map(|b| &b.values))?,
            // Copies: what these are parts of would stay with them.
            offsets: clusters.offsets.force_contiguous()?,
            spreads: clusters.spreads.force_contiguous()?,
            labels: clusters.labels.broadcast_sub(&first_clusters(&segments, keys)?)?.to_dtype(DType::U8)?,
            segments: segments.into(),
        };
        match before {
            Some(before) => before.followed_by(&new),
            None => Ok(new),
        }
    }

    fn followed_by(&self, next: &Self) -> Result<Self> {
        let after = next.offsets.narrow(2, 1, next.k())?;
        let after = after.broadcast_add(&Tensor::new(self.len() as u32, after.device())?)?;
        Ok(Self {
            keys: self.keys.followed_by(&next.keys)?,
            values: self.values.followed_by(&next.values)?,
            offsets: Tensor::cat(&[&self.offsets, &after], 2)?,
            spreads: Tensor::cat(&[&self.spreads, &next.spreads], 2)?,
            labels: Tensor::cat(&[&self.labels, &next.labels], 2)?,
            segments: self.segments.iter().chain(&*next.segments).copied().collect(),
        })
    }

    pub(super) fn len(&self) -> usize {
        self.labels.dims()[2]
    }

    pub(super) fn k(&self) -> usize {
        self.offsets.dims()[2] - 1
    }

    /// The same of other sequences of the batch.
    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            keys: self.keys.map(&f)?,
            values: self.values.map(&f)?,
            offsets: f(&self.offsets)?,
            spreads: f(&self.spreads)?,
            labels: f(&self.labels)?,
            segments: self.segments.clone(),
        })
    }

    /// The tokens `kept` alone, counted from the first. Clusters keep their means, by which what is left of them is coded, and segments
    /// that have no token left are gone.
    pub(super) fn cut(&self, kept: Range<usize>) -> Result<Self> {
        let mut segments = vec![];
        let (mut clusters, mut first, mut token) = (0..0, 0, 0);
        for segment in &*self.segments {
            let left = kept.end.min(token + segment.tokens).saturating_sub(kept.start.max(token));
            if left > 0 {
                if segments.is_empty() {
                    clusters = first..first;
                }
                clusters.end += segment.clusters;
                segments.push(Segment { tokens: left, ..*segment });
            }
            (first, token) = (first + segment.clusters, token + segment.tokens);
        }
        let (order, _) = self.order()?;
        let labels = self.labels.narrow(2, kept.start, kept.len())?.contiguous()?;
        let whole = labels.to_dtype(DType::U32)?.broadcast_add(&first_clusters(&segments, &labels)?)?;
        let (kept_order, offsets) = sort_by_cluster(&whole, clusters.len())?;
        let offsets = offsets.force_contiguous()?;
        // Where each token that is left was in the order, in the order that is left.
        let start = Tensor::new(kept.start as u32, labels.device())?;
        let at = inverse_order(&order)?.gather(&kept_order.broadcast_add(&start)?, 2)?;
        let of_clusters = |t: &Tensor| Ok(t.narrow(2, clusters.start, clusters.len())?.contiguous()?);
        let rows = |rows: &CodedRows| {
            let means = rows.means.map(&of_clusters)?;
            Ok::<_, Error>(CodedRows { means, ..rows.at(&at)? })
        };
        let (keys, values, spreads) = (rows(&self.keys)?, rows(&self.values)?, of_clusters(&self.spreads)?);
        Ok(Self { keys, values, offsets, spreads, labels, segments: segments.into() })
    }

    /// The clusters of the tokens as they lie here: as if their order were that of the sequence.
    pub(super) fn clusters(&self) -> Result<KvClusters> {
        let (batch, heads, m) = self.labels.dims3()?;
        let places = Tensor::arange(0u32, m as u32, self.labels.device())?;
        Ok(KvClusters {
            labels: self.sorted_labels()?,
            order: places.broadcast_as((batch, heads, m))?.contiguous()?,
            offsets: self.offsets.clone(),
            sizes: primitives::cluster_sizes(&self.offsets)?.to_dtype(DType::F32)?,
            spreads: self.spreads.clone(),
            mean_keys: self.keys.means.clone(),
            mean_values: self.values.means.clone(),
        })
    }

    /// The keys and values at the places `at`, u32 `(batch, kv_heads, n)`, of tokens with these `labels` there.
    pub(super) fn decoded_at(&self, at: &Tensor, labels: &Tensor) -> Result<[Tensor; 2]> {
        let labels = &labels.contiguous()?.gather(at, 2)?;
        let decoded = |rows: &CodedRows| rows.at(at)?.decode(labels);
        Ok([decoded(&self.keys)?, decoded(&self.values)?])
    }

    /// The keys or the values of all tokens, in the order of the sequence.
    pub(super) fn decoded(&self, pick: fn(&Self) -> &CodedRows) -> Result<Tensor> {
        let (rows, (order, _)) = (pick(self), self.order()?);
        rows_of(&rows.decode(&self.sorted_labels()?)?, &inverse_order(&order)?)
    }

    /// The order of the tokens here, and where their clusters begin, by their labels alone.
    pub(super) fn order(&self) -> Result<(Tensor, Tensor)> {
        let labels = self.labels.to_dtype(DType::U32)?;
        sort_by_cluster(&labels.broadcast_add(&first_clusters(&self.segments, &labels)?)?, self.k())
    }

    /// The cluster of each token here: marks where clusters begin, counted.
    fn sorted_labels(&self) -> Result<Tensor> {
        let ((batch, heads, m), k) = (self.labels.dims3()?, self.k());
        let starts = self.offsets.narrow(2, 0, k)?.contiguous()?;
        let marks = Tensor::zeros((batch, heads, m + 1), DType::F32, starts.device())?;
        let marks = marks.scatter_add(&starts, &starts.to_dtype(DType::F32)?.ones_like()?, 2)?;
        let counted = cumsum_last(&marks.narrow(2, 0, m)?.contiguous()?)?;
        Ok((counted - 1.0)?.to_dtype(DType::U32)?)
    }

    /// The tensors of a file, by name.
    pub(super) fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let rows = [("keys", &self.keys), ("values", &self.values)].into_iter();
        let rows = rows.flat_map(|(of, rows)| rows.tensors().map(move |(name, t)| (format!("{of}_{name}"), t)));
        rows.chain(
            [("offsets", &self.offsets), ("spreads", &self.spreads), ("labels", &self.labels)]
                .map(|(n, t)| (n.to_string(), t)),
        )
    }
}

/// The first cluster of each token's segment, u32 `(1, 1, m)`, on the device of `like`.
fn first_clusters(segments: &[Segment], like: &Tensor) -> Result<Tensor> {
    let mut first = 0;
    let of_tokens = segments.iter().flat_map(|segment| {
        first += segment.clusters as u32;
        std::iter::repeat_n(first - segment.clusters as u32, segment.tokens)
    });
    let of_tokens: Vec<u32> = of_tokens.collect();
    let m = of_tokens.len();
    Ok(Tensor::from_vec(of_tokens, (1, 1, m), like.device())?)
}
