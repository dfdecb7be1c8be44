//! Rows in the host's memory, and rows that a function gives.

use super::{
    reader::{ReadRows, Table},
    stored::{Element, StoredType},
};
use crate::error::{Error, Result};
use candle_core::{Storage, Tensor, WithDType};
use half::{bf16, f16};
use std::{io, marker::PhantomData, ops::Range};

/// The name of rows without a file in errors.
const MEMORY: &str = "memory";

pub(crate) fn from_slice<'a, T: Element>(data: impl AsRef<[T]> + Send + Sync + 'a, d: usize) -> Result<Table<'a>> {
    let len = data.as_ref().len();
    if d == 0 || len == 0 {
        return Err(Error::Range { argument: if d == 0 { "d" } else { "data" }, got: 0, min: 1, max: usize::MAX });
    }
    if !len.is_multiple_of(d) {
        return Err(Error::Size { argument: "data", what: "length", got: len, expected: len.next_multiple_of(d) });
    }
    let reader = Box::new(SliceRows { data, d, element: PhantomData });
    Ok(Table { name: MEMORY.into(), n: (len / d) as u64, d, stored: T::STORED, files: vec![], reader })
}

struct SliceRows<A, T> {
    data: A,
    d: usize,
    element: PhantomData<T>,
}

impl<T: Element, A: AsRef<[T]> + Send + Sync> ReadRows for SliceRows<A, T> {
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let [start, end] = [rows.start, rows.end].map(|row| row as usize * self.d);
        let data = self.data.as_ref();
        // The length was that of all rows when it was asked first; `as_ref` may be anyone's.
        let size = Error::Size { argument: "data", what: "length", got: data.len(), expected: end };
        T::store(data.get(start..end).ok_or(size)?, into);
        Ok(())
    }

    fn in_memory<'s>(&'s self, rows: Range<u64>, pieces: &mut Vec<&'s [u8]>) -> bool {
        let [start, end] = [rows.start, rows.end].map(|row| row as usize * self.d);
        let Some(data) = self.data.as_ref().get(start..end) else { return false };
        pieces.push(T::as_bytes(data));
        true
    }
}

pub(crate) fn from_tensor(x: &Tensor) -> Result<Table<'static>> {
    let argument = "x";
    let (dims, dtype) = (x.dims(), x.dtype());
    if dims.len() < 2 {
        return Err(Error::Rank { argument, expected: 2, shape: dims.into() });
    }
    let (n, d) = (dims[..dims.len() - 1].iter().product(), dims[dims.len() - 1]);
    if dims.len() > 2 {
        return Err(Error::Shape { argument, got: dims.into(), expected: vec![n, d] });
    }
    if n == 0 || d == 0 {
        return Err(Error::Range { argument, got: 0, min: 1, max: usize::MAX });
    }
    if !x.device().is_cpu() {
        let [got, expected] = [x.device().location(), candle_core::DeviceLocation::Cpu].map(|d| format!("{d:?}"));
        return Err(Error::Device { argument, got, expected });
    }
    let stored = StoredType::from_dtype(dtype);
    let stored =
        stored.ok_or_else(|| Error::DType { argument, got: dtype, expected: "u8, f16, bf16, f32 or f64".into() })?;
    let reader = Box::new(TensorRows(x.detach()));
    Ok(Table { name: MEMORY.into(), n: n as u64, d, stored, files: vec![], reader })
}

/// A tensor of any layout, of which the rows that are read are made contiguous.
struct TensorRows(Tensor);

impl ReadRows for TensorRows {
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        fn copy<T: Element + WithDType>(rows: &Tensor, into: &mut [u8]) -> Result<()> {
            let (storage, layout) = rows.storage_and_layout();
            let Storage::Cpu(storage) = &*storage else { unreachable!("the device was checked") };
            T::store(&storage.as_slice::<T>()?[layout.start_offset()..][..layout.shape().elem_count()], into);
            Ok(())
        }
        let rows = self.0.narrow(0, rows.start as usize, (rows.end - rows.start) as usize)?.contiguous()?;
        match rows.dtype() {
            candle_core::DType::U8 => copy::<u8>(&rows, into),
            candle_core::DType::F16 => copy::<f16>(&rows, into),
            candle_core::DType::BF16 => copy::<bf16>(&rows, into),
            candle_core::DType::F32 => copy::<f32>(&rows, into),
            _ => copy::<f64>(&rows, into),
        }
    }
}

/// Bytes of a row and of all rows are in range: the caller has checked them.
pub(crate) fn from_fn<'a>(
    n: u64,
    d: usize,
    stored: StoredType,
    f: impl Fn(Range<u64>, &mut [u8]) -> io::Result<()> + Send + Sync + 'a,
) -> Result<Table<'a>> {
    if n == 0 || d == 0 {
        return Err(Error::Range { argument: if n == 0 { "n" } else { "d" }, got: 0, min: 1, max: usize::MAX });
    }
    if d > usize::MAX / 16 {
        return Err(Error::TooLarge { argument: "d", got: d, limit: usize::MAX / 16 });
    }
    Ok(Table { name: "function".into(), n, d, stored, files: vec![], reader: Box::new(FunctionRows(f)) })
}

struct FunctionRows<F>(F);

impl<F: Fn(Range<u64>, &mut [u8]) -> io::Result<()> + Send + Sync> ReadRows for FunctionRows<F> {
    fn read(&self, rows: Range<u64>, into: &mut [u8]) -> Result<()> {
        let path = format!("function, rows {}..{}", rows.start, rows.end);
        (self.0)(rows, into).map_err(|source| Error::Io { path, source })
    }
}
