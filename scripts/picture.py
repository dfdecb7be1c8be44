#!/usr/bin/env python3
"""Draws assets/times.svg, the README's picture, from the records that it names: picture.py > assets/times.svg"""

import csv
from pathlib import Path

RECORDS = Path(__file__).resolve().parent.parent / "benches" / "record"
ASSIGN, UPDATE = "h200-2026-11-21.csv", "update-h200-2026-11-21.csv"
NAMES = {
    "candle-flash-kmeans": "this crate",
    "flashlib-cute": "FlashLib, CuTe",
    "flashlib-cutedsl": "FlashLib, CuTe",
    "flashlib-triton": "FlashLib, Triton",
    "flash-kmeans": "flash-kmeans",
}
ORDER = list(dict.fromkeys(NAMES.values()))
# A title, the record, the columns of its rows that are meant, and the column that has the time.
GROUPS = [
    ("Find the nearest of 8,192 centroids for a million rows of 128 numbers, f16", ASSIGN,
     {"op": "assign", "n": "1048576", "k": "8192", "d": "128", "dtype": "f16", "data": "normal"}, "ms"),
    ("The same in f32", ASSIGN,
     {"op": "assign", "n": "1048576", "k": "8192", "d": "128", "dtype": "f32", "data": "normal"}, "ms"),
    ("A whole iteration of k-means, eight million rows, 1,024 centroids, f16", UPDATE,
     {"n": "8388608", "k": "1024", "d": "128", "dtype": "f16"}, "ms_per_iter"),
]
WIDTH, LEFT, LINE, BAR, MILLISECOND = 860, 150, 24, 16, 46


def rows(record):
    with open(RECORDS / record, newline="") as file:
        yield from csv.DictReader(line for line in file if not line.startswith("#"))


def main():
    out, y = [], 16
    for title, record, wanted, column in GROUPS:
        out.append(f'<text x="10" y="{y + 8}" font-weight="bold">{title}</text>')
        y += 16
        times = {NAMES[row["who"]]: float(row[column]) for row in rows(record)
                 if row["who"] in NAMES and row[column] and all(row[key] == value for key, value in wanted.items())}
        for name in sorted(times, key=ORDER.index):
            ms, ours = times[name], name == ORDER[0]
            label = f"{ms:.1f} ms" + (" in TF32: labels not exact" if wanted["dtype"] == "f32" and not ours else "")
            out.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{name}</text>'
                       f'<rect x="{LEFT}" y="{y}" width="{ms * MILLISECOND:.0f}" height="{BAR}" '
                       f'fill="{"#0072b2" if ours else "#bbbbbb"}"/>'
                       f'<text x="{LEFT + ms * MILLISECOND + 6:.0f}" y="{y + 13}">{label}</text>')
            y += LINE
        y += 14
    out.append(f'<text x="10" y="{y}" fill="#555555">One NVIDIA H200, 2026-11-21. Shorter is better. Labels of this crate are '
               "exact, and the same bits in every run.</text>")
    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 14}" font-family="sans-serif" '
          f'font-size="13"><rect width="100%" height="100%" fill="white"/>')
    print("\n".join(out) + "\n</svg>")


if __name__ == "__main__":
    main()
