//! Fits of rows that memory does not hold, and their labels.

use super::{
    checkpoint::{Checkpoints, Resumed},
    devices::{agree, joined, rows_of, sum_of},
    feed::{LabelsTo, Streamed},
    fingerprint::Fingerprint,
    label_file::LabelFile,
    options::StreamOptions,
    plan::{DevicePlan, StreamPlan},
    progress::Passes,
    reads::Reads,
    seeds::Seeds,
    source::Source,
};
use crate::{
    error::{Error, Result},
    fit::Fit,
    host,
    kmeans::{Init, KMeans},
    lloyd::{
        feed::Pass,
        merged::{refuse_medians, Merged, Whole},
        state::State,
        weights::Weights,
    },
    memory::Fence,
    plan::announce,
    primitives,
    problem::Problem,
    ranks::Ranks,
    rows::Rows,
};
use candle_core::{Device, Tensor};
use std::{
    io,
    ops::Range,
    sync::{mpsc, Mutex, PoisonError},
    thread,
};

impl KMeans {
    /// Clusters the rows of a source that need not fit in memory: to the bit what [`fit`](Self::fit) makes of the same rows from the
    /// same start, on any device and in any amount of memory. The result is on the CPU, where the rows come from
    /// ([`Fit::to_device`]).
    ///
    /// As many rows as [`StreamOptions::memory`] allows stay on the device. The others are read again in every pass, ahead of the work
    /// on them. Labels are kept on the device, 4 bytes a row, and copied at the end; [`fit_stream_to_npy`](Self::fit_stream_to_npy) leaves
    /// them in a file. There is a pass for each iteration and one to its end, one before
    /// the first, and another one for a [`tol`](Self::tol) above 0 (not by cosine). Relocation of
    /// [empty clusters](Self::empty_clusters) takes a second pass in each iteration, and a third where a cluster is empty.
    ///
    /// A fit that takes hours may go on after its process has ended: see [`Checkpoint`](crate::Checkpoint).
    ///
    /// # Where it starts
    /// The [default](crate::Init::Auto), given centroids, evenly spaced rows, random rows without weights and k-means|| are those of [`fit`](Self::fit). k-means|| takes
    /// seven passes for each run: one for the first row, five that draw about `2k` each, and one that weighs them; and another for each
    /// row that lacks where fewer than `k` were drawn. It keeps nothing of a row between passes, and on the device has some dozens of
    /// bytes for each of at most 2^20 rows at a time, and the rows that were drawn ([`DevicePlan::start_bytes`](crate::DevicePlan::start_bytes)). k-means++, greedy or not, random rows with weights and an optimum are
    /// chosen from a sample: 16 rows for each centroid, but at least 65,536, drawn uniformly. Of fewer rows it is all, and the start
    /// that of `fit`. Rows that cannot be seeds are replaced by the next ones of the source that can. The sample is on the device before other rows are, whatever the memory that is allowed.
    ///
    /// # Errors
    /// As [`fit`](Self::fit), and those of [`Source::read`]. [Weights](Self::sample_weights) are a tensor on the CPU;
    /// [lengths](Self::lengths), the metric [`Manhattan`](crate::Metric::Manhattan), whose medians no pass adds up, and captures of CUDA
    /// graphs are refused. After an error the device is usable.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let path = std::env::temp_dir().join(format!("streamed-{}.npy", std::process::id()));
    /// let x = Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?;
    /// x.write_npy(&path)?;
    ///
    /// let source = Source::open(&path)?;
    /// let options = StreamOptions::new(&Device::Cpu).memory(8 << 10);
    /// let fit = KMeans::new(8).fit_stream(&source, &options)?;
    /// assert_eq!(fit.centroids.to_vec2::<f32>()?, KMeans::new(8).fit(&x)?.centroids.to_vec2::<f32>()?);
    /// # std::fs::remove_file(&path).unwrap();
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn fit_stream(&self, source: &Source<'_>, options: &StreamOptions) -> Result<Fit> {
        self.fit_opened(source, &options.opened()?, None)
    }

