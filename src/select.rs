//! Which clusters a query attends to, and the tokens in them: on the device, without a read.

use crate::{
    error::{Error, Result},
    metric::Metric,
    primitives,
    problem::{self, Problem, MAX_ROWS},
    ranking::{cumsum, descending, shift_right, without_nan},
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};
use std::fmt;

/// A bound on the best clusters that [`select_clusters`] takes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ClusterBudget {
    /// By descending score, as many whole clusters as fit in so many tokens, up to the first that does not fit.
    Within(usize),
    /// By descending score, as few clusters as hold so many tokens. The last one may hold more, and is what
    /// [`Selection::indices`] cuts at that capacity (ClusterKV, Liu et al. 2025).
    Reaching(usize),
    /// By descending `score + ln(size)`, as few clusters as have the share `p` of the softmax over these, and at least
    /// `floor * k` (rounded) of them: heads with a flat softmax would otherwise be left with too little (Sparse VideoGen2,
    /// Yang et al. 2025, with `p` 0.9 and `floor` 0.1).
    TopP {
        /// In 0..=1.
        p: f64,
        /// In 0..=1.
        floor: f64,
    },
}

/// [`select_clusters`] took these clusters. All tensors are on the device of the scores.
#[derive(Clone)]
#[non_exhaustive]
pub struct Selection {
    /// 1 for each cluster that was taken, u8 `(..rows, k)`.
    pub mask: Tensor,
    /// The clusters, best first, the lowest index first among equals, u32 `(..rows, k)`.
    pub ranking: Tensor,
    /// The number of clusters taken, the first of `ranking`, u32 `(..rows)`.
    pub clusters: Tensor,
    /// The number of tokens in them, u32 `(..rows)`.
    pub tokens: Tensor,
}

