//! How far a stream has come, for whoever shows it.

use crate::{
    kmeans::{EmptyClusters, Init, KMeans, PARALLEL_PASSES},
    lloyd::feed::Pass,
    metric::Metric,
};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

/// The shortest time from one report to the next: what an eye follows costs no pass anything.
const INTERVAL: Duration = Duration::from_millis(100);

/// The progress of a pass over a source, as [`StreamOptions::on_progress`](crate::StreamOptions::on_progress) hears of it. Its
/// [`Display`](fmt::Display) is a line of text.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamProgress {
    /// The pass that goes on.
    pub pass: Pass,
    /// Rows that it has been given to work on; a GPU may still be at the last of them.
    pub rows: u64,
    /// Rows that it has in all.
    pub of_rows: u64,
    /// Bytes of rows that were read for it, as [`Source::read`](crate::Source::read) gives them. Rows that stay on the device are not read.
    pub bytes: u64,
    /// The time since it began.
    pub elapsed: Duration,
    /// The time that the pass before it took.
    last_pass: Option<Duration>,
    /// The most passes that come after it.
    passes_left: Option<u64>,
}

impl StreamProgress {
    /// Rows of this pass in a second, on average.
    pub fn rows_per_second(&self) -> f64 {
        self.rows as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// Bytes that this pass reads in a second, on average.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// The time that the rest of this pass takes, if its rows take what those before them took.
    pub fn pass_left(&self) -> Option<Duration> {
        let share = (self.of_rows - self.rows) as f64 / self.rows as f64;
        Duration::try_from_secs_f64(self.elapsed.as_secs_f64() * share).ok()
    }

    /// The time that all of it takes from now on, at most: if each pass takes what the last one took, and no run converges before
    /// [`max_iters`](KMeans::max_iters). None where that sets no limit.
    pub fn left(&self) -> Option<Duration> {
        let pass_left = self.pass_left()?;
        let pass = self.last_pass.unwrap_or(self.elapsed + pass_left).as_secs_f64();
        pass_left.checked_add(Duration::try_from_secs_f64(pass * self.passes_left? as f64).ok()?)
    }
}

impl fmt::Display for StreamProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pass, rows, of_rows, .. } = self;
        let rate = self.rows_per_second();
        write!(f, "{pass}: {rows} of {of_rows} rows, {rate:.0} rows/s, {:.1} MB/s", self.bytes_per_second() / 1e6)?;
        let seconds = |left: Option<Duration>| left.map(|left| left.as_secs_f64());
        if let Some(left) = seconds(self.pass_left()) {
            write!(f, ", {left:.1} s left")?;
        }
        match (self.passes_left, seconds(self.left())) {
            (Some(1..), Some(left)) => write!(f, ", of all at most {left:.1} s"),
            _ => Ok(()),
        }
    }
}

/// A callback of [`StreamOptions::on_progress`](crate::StreamOptions::on_progress).
#[derive(Clone)]
pub(crate) struct OnProgress(Arc<dyn Fn(&StreamProgress) + Send + Sync>);

impl OnProgress {
    pub fn new(f: impl Fn(&StreamProgress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(f))
    }
}

impl fmt::Debug for OnProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fn(&StreamProgress)")
    }
}

/// The passes that a call makes, at most but for those that look for rows for empty clusters, or for as many distinct ones as there are
/// clusters to start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Passes {
    variance: bool,
    /// Of a run, before its iterations.
    of_start: u64,
    runs: u64,
    /// None where there is no limit.
    max_iters: Option<u64>,
    of_iteration: u64,
}

impl Passes {
    /// The one pass over rows that are only labelled, or that a mini-batch takes.
    pub const ONE: Self = Self { variance: false, of_start: 0, runs: 1, max_iters: Some(0), of_iteration: 1 };

    pub fn of_fit(settings: &KMeans) -> Self {
        Self {
            variance: settings.tol > 0.0 && settings.metric != Metric::Cosine,
            of_start: match settings.init {
                Init::KMeansParallel => PARALLEL_PASSES,
                _ => 0,
            },
            runs: settings.n_init as u64,
            max_iters: Some(settings.max_iters as u64).filter(|&max_iters| max_iters < u64::from(u32::MAX)),
            of_iteration: 1 + u64::from(settings.empty == EmptyClusters::Relocate),
        }
    }

    /// The most there are.
    pub fn all(self) -> Option<u64> {
        self.after(Pass::Bounds)?.checked_add(1)
    }