    /// [`fit_stream`](Self::fit_stream) on devices that are opened. If labels go to a file, the result has those of no rows.
    pub(super) fn fit_opened(
        &self,
        source: &Source<'_>,
        options: &StreamOptions,
        label_file: Option<&LabelFile<'_>>,
    ) -> Result<Fit> {
        let device = options.device();
        let settings = &self.starting_on(device)?;
        let p = check_stream(settings, source, options)?;
        let fence = Fence::default();
        fence.write(device)?;
        let weights = Weights::new(settings, &p, None, &Device::Cpu)?;
        let weights = weights.as_ref();
        let opened = options.checkpoints().map(|checkpoint| Checkpoints::open(checkpoint, settings, &p)).transpose()?;
        let (checkpoints, resumed) = opened.unzip();
        let seeds = Seeds { settings, p: &p, source, weights, device };
        let (mut starts, mut best, mut first) = (vec![], None, 0);
        if let Some(Resumed { state, best: end }) = resumed.flatten() {
            (first, best) = (state.run, end);
            starts.push(state);
        }
        // k-means|| takes passes over all rows.
        let parallel = matches!(settings.init, Init::KMeansParallel);
        for run in first + starts.len()..if parallel { 0 } else { settings.n_init } {
            starts.push(State::start(run, seeds.centroids(run)?.to_device(&Device::Cpu)?)?);
        }
        let shared = Shared { settings, p: &p, source, options, label_file, weights, first, starts, best };
        // The first rank writes them.
        let checkpoints = Mutex::new(checkpoints);
        let fits = options.place().run(|device, ranks| {
            let mut checkpoints = match ranks.rank() {
                0 => checkpoints.lock().unwrap_or_else(PoisonError::into_inner).take(),
                _ => None,
            };
            shared.fit(device, ranks, checkpoints.as_mut())
        })?;
        let labels: Vec<_> = fits.iter().map(|fit| &fit.labels).collect();
        let labels = if label_file.is_some() { labels[0].clone() } else { joined(&labels)? };
        let fit = fits.into_iter().next().expect("at least one rank");
        Ok(Fit { labels, ..fit })
    }

    /// Says what [`fit_stream`](Self::fit_stream) would do with each device of this process: which rows stay, by what kernels the
    /// others are worked on, and what is read. No row is read for it. Without [`StreamOptions::memory`] it goes by the memory that is
    /// free now, of which the fit may find more or less.
    ///
    /// Rows that a fit starts from are read beside what the plan says, and for a [`tol`](Self::tol) above 0 so is the first one.
    ///
    /// # Errors
    /// Refuses what `fit_stream` refuses without looking at rows.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let source = Source::from_tensor(&Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?)?;
    /// let options = StreamOptions::new(&Device::Cpu).block_rows(100).memory(12 * 1600);
    /// let plan = KMeans::new(8).plan_stream(&source, &options)?;
    /// assert_eq!((plan.devices[0].resident_rows, plan.devices[0].later_pass_bytes), (400, 600 * 16));
    /// println!("{plan}");
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn plan_stream(&self, source: &Source<'_>, options: &StreamOptions) -> Result<StreamPlan> {
        let options = &options.opened()?;
        let settings = &self.starting_on(options.device())?;
        let p = check_stream(settings, source, options)?;
        let of_device = |(device, rows)| {
            let whole = Whole { settings, p: &p, device, weights: None, all_counted: true };
            DevicePlan::new(&whole, source, options, rows)
        };
        let devices = options.place().shares(p.n).map(of_device).collect::<Result<_>>()?;
        Ok(StreamPlan::new(devices, Passes::of_fit(settings)))
    }
}

impl KMeans {
    /// The same with given centroids on this device, since where they are does not matter to rows that are elsewhere, or with the start that
    /// [`Init::Auto`] stands for.
    pub(super) fn starting_on(&self, device: &Device) -> Result<Self> {
        Ok(match &self.init {
            Init::Given(c) => self.clone().init(Init::Given(host::to_device(c, device)?)),
            _ => self.started(false),
        })
    }
}

/// A fit as all of its ranks know it.
struct Shared<'a> {
    settings: &'a KMeans,
    p: &'a Problem,
    source: &'a Source<'a>,
    options: &'a StreamOptions,
    /// The file that labels go to, if they are not to be in memory.
    label_file: Option<&'a LabelFile<'a>>,
    /// On the CPU.
    weights: Option<&'a Weights>,
    /// The first run that is left.
    first: usize,
    /// Where these runs start, on the CPU; those of k-means|| that have begun.
    starts: Vec<State>,
    /// The end of the best of those before.
    best: Option<State>,
}

