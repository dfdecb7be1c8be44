//! Which clusters a query attends to, and the tokens in them: on the device, without a read.

use crate::{
    ops,
    problem::{self, Problem, Rows, MAX_ROWS},
    Error, Metric, Result,
};
use candle_core::{DType, Device, Tensor};

/// Most values that are ranked: as many indices as Candle's sort keeps in 32 KiB of shared memory.
const MOST_RANKED: usize = 8192;

/// How many of the best clusters [`select_clusters`] takes.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Take {
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

/// What [`select_clusters`] took. All tensors are on the device of the scores.
#[derive(Clone, Debug)]
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
/// Empty clusters are never taken, nor those with a score of minus infinity (a mask) or NaN. The host waits for nothing.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{select_clusters, sort_by_cluster, Take};
///
/// let (order, offsets) = sort_by_cluster(&Tensor::new(&[2u32, 0, 1, 2, 0, 0], &Device::Cpu)?, 3)?;
/// let sizes = Tensor::new(&[3u32, 1, 2], &Device::Cpu)?;
/// let scores = Tensor::new(&[[0.5f32, 0.1, 0.9], [0.1, 0.9, 0.2]], &Device::Cpu)?;
/// let taken = select_clusters(&scores, &sizes, Take::Within(4))?;
/// assert_eq!(taken.mask.to_vec2::<u8>()?, [[0, 0, 1], [0, 1, 1]]);
/// let (tokens, count) = taken.indices(&order, &offsets, 4)?;
/// assert_eq!(tokens.to_vec2::<u32>()?, [[0, 3, 0, 0], [2, 0, 3, 0]]);
/// assert_eq!(count.to_vec1::<u32>()?, [2, 3]);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
///
/// # Errors
/// Refuses shapes, dtypes and devices that do not fit together, more than 8,192 clusters (Candle's sort on a GPU holds no
/// more), and shares outside of 0..=1.
pub fn select_clusters(scores: &Tensor, sizes: &Tensor, take: Take) -> Result<Selection> {
    if scores.rank() == 0 {
        return Err(Error::Rank { argument: "scores", expected: 1, shape: vec![] });
    }
    if !matches!(scores.dtype(), DType::F16 | DType::BF16 | DType::F32 | DType::F64) {
        return Err(Error::DType { argument: "scores", got: scores.dtype(), expected: "F16, BF16, F32 or F64".into() });
    }
    let (rows, k) = (&scores.dims()[..scores.rank() - 1], scores.dims()[scores.rank() - 1]);
    if k == 0 {
        return Err(Error::Range { argument: "k", got: k, min: 1, max: MOST_RANKED });
    }
    if k > MOST_RANKED {
        return Err(Error::TooLarge { argument: "k", got: k, limit: MOST_RANKED });
    }
    let r: usize = rows.iter().product();
    if r == 0 {
        return Err(Error::Range { argument: "scores rows", got: 0, min: 1, max: usize::MAX });
    }
    if let Take::TopP { p, floor } = take {
        for (argument, got) in [("p", p), ("floor", floor)] {
            if !(0.0..=1.0).contains(&got) {
                return Err(Error::Value { argument, got, expected: "in 0..=1" });
            }
        }
    }
    ops::check_counted("scores", scores)?;
    let sizes = per_query("sizes", sizes, rows, k, scores.device())?;

    let mut keys = scores.detach().to_dtype(DType::F64)?.contiguous()?.reshape((r, k))?;
    let lowest = (keys.ones_like()? * f64::NEG_INFINITY)?;
    // A NaN is not equal to itself.
    keys = keys.eq(&keys)?.where_cond(&keys, &lowest)?.minimum(f64::MAX)?;
    if let Take::TopP { .. } = take {
        keys = (keys + sizes.to_dtype(DType::F64)?.log()?)?;
    }
    keys = sizes.ne(0u32)?.where_cond(&keys, &lowest)?;
    let ranking = descending(&keys)?;
    let (keys, sizes) = (keys.gather(&ranking, 1)?, sizes.gather(&ranking, 1)?);
    let open = keys.ne(&lowest)?;
    let sizes = open.where_cond(&sizes, &sizes.zeros_like()?)?;
    let limit = |tokens: usize| tokens.min(MAX_ROWS) as u32;
    let place = Tensor::arange(0, k as u32, scores.device())?.broadcast_as((r, k))?;
    let first = match take {
        Take::Within(tokens) => running_sum(&sizes)?.le(limit(tokens))?,
        Take::Reaching(tokens) => (running_sum(&sizes)? - &sizes)?.lt(limit(tokens))?,
        Take::TopP { p: 1.0, .. } => open.clone(),
        Take::TopP { p, floor } => {
            let mass = keys.broadcast_sub(&keys.narrow(1, 0, 1)?)?.exp()?;
            let mass = running_sum(&open.where_cond(&mass, &mass.zeros_like()?)?)?;
            let before = later(&mass, 1)?;
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
        tokens: tokens.reshape(rows)?,
    })
}

