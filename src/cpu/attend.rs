//! Attention of one token over a cache, by clusters or over all of it.
//!
//! Three passes, each shared out to threads in pieces that do not depend on their number, so that the bits do not either. The mean keys
//! are scored, for all query heads that share a key head at once. Then every unit chooses: of its best clusters, found by a selection,
//! tokens are listed up to the budget. Last, what is read is read where it lies ([`softmax`](super::softmax)): tokens before and after
//! the clusters and mean values by all heads of a key head together, listed tokens by their unit.
//!
//! A key head costs `tokens - clustered + budget * units` reads of a key and a value, and one of each mean.

use super::{
    clusters::{add_logs, logs, Clusters},
    lanes::Lane,
    parts::{attend_parts, narrowed, Heads},
    scalar::Scalar,
    softmax::{clear, read_tokens, read_values, Score, Scratch},
    tensors::{lock, or, typed, Element, View},
    tile::{padded, Scores, Tile, TileRows, TILE},
};
use crate::{
    error::Result,
    host, launches,
    operand::{Operand, Readable},
    request::{Attention, Clustered},
    rows::Rows,
    tiles::CPU_ATTEND_ROWS,
};
use candle_core::Tensor;
use pulp::{Simd, WithSimd};
use std::ops::Range;

const OP: &str = "attend";

pub(crate) fn attend(a: &Attention<'_>) -> Result<Option<Tensor>> {
    let (b, q_heads, _) = a.q.dims3()?;
    let rows = |t: &Tensor| Rows::of(Operand::from(t));
    let [Some(q), Some(keys), Some(values)] = [a.q, a.keys, a.values].map(rows) else {
        return Ok(None);
    };
    let parts: [for<'c> fn(Clustered<'c>) -> &'c Tensor; 7] = [
        |c| c.mean_keys.bytes,
        |c| c.mean_keys.scales,
        |c| c.mean_values.bytes,
        |c| c.mean_values.scales,
        |c| c.spreads,
        |c| &c.order.order,
        |c| &c.order.offsets,
    ];
    if a.clusters.is_some_and(|c| parts.iter().any(|part| !part(c).is_contiguous())) {
        return Ok(None);
    }
    typed!(a.q.dtype(), T => {
        let inputs: [&dyn Readable; 10] = std::array::from_fn(|i| match i {
            0 => &q.operand as &dyn Readable,
            1 => &keys.operand,
            2 => &values.operand,
            _ => or(a.clusters.map(parts[i - 3]), a.q),
        });
        let [qs, ks, vs, key_bytes, key_scales, value_bytes, value_scales, spreads, order, offsets] = lock(inputs);
        let group = q_heads * b / keys.b;
        let clusters = match a.clusters {
            Some(c) => Some(Clusters {
                keys: TileRows::of_codes(key_bytes.flat()?, key_scales.flat()?, c.order.k(), keys.d),
                values: TileRows::of_codes(value_bytes.flat()?, value_scales.flat()?, c.order.k(), values.d),
                spreads: spreads.flat()?,
                order: order.flat()?,
                offsets: offsets.flat()?,
                units: if c.shared { 1 } else { group },
                of: c,
                logs: logs(),
            }),
            None => None,
        };
        let rows = [TileRows::of(&ks.view::<T>(&keys)?), TileRows::of(&vs.view::<T>(&values)?)];
        let cache = Cache { q: queries(&qs.view::<T>(&q)?, a.scale)?, keys: rows[0], values: rows[1], tokens: a.tokens, group, clusters };
        launches::record(OP, a.q.dtype().as_str());
        Ok(Some(narrowed::<T>(OP, cache.attend()?, (b, q_heads, values.d))?))
    })
}

