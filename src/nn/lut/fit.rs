//! Weights become scales, levels and codes.

use super::{hessian::Hessian, pack::pack, Granularity, LutConfig};
use crate::{error::Result, host, optimal::Solver};
use half::f16;

pub(super) const OP: &str = "lut";
/// Steps that a weight of a level takes, in those of [`host::for_each`].
const STEPS: usize = 30;
/// Bins of a histogram of all weights, of which the levels that they share are an optimum.
const BINS: usize = 1 << 14;

/// What is stored of all outputs, as [`LutMatrix`](crate::request::LutMatrix) has it.
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
    means: Vec<f64>,
}

/// The sizes of an output.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Levels of a table.
    pub entries: usize,
    /// Columns that share a scale, and a table.
    pub group: usize,
    pub served: usize,
    tables: usize,
    groups: usize,
}

/// An output whose weights are on their way into codes.
pub(super) struct Output<'a> {
    pub weights: &'a [f32],
    /// What an error counts in each column; none for 1.
    importance: Option<&'a [f32]>,
    pub sizes: Sizes,
    /// Of whole groups.
    pub codes: &'a mut [u8],
    /// As an f16 holds them: tables, of which each output has its own copies here, and scales.
    pub levels: Vec<f64>,
    pub scales: Vec<f64>,
    /// Columns, ascending.
    outliers: Vec<u32>,
}

/// Fits codes of finite `weights`, `inputs` an output. `importance` is of the columns of each output, or of all.
pub(super) fn fit(
    weights: &[f32],
    importance: Option<&[f32]>,
    hessian: Option<&Hessian>,
    inputs: usize,
    config: &LutConfig,
) -> Result<Stored> {
    let (group, columns) = config.columns(inputs);
    let [_, tables, entries] = config.levels_shape(weights.len() / inputs, inputs);
    let sizes = Sizes { entries, group, served: columns / tables, tables, groups: columns / group };
    let mut codes = host::filled(OP, weights.len() / inputs * columns, 0)?;
    let parts = weights.chunks_exact(inputs).zip(codes.chunks_exact_mut(columns)).enumerate();
    let mut outputs: Vec<_> = parts
        .map(|(o, (weights, codes))| Output {
            weights,
            importance: importance.map(|all| &all[if all.len() == inputs { 0 } else { o * inputs }..][..inputs]),
            sizes,
            codes,
            levels: vec![0.0; sizes.tables * entries],
            scales: vec![0.0; sizes.groups],
            outliers: vec![],
        })
        .collect();

    for round in 0..=config.rounds {
        each(&mut outputs, |_, output| {
            match round {
                0 => output.start(config.outliers),
                _ => output.rescale(),
            }
            Ok(())
        })?;
        match config.levels {
            Granularity::Tensor => share_levels(&mut outputs)?,
            Granularity::Output | Granularity::Group => {
                each(&mut outputs, |scratch, output| output.own_levels(scratch))?
            }
        }
        each(&mut outputs, |_, output| {
            output.encode();
            Ok(())
        })?;
    }
    if let Some(hessian) = hessian {
        hessian.calibrate(&mut outputs, config)?;
    }
    store(&outputs, columns, config)
}

/// Calls `f` with each output.
fn each(outputs: &mut [Output], f: impl Fn(&mut Scratch, &mut Output) -> Result<()> + Send + Sync) -> Result<()> {
    let steps = outputs.first().map_or(0, |output| STEPS * output.weights.len() * output.sizes.entries);
    host::for_each(outputs.iter_mut().collect(), steps, Scratch::default, f)
}

/// Gives all outputs the same levels, an optimum of a histogram of their scaled weights.
fn share_levels(outputs: &mut [Output]) -> Result<()> {
    let points = || outputs.iter().flat_map(|output| output.points(0..output.weights.len()));
    let counting = || points().filter(|&(_, counts)| counts > 0.0);
    let ends = counting().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), (v, _)| (low.min(v), high.max(v)));
    let bins_of_one = if ends.1 > ends.0 { (BINS - 1) as f64 / (ends.1 - ends.0) } else { 0.0 };
    // What a bin counts, and its values by that.
    let mut bins = vec![(0.0, 0.0); BINS];
    for (value, counts) in counting() {
        let bin = &mut bins[((value - ends.0) * bins_of_one) as usize];
        *bin = (bin.0 + counts, bin.1 + counts * value);
    }
    let mut means = vec![0.0; outputs[0].levels.len()];
    // Where nothing counts, any level does.
    Solver::default().means(bins.into_iter().map(|(counts, sum)| (sum / counts, counts)), &mut means)?;
    means.iter_mut().for_each(|mean| *mean = as_f16(*mean));
    outputs.iter_mut().for_each(|output| output.levels.copy_from_slice(&means));
    Ok(())
}

fn store(outputs: &[Output], columns: usize, config: &LutConfig) -> Result<Stored> {
    let (count, bytes) = (outputs.len(), columns / 8 * config.bits);
    let mut codes = host::filled(OP, count * bytes, 0)?;
    let parts = codes.chunks_exact_mut(bytes).zip(outputs).collect();
    host::for_each(
        parts,
        STEPS * columns,
        || (),
        |_, (bytes, output): (&mut [u8], &Output)| {
            pack(output.codes, config.bits, bytes);
            Ok(())
        },
    )?;
    let own = if config.levels == Granularity::Tensor { &outputs[..1] } else { outputs };
    let stored = |values: &[f64]| values.iter().map(|v| f16::from_f64(*v)).collect::<Vec<_>>();
    Ok(Stored {
        codes,
        levels: own.iter().flat_map(|output| stored(&output.levels)).collect(),
        scales: outputs.iter().flat_map(|output| stored(&output.scales)).collect(),
        outlier_columns: outputs.iter().flat_map(|output| output.outliers.iter().copied()).collect(),
        outlier_values: outputs.iter().flat_map(Output::outlier_values).collect(),
    })
}

