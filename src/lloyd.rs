//! The one Lloyd loop, and the memory that it runs in.

use crate::{
    fit::refuse_non_finite,
    init,
    ops::{self, Memory, Progress, Rule, Terms, Turn},
    problem::{self, Problem, Rows},
    EmptyClusters, Error, Fit, Init, Iteration, KMeans, Metric, Result,
};
use candle_core::{DType, Device, Tensor};

/// A fit with its memory, from [`KMeans::prepare`]: [`run`](Self::run) it on as many inputs of its shape as you like.
///
/// Every run overwrites the last one's [`centroids`](Self::centroids) and [`labels`](Self::labels) in place. On a GPU the
/// host only queues work: a problem's convergence is decided where its data are, and problems that have converged are
/// skipped.
///
/// # CUDA graphs
/// A run can be captured and replayed on new values in the same input tensor if the settings ask the host for nothing:
/// [`check_finite(false)`](KMeans::check_finite), no [`on_iteration`](KMeans::on_iteration), no
/// [`EmptyClusters::Relocate`], and an [`Init`] other than k-means|| or weighted random rows. Run once before the capture,
/// so that all memory is there, and keep the input and this value alive as long as the graph.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_flash_kmeans::KMeans;
///
/// let mut prepared = KMeans::new(2).prepare((4, 2), DType::F32, &Device::Cpu)?;
/// for step in 0..3 {
///     let x = Tensor::new(&[[0f32, 0.], [0., 1.], [9., step as f32], [9., 8.]], &Device::Cpu)?;
///     prepared.run(&x)?;
///     assert_eq!(prepared.labels().dims(), [4]);
/// }
/// let fit = prepared.into_fit()?;
/// assert_eq!(fit.counts.to_vec1::<u32>()?.iter().sum::<u32>(), 4);
/// # Ok::<_, candle_flash_kmeans::Error>(())
/// ```
pub struct Prepared {
    settings: KMeans,
    p: Problem,
    device: Device,
    /// `(b, k, d)` and u32 `(b, n)`.
    centroids: Tensor,
    labels: Tensor,
    /// The same with the caller's batch dimensions.
    shown: [Tensor; 2],
    progress: Progress,
    ragged: Option<Ragged>,
    /// f64 `(b, n)`, 0 for rows that do not count, and the largest of each problem.
    weights: Option<(Tensor, Tensor)>,
    /// The rows to start from, if they do not depend on the data.
    drawn: Option<Tensor>,
    memory: Memory,
    data: Option<Data>,
}

/// The input of a run, with what stays the same over its iterations.
struct Data {
    x: Rows,
    terms: Terms,
}

