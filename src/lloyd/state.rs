//! The state of a run: what the loop goes on from to the same bits, whoever has kept it meanwhile.

use super::prepared::RUNNING;
use crate::{error::Result, fit::Fit, host};
use candle_core::{DType, Device, Tensor};

/// The state of a run between two iterations, or within the pass of the next one.
pub(crate) struct State {
    /// The run, of `n_init`.
    pub run: usize,
    /// The updates that have been made.
    pub iteration: usize,
    /// `(b, k, d)`.
    pub centroids: Tensor,
    /// The iteration in which each problem converged, u32 `(b,)`, as [`Progress`](crate::request::Progress) has it.
    pub stop: Tensor,
    /// What the next update has of the rows already.
    pub added: Option<Added>,
}

/// The first rows of each problem, added up.
pub(crate) struct Added {
    pub rows: usize,
    /// The sums of an [`Accumulator`](crate::request::Accumulator).
    pub sums: Tensor,
}

/// Is shown each state that a run could go on from, and whether the run is over with it. The tensors are those that the loop works on.
pub(crate) type Watch<'a> = dyn FnMut(&State, bool) -> Result<()> + 'a;

impl State {
    /// The start of a run from these centroids, `(b, k, d)`.
    pub fn start(run: usize, centroids: Tensor) -> Result<Self> {
        let stop = Tensor::full(RUNNING, centroids.dim(0)?, centroids.device())?;
        Ok(Self { run, iteration: 0, centroids, stop, added: None })
    }

    /// The end of whichever run has made this fit, of one problem without batch dimensions.
    pub fn end(fit: &Fit) -> Result<Self> {
        let n_iter = fit.n_iter.to_scalar::<u32>()?;
        let stop = if fit.converged.to_scalar::<u8>()? == 1 { n_iter } else { RUNNING };
        let stop = Tensor::new(&[stop], fit.centroids.device())?;
        Ok(Self { run: 0, iteration: n_iter as usize, centroids: fit.centroids.unsqueeze(0)?, stop, added: None })
    }

    /// Whether nothing is left to do but to label the rows.
    pub fn is_over(&self, max_iters: usize) -> Result<bool> {
        Ok(self.iteration >= max_iters || self.iteration > 0 && self.going()?.is_empty())
    }

    /// The problems that have not converged.
    fn going(&self) -> Result<Vec<u32>> {
        let stop = self.stop.to_vec1::<u32>()?;
        Ok((0..stop.len()).filter(|&b| stop[b] == RUNNING).map(|b| b as u32).collect())
    }

    /// The lists of [`Progress`](crate::request::Progress), u32 `(2, b + 1)`: those that go on, whichever of the two the next iteration
    /// reads.
    pub(super) fn lists(&self, device: &Device) -> Result<Tensor> {
        let b = self.stop.elem_count();
        if self.iteration == 0 {
            return host::zeros("fit", (2, b + 1), DType::U32, device);
        }
        let mut list = self.going()?;
        list.insert(0, list.len() as u32);
        list.resize(b + 1, 0);
        Ok(Tensor::from_vec(list.repeat(2), (2, b + 1), device)?)
    }

    /// Says what no run leads to, of a state on the CPU with tensors of the right sizes.
    pub fn fault(&self, max_iters: usize) -> Result<Option<String>> {
        let stop = self.stop.to_vec1::<u32>()?;
        if self.iteration > max_iters {
            return Ok(Some(format!("iteration {} of {max_iters}", self.iteration)));
        }
        let reached = |stop: u32| stop == RUNNING || (1..=self.iteration).contains(&(stop as usize));
        Ok(stop
            .into_iter()
            .find(|&stop| !reached(stop))
            .map(|stop| format!("convergence in iteration {stop}, of {}", self.iteration)))
    }
}
