//! Types of stored values, and how they become the type that is computed in.

use candle_core::DType;
use half::{bf16, f16};
use std::{fmt, slice};

/// The type of the values that a [`Source`](crate::Source) stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredType {
    /// Unsigned bytes.
    U8,
    /// Signed bytes, which Candle has no dtype for.
    I8,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
    BF16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

impl StoredType {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }

    /// The smallest dtype that k-means computes in and that holds every value of this type exactly: floats stay what they are,
    /// bytes become f16, whose 11 bits hold whole numbers up to 2,048.
    pub fn compute_dtype(self) -> DType {
        match self {
            Self::U8 | Self::I8 | Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            Self::F32 => DType::F32,
            Self::F64 => DType::F64,
        }
    }

    /// The dtypes that hold every value of this type exactly, the narrowest first. The 8 bits of bf16 hold bytes, too.
    pub(crate) fn exact_dtypes(self) -> &'static [DType] {
        match self {
            Self::U8 | Self::I8 => &[DType::F16, DType::BF16, DType::F32, DType::F64],
            Self::F16 => &[DType::F16, DType::F32, DType::F64],
            Self::BF16 => &[DType::BF16, DType::F32, DType::F64],
            Self::F32 => &[DType::F32, DType::F64],
            Self::F64 => &[DType::F64],
        }
    }

    pub(crate) fn from_dtype(dtype: DType) -> Option<Self> {
        Some(match dtype {
            DType::U8 => Self::U8,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::F32 => Self::F32,
            DType::F64 => Self::F64,
            _ => return None,
        })
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
        })
    }
}

/// A value that a [`Source`](crate::Source) can store: u8, i8, f16, bf16, f32 or f64.
pub trait Element: private::Sealed + Copy + Send + Sync + 'static {
    /// Its name among [`StoredType`]s.
    const STORED: StoredType;

    #[doc(hidden)]
    fn store(values: &[Self], into: &mut [u8]) {
        into.copy_from_slice(Self::as_bytes(values));
    }

    #[doc(hidden)]
    fn as_bytes(values: &[Self]) -> &[u8] {
        // SAFETY: the values of these types have no padding, and bytes may lie anywhere.
        unsafe { slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
    }
}

mod private {
    pub trait Sealed {}
}

macro_rules! element {
    ($($type:ty: $stored:ident),*) => {$(
        impl private::Sealed for $type {}

        impl Element for $type {
            const STORED: StoredType = StoredType::$stored;
        }
    )*};
}

element!(u8: U8, i8: I8, f16: F16, bf16: BF16, f32: F32, f64: F64);

/// Widens values in place: they fill the end of `bytes`, which they fill whole in `dtype`. The front never overtakes what is
/// still to be read, since a value that has `left` values after it has `left` times the difference of the sizes before it.
pub(crate) fn widen(bytes: &mut [u8], stored: StoredType, dtype: DType) {
    use DType::{BF16, F16, F32, F64};
    match (stored, dtype) {
        (StoredType::U8, dtype) => widen_bytes(bytes, dtype, f32::from),
        (StoredType::I8, dtype) => widen_bytes(bytes, dtype, |byte| f32::from(byte as i8)),
        (StoredType::F16, F32) => each(bytes, |value| f16::from_ne_bytes(value).to_f32().to_ne_bytes()),
        (StoredType::F16, F64) => each(bytes, |value| f16::from_ne_bytes(value).to_f64().to_ne_bytes()),
        (StoredType::BF16, F32) => each(bytes, |value| bf16::from_ne_bytes(value).to_f32().to_ne_bytes()),
        (StoredType::BF16, F64) => each(bytes, |value| bf16::from_ne_bytes(value).to_f64().to_ne_bytes()),
        (StoredType::F32, F64) => each(bytes, |value| f64::from(f32::from_ne_bytes(value)).to_ne_bytes()),
        (StoredType::F16, F16) | (StoredType::BF16, BF16) | (StoredType::F32, F32) | (StoredType::F64, F64) => {}
        (stored, dtype) => unreachable!("{stored} is not exact in {dtype:?}"),
    }
}

