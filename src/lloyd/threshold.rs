//! A fit has converged when no centroid moves farther than this threshold, which its rows' variance gives.

use super::{
    accumulate::{accumulate_all, Bounds, Total},
    feed::{Feed, Pass},
    weights::finite_rows,
};
use crate::{
    error::Result,
    memory::Memory,
    metric::Metric,
    primitives,
    problem::Problem,
    request::{Accumulator, Finish, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Device, Tensor};

/// Which rows can be added up as they are.
#[derive(Clone, Copy)]
pub(super) struct Usable {
    /// Whether those that count have no NaN and no infinity.
    pub all_finite: bool,
    /// Whether all count: none is padding.
    pub all_counted: bool,
}

/// The squared shift at which a problem has converged, f64 `(b,)`: `tol` times the mean variance of its columns.
///
/// One pass over blocks finds it, since both of its sums merge: of the columns, which gives the mean `m`, and of squared distances
/// to the first row `o`. For `n` rows, `sum |x - m|^2 = sum |x - o|^2 - n |m - o|^2` (Steiner's theorem, or the parallel axis
/// theorem). With a row of the data for `o` less cancels than with 0, where the data lie far from 0. Terms are rounded down to
/// units of 2^-149 times their bound's power of two, whatever the number of rows.
pub(super) fn threshold(
    feed: &mut dyn Feed,
    p: &Problem,
    bounds: &Bounds,
    Usable { all_finite, all_counted }: Usable,
    tol: f64,
) -> Result<Tensor> {
    const EUCLIDEAN: Metric = Metric::SquaredEuclidean;
    const PLANES: usize = 2;
    let (device, b, memory) = (bounds.max_abs.device(), p.b, &Memory::default());
    let ones = Tensor::ones(b, DType::F64, device)?;
    let origin = origin(first_row(feed, p, device)?, all_finite, memory)?;
    // Rows that do not count have a factor of 0, and how many do is a sum, too.
    let masked = !all_finite || !all_counted;
    // As many rows for all, so that the unit of the last plane, and with it the threshold, depends on no padding.
    let bounds = &Bounds { rows: bounds.rows.max(1 << 40), ..bounds.clone() };
    let max_weight = masked.then(|| ones.clone());
    let columns = Accumulator::new([1, p.d], Bounds { max_weight, ..bounds.clone() }, PLANES, device)?;
    // No two rows are farther apart.
    let most = Tensor::full(f64::MAX, b, device)?;
    let farthest = ((&bounds.max_abs * 2.0)?.sqr()? * p.d as f64)?.minimum(&most)?;
    let squares = Total::new(farthest, bounds.rows, PLANES)?;
    let counts = masked.then(|| Total::new(ones.clone(), bounds.rows, 1)).transpose()?;
    feed.begin_pass(Pass::Variance);
    feed.for_each_block(&mut |block| {
        let mut factors = block.counted.cloned();
        if !all_finite {
            let finite = finite_rows(block.x)?;
            factors = Some(match factors {
                Some(counted) => primitives::elementwise([&counted, &finite], |[counted, finite]| counted * finite)?,
                None => finite,
            });
        }
        if let (Some(counts), Some(factors)) = (&counts, &factors) {
            counts.add(factors, None, memory)?;
        }
        accumulate_all(block.x, factors.clone(), &columns, memory)?;
        let first = Tensor::zeros((b, block.x.n), DType::U32, device)?;
        let distances = primitives::distances(block.x, &Rows::new(&origin)?, &first, EUCLIDEAN)?;
        drop(first);
        squares.add(&distances, factors, memory)
    })?;
    let counted = match counts {
        Some(counts) => counts.finish(feed, memory)?,
        None => Tensor::full(p.n as f64, b, device)?,
    };
    feed.ranks().reduce(&columns.sums)?;
    let mean = Tensor::zeros((b, 1, p.d), DType::F64, device)?;
    let finish = Finish { sums: &columns, reduction: Reduction::Mean, turn: None };
    primitives::finish(&finish, (&mean).into(), memory)?;
    let (mean, origin) = (Rows::new(&mean)?, Rows::new(&origin.to_dtype(DType::F64)?)?);
    let first = Tensor::zeros((b, 1), DType::U32, device)?;
    let to_mean = primitives::distances(&origin, &mean, &first, EUCLIDEAN)?.flatten_all()?;
    // By arithmetic alone, since a captured graph would look for what a choice takes to the device. A sum that is beyond f64 is no
    // measure, and a difference that is nothing but rounding is nothing.
    let (to_origin, to_mean) = (squares.finish(feed, memory)?, (&counted * to_mean)?);
    let measured = (to_origin.le(&most)? * to_mean.le(&most)?)?.to_dtype(DType::F64)?;
    let spread = (to_origin.minimum(&most)? - to_mean.minimum(&most)?)?;
    let spread = (spread.maximum(&spread.zeros_like()?)? * measured)?;
    let share = (Tensor::full(tol, b, device)? / (counted.maximum(&ones)? * p.d as f64)?)?;
    Ok((spread * share)?)
}

/// The first row of each problem among the rows of all ranks, `(b, 1, d)`.
fn first_row(feed: &mut dyn Feed, p: &Problem, device: &Device) -> Result<Tensor> {
    let own_row = feed.first_row()?;
    if let (1, Some(row)) = (feed.ranks().count(), &own_row) {
        return Ok(row.clone());
    }
    let values = |row: Tensor| row.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let rows = feed.ranks().gather(own_row.map_or(Ok(vec![]), values)?)?;
    let first = rows.into_iter().find(|row| !row.is_empty()).expect("a rank with rows");
    Ok(Tensor::from_vec(first, (p.b, 1, p.d), device)?.to_dtype(p.dtype)?)
}

/// The first row of each problem, or zeros for one that is not finite, which no distance could be measured to.
fn origin(first_row: Tensor, all_finite: bool, memory: &Memory) -> Result<Tensor> {
    if all_finite {
        return Ok(first_row);
    }
    // A row is its own mean, and the mean of nothing stays as it was.
    let (x, mean) = (Rows::new(&first_row)?, first_row.zeros_like()?);
    let summands = Summands::from_rows(&x)?;
    primitives::update(&Update::new(&x, &summands, None, Reduction::Mean, 1)?, (&mean).into(), memory)?;
    Ok(mean)
}
