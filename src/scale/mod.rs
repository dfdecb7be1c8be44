//! Data past the memory of one device.

pub(crate) mod epochs;
mod feed;
mod labels;
pub(crate) mod options;
pub(crate) mod progress;
mod reads;
mod sample;
mod seeds;
pub(crate) mod source;
mod stream;
