//! Assignments of a fit that leave each other bounds on the distances of rows to groups of centroids, and skip what these allow.
//!
//! The first pass compares all centroids, and so does the second, which leaves bounds. From then on a pass looks at a sample of the rows
//! first: what they need says whether skipping pays. Where it does not yet, bounds are made again after as many passes more.
//!
//! Where there is a matrix unit the second pass leaves the rows too, as it has packed them, even of fits that keep no bounds.

use super::{
    amx::Amx,
    bounds::{Grouping, Moved, Renewal},
    filter::Centroids,
    groups::group_centroids,
    label::{Scratch, Views},
    label_rounded::RoundedScratch,
    lines::steps,
    listing::{RowBounds, SkipScratch, SkipTile},
    own::{Measure, OwnCentroids},
    packed::{self, Packed, Source},
    rounded::RoundedCentroids,
    skipping::Work,
    tensors::{write, Element, Stored, View},
};
use crate::{
    error::{Error, Result},
    host,
    kept::{BoundsState, KeptBounds, PackedRows},
    launches::{self, PassWork},
    plan::skip::{skip_rows, SkipPlan},
    tiles::{CPU_ROWS, CPU_SAMPLE},
};
use candle_core::Tensor;
use std::{
    sync::{
        atomic::{AtomicU64, Ordering::Relaxed},
        PoisonError,
    },
    time::Instant,
};

/// The largest share of the products that is worth gathering rows for. Near it a pass over all centroids takes little longer, but a pass that skips
/// makes the needed bounds anew.
const PAYS: f64 = 0.6;
/// A share that may be small enough in the next pass.
const NEARLY: f64 = 0.7;
/// The first pass that leaves anything: before it centroids move too far.
const FIRST: usize = 2;

/// What is kept of a problem. Of no groups there are rows alone.
struct Kept<'a> {
    state: &'a mut BoundsState,
    packed: &'a mut PackedRows,
    /// `(k)`.
    group: &'a mut [u32],
    /// `(n, groups)`.
    lower: &'a mut [f32],
    /// `(n, groups)`.
    since: &'a mut [u8],
    /// `(n)`.
    upper: &'a mut [f32],
    /// `(snapshots, k, d)`.
    snapshots: &'a mut [f32],
    /// `(groups)`.
    fallen: &'a mut [f32],
}

/// The work of a pass on the rows of a problem.
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
    /// Of a pass that skips.
    own: Option<OwnCentroids>,
    rows: PackedBy,
}

/// Who has packed the rows that a pass over all centroids reads.
enum PackedBy {
    /// The pass itself,
    This,
    /// which keeps them;
    ThisForLater,
    Earlier,
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
    let (&Views { x, c, .. }, start) = (views, Instant::now());
    let (n, d, k, groups) = (x.rows.n, x.rows.d, c.rows.n, kept.skip.groups);
    with_kept(kept, k, |mut of: Vec<Kept<'_>>| {
        let mut prepared = host::buffer("assign", x.rows.b)?;
        prepared.resize_with(x.rows.b, || None);
        let active = of.iter_mut().zip(labels.chunks(n)).zip(&mut prepared).enumerate();
        let active = active.filter(|(b, _)| !views.converged.get(*b).is_some_and(|&over| over)).collect();
        type Problem<'a, 'k> = ((&'a mut Kept<'k>, &'a [u32]), &'a mut Option<Prepared>);
        let prepare = |_: &mut (), (b, ((of, labels), prepared)): (usize, Problem<'_, '_>)| {
            *prepared = Some(of.prepare(views, amx, kept.skip, b, labels)?);
            Ok(())
        };
        host::for_each(active, 8 * k * d, || (), prepare)?;
        let mut tiles = vec![];
        for ((b, labels), of) in labels.chunks_mut(n).enumerate().zip(&mut of) {
            let Some(prepared) = &prepared[b] else { continue };
            let len = if matches!(prepared.pass, Pass::Skip(..)) { skip_rows(d) } else { CPU_ROWS };
            let (mut lines, mut norms) = (&mut of.packed.lines[..], &mut of.packed.norms[..]);
            let (mut lower, mut since, mut upper) = (&mut *of.lower, &mut *of.since, &mut *of.upper);
            tiles.extend(labels.chunks_mut(len).enumerate().map(|(i, labels)| {
                // There is nothing to take of what is not kept.
                let (rows, of_groups) = (..labels.len(), ..labels.len() * groups);
                let lines = lines.split_off_mut(..labels.len() * steps(d)).unwrap_or_default();
                let packed = Packed { lines, norms: norms.split_off_mut(rows).unwrap_or_default() };
                let bounds = RowBounds {
                    lower: lower.split_off_mut(of_groups).unwrap_or_default(),
                    since: since.split_off_mut(of_groups).unwrap_or_default(),
                    upper: upper.split_off_mut(rows).unwrap_or_default(),
                    packed,
                };
                Rows { b, first: i * len, labels, bounds }
            }));
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
            let (all, ms) = (all.into_inner() as f64, start.elapsed().as_secs_f64() * 1e3);
            PassWork { products: share(products, all), moved: share(moved, all / k as f64), ms }
        });
        Ok(compared.into_inner())
    })
}

