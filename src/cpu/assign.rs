//! The assignment of rows to the nearest of their centroids, tile by tile.

use super::{
    amx::Amx,
    bounded::label_bounded,
    filter::Centroids,
    label::{Scratch, Views},
    label_rounded::RoundedScratch,
    packed::Source,
    rounded::RoundedCentroids,
    tensors::{converged, read_and_write, single, typed, Element},
};
use crate::{
    error::Result,
    host,
    launches::{self, PassWork},
    operand::Target,
    plan::assign::Assign,
    request::Assignment,
    tiles::CPU_ROWS,
};
use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

pub(crate) fn assign_into(a: Assignment<'_>, labels: Target<'_>) -> Result<()> {
    let Assignment { plan, x, c, metric, turn, bounds, .. } = a;
    let converged = converged(turn)?;
    if x.b == 0 || x.n == 0 {
        return Ok(());
    }
    launches::record(plan.kernel.name(), x.dtype().as_str());
    let amx = Amx::find().filter(|_| plan.kernel == Assign::CpuAmx);
    if let Some(kept) = bounds {
        return single!(x.dtype(), T => {
            let compared = read_and_write([&x.operand, &c.operand], labels, |[xs, cs], labels| {
                let (x, c) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
                let views = Views { x: &x, c: &c, kernel: plan.kernel, metric, converged: &converged };
                label_bounded(&views, amx, kept, labels)
            })??;
            COMPARED.set(COMPARED.get() + compared);
            Ok(())
        });
    }
    match amx {
        Some(amx) => single!(x.dtype(), T => {
            read_and_write([&x.operand, &c.operand], labels, |[xs, cs], labels| {
                let (x, c) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
                label_rounded(&Views { x: &x, c: &c, kernel: plan.kernel, metric, converged: &converged }, amx, labels)
            })?
        }),
        _ => typed!(x.dtype(), T => {
            read_and_write([&x.operand, &c.operand], labels, |[xs, cs], labels| {
                let (x, c) = (xs.view::<T>(x)?, cs.view::<T>(c)?);
                label(&Views { x: &x, c: &c, kernel: plan.kernel, metric, converged: &converged }, labels)
            })?
        }),
    }
}

thread_local!(static COMPARED: Cell<u64> = const { Cell::new(0) });

/// The number of centroids that have been compared with a row by the definition in assignments that this thread has asked for.
pub(crate) fn compared() -> u64 {
    COMPARED.get()
}

fn label<T: Element>(views: &Views<'_, T>, labels: &mut [u32]) -> Result<()> {
    let scratch = || Scratch::new([views.x.rows.n, views.x.rows.d, views.c.rows.n]);
    label_all(views, labels, Ok, scratch, |s, place, centroids, out| {
        Ok(views.tile(place, centroids).label(s, out, None))
    })
}

/// With a first pass on the matrix unit.
fn label_rounded<T: Element<Filter = f32>>(views: &Views<'_, T>, amx: Amx, labels: &mut [u32]) -> Result<()> {
    let prepare = |full: Centroids<f32>| RoundedCentroids::new(&full, amx).map(|rounded| (full, rounded));
    let scratch = || RoundedScratch::new(views.x.rows.d);
    label_all(views, labels, prepare, scratch, |s, place, (full, rounded), out| {
        views.tile(place, full).label_rounded(rounded, s, out, None, Source::Rows)
    })
}

/// Labels all rows, tile by tile, with what `prepare` makes of each problem's centroids. `label` returns how many centroids it has compared.
fn label_all<T: Element, P: Send + Sync, S: Send>(
    views: &Views<'_, T>,
    labels: &mut [u32],
    prepare: impl Fn(Centroids<T::Filter>) -> Result<P> + Send + Sync,
    scratch: impl Fn() -> S + Send + Sync,
    label: impl Fn(&mut S, (usize, usize), &P, &mut [u32]) -> Result<u64> + Send + Sync,
) -> Result<()> {
    let (&Views { x, c, metric, converged, .. }, start) = (views, Instant::now());
    let skipped = |b: usize| converged.get(b).is_some_and(|&c| c);
    let problems = if c.rows.batch_stride == 0 { 1 } else { c.rows.b };
    let prepared = |b| {
        let centroids = (problems == 1 || !skipped(b)).then(|| prepare(Centroids::new(c, b, metric)?));
        centroids.transpose()
    };
    let (n, d, k) = (x.rows.n, x.rows.d, c.rows.n);
    let centroids = host::map("assign", problems, 8 * k * d, prepared)?;
    let centroids = centroids.into_iter().collect::<Result<Vec<_>>>()?;
    let (compared, moved) = (AtomicU64::new(0), AtomicUsize::new(0));
    let tile = |s: &mut S, (b, part, labels): (usize, usize, &mut [u32])| {
        if let Some(centroids) = &centroids[b.min(problems - 1)] {
            let mut before = [0; CPU_ROWS];
            before[..labels.len()].copy_from_slice(labels);
            compared.fetch_add(label(s, (b, part * CPU_ROWS), centroids, labels)?, Relaxed);
            moved.fetch_add(labels.iter().zip(&before).filter(|(now, before)| now != before).count(), Relaxed);
        }
        Ok(())
    };
    let tiles = labels.chunks_mut(n).enumerate().filter(|&(b, _)| !skipped(b));
    let rows = (0..x.rows.b).filter(|&b| !skipped(b)).count() * n;
    let tiles = tiles.flat_map(|(b, l)| l.chunks_mut(CPU_ROWS).enumerate().map(move |(p, o)| (b, p, o))).collect();
    // A multiplication in a product of matrices is a small part of a step.
    host::for_each(tiles, CPU_ROWS.min(n) * d * (4 + k / 16), scratch, tile)?;
    COMPARED.set(COMPARED.get() + compared.into_inner());
    launches::record_pass(|| {
        let moved = moved.into_inner() as f64 / rows.max(1) as f64;
        PassWork { products: 1.0, moved, ms: start.elapsed().as_secs_f64() * 1e3 }
    });
    Ok(())
}
