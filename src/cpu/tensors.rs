//! Tensors on the CPU: their element types, locks and views.

use super::scalar::Scalar;
use crate::{
    error::{Error, Result},
    host,
    operand::{written_range, Readable, Source, Target},
    request::Turn,
    rows::Rows,
};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};
use std::{cell::RefCell, rc::Rc};

/// Runs `$body` with `$t` standing for the Rust type of a float dtype that is computed with in f32.
macro_rules! single {
    ($dtype:expr, $t:ident => $body:expr) => {
        $crate::cpu::tensors::single!($dtype, "F16, BF16 or F32", $t => $body)
    };
    ($dtype:expr, $expected:literal, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F16 => {
                type $t = half::f16;
                $body
            }
            candle_core::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            candle_core::DType::F32 => {
                type $t = f32;
                $body
            }
            got => Err($crate::error::Error::DType { argument: "x", got, expected: $expected.into() }),
        }
    };
}
pub(crate) use single;

/// The same for all float dtypes.
macro_rules! typed {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F64 => {
                type $t = f64;
                $body
            }
            dtype => $crate::cpu::tensors::single!(dtype, "F16, BF16, F32 or F64", $t => $body),
        }
    };
}
pub(crate) use typed;

/// A stored number. Conversions up are exact; `narrow` rounds to nearest even, once.
pub(crate) trait Element: Stored {
    /// The type that scores are filtered in.
    type Filter: Scalar;
    fn wide(self) -> f64;
    /// `out = row`, exactly.
    fn filter_row(row: &[Self], out: &mut [Self::Filter]);
    /// The row, where it is in that type.
    fn as_filter(row: &[Self]) -> Option<&[Self::Filter]>;
    fn numbers(all: &[Self]) -> Numbers<'_, Self::Filter>;
    /// The row in f32, where that has all of its values: itself, or in `scratch`.
    fn as_f32<'r>(row: &'r [Self], scratch: &'r mut [f32]) -> Option<&'r [f32]>;
    fn narrow(v: f64) -> Self;
}

/// Stored numbers, as a value rather than a type: what reads them is compiled once for all that are computed with in `F`.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a, F> {
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    /// Numbers of the type that is computed in.
    Same(&'a [F]),
}

/// Rounds to f32 toward zero and marks inexactness in the last bit ("to odd"), after which one more rounding, to a type
/// at least two bits narrower, is as good as a single one (Boldo and Melquiond 2008).
fn round_to_odd(v: f64) -> f32 {
    let nearest = v as f32;
    if nearest as f64 == v || v.is_nan() {
        return nearest;
    }
    let toward_zero = if (nearest as f64).abs() > v.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(toward_zero | 1)
}

macro_rules! element {
    ($t:ty, $filter:ty, $numbers:ident, $wide:expr, $filter_row:expr, $as_filter:expr, $as_f32:expr, $narrow:expr) => {
        impl Element for $t {
            type Filter = $filter;
            #[inline(always)]
            fn wide(self) -> f64 {
                $wide(self)
            }
            #[inline(always)]
            fn filter_row(row: &[Self], out: &mut [$filter]) {
                $filter_row(row, out)
            }
            #[inline(always)]
            fn as_filter(row: &[Self]) -> Option<&[$filter]> {
                $as_filter(row)
            }
            fn numbers(all: &[Self]) -> Numbers<'_, $filter> {
                Numbers::$numbers(all)
            }
            #[inline(always)]
            fn as_f32<'r>(row: &'r [Self], scratch: &'r mut [f32]) -> Option<&'r [f32]> {
                $as_f32(row, scratch)
            }
            #[inline(always)]
            fn narrow(v: f64) -> Self {
                $narrow(v)
            }
        }
    };
}
element!(f16, f32, F16, f16::to_f64, f16_row, |_| None, f16_in_scratch, |v| f16::from_f32(round_to_odd(v)));
element!(bf16, f32, BF16, bf16::to_f64, bf16_row, |_| None, bf16_in_scratch, |v| bf16::from_f32(round_to_odd(v)));
element!(f32, f32, Same, |v| v as f64, copy_row, Some, f32_itself, |v| v as f32);
element!(f64, f64, Same, |v| v, copy_row, Some, f64_in_no_f32, |v| v);

