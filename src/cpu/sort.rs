//! A counting sort of labels.

use super::tensors::{lock, tensor};
use crate::{error::Result, host};
use candle_core::Tensor;

pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let (b, n) = labels.dims2()?;
    let [labels] = lock([labels]);
    let labels = labels.flat::<u32>()?;
    let (mut order, mut offsets) = (host::filled("sort", b * n, 0u32)?, host::filled("sort", b * (k + 1), 0u32)?);
    if n > 0 {
        let problems = order.chunks_mut(n).zip(offsets.chunks_mut(k + 1)).zip(labels.chunks(n)).collect();
        type Sorting<'a> = ((&'a mut [u32], &'a mut [u32]), &'a [u32]);
        let sort = |_: &mut (), ((order, offsets), labels): Sorting<'_>| {
            labels.iter().for_each(|&l| offsets[l as usize + 1] += 1);
            (0..k).for_each(|j| offsets[j + 1] += offsets[j]);
            let mut next = offsets[..k].to_vec();
            for (i, &l) in labels.iter().enumerate() {
                order[next[l as usize] as usize] = i as u32;
                next[l as usize] += 1;
            }
            Ok(())
        };
        host::for_each(problems, 4 * n + k, || (), sort)?;
    }
    Ok((tensor(order, (b, n))?, tensor(offsets, (b, k + 1))?))
}
