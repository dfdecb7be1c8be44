//! The tests that share a process; `cargo test --release kv_cache::` runs those of one module. Each test has a thread, and
//! so what a test may set is its own: the kernel that is forced, the allocation that fails, the launches that are recorded
//! (`testing`). What needs a process to itself is a binary beside this one: `memory` counts what the allocator gives,
//! `peak` what a GPU's pool gives, `large` fills a GPU, `killed` starts and kills processes, and `known_bugs` ends the process
//! where threads wait for each other, and captures graphs while no other test may wait for all that a GPU does.

#[allow(dead_code)] // The quickstart uses the rest.
#[path = "../../examples/common/cache.rs"]
mod cache;
#[path = "../common/mod.rs"]
mod common;

mod assign;
mod attention;
mod beam;
mod bench;
mod blocks;
mod checkpoint;
mod codebook;
mod epochs;
mod fit;
mod gradients;
mod grouped;
mod kernels;
mod kv_cache;
mod kv_codes;
mod kv_gains;
mod kv_rotations;
mod labels;
#[cfg(feature = "nccl")]
mod launched;
mod layouts;
mod lut;
mod lut_calibrated;
mod minibatch;
mod near;
mod nearest;
mod numbers;
mod ops;
mod order;
mod plan;
mod prepared;
mod progress;
mod properties;
mod ragged;
mod ranks;
mod refit;
mod refusals;
mod replicas;
mod reproducible;
mod rotation;
mod routing;
mod sample;
mod saved;
mod seeding;
mod segments;
mod select;
mod skipping;
mod source;
#[cfg(feature = "arrow")]
mod source_columns;
mod stream;
mod update;
mod vq;
