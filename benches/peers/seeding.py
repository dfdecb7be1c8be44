#!/usr/bin/env python3
"""Times starts here and in scikit-learn, on an idle machine, says how good they are, and writes a record.

  set up as for cpu.py, and
  target/peers/bin/python benches/peers/seeding.py target/release/examples/bench     # benches/record/starts-DATE.csv

Both draw 2 + floor(ln(k)) candidates for each centroid but the first and keep the best (scikit-learn's `kmeans_plusplus`), or one (`n_local_trials=1`).
Times are minima and medians over the seeds, in milliseconds of wall and of CPU time, both in turns; ours are of a fit without an iteration, which
labels all rows and adds up their distances as well. What a start is worth is the inertia of its rows as centroids, over the
seeds. Of blobs that lie apart it also counts the fits that go on from there to the least inertia of all.
"""
import collections, csv, datetime, json, os, statistics, subprocess, sys, tempfile

import cpu
import numpy
from sklearn.cluster import KMeans, kmeans_plusplus

Shape = collections.namedtuple("Shape", "data n d k seeds")
SHAPES = [
    Shape("normal", 50_000, 384, 32, 5),
    Shape("normal", 50_000, 384, 500, 3),
    Shape("normal", 100_000, 64, 256, 3),
    Shape("blobs", 20_000, 96, 20, 20),
]
INITS = {"greedy": (None, "greedy"), "plain": (1, "kmeans++")}
Start = collections.namedtuple("Start", "ms cpu_ms inertia of_fit")
EXACT = 1 + 1e-6  # of the least inertia: f32 centroids


def made(shape):
    random = numpy.random.default_rng(0)
    rows = random.standard_normal((shape.n, shape.d), dtype=numpy.float32)
    if shape.data == "blobs":
        rows += random.uniform(-10, 10, (shape.k, shape.d)).astype(numpy.float32)[numpy.arange(shape.n) % shape.k]
    return rows


def ours(bench, path, shape, init, seed):
    def fit(iters):
        command = [bench, "fit", "--data", path, "--k", str(shape.k), "--init", INITS[init][1], "--seed", str(seed), "--iters", str(iters), "--reps", "1", "--json"]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)

    start = fit(0)
    return Start(start["ms"], start["cpu_ms"], start["inertia"], fit(100)["inertia"] if shape.data == "blobs" else None)


def by_sklearn(rows, shape, init, seed):
    trials = INITS[init][0]
    (centres, _), time = cpu.timed(lambda: kmeans_plusplus(rows, shape.k, random_state=seed, n_local_trials=trials))
    fit = KMeans(shape.k, init=centres, n_init=1, max_iter=100, tol=0).fit(rows).inertia_ if shape.data == "blobs" else None
    return Start(time.ms, time.cpu_ms, cpu.inertia(rows, centres), fit)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cpu.THREADS])
    cpu.expect_idle("the load average of a minute", os.getloadavg()[0], cpu.IDLE_LOAD, False)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            rows = made(shape)
            path = os.path.join(folder, "rows.npy")
            numpy.save(path, rows)
            for init in INITS:
                starts = collections.defaultdict(list)
                for seed in range(shape.seeds):
                    starts["candle-flash-kmeans"].append(ours(sys.argv[1], path, shape, init, seed))
                    starts["scikit-learn"].append(by_sklearn(rows, shape, init, seed))
                fits = [start.of_fit for all in starts.values() for start in all]
                for who, all in starts.items():
                    ms, cpu_ms, inertia = ([start[field] for start in all] for field in range(3))
                    exact = sum(start.of_fit <= min(fits) * EXACT for start in all) if shape.data == "blobs" else ""
                    lines.append([*shape, init, who, *(f"{value:.1f}" for value in (min(ms), statistics.median(ms), statistics.median(cpu_ms))), f"{statistics.median(inertia):.7g}", exact])
                    print(*lines[-1], sep=",", flush=True)
    path = cpu.ROOT / "benches" / "record" / f"starts-{datetime.date.today()}.csv"
    with open(path, "w", newline="") as file:
        print(f"# Intel(R) Xeon(R) Processor, {cpu.THREADS} cores, idle; benches/peers/seeding.py at commit {cpu.commit()}; scikit-learn {cpu.PINNED['sklearn']}; ms", file=file)
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["data", "n", "d", "k", "seeds", "trials", "who", "ms_min", "ms_median", "cpu_ms_median", "inertia_median", "exact_fits"])
        out.writerows(lines)
    print(f"# {path}")


if __name__ == "__main__":
    main()
