#!/usr/bin/env python3
"""Times what this crate is compared with on a GPU, and what the GPU can do: a line of JSON for each case.

  gpu.py [ceiling] [assign] [update] [fit] [stream] [decode] [dense] [--case B,N,K,D,DTYPE]... [--iters 10]
         [--tokens 32768,65536,131072] [--batch 1,4,16] [--columns 128]

ceiling: PyTorch's 8192^3 f16 matmul and a device copy. assign, update, fit: flash-kmeans and FlashLib, on fresh normal rows.
decode, dense: PyTorch's attention of one token over a cache (scaled_dot_product_attention by each of its back ends, and two matmuls),
for each of --tokens, --batch and --columns, and of all tokens to all. Without names, all.

Times are CUDA events, the median of repeats after warm-up. Run it on the machine and in the quarter of an hour in which `bench` and the
examples `attention` and `video_attention` time this crate, so that a ratio is of one card at one time. Versions: requirements.txt.
"""

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
# B,N,K,D,DTYPE: the shapes of the records and of docs/results.md.
CASES = {
    "assign": ["1,1048576,8192,128,f16", "1,1048576,8192,64,f16", "1,1048576,8192,96,f16", "1,1048576,8192,256,f16",
               "1,1048576,4096,512,f16", "1,1048576,65536,128,f16", "1,8388608,1024,128,f16", "1,4194304,256,128,f16",
               "32,65536,1024,128,f16", "32,75600,1000,128,f16", "256,32768,400,128,f16", "256,8192,256,128,f16",
               "1,1048576,8192,128,bf16", "1,1048576,8192,128,f32"],
    "update": ["1,33554432,4096,128,f16", "1,8388608,1024,128,f16", "32,65536,1024,128,f16"],
    "fit": ["1,8388608,1024,128,f16", "1,1048576,8192,128,f16", "32,65536,1024,128,f16", "32,75600,1000,128,f16",
            "256,8192,256,128,f16", "8,8192,128,128,f16", "8,2048,64,128,f16", "1,1048576,8192,128,f32"],
    "stream": ["1,33554432,1024,128,f32", "1,268435456,16384,128,f16"],
}
KEY_HEADS, QUERY_HEADS, HEAD_DIM, ALL_HEADS = 8, 32, 128, 24
DENSE = 32_768, 75_600
CACHED = 1 << 29  # bytes of the caches that calls read in turn, at least: several times a GPU's L2


def emit(**values):
    print(json.dumps(values), flush=True)


def events(call):
    """Milliseconds of one call, the host's time to launch it included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def median_ms(call, repeats=15, warm=3, seconds=3.0):
    for _ in range(warm):
        call()
    torch.cuda.synchronize()
    times, begun = [], time.monotonic()
    while len(times) < repeats and (not times or time.monotonic() - begun < seconds):
        times.append(events(call))
    return statistics.median(times)


def queued_ms(call, count):
    """Milliseconds a call of so many one after another."""
    return events(lambda: [call() for _ in range(count)]) / count


def graph_ms(call, count):
    """The same, replayed from a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return events(graph.replay) / count


def attempt(measure, **what):
    """Emits what `measure` returns, or why it could not."""
    try:
        emit(**what, **measure())
    except Exception as error:  # a peer that refuses a shape, or is not there, must not end the others
        emit(**what, error=repr(error)[:200])
    torch.cuda.empty_cache()


