//! The matrix unit, of processors and systems that have none that this crate knows: what `amx.rs` has, of which nothing can be called.

use super::lines::{ByteLine, Ends, PairRows, TileEnds};
use crate::kept::Line;

/// The unit, which is not there.
#[derive(Clone, Copy)]
pub(super) enum Amx {}

impl Amx {
    pub(super) fn find() -> Option<Self> {
        None
    }

    pub(super) fn lowest(self, _: &[f32]) -> f32 {
        match self {}
    }

    pub(super) fn all_at_most(self, _: &[f32], _: f32, _: impl FnMut(usize, f32) -> bool) -> bool {
        match self {}
    }

    pub(super) fn only_at_most(self, _: &[f32], _: f32) -> Option<usize> {
        match self {}
    }

    pub(super) fn distances(
        self,
        _: &[i32],
        _: (&[Ends], &TileEnds),
        _: (&mut [f32], usize),
        _: impl FnMut(usize, u32),
    ) {
        match self {}
    }

    pub(super) fn tiles(self) -> Tiles {
        match self {}
    }
}

/// Its registers.
pub(super) enum Tiles {}

impl Tiles {
    pub(super) fn byte_levels(&mut self, _: &[ByteLine], _: &[ByteLine], _: &mut [i32]) {
        match *self {}
    }

    pub(super) fn product(&mut self, _: PairRows<'_>, _: &[Line], _: &[f32], _: usize, _: &mut [f32]) {
        match *self {}
    }
}
