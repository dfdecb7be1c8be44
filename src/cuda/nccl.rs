//! Communicators of NCCL, through which GPUs add their sums up, whatever links them.
//!
//! A communicator works on a stream of its own and never blocks: the host looks again and again whether a collective is over, and
//! between looks whether there is still a reason to wait. NCCL does not tell that a rank has died, only that nothing happens.

use super::{
    kernel::launch,
    memory::alloc,
    side::{Event, SideStream},
    tensors::{read, tensor, write, DevicePtr},
};
use crate::{
    error::{Error, Result},
    ranks::{Ranks, Rendezvous},
};
use candle_core::{
    cuda_backend::{
        cudarc::{
            driver::{result as driver, DevicePtr as _, DriverError, PushKernelArg},
            nccl::{
                result,
                sys::{self, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t},
            },
        },
        CudaDevice, WrapErr,
    },
    Tensor,
};
use std::{
    cell::Cell,
    ffi::{c_void, CStr},
    mem::{offset_of, zeroed},
    ops::Deref,
    ptr, thread,
    time::{Duration, Instant},
};

/// Threads of a block of the kernels that cut sums into limbs and put them together.
const THREADS: usize = 256;

/// For so long the host looks without a pause whether a collective is over.
const SPINNING: Duration = Duration::from_micros(300);
/// The pause between looks after that.
const PAUSE: Duration = Duration::from_micros(100);

/// A new rendezvous; or, where `NCCL_COMM_ID` is set, the one that it stands for in every process.
pub(super) fn rendezvous() -> Result<Rendezvous> {
    let id = result::get_uniqueid().map_err(|e| refused("ncclGetUniqueId", e.0))?;
    Ok(Rendezvous(id.internal))
}

/// A rank that is a thread of this process, with a GPU of its own: sums go through NCCL, and all else through memory.
pub(super) struct Joined<R> {
    comm: Comm,
    others: R,
    done: Cell<bool>,
}

impl<R: Deref<Target: Ranks>> Joined<R> {
    pub fn new(dev: &CudaDevice, at: Rendezvous, others: R) -> Result<Self> {
        let comm = Comm::new(dev, at, others.rank(), others.count(), &|| others.check())?;
        Ok(Self { comm, others, done: Cell::new(false) })
    }
}

impl<R: Deref<Target: Ranks>> Ranks for Joined<R> {
    fn rank(&self) -> usize {
        self.others.rank()
    }

    fn count(&self) -> usize {
        self.others.count()
    }

    fn reduce(&self, sums: &Tensor) -> Result<()> {
        self.comm.reduce(sums, &|| self.others.check())
    }

    fn sum(&self, mine: &Tensor) -> Result<Tensor> {
        self.comm.sum(mine, &|| self.others.check())
    }

    fn gather(&self, mine: Vec<f64>) -> Result<Vec<Vec<f64>>> {
        self.others.gather(mine)
    }

    fn check(&self) -> Result<()> {
        self.others.check()
    }

    fn done(&self) {
        self.done.set(true);
    }
}

impl<R> Drop for Joined<R> {
    /// A rank that leaves before it is done has failed. The others hear of it when it has left, and so it waits for none of them.
    fn drop(&mut self) {
        if !self.done.get() {
            self.comm.abort();
        }
    }
}

/// A reason to wait no longer for the other ranks.
pub(super) type Check<'a> = &'a dyn Fn() -> Result<()>;

/// A callback that hears why a communicator is aborted.
type OnAbort = Box<dyn Fn(&Error) + Send>;

/// A rank's end of a communicator.
pub(super) struct Comm {
    /// None once it has been aborted.
    comm: Cell<Option<ncclComm_t>>,
    dev: CudaDevice,
    side: SideStream,
    event: Event,
    rank: usize,
    ranks: usize,
    /// The callback that hears why before the communicator is aborted. Aborting frees memory, for which the driver waits for all that runs on the device,
    /// so that of two communicators that hang neither can be aborted before somebody aborts the other.
    before_abort: Option<OnAbort>,
}

