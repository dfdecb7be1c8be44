//! The settings of a fit. What they do is beside the loop, in `lloyd`.

use crate::{
    callbacks::{IntoControlFlow, Iteration, OnIteration, OnSeed, Seeding},
    metric::Metric,
};
use candle_core::Tensor;
use std::sync::Arc;

/// The choice of a fit's first centroids.
///
/// A row that weighs nothing is chosen only where nothing else is left: one of weight 0, one that is not finite where that is not
/// [checked](KMeans::check_finite), and for [`Metric::Cosine`] one without a direction.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Init {
    /// By the number of clusters: [greedy k-means++](Self::GreedyKMeansPlusPlus) of at most 32, whose passes over the rows are about as many as
    /// those of the iterations and which finds separate groups of rows where random ones mostly do not, and [random](Self::Random) rows of
    /// more. Of more than 65,536 rows, unless they have [lengths](KMeans::lengths), a sample of so many is drawn uniformly, in a stream as in
    /// memory, so that neither time nor memory of a start grows with the rows. A fit that is [prepared](KMeans::prepare) starts from random
    /// rows in any case, which take no pass.
    #[default]
    Auto,
    /// `k` different rows, uniformly, or with probability proportional to the sample weights, for which the host reads a number a
    /// row.
    Random,
    /// k-means++ (Arthur and Vassilvitskii 2007): each next row with probability proportional to its weight times its
    /// distance to the nearest row already chosen. Each row is drawn when it arrives, as a Poisson process of that rate does, and waits longer by as
    /// much as a row that is chosen takes off its rate, so that the probabilities are those of one draw after another (time rescaling,
    /// Brown et al. 2002). So 16 rows that arrive next are known at a time, and all rows meet those of them that are chosen in one
    /// pass over the data: about `k / 16` passes, and more where most draws are of a few groups of rows. A GPU's host reads now and then
    /// how many are chosen, but for a run that a CUDA graph captures, which holds launches for `k` passes, most of which do nothing.
    KMeansPlusPlus,
    /// Greedy k-means++, as scikit-learn has it: k-means++ that draws `2 + floor(ln(k))` different rows for each centroid but the first, and
    /// keeps the one after which the sum of weights times distances is least. It is in Arthur and Vassilvitskii's paper of 2007 as a
    /// variant, and analysed by Bhattacharya et al. (2020) and Grunau et al. (2023). Rows arrive as for k-means++, and those of several
    /// centroids, 64 at most, meet all rows in one pass over the data, which lists the rows that are nearer to them than to any centroid before: from
    /// the lists follows which is best. About `k / 5` passes for rows of 256 columns and more, one a centroid while there are few, and about `k`
    /// passes for less than 64 columns.
    GreedyKMeansPlusPlus,
    /// k-means|| (Bahmani et al. 2012): five rounds that each draw about `2k` rows, then weighted k-means++ among them.
    /// Fewer passes than k-means++ for large `k`. The host reads a sum and a count of each round of each problem.
    KMeansParallel,
    /// Evenly spaced rows: row `i * n / k` for cluster `i`, whatever the weights (`n` being those that count). Neighbours in a
    /// sequence are often alike, so that keys of a KV cache start well from these (RetroInfer, Chen et al. 2025), and nothing is
    /// read or drawn.
    Even,
    /// The means of a globally optimal clustering, which rows of one column have by squared Euclidean distance: dynamic programming over
    /// the sorted values (Wang and Song 2011), in `k n log n` steps of the host, which reads the values and the weights. The fit keeps it.
    /// Of clusterings that are equally good it is the one that cuts lowest, and values count as if on a grid of at least 2^37 steps (of weights
    /// 2^24 steps) between the least and the largest. From a sample for a stream.
    Optimal,
    /// These centroids, `(..batch, k, d)` or `(k, d)` for every problem: a warm start.
    Given(Tensor),
}

