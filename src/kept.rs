//! What the iterations of a fit, and the passes of its start, leave each other, so that later ones have less to do.

use crate::{error::Result, host, plan::skip::SkipPlan};
use candle_core::{DType, Device, Tensor};
use std::{
    any::Any,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

/// What a pass of k-means++ has made of the rows for those after it: only the back end that made it knows what it is.
#[derive(Default)]
pub(crate) struct KeptRows(OnceLock<Box<dyn Any + Send + Sync>>);

impl KeptRows {
    /// What is kept, which `make` makes the first time; none if that was something else.
    pub fn get_or_make<R: Any + Send + Sync>(&self, make: impl FnOnce() -> Result<R>) -> Result<Option<&R>> {
        let kept = match self.0.get() {
            Some(kept) => kept,
            None => {
                let made = Box::new(make()?);
                self.0.get_or_init(|| made)
            }
        };
        Ok(kept.downcast_ref())
    }
}

/// Sums that an update leaves for the next one of the same rows, which adds those that have come to a cluster and takes away those that
/// have left it.
#[derive(Debug)]
pub(crate) struct KeptSums {
    /// The cluster whose sums have a row, `(b, n)`.
    pub labels: Vec<u32>,
    /// True of a problem whose sums are there, `(b)`: where its terms are whole numbers of the scale that its bounds give.
    pub known: Vec<bool>,
    /// `(b, k, d + 1)`: of each column and, last, of the weight.
    pub sums: Vec<i128>,
    /// The rows that changed their cluster before the last update.
    pub changed: usize,
}

impl KeptSums {
    /// For `b` problems of `n` rows of `d` columns in `k` clusters.
    pub fn new([b, n, k, d]: [usize; 4]) -> Result<Self> {
        let sums = host::filled("fit", b * k * (d + 1), 0)?;
        let (labels, known) = (host::filled("fit", b * n, u32::MAX)?, host::filled("fit", b, false)?);
        Ok(Self { labels, known, sums, changed: b * n })
    }

    /// Forgets the rows.
    pub fn reset(&mut self) {
        self.labels.fill(u32::MAX);
        self.known.fill(false);
        self.changed = self.labels.len();
    }
}

/// Columns of a row, of bf16, as a matrix unit loads them.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub [u16; 32]);

impl Line {
    pub const ZERO: Self = Self([0; 32]);
}

/// The rows of a problem as a matrix unit multiplies them.
#[derive(Default)]
pub(crate) struct PackedRows {
    /// `(n, steps)`.
    pub lines: Vec<Line>,
    /// Bounds on the norm of each row, and of what rounding has left of it, `(n)`; NaN of a row that is not scored.
    pub norms: Vec<[f32; 2]>,
    /// What has been subtracted from rows before they were rounded,
    pub centre: Vec<f32>,
    /// and the power of two that they were multiplied by.
    pub scale: f64,
}

/// Bounds on distances, in the data's own units, that an assignment leaves for the next one of the same rows. That one skips the groups
/// of centroids which the triangle inequality proves to be too far from a row to have its nearest centroid (Elkan 2003, Hamerly 2010;
/// by groups: Yinyang k-means, Ding et al. 2015).
pub(crate) struct KeptBounds {
    /// The group of each centroid, u32 `(b, k)`.
    pub group: Tensor,
    /// f32 `(b, n, groups)`: less what bounds of that snapshot to the group have fallen, no centroid of it but the row's own is nearer.
    pub lower: Tensor,
    /// The snapshot of the centroids that each of these was made at, u8 `(b, n, groups)`.
    pub since: Tensor,
    /// f32 `(b, n)`, none of no groups: the row's own centroid of the last assignment is not farther.
    pub upper: Tensor,
    /// Centroids of the assignments that have made bounds, f32 `(b, snapshots, k, d)`. The latest are those of the last assignment.
    pub snapshots: Tensor,
    /// The distance by which bounds of the latest snapshot had fallen when it was taken in the place of one before it, f32 `(b, groups)`.
    pub fallen: Tensor,
    /// The rows of each problem; empty before a pass has packed them, and where there is no matrix unit.
    pub packed: Mutex<Vec<PackedRows>>,
    /// Says how many groups there are, none where only rows are kept, and when they are skipped.
    pub skip: SkipPlan,
    /// Whether bounds are of use, of each problem.
    pub problems: Mutex<Vec<BoundsState>>,
}

/// Whether bounds are of use.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BoundsState {
    /// Assignments of the fit.
    pub passes: usize,
    /// The last one that compared all centroids and made bounds anew, if nothing has made these useless since.
    pub made: Option<usize>,
    /// No pass before this one is to make bounds.
    pub next: usize,
    /// Snapshots that have been taken since.
    pub snapshots: usize,
    /// True if a pass has packed the rows, which later ones need not do again.
    pub packed: bool,
}

impl KeptBounds {
    /// For `b` problems of `n` rows of `d` columns and `k` centroids.
    pub fn new([b, n, k, d]: [usize; 4], skip: SkipPlan, device: &Device) -> Result<Self> {
        let zeros = |shape: &[usize], dtype| host::zeros("fit", shape, dtype, device);
        let groups = skip.groups;
        Ok(Self {
            group: zeros(&[b, k], DType::U32)?,
            lower: zeros(&[b, n, groups], DType::F32)?,
            since: zeros(&[b, n, groups], DType::U8)?,
            upper: zeros(&[b, if groups > 0 { n } else { 0 }], DType::F32)?,
            snapshots: zeros(&[b, skip.snapshots, k, d], DType::F32)?,
            fallen: zeros(&[b, groups], DType::F32)?,
            packed: Mutex::new((0..b).map(|_| PackedRows::default()).collect()),
            skip,
            problems: Mutex::new(vec![BoundsState::default(); b]),
        })
    }

    /// Begins a fit.
    pub fn reset(&self) {
        self.states().fill(BoundsState::default());
    }

    /// Says that labels are not those of the last assignment.
    pub fn forget(&self) {
        self.states().iter_mut().for_each(|state| state.made = None);
    }

    pub fn states(&self) -> MutexGuard<'_, Vec<BoundsState>> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