/// All queries, scaled and padded.
pub(super) fn queries<T: Element>(q: &View<'_, T>, scale: f64) -> Result<Vec<T::Filter>> {
    let Rows { b, n, d, .. } = *q.rows;
    let mut out = host::filled(OP, b * n * padded(d), T::Filter::of(0.0))?;
    for (i, out) in out.chunks_exact_mut(padded(d)).enumerate() {
        out.iter_mut().zip(q.row(i / n, i % n)).for_each(|(to, v)| *to = T::Filter::of(v.wide() * scale));
    }
    Ok(out)
}

/// Problems are key heads.
struct Cache<'a, E> {
    q: Vec<E>,
    keys: TileRows<'a, E>,
    values: TileRows<'a, E>,
    tokens: usize,
    /// Query heads of a key head.
    group: usize,
    clusters: Option<Clusters<'a, E>>,
}

/// The part of a problem that one task reads.
#[derive(Clone)]
enum Part {
    Tokens(Range<usize>),
    /// Tokens of a unit's list.
    Listed(usize, Range<usize>),
    Means(Range<usize>),
}

/// The clusters' scores, and the tokens that were chosen by them.
struct Choice<E> {
    /// A tile's, for each head, for each tile and problem.
    scores: Vec<Scores<E>>,
    /// A list for each problem and unit: the number of tokens of each cluster that are not read, then the tokens that are, counted from
    /// the first clustered one.
    lists: Vec<u32>,
}

impl<E: Lane> Cache<'_, E> {
    fn attend(&self) -> Result<Vec<E>> {
        let choice = match &self.clusters {
            Some(c) => {
                let scores = self.scores(c)?;
                Choice { lists: c.choose(&self.q, &scores, self.group)?, scores }
            }
            None => Choice { scores: vec![], lists: vec![] },
        };
        let read = |scratch: &mut Scratch<E>, p, part, heads, state: &mut [E]| {
            E::dispatch(Read { cache: self, choice: &choice, p, part, heads, state, scratch });
        };
        let heads = Heads { problems: self.keys.problems, group: self.group, width: self.values.d };
        let steps = CPU_ATTEND_ROWS.min(self.tokens) * (self.keys.d + heads.width) / 2;
        attend_parts(OP, heads, &self.parts(), steps, || self.scratch(), read)
    }

    fn parts(&self) -> Vec<(Part, Range<usize>)> {
        let all = 0..self.group;
        let pieces = |range: Range<usize>, step: usize| {
            range.clone().step_by(step).map(move |start| start..range.end.min(start + step))
        };
        let tokens = |range| pieces(range, CPU_ATTEND_ROWS).map(|r| (Part::Tokens(r), all.clone()));
        let Some(c) = &self.clusters else { return tokens(0..self.tokens).collect() };
        let end = c.of.sinks + c.clustered();
        let mut parts: Vec<_> = tokens(0..c.of.sinks).chain(tokens(end..self.tokens)).collect();
        let heads = self.group / c.units;
        for unit in 0..c.units {
            let listed = pieces(0..c.of.budget, CPU_ATTEND_ROWS).map(|r| Part::Listed(unit, r));
            parts.extend(listed.map(|part| (part, unit * heads..(unit + 1) * heads)));
        }
        if c.of.estimate {
            parts.extend(pieces(0..c.keys.n, CPU_ATTEND_ROWS).map(|r| (Part::Means(r), all.clone())));
        }
        parts
    }

    /// The scores of all mean keys, minus infinity for clusters without tokens.
    fn scores(&self, c: &Clusters<'_, E>) -> Result<Vec<Scores<E>>> {
        let (problems, group, tiles) = (self.keys.problems, self.group, c.tiles());
        let mut scores = host::filled(OP, problems * tiles * group, [E::of(0.0); TILE])?;
        let piece_len = CPU_ATTEND_ROWS / TILE * group;
        let pieces = |(p, scores)| {
            <[_]>::chunks_mut(scores, piece_len).enumerate().map(move |(piece, scores)| (p, piece, scores))
        };
        let tasks = scores.chunks_mut(tiles * group).enumerate().flat_map(pieces).collect();
        let steps = CPU_ATTEND_ROWS.min(c.keys.n) * self.keys.d / 2;
        host::for_each(
            tasks,
            steps,
            || vec![E::of(0.0); TILE * padded(self.keys.d)],
            |rows, (p, piece, scores)| {
                let first = piece * CPU_ATTEND_ROWS;
                E::dispatch(ScoreMeans { cache: self, clusters: c, p, first, scores, rows });
                Ok(())
            },
        )?;
        Ok(scores)
    }

    /// The queries of some heads.
    fn queries(&self, p: usize, heads: &Range<usize>) -> &[E] {
        let step = padded(self.keys.d);
        &self.q[(p * self.group + heads.start) * step..][..heads.len() * step]
    }

    fn scratch(&self) -> Scratch<E> {
        Scratch::new(&self.keys, &self.values, self.group)
    }
}