impl Output<'_> {
    fn importance(&self, column: usize) -> f64 {
        self.importance.map_or(1.0, |all| f64::from(all[column]))
    }

    /// Whether a column has a code that matters.
    pub fn is_coded(&self, column: usize) -> bool {
        self.outliers.is_empty() || self.outliers.binary_search(&(column as u32)).is_err()
    }

    /// Chooses so many outliers, and scales as the largest magnitudes of what is left.
    fn start(&mut self, outliers: usize) {
        if outliers > 0 {
            // The weights whose squares count most are those that a level away from them costs most.
            let cost = |c: u32| self.importance(c as usize) * f64::from(self.weights[c as usize]).powi(2);
            let mut columns: Vec<u32> = (0..self.weights.len() as u32).collect();
            columns.sort_unstable_by(|&a, &b| cost(b).total_cmp(&cost(a)).then(a.cmp(&b)));
            columns.truncate(outliers);
            columns.sort_unstable();
            self.outliers = columns;
        }
        for g in 0..self.scales.len() {
            let kept = self.of_group(g).filter(|&c| self.is_coded(c));
            let largest = kept.map(|c| self.weights[c].abs()).fold(0.0, f32::max);
            self.scales[g] = f16::from_f32(largest).max(f16::MIN_POSITIVE).to_f64();
        }
    }

    /// The columns of a group.
    fn of_group(&self, group: usize) -> std::ops::Range<usize> {
        let first = group * self.sizes.group;
        first..self.weights.len().min(first + self.sizes.group)
    }

    /// Scaled weights, and what their errors count, of some columns.
    fn points(&self, columns: std::ops::Range<usize>) -> impl Iterator<Item = (f64, f64)> + '_ {
        columns.map(|c| {
            let scale = self.scales[c / self.sizes.group];
            // An error of a scaled weight counts by the square of its scale, too.
            let counts = if self.is_coded(c) { self.importance(c) * (scale * scale) } else { 0.0 };
            (f64::from(self.weights[c]) / scale, counts)
        })
    }

    fn own_levels(&mut self, scratch: &mut Scratch) -> Result<()> {
        let Sizes { entries, served, tables, .. } = self.sizes;
        for t in 0..tables {
            let own = t * served..self.weights.len().min((t + 1) * served);
            scratch.means.clear();
            scratch.means.resize(entries, 0.0);
            // Where nothing counts, any level does.
            scratch.solver.means(self.points(own), &mut scratch.means)?;
            let levels = &mut self.levels[t * entries..][..entries];
            levels.iter_mut().zip(&scratch.means).for_each(|(level, mean)| *level = as_f16(*mean));
        }
        Ok(())
    }

    fn encode(&mut self) {
        for c in 0..self.weights.len() {
            self.codes[c] = self.nearest(c, f64::from(self.weights[c]));
        }
    }

    /// The levels of a column.
    pub fn table(&self, column: usize) -> &[f64] {
        &self.levels[column / self.sizes.served * self.sizes.entries..][..self.sizes.entries]
    }

    /// The code of the value of a column that is nearest to a weight: the lowest of equals.
    pub fn nearest(&self, column: usize, weight: f64) -> u8 {
        let (scaled, mut best) = (weight / self.scales[column / self.sizes.group], (f64::INFINITY, 0));
        for (code, level) in self.table(column).iter().enumerate() {
            let off = (scaled - level).abs();
            if off < best.0 {
                best = (off, code);
            }
        }
        best.1 as u8
    }

    /// What the code of a column stands for, without its scale.
    pub fn level(&self, column: usize) -> f64 {
        self.table(column)[usize::from(self.codes[column])]
    }

    /// What the code of a column stands for.
    pub fn value(&self, column: usize) -> f64 {
        self.level(column) * self.scales[column / self.sizes.group]
    }

    /// Sets each scale to the best one for the codes of its group, by least squares.
    fn rescale(&mut self) {
        for g in 0..self.scales.len() {
            let (mut product, mut square) = (0.0, 0.0);
            for c in self.of_group(g).filter(|&c| self.is_coded(c)) {
                let (counts, level) = (self.importance(c), self.level(c));
                product += counts * level * f64::from(self.weights[c]);
                square += counts * level * level;
            }
            let scale = as_f16(product / square);
            // It stays as it is where an f16 cannot hold the new one, or nothing counts.
            if scale > 0.0 && scale.is_finite() {
                self.scales[g] = scale;
            }
        }
    }

    /// What outliers are more than their levels.
    fn outlier_values(&self) -> impl Iterator<Item = f16> + '_ {
        self.outliers.iter().map(|&c| {
            // A weight and its level may be at both ends of what f16 holds.
            let most = f16::MAX.to_f64();
            f16::from_f64((f64::from(self.weights[c as usize]) - self.value(c as usize)).clamp(-most, most))
        })
    }
}

/// As an f16 holds it.
pub(super) fn as_f16(value: f64) -> f64 {
    f16::from_f64(value).to_f64()
}