def ceiling():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    emit(case="matmul_8192_f16", device=torch.cuda.get_device_name(), torch=torch.__version__,
         tflops=2 * 8192**3 / median_ms(lambda: a @ b) / 1e9)
    source = torch.empty(2 << 30, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    emit(case="copy", tbs=2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9)


def flash_kmeans():
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
    from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid
    from flash_kmeans.kmeans_triton_impl import batch_kmeans_Euclid

    def assign(x, c, _):
        squares = (x.float() ** 2).sum(-1)
        return lambda: euclid_assign_triton(x, c, squares)

    def update(x, c, _):
        labels = torch.randint(0, c.shape[1], x.shape[:2], device="cuda", dtype=torch.int32)
        return lambda: triton_centroid_update_sorted_euclid(x, labels, c)

    def fit(x, c, iters):
        return lambda: batch_kmeans_Euclid(x, c.shape[1], max_iters=iters, tol=-1.0, init_centroids=c.clone())

    return {"assign": assign, "update": update, "fit": fit}


def flashlib(backend):
    from flashlib.primitives import kmeans

    def refuse_others(x):
        if backend == "cutedsl" and (x.shape[0] > 1 or x.dtype == torch.float32):
            raise ValueError("one problem of halves")

    def assign(x, c, _):
        from flashlib.primitives.kmeans import cutedsl_assign_euclid

        refuse_others(x)
        return lambda: cutedsl_assign_euclid(x, c)

    def fit(x, c, iters):
        refuse_others(x)
        return lambda: kmeans.flash_kmeans(x, c.shape[1], max_iters=iters, tol=0.0, init_centroids=c.clone(), backend=backend)

    return {"assign": assign, "fit": fit}


# What each has: a function that finds its ops where it is installed, and their names.
PEERS = {
    "flash-kmeans": (flash_kmeans, ("assign", "update", "fit")),
    "flashlib-triton": (functools.partial(flashlib, "triton"), ("fit",)),
    "flashlib-cutedsl": (functools.partial(flashlib, "cutedsl"), ("assign", "fit")),
}


def clustering(op, cases, iters):
    peers = {peer: find for peer, (find, ops) in PEERS.items() if op in ops}
    for case, (peer, find) in itertools.product(cases, peers.items()):
        *sizes, dtype = case.split(",")
        b, n, k, d = map(int, sizes)

        def measure():
            prepare = find()[op]
            x = torch.randn(b, n, d, device="cuda", dtype=DTYPES[dtype])
            c = x[:, torch.randperm(n, device="cuda")[:k]].contiguous()
            call = prepare(x, c, iters)
            if op == "fit":
                ms = median_ms(call, repeats=5, warm=2)
                return {"ms": ms, "iters": iters, "ms_per_iter": ms / iters}
            ms = median_ms(call)
            work = {"tflops": 2 * b * n * k * d / ms / 1e9} if op == "assign" else {}
            return {"ms": ms, "tbs": x.numel() * x.element_size() / ms / 1e9} | work

        attempt(measure, peer=peer, op=op, b=b, n=n, k=k, d=d, dtype=dtype)


def stream(cases, iters):
    """flash-kmeans' fit of rows in page-locked memory, by wall clock: of so many iterations less that of one."""
    for case in cases:
        _, n, k, d, dtype = (int(part) if part.isdigit() else part for part in case.split(","))

        def measure():
            from flash_kmeans import kmeans_largeN

            x = torch.empty(n, d, dtype=DTYPES[dtype], pin_memory=True)
            for rows in x.split(1 << 22):
                rows.copy_(torch.randn(rows.shape, device="cuda", dtype=x.dtype))
            c = x[:: n // k][:k].contiguous().cuda()

            def seconds(iters):
                torch.cuda.synchronize()
                begun = time.monotonic()
                kmeans_largeN(x, k, max_iters=iters, tol=-1.0, init_centroids=c.clone())
                torch.cuda.synchronize()
                return time.monotonic() - begun

            seconds(1)
            one, all_of_them = seconds(1), seconds(iters)
            begun = time.monotonic()
            torch.empty(x[: 1 << 24].shape, dtype=x.dtype, device="cuda").copy_(x[: 1 << 24])
            torch.cuda.synchronize()
            link = x[: 1 << 24].nbytes / (time.monotonic() - begun) / 1e9
            return {"gb": x.nbytes / 1e9, "link_gb_s": link, "s": all_of_them, "iters": iters,
                    "s_per_iter": (all_of_them - one) / (iters - 1)}

        attempt(measure, peer="flash-kmeans", op="stream", n=n, k=k, d=d, dtype=dtype, gpus=torch.cuda.device_count())


def half(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.float16)


def decode(tokens, batches, columns):
    """Dense attention of one token, in each way that PyTorch can go, and which is the fastest in a CUDA graph.

    Query heads that share a key head are heads of their own, or rows of one head. Calls read caches in turn, as layers do, so that
    L2 holds nothing of what is read.
    """
    shapes = {"grouped heads": (QUERY_HEADS, 1), "heads as rows": (KEY_HEADS, QUERY_HEADS // KEY_HEADS)}
    backends = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
                "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH, "products": None}
    ways = [(name, heads) for name, heads in itertools.product(backends, shapes)
            if heads == "heads as rows" or name not in ("efficient", "products")]
    for n, batch, d in itertools.product(tokens, batches, columns):
        count = max(2, -(-CACHED // (4 * batch * KEY_HEADS * n * d)))
        times = {}
        for name, heads in ways:
            way = f"{name}, {heads}"

            def measure():
                caches = itertools.cycle([(half(batch, KEY_HEADS, n, d), half(batch, KEY_HEADS, n, d)) for _ in range(count)])
                query = half(batch, *shapes[heads], d)

                def call():
                    keys, values = next(caches)
                    if name == "products":
                        return torch.softmax(query @ keys.mT * d**-0.5, -1) @ values
                    return scaled_dot_product_attention(query, keys, values, enable_gqa=heads == "grouped heads")

                backend = backends[name]
                with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                    one = median_ms(call, repeats=12)
                    queued, times[way] = queued_ms(call, 50), graph_ms(call, 20)
                return {"sdpa_events_ms": one, "sdpa_queued_ms": queued, "sdpa_graph_ms": times[way]}

            attempt(measure, op="decode", way=way, tokens=n, batch=batch, columns=d, caches=count)
        if times:
            fastest = min(times, key=times.get)
            emit(op="decode", fastest=fastest, tokens=n, batch=batch, columns=d, sdpa_graph_ms=times[fastest])


def dense():
    ways = {"flash_ms": SDPBackend.FLASH_ATTENTION, "cudnn_ms": SDPBackend.CUDNN_ATTENTION}
    for tokens, (column, backend) in itertools.product(DENSE, ways.items()):

        def measure():
            queries, keys, values = (half(1, ALL_HEADS, tokens, HEAD_DIM) for _ in range(3))
            with sdpa_kernel(backend):
                return {column: median_ms(lambda: scaled_dot_product_attention(queries, keys, values), repeats=5, warm=2)}

        attempt(measure, op="dense", tokens=tokens)


def main():
    names = ["ceiling", *CASES, "decode", "dense"]
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("what", nargs="*", help=" ".join(names))
    args.add_argument("--case", action="append", help="B,N,K,D,DTYPE, instead of the records' shapes")
    args.add_argument("--iters", type=int, default=10, help="of a fit")
    for name, default in {"tokens": "32768,65536,131072", "batch": "1,4,16", "columns": str(HEAD_DIM)}.items():
        args.add_argument(f"--{name}", type=lambda text: [int(part) for part in text.split(",")], default=default, help="of decode")
    args = args.parse_args()
    if unknown := set(args.what) - set(names):
        sys.exit(f"{' '.join(unknown)}: not one of {' '.join(names)}")
    for what in args.what or names:
        if what == "stream":
            stream(args.case or CASES[what], args.iters)
        elif what in CASES:
            clustering(what, args.case or CASES[what], args.iters)
        elif what == "decode":
            decode(args.tokens, args.batch, args.columns)
        else:
            {"ceiling": ceiling, "dense": dense}[what]()


if __name__ == "__main__":
    main()
