//! A source as who feeds the loop: blocks that stay on the device, and blocks that are read again in every pass.

use super::{
    options::Cut,
    reads::{read_rows, Reads},
    source::Source,
};
use crate::{
    error::Result,
    host,
    lloyd::{
        feed::{Block, Feed},
        merged::{BlockFeed, OwnedBlock, Terms, Whole},
        weights::Weights,
    },
};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// The rows of a source.
pub(super) struct Streamed<'a> {
    source: &'a Source<'a>,
    whole: Whole<'a>,
    reads: Reads<'a>,
    parts: Vec<Part>,
    terms: Option<Terms>,
    /// The labels of all rows, but for those of parts that stay on the device; empty before the first pass.
    labels: Vec<u32>,
}

/// The rows of a block.
struct Part {
    rows: Range<usize>,
    stays: bool,
    /// The block, once it stays.
    held: Option<OwnedBlock>,
    /// Its first row that is not finite, once it has been there.
    first_nonfinite: Option<Tensor>,
}

impl<'a> Streamed<'a> {
    /// The weights of `whole` are on the CPU.
    pub fn new(source: &'a Source<'a>, whole: Whole<'a>, cut: &Cut) -> Self {
        let rows = cut.ranges(whole.p.n).enumerate();
        let parts = rows.map(|(i, rows)| Part { rows, stays: i < cut.staying, held: None, first_nonfinite: None });
        let (parts, reads) = (parts.collect(), Reads::new(source, whole.device, cut.rows));
        Self { source, whole, reads, parts, terms: None, labels: vec![] }
    }

    /// Where a block has rows before this one and others, makes two of it.
    pub fn cut_at(&mut self, row: usize) {
        if let Some(i) = self.parts.iter().position(|part| part.rows.start < row && row < part.rows.end) {
            let rows = row..self.parts[i].rows.end;
            self.parts[i].rows.end = row;
            let stays = self.parts[i].stays;
            self.parts.insert(i + 1, Part { rows, stays, held: None, first_nonfinite: None });
        }
    }

    /// Asks for the hash of all rows, which the first pass finds.
    pub fn want_hash(&mut self) {
        self.reads.want_hash();
    }

    /// The hash of all rows, after the first pass.
    pub fn hash(&self) -> Option<u64> {
        self.reads.hash()
    }
}

impl Part {
    /// Its rows `x`, `(n, d)`, as a block.
    fn load(&self, x: &Tensor, whole: &Whole<'_>, terms: Option<&Terms>, labels: &[u32]) -> Result<OwnedBlock> {
        let Whole { settings, p, device, weights, .. } = whole;
        let known = terms.zip(self.first_nonfinite.as_ref());
        let summands = known.map(|(terms, first_nonfinite)| terms.summands(first_nonfinite.clone()));
        let mut held = OwnedBlock::new(settings, p, &x.unsqueeze(0)?, self.rows.start, summands)?;
        if let Some(Weights { values, .. }) = weights {
            let weights = values.narrow(1, self.rows.start, self.rows.len())?.force_contiguous()?.to_device(device)?;
            held = held.with_factors(Some(weights), None);
        }
        if let Some(terms) = terms {
            held.complete(terms)?;
        }
        held.labels.slice_set(&Tensor::from_slice(labels, (1, labels.len()), device)?, 1, 0)?;
        Ok(held)
    }
}

impl Feed for Streamed<'_> {
    fn for_each_block(&mut self, visit: &mut dyn FnMut(Block<'_>) -> Result<()>) -> Result<()> {
        let Self { whole, reads, parts, terms, labels, .. } = self;
        if labels.is_empty() {
            *labels = host::filled("fit_stream", whole.p.n, 0)?;
        }
        let away: Vec<_> = (0..parts.len()).filter(|&i| parts[i].held.is_none()).collect();
        let ranges: Vec<_> = away.iter().map(|&i| parts[i].rows.clone()).collect();
        reads.for_each(&ranges, &mut |read| {
            let Some((i, x)) = read else {
                return parts
                    .iter()
                    .filter_map(|part| part.held.as_ref())
                    .try_for_each(|held| visit(held.as_block(true)));
            };
            let part = &mut parts[away[i]];
            let labels = &mut labels[part.rows.clone()];
            let held = part.load(&x, whole, terms.as_ref(), labels)?;
            drop(x);
            visit(held.as_block(part.stays))?;
            labels.copy_from_slice(&held.labels.flatten_all()?.to_vec1()?);
            part.first_nonfinite.get_or_insert_with(|| held.summands.first_nonfinite.clone());
            if part.stays {
                part.held = Some(held);
            }
            Ok(())
        })
    }

    fn first_row(&mut self) -> Result<Tensor> {
        Ok(read_rows(self.source, &[0])?.unsqueeze(0)?.to_device(self.whole.device)?)
    }
}

impl BlockFeed for Streamed<'_> {
    fn set_terms(&mut self, terms: Terms) -> Result<()> {
        self.parts.iter_mut().filter_map(|part| part.held.as_mut()).try_for_each(|held| held.complete(&terms))?;
        self.terms = Some(terms);
        Ok(())
    }

    /// On the CPU, whatever the device.
    fn labels(&mut self) -> Result<Tensor> {
        let mut labels = std::mem::take(&mut self.labels);
        for part in &self.parts {
            if let Some(held) = &part.held {
                labels[part.rows.clone()].copy_from_slice(&held.labels.flatten_all()?.to_vec1()?);
            }
        }
        let n = labels.len();
        Ok(Tensor::from_vec(labels, (1, n), &Device::Cpu)?)
    }

    /// A pass costs more than the question.
    fn asks_every(&self) -> usize {
        1
    }
}
