//! The layers look one way. Every path of every source file is read: nothing below names what is above it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers of `src/`, from the bottom: a module names its own layer and those before it.
const LAYERS: &[&[&str]] = &[
    &["error", "extent", "progress", "read_at", "thread", "units"],
    &["fs", "host", "image", "source"],
    &["pipeline"],
    &["destination", "freeze", "storage"],
    &["verbs"],
    &["cli"],
    &["main", "lib"],
];

/// What is looked up all the same, each with its reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[(
    "progress",
    "image",
    "it tells of freezes and damage in the words of the image",
)];

/// What parsers of disks and images never name: they make no system call.
const PURE: &[&str] = &["fs", "image"];
const IMPURE: &[&str] = &[
    "holdstill_platform",
    "nix",
    "libc",
    "std::fs",
    "std::os",
    "std::process",
    "std::net",
];

fn layer(module: &str) -> usize {
    let found = LAYERS.iter().position(|layer| layer.contains(&module));
    found.unwrap_or_else(|| panic!("`{module}` is in no layer: name it in {}", file!()))
}

/// All source files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// The text without comments, and without its unit tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The words after `prefix` wherever it stands: `fs` for `crate::fs::ext4`.
fn named_after<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let rest = code.split(prefix).skip(1);
    let word = |rest: &'a str| {
        let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
        &rest[..end.unwrap_or(rest.len())]
    };
    rest.map(word).filter(|word| !word.is_empty()).collect()
}

/// Which module of the top a file of `src/` belongs to.
fn module_of(folder: &Path, path: &Path) -> String {
    let below = path.strip_prefix(folder).expect("below the folder");
    let first = below.components().next().expect("a name");
    let first = Path::new(first.as_os_str());
    first
        .file_stem()
        .expect("a name")
        .to_str()
        .expect("text")
        .to_owned()
}

/// What looks the wrong way, each with the file it stands in.
fn wrong(files: &BTreeMap<PathBuf, (String, String)>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (path, (module, code)) in files {
        let mut say = |what: String| wrong.push(format!("{}: {what}", path.display()));
        for named in named_after(code, "crate::") {
            // Items of the root itself begin with a capital letter or are macros.
            let is_module = LAYERS.concat().contains(&named);
            let is_excepted = EXCEPTIONS
                .iter()
                .any(|(from, to, _)| *from == module.as_str() && *to == named);
            if is_module && !is_excepted && layer(named) > layer(module) {
                say(format!("`{module}` names `{named}`, which is above it"));
            }
        }
        if code.contains("crate::{") {
            say("name the modules one by one".to_owned());
        }
        for impure in IMPURE.iter().filter(|_| PURE.contains(&module.as_str())) {
            if code.contains(impure) {
                say(format!(
                    "`{module}` names `{impure}`, but is to make no system call"
                ));
            }
        }
    }
    wrong
}

fn files() -> BTreeMap<PathBuf, (String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let of_each = sources(&folder).into_iter().map(|path| {
        let module = module_of(&folder, &path);
        let code = code(&path);
        (path, (module, code))
    });
    of_each.collect()
}

#[test]
fn no_layer_looks_up() {
    let files = files();
    assert!(files.len() > 100, "all files are there");
    for (module, _) in files.values() {
        layer(module);
    }
    let wrong = wrong(&files);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_looks_up_is_found() {
    let file = |module: &str, code: &str| {
        let of_it = (module.to_owned(), code.to_owned());
        wrong(&BTreeMap::from([(PathBuf::from("file.rs"), of_it)]))
    };
    assert_eq!(
        file("freeze", "use crate::fs::Kind;\nuse crate::thread;").len(),
        0
    );
    assert_eq!(file("fs", "use crate::freeze::plan;").len(), 1);
    assert_eq!(file("image", "fn f() { std::fs::read(x) }").len(), 1);
    assert_eq!(file("units", "fn f() -> crate::image::Grade {}").len(), 1);
    assert_eq!(file("verbs", "use crate::{cli, fs};").len(), 1);
}

#[test]
fn the_platform_does_not_know_the_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("platform/src");
    for path in sources(&folder) {
        let code = code(&path);
        assert!(!code.contains("use holdstill::"), "{}", path.display());
    }
}

#[test]
fn unsafe_code_is_forbidden_above_the_platform() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for name in ["lib.rs", "main.rs"] {
        let text = fs::read_to_string(root.join(name)).expect("a source file");
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name}");
    }
}
