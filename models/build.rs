//! Applies `drop_in/*.patch` to the models of candle-transformers, from its own sources, for `tests/drop_in.rs` and the example
//! `generate`. A patch that does not fit ends the build.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The example `generate` has one of the models read more positions than its tables have.
const LONG: &str = "quantized_llama";
const POSITIONS: [&str; 2] = ["pub const MAX_SEQ_LEN: usize = 4096;", "pub const MAX_SEQ_LEN: usize = 8192;"];

fn main() {
    println!("cargo::rerun-if-changed=drop_in");
    println!("cargo::rerun-if-changed=../Cargo.lock");
    // The models ask for a feature of their own crate.
    println!("cargo::rustc-check-cfg=cfg(feature, values(\"flash-attn\"))");
    let (sources, out) = (sources(), PathBuf::from(env::var_os("OUT_DIR").unwrap()));
    let mut patches: Vec<_> = fs::read_dir("drop_in").unwrap().map(|entry| entry.unwrap().path()).collect();
    patches.sort();
    for path in patches {
        let (name, text) = (path.file_stem().unwrap().to_str().unwrap(), fs::read_to_string(&path).unwrap());
        let source = sources.join(format!("{name}.rs"));
        let original = fs::read_to_string(&source).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        let patched = diffy::Patch::from_str(&text).map_err(|e| e.to_string());
        let patched = patched.and_then(|patch| diffy::apply(&original, &patch).map_err(|e| e.to_string()));
        let patched = patched.unwrap_or_else(|e| panic!("{} does not fit {}: {e}", path.display(), source.display()));
        write(&out.join(format!("{name}.rs")), &patched);
        if name == LONG {
            for (text, kind) in [(&original, "original"), (&patched, "patched")] {
                let [was, now] = POSITIONS;
                assert_eq!(text.matches(was).count(), 1, "{}: {was}", source.display());
                write(&out.join(format!("long_{kind}_{name}.rs")), &text.replace(was, now));
            }
        }
    }
}

/// Inside a module that includes the text, comments on the whole are none.
fn write(path: &Path, text: &str) {
    let lines: Vec<_> = text.lines().filter(|line| !line.starts_with("//!")).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

/// The folder of models of the candle-transformers that the workspace builds with, wherever cargo has it.
fn sources() -> PathBuf {
    let mut command = Command::new(env::var_os("CARGO").unwrap());
    command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &env::var("TARGET").unwrap()]);
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo metadata writes JSON");
    let packages = metadata["packages"].as_array().expect("there are packages");
    let found: Vec<_> = packages.iter().filter(|package| package["name"] == "candle-transformers").collect();
    let [package] = found[..] else { panic!("{} packages are candle-transformers", found.len()) };
    PathBuf::from(package["manifest_path"].as_str().expect("a package has a manifest"))
        .with_file_name("src")
        .join("models")
}
