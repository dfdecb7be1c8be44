//! A tensor of a `.safetensors` file.

use super::{
    file::SourceFile,
    matrix::{Header, Order},
    reader::Table,
    stored::StoredType,
};
use crate::error::{Error, Result};
use safetensors::{
    tensor::{Metadata, TensorInfo},
    Dtype,
};

/// Bytes of a header, at most, as the library has it.
const MAX_HEADER: u64 = 100_000_000;

/// The tensor of a name, or the only one that could be rows.
pub(crate) fn open(file: SourceFile, name: Option<&str>) -> Result<Table<'static>> {
    let size = u64::from_le_bytes(file.bytes(0, 8)?[..].try_into().expect("eight bytes"));
    if size > MAX_HEADER {
        return Err(file.bad(format!("a header of {size} bytes, expected at most {MAX_HEADER}")));
    }
    let mut header = file.bytes(8, size)?;
    // The library checks here that the tensors follow each other and have the sizes of their shapes.
    let tensors: Metadata = serde_json::from_slice(&header).map_err(|e| file.bad(e.to_string()))?;
    let data_at = 8 + size;
    file.expect_length(data_at.checked_add(tensors.data_len() as u64))?;

    let all = tensors.tensors();
    let name = match name {
        Some(name) => name,
        None => {
            let mut rows: Vec<_> =
                all.iter().filter(|(_, info)| rows_of(info).is_some()).map(|(name, _)| name).collect();
            rows.sort();
            match rows[..] {
                [name] => name,
                _ => return Err(file.bad(format!("{} tensors could be rows: {}", rows.len(), first_of(&rows)))),
            }
        }
    };
    let mismatch = |got, expected: &str| {
        let (path, what) = (file.path().into(), format!("tensor {name}"));
        Error::Mismatch { path, what, got, expected: expected.into() }
    };
    let info = *all
        .get(name)
        .ok_or_else(|| mismatch("missing".into(), &format!("one of {}", first_of(&tensors.offset_keys()))))?;
    let Some((n, d, stored)) = rows_of(info) else {
        let got = format!("{:?} of shape {:?}", info.dtype, info.shape);
        return Err(mismatch(got, "two dimensions or one of u8, i8, f16, bf16, f32 or f64"));
    };
    let offset = data_at + info.data_offsets.0 as u64;
    // Another tensor of the file is another source.
    header.extend(name.bytes());
    Header { offset, n, d, stored, order: Order::Rows, big_endian: false }.part(file, &header)
}

/// The shape and type of a tensor that can be rows; of one dimension, as many rows of one column.
fn rows_of(info: &TensorInfo) -> Option<(u64, u64, StoredType)> {
    let stored = match info.dtype {
        Dtype::U8 => StoredType::U8,
        Dtype::I8 => StoredType::I8,
        Dtype::F16 => StoredType::F16,
        Dtype::BF16 => StoredType::BF16,
        Dtype::F32 => StoredType::F32,
        Dtype::F64 => StoredType::F64,
        _ => return None,
    };
    match info.shape[..] {
        [n] => Some((n as u64, 1, stored)),
        [n, d] => Some((n as u64, d as u64, stored)),
        _ => None,
    }
}

/// Names for a message, not all of a large file's.
fn first_of<S: AsRef<str>>(names: &[S]) -> String {
    const SHOWN: usize = 8;
    let shown: Vec<_> = names.iter().take(SHOWN).map(AsRef::as_ref).collect();
    format!("{}{}", shown.join(", "), if names.len() > SHOWN { ", ..." } else { "" })
}
