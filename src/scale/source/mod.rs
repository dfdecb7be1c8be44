//! Sources of rows that memory does not hold: files, or a caller's own store, read piece by piece.
//!
//! A format is a file beside this one, which turns a header into a [`Table`]. What all of them share is here: refusals of ranges and
//! buffers, and values that are widened to the type that is computed in.

#[cfg(feature = "arrow")]
mod arrow;
#[cfg(feature = "arrow")]
mod columns;
mod concat;
pub(crate) mod file;
mod matrix;
mod memory;
pub(crate) mod npy;
#[cfg(feature = "parquet")]
mod parquet;
mod reader;
mod safetensors;
pub(crate) mod stored;
mod vecs;

use self::{
    file::{FileIdentity, SourceFile},
    reader::Table,
    stored::{widen, Element, StoredType},
};
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use std::{fmt, io, ops::Range, path::Path};

/// `n` rows of `d` columns that are read piece by piece, by any number of threads at once: files, rows in memory, or a function.
///
/// Values are given in [`dtype`](Self::dtype), the type that is computed in, one row after another in this machine's byte order. That is
/// the [stored type](Self::stored_type) of floats; bytes are widened to f16, which holds them exactly.
///
/// | what | opened by |
/// |---|---|
/// | `.npy` in C or Fortran order, either byte order | [`open`](Self::open) |
/// | `.safetensors` | [`open`](Self::open), [`open_tensor`](Self::open_tensor) |
/// | `.fbin`, `.u8bin`, `.i8bin`; `.fvecs`, `.bvecs` | [`open`](Self::open) |
/// | Parquet (feature `parquet`), Arrow IPC files (feature `arrow`) | [`open`](Self::open), `open_columns` |
/// | several sources as one | [`concat`](Self::concat) |
/// | slices, vectors, tensors on the CPU | [`from_slice`](Self::from_slice), [`from_tensor`](Self::from_tensor) |
/// | a function | [`from_fn`](Self::from_fn) |
///
/// # Files
/// A file is read at positions, never mapped into memory, and stays open. Its length has to be the one that its header says, to the byte, or
/// opening it is [`Error::Length`]; what else is wrong with it is [`Error::Format`] or [`Error::Mismatch`]. Each read checks that the file
/// has still the length and the modification time it was opened with, or is [`Error::Changed`]: what a writer changes without
/// either is not noticed. A file that was put in its place by a rename is not read: the one that was opened is. Values are not looked at.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::Source;
///
/// let path = std::env::temp_dir().join(format!("rows-{}.npy", std::process::id()));
/// Tensor::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?.write_npy(&path)?;
///
/// let source = Source::open(&path)?;
/// assert_eq!(source.shape(), (3, 2));
/// let mut rows = vec![0; 2 * source.row_bytes()];
/// source.read(1..3, &mut rows)?;
/// assert_eq!(rows, [3f32, 4., 5., 6.].map(f32::to_ne_bytes).concat());
/// # std::fs::remove_file(&path).unwrap();
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
pub struct Source<'a> {
    table: Table<'a>,
    dtype: DType,
}

