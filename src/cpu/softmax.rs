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
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Query heads that read a row together: as many as leave registers for their sums.
const HEADS: usize = 4;

/// Elements of a head's state.
pub(super) fn state_len(width: usize) -> usize {
    padded(width) + PAD
}

/// A task uses this from tile to tile.
pub(super) struct Scratch<E> {
    rows: Vec<E>,
    scores: Vec<Scores<E>>,
    fades: Vec<E>,
}

impl<E: Lane> Scratch<E> {
    pub(super) fn new(keys: &TileRows<'_, E>, values: &TileRows<'_, E>, heads: usize) -> Self {
        let zero = E::of(0.0);
        let columns = padded(keys.d.max(values.d));
        Self { rows: vec![zero; TILE * columns], scores: vec![[zero; TILE]; heads], fades: vec![zero; heads] }
    }
}

/// Adds values of problem `p` to the `state` of each head by their keys' products with its query: the rows that `token` names of those in
/// `range`.
#[inline(always)]
pub(super) fn read_tokens<S: Simd, E: Lane>(
    simd: S,
    [keys, values]: [&TileRows<'_, E>; 2],
    p: usize,
    (range, token): (Range<usize>, impl Fn(usize) -> u32),
    queries: &[E],
    Scratch { rows, scores, fades }: &mut Scratch<E>,
    state: &mut [E],
) {
    let heads = queries.len() / padded(keys.d);
    let (scores, fades) = (&mut scores[..heads], &mut fades[..heads]);
    let tile = |of, start: usize| Tile::of(of, p, (start.min(range.end)..range.end).map(&token));
    let mut keys_now = tile(keys, range.start);
    keys_now.prefetch(0..TILE);
    for start in range.clone().step_by(TILE) {
        let (values_now, ahead) = (tile(values, start), tile(keys, start + TILE));
        simd.vectorize(Score { keys: &keys_now, queries, ahead: &values_now, rows, scores });
        simd.vectorize(Weigh { values: &values_now, ahead: &ahead, scores, rows, fades, state });
        keys_now = ahead;
    }
}

/// Adds `values` of problem `p`, those in `range`, to the `state` of each head by scores that are known: `score` writes those of the tile
/// that begins at a row.
#[inline(always)]
pub(super) fn read_values<S: Simd, E: Lane>(
    simd: S,
    values: &TileRows<'_, E>,
    p: usize,
    range: Range<usize>,
    score: impl Fn(usize, &mut [Scores<E>]),
    Scratch { rows, scores, fades }: &mut Scratch<E>,
    state: &mut [E],
) {
    let tile = |start: usize| Tile::of(values, p, start.min(range.end) as u32..range.end as u32);
    let mut now = tile(range.start);
    now.prefetch(0..TILE);
    for start in range.clone().step_by(TILE) {
        let ahead = tile(start + TILE);
        score(start, scores);
        simd.vectorize(Weigh { values: &now, ahead: &ahead, scores, rows, fades, state });
        now = ahead;
    }
}

/// The products of `keys` with padded `queries`, one for each of `scores`; minus infinity beyond the rows. Those of the tile `ahead`
/// are asked for one by one meanwhile, as [`Weigh`] does too, so that memory never waits for arithmetic. Both are structs for the reason that
/// `Pack` in assign.rs is one, and calls of their own, so that they are compiled once for all who read tiles.
pub(super) struct Score<'a, E> {
    pub(super) keys: &'a Tile<'a, E>,
    pub(super) queries: &'a [E],
    pub(super) ahead: &'a Tile<'a, E>,
    pub(super) rows: &'a mut [E],
    pub(super) scores: &'a mut [Scores<E>],
}

impl<E: Lane> WithSimd for Score<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { keys, queries, ahead, rows, scores } = self;
        let (rows, step) = (keys.padded(rows), padded(keys.of.d));
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
struct Weigh<'a, E> {
    values: &'a Tile<'a, E>,
    ahead: &'a Tile<'a, E>,
    scores: &'a mut [Scores<E>],
    rows: &'a mut [E],
    fades: &'a mut [E],
    state: &'a mut [E],
}

impl<E: Lane> WithSimd for Weigh<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { values, ahead, scores, rows, fades, state } = self;
        let width = padded(values.of.d);
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
        let rows = values.padded(rows);
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
}

/// Turns the `scores` of one head into weights, with which its state begins.
#[inline(always)]
pub(super) fn weigh<E: Lane>(scores: &mut [E], state: &mut [E], width: usize) {
    let max = scores.iter().fold(E::of(f64::NEG_INFINITY), |max, &score| larger(score, max));
    let shift = shift(max);
    scores.iter_mut().for_each(|score| *score = score.sub(shift).exp());
    let sum = scores.iter().fold(E::of(0.0), |sum, &weight| sum.add(weight));
    (state[padded(width)], state[padded(width) + 1]) = (max, sum);
}

/// Adds a padded row by its weight.
#[inline(always)]
pub(super) fn add<S: Simd, E: Lane>(simd: S, weight: E, row: &[E], sums: &mut [E]) {
    let weight = E::splat(simd, weight);
    for (sum, v) in E::vectors_mut::<S>(sums).iter_mut().zip(E::vectors::<S>(row)) {
        *sum = E::mul_add(simd, weight, *v, *sum);
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
