//! The CUDA backend: every kernel is compiled by `build.rs`, embedded, and launched on the tensor's own stream.
//!
//! Nothing here waits for the device or reads from it, and every launch goes through [`Kernel::run`].

pub(crate) mod assign;
pub(crate) mod update;

use crate::{problem::Rows, Error, Result};
use candle_core::cuda_backend::{
    cudarc::{
        driver::{
            sys::CUresult, CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, DeviceRepr, DriverError,
            LaunchArgs, LaunchConfig, PushKernelArg, ValidAsZeroBits,
        },
        nvrtc::Ptx,
    },
    CudaDType, CudaDevice, CudaStorage, WrapErr,
};
use candle_core::{Device, Shape, Storage, StorageRef, Tensor};
use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
};

/// A stored number and the names it has in `kernels/`.
trait Element: CudaDType + DeviceRepr {
    const SUFFIX: &'static str;
    /// The type that scores are filtered in.
    type Filter: CudaDType + DeviceRepr + ValidAsZeroBits;
}

macro_rules! element {
    ($($t:ty, $suffix:literal, $filter:ty;)+) => {
        $(impl Element for $t {
            const SUFFIX: &'static str = $suffix;
            type Filter = $filter;
        })+
    };
}
element!(half::f16, "f16", f32; half::bf16, "bf16", f32; f32, "f32", f32; f64, "f64", f64;);

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
            got => Err($crate::Error::DType { argument: "x", got, expected: "F16, BF16, F32 or F64".into() }),
        }
    }};
}
use typed;

/// A compiled file of `kernels/`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Image {
    Norms,
    AssignSimt,
    Sort,
    Update,
}

impl Image {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Norms => include_bytes!(concat!(env!("OUT_DIR"), "/norms.fatbin")),
            Self::AssignSimt => include_bytes!(concat!(env!("OUT_DIR"), "/assign_simt.fatbin")),
            Self::Sort => include_bytes!(concat!(env!("OUT_DIR"), "/sort.fatbin")),
            Self::Update => include_bytes!(concat!(env!("OUT_DIR"), "/update.fatbin")),
        }
    }
}

/// What has been loaded, by context. The handles keep their context alive, so an address is never reused.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, Image), Arc<CudaModule>>,
    functions: HashMap<(usize, &'static str, &'static str), CudaFunction>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

/// A kernel, ready to launch on a device's stream.
struct Kernel {
    name: &'static str,
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// The kernel `name_suffix`, or `name` if the suffix is empty.
    fn get(dev: &CudaDevice, image: Image, name: &'static str, suffix: &'static str) -> Result<Self> {
        let stream = dev.cuda_stream();
        let context = stream.context().cu_ctx() as usize;
        let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(function) = loaded.functions.get(&(context, name, suffix)) {
            return Ok(Self { name, function: function.clone(), stream });
        }
        let failed = |e: DriverError| {
            let source = Err::<(), _>(e).w().unwrap_err();
            Error::Launch { kernel: name, grid: 0, block: 0, shared: 0, source }
        };
        let module = match loaded.modules.get(&(context, image)) {
            Some(module) => module.clone(),
            None => {
                let binary = Ptx::from_binary(image.bytes().to_vec());
                let module = stream.context().load_module(binary).map_err(failed)?;
                loaded.modules.insert((context, image), module.clone());
                module
            }
        };
        let full = if suffix.is_empty() { name.to_string() } else { format!("{name}_{suffix}") };
        let function = module.load_function(&full).map_err(failed)?;
        loaded.functions.insert((context, name, suffix), function.clone());
        Ok(Self { name, function, stream })
    }

    /// Launches; nothing if the grid is empty. Kernels loop over what a clamped grid does not cover.
    fn run(&self, args: &mut LaunchArgs<'_>, grid: usize, block: usize) -> Result<()> {
        if grid == 0 {
            return Ok(());
        }
        let (grid, block) = (grid.min(i32::MAX as usize) as u32, block as u32);
        let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: `launch!` passes the parameters of the kernel in its order, as views into live allocations of this
        // device or plain values, and every kernel stays inside the sizes it is given.
        let launched = unsafe { args.launch(config) }.w();
        launched.map_err(|source| Error::Launch { kernel: self.name, grid, block, shared: 0, source })?;
        Ok(())
    }
}

