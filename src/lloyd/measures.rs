//! What a watched iteration has come to: the inertia that it began with, and how far its centroids have moved.

use super::{
    feed::Block,
    weights::{costs, Weights},
};
use crate::{error::Result, kmeans::KMeans, metric::Metric, primitives, ranks::Ranks, rows::Rows};
use candle_core::Tensor;

pub(super) struct Measures<'a> {
    settings: &'a KMeans,
    /// What the weights of blocks are in units of, for each problem.
    units: Option<Vec<f64>>,
    /// The centroids that the iteration began with.
    before: Tensor,
    /// The weighted distances to these in total, of the blocks so far.
    inertia: f64,
}

impl<'a> Measures<'a> {
    pub fn begin(settings: &'a KMeans, weights: Option<&Weights>, centroids: &Tensor) -> Result<Self> {
        let units = weights.map(|weights| weights.unit.to_vec1::<f64>()).transpose()?;
        Ok(Self { settings, units, before: centroids.copy()?, inertia: 0.0 })
    }

    /// Adds a block, whose labels are those by the centroids before.
    pub fn add(&mut self, block: &Block<'_>) -> Result<()> {
        let costs = costs(block.x, &self.before, block.labels, block.weights, self.settings)?;
        let totals = primitives::total(&costs)?.to_vec1::<f64>()?;
        let unit = |problem: usize| self.units.as_ref().map_or(1.0, |units| units[problem]);
        self.inertia += totals.iter().enumerate().map(|(problem, total)| total * unit(problem)).sum::<f64>();
        Ok(())
    }

    /// The inertia of all ranks' rows and problems, and the largest distance that a centroid has moved.
    pub fn finish(self, centroids: &Tensor, all: [&dyn Ranks; 2]) -> Result<[f64; 2]> {
        let (b, k, _) = centroids.dims3()?;
        let each = Tensor::arange(0, k as u32, centroids.device())?.broadcast_as((b, k))?.contiguous()?;
        let (now, before) = (Rows::new(centroids)?, Rows::new(&self.before)?);
        let moved = primitives::distances(&now, &before, &each, Metric::SquaredEuclidean)?;
        let moved = moved.flatten_all()?.to_vec1::<f64>()?;
        let mut measured = [self.inertia, moved.into_iter().fold(0.0, f64::max).sqrt()];
        for ranks in all {
            let of_ranks = ranks.gather(measured.to_vec())?;
            measured[0] = of_ranks.iter().map(|of_rank| of_rank[0]).sum();
            measured[1] = of_ranks.iter().map(|of_rank| of_rank[1]).fold(0.0, f64::max);
        }
        Ok(measured)
    }
}
