//! How weights become codes.

use crate::{
    error::{Error, Result},
    problem::MAX_ROWS,
    request::LutMatrix,
};

/// Settings of weights that are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LutConfig {
    /// Bits of a code: 2, 3 or 4 (4), for `2^bits` levels.
    pub bits: usize,
    /// Neighbouring weights of an output that share a scale, a multiple of 64 (0: all of them).
    pub group_size: usize,
    /// What has levels of its own (each output).
    pub levels: Granularity,
    /// Weights of each output that are kept apart, as what they are more than their levels (0).
    pub outliers: usize,
    /// Rounds in which scales, levels and codes are chosen again, each for the others (0).
    pub rounds: usize,
}

/// What shares the levels of a quantiser.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Granularity {
    /// All weights: levels take next to no memory, which pays where outputs are short.
    Tensor,
    /// The weights of an output.
    #[default]
    Output,
    /// The weights that share a scale.
    Group,
}

impl Granularity {
    /// What files call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tensor => "tensor",
            Self::Output => "output",
            Self::Group => "group",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Tensor, Self::Output, Self::Group].into_iter().find(|granularity| granularity.name() == name)
    }
}

impl Default for LutConfig {
    fn default() -> Self {
        Self { bits: 4, group_size: 0, levels: Granularity::Output, outliers: 0, rounds: 0 }
    }
}

impl LutConfig {
    pub(super) fn check(&self, inputs: usize) -> Result<()> {
        let Self { bits, group_size, outliers, .. } = *self;
        if !(2..=4).contains(&bits) {
            return Err(Error::Range { argument: "bits", got: bits, min: 2, max: 4 });
        }
        if !group_size.is_multiple_of(LutMatrix::BLOCK) {
            let with = format!("codes of {} columns that lie together", LutMatrix::BLOCK);
            return Err(Error::Conflict { argument: "group_size", got: group_size.to_string(), with });
        }
        // A group that is longer than rows makes them as long.
        if group_size > MAX_ROWS {
            return Err(Error::Range { argument: "group_size", got: group_size, min: 0, max: MAX_ROWS });
        }
        if outliers > inputs {
            return Err(Error::Range { argument: "outliers", got: outliers, min: 0, max: inputs });
        }
        Ok(())
    }

    pub(super) fn entries(&self) -> usize {
        1 << self.bits
    }

    /// The columns of a group, and those that an output of so many has codes for: whole groups.
    pub(super) fn columns(&self, inputs: usize) -> (usize, usize) {
        let group = match self.group_size {
            0 => inputs.next_multiple_of(LutMatrix::BLOCK),
            size => size,
        };
        (group, inputs.next_multiple_of(group))
    }

    /// The shape of the levels of so many outputs.
    pub(super) fn levels_shape(&self, outputs: usize, inputs: usize) -> [usize; 3] {
        let (group, columns) = self.columns(inputs);
        match self.levels {
            Granularity::Tensor => [1, 1, self.entries()],
            Granularity::Output => [outputs, 1, self.entries()],
            Granularity::Group => [outputs, columns / group, self.entries()],
        }
    }
}
