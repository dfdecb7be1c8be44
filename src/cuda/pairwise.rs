//! The distances of rows to all centroids: `kernels/pairwise.cu`.

use super::{
    device::device,
    kernel::{launch, warps, WARP},
    memory::{alloc, elements, ArenaLayout, Memory},
    params::{one_copy, shape, Active},
    tensors::{read, tensor, typed, DevicePtr, Element},
};
use crate::{
    error::Result,
    metric::Metric,
    rows::Rows,
    tiles::{PAIR_CENTROIDS, PAIR_ROWS, PAIR_SHARED, THREADS},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{CudaSlice, CudaView, PushKernelArg},
        CudaDevice,
    },
    DType, Tensor,
};

const OP: &str = "pairwise";

pub(crate) fn pairwise(x: &Rows, c: &Rows, metric: Metric) -> Result<Tensor> {
    typed!(x.dtype(), T => {
        let dev = device(&x.operand)?;
        let pairs = elements(&[x.b, x.n, c.n]);
        let mut out = alloc::<<T as Element>::Filter>(dev, OP, pairs)?;
        let (xs, cs) = (read(&x.operand), read(&c.operand));
        let (xs, cs) = (xs.view::<T>()?, cs.view::<T>()?);
        if x.dtype() == DType::F64 || metric == Metric::Manhattan {
            launch!(dev, Pairwise, "pairwise", T::SUFFIX, pairs.div_ceil(THREADS), THREADS;
                &xs, &shape(x), &cs, &shape(c), &(metric as i32), &mut out)?;
        } else {
            near::<T>(dev, (&xs, x), (&cs, c), metric, &mut out)?;
        }
        Ok(tensor(dev, out, (x.b, x.n, c.n)))
    })
}

/// The distances of rows to centroids, by products on tensor cores: of types shorter than f64, and not by Manhattan.
pub(super) fn near<T: Element>(
    dev: &CudaDevice,
    (xs, x): (&CudaView<'_, T>, &Rows),
    (cs, c): (&CudaView<'_, T>, &Rows),
    metric: Metric,
    out: &mut CudaSlice<T::Filter>,
) -> Result<()> {
    let (one, mut layout) = (one_copy(c), ArenaLayout::default());
    let (copies, d) = (one.b, c.d);
    let centred = metric == Metric::SquaredEuclidean;
    let mu = centred.then(|| layout.zeroed::<f32>(elements(&[copies, d])));
    let (of_x, of_c) = (layout.unwritten::<f64>(elements(&[x.b, x.n])), layout.unwritten(elements(&[copies, c.n])));
    let memory = Memory::default();
    let w = layout.scratch(dev, OP, &memory)?;
    let (mu, of_x, of_c) = (mu.map_or(DevicePtr::<f32>::NULL, |mu| w.ptr(mu)), w.ptr(of_x), w.ptr::<f64>(of_c));
    if centred {
        launch!(dev, Prepare, "prepare_means", T::SUFFIX, elements(&[copies, d.div_ceil(WARP)]), WARP * WARP;
            cs, &shape(&one), &Active::of(None)?, &mu)?;
    }
    let mu_stride = if copies == 1 { 0 } else { d as i64 };
    launch!(dev, Pairwise, "norms_near", T::SUFFIX, warps(elements(&[x.b, x.n])), THREADS;
        xs, &shape(x), &mu, &mu_stride, &of_x)?;
    launch!(dev, Pairwise, "norms_near", T::SUFFIX, warps(elements(&[copies, c.n])), THREADS;
        cs, &shape(&one), &mu, &mu_stride, &of_c)?;
    let tiles = elements(&[x.b, x.n.div_ceil(PAIR_ROWS), c.n.div_ceil(PAIR_CENTROIDS)]);
    launch!(dev, Pairwise, "pairwise_near", T::SUFFIX, tiles, THREADS, PAIR_SHARED;
        xs, &shape(x), cs, &shape(c), &(metric as i32), &mu, &of_x, &of_c, &(copies as i64), out)
}
