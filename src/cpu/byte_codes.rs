//! Rows as [`Codes`](crate::request::Codes): bytes by the largest magnitude of each row.

use super::{
    lanes::Lane,
    scalar::magnitude,
    tensors::{lock, tensor, typed},
    tile::{padded, TileRows},
};
use crate::{error::Result, host, rows::Rows};
use candle_core::Tensor;
use pulp::{Simd, WithSimd};

const OP: &str = "byte_codes";

pub(super) fn byte_codes(x: &Rows) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let [xs] = lock([&x.operand]);
        let (bytes, scales) = coded(&TileRows::of(&xs.view::<T>(x)?))?;
        Ok((tensor(bytes, (x.b, x.n, x.d))?, tensor(scales, (x.b, x.n))?))
    })
}

fn coded<E: Lane>(rows: &TileRows<'_, E>) -> Result<(Vec<u8>, Vec<E>)> {
    let count = rows.problems * rows.n;
    let (mut bytes, mut scales) = (host::filled(OP, count * rows.d, 0)?, host::filled(OP, count, E::of(0.0))?);
    let together = host::items_per_task(rows.d);
    let parts = bytes.chunks_mut(together * rows.d.max(1)).zip(scales.chunks_mut(together)).enumerate();
    let code = |row: &mut Vec<E>, (part, (bytes, scales)): (usize, (&mut [u8], &mut [E]))| {
        E::dispatch(CodeRows { rows, first: part * together, row, bytes, scales });
        Ok(())
    };
    host::for_each(parts.collect(), together * rows.d, || vec![E::of(0.0); padded(rows.d)], code)?;
    Ok((bytes, scales))
}

/// Codes rows from `first` on, counted through all problems. It is a struct for the reason that `Pack` in assign.rs is one.
struct CodeRows<'a, E> {
    rows: &'a TileRows<'a, E>,
    first: usize,
    row: &'a mut [E],
    bytes: &'a mut [u8],
    scales: &'a mut [E],
}

impl<E: Lane> WithSimd for CodeRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { rows, first, row, bytes, scales } = self;
        for (i, (bytes, scale)) in (first..).zip(bytes.chunks_exact_mut(rows.d).zip(scales)) {
            let row = &rows.padded(i / rows.n, i % rows.n, &mut *row)[..rows.d];
            let (largest, finite) = magnitude(row);
            *scale = if finite { largest.mul(E::BYTE) } else { row.iter().fold(largest, |sum, v| sum.add(v.abs())) };
            let divisor = if *scale > E::LEAST { *scale } else { E::LEAST };
            bytes.iter_mut().zip(row).for_each(|(byte, v)| *byte = v.byte(divisor));
        }
    }
}
