# What is done often, by name: `just` lists it. Every recipe is a line or two that works without `just` as well.

_list:
    @{{ just_executable() }} --list --unsorted

# Format, lints and docs, of the CPU's half and, with a stand-in for nvcc, of CUDA's
lint:
    cargo fmt --all -- --check
    cargo clippy --release --workspace --all-targets -- -D warnings
    cargo clippy --release --all-targets --features parquet -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --release
    . scripts/cuda-env.sh && scripts/lint-cuda.sh

# All tests, on the CPU
test *ARGS:
    cargo test --release --workspace {{ ARGS }}

# All tests, on the CPU and the first GPU
test-gpu *ARGS:
    FLASH_KMEANS_TEST_DEVICE=cuda cargo test --release --workspace --features cuda {{ ARGS }}

# Compile every kernel and print its registers; fails on spills. No GPU
kernels:
    . scripts/cuda-env.sh && scripts/check-kernels.sh

# Compare the kernels' machine code with that of another revision, of all files or of some. No GPU
same-kernels REV *FILES:
    . scripts/cuda-env.sh && scripts/same-kernels.sh {{ REV }} {{ FILES }}

# Time and check one op or a fit: `just bench assign --n 100000 --k 256 --d 128 --check`
bench *ARGS:
    cargo run --release --example bench -- {{ ARGS }}

# The same on a GPU
bench-gpu *ARGS:
    cargo run --release --features cuda --example bench -- {{ ARGS }} --device cuda

# Time CPU iterations beside FAISS and scikit-learn and write benches/record/cpu-DATE.csv; on an idle machine only
record:
    cargo build --release --example bench
    [ -d target/peers ] || python3 -m venv target/peers
    target/peers/bin/pip install --quiet -r benches/peers/requirements-cpu.txt
    target/peers/bin/python benches/peers/cpu.py target/release/examples/bench

# Build everything for a GPU machine, and pack it
bundle OUT="target/bundle.tar.xz":
    . scripts/cuda-env.sh && python3 scripts/bundle.py {{ OUT }} -- test --release --workspace --features cuda --no-run -- build --release --workspace --features cuda --examples

# Run the test binaries of an unpacked bundle under compute-sanitizer, with all of its tools or some. On a GPU
sanitize FOLDER *TOOLS:
    scripts/sanitize.sh {{ FOLDER }} {{ TOOLS }}

# All that a change must pass without a GPU
ci:
    .ci/run
