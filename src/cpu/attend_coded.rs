//! Attention of one token over a cache whose clustered tokens are product codes.
//!
//! The passes are those of [`attend`](super::attend): mean keys are scored, every unit takes its best clusters up to the budget, and what is
//! read is shared out in parts that do not depend on the number of threads. Codes lie cluster by cluster, so that a cluster's are one run of
//! memory, and they are never unpacked. A query has a table of its products with all entries, from which the score of a token is its
//! cluster's and a number for each byte (asymmetric distances, Jegou et al. 2011). The weights of tokens are added up by byte, and only their
//! sums meet the entries' columns.
//!
//! A key head costs a read of every mean, as bytes, and `budget * units` of codes.

use super::{
    attend::queries,
    clusters::{bounds, logs, Ranks},
    lanes::Lane,
    parts::{attend_parts, Heads},
    product_codes::{look_up, CodedView, BYTE},
    scalar::Scalar,
    softmax::{clear, state_len},
    tensors::{lock, tensor, typed, Element, View},
    tile::{padded, CodedRows, Scores, TILE},
    weigh::{add, add_to_heads, dot, weigh_heads},
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
    if coded.iter().any(|t| !t.is_contiguous()) {
        return Ok(None);
    }
    typed!(a.q.dtype(), T => {
        let [offsets, spreads, k1, k2, k3, k4, v1, v2, v3, v4] = coded.map(|t| -> &dyn Readable { t });
        let inputs: [&dyn Readable; 13] =
            [&q.operand, &keys.operand, &values.operand, offsets, spreads, k1, k2, k3, k4, v1, v2, v3, v4];
        let [qs, ks, vs, offsets, spreads, k1, k2, k3, k4, v1, v2, v3, v4] = lock(inputs);
        let (group, n) = (q_heads * b / keys.b, a.offsets.dims()[2] - 1);
        let mean_keys = CodedRows::<<T as Element>::Filter> { bytes: k3.flat()?, scales: k4.flat()?, n, d: keys.d };
        let mean_values = CodedRows { bytes: v3.flat()?, scales: v4.flat()?, n, d: values.d };
        let cache = Cache::<T> {
            q: queries(&qs.view::<T>(&q)?, a.scale)?,
            keys: ks.view(&keys)?,
            values: vs.view(&values)?,
            offsets: offsets.flat()?,
            spreads: spreads.flat()?,
            coded_keys: CodedView::new(&ck, k1.flat()?, k2.flat()?, mean_keys)?,
            coded_values: CodedView::new(&cv, v1.flat()?, v2.flat()?, mean_values)?,
            k: n,
            group,
            units: if a.shared { 1 } else { group },
            logs: logs(),
            of: a,
        };
        launches::record(OP, a.q.dtype().as_str());
        Ok(Some(tensor(cache.attend()?, (b, q_heads, values.d))?))
    })
}

/// Problems are key heads.
struct Cache<'a, T: Element> {
    q: Vec<T::Filter>,
    keys: View<'a, T>,
    values: View<'a, T>,
    coded_keys: CodedView<'a, T>,
    coded_values: CodedView<'a, T>,
    offsets: &'a [u32],
    spreads: &'a [T::Filter],
    /// Clusters of a problem.
    k: usize,
    /// Query heads of a key head.
    group: usize,
    /// The number of choices that a group's heads make: one together, or one each.
    units: usize,
    logs: Vec<T::Filter>,
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