/// Bytes go through a table, which is faster than to convert each.
fn widen_bytes(bytes: &mut [u8], dtype: DType, value: impl Fn(u8) -> f32) {
    fn looked_up<const WIDE: usize>(bytes: &mut [u8], wide: impl Fn(u8) -> [u8; WIDE]) {
        let table: [_; 256] = std::array::from_fn(|byte| wide(byte as u8));
        each(bytes, |[byte]| table[usize::from(byte)]);
    }
    match dtype {
        DType::F16 => looked_up(bytes, |byte| f16::from_f32(value(byte)).to_ne_bytes()),
        DType::BF16 => looked_up(bytes, |byte| bf16::from_f32(value(byte)).to_ne_bytes()),
        DType::F32 => looked_up(bytes, |byte| value(byte).to_ne_bytes()),
        _ => looked_up(bytes, |byte| f64::from(value(byte)).to_ne_bytes()),
    }
}

fn each<const NARROW: usize, const WIDE: usize>(bytes: &mut [u8], wide: impl Fn([u8; NARROW]) -> [u8; WIDE]) {
    let count = bytes.len() / WIDE;
    let mut from = bytes.len() - count * NARROW;
    for i in 0..count {
        let value = std::array::from_fn(|byte| bytes[from + byte]);
        bytes[i * WIDE..][..WIDE].copy_from_slice(&wide(value));
        from += NARROW;
    }
}

/// Turns values of the other byte order around.
pub(crate) fn swap_bytes(bytes: &mut [u8], size: usize) {
    bytes.chunks_exact_mut(size).for_each(<[u8]>::reverse);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_widened_exactly() {
        fn values(bytes: &[u8], dtype: DType) -> Vec<f64> {
            let chunks = bytes.chunks_exact(dtype.size_in_bytes());
            let value = |b: &[u8]| match dtype {
                DType::F16 => f16::from_ne_bytes(b.try_into().unwrap()).to_f64(),
                DType::BF16 => bf16::from_ne_bytes(b.try_into().unwrap()).to_f64(),
                DType::F32 => f32::from_ne_bytes(b.try_into().unwrap()).into(),
                _ => f64::from_ne_bytes(b.try_into().unwrap()),
            };
            chunks.map(value).collect()
        }
        fn check<T: Element>(all: &[T], value: impl Fn(T) -> f64) {
            for &dtype in T::STORED.exact_dtypes() {
                let mut bytes = vec![0; all.len() * dtype.size_in_bytes()];
                let from = bytes.len() - size_of_val(all);
                T::store(all, &mut bytes[from..]);
                widen(&mut bytes, T::STORED, dtype);
                let expected: Vec<_> = all.iter().map(|&v| value(v).to_bits()).collect();
                let got: Vec<_> = values(&bytes, dtype).into_iter().map(f64::to_bits).collect();
                assert_eq!(got, expected, "{} in {dtype:?}", T::STORED);
            }
        }
        check(&(0..=u8::MAX).collect::<Vec<_>>(), f64::from);
        check(&(i8::MIN..=i8::MAX).collect::<Vec<_>>(), f64::from);
        let finite = (0..=u16::MAX).map(f16::from_bits).filter(|v| !v.is_nan()).collect::<Vec<_>>();
        check(&finite, f16::to_f64);
        let finite = (0..=u16::MAX).map(bf16::from_bits).filter(|v| !v.is_nan()).collect::<Vec<_>>();
        check(&finite, bf16::to_f64);
        check(&[1.5f32, -0.0, f32::MAX, f32::MIN_POSITIVE, 1e-45, f32::INFINITY], f64::from);
        check(&[1.5f64, -0.0, f64::MAX], |v| v);
    }
}
