//! Entries of all stages of a residual quantiser at once.

use super::{
    codes::{check_float_columns, check_places, checked_codes},
    Codebook, ResidualQuantizer,
};
use crate::{
    error::{Error, Result},
    host,
    problem::{check_device, check_dtype},
};
use candle_core::{DType, Device, Tensor};
use nalgebra::{Cholesky, DMatrix};

/// Of the mean weight of an entry, what each entry weighs where it is now: entries that no code names stay, and of the many choices of
/// entries that are equally good, for what one stage adds another can take away, it is one near the old ones.
const STAY: f64 = 1e-6;

impl ResidualQuantizer {
    /// The entries of all stages that are best for these codes together, by least squares, as in additive quantisation (Babenko and
    /// Lempitsky 2014) and AQLM (Egiazarian et al. 2024): with `codes`, u32 or u8 `(..batch, n, stages)`, of the rows of `x` `(..batch, n, d)`, no
    /// entries leave less over but for a millionth of the weight of an entry, which holds each of them where it is, and rounding. The squares
    /// that are left over never become more. `weights` `(..batch, n)` are what the rows count: what is not a finite number above 0 counts for
    /// nothing, and neither do rows of which what is left over is not finite. In turns with [`encode_beam`](Self::encode_beam) it trains the quantiser.
    ///
    /// Entries are found on the host, in f64, in time that grows with the rows by the square of the stages, and with the cube of the
    /// number of all entries.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{nn::ResidualQuantizer, KMeans};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (300, 4), &Device::Cpu)?;
    /// let stages = ResidualQuantizer::train(&x, 2, &KMeans::new(8))?;
    /// let codes = stages.encode(&x)?;
    /// let better = stages.refit(&x, &codes, None)?;
    /// let off = |stages: &ResidualQuantizer| (stages.decode(&codes)? - &x)?.sqr()?.sum_all()?.to_scalar::<f32>();
    /// assert!(off(&better)? < off(&stages)?);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// Refuses shapes, dtypes and devices that do not fit together, codes of no entry, stages of another metric than the squared
    /// Euclidean distance, and what would move an entry beyond its dtype.
    pub fn refit(&self, x: &Tensor, codes: &Tensor, weights: Option<&Tensor>) -> Result<Self> {
        self.check_squares("least squares")?;
        let first = &self.stages()[0].centroids;
        check_float_columns(x, self.d())?;
        check_dtype("x", x, first.dtype())?;
        check_device("x", x, first.device())?;
        check_places(codes, self.stages().len())?;
        let codes = checked_codes(codes, first)?;
        let rows = &x.dims()[..x.rank() - 1];
        if codes.dims()[..codes.rank() - 1] != *rows {
            let expected = [rows, &[self.stages().len()]].concat();
            return Err(Error::Shape { argument: "codes", got: codes.dims().to_vec(), expected });
        }
        if let Some(weights) = weights.filter(|weights| weights.dims() != rows) {
            return Err(Error::Shape { argument: "weights", got: weights.dims().to_vec(), expected: rows.to_vec() });
        }
        let batch = &first.dims()[..first.rank() - 2];
        if !batch.is_empty() && rows[..rows.len() - 1] != *batch {
            let expected = [batch, &rows[rows.len() - 1..], &[self.d()]].concat();
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        if x.elem_count() == 0 || first.elem_count() == 0 {
            return Ok(self.clone());
        }

        let problems = batch.iter().product::<usize>();
        let (x, codes) = (on_host(x)?, codes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u32>()?);
        let weights = weights.map(on_host).transpose()?;
        let before = self.stages().iter().map(|stage| on_host(&stage.centroids)).collect::<Result<Vec<_>>>()?;
        let n = codes.len() / self.stages().len() / problems;
        let sizes: Vec<usize> = self.stages().iter().map(Codebook::k).collect();
        let problem = |b: usize| {
            Problem {
                x: &x[b * n * self.d()..][..n * self.d()],
                codes: &codes[b * n * sizes.len()..][..n * sizes.len()],
                weights: weights.as_ref().map(|w| &w[b * n..][..n]),
                before: before
                    .iter()
                    .zip(&sizes)
                    .flat_map(|(all, k)| &all[b * k * self.d()..][..k * self.d()])
                    .collect(),
                sizes: &sizes,
                d: self.d(),
            }
            .solve()
        };
        let all: usize = sizes.iter().sum();
        let found =
            host::map("refit", problems, n * sizes.len() * (sizes.len() + self.d()) + all * all * all, problem)?;
        let found = found.into_iter().collect::<Result<Vec<_>>>()?;

        let mut from = 0;
        let stages = self.stages().iter().zip(&sizes).map(|(stage, k)| {
            let own = from..from + k * self.d();
            from = own.end;
            let entries: Vec<f64> = found.iter().flat_map(|entries| entries[own.clone()].iter().copied()).collect();
            let entries = Tensor::from_vec(entries, stage.centroids.shape(), &Device::Cpu)?.to_dtype(first.dtype())?;
            Codebook::new(&host::to_device(&entries, first.device())?, stage.metric)
        });
        Self::new(stages.collect::<Result<Vec<_>>>()?)
    }
}

/// Rows that share codebooks.
struct Problem<'a> {
    /// `(n, d)`
    x: &'a [f64],
    /// `(n, stages)`
    codes: &'a [u32],
    weights: Option<&'a [f64]>,
    /// The entries of all stages, one after the other.
    before: Vec<&'a f64>,
    sizes: &'a [usize],
    d: usize,
}

