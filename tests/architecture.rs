//! Calls go down only: every path in `src/` against the layers that ARCHITECTURE.md lists. And structs that Rust and the
//! kernels share are the same.

use std::{fs, path::Path};

/// The files below `dir` as modules, `cuda::memory` for `cuda/memory.rs`, each with its code.
fn modules(dir: &Path, parent: &str, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = match path.file_stem().unwrap().to_str().unwrap() {
            "mod" => parent.to_string(),
            stem if parent.is_empty() => stem.to_string(),
            stem => format!("{parent}::{stem}"),
        };
        if path.is_dir() {
            modules(&path, &name, found);
        } else if name != "lib" {
            let text = fs::read_to_string(path).unwrap();
            // Tests come last, and comments may link to anything.
            let code = text.split("#[cfg(test)]").next().unwrap();
            found.push((name, code.lines().map(|line| format!(" {}\n", line.split("//").next().unwrap())).collect()));
        }
    }
}

/// Collects the paths of a tree as `use` takes it, `a::{b, c::d}`, and returns the text after it.
fn paths<'a>(tree: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    if let Some(mut rest) = tree.strip_prefix('{') {
        while !rest.starts_with('}') {
            // Up to the comma there may be ` as name`.
            rest = paths(rest.trim_start(), prefix, found).trim_start_matches(|c| c != ',' && c != '}');
            rest = rest.trim_start_matches(',').trim_start();
        }
        return &rest[1..];
    }
    let end = tree.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(tree.len());
    let (path, rest) = (format!("{prefix}{}", &tree[..end]), &tree[end..]);
    match rest.strip_prefix("::") {
        Some(more) if more.starts_with(|c: char| c.is_alphabetic() || c == '{') => paths(more, &(path + "::"), found),
        _ => {
            found.push(path);
            rest
        }
    }
}

#[test]
fn calls_go_down_only() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let table = text.split("```layers\n").nth(1).unwrap().split("```").next().unwrap();
    let names = table.lines().map(|line| line.split('#').next().unwrap().split_whitespace());
    let layers: Vec<_> = names.enumerate().flat_map(|(layer, names)| names.map(move |name| (layer, name))).collect();
    let is_in = |path: &str, name: &str| path == name || path.starts_with(&format!("{name}::"));
    // The innermost of the names in the table that a path is in.
    let place = |path: &str| layers.iter().filter(|(_, name)| is_in(path, name)).max_by_key(|(_, name)| name.len());

    let strangers = |a: &str, b: &str| is_in(a, "cpu") && is_in(b, "cuda") || is_in(a, "cuda") && is_in(b, "cpu");

    let mut files = vec![];
    modules(&root.join("src"), "", &mut files);
    let mut wrong = vec![];
    for (_, name) in layers.iter().filter(|(_, name)| !files.iter().any(|(module, _)| module == name)) {
        wrong.push(format!("{name} is no module"));
    }
    for (module, code) in &files {
        let Some((layer, own)) = place(module) else {
            wrong.push(format!("{module} is in no layer"));
            continue;
        };
        let parent = module.rsplit_once("::").map_or(String::new(), |(parent, _)| format!("{parent}::"));
        let mut calls = vec![];
        for (start, prefix) in [("crate::", ""), ("super::", &parent), (" mod ", &format!("{module}::"))] {
            for (at, _) in code.match_indices(start) {
                paths(&code[at + start.len()..], prefix, &mut calls);
            }
        }
        for call in calls {
            match place(&call) {
                _ if strangers(module, &call) => wrong.push(format!("{module} calls {call} of the other back end")),
                Some((to, name)) if to > layer || name == own => {}
                Some(_) => wrong.push(format!("{module} calls {call}, which is not below it")),
                None => wrong.push(format!("{module} imports {call}, but not from the module that defines it")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The structs of a source file in order, each with the names of its fields in order. Fields come before methods.
fn structs(text: &str, end: &str, field: fn(&str) -> Option<&str>) -> Vec<(String, Vec<String>)> {
    let name = |text: &str| text.rsplit(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap().to_string();
    let code: String = text.lines().map(|line| line.split("//").next().unwrap().to_string() + "\n").collect();
    let bodies = code.split("struct ").skip(1).map(|text| text.split(end).next().unwrap().split_once(" {").unwrap());
    let fields = |body: &str| body.split([',', ';']).filter_map(field).map(|f| name(f.trim())).collect();
    bodies.map(|(head, body)| (name(head), fields(body.split("__device__").next().unwrap()))).collect()
}

#[test]
fn structs_that_cross_to_kernels_are_the_same_in_both_languages() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
    // `const uint32_t *list, *count`, `int64_t sizes[8]`, `float rows = INFINITY`, and the `template <class T>` of a method.
    let kernels = structs(&read("kernels/params.cuh"), "\n};", |text| {
        let text = text.split(['=', '[']).next().unwrap().trim();
        (!text.is_empty() && !text.starts_with("template")).then_some(text)
    });
    let host = structs(&read("src/cuda/params.rs"), "\n}", |text| Some(text.split_once(':')?.0));
    assert!(kernels.len() > 12, "{kernels:?}");
    assert_eq!(kernels, host);
}
