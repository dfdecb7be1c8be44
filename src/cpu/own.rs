//! Distances of rows to the centroids of their own clusters, which is what bounds are compared with.
//!
//! # By rounded numbers
//! Rows that are kept as the matrix unit multiplies them are half as long as in f32, and need not be centred and rounded in every pass. Let
//! `x` and `c` be packed as in `filter.rs`, and `x'` and `c'` rounded to bf16. By the triangle inequality `|x - c|` is within
//! `|x - x'| + |c - c'|` of `|x' - c'|`. The norms of what rounding leaves are known (`rounded.rs`). Packing rounds each number once, and what
//! scaling loses is less: together less than `g` of both norms (`filter.rs`). Differences of bf16 are squared and added in f32.

use super::{
    bounds::{Between, Moved, UNSCORED},
    filter::{gamma, Centroids},
    lines::{steps, STEP},
    rounded::round_row,
    scalar::Scalar,
    tensors::Element,
};
use crate::{error::Result, host, kept::Line};
use pulp::{Simd, WithSimd};

/// Finds the squared distance of a row to its own centroid.
pub(super) struct Measure<'a, T> {
    pub moved: &'a Moved,
    pub row: &'a [T],
    pub label: u32,
    pub scratch: &'a mut [f32],
}

impl<T: Element<Filter = f32>> WithSimd for Measure<'_, T> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> f64 {
        if let Some(row) = T::as_filter(self.row) {
            return self.moved.square(simd, row, self.label);
        }
        T::filter_row(self.row, self.scratch);
        self.moved.square(simd, self.scratch, self.label)
    }
}

/// Scored centroids, rounded, a row each.
pub(super) struct OwnCentroids {
    lines: Vec<Line>,
    /// What rounding leaves of each, and packing may have taken.
    errors: Vec<f64>,
    steps: usize,
    /// As in the module's text.
    g: f64,
    unit: f64,
}

impl OwnCentroids {
    pub fn new(c: &Centroids<f32>) -> Result<Self> {
        let (d, g) = (c.columns(), gamma(c.columns(), f32::UNIT));
        let (steps, count) = (steps(d), c.indices().len());
        let (mut lines, mut errors) =
            (host::filled("assign", count * steps, Line::ZERO)?, host::buffer("assign", count)?);
        for (i, lines) in lines.chunks_exact_mut(steps).enumerate() {
            let left = round_row(&c.values[i * d..][..d], |step, values| lines[step].0 = values);
            errors.push(left + g * c.norm(i));
        }
        Ok(Self { lines, errors, steps, g, unit: c.unit() })
    }

    /// Bounds on the distance of a row, which is kept less than nothing, to the centroid at this place, unless it has none.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "zipped loops are not always inlined where vectors are wide")]
    pub fn between(&self, moved: &Moved, row: &[Line], [norm, left]: [f32; 2], scored: u32) -> Option<Between> {
        if scored == UNSCORED || norm.is_nan() {
            return None;
        }
        let centroid = &self.lines[scored as usize * self.steps..][..self.steps];
        let mut sums = [0f32; STEP];
        for (x, c) in row.iter().zip(centroid) {
            for i in 0..STEP {
                let difference = f32::from_bits(u32::from(x.0[i]) << 16) + f32::from_bits(u32::from(c.0[i]) << 16);
                sums[i] += difference * difference;
            }
        }
        for width in [16, 8, 4, 2, 1] {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
        }
        let error = self.errors[scored as usize] + f64::from(left) + self.g * f64::from(norm);
        Some(moved.between(f64::from(sums[0]), error, self.unit))
    }
}
