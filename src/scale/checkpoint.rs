//! Fits that outlive their process: what a run has come to is kept in files, from which another process goes on.

use super::fingerprint::{Difference, Fingerprint};
use crate::{
    error::{Error, Result},
    fit::Fit,
    kmeans::KMeans,
    lloyd::state::{Added, State},
    problem::Problem,
    saved::{self, Saved},
    stages::reach_work,
};
use candle_core::{DType, Device};
use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The version of what is in a file.
const VERSION: [&str; 2] = ["checkpoint", "1"];

/// The two files, which are written in turns.
const NAMES: [&str; 2] = ["checkpoint-0.safetensors", "checkpoint-1.safetensors"];

/// Checkpoints of a fit: where they are, and how often they are written, for
/// [`StreamOptions::checkpoint`](crate::StreamOptions::checkpoint).
///
/// [`KMeans::fit_stream`](crate::KMeans::fit_stream) with one goes on from the newest that is in the folder, and begins where there is
/// none. Whatever ended the process, the result has the bits of a fit that nothing has ended, also on another device or number of GPUs,
/// with other memory or blocks of another size. A finished fit comes back after a pass or two.
///
/// A checkpoint is written at the start and the end of each run of [`n_init`](crate::KMeans::n_init), and every ten minutes, also within
/// a pass over the rows (between passes where [empty clusters](crate::KMeans::empty_clusters) are relocated). It has the centroids, the
/// settings, and a hash of all rows; within a pass the sums of the rows so far, too: `k * (d + 1) * 16` bytes, or a small multiple where
/// values have very different magnitudes. Labels are not in it.
///
/// A fit that goes on begins with the passes that each begins with, of which the first one compares the hash of the rows.
///
/// # Files
/// The folder, which has to exist, gets two files, which are written in turns, so that the one before the last stays. Each appears under
/// its name when it is whole and on the disk (a temporary file, synchronised, renamed, its folder synchronised), and has a version
/// and a checksum. Of two the one that got farther is taken, and if that is damaged the other.
///
/// # Several GPUs
/// The first rank writes the files, also for those of other processes, all of which read them: the folder is one that they share.
/// Within a pass, what is kept is the part of the first rank.
///
/// # Errors of a fit
/// A checkpoint of other settings is [`Error::Mismatch`] before any row is read, which names the first setting that differs, and both
/// values. One of other rows is so after the first pass, with both hashes. [`Error::Io`] if a file cannot be read or written: the
/// last one that was written stays. Where there are files and none is good, the error is that of the first: nothing begins anew by itself.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{Checkpoint, KMeans, Source, StreamOptions};
/// use std::ops::ControlFlow;
///
/// let folder = std::env::temp_dir().join(format!("checkpoints-{}", std::process::id()));
/// std::fs::create_dir(&folder).unwrap();
/// let x = Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?;
/// let source = Source::from_tensor(&x)?;
/// let options = StreamOptions::new(&Device::Cpu).checkpoint(Checkpoint::in_dir(&folder).every_iterations(10));
///
/// // A fit that is ended after three iterations, and one that goes on from there.
/// let third = |i: candle_flash_kmeans::Iteration| if i.iteration == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
/// KMeans::new(8).on_iteration(third).fit_stream(&source, &options)?;
/// let fit = KMeans::new(8).fit_stream(&source, &options)?;
/// assert_eq!(fit.centroids.to_vec2::<f32>()?, KMeans::new(8).fit(&x)?.centroids.to_vec2::<f32>()?);
///
/// // Checkpoints of other settings are refused.
/// let refused = KMeans::new(9).fit_stream(&source, &options).unwrap_err();
/// assert!(refused.to_string().ends_with("k is 8, expected 9"));
/// # std::fs::remove_dir_all(&folder).unwrap();
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    iterations: Option<usize>,
    period: Duration,
}

