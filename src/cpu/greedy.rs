//! Steps of greedy k-means++: a race among rows, and the trial of those that won it.

use super::{
    race::{race, Drawn},
    spread::{kept_rounded, meet, Measure, Met},
    tensors::{or, read_and_write, tensor, typed},
};
use crate::{error::Result, request::GreedyStep, spread::units};

pub(crate) fn greedy_step(p: &GreedyStep<'_>) -> Result<()> {
    let &GreedyStep { x, nearest, slot, norms, weights, chosen, i, metric, draw, kept } = p;
    let (n, trials, start) = (x.n, nearest.dim(2)?, i == 0);
    let count = if start { 1 } else { trials };
    // A distance to the last seed is nobody's probability, but of several the potentials are compared.
    let steps = chosen.dim(1)?;
    let over = i + 1 == steps && count == 1;
    let mut slots = slot.to_vec1::<u32>()?;
    let picked = typed!(x.dtype(), T => {
        let inputs = [&x.operand, or(weights, &x.operand), or(norms, &x.operand)];
        read_and_write(inputs, nearest.into(), |[xs, ws, ns], nearest: &mut [f64]| {
            let (xs, weights) = (xs.view::<T>(x)?, weights.map(|_| ws.flat::<f64>()).transpose()?);
            let norms = norms.map(|_| ns.flat::<f64>()).transpose()?;
            let near = |b: usize, row: usize| if start { 1.0 } else { nearest[(b * n + row) * trials + slots[b] as usize] };
            let drawn = race(&(0..x.b).collect::<Vec<_>>(), [n, count], near, weights, draw)?;
            // All rows have to meet the first seed.
            let rounded = kept_rounded(kept, &xs, norms, metric, if start { 0 } else { steps })?;
            let met = |(b, drawn): (usize, &Drawn)| {
                let measure = Measure::new(&xs, b, norms, metric);
                let seeds = measure.seeds(drawn.lowest.iter().map(|&(_, row)| row).collect());
                let filter = rounded.map(|rounded| rounded.filter(b, &seeds.rows)).transpose()?;
                let (slot, units) = ((!start).then_some(slots[b] as usize), (count > 1).then(|| units(drawn.most, n)));
                Ok(Met { measure, seeds, filter, slot, units })
            };
            let met = drawn.iter().enumerate().map(met).collect::<Result<Vec<_>>>()?;
            let potentials = if over { vec![] } else { meet(&met, trials, weights, nearest)? };
            for (b, potentials) in potentials.iter().enumerate() {
                slots[b] = (0..met[b].seeds.rows.len()).min_by_key(|&t| potentials[t]).unwrap_or(0) as u32;
            }
            Ok(met.iter().zip(&slots).map(|(met, &slot)| met.seeds.rows[slot as usize]).collect::<Vec<_>>())
        })?
    })?;
    slot.slice_set(&tensor(slots, x.b)?, 0, 0)?;
    chosen.slice_set(&tensor(picked, (x.b, 1))?, 1, i)?;
    Ok(())
}