/// Lets `f` write what is kept of each problem.
fn with_kept<R>(kept: &KeptBounds, k: usize, f: impl FnOnce(Vec<Kept<'_>>) -> Result<R>) -> Result<R> {
    let KeptBounds { group, lower, since, upper, snapshots, fallen, .. } = kept;
    let each =
        |(group, since): (&mut [u32], &mut [u8]), [lower, upper, snapshots, fallen]: [&mut [f32]; 4]| {
            let (mut states, mut packed) = (kept.states(), kept.packed.lock().unwrap_or_else(PoisonError::into_inner));
            let b = states.len();
            let of_rows = parts(lower, b).zip(parts(since, b)).zip(parts(upper, b));
            let of_centroids = group.chunks_mut(k).zip(parts(fallen, b)).zip(parts(snapshots, b));
            let all = states.iter_mut().zip(&mut *packed).zip(of_rows.zip(of_centroids));
            let of_problem = all.map(|((state, packed), (((lower, since), upper), ((group, fallen), snapshots)))| {
                Kept { state, packed, group, lower, since, upper, snapshots, fallen }
            });
            f(of_problem.collect())
        };
    // Nobody else has these tensors, so that the order of their locks does not matter.
    write_kept(group, |group| {
        write_kept(since, |since| {
            write_kept(lower, |lower| {
                write_kept(upper, |upper| {
                    write_kept(snapshots, |snapshots| {
                        write_kept(fallen, |fallen| each((group, since), [lower, upper, snapshots, fallen]))
                    })
                })
            })
        })
    })??????
}

/// Lets `f` write a tensor, which Candle does not do if it has no elements.
fn write_kept<E: Stored, R>(t: &Tensor, f: impl FnOnce(&mut [E]) -> R) -> Result<R> {
    if t.elem_count() == 0 {
        return Ok(f(&mut []));
    }
    write(t, f)
}

/// So many parts of the same length, which may be none.
fn parts<E>(mut all: &mut [E], count: usize) -> impl Iterator<Item = &mut [E]> {
    let len = all.len() / count;
    (0..count).map(move |_| all.split_off_mut(..len).expect("a part of them"))
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
                let rounded = self.rounded.as_ref().zip(self.own.as_ref());
                let tile = SkipTile { tile, grouping, moved, rounded };
                return tile.label(&mut s.skip, labels, bounds);
            }
            Pass::Renew(grouping) => {
                // The next pass finds the distance to the own centroid where it is asked for.
                bounds.upper.fill(f32::INFINITY);
                bounds.since.fill(0);
                Some(Renewal::new(grouping, bounds.lower, before))
            }
            Pass::Plain => None,
        };
        let products = (labels.len() * k) as u64;
        let compared = match &self.rounded {
            Some(rounded) => {
                let s = s.rounded.get_or_insert_with(|| RoundedScratch::new(d));
                let source = match self.rows {
                    PackedBy::This => Source::Rows,
                    PackedBy::ThisForLater => Source::Keep(bounds.packed),
                    PackedBy::Earlier => Source::Kept(bounds.packed),
                };
                tile.label_rounded(rounded, s, labels, renewal, source)?
            }
            None => tile.label(s.plain.get_or_insert_with(|| Scratch::new([n, d, k])), labels, renewal),
        };
        Ok(Work { compared, products })
    }
}

