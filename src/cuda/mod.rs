//! The CUDA backend: every kernel is compiled by `build.rs`, embedded, and launched on the tensor's own stream.
//!
//! Nothing here waits for the device or reads from it while one thread works, and every launch goes through [`Kernel`]. Threads
//! take over from each other by [`fence`].

pub(crate) mod assign;
pub(crate) mod attend;
mod fence;
pub(crate) mod route;
mod select;
pub(crate) mod update;
pub(crate) use fence::{capturing, Fence};

use crate::{
    ops::{Progress, Turn},
    plan::{Arch, STATIC_SHARED},
    problem::Rows,
    Error, Result,
};
use candle_core::cuda_backend::{
    cudarc::{
        driver::{
            result,
            sys::{
                self, CUdevice_attribute, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
                CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUresult,
                CUtensorMap, CUtensorMapDataType,
            },
            CudaFunction, CudaModule, CudaSlice, CudaStream, CudaView, DevicePtr, DevicePtrMut, DeviceRepr,
            DriverError, LaunchArgs, LaunchConfig, PushKernelArg, ValidAsZeroBits,
        },
        nvrtc::Ptx,
    },
    CudaDType, CudaDevice, CudaStorage, WrapErr,
};
use candle_core::{CpuStorage, Device, InplaceOp1, Shape, Storage, StorageRef, Tensor};
use std::{
    cell::{Cell, RefCell},
    collections::{hash_map::Entry, HashMap},
    marker::PhantomData,
    mem::MaybeUninit,
    sync::{Arc, LazyLock, Mutex, MutexGuard},
    thread::{self, ThreadId},
};

/// What chooses kernels.
pub(crate) fn arch(dev: &CudaDevice) -> Result<Arch> {
    let stream = dev.cuda_stream();
    let (major, minor) = stream.context().compute_capability().w()?;
    let processors = stream.context().attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).w()?;
    Ok(Arch::Cuda { capability: (10 * major + minor) as u32, processors: processors as usize })
}

thread_local!(static LAUNCHES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) });

/// The kernels that this thread has launched since it last asked; the first call starts the record.
pub fn launches() -> Vec<String> {
    LAUNCHES.with(|l| l.borrow_mut().replace(vec![]).unwrap_or_default())
}

/// A stored number and the names it has in `kernels/`.
trait Element: CudaDType + DeviceRepr {
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
            got => Err($crate::Error::DType { argument: "x", got, expected: "F16, BF16, F32 or F64".into() }),
        }
    }};
}
use typed;

/// Lanes of a warp.
const WARP: usize = 32;

/// A compiled file of `kernels/`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Image {
    Norms,
    Prepare,
    Split,
    AssignSimt,
    AssignNarrow,
    AssignSm80,
    AssignSm90,
    Attend,
    FitNarrow,
    FitResident,
    Recheck,
    Route,
    Select,
    Sort,
    Update,
}

impl Image {
    fn bytes(self) -> &'static [u8] {
        match self {
            Self::Norms => include_bytes!(concat!(env!("OUT_DIR"), "/norms.fatbin")),
            Self::Prepare => include_bytes!(concat!(env!("OUT_DIR"), "/prepare.fatbin")),
            Self::Split => include_bytes!(concat!(env!("OUT_DIR"), "/split.fatbin")),
            Self::AssignSimt => include_bytes!(concat!(env!("OUT_DIR"), "/assign_simt.fatbin")),
            Self::AssignNarrow => include_bytes!(concat!(env!("OUT_DIR"), "/assign_narrow.fatbin")),
            Self::AssignSm80 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_sm80.fatbin")),
            Self::AssignSm90 => include_bytes!(concat!(env!("OUT_DIR"), "/assign_sm90.fatbin")),
            Self::Attend => include_bytes!(concat!(env!("OUT_DIR"), "/attend.fatbin")),
            Self::FitNarrow => include_bytes!(concat!(env!("OUT_DIR"), "/fit_narrow.fatbin")),
            Self::FitResident => include_bytes!(concat!(env!("OUT_DIR"), "/fit_resident.fatbin")),
            Self::Recheck => include_bytes!(concat!(env!("OUT_DIR"), "/recheck.fatbin")),
            Self::Route => include_bytes!(concat!(env!("OUT_DIR"), "/route.fatbin")),
            Self::Select => include_bytes!(concat!(env!("OUT_DIR"), "/select.fatbin")),
            Self::Sort => include_bytes!(concat!(env!("OUT_DIR"), "/sort.fatbin")),
            Self::Update => include_bytes!(concat!(env!("OUT_DIR"), "/update.fatbin")),
        }
    }
}

