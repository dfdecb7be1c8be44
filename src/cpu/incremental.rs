//! Updates of sums that are there already: rows that have left a cluster are taken away from it, and added to the one that they have come
//! to. Sums are integers, so they have the bits of those that begin with nothing.

use super::{
    means::{divided, write_centroid},
    sums::{Scratch, Sorted, Sums, Totals, UNITS},
    tensors::Element,
};
use crate::{
    error::Result,
    fixed::{quantise, Scaled},
    host,
    kept::KeptSums,
    request::Reduction,
    tiles::CPU_CHANGED,
};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// The rows that have changed their cluster: those that have come to each cluster, and then those that have left each.
pub(super) struct Changes {
    /// `(b, n)`, of which only the first are rows.
    pub order: Vec<u32>,
    /// `(b, 2 k + 1)`.
    pub offsets: Vec<u32>,
    /// True of a problem whose sums are known and of whose rows so few have changed that they are added alone.
    pub few: Vec<bool>,
}

impl Changes {
    /// Compares labels with those of the sums, of problems that are not over, and notes them.
    pub fn new(kept: &mut KeptSums, labels: &[u32], [b, n, k]: [usize; 3], active: &[bool]) -> Result<Self> {
        let (mut order, mut offsets) = (host::filled("update", b * n, 0)?, host::filled("update", b * (2 * k + 1), 0)?);
        let (mut few, changed) = (host::filled("update", b, false)?, AtomicUsize::new(0));
        let sorted = order.chunks_mut(n).zip(offsets.chunks_mut(2 * k + 1)).zip(&mut few);
        let problems = sorted.zip(kept.labels.chunks_mut(n).zip(labels.chunks(n))).zip(active.iter().zip(&kept.known));
        type Sorting<'a> = ((&'a mut [u32], &'a mut [u32]), &'a mut bool);
        type Labels<'a> = (&'a mut [u32], &'a [u32]);
        let sort =
            |_: &mut (), ((((order, offsets), few), (before, now)), (_, &known)): ((Sorting<'_>, Labels<'_>), _)| {
                let of_problem = before.iter().zip(now).filter(|(before, now)| before != now).count();
                changed.fetch_add(of_problem, Relaxed);
                *few = known && of_problem <= n / CPU_CHANGED;
                if *few {
                    sort_changed(before, now, k, order, offsets);
                }
                before.copy_from_slice(now);
                Ok(())
            };
        host::for_each(problems.filter(|(_, (&active, _))| active).collect(), n + k, || (), sort)?;
        kept.changed = changed.into_inner();
        Ok(Self { order, offsets, few })
    }

    /// Makes the sums and centroids of those problems what all rows would, and says that they are no longer among those of which all rows
    /// are to be added. `rows` has twice as many clusters, in the order of the changes.
    pub fn apply<'a, T: Element>(
        &self,
        rows: &Sorted<'_, T>,
        kept: &mut KeptSums,
        reduction: Reduction,
        whole: &mut [bool],
        centroids: impl Iterator<Item = (&'a mut [T], &'a mut f64)>,
    ) -> Result<()> {
        let (k, d) = (rows.k / 2, rows.x.rows.d);
        let parts = |i: usize| [(i % k, 1), (k + i % k, -1)];
        let has_changed = |i: usize| self.few[i / k] && parts(i).iter().any(|&(j, _)| !rows.range(i / k, j).is_empty());
        let odd: Vec<_> = self.few.iter().map(|_| AtomicBool::new(false)).collect();
        let add = |scratch: &mut Scratch, (i, to): (usize, &mut [i128])| {
            for (part, sign) in parts(i) {
                if let Some((sums, all)) = rows.sums(i / k, part, scratch)? {
                    let weight = match reduction {
                        Reduction::Mean => rows.weight(i / k, part, all).0,
                        _ => Sums::new(1),
                    };
                    odd[i / k].fetch_or(!add_to_kept(rows, i / k, (&sums, &weight), sign, to), Relaxed);
                }
            }
            Ok(())
        };
        let sums = kept.sums.chunks_mut(d + 1).enumerate().filter(|&(i, _)| has_changed(i)).collect();
        // A row comes to one cluster and leaves another.
        let of_cluster = 2 * kept.changed / self.few.len().max(1) / k;
        host::for_each(sums, d * (4 + of_cluster), || Scratch::new(d), add)?;
        for (b, odd) in odd.into_iter().enumerate().filter(|&(b, _)| self.few[b]) {
            // Terms of which no integer of the scale has all are none of the sums that are known: all are added up.
            (kept.known[b], whole[b]) = (!odd.into_inner(), false);
            whole[b] = !kept.known[b];
        }
        let all = centroids.zip(kept.sums.chunks(d + 1)).enumerate();
        type Centroid<'a, T> = (&'a mut [T], &'a mut f64);
        let replace = |_: &mut (), (i, ((row, shift), sums)): (usize, (Centroid<'_, T>, &[i128]))| {
            let (b, (columns, weight)) = (i / k, sums.split_at(d));
            let scale = rows.grid(rows.max_abs[b]).scale;
            let of_weight = rows.max_weight.map_or(UNITS, |most| rows.grid(most[b])).scale;
            let columns = columns.iter().map(|&sum| Scaled::of(sum, scale)).collect();
            if let Some(values) = divided(reduction, columns, || Scaled::of(weight[0], of_weight)) {
                *shift = write_centroid(row, values);
            }
            Ok(())
        };
        let changed = all.filter(|&(i, _)| !whole[i / k] && has_changed(i)).collect();
        host::for_each(changed, 8 * d, || (), replace)
    }
}

/// Sorts the rows that have changed their cluster by the one that they have come to, and once more by the one that they have left.
fn sort_changed(before: &[u32], now: &[u32], k: usize, order: &mut [u32], offsets: &mut [u32]) {
    let changed = || before.iter().zip(now).zip(0u32..).filter(|((before, now), _)| before != now);
    for ((&before, &now), _) in changed() {
        offsets[now as usize + 1] += 1;
        offsets[k + before as usize + 1] += 1;
    }
    (0..2 * k).for_each(|j| offsets[j + 1] += offsets[j]);
    let mut next = offsets[..2 * k].to_vec();
    for ((&before, &now), row) in changed() {
        for part in [now as usize, k + before as usize] {
            order[next[part] as usize] = row;
            next[part] += 1;
        }
    }
}

/// Adds sums of some rows to those that are kept of a cluster, or takes them away. They are whole numbers of the scale if this says so;
/// otherwise what is kept is of no use.
pub(super) fn add_to_kept<T: Element>(
    rows: &Sorted<'_, T>,
    b: usize,
    (sums, weight): (&Totals, &Sums),
    sign: i128,
    to: &mut [i128],
) -> bool {
    // Without a bound on its terms each cluster has a scale of its own.
    if rows.max_abs[b] == f64::INFINITY {
        return false;
    }
    let (columns, of_weight) = to.split_at_mut(rows.x.rows.d);
    let [weight] = &weight.0[..] else { return false };
    of_weight[0] += sign * weight[0];
    match sums {
        Totals::Digits(sums, _) => {
            let [first] = &sums.0[..] else { return false };
            columns.iter_mut().zip(first).for_each(|(to, sum)| *to += sign * sum);
            true
        }
        Totals::Exact(sums) => {
            let scale = rows.grid(rows.max_abs[b]).scale;
            columns.iter_mut().zip(sums).fold(true, |whole, (to, &sum)| {
                let sum = quantise(sum, scale);
                *to += sign * sum.unwrap_or(0);
                whole & sum.is_some()
            })
        }
    }
}
