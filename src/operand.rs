//! An op reads operands and writes targets: tensors, or the storages that Candle has locked before it calls a custom op.

use candle_core::{
    backend::BackendStorage, CpuStorage, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor,
};
use std::ops::Range;

/// Elements that Candle's kernels on a GPU count in 32 bits: with as many steps as they take beyond the last one.
pub(crate) const COUNTED: usize = 1 << 31;

/// An input of an op.
#[derive(Clone, Debug)]
pub(crate) enum Operand<'a> {
    /// Its storage is locked when it is read.
    Tensor(Tensor),
    /// Candle holds the lock while the op runs.
    Cpu(&'a CpuStorage, Layout),
    Cuda(&'a CudaStorage, Layout),
}

/// The storage of an input's elements.
#[derive(Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) enum Source<'a> {
    Tensor(&'a Tensor),
    Cpu(&'a CpuStorage),
    Cuda(&'a CudaStorage),
}

/// An op can read this: a tensor or an [`Operand`].
pub(crate) trait Readable {
    fn source(&self) -> Source<'_>;
    fn layout(&self) -> &Layout;

    fn dims(&self) -> &[usize] {
        self.layout().dims()
    }

    fn elem_count(&self) -> usize {
        self.layout().shape().elem_count()
    }

    fn dtype(&self) -> DType {
        match self.source() {
            Source::Tensor(t) => t.dtype(),
            Source::Cpu(s) => s.dtype(),
            Source::Cuda(s) => s.dtype(),
        }
    }

    fn device(&self) -> Device {
        match self.source() {
            Source::Tensor(t) => t.device().clone(),
            Source::Cpu(_) => Device::Cpu,
            Source::Cuda(s) => Device::Cuda(s.device().clone()),
        }
    }
}

impl Readable for Tensor {
    fn source(&self) -> Source<'_> {
        Source::Tensor(self)
    }

    fn layout(&self) -> &Layout {
        self.layout()
    }
}

impl Readable for Operand<'_> {
    fn source(&self) -> Source<'_> {
        match self {
            Self::Tensor(t) => Source::Tensor(t),
            Self::Cpu(s, _) => Source::Cpu(s),
            Self::Cuda(s, _) => Source::Cuda(s),
        }
    }

    fn layout(&self) -> &Layout {
        match self {
            Self::Tensor(t) => t.layout(),
            Self::Cpu(_, layout) | Self::Cuda(_, layout) => layout,
        }
    }
}

impl From<&Tensor> for Operand<'_> {
    fn from(t: &Tensor) -> Self {
        Self::Tensor(t.detach())
    }
}

impl Operand<'_> {
    /// A part of it.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        self.viewed(|t| t.narrow(dim, start, len), |layout| layout.narrow(dim, start, len))
    }

    /// Contiguous elements in another shape.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let as_shape = |layout: &Layout| Ok(Layout::contiguous_with_offset(shape.clone(), layout.start_offset()));
        self.viewed(|t| t.reshape(&shape), as_shape)
    }

    /// With a dimension of one element before `dim`.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self> {
        let unsqueezed = |layout: &Layout| {
            let (mut dims, mut strides) = (layout.dims().to_vec(), layout.stride().to_vec());
            dims.insert(dim, 1);
            strides.insert(dim, 1);
            Ok(Layout::new(dims.into(), strides, layout.start_offset()))
        };
        self.viewed(|t| t.unsqueeze(dim), unsqueezed)
    }

    fn viewed(
        &self,
        tensor: impl FnOnce(&Tensor) -> Result<Tensor>,
        layout: impl FnOnce(&Layout) -> Result<Layout>,
    ) -> Result<Self> {
        Ok(match self {
            Self::Tensor(t) => Self::Tensor(tensor(t)?),
            Self::Cpu(s, l) => Self::Cpu(s, layout(l)?),
            Self::Cuda(s, l) => Self::Cuda(s, layout(l)?),
        })
    }
}

/// The range of a target's elements in its storage; none if they are not contiguous. An empty view may begin beyond the end.
pub(crate) fn written_range(layout: &Layout) -> Option<Range<usize>> {
    let (start, end) = layout.contiguous_offsets()?;
    Some(if start == end { 0..0 } else { start..end })
}

/// Contiguous elements that an op writes.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    /// Its storage is locked while it is written.
    Tensor(&'a Tensor),
    /// Candle holds the lock, or nobody else has the storage.
    Cpu(&'a mut CpuStorage, Layout),
    Cuda(&'a mut CudaStorage, Layout),
}

impl<'a> Target<'a> {
    /// A whole storage of so many elements, which only this op has.
    pub fn whole(storage: &'a mut Storage, shape: impl Into<Shape>) -> Self {
        match storage {
            Storage::Cpu(s) => Self::Cpu(s, Layout::contiguous(shape)),
            Storage::Cuda(s) => Self::Cuda(s, Layout::contiguous(shape)),
            Storage::Metal(_) => unreachable!("no back end allocates this"),
        }
    }

    pub fn by_ref(&mut self) -> Target<'_> {
        match self {
            Self::Tensor(t) => Target::Tensor(t),
            Self::Cpu(s, layout) => Target::Cpu(s, layout.clone()),
            Self::Cuda(s, layout) => Target::Cuda(s, layout.clone()),
        }
    }

    pub fn dims(&self) -> &[usize] {
        self.layout().dims()
    }

    pub fn layout(&self) -> &Layout {
        match self {
            Self::Tensor(t) => t.layout(),
            Self::Cpu(_, layout) | Self::Cuda(_, layout) => layout,
        }
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::Tensor(t) => t.dtype(),
            Self::Cpu(s, _) => s.dtype(),
            Self::Cuda(s, _) => s.dtype(),
        }
    }

    pub fn device(&self) -> Device {
        match self {
            Self::Tensor(t) => t.device().clone(),
            Self::Cpu(..) => Device::Cpu,
            Self::Cuda(s, _) => Device::Cuda(s.device().clone()),
        }
    }
}

impl<'a> From<&'a Tensor> for Target<'a> {
    fn from(t: &'a Tensor) -> Self {
        Self::Tensor(t)
    }
}
