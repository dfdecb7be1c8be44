//! The callbacks of a fit, and the progress that they are told.

use std::{fmt, ops::ControlFlow, sync::Arc};

/// The progress of a run's seeding: the first centroids that it has chosen so far, as [`KMeans::on_seed`](crate::KMeans::on_seed) sees it. Its [`Display`](fmt::Display) is a line of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seeding {
    /// Run, from 0, of `n_init`.
    pub run: usize,
    /// Seeds that have been chosen, of each problem.
    pub seeds: usize,
    /// Seeds that are to be chosen: the number of clusters.
    pub of: usize,
}

impl fmt::Display for Seeding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.run > 0 {
            write!(f, "run {}, ", self.run + 1)?;
        }
        write!(f, "{} of {} seeds", self.seeds, self.of)
    }
}

/// A callback of [`KMeans::on_seed`](crate::KMeans::on_seed).
#[derive(Clone)]
pub(crate) struct OnSeed(pub(crate) Arc<dyn Fn(Seeding) + Send + Sync>);

impl fmt::Debug for OnSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fn(Seeding)")
    }
}

/// One iteration of a running fit, as [`KMeans::on_iteration`](crate::KMeans::on_iteration) sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Iteration {
    /// Run, from 0, of `n_init`.
    pub run: usize,
    /// Iterations finished in this run, from 1.
    pub iteration: usize,
    /// Problems of the batch that have converged.
    pub converged: usize,
    /// If iterations are [measured](crate::KMeans::measure_iterations): the weighted distances of all problems' rows to the centroids that the iteration
    /// began with, in total, to within rounding. So it is of the centroids that the iteration before has made. None also in the iteration
    /// that goes on from the midst of a pass, from a [`Checkpoint`](crate::Checkpoint).
    pub inertia: Option<f64>,
    /// Likewise, the largest Euclidean distance that a centroid of any problem has moved in the iteration.
    pub shift: Option<f64>,
}

/// A callback of [`KMeans::on_iteration`](crate::KMeans::on_iteration) may return this: nothing, or whether the fit goes on.
pub trait IntoControlFlow {
    /// [`ControlFlow::Break`] ends the fit.
    fn into_control_flow(self) -> ControlFlow<()>;
}

impl IntoControlFlow for () {
    fn into_control_flow(self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl IntoControlFlow for ControlFlow<()> {
    fn into_control_flow(self) -> ControlFlow<()> {
        self
    }
}

/// A callback of [`KMeans::on_iteration`](crate::KMeans::on_iteration).
#[derive(Clone)]
pub(crate) struct OnIteration(pub(crate) Arc<dyn Fn(Iteration) -> ControlFlow<()> + Send + Sync>);

impl OnIteration {
    /// Calls it, and returns its word on going on.
    pub fn call(&self, iteration: Iteration) -> ControlFlow<()> {
        (self.0)(iteration)
    }
}

impl fmt::Debug for OnIteration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fn(Iteration)")
    }
}
