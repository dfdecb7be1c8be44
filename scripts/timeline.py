#!/usr/bin/env python3
"""Draws the last run in each trace of scripts/trace.c: what the host does above what the GPU does.

    timeline.py OUT.svg TITLE=TRACE.csv...

Prints for each how long the GPU was busy and idle between the first and the last kernel of the run.
"""

import csv
import sys

WIDTH, LEFT, LANE, GAP = 1180, 70, 26, 92
HOST, WAITS = "#555555", "#dddddd"
COLOURS = {
    "assign": "#4878cf",
    "recheck": "#d65f5f",
    "prepare": "#b47cc7",
    "drop": "#b47cc7",
    "split": "#b47cc7",
    "order": "#c4ad66",
    "update": "#6acc65",
    "fit": "#6acc65",
    "scan": "#77bedb",
}
NAMES = [("assign", "labels"), ("recheck", "recheck"), ("prepare", "centroids prepared"), ("order", "sort"),
         ("update", "update, or all of a fit"), ("scan", "scan of X"), ("", "other")]


def colour(name):
    return next((c for start, c in COLOURS.items() if name.startswith(start)), "#999999")


def last_run(path):
    """The spans of the last run, which a scan of X begins, in microseconds from there."""
    with open(path, newline="") as file:
        rows = [(kind, name, int(begin), int(end)) for kind, name, begin, end in csv.reader(file)]
    kernels = sorted((r for r in rows if r[0] == "kernel"), key=lambda r: r[2])
    start = max(r[2] for r in kernels if r[1].startswith("scan_start"))
    end = max(r[3] for r in kernels)
    # The host is ahead: its calls for this run begin before the run does.
    calls = [r for r in rows if r[0] == "host" and r[1] != "cuGetProcAddress_v2"]
    calls = [r for r in calls if start - 200_000 < r[2] < end + 20_000]
    spans = [r for r in rows if r[0] != "host" and start <= r[2] <= end] + calls
    return [(kind, name, (a - start) / 1e3, (b - start) / 1e3) for kind, name, a, b in sorted(spans, key=lambda r: r[2])]


def panel(out, top, title, spans):
    gpu = [s for s in spans if s[0] != "host"]
    first, last = min(s[2] for s in spans), max(s[3] for s in spans)
    busy, reached = 0.0, 0.0
    gaps = []
    for _, _, a, b in gpu:
        if a > reached:
            gaps.append(a - reached)
        busy += max(0.0, b - max(a, reached))
        reached = max(reached, b)
    total = gpu[-1][3]
    text = (f"{title}: {total:,.0f} us, of which the GPU is idle {total - busy:,.0f}; "
            f"{len(gpu)} launches, longest gap {max(gaps, default=0):.1f} us")
    print(text)
    out.append(f'<text x="10" y="{top}" font-size="13">{text}</text>')
    scale = (WIDTH - LEFT - 10) / (last - first)
    for lane, label, chosen in ((0, "host", [s for s in spans if s[0] == "host"]), (1, "GPU", gpu)):
        y = top + 10 + lane * (LANE + 4)
        out.append(f'<text x="10" y="{y + 17}" font-size="12">{label}</text>')
        for kind, name, a, b in chosen:
            fill = colour(name) if kind != "host" else WAITS if "Synchronize" in name else HOST
            width = max((b - a) * scale, 0.15)
            out.append(f'<rect x="{LEFT + (a - first) * scale:.2f}" y="{y}" width="{width:.2f}" '
                       f'height="{LANE}" fill="{fill}"/>')


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, top = [], 24
    for argument in sys.argv[2:]:
        title, path = argument.rsplit("=", 1)
        panel(out, top, title, last_run(path))
        top += GAP
    x = LEFT
    legend = [(HOST, "host calls"), (WAITS, "host waits")] + [(colour(start or "?"), name) for start, name in NAMES]
    for fill, name in legend:
        out.append(f'<rect x="{x}" y="{top - 8}" width="12" height="12" fill="{fill}"/>')
        out.append(f'<text x="{x + 16}" y="{top + 2}" font-size="11">{name}</text>')
        x += 30 + 7 * len(name)
    with open(sys.argv[1], "w") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top + 16}" '
                   f'font-family="sans-serif"><rect width="100%" height="100%" fill="white"/>\n')
        file.write("\n".join(out) + "\n</svg>\n")


if __name__ == "__main__":
    main()