impl Source<'static> {
    /// Opens a file in the format that its extension says: `npy`, `safetensors`, `fbin`, `u8bin`, `i8bin`, `fvecs`, `bvecs`, `parquet`, or
    /// `arrow`, `feather` and `ipc`. A file of another extension is opened if it begins as `.npy`, Parquet or Arrow files do.
    ///
    /// Of several tensors or columns that could be rows, one has to be named, by [`open_tensor`](Self::open_tensor) or `open_columns`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = SourceFile::open(path)?;
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
        Self::new(match &extension[..] {
            "npy" => npy::open(file),
            "safetensors" => safetensors::open(file, None),
            "fbin" => vecs::open_bin(file, StoredType::F32),
            "u8bin" => vecs::open_bin(file, StoredType::U8),
            "i8bin" => vecs::open_bin(file, StoredType::I8),
            "fvecs" => vecs::open_vecs(file, StoredType::F32),
            "bvecs" => vecs::open_vecs(file, StoredType::U8),
            "parquet" => open_parquet(file, &[]),
            "arrow" | "feather" | "ipc" => open_arrow(file, &[]),
            _ => match file.bytes(0, file.length().min(6))? {
                magic if magic == npy::MAGIC => npy::open(file),
                magic if magic.starts_with(PARQUET_MAGIC) => open_parquet(file, &[]),
                magic if magic == ARROW_MAGIC => open_arrow(file, &[]),
                _ => Err(file.bad(format!("neither its extension, {extension:?}, nor its first bytes say a format"))),
            },
        }?)
    }

    /// Opens a tensor of a `.safetensors` file, of two dimensions, or of one as rows of one column.
    pub fn open_tensor(path: impl AsRef<Path>, name: &str) -> Result<Self> {
        Self::new(safetensors::open(SourceFile::open(path.as_ref())?, Some(name))?)
    }

    /// Opens columns of a Parquet file (feature `parquet`) or an Arrow IPC file, such as a Feather file of version 2: one column of lists,
    /// all of one length, or columns of numbers, one or more, all of one type. Numbers are f16, f32, f64, u8 or i8, and no row may be null.
    ///
    /// Of Parquet the pages are decoded that the rows lie in, of Arrow the record batches: pieces of many rows are read best.
    #[cfg(feature = "arrow")]
    #[cfg_attr(docsrs, doc(cfg(feature = "arrow")))]
    pub fn open_columns(path: impl AsRef<Path>, names: &[&str]) -> Result<Self> {
        if names.is_empty() {
            return Err(Error::Range { argument: "names", got: 0, min: 1, max: usize::MAX });
        }
        let file = SourceFile::open(path.as_ref())?;
        let is_parquet = file.bytes(0, file.length().min(4))? == PARQUET_MAGIC;
        Self::new(if is_parquet { open_parquet(file, names) } else { open_arrow(file, names) }?)
    }

    /// The rows of a tensor `(n, d)` on the CPU, of any layout. The tensor's memory is shared, and what is written to it later is read.
    pub fn from_tensor(x: &Tensor) -> Result<Self> {
        Self::new(memory::from_tensor(x)?)
    }
}

impl<'a> Source<'a> {
    fn new(table: Table<'a>) -> Result<Self> {
        let dtype = table.stored.compute_dtype();
        Ok(Self { table, dtype })
    }

    /// Rows of `d` columns that lie in memory one after another: a slice, `Vec<T>` or `Arc<[T]>`.
    pub fn from_slice<T: Element>(data: impl AsRef<[T]> + Send + Sync + 'a, d: usize) -> Result<Self> {
        Self::new(memory::from_slice(data, d)?)
    }

    /// Rows that a function gives: `f(rows, into)` fills `into` with these rows, one after another, in the type `stored` and this machine's byte
    /// order. It is called from several threads at once (state of its own goes behind a [`Mutex`](std::sync::Mutex)), and has to give
    /// the same rows each time. Its error is [`Error::Io`].
    pub fn from_fn(
        n: u64,
        d: usize,
        stored: StoredType,
        f: impl Fn(Range<u64>, &mut [u8]) -> io::Result<()> + Send + Sync + 'a,
    ) -> Result<Self> {
        Self::new(memory::from_fn(n, d, stored, f)?)
    }

    /// The rows of all `parts`, in their order. All have the columns and the types of the first, or are [`Error::Mismatch`].
    pub fn concat(parts: impl IntoIterator<Item = Self>) -> Result<Self> {
        let parts: Vec<_> = parts.into_iter().collect();
        if let Some(other) = parts.iter().find(|part| part.dtype != parts[0].dtype) {
            let [got, expected] = [other, &parts[0]].map(|part| format!("{:?}", part.dtype));
            let (path, expected) = (other.table.name.clone(), format!("{expected} as in {}", parts[0].table.name));
            return Err(Error::Mismatch { path, what: "dtype".into(), got, expected });
        }
        let dtype = parts.first().map(|first| first.dtype);
        let table = concat::concat(parts.into_iter().map(|part| part.table).collect())?;
        let dtype = dtype.unwrap_or(table.stored.compute_dtype());
        Ok(Self { table, dtype })
    }

    /// The same values in another type, which has to hold all of the stored type's exactly. A fit computes in the type of its rows and rounds its
    /// centroids to it: f32 gives bytes centroids with more bits than f16 for twice the memory.
    pub fn with_dtype(mut self, dtype: DType) -> Result<Self> {
        let exact = self.table.stored.exact_dtypes();
        if !exact.contains(&dtype) {
            let names: Vec<_> = exact.iter().map(|dtype| format!("{dtype:?}")).collect();
            let expected = format!("one that holds {} exactly: {}", self.table.stored, names.join(", "));
            return Err(Error::DType { argument: "dtype", got: dtype, expected });
        }
        self.dtype = dtype;
        Ok(self)
    }

