//! An error says what went wrong: every refusal names the argument and both values.

use candle_core::DType;
use std::{
    backtrace::{Backtrace, BacktraceStatus},
    collections::BTreeSet,
    fmt, io,
    sync::Mutex,
};

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// Every reason a call can be refused or fail.
///
/// Shapes, dtypes, devices and settings are refused before any allocation; values, where they are read.
///
/// `batch` counts the problems of a batch, whatever the number of its dimensions, as a flattened batch would.
///
/// # In a model
/// An [`Error`] turns into a [`candle_core::Error`] with `?`, so these functions can be called from a model's forward pass. It
/// stays the [source](std::error::Error::source) of Candle's error, and [`from_candle`](Self::from_candle) finds it there, also
/// under context and backtraces that Candle has put around it:
///
/// ```
/// use candle_core::{Context, Device, Tensor};
/// use candle_flash_kmeans::{Error, KMeans};
///
/// fn forward(x: &Tensor) -> candle_core::Result<Tensor> {
///     Ok(KMeans::new(2).fit(x)?.labels)
/// }
/// let x = Tensor::new(&[[0f32], [f32::NAN]], &Device::Cpu)?;
/// let error = forward(&x).context("in block 7").unwrap_err();
/// assert!(matches!(Error::from_candle(&error), Some(Error::NonFinite { row: 1, .. })));
/// # Ok::<_, Error>(())
/// ```
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
    /// A size is outside the range that the call accepts; `max` is `usize::MAX` where nothing bounds it.
    #[error("{argument}: {got} is outside {}", Bounds(*min, *max))]
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
    /// A file cannot be read as what it should be.
    #[error("{path}: cannot be read: {reason}")]
    Format { path: String, reason: String },
    /// A file is shorter or longer than its header says.
    #[error("{path}: {got} bytes long, expected {expected}")]
    Length { path: String, got: u64, expected: u64 },
    /// Two things that must agree in a file, or between two files, do not.
    #[error("{path}: {what} is {got}, expected {expected}")]
    Mismatch { path: String, what: String, got: String, expected: String },
    /// A file is not what it was when it was opened.
    #[error("{path}: changed since it was opened: {what} is {got}, expected {expected}")]
    Changed { path: String, what: &'static str, got: String, expected: String },
    /// Reading or writing a file failed.
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// One of several ranks that share the rows of a fit has failed, and with it the others; `rank` counts from 0.
    #[error("rank {rank} of {ranks}: {source}")]
    InRank { rank: usize, ranks: usize, source: Box<Error> },
    /// An error from Candle.
    #[error(transparent)]
    Candle(candle_core::Error),
}

/// A range of sizes as messages show it.
struct Bounds(usize, usize);

impl fmt::Display for Bounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self(min, usize::MAX) => write!(f, "{min}.."),
            Self(min, max) => write!(f, "{min}..={max}"),
        }
    }
}

/// Text that an error's static fields can hold, made when it is first needed and kept: there are as many as different
/// problems of a batch that were ever refused.
pub(crate) fn kept(text: String) -> &'static str {
    static KEPT: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    let mut kept = KEPT.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(known) = kept.get(text.as_str()) {
        return known;
    }
    let text: &str = Box::leak(text.into_boxed_str());
    kept.insert(text);
    text
}

impl Error {
    /// The same of problems of which the first has this number in its batch.
    pub(crate) fn of_batch(self, first_problem: usize) -> Self {
        match self {
            Self::NonFinite { argument, batch, row } => Self::NonFinite { argument, batch: first_problem + batch, row },
            other => other,
        }
    }

    /// The error of this crate inside one of Candle's, if there is one: under any [context](candle_core::Context), path or
    /// backtrace that Candle has put around it. An error that a caller made into text
    /// ([`wrap`](candle_core::Error::wrap), [`msg`](candle_core::Error::msg)) is lost.
    pub fn from_candle(error: &candle_core::Error) -> Option<&Self> {
        use candle_core::Error as Outer;
        match error {
            Outer::Io(e) => e.get_ref()?.downcast_ref::<Carried>().map(|carried| &carried.error),
            Outer::WithBacktrace { inner, .. } | Outer::WithPath { inner, .. } | Outer::Context { inner, .. } => {
                Self::from_candle(inner)
            }
            // `Result::context` boxes whatever error it is given.
            Outer::WrappedContext { wrapped: e, .. } | Outer::Cuda(e) => match e.downcast_ref::<Self>() {
                Some(Self::Candle(e)) => Self::from_candle(e),
                Some(error) => Some(error),
                None => e.downcast_ref::<Outer>().and_then(Self::from_candle),
            },
            _ => None,
        }
    }
}

/// An error of ours on its way through Candle. `candle_core::Error::wrap` would keep only its text; an I/O error keeps a
/// value, whose source is the error itself.
#[derive(Debug)]
struct Carried {
    error: Error,
    backtrace: Backtrace,
}

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        match self.backtrace.status() {
            BacktraceStatus::Captured => write!(f, "\n{}", self.backtrace),
            _ => Ok(()),
        }
    }
}

impl std::error::Error for Carried {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<Error> for candle_core::Error {
    fn from(e: Error) -> Self {
        match e {
            Error::Candle(e) => e,
            error => Self::Io(io::Error::other(Carried { error, backtrace: Backtrace::capture() })),
        }
    }
}

impl From<candle_core::Error> for Error {
    /// An error of this crate that went through Candle comes back as it was, unless something was put around it.
    fn from(e: candle_core::Error) -> Self {
        match e {
            candle_core::Error::Io(e) => match e.downcast::<Carried>() {
                Ok(carried) => carried.error,
                Err(e) => Self::Candle(candle_core::Error::Io(e)),
            },
            e => Self::Candle(e),
        }
    }
}
