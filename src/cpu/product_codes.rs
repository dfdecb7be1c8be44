//! Rows that are a mean and product codes of the rest (Jegou et al. 2011), as they lie in memory.

use super::{
    lanes::Lane,
    tensors::Element,
    tile::{padded, TileRows},
};
use crate::{error::Result, request::Coded, tiles::GAINS_PER_OCTAVE};
use std::ops::Range;

/// Values of a byte, and of half of one.
pub(super) const BYTE: usize = 256;
const HALF: usize = 16;

/// The coded rows of all problems.
pub(super) struct CodedView<'a, E> {
    codes: &'a [u8],
    /// A row for each problem.
    entries: TileRows<'a, E>,
    means: TileRows<'a, E>,
    /// A code for each row, and what codes stand for.
    gains: Option<(&'a [u8], Vec<E>)>,
    /// Bytes of a row's codes, and codes of a problem.
    pub(super) bytes: usize,
    tokens: usize,
    /// Entries of a piece, and their columns.
    count: usize,
    columns: usize,
    /// Columns of a row.
    d: usize,
}

impl<'a, E: Lane> CodedView<'a, E> {
    pub(super) fn new(
        of: &Coded<'_>,
        codes: &'a [u8],
        entries: &'a [impl Element<Filter = E>],
        means: TileRows<'a, E>,
        gains: Option<&'a [u8]>,
    ) -> Result<Self> {
        let ((_, _, tokens, bytes), d) = (of.codes.dims4()?, means.d);
        let (batch, heads, tables, count, columns) = of.entries.dims5()?;
        let entries = TileRows::contiguous(entries, [batch * heads, 1, tables * count * columns]);
        let gain = |code: usize| E::of((-(code as f64) / GAINS_PER_OCTAVE as f64).exp2());
        let gains = gains.map(|codes| (codes, (0..BYTE).map(gain).collect()));
        Ok(Self { codes, entries, means, gains, bytes, tokens, count, columns, d })
    }

    pub(super) fn means(&self) -> &TileRows<'a, E> {
        &self.means
    }

    /// The mean row of a cluster, padded.
    #[inline(always)]
    pub(super) fn mean(&self, p: usize, j: usize, out: &mut [E]) {
        let len = padded(self.d);
        self.means.padded(p, j, &mut out[..len]);
    }

    /// The codes of some tokens, in the order of the clusters, row by row.
    #[inline(always)]
    pub(super) fn rows(&self, p: usize, tokens: Range<usize>) -> std::slice::ChunksExact<'a, u8> {
        let first = p * self.tokens + tokens.start;
        self.codes[first * self.bytes..][..tokens.len() * self.bytes].chunks_exact(self.bytes)
    }

    /// Multiplies a number of each of the same tokens by its gain, if there are gains: gain and shape (Sabin and Gray 1984).
    #[inline(always)]
    pub(super) fn multiply(&self, p: usize, tokens: Range<usize>, numbers: &mut [E]) {
        let Some((codes, gains)) = &self.gains else { return };
        let codes = &codes[p * self.tokens + tokens.start..][..tokens.len()];
        numbers.iter_mut().zip(codes).for_each(|(v, &code)| *v = v.mul(gains[usize::from(code)]));
    }

    /// The entries of a problem, piece by piece.
    #[inline(always)]
    pub(super) fn entries<'s>(&'s self, p: usize, scratch: &'s mut Vec<E>) -> &'s [E] {
        scratch.resize(self.entries.d, E::of(0.0));
        self.entries.padded(p, 0, scratch)
    }

    /// The products of a query with what each byte of a row can stand for: a table of 256 for each.
    #[inline(always)]
    pub(super) fn products(&self, query: &[E], entries: &[E], tables: &mut Vec<E>) {
        let zero = E::of(0.0);
        tables.resize(self.bytes * BYTE, zero);
        let pieces = query[..self.d].chunks_exact(self.columns);
        // One table serves all pieces, or there is one for each.
        let mut pieces = pieces.zip(entries.chunks_exact(self.count * self.columns).cycle());
        let mut next = |out: &mut [E]| {
            let (query, entries) = pieces.next().expect("a piece for each code");
            for (out, entry) in out.iter_mut().zip(entries.chunks_exact(self.columns)) {
                *out = entry.iter().zip(query).fold(zero, |sum, (a, b)| sum.add(a.mul(*b)));
            }
        };
        for table in tables.chunks_exact_mut(BYTE) {
            if self.count == BYTE {
                next(table);
                continue;
            }
            let [mut low, mut high] = [[zero; HALF]; 2];
            next(&mut low);
            next(&mut high);
            for (table, high) in table.chunks_exact_mut(HALF).zip(high) {
                table.iter_mut().zip(low).for_each(|(out, low)| *out = low.add(high));
            }
        }
    }

    /// Adds the entries to a sum of rows, each times the weight of the bytes that stand for it: 256 for each byte of a row.
    #[inline(always)]
    pub(super) fn add_entries(&self, weights: &[E], entries: &[E], sums: &mut [E]) {
        let tables = entries.chunks_exact(self.count * self.columns).cycle();
        let mut pieces = sums[..self.d].chunks_exact_mut(self.columns).zip(tables);
        let mut add = |weights: &[E]| {
            let (sums, entries) = pieces.next().expect("a piece for each code");
            for (&weight, entry) in weights.iter().zip(entries.chunks_exact(self.columns)) {
                sums.iter_mut().zip(entry).for_each(|(sum, v)| *sum = sum.add(weight.mul(*v)));
            }
        };
        for weights in weights.chunks_exact(BYTE) {
            if self.count == BYTE {
                add(weights);
                continue;
            }
            let [mut low, mut high] = [[E::of(0.0); HALF]; 2];
            for (high, weights) in high.iter_mut().zip(weights.chunks_exact(HALF)) {
                for (low, &weight) in low.iter_mut().zip(weights) {
                    (*low, *high) = (low.add(weight), high.add(weight));
                }
            }
            add(&low);
            add(&high);
        }
    }
}

/// The sum of what the tables say of each code.
#[inline(always)]
pub(super) fn look_up<E: Lane>(codes: &[u8], tables: &[E]) -> E {
    let mut sums = [E::of(0.0); 4];
    for (codes, tables) in codes.chunks(4).zip(tables.chunks(4 * BYTE)) {
        for ((&code, table), sum) in codes.iter().zip(tables.chunks_exact(BYTE)).zip(&mut sums) {
            *sum = sum.add(table[usize::from(code)]);
        }
    }
    sums[0].add(sums[1]).add(sums[2].add(sums[3]))
}
