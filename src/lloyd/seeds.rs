//! Rows that become centroids: at the start of a run, and where a cluster is empty.

use super::{
    prepared::{PreparedFit, RUNNING},
    terms::{directed_rows, finite_rows},
};
use crate::{error::Result, kmeans::Init, metric::Metric, primitives, request::Order, rows::Rows, seeding};
use candle_core::Tensor;

impl PreparedFit {
    /// Sets the centroids to those that a run starts from.
    pub(super) fn seed(&self, x: &Rows, run: usize, seed: u64) -> Result<()> {
        let again = match run {
            0 => None,
            _ => self.draw(seed)?,
        };
        let drawn = again.as_ref().or(self.drawn.as_ref());
        let (init, k, metric) = (&self.settings.init, self.p.k, self.p.metric);
        let start = match (init, drawn) {
            (Init::Given(c), _) => seeding::given(c, x, k)?,
            (_, Some(drawn)) => {
                let weights = self.weights.as_ref().map(|w| &w.values);
                // Other rows are as good as each other, unless they have weights that nothing was drawn by.
                let any = self.settings.check_finite && metric != Metric::Cosine && self.settings.weights.is_none();
                let usable = if any { drawn.clone() } else { primitives::usable_seeds(x, weights, drawn, metric)? };
                primitives::gather(x, &usable)?
            }
            _ => seeding::centroids(init, x, k, self.seed_weights(x)?.as_ref(), metric, seed)?,
        };
        primitives::overwrite(&self.centroids, &start)
    }

    /// What each row weighs as a seed, f64 `(b, n)`: -1 where it is not finite or, by cosine, has no direction. None where all
    /// weigh the same.
    fn seed_weights(&self, x: &Rows) -> Result<Option<Tensor>> {
        let weights = self.weights.as_ref().map(|w| w.values.clone());
        if self.settings.check_finite && self.p.metric != Metric::Cosine {
            return Ok(weights);
        }
        let usable = match self.p.metric {
            Metric::Cosine => directed_rows(x)?,
            _ => finite_rows(x)?,
        };
        // By arithmetic alone: a choice, or a comparison with a number, takes something to the device, where a captured graph
        // would look for it.
        Ok(Some(match weights {
            Some(weights) => {
                primitives::elementwise([&weights, &usable], |[w, usable]| (w * usable)? - usable.affine(-1.0, 1.0)?)?
            }
            None => primitives::elementwise([&usable], |[usable]| usable.affine(2.0, -1.0))?,
        }))
    }

    /// Gives every empty cluster one of the rows farthest from their centroids. The order of the labels where none is empty, so
    /// that they stay.
    pub(super) fn relocate(&self, x: &Rows, centroids: &Rows) -> Result<Option<Order>> {
        let order = primitives::order(&self.labels, self.p.k)?;
        let sizes = self.sizes(&order)?.to_vec2::<u32>()?;
        let stop = self.progress.stop.to_vec1::<u32>()?;
        let lacking = |b: usize| stop[b] == RUNNING && sizes[b].contains(&0);
        if !(0..x.b).any(lacking) {
            return Ok(Some(order));
        }
        drop(order);
        let distances = primitives::distances(x, centroids, &self.labels, self.p.metric)?.to_vec2::<f64>()?;
        let weights = self.seed_weights(x)?.map(|w| w.to_vec2::<f64>()).transpose()?;
        let mut rows = self.labels.to_vec2::<u32>()?;
        for b in (0..x.b).filter(|&b| lacking(b)) {
            let (mut size, far, labels) = (sizes[b].clone(), &distances[b], &mut rows[b]);
            // A row on its centroid has nowhere better to be, and one of no weight moves no centroid.
            let movable = |&i: &usize| {
                let away = far[i] > 0.0 || self.p.metric == Metric::Dot && !far[i].is_nan();
                away && weights.as_ref().is_none_or(|weights| weights[b][i] > 0.0)
            };
            let mut farthest: Vec<usize> = (0..self.rows(b)).filter(movable).collect();
            farthest.sort_unstable_by(|&i, &j| far[j].total_cmp(&far[i]).then(i.cmp(&j)));
            let mut farthest = farthest.into_iter();
            for cluster in (0..self.p.k).filter(|&j| sizes[b][j] == 0) {
                // A cluster's last row would leave it empty.
                let Some(i) = farthest.find(|&i| size[labels[i] as usize] > 1) else { break };
                size[labels[i] as usize] -= 1;
                size[cluster] += 1;
                labels[i] = cluster as u32;
            }
        }
        primitives::overwrite(&self.labels, &Tensor::from_vec(rows.concat(), (x.b, x.n), &self.device)?)?;
        Ok(None)
    }
}
