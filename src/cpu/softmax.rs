//! Rows weighed by a softmax that sees each row once, in tiles: the online softmax (Milakov and Gimelshein 2018), as attention has it
//! since FlashAttention (Dao et al. 2022).
//!
//! A head's *state* is the sum of its values, each times `e^(score - max)`, then `max`, the largest score so far, and the sum of those
//! weights. A tile with a larger score makes what is there smaller first. States of different rows join likewise ([`join`]), so that
//! several threads may share a head's rows (split-K, Dao et al. 2023, Flash-Decoding).
//!
//! The query heads that share a tile's rows read them from the first cache. Rows that are not whole vectors of the type that is computed in
//! are widened and padded in scratch before.

use super::{
    lanes::Lane,
    tile::{padded, Scores, Tile, TileRows, PAD, TILE},
};
use pulp::Simd;
use std::ops::Range;

/// Query heads that read a row together: as many as leave registers for their sums.
const HEADS: usize = 4;

/// Elements of a head's state.
pub(super) fn state_len(width: usize) -> usize {
    padded(width) + PAD
}

/// The products of `keys` with padded `queries`, one for each of `scores`; minus infinity beyond the rows. Those of the tile `ahead`
/// are asked for one by one meanwhile, as [`weigh`] does too, so that memory never waits for arithmetic.
#[inline(always)]
pub(super) fn score<S: Simd, E: Lane>(
    simd: S,
    keys: &Tile<'_, impl TileRows<E>>,
    queries: &[E],
    ahead: &Tile<'_, impl TileRows<E>>,
    scratch: &mut [E],
    scores: &mut [Scores<E>],
) {
    let (rows, step) = (keys.padded(scratch), padded(keys.of.columns()));
    let rows = &rows[..keys.count];
    for (group, (queries, scores)) in queries.chunks(HEADS * step).zip(scores.chunks_mut(HEADS)).enumerate() {
        let ask = |rows| {
            if group == 0 {
                ahead.prefetch(rows)
            }
        };
        match scores.len() {
            1 => score_rows::<S, _, 1>(simd, queries, rows, ask, scores),
            2 => score_rows::<S, _, 2>(simd, queries, rows, ask, scores),
            3 => score_rows::<S, _, 3>(simd, queries, rows, ask, scores),
            _ => score_rows::<S, _, HEADS>(simd, queries, rows, ask, scores),
        }
    }
    scores.iter_mut().for_each(|s| s[keys.count..].fill(E::of(f64::NEG_INFINITY)));
}

#[inline(always)]
fn score_rows<S: Simd, E: Lane, const H: usize>(
    simd: S,
    queries: &[E],
    rows: &[&[E]],
    ask: impl Fn(Range<usize>),
    scores: &mut [Scores<E>],
) {
    let step = queries.len() / H;
    let queries = &queries[..H * step];
    let scores: &mut [Scores<E>; H] = scores.try_into().expect("scores for each head");
    let (pairs, odd) = rows.as_chunks::<2>();
    for (pair, rows) in pairs.iter().enumerate() {
        ask(2 * pair..2 * pair + 2);
        products::<S, E, H, 2>(simd, queries, rows, 2 * pair, scores);
    }
    if let Some(row) = odd.first() {
        ask(2 * pairs.len()..TILE);
        products::<S, E, H, 1>(simd, queries, &[row], 2 * pairs.len(), scores);
    }
}

/// The products of `R` rows, the tile's from `first` on, with the queries of `H` heads. Sums are arrays, which stay in registers as long as
/// only loops of constant length touch them: `map` of an array becomes a call.
#[inline(always)]
fn products<S: Simd, E: Lane, const H: usize, const R: usize>(
    simd: S,
    queries: &[E],
    rows: &[&[E]; R],
    first: usize,
    scores: &mut [Scores<E>; H],
) {
    let queries = E::vectors::<S>(queries);
    let len = queries.len() / H;
    let mut sums = [[E::splat(simd, E::of(0.0)); H]; R];
    let mut of = [&[][..]; R];
    for r in 0..R {
        of[r] = &E::vectors::<S>(rows[r])[..len];
    }
    for c in 0..len {
        for h in 0..H {
            let query = queries[h * len + c];
            for r in 0..R {
                sums[r][h] = E::mul_add(simd, query, of[r][c], sums[r][h]);
            }
        }
    }
    for h in 0..H {
        for r in 0..R {
            scores[h][first + r] = E::total(simd, sums[r][h]);
        }
    }
}