/// The `w` nearest rows of each centroid, u32 `(..batch, k, w)`: nearest first, the lowest index first among equals.
///
/// Clusters of one size, as the Routing Transformer's (Roy et al. 2021): a row may be in several of them or in none. `x` is
/// `(..batch, n, d)` and `centroids` `(..batch, k, d)`, or `(k, d)` for every problem. Distances are those of
/// [`Fit::transform`](crate::Fit::transform), f32 but for f64 rows, and take several times `(..batch, k, n)` of memory. Values
/// are not searched: a row whose distance is NaN comes last. The host waits for nothing.
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
/// As [`assign`](crate::assign), and refuses `w` outside of 1 to `n` and more than 8,192 rows (Candle's sort on a GPU holds
/// no more).
pub fn top_rows_per_centroid(x: &Tensor, centroids: &Tensor, w: usize, metric: Metric) -> Result<Tensor> {
    let p = Problem::assign(x, centroids, metric)?;
    if p.n > MOST_RANKED {
        return Err(Error::TooLarge { argument: "x rows", got: p.n, limit: MOST_RANKED });
    }
    if w == 0 || w > p.n {
        return Err(Error::Range { argument: "w", got: w, min: 1, max: p.n });
    }
    if p.b == 0 {
        return Err(Error::Range { argument: "x batch", got: 0, min: 1, max: usize::MAX });
    }
    ops::check_count("distances", p.shape(&[p.k, p.n]), x.device())?;
    let (x, c) = (Rows::new(&x.detach())?, Rows::new(&centroids.detach())?.broadcast(p.b));
    let near = ops::pairwise(&x, &c, metric)?.transpose(1, 2)?.contiguous()?.reshape((p.b * p.k, p.n))?.neg()?;
    let lowest = (near.ones_like()? * f64::NEG_INFINITY)?;
    let ranking = descending(&near.eq(&near)?.where_cond(&near, &lowest)?)?;
    Ok(ranking.narrow(1, 0, w)?.contiguous()?.reshape(p.shape(&[p.k, w]))?)
}

impl Selection {
    /// The tokens of the clusters taken: `(indices, count)`, u32 `(..rows, capacity)` and u32 `(..rows)`.
    ///
    /// `order`, u32 `(..batch, n)`, and `offsets`, u32 `(..batch, k + 1)`, are those of
    /// [`sort_by_cluster`](crate::sort_by_cluster). Clusters come best first, and their tokens in ascending order; what
    /// does not fit in `capacity` is cut. After `count` indices come zeros. The host waits for nothing, so that values are
    /// not searched: what is no order and no offsets gives some tokens in range.
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
        let b = problems_of("order", order, rows, n, device)?;
        let offsets = per_query("offsets", offsets, rows, k + 1, device)?;

        let ranking = self.ranking.reshape((r, k))?;
        let begin = offsets.narrow(1, 0, k)?.contiguous()?.gather(&ranking, 1)?;
        let end = offsets.narrow(1, 1, k)?.contiguous()?.gather(&ranking, 1)?;
        let place = Tensor::arange(0, k as u32, device)?.broadcast_as((r, k))?;
        let taken = place.broadcast_lt(&self.clusters.reshape((r, 1))?)?;
        let sizes = taken.where_cond(&(end.maximum(&begin)? - &begin)?, &begin.zeros_like()?)?;
        let ends = running_sum(&sizes)?;
        let before = (&ends - sizes)?;
        let count = ends.narrow(1, k - 1, 1)?.minimum(capacity as u32)?;
        // The cluster of place t is the first that ends beyond it; before it come as many as end at t or earlier, which is
        // where a sort of the ends has the values above t begin.
        let (_, earlier) = ops::order(&ends.minimum(capacity as u32)?, capacity + 1)?;
        let rank = earlier.narrow(1, 1, capacity)?.minimum(k as u32 - 1)?.contiguous()?;
        let place = Tensor::arange(0, capacity as u32, device)?.broadcast_as((r, capacity))?;
        let at = ((begin.gather(&rank, 1)? + &place)? - before.gather(&rank, 1)?)?.minimum(n as u32 - 1)?;
        let at = at.reshape((b, r / b * capacity))?;
        let tokens = order.contiguous()?.reshape((b, n))?.gather(&at, 1)?.reshape((r, capacity))?;
        let tokens = place.broadcast_lt(&count)?.where_cond(&tokens, &tokens.zeros_like()?)?;
        Ok((tokens.reshape([rows, &[capacity]].concat())?, count.reshape(rows)?))
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

/// Where the values of each row (`(r, k)`, no NaN) are, the largest first and equal ones by index: u32 `(r, k)`.
fn descending(keys: &Tensor) -> Result<Tensor> {
    let (_, k) = keys.dims2()?;
    // Candle's sort leaves equal keys in any order on a GPU: number the different ones, and sort by that.
    let places = keys.arg_sort_last_dim(false)?;
    let sorted = keys.gather(&places, 1)?;
    let differs = sorted.ne(&later(&sorted, 1)?)?.to_dtype(DType::U32)?;
    let first = differs.narrow(1, 0, 1)?;
    let numbers = running_sum(&differs)?.broadcast_sub(&first)?;
    Ok(ops::order(&places.zeros_like()?.scatter(&places, &numbers, 1)?, k)?.0)
}

/// The sum of the values up to each, itself included, along the rows of `(r, k)`; always in the same order.
fn running_sum(values: &Tensor) -> Result<Tensor> {
    let (_, k) = values.dims2()?;
    let (mut sum, mut step) = (values.contiguous()?, 1);
    while step < k {
        sum = (&sum + later(&sum, step)?)?;
        step *= 2;
    }
    Ok(sum)
}

/// Each row of `(r, k)` moved by `by` places, after zeros.
fn later(values: &Tensor, by: usize) -> Result<Tensor> {
    let (_, k) = values.dims2()?;
    // Candle makes no empty tensor on a GPU.
    if by >= k {
        return Ok(values.zeros_like()?);
    }
    Ok(values.narrow(1, 0, k - by)?.contiguous()?.pad_with_zeros(1, by, 0)?)
}
