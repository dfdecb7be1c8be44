//! A counting sort of labels: `kernels/sort.cu`.

use super::{
    device::device,
    kernel::{launch, WARP},
    memory::{elements, Arena, ArenaLayout, Memory, Slot},
    params::{Active, Digit},
    tensors::{read, write, zero, DevicePtr},
};
use crate::{
    backend::count_sort,
    error::Result,
    operand::{Readable, Target, COUNTED},
    plan::sort::{Sort, SortWay},
    tiles::{SCAN_THREADS, SORT_ITEMS, SORT_ITEMS_MANY, SORT_THREADS, THREADS},
};
use candle_core::{
    backend::BackendStorage,
    cuda_backend::{
        cudarc::driver::{DevicePtr as _, PushKernelArg},
        CudaDevice,
    },
    op::ReduceOp,
    Layout, WithDType,
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
    pub(super) fn new(plan: &Sort, [b, n, k]: [usize; 3], scratch: &mut ArenaLayout) -> Self {
        let (whole, several) = (plan.way == SortWay::Whole, plan.passes > 1);
        Self {
            plan: *plan,
            b,
            n,
            k,
            counts: scratch.unwritten(if whole { 0 } else { elements(&[b, plan.chunks, plan.bins]) }),
            totals: scratch.unwritten(if whole { 0 } else { elements(&[b, plan.bins]) }),
            begins: scratch.unwritten(if several { elements(&[b, plan.bins + 1]) } else { 0 }),
            other: scratch.unwritten(if several { elements(&[b, n]) } else { 0 }),
        }
    }

    /// Writes `order` (b, n) and `offsets` (b, k + 1). `arrived` (b) is zeros, `next` a count to clear on the way.
    pub(super) fn run(
        &self,
        dev: &CudaDevice,
        scratch: &Arena<'_>,
        labels: DevicePtr<u32>,
        active: Active,
        [arrived, next, order, offsets]: [DevicePtr<u32>; 4],
    ) -> Result<()> {
        count_sort();
        let &Self { plan: Sort { way, passes, bits, bins, threads, rows, chunks }, b, n, k, .. } = self;
        let (counts, totals) = (scratch.ptr(self.counts), scratch.ptr(self.totals));
        let (b64, rows64, chunks64) = (b as i64, rows as i64, chunks as i64);
        let mut before = DevicePtr::NULL;
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
            let begins = if passes == 1 { offsets } else { scratch.ptr(self.begins) };
            let out = if (passes - pass) % 2 == 1 { order } else { scratch.ptr(self.other) };
            let digit = Digit { labels, before, n: n as i64, k: k as i64, bins: bins as i64, shift, mask };
            let next = if pass == 0 { next } else { DevicePtr::NULL };
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

/// The largest label, by Candle's reduction; 0 where there are none. The host waits for it.
pub(crate) fn max_label(labels: &dyn Readable) -> Result<u32> {
    let (start, count) = (labels.layout().start_offset(), labels.elem_count());
    let found = {
        let input = read(labels);
        let storage = input.storage()?;
        let piece = |at| Layout::contiguous_with_offset(COUNTED.min(count - at), start + at);
        let pieces = (0..count).step_by(COUNTED).map(|at| storage.reduce_op(ReduceOp::Max, &piece(at), &[0]));
        pieces.collect::<candle_core::Result<Vec<_>>>()?
    };
    let mut largest = 0;
    for found in found {
        largest = largest.max(u32::cpu_storage_data(found.to_cpu_storage()?)?[0]);
    }
    Ok(largest)
}

pub(crate) fn order(labels: &dyn Readable, k: usize, plan: &Sort, to: Target<'_>) -> Result<()> {
    const OP: &str = "order";
    let dev = device(labels)?;
    let (b, n) = (labels.dims()[0], labels.dims()[1]);
    if b == 0 || n == 0 {
        return zero::<u32>(dev, to);
    }
    let memory = Memory::default();
    let (mut scratch, mut zeros) = (ArenaLayout::default(), ArenaLayout::default());
    let sorting = Sorting::new(plan, [b, n, k], &mut scratch);
    let arrived = zeros.zeroed(b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, &memory)?, zeros.zeros(dev, OP, &memory)?);
    let (stream, input) = (dev.cuda_stream(), read(labels));
    let input = input.view::<u32>()?;
    // Held until the launches are queued: it orders them with what other streams do to the labels.
    let (address, _order) = input.device_ptr(&stream);
    let labels = DevicePtr::at(address);
    write(to, |order: DevicePtr<u32>| {
        let (active, offsets) = (Active::of(None)?, order.from(elements(&[b, n])));
        sorting.run(dev, &scratch, labels, active, [zeros.ptr(arrived), DevicePtr::NULL, order, offsets])
    })
}