impl Checkpoint {
    /// Checkpoints in this folder, every ten minutes.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), iterations: None, period: Duration::from_secs(600) }
    }

    /// Writes one after every `n` iterations of a run, too, at least one.
    pub fn every_iterations(mut self, n: usize) -> Self {
        self.iterations = Some(n);
        self
    }

    /// Sets the time between two, after which the next block or iteration ends with one. 0 writes one after each.
    pub fn every(mut self, period: Duration) -> Self {
        self.period = period;
        self
    }

    /// Refuses what needs no look at the files' contents.
    pub(super) fn check(&self) -> Result<()> {
        if self.iterations == Some(0) {
            return Err(Error::Range { argument: "every_iterations", got: 0, min: 1, max: usize::MAX });
        }
        let path = || self.dir.display().to_string();
        let folder = self.dir.metadata().map_err(|source| Error::Io { path: path(), source })?;
        if !folder.is_dir() {
            return Err(Error::Io { path: path(), source: io::ErrorKind::NotADirectory.into() });
        }
        Ok(())
    }

    fn file(&self, i: usize) -> PathBuf {
        self.dir.join(NAMES[i])
    }
}

/// A checkpoint that was read.
struct Kept {
    path: String,
    /// The hash of the rows.
    hash: String,
    resumed: Resumed,
}

/// Writes the checkpoints of a fit.
pub(super) struct Checkpoints<'a> {
    checkpoint: &'a Checkpoint,
    fingerprint: Fingerprint,
    /// The hash of the rows, once they have been seen.
    hash: String,
    /// The path of the file that the fit goes on from, and the hash that it has.
    found: Option<(String, String)>,
    /// The end of the best of the runs before.
    best: Option<State>,
    /// The file that is written next.
    next: usize,
    written: Instant,
}

/// The place where a fit goes on: within a run, and the end of the best one before it.
pub(super) struct Resumed {
    pub state: State,
    pub best: Option<State>,
}

impl<'a> Checkpoints<'a> {
    /// The checkpoints of a fit of `p`, and where it goes on, if there are some.
    pub fn open(checkpoint: &'a Checkpoint, settings: &KMeans, p: &Problem) -> Result<(Self, Option<Resumed>)> {
        let fingerprint = Fingerprint::new(settings, p)?;
        let [first, second] = [0, 1].map(|i| Kept::read(&checkpoint.file(i), &fingerprint, settings, p));
        let progress = |kept: &Result<Option<Kept>>| match kept {
            Ok(Some(Kept { resumed: Resumed { state, .. }, .. })) => {
                Some((state.run, state.iteration, state.added.as_ref().map_or(0, |added| added.rows)))
            }
            _ => None,
        };
        let newest = usize::from(progress(&second) > progress(&first));
        let (newer, older) = if newest == 0 { (first, second) } else { (second, first) };
        let kept = match (newer, older) {
            (Ok(Some(kept)), _) => Some(kept),
            (Err(error), _) | (_, Err(error)) => return Err(error),
            (Ok(None), Ok(_)) => None,
        };
        // The one that the fit goes on from is the last to be written over.
        let next = kept.as_ref().map_or(0, |_| 1 - newest);
        let (found, resumed) = kept.map(|Kept { path, hash, resumed }| ((path, hash), resumed)).unzip();
        let (hash, best, written) = (String::new(), None, Instant::now());
        Ok((Self { checkpoint, fingerprint, hash, found, best, next, written }, resumed))
    }

    /// Notes the hash of the rows, and refuses to go on with others.
    pub fn set_hash(&mut self, hash: u64) -> Result<()> {
        self.hash = format!("{hash:016x}");
        match self.found.take() {
            Some((path, got)) if got != self.hash => {
                let expected = self.hash.clone();
                Err(Error::Mismatch { path, what: "the hash of the rows".into(), got, expected })
            }
            _ => Ok(()),
        }
    }

    /// Notes the best of the runs that are over, and writes where the next one starts.
    pub fn begin_run(&mut self, best: Option<&Fit>, start: &State) -> Result<()> {
        self.best = best.map(State::end).transpose()?;
        if start.iteration == 0 && start.added.is_none() {
            self.write(start)?;
        }
        Ok(())
    }

