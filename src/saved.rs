//! The crate saves safetensors files with a mark of ours, the same bytes for the same contents, written whole or not at all.
//!
//! Reading a file, whatever it holds, ends in a value that was checked or in a typed error. No more memory is asked for than the
//! file has bytes, and files without our mark are not read past their header.

use crate::{
    error::{Error, Result},
    metric::Metric,
    stages::reach,
};
use candle_core::{DType, Device, Tensor};
use safetensors::SafeTensors;
use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    hash::Hasher,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};
use twox_hash::XxHash3_64;

/// Key and value that mark our files.
const FORMAT: [&str; 2] = ["candle_flash_kmeans", "1"];

/// Key of the checksum of a file that has one: the XXH3 (Collet 2019) of all its bytes, those of the checksum itself being zeros.
const CHECKSUM: &str = "checksum";
const NO_CHECKSUM: &str = "0000000000000000";

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
    write_all(path, tensors, settings.into_iter().collect())
}

/// The same with a checksum, for [`Saved::read_checked`].
pub(crate) fn write_checked<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
    settings: impl IntoIterator<Item = (String, String)>,
) -> Result<()> {
    let checksum = [CHECKSUM, NO_CHECKSUM].map(String::from).into();
    write_all(path, tensors, settings.into_iter().chain([checksum]).collect())
}

fn write_all<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'a Tensor)>,
    mut settings: BTreeMap<String, String>,
) -> Result<()> {
    let [key, version] = FORMAT.map(String::from);
    settings.insert(key, version);
    // From the host, where reading a tensor cannot fail.
    let on_host = |(name, t): (String, &Tensor)| Ok((name, t.to_device(&Device::Cpu)?));
    let tensors = tensors.into_iter().map(on_host).collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(tensors, None).map_err(candle_core::Error::from)?;
    let failed = |source| Error::Io { path: path.display().to_string(), source };
    let (mut header, data) = with_settings(&bytes, &settings).map_err(failed)?;
    if settings.contains_key(CHECKSUM) {
        let sum = checksum(&[&header, data]);
        let at = find_checksum(&header, NO_CHECKSUM).expect("the settings have it");
        header[at..at + sum.len()].copy_from_slice(sum.as_bytes());
    }
    replace(path, |file| {
        let mut write = || {
            reach("write header")?;
            file.write_all(&header)?;
            reach("write tensors")?;
            file.write_all(data)
        };
        write().map_err(failed)
    })
}

/// The hash of all bytes.
fn checksum(parts: &[&[u8]]) -> String {
    let mut hasher = XxHash3_64::new();
    parts.iter().for_each(|part| hasher.write(part));
    format!("{:016x}", hasher.finish())
}

/// Where the value of the checksum is in a header.
fn find_checksum(header: &[u8], value: &str) -> Option<usize> {
    let entry = format!("\"{CHECKSUM}\":\"{value}\"");
    let at = header.windows(entry.len()).position(|text| text == entry.as_bytes())?;
    Some(at + entry.len() - 1 - value.len())
}

/// A serialised file's new beginning, and its tensors, which follow. The library would write settings in the order of a hash map,
/// which differs from call to call.
fn with_settings<'a>(bytes: &'a [u8], settings: &BTreeMap<String, String>) -> io::Result<(Vec<u8>, &'a [u8])> {
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().expect("eight bytes"));
    let (header, data) = rest.split_at(length as usize);
    let (settings, header) = (json(settings), std::str::from_utf8(header).map_err(io::Error::other)?);
    let tensors = header.trim_end().strip_prefix('{').ok_or(io::ErrorKind::InvalidData)?;
    let comma = if tensors == "}" { "" } else { "," };
    let mut header = format!("{{\"__metadata__\":{settings}{comma}{tensors}");
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

/// Puts a new file where `path` leads, whole or not at all, and so that it is there after a loss of power: what `write` writes to a
/// temporary one is on the disk before its name is, and its name is when this returns.
pub(crate) fn replace<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let failed = |source| Error::Io { path: path.display().to_string(), source };
    let target = followed(path).map_err(failed)?;
    // A name of its own for every call, so that writers of one path cannot take each other's file.
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let create = || {
        reach("create temporary")?;
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
        let written = write(&mut file)?;
        let name = || {
            reach("sync temporary")?;
            file.sync_all()?;
            reach("rename")?;
            fs::rename(&temporary, &target)
        };
        name().map_err(failed).map(|()| written)
    };
    let written = finish().inspect_err(|_| drop(fs::remove_file(&temporary)))?;
    let sync = || {
        reach("sync folder")?;
        sync_folder(&target)?;
        reach("written")
    };
    sync().map_err(failed).map(|()| written)
}

/// Brings the names in the folder of a file to the disk.
fn sync_folder(file: &Path) -> io::Result<()> {
    // Elsewhere a folder cannot be opened, and renaming is as durable as it gets.
    if cfg!(unix) {
        let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
    }
    Ok(())
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
        Ok(Self::read_bytes(path, device)?.0)
    }

    /// Reads a file of [`write_checked`], and refuses one of which a bit has changed.
    pub fn read_checked(path: &Path, device: &Device) -> Result<Self> {
        let (saved, mut bytes) = Self::read_bytes(path, device)?;
        let stored = saved.setting::<String>(CHECKSUM)?;
        let at = find_checksum(&bytes, &stored).filter(|_| stored.len() == NO_CHECKSUM.len());
        let at = at.ok_or_else(|| saved.bad(format!("metadata {CHECKSUM} is {stored:?}")))?;
        bytes[at..at + stored.len()].copy_from_slice(NO_CHECKSUM.as_bytes());
        let got = checksum(&[&bytes]);
        if got != stored {
            return Err(Error::Mismatch { path: saved.path, what: CHECKSUM.into(), got, expected: stored });
        }
        Ok(saved)
    }

    /// What a file holds, and its bytes.
    fn read_bytes(path: &Path, device: &Device) -> Result<(Self, Vec<u8>)> {
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
        Ok((saved, bytes))
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

    /// Whether it has such a setting.
    pub fn states(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
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
        let t = self.removed(name)?;
        match t.dtype() {
            DType::F16 | DType::BF16 | DType::F32 | DType::F64 | DType::U32 | DType::U8 => Ok(t),
            other => Err(self.bad(format!("tensor {name} is {other:?}, which is not saved"))),
        }
    }

    /// A tensor of this dtype and shape, any if there is none, with whatever values it has, on the CPU.
    pub fn exactly(&mut self, name: &str, dtype: DType, shape: Option<&[usize]>) -> Result<Tensor> {
        let t = self.removed(name)?;
        let shape = shape.unwrap_or(t.dims());
        if (t.dtype(), t.dims()) != (dtype, shape) {
            let is = format!("{:?} {:?}, expected {dtype:?} {shape:?}", t.dtype(), t.dims());
            return Err(self.bad(format!("tensor {name} is {is}")));
        }
        Ok(t)
    }

    fn removed(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| self.bad(format!("tensor {name} is missing")))
    }
}

/// Whether a tensor of floats, on the CPU, holds neither a NaN nor an infinity.
pub(crate) fn all_finite(t: &Tensor) -> Result<bool> {
    let values = t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>()?;
    Ok(values.into_iter().all(f64::is_finite))
}
