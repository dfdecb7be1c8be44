//! A source as who feeds the loop: rows that stay on the device, and blocks of others that are read again in every pass.

use super::{
    label_file::LabelFile,
    plan::DevicePlan,
    progress::Reporter,
    reads::{read_rows, Reads},
    source::Source,
};
use crate::{
    error::{Error, Result},
    host,
    kmeans::EmptyClusters,
    lloyd::{
        feed::{Block, Feed, Pass},
        merged::{row_pitch, BlockFeed, OwnedBlock, Terms, Whole},
        weights::Weights,
    },
    primitives, problem,
    ranks::Ranks,
    request::Summands,
};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// The rows of a source that a rank has.
pub(super) struct Streamed<'a> {
    source: &'a Source<'a>,
    whole: Whole<'a>,
    ranks: &'a dyn Ranks,
    reads: Reads<'a>,
    reporter: Reporter,
    rows: Range<usize>,
    resident: Resident,
    moving: Vec<Moving>,
    terms: Option<Terms>,
    /// The row at which a block begins, wherever others do.
    cut: Option<usize>,
    labels_to: LabelsTo<'a>,
    /// Whether this pass gives rows their labels for good.
    is_last: bool,
}

/// The destination of the labels of a run's last pass.
#[derive(Clone, Copy)]
pub(super) enum LabelsTo<'a> {
    /// To memory, in which they are from pass to pass.
    Memory,
    File(&'a LabelFile<'a>),
    Nowhere,
}

/// The rows that stay on the device.
enum Resident {
    /// None has been read. They will be, in such runs.
    Unread(Vec<Range<usize>>),
    /// They have been, if there are any, and lie in as few blocks as can be.
    Read(Vec<OwnedBlock>),
}

/// Products of elements of rows and centroids that a launch may have to make. Any number of rows would do, but what else wants to run
/// on the device, such as a sign of life to other ranks, waits for a launch: 2^46 of them take a fifth of a second on an H100 by
/// tensor cores, and several seconds in f64.
const PRODUCTS: usize = 1 << 46;

/// A multiple of the rows of any tile.
const WHOLE_TILES: usize = 1 << 10;

/// A block of rows that are read in every pass, and what stays on the device of them.
struct Moving {
    rows: Range<usize>,
    /// The first one that is not finite, once they have been there, and their labels, u32 `(1, n)`, if those are kept.
    known: Option<(Tensor, Option<Tensor>)>,
}

impl<'a> Streamed<'a> {
    /// The rows of this rank, cut as planned. The weights of `whole` are on the CPU.
    pub fn new(
        source: &'a Source<'a>,
        whole: Whole<'a>,
        ranks: &'a dyn Ranks,
        DevicePlan { rows, cut, .. }: &DevicePlan,
        reporter: Reporter,
    ) -> Self {
        let rows = rows.start as usize..rows.end as usize;
        let mut resident_runs: Vec<_> = cut.ranges(rows.clone()).collect();
        let moving_runs = resident_runs.split_off(cut.staying.min(resident_runs.len()));
        let moving = moving_runs.into_iter().map(|rows| Moving { rows, known: None }).collect();
        let resident = match resident_runs.is_empty() {
            true => Resident::Read(vec![]),
            false => Resident::Unread(resident_runs),
        };
        let reads = Reads::new(source, whole.device, cut.rows);
        Self {
            source,
            whole,
            ranks,
            reads,
            reporter,
            rows,
            resident,
            moving,
            terms: None,
            cut: None,
            labels_to: LabelsTo::Memory,
            is_last: false,
        }
    }
}