impl Prepared {
    pub(crate) fn new(settings: &KMeans, p: Problem, device: &Device) -> Result<Self> {
        let ragged =
            settings.lengths.as_ref().map(|l| Ragged::new(p.lengths(l, device)?, settings, &p, device)).transpose()?;
        let weights = weights(settings, &p, ragged.as_ref(), device)?;
        if let (Init::Given(c), true) = (&settings.init, settings.check_finite) {
            refuse_non_finite("init", &ops::scan(&Rows::new(&c.detach())?)?.1)?;
        }
        let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, device);
        let centroids = zeros(&[p.b, p.k, p.d], p.dtype)?;
        let labels = zeros(&[p.b, p.n], DType::U32)?;
        let progress = Progress {
            stop: zeros(&[p.b], DType::U32)?,
            threshold: Tensor::full(settings.tol / p.d as f64, p.b, device)?,
            going: zeros(&[2, p.b + 1], DType::U32)?,
        };
        let shown = [centroids.reshape(p.shape(&[p.k, p.d]))?, labels.reshape(p.shape(&[p.n]))?];
        let (settings, device, memory) = (settings.clone(), device.clone(), Memory::default());
        let mut fit = Self {
            settings,
            p,
            device,
            centroids,
            labels,
            shown,
            progress,
            ragged,
            weights,
            drawn: None,
            memory,
            data: None,
        };
        fit.drawn = fit.draw(fit.settings.seed)?;
        Ok(fit)
    }

    /// The centroids, `(..batch, k, d)`. The next run overwrites them.
    pub fn centroids(&self) -> &Tensor {
        &self.shown[0]
    }

    /// The labels, u32 `(..batch, n)`. The next run overwrites them.
    pub fn labels(&self) -> &Tensor {
        &self.shown[1]
    }

    /// Clusters the rows of `x`, of the shape, dtype and device of the preparation.
    ///
    /// # Errors
    /// As [`KMeans::fit`]. After an error the results are of no use; the next run starts afresh.
    pub fn run(&mut self, x: &Tensor) -> Result<()> {
        let expected = self.p.shape(&[self.p.n, self.p.d]);
        if x.dims() != expected {
            return Err(Error::Shape { argument: "x", got: x.dims().to_vec(), expected });
        }
        problem::check_dtype("x", x, self.p.dtype)?;
        problem::check_device("x", x, &self.device)?;
        let run = self.load(x).and_then(|()| self.lloyd(0));
        if run.is_err() {
            // What a failed op leaves there may not be what the next one expects.
            self.memory = Memory::default();
        }
        run
    }

    /// The last run's result, in tensors of its own.
    ///
    /// # Errors
    /// [`Error::Conflict`] before the first run, and where the device fails.
    pub fn fit(&self) -> Result<Fit> {
        let fit = self.result()?;
        Ok(Fit { centroids: fit.centroids.copy()?, labels: fit.labels.copy()?, ..fit })
    }

    /// The last run's result.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn into_fit(mut self) -> Result<Fit> {
        self.memory = Memory::default();
        self.result()
    }

    fn result(&self) -> Result<Fit> {
        let with = || "a fit that has not been run".to_string();
        let data = self.data.as_ref().ok_or_else(|| Error::Conflict {
            argument: "fit",
            got: "a result".into(),
            with: with(),
        })?;
        let (p, stop) = (&self.p, &self.progress.stop);
        let weights = self.weights.as_ref().filter(|_| self.settings.weights.is_some());
        let weights = weights.map(|(w, _)| ops::cluster_sums(w, Some(&self.labels), p.k)?.reshape(p.shape(&[p.k])));
        let centroids = Rows::new(&self.centroids)?;
        Ok(Fit {
            centroids: self.shown[0].clone(),
            labels: self.shown[1].clone(),
            counts: self.sizes()?.reshape(p.shape(&[p.k]))?,
            weights: weights.transpose()?,
            inertia: ops::total(&self.cost(&data.x, &centroids)?)?.reshape(p.shape(&[]))?,
            n_iter: stop.minimum(self.settings.max_iters.min(RUNNING as usize) as u32)?.reshape(p.shape(&[]))?,
            converged: stop.ne(RUNNING)?.reshape(p.shape(&[]))?,
            metric: p.metric,
        })
    }

    /// Takes the rows of a run, and finds what stays the same over its iterations.
    pub(crate) fn load(&mut self, x: &Tensor) -> Result<()> {
        let rows = Rows::new(&x.detach())?;
        let counted = self.ragged.as_ref().map(|ragged| ragged.scan(&rows)).transpose()?;
        let x = ops::readable(rows, self.p.k, self.p.metric)?;
        let mut terms = Terms::of(&x)?;
        let mut first_bad = terms.first_bad.clone();
        if let Some((largest, bad)) = counted {
            // Padding may still hold what is not finite, which sums have to know.
            (terms.largest, first_bad) = (largest, bad);
        }
        if self.settings.check_finite {
            refuse_non_finite("x", &first_bad)?;
        }
        if self.settings.tol > 0.0 && self.p.metric != Metric::Cosine {
            let threshold = match &self.ragged {
                Some(ragged) => ragged.threshold(&x, &mut terms)?,
                None => (spread(&x, &terms, None)? * (self.settings.tol / (x.n as f64 * x.d as f64)))?,
            };
            self.progress.threshold.slice_set(&threshold, 0, 0)?;
        }
        if let Some((w, heaviest)) = &self.weights {
            terms.largest = (terms.largest * heaviest)?;
            (terms.factor, terms.heaviest) = (Some(w.clone()), Some(heaviest.clone()));
        }
        if self.p.metric == Metric::Cosine {
            let inverse = ops::norms(&x)?.recip()?;
            // Columns of a unit vector, with room for rounding, times the weight.
            (terms.factor, terms.largest) = match &self.weights {
                Some((w, heaviest)) => (Some((w * inverse)?), (heaviest * 2.0)?),
                None => (Some(inverse), Tensor::full(2f64, x.b, &self.device)?),
            };
        }
        match &mut self.data {
            Some(data) => data.replace(x, terms)?,
            None => self.data = Some(Data { x, terms }),
        }
        Ok(())
    }

    /// The loop. When an iteration is over, labels belong to the centroids.
    pub(crate) fn lloyd(&mut self, run: usize) -> Result<()> {
        let Some(data) = &self.data else { return Ok(()) };
        let (KMeans { init, seed, max_iters, .. }, x) = (&self.settings, &data.x);
        let (metric, weights, drawn) = (self.p.metric, self.weights.as_ref().map(|w| &w.0), self.drawn.as_ref());
        let seed = seed.wrapping_add(run as u64);
        let again = match run {
            0 => None,
            _ => self.draw(seed)?,
        };
        let drawn = again.as_ref().or(drawn);
        self.centroids.slice_set(&init::centroids(init, drawn, x, self.p.k, weights, metric, seed)?, 0, 0)?;
        self.progress.stop.const_set(RUNNING.into())?;

        let centroids = Rows::new(&self.centroids)?;
        let rule = match metric {
            Metric::Cosine => Rule::Direction,
            Metric::Manhattan => Rule::Median,
            _ => Rule::Mean,
        };
        let relocates = self.settings.empty == EmptyClusters::Relocate;
        let watched = relocates || self.settings.on_iteration.is_some();
        let (progress, terms) = (&self.progress, &data.terms);
        if !watched {
            let (c, labels, memory) = (&self.centroids, &self.labels, &self.memory);
            if ops::fit_on_chip(x, terms, metric, rule, progress, *max_iters, c, labels, memory)? {
                return Ok(());
            }
        }
        ops::relabel(x, &centroids, metric, None, &self.labels, &self.memory)?;
        for iteration in 1..=*max_iters {
            let turn = Some(Turn { progress, iteration });
            if relocates {
                self.relocate(x, &centroids)?;
            }
            ops::update(x, terms, Some(&self.labels), rule, turn, &self.centroids, &self.memory)?;
            ops::relabel(x, &centroids, metric, turn, &self.labels, &self.memory)?;
            if watched || ops::reads_are_free(&self.device) {
                let stop = self.progress.stop.to_vec1::<u32>()?;
                let converged = stop.iter().filter(|&&stop| stop != RUNNING).count();
                if let Some(f) = &self.settings.on_iteration {
                    f(Iteration { run, iteration, converged });
                }
                if converged == x.b {
                    break;
                }
            }
        }
        Ok(())
    }

    fn draw(&self, seed: u64) -> Result<Option<Tensor>> {
        let weighted = self.settings.weights.is_some();
        init::draw(&self.settings.init, &self.p, |b| self.rows(b), weighted, seed, &self.device)
    }

    /// The rows of problem `b` that count.
    fn rows(&self, b: usize) -> usize {
        self.ragged.as_ref().map_or(self.p.n, |ragged| ragged.lengths[b])
    }

    /// The rows that count in each cluster, u32 `(b, k)`.
    fn sizes(&self) -> Result<Tensor> {
        match &self.ragged {
            Some(r) => Ok(ops::cluster_sums(&r.ones, Some(&self.labels), self.p.k)?.to_dtype(DType::U32)?),
            None => ops::cluster_sizes(&self.labels, self.p.k),
        }
    }

    /// The weighted distance of each row to its centroid, f64 `(b, n)`.
    fn cost(&self, x: &Rows, centroids: &Rows) -> Result<Tensor> {
        let cost = ops::distances(x, centroids, &self.labels, self.p.metric)?;
        Ok(match &self.weights {
            Some((w, _)) => (cost * w)?,
            None => cost,
        })
    }

    /// Gives every empty cluster one of the rows farthest from their centroids.
    fn relocate(&self, x: &Rows, centroids: &Rows) -> Result<()> {
        let sizes = self.sizes()?.to_vec2::<u32>()?;
        let stop = self.progress.stop.to_vec1::<u32>()?;
        let lacking = |b: usize| stop[b] == RUNNING && sizes[b].contains(&0);
        if !(0..x.b).any(lacking) {
            return Ok(());
        }
        let (cost, mut rows) = (self.cost(x, centroids)?.to_vec2::<f64>()?, self.labels.to_vec2::<u32>()?);
        for b in (0..x.b).filter(|&b| lacking(b)) {
            let (mut size, cost, labels) = (sizes[b].clone(), &cost[b], &mut rows[b]);
            let mut far: Vec<u32> = (0..self.rows(b) as u32).collect();
            far.sort_unstable_by(|&i, &j| cost[j as usize].total_cmp(&cost[i as usize]).then(i.cmp(&j)));
            let mut far = far.into_iter().map(|i| i as usize);
            for cluster in (0..self.p.k).filter(|&j| sizes[b][j] == 0) {
                // A row on its centroid has nowhere better to be, and a cluster's last row would leave it empty.
                let taken =
                    far.find(|&i| size[labels[i] as usize] > 1 && (cost[i] > 0.0 || self.p.metric == Metric::Dot));
                let Some(i) = taken else { break };
                size[labels[i] as usize] -= 1;
                size[cluster] += 1;
                labels[i] = cluster as u32;
            }
        }
        Ok(self.labels.slice_set(&Tensor::from_vec(rows.concat(), (x.b, x.n), &self.device)?, 0, 0)?)
    }
}

