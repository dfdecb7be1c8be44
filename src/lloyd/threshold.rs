//! How far centroids may move in a fit that has converged.

use super::{
    accumulate::{accumulate_all, Bounds, Total},
    feed::Feed,
    terms::finite_rows,
};
use crate::{
    error::{Error, Result},
    memory::Memory,
    metric::Metric,
    primitives,
    problem::Problem,
    request::{Accumulator, Finish, Reduction},
    rows::Rows,
};
use candle_core::{DType, Tensor};

/// Facts about all rows.
#[derive(Clone, Copy)]
pub(super) struct Usable {
    /// That none has a NaN or an infinity but those that do not count.
    pub all_finite: bool,
    /// That none is padding.
    pub all_counted: bool,
}

/// The squared shift at which a problem has converged, f64 `(b,)`: `tol` times the mean variance of its columns.
///
/// One pass over blocks finds it, by the sums of the columns and of the squared distances to the first row `o`: what the
/// distances to the mean `m` add up to is what those to `o` do, less one from `m` to `o` for each row (Steiner's theorem). Both
/// sums merge; their terms are rounded down to units of 2^-149 times the bound on all of them, whatever the number of rows.
pub(super) fn threshold(
    feed: &mut dyn Feed,
    p: &Problem,
    bounds: &Bounds,
    Usable { all_finite, all_counted }: Usable,
    tol: f64,
) -> Result<Tensor> {
    const EUCLIDEAN: Metric = Metric::SquaredEuclidean;
    const PLANES: usize = 2;
    let (device, b) = (bounds.max_abs.device(), p.b);
    let ones = Tensor::ones(b, DType::F64, device)?;
    let origin = finite_or_zero(feed.first_row()?, all_finite)?;
    let masked = !all_finite || !all_counted;
    let bounds = &Bounds { rows: bounds.rows.max(1 << 40), ..bounds.clone() };
    let max_weight = masked.then(|| ones.clone());
    let columns = Accumulator::new([1, p.d], Bounds { max_weight, ..bounds.clone() }, PLANES, device)?;
    // No two rows are farther apart.
    let most = Tensor::full(f64::MAX, b, device)?;
    let farthest = ((&bounds.max_abs * 2.0)?.sqr()? * p.d as f64)?.minimum(&most)?;
    let (squares, counts) = (Total::new(farthest, bounds.rows, PLANES)?, Total::new(ones.clone(), bounds.rows, 1)?);
    feed.for_each_block(&mut |block| {
        let mut factors = block.counted.cloned();
        if !all_finite {
            let finite = finite_rows(block.x)?;
            factors = Some(match factors {
                Some(counted) => primitives::elementwise([&counted, &finite], |[counted, finite]| counted * finite)?,
                None => finite,
            });
        }
        let ones = || Ok::<_, Error>(Tensor::ones((b, block.x.n), DType::F64, device)?);
        if masked {
            counts.add(&ones()?, factors.clone().map_or_else(ones, Ok)?)?;
        }
        accumulate_all(block.x, factors.clone(), &columns)?;
        let first = Tensor::zeros((b, block.x.n), DType::U32, device)?;
        let distances = primitives::distances(block.x, &Rows::new(&origin)?, &first, EUCLIDEAN)?;
        drop(first);
        squares.add(&distances, factors.map_or_else(ones, Ok)?)
    })?;
    let counted = match masked {
        true => counts.finish(feed)?,
        false => Tensor::full(p.n as f64, b, device)?,
    };
    feed.reduce(&columns)?;
    let mean = Tensor::zeros((b, 1, p.d), DType::F64, device)?;
    let finish = Finish { sums: &columns, reduction: Reduction::Mean, turn: None };
    primitives::finish(&finish, (&mean).into(), &Memory::default())?;
    let (mean, origin) = (Rows::new(&mean)?, Rows::new(&origin.to_dtype(DType::F64)?)?);
    let first = Tensor::zeros((b, 1), DType::U32, device)?;
    let to_mean = primitives::distances(&origin, &mean, &first, EUCLIDEAN)?.flatten_all()?;
    let spread = (squares.finish(feed)? - (&counted * to_mean)?)?;
    // A sum that is beyond f64 is no measure, and one that is nothing but rounding is nothing.
    let zeros = spread.zeros_like()?;
    let spread = (spread.gt(&zeros)? * spread.le(&most)?)?.where_cond(&spread, &zeros)?;
    let share = (Tensor::full(tol, b, device)? / (counted.maximum(&ones)? * p.d as f64)?)?;
    Ok((spread * share)?)
}

/// Rows whose values that are not finite are zeros.
fn finite_or_zero(rows: Tensor, all_finite: bool) -> Result<Tensor> {
    if all_finite {
        return Ok(rows);
    }
    let magnitudes = rows.to_dtype(DType::F64)?.abs()?;
    let finite = magnitudes.lt(&Tensor::full(f64::INFINITY, magnitudes.shape(), magnitudes.device())?)?;
    Ok(finite.where_cond(&rows, &rows.zeros_like()?)?)
}