/// What has been loaded, by context. The handles keep their context alive, so an address is never reused.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, Image), Arc<CudaModule>>,
    /// With the dynamic shared memory that each has been allowed.
    functions: HashMap<(usize, &'static str, &'static str), (CudaFunction, usize)>,
    /// How many clusters of 1, 2, .. blocks run at once; empty where the code is for GPUs without clusters.
    clusters: HashMap<(usize, &'static str, &'static str), Vec<usize>>,
}

static LOADED: LazyLock<Mutex<Loaded>> = LazyLock::new(Mutex::default);

/// Dynamic shared memory that a launch gets unasked, beside what its kernel has of its own.
const FREE_SHARED: usize = 48 * 1024 - STATIC_SHARED;

/// A kernel, ready to launch on a device's stream.
struct Kernel {
    name: &'static str,
    suffix: &'static str,
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    /// The kernel `name_suffix`, or `name` if the suffix is empty, for launches with `shared` bytes of dynamic memory.
    fn get(dev: &CudaDevice, image: Image, name: &'static str, suffix: &'static str, shared: usize) -> Result<Self> {
        let stream = dev.cuda_stream();
        let context = stream.context().cu_ctx() as usize;
        let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((function, allowed)) = loaded.functions.get(&(context, name, suffix)) {
            if shared <= *allowed {
                return Ok(Self { name, suffix, function: function.clone(), stream });
            }
        }
        let failed = |e: DriverError| {
            let source = Err::<(), _>(e).w().unwrap_err();
            Error::Launch { kernel: name, grid: 0, block: 0, shared: shared as u32, source }
        };
        stream.context().bind_to_thread().map_err(failed)?;
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
        if shared > FREE_SHARED {
            let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.set_attribute(most, shared as i32).map_err(failed)?;
        }
        loaded.functions.insert((context, name, suffix), (function.clone(), shared.max(FREE_SHARED)));
        Ok(Self { name, suffix, function, stream })
    }

