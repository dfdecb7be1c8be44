#!/usr/bin/env python3
"""Times a k-means iteration here, in FAISS, in scikit-learn and in SuperKMeans (flat) on two threads of an idle machine, and writes a record.

  python3 -m venv target/peers
  target/peers/bin/pip install -r benches/peers/requirements-cpu.txt
  cargo build --release --example bench
  target/peers/bin/python benches/peers/cpu.py target/release/examples/bench     # benches/record/cpu-DATE.csv

All have the same rows, the same start (row i * n / k for cluster i; SuperKMeans, which takes none, its own) and the same cores, and take turns in every round.
A figure is (a long fit - a fit of one iteration) / the iterations between them, so that start-up, initial and final passes
drop out alike; the record has the minimum and the median of the rounds, in wall time and in CPU time of all threads. All
must reach the same inertia, SuperKMeans about the same. The rows `fit-tol` are no iterations: they are what the default `tol` of this crate adds
to a fit, a pass over the rows once, as the difference of a fit of one iteration with it and one without. A machine that is not idle gives no record: that is looked at before every round, and
whatever other processes spend during a round is counted too. Takes three to five minutes.
"""
import argparse, collections, csv, datetime, json, os, pathlib, platform, resource, statistics, subprocess, sys, tempfile, time, warnings

THREADS = 2
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = str(THREADS)  # before anything starts its threads

import faiss, numpy, sklearn, superkmeans
from sklearn.cluster import KMeans

warnings.filterwarnings("ignore")  # fits that stop at max_iter, on purpose
PINNED = {"faiss": "1.15.1", "sklearn": "1.9.1", "numpy": "2.4.6", "superkmeans": "0.2.0"}
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

Shape = collections.namedtuple("Shape", "n d k iters")
SHAPES = {
    "full": [Shape(100_000, 128, 256, 11), Shape(100_000, 128, 1024, 11), Shape(50_000, 384, 512, 11), Shape(10_000, 64, 64, 45)],
    "tiny": [Shape(4_000, 16, 32, 5), Shape(2_000, 8, 16, 5)],
}
ROUNDS, FEWEST_ROUNDS, SECONDS = 5, 3, 280
IDLE_LOAD = 0.5  # processes that run or wait, over the last minute, before the first round
OTHERS = 0.1  # cores that other processes may take

Time = collections.namedtuple("Time", "ms cpu_ms")


class Busy(Exception):
    pass


