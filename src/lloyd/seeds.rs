//! Rows that become centroids: at the start of a run, and where a cluster is empty.

use super::{
    prepared::PreparedFit,
    weights::{directed_rows, finite_rows},
};
use crate::{
    callbacks::Seeding,
    error::Result,
    kmeans::{Init, KMeans},
    metric::Metric,
    primitives,
    rng::Draw,
    rows::Rows,
    seeding::{self, sample_rows},
    spread::{sampled, SAMPLED},
};
use candle_core::Tensor;

impl PreparedFit {
    /// Tells the callback how many seeds there are: whoever has the first problem of a batch, for all who have others.
    fn tell(&self, run: usize, seeds: usize) {
        if self.p.first_problem == 0 {
            self.settings.tell(Seeding { run, seeds, of: self.p.k });
        }
    }

    /// Sets the centroids to those that a run starts from.
    pub(super) fn seed(&self, x: &Rows, run: usize, seed: u64) -> Result<()> {
        let again = match run {
            0 => None,
            _ => self.draw(seed)?,
        };
        let drawn = again.as_ref().or(self.drawn.as_ref());
        let (init, k, metric) = (&self.settings.init, self.p.k, self.p.metric);
        let start = match (init, drawn) {
            (Init::Given(c), _) => seeding::given(c, &self.p)?,
            (_, Some(drawn)) => {
                let weights = self.weights.as_ref().map(|w| &w.values);
                // Other rows are as good as each other, unless they have weights that nothing was drawn by.
                let any = self.settings.check_finite && metric != Metric::Cosine && self.settings.weights.is_none();
                let usable = if any { drawn.clone() } else { primitives::usable_seeds(x, weights, drawn, metric)? };
                primitives::gather(x, &usable)?
            }
            (Init::Auto, _) if self.p.n > SAMPLED && self.settings.lengths.is_none() => {
                self.seeds_of_sample(x, run, seed)?
            }
            _ => {
                let weights = self.weights.as_ref().map(|w| &w.values);
                let draw = Draw { seed, round: 0, first_problem: self.p.first_problem };
                let weights = seed_weights(x, weights, &self.settings)?;
                let watch = |seeds| self.tell(run, seeds);
                // The host waits for no part of a capture.
                let watched = self.settings.on_seed.is_some() && !primitives::capturing(&self.device)?;
                let watch: Option<&dyn Fn(usize)> = watched.then_some(&watch);
                seeding::centroids(init, x, k, weights.as_ref(), metric, draw, watch)?
            }
        };
        primitives::overwrite(&self.centroids, &start)?;
        self.tell(run, k);
        Ok(())
    }

    /// The seeds that a sample of the rows, the same ones of each problem, has by greedy k-means++.
    fn seeds_of_sample(&self, x: &Rows, run: usize, seed: u64) -> Result<Tensor> {
        let (settings, p, metric) = (&self.settings, &self.p, self.p.metric);
        let sample = sample_rows(p.n, sampled(p.n, p.k), seed);
        let sample = Tensor::from_iter(sample.into_iter().map(|row| row as u32), &self.device)?.unsqueeze(0)?;
        let sample = sample.broadcast_as((p.b, sample.dim(1)?))?.contiguous()?;
        let all_weights = self.weights.as_ref().map(|w| &w.values);
        let weights = all_weights.map(|w| w.gather(&sample, 1)).transpose()?;
        let of_sample = primitives::gather(x, &sample)?;
        let of_sample = Rows::new(&of_sample)?;
        let weights = seed_weights(&of_sample, weights.as_ref(), settings)?;
        let draw = Draw { seed, round: 0, first_problem: p.first_problem };
        let watch = |seeds| self.tell(run, seeds);
        let watch: Option<&dyn Fn(usize)> = settings.on_seed.is_some().then_some(&watch);
        let chosen = seeding::rows(&settings.init, &of_sample, p.k, weights.as_ref(), metric, draw, watch)?;
        let chosen = sample.gather(&chosen, 1)?;
        let any = settings.check_finite && metric != Metric::Cosine && settings.weights.is_none();
        // A sample may have too few rows that can be seeds; rows outside of it take the place of the others.
        let chosen = if any { chosen } else { primitives::usable_seeds(x, all_weights, &chosen, metric)? };
        primitives::gather(x, &chosen)
    }
}

/// The weight of each row as a seed, f64 `(b, n)`: -1 where it is not finite or, by cosine, has no direction. None where all
/// weigh the same.
pub(crate) fn seed_weights(x: &Rows, weights: Option<&Tensor>, settings: &KMeans) -> Result<Option<Tensor>> {
    if settings.check_finite && settings.metric != Metric::Cosine {
        return Ok(weights.cloned());
    }
    let usable = match settings.metric {
        Metric::Cosine => directed_rows(x)?,
        _ => finite_rows(x)?,
    };
    // By arithmetic alone: a choice, or a comparison with a number, takes something to the device, where a captured graph
    // would look for it.
    Ok(Some(match weights {
        Some(weights) => {
            primitives::elementwise([weights, &usable], |[w, usable]| (w * usable)? - usable.affine(-1.0, 1.0)?)?
        }
        None => primitives::elementwise([&usable], |[usable]| usable.affine(2.0, -1.0))?,
    }))
}