    /// The largest cluster, of at most `most` blocks, of which `count` run at once, or one block; none where this code
    /// is for GPUs without clusters, as PTX for Ampere is on any.
    fn cluster(&self, count: usize, block: usize, most: usize) -> Result<Option<usize>> {
        let key = (self.stream.context().cu_ctx() as usize, self.name, self.suffix);
        let mut loaded = LOADED.lock().unwrap_or_else(|e| e.into_inner());
        let running = match loaded.clusters.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let version = self.function.get_attribute(CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION).w()?;
                let most = if version < 90 { 0 } else { most };
                unknown.insert((1..=most).map(|size| self.clusters_at_once(size, block)).collect::<Result<_>>()?)
            }
        };
        let largest = running.iter().take(most).rposition(|&running| count <= running).unwrap_or(0) + 1;
        Ok((!running.is_empty()).then_some(largest))
    }

    /// How many clusters of so many blocks run at once.
    fn clusters_at_once(&self, size: usize, block: usize) -> Result<usize> {
        let mut count = 0;
        self.stream.context().bind_to_thread().w()?;
        let mut attributes = [cluster_size(size)];
        let config = self.in_clusters(size, block, 0, &mut attributes);
        // SAFETY: writes one integer, and reads a configuration whose attributes are alive.
        unsafe { sys::cuOccupancyMaxActiveClusters(&mut count, self.function.cu_function(), &config) }.result().w()?;
        Ok(count as usize)
    }

    /// Whether so many blocks run at once, as those of a cooperative launch have to. Fewer do on a part of a device.
    fn runs_at_once(&self, grid: usize, block: usize, shared: usize) -> Result<bool> {
        let context = self.stream.context();
        context.bind_to_thread().w()?;
        let each = self.function.occupancy_max_active_blocks_per_multiprocessor(block as u32, shared, None).w()?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let most = each as usize * context.attribute(count).w()? as usize;
        Ok(grid <= AT_ONCE.get().map_or(most, |limit| limit.min(most)))
    }

    /// A launch with attributes, which have to outlive it.
    fn in_clusters(
        &self,
        grid: usize,
        block: usize,
        shared: usize,
        attributes: &mut [CUlaunchAttribute],
    ) -> CUlaunchConfig {
        CUlaunchConfig {
            gridDimX: grid as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        }
    }

    /// Launches a kernel with one parameter, in clusters of so many blocks; without one, for GPUs that have none. A kernel
    /// in clusters takes its places while the one before it ends, and has to wait for it. The addresses in the parameter
    /// have to be in order with other streams.
    fn run_clusters<P: DeviceRepr>(
        &self,
        parameter: &P,
        grid: usize,
        block: usize,
        shared: usize,
        cluster: Option<usize>,
    ) -> Result<()> {
        if grid == 0 {
            return Ok(());
        }
        self.record();
        let failed = |source| Error::Launch {
            kernel: self.name,
            grid: grid.min(u32::MAX as usize) as u32,
            block: block as u32,
            shared: shared as u32,
            source,
        };
        self.stream.context().bind_to_thread().w().map_err(failed)?;
        let mut attributes = cluster.map_or(vec![], |blocks| vec![cluster_size(blocks)]);
        attributes.extend((cluster.is_some() && *EARLY).then(early));
        let config = self.in_clusters(grid, block, shared, &mut attributes);
        let mut parameters = [std::ptr::from_ref(parameter).cast_mut().cast()];
        // SAFETY: the kernel's parameter is laid out as `parameter`, with parts of live allocations of this device, and
        // every kernel stays inside the sizes it is given.
        let status = unsafe {
            let function = self.function.cu_function();
            sys::cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), std::ptr::null_mut())
        };
        status.result().w().map_err(failed)
    }

    fn record(&self) {
        LAUNCHES.with(|l| l.borrow_mut().iter_mut().for_each(|l| l.push(format!("{}_{}", self.name, self.suffix))));
    }

    /// Launches; nothing if the grid is empty. Kernels loop over what a clamped grid does not cover. The blocks of a
    /// cooperative launch all run at once, or there is none and it is [`Error::Unsupported`].
    fn run(
        &self,
        args: &mut LaunchArgs<'_>,
        grid: usize,
        block: usize,
        shared: usize,
        cooperative: bool,
    ) -> Result<()> {
        if grid == 0 {
            return Ok(());
        }
        let (grid, block, shared) = (grid.min(i32::MAX as usize) as u32, block as u32, shared as u32);
        self.record();
        let failed = |source| Error::Launch { kernel: self.name, grid, block, shared, source };
        let config = LaunchConfig { grid_dim: (grid, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: shared };
        // SAFETY: `launch!` passes the parameters of the kernel in its order, as views into live allocations of this
        // device or plain values, and every kernel stays inside the sizes it is given.
        let launched = unsafe {
            if cooperative {
                args.launch_cooperative(config)
            } else {
                args.launch(config)
            }
        };
        if let Err(DriverError(CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE)) = launched {
            return Err(Error::Unsupported {
                op: self.name,
                device: format!("that runs fewer than {grid} blocks at once"),
            });
        }
        launched.w().map_err(failed)?;
        Ok(())
    }
}

/// The attribute of a launch in clusters of so many blocks.
fn cluster_size(blocks: usize) -> CUlaunchAttribute {
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
        pad: Default::default(),
        value: CUlaunchAttributeValue {
            clusterDim: CUlaunchAttributeValue_union__bindgen_ty_1 { x: blocks as u32, y: 1, z: 1 },
        },
    }
}

/// Whether the driver can also capture launches that begin early, as those for CUDA 12.3 and later can.
static EARLY: LazyLock<bool> = LazyLock::new(|| {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().is_ok() && version >= 12_030
});

/// The attribute of a launch that begins while the one before it ends.
fn early() -> CUlaunchAttribute {
    CUlaunchAttribute {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: Default::default(),
        value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    }
}

