//! Times one op or a whole fit, and checks its result against the definition: one line a case.
//!
//! ```text
//! cargo run --release --example bench -- assign --n 100000 --k 256 --d 128 --check
//! cargo run --release --example bench -- assign --dtype f16,f32 --data outlier,nan-centroid,equal --beside normal
//! ```

use anyhow::{bail, ensure, Result};
use backend::Backend;
use candle_core::{DType, Device};
use candle_flash_kmeans::{Init, Metric};
use case::{Case, Times};
use check::Verdict;
use clap::{
    builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser},
    Parser, ValueEnum,
};
use data::{Pattern, Source};
use serde_json::{json, Value};

#[path = "../common/backend.rs"]
mod backend;
mod case;
pub(crate) mod check;
mod data;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/npy.rs"]
pub(crate) mod npy;
mod tune;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Op {
    /// Labels of x against k centroids
    Assign,
    /// The m nearest of k centroids for each row, and their distances
    Nearest,
    /// Labels as a fit gives them, which checks first that all rows are finite
    Predict,
    /// The distance of each row to each of k centroids, as a fit gives it
    Transform,
    /// The update of a fit for random labels, the sort included
    Update,
    /// A whole fit, never stopped early by `tol`
    Fit,
    /// A whole fit with the default `tol`, timed in turns with `fit`: the ratio says what `tol` costs
    FitTol,
    /// `fit` by a prepared fit, without the result's counts and inertia
    Run,
    /// Every kernel that can assign, on a grid of shapes, beside the one that the plan chooses
    Tune,
}

impl Op {
    /// Whether it compares rows with centroids that are there.
    pub(crate) fn compares(self) -> bool {
        matches!(self, Self::Assign | Self::Nearest | Self::Predict | Self::Transform)
    }