    /// The number of rows and of their columns; neither is 0.
    pub fn shape(&self) -> (u64, usize) {
        (self.table.n, self.table.d)
    }

    /// The type of the values as they are stored.
    pub fn stored_type(&self) -> StoredType {
        self.table.stored
    }

    /// The type of the values as [`read`](Self::read) gives them.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of a row as [`read`](Self::read) gives it.
    pub fn row_bytes(&self) -> usize {
        self.table.d * self.dtype.size_in_bytes()
    }

    /// A value that tells this source from another, and from itself after a file has changed.
    pub fn identity(&self) -> SourceIdentity {
        let Table { n, d, stored, ref files, .. } = self.table;
        SourceIdentity { n, d, stored, files: files.clone() }
    }

    /// Fills `into` with these rows, one after another in [`dtype`](Self::dtype); it is as long as they are. What it holds after an error is
    /// undetermined.
    ///
    /// # Errors
    /// [`Error::Range`] of rows that are not there, [`Error::Size`] of another length of `into`; of files, [`Error::Changed`],
    /// [`Error::Io`], and [`Error::Mismatch`] and [`Error::Format`] where rows cannot be read.
    pub fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let Table { n, d, stored, ref reader, .. } = self.table;
        let as_size = |row: u64| usize::try_from(row).unwrap_or(usize::MAX);
        if rows.start > n {
            return Err(Error::Range { argument: "rows.start", got: as_size(rows.start), min: 0, max: as_size(n) });
        }
        if rows.end < rows.start || rows.end > n {
            let (got, min, max) = (as_size(rows.end), as_size(rows.start), as_size(n));
            return Err(Error::Range { argument: "rows.end", got, min, max });
        }
        let count = as_size(rows.end - rows.start);
        let expected = count.saturating_mul(self.row_bytes());
        if into.len() != expected {
            return Err(Error::Size { argument: "into", what: "length in bytes", got: into.len(), expected });
        }
        if count > 0 {
            // Narrower values come to the end of the buffer and are widened towards its front: no other memory is needed.
            let at = expected - count * d * stored.size();
            reader.read(rows, &mut into[at..])?;
            widen(into, stored, self.dtype);
        }
        Ok(())
    }

    /// The pieces of memory that these rows lie in as [`read`](Self::read) would give them, in order, if they do.
    pub(super) fn in_memory(&self, rows: Range<u64>) -> Option<Vec<&[u8]>> {
        let mut pieces = vec![];
        let as_computed = self.table.stored == StoredType::from_dtype(self.dtype)?;
        (as_computed && self.table.reader.in_memory(rows, &mut pieces)).then_some(pieces)
    }
}

impl fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Table { ref name, n, d, stored, .. } = self.table;
        let mut s = f.debug_struct("Source");
        s.field("name", name)
            .field("n", &n)
            .field("d", &d)
            .field("stored", &stored)
            .field("dtype", &self.dtype)
            .finish()
    }
}

/// A value that tells one [`Source`] from another: its shape, its stored type and its files. Rows without a file have no more than their shape and type.
///
/// Its [`Display`](fmt::Display) is a line, and one more for each file, the same for the same source.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceIdentity {
    /// The number of rows.
    pub n: u64,
    /// The number of columns.
    pub d: usize,
    /// The type of the stored values.
    pub stored: StoredType,
    /// The files, in the order of their rows.
    pub files: Vec<FileIdentity>,
}

impl fmt::Display for SourceIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows of {} columns, {}", self.n, self.d, self.stored)?;
        self.files.iter().try_for_each(|file| write!(f, "\n{file}"))
    }
}

const PARQUET_MAGIC: &[u8] = b"PAR1";
const ARROW_MAGIC: &[u8] = b"ARROW1";

#[cfg(feature = "arrow")]
use self::arrow::open as open_arrow;
#[cfg(feature = "parquet")]
use self::parquet::open as open_parquet;

#[cfg(not(feature = "arrow"))]
fn open_arrow(file: SourceFile, _: &[&str]) -> Result<Table<'static>> {
    Err(file.bad("to read Arrow files takes the feature `arrow` of this crate"))
}

#[cfg(not(feature = "parquet"))]
fn open_parquet(file: SourceFile, _: &[&str]) -> Result<Table<'static>> {
    Err(file.bad("to read Parquet files takes the feature `parquet` of this crate"))
}
