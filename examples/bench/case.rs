//! One op on one set of rows: how it runs, and how long it takes.

use super::{check, Args, Op, Skip, Source, Verdict};
use anyhow::{ensure, Result};
use candle_core::{Device, Tensor};
use candle_flash_kmeans::{assign, nearest, testing, Fit, Init, KMeans, Metric, PreparedFit};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::time::{Duration, Instant};

/// More iterations than any fit takes.
const UNTIL_CONVERGED: usize = 1 << 20;

pub struct Case {
    x: Tensor,
    metric: Metric,
    /// Of an assignment, and where a fit starts if they are given: (b, k, d)
    centroids: Tensor,
    settings: KMeans,
    /// f64 (b, n)
    weights: Option<Tensor>,
    work: Work,
}

enum Work {
    Assign,
    /// So many for each row.
    Nearest(usize),
    /// By a fit that has the centroids.
    Predict(Box<Fit>),
    Transform(Box<Fit>),
    Update {
        labels: Tensor,
        update: Box<testing::Update>,
    },
    /// With its last result.
    Fit(Option<Fit>),
    Run(Box<PreparedFit>),
}

impl Case {
    /// For rows `(b, n, d)` of `source`.
    pub fn new(args: &Args, source: &Source, x: Tensor) -> Result<Self> {
        let (metric, device) = (args.metric.metric(), x.device().clone());
        testing::force_skipping(args.skip.map(|skip| skip == Skip::Always));
        if let Some(name) = &args.kernel {
            let known = testing::candidates(&x, args.k, metric)?;
            let kernel = known.iter().copied().find(|known| known == name);
            ensure!(kernel.is_some(), "--kernel {name} is none of those that can assign this: {}", known.join(", "));
            testing::force(kernel);
        }
        let settings = KMeans::new(args.k).metric(metric).seed(args.seed);
        let seeds = settings.clone().init(args.init.init().unwrap_or_default()).max_iters(0);
        let centroids = source.centroids(args, seeds.fit(&x)?.centroids)?;
        let init = args.init.init().unwrap_or_else(|| Init::Given(centroids.clone()));
        let most = if args.until_converged { UNTIL_CONVERGED } else { args.iters };
        let mut settings = settings.init(init).max_iters(most);
        if args.op != Op::FitTol {
            settings = settings.tol(0.0);
        }
        let (b, n, _) = x.dims3()?;
        let mut rng = ChaCha8Rng::seed_from_u64(!args.seed);
        let mut weights = None;
        if args.weighted {
            let random: Vec<f64> = (0..b * n).map(|_| rng.random_range(0.5..1.5)).collect();
            let random = Tensor::from_vec(random, (b, n), &device)?;
            settings = settings.sample_weights(&random);
            weights = Some(random);
        }
        let work = match args.op {
            Op::Update => {
                let k = args.k as u32;
                let hot = args.labels == super::Labels::Hot;
                let mut label = |_| if hot && rng.random() { k / 2 } else { rng.random_range(0..k) };
                let labels: Vec<u32> = (0..b * n).map(&mut label).collect();
                let labels = Tensor::from_vec(labels, (b, n), &device)?;
                Work::Update { labels, update: Box::new(testing::Update::new(&x, args.k)?) }
            }
            Op::Fit | Op::FitTol => Work::Fit(None),
            Op::Run => {
                Work::Run(Box::new(settings.clone().check_finite(false).prepare(x.shape(), x.dtype(), &device)?))
            }
            Op::Assign | Op::Tune => Work::Assign,
            Op::Nearest => Work::Nearest(args.m),
            Op::Predict | Op::Transform => {
                let given = KMeans::new(args.k).metric(metric).init(Init::Given(centroids.clone()));
                let fit = Box::new(given.max_iters(0).fit(&x)?);
                if args.op == Op::Predict {
                    Work::Predict(fit)
                } else {
                    Work::Transform(fit)
                }
            }
        };
        Ok(Self { x, metric, centroids, settings, weights, work })
    }

    fn device(&self) -> &Device {
        self.x.device()
    }

    /// The call that is timed.
    pub fn plan(&self) -> Result<String> {
        Ok(match &self.work {
            Work::Assign => format!("assign {}", testing::chosen(&self.x, self.centroids.dim(1)?, self.metric)?),
            Work::Nearest(m) => format!("nearest {m}"),
            Work::Predict(_) => "predict".into(),
            Work::Transform(_) => "transform".into(),
            Work::Update { update, .. } => format!("update {}", update.kernel()),
            Work::Fit(_) | Work::Run(_) => self.settings.plan(&self.x)?.to_string(),
        })
    }