    /// Writes the state of a run, if it is time for one.
    pub fn watch(&mut self, state: &State, over: bool) -> Result<()> {
        let whole = state.added.is_none();
        let counted = self.checkpoint.iterations.is_some_and(|every| whole && state.iteration.is_multiple_of(every));
        if counted || over || self.written.elapsed() >= self.checkpoint.period {
            self.write(state)?;
        }
        Ok(())
    }

    fn write(&mut self, state: &State) -> Result<()> {
        reach_work("checkpoint due")?;
        let mut tensors = vec![("centroids", &state.centroids), ("stop", &state.stop)];
        let mut settings = vec![("run", state.run), ("iteration", state.iteration)];
        if let Some(Added { rows, sums }) = &state.added {
            tensors.push(("sums", sums));
            settings.push(("added", *rows));
        }
        if let Some(best) = &self.best {
            tensors.extend([("best.centroids", &best.centroids), ("best.stop", &best.stop)]);
            settings.push(("best.iteration", best.iteration));
        }
        let text = |(name, value): (&str, &str)| (name.to_string(), value.to_string());
        let of_fit = self.fingerprint.settings().map(|(name, value)| (format!("fit.{name}"), value.to_string()));
        let settings = settings.into_iter().map(|(name, value)| (name.to_string(), value.to_string()));
        let settings = settings.chain(of_fit).chain([text(VERSION.into()), text(("hash", &self.hash))]);
        let tensors = tensors.into_iter().map(|(name, t)| (name.to_string(), t));
        saved::write_checked(&self.checkpoint.file(self.next), tensors, settings)?;
        (self.next, self.written) = (1 - self.next, Instant::now());
        Ok(())
    }
}

impl Kept {
    /// The checkpoint in a file, if there is one. One of other settings is refused, and one that is damaged.
    fn read(path: &Path, fingerprint: &Fingerprint, settings: &KMeans, p: &Problem) -> Result<Option<Self>> {
        let mut file = match Saved::read_checked(path, &Device::Cpu) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read?,
        };
        let path = path.display().to_string();
        let [key, version] = VERSION;
        file.expect(key, version)?;
        let of_file = |name: &'static str| file.setting::<String>(&format!("fit.{name}"));
        if let Some(Difference { what, got, expected }) = fingerprint.difference(of_file)? {
            return Err(Error::Mismatch { path, what: what.into(), got, expected });
        }
        let (hash, run) = (file.setting("hash")?, file.setting("run")?);
        let mut added = None;
        if file.holds("sums") {
            let sums = file.exactly("sums", DType::I64, None)?;
            added = Some(Added { rows: file.setting("added")?, sums });
        }
        let state = read_state(&mut file, "", run, added, settings, p)?;
        let best =
            file.holds("best.centroids").then(|| read_state(&mut file, "best.", 0, None, settings, p)).transpose()?;
        let max_iters = settings.max_iters;
        let fault = match (&state.added, &best) {
            _ if run >= settings.n_init => format!("run {run} of {}", settings.n_init),
            (_, best) if best.is_some() != (run > 0) => {
                format!("run {run} and {} run before it", u8::from(best.is_some()))
            }
            (_, Some(best)) if !best.is_over(max_iters)? => "a run before it that is not over".into(),
            (Some(Added { rows, .. }), _) if *rows > p.n || state.is_over(max_iters)? => format!("{rows} rows added"),
            _ => return Ok(Some(Self { path, hash, resumed: Resumed { state, best } })),
        };
        Err(file.bad(fault))
    }
}

/// A state in a file.
fn read_state(
    file: &mut Saved,
    prefix: &str,
    run: usize,
    added: Option<Added>,
    settings: &KMeans,
    p: &Problem,
) -> Result<State> {
    let iteration = file.setting(&format!("{prefix}iteration"))?;
    let centroids = file.exactly(&format!("{prefix}centroids"), p.dtype, Some(&[p.b, p.k, p.d]))?;
    let stop = file.exactly(&format!("{prefix}stop"), DType::U32, Some(&[p.b]))?;
    let state = State { run, iteration, centroids, stop, added };
    match state.fault(settings.max_iters)? {
        Some(fault) => Err(file.bad(fault)),
        None => Ok(state),
    }
}