/// `launch!(device, image, name, suffix, grid, block, shared; arguments..)?`: arguments are references, in the kernel's
/// order; `shared` is dynamic memory in bytes and may be left out.
macro_rules! launch {
    ($dev:expr, $image:ident, $name:expr, $suffix:expr, $grid:expr, $block:expr; $($arg:expr),+ $(,)?) => {
        $crate::cuda::launch!($dev, $image, $name, $suffix, $grid, $block, 0; $($arg),+)
    };
    ($dev:expr, $image:ident, $name:expr, $suffix:expr, $grid:expr, $block:expr, $shared:expr; $($arg:expr),+ $(,)?) => {{
        let kernel = $crate::cuda::Kernel::get($dev, $crate::cuda::Image::$image, $name, $suffix, $shared)?;
        let cooperative = $crate::cuda::Image::$image == $crate::cuda::Image::FitResident;
        kernel.run(kernel.stream.launch_builder(&kernel.function)$(.arg($arg))+, $grid, $block, $shared, cooperative)
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

/// Device memory that ops use one after another, whatever threads, streams and devices they are on.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Whether it outlives the call that makes it.
    kept: bool,
    /// Used up when the next op begins.
    scratch: Mutex<Option<Block>>,
    /// Zeros whenever no op is under way.
    zeros: Mutex<Option<Block>>,
}

impl Memory {
    /// For a value that outlives the call that makes it.
    pub fn kept() -> Self {
        Self { kept: true, ..Self::default() }
    }
}

/// Memory of one stream.
#[derive(Debug)]
struct Block {
    bytes: CudaSlice<u8>,
    /// The thread that used it last, where each has a stream of its own.
    thread: Option<ThreadId>,
}

impl Block {
    fn new(dev: &CudaDevice, op: &'static str, bytes: usize, zeroed: bool) -> Result<Self> {
        let bytes = if zeroed { zeros(dev, op, bytes)? } else { alloc(dev, op, bytes)? };
        let thread = fence::thread_of(bytes.stream());
        Ok(Self { bytes, thread })
    }

    /// Lets this thread go on where the last one was.
    fn take_over(&mut self) -> Result<()> {
        let thread = fence::thread_of(self.bytes.stream());
        if self.thread != thread {
            fence::wait_for_threads(self.bytes.stream())?;
            self.thread = thread;
        }
        Ok(())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // It is freed on its stream, which is that of the thread that does so, in the context that is current.
        let context = self.bytes.context();
        context.record_err(context.bind_to_thread());
        if self.thread.is_some_and(|last| last != thread::current().id()) {
            context.record_err(context.synchronize());
        }
    }
}

/// Memory to be: what starts as zeros, then the rest, so that one allocation and one fill serve several kernels.
#[derive(Default)]
struct Layout {
    zeroed: usize,
    rest: usize,
}

/// Where something lies in a [`Workspace`].
#[derive(Clone, Copy)]
struct Place<T> {
    zeroed: bool,
    offset: usize,
    of: PhantomData<T>,
}

impl Layout {
    fn place<T>(end: &mut usize, zeroed: bool, len: usize) -> Place<T> {
        let offset = *end;
        *end = offset.saturating_add(len.saturating_mul(size_of::<T>())).saturating_add(255) / 256 * 256;
        Place { zeroed, offset, of: PhantomData }
    }
    /// `len` elements of zero bytes.
    fn zeroed<T>(&mut self, len: usize) -> Place<T> {
        Self::place(&mut self.zeroed, true, len)
    }
    /// Either.
    fn place_for<T>(&mut self, zeroed: bool, len: usize) -> Place<T> {
        if zeroed {
            self.zeroed(len)
        } else {
            self.unwritten(len)
        }
    }
    /// `len` elements, not yet written.
    fn unwritten<T>(&mut self, len: usize) -> Place<T> {
        Self::place(&mut self.rest, false, len)
    }

    /// Scratch for one op, which the next one takes over.
    fn scratch<'a>(self, dev: &CudaDevice, op: &'static str, memory: &'a Memory) -> Result<Workspace<'a>> {
        let bytes = self.zeroed.saturating_add(self.rest);
        let mut held = Held::of(memory, dev, op, bytes, false)?;
        let block = held.block();
        if self.zeroed > 0 {
            dev.cuda_stream().memset_zeros(&mut block.bytes.slice_mut(..self.zeroed)).w()?;
        }
        let address = block.bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Workspace { _held: held, address, zeroed: self.zeroed })
    }

    /// Zeros, which the op has to leave as zeros.
    fn zeros<'a>(self, dev: &CudaDevice, op: &'static str, memory: &'a Memory) -> Result<Workspace<'a>> {
        let mut held = Held::of(memory, dev, op, self.zeroed, true)?;
        let address = held.block().bytes.device_ptr(&dev.cuda_stream()).0;
        Ok(Workspace { _held: held, address, zeroed: self.zeroed })
    }
}

/// Memory while an op queues its work, which nobody else does to this memory meanwhile.
enum Held<'a> {
    Kept(MutexGuard<'a, Option<Block>>),
    /// What a capture allocates is its graph's, and is freed there.
    Captured(Block),
}

impl<'a> Held<'a> {
    /// At least so many bytes of the device's stream: those that are there, or new ones.
    fn of(memory: &'a Memory, dev: &CudaDevice, op: &'static str, bytes: usize, zeroed: bool) -> Result<Self> {
        let slot = if zeroed { &memory.zeros } else { &memory.scratch };
        let mut held = slot.lock().unwrap_or_else(|e| e.into_inner());
        let stream = dev.cuda_stream();
        match &mut *held {
            Some(block) if block.bytes.stream() == &stream && block.bytes.len() >= bytes => block.take_over()?,
            _ if memory.kept && fence::capturing(&stream)? => {
                return Ok(Self::Captured(Block::new(dev, op, bytes, zeroed)?))
            }
            _ => {
                // The old one first, so that there are never both.
                *held = None;
                *held = Some(Block::new(dev, op, bytes, zeroed)?);
            }
        }
        Ok(Self::Kept(held))
    }

    fn block(&mut self) -> &mut Block {
        match self {
            Self::Kept(held) => held.as_mut().expect("just made"),
            Self::Captured(block) => block,
        }
    }
}

/// Memory of an op. Its parts go to launches on its device's stream, and so does its release: the order of the stream
/// keeps them valid.
struct Workspace<'a> {
    _held: Held<'a>,
    address: u64,
    zeroed: usize,
}