/// Takes the clusters of the best `scores` for each query.
///
/// `scores` are `(..batch, ..queries, k)` in a float dtype, such as the products of queries with centroids, and `sizes` u32
/// `(..batch, k)`, such as [`Fit::counts`](crate::Fit::counts): any number of queries share the clusters of one problem.
/// Empty clusters are never taken, nor those with a score of minus infinity (a mask) or NaN, which ranks as minus infinity: after
/// all numbers, by its index. There may be any number of clusters. Without queries the result is empty. The host waits for
/// nothing, and no gradient flows.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{select_clusters, sort_by_cluster, ClusterBudget, Selection};
///
/// let (order, offsets) = sort_by_cluster(&Tensor::new(&[2u32, 0, 1, 2, 0, 0], &Device::Cpu)?, 3)?;
/// let sizes = Tensor::new(&[3u32, 1, 2], &Device::Cpu)?;
/// let scores = Tensor::new(&[[0.5f32, 0.1, 0.9], [0.1, 0.9, 0.2]], &Device::Cpu)?;
/// let taken = select_clusters(&scores, &sizes, ClusterBudget::Within(4))?;
/// assert_eq!(taken.mask.to_vec2::<u8>()?, [[0, 0, 1], [0, 1, 1]]);
/// let (tokens, count) = taken.indices(&order, &offsets, 4)?;
/// assert_eq!(tokens.to_vec2::<u32>()?, [[0, 3, Selection::PADDING, Selection::PADDING], [2, 0, 3, Selection::PADDING]]);
/// assert_eq!(count.to_vec1::<u32>()?, [2, 3]);
/// // Candle reads zeros where an index is padding.
/// let values = Tensor::new(&[10f32, 20., 30., 40., 50., 60.], &Device::Cpu)?;
/// let read = values.index_select(&tokens.flatten_all()?, 0)?.reshape((2, 4))?;
/// assert_eq!(read.to_vec2::<f32>()?, [[10., 40., 0., 0.], [30., 10., 40., 0.]]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// Refuses shapes, dtypes and devices that do not fit together, scores of no clusters, and shares outside of 0..=1.
pub fn select_clusters(scores: &Tensor, sizes: &Tensor, take: ClusterBudget) -> Result<Selection> {
    if scores.rank() == 0 {
        return Err(Error::Rank { argument: "scores", expected: 1, shape: vec![] });
    }
    if !matches!(scores.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument: "scores", got: scores.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    let (rows, k) = (&scores.dims()[..scores.rank() - 1], scores.dims()[scores.rank() - 1]);
    if k == 0 {
        return Err(Error::Range { argument: "k", got: k, min: 1, max: MAX_ROWS });
    }
    if k > MAX_ROWS {
        return Err(Error::TooLarge { argument: "k", got: k, limit: MAX_ROWS });
    }
    if let ClusterBudget::TopP { p, floor } = take {
        for (argument, got) in [("p", p), ("floor", floor)] {
            if !(0.0..=1.0).contains(&got) {
                return Err(Error::Value { argument, got, expected: "in 0..=1" });
            }
        }
    }
    primitives::check_counted("scores", scores)?;
    let r: usize = rows.iter().product();
    if r == 0 {
        problems_of("sizes", sizes, rows, k, scores.device())?;
        let none = |shape: &[usize], dtype| empty(shape, dtype, scores.device());
        return Ok(Selection {
            mask: none(scores.dims(), DType::U8)?,
            ranking: none(scores.dims(), DType::U32)?,
            clusters: none(rows, DType::U32)?,
            tokens: none(rows, DType::U32)?,
        });
    }
    // In f64, which adds any sizes without a carry that is lost.
    let sizes = per_query("sizes", sizes, rows, k, scores.device())?.to_dtype(DType::F64)?;

    let keys = without_nan(&scores.detach().to_dtype(DType::F64)?.contiguous()?.reshape((r, k))?)?.minimum(f64::MAX)?;
    let keys = match take {
        ClusterBudget::TopP { .. } => (keys + sizes.log()?)?,
        _ => keys,
    };
    let lowest = (keys.ones_like()? * f64::NEG_INFINITY)?;
    let keys = sizes.ne(0f64)?.where_cond(&keys, &lowest)?;
    let ranking = descending(&keys)?;
    let (keys, sizes) = (keys.gather(&ranking, 1)?, sizes.gather(&ranking, 1)?);
    let open = keys.ne(&lowest)?;
    let sizes = open.where_cond(&sizes, &sizes.zeros_like()?)?;
    let place = Tensor::arange(0, k as u32, scores.device())?.broadcast_as((r, k))?;
    let first = match take {
        ClusterBudget::Within(tokens) => cumsum(&sizes)?.le(tokens as f64)?,
        ClusterBudget::Reaching(tokens) => (cumsum(&sizes)? - &sizes)?.lt(tokens as f64)?,
        ClusterBudget::TopP { p: 1.0, .. } => open.clone(),
        ClusterBudget::TopP { p, floor } => {
            let mass = keys.broadcast_sub(&keys.narrow(1, 0, 1)?)?.exp()?;
            let mass = cumsum(&open.where_cond(&mass, &mass.zeros_like()?)?)?;
            let before = shift_right(&mass, 1)?;
            let short = before.broadcast_lt(&(mass.narrow(1, k - 1, 1)? * p)?)?;
            short.maximum(&place.lt((floor * k as f64).round() as u32)?)?
        }
    };
    // Sums of fractions need not rise from one place to the next, so what counts is how many are short of the share.
    let clusters = first.minimum(&open)?.to_dtype(DType::U32)?.sum_keepdim(1)?;
    let taken = place.broadcast_lt(&clusters)?;
    let tokens = taken.where_cond(&sizes, &sizes.zeros_like()?)?.sum(1)?;
    let mask = taken.zeros_like()?.scatter(&ranking, &taken, 1)?;
    Ok(Selection {
        mask: mask.reshape(scores.shape())?,
        ranking: ranking.reshape(scores.shape())?,
        clusters: clusters.reshape(rows)?,
        tokens: tokens.minimum(u32::MAX as f64)?.to_dtype(DType::U32)?.reshape(rows)?,
    })
}

/// The `w` nearest rows of each centroid, u32 `(..batch, k, w)`: nearest first, the lowest index first among equals.
///
/// Clusters of one size, as the Routing Transformer's (Roy et al. 2021): a row may be in several of them or in none. `x` is
/// `(..batch, n, d)` and `centroids` `(..batch, k, d)`, or `(k, d)` for every problem. Distances are those of
/// [`Fit::transform`](crate::Fit::transform), f32 but for f64 rows, and take several times `(..batch, k, n)` of memory. Values
/// are not searched: a row whose distance is NaN or infinite comes last, by its index. There may be any number of rows; without
/// problems in the batch the result is empty. The host waits for nothing, and no gradient flows.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{top_rows_per_centroid, Metric};
///
/// let x = Tensor::new(&[[0f32], [3.], [1.], [8.]], &Device::Cpu)?;
/// let centroids = Tensor::new(&[[0f32], [5.]], &Device::Cpu)?;
/// let rows = top_rows_per_centroid(&x, &centroids, 2, Metric::SquaredEuclidean)?;
/// assert_eq!(rows.to_vec2::<u32>()?, [[0, 2], [1, 3]]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// As [`assign`](crate::assign), and refuses `w` outside of 1 to `n`.
pub fn top_rows_per_centroid(x: &Tensor, centroids: &Tensor, w: usize, metric: Metric) -> Result<Tensor> {
    let p = Problem::assign(x, centroids, metric)?;
    if w == 0 || w > p.n {
        return Err(Error::Range { argument: "w", got: w, min: 1, max: p.n });
    }
    if p.b == 0 {
        return empty(&p.shape(&[p.k, w]), DType::U32, x.device());
    }
    primitives::check_count("distances", p.shape(&[p.k, p.n]), x.device())?;
    let (x, c) = (Rows::new(x)?, Rows::new(centroids)?.broadcast(p.b));
    let near = primitives::pairwise(&x, &c, metric)?.transpose(1, 2)?.contiguous()?.reshape((p.b * p.k, p.n))?.neg()?;
    let ranking = descending(&without_nan(&near)?)?;
    Ok(ranking.narrow(1, 0, w)?.contiguous()?.reshape(p.shape(&[p.k, w]))?)
}

impl Selection {
    /// [`indices`](Self::indices) writes this where there is no token: the largest u32, which Candle's `gather` and
    /// `index_select` read as zeros and its `scatter` and `index_add` pass over. `indices.ne(Selection::PADDING)` is the mask.
    pub const PADDING: u32 = u32::MAX;

    /// The tokens of the clusters taken: `(indices, count)`, u32 `(..rows, capacity)` and u32 `(..rows)`.
    ///
    /// `order`, u32 `(..batch, n)`, and `offsets`, u32 `(..batch, k + 1)`, are those of
    /// [`sort_by_cluster`](crate::sort_by_cluster). Clusters come best first, and their tokens in ascending order; what
    /// does not fit in `capacity` is cut. After `count` indices comes [`PADDING`](Self::PADDING). The host waits for nothing, so
    /// that values are not searched: what is no order and no offsets gives some of the order's values, or padding.
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together, and a capacity of 0 or above 2^32 - 2.
    pub fn indices(&self, order: &Tensor, offsets: &Tensor, capacity: usize) -> Result<(Tensor, Tensor)> {
        let (dims, device) = (self.mask.dims(), self.mask.device());
        let (rows, k) = (&dims[..dims.len() - 1], dims[dims.len() - 1]);
        let r: usize = rows.iter().product();
        if capacity == 0 || capacity >= MAX_ROWS {
            return Err(Error::Range { argument: "capacity", got: capacity, min: 1, max: MAX_ROWS - 1 });
        }
        let n = order.dims().last().copied().unwrap_or(0);
        if n == 0 || n > MAX_ROWS {
            return Err(Error::Range { argument: "order", got: n, min: 1, max: MAX_ROWS });
        }
        let shape = [rows, &[capacity]].concat();
        let b = problems_of("order", order, rows, n, device)?;
        if r == 0 {
            problems_of("offsets", offsets, rows, k + 1, device)?;
            return Ok((empty(&shape, DType::U32, device)?, empty(rows, DType::U32, device)?));
        }
        // In f64, which adds any offsets without a carry that is lost.
        let offsets = per_query("offsets", offsets, rows, k + 1, device)?.to_dtype(DType::F64)?;

        let ranking = self.ranking.reshape((r, k))?;
        let begin = offsets.narrow(1, 0, k)?.contiguous()?.gather(&ranking, 1)?;
        let end = offsets.narrow(1, 1, k)?.contiguous()?.gather(&ranking, 1)?;
        let place = Tensor::arange(0, k as u32, device)?.broadcast_as((r, k))?;
        let taken = place.broadcast_lt(&self.clusters.reshape((r, 1))?)?;
        let sizes = taken.where_cond(&(end - &begin)?.relu()?, &begin.zeros_like()?)?;
        let ends = cumsum(&sizes)?;
        let before = (&ends - sizes)?;
        let count = ends.narrow(1, k - 1, 1)?.minimum(capacity as f64)?;
        // The cluster of place t is the first that ends beyond it; before it come as many as end at t or earlier, which is
        // where a sort of the ends has the values above t begin.
        let (_, earlier) = primitives::sorted(&ends.minimum(capacity as f64)?.to_dtype(DType::U32)?, capacity + 1)?;
        let rank = earlier.narrow(1, 1, capacity)?.minimum(k as u32 - 1)?.contiguous()?;
        let place = Tensor::arange(0, capacity as u32, device)?.to_dtype(DType::F64)?.broadcast_as((r, capacity))?;
        let at = ((begin.gather(&rank, 1)? + &place)? - before.gather(&rank, 1)?)?;
        let at = at.clamp(0f64, (n - 1) as f64)?.to_dtype(DType::U32)?.reshape((b, r / b * capacity))?;
        let tokens = order.contiguous()?.reshape((b, n))?.gather(&at, 1)?.reshape((r, capacity))?;
        let padding = Tensor::full(Self::PADDING, (r, capacity), device)?;
        let tokens = place.broadcast_lt(&count)?.where_cond(&tokens, &padding)?;
        Ok((tokens.reshape(shape)?, count.to_dtype(DType::U32)?.reshape(rows)?))
    }
}

/// Shapes, and no values: those of a GPU would have to be waited for.
impl fmt::Debug for Selection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selection")
            .field("mask", self.mask.shape())
            .field("clusters", self.clusters.shape())
            .finish_non_exhaustive()
    }
}

