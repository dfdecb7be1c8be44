//! A ring of buffers that threads, which wait for the disk, read rows into ahead of who sends them to a device.

use super::{fingerprint::hash_rows, source::Source};
use crate::{
    error::Result,
    primitives,
    staging::{Buffer, Lane, Sent},
};
use candle_core::Device;
use std::{
    mem,
    ops::Range,
    panic::{catch_unwind, resume_unwind, AssertUnwindSafe},
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc, Mutex, PoisonError,
    },
    thread,
};

/// Threads that read at once: as many requests as keep a solid-state disk at work, and for a GPU as many threads as fill its link by
/// copying from memory, of which the processor has so many.
pub(super) fn readers(device: &Device) -> usize {
    if device.is_cpu() {
        return 4;
    }
    thread::available_parallelism().map_or(4, usize::from).clamp(4, 16)
}

/// Buffers in the ring: one for each reader, and some that are on their way or waited for.
fn slots_of(device: &Device) -> usize {
    readers(device) + if device.is_cpu() { 2 } else { 8 }
}

/// Bytes that are read for a GPU at a time. Page-locking memory takes longer than filling it, so that there should not be more than is
/// needed to keep the link at work.
const PART_BYTES: usize = 4 << 20;

/// Rows of a part, of blocks of so many: all on the CPU, where a buffer becomes a block.
pub(super) fn part_rows(device: &Device, block: usize, row_bytes: usize) -> usize {
    if device.is_cpu() {
        return block;
    }
    (PART_BYTES / row_bytes).clamp(1, block)
}

/// Bytes of the ring that so many blocks of so many rows go through.
pub(super) fn ring_bytes(device: &Device, blocks: usize, rows: usize, row_bytes: usize) -> usize {
    let part = part_rows(device, rows, row_bytes);
    slots_of(device).min(blocks * rows.div_ceil(part)) * part * row_bytes
}

/// Blocks of rows that `device` has room for beside those that stay there: the one that is worked on and the next one. The memory of
/// the CPU has the ring, too.
pub(super) fn moving(device: &Device) -> usize {
    if device.is_cpu() {
        slots_of(device) + 2
    } else {
        2
    }
}

/// Rows of a source on their way through a ring of buffers, which stays between passes.
pub(super) struct Ring<'a> {
    source: &'a Source<'a>,
    device: &'a Device,
    /// The most rows of a block.
    most: usize,
    slots: Vec<Slot>,
}

/// A buffer of the ring.
struct Slot {
    /// The copy that is under way from it: dropped before its memory is.
    sent: Option<Box<dyn Sent>>,
    memory: Box<dyn Buffer>,
}

/// A part of a block: as many rows as are read at a time.
pub(super) struct Part {
    block: usize,
    pub rows: Range<usize>,
}

/// A slot with the rows of a part, or why there are none.
type Filled = thread::Result<Result<Slot>>;

impl<'a> Ring<'a> {
    pub fn new(source: &'a Source<'a>, device: &'a Device, most: usize) -> Self {
        Self { source, device, most, slots: vec![] }
    }

    /// Frees the buffers, which the next pass has to make again.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// Has the rows of blocks read, and their hashes added to `hash`, while `work` sends what has arrived.
    pub fn pass(
        &mut self,
        blocks: &[Range<usize>],
        hash: Option<&AtomicU64>,
        work: impl FnOnce(&mut Arrivals<'_>) -> Result<()>,
    ) -> Result<()> {
        let &mut Self { source, device, most, ref mut slots } = self;
        let row_bytes = source.row_bytes();
        let step = part_rows(device, most, row_bytes);
        let parts: Vec<_> = parts_of(blocks, step).collect();
        let new = slots_of(device).min(parts.len()).saturating_sub(slots.len());
        let ((free, freed), (filled, arrivals)) = (mpsc::channel(), mpsc::channel());
        let readers = readers(device).min(parts.len());
        let pass = Pass { source, device, bytes: step * row_bytes, parts: &parts, hash };
        let untaken = Mutex::new(Untaken { free: mem::take(slots), freed, new, parts: 0..parts.len() });
        thread::scope(|scope| {
            for _ in 0..readers {
                let (pass, untaken, filled) = (&pass, &untaken, filled.clone());
                scope.spawn(move || pass.read_ahead(untaken, &filled));
            }
            drop(filled);
            let early = parts.iter().map(|_| None).collect();
            // However this ends, readers wait no longer than what they wait for is there.
            work(&mut Arrivals { blocks, parts: &parts, row_bytes, free, arrivals, early, next: 0 })
        })?;
        let Untaken { free, freed, .. } = untaken.into_inner().unwrap_or_else(PoisonError::into_inner);
        slots.extend(free.into_iter().chain(freed.try_iter()));
        Ok(())
    }
}

/// The parts of blocks, of so many rows each.
pub(super) fn parts_of(blocks: &[Range<usize>], rows: usize) -> impl Iterator<Item = Part> + '_ {
    blocks.iter().enumerate().flat_map(move |(block, own)| {
        let end = own.end;
        own.clone().step_by(rows).map(move |first| Part { block, rows: first..end.min(first.saturating_add(rows)) })
    })
}

