//! A stream beside the one that Candle works on, for what goes on at the same time: copies, and sums that GPUs exchange.
//!
//! It is not cudarc's, which tracks every use of all memory of a context from the second stream on. Events order it with the work of
//! the thread that asks for it.

use crate::error::Result;
use candle_core::cuda_backend::{
    cudarc::driver::{
        result::{event, stream as streams},
        sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUresult, CUstream},
        CudaContext, CudaStream, DriverError,
    },
    WrapErr,
};
use std::sync::Arc;

const WAIT: CUevent_wait_flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// A stream that waits for no other.
pub(super) struct SideStream {
    stream: CUstream,
    context: Arc<CudaContext>,
}

// SAFETY: a handle of the driver's, which any thread may use.
unsafe impl Send for SideStream {}
// SAFETY: as above; calls by several threads are ordered by the driver.
unsafe impl Sync for SideStream {}

impl SideStream {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        context.bind_to_thread().w()?;
        let stream = streams::create(streams::StreamKind::NonBlocking).w()?;
        Ok(Self { stream, context: context.clone() })
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub fn handle(&self) -> CUstream {
        self.stream
    }

    /// Lets what is queued here from now on wait for what `stream` has queued until now.
    pub fn follow(&self, stream: &CudaStream, event: &Event) -> std::result::Result<(), DriverError> {
        // SAFETY: the event and both streams are there.
        unsafe {
            event::record(event.event, stream.cu_stream())?;
            streams::wait_event(self.stream, event.event, WAIT)
        }
    }

    /// Records that what has been queued here until now is over.
    pub fn record(&self, event: &Event) -> std::result::Result<(), DriverError> {
        // SAFETY: the event and the stream are there.
        unsafe { event::record(event.event, self.stream) }
    }

    /// Waits for what has been queued here.
    pub fn synchronize(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the stream is there.
        unsafe { streams::synchronize(self.stream) }
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was created with this value, and nobody else has it. What is queued there is completed.
        self.context.record_err(unsafe { streams::destroy(self.stream) });
    }
}

/// An event that is not timed.
pub(super) struct Event {
    event: CUevent,
    context: Arc<CudaContext>,
}

// SAFETY: a handle of the driver's, which any thread may use.
unsafe impl Send for Event {}

impl Event {
    /// The context is bound to this thread.
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let event = event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).w()?;
        Ok(Self { event, context: context.clone() })
    }

    /// Waits until it has come. One that was never recorded has.
    pub fn wait(&self) -> std::result::Result<(), DriverError> {
        // SAFETY: the event is there.
        unsafe { event::synchronize(self.event) }
    }

    /// Lets what `stream` queues from now on wait for it.
    pub fn hold(&self, stream: &CudaStream) -> std::result::Result<(), DriverError> {
        // SAFETY: the event and the stream are there.
        unsafe { streams::wait_event(stream.cu_stream(), self.event, WAIT) }
    }

    /// Whether the event has come.
    #[cfg_attr(not(feature = "nccl"), allow(dead_code))]
    pub fn has_come(&self) -> std::result::Result<bool, DriverError> {
        // SAFETY: the event is there.
        match unsafe { event::query(self.event) } {
            Err(DriverError(CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            come => come.map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: it was created with this value, and nobody else has it.
        self.context.record_err(unsafe { event::destroy(self.event) });
    }
}
