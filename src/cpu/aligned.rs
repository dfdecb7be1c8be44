//! Memory whose first element begins a line of a cache, so that rows of tiles and whole vectors in it lie in one line each.

use crate::{error::Result, host};
use std::ops::{Deref, DerefMut};

/// Bytes of a line.
const LINE: usize = 64;

/// Some elements, from a line's beginning on.
#[derive(Default)]
pub(super) struct Aligned<E> {
    memory: Vec<E>,
    start: usize,
    len: usize,
}

impl<E: Copy> Aligned<E> {
    /// `len` times `value`.
    pub fn new(len: usize, value: E) -> Self {
        Self::of(vec![value; len + LINE / size_of::<E>()], len)
    }

    /// The same, or a typed refusal.
    pub fn filled(op: &'static str, len: usize, value: E) -> Result<Self> {
        Ok(Self::of(host::filled(op, len + LINE / size_of::<E>(), value)?, len))
    }

    fn of(memory: Vec<E>, len: usize) -> Self {
        let start = memory.as_ptr().align_offset(LINE);
        Self { memory, start, len }
    }

    /// Makes room for `len` at least, where there was less: all of it `value`.
    pub fn grow(&mut self, len: usize, value: E) {
        if self.len < len {
            *self = Self::new(len, value);
        }
    }
}

impl<E> Deref for Aligned<E> {
    type Target = [E];

    #[inline(always)]
    fn deref(&self) -> &[E] {
        &self.memory[self.start..][..self.len]
    }
}

impl<E> DerefMut for Aligned<E> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [E] {
        &mut self.memory[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_with_a_line() {
        for len in [1, 5, 1000] {
            let mut aligned = Aligned::filled("test", len, 1f32).unwrap();
            assert_eq!((aligned.as_ptr().addr() % LINE, &aligned[..]), (0, &vec![1.0; len][..]));
            aligned.grow(len + 1, 2.0);
            assert_eq!((aligned.as_ptr().addr() % LINE, aligned.len()), (0, len + 1));
        }
    }
}
