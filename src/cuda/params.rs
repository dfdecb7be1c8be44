//! The structs that kernels take, or that are made room for on their behalf, in the order of `kernels/params.cuh`, which has
//! each of them once more under the same name and says what the fields are.

use super::tensors::{own, DevicePtr};
use crate::{
    error::{Error, Result},
    request::{Progress, Reduction, Turn},
    rows,
};
use candle_core::{cuda_backend::cudarc::driver::DeviceRepr, Layout};
use std::mem::offset_of;

/// Lets a struct be an argument of kernels, and refuses one of other than so many bytes, or whose last field lies elsewhere.
macro_rules! layout {
    ($name:ident, $bytes:literal, $last:ident: $offset:literal) => {
        const _: () = assert!(size_of::<$name>() == $bytes && offset_of!($name, $last) == $offset);
        // SAFETY: integers, floats and device pointers, laid out as in C and as `kernels/params.cuh` asserts.
        unsafe impl DeviceRepr for $name {}
    };
}

#[repr(C)]
pub(super) struct Rows {
    pub(super) batch_stride: i64,
    pub(super) row_stride: i64,
    pub(super) b: i64,
    pub(super) n: i64,
    pub(super) d: i64,
}

layout!(Rows, 40, d: 32);

pub(super) fn shape(r: &rows::Rows) -> Rows {
    let (batch_stride, row_stride) = (r.batch_stride as i64, r.row_stride as i64);
    Rows { batch_stride, row_stride, b: r.b as i64, n: r.n as i64, d: r.d as i64 }
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Active {
    pub(super) list: DevicePtr<u32>,
    pub(super) count: DevicePtr<u32>,
    pub(super) first: i64,
}

layout!(Active, 24, first: 16);

impl Active {
    /// The problems that a turn has to do, which is everything outside a fit and in its first iteration.
    pub(super) fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        match turn {
            Some(Turn { progress, iteration }) if iteration > 1 => {
                let count = going(progress, iteration)?;
                Ok(Self { list: count.from(1), count, first: 0 })
            }
            _ => Ok(Self { list: DevicePtr::NULL, count: DevicePtr::NULL, first: 0 }),
        }
    }
    /// Without the first problems of the list.
    pub(super) fn after(self, first: usize) -> Self {
        Self { first: first as i64, ..self }
    }
    /// All or nothing.
    pub(super) fn whole(self) -> Self {
        Self { list: DevicePtr::NULL, first: 0, ..self }
    }
}

/// The list of the problems that go on to an iteration.
pub(super) fn going(progress: &Progress, iteration: usize) -> Result<DevicePtr<u32>> {
    let b = progress.stop.dims1()?;
    Ok(own::<u32>(&progress.going)?.from(iteration % 2 * (b + 1)))
}

/// Centroids that all problems share as those of one.
pub(super) fn one_copy<'a>(c: &rows::Rows<'a>) -> rows::Rows<'a> {
    rows::Rows { b: if c.batch_stride == 0 { c.b.min(1) } else { c.b }, ..c.clone() }
}

#[repr(C)]
pub(super) struct Strided {
    sizes: [i64; 8],
    strides: [i64; 8],
    rank: i64,
}

layout!(Strided, 136, rank: 128);

impl Strided {
    /// The last dimension, then the others from the innermost one on, those that step over the whole of the one inside with it.
    pub(super) fn of(layout: &Layout) -> Result<Self> {
        let dims = layout.dims().iter().zip(layout.stride()).map(|(&size, &stride)| (size as i64, stride as i64)).rev();
        let mut folded: Vec<(i64, i64)> = vec![];
        for (_, (size, stride)) in dims.enumerate().filter(|&(i, (size, _))| i == 0 || size != 1) {
            // The last dimension stays alone: its rows are widened.
            let outer = folded.len() > 1;
            match folded.last_mut() {
                Some((inner, step)) if outer && stride == *inner * *step => *inner *= size,
                _ => folded.push((size, stride)),
            }
        }
        let mut strided = Self { sizes: [1; 8], strides: [0; 8], rank: folded.len() as i64 };
        if folded.len() > strided.sizes.len() {
            let (got, limit) = (folded.len(), strided.sizes.len());
            return Err(Error::TooLarge { argument: "dimensions of a copy", got, limit });
        }
        for (i, (size, stride)) in folded.into_iter().enumerate() {
            (strided.sizes[i], strided.strides[i]) = (size, stride);
        }
        Ok(strided)
    }
}

#[repr(C)]
pub(super) struct Bounds {
    pub(super) moved: f32,
    pub(super) start: f32,
    pub(super) residual: f32,
    pub(super) stored: f32,
    pub(super) scale: f32,
    pub(super) inverse: f32,
    pub(super) rounded: f32,
    pub(super) typical: f32,
}

layout!(Bounds, 32, typical: 28);

#[repr(C)]
pub(super) struct Reach {
    pub(super) rows: f32,
    pub(super) centroids: f32,
}

layout!(Reach, 8, centroids: 4);

