//! Rotations of rows before they are cut into pieces.

use super::quantizer::wide;
use crate::{
    error::{Error, Result},
    host,
    kmeans::KMeans,
    row_weights,
    running_means::check_centroids,
};
use candle_core::{DType, Tensor};
use nalgebra::{DMatrix, SymmetricEigen};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What rows are multiplied by before they are cut into pieces, an orthogonal matrix, so that distances stay as they are.
#[derive(Clone, Debug, Default)]
pub enum Rotation {
    /// Nothing: pieces are neighbouring columns.
    #[default]
    None,
    /// A random one, uniform among all, by a seed: the QR factor of normal numbers (Stewart 1980). Pieces have about the same variance then.
    Random {
        /// The seed.
        seed: u64,
    },
    /// The principal components of the rows that count, in the order of their variance dealt to the pieces in turn, so that each piece has large
    /// and small ones: near the parametric start of optimised product quantisation (Ge et al. 2013). Of a batch each problem has its own. The
    /// covariance is computed on the device, in f64, and its eigenvectors on the host.
    Pca,
    /// This one, `(d, d)` or `(..batch, d, d)`: a row `x` becomes `x R`.
    Given(Tensor),
}

/// How a [`ProductQuantizer`](crate::nn::ProductQuantizer) is trained.
#[derive(Clone, Debug)]
pub struct ProductConfig {
    /// Pieces of a row.
    pub pieces: usize,
    /// What is done to rows before they are cut.
    pub rotation: Rotation,
    /// Whether all pieces have the same codebook, of all of them.
    pub shared: bool,
}

impl ProductConfig {
    /// So many pieces of rows as they are, each with a codebook of its own.
    pub fn new(pieces: usize) -> Self {
        Self { pieces, rotation: Rotation::None, shared: false }
    }
}

/// Steps that an eigenproblem takes for each cube of its size.
const EIGEN_STEPS: usize = 10;
/// Products of the columns of a given matrix, in f32, are at most so far from those of an orthogonal one.
const ORTHOGONAL: f64 = 1e-3;

impl Rotation {
    /// The matrix for the pieces of rows `x` `(..batch, n, d)`, `(d, d)` or `(..batch, d, d)`, in f32, or f64 for such rows.
    pub(in crate::nn) fn matrix(&self, x: &Tensor, pieces: usize, kmeans: &KMeans) -> Result<Option<Tensor>> {
        let (dims, d) = (x.dims(), x.dims()[x.rank() - 1]);
        let batch = &dims[..x.rank() - 2];
        let matrix = match self {
            Self::None => return Ok(None),
            Self::Random { seed } => Tensor::from_vec(random(d, *seed), (d, d), x.device())?,
            Self::Pca => {
                let covariances = covariances(x, kmeans)?.to_vec3::<f64>()?;
                let components = |b: usize| principal(&covariances[b].concat(), d, pieces);
                let all = host::map("pca", covariances.len(), EIGEN_STEPS * d * d * d, components)?;
                Tensor::from_vec(all.concat(), [batch, &[d, d]].concat(), x.device())?
            }
            Self::Given(matrix) => {
                check_rotation(matrix, batch, d)?;
                host::to_device(&matrix.detach(), x.device())?.force_contiguous()?
            }
        };
        Ok(Some(matrix.to_dtype(wide(x.dtype()))?))
    }
}

/// Checks that a matrix is orthogonal and for such rows. The host waits for its values.
pub(in crate::nn) fn check_rotation(matrix: &Tensor, batch: &[usize], d: usize) -> Result<()> {
    check_centroids(matrix)?;
    let expected = [if matrix.rank() > 2 { batch } else { &[] }, &[d, d]].concat();
    if matrix.dims() != expected {
        return Err(Error::Shape { argument: "rotation", got: matrix.dims().to_vec(), expected });
    }
    let all = matrix.detach().to_dtype(DType::F64)?.reshape(((), d, d))?.force_contiguous()?;
    let unit = Tensor::eye(d, DType::F64, matrix.device())?;
    let off = all.transpose(1, 2)?.contiguous()?.matmul(&all)?.broadcast_sub(&unit)?.abs()?.max_all()?;
    let got = off.to_scalar::<f64>()?;
    if got > ORTHOGONAL {
        let expected = "within 0.001, as the products of the columns of an orthogonal matrix are of 0 and 1";
        return Err(Error::Value { argument: "rotation", got, expected });
    }
    Ok(())
}

/// `x` `(..batch, n, d)` times a matrix, or times its transpose.
pub(in crate::nn) fn rotated(x: &Tensor, matrix: &Tensor, back: bool) -> Result<Tensor> {
    let matrix = if back { matrix.t()?.contiguous()? } else { matrix.clone() };
    let rows = x.to_dtype(matrix.dtype())?;
    let rows = match matrix.rank() {
        2 => rows.reshape(((), matrix.dim(0)?))?.matmul(&matrix)?.reshape(x.shape())?,
        _ => rows.contiguous()?.matmul(&matrix)?,
    };
    Ok(rows.to_dtype(x.dtype())?)
}

fn random(d: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    // By Box and Muller (1958).
    let normal =
        || (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * (std::f64::consts::TAU * rng.random::<f64>()).cos();
    let (q, r) = DMatrix::from_iterator(d, d, std::iter::repeat_with(normal).take(d * d)).qr().unpack();
    // Without these signs some rotations are likelier than others.
    let column = |j: usize| q.column(j) * r[(j, j)].signum();
    (0..d).flat_map(|j| column(j).iter().copied().collect::<Vec<_>>()).collect()
}

/// The covariances of the rows that count, f64 `(b, d, d)`.
fn covariances(x: &Tensor, kmeans: &KMeans) -> Result<Tensor> {
    let (d, weights) = (x.dims()[x.rank() - 1], row_weights::weights_of(x, kmeans)?);
    let (b, n) = weights.dims2()?;
    let rows = x.detach().to_dtype(DType::F64)?.reshape((b, n, d))?;
    let weights = weights.unsqueeze(2)?;
    let counts = weights.gt(0.0)?.broadcast_as(rows.shape())?;
    let rows = counts.where_cond(&rows, &rows.zeros_like()?)?;
    let total = row_weights::or_one(&weights.sum_keepdim(1)?)?;
    let share = weights.broadcast_div(&total)?;
    let centred = rows.broadcast_sub(&rows.broadcast_mul(&share)?.sum_keepdim(1)?)?;
    Ok(centred.broadcast_mul(&share)?.transpose(1, 2)?.contiguous()?.matmul(&centred)?)
}

/// The eigenvectors of a covariance as the columns of a matrix, row by row: in the order of their eigenvalues, the largest first, dealt to
/// pieces in turn.
fn principal(covariance: &[f64], d: usize, pieces: usize) -> Vec<f64> {
    let eigen = SymmetricEigen::new(DMatrix::from_row_slice(d, d, covariance));
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|&a, &b| eigen.eigenvalues[b].total_cmp(&eigen.eigenvalues[a]));
    let mut matrix = vec![0.0; d * d];
    for (place, component) in order.into_iter().enumerate() {
        let column = place % pieces * (d / pieces) + place / pieces;
        let vector = eigen.eigenvectors.column(component);
        // Of the two directions of a component, that of its largest value.
        let sign = vector[vector.iamax()].signum();
        vector.iter().enumerate().for_each(|(row, v)| matrix[row * d + column] = sign * v);
    }
    matrix
}