impl<T: Element> Cache<'_, T>
where
    T::Filter: Lane,
{
    fn attend(&self) -> Result<Vec<T>> {
        let scores = self.scores()?;
        let choices = self.choose(&scores)?;
        let read = |scratch: &mut Scratch<T::Filter>, p, part, heads, state: &mut [T::Filter]| {
            let (scores, choices) = (&scores, &choices);
            pulp::Arch::new().dispatch(Read { cache: self, scores, choices, p, part, heads, state, scratch });
        };
        let steps = CPU_ATTEND_ROWS * (self.coded_keys.bytes + self.coded_values.bytes);
        let scratch = || Scratch { row: vec![], scores: vec![], entries: vec![], tables: vec![] };
        let heads = Heads { problems: self.keys.rows.b, group: self.group, width: self.values.rows.d };
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
    fn scores(&self) -> Result<Vec<Scores<T::Filter>>> {
        let least = T::Filter::of(f64::NEG_INFINITY);
        let mut scores = host::filled(OP, self.keys.rows.b * self.tiles() * self.group, [least; TILE])?;
        let tasks = scores.chunks_mut(self.group).enumerate().collect();
        let d = padded(self.keys.rows.d);
        let score = |row: &mut Vec<T::Filter>, (tile, scores): (usize, &mut [Scores<T::Filter>])| {
            let (p, first) = (tile / self.tiles(), tile % self.tiles() * TILE);
            pulp::Arch::new().dispatch(ScoreMeans { cache: self, p, first, row, scores });
            Ok(())
        };
        host::for_each(tasks, TILE * d * (1 + self.group) / 8, || vec![T::Filter::of(0.0); d], score)?;
        Ok(scores)
    }

    /// The choices of the units of each problem.
    fn choose(&self, scores: &[Scores<T::Filter>]) -> Result<Vec<Choice>> {
        let (k, tiles, group) = (self.k, self.tiles(), self.group);
        let mut choices: Vec<Choice> = (0..self.keys.rows.b * self.units).map(|_| Choice::default()).collect();
        let choose = |ranks: &mut Ranks<T::Filter>, (i, choice): (usize, &mut Choice)| {
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

    /// The logarithm of a number of tokens.
    fn log(&self, tokens: u32) -> T::Filter {
        self.logs.get(tokens as usize).copied().unwrap_or_else(|| T::Filter::of(f64::from(tokens).ln()))
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
    fn query(&self, p: usize, head: usize) -> &[T::Filter] {
        let step = padded(self.keys.rows.d);
        &self.q[(p * self.group + head) * step..][..step]
    }
}

/// A task uses this from part to part.
struct Scratch<E> {
    row: Vec<E>,
    /// Of a part's rows, for each head.
    scores: Vec<E>,
    entries: Vec<E>,
    /// 256 numbers for each byte of a row.
    tables: Vec<E>,
}

/// Scores the mean keys of a tile. It is a struct for the reason that `Pack` in assign.rs is one.
struct ScoreMeans<'a, 'b, T: Element> {
    cache: &'a Cache<'b, T>,
    p: usize,
    first: usize,
    row: &'a mut [T::Filter],
    scores: &'a mut [Scores<T::Filter>],
}

impl<T: Element> WithSimd for ScoreMeans<'_, '_, T>
where
    T::Filter: Lane,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { cache, p, first, row, scores } = self;
        let offsets = &cache.offsets[p * (cache.k + 1)..][..cache.k + 1];
        for j in (first..cache.k.min(first + TILE)).filter(|&j| offsets[j] < offsets[j + 1]) {
            cache.coded_keys.mean(p, j, row);
            for (head, scores) in scores.iter_mut().enumerate() {
                scores[j - first] = dot(simd, cache.query(p, head), row);
            }
        }
    }
}

/// Reads a part, for some heads.
struct Read<'a, 'b, T: Element> {
    cache: &'a Cache<'b, T>,
    scores: &'a [Scores<T::Filter>],
    choices: &'a [Choice],
    p: usize,
    part: Part,
    heads: Range<usize>,
    state: &'a mut [T::Filter],
    scratch: &'a mut Scratch<T::Filter>,
}

impl<T: Element> WithSimd for Read<'_, '_, T>
where
    T::Filter: Lane,
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (d, width) = (self.cache.keys.rows.d, self.cache.values.rows.d);
        clear(self.state, width);
        self.scratch.row.clear();
        self.scratch.row.resize(padded(d.max(width)), T::Filter::of(0.0));
        match self.part.clone() {
            Part::Tokens(range) => self.tokens(simd, range),
            Part::Codes(unit, range) => self.codes(simd, unit, range),
            Part::Means(range) => self.means(simd, range),
        }
    }
}

