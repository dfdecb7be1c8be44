//! Assignments of a fit that leave each other bounds on the distances of rows to groups of centroids, and skip what these allow.
//!
//! The first pass compares all centroids, and so does the second, which leaves bounds. From then on a pass looks at a sample of the rows
//! first: what they need says whether skipping pays. Where it does not yet, bounds are made again after as many passes more.

use super::{
    amx::Amx,
    bounds::{Grouping, Moved, Renewal},
    filter::Centroids,
    groups::group_centroids,
    label::{Scratch, Views},
    label_rounded::RoundedScratch,
    rounded::RoundedCentroids,
    skipping::{RowBounds, SkipScratch, SkipTile, Work},
    tensors::{write, Element, Stored, View},
};
use crate::{
    error::Result,
    host,
    launches::{self, PassWork},
    request::{BoundsState, KeptBounds},
    tiles::{CPU_ROWS, CPU_SAMPLE, CPU_SKIP_ROWS},
};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The largest share of the products that is worth gathering rows for.
const PAYS: f64 = 0.5;
/// The first pass that leaves bounds: before it centroids move too far.
const FIRST: usize = 2;

/// What is kept, of all problems.
struct Kept<'a, T> {
    group: &'a mut [u32],
    lower: &'a mut [f32],
    upper: &'a mut [f32],
    fallen: &'a mut [f32],
    before: &'a mut [T],
}

/// What a pass does with the rows of a problem.
enum Pass {
    /// Compares all centroids,
    Plain,
    /// and leaves bounds.
    Renew(Grouping),
    Skip(Grouping, Moved),
}

/// A problem in this pass.
struct Prepared {
    pass: Pass,
    centroids: Centroids<f32>,
    rounded: Option<RoundedCentroids>,
}

/// Rows of a problem that one task labels.
struct Rows<'a> {
    b: usize,
    first: usize,
    labels: &'a mut [u32],
    bounds: RowBounds<'a>,
}

/// As an assignment without bounds, but for the time that it takes.
pub(super) fn label_bounded<T: Element<Filter = f32>>(
    views: &Views<'_, T>,
    amx: Option<Amx>,
    kept: &KeptBounds,
    labels: &mut [u32],
) -> Result<u64> {
    with_kept(kept, |mut of: Kept<'_, T>| {
        let &Views { x, c, .. } = views;
        let (n, d, k, groups) = (x.rows.n, x.rows.d, c.rows.n, kept.skip.groups);
        let mut states = kept.states();
        let mut prepared = host::buffer("assign", x.rows.b)?;
        for (b, state) in states.iter_mut().enumerate() {
            let over = views.converged.get(b).is_some_and(|&over| over);
            prepared.push(if over {
                None
            } else {
                Some(of.prepare(views, amx, kept, (b, state), &labels[b * n..][..n])?)
            });
        }
        let mut tiles = vec![];
        let bounds = of.lower.chunks_mut(n * groups).zip(of.upper.chunks_mut(n));
        for ((b, labels), (lower, upper)) in labels.chunks_mut(n).enumerate().zip(bounds) {
            let Some(prepared) = &prepared[b] else { continue };
            let len = if matches!(prepared.pass, Pass::Skip(..)) { CPU_SKIP_ROWS } else { CPU_ROWS };
            let bounds = lower.chunks_mut(len * groups).zip(upper.chunks_mut(len));
            let bounds = bounds.map(|(lower, upper)| RowBounds { lower, upper });
            let parts = labels.chunks_mut(len).zip(bounds).enumerate();
            tiles.extend(parts.map(|(i, (labels, bounds))| Rows { b, first: i * len, labels, bounds }));
        }
        let [compared, products, moved, all] = [(); 4].map(|()| AtomicU64::new(0));
        let label = |s: &mut Scratches, rows: Rows<'_>| {
            let (Some(prepared), before) = (&prepared[rows.b], rows.labels.to_vec()) else { return Ok(()) };
            let (size, now) = (before.len() as u64, &mut *rows.labels);
            let done = prepared.label(views, s, (rows.b, rows.first), now, &before, rows.bounds)?;
            compared.fetch_add(done.compared, Relaxed);
            products.fetch_add(done.products, Relaxed);
            all.fetch_add(size * k as u64, Relaxed);
            moved.fetch_add(now.iter().zip(&before).filter(|(now, before)| now != before).count() as u64, Relaxed);
            Ok(())
        };
        host::for_each(tiles, CPU_ROWS.min(n) * d * (4 + k / 16), Scratches::default, label)?;
        launches::record_pass(|| {
            let share = |part: AtomicU64, of: f64| part.into_inner() as f64 / of.max(1.0);
            let all = all.into_inner() as f64;
            PassWork { products: share(products, all), moved: share(moved, all / k as f64) }
        });
        Ok(compared.into_inner())
    })
}