/// A pass as its readers see it.
struct Pass<'p> {
    source: &'p Source<'p>,
    device: &'p Device,
    /// The size of a buffer.
    bytes: usize,
    parts: &'p [Part],
    hash: Option<&'p AtomicU64>,
}

/// Slots and parts that readers take.
struct Untaken {
    /// Slots that are free.
    free: Vec<Slot>,
    /// Slots that become free.
    freed: mpsc::Receiver<Slot>,
    /// The number of slots that may still be made.
    new: usize,
    /// The parts that nobody has taken.
    parts: Range<usize>,
}

impl Untaken {
    /// Whether whoever asks is to make a slot, since none is free.
    fn lacks_slot(&mut self) -> bool {
        self.free.extend(self.freed.try_iter());
        let lacks = self.free.is_empty() && self.new > 0 && !self.parts.is_empty();
        self.new -= usize::from(lacks);
        lacks
    }

    /// The next part, with a slot that was made for it, is free, or becomes so. Whoever takes a slot takes the next part with it, so that
    /// the part that is waited for never lacks one.
    fn take(&mut self, made: Option<Result<Slot>>) -> Option<(usize, Result<Slot>)> {
        let part = self.parts.next()?;
        let free = || self.free.pop().or_else(|| self.freed.recv().ok()).map(Ok);
        Some((part, made.or_else(free)?))
    }
}

impl Pass<'_> {
    /// Reads parts into slots until there are no more of either.
    fn read_ahead(&self, untaken: &Mutex<Untaken>, filled: &mpsc::Sender<(usize, Filled)>) {
        let untaken = || untaken.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // To page-lock memory takes longer than to fill it: others go on with the slots that there are.
            let lacks = untaken().lacks_slot();
            let made = lacks.then(|| Ok(Slot { sent: None, memory: primitives::buffer(self.device, self.bytes)? }));
            let Some((part, slot)) = untaken().take(made) else { return };
            let rows = &self.parts[part].rows;
            let read = catch_unwind(AssertUnwindSafe(|| slot.and_then(|slot| self.fill(rows, slot))));
            if filled.send((part, read)).is_err() {
                return;
            }
        }
    }

    /// The slot with these rows in it.
    fn fill(&self, rows: &Range<usize>, mut slot: Slot) -> Result<Slot> {
        if let Some(sent) = slot.sent.take() {
            sent.wait()?;
        }
        let row = self.source.row_bytes();
        let into = &mut slot.memory.bytes_mut()[..rows.len() * row];
        self.source.read(rows.start as u64..rows.end as u64, into)?;
        if let Some(hash) = self.hash {
            hash.fetch_add(hash_rows(rows.start, row, into), Ordering::Relaxed);
        }
        Ok(slot)
    }
}

/// Slots that readers have filled, in whatever order.
pub(super) struct Arrivals<'p> {
    blocks: &'p [Range<usize>],
    parts: &'p [Part],
    row_bytes: usize,
    /// Gives readers back what has been sent.
    free: mpsc::Sender<Slot>,
    arrivals: mpsc::Receiver<(usize, Filled)>,
    early: Vec<Option<Filled>>,
    /// The part that is sent next.
    next: usize,
}

impl Arrivals<'_> {
    /// Begins to send the parts of a block that are left: all of them, as they arrive, or those that have.
    pub fn send(&mut self, lane: &mut dyn Lane, block: usize, all: bool) -> Result<()> {
        while let Some(part) = self.parts.get(self.next).filter(|part| part.block == block) {
            let at = (part.rows.start - self.blocks[block].start) * self.row_bytes;
            let Some(slot) = self.take(all) else { return Ok(()) };
            let mut slot = slot?;
            // SAFETY: whoever writes to the slot next waits before, and so does who drops it.
            slot.sent = Some(unsafe { lane.send(&slot.memory.bytes()[..part.rows.len() * self.row_bytes], at) }?);
            // Readers that have nothing left to read have gone.
            let _ = self.free.send(slot);
        }
        Ok(())
    }

    /// The slot of the next part, once it is there, or if it is.
    fn take(&mut self, wait: bool) -> Option<Result<Slot>> {
        while self.early[self.next].is_none() {
            let (at, filled) = match wait {
                true => self.arrivals.recv().expect("a reader says how each part went"),
                false => self.arrivals.try_recv().ok()?,
            };
            self.early[at] = Some(filled);
        }
        self.next += 1;
        let filled = self.early[self.next - 1].take()?;
        Some(filled.unwrap_or_else(|panic| resume_unwind(panic)))
    }
}