impl<T: Element> Read<'_, '_, T>
where
    T::Filter: Lane,
{
    #[inline(always)]
    fn tokens<S: Simd>(&mut self, simd: S, range: Range<usize>) {
        let Self { cache, p, heads, state, scratch: Scratch { row, scores, .. }, .. } = self;
        let (d, width, zero) = (cache.keys.rows.d, cache.values.rows.d, T::Filter::of(0.0));
        scores.clear();
        scores.resize(range.len() * heads.len(), zero);
        for (i, token) in range.clone().enumerate() {
            T::filter_row(cache.keys.row(*p, token), &mut row[..d]);
            for (head, scores) in heads.clone().zip(scores.chunks_exact_mut(range.len())) {
                scores[i] = dot(simd, cache.query(*p, head), &row[..padded(d)]);
            }
        }
        row.fill(zero);
        weigh_heads(scores, range.len(), state, width);
        for (i, token) in range.clone().enumerate() {
            T::filter_row(cache.values.row(*p, token), &mut row[..width]);
            add_to_heads(simd, &scores[i..], range.len(), row, state, width);
        }
    }

    #[inline(always)]
    fn means<S: Simd>(&mut self, simd: S, range: Range<usize>) {
        let Self { cache, choices, p, state, scratch: Scratch { row, scores, .. }, .. } = self;
        let (group, width) = (cache.group, cache.values.rows.d);
        scores.clear();
        for head in 0..group {
            let left = &choices[*p * cache.units + head * cache.units / group].left;
            scores.extend(range.clone().map(|j| match left[j] {
                0 => T::Filter::of(f64::NEG_INFINITY),
                left => self.scores[cache.tile(*p, j, head)][j % TILE].add(cache.log(left)),
            }));
        }
        weigh_heads(scores, range.len(), state, width);
        for (i, j) in range.clone().enumerate() {
            cache.coded_values.mean(*p, j, row);
            add_to_heads(simd, &scores[i..], range.len(), row, state, width);
        }
    }

    #[inline(always)]
    fn codes<S: Simd>(&mut self, simd: S, unit: usize, range: Range<usize>) {
        let Self { cache, choices, p, heads, state, scratch, .. } = self;
        let Scratch { row, scores, entries, tables } = &mut **scratch;
        let (p, width, zero) = (*p, cache.values.rows.d, T::Filter::of(0.0));
        let runs = cache.runs(p, &choices[p * cache.units + unit], range);
        for (head, state) in heads.clone().zip(state.chunks_exact_mut(state_len(width))) {
            cache.coded_keys.entries(p, entries);
            cache.coded_keys.products(cache.query(p, head), entries, tables);
            scores.clear();
            for (j, run) in runs.clone() {
                let mean = self.scores[cache.tile(p, j, head)][j % TILE];
                scores.extend(cache.coded_keys.rows(p, run).map(|codes| mean.add(look_up(codes, tables))));
            }
            let rows = scores.len();
            weigh_heads(scores, rows, state, width);

            cache.coded_values.entries(p, entries);
            tables.clear();
            tables.resize(cache.coded_values.bytes * BYTE, zero);
            let mut weights = scores.iter();
            for (j, run) in runs.clone() {
                let mut total = zero;
                for (codes, &weight) in cache.coded_values.rows(p, run).zip(&mut weights) {
                    total = total.add(weight);
                    for (&code, sums) in codes.iter().zip(tables.chunks_exact_mut(BYTE)) {
                        let sum = &mut sums[usize::from(code)];
                        *sum = sum.add(weight);
                    }
                }
                cache.coded_values.mean(p, j, row);
                add(simd, total, &row[..padded(width)], &mut state[..padded(width)]);
            }
            cache.coded_values.add_entries(tables, entries, state);
        }
    }
}