/// By integers, in a loop that vectorises with what the processor has: `half` converts eight at a time, by a call.
#[inline(always)]
pub(super) fn f16_row<E: From<f32>>(row: &[f16], out: &mut [E]) {
    /// The difference of an exponent in f32, and one more: the least exponent of normal numbers, at which a subnormal one is a difference.
    const BIAS: u32 = 112 << 23;
    const ONE: u32 = 1 << 23;
    for (out, v) in out.iter_mut().zip(row) {
        let bits = u32::from(v.to_bits());
        let magnitude = (bits & 0x7fff) << 13;
        let subnormal = f32::from_bits(magnitude + BIAS + ONE) - f32::from_bits(BIAS + ONE);
        let magnitude = match magnitude {
            m if m < ONE => subnormal.to_bits(),
            m if m >= 31 * ONE => m + 2 * BIAS,
            m => m + BIAS,
        };
        *out = f32::from_bits(magnitude | (bits & 0x8000) << 16).into();
    }
}

#[inline(always)]
pub(super) fn bf16_row<E: From<f32>>(row: &[bf16], out: &mut [E]) {
    out.iter_mut().zip(row).for_each(|(out, v)| *out = f32::from_bits(u32::from(v.to_bits()) << 16).into());
}

#[inline(always)]
fn f16_in_scratch<'r>(row: &'r [f16], scratch: &'r mut [f32]) -> Option<&'r [f32]> {
    f16_row(row, scratch);
    Some(scratch)
}

#[inline(always)]
fn bf16_in_scratch<'r>(row: &'r [bf16], scratch: &'r mut [f32]) -> Option<&'r [f32]> {
    bf16_row(row, scratch);
    Some(scratch)
}

#[inline(always)]
fn f32_itself<'r>(row: &'r [f32], _: &'r mut [f32]) -> Option<&'r [f32]> {
    Some(row)
}

#[inline(always)]
fn f64_in_no_f32<'r>(_: &'r [f64], _: &'r mut [f32]) -> Option<&'r [f32]> {
    None
}

#[inline(always)]
fn copy_row<T: Copy>(row: &[T], out: &mut [T]) {
    out.copy_from_slice(row)
}

/// An input that is locked for reading.
pub(crate) struct Guard<'a> {
    storage: StorageGuard<'a>,
    start: usize,
    len: usize,
}

