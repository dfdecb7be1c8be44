//! A launch: plain, cooperative, or in clusters of thread blocks.

use super::{
    fence,
    module::{loaded, Image, FREE_SHARED},
};
use crate::{
    error::{Error, Result},
    launches,
    tiles::THREADS,
};
use candle_core::cuda_backend::{
    cudarc::driver::{
        sys::{
            self, CUdevice_attribute, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID,
            CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUresult,
        },
        CudaFunction, CudaStream, CudaView, DeviceRepr, DriverError, LaunchArgs, LaunchConfig, PushKernelArg,
    },
    CudaDevice, WrapErr,
};
use std::{
    cell::Cell,
    collections::hash_map::Entry,
    sync::{Arc, LazyLock},
};

/// Lanes of a warp.
pub(super) const WARP: usize = 32;

/// Blocks that have a warp for each of `count`.
pub(super) fn warps(count: usize) -> usize {
    count.div_ceil(THREADS / WARP)
}

/// A kernel, ready to launch on a device's stream.
pub(super) struct Kernel {
    name: &'static str,
    suffix: &'static str,
    pub(super) function: CudaFunction,
    pub(super) stream: Arc<CudaStream>,
}

impl Kernel {
    /// The kernel `name_suffix`, or `name` if the suffix is empty, for launches with `shared` bytes of dynamic memory.
    pub(super) fn get(
        dev: &CudaDevice,
        image: Image,
        name: &'static str,
        suffix: &'static str,
        shared: usize,
    ) -> Result<Self> {
        let stream = dev.cuda_stream();
        let context = stream.context().cu_ctx() as usize;
        let mut loaded = loaded();
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
        let module = loaded.module(stream.context(), image).map_err(failed)?;
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
    pub(super) fn cluster(&self, count: usize, block: usize, most: usize) -> Result<Option<usize>> {
        let key = (self.stream.context().cu_ctx() as usize, self.name, self.suffix);
        let mut loaded = loaded();
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

    /// The number of clusters of so many blocks that run at once.
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
    pub(super) fn runs_at_once(&self, grid: usize, block: usize, shared: usize) -> Result<bool> {
        let context = self.stream.context();
        let key = (context.cu_ctx() as usize, self.name, self.suffix, block, shared);
        let most = match loaded().blocks.entry(key) {
            Entry::Occupied(known) => *known.get(),
            Entry::Vacant(unknown) => {
                context.bind_to_thread().w()?;
                let each =
                    self.function.occupancy_max_active_blocks_per_multiprocessor(block as u32, shared, None).w()?;
                let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
                *unknown.insert(each as usize * context.attribute(count).w()? as usize)
            }
        };
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
    pub(super) fn run_clusters<P: DeviceRepr>(
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

    /// Every launch does this first.
    fn record(&self) {
        fence::finish_before_exit(&self.stream);
        launches::record(self.name, self.suffix);
    }

    /// Launches; nothing if the grid is empty. Kernels loop over what a clamped grid does not cover. The blocks of a
    /// cooperative launch all run at once, or there is none and it is [`Error::Unsupported`].
    pub(super) fn run(
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
        $crate::cuda::kernel::launch!($dev, $image, $name, $suffix, $grid, $block, 0; $($arg),+)
    };
    ($dev:expr, $image:ident, $name:expr, $suffix:expr, $grid:expr, $block:expr, $shared:expr; $($arg:expr),+ $(,)?) => {{
        let kernel = $crate::cuda::kernel::Kernel::get($dev, $crate::cuda::module::Image::$image, $name, $suffix, $shared)?;
        let cooperative = $crate::cuda::module::Image::$image == $crate::cuda::module::Image::FitResident;
        kernel.run(kernel.stream.launch_builder(&kernel.function)$(.arg($arg))+, $grid, $block, $shared, cooperative)
    }};
}
pub(super) use launch;

/// A pointer argument that may be null.
pub(super) struct Nullable<'a, T>(pub(super) &'a Option<CudaView<'a, T>>);

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

thread_local!(static AT_ONCE: Cell<Option<usize>> = const { Cell::new(None) });

/// Makes cooperative launches of this thread believe that at most so many blocks run at once, as on a part of a device.
pub fn limit_blocks_at_once(limit: Option<usize>) {
    AT_ONCE.set(limit);
}