impl Problem<'_> {
    /// The best entries: the old ones and a correction, by the normal equations of what is left over.
    fn solve(self) -> Result<Vec<f64>> {
        let Self { x, codes, weights, before, sizes, d } = self;
        let firsts: Vec<usize> = sizes.iter().scan(0, |at, k| Some(std::mem::replace(at, *at + k))).collect();
        let all: usize = sizes.iter().sum();
        let zeros = |columns: usize| {
            Ok::<_, Error>(DMatrix::from_vec(all, columns, host::filled("refit", all.saturating_mul(columns), 0.0)?))
        };
        let (mut normal, mut right) = (zeros(all)?, zeros(d)?);
        // As shares of the largest weight and of the rows no sum of them is beyond an f64.
        let counting = |w: &f64| *w > 0.0 && w.is_finite();
        let largest = weights.map_or(1.0, |w| w.iter().copied().filter(counting).fold(0.0, f64::max));
        let rows = (codes.len() / sizes.len()) as f64;
        let (mut left, mut named) = (vec![0.0; d], vec![0; sizes.len()]);
        for (i, (row, codes)) in x.chunks_exact(d).zip(codes.chunks_exact(sizes.len())).enumerate() {
            for (((named, &code), first), &k) in named.iter_mut().zip(codes).zip(&firsts).zip(sizes) {
                if code as usize >= k {
                    return Err(Error::Range { argument: "codes", got: code as usize, min: 0, max: k - 1 });
                }
                *named = first + code as usize;
            }
            let weight = weights.map_or(1.0, |w| w[i]);
            for (c, (left, value)) in left.iter_mut().zip(row).enumerate() {
                *left = value - named.iter().map(|entry| *before[entry * d + c]).sum::<f64>();
            }
            if !counting(&weight) || !left.iter().all(|left| left.is_finite()) {
                continue;
            }
            let weight = weight / largest / rows;
            for &a in &named {
                named.iter().for_each(|&b| normal[(a, b)] += weight);
                left.iter().enumerate().for_each(|(c, left)| right[(a, c)] += weight * left);
            }
        }
        let stay = STAY * normal.trace() / all as f64;
        (0..all).for_each(|entry| normal[(entry, entry)] += stay);
        // Where no row counts there is no factor, and nothing changes.
        let change = Cholesky::new(normal).map(|factor| factor.solve(&right));
        let changed = |at: usize| change.as_ref().map_or(0.0, |change| change[(at / d, at % d)]);
        Ok(before.iter().enumerate().map(|(at, value)| **value + changed(at)).collect())
    }
}

fn on_host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.detach().to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