/// The policy for a cluster that loses its last row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum EmptyClusters {
    /// It keeps its centroid, and may win rows again.
    #[default]
    Keep,
    /// It moves to the row farthest from its own centroid (lowest index among equals), as scikit-learn does: farthest by
    /// distance, whatever the rows weigh, but for rows that weigh nothing. Costs a read of the cluster sizes by the host in
    /// every iteration.
    Relocate,
}

/// The GPUs that share the rows of a fit, or the problems of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Devices {
    /// All that are visible to this process; at least one.
    All,
    /// The GPUs of these numbers, each once.
    These(Vec<usize>),
    /// One in each of several processes that `torchrun`, `srun` or `mpirun` has started, on one machine or on many. All run the same
    /// program on the same rows, and have the same result. See [`StreamOptions::on`](crate::StreamOptions::on).
    Launched,
}

/// The most clusters of a fit that greedy k-means++ starts unless another start is asked for.
pub(crate) const GREEDY_CLUSTERS: usize = 32;

/// Rounds of k-means||, and rows drawn in each as a multiple of `k`, as its authors recommend.
pub(crate) const ROUNDS: u64 = 5;
pub(crate) const OVERSAMPLING: f64 = 2.0;

/// The passes of k-means|| over rows in blocks: one finds the first row, one draws each round, and the last one weighs what was drawn. Where
/// there are fewer distinct rows than clusters it takes more.
pub(crate) const PARALLEL_PASSES: u64 = 1 + ROUNDS + 1;

/// Rows that k-means|| draws, at most but for luck.
pub(crate) fn drawn(k: u64) -> u64 {
    drawn_in(ROUNDS, k)
}

/// The same in so many rounds: the count of a round is about Poisson's.
pub(crate) fn drawn_in(rounds: u64, k: u64) -> u64 {
    let mean = rounds as f64 * OVERSAMPLING * k as f64;
    (mean + 8.0 * mean.sqrt()) as u64 + 1
}

/// Lloyd's k-means, configured: exact labels, reproducible to the bit.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_flash_kmeans::{Init, KMeans};
///
/// let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., 9.], [9., 8.]], &Device::Cpu)?;
/// let fit = KMeans::new(2).init(Init::KMeansPlusPlus).seed(1).fit(&x)?;
/// let labels = fit.labels.to_vec1::<u32>()?;
/// assert!(labels[0] == labels[1] && labels[2] == labels[3] && labels[0] != labels[2]);
/// assert_eq!(fit.inertia.to_scalar::<f64>()?, 1.0);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KMeans {
    pub(crate) k: usize,
    pub(crate) metric: Metric,
    pub(crate) init: Init,
    pub(crate) n_init: usize,
    pub(crate) max_iters: usize,
    pub(crate) tol: f64,
    pub(crate) seed: u64,
    pub(crate) weights: Option<Tensor>,
    pub(crate) lengths: Option<Tensor>,
    pub(crate) empty: EmptyClusters,
    pub(crate) check_finite: bool,
    pub(crate) on_iteration: Option<OnIteration>,
    pub(crate) measures: bool,
    pub(crate) on_seed: Option<OnSeed>,
    pub(crate) devices: Option<Devices>,
}

impl KMeans {
    /// `k` clusters by squared Euclidean distance from where [`Init::Auto`] says, at most 25 iterations, `tol` 1e-4, seed 0.
    pub fn new(k: usize) -> Self {
        Self {
            k,
            metric: Metric::default(),
            init: Init::default(),
            n_init: 1,
            max_iters: 25,
            tol: 1e-4,
            seed: 0,
            weights: None,
            lengths: None,
            empty: EmptyClusters::default(),
            check_finite: true,
            on_iteration: None,
            measures: false,
            on_seed: None,
            devices: None,
        }
    }

    /// The distance that labels minimise.
    pub fn metric(mut self, metric: Metric) -> Self {
        self.metric = metric;
        self
    }