/// Lets `f` write what is kept.
fn with_kept<T: Stored, R>(kept: &KeptBounds, f: impl FnOnce(Kept<'_, T>) -> Result<R>) -> Result<R> {
    let KeptBounds { group, lower, upper, fallen, before, .. } = kept;
    // Nobody else has these tensors, so that the order of their locks does not matter.
    write(group, |group| {
        write(lower, |lower| {
            write(upper, |upper| {
                write(fallen, |fallen| write(before, |before| f(Kept { group, lower, upper, fallen, before })))
            })
        })
    })?????
}

/// One thread reuses these from tile to tile.
#[derive(Default)]
struct Scratches {
    plain: Option<Scratch<f32>>,
    rounded: Option<RoundedScratch>,
    skip: SkipScratch,
}

impl Prepared {
    fn label<T: Element<Filter = f32>>(
        &self,
        views: &Views<'_, T>,
        s: &mut Scratches,
        place: (usize, usize),
        labels: &mut [u32],
        before: &[u32],
        bounds: RowBounds<'_>,
    ) -> Result<Work> {
        let (tile, [n, d, k]) = (views.tile(place, &self.centroids), [views.x.rows.n, views.x.rows.d, views.c.rows.n]);
        let renewal = match &self.pass {
            Pass::Skip(grouping, moved) => {
                let tile = SkipTile { tile, grouping, moved, rounded: self.rounded.as_ref() };
                return tile.label(&mut s.skip, labels, bounds);
            }
            Pass::Renew(grouping) => {
                // The next pass finds the distance to the own centroid where it is asked for.
                bounds.upper.fill(f32::INFINITY);
                Some(Renewal::new(grouping, bounds.lower, before))
            }
            Pass::Plain => None,
        };
        let products = (labels.len() * k) as u64;
        let compared = match &self.rounded {
            Some(rounded) => {
                let s = s.rounded.get_or_insert_with(|| RoundedScratch::new(d));
                tile.label_rounded(rounded, s, labels, renewal)?
            }
            None => tile.label(s.plain.get_or_insert_with(|| Scratch::new([n, d, k])), labels, renewal),
        };
        Ok(Work { compared, products })
    }
}

impl<T: Element<Filter = f32>> Kept<'_, T> {
    /// Decides what a pass does with a problem, whose rows have these labels, and prepares its centroids for that.
    fn prepare(
        &mut self,
        views: &Views<'_, T>,
        amx: Option<Amx>,
        kept: &KeptBounds,
        (b, state): (usize, &mut BoundsState),
        labels: &[u32],
    ) -> Result<Prepared> {
        let &Views { c, metric, .. } = views;
        let (k, d, groups) = (c.rows.n, c.rows.d, kept.skip.groups);
        let (group, fallen) = (&mut self.group[b * k..][..k], &mut self.fallen[b * groups..][..groups]);
        let before = &mut self.before[b * k * d..][..k * d];
        state.passes += 1;
        let mut moved = None;
        if let Some(made) = state.made {
            let known = Moved::new(c, b, before, group, fallen)?;
            let n = labels.len();
            let bounds = (&self.lower[b * n * groups..][..n * groups], &self.upper[b * n..][..n]);
            if kept.skip.always || needed(views.x, b, labels, bounds, &known)? <= PAYS {
                moved = Some(known);
            } else if made + 1 == state.passes {
                // Bounds could not be tighter.
                (state.made, state.next) = (None, 2 * made);
            }
        }
        let renews = moved.is_none() && (state.made.is_some() || state.passes >= state.next.max(FIRST));
        let rounded = |full: &Centroids<f32>| amx.map(|amx| RoundedCentroids::new(full, amx)).transpose();
        if renews {
            group_centroids(c, b, groups, group)?;
        }
        if renews || moved.is_some() {
            let centroids = Centroids::in_groups(c, b, metric, |j| group[j as usize])?;
            // A centroid too far out to be scored has no place in a group.
            if centroids.apart().is_empty() {
                let grouping = Grouping::new(group, groups, &centroids);
                let rounded = rounded(&centroids)?;
                before.chunks_exact_mut(d).enumerate().for_each(|(j, to)| to.copy_from_slice(c.row(b, j)));
                let pass = match moved {
                    Some(moved) => Pass::Skip(grouping, moved),
                    None => {
                        fallen.fill(0.0);
                        state.made = Some(state.passes);
                        Pass::Renew(grouping)
                    }
                };
                return Ok(Prepared { pass, centroids, rounded });
            }
        }
        if renews || moved.is_some() {
            state.made = None;
        }
        let centroids = Centroids::new(c, b, metric)?;
        Ok(Prepared { pass: Pass::Plain, rounded: rounded(&centroids)?, centroids })
    }
}

/// The share of rows and groups that a sample of the rows needs.
fn needed<T: Element<Filter = f32>>(
    x: &View<'_, T>,
    b: usize,
    labels: &[u32],
    (lower, upper): (&[f32], &[f32]),
    moved: &Moved,
) -> Result<f64> {
    let (n, groups) = (labels.len(), moved.fallen.len());
    let sampled = n.div_ceil(CPU_SAMPLE);
    let of_row = |i: usize| {
        // One of each run of rows, at no regular distance.
        let row = (i * CPU_SAMPLE + i.wrapping_mul(0x9e37_79b1) % CPU_SAMPLE).min(n - 1);
        let (label, lower) = (labels[row], &lower[row * groups..][..groups]);
        if !moved.any_needed(lower, Moved::cut(moved.after_move(upper[row], label))) {
            return 0;
        }
        let mut values = vec![0.0; x.rows.d];
        T::filter_row(x.row(b, row), &mut values);
        let cut = Moved::cut(moved.above(moved.square(&values, label)));
        lower.iter().zip(&moved.fallen).filter(|&(&lower, &fallen)| Moved::needed(lower, fallen, cut)).count()
    };
    let needed = host::reduce(sampled, x.rows.d + 8 * groups, of_row, |a, b| a + b)?;
    Ok(needed.unwrap_or(0) as f64 / (sampled * groups).max(1) as f64)
}
