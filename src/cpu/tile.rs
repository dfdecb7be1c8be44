//! Some rows of a problem, as numbers that are computed with, padded to whole vectors.

use super::{
    lanes::Lane,
    tensors::{bf16_row, f16_row, prefetch, Element, Numbers, View},
};
use crate::request::Codes;
use std::ops::Range;

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Rows in scratch are padded to so many elements, which are whole vectors of any length.
pub(super) const PAD: usize = 16;

/// The scores of a tile, or their weights.
pub(super) type Scores<E> = [E; TILE];

/// Elements of a padded row.
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PAD)
}

/// Rows of problems, as they lie in memory.
#[derive(Clone, Copy)]
pub(super) struct TileRows<'a, E> {
    numbers: RowNumbers<'a, E>,
    problem_stride: usize,
    row_stride: usize,
    pub(super) problems: usize,
    /// Rows of a problem, and their columns.
    pub(super) n: usize,
    pub(super) d: usize,
}

#[derive(Clone, Copy)]
enum RowNumbers<'a, E> {
    Stored(Numbers<'a, E>),
    /// [`Codes`]: bytes, and a scale for each row.
    Coded(&'a [u8], &'a [E]),
}

impl<'a, E: Lane> TileRows<'a, E> {
    pub(super) fn of<T: Element<Filter = E>>(view: &View<'a, T>) -> Self {
        let rows = view.rows;
        Self {
            numbers: RowNumbers::Stored(view.numbers()),
            problem_stride: rows.batch_stride,
            row_stride: rows.row_stride,
            problems: rows.b,
            n: rows.n,
            d: rows.d,
        }
    }

    /// All of contiguous rows `(problems, n, d)`.
    pub(super) fn contiguous<T: Element<Filter = E>>(all: &'a [T], [problems, n, d]: [usize; 3]) -> Self {
        let numbers = RowNumbers::Stored(T::numbers(all));
        Self { numbers, problem_stride: n * d, row_stride: d, problems, n, d }
    }

    /// Rows that are [`Codes`]: `(problems, n, d)` and `(problems, n)`.
    pub(super) fn of_codes(bytes: &'a [u8], scales: &'a [E], n: usize, d: usize) -> Self {
        let problems = scales.len() / n.max(1);
        let numbers = RowNumbers::Coded(bytes, scales);
        Self { numbers, problem_stride: n * d, row_stride: d, problems, n, d }
    }

    #[inline(always)]
    fn range(&self, p: usize, row: usize) -> Range<usize> {
        let start = p * self.problem_stride + row * self.row_stride;
        start..start + self.d
    }

    #[inline(always)]
    fn prefetch(&self, p: usize, row: usize) {
        let range = self.range(p, row);
        match self.numbers {
            RowNumbers::Stored(Numbers::F16(all)) => prefetch(&all[range]),
            RowNumbers::Stored(Numbers::BF16(all)) => prefetch(&all[range]),
            RowNumbers::Stored(Numbers::Same(all)) => prefetch(&all[range]),
            RowNumbers::Coded(all, _) => prefetch(&all[range]),
        }
    }

    /// The row, padded with zeros: where it lies if it is, or widened in `scratch`.
    #[inline(always)]
    pub(super) fn padded<'s>(&self, p: usize, row: usize, scratch: &'s mut [E]) -> &'s [E]
    where
        'a: 's,
    {
        let range = self.range(p, row);
        let (out, pad) = scratch.split_at_mut(self.d);
        match self.numbers {
            RowNumbers::Stored(Numbers::F16(all)) => f16_row(&all[range], out),
            RowNumbers::Stored(Numbers::BF16(all)) => bf16_row(&all[range], out),
            RowNumbers::Stored(Numbers::Same(all)) if pad.is_empty() => return &all[range],
            RowNumbers::Stored(Numbers::Same(all)) => out.copy_from_slice(&all[range]),
            RowNumbers::Coded(all, scales) => {
                let scale = scales[p * self.n + row];
                for (to, &byte) in out.iter_mut().zip(&all[range]) {
                    *to = E::from(i16::from(byte) - i16::from(Codes::ZERO)).mul(scale);
                }
            }
        }
        pad.fill(E::of(0.0));
        scratch
    }
}

/// A tile of rows of problem `p`.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, E> {
    pub(super) of: &'a TileRows<'a, E>,
    pub(super) p: usize,
    pub(super) rows: [u32; TILE],
    pub(super) count: usize,
}

impl<'a, E: Lane> Tile<'a, E> {
    /// Up to a tile of `rows`.
    #[inline(always)]
    pub(super) fn of(of: &'a TileRows<'a, E>, p: usize, rows: impl ExactSizeIterator<Item = u32>) -> Self {
        let (mut tile, count) = ([0; TILE], rows.len().min(TILE));
        tile.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
        Self { of, p, rows: tile, count }
    }

    /// Asks for some of the rows ahead of their turn.
    #[inline(always)]
    pub(super) fn prefetch(&self, rows: Range<usize>) {
        for &row in &self.rows[rows.start.min(self.count)..rows.end.min(self.count)] {
            self.of.prefetch(self.p, row as usize);
        }
    }

    /// The rows, padded. Beyond their number empty.
    #[inline(always)]
    pub(super) fn padded<'s>(&'s self, scratch: &'s mut [E]) -> [&'s [E]; TILE] {
        let step = padded(self.of.d);
        let mut rows = [&[][..]; TILE];
        let read = rows.iter_mut().zip(&self.rows[..self.count]).zip(scratch.chunks_exact_mut(step));
        for ((to, &row), scratch) in read {
            *to = self.of.padded(self.p, row as usize, scratch);
        }
        rows
    }
}
