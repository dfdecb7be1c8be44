//! The CPU backend: fixed tiles on the threads of `host`, and no N x K matrix.

mod aligned;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
#[path = "no_amx.rs"]
mod amx;
pub(crate) mod assign;
mod attend;
mod attend_coded;
mod bounded;
mod bounds;
mod byte_codes;
mod byte_slices;
mod candidates;
mod clusters;
mod filter;
mod greedy;
mod groups;
mod incremental;
mod kmeanspp;
mod label;
mod label_rounded;
mod lanes;
mod lines;
mod listing;
mod lut;
mod matmul;
mod means;
mod median;
mod nearest;
mod origin;
mod own;
mod packed;
mod pairwise;
mod pairwise_products;
mod parts;
mod product_codes;
mod race;
mod rounded;
mod rows;
mod scalar;
mod seed;
mod skipping;
mod softmax;
mod sort;
mod sorted_1d;
mod spread;
mod spread_filter;
mod spread_pass;
mod sums;
mod tensors;
mod tile;
mod transform;
mod update;

use crate::{
    backend::Backend,
    error::Result,
    memory::Memory,
    metric::Metric,
    operand::{Readable, Target},
    plan::{arch::Arch, sort::Sort},
    request::{
        Accumulator, Assignment, Attention, CodedAttention, Finish, KmeansppBlock, LutMatrix, OnChipFit, Update,
    },
    rng::Draw,
    rows::Rows,
};
use candle_core::{DType, Device, Storage, Tensor};
use tensors::{typed, Element};

/// The host.
pub(crate) struct Cpu;

impl Backend for Cpu {
    fn arch(&self, _: &Device) -> Result<Arch> {
        Ok(Arch::Cpu { amx: amx::Amx::find().is_some() })
    }

    fn allocate(&self, op: &'static str, len: usize, dtype: DType, _: &Device) -> Result<Storage> {
        tensors::allocate(op, len, dtype).map(Storage::Cpu)
    }

    fn zero(&self, to: Target<'_>) -> Result<()> {
        typed!(to.dtype(), T => tensors::write(to, |data: &mut [T]| data.fill(T::narrow(0.0))))
    }

    fn assign_into(&self, a: Assignment<'_>, labels: Target<'_>, _: &Memory) -> Result<()> {
        assign::assign_into(a, labels)
    }

    fn distances(&self, x: &Rows, c: &Rows, labels: &Tensor, metric: Metric) -> Result<Tensor> {
        rows::distances(x, c, labels, metric)
    }

    fn pairwise(&self, x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
        transform::pairwise(x, c, metric)
    }

    fn nearest(&self, x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
        nearest::nearest(x, c, m, metric)
    }

    fn gather(&self, x: &Rows, index: &dyn Readable, to: Target<'_>) -> Result<()> {
        rows::gather(x, index, to)
    }

    fn max_abs_and_first_nonfinite(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        rows::max_abs_and_first_nonfinite(x)
    }

    fn min_magnitude(&self, x: &Rows) -> Result<Tensor> {
        rows::min_magnitude(x)
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

    fn exponential_race_keys(
        &self,
        nearest: &Tensor,
        weights: Option<&Tensor>,
        draw: Draw,
        first: usize,
    ) -> Result<Tensor> {
        seed::exponential_race_keys(nearest, weights, draw, first)
    }

    fn kmeanspp_block(&self, p: &KmeansppBlock<'_>, _: &Memory) -> Result<()> {
        kmeanspp::kmeanspp_block(p)
    }

    fn max_label(&self, labels: &dyn Readable) -> Result<u32> {
        sort::max_label(labels)
    }

    fn order(&self, labels: &dyn Readable, k: usize, _: &Sort, to: Target<'_>) -> Result<()> {
        sort::order(labels, k, to)
    }

    fn update(&self, u: &Update<'_>, centroids: Target<'_>, _: &Memory) -> Result<()> {
        update::update(u, centroids)
    }

    fn accumulate(&self, u: &Update<'_>, to: &Accumulator, _: &Memory) -> Result<()> {
        update::accumulate(u, to)
    }

    fn finish(&self, f: &Finish<'_>, centroids: Target<'_>, _: &Memory) -> Result<()> {
        update::finish(f, centroids)
    }

    fn merge(&self, sums: &Tensor, others: &Tensor) -> Result<()> {
        update::merge(sums, others)
    }

    fn fit_on_chip(&self, fit: &OnChipFit<'_>, _: &Memory) -> Result<bool> {
        sorted_1d::fit(fit)
    }

    fn attends_to_all(&self) -> bool {
        true
    }

    fn byte_codes(&self, x: &Rows) -> Result<Option<(Tensor, Tensor)>> {
        byte_codes::byte_codes(x).map(Some)
    }

    fn attend(&self, a: &Attention<'_>, _: &Memory) -> Result<Option<Tensor>> {
        attend::attend(a)
    }

    fn attend_coded(&self, a: &CodedAttention<'_>, _: &Memory) -> Result<Option<Tensor>> {
        attend_coded::attend_coded(a)
    }

    fn lut_product(&self, x: &Rows, w: &LutMatrix<'_>, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
        lut::product(x, w, bias).map(Some)
    }
}
