//! The commands of the user around the freeze: what they print, what happens when they fail or when nobody
//! wants to wait for them any more.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::common::holdstill::{command, listing, run, wait};
use crate::common::scene::Scene;
use crate::common::{needs_root, output, run as tool, spawn};

/// The arguments that copy the scene's source with these hooks: into an image, or as a clone.
fn copy(scene: &Scene, verb: &str, target: &Path, pre: &str, post: &str) -> Vec<OsString> {
    let mut args = vec![verb.into(), scene.source.clone().into()];
    if verb == "backup" {
        args.push("-o".into());
    }
    args.push(target.into());
    for (option, script) in [("--pre-freeze", pre), ("--post-freeze", post)] {
        args.extend([option.into(), script.into()]);
    }
    args
}

fn with_json(mut args: Vec<OsString>) -> Vec<OsString> {
    args.push("--json".into());
    args
}

#[test]
fn privileged_asked_to_end_a_run_does_not_wait_for_its_hook() {
    needs_root!();
    let scene = Scene::new();
    let [pid, undone, target] = ["pid", "undone", "target"].map(|name| scene.path(name));
    // A group of two processes, of which one does not care.
    let pre = format!(
        "echo $$ > {0}.new; mv {0}.new {0}; (trap '' TERM; sleep 1000) & sleep 1000",
        pid.display()
    );
    let post = format!("echo >> {}", undone.display());
    for (verb, signal, code) in [("backup", "TERM", 143), ("clone", "INT", 130)] {
        let command_line = copy(&scene, verb, &target, &pre, &post);
        let mut command = command(command_line);
        let child = spawn(&mut command);
        while !pid.exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        tool("kill", ["-s", signal, &child.id().to_string()]);
        wait(&command, child).expect(code);
        let group = std::fs::read_to_string(&pid).unwrap();
        let left = output("pgrep", ["-g", group.trim(), "-r", "R,S,D"]);
        assert_eq!(String::from_utf8_lossy(&left.stdout), "", "{verb}");
        assert_eq!(std::fs::read_to_string(&undone).unwrap(), "\n", "{verb}");
        for file in [&pid, &undone] {
            std::fs::remove_file(file).unwrap();
        }
        assert_eq!(listing(scene.dir.path()), ["image", "source"], "{verb}");
    }
}

#[test]
fn privileged_a_failed_post_hook_is_told_by_the_exit_code() {
    needs_root!();
    let scene = Scene::new();
    for verb in ["backup", "clone"] {
        for post in ["exit 3", "kill -9 $$", "/no/such/program"] {
            let target = scene.path("target");
            // A shell that complains does so on standard error, beside the lines.
            let args = with_json(copy(&scene, verb, &target, "true", post));
            let done = command(args).output().unwrap();
            assert_eq!(done.status.code(), Some(6), "{done:?}");
            let lines = String::from_utf8(done.stdout).unwrap();
            let last: Value = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
            assert_eq!(last["event"], "result");
            assert_eq!(last["hook_failed"], true);
            assert!(lines.contains("the post-freeze command failed"), "{lines}");
            if verb == "backup" {
                run([Path::new("verify"), &target]).expect(0);
            } else {
                tool("e2fsck", [Path::new("-fn"), &target]);
            }
            std::fs::remove_file(&target).unwrap();
            run(copy(&scene, verb, &target, "true", post))
                .expect(6)
                .says("warning: the post-freeze command failed");
            std::fs::remove_file(&target).unwrap();
        }
        let target = scene.path("target");
        let done = run(with_json(copy(&scene, verb, &target, "true", "true"))).expect(0);
        assert_eq!(done.last()["hook_failed"], false);
        std::fs::remove_file(&target).unwrap();
    }
}

/// What hooks print is shown, and never where an image or lines for programs go.
#[test]
fn privileged_what_hooks_print_is_shown_beside_everything_else() {
    needs_root!();
    let scene = Scene::new();
    let say = |phase: &str| {
        format!("echo {phase} $HOLDSTILL_PHASE '\u{1b}[7m'; echo {phase} in trouble >&2")
    };
    let (pre, post) = (say("first"), say("last"));
    let image = scene.path("new");
    let copy = |target: &Path| copy(&scene, "backup", target, &pre, &post);
    let said = [
        "first pre",
        "first in trouble",
        "last post",
        "last in trouble",
    ];
    // The terminal is the hook's own after the freeze; before it, we show what it prints.
    let command = |args: Vec<OsString>| {
        let mut command = command(args);
        command.env("PATH", "/usr/bin:/bin");
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        output
    };
    for args in [copy(&image), with_json(copy(&image))] {
        let output = command(args);
        let [stdout, stderr] = [output.stdout, output.stderr].map(String::from_utf8);
        let (stdout, stderr) = (stdout.unwrap(), stderr.unwrap());
        for said in said {
            assert!(stderr.contains(said) && !stdout.contains(said), "{stderr}");
        }
        assert!(
            stderr.contains("pre-freeze: first pre \\u{1b}[7m"),
            "{stderr}"
        );
        std::fs::remove_file(&image).unwrap();
    }
    // An image on standard output: it is intact; lines for programs are nothing else.
    for args in [copy(Path::new("-")), with_json(copy(Path::new("-")))] {
        let is_json = args.last().is_some_and(|last| last == "--json");
        let output = command(args);
        std::fs::write(&image, output.stdout).unwrap();
        run([Path::new("verify"), &image]).expect(0);
        let stderr = String::from_utf8(output.stderr).unwrap();
        let told = stderr.lines().filter(|line| {
            let line: Option<Value> = serde_json::from_str(line).ok();
            assert_eq!(line.is_some(), is_json, "{stderr}");
            line.is_some_and(|line| line["event"] == "hook")
        });
        assert!(!is_json || told.count() >= 2, "{stderr}");
        for said in said {
            assert!(stderr.contains(said), "{stderr}");
        }
    }
    // One that fails is heard before we say so.
    let args: Vec<PathBuf> = vec![
        "backup".into(),
        scene.source.clone(),
        "-o".into(),
        image.clone(),
    ];
    let args = args
        .into_iter()
        .chain(["--force", "--pre-freeze"].map(PathBuf::from));
    run(args.chain([PathBuf::from("echo so it is; exit 3")]))
        .expect(1)
        .says("pre-freeze: so it is\n")
        .says("exit code 3");
}