impl Data {
    /// Takes new values where the old ones are, so that a captured run finds them there.
    fn replace(&mut self, x: Rows, terms: Terms) -> Result<()> {
        self.x = x;
        self.terms.largest.slice_set(&terms.largest, 0, 0)?;
        self.terms.first_bad.slice_set(&terms.first_bad, 0, 0)?;
        if let (Some(old), Some(new)) = (&self.terms.factor, &terms.factor) {
            if old.id() != new.id() {
                old.slice_set(new, 0, 0)?;
            }
        }
        Ok(())
    }
}

/// [`Progress::stop`] of a problem that has not converged.
const RUNNING: u32 = u32::MAX;

/// Problems of different sizes: which rows count.
///
/// What a run does with these takes no shape to the device, which a captured graph would look for where it was.
struct Ragged {
    lengths: Vec<usize>,
    /// 1 where a row counts and 0 where it is padding, f64 `(b, n)`.
    ones: Tensor,
    /// 1 for each problem, f64 `(b,)`.
    one: Tensor,
    /// The tolerance by the numbers that count, f64 `(b,)`.
    tol: Tensor,
}

impl Ragged {
    fn new(lengths: Vec<usize>, settings: &KMeans, p: &Problem, device: &Device) -> Result<Self> {
        let (b, n) = (p.b, p.n);
        let ends = Tensor::from_vec(lengths.iter().map(|&l| l as u32).collect(), (b, 1), device)?;
        let ones = Tensor::arange(0, n as u32, device)?.broadcast_as((b, n))?.lt(&ends.broadcast_as((b, n))?)?;
        let tol = lengths.iter().map(|&l| settings.tol / (l as f64 * p.d as f64)).collect();
        let (one, tol) = (Tensor::ones(b, DType::F64, device)?, Tensor::from_vec(tol, b, device)?);
        Ok(Self { lengths, ones: ones.to_dtype(DType::F64)?, one, tol })
    }

