//! What is shown: that it arrives, that nothing hides in it, and sizes that make no sense.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::common::holdstill::{command, finish, listing, run};
use crate::common::scene::{Scene, backup_to};
use crate::common::{run as tool, temp_dir};

/// Text of a disk that would turn what follows it, hide in it, or end the line.
const HIDDEN: [char; 9] = [
    '\u{202e}',
    '\u{200b}',
    '\u{2028}',
    '\u{9b}',
    '\u{feff}',
    '\u{2066}',
    '\u{ad}',
    '\u{7f}',
    '\u{e0041}',
];

/// Whoever only reads the exit code must not believe that nothing was to be said.
#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let scene = Scene::new();
    let image = scene.image.to_str().unwrap();
    let source = scene.source.to_str().unwrap();
    let [new, target] = ["new", "target"].map(|name| scene.path(name).display().to_string());
    for args in [
        vec!["verify", image],
        vec!["verify", image, "--json"],
        vec!["inspect", image],
        vec!["inspect", image, "--json"],
        vec!["inspect", source],
        vec!["backup", source, "-o", &new],
        vec!["backup", source, "-o", &new, "--force", "--json"],
        vec!["backup", source, "-o", &target, "--dry-run"],
        vec!["restore", image, &target],
        vec!["clone", source, &target, "--yes", "--json"],
        vec!["cleanup", "--json"],
        vec!["--version"],
        vec!["--version", "--json"],
        vec!["--help"],
        vec!["backup", "--help"],
        vec!["completions", "bash"],
        vec!["man"],
    ] {
        let mut command = command(&args);
        command.stdout(File::options().write(true).open("/dev/full").unwrap());
        let done = finish(command);
        assert_eq!(done.code(), Some(1), "{args:?}: {done}");
        assert!(done.stderr.contains("holdstill: cannot print"), "{done}");
    }
    // The result alone was lost.
    run(["verify", &new]).expect(0);
    // Whoever wants nothing shown has nothing to miss.
    let mut quiet = command(["verify", image, "--quiet"]);
    quiet.stdout(File::options().write(true).open("/dev/full").unwrap());
    finish(quiet).expect(0);
}

#[test]
fn nothing_hides_in_what_is_shown() {
    let dir = temp_dir();
    let hidden: String = HIDDEN.iter().collect();
    for (number, c) in HIDDEN.iter().enumerate() {
        // A label has room for 16 bytes.
        let label = format!("a{c}b");
        let source = dir.path().join(format!("source{number}"));
        crate::common::volume::ext4(&source, 8 << 20, "", None);
        tool("tune2fs", ["-L", &label, source.to_str().unwrap()]);
        let shown = run([Path::new("inspect"), &source]).expect(0);
        let shown = String::from_utf8(shown.stdout).unwrap();
        assert!(!shown.contains(*c) && shown.contains("`a\\u{"), "{shown:?}");
        let json = run([Path::new("inspect"), Path::new("--json"), &source]).expect(0);
        assert_eq!(json.last()["label"], label.as_str());
        assert!(!String::from_utf8(json.stdout).unwrap().contains(*c));
    }
    // In names of files: of errors, warnings, plans, results.
    let image = dir.path().join(&hidden);
    let missing = dir.path().join(format!("missing{hidden}"));
    let source = dir.path().join("source0");
    for json in [&[][..], &["--json"]] {
        let json = json.iter().map(PathBuf::from);
        for (code, args) in [
            (0, backup_to(&source, &image).to_vec()),
            (0, vec!["verify".into(), image.clone()]),
            (0, vec!["inspect".into(), image.clone()]),
            (1, vec!["verify".into(), missing.clone()]),
            (2, vec!["verify".into(), image.clone(), missing.clone()]),
        ] {
            let done = run(args.into_iter().chain(json.clone()));
            let all = [done.stderr.as_bytes(), &done.stdout].concat();
            let all = String::from_utf8(all).unwrap();
            assert!(!all.contains(HIDDEN), "{all:?}");
            assert_eq!(done.code(), Some(code), "{done}");
        }
    }
}

#[test]
fn sizes_that_make_no_sense_are_wrong_usage() {
    let scene = Scene::new();
    let target = scene.path("target").display().to_string();
    let source = scene.source.to_str().unwrap();
    let image = scene.image.to_str().unwrap();
    let copying = [
        ["backup", source, "-o", &target].to_vec(),
        ["clone", source, &target].to_vec(),
        ["restore", image, &target].to_vec(),
    ];
    for verb in &copying {
        for wrong in [
            ["--rate", "0"],
            ["--rate", "0K"],
            ["--rate", "99999999T"],
            ["--memory", "0"],
            ["--memory", "1K"],
            ["--memory", "99999999999T"],
            ["--threads", "0"],
            ["--threads", "257"],
            ["--threads", "-1"],
        ] {
            run(verb.iter().chain(&wrong)).expect(2);
        }
        if verb[0] != "restore" {
            run(verb.iter().chain(&["--cow-size", "0"])).expect(2);
        }
    }
    for wrong in [["--threads", "0"], ["--memory", "0"]] {
        run(["verify", image].iter().chain(&wrong)).expect(2);
    }
    assert!(!Path::new(&target).exists());
    // The largest there are.
    let most = [
        "--rate",
        "16777215T",
        "--memory",
        "16777215T",
        "--threads",
        "16",
    ];
    for verb in &copying {
        let _ = std::fs::remove_file(&target);
        run(verb.iter().chain(&most).chain(if verb[0] == "backup" {
            &[]
        } else {
            &["--yes"][..]
        }))
        .expect(0);
    }
    run(["verify", image, "--memory", "16777215T", "--threads", "16"]).expect(0);
}

/// The part file that replaces an image has a name of its own, which must fit as well.
#[test]
fn an_image_of_a_long_name_can_be_replaced_and_one_too_long_is_seen_at_once() {
    let scene = Scene::new();
    for name in ["x".repeat(250), "x".repeat(255), "é".repeat(127)] {
        let image = scene.path(&name);
        for _ in 0..2 {
            run(backup_to(&scene.source, &image)).expect(0);
        }
        run([Path::new("verify"), &image]).expect(0);
        std::fs::remove_file(&image).unwrap();
    }
    let refused = run(backup_to(&scene.source, &scene.path(&"x".repeat(256)))).expect(1);
    assert!(
        !refused.stderr.contains("offline"),
        "it had begun: {refused}"
    );
    assert_eq!(listing(scene.dir.path()), ["image", "source"]);
}
