//! Compiles each `.cu` file below `kernels/` to one fatbin in `OUT_DIR`: machine code for the architectures at hand and PTX for others.

use std::{
    collections::{hash_map::DefaultHasher, HashMap, HashSet},
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
    // A toolkit may be replaced where it is.
    let shared = &Shared {
        toolkit: output(nvcc, "--version"),
        headers: headers.iter().map(|path| (path.clone(), read(path))).collect(),
        tiles: tile_macros(),
    };
    thread::scope(|scope| {
        for kernel in kernels {
            scope.spawn(move || compile(nvcc, archs, kernel, shared));
        }
    });
}

/// What kernels are compiled with.
struct Shared {
    toolkit: String,
    headers: HashMap<PathBuf, String>,
    /// The numbers of `src/tiles.rs`.
    tiles: Vec<(String, String)>,
}

impl Shared {
    /// A kernel and all that it includes.
    fn sources<'a>(&'a self, kernel: &'a str) -> Vec<&'a str> {
        let (mut sources, mut seen, mut next) = (vec![kernel], HashSet::new(), 0);
        while next < sources.len() {
            let lines = sources[next].lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next());
            let included = lines.filter_map(|name| self.headers.get_key_value(&Path::new("kernels").join(name)));
            let new: Vec<_> = included.filter(|(path, _)| seen.insert(*path)).map(|(_, text)| text.as_str()).collect();
            sources.extend(new);
            next += 1;
        }
        sources
    }

    /// The numbers that these name, as macros.
    fn macros(&self, sources: &[&str]) -> Vec<String> {
        let named = self.tiles.iter().filter(|(name, _)| sources.iter().any(|text| text.contains(name)));
        named.map(|(name, value)| format!("-D{name}={value}")).collect()
    }
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

fn read(path: &PathBuf) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A file named after an architecture with instructions of its own (`*_sm90.cu`) is compiled for that one alone. Some take
/// minutes, so what comes out of the last build stays where nothing that went into it has changed.
fn compile(nvcc: &PathBuf, archs: &Vec<String>, kernel: PathBuf, shared: &Shared) {
    let stem = kernel.file_stem().expect("a .cu file has a stem");
    let own = stem.to_string_lossy().ends_with("_sm90").then(|| vec!["90a".to_string()]);
    let mut flags: Vec<String> = ["-fatbin", "-O3", "-std=c++17", "-Ikernels"].map(String::from).into();
    flags.extend(own.is_none().then(|| PTX.into()));
    flags.extend(own.as_ref().unwrap_or(archs).iter().map(|a| format!("-gencode=arch=compute_{a},code=sm_{a}")));
    let text = read(&kernel);
    let sources = shared.sources(&text);
    flags.extend(shared.macros(&sources));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join(stem).with_extension("fatbin");
    let mut inputs = DefaultHasher::new();
    (nvcc, &flags, &shared.toolkit, sources).hash(&mut inputs);
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

/// The numbers of `src/tiles.rs`, which kernels know as macros, by their names.
fn tile_macros() -> Vec<(String, String)> {
    let text = fs::read_to_string("src/tiles.rs").expect("src/tiles.rs is part of the package");
    let constants = text.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(": usize = "));
    constants.map(|(name, value)| (name.into(), value.trim_end_matches(';').replace('_', ""))).collect()
}
