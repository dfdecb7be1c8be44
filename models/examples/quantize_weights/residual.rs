//! Weights as sums of entries: residual codes of eight neighbours at a time, as in AQLM (Egiazarian et al. 2024).
//!
//! Entries are the same for all matrices. Each row is divided by a scale, and each column multiplied by how much it counts, which is stored too.
//! Codes are found by a beam search, in turns with least squares of all entries together. With a Hessian they are chosen group by group, with
//! what the errors before add fed back, like those of single weights: GPTVQ (van Baalen et al. 2024).

use crate::methods::{half, By, Matrix};
use anyhow::{Context, Result};
use candle_core::{DType, Tensor};
use candle_flash_kmeans::{
    nn::{Codebook, ResidualQuantizer},
    KMeans,
};
use nalgebra::{Cholesky, DMatrix};

const GROUP: usize = 8;
const ENTRIES: usize = 256;
/// Choices that a search keeps.
const WIDTH: usize = 4;
/// Of searches and least squares, on so many groups of all matrices.
const ROUNDS: usize = 6;
const SAMPLE: usize = 1 << 16;
/// Columns are multiplied by this power of their importance, half of what would make all errors count the same: groups of columns that differ much
/// have entries in few directions (AWQ's default, Lin et al. 2024).
const ROOT: f64 = 0.25;
/// Of the mean of a Hessian's diagonal, added to it.
const DAMPING: f64 = 0.01;

pub struct ResidualCodes {
    entries: ResidualQuantizer,
    by: By,
}

/// A matrix in groups, and what they are multiplied by.
struct Scaled {
    /// (rows, inputs)
    values: Tensor,
    /// (rows, 1)
    rows: Tensor,
    /// (1, inputs)
    columns: Tensor,
}

impl ResidualCodes {
    /// So many stages of 256 entries, and unless it is 0 one of `few`.
    pub fn train(matrices: &[Matrix], stages: usize, few: usize, by: By) -> Result<Self> {
        let all: usize = matrices.iter().map(|matrix| matrix.weight.elem_count() / GROUP).sum();
        let every = all.div_ceil(SAMPLE);
        let sample = matrices.iter().map(|matrix| {
            let groups = scaled(matrix, by)?.values.reshape(((), GROUP))?;
            let some = Tensor::arange_step(0u32, groups.dim(0)? as u32, every as u32, groups.device())?;
            Ok(groups.index_select(&some, 0)?)
        });
        let sample = Tensor::cat(&sample.collect::<Result<Vec<_>>>()?, 0)?;
        let mut entries = ResidualQuantizer::train(&sample, stages, &KMeans::new(ENTRIES).max_iters(15))?;
        if few > 0 {
            let left = (&sample - entries.decode(&entries.encode(&sample)?)?)?;
            let last = Codebook::train(&left, &KMeans::new(few).max_iters(15))?;
            entries = ResidualQuantizer::new([entries.stages(), &[last]].concat())?;
        }
        for _ in 0..ROUNDS {
            let codes = entries.encode_beam(&sample, WIDTH)?;
            entries = entries.refit(&sample, &codes, None)?;
        }
        let stored = |stage: &Codebook| Ok(Codebook::new(&half(stage.centroids())?, stage.metric())?);
        let stages = entries.stages().iter().map(stored).collect::<Result<Vec<_>>>()?;
        Ok(Self { entries: ResidualQuantizer::new(stages)?, by })
    }

    /// What a matrix becomes, and the bits of a weight. Not counted are the entries, which all matrices share: at most 20 kB.
    pub fn quantize(&self, matrix: &Matrix) -> Result<(Tensor, f64)> {
        let Scaled { values, rows, columns } = scaled(matrix, self.by)?;
        let (outputs, inputs) = values.dims2()?;
        let found = match self.by {
            By::Hessian => {
                let both = columns.t()?.matmul(&columns)?;
                self.fed_back(&values, &(matrix.hessian()? * both)?)?
            }
            _ => self.nearest(&values.reshape(((), GROUP))?)?.reshape(values.shape())?,
        };
        let scales = 16.0 / inputs as f64 + if self.by == By::Square { 0.0 } else { 16.0 / outputs as f64 };
        let bits = self.entries.bits_per_value() + scales;
        Ok((found.broadcast_mul(&rows)?.broadcast_mul(&columns)?, bits))
    }

    /// Of the entries themselves.
    pub fn nearest(&self, groups: &Tensor) -> Result<Tensor> {
        Ok(self.entries.decode(&self.entries.encode_beam(groups, WIDTH)?)?)
    }

    /// From the last group to the first each takes over what the errors after it add to its place in the product of all errors with the
    /// factor of the Hessian.
    fn fed_back(&self, values: &Tensor, hessian: &Tensor) -> Result<Tensor> {
        let (outputs, inputs) = values.dims2()?;
        let factor = factor(hessian)?;
        let (mut fed, mut found) = (Tensor::zeros((outputs, inputs), DType::F32, values.device())?, vec![]);
        for first in (0..inputs).step_by(GROUP).rev() {
            let own = |t: &Tensor| t.narrow(1, first, GROUP);
            let corner = factor.view((first, first), (GROUP, GROUP)).lower_triangle();
            let inverse = corner.try_inverse().context("a factor without an inverse")?;
            let inverse = Tensor::new(rows(&inverse), values.device())?;
            let exact = own(values)?.contiguous()?;
            let target = (&exact + own(&fed)?.contiguous()?.matmul(&inverse)?)?;
            let nearest = self.nearest(&target)?;
            if first > 0 {
                let row = Tensor::new(rows(&factor.view((first, 0), (GROUP, first)).into_owned()), values.device())?;
                fed = (fed.narrow(1, 0, first)? + (exact - &nearest)?.matmul(&row)?)?;
            }
            found.push(nearest);
        }
        found.reverse();
        Ok(Tensor::cat(&found, 1)?)
    }
}

/// The lower triangular factor of a Hessian.
fn factor(hessian: &Tensor) -> Result<DMatrix<f64>> {
    let n = hessian.dim(0)?;
    let values = hessian.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    let mut matrix = DMatrix::from_row_slice(n, n, &values);
    let damping = DAMPING * matrix.trace() / n as f64;
    (0..n).for_each(|c| matrix[(c, c)] += damping);
    Ok(Cholesky::new(matrix).context("a Hessian that is not positive definite")?.l())
}

fn rows(matrix: &DMatrix<f64>) -> Vec<Vec<f32>> {
    matrix.row_iter().map(|row| row.iter().map(|v| *v as f32).collect()).collect()
}

/// Rows of length 1 in the mean square, in whose columns errors count less differently.
fn scaled(matrix: &Matrix, by: By) -> Result<Scaled> {
    let (_, inputs) = matrix.weight.dims2()?;
    let columns = match by {
        By::Square => Tensor::ones((1, inputs), DType::F32, matrix.weight.device())?,
        By::Importance | By::Hessian => {
            let importance = matrix.importance()?;
            let mean = importance.mean_all()?;
            let share = (importance.broadcast_div(&mean)? + DAMPING)?;
            half(&share.powf(-ROOT)?.unsqueeze(0)?)?
        }
    };
    let values = matrix.weight.broadcast_div(&columns)?;
    let rows = half(&values.sqr()?.mean_keepdim(1)?.sqrt()?)?.maximum(f32::MIN_POSITIVE)?;
    Ok(Scaled { values: values.broadcast_div(&rows)?, rows, columns })
}
