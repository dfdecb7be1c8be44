//! The CPU backend: fixed tiles on the threads of `host`, and no N x K matrix.

pub(crate) mod assign;
mod candidates;
mod filter;
mod median;
mod rows;
mod scalar;
mod seed;
mod sort;
mod sorted_1d;
mod tensors;
mod update;

use crate::{
    backend::Backend,
    error::Result,
    memory::Memory,
    metric::Metric,
    plan::arch::Arch,
    request::{Assignment, KmeansppStep, OnChipFit, Update},
    rng::Draw,
    rows::Rows,
};
use candle_core::{Device, Tensor};

/// The host.
pub(crate) struct Cpu;

impl Backend for Cpu {
    fn arch(&self, _: &Device) -> Result<Arch> {
        Ok(Arch::Cpu)
    }

    fn assign(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
        assign::assign(x, c, metric)
    }

    fn assign_into(&self, a: Assignment<'_>, labels: &Tensor, _: &Memory) -> Result<()> {
        assign::assign_into(a, labels)
    }

    fn distances(&self, x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
        rows::distances(x, c, labels, metric)
    }

    fn pairwise(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
        rows::pairwise(x, c, metric)
    }

    fn gather(&self, x: &Rows, index: &Tensor) -> Result<Tensor> {
        rows::gather(x, index)
    }

    fn max_abs_and_first_nonfinite(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        rows::max_abs_and_first_nonfinite(x)
    }

    fn norms(&self, x: &Rows) -> Result<Tensor> {
        rows::norms(x)
    }

    fn usable_seeds(&self, x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::usable_seeds(x, weights, chosen, metric)
    }

    fn min_distance_with(&self, x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::min_distance_with(x, nearest, newest, metric)
    }

    fn exponential_race_keys(&self, nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
        seed::exponential_race_keys(nearest, weights, draw)
    }

    fn kmeanspp_step(&self, p: &KmeansppStep<'_>, _: &Memory) -> Result<()> {
        seed::kmeanspp_step(p)
    }

    fn order(&self, labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
        sort::order(labels, k)
    }

    fn update(&self, u: &Update<'_>, _: &Memory) -> Result<()> {
        update::update(u)
    }

    fn fit_on_chip(&self, fit: &OnChipFit<'_>, _: &Memory) -> Result<bool> {
        sorted_1d::fit(fit)
    }
}