impl Shared<'_> {
    /// The fit of a rank, with the labels of its rows, on the CPU.
    fn fit(&self, device: &Device, ranks: &dyn Ranks, mut checkpoints: Option<&mut Checkpoints<'_>>) -> Result<Fit> {
        let Self { settings, p, source, options, label_file, weights, first, starts, best } = self;
        if options.place().is_launched() {
            // Each process has its own settings, and has read checkpoints for itself.
            agree(ranks, &Fingerprint::new(settings, p)?, starts.first())?;
        }
        let whole = Whole { settings, p, device, weights: *weights, all_counted: true };
        let rows = rows_of(ranks, p.n);
        let reporter = options.reporter(source, rows.len(), Passes::of_fit(settings), ranks.rank());
        let plan = DevicePlan::new(&whole, source, options, rows)?;
        announce(&plan);
        let mut feed = Streamed::new(source, whole, ranks, &plan, reporter);
        // The best of several runs is not known before they are over, and so the fit's labels are not.
        let after_all_runs = label_file.filter(|_| settings.n_init > 1);
        match label_file {
            Some(_) if after_all_runs.is_some() => feed.set_labels_to(LabelsTo::Nowhere),
            Some(file) => feed.set_labels_to(LabelsTo::File(file)),
            None => {}
        }
        if let Some(added) = starts.first().and_then(|start| start.added.as_ref()) {
            feed.cut_at(added.rows);
        }
        let hashes = options.checkpoints().is_some();
        if hashes {
            feed.want_hash();
        }
        let merged = Merged::new(whole, &mut feed)?;
        if hashes {
            let hash = sum_of(ranks, feed.hash().expect("the first pass has found it"))?;
            // Ranks other than the first go on without a look: it ends them if it refuses.
            if let Some(checkpoints) = &mut checkpoints {
                checkpoints.set_hash(hash)?;
            }
        }
        let on_cpu = |fit: Fit| fit.to_device(&Device::Cpu)?.with_batch(&[]);
        let best = best.as_ref().map(|end| on_cpu(merged.fit(&mut feed, end, &mut |_, _| Ok(()))?.1)).transpose()?;
        let mut fit = settings.best_run(*first, best, |run, best| {
            let begun = match starts.get(run - first) {
                Some(_) => None,
                None => Some(State::start(run, merged.parallel_start(&mut feed, run)?)?),
            };
            let start = begun.as_ref().unwrap_or_else(|| &starts[run - first]);
            if let Some(checkpoints) = &mut checkpoints {
                checkpoints.begin_run(best, start)?;
            }
            let (flow, fit) = merged.fit(&mut feed, start, &mut |state, over| match &mut checkpoints {
                Some(checkpoints) => checkpoints.watch(state, over),
                None => Ok(()),
            })?;
            Ok((flow, on_cpu(fit)?))
        })?;
        if let Some(file) = after_all_runs {
            feed.set_labels_to(LabelsTo::File(file));
            let end = State { run: settings.n_init - 1, ..State::end(&fit)? };
            fit = on_cpu(merged.fit(&mut feed, &end, &mut |_, _| Ok(()))?.1)?;
        }
        options.place().gather_labels(fit, ranks)
    }
}

/// A callback that gets the labels of a block of rows.
type EachBlock<'a> = &'a mut dyn FnMut(&Range<usize>, Vec<u32>) -> Result<()>;

