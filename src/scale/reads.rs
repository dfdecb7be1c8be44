//! Rows are read ahead of those who work on them, by threads that wait for the disk.

use super::source::Source;
use crate::{
    error::{Error, Result},
    host, primitives,
    staging::Staging,
};
use candle_core::{Device, Tensor};
use std::{
    ops::Range,
    panic::{catch_unwind, resume_unwind, AssertUnwindSafe},
    sync::{mpsc, Mutex, PoisonError},
    thread,
};

/// Threads that read at once: as many requests as keep a solid-state disk, or memory that caches it, at work. The link to a GPU takes
/// what twice as many of them copy from memory.
fn readers(device: &Device) -> usize {
    if device.is_cpu() {
        4
    } else {
        8
    }
}

/// Buffers in the ring: one for each reader, one that is on its way to the device and one that is waited for.
fn slots(device: &Device) -> usize {
    readers(device) + 2
}

/// Buffers that so many blocks of rows need of the ring.
pub(super) fn ring_slots(device: &Device, blocks: usize) -> usize {
    slots(device).min(blocks)
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
    /// The most rows that are read at a time.
    most: usize,
    /// The ring, between passes.
    slots: Vec<Slot>,
}

type Slot = Box<dyn Staging>;

/// A slot with the rows of a range, or why there are none.
type Filled = thread::Result<Result<Slot>>;

/// Slots that are free, and the ranges that nobody has taken.
type Untaken = (mpsc::Receiver<Slot>, Range<usize>);

impl<'a> Reads<'a> {
    pub fn new(source: &'a Source<'a>, device: &'a Device, most: usize) -> Self {
        Self { source, device, most, slots: vec![] }
    }

    /// Calls `visit` with nothing, while the first rows are being read, and then with the number of each range and its rows,
    /// `(n, d)` on the device, in order.
    pub fn for_each(
        &mut self,
        ranges: &[Range<usize>],
        visit: &mut dyn FnMut(Option<(usize, Tensor)>) -> Result<()>,
    ) -> Result<()> {
        let &mut Self { source, device, most, .. } = self;
        let lacking = ring_slots(device, ranges.len()).saturating_sub(self.slots.len());
        if lacking > 0 {
            self.slots.extend(primitives::staging(device, lacking, most * source.row_bytes())?);
        }
        let (free, taken) = mpsc::channel();
        self.slots.drain(..).for_each(|slot| free.send(slot).expect("the receiver is there"));
        let taken = Mutex::new((taken, 0..ranges.len()));
        let (filled, arrivals) = mpsc::channel();
        thread::scope(|scope| {
            // However this ends, readers wait no longer than these are there.
            let (free, arrivals) = (free, arrivals);
            for _ in 0..readers(device).min(ranges.len()) {
                let (taken, filled) = (&taken, filled.clone());
                scope.spawn(move || read_ahead(source, ranges, taken, &filled));
            }
            drop(filled);
            visit(None)?;
            let mut arrived = Arrived { arrivals, early: ranges.iter().map(|_| None).collect() };
            let send = |i: usize, mut slot: Slot| {
                slot.send((ranges[i].len(), source.shape().1), source.dtype())?;
                Ok(slot)
            };
            let mut sent = None;
            for i in 0..ranges.len() {
                let mut slot = sent.take().unwrap_or_else(|| arrived.wait(i).and_then(|slot| send(i, slot)))?;
                // The next rows travel while these are worked on, if they have been read.
                if i + 1 < ranges.len() {
                    sent = arrived.look(i + 1).map(|slot| slot.and_then(|slot| send(i + 1, slot)));
                }
                let rows = slot.receive()?;
                // Readers that have nothing left to read have gone.
                let _ = free.send(slot);
                visit(Some((i, rows)))?;
            }
            Ok::<_, Error>(())
        })?;
        let (taken, _) = taken.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.slots.extend(taken.try_iter());
        Ok(())
    }
}

/// Reads ranges into free slots until there are no more of either. Whoever takes a slot takes the next range with it, so that the one
/// that is waited for never lacks one.
fn read_ahead(
    source: &Source<'_>,
    ranges: &[Range<usize>],
    taken: &Mutex<Untaken>,
    filled: &mpsc::Sender<(usize, Filled)>,
) {
    loop {
        let (i, mut slot) = {
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(i) = taken.1.next() else { return };
            let Ok(slot) = taken.0.recv() else { return };
            (i, slot)
        };
        let rows = &ranges[i];
        let read = catch_unwind(AssertUnwindSafe(|| {
            let into = slot.bytes(rows.len() * source.row_bytes())?;
            source.read(rows.start as u64..rows.end as u64, into)?;
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
}

impl Arrived {
    /// The rows of range `i`, if they are there.
    fn look(&mut self, i: usize) -> Option<Result<Slot>> {
        while let Ok((at, filled)) = self.arrivals.try_recv() {
            self.early[at] = Some(filled);
        }
        self.early[i].take().map(or_panic)
    }

    /// The rows of range `i`, once they are there.
    fn wait(&mut self, i: usize) -> Result<Slot> {
        while self.early[i].is_none() {
            let (at, filled) = self.arrivals.recv().expect("a reader says how each range went");
            self.early[at] = Some(filled);
        }
        self.early[i].take().map_or_else(|| unreachable!("it has arrived"), or_panic)
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
