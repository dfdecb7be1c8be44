//! A counting sort of labels: `kernels/sort.cu`.

use super::{
    device::{arch, device},
    kernel::{launch, WARP},
    memory::{alloc, elements, Arena, ArenaLayout, Memory, Slot},
    params::{Active, Digit},
    tensors::{read, tensor, write, Part},
};
use crate::{
    error::Result,
    plan::{
        arch::shared_memory,
        sort::{Sort, SortWay},
    },
    tiles::{SCAN_THREADS, SORT_ITEMS, SORT_ITEMS_MANY, SORT_THREADS, THREADS},
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{DevicePtr, PushKernelArg},
        CudaDevice,
    },
    Tensor,
};

/// A sort of `b` problems of `n` labels below `k`: its plan, and where its scratch lies.
pub(super) struct Sorting {
    plan: Sort,
    b: usize,
    n: usize,
    k: usize,
    counts: Slot<u32>,
    totals: Slot<u32>,
    begins: Slot<u32>,
    /// An order by some digits only.
    other: Slot<u32>,
}

impl Sorting {
    pub(super) fn new(
        dev: &CudaDevice,
        [b, n, k]: [usize; 3],
        ascending: bool,
        scratch: &mut ArenaLayout,
    ) -> Result<Self> {
        let shared = shared_memory(arch(dev)?).unwrap_or_default();
        let plan = Sort::new([b, n, k], ascending, shared);
        let (whole, several) = (plan.way == SortWay::Whole, plan.passes > 1);
        Ok(Self {
            plan,
            b,
            n,
            k,
            counts: scratch.unwritten(if whole { 0 } else { elements(&[b, plan.chunks, plan.bins]) }),
            totals: scratch.unwritten(if whole { 0 } else { elements(&[b, plan.bins]) }),
            begins: scratch.unwritten(if several { elements(&[b, plan.bins + 1]) } else { 0 }),
            other: scratch.unwritten(if several { elements(&[b, n]) } else { 0 }),
        })
    }

    /// Writes `order` (b, n) and `offsets` (b, k + 1). `arrived` (b) is zeros, `next` a count to clear on the way.
    pub(super) fn run(
        &self,
        dev: &CudaDevice,
        scratch: &Arena<'_>,
        labels: Part<u32>,
        active: Active,
        [arrived, next, order, offsets]: [Part<u32>; 4],
    ) -> Result<()> {
        let &Self { plan: Sort { way, passes, bits, bins, threads, rows, chunks }, b, n, k, .. } = self;
        let (counts, totals) = (scratch.part(self.counts), scratch.part(self.totals));
        let (b64, rows64, chunks64) = (b as i64, rows as i64, chunks as i64);
        let mut before = Part::NULL;
        if way == SortWay::Whole {
            let (n, k) = (n as i64, k as i64);
            let digit = Digit { labels, before, n, k, bins: k, shift: 0, mask: u32::MAX };
            return launch!(dev, Sort, "order_whole", "", b, threads, 4 * (bins + 1 + self.n);
                &digit, &active, &b64, &next, &offsets, &order);
        }
        for pass in 0..passes {
            let last = pass + 1 == passes;
            let shift = pass as u32 * bits;
            let bins = if last { ((k - 1) >> shift) + 1 } else { 1 << bits };
            let mask = if last { u32::MAX } else { (1 << bits) - 1 };
            let begins = if passes == 1 { offsets } else { scratch.part(self.begins) };
            let out = if (passes - pass) % 2 == 1 { order } else { scratch.part(self.other) };
            let digit = Digit { labels, before, n: n as i64, k: k as i64, bins: bins as i64, shift, mask };
            let next = if pass == 0 { next } else { Part::NULL };
            launch!(dev, Sort, "order_count", "", elements(&[b, chunks]), SORT_THREADS, 4 * (bins + 1);
                &digit, &active, &b64, &rows64, &counts, &next)?;
            let scans = (WARP * chunks).next_power_of_two().clamp(THREADS, SCAN_THREADS);
            launch!(dev, Sort, "order_scan", "", elements(&[b, bins.div_ceil(WARP)]), scans;
                &counts, &active, &b64, &chunks64, &digit.bins, &totals, &arrived, &begins)?;
            let (name, shared) = match way {
                SortWay::Scatter => ("order_scatter", 2 * (threads / WARP + 3) * bins),
                SortWay::DealMany => ("order_deal_many", 4 * (2 * bins + 1 + threads * SORT_ITEMS_MANY)),
                _ => ("order_deal", 4 * (2 * bins + 1 + threads * SORT_ITEMS)),
            };
            launch!(dev, Sort, name, "", elements(&[b, chunks]), threads, shared;
                &digit, &active, &b64, &rows64, &counts, &begins, &out)?;
            before = out;
        }
        if passes > 1 {
            launch!(dev, Sort, "order_boundaries", "", elements(&[b, n + 1]).div_ceil(THREADS), THREADS;
                &labels, &active, &b64, &(n as i64), &(k as i64), &order, &offsets)?;
        }
        Ok(())
    }
}

pub(crate) fn order(labels: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    const OP: &str = "order";
    let dev = device(labels)?;
    let (b, n) = labels.dims2()?;
    if b == 0 || n == 0 {
        let none = |shape| Tensor::zeros(shape, labels.dtype(), labels.device());
        return Ok((none((b, n))?, none((b, k + 1))?));
    }
    let memory = Memory::default();
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let sorting = Sorting::new(dev, [b, n, k], true, &mut scratch)?;
    let arrived = zeros.zeroed(b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, &memory)?, zeros.zeros(dev, OP, &memory)?);
    let order = tensor(dev, alloc::<u32>(dev, OP, elements(&[b, n]))?, (b, n));
    let offsets = tensor(dev, alloc::<u32>(dev, OP, elements(&[b, k + 1]))?, (b, k + 1));
    let (stream, input) = (dev.cuda_stream(), read(labels));
    let input = input.view::<u32>()?;
    // Held until the launches are queued: it orders them with what other streams do to the labels.
    let (address, _order) = input.device_ptr(&stream);
    let labels = Part::at(address);
    write(&order, |order| {
        write(&offsets, |offsets| {
            let active = Active::of(None)?;
            sorting.run(dev, &scratch, labels, active, [zeros.part(arrived), Part::NULL, order, offsets])
        })
    })?;
    Ok((order, offsets))
}
