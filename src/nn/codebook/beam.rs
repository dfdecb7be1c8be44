//! Codes of a residual quantiser that look further ahead than the nearest entry of each stage.

use super::{codes::empty, ResidualQuantizer};
use crate::{
    error::{Error, Result},
    functional::{nearest, rows_of},
    primitives,
    ranking::descending,
    tiles::NEAREST,
};
use candle_core::{DType, Tensor};

/// Rows that are met at once, with all that is kept of each.
const AT_ONCE: usize = 1 << 16;

impl ResidualQuantizer {
    /// Codes of each row of `x` `(..batch, n, d)` by a beam search over the stages, as AQLM has it (Egiazarian et al. 2024), u32 `(..batch, n,
    /// stages)`: after each stage the `width` choices of codes that leave least over are kept, of equal ones those that come from the better
    /// choice, then of the lower entry, and at the end the best one. Width 1 is [`encode`](Self::encode) to the bit. What is left over
    /// at the end is mostly less the wider the beam is, and the time grows with the width, for a stage about as a search for the nearest
    /// `width` entries of `width` times the rows.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{nn::{Codebook, ResidualQuantizer}, Metric};
    ///
    /// let entries = |values: &[f32]| Codebook::new(&Tensor::new(values, &Device::Cpu)?.unsqueeze(1)?, Metric::default());
    /// let stages = ResidualQuantizer::new(vec![entries(&[0., 4.])?, entries(&[0., 3.])?])?;
    /// let x = Tensor::new(&[[2.9f32]], &Device::Cpu)?; // nearest to 4, of which the second stage can take nothing
    /// assert_eq!(stages.encode(&x)?.to_vec2::<u32>()?, [[1, 0]]);
    /// assert_eq!(stages.encode_beam(&x, 2)?.to_vec2::<u32>()?, [[0, 1]]);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`nearest`]. Refuses a width of 0 or above 64, and stages of another metric than the squared Euclidean distance.
    pub fn encode_beam(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        self.check_beam(width)?;
        primitives::check_counted("x", x)?;
        if x.elem_count() == 0 || x.rank() < 2 {
            return self.encode(x);
        }
        let at = x.rank() - 2;
        let (n, problems) = (x.dims()[at], x.dims()[..at].iter().product::<usize>());
        let rows = (AT_ONCE / (problems * width)).max(1);
        let blocks =
            (0..n).step_by(rows).map(|from| self.search(&x.detach().narrow(at, from, rows.min(n - from))?, width));
        Ok(Tensor::cat(&blocks.collect::<Result<Vec<_>>>()?, at)?)
    }

    pub(super) fn check_beam(&self, width: usize) -> Result<()> {
        if !(1..=NEAREST).contains(&width) {
            return Err(Error::Range { argument: "width", got: width, min: 1, max: NEAREST });
        }
        self.check_squares("a beam, which adds up squared Euclidean distances")
    }

    fn search(&self, x: &Tensor, width: usize) -> Result<Tensor> {
        let (lead, d) = (&x.dims()[..x.rank() - 1], x.dims()[x.rank() - 1]);
        let rows: usize = lead.iter().product();
        let shape = |kept: usize, tail: &[usize]| {
            let (n, batch) = (lead[lead.len() - 1], &lead[..lead.len() - 1]);
            [batch, &[n * kept], tail].concat()
        };
        let mut left = x.contiguous()?;
        let mut codes: Option<Tensor> = None;
        let mut kept = 1;
        for (i, stage) in self.stages().iter().enumerate() {
            let each = width.min(stage.k());
            let (entries, distances) = nearest(&left, stage.centroids(), each, stage.metric())?;
            let all = kept * each;
            let next = width.min(all);
            let best = descending(&distances.reshape((rows, all))?.neg()?)?.narrow(1, 0, next)?.contiguous()?;
            let entries = entries.reshape((rows, all))?.gather(&best, 1)?;
            // The choice that each continues, counted over all rows.
            let choice = Tensor::from_iter((0..all).map(|place| (place / each) as u32), x.device())?;
            let first = Tensor::from_iter((0..rows).map(|row| (row * kept) as u32), x.device())?.unsqueeze(1)?;
            let from = choice.index_select(&best.flatten_all()?, 0)?.reshape((rows, next))?.broadcast_add(&first)?;
            let from = from.flatten_all()?;
            let new = entries.reshape((rows * next, 1))?;
            codes = Some(match &codes {
                None => new,
                Some(codes) => Tensor::cat(&[&codes.index_select(&from, 0)?, &new], 1)?,
            });
            if i + 1 < self.stages().len() {
                let values = rows_of(stage.centroids(), &entries.reshape(shape(next, &[]))?)?;
                let before = left.reshape((rows * kept, d))?.index_select(&from, 0)?.reshape(shape(next, &[d]))?;
                left = (before - values)?;
            }
            kept = next;
        }
        let stages = self.stages().len();
        let Some(codes) = codes else { return empty([lead, &[stages]].concat(), DType::U32, x.device()) };
        let best = codes.reshape((rows, kept, stages))?.narrow(1, 0, 1)?;
        Ok(best.contiguous()?.reshape([lead, &[stages]].concat())?)
    }
}