    /// [`ops::scan`] of the rows that count.
    fn scan(&self, x: &Rows) -> Result<(Tensor, Tensor)> {
        // Each row as a problem of its own, and what is found of them as rows of one column.
        let (largest, bad) = ops::scan(&Rows::new(&x.tensor.unsqueeze(x.tensor.rank() - 1)?)?)?;
        let whole = |found: Tensor| ops::scan(&Rows::new(&found.reshape((x.b, x.n, 1))?)?);
        let largest = (largest.reshape((x.b, x.n))? * &self.ones)?;
        // 0 is what `bad` says of such a row, and the largest u32 of others.
        let none = u32::MAX as f64;
        let bad = (bad.reshape((x.b, x.n))?.to_dtype(DType::F64)?.affine(-1.0, none)? * &self.ones)?;
        Ok((whole(largest)?.0, whole(bad.affine(-1.0, none)?.recip()?)?.1))
    }

    /// The squared shift at which a problem has converged, f64 `(b,)`. Leaves `terms` as they were.
    fn threshold(&self, x: &Rows, terms: &mut Terms) -> Result<Tensor> {
        (terms.factor, terms.heaviest) = (Some(self.ones.clone()), Some(self.one.clone()));
        let threshold = (spread(x, terms, Some(&self.ones))? * &self.tol)?;
        (terms.factor, terms.heaviest) = (None, None);
        Ok(threshold)
    }
}

