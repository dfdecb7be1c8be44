//! A counting sort of labels.

use super::tensors::{lock, read_and_write};
use crate::{
    backend::count_sort,
    error::Result,
    host,
    operand::{Readable, Target},
};

/// The largest label; 0 where there are none.
pub(crate) fn max_label(labels: &dyn Readable) -> Result<u32> {
    let [labels] = lock([labels]);
    Ok(labels.flat::<u32>()?.iter().copied().max().unwrap_or(0))
}

pub(crate) fn order(labels: &dyn Readable, k: usize, to: Target<'_>) -> Result<()> {
    count_sort();
    let (b, n) = (labels.dims()[0], labels.dims()[1]);
    read_and_write([labels], to, |[labels], all: &mut [u32]| {
        let labels = labels.flat::<u32>()?;
        let (order, offsets) = all.split_at_mut(b * n);
        offsets.fill(0);
        if n == 0 {
            return Ok(());
        }
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
        host::for_each(problems, 4 * n + k, || (), sort)
    })?
}
