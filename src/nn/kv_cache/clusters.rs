//! The clusters of tokens, a segment at a time.

use super::{ClusteredKvCache, Settings, Stored, MAX_TOKENS};
use crate::{
    error::{Error, Result},
    functional::{self, sort_by_cluster},
    kmeans::{Init, KMeans},
    nn::parts::{check_like, dims4_float},
    primitives, problem,
    request::Order,
};
use candle_core::{DType, Tensor};
use std::ops::Range;

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
    /// `(batch, kv_heads, k, d)` in the keys' dtype.
    pub mean_keys: Tensor,
    /// `(batch, kv_heads, k, d)`, by the same labels.
    pub mean_values: Tensor,
}

impl KvClusters {
    /// From the `labels` of tokens, below `k`, which the host waits to check.
    pub(super) fn new(keys: &Tensor, values: &Tensor, labels: &Tensor, k: usize) -> Result<Self> {
        let (order, offsets) = sort_by_cluster(labels, k)?;
        let sizes = primitives::cluster_sizes(&offsets)?.to_dtype(DType::F32)?;
        let labels = labels.contiguous()?;
        let sorted = Order::of_heads(&labels, &order, &offsets)?;
        let [mean_keys, mean_values] = [keys, values].map(|t| functional::means_by_order(t, &sorted));
        Ok(Self { labels, order, offsets, sizes, mean_keys: mean_keys?, mean_values: mean_values? })
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

    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            labels: f(&self.labels)?,
            order: f(&self.order)?,
            offsets: f(&self.offsets)?,
            sizes: f(&self.sizes)?,
            mean_keys: f(&self.mean_keys)?,
            mean_values: f(&self.mean_values)?,
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
            mean_keys: join(&self.mean_keys, &next.mean_keys)?,
            mean_values: join(&self.mean_values, &next.mean_values)?,
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
    /// those have to be taken back by [`truncate`](Self::truncate) or [`reset`](Self::reset). Fails as [`KMeans::fit`]. The
    /// cache is as before then.
    pub fn cluster(&mut self) -> Result<bool> {
        Self::cluster_layers([self])
    }

    /// [`cluster`](Self::cluster) for many caches, the heads of all of them in one batched call. The result is that of one
    /// call for each, to the bit.
    ///
    /// # Errors
    /// As [`cluster`](Self::cluster). Refuses caches that differ in settings, shape, tokens, dtype or device.
    pub fn cluster_layers<'a>(layers: impl IntoIterator<Item = &'a mut Self>) -> Result<bool> {
        let mut layers: Vec<_> = layers.into_iter().collect();
        let Some(first) = layers.first() else { return Ok(false) };
        let Settings { cluster_size, max_segment, segment, .. } = first.settings;
        for (argument, got) in [("cluster_size", cluster_size), ("max_segment", max_segment)] {
            if got == 0 {
                return Err(Error::Range { argument, got, min: 1, max: MAX_TOKENS });
            }
        }
        let waiting = first.waiting();
        layers[1..].iter().try_for_each(|layer| first.check_alike(layer))?;
        let none = first.stored.as_ref().is_none_or(|stored| stored.keys.elem_count() == 0);
        if none || waiting.is_empty() || waiting.len() < segment {
            return Ok(false);
        }
        for layer in &layers {
            layer.stored.as_ref().map_or(Ok(()), |s| layer.fence.write(s.keys.device()))?;
        }
        // A CPU reads each layer where it lies, which is faster than a copy of all; to a GPU a call costs more than a copy.
        let on_cpu = layers[0].stored.as_ref().is_some_and(|stored| stored.keys.device().is_cpu());
        let together = if on_cpu { 1 } else { layers.len() };
        let mut parts = Vec::with_capacity(layers.len());
        for (i, layers) in layers.chunks(together).enumerate() {
            let keys = stacked(layers, |s| &s.keys, &waiting)?;
            let heads = i * together * keys.dims()[0] * keys.dims()[1];
            let labelled = segment_labels(&keys, &layers[0].settings, waiting.start);
            let (labels, k) = labelled.map_err(|error| error.of_batch(heads))?;
            parts.extend(Self::with_segments(layers, &keys, &labels, k)?);
        }
        Self::keep(&mut layers, parts);
        Ok(true)
    }

    /// Takes given clusters for the tokens between the last segment and the recent ones: u32 `labels`
    /// `(batch, kv_heads, tokens)` below `k`, from another method, or pages of neighbouring tokens. The host waits for the check
    /// of the labels. Keys are not searched: one that is not finite counts as zeros in its cluster's mean.
    ///
    /// # Errors
    /// Refuses labels of another shape, dtype or device, or not below `k`, more than 2^24 clusters, and fails where there is
    /// nothing to group.
    pub fn group(&mut self, labels: &Tensor, k: usize) -> Result<()> {
        let waiting = self.waiting();
        let Some(stored) = self.stored.as_ref().filter(|_| !waiting.is_empty()) else {
            return Err(Error::Range { argument: "tokens to group", got: 0, min: 1, max: MAX_TOKENS });
        };
        if k > MAX_TOKENS {
            return Err(Error::TooLarge { argument: "k", got: k, limit: MAX_TOKENS });
        }
        problem::check_device("labels", labels, stored.keys.device())?;
        let expected = [&stored.keys.dims()[..2], &[waiting.len()]].concat();
        if labels.dims() != expected {
            return Err(Error::Shape { argument: "labels", got: labels.dims().to_vec(), expected });
        }
        self.fence.write(labels.device())?;
        let keys = stored.keys.narrow(2, waiting.start, waiting.len())?;
        let parts = Self::with_segments(&[&mut *self], &keys, labels, k)?;
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

    /// The clusters of each layer with the segments of the waiting tokens, `k` clusters in all; `keys` and `labels` are stacked along
    /// the batch.
    fn with_segments(layers: &[&mut Self], keys: &Tensor, labels: &Tensor, k: usize) -> Result<Vec<KvClusters>> {
        let values = stacked(layers, |s| &s.values, &layers[0].waiting())?;
        let all = KvClusters::new(keys, &values, labels, k)?;
        let batch = all.labels.dims()[0] / layers.len();
        let parts = layers.iter().enumerate().map(|(i, layer)| {
            let part = all.map(|t| Ok(t.narrow(0, i * batch, batch)?))?;
            layer.clusters.as_ref().map_or(Ok(part.clone()), |before| before.followed_by(&part))
        });
        parts.collect()
    }

    /// Keeps what [`with_segments`](Self::with_segments) gave for all layers, so that an error before leaves them alike.
    fn keep(layers: &mut [&mut Self], parts: Vec<KvClusters>) {
        layers.iter_mut().zip(parts).for_each(|(layer, part)| layer.clusters = Some(part));
    }
}

/// The clusters of keys `(batch, kv_heads, m, d)`, cut into as few segments as may be, and how many clusters those are. The first key is
/// the token `first` of the cache.
fn segment_labels(keys: &Tensor, settings: &Settings, first: usize) -> Result<(Tensor, usize)> {
    let (batch, kv_heads, m, d) = keys.dims4()?;
    let count = m.div_ceil(settings.max_segment);
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
    let of = |layer: &&mut ClusteredKvCache| {
        let stored = layer.stored.as_ref().expect("tokens wait");
        Ok(pick(stored).narrow(2, range.start, range.len())?)
    };
    match layers {
        [layer] => of(layer),
        _ => Ok(Tensor::cat(&layers.iter().map(of).collect::<Result<Vec<_>>>()?, 0)?),
    }
}
