//! Rows are read ahead of those who work on them, by threads that wait for the disk.

use super::{fingerprint::hash_rows, source::Source};
use crate::{
    error::{Error, Result},
    host, primitives,
    staging::{Buffer, Lane, Sent},
};
use candle_core::{Device, Tensor};
use std::{
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
fn readers(device: &Device) -> usize {
    if device.is_cpu() {
        return 4;
    }
    thread::available_parallelism().map_or(4, usize::from).clamp(4, 16)
}

/// Buffers in the ring: one for each reader, and some that are on their way or waited for.
fn slots(device: &Device) -> usize {
    readers(device) + if device.is_cpu() { 2 } else { 8 }
}

/// Bytes that are sent to a GPU at a time. Page-locking memory takes longer than filling it, so that there should not be more than is
/// needed to keep the link at work.
const PART_BYTES: usize = 8 << 20;

/// Rows of a part, of blocks of so many: all on the CPU, where a buffer becomes a block.
fn part_rows(device: &Device, block: usize, row_bytes: usize) -> usize {
    if device.is_cpu() {
        return block;
    }
    (PART_BYTES / row_bytes).clamp(1, block)
}

/// Bytes of the ring that so many blocks of so many rows go through.
pub(super) fn ring_bytes(device: &Device, blocks: usize, rows: usize, row_bytes: usize) -> usize {
    let part = part_rows(device, rows, row_bytes);
    slots(device).min(blocks * rows.div_ceil(part)) * part * row_bytes
}

/// Blocks of rows that `device` has room for beside those that stay there: the one that is worked on and the next one. The memory of
/// the CPU has the ring, too.
pub(super) fn moving(device: &Device) -> usize {
    if device.is_cpu() {
        slots(device) + 2
    } else {
        2
    }
}

/// Rows of a source on their way to a device.
pub(super) struct Reads<'a> {
    source: &'a Source<'a>,
    device: &'a Device,
    /// The most rows of a block.
    most: usize,
    /// The ring, between passes.
    slots: Vec<Slot>,
    lane: Option<Box<dyn Lane>>,
    hash: Hash,
}

/// The [hash](hash_rows) of the rows of a pass, which readers add up while the rows are in their caches.
enum Hash {
    Unwanted,
    /// The hash of the next pass is wanted.
    Wanted,
    Found(u64),
}

/// A buffer of the ring.
struct Slot {
    /// The copy that is under way from it: dropped before its memory is.
    sent: Option<Box<dyn Sent>>,
    memory: Box<dyn Buffer>,
}

/// A part of a block: as many rows as are read at a time.
struct Part {
    block: usize,
    rows: Range<usize>,
}

/// A slot with the rows of a part, or why there are none.
type Filled = thread::Result<Result<Slot>>;

/// Slots that are free, and the parts that nobody has taken.
type Untaken = (mpsc::Receiver<Slot>, Range<usize>);

impl<'a> Reads<'a> {
    pub fn new(source: &'a Source<'a>, device: &'a Device, most: usize) -> Self {
        Self { source, device, most, slots: vec![], lane: None, hash: Hash::Unwanted }
    }

    /// Frees the ring, which the next pass has to make again.
    pub fn clear(&mut self) {
        self.slots.clear();
    }

    /// Asks for the hash of the rows of the next pass.
    pub fn want_hash(&mut self) {
        self.hash = Hash::Wanted;
    }

    /// The hash of the rows of the pass that it was asked for of.
    pub fn hash(&self) -> Option<u64> {
        match self.hash {
            Hash::Found(hash) => Some(hash),
            Hash::Unwanted | Hash::Wanted => None,
        }
    }

