//! The clusters of tokens, a segment at a time.

use super::{
    coded::{CodedTokens, Segment, SEGMENT_CLUSTERS},
    ClusteredKvCache, KvMeans, Rotations, Settings, Stored, MAX_TOKENS,
};
use crate::{
    error::{Error, Result},
    functional::{self, sort_by_cluster},
    kmeans::{Init, KMeans},
    metric::Metric,
    nn::parts::{check_like, dims4_float},
    primitives, problem,
    request::Order,
    rows::Rows,
};
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Tokens that are coded first, for each entry of a piece, at least.
const ROWS_PER_ENTRY: usize = 4;

/// The clusters of a cache, segment by segment. Labels and offsets of a segment continue those before it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KvClusters {
    /// u32 `(batch, kv_heads, m)`: the cluster of each of the `m` clustered tokens, the first of which follows the sinks.
    pub labels: Tensor,
    /// u32 `(batch, kv_heads, m)`: the clustered tokens, counted from the first of them, cluster by cluster.
    pub order: Tensor,
    /// u32 `(batch, kv_heads, k + 1)`: cluster `j` is `order[offsets[j]..offsets[j + 1]]`.
    pub offsets: Tensor,
    /// f32 `(batch, kv_heads, k)`: tokens in each cluster.
    pub sizes: Tensor,
    /// `(batch, kv_heads, k)`, f32, of f64 f64: the standard deviation of each cluster's keys from their mean, over all columns. A key that
    /// is not finite does not count.
    pub spreads: Tensor,
    /// `(batch, kv_heads, k, d)`.
    pub mean_keys: KvMeans,
    /// `(batch, kv_heads, k, width)`, by the same labels.
    pub mean_values: KvMeans,
}

impl KvClusters {
    /// From the `labels` of tokens, below `k`, which the host waits to check.
    pub(super) fn new(keys: &Tensor, values: &Tensor, labels: &Tensor, k: usize) -> Result<Self> {
        let (order, offsets) = sort_by_cluster(labels, k)?;
        let sizes = primitives::cluster_sizes(&offsets)?.to_dtype(DType::F32)?;
        let labels = labels.contiguous()?;
        let sorted = Order::of_heads(&labels, &order, &offsets)?;
        let [mean_keys, mean_values] = [keys, values].map(|t| functional::means_by_order(t, &sorted));
        let mean_keys = mean_keys?;
        let spreads = spreads(keys, &mean_keys, &sorted, &sizes)?;
        let [mean_keys, mean_values] = [&mean_keys, &mean_values?].map(KvMeans::new);
        Ok(Self { labels, order, offsets, sizes, spreads, mean_keys: mean_keys?, mean_values: mean_values? })
    }

    /// Bytes of a head's clusters that each of its queries reads to choose among them and to estimate by them: means with their scales,
    /// spreads, and where each begins.
    pub fn index_bytes(&self) -> usize {
        let k = self.sizes.dims()[2];
        let columns = |means: &KvMeans| means.codes.dims()[3];
        let numbers = 3 * self.spreads.dtype().size_in_bytes() + size_of::<u32>();
        k * (columns(&self.mean_keys) + columns(&self.mean_values) + numbers)
    }

    /// The clusters of the tokens `kept` alone, whose keys and values are given. Clusters at the ends that have no token left in any head
    /// are gone, and the others numbered from 0.
    pub(super) fn cut(&self, kept: Range<usize>, keys: &Tensor, values: &Tensor) -> Result<Self> {
        let labels = self.labels.narrow(2, kept.start, kept.len())?;
        if labels.elem_count() == 0 {
            return Self::new(keys, values, &labels, self.sizes.dims()[2]);
        }
        let all = labels.flatten_all()?;
        let (first, last) = (all.min(0)?, all.max(0)?);
        let k = (last.to_scalar::<u32>()? - first.to_scalar::<u32>()?) as usize + 1;
        Self::new(keys, values, &labels.broadcast_sub(&first)?, k)
    }

