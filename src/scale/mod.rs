//! Data past the memory of one device.

pub(crate) mod source;
