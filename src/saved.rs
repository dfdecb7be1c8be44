//! The crate saves safetensors files with a mark of ours, the same bytes for the same contents, written whole or not at all.
//!
//! Reading a file, whatever it holds, ends in a value that was checked or in a typed error. No more memory is asked for than the
//! file has bytes, and files without our mark are not read past their header.

use crate::{
    error::{Error, Result},
    metric::Metric,
};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

/// Key and value that mark our files.
const FORMAT: [&str; 2] = ["candle_flash_kmeans", "1"];

/// Bytes of a header, at most, as the library has it.
const MAX_HEADER: u64 = 100_000_000;

/// Symbolic links that lead to a file, at most, as on Linux.
const MAX_LINKS: usize = 40;

/// Writes tensors and settings: a temporary file is renamed to `path`, or to the file that `path` links to.
pub(crate) fn write<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<()> {
    let settings: BTreeMap<_, _> = settings.into_iter().chain([FORMAT.map(String::from).into()]).collect();
    // From the host, where reading a tensor cannot fail.
    let on_host = |(name, t): (String, &Tensor)| Ok((name, t.to_device(&Device::Cpu)?));
    let tensors = tensors.into_iter().map(on_host).collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(tensors, None).map_err(candle_core::Error::from)?;
    let failed = |source| Error::Io { path: path.display().to_string(), source };
    let (header, data) = with_settings(&bytes, &settings).map_err(failed)?;
    replace(path, |file| [&header, data].iter().try_for_each(|part| file.write_all(part)).map_err(failed))
}

/// A serialised file's new beginning, and its tensors, which follow. The library would write settings in the order of a hash map,
/// which differs from call to call.
fn with_settings<'a>(bytes: &'a [u8], settings: &BTreeMap<String, String>) -> io::Result<(Vec<u8>, &'a [u8])> {
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let (header, data) = rest.split_at(length as usize);
    let (settings, header) = (json(settings), std::str::from_utf8(header).map_err(io::Error::other)?);
    let tensors = header.trim_end().strip_prefix('{').ok_or(io::ErrorKind::InvalidData)?;
    let mut header = format!("{{\"__metadata__\":{settings},{tensors}");
    // Tensors start at a multiple of eight bytes.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    Ok(([&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat(), data))
}

/// Settings as a JSON object.
fn json(settings: &BTreeMap<String, String>) -> String {
    let quoted = |text: &str| {
        let escaped = text.chars().map(|c| match c {
            '"' | '\\' => format!("\\{c}"),
            c if c < ' ' => format!("\\u{:04x}", c as u32),
            c => c.to_string(),
        });
        format!("\"{}\"", escaped.collect::<String>())
    };
    let pairs: Vec<_> = settings.iter().map(|(key, value)| format!("{}:{}", quoted(key), quoted(value))).collect();
    format!("{{{}}}", pairs.join(","))
}

/// Puts a new file where `path` leads, whole or not at all: what `write` writes to a temporary one.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let failed = |source| Error::Io { path: path.display().to_string(), source };
    let target = followed(path).map_err(failed)?;
    // A name of its own for every call, so that writers of one path cannot take each other's file.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let create = || {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let temporary = target.with_file_name(format!(".flash-kmeans-{}-{call}.tmp", std::process::id()));
        File::create_new(&temporary).map(|file| (temporary, file))
    };
    let (temporary, mut file) = loop {
        match create() {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            created => break created.map_err(failed)?,
        }
    };
    let finish = || {
        write(&mut file)?;
        file.sync_all().and_then(|()| fs::rename(&temporary, &target)).map_err(failed)
    };
    finish().inspect_err(|_| drop(fs::remove_file(&temporary)))
}

/// The target of a path through symbolic links, the last of which may lead to a file that is not there yet.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut target = path.to_path_buf();
    for _ in 0..MAX_LINKS {
        match fs::read_link(&target) {
            Ok(next) => target = target.parent().unwrap_or(Path::new("")).join(next),
            // No link, or nothing there.
            Err(_) => return Ok(target),
        }
    }
    Err(io::Error::other("too many symbolic links"))
}

