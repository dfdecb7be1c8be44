//! Sort-Inverse Update: `kernels/sort.cu` and `kernels/update.cu`; and all of a fit at once: `kernels/fit_*.cu`.

use super::{
    device::{arch, device},
    kernel::{launch, Kernel, Nullable, WARP},
    memory::{alloc, elements, Layout, Memory, Place, Workspace},
    module::Image,
    params::{going, shape, Active},
    tensors::{own, read, tensor, typed, write, Element, Part},
};
use crate::{
    error::{Error, Result},
    plan::{
        arch::shared_memory,
        assign::narrow_columns,
        on_chip::{FitNarrow, FitResident},
        sort::{Sort, SortWay},
    },
    request::{OnChipFit, Rule, Turn, Update},
    rows::in_pieces,
    tiles::{
        LEFT_BLOCKS, LEFT_COLUMNS, LEFT_THREADS, MEDIAN_COLUMNS, SCAN_THREADS, SORT_ITEMS, SORT_ITEMS_MANY,
        SORT_THREADS, SUM_CLUSTER, SUM_ROWS, SUM_ROWS_LEAST, SUM_THREADS, SUM_WARPS, SUM_WARPS_LEAST, TEAM_THREADS,
        THREADS,
    },
};
use candle_core::{
    cuda_backend::{
        cudarc::driver::{DevicePtr, DeviceRepr, PushKernelArg},
        CudaDevice,
    },
    DType, Tensor,
};

