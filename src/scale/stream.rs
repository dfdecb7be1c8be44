//! Fits of rows that memory does not hold, and their labels.

use super::{
    checkpoint::{Checkpoints, Resumed},
    feed::Streamed,
    options::StreamOptions,
    reads::Reads,
    seeds::Seeds,
    source::Source,
};
use crate::{
    error::{Error, Result},
    fit::Fit,
    kmeans::KMeans,
    lloyd::{
        merged::{refuse_medians, Merged, Whole},
        state::State,
        weights::Weights,
    },
    memory::Fence,
    metric::Metric,
    primitives,
    problem::Problem,
    rows::Rows,
};
use candle_core::Device;
use std::{io, ops::Range};

impl KMeans {
    /// Clusters the rows of a source that need not fit in memory: to the bit what [`fit`](Self::fit) makes of the same rows from the
    /// same start, on any device and in any amount of memory. The result is on the CPU, where the rows come from
    /// ([`Fit::to_device`]).
    ///
    /// As many rows as [`StreamOptions::memory`] allows stay on the device. The others are read again in every pass, ahead of the work
    /// on them, and their labels are kept on the host, 4 bytes a row. There is a pass for each iteration and one to its end, one before
    /// the first, and another one for a [`tol`](Self::tol) above 0 (not by cosine). Relocation of
    /// [empty clusters](Self::empty_clusters) takes a second pass in each iteration, and a third where a cluster is empty.
    ///
    /// A fit that takes hours may go on after its process has ended: see [`Checkpoint`](crate::Checkpoint).
    ///
    /// # Where it starts
    /// Given centroids, evenly spaced rows and random rows without weights are those of [`fit`](Self::fit). k-means++, k-means|| and
    /// random rows with weights are chosen from a sample: 16 rows for each centroid, but at least 65,536, drawn uniformly. Of fewer
    /// rows it is all, and the start that of `fit`. The sample is on the device before other rows are, whatever the memory that is
    /// allowed.
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
        let p = problem_of(source, self.k, self.metric)?.fitting()?;
        let device = options.device();
        options.check()?;
        refuse_medians(self)?;
        if self.lengths.is_some() {
            let with = "a stream, whose rows all count".into();
            return Err(Error::Conflict { argument: "lengths", got: "a tensor".into(), with });
        }
        // Of the weights a block has its own on the device.
        Self { weights: None, ..self.clone() }.check(&p, device)?;
        self.weights.as_ref().map_or(Ok(()), |weights| p.weights(weights, &Device::Cpu))?;
        refuse_capture(device)?;
        let fence = Fence::default();
        fence.write(device)?;
        let weights = Weights::new(self, &p, None, &Device::Cpu)?;
        let weights = weights.as_ref();
        let seeds = Seeds { settings: self, p: &p, source, weights, device };
        let opened = options.checkpoints().map(|checkpoint| Checkpoints::open(checkpoint, self, &p)).transpose()?;
        let (mut checkpoints, resumed) = opened.unzip();
        let (mut starts, mut best, mut first) = (vec![], None, 0);
        if let Some(Resumed { state, best: end }) = resumed.flatten() {
            (first, best) = (state.run, end);
            starts.push(state);
        }
        for run in first + starts.len()..self.n_init {
            starts.push(State::start(run, seeds.centroids(run)?)?);
        }
        let whole = Whole { settings: self, p: &p, device, weights, all_counted: true };
        let mut feed = Streamed::new(source, whole, &options.cut(source)?);
        if let Some(added) = starts.first().and_then(|start| start.added.as_ref()) {
            feed.cut_at(added.rows);
        }
        if checkpoints.is_some() {
            feed.want_hash();
        }
        let merged = Merged::new(whole, &mut feed)?;
        if let Some(checkpoints) = &mut checkpoints {
            checkpoints.set_hash(feed.hash().expect("the first pass has found it"))?;
        }
        let on_cpu = |fit: Fit| fit.to_device(&Device::Cpu)?.with_batch(&[]);
        let best = best.map(|end| on_cpu(merged.fit(&mut feed, &end, &mut |_, _| Ok(()))?.1)).transpose()?;
        let mut starts = starts.into_iter();
        self.best_run(first, best, |_, best| {
            let start = starts.next().expect("each run that is left has one");
            if let Some(checkpoints) = &mut checkpoints {
                checkpoints.begin_run(best, &start)?;
            }
            let (flow, fit) = merged.fit(&mut feed, &start, &mut |state, over| match &mut checkpoints {
                Some(checkpoints) => checkpoints.watch(state, over),
                None => Ok(()),
            })?;
            Ok((flow, on_cpu(fit)?))
        })
    }
}

impl Fit {
    /// Exact labels of the rows of a source, of any number: `each(rows, labels)` gets those of a block after another, in order. The fit
    /// is of one problem, on any device. `each` may write them to a file; its error is [`Error::Io`].
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
    /// labels of blocks before have been given then.
    pub fn predict_stream(
        &self,
        source: &Source<'_>,
        options: &StreamOptions,
        mut each: impl FnMut(Range<u64>, &[u32]) -> io::Result<()>,
    ) -> Result<()> {
        options.check()?;
        let (device, cut) = (options.device(), options.cut(source)?);
        Problem::predict_rows(&[cut.rows, source.shape().1], source.dtype(), &self.centroids, self.metric)?;
        refuse_capture(device)?;
        let fence = Fence::default();
        fence.write(device)?;
        let centroids = self.centroids.to_device(device)?;
        let c = Rows::new(&centroids)?;
        let ranges: Vec<_> = cut.ranges(source.shape().0 as usize).collect();
        let mut reads = Reads::new(source, device, cut.rows);
        reads.for_each(&ranges, &mut |read| {
            let Some((i, x)) = read else { return Ok(()) };
            let (rows, x) = (&ranges[i], Rows::new(&x)?);
            if let Some(&bad) = primitives::max_abs_and_first_nonfinite(&x)?.1.to_vec1::<u32>()?.first() {
                if bad != u32::MAX {
                    return Err(Error::NonFinite { argument: "x", batch: 0, row: rows.start + bad as usize });
                }
            }
            let labels = primitives::assign(&x, &c, self.metric)?.flatten_all()?.to_vec1::<u32>()?;
            let rows = rows.start as u64..rows.end as u64;
            let path = || format!("labels {}..{}", rows.start, rows.end);
            each(rows.clone(), &labels).map_err(|source| Error::Io { path: path(), source })
        })
    }
}

/// The problem of clustering a source's rows.
fn problem_of(source: &Source<'_>, k: usize, metric: Metric) -> Result<Problem> {
    let (n, d) = source.shape();
    Problem::of(&[usize::try_from(n).unwrap_or(usize::MAX), d], source.dtype(), k, metric)
}

/// Refuses to become part of a CUDA graph, in which no file would be read again.
fn refuse_capture(device: &Device) -> Result<()> {
    if primitives::capturing(device)? {
        let with = "a stream of rows, which a graph does not read again".into();
        return Err(Error::Conflict { argument: "stream", got: "a capture".into(), with });
    }
    Ok(())
}
