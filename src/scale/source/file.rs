//! A file that is read at positions and must stay what it was when it was opened.
//!
//! Files are not mapped: one that shrinks under a map ends the process by a signal, and one that is rewritten gives a mixture.

use crate::{
    error::{Error, Result},
    host,
    stages::{read_hook, ReadHook},
};
use std::{
    fmt,
    fs::{self, File, Metadata},
    io,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// The state of a file when it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileIdentity {
    /// As it was given.
    pub path: String,
    /// In bytes.
    pub length: u64,
    /// Since 1970; zero where the system does not know it.
    pub modified: Duration,
    /// The FNV-1a hash (Fowler, Noll and Vo) of the header, or of the footer of Parquet and Arrow files.
    pub header: u64,
}

impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, length, modified, header } = self;
        let (seconds, nanos) = (modified.as_secs(), modified.subsec_nanos());
        write!(f, "{path}: {length} bytes, modified {seconds}.{nanos:09}, header {header:016x}")
    }
}

/// A regular file, open for positioned reads from any number of threads.
#[derive(Debug)]
pub(crate) struct SourceFile {
    file: File,
    path: String,
    length: u64,
    modified: Duration,
    hook: Option<ReadHook>,
}

impl SourceFile {
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |source| Error::Io { path: name.clone(), source };
        // Asked before the file is opened, since to open a pipe waits for its writer.
        if !fs::metadata(path).map_err(failed)?.is_file() {
            return Err(Error::Format { path: name, reason: "it is not a regular file".into() });
        }
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        let (length, modified) = (metadata.len(), modified(&metadata));
        Ok(Self { file, path: name, length, modified, hook: read_hook() })
    }

    pub fn path(&self) -> &str {
        &self.path
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    pub fn identity(&self, header: &[u8]) -> FileIdentity {
        let fnv1a = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        let header = header.iter().fold(0xcbf2_9ce4_8422_2325, fnv1a);
        FileIdentity { path: self.path.clone(), length: self.length, modified: self.modified, header }
    }

    pub fn bad(&self, reason: impl Into<String>) -> Error {
        Error::Format { path: self.path.clone(), reason: reason.into() }
    }

    /// Refuses a file that has not as many bytes as its header says; none is a number past 64 bits.
    pub fn expect_length(&self, expected: Option<u64>) -> Result<()> {
        match expected {
            Some(expected) if expected == self.length => Ok(()),
            Some(expected) => Err(Error::Length { path: self.path.clone(), got: self.length, expected }),
            None => Err(self.bad(format!("its header asks for more than 2^64 bytes, and it has {}", self.length))),
        }
    }

    /// Fills `into` from `offset` on. Only what was read from an unchanged file is good: the check comes after the read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let end = offset.saturating_add(into.len() as u64);
        if end > self.length {
            return Err(Error::Length { path: self.path.clone(), got: self.length, expected: end });
        }
        let read = self.read_exact_at(into, offset);
        self.expect_unchanged()?;
        read.map_err(|source| self.failed(source))
    }

    /// A system may give fewer bytes than it is asked for, and a signal may interrupt it.
    fn read_exact_at(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            let asked = self.hook.as_ref().map_or(Ok(into.len()), |hook| hook.bytes(into.len()));
            match asked.and_then(|asked| read_at(&self.file, &mut into[..asked], offset)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => (into, offset) = (&mut into[count..], offset + count as u64),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// So many bytes from `offset` on, for which memory is asked only if the file has them.
    pub fn bytes(&self, offset: u64, count: u64) -> Result<Vec<u8>> {
        let end = offset.saturating_add(count);
        if end > self.length {
            return Err(Error::Length { path: self.path.clone(), got: self.length, expected: end });
        }
        let count = usize::try_from(count).map_err(|_| self.failed(io::ErrorKind::OutOfMemory.into()))?;
        let mut bytes = host::buffer("source", count)?;
        bytes.resize(count, 0);
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }

    fn expect_unchanged(&self) -> Result<()> {
        let now = self.file.metadata().map_err(|source| self.failed(source))?;
        let changed =
            |what, got: String, expected: String| Err(Error::Changed { path: self.path.clone(), what, got, expected });
        if now.len() != self.length {
            return changed("length", now.len().to_string(), self.length.to_string());
        }
        match modified(&now) {
            same if same == self.modified => Ok(()),
            other => changed("modification time", format!("{other:?}"), format!("{:?}", self.modified)),
        }
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

/// Since 1970, where the system knows it.
fn modified(metadata: &Metadata) -> Duration {
    let since = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok();
    metadata.modified().ok().and_then(since).unwrap_or_default()
}

#[cfg(unix)]
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, into, offset)
}

#[cfg(windows)]
fn read_at(file: &File, into: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, into, offset)
}

#[cfg(not(any(unix, windows)))]
fn read_at(_: &File, _: &mut [u8], _: u64) -> io::Result<usize> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Writes all of `bytes` at a position, as any number of threads may at once.
#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => (bytes, offset) = (&bytes[count..], offset + count as u64),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(not(any(unix, windows)))]
pub(crate) fn write_all_at(_: &File, _: &[u8], _: u64) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}