    /// Calls `visit` with nothing, while the first rows are being read, and then with the number of each block and its rows,
    /// `(n, d)` on the device, in order.
    pub fn for_each(
        &mut self,
        blocks: &[Range<usize>],
        visit: &mut dyn FnMut(Option<(usize, Tensor)>) -> Result<()>,
    ) -> Result<()> {
        let &mut Self { source, device, most, .. } = self;
        if blocks.is_empty() {
            if matches!(self.hash, Hash::Wanted) {
                self.hash = Hash::Found(0);
            }
            return visit(None);
        }
        let row = source.row_bytes();
        let lane = match &mut self.lane {
            Some(lane) => lane,
            lane => lane.insert(primitives::lane(device)?),
        };
        let step = part_rows(device, most, row);
        let parts = |(block, rows): (usize, &Range<usize>)| {
            let end = rows.end;
            rows.clone().step_by(step).map(move |first| Part { block, rows: first..end.min(first + step) })
        };
        let parts: Vec<_> = blocks.iter().enumerate().flat_map(parts).collect();
        for _ in self.slots.len()..slots(device).min(parts.len()) {
            self.slots.push(Slot { sent: None, memory: lane.buffer(step * row)? });
        }
        let (free, taken) = mpsc::channel();
        self.slots.drain(..).for_each(|slot| free.send(slot).expect("the receiver is there"));
        let taken = Mutex::new((taken, 0..parts.len()));
        let hash = matches!(self.hash, Hash::Wanted).then(AtomicU64::default);
        let (filled, arrivals) = mpsc::channel();
        thread::scope(|scope| {
            // However this ends, readers wait no longer than these are there.
            let (free, arrivals) = (free, arrivals);
            for _ in 0..readers(device).min(parts.len()) {
                let (taken, filled, parts, hash) = (&taken, filled.clone(), &parts, hash.as_ref());
                scope.spawn(move || read_ahead(source, parts, taken, hash, &filled));
            }
            drop(filled);
            let early = parts.iter().map(|_| None).collect();
            let mut arrived = Arrived { arrivals, early, next: 0 };
            // Sends the parts of a block, those that have been read or all of them.
            let mut send = |lane: &mut dyn Lane, block: usize, all: bool| {
                while parts.get(arrived.next).is_some_and(|part| part.block == block) {
                    let first = parts[arrived.next].rows.start - blocks[block].start;
                    let bytes = parts[arrived.next].rows.len() * row;
                    let Some(slot) = arrived.take(all) else { return Ok(()) };
                    let mut slot = slot?;
                    // SAFETY: whoever writes to the slot next waits before, and so does who drops it.
                    slot.sent = Some(unsafe { lane.send(&slot.memory.bytes()[..bytes], first * row) }?);
                    // Readers that have nothing left to read have gone.
                    let _ = free.send(slot);
                }
                Ok::<_, Error>(())
            };
            let reserve = |lane: &mut dyn Lane, block: usize| {
                lane.reserve((blocks[block].len(), source.shape().1), source.dtype())
            };
            reserve(&mut **lane, 0)?;
            send(&mut **lane, 0, false)?;
            visit(None)?;
            for i in 0..blocks.len() {
                send(&mut **lane, i, true)?;
                let rows = lane.receive()?;
                // The next rows travel while these are worked on: their room is made before that work is queued, behind which it would
                // have to wait.
                if i + 1 < blocks.len() {
                    reserve(&mut **lane, i + 1)?;
                    send(&mut **lane, i + 1, false)?;
                }
                visit(Some((i, rows)))?;
            }
            Ok::<_, Error>(())
        })?;
        let (taken, _) = taken.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.slots.extend(taken.try_iter());
        if let Some(hash) = hash {
            self.hash = Hash::Found(hash.into_inner());
        }
        Ok(())
    }
}

/// Reads parts into free slots until there are no more of either. Whoever takes a slot takes the next part with it, so that the one
/// that is waited for never lacks one.
fn read_ahead(
    source: &Source<'_>,
    parts: &[Part],
    taken: &Mutex<Untaken>,
    hash: Option<&AtomicU64>,
    filled: &mpsc::Sender<(usize, Filled)>,
) {
    loop {
        let (i, mut slot) = {
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(i) = taken.1.next() else { return };
            let Ok(slot) = taken.0.recv() else { return };
            (i, slot)
        };
        let rows = &parts[i].rows;
        let read = catch_unwind(AssertUnwindSafe(|| {
            if let Some(sent) = slot.sent.take() {
                sent.wait()?;
            }
            let into = &mut slot.memory.bytes()[..rows.len() * source.row_bytes()];
            source.read(rows.start as u64..rows.end as u64, into)?;
            if let Some(hash) = hash {
                hash.fetch_add(hash_rows(rows.start, source.row_bytes(), into), Ordering::Relaxed);
            }
            Ok(slot)
        }));
        if filled.send((i, read)).is_err() {
            return;
        }
    }
}

/// Slots that readers have sent, in whatever order.
struct Arrived {
    arrivals: mpsc::Receiver<(usize, Filled)>,
    early: Vec<Option<Filled>>,
    /// The part that is taken next.
    next: usize,
}

impl Arrived {
    /// The rows of the next part, once they are there, or if they are.
    fn take(&mut self, wait: bool) -> Option<Result<Slot>> {
        while self.early[self.next].is_none() {
            let (at, filled) = match wait {
                true => self.arrivals.recv().expect("a reader says how each part went"),
                false => self.arrivals.try_recv().ok()?,
            };
            self.early[at] = Some(filled);
        }
        self.next += 1;
        self.early[self.next - 1].take().map(or_panic)
    }
}

fn or_panic<T>(result: thread::Result<T>) -> T {
    result.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Rows here and there, in order and none twice, `(rows, d)` on the CPU.
pub(super) fn read_rows(source: &Source<'_>, rows: &[usize]) -> Result<Tensor> {
    let (bytes, d) = (source.row_bytes(), source.shape().1);
    let mut read = host::filled("read rows", rows.len() * bytes, 0u8)?;
    // Of neighbours the rows are read at once.
    let read_some = |rows: &[usize], mut into: &mut [u8]| {
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let (first, rest) = into.split_at_mut(run.len() * bytes);
            source.read(run[0] as u64..run[run.len() - 1] as u64 + 1, first)?;
            into = rest;
        }
        Ok::<_, Error>(())
    };
    let each = rows.len().div_ceil(readers(&Device::Cpu)).max(1);
    thread::scope(|scope| {
        let parts = rows.chunks(each).zip(read.chunks_mut(each * bytes));
        let readers: Vec<_> = parts.map(|(rows, into)| scope.spawn(move || read_some(rows, into))).collect();
        readers.into_iter().try_for_each(|reader| or_panic(reader.join()))
    })?;
    host::room("read rows", rows.len() * d, source.dtype(), &Device::Cpu)?;
    Ok(Tensor::from_raw_buffer(&read, source.dtype(), &[rows.len(), d], &Device::Cpu)?)
}