/// A file of ours, read.
pub(crate) struct Saved {
    path: String,
    metadata: HashMap<String, String>,
    /// On the CPU.
    tensors: HashMap<String, Tensor>,
    device: Device,
}

impl Saved {
    pub fn read(path: &Path, device: &Device) -> Result<Self> {
        let name = path.display().to_string();
        let failed = |source| Error::Io { path: name.clone(), source };
        let mut file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let (metadata, tensors) = (HashMap::new(), HashMap::new());
        let mut saved = Self { path: name.clone(), metadata, tensors, device: device.clone() };

        let mut bytes = vec![];
        Read::by_ref(&mut file).take(8).read_to_end(&mut bytes).map_err(failed)?;
        let header = <[u8; 8]>::try_from(&bytes[..]).map(u64::from_le_bytes);
        let header = header.map_err(|_| saved.bad("it has no header".into()))?;
        if header > size.saturating_sub(8).min(MAX_HEADER) {
            return Err(saved.bad(format!("a header of {header} bytes in a file of {size}")));
        }
        Read::by_ref(&mut file).take(header).read_to_end(&mut bytes).map_err(failed)?;
        if !bytes.windows(FORMAT[0].len()).any(|text| text == FORMAT[0].as_bytes()) {
            return Err(saved.bad("it was not saved by this crate".into()));
        }
        let room = usize::try_from(size).ok().and_then(|size| bytes.try_reserve_exact(size - bytes.len()).ok());
        room.ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        file.read_to_end(&mut bytes).map_err(failed)?;

        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| saved.bad(e.to_string()))?;
        saved.metadata = header.metadata().clone().unwrap_or_default();
        let [key, version] = FORMAT;
        saved.expect(key, version)?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu);
        saved.tensors = tensors.map_err(|e| saved.bad(e.to_string()))?;
        Ok(saved)
    }

    pub fn bad(&self, reason: String) -> Error {
        Error::Format { path: self.path.clone(), reason }
    }

    /// Refuses a setting of another value.
    pub fn expect(&self, key: &str, expected: &str) -> Result<()> {
        let got = self.metadata.get(key);
        if got.map(String::as_str) != Some(expected) {
            return Err(self.bad(format!("metadata {key} is {got:?}, expected {expected}")));
        }
        Ok(())
    }

    pub fn setting<T: FromStr>(&self, key: &str) -> Result<T> {
        self.parsed(key, |value| value.parse().ok())
    }

    pub fn metric(&self, key: &str) -> Result<Metric> {
        self.parsed(key, Metric::from_name)
    }

    fn parsed<T>(&self, key: &str, parse: impl Fn(&str) -> Option<T>) -> Result<T> {
        let got = self.metadata.get(key);
        got.and_then(|value| parse(value)).ok_or_else(|| self.bad(format!("metadata {key} is {got:?}")))
    }

    pub fn holds(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A tensor of a dtype that this crate saves, all of whose floats are finite.
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        let t = self.on_host(name)?;
        if t.dtype().is_float() && !all_finite(&t)? {
            return Err(self.bad(format!("tensor {name} holds a NaN or an infinity")));
        }
        Ok(t.to_device(&self.device)?)
    }

    /// The same with whatever values it has, on the CPU.
    pub fn on_host(&mut self, name: &str) -> Result<Tensor> {
        let t = self.tensors.remove(name).ok_or_else(|| self.bad(format!("tensor {name} is missing")))?;
        match t.dtype() {
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::U32 | DType::U8 => Ok(t),
            other => Err(self.bad(format!("tensor {name} is {other:?}, which is not saved"))),
        }
    }
}

/// Whether a tensor of floats, on the CPU, holds neither a NaN nor an infinity.
pub(crate) fn all_finite(t: &Tensor) -> Result<bool> {
    let values = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(values.into_iter().all(f64::is_finite))
}