    /// The most that come after this one.
    fn after(self, pass: Pass) -> Option<u64> {
        let of_iterations = |count: u64| count.checked_mul(self.of_iteration)?.checked_add(1);
        let of_runs = |runs: u64| match runs {
            0 => Some(0),
            _ => runs.checked_mul(of_iterations(self.max_iters?)?.checked_add(self.of_start)?),
        };
        let iterations_after = |run: usize, iteration: usize| {
            of_iterations(self.max_iters?.saturating_sub(iteration as u64))?
                .checked_add(of_runs(self.runs - 1 - run as u64)?)
        };
        match pass {
            Pass::Bounds => of_runs(self.runs)?.checked_add(u64::from(self.variance)),
            Pass::Variance => of_runs(self.runs),
            Pass::Start { run, pass } => {
                iterations_after(run, 0)?.checked_add(self.of_start.saturating_sub(pass as u64))
            }
            Pass::Iteration { run, iteration, .. } => {
                iterations_after(run, iteration)?.checked_add(self.of_iteration - 1)
            }
            Pass::Relocation { run, iteration, .. } => iterations_after(run, iteration),
            Pass::Labels { run } => of_runs(self.runs - 1 - run as u64),
            Pass::Epoch { epoch, epochs } => Some((epochs - epoch) as u64),
        }
    }
}

impl fmt::Display for Passes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, ", Pass::Bounds)?;
        if self.variance {
            write!(f, "{}, ", Pass::Variance)?;
        }
        if self.runs > 1 {
            write!(f, "{} times ", self.runs)?;
        }
        if self.of_start > 0 {
            write!(f, "{} of k-means|| and ", self.of_start)?;
        }
        match self.max_iters {
            Some(max_iters) => write!(f, "at most {max_iters} iterations")?,
            None => write!(f, "iterations without a limit")?,
        }
        if self.of_iteration > 1 {
            write!(f, " of {} passes", self.of_iteration)?;
        }
        write!(f, ", {}", Pass::Labels { run: 0 })
    }
}

/// The one who tells the callback, if there is one.
pub(super) struct Reporter {
    callback: Option<OnProgress>,
    passes: Passes,
    row_bytes: u64,
    progress: StreamProgress,
    began: Instant,
    /// When the callback was last called.
    told: Option<Instant>,
}

impl Reporter {
    pub fn new(callback: Option<&OnProgress>, of_rows: u64, row_bytes: u64, passes: Passes) -> Self {
        let (pass, elapsed) = (Pass::Bounds, Duration::ZERO);
        let progress = StreamProgress { pass, rows: 0, of_rows, bytes: 0, elapsed, last_pass: None, passes_left: None };
        Self { callback: callback.cloned(), passes, row_bytes, progress, began: Instant::now(), told: None }
    }

    /// A pass begins.
    pub fn begin(&mut self, pass: Pass) {
        self.begin_at(pass, Instant::now());
    }

    /// So many more rows are done, which were read for this pass or were on the device.
    pub fn add(&mut self, rows: usize, read: bool) {
        if self.callback.is_some() {
            self.add_at(rows, read, Instant::now());
        }
    }

    fn begin_at(&mut self, pass: Pass, now: Instant) {
        let progress = &mut self.progress;
        progress.last_pass = (progress.rows > 0).then(|| now - self.began);
        (progress.pass, progress.passes_left) = (pass, self.passes.after(pass));
        (progress.rows, progress.bytes, self.began) = (0, 0, now);
    }

