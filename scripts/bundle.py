#!/usr/bin/env python3
"""Builds executables and packs them, stripped, into one archive to take to a GPU machine.

    bundle.py OUT.tar.xz [--add FILE]... -- CARGO ARGUMENTS [-- CARGO ARGUMENTS]...

Each group after `--` is one cargo command, for example

    bundle.py out.tar.xz -- test --release --workspace --features cuda --no-run -- build --release --workspace --features cuda --examples

and every executable that it reports goes in under the name of its target (unit tests as NAME-unit, an
example that shares its name with a test as NAME-example).
On the GPU machine: mkdir bin && tar -xf OUT.tar.xz -C bin && LD_LIBRARY_PATH=/usr/local/cuda/lib64 bin/NAME
"""

import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


# Executables of one crate share most of their bytes; a window of several of them keeps one copy.
WINDOW = [{"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": 2**28}]


def parse(arguments):
    """The archive, the files to add, and the cargo commands."""
    if "--" not in arguments[1:]:
        sys.exit(__doc__)
    split = arguments.index("--")
    (out, *options), rest = arguments[:split], arguments[split:]
    if options[::2] != ["--add"] * (len(options) // 2) or len(options) % 2:
        sys.exit(__doc__)
    commands = []
    for argument in rest:
        if argument == "--":
            commands.append([])
        else:
            commands[-1].append(argument)
    return Path(out), [Path(f) for f in options[1::2]], commands


def build(command):
    """Runs cargo and yields (name, kind, path) for each executable that it made."""
    cargo = ["cargo", *command, "--message-format=json-render-diagnostics"]
    with subprocess.Popen(cargo, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            message = json.loads(line)
            if message.get("reason") != "compiler-artifact" or not message.get("executable"):
                continue
            target = message["target"]
            unit = message["profile"]["test"] and target["kind"][0] in ("lib", "bin")
            yield target["name"] + ("-unit" if unit else ""), target["kind"][0], message["executable"]
    if process.returncode:
        sys.exit(f"cargo {' '.join(command)} failed")


def main():
    out, extra, commands = parse(sys.argv[1:])
    built = [found for command in commands for found in build(command)]
    tests = {name for name, kind, _ in built if kind == "test"}
    executables = {f"{name}-example" if kind == "example" and name in tests else name: path for name, kind, path in built}
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        lzma.open(out, "wb", filters=WINDOW) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, path in sorted(executables.items()):
            stripped = Path(folder, name)
            subprocess.run(["strip", "-s", "-o", stripped, path], check=True)
            archive.add(stripped, arcname=name)
        for file in extra:
            archive.add(file, arcname=file.name)
    size = out.stat().st_size / 2**20
    print(f"{out}: {size:.1f} MiB, {len(executables)} executables: {', '.join(sorted(executables))}")


if __name__ == "__main__":
    main()
