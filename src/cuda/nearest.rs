//! The nearest centroids of each row: `kernels/nearest.cu`.

use super::{
    device::device,
    kernel::{launch, warps},
    memory::{alloc, elements},
    params::shape,
    tensors::{read, tensor, typed, Element},
};
use crate::{error::Result, metric::Metric, rows::Rows, tiles::THREADS};
use candle_core::{cuda_backend::cudarc::driver::PushKernelArg, Tensor};

pub(crate) fn nearest(x: &Rows, c: &Rows, m: usize, metric: Metric) -> Result<(Tensor, Tensor)> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let out = elements(&[x.b, x.n, m]);
        let (mut indices, mut distances) = (alloc::<u32>(dev, "nearest", out)?, alloc::<f64>(dev, "nearest", out)?);
        let (xs, cs) = (read(&x.operand), read(&c.operand));
        launch!(dev, Nearest, "nearest", T::SUFFIX, warps(elements(&[x.b, x.n])), THREADS;
            &xs.view::<T>()?, &shape(x), &cs.view::<T>()?, &shape(c), &(metric as i32), &(m as i64), &mut indices,
            &mut distances)?;
        let shape = (x.b, x.n, m);
        Ok((tensor(dev, indices, shape), tensor(dev, distances, shape)))
    })
}
