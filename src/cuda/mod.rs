//! The CUDA backend: every kernel is compiled by `build.rs`, embedded, and launched on the tensor's own stream.
//!
//! Nothing here waits for the device or reads from it while one thread works, and every launch goes through
//! [`kernel::Kernel`]. Threads take over from each other by [`fence`].

pub(crate) mod assign;
pub(crate) mod attend;
pub(crate) mod device;
pub(crate) mod fence;
pub(crate) mod kernel;
pub(crate) mod memory;
mod module;
mod params;
pub(crate) mod route;
mod select;
mod tensors;
pub(crate) mod update;
