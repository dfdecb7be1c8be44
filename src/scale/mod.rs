//! Data past the memory of one device.

pub(crate) mod checkpoint;
pub(crate) mod devices;
pub(crate) mod epochs;
mod feed;
mod fingerprint;
mod label_file;
pub(crate) mod labels;
mod launch;
pub(crate) mod options;
pub(crate) mod pinned;
pub(crate) mod plan;
pub(crate) mod progress;
mod reads;
mod ring;
mod sample;
mod seeds;
mod shared;
pub(crate) mod source;
mod stream;
