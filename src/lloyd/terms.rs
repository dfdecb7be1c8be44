//! Which rows count and by how much.

use crate::{
    error::{kept, Error, Result},
    fit::refuse_non_finite,
    kmeans::KMeans,
    primitives,
    problem::Problem,
    request::Order,
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};

/// Problems of different sizes: which rows count.
///
/// A run takes no shape of these to the device, which a captured graph would look for where it was.
pub(crate) struct Ragged {
    pub(super) lengths: Vec<usize>,
    /// 1 where a row counts and 0 where it is padding, f64 `(b, n)`.
    pub(super) ones: Tensor,
    /// 1 for each problem, f64 `(b,)`.
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

/// [`primitives::max_abs_and_first_nonfinite`] of the rows that count: of which `ones` is 1, and 0 elsewhere.
pub(super) fn scan_counted(x: &Rows, ones: &Tensor) -> Result<(Tensor, Tensor)> {
    // The largest magnitude and the first row that is not finite, of rows of one column.
    let (largest, bad) = scan_rows(x)?;
    let whole = |found: Tensor| primitives::max_abs_and_first_nonfinite(&Rows::new(&found.reshape((x.b, x.n, 1))?)?);
    let largest = primitives::elementwise([&largest, ones], |[largest, ones]| largest * ones)?;
    // 0 is what `bad` says of such a row, and the largest u32 of others.
    let none = u32::MAX as f64;
    let bad =
        primitives::elementwise([&bad, ones], |[bad, ones]| bad.to_dtype(DType::F64)?.affine(-1.0, none)? * ones)?;
    let bad = primitives::elementwise([&bad], |[bad]| bad.affine(-1.0, none)?.recip())?;
    Ok((whole(largest)?.0, whole(bad)?.1))
}

/// The weights of a fit's rows.
pub(crate) struct Weights {
    /// f64 `(b, n)`, 0 for rows that do not count. They are in units of the power of two at or above the largest, with which their
    /// products neither overflow nor vanish, whatever the weights were.
    pub(crate) values: Tensor,
    /// That power of two, f64 `(b,)`.
    pub(crate) unit: Tensor,
    /// The largest of `values`, f64 `(b,)`.
    pub(crate) heaviest: Tensor,
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
            return Ok(Some(Self { values: ones.clone(), unit: one.clone(), heaviest: one.clone() }));
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
        let (heaviest, first_bad) = primitives::max_abs_and_first_nonfinite(&Rows::new(&w.unsqueeze(2)?)?)?;
        let heaviest = heaviest.to_vec1::<f64>()?;
        if settings.check_finite {
            refuse_non_finite("sample_weights", &first_bad)?;
            let refused = |argument, batch: usize, got, expected: &'static str| {
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
            if let Some(b) = heaviest.iter().position(|&heaviest| heaviest == 0.0) {
                return refused("sample_weights total", b, 0.0, "positive");
            }
        }
        let unit: Vec<_> = heaviest.iter().map(|&heaviest| power_of_two_above(heaviest)).collect();
        let inverse = Tensor::from_iter(unit.iter().map(|unit| unit.recip()), device)?;
        let (unit, heaviest) = (Tensor::new(unit, device)?, (Tensor::new(heaviest, device)? * &inverse)?);
        Ok(Some(Self { values: w.broadcast_mul(&inverse.unsqueeze(1)?)?, unit, heaviest }))
    }
}

/// The rows that count in each cluster, u32 `(b, k)`.
pub(super) fn sizes(order: &Order, counted: Option<&Tensor>) -> Result<Tensor> {
    match counted {
        Some(ones) => Ok(primitives::cluster_sums(ones, Some(order))?.to_dtype(DType::U32)?),
        None => primitives::cluster_sizes(&order.offsets),
    }
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
    let (largest, bad) = primitives::max_abs_and_first_nonfinite(&Rows::from_operand(&x.each()?)?)?;
    Ok((largest.reshape((x.b, x.n))?, bad.reshape((x.b, x.n))?))
}

/// 1 where a row is without a NaN or an infinity and 0 elsewhere, f64 `(b, n)`.
pub(super) fn finite_rows(x: &Rows) -> Result<Tensor> {
    if x.dtype() == DType::F64 {
        // A norm may be infinite where the row is not.
        let (_, first_bad) = scan_rows(x)?;
        // 0 is what it says of a row that is not, and the largest u32 of others.
        return within(&primitives::elementwise([&first_bad], |[bad]| bad.to_dtype(DType::F64))?, Some(0.0));
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
