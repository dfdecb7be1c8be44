//! Tensors as kernels take them: their element types, locks and addresses.

use super::device::device;
use crate::{
    error::{Error, Result},
    operand::{written_range, Readable, Source, Target},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{
            result,
            sys::{self, CUtensorMap, CUtensorMapDataType},
            CudaSlice, CudaView, DevicePtr as _, DevicePtrMut, DeviceRepr, ValidAsZeroBits,
        },
        CudaDType, CudaDevice, CudaStorage, WrapErr,
    },
    CpuStorage, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor,
};
use std::{cell::RefCell, marker::PhantomData, mem::MaybeUninit};

/// A stored number and the names it has in `kernels/`.
pub(super) trait Element: CudaDType + DeviceRepr {
    const SUFFIX: &'static str;
    /// The type that scores are filtered in.
    type Filter: CudaDType + DeviceRepr + ValidAsZeroBits;
    /// As the elements of a [`TensorMap`]; none if tensor cores do not multiply them exactly.
    const HALF: Option<CUtensorMapDataType>;
}

macro_rules! element {
    ($($t:ty, $suffix:literal, $filter:ty, $half:expr;)+) => {
        $(impl Element for $t {
            const SUFFIX: &'static str = $suffix;
            type Filter = $filter;
            const HALF: Option<CUtensorMapDataType> = $half;
        })+
    };
}
element! {
    half::f16, "f16", f32, Some(CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16);
    half::bf16, "bf16", f32, Some(CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
    f32, "f32", f32, None;
    f64, "f64", f64, None;
}

/// Runs `$body` with `$t` standing for the Rust type of a float dtype.
macro_rules! typed {
    ($dtype:expr, $t:ident => $body:expr) => {{
        macro_rules! with {
            ($as:ty) => {{
                type $t = $as;
                $body
            }};
        }
        match $dtype {
            candle_core::DType::F16 => with!(half::f16),
            candle_core::DType::BF16 => with!(half::bf16),
            candle_core::DType::F32 => with!(f32),
            candle_core::DType::F64 => with!(f64),
            got => Err($crate::error::Error::DType { argument: "x", got, expected: "F16, BF16, F32 or F64".into() }),
        }
    }};
}
pub(super) use typed;

/// Device memory as kernels take it: where it starts. Null for nothing.
#[repr(transparent)]
pub(super) struct DevicePtr<T> {
    pub(super) address: u64,
    of: PhantomData<T>,
}

impl<T> Clone for DevicePtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for DevicePtr<T> {}

// SAFETY: one pointer, as the kernels declare it.
unsafe impl<T> DeviceRepr for DevicePtr<T> {}

impl<T> DevicePtr<T> {
    pub(super) const NULL: Self = Self::at(0);

    pub(super) const fn at(address: u64) -> Self {
        Self { address, of: PhantomData }
    }

    pub(super) fn is_null(self) -> bool {
        self.address == 0
    }

    /// Copies `len` elements.
    pub(super) fn copy_from(self, dev: &CudaDevice, other: Self, len: usize) -> Result<()> {
        let stream = dev.cuda_stream();
        // SAFETY: both are parts of live allocations of at least this many elements, used on this stream.
        unsafe { result::memcpy_dtod_async(self.address, other.address, len * size_of::<T>(), stream.cu_stream()) }
            .w()?;
        Ok(())
    }

    /// Puts zeros in the place of `len` elements.
    pub(super) fn clear(self, dev: &CudaDevice, len: usize) -> Result<()> {
        let stream = dev.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: a part of a live allocation of at least this many elements, used on this stream.
        Ok(unsafe { result::memset_d8_async(self.address, 0, len * size_of::<T>(), stream.cu_stream()) }.w()?)
    }

    /// The same bytes as elements of another type.
    pub(super) fn cast<U>(self) -> DevicePtr<U> {
        DevicePtr::at(self.address)
    }

    /// From element `at` on.
    pub(super) fn from(self, at: usize) -> Self {
        Self::at(self.address + (at * size_of::<T>()) as u64)
    }
}

/// An input that is locked for reading while a launch is queued.
pub(super) struct Input<'a> {
    storage: StorageGuard<'a>,
    offset: usize,
}

/// A storage, and the holder of its lock.
enum StorageGuard<'a> {
    Here(StorageRef<'a>),
    /// While the op runs.
    ByCandle(&'a CudaStorage),
    Elsewhere,
}

/// Locks the storage of contiguous elements or of [`Rows`](crate::rows::Rows), if Candle has not.
pub(super) fn read<R: Readable + ?Sized>(t: &R) -> Input<'_> {
    let storage = match t.source() {
        Source::Tensor(t) => StorageGuard::Here(t.storage_and_layout().0),
        Source::Cuda(storage) => StorageGuard::ByCandle(storage),
        Source::Cpu(_) => StorageGuard::Elsewhere,
    };
    Input { storage, offset: t.layout().start_offset() }
}