    pub(crate) fn fits(self) -> bool {
        matches!(self, Self::Fit | Self::FitTol | Self::Run)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub(crate) enum Distance {
    #[value(alias = "squared-euclidean")]
    SquaredEuclidean,
    /// Computed as squared_euclidean, which has the same nearest centroids; regret and inertia are of squares
    Euclidean,
    Cosine,
    Dot,
    Manhattan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Start {
    /// Random rows, drawn before the clock starts
    Given,
    Random,
    Even,
    #[value(name = "kmeans++")]
    KMeansPlusPlus,
    #[value(name = "greedy")]
    GreedyKMeansPlusPlus,
    #[value(name = "kmeans||")]
    KMeansParallel,
    /// The best clusters that rows of one column have
    Optimal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Labels {
    Uniform,
    /// Half of the rows in one cluster
    Hot,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Skip {
    Always,
    Never,
}

const OUTPUT: &str = "\
Each case is one line, with --json an object that also has the plan:
  ms, ms_min     median and minimum of the repeats; cpu_ms: CPU time of all threads of the process, median
  ratio          minimum of the repeats over that of --beside's case, both timed in turns; of fit-tol over that of fit,
                 whose medians are fit_ms and fit_cpu_ms
  products       of a fit, pass by pass: the share of the products of rows and centroids that were computed; the last pass only labels
  moved          the share of the rows whose label a pass has changed, of the first from what was there
  pass_ms        milliseconds of each pass on the CPU
  wrong          with --check: labels, distances, centroid components, counts and inertias that are not what the
                 definition says in f64, out of `checked`. The exit code is 1 if there is one, or if two runs differ
  max_regret     of labels: by how much the distance to a wrong label's centroid exceeds the nearest one's, relatively
  max_error      of centroid components: the largest error in units of what rounding allows; right up to 1
A fit is checked iteration by iteration: its centroids must follow from the labels before them, and labels from their
centroids. Where that is too much work, an even sample of rows and the last iterations are looked at.";

#[derive(Parser)]
#[command(about = "Times and checks one op, or a whole fit; one line a case", after_help = OUTPUT)]
pub(crate) struct Args {
    op: Op,
    /// Problems
    #[arg(long, default_value_t = 1, value_parser = at_least_one())]
    b: usize,
    /// Rows of a problem
    #[arg(long, default_value_t = 65536, value_parser = at_least_one())]
    n: usize,
    /// Centroids
    #[arg(long, default_value_t = 256, value_parser = at_least_one())]
    k: usize,
    /// Nearest centroids that are asked for
    #[arg(long, default_value_t = 8, value_parser = at_least_one())]
    m: usize,
    /// Columns
    #[arg(long, default_value_t = 64, value_parser = at_least_one())]
    d: usize,
    /// One or more, each a case of its own
    #[arg(long, default_value = "f32", value_delimiter = ',', value_parser = dtype())]
    dtype: Vec<DType>,
    #[arg(long, default_value = "cpu")]
    device: Backend,
    #[arg(long, default_value = "squared_euclidean")]
    metric: Distance,
    /// Iterations of a fit; of none are its start and its labels
    #[arg(long, default_value_t = 10)]
    iters: usize,
    /// Run a fit until no centroid moves
    #[arg(long, conflicts_with = "iters")]
    until_converged: bool,
    /// Where centroids start; of a fit, any but `given` is timed with it
    #[arg(long, default_value = "given")]
    init: Start,
    #[arg(long, default_value = "normal", value_delimiter = ',', help = data::help())]
    data: Vec<Source>,
    /// How much farther out the outlier of --data outlier is
    #[arg(long, default_value_t = 1000.0, value_parser = positive)]
    factor: f64,
    /// Time this data as well, in turns with each case, and print the ratio
    #[arg(long)]
    beside: Option<Pattern>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How the rows of an update are labelled
    #[arg(long, default_value = "uniform")]
    labels: Labels,
    /// Give each row a weight between 0.5 and 1.5 in a fit
    #[arg(long)]
    weighted: bool,
    /// Assign by this kernel; no fit runs on chip then
    #[arg(long)]
    kernel: Option<String>,
    /// Let the iterations of a fit save each other work wherever they can, or nowhere; by default where it pays
    #[arg(long)]
    skip: Option<Skip>,
    /// Seconds that the repeats of a case may take
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    budget: f64,
    /// Timed repeats
    #[arg(long, default_value_t = 7, value_parser = at_least_one())]
    reps: usize,
    /// Also compare with the definition, and two runs with each other
    #[arg(long)]
    check: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

fn dtype() -> impl TypedValueParser<Value = DType> {
    PossibleValuesParser::new(["f16", "bf16", "f32", "f64"]).try_map(|name| name.parse())
}

fn positive(number: &str) -> Result<f64> {
    let value: f64 = number.parse()?;
    ensure!(value > 0.0 && value.is_finite(), "it must be a finite number above 0");
    Ok(value)
}

impl Distance {
    fn metric(self) -> Metric {
        match self {
            Self::SquaredEuclidean | Self::Euclidean => Metric::SquaredEuclidean,
            Self::Cosine => Metric::Cosine,
            Self::Dot => Metric::Dot,
            Self::Manhattan => Metric::Manhattan,
        }
    }
}

impl Start {
    /// As a fit knows it, unless centroids are given.
    fn init(self) -> Option<Init> {
        match self {
            Self::Given => None,
            Self::Random => Some(Init::Random),
            Self::Even => Some(Init::Even),
            Self::KMeansPlusPlus => Some(Init::KMeansPlusPlus),
            Self::GreedyKMeansPlusPlus => Some(Init::GreedyKMeansPlusPlus),
            Self::KMeansParallel => Some(Init::KMeansParallel),
            Self::Optimal => Some(Init::Optimal),
        }
    }
}

fn main() -> Result<()> {
    run(&Args::parse())
}

/// An error where a case is refused, fails, or has a wrong result.
pub(crate) fn run(args: &Args) -> Result<()> {
    let (device, _) = args.device.open()?;
    memory::keep(&device)?;
    if args.metric == Distance::Euclidean {
        eprintln!("euclidean: computed as squared_euclidean, which has the same nearest centroids");
    }
    if args.op == Op::Tune {
        ensure!(args.kernel.is_none(), "--kernel cannot be combined with tune, which times all of them");
        return args.dtype.iter().try_for_each(|&dtype| tune::run(args, dtype, &device));
    }
    ensure!(args.op.fits() || !args.weighted, "--weighted cannot be combined with this op: fits have weights");
    let alone = args.op != Op::FitTol || args.beside.is_none();
    ensure!(alone, "--beside cannot be combined with fit-tol, which is timed beside fit");
    let (mut cases, mut wrong) = (0, 0);
    for (&dtype, source) in args.dtype.iter().flat_map(|dtype| args.data.iter().map(move |source| (dtype, source))) {
        cases += 1;
        wrong += !measured(args, dtype, source, &device)? as usize;
    }
    if wrong > 0 {
        bail!("{wrong} of {cases} cases have wrong results");
    }
    Ok(())
}

/// Prints the line of a case; whether its result is right, as far as it is checked.
fn measured(args: &Args, dtype: DType, source: &Source, device: &Device) -> Result<bool> {
    let x = source.rows(args, dtype, device)?;
    let (b, n, d) = x.dims3()?;
    let mut cases = vec![Case::new(args, source, x.clone())?];
    let beside = args.beside.map(Source::Pattern).filter(|beside| beside != source);
    let other = |op| Args { op, b, n, d, data: vec![], dtype: vec![], kernel: args.kernel.clone(), ..*args };
    if let Some(beside) = &beside {
        let args = other(args.op);
        cases.push(Case::new(&args, beside, beside.rows(&args, dtype, device)?)?);
    }
    if args.op == Op::FitTol {
        cases.push(Case::new(&other(Op::Fit), source, x)?);
    }
    let times = case::time(&mut cases, args.reps, args.budget)?;
    let case = &mut cases[0];

    let (ms, iterations) = (times[0].median(), case.iterations()?);
    let (each, size) = (ms / iterations.max(1.0), (b * n * d) as f64);
    let mut line = json!({
        "op": name(&args.op), "device": name(&args.device), "b": b, "n": n, "k": args.k, "d": d,
        "dtype": dtype.as_str(), "metric": args.metric.metric().name(), "init": name(&args.init),
        "data": source.to_string(), "weighted": args.weighted,
        "ms": ms, "ms_min": times[0].least(), "cpu_ms": times[0].cpu_median(),
        "tflops": 2.0 * size * args.k as f64 / each / 1e9,
        "tbs": size * dtype.size_in_bytes() as f64 / each / 1e9,
        "plan": case.plan()?,
    });
    let fit = (args.op == Op::FitTol).then(|| name(&Op::Fit));
    if let Some(beside) = args.beside.map(|beside| name(&beside)).or(fit) {
        line["beside"] = json!(beside);
        line["ratio"] = json!(times[0].least() / times.last().map_or(ms, Times::least));
    }
    if let (Op::FitTol, Some(fit)) = (args.op, times.last()) {
        line["fit_ms"] = json!(fit.median());
        line["fit_cpu_ms"] = json!(fit.cpu_median());
    }
    if args.op.fits() {
        line["iters"] = json!(iterations);
        line["ms_per_iter"] = json!(each);
        line["inertia"] = json!(case.inertia()?);
        let passes = case.passes()?;
        line["products"] = passes.iter().map(|pass| pass.products).collect();
        line["moved"] = passes.iter().map(|pass| pass.moved).collect();
        line["pass_ms"] = passes.iter().map(|pass| pass.ms).collect();
    }
    let verdict = if args.check { Some(case.verdict()?) } else { None };
    if let (Some(verdict), Some(line)) = (&verdict, line.as_object_mut()) {
        line.extend(verdict.fields());
    }
    match args.json {
        true => println!("{line}"),
        false => println!("{}", sentence(&line, verdict.as_ref())),
    }
    Ok(verdict.is_none_or(|verdict| verdict.is_right()))
}

/// As the command line spells it.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
}

fn sentence(line: &Value, verdict: Option<&Verdict>) -> String {
    let text = |key: &str| line[key].as_str().unwrap_or_default().to_string();
    let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
    let mut all = format!("{} {} {} {}", text("op"), text("device"), text("dtype"), text("data"));
    all += &format!(", b {} n {} k {} d {}", line["b"], line["n"], line["k"], line["d"]);
    all += &format!(": {:.3} ms (least {:.3})", number("ms"), number("ms_min"));
    if line["iters"].is_number() {
        all += &format!(", {} iterations of {:.3}", number("iters"), number("ms_per_iter"));
    }
    all += &format!(", {:.3} TFLOP/s", number("tflops"));
    if let Some(products) = line["products"].as_array().filter(|products| !products.is_empty()) {
        let sum: f64 = products.iter().filter_map(Value::as_f64).sum();
        all += &format!(", {:.3} of all products", sum / products.len() as f64);
    }
    if line["ratio"].is_number() {
        all += &format!(", {:.2} times {}", number("ratio"), text("beside"));
    }
    match verdict {
        Some(verdict) => format!("{all}; {verdict}"),
        None => all,
    }
}
