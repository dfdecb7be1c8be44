//! Fits by their settings: what is refused, planned and prepared, and the best of several runs.

use super::prepared::PreparedFit;
use crate::{
    error::{Error, Result},
    fit::Fit,
    kmeans::{Init, KMeans},
    plan::{on_chip::FitResident, Plan},
    primitives,
    problem::Problem,
    ranks::{Alone, Ranks},
    rows::{RowLayout, Rows},
    seeding,
};
use candle_core::{DType, Device, Shape, Tensor};
use std::{ops::ControlFlow, path::Path};

impl KMeans {
    /// Says what a fit of `x` would run and how much memory it would take, without running it.
    ///
    /// # Errors
    /// Refuses what [`fit`](Self::fit) refuses without looking at values.
    pub fn plan(&self, x: &Tensor) -> Result<Plan> {
        self.started(false).planned(x).map(|(_, plan)| plan)
    }

    fn planned(&self, x: &Tensor) -> Result<(Problem, Plan)> {
        let p = Problem::fit(x, self.k, self.metric)?;
        self.check(&p, x.device())?;
        let plan = self.plan_of(&p, Rows::of(x.into()).map(|rows| rows.layout()), x.device())?;
        Ok((p, plan))
    }

    /// The plan of a fit of rows that lie so; none if they do not lie in rows.
    pub(crate) fn plan_of(&self, p: &Problem, layout: Option<RowLayout>, device: &Device) -> Result<Plan> {
        let at_once = |fit: &FitResident| primitives::runs_at_once(fit, p.dtype, device);
        Plan::new(p, layout, self, primitives::arch(device)?, at_once)
    }

    /// [`fit`](Self::fit) where `x` is.
    pub(crate) fn fit_on_its_device(&self, x: &Tensor) -> Result<Fit> {
        self.fit_problems(x, 0, &Alone)
    }

    /// The same of some problems of a batch, the first of which has this number there. The ranks have the whole batch.
    pub(crate) fn fit_problems(&self, x: &Tensor, first_problem: usize, batch: &dyn Ranks) -> Result<Fit> {
        let settings = self.started(false);
        let (p, plan) = settings.planned(x)?;
        let p = Problem { first_problem, ..p };
        let mut prepared = PreparedFit::new(&settings, p, plan, x.device())?;
        prepared.load(x)?;
        if self.n_init == 1 {
            let _ = prepared.lloyd(0, batch)?;
            return prepared.into_fit();
        }
        self.best_run(0, None, |run, _| {
            let flow = prepared.lloyd(run, batch)?;
            Ok((flow, prepared.fit()?))
        })
    }

    /// The best of all runs, of each problem; of those that there were if the callback has ended them. `best` is that of the runs before
    /// the `first`, and what `fit` is given beside the number of a run that of those before it.
    pub(crate) fn best_run(
        &self,
        first: usize,
        mut best: Option<Fit>,
        mut fit: impl FnMut(usize, Option<&Fit>) -> Result<(ControlFlow<()>, Fit)>,
    ) -> Result<Fit> {
        for run in first..self.n_init {
            let (flow, other) = fit(run, best.as_ref())?;
            best = Some(match best {
                Some(best) => {
                    // Any run is better than one of no cost that a number tells.
                    let unknown = best.inertia.ne(&best.inertia)?;
                    best.replaced_where(&other.inertia.lt(&best.inertia)?.maximum(&unknown)?, &other)?
                }
                None => other,
            });
            if flow.is_break() {
                break;
            }
        }
        Ok(best.expect("there is a run at least"))
    }

    /// A fit with its memory, for rows of one shape `(n, d)` or `(..batch, n, d)`: run it on new rows as often as you like, or
    /// capture a run in a CUDA graph; see [`PreparedFit`]. Weights, lengths and given centroids are copied: what becomes of
    /// them afterwards changes no run. It starts from random rows unless an [`Init`] says otherwise.
    ///
    /// # Errors
    /// As [`fit`](Self::fit). Refuses `n_init` above 1, which keeps more than one result.
    pub fn prepare(&self, shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<PreparedFit> {
        let p = Problem::of(shape.into().dims(), dtype, self.k, self.metric)?.fitting()?;
        self.check(&p, device)?;
        if self.n_init > 1 {
            let with = "a prepared fit, which keeps one result".into();
            return Err(Error::Conflict { argument: "n_init", got: self.n_init.to_string(), with });
        }
        let settings = self.started(true);
        let plan = settings.plan_of(&p, Some(RowLayout::packed(p.d)), device)?;
        PreparedFit::new(&settings, p, plan, device)
    }

    /// Reads what [`Fit::save`] wrote, onto `device`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read, and [`Error::Format`] if it is not a saved fit or what it holds does not belong
    /// together: shapes, dtypes, labels, counts and numbers are checked.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Fit> {
        Fit::load(path.as_ref(), device)
    }

    /// Every refusal that takes no look at values.
    pub(crate) fn check(&self, p: &Problem, device: &Device) -> Result<()> {
        if self.n_init == 0 {
            return Err(Error::Range { argument: "n_init", got: 0, min: 1, max: usize::MAX });
        }
        if let Some(devices) = &self.devices {
            let with = "work on one device, that of the rows".into();
            return Err(Error::Conflict { argument: "devices", got: format!("{devices:?}"), with });
        }
        if !(self.tol >= 0.0 && self.tol.is_finite()) {
            return Err(Error::Value { argument: "tol", got: self.tol, expected: "a finite number of at least 0" });
        }
        let alike = match self.init {
            Init::Given(_) => Some("given centroids"),
            Init::Even => Some("evenly spaced rows"),
            Init::Optimal => Some("an optimum"),
            _ => None,
        };
        if let (2.., Some(seeds)) = (self.n_init, alike) {
            let with = format!("{seeds}, which start every run alike");
            return Err(Error::Conflict { argument: "n_init", got: self.n_init.to_string(), with });
        }
        if let Some(weights) = &self.weights {
            p.weights(weights, device)?;
        }
        if let Some(lengths) = &self.lengths {
            p.lengths(lengths, device)?;
        }
        seeding::check(&self.init, p, device)
    }
}
