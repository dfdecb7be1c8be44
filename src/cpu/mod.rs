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
    request::{Assignment, OnChipFit, Pick, Update},
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

    fn labels(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
        assign::labels(x, c, metric)
    }

    fn relabel(&self, a: Assignment<'_>, labels: &Tensor, _: &Memory) -> Result<()> {
        assign::relabel(a, labels)
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

    fn scan(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        rows::scan(x)
    }

    fn norms(&self, x: &Rows) -> Result<Tensor> {
        rows::norms(x)
    }

    fn usable_seeds(&self, x: &Rows, weights: Option<&Tensor>, chosen: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::usable_seeds(x, weights, chosen, metric)
    }

    fn nearer(&self, x: &Rows, nearest: &Tensor, newest: &Tensor, metric: Metric) -> Result<Tensor> {
        seed::nearer(x, nearest, newest, metric)
    }

    fn race(&self, nearest: &Tensor, weights: Option<&Tensor>, draw: Draw) -> Result<Tensor> {
        seed::race(nearest, weights, draw)
    }

    fn pick(&self, p: &Pick<'_>, _: &Memory) -> Result<()> {
        seed::pick(p)
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