    fn add_at(&mut self, rows: usize, read: bool, now: Instant) {
        let progress = &mut self.progress;
        progress.rows += rows as u64;
        progress.bytes += u64::from(read) * rows as u64 * self.row_bytes;
        progress.elapsed = now - self.began;
        let ended = progress.rows == progress.of_rows && progress.passes_left == Some(0);
        if ended || self.told.is_none_or(|told| now - told >= INTERVAL) {
            self.told = Some(now);
            if let Some(OnProgress(f)) = &self.callback {
                f(progress);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn reports_are_apart_and_say_what_is_left() {
        let heard = Arc::new(Mutex::new(vec![]));
        let log = heard.clone();
        let on_progress = OnProgress::new(move |progress| log.lock().unwrap().push(progress.clone()));
        let passes = Passes::of_fit(&KMeans::new(2).tol(0.0).max_iters(2));
        let (mut reporter, start) = (Reporter::new(Some(&on_progress), 100, 8, passes), Instant::now());
        let iteration = |iteration| Pass::Iteration { run: 0, iteration, max_iters: 2 };
        for (at, pass) in [(0, Pass::Bounds), (200, iteration(1)), (400, iteration(2)), (600, Pass::Labels { run: 0 })]
        {
            reporter.begin_at(pass, start + at * MS);
            for block in 1..=10 {
                reporter.add_at(10, block > 5, start + (at + 20 * block) * MS);
            }
        }
        let heard = heard.lock().unwrap();
        // The first block of all, what comes 100 ms later, and the last block of all.
        let at: Vec<_> = heard.iter().map(|p| (p.pass, p.rows, p.bytes, p.passes_left)).collect();
        let expected = [
            (Pass::Bounds, 10, 0, Some(3)),
            (Pass::Bounds, 60, 80, Some(3)),
            (iteration(1), 10, 0, Some(2)),
            (iteration(1), 60, 80, Some(2)),
            (iteration(2), 10, 0, Some(1)),
            (iteration(2), 60, 80, Some(1)),
            (Pass::Labels { run: 0 }, 10, 0, Some(0)),
            (Pass::Labels { run: 0 }, 60, 80, Some(0)),
            (Pass::Labels { run: 0 }, 100, 400, Some(0)),
        ];
        assert_eq!(at, expected);
        assert_eq!(heard[1].pass_left(), Some(80 * MS));
        assert_eq!((heard[1].left(), heard[3].left()), (Some((80 + 3 * 200) * MS), Some((80 + 2 * 200) * MS)));
        assert_eq!((heard[3].rows_per_second(), heard[3].bytes_per_second()), (500.0, 80.0 / 0.12));
        assert_eq!(
            heard[3].to_string(),
            "iteration 1 of at most 2: 60 of 100 rows, 500 rows/s, 0.0 MB/s, 0.1 s left, of all at most 0.5 s"
        );
        assert_eq!(heard[8].to_string(), "labels: 100 of 100 rows, 500 rows/s, 0.0 MB/s, 0.0 s left");
    }

    /// By hand: each run has its iterations, of one pass or two, and a pass for labels.
    #[test]
    fn passes_are_counted() {
        let iteration = |run, iteration| Pass::Iteration { run, iteration, max_iters: 5 };
        let plain = KMeans::new(2).max_iters(5).n_init(3);
        let relocating = plain.clone().empty_clusters(EmptyClusters::Relocate);
        let parallel = plain.clone().init(Init::KMeansParallel);
        for (settings, pass, left) in [
            (&plain, Pass::Bounds, Some(1 + 18)),
            (&plain.clone().tol(0.0), Pass::Bounds, Some(18)),
            (&plain.clone().metric(Metric::Cosine), Pass::Bounds, Some(18)),
            (&plain, Pass::Variance, Some(18)),
            (&parallel, Pass::Bounds, Some(1 + 3 * (7 + 6))),
            (&parallel, Pass::Start { run: 1, pass: 2 }, Some(5 + 6 + 7 + 6)),
            (&parallel, Pass::Start { run: 2, pass: 9 }, Some(6)),
            (&parallel, Pass::Labels { run: 1 }, Some(7 + 6)),
            (&plain, iteration(0, 1), Some(4 + 1 + 12)),
            (&plain, iteration(2, 5), Some(1)),
            (&plain, Pass::Labels { run: 1 }, Some(6)),
            (&plain, Pass::Labels { run: 2 }, Some(0)),
            (&relocating, Pass::Variance, Some(33)),
            (&relocating, iteration(2, 4), Some(1 + 2 + 1)),
            (&relocating, Pass::Relocation { run: 2, iteration: 4, max_iters: 5 }, Some(2 + 1)),
            (&plain.clone().max_iters(usize::MAX), Pass::Bounds, None),
            (&plain.clone().max_iters(usize::MAX), iteration(2, 5), None),
            (&plain.clone().max_iters(usize::MAX), Pass::Labels { run: 2 }, Some(0)),
            (&plain.clone().n_init(usize::MAX), Pass::Bounds, None),
        ] {
            assert_eq!(Passes::of_fit(settings).after(pass), left, "{pass:?} of {settings:?}");
        }
        assert_eq!(Passes::ONE.after(Pass::Labels { run: 0 }), Some(0));
        assert_eq!(Passes::ONE.after(Pass::Epoch { epoch: 1, epochs: 4 }), Some(3));
    }
}
