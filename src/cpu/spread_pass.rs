//! Passes of k-means++ over rows, each of which meets several seeds at once.
//!
//! The seeds of a pass stay in a cache, and a row comes from memory once for all of them. Where there are many passes, and a matrix unit, most
//! seeds are found to be too far by that, and a row itself is not read (`spread_filter.rs`).

use super::{
    amx::Amx,
    lines::PAIR,
    scalar::Scalar,
    spread::{Measure, Scratch, Seeds},
    spread_filter::{Filter, Listed, RoundedRows},
    tensors::{prefetch, Element, View},
};
use crate::{
    error::Result,
    host,
    kept::KeptRows,
    metric::Metric,
    spread::{postponed, worth_rounding, LANES},
};
use pulp::NullaryFnOnce;

/// Rows of a task are whole tiles of so many.
const TILE: usize = PAIR;

/// Tasks of a problem whose rows list seeds, at most: each has lists of its own.
const LISTS: usize = 64;

/// The rows of all problems as a filter of seeds takes them, if so many passes are worth it and there is what filters.
pub(super) fn kept_rounded<'k, T: Element>(
    kept: &'k KeptRows,
    x: &View<'_, T>,
    norms: Option<&[f64]>,
    metric: Metric,
    passes: usize,
) -> Result<Option<&'k RoundedRows>> {
    let amx = Amx::find().filter(|_| worth_rounding(metric, x.rows.d, passes));
    let Some(amx) = amx else { return Ok(None) };
    kept.get_or_make(|| {
        let point =
            |b: usize, i: usize, out: &mut [[T::Filter; LANES]]| Measure::new(x, b, norms, metric).widened(i, out);
        RoundedRows::new(amx, [x.rows.b, x.rows.n, x.rows.d], point)
    })
}

/// The rows of a problem, and the seeds that they meet.
pub(super) struct Meeting<'a, T: Element> {
    measure: Measure<'a, T>,
    seeds: Seeds<T::Filter>,
    /// What finds seeds that are too far to count.
    filter: Option<Filter<'a>>,
}

impl<'a, T: Element> Meeting<'a, T> {
    pub fn new(measure: Measure<'a, T>, seeds: Vec<u32>, rounded: Option<&'a RoundedRows>) -> Result<Self> {
        let filter = rounded.map(|rounded| rounded.filter(measure.b, &seeds)).transpose()?;
        Ok(Self { seeds: measure.seeds(seeds), measure, filter })
    }

    /// Steps that a row takes, about.
    fn steps(&self) -> usize {
        self.measure.x.rows.d * (1 + self.seeds.rows.len() / 4)
    }
}

