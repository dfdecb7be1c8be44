//! Attention of one token over a cache whose clustered tokens are product codes.
//!
//! The passes are those of [`attend`](super::attend): mean keys are scored, every unit takes its best clusters up to the budget, and what is
//! read is shared out in parts that do not depend on the number of threads. Codes lie cluster by cluster, so that a cluster's are one run of
//! memory, and they are never unpacked. A query has a table of its products with all entries, from which the score of a token is its
//! cluster's and a number for each byte (asymmetric distances, Jegou et al. 2011), times its gain if there is one. The weights of tokens,
//! times their gains, are added up by byte, and only their sums meet the entries' columns.
//!
//! A key head costs a read of every mean, as bytes, and `budget * units` of codes.

use super::{
    attend::queries,
    clusters::{add_logs, bounds, logs, Ranks},
    lanes::Lane,
    parts::{attend_parts, narrowed, Heads},
    product_codes::{look_up, CodedView, BYTE},
    softmax::{add, clear, read_tokens, read_values, state_len, weigh, Score, Scratch},
    tensors::{lock, or, typed},
    tile::{padded, Scores, Tile, TileRows, TILE},
};
use crate::{
    error::Result,
    host, launches,
    operand::{Operand, Readable},
    request::CodedAttention,
    rows::Rows,
    tiles::CPU_ATTEND_ROWS,
};
use candle_core::Tensor;
use pulp::{Simd, WithSimd};
use std::ops::Range;

const OP: &str = "attend_coded";

pub(crate) fn attend_coded(a: &CodedAttention<'_>) -> Result<Option<Tensor>> {
    let rows = |t: &Tensor| Rows::of(Operand::from(t));
    let [Some(q), Some(keys), Some(values)] = [a.q, a.keys, a.values].map(rows) else { return Ok(None) };
    let (b, q_heads, _) = a.q.dims3()?;
    let (ck, cv) = (a.coded_keys, a.coded_values);
    let [k1, k2, k3, k4] = [ck.codes, ck.entries, ck.means.bytes, ck.means.scales];
    let [v1, v2, v3, v4] = [cv.codes, cv.entries, cv.means.bytes, cv.means.scales];
    let coded = [a.offsets, a.spreads, k1, k2, k3, k4, v1, v2, v3, v4];
    if coded.into_iter().chain(ck.gains).chain(cv.gains).any(|t| !t.is_contiguous()) {
        return Ok(None);
    }
    typed!(a.q.dtype(), T => {
        let [offsets, spreads, k1, k2, k3, k4, v1, v2, v3, v4] = coded.map(|t| -> &dyn Readable { t });
        let (k5, v5) = (or(ck.gains, k1), or(cv.gains, v1));
        let inputs: [&dyn Readable; 15] =
            [&q.operand, &keys.operand, &values.operand, offsets, spreads, k1, k2, k3, k4, k5, v1, v2, v3, v4, v5];
        let [qs, ks, vs, offsets, spreads, k1, k2, k3, k4, k5, v1, v2, v3, v4, v5] = lock(inputs);
        let key_gains = ck.gains.map(|_| k5.flat()).transpose()?;
        let value_gains = cv.gains.map(|_| v5.flat()).transpose()?;
        let (group, n) = (q_heads * b / keys.b, a.offsets.dims()[2] - 1);
        let mean_keys = TileRows::of_codes(k3.flat()?, k4.flat()?, n, keys.d);
        let mean_values = TileRows::of_codes(v3.flat()?, v4.flat()?, n, values.d);
        let cache = Cache {
            q: queries(&qs.view::<T>(&q)?, a.scale)?,
            keys: TileRows::of(&ks.view::<T>(&keys)?),
            values: TileRows::of(&vs.view::<T>(&values)?),
            offsets: offsets.flat()?,
            spreads: spreads.flat()?,
            coded_keys: CodedView::new(&ck, k1.flat()?, k2.flat::<T>()?, mean_keys, key_gains)?,
            coded_values: CodedView::new(&cv, v1.flat()?, v2.flat::<T>()?, mean_values, value_gains)?,
            k: n,
            group,
            units: if a.shared { 1 } else { group },
            logs: logs(),
            of: a,
        };
        launches::record(OP, a.q.dtype().as_str());
        Ok(Some(narrowed::<T>(OP, cache.attend()?, (b, q_heads, values.d))?))
    })
}