    /// Labels of an assignment, distances of a transform, or means of an update; a fit keeps its result.
    fn run(&mut self) -> Result<Option<Tensor>> {
        match &mut self.work {
            Work::Assign => return Ok(Some(assign(&self.x, &self.centroids, self.metric)?)),
            Work::Nearest(m) => return Ok(Some(nearest(&self.x, &self.centroids, *m, self.metric)?.0)),
            Work::Predict(fit) => return Ok(Some(fit.predict(&self.x)?)),
            Work::Transform(fit) => return Ok(Some(fit.transform(&self.x)?)),
            Work::Update { labels, update } => return Ok(Some(update.run(labels)?)),
            Work::Fit(last) => *last = Some(self.settings.fit(&self.x)?),
            Work::Run(prepared) => prepared.run(&self.x)?,
        }
        Ok(None)
    }

    /// Of a fit that has run.
    fn fit(&self) -> Result<Option<Fit>> {
        Ok(match &self.work {
            Work::Fit(last) => last.clone(),
            Work::Run(prepared) => Some(prepared.fit()?),
            _ => None,
        })
    }

    /// The most that a problem took; 1 where there are none.
    pub fn iterations(&self) -> Result<f64> {
        match self.fit()? {
            Some(fit) => Ok(f64::from(fit.n_iter.flatten_all()?.max(0)?.to_scalar::<u32>()?).max(1.0)),
            None => Ok(1.0),
        }
    }

    /// Summed over problems, where the op is a fit.
    pub fn inertia(&self) -> Result<Option<f64>> {
        Ok(self.fit()?.map(|fit| fit.inertia.sum_all()?.to_scalar()).transpose()?)
    }

    /// The work of each pass of a fit, which runs once more.
    pub fn passes(&mut self) -> Result<Vec<testing::PassWork>> {
        testing::passes();
        self.run()?;
        Ok(testing::passes())
    }

    /// Runs twice more, and compares the results with each other and with the definition.
    pub fn verdict(&mut self) -> Result<Verdict> {
        // The next run overwrites means.
        let first = self.run()?.map(|result| result.copy()).transpose()?;
        let fit = self.fit()?;
        let second = self.run()?;
        let mut verdict = Verdict::default();
        match (&first, &second, &self.work) {
            (Some(first), Some(second), Work::Update { labels, .. }) => {
                verdict.same = check::same_bits(first, second)?;
                verdict.means(&self.x, labels, first)?;
            }
            (Some(first), Some(second), Work::Nearest(_)) => {
                verdict.same = check::same_bits(first, second)?;
                verdict.nearest(&self.x, &self.centroids, first, self.metric, check::BUDGET)?;
            }
            (Some(first), Some(second), Work::Transform(_)) => {
                verdict.same = check::same_bits(first, second)?;
                verdict.distances(&self.x, &self.centroids, first, self.metric, check::BUDGET)?;
            }
            (Some(first), Some(second), _) => {
                verdict.same = check::same_bits(first, second)?;
                verdict.labels(&self.x, &self.centroids, first, self.metric, check::BUDGET)?;
            }
            _ => {
                let (Some(first), Some(second)) = (fit, self.fit()?) else { return Ok(verdict) };
                verdict.same = check::same_fit(&first, &second)?;
                verdict.fit(&self.x, self.weights.as_ref(), &self.settings, &first)?;
            }
        }
        Ok(verdict)
    }
}

/// The repeats of a case.
#[derive(Default)]
pub struct Times {
    ms: Vec<f64>,
    cpu_ms: Vec<f64>,
}

impl Times {
    pub fn median(&self) -> f64 {
        median(&self.ms)
    }

    pub fn least(&self) -> f64 {
        self.ms.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// Of all threads of the process, where the platform tells.
    pub fn cpu_median(&self) -> Option<f64> {
        (!self.cpu_ms.is_empty()).then(|| median(&self.cpu_ms))
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Repeats of all cases in turns, so that whatever else the machine does falls on each of them, after one run that warms up.
pub fn time(cases: &mut [Case], reps: usize, budget: f64) -> Result<Vec<Times>> {
    for case in &mut *cases {
        case.run()?;
        case.device().synchronize()?;
    }
    let mut times: Vec<Times> = cases.iter().map(|_| Times::default()).collect();
    let start = Instant::now();
    for _ in 0..reps {
        for (case, times) in cases.iter_mut().zip(&mut times) {
            let (start, cpu) = (Instant::now(), cpu_time());
            case.run()?;
            case.device().synchronize()?;
            times.ms.push(start.elapsed().as_secs_f64() * 1e3);
            let spent = cpu.zip(cpu_time()).map(|(before, after)| (after - before).as_secs_f64() * 1e3);
            times.cpu_ms.extend(spent);
        }
        if start.elapsed().as_secs_f64() > budget {
            break;
        }
    }
    Ok(times)
}

/// The time that the threads of this process have spent.
#[cfg(unix)]
fn cpu_time() -> Option<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec, which the call writes.
    let status = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    (status == 0).then(|| Duration::new(time.tv_sec as u64, time.tv_nsec as u32))
}

#[cfg(not(unix))]
fn cpu_time() -> Option<Duration> {
    None
}