/// The rows of each problem meet its seeds, which have arrived at `times`: the distances of `rows`, `(b, 2, n)`, to the nearest seed, which are not
/// there at the `start`, become those with all of these, -1 of a seed, and the arrivals of rows whose distance falls are postponed. Problems are
/// in ascending order.
pub(super) fn lower<T: Element>(
    meetings: &[Meeting<'_, T>],
    times: &[Vec<f64>],
    weights: Option<&[f64]>,
    start: bool,
    rows: &mut [f64],
) -> Result<()> {
    let Some(first) = meetings.first() else { return Ok(()) };
    let (n, steps) = (first.measure.x.rows.n, meetings.iter().map(Meeting::steps).max().unwrap_or(0));
    let part = host::items_per_task(steps).next_multiple_of(TILE);
    let mut problems = rows.chunks_mut(2 * n).enumerate();
    let mut tasks = host::buffer("k-means++", meetings.len() * n.div_ceil(part))?;
    for (meeting, times) in meetings.iter().zip(times) {
        let Some((_, rows)) = problems.find(|(b, _)| *b == meeting.measure.b) else { continue };
        let (nearest, arrivals) = rows.split_at_mut(n);
        let parts = nearest.chunks_mut(part).zip(arrivals.chunks_mut(part)).enumerate();
        tasks.extend(parts.map(|(i, (nearest, arrivals))| (meeting, &times[..], i * part, nearest, arrivals)));
    }
    let pass = |room: &mut Room<_>, (meeting, times, first, nearest, arrivals): (&Meeting<'_, T>, _, _, _, _)| {
        pulp::Arch::new().dispatch(Lower { meeting, times, first, weights, start, room, nearest, arrivals });
        Ok(())
    };
    host::for_each(tasks, part * steps, || Room::new(meetings), pass)
}

/// A row that is nearer to a seed than to those before.
#[derive(Clone, Copy)]
pub(super) struct Nearer {
    pub row: u32,
    /// The number of the seed.
    seed: u32,
    pub distance: f64,
}

/// All such rows of a problem.
pub(super) struct NearerRows {
    /// Those of each part of the rows, by seeds.
    parts: Vec<Vec<Nearer>>,
}

impl NearerRows {
    /// Those of a seed.
    pub fn of(&self, seed: usize) -> impl Iterator<Item = &Nearer> {
        self.parts.iter().flat_map(move |part| {
            let start = part.partition_point(|nearer| (nearer.seed as usize) < seed);
            part[start..].iter().take_while(move |nearer| nearer.seed as usize == seed)
        })
    }
}

/// The rows of each problem meet its seeds: those that are nearer to one than `rows`, `(b, 2, n)`, say, but for seeds themselves.
pub(super) fn list<T: Element>(
    meetings: &[Meeting<'_, T>],
    weights: Option<&[f64]>,
    rows: &[f64],
) -> Result<Vec<NearerRows>> {
    let Some(first) = meetings.first() else { return Ok(vec![]) };
    let (n, steps) = (first.measure.x.rows.n, meetings.iter().map(Meeting::steps).max().unwrap_or(0));
    let part = host::items_per_task(steps).max(n.div_ceil(LISTS)).next_multiple_of(TILE);
    let parts = n.div_ceil(part);
    let mut lists = host::filled("k-means++", meetings.len() * parts, vec![])?;
    let mut tasks = host::buffer("k-means++", lists.len())?;
    tasks.extend(lists.iter_mut().enumerate().map(|(i, list)| {
        let (meeting, first) = (&meetings[i / parts], i % parts * part);
        (meeting, first, &rows[2 * meeting.measure.b * n..][first..n.min(first + part)], list)
    }));
    let pass = |room: &mut Room<_>, (meeting, first, nearest, list): (_, _, _, &mut Vec<Nearer>)| {
        pulp::Arch::new().dispatch(List { meeting, first, weights, room, nearest, list })?;
        list.sort_unstable_by_key(|nearer| (nearer.seed, nearer.row));
        Ok(())
    };
    host::for_each(tasks, part * steps, || Room::new(meetings), pass)?;
    let mut lists = lists.into_iter();
    Ok(meetings.iter().map(|_| NearerRows { parts: lists.by_ref().take(parts).collect() }).collect())
}

/// Room for what rows meet.
struct Room<S> {
    scratch: Scratch<S>,
    /// All seeds, and those that each row of a tile has to meet.
    all: Vec<u32>,
    listed: Listed,
}

impl<S: Scalar> Room<S> {
    fn new<T: Element<Filter = S>>(meetings: &[Meeting<'_, T>]) -> Self {
        let seeds = meetings.iter().map(|meeting| meeting.seeds.rows.len()).max().unwrap_or(0);
        let d = meetings.first().map_or(0, |meeting| meeting.measure.x.rows.d);
        Self { scratch: Scratch::new(d, seeds), all: (0..seeds as u32).collect(), listed: Listed::default() }
    }
}

/// Some rows, whose distances are lowered.
struct Lower<'a, 'm, T: Element> {
    meeting: &'a Meeting<'m, T>,
    times: &'a [f64],
    first: usize,
    weights: Option<&'a [f64]>,
    start: bool,
    room: &'a mut Room<T::Filter>,
    nearest: &'a mut [f64],
    arrivals: &'a mut [f64],
}

impl<T: Element> NullaryFnOnce for Lower<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { meeting, times, first, weights, start, room, nearest, arrivals } = self;
        for (tile, (nearest, arrivals)) in nearest.chunks_mut(TILE).zip(arrivals.chunks_mut(TILE)).enumerate() {
            let (first, mut before) = (first + tile * TILE, [f64::INFINITY; TILE]);
            let before = &mut before[..nearest.len()];
            if !start {
                before.copy_from_slice(nearest);
            }
            tile_of_rows(meeting, first, before, weights, room, |i, listed, found| {
                let (near, arrival) = (&mut nearest[i - first], &mut arrivals[i - first]);
                for &t in listed {
                    let (time, found) = (times[t as usize], found[t as usize]);
                    if start {
                        // Time begins with the first seed: what is left of a wait may be too short to be added to what has been.
                        (*arrival, *near) = (postponed(*arrival - time, 0.0, 1.0, found), found);
                    } else if found < *near {
                        (*arrival, *near) = (postponed(*arrival, time, *near, found), found);
                    }
                }
            });
            let rows = first..first + nearest.len();
            for &seed in meeting.seeds.rows.iter().filter(|&&seed| rows.contains(&(seed as usize))) {
                nearest[seed as usize - first] = -1.0;
            }
        }
    }
}

/// Some rows, which list the seeds that are nearer.
struct List<'a, 'm, T: Element> {
    meeting: &'a Meeting<'m, T>,
    first: usize,
    weights: Option<&'a [f64]>,
    room: &'a mut Room<T::Filter>,
    nearest: &'a [f64],
    list: &'a mut Vec<Nearer>,
}

impl<T: Element> NullaryFnOnce for List<'_, '_, T> {
    type Output = Result<()>;

    #[inline(always)]
    fn call(self) -> Result<()> {
        let Self { meeting, first, weights, room, nearest, list } = self;
        let seeds = &meeting.seeds.rows;
        for (tile, own) in nearest.chunks(TILE).enumerate() {
            let first = first + tile * TILE;
            host::reserve("k-means++", list, own.len() * seeds.len())?;
            tile_of_rows(meeting, first, own, weights, room, |i, listed, found| {
                let nearer =
                    listed.iter().filter(|&&t| found[t as usize] < own[i - first] && seeds[t as usize] as usize != i);
                list.extend(nearer.map(|&seed| Nearer { row: i as u32, seed, distance: found[seed as usize] }));
            });
        }
        Ok(())
    }
}

/// Calls `meets` with each row of a tile that counts, the seeds that it has met, and what has been found of all.
#[inline(always)]
fn tile_of_rows<T: Element>(
    meeting: &Meeting<'_, T>,
    first: usize,
    nearest: &[f64],
    weights: Option<&[f64]>,
    room: &mut Room<T::Filter>,
    mut meets: impl FnMut(usize, &[u32], &[f64]),
) {
    let Meeting { measure, seeds, filter } = meeting;
    let (b, n, count) = (measure.b, measure.x.rows.n, seeds.rows.len());
    // Nothing is drawn by the distance of others.
    let counts = |i: usize, near: f64| near > 0.0 && weights.is_none_or(|weights| weights[b * n + i] > 0.0);
    let Room { scratch, all, listed } = room;
    if let Some(filter) = filter {
        let near = (first..).zip(nearest).map(|(i, &near)| {
            counts(i, near).then_some(if measure.metric == Metric::Cosine { 2.0 * near } else { near })
        });
        filter.list(first, near, listed);
    }
    for (i, &near) in (first..).zip(nearest) {
        let ahead = match filter {
            Some(_) => listed.next(i + 1 - first).map(|next| first + next),
            None => Some(i + 1),
        };
        if let Some(ahead) = ahead.filter(|&ahead| ahead < n) {
            prefetch(measure.x.row(b, ahead));
        }
        let own = if filter.is_some() { listed.of(i - first) } else { &all[..count] };
        if counts(i, near) && !own.is_empty() {
            meets(i, own, measure.to_seeds(i, near, seeds, own, scratch));
        }
    }
}