/// Problems are key heads.
struct Cache<'a, E> {
    q: Vec<E>,
    keys: TileRows<'a, E>,
    values: TileRows<'a, E>,
    coded_keys: CodedView<'a, E>,
    coded_values: CodedView<'a, E>,
    offsets: &'a [u32],
    spreads: &'a [E],
    /// Clusters of a problem.
    k: usize,
    /// Query heads of a key head.
    group: usize,
    /// The number of choices that a group's heads make: one together, or one each.
    units: usize,
    logs: Vec<E>,
    of: &'a CodedAttention<'a>,
}

/// A unit reads this of the codes.
#[derive(Default)]
struct Choice {
    /// Clusters, and how many of their tokens, the first ones.
    read: Vec<(usize, usize)>,
    /// The number of tokens of each cluster that are not read.
    left: Vec<u32>,
}

/// The part of a problem that one task reads.
#[derive(Clone)]
enum Part {
    /// Tokens that are no codes.
    Tokens(Range<usize>),
    /// Codes, counted along what a unit reads.
    Codes(usize, Range<usize>),
    Means(Range<usize>),
}

impl<E: Lane> Cache<'_, E> {
    fn attend(&self) -> Result<Vec<E>> {
        let scores = self.scores()?;
        let choices = self.choose(&scores)?;
        let read = |scratch: &mut CodesScratch<E>, p, part, heads, state: &mut [E]| {
            let (scores, choices) = (&scores, &choices);
            E::dispatch(Read { cache: self, scores, choices, p, part, heads, state, scratch });
        };
        let steps = CPU_ATTEND_ROWS * (self.coded_keys.bytes + self.coded_values.bytes);
        let zero = E::of(0.0);
        let scratch = || CodesScratch {
            tiles: Scratch::new(&self.keys, &self.values, self.group),
            row: vec![zero; padded(self.values.d)],
            scores: vec![],
            entries: vec![],
            tables: vec![],
        };
        let heads = Heads { problems: self.keys.problems, group: self.group, width: self.values.d };
        attend_parts(OP, heads, &self.parts(), steps, scratch, read)
    }

    fn parts(&self) -> Vec<(Part, Range<usize>)> {
        let pieces = |len: usize| (0..len).step_by(CPU_ATTEND_ROWS).map(move |i| i..len.min(i + CPU_ATTEND_ROWS));
        let mut parts: Vec<_> = pieces(self.of.tokens).map(|r| (Part::Tokens(r), 0..self.group)).collect();
        let heads = self.group / self.units;
        for unit in 0..self.units {
            let codes = pieces(self.of.budget).map(|r| Part::Codes(unit, r));
            parts.extend(codes.map(|part| (part, unit * heads..(unit + 1) * heads)));
        }
        if self.of.estimate {
            parts.extend(pieces(self.k).map(|r| (Part::Means(r), 0..self.group)));
        }
        parts
    }

    fn tiles(&self) -> usize {
        self.k.div_ceil(TILE)
    }

    /// The scores of all mean keys, minus infinity for clusters without tokens: a tile's, for each head, for each tile and problem.
    fn scores(&self) -> Result<Vec<Scores<E>>> {
        let mut scores = host::filled(OP, self.keys.problems * self.tiles() * self.group, [E::of(0.0); TILE])?;
        let tasks = scores.chunks_mut(self.group).enumerate().collect();
        let d = padded(self.keys.d);
        let score = |rows: &mut Vec<E>, (tile, scores): (usize, &mut [Scores<E>])| {
            let (p, first) = (tile / self.tiles(), tile % self.tiles() * TILE);
            let tile = |first: usize| Tile::of(self.coded_keys.means(), p, first.min(self.k) as u32..self.k as u32);
            let queries = self.queries(p, &(0..self.group));
            let [keys, ahead] = [first, first + TILE].map(tile);
            E::dispatch(Score { keys: &keys, queries, ahead: &ahead, rows, scores });
            let offsets = &self.offsets[p * (self.k + 1)..][..self.k + 1];
            for t in (0..TILE).filter(|t| first + t < self.k && offsets[first + t] == offsets[first + t + 1]) {
                scores.iter_mut().for_each(|s| s[t] = E::of(f64::NEG_INFINITY));
            }
            Ok(())
        };
        host::for_each(tasks, TILE * d * (1 + self.group) / 8, || vec![E::of(0.0); TILE * d], score)?;
        Ok(scores)
    }

    /// The choices of the units of each problem.
    fn choose(&self, scores: &[Scores<E>]) -> Result<Vec<Choice>> {
        let (k, tiles, group) = (self.k, self.tiles(), self.group);
        let mut choices: Vec<Choice> = (0..self.keys.problems * self.units).map(|_| Choice::default()).collect();
        let choose = |ranks: &mut Ranks<E>, (i, choice): (usize, &mut Choice)| {
            let (p, unit) = (i / self.units, i % self.units);
            choice.left = self.offsets[p * (k + 1)..][..k + 1].windows(2).map(|ends| ends[1] - ends[0]).collect();
            let mut room = self.of.budget;
            if room == 0 {
                return Ok(());
            }
            let scores = scores[p * tiles * group..][..tiles * group].chunks(group).enumerate();
            let of_head = |head: usize| {
                let bounds = bounds(self.query(p, head), self.of.reach, &self.spreads[p * k..][..k]);
                scores.clone().map(move |(i, tile)| bounds(i, tile[head]))
            };
            ranks.of.clear();
            match self.of.shared {
                true => (0..group).for_each(|head| ranks.add_softmax(of_head(head))),
                false => ranks.of.extend(of_head(unit)),
            }
            for &key in ranks.best(&choice.left, room) {
                let j = key as u32 as usize;
                let taken = room.min(choice.left[j] as usize);
                choice.read.extend((taken > 0).then_some((j, taken)));
                (room, choice.left[j]) = (room - taken, choice.left[j] - taken as u32);
            }
            Ok(())
        };
        host::for_each(choices.iter_mut().enumerate().collect(), 2 * k * group / self.units, Ranks::default, choose)?;
        Ok(choices)
    }

    /// The index of the scores of a cluster's tile.
    #[inline(always)]
    fn tile(&self, p: usize, j: usize, head: usize) -> usize {
        (p * self.tiles() + j / TILE) * self.group + head
    }

    /// The codes of a part of what a unit reads: clusters, and which of a problem's codes are read of each.
    fn runs<'c>(
        &'c self,
        p: usize,
        choice: &'c Choice,
        part: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + Clone + 'c {
        let (offsets, mut end) = (&self.offsets[p * (self.k + 1)..], 0);
        choice.read.iter().filter_map(move |&(j, taken)| {
            let first = end;
            end += taken;
            let (from, to) = (part.start.max(first), part.end.min(end));
            let at = offsets[j] as usize;
            (from < to).then(|| (j, at + from - first..at + to - first))
        })
    }

    /// The query of a head, padded.
    fn query(&self, p: usize, head: usize) -> &[E] {
        self.queries(p, &(head..head + 1))
    }

    /// The queries of some heads.
    fn queries(&self, p: usize, heads: &Range<usize>) -> &[E] {
        let step = padded(self.keys.d);
        &self.q[(p * self.group + heads.start) * step..][..heads.len() * step]
    }
}