impl<'a> Streamed<'a> {
    /// Makes two blocks of the one that has rows before this one and others, if there is one. Nothing has been read.
    pub fn cut_at(&mut self, row: usize) {
        self.cut = Some(row);
        let inside = |rows: &Range<usize>| rows.start < row && row < rows.end;
        if let Resident::Unread(runs) = &mut self.resident {
            if let Some(i) = runs.iter().position(inside) {
                let end = runs[i].end;
                runs[i].end = row;
                runs.insert(i + 1, row..end);
            }
        }
        if let Some(i) = self.moving.iter().position(|block| inside(&block.rows)) {
            let rows = row..self.moving[i].rows.end;
            self.moving[i].rows.end = row;
            self.moving.insert(i + 1, Moving { rows, known: None });
        }
    }

    /// Sets where labels go from the next pass on.
    pub fn set_labels_to(&mut self, to: LabelsTo<'a>) {
        self.labels_to = to;
    }

    /// Asks for the hash of this rank's rows, which the first pass finds.
    pub fn want_hash(&mut self) {
        self.reads.want_hash();
    }

    /// The hash of this rank's rows, after the first pass.
    pub fn hash(&self) -> Option<u64> {
        self.reads.hash()
    }
}

/// The rows `x`, `(n, d)`, as a block of which is known what it was found to be before.
fn load(
    whole: &Whole<'_>,
    terms: Option<&Terms>,
    x: &Tensor,
    first: usize,
    known: Option<&(Tensor, Option<Tensor>)>,
) -> Result<OwnedBlock> {
    let &Whole { settings, p, device, weights, .. } = whole;
    let known = terms.zip(known).map(|(terms, (first_nonfinite, labels))| {
        let summands: Summands = terms.summands(first_nonfinite.clone());
        let zeros = || host::zeros("fit", (1, x.dim(0)?), DType::U32, device);
        Ok::<_, Error>((summands, labels.clone().map_or_else(zeros, Ok)?))
    });
    let mut block = OwnedBlock::new(settings, p, &x.unsqueeze(0)?, first, known.transpose()?)?;
    if let Some(Weights { values, .. }) = weights {
        let weights = values.narrow(1, first, x.dim(0)?)?.force_contiguous()?.to_device(device)?;
        block = block.with_factors(Some(weights), None);
    }
    if let Some(terms) = terms {
        block.complete(terms)?;
    }
    Ok(block)
}