    pub(super) fn tensors(&self) -> [&Tensor; 9] {
        let (keys, values) = (&self.mean_keys, &self.mean_values);
        let means = [&keys.codes, &keys.scales, &values.codes, &values.scales];
        let [a, b, c, d] = means;
        [&self.labels, &self.order, &self.offsets, &self.sizes, &self.spreads, a, b, c, d]
    }

    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            labels: f(&self.labels)?,
            order: f(&self.order)?,
            offsets: f(&self.offsets)?,
            sizes: f(&self.sizes)?,
            spreads: f(&self.spreads)?,
            mean_keys: self.mean_keys.map(&f)?,
            mean_values: self.mean_values.map(&f)?,
        })
    }

    fn followed_by(&self, next: &Self) -> Result<Self> {
        let (k, m) = (self.sizes.dims()[2], self.labels.dims()[2]);
        let join = |a: &Tensor, b: &Tensor| Tensor::cat(&[a, b], 2);
        let after = |t: &Tensor, by: usize| t.broadcast_add(&Tensor::new(by as u32, t.device())?);
        let offsets = next.offsets.narrow(2, 1, next.sizes.dims()[2])?;
        Ok(Self {
            labels: join(&self.labels, &after(&next.labels, k)?)?,
            order: join(&self.order, &after(&next.order, m)?)?,
            offsets: join(&self.offsets, &after(&offsets, m)?)?,
            sizes: join(&self.sizes, &next.sizes)?,
            spreads: join(&self.spreads, &next.spreads)?,
            mean_keys: self.mean_keys.followed_by(&next.mean_keys)?,
            mean_values: self.mean_values.followed_by(&next.mean_values)?,
        })
    }
}

impl ClusteredKvCache {
    /// Clusters the tokens between the last segment and the recent ones as new segments, if they are enough for one, and
    /// says whether it did. There are as few segments as [`max_segment`](Self::max_segment) allows, and all of a length are one
    /// batched call. The clusters of a segment are k-means' from evenly spaced keys, by squared Euclidean distance. The host
    /// waits for the search for non-finite keys and the check of the labels.
    ///
    /// # Errors
    /// Refuses clusters and segments of no tokens, and non-finite keys, by their token and the batch element among all heads:
    /// those have to be taken back by [`truncate`](Self::truncate) or [`reset`](Self::reset). With [`codes`](Self::codes) it refuses
    /// values that are not finite, too. Fails as [`KMeans::fit`]. The cache is as before then.
    pub fn cluster(&mut self) -> Result<bool> {
        Self::cluster_layers([self])
    }

