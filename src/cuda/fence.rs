//! The order of what several host threads do to the same memory.
//!
//! The order of a stream keeps memory valid that only this stream uses, whichever threads queue work to it. Candle's
//! `Device::new_cuda` has no such stream, but `CU_STREAM_PER_THREAD`: one handle that is another stream in each thread. Between
//! those nothing is ordered, neither by Candle nor by cudarc, which records events only where a context has made streams of its
//! own. A thread cannot name the stream of another one, so that it cannot record an event there when it takes over, and an event
//! recorded after every op would cost what it may be wanted for once, a microsecond a launch. So memory remembers the thread that
//! used it last, and where that changes the host waits for the legacy stream (`CU_STREAM_LEGACY`), which waits for the streams of
//! all threads ("Stream synchronization behavior" in the driver's manual). A wait for the context would do so, too, and end every
//! capture on the device. One thread, or any number of threads on a stream of their own
//! (`Device::new_cuda_with_stream`), compare two numbers and never wait.
//!
//! A thread that ends waits for its own stream first ([`finish_before_exit`]): drivers do not get over its end otherwise.
//!
//! A capture cannot wait for work before it, so that taking over is refused there. Contexts and streams of other devices never
//! meet here: tensors of another device are refused, and scratch is replaced ([`super::memory::Memory`]).

use crate::error::{Error, Result};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{
            result::stream as streams,
            sys::{CUresult, CUstream, CUstreamCaptureStatus},
            CudaContext, CudaStream, DriverError,
        },
        WrapErr,
    },
    Device,
};
use std::{
    cell::RefCell,
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard},
    thread::{self, ThreadId},
};

/// The handles of `CU_STREAM_LEGACY` and `CU_STREAM_PER_THREAD`.
const LEGACY: usize = 1;
const PER_THREAD: usize = 2;

/// The thread that this thread's work on a stream has to be told apart by; none where the stream orders the work of all.
pub(super) fn thread_of(stream: &CudaStream) -> Option<ThreadId> {
    (stream.cu_stream() as usize == PER_THREAD).then(|| thread::current().id())
}

/// The streams of its own, one a context, that this thread has queued work to. It waits for them when it ends.
struct OwnStreams(Vec<Arc<CudaStream>>);

impl Drop for OwnStreams {
    fn drop(&mut self) {
        for stream in &self.0 {
            // There is nobody left to tell of an error, which is the next one of the context.
            let _ = stream.synchronize();
        }
    }
}

thread_local!(static OWN_STREAMS: RefCell<OwnStreams> = const { RefCell::new(OwnStreams(vec![])) });

/// Lets this thread wait for its work on `stream` before it ends, if that is `CU_STREAM_PER_THREAD`.
///
/// A thread never ends, at least with driver 580.159, whose stream still has memory to free (`cuMemFreeAsync`) behind work that is
/// under way: the driver's destructor of the thread waits for ever. Destructors of Rust's thread locals come before it.
pub(super) fn finish_before_exit(stream: &Arc<CudaStream>) {
    if stream.cu_stream() as usize != PER_THREAD {
        return;
    }
    let context = stream.context().cu_ctx();
    let registered = OWN_STREAMS.try_with(|own| {
        let OwnStreams(streams) = &mut *own.borrow_mut();
        if streams.iter().all(|known| known.context().cu_ctx() != context) {
            streams.push(stream.clone());
        }
    });
    if registered.is_err() {
        // The thread is ending, and has waited for what it had queued before.
        let _ = stream.synchronize();
    }
}

/// Whether what is queued becomes part of a graph and does not run.
pub(crate) fn capturing(stream: &CudaStream) -> Result<bool> {
    Ok(stream.capture_status().w()? != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// Lets the host wait for what all threads have queued, the work of threads that have ended too.
pub(super) fn wait_for_threads(stream: &CudaStream) -> Result<()> {
    if capturing(stream)? {
        let with = "work of another thread before it, which it cannot wait for: use this once on this thread first";
        return Err(Error::Conflict { argument: "stream", got: "a capture".into(), with: with.into() });
    }
    Ok(wait_for_own_streams(stream.context()).w()?)
}

/// The same in a destructor, whatever the thread's stream captures.
pub(super) fn wait_for_own_streams(context: &CudaContext) -> std::result::Result<(), DriverError> {
    context.bind_to_thread()?;
    // SAFETY: the handle is there in every context, and the thread's is the one that is asked about.
    unsafe { streams::synchronize(LEGACY as CUstream) }
}

/// Which threads have used the tensors that a layer keeps.
///
/// It has to be the layer's first field: dropped before the tensors are, it waits for the work of other threads, after which the
/// thread that drops them may free them on its stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fence {
    /// Clones of a layer share tensors, and what is known of their users.
    users: Arc<Mutex<Users>>,
}

#[derive(Debug, Default)]
struct Users {
    stream: Option<Arc<CudaStream>>,
    /// The one that wrote last, and those that have read since.
    threads: HashSet<ThreadId>,
}

impl Fence {
    /// Before this thread reads the tensors: that comes after what wrote them.
    pub fn read(&self, device: &Device) -> Result<()> {
        self.pass(device, false)
    }

    /// Before this thread writes or frees the tensors, which nobody else uses meanwhile: that comes after all there was.
    pub fn write(&self, device: &Device) -> Result<()> {
        self.pass(device, true)
    }

    /// [`read`](Self::read) before a tensor is shown by a function that cannot fail. An error is the next one of the context.
    pub fn show(&self, device: &Device) {
        if let (Err(_), Device::Cuda(dev)) = (self.read(device), device) {
            let unordered = DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
            dev.cuda_stream().context().record_err(Err::<(), _>(unordered));
        }
    }

    fn pass(&self, device: &Device, alone: bool) -> Result<()> {
        let Device::Cuda(dev) = device else { return Ok(()) };
        let stream = dev.cuda_stream();
        finish_before_exit(&stream);
        let mut users = self.users();
        if let Some(me) = thread_of(&stream) {
            let others = users.threads.len() > users.threads.contains(&me) as usize;
            if others && (alone || !users.threads.contains(&me)) {
                wait_for_threads(&stream)?;
                if alone {
                    users.threads.clear();
                }
            }
            users.threads.insert(me);
        }
        if users.stream.is_none() {
            users.stream = Some(stream);
        }
        Ok(())
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        let users = self.users();
        let Some(stream) = &users.stream else { return };
        finish_before_exit(stream);
        let context = stream.context();
        // The tensors are freed in the context that is current.
        context.record_err(context.bind_to_thread());
        let me = thread::current().id();
        if users.threads.iter().any(|&user| user != me) {
            context.record_err(wait_for_own_streams(context));
        }
    }
}