/// Checks u32 `t` of shape `(..batch, columns)`, `batch` being the first of the dimensions `rows`, and counts its problems.
fn problems_of(argument: &'static str, t: &Tensor, rows: &[usize], columns: usize, device: &Device) -> Result<usize> {
    problem::check_device(argument, t, device)?;
    problem::check_dtype(argument, t, DType::U32)?;
    match t.dims().split_last() {
        Some((&last, batch)) if last == columns && rows.starts_with(batch) => Ok(batch.iter().product()),
        _ => {
            let expected = [rows, &[columns]].concat();
            Err(Error::Shape { argument, got: t.dims().to_vec(), expected })
        }
    }
}

/// The same, repeated for every query: `(rows, columns)`.
fn per_query(argument: &'static str, t: &Tensor, rows: &[usize], columns: usize, device: &Device) -> Result<Tensor> {
    let b = problems_of(argument, t, rows, columns, device)?;
    let r: usize = rows.iter().product();
    let each = t.contiguous()?.reshape((b, 1, columns))?.broadcast_as((b, r / b, columns))?;
    Ok(each.contiguous()?.reshape((r, columns))?)
}

/// A tensor without elements: a view, because Candle cannot allocate one of no bytes on a GPU.
pub(crate) fn empty(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    let stored: Vec<usize> = shape.iter().map(|&size| size.max(1)).collect();
    let none = (0..shape.len()).filter(|&dim| shape[dim] == 0);
    Ok(none.into_iter().try_fold(Tensor::zeros(stored, dtype, device)?, |t, dim| t.narrow(dim, 0, 0))?)
}
