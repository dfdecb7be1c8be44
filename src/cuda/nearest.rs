//! The nearest centroids of each row: `kernels/nearest.cu`.

use super::{
    device::device,
    kernel::{launch, warps},
    memory::{alloc, elements},
    pairwise::near,
    params::shape,
    tensors::{read, tensor, typed, Element},
};
use crate::{error::Result, metric::Metric, rows::Rows, tiles::THREADS};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, DType, Tensor};

/// Distances that are there at a time: 128 MiB of them.
const PAIRS: usize = 1 << 25;
/// Of fewer centroids for each that is asked for all are compared by the definition.
const WORTH: usize = 4;

pub(crate) fn nearest(x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    const OP: &str = "nearest";
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let out = elements(&[x.b, x.n, m]);
        let (mut indices, mut distances) = (alloc::<u32>(dev, OP, out)?, alloc::<f64>(dev, OP, out)?);
        let (xs, cs) = (read(&x.operand), read(&c.operand));
        let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
        if x.dtype() == DType::F64 || metric == Metric::Manhattan || c.n < WORTH * m {
            launch!(dev, Nearest, "nearest", T::SUFFIX, warps(elements(&[x.b, x.n])), THREADS;
                &xs, &shape(x), &cs, &shape(c), &(metric as i32), &(m as i64), &mut indices, &mut distances)?;
        } else {
            let rows = (PAIRS / c.n).clamp(1, x.n);
            // Whole problems, or some rows of one.
            let problems = (PAIRS / c.n / x.n).clamp(1, x.b);
            let mut rounded = alloc::<<T as Element>::Filter>(dev, OP, elements(&[problems, rows, c.n]))?;
            for b in (0..x.b).step_by(problems) {
                for first in (0..x.n).step_by(rows) {
                    let part = Rows { b: problems.min(x.b - b), n: rows.min(x.n - first), ..x.clone() };
                    let own = Rows { b: part.b, ..c.clone() };
                    let (at, out) = (b * x.batch_stride + first * x.row_stride, (b * x.n + first) * m);
                    let (xs, cs) = (xs.slice(at..), cs.slice(b * c.batch_stride..));
                    near::<T>(dev, (&xs, &part), (&cs, &own), metric, &mut rounded)?;
                    launch!(dev, Nearest, "nearest_of", T::SUFFIX, warps(elements(&[part.b, part.n])), THREADS;
                        &xs, &shape(&part), &cs, &shape(&own), &(metric as i32), &(m as i64), &rounded,
                        &mut indices.slice_mut(out..), &mut distances.slice_mut(out..))?;
                }
            }
        }
        let shape = (x.b, x.n, m);
        Ok((tensor(dev, indices, shape), tensor(dev, distances, shape)))
    })
}