impl Kept<'_> {
    /// Decides what a pass does with a problem, whose rows have these labels, and prepares its centroids for that.
    fn prepare<T: Element<Filter = f32>>(
        &mut self,
        views: &Views<'_, T>,
        amx: Option<Amx>,
        skip: SkipPlan,
        b: usize,
        labels: &[u32],
    ) -> Result<Prepared> {
        let &Views { c, metric, .. } = views;
        let (k, d) = (c.rows.n, c.rows.d);
        let Self { state, packed, group, lower, since, upper, snapshots, fallen } = self;
        state.passes += 1;
        let rounded = |full: &Centroids<f32>| amx.map(|amx| RoundedCentroids::new(full, amx)).transpose();
        let centre = state.packed.then(|| packed.centre.clone());
        let frame = centre.as_deref().map(|centre| (centre, packed.scale));
        if let Some(made) = state.made {
            let moved = Moved::new(c, b, &snapshots[..state.snapshots * k * d], group, fallen, skip.snapshots)?;
            let centroids = Centroids::in_groups(c, b, metric, frame, |j| group[j as usize])?;
            let share = needed(views.x, b, labels, (lower, since, upper), &moved)?;
            // A centroid too far out to be scored has no place in a group.
            if !centroids.apart().is_empty() {
                state.made = None;
            } else if skip.always || share <= PAYS {
                moved.take(snapshots, fallen);
                state.snapshots = usize::from(moved.now) + 1;
                let (grouping, rounded) = (Grouping::new(group, skip.groups, &centroids), rounded(&centroids)?);
                let own = rounded.as_ref().map(|_| OwnCentroids::new(&centroids)).transpose()?;
                let rows = PackedBy::Earlier;
                return Ok(Prepared { pass: Pass::Skip(grouping, moved), centroids, rounded, own, rows });
            } else if made + 1 == state.passes && share > NEARLY {
                // Bounds could not be tighter.
                (state.made, state.next) = (None, 2 * made);
            }
        }
        let late = state.passes >= FIRST;
        let mut rows = |state: &mut BoundsState, centroids: &Centroids<f32>| {
            if state.packed {
                return Ok(PackedBy::Earlier);
            }
            state.packed = late && amx.is_some();
            if !state.packed {
                return Ok(PackedBy::This);
            }
            packed::prepare(packed, labels.len(), centroids)?;
            Ok::<_, Error>(PackedBy::ThisForLater)
        };
        if skip.groups > 0 && (state.made.take().is_some() || late && state.passes >= state.next) {
            group_centroids(c, b, skip.groups, group)?;
            let centroids = Centroids::in_groups(c, b, metric, frame, |j| group[j as usize])?;
            if centroids.apart().is_empty() {
                snapshots.chunks_exact_mut(d).take(k).enumerate().for_each(|(j, to)| T::filter_row(c.row(b, j), to));
                fallen.fill(0.0);
                (state.made, state.snapshots) = (Some(state.passes), 1);
                let (grouping, rounded) = (Grouping::new(group, skip.groups, &centroids), rounded(&centroids)?);
                let rows = rows(state, &centroids)?;
                return Ok(Prepared { pass: Pass::Renew(grouping), centroids, rounded, own: None, rows });
            }
        }
        let centroids = Centroids::in_groups(c, b, metric, frame, |_| 0)?;
        let rows = rows(state, &centroids)?;
        Ok(Prepared { pass: Pass::Plain, rounded: rounded(&centroids)?, centroids, own: None, rows })
    }
}

