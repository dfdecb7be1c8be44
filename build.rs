//! Compiles each `.cu` file below `kernels/` to one fatbin in `OUT_DIR`: machine code for the architectures at hand and PTX for others.

use std::{
    collections::hash_map::DefaultHasher,
    env, fs,
    hash::{Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Machine code is shipped for these where the toolkit has them, and runs on later GPUs of the same major version, but for
/// that of "90a"; `FLASH_KMEANS_ARCHS` ("80;90a") names others.
const ARCHS: [&str; 4] = ["80", "90a", "100", "120"];
/// PTX for any later GPU.
const PTX: &str = "-gencode=arch=compute_80,code=compute_80";

fn main() {
    for path in ["build.rs", "kernels", "src/tiles.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for variable in ["NVCC", "CUDA_HOME", "FLASH_KMEANS_ARCHS", "DOCS_RS"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() || env::var_os("DOCS_RS").is_some() {
        return;
    }
    let nvcc = &nvcc();
    let archs = &archs(nvcc);

    let mut files = vec![];
    walk("kernels".as_ref(), &mut files);
    files.sort();
    let (kernels, headers): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|path| path.extension().is_some_and(|e| e == "cu"));
    let headers = headers.iter().map(read).collect::<Vec<_>>();
    // A toolkit may be replaced where it is.
    let shared = &(output(nvcc, "--version"), headers);
    thread::scope(|scope| {
        for kernel in kernels {
            scope.spawn(move || compile(nvcc, archs, kernel, shared));
        }
    });
}

/// All files below a folder.
fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("kernels/ is part of the package") {
        let path = entry.expect("kernels/ can be listed").path();
        if path.is_dir() {
            walk(&path, files);
        } else {
            files.push(path);
        }
    }
}

fn read(path: &PathBuf) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file named after an architecture with instructions of its own (`*_sm90.cu`) is compiled for that one alone. Some take
/// minutes, so what comes out of the last build stays where nothing that went into it has changed.
fn compile(nvcc: &PathBuf, archs: &Vec<String>, kernel: PathBuf, shared: &(String, Vec<Vec<u8>>)) {
    let stem = kernel.file_stem().expect("a .cu file has a stem");
    let own = stem.to_string_lossy().ends_with("_sm90").then(|| vec!["90a".to_string()]);
    let mut flags: Vec<String> = ["-fatbin", "-O3", "-std=c++17", "-Ikernels"].map(String::from).into();
    flags.extend(own.is_none().then(|| PTX.into()));
    flags.extend(own.as_ref().unwrap_or(archs).iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
    flags.extend(tile_macros());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(stem).with_extension("fatbin");
    let mut inputs = DefaultHasher::new();
    (nvcc, &flags, shared, read(&kernel)).hash(&mut inputs);
    let (inputs, known) = (format!("{:016x}", inputs.finish()), out.with_extension("inputs"));
    if out.exists() && fs::read_to_string(&known).is_ok_and(|known| known == inputs) {
        return;
    }
    let _ = fs::remove_file(&known);
    let run = Command::new(nvcc).args(flags).arg("-o").arg(&out).arg(&kernel).output();
    let run = run.unwrap_or_else(|e| panic!("{}: cannot run {}: {e}", kernel.display(), nvcc.display()));
    if !run.status.success() {
        panic!("{}: nvcc failed\n{}", kernel.display(), String::from_utf8_lossy(&run.stderr));
    }
    fs::write(known, inputs).expect("OUT_DIR can be written to");
}

/// `NVCC`, or that of `CUDA_HOME`, or that on `PATH`.
fn nvcc() -> PathBuf {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin").join("nvcc"));
    let set = env::var_os("NVCC").map(PathBuf::from);
    set.or(home.filter(|nvcc| nvcc.exists())).unwrap_or_else(|| "nvcc".into())
}

fn output(nvcc: &PathBuf, question: &str) -> String {
    let run = Command::new(nvcc).arg(question).output();
    let run = run.unwrap_or_else(|e| panic!("the cuda feature needs the CUDA toolkit: {}: {e}", nvcc.display()));
    String::from_utf8_lossy(&run.stdout).into_owned()
}

fn archs(nvcc: &PathBuf) -> Vec<String> {
    if let Ok(list) = env::var("FLASH_KMEANS_ARCHS") {
        return list.split([';', ',', ' ']).filter(|a| !a.is_empty()).map(String::from).collect();
    }
    let known = output(nvcc, "--list-gpu-code");
    // The list has no "a" variants; a toolkit that knows sm_90 knows sm_90a.
    let has = |arch: &&str| known.lines().any(|line| line.trim() == format!("sm_{}", arch.trim_end_matches('a')));
    ARCHS.iter().copied().filter(has).map(String::from).collect()
}

/// The numbers of `src/tiles.rs`, which kernels know as macros.
fn tile_macros() -> Vec<String> {
    let text = fs::read_to_string("src/tiles.rs").expect("src/tiles.rs is part of the package");
    let constants = text.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(": usize = "));
    constants.map(|(name, value)| format!("-D{name}={}", value.trim_end_matches(';').replace('_', ""))).collect()
}