impl Workspace<'_> {
    fn part<T>(&self, place: Place<T>) -> Part<T> {
        let offset = place.offset + if place.zeroed { 0 } else { self.zeroed };
        Part { address: self.address + offset as u64, of: PhantomData }
    }
}

/// Device memory as kernels take it: where it starts. Null for nothing.
#[repr(transparent)]
struct Part<T> {
    address: u64,
    of: PhantomData<T>,
}

impl<T> Clone for Part<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Part<T> {}

// SAFETY: one pointer, as the kernels declare it.
unsafe impl<T> DeviceRepr for Part<T> {}

impl<T> Part<T> {
    const NULL: Self = Self { address: 0, of: PhantomData };

    fn is_null(self) -> bool {
        self.address == 0
    }

    /// Copies `len` elements.
    fn copy_from(self, dev: &CudaDevice, other: Self, len: usize) -> Result<()> {
        let stream = dev.cuda_stream();
        // SAFETY: both are parts of live allocations of at least this many elements, used on this stream.
        unsafe { result::memcpy_dtod_async(self.address, other.address, len * size_of::<T>(), stream.cu_stream()) }
            .w()?;
        Ok(())
    }
    /// From element `at` on.
    fn from(self, at: usize) -> Self {
        Self { address: self.address + (at * size_of::<T>()) as u64, of: PhantomData }
    }
}

/// What the copy engine reads: a tensor of rows under the swizzle of `kernels/ptx.cuh`.
#[repr(transparent)]
struct TensorMap(CUtensorMap);