// SAFETY: any thread may use a communicator, one at a time.
unsafe impl Send for Comm {}

impl Comm {
    pub fn new(dev: &CudaDevice, at: Rendezvous, rank: usize, ranks: usize, check: Check<'_>) -> Result<Self> {
        let (mut comm, mut config) = (ptr::null_mut(), config());
        let side = SideStream::new(dev.cuda_stream().context())?;
        let event = Event::new(side.context())?;
        let (count, own) = (as_int("ranks", ranks)?, as_int("rank", rank)?);
        let id = sys::ncclUniqueId { internal: at.0 };
        // SAFETY: both are written while this waits; the context of the device is current.
        let begun = unsafe { result::comm_init_rank_config(&mut comm, count, id, own, &mut config) };
        begun.map_err(|e| refused("ncclCommInitRankConfig", e.0))?;
        let (comm, dev) = (Cell::new(Some(comm)), dev.clone());
        let comm = Self { comm, dev, side, event, rank, ranks, before_abort: None };
        comm.settle("ncclCommInitRankConfig", check)?;
        Ok(comm)
    }

    /// Another one of the same ranks, whose collectives have nothing to do with those of this one.
    pub fn split(&self, check: Check<'_>) -> Result<Self> {
        let (mut comm, mut config) = (ptr::null_mut(), config());
        let side = SideStream::new(self.side.context())?;
        let event = Event::new(side.context())?;
        let own = as_int("rank", self.rank)?;
        // SAFETY: the communicator is there, and what is written is there until it has settled.
        let begun = unsafe { sys::ncclCommSplit(self.handle()?, 0, own, &mut comm, &mut config) };
        begun.result().map_err(|e| refused("ncclCommSplit", e.0))?;
        self.settle("ncclCommSplit", check)?;
        let (comm, dev) = (Cell::new(Some(comm)), self.dev.clone());
        Ok(Self { comm, dev, side, event, rank: self.rank, ranks: self.ranks, before_abort: None })
    }

    /// Replaces sums, pairs of the halves of 128-bit integers, by those of all ranks. NCCL adds integers of 64 bits, so a sum goes as
    /// four limbs of 32 bits, which leave room for the carries of 2^31 ranks.
    pub fn reduce(&self, sums: &Tensor, check: Check<'_>) -> Result<()> {
        let (dev, count) = (&self.dev, sums.elem_count() / 2);
        let limbs = alloc::<i64>(dev, "reduce", 4 * count)?;
        let stream = dev.cuda_stream();
        let address = limbs.device_ptr(&stream).0;
        let limbs_at = DevicePtr::<i64>::at(address);
        {
            let sums = read(sums);
            launch!(dev, Update, "limbs_of_sums", "", count.div_ceil(THREADS), THREADS;
                &(count as i64), &sums.view::<i64>()?, &limbs_at)?;
        }
        self.side.follow(&stream, &self.event).w()?;
        // SAFETY: the limbs are there until the collective is over or the communicator aborted.
        let begun = unsafe {
            let (at, sum) = (address as *mut c_void, ncclRedOp_t::ncclSum);
            let (int, stream) = (ncclDataType_t::ncclInt64, self.side.handle().cast());
            result::all_reduce(at, at, 4 * count, int, sum, self.handle()?, stream)
        };
        self.finish("ncclAllReduce", begun.map(drop), check)?;
        write::<i64>(
            sums,
            |sums| launch!(dev, Update, "sums_of_limbs", "", count.div_ceil(THREADS), THREADS; &(count as i64), &limbs_at, &sums),
        )
    }

