//! Weights of an output become scales, levels and codes.

use super::{pack::pack, LutConfig};
use crate::{error::Result, host, optimal::Solver, request::LutMatrix};
use half::f16;

/// Steps that a weight of a level takes, in those of [`host::for_each`].
const STEPS: usize = 30;

/// What is stored of all outputs, as [`LutMatrix`] has it.
pub(super) struct Stored {
    pub codes: Vec<u8>,
    pub levels: Vec<f16>,
    pub scales: Vec<f16>,
    pub outlier_columns: Vec<u32>,
    pub outlier_values: Vec<f16>,
}

/// Memory that the next output uses again.
#[derive(Default)]
struct Scratch {
    solver: Solver,
    /// Scaled weights, what their errors count, and their codes.
    scaled: Vec<f64>,
    counts: Vec<f64>,
    codes: Vec<u8>,
    means: Vec<f64>,
    outliers: Vec<u32>,
}

/// An output's part of what is stored.
struct Output<'a> {
    weights: &'a [f32],
    /// What an error counts in each column; none for 1.
    importance: Option<&'a [f32]>,
    codes: &'a mut [u8],
    levels: &'a mut [f16],
    scales: &'a mut [f16],
    outlier_columns: &'a mut [u32],
    outlier_values: &'a mut [f16],
}

/// Fits the levels of each output of finite `weights`, `inputs` each. `importance` is of the columns of each output, or of all.
pub(super) fn fit(weights: &[f32], importance: Option<&[f32]>, inputs: usize, config: &LutConfig) -> Result<Stored> {
    const OP: &str = "lut";
    let outputs = weights.len() / inputs;
    let (group, columns) = config.columns(inputs);
    let groups = columns / group;
    let tables = if config.levels_per_group { groups } else { 1 };
    let (bytes, levels) = (columns / 8 * config.bits, tables * config.levels());
    let mut stored = Stored {
        codes: host::filled(OP, outputs * bytes, 0)?,
        levels: host::filled(OP, outputs * levels, f16::ZERO)?,
        scales: host::filled(OP, outputs * groups, f16::ZERO)?,
        outlier_columns: host::filled(OP, outputs * config.outliers, 0)?,
        outlier_values: host::filled(OP, outputs * config.outliers, f16::ZERO)?,
    };
    // There may be no outliers to cut.
    let mut columns_of = stored.outlier_columns.chunks_mut(config.outliers.max(1));
    let mut values_of = stored.outlier_values.chunks_mut(config.outliers.max(1));
    let parts = weights.chunks_exact(inputs).zip(stored.codes.chunks_exact_mut(bytes));
    let parts = parts.zip(stored.levels.chunks_exact_mut(levels)).zip(stored.scales.chunks_exact_mut(groups));
    let outputs: Vec<_> = parts
        .enumerate()
        .map(|(o, (((weights, codes), levels), scales))| Output {
            weights,
            importance: importance.map(|all| &all[if all.len() == inputs { 0 } else { o * inputs }..][..inputs]),
            codes,
            levels,
            scales,
            outlier_columns: columns_of.next().unwrap_or_default(),
            outlier_values: values_of.next().unwrap_or_default(),
        })
        .collect();
    host::for_each(outputs, STEPS * inputs * config.levels(), Scratch::default, |scratch, output| {
        output.fit(scratch, config);
        Ok(())
    })?;
    Ok(stored)
}

impl Output<'_> {
    fn fit(self, scratch: &mut Scratch, config: &LutConfig) {
        let Scratch { solver, scaled, counts, codes, means, outliers } = scratch;
        let (inputs, (group, columns)) = (self.weights.len(), config.columns(self.weights.len()));
        let importance = |c: usize| self.importance.map_or(1.0, |all| f64::from(all[c]));
        counts.clear();
        counts.extend((0..columns).map(|c| if c < inputs { importance(c) } else { 0.0 }));

        // The weights whose squares count most are those that a level away from them costs most.
        let cost = |c: u32| importance(c as usize) * f64::from(self.weights[c as usize]).powi(2);
        outliers.clear();
        outliers.extend(0..inputs as u32);
        outliers.sort_unstable_by(|&a, &b| cost(b).total_cmp(&cost(a)).then(a.cmp(&b)));
        outliers.truncate(self.outlier_columns.len());
        outliers.sort_unstable();
        outliers.iter().for_each(|&c| counts[c as usize] = 0.0);

        scaled.clear();
        scaled.resize(columns, 0.0);
        for (g, stored) in self.scales.iter_mut().enumerate() {
            let own = g * group..inputs.min((g + 1) * group);
            let kept = own.clone().filter(|&c| outliers.binary_search(&(c as u32)).is_err());
            let largest = kept.map(|c| self.weights[c].abs()).fold(0.0, f32::max);
            *stored = f16::from_f32(largest).max(f16::MIN_POSITIVE);
            let scale = stored.to_f64();
            for c in own {
                scaled[c] = f64::from(self.weights[c]) / scale;
                // An error of a scaled weight counts by the square of its scale, too.
                counts[c] *= scale * scale;
            }
        }

        codes.clear();
        codes.resize(columns, 0);
        let served = columns * config.levels() / self.levels.len();
        for (t, stored) in self.levels.chunks_exact_mut(config.levels()).enumerate() {
            let own = t * served..(t + 1) * served;
            means.clear();
            means.resize(config.levels(), 0.0);
            // Where nothing counts, any level does.
            solver.means(scaled[own.clone()].iter().copied().zip(counts[own.clone()].iter().copied()), means);
            for (level, mean) in stored.iter_mut().zip(means.iter_mut()) {
                *level = f16::from_f64(*mean);
                *mean = level.to_f64();
            }
            for c in own.start..own.end.min(inputs) {
                // Levels ascend, and the first of the nearest is taken.
                let better = |best: usize, j: usize| {
                    let [a, b] = [best, j].map(|j| (scaled[c] - means[j]).abs());
                    if b < a {
                        j
                    } else {
                        best
                    }
                };
                codes[c] = (1..means.len()).fold(0, better) as u8;
            }
        }
        pack(codes, config.bits, self.codes);

        for ((&c, column), value) in outliers.iter().zip(self.outlier_columns).zip(self.outlier_values) {
            let (i, scale) = (c as usize, self.scales[c as usize / group].to_f64());
            let level = self.levels[i / served * config.levels() + usize::from(codes[i])].to_f64();
            *column = c;
            // A weight and its level may be at both ends of what f16 holds.
            let most = f16::MAX.to_f64();
            *value = f16::from_f64((f64::from(self.weights[i]) - level * scale).clamp(-most, most));
        }
        debug_assert!(columns.is_multiple_of(LutMatrix::BLOCK));
    }
}