    /// The same with the start that [`Init::Auto`] stands for, which stays where it is a greedy one.
    pub(crate) fn started(&self, prepared: bool) -> Self {
        match self.init {
            Init::Auto if prepared || self.k > GREEDY_CLUSTERS => self.clone().init(Init::Random),
            _ => self.clone(),
        }
    }

    /// Sets the choice of the first centroids.
    pub fn init(mut self, init: Init) -> Self {
        self.init = init;
        self
    }

    /// Runs from this many starts (seeds `seed`, `seed + 1`, .., wrapping) and keeps the lowest inertia of each problem.
    pub fn n_init(mut self, n_init: usize) -> Self {
        self.n_init = n_init;
        self
    }

    /// Most centroid updates of a run; 0 only assigns to the initial centroids, and `usize::MAX` is no limit. On a GPU the host
    /// queues 128 of them, and as many again for as long as a problem has not converged, for which it then waits.
    pub fn max_iters(mut self, max_iters: usize) -> Self {
        self.max_iters = max_iters;
        self
    }

    /// Stops a problem when no centroid moved farther than `sqrt(tol * v)` in Euclidean distance, `v` being the mean
    /// variance of the columns (for cosine `1 / d`). 0 stops when no centroid moves at all, which is when no label changes; so
    /// does any `tol` where the variance is beyond f64.
    pub fn tol(mut self, tol: f64) -> Self {
        self.tol = tol;
        self
    }

    /// The seed of everything random.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Non-negative weights of the rows, float `(..batch, n)` or `(n)`: they count in the initialisation, the update and
    /// the inertia. Rows of weight 0 have labels, and are seeds only where nothing else is left.
    ///
    /// The host reads what it checks of them, and the largest, when a fit begins or is prepared, which keeps a copy. With
    /// [`check_finite(false)`](Self::check_finite), weights that are negative or not finite count as 0.
    pub fn sample_weights(mut self, weights: &Tensor) -> Self {
        self.weights = Some(weights.clone());
        self
    }

    /// The number of rows of each problem that count, u32 `(..batch)` of `k` to `n`, for problems of different sizes in one
    /// tensor. The rows after those are padding, whatever they hold, NaN too: they are never a seed, weigh nothing in the
    /// update, the inertia and [`Fit::counts`](crate::Fit::counts), and are not searched for non-finite values. Results are
    /// those of the rows that count alone. The label of padding is what [`Fit::predict`](crate::Fit::predict) gives for what it
    /// holds, always in range, so that whoever sorts labels into clusters has to set it aside first.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::KMeans;
    ///
    /// let x = Tensor::new(&[[[0f32], [1.], [5.]], [[2.], [f32::NAN], [f32::NAN]]], &Device::Cpu)?;
    /// let fit = KMeans::new(1).lengths(&Tensor::new(&[3u32, 1], &Device::Cpu)?).fit(&x)?;
    /// assert_eq!(fit.centroids.flatten_all()?.to_vec1::<f32>()?, [2., 2.]);
    /// assert_eq!(fit.counts.to_vec2::<u32>()?, [[3], [1]]);
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    ///
    /// The host reads them once, when a fit begins or is prepared.
    pub fn lengths(mut self, lengths: &Tensor) -> Self {
        self.lengths = Some(lengths.clone());
        self
    }

    /// Sets what becomes of clusters without rows.
    pub fn empty_clusters(mut self, policy: EmptyClusters) -> Self {
        self.empty = policy;
        self
    }

    /// Whether inputs are searched for NaN and infinities, and refused with their first row (default: yes; the host waits
    /// for the answer). Without it such a row gets some label in range and weighs nothing: it is a seed only where nothing
    /// else is left, and centroids and inertia are those of the other rows.
    pub fn check_finite(mut self, check: bool) -> Self {
        self.check_finite = check;
        self
    }

