//! All distances of rows to centroids: by products that prove how they are rounded, or by the definition.

use super::{
    lines::PAIR,
    origin::median,
    pairwise::{Columns, Part, LANES},
    pairwise_products::{worth_proving, Proof, ProofScratch, ProvingCentroids, ROWS},
    scalar::Scalar,
    tensors::{lock, tensor, typed, Element, View},
};
use crate::{error::Result, host, metric::Metric, rows::Rows};
use candle_core::Tensor;
use std::sync::{
    atomic::{AtomicI64, Ordering::Relaxed},
    OnceLock,
};

pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let [xs, cs] = lock([&x.operand, &c.operand]);
        let out = all_distances(&xs.view::<T>(x)?, &cs.view::<T>(c)?, metric)?;
        tensor(out, (x.b, x.n, c.n))
    })
}

fn all_distances<T: Element>(x: &View<'_, T>, c: &View<'_, T>, metric: Metric) -> Result<Vec<T::Filter>> {
    let (b, n, d, k) = (x.rows.b, x.rows.n, x.rows.d, c.rows.n);
    let mut out = host::zeros_unwritten("pairwise", b * n * k, T::Filter::of(0.0))?;
    if out.is_empty() {
        return Ok(out);
    }
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    // Of one row, or one centroid, preparing the others is most of the work.
    let proving = worth_proving::<T>(metric, d) && n.min(k) > 1;
    let centroids = (0..problems).map(|b| Centroids::new(c, b, metric, proving)).collect::<Result<Vec<_>>>()?;
    // Of few rows every thread has some.
    let rows = if b * n < 32 * ROWS { PAIR } else { ROWS };
    let parts = out.chunks_mut(n * k).enumerate();
    let parts = parts.flat_map(|(b, out)| out.chunks_mut(rows * k).enumerate().map(move |(p, out)| (b, p * rows, out)));
    let part = |(proof, wide): &mut (ProofScratch, Vec<f64>), (b, first, out): (usize, usize, &mut [T::Filter])| {
        let (of, simd) = (b.min(problems - 1), pulp::Arch::new());
        let Centroids { proving, defined, balance } = &centroids[of];
        if let Some(centroids) = proving.as_ref().filter(|_| balance.load(Relaxed) >= 0) {
            let (scratch, out) = (&mut *proof, &mut *out);
            let proven = simd.dispatch(Proof { x, c, b, of, first, centroids, metric, scratch, out });
            balance.fetch_add(if proven { 1 } else { -1 }, Relaxed);
            if proven {
                return Ok(());
            }
        }
        wide.resize(rows.min(n) * d, 0.0);
        let columns = defined.get_or_init(|| {
            let tiles = 0..k.div_ceil(LANES);
            tiles.map(|tile| Columns::new(c, of, tile, &[], metric)).collect()
        });
        simd.dispatch(Part { x, b, first, k, columns, metric, rows: wide, out });
        Ok(())
    };
    host::for_each(parts.collect(), rows.min(n) * d * k / 16, Default::default, part)?;
    Ok(out)
}

/// The centroids of a problem.
struct Centroids {
    /// For products.
    proving: Option<ProvingCentroids>,
    /// For the definition, when that is asked for.
    defined: OnceLock<Vec<Columns>>,
    /// Parts of the rows whose products have proven enough, less those that have not: below zero no more are tried.
    balance: AtomicI64,
}

impl Centroids {
    fn new<T: Element>(c: &View<'_, T>, b: usize, metric: Metric, proving: bool) -> Result<Self> {
        let mut centre = vec![];
        if proving && metric == Metric::SquaredEuclidean {
            let all: Vec<_> = (0..c.rows.n as u32).collect();
            centre.extend(median(c, b, &all).into_iter().map(Scalar::widen));
        }
        let proving = proving.then(|| ProvingCentroids::new(c, b, centre, metric)).transpose()?;
        Ok(Self { proving, defined: OnceLock::new(), balance: AtomicI64::new(0) })
    }
}
