//! Orders of scores by Candle's ops, the same on every device, and sums along rows.

use crate::{
    error::{Error, Result},
    primitives,
};
use candle_core::{DType, Device, Tensor};

/// Keys that Candle's sort takes at once on a GPU, a power of two: it keeps their indices in 32 KiB of shared memory.
const SORTED_AT_ONCE: usize = 8192;

/// `keys` with minus infinity for NaN.
pub(crate) fn without_nan(keys: &Tensor) -> Result<Tensor> {
    let lowest = (keys.ones_like()? * f64::NEG_INFINITY)?;
    // A NaN is not equal to itself.
    Ok(keys.eq(keys)?.where_cond(keys, &lowest)?)
}

/// The places of the keys of each row (float `(r, k)`, no NaN, any `k`), the largest first and equal ones by index: u32 `(r, k)`.
pub(crate) fn descending(keys: &Tensor) -> Result<Tensor> {
    match keys.device() {
        // Candle's sort is stable there, and takes any number.
        Device::Cpu => Ok(keys.arg_sort_last_dim(false)?),
        _ => descending_by(keys, SORTED_AT_ONCE),
    }
}

/// The same by sorts of `chunk` keys, a power of two, that leave equal ones in any order.
fn descending_by(keys: &Tensor, chunk: usize) -> Result<Tensor> {
    let (_, k) = keys.dims2()?;
    let (sorted, places) = sort_in_chunks(keys, chunk)?;
    // Number the different keys, and sort by that: the counting sort is stable.
    let differs = sorted.ne(&shift_right(&sorted, 1)?)?.to_dtype(DType::U32)?;
    let first = differs.narrow(1, 0, 1)?;
    let numbers = cumsum(&differs)?.broadcast_sub(&first)?;
    let numbers = places.zeros_like()?.scatter(&places, &numbers, 1)?.narrow(1, 0, k)?.contiguous()?;
    Ok(primitives::sorted(&numbers, k)?.0)
}

/// The keys of each row `(r, k)`, the largest first, and where they were: `(r, m)` both. There are more than `k` where padding of
/// minus infinity fills the chunks; its places are `k` and above.
///
/// Chunks are sorted and merged by a bitonic network (Batcher 1968) of which a sort of each chunk does the last steps.
fn sort_in_chunks(keys: &Tensor, chunk: usize) -> Result<(Tensor, Tensor)> {
    let (r, k) = keys.dims2()?;
    let sort = |keys: &Tensor, places: Option<&Tensor>, width: usize| {
        let keys = keys.reshape((r * width / chunk.min(width), chunk.min(width)))?;
        let order = keys.arg_sort_last_dim(false)?;
        let places = match places {
            Some(places) => places.reshape(keys.shape())?.gather(&order, 1)?,
            None => order.clone(),
        };
        Ok::<_, Error>((keys.gather(&order, 1)?.reshape((r, width))?, places.reshape((r, width))?))
    };
    if k <= chunk {
        return sort(keys, None, k);
    }
    let width = chunk * k.div_ceil(chunk).next_power_of_two();
    let padding = (Tensor::ones((r, width - k), keys.dtype(), keys.device())? * f64::NEG_INFINITY)?;
    let keys = Tensor::cat(&[keys, &padding], 1)?;
    let places = Tensor::arange(0, width as u32, keys.device())?.broadcast_as((r, width))?.contiguous()?;
    let (mut keys, mut places) = sort(&keys, Some(&places), width)?;
    let mut run = chunk;
    while run < width {
        run *= 2;
        let mut part = run;
        while part > chunk {
            // Two sorted runs are a bitonic one if the second is reversed; its halves are bitonic then.
            (keys, places) = exchange(&keys, &places, part, part == run)?;
            part /= 2;
        }
        (keys, places) = sort(&keys, Some(&places), width)?;
    }
    Ok((keys, places))
}

/// Compares the halves of every `run` keys, of which the second may be `reversed`: the larger ones become the first half.
fn exchange(keys: &Tensor, places: &Tensor, run: usize, reversed: bool) -> Result<(Tensor, Tensor)> {
    let (r, width) = keys.dims2()?;
    let half = run / 2;
    let backwards = Tensor::from_iter((0..half as u32).rev(), keys.device())?;
    let halves = |t: &Tensor| {
        let t = t.reshape((r * width / run, 2, half))?;
        let (first, second) = (t.narrow(1, 0, 1)?.contiguous()?, t.narrow(1, 1, 1)?.contiguous()?);
        Ok::<_, Error>((first, if reversed { second.index_select(&backwards, 2)? } else { second }))
    };
    let ((a, b), (at_a, at_b)) = (halves(keys)?, halves(places)?);
    let swap = b.gt(&a)?;
    let joined = |a: &Tensor, b: &Tensor| {
        let both = [swap.where_cond(b, a)?, swap.where_cond(a, b)?];
        Ok::<_, Error>(Tensor::cat(&both, 1)?.reshape((r, width))?)
    };
    Ok((joined(&a, &b)?, joined(&at_a, &at_b)?))
}

/// The sum of the values up to each, itself included, along the rows of `(r, k)`; always in the same order.
pub(crate) fn cumsum(values: &Tensor) -> Result<Tensor> {
    let (_, k) = values.dims2()?;
    let (mut sum, mut step) = (values.contiguous()?, 1);
    while step < k {
        sum = (&sum + shift_right(&sum, step)?)?;
        step *= 2;
    }
    Ok(sum)
}

/// Each row of `(r, k)` moved by `by` places, after zeros.
pub(crate) fn shift_right(values: &Tensor, by: usize) -> Result<Tensor> {
    let (_, k) = values.dims2()?;
    // Candle makes no empty tensor on a GPU.
    if by >= k {
        return Ok(values.zeros_like()?);
    }
    Ok(values.narrow(1, 0, k - by)?.contiguous()?.pad_with_zeros(1, by, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GPU merges chunks where keys are more than it sorts at once, and Candle's stable sort says the same.
    #[test]
    fn chunks_are_merged_into_one_stable_order() {
        for (r, k, chunk) in [(1, 1, 4), (3, 4, 4), (2, 5, 4), (3, 100, 8), (2, 64, 8), (1, 1000, 2), (2, 129, 64)] {
            for different in [2, 7, u32::MAX] {
                let value = |i: usize| (i as u32).wrapping_mul(2_654_435_761).rotate_left(9) % different;
                let keys: Vec<f64> = (0..r * k).map(value).map(f64::from).collect();
                let keys: Vec<f64> = keys.iter().map(|&v| if v == 0.0 { f64::NEG_INFINITY } else { v }).collect();
                let keys = Tensor::from_vec(keys, (r, k), &Device::Cpu).unwrap();
                let got = descending_by(&keys, chunk).unwrap().to_vec2::<u32>().unwrap();
                assert_eq!(got, descending(&keys).unwrap().to_vec2::<u32>().unwrap(), "{r} {k} {chunk} {different}");
            }
        }
    }
}
