//! Groups of neighbouring centroids, to which rows keep bounds on their distances.
//!
//! Centroids are halved, and halves again: each time by a balanced 2-means, whose clusters of fixed sizes are the ends of the order along
//! the difference of their means. What groups are changes no label.

use super::{
    scalar::{lanes, Scalar},
    tensors::{Element, View},
};
use crate::{error::Result, host};
use std::ops::Range;

/// Turns of a balanced 2-means.
const TURNS: usize = 4;

/// Writes to `out` the group below `count` of each centroid of a problem: as many to a group, and the last ones have the rest.
pub(super) fn group_centroids<T: Element<Filter = f32>>(
    c: &View<'_, T>,
    b: usize,
    count: usize,
    out: &mut [u32],
) -> Result<()> {
    let (k, d) = (c.rows.n, c.rows.d);
    let mut values = host::filled("assign", k * d, 0f32)?;
    for (j, value) in values.chunks_exact_mut(d).enumerate() {
        T::filter_row(c.row(b, j), value);
        // Centroids that are not finite have no neighbours.
        value.iter_mut().filter(|v| !v.is_finite()).for_each(|v| *v = 0.0);
    }
    let mut order = host::buffer("assign", k)?;
    order.extend((0..k as u32).map(|j| (0.0, j)));
    let mut split = Split { values: &values, d, size: k.div_ceil(count), out };
    split.halve(&mut order, 0..count as u32);
    Ok(())
}

struct Split<'a> {
    values: &'a [f32],
    d: usize,
    size: usize,
    out: &'a mut [u32],
}

impl Split<'_> {
    fn value(&self, j: u32) -> &[f32] {
        &self.values[j as usize * self.d..][..self.d]
    }

    /// Shares centroids, each with a place that is written here, out to `groups`.
    fn halve(&mut self, centroids: &mut [(f32, u32)], groups: Range<u32>) {
        let middle = groups.start + (groups.end - groups.start) / 2;
        let left = (middle - groups.start) as usize * self.size;
        if left == 0 {
            return centroids.iter().for_each(|&(_, j)| self.out[j as usize] = groups.start);
        }
        if left >= centroids.len() {
            return self.halve(centroids, groups.start..middle);
        }
        let mut direction = self.far_apart(centroids);
        for turn in 0..TURNS {
            for (place, j) in &mut *centroids {
                *place = lanes(self.value(*j), &direction, |s, a, b| s.add(a.mul(b)));
            }
            centroids.select_nth_unstable_by(left, |a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            if turn + 1 < TURNS {
                let (low, high) = (self.mean(&centroids[..left]), self.mean(&centroids[left..]));
                direction = high.iter().zip(&low).map(|(a, b)| a - b).collect();
            }
        }
        let (low, high) = centroids.split_at_mut(left);
        self.halve(low, groups.start..middle);
        self.halve(high, middle..groups.end);
    }

    /// The difference of two that are far from each other.
    fn far_apart(&self, centroids: &[(f32, u32)]) -> Vec<f32> {
        let square = |s: f32, a: f32, b: f32| s + (a - b) * (a - b);
        let farthest = |from: &[f32]| {
            let distance = |&(_, j): &(f32, u32)| (lanes(self.value(j), from, square), j);
            let far = centroids.iter().map(distance).max_by(|a, b| a.0.total_cmp(&b.0));
            self.value(far.map_or(0, |(_, j)| j))
        };
        let one = farthest(&self.mean(centroids));
        one.iter().zip(farthest(one)).map(|(a, b)| a - b).collect()
    }

    fn mean(&self, centroids: &[(f32, u32)]) -> Vec<f32> {
        let mut mean = vec![0.0; self.d];
        for &(_, j) in centroids {
            mean.iter_mut().zip(self.value(j)).for_each(|(mean, v)| *mean += v / centroids.len() as f32);
        }
        mean
    }
}