    /// [`cluster`](Self::cluster) for many caches, the heads of all of them in one batched call. The result is that of one
    /// call for each, to the bit.
    ///
    /// # Errors
    /// As [`cluster`](Self::cluster). Refuses codes that were asked for after there were clusters, and caches that differ in settings, shape, tokens, dtype or device.
    pub fn cluster_layers<'a>(layers: impl IntoIterator<Item = &'a mut Self>) -> Result<bool> {
        let mut layers: Vec<_> = layers.into_iter().collect();
        let Some(first) = layers.first() else { return Ok(false) };
        let Settings { cluster_size, segment, .. } = first.settings;
        let max_segment = first.settings.max_segment();
        for (argument, got) in [("cluster_size", cluster_size), ("max_segment", max_segment)] {
            if got == 0 {
                return Err(Error::Range { argument, got, min: 1, max: MAX_TOKENS });
            }
        }
        let waiting = first.waiting();
        layers[1..].iter().try_for_each(|layer| first.check_alike(layer))?;
        let none = first.stored.as_ref().is_none_or(|stored| stored.keys.elem_count() == 0);
        let least = if first.clustered().is_empty() { segment.max(first.settings.trained_on()) } else { segment };
        if none || waiting.is_empty() || waiting.len() < least {
            return Ok(false);
        }
        for layer in &layers {
            layer.stored.as_ref().map_or(Ok(()), |s| layer.fence.write(s.keys.device()))?;
        }
        // A CPU reads each layer where it lies, which is faster than a copy of all; to a GPU a call costs more than a copy.
        let on_cpu = layers[0].stored.as_ref().is_some_and(|stored| stored.keys.device().is_cpu());
        let together = if on_cpu { 1 } else { layers.len() };
        let segments = segments(waiting.len(), &layers[0].settings);
        let mut parts = Vec::with_capacity(layers.len());
        for (i, layers) in layers.chunks(together).enumerate() {
            let keys = stacked(layers, |s| &s.keys, &waiting)?;
            let heads = i * together * keys.dims()[0] * keys.dims()[1];
            let labelled = segment_labels(&keys, &layers[0].settings, waiting.start);
            let (labels, k) = labelled.map_err(|error| error.of_batch(heads))?;
            parts.extend(Self::with_segments(layers, &keys, &labels, k, &segments)?);
        }
        Self::keep(&mut layers, parts);
        Ok(true)
    }

    /// Takes given clusters for the tokens between the last segment and the recent ones: u32 `labels`
    /// `(batch, kv_heads, tokens)` below `k`, from another method, or pages of neighbouring tokens. The host waits for the check
    /// of the labels. Keys are not searched: one that is not finite counts as zeros in its cluster's mean.
    ///
    /// # Errors
    /// Refuses labels of another shape, dtype or device, or not below `k`, more than 2^24 clusters, of a cache with
    /// [`codes`](Self::codes) more than 256 and tokens that are not finite, and fails where there is nothing to group.
    pub fn group(&mut self, labels: &Tensor, k: usize) -> Result<()> {
        let waiting = self.waiting();
        let Some(stored) = self.stored.as_ref().filter(|_| !waiting.is_empty()) else {
            return Err(Error::Range { argument: "tokens to group", got: 0, min: 1, max: MAX_TOKENS });
        };
        let limit = if self.settings.codes.is_some() { SEGMENT_CLUSTERS } else { MAX_TOKENS };
        if k > limit {
            return Err(Error::TooLarge { argument: "k", got: k, limit });
        }
        problem::check_device("labels", labels, stored.keys.device())?;
        let expected = [&stored.keys.dims()[..2], &[waiting.len()]].concat();
        if labels.dims() != expected {
            return Err(Error::Shape { argument: "labels", got: labels.dims().to_vec(), expected });
        }
        self.fence.write(labels.device())?;
        let rows = self.stored_rows(waiting.clone());
        let keys = stored.keys.narrow(2, rows.start, rows.len())?;
        let segment = Segment { tokens: waiting.len(), clusters: k };
        let parts = Self::with_segments(&[&mut *self], &keys, labels, k, &[segment])?;
        Self::keep(&mut [self], parts);
        Ok(())
    }

    fn check_alike(&self, other: &Self) -> Result<()> {
        if self.settings != other.settings {
            let (got, with) = (format!("{:?}", other.settings), format!("{:?}", self.settings));
            return Err(Error::Conflict { argument: "layers", got, with });
        }
        let counts = |c: &Self| {
            let (len, lead, clustered) = (c.current_seq_len(), c.lead(), c.clustered().len());
            [("tokens", len), ("tokens before the clusters", lead), ("clustered tokens", clustered)]
        };
        for ((what, expected), (_, got)) in counts(self).into_iter().zip(counts(other)) {
            if got != expected {
                return Err(Error::Size { argument: "layers", what, got, expected });
            }
        }
        if let (Some(a), Some(b)) = (&self.stored, &other.stored) {
            for (like, t) in [(&a.keys, &b.keys), (&a.values, &b.values)] {
                let [batch, kv_heads, _, d] = dims4_float("layers", like)?;
                check_like("layers", &t.narrow(2, 0, b.len)?, like, [batch, kv_heads, a.len, d])?;
            }
        }
        Ok(())
    }

    /// The clusters or codes of each layer with the `segments` of the waiting tokens, `k` clusters in all; `keys` and `labels` are stacked along the batch.
    fn with_segments(
        layers: &[&mut Self],
        keys: &Tensor,
        labels: &Tensor,
        k: usize,
        segments: &[Segment],
    ) -> Result<Vec<Part>> {
        for layer in layers.iter() {
            if let (Some(pieces), Some(clusters)) = (layer.settings.codes, &layer.clusters) {
                let with = format!("{} tokens that were clustered without", clusters.labels.dims()[2]);
                return Err(Error::Conflict { argument: "codes", got: format!("{pieces:?}"), with });
            }
        }
        let waiting = layers[0].waiting();
        let values = stacked(layers, |s| &s.values, &waiting)?;
        let batch = labels.dims()[0] / layers.len();
        let of_layer = |t: &Tensor, i: usize| Ok(t.narrow(0, i * batch, batch)?);
        let (mut tokens, mut rotations) = ([keys.clone(), values], vec![]);
        if let Some(pieces) = layers[0].settings.codes {
            tokens = [tokens[0].contiguous()?, tokens[1].contiguous()?];
            for i in 0..layers.len() {
                check_finite([&of_layer(&tokens[0], i)?, &of_layer(&tokens[1], i)?], waiting.start)?;
            }
            let of_layers: Vec<_> = layers.iter().map(|layer| &layer.rotations).collect();
            (rotations, tokens) = Rotations::find(&of_layers, tokens, labels, k, pieces)?;
        }
        let [keys, values] = &tokens;
        let all = KvClusters::new(keys, values, labels, k)?;
        let parts = layers.iter().enumerate().map(|(i, layer)| {
            let part = all.map(|t| of_layer(t, i))?;
            let Some(pieces) = layer.settings.codes else {
                return Ok(Part::Clusters(layer.clusters.as_ref().map_or(Ok(part.clone()), |b| b.followed_by(&part))?));
            };
            let tokens = [&of_layer(keys, i)?, &of_layer(values, i)?];
            let coded = CodedTokens::new(segments.to_vec(), &part, tokens, pieces, layer.coded.as_ref())?;
            let stored = layer.stored.as_ref().expect("tokens wait");
            let gone = layer.stored_rows(waiting.clone());
            let dims = [&stored.keys, &stored.values].map(|t| t.dims()[3]);
            let room = layer.room(stored.len - gone.len(), batch * keys.dims()[1] * dims[0].max(dims[1]))?;
            let (mut stored, rotations) = (stored.without(gone, room)?, rotations[i].clone());
            if layer.rotations.waits() {
                stored = rotations.stored(stored)?;
            }
            Ok(Part::Codes(Box::new(coded), stored, rotations))
        });
        parts.collect()
    }

    /// Keeps what [`with_segments`](Self::with_segments) gave for all layers, so that an error before leaves them alike.
    fn keep(layers: &mut [&mut Self], parts: Vec<Part>) {
        for (layer, part) in layers.iter_mut().zip(parts) {
            match part {
                Part::Clusters(clusters) => layer.clusters = Some(clusters),
                Part::Codes(coded, stored, rotations) => {
                    (layer.coded, layer.stored, layer.rotations) = (Some(*coded), Some(stored), rotations);
                }
            }
        }
    }
}

