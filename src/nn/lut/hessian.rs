//! Codes whose errors make up for each other in what a layer puts out.
//!
//! With the second moments `H` of what a layer reads, an output with the errors `e` is off by `e H e^T` in the mean square. Codes are first
//! chosen column by column, with what the errors before add fed back: GPTQ (Frantar et al. 2022), or LDLQ (Chee et al. 2023), which are both
//! Babai's nearest plane (1986). With `H = L L^T` the square is that of `e L`, whose place `j` is
//! `L_jj (e_j + sum of e_i L_ij / L_jj over i > j)`, so that columns are taken from the last to the first. Then come rounds, of which no part
//! makes it more but for rounding: levels and scales by least squares, and each code as the best one for all the others (coordinate descent,
//! Behdin et al. 2023, "QuantEase").

use super::{
    fit::{as_f16, Output, OP},
    Granularity, LutConfig,
};
use crate::{
    error::{Error, Result},
    host,
};
use candle_core::{Device, Tensor};
use nalgebra::{Cholesky, DMatrix, DVector};

/// Of the mean of the diagonal, added to it, as in GPTQ: columns that a calibration says nothing of count that much.
const DAMPING: f64 = 0.01;
/// Of the largest on the diagonal of a least squares problem, added to it: parameters that nothing depends on stay.
const STAY: f64 = 1e-6;
/// Outputs that are met at once.
const AT_ONCE: usize = 1024;

/// The second moments of what a layer reads, damped.
pub(super) struct Hessian {
    n: usize,
    /// `(n, n)`
    matrix: Tensor,
    rows: Vec<f32>,
    /// The lower triangular factor of the matrix in this order of columns: those that count most come last, and get their codes first.
    factor: Vec<f32>,
    order: Vec<usize>,
}

