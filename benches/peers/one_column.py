#!/usr/bin/env python3
"""Times the optimal clusters of rows of one column here and in kmeans1d, on an idle machine, and writes a record.

  set up as for cpu.py, and
  target/peers/bin/python benches/peers/one_column.py target/release/examples/bench     # benches/record/one-column-DATE.csv

Both find the optimum, kmeans1d on one thread, this crate by two threads (`Init::Optimal`, with its labels and centroids,
and one iteration that changes nothing). Rows are normal f32, which kmeans1d takes as f64; of a batch it takes one problem after another, and a figure
is of so many as SOME says, times what they are a part of. Inertias must be equal but for what rounding centroids to f32 leaves. Figures are the
minimum and the median of the rounds, in which both take turns, in milliseconds.
"""
import collections, csv, datetime, importlib.metadata, json, os, pathlib, statistics, subprocess, sys, tempfile

import cpu
import kmeans1d
import numpy

PINNED = "0.5.0"
ROUNDS, SOME = 3, 64
Shape = collections.namedtuple("Shape", "b n k")
SHAPES = [Shape(1, 10_000, 16), Shape(1, 100_000, 16), Shape(1, 100_000, 256), Shape(1, 1_000_000, 16), Shape(18_432, 384, 16)]


def ours(bench, path, shape):
    command = [bench, "fit", "--data", path, "--k", str(shape.k), "--init", "optimal", "--iters", "1", "--reps", "1", "--json"]
    line = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout)
    return line["inertia"], line["ms"]


def by_kmeans1d(rows, shape):
    problems = rows[:SOME, :, 0].astype(numpy.float64)
    found, spent = cpu.timed(lambda: [kmeans1d.cluster(x, shape.k) for x in problems])
    inertia = sum(float(((x - numpy.take(f.centroids, f.clusters)) ** 2).sum()) for x, f in zip(problems, found))
    part = len(problems) / shape.b
    return inertia / part, spent.ms / part


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    version = importlib.metadata.version("kmeans1d")
    if version != PINNED:
        sys.exit(f"installed is kmeans1d {version}, compared is with {PINNED}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: cpu.THREADS])
    cpu.expect_idle("the load average of a minute", os.getloadavg()[0], cpu.IDLE_LOAD, False)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            rows = numpy.random.default_rng(0).standard_normal((shape.b, shape.n, 1), dtype=numpy.float32)
            path = os.path.join(folder, "rows.npy")
            numpy.save(path, rows)
            times = collections.defaultdict(list)
            for _ in range(ROUNDS):
                for who, (inertia, ms) in (("candle-flash-kmeans", ours(sys.argv[1], path, shape)), ("kmeans1d", by_kmeans1d(rows, shape))):
                    times[who].append((inertia, ms))
            own, theirs = (times[who][0][0] for who in times)
            # Of a batch kmeans1d has seen a part.
            assert abs(own - theirs) <= (1e-5 if shape.b == 1 else 0.05) * theirs, f"{shape}: inertias {own} and {theirs}"
            for who, rounds in times.items():
                spent = [ms for _, ms in rounds]
                lines.append([*shape, who, f"{min(spent):.2f}", f"{statistics.median(spent):.2f}", f"{rounds[0][0]:.9g}"])
    path = cpu.ROOT / "benches" / "record" / f"one-column-{datetime.date.today()}.csv"
    with open(path, "w", newline="") as file:
        print(f"# Intel(R) Xeon(R) Processor, {cpu.THREADS} cores, idle; benches/peers/one_column.py at commit {cpu.commit()}; kmeans1d {version}; ms", file=file)
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["b", "n", "k", "who", "ms_min", "ms_median", "inertia"])
        out.writerows(lines)
    print(f"# {path}")


if __name__ == "__main__":
    main()