    /// The sum of the f64 numbers of all ranks. NCCL brings them together and adds none: each rank adds them in the order of ranks, so that
    /// all have the same bits, whatever way NCCL takes between them.
    pub fn sum(&self, mine: &Tensor, check: Check<'_>) -> Result<Tensor> {
        let (dev, count) = (&self.dev, mine.elem_count());
        if count == 0 {
            return Ok(mine.clone());
        }
        self.side.context().bind_to_thread().w()?;
        let all = alloc::<f64>(dev, "sum", count * self.ranks)?;
        let stream = dev.cuda_stream();
        {
            let (to, input) = (all.device_ptr(&stream), read(mine));
            let view = input.view::<f64>()?;
            let from = view.device_ptr(&stream);
            self.side.follow(&stream, &self.event).w()?;
            // SAFETY: both are there until the collective is over or the communicator aborted.
            let begun = unsafe {
                let (from, to) = (from.0 as *const c_void, to.0 as *mut c_void);
                result::all_gather(
                    from,
                    to,
                    count,
                    ncclDataType_t::ncclFloat64,
                    self.handle()?,
                    self.side.handle().cast(),
                )
            };
            self.finish("ncclAllGather", begun.map(drop), check)?;
        }
        let all = tensor(dev, all, (self.ranks, count));
        let of_rank = |rank| all.narrow(0, rank, 1);
        let sum = (1..self.ranks).try_fold(of_rank(0)?, |sum, rank| sum + of_rank(rank)?)?;
        Ok(sum.reshape(mine.shape())?)
    }

    /// The numbers of all ranks, one after another; each has as many.
    pub fn gather(&self, mine: &[f64], check: Check<'_>) -> Result<Vec<f64>> {
        self.side.context().bind_to_thread().w()?;
        let mut all = vec![0.0; mine.len() * self.ranks];
        if all.is_empty() {
            return Ok(all);
        }
        let (from, to) = (SideMemory::new(&self.side, mine.len())?, SideMemory::new(&self.side, all.len())?);
        let stream = self.side.handle();
        // SAFETY: the memory is there until what is queued behind it frees it.
        let begun = unsafe {
            driver::memcpy_htod_async(from.address, mine, stream).w()?;
            let (from, to) = (from.address as *const c_void, to.address as *mut c_void);
            result::all_gather(from, to, mine.len(), ncclDataType_t::ncclFloat64, self.handle()?, stream.cast())
        };
        self.finish("ncclAllGather", begun.map(drop), check)?;
        // SAFETY: as above; the host's memory is there until the stream has been waited for.
        unsafe { driver::memcpy_dtoh_async(&mut all, to.address, stream) }.w()?;
        self.side.synchronize().w()?;
        Ok(all)
    }

    /// Lets `f` know why before it is aborted.
    pub fn tell_before_abort(&mut self, f: impl Fn(&Error) + Send + 'static) {
        self.before_abort = Some(Box::new(f));
    }

    fn handle(&self) -> Result<ncclComm_t> {
        self.comm.get().ok_or_else(|| lost(self.rank, self.ranks, "the communicator has been aborted".into()))
    }

    /// Waits for a collective that has begun.
    fn finish(
        &self,
        call: &'static str,
        begun: std::result::Result<(), result::NcclError>,
        check: Check<'_>,
    ) -> Result<()> {
        if let Err(e) = begun {
            self.abort();
            return Err(refused(call, e.0));
        }
        self.settle(call, check)?;
        let over = || -> std::result::Result<bool, DriverError> { self.event.has_come() };
        self.side.record(&self.event).w()?;
        self.wait(call, check, &mut || Ok(over().w()?))
    }

    /// Waits until a call that goes on in the background has been made.
    fn settle(&self, call: &'static str, check: Check<'_>) -> Result<()> {
        self.wait(call, check, &mut || Ok(self.state()? != ncclResult_t::ncclInProgress))
    }

    /// Waits until `over`, and aborts where there is no reason to.
    fn wait(&self, call: &'static str, check: Check<'_>, over: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        let mut look = || {
            let state = self.state()?;
            if !matches!(state, ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress) {
                return Err(refused(call, state));
            }
            if over()? {
                return Ok(true);
            }
            check().map(|()| false)
        };
        loop {
            match look() {
                Ok(true) => return Ok(()),
                Ok(false) if start.elapsed() < SPINNING => std::hint::spin_loop(),
                Ok(false) => thread::sleep(PAUSE),
                Err(e) => {
                    if let Some(f) = &self.before_abort {
                        f(&e);
                    }
                    self.abort();
                    return Err(e);
                }
            }
        }
    }