#[repr(C)]
pub(super) struct UnprovenRow {
    pub(super) row: u32,
    pub(super) cutoff: f32,
}

layout!(UnprovenRow, 8, cutoff: 4);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Gate {
    pub(super) count: DevicePtr<u32>,
    pub(super) next: DevicePtr<u32>,
}

layout!(Gate, 16, next: 8);

#[repr(C)]
pub(super) struct ProductCodes {
    pub(super) codes: u64,
    pub(super) entries: u64,
    pub(super) columns: i32,
    pub(super) bits: i32,
    pub(super) tables: i64,
    pub(super) gains: u64,
}

impl ProductCodes {
    pub(super) const NONE: Self = Self { codes: 0, entries: 0, columns: 0, bits: 0, tables: 0, gains: 0 };
}

layout!(ProductCodes, 40, gains: 32);

#[repr(C)]
pub(super) struct Cache {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) mean_keys: u64,
    pub(super) mean_values: u64,
    pub(super) key_scales: u64,
    pub(super) value_scales: u64,
    pub(super) spreads: u64,
    pub(super) order: u64,
    pub(super) offsets: u64,
    pub(super) out: u64,
    pub(super) bounds: DevicePtr<f32>,
    pub(super) of_means: DevicePtr<[f32; 2]>,
    pub(super) partial: DevicePtr<f32>,
    pub(super) head_stride: i64,
    pub(super) units: i32,
    pub(super) group: i32,
    pub(super) sinks: i32,
    pub(super) clustered: i32,
    pub(super) tokens: i32,
    pub(super) k: i32,
    pub(super) width: i32,
    pub(super) budget: i32,
    pub(super) blocks: i32,
    pub(super) clusters: i32,
    pub(super) rows: i32,
    pub(super) first: i32,
    pub(super) last: i32,
    pub(super) estimate: i32,
    pub(super) scale: f32,
    pub(super) reach: f32,
    pub(super) key_codes: ProductCodes,
    pub(super) value_codes: ProductCodes,
    pub(super) entries: i32,
    pub(super) team: i32,
}

layout!(Cache, 272, team: 268);

#[repr(C)]
pub(super) struct Route {
    pub(super) key_head: i64,
    pub(super) key_row: i64,
    pub(super) value_head: i64,
    pub(super) value_row: i64,
    pub(super) group: i64,
    pub(super) queries: i64,
    pub(super) units: i64,
    pub(super) sinks: i64,
    pub(super) clustered: i64,
    pub(super) others: i64,
    pub(super) k: i64,
    pub(super) most: i64,
    pub(super) means: i64,
    pub(super) causal: i64,
    pub(super) scale: f32,
}

layout!(Route, 120, scale: 112);

#[repr(C)]
pub(super) struct Choice {
    pub(super) units: i64,
    pub(super) clustered: i64,
    pub(super) k: i64,
    pub(super) least: i64,
    pub(super) most: i64,
    pub(super) share: f32,
}

layout!(Choice, 48, share: 40);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LutWeights {
    pub(super) codes: u64,
    pub(super) levels: u64,
    pub(super) scales: u64,
    pub(super) places: u64,
    pub(super) extra: u64,
    pub(super) outputs: i64,
    pub(super) inputs: i64,
    pub(super) columns: i64,
    pub(super) tables: i64,
    pub(super) groups: i64,
    pub(super) outliers: i64,
}

layout!(LutWeights, 88, outliers: 80);

#[repr(C)]
pub(super) struct LutProduct {
    pub(super) w: LutWeights,
    pub(super) values: u64,
    pub(super) across: u64,
    pub(super) units: u64,
    pub(super) bias: u64,
    pub(super) out: u64,
    pub(super) rows: i64,
    pub(super) padded: i64,
    pub(super) parts: i64,
}

layout!(LutProduct, 152, parts: 144);

#[repr(C)]
pub(super) struct Digit {
    pub(super) labels: DevicePtr<u32>,
    pub(super) before: DevicePtr<u32>,
    pub(super) n: i64,
    pub(super) k: i64,
    pub(super) bins: i64,
    pub(super) shift: u32,
    pub(super) mask: u32,
}

layout!(Digit, 48, mask: 44);

#[repr(C)]
pub(super) struct Clusters {
    pub(super) centroids: u64,
    pub(super) slots: DevicePtr<[u64; 2]>,
    pub(super) added: DevicePtr<u32>,
    pub(super) finished: DevicePtr<u32>,
    pub(super) odd: DevicePtr<u32>,
    pub(super) odd_of: DevicePtr<u32>,
    pub(super) odd_count: DevicePtr<u32>,
    pub(super) odd_list: DevicePtr<u64>,
    pub(super) shift: DevicePtr<f64>,
    pub(super) kept: DevicePtr<u32>,
    pub(super) problems: i64,
    pub(super) k: i64,
    pub(super) d: i64,
    pub(super) rows: i64,
    pub(super) divisor: i32,
    pub(super) planes: i32,
}

