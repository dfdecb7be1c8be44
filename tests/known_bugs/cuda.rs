//! CUDA: threads, streams, devices, memory and sizes.
