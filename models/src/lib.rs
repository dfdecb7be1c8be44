//! The examples on whole models share this: SmolLM2-135M, scores, charts and bars.

#[path = "../../examples/common/backend.rs"]
pub mod backend;
#[path = "../../examples/common/chart.rs"]
pub mod chart;
pub mod decode;
pub mod progress;
pub mod score;
pub mod smollm2;
#[path = "../../examples/common/timing.rs"]
pub mod timing;

/// Source code, for examples that read a text: code depends on its context most.
pub const CODE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/code.txt");
/// Prose, for the same.
pub const PROSE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/prose.txt");

/// The code blocks of the documents, which a release should not be the first to compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
#[doc = include_str!("../../docs/guide.md")]
pub struct Documents;