impl Hessian {
    /// Of finite numbers `(n, n)`, of which the lower triangle is read.
    pub fn new(mut values: Vec<f32>, n: usize) -> Result<Self> {
        for (i, j) in (0..n).flat_map(|i| (0..i).map(move |j| (i, j))) {
            values[j * n + i] = values[i * n + j];
        }
        let trace: f64 = (0..n).map(|c| f64::from(values[c * n + c])).sum();
        let damping = if trace > 0.0 { DAMPING * trace / n as f64 } else { 1.0 };
        (0..n).for_each(|c| values[c * n + c] += damping as f32);
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|&a, &b| values[a * n + a].total_cmp(&values[b * n + b]).then(b.cmp(&a)));
        let ordered = DMatrix::from_fn(n, n, |i, j| f64::from(values[order[i] * n + order[j]]));
        let Some(factor) = Cholesky::new(ordered) else {
            let least = (0..n).map(|c| f64::from(values[c * n + c])).fold(f64::INFINITY, f64::min);
            let expected = "part of a positive semidefinite matrix, as second moments are";
            return Err(Error::Value { argument: "hessian", got: least, expected });
        };
        let factor = factor.l_dirty();
        let mut lower = host::filled(OP, n * n, 0f32)?;
        lower.chunks_exact_mut(n).enumerate().for_each(|(i, row)| {
            row[..=i].iter_mut().enumerate().for_each(|(j, value)| *value = factor[(i, j)] as f32);
        });
        let matrix = Tensor::from_slice(&values, (n, n), &Device::Cpu)?;
        Ok(Self { n, matrix, rows: values, factor: lower, order })
    }

    /// What an error of each column alone counts.
    pub fn diagonal(&self) -> Vec<f32> {
        self.rows.iter().step_by(self.n + 1).copied().collect()
    }

    /// Chooses codes anew, and then scales and levels that are no other outputs' in the rounds of `config`.
    pub fn calibrate(&self, outputs: &mut [Output], config: &LutConfig) -> Result<()> {
        let steps = self.n * self.n;
        let fed = || vec![0f32; self.n];
        host::for_each(outputs.iter_mut().collect(), steps, fed, |fed, output| {
            self.nearest_plane(output, fed);
            Ok(())
        })?;
        for outputs in outputs.chunks_mut(AT_ONCE) {
            self.with_gradients(outputs, |output, gradient| self.descend(output, gradient))?;
            for _ in 0..config.rounds {
                if config.levels != Granularity::Tensor {
                    self.with_gradients(outputs, |output, gradient| self.fit_levels(output, gradient))?;
                }
                self.with_gradients(outputs, |output, gradient| self.fit_scales(output, gradient))?;
                self.with_gradients(outputs, |output, gradient| self.descend(output, gradient))?;
            }
        }
        Ok(())
    }

    fn nearest_plane(&self, output: &mut Output, fed: &mut [f32]) {
        fed.fill(0.0);
        for (place, &c) in self.order.iter().enumerate().rev() {
            let (row, pivot) = self.factor[place * self.n..][..=place].split_at(place);
            let weight = f64::from(output.weights[c]);
            output.codes[c] = output.nearest(c, weight + f64::from(fed[place] / pivot[0]));
            if output.is_coded(c) {
                let error = (weight - output.value(c)) as f32;
                fed.iter_mut().zip(row).for_each(|(fed, l)| *fed += error * l);
            }
        }
    }

    /// Calls `f` with each output and its errors times the matrix.
    fn with_gradients(&self, outputs: &mut [Output], f: impl Fn(&mut Output, &mut [f32]) + Send + Sync) -> Result<()> {
        let mut errors = Vec::with_capacity(outputs.len() * self.n);
        for output in outputs.iter() {
            let error = |c| if output.is_coded(c) { f64::from(output.weights[c]) - output.value(c) } else { 0.0 };
            errors.extend((0..self.n).map(|c| error(c) as f32));
        }
        let errors = Tensor::from_vec(errors, (outputs.len(), self.n), &Device::Cpu)?;
        let mut gradients = errors.matmul(&self.matrix)?.flatten_all()?.to_vec1::<f32>()?;
        let each = outputs.iter_mut().zip(gradients.chunks_exact_mut(self.n)).collect();
        host::for_each(
            each,
            self.n * self.n,
            || (),
            |_, (output, gradient)| {
                f(output, gradient);
                Ok(())
            },
        )
    }

    /// Each code becomes the best one for all the others.
    fn descend(&self, output: &mut Output, gradient: &mut [f32]) {
        for &c in self.order.iter().rev() {
            if !output.is_coded(c) {
                continue;
            }
            let (before, row) = (output.value(c), &self.rows[c * self.n..][..self.n]);
            let code = output.nearest(c, before + f64::from(gradient[c] / row[c]));
            if code != output.codes[c] {
                output.codes[c] = code;
                let change = (output.value(c) - before) as f32;
                gradient.iter_mut().zip(row).for_each(|(gradient, h)| *gradient -= change * h);
            }
        }
    }

    /// Levels become the best ones for codes and scales.
    fn fit_levels(&self, output: &mut Output, gradient: &[f32]) {
        let sizes = output.sizes;
        let level_of = |c: usize| c / sizes.served * sizes.entries + usize::from(output.codes[c]);
        let levels = self.least_squares(output, gradient, &output.levels, level_of, |c| output.scales[c / sizes.group]);
        let Some(levels) = levels else { return };
        output.levels = levels;
        // Levels ascend, which least squares do not know.
        for t in 0..output.levels.len() / sizes.entries {
            let levels = &mut output.levels[t * sizes.entries..][..sizes.entries];
            if levels.is_sorted() {
                continue;
            }
            let mut order: Vec<usize> = (0..sizes.entries).collect();
            order.sort_by(|&a, &b| levels[a].total_cmp(&levels[b]));
            levels.sort_by(f64::total_cmp);
            let own = t * sizes.served..output.weights.len().min((t + 1) * sizes.served);
            for code in &mut output.codes[own] {
                *code = order.iter().position(|&before| before == usize::from(*code)).unwrap_or(0) as u8;
            }
        }
    }

    /// Scales become the best ones for codes and levels.
    fn fit_scales(&self, output: &mut Output, gradient: &[f32]) {
        let group = output.sizes.group;
        let scales = self.least_squares(output, gradient, &output.scales, |c| c / group, |c| output.level(c));
        if let Some(scales) = scales.filter(|scales| scales.iter().all(|scale| *scale > 0.0)) {
            output.scales = scales;
        }
    }

    /// What parameters become, of which the value of column `c` is the one that `of` says times a factor. There is nothing better than those
    /// `before` if rounding to f16 takes more than they gain: all columns of a parameter go the same way, which no others make up for.
    fn least_squares(
        &self,
        output: &Output,
        gradient: &[f32],
        before: &[f64],
        of: impl Fn(usize) -> usize,
        factor: impl Fn(usize) -> f64,
    ) -> Option<Vec<f64>> {
        let parameters = before.len();
        let coded = |c| if output.is_coded(c) { factor(c) as f32 } else { 0.0 };
        let columns: Vec<(usize, f32)> = (0..self.n).map(|c| (of(c), coded(c))).collect();
        let (mut normal, mut right) = (DMatrix::zeros(parameters, parameters), DVector::zeros(parameters));
        let mut sums = vec![0f32; parameters];
        for (c, &(parameter, factor)) in columns.iter().enumerate() {
            let row = &self.rows[c * self.n..][..=c];
            sums.fill(0.0);
            row[..c].iter().zip(&columns).for_each(|(h, &(other, factor))| sums[other] += h * factor);
            for (other, sum) in sums.iter().enumerate() {
                let product = f64::from(factor) * f64::from(*sum);
                normal[(parameter, other)] += product;
                normal[(other, parameter)] += product;
            }
            normal[(parameter, parameter)] += f64::from(factor).powi(2) * f64::from(row[c]);
            right[parameter] += f64::from(factor) * f64::from(gradient[c]);
        }
        let damping = STAY * normal.diagonal().max();
        let mut damped = normal.clone();
        (0..parameters).for_each(|p| damped[(p, p)] += damping);
        let change = Cholesky::new(damped)?.solve(&right);
        let after: Vec<f64> = before.iter().zip(&change).map(|(value, change)| as_f16(value + change)).collect();
        let change = DVector::from_iterator(parameters, after.iter().zip(before).map(|(after, before)| after - before));
        let gain = 2.0 * change.dot(&right) - change.dot(&(normal * &change));
        (gain > 0.0 && after.iter().all(|value| value.is_finite())).then_some(after)
    }
}
