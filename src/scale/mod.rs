//! Data past the memory of one device.

mod feed;
mod labels;
pub(crate) mod options;
pub(crate) mod progress;
mod reads;
mod seeds;
pub(crate) mod source;
mod stream;