impl Fit {
    /// Exact labels of the rows of a source, of any number: `each(rows, labels)` gets those of a block after another, in order. The fit
    /// is of one problem, on any device. `each` may write them to a file ([`predict_to_npy`](Self::predict_to_npy)
    /// does); its error is [`Error::Io`].
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{KMeans, Source, StreamOptions};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (1000, 4), &Device::Cpu)?;
    /// let fit = KMeans::new(8).fit(&x)?;
    /// let mut labels = vec![];
    /// fit.predict_stream(&Source::from_tensor(&x)?, &StreamOptions::new(&Device::Cpu), |_, some| {
    ///     labels.extend_from_slice(some);
    ///     Ok(())
    /// })?;
    /// assert_eq!(labels, fit.labels.to_vec1::<u32>()?);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`predict`](Self::predict), and those of [`Source::read`]. A row that is not finite is named by its number among all; the
    /// labels of blocks before have been given then. Each of several [processes](crate::Devices::Launched) gets its share of the rows.
    pub fn predict_stream(
        &self,
        source: &Source<'_>,
        options: &StreamOptions,
        mut each: impl FnMut(Range<u64>, &[u32]) -> io::Result<()>,
    ) -> Result<()> {
        self.label(source, options, |rows, labels| {
            let path = || format!("labels {}..{}", rows.start, rows.end);
            each(rows.clone(), labels).map_err(|source| Error::Io { path: path(), source })
        })
    }

    /// The same with errors of any kind.
    pub(super) fn label(
        &self,
        source: &Source<'_>,
        options: &StreamOptions,
        mut each: impl FnMut(Range<u64>, &[u32]) -> Result<()>,
    ) -> Result<()> {
        let options = &options.opened()?;
        let device = options.device();
        let ((n, d), centroids) = (source.shape(), &self.centroids);
        let cut = options.cut(source, n as usize, d, device, 0)?;
        Problem::predict_rows(&[cut.rows, d], source.dtype(), centroids, self.metric)?;
        refuse_capture(device)?;
        let fence = Fence::default();
        fence.write(device)?;
        let ranges: Vec<_> = options.place().own_rows(n as usize, |rows| cut.ranges(rows).collect());
        let rows = ranges.iter().map(ExactSizeIterator::len).sum();
        let mut reporter = options.reporter(source, rows, Passes::ONE, 0);
        reporter.begin(Pass::Labels { run: 0 });
        let mut each = |rows: &Range<usize>, labels: Vec<u32>| {
            each(rows.start as u64..rows.end as u64, &labels)?;
            reporter.add(labels.len(), true);
            Ok(())
        };
        let devices = options.place().devices();
        if let [device] = devices {
            return self.label_some(source, device, centroids, cut.rows, &ranges, &mut each);
        }
        // Each device has every so-manieth block, and stays not far ahead of the one that waits for them in order.
        let centroids = &centroids.to_device(&Device::Cpu)?;
        thread::scope(|scope| {
            let label = |i: usize| {
                let own: Vec<_> = ranges.iter().skip(i).step_by(devices.len()).cloned().collect();
                let (send, labels) = mpsc::sync_channel(1);
                scope.spawn(move || {
                    // Nobody waits any more where one of the others has failed.
                    let mut each = |_: &Range<usize>, labels| send.send(Ok(labels)).map_err(|_| gone());
                    let done = self.label_some(source, &devices[i], centroids, cut.rows, &own, &mut each);
                    if let Err(e) = done.and_then(|()| Ok(devices[i].synchronize()?)) {
                        let _ = send.send(Err(e));
                    }
                });
                labels
            };
            let labels: Vec<mpsc::Receiver<Result<Vec<u32>>>> = (0..devices.len()).map(label).collect();
            ranges
                .iter()
                .enumerate()
                .try_for_each(|(i, rows)| each(rows, labels[i % devices.len()].recv().unwrap_or_else(|_| Err(gone()))?))
        })
    }

    /// Labels these ranges of rows on one device.
    fn label_some(
        &self,
        source: &Source<'_>,
        device: &Device,
        centroids: &Tensor,
        most: usize,
        ranges: &[Range<usize>],
        each: EachBlock<'_>,
    ) -> Result<()> {
        let centroids = host::to_device(centroids, device)?;
        let c = Rows::new(&centroids)?;
        Reads::new(source, device, most).for_each(ranges, &mut |read| {
            let Some((i, x)) = read else { return Ok(()) };
            let (rows, x) = (&ranges[i], Rows::new(&x)?);
            if let Some(&bad) = primitives::max_abs_and_first_nonfinite(&x)?.1.to_vec1::<u32>()?.first() {
                if bad != u32::MAX {
                    return Err(Error::NonFinite { argument: "x", batch: 0, row: rows.start + bad as usize });
                }
            }
            each(rows, primitives::assign(&x, &c, self.metric)?.flatten_all()?.to_vec1::<u32>()?)
        })
    }
}

/// The error of a device whose labels nobody waits for.
fn gone() -> Error {
    Error::Candle(candle_core::Error::msg("another device has failed"))
}

/// The problem of clustering the rows of a source on devices that are opened. Refuses all that takes no look at values.
pub(super) fn check_stream(settings: &KMeans, source: &Source<'_>, options: &StreamOptions) -> Result<Problem> {
    let ((n, d), device) = (source.shape(), options.device());
    let dims = [usize::try_from(n).unwrap_or(usize::MAX), d];
    let p = Problem::of(&dims, source.dtype(), settings.k, settings.metric)?.fitting()?;
    refuse_medians(settings)?;
    if settings.lengths.is_some() {
        let with = "a stream, whose rows all count".into();
        return Err(Error::Conflict { argument: "lengths", got: "a tensor".into(), with });
    }
    if let Some(devices) = &settings.devices {
        let with = "a stream, whose options say where its rows go".into();
        return Err(Error::Conflict { argument: "devices", got: format!("{devices:?}"), with });
    }
    // A block has its own weights on the device.
    KMeans { weights: None, ..settings.clone() }.check(&p, device)?;
    settings.weights.as_ref().map_or(Ok(()), |weights| p.weights(weights, &Device::Cpu))?;
    refuse_capture(device)?;
    Ok(p)
}

/// Refuses to become part of a CUDA graph, in which no file would be read again.
fn refuse_capture(device: &Device) -> Result<()> {
    if primitives::capturing(device)? {
        let with = "a stream of rows, which a graph does not read again".into();
        return Err(Error::Conflict { argument: "stream", got: "a capture".into(), with });
    }
    Ok(())
}