/// A task uses this from part to part.
struct CodesScratch<E> {
    tiles: Scratch<E>,
    row: Vec<E>,
    /// Of a part's codes.
    scores: Vec<E>,
    entries: Vec<E>,
    /// 256 numbers for each byte of a row.
    tables: Vec<E>,
}

/// Reads a part, for some heads. It is a struct for the reason that `Pack` in assign.rs is one.
struct Read<'a, 'b, E> {
    cache: &'a Cache<'b, E>,
    scores: &'a [Scores<E>],
    choices: &'a [Choice],
    p: usize,
    part: Part,
    heads: Range<usize>,
    state: &'a mut [E],
    scratch: &'a mut CodesScratch<E>,
}

impl<E: Lane> WithSimd for Read<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (cache, p) = (self.cache, self.p);
        clear(self.state, cache.values.d);
        match self.part.clone() {
            Part::Tokens(range) => {
                let (rows, queries) = ([&cache.keys, &cache.values], cache.queries(p, &self.heads));
                let token = |i: usize| i as u32;
                read_tokens(simd, rows, p, (range, token), queries, &mut self.scratch.tiles, self.state);
            }
            Part::Codes(unit, range) => self.codes(simd, unit, range),
            Part::Means(range) => {
                let estimate = |first: usize, scores: &mut [Scores<E>]| {
                    scores.copy_from_slice(&self.scores[cache.tile(p, first, 0)..][..cache.group]);
                    for (head, scores) in scores.iter_mut().enumerate() {
                        let left = &self.choices[p * cache.units + head * cache.units / cache.group].left;
                        add_logs(scores, &left[first..], &cache.logs);
                    }
                };
                let tiles = &mut self.scratch.tiles;
                read_values(simd, cache.coded_values.means(), p, range, estimate, tiles, self.state);
            }
        }
    }
}

