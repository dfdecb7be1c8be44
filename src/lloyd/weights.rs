//! Which rows of a fit count, and by how much. (Learners ask `row_weights`.)

use crate::{
    error::{kept, Error, Result},
    fit::refuse_non_finite,
    kmeans::KMeans,
    metric::Metric,
    primitives,
    problem::Problem,
    request::Order,
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};

/// Which rows count in problems of different sizes, and which are padding.
///
/// These are made before any run, so that nothing has to go to the device in one: a captured graph would look for it where it was.
pub(crate) struct Ragged {
    pub(super) lengths: Vec<usize>,
    /// 1 where a row counts and 0 where it is padding, f64 `(b, n)`.
    pub(super) ones: Tensor,
    /// 1 for each problem, f64 `(b,)`: the unit and the largest of such weights.
    pub(super) one: Tensor,
}

impl Ragged {
    pub(super) fn new(lengths: Vec<usize>, p: &Problem, device: &Device) -> Result<Self> {
        let (b, n) = (p.b, p.n);
        let ends = Tensor::from_vec(lengths.iter().map(|&l| l as u32).collect(), (b, 1), device)?;
        let at = primitives::contiguous(&Tensor::arange(0, n as u32, device)?.broadcast_as((b, n))?)?;
        let ends = primitives::contiguous(&ends.broadcast_as((b, n))?)?;
        let ones = primitives::elementwise([&at, &ends], |[at, ends]| at.lt(ends)?.to_dtype(DType::F64))?;
        Ok(Self { lengths, ones, one: Tensor::ones(b, DType::F64, device)? })
    }
}

/// [`primitives::max_abs_and_first_nonfinite`] of the rows that count, where `ones` is 1.
pub(super) fn scan_counted(x: &Rows, ones: &Tensor) -> Result<(Tensor, Tensor)> {
    let (max_abs, bad) = scan_rows(x)?;
    // A problem's findings are those of a column of what its rows give: the largest magnitude, and the first infinity.
    let whole = |found: Tensor| primitives::max_abs_and_first_nonfinite(&Rows::new(&found.reshape((x.b, x.n, 1))?)?);
    let max_abs = primitives::elementwise([&max_abs, ones], |[max_abs, ones]| max_abs * ones)?;
    // A row that is not finite has 0 in `bad`, any other the largest u32: infinity and a number are made of them.
    let none = u32::MAX as f64;
    let bad =
        primitives::elementwise([&bad, ones], |[bad, ones]| bad.to_dtype(DType::F64)?.affine(-1.0, none)? * ones)?;
    let bad = primitives::elementwise([&bad], |[bad]| bad.affine(-1.0, none)?.recip())?;
    Ok((whole(max_abs)?.0, whole(bad)?.1))
}

/// The rows that count in each cluster, u32 `(b, k)`.
pub(super) fn counted_sizes(order: &Order, counted: Option<&Tensor>) -> Result<Tensor> {
    match counted {
        Some(ones) => Ok(primitives::cluster_sums(ones, Some(order))?.to_dtype(DType::U32)?),
        None => primitives::cluster_sizes(&order.offsets),
    }
}

/// The weights of a fit's rows.
pub(crate) struct Weights {
    /// f64 `(b, n)`, 0 for rows that do not count. They are in units of the power of two at or above the largest, with which their
    /// products neither overflow nor vanish, whatever the weights were.
    pub(crate) values: Tensor,
    /// That power of two, f64 `(b,)`.
    pub(crate) unit: Tensor,
    /// The largest of `values`, f64 `(b,)`.
    pub(crate) max_weight: Tensor,
}

impl Weights {
    /// A copy of the weights that were asked for, checked; none where every row counts alike.
    pub(crate) fn new(
        settings: &KMeans,
        p: &Problem,
        ragged: Option<&Ragged>,
        device: &Device,
    ) -> Result<Option<Self>> {
        let Some(given) = &settings.weights else {
            let Some(Ragged { ones, one, .. }) = ragged else { return Ok(None) };
            return Ok(Some(Self { values: ones.clone(), unit: one.clone(), max_weight: one.clone() }));
        };
        // A copy, which the caller cannot change.
        let all =
            primitives::elementwise([&given.detach()], |[w]| w.to_dtype(DType::F64))?.broadcast_as(p.shape(&[p.n]))?;
        let mut w =
            if all.is_contiguous() { all.copy()? } else { primitives::contiguous(&all)? }.reshape((p.b, p.n))?;
        if let Some(Ragged { ones, .. }) = ragged {
            w = primitives::elementwise([ones, &w], |[ones, w]| ones.gt(0.0)?.where_cond(w, &w.zeros_like()?))?;
        }
        if !settings.check_finite {
            w = primitives::elementwise([&w], |[w]| {
                let sound = (w.gt(0.0)? * w.lt(f64::INFINITY)?)?;
                sound.where_cond(w, &w.zeros_like()?)
            })?;
        }
        let (max_weight, first_nonfinite) = primitives::max_abs_and_first_nonfinite(&Rows::new(&w.unsqueeze(2)?)?)?;
        let max_weight = max_weight.to_vec1::<f64>()?;
        if settings.check_finite {
            refuse_non_finite("sample_weights", &first_nonfinite)?;
            let refused = |argument, b: usize, got, expected: &'static str| {
                let batch = p.first_problem + b;
                let expected =
                    if p.batch.is_empty() { expected } else { kept(format!("{expected} in batch element {batch}")) };
                Err(Error::Value { argument, got, expected })
            };
            let least = match primitives::check_counted("sample_weights", &w) {
                Ok(()) => w.min(1)?.to_vec1::<f64>()?,
                Err(_) => (0..p.b).map(|b| least_of(&w.narrow(0, b, 1)?)).collect::<Result<_>>()?,
            };
            if let Some(b) = least.iter().position(|&least| least < 0.0) {
                return refused("sample_weights", b, least[b], "at least 0");
            }
            if let Some(b) = max_weight.iter().position(|&max_weight| max_weight == 0.0) {
                return refused("sample_weights total", b, 0.0, "positive");
            }
        }
        let unit: Vec<_> = max_weight.iter().map(|&max_weight| power_of_two_above(max_weight)).collect();
        let inverse = Tensor::from_iter(unit.iter().map(|unit| unit.recip()), device)?;
        let (unit, max_weight) = (Tensor::new(unit, device)?, (Tensor::new(max_weight, device)? * &inverse)?);
        Ok(Some(Self { values: w.broadcast_mul(&inverse.unsqueeze(1)?)?, unit, max_weight }))
    }
}