    /// Shares a tensor on the CPU out to these GPUs, for [`fit`](Self::fit) and [`fit_predict`](Self::fit_predict). The result is on
    /// the CPU, with the same bits whatever the number of GPUs.
    ///
    /// Each has a part of the rows `(n, d)`, in a fit of [`fit_stream`](Self::fit_stream), whose start and refusals it shares. The
    /// rows need not fit in the memory of all GPUs: those without room stay where they are and are read in every iteration.
    ///
    /// Each has whole problems of a batch, `(..batch, n, d)`, as many as the others but for one, which have to fit in its memory. Some
    /// have none if there are fewer problems than GPUs. [Processes](Devices::Launched) fit batches of their own.
    ///
    /// ```no_run
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{Devices, KMeans};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (10_000_000, 128), &Device::Cpu)?;
    /// let labels = KMeans::new(1024).devices(Devices::All).fit_predict(&x)?;
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn devices(mut self, devices: Devices) -> Self {
        self.devices = Some(devices);
        self
    }

    /// Calls `f` after every iteration: for progress bars, and to stop early. The host waits for each iteration then; on a GPU
    /// it does not otherwise.
    ///
    /// `f` returns nothing, or a [`ControlFlow`](std::ops::ControlFlow): `Break` ends the fit, further runs of [`n_init`](Self::n_init) included. Labels
    /// belong to the centroids then as they always do, and problems that were still moving are not
    /// [`converged`](crate::Fit::converged).
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::KMeans;
    /// use std::{ops::ControlFlow, time::{Duration, Instant}};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (500, 4), &Device::Cpu)?;
    /// let deadline = Instant::now() + Duration::from_secs(1);
    /// let late = move |_| if Instant::now() > deadline { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    /// let fit = KMeans::new(8).max_iters(usize::MAX).on_iteration(late).fit(&x)?;
    /// let quiet = KMeans::new(8).on_iteration(|i| assert!(i.iteration >= 1)).fit(&x)?;
    /// assert_eq!(fit.labels.dims(), quiet.labels.dims());
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn on_iteration<R: IntoControlFlow>(mut self, f: impl Fn(Iteration) -> R + Send + Sync + 'static) -> Self {
        self.on_iteration = Some(OnIteration(Arc::new(move |iteration| f(iteration).into_control_flow())));
        self
    }

    /// Whether [`on_iteration`](Self::on_iteration) is told [`Iteration::inertia`] and [`Iteration::shift`] (default: no), which take another pass over the
    /// rows in each iteration. Without a callback nothing is measured.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::KMeans;
    ///
    /// let x = Tensor::rand(0f32, 1f32, (500, 4), &Device::Cpu)?;
    /// let show = |i: candle_flash_kmeans::Iteration| println!("{}: {:?}, {:?}", i.iteration, i.inertia, i.shift);
    /// KMeans::new(8).on_iteration(show).measure_iterations(true).fit(&x)?;
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn measure_iterations(mut self, measure: bool) -> Self {
        self.measures = measure;
        self
    }

    /// Calls `f` with each centroid that k-means++, greedy or not, has chosen for a run, and once when any other [`Init`] is done: for progress
    /// bars. The host waits for each, or of k-means++ for some at a time, but of a run that a CUDA graph captures, whose end alone is told.
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use candle_flash_kmeans::{Init, KMeans};
    ///
    /// let x = Tensor::rand(0f32, 1f32, (500, 4), &Device::Cpu)?;
    /// let kmeans = KMeans::new(50).init(Init::KMeansPlusPlus).on_seed(|seeding| println!("{seeding}"));
    /// kmeans.fit(&x)?;
    /// # Ok::<_, candle_flash_kmeans::Error>(())
    /// ```
    pub fn on_seed(mut self, f: impl Fn(Seeding) + Send + Sync + 'static) -> Self {
        self.on_seed = Some(OnSeed(Arc::new(f)));
        self
    }

    /// Tells the callback, if there is one.
    pub(crate) fn tell(&self, seeding: Seeding) {
        if let Some(OnSeed(f)) = &self.on_seed {
            f(seeding);
        }
    }
}