/// Turns `scores` into weights and adds the tile's rows by them to the `state` of each head.
#[inline(always)]
pub(super) fn weigh<S: Simd, E: Lane>(
    simd: S,
    values: &Tile<'_, impl TileRows<E>>,
    ahead: &Tile<'_, impl TileRows<E>>,
    scores: &mut [Scores<E>],
    [scratch, fades]: [&mut [E]; 2],
    state: &mut [E],
) {
    let width = padded(values.of.columns());
    for ((scores, fade), state) in scores.iter_mut().zip(&mut *fades).zip(state.chunks_exact_mut(width + PAD)) {
        let [max, sum] = [state[width], state[width + 1]];
        let new = larger(fold(*scores, larger), max);
        let shift = shift(new);
        *fade = max.sub(shift).exp();
        for score in scores.iter_mut() {
            *score = score.sub(shift).exp();
        }
        (state[width], state[width + 1]) = (new, sum.mul(*fade).add(fold(*scores, E::add)));
    }
    let rows = values.padded(scratch);
    let rows = &rows[..values.count];
    let heads = scores.chunks(HEADS).zip(fades.chunks(HEADS)).zip(state.chunks_mut(HEADS * (width + PAD)));
    for (group, ((weights, fades), state)) in heads.enumerate() {
        let ask = |rows| {
            if group == 0 {
                ahead.prefetch(rows)
            }
        };
        match weights.len() {
            1 => add_rows::<S, _, 1>(simd, weights, fades, rows, ask, state),
            2 => add_rows::<S, _, 2>(simd, weights, fades, rows, ask, state),
            3 => add_rows::<S, _, 3>(simd, weights, fades, rows, ask, state),
            _ => add_rows::<S, _, HEADS>(simd, weights, fades, rows, ask, state),
        }
    }
}

/// All of a tile in one, halves of it by halves, so that the compiler may vectorise.
#[inline(always)]
pub(super) fn fold<E: Lane>(mut of: Scores<E>, f: impl Fn(E, E) -> E) -> E {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            of[i] = f(of[i], of[i + half]);
        }
    }
    of[0]
}

/// The larger of two numbers; `b` if `a` is none.
#[inline(always)]
pub(super) fn larger<E: Lane>(a: E, b: E) -> E {
    if a > b {
        a
    } else {
        b
    }
}

/// The score that others are compared with: `max`, unless all weigh nothing, whose differences would be NaN.
pub(super) fn shift<E: Lane>(max: E) -> E {
    if max == E::of(f64::NEG_INFINITY) {
        E::of(0.0)
    } else {
        max
    }
}

#[inline(always)]
fn add_rows<S: Simd, E: Lane, const H: usize>(
    simd: S,
    weights: &[Scores<E>],
    fades: &[E],
    rows: &[&[E]],
    ask: impl Fn(Range<usize>),
    state: &mut [E],
) {
    let step = state.len() / H;
    let mut state = state.chunks_exact_mut(step);
    let mut sums: [&mut [E::Vector<S>]; H] = std::array::from_fn(|_| {
        let state = state.next().expect("a state for each head");
        E::vectors_mut::<S>(&mut state[..step - PAD])
    });
    let weights: &[Scores<E>; H] = weights.try_into().expect("weights for each head");
    let vectors = sums[0].len();
    let pairs = vectors / 2;
    for pair in 0..pairs {
        ask(pair * TILE / pairs..(pair + 1) * TILE / pairs);
        add_columns::<S, E, H, 2>(simd, weights, fades, rows, 2 * pair, &mut sums);
    }
    if vectors % 2 == 1 {
        add_columns::<S, E, H, 1>(simd, weights, fades, rows, vectors - 1, &mut sums);
    }
}

/// The sums of `C` vectors of columns, in registers over all rows of the tile.
#[inline(always)]
fn add_columns<S: Simd, E: Lane, const H: usize, const C: usize>(
    simd: S,
    weights: &[Scores<E>; H],
    fades: &[E],
    rows: &[&[E]],
    first: usize,
    sums: &mut [&mut [E::Vector<S>]; H],
) {
    let mut added = [[E::splat(simd, E::of(0.0)); C]; H];
    for h in 0..H {
        let fade = E::splat(simd, fades[h]);
        for c in 0..C {
            added[h][c] = E::times(simd, sums[h][first + c], fade);
        }
    }
    for (t, row) in rows.iter().enumerate().take(TILE) {
        let row = &E::vectors::<S>(row)[first..first + C];
        for h in 0..H {
            let weight = E::splat(simd, weights[h][t]);
            for c in 0..C {
                added[h][c] = E::mul_add(simd, weight, row[c], added[h][c]);
            }
        }
    }
    for h in 0..H {
        for c in 0..C {
            sums[h][first + c] = added[h][c];
        }
    }
}

/// Begins the states of heads, which have seen nothing.
pub(super) fn clear<E: Lane>(state: &mut [E], width: usize) {
    for state in state.chunks_exact_mut(state_len(width)) {
        state.fill(E::of(0.0));
        state[padded(width)] = E::of(f64::NEG_INFINITY);
    }
}

/// The mean of all values by their weights, `sums`, from the states of a head over parts of the rows, in their order.
pub(super) fn join<'a, E: Lane>(states: impl Iterator<Item = &'a [E]> + Clone, sums: &mut [E]) {
    let at = padded(sums.len());
    let max = states.clone().map(|s| s[at]).fold(E::of(f64::NEG_INFINITY), |a, b| if b > a { b } else { a });
    let mut total = E::of(0.0);
    sums.fill(total);
    for state in states {
        let fade = state[at].sub(shift(max)).exp();
        total = total.add(state[at + 1].mul(fade));
        sums.iter_mut().zip(state).for_each(|(sum, v)| *sum = sum.add(v.mul(fade)));
    }
    sums.iter_mut().for_each(|sum| *sum = E::of(sum.widen() / total.widen()));
}
