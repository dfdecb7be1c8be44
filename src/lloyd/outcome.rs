//! The results of a fit beside its labels, added up block by block while the last pass has their rows.

use super::{
    accumulate::{Bounds, Total},
    feed::{Block, Feed},
    merged::{Found, Terms, Whole},
    relocate::SizesSoFar,
    weights::{costs, counted_sizes, Weights},
};
use crate::{
    error::Result,
    fixed::Grid,
    memory::Memory,
    metric::Metric,
    primitives,
    request::{Accumulator, Finish, Labels, Reduction, Summands, Update},
    rows::Rows,
};
use candle_core::{DType, Tensor};

/// The counts, the weights of clusters and the inertia of a fit.
pub(super) struct Outcome<'a> {
    whole: Whole<'a>,
    sizes: SizesSoFar,
    /// The sums of the weights, if there are any.
    weights: Option<Accumulator>,
    /// The sum of the finite distances.
    total: Total,
    /// 1 where a problem has had an infinite distance, f64 `(b,)`.
    infinite: Tensor,
}

impl<'a> Outcome<'a> {
    /// Nothing yet, of a run from the centroids `start`, `(b, k, d)`: they and the rows bound all distances.
    pub fn new(whole: Whole<'a>, found: &Found, terms: &Terms, start: &Tensor) -> Result<Self> {
        let Whole { settings, p, device, weights, .. } = whole;
        let of_start = primitives::max_abs_and_first_nonfinite(&Rows::new(start)?)?.0.to_vec1::<f64>()?;
        let max_weight = weights.map_or(Ok(vec![1.0; p.b]), |weights| weights.max_weight.to_vec1::<f64>())?;
        // With room for what rounding adds. A centroid is where it started or a mean of rows.
        let bound = |b: usize| {
            let (x, d) = (found.max_abs[b], p.d as f64);
            let c = of_start[b].max(x);
            let farthest = match p.metric {
                Metric::Cosine => 4.0,
                Metric::Dot => 2.0 * x * c * d,
                _ => 2.0 * (x + c) * (x + c) * d,
            };
            (farthest * max_weight[b]).min(f64::MAX)
        };
        let bounds: Vec<_> = (0..p.b).map(bound).collect();
        let planes = bounds.iter().map(|&bound| Grid::of_f64(bound, p.n).planes).max().unwrap_or(1);
        let total = Total::new(Tensor::from_vec(bounds, p.b, device)?, p.n, planes)?;
        let weights = weights.filter(|_| settings.weights.is_some()).map(|Weights { max_weight, .. }| {
            let bounds = Bounds { max_abs: max_weight.to_device(device)?, max_weight: None, rows: p.n };
            Accumulator::new([p.k, 1], bounds, terms.planes, device)
        });
        let (sizes, infinite) = (SizesSoFar::new([p.b, p.k], device)?, Tensor::zeros(p.b, DType::F64, device)?);
        Ok(Self { whole, sizes, weights: weights.transpose()?, total, infinite })
    }

    /// Adds the rows of a block, whose labels belong to the centroids.
    pub fn add(&mut self, block: Block<'_>, centroids: &Tensor) -> Result<()> {
        let Whole { settings, p, .. } = self.whole;
        let order = primitives::grouped(block.labels, p.k)?;
        self.sizes.add(&counted_sizes(&order, block.counted)?)?;
        if let (Some(sums), Some(weights)) = (&self.weights, block.weights) {
            let x = Rows::new(&weights.unsqueeze(2)?)?;
            let summands = Summands::from_rows(&x)?;
            let update = Update::new(&x, &summands, Some(Labels::Sorted(&order)), Reduction::Sum, p.k)?;
            primitives::accumulate(&update, sums, &Memory::default())?;
        }
        let costs = costs(block.x, centroids, block.labels, block.weights, settings)?;
        self.infinite = self.infinite.maximum(&costs.gt(f64::MAX)?.max(1)?.to_dtype(DType::F64)?)?;
        self.total.add(&costs, None, &Memory::default())
    }

    /// The counts of all ranks, u32 `(b, k)`, and the weights, f64 `(b, k)`, and inertia, f64 `(b,)`: to the bit those of a fit in
    /// memory, since terms are kept whole.
    pub fn finish(self, feed: &mut dyn Feed) -> Result<(Tensor, Option<Tensor>, Tensor)> {
        let Whole { p, device, weights, .. } = self.whole;
        let counts = self.sizes.gather(feed.ranks())?.concat().into_iter().map(|size| size as u32).collect();
        let counts = Tensor::from_vec(counts, (p.b, p.k), device)?;
        let unit = weights.map(|weights| weights.unit.to_device(device)).transpose()?;
        let of_clusters = match (&self.weights, &unit) {
            (Some(sums), Some(unit)) => {
                feed.ranks().reduce(&sums.sums)?;
                let of_clusters = Tensor::zeros((p.b, p.k, 1), DType::F64, device)?;
                let finish = Finish { sums, reduction: Reduction::Sum, turn: None };
                primitives::finish(&finish, (&of_clusters).into(), &Memory::default())?;
                Some(of_clusters.squeeze(2)?.broadcast_mul(&unit.unsqueeze(1)?)?)
            }
            _ => None,
        };
        let mut totals = self.total.finish(feed, &Memory::default())?.to_vec1::<f64>()?;
        for rank in feed.ranks().gather(self.infinite.to_vec1()?)? {
            totals.iter_mut().zip(rank).filter(|(_, beyond)| *beyond > 0.0).for_each(|(t, _)| *t = f64::INFINITY);
        }
        let totals = Tensor::from_vec(totals, p.b, device)?;
        let inertia = unit.map_or(Ok(totals.clone()), |unit| totals * unit)?;
        Ok((counts, of_clusters, inertia))
    }
}