/// Scores mean keys from `first` on, for all heads. It is a struct for the reason that `Pack` in assign.rs is one.
struct ScoreMeans<'a, 'b, E> {
    cache: &'a Cache<'b, E>,
    clusters: &'a Clusters<'b, E>,
    p: usize,
    first: usize,
    scores: &'a mut [Scores<E>],
    rows: &'a mut [E],
}

impl<E: Lane> WithSimd for ScoreMeans<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { cache, clusters: c, p, first, scores, rows } = self;
        let (k, queries) = (c.keys.n, cache.queries(p, &(0..cache.group)));
        let tile = |first: usize| Tile::of(&c.keys, p, first.min(k) as u32..k as u32);
        for (first, scores) in (first..).step_by(TILE).zip(scores.chunks_mut(cache.group)) {
            let [keys, ahead] = [first, first + TILE].map(tile);
            simd.vectorize(Score { keys: &keys, queries, ahead: &ahead, rows, scores });
            for t in (0..TILE).filter(|t| first + t < k && c.members(p, first + t).is_empty()) {
                scores.iter_mut().for_each(|s| s[t] = E::of(f64::NEG_INFINITY));
            }
        }
    }
}

/// Reads a part, for some heads.
struct Read<'a, 'b, E> {
    cache: &'a Cache<'b, E>,
    choice: &'a Choice<E>,
    p: usize,
    part: Part,
    heads: Range<usize>,
    state: &'a mut [E],
    scratch: &'a mut Scratch<E>,
}

impl<E: Lane> WithSimd for Read<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { cache, choice, p, part, heads, state, scratch } = self;
        clear(state, cache.values.d);
        let (range, list) = match (part, &cache.clusters) {
            (Part::Means(range), Some(c)) => {
                let estimate = |first, scores: &mut [_]| choice.estimate(c, p, first, scores);
                return read_values(simd, &c.values, p, range, estimate, scratch, state);
            }
            (Part::Listed(unit, range), Some(c)) => {
                (range, Some((c.of.sinks as u32, c.list(&choice.lists, p, unit).1)))
            }
            (Part::Tokens(range), _) => (range, None),
            _ => unreachable!("only clusters have means and lists"),
        };
        let token = |i: usize| list.map_or(i as u32, |(first, list)| first + list[i]);
        let queries = cache.queries(p, &heads);
        read_tokens(simd, [&cache.keys, &cache.values], p, (range, token), queries, scratch, state);
    }
}

impl<E: Lane> Choice<E> {
    /// The scores of the clusters' means from `first` on, a tile, for the tokens that they have left.
    #[inline(always)]
    fn estimate(&self, c: &Clusters<'_, E>, p: usize, first: usize, scores: &mut [Scores<E>]) {
        let group = scores.len();
        scores.copy_from_slice(&self.scores[(p * c.tiles() + first / TILE) * group..][..group]);
        for (head, scores) in scores.iter_mut().enumerate() {
            add_logs(scores, &c.list(&self.lists, p, head * c.units / group).0[first..], &c.logs);
        }
    }
}