impl<E: Lane> Read<'_, '_, E> {
    #[inline(always)]
    fn codes<S: Simd>(&mut self, simd: S, unit: usize, range: Range<usize>) {
        let Self { cache, choices, p, heads, state, scratch, .. } = self;
        let CodesScratch { row, scores, entries, tables, .. } = &mut **scratch;
        let (p, width, zero) = (*p, cache.values.d, E::of(0.0));
        let runs = cache.runs(p, &choices[p * cache.units + unit], range);
        for (head, state) in heads.clone().zip(state.chunks_exact_mut(state_len(width))) {
            cache.coded_keys.products(cache.query(p, head), cache.coded_keys.entries(p, entries), tables);
            scores.clear();
            for (j, run) in runs.clone() {
                let mean = self.scores[cache.tile(p, j, head)][j % TILE];
                let at = scores.len();
                scores.extend(cache.coded_keys.rows(p, run.clone()).map(|codes| look_up(codes, tables)));
                cache.coded_keys.multiply(p, run, &mut scores[at..]);
                scores[at..].iter_mut().for_each(|score| *score = mean.add(*score));
            }
            weigh(scores, state, width);

            tables.clear();
            tables.resize(cache.coded_values.bytes * BYTE, zero);
            let mut rest = &mut scores[..];
            for (j, run) in runs.clone() {
                let weights = rest.split_off_mut(..run.len()).expect("a weight for each token");
                let total = weights.iter().fold(zero, |total, &weight| total.add(weight));
                cache.coded_values.multiply(p, run.clone(), weights);
                for (codes, &weight) in cache.coded_values.rows(p, run).zip(&*weights) {
                    for (&code, sums) in codes.iter().zip(tables.chunks_exact_mut(BYTE)) {
                        let sum = &mut sums[usize::from(code)];
                        *sum = sum.add(weight);
                    }
                }
                cache.coded_values.mean(p, j, row);
                add(simd, total, &row[..padded(width)], &mut state[..padded(width)]);
            }
            cache.coded_values.add_entries(tables, cache.coded_values.entries(p, entries), state);
        }
    }
}
