//! Passes of k-means++ over rows that are rounded once, and kept: `kernels/seed_filter.cu`.

use super::{
    device::{arch, device},
    kernel::{launch, Nullable},
    memory::{alloc, elements},
    params::shape,
    tensors::{read, typed, Element},
};
use crate::{
    error::Result,
    plan::arch::{shared_memory, Arch},
    request::KmeansppBlock,
    rows::Rows,
    spread::{rounded_width, worth_rounding},
    tiles::{SEED_FILTER_ROWS, THREADS},
};
use candle_core::{
    cuda_backend::cudarc::driver::{CudaSlice, PushKernelArg},
    DType, Tensor,
};
use half::bf16;

/// Rows in bf16, `(b, n, width)`, and the norm of each and a bound on what rounding has left of it, f32 `(b, n, 2)`.
pub(super) struct RoundedRows {
    pub values: CudaSlice<bf16>,
    pub bounds: CudaSlice<f32>,
    pub width: usize,
}

/// The shared memory that so many candidates take.
fn shared(width: usize, candidates: usize) -> usize {
    candidates.next_multiple_of(8) * (2 * width + 16)
}

/// How a pass of so many candidates is launched: the rows of a block, and its shared memory.
pub(super) struct Pass {
    pub rows: usize,
    pub shared: usize,
}

/// The rows of a block of k-means++ as a filter takes them, and a pass of so many candidates, where so many passes are worth it.
pub(super) fn kept<'k>(
    p: &KmeansppBlock<'k>,
    candidates: usize,
    passes: usize,
) -> Result<Option<(&'k RoundedRows, Pass)>> {
    let (x, dev) = (p.x, device(&p.x.operand)?);
    let (arch, width) = (arch(dev)?, rounded_width(x.d));
    let shared = shared(width, candidates);
    let (Arch::Cuda { processors, .. }, Some(most)) = (arch, shared_memory(arch)) else { return Ok(None) };
    if x.dtype() == DType::F64 || shared > most || !worth_rounding(p.metric, x.d, passes) {
        return Ok(None);
    }
    let rows = x.n.saturating_mul(x.b).div_ceil(4 * processors).next_multiple_of(SEED_FILTER_ROWS);
    let rounded = p.kept.get_or_make(|| round(x, p.norms, width))?;
    Ok(rounded.map(|rounded| (rounded, Pass { rows: rows.min(8 * SEED_FILTER_ROWS), shared })))
}

fn round(x: &Rows, norms: Option<&Tensor>, width: usize) -> Result<RoundedRows> {
    const OP: &str = "k-means++";
    let dev = device(&x.operand)?;
    let rows = elements(&[x.b, x.n]);
    let mut centre = alloc::<f32>(dev, OP, elements(&[x.b, x.d]))?;
    let mut values = alloc::<bf16>(dev, OP, elements(&[rows, width]))?;
    let mut bounds = alloc::<f32>(dev, OP, elements(&[rows, 2]))?;
    let (xs, norms) = (read(&x.operand), norms.map(read));
    let norms = norms.as_ref().map(|norms| norms.view::<f64>()).transpose()?;
    typed!(x.dtype(), T => {
        launch!(dev, SeedFilter, "centre", T::SUFFIX, elements(&[x.b, x.d]).div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), Nullable(&norms), &mut centre)?;
        launch!(dev, SeedFilter, "round", T::SUFFIX, elements(&[rows, 32]).div_ceil(THREADS), THREADS;
            &xs.view::<T>()?, &shape(x), Nullable(&norms), &centre, &(width as i64), &mut values, &mut bounds)
    })?;
    Ok(RoundedRows { values, bounds, width })
}
