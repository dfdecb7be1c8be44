//! Data past the memory of one device.

pub(crate) mod checkpoint;
mod feed;
mod fingerprint;
pub(crate) mod options;
mod reads;
mod seeds;
pub(crate) mod source;
mod stream;
