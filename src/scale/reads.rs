//! Rows of a source on their way to a device, ahead of the work on them.

use super::{
    fingerprint::hash_rows,
    ring::{part_rows, parts_of, readers, Part, Ring},
    source::Source,
};
use crate::{
    error::{Error, Result},
    host, primitives,
    staging::Lane,
};
use candle_core::{Device, Tensor};
use std::{
    collections::VecDeque,
    ops::Range,
    panic::resume_unwind,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    thread,
};

/// Rows of a source on their way to a device.
pub(super) struct Reads<'a> {
    source: &'a Source<'a>,
    device: &'a Device,
    ring: Ring<'a>,
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

impl<'a> Reads<'a> {
    pub fn new(source: &'a Source<'a>, device: &'a Device, most: usize) -> Self {
        Self { source, device, ring: Ring::new(source, device, most), lane: None, hash: Hash::Unwanted }
    }

    /// Frees the ring, which the next pass has to make again.
    pub fn clear(&mut self) {
        self.ring.clear();
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
        let wanted = matches!(self.hash, Hash::Wanted);
        let hash = AtomicU64::default();
        if blocks.is_empty() {
            visit(None)?;
        } else if is_sent_in_place(self.source, self.device)? {
            self.for_each_in_place(blocks, wanted.then_some(&hash), visit)?;
        } else {
            let Self { source, device, ref mut ring, ref mut lane, .. } = *self;
            let lane = opened(lane, device)?;
            ring.pass(blocks, wanted.then_some(&hash), |arrivals| {
                in_turn(lane, source, blocks, &mut |lane, block, all| arrivals.send(lane, block, all), visit)
            })?;
        }
        if wanted {
            self.hash = Hash::Found(hash.into_inner());
        }
        Ok(())
    }

    /// Sends page-locked rows from where they lie.
    fn for_each_in_place(
        &mut self,
        blocks: &[Range<usize>],
        hash: Option<&AtomicU64>,
        visit: &mut dyn FnMut(Option<(usize, Tensor)>) -> Result<()>,
    ) -> Result<()> {
        let &mut Self { source, device, ref mut lane, .. } = self;
        let lane = opened(lane, device)?;
        // Only a hash is found in parts.
        let hashed = if hash.is_some() { blocks } else { &[] };
        let parts: Vec<_> = parts_of(hashed, part_rows(device, usize::MAX, source.row_bytes())).collect();
        let untaken = AtomicUsize::new(0);
        thread::scope(|scope| {
            if let Some(hash) = hash {
                for _ in 0..readers(device).min(parts.len()) {
                    scope.spawn(|| hash_in_place(source, &parts, &untaken, hash));
                }
            }
            // Copies that may be under way: those of a block that is worked on, and of the next one.
            let mut copies = VecDeque::new();
            let mut next = 0;
            let mut send = |lane: &mut dyn Lane, block: usize, _| {
                if block < next {
                    return Ok(());
                }
                let (mut at, mut sent) = (0, vec![]);
                for piece in in_memory(source, &blocks[block])? {
                    // SAFETY: the rows lie there as long as the source does, which outlives `copies`, and whoever drops those waits.
                    sent.push(unsafe { lane.send(piece, at) }?);
                    at += piece.len();
                }
                copies.push_back(sent);
                copies.drain(..copies.len().saturating_sub(2));
                next = block + 1;
                Ok(())
            };
            let done = in_turn(lane, source, blocks, &mut send, visit);
            if done.is_err() {
                // The hash is not asked for any more.
                untaken.store(parts.len(), Ordering::Relaxed);
            }
            done
        })
    }
}

/// The lane of a stream to its device.
fn opened<'l>(lane: &'l mut Option<Box<dyn Lane>>, device: &Device) -> Result<&'l mut dyn Lane> {
    Ok(match lane {
        Some(lane) => &mut **lane,
        lane => &mut **lane.insert(primitives::lane(device)?),
    })
}

/// Calls `visit` with nothing and then with each block, as [`Reads::for_each`] says. `send` begins to send what is left of a block: all of
/// it, or what there is.
fn in_turn(
    lane: &mut dyn Lane,
    source: &Source<'_>,
    blocks: &[Range<usize>],
    send: &mut dyn FnMut(&mut dyn Lane, usize, bool) -> Result<()>,
    visit: &mut dyn FnMut(Option<(usize, Tensor)>) -> Result<()>,
) -> Result<()> {
    let reserve =
        |lane: &mut dyn Lane, block: usize| lane.reserve((blocks[block].len(), source.shape().1), source.dtype());
    reserve(lane, 0)?;
    send(lane, 0, false)?;
    visit(None)?;
    for i in 0..blocks.len() {
        send(lane, i, true)?;
        let rows = lane.receive()?;
        // The next rows travel while these are worked on: their room is made before that work is queued, behind which it would have
        // to wait.
        if i + 1 < blocks.len() {
            reserve(lane, i + 1)?;
            send(lane, i + 1, false)?;
        }
        visit(Some((i, rows)))?;
    }
    Ok(())
}

/// Whether the rows of a source lie in page-locked memory as they are computed with.
pub(super) fn is_sent_in_place(source: &Source<'_>, device: &Device) -> Result<bool> {
    let Some(pieces) = source.in_memory(0..source.shape().0) else { return Ok(false) };
    for piece in pieces {
        if !primitives::is_page_locked(device, piece)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The pieces of memory that these rows lie in, of a source of which all do.
fn in_memory<'s>(source: &'s Source<'_>, rows: &Range<usize>) -> Result<Vec<&'s [u8]>> {
    // The caller's `AsRef` says where they lie, and may say something else each time.
    let moved =
        || Error::Conflict { argument: "data", got: "rows elsewhere".into(), with: "where they lay before".into() };
    source.in_memory(rows.start as u64..rows.end as u64).ok_or_else(moved)
}

/// Adds up the hash of the parts that nobody has taken. Rows that are gone are noticed by who sends them.
fn hash_in_place(source: &Source<'_>, parts: &[Part], untaken: &AtomicUsize, hash: &AtomicU64) {
    while let Some(Part { rows, .. }) = parts.get(untaken.fetch_add(1, Ordering::Relaxed)) {
        let mut first = rows.start;
        for piece in in_memory(source, rows).unwrap_or_default() {
            hash.fetch_add(hash_rows(first, source.row_bytes(), piece), Ordering::Relaxed);
            first += piece.len() / source.row_bytes();
        }
    }
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
        readers.into_iter().try_for_each(|reader| reader.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    host::room("read rows", rows.len() * d, source.dtype(), &Device::Cpu)?;
    Ok(Tensor::from_raw_buffer(&read, source.dtype(), &[rows.len(), d], &Device::Cpu)?)
}
