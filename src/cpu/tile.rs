//! Some rows of a problem, as numbers that are computed with, padded to whole vectors.

use super::{
    lanes::Lane,
    scalar::Scalar,
    tensors::{prefetch, Element, View},
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

/// Rows of problems, as numbers that a type of lanes has.
pub(super) trait TileRows<E> {
    fn columns(&self) -> usize;
    fn prefetch(&self, p: usize, row: usize);
    /// The row, padded with zeros: where it lies if it is, or widened in `scratch`.
    fn padded<'s>(&'s self, p: usize, row: usize, scratch: &'s mut [E]) -> &'s [E];
}

impl<T: Element> TileRows<T::Filter> for View<'_, T>
where
    T::Filter: Lane,
{
    #[inline(always)]
    fn columns(&self) -> usize {
        self.rows.d
    }

    #[inline(always)]
    fn prefetch(&self, p: usize, row: usize) {
        View::prefetch(self, p, row);
    }

    #[inline(always)]
    fn padded<'s>(&'s self, p: usize, row: usize, scratch: &'s mut [T::Filter]) -> &'s [T::Filter] {
        let row = self.row(p, row);
        match T::as_filter(row) {
            Some(row) if row.len() == scratch.len() => row,
            _ => {
                T::filter_row(row, &mut scratch[..row.len()]);
                scratch[row.len()..].fill(T::Filter::of(0.0));
                scratch
            }
        }
    }
}

/// Rows that are [`Codes`]: `(problems, n, d)` and `(problems, n)`.
pub(super) struct CodedRows<'a, E> {
    pub(super) bytes: &'a [u8],
    pub(super) scales: &'a [E],
    pub(super) n: usize,
    pub(super) d: usize,
}

impl<E: Lane> TileRows<E> for CodedRows<'_, E> {
    #[inline(always)]
    fn columns(&self) -> usize {
        self.d
    }

    #[inline(always)]
    fn prefetch(&self, p: usize, row: usize) {
        prefetch(&self.bytes[(p * self.n + row) * self.d..][..self.d]);
    }

    #[inline(always)]
    fn padded<'s>(&'s self, p: usize, row: usize, scratch: &'s mut [E]) -> &'s [E] {
        let at = p * self.n + row;
        let (bytes, scale) = (&self.bytes[at * self.d..][..self.d], self.scales[at]);
        for (to, &byte) in scratch.iter_mut().zip(bytes) {
            *to = E::small(i32::from(byte) - i32::from(Codes::ZERO)).mul(scale);
        }
        scratch[self.d..].fill(E::of(0.0));
        scratch
    }
}

/// A tile of rows of problem `p`.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a, R> {
    pub(super) of: &'a R,
    pub(super) p: usize,
    pub(super) rows: [u32; TILE],
    pub(super) count: usize,
}

impl<'a, R> Tile<'a, R> {
    /// Up to a tile of `rows`.
    #[inline(always)]
    pub(super) fn of(of: &'a R, p: usize, rows: impl ExactSizeIterator<Item = u32>) -> Self {
        let (mut tile, count) = ([0; TILE], rows.len().min(TILE));
        tile.iter_mut().zip(rows).for_each(|(to, row)| *to = row);
        Self { of, p, rows: tile, count }
    }

    /// Asks for some of the rows ahead of their turn.
    #[inline(always)]
    pub(super) fn prefetch<E>(&self, rows: Range<usize>)
    where
        R: TileRows<E>,
    {
        for &row in &self.rows[rows.start.min(self.count)..rows.end.min(self.count)] {
            self.of.prefetch(self.p, row as usize);
        }
    }

    /// The rows, padded. Beyond their number empty.
    #[inline(always)]
    pub(super) fn padded<'s, E: Lane>(&'s self, scratch: &'s mut [E]) -> [&'s [E]; TILE]
    where
        R: TileRows<E>,
    {
        let step = padded(self.of.columns());
        let mut rows = [&[][..]; TILE];
        let read = rows.iter_mut().zip(&self.rows[..self.count]).zip(scratch.chunks_exact_mut(step));
        for ((to, &row), scratch) in read {
            *to = self.of.padded(self.p, row as usize, scratch);
        }
        rows
    }
}
