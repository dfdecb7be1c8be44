//! Rows of a part weighed by a softmax at once, for each of some heads. The states are those of [`softmax`](super::softmax), where rows that
//! are read where they lie are weighed tile by tile.

use super::{
    lanes::Lane,
    softmax::{larger, shift, state_len},
    tile::padded,
};
use pulp::Simd;

/// The product of two padded rows.
#[inline(always)]
pub(super) fn dot<S: Simd, E: Lane>(simd: S, a: &[E], b: &[E]) -> E {
    let rows = E::vectors::<S>(a).iter().zip(E::vectors::<S>(b));
    E::total(simd, rows.fold(E::splat(simd, E::of(0.0)), |sum, (a, b)| E::mul_add(simd, *a, *b, sum)))
}

/// Adds a padded row by its weight.
#[inline(always)]
pub(super) fn add<S: Simd, E: Lane>(simd: S, weight: E, row: &[E], sums: &mut [E]) {
    let weight = E::splat(simd, weight);
    for (sum, v) in E::vectors_mut::<S>(sums).iter_mut().zip(E::vectors::<S>(row)) {
        *sum = E::mul_add(simd, weight, *v, *sum);
    }
}

/// Turns the `scores` of each head, `rows` of them, into weights, with which its state begins.
#[inline(always)]
pub(super) fn weigh_heads<E: Lane>(scores: &mut [E], rows: usize, state: &mut [E], width: usize) {
    for (scores, state) in scores.chunks_exact_mut(rows).zip(state.chunks_exact_mut(state_len(width))) {
        let max = scores.iter().fold(E::of(f64::NEG_INFINITY), |max, &score| larger(score, max));
        let shift = shift(max);
        for score in scores.iter_mut() {
            *score = score.sub(shift).exp();
        }
        let sum = scores.iter().fold(E::of(0.0), |sum, &weight| sum.add(weight));
        (state[padded(width)], state[padded(width) + 1]) = (max, sum);
    }
}

/// Adds a padded row to the state of each head, whose weights of it are `rows` apart.
#[inline(always)]
pub(super) fn add_to_heads<S: Simd, E: Lane>(
    simd: S,
    weights: &[E],
    rows: usize,
    row: &[E],
    state: &mut [E],
    width: usize,
) {
    for (&weight, state) in weights.iter().step_by(rows).zip(state.chunks_exact_mut(state_len(width))) {
        add(simd, weight, &row[..padded(width)], &mut state[..padded(width)]);
    }
}
