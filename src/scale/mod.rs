//! Data past the memory of one device.

mod devices;
mod feed;
mod launch;
pub(crate) mod options;
mod reads;
mod seeds;
mod shared;
pub(crate) mod source;
mod stream;
