//! The start of a fit of a stream.

use super::{reads::read_rows, source::Source};
use crate::{
    callbacks::Seeding,
    error::Result,
    fit::refuse_non_finite,
    kmeans::{Init, KMeans},
    lloyd::{seeds::seed_weights, weights::Weights},
    metric::Metric,
    primitives,
    problem::Problem,
    rng::Draw,
    rows::Rows,
    seeding::{self, sample_rows},
    spread::sampled,
};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// Rows that are looked through at a time for one that can be a seed, at most.
const LOOKED_THROUGH: usize = 4096;

/// The rows and settings that the start of a fit is drawn from.
pub(super) struct Seeds<'a> {
    pub settings: &'a KMeans,
    pub p: &'a Problem,
    pub source: &'a Source<'a>,
    /// On the CPU.
    pub weights: Option<&'a Weights>,
    pub device: &'a Device,
}

impl Seeds<'_> {
    /// The centroids, `(1, k, d)`, of a run.
    pub fn centroids(&self, run: usize) -> Result<Tensor> {
        let centroids = self.choose(run)?;
        self.settings.tell(Seeding { run, seeds: self.p.k, of: self.p.k });
        Ok(centroids)
    }

    fn choose(&self, run: usize) -> Result<Tensor> {
        let Self { settings: KMeans { init, seed, metric, .. }, p, .. } = *self;
        let seed = seed.wrapping_add(run as u64);
        if let Init::Given(c) = init {
            let c = c.detach();
            if self.settings.check_finite {
                refuse_non_finite("init", &primitives::max_abs_and_first_nonfinite(&Rows::new(&c)?)?.1)?;
            }
            return seeding::given(&c, p);
        }
        let drawn = seeding::draw(init, p, |_| p.n, self.weights.is_some(), seed, &Device::Cpu)?;
        if let Some(drawn) = drawn {
            let drawn = drawn.flatten_all()?.to_vec1::<u32>()?.into_iter().map(|row| row as usize).collect();
            return self.gather(self.usable(drawn)?);
        }
        let sample = sample_rows(p.n, sampled(p.n, p.k), seed);
        let x = read_rows(self.source, &sample)?.unsqueeze(0)?.to_device(self.device)?;
        let weights = match self.weights {
            Some(Weights { values, .. }) => {
                let rows = Tensor::from_iter(sample.iter().map(|&row| row as u32), &Device::Cpu)?;
                Some(values.index_select(&rows, 1)?.to_device(self.device)?)
            }
            None => None,
        };
        let x = Rows::new(&x)?;
        let weights = seed_weights(&x, weights.as_ref(), self.settings)?;
        let draw = Draw { seed, round: 0, first_problem: 0 };
        let watch = |seeds| self.settings.tell(Seeding { run, seeds, of: p.k });
        let watch: Option<&dyn Fn(usize)> = self.settings.on_seed.is_some().then_some(&watch);
        if matches!(init, Init::Optimal | Init::KMeansParallel) {
            return seeding::centroids(init, &x, p.k, weights.as_ref(), *metric, draw, watch);
        }
        let chosen = seeding::rows(init, &x, p.k, weights.as_ref(), *metric, draw, watch)?;
        if sample.len() == p.n {
            return primitives::gather(&x, &chosen);
        }
        // A sample may have too few rows that can be seeds; rows outside of it take the place of the others.
        let chosen = chosen.flatten_all()?.to_vec1::<u32>()?.into_iter().map(|at| sample[at as usize]).collect();
        self.gather(self.usable(chosen)?)
    }

    /// These rows, `(1, rows, d)`.
    fn gather(&self, rows: Vec<usize>) -> Result<Tensor> {
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let read = read_rows(self.source, &sorted)?;
        let at = rows.iter().map(|row| sorted.partition_point(|other| other < row) as u32);
        Ok(read.index_select(&Tensor::from_iter(at, &Device::Cpu)?, 0)?.unsqueeze(0)?.to_device(self.device)?)
    }

    /// The drawn rows after [`primitives::usable_seeds`], which sees all rows.
    fn usable(&self, mut drawn: Vec<usize>) -> Result<Vec<usize>> {
        if self.settings.check_finite && self.settings.metric != Metric::Cosine && self.weights.is_none() {
            return Ok(drawn);
        }
        for seed in 0..drawn.len() {
            let from = drawn[seed];
            let found = match self.first_usable(from..self.p.n, from, &drawn)? {
                None => self.first_usable(0..from, from, &drawn)?,
                found => found,
            };
            drawn[seed] = found.unwrap_or(from);
        }
        Ok(drawn)
    }

    /// The first of `rows` that can be a seed in the place of `from`.
    fn first_usable(&self, rows: Range<usize>, from: usize, drawn: &[usize]) -> Result<Option<usize>> {
        let (mut first, mut count) = (rows.start, 1);
        while first < rows.end {
            let rows = first..rows.end.min(first + count);
            let x = read_rows(self.source, &rows.clone().collect::<Vec<_>>())?.unsqueeze(0)?;
            let weights = self.weights.map(|w| w.values.narrow(1, first, rows.len())).transpose()?;
            let weights = seed_weights(&Rows::new(&x)?, weights.as_ref(), self.settings)?;
            let weights = weights.map(|w| w.flatten_all()?.to_vec1::<f64>()).transpose()?;
            let weighs = |row: usize| weights.as_ref().is_none_or(|weights| weights[row - first] > 0.0);
            if let Some(row) = rows.clone().find(|&row| weighs(row) && (row == from || !drawn.contains(&row))) {
                return Ok(Some(row));
            }
            (first, count) = (rows.end, (count * 8).min(LOOKED_THROUGH));
        }
        Ok(None)
    }
}