layout!(Clusters, 120, planes: 116);

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Changes {
    pub(super) labels: DevicePtr<u32>,
    pub(super) known: DevicePtr<u32>,
    pub(super) odd: DevicePtr<u32>,
    pub(super) state: DevicePtr<u32>,
    pub(super) dirty: DevicePtr<u32>,
    pub(super) changed: DevicePtr<u32>,
    pub(super) next: DevicePtr<u32>,
    pub(super) offsets: DevicePtr<u32>,
    pub(super) rows: DevicePtr<[u32; 2]>,
    pub(super) slices: DevicePtr<[u32; 2]>,
    pub(super) count: DevicePtr<u32>,
    pub(super) whole: DevicePtr<u32>,
    pub(super) whole_count: DevicePtr<u32>,
    pub(super) k: i64,
    pub(super) room: i64,
    pub(super) most: i64,
}

layout!(Changes, 128, most: 120);

#[repr(C)]
pub(super) struct NearState {
    pub(super) listed: u64,
    pub(super) last_listed: u64,
    pub(super) arrived: u32,
    pub(super) changed: u32,
    pub(super) on: u32,
    pub(super) fresh: u32,
    pub(super) regroup: u32,
    pub(super) going: u32,
    pub(super) near: u32,
    pub(super) all: u32,
    pub(super) crowded: u32,
    pub(super) failures: u32,
    pub(super) spare: [u32; 2],
}

layout!(NearState, 64, failures: 52);

impl Clusters {
    /// Of so many problems and clusters, whose sums have room for `rows` rows; with none of what is added up or written.
    pub(super) fn new([problems, k, d]: [usize; 3], rows: usize) -> Self {
        Self {
            centroids: 0,
            slots: DevicePtr::NULL,
            added: DevicePtr::NULL,
            finished: DevicePtr::NULL,
            odd: DevicePtr::NULL,
            odd_of: DevicePtr::NULL,
            odd_count: DevicePtr::NULL,
            odd_list: DevicePtr::NULL,
            shift: DevicePtr::NULL,
            kept: DevicePtr::NULL,
            problems: problems as i64,
            k: k as i64,
            d: d as i64,
            rows: rows as i64,
            divisor: 0,
            planes: 0,
        }
    }
}

#[repr(C)]
pub(super) struct Pieces {
    pub(super) rows: u32,
    pub(super) whole: u32,
}

layout!(Pieces, 8, whole: 4);

#[repr(C)]
pub(super) struct Verdict {
    pub(super) threshold: DevicePtr<f64>,
    pub(super) stop: DevicePtr<u32>,
    pub(super) list: DevicePtr<u32>,
    pub(super) count: DevicePtr<u32>,
    pub(super) iteration: i64,
}

layout!(Verdict, 40, iteration: 32);

impl Verdict {
    pub(super) fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        let Some(Turn { progress, iteration }) = turn else {
            let (threshold, none) = (DevicePtr::NULL, DevicePtr::NULL);
            return Ok(Self { threshold, stop: none, list: none, count: none, iteration: 0 });
        };
        let (threshold, stop) = (own(&progress.threshold)?, own(&progress.stop)?);
        let count = going(progress, iteration + 1)?;
        Ok(Self { threshold, stop, list: count.from(1), count, iteration: iteration as i64 })
    }
}

#[repr(C)]
pub(super) struct Summands {
    pub(super) row_scale: DevicePtr<f64>,
    pub(super) max_abs: DevicePtr<f64>,
    pub(super) max_weight: DevicePtr<f64>,
    pub(super) first_nonfinite: DevicePtr<u32>,
}

layout!(Summands, 32, first_nonfinite: 24);

#[repr(C)]
pub(super) struct Shares {
    pub(super) blocks: i32,
    pub(super) rows: i32,
    pub(super) padded: i32,
}

layout!(Shares, 12, padded: 8);

#[repr(C, align(16))]
pub(super) struct PreparedCentroid {
    pub(super) start: f32,
    pub(super) scale: f32,
    pub(super) moved: f32,
    pub(super) residual: f32,
    pub(super) stored: f32,
    pub(super) hash: u32,
}

layout!(PreparedCentroid, 32, hash: 20);

#[repr(C)]
pub(super) struct Common {
    pub(super) limbs: DevicePtr<u64>,
    pub(super) remainders: DevicePtr<[u64; 2]>,
    pub(super) weights: DevicePtr<[u64; 2]>,
    pub(super) sizes: DevicePtr<u32>,
    pub(super) shifts: DevicePtr<[f64; 2]>,
    pub(super) arrived: DevicePtr<u32>,
    pub(super) moved: DevicePtr<u16>,
    pub(super) prepared: DevicePtr<PreparedCentroid>,
}

layout!(Common, 64, prepared: 56);

/// `enum Divisor` of `sums.cuh`.
pub(super) fn divisor(reduction: Reduction) -> i32 {
    match reduction {
        Reduction::Mean | Reduction::Median => 0,
        Reduction::Direction => 1,
        Reduction::Sum => 2,
    }
}
