#!/usr/bin/env python3
"""Times a k-means iteration here, in FAISS and in scikit-learn: same rows, same start, same cores, one run. Prints CSV.

  pip install faiss-cpu scikit-learn
  cargo build --release --example bench
  python3 benches/peers_cpu.py target/release/examples/bench > benches/record/NAME.csv

Every figure is (fit of 11 iterations - fit of 1) / 10, so that start-up, initial and final passes drop out alike; the
median of five rounds that interleave the three. Ours checks its labels against f64 once per shape.
"""
import csv, json, os, platform, statistics, subprocess, sys, tempfile, time, warnings
import faiss, numpy, sklearn
from sklearn.cluster import KMeans

SHAPES = [(100_000, 128, 256), (100_000, 128, 1024), (50_000, 384, 512)]
SHORT, LONG, ROUNDS = 1, 11, 5
warnings.filterwarnings("ignore")  # fits that stop at max_iter, on purpose


def ours(path, x, k, iters):
    out = subprocess.run([sys.argv[1], "fit", "--data", path, "--k", str(k), "--iters", str(iters), "--reps", "1", "--json"],
                         capture_output=True, check=True, text=True).stdout
    line = json.loads(out)
    assert line["iters"] == iters, line
    return line["ms"]


def timed(f):
    t = time.perf_counter()
    f()
    return (time.perf_counter() - t) * 1e3


def by_faiss(path, x, k, iters):
    c = faiss.Clustering(x.shape[1], k)
    c.niter, c.max_points_per_centroid, c.min_points_per_centroid = iters, 10**9, 1
    start = numpy.ascontiguousarray(x[:k])
    faiss.copy_array_to_vector(start.ravel(), c.centroids)
    return timed(lambda: c.train(x, faiss.IndexFlatL2(x.shape[1])))


def by_sklearn(path, x, k, iters):
    fit = KMeans(k, init=x[:k], n_init=1, max_iter=iters, tol=0, algorithm="lloyd")
    ms = timed(lambda: fit.fit(x))
    assert fit.n_iter_ == iters, fit.n_iter_
    return ms


def main():
    out = csv.writer(sys.stdout)
    model = next(l.split(": ")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name"))
    print(f"# {model}, {os.cpu_count()} cores, Python {platform.python_version()}, FAISS {faiss.__version__}, scikit-learn {sklearn.__version__}")
    out.writerow(["n", "d", "k", "dtype", "who", "ms_per_iteration", "lowest", "highest"])
    for n, d, k in SHAPES:
        x = numpy.random.default_rng(0).standard_normal((n, d), dtype=numpy.float32)
        with tempfile.NamedTemporaryFile(suffix=".npy") as f:
            numpy.save(f, x)
            f.flush()
            peers = {"candle-flash-kmeans": ours, "FAISS": by_faiss, "scikit-learn": by_sklearn}
            ms = {who: [] for who in peers}
            for _ in range(ROUNDS):
                for who, fit in peers.items():
                    ms[who].append((fit(f.name, x, k, LONG) - fit(f.name, x, k, SHORT)) / (LONG - SHORT))
            for who, m in ms.items():
                out.writerow([n, d, k, "f32", who] + [f"{v:.1f}" for v in (statistics.median(m), min(m), max(m))])
            sys.stdout.flush()


main()
