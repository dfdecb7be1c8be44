//! A source as who feeds the loop: rows that stay on the device, and blocks of others that are read again in every pass.

use super::{
    plan::DevicePlan,
    progress::Reporter,
    reads::{read_rows, Reads},
    source::Source,
};
use crate::{
    error::Result,
    host,
    lloyd::{
        feed::{Block, Feed, Pass},
        merged::{row_pitch, BlockFeed, OwnedBlock, Terms, Whole},
        weights::Weights,
    },
    ranks::Ranks,
    request::Summands,
};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// The rows of a source that a rank has.
pub(super) struct Streamed<'a> {
    source: &'a Source<'a>,
    whole: Whole<'a>,
    ranks: &'a dyn Ranks,
    reads: Reads<'a>,
    reporter: Reporter,
    rows: Range<usize>,
    staying: Staying,
    away: Vec<Away>,
    terms: Option<Terms>,
    /// The row that no block has others before, beside its first ones.
    cut: Option<usize>,
}

/// The rows that stay on the device.
enum Staying {
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
struct Away {
    rows: Range<usize>,
    /// The first one that is not finite, and their labels, u32 `(1, n)`, once they have been there.
    known: Option<(Tensor, Tensor)>,
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
        let mut staying: Vec<_> = cut.ranges(rows.clone()).collect();
        let away = staying.split_off(cut.staying.min(staying.len()));
        let away = away.into_iter().map(|rows| Away { rows, known: None }).collect();
        let staying = if staying.is_empty() { Staying::Read(vec![]) } else { Staying::Unread(staying) };
        let reads = Reads::new(source, whole.device, cut.rows);
        Self { source, whole, ranks, reads, reporter, rows, staying, away, terms: None, cut: None }
    }
}

impl Streamed<'_> {
    /// Where a block has rows before this one and others, makes two of it. Nothing has been read.
    pub fn cut_at(&mut self, row: usize) {
        self.cut = Some(row);
        let inside = |rows: &Range<usize>| rows.start < row && row < rows.end;
        if let Staying::Unread(runs) = &mut self.staying {
            if let Some(i) = runs.iter().position(inside) {
                let end = runs[i].end;
                runs[i].end = row;
                runs.insert(i + 1, row..end);
            }
        }
        if let Some(i) = self.away.iter().position(|away| inside(&away.rows)) {
            let rows = row..self.away[i].rows.end;
            self.away[i].rows.end = row;
            self.away.insert(i + 1, Away { rows, known: None });
        }
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
    known: Option<&(Tensor, Tensor)>,
) -> Result<OwnedBlock> {
    let &Whole { settings, p, device, weights, .. } = whole;
    let known = terms.zip(known).map(|(terms, (first_nonfinite, labels))| {
        let summands: Summands = terms.summands(first_nonfinite.clone());
        (summands, labels.clone())
    });
    let mut block = OwnedBlock::new(settings, p, &x.unsqueeze(0)?, first, known)?;
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
        self.reporter.begin(pass);
    }

    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        let Self { whole, reads, reporter, staying, away, terms, cut, .. } = self;
        let (device, terms) = (whole.device, terms.as_ref());
        let unread = match staying {
            Staying::Unread(runs) => std::mem::take(runs),
            Staying::Read(_) => vec![],
        };
        let first = unread.first().map_or(0, |rows| rows.start);
        let room = match unread.last() {
            Some(last) => {
                let shape = (last.end - first, row_pitch(whole)?);
                Some(host::zeros("fit_stream", shape, whole.p.dtype, device)?)
            }
            None => None,
        };
        let runs: Vec<_> = unread.iter().chain(away.iter().map(|away| &away.rows)).cloned().collect();
        reads.for_each(&runs, &mut |read| {
            let Some((i, x)) = read else {
                return match staying {
                    Staying::Read(blocks) => blocks.iter().try_for_each(|block| {
                        visit(block.as_block(true))?;
                        reporter.add(block.x.n, false);
                        Ok(())
                    }),
                    Staying::Unread(_) => Ok(()),
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
            let known = &mut away[i - unread.len()].known;
            let block = load(whole, terms, &x, rows.start, known.as_ref())?;
            drop(x);
            visit(block.as_block(false))?;
            *known = Some((block.summands.first_nonfinite, block.labels));
            reporter.add(rows.len(), true);
            Ok(())
        })?;
        if let Some(room) = room {
            let room = room.narrow(1, 0, whole.p.d)?;
            // What a block takes beside its rows the CPU has room for as little as for that of any other.
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
            *staying = Staying::Read(starts.iter().zip(ends).map(block).collect::<Result<_>>()?);
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
        if let Staying::Read(blocks) = &mut self.staying {
            blocks.iter_mut().try_for_each(|block| block.complete(&terms))?;
        }
        self.terms = Some(terms);
        Ok(())
    }

    /// On the CPU, whatever the device.
    fn labels(&mut self) -> Result<Tensor> {
        // Their place may be in the memory of the ring.
        self.reads.clear();
        let mut all = host::filled("fit_stream", self.rows.len(), 0u32)?;
        let mut copy = |rows: Range<usize>, labels: &Tensor| {
            let (start, end) = (rows.start - self.rows.start, rows.end - self.rows.start);
            all[start..end].copy_from_slice(&labels.flatten_all()?.to_vec1()?);
            Ok::<_, candle_core::Error>(())
        };
        if let Staying::Read(blocks) = &self.staying {
            for block in blocks {
                let first = block.as_block(true).first;
                copy(first..first + block.labels.elem_count(), &block.labels)?;
            }
        }
        for Away { rows, known } in &self.away {
            let (_, labels) = known.as_ref().expect("a pass has been there");
            copy(rows.clone(), labels)?;
        }
        let n = all.len();
        Ok(Tensor::from_vec(all, (1, n), &Device::Cpu)?)
    }

    /// A pass costs more than the question.
    fn asks_every(&self) -> usize {
        1
    }
}