/// `launch!(device, image, "name", suffix, grid, block; arguments..)?`: arguments are references, in the kernel's order.
macro_rules! launch {
    ($dev:expr, $image:ident, $name:literal, $suffix:expr, $grid:expr, $block:expr; $($arg:expr),+ $(,)?) => {{
        let kernel = $crate::cuda::Kernel::get($dev, $crate::cuda::Image::$image, $name, $suffix)?;
        kernel.run(kernel.stream.launch_builder(&kernel.function)$(.arg($arg))+, $grid, $block)
    }};
}
use launch;

/// A pointer argument that may be null.
struct Nullable<'a, T>(&'a Option<CudaView<'a, T>>);

// SAFETY: pushes exactly one pointer-sized argument, which outlives the launch.
unsafe impl<'a, 'b: 'a, T> PushKernelArg<Nullable<'b, T>> for LaunchArgs<'a> {
    fn arg(&mut self, arg: Nullable<'b, T>) -> &mut Self {
        static NULL: u64 = 0;
        match arg.0 {
            Some(view) => self.arg(view),
            None => self.arg(&NULL),
        }
    }
}

/// `struct Rows` of `kernels/common.cuh`.
#[repr(C)]
struct Shape5 {
    batch_stride: i64,
    row_stride: i64,
    b: i64,
    n: i64,
    d: i64,
}

// SAFETY: plain integers, laid out as in C.
unsafe impl DeviceRepr for Shape5 {}

fn shape(r: &Rows) -> Shape5 {
    let (batch_stride, row_stride) = (r.batch_stride as i64, r.row_stride as i64);
    Shape5 { batch_stride, row_stride, b: r.b as i64, n: r.n as i64, d: r.d as i64 }
}

/// A read lock on a tensor's storage, held while a launch is queued.
struct Input<'a> {
    storage: StorageRef<'a>,
    offset: usize,
}

/// Locks the storage of a contiguous tensor or of [`Rows`].
fn read(t: &Tensor) -> Input<'_> {
    let (storage, layout) = t.storage_and_layout();
    Input { storage, offset: layout.start_offset() }
}

impl Input<'_> {
    /// Everything from the tensor's first element on.
    fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match &*self.storage {
            Storage::Cuda(s) => Ok(s.as_cuda_slice::<T>()?.slice(self.offset..)),
            _ => Err(Error::Unsupported { op: "a CUDA kernel", device: "of an argument elsewhere".into() }),
        }
    }
}

fn device(t: &Tensor) -> Result<&CudaDevice> {
    match t.device() {
        Device::Cuda(dev) => Ok(dev),
        other => Err(Error::Unsupported { op: "a CUDA kernel", device: format!("{:?}", other.location()) }),
    }
}

/// The product of sizes, or `usize::MAX`, which no allocation satisfies.
fn elements(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}

/// Memory for `len` elements (at least one: CUDA refuses none), not yet written.
fn alloc<T: DeviceRepr>(dev: &CudaDevice, op: &'static str, len: usize) -> Result<CudaSlice<T>> {
    let len = len.max(1);
    let bytes = len.saturating_mul(size_of::<T>());
    if bytes > isize::MAX as usize {
        let source = candle_core::Error::Msg("more bytes than an address has".into());
        return Err(Error::OutOfMemory { op, bytes, source });
    }
    // SAFETY: the callers launch a kernel that writes every element before any is read, or fill it with `zeros`.
    unsafe { dev.cuda_stream().alloc::<T>(len) }.map_err(|e| {
        let exhausted = e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        let source = Err::<(), _>(e).w().unwrap_err();
        if exhausted {
            Error::OutOfMemory { op, bytes, source }
        } else {
            Error::Candle(source)
        }
    })
}

fn zeros<T: DeviceRepr + ValidAsZeroBits>(dev: &CudaDevice, op: &'static str, len: usize) -> Result<CudaSlice<T>> {
    let mut slice = alloc(dev, op, len)?;
    dev.cuda_stream().memset_zeros(&mut slice).w()?;
    Ok(slice)
}

/// A new contiguous tensor.
fn tensor<T: CudaDType>(dev: &CudaDevice, slice: CudaSlice<T>, shape: impl Into<Shape>) -> Tensor {
    Tensor::from((Storage::Cuda(CudaStorage::wrap_cuda_slice(slice, dev.clone())), shape.into()))
}
