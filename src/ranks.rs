//! Ranks: workers that share the rows of a fit, as in MPI.

use crate::error::Result;
use candle_core::Tensor;
use std::ffi::c_char;

/// A rank among those that share the rows of a fit. Ranks meet in `reduce` and `gather`, so each of them calls the same methods in
/// the same order, and what they are told there is the same for all. If one fails, the others get an error from where they meet.
pub(crate) trait Ranks {
    /// The number of this rank, from 0. Lower ranks have lower rows.
    fn rank(&self) -> usize;

    /// The number of ranks.
    fn count(&self) -> usize;

    /// Replaces the sums of this rank's rows, as [`Accumulator::sums`](crate::request::Accumulator::sums) has them, by those of all
    /// (an all-reduce).
    fn reduce(&self, sums: &Tensor) -> Result<()>;

    /// The sum of the f64 numbers of all ranks, each of which has as many, added in the order of ranks: the same bits for all of them.
    fn sum(&self, mine: &Tensor) -> Result<Tensor>;

    /// The numbers of every rank (an all-gather).
    fn gather(&self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>>;

    /// Refuses to go on where another rank has failed, for whoever waits for it elsewhere.
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    fn check(&self) -> Result<()>;

    /// Says that this rank has all that it came for. Who leaves before has failed.
    fn done(&self) {}
}

/// The place where ranks find each other.
#[derive(Clone, Copy)]
pub(crate) struct Rendezvous(#[cfg_attr(not(feature = "nccl"), allow(dead_code))] pub [c_char; 128]);

/// One rank, which has all rows.
pub(crate) struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn reduce(&self, _: &Tensor) -> Result<()> {
        Ok(())
    }

    fn sum(&self, mine: &Tensor) -> Result<Tensor> {
        Ok(mine.clone())
    }

    fn gather(&self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        Ok(vec![mine])
    }

    fn check(&self) -> Result<()> {
        Ok(())
    }
}