/// The share of rows and groups that a sample of the rows needs.
fn needed<T: Element<Filter = f32>>(
    x: &View<'_, T>,
    b: usize,
    labels: &[u32],
    (lower, since, upper): (&[f32], &[u8], &[f32]),
    moved: &Moved,
) -> Result<f64> {
    let (n, groups) = (labels.len(), lower.len() / labels.len());
    let sampled = n.div_ceil(CPU_SAMPLE);
    let of_row = |i: usize| {
        // One of each run of rows, at no regular distance.
        let row = (i * CPU_SAMPLE + i.wrapping_mul(0x9e37_79b1) % CPU_SAMPLE).min(n - 1);
        let (label, of_groups, mut bounds) = (labels[row], row * groups..(row + 1) * groups, vec![0.0; groups]);
        moved.fall(&lower[of_groups.clone()], &since[of_groups], &mut bounds);
        if !Moved::any_needed(&bounds, Moved::cut(moved.after_move(upper[row], label))) {
            return 0;
        }
        let own = Measure { moved, row: x.row(b, row), label, scratch: &mut vec![0.0; x.rows.d] };
        let cut = Moved::cut(moved.between(pulp::Arch::new().dispatch(own), 0.0, 1.0).above);
        bounds.iter().filter(|&&bound| Moved::needed(bound, cut)).count()
    };
    let needed = host::reduce(sampled, x.rows.d + 8 * groups, of_row, |a, b| a + b)?;
    Ok(needed.unwrap_or(0) as f64 / (sampled * groups).max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{cpu::assign::assign_into, metric::Metric, request::Assignment, rows::Rows as View};
    use candle_core::{DType, Device, Tensor};
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// The number nearest to `v` that a dtype has.
    fn stored(values: &[f64], shape: [usize; 3], dtype: DType) -> (Tensor, Vec<f64>) {
        let tensor = Tensor::from_slice(values, &shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
        let values = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        (tensor, values)
    }

    /// Bounds and labels of several passes, by exact distances, while centroids move, jump, repeat each other and are lost.
    #[test]
    fn bounds_are_on_their_side_of_every_distance() {
        const GROUPS: usize = 6;
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        // Groups of one tile of centroids, of two and of three.
        let shapes = [[400, 45, 40], [400, 150, 5], [400, 230, 40], [90, 20, 33]];
        let offsets = [0.0, 300.0];
        for (dtype, [n, k, d]) in [DType::F32, DType::F16, DType::BF16].into_iter().flat_map(|t| shapes.map(|s| (t, s)))
        {
            for offset in offsets {
                let values: Vec<f64> = (0..n * d).map(|_| offset + rng.random_range(-4.0..4.0)).collect();
                let (x, xs) = stored(&values, [1, n, d], dtype);
                let (groups, near) = (GROUPS, None);
                // Some are taken again.
                let (keep_sums, on_gpu, packs, always, snapshots) = (false, false, true, true, 3);
                let skip = SkipPlan { keep_sums, on_gpu, groups, snapshots, packs, always, near };
                let kept = KeptBounds::new([1, n, k, d], skip, &Device::Cpu).unwrap();
                let labels = Tensor::zeros((1, n), DType::U32, &Device::Cpu).unwrap();
                let (mut c, mut settled, mut skipped) = (values[..k * d].to_vec(), 0, 0);
                for turn in 0..9 {
                    match turn {
                        5 => c.copy_within(20 * d / 2..20 * d / 2 + d, 3 * d),
                        6 => c[7 * d..8 * d].iter_mut().for_each(|v| *v -= 9.0),
                        7 => c[8 * d] = f64::NAN,
                        // Some in each group are restless.
                        _ => c.iter_mut().enumerate().for_each(|(i, v)| {
                            let far = [0.4, 0.02, 0.0, 0.05][i / d % 4];
                            *v += far * rng.random_range(-1.0..1.0);
                        }),
                    }
                    let (tensor, cs) = stored(&c, [1, k, d], dtype);
                    let (rows, centroids) = (View::new(&x).unwrap(), View::new(&tensor).unwrap());
                    let a = Assignment::new(&rows, &centroids, Metric::SquaredEuclidean).unwrap();
                    assign_into(Assignment { bounds: Some(&kept), ..a }, (&labels).into()).unwrap();

                    let square = |i: usize, j: usize| {
                        let pairs = xs[i * d..][..d].iter().zip(&cs[j * d..][..d]);
                        let square = pairs.fold(0.0, |s: f64, (x, c)| s + (x - c) * (x - c));
                        if square.is_nan() {
                            f64::INFINITY
                        } else {
                            square
                        }
                    };
                    let distance = |i: usize, j: usize| square(i, j).sqrt();
                    let f32s = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                    let (lower, upper, fallen) = (f32s(&kept.lower), f32s(&kept.upper), f32s(&kept.fallen));
                    let group = kept.group.flatten_all().unwrap().to_vec1::<u32>().unwrap();
                    let since = kept.since.flatten_all().unwrap().to_vec1::<u8>().unwrap();
                    let (snapshots, taken) = (f32s(&kept.snapshots), kept.states()[0].snapshots);
                    // Bounds of each snapshot have fallen by these exact distances.
                    let fell = |snapshot: usize, g: usize| {
                        let of_group = (0..k).filter(|&j| group[j] as usize == g);
                        let far = of_group.map(|j| {
                            let before = &snapshots[(snapshot * k + j) * d..][..d];
                            let pairs = cs[j * d..][..d].iter().zip(before).map(|(c, &b)| c - f64::from(b));
                            pairs.map(|far| far * far).sum::<f64>().sqrt()
                        });
                        let before = if snapshot + 1 == taken { f64::from(fallen[g]) } else { 0.0 };
                        far.fold(0.0, |most: f64, far| if far > most { far } else { most }) + before
                    };
                    let fallen: Vec<Vec<f64>> = (0..taken).map(|s| (0..GROUPS).map(|g| fell(s, g)).collect()).collect();
                    for (i, &label) in labels.flatten_all().unwrap().to_vec1::<u32>().unwrap().iter().enumerate() {
                        let label = label as usize;
                        let nearest = (0..k).min_by(|&a, &b| square(i, a).total_cmp(&square(i, b))).unwrap();
                        let what = format!("{dtype:?} {n} {k} {d} offset {offset} turn {turn} row {i}");
                        assert_eq!(label, nearest, "{what}");
                        if kept.states()[0].made.is_none() {
                            continue;
                        }
                        settled += usize::from(upper[i].is_finite());
                        assert!(f64::from(upper[i]) >= distance(i, label), "{what}: upper {}", upper[i]);
                        for j in (0..k).filter(|&j| j != label) {
                            let g = group[j] as usize;
                            let bound =
                                f64::from(lower[i * GROUPS + g]) - fallen[usize::from(since[i * GROUPS + g])][g];
                            let far = distance(i, j);
                            assert!(bound <= far, "{what}: {bound} for {far} of centroid {j} in group {g}");
                            skipped += usize::from(bound > f64::from(upper[i]));
                        }
                    }
                }
                assert!(settled > n && skipped > n, "{dtype:?} {n} {k} {d} {offset}: {settled} and {skipped} are few");
            }
        }
    }
}
