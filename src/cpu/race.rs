//! The race of k-means++ among rows, and their arrivals one after another.
//!
//! Each row is a Poisson process whose rate is the row's probability, and is drawn when that arrives: so rows are drawn one after another, each
//! by its probability, and the first draw of all is an exponential race. A seed that comes nearer to a row leaves a share of its rate, and what is left
//! of its wait grows by the inverse of that: a process counted by the integral of its rate is one of rate 1 (the time-rescaling theorem; Brown,
//! Barbieri, Ventura, Kass and Frank 2002). Rates only fall, so that of the rows whose arrivals are next others cannot come before
//! the last one, whatever seeds are chosen meanwhile.

use crate::{
    error::Result,
    host,
    rng::{exponential, Draw, RACED},
    spread::{class, postponed},
};
use std::cmp::Ordering;

/// Steps that a row of a race takes.
const RACE_STEPS: usize = 2;

/// The rows that arrive next.
pub(super) struct Drawn {
    /// When they do, of equal times the lower row first.
    pub next: Vec<(f64, u32)>,
    /// The largest that a row is drawn by.
    pub most: f64,
}

/// The rows of each of these problems that arrive next, `count` at most: those that are drawn by what they weigh, or, where there is none,
/// any but seeds. `rows` is `(b, 2, n)`: the distances to the nearest seed, and the arrivals.
pub(super) fn race(
    problems: &[usize],
    [n, count]: [usize; 2],
    rows: &[f64],
    weights: Option<&[f64]>,
) -> Result<Vec<Drawn>> {
    let part_rows = host::items_per_task(RACE_STEPS).min(n);
    let parts = n.div_ceil(part_rows);
    let part = |task: usize| {
        let (b, first) = (problems[task / parts], task % parts * part_rows);
        let (nearest, arrivals) = rows[2 * b * n..][..2 * n].split_at(n);
        let mut drawn = Drawn { next: Vec::with_capacity(count + 1), most: 0.0 };
        for row in first..n.min(first + part_rows) {
            let (near, weight) = (nearest[row], weights.map_or(1.0, |weights| weights[b * n + row]));
            let p = near * weight;
            drawn.most = if near > 0.0 && p > drawn.most { p } else { drawn.most };
            let time = class(near, weight).unwrap_or(arrivals[row]);
            let full = drawn.next.len() == count;
            if !full || drawn.next.last().is_some_and(|last| time < last.0) {
                // Rows come in ascending order, so that one goes behind all of its time.
                let place = drawn.next.partition_point(|other| other.0 <= time);
                drawn.next.insert(place, (time, row as u32));
                drawn.next.truncate(count);
            }
        }
        drawn
    };
    let all = host::map("k-means++", problems.len() * parts, part_rows * RACE_STEPS, part)?;
    let of_problem = |parts: &[Drawn]| {
        let mut next: Vec<_> = parts.iter().flat_map(|part| part.next.iter().copied()).collect();
        next.sort_unstable_by(|&x, &y| order(x, y));
        next.truncate(count);
        let last = if next.first().is_some_and(|first| first.0 <= RACED) { RACED } else { f64::MAX };
        next.retain(|&(time, _)| time <= last);
        Drawn { next, most: parts.iter().map(|part| part.most).fold(0.0, f64::max) }
    };
    Ok(all.chunks(parts).map(of_problem).collect())
}

fn order(x: (f64, u32), y: (f64, u32)) -> Ordering {
    x.0.total_cmp(&y.0).then(x.1.cmp(&y.1))
}

/// The rows that a race has drawn, as they arrive.
pub(super) struct Arrivals {
    rows: Vec<Waiting>,
    b: usize,
    draw: Draw,
    /// When the last row has arrived.
    now: f64,
    /// Arrivals after this one may be those of other rows; none if there are no others.
    last: Option<(f64, u32)>,
    /// Whether these are rows of no probability, which arrive in their order.
    certain: bool,
}

struct Waiting {
    row: u32,
    arrival: f64,
    /// The times that it has waited again.
    again: u64,
    /// The distance to the nearest seed.
    near: f64,
    waits: bool,
}

impl Arrivals {
    /// Of the first `count` rows that a race has drawn in problem `b`, after `tried` ones, which do not wait. `near(row)` is the distance of a row to
    /// the nearest seed.
    pub fn new(drawn: &Drawn, count: usize, tried: &[u32], b: usize, draw: Draw, near: impl Fn(u32) -> f64) -> Self {
        let next = &drawn.next[..count.min(drawn.next.len())];
        let waiting = |row, arrival, waits| Waiting { row, arrival, again: 0, near: near(row), waits };
        let others = next.iter().filter(|(_, row)| !tried.contains(row)).map(|&(time, row)| waiting(row, time, true));
        let rows = tried.iter().map(|&row| waiting(row, 0.0, false)).chain(others).collect();
        let certain = next.first().is_some_and(|first| first.0 > RACED);
        Self { rows, b, draw, now: 0.0, last: next.last().copied().filter(|_| next.len() == count), certain }
    }

    /// The rows that wait, or have arrived.
    pub fn rows(&self) -> impl Iterator<Item = u32> + '_ {
        self.rows.iter().map(|waiting| waiting.row)
    }

    /// The numbers of those that wait.
    pub fn waiting(&self) -> Vec<usize> {
        (0..self.rows.len()).filter(|&i| self.rows[i].waits).collect()
    }

    /// Whether no row has a probability, so that one is as good as another.
    pub fn certain(&self) -> bool {
        self.certain
    }

    /// Whether all rows that may arrive are among these.
    pub fn complete(&self) -> bool {
        self.last.is_none()
    }

    /// When the last row has arrived.
    pub fn now(&self) -> f64 {
        self.now
    }

    /// The distance of row `i` to the nearest seed.
    pub fn near(&self, i: usize) -> f64 {
        self.rows[i].near
    }

    /// The number of the row that arrives next, which waits no longer; none if it may be another row, or there is none.
    pub fn next(&mut self) -> Option<usize> {
        let arrival = |waiting: &Waiting| (waiting.arrival, waiting.row);
        let drawn = |waiting: &Waiting| waiting.waits && (self.certain || waiting.near > 0.0);
        let waiting = self.rows.iter().enumerate().filter(|(_, waiting)| drawn(waiting));
        let (i, next) = waiting.min_by(|(_, x), (_, y)| order(arrival(x), arrival(y)))?;
        if self.last.is_some_and(|last| order(arrival(next), last) == Ordering::Greater) {
            return None;
        }
        self.now = next.arrival;
        self.rows[i].waits = false;
        Some(i)
    }

    /// Says that the distance of row `i` to the nearest seed is `near` now.
    pub fn lower(&mut self, i: usize, near: f64) {
        let Waiting { arrival, near: before, .. } = &mut self.rows[i];
        if near < *before {
            *arrival = postponed(*arrival, self.now, *before, near);
            *before = near;
        }
    }

    /// Lets row `i`, of this weight, wait again: till when.
    pub fn again(&mut self, i: usize, weight: f64) -> f64 {
        let (now, draw, b) = (self.now, self.draw, self.b);
        let Waiting { row, arrival, again, near, waits } = &mut self.rows[i];
        (*again, *waits) = (*again + 1, true);
        *arrival = (now + exponential(draw.beside(*again), b, *row as usize) / (*near * weight)).min(RACED);
        *arrival
    }
}