/// The factors of rows as terms of a sum, f64 `(b, n)`: their weights, by cosine over their norms; none where all are 1.
pub(super) fn factors(x: &Rows, weights: Option<&Tensor>, metric: Metric) -> Result<Option<Tensor>> {
    if metric != Metric::Cosine {
        return Ok(weights.cloned());
    }
    let inverse = primitives::elementwise([&primitives::norms(x)?], |[norms]| norms.recip())?;
    Ok(Some(match weights {
        Some(weights) => primitives::elementwise([weights, &inverse], |[w, i]| w * i)?,
        None => inverse,
    }))
}

/// The weighted distances of rows to the centroids of their labels, f64 `(b, n)`: 0 for rows that weigh nothing.
pub(super) fn costs(
    x: &Rows,
    centroids: &Tensor,
    labels: &Tensor,
    weights: Option<&Tensor>,
    settings: &KMeans,
) -> Result<Tensor> {
    let mut costs = primitives::distances(x, &Rows::new(centroids)?, labels, settings.metric)?;
    if !settings.check_finite {
        costs = weighed(&costs, &finite_rows(x)?)?;
    }
    weights.map_or(Ok(costs.clone()), |weights| weighed(&costs, weights))
}

/// The smallest power of two that is not below `v`; 1 for 0, and no more than f64 has, whose inverse is exact too.
fn power_of_two_above(v: f64) -> f64 {
    const MANTISSA: u64 = (1 << 52) - 1;
    let (exponent, rest) = ((v.to_bits() >> 52) as i32 - 1023, v.to_bits() & MANTISSA);
    match v {
        0.0 => 1.0,
        _ => 2f64.powi((exponent + (rest > 0) as i32).clamp(-1021, 1022)),
    }
}

/// The smallest of any number of values.
fn least_of(values: &Tensor) -> Result<f64> {
    let least = primitives::pieces(values)?.into_iter().map(|piece| piece.min_all()?.to_scalar::<f64>());
    Ok(least.collect::<candle_core::Result<Vec<_>>>()?.into_iter().fold(f64::INFINITY, f64::min))
}

/// `values` times their weights, both f64 `(b, n)`: 0 where a weight is 0, whatever the value.
pub(super) fn weighed(values: &Tensor, weights: &Tensor) -> Result<Tensor> {
    primitives::elementwise([values, weights], |[values, weights]| {
        weights.gt(0.0)?.where_cond(values, &values.zeros_like()?)? * weights
    })
}

/// [`primitives::max_abs_and_first_nonfinite`] of each row as a problem of its own, f64 and u32 `(b, n)`.
fn scan_rows(x: &Rows) -> Result<(Tensor, Tensor)> {
    let (max_abs, bad) = primitives::max_abs_and_first_nonfinite(&Rows::from_operand(&x.each()?)?)?;
    Ok((max_abs.reshape((x.b, x.n))?, bad.reshape((x.b, x.n))?))
}

/// 1 where a row is without a NaN or an infinity and 0 elsewhere, f64 `(b, n)`.
pub(super) fn finite_rows(x: &Rows) -> Result<Tensor> {
    if x.dtype() == DType::F64 {
        // A norm may be infinite where the row is not.
        let (_, first_nonfinite) = scan_rows(x)?;
        // A row that is not finite has 0 there, any other the largest u32.
        return within(&primitives::elementwise([&first_nonfinite], |[bad]| bad.to_dtype(DType::F64))?, Some(0.0));
    }
    within(&primitives::norms(x)?, None)
}

/// 1 where a row has a direction, a norm that is neither 0 nor infinite, and 0 elsewhere, f64 `(b, n)`.
pub(super) fn directed_rows(x: &Rows) -> Result<Tensor> {
    within(&primitives::norms(x)?, Some(0.0))
}

/// 1 where a value is above `low`, if there is one, and finite, and 0 elsewhere. The bounds are tensors: what a comparison with a
/// number takes to the device would not be there when a captured graph looks for it.
fn within(values: &Tensor, low: Option<f64>) -> Result<Tensor> {
    primitives::elementwise([values], |[values]| {
        let bound = |v: f64| Tensor::full(v, values.shape(), values.device());
        let mut mask = values.lt(&bound(f64::INFINITY)?)?;
        if let Some(low) = low {
            mask = (mask * values.gt(&bound(low)?)?)?;
        }
        mask.to_dtype(DType::F64)
    })
}