impl Input<'_> {
    pub(super) fn storage(&self) -> Result<&CudaStorage> {
        match &self.storage {
            StorageGuard::ByCandle(storage) => return Ok(storage),
            StorageGuard::Here(locked) => {
                if let Storage::Cuda(storage) = &**locked {
                    return Ok(storage);
                }
            }
            StorageGuard::Elsewhere => {}
        }
        Err(Error::Unsupported { op: "a CUDA kernel", device: "of an argument elsewhere".into() })
    }

    /// Everything from the first element on.
    pub(super) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        Ok(self.storage()?.as_cuda_slice::<T>()?.slice(self.offset..))
    }
}

/// Copies a contiguous tensor to memory that is there already: to make new pages of it takes one thread longer than the copy.
pub(super) fn copy_to_host<T: CudaDType + DeviceRepr>(from: &Tensor, to: &mut [T]) -> Result<()> {
    let (stream, input) = (device(from)?.cuda_stream(), read(from));
    stream.memcpy_dtoh(&input.view::<T>()?.slice(..from.elem_count()), to).w()?;
    stream.synchronize().w()?;
    Ok(())
}

/// Lets `f` launch what writes the elements of a target.
fn launch_on<T: CudaDType>(
    storage: &mut CudaStorage,
    layout: &Layout,
    f: impl FnOnce(DevicePtr<T>) -> Result<()>,
) -> Result<()> {
    let stream = storage.device.cuda_stream();
    let Some(range) = written_range(layout) else {
        return Err(candle_core::Error::msg("a result is not a contiguous tensor").into());
    };
    let mut slice = storage.as_cuda_slice_mut::<T>()?.slice_mut(range);
    // Held until the launches are queued: it orders them with what other streams do to the storage.
    let (address, _order) = slice.device_ptr_mut(&stream);
    f(DevicePtr::at(address))
}

/// Lets `f` launch what writes the elements of a target, which is locked meanwhile.
pub(super) fn write<'a, T: CudaDType>(
    to: impl Into<Target<'a>>,
    f: impl FnOnce(DevicePtr<T>) -> Result<()>,
) -> Result<()> {
    struct Write<T, F>(RefCell<(Option<F>, Result<()>)>, PhantomData<T>);
    impl<T: CudaDType, F: FnOnce(DevicePtr<T>) -> Result<()>> InplaceOp1 for Write<T, F> {
        fn name(&self) -> &'static str {
            "write"
        }
        fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
            candle_core::bail!("a CUDA kernel cannot write to the CPU")
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
            let (f, out) = &mut *self.0.borrow_mut();
            if let Some(f) = f.take() {
                *out = launch_on(storage, layout, f);
            }
            Ok(())
        }
    }
    let t = match to.into() {
        Target::Tensor(t) => t,
        Target::Cuda(storage, layout) => return launch_on(storage, &layout, f),
        Target::Cpu(..) => {
            return Err(Error::Unsupported { op: "a CUDA kernel", device: "of a result elsewhere".into() })
        }
    };
    let op = Write(RefCell::new((Some(f), Ok(()))), PhantomData);
    t.inplace_op1(&op)?;
    op.0.into_inner().1
}

/// Puts zeros in the place of what is there.
pub(super) fn zero<T: CudaDType>(dev: &CudaDevice, to: Target<'_>) -> Result<()> {
    let len = to.layout().shape().elem_count();
    write::<T>(to, |to| if len == 0 { Ok(()) } else { to.clear(dev, len) })
}

/// The elements of a tensor that only this fit has.
pub(super) fn own<T: CudaDType>(t: &(impl Readable + ?Sized)) -> Result<DevicePtr<T>> {
    let input = read(t);
    let address = input.view::<T>()?.device_ptr(&device(t)?.cuda_stream()).0;
    Ok(DevicePtr::at(address))
}

/// A new contiguous tensor.
pub(super) fn tensor<T: CudaDType>(dev: &CudaDevice, slice: CudaSlice<T>, shape: impl Into<Shape>) -> Tensor {
    Tensor::from((Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, dev.clone())), shape.into()))
}

/// The copy engine reads this: a tensor of rows under the swizzle of `kernels/arch/ptx.cuh`.
#[repr(transparent)]
pub(super) struct TensorMap(CUtensorMap);

// SAFETY: plain words, passed by value as the kernels declare them.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Boxes of `rows` rows and 64 columns of `(b, n, d)` halves at `address`; strides are in elements, multiples of 8.
    pub(super) fn new(
        half: CUtensorMapDataType,
        address: u64,
        [b, n, d]: [usize; 3],
        strides: [usize; 2],
        rows: usize,
    ) -> Result<Self> {
        let mut map = MaybeUninit::uninit();
        let sizes = [d, n, b].map(|size| size as u64);
        // A step that is never taken has to be a step all the same.
        let row = if n > 1 { strides[1] } else { d.next_multiple_of(8) };
        let steps = [row, if b > 1 { strides[0] } else { row * n }].map(|step| 2 * step as u64);
        let (boxes, every) = ([64, rows as u32, 1], [1; 3]);
        // SAFETY: writes `map` and reads three-element arrays; the address is only recorded.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                half,
                3,
                address as *mut _,
                sizes.as_ptr(),
                steps.as_ptr(),
                boxes.as_ptr(),
                every.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().w()?;
        // SAFETY: written, or there would have been an error.
        Ok(Self(unsafe { map.assume_init() }))
    }
}
