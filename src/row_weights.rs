//! Which rows count, and how much: what every learner asks before it takes anything from a batch.
//!
//! A row that holds a NaN or an infinity says nothing, and by cosine neither does a row of no length, which has no direction.
//! Such a row weighs nothing: in no sum, no size of a cluster, no draw.

use crate::{
    error::{Error, Result},
    fit::{refuse_non_finite, Fit},
    functional,
    kmeans::{Init, KMeans},
    memory::Memory,
    metric::Metric,
    primitives,
    problem::Problem,
    request::{Labels, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The weight of each row of a batch.
pub(crate) struct RowWeights {
    /// f64 `(b, n)`, finite: 0 for rows that do not count.
    weights: Tensor,
    /// A bound on the magnitude of what is added up, f64 `(b,)`, and the largest weight.
    max_abs: Tensor,
    max_weight: Tensor,
    /// f64 `(b, n)`, by cosine.
    norms: Option<Tensor>,
}

/// The rows of each cluster.
pub(crate) struct Clusters {
    /// Their weighted mean (by cosine that of their directions), f64 `(b, k, d)`; zeros without weight.
    pub means: Tensor,
    /// Their weight, f64 `(b, k)`.
    pub weights: Tensor,
}

impl RowWeights {
    /// Of rows with sample weights f64 `(b, n)`, or one each. A weight that is not finite and positive is none. The host waits
    /// for nothing.
    pub fn new(x: &Rows, sample_weights: Option<&Tensor>, metric: Metric) -> Result<Self> {
        let norms = primitives::norms(x)?;
        let (magnitude, finite) = scan_rows(x, &norms)?;
        let ones = Tensor::ones((x.b, x.n), DType::F64, x.device())?;
        let weights = sample_weights.unwrap_or(&ones);
        let mut weights = masked(&masked(weights, &positive(weights)?)?, &finite)?;
        let norms = (metric == Metric::Cosine).then_some(norms);
        if let Some(norms) = &norms {
            weights = masked(&weights, &positive(norms)?)?;
        }
        let max_weight = max_finite(&weights)?;
        // Columns of a unit vector, with room for rounding.
        let max_abs = if norms.is_some() { (&max_weight * 2.0)? } else { max_finite(&(magnitude * &weights)?)? };
        Ok(Self { weights, max_abs, max_weight, norms })
    }

    /// f64 `(b, n)`.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// The means and weights of these rows in the clusters of `labels`, u32 `(b, n)`, known to be below `k`. Means are rounded to
    /// the rows' dtype once.
    pub fn clusters(&self, x: &Rows, labels: &Tensor, k: usize) -> Result<Clusters> {
        let order = primitives::grouped(labels, k)?;
        let weights = primitives::cluster_sums(&self.weights, Some(&order))?;
        let mut summands = Summands::from_rows(x)?;
        summands.max_abs = self.max_abs.clone();
        let reduction = match &self.norms {
            // A sum of unit vectors, since their factors are no weights.
            Some(norms) => {
                summands.row_scale = Some(masked(&(&self.weights / norms)?, &positive(norms)?)?);
                Reduction::Sum
            }
            None => {
                (summands.row_scale, summands.max_weight) = (Some(self.weights.clone()), Some(self.max_weight.clone()));
                Reduction::Mean
            }
        };
        let reduced = Tensor::zeros((x.b, k, x.d), x.dtype(), x.device())?;
        let u = Update::new(x, &summands, Some(Labels::Sorted(&order)), reduction, k)?;
        primitives::update(&u, (&reduced).into(), &Memory::default())?;
        let mut means = reduced.to_dtype(DType::F64)?;
        if reduction == Reduction::Sum {
            means = means.broadcast_div(&or_one(&weights)?.unsqueeze(2)?)?;
        }
        Ok(Clusters { means, weights })
    }

    /// Rows, u32 `(b, n)`, of which those that count come first, and how many these are, f64 `(b, 1)`.
    pub fn counting(&self) -> Result<(Tensor, Tensor)> {
        let (order, offsets) = primitives::sorted(&self.weights.eq(0.0)?.to_dtype(DType::U32)?, 2)?;
        Ok((order, offsets.narrow(1, 1, 1)?.to_dtype(DType::F64)?))
    }

    /// Rows that count, u32 `(b, k)`, evenly spaced among them: entry `i` is the one at the share `shares[i]`, of `(b, k)` in
    /// [0, 1), of all that count. And whether there are any, u8 `(b, 1)`.
    pub fn at_shares(&self, shares: &Tensor) -> Result<(Tensor, Tensor)> {
        let (order, count) = self.counting()?;
        Ok((order.gather(&places(shares, &count)?.to_dtype(DType::U32)?, 1)?, count.gt(0.0)?))
    }

    /// Rows that count, u32 `(b, k)`, for those of `k` that want to start again, u8 `(b, k)`: each a row of its own, evenly spaced from a
    /// random start. And who has one, u8 `(b, k)`: the first of them, as many as half of the rows that count but one at least, if any counts.
    pub fn starts(&self, wanting: &Tensor, seed: u64, step: u64) -> Result<(Tensor, Tensor)> {
        let (rank, wanted) = ranks(wanting)?;
        let (rows, count) = self.counting()?;
        let most = (&count / 2.0)?.floor()?.maximum(1.0)?.minimum(&count)?;
        let moved = wanted.minimum(&most)?;
        let places = places(&spaced(&rank, &moved, seed, step)?, &count)?;
        Ok((rows.gather(&places.to_dtype(DType::U32)?, 1)?, rank.broadcast_lt(&moved)?))
    }
}

/// The ranks of `k` things, f64 `(b, k)`: those that want to start again, u8 `(b, k)`, come first, by their index, and then the others. And
/// how many want to, f64 `(b, 1)`.
fn ranks(wanting: &Tensor) -> Result<(Tensor, Tensor)> {
    let (order, ends) = primitives::sorted(&wanting.eq(0u8)?.to_dtype(DType::U32)?, 2)?;
    let (ranks, _) = primitives::sorted(&order, wanting.dim(1)?)?;
    Ok((ranks.to_dtype(DType::F64)?, ends.narrow(1, 1, 1)?.to_dtype(DType::F64)?))
}

/// Shares of the ranks below `count`, f64 `(b, 1)`: evenly spaced in [0, 1) from a random start, by a seed and the number of the step.
fn spaced(ranks: &Tensor, count: &Tensor, seed: u64, step: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(step);
    // Halfway between multiples of 2^-20, so that shares that are whole numbers of rows apart stay so when rounded.
    let start = |_| (rng.random_range(0..1u32 << 20) as f64 + 0.5) * 2f64.powi(-20);
    let starts = Tensor::from_iter((0..count.dim(0)?).map(start), ranks.device())?.unsqueeze(1)?;
    Ok(ranks.broadcast_add(&starts)?.broadcast_div(&count.maximum(1.0)?)?)
}

/// A share for each that wants to start again from a row of the batch, u8 `(b, k)`: f64 `(b, k)` in [0, 1), evenly spaced.
pub(crate) fn shares(wanting: &Tensor, seed: u64, step: u64) -> Result<Tensor> {
    let (ranks, wanted) = ranks(wanting)?;
    spaced(&ranks, &wanted, seed, step)
}

/// Where the shares `(b, k)` of so many things `(b, 1)` are among them, f64 `(b, k)`: the place, rounded down, is a number below theirs.
pub(crate) fn places(shares: &Tensor, count: &Tensor) -> Result<Tensor> {
    let last = (count - 1.0)?.relu()?.broadcast_as(shares.shape())?;
    Ok(shares.broadcast_mul(count)?.minimum(&last)?)
}

/// A bound on the magnitudes of each row that is finite, f64 `(b, n)`, and whether it is, u8 `(b, n)`.
fn scan_rows(x: &Rows, norms: &Tensor) -> Result<(Tensor, Tensor)> {
    if x.dtype() != DType::F64 {
        // The squares of shorter types do not overflow a norm.
        return Ok((norms.clone(), norms.lt(f64::INFINITY)?));
    }
    let (max_abs, first_nonfinite) = primitives::max_abs_and_first_nonfinite(&Rows::from_operand(&x.each()?)?)?;
    Ok((max_abs.reshape((x.b, x.n))?, first_nonfinite.ne(0u32)?.reshape((x.b, x.n))?))
}

/// The largest finite number of each row of f64 `(b, n)`, none of them negative: `(b,)`.
fn max_finite(values: &Tensor) -> Result<Tensor> {
    Ok(primitives::max_abs_and_first_nonfinite(&Rows::new(&values.unsqueeze(2)?)?)?.0)
}

/// A mask of the numbers that are positive and finite, u8.
fn positive(values: &Tensor) -> Result<Tensor> {
    let bounded = values.lt(f64::INFINITY)?;
    Ok(bounded.where_cond(&values.gt(0.0)?, &bounded)?)
}

/// `values` where `mask` is set, and 0 elsewhere.
fn masked(values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    Ok(mask.where_cond(values, &values.zeros_like()?)?)
}

/// Divisors that are not negative, with 1 in place of 0.
pub(crate) fn or_one(values: &Tensor) -> Result<Tensor> {
    Ok(values.gt(0.0)?.where_cond(values, &values.ones_like()?)?)
}

/// Sample weights of shape `(..batch, n)` or `(n)` as f64 `(b, n)`. Values are not searched.
pub(crate) fn sample_weights(p: &Problem, weights: &Tensor, device: &Device) -> Result<Tensor> {
    p.weights(weights, device)?;
    let weights = weights.detach().to_dtype(DType::F64)?.broadcast_as(p.shape(&[p.n]))?;
    Ok(weights.contiguous()?.reshape((p.b, p.n))?)
}

/// Every refusal of a fit that takes no look at values: for those who have other work to do first.
pub(crate) fn check_fit(kmeans: &KMeans, dims: &[usize], dtype: DType, device: &Device) -> Result<Problem> {
    let p = Problem::of(dims, dtype, kmeans.k, kmeans.metric)?.fitting()?;
    kmeans.check(&p, device)?;
    if let Some(weights) = &kmeans.weights {
        p.weights(weights, device)?;
    }
    if let Some(lengths) = &kmeans.lengths {
        p.lengths(lengths, device)?;
    }
    Ok(p)
}

/// [`KMeans::fit`] of the rows that count, whatever the others hold: to the bit what it is of those alone. Labels are those of all
/// rows. Without [`KMeans::check_finite`] rows that are not finite are among the others, and by cosine rows of no length.
///
/// A problem of fewer rows than clusters is one of these rows repeated, and one of no rows is of zeros. The host waits to know
/// whether there are such rows, if there can be. Given centroids are refused if they are not finite, whatever the settings.
pub(crate) fn fit(x: &Tensor, kmeans: &KMeans) -> Result<Fit> {
    let p = check_fit(kmeans, x.dims(), x.dtype(), x.device())?;
    if let Init::Given(centroids) = &kmeans.init {
        refuse_non_finite("init", &primitives::max_abs_and_first_nonfinite(&Rows::new(centroids)?)?.1)?;
    }
    let x = x.detach();
    let Some(counting) = counting(&x, &p, kmeans)? else { return kmeans.fit_on_its_device(&x) };
    let (mut index, mut lengths) = (Vec::with_capacity(p.b * p.n), Vec::with_capacity(p.b));
    let mut none = vec![0u8; p.b];
    for (counting, none) in counting.iter().zip(&mut none) {
        let rows: Vec<_> = (0..p.n as u32).filter(|&i| counting[i as usize] == Row::Counts).collect();
        *none = rows.is_empty() as u8;
        lengths.push(rows.len().max(p.k) as u32);
        index.extend(if rows.is_empty() { vec![0; p.n] } else { rows.into_iter().cycle().take(p.n).collect() });
    }
    let device = x.device();
    let (index, none) = (Tensor::from_vec(index, (p.b, p.n), device)?, Tensor::from_vec(none, (p.b, 1, 1), device)?);
    let rows = primitives::gather(&Rows::new(&x)?, &index)?;
    let rows = none.broadcast_as(rows.shape())?.where_cond(&rows.zeros_like()?, &rows)?.reshape(x.shape())?;
    let mut kmeans = kmeans.clone().lengths(&Tensor::from_vec(lengths, p.batch.clone(), device)?);
    if let Some(weights) = &kmeans.weights {
        let weights = sample_weights(&p, weights, device)?.gather(&index, 1)?;
        let none = none.reshape((p.b, 1))?.broadcast_as(weights.shape())?;
        kmeans.weights = Some(none.where_cond(&weights.ones_like()?, &weights)?.reshape(p.shape(&[p.n]))?);
    }
    let fit = kmeans.fit_on_its_device(&rows)?;
    Ok(Fit { labels: functional::assign(&x, &fit.centroids, p.metric)?, ..fit })
}

/// `x` with a NaN in place of every number of a row that does not count, and how to fit that: what is computed from such a row
/// then does not count either.
pub(crate) fn marked(x: &Tensor, kmeans: &KMeans) -> Result<(Tensor, KMeans)> {
    let p = Problem::of(x.dims(), x.dtype(), kmeans.k, kmeans.metric)?;
    let x = x.detach();
    let Some(counting) = counting(&x, &p, kmeans)? else { return Ok((x, kmeans.clone())) };
    let silent = counting.concat().into_iter().map(|row| (row == Row::Silent) as u8).collect();
    let silent = Tensor::from_vec(silent, p.shape(&[p.n, 1]), x.device())?.broadcast_as(x.shape())?;
    let nan = Tensor::full(f64::NAN, (), x.device())?.to_dtype(x.dtype())?.broadcast_as(x.shape())?;
    Ok((silent.where_cond(&nan, &x)?, kmeans.clone().check_finite(false)))
}

/// The weight of each row of a fit, f64 `(b, n)`: 0 for those that do not count.
pub(crate) fn weights_of(x: &Tensor, kmeans: &KMeans) -> Result<Tensor> {
    let p = Problem::fit(x, kmeans.k, kmeans.metric)?;
    let given = kmeans.weights.as_ref().map(|w| sample_weights(&p, w, x.device())).transpose()?;
    let mut weights = RowWeights::new(&Rows::new(x)?, given.as_ref(), p.metric)?.weights;
    if let Some(lengths) = &kmeans.lengths {
        let (shape, ends) = ((p.b, p.n), lengths.reshape((p.b, 1))?);
        let places = Tensor::arange(0, p.n as u32, x.device())?.broadcast_as(shape)?;
        weights = masked(&weights, &places.lt(&ends.broadcast_as(shape)?)?)?;
    }
    Ok(weights)
}

/// The weight of each cluster of a fit's labels, f64 `(b, k)`, over the rows that count.
pub(crate) fn cluster_weights(x: &Tensor, kmeans: &KMeans, fit: &Fit) -> Result<Tensor> {
    let (p, weights) = (Problem::fit(x, kmeans.k, kmeans.metric)?, weights_of(x, kmeans)?);
    let order = primitives::grouped(&fit.labels.contiguous()?.reshape((p.b, p.n))?, p.k)?;
    primitives::cluster_sums(&weights, Some(&order))
}

/// A row counts in a fit, or does not for one of two reasons.
#[derive(Clone, Copy, PartialEq)]
enum Row {
    Counts,
    /// It is not finite, or has no direction where that is asked for.
    Silent,
    /// It comes after the [`KMeans::lengths`].
    Padding,
}

/// Which rows count, or nothing if all do that are no padding. Refuses the first row that is not finite, if that is asked for.
fn counting(x: &Tensor, p: &Problem, kmeans: &KMeans) -> Result<Option<Vec<Vec<Row>>>> {
    if kmeans.check_finite && p.metric != Metric::Cosine {
        // There can be none: the fit refuses them.
        return Ok(None);
    }
    let rows = Rows::new(x)?;
    let norms = primitives::norms(&rows)?;
    let finite = scan_rows(&rows, &norms)?.1.to_vec2::<u8>()?;
    let directed = match p.metric {
        Metric::Cosine => positive(&norms)?.to_vec2::<u8>()?,
        _ => finite.clone(),
    };
    let lengths = match &kmeans.lengths {
        Some(lengths) => lengths.flatten_all()?.to_vec1::<u32>()?,
        None => vec![p.n as u32; p.b],
    };
    if lengths.iter().any(|&length| !(p.k..=p.n).contains(&(length as usize))) {
        // The fit refuses these.
        return Ok(None);
    }
    let mut counting = Vec::with_capacity(p.b);
    for (batch, length) in lengths.into_iter().map(|length| length as usize).enumerate() {
        let bad = finite[batch].iter().take(length).position(|&finite| finite == 0);
        if let (true, Some(row)) = (kmeans.check_finite, bad) {
            return Err(Error::NonFinite { argument: "x", batch, row });
        }
        let counted = |(row, &directed): (usize, &u8)| match directed == 1 && finite[batch][row] == 1 {
            _ if row >= length => Row::Padding,
            true => Row::Counts,
            false => Row::Silent,
        };
        counting.push(directed[batch].iter().enumerate().map(counted).collect::<Vec<_>>());
    }
    Ok(counting.concat().contains(&Row::Silent).then_some(counting))
}