def spent():
    """Seconds that all CPUs have worked, steal included, and those of this process and its children."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, open("/proc/stat").readline().split()[1:9])
    everyone = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return everyone, sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Others:
    """Cores that other processes took since this began."""

    def __init__(self):
        self.start, self.before = time.monotonic(), spent()

    def cores(self):
        (everyone, own), seconds = spent(), time.monotonic() - self.start
        return max(0.0, (everyone - self.before[0]) - (own - self.before[1])) / seconds


def expect_idle(what, value, limit, dry):
    if value > limit:
        message = f"the machine is not idle: {what} is {value:.2f}, and {limit} is the limit"
        if not dry:
            raise Busy(message)
        print(f"# {message} (a dry run goes on)")


def timed(work):
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, Time((time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3)


class Data:
    def __init__(self, shape, folder):
        self.shape = shape
        self.x = numpy.random.default_rng(0).standard_normal((shape.n, shape.d), dtype=numpy.float32)
        self.start = numpy.ascontiguousarray(self.x[numpy.arange(shape.k) * shape.n // shape.k])
        self.path = os.path.join(folder, f"{shape.n}-{shape.d}-{shape.k}.npy")
        numpy.save(self.path, self.x)


def ours(data, iters, bench):
    time.sleep(0.25)  # the other two leave OpenMP's threads spinning for a while
    command = [bench, "fit", "--data", data.path, "--k", str(data.shape.k), "--init", "even", "--iters", str(iters), "--reps", "1", "--json"]
    line = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    assert line["iters"] == iters, f"converged before iteration {iters}: {line}"
    return line["inertia"], Time(line["ms"], line["cpu_ms"])


def default_tol(data, bench):
    command = [bench, "fit-tol", "--data", data.path, "--k", str(data.shape.k), "--init", "even", "--iters", "1", "--reps", "1", "--json"]
    line = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return Time(line["ms"] - line["fit_ms"], line["cpu_ms"] - line["fit_cpu_ms"])


def by_faiss(data, iters, _):
    clustering = faiss.Clustering(data.shape.d, data.shape.k)
    clustering.niter, clustering.max_points_per_centroid, clustering.min_points_per_centroid = iters, 10**9, 1
    faiss.copy_array_to_vector(data.start.ravel(), clustering.centroids)
    _, spent = timed(lambda: clustering.train(data.x, faiss.IndexFlatL2(data.shape.d)))
    centroids = faiss.vector_to_array(clustering.centroids).reshape(data.start.shape)
    return (lambda: inertia(data.x, centroids)), spent


def by_sklearn(data, iters, _):
    fit, spent = timed(lambda: KMeans(data.shape.k, init=data.start, n_init=1, max_iter=iters, tol=0, algorithm="lloyd").fit(data.x))
    assert fit.n_iter_ == iters, f"converged in iteration {fit.n_iter_} of {iters}"
    return fit.inertia_, spent


def by_superkmeans(data, iters, _):
    settings = dict(iters=iters, hierarchical=False, sampling_fraction=1.0, max_points_per_cluster=10**9)
    fit = superkmeans.SuperKMeans(data.shape.k, data.shape.d, n_threads=THREADS, early_termination=False, **settings)
    centroids, spent = timed(lambda: fit.train(data.x))
    return (lambda: inertia(data.x, numpy.ascontiguousarray(centroids))), spent


def inertia(x, centroids):
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centroids)
    return float(index.search(x, 1)[0].astype(numpy.float64).sum())


WHO = {"candle-flash-kmeans": ours, "FAISS": by_faiss, "scikit-learn": by_sklearn, "SuperKMeans": by_superkmeans}
# How much more than the least inertia is about the same: one of them starts elsewhere.
SAME = {"SuperKMeans": 1.01}


def one_round(all_data, bench, times, check):
    for data in all_data:
        ends = {}
        for who, fit in WHO.items():
            _, short = fit(data, 1, bench)
            ends[who], long = fit(data, data.shape.iters, bench)
            between = data.shape.iters - 1
            times[data.shape, who].append(Time(*((b - a) / between for a, b in zip(short, long))))
        times[data.shape, "fit-tol"].append(default_tol(data, bench))
        if check:
            ends = {who: end() if callable(end) else end for who, end in ends.items()}
            least = min(ends.values())
            assert all(end <= least * SAME.get(who, 1.001) for who, end in ends.items()), f"{data.shape}: these did not do the same work: {ends}"


def commit():
    git = lambda *command: subprocess.run(["git", "-C", ROOT, *command], stdout=subprocess.PIPE, check=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("bench", help="target/release/examples/bench")
    args.add_argument("--shapes", choices=SHAPES, default="full")
    args.add_argument("--dry-run", action="store_true", help="go on where the machine is busy, and print instead of recording")
    args = args.parse_args()
    versions = {"faiss": faiss.__version__, "sklearn": sklearn.__version__, "numpy": numpy.__version__, "superkmeans": superkmeans.__version__}
    if versions != PINNED:
        sys.exit(f"installed are {versions}, compared is with {PINNED}: see the head of this file")
    cores = sorted(os.sched_getaffinity(0))[:THREADS]
    if len(cores) < THREADS:
        sys.exit(f"{THREADS} cores are needed, there are {len(cores)}")
    os.sched_setaffinity(0, cores)
    faiss.omp_set_num_threads(THREADS)
    try:
        measure(args, cores)
    except Busy as busy:
        sys.exit(f"no record: {busy}")


def measure(args, cores):
    begun, dry = time.monotonic(), args.dry_run
    expect_idle("the load average of a minute", os.getloadavg()[0], IDLE_LOAD, dry)
    model = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    loads, times = [], collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        all_data = [Data(shape, folder) for shape in SHAPES[args.shapes]]
        for number in range(1, ROUNDS + 1):
            before = Others()
            time.sleep(1)
            before, load = before.cores(), os.getloadavg()[0]
            print(f"# round {number}: load average {load:.2f}, other processes take {before:.2f} cores", flush=True)
            expect_idle("what other processes take, in cores,", before, OTHERS, dry)
            start, during = time.monotonic(), Others()
            one_round(all_data, args.bench, times, check=number == 1)
            during = during.cores()
            expect_idle("what other processes took during the round, in cores,", during, OTHERS, dry)
            loads.append(f"{load:.2f}/{during:.2f}")
            now = time.monotonic()
            if number >= FEWEST_ROUNDS and now - begun + (now - start) > SECONDS:
                break
    path = ROOT / "benches" / "record" / f"cpu-{datetime.date.today()}.csv"
    with (sys.stdout if dry else open(path, "w", newline="")) as file:
        out = csv.writer(file, lineterminator="\n")
        print(f"# {model}, {os.cpu_count()} cores, threads pinned to cores {cores}, Python {platform.python_version()}, FAISS {faiss.__version__},"
              f" scikit-learn {sklearn.__version__}, numpy {numpy.__version__}, SuperKMeans {superkmeans.__version__}", file=file)
        print(f"# benches/peers/cpu.py at commit {commit()}; ms of an iteration, minimum and median of {len(loads)} rounds;"
              f" load average before / cores of other processes during each: {' '.join(loads)}", file=file)
        out.writerow(["n", "d", "k", "dtype", "who", "ms_min", "ms_median", "cpu_ms_min", "cpu_ms_median"])
        for (shape, who), rounds in times.items():
            figures = [f(values) for values in zip(*rounds) for f in (min, statistics.median)]
            out.writerow([shape.n, shape.d, shape.k, "f32", who] + [f"{figure:.2f}" for figure in figures])
    if not dry:
        print(f"# {path}, in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
