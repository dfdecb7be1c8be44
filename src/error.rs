//! What can go wrong, said once: every refusal names the argument and both values.

use candle_core::DType;

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Every reason a call can be refused or fail.
///
/// Refusals come before any allocation. An [`Error`] turns into a [`candle_core::Error`] with `?`, keeping itself as the
/// source, so these functions can be called from a model's forward pass.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // The fields are what the messages show.
pub enum Error {
    /// A tensor has too few dimensions to hold rows.
    #[error("{argument}: expected at least {expected} dimensions (..batch, rows, columns), got shape {shape:?}")]
    Rank { argument: &'static str, expected: usize, shape: Vec<usize> },
    /// Two sizes that must agree do not.
    #[error("{argument}: {what} is {got}, expected {expected}")]
    Size { argument: &'static str, what: &'static str, got: usize, expected: usize },
    /// Two shapes that must agree do not.
    #[error("{argument}: shape {got:?}, expected {expected:?}")]
    Shape { argument: &'static str, got: Vec<usize>, expected: Vec<usize> },
    /// A size is outside the range that the call accepts.
    #[error("{argument}: {got} is outside {min}..={max}")]
    Range { argument: &'static str, got: usize, min: usize, max: usize },
    /// A number is outside the range that the call accepts.
    #[error("{argument}: {got} is not {expected}")]
    Value { argument: &'static str, got: f64, expected: &'static str },
    /// The dtype is not one the call accepts.
    #[error("{argument}: dtype {got:?}, expected {expected}")]
    DType { argument: &'static str, got: DType, expected: String },
    /// Two tensors live on different devices.
    #[error("{argument}: on device {got}, expected {expected}")]
    Device { argument: &'static str, got: String, expected: String },
    /// The backend does not implement the operation.
    #[error("{op}: not available on device {device}")]
    Unsupported { op: &'static str, device: String },
    /// The input holds a NaN or an infinity.
    #[error("{argument}: row {row} of batch element {batch} holds a NaN or an infinity")]
    NonFinite { argument: &'static str, batch: usize, row: usize },
    /// A size does not fit the index type of the result.
    #[error("{argument}: {got} exceeds the limit of {limit}")]
    TooLarge { argument: &'static str, got: usize, limit: usize },
    /// Two settings exclude each other.
    #[error("{argument}: {got} cannot be combined with {with}")]
    Conflict { argument: &'static str, got: String, with: String },
    /// The device has no room for an allocation; it stays usable.
    #[error("{op}: out of memory asking for {bytes} bytes")]
    OutOfMemory { op: &'static str, bytes: usize, source: candle_core::Error },
    /// A kernel could not be loaded or launched.
    #[error("{kernel}: launch failed with grid {grid}, block {block}, {shared} bytes of shared memory: {source}")]
    Launch { kernel: &'static str, grid: u32, block: u32, shared: u32, source: candle_core::Error },
    /// A saved model cannot be read.
    #[error("{path}: cannot be read: {reason}")]
    Format { path: String, reason: String },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// An error from Candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            e => candle_core::Error::wrap(e),
        }
    }
}
