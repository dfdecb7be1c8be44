//! The sums that the updates of a fit leave each other, and the rows that change them: `kernels/update/changes.cu`.

use super::{
    memory::{elements, Arena, ArenaLayout, Memory, Slot},
    params::{Active, Changes},
    tensors::DevicePtr,
};
use crate::{error::Result, plan::skip::most_slices, request::Turn, tiles::CHANGES_FEW};
use candle_core::cuda_backend::CudaDevice;

/// The places of what an update finds of changed rows.
pub(super) struct ChangesLayout {
    sizes: [usize; 4],
    changed: Slot<u32>,
    next: Slot<u32>,
    offsets: Slot<u32>,
    rows: Slot<[u32; 2]>,
    slices: Slot<[u32; 2]>,
    count: Slot<u32>,
    /// A number of problems, and them.
    whole: Slot<u32>,
}

/// What the last update of a fit has left for this one.
pub(super) struct KeptSums<'a> {
    _held: Arena<'a>,
    pub(super) changes: Changes,
    /// The sums of each cluster.
    pub(super) slots: DevicePtr<[u64; 2]>,
    /// The most changed rows of a problem that are added alone.
    pub(super) room: usize,
    /// The most slices that they make.
    pub(super) most: usize,
}

impl ChangesLayout {
    /// Of `b` problems of `n` rows of `d` columns in `k` clusters.
    pub(super) fn new(sizes: [usize; 4], scratch: &mut ArenaLayout, zeros: &mut ArenaLayout) -> Self {
        let [b, n, k, _] = sizes;
        Self {
            sizes,
            changed: zeros.zeroed(b),
            next: zeros.zeroed(elements(&[b, 2, k])),
            offsets: scratch.unwritten(elements(&[b, 2 * k + 1])),
            rows: scratch.unwritten(elements(&[b, n / CHANGES_FEW])),
            slices: scratch.unwritten(elements(&[b, most_slices(n, k)])),
            count: scratch.unwritten(b),
            whole: scratch.unwritten(b + 1),
        }
    }

    /// Takes the sums over from the last update, or none in the first iteration.
    pub(super) fn keep<'a>(
        self,
        dev: &CudaDevice,
        turn: Option<Turn<'_>>,
        scratch: &Arena<'_>,
        zeros: &Arena<'_>,
        memory: &'a Memory,
    ) -> Result<KeptSums<'a>> {
        let [b, n, k, d] = self.sizes;
        let mut layout = ArenaLayout::default();
        let known = layout.unwritten::<u32>(elements(&[4, b]));
        let labels = layout.unwritten::<u32>(elements(&[b, n]));
        let slots = layout.unwritten::<[u64; 2]>(elements(&[b, k, d + 1]));
        let held = layout.sums(dev, "update", memory)?;
        let known = held.ptr(known);
        if turn.is_none_or(|turn| turn.iteration == 1) {
            known.clear(dev, 4 * b)?;
        }
        let (room, whole) = (n / CHANGES_FEW, scratch.ptr(self.whole));
        let changes = Changes {
            labels: held.ptr(labels),
            known,
            odd: known.from(b),
            state: known.from(2 * b),
            dirty: known.from(3 * b),
            changed: zeros.ptr(self.changed),
            next: zeros.ptr(self.next),
            offsets: scratch.ptr(self.offsets),
            rows: scratch.ptr(self.rows),
            slices: scratch.ptr(self.slices),
            count: scratch.ptr(self.count),
            whole: whole.from(1),
            whole_count: whole,
            k: k as i64,
            room: room as i64,
            most: most_slices(n, k) as i64,
        };
        let slots = held.ptr(slots);
        Ok(KeptSums { _held: held, changes, slots, room, most: most_slices(n, k) })
    }
}

impl KeptSums<'_> {
    /// The problems of which all rows are added up.
    pub(super) fn whole(&self) -> Active {
        Active { list: self.changes.whole, count: self.changes.whole_count, first: 0 }
    }
}