// SAFETY: plain words, passed by value as the kernels declare them.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Boxes of `rows` rows and 64 columns of `(b, n, d)` halves at `address`; strides are in elements, multiples of 8.
    fn new(
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

/// The device of a tensor, with its context bound to this thread for what is asked of the driver.
fn device(t: &Tensor) -> Result<&CudaDevice> {
    match t.device() {
        Device::Cuda(dev) => {
            dev.cuda_stream().context().bind_to_thread().w()?;
            Ok(dev)
        }
        other => Err(Error::Unsupported { op: "a CUDA kernel", device: format!("{:?}", other.location()) }),
    }
}

/// Lets `f` launch what writes the elements of a contiguous tensor.
fn write<T: CudaDType>(t: &Tensor, f: impl FnOnce(Part<T>) -> Result<()>) -> Result<()> {
    struct Write<T, F>(RefCell<(Option<F>, Result<()>)>, PhantomData<T>);
    impl<T: CudaDType, F: FnOnce(Part<T>) -> Result<()>> InplaceOp1 for Write<T, F> {
        fn name(&self) -> &'static str {
            "write"
        }
        fn cpu_fwd(&self, _: &mut CpuStorage, _: &candle_core::Layout) -> candle_core::Result<()> {
            candle_core::bail!("a CUDA kernel cannot write to the CPU")
        }
        fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &candle_core::Layout) -> candle_core::Result<()> {
            let stream = storage.device.cuda_stream();
            let Some((start, end)) = layout.contiguous_offsets() else {
                candle_core::bail!("a result is not a contiguous tensor")
            };
            let mut slice = storage.as_cuda_slice_mut::<T>()?.slice_mut(start..end);
            // Held until the launches are queued: it orders them with what other streams do to the tensor.
            let (address, _order) = slice.device_ptr_mut(&stream);
            let (f, out) = &mut *self.0.borrow_mut();
            if let Some(f) = f.take() {
                *out = f(Part { address, of: PhantomData });
            }
            Ok(())
        }
    }
    let op = Write(RefCell::new((Some(f), Ok(()))), PhantomData);
    t.inplace_op1(&op)?;
    op.0.into_inner().1
}

/// The elements of a tensor that only this fit has.
fn own<T: CudaDType>(t: &Tensor) -> Result<Part<T>> {
    let input = read(t);
    let address = input.view::<T>()?.device_ptr(&device(t)?.cuda_stream()).0;
    Ok(Part { address, of: PhantomData })
}

/// `struct Active` of `kernels/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Active {
    list: Part<u32>,
    count: Part<u32>,
    first: i64,
}

// SAFETY: two pointers and an integer, laid out as in C.
unsafe impl DeviceRepr for Active {}

impl Active {
    /// What a turn has to do, which is everything outside a fit and in its first iteration.
    fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        match turn {
            Some(Turn { progress, iteration }) if iteration > 1 => {
                let count = going(progress, iteration)?;
                Ok(Self { list: count.from(1), count, first: 0 })
            }
            _ => Ok(Self { list: Part::NULL, count: Part::NULL, first: 0 }),
        }
    }
    /// Without the first problems of the list.
    fn after(self, first: usize) -> Self {
        Self { first: first as i64, ..self }
    }
    /// All or nothing.
    fn whole(self) -> Self {
        Self { list: Part::NULL, first: 0, ..self }
    }
}

/// The list of the problems that go on to an iteration.
fn going(progress: &Progress, iteration: usize) -> Result<Part<u32>> {
    let b = progress.stop.dims1()?;
    Ok(own::<u32>(&progress.going)?.from(iteration % 2 * (b + 1)))
}

/// The product of sizes, or `usize::MAX`, which no allocation satisfies.
fn elements(sizes: &[usize]) -> usize {
    sizes.iter().fold(1, |product: usize, &size| product.saturating_mul(size))
}

thread_local!(static AT_ONCE: Cell<Option<usize>> = const { Cell::new(None) });

/// Makes cooperative launches of this thread believe that at most so many blocks run at once, as on a part of a device.
pub fn limit_blocks_at_once(limit: Option<usize>) {
    AT_ONCE.set(limit);
}

thread_local!(static SPARED: Cell<Option<usize>> = const { Cell::new(None) });

/// Makes one allocation of this thread fail as if memory were exhausted, after so many that are spared; `None` makes none
/// fail. Returns whether the one that was asked for last has failed.
pub fn fail_allocation(spared: Option<usize>) -> bool {
    SPARED.replace(spared).is_none()
}

/// Whether this is the allocation that is to fail.
fn fails() -> bool {
    let spared = SPARED.get();
    SPARED.set(spared.and_then(|left| left.checked_sub(1)));
    spared == Some(0)
}

/// Memory for `len` elements (at least one: CUDA refuses none), not yet written.
fn alloc<T: DeviceRepr>(dev: &CudaDevice, op: &'static str, len: usize) -> Result<CudaSlice<T>> {
    let len = len.max(1);
    let bytes = len.saturating_mul(size_of::<T>());
    if fails() {
        let source = candle_core::Error::Msg("a test makes this allocation fail".into());
        return Err(Error::OutOfMemory { op, bytes, source });
    }
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