impl Feed for Streamed<'_> {
    fn begin_pass(&mut self, pass: Pass) {
        self.is_last = matches!(pass, Pass::Labels { .. });
        self.reporter.begin(pass);
    }

    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        let Self { whole, reads, reporter, resident, moving, terms, cut, labels_to, is_last, .. } = self;
        let (device, terms, labels_to, is_last) = (whole.device, terms.as_ref(), *labels_to, *is_last);
        let write = |first: usize, labels: &Tensor| match labels_to {
            LabelsTo::File(file) if is_last => file.write(first as u64, &labels.flatten_all()?.to_vec1()?),
            _ => Ok(()),
        };
        let keeps_labels = matches!(labels_to, LabelsTo::Memory) || whole.settings.empty == EmptyClusters::Relocate;
        let unread = match resident {
            Resident::Unread(runs) => std::mem::take(runs),
            Resident::Read(_) => vec![],
        };
        let first = unread.first().map_or(0, |rows| rows.start);
        let mut room = None;
        let runs: Vec<_> = unread.iter().chain(moving.iter().map(|block| &block.rows)).cloned().collect();
        reads.for_each(&runs, &mut |read| {
            let Some((i, x)) = read else {
                // To map memory takes a while, in which the first rows are on their way.
                if let Some(last) = unread.last() {
                    let shape = (last.end - first, row_pitch(whole)?);
                    room = Some(host::zeros("fit_stream", shape, whole.p.dtype, device)?);
                }
                return match resident {
                    Resident::Read(blocks) => blocks.iter().try_for_each(|block| {
                        visit(block.as_block(true))?;
                        write(block.as_block(true).first, &block.labels)?;
                        reporter.add(block.x.n, false);
                        Ok(())
                    }),
                    Resident::Unread(_) => Ok(()),
                };
            };
            let rows = &runs[i];
            if let (Some(room), true) = (&room, i < unread.len()) {
                room.slice_set(&x.pad_with_zeros(1, 0, room.dim(1)? - whole.p.d)?, 0, rows.start - first)?;
                drop(x);
                let x = room.narrow(0, rows.start - first, rows.len())?.narrow(1, 0, whole.p.d)?;
                visit(load(whole, terms, &x, rows.start, None)?.as_block(false))?;
                reporter.add(rows.len(), true);
                return Ok(());
            }
            let known = &mut moving[i - unread.len()].known;
            let block = load(whole, terms, &x, rows.start, known.as_ref())?;
            drop(x);
            visit(block.as_block(false))?;
            write(rows.start, &block.labels)?;
            *known = Some((block.summands.first_nonfinite, keeps_labels.then_some(block.labels)));
            reporter.add(rows.len(), true);
            Ok(())
        })?;
        if let Some(room) = room {
            let room = room.narrow(1, 0, whole.p.d)?;
            // On the CPU a block has no more room beside its rows than one that moves.
            let step = match device.is_cpu() {
                true => unread.iter().map(ExactSizeIterator::len).max().unwrap_or(1),
                false => (PRODUCTS / whole.p.k / whole.p.d).max(1).next_multiple_of(WHOLE_TILES),
            };
            let mut starts: Vec<_> = (0..room.dim(0)?).step_by(step).collect();
            starts.extend(cut.and_then(|row| row.checked_sub(first)).filter(|&at| at < room.dim(0).unwrap_or(0)));
            starts.sort_unstable();
            starts.dedup();
            let ends = starts.iter().skip(1).copied().chain([room.dim(0)?]);
            let block =
                |(&at, end): (&usize, usize)| load(whole, terms, &room.narrow(0, at, end - at)?, first + at, None);
            *resident = Resident::Read(starts.iter().zip(ends).map(block).collect::<Result<_>>()?);
        }
        Ok(())
    }

    fn ranks(&self) -> &dyn Ranks {
        self.ranks
    }

    fn first_row(&mut self) -> Result<Option<Tensor>> {
        if self.rows.is_empty() {
            return Ok(None);
        }
        let row = read_rows(self.source, &[self.rows.start])?;
        Ok(Some(row.unsqueeze(0)?.to_device(self.whole.device)?))
    }
}

impl BlockFeed for Streamed<'_> {
    fn set_terms(&mut self, terms: Terms) -> Result<()> {
        if let Resident::Read(blocks) = &mut self.resident {
            blocks.iter_mut().try_for_each(|block| block.complete(&terms))?;
        }
        self.terms = Some(terms);
        Ok(())
    }

    /// On the CPU, whatever the device; those of no rows where they are not in memory.
    fn labels(&mut self) -> Result<Tensor> {
        if !matches!(self.labels_to, LabelsTo::Memory) {
            return problem::empty(&[1, 0], DType::U32, &Device::Cpu);
        }
        // The labels have the room that the ring had.
        self.reads.clear();
        let resident = match &self.resident {
            Resident::Read(blocks) => &blocks[..],
            Resident::Unread(_) => &[],
        };
        let resident = resident.iter().map(|block| &block.labels);
        let known = self.moving.iter().map(|block| block.known.as_ref().and_then(|(_, labels)| labels.as_ref()));
        let moving = known.map(|labels| labels.expect("a pass has been there"));
        // Zeros by all threads: there may be gigabytes of labels, and to make their pages takes one thread longer than to copy them.
        let mut all = host::map("fit_stream", self.rows.len(), 1, |_| 0u32)?;
        let mut room = &mut all[..];
        for labels in resident.chain(moving) {
            let (own, rest) = room.split_at_mut(labels.elem_count());
            primitives::read_labels(labels, own)?;
            room = rest;
        }
        let n = all.len();
        Ok(Tensor::from_vec(all, (1, n), &Device::Cpu)?)
    }

    /// A pass costs more than the question.
    fn asks_every(&self) -> usize {
        1
    }
}
