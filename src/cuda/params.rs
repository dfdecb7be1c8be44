//! Parameters of kernels that are structs, laid out as in `kernels/`.

use super::tensors::{own, Part};
use crate::{
    error::{Error, Result},
    request::{Progress, Reduction, Turn},
    rows::Rows,
};
use candle_core::{cuda_backend::cudarc::driver::DeviceRepr, Layout};

/// `struct Rows` of `kernels/exact/common.cuh`.
#[repr(C)]
pub(super) struct Shape5 {
    pub(super) batch_stride: i64,
    pub(super) row_stride: i64,
    pub(super) b: i64,
    pub(super) n: i64,
    pub(super) d: i64,
}

// SAFETY: plain integers, laid out as in C.
unsafe impl DeviceRepr for Shape5 {}
const _: () = assert!(size_of::<Shape5>() == 40);

pub(super) fn shape(r: &Rows) -> Shape5 {
    let (batch_stride, row_stride) = (r.batch_stride as i64, r.row_stride as i64);
    Shape5 { batch_stride, row_stride, b: r.b as i64, n: r.n as i64, d: r.d as i64 }
}

/// `struct Active` of `kernels/exact/common.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Active {
    pub(super) list: Part<u32>,
    pub(super) count: Part<u32>,
    pub(super) first: i64,
}

// SAFETY: two pointers and an integer, laid out as in C.
unsafe impl DeviceRepr for Active {}
const _: () = assert!(size_of::<Active>() == 24);

impl Active {
    /// What a turn has to do, which is everything outside a fit and in its first iteration.
    pub(super) fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        match turn {
            Some(Turn { progress, iteration }) if iteration > 1 => {
                let count = going(progress, iteration)?;
                Ok(Self { list: count.from(1), count, first: 0 })
            }
            _ => Ok(Self { list: Part::NULL, count: Part::NULL, first: 0 }),
        }
    }
    /// Without the first problems of the list.
    pub(super) fn after(self, first: usize) -> Self {
        Self { first: first as i64, ..self }
    }
    /// All or nothing.
    pub(super) fn whole(self) -> Self {
        Self { list: Part::NULL, first: 0, ..self }
    }
}

/// The list of the problems that go on to an iteration.
pub(super) fn going(progress: &Progress, iteration: usize) -> Result<Part<u32>> {
    let b = progress.stop.dims1()?;
    Ok(own::<u32>(&progress.going)?.from(iteration % 2 * (b + 1)))
}

/// Centroids that all problems share as those of one.
pub(super) fn one_copy<'a>(c: &Rows<'a>) -> Rows<'a> {
    Rows { b: if c.batch_stride == 0 { c.b.min(1) } else { c.b }, ..c.clone() }
}

/// `struct Strided` of `rows.cu`.
#[repr(C)]
pub(super) struct Strided {
    sizes: [i64; 8],
    strides: [i64; 8],
    rank: i64,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Strided {}
const _: () = assert!(size_of::<Strided>() == 136);

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

/// `struct Cache` of `attend.cu`.
#[repr(C)]
pub(super) struct Cache {
    pub(super) q: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) mean_keys: u64,
    pub(super) mean_values: u64,
    pub(super) order: u64,
    pub(super) offsets: u64,
    pub(super) out: u64,
    pub(super) scores: Part<f32>,
    pub(super) of_means: Part<[f32; 2]>,
    pub(super) partial: Part<f32>,
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
}

// SAFETY: addresses, integers and a float, laid out as in C.
unsafe impl DeviceRepr for Cache {}
const _: () = assert!(size_of::<Cache>() == 160);

/// `struct Route` of `route.cuh`.
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

// SAFETY: integers and a float, laid out as in C.
unsafe impl DeviceRepr for Route {}
const _: () = assert!(size_of::<Route>() == 120);

/// `struct Choice` of `select.cu`.
#[repr(C)]
pub(super) struct Choice {
    pub(super) units: i64,
    pub(super) clustered: i64,
    pub(super) k: i64,
    pub(super) least: i64,
    pub(super) most: i64,
    pub(super) share: f32,
}

// SAFETY: integers and a float, laid out as in C.
unsafe impl DeviceRepr for Choice {}
const _: () = assert!(size_of::<Choice>() == 48);