    fn state(&self) -> Result<ncclResult_t> {
        let mut state = ncclResult_t::ncclSuccess;
        // SAFETY: the communicator is there.
        let asked = unsafe { sys::ncclCommGetAsyncError(self.handle()?, &mut state) };
        asked.result().map_err(|e| refused("ncclCommGetAsyncError", e.0))?;
        Ok(state)
    }

    /// Ends what is under way, so that its memory can be freed.
    pub fn abort(&self) {
        if let Some(comm) = self.comm.take() {
            // SAFETY: the communicator was there, and nobody has it any more. There is nobody to tell of an error.
            let _ = unsafe { sys::ncclCommAbort(comm) };
        }
    }
}

impl Drop for Comm {
    fn drop(&mut self) {
        let context = self.side.context();
        context.record_err(context.bind_to_thread());
        // Other ranks may still read what this one has sent: `ncclCommFinalize` waits for them, but not for ever.
        let deadline = Instant::now() + Duration::from_secs(5);
        let late = || match Instant::now() > deadline {
            true => Err(lost(self.rank, self.ranks, "no end of ncclCommFinalize".into())),
            false => Ok(()),
        };
        if let Some(comm) = self.comm.get() {
            // SAFETY: the communicator is there.
            let begun = unsafe { sys::ncclCommFinalize(comm) }.result();
            if begun.is_ok() && self.settle("ncclCommFinalize", &late).is_ok() {
                self.comm.set(None);
                // SAFETY: it is there, and nobody has it any more.
                let _ = unsafe { sys::ncclCommDestroy(comm) };
            }
        }
        self.abort();
    }
}

/// Numbers in memory that a side stream allocates and frees.
struct SideMemory<'a> {
    address: u64,
    side: &'a SideStream,
}

impl<'a> SideMemory<'a> {
    fn new(side: &'a SideStream, len: usize) -> Result<Self> {
        // SAFETY: the stream is there, and its context is current.
        let address = unsafe { driver::malloc_async(side.handle(), len * size_of::<f64>()) }.w()?;
        Ok(Self { address, side })
    }
}

impl Drop for SideMemory<'_> {
    fn drop(&mut self) {
        // SAFETY: it was allocated so, and is freed behind all that uses it.
        self.side.context().record_err(unsafe { driver::free_async(self.address, self.side.handle()) });
    }
}

/// A configuration by which calls return before they are done (`NCCL_CONFIG_INITIALIZER` of NCCL 2.18, whose fields newer ones know).
fn config() -> ncclConfig_t {
    const MAGIC: u32 = 0xcafe_beef;
    const VERSION: u32 = 21800;
    const UNDEFINED: i32 = i32::MIN;
    // SAFETY: numbers and pointers, for which zeros are values.
    let mut config: ncclConfig_t = unsafe { zeroed() };
    config.size = offset_of!(ncclConfig_t, splitShare) + size_of::<i32>();
    (config.magic, config.version, config.blocking) = (MAGIC, VERSION, 0);
    (config.cgaClusterSize, config.minCTAs, config.maxCTAs) = (UNDEFINED, UNDEFINED, UNDEFINED);
    config.splitShare = UNDEFINED;
    config
}

fn as_int(argument: &'static str, got: usize) -> Result<i32> {
    i32::try_from(got).map_err(|_| Error::TooLarge { argument, got, limit: i32::MAX as usize })
}

fn refused(call: &'static str, result: ncclResult_t) -> Error {
    // SAFETY: a text that is there as long as the library is.
    let reason = unsafe { CStr::from_ptr(sys::ncclGetErrorString(result)) }.to_string_lossy();
    Error::Candle(candle_core::Error::msg(format!("{call}: {reason}")))
}

/// The error of a rank that waits in vain.
pub(super) fn lost(rank: usize, ranks: usize, reason: String) -> Error {
    Error::InRank { rank, ranks, source: Box::new(Error::Candle(candle_core::Error::msg(reason))) }
}