/// A storage, and the holder of its lock.
enum StorageGuard<'a> {
    /// This op, for all tensors of the storage.
    Here(Rc<StorageRef<'a>>),
    /// Candle, while the op runs.
    ByCandle(&'a CpuStorage),
}

/// Locks the storages of those inputs that Candle has not locked, for reading: each once, since a second lock would wait for a writer that waits for the
/// first, and in the order of their addresses, so that no two threads wait for each other. Who holds such locks asks for no
/// others, but of tensors that nobody else has.
pub(crate) fn lock<const N: usize>(inputs: [&dyn Readable; N]) -> [Guard<'_>; N] {
    let addresses = inputs.map(address);
    let mut locked = Locked(vec![]);
    locked.add(&inputs, &addresses, &|_| true);
    locked.guards(inputs, addresses)
}

/// Lets `f` read some inputs and write the elements of `out`: locked as by [`lock`], `out` in its turn.
pub(crate) fn read_and_write<T: Stored, R, const N: usize>(
    inputs: [&dyn Readable; N],
    out: Target<'_>,
    f: impl FnOnce([Guard<'_>; N], &mut [T]) -> R,
) -> Result<R> {
    let Target::Tensor(tensor) = out else { return write(out, |data| f(lock(inputs), data)) };
    let (addresses, own) = (inputs.map(address), address(tensor));
    if own.is_some() && addresses.contains(&own) {
        let (got, with) = ("a view of a result".into(), "a call that overwrites it".into());
        return Err(Error::Conflict { argument: "x", got, with });
    }
    let mut locked = Locked(vec![]);
    locked.add(&inputs, &addresses, &|at| at < own);
    write(out, |data| {
        locked.add(&inputs, &addresses, &|at| at > own);
        f(locked.guards(inputs, addresses), data)
    })
}

/// A tensor, or where there is none what is locked anyway: as many inputs in either case.
pub(super) fn or<'a>(t: Option<&'a Tensor>, other: &'a dyn Readable) -> &'a dyn Readable {
    t.map_or(other, |t| t)
}

/// The address of a tensor's storage (which is locked for a moment); none of what Candle has locked.
fn address(input: &dyn Readable) -> Option<usize> {
    match input.source() {
        Source::Tensor(t) => Some(std::ptr::from_ref::<Storage>(&t.storage_and_layout().0).addr()),
        _ => None,
    }
}

/// Storages that are locked, by their addresses.
struct Locked<'a>(Vec<(Option<usize>, Rc<StorageRef<'a>>)>);

impl<'a> Locked<'a> {
    /// Locks those at addresses that are `wanted`, in order.
    fn add(
        &mut self,
        inputs: &[&'a dyn Readable],
        addresses: &[Option<usize>],
        wanted: &dyn Fn(Option<usize>) -> bool,
    ) {
        let mut order: Vec<usize> = (0..inputs.len()).collect();
        order.sort_unstable_by_key(|&i| addresses[i]);
        for i in order.into_iter().filter(|&i| wanted(addresses[i])) {
            if let Source::Tensor(t) = inputs[i].source() {
                if self.0.last().is_none_or(|&(last, _)| last != addresses[i]) {
                    self.0.push((addresses[i], Rc::new(t.storage_and_layout().0)));
                }
            }
        }
    }

    fn guards<const N: usize>(&self, inputs: [&'a dyn Readable; N], addresses: [Option<usize>; N]) -> [Guard<'a>; N] {
        std::array::from_fn(|i| self.guard(inputs[i], addresses[i]))
    }

    fn guard(&self, input: &'a dyn Readable, address: Option<usize>) -> Guard<'a> {
        let storage = match input.source() {
            Source::Cpu(storage) => StorageGuard::ByCandle(storage),
            _ => StorageGuard::Here(self.0.iter().find(|&&(at, _)| at == address).expect("it is locked").1.clone()),
        };
        Guard { storage, start: input.layout().start_offset(), len: input.elem_count() }
    }
}

impl Guard<'_> {
    /// The whole storage, for views that carry their own offset and strides.
    fn all<T: WithDType>(&self) -> Result<&[T]> {
        let storage = match &self.storage {
            StorageGuard::ByCandle(storage) => storage,
            StorageGuard::Here(locked) => match &***locked {
                Storage::Cpu(storage) => storage,
                _ => unreachable!("primitives.rs sends CPU tensors here"),
            },
        };
        Ok(T::cpu_storage_as_slice(storage)?)
    }

    /// The elements of a contiguous input.
    pub fn flat<T: WithDType>(&self) -> Result<&[T]> {
        Ok(&self.all::<T>()?[self.start..self.start + self.len])
    }

    pub fn view<'a, T: Element>(&'a self, rows: &'a Rows<'a>) -> Result<View<'a, T>> {
        Ok(View { data: &self.all()?[self.start..], rows })
    }
}

/// An element whose storage can be written.
pub(crate) trait Stored: WithDType {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! stored {
    ($($t:ty, $variant:ident;)+) => {
        $(impl Stored for $t {
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$variant(data) => Some(data),
                    _ => None,
                }
            }
        })+
    };
}
stored! { u8, U8; u32, U32; i64, I64; f16, F16; bf16, BF16; f32, F32; f64, F64; }

/// The elements of a target.
fn elements<'a, T: Stored>(storage: &'a mut CpuStorage, layout: &Layout) -> candle_core::Result<&'a mut [T]> {
    match (written_range(layout), T::slice_mut(storage)) {
        (Some(range), Some(data)) => Ok(&mut data[range]),
        _ => candle_core::bail!("a result is not a contiguous tensor of its type"),
    }
}

/// Lets `f` write the elements of a target.
pub(crate) fn write<'a, T: Stored, R>(to: impl Into<Target<'a>>, f: impl FnOnce(&mut [T]) -> R) -> Result<R> {
    let (mut f, mut out) = (Some(f), None);
    write_storage(to.into(), &mut |storage, layout| {
        let data = elements(storage, layout)?;
        out = f.take().map(|f| f(data));
        Ok(())
    })?;
    Ok(out.expect("written, or there would have been an error"))
}

