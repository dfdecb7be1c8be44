//! Data past the memory of one device.

mod devices;
pub(crate) mod epochs;
mod feed;
mod labels;
mod launch;
pub(crate) mod options;
pub(crate) mod plan;
pub(crate) mod progress;
mod reads;
mod sample;
mod seeds;
mod shared;
pub(crate) mod source;
mod stream;
