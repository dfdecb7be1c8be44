//! How weights become codes.

use crate::{
    error::{Error, Result},
    request::LutMatrix,
};

/// Settings of weights that are looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LutConfig {
    /// Bits of a code: 2, 3 or 4 (4), for `2^bits` levels.
    pub bits: usize,
    /// Neighbouring weights of an output that share a scale, a multiple of 64 (0: all of them).
    pub group_size: usize,
    /// Whether each group has levels of its own, rather than each output (no).
    pub levels_per_group: bool,
    /// Weights of each output that are kept apart, as what they are more than their levels (0).
    pub outliers: usize,
}

impl Default for LutConfig {
    fn default() -> Self {
        Self { bits: 4, group_size: 0, levels_per_group: false, outliers: 0 }
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
        if outliers > inputs {
            return Err(Error::Range { argument: "outliers", got: outliers, min: 0, max: inputs });
        }
        Ok(())
    }

    pub(super) fn levels(&self) -> usize {
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
}