/// `struct Digit` of `sort.cu`.
#[repr(C)]
pub(super) struct Digit {
    pub(super) labels: Part<u32>,
    pub(super) before: Part<u32>,
    pub(super) n: i64,
    pub(super) k: i64,
    pub(super) bins: i64,
    pub(super) shift: u32,
    pub(super) mask: u32,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Digit {}
const _: () = assert!(size_of::<Digit>() == 48);

/// `struct Clusters` of `clusters.cuh`.
#[repr(C)]
pub(super) struct Clusters {
    pub(super) centroids: u64,
    pub(super) slots: Part<[u64; 2]>,
    pub(super) added: Part<u32>,
    pub(super) finished: Part<u32>,
    pub(super) odd: Part<u32>,
    pub(super) odd_of: Part<u32>,
    pub(super) odd_count: Part<u32>,
    pub(super) odd_list: Part<u64>,
    pub(super) shift: Part<f64>,
    pub(super) k: i64,
    pub(super) d: i64,
    pub(super) rows: i64,
    pub(super) divisor: i32,
    pub(super) planes: i32,
    pub(super) b: i64,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Clusters {}
const _: () = assert!(size_of::<Clusters>() == 112);

impl Clusters {
    /// Of `b` problems, `k` clusters each, whose sums have room for `rows` rows; with none of what is added up or written.
    pub(super) fn new([b, k, d]: [usize; 3], rows: usize) -> Self {
        Self {
            centroids: 0,
            slots: Part::NULL,
            added: Part::NULL,
            finished: Part::NULL,
            odd: Part::NULL,
            odd_of: Part::NULL,
            odd_count: Part::NULL,
            odd_list: Part::NULL,
            shift: Part::NULL,
            k: k as i64,
            d: d as i64,
            rows: rows as i64,
            divisor: 0,
            planes: 0,
            b: b as i64,
        }
    }
}

/// `struct Pieces` of `clusters.cuh`.
#[repr(C)]
pub(super) struct Pieces {
    pub(super) rows: u32,
    pub(super) whole: u32,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Pieces {}
const _: () = assert!(size_of::<Pieces>() == 8);

/// `struct Verdict` of `clusters.cuh`.
#[repr(C)]
pub(super) struct Verdict {
    pub(super) threshold: Part<f64>,
    pub(super) stop: Part<u32>,
    pub(super) list: Part<u32>,
    pub(super) count: Part<u32>,
    pub(super) iteration: i64,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Verdict {}
const _: () = assert!(size_of::<Verdict>() == 40);

impl Verdict {
    pub(super) fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        let Some(Turn { progress, iteration }) = turn else {
            let (threshold, none) = (Part::NULL, Part::NULL);
            return Ok(Self { threshold, stop: none, list: none, count: none, iteration: 0 });
        };
        let (threshold, stop) = (own(&progress.threshold)?, own(&progress.stop)?);
        let count = going(progress, iteration + 1)?;
        Ok(Self { threshold, stop, list: count.from(1), count, iteration: iteration as i64 })
    }
}

/// `struct Terms` of `sums.cuh`.
#[repr(C)]
pub(super) struct TermsOnChip {
    pub(super) factor: Part<f64>,
    pub(super) largest: Part<f64>,
    pub(super) heaviest: Part<f64>,
    pub(super) first_bad: Part<u32>,
}

// SAFETY: pointers, laid out as in C.
unsafe impl DeviceRepr for TermsOnChip {}
const _: () = assert!(size_of::<TermsOnChip>() == 32);

/// `struct Shares` of `team.cuh`.
#[repr(C)]
pub(super) struct Shares {
    pub(super) blocks: i32,
    pub(super) rows: i32,
    pub(super) padded: i32,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Shares {}
const _: () = assert!(size_of::<Shares>() == 12);

/// `struct Common` of `team.cuh`.
#[repr(C)]
pub(super) struct Common {
    pub(super) limbs: Part<u64>,
    pub(super) rest: Part<[u64; 2]>,
    pub(super) weights: Part<[u64; 2]>,
    pub(super) sizes: Part<u32>,
    pub(super) shifts: Part<[f64; 2]>,
    pub(super) arrived: Part<u32>,
    pub(super) moved: Part<u16>,
    pub(super) prepared: Part<[u64; 4]>,
}

// SAFETY: pointers, laid out as in C.
unsafe impl DeviceRepr for Common {}
const _: () = assert!(size_of::<Common>() == 64);

/// `enum Divisor` of `sums.cuh`.
pub(super) fn divisor(reduction: Reduction) -> i32 {
    match reduction {
        Reduction::Mean | Reduction::Median => 0,
        Reduction::Direction => 1,
        Reduction::Sum => 2,
    }
}
