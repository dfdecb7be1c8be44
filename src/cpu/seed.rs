//! The choice of rows as seeds.

use super::{
    rows::{distance, per_row},
    tensors::{lock, or, tensor, typed, Element, View},
};
use crate::{
    error::Result,
    host,
    metric::Metric,
    rng::{race_key, Draw},
    rows::Rows,
    spread::spread,
};
use candle_core::Tensor;

/// Whether a row can be a seed; see [`primitives::usable_seeds`](crate::primitives::usable_seeds).
fn can_be_seed<T: Element>(row: &[T], weight: f64, metric: Metric) -> bool {
    let square = row.iter().fold(0.0, |s, v| s + v.wide() * v.wide());
    let directed = metric != Metric::Cosine || square > 0.0 && square < f64::INFINITY;
    weight > 0.0 && directed && row.iter().all(|v| v.wide().is_finite())
}

pub(crate) fn usable_seeds(x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
    let mut rows = chosen.to_vec2::<u32>()?;
    typed!(x.dtype(), T => {
        let [xs, ws] = lock([&x.operand, or(weights, &x.operand)]);
        let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
        let choose = |_: &mut (), (b, rows): (usize, &mut Vec<u32>)| {
            let usable = |i: usize| can_be_seed(xs.row(b, i), weights.map_or(1.0, |w| w[b * x.n + i]), metric);
            for seed in 0..rows.len() {
                let from = rows[seed] as usize;
                let mut others = (from..x.n).chain(0..from);
                let usable = others.find(|&i| usable(i) && (i == from || !rows.contains(&(i as u32))));
                rows[seed] = usable.unwrap_or(from) as u32;
            }
            Ok(())
        };
        let steps = chosen.dim(1)? * (x.d + chosen.dim(1)?);
        host::for_each(rows.iter_mut().enumerate().collect(), steps, || (), choose)?;
        tensor(rows.concat(), chosen.dims2()?)
    })
}

/// The distance of row `i` to the nearest seed, with one more seed: see [`primitives::min_distance_with`](crate::primitives::min_distance_with).
fn nearer_by<T: Element>(x: &View<'_, T>, b: usize, i: usize, nearest: f64, seed: u32, metric: Metric) -> f64 {
    if seed as usize == i {
        -1.0
    } else if nearest < 0.0 || seed == u32::MAX {
        nearest
    } else {
        let d = distance(x.row(b, i), x.row(b, seed as usize), spread(metric));
        nearest.min(if d > 0.0 { d } else { 0.0 })
    }
}

pub(crate) fn min_distance_with(x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs, near, new] = lock([&x.operand, nearest, newest]);
        let (xs, near, new) = (xs.view::<T>(x)?, near.flat::<f64>()?, new.flat::<u32>()?);
        per_row("k-means||", [x.b, x.n], x.d, |b, i| nearer_by(&xs, b, i, near[b * x.n + i], new[b], metric))
    })
}

pub(crate) fn exponential_race_keys(
    nearest: &Tensor,
    weights: Option<&Tensor>,
    draw: Draw,
    first: usize,
) -> Result<Tensor> {
    let (b, n) = nearest.dims2()?;
    let [near, each] = lock([nearest, weights.unwrap_or(nearest)]);
    let (near, weights) = (near.flat::<f64>()?, weights.map(|_| each.flat::<f64>()).transpose()?);
    per_row("race", [b, n], RACE_STEPS, |b, i| {
        race_key(draw, b, first + i, near[b * n + i], weights.map_or(1.0, |w| w[b * n + i]))
    })
}

/// Steps that a race's key takes.
const RACE_STEPS: usize = 32;