/// The standard deviation of clusters, `(batch, kv_heads, k)`, of `keys` and their means, `(batch, kv_heads, any, d)`.
fn spreads(keys: &Tensor, means: &Tensor, order: &Order, sizes: &Tensor) -> Result<Tensor> {
    let (rows, centres) = (Rows::new(keys)?, Rows::new(means)?);
    let distances = primitives::distances(&rows, &centres, &order.labels, Metric::SquaredEuclidean)?;
    let sums = primitives::cluster_sums(&distances, Some(order))?.reshape(sizes.shape())?;
    let counts = (sizes.maximum(1.0)?.to_dtype(DType::F64)? * rows.d.max(1) as f64)?;
    let dtype = if keys.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok((sums / counts)?.sqrt()?.to_dtype(dtype)?)
}

/// A layer holds one of these once its waiting tokens are clustered.
enum Part {
    Clusters(KvClusters),
    Codes(Box<CodedTokens>, Stored, Rotations),
}

impl Settings {
    /// The most tokens of a segment, of which codes allow so many clusters.
    fn max_segment(&self) -> usize {
        match self.codes {
            Some(_) => self.max_segment.min(self.cluster_size.saturating_mul(SEGMENT_CLUSTERS)),
            None => self.max_segment,
        }
    }

    /// The fewest tokens that are coded first, for entries that are more than copies of rows.
    fn trained_on(&self) -> usize {
        self.codes.map_or(0, |[keys, values]| ROWS_PER_ENTRY << keys.bits.max(values.bits))
    }
}