/// The one use of a storage that is locked for writing.
type WriteStorage<'f> = &'f mut dyn FnMut(&mut CpuStorage, &Layout) -> candle_core::Result<()>;

fn write_storage(to: Target<'_>, f: WriteStorage<'_>) -> Result<()> {
    struct Write<'f>(RefCell<WriteStorage<'f>>);
    impl InplaceOp1 for Write<'_> {
        fn name(&self) -> &'static str {
            "write"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            self.0.borrow_mut()(storage, layout)
        }
    }
    match to {
        Target::Tensor(t) => Ok(t.inplace_op1(&Write(RefCell::new(f)))?),
        Target::Cpu(storage, layout) => Ok(f(storage, &layout)?),
        Target::Cuda(..) => unreachable!("primitives.rs sends CPU storages here"),
    }
}

/// Typed access to the rows of [`Rows`].
#[derive(Clone, Copy)]
pub(crate) struct View<'a, T> {
    data: &'a [T],
    pub rows: &'a Rows<'a>,
}

impl<'a, T> View<'a, T> {
    #[inline(always)]
    pub fn row(&self, batch: usize, i: usize) -> &'a [T] {
        let start = batch * self.rows.batch_stride + i * self.rows.row_stride;
        &self.data[start..start + self.rows.d]
    }

    /// All that the rows are in.
    pub fn numbers(&self) -> Numbers<'a, T::Filter>
    where
        T: Element,
    {
        T::numbers(self.data)
    }

    /// Asks for a row ahead of its turn.
    #[inline(always)]
    pub fn prefetch(&self, batch: usize, i: usize) {
        prefetch(self.row(batch, i));
    }
}

/// Asks for what is in `row` ahead of its turn.
#[inline(always)]
pub(super) fn prefetch<T>(row: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(row)).step_by(64) {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        // SAFETY: a prefetch is a hint that cannot fault, and the address lies inside `row`.
        unsafe { _mm_prefetch(row.as_ptr().cast::<i8>().add(line), _MM_HINT_T0) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// So many zeros.
pub(super) fn allocate(op: &'static str, len: usize, dtype: DType) -> Result<CpuStorage> {
    if dtype == DType::U32 {
        return Ok(CpuStorage::U32(host::filled(op, len, 0)?));
    }
    typed!(dtype, T => Ok(T::to_cpu_storage_owned(host::filled(op, len, T::narrow(0.0))?)))
}

/// A contiguous result on the CPU.
pub(super) fn tensor<T: WithDType>(data: Vec<T>, shape: impl Into<Shape>) -> Result<Tensor> {
    Ok(Tensor::from_vec(data, shape.into(), &Device::Cpu)?)
}

/// Whether each problem has converged before this turn; empty outside a fit.
pub(super) fn converged(turn: Option<Turn<'_>>) -> Result<Vec<bool>> {
    let Some(Turn { progress, iteration }) = turn else { return Ok(vec![]) };
    let [stop] = lock([&progress.stop]);
    Ok(stop.flat::<u32>()?.iter().map(|&stop| (stop as usize) < iteration).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_halves_are_widened_exactly() {
        let all = || 0..=u16::MAX;
        let mut out = vec![0.0; 1 << 16];
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        f16::filter_row(&all().map(f16::from_bits).collect::<Vec<_>>(), &mut out);
        assert!(all().all(|bits| same(out[bits as usize], f16::from_bits(bits).to_f32())));
        bf16::filter_row(&all().map(bf16::from_bits).collect::<Vec<_>>(), &mut out);
        assert!(all().all(|bits| same(out[bits as usize], bf16::from_bits(bits).to_f32())));
    }

    #[test]
    fn halves_are_rounded_once() {
        // Just above the midpoint of two f16 (and of two bf16), by less than f32 resolves: rounding twice goes down.
        let above = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        assert_eq!(f16::narrow(above).to_f64(), 1.0 + 2f64.powi(-10));
        assert_eq!(f16::narrow(-above).to_f64(), -1.0 - 2f64.powi(-10));
        let above = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(bf16::narrow(above).to_f64(), 1.0 + 2f64.powi(-7));
        assert_eq!(f16::narrow(1e9), f16::INFINITY);
        assert_eq!(bf16::narrow(1e39), bf16::INFINITY);
    }
}