/// Checked weights as f64 `(b, n)`, and the largest of each problem; none where every row counts alike.
fn weights(
    settings: &KMeans,
    p: &Problem,
    ragged: Option<&Ragged>,
    device: &Device,
) -> Result<Option<(Tensor, Tensor)>> {
    let w = match (&settings.weights, ragged) {
        (None, None) => return Ok(None),
        (None, Some(ragged)) => return Ok(Some((ragged.ones.clone(), ragged.one.clone()))),
        (Some(w), None) => p.weights(&w.detach(), device)?,
        (Some(w), Some(Ragged { ones, .. })) => {
            let w = p.weights(&w.detach(), device)?;
            ones.ne(&ones.zeros_like()?)?.where_cond(&w, &w.zeros_like()?)?
        }
    };
    let (heaviest, first_bad) = ops::scan(&Rows::new(&w.unsqueeze(2)?)?)?;
    if settings.check_finite {
        refuse_non_finite("sample_weights", &first_bad)?;
        let least = w.min_all()?.to_scalar::<f64>()?;
        if least < 0.0 {
            return Err(Error::Value { argument: "sample_weights", got: least, expected: "at least 0" });
        }
        if heaviest.min_all()?.to_scalar::<f64>()? == 0.0 {
            return Err(Error::Value { argument: "sample_weights total", got: 0.0, expected: "positive" });
        }
    }
    Ok(Some((w, heaviest)))
}

/// The sum of the squared distances of the rows that count to their mean, f64 `(b,)`.
fn spread(x: &Rows, terms: &Terms, ones: Option<&Tensor>) -> Result<Tensor> {
    let mean = Tensor::zeros((x.b, 1, x.d), x.dtype(), x.device())?;
    ops::update(x, terms, None, Rule::Mean, None, &mean, &Memory::default())?;
    let one = Tensor::zeros((x.b, x.n), DType::U32, x.device())?;
    let distances = ops::distances(x, &Rows::new(&mean)?, &one, Metric::SquaredEuclidean)?;
    // What is not finite is not in a total.
    ops::total(&match ones {
        Some(ones) => (distances * ones)?,
        None => distances,
    })
}