/// `struct Digit` of `sort.cu`.
#[repr(C)]
struct Digit {
    labels: Part<u32>,
    before: Part<u32>,
    n: i64,
    k: i64,
    bins: i64,
    shift: u32,
    mask: u32,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Digit {}

/// A sort of `b` problems of `n` labels below `k`: its plan, and where its scratch lies.
struct Sorting {
    plan: Sort,
    b: usize,
    n: usize,
    k: usize,
    counts: Place<u32>,
    totals: Place<u32>,
    begins: Place<u32>,
    /// An order by some digits only.
    other: Place<u32>,
}

impl Sorting {
    fn new(dev: &CudaDevice, [b, n, k]: [usize; 3], ascending: bool, scratch: &mut Layout) -> Result<Self> {
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
    fn run(
        &self,
        dev: &CudaDevice,
        scratch: &Workspace<'_>,
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
    let (mut scratch, mut zeros) = (Layout::default(), Layout::default());
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

/// `struct Clusters` of `update.cu`.
#[repr(C)]
struct Clusters {
    centroids: u64,
    slots: Part<[u64; 2]>,
    added: Part<u32>,
    finished: Part<u32>,
    odd: Part<u32>,
    odd_of: Part<u32>,
    odd_count: Part<u32>,
    odd_list: Part<u64>,
    shift: Part<f64>,
    k: i64,
    d: i64,
    divisor: i32,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Clusters {}

/// `struct Pieces` of `update.cu`.
#[repr(C)]
struct Pieces {
    rows: u32,
    whole: u32,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Pieces {}

/// `struct Verdict` of `update.cu`.
#[repr(C)]
struct Verdict {
    threshold: Part<f64>,
    stop: Part<u32>,
    list: Part<u32>,
    count: Part<u32>,
    iteration: i64,
}

// SAFETY: pointers and integers, laid out as in C.
unsafe impl DeviceRepr for Verdict {}

impl Verdict {
    fn of(turn: Option<Turn<'_>>) -> Result<Self> {
        let Some(Turn { progress, iteration }) = turn else {
            let (threshold, none) = (Part::NULL, Part::NULL);
            return Ok(Self { threshold, stop: none, list: none, count: none, iteration: 0 });
        };
        let (threshold, stop) = (own(&progress.threshold)?, own(&progress.stop)?);
        let count = going(progress, iteration + 1)?;
        Ok(Self { threshold, stop, list: count.from(1), count, iteration: iteration as i64 })
    }
}

pub(crate) fn update(u: &Update<'_>, memory: &Memory) -> Result<()> {
    if u.x.b == 0 || u.x.n == 0 {
        return Ok(());
    }
    typed!(u.x.dtype(), T => write::<T>(u.centroids, |out| update_of::<T>(u, out, memory)))
}

/// `struct Terms` of `sums.cuh`.
#[repr(C)]
struct TermsOnChip {
    factor: Part<f64>,
    largest: Part<f64>,
    heaviest: Part<f64>,
    first_bad: Part<u32>,
}

// SAFETY: pointers, laid out as in C.
unsafe impl DeviceRepr for TermsOnChip {}

/// `struct Shares` of `fit_resident.cu`.
#[repr(C)]
struct Shares {
    blocks: i32,
    rows: i32,
    padded: i32,
}

// SAFETY: integers, laid out as in C.
unsafe impl DeviceRepr for Shares {}

/// `struct Common` of `fit_resident.cu`.
#[repr(C)]
struct Common {
    limbs: Part<u64>,
    rest: Part<[u64; 2]>,
    weights: Part<[u64; 2]>,
    sizes: Part<u32>,
    shifts: Part<[f64; 2]>,
    arrived: Part<u32>,
    moved: Part<u16>,
    prepared: Part<[u64; 4]>,
}

// SAFETY: pointers, laid out as in C.
unsafe impl DeviceRepr for Common {}

pub(crate) fn fit_on_chip(fit: &OnChipFit<'_>, memory: &Memory) -> Result<bool> {
    const OP: &str = "fit_on_chip";
    let &OnChipFit { x, terms, metric, rule, progress, max_iters, centroids, labels } = fit;
    let dev = device(&x.tensor)?;
    let (arch, k, weighted) = (arch(dev)?, centroids.dim(1)?, terms.factor.is_some());
    let sizes = [x.b, x.n, k, x.d];
    let narrow = FitNarrow::new(x.dtype(), metric, sizes, arch);
    let resident = FitResident::new(x.dtype(), metric, weighted, sizes, arch).filter(|_| in_pieces(&x.tensor, 8));
    // The sums of halves are exact without a rest.
    let exact = x.dtype() == DType::F16 && !weighted;
    let teams: &[&'static str] = match (weighted, exact && !terms.finite) {
        (true, _) => &["fit_resident_weighted"],
        (false, false) => &["fit_resident"],
        // Behind it what takes the problems with rows that are not finite, if there are any.
        (false, true) => &["fit_resident", "fit_resident_rest"],
    };
    let resident = match resident {
        Some(plan) if narrow.is_none() => typed!(x.dtype(), T => {
            let mut fits = true;
            for name in teams {
                let kernel = Kernel::get(dev, Image::FitResident, name, T::SUFFIX, plan.shared)?;
                fits &= kernel.runs_at_once(plan.teams * plan.blocks, TEAM_THREADS, plan.shared)?;
            }
            Ok(fits.then_some(plan))
        })?,
        _ => None,
    };
    if narrow.is_none() && resident.is_none() {
        return Ok(false);
    }
    let optional = |t: &Option<Tensor>| t.as_ref().map_or(Ok(Part::NULL), own);
    let of = TermsOnChip {
        factor: optional(&terms.factor)?,
        largest: own(&terms.largest)?,
        heaviest: optional(&terms.heaviest)?,
        first_bad: own(&terms.first_bad)?,
    };
    let (threshold, stop) = (own::<f64>(&progress.threshold)?, own::<u32>(&progress.stop)?);
    let (metric, divisor, max_iters, k64) = (metric as i32, divisor(rule), max_iters as i64, k as i64);
    let launched = typed!(x.dtype(), T => write::<T>(centroids, |centroids| write::<u32>(labels, |labels| {
        let xs = read(&x.tensor);
        let xs = xs.view::<T>()?;
        if let Some(plan) = &narrow {
            let name = match narrow_columns(x.d) {
                1 => "fit_narrow_1",
                2 => "fit_narrow_2",
                4 => "fit_narrow_4",
                _ => "fit_narrow_8",
            };
            return launch!(dev, FitNarrow, name, T::SUFFIX, x.b, plan.threads, plan.shared;
                &xs, &shape(x), &of, &metric, &divisor, &max_iters, &threshold, &(plan.centroids as i64), &stop, &k64,
                &centroids, &labels);
        }
        let Some(plan) = &resident else { return Ok(()) };
        let (&FitResident { teams: count, blocks, rows, padded, shared }, mut zeros) = (plan, Layout::default());
        let limbs = zeros.zeroed(elements(&[count, if weighted { 2 } else { 1 }, k, x.d.next_multiple_of(64)]));
        let rest = zeros.zeroed(if exact { 0 } else { elements(&[count, k, x.d]) });
        let weights = zeros.zeroed(if weighted { elements(&[count, k]) } else { 0 });
        let (sizes, shifts, arrived) = (zeros.zeroed(elements(&[count, k + 2])), zeros.zeroed(count), zeros.zeroed(count));
        let mut scratch = Layout::default();
        let (moved, prepared) = (scratch.unwritten(elements(&[count, k, x.d])), scratch.unwritten(elements(&[count, k])));
        let (zeros, scratch) = (zeros.zeros(dev, OP, memory)?, scratch.scratch(dev, OP, memory)?);
        let common = Common {
            limbs: zeros.part(limbs),
            rest: zeros.part(rest),
            weights: zeros.part(weights),
            sizes: zeros.part(sizes),
            shifts: zeros.part(shifts),
            arrived: zeros.part(arrived),
            moved: scratch.part(moved),
            prepared: scratch.part(prepared),
        };
        let [blocks_i32, rows, padded] = [blocks, rows, padded].map(|v| v as i32);
        for name in teams {
            launch!(dev, FitResident, name, T::SUFFIX, elements(&[count, blocks]), TEAM_THREADS, shared;
                &xs, &shape(x), &of, &metric, &divisor, &max_iters, &threshold,
                &Shares { blocks: blocks_i32, rows, padded }, &common, &stop, &k64, &centroids, &labels)?;
        }
        Ok(())
    })));
    match launched {
        // The driver knows better; nothing has been written.
        Err(Error::Unsupported { op, .. }) if op == teams[0] => Ok(false),
        launched => launched.map(|()| true),
    }
}

/// `enum Divisor` of `sums.cuh`.
fn divisor(rule: Rule) -> i32 {
    match rule {
        Rule::Mean | Rule::Median => 0,
        Rule::Direction => 1,
        Rule::Sum => 2,
    }
}

fn update_of<T: Element>(u: &Update<'_>, centroids: Part<T>, memory: &Memory) -> Result<()> {
    const OP: &str = "update";
    let &Update { x, terms, labels, rule, turn, .. } = u;
    let k = u.centroids.dim(1)?;
    let dev = device(&x.tensor)?;
    let (b, n, d) = (x.b, x.n, x.d);
    let (active, verdict) = (Active::of(turn)?, Verdict::of(turn)?);

    let (mut scratch, mut zeros) = (Layout::default(), Layout::default());
    let sorting = labels.map(|_| Sorting::new(dev, [b, n, k], false, &mut scratch)).transpose()?;
    let order = scratch.unwritten::<u32>(if labels.is_some() { elements(&[b, n]) } else { 0 });
    let offsets = scratch.unwritten::<u32>(elements(&[b, k + 1]));
    let medians = rule == Rule::Median;
    let old = scratch.unwritten::<T>(if medians { elements(&[b, k, d]) } else { 0 });
    let slots = zeros.zeroed::<[u64; 2]>(if medians { 0 } else { elements(&[b, k, d + 1]) });
    let added = zeros.zeroed::<u32>(elements(&[b, k]));
    let [arrived, finished, odd_of] = [(); 3].map(|_| zeros.zeroed::<u32>(b));
    let (odd, odd_count) = (zeros.zeroed::<u32>(elements(&[b, k])), zeros.zeroed::<u32>(2));
    let odd_list = scratch.unwritten::<u64>(elements(&[b, k]));
    let shift = zeros.zeroed::<f64>(b);
    let (scratch, zeros) = (scratch.scratch(dev, OP, memory)?, zeros.zeros(dev, OP, memory)?);
    let (offsets, shift) = (scratch.part(offsets), zeros.part(shift));

    let (mut order_at, mut labels_at) = (Part::NULL, Part::NULL);
    if let (Some(sorting), Some(labels)) = (&sorting, labels) {
        (order_at, labels_at) = (scratch.part(order), own(labels)?);
        let next = if turn.is_some() { verdict.count } else { Part::NULL };
        sorting.run(dev, &scratch, labels_at, active, [zeros.part(arrived), next, order_at, offsets])?;
    }

    let (xs, largest, first_bad) = (read(&x.tensor), read(&terms.largest), read(&terms.first_bad));
    let (factor, heaviest) = (terms.factor.as_ref().map(read), terms.heaviest.as_ref().map(read));
    let xs = xs.view::<T>()?;
    let (largest, first_bad) = (largest.view::<f64>()?, first_bad.view::<u32>()?);
    let factor = factor.as_ref().map(|f| f.view::<f64>()).transpose()?;
    let heaviest = heaviest.as_ref().map(|h| h.view::<f64>()).transpose()?;
    let to = Clusters {
        centroids: centroids.address,
        slots: zeros.part(slots),
        added: zeros.part(added),
        finished: zeros.part(finished),
        odd: zeros.part(odd),
        odd_of: zeros.part(odd_of),
        odd_count: zeros.part(odd_count),
        odd_list: scratch.part(odd_list),
        shift: if turn.is_some() { shift } else { Part::NULL },
        k: k as i64,
        d: d as i64,
        divisor: divisor(rule),
    };
    if medians {
        let (b64, old) = (b as i64, scratch.part(old));
        old.copy_from(dev, centroids, elements(&[b, k, d]))?;
        launch!(dev, Update, "medians", T::SUFFIX, elements(&[b, k, d.div_ceil(MEDIAN_COLUMNS)]), THREADS;
            &xs, &shape(x), Nullable(&factor), Nullable(&heaviest), &first_bad, &order_at, &offsets, &to.k, &active,
            &centroids)?;
        if turn.is_some() {
            launch!(dev, Update, "shift", T::SUFFIX, elements(&[b, k]).div_ceil(THREADS / WARP), THREADS;
                &old, &b64, &to, &active)?;
            launch!(dev, Update, "settle_shifts", "", b.div_ceil(THREADS), THREADS; &b64, &shift, &active, &verdict)?;
        }
        return Ok(());
    }
    // Pieces about as long as a cluster, but enough of them, and not more than that takes.
    let each = (elements(&[b, n]) / SUM_WARPS).max((n / k).min(SUM_CLUSTER).min(elements(&[b, n]) / SUM_WARPS_LEAST));
    let each = each.next_power_of_two().clamp(SUM_ROWS_LEAST, SUM_ROWS);
    let pieces = Pieces { rows: each as u32, whole: (2 * each).min(SUM_ROWS) as u32 };
    let whole = in_pieces(&x.tensor, 16 / size_of::<T>()) && x.row_stride <= u32::MAX as usize;
    let name = match (whole, factor.is_some()) {
        (true, false) => "update",
        (true, true) => "update_weighted",
        (false, false) => "update_narrow",
        (false, true) => "update_narrow_weighted",
    };
    let blocks = elements(&[b, n.div_ceil(each)]).div_ceil(SUM_THREADS / WARP);
    launch!(dev, Update, name, T::SUFFIX, blocks, SUM_THREADS;
        &xs, &shape(x), Nullable(&factor), &largest, Nullable(&heaviest), &first_bad, &labels_at, &order_at, &offsets,
        &pieces, &to, &active, &verdict)?;
    if x.dtype() == DType::F16 && factor.is_none() && terms.finite {
        // All halves are integers of the scale: nothing is left.
        return Ok(());
    }
    let blocks = elements(&[b, k, (d + 1).div_ceil(LEFT_COLUMNS)]).min(LEFT_BLOCKS);
    launch!(dev, Update, "update_exact", T::SUFFIX, blocks, LEFT_THREADS;
        &xs, &shape(x), Nullable(&factor), &first_bad, &order_at, &offsets, &to, &verdict)
}