/// Refuses keys and values `(batch, kv_heads, n, d)`, from token `first` on, that no code stands for.
fn check_finite(tokens: [&Tensor; 2], first: usize) -> Result<()> {
    for (argument, t) in ["k", "v"].into_iter().zip(tokens) {
        let first_nonfinite = primitives::max_abs_and_first_nonfinite(&Rows::new(t)?)?.1.to_vec1::<u32>()?;
        if let Some((batch, &row)) = first_nonfinite.iter().enumerate().find(|(_, row)| **row != u32::MAX) {
            return Err(Error::NonFinite { argument, batch, row: first + row as usize });
        }
    }
    Ok(())
}

/// The segments that `m` tokens become: as few as may be, whose lengths differ by one at most.
fn segments(m: usize, settings: &Settings) -> Vec<Segment> {
    let count = m.div_ceil(settings.max_segment());
    let segment = |tokens: usize| Segment { tokens, clusters: tokens.div_ceil(settings.cluster_size) };
    (0..count).map(|i| segment(m / count + usize::from(i < m % count))).collect()
}

/// The clusters of keys `(batch, kv_heads, m, d)`, cut into as few segments as may be, and how many clusters those are. The first key is
/// the token `first` of the cache.
fn segment_labels(keys: &Tensor, settings: &Settings, first: usize) -> Result<(Tensor, usize)> {
    let (batch, kv_heads, m, d) = keys.dims4()?;
    let count = m.div_ceil(settings.max_segment());
    let (len, longer) = (m / count, m % count);
    let (mut labels, mut start, mut k) = (vec![], 0, 0);
    for (segments, len) in [(longer, len + 1), (count - longer, len)] {
        if segments == 0 {
            continue;
        }
        let of_each = len.div_ceil(settings.cluster_size);
        // A CPU reads keys where they lie, again and again while a segment is in its cache; a GPU takes all segments of a length in one
        // batched call.
        let together = if keys.device().is_cpu() { 1 } else { segments };
        // Evenly spaced keys, and not random ones: they do not depend on which layers and segments are clustered together. Nor do so
        // few passes wait for convergence, whose threshold takes another one.
        let kmeans = KMeans::new(of_each).init(Init::Even).max_iters(settings.passes).tol(0.0);
        let mut fit = kmeans.prepare((batch, kv_heads, together, len, d), keys.dtype(), keys.device())?;
        for _ in 0..segments / together {
            let rows = keys.narrow(2, start, together * len)?;
            let rows = match together {
                1 => rows.unsqueeze(2)?,
                _ => rows.reshape((batch, kv_heads, together, len, d))?,
            };
            fit.run_for_labels(&rows).map_err(|error| named_by_token(error, together, len, first + start))?;
            let before = Tensor::from_iter((0..together).map(|i| (k + i * of_each) as u32), keys.device())?;
            let numbered = fit.labels().broadcast_add(&before.reshape((together, 1))?)?;
            labels.push(numbered.reshape((batch, kv_heads, together * len))?);
            (start, k) = (start + together * len, k + together * of_each);
        }
    }
    Ok((Tensor::cat(&labels, 2)?, k))
}

/// Says which token of the cache is not finite, where a fit of `segments` for each head, of `len` tokens from `first` on, says which row.
fn named_by_token(error: Error, segments: usize, len: usize, first: usize) -> Error {
    match error {
        Error::NonFinite { batch, row, .. } => {
            let row = first + batch % segments * len + row;
            Error::NonFinite { argument: "k", batch: batch / segments, row }
        }
        error => error,
    }
}

/// The tokens `range` of all layers, stacked along the batch.
fn stacked(layers: &[&mut ClusteredKvCache], pick: fn(&Stored) -> &Tensor, range: &Range<usize>) -> Result<Tensor> {
    let rows = |layer: &&mut ClusteredKvCache| {
        let stored = layer.stored.as_ref().expect("tokens wait");
        Ok(pick(stored).narrow(2, layer.stored_rows(range.clone()).start, range.len())?)
    };
    match layers {
        [layer] => rows(layer),
        _ => Ok(Tensor::cat(&layers.iter().map(rows).collect::<Result<Vec<_>>>()?, 0)?),
    }
}
