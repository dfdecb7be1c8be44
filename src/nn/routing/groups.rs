//! Groups of rows, and where the next call's clusters start.

use crate::{
    error::Result,
    functional,
    metric::Metric,
    nn::parts::{dims4_float, masked_fill},
    request::Order,
};
use candle_core::Tensor;

/// Rows by which a warm start is judged: one in so many, but at least so many of them.
const SAMPLED: usize = 8;
const LEAST_SAMPLED: usize = 2048;
/// The inertia of a useful warm start, of that of evenly spaced rows: keys of a model come to 0.6, and what is worse than this
/// has been seen to end worse than a cold start, too.
const USEFUL: f64 = 0.75;

/// The same numbers for each head of `x` `(b, heads, n, d)`: u32 `(b, heads, numbers)`.
pub(super) fn for_each_head(numbers: Vec<u32>, x: &Tensor) -> Result<Tensor> {
    let (b, heads, _, _) = x.dims4()?;
    let shape = (b, heads, numbers.len());
    Ok(Tensor::new(numbers, x.device())?.broadcast_as(shape)?.contiguous()?)
}

/// The same groups for each head of `x`, of rows that are in order as they are: their labels, and where groups begin and end.
fn in_place(labels: Vec<u32>, offsets: Vec<u32>, x: &Tensor) -> Result<Order> {
    let order = for_each_head((0..labels.len() as u32).collect(), x)?;
    Order::of_heads(&for_each_head(labels, x)?, &order, &for_each_head(offsets, x)?)
}

/// Groups of `size` neighbouring rows of `x` `(b, heads, n, d)`.
pub(super) fn blocks(x: &Tensor, size: usize) -> Result<Order> {
    let n = x.dims()[2];
    let ends = (0..=n.div_ceil(size)).map(|i| i.saturating_mul(size).min(n) as u32);
    in_place((0..n).map(|i| (i / size) as u32).collect(), ends.collect(), x)
}

/// The queries that choose for each block of `size` queries of `q` `(b, heads, m, d)`, none of them later than the block's first:
/// that one, and those of the block before, which a single query does without.
pub(super) fn choosers(q: &Tensor, size: usize) -> Result<(Tensor, Order)> {
    let m = q.dims()[2];
    let before = if size == 1 { 0 } else { size };
    let of_block = |i: usize| (i * size).saturating_sub(before)..i * size + 1;
    let all = || (0..m.div_ceil(size)).map(of_block);
    let rows: Vec<u32> = all().flatten().map(|row| row as u32).collect();
    let ends = all().scan(0, |end, rows| {
        *end += rows.len() as u32;
        Some(*end)
    });
    let labels = all().enumerate().flat_map(|(i, rows)| rows.map(move |_| i as u32)).collect();
    let groups = in_place(labels, [0].into_iter().chain(ends).collect(), q)?;
    Ok((functional::rows_of(q, &for_each_head(rows, q)?)?, groups))
}

/// The start of the next call's clusters.
#[derive(Clone, Debug)]
pub(super) struct Warm {
    /// `(b, heads, k, d)`
    pub(super) centroids: Tensor,
    /// The number of rows that were nearest to each, u32 `(b, heads, k)`; none where some row was not finite.
    pub(super) sizes: Tensor,
    /// The rows that they are centroids of.
    pub(super) rows: usize,
}

impl Warm {
    /// `k` centroids for `x` `(b, heads, n, d)`, which may have grown by some rows: these, mended, and as many evenly spaced new rows
    /// as are missing, for each problem where they are better than evenly spaced rows alone, and else those. None where `x` is
    /// something else.
    pub(super) fn start(&self, x: &Tensor, k: usize) -> Result<Option<Tensor>> {
        let [b, heads, known, d] = dims4_float("centroids", &self.centroids)?;
        let rows = x.dims()[2];
        let same = x.dims()[..2] == [b, heads] && x.dims()[3] == d && x.dtype() == self.centroids.dtype();
        let (new, missing) = (rows.saturating_sub(self.rows), k.saturating_sub(known));
        if !same || !x.device().same_device(self.centroids.device()) || k < known || missing > new {
            return Ok(None);
        }
        let at = |rows: Vec<u32>| functional::rows_of(x, &for_each_head(rows, x)?);
        let even = at((0..k).map(|i| (i * rows / k) as u32).collect())?;
        // A finite number times zero is zero, and nothing else is.
        let finite = (&self.centroids * 0.0)?.sum_keepdim(3)?.eq(0f64)?;
        let useful = self.sizes.unsqueeze(3)?.ne(0u32)?.minimum(&finite)?;
        let mended = at((0..known).map(|i| (i * rows / known) as u32).collect())?;
        let mended = useful.broadcast_as(mended.shape())?.where_cond(&self.centroids, &mended)?;
        let warm = match missing {
            0 => mended,
            _ => {
                let added = at((0..missing).map(|i| (self.rows + i * new / missing) as u32).collect())?;
                Tensor::cat(&[&mended, &added], 2)?
            }
        };
        let count = (rows / SAMPLED).max(LEAST_SAMPLED).min(rows);
        let sample = at((0..count).map(|i| ((2 * i + 1) * rows / (2 * count)) as u32).collect())?;
        let cost = |centroids: &Tensor| {
            let (_, distances) = functional::assign_with_distances(&sample, centroids, Metric::SquaredEuclidean)?;
            let distances = distances.reshape((b * heads, count))?;
            // A distance that is not finite tells nothing.
            functional::totals(&masked_fill(&(&distances * 0.0)?.ne(0f64)?, &distances, 0.0)?)
        };
        let better = cost(&warm)?.le(&(cost(&even)? * USEFUL)?)?.reshape((b, heads, 1, 1))?;
        Ok(Some(better.broadcast_as(warm.shape())?.where_cond(&warm, &even)?))
    }
}
